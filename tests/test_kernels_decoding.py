"""The kernels of a decoding step against the operations they stand for.

Without a GPU they run through Triton's interpreter.
"""

import pytest
import torch
from kernel_device import DEVICE, GPU, define_kernels
from torch.nn import functional as F

from archzoo.block import make_context
from archzoo.kernels import decoding as kernels
from archzoo.kernels.decoding import Norm, Rotation
from archzoo.low_rank import Change, changed_product, softmax_of
from archzoo.mixers.retention import Retention
from archzoo.norm import rms_norm
from archzoo.numerics import TOLERANCES
from archzoo.positions.rotary import rotary_frequencies, rotate, rotation_table

define_kernels("archzoo.kernels.decoding.triton")
define_kernels("archzoo.kernels.retention_layer.triton")

DTYPES = (torch.float32, torch.bfloat16)
LOW = torch.bfloat16 if GPU else torch.float16  # the interpreter cuts bfloat16 off
# One row and two by vectors, more by matrices, whose rows do not fill a tile.
BATCHES = [(1, DTYPES[0]), (2, DTYPES[1]), (5, LOW), (19, DTYPES[0])]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    if not GPU:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setattr(kernels, "PROGRAMS", 1)  # which the interpreter runs in turn


def draw(*shape, dtype=torch.float32, scale=1.0):
    return (scale * torch.randn(shape)).to(DEVICE, dtype)


def distance(found, wanted):
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize(("batch", "dtype"), BATCHES)
@pytest.mark.parametrize(("width", "out"), [(24, 30), (40, 18)])
@pytest.mark.parametrize("paired", [False, True])
def test_linear_after_a_norm(batch, dtype, width, out, paired):
    torch.manual_seed(batch)
    x, scale = draw(batch, width, dtype=dtype), draw(width, dtype=dtype)
    weight = draw(out * (1 + paired), width, dtype=dtype, scale=0.2)
    found = kernels.linear(x, weight, norm=Norm(scale, 1e-6), paired=paired)
    y = rms_norm(x.double(), scale.double(), 1e-6) @ weight.double().T
    if paired:
        gate, up = y.chunk(2, dim=-1)
        y = F.silu(gate) * up
    assert found.dtype == dtype
    assert distance(found, y) < TOLERANCES[dtype]


@pytest.mark.parametrize(("batch", "dtype"), BATCHES)
@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize(("experts", "rank", "top_k"), [(3, 5, 2), (4, 1, None)])
def test_mixture_beside_a_product(batch, dtype, paired, experts, rank, top_k):
    torch.manual_seed(batch)
    if top_k is not None:  # which of two is chosen is for no rounding to say
        dtype = torch.float32
    dtype = LOW if dtype == torch.bfloat16 else dtype
    dim, places = 24, [(0, 30), (30, 30)] if paired else [(16, 32), (64, 11)]
    out, scale = 60 if paired else 75, 0.7
    x, norm = draw(batch, dim, dtype=dtype), draw(dim, dtype=dtype)
    weight = draw(out, dim, dtype=dtype, scale=0.2)
    changes = []
    for begin, rows in places:
        first, router = draw(experts * rank, dim, scale=0.2), draw(experts, dim, scale=0.3)
        second = draw(rows, experts * rank, scale=0.5)
        parts = (part.to(dtype) for part in (first, second, router))
        first, second, router = parts
        changes.append(Change(begin, first, second, scale, router, top_k))
    firsts = [change.first for change in changes] + [change.router for change in changes]
    seconds = [(change.begin, change.second) for change in changes]
    mixture = kernels.make_mixture(
        torch.cat(firsts), seconds, out, experts, top_k, scale, paired=paired
    )
    wide = [
        change._replace(
            first=change.first.double(),
            second=change.second.double(),
            router=change.router.double(),
        )
        for change in changes
    ]
    normed = rms_norm(x.double(), norm.double(), 1e-6)
    wanted = changed_product(normed, weight.double(), None, wide)
    if paired:
        gate, up = wanted.chunk(2, dim=-1)
        wanted = F.silu(gate) * up
    found = kernels.linear(x, weight, norm=Norm(norm, 1e-6), paired=paired, mixture=mixture)
    assert distance(found, wanted) < TOLERANCES[dtype]


