"""Matrices of signs, 1 bit a weight: how they are packed, and the product with one.

Bit i % 8, counted from the lowest, of byte i // 8 of a row is 1 where the weight of input i is
negative; bits past the last input are 0. So a row of n inputs takes ceil(n / 8) bytes. It is the
order that OneBit's own code packs in.

Three forms compute ``y = ((x * before) S^T) * after`` and agree to rounding: the plain one, which
unpacks S for the call; C++ on a CPU, which is built at the first use and reads the bits alone; a
Triton kernel, which also mixes BinaryMoS's scales and norms y. The two fast ones are for few rows
of x and have no gradients. Importing this module needs neither a compiler nor Triton.
"""

from __future__ import annotations

import functools
import importlib

import torch
from torch import Tensor
from torch.nn import functional as F

from archzoo.derivatives import followed
from archzoo.kernels.launching import SWITCHED_OFF, interpreting, launch, power_of_2, run_beside
from archzoo.kernels.one_bit.native import library
from archzoo.numerics import at_least_float32, autocast_dtype, cast

ROWS = 8  # of x, up to which the fast forms run: they read all bits for each row
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
EPS = 1e-5  # of the norm
CHUNK = 64  # bytes of a row of signs that a warp of the Triton kernel holds
LEAST = 32  # the same where rows are short: what an int8 product takes at least
WARPS = 16  # of a program at most
SIDES = (64, 32, 16)  # rows of signs of a program: as many as leave enough programs for a GPU
PROGRAMS = 128
MIXED = 8  # scales that it mixes at most
NORMED = 16_384  # outputs that a program norms
_MODULE = "archzoo.kernels.one_bit.triton"


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
    x: Tensor, packed: Tensor, before: Tensor, after: Tensor, *, norm: bool = False
) -> Tensor:
    """``y = ((x * before) S^T) * after`` in x's dtype, by the fastest form that takes them.

    Args:
        x: (..., n).
        packed: S, (outputs, ceil(n / 8)) uint8.
        before: Scales of the inputs: (n,), or of each row of x: x's shape.
        after: Scales of the outputs: (outputs,), or of each row of x: (..., outputs).
        norm: Add a layer norm of y, without weights.
    """
    if not _few(x, before, after) or not available(x) or not _takes(x, packed, norm):
        y = product_plainly(x, packed, before, after)
        return normed(y) if norm else y
    flat = x.reshape(-1, x.shape[-1])
    scales = [scale if scale.dim() == 1 else scale.flatten(0, -2) for scale in (before, after)]
    if run_beside(x):
        y = _by_kernel(flat, packed, *scales, norm=norm)
    else:
        y = _by_library(flat, packed, *scales)
    y = y.view(*x.shape[:-1], len(packed))
    return normed(y) if norm and not run_beside(x) else y


def mixed_product(
    x: Tensor, packed: Tensor, router: Tensor, inputs: Tensor, outputs: Tensor
) -> Tensor:
    """BinaryMoS's ``y = ((x * (G S_in)) S^T) * (G S_out)``, ``G = softmax(x R^T)``.

    Args:
        x: (..., n).
        packed: S, as of `product`.
        router: R, (scales, n).
        inputs: S_in, the same.
        outputs: S_out, (scales, outputs).
    """
    fits = len(router) <= MIXED and outputs.stride(-1) == 1 and _takes(x, packed, norm=False)
    if run_beside(x) and fits and _few(x, router, inputs, outputs) and available(x):
        flat = x.reshape(-1, x.shape[-1])
        y = _by_kernel(flat, packed, inputs, outputs, router=router)
        return y.view(*x.shape[:-1], len(packed))
    return product(x, packed, *mixed_scales(x, router, inputs, outputs))


def normed(y: Tensor) -> Tensor:
    """OneBit's layer norm of (..., outputs).

    Args:
        y: That.
    """
    return F.layer_norm(y, y.shape[-1:], eps=EPS)


