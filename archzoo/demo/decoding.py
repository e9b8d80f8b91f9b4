"""What a demo shows, as data: tokens with their time and the state's size, model by model."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from archzoo.block import FORMS
from archzoo.checkpoint import check_tokenizer, load
from archzoo.decoder import Decoder
from archzoo.generation import Sampler, difference, encode, generate
from archzoo.numerics import MODEL_TOLERANCES
from archzoo.states import State, nbytes
from archzoo.tasks.writing import writing_of

if TYPE_CHECKING:
    from archzoo.tasks.tokenizers import Tokenizer

PROMPT_LIMIT = 2_000  # characters: a demo reads a prompt, not a book
TOKEN_LIMIT = 20_000  # new tokens
RECENT = 9  # tokens whose median time is that of the last one: a busy machine makes spikes
SLICE = 512  # tokens that are read at once where a text is long


class Side(NamedTuple):
    """One of the models that are shown.

    Attributes:
        name: What it is called.
        model: In evaluation mode.
        tokenizer: Of its text.
    """

    name: str
    model: Decoder
    tokenizer: Tokenizer

    @property
    def mixers(self) -> str:
        """Class names of its mixers, such as Retention."""
        return " + ".join(dict.fromkeys(type(block.mixer).__name__ for block in self.model.blocks))

    @property
    def about(self) -> str:
        """Its mixers and its parameters."""
        return f"{self.mixers}, {self.model.parameter_count():,} parameters"


class Event(NamedTuple):
    """A token of one model, or its end.

    Attributes:
        side: Which of the models.
        token: None: the model has ended, and what follows of its text is certain.
        text: What is now certain of the text, after what came before.
        milliseconds: Wall time of the step that gave the token; for the first, of the prompt's
            pass. 0 at the end.
        state_bytes: Of the state that holds all tokens read so far.
        context: How many tokens that is.
    """

    side: int
    token: int | None
    text: str
    milliseconds: float
    state_bytes: int
    context: int


class History:
    """What was heard of one model.

    Attributes:
        chunks: What it wrote, token by token; some may be empty.
        tokens: How many tokens.
        prompt_milliseconds: Of the prompt's pass, which gives the first token.
        milliseconds: Of each token after the first.
        medians: Of each and up to eight before it, which is what is drawn.
        state_bytes: After each token.
        contexts: Tokens in the state after each token.
        ended: Whether nothing more comes.
    """

    def __init__(self) -> None:
        self.chunks: list[str] = []
        self.tokens = 0
        self.prompt_milliseconds = 0.0
        self.milliseconds: list[float] = []
        self.medians: list[float] = []
        self.state_bytes: list[int] = []
        self.contexts: list[int] = []
        self.ended = False

    def add(self, event: Event) -> None:
        """Take an event of this model."""
        self.chunks.append(event.text)
        if event.token is None:
            self.ended = True
            return
        if self.tokens:
            self.milliseconds.append(event.milliseconds)
            self.medians.append(statistics.median(self.milliseconds[-RECENT:]))
        else:
            self.prompt_milliseconds = event.milliseconds
        self.tokens += 1
        self.state_bytes.append(event.state_bytes)
        self.contexts.append(event.context)

    @property
    def text(self) -> str:
        """All of what it wrote."""
        return "".join(self.chunks)

    @property
    def grew(self) -> bool:
        """Whether the state did."""
        return bool(self.state_bytes) and self.state_bytes[-1] > self.state_bytes[0]


# ---------------------------------------------------------------------------- models


def load_sides(checkpoints: Sequence[str], device: str | None = None) -> list[Side]:
    """The models of some checkpoints, each able to decode text step by step.

    Args:
        checkpoints: As `archzoo.from_pretrained` takes them.
        device: Such as cpu or cuda; "auto": a GPU where there is one. None: the CPU.

    Raises:
        FileNotFoundError: The checkpoint does not exist.
        ValueError: One cannot be used, takes no text, or has no recurrent form.
    """
    sides = []
    for path, name in zip(checkpoints, _names(checkpoints), strict=True):
        found = load(path, device)
        sides.append(Side(name, found.model, check_tokenizer(found.tokenizer, path)))
        check_recurrent(found.model, path)
    return sides


def check_recurrent(model: Decoder, name: str) -> None:
    """Refuse a model that cannot decode from a state.

    Raises:
        ValueError: One of its parts cannot step.
    """
    try:
        with torch.inference_mode():
            state = model.init_state(1, capacity=1)
            model(torch.zeros(1, 1, dtype=torch.long, device=model.device), state, form="recurrent")
    except NotImplementedError as error:
        raise ValueError(
            f"{name} has no recurrent form, so it has no state to show: {error}"
        ) from error


def note_on_tokenizers(sides: Sequence[Side]) -> str | None:
    """A line where the models' tokens are not the same; else None."""
    if len({side.tokenizer.fingerprint() for side in sides}) < 2:
        return None
    sizes = " and ".join(f"{side.tokenizer.vocab_size:,}" for side in sides)
    return f"the tokenizers differ ({sizes} tokens): a token is not the same amount of text"


