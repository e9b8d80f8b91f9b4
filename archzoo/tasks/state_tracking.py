"""State tracking: what state is a machine in, after each symbol that it read?"""

from __future__ import annotations

from itertools import permutations
from typing import Any, Literal, NamedTuple

import numpy as np

from archzoo.tasks.counter_random import Bits, Integers, random_bits
from archzoo.tasks.digit_arrays import below
from archzoo.tasks.sequences import STREAMS, Sequences, SequenceTask, places

MACHINES = ("parity", "modular_addition", "S3", "S5", "dyck", "automaton")
NOTHING = "_"
BRACKETS = "()[]{}<>"


class Machine(NamedTuple):
    """A finite automaton that starts in state 0; state and symbol give the next state.

    Attributes:
        symbols: What can be read, as words.
        states: What a state is called, as words; they may be symbols, too.
        table: (states, symbols) int64, the next state.
    """

    symbols: list[str]
    states: list[str]
    table: Integers


class StateTracking(SequenceTask):
    """A finite machine reads symbols, and every position asks for its state.

    Sums modulo 5, six of them in a row of 8, are trained as::

        position 0 1 2 3 4 5 6 7
        token    1 0 4 4 _ _ 4 2
        label    1 1 0 4 4 4 3 0

    - `parity`: the sum of bits, modulo 2. `modular_addition`: of numbers below `modulus`.
    - `S3`, `S5`: permutations of 3 and 5 things, each written as where it takes them; the state is
      the product so far, the newest applied last. No parallel circuit of constant depth multiplies
      in S5 (NC1-complete), which is why it tells models apart; S3 is the smallest group in which
      the order counts.
    - `dyck`: `brackets` kinds of brackets, at most `depth` of them open; the state asked for is the
      bracket that may close next, `_` where none is open.
    - `automaton`: `states` states, and `symbols` symbols that each lead from a state to any other.
      Which, is chosen by `table_seed`, so that all runs learn the same machine.

    A size is how many symbols there are and in how many positions; at the others stands `_`, which
    changes nothing. With as many symbols as positions there is none of it. Models are trained on
    some lengths and tested on longer ones, which is where one that tracks differs from one that
    guesses. A problem is a sequence of symbols: one that is held out is never trained on, but what
    it begins with may be.

    Source: Merrill, Petty and Sabharwal, arXiv 2404.08819 (S5); Grazzi et al., arXiv 2411.12537
    (parity and modular addition, and which models can).

    Args:
        of: The machine: parity, modular_addition, S3, S5, dyck or automaton.
        sizes: Symbols and length of training, each with a weight where it has a third number.
            None: all of 8, 16, 32 and 64.
        test_sizes: Those that the test reports one by one. None: those of `sizes`, and where these
            are left to their default all of 64, 128 and 256.
        modulus: Of modular_addition.
        brackets: Kinds of them in dyck, 1 to 4.
        depth: How many of dyck's brackets are open at most.
        states: Of the automaton.
        symbols: That the automaton reads.
        table_seed: Chooses the automaton.
        held_out: One problem in this many is held out of training; at least 2.
        alike: Training examples in a row of one size. A batch of as many has no padding.
        batch_size: Examples in a batch, all ranks together.
        steps_per_epoch: Batches in what Lightning calls an epoch; the stream itself never ends.
        validation_examples: Held-out problems to validate on, of all `sizes` together.
        test_examples: Held-out problems to test on, and of each of `test_sizes` as many.
        seed: Chooses the training examples.

    Raises:
        ValueError: an argument is out of range.
    """

    axes = ("symbols", "length")

    def __init__(
        self,
        of: Literal["parity", "modular_addition", "S3", "S5", "dyck", "automaton"] = "parity",
        sizes: list[list[int]] | None = None,
        test_sizes: list[list[int]] | None = None,
        modulus: int = 5,
        brackets: int = 2,
        depth: int = 8,
        states: int = 5,
        symbols: int = 3,
        table_seed: int = 0,
        held_out: int = 20,
        alike: int = 128,
        batch_size: int = 128,
        steps_per_epoch: int = 1000,
        validation_examples: int = 1000,
        test_examples: int = 1000,
        seed: int = 0,
    ) -> None:
        if of not in MACHINES:
            raise ValueError(f"of={of!r} is none of {', '.join(MACHINES)}")
        least = {"modulus": 2, "brackets": 1, "depth": 1, "states": 2, "symbols": 2}
        given = dict(zip(least, (modulus, brackets, depth, states, symbols), strict=True))
        for name, value in given.items():
            if value < least[name]:
                raise ValueError(f"{name} {value} is too small: take {least[name]} or more")
        if brackets > len(BRACKETS) // 2:
            raise ValueError(f"brackets {brackets}: there are {len(BRACKETS) // 2} kinds")
        self.of, self.brackets, self.depth = of, brackets, depth
        if of == "dyck":
            kinds = list(BRACKETS[: 2 * brackets])
            self.machine, names = None, [NOTHING, *kinds]
        else:
            self.machine = (
                group(int(of[1]))
                if of in ("S3", "S5")
                else automaton(states, symbols, table_seed)
                if of == "automaton"
                else addition(2 if of == "parity" else modulus)
            )
            names = [NOTHING, *dict.fromkeys([*self.machine.symbols, *self.machine.states])]
            token = {name: index for index, name in enumerate(names)}
            self._symbols = np.array([token[name] for name in self.machine.symbols])
            self._states = np.array([token[name] for name in self.machine.states])
        if test_sizes is None:
            test_sizes = sizes or [[length, length] for length in (64, 128, 256)]
        if sizes is None:
            sizes = [[length, length] for length in (8, 16, 32, 64)]
        super().__init__(names, sizes, test_sizes)

    def check_size(self, first: int, second: int) -> None:
        if first > second:
            raise ValueError(f"{first} symbols do not fit in a length of {second}")

    def problem_draws(self, first: int, second: int) -> int:
        return first if self.of == "dyck" else -(-first // 2)

    def problems(self, bits: Bits, first: int, second: int) -> Integers:
        # (rows, symbols); of dyck tokens and after them the labels.
        if self.machine is not None:
            return below(bits, len(self.machine.symbols))[:first].T.astype(np.int64)
        kinds, coins = np.split(below(bits, np.repeat([[self.brackets], [2]], first, axis=0)), 2)
        found = np.zeros((2, first, bits.shape[1]), np.int64)
        stack = np.zeros((self.depth + 1, bits.shape[1]), np.int64)  # tokens; below all is nothing
        height, rows = np.zeros(bits.shape[1], np.int64), np.arange(bits.shape[1])
        for step in range(first):
            opens = (height == 0) | ((height < self.depth) & (coins[step] == 0))
            closing = stack[height, rows]
            opening = 1 + 2 * kinds[step].astype(np.int64)
            height += np.where(opens, 1, -1)
            stack[height, rows] = np.where(opens, opening + 1, stack[height, rows])
            found[:, step] = np.where(opens, opening, closing), stack[height, rows]
        return found.reshape(2 * first, -1).T

    def rest_draws(self, first: int, second: int) -> int:
        return second if first < second else 0

    def write(self, problems: Integers, bits: Bits, first: int, second: int) -> Sequences:
        if self.machine is None:
            tokens, labels = np.split(problems, 2, axis=1)
        else:
            tokens, states = self._symbols[problems], np.zeros(problems.shape, np.int64)
            state = np.zeros(len(problems), np.int64)
            for step in range(first):
                state = states[:, step] = self.machine.table[state, problems[:, step]]
            labels = self._states[states]
        if first == second:
            return Sequences(tokens, labels)
        where, rows = places(bits, first), np.arange(len(tokens))[:, None]
        wide = np.zeros((len(tokens), second), np.int64)
        wide[rows, where] = tokens
        read = np.zeros((len(tokens), second), np.int64)
        read[rows, where] = 1
        start = 0 if self.machine is None else self._states[0]
        labels = np.concatenate([np.full((len(tokens), 1), start), labels], axis=1)
        return Sequences(wide, np.take_along_axis(labels, np.cumsum(read, axis=1), axis=1))


def addition(modulus: int) -> Machine:
    """Sums modulo a number, which start at 0."""
    numbers = np.arange(modulus)
    names = list(map(str, numbers))
    return Machine(names, names, (numbers[:, None] + numbers) % modulus)


def group(things: int) -> Machine:
    """Products in the symmetric group of a few things, which start at the identity."""
    elements = list(permutations(range(things)))
    index = {element: number for number, element in enumerate(elements)}
    table: Any = [
        [index[tuple(element[image] for image in state)] for element in elements]
        for state in elements
    ]
    names = ["".join(str(image + 1) for image in element) for element in elements]
    return Machine(names, names, np.array(table))


def automaton(states: int, symbols: int, seed: int) -> Machine:
    """A random automaton, every transition of which leads to any state.

    Args:
        states: How many there are.
        symbols: That it reads.
        seed: Chooses it.
    """
    bits = random_bits(seed, STREAMS["table"], np.arange(states), symbols)
    names = [f"q{state}" for state in range(states)]
    letters = [f"a{symbol}" for symbol in range(symbols)]
    return Machine(letters, names, below(bits, states)[:symbols].T.astype(np.int64))
