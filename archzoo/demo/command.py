"""`archzoo demo`: recurrent decoding, shown."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

CONFIG = "configs/demo.yaml"
ARMS = ("retnet", "transformer")
RUNS = tuple(f"runs/demo_{arm}" for arm in ARMS)  # where fit puts the arms of the configuration


def demo_command(
    checkpoint: str | None = None,
    other: str | None = None,
    /,
    train: bool = False,
    web: bool = False,
    host: str = "127.0.0.1",
    port: int = 7860,
    prompt: str = "ROMEO:",
    max_tokens: int = 250,
    temperature: float = 0.8,
    top_k: int | None = None,
    seed: int = 0,
    device: str | None = None,
) -> int:
    """Show two models side by side as they continue one prompt, a token in turn.

    Of each it shows the text, the time of a token and the bytes of its state: retention's is as
    large after a thousand tokens as after one, attention's grows with every token. Without a
    checkpoint it shows the models that `archzoo demo --train` trains.

    Args:
        checkpoint: A run's directory, a .ckpt file, or a directory of archzoo.save_pretrained.
            None: runs/demo_retnet, and runs/demo_transformer as the other.
        other: A second one, to compare with.
        train: Train the demo's own models first, on a CPU in some minutes; what was interrupted
            is continued.
        web: As a page for a browser, which shows more: what each head still holds of the text,
            state and time at any context length, and the three forms. It needs gradio.
        host: Address that the page is served at. This machine alone can reach 127.0.0.1; whoever
            reaches another, such as 0.0.0.0, can use the page.
        port: Of that address; 0: any that is free.
        prompt: The text that is continued, at most 2,000 characters.
        max_tokens: The most that each model writes.
        temperature: Divides the logits before sampling; 0 takes the most likely token.
        top_k: Sample from the k most likely tokens.
        seed: Of the sampling, the same for every model.
        device: Such as cpu or cuda. None: a GPU where there is one.

    Raises:
        FileNotFoundError: The checkpoint does not exist, or none was trained yet.
        ValueError: A checkpoint cannot decode text step by step, the prompt is empty, too long or
            holds what is not in a vocabulary, or a number is out of its range.
    """
    if train:  # before torch is imported: threads that wait by spinning slow small steps
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from archzoo.demo.decoding import check_request, decode, load_sides
    from archzoo.demo.terminal import show

    check_request(prompt, max_tokens, seed)  # before minutes of training
    if web:  # before minutes of training too
        from archzoo.demo.web import free_port, import_gradio, serve

        import_gradio()
        port = free_port(host, port)
    if train:
        if checkpoint is not None:
            raise ValueError(
                f"--train makes the demo's own models, {' and '.join(RUNS)}: it takes no "
                f"checkpoint, such as {checkpoint}"
            )
        if status := train_models():
            return status
    checkpoints = [path for path in (checkpoint, other) if path is not None] or trained_models()
    sides = load_sides(checkpoints, device or "auto")
    how: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature}
    how |= {"top_k": top_k, "seed": seed}
    events = decode(sides, prompt, **how)
    if web:
        serve(sides, host=host, port=port, prompt=prompt, **how)
    else:
        show(sides, prompt, events)
    return 0


def trained_models() -> list[str]:
    """The checkpoints of the demo's own models.

    Raises:
        FileNotFoundError: One is missing; the message has the command that trains it.
    """
    missing = [run for run in RUNS if not Path(run, "last.ckpt").is_file()]
    if missing:
        raise FileNotFoundError(
            f"there is no {' and no '.join(missing)} yet: `archzoo demo --train` trains the demo's "
            "models, in some minutes on a CPU; or name one or two checkpoints"
        )
    return list(RUNS)


def train_models() -> int:
    """Train every arm of the demo's configuration, as `archzoo fit` does; the exit status."""
    from archzoo.training.command import run
    from archzoo.training.ending import SIGNALS

    with SIGNALS:
        for arm in ARMS:
            # The package's configuration, where it is not here.
            arguments = [CONFIG, "--arm", arm, "--resume", "auto"]
            if status := run("fit", arguments):
                return status
    return 0
