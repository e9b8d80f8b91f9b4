"""Balancing: losses of known value, drop rates counted by hand, a coefficient that adapts."""

import functools
import io

import pytest
import torch
from torch.utils._pytree import tree_flatten_with_path, tree_leaves

import archzoo
from archzoo.block import Routing, make_context
from archzoo.feedforward.balance import (
    Balance,
    capacity,
    count_assignments,
    gate_ratios,
    load_fractions,
    load_metrics,
    mean_over_tokens,
    squared_mean_loss,
    switch_loss,
    virtual_drop_rate,
    within_capacity,
    z_loss,
)

EVEN = torch.full((8,), 1 / 8)


def adaptive(experts=4):
    return Balance(
        experts,
        kind="squared_mean",
        coefficient=0.01,
        adaptive=True,
        z_coefficient=0.0,
        capacity_factor=1.25,
    )


def collapsed(experts, on):
    p = torch.zeros(experts)
    p[:on] = 1 / on
    return p


# ---------------------------------------------------------------------------- losses


def test_switch_loss_is_one_at_balance_and_known_at_collapse():
    assert switch_loss(EVEN, EVEN).item() == pytest.approx(1, abs=1e-6)
    for on in (1, 2, 4):
        counts = torch.zeros(8, dtype=torch.int64)
        counts[:on] = 10
        got = switch_loss(collapsed(8, on), load_fractions(counts))
        assert got.item() == pytest.approx(8 / on, abs=1e-6)


@pytest.mark.parametrize("over", ["rank", "ranks"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16])
def test_torch_s_default_dtype_changes_nothing(default, packed, over):
    """Lightning sets it in each step of bf16-true; counts over counts would be rounded to it."""
    x = torch.randn(3, 100, 8)
    documents = torch.where(torch.arange(100) < 77, 0, -1).expand(3, 100) if packed else None
    found = []
    for dtype in (torch.float32, default):
        torch.manual_seed(0)
        mixture = archzoo.MixtureOfExperts(
            8, 8, experts=7, adaptive=True, coefficient=1.0, balance_over=over, z_coefficient=1e-3,
            router={"class_path": "LinearRouter", "init_args": {"bias_rate": 1e-3}},
            drop="position", capacity_factor=1.0,
        )  # fmt: skip
        context, _ = make_context(3, 100, documents=documents)
        try:
            torch.set_default_dtype(dtype)
            _, aux = mixture(x, context)
            more = mixture.pooled_losses(aux.pools)
            mixture.after_step(aux.sums)
            born = archzoo.MixtureOfExperts(
                8, 8, adaptive=True,
                router={"class_path": "AttentionRouter", "init_args": {"bias_rate": 1e-3}},
            )  # fmt: skip
        finally:
            torch.set_default_dtype(torch.float32)
        assert born.balance.alpha.dtype == born.router.expert_bias.dtype == torch.float32
        assert born.balance.alpha.item() == pytest.approx(0.01, rel=1e-6)
        entries = tree_flatten_with_path([aux, more])[0]
        found.append({str(path): v for path, v in entries} | dict(mixture.named_buffers()))
    for name, value in found[0].items():
        assert found[1][name].dtype == value.dtype != torch.bfloat16, name
        assert torch.equal(found[1][name], value), name
    assert found[0]["balance.alpha"] < 1 and found[0]["router.expert_bias"].any()


def test_after_to_empty_everything_is_defined_again():
    net = archzoo.create_model(
        "skywork_micro",
        vocab_size=9,
        feed_forward={
            "class_path": "MixtureOfExperts",
            "init_args": {
                "adaptive": True,
                "coefficient": 0.3,
                "shared_experts": 1,
                "router": {"class_path": "AttentionRouter", "init_args": {"bias_rate": 1e-3}},
            },
        },
    )
    net.to("meta").to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*net.parameters(), *net.buffers()):
            tensor.fill_(float("nan"))
    net.reset_parameters()
    for name, tensor in (*net.named_parameters(), *net.named_buffers()):
        assert tensor.isfinite().all(), name
    for block in net.blocks:
        made = block.feed_forward
        assert made.balance.alpha == torch.tensor(0.3) and not made.router.expert_bias.any()
        weight = made.router.projection.weight.detach()
        assert weight.std() == pytest.approx(weight.shape[1] ** -0.5, rel=0.2)
        assert made.experts.gate_up.weight.detach().std() == pytest.approx(0.02, rel=0.1)
        assert torch.equal(block.feed_forward_norm.weight, torch.ones(net.dim))


