"""The retention kernels against a float64 recurrence, gradients by autograd.

Without a GPU the kernels run at small sizes through Triton's interpreter, on a GPU at real ones.
Relative error is ||out - reference|| / ||reference||.
"""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from kernel_device import DEVICE, GPU, define_kernels
from torch.autograd import forward_ad

from archzoo.block import make_context
from archzoo.kernels import launching
from archzoo.kernels import retention as kernels
from archzoo.kernels.launching import Launch, stream_of
from archzoo.kernels.retention import (
    available,
    launch,
    plans,
    retention,
    retention_step,
    unavailable,
)
from archzoo.mixers.retention import Retention

define_kernels("archzoo.kernels.retention.triton")

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    if not GPU:
        monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def nothing_prepared():
    """Some tests change the plan, which what is prepared was made by."""
    yield
    launch.find_forward.cache_clear()
    plans.find_plan.cache_clear()


def reference(q, k, v, log_decay, state=None, positions=None, starts=None, valid=None, scale=True):
    """The recurrence itself, token by token, in float64."""
    q, k, v = q.double(), k.double(), v.double()
    decay = log_decay.double().exp()[None, :, None, None]
    batch, time, heads, dk = q.shape
    if state is None:
        state = q.new_zeros(batch, heads, dk, v.shape[-1])
    state = state.double()
    outputs = []
    for n in range(time):
        kept = state
        if starts is not None:
            kept = torch.where(starts[:, n, None, None, None], torch.zeros_like(kept), kept)
        new = decay * kept + k[:, n, :, :, None] * v[:, n, :, None, :]
        out = torch.einsum("bhk,bhkv->bhv", q[:, n], new)
        if scale:
            position = torch.full((batch,), n) if positions is None else positions[:, n].cpu()
            if positions is None and valid is not None:
                position = (valid.long().cumsum(1)[:, n] - 1).clamp(min=0).cpu()
            count = (position.double() + 1).to(q.device)[:, None]
            lg = log_decay.double()[None]
            total = torch.where(lg == 0, count, torch.expm1(count * lg) / torch.expm1(lg))
            out = out / torch.where(lg == 0, count, total).sqrt()[..., None]
        if valid is not None:
            alive = valid[:, n, None, None]
            out = torch.where(alive, out, torch.zeros_like(out))
            new = torch.where(alive[..., None], new, state)
        state = new
        outputs.append(out)
    return torch.stack(outputs, 1), state


def error(out, expected):
    out, expected = out.double(), expected.double()
    return ((out - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def slopes(heads, first=0):
    """RetNet's decays, head indices first, first + 1, ..."""
    return torch.log1p(-torch.exp2(-5.0 - torch.arange(first, first + heads).double())).to(DEVICE)


def case(batch, time, heads, dk, dv, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, time, heads, dk), (batch, time, heads, dk), (batch, time, heads, dv))
    q, k, v = (torch.randn(s, generator=generator).to(DEVICE, dtype) for s in shapes)
    return q, k * dk**-0.5, v


def check(q, k, v, log_decay, state=None, tolerance=None, **facts):
    """Outputs, states and all gradients."""
    tolerance = TOLERANCE[q.dtype] if tolerance is None else tolerance
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    doubles = [x.detach().double().requires_grad_() for x in (q, k, v)]
    states = (None, None)
    if state is not None:
        states = (state.clone().requires_grad_(), state.double().requires_grad_())
    out, last = retention(*leaves, log_decay, states[0], **facts, return_state=True)
    want, want_last = reference(*doubles, log_decay, states[1], **facts)
    generator = torch.Generator().manual_seed(1)
    d_out = torch.randn(want.shape, generator=generator).to(DEVICE).to(q.dtype)
    d_last = torch.randn(want_last.shape, generator=generator).to(DEVICE)
    assert out.dtype == v.dtype and last.dtype == torch.float32
    torch.autograd.backward((out, last), (d_out, d_last))
    torch.autograd.backward((want, want_last), (d_out.double(), d_last.double()))
    errors = {"o": error(out, want), "state": error(last, want_last)}
    for name, mine, theirs in zip("qkv", leaves, doubles, strict=True):
        errors["d" + name] = error(mine.grad, theirs.grad)
    if state is not None:
        errors["dstate"] = error(states[0].grad, states[1].grad)
    bad = {name: value for name, value in errors.items() if not value <= tolerance}
    assert not bad, f"{bad} beyond {tolerance}; all: {errors}"
    return errors


def small_plan(monkeypatch, scores=True, fused=False):
    """Narrow tiles and short segments, so that small sizes go through every part of the kernels.

    `fused`, the backward takes keys up to 16 and values up to 32 wide.
    """
    cut = plans.Cut(16, 16, 4, 1)
    whole = (16, plans.Cut(16, 32, 4, 1)) if fused else None
    pair = plans.Pair(16, scores, cut, cut)
    plan = plans.Plan(pair, pair, sums=(16, cut), fused_backward=whole)
    monkeypatch.setattr(launch, "find_plan", lambda *_: plan)
    monkeypatch.setattr(plans, "_SEGMENT_LEAST", 32)
    monkeypatch.setattr(plans, "_SEGMENT_MULTIPLE", 32)
    launch.find_forward.cache_clear()


def random_state(batch, heads, dk, dv):
    return torch.randn(batch, heads, dk, dv, generator=torch.Generator().manual_seed(2)).to(DEVICE)


def packed(batch, time, edges):
    """Documents that begin at the given times, in the first row; another row one token later."""
    starts = torch.zeros(batch, time, dtype=torch.bool)
    for row in range(batch):
        starts[row, [edge + row for edge in edges if edge + row < time]] = True
    index = torch.arange(time).expand(batch, time)
    opened = torch.where(starts, index, torch.zeros_like(index)).cummax(1).values
    return {"starts": starts.to(DEVICE), "positions": (index - opened).to(DEVICE)}


TIMES = (1, 2, 31, 64, 65, 1000) if GPU else (1, 31, 65, 150)
# Key and value widths: RetNet's, narrow ones, and ones that are no power of two.
WIDTHS = [(64, 64), (128, 128), (128, 256), (256, 512), (80, 48)] if GPU else [(16, 16), (24, 40)]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize(("dk", "dv"), WIDTHS)
def test_matches_the_recurrence(dk, dv, time, dtype):
    q, k, v = case(2, time, 2, dk, dv, dtype)
    check(q, k, v, slopes(2), random_state(2, 2, dk, dv))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["scores", "in place", "fused"])
