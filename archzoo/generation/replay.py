"""Decoding by replay: one step is captured as a CUDA graph, and then launched again and again.

A step of a small model is some hundreds of kernels, each of a few microseconds, so that launching
them one by one takes far longer than they run. A graph launches them all at once, on the memory it
was captured with: the state stays where it is, the next token is drawn on the device and put where
the next step reads it, and the host fetches tokens some steps behind. Nothing waits for the host,
which notices a stop token some steps late and forgets what was drawn after it.

On devices without graphs the same steps can be called one by one, which is how they are tested.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from archzoo.decoder import Decoder
from archzoo.generation.fused import Step, fused_step
from archzoo.generation.rows import StateReader
from archzoo.generation.sampling import Sampler
from archzoo.numerics import WITHOUT_FLOAT64
from archzoo.states import State, leaves, map_state, nbytes

#: Steps that are launched before the tokens of the first of them are read.
AHEAD = 4
RING = 64  # steps whose tokens and random numbers the device keeps; more than AHEAD
LEAST = 8  # tokens to come, below which capturing takes longer than it saves


def step_function(model: Decoder, batch_size: int, plain: bool = False) -> Step:
    """What computes a step of this model: fused kernels where it has them, or else a call of it.

    Args:
        model: In evaluation mode.
        batch_size: Rows.
        plain: A call of it.
    """
    fused = None if plain else fused_step(model)
    if fused is not None:
        return fused

    def step(tokens: Tensor, state: State) -> tuple[Tensor, State]:
        output = model(tokens, state, form="recurrent", logits_to_keep=1)
        return output.logits[:, 0], output.state

    return step


def replays(model: Decoder, graph: bool | None) -> bool:
    """Whether decoding replays: as asked, or on one GPU where nobody watches the calls.

    Args:
        model: That decodes.
        graph: True: it shall, on other devices by calling; False: it shall not; None: on a GPU.
    """
    if graph is not None:
        return graph and model.device.type not in WITHOUT_FLOAT64
    if model.device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return False
    # A hook would see the step that is captured, and none that is replayed.
    watched = any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    places = {(type(weight), weight.device) for weight in model.parameters()}
    return not watched and places == {(Parameter, model.device)}  # no shards, and one GPU


def start_replay(
    reader: StateReader,
    tokens: Tensor,
    sampler: Sampler,
    rows: Sequence[int],
    steps: int,
    ahead: int = AHEAD,
    plain: bool = False,
) -> Replay | None:
    """The steps that follow what a reader has read, or None: the first failed, and took the state.

    Args:
        reader: Whose state is taken over.
        tokens: As for `Replay`, and so are the next five.
        sampler: The same.
        rows: The same.
        steps: The same.
        ahead: The same.
        plain: The same.
    """
    state, reader.state = reader.state, None
    assert state is not None
    try:
        replay = Replay(reader.model, state, tokens, sampler, rows, steps, ahead, plain)
        replay.start()
    except torch.OutOfMemoryError:  # which calling the step would meet as well
        raise
    except Exception as error:  # of a kernel that only a captured step runs, say
        _warn(_line(error))
        return None
    if replay.reason is not None:
        _warn(replay.reason)
    return replay


def _warn(reason: str) -> None:
    warnings.warn(
        f"decoding continues step by step, more slowly, for a step cannot be replayed: {reason}",
        stacklevel=4,
    )


def _line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


class Replay:
    """The steps of a batch, whose tokens come some steps behind.

    Args:
        model: In evaluation mode, under `torch.inference_mode`.
        state: After the prompt, with capacity for the steps; it is consumed.
        tokens: (batch,) int64, that were drawn last.
        sampler: That draws.
        rows: Numbers of the batch's rows, by which the sampler knows them.
        steps: Tokens of each row that are drawn at the most.
        ahead: Steps that may be launched before the first's tokens are read. 0: none is launched
            before the tokens of the one before it were read.
        plain: Whether a step is a call of the model, even if fused kernels are there.
    """

    def __init__(
        self,
        model: Decoder,
        state: State,
        tokens: Tensor,
        sampler: Sampler,
        rows: Sequence[int],
        steps: int,
        ahead: int = AHEAD,
        plain: bool = False,
    ) -> None:
        self.model, self.sampler, self.rows = model, sampler, rows
        self.steps, self.ahead = steps, ahead
        self.on_gpu = tokens.device.type == "cuda"
        self.state_bytes = nbytes(state)
        fixed = model.fixed_state(state)
        self.state = fixed | {
            name: map_state(_dense, part) for name, part in fixed.items() if name != "place"
        }
        self.tokens = tokens[:, None].clone()
        self.step = step_function(model, len(tokens), plain)
        self.launched = self.read = 0
        shape, device = (RING, len(tokens)), tokens.device
        self.drawn = torch.zeros(shape, dtype=torch.int64, device=device)
        self.place = torch.zeros((1,), dtype=torch.int64, device=device)  # of a step in the ring
        self.numbers = None
        if sampler.temperature:
            self.numbers = torch.zeros(shape, dtype=torch.float64, device=device)
        self.logits: Tensor | None = None  # of the last step
        self.graph: Any = None
        self.reason: str | None = None  # why no graph is there, in words
        if self.on_gpu:
            self.beside = torch.cuda.Stream(device)
            self.arrived = [torch.cuda.Event() for _ in range(RING)]
            self.host = torch.zeros(shape, dtype=torch.int64, pin_memory=True)

    # ------------------------------------------------------------------------ what is captured

    def _advance(self) -> Tensor:
        """A step: its state over the one before, its tokens where the next reads them; logits."""
        logits, after = self.step(self.tokens, self.state)
        _overwrite(self.state, after)
        self._draw(logits)
        return logits

    def _draw(self, logits: Tensor) -> None:
        if self.numbers is None:
            torch.argmax(logits, dim=-1, keepdim=True, out=self.tokens)
        else:
            number = self.numbers.index_select(0, self.place)[0]
            self.tokens.copy_(self.sampler.choose(logits, number)[:, None])
        self.drawn.index_copy_(0, self.place, self.tokens.view(1, -1))
        self.place.add_(1)

    # ------------------------------------------------------------------------ launching

    def start(self) -> None:
        """The first step, by calling it, and the capture of those after it.

        Where they cannot be captured, `reason` says why, and no more are launched.

        Raises:
            Exception: Whatever the first step raised; the state is of no use then.
        """
        self._prepare()
        if not self.on_gpu:
            self._first()
            return
        here = torch.cuda.current_stream(self.tokens.device)
        self.beside.wait_stream(here)
        with torch.cuda.stream(self.beside):
            self._first()
            if self.launched < self.steps:
                self._capture()
        here.wait_stream(self.beside)

    def _first(self) -> None:
        """A step as every other, but that it may give a state that is not fixed."""
        logits, after = self.step(self.tokens, self.state)
        reason = _difference(self.state, after)
        if reason is None:
            _overwrite(self.state, after)
        else:
            self.state = after
        self._draw(logits)
        self.logits = logits
        self._hand_over()
        if reason is not None:
            self._give_up(reason)

    def _capture(self) -> None:
        device = self.tokens.device
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(device)
        try:
            # The caller's other threads may still use the device.
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                logits = self._advance()
            finally:
                graph.capture_end()
        except Exception as error:  # whatever cannot be captured says so in a way of its own
            with suppress(Exception):
                torch.cuda.synchronize(device)
            self._give_up(_line(error))
            return
        self.graph, self.captured_logits = graph, logits

    def _give_up(self, reason: str) -> None:
        self.reason = reason
        self.stop()

    def _prepare(self) -> None:
        """At the ring's beginning: the random numbers of the steps to come."""
        if self.launched % RING:
            return
        self.place.zero_()
        if self.numbers is not None:
            count = min(RING, self.steps - self.launched)
            fresh = self.sampler.draw(self.rows, count)
            if self.on_gpu:
                fresh = fresh.pin_memory()
            self.numbers[:count].copy_(fresh, non_blocking=True)

    def _launch(self) -> None:
        self._prepare()
        if self.graph is not None:
            self.graph.replay()
            self.logits = self.captured_logits
        else:
            self.logits = self._advance()
        self._hand_over()

    def _hand_over(self) -> None:
        """Send the step's tokens to the host, without waiting for them."""
        slot = self.launched % RING
        self.launched += 1
        if self.on_gpu:
            self.beside.wait_stream(torch.cuda.current_stream(self.tokens.device))
            with torch.cuda.stream(self.beside):
                self.host[slot].copy_(self.drawn[slot], non_blocking=True)
                self.arrived[slot].record()

    # ------------------------------------------------------------------------ reading

    def next(self) -> list[int]:
        """The tokens of the next step, one of each row."""
        while self.launched < self.steps and self.launched - self.read <= self.ahead:
            self._launch()
        slot = self.read % RING
        self.read += 1
        if self.on_gpu:
            self.arrived[slot].synchronize()
        row: list[int] = (self.host if self.on_gpu else self.drawn)[slot].tolist()
        return row

    def stop(self) -> None:
        """Launch no more; what was launched is still to be read."""
        self.steps = self.launched

    def leave(self, reader: StateReader, spare: int | None = None) -> None:
        """Give the state back to a reader, after what was launched has been read.

        Args:
            reader: That it was taken from.
            spare: Tokens that will still be read, for an ordinary state. None: as it is.
        """
        whole = spare is None
        reader.state = self.state if whole else self.model.copy_state(self.state, spare or 0)
        reader.logits = self.logits

    @property
    def ended(self) -> bool:
        """Whether all tokens were read, and no others come."""
        return self.read == self.steps


