"""`archzoo export`: a model in a form that needs no archzoo."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from archzoo.checkpoint import load
from archzoo.export.files import write_file
from archzoo.export.hugging_face import write_transformers
from archzoo.registry import create_model, list_models


def export_command(
    source: str,
    output: str | None = None,
    /,
    out: str | None = None,
    to: Literal["file", "transformers"] = "file",
    base: str | None = None,
    without_tokenizer: bool = False,
) -> None:
    """Write a model in a form that needs no archzoo.

    As model.py it is one file of plain PyTorch, of exactly the parts that the model uses, with the
    weights in model.pt beside it: it trains, and decodes from its state. --to transformers writes a
    directory that AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True) and
    AutoTokenizer load: the same source, weights, tokenizer and a model card; a Llama is written as
    one, and needs no remote code.

    Args:
        source: A run's directory, a .ckpt file, a directory of archzoo.save_pretrained, or the
            name of a preset, whose weights are drawn anew.
        output: What is written, a file that ends in .py or a directory; the same as --out.
        out: What is written; there must be none yet.
        to: "file" or "transformers".
        base: Where the base of an adapted run lies. None: where it was.
        without_tokenizer: To transformers: leave the tokenizer out.

    Raises:
        FileNotFoundError: The checkpoint does not exist.
        FileExistsError: There is something where the model is to be written.
        ValueError: A part that cannot be exported; the message names it.
    """
    if (output is None) == (out is None):
        raise ValueError("where is the model written? archzoo export CHECKPOINT model.py")
    target = Path(output or out or "")
    if to == "file" and target.suffix != ".py":
        raise ValueError(
            f"{target} does not end in .py: archzoo export CHECKPOINT model.py writes one file, "
            "--to transformers a directory"
        )
    preset = not Path(source).exists() and source in list_models()
    tokenizer = None
    if preset:
        with torch.random.fork_rng(devices=[]):
            model = create_model(source)
    else:
        found = load(source, base=base)
        model, tokenizer = found.model, None if without_tokenizer else found.tokenizer
    name = source if preset else "a model"
    if to == "transformers":
        kind = write_transformers(target, model, tokenizer, name=target.name, source=source)
        print(f"{target}: {kind}, {model.parameter_count():,} parameters")
        return
    lines = write_file(target, model, name, weights=not preset)
    beside = "" if preset else f", and {target.with_suffix('.pt')}, its weights"
    print(f"{target}: {lines} lines, {model.parameter_count():,} parameters{beside}")