def test_squared_mean_loss_is_zero_at_balance_and_known_at_collapse():
    assert squared_mean_loss(EVEN).item() == pytest.approx(0, abs=1e-6)
    for on in (1, 2, 4):
        assert squared_mean_loss(collapsed(8, on)).item() == pytest.approx(1 / on - 1 / 8, abs=1e-6)
    p = torch.rand(8).softmax(0)
    assert squared_mean_loss(p).item() == pytest.approx((p.square().sum() - 1 / 8).item(), abs=1e-6)


def test_z_loss_is_the_mean_of_squared_logsumexps():
    z = torch.tensor([[0.0, 0.0], [-5.0, -5.0]])  # logsumexps log 2 and log 2 - 5: one is negative
    log2 = 0.693147
    want = (log2**2 + (log2 - 5) ** 2) / 2
    assert z_loss(z).item() == pytest.approx(want, rel=1e-5)
    assert z_loss(z, torch.tensor([True, False])).item() == pytest.approx(log2**2, rel=1e-5)


def routing_of(x, **options):
    """A mixture's routing of x and its aux."""
    mixture = archzoo.MixtureOfExperts(16, 8, **options)
    context, _ = make_context(*x.shape[:2])
    return mixture, mixture(x, context)[1]


@pytest.mark.parametrize("kind", ["switch", "squared_mean"])
def test_the_loss_pulls_on_the_router_by_the_coefficient(kind):
    x = torch.randn(2, 20, 16)
    gradients = []
    for coefficient in (0.01, 0.02):
        torch.manual_seed(0)
        mixture, aux = routing_of(x, balance=kind, coefficient=coefficient)
        assert aux.losses["balance"].item() == pytest.approx(
            coefficient * aux.metrics["balance"].item(), rel=1e-6
        )
        aux.losses["balance"].backward()
        gradients.append(mixture.router.projection.weight.grad)
    assert gradients[0].abs().max() > 0
    assert torch.allclose(2 * gradients[0], gradients[1])


def test_the_z_loss_reads_raw_logits():
    """On normalised logits it would be nearly a constant, whatever the weights' scale."""
    x, router = torch.randn(2, 20, 16), {"class_path": "LinearRouter"}
    router["init_args"] = {"logit_norm": 1.0}
    torch.manual_seed(0)
    mixture, small = routing_of(x, balance="none", z_coefficient=1.0, router=router)
    with torch.no_grad():
        mixture.router.projection.weight.mul_(100)
    large = mixture(x, make_context(2, 20)[0])[1]
    assert set(large.losses) == {"z"}
    assert large.losses["z"] > 10 * small.losses["z"]


def test_without_balance_there_is_no_loss():
    _, aux = routing_of(torch.randn(2, 20, 16), balance="none")
    assert not aux.losses
    assert aux.sums["assignments"].sum() == 2 * 20 * 2


POOLED = [
    {"balance": "switch", "z_coefficient": 1e-2},
    {"balance": "squared_mean", "adaptive": True},
    {"balance": "none", "z_coefficient": 1e-2},
    {"balance": "none"},
]


