"""What any launch of a kernel needs from the host: memory as kernels want it, a ready handle.

Triton is imported at the first launch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_RUN_WITH = ("3.6.",)  # Tritons whose inner parts are known


@functools.lru_cache(maxsize=1)
def _triton() -> Any:
    import triton

    return triton


@functools.lru_cache(maxsize=1)
def known_triton() -> bool:
    """Whether this Triton is one whose inner parts are known."""
    return _triton().__version__.startswith(_RUN_WITH)


def padded_width(width: int, dtype: torch.dtype) -> int:
    """The width of a result's rows in memory: of 16 bytes, for the copy engine."""
    size = 16 // dtype.itemsize
    return -(-width // size) * size


def room(like: Tensor, padded: bool = False) -> Tensor:
    """Memory for a result, (batch, time, heads, width), aligned for the copy engine.

    Zeros where there is padding: tokens before a row's first are written by nobody.
    """
    make = like.new_zeros if padded else like.new_empty
    shape = like.shape
    width = shape[-1]
    wide = padded_width(width, like.dtype)
    return make(shape) if wide == width else make((*shape[:-1], wide))[..., :width]


@functools.lru_cache(maxsize=1024)
def _strides_fit(strides: tuple[tuple[int, ...], ...], itemsize: int) -> bool:
    """Whether the copy engine takes these strides: unit last, every other of 16 bytes."""
    size = 16 // itemsize
    return all(
        unit == 1 and all(stride > 0 and stride % size == 0 for stride in others)
        for *others, unit in strides
    )


def aligned(*tensors: Tensor) -> tuple[Tensor, ...]:
    """(batch, time, heads, width) each as the copy engine wants it, copied where it is not so."""
    pointers = 0
    for tensor in tensors:
        pointers |= tensor.data_ptr()
    itemsize = tensors[0].element_size()
    if pointers % 16 == 0 and _strides_fit(tuple(x.stride() for x in tensors), itemsize):
        return tensors
    if len(tensors) > 1:
        return tuple(aligned(x)[0] for x in tensors)
    (tensor,) = tensors
    *shape, width = tensor.shape
    copy = tensor.new_empty((*shape, padded_width(width, tensor.dtype)))
    copy[..., :width] = tensor
    return (copy[..., :width],)


def _allocate(size: int, _alignment: int, _stream: int | None) -> Tensor:
    """Scratch memory in which a launch's programs put their descriptors."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def on_its_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Runs a launcher where its first tensor lies, with scratch memory for its kernels."""

    @functools.wraps(function)
    def launch(first: Tensor, *arguments: Any) -> Any:
        if not first.is_cuda:
            return function(first, *arguments)
        _triton().set_allocator(_allocate)
        if first.get_device() == torch.cuda.current_device():
            return function(first, *arguments)
        with torch.cuda.device(first.device):
            return function(first, *arguments)

    return launch


def stream_of(tensor: Tensor) -> int | None:
    """The stream to launch on, None where the interpreter runs."""
    if not tensor.is_cuda:
        return None
    return _triton().runtime.driver.active.get_current_stream(tensor.get_device())


class Launch:
    """A kernel whose grid, numbers and constants are settled: a call hands over tensors alone.

    Triton finds the compiled kernel anew at every launch, from the type, value and alignment of
    each argument, which takes longer than most of these kernels run. Here it does so once. So an
    instance must see the same dtypes and alignments at every call.

    Args:
        kernel: with parameters in the order pointers, numbers, constants.
        grid: programs.
        numbers: strides and sizes, in the kernel's order.
        constants: compile-time parameters by name.
        options: `num_warps` and `num_stages`.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, int, int],
        numbers: tuple[float, ...],
        constants: dict[str, Any],
        **options: int,
    ) -> None:
        self.kernel, self.grid, self.numbers = kernel, grid, numbers
        self.constants, self.options = constants, options
        self.run: Callable[..., None] | None = None
        self.compiled: tuple[Any, ...] = ()
        self.scratch = 0  # bytes
        names = kernel.arg_names[-len(constants) :]
        self.rest = (*numbers, *(constants[name] for name in names))

    def __call__(self, stream: int | None, *tensors: Tensor) -> None:
        """Launch on a stream with these pointers."""
        if self.run is None:
            handle = self.kernel[self.grid](
                *tensors, *self.numbers, **self.constants, **self.options
            )
            if handle is not None:  # the interpreter compiles nothing
                self._keep(handle)
        elif self.scratch:
            scratch = _allocate(self.scratch, 0, stream)
            head, tail = self.compiled[:3], self.compiled[3:]
            self.run(*self.grid, stream, *head, scratch, *tail, *tensors, *self.rest)
        else:
            self.run(*self.grid, stream, *self.compiled, *tensors, *self.rest)

    def _keep(self, handle: Any) -> None:
        """The compiled kernel; where Triton is known, round its launcher written in Python."""
        launcher, hooks = handle.run, (handle.packed_metadata, None, None, None)
        if not known_triton() or launcher.profile_scratch_size:
            self.run, self.compiled = launcher, (handle.function, *hooks)
            return
        programs = self.grid[0] * self.grid[1] * self.grid[2] * launcher.num_ctas
        self.scratch = launcher.global_scratch_size * programs
        scratch = () if self.scratch else (None,)
        flags = launcher.launch_cooperative_grid, launcher.launch_pdl
        self.run = launcher.launch
        self.compiled = (handle.function, *flags, *scratch, None, *hooks)
