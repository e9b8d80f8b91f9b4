"""The Linear of the house: named blocks of rows, and the one reader of a weight.

Every matrix that maps vectors to vectors is a `Linear`. Where several share their input they lie in
one matrix, which costs one product instead of several, and each goes by a name: the rows of
attention's ``query_key_value`` are the blocks ``query``, ``key`` and ``value``. Whoever changes a
trained model (`archzoo.adapters`) says what it changes by these names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archzoo.derivatives import followed
from archzoo.numerics import without_autocast


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
        adapted: Whether it has adapters.
    """

    #: Whether its weight is read without a call, by a kernel or a product of all experts.
    #: An adapter must then be able to say how it changes the weight.
    weight_is_read = False
    #: Whether it has initialised itself, so that the decoder does not.
    keeps_init = False
    #: By the adapter's name and the block's; there once it is adapted.
    adapter_modules: nn.ModuleDict

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
        return self._changed(x, self.product(x), tuple(self.blocks))

    def part(self, x: Tensor, *names: str) -> Tensor:
        """The same, but only of blocks that lie side by side: y (..., their rows)."""
        y = self.product(x, self.rows(*names))
        return self._changed(x, y, names) if self.adapted else y

    def product(self, x: Tensor, rows: slice | None = None) -> Tensor:
        """``x W^T + b`` without adapters, of all rows or of some."""
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if rows is not None:
            weight = weight[..., rows, :]
            bias = bias if bias is None else bias[..., rows]
        return _of_each(x, weight, bias)

    def _changed(self, x: Tensor, y: Tensor, names: Sequence[str]) -> Tensor:
        """Y of some blocks, with what the adapters add."""
        parts = list(y.split_with_sizes([self.blocks[name] for name in names], -1))
        for name, adapter in self.adapters():
            if name not in names:
                continue
            at = names.index(name)
            change = adapter.output(x, parts[at])
            if change is None:  # it knows the change of the weight alone
                change = _of_each(x, self._delta(name, adapter))
            parts[at] = parts[at] + change.to(parts[at].dtype)
        return torch.cat(parts, dim=-1)

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
        if self._held is not None and not torch.is_grad_enabled() and not followed():
            return self._held
        return self._effective()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within it the effective weight is computed once, while gradients are off.

        Whoever decodes enters it, and changes no weight within. Nothing else could tell that one
        has changed: a fused optimizer step, FSDP2 and ``.data`` count no versions.
        """
        if not (self.adapted and self.weight_is_read) or self._held is not None:
            yield
            return
        with torch.no_grad():
            self._held = self._effective()
        try:
            yield
        finally:
            self._held = None

    def _effective(self) -> Tensor:
        with without_autocast(self.device):  # weights are changed in their own dtype
            return torch.cat(list(self._weights().values()), dim=-2)

    def _delta(self, name: str, adapter: Any) -> Tensor:
        """An adapter's change of its block, on top of those before it."""
        with without_autocast(self.device):
            change: Tensor = adapter.delta(self._weights(name, adapter)[name])
        return change

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

    # ------------------------------------------------------------------------ adapters

    def adapters(self) -> Iterator[tuple[str, Any]]:
        """Each adapter with the name of the block that it changes, in order."""
        if self.adapted:
            for of_blocks in self.adapter_modules.values():
                yield from of_blocks.items()  # type: ignore[operator]

    def attach(self, entry: str, block: str, adapter: nn.Module) -> None:
        """Put an adapter on a block.

        Args:
            entry: The adapter's name in the decoder's list.
            block: Which rows.
            adapter: Of `archzoo.adapters.Adapter`.
        """
        if not self.adapted:
            self.adapter_modules = nn.ModuleDict()
            self.adapted = True
        if entry not in self.adapter_modules:
            self.adapter_modules[entry] = nn.ModuleDict()
        self.adapter_modules[entry].add_module(block, adapter)

    @torch.no_grad()
    def merge(self) -> None:
        """Put the adapters' changes into the weight, and take the adapters away."""
        if self.adapted:
            self.set_weight(self._effective())
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

    def detach_adapters(self) -> None:
        """Take the adapters away; the weight stays as it is."""
        if self.adapted:
            del self.adapter_modules
            self.adapted = False


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
