"""`archzoo export`: a model as one file of plain PyTorch."""

from __future__ import annotations

from pathlib import Path

import torch

from archzoo.checkpoint import load
from archzoo.export.files import write_file
from archzoo.registry import create_model, list_models


def export_command(
    source: str, output: str | None = None, /, out: str | None = None, base: str | None = None
) -> None:
    """Write a model in a form that needs no archzoo.

    As model.py it is one file of plain PyTorch, of exactly the parts that the model uses, with the
    weights in model.pt beside it: it trains, and decodes from its state.

    Args:
        source: A run's directory, a .ckpt file, a directory of archzoo.save_pretrained, or the
            name of a preset, whose weights are drawn anew.
        output: What is written, a file that ends in .py; the same as --out.
        out: What is written; there must be none yet.
        base: Where the base of an adapted run lies. None: where it was.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        FileExistsError: There is something where the model is to be written.
        ValueError: A part that cannot be exported; the message names it.
    """
    if (output is None) == (out is None):
        raise ValueError("where is the model written? archzoo export CHECKPOINT model.py")
    target = Path(output or out or "")
    if target.suffix != ".py":
        raise ValueError(f"{target} does not end in .py: archzoo export CHECKPOINT model.py")
    preset = not Path(source).exists() and source in list_models()
    if preset:
        with torch.random.fork_rng(devices=[]):
            model = create_model(source)
    else:
        model = load(source, base=base).model
    lines = write_file(target, model, source if preset else "a model", weights=not preset)
    beside = "" if preset else f", and {target.with_suffix('.pt')}, its weights"
    print(f"{target}: {lines} lines, {model.parameter_count():,} parameters{beside}")
