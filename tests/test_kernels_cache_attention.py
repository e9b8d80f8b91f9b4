"""Attention of one token to a cache: the kernel against the plain form, and in the mixers.

Without a GPU it runs through Triton's interpreter.
"""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from kernel_device import DEVICE, GPU, define_kernels

import archzoo
from archzoo.block import make_context
from archzoo.kernels import cache_attention as kernels
from archzoo.mixers.attention import Attention
from archzoo.mixers.filtered import FilteredAttention
from archzoo.positions.rotary import NoRotation, RotaryEmbedding, XPos, rotate

define_kernels("archzoo.kernels.cache_attention.triton")


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    if not GPU:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setattr(kernels, "INTERPRETED", True)


def distance(found, wanted):
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def draw(batch, heads, kv_heads, size, capacity, length, dtype=torch.float32):
    """A token's q, k and v, and a cache with nothing that may be read past its length."""
    q, k, v = (torch.randn(batch, n, size, device=DEVICE) for n in (heads, kv_heads, kv_heads))
    keys, values = (torch.randn(batch, kv_heads, capacity, size, device=DEVICE) for _ in range(2))
    for buffer in (keys, values):
        buffer[:, :, length:] = float("nan")
    return [x.to(dtype) for x in (q, k, v, keys, values)]


def compare(tensors, length, documents=None, document=None, tolerance=1e-6):
    """The kernel against the plain form in float64, in what both give and what they write."""
    q, k, v, keys, values = tensors
    batch, heads, _ = q.shape
    wide = [x.double().nan_to_num() for x in tensors]
    count = torch.tensor(length, device=DEVICE)
    counted = count.clone()
    marks = None if documents is None else documents.clone()
    arrivals = kernels.make_arrivals(batch, heads, length, DEVICE)
    with torch.no_grad():
        assert kernels.available(q, k, v, keys, values)
        found = kernels.attend_cache(
            q, k, v, keys, values, count, arrivals, documents=documents, document=document
        )
        wanted = kernels.attend_plainly(*wide, counted, documents=marks, document=document)
    assert found.dtype == q.dtype and distance(found, wanted) < tolerance
    assert count == counted == length + 1
    places = batch * k.shape[1] * -(-heads // k.shape[1] // kernels.QUERIES)
    assert not arrivals[..., 0].any() and (arrivals[..., 1].flatten()[:places] == length + 1).all()
    for mine, true in zip((keys, values), wide[3:], strict=True):
        assert torch.equal(mine[:, :, : length + 1].double(), true[:, :, : length + 1])
        assert mine[:, :, length + 1 :].isnan().all()
    if documents is not None:
        assert torch.equal(documents, marks)


def test_the_programs_that_work_follow_the_length(monkeypatch):
    """Where places fill the GPU, and where the least that a program takes leaves one or some."""
    monkeypatch.setattr(kernels, "_multiprocessors", lambda _: 1)
    torch.manual_seed(0)
    for length in (3, 100, 290):
        compare(draw(1, 2, 1, 256, 300, length), length)


# Nothing before, less than a block of keys, a full one, one more, and the last place; then more
# splits than the length has blocks.
@pytest.mark.parametrize(
    ("length", "capacity"),
    [(0, 9), (1, 130), (63, 130), (64, 130), (65, 130), (129, 130), (3, 900)],
)
def test_lengths(length, capacity):
    torch.manual_seed(length)
    compare(draw(2, 2, 2, 64, capacity, length), length)


# Groups of 1, 2, 3 and 12 queries, the last shared by two programs; sizes that fill a block or not.
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size"), [(2, 1, 16), (3, 1, 40), (6, 2, 96), (12, 1, 32), (2, 2, 256)]
)
def test_grouped_queries_and_sizes(heads, kv_heads, size):
    torch.manual_seed(size)
    compare(draw(2, heads, kv_heads, size, 150, 130), 130)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_the_result_alone(dtype):
    torch.manual_seed(0)
    compare(draw(2, 4, 2, 32, 300, 290, dtype), 290, tolerance=2**-8)  # of bfloat16


