"""Several processes beside one: equal in float64, how fast, and what rounding does to them.

    python benchmarks/ranks.py equal --accelerator cpu                       # two processes, gloo
    python benchmarks/ranks.py speed --text TEXT                             # on two GPUs, NCCL
    python benchmarks/ranks.py speed --text TEXT --devices 1 2 4 8 --strong \
        --presets retnet_base transformer_base yuan_base --lengths 2048 8192
    python benchmarks/ranks.py compare                                       # a run on each GPU
    python benchmarks/ranks.py rounding
    python benchmarks/ranks.py bytes --accelerator cpu                       # two processes, gloo

`equal` trains a micro model of every family for two steps in float64, alone and in several
processes by DDP, with the optimizer's state shared out (ZeRO-1), and by FSDP2 (weights gathered
together, and block by block), on the same batches:
loss and gradients must be the same to 1e-12, or it fails. Balancing losses are those of all
processes' tokens.

`speed` runs `archzoo fit` on one GPU and on several, each GPU with as many tokens (weak scaling)
and, with --strong, with as many in all, compiled and not. It compares the tokens a second of its
log, and says how many milliseconds of a step NCCL's kernels take, and how many of these no other
kernel runs beside. With --beside all runs compile at once, so that their models are in memory
together, and then each is measured by itself.

`compare` has `archzoo compare` train one run, and then as many as there are GPUs, each on its own.
The seconds are those of the whole command, after one that has filled the caches.

`rounding` trains a Skywork mixture in float64, float32 and bf16-mixed. In float64 two processes
must be one, to 1e-9 at every step, or it fails. In float32 they are at the first step, and then
rounding grows: a token whose second and third expert are nearly tied goes to the other, and AdamW's
first steps follow a gradient's sign, however small it is. The row "rounding" shows how far that
leads one process whose weights start one digit of float32 off.

`bytes` trains two steps and says how many bytes of a parameter each process holds when a step is
done, gradients included, beside the formula of ZeRO's paper. What a step holds meanwhile, such as
weights that are gathered, is not among them. DeepSpeed's parts lie in buffers of its own: of it,
only what all tensors of the process take is known. On a CPU, where Lightning does not train by it:

    PYTHONPATH=tests/extras DS_ACCELERATOR=cpu python benchmarks/ranks.py bytes --accelerator cpu \
        --import deepspeed_on_cpu --ways one deepspeed_stage_1 deepspeed_stage_2 deepspeed_stage_3

Each run is `archzoo fit` with Lightning's flags.
"""

from __future__ import annotations

import argparse
import csv
import gc
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import lightning
import torch
from harness import ROOT, write_rows
from torch import Tensor
from turns import take_turn, wait_until_ready

from archzoo.analysis.compare.places import gpus
from archzoo.analysis.evidence import read_rows
from archzoo.analysis.figures import pyplot, save
from archzoo.cli import main as archzoo
from archzoo.training import sharding
from archzoo.training.deepspeed import inner, uses_deepspeed

Log = list[dict[str, str]]


def ddp(processes: int) -> dict[str, str]:
    """Lightning's flags for DDP."""
    return {"--trainer.devices": str(processes), "--trainer.strategy": "ddp"}


def fsdp2(processes: int) -> dict[str, str]:
    """Lightning's flags for FSDP2."""
    return {
        "--trainer.devices": str(processes),
        "--trainer.strategy": "ModelParallelStrategy",
        "--trainer.strategy.data_parallel_size": str(processes),
        "--trainer.strategy.tensor_parallel_size": "1",
        "--trainer.strategy.save_distributed_checkpoint": "false",
    }


def zero(processes: int) -> dict[str, str]:
    """Lightning's flags for DDP with the optimizer's state shared out."""
    return {"--trainer.devices": str(processes), "--trainer.strategy": "ddp_zero_1"}


ONE = {"--trainer.devices": "1"}
STRATEGIES = {"ddp": ddp, "ddp_zero_1": zero, "fsdp2": fsdp2}
BLOCKS = "fsdp2_blocks"  # as models are sharded that are larger than those here
TOGETHER = sharding.most_together
# ModelParallelStrategy refuses the name 64-true, and takes what is behind it.
FLOAT64 = {"--trainer.plugins": "lightning.pytorch.plugins.DoublePrecision"}

