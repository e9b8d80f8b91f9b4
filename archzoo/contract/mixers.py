"""What is checked of mixers: forms, hand-offs, documents, states, gradients, casts, devices."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

from archzoo import block as interface
from archzoo.block import FORMS, Mixer
from archzoo.contract.measure import (
    Violation,
    by_dtype,
    context_of,
    expect_buffers_survive,
    expect_same,
    expect_true_gradient,
    expect_untouched,
    expect_zero,
    first_line,
    gradients_of,
    leaves_of,
    reloaded,
    saved_and_loaded,
    tensors_of,
)
from archzoo.contract.subject import BATCH, LONGEST, Subject
from archzoo.numerics import GRADIENT_TOLERANCES, TOLERANCES
from archzoo.states import State


class Carried(NamedTuple):
    """Where a text stopped: the part's state, and the cursor of its rows."""

    state: State
    cursor: Any

    def map(self, function: Callable[[Any], Any]) -> Carried:
        return Carried(function(self.state), function(self.cursor))


def _start(mixer: Mixer, x: Tensor, capacity: int | None = None) -> Carried:
    batch = x.shape[0]
    state = mixer.init_state(batch, capacity=capacity, device=x.device, dtype=x.dtype)
    return Carried(state, interface.init_cursor(batch, x.device))


def _run_plan(
    mixer: Mixer,
    x: Tensor,
    plan: Sequence[tuple[int, str | None]],
    carried: Carried | None = None,
    documents: Tensor | None = None,
) -> tuple[Tensor, Carried]:
    """Run x (batch, time, dim) in segments of (length, form), each from the last one's state."""
    state, cursor = carried or _start(mixer, x)
    outputs, begin = [], 0
    for length, form in plan:
        end = begin + length
        segment = None if documents is None else documents[:, begin:end]
        context, cursor = context_of(x[:, begin:end], segment, cursor)
        y, state = mixer(x[:, begin:end], state, context, form)
        outputs.append(y)
        begin = end
    return torch.cat(outputs, dim=1), Carried(state, cursor)


def _whole(
    mixer: Mixer, x: Tensor, form: str | None = "recurrent", documents: Tensor | None = None
) -> Tensor:
    """X at once, from an empty state that is not kept."""
    y: Tensor = mixer(x, None, context_of(x, documents)[0], form)[0]
    return y


# ---------------------------------------------------------------------------- the checks


def mixer_interface(subject: Subject) -> str:
    """Shapes, dtypes, state None for None, a state of tensors and ints with the batch first."""
    mixer = subject.make(torch.float32)
    x = subject.draw(BATCH, 7, subject.dim, dtype=torch.float32)
    context, _ = context_of(x)
    with torch.no_grad():
        given = mixer.step(x[:, :1], _start(mixer, x).state, context.segment(0, 1))
        if not (isinstance(given, tuple) and len(given) == 2 and given[1] is not None):
            what = "y and None" if isinstance(given, tuple) else f"a {type(given).__name__}"
            raise Violation(f"step returns {what}: it must return y and the state after the token")
        for form in (*FORMS, None):
            y, state = mixer(x, None, context, form)
            if y.shape != x.shape or y.dtype != x.dtype:
                raise Violation(
                    f"form {form}: {tuple(y.shape)} {y.dtype} from {tuple(x.shape)} {x.dtype}: "
                    "y has the shape and dtype of x"
                )
            if state is not None:
                raise Violation(
                    f"form {form}: state None must come back as None: training "
                    "keeps nothing it does not need"
                )
            y, state = mixer(x, _start(mixer, x).state, context, form)
            if state is None:
                raise Violation(f"form {form}: a state goes in, so a state must come back")
            for leaf in leaves_of(state):
                if isinstance(leaf, Tensor):
                    if leaf.dim() == 0 or leaf.shape[0] != BATCH:
                        raise Violation(
                            f"form {form}: a state's tensor has shape {tuple(leaf.shape)} at "
                            f"batch {BATCH}: the batch is axis 0 of every tensor"
                        )
                elif leaf is not None and not isinstance(leaf, int):
                    raise Violation(
                        f"form {form}: the state holds a {type(leaf).__name__}: only tensors, "
                        "ints, dicts and lists can be forked, reordered and saved"
                    )
    for form in FORMS:
        ran: list[str] = []
        spied = copy.copy(mixer)
        for name in FORMS:
            run = functools.partial(_spy, ran, name, getattr(mixer, name))
            object.__setattr__(spied, name, run)
        with torch.no_grad():
            spied(x, None, context, form)
        if ran[:1] != [form]:
            raise Violation(f"form {form!r} was given, {ran[0] if ran else 'none'!r} was run")
    wide, x = subject.make(), subject.draw(BATCH, 7, subject.dim)
    before = x.clone()
    with torch.no_grad():
        for name in FORMS:
            if (dtype := _whole(wide, x, name).dtype) != torch.float64:
                raise Violation(f"form {name}: {dtype} from torch.float64: y has the dtype of x")
            expect_untouched(x, before, f"form {name}: x")
    try:
        mixer(x.float(), None, context, "sideways")
    except ValueError:
        return "y as x; None for None; a plain state, batch first; the form given is run"
    raise Violation("an unknown form must raise ValueError")


