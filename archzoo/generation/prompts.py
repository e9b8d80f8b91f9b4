"""Prompts of any kind as tokens, and rows of different lengths as one batch."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from archzoo.tasks.writing import PLAIN, Writing

if TYPE_CHECKING:
    from archzoo.tasks.tokenizers import Tokenizer

Prompts = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | Tensor


def listed(prompts: Any) -> Prompts:
    """Prompts without what a tensor, or another array, is beside its numbers.

    Raises:
        ValueError: They are nothing that could be prompts.
    """
    given: Prompts = prompts.tolist() if hasattr(prompts, "tolist") else prompts
    if not isinstance(given, Sequence):
        raise ValueError(f"prompts={given!r}: give a text, tokens, or a list of texts or of tokens")
    return given


def encode(
    prompts: Prompts,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    writing: Writing = PLAIN,
    *,
    continues: bool = False,
) -> list[list[int]]:
    """Prompts of any kind as tokens, a list for each; see `generate`.

    Args:
        prompts: As `generate` takes them.
        tokenizer: Of the text.
        vocab_size: Tokens the model knows.
        writing: How the model's task writes the numbers of a text.
        continues: Something was read before, so that a prompt may be empty.

    Raises:
        ValueError: What `generate` says of prompts.
    """
    if tokenizer is not None and tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the model knows {vocab_size}: "
            "they do not belong together"
        )
    given: Any = listed(prompts)
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        given = [given]
    if not given:
        raise ValueError("there is no prompt: give at least one")
    rows: list[list[int]] = []
    for number, prompt in enumerate(given):
        if isinstance(prompt, str):
            if tokenizer is None:
                raise ValueError("a prompt that is text needs a tokenizer; tokens need none")
            prompt = tokenizer.encode(writing.write(utf8(f"prompt {number}", prompt)))
        try:
            row = [index(token) for token in prompt]
        except TypeError:
            raise ValueError(
                f"prompt {number} is {str(prompt)[:40]}: a prompt is text, or a list of tokens, "
                "which are integers"
            ) from None
        if not row and not continues:
            raise ValueError(f"prompt {number} is empty: a model needs a token to start from")
        wrong = [token for token in row if not 0 <= token < vocab_size]
        if wrong:
            raise ValueError(
                f"token {wrong[0]} in prompt {number} is not one of the model's 0 to "
                f"{vocab_size - 1}"
            )
        rows.append(row)
    return rows


def utf8(name: str, text: str) -> str:
    """A text, or one line where it came from bytes that are not UTF-8, as a shell may give them."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        byte = f"byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"U+{code:04X}"
        raise ValueError(
            f"{name} is not valid UTF-8, {byte} at position {error.start}: give it as UTF-8 text"
        ) from None
    return text


def pad_left(rows: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Rows of different lengths as one batch, so that all end together.

    Returns:
        tokens and documents (batch, time) int64, documents -1 at padding; None where no row needs
        any, since masks can be skipped then.
    """
    longest = max(map(len, rows))
    filled = [[0] * (longest - len(row)) + row for row in rows]
    tokens = torch.tensor(filled, dtype=torch.int64, device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    if (lengths == longest).all():
        return tokens, None
    padding = torch.arange(longest, device=device) < longest - lengths[:, None]
    return tokens, -padding.long()
