"""Learned vectors before the text of every document: prompt tuning and P-tuning."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from archzoo.adapters import Adapter, Target


class PromptTuning(Adapter):
    """P (length, dim): vectors before the embedded text of every document, which alone learn.

    ::

        x = [P; embed(text)]                 then the decoder as it is

    They start from the vectors of words, the paper's best start on small models, and its next
    best is given by ``start="normal"``. Parameters: length * dim, of which nothing decays. They are
    no tokens: no label stands at them, and the text's positions count on from them.

    Source: Lester et al., arXiv 2104.08691, section 3; starts: section 3.2. There words are drawn
    from the 5,000 most common ones, here from the whole vocabulary, and random starts are uniform
    within 0.5, here normal at the scale of the vocabulary's vectors.

    Args:
        target: What it changes.
        targets: ``[input]``, as None is, too.
        layers: Not used: the input is before all layers.
        length: Vectors.
        start: "vocabulary": vectors of words drawn by the seed, none twice where there are enough;
            "normal": N(0, std^2).
        tokens: Start from the vectors of these tokens, one each; it replaces length and start.
        seed: Of the words.
        std: Of start "normal". None: the standard deviation of the vocabulary's vectors.

    Raises:
        ValueError: A length below 1, an unknown start, or a token that is not in the vocabulary.
    """

    kinds = ("input",)
    default_targets = ("input",)
    identity_at_start = False

    def __init__(
        self,
        target: Target,
        *,
        targets: list[str] | None = None,
        layers: list[int] | None = None,
        length: int = 20,
        start: Literal["vocabulary", "normal"] = "vocabulary",
        tokens: list[int] | None = None,
        seed: int = 0,
        std: float | None = None,
    ) -> None:
        super().__init__(target, targets=targets, layers=layers)
        if start not in ("vocabulary", "normal"):
            raise ValueError(f"start={start!r} is neither vocabulary nor normal")
        self.tokens = check_tokens(tokens)
        self.words, self.seed, self.std = start == "vocabulary", seed, check_std(std)
        length = check_length(length) if tokens is None else len(tokens)
        self.positions = length
        self.vectors = nn.Parameter(torch.empty(length, *target.shape))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw from N(0, std^2); std 1 without a vocabulary to go by."""
        nn.init.normal_(self.vectors, std=1.0 if self.std is None else self.std)

    def start(self, weight: Tensor) -> None:
        """Start from the vocabulary's vectors (vocab_size, dim)."""
        if weight.is_meta:  # without values
            return
        tokens = self.tokens
        if tokens is None and not self.words:
            std = weight.float().std() if self.std is None else self.std
            nn.init.normal_(self.vectors).mul_(std)
            return
        if tokens is None:
            tokens = draw_tokens(len(weight), len(self.vectors), self.seed)
        self.vectors.copy_(rows_of(weight, tokens))

    def prompt(self) -> Tensor:
        """P (length, dim)."""
        return self.vectors


class PTuning(Adapter):
    """P-tuning: P (length, dim) before every document's text, made by a small network.

    ::

        P = W2 relu(W1 h + b1) + b2,    h = BiLSTM(E)    E (length, dim) learned
                                        h = E            with encoder "mlp"

    The LSTM has two layers and dim / 2 numbers each way, so h is dim wide. In training all of it
    learns: length * dim, 2 dim^2 + 2 dim of the two matrices, and 12 dim^2 + 16 dim of the LSTM.
    Afterwards `collapse` computes P once and throws the network away: length * dim remain. E
    starts at N(0, 1), the others at torch's defaults. Nothing decays.

    Source: Liu et al., P-tuning, arXiv 2103.10385, section 3.2; their PromptEncoder. There P
    goes between the words of a template, and anchors of words among it; here it is in front.

    Args:
        target: What it changes.
        targets: ``[input]``, as None is, too.
        layers: Not used: the input is before all layers.
        length: Vectors.
        encoder: "lstm", "mlp", or "none": P itself learns, which is what `collapse` leaves.

    Raises:
        ValueError: A length below 1, an unknown encoder, or an odd dim for the LSTM.
    """

    kinds = ("input",)
    default_targets = ("input",)
    identity_at_start = False

    def __init__(
        self,
        target: Target,
        *,
        targets: list[str] | None = None,
        layers: list[int] | None = None,
        length: int = 20,
        encoder: Literal["lstm", "mlp", "none"] = "lstm",
    ) -> None:
        super().__init__(target, targets=targets, layers=layers)
        (dim,) = target.shape
        if encoder not in ("lstm", "mlp", "none"):
            raise ValueError(f"encoder={encoder!r} is none of lstm, mlp, none")
        if encoder == "lstm" and dim % 2:
            raise ValueError(
                f"encoder=lstm runs at dim / 2 each way, and dim={dim} is odd: take encoder=mlp"
            )
        self.encoder, self.positions = encoder, check_length(length)
        self.vectors = nn.Parameter(torch.empty(length, dim))  # E, or P itself
        if encoder == "lstm":
            self.lstm = nn.LSTM(dim, dim // 2, 2, bidirectional=True, batch_first=True)
        if encoder != "none":
            self.head = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """E from N(0, 1), the network as torch draws it."""
        nn.init.normal_(self.vectors)
        for part in self.modules():
            if isinstance(part, nn.LSTM | nn.Linear):
                part.reset_parameters()

    def prompt(self) -> Tensor:
        """P (length, dim)."""
        if self.encoder == "none":
            return self.vectors
        hidden: Tensor = self.vectors
        if self.encoder == "lstm":
            hidden = self.lstm(hidden[None])[0][0]
        made: Tensor = self.head(hidden)
        return made

    @torch.no_grad()
    def collapse(self) -> dict[str, Any]:
        """Keep P, and throw away what made it."""
        if self.encoder != "none":
            self.vectors.copy_(self.prompt())
            del self.head
            if self.encoder == "lstm":
                del self.lstm
            self.encoder = "none"
        return {"encoder": "none"}


def check_length(length: int) -> int:
    """A number of vectors or tokens that a prompt or a prefix can have."""
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise ValueError(f"length={length!r} must be an integer of at least 1")
    return length


def check_std(std: float | None) -> float | None:
    """A standard deviation, or None."""
    if std is not None and not 0 <= std < float("inf"):
        raise ValueError(f"std={std!r} must be at least 0, and finite")
    return std


def check_tokens(tokens: list[int] | None) -> list[int] | None:
    """Tokens to start from, at least one, or None."""
    if tokens is None:
        return None
    whole = all(isinstance(token, int) and not isinstance(token, bool) for token in tokens)
    if not tokens or not whole or min(tokens) < 0:
        raise ValueError(f"tokens={tokens!r} must be a list of at least one token, 0 or more")
    return list(tokens)


def rows_of(table: Tensor, tokens: list[int]) -> Tensor:
    """The vectors of tokens.

    Raises:
        ValueError: One is not in the vocabulary.
    """
    if max(tokens) >= len(table):
        raise ValueError(f"token {max(tokens)} is not one of the model's 0 to {len(table) - 1}")
    return table[torch.tensor(tokens, device=table.device)]


def draw_tokens(vocabulary: int, count: int, seed: int) -> list[int]:
    """Tokens drawn by a seed, none twice before all have come.

    Args:
        vocabulary: Tokens that there are.
        count: To be drawn.
        seed: Of the draw.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    drawn: list[int] = []
    while len(drawn) < count:
        drawn += torch.randperm(vocabulary, generator=generator, device="cpu").tolist()
    return drawn[:count]
