"""Checkpoints that are opened side by side: read a weight at a time, and held to be kin.

Weights can be averaged, subtracted and put together where they stand for the same thing: in one
architecture, over one vocabulary, and begun from one checkpoint. Models that began apart have their
hidden units in another order (Entezari et al., arXiv 2110.06296), and only look alike.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors import SafetensorError
from torch import Tensor

from archzoo.checkpoint.archives import Archive, Stored
from archzoo.checkpoint.building import expected_of, names_of_each, same_bits
from archzoo.checkpoint.checks import check_finite, text_or_none
from archzoo.checkpoint.digest import DIGEST, check_digest, weights_digest
from archzoo.checkpoint.loading import holds_adapter, locate
from archzoo.checkpoint.pretrained import named_tokenizer, own_tensors, read_config
from archzoo.checkpoint.runs import base_in, check_run
from archzoo.checkpoint.vocabulary import check_vocabulary, run_tokenizer
from archzoo.decoder import Decoder
from archzoo.parts import named_adapters
from archzoo.trust import shown

if TYPE_CHECKING:
    from archzoo.tasks.tokenizers import Tokenizer

# Settings that change no output of a trained model.
OF_TRAINING = {"context_length", "dropout", "init_std", "activation_checkpointing"}
PLAIN = "archzoo adapter merge {} --out DIR makes a plain model of it"


class Weights(Mapping[str, Tensor]):
    """A checkpoint's weights by name: each is read when it is asked for, and not kept.

    Args:
        path: Of the checkpoint, for messages.
        sources: Under which name each is stored; shared ones under one.
        read: Gives what is stored under a name.
    """

    def __init__(self, path: str, sources: dict[str, str], read: Callable[[str], Tensor]) -> None:
        self._path, self._sources, self._read = path, sources, read

    def __getitem__(self, name: str) -> Tensor:
        try:
            return self._read(self._sources[name])
        except SafetensorError as error:
            raise ValueError(f"{self._path} is truncated or damaged: {error}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)

    def finite(self, name: str) -> Tensor:
        """A weight, once it is sure that all of it is finite.

        Raises:
            ValueError: It is not; the message names the file.
        """
        tensor = self[name]
        check_finite({name: tensor}, self._path)
        return tensor


class Opened(NamedTuple):
    """A whole checkpoint without its weights in memory.

    Attributes:
        path: As it was given.
        model: Of its configuration, without memory for weights.
        weights: To be read.
        held: What its header says of each weight, by name.
        tokenizer: Or None.
        task: What it was trained on, or None.
        base: The digest of the weights that it began from, as it records it, or None.
        digest: Of its own weights.
    """

    path: str
    model: Decoder
    weights: Weights
    held: dict[str, Stored]
    tokenizer: Tokenizer | None
    task: dict[str, Any] | None
    base: str | None
    digest: str

    def names(self) -> dict[str, str]:
        """{name: the first name of the tensor}, which is its own but for tied weights."""
        groups = names_of_each(self.model.state_dict(keep_vars=True))
        return {name: group[0] for group in groups for name in group}


@contextmanager
def open_model(path: str | os.PathLike[str]) -> Iterator[Opened]:
    """A checkpoint whose weights are read one at a time; all of them are held to their digest.

    Args:
        path: A run's directory, a .ckpt file, or a directory of archzoo.save_pretrained.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is damaged, or has adapters.
    """
    with ExitStack() as stack:
        opened = _enter(str(path), locate(path), stack)
        files = stack.pop_all()
    try:
        yield opened
    finally:
        files.close()  # apart from what is raised meanwhile, which may be another file's


def _enter(path: str, place: Path, stack: ExitStack) -> Opened:
    if holds_adapter(place):
        raise ValueError(f"{path} is an adapter alone: {PLAIN.format(path)}")
    if place.is_dir():
        content = read_config(place)
        tokenizer = named_tokenizer(content.get("tokenizer"), place)
        held, read, sources, digest = stack.enter_context(own_tensors(place))
        return _open(path, place, content, tokenizer, held, read, sources, digest)
    archive = stack.enter_context(Archive(place))
    content = archive.content
    config, held = check_run(content, place)
    if base_in(content, place) is not None:
        raise ValueError(f"{path} holds adapters alone: {PLAIN.format(path)}")

    def read_one(name: str) -> Tensor:
        archive.release()
        return archive.tensor(held[name])

    content = {**content, "decoder": config}
    names = {name: name for name in held}
    tokenizer = run_tokenizer(archive, place)
    return _open(path, place, content, tokenizer, held, read_one, names, content.get(DIGEST))


def _open(
    path: str,
    place: Path,
    content: dict[str, Any],
    tokenizer: Tokenizer | None,
    held: dict[str, Stored],
    read: Callable[[str], Tensor],
    sources: dict[str, str],
    digest: str | None,
) -> Opened:
    model, _ = expected_of(content["decoder"], held, sources, place)
    if named_adapters(model.config):
        raise ValueError(f"{path} has adapters: {PLAIN.format(path)}")
    check_vocabulary(model, tokenizer, path)
    weights = Weights(path, sources, read)
    for first, *others in names_of_each(model.state_dict(keep_vars=True)):
        for name in others:
            if sources[name] != sources[first] and not same_bits(weights[name], weights[first]):
                raise ValueError(f"{path}: {first} and {name} differ, which are one tensor")
    found = weights_digest(weights)
    if digest is not None and digest != found:
        check_digest(weights, digest, place)  # which says so
    stored = {name: held[source] for name, source in sources.items()}
    task, base = content.get("task"), text_or_none(content.get("base"))
    return Opened(path, model, weights, stored, tokenizer, task, base, found)


# ---------------------------------------------------------------------------- kin


def check_alike(models: Sequence[Opened]) -> None:
    """Refuse models of several architectures or vocabularies; the message says both values.

    Args:
        models: Each is compared with the first.
    """
    first = models[0]
    for other in models[1:]:
        _check_architecture(first, other)
        if first.tokenizer is None or other.tokenizer is None:
            continue  # the vocabulary's size is the architecture's
        if first.tokenizer.files() != other.tokenizer.files():
            ours, theirs = map(_about, (first.tokenizer, other.tokenizer))
            raise ValueError(
                f"{first.path} has the vocabulary {ours} and {other.path} has {theirs}: a token "
                "must mean the same to both; train them with one tokenizer (fit --model.weights)"
            )


def _check_architecture(first: Opened, other: Opened) -> None:
    ours, theirs = first.model.config, other.model.config
    for name in ours:
        if name not in OF_TRAINING and ours[name] != theirs[name]:
            where, mine, its = _difference(name, ours[name], theirs[name])
            raise ValueError(
                f"{first.path} has {where}={shown(mine)} and {other.path} has "
                f"{where}={shown(its)}: only models of one architecture have weights that "
                "belong together; train one of them from the other's beginning (fit "
                "--model.weights)"
            )


def _difference(name: str, ours: Any, theirs: Any) -> tuple[str, Any, Any]:
    """Where two values of a setting first differ, by its full name, and what they are there."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in dict.fromkeys([*ours, *theirs]):
            one, other = ours.get(key), theirs.get(key)
            if one != other:
                form = key in ("class_path", "init_args")
                return _difference(name if form else f"{name}.{key}", one, other)
    return name, ours, theirs


