"""The interface every model of the zoo is built from. Read this file first.

A decoder is an embedding, a stack of blocks, a norm and a head. A block is::

    x = x + mixer(norm(x))            # mixes over time, causally
    x = x + feed_forward(norm(x))     # mixes over channels

(a short convolution may stand before each mixer, ``h = norm(x)``, ``mixer(h + convolution(h))``)
and a part is swapped by naming another class for its slot. All parts share three ideas:

* **Documents.** A row of a batch holds one or more documents, each a run of tokens with one
  number; -1 marks padding, which is only at the ends of a row. The runs decide, not the
  numbers: a number that comes again after another begins another document, within a call and
  from call to call. Left padding and packing are the same thing seen from here: a part must
  give each document what it would give it alone. `Context` carries what a part needs to know of
  this, built once a call.
* **State.** What a part carries from one call to the next, such as a KV cache: a dict of tensors
  with the batch on
  axis 0, of plain ints that hold for all rows, and of dicts and lists of these. It goes in and
  comes back; no module hides any of it. ``None`` in means "start empty and keep nothing", and
  ``None`` comes back. A call consumes the state it is given (it may write into it where gradients
  are off): whoever wants to keep one calls `fork` first.
* **aux.** A feed-forward returns an `Aux` beside its output: tensors by name. Its `losses` are
  added to the training loss, its `metrics` are averaged and logged, its `sums` are summed over
  micro-batches and ranks and handed to `FeedForward.after_step`, and its `pools` are summed over
  ranks, gradient and all, and handed to `FeedForward.pooled_losses`: for a loss that needs the
  other ranks' tokens. Nothing reduces inside a block. A decoder gives a list of them, one a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archzoo.auxiliary import Aux, check_aux
from archzoo.documents import Context, init_cursor, init_place, make_context
from archzoo.linear import closing
from archzoo.numerics import (
    KeepsFloat32,
    at_least_float32,
    cast,
    constant,
    for_float64,
    head_size,
    merge_heads,
    of_this_call,
    once_per_call,
    split_heads,
    without_autocast,
)
from archzoo.prefixes import StartsFromPrefix
from archzoo.states import State, detach, fork, map_state, nbytes, reorder, select_rows, to

__all__ = [
    "FORMS",
    "Aux",
    "Bias",
    "Block",
    "Context",
    "Embedding",
    "FeedForward",
    "KeepsFloat32",
    "Mixer",
    "Rotary",
    "Router",
    "Routing",
    "State",
    "at_least_float32",
    "cast",
    "check_aux",
    "closing",
    "constant",
    "detach",
    "for_float64",
    "fork",
    "head_size",
    "init_cursor",
    "init_place",
    "make_context",
    "map_state",
    "merge_heads",
    "nbytes",
    "of_this_call",
    "once_per_call",
    "reorder",
    "select_rows",
    "split_heads",
    "to",
    "without_autocast",
]

FORMS = ("parallel", "chunkwise", "recurrent")


class Mixer(StartsFromPrefix):
    """Mixes over time, causally: x (batch, time, dim) to y (batch, time, dim).

    A newcomer writes ``__init__(self, dim, heads, ...)``, `init_state` and `step`, and has a
    correct model: `step` defines the mixer, and the base class folds it over time. `chunkwise`
    and `parallel` are other ways to compute the same thing, written for speed.

    What a part owns beside the tensors of `nn.Linear` it starts in ``reset_parameters``, which the
    decoder calls for a model that was built on the meta device.

    A mixer that takes a rotary or a bias from its decoder has an attribute of that name (and
    `head_dim`, `heads`), which holds its own default until the decoder sets another.
    """

    #: True: `step` and its faster forms obey `Context.starts` and `Context.valid` themselves.
    #: False: the base class resets and holds the state around every step.
    handles_documents = False

    def init_state(
        self,
        batch_size: int,
        *,
        capacity: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        """The state before the first token.

        Args:
            batch_size: Rows.
            capacity: Tokens that the caller expects; a KV cache allocates its buffer for them.
            device: Where the state lives.
            dtype: The dtype of x; sums over time are kept in float32 at least.
        """
        raise NotImplementedError(f"{type(self).__name__} needs init_state(batch_size, ...)")

    def copy_state(self, state: State, spare: int = 0) -> State:
        """A copy that a later call cannot touch, without unused buffers.

        Args:
            state: Of this mixer.
            spare: Tokens that a KV cache's buffers shall take before they must grow.
        """
        return fork(state)

    def fixed_state(self, state: State) -> State:
        """The same state in tensors that stay where they are, so that a graph of `step` replays.

        Whatever a step changes is then a tensor whose shape stays: a KV cache has the capacity for
        the tokens to come, and its length is a tensor of no axes. `step` takes such a state, writes
        into it or returns other tensors of the same shapes, and waits for no device; `copy_state`
        makes an ordinary state of it again. The base class returns the state as it is, which is
        right where it holds tensors of constant shapes alone.

        Args:
            state: Of a capacity for the tokens to come, perhaps fixed already; it is consumed.
        """
        return state

    def step(self, x: Tensor, state: State, context: Context) -> tuple[Tensor, State]:
        """One token, x (batch, 1, dim): the recurrent form. It defines the mixer.

        Args:
            x: (batch, 1, dim).
            state: From `init_state` or the call before; it is consumed.
            context: Of the same tokens.
        """
        raise NotImplementedError(f"{type(self).__name__} needs step(x, state, context)")

    def recurrent(self, x: Tensor, state: State, context: Context) -> tuple[Tensor, State]:
        """Fold `step` over x (batch, time, dim).

        Args:
            x: (batch, time, dim).
            state: As for `step`.
            context: Of the same tokens.
        """
        guarded = context.packed and not self.handles_documents
        if x.shape[1] == 1 and not guarded:  # decoding: one step, no detours
            return self.step(x, state, context)
        outputs = []
        for t in range(x.shape[1]):
            here = context.segment(t, t + 1)
            if guarded:
                fresh = self.start_state(x.shape[0], here.start, device=x.device, dtype=x.dtype)
                state = select_rows(here.starts[:, 0], fresh, state)
                before = fork(state)
            y, state = self.step(x[:, t : t + 1], state, here)
            if guarded:
                state = select_rows(here.valid[:, 0], state, before)
            outputs.append(y)
        return torch.cat(outputs, dim=1), state

    def chunkwise(
        self, x: Tensor, state: State | None, context: Context
    ) -> tuple[Tensor, State | None]:
        """Any time, from any state; state None starts empty. The base class folds `step`.

        Args:
            x: (batch, time, dim).
            state: As for `step`. None: nothing came before.
            context: Of the same tokens.
        """
        if state is None:
            state = self.start_state(x.shape[0], context.start, device=x.device, dtype=x.dtype)
        return self.recurrent(x, state, context)

    def parallel(
        self, x: Tensor, state: State | None, context: Context
    ) -> tuple[Tensor, State | None]:
        """All tokens at once; the same contract as `chunkwise`, which the base class calls.

        Args:
            x: (batch, time, dim).
            state: As for `chunkwise`.
            context: Of the same tokens.
        """
        return self.chunkwise(x, state, context)

    def choose_form(self, x: Tensor, state: State | None) -> str:
        """The form that runs when none is given: chosen by the sizes, never by training mode."""
        return "recurrent" if x.shape[1] == 1 and state is not None else "parallel"

    def forward(
        self, x: Tensor, state: State | None, context: Context, form: str | None = None
    ) -> tuple[Tensor, State | None]:
        """Mix x (batch, time, dim) and hand back y and the state after it.

        Args:
            x: (batch, time, dim).
            state: What this mixer returned before; None: start empty, return None.
            context: Of the same batch and time.
            form: "parallel", "chunkwise" or "recurrent": that form runs. None: `choose_form`.
        """
        form = form or self.choose_form(x, state)
        if form not in FORMS:
            raise ValueError(f"form {form!r} is not one of {', '.join(FORMS)}")
        keep = state is not None
        if not keep and (form == "recurrent" or context.start):
            state = self.start_state(x.shape[0], context.start, device=x.device, dtype=x.dtype)
        y, state = getattr(self, form)(x, state, context)
        return y, state if keep else None


class FeedForward(nn.Module):
    """Mixes over channels, each token alone: ``__init__(self, dim, width, ...)``."""

    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, Aux]:
        """X (batch, time, dim) to y of the same shape, and aux: empty when dense."""
        raise NotImplementedError

    def pooled_losses(self, pools: dict[str, Tensor]) -> Aux:
        """More losses and metrics, from this layer's `Aux.pools` summed over the ranks."""
        return Aux()

    def after_step(self, sums: dict[str, Tensor]) -> None:
        """Once per optimizer step, with this layer's `Aux.sums` summed over the step."""