def test_segments_and_splits(monkeypatch, form, dtype):
    small_plan(monkeypatch, form == "scores", form == "fused")
    # A width beyond one block needs the chunk's weights made ahead.
    dk, dv = (24, 40) if form == "scores" else (16, 16)
    q, k, v = case(1, 70, 1, dk, dv, dtype)
    # Three splits round their sums to bfloat16 twice more than any plan in use does.
    check(q, k, v, slopes(1), random_state(1, 1, dk, dv), 2 * TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("small", [True, False] if GPU else [True])
def test_maps_join_segments_as_the_kernel_ahead_of_them(monkeypatch, small, dtype):
    """Bit for bit: whole rows, no state, so that each program joins the sums that it needs.

    Of several sums to a segment too, to rounding. By small plans, and on a GPU by the real ones.
    """
    times, width = (1500, 2100), 64
    if small:
        small_plan(monkeypatch, False, True)
        monkeypatch.setattr(plans, "_SEGMENT_MULTIPLE", 16)
        times, width = (100, 260), 16

    def run(tensors, sums):
        launch.find_forward.cache_clear()
        leaves = [x.clone().requires_grad_() for x in tensors]
        with monkeypatch.context() as patch:
            patch.setattr(launch, "sums_per_segment", lambda *_: sums)
            out, _ = retention(*leaves, slopes(1))
            return out, *torch.autograd.grad(out, leaves, torch.ones_like(out))

    for time in times:
        tensors = case(1, time, 1, width, width, dtype)
        inputs = launch.Inputs(*tensors, slopes(1), *(None,) * 4)
        _, found = launch.prepare(inputs, True, False)
        forward = found.forward if isinstance(found, launch.Guarded) else found
        if forward.plan.fused_backward is None:
            pytest.skip("exact float32 takes the four maps at real widths")
        segment = forward.direction.segment
        assert forward.direction.sums and time % segment
        theirs = run(tensors, 0)
        assert all(map(torch.equal, run(tensors, 1), theirs))
        for sums in (2, 3):
            if segment % (sums * plans._SEGMENT_MULTIPLE) == 0:
                for a, b in zip(run(tensors, sums), theirs, strict=True):
                    assert error(a, b) < (1e-6 if dtype == torch.float32 else 3e-3)


@pytest.mark.parametrize("specialised", [False, True])
@pytest.mark.parametrize(("heads", "dk", "dv"), [(16, 64, 64), (8, 128, 256), (4, 256, 512)])
def test_launches_hand_over_what_their_kernels_take(monkeypatch, specialised, heads, dk, dv):
    """Of real plans, Gluon's kernels too, which no interpreter runs: by number and name.

    Those take pointers and numbers in the order of Triton's kernels, which other tests run.
    """
    from archzoo.kernels.retention import triton

    made = []

    def note(kernel, _grid, numbers, constants, **_options):
        names = kernel.arg_names
        pointers = [name for name in names if name.endswith("_ptr")]
        assert names[: len(pointers)] == pointers
        assert set(names[-len(constants) :]) == set(constants)
        assert len(pointers) + len(numbers) + len(constants) == len(names)
        given = len(pointers) + len(numbers)
        assert names[:given] == getattr(triton, kernel.fn.__name__).arg_names[:given]
        made.append(kernel)
        return lambda stream, *tensors: handed.append((len(pointers), len(tensors)))

    handed = []
    monkeypatch.setattr(launch, "Launch", note)
    monkeypatch.setattr(launch, "_warp_specialises", lambda _: specialised)
    monkeypatch.setattr(launch, "_has_little_memory", lambda _: False)
    for batch, time in ((16, 2048), (4, 8192), (1, 32768)):
        for state, final, arriving in itertools.product((False, True), repeat=3):
            problem = real_problem(batch, time, heads, dk, dv, state, final)
            forward = launch.Forward(problem)
            forward.find_backward(problem.strides[2], (), arriving)
    assert any("gluon" in kernel.fn.__module__ for kernel in made) == specialised


def real_problem(batch, time, heads, dk, dv, state=False, final=False, device="cuda"):
    strides = [(time * heads * width, heads * width, width, 1) for width in (dk, dk, dv)]
    q, v = (batch, time, heads, dk), (batch, time, heads, dv)
    of_state = (batch, heads, dk, dv) if state else None
    return launch.Problem(
        q, q, v, (heads,), of_state, None, None, False, tuple(strides), torch.bfloat16,
        torch.float32, torch.device(device), True, final,
    )  # fmt: skip


def test_maps_run_beside_each_other_where_that_fills_the_chip():
    """16 rows of 3 heads: 192 + 4 x 96 programs are 5 turns of 132, and one by one 6."""
    wide = plans.find_plan(256, 512, torch.bfloat16, True)
    assert plans.fills_better_beside(wide, 48, 1, 256, 512)
    assert not plans.fills_better_beside(wide, 33, 2, 256, 512)  # 132 at a time fill it
    assert not plans.fills_better_beside(plans.find_plan(256, 512, torch.bfloat16), 48, 1, 256, 512)


@pytest.mark.parametrize(("dk", "dv"), [(128, 256), (256, 512)])
def test_dk_waits_for_the_states_between_segments_that_dv_stores(dk, dv):
    """A program of dv that takes several segments stores what dk reads: never beside each other."""
    plan = plans.find_plan(dk, dv, torch.bfloat16, True)
    several = 0
    for rows, time in itertools.product((1, 2, 3, 6, 12, 24, 48), (512, 1024, 2048, 8192, 32768)):
        _, segments = plans.cut_segments(plan, rows, time, dk)
        if plans.segments_per_program(plan, segments, dk, dv) > 1:
            several += 1
            assert not plans.fills_better_beside(plan, rows, segments, dk, dv)
    assert several > 5


def test_segments_per_program():
    """By one program of o or dv, where those have more tiles than dq and dk."""
    for dk, dv in ((128, 256), (256, 512)):
        wide = plans.find_plan(dk, dv, torch.bfloat16, True)
        assert [plans.segments_per_program(wide, n, dk, dv) for n in (1, 2, 3, 4, 16)] == [
            1,
            2,
            1,
            2,
            2,
        ]
        assert plans.segments_per_program(plans.find_plan(dk, dv, torch.bfloat16), 2, dk, dv) == 1
    assert plans.segments_per_program(plans.find_plan(64, 64, torch.bfloat16, True), 2, 64, 64) == 1


@pytest.mark.parametrize(("dk", "dv"), [(64, 64), (128, 256), (256, 512)])
def test_little_memory_has_plans_that_compute_the_same(dk, dv, monkeypatch):
    """Compiled for such a GPU in tests/test_kernels_compile.py."""
    large, little = (plans.find_plan(dk, dv, torch.bfloat16, False, few) for few in (False, True))
    assert large != little
    torch.manual_seed(0)
    # Its plans are of bfloat16, whose blocks are half as large.
    dtype, close = (torch.bfloat16, 1e-2) if GPU else (torch.float32, 1e-5)
    given = [torch.randn(1, 40, 1, width, device=DEVICE, dtype=dtype) for width in (dk, dk, dv)]
    decay, found = torch.tensor([-0.1], device=DEVICE), []
    for plan in (large, little):
        monkeypatch.setattr(launch, "find_plan", lambda *_, plan=plan: plan)
        launch.find_forward.cache_clear()
        q, k, v = (x.clone().requires_grad_() for x in given)
        o, _ = kernels.retention(q, k, v, decay)
        found.append([o, *torch.autograd.grad(o.square().sum(), (q, k, v))])
    launch.find_forward.cache_clear()
    for mine, other in zip(*found, strict=True):
        assert (mine - other).norm() <= close * other.norm()


@pytest.mark.parametrize("final", [True, False])
@pytest.mark.parametrize("reverse", [True, False])
def test_initial_states_of_segments(monkeypatch, reverse, final):
    """The same, however many segments a program takes; those between are left to its map."""
    small_plan(monkeypatch, scores=False)
    q, k, v = case(2, 128, 2, 16, 16, torch.float32)
    inputs = launch.Inputs(q, k, v, slopes(2), *(None,) * 4)
    inputs, forward = launch.prepare(inputs, True, final)
    forward.float32 = lambda shape: torch.full(shape, torch.nan, device=DEVICE)
    table = torch.rand(forward.table_shape, device=DEVICE)
    found = {}
    for each in (1, 2, 4):
        direction = forward.problem.direction(reverse, False, final)._replace(sums=0, each=each)
        segments = forward.prepare_segments(direction, "k", "v")
        shared = slopes(2), table, None, None
        states, last = segments(launch.stream_of(q), k, v, None, shared)
        first = range(each - 1 if reverse else 0, 4, each)
        assert (segments.sum is None) == (each == 4 and not final)
        assert states.isfinite().any((0, 1, 3, 4)).nonzero().flatten().tolist() == list(first)
        found[each] = states[:, :, first], last
    for each, (states, last) in found.items():
        assert torch.equal(states, found[1][0][:, :, each - 1 if reverse else 0 :: each])
        assert last is None if not final else torch.equal(last, found[1][1])


def test_sums_to_a_segment():
    """So many as fill the chip, none where nothing is joined; segments hold whole chunks."""
    narrow = plans.find_plan(64, 64, torch.bfloat16, True)
    assert plans.sums_per_segment(narrow, 64, 4096, 2) == 4
    assert plans.sums_per_segment(narrow, 64, 2048, 4) == 1
    assert plans.sums_per_segment(narrow, 1, 768, 3) == 3
    assert (
        plans.sums_per_segment(narrow, 1, 2048, 1)
        == plans.sums_per_segment(narrow, 1, 512, 64)
        == 0
    )
    assert plans.sums_per_segment(plans.find_plan(128, 256, torch.bfloat16), 1, 512, 4) == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("last", [False, True])
def test_sums_of_segments(monkeypatch, last, dtype):
    """The first level in both directions; `last`: of the segment taken last as well."""
    small_plan(monkeypatch)
    monkeypatch.setattr(plans, "_SEGMENT_MULTIPLE", 16)
    time, heads, dk, dv = 150, 2, 24, 40
    q, k, v = case(1, time, heads, dk, dv, dtype)
    do = case(1, time, heads, dk, dv, dtype, seed=1)[2]
    state = random_state(1, heads, dk, dv) if last else None
    decay = slopes(heads)
    inputs = launch.Inputs(q, k, v, decay, state, None, None, None)
    _, forward = launch.prepare(inputs, True, last)
    length, segments = forward.direction[1:3]
    assert 2 < segments < time / length + 1 and time % length

    stream = stream_of(q)
    normaliser = forward.normalisers(stream, inputs, False)
    of_segments = []
    backward = forward.find_backward(do.stride(), (), False).segments
    for level, (b, c) in ((forward.segments, (k, v)), (backward, (q, do))):
        of_segments.append(torch.full(level.shape, torch.nan, device=DEVICE))
        level.sum(stream, b, c, of_segments[-1], decay, *(normaliser,) * 3)
    ahead, back = of_segments
    for segment in range(segments):
        start, stop = segment * length, min(segment * length + length, time)
        t = torch.arange(start, stop, device=DEVICE)
        for sums, b, c, distance, scale, there in (
            (ahead, k, v, stop - 1 - t, None, last or segment + 1 < segments),
            (back, q, do, t - start + 1, normaliser[:, start:stop], last or segment > 0),
        ):
            weight = torch.exp(decay[:, None] * distance)
            if scale is not None:
                weight = weight * scale
            b, c = b[0, start:stop].double(), c[0, start:stop].double()
            want = torch.einsum("ht,thb,thc->hbc", weight.double(), b, c)
            mine = sums[0, :, segment]
            assert error(mine, want) < TOLERANCE[dtype] if there else mine.isnan().all()


@pytest.mark.parametrize("plan", ["usual", "small", "fused"])
@pytest.mark.parametrize("edges", [(0, 16, 64), (5, 63, 70, 71)])
def test_packed_documents(monkeypatch, edges, plan):
    """Boundaries at chunk edges and off them; the state goes into the first document."""
    if plan != "usual":
        small_plan(monkeypatch, fused=plan == "fused")
    q, k, v = case(2, 80, 1, 16, 24, torch.float32)
    check(q, k, v, slopes(1), random_state(2, 1, 16, 24), **packed(2, 80, edges))


@pytest.mark.parametrize("plan", ["usual", "small", "fused"])
def test_padding_leaves_the_state_alone(monkeypatch, plan):
    """Padding at either end, a row of nothing else, and NaN in what is padded."""
    if plan != "usual":
        small_plan(monkeypatch, fused=plan == "fused")
    batch, time = 3, 90
    q, k, v = case(batch, time, 1, 16, 24, torch.float32)
    valid = torch.ones(batch, time, dtype=torch.bool)
    valid[0, :37] = False
    valid[1, 70:] = False
    valid[2, :] = False
    facts = packed(batch, time, (0, 40))
    facts["starts"][:, 0] = False
    check(q, k, v, slopes(1), random_state(batch, 1, 16, 24), valid=valid.to(DEVICE), **facts)
    poisoned = [torch.where(valid[:, :, None, None].to(DEVICE), x, torch.nan) for x in (q, k, v)]
    out, last = retention(*poisoned, slopes(1), valid=valid.to(DEVICE), return_state=True)
    want, want_last = reference(q, k, v, slopes(1), valid=valid.to(DEVICE))
    assert error(out, want) < 1e-5
    assert error(last, want_last) < 1e-5


def test_segments_behind_a_short_row():
    """Of which no document is asked; the interpreter refuses to read behind the tensor."""
    batch, time, padded = 1, 2048, 1600
    q, k, v = case(batch, time, 1, 16, 16, torch.float32)
    valid = torch.arange(time, device=DEVICE)[None] >= padded
    starts = torch.arange(time, device=DEVICE)[None] == padded
    places = {"positions": (torch.arange(time, device=DEVICE)[None] - padded).clamp(min=0)}
    places |= {"starts": starts, "valid": valid}
    out, last = retention(q, k, v, slopes(1), **places, return_state=True)
    want, want_last = reference(q, k, v, slopes(1), **places)
    assert error(out, want) < 1e-5
    assert error(last, want_last) < 1e-5


@pytest.mark.parametrize("head", [0, 31])
@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_decays(head, dtype):
    q, k, v = case(1, 200, 1, 16, 16, dtype)
    check(q, k, v, slopes(1, head), random_state(1, 1, 16, 16))


@pytest.mark.parametrize("log_decay", [0.0, -1.0, -60.0])
def test_no_decay_and_strong_decay(log_decay):
    q, k, v = case(1, 100, 1, 16, 16, torch.float32)
    decay = torch.tensor([log_decay], device=DEVICE)
    check(q, k, v, decay, random_state(1, 1, 16, 16))


def test_without_state_scale_or_positions():
    q, k, v = case(2, 70, 2, 16, 16, torch.float32)
    out, last = retention(q, k, v, slopes(2), scale=False)
    assert last is None
    assert error(out, reference(q, k, v, slopes(2), scale=False)[0]) < 1e-5
    positions = torch.arange(5, 75, device=DEVICE).expand(2, 70)
    out, _ = retention(q, k, v, slopes(2), positions=positions)
    assert error(out, reference(q, k, v, slopes(2), positions=positions)[0]) < 1e-5


def test_segments_equal_the_whole():
    """A sequence cut at an odd place, the state handed on."""
    q, k, v = case(1, 100, 2, 16, 16, torch.float32)
    positions = torch.arange(100, device=DEVICE)[None]
    whole, last = retention(q, k, v, slopes(2), return_state=True)
    state, segments = None, []
    for cut in (slice(0, 37), slice(37, 38), slice(38, 100)):
        segment, state = retention(
            q[:, cut], k[:, cut], v[:, cut], slopes(2), state, positions[:, cut], return_state=True
        )
        segments.append(segment)
    assert error(torch.cat(segments, 1), whole) < 1e-5
    assert error(state, last) < 1e-5


def test_what_is_prepared_serves_other_tensors():
    """Same sizes and strides, other memory: off TMA's alignment, and decays too."""
    decays = slopes(4)
    for offset in (0, 1, 0, 2):
        rows = torch.randn(3, 70 * 2 * 16 + 8, generator=torch.Generator().manual_seed(offset))
        q, k, v = (row[offset : offset + 70 * 2 * 16].view(1, 70, 2, 16) for row in rows.to(DEVICE))
        check(q, k, v, decays[offset : offset + 2], random_state(1, 2, 16, 16))
    assert launch.find_forward.cache_info().hits > 0


def test_decays_may_lie_apart():
    """Every second one of more heads', and one for all heads."""
    for decay in (slopes(4)[::2], slopes(1).expand(2)):
        q, k, v = case(1, 40, 2, 16, 16, torch.float32)
        check(q, k, v, decay)
        state = random_state(1, 2, 16, 16)
        want, want_last = reference(q[:, :1], k[:, :1], v[:, :1], decay, state)
        o, _ = retention_step(q[:, :1], k[:, :1], v[:, :1], decay, state)
        assert error(o, want) < 1e-5
        assert error(state, want_last) < 1e-5


def test_trains_after_a_look_in_inference_mode():
    tensors, decays = case(1, 40, 2, 16, 16, torch.float32), slopes(2)
    with torch.inference_mode():
        retention(*tensors, decays)
    leaves = [x.requires_grad_() for x in tensors]
    retention(*leaves, decays)[0].sum().backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)


