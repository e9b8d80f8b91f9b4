"""What became of a run: read from its directory, whoever trains it and whether it still does."""

from __future__ import annotations

import csv
import io
import json
import os
import statistics
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

from archzoo.analysis.compare.plan import OF_BASE, Plan, Run
from archzoo.checkpoint import read_safely

State = Literal["waiting", "running", "trained", "done", "cut", "failed"]
TABLE_OF_BASE = "test_base"  # the file of what the base's task gives, without its end
TAIL = 16_384  # bytes of a log's end that hold its last rows
SPEED, MEMORY = "train/tokens_per_second", ("train/peak_memory_mb", "train/process_memory_mb")


class Progress(NamedTuple):
    """How far a run is.

    Attributes:
        step: Of the log's last row.
        loss: Of training, the last one logged.
        seconds: Since the run began, those of earlier processes included.
    """

    step: int = 0
    loss: float | None = None
    seconds: float = 0.0


def progress(directory: Path) -> Progress:
    """How far a run is, by the end of its log."""
    path = directory / "metrics.csv"
    try:
        with path.open("rb") as file:
            heading = file.readline()
            size = os.fstat(file.fileno()).st_size
            if size - len(heading) > TAIL:
                file.seek(size - TAIL)
                file.readline()  # the rest of a row
            text = (heading + file.read()).decode(errors="replace")
    except OSError:
        return Progress()
    found = Progress()
    for row in csv.DictReader(io.StringIO(text)):
        with suppress(KeyError, TypeError, ValueError):  # a row that is being written
            loss = float(row["train/loss"]) if row.get("train/loss") else found.loss
            found = Progress(int(row["step"]), loss, float(row["seconds"]))
    return found


def read_outcome(directory: Path) -> dict[str, Any]:
    """What was written down of a run that ended: its `state`, and what goes with it."""
    try:
        found = json.loads((directory / "outcome.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_outcome(directory: Path, **found: Any) -> None:
    """Write down what became of a run, in one step."""
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "outcome.json", found)


def write_json(path: Path, content: Any) -> None:
    """Write a file of JSON whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(json.dumps(content, indent=1), encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise OSError(f"{path} could not be written: {error.strerror}") from None


def step_of(directory: Path, which: str = "last") -> int | None:
    """The optimizer step of a run's checkpoint; None where there is none that can be read."""
    try:
        return int(read_safely(directory / f"{which}.ckpt")["global_step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def state_of(directory: Path) -> State:
    """The state that is written down; a run that has begun and not ended is waiting too."""
    outcome = read_outcome(directory)
    state = outcome.get("state")
    if outcome.get("last_step") and not (directory / "last.ckpt").is_file():
        return "waiting"  # someone removed it
    return state if state in ("trained", "cut", "failed") else "waiting"


def evaluated(
    directory: Path, part: str, step: int | None, table: str = "test"
) -> dict[str, float]:
    """The metrics of one part of the checkpoint of a step; {}: none.

    Args:
        directory: The run's.
        part: "validation" or "test".
        step: Of the checkpoint.
        table: Of the test part, the file without its end.
    """
    files = (f"{table}.csv",) if part == "test" else ("validate.csv", "metrics.csv")
    for name in files:
        try:
            with (directory / name).open(newline="") as file:
                rows = list(csv.DictReader(file))
        except OSError:
            continue
        for row in reversed(rows):
            if row.get("step") != str(step):
                continue
            found = {n: float(v) for n, v in row.items() if n.startswith(f"{part}/") and v}
            if found:
                return found
    return {}


def row_of_run(run: Run, plan: Plan, directory: Path) -> dict[str, Any]:
    """A run as a row of runs.csv; what is not known yet is left empty.

    Args:
        run: Which.
        plan: The comparison.
        directory: The run's.
    """
    arm, outcome = plan.facts(run), read_outcome(directory)
    step = outcome.get(f"{plan.measured}_step")
    row: dict[str, Any] = {
        "arm": f"base {run.arm}" if run.is_base else run.arm,
        "seed": run.seed,
        "learning_rate": f"{run.rate:g}",
        "state": outcome.get("state", ""),
        "key": run.key,
        "run": run.name,
        "checkpoint": plan.measured,
        "step": "" if step is None else step,
        "steps": arm.steps,
        "tokens": arm.tokens,
        "precision": plan.precision,
        "batches": arm.batches,
        "parameters": arm.sizes.parameters,
        "trainable": arm.trainable,
        "active": arm.sizes.active,
        "state_1k": arm.sizes.state_1k,
        "state_16k": arm.sizes.state_16k,
    }
    for part in ("validation", "test"):
        found = evaluated(directory, part, step)
        row |= {name: f"{value:.6g}" for name, value in sorted(found.items())}
    if run.reads:
        row["base"] = " ".join(read.key for read in run.reads.values())
    if run.base is not None and not run.is_base:
        found = evaluated(directory, "test", step, TABLE_OF_BASE)
        row |= {f"{name}/{OF_BASE}": f"{value:.6g}" for name, value in sorted(found.items())}
    for metric in plan.early:
        name, _, at = metric.partition("@")
        value = evaluated(directory, "validation", int(at)).get(f"validation/{name}")
        row[f"validation/{metric}"] = "" if value is None else f"{value:.6g}"
    row |= {name: f"{value:.5g}" for name, value in _of_training(directory).items()}
    with suppress(OSError, ValueError):
        row |= json.loads((directory / "facts.json").read_text(encoding="utf-8"))
    return row


def _of_training(directory: Path) -> dict[str, float]:
    """Speed, memory and time by a run's log, and the last tenth of whatever a layer logs."""
    try:
        with (directory / "metrics.csv").open(newline="") as file:
            log = list(csv.DictReader(file))
    except OSError:
        return {}
    found: dict[str, float] = {}
    speeds = [float(row[SPEED]) for row in log if row.get(SPEED)]
    if speeds:  # the first row holds what is done once
        found["tokens_per_second"] = statistics.median(speeds[1:] or speeds)
    for name in MEMORY:
        if held := [float(row[name]) for row in log if row.get(name)]:
            found[name.removeprefix("train/")] = max(held)
    if log:
        found["seconds"] = float(log[-1]["seconds"])
    layered: dict[str, list[str]] = {}
    for name in log[0] if log else ():
        whole, _, layer = name.rpartition("/")
        if name.startswith(("train/metric/", "train/loss/")) or name == "train/loss":
            layered.setdefault(whole if layer.isdigit() else name, []).append(name)
    for name, columns in sorted(layered.items()):
        rows = [row for row in log if all(row[column] for column in columns)]
        values = [statistics.fmean(float(row[column]) for column in columns) for row in rows]
        if values:
            tenth = max(len(values) // 10, 1)
            found[name] = statistics.fmean(values[-tenth:])
            if name.startswith("train/metric/"):
                found[f"{name}/first"] = statistics.fmean(values[:tenth])
                found[f"{name}/highest"] = max(values)
    return found