def _few(x: Tensor, *others: Tensor) -> bool:
    """Whether a fast form is for these: few rows of x and no gradients."""
    rows = x.numel() // max(x.shape[-1], 1)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *others)):
        return False
    return 0 < rows <= ROWS and autocast_dtype(x.device) is None


def _takes(x: Tensor, packed: Tensor, norm: bool) -> bool:
    """Whether the form that runs where x lies takes these shapes."""
    if not run_beside(x):
        return True
    return x.shape[-1] % 8 == 0 and not (norm and len(packed) > NORMED) and _has_int8(x.device)


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


@functools.lru_cache(maxsize=8)
def _has_int8(device: torch.device) -> bool:
    """Whether tensor cores multiply int8 as the kernel does: from Ampere on."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


@functools.lru_cache(maxsize=8)
def _begins_early(device: torch.device) -> bool:
    """Whether kernels may begin while the one before still runs: from Hopper on."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        return False
    return bool(importlib.import_module(_MODULE).CAN_BEGIN_EARLY)


def _by_kernel(
    x: Tensor,
    packed: Tensor,
    before: Tensor,
    after: Tensor,
    *,
    router: Tensor | None = None,
    norm: bool = False,
) -> Tensor:
    """By Triton; x (rows, n), n a multiple of 8. With a router the scales are those it mixes."""
    (rows, width), outputs = x.shape, packed.shape[0]
    x, packed = x.contiguous(), packed.contiguous()
    weights = before, after if router is None else router
    before, other = (weight.contiguous() for weight in weights)
    if router is None:
        after = other
        strides = width if before.dim() == 2 else 0, outputs if after.dim() == 2 else 0
    else:
        router, strides = other, (0, after.stride(0))
    y = x.new_empty(rows, outputs)
    raw = x.new_empty((rows, outputs), dtype=torch.float32) if norm else x
    chunk = CHUNK if width // 8 > 4 * CHUNK else LEAST
    parts = min(power_of_2(-(-width // (8 * chunk))), WARPS)
    side = next((side for side in SIDES if outputs >= side * PROGRAMS), SIDES[-1])
    # What is read before the wait must be weights: nothing that the kernel before may have written.
    as_given = before is weights[0] and other is weights[1]
    lasting = as_given and (router is not None or not any(strides))
    early = {"launch_pdl": True} if lasting and _begins_early(x.device) else {}
    launch(
        _MODULE, "one_bit_kernel", (-(-outputs // side), rows),
        (
            x, packed.view(torch.int8), before, after, x if router is None else router, y, raw,
            _arrivals(packed) if norm else x,
        ),
        outputs, *strides, WIDTH=width, PARTS=parts, CHUNK=chunk, ROWS=side,
        SCALES=0 if router is None else len(router), NORM=norm,
        HELD=power_of_2(outputs) if norm else 1, EARLY=bool(early), ASSEMBLY=not interpreting(),
        num_warps=parts, num_stages=1, **early,
    )  # fmt: skip
    return y


def _arrivals(packed: Tensor) -> Tensor:
    """Of each row of x a counter of programs, at 0 between calls, kept beside the signs.

    Products with the same signs run one after another, as a module's calls do on one stream.
    """
    kept: Tensor | None = packed.__dict__.get("arrivals")
    if kept is None or kept.device != packed.device:
        kept = packed.__dict__["arrivals"] = packed.new_zeros(ROWS, dtype=torch.int32)
    return kept


# ---------------------------------------------------------------------------- BinaryMoS's scales


def mixed_scales(
    x: Tensor, router: Tensor, inputs: Tensor, outputs: Tensor
) -> tuple[Tensor, Tensor]:
    """BinaryMoS's scales of each row of x: ``G S_in`` and ``G S_out``, ``G = softmax(x R^T)``.

    G is float32 at least.

    Args:
        x: (..., n).
        router: R, (scales, n).
        inputs: S_in, the same.
        outputs: S_out, (scales, outputs).
    """
    logits = F.linear(x, router)
    gates = cast(logits, at_least_float32(logits.dtype)).softmax(dim=-1)
    gates = cast(gates, inputs.dtype)
    return gates @ inputs, gates @ outputs
