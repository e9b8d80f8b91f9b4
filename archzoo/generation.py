"""Writing text with a decoder, as a recurrent network or by recomputing everything.

The prompt is read in one pass into a state; then one token a step goes in, and the state comes
back. Retention's state stays as large as it was, attention's grows by a token a step. The other
forms keep nothing and read the whole text again at every step: slow, and the same to rounding,
which ``check`` proves while it writes.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from operator import index
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from archzoo.block import FORMS
from archzoo.decoder import Decoder, Output
from archzoo.numerics import MODEL_TOLERANCES, for_float64
from archzoo.states import State, nbytes, reorder
from archzoo.tasks.writing import PLAIN, Writing, writing_of

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


# ---------------------------------------------------------------------------- choosing a token


def probabilities(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """``softmax(logits / temperature)`` in float64, truncated to the most likely tokens.

    Args:
        logits: (batch, vocab_size).
        temperature: Above 0.
        top_k: Keep the k most likely tokens (of equals, those of lower number).
        top_p: Of what top_k kept, keep the fewest most likely tokens with this total probability.

    Returns:
        (batch, vocab_size) float64; on the CPU where the logits' device has none.
    """
    full = (for_float64(logits).double() / temperature).softmax(dim=-1)
    if top_k is None and top_p is None:
        return full
    ranked, order = full.sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        ranked[:, top_k:] = 0
    if top_p is not None:
        ranked = ranked / ranked.sum(dim=-1, keepdim=True)
        before = ranked.cumsum(dim=-1) - ranked  # the mass of likelier tokens
        ranked = ranked.masked_fill(before >= top_p, 0)
    ranked = ranked / ranked.sum(dim=-1, keepdim=True)
    return torch.zeros_like(full).scatter(-1, order, ranked)


def sample(probability: Tensor, uniform: Tensor) -> Tensor:
    """The token at which the cumulated probability passes a uniform number: (batch,) int64.

    Args:
        probability: (batch, vocab_size).
        uniform: (batch,) in [0, 1), of the same dtype.
    """
    cumulated = probability.cumsum(dim=-1)
    threshold = uniform[:, None] * cumulated[:, -1:]
    chosen = torch.searchsorted(cumulated, threshold, right=True)[:, 0]
    # Rounding may put the threshold on the total; the last possible token is meant.
    index = torch.arange(probability.shape[-1], device=probability.device)
    last = torch.where(probability > 0, index, 0).amax(dim=-1)
    return torch.minimum(chosen, last)


class Sampler:
    """Chooses each row's next token, by random numbers that do not depend on the other rows.

    Row r has a generator of its own, seeded with seed + r: equal prompts get different texts, and
    a prompt alone gets with seed + r what it gets as row r of a batch.

    Args:
        rows: Of the batch.
        temperature: 0 takes the most likely token.
        top_k: See `probabilities`.
        top_p: See `probabilities`.
        seed: Of row 0. None: drawn from torch's global generator.

    Raises:
        ValueError: A number out of its range, or top_k and top_p where nothing is drawn.
    """

    def __init__(
        self,
        rows: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> None:
        if not 0 <= temperature < float("inf"):
            raise ValueError(f"temperature={temperature} must be 0 (greedy) or more")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k={top_k} must be at least 1 token")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p={top_p} must lie in (0, 1]")
        if temperature == 0 and (top_k is not None or top_p is not None):
            raise ValueError(
                "top_k and top_p limit what is sampled from, but temperature=0 takes the most "
                "likely token and samples nothing: give a temperature, such as 1"
            )
        self.temperature, self.top_k = temperature, top_k
        self.top_p = None if top_p == 1 else top_p  # rounding would cut the least likely tokens
        self.generators: list[torch.Generator] = []
        if temperature:
            first = int(torch.randint(2**62, ())) if seed is None else seed
            self.generators = [torch.Generator().manual_seed(first + row) for row in range(rows)]

    def __call__(self, logits: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        """Logits (batch, vocab_size) of some rows, None: of all, to tokens (batch,) int64."""
        if not self.temperature:
            return logits.argmax(dim=-1)
        generators = self.generators if rows is None else [self.generators[row] for row in rows]
        # Drawn on the CPU, so that a seed means the same on every device.
        numbers = [torch.rand((), generator=g, dtype=torch.float64) for g in generators]
        likely = probabilities(logits, self.temperature, self.top_k, self.top_p)
        return sample(likely, torch.stack(numbers).to(likely.device)).to(logits.device)


# ---------------------------------------------------------------------------- writing

Prompts = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | Tensor


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
        with torch.inference_mode():
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
                news = chosen.tolist()  # waits for the device
                times.append(1000 * (time.perf_counter() - begin))
                if len(times) == 1 and not logits.isfinite().all():
                    raise ValueError("the model's logits are not finite: its weights are broken")
                if reference is not None:
                    differences.append(difference(logits, reference.read(tokens, documents)))
                for row, new in zip(going, news, strict=True):
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


def encode(
    prompts: Prompts,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    writing: Writing = PLAIN,
) -> list[list[int]]:
    """Prompts of any kind as tokens, a list for each; see `generate`.

    Args:
        prompts: As `generate` takes them.
        tokenizer: Of the text.
        vocab_size: Tokens the model knows.
        writing: How the model's task writes the numbers of a text.

    Raises:
        ValueError: What `generate` says of prompts.
    """
    if tokenizer is not None and tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the model knows {vocab_size}: "
            "they do not belong together"
        )
    given: Any = prompts.tolist() if isinstance(prompts, Tensor) else prompts
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        given = [given]
    if not given:
        raise ValueError("there is no prompt: give at least one")
    rows: list[list[int]] = []
    for number, prompt in enumerate(given):
        if isinstance(prompt, str):
            if tokenizer is None:
                raise ValueError("a prompt that is text needs a tokenizer; tokens need none")
            prompt = tokenizer.encode(writing.write(_utf8(f"prompt {number}", prompt)))
        try:
            row = [index(token) for token in prompt]
        except TypeError:
            raise ValueError(
                f"prompt {number} is {str(prompt)[:40]}: a prompt is text, or a list of tokens, "
                "which are integers"
            ) from None
        if not row:
            raise ValueError(f"prompt {number} is empty: a model needs a token to start from")
        wrong = [token for token in row if not 0 <= token < vocab_size]
        if wrong:
            raise ValueError(
                f"token {wrong[0]} in prompt {number} is not one of the model's 0 to "
                f"{vocab_size - 1}"
            )
        rows.append(row)
    return rows


def _utf8(name: str, text: str) -> str:
    """A text, or one line where it came from bytes that are not UTF-8, as a shell may give them."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        byte = f"byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"U+{code:04X}"
        raise ValueError(
            f"{name} is not valid UTF-8, {byte} at position {error.start}: give it as UTF-8 text"
        ) from None
    return text


