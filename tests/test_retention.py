"""Retention's mathematics: decays, normaliser, forms, gradients, precision, memory.

The contract holds it to the interface (tests/test_contract.py), and golden vectors to the authors'
code (tests/test_reference.py). Here its formula is compared with sums written out in float64.
"""

import copy
import itertools
import math
import weakref

import hypothesis
import pytest
import torch
from families import MICRO, micro
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import archzoo
from archzoo.block import FORMS, make_context, nbytes
from archzoo.contract import relative_error
from archzoo.kernels.retention.reference import inverse_root_sum, retain
from archzoo.mixers.retention import Retention, log_decays
from archzoo.positions.rotary import RotaryEmbedding, retention_frequencies, rotation_table

SCHEDULES = ("default", "paper_lm")
DECAYS = (*SCHEDULES, "learnable", 1.0, 127 / 128)


def whole(mixer, x, form, documents=None):
    return mixer(x, None, make_context(*x.shape[:2], documents=documents)[0], form)[0]


def written_out(q, k, v, log_decay, memory, scale):
    """``o_n = sum_{m <= n} gamma^(n-m) scale (q_n . k_m) v_m + gamma^(n+1) q_n S``, and S."""
    time = q.shape[1]
    n = torch.arange(time, dtype=q.dtype)
    gamma = log_decay.exp()[:, None, None]
    distance = (n[:, None] - n).clamp(min=0)
    weights = scale * torch.einsum("bqhd,bkhd->bhqk", q, k) * (gamma**distance).tril()
    o = torch.einsum("bhqk,bkhd->bqhd", weights, v)
    faded = gamma[:, :, 0] ** (n + 1)  # (heads, time)
    o = o + torch.einsum("bqhd,bhdv,hq->bqhv", q, memory, faded)
    left = scale * gamma[:, :, 0] ** (time - 1 - n)
    added = torch.einsum("bkhd,bkhv,hk->bhdv", k, v, left)
    return o, memory * gamma**time + added


# ---------------------------------------------------------------------------- decays


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_decay_stays_below_one_for_32_heads(schedule):
    decays = log_decays(schedule, 32)
    assert all(decay < 0 for decay in decays)
    assert all(a < b for a, b in itertools.pairwise(decays))
    as_float32 = torch.tensor(decays, dtype=torch.float32)
    assert (as_float32 < 0).all() and (as_float32.diff() > 0).all()


def test_decay_of_the_last_of_32_heads_is_right_to_the_last_digit():
    """1 - 2^-36 in float64 has 17 good digits of 2^-36; naive float32 gives 0."""
    assert log_decays("default", 32)[31] == pytest.approx(-(2.0**-36), rel=1e-10)
    naive = torch.log(1 - torch.tensor(2.0) ** -36)
    assert naive == 0, "the trap that log1p avoids"


@pytest.mark.parametrize(
    ("schedule", "half_lives"),
    [
        ("default", [22, 44, 88, 177, 355, 709, 1419, 2839]),
        ("paper_lm", [22, 33, 49, 72, 108, 160, 238, 355]),
    ],
)
def test_half_lives_of_the_published_schedules(schedule, half_lives):
    decays = log_decays(schedule, 8)
    assert [round(math.log(0.5) / decay) for decay in decays] == half_lives


def test_reach_of_the_first_and_last_head():
    decays = log_decays("default", 8)
    assert [round(math.log(0.01) / decays[head]) for head in (0, 7)] == [145, 18860]


def test_paper_lm_runs_from_1_32_to_1_512_evenly_in_the_logarithm():
    rates = [-math.expm1(decay) for decay in log_decays("paper_lm", 9)]
    assert rates[0] == pytest.approx(1 / 32) and rates[-1] == pytest.approx(1 / 512)
    ratios = [b / a for a, b in itertools.pairwise(rates)]
    assert ratios == pytest.approx([ratios[0]] * 8)
    assert log_decays("paper_lm", 1) == pytest.approx([math.log1p(-1 / 32)])


@pytest.mark.parametrize("given", [127 / 128, "0.9921875"])
def test_one_decay_for_all_heads_as_a_number_or_its_text(given):
    assert log_decays(given, 3) == pytest.approx([math.log(127 / 128)] * 3, rel=1e-15)


