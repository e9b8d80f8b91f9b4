"""`archzoo list` and `archzoo show`: what the zoo holds as tables, computed from what is there."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table

from archzoo import shipped
from archzoo.adapters.attach import adapter_modules, attached
from archzoo.analysis.tables import Screen, show
from archzoo.analysis.window import print_windows
from archzoo.checkpoint import load, locate
from archzoo.checkpoint.runs import frozen_in
from archzoo.decoder import Decoder
from archzoo.freezing import Freezing
from archzoo.models import ACTIVE_PARAMETERS, WITHIN, sized_as_named
from archzoo.names import nearest
from archzoo.parts import named_adapters
from archzoo.registry import build_decoder, get_preset, list_models
from archzoo.states import nbytes

HEADINGS = (
    "model",
    "mixer",
    "feed-forward",
    "positions",
    "parameters",
    "active",
    "state at 1k",
    "state at 16k",
    "paper",
)


class Row(NamedTuple):
    """What `archzoo list` says of a model.

    Attributes:
        name: Of the preset.
        mixer: Class name, or the pattern.
        feed_forward: Class name.
        positions: The position methods.
        parameters: How many, shared ones once.
        active: Active parameters: those that a token uses, without the experts that it is not
            sent to.
        state_1k: Bytes of the state of one text of 1,024 tokens, in float32.
        state_16k: The same for 16,384 tokens.
        paper: Where the architecture is from.
    """

    name: str
    mixer: str
    feed_forward: str
    positions: str
    parameters: int
    active: int
    state_1k: int
    state_16k: int
    paper: str


def row_of(name: str, arguments: dict[str, Any] | None = None) -> Row:
    """The facts of a preset, or of a decoder by its arguments; nothing is allocated."""
    preset = get_preset(name) if arguments is None else None
    decoder = _on_meta(preset.arguments if preset else arguments or {})
    config = decoder.config

    def state(tokens: int) -> int:
        with torch.device("meta"):
            return nbytes(decoder.init_state(1, capacity=tokens))

    specs = config["pattern"] or [config["mixer"]]
    return Row(
        name=name,
        mixer=" + ".join(dict.fromkeys(_short(spec) for spec in specs)),
        feed_forward=_short(config["feed_forward"]),
        positions=", ".join(_positions(decoder)) or "none",
        parameters=decoder.parameter_count(),
        active=active_parameters(decoder),
        state_1k=state(1_024),
        state_16k=state(16_384),
        paper=preset.paper if preset else "",
    )


def list_command(
    pattern: str = "*", /, markdown: bool = False, configurations: bool = False
) -> None:
    """Show the models of the zoo, or the configurations that come with the package.

    Args:
        pattern: Names to show, such as "ret*".
        markdown: As a Markdown table.
        configurations: Those that `archzoo fit NAME` and `archzoo compare NAME` take, instead of
            models.
    """
    if configurations:
        _list_configurations(pattern, markdown)
        return
    names = list_models(pattern)
    if not names:
        near = nearest(pattern.rstrip("*"), list_models())
        raise ValueError(f"no model is named {pattern!r}; {near}; archzoo list shows all")
    rows = [row_of(name) for name in names]
    if markdown:
        print(markdown_table(HEADINGS, [_cells(row) for row in rows]))
        return
    table = Table(box=None, header_style="bold")
    for heading in HEADINGS:
        numeric = heading in ("parameters", "active") or heading.startswith("state")
        table.add_column(heading, justify="right" if numeric else "left")
    for row in rows:
        table.add_row(*_cells(row))
    console = Screen(highlight=False)
    show(table, console)
    promised = ", ".join(f"{size} {count:,}" for size, count in ACTIVE_PARAMETERS.items())
    console.print(f"\nA size promises active parameters, within {WITHIN:.0%}: {promised}.")
    others = [row.name for row in rows if not sized_as_named(row.name, row.active)]
    if others:
        console.print(f"Sized otherwise, for reasons that archzoo show gives: {', '.join(others)}.")


def _list_configurations(pattern: str, markdown: bool) -> None:
    known = shipped.configurations()
    rows = [[n, shipped.about(p)] for n, p in known.items() if fnmatchcase(n, pattern)]
    if not rows:
        near = nearest(pattern.rstrip("*"), list(known))
        raise ValueError(
            f"no configuration is named {pattern!r}; {near}; archzoo list --configurations shows "
            "all"
        )
    headings = ("configuration", "about")
    if markdown:
        print(markdown_table(headings, rows))
        return
    table = Table(box=None, header_style="bold")
    for heading in headings:
        table.add_column(heading)
    for row in rows:
        table.add_row(*row)
    console = Screen(highlight=False)
    if console.is_terminal:
        console.print(table)  # whose sentences may wrap
    else:
        show(table, console)


def show_command(name: str, /, window: bool = False, base: str | None = None) -> None:
    """Show one model: its architecture, parts and sizes, and what its adapters change.

    Args:
        name: Of a preset, which `archzoo list` shows; or a checkpoint: a file, or a directory of a
            run, of `archzoo.save_pretrained` or of `archzoo.save_adapter`.
        window: Show how far back its heads read, instead: half-lives, the distance at which a
            token weighs 1 %, and the length at which attention's cache outgrows the state.
        base: Where the base of an adapted checkpoint lies. None: where it was.
    """
    saved = load(name, "cpu", base).model if os.path.exists(name) else None
    if window:
        model = _on_meta(get_preset(name).arguments) if saved is None else saved
        print_windows(model, Screen(highlight=False))
        return
    if saved is not None:
        arguments = saved.config
    else:
        preset = get_preset(name)
        arguments = preset.arguments
        print(preset.about.strip(), end="\n\n")
    row = row_of(name, arguments)
    console = Screen(highlight=False)
    if not console.is_terminal:
        console.width = 200  # a file can hold a long setting on one line
    decoder = _on_meta(arguments)
    settings = Table(box=None, show_header=False)
    for key, value in decoder.config.items():
        if value is not None and key not in ("adapter", "adapters"):  # a table says more of them
            settings.add_row(key, _written(value))
    console.print(settings)
    console.print()
    table = Table(box=None, header_style="bold")
    for heading in ("part", "class", "parameters", "share"):
        table.add_column(heading, justify="left" if heading in ("part", "class") else "right")
    for part, kind, count in parameters_by_part(decoder):
        table.add_row(part, kind, f"{count:,}", f"{count / row.parameters:.1%}")
    table.add_row("in all", "", f"{row.parameters:,}", "")
    if row.active < row.parameters:
        table.add_row("of which active", "", f"{row.active:,}", "")
    if saved is not None:
        _freeze(decoder, locate(name))
    trainable = sum(p.numel() for p in decoder.parameters() if p.requires_grad)
    if trainable < row.parameters:
        share = f"{trainable / row.parameters:.1%}"
        table.add_row("of which trainable", "", f"{trainable:,}", share)
    show(table, console)
    console.print()
    if named_adapters(decoder.config):
        show(_adapters_table(decoder), console)
        console.print()
    console.print(
        f"state of one text: {_bytes(row.state_1k)} at 1k tokens, {_bytes(row.state_16k)} at 16k"
    )
    if saved is not None and saved.merged is not None:
        print(f"made of other models: {json.dumps(saved.merged, ensure_ascii=False)}")


def _freeze(decoder: Decoder, path: Path) -> None:
    """Freeze what a run's checkpoint says was not trained, up to the step that it is of."""
    if path.is_dir():
        return  # a whole model, or an adapter: of no run
    frozen, steps = frozen_in(path)
    if any(frozen.values()):
        freezing = Freezing(decoder, **frozen)
        freezing.apply(decoder, freezing.stage_at(max(steps - 1, 0)))


