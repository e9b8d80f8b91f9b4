"""How every kernel is launched: whether it runs, memory as it wants it, a launch kept ready.

Triton is imported at the first launch.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from archzoo.derivatives import exporting, transformed

TRITON_FOUND = importlib.util.find_spec("triton") is not None
SWITCH = "ARCHZOO_KERNELS"  # in the environment: "off" is for where Triton or the GPU fails
SWITCHED_OFF = os.environ.get(SWITCH, "on").lower() in ("off", "0", "false")
MAX_WIDTH = 8192  # of a row, which one program holds
_FUSED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_OPTIONS = ("num_warps", "num_stages", "launch_pdl")  # how a kernel is compiled and launched


def interpreting() -> bool:
    """Whether Triton's kernels run on the CPU through its interpreter, as in tests."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def run_beside(x: Tensor) -> bool:
    """Whether kernels run where x lies."""
    if not TRITON_FOUND or SWITCHED_OFF:
        return False
    if x.is_cuda:
        return torch.version.hip is None  # never run there
    return x.device.type == "cpu" and interpreting()


def fused(x: Tensor, width: int = 1) -> bool:
    """Whether the kernels of a mixture run on tensors such as x, with rows of `width`.

    Under a compiler they are operators (`archzoo.kernels.operators`); what is exported has none.
    """
    if x.dtype not in _FUSED_DTYPES or width > MAX_WIDTH or not x.numel():
        return False
    return not (transformed() or exporting()) and run_beside(x)


def on_hopper(x: Tensor) -> bool:
    """Whether x lies on the kind of GPU that our products were written for."""
    if not x.is_cuda:
        return False
    properties = torch.cuda.get_device_properties(x.device)  # which compilers know to be constant
    return (properties.major, properties.minor) == (9, 0)


@functools.lru_cache(maxsize=1)
def _triton() -> Any:
    import triton

    return triton


def describe(error: Exception) -> str:
    """The Triton that is installed, and the first line of what it raised."""
    first = next(iter(str(error).strip().splitlines()), "")
    return f"Triton {_triton().__version__}: {type(error).__name__} {first}".rstrip()


def power_of_2(n: int) -> int:
    """The least power of two that holds n."""
    return 1 << (n - 1).bit_length()


