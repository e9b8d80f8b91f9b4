"""Abacus: each digit knows its place in its number.

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

import warnings
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archzoo.block import Context, Embedding, State
from archzoo.norm import RMSNorm
from archzoo.positions.draws import SHIFTS, integers, random_bits
from archzoo.positions.embedding import TokenEmbedding

if TYPE_CHECKING:
    from archzoo.tasks.tokenizers import Tokenizer

OPERATOR, DIGIT = 1, 2  # what a token is; 0: anything else


def count_digits(is_digit: Tensor, context: Context, before: Tensor | None) -> Tensor:
    """The index of each digit in its run, from 1; 0 elsewhere.

    With ``m_t`` = 1 on digits, ``c_t = m_t (c_{t-1} + 1)``, in closed form: the tokens so far less
    the tokens up to the last one that is no digit. A document starts a run; padding is seen
    through, since a document may go on behind it.

    Args:
        is_digit: (batch, time) bool.
        context: Of the same tokens.
        before: (batch,) int64, the count where the piece before this one ended. None: nothing
            came before.

    Returns:
        (batch, time) int64; at padding the count before it, as the document may go on.
    """
    if before is None:
        before = torch.zeros(len(is_digit), dtype=torch.int64, device=is_digit.device)
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


class AbacusEmbedding(Embedding):
    """``x_t = norm(words[token_t] + table[row_t])``, the row a digit's place in its number.

    Rows: digits read their index in the run, from 1; all other tokens share row 0, a learned row
    like any other. Coupled, digits read one row more, and the operators read row 1, just below the
    first digit: which tells the answer where its units are, and made small models work. In
    training every row but 0 is shifted by one k for all numbers of an example,
    ``k ~ U{0 .. max_shift}``, a function of (seed, example number); in evaluation k = 0.

    Only rows 1 to ``max_shift + longest_run`` are ever trained, so longer runs of digits cannot
    work: evaluation beyond that warns (on the CPU when it meets one; on other devices, which are
    not asked, where a task says how long its numbers are).

    Digits must be tokens of their own, written least significant first. The state is the index
    where the text stopped, (batch,) int64.

    Source: see the top of this file. The published training code normalises the sum by LayerNorm;
    here it is RMS, as everywhere else.

    Args:
        vocab_size: Tokens.
        dim: Width of x.
        digit_tokens: The tokens of 0 to 9. None: the task's tokenizer says.
        coupled: Operators on row 1, digits from row 2 on.
        operator_tokens: Of + and =; used where coupled. None: the task's tokenizer says.
        max_shift: The largest k; the paper takes 100.
        longest_run: Digits of the longest number in training, answers included. None: the task
            says.
        rows: Of the table; max_shift + longest_run + 1 are needed, coupled one more.
        normalise: RMS norm of the sum.
        std: Standard deviation of words and rows at the start. They want to be large: each moves
            little against its size then, and rows that training meets rarely stay apart from each
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
        super().__init__()
        if max_shift < 0:
            raise ValueError(f"max_shift={max_shift} must be at least 0")
        self.weight = nn.Parameter(torch.randn(vocab_size, dim))
        self.table = TokenEmbedding(rows, dim)
        if std is not None:
            for table in (self, self.table):
                table.keeps_init = True  # type: ignore[assignment]
                with torch.no_grad():
                    table.weight.mul_(std)
        self.norm = RMSNorm(dim) if normalise else nn.Identity()
        self.vocab_size, self.rows, self.seed = vocab_size, rows, seed
        self.coupled, self.max_shift, self.longest_run = coupled, max_shift, longest_run
        self.digit_tokens = self._checked("digit_tokens", digit_tokens)
        self.operator_tokens = self._checked("operator_tokens", operator_tokens)
        # What each token is; whole numbers, which no cast touches, and known from the arguments.
        self.kinds: Tensor
        self.register_buffer("kinds", torch.zeros(vocab_size, dtype=torch.int8), persistent=False)
        self._sort_tokens()
        self._check_rows()
        self._warned = False

    # ------------------------------------------------------------------------ what a task knows

    def _checked(self, name: str, tokens: list[int] | None) -> tuple[int, ...] | None:
        for token in tokens or ():
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"{name}: token {token} is not one of {self.vocab_size}")
        return None if tokens is None else tuple(tokens)

    def _sort_tokens(self) -> None:
        kinds = torch.zeros(self.vocab_size, dtype=torch.int8, device="cpu")
        if self.coupled:
            kinds[list(self.operator_tokens or ())] = OPERATOR
        kinds[list(self.digit_tokens or ())] = DIGIT
        self.kinds = kinds.to(self.kinds.device)

    def _check_rows(self) -> None:
        needed = self.max_shift + (self.longest_run or 1) + 1 + self.coupled
        if self.rows < needed:
            raise ValueError(
                f"rows={self.rows} is too small: max_shift={self.max_shift} and runs of "
                f"{self.longest_run or 1} digits read {needed} rows; take rows={needed} or more"
            )

    def bind(
        self, tokenizer: Tokenizer, longest_run: int | None = None, *, training: bool = False
    ) -> dict[str, Any]:
        """Fill what was left at None from a task, or hold what is known against it.

        Args:
            tokenizer: Of the task.
            longest_run: Digits of the task's longest number. None: unknown.
            training: The task will be trained on, so its numbers widen what is covered; otherwise
                they are checked against it.

        Returns:
            The arguments that changed, for the decoder's configuration.

        Raises:
            ValueError: A tokenizer whose digits are not tokens of their own, or numbers too long
                for the table.
        """
        changed: dict[str, Any] = {}
        if self.digit_tokens is None:
            digits = tokenizer.digit_tokens
            if digits is None:
                raise ValueError(
                    "Abacus needs each digit to be one token of its own, and this tokenizer merges "
                    "digits: take a tokenizer that splits them, or another embedding"
                )
            self.digit_tokens = self._checked("digit_tokens", digits)
            changed["digit_tokens"] = digits
        if self.coupled and self.operator_tokens is None:
            operators = [tokenizer.encode(sign) for sign in "+="]
            if any(len(tokens) != 1 for tokens in operators):
                raise ValueError("coupled Abacus needs + and = to be one token each")
            changed["operator_tokens"] = [token for (token,) in operators]
            self.operator_tokens = self._checked("operator_tokens", changed["operator_tokens"])
        self._sort_tokens()
        if longest_run is not None and training:
            if self.longest_run is None or longest_run > self.longest_run:
                self.longest_run = changed["longest_run"] = longest_run
                self._check_rows()
        elif longest_run is not None:
            self.check_coverage(longest_run)
        return changed

    @property
    def coverage(self) -> int:
        """The longest run of digits all of whose rows training can have reached."""
        room = self.rows - 1 - self.coupled
        return room if self.longest_run is None else min(room, self.max_shift + self.longest_run)

    def check_coverage(self, run: int) -> bool:
        """Warn where a run of so many digits reads rows that were never trained; False then."""
        if run <= self.coverage:
            return True
        warnings.warn(
            f"a number of {run} digits lies beyond the {self.coverage} that training can have "
            f"covered (max_shift={self.max_shift} + longest_run={self.longest_run}): its last "
            "digits read rows that were never trained. Train with a larger max_shift, or on "
            "longer numbers",
            stacklevel=2,
        )
        return False

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

    def positions(self, tokens: Tensor, state: State, context: Context) -> tuple[Tensor, State]:
        """The row of each token, (batch, time) int64, and the state after them."""
        if self.digit_tokens is None:
            raise ValueError(
                "digit_tokens is not set: give the tokens of 0 to 9, or train on a task, whose "
                "tokenizer knows them"
            )
        if self.coupled and self.operator_tokens is None:
            raise ValueError("operator_tokens is not set: coupled Abacus needs those of + and =")
        kinds = self.kinds[tokens]
        rows = count_digits(kinds == DIGIT, context, None if state is None else state["run"])
        if state is not None:
            state = {"run": rows[:, -1].clone()}  # a view would keep all counts alive
        if not self.training and not self._warned and _is_at_hand(tokens):
            self._warned = not self.check_coverage(int(rows.max()))
        if self.coupled:
            rows = rows + (kinds > 0)
        if context.packed:
            rows = rows * context.valid
        if self.training and self.max_shift:
            if context.examples is None:
                raise ValueError(
                    "Abacus draws its shift by example number in training: give examples=..., or "
                    "take max_shift=0"
                )
            bits = random_bits(self.seed, SHIFTS, context.examples)
            rows = torch.where(rows > 0, rows + integers(bits, self.max_shift + 1), rows)
        return rows.clamp(max=self.rows - 1), state

    def forward(self, tokens: Tensor, state: State, context: Context) -> tuple[Tensor, State]:
        """Tokens (batch, time) int64 to x (batch, time, dim)."""
        rows, state = self.positions(tokens, state, context)
        x = F.embedding(tokens, self.weight) + F.embedding(rows, self.table.weight)
        return self.norm(x), state


def bind_digits(
    decoder: nn.Module,
    tokenizer: Tokenizer,
    longest_run: int | None = None,
    *,
    training: bool = False,
) -> None:
    """Tell a decoder's Abacus embedding what the task knows; other embeddings need nothing.

    What was left at None in its configuration is filled there too, so that a checkpoint knows.
    The arguments are those of `AbacusEmbedding.bind`.
    """
    embedding: Any = decoder.embedding
    spec: dict[str, Any] = decoder.config["embedding"]  # type: ignore[index, assignment]
    while hasattr(embedding, "embedding"):  # a wrapper around another embedding
        embedding, spec = embedding.embedding, spec["init_args"]["embedding"]
    if isinstance(embedding, AbacusEmbedding):
        spec["init_args"].update(embedding.bind(tokenizer, longest_run, training=training))


def _is_at_hand(tokens: Tensor) -> bool:
    """Whether looking at a value costs nothing: on the CPU, outside a compiler."""
    return tokens.device.type == "cpu" and not torch.compiler.is_compiling()