def _spy(ran: list[str], name: str, run: Callable[..., Any], *arguments: Any) -> Any:
    ran.append(name)
    return run(*arguments)


def mixer_forms(subject: Subject) -> str:
    """Parallel, chunkwise, recurrent and the form chosen are one function."""
    worst: dict[torch.dtype, float] = {}
    for dtype in (torch.float64, torch.float32):
        mixer = subject.make(dtype)
        for time in subject.lengths():
            x = subject.draw(BATCH, time, subject.dim, dtype=dtype)
            with torch.no_grad():
                want = _whole(mixer, x)
                for form in ("parallel", "chunkwise", None):
                    what = f"form {form} against recurrent, {time} tokens, {dtype}"
                    error = expect_same(_whole(mixer, x, form), want, TOLERANCES[dtype], what)
                    worst[dtype] = max(worst.get(dtype, 0.0), error)
    return by_dtype(worst)


def mixer_reach(subject: Subject) -> str:
    """A token finds those before it, from 70,000 tokens into a text as from its beginning."""
    mixer = subject.make()
    time = 60
    for form in FORMS:
        x = subject.draw(2, time, subject.dim).requires_grad_()
        y = _whole(mixer, x, form)
        (gradient,) = gradients_of(y[:, -1].square().sum(), [x])
        if not gradient[:, :-1].abs().max():
            raise Violation(f"{form}: the last of {time} tokens sees none before it: it must mix")
    x = subject.draw(2, 9, subject.dim)
    cursor = interface.init_cursor(2)
    cursor["positions"] += 70_000
    context, _ = context_of(x, None, cursor)
    worst = 0.0
    with torch.no_grad():
        want = mixer(x, None, context, "recurrent")[0]
        for form in ("parallel", "chunkwise"):
            what = f"{form} against recurrent at position 70,000"
            got = mixer(x, None, context, form)[0]
            worst = max(worst, expect_same(got, want, TOLERANCES[torch.float64], what))
    return f"sees the past in every form; forms agree at position 70,000, float64 {worst:.0e}"


def mixer_handoffs(subject: Subject) -> str:
    """A text cut anywhere, each segment in any form, gives what it gives whole."""
    mixer = subject.make()
    worst, segments = 0.0, 0
    for time, gradients, sized in (
        (subject.random.randint(200, LONGEST), False, False),
        (subject.random.randint(20, 90), False, True),
        (subject.random.randint(20, 60), True, False),
    ):
        x = subject.draw(BATCH, time, subject.dim)
        with torch.no_grad():
            want = _whole(mixer, x)
        for _ in range(3):
            plan = subject.plan(time)
            with torch.set_grad_enabled(gradients):
                start = _start(mixer, x, capacity=time if sized else None)
                got, _ = _run_plan(mixer, x, plan, start)
            what = f"segments {plan} against the whole: the state must carry all of the past"
            worst = max(worst, expect_same(got, want, TOLERANCES[torch.float64], what))
            segments += len(plan)
    return f"{segments} segments, float64 {worst:.0e}"


