"""The tokenizer of a model: a file beside it, or bytes in a run's checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from archzoo.checkpoint.archives import Archive, Stored, check_json_depth
from archzoo.checkpoint.checks import first_line
from archzoo.decoder import Decoder

if TYPE_CHECKING:
    from archzoo.tasks.tokenizers import Tokenizer

TOKENIZER_LONGEST = 2**26  # bytes of a tokenizer's file


def tokenizer_of(files: dict[str, bytes], path: Path) -> Tokenizer:
    """The tokenizer of a file's name and content; `path` is for messages."""
    from archzoo.tasks.tokenizers import from_files

    try:
        for name, content in files.items():
            if name.endswith(".json"):
                check_json_depth(content.decode())
        return from_files(files)
    except Exception as error:  # the libraries behind it raise of many kinds
        raise ValueError(f"{path}: {first_line(error)}") from error


def run_tokenizer(archive: Archive, path: Path) -> Tokenizer | None:
    """The tokenizer that a run's checkpoint holds."""
    files = archive.content.get("tokenizer") or {}
    if isinstance(files, dict):
        stored = {name: file for name, file in files.items() if isinstance(file, Stored)}
        if sum(file.nbytes for file in stored.values()) > TOKENIZER_LONGEST:
            raise ValueError(f"{path} holds a tokenizer of more than {TOKENIZER_LONGEST:,} bytes")
        files = files | {name: archive.tensor(file) for name, file in stored.items()}
    contents = tokenizer_files({"tokenizer": files}, str(path))
    return tokenizer_of(contents, path) if contents else None


def tokenizer_files(checkpoint: dict[str, Any], whose: str = "the checkpoint") -> dict[str, bytes]:
    """The tokenizer's files that a run's checkpoint holds, for `tokenizers.from_files`.

    Args:
        checkpoint: Its content.
        whose: For messages.

    Raises:
        ValueError: It holds something else there, as a damaged file may.
    """
    files = checkpoint.get("tokenizer") or {}
    if not isinstance(files, dict) or not all(
        isinstance(content, Tensor) and content.dtype == torch.uint8 for content in files.values()
    ):
        raise ValueError(f"{whose} holds no tokenizer where it should")
    return {str(name): content.cpu().flatten().numpy().tobytes() for name, content in files.items()}


def check_vocabulary(model: Decoder, tokenizer: Tokenizer | None, path: str) -> None:
    """Refuse a tokenizer of more tokens than the model knows.

    Args:
        model: Whose vocabulary it must fit into.
        tokenizer: Or None.
        path: Of the checkpoint, for messages.
    """
    if tokenizer is not None and tokenizer.vocab_size > model.vocab_size:
        raise ValueError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens and the model knows "
            f"{model.vocab_size}: they do not belong together"
        )


def check_tokenizer(tokenizer: Tokenizer | None, path: str | Path) -> Tokenizer:
    """What reads and writes a model's text.

    Args:
        tokenizer: As `load` gives it.
        path: The checkpoint.

    Raises:
        ValueError: There is none.
    """
    if tokenizer is None:
        raise ValueError(
            f"{path} holds no tokenizer, so it takes no text: archzoo.save_pretrained(DIRECTORY, "
            "model, tokenizer) writes the model with one"
        )
    return tokenizer
