"""The losses of learning from preferences, as plain functions of tensors.

Each is the published formula and nothing else; `archzoo.preferences.policy` and its neighbours say
where the tensors come from. Throughout, ``mask`` is True at tokens that were written, the stop
token among them, and sums and means are over those alone.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Estimator = Literal["k1", "k3"]


def log_probabilities(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """``log softmax(logits / temperature)[token]``, (batch, time), float32 at least.

    Args:
        logits: (batch, time, vocab_size), of each token.
        tokens: (batch, time) int64.
        temperature: That the tokens were drawn at.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    chosen = wide.gather(-1, tokens[..., None])[..., 0]
    return chosen - wide.logsumexp(dim=-1)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean of the values where the mask is True; 0 where it is nowhere."""
    return torch.where(mask, values, 0).sum() / mask.sum().clamp(min=1)


# ---------------------------------------------------------------------------- the reward model


def ranking_loss(
    rewards: Tensor,
    ranks: Tensor | None = None,
    margin: Tensor | float = 0.0,
    centre: float = 0.0,
) -> Tensor:
    """The loss of a reward model from ranked answers.

    The worse of each pair shall have the lower reward::

        L = mean over prompts of 1 / pairs * sum over pairs of -log sigmoid(r_w - r_l - margin)

    where w is better than l. Without ties a prompt has C(K, 2) pairs, all in one batch: answers of
    a prompt are correlated, and shuffled into separate batches they would be overfitted.
    Source: Ouyang et al. (InstructGPT), arXiv 2203.02155, equation 1; the margin is Touvron et
    al.'s, arXiv 2307.09288, equation 2.

    Args:
        rewards: (batch, K), of K answers to each prompt.
        ranks: (batch, K) ints, the lower the better; equal ones are no pair. None: the best comes
            first.
        margin: By how much a pair shall differ: a number, or (batch,), one for each prompt.
        centre: Weight of the mean over pairs of (r_w + r_l)^2, which fixes the constant that the
            loss leaves open; Eisenstein et al., arXiv 2312.09244, section 2.

    Returns:
        A scalar; 0 where no prompt has a pair.
    """
    if ranks is None:
        ranks = torch.arange(rewards.shape[1], device=rewards.device).expand(rewards.shape)
    better = ranks[:, :, None] < ranks[:, None, :]  # (batch, K, K): the first over the second
    if isinstance(margin, Tensor):
        margin = margin[:, None, None]
    first, second = rewards[:, :, None], rewards[:, None, :]
    losses = -F.logsigmoid(first - second - margin)
    if centre:
        losses = losses + centre * (first + second).square()
    pairs = better.sum(dim=(1, 2))
    mean = torch.where(better, losses, 0).sum(dim=(1, 2)) / pairs.clamp(min=1)
    return masked_mean(mean, pairs > 0)


def ranking_accuracy(rewards: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor]:
    """How many pairs a reward model orders right, and how many there are.

    Args:
        rewards: (batch, K).
        ranks: (batch, K), the lower the better; equal ones are no pair.
    """
    better = ranks[:, :, None] < ranks[:, None, :]
    right = rewards[:, :, None] > rewards[:, None, :]
    return (better & right).sum(), better.sum()


# ---------------------------------------------------------------------------- PPO


def divergence(policy: Tensor, reference: Tensor, estimator: Estimator = "k1") -> Tensor:
    """An estimate of KL(policy || reference) at each token that the policy drew, (batch, time).

    Both have the right mean; k3 is never negative and varies less::

        k1 = log p - log q        k3 = exp(log q - log p) - 1 + (log p - log q)

    Source: Schulman, Approximating KL divergence, 2020 (joschu.net/blog/kl-approx.html).

    Args:
        policy: (batch, time), log p of the tokens.
        reference: (batch, time), log q of the same tokens.
        estimator: "k1" or "k3".
    """
    ratio = policy - reference
    return ratio if estimator == "k1" else torch.exp(-ratio) - 1 + ratio


def token_rewards(kl: Tensor, scores: Tensor, ends: Tensor, kl_coef: float) -> Tensor:
    """What each token earns, (batch, time): ``-kl_coef kl``, and the text's score where it ends.

    Source: Ziegler et al., arXiv 1909.08593, section 2.1; InstructGPT, appendix C.4.

    Args:
        kl: (batch, time), see `divergence`; 0 at what was not written.
        scores: (batch,), of whole texts.
        ends: (batch,) int64, the place of the score: that of the last token written.
        kl_coef: Weight of the penalty.
    """
    penalty = -kl_coef * kl
    return penalty.scatter_add(1, ends[:, None], scores[:, None].to(penalty.dtype))


def whiten(values: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    """Values of variance 1 and mean 0 where the mask is True, and 0 elsewhere.

    The variance is the unbiased one.

    Args:
        values: Of any shape.
        mask: Of the same, bool.
        shift_mean: False: they keep their mean.
    """
    mean = masked_mean(values, mask)
    count = mask.sum()
    variance = masked_mean((values - mean).square(), mask) * (count / (count - 1).clamp(min=1))
    found = (values - mean) * torch.rsqrt(variance + 1e-8)
    return torch.where(mask, found if shift_mean else found + mean, 0)


def generalised_advantages(
    rewards: Tensor, values: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Advantages and returns by generalised advantage estimation, both (batch, time).

    How much better a token was than the values said, and what the values should have said::

        delta_t = r_t + gamma V_{t+1} - V_t      A_t = delta_t + gamma lam A_{t+1}      R = A + V

    Source: Schulman et al., arXiv 1506.02438, equations 11 to 16.

    Args:
        rewards: (batch, time), 0 after the end.
        values: (batch, time), of the state before each token; 0 after the end.
        gamma: How much a later token's reward counts.
        lam: 0: what the next value says alone; 1: the rewards to come alone.
    """
    following = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    deltas = rewards + gamma * following - values
    advantage = torch.zeros_like(deltas[:, 0])
    found = []
    for delta in reversed(deltas.unbind(dim=1)):
        advantage = delta + gamma * lam * advantage
        found.append(advantage)
    advantages = torch.stack(found[::-1], dim=1)
    return advantages, advantages + values


