"""Blocks, the decoder and what one does with it, in plain PyTorch."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archzoo.export.plain.core import Context, Mixed, State, make_context
from archzoo.export.plain.embeddings import TokenEmbedding

# A generated file says here what its model is made of.

INIT_STD = 0.02  # of matrices at the start


def make_embedding(vocab_size: int, dim: int) -> Any:
    """The embedding."""
    raise NotImplementedError


def make_mixer(layer: int, dim: int, heads: int) -> Any:
    """The mixer of a block."""
    raise NotImplementedError


def make_convolution(dim: int, heads: int) -> Any:
    """What stands before each mixer, or None."""
    raise NotImplementedError


def make_feed_forward(dim: int, width: int) -> Any:
    """The feed-forward of a block."""
    raise NotImplementedError


def make_norm(dim: int) -> nn.Module:
    """Each of the norms."""
    raise NotImplementedError


class Block(nn.Module):
    """``x = x + mixer(norm(x))``, over time; ``x = x + feed_forward(norm(x))``, over channels."""

    def __init__(
        self,
        layer: int,
        dim: int,
        heads: int,
        width: int,
        *,
        post: bool = False,  # norm(x + f(x)) instead of x + f(norm(x))
        convolved: bool = False,  # mixer(h + convolution(h)), h the normed x
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.mixer_norm: nn.Module = make_norm(dim)
        self.feed_forward_norm: nn.Module = make_norm(dim)
        self.post, self.convolved = post, convolved
        if convolved:
            self.convolution = make_convolution(dim, heads)
        self.mixer = make_mixer(layer, dim, heads)
        self.feed_forward = make_feed_forward(dim, width)
        self.dropout = dropout

    def init_state(self, batch_size: int, **options: Any) -> Any:
        """The mixer's, beside a convolution's if there is one."""
        if self.convolved:
            parts = {"convolution": self.convolution, "mixer": self.mixer}
            return {name: part.init_state(batch_size, **options) for name, part in parts.items()}
        return self.mixer.init_state(batch_size, **options)

    def mix(self, h: Tensor, state: State | None, context: Context) -> Mixed:
        """The mixer after its convolution, and the states of both."""
        before = state or {"convolution": None, "mixer": None}
        near, convolved = self.convolution(h, before["convolution"], context)
        mixed, after = self.mixer(h + near, before["mixer"], context)
        return mixed, None if state is None else {"convolution": convolved, "mixer": after}

    def forward(self, x: Tensor, state: State | None, context: Context) -> Any:
        """X (batch, time, dim) to x, the state after it, and what the feed-forward says beside."""
        h = x if self.post else self.mixer_norm(x)
        if self.convolved:
            mixed, state = self.mix(h, state, context)
        else:
            mixed, state = self.mixer(h, state, context)
        x = x + (F.dropout(mixed, self.dropout, self.training) if self.dropout else mixed)
        if self.post:
            x = self.mixer_norm(x)
        fed, aux = self.feed_forward(x if self.post else self.feed_forward_norm(x), context)
        x = x + (F.dropout(fed, self.dropout, self.training) if self.dropout else fed)
        if self.post:
            x = self.feed_forward_norm(x)
        return x, state, aux


class Output(NamedTuple):
    """Logits (batch, time, vocab_size), the state to continue from, and each layer's aux."""

    logits: Tensor
    state: State | None
    aux: list[Any]


