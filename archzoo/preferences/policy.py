"""A policy that learns from rewards for what it writes: PPO, or REINFORCE with a baseline."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from archzoo.block import Aux
from archzoo.preferences.answering import AnsweringModel
from archzoo.preferences.answers import read
from archzoo.preferences.losses import (
    Estimator,
    clipped_policy_loss,
    clipped_value_loss,
    divergence,
    generalised_advantages,
    reinforce_loss,
    token_rewards,
    whiten,
)
from archzoo.preferences.module import LEARNT, Figures
from archzoo.tasks.stream import Batch, Task


class Policy(AnsweringModel):
    """Learns from rewards for what it writes itself, held to a reference by a KL penalty.

    It answers a batch of questions, token by token from its state, and each answer is rewarded.
    Then come `epochs * minibatches` optimizer steps on these answers (of REINFORCE one), during
    which further batches of questions are left out, and so on. PPO learns by `clipped_policy_loss`
    of advantages that a value head estimates, `generalised_advantages`, whitened over the batch.

    What it logs of its answers, `train/reward` and so on, is said in `AnsweringModel`; `clipped` is
    the fraction of tokens whose ratio was out of bounds. `validation/loss` is the negative of what
    is maximised, reward - kl_coef * kl, so that best.ckpt is the best by that.

    Source: Schulman et al., arXiv 1707.06347; InstructGPT, arXiv 2203.02155, section 3.5.

    Args:
        method: PPO or REINFORCE.
        kl_coef: What a nat of divergence from the reference costs.
        estimator: Of that divergence: see `divergence`. REINFORCE takes k1 alone.
        epochs: Passes of PPO over the answers to a batch.
        minibatches: Optimizer steps of a pass; the batch must divide evenly.
        clip: How far PPO lets a token's ratio move from 1.
        value_clip: How far a value may move from what it was when the answer was written.
        value_coef: Weight of the value head's loss.
        gamma: How much a later token's reward counts.
        lam: Of generalised advantage estimation.
        whiten_rewards: Whether PPO scales rewards to a variance of 1.
        **settings: As for `AnsweringModel`.
    """

    objective = "Policy"
    learns_from_rewards = True

    def __init__(
        self,
        method: Literal["PPO", "REINFORCE"] = "PPO",
        kl_coef: float = 0.05,
        estimator: Estimator = "k1",
        epochs: int = 2,
        minibatches: int = 2,
        clip: float = 0.2,
        value_clip: float = 0.2,
        value_coef: float = 0.1,
        gamma: float = 1.0,
        lam: float = 0.95,
        whiten_rewards: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        if method == "REINFORCE" and estimator != "k1":
            raise ValueError(f"estimator={estimator}: REINFORCE takes k1, log p - log q")
        for name, value in (("epochs", epochs), ("minibatches", minibatches)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        for name, number in (("kl_coef", kl_coef), ("value_coef", value_coef)):
            if not 0 <= number < float("inf"):
                raise ValueError(f"{name}={number} must be at least 0, and finite")
        for name, number in (("clip", clip), ("value_clip", value_clip)):  # infinite: no bound
            if not number >= 0:
                raise ValueError(f"{name}={number} must be at least 0")
        for name, number in (("gamma", gamma), ("lam", lam)):
            if not 0 <= number <= 1:
                raise ValueError(f"{name}={number} must lie in [0, 1]")
        self.method, self.kl_coef, self.estimator = method, kl_coef, estimator
        self.epochs, self.minibatches = epochs, minibatches
        self.clip, self.value_clip, self.value_coef = clip, value_clip, value_coef
        self.gamma, self.lam, self.whiten_rewards = gamma, lam, whiten_rewards
        if method == "PPO":
            self.add_head("value")
        #: What was written last, by name: the fields of `Answers`, and what the update takes.
        self._rollout: dict[str, Tensor] = {}

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self._rollout = {}

    def check_task(self, task: Task, accumulated: int) -> None:
        super().check_task(task, accumulated)
        if accumulated != 1:
            raise ValueError(
                "trainer.accumulate_grad_batches: a policy's steps share what it wrote once: take "
                "1, and a larger batch_size with more model.minibatches"
            )
        if task.batch_size % self.steps_of_pass:
            raise ValueError(
                f"data.batch_size={task.batch_size} does not divide into {self.steps_of_pass} "
                "model.minibatches: take a multiple"
            )

    @property
    def steps_of_pass(self) -> int:
        """Optimizer steps of a pass over the answers."""
        return self.minibatches if self.method == "PPO" else 1

    @property
    def steps_of_rollout(self) -> int:
        """Optimizer steps from one writing of answers to the next."""
        return self.epochs * self.minibatches if self.method == "PPO" else 1

    # ------------------------------------------------------------------------ a step

    def step(self, batch: Batch, number: int) -> tuple[Tensor, int, list[Aux]]:
        tokens = 0
        if number % self.steps_of_rollout == 0 or not self._rollout:
            self._rollout = self._roll_out(batch, number)
            tokens = int((self._rollout["documents"] >= 0).sum())
        rows = self._rows(number)
        here = {name: tensor.to(self.device)[rows] for name, tensor in self._rollout.items()}
        with self.net.evaluating():
            new, x, aux = read(self.net, here["tokens"], here["documents"], self.temperature)
        self.spend(passes=LEARNT * (here["documents"] >= 0).sum())
        if self.method == "REINFORCE":
            return reinforce_loss(new, here["mask"], here["rewards"]), tokens, aux
        values = self._values(x)
        loss = clipped_policy_loss(new, here["old"], here["advantages"], here["mask"], self.clip)
        of_values = clipped_value_loss(
            values, here["values"], here["returns"], here["mask"], self.value_clip
        )
        ratio = torch.exp(torch.where(here["mask"], new.detach() - here["old"], 0))
        outside = ((ratio - 1).abs() > self.clip) & here["mask"]
        self.note(
            {
                "clipped": (outside.sum(), here["mask"].sum()),
                "value_loss": (of_values.detach(), 1),
            }
        )
        return loss + self.value_coef * of_values, tokens, aux

    def _rows(self, number: int) -> Tensor:
        """The rows of what was written that a step takes: a function of the step's number."""
        rows = self._rollout["tokens"].shape[0]
        passes, turn = divmod(number, self.steps_of_pass)
        if self.steps_of_pass == 1:
            return torch.arange(rows, device=self.device)
        generator = torch.Generator().manual_seed(self.rollout_seed + passes)
        order = torch.randperm(rows, generator=generator).to(self.device)
        return order.chunk(self.steps_of_pass)[turn]

    def _values(self, x: Tensor) -> Tensor:
        """Of the states before each token, (batch, time)."""
        found: Tensor = self.heads["value"](x)[..., 0]
        return found.float() if found.dtype.itemsize < 4 else found

    @torch.no_grad()
    def _roll_out(self, batch: Batch, number: int) -> dict[str, Tensor]:
        """Answers to a batch's questions, their rewards, and what the update takes of them."""
        answers = self.write(batch, self.rollout_seed + number * self.trainer_batch_size)
        scores, mask = self.reward(answers), answers.mask
        with self.net.evaluating():
            old, x, _ = read(self.net, answers.tokens, answers.documents, self.temperature)
        reference = self.reference_log_probabilities(answers.tokens, answers.documents)
        ratio = torch.where(mask, divergence(old, reference), 0).sum(dim=1)
        self.note(self.figures_of(answers, scores, ratio))
        tokens = (answers.documents >= 0).sum()
        # Written by the policy; read by it, the reference, and the reward model if there is one.
        times = 3 + ("reward_model" in self._beside)
        self.spend(passes=times * tokens, written=mask.sum())
        found = {**answers._asdict(), "old": old}
        if self.method == "REINFORCE":
            return found | {"rewards": scores - self.kl_coef * ratio}
        kl = torch.where(mask, divergence(old, reference, self.estimator), 0)
        rewards = token_rewards(kl, scores, answers.ends, self.kl_coef)
        if self.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False)
        values = torch.where(mask, self._values(x), 0)
        advantages, returns = generalised_advantages(rewards, values, self.gamma, self.lam)
        return found | {
            "values": values,
            "returns": torch.where(mask, returns, 0),
            "advantages": whiten(advantages, mask),
        }

    # ------------------------------------------------------------------------ evaluation

    def measure(self, batch: Batch, number: int) -> Figures:
        found = super().measure(batch, number)
        (rewards, count), (kl, _) = found["reward"], found["kl"]
        return {"loss": (self.kl_coef * kl - rewards, count), **found}

    # ------------------------------------------------------------------------ checkpoints

    def state(self) -> dict[str, Any]:
        return super().state() | {"rollout": dict(self._rollout)}

    def take_up(self, state: dict[str, Any]) -> None:
        super().take_up(state)
        rollout = state.get("rollout")
        if not isinstance(rollout, dict):
            raise ValueError("the checkpoint's objective is damaged: it holds no rollout")
        self._rollout = dict(rollout)
