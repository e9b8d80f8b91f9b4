"""Merging: one model of several that were trained from one checkpoint, without training.

``theta_k`` are the models' weights, ``b`` those that all of them began from, ``d_k = theta_k - b``
(the task vectors), ``w_k`` the models' weights in the merge and ``s`` the scale::

    linear            sum_k w_k theta_k / sum_k w_k         Wortsman et al., arXiv 2203.05482
    slerp             along the great circle between two    Shoemake, SIGGRAPH 1985
    task_arithmetic   b + s sum_k w_k d_k                   Ilharco et al., arXiv 2212.04089
    ties              b + s (trim, elect, merge)(d)         Yadav et al., arXiv 2306.01708, alg. 1
    dare              b + s sum_k w_k drop(d_k)             Yu et al., arXiv 2311.03099, eq. 1, 2
    dare_ties         b + s (elect, merge)(drop(d))

``dare_linear`` is another name of ``dare``. Weights are read, merged in float64 and let go of one
at a time, so that a merge holds its result and not its parts.

mergekit and MergeLM depart from the papers here and there; ``docs/merging.md`` says where.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from archzoo.checkpoint import save_pretrained
from archzoo.checkpoint.archives import Stored
from archzoo.checkpoint.building import build_with, names_of_each
from archzoo.checkpoint.digest import own_weights
from archzoo.checkpoint.opened import Opened, check_alike, common_ancestor, open_model
from archzoo.checkpoint.pretrained import new_directory
from archzoo.decoder import Decoder
from archzoo.linear import Linear
from archzoo.tasks.several import joint_task

Method = Literal["linear", "slerp", "task_arithmetic", "ties", "dare", "dare_linear", "dare_ties"]
METHODS: tuple[str, ...] = get_args(Method)
DROPS, ELECTS = ("dare", "dare_linear", "dare_ties"), ("ties", "dare_ties")
NEEDS_BASE = ("task_arithmetic", "ties", *DROPS)
NEARLY_PARALLEL = 0.9995  # |cos| from which on slerp is a straight line
NEARLY_NOTHING = 1e-8  # the norm below which a tensor has no direction


# ---------------------------------------------------------------------------- the methods


def linear(tensors: Sequence[Tensor], weights: Sequence[float], normalize: bool = True) -> Tensor:
    """The weighted mean of tensors of one shape.

    Args:
        tensors: One of each model.
        weights: Of the models.
        normalize: Divide by the weights' sum; without it, it is the weighted sum.
    """
    total = sum(weights) if normalize else 1.0
    return sum_of(tensors, weights) / total


def sum_of(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """``sum_k w_k t_k``; a weight of 0 leaves its tensor out."""
    found = torch.zeros_like(tensors[0])
    for tensor, weight in zip(tensors, weights, strict=True):
        if weight:
            found += weight * tensor
    return found


def slerp(first: Tensor, second: Tensor, t: float) -> Tensor:
    """From `first` (t = 0) to `second` (t = 1) along the great circle between their directions.

    ``(sin((1 - t) W) a + sin(t W) b) / sin W``, W the angle between the flattened tensors. The
    straight line where they are nearly parallel or opposite, or one of them is nearly nothing.

    Args:
        first: a.
        second: b, of the same shape.
        t: Share of the way.
    """
    norms = first.norm(), second.norm()
    if min(norms) > NEARLY_NOTHING:
        cosine = float((first / norms[0] * (second / norms[1])).sum())
        if abs(cosine) <= NEARLY_PARALLEL:
            angle = math.acos(cosine)
            one, other = math.sin((1 - t) * angle), math.sin(t * angle)
            return (one * first + other * second) / math.sin(angle)
    return torch.lerp(first, second, t)


def trim(delta: Tensor, keep: int) -> Tensor:
    """A change with its `keep` largest entries by magnitude alone; of equal ones the first."""
    order = delta.flatten().abs().argsort(descending=True, stable=True)
    kept = torch.zeros_like(delta).flatten()
    kept[order[:keep]] = delta.flatten()[order[:keep]]
    return kept.view_as(delta)


def kept_count(count: int, density: float) -> int:
    """How many of so many entries a density keeps: at least one."""
    return max(1, round(density * count))


def drop(delta: Tensor, density: float, mask: Tensor, rescale: bool = True) -> Tensor:
    """DARE: ``m * d / density``, m 1 where an entry is kept, which is d in expectation.

    Args:
        delta: d.
        density: The probability of 1, ``1 - p`` in the paper.
        mask: m, bool, of d's shape.
        rescale: Divide; without it what is kept stays as it is.
    """
    kept = torch.where(mask, delta, 0)
    return kept / density if rescale else kept


def elect_and_merge(
    deltas: Sequence[Tensor], weights: Sequence[float], normalize: bool = True
) -> Tensor:
    """TIES: of each entry the weighted mean of those changes whose sign wins.

    The sign of ``sum_k w_k d_k`` is elected, and the entries of that sign are merged: ``sum w d /
    sum w`` over them, or their sum without `normalize`. Where changes cancel no sign is elected,
    and nothing changes.

    Args:
        deltas: d, one of each model.
        weights: w, of the models.
        normalize: Take the mean.
    """
    stacked = torch.stack(list(deltas))
    shape = (-1, *[1] * deltas[0].dim())
    factors = torch.tensor(weights, dtype=stacked.dtype).view(shape)
    weighted = factors * stacked
    sign = weighted.sum(dim=0).sign()
    agree = (stacked.sign() == sign) & (sign != 0)
    merged = torch.where(agree, weighted, 0).sum(dim=0)
    if normalize:
        total = (factors * agree).sum(dim=0)
        merged = merged / torch.where(total == 0, 1.0, total)
    return merged


def mask_of(seed: int, model: int, name: str, shape: Sequence[int], density: float) -> Tensor:
    """DARE's mask: each entry is kept with probability `density`, independently of all others.

    It depends on these arguments alone, and so not on the order in which weights are merged.

    Args:
        seed: Of the merge.
        model: Which of the models.
        name: Of the weight.
        shape: Of the weight.
        density: The probability of 1.
    """
    words = hashlib.sha256(f"{seed} {model} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(words[:7], "little"))
    return torch.rand(tuple(shape), generator=generator, dtype=torch.float64) < density


# ---------------------------------------------------------------------------- settings


@dataclass(frozen=True)
class Merge:
    """How models are merged.

    Args:
        method: One of `METHODS`.
        weights: Of the models, w_k in the formulas above. None: 1 each. slerp takes both models'
            share of the way: weights 3 and 1 stop after a quarter of it.
        density: Share of each change that is kept: its largest entries by ties, entries drawn at
            random by dare. None: 0.2 for ties, the paper's; dare must be told.
        scale: s in the formulas.
        normalize: Divide by the sum of the weights. None: as linear, ties and dare_ties do.
        rescale: Let dare divide what is kept by the density, as its paper does.
        trim: What the density of ties is a share of: the whole model's entries, as in the paper,
            or each tensor's.
        seed: Of the entries that dare drops.

    Raises:
        ValueError: A number is out of its range, or means nothing to the method.
    """

    method: str = "linear"
    weights: tuple[float, ...] | None = None
    density: float | None = None
    scale: float = 1.0
    normalize: bool | None = None
    rescale: bool = True
    trim: Literal["model", "tensor"] = "model"
    seed: int = 0

    def __post_init__(self) -> None:
        method, density = self.method, self.density
        if method not in METHODS:
            raise ValueError(f"method={method!r} is not one of {', '.join(METHODS)}")
        if self.trim not in ("model", "tensor"):
            raise ValueError(f"trim={self.trim!r} is neither model nor tensor")
        if density is not None and not 0 < density <= 1:
            raise ValueError(
                f"density={density} is the share of each change that is kept: take more than 0, "
                "and at most 1"
            )
        if density is not None and method not in (*DROPS, "ties"):
            raise ValueError(
                f"density={density} means nothing to {method}, which keeps all: omit it"
            )
        if density is None and method in DROPS:
            raise ValueError(
                f"{method} needs a density, the share of each change that is kept: the paper keeps "
                "0.1 where changes are small (--density 0.1)"
            )
        if not math.isfinite(self.scale):
            raise ValueError(f"scale={self.scale} is not finite")
        if self.scale != 1 and method not in NEEDS_BASE:
            raise ValueError(
                f"scale={self.scale} means nothing to {method}, which takes no difference from a "
                "base: omit it"
            )
        for name, given, taken_by in (
            ("normalize", self.normalize is not None, [m for m in METHODS if m != "slerp"]),
            ("rescale", not self.rescale, DROPS),
            ("trim", self.trim != "model", ["ties"]),
        ):
            if given and method not in taken_by:
                raise ValueError(
                    f"{name}={getattr(self, name)} means nothing to {method}: it is for "
                    f"{', '.join(taken_by)}; omit it"
                )
        if self.weights is not None:
            self._check_weights(self.weights)

    def _check_weights(self, weights: tuple[float, ...]) -> None:
        said = ", ".join(f"{weight:g}" for weight in weights)
        if not all(math.isfinite(weight) for weight in weights):
            raise ValueError(f"weights={said} are not all finite")
        if self.method in (*ELECTS, "slerp") and (min(weights) < 0 or not any(weights)):
            raise ValueError(
                f"weights={said}: {self.method} takes weights of at least 0, and one above 0"
            )
        if self.normalizes and sum(weights) == 0:
            raise ValueError(
                f"weights={said} sum to 0, by which {self.method} divides: omit one, or set "
                "normalize to false"
            )

    @property
    def normalizes(self) -> bool:
        """Whether the sum of the weights is divided by."""
        usual = self.method in ("linear", *ELECTS)
        return usual if self.normalize is None else self.normalize

    def of(self, count: int) -> tuple[float, ...]:
        """The weights of so many models.

        Raises:
            ValueError: There are others, or the method takes another number of models.
        """
        if self.method == "slerp" and count != 2:
            raise ValueError(f"slerp goes from one model to another, and {count} are given")
        if count < 2 and self.method not in NEEDS_BASE:
            raise ValueError(f"{self.method} takes two models or more, and {count} is given")
        if self.weights is not None and len(self.weights) != count:
            raise ValueError(
                f"{len(self.weights)} weights are given for {count} models: give each model one, "
                "in their order"
            )
        return self.weights or (1.0,) * count


class Merger:
    """Gives each merged weight of models of one architecture, by its name.

    Args:
        settings: How.
        models: Their weights by name.
        base: The weights that they began from; None for methods that need none.
        sizes: Entries of each tensor, by its name: of tied weights one.
        stacked: Which of them are stacks of experts' matrices, each a tensor of its own.

    Raises:
        ValueError: The settings do not fit the models.
    """

    def __init__(
        self,
        settings: Merge,
        models: Sequence[Callable[[str], Tensor]],
        base: Callable[[str], Tensor] | None,
        sizes: Mapping[str, int],
        stacked: frozenset[str] = frozenset(),
    ) -> None:
        self.settings, self.models, self.base, self.stacked = settings, models, base, stacked
        self.weights = settings.of(len(models))
        if base is None and settings.method in NEEDS_BASE:
            raise ValueError(
                f"{settings.method} merges what models have learned since they began: give the "
                "checkpoint that all of them were trained from, --base CHECKPOINT"
            )
        self.kept: list[dict[str, int]] = []
        self.least: list[float] = []
        if settings.method == "ties" and settings.trim == "model":
            for model in models:
                self._find_least(model, sizes)

    @property
    def density(self) -> float:
        """Of ties and dare."""
        return 0.2 if self.settings.density is None else self.settings.density

    def __call__(self, name: str) -> Tensor:
        """One merged weight, in the widest dtype that it has in a model.

        Raises:
            ValueError: It is not finite.
        """
        found = [model(name) for model in self.models]
        dtype = found[0].dtype
        for tensor in found[1:]:
            dtype = torch.promote_types(dtype, tensor.dtype)
        merged = self._merged(name, [tensor.double() for tensor in found]).to(dtype)
        if not merged.isfinite().all():
            kind = str(dtype).removeprefix("torch.")
            raise ValueError(
                f"{name} is not finite once it is merged, in {kind}: take a smaller scale, or "
                "smaller weights"
            )
        return merged

    def _merged(self, name: str, tensors: list[Tensor]) -> Tensor:
        """One merged weight of the models' tensors, in float64."""
        method = self.settings.method
        if method == "linear":
            return linear(tensors, self.weights, self.settings.normalizes)
        if method == "slerp":
            t = self.weights[1] / sum(self.weights)
            pairs = zip(*(self._matrices(name, tensor) for tensor in tensors), strict=True)
            return torch.stack([slerp(a, b, t) for a, b in pairs]).view_as(tensors[0])
        assert self.base is not None
        base = self.base(name).double()
        deltas = [tensor - base for tensor in tensors]
        deltas = [self._thinned(name, number, delta) for number, delta in enumerate(deltas)]
        if method in ELECTS:
            change = elect_and_merge(deltas, self.weights, self.settings.normalizes)
        else:
            change = linear(deltas, self.weights, self.settings.normalizes)
        return base + self.settings.scale * change

    def _matrices(self, name: str, tensor: Tensor) -> list[Tensor]:
        """What methods see as one tensor: of a stack every expert's matrix."""
        return list(tensor.unbind()) if name in self.stacked else [tensor]

    def _thinned(self, name: str, number: int, delta: Tensor) -> Tensor:
        """A model's change with what the method keeps of it alone."""
        settings = self.settings
        if settings.method in DROPS:
            mask = mask_of(settings.seed, number, name, delta.shape, self.density)
            return drop(delta, self.density, mask, settings.rescale)
        if settings.method != "ties":
            return delta
        if settings.trim == "model":
            size, equal = delta.abs(), self.kept[number][name]
            kept = torch.where(size > self.least[number], delta, 0).flatten()
            ties = (size == self.least[number]).flatten().nonzero()[:equal, 0]
            kept[ties] = delta.flatten()[ties]
            return kept.view_as(delta)
        parts = [trim(p, kept_count(p.numel(), self.density)) for p in self._matrices(name, delta)]
        return torch.stack(parts).view_as(delta)

    def _find_least(self, model: Callable[[str], Tensor], sizes: Mapping[str, int]) -> None:
        """The least magnitude that is kept of all of a model's changes.

        Beside it stands how many entries of just that magnitude each tensor keeps, so that all
        keep as many as the density says. This takes the memory of the model once, in float64.
        """
        assert self.base is not None
        flat = torch.empty(sum(sizes.values()), dtype=torch.float64)
        parts = dict(zip(sizes, flat.split(list(sizes.values())), strict=True))
        for name, part in parts.items():
            part.copy_((model(name).double() - self.base(name).double()).abs().flatten())
        keep = kept_count(len(flat), self.density)
        least = flat.kthvalue(len(flat) - keep + 1).values
        free = keep - int((flat > least).sum())
        kept = {}
        for name, part in parts.items():
            kept[name] = min(free, int((part == least).sum()))
            free -= kept[name]
        self.least.append(float(least))
        self.kept.append(kept)


