"""A side's own process: it builds one model and does what it is asked, one request at a time.

Its memory is its own, and what ends it, such as a full memory, ends no other side.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from archzoo.analysis.bench.contenders import FIT, Contender, ZooContender
from archzoo.analysis.bench.fitting import FitContender
from archzoo.analysis.bench.memory import begin_peak, free_memory, grown, limit
from archzoo.analysis.bench.peers import PEERS, Shape
from archzoo.trust import import_for_user, user_imports

MOST_REPEATS = {"cpu": 16, "cuda": 256}  # calls in a turn
WARM = {"cpu": 4, "cuda": 64}  # steps of a side that says itself what they take
SPARED = 2**30  # bytes of memory left to the rest of the machine


def contender_of(spec: dict[str, Any]) -> Contender:
    """The side of a name; for the zoo's with `match`, for a peer with `shape`."""
    name = spec["name"]
    if (peer := PEERS.get(name.partition(":")[0])) is not None:
        return peer(name, Shape(*spec["shape"]))
    side = zoo_contender(name, spec["match"])
    side.profiled = spec.get("profiled", False)
    return side


def zoo_contender(name: str, match: bool) -> ZooContender:
    """A side of ours by its name."""
    kind = FitContender if FIT in name.split(":")[1:] else ZooContender
    return kind(name, match)


class Bench:
    """What a side's process does.

    Args:
        contender: The side.
        device: Such as cpu or cuda.
        clock: Seconds; another one in tests.
    """

    def __init__(
        self, contender: Contender, device: str, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.contender, self.device, self.clock = contender, torch.device(device), clock
        self.on_gpu = self.device.type == "cuda"
        self.call: Callable[[], None] = lambda: None
        self.settle = 0  # calls at the beginning of a turn that are not timed
        self.begin: Callable[[], None] = lambda: None
        self.steps: Callable[[int], float] | None = None  # instead of calls: seconds of each
        self.baseline = 0

    def build(self, precision: Any, training: bool) -> dict[str, Any]:
        """Make the model; its number of parameters."""
        if self.on_gpu:
            # Its plan for a key length costs more than a step of decoding, and decoding has
            # another length at every step. Ours is asked as a user asks it.
            torch.backends.cuda.enable_cudnn_sdp(training or self.contender.writes)
            torch.set_float32_matmul_precision("high")
        else:
            x = torch.ones((64, 64), requires_grad=True)  # what libraries set up at the first use
            (x @ x).sum().backward()
            self.baseline = begin_peak()
            limit(free_memory("cpu") - SPARED)
        self.contender.build(str(self.device), precision, training)
        return {"parameters": self.contender.parameters()}

    @torch.inference_mode()
    def prepare(self, quantity: str, length: int, batch: int, vocab_size: int) -> dict[str, Any]:
        """Make ready for a quantity at a size: its calls, warmed up.

        Args:
            quantity: One of training, prefill, decode, batch and state.
            length: Tokens; of what came before, for decoding.
            batch: Rows.
            vocab_size: Tokens are drawn below it.

        Returns:
            seconds: Of the last warm-up call; 0 of a state, which is not timed.
            state_bytes: Of the state of one row, without capacity for more, where that is asked.
            operations: Of training, a token's, where they are known.
            bytes: That a step of decoding moves at the least, where they are known.
            turns: Seconds of steps, of a side that makes all of them at once; and memory_bytes.
        """
        self.release()
        contender = self.contender
        with torch.inference_mode(False):  # what is made there could not be trained
            contender.fresh_shape(length)
        generator = torch.Generator().manual_seed(length)
        decoding = quantity in ("decode", "batch", "state")
        answer: dict[str, Any] = {"seconds": 0.0}
        if quantity == "training":
            answer["operations"] = contender.operations(length)
            if contender.trains:
                with torch.inference_mode(False):
                    return answer | contender.training_run(length, batch, vocab_size)
        shape = (1 if decoding else batch, length + (quantity == "training"))
        tokens = torch.randint(vocab_size, shape, generator=generator).to(self.device)
        if quantity == "training":
            with torch.inference_mode(False):
                tokens = tokens.clone()
            self.call = self._gradients(lambda: contender.train_step(tokens))
        elif quantity == "prefill":
            self.call = lambda: _drop(contender.prefill(tokens, 1))
        else:
            if quantity == "state":
                answer["state_bytes"] = contender.state_bytes(contender.prefill(tokens, 0))
                return answer
            answer["bytes"] = contender.decoding_bytes(batch, length)
            if contender.writes:
                texts = contender.texts(tokens, batch)
                self.steps = lambda repeat: contender.decoding_seconds(texts, repeat)
            else:
                self._step_by_step(tokens, length, batch)
        # A model read its weights for another side in between, or took its memory anew.
        self.settle = 1 if decoding or self.on_gpu else 0
        begun = self.clock()
        for _ in range(3 if self.on_gpu else 2):
            answer["seconds"] = self._timed(WARM[self.device.type] if self.steps else 1, 0)
            if not self.on_gpu and self.clock() - begun > 5:
                break
        return answer

    def run(self, repeat: int) -> dict[str, Any]:
        """A turn: seconds a call, the mean of `repeat` calls; and the peak memory on a GPU."""
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        answer: dict[str, Any] = {"seconds": self._timed(repeat, self.settle)}
        if self.on_gpu:
            answer["memory_bytes"] = torch.cuda.max_memory_allocated(self.device)
            torch.cuda.empty_cache()  # the other sides need it
        return answer

    def peak(self) -> dict[str, Any]:
        """By how many bytes the process has grown since before its model was built, at most."""
        return {"memory_bytes": grown(self.baseline)}

    def release(self) -> None:
        """Let go of what the last size took."""
        self.call = self.begin = lambda: None
        self.steps = None
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def _step_by_step(self, tokens: Tensor, length: int, batch: int) -> None:
        """Calls that decode a token after so many."""
        contender = self.contender
        held = [self._read(tokens, 1 + MOST_REPEATS[self.device.type], batch)]
        token = tokens[:, :1].expand(batch, 1).contiguous()
        first = held[0]

        def begin() -> None:
            held[0] = contender.rewound(first, length)

        def call() -> None:
            held[0] = contender.decode_step(token, held[0])

        self.begin, self.call = begin, call

    def _read(self, tokens: Tensor, room: int, batch: int) -> Any:
        """The state after tokens (1, length), for every row of a batch."""
        state = self.contender.prefill(tokens, room)
        return self.contender.repeated(state, batch) if batch > 1 else state

    def _timed(self, repeat: int, settle: int) -> float:
        with torch.inference_mode():
            if self.steps is not None:
                return self.steps(repeat)
            self.begin()
            for _ in range(settle):
                self.call()
            self._wait()
            begin = self.clock()
            for _ in range(repeat):
                self.call()
            self._wait()
            return (self.clock() - begin) / repeat

    def _gradients(self, call: Callable[[], None]) -> Callable[[], None]:
        def with_gradients() -> None:
            with torch.inference_mode(False):
                call()

        return with_gradients

    def _wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)


