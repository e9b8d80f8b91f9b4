"""The interface every model of the zoo is built from. Read this file first.

A decoder is an embedding, a stack of blocks, a norm and a head. A block is::

    x = x + mixer(norm(x))            # mixes over time, causally
    x = x + feed_forward(norm(x))     # mixes over channels

and a part is swapped by naming another class for its slot. All parts share three ideas:

* **Documents.** A row of a batch holds one or more documents, each a run of tokens with one
  number; -1 marks padding, which stands only at the ends of a row. The runs decide, not the
  numbers: a number that comes again after another begins another document, within a piece and
  from piece to piece. Left padding and packing are the same thing seen from here: a part must
  give each document what it would give it alone. `Context` carries what a part needs to know of
  this, built once a call.
* **State.** What a part carries from one call to the next: a dict or list of tensors with the
  batch on axis 0, and of plain ints that hold for all rows. It goes in and comes back; no module
  hides any of it. ``None`` in means "start empty and keep nothing", and ``None`` comes back. A
  call consumes the state it is given (it may write into it where gradients are off): whoever
  wants to keep one calls `fork` first.
* **aux.** A feed-forward returns a dict of tensors beside its output: ``loss/NAME`` is added to
  the training loss, ``metric/NAME`` is averaged and logged, ``sum/NAME`` is summed over
  micro-batches and ranks and handed to `FeedForward.after_step`, and ``pool/NAME`` is summed over
  ranks, gradient and all, and handed to `FeedForward.pooled_losses`: for a loss that needs the
  other ranks' tokens. Nothing reduces inside a block.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archzoo.derivatives import followed, transformed

State = Any  # a pytree: dict | list of Tensor (batch first) | int | bool | None
Aux = dict[str, Tensor]

FORMS = ("parallel", "chunkwise", "recurrent")


# ---------------------------------------------------------------------------- context


class Context(NamedTuple):
    """What a part may know of the tokens beside their vectors; every field is (batch, time).

    Attributes:
        documents: int64, which document of its row a token belongs to, counted from 0 over all
            pieces, whatever numbers the caller gave; -1 is padding.
        positions: int64, counted from 0 within the document, or as the caller gives them.
        valid: bool, not padding.
        starts: bool, the first token of its document.
        examples: int64 or None, the task's example numbers, when it gives them.
        packed: False says that no row holds padding or a second document, in this call or before
            it, so masks may be skipped. A plain bool: no device is asked.
    """

    documents: Tensor
    positions: Tensor
    valid: Tensor
    starts: Tensor
    examples: Tensor | None = None
    packed: bool = False

    def piece(self, begin: int, end: int) -> Context:
        """The same for the tokens begin..end-1."""
        return Context(
            self.documents[:, begin:end],
            self.positions[:, begin:end],
            self.valid[:, begin:end],
            self.starts[:, begin:end],
            None if self.examples is None else self.examples[:, begin:end],
            self.packed,
        )


def init_place(batch_size: int, device: torch.device | str | None = None) -> dict[str, Any]:
    """The place before the first token: no document yet (-1), position -1, nothing packed."""
    before = torch.full((batch_size,), -1, dtype=torch.int64, device=device)
    return {
        "documents": before,
        "begun": torch.zeros_like(before),
        "positions": before.clone(),
        "packed": False,
    }


def make_context(
    batch_size: int,
    time: int,
    *,
    documents: Tensor | None = None,
    examples: Tensor | None = None,
    positions: Tensor | None = None,
    place: dict[str, Any] | None = None,
    device: torch.device | str | None = None,
) -> tuple[Context, dict[str, Any]]:
    """Build the context of a piece of text, and the place where it ends.

    Args:
        batch_size: Rows.
        time: Tokens in each row of this piece.
        documents: (batch, time) ints, -1 for padding; a token whose number is not that of the
            token before it begins a document. None: each row goes on with the document it is in
            (or is one whole document, where nothing came before).
        examples: (batch, time) ints of the task, or None.
        positions: (batch, time) ints, 0 or more, in the place of the counted ones; a piece
            without any counts on from the last. None: counted within the document.
        place: Where the piece before this one ended: the caller's number of each row's last
            document, how many have begun, and the position of the last token, as `init_place`
            and this function return it. None: nothing came before.
        device: Where the tensors live.

    Returns:
        The context, and the place after the piece.

    Raises:
        ValueError: Documents, examples or positions of another shape than (batch, time).
    """
    entries = {"documents": documents, "examples": examples, "positions": positions}
    for name, given in entries.items():
        if given is not None and given.shape != (batch_size, time):
            raise ValueError(
                f"{name} has shape {tuple(given.shape)}, the tokens {(batch_size, time)}: "
                "give one number for every token"
            )
    if documents is None and (place is None or not place["packed"]):
        # One document a row, and its number is 0: nothing to compute but positions.
        zero = constant((0,), device, torch.int64).expand(batch_size, time)
        valid = constant((True,), device, torch.bool).expand(batch_size, time)
        if time > 1 or place is None:
            counted = torch.arange(time, device=device).expand(batch_size, time)
            if place is not None:
                counted = counted + (place["positions"][:, None] + 1)
        else:
            counted = place["positions"].view(batch_size, 1) + 1
        positions = of_this_call(counted if positions is None else _copied(positions))
        context = Context(zero, positions, valid, counted == 0, examples)
        after = {
            "documents": zero.select(1, 0),
            "begun": constant((1,), device, torch.int64).expand(batch_size),
            "positions": positions.select(1, -1),
            "packed": False,
        }
        return context, after

    index = torch.arange(time, device=device)
    place = place or init_place(batch_size, device)
    if documents is None:  # each row goes on with its last document
        documents = place["documents"].clamp(min=0)[:, None].expand(batch_size, time)
    documents = documents.to(torch.int64)
    valid = documents >= 0
    # The token before a token, padding left out: a document goes on behind padding between pieces.
    last_valid = torch.where(valid, index, -1).cummax(dim=1).values
    before = F.pad(last_valid[:, :-1], (1, 0), value=-1)
    previous = documents.gather(1, before.clamp(min=0))
    previous = torch.where(before >= 0, previous, place["documents"][:, None])
    starts = valid & (documents != previous)
    # Position within the document: tokens since its start, where that lies in this piece (index of
    # the last start so far; -1: none), else counted on from the place before.
    count = valid.cumsum(dim=1)
    last_start = torch.where(starts, index, -1).cummax(dim=1).values
    if positions is None:
        within = count - count.gather(1, last_start.clamp(min=0))
        went_on = place["positions"][:, None] + count
        positions = torch.where(last_start >= 0, within, went_on)
    positions = of_this_call(positions.long() * valid)
    begun = place["begun"][:, None] + starts.cumsum(dim=1)
    # The place after: the last token that is not padding; an all-padding piece moves nothing.
    last = last_valid[:, -1]
    seen, at = last >= 0, last.clamp(min=0)[:, None]
    place = {
        "documents": torch.where(seen, documents.gather(1, at)[:, 0], place["documents"]),
        "begun": begun[:, -1].clone(),  # a view would keep all counts alive
        "positions": torch.where(seen, positions.gather(1, at)[:, 0], place["positions"]),
        "packed": True,
    }
    runs = torch.where(valid, begun - 1, -1)
    return Context(runs, positions, valid, starts, examples, True), place


# ---------------------------------------------------------------------------- state


def map_state(function: Callable[..., Tensor], *states: State) -> State:
    """Apply a function to corresponding tensors of states of one structure; ints pass through."""
    first = states[0]
    if isinstance(first, Tensor):
        return function(*states)
    if isinstance(first, dict):
        return {name: map_state(function, *(state[name] for state in states)) for name in first}
    if isinstance(first, list | tuple):
        return [map_state(function, *entries) for entries in zip(*states, strict=True)]
    return first


def fork(state: State) -> State:
    """A copy that a later call cannot touch (calls consume the state they are given)."""
    return map_state(torch.clone, state)


def reorder(state: State, rows: Tensor) -> State:
    """Pick rows of the batch, with repetition: (kept,) int64, as beam search does."""
    return map_state(lambda leaf: leaf.index_select(0, rows.to(leaf.device)), state)


def detach(state: State) -> State:
    """Cut the gradient: truncated back-propagation calls it between windows."""
    return map_state(torch.Tensor.detach, state)


def to(state: State, device: torch.device | str) -> State:
    """Move a state to another device. Its dtypes are the parts' own choice and stay."""
    return map_state(lambda leaf: leaf.to(device), state)


