"""The rules of the interface as checks: `archzoo.check(MyMixer)` holds a class to all of them.

Each check is a function from a `Subject` (a class with its arguments and sizes) to one line that
says what was measured, and it raises `Violation` with what failed, by how much, and the rule. The
recurrent form is the reference for the others, since `step` defines a mixer. Values are compared
by relative RMS, ``|a - b| / |b|``, in float64 wherever precision is not the question, so that a
rule broken by a little is told from rounding.
"""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import io
import itertools
import os
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archzoo import block as interface
from archzoo.block import FORMS, Context, Mixer, State
from archzoo.decoder import Decoder
from archzoo.parts import SLOTS, list_parts, nearest

#: Relative RMS up to which two ways to compute the same thing agree: one part, a whole model,
#: and gradients.
VALUES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}
MODEL_VALUES = {torch.float64: 1e-12, torch.float32: 1e-4}
GRADIENTS = {torch.float64: 1e-10, torch.float32: 1e-4}

LONGEST = 300  # tokens in the longest text that a check makes
BATCH = 3  # unlike the number of heads, so that an axis taken for another shows

#: What each slot's parts are built with: the arguments a decoder passes by position.
SIZES: dict[str, dict[str, int]] = {
    "mixer": {"dim": 32, "heads": 4},
    "feed_forward": {"dim": 32, "width": 48},
    "router": {"dim": 32, "experts": 8},
    "embedding": {"vocab_size": 29, "dim": 32},
    "rotary": {"head_dim": 16},
    "bias": {"heads": 4},
}


class Violation(Exception):
    """A rule is broken; the message says which, and by how much."""


class Finding(NamedTuple):
    """What one check found.

    Attributes:
        name: Of the check.
        passed: Whether the rule holds.
        detail: What was measured, or what failed, by how much, and the rule.
    """

    name: str
    passed: bool
    detail: str


class Report(list[Finding]):
    """The findings about one part, in the order of the checks.

    Args:
        subject: The part, as it is shown.
        findings: One for each check.
    """

    def __init__(self, subject: str, findings: Sequence[Finding]) -> None:
        super().__init__(findings)
        self.subject = subject

    @property
    def passed(self) -> bool:
        """Whether every rule holds."""
        return not self.failures

    @property
    def failures(self) -> list[Finding]:
        """The findings of broken rules."""
        return [finding for finding in self if not finding.passed]

    def show(self) -> None:
        """Print the findings as a table."""
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(title=f"{self.subject} against the interface", title_justify="left")
        table.add_column("rule")
        table.add_column("")
        table.add_column("what was found", overflow="fold")
        for name, passed, detail in self:
            mark = Text("holds", "green") if passed else Text("BROKEN", "bold red")
            table.add_row(name, mark, Text(detail))
        Console().print(table)


class ContractError(AssertionError):
    """A part breaks rules of the interface; `report` holds all findings.

    Args:
        report: The findings.
    """

    def __init__(self, report: Report) -> None:
        lines = [f"\n  {finding.name}: {finding.detail}" for finding in report.failures]
        super().__init__(
            f"{report.subject} breaks {len(lines)} of {len(report)} rules:{''.join(lines)}"
        )
        self.report = report


# ---------------------------------------------------------------------------- the subject


class Subject:
    """A class with its arguments and sizes, and everything a check draws at random.

    Args:
        part: A class of one of the slots, a partial of one, a name, or
            ``{"class_path": ..., "init_args": ...}``.
        arguments: Its arguments, among them sizes (dim, heads, ...) other than `SIZES`.
        seed: Of weights, inputs, lengths and cuts.
    """

    def __init__(self, part: Any, arguments: dict[str, Any] | None = None, seed: int = 0) -> None:
        arguments = dict(arguments or {})
        if isinstance(part, functools.partial):
            part, arguments = part.func, dict(part.keywords) | arguments
        elif isinstance(part, dict):
            part, arguments = part["class_path"], dict(part.get("init_args") or {}) | arguments
        if isinstance(part, str):
            part = find_part(part)
        slots = [slot for slot, base in SLOTS.items() if _is_a(part, base)]
        if not slots:
            bases = ", ".join(base.__name__ for base in SLOTS.values())
            raise ValueError(f"{part!r} is no part: it must be a class that inherits from {bases}")
        self.part, self.slot, self.seed = part, slots[0], seed
        self.sizes = {name: arguments.pop(name, size) for name, size in SIZES[self.slot].items()}
        # What a class cannot do without and has no default for, it names itself.
        arguments = getattr(part, "contract_arguments", {}) | arguments
        self.arguments = arguments
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def __str__(self) -> str:
        shown = ", ".join(f"{name}={value!r}" for name, value in self.arguments.items())
        return f"{self.part.__name__}({shown})" if shown else self.part.__name__

    @property
    def dim(self) -> int:
        """Width of the vectors that go in."""
        return self.sizes["dim"]

    def make(self, dtype: torch.dtype = torch.float64, **sizes: int) -> Any:
        """Build the part; the same weights each time, a little off whatever they start at.

        A weight that starts at zero would hide the path behind it.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            made = self.part(*(self.sizes | sizes).values(), **self.arguments)
            with torch.no_grad():
                for parameter in made.parameters():
                    parameter.add_(0.02 * torch.randn_like(parameter))
        return made.to(dtype)

    def draw(self, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """Standard normal numbers."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(dtype)

    def tokens(self, batch: int, time: int, vocab_size: int) -> Tensor:
        """Random tokens (batch, time)."""
        return torch.randint(vocab_size, (batch, time), generator=self.generator)

    def lengths(self) -> list[int]:
        """One token, some tokens, many tokens."""
        return [1, self.random.randint(2, 64), self.random.randint(200, LONGEST)]

    def plan(self, time: int) -> list[tuple[int, str | None]]:
        """`time` tokens cut at random, each piece in a random form."""
        cuts = sorted(self.random.sample(range(1, time), k=min(3, time - 1)))
        ends = itertools.pairwise([0, *cuts, time])
        return [(end - begin, self.random.choice((*FORMS, None))) for begin, end in ends]


