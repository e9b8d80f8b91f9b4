"""What the objectives of this package share: how they are trained, measured and saved."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from archzoo.block import Aux
from archzoo.checkpoint import check_finite, load
from archzoo.checkpoint.digest import weights_digest
from archzoo.decoder import Decoder
from archzoo.numerics import widest
from archzoo.tasks.stream import Batch, Task
from archzoo.training.log import scalars
from archzoo.training.module import LanguageModel
from archzoo.training.ranks import pooled_losses

Figures = dict[str, tuple[Tensor, Tensor | int]]  # by name: a sum, and the number of its terms
COSTS = ("passes", "written", "seconds")  # of training
LEARNT = 3  # passes of a token that is learnt from: forwards, and twice as much work backwards


class PreferenceModel(LanguageModel):
    """A `LanguageModel` with another loss, a scalar head perhaps, and models that stay as they are.

    A class of it says its loss in `step` and what an evaluation measures in `measure`.

    Args:
        **settings: As for `LanguageModel`.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        if self._weights is None:
            raise ValueError(
                f"objective {self.objective} begins from trained weights: give --model.weights "
                "CHECKPOINT"
            )
        for name in ("distil", "progressive_loss"):
            if getattr(self, name):
                raise ValueError(f"objective {self.objective} has a loss of its own: omit {name}")
        #: What is trained beside the decoder, by name.
        self.heads = nn.ModuleDict()
        #: What training has cost so far, by `COSTS`: tokens through a model, of which each counts 1
        #: and 3 with its gradient, whichever model it is; tokens that were written; and seconds
        #: without evaluations.
        self.cost: dict[str, Any] = dict.fromkeys(COSTS, 0)

    def add_head(self, name: str) -> nn.Linear:
        """A number read off each vector before the decoder's head; it starts as 0 everywhere."""
        head = nn.Linear(self.net.dim, 1).to(self.net.dtype)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        self.heads[name] = head
        return head

    # What a class says.

    def step(self, batch: Batch, number: int) -> tuple[Tensor, int, list[Aux]]:
        """The loss of an optimizer step, the tokens that it took, and the aux of each layer.

        Args:
            batch: Of the task.
            number: Optimizer steps done before.
        """
        raise NotImplementedError

    def measure(self, batch: Batch, number: int) -> Figures:
        """What an evaluation sums up of a batch; `loss` must be among it.

        Args:
            batch: Of the task.
            number: Of the batch.
        """
        raise NotImplementedError

    # Training.

    def setup(self, stage: str) -> None:
        if self.trainer.world_size > 1:
            raise ValueError(
                f"objective {self.objective} trains on one device: take --trainer.devices 1"
            )
        super().setup(stage)
        if stage == "fit":  # before a checkpoint is read
            assert self.task is not None
            self.check_task(self.task, self.trainer.accumulate_grad_batches)
            self.cost = dict.fromkeys(COSTS, 0)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self._sums = [{} for _ in range(self.net.depth)]
        loss, tokens, aux = self.step(batch, self.trainer.global_step)
        one = torch.ones((), device=loss.device)
        self.figures.add("loss", loss, one)
        pooled = pooled_losses(self.trainer, self.net, aux)
        values = [value for layer in (*aux, *pooled) for value in layer.losses.values()]
        if values:
            loss = loss + torch.stack(values).sum()
        for mine, layer in zip(self._sums, aux, strict=True):
            for name, value in layer.sums.items():
                mine[name] = mine.get(name, 0) + value.detach()
        self.figures.accumulate(scalars(aux) | scalars(pooled))
        self.figures.add("tokens", torch.full((), tokens, device=self.device))
        self._watch(loss.detach())
        return loss

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        began = time.perf_counter()
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.spend(seconds=time.perf_counter() - began)

    def spend(self, **what: Any) -> None:
        """Add to what training has cost, by the names of `COSTS`; numbers may lie on the device."""
        for name, amount in what.items():
            self.cost[name] = self.cost[name] + amount

    def note(self, figures: Figures) -> None:
        """Log means over the steps since the last row."""
        for name, (total, count) in figures.items():
            count = torch.as_tensor(count, device=total.device)
            self.figures.add(name, total, count)

    def configure_optimizers(self) -> Any:
        found = super().configure_optimizers()
        heads = list(self.heads.parameters())
        if heads:
            optimizer, scheduler = found["optimizer"], found["lr_scheduler"]["scheduler"]
            group = {"params": heads, "weight_decay": 0.0, "lr": self.learning_rate}
            optimizer.add_param_group(group)
            found["lr_scheduler"]["scheduler"] = torch.optim.lr_scheduler.LambdaLR(
                optimizer, scheduler.lr_lambdas[0]
            )
        return found

    # Evaluation.

    def _begin_evaluation(self, split: str) -> None:
        super()._begin_evaluation(split)
        self._evaluated: Any = Sums(self.device)

    def _evaluate(self, batch: Batch, split: str, number: int, loader: int = 0) -> None:
        if not loader:  # further sets have an exact match alone, of labels
            self._evaluated.add(self.measure(batch, number))

    # Checkpoints.

    def state(self) -> dict[str, Any]:
        """What resuming takes beside weights and optimizer: tensors and plain data."""
        return {}

    def take_up(self, state: dict[str, Any]) -> None:
        """Continue from what `state` gave."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        # Apart from the decoder's, so that the checkpoint is a language model's to all else.
        mine = [name for name in checkpoint["state_dict"] if name.startswith("heads.")]
        heads = {name: checkpoint["state_dict"].pop(name) for name in mine}
        checkpoint["objective"] = {
            "name": self.objective,
            "heads": heads,
            "state": self.state(),
            "cost": {name: float(amount) for name, amount in self.cost.items()},
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        own = {name: t for name, t in self.state_dict().items() if name.startswith("heads.")}
        resumes = self._trainer is not None and self.trainer.state.fn == "fit"
        held = checkpoint.get("objective")
        if not isinstance(held, dict) or held.get("name") != self.objective:
            checkpoint["state_dict"] |= own  # such as a language model's: it is measured
            return
        heads, state = held.get("heads"), held.get("state")
        if not isinstance(heads, dict) or not isinstance(state, dict):
            raise ValueError("the checkpoint's objective is damaged: it holds no heads or no state")
        if resumes and heads.keys() != own.keys():
            theirs, mine = (", ".join(sorted(names)) or "none" for names in (heads, own))
            raise ValueError(
                f"the checkpoint's run trains other heads beside the model ({theirs}) than this "
                f"one ({mine}), as another method does: resume with the same, or start a new run "
                "from it by --model.weights"
            )
        checkpoint["state_dict"] |= own | {n: t for n, t in heads.items() if n in own}
        self.cost = cost_in(held)
        if resumes:
            self.take_up(state)


def cost_in(held: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint says that its training has cost; 0 where it does not.

    Args:
        held: Its `objective`.
    """
    found = held.get("cost")
    found = found if isinstance(found, dict) else {}
    known = {name: found.get(name) for name in COSTS}
    return {
        name: amount if isinstance(amount, float) and math.isfinite(amount) else 0.0
        for name, amount in known.items()
    }


