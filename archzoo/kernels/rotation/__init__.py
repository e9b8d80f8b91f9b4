"""Queries, keys and values out of the result of one matrix: cut apart and rotated in one pass.

    q_n, k_n turned by n theta: (a, b) -> (a cos - b sin, a sin + b cos)        v_n as it is

and back, for the gradients: turned the other way and joined, in one pass, where a compiler makes
two. The three lie in memory of their own, so that attention keeps them alone for its backward pass,
and not the matrix's result, in which its values would be a third.

Where the product with the matrix is made here too, its result is nobody else's: queries and keys
are turned where they lie, the values are not touched, and the three are parts of the result.

The plain form is `archzoo.positions.rotary`, which runs wherever `available` says no. Importing
this module needs neither Triton nor a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from archzoo.derivatives import differentiated_again, exporting, plain_gradients, transformed
from archzoo.kernels.launching import launch, power_of_2, run_beside, with_unit_stride
from archzoo.kernels.operators import define
from archzoo.numerics import product_dtype

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def available(projected: Tensor) -> bool:
    """Whether the kernel takes this result of a matrix."""
    # Asked first: on a CPU, where no kernel runs, nothing else is looked at.
    if not run_beside(projected) or transformed() or projected.dtype not in _DTYPES:
        return False
    if exporting():  # what is exported is made of torch's own operations
        return False
    return projected.is_contiguous() and projected.numel() > 0


def split_product(
    x: Tensor, weight: Tensor, table: Tensor, heads: int, key_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`split_rotated` of ``x W^T``, computed as autocast does; the three share their memory.

    Args:
        x: (batch, time, columns).
        weight: W, ((heads + 2 key_heads) * head_dim, columns).
        table: As for `split_rotated`.
        heads: Of q.
        key_heads: Of k, and of v.
    """
    dtype = product_dtype(x)
    if table.is_complex():
        table = torch.view_as_real(table)
    given = x.to(dtype), weight.to(dtype), table.contiguous(), heads, key_heads
    if torch.is_grad_enabled():
        q, k, v = _SplitProduct.apply(*given)
        return q, k, v
    return _parts(_product_operator(*given), heads, key_heads)


def split_rotated(
    projected: Tensor, table: Tensor, heads: int, key_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Q, k and v, each contiguous, (batch, time, its heads, head_dim); q and k rotated.

    Args:
        projected: (batch, time, (heads + 2 key_heads) * head_dim), in this order, contiguous.
        table: The rotation of all channels, (batch or 1, time, 1, head_dim / 2) complex, or cosine
            and sine in a last axis; float32.
        heads: Of q.
        key_heads: Of k, and of v.
    """
    if table.is_complex():
        table = torch.view_as_real(table)
    q, k, v = _split_operator(projected.contiguous(), table.contiguous(), heads, key_heads)
    return q, k, v


def _empty_parts(
    projected: Tensor, _: Tensor, heads: int, key_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for q, k and v."""
    batch, time, whole = projected.shape
    width = whole // (heads + 2 * key_heads)
    q, k, v = (
        projected.new_empty((batch, time, count, width)) for count in (heads, key_heads, key_heads)
    )
    return q, k, v


def _empty_joined(q: Tensor, k: Tensor, _v: Tensor, _table: Tensor) -> Tensor:
    """Memory for the three side by side."""
    batch, time, heads, width = q.shape
    return q.new_empty((batch, time, (heads + 2 * k.shape[2]) * width))


def _run(
    joined: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    join: bool,
    *,
    in_place: bool = False,
) -> None:
    """Cut `joined` apart into q, k and v, or join them there; in place v is where it belongs."""
    batch, time, heads, width = q.shape
    block = power_of_2(width)
    rows = max(2048 // block, 1)
    tokens = batch * time
    of_batch = 0 if table.shape[0] == 1 else time * width
    strides = (stride for part in (q, k, v) for stride in part.stride()[:3])
    parts = heads + (1 if in_place else 2) * k.shape[2]
    launch(
        "archzoo.kernels.rotation.triton", "rotation_kernel",
        (-(-tokens // rows), parts), (joined, q, k, v, table),
        tokens, time, heads, k.shape[2], *strides, of_batch,
        WIDTH=width, BLOCK=block, ROWS=rows, JOIN=join, num_warps=4,
    )  # fmt: skip


def _split(
    projected: Tensor, table: Tensor, heads: int, key_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator."""
    parts = _empty_parts(projected, table, heads, key_heads)
    _run(projected, *parts, table, False)
    return parts


def _join(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    """Its transpose, which is its inverse."""
    q, k, v = map(with_unit_stride, (q, k, v))
    joined = _empty_joined(q, k, v, table)
    _run(joined, q, k, v, table, True)
    return joined


def _keep_for_split(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    _, table, *ctx.heads = inputs
    ctx.save_for_backward(table)


def _split_gradients(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Any, ...]:
    (table,) = ctx.saved_tensors
    return _join_operator(dq, dk, dv, table), None, None, None


def _keep_for_join(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, _, table = inputs
    ctx.heads = q.shape[2], k.shape[2]
    ctx.save_for_backward(table)


def _join_gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (table,) = ctx.saved_tensors
    return *_split_operator(grad.contiguous(), table, *ctx.heads), None


# The two are each other's transpose, so that all derivatives are theirs.
_split_operator = define(
    "split_rotated(Tensor projected, Tensor table, int heads, int key_heads) "
    "-> (Tensor, Tensor, Tensor)",
    _split, _empty_parts, _keep_for_split, _split_gradients,
)  # fmt: skip
_join_operator = define(
    "join_rotated(Tensor q, Tensor k, Tensor v, Tensor table) -> Tensor",
    _join, _empty_joined, _keep_for_join, _join_gradients,
)  # fmt: skip


# ---------------------------------------------------------------------------- with the product


class _SplitProduct(torch.autograd.Function):
    """Its results are views of one tensor, which those of an operator may not be."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, table: Tensor, heads: int, key_heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(x, weight, table)
        ctx.heads = heads, key_heads
        return _parts(_product_operator(x, weight, table, heads, key_heads), heads, key_heads)

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, table = ctx.saved_tensors
        if differentiated_again():

            def compute(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
                return split_rotated(x @ weight.t(), table, *ctx.heads)

            return *plain_gradients(compute, (x, weight), (dq, dk, dv)), None, None, None
        joined = _join_operator(dq, dk, dv, table)
        of_x = joined @ weight if ctx.needs_input_grad[0] else None
        of_weight = None
        if ctx.needs_input_grad[1]:
            of_weight = joined.flatten(0, 1).t() @ x.flatten(0, 1)
        return of_x, of_weight, None, None, None


def _parts(joined: Tensor, heads: int, key_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """The three side by side, as views."""
    whole = joined.view(*joined.shape[:2], heads + 2 * key_heads, -1)
    q, k, v = whole.split_with_sizes((heads, key_heads, key_heads), 2)
    return q, k, v


def _product(x: Tensor, weight: Tensor, table: Tensor, heads: int, key_heads: int) -> Tensor:
    joined = torch.mm(x.flatten(0, 1), weight.t()).view(*x.shape[:2], -1)
    q, k, v = _parts(joined, heads, key_heads)
    _run(joined, q, k, v, table, False, in_place=True)
    return joined


def _product_shape(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:2], len(weight)))


_product_operator = define(
    "rotated_product(Tensor x, Tensor weight, Tensor table, int heads, int key_heads) -> Tensor",
    _product,
    _product_shape,
)
