"""`archzoo generate --chat`: a conversation in the terminal, whose state is carried on."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

from archzoo.decoder import Decoder
from archzoo.generation.conversation import Conversation
from archzoo.generation.decoding import generate
from archzoo.tasks.tokenizers import Tokenizer

HELP = "a line is read and continued, an empty one lets the model write more; /new begins anew"


def chat(
    model: Decoder,
    tokenizer: Tokenizer,
    *,
    conversation: Conversation | None = None,
    lines: Iterator[str] | None = None,
    write: Callable[[str], Any] | None = None,
    **options: Any,
) -> Conversation | None:
    """Read a line, continue it, and so on until there are no more.

    Each line goes into the state that all before it left, after a line break where the vocabulary
    has one, and costs what its own tokens cost: nothing is read twice. A problem (a sum) is a
    document of its own, as in training, so each begins anew.

    Args:
        model: Any decoder.
        tokenizer: Its own.
        conversation: What was read before. None: nothing.
        lines: Without their line breaks. None: what is typed.
        write: Shows a piece of text. None: on the screen.
        **options: Of `generate`: max_tokens, temperature and so on.

    Returns:
        The conversation, or None where nothing was read.
    """
    problems = bool(getattr(tokenizer, "special", False))
    lines = _typed() if lines is None else lines
    write = _written if write is None else write
    for line in lines:
        if line.strip() == "/new":
            conversation = None
            continue
        if conversation is None and not line:
            continue
        held = None if problems and line else conversation
        prompt = line
        if held is not None and line and _has_line_break(tokenizer):
            prompt = "\n" + line

        def show(row: int, token: int | None, text: str) -> None:
            write(text + "\n" if token is None else text)

        try:
            found = generate(
                model,
                [prompt],
                tokenizer=tokenizer,
                on_token=show,
                conversation=held,
                keep_state=True,
                **options,
            )
        except ValueError as error:  # a character that it does not know: the conversation stays
            print(f"error: {error}", file=sys.stderr)
            continue
        conversation = found.conversation
    return conversation


def _has_line_break(tokenizer: Tokenizer) -> bool:
    try:
        return bool(tokenizer.encode("\n"))
    except ValueError:
        return False


def _typed() -> Iterator[str]:
    """Lines of the terminal, or of a file or pipe, until they end."""
    asks = sys.stdin.isatty()
    if asks:
        print(f"{HELP}; Ctrl-D ends")
    while True:
        try:
            yield input("> " if asks else "")
        except EOFError:
            if asks:
                print()
            return


def _written(text: str) -> None:
    print(text, end="", flush=True)