def mixer_causal(subject: Subject) -> str:
    """Token t sees nothing after t: no gradient at all, and no change when the future changes."""
    mixer = subject.make()
    time = 12
    t = subject.random.randint(2, time - 3)
    for form in FORMS:
        x = subject.draw(2, time, subject.dim).requires_grad_()
        y = _whole(mixer, x, form)
        (gradient,) = gradients_of(y[:, : t + 1].square().sum(), [x])
        expect_zero(gradient[:, t + 1 :], f"{form}: outputs to {t} see tokens after {t}")
        other = x.detach().clone()
        other[:, t + 1 :] = subject.draw(2, time - t - 1, subject.dim)
        with torch.no_grad():
            changed = _whole(mixer, other, form)
        what = f"{form}: outputs to {t} change with the tokens after {t}, which they must not see"
        expect_same(changed[:, : t + 1], y[:, : t + 1], TOLERANCES[torch.float64], what)
    return "gradient to the future exactly 0, in every form"


def mixer_documents(subject: Subject) -> str:
    """Padding and packing give each document what it gives alone, in every form and hand-off."""
    mixer = subject.make()
    sizes = (5, 1, 17, 9)
    texts = [subject.draw(1, size + 4, subject.dim) for size in sizes]
    garbage = functools.partial(subject.draw, 1)

    def row(*entries: int | str) -> tuple[Tensor, Tensor]:
        """A row of 40 tokens: texts by number, and padding of garbage that fills it up."""
        missing = 40 - sum(sizes[entry] for entry in entries if isinstance(entry, int))
        each = missing // max(sum(isinstance(entry, str) for entry in entries), 1)
        vectors, documents = [], []
        for entry in entries:
            if isinstance(entry, int):
                vectors.append(texts[entry][:, : sizes[entry]])
                documents += [entry] * sizes[entry]
            else:
                size = missing - each if entry == "rest" else each
                vectors.append(10 * garbage(size, subject.dim))
                documents += [-1] * size
        return torch.cat(vectors, dim=1), torch.tensor([documents])

    rows = {
        "left padding": row("pad", 2),
        "right padding": row(3, "pad"),
        "packing": row("pad", 0, 1, 2, 3, "rest"),
    }
    x = torch.cat([vectors for vectors, _ in rows.values()])
    documents = torch.cat([numbers for _, numbers in rows.values()])
    last = [2, 3, 3]  # the document each row stops in, which continues below
    tail = torch.cat([texts[n][:, sizes[n] : sizes[n] + 4] for n in last])
    worst = 0.0
    with torch.no_grad():
        alone = [_whole(mixer, text) for text in texts]
        cut = subject.random.randint(12, 28)  # inside every row's text or padding
        ways: list[tuple[str, list[tuple[int, str | None]]]] = [
            (str(form), [(40, form)]) for form in (*FORMS, None)
        ]
        ways += [
            (f"{a} then {b}", [(cut, a), (40 - cut, b)]) for a in FORMS for b in FORMS if a != b
        ]
        for name, plan in ways:
            y, carried = _run_plan(mixer, x, plan, documents=documents)
            outputs = [("from a state", y)]
            if len(plan) == 1:
                outputs.append(("without one", _whole(mixer, x, plan[0][1], documents)))
            for how, got in outputs:
                for index, kind in enumerate(rows):
                    for number in documents[index].unique().tolist():
                        if number < 0:
                            continue
                        here = got[index, documents[index] == number]
                        want = alone[number][0, : sizes[number]]
                        what = (
                            f"{kind}, {name}, {how}: a document of {sizes[number]} tokens must "
                            "get what it gets alone"
                        )
                        worst = max(worst, expect_same(here, want, TOLERANCES[torch.float64], what))
            after = F.pad(tail, (0, 0, 3, 0), value=9.0)  # the next segment may be padded, too
            numbers = F.pad(torch.tensor(last)[:, None].expand(-1, 4), (3, 0), value=-1)
            y, _ = _run_plan(mixer, after, [(5, plan[-1][1]), (2, "recurrent")], carried, numbers)
            y = y[:, 3:]
            for index, kind in enumerate(rows):
                want = alone[last[index]][0, sizes[last[index]] :]
                what = (
                    f"{kind}, {name}: a document that continues in the next segment must find its "
                    "final state unchanged; padding neither adds nor decays"
                )
                worst = max(worst, expect_same(y[index], want, TOLERANCES[torch.float64], what))
    for form in FORMS:
        leaf = x.clone().requires_grad_()
        y = _whole(mixer, leaf, form, documents)
        (gradient,) = gradients_of(y[2, documents[2] == 2].square().sum(), [leaf])
        expect_zero(gradient[2, documents[2] != 2], f"{form}: a document sees another, or padding")
    return f"left, right, packed, continued, float64 {worst:.0e}; documents do not mix"


