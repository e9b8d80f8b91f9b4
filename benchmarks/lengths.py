"""Exact match against length: trained runs on much longer sums, in one figure.

    python benchmarks/lengths.py runs/compare/abacus/runs/*
    python benchmarks/lengths.py runs/compare/abacus_coverage/runs/* --longest 30 --checkpoint best

Each run is a directory of `archzoo fit` on a task whose sizes are numbers of digits. Problems are
those of test, which chose nothing (`part`; rows without one asked what validation asked), both
operands have n digits, and an answer counts where every token of it is the most
likely one (teacher-forced, which for greedy decoding is the same). A row a run goes into results/,
and the figure beside it: a line a variant, with the spread of its seeds; the grey span is what was
trained, a dotted line how far positions reach.
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import write_rows
from rich.console import Console
from rich.table import Table

from archzoo.analysis.figures import legend, pyplot, save
from archzoo.analysis.grid import AT_ONCE, Examiner, Key, evaluate_problems
from archzoo.checkpoint import Pretrained, load
from archzoo.tasks.stream import build_task


def by_length(found: Pretrained, lengths: list[int], count: int) -> tuple[dict[int, float], str]:
    """Exact match of problems of two numbers of n digits each, for each n; and whose they are."""
    task = build_task(found.task) if found.task else None
    synthetic = next(iter(getattr(task, "synthetic_tasks", {}).values()), None)
    if synthetic is None or found.tokenizer is None:
        raise ValueError("a run was not trained on problems, such as those of Addition")
    device = found.model.head.weight.device.type
    precision = "bfloat16" if device == "cuda" else "float32"
    examiner = Examiner(found.model, synthetic, synthetic.tokens_of(found.tokenizer), precision)
    keys = [Key("cell", n, n) for n in lengths]
    matches: dict[int, float] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lengths that are not covered are read on purpose
        for counts in evaluate_problems(examiner, keys, count, AT_ONCE[device]):
            for key, (problems, right) in counts.items():
                if key.kind == "cell":
                    matches[key.first] = right / problems
    return matches, synthetic.test_part


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
        matches, part = by_length(found, lengths, given.problems)
        beyond = [matches[n] for n in lengths if n > trained]
        rows.append(
            {
                "run": path.name,
                "checkpoint": given.checkpoint,
                "part": part,
                "parameters": found.model.parameter_count(),
                "trained_digits": trained,
                "coverage": found.model.embedding.coverage or "",
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
    columns = ["inside", "beyond", *(f"digits_{n}" for n in shown)]
    for name, runs in variants_of(rows).items():
        found = [(row["run"], [row[column] for column in columns]) for row in runs]
        if len(runs) > 1:
            entries = zip(*(values for _, values in found), strict=True)
            means = ["" if "" in entry else statistics.fmean(entry) for entry in entries]
            found.append((f"{name}, mean", means))
        for title, values in found:
            table.add_row(title, *("" if v == "" else f"{100 * v:.0f}" for v in values))
    Console(width=200).print(table)


def variants_of(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Runs that differ in their seed alone, by the name of their variant.

    Run names end in the seed, as archzoo compare gives them. Runs that reach less far come
    first, else the order stays.
    """
    variants: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["coverage"] or 0):
        variant = re.sub(r"_\d+$", "", row["run"])
        variants.setdefault((variant, row["coverage"], row["parameters"]), []).append(row)
    names = [variant for variant, *_ in variants]
    # Where a number at the end was none of a seed, the whole name stays.
    return {
        key[0] if names.count(key[0]) == 1 and len(runs) > 1 else runs[0]["run"]: runs
        for key, runs in variants.items()
    }


# What the variants of configs/claims/abacus*.yaml and configs/abacus_cpu.yaml are.
NAMES = {
    "coupled": "Abacus, coupled operators",
    "abacus": "Abacus",
    "abacus fire": "Abacus and FIRE",
    "abacus rope": "Abacus and RoPE",
    "coupling": "position coupling",
    "nope": "NoPE",
    "rope": "RoPE",
    "fire": "FIRE",
    "injected": "Abacus, input injection",
    "looped": "Abacus, looped",
    "looped progressive": "Abacus, looped, progressive loss",
    "retnet": "RetNet",
    "retnet abacus": "RetNet with Abacus",
    "retnet abacus only": "RetNet with Abacus, no rotation",
    "cpu": "Abacus",
    "cpu both 2": "Abacus and RoPE, 1 seed",
}


