"""Head and cross-entropy in one kernel against their plain form, gradients included.

Without a GPU it runs through Triton's interpreter.
"""

import pytest
import torch
from kernel_device import DEVICE, GPU, define_kernels

from archzoo.kernels import cross_entropy as kernels
from archzoo.linear import Linear
from archzoo.training import losses

define_kernels("archzoo.kernels.cross_entropy.triton")


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    if not GPU:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(kernels, "SLICE", 1)
    monkeypatch.setattr(kernels, "LEAST_ROWS", 16)  # several slices, the last of them shorter
    monkeypatch.setattr(kernels, "MAX_BLOCK", 4096)


def case(tokens, vocab_size, dim, dtype, labelled=0.8):
    x = torch.randn(1, tokens, dim, dtype=dtype, device=DEVICE, requires_grad=True)
    head = Linear(dim, {"head": vocab_size}).to(DEVICE)
    labels = torch.randint(vocab_size, (1, tokens), device=DEVICE)
    labels[torch.rand(1, tokens, device=DEVICE) > labelled] = -100
    return x, head, labels


def both(compute, x, head, labels, monkeypatch):
    """What the kernel gives, and the plain form in float64 at the same numbers."""
    assert kernels.available(x.flatten(0, 1), head)
    found = compute(x, head, labels)
    monkeypatch.setattr(kernels, "available", lambda x, head: False)
    wide = Linear(head.in_features, head.blocks).to(DEVICE, torch.float64)
    wide.load_state_dict(head.state_dict())
    wide_x = x.detach().double().requires_grad_()
    with torch.autocast(DEVICE, enabled=False):
        return found, compute(wide_x, wide, labels), wide_x, wide


def distance(found, wanted):
    return float((found.double() - wanted).norm() / wanted.norm())


# 5 and 100 are no multiples of anything, 9,000 takes two blocks of a row.
@pytest.mark.parametrize(("tokens", "vocab_size", "dim"), [(37, 5, 8), (16, 100, 24), (5, 9000, 8)])
@pytest.mark.parametrize("labelled", [0.0, 0.8])
def test_loss_and_gradients_are_those_of_the_plain_form(
    tokens, vocab_size, dim, labelled, monkeypatch
):
    x, head, labels = case(tokens, vocab_size, dim, torch.float32, labelled)
    found, wanted, wide_x, wide = both(losses.total_loss, x, head, labels, monkeypatch)
    (0.3 * found).backward()
    (0.3 * wanted).backward()
    if labelled == 0:
        assert found == 0 and not x.grad.any() and not head.weight.grad.any()
        return
    assert found.dtype == torch.float32 and distance(found, wanted) < 1e-5
    assert distance(x.grad, wide_x.grad) < 1e-4
    assert distance(head.weight.grad, wide.weight.grad) < 1e-4