def mixer_batch(subject: Subject) -> str:
    """A row of a batch gives what it gives alone."""
    mixer = subject.make()
    x = subject.draw(BATCH, 20, subject.dim).requires_grad_()
    worst = 0.0
    for form in FORMS:
        y = _whole(mixer, x, form)
        (gradient,) = gradients_of(y[0].square().sum(), [x])
        expect_zero(gradient[1:], f"{form}: row 0 sees other rows")
        for row in range(BATCH):
            with torch.no_grad():
                alone = _whole(mixer, x[row : row + 1], form)
            what = f"{form}: row {row} alone against in a batch of {BATCH}"
            worst = max(
                worst, expect_same(alone, y[row : row + 1], TOLERANCES[torch.float64], what)
            )
    return f"float64 {worst:.0e}; gradient to other rows exactly 0"


def _owns_its_tensors(mixer: Mixer, x: Tensor) -> None:
    """A state may not be a small view of something large."""
    for form in FORMS:
        with torch.no_grad():
            _, carried = _run_plan(mixer, x, [(x.shape[1], form)])
        for tensor in tensors_of(carried.state):
            held, own = tensor.untyped_storage().nbytes(), tensor.numel() * tensor.element_size()
            if held > 2 * own:
                raise Violation(
                    f"after {form} a tensor of the state, {own} bytes, is a view of {held}: it "
                    "keeps them all alive, and is saved with them; hand back a copy"
                )


def mixer_state(subject: Subject) -> str:
    """A state can be forked, reordered, saved, moved and detached, and continues the same text."""
    mixer = subject.make()
    time, more = 11, 6
    x = subject.draw(BATCH, time + more, subject.dim)
    rest = x[:, time:]
    _owns_its_tensors(mixer, subject.draw(1, LONGEST, subject.dim))
    rows = torch.tensor([2, 0, 0, 1, 2])  # more rows than before, and other than heads

    worst = 0.0
    for first, then in (("recurrent", "recurrent"), ("chunkwise", "parallel")):
        plan = [(2, then), (more - 2, "recurrent")]
        with torch.no_grad():
            _, carried = _run_plan(mixer, x[:, :time], [(time, first)])
            ways = {
                "forked": carried.map(interface.fork),
                "saved and loaded": carried.map(saved_and_loaded),
                "moved": carried.map(lambda state: interface.to(interface.fork(state), "cpu")),
            }
            reordered = carried.map(lambda state: interface.reorder(state, rows))
            want = _whole(mixer, x)[:, time:]
            _run_plan(mixer, rest, plan, carried)  # consumes the state, not its copies
            for name, copied in ways.items():
                got, _ = _run_plan(mixer, rest, plan, copied)
                what = f"a state {name} after {first}: it continues as the original does"
                worst = max(worst, expect_same(got, want, TOLERANCES[torch.float64], what))
            got, _ = _run_plan(mixer, rest[rows], plan, reordered)
            what = f"rows of a state reordered after {first}: every tensor has the batch first"
            worst = max(worst, expect_same(got, want[rows], TOLERANCES[torch.float64], what))
        past = x[:, :time].clone().requires_grad_()
        _, carried = _run_plan(mixer, past, [(time, first)])
        cut, _ = _run_plan(mixer, rest, plan, carried.map(interface.detach))
        what = "a detached state continues as the whole does"
        worst = max(worst, expect_same(cut, want, TOLERANCES[torch.float64], what))
        expect_zero(gradients_of(cut.sum(), [past])[0], "a detached state lets a gradient through")
    return f"fork, reorder, save, move, detach: float64 {worst:.0e}"


