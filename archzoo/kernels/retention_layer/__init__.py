"""All of a retention layer between its two matrices, with one gradient for the whole of q to g.

    q, k rotated, k scaled        o = retention(q, k, v)        y = silu(g) * o / rms(o)

q, k, v and g lie side by side in the result of one matrix, so their gradients have to lie side by
side too. Made one by one they would be copied together; here each is written where it belongs. On
an H100 that and two passes of elementwise operations were 7 of 70 ms of a step of 110 M parameters.
What is kept for the backward pass is the result of the matrix, o and what retention itself keeps:
q and k are rotated again.

The plain form is `archzoo.mixers.retention`, which runs wherever `available` says no; there also
is no second derivative here. Importing this module needs neither Triton nor a GPU.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from archzoo.derivatives import differentiated_again
from archzoo.kernels import retention
from archzoo.kernels.launching import launch, power_of_2, run_beside
from archzoo.kernels.retention.launch import Inputs, prepare

_launch = functools.partial(launch, "archzoo.kernels.retention_layer.triton")


def available(projected: Tensor, log_decay: Tensor, heads: int, key_width: int) -> bool:
    """Whether the kernels take this layer.

    Args:
        projected: (batch, time, 2 * heads * (key_width + value width)).
        log_decay: log gamma, (heads,).
        heads: Heads.
        key_width: Of a head, even.
    """
    # Where no kernel runs, a CPU above all, no views are made to find that out.
    if not run_beside(projected) or key_width % 2 or not projected.is_contiguous():
        return False
    q, k, v, _ = _parts(projected, heads, key_width)
    return retention.available(q, k, v, log_decay)


def gated_retention(
    projected: Tensor,
    table: Tensor,
    log_decay: Tensor,
    positions: Tensor | None,
    starts: Tensor | None,
    valid: Tensor | None,
    *,
    heads: int,
    key_width: int,
    eps: float,
) -> Tensor:
    """``silu(g) * o / sqrt(mean(o^2) + eps)``, o the retention of q, k and v; no state.

    Args:
        projected: q, k (heads * key_width each), v and g side by side, (batch, time, width).
        table: The rotation, (batch or 1, time, 1, key_width / 2) complex, or cosine and sine in a
            last axis.
        log_decay: log gamma, (heads,).
        positions: As `archzoo.kernels.retention.retention` takes them, and so are the next two.
        starts: The same.
        valid: The same.
        heads: Heads.
        key_width: Of a head.
        eps: Of the norm of each head's o.

    Returns:
        y, (batch, time, heads * value width).
    """
    if table.is_complex():
        table = torch.view_as_real(table)
    places = retention.places(positions, starts, valid)
    projected = projected.contiguous()
    y, *_ = torch.ops.archzoo.gated_retention(
        projected, table.contiguous(), log_decay.contiguous(), *places, heads, key_width, eps
    )
    found: Tensor = y
    return found


def gated_retention_from(
    memory: Tensor,
    projected: Tensor,
    table: Tensor,
    log_decay: Tensor,
    positions: Tensor | None,
    starts: Tensor | None,
    valid: Tensor | None,
    *,
    heads: int,
    key_width: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """`gated_retention` of the next segment of a text, without gradients; and the state after it.

    Args:
        memory: S before the first token, (batch, heads, key_width, value width) float32.
        projected: As for `gated_retention`, and so are the others.
        table: The same.
        log_decay: The same.
        positions: The same.
        starts: The same.
        valid: The same.
        heads: The same.
        key_width: The same.
        eps: The same.
    """
    if table.is_complex():
        table = torch.view_as_real(table)
    projected = projected.contiguous()
    _, _, v, gate = _parts(projected, heads, key_width)
    q, k = _rotated(projected, table.contiguous(), heads, key_width).split(heads, dim=2)
    o, after = retention.retention(q, k, v, log_decay, memory, positions, starts, valid)
    assert after is not None  # one was given
    return _gated(o, gate, eps), after


def _parts(projected: Tensor, heads: int, key_width: int) -> tuple[Tensor, ...]:
    """Views of q, k, v, (batch, time, heads, size), and of g, (batch, time, width)."""
    keys = heads * key_width
    values = projected.shape[-1] // 2 - keys
    q, k, v, gate = projected.split_with_sizes((keys, keys, values, values), -1)
    return *[x.unflatten(-1, (heads, -1)) for x in (q, k, v)], gate


def _rotate(x: Tensor, table: Tensor, y: Tensor, scale: float, **how: Any) -> None:
    """Rotate x (batch, time, heads, key_width) into y."""
    batch, time, heads, _ = x.shape
    width = 2 * table.shape[3]
    block = power_of_2(width)
    rows = max(2048 // block, 1)
    tokens = batch * time
    of_batch = 0 if table.shape[0] == 1 else time * width
    scaled_from = how.pop("scaled_from", 0)
    _launch(
        "rotate_kernel", (-(-tokens // rows), heads), (x, table, y),
        tokens, time, *x.stride()[1:3], *y.stride()[1:3], of_batch, scale, scaled_from,
        WIDTH=width, BLOCK=block, ROWS=rows, num_warps=4, **how,
    )  # fmt: skip


def _rotated(projected: Tensor, table: Tensor, heads: int, key_width: int) -> Tensor:
    """Q and k side by side, (batch, time, 2 heads, key_width), rotated, k scaled."""
    qk = projected[..., : 2 * heads * key_width].unflatten(-1, (2 * heads, key_width))
    rotated = projected.new_empty(qk.shape)
    _rotate(qk, table, rotated, key_width**-0.5, scaled_from=heads, INVERSE=False)
    return rotated


def _gate_options(width: int) -> dict[str, int]:
    block = power_of_2(width)
    return {"WIDTH": width, "BLOCK": block, "ROWS": max(2048 // block, 1), "num_warps": 4}


def _gated(o: Tensor, gate: Tensor, eps: float) -> Tensor:
    """``silu(gate) * o / rms(o)``, (batch, time, heads * width)."""
    batch, time, heads, width = o.shape
    y = gate.new_empty((batch, time, heads * width))
    options = _gate_options(width)
    tokens = batch * time
    _launch(
        "gate_kernel", (-(-tokens // options["ROWS"]), heads), (o, gate, y),
        tokens, o.stride(1), o.stride(2), gate.stride(1), heads, eps, **options,
    )  # fmt: skip
    return y


_PLACES = "Tensor? positions, Tensor? documents, Tensor? ranges, "
_SIZES = "int heads, int key_width, float eps"
_library = torch.library.Library("archzoo", "FRAGMENT")
_library.define(
    f"gated_retention(Tensor projected, Tensor table, Tensor log_decay, {_PLACES}{_SIZES}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    f"gated_retention_backward(Tensor projected, Tensor table, Tensor log_decay, {_PLACES}{_SIZES},"
    " Tensor dy, Tensor o, Tensor states, Tensor normaliser, Tensor scores) -> Tensor"
)


def _inputs(
    projected: Tensor, table: Tensor, log_decay: Tensor, places: Any, heads: int, key_width: int
) -> tuple[Inputs, Tensor]:
    """What retention is computed of, and the gate."""
    _, _, v, gate = _parts(projected, heads, key_width)
    q, k = _rotated(projected, table, heads, key_width).split(heads, dim=2)
    return Inputs(q, k, v, log_decay, None, *places), gate


def _forward(projected: Tensor, table: Tensor, log_decay: Tensor, *rest: Any) -> tuple[Any, ...]:
    """The operator: y, o and what retention keeps; empty for what is absent."""
    *places, heads, key_width, eps = rest
    inputs, gate = _inputs(projected, table, log_decay, places, heads, key_width)
    inputs, forward = prepare(inputs, True, False)
    o, _, states, normaliser, scores = forward(inputs, True, False)
    y = _gated(o, gate, eps)
    if states is None:
        states = o.new_empty((0,), dtype=torch.float32)
    return y, o, states, normaliser, o.new_empty((0,)) if scores is None else scores


def _backward(projected: Tensor, table: Tensor, log_decay: Tensor, *rest: Any) -> Tensor:
    """The operator's gradient of `projected`."""
    *places, heads, key_width, eps, dy, o, states, normaliser, scores = rest
    inputs, gate = _inputs(projected, table, log_decay, places, heads, key_width)
    inputs, forward = prepare(inputs, True, False)
    whole = torch.empty_like(projected)
    dq, dk, dv, d_gate = _parts(whole, heads, key_width)
    batch, time, _, width = o.shape
    do = o.new_empty((batch, time, heads, width))
    options = _gate_options(width)
    tokens = batch * time
    _launch(
        "gate_backward_kernel", (-(-tokens // options["ROWS"]), heads),
        (o, gate, dy.contiguous(), do, d_gate),
        tokens, o.stride(1), o.stride(2), gate.stride(1), heads, eps, **options,
    )  # fmt: skip
    there = dv if forward.takes(dv) else None
    of_q, of_k, of_v, _ = forward.backward(inputs, do, None, states, normaliser, scores, dv=there)
    _rotate(of_q, table, dq, 1.0, INVERSE=True)
    _rotate(of_k, table, dk, key_width**-0.5, INVERSE=True)
    if there is None:
        dv.copy_(of_v)
    return whole


for _key in ("CPU", "CUDA"):
    _library.impl("gated_retention", _forward, _key)
    _library.impl("gated_retention_backward", _backward, _key)


@torch.library.register_fake("archzoo::gated_retention", lib=_library)
def _fake(projected: Tensor, table: Tensor, log_decay: Tensor, *rest: Any) -> tuple[Any, ...]:
    *places, heads, key_width, _ = rest
    _, _, v, _ = _parts(projected, heads, key_width)
    qk = projected.new_empty((*projected.shape[:2], 2 * heads, key_width))
    q, k = qk.split(heads, dim=2)
    o, _, *kept = torch.ops.archzoo.retention(q, k, v, log_decay, None, *places, True, False)
    return projected.new_empty((*projected.shape[:2], v.shape[2] * v.shape[3])), o, *kept


@torch.library.register_fake("archzoo::gated_retention_backward", lib=_library)
def _backward_fake(projected: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(projected)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    projected, table, log_decay, *rest = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(projected, table, *output[1:])
    ctx.rest = log_decay, *rest


def _gradients(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if differentiated_again():
        retention.refuse("second")
    projected, table, *kept = ctx.saved_tensors
    grad = None
    if dy is not None:
        grad = torch.ops.archzoo.gated_retention_backward(projected, table, *ctx.rest, dy, *kept)
    return grad, *[None] * 8


torch.library.register_autograd(
    "archzoo::gated_retention", _gradients, setup_context=_setup_context, lib=_library
)
