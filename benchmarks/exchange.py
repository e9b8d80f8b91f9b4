"""How long a step of `archzoo fit` exchanges with other processes: a callback for ranks.py."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning
import torch
from turns import wait_for_turn

STEPS = 4  # the last of a run, which are profiled
COMPILED = 3  # steps after which nothing is compiled any more
Span = tuple[float, float]  # begin and end


def merged(spans: Iterable[Span]) -> list[Span]:
    """The same times, in order, without overlaps."""
    found: list[Span] = []
    for begin, end in sorted(spans):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((begin, end))
    return found


def outside(spans: Iterable[Span], others: Iterable[Span]) -> float:
    """How much of some times lies in none of others."""
    spans, others = merged(spans), merged(others)
    covered = sum(
        max(0.0, min(end, other_end) - max(begin, other_begin))
        for begin, end in spans
        for other_begin, other_end in others
    )
    return sum(end - begin for begin, end in spans) - covered


class Exchange(lightning.Callback):
    """Writes milliseconds a step of the first process's GPU, of the last steps, as JSON.

    `exchange_ms` is the time in NCCL's kernels, and `exposed_ms` what of it no other kernel ran
    beside.

    Args:
        path: Of the file. On a CPU there is none.
        in_turn: Wait once the step is compiled: each process writes PATH.RANK.ready and waits for
            PATH.go.
    """

    def __init__(self, path: str, in_turn: bool = False) -> None:
        self.path = Path(path)
        self.waits = in_turn
        self.profiler: Any = None

    def _wait(self, rank: int, on_gpu: bool) -> None:
        """Let other runs have the machine, until it is this one's turn."""
        self.waits = False
        if on_gpu:
            torch.cuda.synchronize()
        wait_for_turn(self.path, rank)

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.waits and trainer.global_step >= COMPILED:
            self._wait(trainer.global_rank, pl_module.device.type == "cuda")
        here = trainer.global_rank == 0 and pl_module.device.type == "cuda"
        if here and self.profiler is None and trainer.global_step >= trainer.max_steps - STEPS:
            torch.cuda.synchronize()
            self.profiler = torch.profiler.profile()
            self.profiler.__enter__()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.profiler is None or trainer.global_step < trainer.max_steps:
            return
        torch.cuda.synchronize()
        self.profiler.__exit__(None, None, None)
        spans: dict[bool, list[Span]] = {True: [], False: []}
        for event in self.profiler.events():
            # Ranges such as the optimizer's step have a name on the GPU, and are no work.
            if event.device_type.name == "CUDA" and not event.is_user_annotation:
                span = (event.time_range.start, event.time_range.end)
                spans["nccl" in event.name.lower()].append(span)
        self.profiler = None
        exchanged, computed = spans[True], spans[False]
        found = {
            "exchange_ms": outside(exchanged, []) / 1e3 / STEPS,
            "exposed_ms": outside(exchanged, computed) / 1e3 / STEPS,
        }
        self.path.write_text(json.dumps(found))