@pytest.mark.parametrize(("batch", "dtype"), BATCHES)
def test_vectors_scale_the_input_of_a_product(batch, dtype, monkeypatch):
    torch.manual_seed(batch)
    monkeypatch.setattr(kernels, "LEAVING", 5)
    monkeypatch.setattr(kernels, "_BLEND_TILE", 16)
    width, out, experts = 40, 18, 3
    dtype = LOW if dtype == torch.bfloat16 else dtype
    x, before = draw(batch, 24, dtype=dtype), draw(2 * width, 24, dtype=dtype, scale=0.4)
    weight = draw(out, width, dtype=dtype, scale=0.2)
    router, vectors = draw(experts, width, dtype=dtype, scale=0.3), draw(experts, width)
    mixture = kernels.make_scaling(router, vectors - 1, None)
    z, left = kernels.linear_and_next(x, before, mixture, paired=True)
    assert (left is None) == (batch > 2)
    assert left is None or len(left) > 1
    gates = torch.softmax(z.double() @ router.double().T, dim=-1)
    wanted = (z.double() * (gates @ vectors.double())) @ weight.double().T
    for given in (left, None):
        found = kernels.linear(z, weight, mixture=mixture, left=given)
        assert distance(found, wanted) < TOLERANCES[dtype]


@pytest.mark.parametrize("top_k", [None, 2])
def test_vectors_scale_heads_before_they_are_turned(top_k):
    torch.manual_seed(0)
    batch, experts, scale = 3, 5, 0.25
    z = draw(batch, 12 + 2 * 12 + 3 * 8)  # what is left alone, keys and values
    positions = torch.randint(0, 1000, (batch, 1), device=DEVICE)
    frequencies = rotary_frequencies(8)
    theta = torch.tensor(frequencies, dtype=torch.float64, device=DEVICE)
    table = kernels.rotation_table(positions[:, 0], theta, 1.0)
    key = draw(experts, 12), draw(2, experts, 12)
    value = draw(experts, 8), draw(3, experts, 8)
    blocks = [(12, key[0], key[1] - 1, True), (36, value[0], value[1] - 1, False)]
    wanted = z.double().clone()
    for begin, size, (router, vectors) in ((12, 12, key), (36, 8, value)):
        here = slice(begin, begin + len(vectors) * size)
        heads = wanted[:, here].unflatten(1, (-1, size))
        gates = softmax_of(heads @ router.double().T, top_k)
        wanted[:, here] = (heads * torch.einsum("bhe,hec->bhc", gates, vectors.double())).flatten(1)
    turn = rotation_table(positions, frequencies, torch.float64, 1.0)
    keys = rotate(wanted[:, 12:36].view(batch, 1, 2, 12), turn)
    wanted[:, 12:36] = scale * keys.flatten(1)
    rotation = Rotation(table, 12, 12, 24, scale)
    found = kernels.blend(z, kernels.make_blend(blocks, top_k), z, rotation)
    assert found is z
    assert distance(found, wanted) < TOLERANCES[torch.float32]


@pytest.mark.parametrize(("batch", "dtype"), BATCHES)
def test_linear_adds_to_the_residual(batch, dtype):
    torch.manual_seed(batch)
    x, residual = draw(batch, 48, dtype=dtype), draw(batch, 20, dtype=dtype)
    weight = draw(20, 48, dtype=dtype, scale=0.2)
    wanted = residual.double() + x.double() @ weight.double().T
    found = kernels.linear(x, weight, residual=residual)
    assert found is residual
    assert distance(found, wanted) < TOLERANCES[dtype]


