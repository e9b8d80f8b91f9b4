"""What kernels are given may lie apart in memory: the same comes of it, or one line refuses it.

Without a GPU they run through Triton's interpreter.
"""

import pytest
import torch
from kernel_device import DEVICE, GPU, define_kernels

from archzoo.block import make_context
from archzoo.kernels import (
    cache_attention,
    decoding,
    digits,
    retention,
    retention_layer,
    rotation,
    routers,
)
from archzoo.kernels.decoding import Norm, Rotation
from archzoo.positions.rotary import RotaryEmbedding, rotate

for name in ("cache_attention", "decoding", "digits", "retention", "retention_layer", "rotation"):
    define_kernels(f"archzoo.kernels.{name}.triton")
define_kernels("archzoo.kernels.routers.triton")


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    torch.manual_seed(0)
    if not GPU:
        monkeypatch.setenv("TRITON_INTERPRET", "1")


def draw(*shape):
    return torch.randn(shape, device=DEVICE)


def apart(x, dim=-1):
    """The same numbers, between others along an axis."""
    wide = torch.stack([x, torch.full_like(x, 9)], dim=dim % x.dim() + 1)
    found = wide.select(dim % x.dim() + 1, 0)
    assert torch.equal(found, x) and not found.is_contiguous()
    return found


def turned(x):
    """The same numbers, column by column."""
    return x.t().contiguous().t()


def test_a_router_s_bias():
    logits, bias = draw(6, 5), torch.tensor([0.0, 9, 0, 0, 0], device=DEVICE)
    for given in (bias, apart(bias)):
        chosen = routers.choose(logits, 1, given, sigmoid=True, renormalise=True)[1]
        assert chosen.flatten().tolist() == [1] * 6


def test_kinds_of_tokens():
    kinds = torch.tensor([2] * 10 + [1, 1, 0, 0], dtype=torch.int8, device=DEVICE)
    tokens = torch.tensor([[1, 2, 10, 3, 4, 12]], device=DEVICE)
    context = make_context(1, 6, device=torch.device(DEVICE))[0]
    found = [
        digits.shifted_rows(
            tokens, given, context, coupled=False, last=70, key=5, bound=1, examples=None
        )
        for given in (kinds, apart(kinds))
    ]
    assert torch.equal(*found)


def test_rows_that_are_cut_apart_and_rotated():
    projected = draw(2, 5, 32)
    positions = torch.arange(5, device=DEVICE)[None]
    table = RotaryEmbedding(8).table(positions, torch.float32)
    wanted = rotation.split_rotated(projected, table, 2, 1)
    found = rotation.split_rotated(apart(projected, 1), table, 2, 1)
    assert all(map(torch.equal, found, wanted))


def test_a_layer_of_retention():
    projected, decay = draw(2, 5, 80), -torch.full((2,), 0.2, device=DEVICE)
    table = torch.polar(torch.ones(1, 5, 1, 4), torch.randn(1, 5, 1, 4)).to(DEVICE)
    how = {"heads": 2, "key_width": 8, "eps": 1e-6}
    memory = draw(2, 2, 8, 12)
    for given in (apart(projected, 1), apart(projected)):
        wanted = retention_layer.gated_retention(projected, table, decay, None, None, None, **how)
        found = retention_layer.gated_retention(given, table, decay, None, None, None, **how)
        assert torch.equal(found, wanted)
        ways = [
            retention_layer.gated_retention_from(
                memory.clone(), rows, table, decay, None, None, None, **how
            )
            for rows in (projected, given)
        ]
        assert all(map(torch.equal, *ways))


def test_a_state_that_is_one_seen_many_times():
    q, k, v = draw(3, 2, 8), draw(3, 2, 8), draw(3, 2, 12)
    state = draw(1, 2, 8, 12).expand(3, -1, -1, -1)
    decay = -torch.ones(2, device=DEVICE)
    with torch.no_grad(), pytest.raises(ValueError, match=r"share memory.*give state\.clone\(\)"):
        retention.retention_step(q, k, v, decay, state)


@pytest.mark.parametrize("name", ["documents", "arrivals"])
def test_a_cache_s_own_tensors(name):
    q, k, v = draw(2, 4, 8), draw(2, 2, 8), draw(2, 2, 8)
    keys, values = draw(2, 2, 7, 8), draw(2, 2, 7, 8)
    own = {"documents": torch.zeros(2, 7, dtype=torch.int64, device=DEVICE)}
    own["arrivals"] = cache_attention.make_arrivals(2, 4, 4, DEVICE)
    own[name] = apart(own[name], 0)
    document = torch.zeros(2, 1, dtype=torch.int64, device=DEVICE)
    with torch.no_grad(), pytest.raises(ValueError, match=f"{name} of strides .* be contiguous"):
        cache_attention.attend_cache(
            q, k, v, keys, values, torch.tensor(4, device=DEVICE), document=document, **own
        )


