"""What the kernels of a mixture, `experts` and `routers`, need of the host.

Triton is imported at the first launch.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from archzoo.derivatives import followed
from archzoo.kernels.launching import Launch, run_beside, stream_of

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_WIDTH = 8192  # of a row, which one program holds


def fused(x: Tensor, width: int = 1) -> bool:
    """Whether the kernels run on tensors such as x, with rows of `width`."""
    if x.dtype not in _DTYPES or width > MAX_WIDTH or not x.numel():
        return False
    return not followed() and run_beside(x)


def on_hopper(x: Tensor) -> bool:
    """Whether x lies on the kind of GPU that our products were written for."""
    return torch.cuda.get_device_capability(x.device) == (9, 0)


def power_of_2(n: int) -> int:
    """The least power of two that holds n."""
    return 1 << (n - 1).bit_length()


def warps_for(block: int) -> int:
    """So that a thread holds 8 numbers: 16 bytes of bfloat16 are one load."""
    return min(max(block // 256, 1), 16)


@functools.lru_cache(maxsize=2048)
def _ready(
    module: str,
    kernel: str,
    grid: tuple[int, ...],
    numbers: tuple[float, ...],
    constants: tuple[tuple[str, Any], ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
) -> Launch:
    """A launch of a kernel, kept: of all that it depends on but where its tensors lie."""
    kernels = importlib.import_module(module)
    named = dict(constants)
    warps = named.pop("num_warps")
    columns, rows = (*grid, 1)[:2]
    return Launch(getattr(kernels, kernel), (columns, rows, 1), numbers, named, num_warps=warps)


def launch(
    module: str,
    kernel: str,
    grid: tuple[int, ...],
    tensors: tuple[Tensor, ...],
    *numbers: float,
    **options: Any,
) -> None:
    """Run the kernel of this name, in that module, where its first tensor lies.

    `grid` counts its programs; its parameters are tensors, numbers, and constants by name. Triton
    takes longer to find the compiled kernel than most of these run, so each is looked for once
    (`Launch`); a tensor that does not start at 16 bytes, as torch's own all do, goes the long way.
    """
    first = tensors[0]
    ready = _ready(
        module, kernel, grid, numbers, tuple(options.items()), tuple([x.dtype for x in tensors]),
        first.device,
    )  # fmt: skip
    if not first.is_cuda:
        ready(None, *tensors)
        return
    places = 0
    for tensor in tensors:
        places |= tensor.data_ptr()
    if first.get_device() != torch.cuda.current_device():
        with torch.cuda.device(first.device):
            _run(ready, places % 16 == 0, tensors)
    else:
        _run(ready, places % 16 == 0, tensors)


def _run(ready: Launch, aligned: bool, tensors: tuple[Tensor, ...]) -> None:
    if aligned:
        ready(stream_of(tensors[0]), *tensors)
    else:
        ready.kernel[ready.grid](*tensors, *ready.numbers, **ready.constants, **ready.options)
