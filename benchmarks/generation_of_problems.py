"""How fast problems are made, and what fraction of a training step that is.

    python benchmarks/generation_of_problems.py
    python benchmarks/generation_of_problems.py --device cuda

The rate is per second of one core's own time, so other programs on the machine change it little.
The fraction is that of making a batch in the time of a training step, which is what training loses
by it on a CPU. For a GPU the next batches are made while it works; there the loss is the time
of steps on new batches over that of steps on one batch, again and again.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import count, islice, repeat
from typing import Any
from unittest import mock

import torch
from harness import in_turn, write_rows

import archzoo
from archzoo.tasks import (
    Addition,
    BitwiseOr,
    Mixed,
    Multiplication,
    Sorting,
    Subtraction,
    Task,
    stream,
)
from archzoo.tasks.stream import Batch
from archzoo.training.losses import total_loss

REQUIRED = 200_000  # additions of 20 digits per second and core
SHARE = 0.05  # of a training step, at most
STEPS = 10  # in a row


def rate(task: Task, rounds: int = 15) -> float:
    """Examples per second of processor time, the median of some rounds."""
    loader = task.train_dataloader()
    batches = max(4096 // task.batch_size, 4)
    loader.batch(0)
    taken = []
    for number in range(1, rounds + 1):
        begin = time.process_time()
        for batch in range(batches):
            loader.batch(number * batches + batch)
        taken.append((time.process_time() - begin) / batches)
    return task.batch_size / statistics.median(taken)


def rates() -> list[dict[str, Any]]:
    """One row a task and batch size."""
    tasks: list[tuple[str, Task]] = [
        (f"addition, {digits} digits", Addition(digits, batch_size=batch_size))
        for digits, batch_size in ((20, 64), (20, 256), (20, 1024), (20, 8192), (7, 128))
    ]
    tasks += [
        ("addition, 20 digits, index hints", Addition(20, hints=True)),
        ("subtraction, 20 digits", Subtraction(20)),
        ("multiplication, 15 digits", Multiplication(15)),
        ("bitwise or, 20 digits", BitwiseOr(20)),
        ("sorting, 10 numbers of 10 digits", Sorting(10, 10)),
        ("sums in text, windows of 256", Mixed(batch_size=64)),
    ]
    rows = []
    for name, task in tasks:
        task.prepare()
        found = rate(task)
        required = REQUIRED if name == "addition, 20 digits" and task.batch_size >= 256 else ""
        verdict = "" if required == "" else " met" if found >= REQUIRED else " MISSED"
        print(
            f"{name:36s} batch {task.batch_size:5d}  {found:12,.0f} examples/s{verdict}", flush=True
        )
        rows.append(
            {
                "what": name,
                "batch_size": task.batch_size,
                "examples_per_second_and_core": round(found),
                "required": required,
            }
        )
    return rows


def step_of(preset: str, task: Addition, device: str) -> Callable[[Batch], Any]:
    """A training step: forward, backward, AdamW; bfloat16 products on a GPU."""
    net = archzoo.create_model(preset, vocab_size=task.vocab_size)
    net.bind(task, training=True)
    net = net.to(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=device == "cuda" or None)

    def step(batch: Batch) -> Any:
        batch = {name: entry.to(device, non_blocking=True) for name, entry in batch.items()}
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            x, _, _ = net.hidden(
                batch["tokens"], documents=batch["documents"], examples=batch["examples"]
            )
            loss = total_loss(x, net.head, batch["labels"]) / len(batch["tokens"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    return step


def fractions(device: str) -> list[dict[str, Any]]:
    """What training spends on making its batches."""
    sizes = {
        "cpu": [("abacus_tiny", 7, 128)],
        "cuda": [("abacus_tiny", 7, 1024), ("abacus_small", 20, 2048)],
    }[device]
    rows = []
    for preset, digits, batch_size in sizes:
        task = Addition(digits, batch_size=batch_size, steps_per_epoch=10**9)
        step = step_of(preset, task, device)
        with mock.patch.object(stream, "_on_gpu", return_value=device == "cuda"):
            new = iter(task.train_dataloader())
            same = next(new)
            loader, numbers = task.train_dataloader(), count()

            def several(batches: Iterator[Batch], step: Callable[[Batch], Any] = step) -> None:
                for batch in islice(batches, STEPS):
                    loss = step(batch)
                loss.item()

            sides: dict[str, Callable[[], Any]] = {
                "making": lambda loader=loader, numbers=numbers: [
                    loader.batch(number) for number in islice(numbers, STEPS)
                ],
                "same": lambda batch=same: several(repeat(batch)),
            }
            if device == "cuda":
                sides["new"] = lambda batches=new: several(batches)
            times = in_turn(sides, rounds=7, warmup=2)
        making, without = times["making"] / STEPS, times["same"] / STEPS
        loop = times["new"] / STEPS if device == "cuda" else without + making
        fraction, lost = making / without, loop / without - 1
        verdict = "met" if lost <= SHARE else "MISSED"
        print(
            f"{preset}, {digits} digits, batch {batch_size}: making {making:.3f} ms, a step "
            f"{without:.3f} ms, fraction {fraction:.1%}; steps on new batches {loop:.3f} ms, "
            f"{lost:+.1%}: {verdict}",
            flush=True,
        )
        rows.append(
            {
                "what": f"{preset}, {digits} digits",
                "batch_size": batch_size,
                "making_ms": round(making, 3),
                "step_ms": round(without, 3),
                "share": round(fraction, 4),
                "step_on_new_batches_ms": round(loop, 3),
                "lost": round(lost, 4),
                "required": SHARE,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    device = parser.parse_args().device
    if device == "cpu":
        torch.set_num_threads(1)  # two on a busy machine measure how they wait for each other
    if device == "cpu":
        write_rows("problems", rates())
    dtype = "float32" if device == "cpu" else "bf16"
    write_rows(f"{dtype}-problems-share", fractions(device), on_gpu=device == "cuda")


if __name__ == "__main__":
    main()