@pytest.mark.parametrize("documents", [None, [[-1] * 3 + [0] * 6, [0] * 9]])
@pytest.mark.parametrize("options", POOLED, ids=str)
def test_over_all_ranks_the_losses_are_those_of_one_batch(options, documents):
    """Rows on two ranks: sums, and the losses of both together, as one rank has them."""
    torch.manual_seed(0)
    whole = archzoo.MixtureOfExperts(16, 8, **options).double()
    split = archzoo.MixtureOfExperts(16, 8, balance_over="ranks", **options).double()
    split.load_state_dict(whole.state_dict())
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    given = None if documents is None else torch.tensor(documents)
    want = whole(x, make_context(2, 9, documents=given)[0])[1]
    pools = []
    for row in range(2):
        part = None if given is None else given[row : row + 1]
        aux = split(x[row : row + 1], make_context(1, 9, documents=part)[0])[1]
        assert not aux.losses
        pools.append(aux.pools)
    got = split.pooled_losses({name: pools[0][name] + pools[1][name] for name in pools[0]})
    want, got = want.losses, got.losses
    names = list(want)
    assert names == list(got)
    if not names:
        return
    weights = (whole.router.projection.weight, split.router.projection.weight)
    (expected,) = torch.autograd.grad(sum(want[name] for name in names), weights[0])
    (found,) = torch.autograd.grad(sum(got[name] for name in names), weights[1])
    for name in names:
        assert got[name].item() == pytest.approx(want[name].item(), rel=1e-6)
    assert (found - expected).norm() < 1e-6 * expected.norm()


# ---------------------------------------------------------------------------- counts


def test_counts_and_means_leave_padding_out():
    indices = torch.tensor([[0, 1], [2, 1], [0, 3], [3, 3]])
    valid = torch.tensor([True, True, True, False])
    assert count_assignments(indices, 5).tolist() == [2, 2, 1, 3, 0]
    assert count_assignments(indices, 5, valid).tolist() == [2, 2, 1, 1, 0]
    values = torch.tensor([[1.0, 5.0], [2.0, 6.0], [3.0, 7.0], [99.0, 99.0]])
    assert torch.allclose(mean_over_tokens(values, valid), torch.tensor([2.0, 6.0]))


def test_capacity_is_rounded_up_exactly():
    assert [capacity(total, 4, 1.25) for total in (16, 17, 8)] == [5, 6, 3]
    # 1.1 * 10 is 11.000000000000002 in floating point.
    assert capacity(10, 1, 1.1) == 11
    assert capacity(torch.tensor(48), 3, 1.25).item() == 20


def test_virtual_drop_rate_by_hand():
    rate = functools.partial(virtual_drop_rate, factor=1.25)
    assert rate(torch.tensor([5, 5, 5, 5])) == 0
    assert rate(torch.tensor([7, 5, 4, 4])) == 0  # 25 / 4 rounded up is 7
    assert rate(torch.tensor([9, 5, 3, 3])).item() == pytest.approx(2 / 20)
    assert rate(torch.tensor([20, 0, 0, 0])).item() == pytest.approx(13 / 20)
    assert rate(torch.tensor([0, 0, 0, 0])) == 0


def test_pooled_rate_is_at_most_the_mean_of_the_parts():
    """Counts are pooled before the rate is taken: uneven parts that cancel do not count."""
    parts = [torch.tensor([20, 0]), torch.tensor([0, 20])]
    assert virtual_drop_rate(parts[0] + parts[1], 1.25) == 0
    assert all(virtual_drop_rate(part, 1.25) > 0 for part in parts)


def test_places_go_to_the_first_tokens():
    indices = torch.tensor([[0, 1], [0, 2], [0, 1], [0, 3]])
    kept = within_capacity(indices, 4, 1.0, None)  # 8 assignments, 4 experts: 2 places each
    assert kept.tolist() == [[True, True], [True, True], [False, True], [False, True]]
    valid = torch.tensor([False, True, True, True])
    kept = within_capacity(indices, 4, 1.0, valid)  # padding takes no place
    assert kept.tolist() == [[False, False], [True, True], [True, True], [False, True]]


def test_load_metrics_at_balance_and_collapse():
    even = load_metrics(EVEN)
    assert even["max_violation"].item() == pytest.approx(0, abs=1e-6)
    assert even["entropy"].item() == pytest.approx(1, abs=1e-6)
    assert even["unused"] == 0
    counts = torch.zeros(8, dtype=torch.int64)
    counts[2] = 10
    one = load_metrics(load_fractions(counts))
    assert one["max_violation"].item() == pytest.approx(7)
    assert one["entropy"].item() == pytest.approx(0, abs=1e-6)
    assert one["unused"].item() == pytest.approx(7 / 8)


