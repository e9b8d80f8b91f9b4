"""Files of a state: written whole or not at all, and read as a stranger's, within bounds.

A file is safetensors: the tensors of a `Conversation` by their paths, such as
``state/blocks/0/memory``, and in the metadata the other leaves, the digests of the model's
weights and settings, and a digest of it all. Which tensors there are, and their shapes and dtypes,
is not taken from the file but from the model: a file that differs is refused before anything is
read.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from archzoo._version import __version__
from archzoo.checkpoint.archives import Stored, check_json_depth
from archzoo.checkpoint.digest import weights_digest
from archzoo.checkpoint.pretrained import open_tensors
from archzoo.compiled import uncompiled
from archzoo.decoder import Decoder
from archzoo.generation.conversation import Conversation, start_conversation
from archzoo.states import State, to
from archzoo.trust import shown

FORMAT = 1
FORMAT_KEY, ABOUT, DIGEST = "archzoo.state", "about", "digest"  # of the metadata
LARGEST = 2**53  # of what counts tokens: the integers that a float64 still tells apart
MOST_DRAWN = 2**28  # tokens, whose random numbers are skipped one by one
# Arguments of a decoder that do not change what it computes, once it is trained.
NOT_COMPUTED = ("dropout", "activation_checkpointing", "init_std", "context_length")


class Expected(NamedTuple):
    """A leaf that a model's states have.

    Attributes:
        dtype: Of a tensor; None: it is none.
        shape: Without the batch; -1 for an axis of tokens.
        kind: Of the others, its type.
    """

    dtype: torch.dtype | None
    shape: tuple[int, ...] = ()
    kind: type = Tensor


class StateLayout:
    """What a model's states look like, and which model that is; computed once.

    Args:
        model: Whose weights no longer change.
    """

    def __init__(self, model: Decoder) -> None:
        self.model = uncompiled(model)
        self._expected: dict[tuple[bool, bool], tuple[State, dict[str, Expected]]] = {}

    @functools.cached_property
    def weights(self) -> str:
        """The digest of the weights, their names, shapes and dtypes."""
        return weights_digest(self.model.state_dict())

    @functools.cached_property
    def settings(self) -> str:
        """The digest of the configuration, as far as it changes what is computed."""
        settings = {
            name: value
            for name, value in self.model.config.items()
            if value is not None and name not in NOT_COMPUTED
        }
        text = json.dumps(settings, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    def expected(self, packed: bool, begun: bool) -> tuple[State, dict[str, Expected]]:
        """A state of this model, and the leaves that all such states have, by path.

        Their shapes are those of two tries that differ in how many tokens were read: an axis that
        differs, too, is one of tokens.

        Args:
            packed: Whether there is padding or a second document.
            begun: Whether a token was read.
        """
        if (packed, begun) not in self._expected:
            counts = (1, 2) if begun else (0, 0)
            template, other = (_try(self.model, tokens, packed) for tokens in counts)
            others, found = dict(_leaves(other, "state")), {}
            for name, leaf in _leaves(template, "state"):
                if not _is_tensor(leaf):
                    found[name] = Expected(None, kind=type(leaf))
                elif name in others:
                    both = zip(leaf.shape[1:], others[name].shape[1:], strict=True)
                    shape = tuple(one if one == two else -1 for one, two in both)
                    found[name] = Expected(leaf.dtype, shape)
            self._expected[packed, begun] = template, found
        return self._expected[packed, begun]


def _try(model: Decoder, tokens: int, packed: bool) -> State:
    """A state of one row after some tokens, without unused buffers."""
    state = model.init_state(1)
    if tokens:
        read = torch.zeros((1, tokens), dtype=torch.int64, device=model.device)
        with model.evaluating(), torch.inference_mode():
            documents = torch.zeros_like(read) if packed else None
            after = model(read, state, documents, logits_to_keep=1).state
        assert after is not None  # a state was given
        state = after
    return model.copy_state(state)


# ---------------------------------------------------------------------------- writing


def save_state(path: str | os.PathLike[str], state: State | Conversation, model: Decoder) -> None:
    """Write a state to a file, from which another process continues bit for bit.

    Of a KV cache the tokens are written and not the buffers' unused ends. The file is written
    beside its path and then moved there: readers see the old one or the new one.

    Args:
        path: Of the file; ``.safetensors`` says to others what it is.
        state: A decoder's, from `Decoder.init_state` or a call, or a `Conversation` of
            `archzoo.generate` or `archzoo.read_document`. It stays as it is.
        model: That made it.

    Raises:
        ValueError: It is another model's, or holds what is not saved: the message says what.
        OSError: The file cannot be written; what was there has not changed.
    """
    write_state(path, state, StateLayout(model))


def write_state(
    path: str | os.PathLike[str],
    state: State | Conversation,
    layout: StateLayout,
    document: Mapping[str, Any] | None = None,
) -> None:
    """`save_state`, for whoever writes often.

    Args:
        path: As there.
        state: As there.
        layout: Of the model.
        document: Plain data to keep beside it: how far a document has been read.
    """
    model = layout.model
    held = state if isinstance(state, Conversation) else start_conversation(state, model)
    held = held._replace(state=model.copy_state(held.state))
    leaves = dict(_leaves(held._asdict()))
    tensors = {name: _plain(leaf) for name, leaf in leaves.items() if _is_tensor(leaf)}
    values = {name: leaf for name, leaf in leaves.items() if not _is_tensor(leaf)}
    stored = {name: Stored(tuple(leaf.shape), leaf.dtype) for name, leaf in tensors.items()}
    where = f"{path} is not written: the state"
    _check_structure(layout, stored, values, where)
    _check_values(model, tensors, values, where)
    about = {
        "archzoo": __version__,
        "weights": layout.weights,
        "settings": layout.settings,
        "values": values,
        "document": None if document is None else dict(document),
    }
    text = json.dumps(about, sort_keys=True)
    metadata = {FORMAT_KEY: str(FORMAT), ABOUT: text, DIGEST: _digest(text, tensors)}
    _write(Path(path), tensors, metadata)


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory: give the name of a file")
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:  # with what the umask leaves of permissions
            mode = os.fstat(file.fileno()).st_mode & 0o777
        save_file(tensors, partial, metadata=metadata)
        partial.chmod(mode)
        with open(partial, "rb") as file:  # or after a power cut the name may have no content
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"{path} cannot be written: {reason}") from None
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


# ---------------------------------------------------------------------------- reading


def load_state(path: str | os.PathLike[str], model: Decoder) -> Conversation:
    """The state that `save_state` wrote, where the model is, to continue from.

    Nothing in the file is called, and no more is allocated than it holds.

    Args:
        path: Of the file.
        model: That made the state: the same weights, settings and dtype.

    Returns:
        A `Conversation`, whose `state` is the decoder's.

    Raises:
        FileNotFoundError: Nothing is there.
        ValueError: It is not a state, truncated, damaged, of another model or of a later format.
    """
    return read_state(path, StateLayout(model))[0]


def read_state(
    path: str | os.PathLike[str], layout: StateLayout
) -> tuple[Conversation, dict[str, Any] | None]:
    """`load_state`, and how far a document has been read."""
    path, model = Path(path), layout.model
    try:
        with open_tensors(path) as (file, metadata, stored):
            about, values = _about(path, metadata)
            _check_model(path, about, layout)
            where = f"{path} is not a state of this model: it"
            template = _check_structure(layout, stored, values, where)
            tensors: dict[str, Tensor] = {n: file.get_tensor(n).clone() for n in stored}
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no state at {path}") from None
    if metadata.get(DIGEST) != _digest(metadata[ABOUT], tensors):
        raise ValueError(
            f"{path} is damaged: its content is not what was written, by its digest; read the "
            "text again"
        )
    _check_values(model, tensors, values, f"{path} is not valid: the state")
    leaves = {name: tensor.to(model.device) for name, tensor in tensors.items()} | values
    state = _filled(template, leaves, "state")
    own: dict[str, Any] = {n: leaves.get(n) for n in Conversation._fields if n != "state"}
    try:
        model.copy_state(to(state, "meta"))  # sizes alone
    except (RuntimeError, IndexError):
        raise ValueError(f"{path} is not valid: a cache is shorter than it says") from None
    held = Conversation(state=state, **own)
    return held, about.get("document")


def _about(path: Path, metadata: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a file says of itself, and its leaves that are no tensors, by path."""
    version = metadata.get(FORMAT_KEY)
    if version is None:
        raise ValueError(f"{path} is not a state that archzoo.save_state wrote")
    if version != str(FORMAT):
        raise ValueError(
            f"{path} is a state of format {shown(version)}, and this archzoo reads {FORMAT}"
        )
    text = metadata.get(ABOUT, "")
    try:
        check_json_depth(text)
        about = json.loads(text, parse_constant=_refuse)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(about, dict) or not isinstance(about.get("values"), dict):
        raise ValueError(f"{path} is damaged: it does not say what it holds")
    return about, about["values"]


