"""Mixers in plain PyTorch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archzoo.export.plain.core import (
    Context,
    Mixed,
    RMSNorm,
    State,
)


class Retention(nn.Module):
    """Multi-scale retention: attention whose weights decay with distance, and a recurrent network.

    With q, k rotated and k scaled by key_dim^-0.5, each head with its own decay gamma computes::

        S_n = gamma S_{n-1} + k_n^T v_n                       the state, (key_dim, value_dim)
        o_n = q_n S_n / sqrt(s_n),   s_n = sum_{j=0..n} gamma^j
        y_n = (silu(x_n Wg) * concat_heads norm(o_n)) Wo

    Three ways to compute it, equal to rounding: `parallel` (all tokens at once), `chunkwise` (in
    parallel within chunks, recurrently from one to the next), `recurrent` (token by token).

    Source: Sun et al., Retentive Network, arXiv 2307.08621, section 2. The paper also divides by
    the row sum of the scores, a factor that the norm removes again.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        value_factor: float = 2.0,  # width of the values over dim
        decay: float | str = "default",  # 1 - 2^(-5 - head), eq. 8; or one for all heads
        gate: bool = True,
        head_norm: str = "rms",
        norm_eps: float = 1e-6,
        chunk_size: int = 64,
    ) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, dim // heads
        value_width = round(dim * value_factor)
        self.value_dim = value_width // heads
        self.gate, self.chunk_size = gate, chunk_size
        # One matrix for queries, keys, values and the gate, in this order.
        self.widths = [dim, dim, value_width] + [value_width] * gate
        self.query_key_value_gate = nn.Linear(dim, sum(self.widths), bias=False)
        self.output = nn.Linear(value_width, dim, bias=False)
        self.output.residual_projection = True  # type: ignore[assignment]
        self.rotary: Any = None  # a position method, such as RetentionRotation
        if head_norm == "rms":
            self.norm: nn.Module = RMSNorm(self.value_dim, max(norm_eps, 1e-24), scales=False)
        elif head_norm == "group":
            self.norm = nn.LayerNorm(self.value_dim, max(norm_eps, 1e-24), elementwise_affine=False)
        else:
            self.norm = nn.Identity()
        self.learnable, self.fades = decay == "learnable", decay != 1
        if decay == "paper_lm":  # 1 - gamma from 1/32 to 1/512, evenly in the logarithm
            rates = [2.0 ** (-5 - 4 * head / max(heads - 1, 1)) for head in range(heads)]
            self.log_gamma = [math.log1p(-rate) for rate in rates]
        elif decay == "default" or self.learnable:
            self.log_gamma = [math.log1p(-(2.0 ** (-5 - head))) for head in range(heads)]
        else:
            self.log_gamma = [math.log(float(decay))] * heads
        if self.learnable:  # log gamma = -exp(rate) stays below 0 wherever training takes it
            rates = [math.log(-value) for value in self.log_gamma]
            self.decay_rate = nn.Parameter(torch.tensor(rates))

    def init_state(self, batch_size: int, *, device: Any = None, dtype: Any = None) -> State:
        """S = 0, (batch, heads, key_dim, value_dim), in float32 at least."""
        shape = (batch_size, self.heads, self.head_dim, self.value_dim)
        dtype = torch.promote_types(dtype, torch.float32)
        return {"memory": torch.zeros(shape, device=device, dtype=dtype)}

    def forward(self, x: Tensor, state: State | None, context: Context) -> Mixed:
        """X (batch, time, dim) to y of the same shape, and the state after it."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        q, k, v, *gate = self.query_key_value_gate(x).split(self.widths, -1)
        with torch.autocast(x.device.type, enabled=False):
            # To (batch, heads, time, channels), rotated; padding adds nothing to the state.
            q, k, v = (part.to(dtype).unflatten(-1, (self.heads, -1)) for part in (q, k, v))
            q, k = self.rotary(q, k, context.positions, context.positions)
            if context.packed:
                valid = context.valid[:, :, None, None]
                k, v = k * valid, v * valid
            q, k, v = (part.transpose(1, 2).contiguous() for part in (q, k, v))
            if self.learnable:
                log_gamma = -self.decay_rate.to(dtype).exp()
            else:
                log_gamma = torch.tensor(self.log_gamma, device=q.device, dtype=dtype)
            memory = (state or self.init_state(len(x), device=x.device, dtype=dtype))["memory"]
            form = self.parallel if x.shape[1] <= 2 * self.chunk_size else self.chunkwise
            if x.shape[1] == 1:
                form = self.recurrent
            o, memory = form(q, k, v, log_gamma, memory, context)
        y = self.norm(o).transpose(1, 2).flatten(2).to(x.dtype)
        if self.gate:
            y = F.silu(gate[0]) * y
        return self.output(y), None if state is None else {"memory": memory}

    def normaliser(self, log_gamma: Tensor, positions: Tensor) -> Tensor:
        """``1 / sqrt(s_n)``, s_n = (gamma^(n+1) - 1) / (gamma - 1): (batch, heads, time, 1)."""
        count = (positions + 1).to(log_gamma.dtype)[:, None]
        if self.fades:
            rate = log_gamma[:, None]
            total = torch.expm1(count * rate) / torch.expm1(rate)
        else:  # gamma 1: nothing is forgotten
            total = count.expand(-1, self.heads, -1)
        return total.rsqrt()[..., None]

    def decay(self, log_gamma: Tensor, points: Tensor, documents: Tensor) -> Tensor:
        """D_ij = gamma^(n_i - n_j) for j <= i of one document, else 0; (batch, heads, ..., i, j).

        Of points in time (batch, ..., i), n: how many tokens have come, and how many documents.
        """
        seen = (documents[..., :, None] == documents[..., None, :]).tril()[:, None]
        elapsed = (points[..., :, None] - points[..., None, :])[:, None]
        exponent = elapsed * log_gamma.view(-1, *(1,) * (elapsed.dim() - 2))
        return exponent.masked_fill(~seen, -math.inf).exp()

    def points(self, context: Context) -> tuple[Tensor, ...]:
        """Before the first token and after each, (batch, time + 1); padding lets no time pass."""
        rows = None if context.packed else 1  # without padding and documents all rows are alike
        both = (context.valid[:rows], context.starts[:rows])
        return tuple(F.pad(marks.cumsum(dim=1), (1, 0)) for marks in both)

    def parallel(
        self, q: Tensor, k: Tensor, v: Tensor, log_gamma: Tensor, memory: Tensor, context: Context
    ) -> tuple[Tensor, Tensor]:
        """``o = ((Q K^T) * D) V``, and what was in the memory before, decayed until each token."""
        decay, scale = self.decay(log_gamma, *self.points(context)), self.head_dim**-0.5
        normaliser = self.normaliser(log_gamma, context.positions)
        o = ((q @ k.mT) * (scale * decay[..., 1:, 1:] * normaliser)) @ v
        o = o + (q * (decay[..., 1:, :1] * normaliser)) @ memory
        memory = memory * decay[..., -1:, :1] + (k * (scale * decay[..., -1, 1:, None])).mT @ v
        return o, memory

    def chunkwise(
        self, q: Tensor, k: Tensor, v: Tensor, log_gamma: Tensor, memory: Tensor, context: Context
    ) -> tuple[Tensor, Tensor]:
        """`parallel` within chunks, each from what those before have left: linear in time."""
        q, points = q * self.normaliser(log_gamma, context.positions), self.points(context)
        outputs, begin, time, scale = [], 0, q.shape[2], self.head_dim**-0.5
        while begin < time:  # the last chunk may be shorter
            size = min(self.chunk_size, time - begin)
            end = begin + min((time - begin) // size, 64) * size
            here = [point[:, begin : end + 1] for point in points]
            decay = self.decay(log_gamma, *(point.unfold(1, size + 1, size) for point in here))
            q_, k_, v_ = (part[:, :, begin:end].unflatten(2, (-1, size)) for part in (q, k, v))
            # What each chunk adds, and from it the memory before the first one and after each.
            added = (k_ * (scale * decay[..., -1, 1:, None])).mT @ v_
            added = torch.cat([memory[:, :, None], added], dim=2)
            across = self.decay(log_gamma, *(point[:, ::size] for point in here))
            states = (across @ added.flatten(3)).unflatten(3, added.shape[3:])
            o = ((q_ @ k_.mT) * (scale * decay[..., 1:, 1:])) @ v_
            o = o + (q_ * decay[..., 1:, :1]) @ states[:, :, :-1]
            outputs.append(o.flatten(2, 3))
            begin, memory = end, states[:, :, -1]
        return torch.cat(outputs, dim=2), memory

    def recurrent(
        self, q: Tensor, k: Tensor, v: Tensor, log_gamma: Tensor, memory: Tensor, context: Context
    ) -> tuple[Tensor, Tensor]:
        """Of one token: decay the memory, add k^T v, read it with q."""
        gamma = log_gamma.exp()[:, None, None]
        if context.packed:  # a new document forgets the past; padding lets nothing decay
            valid, starts = (mark[:, :, None, None] for mark in (context.valid, context.starts))
            gamma = torch.where(valid, gamma * ~starts, 1.0)
        memory = torch.addcmul(memory * gamma, k.mT, v, value=self.head_dim**-0.5)
        return (q * self.normaliser(log_gamma, context.positions)) @ memory, memory


class Attention(nn.Module):
    """``y_n = sum_{m <= n} softmax_m(q_n . k_m / sqrt(head_dim)) v_m``, each head alone.

    Grouped queries: kv_heads keys and values serve heads queries. A token sees the tokens of its
    own document. The state is the KV cache.

    Source: Vaswani et al., arXiv 1706.03762, section 3.2; grouped queries: Ainslie et al.,
    arXiv 2305.13245, section 2.2.
    """

    def __init__(self, dim: int, heads: int, *, kv_heads: int | None = None) -> None:
        super().__init__()
        self.heads, self.head_dim, self.kv_heads = heads, dim // heads, kv_heads or heads
        # One matrix for queries, keys and values, in this order.
        self.widths = [dim, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim]
        self.query_key_value = nn.Linear(dim, sum(self.widths), bias=False)
        self.output = nn.Linear(dim, dim, bias=False)
        self.output.residual_projection = True  # type: ignore[assignment]
        self.rotary: Any = None  # a position method on q and k, such as RotaryEmbedding
        self.bias: Any = None  # one on the logits, such as ALiBi

    def init_state(self, batch_size: int, *, device: Any = None, dtype: Any = None) -> State:
        """An empty cache: keys and values (batch, kv_heads, 0, head_dim), and their places."""
        empty = torch.zeros(
            (batch_size, self.kv_heads, 0, self.head_dim), device=device, dtype=dtype
        )
        number = torch.zeros((batch_size, 0), device=device, dtype=torch.int64)
        return {"keys": empty, "values": empty, "positions": number, "documents": number}

    def forward(self, x: Tensor, state: State | None, context: Context) -> Mixed:
        """X (batch, time, dim) to y of the same shape, and the cache after it."""
        q, k, v = self.query_key_value(x).split(self.widths, -1)
        return self.attend(q, k, v, state, context)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, state: State | None, context: Context
    ) -> tuple[Tensor, State | None]:
        """`forward` from the projections on, each (batch, time, its heads * head_dim)."""
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in (q, k, v))
        q, k = self.rotary(q, k, context.positions, context.positions)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # (batch, heads, time, head_dim)
        known = {"keys": k, "values": v}
        known |= {"positions": context.positions, "documents": context.documents}
        if state is not None:
            axis = {"keys": 2, "values": 2, "positions": 1, "documents": 1}
            known = {name: torch.cat([state[name], known[name]], axis[name]) for name in known}
        queries, keys = q.shape[2], known["keys"].shape[2]
        mask = None
        if self.bias is not None or context.packed or queries not in (1, keys):
            mask = torch.ones((queries, keys), dtype=torch.bool, device=q.device)
            mask = mask.tril(keys - queries)[None, None]  # query i is at key keys - queries + i
            if context.packed:
                same = context.documents[:, :, None] == known["documents"][:, None, :]
                mask = mask & same[:, None]
            if self.bias is not None:
                bias = self.bias(context.positions, known["positions"]).to(q.dtype)
                mask = bias.masked_fill(~mask, -math.inf)
        causal = mask is None and queries > 1
        grouped = self.kv_heads != self.heads
        y = F.scaled_dot_product_attention(
            q, known["keys"], known["values"], mask, is_causal=causal, enable_gqa=grouped
        )
        return self.output(y.transpose(1, 2).flatten(2)), None if state is None else known


class FilteredAttention(Attention):
    """Attention whose queries and keys see the two tokens before each token, values only it.

    ::

        c1[t] = W1a h[t-1] + W1b h[t] + b1          dim to dim / 2
        c2[t] = W2a c1[t-1] + W2b c1[t] + b2        dim / 2 to dim
        u     = RMSNorm(c2 + h)
        q, k from u;  v from h;  then attention

    Before the first token of a document h and c1 are 0. The state is attention's cache, and h and
    c1 of the last token.

    Source: Wu et al., Yuan 2.0, arXiv 2311.15786, on localized filtering-based attention.
    """

    def __init__(self, dim: int, heads: int, *, kv_heads: int | None = None) -> None:
        super().__init__(dim, heads, kv_heads=kv_heads)
        # A causal convolution of two taps is one matrix on [token before; token].
        self.first, self.second = nn.Linear(2 * dim, dim // 2), nn.Linear(dim, dim)
        self.filter_norm = RMSNorm(dim, eps=1e-6)

    def init_state(self, batch_size: int, *, device: Any = None, dtype: Any = None) -> State:
        """Attention's cache, filter_input (batch, dim) and filter_hidden (batch, dim / 2)."""
        state = super().init_state(batch_size, device=device, dtype=dtype)
        for name, size in (
            ("filter_input", self.second.in_features),
            ("filter_hidden", self.first.out_features),
        ):
            state[name] = torch.zeros((batch_size, size), device=device, dtype=dtype)
        return state

    def forward(self, x: Tensor, state: State | None, context: Context) -> Mixed:
        """X (batch, time, dim) to y of the same shape, and the state after it."""
        before = state or self.init_state(len(x), device=x.device, dtype=x.dtype)
        hidden = self.first(torch.cat([previous(x, before["filter_input"], context), x], dim=-1))
        shifted = previous(hidden, before["filter_hidden"], context)
        u = self.filter_norm(self.second(torch.cat([shifted, hidden], dim=-1)) + x)
        q, k, _ = self.query_key_value(u).split(self.widths, -1)
        v = F.linear(x, self.query_key_value.weight[-self.widths[2] :])
        y, after = self.attend(q, k, v, state, context)
        if after is not None:
            after["filter_input"] = last_valid(x, before["filter_input"], context)
            after["filter_hidden"] = last_valid(hidden, before["filter_hidden"], context)
        return y, after


