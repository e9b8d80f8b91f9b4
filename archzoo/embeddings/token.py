"""The plain word embedding. Position methods that need to see the tokens are its siblings."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archzoo.block import Embedding
from archzoo.documents import Context
from archzoo.states import State


class TokenEmbedding(Embedding):
    """One learned vector a token: ``x_t = table[token_t]``.

    Args:
        vocab_size: Rows of the table.
        dim: Width of a row.
    """

    def __init__(self, vocab_size: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(vocab_size, dim))

    def forward(
        self, tokens: Tensor, state: State | None, context: Context
    ) -> tuple[Tensor, State | None]:
        """Tokens (batch, time) int64 to x (batch, time, dim)."""
        return F.embedding(tokens, self.weight), state