@pytest.mark.parametrize("decay", [*SCHEDULES, 1.0, 127 / 128, 0.5])
def test_normaliser_is_the_sum_written_out(decay):
    log_decay = torch.tensor(log_decays(decay, 32), dtype=torch.float64)
    positions = torch.arange(5000)[None]
    powers = (log_decay[:, None] * torch.arange(5000.0, dtype=torch.float64)).exp()
    want = powers.cumsum(dim=1)
    got = inverse_root_sum(log_decay, positions)[0].T
    assert (got.square() * want - 1).abs().max() < 1e-12


def test_normaliser_of_decay_one_is_the_count():
    got = inverse_root_sum(torch.zeros(3, dtype=torch.float64), torch.arange(100)[None])
    want = torch.arange(1.0, 101, dtype=torch.float64).rsqrt()
    assert torch.allclose(got, want[None, :, None].expand_as(got), rtol=1e-15, atol=0)


def test_normaliser_goes_over_into_the_count_smoothly():
    """Head 31 at 1,000 tokens: expm1 / expm1, where (1 - gamma^n) / (1 - gamma) would be 0 / 0."""
    log_decay = torch.tensor([-(2.0**-36)], dtype=torch.float32)
    got = inverse_root_sum(log_decay, torch.tensor([[999]]))
    assert got.item() == pytest.approx(1000**-0.5, rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"decay": "papr_lm"}, "not a valid schedule"),
        ({"decay": 1.5}, r"\(0, 1\]"),
        ({"decay": 0}, r"\(0, 1\]"),
        ({"decay": float("nan")}, r"\(0, 1\]"),
        ({"heads": 5}, "does not divide"),
        ({"heads": 16}, None),
        ({"dim": 12, "heads": 4}, "odd"),
        ({"value_factor": 1.1}, "does not divide"),
        ({"value_factor": 0}, "values 0 wide"),
        ({"chunk_size": 0}, "at least 1"),
        ({"norm_eps": -1e-6}, "at least 0"),
        ({"head_norm": "batch"}, "none of rms, group, none"),
    ],
)
def test_bad_arguments_get_one_clear_line(arguments, words):
    arguments = {"dim": 32, "heads": 4} | arguments
    if words is None:
        Retention(**arguments)
        return
    with pytest.raises(ValueError, match=words) as caught:
        Retention(**arguments)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------- forms


@hypothesis.given(st.data())
def test_retain_is_the_sum_written_out(data):
    """Any time, chunk size (longer than the text, too) and incoming state; gradients as well."""
    time = data.draw(st.integers(1, 300), label="time")
    chunk_size = data.draw(st.integers(1, 400), label="chunk_size")
    decay = data.draw(st.sampled_from([*SCHEDULES, 1.0, 127 / 128]), label="decay")
    heads = 2
    scale = 0.5
    log_decay = torch.tensor(log_decays(decay, heads), dtype=torch.float64)
    leaves = [
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in (
            (2, time, heads, 4),
            (2, time, heads, 4),
            (2, time, heads, 6),
            (2, heads, 4, 6),
        )
    ]
    if data.draw(st.booleans(), label="learnable"):
        leaves.append(log_decay.requires_grad_())
    context, _ = make_context(2, time)
    q, k, v, memory = leaves[:4]
    normaliser = torch.rand(1, time, heads, 1, dtype=torch.float64) + 0.5
    how = {"scale": scale, "chunk_size": chunk_size}
    o, final = retain(q * normaliser, k, v, log_decay, memory, context, **how)
    want_o, want_final = written_out(q * normaliser, k, v, log_decay, memory, scale)
    assert relative_error(o, want_o) < 1e-12
    assert relative_error(final, want_final) < 1e-12
    weights = torch.randn_like(o), torch.randn_like(final)

    def gradients(o, final):
        return torch.autograd.grad((o * weights[0]).sum() + (final * weights[1]).sum(), leaves)

    for got, want in zip(gradients(o, final), gradients(want_o, want_final), strict=True):
        assert relative_error(got, want) < 1e-10


