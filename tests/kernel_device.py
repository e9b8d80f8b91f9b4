"""Where the kernels' tests run: on a GPU, or without one through Triton's interpreter.

`conftest` imports this before any test module: Triton decides when it is first imported whether it
will be interpreted, and torch's compiler imports it too.
"""

import importlib
import importlib.util
import os

import numpy as np
import pytest
import torch

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
INSTALLED = importlib.util.find_spec("triton") is not None


def _import_interpreted(module: str) -> None:
    """The variable goes again at once: other tests on the CPU shall not find kernels available."""
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        importlib.import_module(module)
    finally:
        del os.environ["TRITON_INTERPRET"]


def _watch_memory() -> None:
    """Let the interpreter refuse to read or write outside the memory of what a kernel is given.

    On a GPU such a read is rarely noticed: what lies behind a tensor is mostly another one.
    """
    from triton.runtime import interpreter

    given: list[tuple[int, int]] = []  # begin and end of each storage
    find = interpreter.GridExecutor._init_args_hst
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def find_noted(self, arguments, named):
        found = find(self, arguments, named)
        tensors = [x for x in (*found[0], *found[1].values()) if isinstance(x, torch.Tensor)]
        memory = [x.untyped_storage() for x in tensors]
        given[:] = {(part.data_ptr(), part.data_ptr() + part.nbytes()) for part in memory}
        return found

    def check(pointers, mask):
        asked = np.asarray(pointers.data)[np.asarray(mask.data, dtype=bool)]
        if not asked.size:
            return
        width = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
        low, high = int(asked.min()), int(asked.max()) + width
        if any(begin <= low and high <= end for begin, end in given):
            return
        for first in map(int, asked):  # of several tensors
            if not any(begin <= first and first + width <= end for begin, end in given):
                raise IndexError(f"{width} bytes at {first:x}, where no tensor is: {given}")

    def load_watched(self, pointers, mask, *rest, **named):
        check(pointers, mask)
        return load(self, pointers, mask, *rest, **named)

    def store_watched(self, pointers, value, mask, *rest, **named):
        check(pointers, mask)
        return store(self, pointers, value, mask, *rest, **named)

    interpreter.GridExecutor._init_args_hst = find_noted
    builder.create_masked_load, builder.create_masked_store = load_watched, store_watched


if INSTALLED and not GPU:
    _import_interpreted("triton.language")
    _watch_memory()


def define_kernels(module: str) -> None:
    """Import a module of kernels for `DEVICE`, or skip the tests of the file that asks."""
    if not INSTALLED:
        pytest.skip("triton is not installed", allow_module_level=True)
    if GPU:
        importlib.import_module(module)  # before a test asks for the interpreter
    else:
        _import_interpreted(module)
