"""Samples of what the model writes, while it is trained, by one flag."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import lightning
from lightning.fabric.utilities import rank_zero_only

from archzoo.generation import generate
from archzoo.inputs import IGNORED
from archzoo.tasks.writing import writing_of
from archzoo.training.callbacks import ShowProgress
from archzoo.training.module import LanguageModel
from archzoo.training.random_state import bring_back_random_state, random_state
from archzoo.training.trackers import write_texts

FILE = "samples.jsonl"
COUNT = 3  # texts of a sample
BEGINNING = 32  # tokens of a text that is continued, where the task asks no question
LONGEST = 64  # tokens that are written
TEMPERATURE = 0.8  # for texts; what has one right answer is not drawn


class SampleTexts(lightning.Callback):
    """Lets the model write a few texts every so often, into samples.jsonl and the trackers.

    Prompts are the first of the validation data: what comes before the first label where the task
    asks a question, and the beginning of the text otherwise. A question is answered by the most
    likely tokens, a text continued by tokens drawn with the step's own seed. The run does not
    depend on it: random numbers are put back, and the clock of tokens per second stands still.

    Args:
        every: Optimizer steps from one sample to the next.
        prompts: Texts to continue instead.
    """

    def __init__(self, every: int, prompts: list[str] | None = None) -> None:
        if every < 1:
            raise ValueError(f"sample_every={every} must be at least 1 optimizer step")
        self.every, self.prompts = every, prompts
        self._asked: list[tuple[list[int], str]] | None = None  # tokens, and what is wanted
        self._temperature = 0.0
        self._last = 0  # the step of the last sample

    def setup(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str
    ) -> None:
        if getattr(pl_module, "device_mesh", None) is not None:
            raise ValueError(
                "--sample_every decodes on one process, and FSDP2 cuts the weights: take "
                "--trainer.strategy ddp"
            )

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        self._last = trainer.global_step
        self._asked, self._temperature = None, 0.0  # those of an earlier run are another task's
        path = Path(trainer.default_root_dir, FILE)
        if trainer.global_step and trainer.is_global_zero and path.is_file():
            _forget_later(path, trainer.global_step)

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        step = trainer.global_step
        if step % self.every or step == self._last:
            return
        self._last = step
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        assert isinstance(pl_module, LanguageModel)
        before = random_state()
        with pl_module.not_training():
            try:
                rows = self._sample(trainer, pl_module, step)
            finally:
                bring_back_random_state(before, 0)
            self._show(trainer, step, rows)

    def _sample(
        self, trainer: lightning.Trainer, module: LanguageModel, step: int
    ) -> list[dict[str, Any]]:
        """Rows of prompt, text and, where there is one, the right answer."""
        task = module.task
        if task is None:
            raise ValueError("--sample_every needs a task, whose tokenizer writes the texts")
        if self._asked is None:
            self._asked = self._first(trainer, module)
        written = generate(
            module.net,
            self.prompts or [tokens for tokens, _ in self._asked],
            max_tokens=LONGEST,
            temperature=self._temperature,
            seed=step,
            tokenizer=task.tokenizer,
            graph=False,
        )
        texts = written.texts or []
        if self.prompts:
            return [
                {"prompt": prompt, "text": text}
                for prompt, text in zip(self.prompts, texts, strict=True)
            ]
        decode, writing = task.tokenizer.decode, writing_of(task.config())
        rows = []
        for (tokens, wanted), text in zip(self._asked, texts, strict=True):
            prompt = decode(tokens)
            row = {"prompt": writing.read(prompt), "text": text}
            rows.append(row | ({"wanted": writing.read(wanted, prompt)} if wanted else {}))
        return rows

    def _first(
        self, trainer: lightning.Trainer, module: LanguageModel
    ) -> list[tuple[list[int], str]]:
        """What the first rows of the validation data ask, and its answer."""
        assert module.task is not None
        loaders: Any = module.task.val_dataloader()
        batch = next(iter(loaders[0] if isinstance(loaders, list | tuple) else loaders))
        found: list[tuple[list[int], str]] = []
        for tokens, labels in zip(batch["tokens"].tolist(), batch["labels"].tolist(), strict=True):
            labelled = [index for index, label in enumerate(labels) if label != IGNORED]
            if len(found) == COUNT or not labelled:
                continue
            if labelled[0]:
                asked = tokens[: labelled[0] + 1]
                wanted = module.task.tokenizer.decode([labels[index] for index in labelled])
                found.append((asked, wanted))
            else:
                self._temperature = TEMPERATURE
                found.append((tokens[: min(BEGINNING, max(len(tokens) // 2, 1))], ""))
        if self.prompts:
            self._temperature = TEMPERATURE if any(not wanted for _, wanted in found) else 0.0
        return found

    @rank_zero_only
    def _show(self, trainer: lightning.Trainer, step: int, rows: list[dict[str, Any]]) -> None:
        path = Path(trainer.default_root_dir, FILE)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps({"step": step, **row}, ensure_ascii=False) + "\n")
        for logger in trainer.loggers:
            write_texts(logger, step, rows)
        bar = trainer.progress_bar_callback
        for row in rows:
            end = f"  (right: {row['wanted']})" if "wanted" in row else ""
            line = json.dumps(row["prompt"] + row["text"], ensure_ascii=False)[1:-1]
            text = f"step {step:>6}  sample: {line}{end}"
            bar.say(text) if isinstance(bar, ShowProgress) else print(text)


def _forget_later(path: Path, step: int) -> None:
    """Drop the samples after the step that a run is resumed at: they are written again."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = []
    for line in lines:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):  # a kill may have cut the last one short
            continue
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text("".join(kept), encoding="utf-8")
    os.replace(partial, path)
