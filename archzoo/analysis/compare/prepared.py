"""What an arm starts from where a command makes it of what was trained: a merge, a binary model."""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from archzoo.names import nearest
from archzoo.training.ending import SIGNALS, Ended
from archzoo.trust import user_imports

COMMANDS = ("binarise", "merge", "upcycle")  # each writes a model by --out
PLACES = re.compile(r"\{[^{}]*\}")  # in a command: {seed}, {base.yaml}, {experts.yaml:plus}


def read_prepared(given: Any, arms: list[str], whose: str) -> dict[str, tuple[str, ...]]:
    """The words of each arm's command, of a file's `prepare`: commands by the arms' names.

    Args:
        given: What the file holds; None: nothing is prepared.
        arms: The arms' names.
        whose: For messages: the file's name.

    Raises:
        ValueError: A command does not write a model, or an arm is unknown.
    """
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise ValueError(f"{whose}: prepare is {given!r}: it takes commands by the arms' names")
    found = {}
    for name, text in given.items():
        about = f"{whose}: prepare"
        if name not in arms:
            there = nearest(str(name), arms) if arms else "it has none"
            raise ValueError(f"{about}: no arm is called {name!r}; {there}")
        try:
            words = tuple(shlex.split(text)) if isinstance(text, str) else ()
        except ValueError as error:
            raise ValueError(f"{about}: {name}: {text!r}: {error}") from None
        if not words or words[0] not in COMMANDS:
            raise ValueError(
                f"{about}: {name} is {text!r}: it takes a command of {', '.join(COMMANDS)}, such "
                "as binarise {base.yaml} --method OneBit"
            )
        if any(word.partition("=")[0] == "--out" for word in words):
            raise ValueError(f"{about}: {name}: omit --out: each run has a directory of its own")
        found[name] = words
    return found


def filled(words: Sequence[str], models: Mapping[str, str], seed: int) -> list[str]:
    """A command with what its braces stand for.

    Args:
        words: Of the command.
        models: By the part in braces, where the model lies.
        seed: Of the run.
    """
    known = {**models, "{seed}": str(seed)}
    return [PLACES.sub(lambda part: known[part[0]], word) for word in words]


def prepare(words: Sequence[str]) -> None:
    """Run a command of archzoo in this process, quietly.

    Raises:
        ValueError: It fails, by its own message.
        Ended: A signal ended it.
    """
    imports = [word for module in user_imports for word in ("--import", module)]
    said, before, status = io.StringIO(), sys.argv, None
    sys.argv = ["archzoo", *words, *imports]
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            runpy.run_module("archzoo", run_name="__main__")
    except SystemExit as end:
        status = end.code
    finally:
        sys.argv = before
    if SIGNALS.received is not None and status == 128 + SIGNALS.received:
        raise Ended(SIGNALS.received)  # which the command has caught
    if status:
        lines = [line for line in said.getvalue().splitlines() if line.strip()]
        last = lines[-1].removeprefix("error: ") if lines else f"exit status {status}"
        raise ValueError(f"prepare: {words[0]}: {last}")
