"""Files a run writes: checkpoints that are whole or not there, and a CSV that outlives the run."""

from __future__ import annotations

import csv
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities import rank_zero_only
from lightning.pytorch.loggers.logger import Logger

from archzoo.checkpoint import read_safely, sign

# What resuming from a checkpoint reads, where it is there, and what each is.
RESUMED: dict[str, type] = {
    "state_dict": dict,
    "hyper_parameters": dict,
    "pytorch-lightning_version": str,
    "epoch": int,
    "global_step": int,
    "loops": dict,
    "callbacks": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
    "training": dict,
}


def write_checkpoint(checkpoint: dict[str, Any], path: str | Path) -> None:
    """Write a checkpoint beside its path, then move it there: readers see the old or the new one.

    A run's gets the digest of its decoder's weights.

    Raises:
        OSError: It could not be written, because the disk is full for instance; what was at
            `path` is still there.
    """
    path = Path(path)
    sign(checkpoint)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())  # or after a power cut the new name may have no content
        replace(partial, path)  # maybe a directory of DeepSpeed's, which was resumed from
    except (OSError, RuntimeError) as error:
        # torch reports its writer's errors as RuntimeError.
        cause = error if isinstance(error, OSError) else error.__context__ or error
        reason = getattr(cause, "strerror", None) or str(cause).splitlines()[0]
        raise OSError(f"{path} could not be written: {reason}") from None
    finally:
        partial.unlink(missing_ok=True)


def replace(new: Path, path: Path) -> None:
    """Move a file or directory to where another may be, which goes once the new one is there.

    Where one of them is a directory that takes two steps. Killed between them, a run leaves the
    other one aside, see `bring_back`.

    Args:
        new: It is written whole.
        path: Where it goes.
    """
    if not new.is_dir() and not path.is_dir():
        os.replace(new, path)
        return
    aside = _aside(path)
    bring_back(path)
    remove(aside)
    if path.exists():
        path.rename(aside)
    try:
        os.replace(new, path)
    except OSError:
        bring_back(path)
        raise
    remove(aside)


def bring_back(path: Path) -> bool:
    """Undo what `replace` had only half done; whether it had."""
    half = _aside(path).exists() and not path.exists()
    if half:
        _aside(path).rename(path)
    return half


def _aside(path: Path) -> Path:
    return path.with_name(f"{path.name}.old")


def remove(path: Path) -> None:
    """Remove a file or a directory, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class CheckpointFiles(TorchCheckpointIO):
    """Lightning's way to checkpoint files: written whole or not at all, read without code."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        write_checkpoint(checkpoint, path)

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        if not Path(path).exists():
            raise FileNotFoundError(f"there is no checkpoint {path}")
        checkpoint = read_safely(path)
        for name, kind in RESUMED.items():
            if name in checkpoint and not isinstance(checkpoint[name], kind):
                raise ValueError(
                    f"{path} is damaged: its {name} is a {type(checkpoint[name]).__name__} where a "
                    f"{kind.__name__} is expected"
                )
        return checkpoint


class MetricsFile(Logger):
    """A CSV file with a row for everything logged: step, seconds, and a column a metric.

    Every row is on disk before the next step begins, so that the log of a run that is killed is
    complete. A resumed run continues the same file: see `begin`.

    Args:
        path: The file; directories are made.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.path = Path(path)
        #: Of the data that an evaluation reads, "test" or "validation", for a column of its rows.
        self.part: str | None = None
        self._rows = 0  # in the file, as far as this run wrote or read it
        self._beginning: tuple[int, int | None] | None = None  # what `begin` was given
        self._columns: list[str] | None = None
        self._known: set[tuple[int, frozenset[str]]] = set()
        self._started = time.perf_counter()

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass  # config.yaml and the checkpoints hold them

    @property
    def rows(self) -> int:
        """How many there are in the file."""
        self._begin()
        return self._rows

    @rank_zero_only
    def begin(self, step: int, count: int | None = None) -> None:
        """Keep the rows up to a step: a run that begins there writes the later ones again.

        The others are removed when the first one is written, so that a run that fails before it
        does not change the file.

        Args:
            step: The last whose rows stay.
            count: Rows there were when the checkpoint of this step was written: no more stay.
                None, of a checkpoint that does not say: what comes again at this step is left out.
        """
        self._beginning = step, count

    @rank_zero_only
    def _begin(self) -> None:
        if self._beginning is None:
            return
        (step, count), self._beginning = self._beginning, None
        if not self.path.exists():
            return
        rows, columns = self._read()
        kept = [row for row in rows[:count] if int(row["step"]) <= step]
        if kept:
            self._started = time.perf_counter() - float(kept[-1]["seconds"] or 0)
        # What came after the checkpoint and before the next step, a validation in the middle of
        # an accumulation, comes again: the row is there already.
        self._known = {_kind(row) for row in kept if int(row["step"]) == step and count is None}
        self._write(kept, columns)

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self._begin()
        seconds = round(time.perf_counter() - self._started, 3)
        row: dict[str, Any] = {"step": step, "seconds": seconds}
        row |= ({"part": self.part} if self.part else {}) | metrics
        row.pop("epoch", None)  # Lightning's; streams of examples have no epochs
        if _kind(row) in self._known:
            return
        if self._columns is None and self.path.exists():
            known, self._columns = self._read()
            self._rows = len(known)
        columns = self._columns or []
        try:
            if set(row) <= set(columns):
                with open(self.path, "a", newline="") as file:
                    csv.DictWriter(file, columns).writerow(row)
                self._rows += 1
            else:
                rows = self._read()[0] if self.path.exists() else []
                if "part" in row and "part" not in columns:
                    # What was measured before test had a part of its own read that of validation.
                    rows = [old | {"part": "validation"} for old in rows]
                self._write([*rows, row], [*columns, *(n for n in row if n not in columns)])
        except OSError as error:
            raise OSError(f"{self.path} could not be written: {error.strerror}") from None

    def _read(self) -> tuple[list[dict[str, str]], list[str]]:
        with open(self.path, newline="") as file:
            reader = csv.DictReader(file)
            # A kill may have cut the last row short.
            rows = [row for row in reader if None not in row.values() and row["step"]]
            return rows, list(reader.fieldnames or [])

    def _write(self, rows: list[dict[str, Any]], columns: list[str]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f"{self.path.name}.partial")
        with open(partial, "w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(partial, self.path)
        self._columns, self._rows = columns, len(rows)


def _kind(row: dict[str, Any]) -> tuple[int, frozenset[str]]:
    """The step of a row, and which metrics it holds."""
    held = (name for name, value in row.items() if value not in (None, ""))
    return int(row["step"]), frozenset(held)
