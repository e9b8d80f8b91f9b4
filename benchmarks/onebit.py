"""What 1 bit a weight costs and saves: time and bytes of a token's product, and what models lose.

    python benchmarks/onebit.py product                    # on a GPU: against bf16
    python benchmarks/onebit.py product --device cpu       # against float32
    python benchmarks/onebit.py quality                    # dense, OneBit, BinaryMoS on sums

`product` times a Linear of one token against the same of 1 bit, by turns. The weights are those of
as many matrices as it takes for those of 1 bit to hold 100 MB, one after the other, so that none of
them comes out of a cache; on a GPU all in one CUDA graph. On a CPU each is also timed by itself, as
the caches have it. `quality` trains configs/addition.yaml, makes both kinds of binary model of it,
lets them learn from it by configs/onebit.yaml, packs them, and tests all of them on held-out sums.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import multiprocessing
import os
import statistics
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from harness import ROOT, in_turn, write_rows
from torch import Tensor, nn

import archzoo
from archzoo.checkpoint import load, save_pretrained
from archzoo.cli import main as command
from archzoo.conversion.binarise import bits_a_weight
from archzoo.linear import Linear

CYCLED = 100e6  # bytes
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "OneBit": (archzoo.OneBitLinear, {}),
    "OneBit, norm": (archzoo.OneBitLinear, {"norm": True}),
    "BinaryMoS": (archzoo.BinaryMoSLinear, {}),
}


def allowed(width: int, device: str) -> float | str:
    """The time that is aimed at, over the dense one's."""
    if width <= 1024:
        return 1.0
    return (0.25 if device == "cuda" else round(1 / 3, 3)) if width >= 4096 else ""


def cycle(linears: list[nn.Module], x: Tensor) -> Callable[[], None]:
    """A call of each."""

    def run() -> None:
        for linear in linears:
            linear(x)

    return run