def _is_a(part: Any, base: type) -> bool:
    return inspect.isclass(part) and issubclass(part, base)


def find_part(name: str) -> type[nn.Module]:
    """The class of the zoo, or at an import path, that a name stands for.

    Raises:
        ValueError: There is none; the nearest names are given.
    """
    own = {key: found for slot in SLOTS for key, found in list_parts(slot).items()}
    if name in own:
        return own[name]
    path, _, attribute = name.rpartition(".")
    if not path:
        raise ValueError(
            f"there is no part {name!r}; nearest: {nearest(name, list(own))}; "
            "a class of your own goes by module.Class"
        )
    try:
        module = importlib.import_module(path)
    except ImportError as error:
        raise ValueError(f"{name!r} cannot be imported: {error}") from None
    if not hasattr(module, attribute):
        classes = [key for key, value in vars(module).items() if inspect.isclass(value)]
        close = f"; nearest: {nearest(attribute, classes)}" if classes else ""
        raise ValueError(f"{path} has no {attribute!r}{close}")
    found: type[nn.Module] = getattr(module, attribute)
    return found


# ---------------------------------------------------------------------------- measuring


def relative_error(got: Tensor, want: Tensor) -> float:
    """``|got - want| / |want|``: relative RMS; infinite where a value is not finite."""
    got, want = got.detach().double(), want.detach().double()
    if got.shape != want.shape or not got.isfinite().all():
        return float("inf")
    scale = want.norm().item()
    return (got - want).norm().item() / (scale if scale else 1.0)


def _same(got: Tensor, want: Tensor, tolerance: float, what: str) -> float:
    """The error, or a `Violation` that names what differs."""
    if got.shape != want.shape:
        raise Violation(f"{what}: shape {tuple(got.shape)} instead of {tuple(want.shape)}")
    if not got.isfinite().all():
        raise Violation(f"{what}: NaN or infinite values")
    error = relative_error(got, want)
    if not error <= tolerance:
        raise Violation(f"{what}: relative RMS error {error:.1e}, allowed {tolerance:.0e}")
    return error


def _zero(gradient: Tensor | None, what: str) -> None:
    """A `Violation` unless a gradient is exactly zero (None: no path at all)."""
    if gradient is not None and gradient.abs().max() != 0:
        raise Violation(f"{what}: gradient {gradient.abs().max():.1e}, must be exactly 0")


def _context(x: Tensor, documents: Tensor | None = None, place: Any = None) -> tuple[Context, Any]:
    return interface.make_context(
        x.shape[0], x.shape[1], documents=documents, place=place, device=x.device
    )


class Stand(NamedTuple):
    """Where a text stopped: the part's state, and the place of its rows."""

    state: State
    place: Any

    def map(self, function: Callable[[State], State]) -> Stand:
        return Stand(function(self.state), function(self.place))


def _start(mixer: Mixer, x: Tensor, capacity: int | None = None) -> Stand:
    batch = x.shape[0]
    state = mixer.init_state(batch, capacity=capacity, device=x.device, dtype=x.dtype)
    return Stand(state, interface.init_place(batch, x.device))


def _walk(
    mixer: Mixer,
    x: Tensor,
    plan: Sequence[tuple[int, str | None]],
    stand: Stand | None = None,
    documents: Tensor | None = None,
) -> tuple[Tensor, Stand]:
    """Run x (batch, time, dim) in pieces of (length, form), handing the state on."""
    state, place = stand or _start(mixer, x)
    outputs, begin = [], 0
    for length, form in plan:
        end = begin + length
        piece = None if documents is None else documents[:, begin:end]
        context, place = _context(x[:, begin:end], piece, place)
        y, state = mixer(x[:, begin:end], state, context, form)
        outputs.append(y)
        begin = end
    return torch.cat(outputs, dim=1), Stand(state, place)


def _whole(
    mixer: Mixer, x: Tensor, form: str | None = "recurrent", documents: Tensor | None = None
) -> Tensor:
    """X at once, from an empty state that is not kept."""
    y: Tensor = mixer(x, None, _context(x, documents)[0], form)[0]
    return y


def _leaves(state: State) -> Iterator[Any]:
    """The tensors, ints and whatever else a state holds."""
    if isinstance(state, dict):
        state = list(state.values())
    if isinstance(state, list | tuple):
        for entry in state:
            yield from _leaves(entry)
    else:
        yield state


def _tensors(state: State) -> list[Tensor]:
    return [leaf for leaf in _leaves(state) if isinstance(leaf, Tensor)]


