"""The sides of a benchmark: one interface, and the zoo's models behind it.

A side is named by a preset and what is changed of it, with colons between:
``retnet_tiny``, ``retnet_tiny:Attention``, ``retnet_tiny:chunkwise``,
``retnet_tiny:chunk_size=128:chunkwise``, ``transformer_base:compiled``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archzoo.block import FORMS
from archzoo.decoder import Decoder
from archzoo.names import nearest
from archzoo.parts import list_parts
from archzoo.registry import check_size, create_model, get_preset
from archzoo.states import map_state, nbytes, reorder

Precision = Literal["float32", "bfloat16", "bf16-mixed"]
DECODING = ("decode", "batch", "state")  # quantities that need a state
COMPILED = "compiled"
NOT_COMPILED = "training alone is compiled here"


class Contender:
    """A side of a benchmark, in a process of its own.

    A subclass sets `name` and writes `make` and `logits`, to be trained, and `prefill` and
    `decode_step`, to be decoded; or `build` and `train_step` where its step is not this one.

    Attributes:
        name: As tables and figures have it.
        compiled: The training step's forward pass, loss included, runs under torch.compile.
        without: Quantities that it cannot be asked for, and why.
        model: What `build` made.
    """

    name: str
    compiled = False
    without: dict[str, str]
    model: nn.Module

    def make(self) -> nn.Module:
        """The model, in float32 on the default device."""
        raise NotImplementedError(f"{type(self).__name__} needs make()")

    def logits(self, tokens: Tensor) -> Tensor:
        """Of training: logits (batch, time, vocab_size) of tokens (batch, time)."""
        raise NotImplementedError(f"{type(self).__name__} needs logits(tokens)")

    def prefill(self, tokens: Tensor, room: int) -> Any:
        """Read tokens (batch, time) from an empty state, with the logits of the last alone.

        Args:
            tokens: (batch, time).
            room: Tokens that will follow; a KV cache allocates its buffer for them too.

        Returns:
            The state after them.
        """
        raise NotImplementedError(f"{type(self).__name__} needs prefill(tokens, room)")

    def decode_step(self, token: Tensor, state: Any) -> Any:
        """One token (batch, 1), logits included; the state after it."""
        raise NotImplementedError(f"{type(self).__name__} needs decode_step(token, state)")

    def rewound(self, state: Any, length: int) -> Any:
        """A state that has read more than `length` tokens, as long as it was after these."""
        return state

    def repeated(self, state: Any, batch: int) -> Any:
        """The state of one row, for each of `batch` rows."""
        raise NotImplementedError(f"{type(self).__name__} needs repeated(state, batch)")

    def state_bytes(self, state: Any) -> int:
        """Bytes that the tensors of a state take."""
        return nbytes(state)

    def settings(self) -> str:
        """What a measurement of it depends on, as a short digest: rows are kept by it."""
        return digest(self.facts())

    def facts(self) -> dict[str, Any]:
        """What `settings` is the digest of, plain data."""
        return {"name": self.name}

    # ------------------------------------------------------------------ what most have in common

    def build(self, device: str, precision: Precision, training: bool) -> None:
        """Make the model and, for training, its optimizer.

        Args:
            device: Such as cpu or cuda.
            precision: "float32", "bfloat16" (weights and all), or "bf16-mixed" (autocast).
            training: Else for inference.
        """
        torch.manual_seed(0)
        self.device, self.precision = torch.device(device), precision
        with self.device:
            self.model = self.make()
        if precision == "bfloat16":
            self.model.to(torch.bfloat16)
        self.model.train(training)
        self.step: Callable[[Tensor], Tensor] = self.loss
        self.optimizer = None
        if training:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        else:
            self.model.requires_grad_(False)
        self.fresh_shape()

    def fresh_shape(self) -> None:
        """Forget what was compiled for another shape, which else makes the next one dynamic."""
        if self.compiled:
            torch.compiler.reset()
            self.step = torch.compile(self.loss, dynamic=False)

    def casting(self) -> AbstractContextManager[Any]:
        """Autocast where that is the precision."""
        if self.precision != "bf16-mixed":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def loss(self, tokens: Tensor) -> Tensor:
        """Cross-entropy of tokens (batch, time + 1), at least in float32."""
        logits = self.logits(tokens[:, :-1]).flatten(0, 1)
        return F.cross_entropy(logits.float(), tokens[:, 1:].flatten())

    def train_step(self, tokens: Tensor) -> None:
        """Forward, backward and AdamW on tokens (batch, time + 1)."""
        assert self.optimizer is not None, "it was built for inference"
        with self.casting():
            loss = self.step(tokens)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def parameters(self) -> int:
        """How many, shared ones once."""
        return sum(parameter.numel() for parameter in self.model.parameters())


class ZooContender(Contender):
    """A preset of the zoo, with parts and arguments of it changed.

    The loss is the cross-entropy alone, without what parts add to it; the parts' work is all done.

    Args:
        text: Its name, see the top of this file.
        match: A changed mixer gets the feed-forward width at which the model holds as many
            parameters as the preset.

    Raises:
        ValueError: An unknown name, or changes that do not go together.
    """

    def __init__(self, text: str, match: bool = True) -> None:
        preset, *changes = text.split(":")
        self.name, self.preset, self.match = text, preset, match
        self.form: str | None = None
        self.changed: dict[str, Any] = {}
        arguments = get_preset(preset).arguments
        mixers = list_parts("mixer")
        sizes = set(Decoder.__init__.__annotations__) - {"return"}
        mixer: str | None = None
        of_mixer: dict[str, Any] = {}
        for change in changes:
            key, equals, value = change.partition("=")
            if equals and key in sizes:
                self.changed[key] = _value(value)
            elif equals:
                of_mixer[key] = _value(value)
            elif change in FORMS:
                self.form = change
            elif change == COMPILED:
                self.compiled = True
            elif change in mixers or "." in change:
                mixer = change
            else:
                known = [*FORMS, COMPILED, *mixers]
                raise ValueError(
                    f"{text}: {change!r} is no form, mixer or NAME=VALUE; {nearest(change, known)}"
                )
        if of_mixer and mixer is None:
            if arguments.get("pattern"):
                raise ValueError(
                    f"{text}: {preset} has a pattern of mixers; name the one whose "
                    f"{next(iter(of_mixer))} it is: {preset}:MIXER:{next(iter(of_mixer))}=VALUE"
                )
            spec = arguments.get("mixer", "Attention")
            if isinstance(spec, dict):
                of_mixer = {**spec.get("init_args", {}), **of_mixer}
                spec = spec["class_path"]
            mixer = str(spec)
        if mixer is not None:
            self.changed["mixer"] = {"class_path": mixer, "init_args": of_mixer}
        self.without = {}
        if self.form in ("parallel", "chunkwise"):
            why = f"decoding is the recurrent form; the {self.form} one is timed before it"
            self.without = dict.fromkeys(DECODING, why)
        if self.compiled:
            self.without |= dict.fromkeys(("prefill", *DECODING), NOT_COMPILED)
        check_size(arguments | self.changed)  # before its blocks are built, even without memory
        with torch.device("meta"):
            decoder = self.make()
        self.config: dict[str, Any] = decoder.config
        self.count, self.vocab_size = decoder.parameter_count(), decoder.vocab_size

    def make(self) -> Decoder:
        match = "parameters" if self.match and "mixer" in self.changed else None
        if match and "width" in self.changed:
            match = None
        return create_model(self.preset, match=match, **self.changed)

    def logits(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(tokens, form=self.form).logits
        return logits

    def prefill(self, tokens: Tensor, room: int) -> Any:
        model: Any = self.model
        batch, length = tokens.shape
        state = model.init_state(batch, capacity=length + room)
        return model(tokens, state, form=self.form, logits_to_keep=1).state

    def decode_step(self, token: Tensor, state: Any) -> Any:
        return self.model(token, state, form="recurrent").state

    def rewound(self, state: Any, length: int) -> Any:
        # The tensors are shared: a cache is written again from where its length says, and what a
        # recurrent state holds does not change the time of a step.
        return map_state(lambda leaf: leaf, state)

    def repeated(self, state: Any, batch: int) -> Any:
        return reorder(state, torch.zeros(batch, dtype=torch.int64, device=self.device))

    def facts(self) -> dict[str, Any]:
        return {"config": self.config, "form": self.form, "compiled": self.compiled}


def digest(facts: dict[str, Any]) -> str:
    """Eight hexadecimal digits of plain data."""
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _value(text: str) -> Any:
    """As JSON has it, else a text."""
    try:
        return json.loads(text)
    except ValueError:
        return text
