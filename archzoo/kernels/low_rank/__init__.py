"""A weight with changes of low rank, ``W + sum s B A``, made in one pass, and its gradients in one.

Each change is of rows of its own, a block of the weight. With torch's operations the factors are
put together, multiplied, added and cast, and their gradients cut apart and cast back: some ten
small kernels a matrix, each shorter than its launch.

Where kernels do not run it is made so. Importing this module needs neither Triton nor a GPU.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from archzoo.derivatives import differentiated_again, plain_gradients
from archzoo.kernels.launching import fused, launch, power_of_2, with_unit_stride
from archzoo.kernels.operators import define
from archzoo.numerics import without_autocast

MOST = 4  # changes of one weight
MAX_RANK = 64
JOINED = 165.0  # operations for a byte, of which a token needs 2 each: `cheaper_joined`
MAX_JOINED = 32  # ranks of all changes: with more a program's products are no longer small
JOINED_TOKENS = 128  # that a program joins
MULTIPROCESSORS = 132  # of the GPU it was measured on, each with one program at a time
_MODULE = "archzoo.kernels.low_rank.triton"


def available(weight: Tensor, firsts: Sequence[Tensor], begins: Sequence[int]) -> bool:
    """Whether the kernels take these changes.

    Args:
        weight: (rows, columns).
        firsts: A of each, (rank, columns).
        begins: The first row of each.
    """
    if not fused(weight) or weight.dtype != torch.float32 or len(firsts) > MOST:
        return False
    in_order = all(a < b for a, b in itertools.pairwise(begins))
    return in_order and all(len(first) <= MAX_RANK for first in firsts)


def cheaper_joined(tokens: int, rows: int, columns: int, ranks: Sequence[int]) -> bool:
    """Whether the gradients of W's changes are made faster without that of all of W.

    That one takes ``2 tokens rows columns`` operations. Without it x and the gradient of y are
    read, and for every 128 tokens sums of all factors are written and read again, by programs that
    fill a GPU or leave some of it idle. `JOINED` says which is less, as measured on an H200 with
    16,384 tokens: there all matrices of the small presets took 0.62 to 0.83 times as long at rank
    8, and one of 512 by 512 was as fast at rank 16.

    Args:
        tokens: Of the batch.
        rows: Of W.
        columns: Of W.
        ranks: Of its changes, which must be equal, and together at most `MAX_JOINED`.
    """
    if not tokens or len(set(ranks)) > 1 or sum(ranks) > MAX_JOINED:
        return False
    sums = (rows * ranks[0] + columns * sum(ranks)) * 4 / JOINED_TOKENS
    programs = -(-tokens // JOINED_TOKENS)
    idle = -(-programs // MULTIPROCESSORS) * MULTIPROCESSORS / programs
    return rows * columns > JOINED * idle * (rows + columns + sums)


def merged(
    weight: Tensor,
    firsts: Sequence[Tensor],
    seconds: Sequence[Tensor],
    begins: Sequence[int],
    scales: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    """``W + sum s B A``, rounded once, (rows, columns).

    Args:
        weight: W, (rows, columns).
        firsts: A of each change, (rank, columns), in W's dtype.
        seconds: B of each, (its rows, rank), in W's dtype.
        begins: The first row of each.
        scales: s of each.
        dtype: Of the result.
    """
    given = weight, list(firsts), list(seconds), list(begins), [float(s) for s in scales], dtype
    y: Tensor = (_operator if available(weight, firsts, begins) else _plain)(*given)
    return y


def _plain(
    weight: Tensor,
    firsts: Sequence[Tensor],
    seconds: Sequence[Tensor],
    begins: Sequence[int],
    scales: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    """The same of torch's own operations."""
    changed = weight
    with without_autocast(weight.device):  # which would round the products
        for first, second, begin, scale in zip(firsts, seconds, begins, scales, strict=True):
            room = (0, 0, begin, len(weight) - begin - len(second))
            changed = changed + F.pad(scale * second @ first, room)
    return changed.to(dtype)


