"""Where the kernels' tests run: on a GPU, or without one through Triton's interpreter."""

import importlib
import importlib.util
import os

import pytest
import torch

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"


def define_kernels(module: str) -> None:
    """Import a module of kernels for `DEVICE`, or skip the tests of the file that asks."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed", allow_module_level=True)
    if GPU:
        return
    # Triton decides when a kernel is defined whether it will be interpreted. The variable goes
    # again at once: other tests on the CPU shall not find the kernels available.
    os.environ["TRITON_INTERPRET"] = "1"
    importlib.import_module(module)
    del os.environ["TRITON_INTERPRET"]
    language = importlib.import_module("triton.language")
    if type(language.zeros).__name__ != "InterpretedFunction":
        pytest.skip("triton was imported before, for a GPU", allow_module_level=True)