# ---------------------------------------------------------------------------- models


def merge(models: Sequence[Decoder], base: Decoder | None = None, **settings: Any) -> Decoder:
    """One model of several in memory, which stay as they are.

    Whether they began from one checkpoint is not asked here; `archzoo merge` asks the files.

    Args:
        models: Of one architecture and vocabulary.
        base: What all of them were trained from, for methods that take differences.
        **settings: As `Merge` takes them: method, weights, density, ...

    Raises:
        ValueError: The models differ in more than their weights, or the settings do not fit.
    """
    how = Merge(**settings)
    every = [*models, *([] if base is None else [base])]
    held = [own_weights(model) for model in every]
    for model, weights in zip(every, held, strict=True):
        for name in held[0].keys() | weights.keys():
            ours, theirs = held[0].get(name), weights.get(name)
            if ours is None or theirs is None or ours.shape != theirs.shape:
                raise ValueError(f"{name} is not the same weight in all models: merge models alike")
        if model.config != models[0].config:
            names = [n for n, value in model.config.items() if value != models[0].config[n]]
            raise ValueError(f"the models differ in {', '.join(names)}: merge models alike")
    merged = copy.deepcopy(models[0])
    target = own_weights(merged)
    unique = {group[0]: target[group[0]] for group in names_of_each(target)}
    sizes = {name: tensor.numel() for name, tensor in unique.items()}
    reads = [lambda name, weights=weights: weights[name].detach().cpu() for weights in held]
    begun = reads[-1] if base is not None else None
    merger = Merger(how, reads[: len(models)], begun, sizes, stacks_of(merged))
    with torch.no_grad():
        for name, tensor in unique.items():
            tensor.copy_(merger(name))
    return merged