def parameters_by_part(decoder: Decoder) -> Iterator[tuple[str, str, int]]:
    """(part, class, parameters) of a decoder from bottom to top; a shared tensor counts once."""
    seen: set[int] = set()

    def count(module: torch.nn.Module) -> int:
        fresh = [p for p in module.parameters() if id(p) not in seen]
        seen.update(id(p) for p in fresh)
        return sum(p.numel() for p in fresh)

    adapters: list[Any] = [module for _, module in adapter_modules(decoder)]
    if adapters:
        names = " + ".join(dict.fromkeys(type(module).__name__ for module in adapters))
        yield f"{len(adapters)} x adapter", names, sum(map(count, adapters))
    yield "embedding", type(decoder.embedding).__name__, count(decoder.embedding)
    for part in ("convolution", "mixer", "feed_forward"):
        if getattr(decoder.blocks[0], part) is None:
            continue
        modules = [getattr(block, part) for block in decoder.blocks]
        names = " + ".join(dict.fromkeys(type(module).__name__ for module in modules))
        label = part.replace("_", "-")
        yield f"{decoder.depth} x {label}", names, sum(map(count, modules))
    blocks = sum(map(count, decoder.blocks))  # what is left of them
    yield "norms", type(decoder.blocks[0].mixer_norm).__name__, blocks + count(decoder.norm)
    yield "head", "tied to the embedding" if decoder.tie_weights else "Linear", count(decoder.head)


