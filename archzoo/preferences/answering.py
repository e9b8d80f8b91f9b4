"""Objectives whose model answers questions: rewards, divergence from a reference, exact match."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from archzoo.decoder import Decoder
from archzoo.preferences.answers import Answers, questions, read, write_answers
from archzoo.preferences.losses import divergence
from archzoo.preferences.module import COSTS, Beside, Figures, PreferenceModel, load_beside
from archzoo.preferences.reward_model import load_reward_model
from archzoo.tasks.stream import Batch, Task

# What every evaluation gives, beside a loss.
MEASURED = (
    *("reward", "score", "kl", "exact_match", "length"),
    *(f"cost/{name}" for name in (*COSTS, "all_passes", "all_seconds")),
)
EVALUATION = 2**40  # seeds of the answers of an evaluation, from there on


class AnsweringModel(PreferenceModel):
    """A policy beside its reference, whose answers an evaluation reads.

    The reference is the policy as training starts, without an adapter that is put on it then, or
    another checkpoint of the same vocabulary. It stays frozen and in evaluation mode. Every
    evaluation draws an answer to each question, with the same seeds, and logs means over them:
    `reward`; `score`, the task's own reward, whichever is learnt from; `kl`, the sum over an
    answer's tokens of log p - log q in nats; `exact_match`, right and ended by the stop token; and
    `length` in tokens. Beside them it says what training has cost so far: `cost/passes`, tokens
    through the policy, the reference or the reward model, each of which counts 1 and 3 with its
    gradient; `cost/written`, tokens that the policy wrote; `cost/seconds`, without evaluations; and
    `cost/all_passes` and `cost/all_seconds`, which hold those of training the reward model, too,
    where it is learnt from.

    Args:
        reward_model: A checkpoint of objective RewardModel, which rewards answers. None: the task
            does, 1 for a right one and -`length_cost` for each token.
        length_cost: Of a token, where the task rewards, and in `score`.
        missing_stop: What is taken off the reward of an answer that does not end by itself.
        reference: A checkpoint that stays. None: the weights that training starts from.
        temperature: That answers are drawn at.
        max_tokens: Of an answer at most.
        rollout_seed: Of the answers in training, which are a function of it, of the step and row.
        **settings: As for `LanguageModel`.
    """

    learns_from_rewards = False  # what the reward model has cost is its cost, too

    def __init__(
        self,
        reward_model: str | None = None,
        length_cost: float = 0.05,
        missing_stop: float = 1.0,
        reference: str | None = None,
        temperature: float = 1.0,
        max_tokens: int = 16,
        rollout_seed: int = 0,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        if not 0 < temperature < float("inf"):
            raise ValueError(f"temperature={temperature} must be above 0: answers are drawn")
        if max_tokens < 1:
            raise ValueError(f"max_tokens={max_tokens} must be at least 1")
        for name, value in (("length_cost", length_cost), ("missing_stop", missing_stop)):
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name}={value} must be at least 0, and finite")
        self.reward_model, self.reference = reward_model, reference
        self.length_cost, self.missing_stop = length_cost, missing_stop
        self.temperature, self.max_tokens = temperature, max_tokens
        self.rollout_seed = rollout_seed
        self._beside = Beside(self)

    def setup(self, stage: str) -> None:
        super().setup(stage)  # before a checkpoint is read: these are the weights at the start
        if "reference" not in self._beside:
            if self.reference is not None:
                reference = load_beside(self, self.reference, "reference policy", "reference")
            elif self._adapts:  # what it adapts: an adapter may begin as something, and is drawn
                assert self._weights is not None
                reference = load_beside(self, self._weights, "reference policy", "weights")
                reference = reference.to(self.net.dtype)
            else:
                reference = copy.deepcopy(self.net)
            self._beside.add("reference", reference)
            if self.reward_model is not None:
                self._beside.add("reward_model", load_reward_model(self, self.reward_model))

    @property
    def _adapts(self) -> bool:
        """Whether an adapter is put on the weights that training starts from."""
        return any(self.architecture.get(name) for name in ("adapter", "adapters"))

    def write(self, batch: Batch, seed: int) -> Answers:
        """Answers to a batch's questions by the policy, row r by seed + r."""
        assert self.task is not None  # whose batch it is
        return write_answers(
            self.net,
            self.task,
            batch,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            seed=seed,
        )

    @torch.no_grad()
    def reward(self, answers: Answers) -> Tensor:
        """What each answer earns, (batch,).

        Raises:
            FloatingPointError: A reward that is not finite; the step is named.
        """
        found = self._score(answers)
        if "reward_model" in self._beside:
            found = self._beside["reward_model"](answers.tokens, answers.documents)
            found = found - self._missing(answers)
        if not found.isfinite().all():
            wrong = found[~found.isfinite()][0].item()
            raise FloatingPointError(
                f"the reward of an answer is {wrong} at step {self.trainer.global_step + 1}"
            )
        return found

    def _score(self, answers: Answers) -> Tensor:
        """The task's own reward of each answer, (batch,)."""
        found = answers.right.float() - self.length_cost * answers.lengths
        return found - self._missing(answers)

    def _missing(self, answers: Answers) -> Tensor:
        """What is taken off for an answer without an end, (batch,)."""
        return self.missing_stop * (~answers.stopped).float()

    @torch.no_grad()
    def reference_log_probabilities(self, tokens: Tensor, documents: Tensor) -> Tensor:
        """The reference's, of each token after the first, (batch, time - 1)."""
        return read(self._beside["reference"], tokens, documents, self.temperature)[0]

    def figures_of(self, answers: Answers, rewards: Tensor, kl: Tensor) -> Figures:
        """What is logged of answers.

        Args:
            answers: Of a batch.
            rewards: (batch,), of each.
            kl: (batch,), of each.
        """
        count = len(rewards)
        return {
            "reward": (rewards.sum(), count),
            "score": (self._score(answers).sum(), count),
            "kl": (kl.sum(), count),
            "exact_match": (answers.right.sum(), count),
            "length": (answers.lengths.sum(), count),
        }

    def measure(self, batch: Batch, number: int) -> Figures:
        answers = self.write(batch, EVALUATION + number * self.trainer_batch_size)
        rewards = self.reward(answers)
        with self.net.evaluating():
            mine, _, _ = read(self.net, answers.tokens, answers.documents, self.temperature)
        theirs = self.reference_log_probabilities(answers.tokens, answers.documents)
        kl = torch.where(answers.mask, divergence(mine, theirs), 0).sum(dim=1)
        return self.figures_of(answers, rewards, kl) | self._costs()

    def _costs(self) -> Figures:
        """What training has cost so far, as `measure` gives it."""
        found = {name: float(amount) for name, amount in self.cost.items()}
        before: dict[str, float] = {}
        if self.learns_from_rewards and "reward_model" in self._beside:
            before = self._beside["reward_model"].cost
        found |= {f"all_{n}": found[n] + before.get(n, 0.0) for n in ("passes", "seconds")}
        wide = torch.float64
        return {f"cost/{n}": (torch.tensor(amount, dtype=wide), 1) for n, amount in found.items()}

    def check_task(self, task: Task, accumulated: int) -> None:
        super().check_task(task, accumulated)
        questions(task, task.train_dataloader().batch(0))

    def check_beside(self, decoder: Decoder, task: Task, begun: Collection[str] = ()) -> None:
        super().check_beside(decoder, task, begun)
        if self.reference is not None:
            load_beside(self, self.reference, "reference policy", "reference", task)
        if self.reward_model is not None and "model.reward_model" not in begun:
            load_reward_model(self, self.reward_model, task)

    def measures(self, task: Task) -> tuple[str, ...]:
        return ("loss", *MEASURED)

    @property
    def trainer_batch_size(self) -> int:
        """Rows of a whole batch of the task."""
        assert self.task is not None
        return self.task.batch_size

    # Checkpoints.

    def state(self) -> dict[str, Any]:
        return {"beside": self._beside.digests()}

    def take_up(self, state: dict[str, Any]) -> None:
        for name, digest in self._beside.digests().items():
            if (state.get("beside") or {}).get(name) != digest:
                setting = "weights" if name == "reference" and not self.reference else name
                raise ValueError(
                    f"the run began beside another {name.replace('_', ' ')}: its weights have "
                    f"changed since; give --model.{setting} the checkpoint that it began with"
                )
