"""The state that every document starts from, learned: prefix tuning and P-tuning v2."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archzoo.adapters import Adapter, Target
from archzoo.adapters.prompt_tuning import check_length, check_std, check_tokens


class LearnedState(Adapter):
    """What `PTuningV2` and `PrefixTuning` share: a state as parameters.

    Args:
        target: What it changes.
        targets: As for `Adapter`.
        layers: The same.
        length: Tokens of what has an axis of tokens.
        std: Of that at the start.
        tokens: Start at the state after these tokens; it replaces length and std.
    """

    kinds = ("state",)
    default_targets = ("state",)
    identity_at_start = False

    def __init__(
        self,
        target: Target,
        *,
        targets: list[str] | None = None,
        layers: list[int] | None = None,
        length: int = 20,
        std: float = 1.0,
        tokens: list[int] | None = None,
    ) -> None:
        super().__init__(target, targets=targets, layers=layers)
        self.tokens = check_tokens(tokens)
        self.length = check_length(length) if tokens is None else len(tokens)
        self.std = check_std(std) or 0.0
        shapes = target.state or {}
        self.grows = {name: shape for name, shape in shapes.items() if 0 in shape}
        self.stays = {name: shape for name, shape in shapes.items() if 0 not in shape}
        #: Of a token, in order; and numbers of a row that a network makes the others of.
        self.sizes = [math.prod(s for s in shape if s) for shape in self.grows.values()]
        self.factors = [_factors(shape) for shape in self.stays.values()]
        self.positions = self.length if self.grows or tokens is not None else 0

    def make_parameters(self) -> None:
        """The state itself: a row for each token, and what has no axis of tokens."""
        if self.grows:
            self.table = nn.Parameter(torch.empty(self.length, sum(self.sizes)))
        self.whole = nn.ParameterDict(
            {name: nn.Parameter(torch.empty(shape)) for name, shape in self.stays.items()}
        )

    def draw_parameters(self) -> None:
        """Rows from N(0, std^2), all else 0."""
        if self.grows:
            nn.init.normal_(self.table, std=self.std)
        for parameter in self.whole.values():
            nn.init.zeros_(parameter)

    def prefix(self) -> dict[str, Tensor]:
        """Keys and values (kv_heads, length, head_dim), S_0 (heads, key_dim, value_dim), ..."""
        rows = self.of_rows(self.table) if self.grows else {}
        return rows | {name: self.whole[name] for name in self.stays}  # which compilers follow

    def of_rows(self, table: Tensor) -> dict[str, Tensor]:
        """What has an axis of tokens, of its rows (length, width): views of them."""
        parts = table.split_with_sizes(self.sizes, 1)
        made = {}
        for (name, shape), part in zip(self.grows.items(), parts, strict=True):
            axis = shape.index(0)
            row = [size for at, size in enumerate(shape) if at != axis]
            made[name] = part.unflatten(1, row).movedim(0, axis)
        return made

    def start_from(self, state: dict[str, Tensor]) -> None:
        """Take the state over."""
        with torch.no_grad():
            for name, tensor in self.prefix().items():
                tensor.copy_(state[name])  # a parameter, or a view of one


class PTuningV2(LearnedState):
    """P-tuning v2: every layer's mixer starts each document from a state that is learned.

    For attention these are keys and values of `length` tokens before the text, which every query
    sees. They enter as the cache holds them: the model does not rotate them, and the text's
    positions count on from `length`. One row of the paper's embedding goes by layer, key or
    value, head and channel, in this order; each layer owns its part of it, and all together have
    ``2 layers length d_kv`` parameters.

    For retention it is S_0 (heads, key_dim, value_dim) itself, of a size that no length changes::

        o_n = q_n (gamma^n S_0 + what the text has added) / sqrt(s_n)

    exact in every form; and so is it for whatever else a state holds: the last vectors of filters
    and convolutions, the state of a mixer of one's own. No paper has this. What has no axis of
    tokens starts at 0, as a document does without it, so there nothing changes before the first
    step; keys and values start at N(0, std^2), which with the default of 1 is how the released
    code starts its embedding. Nothing decays, and nothing of it is superfluous after training.

    With ``tokens`` it starts at the state after those tokens, as if every document began with
    them: exactly so, until the first step.

    Source: Liu et al., P-Tuning v2, arXiv 2110.07602, section 3; their PrefixEncoder without its
    MLP. There a classifier reads the first token; here the head stays.

    Args:
        target: What it changes.
        targets: ``[state]``, as None is, too: of all mixers, and convolutions before them.
        layers: Only in these blocks of the decoder, counted from 0. None: in all.
        length: Tokens of keys and values.
        std: Of keys and values at the start.
        tokens: Start at the state after these tokens; it replaces length and std.

    Raises:
        ValueError: A length below 1, or an empty list of tokens.
    """

    def __init__(
        self,
        target: Target,
        *,
        targets: list[str] | None = None,
        layers: list[int] | None = None,
        length: int = 20,
        std: float = 1.0,
        tokens: list[int] | None = None,
    ) -> None:
        how: Any = {"targets": targets, "layers": layers}
        super().__init__(target, length=length, std=std, tokens=tokens, **how)
        self.make_parameters()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Keys and values from N(0, std^2), all else 0."""
        self.draw_parameters()