class Sums:
    """Sums over one evaluation, of which `means` makes a row of the log.

    Args:
        device: Where they are summed up.
    """

    def __init__(self, device: torch.device) -> None:
        self.wide = widest(device)
        self.sums: dict[str, Tensor] = {}

    def add(self, figures: Figures) -> None:
        """Add a batch's sums and how many terms each has."""
        for name, (total, count) in figures.items():
            pair = torch.stack([total.to(self.wide), torch.as_tensor(count).to(total.device)])
            self.sums[name] = self.sums[name] + pair if name in self.sums else pair

    @staticmethod
    def means(sums: dict[str, Tensor], metrics: Any = None) -> dict[str, float]:
        """The mean of each, by name.

        Args:
            sums: `sums`.
            metrics: Not looked at: the objective says what is measured.
        """
        return {name: (pair[0] / pair[1].clamp(min=1)).item() for name, pair in sums.items()}


class Beside:
    """Models that stay as they are, beside the one that is trained and on its device.

    They are no submodules: no checkpoint holds them, no optimizer and no mode reaches them.

    Args:
        module: The one that is trained.
    """

    def __init__(self, module: LanguageModel) -> None:
        self.module = module
        self._held: dict[str, nn.Module] = {}

    def add(self, name: str, part: nn.Module) -> None:
        """Freeze a model, and put it into evaluation mode for good."""
        self._held[name] = part.requires_grad_(False).eval()

    def __getitem__(self, name: str) -> Any:
        return self._held[name].to(self.module.device)

    def __contains__(self, name: str) -> bool:
        return name in self._held

    def digests(self) -> dict[str, str]:
        """By which a resumed run knows them again."""
        return {name: weights_digest(part.state_dict()) for name, part in self._held.items()}


def load_beside(
    module: LanguageModel, path: str, what: str, setting: str, task: Task | None = None
) -> Decoder:
    """A model of the same vocabulary as the one that is trained.

    Args:
        module: That is trained.
        path: A checkpoint.
        what: For messages.
        setting: Where the path stands.
        task: That it is trained on. None: the trainer's.

    Raises:
        ValueError: Its vocabulary is another one, or a weight is not finite.
    """
    found = load(path, "cpu")
    check_finite(found.model.state_dict(), path)
    task = module.task if task is None else task
    mine = task.tokenizer.files() if task is not None else None
    theirs = None if found.tokenizer is None else found.tokenizer.files()
    if found.model.vocab_size != module.net.vocab_size:
        differ = f"it knows {found.model.vocab_size} tokens and the policy {module.net.vocab_size}"
    elif mine is not None and theirs is not None and mine != theirs:
        differ = "its tokens stand for other texts"
    else:
        decoder = found.model
        if task is not None:
            decoder.bind(task)
        return decoder
    raise ValueError(
        f"the {what} {path} has another vocabulary: {differ}; give --model.{setting} one that was "
        "trained with the policy's"
    )
