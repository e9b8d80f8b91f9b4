"""Abacus: each digit knows its index in its number.

A digit's row is its index in its run of digits, counted from 1 and shifted in training by a random
number, so that short numbers train the rows that long ones will read::

    tokens      3    +    2    3    6    =    5    3    6   stop
    plain       1    0    1    2    3    0    1    2    3    0
    coupled     2    1    2    3    4    1    2    3    4    0

Only where numbers are written least significant digit first do equal rows mean equal significance.

Source: McLeish et al., Transformers Can Do Arithmetic with the Right Embeddings,
arXiv 2405.17399, section 3; coupled: after Cho et al., Position Coupling, arXiv 2405.20671.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from archzoo.documents import Context
from archzoo.embeddings.counter_random import SHIFTS, examples_of, integers, key_of, random_bits
from archzoo.embeddings.digits import DIGIT, DigitEmbedding, count_digits
from archzoo.kernels import digits as kernels
from archzoo.states import State


class AbacusEmbedding(DigitEmbedding):
    """``x_t = norm(words[token_t] + table[row_t])``, the row a digit's index in its number.

    Rows: digits read their index in the run, from 1; all other tokens share row 0, a learned row
    like any other. Coupled, digits read one row more, and the operators read row 1, just below the
    first digit: which tells the answer where its units are, and made small models work. In
    training every row but 0 is shifted by one k for all numbers of an example,
    ``k ~ U{0 .. max_shift}``, a function of (seed, example number); in evaluation k = 0.

    Only rows 1 to ``max_shift + longest_run`` are ever trained, so longer runs of digits cannot
    work: evaluation on longer ones warns (on the CPU when it sees one; on other devices, which
    must not synchronise, where a task says how long its numbers are).

    Digits must be tokens of their own, written least significant first. The state is the index
    where the text stopped, (batch,) int64.

    Source: see the top of this file. The published training code normalises the sum by LayerNorm;
    here it is RMS, as everywhere else.

    Args:
        vocab_size: Tokens.
        dim: Width of x.
        digit_tokens: The tokens of 0 to 9. None: the task's tokenizer says.
        coupled: Operators on row 1, digits from row 2 on.
        operator_tokens: Of + and the like, = last; used where coupled. None: the task says.
        max_shift: The largest k; the paper takes 100.
        longest_run: Digits of the longest number in training, answers included. None: the task
            says.
        rows: Of the table; max_shift + longest_run + 1 are needed, coupled one more.
        normalise: RMS norm of the sum.
        std: Standard deviation of words and rows at the start. They want to be large: each moves
            little against its size then, and rows that are rarely trained stay distinct from each
            other. None: the decoder's init_std, for a head that is tied to the words.
        seed: Of the shifts.

    Raises:
        ValueError: Too few rows for max_shift and longest_run.
    """

    #: What `archzoo.check` builds the class with: half of its tokens are digits, so that runs
    #: are long enough to be broken.
    contract_arguments: ClassVar[dict[str, Any]] = {"digit_tokens": list(range(3, 18))}

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        *,
        digit_tokens: list[int] | None = None,
        coupled: bool = False,
        operator_tokens: list[int] | None = None,
        max_shift: int = 100,
        longest_run: int | None = None,
        rows: int = 128,
        normalise: bool = True,
        std: float | None = 1.0,
        seed: int = 0,
    ) -> None:
        if max_shift < 0:
            raise ValueError(f"max_shift={max_shift} must be at least 0")
        super().__init__(
            vocab_size,
            dim,
            rows,
            digit_tokens=digit_tokens,
            operator_tokens=operator_tokens,
            operators=coupled,
            longest_run=longest_run,
            normalise=normalise,
            std=std,
        )
        self.coupled, self.max_shift, self.seed = coupled, max_shift, seed
        self.check_rows()

    def check_rows(self) -> None:
        """Refuse a table that is too small for max_shift and the longest run."""
        needed = self.max_shift + (self.longest_run or 1) + 1 + self.coupled
        if self.rows < needed:
            raise ValueError(
                f"rows={self.rows} is too small: max_shift={self.max_shift} and runs of "
                f"{self.longest_run or 1} digits read {needed} rows; take rows={needed} or more"
            )

    @property
    def coverage(self) -> int:
        """The longest run of digits all of whose rows training can have reached."""
        most = self.rows - 1 - self.coupled
        return most if self.longest_run is None else min(most, self.max_shift + self.longest_run)

    @property
    def reason(self) -> str:
        """What the coverage is made of."""
        return f"max_shift={self.max_shift} + longest_run={self.longest_run}"

    # ------------------------------------------------------------------------ the embedding

    def init_state(
        self,
        batch_size: int,
        *,
        capacity: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        """run: (batch,) int64, digits of the number that the text stopped in."""
        return {"run": torch.zeros(batch_size, dtype=torch.int64, device=device)}

    def positions(
        self, tokens: Tensor, state: State | None, context: Context
    ) -> tuple[Tensor, State | None]:
        """The row of each token, (batch, time) int64, and the state after them.

        Args:
            tokens: (batch, time) int64.
            state: Of `init_state`, or None.
            context: Of the same tokens.
        """
        kinds = self.known_kinds()
        shifted = self.training and self.max_shift > 0
        examples = examples_of(context, "max_shift=0") if shifted else None
        if state is None and kernels.available(tokens):  # in training: one launch instead of forty
            rows = kernels.shifted_rows(
                tokens,
                kinds,
                context,
                coupled=self.coupled,
                last=self.rows - 1,
                key=key_of(self.seed, SHIFTS),
                bound=self.max_shift + 1,
                examples=examples,
            )
            return rows, None
        kinds = kinds[tokens]
        rows = count_digits(kinds == DIGIT, context, None if state is None else state["run"])
        if state is not None:
            state = {"run": rows[:, -1].clone()}  # a view would keep all counts alive
        self.watch(rows)
        if self.coupled:
            rows = rows + (kinds > 0)
        if context.packed:
            rows = rows * context.valid
        if examples is not None:
            bits = random_bits(self.seed, SHIFTS, examples)
            rows = torch.where(rows > 0, rows + integers(bits, self.max_shift + 1), rows)
        return rows.clamp(max=self.rows - 1), state

    def forward(
        self, tokens: Tensor, state: State | None, context: Context
    ) -> tuple[Tensor, State | None]:
        """Tokens (batch, time) int64 to x (batch, time, dim)."""
        rows, state = self.positions(tokens, state, context)
        return self.look_up(tokens, rows), state
