"""Token by token: from a state that is carried, or by reading the whole text again."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from archzoo.block import FORMS
from archzoo.decoder import Decoder, Output
from archzoo.generation.prompts import Prompts, encode, pad_left
from archzoo.generation.sampling import Sampler
from archzoo.numerics import MODEL_TOLERANCES, for_float64
from archzoo.states import State, nbytes, reorder
from archzoo.tasks.writing import Writing, writing_of

if TYPE_CHECKING:
    from archzoo.tasks.tokenizers import Tokenizer

#: Called as on_token(row, token, text) for each new token, text being what is now certain of the
#: row's text; and once as on_token(row, None, rest) when the row has ended.
OnToken = Callable[[int, int | None, str], None]


class FormsDisagree(ArithmeticError):
    """The recurrent and the parallel form gave different logits."""


class Generation(NamedTuple):
    """What `generate` wrote, a row for each prompt.

    Attributes:
        tokens: The new tokens of each row, without the stop token.
        texts: The same as text, what follows the prompt, its numbers as people write them; None
            without a tokenizer.
        stopped: Whether each row ended by the stop token, and not at max_tokens.
        milliseconds_per_token: Wall time of a step, which gives every row a token; the first
            token, which comes with the prompt's pass, is left out. 0 where no other came.
        prompt_milliseconds: Wall time of the prompt's pass.
        state_bytes: Of the state of all rows, each at its end, KV caches with their whole buffers;
            0 in a form that keeps none.
        largest_difference: With check, the largest relative root mean square difference of the
            two forms' logits over all rows and steps; else None.
    """

    tokens: list[list[int]]
    texts: list[str] | None
    stopped: list[bool]
    milliseconds_per_token: float
    prompt_milliseconds: float
    state_bytes: int
    largest_difference: float | None


def generate(
    model: Decoder,
    prompts: Prompts,
    *,
    max_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop_token: int | None = None,
    form: Literal["parallel", "chunkwise", "recurrent"] | None = None,
    check: bool = False,
    tokenizer: Tokenizer | None = None,
    on_token: OnToken | None = None,
) -> Generation:
    """Continue prompts, which may differ in length: each gets what it would get alone.

    Text is a person's: where the model's task writes numbers otherwise (`Decoder.task`), such as
    least significant digit first, prompts are put as the task writes them and answers are put
    back. Tokens are the task's own.

    Args:
        model: Any decoder. It works in evaluation mode, and is left in the mode it was in.
        prompts: One text or several (with a tokenizer), or tokens: of one prompt or of several.
        max_tokens: The most that a row may get.
        temperature: Divides the logits before sampling; 0 takes the most likely token.
        top_k: Sample from the k most likely tokens.
        top_p: Sample from the fewest most likely tokens with this total probability.
        seed: Row r is sampled by seed + r. None: by torch's global generator.
        stop_token: Ends a row. None: the tokenizer's own, where it has one.
        form: "recurrent" [the default] carries a state from step to step; "parallel" and
            "chunkwise" keep none, and recompute the whole text at every step.
        check: Compare the logits of every step with those of the parallel form (of the recurrent
            form, where form is another).
        tokenizer: Text to tokens and back.
        on_token: Called with each token as it comes, for streaming: see `OnToken`.

    Raises:
        ValueError: An argument out of range, an empty prompt, a token or character that is not in
            the vocabulary, or weights that are not finite.
        FormsDisagree: With check, at the end: the forms differ by more than rounding explains.
    """
    form = form or "recurrent"
    if form not in FORMS:
        raise ValueError(f"form {form!r} is not one of {', '.join(FORMS)}")
    if max_tokens < 1:
        raise ValueError(f"max_tokens={max_tokens} must be at least 1")
    writing = writing_of(model.task)
    asked_in_text = isinstance(prompts, str) or any(isinstance(entry, str) for entry in prompts)
    if asked_in_text and model.task is None and getattr(tokenizer, "special", False):
        # A task of problems made the tokenizer.
        warnings.warn(
            "the model does not say what it was trained on, so numbers are taken as they are: "
            "if its task reverses digits, set model.task = task.config() and save it again",
            stacklevel=2,
        )
    rows = encode(prompts, tokenizer, model.vocab_size, writing)
    if stop_token is None and tokenizer is not None:
        stop_token = tokenizer.stop_token
    model.embedding.check_prompts(rows)  # here, where it needs no synchronisation with a device
    sampler = Sampler(len(rows), temperature, top_k, top_p, seed)
    writers = [
        _Writer(row, prompt, tokenizer, on_token, writing) for row, prompt in enumerate(rows)
    ]

    training = model.training
    model.eval()
    try:
        with torch.inference_mode(), model.weights_held():
            tokens, documents = pad_left(rows, model.device)
            capacity = tokens.shape[1] + max_tokens
            reader = _reader(model, form, capacity)
            other_form = "parallel" if form == "recurrent" else "recurrent"
            reference = _reader(model, other_form, capacity) if check else None
            times: list[float] = []
            differences: list[float] = []
            going = list(range(len(rows)))  # the rows that have not ended
            while len(times) < max_tokens and going:
                begin = time.perf_counter()
                logits = reader.read(tokens, documents)
                chosen = sampler(logits, going)
                drawn = chosen.tolist()  # waits for the device
                times.append(1000 * (time.perf_counter() - begin))
                if len(times) == 1 and not logits.isfinite().all():
                    raise ValueError("the model's logits are not finite: its weights are broken")
                if reference is not None:
                    differences.append(difference(logits, reference.read(tokens, documents)))
                for row, new in zip(going, drawn, strict=True):
                    writers[row].write(new, stop_token)
                tokens, documents = chosen[:, None], None
                kept = [index for index, row in enumerate(going) if not writers[row].ended]
                if 0 < len(kept) < len(going):  # rows that have ended are dropped from the batch
                    indices = torch.tensor(kept, device=tokens.device)
                    tokens = tokens[indices]
                    for each in (reader, reference):
                        if each is not None:
                            each.keep(indices)
                going = [going[index] for index in kept]
            for writer in writers:
                writer.end()
    finally:
        model.train(training)

    if differences:
        _judge(differences, logits.dtype)
    return Generation(
        tokens=[writer.tokens for writer in writers],
        texts=None if tokenizer is None else [writer.text for writer in writers],
        stopped=[writer.stopped for writer in writers],
        milliseconds_per_token=sum(times[1:]) / max(len(times) - 1, 1),
        prompt_milliseconds=times[0],
        state_bytes=reader.ended_bytes + nbytes(reader.state)
        if isinstance(reader, _Carrying)
        else 0,
        largest_difference=max(differences) if differences else None,
    )


class _Carrying:
    """Reads a text segment by segment and keeps the state (such as a KV cache) between them."""

    def __init__(self, model: Decoder, capacity: int) -> None:
        self.model, self.capacity = model, capacity
        self.state: State | None = None
        self.ended_bytes = 0  # of the state of rows that have ended

    def read(self, tokens: Tensor, documents: Tensor | None) -> Tensor:
        """Tokens and documents (batch, time): the next segment. Logits (batch, vocab_size)."""
        form: str | None = "recurrent"
        positions = None
        if self.state is None:  # the prompt, in one pass
            self.state = self.model.init_state(tokens.shape[0], capacity=self.capacity)
            form = None
            positions = self.model.embedding.prompt_positions(tokens, documents)
        output: Output = self.model(
            tokens, self.state, documents, form=form, logits_to_keep=1, positions=positions
        )
        self.state = output.state
        return output.logits[:, 0]

    def keep(self, rows: Tensor) -> None:
        """Continue with some of the rows, (kept,) int64."""
        before = nbytes(self.state)
        self.state = reorder(self.state, rows)
        self.ended_bytes += before - nbytes(self.state)


class _Recomputing:
    """Reads the whole text again with each segment."""

    def __init__(self, model: Decoder, form: str) -> None:
        self.model, self.form = model, form
        self.segments: list[Tensor] = []
        self.documents: Tensor | None = None
        self.positions: Tensor | None = None

    def read(self, tokens: Tensor, documents: Tensor | None) -> Tensor:
        """As `_Carrying.read`."""
        if not self.segments:
            self.documents = documents
            self.positions = self.model.embedding.prompt_positions(tokens, documents)
        else:
            if self.documents is not None:  # a row continues its document, which is 0
                self.documents = torch.cat([self.documents, torch.zeros_like(tokens)], dim=1)
            if self.positions is not None:  # and counts on
                self.positions = torch.cat([self.positions, self.positions[:, -1:] + 1], dim=1)
        self.segments.append(tokens)
        tokens = torch.cat(self.segments, dim=1)
        output: Output = self.model(
            tokens,
            None,
            self.documents,
            form=self.form,
            logits_to_keep=1,
            positions=self.positions,
        )
        return output.logits[:, 0]

    def keep(self, rows: Tensor) -> None:
        """As `_Carrying.keep`."""
        self.segments = [segment[rows] for segment in self.segments]
        self.documents = None if self.documents is None else self.documents[rows]
        self.positions = None if self.positions is None else self.positions[rows]


def _reader(model: Decoder, form: str, capacity: int) -> _Carrying | _Recomputing:
    return _Carrying(model, capacity) if form == "recurrent" else _Recomputing(model, form)


def difference(logits: Tensor, reference: Tensor) -> float:
    """The largest relative root mean square difference of a row: both (batch, vocab_size)."""
    logits, reference = for_float64(logits).double(), for_float64(reference).double()
    error = (logits - reference).norm(dim=-1)
    return float((error / reference.norm(dim=-1).clamp(min=1e-300)).max())


def _judge(differences: list[float], dtype: torch.dtype) -> None:
    largest, allowed = max(differences), MODEL_TOLERANCES[dtype]
    if not largest <= allowed:
        raise FormsDisagree(
            f"the recurrent and the recomputed logits differ by {largest:.1e} (relative root mean "
            f"square) at new token {differences.index(largest) + 1}, and {allowed:.0e} is allowed "
            f"in {str(dtype).removeprefix('torch.')}: a part's forms are not the same function"
        )


class _Writer:
    """The new tokens of one row, and their text as it becomes certain."""

    def __init__(
        self,
        row: int,
        prompt: list[int],
        tokenizer: Tokenizer | None,
        on_token: OnToken | None,
        writing: Writing,
    ) -> None:
        self.row, self.on_token = row, on_token
        self.tokens: list[int] = []
        self.written: list[str] = []
        self.ended = self.stopped = False
        self.decoder = self.reader = None
        if tokenizer is not None:
            from archzoo.tasks.tokenizers import StreamDecoder

            self.decoder = StreamDecoder(tokenizer)
            # Decoders may write a subword differently at the beginning of a text, and a character
            # may begin in the prompt: the last of its tokens go first.
            for token in prompt[-16:]:
                self.decoder.push(token)
            self.reader = writing.reader(tokenizer.decode(prompt))

    @property
    def text(self) -> str:
        return "".join(self.written)

    def write(self, token: int, stop_token: int | None) -> None:
        if self.ended:
            return
        if token == stop_token:
            self.stopped = True
            self.end()
            return
        self.tokens.append(token)
        text = self.reader.push(self.decoder.push(token)) if self.decoder and self.reader else ""
        self._tell(token, text)

    def end(self) -> None:
        if not self.ended:
            self.ended, text = True, ""
            if self.decoder and self.reader:
                text = self.reader.push(self.decoder.finish()) + self.reader.finish()
            self._tell(None, text)

    def _tell(self, token: int | None, text: str) -> None:
        self.written.append(text)
        if self.on_token is not None:
            self.on_token(self.row, token, text)