def _adapters_table(decoder: Decoder) -> Table:
    """A line for each adapter: what it is and what it changes."""
    table = Table(box=None, header_style="bold")
    for heading in ("adapter", "class", "parameters", "targets"):
        table.add_column(heading, justify="right" if heading == "parameters" else "left")
    every = attached(decoder)
    for entry, spec in named_adapters(decoder.config).items():
        mine = [(place, adapter) for name, place, adapter in every if name == entry]
        count = sum(p.numel() for _, adapter in mine for p in adapter.parameters())
        options = spec.get("init_args", {})
        said = {name: value for name, value in options.items() if name not in ("targets", "layers")}
        about = _written({"class_path": spec["class_path"], "init_args": said})
        layers: dict[str, list[int | None]] = {}
        for place, _ in mine:
            layers.setdefault(place.meanings[1], []).append(place.target.layer)
        together: dict[str, list[str]] = {}  # what is changed in the same layers
        for meaning, those in layers.items():
            whole = those in ([None], list(range(decoder.depth)))
            blocks = "block" if len(those) == 1 else "blocks"
            where = "" if whole else f" in {blocks} {', '.join(map(str, those))}"
            together.setdefault(where, []).append(meaning)
        targets = "; ".join(", ".join(names) + where for where, names in together.items())
        table.add_row(entry, about, f"{count:,}", targets)
    return table


def active_parameters(decoder: Decoder) -> int:
    """Parameters that a token uses, those of shared experts included, of inactive experts not."""
    inactive = (getattr(block.feed_forward, "inactive_parameters", 0) for block in decoder.blocks)
    return decoder.parameter_count() - sum(inactive)


def markdown_table(headings: Sequence[str], rows: list[list[str]]) -> str:
    """Rows under their headings as Markdown."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _on_meta(arguments: dict[str, Any]) -> Decoder:
    with torch.device("meta"):
        return build_decoder(arguments)


def _positions(decoder: Decoder) -> Iterator[str]:
    """Names of the position methods in use, each once."""
    found = []
    if type(decoder.embedding).__name__ != "TokenEmbedding":
        found.append(type(decoder.embedding).__name__)
    for block in decoder.blocks:
        for slot in ("rotary", "bias"):
            part = getattr(block.mixer, slot, None)
            if part is not None:
                found.append(type(part).__name__)
    yield from dict.fromkeys(found)


def _cells(row: Row) -> list[str]:
    sizes = [_bytes(row.state_1k), _bytes(row.state_16k)]
    counts = [f"{row.parameters:,}", f"{row.active:,}"]
    return [row.name, row.mixer, row.feed_forward, row.positions, *counts, *sizes, row.paper]


def _bytes(count: int) -> str:
    for unit, size in (("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count} B"


def _short(spec: dict[str, Any]) -> str:
    return str(spec["class_path"]).rpartition(".")[2]


def _written(value: Any) -> str:
    """A setting as YAML would have it."""
    if isinstance(value, dict) and "class_path" not in value:  # adapters by name
        return ", ".join(f"{name}: {_written(entry)}" for name, entry in value.items())
    if isinstance(value, dict):
        arguments = ", ".join(f"{k}: {_written(v)}" for k, v in value.get("init_args", {}).items())
        return _short(value) + (f" ({arguments})" if arguments else "")
    if isinstance(value, list):
        return ", ".join(map(_written, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
