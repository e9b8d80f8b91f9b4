"""State: a pytree of tensors with the batch on axis 0, and functions over it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

#: What a part carries, by name: tensors, batch first; ints and bools that hold for all rows; and
#: dicts and lists of these. `State | None` where None is "start empty and keep nothing".
State = dict[str, Any]

Tree = TypeVar("Tree")  # a state, or a part of one


def map_state(function: Callable[..., Tensor], *states: Tree) -> Tree:
    """Apply a function to corresponding tensors of states of one structure; ints pass through."""
    mapped: Tree = _mapped(function, states)
    return mapped


def _mapped(function: Callable[..., Tensor], states: Sequence[Any]) -> Any:
    first = states[0]
    if isinstance(first, Tensor):
        return function(*states)
    if isinstance(first, dict):
        return {name: _mapped(function, [state[name] for state in states]) for name in first}
    if isinstance(first, list | tuple):
        mapped = [_mapped(function, entries) for entries in zip(*states, strict=True)]
        return type(first)(*mapped) if hasattr(first, "_fields") else mapped  # a NamedTuple stays
    return first


def leaves(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a state in order, each with where it is, such as "blocks 0 memory"."""
    if isinstance(tree, dict):
        entries: Any = tree.items()
    elif isinstance(tree, list | tuple):
        entries = enumerate(tree)
    else:
        yield name, tree
        return
    for key, entry in entries:
        yield from leaves(entry, f"{name} {key}".lstrip())


def fork(state: Tree) -> Tree:
    """A copy that a later call cannot touch (calls consume the state they are given)."""
    return map_state(torch.clone, state)


def reorder(state: Tree, rows: Tensor) -> Tree:
    """Pick rows of the batch, with repetition: (kept,) int64, as beam search does."""

    def pick(leaf: Tensor) -> Tensor:  # without axes it holds for all rows
        return leaf.index_select(0, rows.to(leaf.device)) if leaf.dim() else leaf.clone()

    return map_state(pick, state)


def detach(state: Tree) -> Tree:
    """Cut the gradient: truncated back-propagation calls it between windows."""
    return map_state(torch.Tensor.detach, state)


def to(state: Tree, device: torch.device | str) -> Tree:
    """Move a state to another device. Its dtypes are the parts' own choice and stay."""
    return map_state(lambda leaf: leaf.to(device), state)


def nbytes(state: Any) -> int:
    """Bytes that the tensors of a state take."""
    sizes: list[int] = []

    def weigh(leaf: Tensor) -> Tensor:
        sizes.append(leaf.numel() * leaf.element_size())
        return leaf

    map_state(weigh, state)
    return sum(sizes)


def select_rows(rows: Tensor, chosen: Tree, other: Tree) -> Tree:
    """Row by row: `chosen` where rows (batch,) bool is True, else `other`.

    Args:
        rows: (batch,) bool.
        chosen: Where True.
        other: Where False, of the same structure.
    """

    def select(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(rows.view(-1, *(1,) * (a.dim() - 1)), a, b)

    return map_state(select, chosen, other)
