"""Matrices of signs, 1 bit a weight: how they are packed, and the product with one.

Bit i % 8, counted from the lowest, of byte i // 8 of a row is 1 where the weight of input i is
negative; bits past the last input are 0. So a row of n inputs takes ceil(n / 8) bytes. It is the
order that OneBit's own code packs in.

Three forms compute ``y = ((x * before) S^T) * after`` and agree to rounding: the plain one, which
unpacks S for the call; C++ on a CPU, which is built at the first use and reads the bits alone; on a
GPU a kernel of `triton`, or that of `gluon`, which is Hopper's. The fast ones are for few rows of x
and have no gradients. Importing this module needs neither a compiler nor Triton.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from archzoo.derivatives import followed
from archzoo.kernels.launching import (
    SWITCHED_OFF,
    describe,
    launch,
    on_hopper,
    power_of_2,
    run_beside,
    with_unit_stride,
)
from archzoo.kernels.one_bit.native import library
from archzoo.numerics import at_least_float32, autocast_dtype, cast

BITS = 32  # of a word, as the Triton kernel reads them
ROWS = 8  # of x, up to which the fast forms run: they read all bits for each row
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
WORDS = 256  # of a row of signs that a program of the Triton kernel holds at once
MIXED = 1024  # scales that a program mixes
SIDE = 4  # rows of signs whose words lie side by side for it
TWO_FROM = 4096  # outputs, from which two such sides a program leave enough programs for a GPU
ALIGNED = 128  # inputs whose signs are 16 bytes, as Hopper's kernel reads them
PART = 512  # inputs of a warp of that
WARPS = 8  # of a program at most: it goes through longer rows in steps
TILE = 16  # rows of signs
TWO_TILES_FROM = 4096  # outputs, from which two tiles a program leave enough programs
FOUR_TILES_FROM = 8192  # the same of four, where a program makes scales that all its tiles share
AT_ONCE = 8  # scales that registers of that hold
NORMED = 32_768  # outputs that a program norms

_launch = functools.partial(launch, "archzoo.kernels.one_bit.triton")
_HOPPERS = "archzoo.kernels.one_bit.gluon"
_runs_hoppers = True  # not after it has failed


# ---------------------------------------------------------------------------- packing


def pack(negative: Tensor) -> Tensor:
    """Bits as bytes.

    Args:
        negative: (..., n) bool: where a weight is below 0.

    Returns:
        (..., ceil(n / 8)) uint8.
    """
    width = negative.shape[-1]
    bits = F.pad(negative.to(torch.uint8), (0, -width % 8)).unflatten(-1, (-1, 8))
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    packed: Tensor = (bits << places).sum(dim=-1, dtype=torch.uint8)
    return packed


def unpack(packed: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Bytes as signs: (..., width) of 1 and -1.

    Args:
        packed: (..., ceil(width / 8)) uint8, as `pack` gives it.
        width: n.
        dtype: Of the signs.
    """
    byte = torch.arange(256, device=packed.device)[:, None]
    places = torch.arange(8, device=packed.device)
    table = (1 - 2 * (byte >> places & 1)).to(dtype)
    return table[packed.int()].flatten(-2)[..., :width]


# ---------------------------------------------------------------------------- the product


def available(like: Tensor) -> bool:
    """Whether a fast form runs where a tensor lies, in its dtype; what it needs is built now."""
    if like.dtype not in FLOATS or SWITCHED_OFF or followed():
        return False
    if like.device.type == "cpu":
        return run_beside(like) or library() is not None
    return run_beside(like)


