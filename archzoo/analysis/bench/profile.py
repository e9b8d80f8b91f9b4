"""Where a training step's time goes: kernels of a GPU by what they are for."""

from __future__ import annotations

import re
from typing import Any

#: What a kernel is for, by what its name holds; the first that fits. Names of generated kernels
#: list all that was fused, so that what is looked for first is what takes the time.
PARTS = {
    "attention": r"flash|fmha|sdpa|attention",
    "matrix products": r"nvjet|gemm|cutlass|wgmma|xmma|cublas|splitK|mm_",
    "retention": r"stream_kernel|retention|chunk_",
    "experts and router": r"expert|router|permut|scatter_rows|grouped",
    "loss": r"cross_entropy|softmax|nll",
    "optimizer": r"multi_tensor_apply|adam",
    "rotation": r"rotat",
    "head norm and gate": r"gate_",
    "norms": r"norm",
    "SwiGLU": r"silu|swiglu|gelu",
    "embedding": r"embedding|index_put|indexing_backward",
    "copies, casts and zeros": r"memcpy|memset|copy|fill|zero|_to_copy|cat_",
}
OTHER = "all else"
KEY = ("contender", "settings", "length", "batch", "dtype", "kernel", "machine", "torch", "triton")


def part_of(kernel: str) -> str:
    """What a kernel is for, by its name."""
    found = (part for part, words in PARTS.items() if re.search(words, kernel, re.IGNORECASE))
    return next(found, OTHER)


def kernels_of(profiler: Any, steps: int) -> list[dict[str, Any]]:
    """Kernels by the time that they take in a step, the longest first.

    Args:
        profiler: A `torch.profiler.profile` that has ended.
        steps: That it has seen.

    Returns:
        kernel: Its name; calls, and ms: in a step.
    """
    found: dict[str, list[float]] = {}
    for event in profiler.events():
        annotated = getattr(event, "is_user_annotation", False)  # a span around kernels
        if "CUDA" in str(event.device_type) and not annotated:
            entry = found.setdefault(event.name, [0.0, 0.0])
            entry[0] += event.time_range.elapsed_us()
            entry[1] += 1
    return [
        {"kernel": name[:200], "calls": calls / steps, "ms": round(us / steps / 1e3, 4)}
        for name, (us, calls) in sorted(found.items(), key=lambda entry: -entry[1][0])
    ]


def profile_rows(row: dict[str, Any], kernels: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of a profile: what names the measurement, the step's own time, and each kernel."""
    named = {name: row[name] for name in ("contender", "settings", "length", "batch", "dtype")}
    step = {"step_ms": round(1e3 * float(row["seconds"]), 3)}
    return [named | step | {"part": part_of(one["kernel"])} | one for one in kernels]