def test_where_a_step_begins():
    tokens, embedding = torch.tensor([3, 1, 4], device=DEVICE), draw(6, 8)
    theta = torch.rand(4, dtype=torch.float64, device=DEVICE)
    positions = torch.tensor([5, 9, 2], device=DEVICE)
    wanted = decoding.start(tokens, embedding, positions.clone(), theta, 1.0)
    found = decoding.start(tokens, embedding, positions.clone(), apart(theta), 1.0)
    assert all(map(torch.equal, found, wanted))
    table = decoding.rotation_table(positions, theta, 1.0)
    assert torch.equal(decoding.rotation_table(apart(positions), apart(theta), 1.0), table)
    with pytest.raises(ValueError, match=r"positions of strides .* must be contiguous"):
        decoding.start(tokens, embedding, apart(positions), theta, 1.0)
    with pytest.raises(ValueError, match=r"embedding of strides .* must be contiguous"):
        decoding.start(tokens, turned(embedding), positions, theta, 1.0)


@pytest.mark.parametrize("batch", [2, 5])
def test_a_product_of_a_step(batch):
    x, weight, norm, gate = draw(batch, 24), draw(32, 24), draw(24), draw(batch, 24)
    table = draw(batch, 4, 2)
    wanted = decoding.linear(x, weight, norm=Norm(norm, 1e-6), rotation=Rotation(table, 8, 16, 8))
    turn = Rotation(apart(table), 8, 16, 8)
    found = decoding.linear(turned(x), weight, norm=Norm(apart(norm), 1e-6), rotation=turn)
    torch.testing.assert_close(found, wanted)
    wanted = decoding.linear(x, weight, norm=Norm(None, 1e-6, 3, gate))
    found = decoding.linear(x, weight, norm=Norm(None, 1e-6, 3, turned(gate)))
    torch.testing.assert_close(found, wanted)
    with pytest.raises(ValueError, match=r"weight of strides .* must be contiguous"):
        decoding.linear(x, turned(weight))
    for residual in (turned(draw(batch, 32)), draw(1, 32).expand(batch, 32)):
        with pytest.raises(ValueError, match=r"residual of strides .* rows of their own"):
            decoding.linear(x, weight, residual=residual)


def test_scaled_heads():
    z, table = draw(3, 60), draw(3, 4, 2)
    how = decoding.make_blend([(12, draw(5, 12), draw(2, 5, 12), False)], 2)
    wanted = decoding.blend(z, how, torch.zeros(3, 60, device=DEVICE))
    assert torch.equal(decoding.blend(turned(z), how, torch.zeros(3, 60, device=DEVICE)), wanted)
    with pytest.raises(ValueError, match=r"y of strides .* must be contiguous"):
        decoding.blend(z, how, turned(torch.zeros(3, 60, device=DEVICE)))
    assert table.is_contiguous()


def test_a_step_of_retention():
    q, k, v = draw(3, 48).split(16, dim=1)
    decay, positions = -torch.full((2,), 0.2, device=DEVICE), torch.tensor([3, 0, 9], device=DEVICE)
    memory = draw(3, 2, 8, 8)
    wanted = decoding.retain(q, k, v, decay, positions, memory.clone())
    found = decoding.retain(q, k, v, apart(decay), apart(positions), memory.clone())
    assert torch.equal(found, wanted)
    with pytest.raises(ValueError, match="rows of strides 48, 16 and 48"):
        decoding.retain(q, k.contiguous(), v, decay, positions, memory)
    with pytest.raises(ValueError, match=r"memory of strides .* must be contiguous"):
        decoding.retain(q, k, v, decay, positions, memory.transpose(2, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pairs_that_cannot_be_viewed_as_complex(dtype):
    x = torch.randn(2, 5, 3, 8, dtype=dtype)
    table = RotaryEmbedding(8).table(torch.arange(5)[None], dtype)
    wanted = rotate(x, table)
    odd = torch.cat([torch.zeros(1, dtype=dtype), x.flatten()])[1:].view(x.shape)
    assert odd.is_contiguous() and odd.storage_offset() == 1
    for given in (odd, apart(x)):
        assert torch.equal(rotate(given, table), wanted)
