"""Memory: what a process has taken at most, and how much there is."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

import torch

from archzoo.trust import machine_memory

STATUS = Path("/proc/self/status")


def free_memory(device: str | torch.device) -> int:
    """Bytes that a process can still take on a device: a GPU's in all, of a CPU what is free."""
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    found = [machine_memory()]
    with suppress(OSError, ValueError, StopIteration):  # Linux has it
        lines = Path("/proc/meminfo").read_text().splitlines()
        line = next(line for line in lines if line.startswith("MemAvailable"))
        found.append(1024 * int(line.split()[1]))
    return min(found)


def resident_peak() -> int:
    """The most bytes of memory that this process has held at once."""
    with suppress(OSError, ValueError, StopIteration):
        return _status("VmHWM")
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def begin_peak() -> int:
    """Bytes that this process holds now, from which a later `resident_peak` has grown.

    What it held before, while it imported, is forgotten where the system can do that.
    """
    with suppress(OSError, ValueError, StopIteration):
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    return resident_peak()


def grown(baseline: int) -> int:
    """Bytes of `resident_peak` beyond `begin_peak`'s; 0 where the system's counts say fewer.

    Linux counts pages a thread at a time, so that a peak may be some pages below what it follows.
    """
    return max(resident_peak() - baseline, 0)


def limit(bytes_more: int) -> None:
    """Let an allocation beyond this fail, where it would else end this or another process."""
    with suppress(ImportError, OSError, ValueError, StopIteration):
        import resource

        bound = _status("VmData") + bytes_more
        resource.setrlimit(resource.RLIMIT_DATA, (bound, resource.RLIM_INFINITY))


def _status(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])
