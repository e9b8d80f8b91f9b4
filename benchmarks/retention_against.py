"""Times this tree's retention kernels against another's, in turn, in one process on one GPU.

    git archive COMMIT archzoo | tar -x -C OTHER
    python benchmarks/retention_against.py OTHER/archzoo

The other tree is copied, with its package renamed, so that both are imported side by side and see
the same tensors. Device times are those of CUDA graphs: a round replays each side's graph in turn,
the first side alternating, and a line's ratio is the median over rounds of this tree's time over
the other's. Host times are those of calls too small to keep the device busy. The gradients of the
two are compared, too.
"""

from __future__ import annotations

import argparse
import importlib
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import torch
from retention_kernels import (
    SHAPES,
    STEP_BATCHES,
    capture,
    eager_samples,
    inputs,
    log_decays,
    make_call,
)

Calls = dict[str, Callable[[], Any]]
NEW, OLD = "archzoo", "archzoo_other"


def load(folder: Path) -> dict[str, ModuleType]:
    """The kernels of both trees, by package."""
    place = Path(tempfile.mkdtemp())
    shutil.copytree(folder, place / OLD)
    for file in (place / OLD).rglob("*.py"):
        file.write_text(re.sub(r"\barchzoo\b", OLD, file.read_text()))
    sys.path.insert(0, str(place))
    return {name: importlib.import_module(f"{name}.kernels.retention") for name in (NEW, OLD)}


def first_of(retention: Callable[..., Any], *tensors: torch.Tensor) -> torch.Tensor:
    """The output without the state."""
    output: torch.Tensor = retention(*tensors)[0]
    return output


def compare(what: str, calls: Calls, rounds: int, per_call: int = 1) -> float:
    """Print a line; the ratio of the device's times."""
    for call in calls.values():
        for _ in range(2):
            call()
    torch.cuda.synchronize()
    graphs = {name: capture(call) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        names = list(graphs) if number % 2 else list(graphs)[::-1]
        for name in names:
            samples[name].append(median(eager_samples(graphs[name].replay, 6)[1:]) / per_call)
    ratio = median(new / old for new, old in zip(samples[NEW], samples[OLD], strict=True))
    times = ", ".join(f"{name} {median(found):.4f} ms" for name, found in samples.items())
    print(f"{what:42s} {times}, ratio {ratio:.3f}", flush=True)
    return ratio


def sequences(sides: dict[str, ModuleType], rounds: int, tokens: int) -> list[float]:
    """Whole sequences: the lines of `retention_kernels`."""
    ratios = []
    for (heads, dk, dv), times in SHAPES:
        for length in times:
            q, k, v, do = inputs(tokens // length, length, heads, dk, dv)
            decay = log_decays(heads)
            leaves = [x.requires_grad_() for x in (q, k, v)]
            results = {}
            for direction in ("forward", "forward+backward"):
                calls = {
                    name: make_call(partial(first_of, side.retention), leaves, do, decay, direction)
                    for name, side in sides.items()
                }
                results = {name: call() for name, call in calls.items()}
                what = f"{heads}x{dk}x{dv} T {length} {direction}"
                ratios.append(compare(what, calls, rounds))
            for new, old in zip(results[NEW], results[OLD], strict=True):
                if not torch.equal(new, old):
                    error = ((new.double() - old.double()).norm() / old.double().norm()).item()
                    print(f"    gradients differ by {error:.1e}", flush=True)
    return ratios


def steps(sides: dict[str, ModuleType], rounds: int) -> list[float]:
    """One token of decoding; states rotate so that no cache holds them."""
    ratios = []
    for heads, dk, dv in (shape for shape, _ in SHAPES):
        for batch in STEP_BATCHES:
            count = max(2, -(-(2**29) // (batch * heads * dk * dv * 4)))
            states = [torch.randn(batch, heads, dk, dv, device="cuda") for _ in range(count)]
            q, k, v, _ = inputs(batch, 1, heads, dk, dv)
            position, decay = torch.full((batch,), 100, device="cuda"), log_decays(heads)
            calls: Calls = {
                name: lambda side=side, states=states, q=q, k=k, v=v, decay=decay, at=position: [
                    side.retention_step(q, k, v, decay, state, at) for state in states
                ]
                for name, side in sides.items()
            }
            what = f"step {heads}x{dk}x{dv} batch {batch}"
            ratios.append(compare(what, calls, rounds, count))
    return ratios


def host(sides: dict[str, ModuleType], rounds: int) -> None:
    """Microseconds that the host takes for a call, the median of turns of 100 calls."""
    for heads, dk, dv, length in ((2, 64, 64, 128), (2, 64, 64, 2048), (2, 128, 256, 128)):
        q, k, v, do = inputs(1, length, heads, dk, dv)
        leaves, decay = [x.requires_grad_() for x in (q, k, v)], log_decays(heads)
        state = torch.zeros(1, heads, dk, dv, device="cuda")
        token = [x.detach()[:, :1].contiguous() for x in (q, k, v)]
        for what in ("forward", "forward+backward", "step"):
            calls: Calls = {}
            for name, side in sides.items():
                if what == "step":
                    calls[name] = partial(side.retention_step, *token, decay, state)
                    continue
                whole = partial(first_of, side.retention)
                calls[name] = make_call(whole, leaves, do, decay, what)
            taken: dict[str, list[float]] = {name: [] for name in calls}
            for _ in range(rounds + 1):
                for name, call in calls.items():
                    torch.cuda.synchronize()
                    begin = time.perf_counter()
                    with torch.no_grad() if what == "step" else torch.enable_grad():
                        for _ in range(100):
                            call()
                    taken[name].append((time.perf_counter() - begin) * 1e4)
            times = ", ".join(f"{name} {median(found[1:]):.1f}" for name, found in taken.items())
            print(f"host {heads}x{dk}x{dv} T {length} {what:17s} {times} us", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="the other tree's package, a folder `archzoo`")
    parser.add_argument("--tokens", type=int, default=32768, help="batch times length")
    parser.add_argument("--rounds", type=int, default=15, help="turns that each side takes")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("skipped: these kernels are timed on a CUDA device, and there is none")
        return
    print(torch.cuda.get_device_name(), torch.__version__)
    sides = load(arguments.folder)
    host(sides, arguments.rounds)
    found = sequences(sides, arguments.rounds, arguments.tokens)
    found += steps(sides, arguments.rounds)
    print(f"{len(found)} lines: median ratio {median(found):.3f}, largest {max(found):.3f}")


if __name__ == "__main__":
    main()
