"""The papers' claims: every variant of an experiment, with several seeds, on one machine.

    python benchmarks/claims.py configs/claims/normalised_gate.yaml --seeds 0 1 2
    python benchmarks/claims.py configs/claims/*.yaml --at_once 12 --within 9
    python benchmarks/claims.py configs/claims/moe_router.yaml --arms linear -- --model.dropout 0

A variant is an entry of `arms` in a configuration; a file without any is one variant. Each run is
`archzoo fit` in a process of its own, in RUNS/FILE_ARM_SEED; the seed is that of weights and data.
What its metrics.csv says goes into results/, a row a run, one file for each configuration file;
rows of other variants and seeds stay there. What follows -- goes to every run.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from harness import write_rows
from rich.console import Console
from rich.table import Table

from archzoo import tasks
from archzoo.analysis.listing import active_parameters
from archzoo.checkpoint import load, read_safely

WINDOWS = 10  # parts of a log: its first, its last, and the highest of all say how a metric went


class Run(NamedTuple):
    """One process: a variant of a configuration file, with a seed."""

    config: Path
    variant: str | None
    seed: int

    @property
    def name(self) -> str:
        """Of the run's directory."""
        return "_".join(filter(None, (self.config.stem, self.variant, str(self.seed))))


def plan(configs: list[Path], variants: list[str] | None, seeds: list[int]) -> list[Run]:
    """All runs, those of one seed together, so that what is cut short is whole seeds."""
    found = []
    for config in configs:
        names = yaml.safe_load(config.read_text(encoding="utf-8")).get("arms") or {None: {}}
        found += [(config, name) for name in names if variants is None or name in variants]
    return [Run(config, variant, seed) for seed, (config, variant) in product(seeds, found)]


def prepare(configs: list[Path]) -> None:
    """Encode each text once, before many runs ask for it."""
    for config in configs:
        data = yaml.safe_load(config.read_text(encoding="utf-8"))["data"]
        task = getattr(tasks, data["class_path"].rpartition(".")[2])
        task(**data.get("init_args", {})).prepare()


# ---------------------------------------------------------------------------- running


