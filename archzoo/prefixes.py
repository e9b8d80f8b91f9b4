"""The state that every document starts from, where an adapter learns one."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from archzoo.states import State


class StartsFromPrefix(nn.Module):
    """A mixer's side of a prefix: what it can start from, and what it starts from.

    Without one a document starts from `init_state`. With one it starts from the prefix, and a reset
    where a document begins goes there, too. The base class inserts it for a mixer that does not
    handle documents itself; one that does adds the prefix in its forms.
    """

    handles_documents = False

    #: Whether an adapter gives the state that every document starts from, in `prefix`.
    has_prefix = False
    prefix: nn.ModuleDict

    init_state: Any  # `Mixer.init_state`

    def prefix_shapes(self) -> dict[str, tuple[int, ...]] | None:
        """What a document can be made to start from: the tensors of the state, without the batch.

        An axis of 0 is one of tokens, as many as a prefix has. None: a mixer that handles documents
        itself says here and in its forms what it can start from; the base class knows of none.
        """
        if self.handles_documents:
            return None
        leaves = self.init_state(1, device="meta").items()
        return {name: tuple(leaf.shape[1:]) for name, leaf in leaves if isinstance(leaf, Tensor)}

    def start_state(self, batch_size: int, **options: Any) -> State:
        """`init_state`, or the prefix instead of it: the initial state of the first document.

        A mixer that handles documents puts its prefix in where a document begins.
        """
        state: State = self.init_state(batch_size, **options)
        if not self.has_prefix or self.handles_documents:
            return state
        return state | {
            name: value.to(state[name]).expand_as(state[name]).clone()
            for name, value in self.learned_prefix().items()
        }

    def learned_prefix(self) -> dict[str, Tensor]:
        """The tensors of an adapter's prefix, without a batch; {} without one."""
        if not self.has_prefix:
            return {}
        adapter: Any = next(iter(self.prefix.values()))
        tensors: dict[str, Tensor] = adapter.prefix()
        return tensors
