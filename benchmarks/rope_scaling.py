"""RoPE scaling past the trained length: every run, length and scaling as a row of results/.

    python benchmarks/rope_scaling.py runs/compare/rope_scaling/runs/*

Each run is a directory of `archzoo fit` on a text; see `archzoo extend`, which does one run.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from harness import write_rows
from rich.console import Console

from archzoo.analysis.extend import Reading, compare, plot, table, windows_of
from archzoo.checkpoint import load


def means_of(every: list[list[Reading]]) -> list[Reading]:
    """The geometric means of several runs' perplexities, reading by reading."""
    return [
        same[0]._replace(
            window=statistics.geometric_mean(reading.window for reading in same),
            tail=statistics.geometric_mean(reading.tail for reading in same),
        )
        for same in zip(*every, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--windows", type=int, default=64, help="of the test part [64]")
    parser.add_argument("--checkpoint", choices=("best", "last"), default="best", help="[best]")
    given = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    rows: list[dict[str, Any]] = []
    every: list[list[Reading]] = []
    for path in given.runs:
        found = load(path / f"{given.checkpoint}.ckpt", "cuda" if on_gpu else "cpu")
        trained = found.model.context_length
        assert trained is not None
        lengths, tail = [trained * times for times in (1, 2, 4, 8)], trained // 2
        text = windows_of(found, lengths[-1], given.windows)
        every.append(compare(found.model, text.tokens, text.labels, lengths, tail))
        facts = {"trained_length": trained, "windows": len(text.tokens), "tail_tokens": tail}
        facts |= {"part": text.part}
        rows += [{"run": path.name} | facts | reading._asdict() for reading in every[-1]]
    means = means_of(every)
    print(f"{len(every)} runs: geometric means of their perplexities")
    Console(width=160).print(table(means))
    path = write_rows("float32-claims-rope_scaling-lengths", rows, on_gpu=on_gpu)
    plot(means, rows[0]["trained_length"], rows[0]["tail_tokens"], path.with_suffix(".png"))
    print(f"drew {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
