"""Metrics on their way to the log: accumulated on the device, without synchronising with it.

Sums of numbers are float64 and counts int64, whatever the model and torch's default are.
"""

from __future__ import annotations

import math
import sys
import time
from typing import Any

import torch
from torch import Tensor

from archzoo.analysis.operations import utilisation
from archzoo.block import Aux
from archzoo.numerics import widest


def scalars(aux: list[Aux]) -> dict[str, Tensor]:
    """Losses and metrics by their names in the log: loss/NAME/LAYER and metric/NAME/LAYER."""
    found: dict[str, Tensor] = {}
    for number, layer in enumerate(aux):
        for kind, entries in (("loss", layer.losses), ("metric", layer.metrics)):
            found |= {f"{kind}/{name}/{number}": entry.detach() for name, entry in entries.items()}
    return found


class Transfer:
    """Numbers on their way from a device to the host, which waits for them once they are read.

    Args:
        tensors: By name, all on one device; small ones. They are read as float64 (float32 of a
            device without).
    """

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.shapes = {name: tensor.shape for name, tensor in tensors.items()}
        device = next(iter(tensors.values())).device
        wide = widest(device)
        flat = torch.cat([tensor.detach().to(wide).flatten() for tensor in tensors.values()])
        self.done: torch.cuda.Event | None = None
        if device.type == "cuda":
            self.flat = torch.empty(flat.shape, dtype=wide, pin_memory=True)
            self.flat.copy_(flat, non_blocking=True)
            self.done = torch.cuda.Event()
            self.done.record()
        else:
            self.flat = flat.cpu()

    def read(self) -> dict[str, Tensor]:
        """The numbers, by name."""
        if self.done is not None:
            self.done.synchronize()
        parts = self.flat.split([shape.numel() for shape in self.shapes.values()])
        found = zip(self.shapes.items(), parts, strict=True)
        return {name: part.view(shape) for (name, shape), part in found}


class Stopwatch:
    """Seconds since the last row of the log, pauses left out; on a GPU those of its own work.

    The host runs ahead of a GPU by as much as a step or two, and would count them for too early.

    Args:
        device: That computes.
    """

    def __init__(self, device: torch.device) -> None:
        self.of_gpu = device.type == "cuda"
        self.spans: list[tuple[Any, Any]] = []
        self.began = self._now()

    def _now(self) -> Any:
        if not self.of_gpu:
            return time.perf_counter()
        mark = torch.cuda.Event(enable_timing=True)
        mark.record()
        return mark

    def pause(self) -> None:
        """What follows is not counted."""
        self.spans.append((self.began, self._now()))

    def resume(self) -> None:
        """What follows is."""
        self.began = self._now()

    def lap(self) -> list[tuple[Any, Any]]:
        """The spans since the last lap, for `seconds` to read once the GPU is there."""
        self.pause()
        found, self.spans = self.spans, []
        self.began = found[-1][1]
        return found

    @staticmethod
    def seconds(spans: list[tuple[Any, Any]]) -> float:
        """How long they are in all."""
        total = 0.0
        for begin, end in spans:
            on_gpu = isinstance(begin, torch.cuda.Event)
            total += 1e-3 * begin.elapsed_time(end) if on_gpu else end - begin
        return total