def test_normalisers_follow_decays_that_are_written_over():
    """They are kept from call to call: not beyond a change of the decays in place."""
    decays = slopes(2)
    for first in (0, 3, 3):
        decays.copy_(slopes(2, first))
        check(*case(1, 40, 2, 16, 16, torch.float32), decays)


@pytest.mark.parametrize(("dk", "dv"), [(64, 64), (128, 256)])
def test_plain_kernels_take_over_where_warp_specialisation_fails(monkeypatch, dk, dv):
    """At 64 x 64 in the backward pass, which is Gluon's alone there; said once."""
    compile_ = Launch._compile

    def refuse(self, tensors):
        if "gluon" in self.kernel.fn.__module__:
            raise RuntimeError("no such instruction\nand more")
        return compile_(self, tensors)

    monkeypatch.setattr(Launch, "_compile", refuse)
    monkeypatch.setattr(launch, "_specialises", True)
    monkeypatch.setattr(launch, "_warp_specialises", lambda _: True)
    tensors, decay = case(1, 160, 2, dk, dv, torch.bfloat16, int(torch.randint(999, ()))), slopes(2)
    wanted = (
        r"do not run here \(Triton 3\S*: RuntimeError no such instruction\).* 1.4 times as long"
    )
    with pytest.warns(UserWarning, match=wanted):
        check(*tensors, decay)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(*tensors, decay, random_state(1, 2, dk, dv))
        check(*tensors, decay)
    monkeypatch.setattr(launch, "_specialises", True)

    def broken(self, tensors):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(Launch, "_compile", broken)
    launch.find_forward.cache_clear()
    with pytest.raises(torch.OutOfMemoryError):
        retention(*tensors, decay)
    assert launch._specialises


