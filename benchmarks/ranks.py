"""One process, two by DDP and two by FSDP2: the same losses, and what each costs.

    python benchmarks/ranks.py                                    # two GPUs, through NCCL
    python benchmarks/ranks.py --accelerator cpu --size micro     # two processes, through gloo

A Skywork mixture reads the text in data/, with its balancing loss over all ranks' tokens. Each run
is `archzoo fit` with Lightning's flags; what is compared is its metrics.csv, row by row.

In float64 the ways must agree to its last digits throughout. In float32 and bfloat16 they agree to
theirs at the first step; after it what was rounded grows, since a router chooses and Adam divides.
(Lightning's strategy for FSDP2 takes no float64.)
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from harness import ROOT, write_rows

FSDP2 = {
    "--trainer.strategy": "ModelParallelStrategy",
    "--trainer.strategy.data_parallel_size": "2",
    "--trainer.strategy.tensor_parallel_size": "1",
    "--trainer.strategy.save_distributed_checkpoint": "false",
}
WAYS: dict[str, dict[str, str]] = {
    "one": {"--trainer.devices": "1"},
    "ddp": {"--trainer.devices": "2", "--trainer.strategy": "ddp"},
    "fsdp2": {"--trainer.devices": "2"} | FSDP2,
}
LOSSES = ("train/loss", "validation/loss", "train/gradient_norm", "train/loss/balance/0")


def fit(name: str, way: dict[str, str], given: argparse.Namespace, precision: str) -> list[dict]:
    """The log of one run."""
    options = {
        "--name": name,
        "--trainer.default_root_dir": given.runs,
        "--trainer.accelerator": given.accelerator,
        "--trainer.precision": precision,
        "--trainer.max_steps": str(given.steps),
        "--trainer.val_check_interval": str(given.steps // 2),
        "--trainer.limit_val_batches": "4",
        "--trainer.log_every_n_steps": "1",
        "--trainer.gradient_clip_val": "1",
        "--trainer.enable_progress_bar": "false",
        "--model.preset": f"skywork_{given.size}",
        "--model.feed_forward": "MixtureOfExperts",
        "--model.feed_forward.router": "LinearRouter",
        "--model.feed_forward.router.logit_norm": "1.0",
        "--model.feed_forward.balance": "squared_mean",
        "--model.feed_forward.balance_over": "ranks",
        "--model.feed_forward.adaptive": "true",
        "--model.learning_rate": "5e-4",
        "--model.warmup_steps": "10",
        "--data": "Text",
        "--data.path": str(ROOT / "data" / "*.txt"),
        "--data.context_length": str(given.context_length),
        "--data.batch_size": str(given.batch_size),
    }
    flags = [part for option in (options | way).items() for part in option]
    environment = {"OMP_NUM_THREADS": "1"} | os.environ
    subprocess.run([sys.executable, "-m", "archzoo", "fit", *flags], check=True, env=environment)
    with Path(given.runs, name, "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def apart(log: list[dict], other: list[dict], column: str) -> list[float]:
    """The relative differences of a column, step by step."""
    pairs = [
        (float(a[column]), float(b[column])) for a, b in zip(log, other, strict=True) if a[column]
    ]
    return [abs(a - b) / abs(a) for a, b in pairs]


def summarise(way: str, precision: str, log: list[dict], one: list[dict]) -> dict[str, Any]:
    """A row: how far a run is from the one process, and how fast it went at its end."""
    training = [entry for entry in log if entry["train/loss"]]
    late = training[len(training) // 2 :]
    row: dict[str, Any] = {
        "way": way,
        "precision": precision,
        "steps": int(log[-1]["step"]),
        "last_loss": round(float(training[-1]["train/loss"]), 5),
    }
    for column in LOSSES:
        differences = apart(one, log, column)
        row[f"{column} apart, first"] = f"{differences[0]:.1e}"
        row[f"{column} apart, most"] = f"{max(differences):.1e}"
    speeds = sorted(float(entry["train/tokens_per_second"]) for entry in late)
    row["tokens_per_second"] = round(speeds[len(speeds) // 2])
    row["peak_memory_mb"] = round(float(training[-1]["train/peak_memory_mb"]))
    print(row, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--accelerator", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", default="small", help="of the skywork family [small]")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch_size", type=int, default=32, help="windows, all ranks together")
    parser.add_argument("--context_length", type=int, default=512)
    parser.add_argument(
        "--precisions", nargs="+", help="default: float64, float32, and on a GPU bf16-mixed"
    )
    given = parser.parse_args()
    on_gpu = given.accelerator == "cuda"
    precisions = given.precisions or ["64-true", "32-true", *(["bf16-mixed"] if on_gpu else [])]
    rows: list[dict[str, Any]] = []
    one: list[dict] = []
    with tempfile.TemporaryDirectory(prefix="archzoo-ranks-") as given.runs:
        for precision in precisions:
            for way, flags in WAYS.items():
                if (way, precision) == ("fsdp2", "64-true"):
                    continue
                log = fit(f"{way}_{precision}", flags, given, precision)
                one = log if way == "one" else one
                rows.append(summarise(way, precision, log, one))
                write_rows("ranks", rows, on_gpu=on_gpu)  # at once: a later run may fail


if __name__ == "__main__":
    main()
