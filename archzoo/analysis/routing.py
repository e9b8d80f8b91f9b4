"""`archzoo router`: what a checkpoint's routers do, layer by layer, as a table and a figure."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from rich.table import Table
from torch import Tensor

from archzoo.analysis.figures import check_figure, legend, pyplot, save
from archzoo.analysis.tables import show
from archzoo.decoder import Decoder
from archzoo.feedforward.balance import load_fractions, load_metrics, virtual_drop_rate
from archzoo.feedforward.moe import MixtureOfExperts

if TYPE_CHECKING:
    from archzoo.checkpoint import Pretrained

COLUMNS = {
    "max_violation": "max violation",
    "entropy": "entropy",
    "unused": "unused",
    "max1_max2": "Max1/Max2",
    "max2_max3": "Max2/Max3",
    "drop_rate": "drop rate",
    "similarity": "similarity",
    "coefficient": "coefficient",
}
BY_LAYER = {  # a panel each
    "gate": ("max1_max2", "max2_max3"),
    "load, and how alike experts are": (
        "max_violation",
        "entropy",
        "unused",
        "drop_rate",
        "similarity",
    ),
}
OVER_TIME = ("coefficient", "drop_rate", "max1_max2", "similarity")


class Layer(NamedTuple):
    """What one mixture did.

    Attributes:
        number: Of the layer, from 0.
        fractions: Of the tokens, by expert that the router chooses from.
        shared: Experts beside them, each of which gets all tokens.
        even: The fraction of each expert under an even load, top_k / experts.
        values: By the names of `COLUMNS`; the coefficient where it adapts.
    """

    number: int
    fractions: list[float]
    shared: int
    even: float
    values: dict[str, float]


def read_routers(decoder: Decoder, batches: Iterable[dict[str, Tensor]]) -> list[Layer]:
    """The load of every mixture over batches of text; padding is left out.

    The decoder is put into evaluation, where nothing is dropped: the drop rate is the virtual one.

    Args:
        decoder: With at least one mixture.
        batches: Each with tokens (batch, time) and maybe documents, examples and positions.

    Raises:
        ValueError: There is no mixture of experts, or no batch.
    """
    mixtures = {
        layer: block.feed_forward
        for layer, block in enumerate(decoder.blocks)
        if isinstance(block.feed_forward, MixtureOfExperts)
    }
    if not mixtures:
        kind = decoder.config["feed_forward"]["class_path"]
        raise ValueError(f"this model has no router: its feed-forward is {kind}")
    counts: dict[int, Tensor] = {}
    ratios: dict[tuple[int, str], float] = {}
    # Statistics come where gradients are on; no parameter wants one, so nothing is kept for them.
    decoder.eval().requires_grad_(False)
    with torch.enable_grad():
        for batch in batches:
            _, _, aux = decoder.hidden(
                batch["tokens"],
                documents=batch.get("documents"),
                examples=batch.get("examples"),
                positions=batch.get("positions"),
            )
            for layer in mixtures:
                new = aux[layer].sums["assignments"]
                counts[layer] = counts.get(layer, torch.zeros_like(new)) + new
                for name in ("max1_max2", "max2_max3"):
                    mean = aux[layer].metrics.get(name)
                    if mean is not None:  # over tokens, so it weighs by tokens
                        before = ratios.get((layer, name), 0.0)
                        ratios[layer, name] = before + mean.item() * int(new.sum())
    if not counts:
        raise ValueError("there is no batch to look at: take at least 1")
    layers = []
    for layer, mixture in mixtures.items():
        mine, balance = counts[layer].cpu(), mixture.balance
        total = max(int(mine.sum()), 1)
        fractions = load_fractions(mine, dtype=torch.float64)
        values = {name: value.item() for name, value in load_metrics(fractions).items()}
        for name in ("max1_max2", "max2_max3"):
            if (found := ratios.get((layer, name))) is not None:
                values[name] = found / total
        rate = virtual_drop_rate(mine, balance.capacity_factor, dtype=torch.float64)
        values["drop_rate"] = rate.item()
        values["similarity"] = mixture.experts.similarity().item()
        if balance.adaptive:
            values["coefficient"] = balance.alpha.item()
        load = (mixture.top_k * fractions).tolist()
        even = mixture.top_k / len(mine)
        layers.append(Layer(layer, load, mixture.shared_experts, even, values))
    return layers


def router_command(
    checkpoint: str,
    /,
    figure: str | None = None,
    batches: int = 8,
    device: str | None = None,
    data: dict[str, Any] | None = None,
) -> None:
    """Show what the routers of a checkpoint do with its task's validation data.

    Args:
        checkpoint: A run's directory, a .ckpt file, or a directory of archzoo.save_pretrained.
        figure: The picture that is drawn, such as router.png; what changed over time is drawn
            where the run's metrics.csv lies beside the checkpoint. None: a table alone.
        batches: Of the validation data.
        device: Such as cpu or cuda. None: a GPU where there is one.
        data: Arguments of the task that replace the checkpoint's: --data.path TEXT.

    Raises:
        FileNotFoundError: The checkpoint does not exist.
        ValueError: It has no router, or no task to take data from.
    """
    from archzoo.checkpoint import load, locate

    drawn = None if figure is None else check_figure(figure)
    path = locate(checkpoint)
    found = load(path, device or "auto")
    if batches < 1:
        raise ValueError(f"batches={batches} must be at least 1")
    layers = read_routers(found.model, _validation_data(found, batches, data or {}))
    show(_table(layers))
    if drawn is not None:
        _draw(layers, _history(path.parent / "metrics.csv"), drawn)
        print(f"drew {drawn}")


def _validation_data(
    found: Pretrained, batches: int, data: dict[str, Any]
) -> list[dict[str, Tensor]]:
    """The first batches of the validation split, with the model's own tokenizer."""
    from archzoo.checkpoint import task_of

    loader = task_of(found, **data).evaluation_loader("validation")
    first = [batch for batch, _ in zip(loader, range(batches), strict=False)]
    return [
        {name: entry.to(found.model.device) for name, entry in batch.items()} for batch in first
    ]