class Routing(NamedTuple):
    """A router's decision for each of `tokens` tokens.

    Attributes:
        weights: (tokens, k) float32 at least, what each chosen expert's output is scaled by.
        indices: (tokens, k) int64, the chosen experts.
        probabilities: (tokens, experts), the full distribution.
        raw_logits: (tokens, experts), before any normalisation; a z-loss reads these.
        x: (tokens, dim) or None: what the router was given, again. Experts that take it from here
            let the router add up both gradients of x, in one pass with its own.
    """

    weights: Tensor
    indices: Tensor
    probabilities: Tensor
    raw_logits: Tensor
    x: Tensor | None = None


class Router(nn.Module):
    """Turns a token into expert weights and indices: ``__init__(self, dim, experts, top_k, ...)``.

    A mixture builds it with its own numbers of experts and of experts a token.
    """

    def forward(self, x: Tensor, context: Context) -> Routing:
        """X (batch, time, dim) to a `Routing` of batch * time tokens, row by row."""
        raise NotImplementedError

    def after_step(self, sums: dict[str, Tensor]) -> None:
        """Once per optimizer step: what moves by counts and not by gradients moves here.

        What it moves is a buffer, so that checkpoints hold it.

        Args:
            sums: The mixture's `Aux.sums`, summed over the step and over all ranks;
                ``assignments`` (experts,) int64 counts the tokens sent to each expert.
        """


