"""Documents, dtypes and the interface: what parts in plain PyTorch stand on."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# ---------------------------------------------------------------------------- what parts know

State = dict[str, Any]  # what a part carries from one call to the next: tensors, batch first
Mixed = tuple[Tensor, State | None]  # what it gives: vectors, and its state if it was given one


class Context(NamedTuple):
    """What a part knows of the tokens beside their vectors; each field is (batch, time).

    A row holds one or more documents, each a run of tokens: left padding and packed texts are the
    same thing seen from here, and each document gets what it would get alone.
    """

    documents: Tensor  # int64: which document of its row a token belongs to; -1: padding
    positions: Tensor  # int64: counted from 0 within the document
    valid: Tensor  # bool: not padding
    starts: Tensor  # bool: the first token of its document
    packed: bool = False  # False: no row holds padding or a second document

    def segment(self, begin: int, end: int) -> Context:
        """The same of the tokens begin .. end - 1."""
        fields: list[Any] = [field[:, begin:end] for field in self[:4]]
        return Context._make([*fields, self.packed])


def make_context(
    tokens: Tensor,
    documents: Tensor | None = None,  # a number a document; None: each row continues its own
    positions: Tensor | None = None,  # instead of counted ones
    cursor: State | None = None,  # where the call before ended; None: nothing came before
) -> tuple[Context, State]:
    """The context of tokens (batch, time), and the cursor after them."""
    batch, time = tokens.shape
    index = torch.arange(time, device=tokens.device)
    if cursor is None:
        before = torch.full((batch,), -1, device=tokens.device)
        cursor = {"documents": before, "begun": before + 1, "positions": before, "packed": False}
    packed = documents is not None or cursor["packed"]
    if documents is None:
        documents = cursor["documents"].clamp(min=0)[:, None].expand(batch, time)
    valid = documents >= 0
    # A document begins where the number is not that of the last token that is no padding.
    last = torch.where(valid, index, -1).cummax(dim=1).values
    before = F.pad(last[:, :-1], (1, 0), value=-1)
    number = documents.gather(1, before.clamp(min=0))
    number = torch.where(before >= 0, number, cursor["documents"][:, None])
    starts = valid & (documents != number)
    count = valid.cumsum(dim=1)
    start = torch.where(starts, index, -1).cummax(dim=1).values
    if positions is None:  # since the document's start, or on from where the last call ended
        within = count - count.gather(1, start.clamp(min=0))
        positions = torch.where(start >= 0, within, cursor["positions"][:, None] + count)
    positions = positions.long() * valid
    begun = cursor["begun"][:, None] + starts.cumsum(dim=1)
    seen, at = last[:, -1] >= 0, last[:, -1:].clamp(min=0)
    after = {
        "documents": torch.where(seen, documents.gather(1, at)[:, 0], cursor["documents"]),
        "begun": begun[:, -1],
        "positions": torch.where(seen, positions.gather(1, at)[:, 0], cursor["positions"]),
        "packed": packed,
    }
    return Context(torch.where(valid, begun - 1, -1), positions, valid, starts, packed), after


# ---------------------------------------------------------------------------- states


def reorder(state: Any, rows: Tensor) -> Any:
    """Pick rows (kept,) of a state's batch, with repetition, as beam search does."""
    if isinstance(state, Tensor):
        return state.index_select(0, rows.to(state.device))
    if isinstance(state, dict):
        return {name: reorder(value, rows) for name, value in state.items()}
    return [reorder(value, rows) for value in state] if isinstance(state, list) else state


def fork(state: Any) -> Any:
    """A copy that a later call cannot touch."""
    if isinstance(state, Tensor):
        return state.clone()
    if isinstance(state, dict):
        return {name: fork(value) for name, value in state.items()}
    return [fork(value) for value in state] if isinstance(state, list) else state


def select_rows(rows: Tensor, chosen: Any, other: Any) -> Any:
    """Row by row: `chosen` where rows (batch,) bool is True, else `other`."""
    if isinstance(chosen, Tensor):
        return torch.where(rows.view(-1, *(1,) * (chosen.dim() - 1)), chosen, other)
    if isinstance(chosen, dict):
        return {name: select_rows(rows, chosen[name], other[name]) for name in chosen}
    if isinstance(chosen, list):
        return [select_rows(rows, a, b) for a, b in zip(chosen, other, strict=True)]
    return chosen