def _dense(leaf: Tensor) -> Tensor:
    """A leaf that can be written into: not one number seen many times."""
    return leaf if leaf.is_contiguous() else leaf.contiguous()


def _difference(fixed: State, after: State) -> str | None:
    """What a step changed that a graph cannot hold, in words; None: nothing."""
    before, now = dict(leaves(fixed)), dict(leaves(after))
    if before.keys() != now.keys():
        name = min(before.keys() ^ now.keys())
        return f"the state's {name} is there for some steps only"
    for name, old in before.items():
        new = now[name]
        if not isinstance(old, Tensor) or not isinstance(new, Tensor):
            if old is not new and old != new:
                return f"the state's {name} goes from {old} to {new}, and is not a tensor"
        elif old.shape != new.shape or old.dtype != new.dtype:
            return f"the state's {name} goes from {_kind(old)} to {_kind(new)}"
    return None


def _kind(leaf: Tensor) -> str:
    return f"{tuple(leaf.shape)} of {str(leaf.dtype).removeprefix('torch.')}"


def _overwrite(fixed: State, after: State) -> None:
    """Copy what a step returned to where the next one reads it, but for what is there already."""
    pairs = [
        (old, new)
        for (_, old), (_, new) in zip(leaves(fixed), leaves(after), strict=True)
        if isinstance(old, Tensor) and old.numel() and not _same_memory(old, new)
    ]
    if not pairs:
        return
    held = {_storage(leaf) for _, leaf in leaves(fixed) if isinstance(leaf, Tensor)}
    targets: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
    for old, new in pairs:
        olds, news = targets.setdefault(old.dtype, ([], []))
        olds.append(old)
        news.append(new.clone() if _storage(new) in held else new)  # which is overwritten, too
    for olds, news in targets.values():
        torch._foreach_copy_(olds, news)


def _same_memory(one: Tensor, other: Tensor) -> bool:
    return one is other or (one.data_ptr() == other.data_ptr() and one.stride() == other.stride())


def _storage(leaf: Tensor) -> int:
    return leaf.untyped_storage().data_ptr()
