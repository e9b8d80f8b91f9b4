"""Processes that compile beside each other, and then measure one at a time."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path


def wait_for_turn(place: str | Path, rank: int = 0) -> None:
    """Say that all is compiled, and return once this process is the one to measure.

    Args:
        place: A path of this run's: PLACE.RANK.ready is written, and PLACE.go waited for.
        rank: Of this process among those of the run.
    """
    Path(f"{place}.{rank}.ready").touch()
    while not Path(f"{place}.go").exists():
        time.sleep(0.02)


def wait_until_ready(place: str | Path, process: subprocess.Popen[bytes], ranks: int = 1) -> None:
    """Return once all ranks of a run wait for their turn, or its process has ended."""
    ready = [Path(f"{place}.{rank}.ready") for rank in range(ranks)]
    while process.poll() is None and not all(map(Path.exists, ready)):
        time.sleep(0.1)


def take_turn(place: str | Path, process: subprocess.Popen[bytes]) -> int:
    """Let a run measure until its process has ended; its status."""
    Path(f"{place}.go").touch()
    return process.wait()
