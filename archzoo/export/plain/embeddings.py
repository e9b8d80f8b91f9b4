"""Embeddings in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archzoo.embeddings.digits import count_digits
from archzoo.export.plain.core import Context, Mixed, RMSNorm, State, make_context


class TokenEmbedding(nn.Module):
    """One learned vector a token: ``x_t = table[token_t]``."""

    def __init__(self, vocab_size: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(vocab_size, dim))

    def init_state(self, batch_size: int, **options: Any) -> State:
        """Nothing is carried."""
        return {}

    def forward(self, tokens: Tensor, state: State | None, context: Context) -> Mixed:
        """Tokens (batch, time) int64 to x (batch, time, dim)."""
        return F.embedding(tokens, self.weight), state


class RowEmbedding(TokenEmbedding):
    """``x_t = norm(words[token_t] + table[row_t])``; a method says which row a token reads."""

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        rows: int,
        *,
        normalise: bool = False,
        std: float | None = None,  # of words and rows at the start; None: the model's init_std
    ) -> None:
        super().__init__(vocab_size, dim)
        self.table = TokenEmbedding(rows, dim)
        self.norm = RMSNorm(dim, eps=1e-6) if normalise else nn.Identity()
        self.rows = rows
        if std is not None:
            self.weight.data.mul_(std)
            self.table.weight.data.mul_(std)
            self.keeps_init = self.table.keeps_init = True  # type: ignore[assignment]

    def look_up(self, tokens: Tensor, rows: Tensor) -> Tensor:
        """Tokens and rows (batch, time) int64 to x (batch, time, dim)."""
        x: Tensor = self.norm(
            F.embedding(tokens, self.weight) + F.embedding(rows, self.table.weight)
        )
        return x


def drawn_by_document(bound: int | Tensor, context: Context) -> Tensor:
    """A random number 0 .. bound - 1 for each document, the same for all of its tokens."""
    drawn = torch.rand(context.positions.shape, device=context.positions.device)
    index = torch.arange(drawn.shape[1], device=drawn.device)
    start = torch.where(context.starts, index, 0).cummax(dim=1).values
    return (drawn.gather(1, start) * bound).long()


class AbacusEmbedding(RowEmbedding):
    """``x_t = norm(words[token_t] + table[row_t])``, the row a digit's index in its number.

    ::

        tokens      3    +    2    3    6    =    5    3    6   stop
        plain       1    0    1    2    3    0    1    2    3    0
        coupled     2    1    2    3    4    1    2    3    4    0

    Numbers are written least significant digit first. In training all rows but 0 are shifted by one
    random k for a document, ``k ~ U{0 .. max_shift}``, so that short numbers train the rows that
    long ones will read. The state is the index where the text stopped.

    Source: McLeish et al., Transformers Can Do Arithmetic with the Right Embeddings,
    arXiv 2405.17399, section 3; coupled: after Cho et al., arXiv 2405.20671.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        *,
        digit_tokens: Sequence[int] = (),
        coupled: bool = False,
        operator_tokens: Sequence[int] = (),
        max_shift: int = 100,
        rows: int = 128,
        normalise: bool = True,
        std: float | None = 1.0,
    ) -> None:
        super().__init__(vocab_size, dim, rows, normalise=normalise, std=std)
        self.coupled, self.max_shift = coupled, max_shift
        self.digit_tokens, self.operator_tokens = list(digit_tokens), list(operator_tokens)

    def init_state(self, batch_size: int, **options: Any) -> State:
        """run: (batch,) int64, digits of the number that the text stopped in."""
        return {"run": torch.zeros(batch_size, dtype=torch.int64, device=options["device"])}

    def forward(self, tokens: Tensor, state: State | None, context: Context) -> Mixed:
        """Tokens (batch, time) int64 to x (batch, time, dim)."""
        is_digit = torch.isin(tokens, tokens.new_tensor(self.digit_tokens))
        before = None if state is None else state["run"]
        rows = count_digits(is_digit, context, before)  # type: ignore[arg-type]
        if state is not None:
            state = {"run": rows[:, -1]}
        if self.coupled:
            operators = torch.isin(tokens, tokens.new_tensor(self.operator_tokens))
            rows = rows + (is_digit | operators)
        rows = rows * context.valid
        if self.training:
            rows = torch.where(
                rows > 0, rows + drawn_by_document(self.max_shift + 1, context), rows
            )
        return self.look_up(tokens, rows.clamp(max=self.rows - 1)), state


def coupled_positions(
    tokens: Tensor,
    digit_tokens: Sequence[int],
    operator_tokens: Sequence[int],
    documents: Tensor | None = None,
    prompt: str = "reversed",
) -> Tensor:
    """Positions of whole lines: digits ``1 + significance`` (units 1), operators 1, others 0.

    ::

        tokens      6    5    3    +    0    4    9    =    2    0    7    0  stop
        position    4    3    2    1    4    3    2    1    2    3    4    5    0

    A number that follows the last of the operators is an answer, and counts from its first digit;
    the others count from there too where they are reversed, else from their last digit.

    Source: Cho et al., Position Coupling, arXiv 2405.20671, section 4.
    """
    is_digit = torch.isin(tokens, tokens.new_tensor(list(digit_tokens)))
    is_operator = torch.isin(tokens, tokens.new_tensor(list(operator_tokens)))

    def count(is_digit: Tensor, documents: Tensor | None) -> Tensor:
        context, _ = make_context(is_digit, documents)
        return count_digits(is_digit, context, None)  # type: ignore[arg-type]

    up = significance = count(is_digit, documents)
    if prompt == "plain":
        flipped = None if documents is None else documents.flip(1)
        down = count(is_digit.flip(1), flipped).flip(1)
        before = torch.arange(tokens.shape[1], device=tokens.device) - up  # what a number follows
        is_answer = (before >= 0) & (tokens.gather(1, before.clamp(min=0)) == operator_tokens[-1])
        significance = torch.where(is_answer, up, down)
    positions = torch.where(is_digit, significance + 1, is_operator.long())
    return positions if documents is None else positions * (documents >= 0)