def _names(checkpoints: Sequence[str]) -> list[str]:
    """The runs' or directories' names, or the paths where those are the same."""
    paths = [Path(path) for path in checkpoints]
    short = [(path.parent if path.suffix == ".ckpt" else path).resolve().name for path in paths]
    return short if len(set(short)) == len(short) else [str(path) for path in paths]


# ---------------------------------------------------------------------------- decoding


def decode(
    sides: Sequence[Side],
    prompt: str,
    *,
    max_tokens: int = 250,
    temperature: float = 0.8,
    top_k: int | None = None,
    seed: int = 0,
) -> Iterator[Event]:
    """Continue a prompt with every model, each from a state of its own, a token in turn.

    Args:
        sides: The models.
        prompt: The text that all continue.
        max_tokens: The most that each writes.
        temperature: Divides the logits before sampling; 0 takes the most likely token.
        top_k: Sample from the k most likely tokens.
        seed: Of the sampling, the same for every model.

    Raises:
        ValueError: The prompt is empty, too long, or holds what a model cannot read; a number is
            out of its range; or weights are not finite. All but the last come at once, before the
            first event is asked for.
    """
    check_request(prompt, max_tokens, seed)
    texts = [
        _Text(number, side, prompt, max_tokens, Sampler(1, temperature, top_k, None, seed))
        for number, side in enumerate(sides)
    ]
    return _in_turn(texts)


def check_request(prompt: str, max_tokens: int, seed: int = 0) -> None:
    """Refuse what a demo cannot be asked, before anything is computed.

    Args:
        prompt: The text that is continued.
        max_tokens: The most that is written.
        seed: Of the sampling.

    Raises:
        ValueError: The prompt is empty, something is more than a demo reads or writes, or the
            seed is none.
    """
    if not prompt:
        raise ValueError("the prompt is empty: a model needs a token to start from")
    if len(prompt) > PROMPT_LIMIT:
        raise ValueError(
            f"the prompt has {len(prompt):,} characters: the demo takes at most {PROMPT_LIMIT:,}"
        )
    if not 1 <= max_tokens <= TOKEN_LIMIT:
        raise ValueError(f"max_tokens={max_tokens} must lie in 1 .. {TOKEN_LIMIT:,}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed={seed} must lie in 0 .. {2**63 - 1}")


def _in_turn(texts: list[_Text]) -> Iterator[Event]:
    with ExitStack() as stack:
        for text in texts:
            stack.enter_context(_for_decoding(text.model))
            _warm_up(text.model)
        going = texts
        while going:
            for text in going:
                yield from text.step()
            going = [text for text in going if not text.ended]


@contextmanager
def _for_decoding(model: Decoder) -> Iterator[None]:
    """Evaluation mode, adapted weights computed once."""
    with model.evaluating(), model.weights_held():
        yield


@torch.inference_mode()
def _warm_up(model: Decoder) -> None:
    """Some steps that no one sees: the first ones of a process take several times as long."""
    state = model.init_state(1, capacity=4)
    for _ in range(4):
        tokens = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        state = model(tokens, state, form="recurrent").state