# ---------------------------------------------------------------------------- dtypes and heads


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums over time and of routers: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """X in another dtype."""
    return x.to(dtype)


def constant(
    values: tuple[float, ...], device: torch.device | str | None, dtype: torch.dtype
) -> Tensor:
    """Host-side numbers as a tensor: no buffer, so that no cast of the model can round them."""
    return torch.tensor(values, dtype=dtype, device=device)


def for_float64(x: Tensor) -> Tensor:
    """The tensor where there is float64: Apple's GPUs have none."""
    return x.cpu() if x.device.type == "mps" else x


def without_autocast(device: torch.device) -> torch.autocast:
    """Autocast off: it would round sums over time to its own dtype."""
    return torch.autocast(device.type, enabled=False)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(batch, time, heads * size) to (batch, time, heads, size)."""
    split: Tensor = x.unflatten(-1, (heads, -1))
    return split


def merge_heads(x: Tensor) -> Tensor:
    """(batch, time, heads, size) to (batch, time, heads * size)."""
    return x.flatten(2)


def head_size(dim: int, heads: int) -> int:
    """Channels of a head."""
    if dim % heads:
        raise ValueError(f"heads={heads} does not divide dim={dim}")
    return dim // heads


def once_per_call(tensor: Tensor, key: Hashable, compute: Callable[[], Any]) -> Any:
    """What `compute` gives: here nothing is kept for the layers to come."""
    return compute()


def of_this_call(tensor: Tensor) -> Tensor:
    """The tensor."""
    return tensor


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """``w * x / sqrt(mean(x^2) + eps)`` over the last axis (Zhang and Sennrich, 1910.07467)."""
    return F.rms_norm(x, x.shape[-1:], weight, eps)


class RMSNorm(nn.RMSNorm):
    """``w * x / sqrt(mean(x^2) + eps)`` over the last axis (Zhang and Sennrich, 1910.07467)."""

    def __init__(self, dim: int, eps: float = 1e-6, scales: bool = True) -> None:
        super().__init__(dim, eps, scales)  # by w, which is learned

    def forward(self, x: Tensor) -> Tensor:
        """X (..., channels) to y of the same shape."""
        if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64):
            return super().forward(x)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)  # torch's own is slower on a CPU
        y = x * torch.addcmul(norm.new_tensor(self.eps), norm, norm, value=1 / x.shape[-1]).rsqrt()
        return y if self.weight is None else y * self.weight


class KeepsFloat32(nn.Module):
    """A module some of whose tensors, `float32_names`, are float32 at least."""

    float32_names: tuple[str, ...] = ()


class Linear(nn.Linear):
    """``y = x W^T + b``, W of named blocks of rows, such as {"query": 128, "key": 128}."""

    def __init__(
        self,
        in_features: int,
        blocks: dict[str, int],
        *,
        bias: bool = False,
        residual_projection: bool = False,
    ) -> None:
        super().__init__(in_features, sum(blocks.values()), bias=bias)
        self.blocks, self.residual_projection = dict(blocks), residual_projection
        self.keeps_init = self.weight_is_read = self.called_in_parts = False

    @property
    def dtype(self) -> torch.dtype:
        """Of the weight."""
        return self.weight.dtype

    def part(self, x: Tensor, *names: str) -> Tensor:
        """Y of some of the blocks, which lie side by side."""
        order = list(self.blocks)
        begin = sum(self.blocks[name] for name in order[: order.index(names[0])])
        rows = slice(begin, begin + sum(self.blocks[name] for name in names))
        bias: Tensor | None = self.bias
        return F.linear(x, self.weight[rows], bias if bias is None else bias[rows])

    def effective_weight(self) -> Tensor:
        """W."""
        return self.weight

    def effective_bias(self) -> Tensor | None:
        """B, or None."""
        return self.bias


# ---------------------------------------------------------------------------- the interface


class Mixer(nn.Module):
    """Mixes over time, causally: x (batch, time, dim) to y (batch, time, dim).

    `init_state` and `step` define a mixer; `parallel` may compute the same faster.
    """

    handles_documents = False  # True: `step` and `parallel` obey Context.starts and Context.valid

    def init_state(self, batch_size: int, **options: Any) -> State:
        """The state before the first token, of the options device, dtype and capacity."""
        raise NotImplementedError

    def start_state(self, batch_size: int, start: Any = None, **options: Any) -> State:
        """`init_state`."""
        return self.init_state(batch_size, **options)

    def step(self, x: Tensor, state: State, context: Context) -> tuple[Tensor, State]:
        """One token, x (batch, 1, dim)."""
        raise NotImplementedError

    def recurrent(self, x: Tensor, state: State, context: Context) -> tuple[Tensor, State]:
        """`step` over x (batch, time, dim): reset where a document begins, held at padding."""
        guarded = context.packed and not self.handles_documents
        outputs = []
        for t in range(x.shape[1]):
            here, now = context.segment(t, t + 1), x[:, t : t + 1]
            if guarded:
                fresh = self.init_state(len(x), device=x.device, dtype=x.dtype)
                state = select_rows(here.starts[:, 0], fresh, state)
            y, after = self.step(now, fork(state) if guarded else state, here)
            state = select_rows(here.valid[:, 0], after, state) if guarded else after
            outputs.append(y)
        return torch.cat(outputs, dim=1), state

    def chunkwise(self, x: Tensor, state: State | None, context: Context) -> Mixed:
        """Any time, from any state; None: nothing came before."""
        if state is None:
            state = self.init_state(len(x), device=x.device, dtype=x.dtype)
        return self.recurrent(x, state, context)

    def parallel(self, x: Tensor, state: State | None, context: Context) -> Mixed:
        """The same, perhaps all tokens at once."""
        return self.chunkwise(x, state, context)

    def forward(self, x: Tensor, state: State | None, context: Context) -> Mixed:
        """Mix x; a state is handed on, and None stays None."""
        one = x.shape[1] == 1 and state is not None
        form: Any = self.recurrent if one else self.parallel
        y, after = form(x, state, context)
        return y, None if state is None else after


class FeedForward(nn.Module):
    """Mixes over channels, each token alone: x (batch, time, dim) to y, and what it says beside."""

    def after_step(self, sums: dict[str, Tensor]) -> None:
        """Once per optimizer step, with this layer's `Aux.sums` summed over the step."""


