"""A reward model: a decoder with a scalar head, trained on ranked answers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from archzoo.block import Aux
from archzoo.checkpoint import check_finite, read_safely
from archzoo.checkpoint.loading import locate
from archzoo.decoder import Decoder
from archzoo.preferences.answers import last_places
from archzoo.preferences.losses import ranking_accuracy, ranking_loss
from archzoo.preferences.module import (
    LEARNT,
    Figures,
    PreferenceModel,
    cost_in,
    load_beside,
)
from archzoo.tasks.stream import Batch, Task
from archzoo.training.module import LanguageModel


def last_rewards(
    decoder: Decoder, head: nn.Module, tokens: Tensor, documents: Tensor
) -> tuple[Tensor, list[Aux]]:
    """The reward of each text, read at its last token, (batch,); and aux.

    Args:
        decoder: Of the reward model.
        head: To one number.
        tokens: (batch, time).
        documents: (batch, time), -1 at padding.
    """
    x, _, aux = decoder.hidden(tokens, documents=documents)
    ends = last_places(documents >= 0)
    last = x[torch.arange(len(x), device=x.device), ends]
    rewards: Tensor = head(last)[:, 0]
    return rewards.float() if rewards.dtype.itemsize < 4 else rewards, aux


class RewardModel(PreferenceModel):
    """Learns which of several answers people prefer: `ranking_loss`, a scalar at the last token.

    It begins from the weights of a language model, whose head it leaves as it is. Its rewards are
    known up to a constant: after each validation that is chosen so that the answers of the
    validation data have a mean reward of 0.

    Args:
        margin: By how much the better of two answers shall be ahead.
        centre: Weight of a term that keeps rewards near 0: see `ranking_loss`.
        **settings: As for `LanguageModel`.
    """

    objective = "RewardModel"

    def __init__(self, margin: float = 0.0, centre: float = 0.0, **settings: Any) -> None:
        super().__init__(**settings)
        if not 0 <= centre < math.inf:
            raise ValueError(f"centre={centre} must be at least 0, and finite")
        if not math.isfinite(margin):
            raise ValueError(f"margin={margin} must be finite")
        self.margin, self.centre = margin, centre
        self.add_head("reward")
        #: The mean reward of the validation data, which is taken off.
        self.mean = 0.0

    def rewards(self, batch: Batch) -> tuple[Tensor, list[Aux]]:
        """Of the ranked answers of a batch, (batch, answers); and aux."""
        tokens, documents = ranked(batch)
        found, aux = last_rewards(
            self.net, self.heads["reward"], tokens.flatten(0, 1), documents.flatten(0, 1)
        )
        return found.view(tokens.shape[:2]), aux

    def step(self, batch: Batch, number: int) -> tuple[Tensor, int, list[Aux]]:
        rewards, aux = self.rewards(batch)
        self.note({"accuracy": ranking_accuracy(rewards.detach(), batch["ranks"])})
        loss = ranking_loss(rewards, batch["ranks"], self.margin, self.centre)
        tokens = int((batch["ranked_documents"] >= 0).sum())
        self.spend(passes=LEARNT * tokens)
        return loss, tokens, aux

    def measure(self, batch: Batch, number: int) -> Figures:
        rewards, _ = self.rewards(batch)
        loss = ranking_loss(rewards, batch["ranks"], self.margin, self.centre)
        return {
            "loss": (loss * len(rewards), len(rewards)),
            "accuracy": ranking_accuracy(rewards, batch["ranks"]),
            "reward": (rewards.sum(), rewards.numel()),
        }

    def check_task(self, task: Task, accumulated: int) -> None:
        super().check_task(task, accumulated)
        ranked(task.train_dataloader().batch(0))

    def measures(self, task: Task) -> tuple[str, ...]:
        return ("loss", "accuracy", "reward")

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        found = self.latest.get("validation/reward")  # none of a validation that was broken off
        if found is not None and self.trainer.state.fn == "fit":
            self.mean = found

    def state(self) -> dict[str, Any]:
        return {"mean": self.mean}

    def take_up(self, state: dict[str, Any]) -> None:
        mean = state.get("mean")
        if not isinstance(mean, float) or not math.isfinite(mean):
            raise ValueError(f"the checkpoint's objective is damaged: the mean reward is {mean!r}")
        self.mean = mean


def ranked(batch: Batch) -> tuple[Tensor, Tensor]:
    """Tokens and documents of a batch's ranked answers, (batch, answers, time).

    Raises:
        ValueError: It has none.
    """
    if "ranks" not in batch:
        raise ValueError(
            "the batch holds no ranked answers: give --data RankedAddition, or a task of yours "
            "whose batches hold ranked_tokens, ranked_documents, ranked_begins and ranks"
        )
    return batch["ranked_tokens"], batch["ranked_documents"]


class Judge(nn.Module):
    """A trained reward model as a policy uses it.

    Args:
        decoder: Of the reward model.
        head: To one number.
        mean: What is taken off its rewards.
        cost: What its training has cost, as `PreferenceModel` counts it.
    """

    def __init__(
        self, decoder: Decoder, head: nn.Linear, mean: float, cost: dict[str, Any]
    ) -> None:
        super().__init__()
        self.decoder, self.head, self.mean, self.cost = decoder, head, mean, cost

    def forward(self, tokens: Tensor, documents: Tensor) -> Tensor:
        """Rewards (batch,) of whole texts, tokens and documents (batch, time)."""
        return last_rewards(self.decoder, self.head, tokens, documents)[0] - self.mean


def load_reward_model(module: LanguageModel, path: str, task: Task | None = None) -> Judge:
    """The reward model of a run, for a policy of the same vocabulary.

    Args:
        module: The policy.
        path: A checkpoint of a run of `RewardModel`, or the run's directory.
        task: That the policy is trained on. None: the trainer's.

    Raises:
        ValueError: It is not a reward model's, has another vocabulary, or is not finite.
    """
    decoder = load_beside(module, path, "reward model", "reward_model", task)
    file = locate(path)
    held: Any = None if file.is_dir() else read_safely(file).get("objective")
    held = held if isinstance(held, dict) else {}
    heads, state = held.get("heads"), held.get("state")
    weight, bias = (
        heads.get(f"heads.reward.{name}") if isinstance(heads, dict) else None
        for name in ("weight", "bias")
    )
    fits = _shape(weight) == (1, decoder.dim) and _shape(bias) == (1,)
    mean = state.get("mean") if isinstance(state, dict) else None
    if held.get("name") != RewardModel.objective or not fits or not isinstance(mean, float):
        raise ValueError(
            f"{path} is not a reward model: give --model.reward_model a checkpoint of a run with "
            "objective: RewardModel"
        )
    assert isinstance(weight, Tensor) and isinstance(bias, Tensor)
    check_finite({"heads.reward.weight": weight, "heads.reward.bias": bias}, path)
    if not math.isfinite(mean):
        raise ValueError(f"{path}: the mean of its rewards is {mean}: take an earlier checkpoint")
    head = nn.Linear(decoder.dim, 1).to(decoder.dtype)
    head.load_state_dict({"weight": weight, "bias": bias})
    return Judge(decoder, head, mean, cost_in(held))


def _shape(tensor: Any) -> tuple[int, ...] | None:
    return tuple(tensor.shape) if isinstance(tensor, Tensor) else None
