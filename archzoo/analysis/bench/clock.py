"""The callback by which `archzoo fit` tells `archzoo bench` how long its steps take."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import lightning
import torch

# What a run imports anyhow is no memory of its training.
import archzoo.training.command  # noqa: F401
from archzoo.analysis.bench.memory import begin_peak, resident_peak

BASELINE = begin_peak()


class StepClock(lightning.Callback):
    """Writes down the seconds of each step, from the start of one to that of the next.

    On a GPU by its own events, which are read when all is over, so that nothing waits for them.

    Args:
        path: Of a JSON file: `turns`, seconds, and `memory_bytes` of the whole run, validation
            included, at most.
        first: Steps before them.
    """

    def __init__(self, path: str, first: int) -> None:
        self.path, self.first = Path(path), first
        self.marks: list[Any] = []

    def on_train_batch_start(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if trainer.global_step < self.first:
            return
        if pl_module.device.type == "cuda":
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def teardown(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str
    ) -> None:
        pairs = zip(self.marks, self.marks[1:], strict=False)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
            turns = [1e-3 * begin.elapsed_time(end) for begin, end in pairs]
            memory = torch.cuda.max_memory_allocated()
        else:
            turns = [end - begin for begin, end in pairs]
            memory = resident_peak() - BASELINE
        self.path.write_text(json.dumps({"turns": turns, "memory_bytes": memory}))