@pytest.mark.parametrize("vocab_size", [70, 64])
def test_autocast_rounds_no_more_than_the_plain_form(vocab_size, monkeypatch):
    x, head, labels = case(300, vocab_size, 32, torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        found, wanted, wide_x, wide = both(losses.total_loss, x, head, labels, monkeypatch)
        plain_x = x.detach().requires_grad_()
        plain_head = Linear(32, {"head": vocab_size}).to(DEVICE)
        plain_head.load_state_dict(head.state_dict())
        plain = losses.total_loss(plain_x, plain_head, labels)
    for loss in (found, wanted, plain):
        loss.backward()
    assert x.grad.dtype == head.weight.grad.dtype == torch.float32
    assert distance(found, wanted) < 1e-3
    for fast, slow, true in (
        (x.grad, plain_x.grad, wide_x.grad),
        (head.weight.grad, plain_head.weight.grad, wide.weight.grad),
    ):
        assert distance(fast, true) < max(1.5 * distance(slow, true), 1e-3)
        assert distance(slow, true) > 0  # the plain form that is compared with rounds too


@pytest.mark.parametrize("vocab_size", [5, 5000])
def test_scores_are_those_of_the_plain_form(vocab_size, monkeypatch):
    x, head, labels = case(21, vocab_size, 8, torch.float32)
    found, wanted, *_ = both(losses.score, x, head, labels, monkeypatch)
    torch.testing.assert_close(found.losses.double(), wanted.losses, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.predicted, wanted.predicted)


def test_scores_of_one_token_of_each_row():
    """Whose labels lie apart in memory."""
    x, head, labels = case(12, 7, 8, torch.float32, labelled=1.0)
    x, labels = x.view(3, 4, 8), labels.view(3, 4)
    found, whole = (losses.score(x[:, n:], head, labels[:, n:]) for n in (3, 0))
    assert torch.equal(found.losses.view(3), whole.losses.view(3, 4)[:, 3])
    assert torch.equal(found.predicted.view(3), whole.predicted.view(3, 4)[:, 3])


@pytest.mark.parametrize("least", [0, 1])
def test_a_block_that_cannot_be_chosen(least):
    """The first or the last of two, whose logits are all -inf."""
    logits = torch.randn(2, 8192, device=DEVICE)
    logits.view(2, 2, 4096)[:, least] = -torch.inf
    labels = torch.tensor([5000 - 4096 * least, 8000 - 4096 * least], device=DEVICE)
    wanted = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    gradient = logits.softmax(1)
    gradient[[0, 1], labels] -= 1
    found = torch.empty(2, device=DEVICE)
    kernels._cross_entropy(logits, labels, found, None, 8192)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(logits, gradient)


def test_what_is_predicted_beside_nan_is_a_token():
    logits = torch.tensor([[0.0] * 4 + [torch.nan] * 8], device=DEVICE)
    found, predicted = torch.empty(1, device=DEVICE), torch.empty(1, 1, device=DEVICE).long()
    labels = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    kernels._cross_entropy(logits, labels, found, predicted, 12)
    assert found.isnan()
    assert 0 <= predicted < 12


def test_of_equal_logits_the_first_is_predicted(monkeypatch):
    x, head, labels = case(3, 7, 8, torch.float32)
    head.weight.data[:] = head.weight.data[:1]
    assert losses.score(x, head, labels).predicted.tolist() == [0, 0, 0]


@pytest.mark.parametrize("label", [-1, -7, 7, 2**40])
def test_a_label_that_is_no_token_makes_the_loss_nan(label):
    x, head, labels = case(4, 7, 8, torch.float32, labelled=1.0)
    labels[0, 2] = label
    assert losses.total_loss(x, head, labels).isnan()


def test_second_derivatives_are_those_of_the_plain_form(monkeypatch):
    x, head, labels = case(9, 7, 8, torch.float32)

    def twice(x, head, labels):
        (first,) = torch.autograd.grad(losses.total_loss(x, head, labels), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), (x, head.weight))

    found, wanted, *_ = both(twice, x, head, labels, monkeypatch)
    for mine, true in zip(found, wanted, strict=True):
        assert distance(mine, true) < 1e-4


def test_only_what_needs_a_gradient_gets_one():
    x, head, labels = case(9, 7, 8, torch.float32)
    losses.total_loss(x.detach(), head, labels).backward()
    assert head.weight.grad is not None
    head.weight.grad = None
    head.requires_grad_(False)
    losses.total_loss(x, head, labels).backward()
    assert x.grad is not None and head.weight.grad is None
    with torch.no_grad():
        assert losses.total_loss(x, head, labels) > 0


def test_other_heads_and_dtypes_take_the_plain_form():
    x, head, _ = case(4, 7, 8, torch.float32)
    assert kernels.available(x[0], head)
    assert not kernels.available(x[0].half(), head)
    assert not kernels.available(x[0].double(), head)
    assert not kernels.available(x[0, :0], head)
    assert not kernels.available(x[0], torch.nn.Linear(8, 7))
    assert not kernels.available(x[0], Linear(8, {"head": 7}, bias=True))
    with torch.autocast(DEVICE, torch.float16):
        assert not kernels.available(x[0], head)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert kernels.available(x[0], head)