def mixer_fixed_state(subject: Subject) -> str:
    """A state of tensors that stay gives what an ordinary one gives, and waits for no device."""
    mixer = subject.make()
    time, more = 11, 6
    numbers = torch.tensor([[-1] * 4 + [0] * 7, [0] * 11, [0] * 5 + [1] * 6])
    worst = 0.0
    for documents in (None, numbers):
        x = subject.draw(BATCH, time + more, subject.dim)
        with torch.no_grad():
            start = _start(mixer, x, capacity=time + more)
            _, carried = _run_plan(mixer, x[:, :time], [(time, None)], start, documents)
            fixed = carried.map(interface.fork)
            fixed = fixed._replace(state=mixer.fixed_state(fixed.state))
            for t in range(time, time + more - 2):
                before = _kinds_of(fixed.state)
                want, carried = _run_plan(mixer, x[:, t : t + 1], [(1, None)], carried)
                got, fixed = _run_plan(mixer, x[:, t : t + 1], [(1, None)], fixed)
                what = "a step from a fixed state against one from an ordinary state"
                worst = max(worst, expect_same(got, want, TOLERANCES[torch.float64], what))
                if _kinds_of(fixed.state) == before:
                    continue
                if type(mixer).fixed_state is Mixer.fixed_state:
                    return "none: a step changes more than tensors, and cannot be replayed"
                raise Violation(
                    f"a step changes the fixed state {before} to {_kinds_of(fixed.state)}: of a "
                    "fixed state nothing changes but what its tensors hold"
                )
            plan = [(2, None)]
            want, _ = _run_plan(mixer, x[:, -2:], plan, carried)
            got, _ = _run_plan(
                mixer, x[:, -2:], plan, fixed._replace(state=mixer.copy_state(fixed.state))
            )
            what = "a copy of a fixed state continues as an ordinary state"
            worst = max(worst, expect_same(got, want, TOLERANCES[torch.float64], what))
    with torch.device("meta"):
        absent = subject.part(*subject.sizes.values(), **subject.arguments)
    x = torch.empty(BATCH, 4, subject.dim, device="meta")
    try:
        with torch.no_grad(), _no_autocast_on_meta():
            _, carried = _run_plan(absent, x[:, :3], [(3, None)], _start(absent, x, capacity=4))
            fixed = carried._replace(state=absent.fixed_state(carried.state))
            _run_plan(absent, x[:, 3:], [(1, None)], fixed)
    except (RuntimeError, NotImplementedError) as error:
        raise Violation(
            f"a step from a fixed state on the meta device: {first_line(error)}: it waits for no "
            "device, and makes nothing whose shape depends on numbers"
        ) from None
    return f"steps and copies, float64 {worst:.0e}; nothing waits"


def _kinds_of(state: Any) -> list[Any]:
    """Of each leaf of a state: a tensor's shape and dtype, else what it is."""
    return [
        (tuple(leaf.shape), str(leaf.dtype)) if isinstance(leaf, Tensor) else leaf
        for leaf in leaves_of(state)
    ]


