"""Localized filtering attention: a short convolution in front of the queries and keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from archzoo.convolution import last_valid, previous
from archzoo.documents import Context
from archzoo.linear import Linear
from archzoo.mixers.attention import Attention
from archzoo.norm import RMSNorm
from archzoo.states import State


class FilteredAttention(Attention):
    """Attention whose queries and keys see the two tokens before each token, values only it.

    ::

        c1[t] = W1a h[t-1] + W1b h[t] + b1          dim to dim / 2
        c2[t] = W2a c1[t-1] + W2b c1[t] + b2        dim / 2 to dim
        u     = RMSNorm(c2 + h)
        q, k from u;  v from h;  then attention

    Before the first token of a document h and c1 are 0 (c1 is not b1 there). The state is
    attention's cache and 1.5 dim numbers: the h and c1 of the last token. The filter holds
    2 dim^2 + 2.5 dim parameters.

    Source: Wu et al., Yuan 2.0, arXiv 2311.15786, on localized filtering-based attention. There
    the convolutions start at torch's default for them, here at the decoder's N(0, init_std^2).

    Args:
        dim: Width of x.
        heads: Query heads.
        kv_heads: Key and value heads; it divides heads. None: as many as heads.
    """

    def __init__(self, dim: int, heads: int, *, kv_heads: int | None = None) -> None:
        super().__init__(dim, heads, kv_heads=kv_heads)
        self.query_key_value.called_in_parts = True  # q and k see the filtered x, v sees x
        # A causal convolution of two taps is one matrix on [token before; token].
        self.first = Linear(2 * dim, {"filter_first": dim // 2}, bias=True)
        self.second = Linear(dim, {"filter_second": dim}, bias=True)
        self.filter_norm = RMSNorm(dim)

    def init_state(
        self,
        batch_size: int,
        *,
        capacity: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        """Attention's cache, and what the filter remembers of the token before.

        Returns:
            As `Attention.init_state`, and filter_input (batch, dim), filter_hidden
            (batch, dim / 2).
        """
        state = super().init_state(batch_size, capacity=capacity, device=device, dtype=dtype)
        dtype = dtype or self.output.dtype
        dim = self.second.out_features
        state["filter_input"] = torch.zeros((batch_size, dim), device=device, dtype=dtype)
        state["filter_hidden"] = torch.zeros((batch_size, dim // 2), device=device, dtype=dtype)
        return state

    def prefix_shapes(self) -> dict[str, tuple[int, ...]]:
        """Attention's, and what the filter remembers of a token before the first."""
        dim = self.second.out_features
        return super().prefix_shapes() | {"filter_input": (dim,), "filter_hidden": (dim // 2,)}

    def parallel(
        self, x: Tensor, state: State | None, context: Context
    ) -> tuple[Tensor, State | None]:
        """X (batch, time, dim) against itself and whatever the state holds."""
        u, state = self.filter(x, state, context)
        query_key = self.query_key_value.part(u, "query", "key")
        return self.attend(query_key, self.query_key_value.part(x, "value"), state, context)

    def filter(
        self, x: Tensor, state: State | None, context: Context
    ) -> tuple[Tensor, State | None]:
        """X (batch, time, dim) to u of the same shape, and the state after it.

        Args:
            x: (batch, time, dim).
            state: Of which the last token's vectors are read; None: nothing came before.
            context: Of the same tokens.
        """
        start: Any = None
        start_hidden: Any = None
        if state is not None:
            start, start_hidden = state["filter_input"], state["filter_hidden"]
        begun = context.start or {}
        before = previous(x, start, context, begun.get("filter_input"))
        hidden = self.first(torch.cat([before, x], dim=-1))
        before = previous(hidden, start_hidden, context, begun.get("filter_hidden"))
        c2 = self.second(torch.cat([before, hidden], dim=-1))
        if state is not None:
            state = state | {
                "filter_input": last_valid(x, start, context),
                "filter_hidden": last_valid(hidden, start_hidden, context),
            }
        return self.filter_norm(c2 + x), state
