"""Adapters: small changes of a trained decoder, which alone learn. Here is their interface.

A decoder takes one (``adapter="LoRA"``) or several by name (``{"sums": "LoRA", "style": ...}``),
and then trains nothing else. An adapter changes one of four kinds of things:

* ``linear``: a block of a `Linear`, by its name (``query``, ``value``, ``up``, ...). It says
  `Adapter.output`, what it adds to y, `Adapter.input`, what it adds to x, or `Adapter.delta`, what
  it adds to W; with `delta` it can be merged. Where a kernel reads the weight instead of calling
  the Linear, as a router's, only `delta` is possible.
* ``experts``: the same of a stack of matrices, one for each expert.
* ``input``: `Adapter.prompt`, vectors that precede the text of every document.
* ``state``: `Adapter.prefix`, the state that every document starts from.
"""

from __future__ import annotations

import functools
import inspect
from abc import ABCMeta, abstractmethod
from typing import Any, ClassVar, Literal, NamedTuple

from torch import Tensor, nn

Kind = Literal["linear", "experts", "input", "state"]
KINDS: tuple[Kind, ...] = ("linear", "experts", "input", "state")


class Target(NamedTuple):
    """What one adapter module changes: the argument that it is built with.

    Attributes:
        kind: "linear", "experts", "input" or "state".
        path: Where it is, such as ``blocks.0.mixer.query_key_value.query``; ``embedding`` for the
            input and ``blocks.0.mixer`` for a state.
        shape: Of what it changes: a weight's block (rows, columns), with the experts in front for
            a stack; (dim,), the model's width, for the input and a state.
        layer: Of which block of the decoder, or None.
        state: For a state: the shape of each tensor, by name, as `Mixer.prefix_shapes` gives it.
        heads: Of a mixer's query, key, value or gate: into how many heads its rows divide.
        part: Of what it is a part: "mixer", "feed_forward", "experts", "router", "bias",
            "convolution", "head", or "decoder" for the input.
    """

    kind: Kind
    path: str
    shape: tuple[int, ...]
    layer: int | None = None
    state: dict[str, tuple[int, ...]] | None = None
    heads: int | None = None
    part: str = ""


class _Recipes(ABCMeta):
    """Without a target a class gives a recipe: ``LoRA(rank=4)`` is what a decoder builds later."""

    def __call__(cls, *arguments: Any, **named: Any) -> Any:
        if not arguments and "target" not in named:
            return functools.partial(cls, **named)
        if arguments and not isinstance(arguments[0], Target):
            raise TypeError(
                f"{cls.__name__}({arguments[0]!r}): options go by name, such as "
                f"{cls.__name__}(targets=[...]); the one argument before them is a Target"
            )
        return super().__call__(*arguments, **named)

    @property
    def __signature__(cls) -> inspect.Signature:
        """Of `__init__`: what is asked of the class, `__call__` would answer."""
        begin: Any = cls.__init__  # type: ignore[misc]
        try:
            signature = inspect.signature(begin, eval_str=True)
        except Exception:  # a name that only type checkers know
            signature = inspect.signature(begin)
        return signature.replace(parameters=[*signature.parameters.values()][1:])