def test_documents_padding_on_the_left_above_all():
    torch.manual_seed(0)
    tensors = draw(4, 2, 1, 64, 140, 135)
    documents = torch.zeros((4, 140), dtype=torch.int64, device=DEVICE)
    documents[0, :100] = -1  # more than a block
    documents[1, 20:80] = -1
    documents[2, 70:] = 1
    document = torch.tensor([[0], [0], [1], [2]], device=DEVICE)  # the last one begins
    compare(tensors, 135, documents, document)


def test_a_full_cache_is_not_written_past_its_end():
    q, k, v, keys, values = draw(2, 2, 2, 16, 8, 8)
    before = keys.clone()
    count = torch.tensor(8, device=DEVICE)
    with torch.no_grad():
        kernels.attend_cache(q, k, v, keys, values, count, kernels.make_arrivals(2, 2, 8, DEVICE))
    assert torch.equal(keys, before)


@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize("batch", [1, 2])
def test_rotation_in_the_same_launch(fraction, batch):
    torch.manual_seed(1)
    q, k, v, keys, values = draw(batch, 4, 2, 32, 40, 9)
    positions = torch.arange(5, 5 + batch, device=DEVICE)[:, None]
    table = RotaryEmbedding(32, partial_rotary_factor=fraction).table(positions, torch.float32)
    wide = [x.double().nan_to_num() for x in (q, k, v, keys, values)]
    wide[:2] = [rotate(x[:, None], table.to(torch.complex128))[:, 0] for x in wide[:2]]
    count = torch.tensor(9, device=DEVICE)
    with torch.no_grad():
        wanted = kernels.attend_plainly(*wide, count.clone())
        arrivals = kernels.make_arrivals(batch, 4, 9, DEVICE)
        found = kernels.attend_cache(q, k, v, keys, values, count, arrivals, table=table)
    assert distance(found, wanted) < 1e-6
    assert distance(keys[:, :, 9], wide[3][:, :, 9]) < 1e-6


# ---------------------------------------------------------------------------- in the mixers


def steps(mixer, x, documents, *, fixed, monkeypatch, by_kernel=True, start=None):
    """A prompt of 7 tokens at once and the rest one by one; outputs of these, and the state."""
    with monkeypatch.context() as patch, torch.no_grad():
        if not by_kernel:
            patch.setattr(kernels, "run_beside", lambda _: False)
        ran = []
        real = kernels.attend_cache
        patch.setattr(kernels, "attend_cache", lambda *a, **b: ran.append(1) or real(*a, **b))
        batch, time, _ = x.shape
        device = torch.device(DEVICE)
        how = {"capacity": time if fixed else 8, "device": device, "dtype": x.dtype}
        state = mixer.start_state(batch, start, **how)
        context, cursor = make_context(batch, 7, documents=documents, device=device)
        _, state = mixer(x[:, :7], state, context)
        state = mixer.fixed_state(state) if fixed else state
        outputs = []
        for t in range(7, time):
            context, cursor = make_context(batch, 1, cursor=cursor, device=device)
            held = {n: v for n, v in state.items() if isinstance(v, torch.Tensor)}
            y, state = mixer(x[:, t : t + 1], state, context)
            outputs.append(y)
            if fixed and type(mixer) is Attention:
                assert all(state[name] is value for name, value in held.items())
        assert len(ran) == (time - 7 if by_kernel else 0)
    return torch.cat(outputs, dim=1), mixer.copy_state(state)