class TrainingFigures:
    """Sums since the last row of the log, of which `means` makes the next.

    A sum is a pair, of values and of their weights, (2,); of a count it is one number.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        # Names, values and weights of what `accumulate` keeps.
        self._accumulated: tuple[tuple[str, ...], Tensor, Tensor] | None = None

    def add(
        self, name: str, value: Tensor, weight: Tensor | None = None, times: float = 1.0
    ) -> None:
        """Add a value by `times` its weight, or, without a weight, a count.

        Args:
            name: Of the figure.
            value: A scalar.
            weight: What its mean goes by. None: a count, which is summed.
            times: The weight counts so often.
        """
        entry = value.detach()
        if weight is not None:
            wide = widest(entry.device)
            entry = torch.stack([entry.to(wide), weight.to(wide) * times])
        before = self._sums.get(name)
        self._sums[name] = entry if before is None else before + entry

    def accumulate(self, scalars: dict[str, Tensor]) -> None:
        """`add`, each with weight 1: two operations for all, where one by one took three each.

        A mixture logs some ten scalars a layer. They are kept in one tensor until `sums`.
        """
        if not scalars:
            return
        names, values = tuple(scalars), torch.stack(list(scalars.values()))
        kept = self._accumulated
        if kept is None or kept[0] != names:
            self._flush()
            # A run may resume within a row of the log.
            none = torch.zeros(2, dtype=widest(values.device), device=values.device)
            table = torch.stack([self._sums.pop(name, none) for name in names])
            kept = (names, table[:, 0], table[:, 1])
        self._accumulated = (names, kept[1] + values, kept[2] + 1)

    def _flush(self) -> None:
        """Put what `accumulate` keeps among the other sums."""
        if self._accumulated is not None:
            names, sums, weights = self._accumulated
            self._sums |= dict(zip(names, torch.stack([sums, weights], dim=1), strict=True))
            self._accumulated = None

    def sums(self) -> dict[str, Tensor]:
        """All sums by name, for a checkpoint or to be added up over ranks."""
        self._flush()
        return dict(self._sums)

    def load(self, sums: dict[str, Tensor]) -> None:
        """Continue from what `sums` gave."""
        self._sums, self._accumulated = dict(sums), None

    def clear(self) -> None:
        """Begin the next row."""
        self.load({})

    def to(self, device: torch.device) -> None:
        """Move the sums to the device that training runs on."""
        self.load(
            {
                name: value.to(device, widest(device) if value.is_floating_point() else None)
                for name, value in self.sums().items()
            }
        )

    @staticmethod
    def means(
        sums: dict[str, Tensor], seconds: float, operations: float = 0.0, peak: float | None = None
    ) -> dict[str, float]:
        """A row of the log from all ranks' sums; of the tokens, their number a second, and MFU.

        Args:
            sums: `sums`, added up.
            seconds: Since the last row.
            operations: Of a token, see `archzoo.analysis.operations.training_operations`.
            peak: Operations a second of all GPUs at most. None: unknown, and MFU is left out.
        """
        row = {}
        for name, entry in sums.items():
            if name == "tokens":
                speed = row["tokens_per_second"] = entry.item() / seconds
                if operations and peak:
                    row["mfu"] = utilisation(operations, speed, peak)
            else:
                total, weight = entry.tolist()
                row[name] = total / max(weight, 1)
        return row


class EvaluationFigures:
    """Sums over one evaluation: of losses, and what was right of how many tokens or answers.

    Args:
        device: Where they are summed up.
        extra: Names of further problems that are reported by themselves, such as
            out-of-distribution lengths: `Task.extra_evaluations`.
        extra_metrics: What is reported of them: `Task.extra_metrics`.
    """

    def __init__(
        self,
        device: torch.device,
        extra: tuple[int | str, ...] = (),
        extra_metrics: tuple[str, ...] = ("exact_match",),
    ) -> None:
        self.extra = extra
        self.of_extra = [f"{metric}/{name}" for name in extra for metric in extra_metrics]
        names = ("token_accuracy", "exact_match", *self.of_extra)
        self.sums = {"loss": torch.zeros((), dtype=widest(device), device=device)}
        self.sums["bytes"] = torch.zeros((), dtype=torch.int64, device=device)
        for name in names:
            self.sums[name] = torch.zeros(2, dtype=torch.int64, device=device)

    def add(
        self,
        losses: Tensor,
        right: Tensor,
        labelled: Tensor,
        loader: int = 0,
        lengths: Tensor | None = None,
    ) -> None:
        """Add a batch.

        Args:
            losses: (tokens,), in nats.
            right: (batch, time) bool.
            labelled: (batch, time) bool: tokens with a label.
            loader: 0: the batch is of the split's own problems; the others hold the extra ones.
            lengths: (batch, time) int64, bytes of UTF-8 that each label stands for. None: it is no
                text.
        """
        rows = labelled.any(dim=1)  # rows that only pad a batch are unlabelled
        exact = (right | ~labelled).all(dim=1) & rows
        whose = f"/{self.extra[loader - 1]}" if loader else ""
        for metric, pair in (
            ("token_accuracy", (right & labelled, labelled)),
            ("exact_match", (exact, rows)),
        ):
            if metric + whose in self.sums:
                self.sums[metric + whose] += _counts(*pair)
        if not loader:
            self.sums["loss"] += losses.to(self.sums["loss"].dtype).sum()
            if lengths is not None:
                self.sums["bytes"] += (lengths * labelled).sum()

    def means(
        self, sums: dict[str, Tensor], metrics: tuple[str, ...] | None = None
    ) -> dict[str, float]:
        """A row of the log from all ranks' sums.

        Args:
            sums: `sums`, added up.
            metrics: Which ones beside the loss; None: all. Bits per byte, the nats of all targets
                over ln 2 and their bytes, are given where the batches told of bytes.
        """
        nats, size = float(sums["loss"]), int(sums["bytes"])
        pairs = sums.keys() - {"loss", "bytes"}
        seen = {name: sums[name].tolist() for name in pairs}
        loss = nats / max(seen["token_accuracy"][1], 1)
        means = {name: right / max(count, 1) for name, (right, count) in seen.items()}
        # Above that it overflows.
        values = {"loss": loss, "perplexity": math.exp(min(loss, 700)), **means}
        every = ("perplexity", "bits_per_byte", "token_accuracy", "exact_match")
        wanted = ["loss", *(every if metrics is None else metrics)]
        if size:
            values["bits_per_byte"] = nats / (math.log(2) * size)
        elif "bits_per_byte" in wanted:
            wanted.remove("bits_per_byte")
        row = {name: values[name] for name in wanted}
        row |= {name: means[name] for name in self.of_extra}
        longer = [means[f"exact_match/{name}"] for name in self.extra if isinstance(name, int)]
        if longer:
            row["exact_match/ood"] = sum(longer) / len(longer)
        return row


def mean_entropies(sums: dict[str, Tensor]) -> dict[str, float]:
    """A row of the log: how evenly the routers of adapters blend their experts, in nats.

    0 is a router that always takes one expert alone, the maximum one that blends all equally.

    Args:
        sums: As `archzoo.adapters.mixture.gate_entropies` gives them, of all ranks.

    Returns:
        gate_entropy and gate_entropy_maximum, the means over routers, and gate_entropy/LAYER. What
        is switched off sees nothing and is left out: 0 would say that it takes one expert alone.
    """
    layers: dict[str, list[float]] = {}
    most = []
    for path, entry in sums.items():
        total, number, largest = entry.tolist()
        if number:
            layers.setdefault(path.split(".")[1], []).append(total / number)
            most.append(largest / number)
    if not most:
        return {}
    every = [entropy for entropies in layers.values() for entropy in entropies]
    row = {"gate_entropy": sum(every) / len(every), "gate_entropy_maximum": sum(most) / len(most)}
    return row | {f"gate_entropy/{n}": sum(each) / len(each) for n, each in layers.items()}


def _counts(right: Tensor, labelled: Tensor) -> Tensor:
    """How many of both, (2,) int64."""
    return torch.stack([right.sum(), labelled.sum()])


def memory(device: torch.device) -> dict[str, float]:
    """Most bytes held so far, in MiB: torch's on a GPU, the whole process's elsewhere.

    That is not the model's alone, and is named for what it is. 0: unknown, as on Windows.
    """
    if device.type == "cuda":
        return {"peak_memory_mb": torch.cuda.max_memory_allocated(device) / 2**20}
    try:
        import resource
    except ImportError:
        return {"process_memory_mb": 0.0}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"process_memory_mb": peak / (2**20 if sys.platform == "darwin" else 2**10)}
