"""Learned positions, from 0 or from a random start; and randomised positions for any method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from archzoo.block import Embedding
from archzoo.derivatives import followed
from archzoo.documents import Context
from archzoo.embeddings.counter_random import (
    STARTS,
    SUBSETS,
    examples_of,
    integers,
    random_bits,
    uniform,
)
from archzoo.embeddings.rows import RowEmbedding
from archzoo.numerics import for_float64
from archzoo.parts import build, describe
from archzoo.states import State


class LearnedPositions(RowEmbedding):
    """``x_t = words[token_t] + table[start + t]``, t counted within the document.

    In training ``start ~ U{0 .. max_start}``, one for a document, a function of (seed, example
    number); in evaluation it is 0. With max_start = 0 this is GPT's learned absolute position;
    with more, a table longer than the texts is trained to its end.

    Source: Vaswani et al., arXiv 1706.03762, section 3.5; random starts: Kiyono et al., SHAPE,
    arXiv 2109.05644, there for sinusoids.

    Args:
        vocab_size: Tokens.
        dim: Width of x.
        longest: Rows of the table: the tokens of the longest text, and max_start.
        max_start: The largest start.
        seed: Of the starts.
    """

    def __init__(
        self, vocab_size: int, dim: int, *, longest: int = 1024, max_start: int = 0, seed: int = 0
    ) -> None:
        if not 0 <= max_start < longest:
            raise ValueError(f"max_start={max_start} must lie in 0 .. longest - 1 = {longest - 1}")
        super().__init__(vocab_size, dim, longest)
        self.longest, self.max_start, self.seed = longest, max_start, seed

    def forward(
        self, tokens: Tensor, state: State | None, context: Context
    ) -> tuple[Tensor, State | None]:
        """Tokens (batch, time) int64 to x (batch, time, dim).

        Raises:
            ValueError: A text longer than the table (seen on the CPU; other devices refuse the
                row in their own words), or training with starts and without example numbers.
        """
        rows = context.positions
        if self.training and self.max_start:
            bits = random_bits(self.seed, STARTS, examples_of(context, "max_start=0"))
            rows = rows + integers(bits, self.max_start + 1)
        if tokens.device.type == "cpu" and not followed():
            last = int(rows.max())
            if last >= self.longest:
                raise ValueError(
                    f"position {last} is not one of the {self.longest} that LearnedPositions has: "
                    "take a larger longest, or a shorter text"
                )
        return self.look_up(tokens, rows), state


class RandomisedPositions(Embedding):
    """Another embedding, and positions that jump: all parts see a sorted sample of 0 .. longest-1.

    In training a document of n tokens has n positions drawn from ``0 .. longest - 1``, as a
    function of (seed, example number)::

        id_t = t + floor(U_(t) (longest - n + 1)),   U_(0) <= U_(1) <= ... sorted uniform numbers

    so that rotations, biases and tables are trained as far as `longest`, whatever the length. In
    evaluation nothing is drawn: ``id_t = floor(t longest / text_length)``, evenly spaced, so that
    a text can be continued token by token.

    Source: Ruoss et al., arXiv 2305.16843, section 3. There one sample serves a batch and
    evaluation draws as well; here each document has its own, and evaluation is deterministic.

    Training takes whole documents in a call. Not for mixers that count tokens by their positions:
    retention's normaliser is one.

    Args:
        vocab_size: Tokens.
        dim: Width of x.
        embedding: Of the tokens, by name, or as class_path and init_args.
        longest: Positions to draw from; at least the tokens of the longest text.
        text_length: Tokens of the longest text in evaluation, spread over all of longest.
        seed: Of the samples.
    """

    keeps_init = True  # the decoder finds the embedding inside
    trains_on_whole_documents = True  # positions are drawn by how many tokens there are

    contract_arguments: ClassVar[dict[str, Any]] = {"longest": 700, "text_length": 320}

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        *,
        embedding: str | dict[str, Any] = "TokenEmbedding",
        longest: int = 2048,
        text_length: int = 512,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 1 <= text_length <= longest:
            raise ValueError(
                f"text_length={text_length} must lie in 1 .. longest={longest}: each token needs "
                "a position of its own"
            )
        self.spec = describe("embedding", embedding)
        self.embedding = build("embedding", self.spec, vocab_size, dim)
        if type(self.embedding).prompt_positions is not Embedding.prompt_positions:
            raise ValueError(
                f"{type(self.embedding).__name__} takes its positions from the task, so none can "
                "be drawn for it: use it alone"
            )
        self.longest, self.text_length, self.seed = longest, text_length, seed

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The table of words, (vocab_size, dim)."""
        weight: Tensor = self.embedding.weight
        return weight

    def init_state(
        self,
        batch_size: int,
        *,
        capacity: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        """The inner embedding's."""
        inner: State = self.embedding.init_state(
            batch_size, capacity=capacity, device=device, dtype=dtype
        )
        return inner

    def bind(self, task: Any, *, training: bool = False) -> dict[str, Any]:
        """The inner embedding's."""
        changed = self.embedding.bind(task, training=training)
        self.spec = self.spec | {"init_args": self.spec["init_args"] | changed}
        return {"embedding": self.spec} if changed else {}

    def check_prompts(self, prompts: Sequence[Sequence[int]]) -> None:
        """The inner embedding's."""
        self.embedding.check_prompts(prompts)

    @property
    def coverage(self) -> int | None:
        """The inner embedding's."""
        covered: int | None = self.embedding.coverage
        return covered

    def assign_positions(self, context: Context) -> Context:
        """The context with positions spread over 0 .. longest - 1."""
        context = self.embedding.assign_positions(context)
        positions = context.positions
        if not self.training:
            spread = torch.div(positions * self.longest, self.text_length, rounding_mode="floor")
            return context._replace(positions=spread)
        examples = examples_of(context, "another embedding")
        # Sorted uniform numbers are partial sums of n + 1 exponential ones, over their total.
        device, starts, valid = positions.device, context.starts, context.valid
        examples, positions, starts, valid = map(for_float64, (examples, positions, starts, valid))
        gaps = -uniform(random_bits(self.seed, SUBSETS, examples, positions)).log()
        after = -uniform(random_bits(self.seed, SUBSETS, examples, self.longest)).log()
        # Which document of the row: 0 is the padding before the first.
        document = starts.cumsum(dim=1)
        rows, time = document.shape
        lengths = document.new_zeros(rows, time + 1).scatter_add(1, document, valid.long())
        totals = gaps.new_zeros(rows, time + 1).scatter_add(1, document, gaps * valid)
        sums = (gaps * valid).cumsum(dim=1)
        begin = torch.where(starts, sums - gaps, 0).cummax(dim=1).values
        fraction = (sums - begin) / (totals.gather(1, document) + after)
        choices = self.longest - lengths.gather(1, document) + 1
        ids = positions + (fraction * choices).floor().long().clamp(min=0)
        return context._replace(positions=(ids * valid).to(device))

    def forward(
        self, tokens: Tensor, state: State | None, context: Context
    ) -> tuple[Tensor, State | None]:
        """The inner embedding's x; `assign_positions` has changed the context."""
        x, state = self.embedding(tokens, state, context)
        return x, state