@hypothesis.given(st.data())
def test_forms_and_hand_offs_agree(data):
    time = data.draw(st.integers(1, 300), label="time")
    mixer = Retention(
        16,
        2,
        decay=data.draw(st.sampled_from(DECAYS), label="decay"),
        norm_eps=data.draw(st.sampled_from([0.0, 1e-6, 1e-5]), label="norm_eps"),
        chunk_size=data.draw(st.integers(1, 400), label="chunk_size"),
        value_factor=data.draw(st.sampled_from([1.0, 2.0]), label="value_factor"),
    ).double()
    x = torch.randn(2, time, 16, dtype=torch.float64)
    cuts = data.draw(st.lists(st.integers(0, time), max_size=4), label="cuts")
    ends = sorted({0, time, *cuts})
    forms = [data.draw(st.sampled_from(FORMS), label="form") for _ in ends[1:]]
    with torch.no_grad():
        want = whole(mixer, x, "recurrent")
        for form in ("parallel", "chunkwise"):
            assert relative_error(whole(mixer, x, form), want) < 1e-12
        state, place, segments = mixer.init_state(2), None, []
        for begin, end, form in zip(ends, ends[1:], forms, strict=False):
            context, place = make_context(2, end - begin, cursor=place)
            y, state = mixer(x[:, begin:end], state, context, form)
            segments.append(y)
    assert relative_error(torch.cat(segments, dim=1), want) < 1e-12


@hypothesis.given(st.data())
def test_gradients_agree_across_forms(data):
    time = data.draw(st.integers(1, 60), label="time")
    mixer = Retention(
        8,
        2,
        decay=data.draw(st.sampled_from(DECAYS), label="decay"),
        chunk_size=data.draw(st.integers(1, 80), label="chunk_size"),
    ).double()
    x = torch.randn(2, time, 8, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, time, 8, dtype=torch.float64)
    memory = torch.randn(2, 2, 4, 8, dtype=torch.float64, requires_grad=True)
    place = {
        "documents": torch.zeros(2, dtype=torch.int64),
        "positions": torch.full((2,), data.draw(st.integers(-1, 500), label="position")),
        "packed": False,
    }
    found = []
    for form in FORMS:
        y, state = mixer(x, {"memory": memory}, make_context(2, time, cursor=place)[0], form)
        scalar = (y * weights).sum() + state["memory"].square().sum()
        found.append(torch.autograd.grad(scalar, [x, memory, *mixer.parameters()]))
    for others in found[:2]:
        for got, want in zip(others, found[2], strict=True):
            assert relative_error(got, want) < 1e-10


@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck(packed):
    documents = torch.tensor([[-1, 0, 0, 1, 1], [0, 0, 0, 0, -1]]) if packed else None
    context, _ = make_context(2, 5, documents=documents)
    shapes = ((2, 5, 2, 2), (2, 5, 2, 2), (2, 5, 2, 3), (2, 2, 2, 3))
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    log_decay = torch.tensor(log_decays(0.8, 2), dtype=torch.float64, requires_grad=True)
    valid = context.valid[:, :, None, None]
    normaliser = torch.rand(2, 5, 2, 1, dtype=torch.float64) + 0.5
    how = {"scale": 0.7, "chunk_size": 2}

    def run(q, k, v, memory, log_decay):
        return retain(q * normaliser, k * valid, v * valid, log_decay, memory, context, **how)

    assert torch.autograd.gradcheck(run, (*leaves, log_decay))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("arguments", [{"decay": "learnable"}, {"head_norm": "group"}])
def test_gradcheck_of_the_whole_mixer(form, arguments):
    mixer = Retention(4, 1, chunk_size=2, **arguments).double()
    context, _ = make_context(1, 5)
    x = torch.randn(1, 5, 4, dtype=torch.float64, requires_grad=True)
    memory = torch.randn(1, 1, 4, 8, dtype=torch.float64, requires_grad=True)

    def run(x, memory, *_):
        y, state = mixer(x, {"memory": memory}, context, form)
        return y, state["memory"]

    assert torch.autograd.gradcheck(run, (x, memory, *mixer.parameters()))


def test_decay_one_without_rotation_is_linear_attention():
    """With gate and norm off: the running sum of k^T v over the root of the count."""
    mixer = Retention(8, 2, decay=1, gate=False, head_norm="none", value_factor=1).double()
    mixer.rotary = archzoo.NoRotation(4)
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    q, k, v = (
        part.unflatten(-1, (2, 4)) for part in mixer.query_key_value_gate(x).chunk(3, dim=-1)
    )
    sums = torch.einsum("bthd,bthv->bthdv", k * 4**-0.5, v).cumsum(dim=1)
    o = torch.einsum("bthd,bthdv->bthv", q, sums)
    o = o / torch.arange(1, 10, dtype=torch.float64).sqrt()[:, None, None]
    want = mixer.output(o.flatten(2))
    for form in FORMS:
        assert relative_error(whole(mixer, x, form), want) < 1e-12


