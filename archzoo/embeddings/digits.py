"""Digits in text: the index of each in its number, and what the embeddings that read it share."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from archzoo.derivatives import followed
from archzoo.documents import Context
from archzoo.embeddings.rows import RowEmbedding

Coupling = Literal["reversed", "plain"]  # how the numbers of a problem are written

OPERATOR, DIGIT = 1, 2  # what a token is; 0: anything else


class DigitTokenizer(Protocol):
    """What a tokenizer must have; those of the tasks do."""

    @property
    def digit_tokens(self) -> list[int] | None:
        """The tokens of 0 to 9; None where digits are merged."""

    def encode(self, text: str) -> list[int]:
        """Text to tokens."""


class DigitTask(Protocol):
    """What a task must have.

    It may also say, where its texts hold problems and numbers:

    - ``longest_run``: digits of the longest number in training, answers included.
    - ``longest_tested``: the same over everything that is validated on.
    - ``operators``: the signs of its problems, the last one followed by the answer.
    - ``coupling``: how the numbers of a problem are written, "reversed" or "plain", where its
      batches hold coupled positions.
    """

    @property
    def tokenizer(self) -> DigitTokenizer:
        """The task's."""


def count_digits(is_digit: Tensor, context: Context, before: Tensor | None) -> Tensor:
    """The index of each digit in its run, from 1; 0 elsewhere.

    With ``m_t`` = 1 on digits, ``c_t = m_t (c_{t-1} + 1)``, in closed form: the tokens so far less
    the tokens up to the last one that is not a digit. A document starts a run; padding is ignored,
    since a document may continue after it.

    Args:
        is_digit: (batch, time) bool.
        context: Of the same tokens.
        before: (batch,) int64, the count where the segment before this one ended. None: nothing
            came before.

    Returns:
        (batch, time) int64; at padding the count before it, as the document may continue.
    """
    if before is None:
        before = torch.zeros(is_digit.shape[0], dtype=torch.int64, device=is_digit.device)
    if is_digit.shape[1] == 1 and not context.packed:  # decoding: a third of the operations
        return (before[:, None] + 1) * is_digit
    within = (-before)[:, None]  # a token that breaks no run: as far back as the run goes
    if context.packed:
        seen = context.valid.cumsum(dim=1)
        breaks = torch.where(is_digit, torch.where(context.starts, seen - 1, within), seen)
        breaks = torch.where(context.valid, breaks, within)
    else:
        seen = torch.arange(1, is_digit.shape[1] + 1, device=is_digit.device)
        breaks = torch.where(is_digit, within, seen)
    return seen - breaks.cummax(dim=1).values