def _filled(given: Sequence[Any], other: Any) -> list[Any]:
    """As many as a kernel takes; what stands in for the others is never read."""
    return [*given, *[other] * (MOST - len(given))]


def _rank(firsts: Sequence[Tensor]) -> int:
    """As many ranks as a product of tiles takes: at least 16."""
    return max(power_of_2(max(len(first) for first in firsts)), 16)


def _merged(
    weight: Tensor,
    firsts: list[Tensor],
    seconds: list[Tensor],
    begins: list[int],
    scales: list[float],
    dtype: torch.dtype,
) -> Tensor:
    weight = weight.contiguous()
    firsts, seconds = ([x.contiguous() for x in part] for part in (firsts, seconds))
    y = torch.empty_like(weight, dtype=dtype)
    rows, columns = weight.shape
    sizes = [len(second) for second in seconds]
    if begins != [sum(sizes[:n]) for n in range(len(sizes))] or sum(sizes) != rows:
        y.copy_(weight)  # what is not changed
    block_rows, block = 32, min(power_of_2(columns), 128)
    tiles = [-(-size // block_rows) for size in sizes]
    launch(
        _MODULE, "merge_kernel", (sum(tiles), -(-columns // block)),
        (weight, y, *_filled(firsts, firsts[0]), *_filled(seconds, seconds[0])), columns,
        *_filled(begins, 0), *_filled(sizes, 0), *_filled([len(x) for x in firsts], 0),
        *_filled(scales, 0.0), *_filled(tiles, 0),
        RANK=_rank(firsts), ROWS=block_rows, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return y


def _merged_shape(
    weight: Tensor, _a: Any, _b: Any, _begins: Any, _scales: Any, dtype: torch.dtype
) -> Tensor:
    return weight.new_empty(weight.shape, dtype=dtype)


def _gradients(
    grad: Tensor,
    firsts: list[Tensor],
    seconds: list[Tensor],
    begins: list[int],
    scales: list[float],
) -> list[Tensor]:
    """Of every A, and then of every B."""
    grad = grad.contiguous()
    firsts, seconds = ([x.contiguous() for x in part] for part in (firsts, seconds))
    made = _gradient_shapes(grad, firsts, seconds, begins, scales)
    count, columns = len(firsts), grad.shape[1]
    sizes = [len(second) for second in seconds]
    of_rows, of_columns, rank = 16, 16, _rank(firsts)
    long = min(256, 8192 // rank)  # else 64 ranks need more shared memory than most GPUs have
    tiles = [-(-size // of_rows) for size in sizes]
    across = -(-columns // of_columns)
    pairs = ((firsts, made[:count]), (seconds, made[count:]))
    tensors = [x for given, new in pairs for part in (given, new) for x in _filled(part, part[0])]
    launch(
        _MODULE, "gradient_kernel", (count * across + sum(tiles),), (grad, *tensors), columns,
        *_filled(begins, 0), *_filled(sizes, 0), *_filled([len(x) for x in firsts], 0),
        *_filled(scales, 0.0), *_filled(tiles, 0), across, count,
        RANK=rank, ROWS=of_rows, LONG_ROWS=long, COLUMNS=of_columns, LONG_COLUMNS=long,
        UPCAST=grad.device.type == "cpu", num_warps=4,
    )  # fmt: skip
    return made


def _gradient_shapes(
    grad: Tensor, firsts: list[Tensor], seconds: list[Tensor], _begins: Any, _scales: Any
) -> list[Tensor]:
    return [grad.new_empty(x.shape, dtype=x.dtype) for x in (*firsts, *seconds)]


def _joined_gradients(
    grad: Tensor,
    x: Tensor,
    firsts: list[Tensor],
    seconds: list[Tensor],
    begins: list[int],
    scales: list[float],
) -> list[Tensor]:
    """`_gradients` of the product ``grad^T x``, which is not made: of every A, then of every B."""
    grad, x = with_unit_stride(grad), with_unit_stride(x)
    firsts, seconds = ([x.contiguous() for x in part] for part in (firsts, seconds))
    made = _gradient_shapes(x, firsts, seconds, begins, scales)
    (tokens, columns), count, rank = x.shape, len(firsts), len(firsts[0])
    sizes = [len(second) for second in seconds]
    block, parts = 128, -(-tokens // JOINED_TOKENS)
    of_a = x.new_empty(parts, columns, count * rank, dtype=torch.float32)
    of_b = x.new_empty(parts, sum(sizes), rank, dtype=torch.float32)
    turned = count == 1 and columns > sizes[0]
    if turned:  # what is wider is read once
        once, twice, sums, factors = x, grad.narrow(1, begins[0], sizes[0]), (of_a, of_b), seconds
        others, begins, heights = firsts, [0], [columns]
    else:
        once, twice, sums, factors = grad, x, (of_b, of_a), firsts
        others, heights = seconds, sizes
    tensors = once, twice, *sums, *_filled(factors, factors[0]), *_filled(others, others[0])
    lengths = twice.shape[1], once.stride(0), twice.stride(0), *begins, *heights
    unit = math.gcd(8, *lengths)
    width, *rest = (length // unit for length in lengths)
    if parts:
        launch(
            _MODULE, "factors_kernel", (parts,), tensors, tokens, width, *rest[:2],
            *_filled(rest[2 : 2 + count], 0), *_filled(rest[2 + count :], 0),
            *_filled([-(-height // block) for height in heights], 0),
            COUNT=count, RANK=rank, WIDTH=max(power_of_2(count * rank), 16), TURNED=turned,
            TOKENS=JOINED_TOKENS, BLOCK=block, UNIT=unit, UPCAST=grad.device.type == "cpu",
            num_warps=8, num_stages=3,
        )  # fmt: skip
    block = 32
    across = -(-columns * count * rank // block)
    launch(
        _MODULE, "sum_kernel", (across + -(-sum(sizes) * rank // block),),
        (of_b, of_a, *_filled(made[:count], of_a), *_filled(made[count:], of_a)),
        parts, columns, across, *_filled(sizes, 0), *_filled(scales, 0.0),
        COUNT=count, RANK=rank, PARTS=min(power_of_2(max(parts, 1)), 128), BLOCK=block, num_warps=4,
    )  # fmt: skip
    return made


def _joined_shapes(_: Tensor, x: Tensor, *rest: Any) -> list[Tensor]:
    return _gradient_shapes(x, *rest)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, firsts, seconds, *ctx.rest = inputs
    ctx.count = len(firsts)
    ctx.save_for_backward(weight, *firsts, *seconds)


def _of_all(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    weight, *factors = ctx.saved_tensors
    count, (begins, scales, dtype) = ctx.count, ctx.rest
    if differentiated_again():

        def compute(weight: Tensor, *factors: Tensor) -> Tensor:
            return _plain(weight, factors[:count], factors[count:], begins, scales, dtype)

        of_weight, *found = plain_gradients(compute, (weight, *factors), (grad,))
    else:
        found = _gradient_operator(grad, factors[:count], factors[count:], begins, scales)
        of_weight = grad.to(weight.dtype) if ctx.needs_input_grad[0] else None
    return of_weight, list(found[:count]), list(found[count:]), None, None, None


_operator = define(
    "merged_weight(Tensor weight, Tensor[] firsts, Tensor[] seconds, int[] begins, "
    "float[] scales, ScalarType dtype) -> Tensor",
    _merged, _merged_shape, _keep, _of_all,
)  # fmt: skip
_gradient_operator = define(
    "merged_weight_gradients(Tensor grad, Tensor[] firsts, Tensor[] seconds, int[] begins, "
    "float[] scales) -> Tensor[]",
    _gradients, _gradient_shapes,
)  # fmt: skip
joined_gradients = define(
    "low_rank_gradients(Tensor grad, Tensor x, Tensor[] firsts, Tensor[] seconds, int[] begins, "
    "float[] scales) -> Tensor[]",
    _joined_gradients, _joined_shapes,
)  # fmt: skip
