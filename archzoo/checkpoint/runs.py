"""Lightning's checkpoints, which are for resuming a run: read without running code."""

from __future__ import annotations

import os
from inspect import signature
from pathlib import Path
from typing import Any

from archzoo.checkpoint.archives import Archive, Stored
from archzoo.checkpoint.building import Pretrained, build_with, expected_of
from archzoo.checkpoint.checks import check_settings, check_sizes, check_task, text_or_none
from archzoo.checkpoint.digest import DIGEST, check_digest, weights_digest
from archzoo.checkpoint.vocabulary import run_tokenizer
from archzoo.compiled import own_name
from archzoo.decoder import Decoder

LAST = "last.ckpt"  # of a run's directory
# Arguments of `Decoder` that older checkpoints do not hold.
ADDED = {"loops", "injection", "linear", "adapter", "adapters", "convolution"}


def read_run(path: Path, changes: dict[str, Any]) -> Pretrained:
    """What a run's checkpoint holds for use; `changes` are of its decoder."""
    with Archive(path) as archive:
        content = archive.content
        config, held = check_run(content, path)
        tokenizer = run_tokenizer(archive, path)
        sources = {name: name for name in held}
        model = build_with(
            config | changes,
            held,
            lambda name: archive.tensor(held[name]),
            sources,
            path,
            content.get(DIGEST),
        )
        model.base = text_or_none(content.get("base"))
    return Pretrained(model, tokenizer, content.get("task"))


def _decoder_weights(content: dict[str, Any]) -> dict[str, Any]:
    """The decoder's tensors in a run's checkpoint, by their own names."""
    named = {own_name(n): held for n, held in content["state_dict"].items() if isinstance(n, str)}
    return {
        name.removeprefix("decoder."): tensor
        for name, tensor in named.items()
        if name.startswith("decoder.")
    }


def sign(content: dict[str, Any]) -> None:
    """Put the digest of the decoder's weights into a run's checkpoint that is to be written."""
    if _is_run(content):
        content[DIGEST] = weights_digest(_decoder_weights(content))


def read_safely(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a checkpoint of torch holds, if that is plain data and tensors; code is refused.

    A run's checkpoint is held to what its own settings say, before its tensors are read, and to
    its digest.

    Raises:
        ValueError: The file is truncated, not a checkpoint, a pickle that would run code, or one
            whose settings do not fit its weights.
    """
    with Archive(path) as archive:
        content = archive.content
        if not isinstance(content, dict):
            kind = type(content).__name__
            raise ValueError(f"{path} is not a valid checkpoint of a run: it holds a {kind}")
        ours = _is_run(content)
        if ours:
            config, held = check_run(content, Path(path))
            expected_of(config, held, {name: name for name in held}, Path(path))
        content = archive.everything()
        if ours:
            check_digest(_decoder_weights(content), content.get(DIGEST), Path(path))
        assert isinstance(content, dict)
        return content


def _is_run(content: Any) -> bool:
    """Whether a checkpoint was written by archzoo's training."""
    if not isinstance(content, dict):
        return False
    arguments, state = content.get("hyper_parameters"), content.get("state_dict")
    names = signature(Decoder).parameters.keys()
    return (
        isinstance(arguments, dict)
        and isinstance(state, dict)
        and not names - arguments.keys() - ADDED
    )


def check_run(content: Any, path: Path) -> tuple[dict[str, Any], dict[str, Stored]]:
    """A run's settings of its decoder and what it holds of it, of the right types and sizes."""
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise ValueError(f"{path} is not a valid checkpoint of a run: it holds a {kind}")
    if not _is_run(content):
        raise ValueError(f"{path} was not written by archzoo's training")
    held = _decoder_weights(content)
    wrong = [name for name, tensor in held.items() if not isinstance(tensor, Stored)]
    if wrong:
        raise ValueError(f"{path}: {wrong[0]} is not a tensor")
    # The decoder's arguments are among the optimizer's, its weights among the metrics' sums.
    config = {n: content["hyper_parameters"].get(n) for n in signature(Decoder).parameters}
    check_settings(config, path)
    check_sizes(config, held, path)
    check_task(content.get("task"), path)
    return config, held
