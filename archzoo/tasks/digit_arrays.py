"""Numbers of any length as arrays of digits, and arithmetic on all of them at once.

A number is a column of an array (digits, examples) of uint8, least significant digit first, zeros
after its end: 100 digits work like 3, and no step runs over the examples.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from archzoo.tasks.counter_random import Bits, Integers, mix

Digits = NDArray[np.uint8]
Flags = NDArray[np.bool_]

# ---------------------------------------------------------------------------- arithmetic


def add(a: Digits, b: Digits) -> Digits:
    """(digits, examples) and the same -> (digits + 1, examples)."""
    total = np.zeros((len(a) + 1, a.shape[1]), np.uint8)
    np.add(a, b, out=total[:-1])
    for column in range(len(a)):
        carry = total[column] > 9
        total[column + 1] += carry
        total[column] -= carry * np.uint8(10)
    return total


def subtract(a: Digits, b: Digits) -> tuple[Digits, Flags]:
    """(digits, examples) and the same -> |a - b| in as many digits, and whether a < b."""
    negative = less(a, b)
    larger, smaller = np.where(negative, b, a), np.where(negative, a, b)
    result = larger + np.uint8(10) - smaller  # 1 to 19: ten too many until what is lent is known
    for column in range(len(a)):
        lends = result[column] < 10
        result[column + 1 : column + 2] -= lends  # the last one never needs to borrow
        result[column] -= ~lends * np.uint8(10)
    return result, negative


def multiply(a: Digits, b: Digits) -> Digits:
    """(digits, examples) and (other digits, examples) -> (digits + other digits, examples)."""
    columns = np.zeros((len(a) + len(b), a.shape[1]), np.uint32)
    for shift, digit in enumerate(a):
        columns[shift : shift + len(b)] += digit * b.astype(np.uint32)
    carry = np.zeros_like(columns[0])
    product = np.empty(columns.shape, np.uint8)
    for column, total in enumerate(columns):
        carry, product[column] = np.divmod(total + carry, np.uint32(10))
    return product


def less(a: Digits, b: Digits) -> Flags:
    """(digits, examples) and the same -> a < b, (examples,)."""
    result = np.zeros(a.shape[1], np.bool_)
    for left, right in zip(words(a), words(b), strict=True):  # the most significant has the say
        result = np.where(left == right, result, left < right)
    return result


def length(number: Digits) -> Integers:
    """The digits of each number without leading zeros, (examples,); 0 has one."""
    present = number != 0
    return np.where(present.any(axis=0), len(number) - present[::-1].argmax(axis=0), 1)


# ---------------------------------------------------------------------------- random numbers


def below(bits: Bits, bounds: int | Integers) -> NDArray[np.uint32]:
    """(draws, examples) 64 bits -> (2 * draws, examples) integers from 0 to bound - 1.

    Half of the bits times the bound, shifted: uniform to bound / 2^32. The first halves make the
    first `draws` rows; bounds is one for all, or (2 * draws, 1) or (2 * draws, examples).
    """
    draws = len(bits)
    result = np.empty((2 * draws, bits.shape[1]), np.uint32)
    bounds = np.broadcast_to(np.asarray(bounds, np.uint64), result.shape)
    for rows, half in ((slice(draws), high(bits)), (slice(draws, None), low(bits))):
        half *= bounds[rows]
        result[rows] = high(half)
    return result


def high(bits: Bits) -> Bits:
    """The first half of 64 bits."""
    return bits >> np.uint64(32)


def low(bits: Bits) -> Bits:
    """The other half."""
    return bits & np.uint64(0xFFFFFFFF)


def from_bits(bits: Bits, lengths: Integers, *, zero: bool = False) -> Digits:
    """Uniform numbers of given lengths, without leading zeros.

    Args:
        bits: (draws, examples); half of a draw makes a digit.
        lengths: (numbers, examples), 0 for no number; numbers * digits = 2 * draws.
        zero: Whether a number of one digit may be 0.

    Returns:
        (numbers, digits, examples).
    """
    numbers, examples = lengths.shape
    digits = below(bits, 10).astype(np.uint8).reshape(numbers, -1, examples)
    digits *= np.arange(digits.shape[1])[:, None] < lengths[:, None]
    # The most significant digit is made of the same half of a draw again, now without 0.
    number, example = np.nonzero(lengths > 1 if zero else lengths)
    last = lengths[number, example] - 1
    second, draw = np.divmod(number * digits.shape[1] + last, len(bits))
    drawn = bits[draw, example]
    half = np.where(second, low(drawn), high(drawn))
    digits[number, last, example] = 1 + high(half * np.uint64(9))
    return digits


# ---------------------------------------------------------------------------- hashes


def words(number: Digits) -> list[Bits]:
    """Sixteen digits in each word of 64 bits, (examples,), the least significant word first."""
    count = -(-len(number) // 16)
    pairs = np.zeros((number.shape[1], 8 * count), np.uint8)  # of digits, one in each half byte
    pairs[:, : -(-len(number) // 2)] = number[::2].T
    pairs[:, : len(number) // 2] |= number[1::2].T << np.uint8(4)
    return list(np.ascontiguousarray(pairs.view("<u8").T, np.uint64))


def hash_of(number: Digits) -> Bits:
    """A hash of each number (digits, examples) -> (examples,), the same with leading zeros.

    The most significant word is mixed in first; leading words of zeros change nothing, for
    mix(0) = 0.
    """
    result = np.zeros(number.shape[1], np.uint64)
    for word in reversed(words(number)):
        result = mix(result + word)
    return result


# ---------------------------------------------------------------------------- Python's integers


def from_integers(numbers: Iterable[int] | Integers, size: int) -> Digits:
    """Integers of any length -> (size, numbers) digits."""
    if isinstance(numbers, np.ndarray):
        return (numbers // 10 ** np.arange(size)[:, None] % 10).astype(np.uint8)
    text = [str(number)[::-1].ljust(size, "0") for number in numbers]
    return np.array([[int(digit) for digit in line] for line in text], np.uint8).T


def to_integers(number: Digits) -> list[int]:
    """Digits -> Python integers of any length."""
    return [int("".join(map(str, digits[::-1]))) for digits in number.T.tolist()]