class Aux:
    """What a layer says beside its output: tensors by name, none of them where it is dense."""

    def __init__(
        self,
        losses: dict[str, Tensor] | None = None,  # added to the training loss
        metrics: dict[str, Tensor] | None = None,  # to be logged
        sums: dict[str, Tensor] | None = None,  # for `FeedForward.after_step`
        pools: dict[str, Tensor] | None = None,
    ) -> None:
        self.losses, self.metrics = losses or {}, metrics or {}
        self.sums, self.pools = sums or {}, pools or {}


class Router(nn.Module):
    """Turns a token into expert weights and indices."""


class Embedding(nn.Module):
    """Tokens in, vectors out; it may carry a state, as a mixer does."""

    weight: Tensor

    def init_state(self, batch_size: int, **options: Any) -> State:
        """Nothing is carried."""
        return {}

    def assign_positions(self, context: Context) -> Context:
        """The context as every part shall see it."""
        return context

    def prompt_positions(self, tokens: Tensor, documents: Tensor | None = None) -> Tensor | None:
        """Positions of prompts, (batch, time), read off the text; None: they are counted."""
        return None


class Rotary(nn.Module):
    """A position method on queries and keys, each (batch, time, heads, head_dim)."""

    def both(self, qk: Tensor, heads: int, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Q and k of the two side by side, rotated by positions (batch, time)."""
        q, k = qk[:, :, :heads], qk[:, :, heads:]
        rotated: tuple[Tensor, Tensor] = self(q, k, positions, positions)
        return rotated


class Bias(nn.Module):
    """Added to attention's logits: of positions (batch, queries) and (batch, keys)."""