# What archzoo compare puts between an arm and its seed: the learning rate and its settings' digest.
SETTINGS = re.compile(r"_lr[-+.e\d]+_[0-9a-f]{6}(?=_\d+$)")


def titles(names: list[str]) -> dict[str, str]:
    """How runs differ: names without the words that all begin by and the seed all end in."""
    words = [SETTINGS.sub("", name).split("_") for name in names]
    begin = 0
    while len(names) > 1 and all(len(w) > begin + 1 and w[begin] == words[0][begin] for w in words):
        begin += 1
    same_end = {w[-1] for w in words}
    end = -1 if len(names) > 1 and len(same_end) == 1 and same_end.pop().isdigit() else None
    found = {}
    for name, w in zip(names, words, strict=True):
        own = w[begin:end]
        if begin and own and own[0].isdigit():
            own = w[begin - 1 : end]  # a number alone says nothing
        title = " ".join(own) or name
        found[name] = NAMES.get(title, title)
    return found


def reach(row: dict[str, Any], lengths: list[int]) -> int:
    """The longest sums of which a run gets one in ten right; 0: none."""
    return max((n for n in lengths if row[f"digits_{n}"] >= 0.1), default=0)


def draw(rows: list[dict[str, Any]], lengths: list[int], path: Path) -> None:
    """A line a variant, from the least to the largest of its seeds; what was trained is grey.

    How far positions reach is dotted, and where that differs between variants a second panel holds
    it against how far sums are right.
    """
    plt = pyplot()
    variants = variants_of(rows)
    title = titles(list(variants))
    bounds = {name: runs[0]["coverage"] for name, runs in variants.items()}
    law = len(set(bounds.values()) - {""}) > 2
    figure, panels = plt.subplots(
        1, 2, figsize=(14, 4.8), width_ratios=(2, 1), layout="constrained"
    ) if law else plt.subplots(figsize=(10, 4.8), layout="constrained")  # fmt: skip
    panel = panels[0] if law else panels
    panel.axvspan(0.5, rows[0]["trained_digits"] + 0.5, color="0.92")
    # Variants that reach further and further are shades, others differ by colour and dashes.
    shades = plt.get_cmap("plasma")(np.linspace(0, 0.88, len(variants)))
    dotted: set[float] = set()
    for number, (name, runs) in enumerate(variants.items()):
        values = np.array([[row[f"digits_{n}"] for n in lengths] for row in runs])
        color = shades[number] if law else f"C{number % 10}"
        style = "-" if law or number < 10 else "--"
        seeds = f", {len(runs)} seeds" if len(runs) > 1 else ""
        panel.plot(
            lengths, values.mean(axis=0), style, color=color, marker=".", linewidth=1.2,
            label=title[name] + seeds,
        )  # fmt: skip
        if len(runs) > 1:
            panel.fill_between(
                lengths, values.min(axis=0), values.max(axis=0), color=color, alpha=0.15
            )
        # An answer may have one digit more than the operands.
        bound = bounds[name] - 1 if bounds[name] else math.inf
        if bound < lengths[-1]:
            shared = bound in dotted  # of several variants at one length, none has its colour
            panel.axvline(bound + 0.5, color="0.4" if shared else color, linestyle=":")
            dotted.add(bound)
        if law and bounds[name]:
            reached = [reach(row, lengths) for row in runs]
            panels[1].plot([bound] * len(runs), reached, "o", color=color)
    panel.set(
        xlabel="digits of both operands (grey: trained; dotted: as far as positions reach)",
        ylabel="exact match",
        ylim=(-0.03, 1.03),
        xlim=(0.5, lengths[-1] + 0.5),
    )
    panel.xaxis.get_major_locator().set_params(integer=True)
    legend(panel, beside=True)
    if law:
        ends = (0, max(bound - 1 for bound in bounds.values() if bound) + 1)
        panels[1].plot(ends, ends, "k:", label="the law: no run above this line")
        panels[1].axhspan(0, rows[0]["trained_digits"], color="0.92")
        panels[1].set(
            xlabel="digits as far as positions reach",
            ylabel="longest sums of which one in ten is right",
            xlim=ends,
            ylim=ends,
            aspect="equal",
        )
        legend(panels[1])
    save(figure, path)
    print(f"drew {path}")


if __name__ == "__main__":
    main()
