"""Where the kernels' tests run: on a GPU, or without one through Triton's interpreter.

`conftest` imports this before any test module: Triton decides when it is first imported whether it
will be interpreted, and torch's compiler imports it too.
"""

import importlib
import importlib.util
import os

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


if INSTALLED and not GPU:
    _import_interpreted("triton.language")


def define_kernels(module: str) -> None:
    """Import a module of kernels for `DEVICE`, or skip the tests of the file that asks."""
    if not INSTALLED:
        pytest.skip("triton is not installed", allow_module_level=True)
    if GPU:
        importlib.import_module(module)  # before a test asks for the interpreter
    else:
        _import_interpreted(module)
