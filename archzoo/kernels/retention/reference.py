"""The kernels' reference implementation: retention in chunks, in plain PyTorch.

    S_n = gamma S_{n-1} + scale k_n^T v_n        o_n = q_n S_n

Within a chunk, weights are formed as in attention and multiplied by a decay mask; what came before
the chunk is read from the state that it starts with::

    intra-chunk   ((Q K^T) * D) V        D_ij = scale gamma^(i-j) for j <= i, else 0
    inter-chunk   gamma^(i+1) Q S        S: the state at the end of the chunk before

Source: Sun et al., Retentive Network, arXiv 2307.08621, section 2.1; flash-linear-attention joins
the states of chunks in the same way.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from archzoo.documents import Context
from archzoo.numerics import once_per_call

CHUNKS_AT_ONCE = 64  # chunks joined by one product, which bounds the memory it takes


def inverse_root_sum(log_decay: Tensor, positions: Tensor) -> Tensor:
    """``1 / sqrt(s_n)``, s_n = sum_{j=0..n} gamma^j = expm1((n+1) log gamma) / expm1(log gamma).

    Args:
        log_decay: (heads,); where it is 0, s_n is the count n + 1.
        positions: (batch, time) ints, n.

    Returns:
        (batch or 1, time, heads) of log_decay's dtype.
    """
    if positions.stride(0) == 0:  # one row expanded
        positions = positions[:1]
    count = (positions + 1).to(log_decay.dtype).unsqueeze(-1)
    flat = log_decay == 0
    safe = torch.where(flat, -1.0, log_decay)
    total = torch.where(flat, count, torch.expm1(count * safe) / torch.expm1(safe))
    return total.rsqrt()


def decay_mask(log_decay: Tensor, tokens: Tensor, documents: Tensor | None) -> Tensor:
    """The paper's D: ``D_ij = gamma^(n_i - n_j)`` for j <= i in one document, else 0.

    Args:
        log_decay: (heads,) <= 0.
        tokens: (batch or 1, ..., points) ints, n: how many tokens have come.
        documents: As tokens: how many documents have begun. None: all points are of one.

    Returns:
        (batch or 1, heads, ..., points, points).
    """
    points = tokens.shape[-1]
    seen = torch.ones((points, points), dtype=torch.bool, device=tokens.device).tril()
    if documents is not None:
        seen = (documents[..., :, None] == documents[..., None, :])[:, None] & seen
    elapsed = (tokens[..., :, None] - tokens[..., None, :])[:, None]
    exponent = elapsed * log_decay.view(-1, *(1,) * (elapsed.dim() - 2))
    # Masked before the exponential, which would overflow where j > i.
    return exponent.masked_fill(~seen, -math.inf).exp()


class Decays(NamedTuple):
    """The decay of what is added to a state, between the two ends of a chunk and its tokens.

    n is 1 where all chunks are alike.
    """

    intra: Tensor  # D, (b, heads, n, chunk, chunk): from token to token, scaled
    initial: Tensor  # (b, heads, n, chunk, 1): from the initial state to each token
    final: Tensor  # (b, heads, n, chunk, 1): from each token to the final state, scaled
    across: Tensor  # (b, heads, states, states): from one chunk's end to another's


def decays(
    log_decay: Tensor,
    context: Context,
    begin: int,
    chunk: int,
    chunks: int,
    scale: float,
    normaliser: Tensor | None = None,
) -> Decays:
    """Of `chunks` chunks from token `begin` on; layers of one decay share them within a call.

    Args:
        log_decay: log gamma of each head, (heads,).
        context: Of the tokens.
        begin: The first token of the first chunk.
        chunk: Tokens in each.
        chunks: How many.
        scale: Of k.
        normaliser: Of a single chunk's tokens, (batch or 1, chunk, heads, 1); a decay that ends at
            a token then holds it, the chunk dimension is left out, and what begins or ends at
            padding is 0, so that k and v need not be.
    """

    def compute() -> Decays:
        # Points in time: before the first token, and after each.
        documents = None
        if not context.packed:
            tokens = torch.arange(chunks * chunk + 1, device=log_decay.device)[None]
        else:
            segment = context.piece(begin, begin + chunks * chunk)
            tokens = F.pad(segment.valid.cumsum(dim=1), (1, 0))
            documents = F.pad(segment.starts.cumsum(dim=1), (1, 0))

        def of_chunks(points: Tensor) -> Tensor:
            """Before a chunk, after each of its tokens, and at its end: (b, n, chunk + 2)."""
            one = chunks == 1  # of any length: what is exported cannot unfold by that
            points = points[:, None] if one else points.unfold(1, chunk + 1, chunk)
            # Without documents all chunks are alike, and one stands for all.
            points = points if context.packed else points[:, :1]
            return torch.cat([points, points[..., -1:]], dim=-1)

        def of_ends(points: Tensor) -> Tensor:
            """Before the first chunk and after each: (b, n + 1)."""
            if chunks == 1:
                return torch.cat([points[:, :1], points[:, -1:]], dim=1)
            return points[:, ::chunk]

        mask, ends = (
            decay_mask(log_decay, pick(tokens), None if documents is None else pick(documents))
            for pick in (of_chunks, of_ends)
        )
        intra, initial = scale * mask[..., 1:-1, 1:-1], mask[..., 1:-1, :1]
        final = scale * mask[..., -1, 1:-1, None]
        if normaliser is None:
            return Decays(intra, initial, final, ends)
        rows, final = normaliser.transpose(1, 2), final[:, :, 0]
        if context.packed:
            valid = context.segment(begin, begin + chunk).valid[:, None, :, None]
            intra, rows, final = intra * valid[:, :, None].mT, rows * valid, final * valid
        intra, initial = intra[:, :, 0] * rows, initial[:, :, 0] * rows
        return Decays(intra, initial, final, ends[..., -1:, :1])

    if log_decay.requires_grad:
        return compute()
    # A fixed decay is one tensor for all layers, and so is its normaliser: they can be keys.
    marks = (context.packed, context.valid, context.starts)
    key = ("decays", log_decay, normaliser, *marks, begin, chunk, chunks, scale)
    return once_per_call(context.positions, key, compute)


def retain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    memory: Tensor | None,
    context: Context,
    *,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor | None]:
    """``S_n = gamma S_{n-1} + scale k_n^T v_n, o_n = q_n S_n``, in chunks.

    Exact for any time, chunk size and initial state.

    Args:
        q: (batch, time, heads, key_dim), float32 or float64; rotated, and normalised by whoever
            wants o so.
        k: As q; rotated. Zero at padding.
        v: (batch, time, heads, value_dim). Zero at padding.
        log_decay: (heads,) <= 0.
        memory: The initial state, (batch, heads, key_dim, value_dim). None: zero.
        context: Documents reset S; padding neither adds to it nor lets it decay.
        scale: Of k. It is applied to the decays, which are few, and not to k, which is long.
        chunk_size: Tokens a chunk; the last chunk may be shorter.

    Returns:
        o (batch, time, heads, value_dim), and the final state (None without an initial one).
    """
    keep = memory is not None
    outputs = []
    time = q.shape[1]
    begin = 0
    while begin < time:
        left = time - begin
        chunk = min(chunk_size, left)
        chunks = min(left // chunk, CHUNKS_AT_ONCE)
        end = begin + chunk * chunks
        o, memory = _retain_chunks(
            q[:, begin:end],
            k[:, begin:end],
            v[:, begin:end],
            memory,
            decays(log_decay, context, begin, chunk, chunks, scale),
            chunk,
            keep or end < time,
        )
        outputs.append(o)
        begin = end
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1), memory


def _retain_chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory: Tensor | None,
    decays: Decays,
    chunk: int,
    keep: bool,
) -> tuple[Tensor, Tensor | None]:
    """`retain` where chunk divides time; `keep`: the final state is wanted."""
    # Copied once here, the products below read them as they are; o is copied for what follows.
    q, k, v = (rearrange(x, "b (n c) h d -> b h n c d", c=chunk).contiguous() for x in (q, k, v))
    chunks = q.shape[2]
    o = ((q @ k.mT) * decays.intra) @ v

    # The states at the ends of chunks, numbered by the chunk that starts with them; without an
    # initial one chunk 0 starts with nothing. Each is the sum of what all chunks before it added,
    # and of the initial one, decayed by the tokens in between.
    first, stop = 0 if memory is not None else 1, chunks + keep
    states = None
    if first < stop:
        added = rearrange((k * decays.final).mT @ v, "b h n k v -> b h n (k v)")[:, :, : stop - 1]
        if memory is not None:
            added = torch.cat([rearrange(memory, "b h k v -> b h 1 (k v)"), added], dim=2)
        across = decays.across[..., first:stop, first:stop]
        states = rearrange(across @ added, "b h n (k v) -> b h n k v", k=k.shape[-1])
        initial = states[:, :, : chunks - first]
        if initial.shape[2]:
            inter = (q * decays.initial)[:, :, first:] @ initial
            o = o + inter if first == 0 else torch.cat([o[:, :, :1], o[:, :, 1:] + inter], 2)
    # A view would keep the states of all chunks alive, and be saved with them.
    final = states[:, :, -1].clone() if states is not None and keep else None
    return rearrange(o, "b h n c d -> b (n c) h d").contiguous(), final