def warps_for(block: int) -> int:
    """So that a thread holds 8 numbers: 16 bytes of bfloat16 are one load."""
    return min(max(block // 256, 1), 16)


def padded_width(width: int, dtype: torch.dtype) -> int:
    """The width of a result's rows in memory: a multiple of 16 bytes, for TMA."""
    size = 16 // dtype.itemsize
    return -(-width // size) * size


def result_like(like: Tensor, padded: bool = False) -> Tensor:
    """Memory for a result, (batch, time, heads, width), aligned for TMA.

    Zeros where there is padding: tokens before a row's first are written by nobody.
    """
    make = like.new_zeros if padded else like.new_empty
    shape = like.shape
    width = shape[-1]
    wide = padded_width(width, like.dtype)
    return make(shape) if wide == width else make((*shape[:-1], wide))[..., :width]


@functools.lru_cache(maxsize=1024)
def strides_fit(strides: tuple[tuple[int, ...], ...], itemsize: int) -> bool:
    """Whether TMA takes these strides: unit last, every other a multiple of 16 bytes."""
    size = 16 // itemsize
    return all(
        unit == 1 and all(stride > 0 and stride % size == 0 for stride in others)
        for *others, unit in strides
    )


def aligned(tensor: Tensor) -> Tensor:
    """(batch, time, heads, width) as TMA takes it, copied where it is not so."""
    if tensor.data_ptr() % 16 == 0 and strides_fit((tensor.stride(),), tensor.element_size()):
        return tensor
    return result_like(tensor).copy_(tensor)


def _allocate(size: int, _alignment: int, _stream: int | None) -> Tensor:
    """Scratch memory in which a launch's programs put their descriptors."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def on_its_device(method: Callable[..., Any]) -> Callable[..., Any]:
    """Runs a method that is given tensors where the first of them lies."""

    @functools.wraps(method)
    def run(self: Any, tensors: Any, *arguments: Any) -> Any:
        first = tensors[0]
        if not first.is_cuda or first.get_device() == torch._C._cuda_getDevice():
            return method(self, tensors, *arguments)
        with torch.cuda.device(first.device):
            return method(self, tensors, *arguments)

    return run


@functools.lru_cache(maxsize=1)
def _find_stream() -> Any:
    return _triton().runtime.driver.active.get_current_stream


def stream_of(tensor: Tensor) -> int | None:
    """The stream to launch on, None where the interpreter runs."""
    if not tensor.is_cuda:
        return None
    stream: int = _find_stream()(tensor.get_device())
    return stream


_shortcuts = True  # whether launches are kept; not after one has failed


def _give_up_shortcuts(error: Exception) -> None:
    """Every launch goes through Triton from now on, which is said once."""
    global _shortcuts
    if _shortcuts:
        _shortcuts = False
        warnings.warn(
            f"kernels are launched by Triton's own Python code, some 20 us each, because a shorter "
            f"way does not work here ({describe(error)}); small models and decoding are slower",
            stacklevel=3,
        )


def _find_shortcut(launcher: Any, hooks: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """How Triton's launcher calls its own function written in C; None where that does not show.

    Args:
        launcher: Triton's, of a compiled kernel.
        hooks: What it is given after the kernel's handle: metadata, and no hooks.

    Returns:
        The arguments before and after the scratch memory, and whether the kernel's own come as one.
    """
    if launcher.profile_scratch_size or getattr(launcher, "gsan_enabled", False):
        return None
    flags = launcher.launch_cooperative_grid, launcher.launch_pdl
    if hasattr(launcher, "kernel_signature"):  # one function for all kernels
        return (*flags, *hooks), (None, launcher.arg_annotations, launcher.kernel_signature), True
    if getattr(launcher.launch, "__module__", None) == "__triton_launcher":  # one for each
        return flags, (None, *hooks), False
    return None


class Launch:
    """A kernel whose grid, numbers and constants are settled: a call hands over tensors alone.

    Triton finds the compiled kernel anew at every launch, from the type, value and alignment of
    each argument, which takes longer than most of these kernels run. Here it does so once, where
    its inner parts have a known shape. So an instance must see the same dtypes and alignments at
    every call.

    Args:
        kernel: with parameters in the order pointers, numbers, constants.
        grid: programs.
        numbers: strides and sizes, in the kernel's order.
        constants: compile-time parameters by name.
        options: how Triton compiles it, `num_warps` and the like.
    """

    def __init__(
        self, kernel: Any, grid: Any, numbers: Any, constants: dict[str, Any], **options: int
    ) -> None:
        self.kernel, self.grid, self.numbers = kernel, grid, numbers
        self.constants, self.options = constants, options
        self.run: Callable[..., None] | None = None  # Triton's function in C
        self.launcher: Callable[..., None] | None = None  # or what calls it, in Python
        self.before: tuple[Any, ...] = ()  # the scratch memory
        self.after: tuple[Any, ...] = ()
        self.packed = False  # the kernel's own arguments come as one
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
        before, after = self.before, self.after
        try:
            if self.packed:
                arguments = *tensors, *self.rest
                self.run(*self.grid, stream, *before, scratch, *after, arguments)
            else:
                self.run(*self.grid, stream, *before, scratch, *after, *tensors, *self.rest)
        except Exception as error:
            self._fall_back(error, tensors)

    def _by_triton(self, stream: int | None, *tensors: Tensor | None) -> None:
        """The first launch, and every one where Triton's inner parts are not known."""
        if self.launcher is None:
            handle = self._through(tensors)
            if handle is not None and _shortcuts:  # the interpreter compiles nothing
                self._keep(handle, tensors[0].element_size())  # type: ignore[union-attr]
            return
        try:
            given = self._standing_in(tensors)
            self.launcher(*self.grid, stream, *self.before, *given, *self.rest)
        except Exception as error:
            self._fall_back(error, tensors)

    def _fall_back(self, error: Exception, tensors: tuple[Tensor | None, ...]) -> None:
        """The launch that failed, as Triton's users write it, and so from now on."""
        self.run = self.launcher = None
        self._through(tensors)  # raises what is wrong with more than the way to launch
        _give_up_shortcuts(error)

    def _standing_in(self, tensors: Sequence[Tensor | None]) -> list[Tensor]:
        """Triton compiles for what is given, so something has to stand in for what is absent."""
        first = tensors[0]
        assert first is not None
        if first.is_cuda:
            _triton().set_allocator(_allocate)  # of this thread
        return [first if tensor is None else tensor for tensor in tensors]

    def _through(self, tensors: Sequence[Tensor | None]) -> Any:
        try:
            return self._compile(self._standing_in(tensors))
        except Exception as error:
            error.add_note(
                f"This was the launch of {self.kernel.fn.__name__} ({describe(error)}): "
                f"{SWITCH}=off in the environment computes without kernels, several times slower."
            )
            raise

    def _compile(self, tensors: Sequence[Tensor | None]) -> Any:
        """A launch through Triton, which finds, or compiles, the kernel for these tensors."""
        return self.kernel[self.grid](*tensors, *self.numbers, **self.constants, **self.options)

    def _keep(self, handle: Any, itemsize: int) -> None:
        """The compiled kernel, and what its launcher written in Python would call."""
        try:
            launcher, hooks = handle.run, (handle.packed_metadata, None, None, None)
            found = _find_shortcut(launcher, hooks)
            if found is None:
                self.before = handle.function, *hooks
                self.launcher = launcher  # last: other threads launch by it once it is there
                return
            programs = self.grid[0] * self.grid[1] * self.grid[2] * launcher.num_ctas
            self.scratch = -(-launcher.global_scratch_size * programs // itemsize)
            before, self.after, self.packed = found
            self.before = handle.function, *before
            self.run = launcher.launch  # last, as above
        except Exception as error:  # the kernel was launched
            _give_up_shortcuts(error)

    @on_its_device
    def run_on(self, tensors: tuple[Tensor | None, ...], aligned: bool = True) -> None:
        """Launch where the first tensor lies; `aligned`: as ever, else through Triton."""
        if aligned:
            self(stream_of(tensors[0]), *tensors)  # type: ignore[arg-type]
        else:
            self._through(tensors)


@functools.lru_cache(maxsize=2048)
def _find_launch(
    module: str, kernel: str, grid: Any, numbers: Any, constants: Any, *_dtypes_and_device: Any
) -> Launch:
    """A launch of a kernel, kept: of all that it depends on but where its tensors lie."""
    named = dict(constants)
    options = {name: named.pop(name) for name in _OPTIONS if name in named}
    found = getattr(importlib.import_module(module), kernel)
    return Launch(found, (*grid, 1, 1)[:3], numbers, named, **options)


def with_unit_stride(x: Tensor) -> Tensor:
    """X as kernels read it that know the strides of all its axes but the last: else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def check_dense(**tensors: Tensor | None) -> None:
    """Refuse what a kernel writes in place, or reads at every step, and lies apart in memory.

    Args:
        **tensors: By their names.

    Raises:
        ValueError: One is not contiguous; a copy of it would not be written, or be made each time.
    """
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(
                f"{name} of strides {tensor.stride()} must be contiguous: make it so once, by "
                f"{name} = {name}.contiguous()"
            )


def launch(
    module: str,
    kernel: str,
    grid: tuple[int, ...],
    tensors: tuple[Tensor, ...],
    *numbers: float,
    kept: Any = (),
    **options: Any,
) -> None:
    """Run the kernel of this name, in that module, where its first tensor lies.

    It is looked for once (`Launch`). Tensors that do not start at a multiple of 16 bytes, as those
    of torch do, go through Triton every time.

    Args:
        module: Where the kernel is defined.
        kernel: Its name.
        grid: Programs, along one axis or two.
        tensors: Its first parameters.
        *numbers: Those that follow.
        kept: Options as pairs, by a caller who makes them once.
        **options: Its constants by name, `num_warps`, and where it needs them `num_stages` and
            `launch_pdl`.
    """
    of_tensors = *[x.dtype for x in tensors], tensors[0].device
    found = _find_launch(module, kernel, grid, numbers, (*kept, *options.items()), *of_tensors)
    addresses = 0
    for tensor in tensors:
        addresses |= tensor.data_ptr()
    found.run_on(tensors, addresses % 16 == 0)
