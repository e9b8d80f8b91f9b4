"""The Triton side of `archzoo.kernels.retention_layer`: imported only once a kernel is to run."""

# Kernels' parameters are Triton's values, which have no Python types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rotate_kernel(
    x, table, y, tokens, time, x_token, x_head, y_token, y_head, table_batch, scale, scaled_from,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """Pairs of channels of some tokens and one head, turned by the table, or back.

    Heads from `scaled_from` on are multiplied by `scale`. A table's row holds cosine and sine of
    each pair in turn; `table_batch` is 0 where all batch rows count alike.
    """
    head = tl.program_id(1)
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK)
    inside = (token < tokens)[:, None] & (channel < WIDTH)[None, :]
    batch = token // time  # of 64 bits, that takes dozens of instructions
    index = token - batch * time
    row = batch.to(tl.int64) * table_batch + index.to(tl.int64) * WIDTH
    token = token.to(tl.int64)
    at = x + token[:, None] * x_token + head * x_head + channel[None, :]
    value = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    turn = tl.load(table + row[:, None] + channel[None, :], mask=inside, other=0.0)
    a, b = tl.split(tl.reshape(value, (ROWS, BLOCK // 2, 2)))
    cos, sin = tl.split(tl.reshape(turn, (ROWS, BLOCK // 2, 2)))
    if INVERSE:
        sin = -sin
    factor = tl.where(head >= scaled_from, scale, 1.0)
    turned = tl.join((a * cos - b * sin) * factor, (a * sin + b * cos) * factor)
    turned = tl.reshape(turned, (ROWS, BLOCK)).to(y.dtype.element_ty)
    at = y + token[:, None] * y_token + head * y_head + channel[None, :]
    tl.store(at, turned, mask=inside)


@triton.jit
def gate_kernel(
    o, gate, y, tokens, o_token, o_head, gate_stride, heads, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """``y = silu(g) * o / sqrt(mean(o^2) + eps)`` of some tokens and one head."""
    head = tl.program_id(1)
    token = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    channel = tl.arange(0, BLOCK)[None, :]
    inside = (token < tokens) & (channel < WIDTH)
    at = head * WIDTH + channel
    read = tl.load(o + token * o_token + head * o_head + channel, mask=inside, other=0.0)
    read = read.to(tl.float32)
    g = tl.load(gate + token * gate_stride + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(read * read, 1) / WIDTH + eps)[:, None]
    gated = read * scale * g * tl.sigmoid(g)
    tl.store(y + token * heads * WIDTH + at, gated.to(y.dtype.element_ty), mask=inside)


@triton.jit
def gate_backward_kernel(
    o, gate, dy, do, d_gate, tokens, o_token, o_head, gate_stride, heads, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The gradients of o and of the gate; the gate's lie as the gate does.

    With ``n = o r``, ``r = 1 / sqrt(mean(o^2) + eps)`` and ``s = sigmoid(g)``:
    ``dn = dy g s``, ``dg = dy n s (1 + g (1 - s))``, ``do = r (dn - n mean(dn n))``.
    """
    head = tl.program_id(1)
    token = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    channel = tl.arange(0, BLOCK)[None, :]
    inside = (token < tokens) & (channel < WIDTH)
    at = head * WIDTH + channel
    read = tl.load(o + token * o_token + head * o_head + channel, mask=inside, other=0.0)
    read = read.to(tl.float32)
    g = tl.load(gate + token * gate_stride + at, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(dy + token * heads * WIDTH + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(read * read, 1) / WIDTH + eps)[:, None]
    normed, sigmoid = read * scale, tl.sigmoid(g)
    of_gate = grad * normed * sigmoid * (1 + g * (1 - sigmoid))
    tl.store(d_gate + token * gate_stride + at, of_gate.to(d_gate.dtype.element_ty), mask=inside)
    grad = grad * g * sigmoid
    along = tl.sum(grad * normed, 1)[:, None] / WIDTH
    of_o = scale * (grad - normed * along)
    tl.store(do + token * heads * WIDTH + at, of_o.to(do.dtype.element_ty), mask=inside)