def _table(layers: list[Layer]) -> Table:
    table = Table(box=None, header_style="bold")
    shown = [name for name in COLUMNS if any(name in layer.values for layer in layers)]
    for heading in ("layer", "least", "most", "even", "shared", *(COLUMNS[name] for name in shown)):
        table.add_column(heading, justify="right")
    for layer in layers:
        ends = (min(layer.fractions), max(layer.fractions), layer.even)
        cells = [f"{layer.values.get(name, math.nan):.4g}" for name in shown]
        load = [f"{fraction:.1%}" for fraction in ends]
        load.append(f"{layer.shared} x 100%" if layer.shared else "none")
        table.add_row(str(layer.number), *load, *cells)
    return table


def _history(path: Path) -> dict[str, dict[int, list[tuple[int, float]]]]:
    """{metric: {layer: [(step, value), ...]}} of a run's log; empty where there is none."""
    history: dict[str, dict[int, list[tuple[int, float]]]] = {}
    if not path.is_file():
        return history
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            for column, value in row.items():
                kind, _, rest = column.partition("/metric/")
                name, _, layer = rest.rpartition("/")
                if kind == "train" and name in OVER_TIME and value:
                    lines = history.setdefault(name, {})
                    lines.setdefault(int(layer), []).append((int(row["step"]), float(value)))
    return history


def _draw(
    layers: list[Layer], history: dict[str, dict[int, list[tuple[int, float]]]], path: Path
) -> None:
    """Fractions of tokens by layer and expert, how even and sharp by layer, and what changed."""
    plt = pyplot()

    over_time = [name for name in OVER_TIME if name in history]
    count = len(BY_LAYER) + 1 + len(over_time)
    rows = -(-count // 4)
    across = -(-count // rows)
    figure, grid = plt.subplots(
        rows, across, figsize=(4.8 * across, 4.4 * rows), squeeze=False, layout="constrained"
    )
    load, *panels = grid.flat
    for panel in panels[count - 1 :]:
        panel.axis("off")
    numbers = [layer.number for layer in layers]
    # Every block has the same feed-forward, so the rows are of one length.
    fractions = [layer.fractions + [1.0] * layer.shared for layer in layers]
    image = load.imshow(fractions, aspect="auto", vmin=0, cmap="viridis")
    load.set(
        title=f"fraction of tokens (even: {layers[0].even:.1%})",
        xlabel="expert, shared ones last" if layers[0].shared else "expert",
        ylabel="layer",
    )
    load.set_yticks(range(len(numbers)), [str(number) for number in numbers])
    load.set_xticks(range(0, len(fractions[0]), -(-len(fractions[0]) // 16)))
    figure.colorbar(image, ax=load)
    for panel, (title, names) in zip(panels, BY_LAYER.items(), strict=False):
        for name in names:
            values = [layer.values.get(name, math.nan) for layer in layers]
            panel.plot(numbers, values, "o-", label=COLUMNS[name])
        panel.set(title=title, xlabel="layer")
        panel.set_xticks(numbers[:: -(-len(numbers) // 16)])
        legend(panel)
    for panel, name in zip(panels[len(BY_LAYER) :], over_time, strict=False):
        lines = history[name]
        for index, (layer, line) in enumerate(lines.items()):
            colour = plt.get_cmap("viridis")(0.9 * index / max(len(lines) - 1, 1))
            named = len(lines) <= 8 or index in (0, len(lines) - 1)  # between them by colour
            label = f"layer {layer}" if named else None
            panel.plot(*zip(*line, strict=True), color=colour, label=label)
        panel.set(title=f"{COLUMNS[name]} over time", xlabel="step")
        legend(panel)
    save(figure, path)