@pytest.mark.parametrize("packed_rows", [False, True])
def test_mixer_by_kernels_is_the_plain_mixer(monkeypatch, packed_rows):
    """Retention with the kernels and without: outputs, states, gradients and a step after.

    Without head norm, which would divide a first token's error by its small output.
    """
    dim, heads, batch, time = (512, 4, 2, 300) if GPU else (32, 2, 2, 40)
    mixer = Retention(dim, heads, head_norm="none").to(DEVICE)
    documents = torch.zeros(batch, time, dtype=torch.int64, device=DEVICE)
    if packed_rows:
        documents[0, time // 3 :] = 1
        documents[1, time // 4 :] = 1
        documents[1, -time // 10 :] = -1
    valid = (documents >= 0)[..., None]
    generator = torch.Generator().manual_seed(4)
    x, d_y = (torch.randn(batch, time, dim, generator=generator).to(DEVICE) for _ in range(2))
    memory = random_state(batch, heads, dim // heads, 2 * dim // heads)
    d_last = torch.randn(memory.shape, generator=generator).to(DEVICE)

    def run(dtype):
        leaves = [x.clone().requires_grad_(), memory.clone().requires_grad_()]
        context, place = make_context(
            batch, time, documents=documents if packed_rows else None, device=DEVICE
        )
        with torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == torch.bfloat16):
            y, state = mixer(leaves[0], {"memory": leaves[1]}, context, "chunkwise")
            y = y * valid
            last = state["memory"]
            grads = torch.autograd.grad(
                (y, last), (*leaves, *mixer.parameters()), (d_y.to(y.dtype), d_last)
            )
            after, _ = make_context(batch, 1, cursor=place, device=DEVICE)
            with torch.no_grad():
                step, state = mixer(x[:, :1], {"memory": last.clone()}, after, "recurrent")
        return y, last, *grads, step, state["memory"]

    for dtype in DTYPES if GPU else DTYPES[:1]:
        mine = run(dtype)
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "available", lambda *_: False)
            theirs = run(dtype)
        errors = [error(a, b) for a, b in zip(mine, theirs, strict=True)]
        assert max(errors) < 2 * TOLERANCE[dtype], errors


def test_strided_inputs():
    """Slices of one projection, another order of dimensions, and an odd width."""
    joint = torch.randn(2, 70, 2, 48, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    q, k, v = joint.split(16, -1)
    check(q, k, v, slopes(2))
    turned = joint.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3)
    check(*turned.split(16, -1), slopes(2))
    check(*joint[..., :39].split(13, -1), slopes(2))


def test_deterministic_and_every_output_written(monkeypatch):
    """Memory comes full of NaN; outputs and gradients have none of it, and are equal twice."""
    leaves = [x.requires_grad_() for x in case(1, 70, 1, 16, 16, torch.bfloat16)]

    def poison(make):
        def poisoned(*args, **kwargs):
            made = make(*args, **kwargs)
            return made.fill_(torch.nan if made.is_floating_point() else 0)

        return poisoned

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))
    launch.find_forward.cache_clear()
    runs = []
    for _ in range(2):
        out, _ = retention(*leaves, slopes(1))
        runs.append((out, *torch.autograd.grad(out, leaves, out.detach())))
    for first, second in zip(*runs, strict=True):
        assert first.isfinite().all()
        assert torch.equal(first, second)