def merge_opened(models: Sequence[Opened], base: Opened | None, settings: Merge) -> Decoder:
    """The merge of checkpoints that are alike, see `archzoo.checkpoint.opened`.

    Args:
        models: Whose weights are merged.
        base: What they were trained from, for methods that take differences.
        settings: How.

    Raises:
        ValueError: A weight is not finite or not of floats, or the settings do not fit.
    """
    every = [*models, *([] if base is None else [base])]
    for opened in every:
        for name, entry in opened.held.items():
            if name in opened.names() and not entry.dtype.is_floating_point:
                kind = str(entry.dtype).removeprefix("torch.")
                raise ValueError(
                    f"{opened.path}: {name} is {kind}: only weights of floats have a mean; merge "
                    "the models from before they were packed, or omit what counts"
                )
    first = models[0]
    names = first.names()
    unique = list(dict.fromkeys(names.values()))
    reads = [opened.weights.finite for opened in every]
    begun = reads[-1] if base is not None else None
    sizes = {name: math.prod(first.held[name].shape) for name in unique}
    merger = Merger(settings, reads[: len(models)], begun, sizes, stacks_of(first.model))
    held = {}
    for name in unique:
        entry = first.held[name]
        for other in models[1:]:
            dtype = torch.promote_types(entry.dtype, other.held[name].dtype)
            entry = Stored(entry.shape, dtype)
        held[name] = entry
    config = first.model.config | {"context_length": _longest(models)}
    merged = build_with(config, held, merger, names, Path(first.path), None)
    merged.task = first.task
    return merged