class PrefixTuning(LearnedState):
    """Prefix tuning: one small network makes the keys and values of all layers.

    ::

        rows = W2 tanh(W1 E + b1) + b2       E (length, dim), W1 (hidden, dim)

    and one row goes by layer, key or value, head and channel. In training all of it learns:
    length * dim, hidden (dim + 1), and hidden + 1 times the numbers of a row, 2 layers d_kv.
    Afterwards `collapse` computes the rows once and throws the network away, as the paper does:
    what is left is what ``hidden=None`` trains directly, 2 layers length d_kv, as in `PTuningV2`.

    Where a state has no axis of tokens the rows are made into it. A memory (heads, key_dim,
    value_dim), such as retention's, has a key and a value of each head in a row, and is::

        S_0 = sum_j k_j^T v_j,   j = 1 .. length

    as reading such tokens would leave it: of constant size, and of rank length at most. Collapsed,
    S_0 alone is left. Anything else, such as a filter's last vector, is the mean of its rows. No
    paper has either. E starts at N(0, 1), as torch's embeddings do, the matrices as torch starts
    them. Nothing decays.

    Source: Li and Liang, arXiv 2101.00190, section 4.3; the network as in their code,
    train_control.py, which adds dropout; here there is none.

    Args:
        target: What it changes.
        targets: ``[state]``, as None is, too: of all mixers, and convolutions before them.
        layers: Only in these blocks of the decoder, counted from 0. None: in all.
        length: Tokens.
        hidden: Width of the network; None: the state itself learns.
        std: Of keys and values at the start without a network.
        tokens: Without a network, start at the state after these tokens; it replaces length and
            std.

    Raises:
        ValueError: A length or a width below 1, an empty list of tokens, or tokens for a network.
    """

    network: PrefixNetwork
    part: slice  # its numbers of a row

    def __init__(
        self,
        target: Target,
        *,
        targets: list[str] | None = None,
        layers: list[int] | None = None,
        length: int = 20,
        hidden: int | None = 512,
        std: float = 1.0,
        tokens: list[int] | None = None,
    ) -> None:
        how: Any = {"targets": targets, "layers": layers}
        super().__init__(target, length=length, std=std, tokens=tokens, **how)
        if hidden is not None and (not isinstance(hidden, int) or hidden < 1):
            raise ValueError(f"hidden={hidden!r} must be at least 1, or null for no network")
        if hidden is not None and tokens is not None:
            raise ValueError(
                "tokens start the state itself, which a network makes here: set hidden to null"
            )
        self.hidden = hidden
        (self.dim,) = target.shape
        if hidden is None:
            self.make_parameters()
            self.reset_parameters()

    @classmethod
    def connect(cls, adapters: list[Adapter]) -> None:
        """One network for all layers, in the first one's module."""
        if adapters[0].hidden is None:
            return
        begin = 0
        for adapter in adapters:
            assert isinstance(adapter, PrefixTuning)
            width = sum(adapter.sizes) + sum(adapter.factors)
            adapter.part, begin = slice(begin, begin + width), begin + width
        first: Any = adapters[0]
        first.network = PrefixNetwork(first.length, first.dim, first.hidden, begin)
        for adapter in adapters[1:]:
            adapter.refer("network", first.network)

    def reset_parameters(self) -> None:
        """The network's, where it is in this module; or the state's."""
        if self.hidden is None:
            self.draw_parameters()
        elif "network" in self._modules:
            self.network.reset_parameters()

    def prefix(self) -> dict[str, Tensor]:
        """Keys and values (kv_heads, length, head_dim), S_0 (heads, key_dim, value_dim), ..."""
        if self.hidden is None:
            return super().prefix()
        sizes = [sum(self.sizes), *self.factors]
        rows, *others = self.network(self.part).split_with_sizes(sizes, 1)
        made = self.of_rows(rows) if self.grows else {}
        for (name, shape), part in zip(self.stays.items(), others, strict=True):
            made[name] = _joined(part, shape)
        return made

    @torch.no_grad()
    def collapse(self) -> dict[str, Any]:
        """Keep what a document starts from, and throw away the network."""
        if self.hidden is not None:
            state = {name: tensor.clone() for name, tensor in self.prefix().items()}
            like = self.network.embedding
            del self.network
            self.hidden = None
            self.make_parameters()
            self.to(like.device, like.dtype)
            self.start_from(state)
        return {"hidden": None}


class PrefixNetwork(nn.Module):
    """``W2 tanh(W1 E + b1) + b2``: rows of all layers, of which each asks for its part.

    Args:
        length: Rows.
        dim: Width of E.
        hidden: Of W1.
        width: Numbers of a row.
    """

    def __init__(self, length: int, dim: int, hidden: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(length, dim))
        self.first, self.second = nn.Linear(dim, hidden), nn.Linear(hidden, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """E from N(0, 1), the matrices as torch draws them."""
        nn.init.normal_(self.embedding)
        self.first.reset_parameters()
        self.second.reset_parameters()

    def forward(self, part: slice) -> Tensor:
        """(length, numbers of the part)."""
        x = self.first(self.embedding).tanh()
        return F.linear(x, self.second.weight[part], self.second.bias[part])


def _factors(shape: tuple[int, ...]) -> int:
    """Numbers of a row of which a tensor without an axis of tokens is made."""
    if len(shape) == 3:
        heads, keys, values = shape
        return heads * (keys + values)
    return math.prod(shape)


def _joined(rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A tensor without an axis of tokens, of its part of the rows (length, numbers)."""
    if len(shape) == 3:
        heads, keys, values = shape
        k, v = rows.split_with_sizes((heads * keys, heads * values), 1)
        return torch.einsum(
            "jhk,jhv->hkv", k.unflatten(1, (heads, keys)), v.unflatten(1, (heads, values))
        )
    return rows.mean(0).view(shape)