def start(run: Run, root: Path, minutes: float, more: list[str]) -> subprocess.Popen[bytes]:
    """`archzoo fit` of one run; its output goes to a file beside the run's directory."""
    seconds = max(int(minutes * 60), 1)
    limit = f"00:{seconds // 3600:02}:{seconds % 3600 // 60:02}:{seconds % 60:02}"
    command = [sys.executable, "-m", "archzoo", "fit", "--config", str(run.config)]
    command += ["--arm", run.variant] if run.variant else []
    command += ["--name", run.name, "--trainer.default_root_dir", str(root)]
    command += ["--seed_everything", str(run.seed), "--data.seed", str(run.seed)]
    command += ["--trainer.max_time", limit, *more]
    environment = {"OMP_NUM_THREADS": "1"} | os.environ  # many processes use the cores
    with (root / f"{run.name}.log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def run_all(runs: list[Run], root: Path, at_once: int, within: float, more: list[str]) -> list[Run]:
    """Run them, `at_once` together, and write the tables down as they grow; returns what failed."""
    root.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    waiting, going, failed = list(runs), dict[Run, subprocess.Popen[bytes]](), []
    rows: dict[Run, dict[str, Any]] = {}
    while waiting or going:
        left = within - (time.perf_counter() - begin) / 60
        while waiting and len(going) < at_once:
            run = waiting.pop(0)
            if left <= 0:
                print(f"{run.name}: no time left, not run", flush=True)
                continue
            going[run] = start(run, root, left, more)
        time.sleep(0.2)
        for run, process in list(going.items()):
            if process.poll() is None:
                continue
            del going[run]
            minutes = (time.perf_counter() - begin) / 60
            if process.returncode:
                failed.append(run)
                log = (root / f"{run.name}.log").read_text(errors="replace").strip()
                print(f"{run.name}: FAILED\n" + "\n".join(log.splitlines()[-8:]), flush=True)
                continue
            rows[run] = {"arm": run.variant or "", "seed": run.seed} | measure(root / run.name)
            best = rows[run].get("validation/loss/best")
            short = ", CUT SHORT" if rows[run]["cut_short"] else ""
            print(f"{minutes:5.1f} min  {run.name}: validation loss {best}{short}", flush=True)
            write(run.config, rows)
    return failed


# ---------------------------------------------------------------------------- what came of it


def measure(directory: Path) -> dict[str, Any]:
    """What a run's checkpoint and log say, as one row.

    * ``parameters``, ``active``: all, and the active ones.
    * ``validation/NAME/best`` and ``/last``, each metric by itself; ``best_step`` is the step of
      best.ckpt, which is chosen by one of them.
    * ``cut_short``: "yes" where the run ended before its max_steps or max_epochs.
    * ``train/NAME/first``, ``/highest`` and ``/last``: of the means over tenths of the log; what is
      logged for each layer is averaged over the layers.
    """
    model = load(directory / "last.ckpt").model
    with (directory / "metrics.csv").open(newline="") as file:
        log = list(csv.DictReader(file))
    row: dict[str, Any] = {
        "parameters": model.parameter_count(),
        "active": active_parameters(model),
        "steps": int(log[-1]["step"]),
        "seconds": round(float(log[-1]["seconds"])),
        "cut_short": "yes" if cut_short(directory) else "",
    }
    if (directory / "best.ckpt").is_file():
        row["best_step"] = int(read_safely(directory / "best.ckpt")["global_step"])
    columns = {name for name in log[0] if "/" in name}
    for name in sorted(column for column in columns if column.startswith("validation/")):
        seen = [float(entry[name]) for entry in log if entry[name]]
        smaller = name.endswith(("/loss", "/perplexity"))
        best = (min if smaller else max)(seen)
        row |= {f"{name}/best": round(best, 5), f"{name}/last": round(seen[-1], 5)}
    layered: dict[str, list[str]] = {}
    for name in sorted(column for column in columns if column.startswith("train/")):
        whole, _, layer = name.rpartition("/")
        layered.setdefault(whole if layer.isdigit() else name, []).append(name)
    for name, parts in layered.items():
        values = [
            statistics.fmean(float(entry[part]) for part in parts)
            for entry in log
            if all(entry[part] for part in parts)
        ]
        size = max(len(values) // WINDOWS, 1)
        means = [statistics.fmean(values[n : n + size]) for n in range(0, len(values), size)]
        last = statistics.fmean(values[-size:])
        ends = {"first": means[0], "highest": max(means), "last": last}
        row |= {f"{name}/{when}": float(f"{value:.5g}") for when, value in ends.items()}
    return row


def cut_short(directory: Path) -> bool:
    """Whether a run ended before the steps or epochs that its settings ask for."""
    trainer = yaml.safe_load((directory / "config.yaml").read_text(encoding="utf-8"))["trainer"]
    last = read_safely(directory / "last.ckpt")
    if (steps := trainer.get("max_steps") or -1) > 0:
        return bool(last["global_step"] < steps)
    if (limit := trainer.get("max_time")) is None:
        return False
    # Epochs have no number that a checkpoint knows; the clock that ends a run is kept in it.
    days, hours, minutes, seconds = map(int, limit.split(":"))
    allowed = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    clock = last["callbacks"].get("Timer", {}).get("time_elapsed", {})
    return bool(clock.get("train", 0.0) >= allowed)


def write(config: Path, rows: dict[Run, dict[str, Any]]) -> None:
    """The rows of one configuration file so far, into results/."""
    mine = [row for run, row in rows.items() if run.config == config]
    on_gpu = torch.cuda.is_available()
    dtype = "bfloat16" if on_gpu else "float32"
    what = f"{dtype}-claims-{config.stem}"
    write_rows(what, mine, on_gpu=on_gpu, replacing=("arm", "seed"))


SHOWN = {
    "validation/loss/best": "best validation loss",
    "validation/exact_match/best": "best exact match",
    "validation/exact_match/ood/best": "beyond, best",
    "validation/exact_match/ood/last": "beyond, last",
    "train/loss/last": "train loss",
    "train/metric/drop_rate/last": "drop rate",
    "train/metric/max1_max2/highest": "Max1/Max2, highest",
    "train/metric/max1_max2/last": "Max1/Max2, last",
    "train/tokens_per_second/last": "tokens/s",
}


def show(root: Path, runs: list[Run]) -> None:
    """A table for each configuration file: means over seeds, and their standard deviation."""
    done = [run for run in runs if (root / run.name / "last.ckpt").exists()]
    for config in dict.fromkeys(run.config for run in done):
        variants: dict[str, list[dict[str, Any]]] = {}
        for run in done:
            if run.config == config:
                variants.setdefault(run.variant or "", []).append(measure(root / run.name))
        known = {name for rows in variants.values() for row in rows for name in row}
        shown = [name for name in SHOWN if name in known]
        table = Table(title=config.stem, box=None, header_style="bold", title_justify="left")
        for heading in ("arm", "seeds", "parameters", "steps", *(SHOWN[name] for name in shown)):
            table.add_column(heading, justify="left" if heading == "arm" else "right")
        for variant, rows in variants.items():
            steps = f"{rows[0]['steps']}" + (" (cut short)" if rows[0]["cut_short"] else "")
            cells = [variant, str(len(rows)), f"{rows[0]['parameters']:,}", steps]
            for name in shown:
                values = [row[name] for row in rows if name in row]
                spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
                cells.append(f"{statistics.fmean(values):.5g}{spread}" if values else "")
            table.add_row(*cells)
        Console(width=180).print(table)


def main() -> None:
    own, more = sys.argv[1:], []
    if "--" in own:
        own, more = own[: own.index("--")], own[own.index("--") + 1 :]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("configs", nargs="+", type=Path)
    parser.add_argument("--arms", nargs="+", help="default: all of each file")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--at_once", type=int, default=1, help="runs side by side [1]")
    parser.add_argument(
        "--within", type=float, default=24 * 60, help="minutes for all of it [1440]"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/claims"), help="[runs/claims]")
    given = parser.parse_args(own)
    missing = [str(config) for config in given.configs if not config.is_file()]
    if missing:
        raise SystemExit(f"error: there is no configuration {', '.join(missing)}")
    if given.at_once < 1:
        raise SystemExit(f"error: at_once={given.at_once} must be at least 1")
    runs = plan(given.configs, given.arms, given.seeds)
    if not runs:
        raise SystemExit(f"error: none of the files has a variant named {', '.join(given.arms)}")
    prepare(given.configs)
    failed = run_all(runs, given.runs, given.at_once, given.within, more)
    show(given.runs, [run for run in runs if run not in failed])
    if failed:
        raise SystemExit(f"error: {len(failed)} of {len(runs)} runs failed")


if __name__ == "__main__":
    main()
