"""Timing sides in turn, and writing down what was measured."""

from __future__ import annotations

import csv
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
# What a row depends on.
MEASURED = ("archzoo", "benchmarks", "configs", "data", "train.py")


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


def machine() -> str:
    """The processor's name, as the operating system has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def commit() -> str:
    """The commit measured, with a + where the tree held more that a measurement depends on.

    ARCHZOO_COMMIT names it where a benchmark runs in a copy without the repository.
    """
    if named := os.environ.get("ARCHZOO_COMMIT"):
        return named
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    dirty = subprocess.run(
        [*git, "status", "--porcelain", "--", *MEASURED], capture_output=True, text=True
    )
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


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
    name = torch.cuda.get_device_name() if on_gpu else machine()
    facts = {
        "machine": name,
        "torch": torch.__version__,
        "commit": commit(),
        "command": "python " + " ".join(sys.argv),
    }
    rows = [row | facts for row in rows]
    short = re.sub(r"[^a-z0-9]+", "-", name.partition(",")[0].lower()).strip("-")
    version = torch.__version__.partition("+")[0]
    path = ROOT / "results" / f"{short}-torch{version}-{what}.csv"
    path.parent.mkdir(exist_ok=True)
    if replacing and path.exists():
        with path.open(newline="") as file:
            before: list[dict[str, Any]] = list(csv.DictReader(file))
        new = {tuple(str(row[column]) for column in replacing) for row in rows}
        kept = [row for row in before if tuple(row[column] for column in replacing) not in new]
        rows = kept + rows
    columns = dict.fromkeys(column for row in rows for column in row if column not in facts)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=[*columns, *facts], restval="")
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {path.relative_to(ROOT)}")
    return path
