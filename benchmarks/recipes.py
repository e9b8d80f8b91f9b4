"""Does a recipe work whatever the seed? Many seeds of many recipes, side by side on one device.

    python benchmarks/recipes.py                      # what configs/addition.yaml was chosen from
    python benchmarks/recipes.py --seeds 32 --recipes 1

All models read the same problems in the same order; each has weights of its own, drawn from its
seed as `fit` draws them, and a learning rate, weight decay and clipping of its own. They run as one
by `torch.func.vmap`, in float32, with AdamW written out. What is found here is confirmed by
`train.py fit` itself.
"""

from __future__ import annotations

import argparse
import itertools
import time
from typing import Any

import numpy as np
import torch
from harness import write_rows
from torch import Tensor
from torch.func import functional_call, grad_and_value, stack_module_state, vmap
from torch.nn import functional as F

import archzoo
from archzoo.tasks import Addition
from archzoo.tasks.arithmetic import exact_match
from archzoo.training.optim import decay_groups, learning_rate_schedule

BETAS, EPSILON, WARMUP = (0.9, 0.95), 1e-8, 100
CHOSEN = {"learning_rate": 2e-3, "weight_decay": 0.3, "clip": 0.3}  # configs/addition.yaml's
RATES, DECAYS, CLIPS = (2e-3, 1e-3, 1.5e-3, 3e-3), (0.3, 0.1), (0.3, 1.0)
RECIPES = [
    dict(zip(CHOSEN, choice, strict=True)) for choice in itertools.product(RATES, DECAYS, CLIPS)
]


class Models:
    """Models of one architecture that learn side by side.

    Args:
        members: What each has of its own: seed, learning_rate, weight_decay, clip.
        task: What they learn.
        preset: The architecture.
        init_std: Of its matrices.
    """

    def __init__(
        self, members: list[dict[str, Any]], task: Addition, preset: str, init_std: float
    ) -> None:
        networks = []
        for member in members:
            torch.manual_seed(member["seed"])
            networks.append(
                archzoo.create_model(
                    preset,
                    vocab_size=task.vocab_size,
                    context_length=task.context_length,
                    init_std=init_std,
                )
            )
        self.task, self.members = task, members
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        decayed = {id(p) for p in decay_groups(networks[0], 1.0)[0]["params"]}
        self.decayed = {n for n, p in networks[0].named_parameters() if id(p) in decayed}
        parameters, self.buffers = stack_module_state(networks)  # type: ignore[arg-type]
        self.parameters = {n: p.detach().to(self.device) for n, p in parameters.items()}
        self.network = networks[0].to(self.device)
        self.first = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.second = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.step = 0

    def own(self, name: str, like: Tensor | None = None) -> Tensor:
        """One number a member, (members, 1, ...)."""
        values = torch.tensor([float(m[name]) for m in self.members], device=self.device)
        return values if like is None else values.view(-1, *(1,) * (like.dim() - 1))

    def logits(self, parameters: Any, buffers: Any, batch: dict[str, Tensor]) -> Tensor:
        """Of one member."""
        arguments = (batch["tokens"],), {"documents": batch["documents"]}
        out = functional_call(self.network, (parameters, buffers), *arguments)
        logits: Tensor = out.logits
        return logits

    def learn(self, batch: dict[str, Tensor], factor: float) -> None:
        """One step of AdamW for all; `factor` is the learning rate over its peak."""

        def loss(parameters: Any, buffers: Any) -> Tensor:
            logits = self.logits(parameters, buffers, batch).flatten(0, 1)
            return F.cross_entropy(logits, batch["labels"].flatten())

        gradients, _ = vmap(grad_and_value(loss))(self.parameters, self.buffers)
        self.step += 1
        norm = sum(g.flatten(1).square().sum(1) for g in gradients.values()).sqrt()  # type: ignore[union-attr]
        clipped = (self.own("clip") / (norm + 1e-6)).clamp(max=1)
        (b1, b2), corrections = BETAS, [1 - beta**self.step for beta in BETAS]
        for name, p in self.parameters.items():
            g = gradients[name] * clipped.view(-1, *(1,) * (p.dim() - 1))
            rate = self.own("learning_rate", p) * factor
            m, v = self.first[name], self.second[name]
            m.lerp_(g, 1 - b1)
            v.mul_(b2).addcmul_(g, g, value=1 - b2)
            if name in self.decayed:
                p.mul_(1 - rate * self.own("weight_decay", p))
            p.sub_(rate * (m / corrections[0]) / ((v / corrections[1]).sqrt_() + EPSILON))

    @torch.no_grad()
    def exact_match(self, split: str, rows: int = 250) -> Tensor:
        """The share of held-out problems that each member answers right, (members,)."""
        right = []
        count = self.task.rows(split)
        for begin in range(0, count, rows):
            numbers = np.arange(begin, min(begin + rows, count))
            problems = self.task.problems(split, numbers)
            batch = self.to_device(self.task.batch(problems, width=self.task.context_length))
            answer = vmap(self.logits, in_dims=(0, 0, None))
            logits = answer(self.parameters, self.buffers, batch)
            right.append(vmap(exact_match, in_dims=(0, None))(logits, batch["labels"]))
        return torch.cat(right, dim=1).double().mean(1).cpu()

    def to_device(self, batch: Any) -> dict[str, Tensor]:
        """A batch where the models are."""
        return {name: value.to(self.device) for name, value in batch.items()}