# ---------------------------------------------------------------------------- equal

MIXTURE = {
    "--model.feed_forward": "MixtureOfExperts",
    "--model.feed_forward.balance_over": "ranks",
    "--model.feed_forward.z_coefficient": "1e-3",
}
FAMILIES: dict[str, dict[str, str]] = {
    "retnet": {},
    "transformer": {},
    "yuan": MIXTURE
    | {"--model.feed_forward.router": "AttentionRouter", "--model.feed_forward.balance": "switch"},
    "skywork": MIXTURE
    | {
        "--model.feed_forward.router": "LinearRouter",
        "--model.feed_forward.router.logit_norm": "1.0",
        "--model.feed_forward.balance": "squared_mean",
        "--model.feed_forward.adaptive": "true",
    },
    "abacus": {},
}
SAME = 1e-12  # relative, of the loss and of each gradient's norm


class Kept(lightning.Callback):
    """Keeps each step's loss and gradients."""

    seen: ClassVar[list[dict[str, Tensor]]] = []

    def on_before_optimizer_step(
        self, trainer: lightning.Trainer, pl_module: Any, optimizer: Any
    ) -> None:
        found = {}
        for name, parameter in pl_module.named_parameters():
            gradient: Any = parameter.grad
            if gradient is not None:
                whole = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
                found[name] = whole.cpu().clone()
        self.seen.append(found)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        latest = pl_module.latest
        losses = {
            n: torch.tensor(v, dtype=torch.float64) for n, v in latest.items() if "/loss" in n
        }
        self.seen[-1] |= losses


def trained(
    way: str, family: str, flags: dict[str, str], given: argparse.Namespace
) -> list[dict[str, Tensor]]:
    """Loss and gradients of each step, of one `archzoo fit` in this process."""
    Kept.seen.clear()
    sharding.most_together = (lambda _: 0) if way == BLOCKS else TOGETHER
    options = {
        "--name": f"{way}_{family}",
        "--seed_everything": "0",
        "--model.preset": f"{family}_micro",
        "--model.warmup_steps": "1",
        "--model.learning_rate": "1e-3",
        "--data": "Addition",
        "--data.digits": "2",
        "--data.batch_size": "8",
        "--trainer.default_root_dir": given.root,
        "--trainer.accelerator": given.accelerator,
        "--trainer.max_steps": "2",
        "--trainer.limit_val_batches": "0",
        "--trainer.log_every_n_steps": "1",
        "--trainer.enable_progress_bar": "false",
        "--trainer.enable_checkpointing": "false",
        "--trainer.callbacks": "__main__.Kept",
    }
    parts = [part for option in (options | flags).items() for part in option]
    if archzoo(["fit", *parts]):
        sys.exit(f"{family} failed: {' '.join(parts)}")
    return list(Kept.seen)


def distance(ours: list[dict[str, Tensor]], alone: list[dict[str, Tensor]], losses: bool) -> float:
    """The largest relative distance of a loss, or of a gradient, at any step."""
    far = [0.0]
    for mine, one in zip(ours, alone, strict=True):
        assert mine.keys() == one.keys() and any("/loss" in name for name in one)
        for name, value in one.items():
            if ("/loss" in name) == losses:
                apart, size = (mine[name] - value).norm(), value.norm()
                far.append(float(apart / size) if size else float(apart))
    return max(far)


