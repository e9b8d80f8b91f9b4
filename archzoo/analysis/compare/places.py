"""Where runs are trained: GPUs, one by one, and the processor, whose threads they share."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch

from archzoo.trust import machine_memory


class Slot(NamedTuple):
    """Where one run at a time is trained.

    Attributes:
        name: cpu or gpu, and which.
        environment: Variables of the process.
    """

    name: str
    environment: dict[str, str]


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def gpus(accelerator: Any = "auto") -> list[str]:
    """The GPUs that a setting of the trainer's leads to, as CUDA_VISIBLE_DEVICES names them."""
    if accelerator not in ("auto", "gpu", "cuda") or not torch.cuda.is_available():
        return []
    named = [entry.strip() for entry in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    count = torch.cuda.device_count()
    return named[:count] if any(named) else [str(number) for number in range(count)]


def memory_of(accelerator: Any) -> tuple[int, str]:
    """Bytes of memory of what a run is trained on, and what that is called."""
    if gpus(accelerator):
        properties = torch.cuda.get_device_properties(0)
        return int(properties.total_memory), properties.name
    return machine_memory(), "this machine"


def slots(accelerator: Any, at_once: int) -> list[Slot]:
    """Where runs are trained: `at_once` on every GPU, or on the processor, which shares threads.

    Args:
        accelerator: The trainer's setting.
        at_once: Runs that share a device.
    """
    found = gpus(accelerator)
    places = found or [""]
    threads = str(max(cores() // (at_once * len(places)), 1))
    # A number that the user has set says how many threads each run takes.
    environment = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or threads}
    return [
        Slot(
            f"gpu {place}" if place else "cpu",
            environment | ({"CUDA_VISIBLE_DEVICES": place} if place else {}),
        )
        for _ in range(at_once)
        for place in places
    ]