@pytest.mark.parametrize("form", FORMS)
def test_rotation_is_relative(form):
    """A text at positions 1,000 on scores as at 0 on: theta cancels in q . k but for distance."""
    mixer = Retention(16, 2, decay=0.9).double()
    x = torch.randn(1, 12, 16, dtype=torch.float64)
    at = [
        {
            "documents": torch.zeros(1, dtype=torch.int64),
            "positions": torch.tensor([position]),
            "packed": False,
        }
        for position in (999, 99_999)  # s_n has long converged at both
    ]
    outputs = [
        mixer(x, mixer.init_state(1), make_context(1, 12, cursor=place)[0], form)[0] for place in at
    ]
    assert relative_error(*outputs) < 1e-10


# ---------------------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("form", FORMS)
def test_state_is_float32_at_least(dtype, form):
    mixer = Retention(16, 2).to(dtype)
    x = torch.randn(2, 9, 16, dtype=dtype)
    want = torch.float64 if dtype == torch.float64 else torch.float32
    assert mixer.init_state(2)["memory"].dtype == want
    y, state = mixer(x, mixer.init_state(2), make_context(2, 9)[0], form)
    assert state["memory"].dtype == want and y.dtype == dtype and y.isfinite().all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_state_under_autocast_is_as_precise_as_without(form, dtype):
    """Where products are rounded only the projections are: S itself is summed in float32."""
    mixer = Retention(16, 2)
    x = torch.randn(2, 70, 16)
    with torch.autocast("cpu", dtype):
        qk, v, _ = mixer.project(x)
        y, state = mixer(x, mixer.init_state(2), make_context(2, 70)[0], form)
    assert state["memory"].dtype == torch.float32 and y.isfinite().all()
    assert qk.dtype == v.dtype == dtype
    q, k, v = mixer.widen(qk, v, make_context(2, 70)[0], torch.float32)
    q, k, v = (part.double() for part in (q, k, v))
    decays = torch.tensor(mixer.fixed_log_decay, dtype=torch.float64)
    zero = torch.zeros(2, 2, 8, 16, dtype=torch.float64)
    _, want = written_out(q, k, v, decays, zero, mixer.head_dim**-0.5)
    assert relative_error(state["memory"], want) < 1e-5


def test_decays_and_rotation_do_not_change_under_a_cast():
    mixer = Retention(32, 2)
    x = torch.zeros(1, 1, 32)
    before = mixer.log_decay(x).clone()
    mixer.bfloat16()
    after = mixer.log_decay(x.bfloat16())
    assert after.dtype == torch.float32 and torch.equal(after, before)
    assert not list(mixer.buffers())
    positions = torch.arange(2048)[None]  # of which bfloat16 would tell 641 apart
    table = rotation_table(positions, mixer.rotary.frequencies, torch.float32).reshape(2048, 8)
    frequencies = torch.tensor(retention_frequencies(16), dtype=torch.float64)
    angles = positions.double().T * frequencies
    assert relative_error(table.real, angles.cos()) < 1e-7
    assert relative_error(table.imag, angles.sin()) < 1e-7


def test_learnable_decay_survives_casts_and_learns():
    mixer = Retention(32, 4, decay="learnable")
    x = torch.randn(2, 20, 32)
    assert relative_error(mixer.log_decay(x), torch.tensor(log_decays("default", 4))) < 1e-6
    before = mixer.decay_rate.detach().clone()
    for cast in (torch.nn.Module.bfloat16, torch.nn.Module.half):
        kept = cast(copy.deepcopy(mixer)).decay_rate
        assert kept.dtype == torch.float32 and torch.equal(kept, before)
    assert copy.deepcopy(mixer).double().decay_rate.dtype == torch.float64
    trained = copy.deepcopy(mixer)
    whole(trained, x, None).sum().backward()
    assert trained.bfloat16().decay_rate.grad.dtype == torch.float32
    half = copy.deepcopy(mixer).bfloat16()
    for form in FORMS:
        half.zero_grad()
        whole(half, x.bfloat16(), form).sum().backward()
        assert half.decay_rate.grad.abs().min() > 0
    with torch.no_grad():
        mixer.decay_rate.add_(5.0)  # wherever training takes it, gamma stays in (0, 1)
        assert (mixer.log_decay(x) < 0).all()
        assert whole(mixer, x, "chunkwise").isfinite().all()


