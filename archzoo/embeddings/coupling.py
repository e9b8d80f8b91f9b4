"""Position coupling: tokens that belong together share a position.

Digits of equal significance have equal positions, wherever they are, and the operators come
just below the units. The answer is written least significant digit first; the numbers of the
problem as people write them, or reversed as well::

    tokens      6    5    3    +    0    4    9    =    2    0    7    0  stop
    position    4    3    2    1    4    3    2    1    2    3    4    5    0

Source: Cho et al., Position Coupling, arXiv 2405.20671, section 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from archzoo.documents import Context, make_context
from archzoo.embeddings.counter_random import STARTS, examples_of, integers, random_bits
from archzoo.embeddings.digits import Coupling, DigitEmbedding, DigitTask, count_digits
from archzoo.states import State


def coupled_positions(
    tokens: Tensor,
    digit_tokens: Sequence[int],
    operator_tokens: Sequence[int],
    *,
    documents: Tensor | None = None,
    prompt: Coupling = "reversed",
) -> Tensor:
    """Positions of whole lines: digits ``1 + significance`` (units 1), operators 1, others 0.

    A number that follows the last of the operators is an answer, and counts from its first digit;
    the others count from there too where they are reversed, else from their last digit.

    Args:
        tokens: (batch, time) int64, numbers of a problem complete.
        digit_tokens: Of 0 to 9.
        operator_tokens: Of + and the like; the last of them is followed by the answer.
        documents: (batch, time), -1 for padding; None: a row is one document.
        prompt: How the numbers of a problem are written.

    Returns:
        (batch, time) int64; also where a text is continued by counting on: the digit after = gets
        2, the next 3.
    """
    is_digit = torch.isin(tokens, tokens.new_tensor(list(digit_tokens)))
    is_operator = torch.isin(tokens, tokens.new_tensor(list(operator_tokens)))

    def count(is_digit: Tensor, documents: Tensor | None) -> Tensor:
        context, _ = make_context(*tokens.shape, documents=documents, device=tokens.device)
        return count_digits(is_digit, context, None)

    up = significance = count(is_digit, documents)
    if prompt == "plain":
        flipped = None if documents is None else documents.flip(1)
        down = count(is_digit.flip(1), flipped).flip(1)
        before = torch.arange(tokens.shape[1], device=tokens.device) - up  # what a number follows
        is_answer = (before >= 0) & (tokens.gather(1, before.clamp(min=0)) == operator_tokens[-1])
        significance = torch.where(is_answer, up, down)
    positions = torch.where(is_digit, significance + 1, is_operator.long())
    return positions if documents is None else positions * (documents >= 0)


class PositionCoupling(DigitEmbedding):
    """``x_t = norm(words[token_t] + table[position_t])``, positions coupled by the task.

    The batches of the task hold them (``positions``, as `coupled_positions` makes them), and a
    text continues by counting, which is right for an answer whose units come first. In training
    every position but 0 is shifted by one k for all of an example, ``k ~ U{0 .. max_position -
    m}``, m the largest position of the example, a function of (seed, example number): whatever
    its length, an example may reach the table's last row. In evaluation k = 0. Since m is known
    only with the whole example, training takes whole documents in a call.

    Source: Cho et al., Position Coupling, arXiv 2405.20671, sections 4 and 5; they start at 1 to
    max_position minus the answer's length, which is the same.

    Args:
        vocab_size: Tokens.
        dim: Width of x.
        max_position: The largest position: sums of two numbers of max_position - 2 digits read
            it.
        digit_tokens: The tokens of 0 to 9. None: the task's tokenizer says.
        operator_tokens: Of + and the like, = last. None: the task says.
        prompt: How the numbers of a problem are written, for a prompt that comes as text:
            "reversed" or "plain". None: the task says.
        longest_run: Digits of the longest number in training, answers included. None: the task
            says.
        normalise: RMS norm of the sum.
        std: Standard deviation of words and rows at the start; None: the decoder's init_std.
        seed: Of the shifts.

    Raises:
        ValueError: Training on a task without coupled positions, or on numbers too long.
    """

    trains_on_whole_documents = True  # the shift is drawn by the largest position of all

    contract_arguments: ClassVar[dict[str, Any]] = {
        "digit_tokens": list(range(3, 13)),
        "operator_tokens": [13, 14],
        "max_position": 400,
    }

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        *,
        max_position: int = 128,
        digit_tokens: list[int] | None = None,
        operator_tokens: list[int] | None = None,
        prompt: Coupling | None = None,
        longest_run: int | None = None,
        normalise: bool = True,
        std: float | None = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            vocab_size,
            dim,
            max_position + 1,
            digit_tokens=digit_tokens,
            operator_tokens=operator_tokens,
            operators=True,
            longest_run=longest_run,
            normalise=normalise,
            std=std,
        )
        if prompt not in (None, "reversed", "plain"):
            raise ValueError(f"prompt={prompt!r} is neither reversed nor plain")
        self.max_position, self.prompt, self.seed = max_position, prompt, seed
        self.check_rows()

    def check_rows(self) -> None:
        """Refuse a table that the longest run does not fit in."""
        needed = (self.longest_run or 1) + 1
        if self.max_position < needed:
            raise ValueError(
                f"max_position={self.max_position} is too small: an answer of "
                f"{self.longest_run or 1} digits needs {needed} or more"
            )

    @property
    def coverage(self) -> int:
        """The longest number all of whose positions training reaches: the table's rows."""
        return self.max_position - 1

    @property
    def reason(self) -> str:
        """What the coverage is made of."""
        return f"max_position={self.max_position}"

    def bind(self, task: DigitTask, *, training: bool = False) -> dict[str, Any]:
        """As any digit embedding's; and the task must give coupled positions."""
        coupling = getattr(task, "coupling", None)
        if coupling is None:
            raise ValueError(
                "PositionCoupling takes its positions from the task, and this one gives none: "
                "set its argument coupled, or take AbacusEmbedding"
            )
        changed = super().bind(task, training=training)
        if self.prompt is None:
            self.prompt = changed["prompt"] = coupling
        elif self.prompt != coupling:
            raise ValueError(
                f"this model reads problems whose numbers are {self.prompt}, and the task writes "
                f"them {coupling}"
            )
        return changed

    def prompt_positions(self, tokens: Tensor, documents: Tensor | None = None) -> Tensor:
        """`coupled_positions` of prompts."""
        self.known_kinds()  # refuses what is not set
        if self.prompt is None:
            raise ValueError(
                "prompt is not set: say whether numbers are written reversed or plain, or train "
                "on a task, which knows it"
            )
        assert self.digit_tokens is not None and self.operator_tokens is not None
        return coupled_positions(
            tokens,
            self.digit_tokens,
            self.operator_tokens,
            documents=documents,
            prompt=self.prompt,
        )

    def forward(
        self, tokens: Tensor, state: State | None, context: Context
    ) -> tuple[Tensor, State | None]:
        """Tokens (batch, time) int64 to x (batch, time, dim)."""
        rows = context.positions
        self.watch(rows - 1)
        if self.training:
            way_out = "AbacusEmbedding with max_shift=0"
            bits = random_bits(self.seed, STARTS, examples_of(context, way_out))
            most = self.max_position - largest_of_document(rows, context)
            rows = torch.where(rows > 0, rows + integers(bits, most.clamp(min=0) + 1), rows)
        return self.look_up(tokens, rows.clamp(max=self.max_position)), state


def largest_of_document(values: Tensor, context: Context) -> Tensor:
    """The largest value in each token's document: (batch, time) int64, as values (0 or more)."""
    if not context.packed:
        return values.amax(dim=1, keepdim=True).expand_as(values)
    document = context.starts.cumsum(dim=1)  # which document of the row; 0: padding before them
    rows, time = values.shape
    largest = values.new_zeros(rows, time + 1).scatter_reduce(1, document, values, "amax")
    return largest.gather(1, document)
