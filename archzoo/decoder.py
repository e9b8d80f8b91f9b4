"""The decoder: embedding, blocks, norm, head. One class for every architecture of the zoo."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self, overload

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from archzoo import block as interface
from archzoo.adapters import Adapter, Target
from archzoo.adapters.attach import attach, start_adapters
from archzoo.adapters.prompts import prepend_prompt
from archzoo.block import Aux, Bias, Block, Embedding, FeedForward, Mixer, Rotary, Router
from archzoo.compiled import as_fit_asks, own_name
from archzoo.convolution import ShortConvolution
from archzoo.derivatives import followed, transformed
from archzoo.documents import Context
from archzoo.freezing import is_frozen
from archzoo.inputs import check_beside, check_state, check_tokens, explain
from archzoo.linear import HOLDING, Linear
from archzoo.norm import RMSNorm
from archzoo.parts import (
    NONE,
    Spec,
    build,
    check_one_of,
    describe,
    describe_adapters,
    named_adapters,
)
from archzoo.states import State, fork

MixerFactory = Callable[[int, int], Mixer]
ConvolutionFactory = Callable[[int, int], ShortConvolution]
FeedForwardFactory = Callable[[int, int], FeedForward]
EmbeddingFactory = Callable[[int, int], Embedding]
RotaryFactory = Callable[[int], Rotary]
BiasFactory = Callable[[int], Bias]
LinearFactory = Callable[[int, dict[str, int]], Linear]
AdapterFactory = Callable[[Target], Adapter]

if TYPE_CHECKING:  # what torch's list holds, it does not say

    class Blocks(nn.ModuleList):
        """The blocks of a decoder, from bottom to top."""

        def __iter__(self) -> Iterator[Block]: ...
        @overload
        def __getitem__(self, idx: slice) -> Self: ...
        @overload
        def __getitem__(self, idx: int) -> Block: ...
        def __getitem__(self, idx: int | slice) -> Self | Block: ...

else:
    Blocks = nn.ModuleList


class Output(NamedTuple):
    """What a call of a decoder gives.

    Attributes:
        logits: (batch, time or logits_to_keep, vocab_size).
        state: The final state, to continue from, or None where none was given.
        aux: What each layer says beside: losses, metrics, sums and pools.
    """

    logits: Tensor
    state: State | None
    aux: list[Aux]


class Decoder(nn.Module):
    """Embedding, `depth` blocks, a norm, a head: logits of the next token.

    Every part is a class, a `functools.partial` of one, its name, or
    ``{"class_path": ..., "init_args": {...}}``; it is built with the sizes that the decoder owns.
    An argument left at None takes the preset's value, and without a preset the one in brackets; the
    word none stands for nothing in the slots that may be empty.

    Args:
        vocab_size: Tokens the model knows.
        dim: Width of the residual stream.
        depth: Blocks.
        heads: Heads of every mixer.
        width: Hidden width of every feed-forward [8/3 dim, up to a multiple of 8].
        context_length: Longest text seen in training, in tokens; stored, never a limit.
        mixer: Over time: built as mixer(dim, heads) [Attention].
        pattern: Mixers by name, or by class_path and init_args, tiled over the depth, such as
            [Retention, Retention, Attention]; it replaces mixer.
        convolution: Before every mixer, a causal one of that many taps; or a class, built as
            convolution(dim, heads); or none [none].
        feed_forward: Over channels: built as feed_forward(dim, width) [GatedFeedForward].
        embedding: Of tokens: built as embedding(vocab_size, dim) [TokenEmbedding].
        rotary: On q and k: built as rotary(head_dim) [each mixer's own]; none: NoRotation.
        bias: On attention's logits: built as bias(heads), or none [none].
        linear: What every Linear of the mixers and feed-forwards is: built as
            linear(in_features, blocks); embedding, head and routers keep theirs [Linear].
        adapter: What alone is trained, beside weights that stay: built as adapter(target) for
            each target that matches [none].
        adapters: Several by name, such as {sums: LoRA, style: {class_path: LoRA}}, each a name
            or class_path and init_args; it replaces adapter.
        norm: "rms" or "layer" ["rms"].
        norm_placement: "pre" (x + f(norm x)) or "post" (norm(x + f(x))) ["pre"].
        norm_eps: Of the norms ["1e-6"].
        dropout: Of the embedding and of each residual branch [0].
        tie_weights: The head is the embedding's table [False].
        init_std: Standard deviation of matrices at the start; those that close a residual
            branch take init_std / sqrt(2 depth) [0.02].
        activation_checkpointing: Recompute blocks in the backward pass instead of keeping them
            [False].
        loops: Recurrences: how many times the stack of blocks is applied, with the same weights
            and a state for each iteration [1].
        injection: Add the embedding again: "layer", before every block; "loop", before every
            iteration of the stack; or "none" ["none"].

    Attributes:
        task: What it was trained on, as `Task.config` gives it, or None. It is saved with the
            model, and says how numbers are written in prompts.
        base: The digest of the weights that its training started from
            (`archzoo.checkpoint.weights_digest`), or None: they were drawn.
        base_path: Where its weights, but for adapters, were read from, or None.
        merged: What `archzoo merge` or `archzoo upcycle` made it of, plain data, or None. It is
            saved with the model.
    """

    task: dict[str, Any] | None = None
    base: str | None = None
    base_path: str | None = None
    merged: dict[str, Any] | None = None
    #: What `hidden` calls in training instead of `_hidden`, once `compile` has compiled that.
    compiled_hidden: Callable[..., Any] | None = None
    #: The parameters that learned before adapters were put on, by name.
    learned_before: set[str]
    #: The names of adapters that are switched off, see `archzoo.enable_adapters`.
    adapters_off: frozenset[str] = frozenset()
    #: Whether an adapter puts vectors before the text of every document.
    has_prompt = False
    prompt: nn.ModuleDict
    #: Within `weights_held`: adapters_off, and what `_lengths_before` and `_starts` give.
    _held: tuple[frozenset[str], tuple[int, int], list[State]] | None = None
    _holders = 0  # how many are within it
    _evaluators = 0  # how many are within `evaluating`, and the mode before
    _trained = False

    def __init__(
        self,
        vocab_size: int | None = None,
        dim: int | None = None,
        depth: int | None = None,
        heads: int | None = None,
        width: int | None = None,
        context_length: int | None = None,
        mixer: MixerFactory | None = None,
        pattern: list[str | dict[str, Any]] | None = None,
        convolution: Literal["none"] | int | ConvolutionFactory | None = None,
        feed_forward: FeedForwardFactory | None = None,
        embedding: EmbeddingFactory | None = None,
        rotary: Literal["none"] | RotaryFactory | None = None,
        bias: Literal["none"] | BiasFactory | None = None,
        linear: LinearFactory | None = None,
        adapter: AdapterFactory | None = None,
        adapters: dict[str, Any] | None = None,
        norm: Literal["rms", "layer"] | None = None,
        norm_placement: Literal["pre", "post"] | None = None,
        norm_eps: float | None = None,
        dropout: float | None = None,
        tie_weights: bool | None = None,
        init_std: float | None = None,
        activation_checkpointing: bool | None = None,
        loops: int | None = None,
        injection: Literal["none", "layer", "loop"] | None = None,
    ) -> None:
        super().__init__()
        sizes = {"vocab_size": vocab_size, "dim": dim, "depth": depth, "heads": heads}
        for name, size in sizes.items():
            if not _whole(size):
                raise ValueError(f"{name}={size!r}: a decoder needs an integer of at least 1")
        assert vocab_size and dim and depth and heads  # checked above; tells the type checker
        check_one_of(adapter, adapters)
        interface.head_size(dim, heads)
        width = 8 * math.ceil(dim / 3) if width is None else width
        loops = 1 if loops is None else loops
        for name, size in (("width", width), ("loops", loops), ("context_length", context_length)):
            if not _whole(size) and not (name == "context_length" and size is None):
                raise ValueError(f"{name}={size!r} must be an integer of at least 1")
        flags = {"tie_weights": tie_weights, "activation_checkpointing": activation_checkpointing}
        for name, flag in flags.items():
            if flag not in (None, True, False):
                raise ValueError(f"{name}={flag!r} must be true or false")
        if isinstance(pattern, str):
            raise ValueError(f"pattern={pattern!r} must be a list of mixers, such as [{pattern}]")
        dropout = 0.0 if dropout is None else dropout
        norm_eps = 1e-6 if norm_eps is None else norm_eps
        init_std = 0.02 if init_std is None else init_std
        numbers = {"dropout": dropout, "norm_eps": norm_eps, "init_std": init_std}
        for name, number in numbers.items():
            if isinstance(number, bool) or not isinstance(number, int | float):
                raise ValueError(f"{name}={number!r} must be a number")
            if not 0 <= number < math.inf:
                raise ValueError(f"{name}={number} must be at least 0, and finite")
        if dropout >= 1:
            raise ValueError(f"dropout={dropout} must lie in [0, 1)")
        self.vocab_size, self.dim, self.depth, self.heads = vocab_size, dim, depth, heads
        self.width, self.context_length, self.dropout = width, context_length, dropout
        self.init_std = init_std
        self.activation_checkpointing = bool(activation_checkpointing)
        self.tie_weights = bool(tie_weights)
        self.loops = loops
        self.injection = injection or "none"
        if self.injection not in ("none", "layer", "loop"):
            raise ValueError(f"injection={injection!r} is not one of none, layer and loop")
        bias = None if bias == "none" else bias
        convolution = None if convolution == "none" else convolution
        norm, norm_placement = norm or "rms", norm_placement or "pre"
        #: All it takes to build this decoder again, as plain data: `Decoder(**config)`.
        self.config: dict[str, Any] = sizes | {
            "width": width,
            "context_length": context_length,
            "mixer": None if pattern else describe("mixer", mixer or "Attention"),
            "pattern": [describe("mixer", entry) for entry in pattern] if pattern else None,
            "convolution": None if convolution is None else describe("convolution", convolution),
            "feed_forward": describe("feed_forward", feed_forward or "GatedFeedForward"),
            "embedding": describe("embedding", embedding or "TokenEmbedding"),
            "rotary": describe("rotary", rotary) if rotary else None,
            "bias": describe("bias", bias) if bias else None,
            "linear": describe("linear", linear) if linear else None,
            "adapter": describe("adapter", adapter) if adapter else None,
            "adapters": describe_adapters(adapters) if adapters else None,
            "norm": norm,
            "norm_placement": norm_placement,
            "norm_eps": norm_eps,
            "dropout": dropout,
            "tie_weights": self.tie_weights,
            "init_std": self.init_std,
            "activation_checkpointing": self.activation_checkpointing,
            # None where unused: so are they in configurations written before there were any.
            "loops": self.loops if self.loops > 1 else None,
            "injection": self.injection if self.injection != "none" else None,
        }
        config = self.config

        def make_norm() -> nn.Module:
            kinds: dict[str, Callable[..., nn.Module]] = {"rms": RMSNorm, "layer": nn.LayerNorm}
            kind = kinds.get(norm)
            if kind is None:
                raise ValueError(f"norm={norm!r} is neither rms nor layer")
            return kind(dim, eps=norm_eps)

        if norm_placement not in ("pre", "post"):
            raise ValueError(f"norm_placement={norm_placement!r} is neither pre nor post")
        mixers = config["pattern"] or [config["mixer"]]
        self.embedding: Embedding = build("embedding", config["embedding"], vocab_size, dim)
        self.blocks = Blocks()
        for layer in range(depth):
            mixed = build("mixer", mixers[layer % len(mixers)], dim, heads)
            if rotary:
                _fill_slot(mixed, "rotary", build, config["rotary"], "head_dim")
            if bias:
                _fill_slot(mixed, "bias", build, config["bias"], "heads")
            near = config["convolution"]
            near = build("convolution", near, dim, heads) if near else None
            fed = build("feed_forward", config["feed_forward"], dim, width)
            norms = (make_norm(), make_norm())
            how: Any = {"placement": norm_placement, "dropout": dropout, "convolution": near}
            self.blocks.append(Block(mixed, fed, norms, **how))
        self.norm = make_norm() if norm_placement == "pre" else nn.Identity()
        if config["linear"]:
            _replace_linears(self.blocks, config["linear"])
        self.head = Linear(dim, {"head": vocab_size})
        self.draw_weights()
        self._tie()
        if named := named_adapters(config):
            self.config |= attach(self, named)
            start_adapters(self)

    def _tie(self) -> None:
        if self.tie_weights:
            self.head.weight = self.embedding.weight

    def to_empty(self, *, device: Any, recurse: bool = True) -> Decoder:
        """Allocate a model that was built on the meta device; a tied head stays tied.

        Values are undefined until `reset_parameters` or `load_state_dict`.
        """
        super().to_empty(device=device, recurse=recurse)
        self._tie()
        return self

    def reset_parameters(self) -> None:
        """Start anew with everything that the decoder owns: after `to_empty`, all is defined.

        A part that owns tensors beside those of `nn.Linear` and `Embedding.weight` says in a
        ``reset_parameters`` of its own how they start, and so does one whose `nn.Linear` has
        ``keeps_init``.
        """
        for module in reversed(list(self.modules())):  # a part after those that it is made of
            own = getattr(module, "reset_parameters", None)
            if own is not None and module is not self and not isinstance(module, nn.Linear):
                own()
        self.draw_weights()
        self._tie()
        start_adapters(self)

    def draw_weights(self) -> None:
        """Draw the matrices: N(0, init_std^2), less for residual projections.

        A module that needs other values sets them itself and carries ``keeps_init = True``.
        """
        for module in _without_adapters(self):
            if getattr(module, "keeps_init", False):
                continue
            if isinstance(module, nn.Linear):
                std = self.init_std
                if getattr(module, "residual_projection", False):
                    std /= math.sqrt(2 * self.depth * self.loops)
                # Drawn row by row, so that how a weight lies in memory does not change its values.
                drawn = torch.empty_like(module.weight, memory_format=torch.contiguous_format)
                module.weight.data.copy_(nn.init.normal_(drawn, std=std))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
                if isinstance(module, Linear):
                    module.weight_drawn()
            elif isinstance(module, Embedding):
                nn.init.normal_(module.weight, std=self.init_std)

    def compile(self, *arguments: Any, **options: Any) -> None:
        """Compile what a training step calls: all from the tokens to the vectors before the head.

        Names and values of the weights stay. Evaluation, decoding and whatever runs without
        gradients are not compiled, so that other lengths compile nothing anew. On an NVIDIA GPU
        torch's compiler is asked for what `archzoo fit` asks of it, unless a backend, a mode or
        options are given.

        Args:
            *arguments: Of `torch.compile`.
            **options: The same.
        """
        options = as_fit_asks(options, self.device)
        compiled = torch.compile(self._hidden, *arguments, **options)
        # DDP's compiler would cut the graph where its buckets end.
        self.compiled_hidden = torch._dynamo.config.patch({"optimize_ddp": False})(compiled)

    def compile_blocks(self, *arguments: Any, **options: Any) -> None:
        """Compile each block by itself: blocks that are alike are compiled once, for all of them.

        So gradients of a block are there, to be exchanged with other processes, while those of the
        blocks before it are computed, and hooks around a block, such as FSDP2's, run as they do
        without. What `compile` has compiled is forgotten.

        Args:
            *arguments: As for `compile`.
            **options: The same.
        """
        options = as_fit_asks(options, self.device)
        compiled = torch.compile(Block.run, *arguments, **options)
        for block in self.blocks:
            block.compiled_run = compiled
        settings = {
            "optimize_ddp": False,  # would cut a block where DDP's buckets end
            "recompile_limit": 8 * self.depth,  # blocks of several kinds share one function
            "specialize_float": True,  # whose constants stay constants
        }
        self.compiled_hidden = torch._dynamo.config.patch(settings)(self._hidden)

    def forget_compiled(self) -> None:
        """Undo `compile` and `compile_blocks`."""
        self.compiled_hidden = None
        for block in self.blocks:
            block.compiled_run = None

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        """Take the names that a state of `torch.compile(decoder)` has, too."""
        for name in [n for n in state_dict if n.startswith(prefix)]:
            own = prefix + own_name(name.removeprefix(prefix))
            if own != name:
                state_dict[own] = state_dict.pop(name)
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def __getstate__(self) -> dict[str, Any]:
        """Without the compiled form and what is held, which are of this object alone."""
        own = {"compiled_hidden", "_held", "_holders", "_evaluators"}
        return {n: value for n, value in super().__getstate__().items() if n not in own}

    def bind(self, task: Any, *, training: bool = False) -> None:
        """Tell the embedding what a task knows; `config`, and so a checkpoint, knows it then too.

        Args:
            task: Such as an `archzoo.tasks.Task`, prepared.
            training: It will be trained on, and not only evaluated.

        Raises:
            ValueError: The embedding cannot serve this task.
        """
        self.config["embedding"]["init_args"] |= self.embedding.bind(task, training=training)

    def init_state(
        self,
        batch_size: int,
        *,
        capacity: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        """The state before the first token, for `forward` to consume and hand back.

        Args:
            batch_size: Rows.
            capacity: Tokens expected in all; KV caches allocate their buffers for them at once.
            device: Default: the weights' device.
            dtype: Of activations. Default: the weights' dtype.
        """
        device, dtype = device or self.device, dtype or self.dtype
        options: Any = {"capacity": capacity, "device": device, "dtype": dtype}
        place = interface.init_cursor(batch_size, device, self.positions_before_text())
        pairs = zip([*self.blocks] * self.loops, self._starts(self.loops), strict=True)
        return {
            "place": place,  # the key is in saved states
            "embedding": self.embedding.init_state(batch_size, **options),
            "blocks": [block.start_state(batch_size, start, **options) for block, start in pairs],
        }

    def copy_state(self, state: State, spare: int = 0) -> State:
        """A copy that a later call cannot touch; KV caches without their unused buffers.

        Args:
            state: From `init_state` or a call.
            spare: Tokens that a KV cache's buffers shall take before they must grow.
        """
        check_state(state, len(state["place"]["positions"]), self.depth * self.loops)
        copied: State = {name: fork(part) for name, part in state.items() if name != "blocks"}
        pairs = zip([*self.blocks] * self.loops, state["blocks"], strict=True)
        try:
            copied["blocks"] = [block.copy_state(held, spare) for block, held in pairs]
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"the state's blocks hold no {error} where this model's do: it is another model's"
            ) from error
        return copied

    def fixed_state(self, state: State) -> State:
        """The same state in tensors that stay where they are, so that a graph of a step replays.

        A call of one token in the recurrent form takes it, and waits for no device. See
        `Mixer.fixed_state`.

        Args:
            state: From a call, of a capacity for the tokens to come; it is consumed.
        """
        check_state(state, len(state["place"]["positions"]), self.depth * self.loops)
        place = state["place"]
        # Without documents theirs are constants that many states share, and no step changes them.
        moves = place if place["packed"] else {"positions": place["positions"]}
        pairs = zip([*self.blocks] * self.loops, state["blocks"], strict=True)
        return {
            "place": place | fork(moves),
            "embedding": fork(state["embedding"]),
            "blocks": [block.fixed_state(held) for block, held in pairs],
        }

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Within it the decoder is in evaluation mode: without dropout.

        The last of several, in threads or in turns, leaves it in the mode that it was in.
        """
        with HOLDING:
            if not self._evaluators:
                self._trained = self.training
            self._evaluators += 1
            self.eval()
        try:
            yield
        finally:
            with HOLDING:
                self._evaluators -= 1
                if not self._evaluators:
                    self.train(self._trained)

    @contextmanager
    def weights_held(self) -> Iterator[None]:
        """For decoding: within it adapted weights are computed once, see `Linear.held`.

        So what can be merged costs what the base does. What documents start from, behind a prompt
        or a prefix, is computed once, too. No weight may change within.
        """
        with ExitStack() as stack:
            for module in self.modules():
                if isinstance(module, Linear):
                    stack.enter_context(module.held())
            with HOLDING:
                self._holders += 1
            try:
                with HOLDING, torch.no_grad():
                    held = self.adapters_off, self._lengths_before(), self._starts(self.loops)
                    self._held = held
                yield
            finally:
                with HOLDING:
                    self._holders -= 1
                    if not self._holders:  # of threads, or of those in turns, the last one
                        self._held = None

    # ------------------------------------------------------------------------ what texts start from

    def positions_before_text(self) -> int:
        """How many positions an adapter's prefix and prompt take before a document's text."""
        return sum(self._lengths_before())

    def _lengths_before(self) -> tuple[int, int]:
        """How many positions a prefix and a prompt take before a document's text."""
        if self._held is not None and self._held[0] == self.adapters_off:
            return self._held[1]
        length = 0
        if self.has_prompt:
            adapter: Any = next(iter(self.prompt.values()))
            length = len(adapter.prompt()) if adapter.positions is None else adapter.positions
        return max(block.prefix_length() for block in self.blocks), length

    def _starts(self, loops: int, no_grad_loops: int = 0) -> list[State]:
        """What documents start from, for each run of each block: a state of one row.

        It is {} where nothing says it; else the prefix, and where there is a prompt the state
        after reading it, which is the same as reading it before each document.

        Args:
            loops: Iterations of the stack with gradients.
            no_grad_loops: Runs before those, without gradients.
        """
        runs = [*self.blocks] * (no_grad_loops + loops)
        held = self._held
        if held is not None and not (torch.is_grad_enabled() or followed()):
            off, _, states = held
            if off == self.adapters_off and len(states) == len(runs):
                return states
        starts = [block.learned_start() for block in self.blocks] * (no_grad_loops + loops)
        if not self.has_prompt:
            return starts
        adapter: Any = next(iter(self.prompt.values()))
        x: Tensor = adapter.prompt()[None].to(self.dtype)
        first, time = self._lengths_before()[0], x.shape[1]
        context, _ = interface.make_context(1, time, device=x.device, first=first)
        options: Any = {"device": x.device, "dtype": x.dtype}
        pairs = zip(runs, starts, strict=True)
        before = [block.start_state(1, start, **options) for block, start in pairs]
        after: list[State | None] = []
        self._run_all(x, before, context, starts, None, loops, no_grad_loops, after, [])
        return [block.copy_state(state or {}) for block, state in zip(runs, after, strict=True)]

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.head.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.head.device

    def hidden(
        self,
        tokens: Tensor,
        state: State | None = None,
        documents: Tensor | None = None,
        examples: Tensor | None = None,
        form: str | None = None,
        loops: int | None = None,
        no_grad_loops: int = 0,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, State | None, list[Aux]]:
        """`forward` up to the head: x (batch, time, dim) after the last norm, state, aux.

        Args:
            tokens: As for `forward`, and so are the next four.
            state: The same.
            documents: The same.
            examples: The same.
            form: The same.
            loops: Iterations of the stack with gradients; None: all of them. Progressive loss, in
                which looped models are trained, takes a random number.
            no_grad_loops: Runs before those, without gradients.
            positions: As for `forward`.
        """
        tokens = check_tokens(tokens)
        check_beside(tokens, documents=documents, examples=examples, positions=positions)
        if state is not None:
            check_state(state, len(tokens), self.depth * self.loops)
        given = (tokens, state, documents, examples, form, loops, no_grad_loops, positions)
        if torch.compiler.is_compiling():
            return self._hidden(*given)
        trains = self.training and torch.is_grad_enabled()
        compute = self.compiled_hidden if trains and self.compiled_hidden else self._hidden
        try:
            return compute(*given)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, IndexError, KeyError, TypeError) as error:
            reason = explain(self, tokens, state, positions)
            if reason is None:
                raise
            raise ValueError(reason) from error

    def _hidden(
        self,
        tokens: Tensor,
        state: State | None,
        documents: Tensor | None,
        examples: Tensor | None,
        form: str | None,
        loops: int | None,
        no_grad_loops: int,
        positions: Tensor | None,
    ) -> tuple[Tensor, State | None, list[Aux]]:
        """`hidden` of inputs whose kind is right."""
        batch_size, time = tokens.shape
        lengths = self._lengths_before()
        if state is not None and self.training and self.embedding.trains_on_whole_documents:
            raise ValueError(
                f"{type(self.embedding).__name__} draws positions for whole documents in training, "
                "and each segment of a text would draw others: give no state, or call eval() first"
            )
        context, cursor = interface.make_context(
            batch_size,
            time,
            documents=documents,
            examples=examples,
            positions=positions,
            cursor=None if state is None else state["place"],
            device=tokens.device,
            first=sum(lengths),
        )
        # The embedding counts a prefix's tokens, which stand for a text's, and no prompt's; and
        # what the task calls a position it sees as such.
        named = type(self.embedding).prompt_positions is not Embedding.prompt_positions
        unseen = lengths[1] + (lengths[0] if named or positions is not None else 0)
        text = context
        if unseen:
            text = context._replace(positions=(context.positions - unseen) * context.valid)
        placed = self.embedding.assign_positions(text)
        if placed is not text:
            counted = placed.positions + unseen * placed.valid if unseen else placed.positions
            context = placed._replace(positions=interface.of_this_call(counted))
        keep = state is not None
        loops = self.loops - no_grad_loops if loops is None else loops
        if loops < 1 or no_grad_loops < 0 or (keep and no_grad_loops + loops != self.loops):
            raise ValueError(
                f"{no_grad_loops} iterations without gradients and {loops} with: at least one "
                f"must have gradients, and a state needs {self.loops} in all"
            )
        before: Sequence[State | None] = [None] * self.depth * (no_grad_loops + loops)
        if state is not None:
            before = state["blocks"]
        carried = None if state is None else state["embedding"]
        x, embedded = self.embedding(tokens, carried, placed)
        if self.dropout:
            x = nn.functional.dropout(x, self.dropout, self.training)
        starts: list[State] = []
        prepended = 0
        if state is None and not context.packed and self.has_prompt:
            # One document a row: the prompt is read with the text, in one pass.
            adapter: Any = next(iter(self.prompt.values()))
            x, context = prepend_prompt(x, context, adapter.prompt(), lengths[0])
            prepended = x.shape[1] - time
            starts = [block.learned_start() for block in self.blocks] * (no_grad_loops + loops)
        elif state is None or context.packed:  # else the state holds it
            starts = self._starts(loops, no_grad_loops)
        after: list[State | None] = []
        aux: list[Aux] = []
        x = self._run_all(x, before, context, starts, form, loops, no_grad_loops, after, aux)
        if loops > 1:
            aux = [_over_loops(aux[layer :: self.depth]) for layer in range(self.depth)]
        state = {"place": cursor, "embedding": embedded, "blocks": after} if keep else None
        return self.norm(x[:, prepended:]), state, aux

    def _run_all(
        self,
        x: Tensor,
        before: Sequence[State | None],
        context: Context,
        starts: Sequence[State],
        form: str | None,
        loops: int,
        no_grad_loops: int,
        after: list[State | None],
        aux: list[Aux],
    ) -> Tensor:
        """All iterations of the stack, on its input x; see `_run`."""
        embedding = x
        if no_grad_loops:
            with torch.no_grad():
                for loop in range(no_grad_loops):
                    x = self._run(x, embedding, before, context, starts, form, loop, after, [])
        for loop in range(no_grad_loops, no_grad_loops + loops):
            x = self._run(x, embedding, before, context, starts, form, loop, after, aux)
        return x

    def _run(
        self,
        x: Tensor,
        embedding: Tensor,
        before: Sequence[State | None],
        context: Context,
        starts: Sequence[State],
        form: str | None,
        loop: int,
        after: list[State | None],
        aux: list[Aux],
    ) -> Tensor:
        """The stack once; the blocks' states go to `after`, and what they say beside to `aux`."""
        recompute = self.activation_checkpointing and self.training and torch.is_grad_enabled()
        recompute = recompute and not transformed()  # which keep what they need by other means
        for layer, block in enumerate(self.blocks):
            # The first block has the embedding in x already.
            injects = self.injection == "layer" or (self.injection == "loop" and layer == 0)
            injected = embedding if injects and loop + layer else None
            run = loop * self.depth + layer
            here = context._replace(start=starts[run]) if starts and starts[run] else context
            arguments = (x, before[run], here, injected, form)
            if recompute:
                x, mixed, entries = _recomputed(_with_these_weights(block), *arguments)
            else:
                x, mixed, entries = block(*arguments)
            after.append(mixed)
            aux.append(entries)
        return x

    def forward(
        self,
        tokens: Tensor,
        state: State | None = None,
        documents: Tensor | None = None,
        examples: Tensor | None = None,
        form: str | None = None,
        logits_to_keep: int | None = None,
        positions: Tensor | None = None,
    ) -> Output:
        """Logits of the token after each token.

        Args:
            tokens: (batch, time) ints below vocab_size. On a CPU one that is not is named; a GPU
                says "device-side assert" some calls later: run the batch on the CPU to find it.
            state: From `init_state` or the call before; it is consumed. None: start empty, and
                get none back.
            documents: (batch, time) ints: contiguous runs, -1 for padding at the ends of a row.
                None: each row continues the document it is in.
            examples: (batch, time) ints: the task's example numbers, for parts that draw by them.
            form: "parallel", "chunkwise" or "recurrent"; None: what is fastest here.
            logits_to_keep: Only of the last tokens, this many, 0 or more; None: of all.
            positions: (batch, time) ints, 0 or more, for methods that take positions from the
                task (position coupling). None: counted within the document, or on from the last
                of the call before.

        Raises:
            ValueError: An input that is not what is said here; the message says what to give.
        """
        if logits_to_keep is not None and logits_to_keep < 0:
            raise ValueError(f"logits_to_keep={logits_to_keep} must be at least 0")
        x, state, aux = self.hidden(tokens, state, documents, examples, form, positions=positions)
        if logits_to_keep is not None:
            x = x[:, -logits_to_keep:] if logits_to_keep else x[:, :0]
        return Output(self.head(x), state, aux)

    def pooled_losses(self, pools: list[dict[str, Tensor]]) -> list[Aux]:
        """More losses and metrics of each layer, from its pools summed over the ranks."""
        parts = self._with_each_layer(pools, "pools")
        return [interface.check_aux(part, part.pooled_losses(mine)) for part, mine in parts]

    def after_step(self, sums: list[dict[str, Tensor]]) -> None:
        """Hand each layer's sums to its feed-forward, unless that is frozen.

        Beside an adapter the base stays, its coefficients and experts' biases too.
        """
        for part, mine in self._with_each_layer(sums, "sums"):
            if not is_frozen(part):
                part.after_step(mine)

    def _with_each_layer(
        self, entries: list[dict[str, Tensor]], kind: str
    ) -> Iterator[tuple[FeedForward, dict[str, Tensor]]]:
        """The layers' feed-forwards and the entries of each."""
        if isinstance(entries, dict) or len(entries) != self.depth:
            raise ValueError(
                f"{kind} of {len(entries)} {type(entries).__name__} entries for {self.depth} "
                f"layers: give a list of one dict a layer, [layer.{kind} for layer in aux]"
            )
        parts = [block.feed_forward for block in self.blocks]
        return zip(parts, entries, strict=True)

    def parameter_count(self) -> int:
        """Parameters, shared ones once, and the weights of 1 bit that are kept packed."""
        packed = sum(m.packed_weights for m in self.modules() if isinstance(m, Linear))
        return packed + sum(parameter.numel() for parameter in self.parameters())


