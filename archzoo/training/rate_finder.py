"""A range test of learning rates, which suggests one."""

from __future__ import annotations

import logging
import tempfile
from typing import Any

import lightning
from lightning.pytorch.tuner.tuning import Tuner

from archzoo.training.module import LanguageModel

STEPS, LEAST, MOST = 100, 1e-6, 1.0


def find_learning_rate(trainer: lightning.Trainer, model: LanguageModel, task: Any) -> float | None:
    """Lightning's: train for 100 steps with a rate that rises from 1e-6 to 1, and change nothing.

    The suggestion is where the loss, smoothed, falls fastest (Smith, arXiv 1506.01186, section 3.3,
    looks for the same by eye).

    Args:
        trainer: Of no other use afterwards.
        model: The same.
        task: Its data.

    Returns:
        The rate, or None where the loss never fell.
    """
    log = logging.getLogger("lightning.pytorch.tuner.lr_finder")
    log.setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as place:  # for the weights, which it brings back
        trainer._default_root_dir = place  # type: ignore[attr-defined]
        found = Tuner(trainer).lr_find(
            model,
            datamodule=task,
            min_lr=LEAST,
            max_lr=MOST,
            num_training=STEPS,
            update_attr=False,
        )
    rate = None if found is None else found.suggestion()
    if rate is None:
        return None
    return float(f"{rate:.2g}")