def train(
    members: list[dict[str, Any]],
    *,
    digits: int,
    batch_size: int,
    steps: int,
    preset: str = "retnet_tiny",
    init_std: float = 0.06,
) -> list[dict[str, Any]]:
    """Train the members; a row of each, with its exact match on the test problems."""
    task = Addition(digits=digits, batch_size=batch_size)
    models = Models(members, task, preset, init_std)
    factor = learning_rate_schedule(WARMUP, steps, 0.0)
    begin, half = time.perf_counter(), torch.zeros(len(members))
    for step in range(steps):
        batch = models.to_device(task.training_batch(step, np.arange(batch_size)))
        models.learn(batch, factor(step))
        if step + 1 == steps // 2:
            half = models.exact_match("validation")
    print(f"{len(members)} models, {steps} steps: {time.perf_counter() - begin:.0f} s", flush=True)
    test = models.exact_match("test")
    shared = {"preset": preset, "batch_size": batch_size, "steps": steps}
    return [
        member | shared | {"half_way": round(float(h), 4), "exact_match": round(float(t), 4)}
        for member, h, t in zip(members, half, test, strict=True)
    ]


def show(rows: list[dict[str, Any]]) -> None:
    """A line a recipe: how many seeds pass 99 %, and the worst."""
    names = [name for name in rows[0] if name not in ("seed", "half_way", "exact_match")]
    groups: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row["exact_match"])
    for recipe, found in sorted(groups.items(), key=lambda item: -min(item[1])):
        passed = sum(value >= 0.99 for value in found)
        what = "  ".join(f"{name} {value}" for name, value in zip(names, recipe, strict=True))
        print(f"{passed} of {len(found)} seeds pass 99 %, the worst {min(found):.2%}:  {what}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=8, help="seeds of each recipe: 0, 1, ...")
    parser.add_argument("--recipes", type=int, default=len(RECIPES), help="the first so many")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--preset", default="retnet_tiny")
    given = parser.parse_args()
    members = [r | {"seed": s} for r in RECIPES[: given.recipes] for s in range(given.seeds)]
    rows = train(
        members, digits=3, batch_size=given.batch_size, steps=given.steps, preset=given.preset
    )
    show(rows)
    write_rows(
        "float32-addition-recipes",
        rows,
        on_gpu=torch.cuda.is_available(),
        replacing=("seed", *CHOSEN, "preset", "batch_size", "steps"),
    )


if __name__ == "__main__":
    main()
