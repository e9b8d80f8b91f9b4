"""The losses of preferences: trl's numbers, the formulas' properties, exact expectations."""

import math
from itertools import combinations, product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from archzoo.contract.measure import relative_error
from archzoo.preferences.losses import (
    clipped_policy_loss,
    clipped_value_loss,
    divergence,
    dpo_loss,
    generalised_advantages,
    leave_one_out,
    log_probabilities,
    masked_mean,
    ranking_accuracy,
    ranking_loss,
    reinforce_loss,
    token_rewards,
    whiten,
)

GOLDEN = load_file(Path(__file__).parent / "golden" / "adaptation_rlhf.safetensors")
TEMPERATURE = 0.7 + 1e-7  # as the code that made the numbers adds it
KL_COEF, CLIP, VALUE_COEF = 0.05, 0.2, 0.1


# ---------------------------------------------------------------------------- the reward model


@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("reward", {}),
        ("reward.with_margin", {"margin": GOLDEN["reward.margin"]}),
        ("reward.centred0.01", {"centre": 0.01}),
    ],
)
def test_ranking_loss_of_pairs_is_the_golden_one(case, options):
    rewards = GOLDEN["reward.rewards"].clone().requires_grad_()
    pairs = rewards.view(2, -1).T  # the first half is the better one of each pair
    loss = ranking_loss(pairs, **options)
    loss.backward()
    assert relative_error(loss, GOLDEN[f"{case}.loss"]) < 1e-12
    assert relative_error(rewards.grad, GOLDEN[f"{case}.grad"]) < 1e-12


def test_ranking_loss_weighs_each_prompt_s_pairs_alike():
    """Equation 1 written out: 1 / C(K, 2) of the sum over the pairs, ties left out."""
    rewards = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    by_hand = [
        sum(-F.logsigmoid(row[i] - row[j]) for i, j in combinations(range(4), 2)) / math.comb(4, 2)
        for row in rewards
    ]
    wanted = torch.stack(by_hand).mean()
    assert relative_error(ranking_loss(rewards), wanted) < 1e-12
    order = torch.stack([torch.randperm(4) for _ in range(5)])
    shuffled = rewards.gather(1, order)
    assert relative_error(ranking_loss(shuffled, order), wanted) < 1e-12
    # A prompt whose answers are alike says nothing, and counts for nothing.
    ranks = torch.arange(4).expand(5, 4).clone()
    ranks[2:] = 0
    assert relative_error(ranking_loss(rewards, ranks), torch.stack(by_hand[:2]).mean()) < 1e-12
    assert ranking_loss(rewards, torch.zeros_like(ranks)) == 0
    # And a constant added to all rewards changes nothing.
    assert relative_error(ranking_loss(rewards + 3), wanted) < 1e-12


def test_ranking_accuracy_counts_pairs():
    rewards = torch.tensor([[3.0, 2.0, 1.0], [0.0, 1.0, 1.0]])
    right, pairs = ranking_accuracy(rewards, torch.tensor([[0, 1, 2], [0, 1, 1]]))
    assert (int(right), int(pairs)) == (3, 5)


# ---------------------------------------------------------------------------- PPO


def step_of(kind):
    """One whole step from what was written: rewards, advantages, losses and gradients."""
    g, whitens = GOLDEN, kind.endswith("whitened")
    time = g["ppo.responses"].shape[1]
    places = torch.arange(time)
    lengths = g["ppo.sequence_lengths"]
    mask = places <= lengths[:, None]
    # There the score stands one after the last token, where there is room, and has a value.
    ends = torch.where(lengths + 1 < time, lengths + 1, lengths)
    valued = places <= lengths[:, None] + 1
    assert torch.equal(mask, ~g["ppo.padding_mask"].bool())
    assert torch.equal(valued, ~g["ppo.padding_mask_p1"].bool())
    old, reference = g["ppo.logprobs"], g["ppo.ref_logprobs"]
    kl = torch.where(mask, divergence(old, reference, kind[:2]), 0)
    rewards = token_rewards(kl, g["ppo.scores"], ends, KL_COEF)
    if whitens:
        rewards = whiten(rewards, valued, shift_mean=False)
    values = torch.where(valued, g["ppo.values"], 0)
    advantages, returns = generalised_advantages(rewards, values)
    advantages = whiten(advantages, mask)
    return mask, valued, rewards, values, advantages, returns