class _Text:
    """A prompt that one model continues.

    Gradients are switched off in every step and not around all of them: who asks for the events
    may do other things between two, or ask in another thread.
    """

    def __init__(
        self, number: int, side: Side, prompt: str, max_tokens: int, sampler: Sampler
    ) -> None:
        from archzoo.tasks.tokenizers import StreamDecoder

        self.number, self.model, self.tokenizer = number, side.model, side.tokenizer
        self.max_tokens, self.sampler = max_tokens, sampler
        writing = writing_of(side.model.task)
        [self.tokens] = encode(prompt, side.tokenizer, side.model.vocab_size, writing)
        side.model.embedding.check_prompts([self.tokens])
        self.capacity = len(self.tokens) + max_tokens
        self.size = _StateSize(side.model, self.capacity)
        self.state: State | None = None
        self.context = self.written = 0
        self.ended = False
        self.decoder = StreamDecoder(side.tokenizer)
        for token in self.tokens[-16:]:  # a character may begin in the prompt
            self.decoder.push(token)
        self.reader = writing.reader(side.tokenizer.decode(self.tokens))

    def step(self) -> Iterator[Event]:
        """The next token, or the end, or both."""
        begin = time.perf_counter()
        token = self._next()
        milliseconds = 1000 * (time.perf_counter() - begin)
        size = self.size(self.state, self.context)
        if token != self.tokenizer.stop_token:
            self.written += 1
            self.tokens = [token]
            text = self.reader.push(self.decoder.push(token))
            yield Event(self.number, token, text, milliseconds, size, self.context)
            if self.written < self.max_tokens:
                return
        self.ended = True
        rest = self.reader.push(self.decoder.finish()) + self.reader.finish()
        yield Event(self.number, None, rest, 0.0, size, self.context)

    @torch.inference_mode()
    def _next(self) -> int:
        model = self.model
        tokens = torch.tensor([self.tokens], device=model.device)
        form: str | None = "recurrent"
        positions = None
        if self.state is None:  # the prompt, in one pass
            self.state = model.init_state(1, capacity=self.capacity)
            form, positions = None, model.embedding.prompt_positions(tokens, None)
        output = model(tokens, self.state, form=form, logits_to_keep=1, positions=positions)
        if not self.context and not output.logits.isfinite().all():
            raise ValueError("the model's logits are not finite: its weights are broken")
        self.state = output.state
        self.context += len(self.tokens)
        return int(self.sampler(output.logits[:, 0]))  # waits for the device


class _StateSize:
    """Bytes of a text's state; of buffers that are there beforehand, what is in use.

    Args:
        model: Whose state.
        capacity: Tokens that its buffers were allocated for.
    """

    def __init__(self, model: Decoder, capacity: int) -> None:
        self.model, self.capacity = model, capacity
        self.whole = state_size(model, capacity)
        self.grows = state_size(model, 1) != state_size(model, 2)

    def __call__(self, state: State | None, tokens: int) -> int:
        held = nbytes(state)
        if not self.grows:
            return held
        beside = held - self.whole  # positions, where a bias needs them: as long as the buffers
        return state_size(self.model, tokens) + beside * tokens // self.capacity


def state_size(model: Decoder, tokens: int) -> int:
    """Bytes of the state of one text of so many tokens; nothing is allocated."""
    with torch.device("meta"):
        return nbytes(model.init_state(1, capacity=tokens, device="meta"))


# ---------------------------------------------------------------------------- in words and lines


def summary(sides: Sequence[Side], histories: Sequence[History]) -> list[str]:
    """What the decoding showed, in words: how each state grows, and where they cross."""
    lines = []
    for side, history in zip(sides, histories, strict=True):
        if not history.state_bytes:
            continue
        last, tokens = history.state_bytes[-1], history.contexts[-1] - history.contexts[0]
        how = "the same at every token"
        if history.grew:
            a_token = (last - history.state_bytes[0]) / tokens
            how = f"{a_token:,.0f} more with every token"
        lines.append(
            f"{side.name}: {history.tokens} tokens, state {last:,} bytes, {how}; the prompt took "
            f"{history.prompt_milliseconds:.1f} ms"
        )
    crossing = _crossing(histories)
    if crossing is not None:
        larger, context = crossing
        lines.append(
            f"{sides[larger].name}'s state is the larger one from {context:,} tokens on, those of "
            "the prompt counted"
        )
    longer: dict[int, list[str]] = {}  # names by the length that they were trained on
    for side, history in zip(sides, histories, strict=True):
        trained = side.model.context_length
        if trained is not None and history.contexts and history.contexts[-1] > trained:
            longer.setdefault(trained, []).append(side.name)
    lines += [
        f"{' and '.join(names)}: trained on texts of at most {trained:,} tokens; this is longer"
        for trained, names in longer.items()
    ]
    note = note_on_tokenizers(sides)
    return lines if note is None else [*lines, note]


def _crossing(histories: Sequence[History]) -> tuple[int, int] | None:
    """Which model's state outgrew the other's, that stays, and after how many tokens."""
    growing = [number for number, history in enumerate(histories) if history.grew]
    constant = [
        number
        for number, history in enumerate(histories)
        if history.state_bytes and not history.grew
    ]
    if len(growing) != 1 or len(constant) != 1:
        return None
    limit = histories[constant[0]].state_bytes[-1]
    grown = histories[growing[0]]
    for context, size in zip(grown.contexts, grown.state_bytes, strict=True):
        if size > limit:
            return growing[0], context
    return None


