"""Other projects' models at the shape of ours, where they are installed.

``nanogpt`` is nanoGPT's architecture, written out in `nanogpt`; ``llama`` is transformers'
LlamaForCausalLM, with its static cache and compiled decoding as ``llama:static``; ``torchscale`` is
torchscale's RetNet, and ``fla`` the RetNet of flash-linear-attention. Each is asked for what its
project offers: its own attention, its own kernels, its own cache.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import types
from importlib import metadata
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from archzoo.analysis.bench.contenders import (
    COMPILED,
    DECODING,
    NOT_COMPILED,
    Contender,
)
from archzoo.analysis.bench.nanogpt import NanoGPT
from archzoo.analysis.operations import attention_operations, retention_operations
from archzoo.decoder import Decoder
from archzoo.names import nearest


class Shape(NamedTuple):
    """What a peer takes from one of ours.

    Attributes:
        dim, depth, heads, vocab_size: As the decoder's.
        width: Of its feed-forward.
        tie_weights: The head shares the embedding's weights.
    """

    dim: int
    depth: int
    heads: int
    width: int
    vocab_size: int
    tie_weights: bool

    @classmethod
    def of(cls, decoder: Decoder) -> Shape | None:
        """A decoder's shape; None where its feed-forward has no one width."""
        part = decoder.blocks[0].feed_forward
        down = getattr(part, "down", None) or getattr(part, "output", None)
        width = getattr(part, "width", None) or getattr(down, "in_features", None)
        if not isinstance(width, int):
            return None
        heads: Any = decoder.blocks[0].mixer.heads
        sizes = (decoder.dim, decoder.depth, heads, width, decoder.vocab_size)
        return cls(*sizes, decoder.tie_weights)