class Decoder(nn.Module):
    """Embedding, blocks, norm, head: logits of the next token."""

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        depth: int,
        heads: int,
        width: int,
        *,
        tie_weights: bool = False,  # the head is the embedding's table
        post: bool = False,
        convolved: bool = False,
        dropout: float = 0.0,
        loops: int = 1,  # times that the stack of blocks is applied, with the same weights
        injection: str = "none",  # add the embedding again: before every layer, or every loop
        reads_positions: bool = False,  # the embedding reads them off the text
        assigns_positions: bool = False,  # the embedding changes those that are counted
    ) -> None:
        super().__init__()
        self.loops, self.injection = loops, injection
        self.reads_positions, self.assigns_positions = reads_positions, assigns_positions
        self.embedding = make_embedding(vocab_size, dim)
        self.blocks = nn.ModuleList()
        for layer in range(depth):
            block = Block(layer, dim, heads, width, post=post, convolved=convolved, dropout=dropout)
            self.blocks.append(block)
        self.norm: nn.Module = nn.Identity() if post else make_norm(dim)
        self.head = nn.Linear(dim, vocab_size, bias=False)
        self.dropout = dropout
        branches = 2 * depth * loops if loops > 1 else 2 * depth
        self.draw_weights(INIT_STD, INIT_STD / math.sqrt(branches))
        if tie_weights:
            self.head.weight = self.embedding.weight

    @torch.no_grad()
    def draw_weights(self, std: float, residual_std: float) -> None:
        """Matrices N(0, std^2), less for those that close a residual branch (GPT-2, 2.3)."""
        for module in self.modules():
            last = getattr(module, "residual_projection", None)  # of a branch; None: not a matrix
            if getattr(module, "keeps_init", False):
                continue
            if last is not None or isinstance(module, nn.Linear | TokenEmbedding):
                module.weight.normal_(std=residual_std if last else std)  # type: ignore[operator]
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()

    def init_state(self, batch_size: int, device: Any = None) -> State:
        """The state before the first token, for a call to take and hand back."""
        given: Any = {"device": device or self.head.weight.device, "dtype": self.head.weight.dtype}
        blocks: Any = [*self.blocks] * self.loops if self.loops > 1 else self.blocks
        return {
            "cursor": None,
            "embedding": self.embedding.init_state(batch_size, **given),
            "blocks": [block.init_state(batch_size, **given) for block in blocks],
        }

    def forward(
        self,
        tokens: Tensor,  # (batch, time) int64
        state: State | None = None,  # of the call before; None: start empty, get none back
        documents: Tensor | None = None,  # (batch, time) ints, -1 for padding at a row's ends
        positions: Tensor | None = None,  # (batch, time) ints; None: counted, or read off
    ) -> Output:
        """Logits of the token after each token."""
        cursor = None if state is None else state["cursor"]
        if self.reads_positions and positions is None and cursor is None:
            positions = self.embedding.prompt_positions(tokens, documents)
        context, cursor = make_context(tokens, documents, positions, cursor)
        if self.assigns_positions:
            context = self.embedding.assign_positions(context)
        carried = None if state is None else state["embedding"]
        x, carried = self.embedding(tokens, carried, context)
        if self.dropout:
            x = F.dropout(x, self.dropout, self.training)
        embedded = x
        after, aux = [], []
        blocks: Any = [*self.blocks] * self.loops if self.loops > 1 else self.blocks
        for run, block in enumerate(blocks):
            if run and (
                self.injection == "layer"
                or (self.injection == "loop" and run % len(self.blocks) == 0)
            ):
                x = x + embedded
            x, mixed, beside = block(x, None if state is None else state["blocks"][run], context)
            after.append(mixed)
            aux.append(beside)
        if state is not None:
            state = {"cursor": cursor, "embedding": carried, "blocks": after}
        return Output(self.head(self.norm(x)), state, aux)


def loss_of(model: Decoder, tokens: Tensor, documents: Tensor | None = None) -> Tensor:
    """The training loss of tokens (batch, time + 1): of the next token, and what layers add.

    No token is predicted across a document's border, nor padding.
    """
    before = None if documents is None else documents[:, :-1]
    logits, _, aux = model(tokens[:, :-1], documents=before)
    labels = tokens[:, 1:]
    if documents is not None:
        same = (documents[:, 1:] == documents[:, :-1]) & (documents[:, 1:] >= 0)
        labels = labels.masked_fill(~same, -100)
    loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
    return loss + sum(sum(layer.losses.values()) for layer in aux if layer)


@torch.no_grad()
def generate(
    model: Decoder,  # in evaluation mode
    prompt: list[int],
    max_tokens: int = 32,
    temperature: float = 0.0,  # of the distribution drawn from; 0: the most likely token
) -> list[int]:
    """Continue a prompt, token by token, from the state that reading it leaves."""
    tokens = torch.tensor([prompt], device=model.head.weight.device)
    state, found = model.init_state(1), []
    for _ in range(max_tokens):
        logits, state, _ = model(tokens, state)
        last = logits[0, -1].float()
        if temperature:
            token = int(torch.multinomial((last / temperature).softmax(-1), 1))
        else:
            token = int(last.argmax())
        found.append(token)
        tokens = tokens.new_tensor([[token]])
    return found
