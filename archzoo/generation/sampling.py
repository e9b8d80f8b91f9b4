"""Choosing the next token: probabilities, and draws that are a row's own."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor

from archzoo.numerics import for_float64

SKIPPED = 2**20  # random numbers at a time, of those that were drawn before


def at_least(name: str, value: int, least: int, of: str = "") -> None:
    """Refuse what is no integer from a least one on.

    Args:
        name: Of the argument.
        value: Of it.
        least: The smallest that is allowed.
        of: What is counted.
    """
    if not isinstance(value, Integral):
        raise ValueError(f"{name}={value!r} must be an integer")
    if value < least:
        raise ValueError(f"{name}={value} must be at least {least}{of}")


def check_stop(token: int | None, vocab_size: int) -> None:
    """Refuse a stop token that no text could end by.

    Args:
        token: The stop token, or None.
        vocab_size: Of the model.
    """
    if token is not None and not (isinstance(token, Integral) and 0 <= token < vocab_size):
        raise ValueError(
            f"stop_token={token!r} is not one of the model's tokens, 0 to {vocab_size - 1}"
        )


def probabilities(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """``softmax(logits / temperature)`` in float64, truncated to the most likely tokens.

    Args:
        logits: (batch, vocab_size).
        temperature: Above 0.
        top_k: Keep the k most likely tokens (of equals, those of lower number).
        top_p: Of what top_k kept, keep the fewest most likely tokens with this total probability.

    Returns:
        (batch, vocab_size) float64; on the CPU where the logits' device has none.
    """
    full = (for_float64(logits).double() / temperature).softmax(dim=-1)
    if top_k is None and top_p is None:
        return full
    ranked, order = full.sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        ranked[:, top_k:] = 0
    if top_p is not None:
        ranked = ranked / ranked.sum(dim=-1, keepdim=True)
        before = ranked.cumsum(dim=-1) - ranked  # the mass of likelier tokens
        ranked = ranked.masked_fill(before >= top_p, 0)
    ranked = ranked / ranked.sum(dim=-1, keepdim=True)
    return torch.zeros_like(full).scatter(-1, order, ranked)


def sample(probability: Tensor, uniform: Tensor) -> Tensor:
    """The token at which the cumulated probability passes a uniform number: (batch,) int64.

    Args:
        probability: (batch, vocab_size).
        uniform: (batch,) in [0, 1), of the same dtype.
    """
    cumulated = probability.cumsum(dim=-1)
    threshold = uniform[:, None] * cumulated[:, -1:]
    chosen = torch.searchsorted(cumulated, threshold, right=True)[:, 0]
    # Rounding may put the threshold on the total; the last possible token is meant.
    index = torch.arange(probability.shape[-1], device=probability.device)
    last = torch.where(probability > 0, index, 0).amax(dim=-1)
    return torch.minimum(chosen, last)


class Sampler:
    """Chooses each row's next token, by random numbers that do not depend on the other rows.

    Row r has a generator of its own, seeded with seed + r: equal prompts get different texts, and
    a prompt alone gets with seed + r what it gets as row r of a batch.

    Args:
        rows: Of the batch.
        temperature: 0 takes the most likely token.
        top_k: See `probabilities`.
        top_p: See `probabilities`.
        seed: Of row 0. None: drawn from torch's global generator.
        drawn: Tokens that each row has drawn before, whose random numbers are skipped. None: 0.

    Raises:
        ValueError: A number out of its range, or top_k and top_p where nothing is drawn.
    """

    def __init__(
        self,
        rows: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        drawn: Sequence[int] | None = None,
    ) -> None:
        if not 0 <= temperature < float("inf"):
            raise ValueError(f"temperature={temperature} must be 0 (greedy) or more, and finite")
        if top_k is not None:
            at_least("top_k", top_k, 1, " token")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p={top_p} must lie in (0, 1]")
        if temperature == 0 and (top_k is not None or top_p is not None):
            raise ValueError(
                "top_k and top_p limit what is sampled from, but temperature=0 takes the most "
                "likely token and samples nothing: give a temperature, such as 1"
            )
        if seed is not None:
            at_least("seed", seed, -(2**63))
            if seed + rows > 2**64:
                raise ValueError(f"seed={seed} is too large: row r draws by seed + r, below 2**64")
        self.temperature, self.top_k = temperature, top_k
        self.top_p = None if top_p == 1 else top_p  # rounding would cut the least likely tokens
        self.generators: list[torch.Generator] = []
        if temperature:
            self.first = int(torch.randint(2**62, ())) if seed is None else seed
            self.generators = [torch.Generator() for _ in range(rows)]
        self.restart(drawn or [0] * rows)

    def restart(self, drawn: Sequence[int]) -> None:
        """Go to where each row has drawn so many tokens.

        Args:
            drawn: Of each row.
        """
        for row, (generator, count) in enumerate(zip(self.generators, drawn, strict=False)):
            generator.manual_seed(self.first + row)
            for begin in range(0, count, SKIPPED):
                size = min(SKIPPED, count - begin)
                torch.rand(size, generator=generator, dtype=torch.float64)

    def draw(self, rows: Sequence[int], count: int) -> Tensor:
        """The next random numbers of some rows: (count, rows) float64 on the CPU.

        They are drawn there so that a seed means the same on every device.
        """
        generators = [self.generators[row] for row in rows]
        numbers = [torch.rand(count, generator=g, dtype=torch.float64) for g in generators]
        return torch.stack(numbers, dim=1)

    def choose(self, logits: Tensor, numbers: Tensor) -> Tensor:
        """The tokens (batch,) int64 of logits (batch, vocab_size) by random numbers (batch,)."""
        likely = probabilities(logits, self.temperature, self.top_k, self.top_p)
        return sample(likely, numbers.to(likely.device)).to(logits.device)

    def __call__(self, logits: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        """Logits (batch, vocab_size) of some rows, None: of all, to tokens (batch,) int64."""
        if not self.temperature:
            return logits.argmax(dim=-1)
        everyone = range(len(self.generators))
        return self.choose(logits, self.draw(everyone if rows is None else rows, 1)[0])
