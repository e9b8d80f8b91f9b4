"""The C++ side of `archzoo.kernels.one_bit`: built at its first use, and kept on disk."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from archzoo.derivatives import followed

SOURCE = Path(__file__).with_name("product.cpp")
# By what torch says of the processor.
FLAGS = {
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma"],
    "AVX2": ["-mavx2", "-mfma"],
}


def library() -> Callable[..., None] | None:
    """The function of product.cpp, or None where it cannot be built, which is said once."""
    return None if followed() else _library()


@functools.lru_cache(maxsize=1)
def _library() -> Callable[..., None] | None:
    try:
        return _loaded()
    except Exception as error:  # a build can fail in any way; the plain form is right, too
        reason = str(error).strip().partition("\n")[0]
        warnings.warn(
            "1-bit products run in their plain form, which unpacks the weights for each call: "
            f"their C++ was not built ({type(error).__name__}: {reason}); it needs a C++ compiler "
            "and ninja, and ARCHZOO_KERNELS=off asks for the plain form",
            stacklevel=2,
        )
        return None


def _loaded() -> Callable[..., None]:
    capability = torch.backends.cpu.get_cpu_capability()
    flags = ["-O3", "-std=c++17", "-fopenmp", *FLAGS.get(capability, [])]
    parts = [SOURCE.read_text(encoding="utf-8"), torch.__version__, *flags]
    version = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
    place, name = Path(root) / f"archzoo_one_bit_{version}", "archzoo_one_bit"
    built = place / f"{name}.so"
    if not built.exists():
        from torch.utils import cpp_extension  # takes a while to import

        place.mkdir(parents=True, exist_ok=True)
        # Another process may look for the file meanwhile: it is there when it is whole.
        with tempfile.TemporaryDirectory(dir=place) as apart:
            cpp_extension.load(
                name,
                [str(SOURCE)],
                extra_cflags=flags,
                # OpenMP is torch's own, the one whose threads torch's operations run on.
                extra_ldflags=["-Wl,--no-as-needed"],
                build_directory=apart,
                is_python_module=False,
            )
            Path(apart, built.name).replace(built)
    compute: Callable[..., None] = ctypes.CDLL(str(built)).archzoo_one_bit
    compute.argtypes = [*[ctypes.c_void_p] * 5, *[ctypes.c_int64] * 6]  # type: ignore[attr-defined]
    compute.restype = None  # type: ignore[attr-defined]
    return compute
