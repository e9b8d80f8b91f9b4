"""`archzoo generate`: a text that is continued, and what a token costs."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any, Literal

import torch

from archzoo.decoder import Decoder
from archzoo.generation.beams import beam_search
from archzoo.generation.chat import chat as converse
from archzoo.generation.conversation import Conversation
from archzoo.generation.decoding import Generation, generate
from archzoo.generation.prompts import encode, utf8
from archzoo.generation.rows import read_tokens
from archzoo.generation.state_files import StateLayout, read_state, write_state
from archzoo.states import nbytes
from archzoo.tasks.writing import writing_of


def generate_command(
    checkpoint: str,
    prompt: list[str] | None = None,
    /,
    chat: bool = False,
    max_tokens: int = 100,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop: str | None = None,
    form: Literal["recurrent", "parallel", "chunkwise"] = "recurrent",
    check: bool = False,
    beams: int = 1,
    length_power: float = 1.0,
    state: str | None = None,
    save_state: str | None = None,
    adapter: list[str] | None = None,
    base: str | None = None,
    device: str | None = None,
    graph: bool | None = None,
) -> None:
    """Continue a text, and say what a token costs in time and the state in memory.

    One prompt is written as it comes; several are decoded together and written at the end. A task
    that was trained on numbers written least significant digit first gets them so, and what it
    answers is turned back: type and read ordinary numbers.

    Args:
        checkpoint: A run's directory, a .ckpt file, or a directory of archzoo.save_pretrained or
            archzoo.save_adapter.
        prompt: One text or several.
        chat: Read lines instead, from the terminal or a pipe, and continue each: the state is
            carried from one to the next, and --save_state keeps it at the end.
        max_tokens: The most that is written for a prompt.
        temperature: Divides the logits before sampling; 0 takes the most likely token.
        top_k: Sample from the k most likely tokens.
        top_p: Sample from the fewest most likely tokens with this total probability.
        seed: Of the sampling. None: a different one every time.
        stop: Text of the one token that ends a text. None: the tokenizer's stop token.
        form: recurrent carries a state; parallel and chunkwise recompute all at every token.
        check: Compare the logits of the recurrent and the parallel form at every token.
        beams: Texts that are followed at once for each prompt: the most probable is written.
        length_power: With beams, texts are ranked by their log-probability over their length to
            this power: 0 prefers short ones, 1 takes the mean of a token.
        state: A file of --save_state or of `archzoo read` to continue from: each prompt is read
            after the text that is in it, and '' reads nothing more.
        save_state: Write the state at the end to this file, to be continued later.
        adapter: A directory of archzoo.save_adapter, which is put on the checkpoint; given several
            times, several are, and what they change adds up.
        base: Where the base of an adapted checkpoint lies. None: where it was.
        device: Such as cpu or cuda. None: a GPU where there is one.
        graph: Replay a step that is captured as a CUDA graph: the same text, sooner. None: on a
            GPU, without --check and in the recurrent form.

    Raises:
        FileNotFoundError: The checkpoint does not exist.
        ValueError: The checkpoint or the state cannot be used, a prompt holds what is not in the
            vocabulary, or a number is out of its range.
        OSError: The state cannot be written.
        FormsDisagree: With check: the forms differ by more than rounding explains.
    """
    from archzoo.checkpoint import check_tokenizer, load, load_adapter
    from archzoo.checkpoint.loading import device_of

    _check_asked(prompt, chat, beams, form, check)
    if graph:
        _check_graph(device_of(device or "auto"), beams, form, check)
    model, tokenizer, _ = load(checkpoint, device or "auto", base)
    given = Counter(map(os.path.realpath, adapter or ()))
    if os.path.exists(os.path.join(checkpoint, "adapter.json")):
        given[os.path.realpath(checkpoint)] += 1
    for number, directory in enumerate(adapter or ()):
        if given[os.path.realpath(directory)] > 1:
            raise ValueError(
                f"the adapter {directory} is given twice: what it changes would be doubled; give "
                "it once"
            )
        name = f"adapter{number}" if len(given) > 1 else None  # of namesakes, too
        load_adapter(directory, model, name)
    tokenizer = check_tokenizer(tokenizer, checkpoint)
    stop_token = None
    if stop is not None:
        stop_token = tokenizer.single(utf8("stop", stop))
        if stop_token is None:
            count = len(tokenizer.encode(stop))
            raise ValueError(f"stop={stop!r} is {count} tokens: it must be exactly one")
    layout = StateLayout(model)
    held = None if state is None else read_state(state, layout)[0]
    if chat:
        options: dict[str, Any] = {
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "seed": seed,
        }
        options |= {"max_tokens": max_tokens, "stop_token": stop_token, "graph": graph}
        left = converse(model, tokenizer, conversation=held, **options)
        if save_state is not None and left is not None:
            _save(save_state, left, layout)
        return
    prompt = prompt or []
    if beams != 1:
        if temperature or top_k is not None or top_p is not None:
            raise ValueError(
                f"beams={beams} takes the most probable texts and draws none: leave temperature, "
                "top_k and top_p unset, or beams"
            )
        if form != "recurrent" or check:
            raise ValueError(f"beams={beams} is for the recurrent form, without check")
        found = beam_search(
            model,
            prompt,
            beams=beams,
            max_tokens=max_tokens,
            length_power=length_power,
            stop_token=stop_token,
            tokenizer=tokenizer,
            conversation=held,
        )
        for begin, texts in zip(prompt, found.texts or [], strict=True):
            print(begin + texts[0])
        scores = ", ".join(f"{of_prompt[0]:.3f}" for of_prompt in found.scores)
        print(
            f"\n{beams} beams, score {scores}: {found.milliseconds_per_token:.2f} ms per token, "
            f"the prompt {found.prompt_milliseconds:.1f} ms, state {found.state_bytes:,} bytes"
        )
        if save_state is not None:
            writing = writing_of(model.task)
            continues = held is not None
            asked = encode(prompt, tokenizer, model.vocab_size, writing, continues=continues)
            best = [a + of_prompt[0] for a, of_prompt in zip(asked, found.tokens, strict=True)]
            _save(save_state, read_tokens(model, best, held), layout)
        return
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
        conversation=held,
        keep_state=save_state is not None,
        graph=graph,
    )
    if not alone:
        for begin, text in zip(prompt, written.texts or [], strict=True):
            print(begin + text)
    print(f"\n{report(model, written)}")
    if save_state is not None and written.conversation is not None:
        _save(save_state, written.conversation, layout)


def _check_asked(prompt: list[str] | None, chat: bool, beams: int, form: str, check: bool) -> None:
    """Refuse a call that asks nothing, or a conversation that cannot be held."""
    if chat and prompt:
        raise ValueError("--chat reads its lines from the terminal: leave the prompt out")
    if chat and (beams != 1 or check or form != "recurrent"):
        raise ValueError("--chat carries a state: leave out --beams, --check and --form")
    if not chat and not prompt:
        raise ValueError("there is no prompt: give a text, or --chat")


def _check_graph(device: torch.device, beams: int, form: str, check: bool) -> None:
    """Refuse to replay a graph where none would be captured."""
    if beams != 1 or check or form != "recurrent":
        raise ValueError("--graph replays a step: omit it, or --beams, --check and --form")
    if device.type != "cuda":
        raise ValueError(f"--graph needs an NVIDIA GPU, and the device is {device}: omit it")


def _save(path: str, conversation: Conversation, layout: StateLayout) -> None:
    write_state(path, conversation, layout)
    read = ", ".join(f"{count:,}" for count in conversation.read.tolist())
    print(f"{path}: the state after {read} tokens; --state {path} continues it")


def report(model: Decoder, written: Generation) -> str:
    """What the writing cost, in two or three lines."""
    rows = len(written.tokens)
    count = sum(map(len, written.tokens))
    lines = [
        f"{count} token{'s' * (count != 1)}, {written.milliseconds_per_token:.2f} ms per token"
        + (f" for {rows} texts at once" if rows > 1 else "")
        + f", the prompt {written.prompt_milliseconds:.1f} ms"
    ]
    if written.capture_milliseconds:
        lines[0] += f", the graph {written.capture_milliseconds:.1f} ms"
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
