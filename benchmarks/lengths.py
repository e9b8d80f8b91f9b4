"""Exact match against length: trained runs on sums far beyond their training, in one figure.

    python benchmarks/lengths.py runs/claims/abacus_*
    python benchmarks/lengths.py runs/claims/abacus_coverage_* --longest 30 --checkpoint best

Each run is a directory of `archzoo fit` on a task with operands of so many digits. Problems are
held out, both operands have n digits, and an answer counts where every token of it is the most
likely one (teacher-forced, which for greedy decoding is the same). A row a run goes into results/,
and the figure beside it: the grey span is what was trained, a dotted line how far positions reach.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import write_rows
from rich.console import Console
from rich.table import Table

from archzoo.checkpoint import Pretrained, load
from archzoo.grid import AT_ONCE, Examiner, Key, coverage_of, examine
from archzoo.tasks.stream import build


def by_length(found: Pretrained, lengths: list[int], count: int) -> dict[int, float]:
    """Exact match of problems of two numbers of n digits each, for each n."""
    exercise = build(found.task).exercise if found.task else None
    if exercise is None or found.tokenizer is None:
        raise ValueError("a run was not trained on problems, such as those of Addition")
    device = found.model.head.weight.device.type
    precision = "bfloat16" if device == "cuda" else "float32"
    examiner = Examiner(found.model, exercise, exercise.tokens_of(found.tokenizer), precision)
    keys = [Key("cell", n, n) for n in lengths]
    matches: dict[int, float] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what lies beyond the coverage is looked at on purpose
        for counts in examine(examiner, keys, count, AT_ONCE[device]):
            for key, (asked, right) in counts.items():
                if key.kind == "cell":
                    matches[key.first] = right / asked
    return matches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--longest", type=int, default=100, help="digits of an operand [100]")
    parser.add_argument("--step", type=int, default=1, help="from one length to the next [1]")
    parser.add_argument("--problems", type=int, default=100, help="of each length [100]")
    parser.add_argument("--checkpoint", choices=("best", "last"), default="best", help="[best]")
    parser.add_argument("--name", help="of the files in results/; default: that of the first run")
    given = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    lengths = list(range(1, given.longest + 1, given.step))
    rows: list[dict[str, Any]] = []
    for path in given.runs:
        file = path / f"{given.checkpoint}.ckpt"
        if not file.is_file():
            print(f"{path} holds no {file.name}: left out")
            continue
        begin = time.perf_counter()
        found = load(file, "cuda" if on_gpu else "cpu")
        assert found.task is not None
        trained = found.task["init_args"]["digits"]
        matches = by_length(found, lengths, given.problems)
        beyond = [matches[n] for n in lengths if n > trained]
        rows.append(
            {
                "run": path.name,
                "checkpoint": given.checkpoint,
                "parameters": found.model.parameter_count(),
                "trained_digits": trained,
                "coverage": coverage_of(found.model) or "",
                "problems": given.problems,
                "inside": round(float(np.mean([matches[n] for n in lengths if n <= trained])), 4),
                "beyond": round(float(np.mean(beyond)), 4) if beyond else "",
                "seconds": round(time.perf_counter() - begin, 1),
            }
            | {f"digits_{n}": round(match, 4) for n, match in matches.items()}
        )
        print(f"{path.name}: {rows[-1]['beyond']} beyond, {rows[-1]['seconds']} s", flush=True)
    if not rows:
        raise SystemExit("error: none of the runs has a checkpoint")
    show(rows, lengths)
    name = given.name or f"lengths-{rows[0]['run']}"
    dtype = "bfloat16" if on_gpu else "float32"
    table = write_rows(f"{dtype}-{name}", rows, on_gpu=on_gpu)
    draw(rows, lengths, table.with_suffix(".png"))


def show(rows: list[dict[str, Any]], lengths: list[int]) -> None:
    """Some of the lengths, in per cent."""
    trained = rows[0]["trained_digits"]
    wanted = {1, trained, *(trained + n for n in (1, 2, 3, 5)), *range(10, lengths[-1] + 1, 10)}
    shown = [n for n in lengths if n in wanted]
    table = Table(box=None, header_style="bold", title="exact match, %", title_justify="left")
    for heading in ("run", "inside", "beyond", *map(str, shown)):
        table.add_column(heading, justify="left" if heading == "run" else "right")
    for row in rows:
        values = [row["inside"], row["beyond"], *(row[f"digits_{n}"] for n in shown)]
        table.add_row(
            row["run"], *(f"{100 * value:.0f}" if value != "" else "" for value in values)
        )
    Console(width=200).print(table)


def draw(rows: list[dict[str, Any]], lengths: list[int], path: Path) -> None:
    """A line a run; what was trained is grey, and how far positions reach is dotted."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panel = plt.subplots(figsize=(9, 4.5))
    panel.axvspan(0.5, rows[0]["trained_digits"] + 0.5, color="0.92")
    for row in rows:
        values = [row[f"digits_{n}"] for n in lengths]
        (line,) = panel.plot(lengths, values, label=row["run"], marker=".", linewidth=1.2)
        if row["coverage"] and row["coverage"] - 1 < lengths[-1]:
            # An answer may have one digit more than the operands.
            panel.axvline(row["coverage"] - 0.5, color=line.get_color(), linestyle=":")
    panel.set(
        xlabel="digits of both operands (grey: trained; dotted: as far as positions reach)",
        ylabel="exact match",
        ylim=(-0.03, 1.03),
        xlim=(0.5, lengths[-1] + 0.5),
    )
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.legend(fontsize=7, loc="upper right")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"drew {path}")


if __name__ == "__main__":
    main()
