"""What was measured, written down with all that it depends on.

Every row of a table of measurements holds the machine, the versions of what computes, the commit
and the command, so that a number can be measured again and is not compared with one that was
measured on something else.
"""

from __future__ import annotations

import csv
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from archzoo._version import __version__
from archzoo.locking import alone

ROOT = Path(__file__).resolve().parents[2]
# What a measurement depends on.
MEASURED = ("archzoo", "benchmarks", "configs", "data", "train.py")
FACTS = ("machine", "torch", "triton", "cuda", "commit", "command")


def machine(device: str | torch.device = "cpu") -> str:
    """The name of what computes: a GPU's, or the processor's with the threads it computes on."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """The versions of torch, Triton and CUDA; of what there is none, an empty text."""
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = ""
    return {"torch": torch.__version__, "triton": triton, "cuda": torch.version.cuda or ""}


def commit() -> str:
    """The commit measured, with a + where the tree held more that a measurement depends on.

    ARCHZOO_COMMIT names it in a copy without the repository. An installed package says its
    version.
    """
    if named := os.environ.get("ARCHZOO_COMMIT"):
        return named
    if not (ROOT / ".git").exists():  # else git would answer for a repository around it
        return f"archzoo {__version__}"
    try:
        head = _git("rev-parse", "--short", "HEAD")
        changed = _git("status", "--porcelain", "--", *MEASURED)
    except OSError:  # no git
        return f"archzoo {__version__}"
    return head + ("+" if changed else "")


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def command_line() -> str:
    """The command that is running, as it is typed: `archzoo bench retnet_tiny`."""
    program, *arguments = sys.argv
    path = Path(program)
    if path.name in ("archzoo", "archzoo.exe") or path.parts[-2:] == ("archzoo", "__main__.py"):
        return shlex.join(["archzoo", *arguments])
    return shlex.join(["python", program, *arguments])


def facts(device: str | torch.device = "cpu") -> dict[str, str]:
    """What every row holds, by its column (`FACTS`)."""
    where = {"machine": machine(device), **versions()}
    return where | {"commit": commit(), "command": command_line()}


def read_rows(path: str | os.PathLike[str]) -> list[dict[str, str]]:
    """The rows of a table; none where there is no such file."""
    if not Path(path).exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def write_rows(
    path: str | os.PathLike[str],
    rows: Iterable[dict[str, Any]],
    key: tuple[str, ...] = (),
    *,
    device: str | torch.device = "cpu",
) -> Path:
    """Write rows into a CSV file, whole or not at all.

    Args:
        path: The file, whose directories are made.
        rows: What a row lacks of `FACTS` is added; of the other columns it is left empty.
        key: Columns that name a row. Rows of the file with the same values there are replaced, all
            others stay. (): the file is written anew.
        device: What the rows were measured on.

    Returns:
        The file.

    Raises:
        ValueError: A row lacks a column of the key.
        OSError: The file could not be written; the one there was is as before.
    """
    path = Path(path)
    added = facts(device)
    complete = [{**added, **row} for row in rows]
    for row in complete:
        if missing := [column for column in key if column not in row]:
            raise ValueError(f"a row for {path} lacks {', '.join(missing)}, which name it: {row}")

    def name_of(row: dict[str, Any]) -> tuple[str, ...]:
        return tuple(_text(row.get(column)) for column in key)

    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with alone(path.parent):  # another process may add rows at the same time
            if key:
                unique = {name_of(row): row for row in complete}
                kept = [row for row in read_rows(path) if name_of(row) not in unique]
                complete = [*kept, *unique.values()]
            columns = dict.fromkeys(c for row in complete for c in row if c not in FACTS)
            with open(partial, "w", newline="") as file:
                writer = csv.DictWriter(file, [*columns, *FACTS], restval="")
                writer.writeheader()
                writer.writerows(complete)
            os.replace(partial, path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise OSError(f"{path} could not be written: {error.strerror}") from None
    return path


def _text(value: Any) -> str:
    """As it stands in the file."""
    return "" if value is None else str(value)