def pad_left(rows: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Rows of different lengths as one batch, so that all end together.

    Returns:
        tokens and documents (batch, time) int64, documents -1 at padding; None where no row needs
        any, since masks can be skipped then.
    """
    longest = max(map(len, rows))
    tokens = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    if (lengths == longest).all():
        return tokens, None
    padding = torch.arange(longest, device=device) < longest - lengths[:, None]
    return tokens, -padding.long()


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


# ---------------------------------------------------------------------------- the command


def generate_command(
    checkpoint: str,
    prompt: list[str],
    max_tokens: int = 100,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop: str | None = None,
    form: Literal["recurrent", "parallel", "chunkwise"] = "recurrent",
    check: bool = False,
    device: str | None = None,
) -> None:
    """Continue a text, and say what a token costs in time and the state in memory.

    One prompt is written as it comes; several are decoded together and written at the end. A task
    that was trained on numbers written least significant digit first gets them so, and what it
    answers is turned back: type and read ordinary numbers.

    Args:
        checkpoint: A run's directory, a .ckpt file, or a directory of archzoo.save_pretrained.
        prompt: One text or several.
        max_tokens: The most that is written for a prompt.
        temperature: Divides the logits before sampling; 0 takes the most likely token.
        top_k: Sample from the k most likely tokens.
        top_p: Sample from the fewest most likely tokens with this total probability.
        seed: Of the sampling. None: a different one every time.
        stop: Text of the one token that ends a text. None: the tokenizer's stop token.
        form: recurrent carries a state; parallel and chunkwise recompute all at every token.
        check: Compare the logits of the recurrent and the parallel form at every token.
        device: Such as cpu or cuda. None: a GPU where there is one.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: The checkpoint cannot be used, a prompt holds what is not in the vocabulary,
            or a number is out of its range.
        FormsDisagree: With check: the forms differ by more than rounding explains.
    """
    from archzoo.checkpoint import load

    model, tokenizer, _ = load(checkpoint, device or "auto")
    if tokenizer is None:
        raise ValueError(f"{checkpoint} holds no tokenizer, so it takes no text")
    stop_token = None
    if stop is not None:
        stop_token = tokenizer.single(_utf8("stop", stop))
        if stop_token is None:
            count = len(tokenizer.encode(stop))
            raise ValueError(f"stop={stop!r} is {count} tokens: it must be exactly one")
    alone = len(prompt) == 1

    def show(row: int, token: int | None, text: str) -> None:
        if row == 0 and not shown:  # only now is it sure that the prompt can be read
            shown.append(prompt[0])
            print(prompt[0], end="")
        print(text, end="\n" if token is None else "", flush=True)

    shown: list[str] = []
    written = generate(
        model,
        prompt,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop_token=stop_token,
        form=form,
        check=check,
        tokenizer=tokenizer,
        on_token=show if alone else None,
    )
    if not alone:
        for begin, text in zip(prompt, written.texts or [], strict=True):
            print(begin + text)
    print(f"\n{report(model, written)}")


def report(model: Decoder, written: Generation) -> str:
    """What the writing cost, in two or three lines."""
    rows = len(written.tokens)
    count = sum(map(len, written.tokens))
    lines = [
        f"{count} token{'s' * (count != 1)}, {written.milliseconds_per_token:.2f} ms per token"
        + (f" for {rows} texts at once" if rows > 1 else "")
        + f", the prompt {written.prompt_milliseconds:.1f} ms"
    ]
    growth = rows * state_growth(model)
    if not written.state_bytes:
        lines.append("no state: all was recomputed at every token")
    elif growth:
        lines.append(f"state {written.state_bytes:,} bytes, {growth:,.0f} more with every token")
    else:
        lines.append(f"state {written.state_bytes:,} bytes, the same at any length")
    if written.largest_difference is not None:
        lines.append(
            f"recurrent and recomputed logits agree to {written.largest_difference:.1e} "
            "(relative root mean square)"
        )
    return "\n".join(lines)


def state_growth(model: Decoder) -> float:
    """Bytes that the state of one text grows by with each token; 0: it is constant."""
    with torch.device("meta"):  # sizes only: nothing is allocated
        short, long = (model.init_state(1, capacity=n, device="meta") for n in (1, 1025))
    return (nbytes(long) - nbytes(short)) / 1024
