"""What reaches a GPU's driver when a kernel is launched: by Triton itself, and by the shorter way.

As a script (`python tests/kernel_driver.py`) it puts a library in the place of NVIDIA's driver that
writes down what it is asked to launch, and launches the kernels of some examples in both ways. Each
pointer, number, size and attribute has to be the same. It needs a C compiler, as Triton does.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch

LIBRARY = r"""
#define cuTensorMapEncodeTiled declared
#include <cuda.h>
#undef cuTensorMapEncodeTiled
#include <string.h>

static int sizes[256], count;
static unsigned char seen[4096];
static int length;

static void note(const void *from, int size) {
  memcpy(seen + length, from, size);
  length += size;
}
void expect(int n, const int *given) { count = n; memcpy(sizes, given, n * sizeof(int)); }
int take(unsigned char *to) { int n = length; memcpy(to, seen, n); length = 0; return n; }

CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **values, void **extra) {
  unsigned int config[8] = {c->gridDimX, c->gridDimY, c->gridDimZ, c->blockDimX, c->blockDimY,
                            c->blockDimZ, c->sharedMemBytes, c->numAttrs};
  note(config, sizeof(config));
  note(&c->hStream, sizeof(c->hStream));
  note(&f, sizeof(f));
  for (unsigned int i = 0; i < c->numAttrs; ++i) note(&c->attrs[i].id, sizeof(int));
  for (int i = 0; i < count; ++i) note(values[i], sizes[i]);
  return CUDA_SUCCESS;
}

static int some;
CUresult cuInit(unsigned int f) { return CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult e, const char **s) { *s = "?"; return CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *c) { *c = (CUcontext)&some; return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext c) { return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *d) { *d = 0; return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *v, CUlimit l) { *v = 0; return CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit l, size_t v) { return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *d, int i) { *d = i; return CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int *n) { *n = 1; return CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int *v, CUdevice_attribute a, CUdevice d) {
  *v = 232448;
  return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext *c, CUdevice d) { return cuCtxGetCurrent(c); }
CUresult cuDriverGetVersion(int *v) { *v = 13000; return CUDA_SUCCESS; }
CUresult cuFuncGetAttribute(int *v, CUfunction_attribute a, CUfunction f) {
  *v = 1024;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute a, int v) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction f, CUfunc_cache c) { return CUDA_SUCCESS; }
CUresult cuModuleLoadData(CUmodule *m, const void *d) { *m = (CUmodule)d; return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction *f, CUmodule m, const char *n) {
  *f = (CUfunction)m;
  return CUDA_SUCCESS;
}
CUresult cuModuleUnload(CUmodule m) { return CUDA_SUCCESS; }
CUresult cuOccupancyMaxActiveClusters(int *n, CUfunction f, const CUlaunchConfig *c) {
  *n = 1;
  return CUDA_SUCCESS;
}
CUresult cuStreamIsCapturing(CUstream s, CUstreamCaptureStatus *v) { *v = 0; return CUDA_SUCCESS; }
CUresult cuTensorMapEncodeTiled() { return CUDA_ERROR_UNKNOWN; } /* none of ours asks for it */
CUresult cuPointerGetAttribute(void *v, CUpointer_attribute a, CUdeviceptr p) {
  *(CUdeviceptr *)v = p;
  return CUDA_SUCCESS;
}
"""
HEAD = 8 * 4 + 2 * 8  # bytes: the configuration, the stream, the function
WIDTHS = {"i1": 1, "i8": 1, "i16": 2, "i32": 4, "i64": 8, "u32": 4, "u64": 8, "fp32": 4, "fp64": 8}


def build(directory: str) -> ctypes.CDLL:
    """The library, loaded under the driver's name, by which Triton finds it."""
    import triton

    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    library = Path(directory) / "libcuda.so.1"
    command = [os.environ.get("CC", "cc"), "-shared", "-fPIC", "-w", f"-I{include}", "-x", "c"]
    command += ["-Wl,-soname,libcuda.so.1", "-o", str(library), "-"]
    subprocess.run(command, input=LIBRARY, text=True, check=True)
    os.environ["TRITON_LIBCUDA_PATH"] = directory
    return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def driver() -> Any:
    """Triton's driver of NVIDIA, with what it would ask torch for."""
    from triton.backends.nvidia.driver import CudaDriver

    found = CudaDriver()
    found.get_current_device = lambda: 0
    found.set_current_device = lambda device: None
    found.get_current_stream = lambda device: 99
    found.get_device_capability = lambda device=0: (9, 0)
    return found


def main(names: list[str]) -> int:
    import kernel_examples

    from archzoo.kernels.launching import Launch

    with tempfile.TemporaryDirectory() as directory:
        library = build(directory)
        import triton

        triton.runtime.driver.set_active(driver())
        for module in kernel_examples.modules():
            importlib.import_module(module)  # before an interpreter is asked for
        triton.set_allocator(lambda size, _, __: torch.empty(size, dtype=torch.int8))
        buffer = (ctypes.c_ubyte * 4096)()

        def taken() -> bytes:
            return bytes(buffer[: library.take(buffer)])

        call, compile_, compared = Launch.__call__, Launch._compile, 0

        def twice(self: Any, stream: int | None, *tensors: Any) -> None:
            nonlocal compared
            given = self._standing_in(tensors)
            compiled = self.kernel.warmup(
                *given, *self.numbers, grid=self.grid, **self.constants, **self.options
            )
            types = [of for of in compiled.src.signature.values() if of != "constexpr"]
            widths = [8 if of[0] == "*" else WIDTHS[of] for of in types] + [8, 8]  # two scratches
            library.expect(len(widths), (ctypes.c_int * len(widths))(*widths))
            call(self, 99, *given)
            by_triton = taken()
            assert by_triton, self.kernel.fn.__name__
            assert self.run is not None, "no shorter way was found to launch"
            call(self, 99, *given)
            directly = taken()
            end = -16 if self.scratch else None  # where scratch memory lies is chance
            assert by_triton[:end] == directly[:end], self.kernel.fn.__name__
            if self.scratch:
                assert any(directly[-16:-8]) and by_triton[-8:] == directly[-8:] == bytes(8)
            call(self, 99, *tensors)  # what is absent as a null pointer
            absent = taken()
            assert len(absent) == len(directly) and absent[:HEAD] == directly[:HEAD]
            compared += 1

        with (
            kernel_examples.launches(lambda launch, tensors: None),
            mock.patch.object(Launch, "_compile", compile_),
            mock.patch.object(Launch, "__call__", twice),
        ):
            for name in names:
                kernel_examples.EXAMPLES[name]()
        print(f"triton {triton.__version__}: {compared} launches alike")
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1:]))