def clipped_policy_loss(
    new: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, clip: float = 0.2
) -> Tensor:
    """PPO's loss of the policy, a mean over tokens of ``max(-A ratio, -A clip(ratio))``.

    ratio = exp(new - old) is clipped to 1 - clip .. 1 + clip: a token that has moved that far, in
    the direction its advantage asks for, has no gradient.
    Source: Schulman et al., arXiv 1707.06347, equation 7.

    Args:
        new: (batch, time), the policy's log-probabilities.
        old: (batch, time), those of the policy that wrote the tokens.
        advantages: (batch, time).
        mask: (batch, time) bool.
        clip: How far the ratio may move.
    """
    ratio = torch.exp(torch.where(mask, new - old, 0))
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return masked_mean(torch.maximum(-advantages * ratio, -advantages * clipped), mask)


def clipped_value_loss(
    new: Tensor, old: Tensor, returns: Tensor, mask: Tensor, clip: float = 0.2
) -> Tensor:
    """Half the mean over tokens of ``max((v - R)^2, (clip(v) - R)^2)``.

    v is clipped to the value that it had when the tokens were written, plus or minus `clip`.

    Args:
        new: (batch, time), the values now.
        old: (batch, time), those of when the tokens were written.
        returns: (batch, time), what they shall be.
        mask: (batch, time) bool.
        clip: How far a value may move.
    """
    clipped = torch.clamp(new, old - clip, old + clip)
    worst = torch.maximum((new - returns).square(), (clipped - returns).square())
    return 0.5 * masked_mean(worst, mask)


# ---------------------------------------------------------------------------- REINFORCE, DPO


def leave_one_out(rewards: Tensor) -> Tensor:
    """A baseline for each row, the mean reward of the others, (batch,).

    It does not depend on the row's own text, so the gradient keeps its mean.
    Source: Kool et al., Buy 4 REINFORCE samples, get a baseline for free!, 2019.

    Args:
        rewards: (batch,), of whole texts. Of one row alone the baseline is 0.
    """
    others = max(len(rewards) - 1, 1)
    return (rewards.sum() - rewards) / others


def reinforce_loss(log_probability: Tensor, mask: Tensor, rewards: Tensor) -> Tensor:
    """REINFORCE with a baseline: the mean over texts of ``-(R - b) log p(text)``.

    b is `leave_one_out`. Of one whole text a step's gradient has the mean of the expected reward's.
    Source: Williams, Simple statistical gradient-following algorithms, 1992.

    Args:
        log_probability: (batch, time), the policy's, of each token.
        mask: (batch, time) bool.
        rewards: (batch,), of whole texts, penalties included.
    """
    advantages = (rewards - leave_one_out(rewards)).detach()
    texts = torch.where(mask, log_probability, 0).sum(dim=1)
    return -(advantages * texts).mean()


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float = 0.1,
) -> Tensor:
    """Direct preference optimisation (DPO), of each pair, (batch,).

    The better answer shall gain likelihood on the worse one, more than it has in the reference::

        -log sigmoid(beta ((log p_w - log q_w) - (log p_l - log q_l)))

    where p is the policy, q the reference, and log p_w sums over the tokens of an answer. log 2 at
    the start. It can fall while both answers become less likely.
    Source: Rafailov et al., arXiv 2305.18290, equation 7.

    Args:
        chosen: (batch,), the policy's log-probability of the better answer.
        rejected: (batch,), of the worse one.
        reference_chosen: (batch,), the reference's.
        reference_rejected: (batch,), the same.
        beta: How strongly the policy is held to the reference.
    """
    ratio = (chosen - reference_chosen) - (rejected - reference_rejected)
    return -F.logsigmoid(beta * ratio)
