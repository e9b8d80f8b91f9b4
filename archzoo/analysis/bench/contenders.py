"""The sides of a benchmark: one interface, and the zoo's models behind it.

A side is named by a preset and what is changed of it, with colons between:
``retnet_tiny``, ``retnet_tiny:Attention``, ``retnet_tiny:chunkwise``,
``retnet_tiny:chunk_size=128:chunkwise``, ``transformer_base:compiled``, ``retnet_base:fit``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archzoo.analysis.operations import decoding_bytes, training_operations
from archzoo.block import FORMS
from archzoo.checkpoint.checks import check_settings
from archzoo.decoder import Decoder
from archzoo.embeddings.digits import DigitEmbedding
from archzoo.embeddings.token import TokenEmbedding
from archzoo.generation.conversation import start_conversation
from archzoo.generation.decoding import generate
from archzoo.names import nearest
from archzoo.parts import list_parts
from archzoo.registry import check_size, create_model, get_preset
from archzoo.states import nbytes, reorder
from archzoo.training.losses import total_loss

Precision = Literal["float32", "bfloat16", "bf16-mixed"]
DECODING = ("decode", "batch", "state")  # quantities that need a state
COMPILED, FIT = "compiled", "fit"
SIGNS = "0123456789+="  # the first tokens of a model that must know which are digits
CLIP = 1.0  # the norm that gradients are clipped to
NOT_COMPILED = "training alone is compiled here"


class Contender:
    """A side of a benchmark, in a process of its own.

    A subclass sets `name` and writes `make` and `logits`, to be trained, and `prefill` and
    `decode_step`, to be decoded; or `build` and `train_step` where its step is not this one.

    Attributes:
        name: As tables and figures have it.
        compiled: The training step's forward pass runs under torch.compile.
        writes: It is decoded by `decoding_seconds`, else step by step.
        trains: It is trained by `training_run`, else step by step.
        profiled: That says where a step's time goes, too.
        without: Quantities that it cannot be asked for, and why.
        model: What `build` made.
    """

    name: str
    compiled = writes = trains = profiled = False
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

    def texts(self, tokens: Tensor, batch: int) -> Any:
        """What `decoding_seconds` continues: tokens (1, time), as each row of a batch."""
        raise NotImplementedError(f"{type(self).__name__} needs texts(tokens, batch)")

    def decoding_seconds(self, texts: Any, steps: int) -> float:
        """Seconds of a step, the mean of so many; the texts stay as they are."""
        raise NotImplementedError(f"{type(self).__name__} needs decoding_seconds(texts, steps)")

    def training_run(self, length: int, batch: int, vocab_size: int) -> dict[str, Any]:
        """Train a model on texts of random tokens, and say how that went.

        Args:
            length: Tokens of a row.
            batch: Rows of a step.
            vocab_size: Tokens are drawn below it.

        Returns:
            turns: Seconds of each step after a warm-up.
            memory_bytes: At most, of all that belongs to training.
            kernels: With `profiled`, those of a step, see `profile.kernels_of`.
        """
        raise NotImplementedError(f"{type(self).__name__} needs training_run(...)")

    def rewound(self, state: Any, length: int) -> Any:
        """A state that has read more than `length` tokens, as long as it was after these."""
        return state

    def repeated(self, state: Any, batch: int) -> Any:
        """The state of one row, for each of `batch` rows."""
        raise NotImplementedError(f"{type(self).__name__} needs repeated(state, batch)")

    def state_bytes(self, state: Any) -> int:
        """Bytes that the tensors of a state take."""
        return nbytes(state)

    def operations(self, length: int) -> float | None:
        """Of training, a token's, as `archzoo.analysis.operations` counts; None: not known."""
        return None

    def decoding_bytes(self, batch: int, length: int) -> int | None:
        """The fewest that a step of decoding moves, as there; None: not known."""
        return None

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
        self.optimizer: torch.optim.Optimizer | None = None
        if training:
            self.optimizer = self.make_optimizer()
        else:
            self.model.requires_grad_(False)
        self.fresh_shape(1)

    def make_optimizer(self) -> torch.optim.Optimizer:
        """AdamW over all parameters."""
        return torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)

    def fresh_shape(self, length: int) -> None:
        """Make ready for texts of another length.

        What was compiled for the last is forgotten, which else makes the next one dynamic.
        """
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
        """Forward, backward, clipping and AdamW on tokens (batch, time + 1)."""
        assert self.optimizer is not None, "it was built for inference"
        with self.casting():
            loss = self.step(tokens)
        loss.backward()
        # As `archzoo fit` is made to do here, and as nanoGPT's own script does.
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def parameters(self) -> int:
        """How many, shared ones once."""
        return sum(parameter.numel() for parameter in self.model.parameters())