def product(
    x: Tensor, packed: Tensor, before: Tensor, after: Tensor, eps: float | None = None
) -> Tensor:
    """``y = ((x * before) S^T) * after`` in x's dtype, by the fastest form that takes them.

    Args:
        x: (..., n).
        packed: S, (outputs, ceil(n / 8)) uint8.
        before: Scales of the inputs: (n,), or of each row of x: x's shape.
        after: Scales of the outputs: (outputs,), or of each row of x: (..., outputs).
        eps: Of a layer norm without weights over the outputs, which follows. None: there is none.
    """
    if not _quick(x, before, after) or not available(x):
        return _norm_plainly(product_plainly(x, packed, before, after), eps)
    rows = x.numel() // x.shape[-1]
    flat = x.reshape(rows, x.shape[-1])
    of_x, of_y = (scale if scale.dim() == 1 else scale.flatten(0, -2) for scale in (before, after))
    if not run_beside(x):
        y = _norm_plainly(_by_library(flat, packed, of_x, of_y), eps)
    elif x.shape[-1] % BITS == 0:
        y = _by_kernel(flat, packed, of_x, of_y, eps)
    else:
        return _norm_plainly(product_plainly(x, packed, before, after), eps)
    return y.view(*x.shape[:-1], len(packed))


def mixed_product(
    x: Tensor, packed: Tensor, router: Tensor, inputs: Tensor, outputs: Tensor
) -> Tensor:
    """BinaryMoS's: `product` by the scales that `mixed_scales` makes of each row of x.

    Args:
        x: As for `product`.
        packed: The same.
        router: As for `mixed_scales`, and so are the others.
        inputs: The same.
        outputs: The same.
    """

    def apart() -> Tensor:
        return product(x, packed, *mixed_scales(x, router, inputs, outputs))

    quick = _quick(x, router, inputs, outputs) and run_beside(x) and _hoppers_takes(x)
    if quick and len(router) <= AT_ONCE:
        flat = x.reshape(-1, x.shape[-1])
        y = _by_hoppers_kernel_or(apart, flat, packed, inputs, outputs, router)
        return y.view(*x.shape[:-1], len(packed))
    return apart()


def _quick(x: Tensor, *scales: Tensor) -> bool:
    """Whether x has few rows, and no gradient is asked for."""
    gradients = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *scales))
    rows = x.numel() // max(x.shape[-1], 1)
    if gradients or not 0 < rows <= ROWS or x.dtype not in FLOATS or followed():
        return False
    return autocast_dtype(x.device) is None


def _norm_plainly(y: Tensor, eps: float | None) -> Tensor:
    # Autocast gives float32 on a GPU.
    return y if eps is None else cast(F.layer_norm(y, y.shape[-1:], eps=eps), y.dtype)