def update_of(mask, valued, values, advantages, returns):
    logits = GOLDEN["ppo.new_logits"].clone().requires_grad_()
    predicted = GOLDEN["ppo.new_values"].clone().requires_grad_()
    new = log_probabilities(logits, GOLDEN["ppo.responses"], TEMPERATURE)
    policy = clipped_policy_loss(new, GOLDEN["ppo.logprobs"], advantages, mask, CLIP)
    value = clipped_value_loss(predicted, values, returns, valued, CLIP)
    loss = policy + VALUE_COEF * value
    loss.backward()
    ratio = torch.exp(torch.where(mask, new - GOLDEN["ppo.logprobs"], 0))
    return {
        "pg_loss": policy,
        "vf_loss": value,
        "loss": loss,
        "ratio": ratio,
        "grad.new_logits": logits.grad,
        "grad.new_values": predicted.grad,
    }


@pytest.mark.parametrize("kind", ["k1", "k3", "k1.whitened"])
def test_a_whole_step_of_ppo_is_the_golden_one(kind):
    """The variance's factor is float32 there, so what was whitened agrees to 1e-6."""
    golden = {n.removeprefix(f"ppo.{kind}."): v for n, v in GOLDEN.items()}
    mask, valued, rewards, values, advantages, returns = step_of(kind)
    loose = 1e-6 if kind.endswith("whitened") else 1e-12
    assert relative_error(rewards, golden["rewards"]) < loose
    assert relative_error(returns, golden["returns"]) < loose
    assert relative_error(advantages, golden["advantages"]) < 1e-6
    for name, found in update_of(mask, valued, values, advantages, returns).items():
        assert relative_error(found, golden[name]) < 1e-6, name
    # From its own advantages and returns the update agrees to rounding.
    given = golden["advantages"], golden["returns"]
    for name, found in update_of(mask, valued, values, *given).items():
        assert relative_error(found, golden[name]) < 1e-12, name


def test_the_first_step_has_a_ratio_of_one_and_a_gradient():
    mask, *_, advantages, _ = step_of("k1")
    old = GOLDEN["ppo.logprobs"]
    new = old.clone().requires_grad_()
    loss = clipped_policy_loss(new, old, advantages, mask)
    loss.backward()
    assert abs(loss.item()) < 1e-12  # whitened advantages have the mean 0
    assert relative_error(new.grad[mask], -advantages[mask] / mask.sum()) < 1e-12
    assert not new.grad[~mask].any()


def test_clipping_stops_the_gradient_only_where_it_would_go_on():
    old = torch.zeros(1, 4, dtype=torch.float64)
    new = torch.tensor([[0.5, 0.5, -0.5, -0.5]], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0]], dtype=torch.float64)
    clipped_policy_loss(new, old, advantages, torch.ones(1, 4, dtype=torch.bool)).backward()
    assert new.grad[0].ne(0).tolist() == [False, True, True, False]


def test_divergence_is_nothing_at_the_start_and_has_the_right_mean():
    p, q = torch.randn(2, 7, dtype=torch.float64).log_softmax(-1)
    exact = (p.exp() * (p - q)).sum()
    for estimator in ("k1", "k3"):
        assert not divergence(p, p, estimator).any()
        assert relative_error((p.exp() * divergence(p, q, estimator)).sum(), exact) < 1e-12
    assert (divergence(p, q, "k3") >= 0).all()


def test_advantages_are_sums_of_discounted_errors():
    rewards, values = torch.randn(2, 3, 6, dtype=torch.float64)
    gamma, lam = 0.9, 0.8
    advantages, returns = generalised_advantages(rewards, values, gamma, lam)
    padded = torch.cat([values, torch.zeros(3, 1, dtype=torch.float64)], dim=1)
    deltas = rewards + gamma * padded[:, 1:] - padded[:, :-1]
    for t in range(6):
        weights = (gamma * lam) ** torch.arange(6 - t, dtype=torch.float64)
        assert relative_error(advantages[:, t], (weights * deltas[:, t:]).sum(1)) < 1e-12
    assert relative_error(returns, advantages + values) < 1e-12