def _whole(size: Any) -> bool:
    return isinstance(size, int) and not isinstance(size, bool) and size >= 1


def _with_these_weights(block: nn.Module) -> Callable[..., Any]:
    """The block as it is now: computed again, it must take the tensors that it takes now.

    `torch.func.functional_call` replaces them for the forward pass alone, and the backward pass
    would recompute the block with its own.
    """
    held = dict(chain(block.named_parameters(), block.named_buffers()))
    # FSDP replaces its shards (DTensor) by whole tensors by itself, each time.
    sharded = any(type(tensor) not in (Tensor, nn.Parameter) for tensor in held.values())
    if sharded or torch.compiler.is_compiling():
        return block

    def run(*arguments: Any) -> Any:
        now = chain(block.parameters(), block.buffers())
        if all(here is then for here, then in zip(now, held.values(), strict=True)):
            return block(*arguments)
        return functional_call(block, held, arguments)

    return run


def _recomputed(block: Callable[..., Any], *arguments: Any) -> tuple[Tensor, State | None, Aux]:
    """What a block computes, which its backward pass computes again."""

    def run(*given: Any) -> Any:
        x, state, aux = block(*given)
        return x, state, (aux.losses, aux.metrics, aux.sums, aux.pools)

    # Dynamo of torch 2.11 finds the tensors that leave a checkpoint in tuples and dicts alone.
    x, state, entries = checkpoint(run, *arguments, use_reentrant=False)
    return x, state, Aux(*entries)