def test_compiles_without_a_graph_break():
    q, k, v = (x.requires_grad_() for x in case(1, 40, 1, 16, 16, torch.float32))

    def loss(q, k, v):
        return retention(q * 2, k, v, slopes(1))[0].square().sum()

    backend = "inductor" if GPU else "aot_eager"
    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    grads = torch.autograd.grad(compiled(q, k, v), (q, k, v))
    for mine, theirs in zip(grads, torch.autograd.grad(loss(q, k, v), (q, k, v)), strict=True):
        assert error(mine, theirs) < 1e-6


def test_operator_is_registered_soundly():
    q, k, v = (x.requires_grad_() for x in case(1, 40, 2, 16, 24, torch.float32))
    state = random_state(1, 2, 16, 24).requires_grad_()
    arguments = (q, k, v, slopes(2), state, None, None, None, True, True)
    torch.library.opcheck(
        torch.ops.archzoo.retention.default,
        arguments,
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_step_continues_a_prefill(dtype):
    batch, time, heads, dk, dv = 3, 20, 2, 16, 40
    q, k, v = case(batch, time, heads, dk, dv, dtype)
    want, want_last = reference(q, k, v, slopes(heads))
    _, state = retention(q[:, :15], k[:, :15], v[:, :15], slopes(heads), return_state=True)
    for n in range(15, time):
        position = torch.full((batch,), n, device=DEVICE)
        o, returned = retention_step(
            q[:, n : n + 1], k[:, n : n + 1], v[:, n : n + 1], slopes(heads), state, position
        )
        assert returned is state
        assert error(o[:, 0], want[:, n]) < TOLERANCE[dtype]
    assert error(state, want_last) < TOLERANCE[dtype]


def test_a_prepared_step_is_of_its_dtypes():
    q, k, v = case(1, 1, 2, 16, 16, torch.float32)
    state = random_state(1, 2, 16, 16)
    launching._find_launch.cache_clear()
    for tensors in ((q, k, v, state), (q, k.bfloat16(), v, state), (q, k, v, state.bfloat16())):
        retention_step(*tensors[:3], slopes(2), tensors[3])
    assert launching._find_launch.cache_info().misses == 3
    with pytest.raises(ValueError, match="unit last stride"):
        retention_step(q, k, v, slopes(2), state.mT)


def test_step_starts_and_padding():
    q, k, v = case(3, 1, 2, 16, 24, torch.float32)
    state = random_state(3, 2, 16, 24)
    facts = {
        "starts": torch.tensor([[True], [False], [False]], device=DEVICE),
        "valid": torch.tensor([[True], [True], [False]], device=DEVICE),
        "positions": torch.tensor([[0], [7], [0]], device=DEVICE),
    }
    want, want_last = reference(q, k, v, slopes(2), state, **facts)
    o, _ = retention_step(q, k, v, slopes(2), state, **facts)
    assert error(o, want) < 1e-5
    assert error(state, want_last) < 1e-5


@pytest.mark.skipif(GPU, reason="this machine has a GPU")
def test_needs_a_gpu_or_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "CUDA" in unavailable(*case(1, 4, 1, 16, 16, torch.float32))


def test_second_derivatives_are_refused():
    q, k, v = (x.requires_grad_() for x in case(1, 4, 1, 16, 16, torch.float32))
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.autograd.grad(retention(q, k, v, slopes(1))[0].sum(), q, create_graph=True)


def test_transforms_are_refused_by_every_way():
    """Never a wrong number: a tangent was dropped in silence by the operator."""
    q, k, v = case(1, 4, 1, 16, 16, torch.float32)
    decays, rest = slopes(1), (None, None, None, None, True, False)
    operator = torch.ops.archzoo.retention

    def by_function(q):
        return retention(q, k, v, decays)[0].sum()

    def by_operator(q):
        return operator(q, k, v, decays, *rest)[0].sum()

    def by_step(q):
        state = random_state(1, 1, 16, 16)
        return retention_step(q[:, :1], k[:, :1], v[:, :1], decays, state)[0].sum()

    ones = torch.ones_like(q)
    for call in (by_function, by_operator, by_step):
        with pytest.raises(RuntimeError, match=r"no retention kernel|setup_context|no derivative"):
            torch.func.grad(call)(q)
        with pytest.raises(RuntimeError, match=r"no retention kernel|forward-mode"):
            torch.func.jvp(call, (q,), (ones,))
        for enabled in (True, False):  # gradients off or on is nothing to forward mode
            with torch.set_grad_enabled(enabled), forward_ad.dual_level():
                dual = forward_ad.make_dual(q, ones)
                with pytest.raises(RuntimeError, match=r"no retention kernel|forward-mode"):
                    call(dual)
    with pytest.raises(RuntimeError, match="opaque to transforms"):
        torch.func.vmap(by_function)(torch.stack([q, q]))
    with pytest.raises(RuntimeError, match="a step writes into its state"):
        by_step(q.requires_grad_())
    o = retention(q, k, v, decays)[0]
    slope = torch.func.vmap(lambda grad: torch.autograd.grad(o, q, grad, retain_graph=True)[0])
    with pytest.raises(NotImplementedError, match="second derivative"):
        slope(torch.stack([ones, ones]))
    with pytest.raises(RuntimeError, match=r"[Cc]annot access"):
        torch.autograd.grad(o, q, torch.stack([ones, ones]), is_grads_batched=True)


def test_a_mixer_under_transforms_runs_plainly(monkeypatch):
    """Chunkwise where kernels are to be had: what torch.func gets is the plain form's."""
    mixer = Retention(32, 2).to(DEVICE)
    weights = {name: weight.detach() for name, weight in mixer.named_parameters()}
    x = torch.randn(2, 20, 32, device=DEVICE)
    context, _ = make_context(2, 20, device=DEVICE)

    def total(weights, x):
        y, _ = torch.func.functional_call(mixer, weights, (x, None, context, "chunkwise"))
        return y.square().sum()

    def one(x):
        state = mixer.init_state(1, device=DEVICE)
        here, _ = make_context(1, 1, device=DEVICE)
        return mixer(x[None, None], state, here, "recurrent")[0][0, 0]

    def run():
        with torch.no_grad():
            steps = torch.func.vmap(one)(x[0])
        slopes_ = torch.func.grad(total)(weights, x)
        ahead = torch.func.jvp(total, (weights, x), (weights, x))[1]
        return [steps, ahead, *slopes_.values()]

    assert available(*case(1, 4, 1, 16, 16, torch.float32))
    mine = run()
    monkeypatch.setattr(kernels, "available", lambda *_: False)
    assert all(torch.equal(a, b) for a, b in zip(mine, run(), strict=True))
    # And a derivative of what kernels computed is refused, where another form has it.
    monkeypatch.undo()
    if not GPU:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    leaf = x.clone().requires_grad_()
    with pytest.raises(NotImplementedError, match="form='parallel'"):
        torch.autograd.grad(
            mixer(leaf, None, context, "chunkwise")[0].sum(), leaf, create_graph=True
        )
    y, _ = mixer(leaf, None, context, "parallel")
    assert torch.autograd.grad(y.sum(), leaf, create_graph=True)[0].requires_grad


def test_says_why_it_cannot():
    q, k, v = case(1, 4, 1, 16, 16, torch.float32)
    assert available(q, k, v, slopes(1))
    assert "dtype" in unavailable(q, k, v.double())
    assert "float64" in unavailable(q.double(), k.double(), v.double())
    assert "decay" in unavailable(q, k, v, slopes(1).requires_grad_())
    many = q[:, :1].expand(2**15, 1, 2, 16)
    assert "65535" in unavailable(many, many, many)
    assert available(*(x[:-1] for x in (many, many, many)))
    for nothing in (q[:0], q[:, :0]):
        assert "no tokens" in unavailable(nothing, nothing, nothing)
    wide = torch.zeros(1, 4, 1, 600, device=DEVICE)
    assert "512" in unavailable(q, k, wide)
    with pytest.raises(RuntimeError, match="no retention kernel"):
        retention(q, k, wide, slopes(1))
    with pytest.raises(ValueError, match="positions"):
        retention(q, k, v, slopes(1), starts=torch.zeros(1, 4, dtype=torch.bool))


def test_refuses_shapes_that_do_not_belong_together():
    """Kernels would read what lies beside them."""
    q, k, v = case(2, 4, 3, 16, 16, torch.float32)
    positions = torch.arange(4, device=DEVICE).expand(2, 4)
    everywhere = torch.ones(2, 4, dtype=torch.bool, device=DEVICE)
    right = {
        "k": k, "v": v, "log_decay": slopes(3), "state": random_state(2, 3, 16, 16),
        "positions": positions, "starts": everywhere, "valid": everywhere,
    }  # fmt: skip
    retention(q, **right)
    for name in right:
        wrong = right | {name: right[name][:1]}
        if name == "starts":
            wrong["valid"] = None  # which it would be spread over
        with pytest.raises(ValueError, match=f"^{name} has shape"):
            retention(q, **wrong)


def parallel_reference(q, k, v, log_decay, d_out):
    """Output and gradients of a long sequence in float64, by blocks of queries."""
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    queries, keys, values = leaves
    lg = log_decay.double()[:, None]
    n = torch.arange(q.shape[1], device=q.device).double()
    total = torch.where(lg == 0, n + 1, torch.expm1((n + 1) * lg) / torch.expm1(lg))
    out = torch.empty_like(values)
    for begin in range(0, q.shape[1], 1024):
        rows = slice(begin, min(begin + 1024, q.shape[1]))
        gap = n[rows, None] - n[None, : rows.stop]
        weights = torch.where(gap >= 0, torch.exp(gap.clamp(min=0) * lg[:, :, None]), 0.0)
        weights = weights / total[:, rows, None].sqrt()
        scores = torch.einsum("bihd,bjhd->bhij", queries[:, rows], keys[:, : rows.stop])
        segment = torch.einsum("bhij,bjhd->bihd", scores * weights, values[:, : rows.stop])
        out[:, rows] = segment.detach()
        segment.backward(d_out[:, rows].double())
    return out, *(leaf.grad for leaf in leaves)


@pytest.mark.skipif(not GPU, reason="long sequences and real widths need a GPU")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("time", [4097, 32768])
@pytest.mark.parametrize(("heads", "dk", "dv"), [(1, 64, 64), (1, 128, 256), (1, 256, 512)])
@pytest.mark.parametrize("head", [0, 31])
def test_long_sequences(head, heads, dk, dv, time, dtype):
    if dtype == torch.float32 and time > 5000 and dk > 64:
        pytest.skip("kept short: exact float32 runs without tensor cores")
    q, k, v = (x.requires_grad_() for x in case(1, time, heads, dk, dv, dtype))
    d_out = torch.randn_like(v)
    decay = slopes(heads, head)
    out, _ = retention(q, k, v, decay)
    grads = torch.autograd.grad(out, (q, k, v), d_out)
    for mine, want in zip((out, *grads), parallel_reference(q, k, v, decay, d_out), strict=True):
        assert error(mine, want) < TOLERANCE[dtype]


@pytest.mark.skipif(not GPU, reason="many rows and real widths need a GPU")
@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (3, 5), (16, 32)])
def test_rows_from_1_to_512(batch, heads):
    q, k, v = (x.requires_grad_() for x in case(batch, 200, heads, 64, 64, torch.bfloat16))
    d_out = torch.randn_like(v)
    decay = slopes(heads)
    out, _ = retention(q, k, v, decay)
    grads = torch.autograd.grad(out, (q, k, v), d_out)
    for mine, want in zip((out, *grads), parallel_reference(q, k, v, decay, d_out), strict=True):
        assert error(mine, want) < TOLERANCE[torch.bfloat16]