def in_processes(count: int, **own: str) -> int:
    """This command in so many processes; the largest of their statuses.

    Args:
        count: How many.
        **own: Variables of their environment.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"} | own
    ranks = [
        subprocess.Popen([sys.executable, *sys.argv], env=os.environ | common | {"LOCAL_RANK": n})
        for n in map(str, range(count))
    ]
    while not any(rank.poll() for rank in ranks) and any(rank.poll() is None for rank in ranks):
        time.sleep(0.1)
    for rank in ranks:
        rank.terminate()  # which waits for one that failed
    return max(abs(rank.wait()) for rank in ranks)


def equal(given: argparse.Namespace) -> int:
    """One row a family and strategy."""
    if "LOCAL_RANK" not in os.environ:
        return in_processes(given.processes)
    given.root = str(Path(given.root, os.environ["LOCAL_RANK"]))
    first, rows, wrong = os.environ["LOCAL_RANK"] == "0", [], []
    pairs = [pair.split("/") for pair in given.runs]
    alone = {}
    if first:  # before there is any other process, for which Lightning would wait
        for family in dict.fromkeys(family for _, family in pairs):
            alone[family] = trained("one", family, FAMILIES[family] | FLOAT64 | ONE, given)
    for strategy, family in pairs:
        flags = (
            FAMILIES[family] | FLOAT64 | (STRATEGIES | {BLOCKS: fsdp2})[strategy](given.processes)
        )
        ours = trained(strategy, family, flags, given)
        if not first:
            continue
        row: dict[str, Any] = {"way": strategy, "processes": given.processes}
        row |= {"model": f"{family}_micro", "precision": "float64"}
        row["loss_apart"] = f"{distance(ours, alone[family], losses=True):.1e}"
        row["gradients_apart"] = f"{distance(ours, alone[family], losses=False):.1e}"
        print(row, flush=True)
        rows.append(row)
        if not max(float(row["loss_apart"]), float(row["gradients_apart"])) <= SAME:
            wrong.append(f"{strategy} of {given.processes} is not one process: {row}")
    if first and given.write:
        write_rows("ranks-equal", rows, on_gpu=given.accelerator == "cuda")
    if wrong:
        print("; ".join(wrong), file=sys.stderr)
    return len(wrong)


# ---------------------------------------------------------------------------- speed


NAMED = ("way", "scaling", "processes", "model", "time", "tokens_a_process", "compile")


def speed(given: argparse.Namespace) -> int:
    """One row a model, length, strategy and number of processes: tokens a second, and of one's."""
    counts = sorted(set(given.devices) - {1})
    runs = [("one", "weak", 1)]
    runs += [(way, "weak", count) for count in counts for way in given.strategies]
    if given.strong:
        runs += [(way, "strong", count) for count in counts for way in given.strategies]
    cases = itertools.product(given.compile, given.presets, given.lengths)
    rows: list[dict[str, Any]] = []
    for (compiled, preset, length), (way, scaling, count) in itertools.product(cases, runs):
        tokens = given.tokens if scaling == "weak" else given.tokens // count
        row: dict[str, Any] = {"way": way, "scaling": scaling, "processes": count}
        row |= {"model": preset, "time": length, "tokens_a_process": tokens, "compile": compiled}
        rows.append(row)
    ends = [len(rows)] if given.beside else range(1, len(rows) + 1)
    done, alone, failed = 0, {}, 0
    for end in ends:
        for row, found in zip(rows[done:end], measured(rows[done:end], given), strict=True):
            row |= found
            failed += "failed" in row
            case = row["compile"], row["model"], row["time"]
            if row["way"] == "one":
                alone[case] = row.get("tokens_per_second")
            if alone.get(case) and "tokens_per_second" in row:
                times = row["tokens_per_second"] / alone[case]
                row["times_one"] = round(times, 3)
                row["of_linear"] = round(times / row["processes"], 3)
            print(row, flush=True)
            done += 1
            write_rows(
                "ranks-speed", rows[:done], on_gpu=given.accelerator == "cuda", replacing=NAMED
            )
    return failed