def seconds_of_graphs(sides: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each side as a CUDA graph, by turns."""
    graphs = {}
    for name, run in sides.items():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()  # what is compiled and kept is made now
        torch.cuda.current_stream().wait_stream(stream)
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            run()
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 2):
        for name, graph in graphs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            if number >= 2:
                taken[name].append(begin.elapsed_time(end))
    return {name: statistics.median(times) for name, times in taken.items()}


@torch.no_grad()
def measure(width: int, kind: str, dtype: torch.dtype, given: argparse.Namespace) -> dict[str, Any]:
    """One width of one kind: a row."""
    on_gpu = given.device == "cuda"
    dense_dtype = torch.bfloat16 if on_gpu else torch.float32
    cls, arguments = KINDS[kind]
    with torch.device(given.device):
        first = cls(width, {"y": width}, packed=True, **arguments).to(dtype)
        size = first.bits() // 8
        count = max(math.ceil(CYCLED / size), 2) if on_gpu else 1
        count = min(count, given.matrices or count)
        if not on_gpu:  # of floats, which a small machine's memory must hold
            count = max(math.ceil(CYCLED / (4 * width**2)), 2)
        packed = [first, *(cls(width, {"y": width}, packed=True, **arguments).to(dtype)
                           for _ in range(count - 1))]  # fmt: skip
        dense = [Linear(width, {"y": width}).to(dense_dtype) for _ in range(count)]
        x = torch.randn(1, 1, width)
    xs = {"dense": x.to(dense_dtype), "packed": x.to(dtype)}
    sides = {"dense": cycle(dense, xs["dense"]), "packed": cycle(packed, xs["packed"])}
    times = seconds_of_graphs(sides, given.rounds) if on_gpu else in_turn(sides, given.rounds)
    row: dict[str, Any] = {
        "width": width,
        "kind": kind,
        "dtype": str(dtype).removeprefix("torch."),
        "against": str(dense_dtype).removeprefix("torch."),
        "threads": "" if on_gpu else torch.get_num_threads(),
        "matrices": count,
        "dense_us": round(times["dense"] / count * 1e3, 2),
        "packed_us": round(times["packed"] / count * 1e3, 2),
        "ratio": round(times["packed"] / times["dense"], 3),
        "allowed": allowed(width, given.device),
        "dense_bytes": width**2 * dense_dtype.itemsize,
        "packed_bytes": size,
        "bytes_ratio": round(size / (width**2 * dense_dtype.itemsize), 4),
        "bits_a_weight": round(bits_a_weight(first), 3),
    }
    if not on_gpu:
        one = {"dense": cycle(dense[:1], xs["dense"]), "packed": cycle(packed[:1], xs["packed"])}
        alone = in_turn(one, given.rounds, warmup=3, repeat=10)
        row["dense_cached_us"] = round(alone["dense"] * 1e3, 2)
        row["packed_cached_us"] = round(alone["packed"] * 1e3, 2)
        row["cached_ratio"] = round(alone["packed"] / alone["dense"], 3)
    return row


def product(given: argparse.Namespace) -> None:
    """Time every width and kind."""
    on_gpu = given.device == "cuda"
    if given.threads:
        torch.set_num_threads(given.threads)
    dtypes = [torch.bfloat16, torch.float32] if on_gpu else [torch.float32]
    widths = [int(width) for width in given.widths.split(",")]
    for width, kind, dtype in itertools.product(widths, KINDS, dtypes):
        row = measure(width, kind, dtype, given)
        ratios = [row["ratio"], *([row["cached_ratio"]] if "cached_ratio" in row else [])]
        late = row["allowed"] and any(ratio > row["allowed"] for ratio in ratios)
        print(
            f"{width:6d} {kind:13s} {row['dtype']:9s} {row['packed_us']:9.1f} us, dense "
            f"{row['dense_us']:9.1f}: {' and '.join(map(str, ratios))} of its time, "
            f"{row['bytes_ratio']:.3f} of its bytes{'  MISSED' if late else ''}",
            flush=True,
        )
        what = f"{'bfloat16' if on_gpu else 'float32'}-onebit"
        write_rows(
            what, [row], on_gpu=on_gpu, replacing=("width", "kind", "dtype", "threads")
        )  # at once: what is measured stays


# ---------------------------------------------------------------------------- quality


def run(arguments: str) -> None:
    """A command of archzoo."""
    print(f"archzoo {arguments}", flush=True)
    if command(arguments.split()):
        raise SystemExit(f"archzoo {arguments} failed")


def options(seed: str, given: argparse.Namespace) -> str:
    """Of every run of a seed, which begins where they all lie."""
    if given.threads:
        torch.set_num_threads(given.threads)
    given.directory.mkdir(parents=True, exist_ok=True)
    os.chdir(given.directory)
    device = "gpu" if given.device == "cuda" else "cpu"
    steps = f" --trainer.max_steps {given.steps}" if given.steps else ""
    same = f"--trainer.enable_progress_bar false --trainer.accelerator {device}"
    return f"--seed_everything {seed} {same}{steps}"


def tested(
    place: Path, method: str, latent: str, seed: str, given: argparse.Namespace
) -> dict[str, Any]:
    """A directory of `save_pretrained` on the test data: a row."""
    run(f"test --model.weights {place} --name test_{place.name}")
    with Path(f"runs/test_{place.name}/test.csv").open() as file:
        last = list(csv.DictReader(file))[-1]
    loss = float(last["test/loss"])
    model = load(place).model
    return {
        "model": method,
        "latent": latent,
        "seed": seed,
        "steps": given.steps or 3000,
        "bits_a_weight": 32 if method == "dense" else round(bits_a_weight(model), 3),
        "file_bytes": (place / "model.safetensors").stat().st_size,
        "parameters": model.parameter_count(),
        "test_loss": round(loss, 5),
        "perplexity": round(math.exp(loss), 4),
        "exact_match": round(float(last["test/exact_match"]), 4),
    }


def teacher(seed: str, given: argparse.Namespace) -> dict[str, Any]:
    """Train the dense model, and test it."""
    own = options(seed, given)
    base, dense = Path(f"runs/addition_{seed}"), Path(f"dense_{seed}")
    if not (base / "last.ckpt").exists():
        run(f"fit --config {ROOT / 'configs/addition.yaml'} --name {base.name} {own}")
    if not dense.exists():
        found = load(base)
        save_pretrained(dense, found.model, found.tokenizer, found.task)
    return tested(dense, "dense", "", seed, given)


def student(method: str, latent: str, seed: str, given: argparse.Namespace) -> dict[str, Any]:
    """Make it binary, let that learn from it, pack and test."""
    own = options(seed, given)
    base, name = Path(f"runs/addition_{seed}"), f"{method}_{latent}_{seed}"
    packed = Path(f"{name}_packed")
    if not packed.exists():
        if not Path(name).exists():
            run(f"binarise {base} --out {name} --method {method} --latent {latent}")
        distil = f"--model.weights {name} --model.distil.teacher {base}"
        distil += f" --model.distil.form {method}"
        run(f"fit --config {ROOT / 'configs/onebit.yaml'} --name {name} {distil} {own}")
        run(f"binarise runs/{name} --out {packed} --packed")
    return tested(packed, method, latent, seed, given)


def quality(given: argparse.Namespace) -> None:
    """Every model of every seed, some at once: the table of docs/one_bit.md."""
    if given.threads:
        torch.set_num_threads(given.threads)  # which the rows say

    def keep(job: Future[dict[str, Any]]) -> dict[str, Any]:
        row = job.result()
        print(row, flush=True)
        write_rows(
            "float32-onebit-quality", [row], on_gpu=given.device == "cuda",
            replacing=("model", "latent", "seed"),
        )  # fmt: skip
        return row

    arms = list(itertools.product(("OneBit", "BinaryMoS"), given.latents.split(",")))
    # Not forked: torch's threads would not be there.
    with ProcessPoolExecutor(given.at_once, multiprocessing.get_context("spawn")) as pool:
        teachers = [pool.submit(teacher, seed, given) for seed in given.seeds.split(",")]
        seeds = (keep(job)["seed"] for job in as_completed(teachers))
        students = [pool.submit(student, *arm, seed, given) for seed in seeds for arm in arms]
        for job in as_completed(students):
            keep(job)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    available = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("what", choices=("product", "quality"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default=available)
    parser.add_argument("--widths", default="1024,2048,4096,8192")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=0, help="on a CPU; default: torch's")
    parser.add_argument("--matrices", type=int, default=0, help="on a GPU: at most so many")
    parser.add_argument("--seeds", default="0", help="of quality, with commas")
    parser.add_argument("--at_once", type=int, default=1, help="of quality: models at a time")
    parser.add_argument("--latents", default="weights", help="of quality: weights, signs or both")
    parser.add_argument("--steps", type=int, default=0, help="of quality; default: the files'")
    parser.add_argument("--directory", default="runs/onebit_quality", help="of quality's runs")
    given = parser.parse_args()
    given.directory = Path(given.directory).resolve()  # a worker's every job goes there
    product(given) if given.what == "product" else quality(given)


if __name__ == "__main__":
    main()
