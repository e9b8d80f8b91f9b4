"""A unigram model of sentencepiece as a `tokenizer.json`, which `AutoTokenizer` reads."""

from __future__ import annotations

import json
import random
import re
import struct
from collections.abc import Iterator
from typing import Any

from archzoo.tasks.tokenizers import SentencePieceTokenizer

#: Kinds of subwords, and of models, as sentencepiece numbers them.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
UNIGRAM = 1
#: Blanks, line ends, digits, letters that no model knows, names of subwords: to be cut alike.
HARD = (
    " a  b\n\n c\t\u00a0d \n", "0123456789 12.50", "<unk><s></s><0x41><0xFF>",
    "\u2581 \u2581\u2581", "\u00fc\u4e09\U0001f600e\u0301\ufeff", "don't, 'tis; O! (x) -- \"y\"",
    "\r\n\x0b",
)  # fmt: skip


def fields_of(message: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a message of protocol buffers: its number, and an int or bytes."""
    place = 0

    def number() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = message[place]
            place += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while place < len(message):
        key = number()
        kind = key & 7
        if kind == 0:
            yield key >> 3, number()
            continue
        size = {1: 8, 5: 4}[kind] if kind != 2 else number()
        yield key >> 3, message[place : place + size]
        place += size


def subwords_of(model: bytes) -> list[tuple[str, float, int]]:
    """Each subword of a sentencepiece model with its score and its kind."""
    found = []
    for field, content in fields_of(model):
        if field == 1:
            subword: dict[int, Any] = {2: b"\0\0\0\0", 3: NORMAL} | dict(fields_of(content))
            score: float = struct.unpack("<f", subword[2])[0]
            found.append((subword[1].decode(), score, subword[3]))
    return found


def settings_of(model: bytes, field: int) -> dict[int, Any]:
    """One of the other messages of a model by its fields: 2 the trainer's, 3 the normalizer's."""
    return dict(fields_of(dict(fields_of(model)).get(field, b"")))


def unigram_file(tokenizer: SentencePieceTokenizer) -> dict[str, Any]:
    """The content of a `tokenizer.json` that gives the same tokens.

    Raises:
        ValueError: It is not a unigram model, or the two differ on some text.
    """
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Library

    trainer, normalizer = (settings_of(tokenizer.model, field) for field in (2, 3))
    if trainer.get(3, UNIGRAM) != UNIGRAM:
        raise ValueError("the tokenizer is a sentencepiece model of another kind than unigram")
    subwords = subwords_of(tokenizer.model)
    scores = [score for _, score, kind in subwords if kind == NORMAL]
    lowest = min(scores, default=0.0)
    library = Library(
        models.Unigram(
            # The library finds every subword in a text: others than normal ones get no good score.
            [(subword, score if kind == NORMAL else lowest) for subword, score, kind in subwords],
            unk_id=tokenizer.processor.unk_id(),
            byte_fallback=any(kind == BYTE for _, _, kind in subwords),
        )
    )
    steps: list[Any] = [normalizers.Precompiled(normalizer[2])] if normalizer.get(2) else []
    if normalizer.get(4, True):  # blanks at the ends, and of several all but one
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if normalizer.get(3, True):  # a blank before the text
        steps.append(normalizers.Prepend(" "))
    library.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "\u2581")])
    # Nor may a subword's name in a text be that subword: it is cut after the first character.
    names = [
        p for p, _, kind in subwords if kind in (UNKNOWN, CONTROL, UNUSED, BYTE) and len(p) > 1
    ]
    cut = "|".join(f"{re.escape(name[0])}(?={re.escape(name[1:])})" for name in names)
    if cut:
        library.pre_tokenizer = pre_tokenizers.Split(Regex(cut), "isolated")
    library.add_tokens(
        [AddedToken(p, normalized=False) for p, _, kind in subwords if kind == USER_DEFINED]
    )
    after = [decoders.Strip(" ", 1, 0)] if normalizer.get(3, True) else []
    library.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *after]
    )
    for text in probes(subwords):
        if library.encode(text, add_special_tokens=False).ids != tokenizer.encode(text):
            raise ValueError(f"as a tokenizer.json the sentencepiece model cuts {text!r} otherwise")
    content: dict[str, Any] = json.loads(library.to_str())
    return content


def probes(subwords: list[tuple[str, float, int]], count: int = 300) -> Iterator[str]:
    """Texts to compare two tokenizers on: subwords in any order, and what is hard."""
    yield from HARD
    normal = [p.replace("\u2581", " ") for p, _, k in subwords if k in (NORMAL, USER_DEFINED)]
    draw = random.Random(0)
    for _ in range(count):
        yield "".join(draw.choices([*normal, *HARD], [8] * len(normal) + [1] * len(HARD), k=40))
