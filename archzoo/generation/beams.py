"""Beam search: the most probable of several continuations that are followed at once.

Hypotheses are rows of one batch. After a step the state's rows are picked anew (`reorder`), so that
each hypothesis goes with the state of the one that it continues.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from archzoo.compiled import uncompiled
from archzoo.decoder import Decoder
from archzoo.generation.conversation import Conversation, check_conversation, prompts_of, tails
from archzoo.generation.prompts import Prompts, encode, pad_left
from archzoo.generation.rows import RowWriter, StateReader
from archzoo.generation.sampling import at_least, check_stop
from archzoo.numerics import for_float64
from archzoo.states import nbytes, reorder
from archzoo.tasks.writing import writing_of

if TYPE_CHECKING:
    from archzoo.tasks.tokenizers import Tokenizer

MOST = 1_024  # beams


class Beams(NamedTuple):
    """What `beam_search` found: for each prompt its hypotheses, the best first.

    Attributes:
        tokens: The new tokens, without the stop token.
        texts: The same as text; None without a tokenizer.
        scores: ``log p / length^length_power``; the hypotheses are in its order.
        log_probabilities: ``log p`` of the tokens, the stop token included.
        stopped: Whether a hypothesis ended by the stop token, and not at max_tokens.
        milliseconds_per_token: Wall time of a step of all hypotheses, without the first.
        prompt_milliseconds: Wall time of the prompt's pass.
        state_bytes: Of the state of all hypotheses at the end.
    """

    tokens: list[list[list[int]]]
    texts: list[list[str]] | None
    scores: list[list[float]]
    log_probabilities: list[list[float]]
    stopped: list[list[bool]]
    milliseconds_per_token: float
    prompt_milliseconds: float
    state_bytes: int


class _Hypothesis(NamedTuple):
    tokens: list[int]
    log_probability: float
    stopped: bool = False

    def score(self, length_power: float) -> float:
        length = max(len(self.tokens) + self.stopped, 1)
        return float(self.log_probability / length**length_power)


def beam_search(
    model: Decoder,
    prompts: Prompts | None = None,
    *,
    beams: int = 4,
    max_tokens: int,
    length_power: float = 1.0,
    stop_token: int | None = None,
    tokenizer: Tokenizer | None = None,
    conversation: Conversation | None = None,
) -> Beams:
    """The most probable continuations of prompts, which may differ in length.

    ::

        log p(y_1 ... y_n) = sum_t log p(y_t | prompt, y_1 ... y_(t-1))
        score              = log p / n^length_power

    n counts the new tokens and the stop token. Of all continuations of a prompt's hypotheses by one
    token, each step keeps those of the highest log p, `beams` of them; of equals, the one of the
    better hypothesis and then of the lower token. A hypothesis that ends keeps its place, so there
    is one less to follow. At the end they are ranked by their score. With one beam this is greedy
    decoding, and with as many as there are texts it is exhaustive search.

    Source: Sutskever et al., arXiv 1409.3215, section 3.2; the length's power: Wu et al.,
    arXiv 1609.08144, section 7, without the constant 5.

    Args:
        model: Any decoder. It works in evaluation mode, and is left in the mode it was in.
        prompts: As for `archzoo.generate`.
        beams: Hypotheses of each prompt.
        max_tokens: The most that one may have.
        length_power: 0 ranks by log p, which prefers short texts; 1 by its mean over the tokens.
        stop_token: Ends a hypothesis. None: the tokenizer's own, where it has one.
        tokenizer: Text to tokens and back.
        conversation: What was read before, a row for each prompt; it stays as it is.

    Raises:
        ValueError: An argument out of range, an empty prompt, a token or character that is not in
            the vocabulary, or weights that are not finite.
    """
    if not 1 <= beams <= MOST:
        raise ValueError(f"beams={beams} must lie in 1 to {MOST:,}")
    at_least("max_tokens", max_tokens, 1)
    if not 0 <= length_power < math.inf:
        raise ValueError(f"length_power={length_power} must be at least 0, and finite")
    model = uncompiled(model)
    prompts = prompts_of(prompts, conversation)
    writing = writing_of(model.task)
    rows = encode(prompts, tokenizer, model.vocab_size, writing, continues=conversation is not None)
    if stop_token is None and tokenizer is not None:
        stop_token = tokenizer.stop_token
    check_stop(stop_token, model.vocab_size)
    model.embedding.check_prompts(rows)
    before: list[list[int]] = [[] for _ in rows]
    if conversation is not None:
        check_conversation(conversation, model, rows)
        before = tails(conversation)

    with model.evaluating(), torch.inference_mode(), model.weights_held():
        search = _Search(model, rows, conversation, beams, max_tokens, stop_token)
        while search.step():
            pass

    found = [
        sorted(ended, key=lambda one: one.score(length_power), reverse=True)
        for ended in search.ended
    ]
    texts: list[list[str]] | None = None
    if tokenizer is not None:
        texts = []
        for row, hypotheses in enumerate(found):
            texts.append([])
            for one in hypotheses:
                writer = RowWriter(row, before[row] + rows[row], tokenizer, None, writing, False)
                for token in one.tokens:
                    writer.write(token, None)
                writer.end()
                texts[-1].append(writer.text)
    times = search.times
    return Beams(
        tokens=[[one.tokens for one in hypotheses] for hypotheses in found],
        texts=texts,
        scores=[[one.score(length_power) for one in hypotheses] for hypotheses in found],
        log_probabilities=[[one.log_probability for one in hypotheses] for hypotheses in found],
        stopped=[[one.stopped for one in hypotheses] for hypotheses in found],
        milliseconds_per_token=sum(times[1:]) / max(len(times) - 1, 1),
        prompt_milliseconds=sum(times[:1]),
        state_bytes=nbytes(search.reader.state),
    )


class _Search:
    """The hypotheses of all prompts, a row of the batch for each that has not ended.

    Args:
        model: In evaluation mode.
        rows: The prompts' tokens.
        conversation: What was read before them.
        beams: Hypotheses of each prompt.
        max_tokens: The most that one may have.
        stop_token: Ends one.
    """

    def __init__(
        self,
        model: Decoder,
        rows: list[list[int]],
        conversation: Conversation | None,
        beams: int,
        max_tokens: int,
        stop_token: int | None,
    ) -> None:
        self.beams, self.max_tokens, self.stop_token = beams, max_tokens, stop_token
        self.ended: list[list[_Hypothesis]] = [[] for _ in rows]
        self.going = [(row, _Hypothesis([], 0.0)) for row in range(len(rows))]
        if conversation is not None:
            stopped = conversation.stopped.tolist()
            for row, hypothesis in self.going:
                if stopped[row] and not rows[row]:
                    self.ended[row].append(hypothesis._replace(stopped=True))
            self.going = [(row, one) for row, one in self.going if not self.ended[row]]
            if len(self.going) < len(rows):
                chosen = [row for row, _ in self.going]
                conversation = reorder(conversation, torch.tensor(chosen, dtype=torch.int64))
                rows = [rows[row] for row in chosen]
        self.tokens, self.documents = pad_left(rows, model.device)
        self.reader = StateReader(model, self.tokens.shape[1] + max_tokens, conversation)
        self.times: list[float] = []

    def step(self) -> bool:
        """Read the tokens that were chosen, and choose the next; False: all have ended."""
        if not self.going:
            return False
        begin = time.perf_counter()
        logits = self.reader.read(self.tokens, self.documents)
        if not self.times and not logits.isfinite().all():
            raise ValueError("the model's logits are not finite: its weights are broken")
        chances = for_float64(logits).double().log_softmax(dim=-1)
        parents: list[int] = []
        going: list[tuple[int, _Hypothesis]] = []
        first = 0
        while first < len(self.going):  # the hypotheses of one prompt are side by side
            prompt = self.going[first][0]
            count = sum(row == prompt for row, _ in self.going)
            mine = [one for _, one in self.going[first : first + count]]
            sums = torch.tensor([one.log_probability for one in mine], dtype=chances.dtype)
            totals = chances[first : first + count] + sums.to(chances.device)[:, None]
            for value, index in _best(totals.flatten(), self.beams - len(self.ended[prompt])):
                which, token = divmod(index, totals.shape[1])
                tokens = mine[which].tokens
                if token == self.stop_token:
                    self.ended[prompt].append(_Hypothesis(tokens, value, True))
                elif len(tokens) + 1 == self.max_tokens:
                    self.ended[prompt].append(_Hypothesis([*tokens, token], value))
                else:
                    going.append((prompt, _Hypothesis([*tokens, token], value)))
                    parents.append(first + which)
            first += count
        if parents and parents != list(range(len(self.going))):
            self.reader.keep(torch.tensor(parents, device=logits.device))
        self.going, self.documents = going, None
        self.tokens = torch.tensor([[one.tokens[-1]] for _, one in going], device=logits.device)
        self.times.append(1000 * (time.perf_counter() - begin))
        return True


def _best(values: Tensor, count: int) -> list[tuple[float, int]]:
    """The largest values (n,) and their places, of equals the first ones."""
    least = values.topk(min(count, len(values))).values[-1]
    places = (values >= least).nonzero()[:, 0]
    order = values[places].sort(descending=True, stable=True).indices[:count]
    best = places[order]
    pairs = zip(values[best].tolist(), best.tolist(), strict=True)
    return [(value, place) for value, place in pairs if value > -math.inf]
