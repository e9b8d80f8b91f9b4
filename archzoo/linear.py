"""The Linear of the house: named blocks of rows, and the one reader of a weight.

Every matrix that maps vectors to vectors is a `Linear`. Where several share their input they lie in
one matrix, which costs one product instead of several, and each goes by a name: the rows of
attention's ``query_key_value`` are the blocks ``query``, ``key`` and ``value``. Whoever changes a
trained model (`archzoo.adapters`) says what it changes by these names.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archzoo.derivatives import followed
from archzoo.low_rank import (
    Change,
    Packed,
    changed_product,
    cheaper_merged,
    kept_product,
    merged,
    pack,
    rounded,
)
from archzoo.numerics import autocast_dtype, cast, product_dtype, without_autocast

#: Taken by whoever enters or leaves `Linear.held`, `Decoder.weights_held` or `Decoder.evaluating`.
#: No attribute of a module, which could not be copied then.
HOLDING = threading.RLock()


class Linear(nn.Linear):
    """``y = x W^T + b``, W of named blocks of rows; stacked: one such W for each expert.

    With adapters: ``y = x W^T + b + sum of their changes``, and where the weight itself is read,
    `effective_weight`.

    Nothing else reads ``.weight`` to compute with it, so a class that derives from this one and
    computes y in another way (few bits, shared rows) overrides `product` and `base_weight`, and
    everything follows.

    Args:
        in_features: Width of x.
        blocks: The names of its blocks of rows, in order, and how many rows each has, such as
            ``{"query": 128, "key": 32, "value": 32}``.
        stack: Matrices in one tensor (stack, out_features, in_features), as experts have them.
            None: one matrix.
        bias: Add b.
        residual_projection: It is the last of a residual branch: the decoder starts it smaller
            (residual-projection init, Radford et al., GPT-2, section 2.3).

    Attributes:
        blocks: As given.
        adapted: Whether it has adapters that are on.
    """

    #: Whether its weight is read without a call, by a kernel or a product of all experts.
    #: An adapter must then be able to say how it changes the weight.
    weight_is_read = False
    #: Whether it is called by `part` alone, so that nothing that is called can stand for it.
    called_in_parts = False
    #: Whether it has initialised itself, so that the decoder does not.
    keeps_init = False
    #: Whether all that it computes is x times `base_weight`, and the bias: then whoever reads that
    #: needs no call. A property, where it depends on the arguments.
    is_one_matrix = True
    #: Weights that lie packed in a buffer, and so are no parameters.
    packed_weights = 0
    #: Into how many heads the rows of a block divide, by its name; a mixer says so.
    heads: Mapping[str, int] = {}
    #: By the adapter's name and the block's; there once one is attached.
    adapter_modules: nn.ModuleDict
    #: The names of adapters that are switched off.
    adapters_off: frozenset[str] = frozenset()
    #: Whether it is within `held`.
    is_held = False
    #: How many are.
    _holders = 0

    def __init__(
        self,
        in_features: int,
        blocks: Mapping[str, int],
        *,
        stack: int | None = None,
        bias: bool = False,
        residual_projection: bool = False,
    ) -> None:
        for name in blocks:
            if not name.isidentifier() or hasattr(nn.ModuleDict, name):
                raise ValueError(
                    f"{name!r} is not a valid name of a block: torch uses it otherwise"
                )
        self.stack = stack
        # A stack's matrices are drawn below: what nn.Linear would draw has another shape.
        device = None if stack is None else "meta"
        super().__init__(in_features, sum(blocks.values()), bias=bias, device=device)
        self.blocks = dict(blocks)
        self.residual_projection = residual_projection
        self.adapted = False
        self._held: Tensor | None = None
        self._held_bias: Tensor | None = None
        self._held_in_calls = False  # where all adapters can be merged
        self._held_changes: Packed | None = None  # where they cannot, and are of low rank
        if stack is not None:
            self.weight_is_read = True
            self.weight = nn.Parameter(torch.empty(stack, self.out_features, in_features))
            if bias:
                self.bias = nn.Parameter(torch.empty(stack, self.out_features))
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """As `nn.Linear` starts: uniform within 1 / sqrt(in_features)."""
        if self.stack is None:
            super().reset_parameters()
            return
        bound = self.in_features**-0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def weight_drawn(self) -> None:
        """Start what else there is by the weight, which has been drawn."""

    def extra_repr(self) -> str:
        rows = ", ".join(f"{name}={size}" for name, size in self.blocks.items())
        stack = "" if self.stack is None else f", stack={self.stack}"
        return f"{self.in_features} -> {rows}{stack}, bias={self.bias is not None}"

    @property
    def dtype(self) -> torch.dtype:
        """Of what it computes in where nothing is cast."""
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.weight.device

    def rows(self, *names: str) -> slice:
        """The rows of blocks that lie side by side.

        Raises:
            ValueError: There is no such block, or others lie between.
        """
        order = list(self.blocks)
        for name in names:
            if name not in self.blocks:
                raise ValueError(f"there is no block {name!r}; there are {', '.join(order)}")
        first = order.index(names[0])
        if tuple(order[first : first + len(names)]) != names:
            raise ValueError(f"the blocks {', '.join(names)} do not lie side by side in {order}")
        begin = sum(self.blocks[name] for name in order[:first])
        return slice(begin, begin + sum(self.blocks[name] for name in names))

    # ------------------------------------------------------------------------ called

    def forward(self, x: Tensor) -> Tensor:
        """X (..., in_features) to y (..., out_features); a stack: (rows, in_features) to one more.

        A stack gives all its images of x: (stack, rows, out_features).
        """
        if not self.adapted:
            return self.product(x)
        if self._held_in_calls and self._uses_held():
            return _of_each(x, self._held, self._held_bias)  # type: ignore[arg-type]
        if self._held_changes is not None and _is_plain(x):
            weight: Tensor = self.weight
            if x.dtype == weight.dtype:
                return kept_product(x, weight, self.bias, self._held_changes)
        return self._changed(x, tuple(self.blocks))

    def part(self, x: Tensor, *names: str) -> Tensor:
        """The same, but only of blocks that lie side by side: y (..., their rows)."""
        rows = self.rows(*names)
        if not self.adapted:
            return self.product(x, rows)
        if self._held_in_calls and self._uses_held():
            bias = self._held_bias
            held: Tensor = self._held[..., rows, :]  # type: ignore[index]
            return _of_each(x, held, bias if bias is None else bias[..., rows])
        return self._changed(x, names, rows)

    def product(self, x: Tensor, rows: slice | None = None) -> Tensor:
        """``x W^T + b`` without adapters, of all rows or of some."""
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if rows is not None:
            weight = weight[..., rows, :]
            bias = bias if bias is None else bias[..., rows]
        return _of_each(x, weight, bias)

    def member(self, x: Tensor, index: int, change: Tensor | None = None) -> Tensor:
        """Y of one matrix of a stack: x (rows, in_features) to (rows, out_features).

        Args:
            x: (rows, in_features).
            index: Which.
            change: What `weight_change` gives, for all of several calls; None: there is none.
        """
        y = self.product_of(x, index)
        return y if change is None else y + F.linear(x, change[index])

    def product_of(self, x: Tensor, index: int) -> Tensor:
        """`product` of one matrix of a stack."""
        bias: Tensor | None = self.bias
        return F.linear(x, self.weight[index], bias if bias is None else bias[index])

    def weight_change(self) -> Tensor | None:
        """What adapters add to the weight, of its shape; None: there are none."""
        return self.effective_weight() - self.base_weight() if self.adapted else None

    def _changed(self, x: Tensor, names: Sequence[str], rows: slice | None = None) -> Tensor:
        """Y of some blocks, with what the adapters add.

        Args:
            x: (..., in_features).
            names: Of blocks that lie side by side.
            rows: Theirs. None: all.
        """
        adapters = self._by_block(names)
        if not adapters:
            return self.product(x, rows)
        quick = self._of_low_rank(x, names, rows, adapters)
        if quick is not None:
            return quick
        seen = {name: _seen(x, those) for name, those in adapters.items()}
        if any(each[0] is not x for each in seen.values()):  # they do not share their input
            parts = []
            for name in names:
                y = self.product(seen[name][0] if name in seen else x, self.rows(name))
                change = self._change(name, y, adapters.get(name, []), seen.get(name, []))
                parts.append(y if change is None else y + change)
            return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        y = self.product(x, rows)
        if len(names) == 1:
            change = self._change(names[0], y, adapters[names[0]], seen[names[0]])
            assert change is not None  # there are adapters
            return y + change
        own = y.split_with_sizes([self.blocks[name] for name in names], -1)
        new = type(self).product is Linear.product  # y, and nobody else's
        if new and not (torch.is_grad_enabled() or followed()):
            for name, part in zip(names, own, strict=True):
                change = self._change(name, part, adapters.get(name, []), seen.get(name, []))
                if change is not None:
                    part.add_(change)
            return y
        # One sum for all blocks: its gradient goes to each without a copy.
        changes = []
        for name, part in zip(names, own, strict=True):
            change = self._change(name, part, adapters.get(name, []), seen.get(name, []))
            changes.append(y.new_zeros(()).expand(part.shape) if change is None else change)
        return y + torch.cat(changes, dim=-1)

    def _of_low_rank(
        self,
        x: Tensor,
        names: Sequence[str],
        rows: slice | None,
        adapters: dict[str, list[Any]],
    ) -> Tensor | None:
        """`_changed` where all changes are of low rank and of one dtype; else None.

        Args:
            x: As `_changed`'s.
            names: The same.
            rows: The same.
            adapters: Of each block that has some.
        """
        if not self._product_is_plain:
            return None
        dtype = product_dtype(x)
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        kinds = {x.dtype, weight.dtype}
        if len(kinds) > 1 and (torch.float64 in kinds or autocast_dtype(x.device) is None):
            return None  # torch's own operations say what is wrong
        gains: list[Tensor] | None = None
        changes = self._low_rank_changes(names, adapters)
        if changes is None:
            scaled = self._scaled_changes(names, adapters)
            if scaled is None:
                return None
            changes, gains = scaled
        if rows is not None:
            weight, bias = weight[rows], bias if bias is None else bias[rows]
        bias, x = bias if bias is None else bias.to(dtype), x.to(dtype)
        inside = bias if gains is None else None
        if cheaper_merged(x, weight, changes, dtype):
            y = F.linear(x, merged(weight, changes, dtype), inside)
        else:
            y = changed_product(x, weight.to(dtype), inside, rounded(changes, dtype))
        if gains is None:
            return y
        y = cast(y * (gains[0] if len(gains) == 1 else torch.cat(gains)), y.dtype)
        return y if bias is None else y + bias

    @property
    def _product_is_plain(self) -> bool:
        """Whether y is the product of x with one stored matrix, and no class computes it anew."""
        return self.stack is None and type(self).product is Linear.product

    def _low_rank_changes(
        self, names: Sequence[str], adapters: dict[str, list[Any]]
    ) -> list[Change] | None:
        """What adapters of low rank and of the weight's dtype add; None: one is of another kind.

        Args:
            names: Of blocks that lie side by side.
            adapters: Of each block that has some.
        """
        begin, changes = 0, []
        for name in names:
            for adapter in adapters.get(name, ()):
                with without_autocast(self.device):  # which would round a product of factors
                    factors = adapter.low_rank()
                if factors is None or factors[0].dtype != self.weight.dtype:
                    return None
                changes.append(Change(begin, *factors))
            begin += self.blocks[name]
        return changes

    def _scaled_changes(
        self, names: Sequence[str], adapters: dict[str, list[Any]]
    ) -> tuple[list[Change], list[Tensor]] | None:
        """Changes of low rank with the gains of all rows; None: one is of another kind.

        Args:
            names: As `_low_rank_changes`'s.
            adapters: The same.
        """
        if any(
            len(those) > 1 or not those[0].says("scaled_low_rank") for those in adapters.values()
        ):
            return None
        begin, changes, gains = 0, [], []
        for name in names:
            if name not in adapters:
                gains.append(self.weight.new_ones(()).expand(self.blocks[name]))
            else:
                with without_autocast(self.device):
                    found = adapters[name][0].scaled_low_rank(self.weight[self.rows(name)])
                if found is None or found[0].dtype != self.weight.dtype:
                    return None
                first, second, scale, gain = found
                changes.append(Change(begin, first, second, scale))
                gains.append(gain)
            begin += self.blocks[name]
        return changes, gains

    def _change(
        self, name: str, y: Tensor, adapters: Sequence[Any], seen: Sequence[Tensor]
    ) -> Tensor | None:
        """What the adapters of one block add to its y; None: there are none.

        Args:
            name: Of the block.
            y: Its own, (..., rows).
            adapters: In order.
            seen: As `_seen` gives it.
        """
        total = None
        for adapter, before, x in zip(adapters, seen[:-1], seen[1:], strict=True):
            if adapter.says("output_beside"):
                with without_autocast(self.device):
                    weight = self._weights(name, adapter)[name]
                    bias = None if self.bias is None else self._biases(name, adapter)[name]
                change = adapter.output_beside(x, y, weight, bias)
            else:
                change = adapter.output(x, y)
            if change is None:
                if before is not x:  # it has changed what the others see
                    continue
                change = self._product_of_delta(x, name, adapter)
            change = change.to(y.dtype)
            total = change if total is None else total + change
            if adapter is not adapters[-1]:
                y = y + change
        return total

    def _product_of_delta(self, x: Tensor, name: str, adapter: Any) -> Tensor:
        """What an adapter adds to y that knows the change of the weight and the bias alone."""
        with without_autocast(self.device):  # weights are changed in their own dtype
            weight: Tensor = adapter.delta(self._weights(name, adapter)[name])
            bias = None
            if self.bias is not None:
                bias = adapter.bias_delta(self._biases(name, adapter)[name])
        return _of_each(x, weight, bias)

    # ------------------------------------------------------------------------ read

    def base_weight(self) -> Tensor:
        """W without adapters, (out_features, in_features) or (stack, ...)."""
        return self.weight

    def effective_weight(self) -> Tensor:
        """W with the change of every adapter, for whoever reads it without a call.

        It is computed anew at each call, but within `held`.
        """
        if not self.adapted:
            return self.base_weight()
        if self._uses_held():
            return self._held  # type: ignore[return-value]
        return self._effective()

    def effective_bias(self) -> Tensor | None:
        """B with the change of every adapter, or None where there is none."""
        if self.bias is None or not self.adapted:
            return self.bias
        return self._held_bias if self._uses_held() else self._effective_bias()

    def weight_of_call(self, x: Tensor) -> Tensor | None:
        """The one matrix that x is multiplied by, for a kernel; None: the call does more than that.

        With adapters it is the weight with their changes, where that is how they are trained.

        Args:
            x: (..., in_features).
        """
        if type(self) is not Linear or self.stack is not None or self.bias is not None:
            return None
        hooks = self._forward_hooks, self._forward_pre_hooks
        if any((*hooks, self._backward_hooks, self._backward_pre_hooks)) or "forward" in vars(self):
            return None
        weight: Tensor = self.weight
        if type(weight) not in (Tensor, nn.Parameter):  # one rank's part of it
            return None
        if x.dtype != weight.dtype and autocast_dtype(x.device) is None:
            return None  # torch says what is wrong
        if not self.adapted:
            return weight
        names, dtype = tuple(self.blocks), product_dtype(x)
        changes = self._low_rank_changes(names, self._by_block(names))
        if not changes or not cheaper_merged(x, weight, changes, dtype):
            return None
        return merged(weight, changes, dtype)

    def one_weight(self) -> Tensor | None:
        """The one matrix that y is x times, for a kernel; None: something computes beside it.

        Without adapters it is the weight, and within `held` that with what they add to it.
        """
        if not self.is_one_matrix:
            return None
        if not self.adapted:
            return self.base_weight()
        return self._held if self._held_in_calls and self._uses_held() else None

    @property
    def held_changes(self) -> Packed | None:
        """Within `held`: what all adapters add beside the weight, if it is of low rank."""
        return self._held_changes

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within it weight and bias with their adapters' changes are computed once, for no_grad.

        Then a call is the base's one product, where all adapters can be merged; where they cannot
        and are of low rank, their matrices are put together once. In a dtype of few bits it rounds
        as merging does. Whoever decodes enters it, and changes no weight within.
        Nothing else could tell that one has changed: a fused optimizer step, FSDP2 and ``.data``
        count no versions. Several may be within at once, in threads or in turns, and leave it in
        any order: the last one forgets what is held.
        """
        with HOLDING:
            self._holders += 1
        try:
            with HOLDING:
                self._hold()
            yield
        finally:
            with HOLDING:
                self._holders -= 1
                if not self._holders:
                    self._let_go()

    def _hold(self) -> None:
        """Compute what `held` is for, unless it is there."""
        if not self.adapted or self.is_held:
            return
        with torch.no_grad():
            merges = self._merges()
            if merges or self.weight_is_read:
                self._held = self._effective()
                self._held_bias = None if self.bias is None else self._effective_bias()
            if not merges and self._product_is_plain:
                names = tuple(self.blocks)
                changes = self._low_rank_changes(names, self._by_block(names))
                if changes:
                    alike = rounded(changes, self.dtype)  # a router may be wider
                    self._held_changes = pack(alike, rows=self.out_features)
        self._held_in_calls, self.is_held = merges, True

    def _let_go(self) -> None:
        """Forget it: nobody is within `held` any more."""
        self._forget_held()

    def _forget_held(self) -> None:
        self._held = self._held_bias = self._held_changes = None
        self._held_in_calls = self.is_held = False

    def __getstate__(self) -> dict[str, Any]:
        """Without what is held: nobody is within `held` of a copy, whose weights may change."""
        nothing = {"_held": None, "_held_bias": None, "_held_changes": None}
        flags = {"_held_in_calls": False, "is_held": False, "_holders": 0}
        return {**super().__getstate__(), **nothing, **flags}

    def _merges(self) -> bool:
        """Whether adapters that are on, and y itself, are one matrix with what is added to it."""
        return self.is_one_matrix and all(adapter.mergeable for _, adapter in self.adapters())

    def _uses_held(self) -> bool:
        return self._held is not None and not torch.is_grad_enabled() and not followed()

    def _effective_bias(self) -> Tensor:
        with without_autocast(self.device):
            return torch.cat(list(self._biases().values()), dim=-1)

    def _effective(self) -> Tensor:
        with without_autocast(self.device):  # weights are changed in their own dtype
            parts = list(self._weights().values())
            return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2)

    def _weights(self, only: str | None = None, before: Any = None) -> dict[str, Tensor]:
        """Each block's weight with its adapters' changes.

        Args:
            only: Change this block alone. None: all.
            before: Stop at this adapter. None: at none.
        """
        parts = self.base_weight().split_with_sizes(list(self.blocks.values()), -2)
        weights = dict(zip(self.blocks, parts, strict=True))
        for name, adapter in self.adapters():
            if adapter is before:
                break
            if only in (None, name):
                weight = weights[name]
                weights[name] = weight + adapter.delta(weight).to(weight.dtype)
        return weights

    def _biases(self, only: str | None = None, before: Any = None) -> dict[str, Tensor]:
        """Each block's part of b with its adapters' changes, as `_weights`."""
        assert self.bias is not None  # who calls has looked
        parts = self.bias.split_with_sizes(list(self.blocks.values()), -1)
        biases = dict(zip(self.blocks, parts, strict=True))
        for name, adapter in self.adapters():
            if adapter is before:
                break
            if only in (None, name):
                bias = biases[name]
                change = adapter.bias_delta(bias)
                biases[name] = bias if change is None else bias + change.to(bias.dtype)
        return biases

    # ------------------------------------------------------------------------ adapters

    def adapters(self, *, off: bool = False) -> Iterator[tuple[str, Any]]:
        """Each adapter with the name of the block that it changes, in order.

        Args:
            off: Those that are switched off, too.
        """
        for entry, of_blocks in self.entries().items():
            if off or entry not in self.adapters_off:
                yield from of_blocks.items()  # type: ignore[operator]

    def entries(self) -> dict[str, nn.Module]:
        """The adapters of each entry, off or on: modules that hold them by the blocks' names."""
        entries = self._modules.get("adapter_modules")
        return {} if entries is None else entries._modules  # type: ignore[return-value]

    def switch_off(self, names: Iterable[str]) -> None:
        """Let these adapters, and no others, change nothing."""
        self.adapters_off = frozenset(names) & self.entries().keys()
        self.adapted = bool(self.entries().keys() - self.adapters_off)
        self._forget_held()

    def _by_block(self, names: Sequence[str]) -> dict[str, list[Any]]:
        """The adapters of each of these blocks that has some, in order."""
        found: dict[str, list[Any]] = {}
        for name, adapter in self.adapters():
            if name in names:
                found.setdefault(name, []).append(adapter)
        return found

    def attach(self, entry: str, block: str, adapter: nn.Module) -> None:
        """Put an adapter on a block.

        Args:
            entry: The adapter's name in the decoder's list.
            block: Which rows.
            adapter: Of `archzoo.adapters.Adapter`.
        """
        if not self.entries():
            self.adapter_modules = nn.ModuleDict()
        self.adapted = True
        if entry not in self.adapter_modules:
            self.adapter_modules[entry] = nn.ModuleDict()
        self.adapter_modules[entry].add_module(block, adapter)

    @torch.no_grad()
    def merge(self) -> None:
        """Put the adapters' changes into weight and bias, and take the adapters away."""
        if self.adapted:
            weight, bias = self._effective(), self.effective_bias()
            self.set_weight(weight)
            if bias is not None:
                self.bias.copy_(bias)
            self.detach_adapters()

    def set_weight(self, weight: Tensor) -> None:
        """Become a Linear of this weight: the opposite of `base_weight`."""
        self.check_mergeable()
        self.weight.copy_(weight)

    def check_mergeable(self) -> None:
        """Refuse to merge into a class that overrides `base_weight` and not `set_weight`."""
        cls = type(self)
        own = cls.base_weight is not Linear.base_weight
        if own and cls.set_weight is Linear.set_weight:
            raise ValueError(
                f"{type(self).__name__} has a base_weight() of its own and no set_weight(weight): "
                "an adapter cannot be merged into it"
            )

    def detach_adapters(self, names: Iterable[str] | None = None) -> None:
        """Take adapters away, all or those of some names; the weight stays as it is."""
        for entry in [e for e in self.entries() if names is None or e in names]:
            del self.adapter_modules[entry]
        if self._modules.get("adapter_modules") is not None and not self.entries():
            del self.adapter_modules
        self.switch_off(self.adapters_off)


def _is_plain(x: Tensor) -> bool:
    """Whether what is held may be used for x: no gradients, no compiler, no autocast."""
    return not (torch.is_grad_enabled() or followed()) and autocast_dtype(x.device) is None


def _seen(x: Tensor, adapters: Sequence[Any]) -> list[Tensor]:
    """What the base sees of x, and after it what each adapter of a block sees, in order."""
    seen = [x]
    for adapter in reversed(adapters):
        change = adapter.input(seen[-1])
        seen.append(seen[-1] if change is None else seen[-1] + change.to(seen[-1].dtype))
    return seen[::-1]


def _of_each(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b`` of one matrix, or of each of a stack."""
    if weight.dim() == 2:
        return F.linear(x, weight, bias)
    y = torch.einsum("ri,soi->sro", x, weight)
    return y if bias is None else y + bias[:, None]


def closing(linear: nn.Linear) -> nn.Linear:
    """Mark the last projection of a residual branch: the decoder starts it smaller.

    Deprecated: ``Linear(dim, {"output": dim}, residual_projection=True)`` says it.
    """
    linear.residual_projection = True  # type: ignore[assignment]
    return linear
