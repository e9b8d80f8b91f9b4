"""The state that every document starts from, where adapters say it: a prefix, or a read prompt."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from archzoo.states import State, map_state


class StartsFromPrefix(nn.Module):
    """A mixer's side of a prefix: what it can start from, and how its state begins there.

    A start is a state of one row. Where no adapter gives one a document begins from `init_state`.
    With one `start_state` holds it from the first token on, and a reset where a document begins
    within a packed row goes there, too: the start is in `Context.start`. The base class sees to
    both for a mixer that does not handle documents itself; one that does adds the latter in its
    forms.
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

    def start_state(self, batch_size: int, start: State | None = None, **options: Any) -> State:
        """`init_state`, or a start instead of it, in every row.

        Args:
            batch_size: Rows.
            start: Of one row, of all that the state holds or of some; None: `init_state` alone.
            **options: As for `Mixer.init_state`.
        """
        state: State = self.init_state(batch_size, **options)
        for name, value in (start or {}).items():
            like = state.get(name)

            def spread(leaf: Tensor, like: Any = like) -> Tensor:
                device = options.get("device") or leaf.device
                leaf = leaf.to(like if isinstance(like, Tensor) else device)
                return leaf.expand(batch_size, *leaf.shape[1:]).clone() if leaf.dim() else leaf

            state[name] = map_state(spread, value)
        return state

    def learned_prefix(self) -> dict[str, Tensor]:
        """The tensors of an adapter's prefix, without a batch; {} without one."""
        if not self.has_prefix:
            return {}
        adapter: Any = next(iter(self.prefix.values()))
        tensors: dict[str, Tensor] = adapter.prefix()
        return tensors

    def learned_start(self) -> State:
        """The adapter's prefix as a start; {} without one."""
        return {name: tensor[None] for name, tensor in self.learned_prefix().items()}

    def prefix_length(self) -> int:
        """How many positions the prefix takes, from which the text's count on; 0 without one."""
        if not self.has_prefix:
            return 0
        adapter: Any = next(iter(self.prefix.values()))
        if adapter.positions is not None:
            length: int = adapter.positions
            return length
        shapes, tensors = self.prefix_shapes() or {}, adapter.prefix()
        return max((tensors[n].shape[s.index(0)] for n, s in shapes.items() if 0 in s), default=0)