def _refuse(word: str) -> None:
    raise ValueError(f"{word} is not a number that a state holds")


def _check_model(path: Path, about: Mapping[str, Any], layout: StateLayout) -> None:
    for name, whose in (("settings", "built with other settings"), ("weights", "other weights")):
        if about.get(name) != getattr(layout, name):
            kind = whose if name == "settings" else f"with {whose}"
            raise ValueError(
                f"{path} is the state of a model {kind}: load the one that made it, or read the "
                "text again with this one"
            )


def _digest(about: str, tensors: Mapping[str, Tensor]) -> str:
    return hashlib.sha256(f"{weights_digest(tensors)}\n{about}".encode()).hexdigest()


# ---------------------------------------------------------------------------- trees and leaves


def leaves_of(conversation: Conversation) -> dict[str, Tensor]:
    """Its tensors by path."""
    leaves = _leaves(conversation._asdict())
    return {name: _plain(leaf) for name, leaf in leaves if _is_tensor(leaf)}


def _plain(leaf: Tensor) -> Tensor:
    """A tensor as it is written: on the CPU, its elements in order and without gaps."""
    leaf = leaf.detach().cpu().contiguous()
    # torch calls a lone element contiguous whatever its stride, and then refuses its bytes.
    return leaf if leaf.numel() > 1 else leaf.clone(memory_format=torch.contiguous_format)


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, Tensor)


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a state by their paths; what is None is left."""
    if isinstance(tree, dict):
        for name, entry in tree.items():
            if not isinstance(name, str) or "/" in name or not name:
                raise ValueError(f"the state's key {name!r} cannot be saved: give it a name")
            yield from _leaves(entry, f"{path}/{name}" if path else name)
        return
    if isinstance(tree, list | tuple):
        for index, entry in enumerate(tree):
            yield from _leaves(entry, f"{path}/{index}")
        return
    if tree is not None:
        yield path, tree


def _filled(template: Any, leaves: Mapping[str, Any], path: str = "") -> Any:
    """A tree like a template, with the leaves of these paths."""
    if isinstance(template, dict):
        return {
            name: _filled(entry, leaves, f"{path}/{name}" if path else name)
            for name, entry in template.items()
        }
    if isinstance(template, list | tuple):
        return [_filled(entry, leaves, f"{path}/{i}") for i, entry in enumerate(template)]
    return leaves.get(path)


def _check_structure(
    layout: StateLayout, stored: Mapping[str, Stored], values: Mapping[str, Any], where: str
) -> State:
    """Refuse leaves that this model's states do not have; a state that has those that are there.

    Args:
        layout: Of the model whose state it should be.
        stored: The tensors by path: what a header says of them.
        values: The leaves that are no tensors, by path.
        where: What the message begins with.
    """
    rows = stored.get("read")
    if rows is None or len(rows.shape) != 1 or not rows.shape[0]:
        raise ValueError(f"{where} does not say how many tokens each row has read")
    batch = rows.shape[0]
    whole, flag = (Expected(dtype) for dtype in (torch.int64, torch.bool))
    own = {"read": whole, "drawn": whole, "stopped": flag, "tail": whole._replace(shape=(-1,))}
    if "logits" in stored:
        own["logits"] = Expected(layout.model.dtype, (layout.model.vocab_size,))
    packed = values.get("state/place/packed") is True
    given = stored.keys() | values.keys()
    template, leaves = layout.expected(packed, begun=True)
    if given != own.keys() | leaves.keys():  # nothing was read yet, perhaps
        begins = layout.expected(packed, begun=False)
        if given == own.keys() | begins[1].keys():
            template, leaves = begins
    expected = own | leaves
    for name in sorted(given ^ expected.keys()):
        held, has = ("holds", "has not") if name in given else ("misses", "has")
        raise ValueError(f"{where} {held} {shown(name)}, which this model's {has}")
    for name, leaf in expected.items():
        if leaf.dtype is None:
            value = values.get(name)
            if type(value) is not leaf.kind:
                raise ValueError(
                    f"{where} has {name}={shown(value)}, which is not a valid {leaf.kind.__name__}"
                )
            continue
        entry = stored.get(name)
        if entry is None or entry.dtype != leaf.dtype:
            found = "no tensor" if entry is None else _name(entry.dtype)
            raise ValueError(
                f"{where} has {name} as {found}, and this model as {_name(leaf.dtype)}"
            )
        wanted = (batch, *leaf.shape)
        fits = len(wanted) == len(entry.shape) and all(
            ours in (-1, theirs) for ours, theirs in zip(wanted, entry.shape, strict=True)
        )
        if not fits:
            sizes = ", ".join("any" if size == -1 else str(size) for size in wanted)
            raise ValueError(f"{where} has {name} of shape {entry.shape}, and not ({sizes})")
    return template


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_values(
    model: Decoder, tensors: Mapping[str, Tensor], values: Mapping[str, Any], where: str
) -> None:
    """Refuse numbers that no reading gives.

    Args:
        model: Whose state it should be.
        tensors: By path.
        values: The other leaves, by path.
        where: What the message begins with.
    """
    highest = {"tail": model.vocab_size - 1, "drawn": MOST_DRAWN}
    for name, value in values.items():
        if isinstance(value, int | float) and not -1 <= value < LARGEST:
            raise ValueError(f"{where} has {name}={shown(value)}, which is out of range")
        if name.endswith("/length") and value < 0:
            raise ValueError(f"{where} has {name}={value}: a cache holds 0 tokens or more")
    for name, tensor in tensors.items():
        if not tensor.numel() or tensor.dtype == torch.bool:
            continue
        if tensor.dtype.is_floating_point:
            if tensor.isnan().any():
                raise ValueError(f"{where} has NaN in {name}: the model's weights were broken")
            continue
        low, high = (int(number) for number in tensor.aminmax())
        least = 0 if name in ("read", "drawn") else -1
        most = highest.get(name, LARGEST)
        if low < least or high > most:
            wrong = low if low < least else high
            raise ValueError(f"{where} has {wrong} in {name}, which is not in {least} to {most}")
