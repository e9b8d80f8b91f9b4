"""One process, two by DDP and two by FSDP2: the same losses, and what each costs.

    python benchmarks/ranks.py                                                  # on two GPUs, NCCL
    python benchmarks/ranks.py --accelerator cpu --batch_size 4 --context_length 128    # gloo

A Skywork mixture reads the text in data/, with its balancing loss over all ranks' tokens. Each run
is `archzoo fit` with Lightning's flags; what is compared is its metrics.csv, row by row.

In float64 two processes must be one, to 1e-9 at every step, or this script fails. In float32 they
are at the first step, and then rounding grows: a token whose second and third expert are nearly
tied goes to the other, and AdamW's first steps follow a gradient's sign, however small it is. The
row "rounding" shows how far that leads one process whose weights start one digit of float32 off.
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

Log = list[dict[str, str]]

FSDP2 = {
    "--trainer.strategy": "ModelParallelStrategy",
    "--trainer.strategy.data_parallel_size": "2",
    "--trainer.strategy.tensor_parallel_size": "1",
    "--trainer.strategy.save_distributed_checkpoint": "false",
}
WAYS: dict[str, dict[str, str]] = {
    "one": {"--trainer.devices": "1"},
    # Matrices start at 1 + 2^-23 times what they are: their last digit in float32.
    "rounding": {"--trainer.devices": "1", "--model.init_std": str(0.02 * (1 + 2**-23))},
    "ddp": {"--trainer.devices": "2", "--trainer.strategy": "ddp"},
    "fsdp2": {"--trainer.devices": "2"} | FSDP2,
}
PRECISIONS: dict[str, dict[str, str]] = {
    "float64": {
        # ModelParallelStrategy refuses the name 64-true, and takes what is behind it.
        "--trainer.plugins": "lightning.pytorch.plugins.DoublePrecision",
        "--trainer.max_steps": "10",
        "--trainer.val_check_interval": "10",
    },
    "float32": {"--trainer.precision": "32-true"},
    "bf16-mixed": {"--trainer.precision": "bf16-mixed"},
}
TRAINING = ("train/loss", "train/gradient_norm", "train/loss/balance/0")
EQUAL = 1e-9  # in float64, relative


def fit(name: str, flags: dict[str, str], given: argparse.Namespace) -> Log:
    """The log of one run; subprocess.CalledProcessError if it fails."""
    options = {
        "--name": name,
        "--trainer.default_root_dir": given.runs,
        "--trainer.accelerator": given.accelerator,
        "--trainer.max_steps": str(given.steps),
        "--trainer.val_check_interval": str(given.steps),
        "--trainer.limit_val_batches": "4",
        "--trainer.log_every_n_steps": "1",
        "--trainer.gradient_clip_val": "1",
        "--trainer.enable_progress_bar": "false",
        "--trainer.enable_checkpointing": "false",
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
    parts = [part for option in (options | flags).items() for part in option]
    environment = {"OMP_NUM_THREADS": "1"} | os.environ
    subprocess.run([sys.executable, "-m", "archzoo", "fit", *parts], check=True, env=environment)
    with Path(given.runs, name, "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def differences(log: Log, one: Log, column: str) -> list[float]:
    """Relative differences of a column, from step to step."""
    pairs = [
        (float(a[column]), float(b[column])) for a, b in zip(one, log, strict=True) if a[column]
    ]
    return [abs(a - b) / abs(a) for a, b in pairs]


def summarise(log: Log, one: Log | None) -> dict[str, Any]:
    """How far a run is from the one process, and how fast it went at its end."""
    training = [entry for entry in log if entry["train/loss"]]
    row: dict[str, Any] = {"steps": len(training), "last_loss": training[-1]["train/loss"][:9]}
    for column in TRAINING if one else ():
        far = differences(log, one, column)
        seen = {"first step": far[0], "last step": far[-1], "at most": max(far)}
        row |= {f"{column} apart, {when}": f"{value:.1e}" for when, value in seen.items()}
    if one:
        row["validation/loss apart"] = f"{differences(log, one, 'validation/loss')[-1]:.1e}"
    late = training[len(training) // 2 :]
    speeds = sorted(float(entry["train/tokens_per_second"]) for entry in late)
    row["tokens_per_second"] = round(speeds[len(speeds) // 2])
    memory = next(name for name in training[-1] if name.endswith("_memory_mb"))
    row["peak_memory_mb"] = round(float(training[-1][memory]))
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--accelerator", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", default="small", help="of the skywork family [small]")
    parser.add_argument("--steps", type=int, default=40, help="float64: 10 [40]")
    parser.add_argument("--batch_size", type=int, default=32, help="windows, all ranks together")
    parser.add_argument("--context_length", type=int, default=512)
    parser.add_argument(
        "--precisions", nargs="+", choices=PRECISIONS, help="default: all; no bf16-mixed on a CPU"
    )
    given = parser.parse_args()
    on_gpu = given.accelerator == "cuda"
    rows, wrong = [], []
    with tempfile.TemporaryDirectory(prefix="archzoo-ranks-") as given.runs:
        for precision in given.precisions or list(PRECISIONS)[: 3 if on_gpu else 2]:
            one = None
            for way, flags in WAYS.items():
                if way == "rounding" and precision != "float32":
                    continue  # it is float32's last digit
                row: dict[str, Any] = {"way": way, "precision": precision}
                try:
                    log = fit(f"{way}_{precision}", flags | PRECISIONS[precision], given)
                    one = log if way == "one" else one
                    row |= summarise(log, one)
                except subprocess.CalledProcessError as error:
                    row["failed"] = f"exit status {error.returncode}"
                    wrong.append(f"{way} in {precision} failed")
                far = [float(row.get(f"{column} apart, at most", 0)) for column in TRAINING]
                if precision == "float64" and not max(far) <= EQUAL:
                    wrong.append(f"{way} in float64 is {max(far)} from one process")
                print(row, flush=True)
                rows.append(row)
    write_rows("ranks", rows, on_gpu=on_gpu)
    if wrong:
        sys.exit("; ".join(wrong))


if __name__ == "__main__":
    main()
