"""What each head of a model still holds of a text, token by token."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from archzoo.analysis.window import HeadWindow, windows
from archzoo.decoder import Decoder
from archzoo.tasks.writing import writing_of

if TYPE_CHECKING:
    from archzoo.demo.decoding import Side


def heads_by_layer(model: Decoder) -> list[list[HeadWindow]]:
    """The heads of each layer, with their decays."""
    return [list(heads) for _, heads in groupby(windows(model), key=lambda head: head.layer)]


def differ_by_layer(layers: list[list[HeadWindow]]) -> bool:
    """Whether it matters which layer's heads are shown."""
    return len({tuple(head.gamma for head in heads) for heads in layers}) > 1


def weights(gamma: float, tokens: int) -> list[float]:
    """How much of each of the last tokens a head still holds: gamma^distance, oldest first."""
    held: list[float] = [gamma**distance for distance in range(tokens - 1, -1, -1)]
    return held


def prompt_chunks(side: Side, prompt: str) -> list[str]:
    """A prompt as the text of each of its tokens."""
    from archzoo.tasks.tokenizers import StreamDecoder

    decoder = StreamDecoder(side.tokenizer)
    written = writing_of(side.model.task).write(prompt)
    return [decoder.push(token) for token in side.tokenizer.encode(written)]
