"""Direct preference optimisation: a policy learns from ranked answers, and writes none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from archzoo.block import Aux
from archzoo.preferences.answering import AnsweringModel
from archzoo.preferences.answers import read
from archzoo.preferences.losses import dpo_loss, masked_mean
from archzoo.preferences.module import LEARNT, Figures
from archzoo.preferences.reward_model import ranked
from archzoo.tasks.stream import Batch, Task


class DPO(AnsweringModel):
    """Learns from ranked answers without a reward model: `dpo_loss`, beside a reference.

    Of the answers to a question it takes the best and the worst. It logs how much likelier than in
    the reference each has become, `chosen` and `rejected` in nats: both may fall while the loss
    does. A reward model, where one is given, is read in evaluations alone.

    Source: Rafailov et al., arXiv 2305.18290.

    Args:
        beta: How strongly the policy is held to the reference.
        **settings: As for `AnsweringModel`.
    """

    objective = "DPO"

    def __init__(self, beta: float = 0.1, **settings: Any) -> None:
        super().__init__(**settings)
        if not 0 < beta < float("inf"):
            raise ValueError(f"beta={beta} must be above 0, and finite")
        self.beta = beta

    def _pairs(self, batch: Batch) -> tuple[Tensor, Figures, list[Aux], int]:
        """The loss, what is logged of the pairs, aux and the number of tokens."""
        tokens, documents = ranked(batch)
        ranks, rows = batch["ranks"], torch.arange(len(tokens), device=tokens.device)
        best, worst = ranks.argmin(dim=1), ranks.argmax(dim=1)
        differ = ranks[rows, best] != ranks[rows, worst]  # else they are as good as each other
        tokens = torch.cat([tokens[rows, best], tokens[rows, worst]])
        documents = torch.cat([documents[rows, best], documents[rows, worst]])
        places = torch.arange(tokens.shape[1] - 1, device=tokens.device)
        begins = batch["ranked_begins"].repeat(2)[:, None]
        mask = (documents[:, 1:] >= 0) & (places >= begins - 1)
        with self.net.evaluating():
            mine, _, aux = read(self.net, tokens, documents)
        with torch.no_grad():
            theirs, _, _ = read(self._beside["reference"], tokens, documents)
        policy = torch.where(mask, mine, 0).sum(dim=1)
        reference = torch.where(mask, theirs, 0).sum(dim=1)
        chosen, rejected = policy.chunk(2)
        of_chosen, of_rejected = reference.chunk(2)
        losses = dpo_loss(chosen, rejected, of_chosen, of_rejected, self.beta)
        up, down = (chosen - of_chosen).detach(), (rejected - of_rejected).detach()
        count = differ.sum()
        figures: Figures = {
            "accuracy": (((up > down) & differ).sum(), count),
            "chosen": ((up * differ).sum(), count),
            "rejected": ((down * differ).sum(), count),
        }
        return masked_mean(losses, differ), figures, aux, int((documents >= 0).sum())

    def step(self, batch: Batch, number: int) -> tuple[Tensor, int, list[Aux]]:
        loss, figures, aux, tokens = self._pairs(batch)
        self.note(figures)
        self.spend(passes=(LEARNT + 1) * tokens)  # the reference's is one
        return loss, tokens, aux

    def measure(self, batch: Batch, number: int) -> Figures:
        loss, figures, _, _ = self._pairs(batch)
        rows = len(batch["tokens"])
        return {"loss": (loss * rows, rows), **super().measure(batch, number), **figures}

    def check_task(self, task: Task, accumulated: int) -> None:
        super().check_task(task, accumulated)
        ranked(task.train_dataloader().batch(0))

    def measures(self, task: Task) -> tuple[str, ...]:
        return (*super().measures(task), "accuracy", "chosen", "rejected")
