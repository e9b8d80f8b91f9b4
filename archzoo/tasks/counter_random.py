"""Counter-based random numbers: a function of (seed, stream, number), no generator with a state."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
Bits = NDArray[np.uint64]

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 0xFFFFFFFFFFFFFFFF


def mix(bits: Bits) -> Bits:
    """Scrambles 64-bit integers one by one, a bijection with mix(0) = 0 (SplitMix64's finaliser).

    Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014.
    """
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def random_bits(seed: int, stream: int, numbers: Integers, draws: int, start: int = 0) -> Bits:
    """Draws `start` to `start + draws` of the generators that belong to (seed, stream, number).

    Every number has a SplitMix64 generator of its own, which is counter-based: draw k is
    mix(origin + k * golden ratio), whatever was drawn before. The values depend on the arguments
    alone, not on a library's version.

    Args:
        seed: Any integer.
        stream: Separates different uses of one seed.
        numbers: (examples,) int64.
        draws: How many values per number.
        start: The first draw's index.

    Returns:
        (draws, examples) uint64.
    """
    key = mix(np.array([(seed * 2 + 1) * _GOLDEN & _MASK], np.uint64))
    key = mix(key + np.uint64(stream))
    origins = mix(key + numbers.astype(np.uint64) * np.uint64(_GOLDEN))
    counters = np.arange(start + 1, start + draws + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
    return mix(origins + counters[:, None])