def stacks_of(model: Decoder) -> frozenset[str]:
    """The names of those weights that are stacks of experts' matrices."""
    return frozenset(
        f"{path}.weight"
        for path, module in model.named_modules()
        if isinstance(module, Linear) and module.stack is not None
    )


def _longest(models: Sequence[Opened]) -> int | None:
    lengths = [model.model.context_length for model in models]
    return max((length for length in lengths if length is not None), default=None)


def record(
    settings: Mapping[str, Any], models: Sequence[Opened], base: Opened | None
) -> dict[str, Any]:
    """What a merged model says of how it was made: plain data.

    Args:
        settings: By name, as they are written.
        models: What it was made of.
        base: What those were trained from, or None.
    """
    return {
        **settings,
        "models": [{"path": model.path, "digest": model.digest} for model in models],
        "base": None if base is None else {"path": base.path, "digest": base.digest},
    }


def task_of_all(models: Sequence[Opened]) -> tuple[dict[str, Any] | None, str]:
    """The task that a model made of several is tested on, and what to say of it."""
    tasks = [model.task for model in models if model.task is not None]
    if not tasks:
        return None, ""
    if (joint := joint_task(tasks)) is not None:
        names = joint["init_args"].get("tasks")
        several = isinstance(names, dict) and any(task != joint for task in tasks)
        return joint, f"its task: the problems of {' and '.join(names)}" if several else ""
    owner = next(model.path for model in models if model.task is not None)
    return tasks[0], (
        f"the models were trained on several tasks: its task is that of {owner}; test --data "
        "TASK names another"
    )