def test_gate_ratios_by_hand():
    p = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.4, 0.4], [1.0, 0.0, 0.0]])
    ratios = gate_ratios(p[:2])
    assert ratios["max1_max2"].item() == pytest.approx((2 + 1) / 2)
    assert ratios["max2_max3"].item() == pytest.approx((3 + 2) / 2)
    assert all(value.isfinite() for value in gate_ratios(p).values())
    assert set(gate_ratios(p[:, :2])) == {"max1_max2"} and not gate_ratios(p[:, :1])


# ---------------------------------------------------------------------------- the coefficient


def test_the_coefficient_follows_the_drop_rate():
    """A constant rate of 2 % calls for 0.004, and the way there shrinks by 0.99 a step."""
    balance = adaptive().double()
    counts = torch.tensor([333, 223, 222, 222])  # places: 313; 20 of 1,000 too many
    for step in range(1, 201):
        balance.after_step(counts)
        want = 0.004 + 0.006 * 0.99**step
        assert balance.alpha.item() == pytest.approx(want, abs=1e-9)


def test_the_coefficient_is_bounded():
    balance = adaptive().double()
    balance.alpha.fill_(0.005)
    for step in range(1, 101):
        balance.after_step(torch.tensor([513, 163, 162, 162]))  # 20 % too many: 0.04 is cut off
        assert balance.alpha.item() == pytest.approx(0.01 - 0.005 * 0.99**step, abs=1e-9)
    for _ in range(69):
        balance.after_step(torch.tensor([250, 250, 250, 250]))
    assert balance.alpha.item() == pytest.approx(0.5 * (0.01 - 0.005 * 0.99**100), rel=0.01)


def test_the_coefficient_follows_real_drops_where_there_are_any():
    balance = adaptive().double()
    even = torch.full((4,), 250)
    balance.after_step(even, torch.tensor(20))
    assert balance.alpha.item() == pytest.approx(0.004 + 0.006 * 0.99, abs=1e-9)


def test_a_constant_coefficient_stays():
    mixture = archzoo.MixtureOfExperts(16, 8, balance="switch")
    assert not dict(mixture.named_buffers())
    mixture.after_step({"assignments": torch.arange(8)})
    assert mixture.balance.largest == 0.01


def test_the_coefficient_may_move_between_forward_and_backward():
    mixture = archzoo.MixtureOfExperts(16, 8, adaptive=True, coefficient=0.01)
    aux = mixture(torch.randn(2, 9, 16), make_context(2, 9)[0])[1]
    mixture.after_step(aux.sums)
    aux.losses["balance"].backward()
    assert mixture.router.projection.weight.grad.abs().max() > 0


def model(**arguments):
    router = {"class_path": "LinearRouter", "init_args": {"bias_rate": 1e-3}}
    spec = {"router": router, "adaptive": True, "balance": "squared_mean"}
    return archzoo.create_model(
        "skywork_micro",
        feed_forward={"class_path": "MixtureOfExperts", "init_args": spec},
        **arguments,
    )


def buffers(net):
    return {name: value.clone() for name, value in net.named_buffers()}


def test_each_layer_follows_its_own_counts():
    net = model()
    uneven, even = torch.tensor([800] + [0] * 7), torch.full((8,), 100)
    for _ in range(10):
        net.after_step([{"assignments": uneven}, {"assignments": even}])
    first, second = (block.feed_forward for block in net.blocks)
    assert first.balance.alpha.item() == pytest.approx(0.01, rel=1e-6)
    assert second.balance.alpha.item() == pytest.approx(0.01 * 0.99**10, rel=1e-5)
    assert first.router.expert_bias[0] < 0 < first.router.expert_bias[1]
    assert second.router.expert_bias.abs().max() == 0