def _over_loops(runs: list[Aux]) -> Aux:
    """One layer's aux over its iterations: the sum of each entry, and the mean of a metric."""
    whole = Aux()
    for aux in runs:
        for kind in ("losses", "metrics", "sums", "pools"):
            summed = getattr(whole, kind)
            for name, value in getattr(aux, kind).items():
                summed[name] = summed[name] + value if name in summed else value
    whole.metrics = {name: value / len(runs) for name, value in whole.metrics.items()}
    return whole


def _without_adapters(module: nn.Module) -> Iterator[nn.Module]:
    """A module and all it is made of, in the order of `modules`, but for adapters."""
    if not isinstance(module, Adapter):
        yield module
        for child in module.children():
            yield from _without_adapters(child)


def _replace_linears(part: nn.Module, spec: Spec) -> None:
    """Build every Linear of mixers and feed-forwards as the slot `linear` says."""
    for name, child in list(part.named_children()):
        if type(child) is Linear and (child.stack is not None or not child.weight_is_read):
            made = build(
                "linear",
                spec,
                child.in_features,
                child.blocks,
                stack=child.stack,
                bias=child.bias is not None,
                residual_projection=child.residual_projection,
            )
            if child.keeps_init:  # its own values, which are drawn already
                made.load_state_dict(child.state_dict(), strict=False)
                made.keeps_init = True
                made.weight_drawn()
            made.heads, made.called_in_parts = child.heads, child.called_in_parts
            setattr(part, name, made)
        elif not isinstance(child, Router):  # which choose in full precision
            _replace_linears(child, spec)


def _fill_slot(
    mixer: Mixer, slot: str, make: Callable[..., nn.Module], spec: dict[str, Any], size: str
) -> None:
    """Set a mixer's `rotary` or `bias`, or say that it takes none."""
    if not hasattr(mixer, slot):
        if spec["class_path"] == NONE.get(slot):  # what it does already
            return
        raise ValueError(
            f"{type(mixer).__name__} takes no {slot}: set {slot} to none, or take a mixer with one"
        )
    setattr(mixer, slot, make(slot, spec, getattr(mixer, size)))