def _drop(value: Any) -> None:
    """For a call whose result is not kept."""


def answer_to(bench: Bench, request: dict[str, Any]) -> dict[str, Any]:
    """What a request gives; what stops it, as {"stopped": kind, "why": text}."""
    do = request.pop("do")
    try:
        answer: dict[str, Any] = getattr(bench, do)(**request)
        return answer
    except (MemoryError, torch.OutOfMemoryError):
        why = "memory"
    except Exception as error:
        text = _one_line(error)
        if not any(words in text for words in ("can't allocate memory", "not enough memory")):
            return {"stopped": "error", "why": text}
        why = "memory"
    bench.release()
    return {"stopped": why, "why": "an allocation failed"}


def serve(questions: Any, first: dict[str, Any], said: str) -> None:
    """What a side's process runs: answer requests until there are no more.

    Args:
        questions: A connection, for requests and their answers.
        first: What side this is, on what device, with how many threads, and the user's modules.
        said: A file for what is printed here.
    """
    if hasattr(os, "setsid"):
        os.setsid()  # Ctrl-C is the command's to handle, which ends this process
    handle = os.open(said, os.O_WRONLY | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    try:
        user_imports[:] = first["modules"]
        for module in first["modules"]:
            import_for_user(module)
        if first["threads"]:
            torch.set_num_threads(first["threads"])
        bench = Bench(contender_of(first["spec"]), first["device"])
    except Exception as error:
        questions.send({"stopped": "error", "why": _one_line(error)})
        return
    questions.send({})
    with suppress(EOFError, ConnectionError):
        while True:
            questions.send(answer_to(bench, questions.recv()))
    with suppress(OSError):  # the command was ended by a signal, and removes nothing
        os.unlink(said)


def _one_line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300]