class Peer(Contender):
    """Another project's model.

    Args:
        text: Its name and options, such as ``torchscale:chunk_size=64``.
        shape: Of the model it stands beside.

    Raises:
        ValueError: An option that it does not have.
    """

    kind: str  # its name in `PEERS`
    package: str  # what is imported
    distribution: str  # what is installed
    install = "'archzoo[peers]'"  # how
    options: tuple[str, ...] = ()
    like: str  # the mixer of ours that it stands beside

    def __init__(self, text: str, shape: Shape) -> None:
        self.name, self.shape = text, shape
        self.without = {}
        self.given: dict[str, str] = {}
        for option in text.split(":")[1:]:
            key, _, value = option.partition("=")
            if key == COMPILED:
                self.compiled = True
            elif key in self.options:
                self.given[key] = value
            else:
                hint = nearest(key, [COMPILED, *self.options])
                raise ValueError(f"{text}: {self.kind} has no option {key!r}; {hint}")
        if self.compiled:
            self.without |= dict.fromkeys(("prefill", *DECODING), NOT_COMPILED)

    @property
    def heads(self) -> int:
        """Of attention: ours, or of 64 channels where ours are retention's, which are wider."""
        own, dim = self.shape.heads, self.shape.dim
        return dim // 64 if dim // own > 128 and dim % 64 == 0 else own

    def operations(self, length: int) -> float | None:
        """As `archzoo.analysis.operations.training_operations` counts ours."""
        shape, active = self.shape, self.parameters() - self.looked_up()
        if self.like == "Attention":
            mixed = attention_operations(self.heads, shape.dim // self.heads, length)
        else:
            sizes = (shape.dim // shape.heads, 2 * shape.dim // shape.heads)
            mixed = retention_operations(shape.heads, *sizes, length)
        return 6.0 * active + 3.0 * shape.depth * mixed

    def looked_up(self) -> int:
        """Parameters that no token is multiplied by."""
        return 0 if self.shape.tie_weights else self.shape.vocab_size * self.shape.dim

    @classmethod
    def missing(cls, device: str) -> str | None:
        """Why it cannot be run here; None: it can."""
        if importlib.util.find_spec(cls.package) is None:
            return f"{cls.package} is not installed (pip install {cls.install})"
        return None

    def facts(self) -> dict[str, Any]:
        version = metadata.version(self.distribution)
        return {"name": self.name, "shape": self.shape._asdict(), "version": version}


class Nano(Peer):
    """nanoGPT's architecture; at our dim and depth its width and its biases are its own."""

    kind, package, distribution, like = "nanogpt", "torch", "torch", "Attention"

    def __init__(self, text: str, shape: Shape) -> None:
        super().__init__(text, shape)
        self.without |= dict.fromkeys(("prefill", *DECODING), "nanoGPT has no KV cache")

    def make(self) -> nn.Module:
        return NanoGPT(self.shape.vocab_size, self.shape.dim, self.shape.depth, self.heads)

    def fresh_shape(self, length: int) -> None:
        if self.optimizer is not None:
            model: Any = self.model
            model.extend(length)
            self.optimizer = self.make_optimizer()
        super().fresh_shape(length)

    def looked_up(self) -> int:
        positions: Any = self.model.positions
        return int(positions.numel())

    def logits(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(tokens)
        return logits


class Llama(Peer):
    """LlamaForCausalLM of transformers, with torch's fused attention.

    Its cache is the dynamic one; with ``static`` the static one, and a step of decoding compiled as
    its `generate` does then.
    """

    kind, package, distribution, like = "llama", "transformers", "transformers", "Attention"
    options = ("static",)

    def __init__(self, text: str, shape: Shape) -> None:
        super().__init__(text, shape)
        self.static = "static" in self.given
        if self.static:
            why = "its cache differs from that of llama only once it is decoded"
            self.without |= dict.fromkeys(("training", "prefill", "state"), why)

    def make(self) -> nn.Module:
        transformers = importlib.import_module("transformers")
        config = transformers.LlamaConfig(
            hidden_size=self.shape.dim,
            num_hidden_layers=self.shape.depth,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            intermediate_size=self.shape.width,
            vocab_size=self.shape.vocab_size,
            tie_word_embeddings=self.shape.tie_weights,
            max_position_embeddings=131_072,
            attn_implementation="sdpa",
        )
        self.config = config
        model: nn.Module = transformers.LlamaForCausalLM(config)
        # What the model calls its cache, which 5.40 renames.
        known = inspect.signature(model.forward).parameters
        self.argument = "cache" if "cache" in known else "past_key_values"
        return model

    def logits(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(tokens, use_cache=False).logits
        return logits

    def fresh_shape(self, length: int) -> None:
        super().fresh_shape(length)
        self.decoding: Any = self.model
        if self.static:
            torch.compiler.reset()
            self.decoding = torch.compile(self.model.__call__, mode="reduce-overhead")

    def empty_cache(self, room: int) -> Any:
        """A cache for so many tokens."""
        transformers = importlib.import_module("transformers")
        if self.static:
            return transformers.StaticCache(config=self.config, max_cache_len=room)
        return transformers.DynamicCache(config=self.config)

    def prefill(self, tokens: Tensor, room: int) -> Any:
        cache = self.empty_cache(tokens.shape[1] + room)
        self.model(tokens, **{self.argument: cache}, use_cache=True, logits_to_keep=1)
        return cache

    def decode_step(self, token: Tensor, state: Any) -> Any:
        self.decoding(token, **{self.argument: state}, use_cache=True)
        return state

    def rewound(self, state: Any, length: int) -> Any:
        if self.static:
            for layer in state.layers:
                layer.cumulative_length.fill_(length)
            return state
        if (excess := state.get_seq_length() - length) > 0:
            state.crop(-excess)
        return state

    def repeated(self, state: Any, batch: int) -> Any:
        if not self.static:
            state.batch_repeat_interleave(batch)
            return state
        wide = self.empty_cache(state.get_max_length())
        for layer, one in zip(wide.layers, state.layers, strict=True):
            held = [part.expand(batch, -1, -1, -1) for part in (one.keys, one.values)]
            layer.lazy_initialization(*held)
            layer.keys.copy_(one.keys)
            layer.values.copy_(one.values)
            layer.cumulative_length.copy_(one.cumulative_length)
        return wide

    def state_bytes(self, state: Any) -> int:
        tensors = [part for layer in state.layers for part in (layer.keys, layer.values)]
        return sum(part.numel() * part.element_size() for part in tensors)


class Torchscale(Peer):
    """RetNet of torchscale: in chunks of 512 [its default], or in its parallel form."""

    kind, package, distribution, like = "torchscale", "torchscale", "torchscale", "Retention"
    install = "--no-deps torchscale fairscale"  # what it declares brings another torch
    options = ("chunk_size", "parallel")

    def __init__(self, text: str, shape: Shape) -> None:
        super().__init__(text, shape)
        why = "torchscale reads a prompt into a state only token by token"
        self.without |= dict.fromkeys(("prefill", *DECODING), why)
        size = self.given.get("chunk_size", "512")
        if not size.isdigit() or int(size) < 1:
            raise ValueError(f"{text}: chunk_size={size} must be an integer of at least 1")
        self.chunk_size = None if "parallel" in self.given else int(size)

    def make(self) -> nn.Module:
        # It wants one function of timm, which would bring another torch; with no drop path it is
        # the identity.
        if "timm" not in sys.modules and importlib.util.find_spec("timm") is None:
            layers: Any = types.ModuleType("timm.models.layers")
            layers.drop_path = lambda x, *arguments: x
            empty = {name: types.ModuleType(name) for name in ("timm", "timm.models")}
            sys.modules.update(empty | {layers.__name__: layers})
        configs = importlib.import_module("torchscale.architecture.config")
        module = importlib.import_module("torchscale.architecture.retnet")
        config = configs.RetNetConfig(
            decoder_embed_dim=self.shape.dim,
            decoder_value_embed_dim=2 * self.shape.dim,
            decoder_retention_heads=self.shape.heads,
            decoder_ffn_embed_dim=self.shape.width,
            decoder_layers=self.shape.depth,
            activation_fn="swish",
            vocab_size=self.shape.vocab_size,
            share_decoder_input_output_embed=self.shape.tie_weights,
            chunkwise_recurrent=self.chunk_size is not None,
            recurrent_chunk_size=self.chunk_size or 512,
        )
        embedding = torch.nn.Embedding(self.shape.vocab_size, self.shape.dim)
        model: nn.Module = module.RetNetDecoder(config, embed_tokens=embedding)
        return model

    def logits(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(tokens)[0]
        return logits


class FlashLinearAttention(Peer):
    """RetNetForCausalLM of flash-linear-attention, with its own kernels and fused parts."""

    kind, package, distribution, like = "fla", "fla", "flash-linear-attention", "Retention"

    @classmethod
    def missing(cls, device: str) -> str | None:
        if torch.device(device).type != "cuda":
            return "flash-linear-attention needs a CUDA device"
        return super().missing(device)

    def make(self) -> nn.Module:
        models = importlib.import_module("fla.models")
        config = models.RetNetConfig(
            hidden_size=self.shape.dim,
            num_hidden_layers=self.shape.depth,
            num_heads=self.shape.heads,
            intermediate_size=self.shape.width,
            vocab_size=self.shape.vocab_size,
            tie_word_embeddings=self.shape.tie_weights,
            max_position_embeddings=131_072,
            use_cache=False,
        )
        model: nn.Module = models.RetNetForCausalLM(config)
        return model

    def loss(self, tokens: Tensor) -> Tensor:
        # Its head and cross-entropy are one kernel, which takes the labels unshifted.
        inputs = tokens[:, :-1]
        loss: Tensor = self.model(inputs, labels=inputs).loss
        return loss

    def prefill(self, tokens: Tensor, room: int) -> Any:
        return self.model(tokens, use_cache=True, logits_to_keep=1).past_key_values

    def decode_step(self, token: Tensor, state: Any) -> Any:
        return self.model(token, past_key_values=state, use_cache=True).past_key_values

    def repeated(self, state: Any, batch: int) -> Any:
        for tensors in _states_of(state):
            for key, tensor in tensors.items():
                if isinstance(tensor, Tensor):
                    tensors[key] = tensor.expand(batch, *tensor.shape[1:]).contiguous()
        return state

    def state_bytes(self, state: Any) -> int:
        found = [t for tensors in _states_of(state) for t in tensors.values()]
        return sum(t.numel() * t.element_size() for t in found if isinstance(t, Tensor))


def _states_of(cache: Any) -> list[dict[str, Any]]:
    """The layers' tensors by name, of a cache of flash-linear-attention."""
    layers = getattr(cache, "layers", None)
    if layers is None:
        layers = cache.states
    return [getattr(layer, "state", layer) for layer in layers]


PEERS: dict[str, type[Peer]] = {
    peer.kind: peer for peer in (Nano, Llama, Torchscale, FlashLinearAttention)
}