class ZooContender(Contender):
    """A preset of the zoo, with parts and arguments of it changed.

    The loss is the cross-entropy alone, without what parts add to it; the parts' work is all done.
    It is computed and compiled as `archzoo fit` does; decoding is `archzoo.generate`.

    Args:
        text: Its name, see the top of this file.
        match: A changed mixer gets the feed-forward width at which the model holds as many
            parameters as the preset.

    Raises:
        ValueError: An unknown name, or changes that do not go together.
    """

    writes = True

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
                known = [*FORMS, COMPILED, FIT, *mixers]
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
        check_settings(arguments | self.changed, Path(text))
        check_size(arguments | self.changed)  # before its blocks are built, even without memory
        decoder = self.meta()
        self.config: dict[str, Any] = decoder.config
        self.count, self.vocab_size = decoder.parameter_count(), decoder.vocab_size

    @property
    def knows_digits(self) -> bool:
        """Whether it must be told which tokens are digits."""
        return any(isinstance(module, DigitEmbedding) for module in self.meta().modules())

    @property
    def matched(self) -> bool:
        """Whether the feed-forward's width is set."""
        return self.match and "mixer" in self.changed and "width" not in self.changed

    def make(self) -> Decoder:
        match: Any = "parameters" if self.matched else None
        decoder = create_model(self.preset, match=match, **self.changed)
        for module in decoder.modules():
            if isinstance(module, DigitEmbedding):  # texts are random: any tokens may be digits
                module.bind(_SomeDigits())
        return decoder

    def fresh_shape(self, length: int) -> None:
        if self.compiled:
            torch.compiler.reset()
            self.model.compile()

    def loss(self, tokens: Tensor) -> Tensor:
        model: Any = self.model
        tokens, labels = tokens[:, :-1], tokens[:, 1:]
        examples = None
        if not isinstance(model.embedding, TokenEmbedding):  # it may draw positions by example
            examples = torch.arange(len(tokens), device=tokens.device)[:, None].expand_as(tokens)
        x = model.hidden(tokens, examples=examples, form=self.form)[0]
        return total_loss(x, model.head, labels) / labels.numel()

    def prefill(self, tokens: Tensor, room: int) -> Any:
        model: Any = self.model
        batch, length = tokens.shape
        state = model.init_state(batch, capacity=length + room)
        return model(tokens, state, form=self.form, logits_to_keep=1).state

    def repeated(self, state: Any, batch: int) -> Any:
        return reorder(state, torch.zeros(batch, dtype=torch.int64, device=self.device))

    def texts(self, tokens: Tensor, batch: int) -> dict[str, Any]:
        model: Any = self.model
        if batch > 1 and self.device.type == "cuda":
            # Read anew by every call: their state held beside may not fit into the memory.
            return {"prompts": tokens.tolist() * batch}
        state = model.init_state(1, capacity=tokens.shape[1])
        output = model(tokens, state, form=self.form, logits_to_keep=1)
        begun = start_conversation(output.state, model, output.logits[:, -1])
        return {"conversation": begun if batch == 1 else self.repeated(begun, batch)}

    def decoding_seconds(self, texts: Any, steps: int) -> float:
        model: Any = self.model
        # The first token takes no step, and the second may be the one that is captured.
        found = generate(model, **texts, max_tokens=2 + steps)
        return 1e-3 * found.milliseconds_per_token

    def operations(self, length: int) -> float | None:
        return training_operations(self.meta(), length)

    def decoding_bytes(self, batch: int, length: int) -> int | None:
        dtype = torch.float32 if self.precision == "float32" else torch.bfloat16
        return decoding_bytes(self.meta().to(dtype), batch, length)

    def meta(self) -> Decoder:
        """The model, without memory."""
        with torch.device("meta"):
            return self.make()

    def facts(self) -> dict[str, Any]:
        return {"config": self.config, "form": self.form, "compiled": self.compiled}


class _SomeDigits:
    """What an embedding of digits asks a task, where there is none: the first tokens are digits."""

    def __init__(self) -> None:
        self.tokenizer: Any = self
        self.digit_tokens = [SIGNS.index(digit) for digit in "0123456789"]

    def encode(self, text: str) -> list[int]:
        """Of a sign, one token.

        Args:
            text: The sign.
        """
        return [SIGNS.index(text)]


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
