"""Write your own task: what a batch holds, and it is trained on, tested, resumed and drawn.

    python examples/write_your_own_task.py

or from the command line, in this directory:

    archzoo fit --import write_your_own_task --model.preset retnet_micro \\
        --data write_your_own_task.Lookup --data.pairs 2 --trainer.max_steps 600
    archzoo test --import write_your_own_task --ckpt_path runs/retnet_micro/last.ckpt

The task below shows pairs of a letter and a digit and then the letters in another order, and asks
for the digit of each: in `a3c7b1c7a3b1` the last 7, 3 and 1. Models must look up what they have
read (associative recall; Arora et al., arXiv 2312.04927).

A batch is a function of its number, and no generator is kept: whatever the batch size, the number
of processes and the step at which a run was resumed, example n is example n.
"""

import argparse
import logging
import warnings

import lightning
import numpy as np
import torch

from archzoo.tasks import Task, draw
from archzoo.tasks.counter_random import random_bits
from archzoo.tasks.tokenizers import CharacterTokenizer
from archzoo.training.module import LanguageModel

LETTERS, DIGITS = "abcdefgh", "0123456789"
SPLITS = {"train": 0, "validation": 1, "test": 2}


class Lookup(Task):
    """Which digit stood after this letter?

    Args:
        pairs: How many are shown.
        batch_size: Examples in a batch, all processes together.
        test_examples: To validate on, and to test on.
        seed: Chooses the examples.
    """

    metrics = ("token_accuracy", "exact_match")

    def __init__(
        self, pairs: int = 4, batch_size: int = 64, test_examples: int = 500, seed: int = 0
    ) -> None:
        super().__init__()  # what a task is made with is written down, for checkpoints
        self.pairs, self.test_examples, self.seed = pairs, test_examples, seed
        self.context_length = 4 * pairs - 1  # the last digit is only ever a label
        self.tokenizer = CharacterTokenizer(LETTERS + DIGITS)

    def prepare(self):
        """Nothing is read, and nothing is learned."""

    def rows(self, split):
        return 1000 * self.batch_size if split == "train" else self.test_examples

    def training_batch(self, number, rows):
        return self.examples("train", number * self.batch_size + rows)

    def evaluation_batch(self, split, number, rows):
        return self.examples(split, number * self.batch_size + rows)

    def examples(self, split, numbers):
        """Tokens and labels of examples by their numbers, (examples, 4 * pairs - 1) each."""
        draws = random_bits(self.seed, SPLITS[split], numbers, len(LETTERS) + 2 * self.pairs).T
        some, values, order = np.split(draws, [len(LETTERS), len(LETTERS) + self.pairs], axis=1)
        letters = some.argsort(axis=1)[:, : self.pairs]  # all of them different
        digits = len(LETTERS) + (values % len(DIGITS)).astype(np.int64)
        again = order.argsort(axis=1)
        shown = np.stack([letters, digits], axis=2)  # (examples, pairs, 2)
        asked = np.take_along_axis(shown, again[:, :, None], axis=1)
        lines = np.concatenate([shown, asked], axis=1).reshape(len(numbers), 4 * self.pairs)
        tokens, labels = lines[:, :-1], lines[:, 1:].copy()
        labels[:, : 2 * self.pairs] = -100  # nothing is asked here,
        labels[:, 1::2] = -100  # nor where a letter follows
        return {"tokens": torch.from_numpy(tokens.copy()), "labels": torch.from_numpy(labels)}


def train(preset: str, task: Task, steps: int) -> float:
    """Train a model and test it: the share of digits that it finds."""
    torch.manual_seed(0)
    trainer = lightning.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = LanguageModel(preset, learning_rate=1e-2, warmup_steps=50, weight_decay=0.0)
    trainer.fit(model, task)
    (found,) = trainer.test(model, task, verbose=False)
    return found["test/exact_match"]


def main() -> None:
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()  # --help, or none
    torch.set_num_threads(1)  # at this size, threads only wait for each other
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*LeafSpec.*is deprecated.*")  # Lightning's own affair
    task = Lookup(pairs=2)
    print(draw(task), end="\n\n")
    right = train("retnet_micro", task, steps=600)
    print(f"retnet_micro answers {right:.0%} of {task.test_examples} rows right; chance is 1 %")


if __name__ == "__main__":
    main()