class Embedding(nn.Module):
    """Tokens in, vectors out: ``__init__(self, vocab_size, dim, ...)``.

    `weight` (vocab_size, dim) is the table of words, which a decoder may tie to its head.
    """

    weight: Tensor

    #: True: the table starts as the class draws it, and not as the decoder draws matrices.
    keeps_init = False

    #: True: in training it draws for a document as a whole, which must therefore come in one call:
    #: the decoder refuses a state then.
    trains_on_whole_documents = False

    def init_state(
        self,
        batch_size: int,
        *,
        capacity: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        """As a mixer's. The base class carries nothing.

        Args:
            batch_size: Rows.
            capacity: Tokens that the caller expects.
            device: Where the state lives.
            dtype: Of x.
        """
        return {}

    def assign_positions(self, context: Context) -> Context:
        """The context as every part shall see it, this one included.

        A method that chooses positions itself (randomised positions) replaces the counted ones;
        all others return the context unchanged.
        """
        return self.place(context)

    def place(self, context: Context) -> Context:
        """Deprecated name of `assign_positions`."""
        return context

    def prompt_positions(self, tokens: Tensor, documents: Tensor | None = None) -> Tensor | None:
        """Positions of prompts, (batch, time), where the method reads them off the text.

        None, the base class's answer: they are counted. Tasks give their batches' positions
        themselves; this serves prompts that come as text.
        """
        return None

    def bind(self, task: Any, *, training: bool = False) -> dict[str, Any]:
        """Learn from the task what the constructor left open: which tokens are digits, say.

        A wrapper hands this on to the embedding inside, and so the two below.

        Args:
            task: Such as an `archzoo.tasks.Task`, prepared.
            training: It will be trained on, and not only evaluated.

        Returns:
            The constructor's arguments that changed, for the decoder's configuration.
        """
        return {}

    def check_prompts(self, prompts: Sequence[Sequence[int]]) -> None:
        """Warn of prompts, lists of tokens, that training cannot have prepared for."""

    @property
    def coverage(self) -> int | None:
        """Digits of the longest number that training can have covered; None: it has no limit."""
        return None

    def forward(
        self, tokens: Tensor, state: State | None, context: Context
    ) -> tuple[Tensor, State | None]:
        """Tokens (batch, time) to x (batch, time, dim); state None comes back as None."""
        raise NotImplementedError


class Rotary(nn.Module):
    """A position method applied to queries and keys: ``__init__(self, head_dim, ...)``."""

    def forward(
        self, q: Tensor, k: Tensor, query_positions: Tensor, key_positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Rotate q and k, each (batch, time, heads, head_dim), by positions (batch, time)."""
        raise NotImplementedError

    def both(self, qk: Tensor, heads: int, positions: Tensor) -> tuple[Tensor, Tensor]:
        """`forward` for q and k side by side: (batch, time, heads + key heads, head_dim).

        A rotation that treats both alike does them in one go, which in decoding saves a tenth.

        Args:
            qk: (batch, time, heads + key heads, head_dim).
            heads: Of q; the others are k's.
            positions: (batch, time) int.
        """
        q, k = qk[:, :, :heads], qk[:, :, heads:]
        return self.forward(q, k, positions, positions)


class Bias(nn.Module):
    """A position method added to attention's logits: ``__init__(self, heads, ...)``."""

    def forward(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        """Positions (batch, queries), (batch, keys) to (batch or 1, heads, queries, keys)."""
        raise NotImplementedError


class Block(nn.Module):
    """Norm, mixer, residual; norm, feed-forward, residual.

    ``pre``:  x = x + f(norm(x));  ``post``: x = norm(x + f(x)).

    Args:
        mixer: Over time.
        feed_forward: Over channels.
        norms: The two norms, in order.
        placement: "pre" or "post".
        dropout: Of each branch before it joins the residual stream.
        convolution: Stands before the mixer: f(h) is mixer(h + convolution(h)) then.
    """

    #: What `forward` calls in training instead of `run`, with this block first, once
    #: `Decoder.compile_blocks` has compiled that.
    compiled_run: Callable[..., Any] | None = None

    def __init__(
        self,
        mixer: Mixer,
        feed_forward: FeedForward,
        norms: tuple[nn.Module, nn.Module],
        *,
        placement: str = "pre",
        dropout: float = 0.0,
        convolution: Mixer | None = None,
    ) -> None:
        super().__init__()
        self.mixer_norm, self.feed_forward_norm = norms
        self.convolution, self.mixer, self.feed_forward = convolution, mixer, feed_forward
        self.post = placement == "post"
        self.dropout = dropout

    def __getstate__(self) -> dict[str, Any]:
        """Without the compiled form, which is neither saved nor copied."""
        return {n: value for n, value in super().__getstate__().items() if n != "compiled_run"}

    def start_state(self, batch_size: int, start: State | None = None, **options: Any) -> State:
        """The mixer's; beside a convolution's, {"convolution": ..., "mixer": ...}, if it has one.

        Args:
            batch_size: Rows.
            start: A state of one row to start from, such as `learned_start` gives it, or None.
            **options: As for `Mixer.init_state`.
        """
        if self.convolution is None:
            return self.mixer.start_state(batch_size, start, **options)
        start = start or {}
        return {
            name: part.start_state(batch_size, start.get(name), **options)
            for name, part in (("convolution", self.convolution), ("mixer", self.mixer))
        }

    def learned_start(self) -> State:
        """What an adapter's prefix lets a document start from, in the form of `start_state`."""
        start = self.mixer.learned_start()
        if self.convolution is None:
            return start
        near = self.convolution.learned_start()
        return {"convolution": near, "mixer": start} if near or start else {}

    def prefix_length(self) -> int:
        """How many positions a prefix takes before a document's text; 0 without one."""
        parts = [part for part in (self.convolution, self.mixer) if part is not None]
        return max(part.prefix_length() for part in parts)

    def mix(
        self, h: Tensor, state: State | None, context: Context, form: str | None
    ) -> tuple[Tensor, State | None]:
        """The mixer, after its convolution if there is one.

        Args:
            h: (batch, time, dim).
            state: As `start_state` gives it, or None.
            context: Of the same tokens.
            form: As for `Mixer`.
        """
        if self.convolution is None:
            mixed, state = self.mixer(h, state, context, form)
            return mixed, state
        before, own = (None, None) if state is None else (state["convolution"], state["mixer"])
        start = context.start or {}
        near, before = self.convolution(
            h, before, context._replace(start=start.get("convolution")), form
        )
        mixed, own = self.mixer(h + near, own, context._replace(start=start.get("mixer")), form)
        return mixed, None if state is None else {"convolution": before, "mixer": own}

    def copy_state(self, state: State, spare: int = 0) -> State:
        """As `Mixer.copy_state`, of the state that a call of this block returns."""
        if self.convolution is None:
            return self.mixer.copy_state(state, spare)
        return {
            "convolution": self.convolution.copy_state(state["convolution"], spare),
            "mixer": self.mixer.copy_state(state["mixer"], spare),
        }

    def fixed_state(self, state: State) -> State:
        """As `Mixer.fixed_state`, of the state that a call of this block returns."""
        if self.convolution is None:
            return self.mixer.fixed_state(state)
        return {
            "convolution": self.convolution.fixed_state(state["convolution"]),
            "mixer": self.mixer.fixed_state(state["mixer"]),
        }

    def _drop(self, branch: Tensor) -> Tensor:
        return F.dropout(branch, self.dropout, self.training) if self.dropout else branch

    def forward(
        self,
        x: Tensor,
        state: State | None,
        context: Context,
        injected: Tensor | None = None,
        form: str | None = None,
    ) -> tuple[Tensor, State | None, Aux]:
        """X (batch, time, dim) to (x, the state after it, the feed-forward's aux).

        `injected`, of x's shape, is added first: input injection, as looped models use it.
        """
        given = (x, state, context, injected, form)
        if self.compiled_run is not None and self.training and torch.is_grad_enabled():
            computed: tuple[Tensor, State | None, Aux] = self.compiled_run(self, *given)
            return computed
        return self.run(*given)

    def run(
        self,
        x: Tensor,
        state: State | None,
        context: Context,
        injected: Tensor | None,
        form: str | None,
    ) -> tuple[Tensor, State | None, Aux]:
        """`forward`, as it is written down.

        Args:
            x: As for `forward`, and so are the others.
            state: The same.
            context: The same.
            injected: The same.
            form: The same.
        """
        if injected is not None:
            x = x + injected
        if self.post:
            mixed, state = self.mix(x, state, context, form)
            x = self.mixer_norm(x + self._drop(mixed))
            fed, aux = self.feed_forward(x, context)
            x = self.feed_forward_norm(x + self._drop(fed))
            return x, state, check_aux(self.feed_forward, aux)
        mixed, state = self.mix(self.mixer_norm(x), state, context, form)
        x = x + self._drop(mixed)
        fed, aux = self.feed_forward(self.feed_forward_norm(x), context)
        return x + self._drop(fed), state, check_aux(self.feed_forward, aux)