def mixer_gradients(subject: Subject) -> str:
    """Every form has the gradients of the recurrent one, through an incoming state too."""
    found: dict[torch.dtype, float] = {}
    for dtype in (torch.float64, torch.float32):
        mixer = subject.make(dtype)
        time = subject.random.randint(12, 40)
        x = subject.draw(2, time, subject.dim, dtype=dtype).requires_grad_()
        weights = subject.draw(2, time, subject.dim, dtype=dtype)
        named = {name: p for name, p in mixer.named_parameters() if p.requires_grad}
        wanted = {"x": x} | named
        scalar = (_whole(mixer, x) * weights).sum()
        want = dict(zip(wanted, gradients_of(scalar, list(wanted.values())), strict=True))
        for name in named:
            if not want[name].abs().max():
                raise Violation(f"the parameter {name!r} gets no gradient: it is never trained")
        cut = subject.random.randint(1, time - 1)
        plans = [[(time, form)] for form in ("parallel", "chunkwise")]
        plans += [[(cut, a), (time - cut, b)] for a in FORMS for b in FORMS]
        for plan in plans:
            y = _whole(mixer, x, plan[0][1]) if len(plan) == 1 else _run_plan(mixer, x, plan)[0]
            got = gradients_of((y * weights).sum(), list(wanted.values()))
            for name, gradient in zip(wanted, got, strict=True):
                what = f"{dtype} gradient of {name}, segments {plan}, against the recurrent form's"
                error = expect_same(gradient, want[name], GRADIENT_TOLERANCES[dtype], what)
                found[dtype] = max(found.get(dtype, 0.0), error)
    mixer = subject.make()
    expect_true_gradient(
        lambda x: _whole(mixer, x), mixer, subject.draw(2, 6, subject.dim), subject
    )
    return by_dtype(found)


def mixer_casts(subject: Subject) -> str:
    """Half precision rounds weights and activations, never positions, decays or sums over time."""
    module: Mixer = subject.make(torch.float32)
    expect_buffers_survive(module)
    worst = 0.0
    for dtype in (torch.bfloat16, torch.float16):
        half = subject.make(torch.float32).to(dtype)
        full = copy.deepcopy(half).float()  # the same rounded weights, computed in float32
        x = subject.draw(2, LONGEST, subject.dim, dtype=dtype)
        with torch.no_grad():
            want = _whole(full, x.float(), "parallel")
            for form in (*FORMS, None):
                what = f"{form} in {dtype} against float32 with the same weights"
                got = _whole(half, x, form)
                if got.dtype != dtype:
                    raise Violation(f"{form} in {dtype} gives {got.dtype}: y has the dtype of x")
                worst = max(worst, expect_same(got, want, TOLERANCES[dtype], what))
        _sums_are_wide(half, x[:, :64], f"after .to({dtype})")
    x = subject.draw(2, 64, subject.dim, dtype=torch.float32)
    with torch.no_grad():
        want = _whole(module, x)
    with torch.autocast("cpu", torch.bfloat16):
        _sums_are_wide(module, x, "under bfloat16 autocast")
        for form in FORMS:
            with torch.no_grad():
                got = _whole(module, x, form)
            what = f"{form} under bfloat16 autocast against without"
            worst = max(worst, expect_same(got, want, TOLERANCES[torch.bfloat16], what))
    return f"bfloat16, float16 and autocast {worst:.0e}; sums over time stay float32"


def _sums_are_wide(mixer: Mixer, x: Tensor, when: str) -> None:
    """Sums over time must be float32 at least.

    A tensor of the state is such a sum if its shape stays as tokens come (a cache grows) and it
    still depends on the first of them (a window has forgotten it).
    """
    x = x.clone().requires_grad_()
    for form in FORMS:
        _, carried = _run_plan(mixer, x[:, :32], [(32, form)])
        shapes = [tensor.shape for tensor in tensors_of(carried.state)]
        _, carried = _run_plan(mixer, x[:, 32:], [(x.shape[1] - 32, form)], carried)
        for tensor, shape in zip(tensors_of(carried.state), shapes, strict=False):
            if not tensor.requires_grad or tensor.shape != shape:
                continue
            real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
            (gradient,) = gradients_of(real.sum(), [x])
            if gradient[:, 0].abs().max() and tensor.dtype in (torch.bfloat16, torch.float16):
                raise Violation(
                    f"{form} {when}: a tensor of the state {tuple(shape)} sums over time in "
                    f"{tensor.dtype}: such sums are at least float32"
                )