def test_a_bfloat16_model_sees_positions_far_out():
    """Positions beyond 256 coincide in bfloat16: the logits of a cast model would fall apart."""
    model = archzoo.create_model("retnet_micro").bfloat16().eval()
    same = copy.deepcopy(model).float()
    tokens = torch.randint(64, (1, 1500))
    with torch.no_grad():
        got, want = model(tokens).logits, same(tokens).logits
    assert got.dtype == torch.bfloat16
    assert relative_error(got[:, 1000:], want[:, 1000:]) < 2e-2


def test_65_536_tokens_are_finite_and_right_in_float32():
    mixer = Retention(8, 2, chunk_size=128)
    exact = copy.deepcopy(mixer).double()
    x = torch.randn(1, 65_536, 8)
    with torch.no_grad():
        outputs, stands = [], []
        for part in (mixer, exact):
            y, state = part(
                x.to(part.output.weight.dtype),
                part.init_state(1),
                make_context(1, 65_536)[0],
                "chunkwise",
            )
            outputs.append(y)
            stands.append(state)
        assert relative_error(*outputs) < 1e-5
        assert relative_error(outputs[0][:, -64:], outputs[1][:, -64:]) < 1e-5
        place = {
            "documents": torch.zeros(1, dtype=torch.int64),
            "positions": torch.tensor([65_535]),
            "packed": False,
        }
        more = torch.randn(1, 20, 8)
        context, _ = make_context(1, 20, cursor=place)
        got, _ = mixer(more, stands[0], context, "recurrent")
        want, _ = exact(more.double(), stands[1], context, "recurrent")
        assert relative_error(got, want) < 1e-5


@pytest.mark.slow
def test_65_536_steps_are_finite_and_right_in_float32():
    mixer = Retention(8, 2)
    exact = copy.deepcopy(mixer).double()
    x = torch.randn(1, 65_536, 8)
    with torch.no_grad():
        got = whole(mixer, x, "recurrent")
        want = whole(exact, x.double(), "chunkwise")
    assert got.isfinite().all()
    assert relative_error(got, want) < 1e-5


# ---------------------------------------------------------------------------- memory


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors alive, and remembers the peak and the largest tensor."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak, self.largest, self.total = 0, 0, 0, 0
        self._seen = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage in self._seen:
                continue
            self._seen.add(storage)
            size = storage.nbytes()
            self.alive += size
            self.total += size
            self.peak = max(self.peak, self.alive)
            self.largest = max(self.largest, size)
            weakref.finalize(storage, self._free, size)
        return result

    def _free(self, size):
        self.alive -= size


def peak_bytes(run):
    with LiveBytes() as memory:
        run()
    return memory


def test_live_bytes_counts_what_it_should():
    def run():
        a = torch.zeros(1000)
        b = a + 1
        del a
        return (b.view(10, 100) * 2).sum()

    memory = peak_bytes(run)
    assert 8000 <= memory.peak < 8100 and memory.largest == 4000
    assert memory.alive == 0


@pytest.mark.parametrize("packed", [False, True])
def test_memory_grows_linearly_with_time(packed):
    """Forward and backward at 16k take at most 2.2 times what 8k take; (time, time) is never."""
    mixer = Retention(32, 2)
    peaks = []
    for time in (8192, 16_384):
        documents = torch.arange(time)[None] // 1000 if packed else None
        x = torch.randn(1, time, 32)

        def run(x=x, documents=documents):
            x.requires_grad_()
            whole(mixer, x, None, documents).sum().backward()

        memory = peak_bytes(run)
        peaks.append(memory.peak)
        assert memory.largest < time * time, "a tensor as large as (time, time) was built"
    assert peaks[1] <= 2.2 * peaks[0]


def test_memory_of_a_prefill_is_linear_and_its_state_constant():
    mixer = Retention(32, 2)
    peaks, states = [], []
    for time in (8192, 16_384):
        x = torch.randn(1, time, 32)

        @torch.no_grad()
        def run(x=x):
            _, state = mixer(x, mixer.init_state(1), make_context(1, x.shape[1])[0])
            states.append(nbytes(state))

        peaks.append(peak_bytes(run).peak)
    assert peaks[1] <= 2.2 * peaks[0]
    assert states[0] == states[1] == nbytes(mixer.init_state(1)) == 4 * 2 * 16 * 32


