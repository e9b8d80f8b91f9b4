"""`archzoo fit` itself as a side: a command in a process of its own, as a user starts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from archzoo.analysis.bench.contenders import CLIP, DECODING, FIT, SIGNS, Precision, ZooContender
from archzoo.trust import user_imports

CLOCK = "archzoo.analysis.bench.clock"
STEPS = {"cuda": (20, 100), "cpu": (2, 5)}  # before the clock runs, and while it does
PROFILED = 4  # steps after them
PRECISIONS = {"float32": "32-true", "bfloat16": "bf16-true", "bf16-mixed": "bf16-mixed"}


class FitContender(ZooContender):
    """What `archzoo fit` trains: a preset of the zoo, with parts and arguments of it changed.

    It reads a text of random characters, as many different ones as the model knows tokens, and
    clips gradients as configs/text.yaml does; all else is the command's own choice.

    Args:
        text: As `ZooContender`'s, with ``fit`` behind a colon.
        match: The same.
    """

    trains = True

    def __init__(self, text: str, match: bool = True) -> None:
        super().__init__(":".join(part for part in text.split(":") if part != FIT), match)
        self.name = text
        if self.form or self.compiled:
            raise ValueError(f"{text}: archzoo fit chooses the form, and whether to compile")
        self.without |= dict.fromkeys(("prefill", *DECODING), "it is training alone")

    def build(self, device: str, precision: Precision, training: bool) -> None:
        self.device, self.precision = torch.device(device), precision

    def parameters(self) -> int:
        return self.count

    def facts(self) -> dict[str, Any]:
        return super().facts() | {"fit": True}

    def training_run(self, length: int, batch: int, vocab_size: int) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix="archzoo-bench-") as folder:
            place = Path(folder)
            settings = self.run_settings(place, length, batch)
            count = max(40 * length, settings["trainer"]["max_steps"] * batch * length, 4_000)
            count = min(count, max(40 * length, 2_000_000))
            text = random_text(count, vocab_size, digits=self.knows_digits)
            (place / "text.txt").write_text(text, encoding="utf-8")
            (place / "fit.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
            command = [sys.executable, "-m", "archzoo", "fit", "--config", str(place / "fit.yaml")]
            for module in (*user_imports, CLOCK):
                command += ["--import", module]
            # OMP_NUM_THREADS: torch's own choice is of the whole machine.
            environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
            ended = subprocess.run(
                command, capture_output=True, text=True, env=environment, check=False
            )
            times = place / "times.json"
            if ended.returncode or not times.exists():
                raise _error(ended)
            found: dict[str, Any] = json.loads(times.read_text())
            return found

    def run_settings(self, place: Path, length: int, batch: int) -> dict[str, Any]:
        """Of the run, plain data.

        Args:
            place: A directory for its files.
            length: Tokens of a row.
            batch: Rows of a step.
        """
        first, steps = STEPS[self.device.type]
        last = first + steps + 1 + PROFILED * self.profiled
        match = "parameters" if self.matched else None
        clock = {"path": str(place / "times.json"), "first": first, "steps": steps}
        clock |= {"profile": self.profiled}
        model = {"preset": self.preset, "match": match, "vocab_size": self.vocab_size}
        data = {
            "path": str(place / "text.txt"),
            "tokenizer": "characters",
            "context_length": length,
            "batch_size": batch,
            "cache_dir": str(place / "cache"),
        }
        gpus = 1 if self.device.index is None else [self.device.index]
        return {
            "name": "fit",
            "model": {"dropout": 0.0, **model, **self.changed},
            "data": {"class_path": "Text", "init_args": data},
            "trainer": {
                "default_root_dir": str(place),
                "accelerator": "gpu" if self.device.type == "cuda" else "cpu",
                "devices": gpus if self.device.type == "cuda" else 1,
                "precision": PRECISIONS[self.precision],
                "max_steps": last,
                "gradient_clip_val": CLIP,
                "val_check_interval": last,
                "limit_val_batches": 2,
                "enable_checkpointing": False,
                "callbacks": [{"class_path": f"{CLOCK}.StepClock", "init_args": clock}],
            },
        }


def random_text(count: int, vocab_size: int, digits: bool = False) -> str:
    """Characters drawn from as many different ones, all of which come.

    Args:
        count: Of them, if the different ones are not more.
        vocab_size: How many different ones.
        digits: The first of them are digits and signs, for models that must know which are.
    """
    codes = 0x4E00 + np.arange(vocab_size, dtype=np.uint32)  # from the first Chinese one on
    codes[codes >= 0xD800] += 0x800  # which are no characters
    if digits:
        codes[: len(SIGNS)] = [ord(sign) for sign in SIGNS]
    drawn = np.random.default_rng(0).integers(vocab_size, size=max(count - vocab_size, 0))
    chosen = codes[np.concatenate([np.arange(vocab_size), drawn])]
    return str(chosen.tobytes(), "utf-32-le")


def _error(ended: subprocess.CompletedProcess[str]) -> Exception:
    """Why a run was not measured."""
    said = (ended.stderr or ended.stdout).strip().splitlines() or ["it said nothing"]
    if ended.returncode == -9 or any("out of memory" in line for line in said):
        return MemoryError()
    return RuntimeError(f"archzoo fit ended with {ended.returncode}: {said[-1]}")