@pytest.mark.parametrize(("batch", "dtype"), BATCHES)
@pytest.mark.parametrize(("heads", "size"), [(3, 8), (2, 12), (1, 20)])
def test_linear_after_head_norm_and_gate(batch, dtype, heads, size):
    torch.manual_seed(batch)
    width = heads * size
    o, projected = draw(batch, width), draw(batch, 3 * width, dtype=dtype)
    gate, weight = projected[:, width : 2 * width], draw(10, width, dtype=dtype, scale=0.2)
    residual = draw(batch, 10, dtype=dtype)
    normed = rms_norm(o.double().unflatten(1, (heads, size)), eps=1e-6).flatten(1)
    wanted = residual.double() + (F.silu(gate.double()) * normed) @ weight.double().T
    found = kernels.linear(o, weight, norm=Norm(None, 1e-6, heads, gate), residual=residual)
    assert distance(found, wanted) < TOLERANCES[dtype]


@pytest.mark.parametrize(("batch", "rotary_dim"), [(1, 12), (2, 8), (5, 12)])
def test_linear_rotates_queries_and_keys(batch, rotary_dim):
    torch.manual_seed(batch)
    heads, kv_heads, size, width = 2, 1, 12, 24
    x, scale = draw(batch, width), draw(width)
    weight = draw((heads + 2 * kv_heads) * size, width, scale=0.2)
    positions = torch.randint(0, 100_000, (batch, 1), device=DEVICE)
    frequencies = rotary_frequencies(rotary_dim)
    theta = torch.tensor(frequencies, dtype=torch.float64, device=DEVICE)
    table = kernels.rotation_table(positions[:, 0], theta, 1.5)
    rotation = Rotation(table, size, heads * size, kv_heads * size, 0.25)
    found = kernels.linear(x, weight, norm=Norm(scale, 1e-6), rotation=rotation)
    y = (rms_norm(x, scale, 1e-6) @ weight.T).view(batch, 1, -1, size)
    turned = rotate(y[:, :, :3], rotation_table(positions, frequencies, torch.float32, 1.5))
    turned[:, :, 2] *= 0.25
    wanted = torch.cat([turned, y[:, :, 3:]], dim=2).view(batch, -1)
    assert distance(found, wanted) < TOLERANCES[torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
def test_start_looks_tokens_up_and_counts_on(dtype):
    torch.manual_seed(0)
    embedding = draw(50, 24, dtype=dtype)
    tokens = torch.randint(50, (3, 4), device=DEVICE)[:, 2:3]  # the last of a text each
    before = torch.tensor([-1, 6, 70_000], device=DEVICE)
    positions, frequencies = before.clone(), rotary_frequencies(10)
    theta = torch.tensor(frequencies, dtype=torch.float64, device=DEVICE)
    x, table = kernels.start(tokens, embedding, positions, theta, 2.0)
    assert x.equal(embedding[tokens[:, 0]])
    assert positions.equal(before + 1)
    wanted = rotation_table(positions[:, None], frequencies, torch.float32, 2.0)
    assert distance(table, torch.view_as_real(wanted)[:, 0, 0]) < 1e-6


@pytest.mark.parametrize(
    ("decay", "heads"), [("default", 2), (1.0, 2), ("default", 64)], ids=["two", "none", "many"]
)
def test_retain_is_the_plain_step(decay, heads):
    """Of many heads the last forget so little that gamma is 1 in float64 from the 50th on."""
    torch.manual_seed(0)
    batch, dim = 3, 12 * heads
    layer = Retention(dim, heads, decay=decay).to(DEVICE)
    log_decay = layer.log_decay(layer.output.weight)
    memory = draw(batch, heads, 12, 24)
    positions = torch.tensor([0, 7, 30_000], device=DEVICE)
    projected = draw(batch, 2 * dim + 2 * dim)
    q, k, v = projected.split((dim, dim, 2 * dim), dim=1)
    gamma = log_decay.double().exp()[:, None, None]
    outer = k.double().view(batch, heads, -1, 1) * v.double().view(batch, heads, 1, -1)
    new = memory.double() * gamma + outer
    context, _ = make_context(batch, 1, positions=positions[:, None], device=torch.device(DEVICE))
    root = layer.normaliser(log_decay.double(), context).view(batch, heads, 1, 1)
    wanted = (q.double().view(batch, heads, 1, -1) @ new * root).view(batch, -1)
    found = kernels.retain(q, k, v, log_decay, positions, memory)
    assert distance(found, wanted) < TOLERANCES[torch.float32]
    assert distance(memory, new) < TOLERANCES[torch.float32]
