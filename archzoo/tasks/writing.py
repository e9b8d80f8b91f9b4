"""How a task writes the numbers of a text, between a person who types and a model that reads.

A model of ``Addition(reverse=True)`` was trained on ``71+52=24``, but a user types ``17+25=``.
Every way of prompting a model with text goes through `writing_of`: what a user types is converted
to how the task writes it, and the model's answer is converted back.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwyz"  # of hints and keys; x multiplies
HINT = "[A-Za-wyz]"


class Writing(NamedTuple):
    """How a task writes numbers; the default is how people do.

    Attributes:
        reverse: The numbers of problems are least significant digit first.
        reverse_answer: The same of what follows ``=``.
        zero_padded: The numbers of a problem have as many digits as its longest.
        hints: A letter before each digit says which digit of its number it is.
        in_text: Problems are in a text whose other numbers are written as people do: a problem
            is what has no blank in it and a ``=``.
        characters: All that its texts are made of. None: whatever has a token.
    """

    reverse: bool = False
    reverse_answer: bool = False
    zero_padded: bool = False
    hints: bool = False
    in_text: bool = False
    characters: str | None = None

    def write(self, text: str) -> str:
        """What a person types as the task writes it: ``17+25=`` to ``71+52=``.

        Raises:
            ValueError: It holds a character that the model was never shown.
        """
        unknown = [] if self.characters is None else [c for c in text if c not in self.characters]
        if unknown:
            raise ValueError(
                f"character {unknown[0]!r} in {text!r} is not one of those that the model was "
                f"trained on ({self.characters!r}): remove it"
            )
        if self.is_plain:
            return text
        if not self.in_text:
            return "".join(map(self._problem, text.splitlines(keepends=True)))
        return re.sub(r"\S*=\S*", lambda chunk: self._problem(chunk[0]), text)

    @property
    def is_plain(self) -> bool:
        """Whether numbers are written as people do."""
        return self._replace(characters=None) == PLAIN

    def _problem(self, line: str) -> str:
        if self.hints and re.search(f"{HINT}[0-9]", line):
            return line  # typed as the task writes it: hints cannot be told from keys
        problem, equal, answer = line.partition("=")
        numbers = re.findall("[0-9]+", problem)
        longest = max(map(len, numbers), default=0) if self.zero_padded else 0
        keys = [letter for letter in line if letter in LETTERS]
        first = LETTERS.index(keys[0]) if keys and self.hints else 0

        def number(digits: str, reverse: bool) -> str:
            units_first = digits[::-1]
            if self.hints:
                hint = (LETTERS[(first + place) % len(LETTERS)] for place in range(len(digits)))
                places = [letter + digit for letter, digit in zip(hint, units_first, strict=True)]
            else:
                places = list(units_first)
            return "".join(places if reverse else reversed(places))

        problem = re.sub("[0-9]+", lambda n: number(n[0].zfill(longest), self.reverse), problem)
        answer = re.sub("[0-9]+", lambda n: number(n[0], self.reverse_answer), answer)
        return problem + equal + answer

    def reader(self, prompt: str) -> Reader:
        """What converts generated text back, after a prompt as the task writes it."""
        return Reader(self, prompt)

    def read(self, text: str, prompt: str = "") -> str:
        """What a model wrote, as a person reads it: ``24`` to ``42`` after ``71+52=``."""
        reader = self.reader(prompt)
        return reader.push(text) + reader.finish()


PLAIN = Writing()  # as people do


class Reader:
    """Streamed text as a person reads it: a number waits until its last digit is there.

    Args:
        writing: Of the task.
        prompt: What comes before, as the task writes it.
    """

    def __init__(self, writing: Writing, prompt: str) -> None:
        self.writing, self.waiting = writing, ""
        plain = writing.is_plain
        self._held = None if plain else r"\S*\Z" if writing.in_text else r"[0-9A-Za-z]*\Z"
        self._number = re.compile(f"(?:{HINT}[0-9])+" if writing.hints else "[0-9]+")
        self._ends = r"\s" if writing.in_text else r"\n"  # of a problem
        self.answering = "=" in re.split(self._ends, prompt)[-1]

    def push(self, text: str) -> str:
        """Takes more text, returns what is now certain, maybe nothing."""
        if self._held is None:
            return text
        text = self.waiting + text
        held = re.search(self._held, text)
        certain = len(text) if held is None else held.start()
        self.waiting = text[certain:]
        return self._read(text[:certain])

    def finish(self) -> str:
        """The rest, when nothing more comes."""
        rest, self.waiting = self.waiting, ""
        return self._read(rest)

    def _read(self, text: str) -> str:
        # Problems, what separates them, problems, ...
        parts = re.split(f"({self._ends})", text)
        for index in range(0, len(parts), 2):
            if index:
                self.answering = False
            problem, equal, answer = ("", "", parts[index])
            if not self.answering:
                problem, equal, answer = parts[index].partition("=")
                self.answering = bool(equal)
            if equal or not self.writing.in_text:
                problem = self._reverse(problem, self.writing.reverse)
            parts[index] = problem + equal + self._reverse(answer, self.writing.reverse_answer)
        return "".join(parts)

    def _reverse(self, text: str, reverse: bool) -> str:
        def number(found: re.Match[str]) -> str:
            digits = found[0][1::2] if self.writing.hints else found[0]
            return digits[::-1] if reverse else digits

        return self._number.sub(number, text)


def writing_of(task: Mapping[str, Any] | None) -> Writing:
    """How a task writes numbers, from what a checkpoint keeps of it.

    Args:
        task: ``{"class_path": ..., "init_args": {...}}``, or None, which is how people write.
    """
    given = task.get("init_args") if task else None
    if not isinstance(given, Mapping):
        return PLAIN
    in_text = "problem_arguments" in given
    if in_text:
        given = {"reverse": True} | dict(given["problem_arguments"] or {})  # the problems' default
    reverse, answer = bool(given.get("reverse")), given.get("reverse_answer")
    characters = task.get("characters") if task else None
    writing = Writing(
        characters=characters if isinstance(characters, str) else None,
        reverse=reverse,
        reverse_answer=reverse if answer is None else bool(answer),
        zero_padded=bool(given.get("zero_padded")),
        hints=bool(given.get("hints")),
    )
    return writing._replace(in_text=in_text) if writing != PLAIN else writing
