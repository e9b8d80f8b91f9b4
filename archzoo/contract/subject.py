"""What is checked: a class with its arguments and sizes, and the random inputs of a check."""

from __future__ import annotations

import functools
import inspect
import itertools
import random
from typing import Any

import torch
from torch import Tensor, nn

from archzoo.block import FORMS
from archzoo.names import nearest
from archzoo.parts import SLOTS, list_parts
from archzoo.trust import import_for_user

LONGEST = 300  # tokens in the longest text that a check makes
BATCH = 3  # unlike the number of heads, so that an axis taken for another shows

#: What each slot's parts are built with: the arguments a decoder, or a mixture, passes by position.
SIZES: dict[str, dict[str, int]] = {
    "convolution": {"dim": 32, "heads": 4},
    "mixer": {"dim": 32, "heads": 4},
    "feed_forward": {"dim": 32, "width": 48},
    "router": {"dim": 32, "experts": 8, "top_k": 2},
    "embedding": {"vocab_size": 29, "dim": 32},
    "rotary": {"head_dim": 16},
    "bias": {"heads": 4},
    "linear": {},  # its blocks of rows have names: see `archzoo.contract.adapters`
    "adapter": {},  # built by the decoders that it is checked in
}


class Subject:
    """A class with its arguments and sizes, and the random inputs of its checks.

    Args:
        part: A class of one of the slots, a partial of one, a name, or
            ``{"class_path": ..., "init_args": ...}``.
        arguments: Its arguments, among them sizes (dim, heads, ...) other than `SIZES`.
        seed: Of weights, inputs, lengths and cuts.
    """

    def __init__(self, part: Any, arguments: dict[str, Any] | None = None, seed: int = 0) -> None:
        arguments = dict(arguments or {})
        if isinstance(part, functools.partial):
            part, arguments = part.func, dict(part.keywords) | arguments
        elif isinstance(part, dict):
            part, arguments = part["class_path"], dict(part.get("init_args") or {}) | arguments
        if isinstance(part, str):
            part = find_part(part)
        slots = [slot for slot, base in SLOTS.items() if _is_a(part, base)]
        if not slots:
            bases = ", ".join(base.__name__ for base in SLOTS.values())
            raise ValueError(
                f"{part!r} is not a valid part: it must be a class that inherits from {bases}"
            )
        self.part, self.slot, self.seed = part, slots[0], seed
        self.sizes = {name: arguments.pop(name, size) for name, size in SIZES[self.slot].items()}
        # What a class cannot do without and has no default for, it names itself.
        arguments = getattr(part, "contract_arguments", {}) | arguments
        self.arguments = arguments
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def __str__(self) -> str:
        shown = ", ".join(f"{name}={value!r}" for name, value in self.arguments.items())
        return f"{self.part.__name__}({shown})" if shown else self.part.__name__

    @property
    def dim(self) -> int:
        """Width of the vectors that go in."""
        return int(self.sizes["dim"])

    def make(self, dtype: torch.dtype = torch.float64, **sizes: int) -> Any:
        """Build the part; the same weights each time, a little off whatever they start at.

        A weight that starts at zero would hide the path through it.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            made = self.part(*(self.sizes | sizes).values(), **self.arguments)
            with torch.no_grad():
                for parameter in made.parameters():
                    parameter.add_(0.02 * torch.randn_like(parameter))
        return made.to(dtype)

    def draw(self, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """Standard normal numbers."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(dtype)

    def tokens(self, batch: int, time: int, vocab_size: int) -> Tensor:
        """Random tokens (batch, time).

        Args:
            batch: Rows.
            time: Tokens in each.
            vocab_size: They lie below it.
        """
        return torch.randint(vocab_size, (batch, time), generator=self.generator)

    def lengths(self) -> list[int]:
        """One token, some tokens, many tokens."""
        return [1, self.random.randint(2, 64), self.random.randint(200, LONGEST)]

    def plan(self, time: int) -> list[tuple[int, str | None]]:
        """`time` tokens cut at random, each segment in a random form."""
        cuts = sorted(self.random.sample(range(1, time), k=min(3, time - 1)))
        ends = itertools.pairwise([0, *cuts, time])
        return [(end - begin, self.random.choice((*FORMS, None))) for begin, end in ends]


def _is_a(part: Any, base: type) -> bool:
    return inspect.isclass(part) and issubclass(part, base)


def find_part(name: str) -> type[nn.Module]:
    """The class of the zoo, or at an import path, that a name stands for.

    Raises:
        ValueError: There is none; the nearest names are given.
    """
    own = {key: found for slot in SLOTS for key, found in list_parts(slot).items()}
    if name in own:
        return own[name]
    path, _, attribute = name.rpartition(".")
    if not path:
        raise ValueError(
            f"there is no part {name!r}; {nearest(name, list(own))}; "
            "a class of your own goes by module.Class"
        )
    module = import_for_user(path)  # the user names it here: it is what is to be checked
    if not hasattr(module, attribute):
        classes = [key for key, value in vars(module).items() if inspect.isclass(value)]
        close = f"; {nearest(attribute, classes)}" if classes else ""
        raise ValueError(f"{path} has no {attribute!r}{close}")
    found: type[nn.Module] = getattr(module, attribute)
    return found