@pytest.mark.skipif(not GPU, reason="real widths need a GPU")
@pytest.mark.parametrize(("dk", "dv"), [(64, 64), (128, 256), (256, 512)])
def test_packed_and_padded_at_real_widths(dk, dv):
    batch, time = 2, 300
    q, k, v = case(batch, time, 2, dk, dv, torch.bfloat16)
    valid = torch.ones(batch, time, dtype=torch.bool)
    valid[0, :37] = False
    valid[1, 270:] = False
    facts = packed(batch, time, (0, 64, 131, 200))
    check(q, k, v, slopes(2), random_state(batch, 2, dk, dv), valid=valid.to(DEVICE), **facts)


@pytest.mark.skipif(not GPU, reason="warp specialisation needs a Hopper GPU")
@pytest.mark.parametrize(("dk", "dv"), [(64, 64), (128, 256), (256, 512)])
@pytest.mark.parametrize(("batch", "time"), [(2, 300), (1, 2048), (1, 4097)])
@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("carried", [True, False])
def test_warp_specialisation_changes_nothing(monkeypatch, carried, scale, batch, time, dk, dv):
    """The Gluon kernels, which no interpreter runs, against Triton's.

    A state that is carried has every segment summed; without one a program takes several.
    By chunks of the same sizes: others round at other places. So does dq of 64 x 64, which is
    normalised after its last product, and the chunks' weights of 256 x 512, made in two halves.
    """
    if not launch._warp_specialises(torch.device("cuda", torch.cuda.current_device())):
        pytest.skip("not a Hopper GPU, or a Triton without Gluon")
    specialised = plans._WARP_SPECIALISED_PLANS
    plan = specialised[dk, dv]
    chunk, _ = plans._BFLOAT16_PLANS[dk, dv].sums
    if plan.sums[1].warp_specialised:
        sums = (chunk, plan.sums[1]._replace(stages=3))
        monkeypatch.setitem(specialised, (dk, dv), plan._replace(sums=sums))
    plans.find_plan.cache_clear()
    tensors = case(batch, time, 2, dk, dv, torch.bfloat16)
    state = random_state(batch, 2, dk, dv)
    d_out, d_last = torch.randn_like(tensors[2]), torch.randn_like(state)

    def run():
        leaves = [x.clone().requires_grad_() for x in tensors]
        if not carried:
            out, _ = retention(*leaves, slopes(2), scale=scale)
            return out, *torch.autograd.grad(out, leaves, d_out)
        leaves.append(state.clone().requires_grad_())
        out, last = retention(*leaves[:3], slopes(2), leaves[3], scale=scale)
        return out, last, *torch.autograd.grad((out, last), leaves, (d_out, d_last))

    mine = run()
    monkeypatch.setattr(launch, "_warp_specialises", lambda _: False)
    launch.find_forward.cache_clear()
    for a, b in zip(mine, run(), strict=True):
        assert error(a, b) < 4e-3


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_where_its_tensors_lie():
    """On a GPU that is not the current one, the current one unchanged, gradients included."""
    here = case(1, 70, 2, 64, 64, torch.bfloat16)
    there = [x.to("cuda:1").requires_grad_() for x in here]
    here = [x.requires_grad_() for x in here]
    for leaves in (here, there):
        retention(*leaves, slopes(2).to(leaves[0].device))[0].square().sum().backward()
    assert torch.cuda.current_device() == 0
    for a, b in zip(here, there, strict=True):
        assert torch.equal(a.grad.cpu(), b.grad.cpu())