def measured(rows: list[dict[str, Any]], given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What a run of `archzoo fit` for each row says of its speed, or why it failed.

    All compile beside each other. Then each runs by itself, until its process has ended.

    Args:
        rows: What is asked, as in the table.
        given: The command line's.
    """
    started: list[tuple[Path, subprocess.Popen[bytes] | None]] = []
    for row in rows:
        name = "_".join(str(row[part]) for part in NAMED)
        fits = row["tokens_a_process"] >= row["time"]
        options = speed_options(row, name, given) | {"--trainer.callbacks.in_turn": "true"}
        started.append((Path(given.root, name), start(options) if fits else None))
    try:
        for (place, process), row in zip(started, rows, strict=True):
            if process:
                wait_until_ready(f"{place}.json", process, row["processes"])
        for (place, process), row in zip(started, rows, strict=True):
            if process is None:
                tokens, length = row["tokens_a_process"], row["time"]
                yield {"failed": f"{tokens} tokens a process are less than a row of {length}"}
                continue
            exchange = place.with_name(f"{place.name}.json")
            if status := take_turn(exchange, process):
                yield {"failed": f"archzoo fit ended with status {status}"}
                continue
            log = [entry for entry in read_log(place) if entry["train/loss"]]
            # The last row of the log holds the steps that were profiled.
            found = rates(log[:-1] if len(log) > 1 else log)
            if exchange.exists():
                found |= {k: round(v, 2) for k, v in json.loads(exchange.read_text()).items()}
            yield found
    finally:
        for _, process in started:  # those whose turn has not come, if this ends early
            if process:
                process.terminate()


def speed_options(row: dict[str, Any], name: str, given: argparse.Namespace) -> dict[str, str]:
    """The flags of `archzoo fit` for a row."""
    way, count, length = row["way"], row["processes"], row["time"]
    options = {
        "--name": name,
        "--import": "exchange",
        "--trainer.callbacks": "exchange.Exchange",
        "--trainer.callbacks.path": str(Path(given.root, f"{name}.json")),
        "--trainer.default_root_dir": given.root,
        "--trainer.accelerator": given.accelerator,
        "--trainer.max_steps": str(given.steps),
        "--trainer.val_check_interval": str(given.steps),
        "--trainer.limit_val_batches": "4",
        "--trainer.log_every_n_steps": "10",
        "--trainer.enable_progress_bar": "false",
        "--trainer.enable_checkpointing": "false",
        "--model.preset": row["model"],
        "--model.dropout": "0",
        "--data": "Text",
        "--data.path": given.text,
        "--data.context_length": str(length),
        "--data.batch_size": str(row["tokens_a_process"] // length * count),
        "--compile": row["compile"],
    }
    if given.vocab_size:
        options |= {"--data.tokenizer": "bpe", "--data.vocab_size": str(given.vocab_size)}
    return options | (ONE if way == "one" else STRATEGIES[way](count))


def rates(log: Log) -> dict[str, Any]:
    """The median of the second half's tokens a second, and the most memory of the first process."""
    late = log[len(log) // 2 :]
    memory = next(name for name in log[-1] if name.endswith("_memory_mb"))
    return {
        "steps": int(log[-1]["step"]),
        "last_loss": log[-1]["train/loss"][:9],
        "tokens_per_second": round(
            statistics.median(float(x["train/tokens_per_second"]) for x in late)
        ),
        "peak_memory_mb": round(float(log[-1][memory])),
    }


def start(options: dict[str, str]) -> subprocess.Popen[bytes]:
    """A process of `archzoo fit`."""
    parts = [part for option in options.items() for part in option]
    path = os.pathsep.join([str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])
    environment = {"OMP_NUM_THREADS": "1"} | os.environ | {"PYTHONPATH": path.rstrip(os.pathsep)}
    return subprocess.Popen([sys.executable, "-m", "archzoo", "fit", *parts], env=environment)


def read_log(run: Path) -> Log:
    """The rows of a run's log."""
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def fit(options: dict[str, str], given: argparse.Namespace) -> Log:
    """The log of one run; subprocess.CalledProcessError if it fails."""
    process = start(options)
    if status := process.wait():
        raise subprocess.CalledProcessError(status, process.args)
    return read_log(Path(given.root, options["--name"]))


def draw(rows: Log, path: Path) -> None:
    """Tokens a second against the number of GPUs, over those of one and over linear scaling.

    Args:
        rows: Of `speed`, as its file has them; those that failed are left out.
        path: Of the picture.
    """
    facts = {"model": "{}", "time": "rows of {} tokens", "compile": "compiled: {}"}
    several = [fact for fact in facts if len({row[fact] for row in rows}) > 1]

    def words(row: dict[str, str], names: Iterable[str]) -> str:
        return ", ".join(facts[name].format(row[name]) for name in names)

    names = {"ddp": "DDP", "ddp_zero_1": "ZeRO-1", "fsdp2": "FSDP2"}
    marks = dict(zip(names, "os^", strict=True))
    lines: dict[tuple[str, str, str], dict[int, float]] = {}
    for row in rows:
        if row["way"] != "one" and row["times_one"]:
            key = (words(row, several), row["way"], row["scaling"])
            lines.setdefault(key, {1: 1.0})[int(row["processes"])] = float(row["times_one"])
    groups, ways, scalings = (list(dict.fromkeys(part)) for part in zip(*lines, strict=True))
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    # A colour is a model and its rows where there are several of them, else a way.
    colours = {part: f"C{n}" for n, part in enumerate(groups if len(groups) > 1 else names)}
    for (group, way, scaling), times in lines.items():
        style = {"marker": marks[way], "color": colours[group if len(groups) > 1 else way]}
        style["linestyle"] = "-" if scaling == "weak" else ":"
        x = sorted(times)
        left.plot(x, [times[count] for count in x], **style)
        right.plot(x, [100 * times[count] / count for count in x], **style)
    ticks = sorted({count for times in lines.values() for count in times})
    grey: dict[str, Any] = {"color": "0.5", "linestyle": "--"}
    left.plot(ticks, ticks, zorder=0, **grey)
    right.axhline(100, zorder=0, **grey)
    left.set_yscale("log", base=2)
    left.set_yticks(ticks, ticks)
    left.set_ylabel("tokens a second, over those of one GPU")
    right.set_ylim(min(80, right.get_ylim()[0]), max(102, right.get_ylim()[1]))
    right.set_ylabel("tokens a second, in % of linear")
    for panel in (left, right):
        panel.set_xscale("log", base=2)
        panel.set_xticks(ticks, ticks)
        panel.minorticks_off()
        panel.set_xlabel("GPUs")
        panel.grid(color="0.9")
    keys = [{"color": colours[group], "label": group} for group in groups if len(groups) > 1]
    keys += [
        {"marker": marks[way], "color": colours.get(way, "0.3"), "label": names[way]}
        for way in ways
    ]
    if "strong" in scalings:
        keys += [{"color": "0.3", "label": "as many tokens a GPU"}] if "weak" in scalings else []
        keys += [{"color": "0.3", "linestyle": ":", "label": "as many tokens in all"}]
    keys += [grey | {"label": "linear"}]
    handles = [plt.Line2D([], [], **key) for key in keys]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    about = [words(rows[0], (fact for fact in facts if fact not in several))]
    about += [rows[0]["machine"], f"torch {rows[0]['torch']}"]
    figure.suptitle(", ".join(filter(None, about)), fontsize=10)
    save(figure, path)


# ---------------------------------------------------------------------------- compare

COMPARED = """
model: {{preset: {preset}}}
data: {{class_path: Addition, init_args: {{digits: 6, batch_size: 64}}}}
trainer:
  accelerator: {accelerator}
  max_steps: {steps}
  val_check_interval: {steps}
compile: {compile}
"""
ALLOWED = 1.1  # times the seconds of one run


def compare(given: argparse.Namespace) -> int:
    """One row: as many runs as there are GPUs, each on its own, beside one run."""
    names = gpus(given.accelerator)
    count = given.processes or len(names)
    if count < 2 or (names and count > len(names)):
        sys.exit(f"{count} runs on {len(names)} GPUs: it takes 2 runs, and a GPU for each")
    compared(1, 20, names, given)  # fills the caches
    seconds_one, one = compared(1, given.steps, names, given)
    seconds_all, every = compared(count, given.steps, names, given)
    row: dict[str, Any] = {"processes": count, "model": given.preset, "steps": given.steps}
    row |= {"compile": given.compile}
    row |= {"seconds_one": round(seconds_one, 2), "seconds_all": round(seconds_all, 2)}
    row |= {"ratio": round(seconds_all / seconds_one, 3), "allowed": ALLOWED}
    row |= {"tokens_per_second_one": one[0], "tokens_per_second_slowest": min(every)}
    print(row, "" if row["ratio"] <= ALLOWED else "MISSED", flush=True)
    names_row = ("processes", "model", "steps", "compile")
    write_rows("ranks-compare", [row], on_gpu=bool(names), replacing=names_row)
    return 0


def compared(
    count: int, steps: int, names: list[str], given: argparse.Namespace
) -> tuple[float, list[int]]:
    """Seconds of one `archzoo compare` of so many runs at once, and the tokens a second of each."""
    place = Path(given.root, f"{count}_{steps}")
    config = place.with_suffix(".yaml")
    config.write_text(COMPARED.format(**vars(given) | {"steps": steps}))
    environment = {"OMP_NUM_THREADS": "1"} | os.environ
    if names:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(names[:count])
    seeds = ",".join(map(str, range(count)))
    arguments = [str(config), "--seeds", seeds, "--output", str(place)]
    arguments += [] if names else ["--at_once", str(count)]
    begun = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "archzoo", "compare", *arguments], check=True, env=environment
    )
    seconds = time.perf_counter() - begun
    logs = [read_rows(path) for path in place.glob("runs/*/metrics.csv")]
    assert len(logs) == count
    return seconds, [
        rates([row for row in log if row["train/loss"]])["tokens_per_second"] for log in logs
    ]


