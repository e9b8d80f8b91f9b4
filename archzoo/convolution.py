"""A short causal convolution, which stands before a mixer, and what it knows of documents."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archzoo.block import Mixer
from archzoo.derivatives import exporting
from archzoo.documents import Context
from archzoo.numerics import cast
from archzoo.states import State


class ShortConvolution(Mixer):
    """A causal depthwise convolution: each channel sees its own last few tokens.

    ::

        y[t] = w[taps-1] * x[t] + w[taps-2] * x[t-1] + ... + w[0] * x[t-taps+1]

    Before the first token of a document x is 0. As a decoder's ``convolution`` it stands before
    every mixer, on a residual branch: ``h = norm(x)``, ``h = h + convolution(h)``, ``mixer(h)``.
    It is a mixer itself, and may stand in a ``pattern``. It holds taps * dim parameters, which
    start at U(-taps^-0.5, taps^-0.5), torch's default for such a convolution. State: the last
    taps - 1 inputs.

    Source: Allen-Zhu, Physics of Language Models 4.1, arXiv 2512.17351, the first of its four
    canon layers (canon A: 4 taps, residual, no activation, no bias).

    Args:
        dim: Width of x.
        heads: Not used; every mixer is built with its heads.
        taps: Tokens that a token sees, itself among them; at least 2.
        activation: Of the sum: "none" or "silu".
    """

    handles_documents = True
    decays = False  # a tap scales a channel, as a norm's weight does

    def __init__(
        self,
        dim: int,
        heads: int = 1,
        *,
        taps: int = 4,
        activation: Literal["none", "silu"] = "none",
    ) -> None:
        super().__init__()
        if isinstance(taps, bool) or not isinstance(taps, int) or taps < 2:
            raise ValueError(
                f"taps={taps!r} must be an integer of at least 2: one tap mixes nothing"
            )
        if activation not in ("none", "silu"):
            raise ValueError(f"activation={activation!r} is neither none nor silu")
        self.taps, self.activation = taps, activation
        self.weight = nn.Parameter(torch.empty(taps, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the taps."""
        nn.init.uniform_(self.weight, -(self.taps**-0.5), self.taps**-0.5)

    def init_state(
        self,
        batch_size: int,
        *,
        capacity: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        """No token yet: {"inputs": (batch, taps - 1, dim)}, from the oldest to the newest, 0."""
        shape = (batch_size, self.taps - 1, self.weight.shape[1])
        return {"inputs": torch.zeros(shape, device=device, dtype=dtype or self.weight.dtype)}

    def prefix_shapes(self) -> dict[str, tuple[int, ...]]:
        """The tokens before a document's first: (taps - 1, dim)."""
        return {"inputs": (self.taps - 1, self.weight.shape[1])}

    def parallel(
        self, x: Tensor, state: State | None, context: Context
    ) -> tuple[Tensor, State | None]:
        """X (batch, time, dim), beside what the state holds, to y."""
        time, last = x.shape[1], self.taps - 1
        before = x.new_zeros((x.shape[0], last, x.shape[2]))
        if state is not None:
            before = cast(state["inputs"], x.dtype)
        if context.packed:
            seen = [x]  # and of each token the vector of the one 1, 2, ... before it
            start = context.start["inputs"] if context.start else None
            for tap in range(1, self.taps):
                first = None if start is None else start[:, -tap]
                seen.append(previous(seen[-1], before[:, -tap], context, first))
            newest = [last_valid(seen[i], before[:, -1 - i], context) for i in range(last)]
            after = torch.stack(newest[::-1], dim=1)
        else:
            known = torch.cat([before, x], dim=1)
            seen = [known[:, last - tap : last - tap + time] for tap in range(self.taps)]
            after = known[:, time:].clone()
        weight = cast(self.weight, x.dtype).flip(0)
        y = x * weight[0]
        for tap in range(1, self.taps):
            y = torch.addcmul(y, seen[tap], weight[tap])
        y = F.silu(y) if self.activation == "silu" else y
        return y, None if state is None else {"inputs": after}

    def chunkwise(
        self, x: Tensor, state: State | None, context: Context
    ) -> tuple[Tensor, State | None]:
        """As `parallel`, whose work grows with time alone."""
        return self.parallel(x, state, context)

    def step(self, x: Tensor, state: State, context: Context) -> tuple[Tensor, State]:
        """As `parallel`, of one token."""
        y, after = self.parallel(x, state, context)
        assert after is not None
        return y, after


def previous(
    x: Tensor, before: Tensor | None, context: Context, start: Tensor | None = None
) -> Tensor:
    """Of each token the vector of the one before it in its document; 0 at the first.

    Args:
        x: (batch, time, width).
        before: (batch, width), of the last token before this segment; None: there is none.
        context: Of the same tokens.
        start: (1, width), instead of the 0 at the first; where nothing is packed `before` is it.
    """
    if before is None:
        before = x.new_zeros((x.shape[0], x.shape[2]))
    before = before.to(x.dtype)[:, None]
    if not context.packed:
        if exporting():  # a slice of one token would be a case of its own
            return torch.cat([before, x], dim=1)[:, :-1]
        return torch.cat([before, x[:, :-1]], dim=1)
    # After padding comes the last token before it, which may be that of the segment before: 0.
    index = torch.arange(1, x.shape[1], device=x.device)
    last = F.pad(torch.where(context.valid[:, :-1], index, 0).cummax(dim=1).values, (1, 0))
    known = torch.cat([before, x], dim=1)
    # Rows of the table of all tokens: to gather number by number takes a third more time.
    row = last + known.shape[1] * torch.arange(x.shape[0], device=x.device)[:, None]
    shifted = known.flatten(0, 1).index_select(0, row.flatten()).view_as(x)
    if start is not None:
        return torch.where(context.starts[..., None], start.to(x.dtype), shifted)
    return shifted.masked_fill(context.starts[..., None], 0)


def last_valid(x: Tensor, before: Tensor, context: Context) -> Tensor:
    """The vector of each row's last token that is not padding, (batch, width), as a copy.

    Args:
        x: (batch, time, width).
        before: (batch, width), what it is where this segment is all padding.
        context: Of the same tokens.
    """
    if not context.packed:
        return x[:, -1].clone()
    index = torch.arange(x.shape[1], device=x.device)
    last = torch.where(context.valid, index, -1).amax(dim=1)[:, None, None]
    found = x.gather(1, last.clamp(min=0).expand(-1, 1, x.shape[2]))
    return torch.where(last >= 0, found, before.to(x.dtype)[:, None])[:, 0]
