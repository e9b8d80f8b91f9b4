"""The kernels' modules without Triton, and without a GPU."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
import torch

from archzoo.kernels.retention import available, unavailable


@pytest.mark.parametrize("module", ["retention", "experts", "digits"])
def test_import_leaves_triton_alone(module):
    code = f"import sys, archzoo.kernels.{module}; sys.exit('triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_reason_on_the_cpu():
    q = torch.zeros(1, 4, 1, 16)
    reason = unavailable(q, q, q)
    if importlib.util.find_spec("triton") is None:
        assert reason == "triton is not installed"
    else:
        assert reason is not None
        assert "CUDA" in reason
    assert not available(q, q, q)