# ---------------------------------------------------------------------------- rounding

WAYS: dict[str, dict[str, str]] = {
    "one": ONE,
    # Matrices start at 1 + 2^-23 times what they are: their last digit in float32.
    "rounding": {"--trainer.devices": "1", "--model.init_std": str(0.02 * (1 + 2**-23))},
    "ddp": ddp(2),
    "fsdp2": fsdp2(2),
}
PRECISIONS: dict[str, dict[str, str]] = {
    "float64": FLOAT64 | {"--trainer.max_steps": "10", "--trainer.val_check_interval": "10"},
    "float32": {"--trainer.precision": "32-true"},
    "bf16-mixed": {"--trainer.precision": "bf16-mixed"},
}
TRAINING = ("train/loss", "train/gradient_norm", "train/loss/balance/0")
EQUAL = 1e-9  # in float64, relative


def mixture(name: str, flags: dict[str, str], given: argparse.Namespace) -> Log:
    """The log of one run of a Skywork mixture."""
    options = {
        "--name": name,
        "--trainer.default_root_dir": given.root,
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
    return fit(options | flags, given)


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


def rounding(given: argparse.Namespace) -> int:
    """One row a precision and way."""
    on_gpu = given.accelerator == "cuda"
    rows, wrong = [], []
    for precision in given.precisions or list(PRECISIONS)[: 3 if on_gpu else 2]:
        one = None
        for way, flags in WAYS.items():
            if way == "rounding" and precision != "float32":
                continue  # it is float32's last digit
            row: dict[str, Any] = {"way": way, "precision": precision}
            try:
                log = mixture(f"{way}_{precision}", flags | PRECISIONS[precision], given)
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
        print("; ".join(wrong), file=sys.stderr)
    return len(wrong)


# ---------------------------------------------------------------------------- bytes

MIXED = {"--trainer.precision": "bf16-mixed"}  # of DeepSpeed: weights and gradients in bf16
BUCKET = 20_000  # numbers that DeepSpeed exchanges at once; Lightning asks for 200 M, at any size
#: Bytes a parameter, by the number of processes: float32 weights, gradients and AdamW's two means,
#: or DeepSpeed's, whose weights and gradients are bf16 beside weights and means in float32.
FORMULAS: dict[str, Callable[[int], float]] = {
    "one": lambda n: 16,
    "ddp": lambda n: 16,
    "ddp_zero_1": lambda n: 8 + 8 / n,
    "fsdp2": lambda n: 16 / n,
    "deepspeed_stage_1": lambda n: 4 + 12 / n,
    "deepspeed_stage_2": lambda n: 2 + 14 / n,
    "deepspeed_stage_3": lambda n: 16 / n,
}


def deepspeed(stage: int) -> dict[str, str]:
    """Lightning's flags for a stage whose buffers are small beside the model."""
    return {
        "--trainer.strategy": "DeepSpeedStrategy",
        "--trainer.strategy.stage": str(stage),
        "--trainer.strategy.reduce_bucket_size": str(BUCKET),
        "--trainer.strategy.allgather_bucket_size": str(BUCKET),
    }


def storages(tensors: Iterable[Any]) -> int:
    """The bytes of the memory in which tensors lie on this process, each piece of it once."""
    local = [t.to_local() if hasattr(t, "to_local") else t for t in tensors if t is not None]
    memory = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in local}
    return sum(memory.values())


