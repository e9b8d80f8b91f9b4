"""What evaluations found, in the run's folder: eval.json, eval.csv, and a table of both."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from archzoo.locking import alone

JSON, CSV, SAMPLES = "eval.json", "eval.csv", "eval_samples.jsonl"
ABOUT = ("task", "checkpoint", "weights", "documents", "fewshot", "limit", "truncated")
SETTINGS = ("max_length", "prefix", "task_version", "lm_eval", "archzoo", "date")

#: What was measured of a checkpoint by a task: plain data, with the metrics by their names.
Record = dict[str, Any]


def records_of(
    found: dict[str, Any], common: Record, truncated: Mapping[str, Collection[Any]]
) -> list[Record]:
    """A record for each task, and for each group that has metrics, of what lm-eval returned.

    Args:
        found: Of `lm_eval.simple_evaluate`.
        common: What all records say.
        truncated: Documents with a context whose beginning was dropped, by task.
    """
    records = []
    for task, figures in found["results"].items():
        better = found.get("higher_is_better", {}).get(task, {})
        metrics: dict[str, Any] = {}
        for key, value in sorted(figures.items()):
            name, comma, applied = key.partition(",")
            if not comma or name.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = figures.get(f"{name}_stderr,{applied}")
            label = name if applied == "none" else f"{name},{applied}"
            metrics[label] = {
                "value": value,
                "stderr": error if isinstance(error, int | float) else None,
                "higher_is_better": better.get(name),
            }
        if metrics:
            counts = found.get("n-samples", {}).get(task, {})
            own = {
                "documents": counts.get("effective", figures.get("sample_len")),
                "fewshot": found.get("n-shot", {}).get(task),
                "truncated": len(truncated.get(task, ())),
                "task_version": found.get("versions", {}).get(task),
            }
            records.append({"task": task, **common, **own, "metrics": metrics})
    return records


def write_results(folder: Path, records: Sequence[Record]) -> list[Record]:
    """Put records among those of a folder, instead of older ones of the same checkpoint and task.

    Args:
        folder: That holds, or gets, eval.json and eval.csv; it is made.
        records: New ones.

    Returns:
        All that are there now.

    Raises:
        ValueError: The folder's eval.json is not one.
        OSError: It cannot be written.
    """
    new = {_key(record) for record in records}
    with alone(folder):  # another evaluation may end at the same time
        kept = [record for record in read_results(folder) if _key(record) not in new]
        both = [*kept, *records]
        _replace(folder / JSON, json.dumps({"results": both}, indent=1, ensure_ascii=False) + "\n")
        partial = folder / f"{CSV}.partial"
        with open(partial, "w", newline="") as file:
            metric = ("metric", "value", "stderr", "higher_is_better")
            writer = csv.DictWriter(file, [*ABOUT[:3], *metric, *ABOUT[3:], *SETTINGS])
            writer.writeheader()
            for record in both:
                about = {name: record.get(name) for name in (*ABOUT, *SETTINGS)}
                # A prefix is mostly a line end.
                about["prefix"] = None if about["prefix"] is None else repr(about["prefix"])
                for name, figures in record["metrics"].items():
                    writer.writerow({**about, "metric": name, **figures})
        os.replace(partial, folder / CSV)
    return both


def read_results(folder: Path) -> list[Record]:
    """The records of a folder; none where it has no eval.json.

    Raises:
        ValueError: It is damaged, or another program's.
    """
    path = folder / JSON
    if not path.exists():
        return []
    try:
        found = json.loads(path.read_text())["results"]
        if not all({"task", "checkpoint", "metrics"} <= record.keys() for record in found):
            raise KeyError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(
            f"{path} was not written by archzoo eval: move it away, or give another --directory"
        ) from None
    records: list[Record] = found
    return records


def write_samples(folder: Path, samples: dict[str, list[dict[str, Any]]], default: Any) -> None:
    """Every document, what was asked of the model and what it said, a line each.

    Args:
        folder: That gets eval_samples.jsonl.
        samples: By task.
        default: What makes of others plain data, as for `json.dumps`.
    """
    lines = [
        json.dumps({"task": task, **sample}, ensure_ascii=False, default=default)
        for task, all_of_task in samples.items()
        for sample in all_of_task
    ]
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / SAMPLES, "".join(f"{line}\n" for line in lines))


def table(records: Sequence[Record]) -> Table:
    """A row for each metric of each task."""
    made = Table(box=None, header_style="bold")
    for name in ("checkpoint", "task", "metric"):
        made.add_column(name)
    for name in ("value", "±", "documents", "truncated"):
        made.add_column(name, justify="right")
    for record in records:
        for name, figures in record["metrics"].items():
            error = figures["stderr"]
            made.add_row(
                str(record["checkpoint"]),
                record["task"],
                name,
                f"{figures['value']:.4f}",
                "" if error is None else f"{error:.4f}",
                str(record["documents"]),
                str(record["truncated"]),
            )
    return made


def _key(record: Record) -> tuple[Any, ...]:
    return record["checkpoint"], record["task"]


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)