class PositionCoupling(RowEmbedding):
    """``x_t = norm(words[token_t] + table[position_t])``, positions coupled by the task.

    A prompt's are `coupled_positions`, and a text continues by counting. In training every position
    but 0 is shifted by one random number for a document, so far that its largest may reach the
    table's last row: training takes whole documents in a call.

    Source: Cho et al., Position Coupling, arXiv 2405.20671, sections 4 and 5.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        *,
        max_position: int = 128,
        digit_tokens: Sequence[int] = (),
        operator_tokens: Sequence[int] = (),
        prompt: str = "reversed",
        normalise: bool = True,
        std: float | None = 1.0,
    ) -> None:
        super().__init__(vocab_size, dim, max_position + 1, normalise=normalise, std=std)
        self.max_position, self.prompt = max_position, prompt
        self.digit_tokens, self.operator_tokens = list(digit_tokens), list(operator_tokens)

    def prompt_positions(self, tokens: Tensor, documents: Tensor | None = None) -> Tensor:
        """`coupled_positions` of prompts."""
        signs = self.digit_tokens, self.operator_tokens
        return coupled_positions(tokens, *signs, documents, self.prompt)

    def forward(self, tokens: Tensor, state: State | None, context: Context) -> Mixed:
        """Tokens (batch, time) int64 to x (batch, time, dim)."""
        rows = context.positions
        if self.training:
            document = context.starts.cumsum(dim=1)
            largest = rows.new_zeros(len(rows), rows.shape[1] + 1)
            largest = largest.scatter_reduce(1, document, rows, "amax").gather(1, document)
            free = (self.max_position - largest).clamp(min=0)
            rows = torch.where(rows > 0, rows + drawn_by_document(free + 1, context), rows)
        return self.look_up(tokens, rows.clamp(max=self.max_position)), state


class LearnedPositions(RowEmbedding):
    """``x_t = words[token_t] + table[start + t]``, t counted within the document.

    In training ``start ~ U{0 .. max_start}``, one for a document; in evaluation it is 0.

    Source: Vaswani et al., arXiv 1706.03762, section 3.5; random starts: Kiyono et al., SHAPE,
    arXiv 2109.05644.
    """

    def __init__(
        self, vocab_size: int, dim: int, *, longest: int = 1024, max_start: int = 0
    ) -> None:
        super().__init__(vocab_size, dim, longest)
        self.longest, self.max_start = longest, max_start

    def forward(self, tokens: Tensor, state: State | None, context: Context) -> Mixed:
        """Tokens (batch, time) int64 to x (batch, time, dim)."""
        rows = context.positions
        if self.training:
            rows = rows + drawn_by_document(self.max_start + 1, context)
        return self.look_up(tokens, rows), state


class RandomisedPositions(nn.Module):
    """Another embedding, and positions that jump: all parts see a sorted sample of 0 .. longest-1.

    In training a document of n tokens has n positions drawn from ``0 .. longest - 1``, sorted; in
    evaluation ``floor(t longest / text_length)``, evenly spaced.

    Source: Ruoss et al., arXiv 2305.16843, section 3.
    """

    keeps_init = True  # the embedding inside is drawn

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        *,
        embedding: Any,
        longest: int = 2048,
        text_length: int = 512,
    ) -> None:
        super().__init__()
        self.embedding, self.longest, self.text_length = embedding, longest, text_length

    @property
    def weight(self) -> Any:
        """The table of words, (vocab_size, dim)."""
        return self.embedding.weight

    def init_state(self, batch_size: int, **options: Any) -> State:
        """The inner embedding's."""
        state: State = self.embedding.init_state(batch_size, **options)
        return state

    def assign_positions(self, context: Context) -> Context:
        """The context with positions spread over 0 .. longest - 1."""
        positions = context.positions
        if not self.training:
            spread = torch.div(positions * self.longest, self.text_length, rounding_mode="floor")
            return context._replace(positions=spread)
        # Sorted uniform numbers are partial sums of n + 1 exponential ones, over their total.
        valid, document = context.valid, context.starts.cumsum(dim=1)
        gaps = torch.empty(positions.shape, device=positions.device).exponential_() * valid
        none = gaps.new_zeros(len(gaps), gaps.shape[1] + 1)
        lengths = none.scatter_add(1, document, valid.to(gaps.dtype)).gather(1, document)
        totals = (none.exponential_(1.0)).scatter_add(1, document, gaps).gather(1, document)
        sums = gaps.cumsum(dim=1)
        begin = torch.where(context.starts, sums - gaps, 0).cummax(dim=1).values
        free = self.longest - lengths + 1
        ids = positions + ((sums - begin) / totals * free).floor().long().clamp(min=0)
        return context._replace(positions=ids * valid)

    def forward(self, tokens: Tensor, state: State | None, context: Context) -> Mixed:
        """The inner embedding's x."""
        x, state = self.embedding(tokens, state, context)
        return x, state