def alive() -> int:
    """The bytes of all numbers that are no integers and that tensors of this process hold."""
    gc.collect()
    # Of a compiler's tensors, and those that wrap others, none has memory of its own.
    kept = [part for part in gc.get_objects() if type(part) in (Tensor, torch.nn.Parameter)]
    kept = [part for part in kept if not (part.is_meta or torch._is_functional_tensor(part))]
    kept = [part for part in kept if part.is_floating_point()]
    # Python knows no gradient that nobody has asked for.
    return storages([*kept, *(part.grad for part in kept if part.is_leaf and part.requires_grad)])


class Held(lightning.Callback):
    """Measures what this process holds after the last step."""

    seen: ClassVar[dict[str, float]] = {}

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        count = sum(
            part.ds_numel if hasattr(part, "ds_numel") else part.numel()
            for part in pl_module.parameters()
        )
        self.seen["parameters"] = count

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step < trainer.max_steps:
            return
        found: dict[str, float] = {}
        if not uses_deepspeed(trainer.strategy):
            parameters = list(pl_module.parameters())
            found["weights"] = storages(parameters)
            found["gradients"] = storages(parameter.grad for parameter in parameters)
            optimizer = inner(trainer.optimizers[0])
            states = getattr(optimizer, "optim", optimizer).state.values()
            found["state"] = storages(v for state in states for v in state.values() if v.dim())
            found["held"] = sum(found.values())
        found["alive"] = alive()
        if pl_module.device.type == "cuda":
            found["allocated"] = torch.cuda.memory_allocated()
        count = self.seen["parameters"]
        most = torch.tensor([value / count for value in found.values()], device=pl_module.device)
        if trainer.world_size > 1:  # of the process that holds most
            torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        self.seen |= dict(zip(found, most.tolist(), strict=True))