class Adapter(nn.Module, metaclass=_Recipes):
    """A change of one target: ``__init__(self, target, *, targets=None, layers=None, ...)``.

    The decoder builds one for each target that matches. What a class declares below is checked by
    `archzoo.check`, and what it does not declare is refused with a message that names it. Called
    without a target a class gives a recipe, a `functools.partial`: ``LoRA(rank=4)``.

    Args:
        target: What it changes.
        targets: Which targets the decoder builds it for. By name: ``query``, or a whole path. By
            meaning: ``mixer.query``, ``feed_forward.up``, ``experts.down``, ``router``, ``head``,
            or all of ``mixer``, ``feed_forward`` (its experts too) or ``experts``. Or regular
            expressions that match a whole path. None: `default_targets`.
        layers: Only in these blocks of the decoder, counted from 0. None: in all.
    """

    #: What it can change.
    kinds: ClassVar[tuple[Kind, ...]] = ("linear",)
    #: `targets` where none are given.
    default_targets: ClassVar[tuple[str, ...]] = ()
    #: Whether the adapted model computes what the base computes until the adapter is trained.
    identity_at_start: ClassVar[bool] = True
    #: Whether `delta` and `bias_delta` hold all that it does, so that it can be merged.
    mergeable: ClassVar[bool] = False
    #: Whether it can change a router's weight, if it has `delta`.
    takes_routers: ClassVar[bool] = True
    #: Of the input or a state: how many positions it takes before the text's. None: as many as
    #: `prompt` has vectors, or `prefix` tokens.
    positions: int | None = None
    #: Of a state: start it at the one after these tokens, see `start_from`. None: `prefix` draws.
    tokens: list[int] | None = None

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        added = {"input", "output", "output_beside", "delta", "bias_delta"}
        if added & vars(cls).keys() and "low_rank" not in vars(cls):
            cls.low_rank = Adapter.low_rank  # type: ignore[method-assign]
        if added & vars(cls).keys() and "scaled_low_rank" not in vars(cls):
            cls.scaled_low_rank = Adapter.scaled_low_rank  # type: ignore[method-assign]

    def __init__(
        self,
        target: Target,
        *,
        targets: list[str] | None = None,
        layers: list[int] | None = None,
    ) -> None:
        super().__init__()
        if target.kind in ("input", "state"):  # tables and states, which decay would shrink
            self.decays = False

    @classmethod
    def connect(cls, adapters: list[Adapter]) -> None:
        """Let the modules of one entry, of all layers, share parameters; before any of them starts.

        The first owns what they share, and the others reach it by `refer`.

        Args:
            adapters: All that were built for one entry, in the order of the decoder's modules.
        """

    def refer(self, name: str, module: nn.Module) -> None:
        """Reach a module that another one owns as ``self.name``: its parameters stay the owner's.

        Args:
            name: Of the attribute.
            module: It is not registered, so a state holds it once.
        """
        object.__setattr__(self, name, module)

    @abstractmethod
    def reset_parameters(self) -> None:
        """Draw the parameters anew."""

    def start(self, weight: Tensor) -> None:
        """Start from the weight (..., rows, columns) that it will change; called once it is known.

        Of the input it is the vocabulary's table (vocab_size, dim). The base class draws: most
        adapters do not look at the weight.
        """
        self.reset_parameters()

    def start_from(self, state: dict[str, Tensor]) -> None:
        """Start from the state after `tokens`, read by the model without adapters.

        Args:
            state: Tensors without a batch, by name, as `prefix` gives them.
        """
        raise NotImplementedError(f"{type(self).__name__} has no start_from(state)")

    def output(self, x: Tensor, y: Tensor) -> Tensor | None:
        """What is added to y = x W^T, without gradient through W's own.

        Args:
            x: (..., columns); of a stack (rows, columns).
            y: (..., rows), what the block and the adapters before this one give; of a stack
                (experts, rows of x, rows).

        Returns:
            Of y's shape, or None: `delta` says it.
        """
        return None

    def input(self, x: Tensor) -> Tensor | None:
        """What is added to x before it is multiplied by this block alone.

        The adapters before this one see the changed x, as ``(W + their changes) (x + input(x))``
        says; those after it see x itself.

        Args:
            x: (..., columns).

        Returns:
            Of x's shape, or None: nothing.
        """
        return None

    def output_beside(
        self, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor | None:
        """`output` for a class that looks at the weight, too, such as at the norms of its rows.

        Args:
            x: As `output`'s.
            y: As `output`'s.
            weight: W with the adapters before this one, (..., rows, columns).
            bias: What y holds beside x W^T: (rows), of a stack (experts, rows), or None.
        """
        return self.output(x, y)

    def low_rank(
        self,
    ) -> tuple[Tensor, Tensor, float] | tuple[Tensor, Tensor, float, Tensor, int | None] | None:
        """First (rank, columns), second (rows, rank), scale: ``scale * second @ first`` is all.

        A mixture gives its router (experts, columns) and top_k as well: what the experts' rows of
        `first`, one after another, give of x is multiplied by softmax(router x).

        Where `output` adds ``scale * second (first x)`` and nothing else now, the product of the
        block takes it in at a lower cost. A class that overrides what is added, such as `output`
        or `delta`, and not this, has none, whatever it derives from.

        Returns:
            None: it is of another kind, or drops some of x.
        """
        return None

    def scaled_low_rank(self, weight: Tensor) -> tuple[Tensor, Tensor, float, Tensor] | None:
        """First, second and scale as `low_rank`'s, and a gain (rows) of W and of that change.

        Where ``y = gain * (W x + scale * second (first x)) + b`` is all, of the one adapter of a
        block, its product takes it in. A class that overrides what is added has none, as above.

        Args:
            weight: W, (rows, columns).
        """
        return None

    def delta(self, weight: Tensor) -> Tensor:
        """What is added to W, of its shape; `weight` is W with the adapters before this one."""
        raise NotImplementedError(f"{type(self).__name__} has no delta(weight)")

    def bias_delta(self, bias: Tensor) -> Tensor | None:
        """What is added to b, where the Linear has one: an output that is scaled scales it, too.

        Args:
            bias: (rows,), of a stack (experts, rows): b with the adapters before this one.

        Returns:
            Of its shape, or None: nothing.
        """
        return None

    def prompt(self) -> Tensor:
        """(tokens, dim): vectors that precede the text of every document."""
        raise NotImplementedError(f"{type(self).__name__} has no prompt()")

    def prefix(self) -> dict[str, Tensor]:
        """The state that every document starts from: tensors without a batch, by name."""
        raise NotImplementedError(f"{type(self).__name__} has no prefix()")

    def collapse(self) -> dict[str, Any]:
        """Throw away what only training needs: what remains computes the same.

        Returns:
            The arguments of the constructor that say so; {}, the base class's: nothing was.
        """
        return {}

    @classmethod
    def says(cls, method: str) -> bool:
        """Whether the class itself says what `method` gives."""
        return getattr(cls, method) is not getattr(Adapter, method)
