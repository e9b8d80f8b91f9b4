"""`archzoo adapter`: an adapter alone, in the weights of its base, in other libraries' files."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from archzoo.adapters.attach import attached, collapse_adapters, merge_adapter
from archzoo.checkpoint import Pretrained, load, locate, save_adapter, save_pretrained
from archzoo.checkpoint.pretrained import new_directory
from archzoo.checkpoint.runs import names_base
from archzoo.conversion.peft import export_peft, import_peft
from archzoo.decoder import Decoder
from archzoo.names import nearest
from archzoo.parts import named_adapters


def save_command(
    source: str, /, out: str | None = None, name: str | None = None, base: str | None = None
) -> None:
    """Write the adapter of a run alone, without the model that it changes.

    Of several adapters each goes into a directory of its name, within the one that is given.

    Args:
        source: A run's directory, a .ckpt file, or a directory of archzoo.save_pretrained.
        out: The directory that is written; there must be none yet.
        name: Of the adapter, where there are several. None: all of them.
        base: Where the adapter's base lies. None: where it was.

    Raises:
        FileNotFoundError: The checkpoint does not exist, or its base has moved.
        FileExistsError: There is something where the adapter is to be written.
        ValueError: There is no adapter of that name.
    """
    target = new_directory(out, "archzoo adapter save ...", "the adapter")
    model = _adapted(source, base).model
    _check_alone(source, model)
    _save(target, model, name)


def merge_command(source: str, /, out: str | None = None, base: str | None = None) -> None:
    """Put an adapter into the weights of its base: a plain model, which computes the same.

    Args:
        source: A run's directory, a .ckpt file, or a directory of archzoo.save_adapter or
            archzoo.save_pretrained.
        out: The directory that is written; there must be none yet.
        base: Where the adapter's base lies. None: where it was.

    Raises:
        FileNotFoundError: The checkpoint does not exist, or its base has moved.
        FileExistsError: There is something where the model is to be written.
        ValueError: There is no adapter, or one that cannot be merged; the message names it.
    """
    target = new_directory(out, "archzoo adapter merge ...", "the model")
    found = _adapted(source, base)
    merged = ", ".join(_about(found.model, name) for name in named_adapters(found.model.config))
    save_pretrained(target, merge_adapter(found.model), found.tokenizer, found.task)
    print(f"{target}: {found.model.parameter_count():,} parameters, with {merged} merged into them")


def export_command(
    source: str,
    /,
    to: Literal["peft"] = "peft",
    out: str | None = None,
    name: str | None = None,
    base: str | None = None,
) -> None:
    """Write an adapter in the files of another library.

    Args:
        source: A run's directory, a .ckpt file, or a directory of archzoo.save_adapter or
            archzoo.save_pretrained.
        to: Whose files: peft's, for LoRA, DoRA, PiSSA and MoSLoRA.
        out: The directory that is written; there must be none yet.
        name: Of the adapter, where there are several.
        base: Where the adapter's base lies. None: where it was.

    Raises:
        FileNotFoundError: The checkpoint does not exist, or its base has moved.
        FileExistsError: There is something where the adapter is to be written.
        ValueError: The library cannot say what the adapter does; the message says what.
    """
    target = new_directory(out, "archzoo adapter export ...", "the adapter")
    model = _adapted(source, base).model
    _check_alone(source, model)
    export_peft(model, target, name)
    about = _about(model, name or next(iter(named_adapters(model.config))))
    print(f"{target}: {about}, in the files of {to}")


def import_command(source: str, /, base: str | None = None, out: str | None = None) -> None:
    """Read an adapter from the files of another library, and write it as archzoo's.

    Of several adapters, as one that has several ranks becomes, each goes into a directory of its
    name, within the one that is given.

    Args:
        source: A directory of peft's, with a LoRA or a DoRA.
        base: The model that the adapter changes: a run's directory, a .ckpt file, or a directory
            of archzoo.save_pretrained.
        out: The directory that is written; there must be none yet.

    Raises:
        FileNotFoundError: There is no such directory, or no such base.
        FileExistsError: There is something where the adapter is to be written.
        ValueError: The files are damaged, say what has no equal here, or belong to another base.
    """
    target = new_directory(out, "archzoo adapter import ...", "the adapter")
    if base is None:
        raise ValueError("which model does it change? archzoo adapter import DIR --base CHECKPOINT")
    _save(target, import_peft(load(base).model, source), None)


def _adapted(source: str, base: str | None) -> Pretrained:
    """A checkpoint that has adapters."""
    found = load(source, base=base)
    if not named_adapters(found.model.config):
        raise ValueError(
            f"{source} has no adapter: it is merged already, or a plain model; fit --model.weights "
            f"{source} --model.adapter LoRA trains one"
        )
    return found


def _check_alone(source: str, model: Decoder) -> None:
    """Refuse a run that has trained some of the base beside its adapter: they belong together."""
    path = locate(source)
    if path.is_file() and names_base(path) and model.base_path is None:
        raise ValueError(
            f"{source} has trained weights of the base, too (unfreeze), which the adapter alone "
            "would leave out: archzoo adapter merge, or save_pretrained, writes a whole model"
        )


def _save(target: Path, model: Decoder, name: str | None) -> None:
    """Write one adapter into a directory, or several into directories within it."""
    names = list(named_adapters(model.config))
    if name is not None and name not in names:
        raise ValueError(f"there is no adapter {name!r}; {nearest(name, names)}")
    alone = name is not None or len(names) == 1
    collapse_adapters(model)  # what only training needed is not written, and not counted
    for entry in names if name is None else [name]:
        place = target if alone else target / entry
        save_adapter(place, model, entry)
        print(f"{place}: {_about(model, entry)}")


def _about(model: Decoder, name: str) -> str:
    """An adapter's class, and how many parameters it has where."""
    modules = [adapter for entry, _, adapter in attached(model) if entry == name]
    count = sum(parameter.numel() for module in modules for parameter in module.parameters())
    places = "1 place" if len(modules) == 1 else f"{len(modules)} places"
    return f"{type(modules[0]).__name__} of {count:,} parameters in {places}"