def condensed(values: Sequence[float], width: int) -> list[float]:
    """Values in at most `width` columns, each the median of what it stands for."""
    if len(values) <= width:
        return list(values)
    edges = [column * len(values) // width for column in range(width + 1)]
    return [statistics.median(values[begin:end]) for begin, end in itertools.pairwise(edges)]


# ---------------------------------------------------------------------------- long contexts


class AtContext(NamedTuple):
    """What a token costs after so many others.

    Attributes:
        context: Tokens read before.
        state_bytes: Of the state then.
        milliseconds: The median time of a step from there.
    """

    context: int
    state_bytes: int
    milliseconds: float


def at_contexts(side: Side, contexts: Iterable[int], *, steps: int = 16) -> Iterator[AtContext]:
    """State and time of a token at several lengths of text, read once, slice by slice.

    Which tokens are read changes neither, so they are random.

    Args:
        side: The model.
        contexts: Lengths, ascending, each at least `steps` above the one before.
        steps: Tokens that are timed at each.

    Raises:
        ValueError: A length is not one, or the model cannot read as far.
    """
    model, wanted = side.model, list(contexts)
    for before, after in zip([0, *wanted], wanted, strict=False):
        if after < before + (steps if before else 1):
            raise ValueError(
                f"contexts={wanted} must ascend, from 1, by {steps} or more from one to the next"
            )
    capacity = max(wanted, default=0) + steps
    size = _StateSize(model, capacity)
    generator = torch.Generator().manual_seed(0)

    def some(count: int) -> Tensor:
        drawn = torch.randint(model.vocab_size, (1, count), generator=generator)
        return drawn.to(model.device)

    with _for_decoding(model):
        state, read = None, 0
        for context in wanted:
            times = []
            with torch.inference_mode():
                state = state or model.init_state(1, capacity=capacity)
                while read < context:
                    count = min(SLICE, context - read)
                    state = model(some(count), state, logits_to_keep=1).state
                    read += count
                taken = size(state, read)
                for _ in range(steps):
                    token = some(1)
                    begin = time.perf_counter()
                    output = model(token, state, form="recurrent")
                    output.logits.argmax().item()  # waits for the device
                    times.append(1000 * (time.perf_counter() - begin))
                    state = output.state
                    read += 1
            yield AtContext(context, taken, statistics.median(times))


# ---------------------------------------------------------------------------- three forms


class FormsCompared(NamedTuple):
    """What the three forms of one model give.

    Attributes:
        texts: By the form's name, what it wrote after the prompt.
        same: Whether all wrote the same, and their logits differ by rounding alone.
        largest: The largest difference of a logit, over all forms and positions of the text.
        relative: The largest relative root mean square difference of a position's logits.
        allowed: What rounding explains of `relative`.
    """

    texts: dict[str, str]
    same: bool
    largest: float
    relative: float
    allowed: float


def compare_forms(
    side: Side,
    prompt: str,
    *,
    max_tokens: int = 60,
    temperature: float = 0.0,
    seed: int = 0,
) -> FormsCompared:
    """Continue a prompt in the parallel, the chunkwise and the recurrent form, and compare.

    Args:
        side: The model.
        prompt: The text that is continued.
        max_tokens: The most that each form writes.
        temperature: Divides the logits before sampling; 0 takes the most likely token.
        seed: Of the sampling, the same for every form.

    Raises:
        ValueError: As `decode` says.
    """
    check_request(prompt, max_tokens, seed)
    model = side.model
    how: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    how["tokenizer"] = side.tokenizer
    found = {form: generate(model, prompt, **how | {"form": form}) for form in FORMS}
    writing = writing_of(model.task)
    [tokens] = encode(prompt, side.tokenizer, model.vocab_size, writing)
    written = found["recurrent"].tokens[0]
    text = torch.tensor([[*tokens, *written]], device=model.device)
    with _for_decoding(model), torch.inference_mode():
        positions = model.embedding.prompt_positions(text[:, : len(tokens)], None)
        if positions is not None:  # and what was written counts on
            more = torch.arange(1, len(written) + 1, device=model.device)
            positions = torch.cat([positions, positions[:, -1:] + more], dim=1)
        logits = {}
        for form in FORMS:
            state = model.init_state(1, capacity=text.shape[1]) if form == "recurrent" else None
            logits[form] = model(text, state, form=form, positions=positions).logits[0].cpu()
    reference = logits["recurrent"]
    others = [logits[form] for form in FORMS if form != "recurrent"]
    relative = max(difference(other, reference) for other in others)
    allowed = MODEL_TOLERANCES[model.dtype]
    texts = {form: (found[form].texts or [""])[0] for form in FORMS}
    return FormsCompared(
        texts=texts,
        same=len(set(texts.values())) == 1 and relative <= allowed,
        largest=max(float((other.double() - reference.double()).abs().max()) for other in others),
        relative=relative,
        allowed=allowed,
    )