class ShortConvolution(nn.Module):
    """A causal depthwise convolution: each channel sees its own last few tokens.

    ``y[t] = w[taps-1] * x[t] + w[taps-2] * x[t-1] + ... + w[0] * x[t-taps+1]``, x 0 before the
    first token of a document. State: the last taps - 1 inputs.

    Source: Allen-Zhu, Physics of Language Models 4.1, arXiv 2512.17351, the layer canon A.
    """

    def __init__(
        self, dim: int, heads: int = 1, *, taps: int = 4, activation: str = "none"
    ) -> None:
        super().__init__()
        self.taps, self.activation = taps, activation
        self.weight = nn.Parameter(torch.empty(taps, dim).uniform_(-(taps**-0.5), taps**-0.5))

    def init_state(self, batch_size: int, *, device: Any = None, dtype: Any = None) -> State:
        """No token yet: (batch, taps - 1, dim), from the oldest to the newest, 0."""
        shape = (batch_size, self.taps - 1, self.weight.shape[1])
        return {"inputs": torch.zeros(shape, device=device, dtype=dtype)}

    def forward(self, x: Tensor, state: State | None, context: Context) -> Mixed:
        """X (batch, time, dim) to y of the same shape, and the state after it."""
        before = (state or self.init_state(len(x), device=x.device, dtype=x.dtype))["inputs"]
        seen = [x]  # and of each token the vector of the one 1, 2, ... before it
        for tap in range(1, self.taps):
            seen.append(previous(seen[-1], before[:, -tap], context))
        y = sum(shifted * weight for shifted, weight in zip(seen, self.weight.flip(0), strict=True))
        y = F.silu(y) if self.activation == "silu" else y
        if state is None:
            return y, None
        newest = [last_valid(seen[i], before[:, -1 - i], context) for i in range(self.taps - 1)]
        return y, {"inputs": torch.stack(newest[::-1], dim=1)}


def previous(x: Tensor, before: Tensor, context: Context) -> Tensor:
    """Of each token the vector of the one before it in its document; 0 at the first.

    `before` (batch, width) is that of the last token before this call.
    """
    known = torch.cat([before.to(x.dtype)[:, None], x], dim=1)
    if not context.packed:
        return known[:, :-1]
    # After padding comes the last token before it.
    index = torch.arange(1, x.shape[1], device=x.device)
    last = F.pad(torch.where(context.valid[:, :-1], index, 0).cummax(dim=1).values, (1, 0))
    shifted = known.gather(1, last[..., None].expand(x.shape))
    return shifted.masked_fill(context.starts[..., None], 0)


def last_valid(x: Tensor, before: Tensor, context: Context) -> Tensor:
    """The vector of each row's last token that is not padding, (batch, width); else `before`."""
    if not context.packed:
        return x[:, -1]
    index = torch.arange(x.shape[1], device=x.device)
    last = torch.where(context.valid, index, -1).amax(dim=1)[:, None, None]
    found = x.gather(1, last.clamp(min=0).expand(-1, 1, x.shape[2]))
    return torch.where(last >= 0, found, before.to(x.dtype)[:, None])[:, 0]
