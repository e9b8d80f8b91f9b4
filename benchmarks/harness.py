"""Timing sides in turn, and writing down what was measured."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from archzoo.analysis import evidence
from archzoo.analysis.evidence import commit, machine

__all__ = ["ROOT", "commit", "in_turn", "machine", "ratio_row", "write_rows"]

ROOT = Path(__file__).resolve().parent.parent


def in_turn(
    sides: dict[str, Callable[[], Any]], rounds: int, warmup: int = 1, repeat: int = 1
) -> dict[str, float]:
    """Median wall milliseconds of each side; every round runs each side `repeat` times, in order.

    Taken in turn, both sides see whatever else the machine is doing, so ratios hold where
    absolute times do not. Short calls are repeated within a turn: a step of decoding follows a
    step of the same model, whose weights it finds in the processor's cache.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(warmup + rounds):
        for name, run in sides.items():
            begin = time.perf_counter()
            for _ in range(repeat):
                run()
            if number >= warmup:
                times[name].append((time.perf_counter() - begin) * 1e3 / repeat)
    return {name: statistics.median(taken) for name, taken in times.items()}


def ratio_row(
    what: str, ours: tuple[str, float], peer: tuple[str, float], required: float, aimed: float
) -> dict[str, Any]:
    """One comparison: the ratio is how many times faster ours is."""
    ratio = peer[1] / ours[1]
    row = {
        "what": what,
        "ours": ours[0],
        "ours_ms": round(ours[1], 4),
        "peer": peer[0],
        "peer_ms": round(peer[1], 4),
        "ratio": round(ratio, 3),
        "required": required,
        "aimed": aimed,
    }
    verdict = "aim met" if ratio >= aimed else "required met" if ratio >= required else "MISSED"
    print(
        f"{what:34s} {ours[0]:24s}{ours[1]:10.3f} ms   {peer[0]:24s}{peer[1]:10.3f} ms   "
        f"{ratio:6.2f} x (required {required}, aimed {aimed}): {verdict}",
        flush=True,
    )
    return row


def write_rows(
    what: str,
    rows: Iterable[dict[str, Any]],
    *,
    on_gpu: bool = False,
    replacing: tuple[str, ...] = (),
) -> Path:
    """Write results/MACHINE-TORCH-WHAT.csv, each row with machine, versions, commit and command.

    Args:
        what: The dtype and what was measured, such as "float32-decoding".
        rows: One a line; what a row lacks is left empty.
        on_gpu: The machine is the GPU, else the processor.
        replacing: Columns that name a row: rows of the file that differ in them stay. (): the
            file is written anew.

    Returns:
        The file.
    """
    device = "cuda" if on_gpu else "cpu"
    name = machine(device).partition(",")[0].lower()
    short = re.sub(r"[^a-z0-9]+", "-", name).strip("-")
    version = torch.__version__.partition("+")[0]
    path = ROOT / "results" / f"{short}-torch{version}-{what}.csv"
    evidence.write_rows(path, rows, replacing, device=device)
    print(f"wrote {path.relative_to(ROOT)}")
    return path