def _gradients(scalar: Tensor, wanted: Sequence[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(scalar, wanted, allow_unused=True)
    return [
        torch.zeros_like(tensor) if gradient is None else gradient
        for tensor, gradient in zip(wanted, found, strict=True)
    ]


def _true_gradient(
    function: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor, subject: Subject
) -> float:
    """Hold autograd to a finite difference, along one random direction of x and all weights."""
    x = x.clone().requires_grad_()
    wanted = [x, *(p for p in module.parameters() if p.requires_grad)]
    y = function(x)
    weights = subject.draw(*y.shape)
    slopes = _gradients((y * weights).sum(), wanted)
    directions = [subject.draw(*tensor.shape) for tensor in wanted]
    along = sum(float((slope * d).sum()) for slope, d in zip(slopes, directions, strict=True))
    step, ends = 1e-6, []
    with torch.no_grad():
        for sign in (1, -2):  # to one side, then twice as far back to the other
            for tensor, direction in zip(wanted, directions, strict=True):
                tensor.add_(direction, alpha=sign * step)
            ends.append(float((function(x) * weights).sum()))
        for tensor, direction in zip(wanted, directions, strict=True):
            tensor.add_(direction, alpha=step)
    measured = (ends[0] - ends[1]) / (2 * step)
    # Along a random direction the slope is about as large as the whole gradient is long.
    scale = sum(float(slope.square().sum()) for slope in slopes) ** 0.5 or 1.0
    error = abs(along - measured) / scale
    if not error <= 1e-5:
        raise Violation(
            f"autograd gives the slope {along:.6g} along a random direction, a finite difference "
            f"{measured:.6g}: the backward pass must be the derivative of the forward pass"
        )
    return error


def _buffers_survive(module: nn.Module) -> None:
    """No number that a cast would round may live in a buffer (or a frozen parameter)."""
    kept = dict(module.named_buffers())
    kept |= {name: p for name, p in module.named_parameters() if not p.requires_grad}
    before = {name: tensor.detach().clone() for name, tensor in kept.items()}
    rounded = copy.deepcopy(module).bfloat16()
    after = dict(rounded.named_buffers()) | dict(rounded.named_parameters())
    for name, tensor in before.items():
        if not torch.equal(after[name].to(tensor.dtype), tensor):
            raise Violation(
                f"the buffer {name!r} changes under .bfloat16(): positions, decays and counters "
                "must not live in a float buffer (build them per call with block.constant), or "
                "must be listed in KeepsFloat32.float32_names"
            )


def _reload(module: nn.Module, fresh: nn.Module) -> nn.Module:
    """Save a module's weights, and load them into another that had different ones."""
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.add_(1.0)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return fresh


def _quiet_decoder(subject: Subject, dtype: torch.dtype = torch.float64) -> Decoder:
    """A small decoder with the subject in its slot, in every layer.

    The part is put into a finished decoder, since a class made in a function has no import path.
    """
    sizes = {"dim": 32, "heads": 4, "vocab_size": 29, "width": 48} | subject.sizes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(subject.seed)
        decoder = Decoder(depth=2, init_std=0.2, **sizes)
        if subject.slot == "embedding":
            decoder.embedding = subject.make()
        else:
            for block in decoder.blocks:
                setattr(block, subject.slot, subject.make())
        decoder.reset_parameters()
    return decoder.to(dtype)


def _checkpointing(subject: Subject) -> str:
    """Recomputing blocks in the backward pass changes neither loss nor gradients."""
    decoder = _quiet_decoder(subject).train()
    tokens = subject.tokens(2, 24, decoder.vocab_size)
    examples = torch.tensor([[5], [6]]).expand(2, 24)
    with torch.no_grad():
        state = decoder(tokens[:, :8], decoder.init_state(2), examples=examples[:, :8]).state
    rule = "activation checkpointing must change nothing: no hidden state, no in-place update"
    worst = 0.0
    for begin, incoming in ((0, None), (8, state)):
        runs = []
        for recompute in (False, True):
            decoder.activation_checkpointing = recompute
            incoming_too = interface.fork(incoming)
            output = decoder(tokens[:, begin:], incoming_too, examples=examples[:, begin:])
            extra = [value for name, value in output.aux.items() if name.startswith("loss/")]
            loss = output.logits.square().mean() + sum(extra, torch.zeros(()))
            weights = [p for p in decoder.parameters() if p.requires_grad]
            runs.append([loss, *_gradients(loss, weights)])
        for kept, recomputed in zip(*runs, strict=True):
            worst = max(worst, _same(recomputed, kept, VALUES[torch.float64], rule))
    return f"loss and gradients differ by at most {worst:.0e}, from an incoming state too"


# ---------------------------------------------------------------------------- mixers


def mixer_interface(subject: Subject) -> str:
    """Shapes, dtypes, state None for None, a state of tensors and ints with the batch first."""
    mixer = subject.make(torch.float32)
    x = subject.draw(BATCH, 7, subject.dim, dtype=torch.float32)
    context, _ = _context(x)
    with torch.no_grad():
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
            for leaf in _leaves(state):
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
            raise Violation(f"form {form!r} was asked for, {ran[0] if ran else 'none'!r} was run")
    try:
        mixer(x, None, context, "sideways")
    except ValueError:
        return "y as x; None for None; a plain state, batch first; the form asked for is run"
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
                    error = _same(_whole(mixer, x, form), want, VALUES[dtype], what)
                    worst[dtype] = max(worst.get(dtype, 0.0), error)
    return ", ".join(f"{str(d).removeprefix('torch.')} {error:.0e}" for d, error in worst.items())


def mixer_handoffs(subject: Subject) -> str:
    """A text cut anywhere, each piece in any form, gives what it gives whole."""
    mixer = subject.make()
    worst, pieces = 0.0, 0
    for time, gradients, roomy in (
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
                start = _start(mixer, x, capacity=time if roomy else None)
                got, _ = _walk(mixer, x, plan, start)
            what = f"pieces {plan} against the whole: the state must carry all of the past"
            worst = max(worst, _same(got, want, VALUES[torch.float64], what))
            pieces += len(plan)
    return f"{pieces} pieces, float64 {worst:.0e}"


def mixer_causal(subject: Subject) -> str:
    """Token t sees nothing after t: no gradient at all, and no change when the future changes."""
    mixer = subject.make()
    time = 12
    t = subject.random.randint(2, time - 3)
    for form in FORMS:
        x = subject.draw(2, time, subject.dim).requires_grad_()
        y = _whole(mixer, x, form)
        (gradient,) = _gradients(y[:, : t + 1].square().sum(), [x])
        _zero(gradient[:, t + 1 :], f"{form}: outputs to {t} see tokens after {t}")
        other = x.detach().clone()
        other[:, t + 1 :] = subject.draw(2, time - t - 1, subject.dim)
        with torch.no_grad():
            changed = _whole(mixer, other, form)
        what = f"{form}: outputs to {t} change with the tokens after {t}, which they must not see"
        _same(changed[:, : t + 1], y[:, : t + 1], VALUES[torch.float64], what)
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
        share = missing // max(sum(isinstance(entry, str) for entry in entries), 1)
        vectors, documents = [], []
        for entry in entries:
            if isinstance(entry, int):
                vectors.append(texts[entry][:, : sizes[entry]])
                documents += [entry] * sizes[entry]
            else:
                size = missing - share if entry == "rest" else share
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
    last = [2, 3, 3]  # the document each row stops in, which goes on below
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
            y, stand = _walk(mixer, x, plan, documents=documents)
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
                        worst = max(worst, _same(here, want, VALUES[torch.float64], what))
            behind = F.pad(tail, (0, 0, 3, 0), value=9.0)  # the next piece may be padded, too
            numbers = F.pad(torch.tensor(last)[:, None].expand(-1, 4), (3, 0), value=-1)
            y, _ = _walk(mixer, behind, [(5, plan[-1][1]), (2, "recurrent")], stand, numbers)
            y = y[:, 3:]
            for index, kind in enumerate(rows):
                want = alone[last[index]][0, sizes[last[index]] :]
                what = (
                    f"{kind}, {name}: a document that goes on in the next piece must find its "
                    "state as it left it; padding neither adds nor decays"
                )
                worst = max(worst, _same(y[index], want, VALUES[torch.float64], what))
    for form in FORMS:
        leaf = x.clone().requires_grad_()
        y = _whole(mixer, leaf, form, documents)
        (gradient,) = _gradients(y[2, documents[2] == 2].square().sum(), [leaf])
        _zero(gradient[2, documents[2] != 2], f"{form}: a document sees another, or padding")
    return f"left, right, packed and going on, float64 {worst:.0e}; sealed from each other"


def mixer_batch(subject: Subject) -> str:
    """A row of a batch gives what it gives alone."""
    mixer = subject.make()
    x = subject.draw(BATCH, 20, subject.dim).requires_grad_()
    worst = 0.0
    for form in FORMS:
        y = _whole(mixer, x, form)
        (gradient,) = _gradients(y[0].square().sum(), [x])
        _zero(gradient[1:], f"{form}: row 0 sees other rows")
        for row in range(BATCH):
            with torch.no_grad():
                alone = _whole(mixer, x[row : row + 1], form)
            what = f"{form}: row {row} alone against in a batch of {BATCH}"
            worst = max(worst, _same(alone, y[row : row + 1], VALUES[torch.float64], what))
    return f"float64 {worst:.0e}; gradient to other rows exactly 0"


def _owns_its_tensors(mixer: Mixer, x: Tensor) -> None:
    """A state may not be a small view of something large."""
    for form in FORMS:
        with torch.no_grad():
            _, stand = _walk(mixer, x, [(x.shape[1], form)])
        for tensor in _tensors(stand.state):
            held, own = tensor.untyped_storage().nbytes(), tensor.numel() * tensor.element_size()
            if held > 2 * own:
                raise Violation(
                    f"after {form} a tensor of the state, {own} bytes, is a view of {held}: it "
                    "keeps them all alive, and is saved with them; hand back a copy"
                )


def mixer_state(subject: Subject) -> str:
    """A state can be forked, reordered, saved, moved and cut off, and goes on as if nothing was."""
    mixer = subject.make()
    time, more = 11, 6
    x = subject.draw(BATCH, time + more, subject.dim)
    rest = x[:, time:]
    _owns_its_tensors(mixer, subject.draw(1, LONGEST, subject.dim))
    rows = torch.tensor([2, 0, 0, 1, 2])  # more rows than before, and other than heads

    def save(state: State) -> State:
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        return torch.load(file, weights_only=True)

    worst = 0.0
    for first, then in (("recurrent", "recurrent"), ("chunkwise", "parallel")):
        plan = [(2, then), (more - 2, "recurrent")]
        with torch.no_grad():
            _, stand = _walk(mixer, x[:, :time], [(time, first)])
            ways = {
                "forked": stand.map(interface.fork),
                "saved and loaded": stand.map(save),
                "moved": stand.map(lambda state: interface.to(interface.fork(state), "cpu")),
            }
            reordered = stand.map(lambda state: interface.reorder(state, rows))
            want = _whole(mixer, x)[:, time:]
            _walk(mixer, rest, plan, stand)  # consumes the state; its copies must not notice
            for name, copied in ways.items():
                got, _ = _walk(mixer, rest, plan, copied)
                what = f"a state {name} after {first}: goes on as the one it was made from"
                worst = max(worst, _same(got, want, VALUES[torch.float64], what))
            got, _ = _walk(mixer, rest[rows], plan, reordered)
            what = f"rows of a state reordered after {first}: every tensor has the batch first"
            worst = max(worst, _same(got, want[rows], VALUES[torch.float64], what))
        past = x[:, :time].clone().requires_grad_()
        _, stand = _walk(mixer, past, [(time, first)])
        cut, _ = _walk(mixer, rest, plan, stand.map(interface.detach))
        what = "a detached state goes on as the whole does"
        worst = max(worst, _same(cut, want, VALUES[torch.float64], what))
        _zero(_gradients(cut.sum(), [past])[0], "a detached state lets a gradient through")
    return f"fork, reorder, save, move, detach: float64 {worst:.0e}"


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
        want = dict(zip(wanted, _gradients(scalar, list(wanted.values())), strict=True))
        for name in named:
            if not want[name].abs().max():
                raise Violation(f"the parameter {name!r} gets no gradient: training leaves it be")
        cut = subject.random.randint(1, time - 1)
        plans = [[(time, form)] for form in ("parallel", "chunkwise")]
        plans += [[(cut, a), (time - cut, b)] for a in FORMS for b in FORMS]
        for plan in plans:
            y = _whole(mixer, x, plan[0][1]) if len(plan) == 1 else _walk(mixer, x, plan)[0]
            got = _gradients((y * weights).sum(), list(wanted.values()))
            for name, gradient in zip(wanted, got, strict=True):
                what = f"{dtype} gradient of {name}, pieces {plan}, against the recurrent form's"
                error = _same(gradient, want[name], GRADIENTS[dtype], what)
                found[dtype] = max(found.get(dtype, 0.0), error)
    mixer = subject.make()
    _true_gradient(lambda x: _whole(mixer, x), mixer, subject.draw(2, 6, subject.dim), subject)
    return ", ".join(f"{str(d).removeprefix('torch.')} {error:.0e}" for d, error in found.items())


def mixer_casts(subject: Subject) -> str:
    """Half precision rounds weights and activations, never positions, decays or sums over time."""
    module: Mixer = subject.make(torch.float32)
    _buffers_survive(module)
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
                worst = max(worst, _same(got, want, VALUES[dtype], what))
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
            worst = max(worst, _same(got, want, VALUES[torch.bfloat16], what))
    return f"bfloat16, float16 and autocast {worst:.0e}; sums over time stay float32"


def _sums_are_wide(mixer: Mixer, x: Tensor, when: str) -> None:
    """Sums over time must be float32 at least.

    A tensor of the state is such a sum if its shape stays as tokens come (a cache grows) and it
    still depends on the first of them (a window has forgotten it).
    """
    x = x.clone().requires_grad_()
    for form in FORMS:
        _, stand = _walk(mixer, x[:, :32], [(32, form)])
        shapes = [tensor.shape for tensor in _tensors(stand.state)]
        _, stand = _walk(mixer, x[:, 32:], [(x.shape[1] - 32, form)], stand)
        for tensor, shape in zip(_tensors(stand.state), shapes, strict=False):
            if not tensor.requires_grad or tensor.shape != shape:
                continue
            (gradient,) = _gradients(tensor.sum(), [x])
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
                found.append(_same(_whole(mixer, x, form), want, VALUES[dtype], what))
    return f"forms agree to {max(found):.0e}"


def mixer_repeats(subject: Subject) -> str:
    """The same seed and input give the same bits: nothing hidden, nothing random, no mode."""
    mixer, twin = subject.make(), subject.make()
    x, other = subject.draw(BATCH, 30, subject.dim), subject.draw(2, 9, subject.dim)
    with torch.no_grad():
        for form in (*FORMS, None):
            mixer.train()
            first = _whole(mixer, x, form)
            _whole(mixer, other, form)
            if not torch.equal(_whole(mixer, x, form), first):
                raise Violation(f"{form}: a second call gives other numbers: a module hides state")
            if not torch.equal(_whole(twin, x, form), first):
                raise Violation(f"{form}: a twin of the same seed gives other numbers")
            if not torch.equal(_whole(mixer.eval(), x, form), first):
                raise Violation(
                    f"{form}: eval() gives other numbers than train(): forms are chosen by facts, "
                    "and dropout belongs to the decoder"
                )
    return "bit for bit, in train() and eval()"


def mixer_save(subject: Subject) -> str:
    """Weights saved and loaded into a fresh instance give the same bits."""
    mixer = subject.make()
    fresh = cast(Mixer, _reload(mixer, subject.make()))
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
                with torch.no_grad():
                    y, _ = _walk(mixer, x, [(4, form), (5, form)], documents=documents)
            except (RuntimeError, NotImplementedError) as error:
                raise Violation(
                    f"{form} on the meta device: {_first_line(error)}: tensors are made on the "
                    "device of x, and no step asks the device for a number"
                ) from None
            if y.device.type != "meta":
                raise Violation(f"{form}: y is on {y.device}, x on {x.device}")
    return "built and run on the meta device"


def mixer_model(subject: Subject) -> str:
    """In a decoder: forms and hand-offs agree on logits, padding and packing included."""
    found: dict[torch.dtype, float] = {}
    for dtype in (torch.float64, torch.float32):
        decoder = _quiet_decoder(subject, dtype)
        tokens = subject.tokens(2, 40, decoder.vocab_size)
        documents = torch.tensor([[-1] * 6 + [0] * 34, [0] * 11 + [5] * 25 + [-1] * 4])
        valid = documents >= 0
        with torch.no_grad():
            for given in (None, documents):
                want = decoder(tokens, documents=given, form="recurrent").logits
                for form in ("parallel", "chunkwise", None):
                    state = decoder.init_state(2, capacity=40)
                    pieces = []
                    for begin, end in ((0, 13), (13, 14), (14, 40)):
                        here = None if given is None else given[:, begin:end]
                        output = decoder(tokens[:, begin:end], state, here, form=form)
                        state = output.state
                        pieces.append(output.logits)
                    whole = decoder(tokens, documents=given, form=form).logits
                    for how, got in (("whole", whole), ("in pieces", torch.cat(pieces, 1))):
                        what = f"logits {form} {how} against recurrent, {dtype}"
                        error = _same(got[valid], want[valid], MODEL_VALUES[dtype], what)
                        found[dtype] = max(found.get(dtype, 0.0), error)
    return ", ".join(f"{str(d).removeprefix('torch.')} {error:.0e}" for d, error in found.items())


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# ---------------------------------------------------------------------------- feed-forwards


def feed_forward_interface(subject: Subject) -> str:
    """Y has the shape and dtype of x; aux is a dict of tensors with known prefixes."""
    part = subject.make(torch.float32)
    x = subject.draw(BATCH, 7, subject.dim, dtype=torch.float32)
    y, aux = part(x, _context(x)[0])
    if y.shape != x.shape or y.dtype != x.dtype:
        raise Violation(f"{tuple(y.shape)} {y.dtype} from {tuple(x.shape)} {x.dtype}")
    for name, value in aux.items():
        if name.split("/")[0] not in ("loss", "metric", "sum", "pool") or "/" not in name:
            raise Violation(f"aux entry {name!r}: names begin with loss/, metric/, sum/ or pool/")
        if not isinstance(value, Tensor):
            raise Violation(f"aux entry {name!r} is a {type(value).__name__}, not a tensor")
        if not name.startswith(("sum/", "pool/")) and value.dim():
            raise Violation(f"aux entry {name!r} has shape {tuple(value.shape)}, must be a scalar")
        if not name.startswith(("loss/", "pool/")) and value.requires_grad:
            raise Violation(f"aux entry {name!r} carries a gradient: only loss/ and pool/ do")
    sums = {name: value for name, value in aux.items() if name.startswith("sum/")}
    part.after_step(sums)
    pools = {name: value for name, value in aux.items() if name.startswith("pool/")}
    for name in part.pooled_losses(pools):
        if name.split("/")[0] not in ("loss", "metric"):
            raise Violation(f"pooled_losses gives {name!r}: names begin with loss/ or metric/")
    return f"y as x; aux: {', '.join(aux) or 'empty'}"


def feed_forward_tokens(subject: Subject) -> str:
    """Each token alone: no other token, no other row, no padding reaches it or its counts."""
    part = subject.make()
    x = subject.draw(BATCH, 9, subject.dim).requires_grad_()
    y, _ = part(x, _context(x)[0])
    (gradient,) = _gradients(y[1, 4].square().sum(), [x])
    own = torch.zeros(BATCH, 9, dtype=torch.bool)
    own[1, 4] = True
    _zero(gradient[~own], "a token sees another token")
    with torch.no_grad():
        alone, _ = part(x[1:2, 4:5], _context(x[1:2, 4:5])[0])
        error = _same(alone[0, 0], y[1, 4], VALUES[torch.float64], "a token alone against among")
        documents = torch.full((BATCH, 9), -1)
        documents[:, 2:7] = 0
        padded, counts = part(x, _context(x, documents)[0])
        trimmed, want = part(x[:, 2:7], _context(x[:, 2:7])[0])
        what = "tokens beside padding against the same without"
        error = max(error, _same(padded[:, 2:7], trimmed, VALUES[torch.float64], what))
        for name, value in want.items():
            what = f"aux entry {name!r} with padding against without: padding is not counted"
            error = max(error, _same(counts[name], value, VALUES[torch.float64], what))
    return f"float64 {error:.0e}; gradient to other tokens exactly 0"


def feed_forward_gradients(subject: Subject) -> str:
    """Autograd gives the derivative."""
    part = subject.make()
    x = subject.draw(2, 6, subject.dim)
    context, _ = _context(x)
    error = _true_gradient(lambda x: part(x, context)[0], part, x, subject)
    return f"against a finite difference {error:.0e}"


def feed_forward_casts(subject: Subject) -> str:
    """Half precision rounds weights and activations, and nothing else."""
    _buffers_survive(subject.make(torch.float32))
    worst = 0.0
    for dtype in (torch.bfloat16, torch.float16):
        half = subject.make(torch.float32).to(dtype)
        full = copy.deepcopy(half).float()
        x = subject.draw(2, 50, subject.dim, dtype=dtype)
        with torch.no_grad():
            got, want = half(x, _context(x)[0])[0], full(x.float(), _context(x)[0])[0]
        if got.dtype != dtype:
            raise Violation(f"{dtype} in gives {got.dtype} out: y has the dtype of x")
        worst = max(worst, _same(got, want, VALUES[dtype], f"{dtype} against float32"))
    return f"bfloat16 and float16 {worst:.0e}"


def feed_forward_repeats(subject: Subject) -> str:
    """The same seed and input give the same bits, saved and loaded too."""
    part, twin = subject.make(), subject.make()
    fresh = _reload(part, subject.make())
    x = subject.draw(2, 9, subject.dim)
    context, _ = _context(x)
    with torch.no_grad():
        want = part(x, context)[0]
        for name, other in (("a second call", part), ("a twin", twin), ("a reloaded one", fresh)):
            if not torch.equal(other(x, context)[0], want):
                raise Violation(f"{name} gives other numbers")
    return "bit for bit"


# ---------------------------------------------------------------------------- routers


def router_interface(subject: Subject) -> str:
    """A `Routing` of batch * time tokens: shapes, ranges, float32 at least."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        router = subject.make(torch.float32).to(dtype)
        x = subject.draw(BATCH, 7, subject.dim, dtype=dtype)
        routing = router(x, _context(x)[0])
        tokens, experts = BATCH * 7, subject.sizes["experts"]
        k = routing.indices.shape[-1]
        for name, columns in (
            ("weights", k),
            ("indices", k),
            ("probabilities", experts),
            ("raw_logits", experts),
        ):
            value = getattr(routing, name)
            if value.shape != (tokens, columns):
                raise Violation(
                    f"{name} has shape {tuple(value.shape)}, must be {(tokens, columns)}"
                )
            wide = interface.at_least_float32(dtype)
            if name != "indices" and value.dtype != wide:
                raise Violation(f"{name} is {value.dtype} for {dtype} tokens, must be {wide}")
        if routing.x is not None and not (
            routing.x.dtype == dtype and torch.equal(routing.x, x.flatten(0, 1))
        ):
            raise Violation("x must be what the router was given, or None")
        if routing.indices.dtype != torch.int64:
            raise Violation(f"indices are {routing.indices.dtype}, must be int64")
        if not ((routing.indices >= 0) & (routing.indices < experts)).all():
            raise Violation("indices lie outside the experts")
        if (routing.indices.sort(-1).values.diff(dim=-1) == 0).any():
            raise Violation("a token chooses an expert twice")
        total = routing.probabilities.sum(-1)
        _same(total, torch.ones_like(total), 1e-5, "probabilities of a token must sum to 1")
    return f"{k} of {experts} experts a token, float32 at least"


def router_tokens(subject: Subject) -> str:
    """Each token alone."""
    router = subject.make().eval()
    x = subject.draw(BATCH, 9, subject.dim).requires_grad_()
    routing = router(x, _context(x)[0])
    (gradient,) = _gradients(routing.raw_logits[13].square().sum(), [x])
    own = torch.zeros(BATCH, 9, dtype=torch.bool)
    own[1, 4] = True
    _zero(gradient[~own], "a token's routing sees another token")
    with torch.no_grad():
        alone = router(x[1:2, 4:5], _context(x[1:2, 4:5])[0])
    error = _same(
        alone.weights[0], routing.weights[13], VALUES[torch.float64], "alone against among"
    )
    return f"float64 {error:.0e}"


def router_casts(subject: Subject) -> str:
    """A cast changes no buffer."""
    _buffers_survive(subject.make(torch.float32))
    return "no buffer changes"


# ---------------------------------------------------------------------------- embeddings


def embedding_interface(subject: Subject) -> str:
    """Vectors of the table's dtype; state None for None; weight is the table of words."""
    part = subject.make(torch.float32).eval()
    vocab_size = subject.sizes["vocab_size"]
    tokens = subject.tokens(BATCH, 7, vocab_size)
    context, _ = _context(tokens)
    x, state = part(tokens, None, context)
    if x.shape != (BATCH, 7, subject.dim) or x.dtype != torch.float32:
        raise Violation(f"x is {tuple(x.shape)} {x.dtype}, must be (batch, time, dim) of the table")
    if state is not None:
        raise Violation("state None must come back as None")
    if part.weight.shape != (vocab_size, subject.dim):
        raise Violation(f"weight has shape {tuple(part.weight.shape)}, must be (vocab_size, dim)")
    if not _gradients(x.sum(), [part.weight])[0].abs().max():
        raise Violation("no gradient reaches weight")
    _, state = part(tokens, part.init_state(BATCH), context)
    if state is None:
        raise Violation("a state goes in, so a state must come back")
    for leaf in _tensors(state):
        if leaf.shape[0] != BATCH:
            raise Violation(f"a state's tensor has shape {tuple(leaf.shape)}: the batch is axis 0")
    return "x of the table's dtype; None for None; weight is the table"


def embedding_pieces(subject: Subject) -> str:
    """Causal, row by row, the same in pieces, and each document as alone: bit for bit."""
    part = subject.make().eval()
    vocab_size = subject.sizes["vocab_size"]
    tokens = subject.tokens(BATCH, 40, vocab_size)

    def run(tokens: Tensor, ends: Sequence[int], documents: Tensor | None = None) -> Tensor:
        state, place = part.init_state(len(tokens)), interface.init_place(len(tokens))
        outputs = []
        for begin, end in itertools.pairwise([0, *ends]):
            piece = None if documents is None else documents[:, begin:end]
            context, place = _context(tokens[:, begin:end], piece, place)
            x, state = part(tokens[:, begin:end], state, context)
            state = interface.map_state(torch.clone, state)
            outputs.append(x)
        return torch.cat(outputs, dim=1)

    with torch.no_grad():
        whole = part(tokens, None, _context(tokens)[0])[0]
        cuts = sorted(subject.random.sample(range(1, 40), k=3))
        for name, got, want in (
            (f"in pieces that end at {cuts}", run(tokens, [*cuts, 40]), whole),
            ("token by token", run(tokens, range(1, 41)), whole),
            ("without its future", run(tokens[:, :20], [20]), whole[:, :20]),
            ("one row alone", run(tokens[1:2], [40]), whole[1:2]),
        ):
            if not torch.equal(got, want):
                raise Violation(f"{name} against the whole: {relative_error(got, want):.1e}")
        documents = torch.tensor([[-1] * 4 + [0] * 9 + [1] * 20 + [-1] * 7] * BATCH)
        for ends in ([40], [*cuts, 40]):
            packed = run(tokens, ends, documents)
            for begin, end in ((4, 13), (13, 33)):
                if not torch.equal(packed[:, begin:end], run(tokens[:, begin:end], [end - begin])):
                    raise Violation("a packed document must get what it gets alone")
    return "bit for bit"


def embedding_repeats(subject: Subject) -> str:
    """Saved and loaded, and called again, it gives the same bits; a cast rounds weights only."""
    _buffers_survive(subject.make(torch.float32))
    part = subject.make().eval()
    fresh = _reload(part, subject.make()).eval()
    tokens = subject.tokens(2, 9, subject.sizes["vocab_size"])
    context, _ = _context(tokens)
    with torch.no_grad():
        want = part(tokens, None, context)[0]
        for name, other in (("a second call", part), ("a reloaded one", fresh)):
            if not torch.equal(other(tokens, None, context)[0], want):
                raise Violation(f"{name} gives other numbers")
        half = part.bfloat16()(tokens, None, context)[0]
        error = _same(half, want, VALUES[torch.bfloat16], "bfloat16 against float64")
    return f"bit for bit; bfloat16 {error:.0e}"


# ---------------------------------------------------------------------------- positions


def rotary_interface(subject: Subject) -> str:
    """Shapes and dtypes stay; tokens, rows and heads are rotated each for itself."""
    part = subject.make()
    size = subject.sizes["head_dim"]
    positions = torch.arange(40).expand(BATCH, 40)
    q, k = subject.draw(BATCH, 40, 4, size), subject.draw(BATCH, 40, 2, size)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        turned = part(q.to(dtype), k.to(dtype), positions, positions)
        for got, given in zip(turned, (q, k), strict=True):
            if got.shape != given.shape or got.dtype != dtype:
                raise Violation(f"{tuple(got.shape)} {got.dtype} from {tuple(given.shape)} {dtype}")
    want_q, want_k = part(q, k, positions, positions)
    offset = positions.clone()
    offset[1] += 7
    q_at, k_at = part(q, k, positions.contiguous(), offset)
    piece = part(q[:, 9:10, 1:2], k[:, 9:10, 1:2], positions[:, 9:10], positions[:, 9:10])
    both_q, both_k = part.both(torch.cat([q, k], dim=2), 4, positions)
    worst = 0.0
    for what, got, want in (
        ("positions of one row expanded, and of all rows", q_at, want_q),
        ("q by `both` against `forward`", both_q, want_q),
        ("k by `both` against `forward`", both_k, want_k),
        ("rows at the same positions beside a row at others", k_at[::2], want_k[::2]),
        ("one token and head alone", piece[0], want_q[:, 9:10, 1:2]),
        ("one token and head alone", piece[1], want_k[:, 9:10, 1:2]),
    ):
        worst = max(worst, _same(got, want, VALUES[torch.float64], what))
    return f"float64 {worst:.0e}"


def rotary_precision(subject: Subject) -> str:
    """No cast reaches the positions: far out, half precision rounds q and k alone."""
    part = subject.make(torch.float32)
    _buffers_survive(part)
    furthest = getattr(part, "furthest", 65_535)  # xPos alone cannot count on: its keys grow
    positions = torch.tensor([[0, 1, 255, 256, 257, 2_047, 4_001, furthest]])
    size = subject.sizes["head_dim"]
    q = subject.draw(1, 8, 2, size, dtype=torch.bfloat16)
    want, _ = part(q.double(), q.double(), positions, positions)
    got, _ = part.bfloat16()(q, q, positions, positions)
    error = _same(got, want, VALUES[torch.bfloat16], f"bfloat16 against float64, to {furthest:,}")
    got, _ = part(q.float(), q.float(), positions, positions)
    what = f"float32 against float64, to position {furthest:,}"
    _same(got, want, VALUES[torch.float32], what)
    return f"bfloat16 {error:.0e} as far as position {furthest:,}"


def rotary_gradients(subject: Subject) -> str:
    """Autograd gives the derivative."""
    part = subject.make()
    positions = torch.arange(6).expand(2, 6)
    x = subject.draw(2, 6, 2, subject.sizes["head_dim"])
    error = _true_gradient(
        lambda x: torch.cat(part(x, 2 * x, positions, positions)), part, x, subject
    )
    return f"against a finite difference {error:.0e}"


def bias_interface(subject: Subject) -> str:
    """(batch or 1, heads, queries, keys); each pair of positions for itself; finite far out."""
    part = subject.make()
    heads = subject.sizes["heads"]
    keys = torch.arange(30).expand(BATCH, 30)
    whole = part(keys, keys)
    if whole.shape not in {(BATCH, heads, 30, 30), (1, heads, 30, 30)}:
        raise Violation(f"shape {tuple(whole.shape)}, must be (batch or 1, heads, queries, keys)")
    piece = part(keys[:, 20:23], keys[:, :23])
    causal = torch.ones(3, 23, dtype=torch.bool).tril(20)
    what = "a piece against the whole"
    error = _same(piece[..., causal], whole[:, :, 20:23, :23][..., causal], 1e-12, what)
    rows = keys.clone()
    rows[1] += 5
    apart = part(rows, rows).expand(BATCH, -1, -1, -1)
    causal = torch.ones(30, 30, dtype=torch.bool).tril()
    what = "rows at the same positions beside a row at others"
    want = whole.expand(BATCH, -1, -1, -1)
    error = max(error, _same(apart[::2][..., causal], want[::2][..., causal], 1e-12, what))
    far = torch.tensor([[65_535]])
    if not part(far, torch.tensor([[0, 65_535]])).isfinite().all():
        raise Violation("not finite at position 65,535")
    _buffers_survive(subject.make(torch.float32))
    return f"float64 {error:.0e}"


# ---------------------------------------------------------------------------- the contract

Check = Callable[[Subject], str]

#: The checks of each slot, by the name they are reported under.
CHECKS: dict[str, dict[str, Check]] = {
    "mixer": {
        "interface": mixer_interface,
        "forms equal": mixer_forms,
        "hand-offs": mixer_handoffs,
        "causal": mixer_causal,
        "documents": mixer_documents,
        "batch independence": mixer_batch,
        "state round trip": mixer_state,
        "gradients": mixer_gradients,
        "casts": mixer_casts,
        "32 heads": mixer_heads,
        "deterministic": mixer_repeats,
        "save and load": mixer_save,
        "devices": mixer_devices,
        "in a decoder": mixer_model,
        "activation checkpointing": _checkpointing,
    },
    "feed_forward": {
        "interface": feed_forward_interface,
        "each token alone": feed_forward_tokens,
        "gradients": feed_forward_gradients,
        "casts": feed_forward_casts,
        "deterministic, save and load": feed_forward_repeats,
        "activation checkpointing": _checkpointing,
    },
    "router": {
        "interface": router_interface,
        "each token alone": router_tokens,
        "casts": router_casts,
    },
    "embedding": {
        "interface": embedding_interface,
        "pieces and documents": embedding_pieces,
        "deterministic, save and load": embedding_repeats,
        "activation checkpointing": _checkpointing,
    },
    "rotary": {
        "interface": rotary_interface,
        "casts": rotary_precision,
        "gradients": rotary_gradients,
    },
    "bias": {"interface": bias_interface},
}


def run_check(part: Any, name: str, *, seed: int = 0, **arguments: Any) -> Finding:
    """One check of a part, by its name; each draws its own numbers from the seed."""
    subject = Subject(part, arguments, seed)
    try:
        return Finding(name, True, CHECKS[subject.slot][name](subject))
    except Violation as violation:
        return Finding(name, False, str(violation))
    except Exception as error:  # a stranger's class may raise anything, and that is a finding
        frame = error.__traceback__
        while frame and frame.tb_next:
            frame = frame.tb_next
        code = frame.tb_frame.f_code if frame else None
        where = (
            f" in {os.path.basename(code.co_filename)}:{frame.tb_lineno}" if code and frame else ""
        )
        return Finding(name, False, f"raised {type(error).__name__}{where}: {_first_line(error)}")


def examine(part: Any, *, seed: int = 0, **arguments: Any) -> Report:
    """All checks of a part, in order; nothing is printed or raised."""
    subject = Subject(part, arguments, seed)
    names = CHECKS[subject.slot]
    return Report(str(subject), [run_check(part, n, seed=seed, **arguments) for n in names])


def check(part: Any, *, seed: int = 0, show: bool = True, **arguments: Any) -> Report:
    """Hold a part to the interface: ``archzoo.check(MyMixer, kernel=3)``.

    Args:
        part: A class that inherits from one of the interface's (`Mixer`, `FeedForward`,
            `Router`, `Embedding`, `Rotary`, `Bias`), a partial of one, or its name.
        seed: Of weights, inputs, lengths and cuts.
        show: Print the findings as a table.
        **arguments: The part's own arguments, and sizes (dim, heads, ...) other than `SIZES`.

    Returns:
        The findings, one for each rule.

    Raises:
        ContractError: A rule is broken; the message names each, and by how much.
        ValueError: `part` is no part.
    """
    report = examine(part, seed=seed, **arguments)
    if show:
        report.show()
    if not report.passed:
        raise ContractError(report)
    return report


def check_command(path: str, *, init_args: dict[str, Any] | None = None, seed: int = 0) -> int:
    """Hold a class to the interface, rule by rule; exit status 1 if one is broken.

    Args:
        path: module.Class, which may live in a file of the current directory; or a part's name.
        init_args: The class's own arguments, and sizes (dim, heads, ...) other than the usual
            small ones: --init_args.heads 2.
        seed: Of weights, inputs, lengths and cuts.

    Raises:
        ValueError: No such class, or one that is no part.
    """
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    report = examine(path, seed=seed, **(init_args or {}))
    report.show()
    return 0 if report.passed else 1