class DigitEmbedding(RowEmbedding):
    """An embedding that must know which tokens are digits, and how long a number may be.

    Both come from the task where they are not given; see `bind`.

    Args:
        vocab_size: Tokens.
        dim: Width of x.
        rows: Of the table.
        digit_tokens: The tokens of 0 to 9. None: the task's tokenizer says.
        operator_tokens: Of + and the like, = last. None: the task says.
        operators: Whether the operators are needed at all.
        longest_run: Digits of the longest number in training, answers included. None: the task
            says.
        normalise: RMS norm of the sum of word and row.
        std: Standard deviation of words and rows at the start; None: the decoder's init_std.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        rows: int,
        *,
        digit_tokens: list[int] | None,
        operator_tokens: list[int] | None,
        operators: bool,
        longest_run: int | None,
        normalise: bool,
        std: float | None,
    ) -> None:
        super().__init__(vocab_size, dim, rows, normalise=normalise, std=std)
        self.vocab_size, self.operators, self.longest_run = vocab_size, operators, longest_run
        self.digit_tokens = self._checked("digit_tokens", digit_tokens)
        self.operator_tokens = self._checked("operator_tokens", operator_tokens)
        # What each token is; integers, which no cast touches, and known from the arguments.
        self.kinds: Tensor
        self.register_buffer("kinds", torch.zeros(vocab_size, dtype=torch.int8), persistent=False)
        self._sort_tokens()
        self._warned = False

    def _checked(self, name: str, tokens: list[int] | None) -> tuple[int, ...] | None:
        for token in tokens or ():
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"{name}: token {token} is not one of {self.vocab_size}")
        return None if tokens is None else tuple(tokens)

    def _sort_tokens(self) -> None:
        kinds = torch.zeros(self.vocab_size, dtype=torch.int8, device="cpu")
        if self.operators:
            kinds[list(self.operator_tokens or ())] = OPERATOR
        kinds[list(self.digit_tokens or ())] = DIGIT
        self.kinds = kinds.to(self.kinds.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DigitEmbedding:
        super()._apply(fn, recurse)
        self._sort_tokens()  # `to_empty` makes the buffer undefined, and the state dict lacks it
        return self

    def known_kinds(self) -> Tensor:
        """DIGIT, OPERATOR or 0 for each token of the vocabulary, int8."""
        name = type(self).__name__
        if self.digit_tokens is None:
            raise ValueError(
                f"digit_tokens is not set: give {name} the tokens of 0 to 9, or train on a task, "
                "whose tokenizer knows them"
            )
        if self.operators and self.operator_tokens is None:
            raise ValueError(f"operator_tokens is not set: {name} needs those of +, = and the like")
        return self.kinds

    # ------------------------------------------------------------------------ what a task knows

    def bind(self, task: DigitTask, *, training: bool = False) -> dict[str, Any]:
        """Fill arguments that are None from a task, or check it against those that are known.

        In training its numbers extend the coverage, and those that are only validated on are
        checked against it; otherwise all are.

        Args:
            task: Any; see `DigitTask` for what it may say.
            training: It will be trained on.

        Returns:
            The arguments that changed, for the decoder's configuration.

        Raises:
            ValueError: A tokenizer whose digits are not tokens of their own, or numbers too long
                for the table.
        """
        tokenizer, operators = task.tokenizer, getattr(task, "operators", "+=")
        longest_run = getattr(task, "longest_run", None)
        changed: dict[str, Any] = {}
        name = type(self).__name__
        if self.digit_tokens is None:
            digits = tokenizer.digit_tokens
            if digits is None:
                raise ValueError(
                    f"{name} needs each digit to be one token of its own, and this tokenizer "
                    "merges digits: take a tokenizer that splits them, or another embedding"
                )
            self.digit_tokens = self._checked("digit_tokens", digits)
            changed["digit_tokens"] = digits
        if self.operators and self.operator_tokens is None:
            signs = [tokenizer.encode(sign) for sign in operators]
            if any(len(tokens) != 1 for tokens in signs):
                raise ValueError(f"{name} needs each of {operators} to be one token of its own")
            changed["operator_tokens"] = [token for (token,) in signs]
            self.operator_tokens = self._checked("operator_tokens", changed["operator_tokens"])
        elif self.operators and self.operator_tokens and training:
            # A model that is trained further on another task sees signs that the first one lacked.
            signs = [tokenizer.encode(sign) for sign in operators]
            new = [s[0] for s in signs if len(s) == 1 and s[0] not in self.operator_tokens]
            if new:
                changed["operator_tokens"] = [*self.operator_tokens[:-1], *new]
                changed["operator_tokens"].append(self.operator_tokens[-1])
                self.operator_tokens = self._checked("operator_tokens", changed["operator_tokens"])
        self._sort_tokens()
        if longest_run is not None and training:
            if self.longest_run is None or longest_run > self.longest_run:
                self.longest_run = changed["longest_run"] = longest_run
                self.check_rows()
            longest_tested = getattr(task, "longest_tested", None) or longest_run
            if longest_tested != longest_run:
                self.check_coverage(longest_tested)
        elif longest_run is not None:
            self.check_coverage(longest_run)
        return changed

    # ------------------------------------------------------------------------ how far it reaches

    def check_rows(self) -> None:
        """Refuse a table that is too small for the numbers of training."""
        raise NotImplementedError

    @property
    def coverage(self) -> int:
        """The longest run of digits all of whose rows training can have reached."""
        raise NotImplementedError

    @property
    def reason(self) -> str:
        """What the coverage is made of, for the warning."""
        raise NotImplementedError

    def check_coverage(self, run: int) -> bool:
        """Warn where a run of that many digits reads rows that were never trained; False then."""
        if run <= self.coverage:
            return True
        warnings.warn(
            f"a number of {run} digits is longer than the {self.coverage} that training can have "
            f"covered ({self.reason}): its last digits read rows that were never trained. Train "
            f"with a larger {self.reason.partition('=')[0]}, or on longer numbers",
            stacklevel=2,
        )
        return False

    def check_prompts(self, prompts: Sequence[Sequence[int]]) -> None:
        """Check the coverage of texts, lists of tokens on the host, unless it was warned of."""
        digits = frozenset(self.digit_tokens or ())
        runs = [
            len(list(run))
            for prompt in prompts
            for is_digit, run in groupby(prompt, digits.__contains__)
            if is_digit
        ]
        if not self._warned:
            self._warned = not self.check_coverage(max(runs, default=0))

    def watch(self, runs: Tensor) -> None:
        """Check the coverage once, in evaluation, where looking at the numbers costs nothing."""
        at_hand = runs.device.type == "cpu" and not followed()
        if not self.training and not self._warned and at_hand:
            self._warned = not self.check_coverage(int(runs.max()))
