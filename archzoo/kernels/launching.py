"""What kernels need from the host: whether they run, memory as they want it, a ready launch.

Triton is imported at the first launch.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

TRITON_FOUND = importlib.util.find_spec("triton") is not None
_RUN_WITH = ("3.6.",)  # Tritons whose inner parts are known


def interpreting() -> bool:
    """Whether Triton's kernels run on the CPU through its interpreter, as in tests."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def run_beside(x: Tensor) -> bool:
    """Whether kernels run where x lies."""
    if not TRITON_FOUND:
        return False
    if x.is_cuda:
        return torch.version.hip is None  # never run there
    return x.device.type == "cpu" and interpreting()


@functools.lru_cache(maxsize=1)
def _triton() -> Any:
    import triton

    return triton


@functools.lru_cache(maxsize=1)
def known_triton() -> bool:
    """Whether this Triton is one whose inner parts are known."""
    return str(_triton().__version__).startswith(_RUN_WITH)


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
def strides_fit(strides: tuple[tuple[int, ...], ...], itemsize: int) -> bool:
    """Whether the copy engine takes these strides: unit last, every other of 16 bytes."""
    size = 16 // itemsize
    return all(
        unit == 1 and all(stride > 0 and stride % size == 0 for stride in others)
        for *others, unit in strides
    )


def aligned(tensor: Tensor) -> Tensor:
    """(batch, time, heads, width) as the copy engine wants it, copied where it is not so."""
    if tensor.data_ptr() % 16 == 0 and strides_fit((tensor.stride(),), tensor.element_size()):
        return tensor
    *shape, width = tensor.shape
    copy = tensor.new_empty((*shape, padded_width(width, tensor.dtype)))
    copy[..., :width] = tensor
    return copy[..., :width]


def _allocate(size: int, _alignment: int, _stream: int | None) -> Tensor:
    """Scratch memory in which a launch's programs put their descriptors."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def on_its_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Runs a launcher where its first tensor lies."""

    @functools.wraps(function)
    def launch(first: Tensor, *arguments: Any) -> Any:
        if not first.is_cuda or first.get_device() == torch.cuda.current_device():
            return function(first, *arguments)
        with torch.cuda.device(first.device):
            return function(first, *arguments)

    return launch


@functools.lru_cache(maxsize=1)
def _find_stream() -> Any:
    return _triton().runtime.driver.active.get_current_stream


def stream_of(tensor: Tensor) -> int | None:
    """The stream to launch on, None where the interpreter runs."""
    if not tensor.is_cuda:
        return None
    stream: int = _find_stream()(tensor.get_device())
    return stream


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
        options: how Triton compiles it, `num_warps` and the like.
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
        self.launcher: Callable[..., None] | None = None
        self.compiled: tuple[Any, ...] = ()
        self.hooks: tuple[Any, ...] = ()
        self.scratch = 0  # numbers of the first tensor's dtype
        names = kernel.arg_names[-len(constants) :]
        self.rest = (*numbers, *(constants[name] for name in names))

    def __call__(self, stream: int | None, *tensors: Tensor | None) -> None:
        """Launch on a stream with these pointers; None for what the kernel never reads."""
        if self.run is None:
            self._by_triton(stream, *tensors)
            return
        scratch = None
        if self.scratch:
            # Like the first tensor, the cheapest way to name a device and a dtype.
            scratch = tensors[0].new_empty(self.scratch)  # type: ignore[union-attr]
        self.run(*self.grid, stream, *self.compiled, scratch, *self.hooks, *tensors, *self.rest)

    def _by_triton(self, stream: int | None, *tensors: Tensor | None) -> None:
        """The first launch, and every one where Triton's inner parts are not known."""
        first = tensors[0]
        assert first is not None
        # Triton compiles for what is given, so something has to stand in for what is absent.
        given = [first if tensor is None else tensor for tensor in tensors]
        if first.is_cuda:
            _triton().set_allocator(_allocate)  # of this thread
        if self.launcher is not None:
            self.launcher(*self.grid, stream, *self.compiled, *given, *self.rest)
            return
        handle = self.kernel[self.grid](*given, *self.numbers, **self.constants, **self.options)
        if handle is not None:  # the interpreter compiles nothing
            self._keep(handle, first.element_size())

    def _keep(self, handle: Any, itemsize: int) -> None:
        """The compiled kernel; where Triton is known, round its launcher written in Python."""
        launcher, hooks = handle.run, (handle.packed_metadata, None, None, None)
        if not known_triton() or launcher.profile_scratch_size:
            self.compiled = handle.function, *hooks
            self.launcher = launcher  # last: other threads launch by it once it is there
            return
        programs = self.grid[0] * self.grid[1] * self.grid[2] * launcher.num_ctas
        self.scratch = -(-launcher.global_scratch_size * programs // itemsize)
        flags = launcher.launch_cooperative_grid, launcher.launch_pdl
        self.compiled, self.hooks = (handle.function, *flags), (None, *hooks)
        self.run = launcher.launch  # last, as above
