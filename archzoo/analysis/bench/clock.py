"""The callback by which `archzoo fit` tells `archzoo bench` how long its steps take."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import lightning
import torch

# What a run imports anyhow does not count as memory of its training.
import archzoo.training.command  # noqa: F401
from archzoo.analysis.bench.memory import begin_peak, grown
from archzoo.analysis.bench.profile import kernels_of

BASELINE = begin_peak()


class StepClock(lightning.Callback):
    """Writes down the seconds of each step, from the start of one to that of the next.

    On a GPU by its own events, which are read when all is over, so that nothing waits for them.

    Args:
        path: Of a JSON file: `turns`, seconds, and `memory_bytes` of the whole run, validation
            included, at most.
        first: Steps before them.
        steps: How many are timed.
        profile: Profile all steps that follow: `kernels`, as `profile.kernels_of` gives them.
    """

    def __init__(self, path: str, first: int, steps: int, profile: bool = False) -> None:
        self.path, self.first, self.steps, self.profile = Path(path), first, steps, profile
        self.marks: list[Any] = []
        self.profiled = 0
        self.profiler: Any = None

    def on_train_batch_start(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if trainer.global_step < self.first:
            return
        if len(self.marks) > self.steps:
            if self.profile and self.profiler is None:
                self.profiler = torch.profiler.profile()
                self.profiler.__enter__()
            self.profiled += self.profile
            return
        if pl_module.device.type == "cuda":
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def on_validation_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        if self.profiler is not None:
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            self.profiler.__exit__(None, None, None)

    def teardown(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str
    ) -> None:
        pairs = zip(self.marks, self.marks[1:], strict=False)
        if self.marks and isinstance(self.marks[0], torch.cuda.Event):
            torch.cuda.synchronize()
            turns = [1e-3 * begin.elapsed_time(end) for begin, end in pairs]
            memory = torch.cuda.max_memory_allocated()
        else:
            turns = [end - begin for begin, end in pairs]
            memory = grown(BASELINE)
        found: dict[str, Any] = {"turns": turns, "memory_bytes": memory}
        if self.profiler is not None:
            found["kernels"] = kernels_of(self.profiler, self.profiled)
        self.path.write_text(json.dumps(found))
