"""nanoGPT's architecture, written out, so that it can stand beside ours without being installed.

GPT-2 without biases (Radford et al., 2019; https://github.com/karpathy/nanoGPT at its training
defaults): learned positions, LayerNorm, fused causal attention, GELU four times as wide, a head
tied to the embedding, and the loss within the model. It has no KV cache.
"""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional as F


class NanoBlock(nn.Module):
    """``x = x + Attention(norm(x)); x = x + GELU(norm(x) U) D``.

    Args:
        dim: Width.
        heads: Of attention.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(dim, bias=False)
        self.query_key_value = nn.Linear(dim, 3 * dim, bias=False)
        self.output = nn.Linear(dim, dim, bias=False)
        self.feed_forward_norm = nn.LayerNorm(dim, bias=False)
        self.up = nn.Linear(dim, 4 * dim, bias=False)
        self.down = nn.Linear(4 * dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """X (batch, time, dim) to the same shape."""
        heads = self.query_key_value(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # (batch, heads, time, head_dim) each
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.output(y.transpose(1, 2).flatten(2))
        hidden: Tensor = self.down(F.gelu(self.up(self.feed_forward_norm(x))))
        return x + hidden


class NanoGPT(nn.Module):
    """The whole model.

    Args:
        vocab_size: Tokens it knows.
        dim: Width.
        depth: Blocks.
        heads: Of attention.
    """

    def __init__(self, vocab_size: int, dim: int, depth: int, heads: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, dim)
        self.blocks = nn.ModuleList(NanoBlock(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, bias=False)
        self.head = nn.Linear(dim, vocab_size, bias=False)
        self.head.weight = self.embedding.weight
        self.extend(0)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                last = name.endswith(("output.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * depth) if last else 0.02)

    def extend(self, length: int) -> None:
        """Learn positions up to a length."""
        table = self.embedding.weight.new_empty(length, self.embedding.embedding_dim)
        self.positions = nn.Parameter(nn.init.normal_(table, std=0.02))

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (batch, time, vocab_size) of tokens (batch, time)."""
        x = self.embedding(tokens) + self.positions[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits
