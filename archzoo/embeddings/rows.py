"""A table of words and a table of rows: the base of the position methods that see tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archzoo.block import Embedding
from archzoo.derivatives import exporting
from archzoo.embeddings.token import TokenEmbedding
from archzoo.norm import RMSNorm


class RowEmbedding(Embedding):
    """``x_t = norm(words[token_t] + table[row_t])``; a method says which row a token reads.

    Args:
        vocab_size: Tokens.
        dim: Width of x.
        rows: Of the table.
        normalise: RMS norm of the sum.
        std: Standard deviation of words and rows at the start; None: the decoder's init_std.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        rows: int,
        *,
        normalise: bool = False,
        std: float | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(vocab_size, dim))
        self.table = TokenEmbedding(rows, dim)
        self.norm = RMSNorm(dim) if normalise else nn.Identity()
        self.rows, self.std = rows, std
        if std is not None:
            for table in (self, self.table):
                table.keeps_init = True
                with torch.no_grad():
                    table.weight.mul_(std)

    def reset_parameters(self) -> None:
        """Draw words and rows with the standard deviation given; without one the decoder does."""
        if self.std is not None:
            nn.init.normal_(self.weight, std=self.std)
            nn.init.normal_(self.table.weight, std=self.std)

    def look_up(self, tokens: Tensor, rows: Tensor) -> Tensor:
        """Tokens and rows (batch, time) int64 to x (batch, time, dim).

        Where there are more tokens than pairs of a word and a row, as in arithmetic, each pair is
        made once and then looked up: one pass over x forward, and one backward, instead of five.
        """
        words = self.weight
        # What is exported runs for any length.
        if not exporting() and tokens.numel() > len(words) * self.rows:
            pairs = self.norm(words[:, None] + self.table.weight).flatten(0, 1)
            return F.embedding(torch.add(rows, tokens, alpha=self.rows), pairs)
        normed: Tensor = self.norm(
            F.embedding(tokens, words) + F.embedding(rows, self.table.weight)
        )
        return normed