def nbytes(state: State) -> int:
    """Bytes that the tensors of a state take."""
    sizes: list[int] = []

    def weigh(leaf: Tensor) -> Tensor:
        sizes.append(leaf.numel() * leaf.element_size())
        return leaf

    map_state(weigh, state)
    return sum(sizes)


def select_rows(rows: Tensor, chosen: State, other: State) -> State:
    """Row by row: `chosen` where rows (batch,) bool is True, else `other`."""

    def select(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(rows.view(-1, *(1,) * (a.dim() - 1)), a, b)

    return map_state(select, chosen, other)


# ---------------------------------------------------------------------------- parts


class Mixer(nn.Module):
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
            capacity: Tokens that the caller expects; a growing cache makes room for them.
            device: Where the state lives.
            dtype: The dtype of x; sums over time are kept in float32 at least.
        """
        raise NotImplementedError(f"{type(self).__name__} needs init_state(batch_size, ...)")

    def step(self, x: Tensor, state: State, context: Context) -> tuple[Tensor, State]:
        """One token, x (batch, 1, dim): the recurrent form. It defines the mixer."""
        raise NotImplementedError(f"{type(self).__name__} needs step(x, state, context)")

    def recurrent(self, x: Tensor, state: State, context: Context) -> tuple[Tensor, State]:
        """Fold `step` over x (batch, time, dim)."""
        guarded = context.packed and not self.handles_documents
        if x.shape[1] == 1 and not guarded:  # decoding: one step, no detours
            return self.step(x, state, context)
        outputs = []
        for t in range(x.shape[1]):
            here = context.piece(t, t + 1)
            if guarded:
                fresh = self.init_state(x.shape[0], device=x.device, dtype=x.dtype)
                state = select_rows(here.starts[:, 0], fresh, state)
                before = fork(state)
            y, state = self.step(x[:, t : t + 1], state, here)
            if guarded:
                state = select_rows(here.valid[:, 0], state, before)
            outputs.append(y)
        return torch.cat(outputs, dim=1), state

    def chunkwise(self, x: Tensor, state: State, context: Context) -> tuple[Tensor, State]:
        """Any time, from any state; state None starts empty. The base class folds `step`."""
        if state is None:
            state = self.init_state(x.shape[0], device=x.device, dtype=x.dtype)
        return self.recurrent(x, state, context)

    def parallel(self, x: Tensor, state: State, context: Context) -> tuple[Tensor, State]:
        """All tokens at once; the same contract as `chunkwise`, which the base class calls."""
        return self.chunkwise(x, state, context)

    def choose_form(self, x: Tensor, state: State) -> str:
        """The form that runs when none is asked for: by facts alone, never by training mode."""
        return "recurrent" if x.shape[1] == 1 and state is not None else "parallel"

    def forward(
        self, x: Tensor, state: State, context: Context, form: str | None = None
    ) -> tuple[Tensor, State]:
        """Mix x (batch, time, dim) and hand back y and the state after it.

        Args:
            x: (batch, time, dim).
            state: What this mixer handed back before; None: start empty, hand back None.
            context: Of the same batch and time.
            form: "parallel", "chunkwise" or "recurrent": that form runs. None: `choose_form`.
        """
        form = form or self.choose_form(x, state)
        if form not in FORMS:
            raise ValueError(f"form {form!r} is none of {', '.join(FORMS)}")
        keep = state is not None
        if form == "recurrent" and not keep:
            state = self.init_state(x.shape[0], device=x.device, dtype=x.dtype)
        y, state = getattr(self, form)(x, state, context)
        return y, state if keep else None


class FeedForward(nn.Module):
    """Mixes over channels, each token alone: ``__init__(self, dim, width, ...)``."""

    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, Aux]:
        """X (batch, time, dim) to y of the same shape, and aux: {} when dense."""
        raise NotImplementedError

    def pooled_losses(self, pools: Aux) -> Aux:
        """More of aux, from this layer's ``pool/...`` entries summed over the ranks."""
        return {}

    def after_step(self, sums: Aux) -> None:
        """Once per optimizer step, with this layer's ``sum/...`` entries summed over the step."""


class Routing(NamedTuple):
    """A router's decision for each of `tokens` tokens.

    Attributes:
        weights: (tokens, k) float32 at least, what each chosen expert's output is scaled by.
        indices: (tokens, k) int64, the chosen experts.
        probabilities: (tokens, experts), the full distribution.
        raw_logits: (tokens, experts), before any normalisation; a z-loss reads these.
        x: (tokens, dim) or None: what the router was given, again. Experts that take it from here
            leave the router to add up both gradients of x, in one pass with its own.
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


class Embedding(nn.Module):
    """Tokens in, vectors out: ``__init__(self, vocab_size, dim, ...)``.

    `weight` (vocab_size, dim) is the table of words, which a decoder may tie to its head.
    """

    weight: Tensor

    #: True: in training it draws by the whole of a document, which therefore may not come in
    #: pieces: the decoder refuses a state then.
    trains_on_whole_documents = False

    def init_state(
        self,
        batch_size: int,
        *,
        capacity: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        """As a mixer's. The base class carries nothing."""
        return {}

    def place(self, context: Context) -> Context:
        """The context as every part shall see it, this one included.

        A method that chooses where tokens stand (randomised positions) puts its own positions in
        the place of the counted ones; all others leave them.
        """
        return context

    def prompt_positions(self, tokens: Tensor, documents: Tensor | None = None) -> Tensor | None:
        """Positions of prompts, (batch, time), where the method reads them off the text.

        None, the base class's answer: they are counted. Tasks give their batches' positions
        themselves; this serves prompts that come as text.
        """
        return None

    def forward(self, tokens: Tensor, state: State, context: Context) -> tuple[Tensor, State]:
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
    """

    def __init__(
        self,
        mixer: Mixer,
        feed_forward: FeedForward,
        norms: tuple[nn.Module, nn.Module],
        *,
        placement: str = "pre",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.mixer_norm, self.feed_forward_norm = norms
        self.mixer, self.feed_forward = mixer, feed_forward
        self.post = placement == "post"
        self.dropout = dropout

    def _drop(self, branch: Tensor) -> Tensor:
        return F.dropout(branch, self.dropout, self.training) if self.dropout else branch

    def forward(
        self,
        x: Tensor,
        state: State,
        context: Context,
        injected: Tensor | None = None,
        form: str | None = None,
    ) -> tuple[Tensor, State, Aux]:
        """X (batch, time, dim) to (x, the mixer's state, the feed-forward's aux).

        `injected`, of x's shape, is added first: input injection, as looped models use it.
        """
        if injected is not None:
            x = x + injected
        if self.post:
            mixed, state = self.mixer(x, state, context, form)
            x = self.mixer_norm(x + self._drop(mixed))
            fed, aux = self.feed_forward(x, context)
            return self.feed_forward_norm(x + self._drop(fed)), state, aux
        mixed, state = self.mixer(self.mixer_norm(x), state, context, form)
        x = x + self._drop(mixed)
        fed, aux = self.feed_forward(self.feed_forward_norm(x), context)
        return x + self._drop(fed), state, aux


# ---------------------------------------------------------------------------- small helpers


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums over time, softmax denominators and routers: float32, or float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


#: Kinds of devices that hold no float64: Apple's GPUs refuse to make one.
WITHOUT_FLOAT64 = frozenset({"mps"})


def for_float64(tensor: Tensor) -> Tensor:
    """The tensor where float64 is to be had: where it lies or, failing that, on the CPU."""
    return tensor.cpu() if tensor.device.type in WITHOUT_FLOAT64 else tensor


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x.to(dtype)``, which even where there is nothing to do costs as much as a small product."""
    return x if x.dtype == dtype else x.to(dtype)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast off: it would round sums over time and scores to its own dtype."""
    # The meta device knows no autocast, and refuses the question.
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


class _NotKeptError(Exception):
    pass


@lru_cache(maxsize=256)
def _constant(values: tuple[float, ...], device: torch.device | str, dtype: torch.dtype) -> Tensor:
    if transformed():
        raise _NotKeptError  # no exception is kept, either
    with torch.inference_mode(False):  # an inference tensor could not be saved for a backward
        return torch.tensor(values, dtype=dtype, device=device)


def constant(
    values: tuple[float, ...], device: torch.device | str | None, dtype: torch.dtype
) -> Tensor:
    """Host-side numbers as a tensor on a device, copied there once; never write into it.

    Decays and frequencies live as Python floats and come through here, so that no cast of a
    model can touch them, as it would touch a buffer.
    """
    # What is made under a transform or a mode (fake tensors) is of its kind, and is not kept.
    if not (torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack()):
        try:
            where = torch.get_default_device() if device is None else device
            return _constant(values, where, dtype)
        except _NotKeptError:
            pass
    return torch.tensor(values, dtype=dtype, device=device)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(batch, time, heads * size) to (batch, time, heads, size).

    A plain view: in decoding, einops' 9 us a call would be a tenth of a step.
    """
    return x.view(x.shape[0], x.shape[1], heads, -1)


def merge_heads(x: Tensor) -> Tensor:
    """(batch, time, heads, size) to (batch, time, heads * size)."""
    return x.flatten(2)


Computed = TypeVar("Computed")


def once_per_call(tensor: Tensor, key: Hashable, compute: Callable[[], Computed]) -> Computed:
    """What `compute` gives, computed once for all layers that see the same tensor.

    The positions of a `Context` are made anew in every call of a decoder and handed to all its
    layers, so what depends on them and on host-side numbers alone (rotation tables, decay masks)
    is kept beside them while they live. `key` names the computation, its numbers and whatever
    other tensors it reads. Nothing that needs a gradient may go through here. Beside any other
    tensor, which its owner may change in place, nothing is kept.
    """
    # The compiler finds common subexpressions itself; a transform's tensors end with it.
    if followed():
        return compute()
    kept = tensor.__dict__.get("computed")
    if kept is None:
        return compute()
    key = (torch.is_inference_mode_enabled(), key)  # what is made there is of no use to gradients
    if key not in kept:
        kept[key] = compute()
    return kept[key]


def of_this_call(tensor: Tensor) -> Tensor:
    """The tensor by another name, beside which `once_per_call` keeps things: a call's own."""
    if not torch.compiler.is_compiling() and "computed" not in tensor.__dict__:
        tensor = tensor.view_as(tensor)
        tensor.computed = {}  # type: ignore[attr-defined]
    return tensor


def _copied(given: Tensor) -> Tensor:
    """A caller's (batch, time) ints as int64 that the caller cannot change; one row stays one."""
    rows = given[:1] if given.stride(0) == 0 else given
    return rows.to(torch.int64, copy=True).expand(given.shape)


def closing(linear: nn.Linear) -> nn.Linear:
    """Mark the projection that closes a residual branch: the decoder starts it smaller."""
    linear.closes_residual = True  # type: ignore[assignment]
    return linear


def head_size(dim: int, heads: int) -> int:
    """Dim / heads, or one clear line where that is no whole number."""
    if heads < 1 or dim % heads:
        near = [n for n in range(1, dim + 1) if dim % n == 0]
        near = sorted(sorted(near, key=lambda n: abs(n - heads))[:4])
        raise ValueError(
            f"heads={heads} does not divide dim={dim}: take one of {', '.join(map(str, near))}"
        )
    return dim // heads


class KeepsFloat32(nn.Module):
    """A module some of whose tensors survive `.bfloat16()` and `.half()` unchanged.

    Subclasses list them in `float32_names`: balancing coefficients, expert biases, a learnable
    decay. Moving to another device, and casting to float64, work as ever.
    """

    float32_names: tuple[str, ...] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KeepsFloat32:
        kept = [getattr(self, name) for name in self.float32_names]
        kept += [tensor.grad for tensor in kept if tensor.grad is not None]

        def careful(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            lower = moved.dtype in (torch.bfloat16, torch.float16)
            if lower and any(tensor is keep for keep in kept):
                return tensor.to(moved.device)
            return moved

        return super()._apply(careful, recurse)