def bytes_held(given: argparse.Namespace) -> int:
    """One row a way."""
    if "LOCAL_RANK" not in os.environ:
        # What DeepSpeed made stays in its process: each of its ways gets processes of its own.
        others = [way for way in given.ways if not way.startswith("deepspeed")]
        groups = [others, *([way] for way in given.ways if way not in others)]
        return max(in_processes(given.processes, WAYS=" ".join(each)) for each in groups if each)
    given.ways = os.environ["WAYS"].split()
    first = os.environ["LOCAL_RANK"] == "0"
    given.root = str(Path(given.root, os.environ["LOCAL_RANK"]))
    rows = []
    for way in given.ways:
        by_deepspeed = way.startswith("deepspeed")
        if way == "one":
            if not first:
                continue
            flags = ONE
        elif by_deepspeed:
            flags = {"--trainer.devices": str(given.processes)} | MIXED | deepspeed(int(way[-1]))
        else:
            flags = STRATEGIES[way](given.processes)
        count = 1 if way == "one" else given.processes
        options = {
            "--name": way,
            "--model.preset": given.preset,
            "--data": "Addition",
            "--data.digits": "2",
            "--data.batch_size": "8",
            "--compile": "false",
            "--trainer.precision": "32-true",
            "--trainer.default_root_dir": given.root,
            "--trainer.accelerator": given.accelerator,
            "--trainer.max_steps": "2",
            "--trainer.limit_val_batches": "0",
            "--trainer.enable_progress_bar": "false",
            "--trainer.enable_checkpointing": "false",
            "--trainer.callbacks": "__main__.Held",
        }
        Held.seen.clear()
        imports = ["--import", given.imported] if given.imported and by_deepspeed else []
        parts = [*imports, *(part for option in (options | flags).items() for part in option)]
        if archzoo(["fit", *parts]):
            sys.exit(f"{way} failed: {' '.join(parts)}")
        row: dict[str, Any] = {"way": way, "processes": count, "model": given.preset}
        row["precision"] = "bf16-mixed" if by_deepspeed else "float32"
        row |= {name: round(value, 3) for name, value in Held.seen.items()}
        row["formula"] = round(FORMULAS[way](count), 3)
        if first:
            print(row, flush=True)
            rows.append(row)
        gc.collect()  # the model of this way, before the next is measured
    if first and given.write:
        named = ("way", "processes", "model")
        write_rows("ranks-bytes", rows, on_gpu=given.accelerator == "cuda", replacing=named)
    return 0