def merge_command(
    checkpoints: list[str],
    /,
    out: str | None = None,
    base: str | None = None,
    method: Method = "linear",
    weights: list[float] | None = None,
    density: float | None = None,
    scale: float = 1.0,
    normalize: bool | None = None,
    rescale: bool = True,
    trim: Literal["model", "tensor"] = "model",
    seed: int = 0,
) -> None:
    """Make one model of several that were trained from one checkpoint, without training.

    Each is a run's directory, a .ckpt file, or a directory of archzoo.save_pretrained. They must be
    of one architecture, one vocabulary and one ancestor, by the digest that their files record.

    Args:
        checkpoints: The models.
        out: The directory that is written; there must be none yet.
        base: What all of them were trained from: ties, dare and task_arithmetic need it, and
            models without a record of it are taken to be from it.
        method: linear (weighted mean), slerp (two models), task_arithmetic, ties, dare, which is
            dare_linear too, or dare_ties.
        weights: Of the models, in their order: --weights 0.7 0.3. None: 1 each.
        density: Share of each change that is kept: the largest by ties [0.2], random ones by dare.
        scale: Of the merged change, for methods that need a base.
        normalize: Divide by the sum of the weights. None: as linear, ties and dare_ties do.
        rescale: Let dare divide what is kept by the density, as its paper does.
        trim: The density of ties is a share of the whole model's entries, or of each tensor's.
        seed: Of the entries that dare drops.

    Raises:
        FileNotFoundError: The checkpoint does not exist.
        FileExistsError: There is something where the model is to be written.
        ValueError: The models do not belong together, one is damaged or has weights that are not
            finite, or a setting is out of its range.
    """
    target = new_directory(out, "archzoo merge A B --base X")
    given = tuple(weights) if weights is not None else None
    settings = Merge(method, given, density, scale, normalize, rescale, trim, seed)
    used = settings.of(len(checkpoints))
    with ExitStack() as stack:
        models = [stack.enter_context(open_model(path)) for path in checkpoints]
        origin = None if base is None else stack.enter_context(open_model(base))
        check_alike([*models, *([] if origin is None else [origin])])
        ancestor, line = common_ancestor(models, origin)
        if line:
            print(line)
        merged = merge_opened(models, origin, settings)
        merged.base = ancestor
        merged.merged = record(
            {
                "method": method,
                "weights": list(used),
                "density": density,
                "scale": scale,
                "normalize": settings.normalizes,
                "rescale": rescale,
                "trim": trim,
                "seed": seed,
            },
            models,
            origin,
        )
        tokenizer = next((m.tokenizer for m in models if m.tokenizer is not None), None)
        merged.task, about = task_of_all(models)
    save_pretrained(target, merged, tokenizer, merged.task)
    parts = " + ".join(f"{weight:g} {path}" for weight, path in zip(used, checkpoints, strict=True))
    print(f"{target}: {merged.parameter_count():,} parameters, {method} of {parts}")
    if about:
        print(about)
