"""The Triton side of `archzoo.kernels.rotation`: imported only once the kernel is to run."""

# Kernels' parameters are Triton's values, which have no Python types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rotation_kernel(
    joined, q, k, v, table, tokens, time, heads, key_heads,
    q_batch, q_time, q_head, k_batch, k_time, k_head, v_batch, v_time, v_head, table_batch,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, JOIN: tl.constexpr,
):  # fmt: skip
    """Some tokens of one head of q, k or v, out of the joined rows or, turned back, into them.

    A table's row holds cosine and sine of each pair in turn; `table_batch` is 0 where all batch
    rows count alike.
    """
    head = tl.program_id(1)
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK)
    inside = (token < tokens)[:, None] & (channel < WIDTH)[None, :]
    batch = token // time  # of 64 bits, that takes dozens of instructions
    index = (token - batch * time).to(tl.int64)
    batch, token = batch.to(tl.int64), token.to(tl.int64)
    whole = (heads + 2 * key_heads) * WIDTH
    of_joined = joined + token[:, None] * whole + head * WIDTH + channel[None, :]
    if head < heads:
        own = head.to(tl.int64)
        of_part = q + (batch * q_batch + index * q_time)[:, None] + own * q_head
    elif head < heads + key_heads:
        own = (head - heads).to(tl.int64)
        of_part = k + (batch * k_batch + index * k_time)[:, None] + own * k_head
    else:
        own = (head - heads - key_heads).to(tl.int64)
        of_part = v + (batch * v_batch + index * v_time)[:, None] + own * v_head
    of_part += channel[None, :]
    if JOIN:
        value = tl.load(of_part, mask=inside, other=0.0)
    else:
        value = tl.load(of_joined, mask=inside, other=0.0)
    if head < heads + key_heads:
        row = batch * table_batch + index * WIDTH
        turn = tl.load(table + row[:, None] + channel[None, :], mask=inside, other=0.0)
        a, b = tl.split(tl.reshape(value.to(tl.float32), (ROWS, BLOCK // 2, 2)))
        cos, sin = tl.split(tl.reshape(turn, (ROWS, BLOCK // 2, 2)))
        if JOIN:
            sin = -sin
        turned = tl.join(a * cos - b * sin, a * sin + b * cos)
        value = tl.reshape(turned, (ROWS, BLOCK)).to(value.dtype)
    if JOIN:
        tl.store(of_joined, value, mask=inside)
    else:
        tl.store(of_part, value, mask=inside)