@pytest.mark.parametrize("segments", [2, 4])
def test_counts_of_a_step_are_the_same_however_it_is_split(segments):
    """Micro-batches and ranks only add: coefficients and biases cannot tell them from one batch."""
    tokens = torch.randint(64, (8, 16))
    whole, split = model(), model()
    split.load_state_dict(whole.state_dict())
    for net, parts in ((whole, [tokens]), (split, tokens.chunk(segments))):
        for _ in range(3):
            sums = [{"assignments": 0}, {"assignments": 0}]
            for part in parts:
                for mine, layer in zip(sums, net(part).aux, strict=True):
                    mine["assignments"] = mine["assignments"] + layer.sums["assignments"]
            net.after_step(sums)
    for name, value in buffers(whole).items():
        assert torch.equal(value, buffers(split)[name]), name
    assert any(value.abs().max() > 0 for name, value in buffers(whole).items() if "bias" in name)


def test_coefficients_and_biases_survive_casts_and_a_checkpoint():
    net = model()
    for _ in range(7):
        sums = [{"assignments": torch.arange(8) ** 2}] * 2
        net.after_step(sums)
    want = buffers(net)
    assert len(want) == 4 and all(value.dtype == torch.float32 for value in want.values())
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    fresh = model()
    fresh.load_state_dict(torch.load(file, weights_only=True))
    for cast in (net.bfloat16(), net.half(), fresh):
        for name, value in want.items():
            assert torch.equal(buffers(cast)[name], value), name
    fresh.after_step(sums)
    net.float().after_step(sums)
    for name, value in buffers(net).items():
        assert torch.equal(buffers(fresh)[name], value), name


def test_optimizers_do_not_see_coefficients_and_biases():
    names = [name for name, _ in model().named_parameters()]
    assert not [name for name in names if "alpha" in name or "expert_bias" in name]


def test_an_imbalance_of_one_layer_cannot_hide_in_another():
    """Pooled over layers, two lopsided routers may look even; each has its own entry here."""
    net = archzoo.create_model("skywork_micro")
    aux = net(torch.randint(64, (2, 16))).aux
    for layer in aux:
        assert "balance" in layer.losses
        assert {"coefficient", "max_violation"} < set(layer.metrics)


@pytest.mark.parametrize("documents", [None, [[-1] * 3 + [0] * 6]])
def test_drop_rate_in_the_aux_is_of_what_was_dropped(documents):
    mixture = archzoo.MixtureOfExperts(
        16, 8, experts=4, capacity_factor=0.5, drop="position", adaptive=True
    )
    documents = None if documents is None else torch.tensor(documents)
    context, _ = make_context(1, 9, documents=documents)
    x = torch.randn(1, 9, 16)
    aux = mixture(x, context)[1]
    total, dropped = aux.sums["assignments"].sum(), aux.sums["dropped"]
    assert total == (18 if documents is None else 12)
    counts = aux.sums["assignments"]
    assert dropped == (counts - 3).clamp(min=0).sum()  # 0.5 * 18 / 4, rounded up
    assert dropped > 0
    assert aux.metrics["drop_rate"].item() == pytest.approx((dropped / total).item())


def test_no_token_at_all_is_no_division_by_zero():
    balance = adaptive()
    context, _ = make_context(1, 3, documents=torch.full((1, 3), -1))
    p = torch.full((3, 4), 0.25)
    aux = balance(Routing(p[:, :2], torch.zeros(3, 2, dtype=torch.int64), p, p), context)
    assert all(value.isfinite().all() for value in tree_leaves(aux))
    balance.after_step(aux.sums["assignments"])
    assert balance.alpha.isfinite()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"balance": "even"}, "balance='even' is not one of"),
        ({"balance": "none", "adaptive": True}, "adaptive=True needs a loss"),
        ({"coefficient": -1.0}, "coefficient=-1.0 must be at least 0"),
        ({"z_coefficient": -1.0}, "z_coefficient=-1.0"),
        ({"capacity_factor": 0.0}, "capacity_factor=0.0 must be above 0"),
    ],
)
def test_bad_arguments_get_one_clear_line(arguments, words):
    with pytest.raises(ValueError, match=words) as caught:
        archzoo.MixtureOfExperts(16, 8, **arguments)
    assert "\n" not in str(caught.value)