def _about(tokenizer: Tokenizer) -> str:
    return f"{tokenizer.fingerprint()} of {tokenizer.vocab_size} tokens"


def common_ancestor(models: Sequence[Opened], base: Opened | None = None) -> tuple[str, str]:
    """The digest of the weights that all models began from, and what to say of it.

    A model that is itself what the others began from is one of the family, too.

    Args:
        models: Of one architecture.
        base: What they began from, as the user says; it is held to the models' records.

    Returns:
        The digest, and a line where models have no record and `base` was believed, or nothing.

    Raises:
        ValueError: They began from other weights than the base, or than each other, or say
            nothing and there is no base. The message says both values.
    """
    if base is not None:
        for model in models:
            if model.base not in (None, base.digest) and model.digest != base.digest:
                raise ValueError(
                    f"{model.path} began from {model.base[:12]}, as it records, and {base.path} is "
                    f"{base.digest[:12]}: models of another ancestor do not fit together; name by "
                    "--base what all of them were trained from"
                )
        unsaid = [m.path for m in models if m.base is None and m.digest != base.digest]
        verb = "says" if len(unsaid) == 1 else "say"
        line = (
            f"{' and '.join(unsaid)} {verb} nothing of where training began: taken to be from "
            f"{base.path}, as --base says"
        )
        return base.digest, line if unsaid else ""
    for root in dict.fromkeys(m.base or m.digest for m in models):
        if all(root in (model.base, model.digest) for model in models):
            return root, ""
    silent = [model for model in models if model.base is None]
    if silent:
        raise ValueError(
            f"{silent[0].path} says nothing of where its training began: give what all models were "
            "trained from, --base CHECKPOINT; models that began apart do not fit together"
        )
    first, other = models[0], next(m for m in models if m.base != models[0].base)
    raise ValueError(
        f"{first.path} began from {str(first.base)[:12]} and {other.path} from "
        f"{str(other.base)[:12]}, as they record: models of several ancestors do not fit together; "
        "train them from one checkpoint (fit --model.weights)"
    )
