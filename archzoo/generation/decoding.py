"""Token by token: from a state that is carried, or by reading the whole text again."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from archzoo.block import FORMS
from archzoo.compiled import uncompiled
from archzoo.decoder import Decoder
from archzoo.generation.conversation import (
    Conversation,
    check_conversation,
    extended,
    prompts_of,
    start_conversation,
    tails,
)
from archzoo.generation.fused import fused_step
from archzoo.generation.prompts import Prompts, encode, pad_left
from archzoo.generation.replay import AHEAD, LEAST, RING, Replay, replays, start_replay
from archzoo.generation.rows import OnToken, RowWriter, StateReader, TextReader
from archzoo.generation.sampling import Sampler, at_least, check_stop
from archzoo.generation.until import check_until
from archzoo.numerics import MODEL_TOLERANCES, for_float64
from archzoo.states import nbytes, reorder
from archzoo.tasks.writing import writing_of

if TYPE_CHECKING:
    from archzoo.tasks.tokenizers import Tokenizer


class FormsDisagree(ArithmeticError):
    """The recurrent and the parallel form gave different logits."""


class Generation(NamedTuple):
    """What `generate` wrote, a row for each prompt.

    Attributes:
        tokens: The new tokens of each row, without the stop token.
        texts: The same as text, what follows the prompt, its numbers as people write them; None
            without a tokenizer.
        stopped: Whether each row ended by the stop token or a string of `until`, and not at
            max_tokens.
        milliseconds_per_token: Wall time of a step, which gives every row a token; the first
            token, which comes with the prompt's pass, is left out. 0 where no other came.
        prompt_milliseconds: Wall time of the prompt's pass.
        state_bytes: Of the state of all rows, each at its end, KV caches with their whole buffers;
            0 in a form that keeps none.
        largest_difference: With check, the largest relative root mean square difference of the
            two forms' logits over all rows and steps; else None.
        conversation: With keep_state, all that continuing takes, a later call or another process.
        capture_milliseconds: Wall time of capturing a step as a graph, and of the step before it,
            which loads the kernels; neither is in milliseconds_per_token. 0 where none was.
    """

    tokens: list[list[int]]
    texts: list[str] | None
    stopped: list[bool]
    milliseconds_per_token: float
    prompt_milliseconds: float
    state_bytes: int
    largest_difference: float | None
    conversation: Conversation | None = None
    capture_milliseconds: float = 0.0


def generate(
    model: Decoder,
    prompts: Prompts | None = None,
    *,
    max_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop_token: int | None = None,
    until: Sequence[str] = (),
    form: Literal["parallel", "chunkwise", "recurrent"] | None = None,
    check: bool = False,
    tokenizer: Tokenizer | None = None,
    on_token: OnToken | None = None,
    conversation: Conversation | None = None,
    keep_state: bool = False,
    graph: bool | None = None,
) -> Generation:
    """Continue prompts, which may differ in length: each gets what it would get alone.

    Text is a person's: where the model's task writes numbers otherwise (`Decoder.task`), such as
    least significant digit first, prompts are put as the task writes them and answers are put
    back. Tokens are the task's own.

    Args:
        model: Any decoder. It works in evaluation mode, and is left in the mode it was in.
        prompts: One text or several (with a tokenizer), or tokens: of one prompt or of several.
            With a conversation an empty one reads nothing, and None is that for every row.
        max_tokens: The most that a row may get.
        temperature: Divides the logits before sampling; 0 takes the most likely token.
        top_k: Sample from the k most likely tokens.
        top_p: Sample from the fewest most likely tokens with this total probability.
        seed: Row r is sampled by seed + r. None: by torch's global generator.
        stop_token: Ends a row. None: the tokenizer's own, where it has one.
        until: Strings that end a row as well: its text is what comes before the first of them. Its
            tokens are all that were written. Needs the tokenizer.
        form: "recurrent" [the default] carries a state from step to step; "parallel" and
            "chunkwise" keep none, and recompute the whole text at every step.
        check: Compare the logits of every step with those of the parallel form (of the recurrent
            form, where form is another).
        tokenizer: Text to tokens and back.
        on_token: Called with each token as it comes, for streaming: see `OnToken`.
        conversation: What was read and written before, a row for each prompt: it is continued,
            and stays as it is. With the same seed a row gets what it would have got without the
            pause, bit for bit. A row that had stopped gets nothing, unless it reads more.
        keep_state: Return a `Conversation` to continue from. All tokens that were written are
            read, too; rows that end stay in the batch, as padding.
        graph: Capture a step as a CUDA graph and replay it, in the recurrent form and without
            check: the tokens are the same, and are handed over some steps later. A model whose
            step cannot be captured is called as ever, and a warning says why. None: on a GPU,
            where no part has hooks. True: on other devices, too, where the step is called
            instead: to test.

    Raises:
        ValueError: An argument out of range, an empty prompt, a token or character that is not in
            the vocabulary, or weights that are not finite.
        FormsDisagree: With check, at the end: the forms differ by more than rounding explains.
    """
    form = form or "recurrent"
    if form not in FORMS:
        raise ValueError(f"form {form!r} is not one of {', '.join(FORMS)}")
    at_least("max_tokens", max_tokens, 1)
    if (conversation is not None or keep_state) and (form != "recurrent" or check):
        raise ValueError(
            "a conversation holds a state and not its text: only the recurrent form continues it, "
            "without check"
        )
    check_until(until, has_tokenizer=tokenizer is not None, keeps_state=keep_state)
    model = uncompiled(model)
    prompts = prompts_of(prompts, conversation)
    writing = writing_of(model.task)
    asked_in_text = isinstance(prompts, str) or any(isinstance(entry, str) for entry in prompts)
    if asked_in_text and model.task is None and getattr(tokenizer, "special", False):
        # A task of problems made the tokenizer.
        warnings.warn(
            "the model does not say what it was trained on, so numbers are taken as they are: "
            "if its task reverses digits, set model.task = task.config() and save it again",
            stacklevel=2,
        )
    rows = encode(prompts, tokenizer, model.vocab_size, writing, continues=conversation is not None)
    if stop_token is None and tokenizer is not None:
        stop_token = tokenizer.stop_token
    check_stop(stop_token, model.vocab_size)
    model.embedding.check_prompts(rows)  # here, where it needs no synchronisation with a device
    before: list[list[int]] = [[] for _ in rows]
    already = [0] * len(rows)  # drawn
    if conversation is not None:
        check_conversation(conversation, model, rows)
        before, already = tails(conversation), conversation.drawn.tolist()
    sampler = Sampler(len(rows), temperature, top_k, top_p, seed, already)
    writers = [
        RowWriter(row, before[row] + prompt, tokenizer, on_token, writing, keep_state, until)
        for row, prompt in enumerate(rows)
    ]
    if conversation is not None:
        for writer, stopped in zip(writers, conversation.stopped.tolist(), strict=True):
            if stopped and not rows[writer.row]:
                writer.stopped = True
                writer.end()

    with model.evaluating(), torch.inference_mode(), model.weights_held():
        going = [row for row, writer in enumerate(writers) if not writer.ended]
        held = going if going and not keep_state else list(range(len(rows)))  # in the batch
        if conversation is not None and len(held) < len(rows):
            conversation = reorder(conversation, torch.tensor(held))
        tokens, documents = pad_left([rows[row] for row in held], model.device)
        capacity = tokens.shape[1] + max_tokens
        reader = _reader(model, form, capacity, conversation)
        other_form = "parallel" if form == "recurrent" else "recurrent"
        reference = _reader(model, other_form, capacity) if check else None
        prompt, asked = (tokens, documents), held
        times: list[float] = []  # of steps, but for those that a capture begins with
        differences: list[float] = []
        capture_time, count = 0.0, 0
        wanted = form == "recurrent" and not check and replays(model, graph)
        plain = False  # of a replay: without fused kernels
        replay: Replay | None = None
        # With keep_state no step may follow one that ends a row.
        ahead = 0 if keep_state and stop_token is not None else AHEAD
        while count < max_tokens and going:
            begin = time.perf_counter()
            left = max_tokens - count
            if wanted and count and len(going) == len(held) and left >= LEAST:
                wanted = False
                assert isinstance(reader, StateReader)  # the recurrent form's
                replay = start_replay(reader, tokens[:, 0], sampler, held, left, ahead, plain)
                capture_time += 1000 * (time.perf_counter() - begin)
                if replay is None:  # the first step failed, and what was read is lost
                    sampler.restart(_draws(already, writers))
                    reader = StateReader(model, capacity, conversation)
                    reader.read(*prompt)
                    places = [asked.index(row) for row in held]
                    reader.keep(torch.tensor(places, device=model.device))
                    wanted, plain = not plain and fused_step(model) is not None, True
                continue
            drawing = going
            if replay is not None:
                drawing, called = held, replay.read == 0
                drawn = replay.next()
            else:
                called = False
                logits = reader.read(tokens, documents)
                if len(going) < len(held):  # those that ended are only there
                    logits = logits[[held.index(row) for row in going]]
                chosen = sampler(logits, going)
                drawn = chosen.tolist()  # waits for the device
            if not called:
                times.append(1000 * (time.perf_counter() - begin))
            count += 1
            if count == 1 and not logits.isfinite().all():
                raise ValueError("the model's logits are not finite: its weights are broken")
            if reference is not None:
                differences.append(difference(logits, reference.read(tokens, documents)))
            for row, new in zip(drawing, drawn, strict=True):
                writers[row].write(new, stop_token)
            kept = [index for index, row in enumerate(drawing) if not writers[row].ended]
            going = [drawing[index] for index in kept]
            if replay is not None:
                padded = keep_state and 0 < len(going) < len(held)
                if not padded and (not replay.ended or count == max_tokens):
                    if 2 * len(going) <= len(held) and max_tokens - count >= RING:
                        replay.stop()  # and another one continues with fewer rows
                    continue
                assert isinstance(reader, StateReader)
                replay.leave(reader, spare=max_tokens - count + 1)
                sampler.restart(_draws(already, writers))
                chosen, wanted = replay.tokens[:, 0], replay.reason is None
                replay = None
            tokens, documents = chosen[:, None], None
            if keep_state and len(going) < len(held):  # rows that have ended are padded
                places = [held.index(row) for row in going]
                chosen, tokens = tokens[kept], tokens.new_zeros((len(held), 1))
                documents = torch.full_like(tokens, -1)
                tokens[places], documents[places] = chosen, 0
            elif 0 < len(going) < len(held):  # rows that have ended are dropped from the batch
                indices = torch.tensor(kept, device=tokens.device)
                tokens, held = tokens[indices], going
                for each in (reader, reference):
                    if each is not None:
                        each.keep(indices)
        state_bytes = 0
        if isinstance(reader, StateReader):
            held_bytes = replay.state_bytes if replay is not None else nbytes(reader.state)
            state_bytes = reader.ended_bytes + held_bytes
            if replay is not None:  # no token is left, or no row
                replay.leave(reader)
                tokens, documents = replay.tokens, None
        if keep_state and going:
            reader.read(tokens, documents)  # what was written last
        for writer in writers:
            writer.end()

    kept_conversation = None
    if keep_state and isinstance(reader, StateReader):
        begun = conversation or start_conversation(model.init_state(len(rows)), model)
        written = [prompt + writer.tokens for prompt, writer in zip(rows, writers, strict=True)]
        kept_conversation = extended(begun, written)._replace(
            state=model.copy_state(reader.state or {}),
            logits=None if reader.logits is None else reader.logits.clone(),
            drawn=begun.drawn + torch.tensor([w.draws for w in writers], device=model.device),
            stopped=torch.tensor([writer.stopped for writer in writers], device=model.device),
        )
    if differences:
        _judge(differences, logits.dtype)
    return Generation(
        tokens=[writer.tokens for writer in writers],
        texts=None if tokenizer is None else [writer.text for writer in writers],
        stopped=[writer.stopped for writer in writers],
        milliseconds_per_token=sum(times[1:]) / max(len(times) - 1, 1),
        prompt_milliseconds=sum(times[:1]),
        state_bytes=state_bytes,
        largest_difference=max(differences) if differences else None,
        conversation=kept_conversation,
        capture_milliseconds=capture_time,
    )


def _draws(already: list[int], writers: list[RowWriter]) -> list[int]:
    """Tokens that each row has drawn."""
    return [count + writer.draws for count, writer in zip(already, writers, strict=True)]


def _reader(
    model: Decoder, form: str, capacity: int, conversation: Conversation | None = None
) -> StateReader | TextReader:
    if form == "recurrent":
        return StateReader(model, capacity, conversation)
    return TextReader(model, form)


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
