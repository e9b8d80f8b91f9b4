"""What the task files of `tasks/` ask: made of the corpora that ship, and without a network.

Of a text that is its test part as `Text` cuts it by default, which no model of the zoo's own
configurations was trained on.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from archzoo import shipped
from archzoo.tasks.arithmetic import Addition
from archzoo.tasks.corpus import Corpus
from archzoo.tasks.text import Text

CONTEXT = 200  # characters before what is asked for
CHOICES = 4
MOST = 200  # documents of a task that asks about parts of a text


def shakespeare(**_: Any) -> dict[str, Any]:
    """The test part as one document."""
    return _split([{"text": held_out("shakespeare.txt")}])


def three_kingdoms(**_: Any) -> dict[str, Any]:
    """The test part as one document."""
    return _split([{"text": held_out("three_kingdoms.txt")}])


def last_words(**_: Any) -> dict[str, Any]:
    """Lines of Shakespeare without their last word, after what comes before them."""
    text = held_out("shakespeare.txt")
    found = []
    for match in re.finditer(
        r"^(?!\[)(\S+(?: \S+){4,}) ([A-Za-z]{3,})[^\w\s]*$", text, re.MULTILINE
    ):
        word = match.start(2)
        if match.start() >= CONTEXT:
            context = text[word - 1 - CONTEXT : word - 1]
            found.append({"context": context, "word": match[2]})
    return _split(_some(found))


def next_lines(**_: Any) -> dict[str, Any]:
    """The line that follows, among other lines of the same part."""
    text = held_out("shakespeare.txt")
    lines = [(m.start(), m[0]) for m in re.finditer(r"^(?!\[).{25,60}$", text, re.MULTILINE)]
    return _split(_choices(text, lines))


def next_sentences(**_: Any) -> dict[str, Any]:
    """The same for sentences of 三国演义."""
    text = held_out("three_kingdoms.txt")
    sentences = [(m.start(), m[0]) for m in re.finditer(r"(?<=。)[^。！？“”\s]{8,30}。", text)]
    return _split(_choices(text, sentences))


def additions(**_: Any) -> dict[str, Any]:
    """Sums of numbers of up to three digits that `Addition` keeps out of training."""
    pairs = Addition(digits=3).pairs("test", 500)
    return _split([{"problem": f"{a}+{b}=", "answer": str(a + b)} for a, b in pairs])


def held_out(name: str) -> str:
    """The test part of a corpus that ships, as `Text` cuts it by default.

    Args:
        name: Of its file in data/.

    Raises:
        FileNotFoundError: It is not there.
    """
    path = Path(shipped.text(f"data/{name}"))
    if not path.is_file():
        raise FileNotFoundError(f"the corpus {name} is neither in data/ here nor with archzoo")
    arguments = Text(str(path)).arguments
    fractions = (arguments[f"{part}_fraction"] for part in ("validation", "test"))
    with Corpus(arguments["path"]) as text:
        parts, _ = text.split(*fractions)
        return "".join(text.texts(parts["test"]))


def _choices(text: str, found: Sequence[tuple[int, str]]) -> list[dict[str, Any]]:
    """Documents that ask which of several strings comes next.

    Args:
        text: That they are from.
        found: Where strings begin in it, and they themselves.
    """
    generator = np.random.Generator(np.random.PCG64(0))  # the same for everyone
    documents = []
    for begin, right in _some([place for place in found if place[0] >= CONTEXT]):
        others = sorted({string for _, string in found} - {right})
        picked = [others[n] for n in generator.choice(len(others), CHOICES - 1, replace=False)]
        answer = int(generator.integers(CHOICES))
        picked.insert(answer, right)
        context = text[begin - CONTEXT : begin]
        documents.append({"context": context, "choices": picked, "answer": answer})
    return documents


def _some(found: list[Any]) -> list[Any]:
    """At most `MOST` of them, from all over the text."""
    return found[:: -(-len(found) // MOST)]


def _split(documents: list[dict[str, Any]]) -> dict[str, Any]:
    from datasets import Dataset

    return {"test": Dataset.from_list(documents)}
