"""Localized filtering attention: the authors' numbers, its reach, its state.

Forms, hand-offs, documents and gradients are held by the contract, tests/test_contract.py.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import archzoo
from archzoo.block import init_cursor, make_context
from archzoo.contract import relative_error
from archzoo.mixers.filtered import FilteredAttention

GOLDEN = Path(__file__).parent / "golden" / "yuan_lfa_f64.safetensors"
DOUBLE = torch.float64


def taps(weight):
    """(out, in, 2, 1) as one matrix on [token before; token]."""
    return torch.cat([weight[:, :, 0, 0], weight[:, :, 1, 0]], dim=1)


def load():
    golden = load_file(GOLDEN)
    mixer = FilteredAttention(32, 4).double()
    with torch.no_grad():
        for ours, theirs in ((mixer.first, "conv1"), (mixer.second, "conv2")):
            ours.weight.copy_(taps(golden[f"weight.{theirs}.weight"]))
            ours.bias.copy_(golden[f"weight.{theirs}.bias"])
        mixer.filter_norm.weight.copy_(golden["weight.output_layernorm.weight"])
    return golden, mixer


def random_mixer(dim=16, heads=2):
    mixer = FilteredAttention(dim, heads).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return mixer


def test_filter_gives_the_golden_numbers_and_gradients():
    golden, mixer = load()
    x = golden["x"].clone().requires_grad_()
    u, state = mixer.filter(x, None, make_context(2, 13)[0])
    assert state is None
    assert relative_error(u, golden["out"]) < 1e-12
    (u * golden["grad_out"]).sum().backward()
    for got, name in (
        (x.grad, "grad_x"),
        (mixer.first.bias.grad, "grad.conv1.bias"),
        (mixer.second.bias.grad, "grad.conv2.bias"),
        (mixer.filter_norm.weight.grad, "grad.output_layernorm.weight"),
    ):
        assert relative_error(got, golden[name]) < 1e-12, name
    for got, name in ((mixer.first.weight.grad, "conv1"), (mixer.second.weight.grad, "conv2")):
        assert relative_error(got, taps(golden[f"grad.{name}.weight"])) < 1e-12, name


@pytest.mark.parametrize(
    ("cuts", "name"), [(range(14), "incremental_from_pos0"), ((0, 6, 13), "incremental_prefill6")]
)
def test_filter_in_segments_gives_the_golden_numbers(cuts, name):
    golden, mixer = load()
    state, cursor, segments = mixer.init_state(2, dtype=DOUBLE), init_cursor(2), []
    for begin, end in zip(list(cuts)[:-1], list(cuts)[1:], strict=True):
        context, cursor = make_context(2, end - begin, cursor=cursor)
        u, state = mixer.filter(golden["x"][:, begin:end], state, context)
        segments.append(u)
    assert relative_error(torch.cat(segments, dim=1), golden[name]) < 1e-12


def test_whole_mixer_against_loops():
    """Token by token in plain sums: q and k from the filtered input, v from the input."""
    mixer = random_mixer()
    x = torch.randn(1, 7, 16, dtype=DOUBLE)
    y, _ = mixer(x, None, make_context(1, 7)[0])
    zero, h = torch.zeros(16, dtype=DOUBLE), x[0]
    c1, u = [], []
    for t in range(7):
        before = h[t - 1] if t else zero
        c1.append(mixer.first.weight @ torch.cat([before, h[t]]) + mixer.first.bias)
        before = c1[t - 1] if t else zero[:8]
        c2 = mixer.second.weight @ torch.cat([before, c1[t]]) + mixer.second.bias
        root = ((c2 + h[t]).square().mean() + 1e-6).sqrt()
        u.append((c2 + h[t]) / root * mixer.filter_norm.weight)
    query, key, value = mixer.query_key_value.weight.chunk(3)
    q, k = (torch.stack(u) @ weight.T for weight in (query, key))
    q, k = (part.view(1, 7, 2, 8) for part in (q, k))
    positions = torch.arange(7)[None]
    q, k = (part[0] for part in mixer.rotary(q, k, positions, positions))
    v = (h @ value.T).view(7, 2, 8)
    mixed = torch.zeros(7, 2, 8, dtype=DOUBLE)
    for t in range(7):
        for head in range(2):
            scores = torch.stack([q[t, head] @ k[m, head] / 8**0.5 for m in range(t + 1)])
            mixed[t, head] = scores.softmax(0) @ v[: t + 1, head]
    want = mixed.view(7, 16) @ mixer.output.weight.T
    assert relative_error(y[0], want) < 1e-12


def test_filter_reaches_exactly_two_tokens_back():
    mixer = random_mixer()
    x = torch.randn(2, 9, 16, dtype=DOUBLE, requires_grad=True)
    u, _ = mixer.filter(x, None, make_context(2, 9)[0])
    (gradient,) = torch.autograd.grad(u[0, 5].square().sum(), x)
    seen = gradient.abs().sum(-1) != 0
    want = torch.zeros(2, 9, dtype=torch.bool)
    want[0, 3:6] = True
    assert torch.equal(seen, want)


def test_a_document_begins_with_zeros_and_not_with_the_bias():
    """c1 before the first token is 0: a padded or packed document must not see b1 there."""
    mixer = random_mixer()
    x = torch.randn(1, 8, 16, dtype=DOUBLE)
    alone, _ = mixer.filter(x[:, 3:], None, make_context(1, 5)[0])
    for documents in ([[-1] * 3 + [0] * 5], [[0] * 3 + [1] * 5]):
        context, _ = make_context(1, 8, documents=torch.tensor(documents))
        u, _ = mixer.filter(x, None, context)
        assert relative_error(u[:, 3:], alone) < 1e-12


def test_state_is_one_and_a_half_widths_beside_the_cache():
    mixer = FilteredAttention(32, 4)
    context, _ = make_context(3, 6)
    plain = archzoo.Attention(32, 4).init_state(3)
    _, state = mixer(torch.randn(3, 6, 32), mixer.init_state(3), context)
    extra = {name: leaf for name, leaf in state.items() if name not in plain}
    assert sum(leaf.numel() for leaf in extra.values()) == 3 * 1.5 * 32
    assert state["keys"].shape == (3, 4, 6, 8)


def test_a_segment_of_padding_leaves_the_state():
    mixer = random_mixer()
    x = torch.randn(2, 4, 16, dtype=DOUBLE)
    _, state = mixer.filter(x, mixer.init_state(2, dtype=DOUBLE), make_context(2, 4)[0])
    padding, _ = make_context(2, 4, documents=torch.full((2, 4), -1))
    _, after = mixer.filter(torch.randn_like(x), state, padding)
    for name in ("filter_input", "filter_hidden"):
        assert torch.equal(after[name], state[name])