def test_a_step_costs_the_same_at_every_position():
    model = archzoo.create_model("retnet_micro").eval()
    totals = []
    for position in (10, 65_536):
        state = model.init_state(1)
        state["place"]["positions"] += position

        @torch.no_grad()
        def run(state=state):
            model(torch.tensor([[1]]), state)

        totals.append(peak_bytes(run).total)
    assert totals[0] == totals[1]


# ---------------------------------------------------------------------------- traps


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("decay", SCHEDULES)
def test_prefill_then_step_is_the_full_pass(form, decay):
    model = archzoo.create_model(
        "retnet_micro", mixer={"class_path": "Retention", "init_args": {"decay": decay}}
    ).double()
    tokens = torch.randint(64, (2, 10))
    with torch.no_grad():
        want = model(tokens, form="parallel").logits
        output = model(tokens[:, :6], model.init_state(2), form=form)
        segments = [output.logits]
        for t in range(6, 10):
            output = model(tokens[:, t : t + 1], output.state)
            segments.append(output.logits)
    assert relative_error(torch.cat(segments, dim=1), want) < 1e-12


@pytest.mark.parametrize("form", FORMS)
def test_right_pads_do_not_decay_the_state(form):
    mixer = Retention(16, 2, decay=0.5).double()
    x = torch.randn(2, 12, 16, dtype=torch.float64)
    documents = torch.tensor([[0] * 5 + [-1] * 7, [0] * 12])
    _, state = mixer(x, mixer.init_state(2), make_context(2, 12, documents=documents)[0], form)
    _, alone = mixer(x[:1, :5], mixer.init_state(1), make_context(1, 5)[0], form)
    assert relative_error(state["memory"][:1], alone["memory"]) < 1e-14


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("head_norm", ["rms", "group"])
def test_padding_is_harmless_without_an_epsilon(form, head_norm):
    """At left padding the head norm sees zeros; 0 / 0 would reach real tokens a layer later."""
    arguments = {"norm_eps": 0.0, "head_norm": head_norm}
    model = archzoo.create_model(
        "retnet_micro", mixer={"class_path": "Retention", "init_args": arguments}
    )
    tokens = torch.randint(64, (1, 9))
    documents = torch.tensor([[-1] * 4 + [0] * 5])
    logits = model(tokens, documents=documents, form=form).logits[:, 4:]
    assert relative_error(logits, model(tokens[:, 4:]).logits) < 1e-5
    logits.square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_output_at_init_is_neither_lost_nor_loud():
    """Unit input: torch's default weights and the decoder's give outputs of a usable size."""
    x = torch.randn(4, 128, 64)
    assert 0.05 < whole(Retention(64, 4), x, None).std() < 2
    model = archzoo.create_model("retnet_tiny")
    y = whole(model.blocks[0].mixer, torch.randn(4, 128, 128), None)
    assert 0.005 < y.std() < 0.5


@pytest.mark.parametrize("name", MICRO)
def test_activations_at_init_do_not_grow_with_depth(name):
    tokens = torch.randint(64, (2, 64))
    sizes = []
    for depth in (2, 8, 32):
        model = micro(name, depth=depth)
        model.norm = torch.nn.Identity()
        with torch.no_grad():
            sizes.append(model.hidden(tokens)[0].square().mean().sqrt().item())
    assert max(sizes) / min(sizes) < 1.5


def test_retention_takes_another_rotary():
    """The slot is filled by the decoder: RoPE's frequencies are not RetNet's."""
    own = archzoo.create_model("retnet_micro").blocks[0].mixer.rotary
    rope = archzoo.create_model("retnet_micro", rotary="RotaryEmbedding").blocks[0].mixer.rotary
    assert isinstance(rope, RotaryEmbedding)
    assert own.frequencies[-1] == 1e-4 and rope.frequencies[-1] > 1e-4
    assert own.frequencies[0] == rope.frequencies[0] == 1


def test_autocast_training_step_is_finite():
    for dtype in (torch.bfloat16, torch.float16):
        model = archzoo.create_model("retnet_micro")
        tokens = torch.randint(64, (2, 300))
        with torch.autocast("cpu", dtype):
            loss = torch.nn.functional.cross_entropy(
                model(tokens).logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten()
            )
        loss.backward()
        assert loss.isfinite()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