@pytest.mark.parametrize(
    ("part", "rotary", "fixed", "padded"),
    [
        (Attention, RotaryEmbedding, False, False),
        (Attention, NoRotation, False, True),
        (Attention, RotaryEmbedding, True, True),
        (Attention, XPos, True, False),
        (FilteredAttention, RotaryEmbedding, True, True),
    ],
)
def test_steps_of_a_mixer(part, rotary, fixed, padded, monkeypatch):
    torch.manual_seed(0)
    mixer = part(24, 2, kv_heads=1).to(DEVICE)
    mixer.rotary = rotary(12)
    x = torch.randn(2, 10, 24, device=DEVICE)
    documents = torch.tensor([[-1] * 3 + [0] * 4, [0] * 7], device=DEVICE) if padded else None
    found, state = steps(mixer, x, documents, fixed=fixed, monkeypatch=monkeypatch)
    wanted, true = steps(
        mixer.double(), x.double(), documents, fixed=False, by_kernel=False, monkeypatch=monkeypatch
    )
    assert distance(found, wanted) < 1e-5
    assert state.keys() == true.keys() and state["length"] == true["length"] == 10
    for name in ("keys", "values"):
        assert distance(state[name], true[name]) < 1e-5
    if padded:
        assert torch.equal(state["documents"], true["documents"])


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_steps_behind_a_prefix(fixed, padded, monkeypatch):
    """Its keys are in the cache, and every document sees them."""
    torch.manual_seed(0)
    mixer = Attention(24, 2, kv_heads=1).to(DEVICE)
    x = torch.randn(2, 9, 24, device=DEVICE)
    start = {name: torch.randn(1, 1, 3, 12, device=DEVICE) for name in ("keys", "values")}
    documents = torch.tensor([[-1] * 3 + [0] * 4, [0, 0, 1, 1, 1, 2, 2]], device=DEVICE)
    how = {"documents": documents if padded else None, "monkeypatch": monkeypatch}
    found, state = steps(mixer, x, fixed=fixed, start=start, **how)
    wanted, true = steps(
        mixer.double(), x.double(), fixed=False, by_kernel=False, start=start, **how
    )
    assert distance(found, wanted) < 1e-5
    assert state["length"] == true["length"] == 12 and state["prefix"].shape == (2, 3)


@pytest.mark.parametrize("reason", ["bias", "gradients", "float64", "two tokens"])
def test_other_steps_run_as_before(reason):
    mixer = Attention(32, 2).to(DEVICE)
    x = torch.randn(1, 1, 32, device=DEVICE)
    if reason == "bias":
        mixer.bias = archzoo.ALiBi(2)
    if reason == "float64":
        mixer, x = mixer.double(), x.double()
    if reason == "two tokens":
        x = torch.randn(1, 2, 32, device=DEVICE)
    with torch.set_grad_enabled(reason == "gradients"):
        state = mixer.init_state(1, capacity=4, device=DEVICE)
        qk, v = mixer.query_key_value(x).split_with_sizes(mixer.widths, -1)
        assert not mixer.fits_kernel(qk, v, state)


def test_a_fixed_step_compiles_without_a_break():
    mixer = Attention(32, 2).to(DEVICE)
    x = torch.randn(2, 1, 32, device=DEVICE)
    context, _ = make_context(2, 1, device=torch.device(DEVICE))

    def step(x, state):
        return mixer(x, state, context)[0]

    with torch.no_grad():
        state = mixer.fixed_state(mixer.init_state(2, capacity=4, device=DEVICE))
        again = mixer.fixed_state(mixer.init_state(2, capacity=4, device=DEVICE))
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        for _ in range(2):
            assert distance(compiled(x, again), step(x, state)) < 1e-6
    assert again["length"] == 2 and torch.equal(again["keys"], state["keys"])


def test_threads_on_one_stream_have_counters_of_their_own():
    q = torch.randn(1, 2, 16, device=DEVICE)
    here = kernels.arrivals_here(q, 3)
    assert kernels.arrivals_here(q, 4) is here and (here[..., 1] == 4).all()
    with ThreadPoolExecutor(1) as pool:
        there = pool.submit(kernels.arrivals_here, q, 5).result()
    assert there is not here and (here[..., 1] == 4).all()