# ---------------------------------------------------------------------------- the command line


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parts = parser.add_subparsers(required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--accelerator", choices=("cuda", "cpu"), default="cuda")
    part = parts.add_parser("equal", parents=[common])
    part.add_argument("--processes", type=int, default=2)
    runs = [f"{way}/{family}" for family in FAMILIES for way in (*STRATEGIES, BLOCKS)]
    part.add_argument("--runs", nargs="+", choices=runs, default=runs, help="[all of them]")
    part.add_argument("--write", action="store_true", help="rows in results/")
    part.set_defaults(run=equal)

    part = parts.add_parser("speed", parents=[common])
    part.add_argument("--devices", nargs="+", type=int, default=[1, 2], help="how many [1 2]")
    part.add_argument("--strong", action="store_true", help="the same tokens in all, too")
    part.add_argument("--beside", action="store_true", help="let all runs compile at once")
    part.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES))
    part.add_argument("--text", default=str(ROOT / "data" / "*.txt"))
    part.add_argument("--presets", nargs="+", default=["retnet_base"])
    part.add_argument("--vocab_size", type=int, default=32000, help="0: characters [32000]")
    part.add_argument("--lengths", nargs="+", type=int, default=[2048])
    part.add_argument("--tokens", type=int, default=32768, help="a step and process [32768]")
    part.add_argument("--steps", type=int, default=120)
    part.add_argument("--compile", nargs="+", choices=("true", "false"), default=["true", "false"])
    part.set_defaults(run=speed)

    part = parts.add_parser("compare", parents=[common])
    part.add_argument("--processes", type=int, default=0, help="runs at once [one a GPU]")
    part.add_argument("--preset", default="retnet_small")
    part.add_argument("--steps", type=int, default=1000, help="of each run [1000]")
    part.add_argument("--compile", choices=("true", "false"), default="false")
    part.set_defaults(run=compare)

    part = parts.add_parser("rounding", parents=[common])
    part.add_argument("--size", default="small", help="of the skywork family [small]")
    part.add_argument("--steps", type=int, default=40, help="float64: 10 [40]")
    part.add_argument("--batch_size", type=int, default=32, help="windows, all ranks together")
    part.add_argument("--context_length", type=int, default=512)
    part.add_argument(
        "--precisions", nargs="+", choices=PRECISIONS, help="default: all; no bf16-mixed on a CPU"
    )
    part.set_defaults(run=rounding)

    part = parts.add_parser("bytes", parents=[common])
    part.add_argument("--processes", type=int, default=2)
    part.add_argument("--preset", default="retnet_small")
    ways = [way for way in FORMULAS if not way.startswith("deepspeed")]
    part.add_argument("--ways", nargs="+", choices=FORMULAS, default=ways)
    part.add_argument("--import", dest="imported", help="a module, before runs by DeepSpeed")
    part.add_argument("--write", action="store_true", help="rows in results/")
    part.set_defaults(run=bytes_held)

    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="archzoo-ranks-") as given.root:
        status: int = given.run(given)
        return status


if __name__ == "__main__":
    sys.exit(main())