def mixer_heads(subject: Subject) -> str:
    """At 32 heads all is as at 4."""
    sizes = {"dim": 32 * (subject.dim // subject.sizes["heads"]), "heads": 32}
    found = []
    for dtype in (torch.float64, torch.float32):
        mixer = subject.make(dtype, **sizes)
        x = subject.draw(2, 70, sizes["dim"], dtype=dtype)
        with torch.no_grad():
            want = _whole(mixer, x)
            for form in ("parallel", "chunkwise"):
                what = f"{form} against recurrent at 32 heads, {dtype}"
                found.append(expect_same(_whole(mixer, x, form), want, TOLERANCES[dtype], what))
    return f"forms agree to {max(found):.0e}"


def mixer_repeats(subject: Subject) -> str:
    """The same seed and input give the same bits: nothing hidden, nothing random, no mode."""
    mixer, same = subject.make(), subject.make()
    x, other = subject.draw(BATCH, 30, subject.dim), subject.draw(2, 9, subject.dim)
    with torch.inference_mode():  # nothing that is made here and kept may come up in training
        _whole(mixer, x, None)
    _whole(mixer, x.clone().requires_grad_(), None).sum().backward()
    mixer.zero_grad()
    with torch.no_grad():
        for form in (*FORMS, None):
            mixer.train()
            first = _whole(mixer, x, form)
            _whole(mixer, other, form)
            if not torch.equal(_whole(mixer, x, form), first):
                raise Violation(f"{form}: a second call gives other numbers: a module hides state")
            if not torch.equal(_whole(same, x, form), first):
                raise Violation(f"{form}: a second module of the same seed gives other numbers")
            if not torch.equal(_whole(mixer.eval(), x, form), first):
                raise Violation(
                    f"{form}: eval() gives other numbers than train(): forms are chosen by facts, "
                    "and dropout belongs to the decoder"
                )
    return "bit for bit, in train() and eval()"


def mixer_save(subject: Subject) -> str:
    """Weights saved and loaded into a fresh instance give the same bits."""
    mixer = subject.make()
    fresh = reloaded(mixer, subject.make())
    x = subject.draw(2, 20, subject.dim)
    with torch.no_grad():
        if not torch.equal(_whole(fresh, x, None), _whole(mixer, x, None)):
            raise Violation(
                "a fresh instance with the saved weights gives other numbers: some of what "
                "decides the output is in neither the weights nor the arguments"
            )
    return "bit for bit"


def mixer_devices(subject: Subject) -> str:
    """Runs where its input lives: on the meta device a tensor made elsewhere or a read shows."""
    with torch.device("meta"):
        mixer = subject.part(*subject.sizes.values(), **subject.arguments)
    x = torch.empty(2, 9, subject.dim, device="meta")
    numbers = torch.tensor([[-1] * 2 + [0] * 3 + [1] * 4] * 2, device="meta")
    for form in FORMS:
        for documents in (None, numbers):
            try:
                with torch.no_grad(), _no_autocast_on_meta():
                    y, _ = _run_plan(mixer, x, [(4, form), (5, form)], documents=documents)
            except (RuntimeError, NotImplementedError) as error:
                raise Violation(
                    f"{form} on the meta device: {first_line(error)}: tensors are made on the "
                    "device of x, and no step waits for the device"
                ) from None
            if y.device.type != "meta":
                raise Violation(f"{form}: y is on {y.device}, x on {x.device}")
    return "built and run on the meta device"


@contextlib.contextmanager
def _no_autocast_on_meta() -> Iterator[None]:
    """Let ``torch.autocast("meta", ...)`` do nothing: a real device knows it, meta refuses it."""
    kind = torch.amp.autocast_mode.autocast
    made, entered, left = kind.__init__, kind.__enter__, kind.__exit__

    def init(self: Any, device_type: str, *arguments: Any, **options: Any) -> None:
        self.on_meta = device_type == "meta"
        if not self.on_meta:
            made(self, device_type, *arguments, **options)

    def enter(self: Any) -> Any:
        return self if self.on_meta else entered(self)

    def exit_(self: Any, *error: Any) -> Any:
        return None if self.on_meta else left(self, *error)

    with (
        mock.patch.object(kind, "__init__", init),
        mock.patch.object(kind, "__enter__", enter),
        mock.patch.object(kind, "__exit__", exit_),
    ):
        yield