def test_whitening_sees_only_what_the_mask_shows():
    values = torch.randn(4, 5, dtype=torch.float64)
    mask = torch.rand(4, 5) < 0.7
    mask[0, :2] = True
    found = whiten(values, mask)
    assert abs(found[mask].mean()) < 1e-12 and abs(found[mask].var() - 1) < 1e-6
    assert not found[~mask].any()
    spoilt = torch.where(mask, values, torch.nan)
    assert torch.equal(whiten(spoilt, mask), found)
    kept = whiten(values, mask, shift_mean=False)
    assert relative_error(kept[mask].mean(), values[mask].mean()) < 1e-12


# ---------------------------------------------------------------------------- REINFORCE


def test_reinforce_has_the_gradient_of_the_expected_reward():
    """Over all pairs of texts of two tokens, weighted by how likely they are: exactly."""
    logits = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)  # of each token
    rewards = torch.randn(3, 3, dtype=torch.float64)
    texts = torch.tensor(list(product(range(3), repeat=2)))

    def of(rows):
        return log_probabilities(logits.expand(len(rows), 2, 3), rows)

    expected = (of(texts).sum(1).exp() * rewards[texts[:, 0], texts[:, 1]]).sum()
    wanted = torch.autograd.grad(-expected, logits)[0]
    mask, found = torch.ones(2, 2, dtype=torch.bool), torch.zeros_like(logits)
    for pair in product(range(len(texts)), repeat=2):
        rows = texts[list(pair)]
        log_probability = of(rows)
        loss = reinforce_loss(log_probability, mask, rewards[rows[:, 0], rows[:, 1]])
        found += log_probability.sum().exp().item() * torch.autograd.grad(loss, logits)[0]
    assert relative_error(found, wanted) < 1e-12


def test_a_baseline_is_of_the_others():
    assert torch.equal(leave_one_out(torch.tensor([1.0, 2.0, 6.0])), torch.tensor([4.0, 3.5, 1.5]))
    alone = torch.tensor([5.0])
    assert leave_one_out(alone) == 0


# ---------------------------------------------------------------------------- DPO


def answers(logits):
    """The summed log-probability of each answer, (8,): four better ones, then the worse ones."""
    tokens, mask = GOLDEN["dpo.input_ids"][:, 1:], GOLDEN["dpo.completion_mask"][:, 1:].bool()
    return torch.where(mask, log_probabilities(logits[:, :-1], tokens), 0).sum(1)


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_dpo_is_the_golden_one(beta):
    logits = GOLDEN["dpo.policy_logits"].clone().requires_grad_()
    policy, reference = answers(logits), answers(GOLDEN["dpo.reference_logits"])
    assert relative_error(policy[:4], GOLDEN["dpo.chosen_logps"]) < 1e-12
    assert relative_error(policy[4:], GOLDEN["dpo.rejected_logps"]) < 1e-12
    loss = dpo_loss(policy[:4], policy[4:], reference[:4], reference[4:], beta).mean()
    loss.backward()
    assert relative_error(loss, GOLDEN[f"dpo.sigmoid.beta{beta}.loss"]) < 1e-12
    golden = GOLDEN[f"dpo.sigmoid.beta{beta}.grad.policy_logits"]
    assert relative_error(logits.grad, golden) < 1e-12


def test_dpo_starts_at_log_2_with_half_of_beta_as_its_gradient():
    chosen, rejected = torch.randn(2, 4, dtype=torch.float64).unbind()
    chosen.requires_grad_()
    rejected.requires_grad_()
    loss = dpo_loss(chosen, rejected, chosen.detach(), rejected.detach(), beta=0.3).mean()
    loss.backward()
    assert loss.item() == GOLDEN["dpo.sigmoid.at_start"].item() == math.log(2)
    half = torch.full((4,), 0.3 / 2 / 4, dtype=torch.float64)
    assert relative_error(chosen.grad, -half) < 1e-12
    assert relative_error(rejected.grad, half) < 1e-12


def test_masked_mean_of_nothing_is_nothing():
    assert masked_mean(torch.ones(2), torch.zeros(2, dtype=torch.bool)) == 0
