"""Counter-based random numbers: a function of (seed, example number), on the numbers' device.

What a position method draws in training must not depend on batch size, packing, the rank that
computes a row, or the point where a run was resumed, and must be the same where a block is
recomputed or compiled. A generator with a state gives none of this; a hash of the example number
gives all. It is the generator of `archzoo.tasks.counter_random.random_bits`, bit for bit, in torch.
"""

from __future__ import annotations

from torch import Tensor

from archzoo.documents import Context

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 0xFFFFFFFFFFFFFFFF

# Streams: they separate the uses of one seed, also from those of the tasks, which count from 0.
SHIFTS, STARTS, SUBSETS, LOOPS = 101, 102, 103, 104


def _signed(value: int) -> int:
    """The int64 of the same 64 bits."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def _shift(bits: Tensor, places: int) -> Tensor:
    """Shift right and fill with zeros; int64's own shift repeats the sign."""
    return (bits >> places) & ((1 << (64 - places)) - 1)


def _mix(bits: Tensor) -> Tensor:
    bits = (bits ^ _shift(bits, 30)) * _signed(0xBF58476D1CE4E5B9)
    bits = (bits ^ _shift(bits, 27)) * _signed(0x94D049BB133111EB)
    return bits ^ _shift(bits, 31)


def _mix_integer(bits: int) -> int:
    """`_mix` of one number on the host."""
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB & _MASK
    return bits ^ (bits >> 31)


def key_of(seed: int, stream: int) -> int:
    """What stands for (seed, stream) in `random_bits`: an int64."""
    key = _mix_integer((seed * 2 + 1) * _GOLDEN & _MASK)
    return _signed(_mix_integer((key + stream) & _MASK))


def random_bits(seed: int, stream: int, numbers: Tensor, draws: int | Tensor = 0) -> Tensor:
    """Draw k of the generator that belongs to (seed, stream, number): SplitMix64 by counter.

    Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014.

    Args:
        seed: Any integer.
        stream: Separates different uses of one seed.
        numbers: int64 of any shape.
        draws: k, an int or int64 of a shape that fits.

    Returns:
        int64 of the numbers' shape, 64 random bits each.
    """
    origins = _mix(numbers * _signed(_GOLDEN) + key_of(seed, stream))
    if isinstance(draws, int):
        return _mix(origins + _signed((draws + 1) * _GOLDEN))
    return _mix(origins + (draws + 1) * _signed(_GOLDEN))


def integers(bits: Tensor, bound: int | Tensor) -> Tensor:
    """Random bits to integers 0 .. bound - 1, uniform to bound / 2^31."""
    return (_shift(bits, 33) * bound) >> 31


def uniform(bits: Tensor) -> Tensor:
    """Random bits to float64 in (0, 1)."""
    return (_shift(bits, 12).double() + 0.5) * 2.0**-52


def examples_of(context: Context, way_out: str) -> Tensor:
    """The example numbers, (batch, time) int64.

    Raises:
        ValueError: There are none; `way_out` says what to take instead.
    """
    if context.examples is None:
        raise ValueError(
            "positions are drawn by example number in training: give examples=..., or take "
            f"{way_out}"
        )
    return context.examples
