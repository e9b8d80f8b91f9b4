"""`archzoo generate`: a text that is continued, and what a token costs."""

from __future__ import annotations

from typing import Literal

import torch

from archzoo.decoder import Decoder
from archzoo.generation.decoding import Generation, generate
from archzoo.generation.prompts import utf8
from archzoo.generation.state_files import StateLayout, read_state, write_state
from archzoo.states import nbytes


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
    state: str | None = None,
    save_state: str | None = None,
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
        state: A file of --save_state or of `archzoo read` to continue from: each prompt is read
            after the text that is in it, and '' reads nothing more.
        save_state: Write the state at the end to this file, to be continued later.
        device: Such as cpu or cuda. None: a GPU where there is one.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: The checkpoint or the state cannot be used, a prompt holds what is not in the
            vocabulary, or a number is out of its range.
        OSError: The state cannot be written.
        FormsDisagree: With check: the forms differ by more than rounding explains.
    """
    from archzoo.checkpoint import load

    model, tokenizer, _ = load(checkpoint, device or "auto")
    if tokenizer is None:
        raise ValueError(f"{checkpoint} holds no tokenizer, so it takes no text")
    stop_token = None
    if stop is not None:
        stop_token = tokenizer.single(utf8("stop", stop))
        if stop_token is None:
            count = len(tokenizer.encode(stop))
            raise ValueError(f"stop={stop!r} is {count} tokens: it must be exactly one")
    layout = StateLayout(model)
    held = None if state is None else read_state(state, layout)[0]
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
    )
    if not alone:
        for begin, text in zip(prompt, written.texts or [], strict=True):
            print(begin + text)
    print(f"\n{report(model, written)}")
    if save_state is not None and written.conversation is not None:
        write_state(save_state, written.conversation, layout)
        read = ", ".join(f"{count:,}" for count in written.conversation.read.tolist())
        print(f"{save_state}: the state after {read} tokens; --state {save_state} continues it")


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