def product_plainly(x: Tensor, packed: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """The same of torch's own operations; S is unpacked for this call.

    Args:
        x: As for `product`, and so are the others.
        packed: The same.
        before: The same.
        after: The same.
    """
    signs = unpack(packed, x.shape[-1], x.dtype)
    y = F.linear(x * cast(before, x.dtype), signs)
    return y * cast(after, y.dtype)


def _by_library(x: Tensor, packed: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """On a CPU; x (rows, n)."""
    dtype, (rows, width), outputs = x.dtype, x.shape, packed.shape[0]
    x, before, after = (cast(t, torch.float32).contiguous() for t in (x, before, after))
    packed = packed.contiguous()
    y = torch.empty((rows, outputs), dtype=torch.float32)
    compute = library()
    assert compute is not None  # `available` has asked
    compute(
        x.data_ptr(), packed.data_ptr(), before.data_ptr(), after.data_ptr(), y.data_ptr(),
        rows, outputs, width, width if before.dim() == 2 else 0,
        outputs if after.dim() == 2 else 0, torch.get_num_threads(),
    )  # fmt: skip
    return cast(y, dtype)


# ---------------------------------------------------------------------------- on a GPU


def _hoppers_takes(x: Tensor) -> bool:
    """Whether Hopper's kernel runs on such rows."""
    return _runs_hoppers and x.shape[-1] % ALIGNED == 0 and on_hopper(x)


def _by_kernel(
    x: Tensor, packed: Tensor, before: Tensor, after: Tensor, eps: float | None
) -> Tensor:
    """By the fastest kernel that takes them; x (rows, n), n a multiple of 32."""
    normed = eps is not None and len(packed) <= NORMED
    # What a norm of ours follows is not rounded before it.
    dtype = torch.float32 if normed else x.dtype
    plainer = functools.partial(_by_tritons_kernel, x, packed, before, after, dtype)
    if _hoppers_takes(x):
        y = _by_hoppers_kernel_or(plainer, x, packed, before, after, dtype=dtype)
    else:
        y = plainer()
    if eps is None or not normed:
        return _norm_plainly(y, eps)
    return _norm(y, eps, x.dtype, early=_hoppers_takes(x))  # which has not failed


def _norm(y: Tensor, eps: float, dtype: torch.dtype, early: bool) -> Tensor:
    """The layer norm of each row, y (rows, n) float32."""
    rows, width = y.shape
    z = torch.empty_like(y, dtype=dtype)
    held = power_of_2(width)
    # On an H200 4,096 outputs were faster by 4 warps than by 16, and 8,192 as fast.
    _launch(
        "norm_kernel", (rows,), (y, z), width, eps, HELD=held, EARLY=early,
        num_warps=min(max(held // 1024, 4), 16), launch_pdl=early,
    )  # fmt: skip
    return z


def _by_hoppers_kernel_or(other: Callable[[], Tensor], *given: Any, **options: Any) -> Tensor:
    """`_by_hoppers_kernel`, or the other form, for good, where it does not run."""
    global _runs_hoppers
    try:
        return _by_hoppers_kernel(*given, **options)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        y = other()  # raises what is wrong beside
        if _runs_hoppers:
            _runs_hoppers = False
            warnings.warn(
                f"the kernel of 1-bit products for Hopper does not run here ({describe(error)}): "
                "another one runs instead, and takes 1.5 times as long or more",
                stacklevel=3,
            )
        return y


def _by_hoppers_kernel(
    x: Tensor,
    packed: Tensor,
    before: Tensor,
    after: Tensor,
    router: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """By Gluon; x (rows, n), n a multiple of 128; with a router the scales are mixed.

    It begins while the kernel before still runs, and reads signs and scales before it waits for
    that: so scales of each token, which that kernel may write, do not begin early.
    """
    (rows, width), outputs = x.shape, packed.shape[0]
    scales, by_row, stride = 0, 0, 0
    early = packed.is_contiguous() and before.is_contiguous()
    if router is None:
        early = early and before.dim() == after.dim() == 1 and after.is_contiguous()
        by_row = width if before.dim() == 2 else 0
        after = after.contiguous()
        stride = outputs if after.dim() == 2 else 0
    else:
        scales = len(router)
        early = early and router.is_contiguous() and after.stride(1) == 1
        after = with_unit_stride(after)
        stride = after.stride(0)
        router = router.contiguous()
    x, packed, before = (t.contiguous() for t in (x, packed, before))
    y = x.new_empty(rows, outputs, dtype=dtype)
    parts, tiles = _plan(width, outputs, mixed=scales > 0)
    launch(
        _HOPPERS, "product_kernel", (-(-outputs // (TILE * tiles)), rows),
        (x, packed.view(torch.int32), before, after, before if router is None else router, y),
        outputs, by_row, stride,
        WIDTH=width, PARTS=parts, TILES=tiles, SCALES=scales, HELD=power_of_2(max(scales, 1)),
        EARLY=early, num_warps=parts, launch_pdl=early,
    )  # fmt: skip
    return y


def _plan(width: int, outputs: int, mixed: bool) -> tuple[int, int]:
    """Warps of a program of Hopper's kernel, and its tiles."""
    # The fastest of those timed on an H200: at 8,192, 16 warps and four tiles were slower without
    # mixing; with it four tiles took two thirds of the time of two.
    parts = min(power_of_2(-(-width // PART)), WARPS)
    if mixed and outputs >= FOUR_TILES_FROM:
        return parts, 4
    return parts, 2 if outputs >= TWO_TILES_FROM else 1


def _by_tritons_kernel(
    x: Tensor, packed: Tensor, before: Tensor, after: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """By Triton; x (rows, n), n a multiple of 32."""
    (rows, width), outputs = x.shape, packed.shape[0]
    x, before, after = x.contiguous(), before.contiguous(), after.contiguous()
    y = x.new_empty(rows, outputs, dtype=dtype)
    count = width // BITS
    held = min(power_of_2(count), WORDS)
    two = outputs >= TWO_FROM
    tile = 2 * SIDE if two else SIDE
    _launch(
        "one_bit_kernel", (-(-outputs // tile), rows), (x, words_of(packed), before, after, y),
        outputs, width if before.dim() == 2 else 0, outputs if after.dim() == 2 else 0,
        COUNT=count, WORDS=held, TWO=two, num_warps=max(held // 32, 1),
    )  # fmt: skip
    return y


def mixed_scales(
    x: Tensor, router: Tensor, inputs: Tensor, outputs: Tensor
) -> tuple[Tensor, Tensor]:
    """BinaryMoS's scales of each row of x: ``G S_in`` and ``G S_out``, ``G = softmax(x R^T)``.

    By a kernel where one runs, which makes float32; else in the scales' dtype. G is float32 at
    least.

    Args:
        x: (..., n).
        router: R, (scales, n).
        inputs: S_in, the same.
        outputs: S_out, (scales, outputs).
    """
    if not _quick(x, router, inputs, outputs) or not run_beside(x):
        return mixed_scales_plainly(x, router, inputs, outputs)
    rows = x.numel() // x.shape[-1]
    (scales, width), height = router.shape, outputs.shape[1]
    before = x.new_empty((rows, width), dtype=torch.float32)
    after = x.new_empty((rows, height), dtype=torch.float32)
    tensors = (x.reshape(rows, width), router, inputs, outputs)
    blocks = -(-width // MIXED) - (-height // MIXED)
    _launch(
        "mixed_scales_kernel", (blocks, rows),
        (*(tensor.contiguous() for tensor in tensors), before, after), width, height,
        SCALES=scales, HELD=power_of_2(scales), BLOCK=MIXED, num_warps=4,
    )  # fmt: skip
    return before.view(x.shape), after.view(*x.shape[:-1], height)


def mixed_scales_plainly(
    x: Tensor, router: Tensor, inputs: Tensor, outputs: Tensor
) -> tuple[Tensor, Tensor]:
    """The same of torch's own operations.

    Args:
        x: As for `mixed_scales`, and so are the others.
        router: The same.
        inputs: The same.
        outputs: The same.
    """
    logits = F.linear(x, router)
    gates = cast(logits, at_least_float32(logits.dtype)).softmax(dim=-1)
    gates = cast(gates, inputs.dtype)
    return gates @ inputs, gates @ outputs


def words_of(packed: Tensor) -> Tensor:
    """The same bits as the kernel reads them, kept beside the bytes while they stay.

    Bit k of word j of an output is the sign of input ``k * count + j``, so that neighbouring
    threads, which hold neighbouring words, read neighbouring inputs; the words of 4 outputs lie
    side by side.

    Args:
        packed: (outputs, n / 8) uint8, n a multiple of 32.

    Returns:
        (tiles, count, 4) int32, count = n / 32; tiles hold 8 outputs by twos, filled up with 0.
    """
    version = 0 if packed.is_inference() else packed._version
    kept = packed.__dict__.get("words")
    if kept is not None and kept[0] == version:
        found: Tensor = kept[1]
        return found
    outputs, count = packed.shape[0], packed.shape[1] * 8 // BITS
    negative = (unpack(packed, BITS * count, torch.int8) < 0).view(outputs, BITS, count)
    spread = pack(negative.transpose(1, 2)).contiguous()  # 4 bytes a word, the lowest first
    words = F.pad(spread.view(torch.int32).view(outputs, count), (0, 0, 0, -outputs % (2 * SIDE)))
    words = words.view(-1, SIDE, count).transpose(1, 2).contiguous()
    packed.__dict__["words"] = (version, words)
    return words
