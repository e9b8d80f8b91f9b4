"""Dtypes, constants and what layers share: small tools that every part may use."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from archzoo.derivatives import followed, transformed


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums over time, softmax denominators and routers: float32, or float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


#: Relative RMS up to which two ways to compute the same thing agree: one part, a whole model,
#: and gradients.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}
MODEL_TOLERANCES = TOLERANCES | {torch.float32: 1e-4}
GRADIENT_TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4}

#: Kinds of devices that hold no float64: Apple's GPUs refuse to make one.
WITHOUT_FLOAT64 = frozenset({"mps"})


def for_float64(tensor: Tensor) -> Tensor:
    """The tensor where float64 is to be had: where it lies or, failing that, on the CPU."""
    return tensor.cpu() if tensor.device.type in WITHOUT_FLOAT64 else tensor


def widest(device: torch.device) -> torch.dtype:
    """Of sums over many tokens: float64, or float32 where there is no more."""
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x.to(dtype)``, which even where there is nothing to do costs as much as a small product."""
    return x if x.dtype == dtype else x.to(dtype)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What products of a device are computed in, where autocast is on; else None."""
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None


def product_dtype(x: Tensor) -> torch.dtype:
    """What a product of x is computed in: autocast's, which leaves float64 alone, or its own."""
    if x.dtype == torch.float64:
        return x.dtype
    return autocast_dtype(x.device) or x.dtype


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast off: it would round sums over time and scores to its own dtype."""
    # The meta device knows no autocast, and refuses the question.
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


class _NotKeptError(Exception):
    pass


@cache  # none is dropped: a CUDA graph that was captured reads it where it lies
def _constant(values: tuple[float, ...], device: torch.device | str, dtype: torch.dtype) -> Tensor:
    if transformed() and not torch.compiler.is_compiling():
        raise _NotKeptError  # no exception is kept, either
    with torch.inference_mode(False):  # an inference tensor could not be saved for a backward
        return torch.tensor(values, dtype=dtype, device=device)


class _Compiled:
    """Constants of compiled graphs, an attribute each: so Dynamo makes an input of each."""


def _keep_for_graphs(
    values: tuple[float, ...], device: torch.device | str | None, dtype: torch.dtype
) -> str:
    """Called while Dynamo traces: the constant's attribute of `_Compiled`."""
    where = torch.device(device or torch.get_default_device())
    with _disable_current_modes():  # the compiler's, under which a fake tensor would be made
        made = _constant(values, where, dtype)
    # The same in every process: compiled graphs are found again by the names of their inputs.
    name = "of_" + hashlib.sha256(repr((values, where, dtype)).encode()).hexdigest()[:16]
    setattr(_Compiled, name, made)
    return name


# What torch.compiler.assume_constant_result does, which imports the whole compiler for it.
_keep_for_graphs._dynamo_marked_constant = True  # type: ignore[attr-defined]


def constant(
    values: tuple[float, ...], device: torch.device | str | None, dtype: torch.dtype
) -> Tensor:
    """Host-side numbers as a tensor on a device, copied there once; never write into it.

    Decays and frequencies live as Python floats and come through here, so that no cast of a
    model can touch them, as it would touch a buffer.

    Args:
        values: Any numbers.
        device: Where the tensor lies. None: torch's default device.
        dtype: Of the tensor.
    """
    if torch.compiler.is_dynamo_compiling():
        # What Dynamo makes of `torch.tensor` is copied to the device in every call, and such a
        # copy waits for it: 12 layers lost 3.4 of 63 ms of a step to that.
        kept: Tensor = getattr(_Compiled, _keep_for_graphs(values, device, dtype))
        return kept
    # What is made under a transform or a mode (fake tensors) is of its kind, and is not kept.
    if not (torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack()):
        try:
            where = torch.get_default_device() if device is None else device
            return _constant(values, where, dtype)
        except _NotKeptError:
            pass
    return torch.tensor(values, dtype=dtype, device=device)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(batch, time, heads * size) to (batch, time, heads, size).

    A plain view: in decoding, einops' 9 us a call would be a tenth of a step.
    """
    return x.view(x.shape[0], x.shape[1], heads, -1)


def merge_heads(x: Tensor) -> Tensor:
    """(batch, time, heads, size) to (batch, time, heads * size)."""
    return x.flatten(2)


Computed = TypeVar("Computed")


def once_per_call(tensor: Tensor, key: Hashable, compute: Callable[[], Computed]) -> Computed:
    """What `compute` gives, computed once for all layers that see the same tensor.

    The positions of a `Context` are made anew in every call of a decoder and handed to all its
    layers, so what depends on them and on host-side numbers alone (rotation tables, decay masks)
    is kept beside them while they live. `key` names the computation, its numbers and whatever
    other tensors it reads. Nothing that needs a gradient may go through here. Beside any other
    tensor, which its owner may change in place, nothing is kept.

    Args:
        tensor: Beside which the result is kept: the positions of a `Context`.
        key: What tells this computation from others.
        compute: Called without arguments where nothing is kept yet.
    """
    # The compiler finds common subexpressions itself; a transform's tensors end with it.
    if followed():
        return compute()
    kept = tensor.__dict__.get("computed")
    if kept is None:
        return compute()
    key = (torch.is_inference_mode_enabled(), key)  # what is made there is of no use to gradients
    if key not in kept:
        kept[key] = compute()
    found: Computed = kept[key]
    return found


def of_this_call(tensor: Tensor) -> Tensor:
    """The tensor by another name, beside which `once_per_call` keeps things: a call's own."""
    if not torch.compiler.is_compiling() and "computed" not in tensor.__dict__:
        tensor = tensor.view_as(tensor)
        tensor.__dict__["computed"] = {}
    return tensor


def head_size(dim: int, heads: int) -> int:
    """Dim / heads, or one clear line where that is not an integer."""
    if heads < 1 or dim % heads:
        near = [n for n in range(1, dim + 1) if dim % n == 0]
        near = sorted(sorted(near, key=lambda n: abs(n - heads))[:4])
        raise ValueError(
            f"heads={heads} does not divide dim={dim}: take one of {', '.join(map(str, near))}"
        )
    return dim // heads


class KeepsFloat32(nn.Module):
    """A module some of whose tensors survive `.bfloat16()` and `.half()` unchanged.

    Subclasses list them in `float32_names`: balancing coefficients, expert biases, a learnable
    decay. Moving to another device, and casting to float64, work as ever.
    """

    float32_names: tuple[str, ...] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KeepsFloat32:
        kept = [getattr(self, name) for name in self.float32_names]
        kept += [tensor.grad for tensor in kept if tensor.grad is not None]

        def careful(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            lower = moved.dtype in (torch.bfloat16, torch.float16)
            if lower and any(tensor is keep for keep in kept):
                return tensor.to(moved.device)
            return moved

        super()._apply(careful, recurse)
        return self
