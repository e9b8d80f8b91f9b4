"""What is checked of adapters and of Linears: in small decoders of every kind of part."""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from archzoo.adapters import KINDS, Adapter
from archzoo.adapters.attach import (
    adapter_modules,
    collapse_adapters,
    list_targets,
    merge_adapters,
    remove_adapters,
    start_adapters,
)
from archzoo.adapters.switch import disable_adapters
from archzoo.block import FORMS
from archzoo.checkpoint import from_pretrained, save_pretrained
from archzoo.contract.measure import (
    Violation,
    by_dtype,
    expect_live_weights,
    expect_same,
    expect_zero,
    gradients_of,
    reloaded,
)
from archzoo.contract.subject import BATCH, Subject
from archzoo.decay import decaying
from archzoo.decoder import Decoder
from archzoo.linear import Linear
from archzoo.numerics import MODEL_TOLERANCES, TOLERANCES

MIXTURE = {
    "class_path": "MixtureOfExperts",
    "init_args": {
        "experts": 8,
        "router": {"class_path": "AttentionRouter", "init_args": {"bias_rate": 0.01}},
        "balance": "switch",
        "adaptive": True,
        "coefficient": 0.1,
        "capacity_factor": 1.0,
    },
}

SIZES: dict[str, Any] = {
    "vocab_size": 29,
    "dim": 32,
    "depth": 2,
    "heads": 4,
    "width": 48,
    "init_std": 0.2,
}
#: Decoders that hold every kind of target between them.
MODELS: dict[str, dict[str, Any]] = {
    "Attention": {"mixer": "Attention"},
    "Retention": {"mixer": "Retention"},
    "FilteredAttention and experts": {"mixer": "FilteredAttention", "feed_forward": MIXTURE},
}
#: What an adapter of each kind is put on where its own targets are not given.
TARGETS = {
    "linear": [r"blocks\.\d+\.(mixer|feed_forward)\.\w+\.\w+", "head"],  # some have biases
    "router": [r".*\.router\.projection\.router_\w+"],
    "experts": [r".*\.experts\.\w+\.(gate|up|down)"],
    "input": ["input"],
    "state": ["state"],
}
DOCUMENTS = torch.tensor([[-1] * 4 + [0] * 16, [0] * 7 + [1] * 9 + [-1] * 4, [0] * 20])


def targets_of(cls: type[Adapter], model: str) -> list[str]:
    """Every target of a model that the class says it can change."""
    kinds = list(cls.kinds)
    if "linear" in kinds and cls.says("delta") and cls.takes_routers:
        kinds.append("router")  # type: ignore[arg-type]
    if "experts" not in model:
        kinds = [kind for kind in kinds if kind not in ("experts", "router")]
    return [pattern for kind in kinds for pattern in TARGETS[kind]]


def adapted(
    subject: Subject, model: str, dtype: torch.dtype = torch.float64, **arguments: Any
) -> tuple[Decoder, Decoder]:
    """A small decoder with the subject on all that it can change, and the same without.

    Args:
        subject: The adapter.
        model: Name of a preset.
        dtype: Of both decoders.
        **arguments: Of the adapter, beside the subject's own.
    """
    options = dict(subject.arguments) | arguments
    options.setdefault("targets", targets_of(subject.part, model))
    made = []
    for adapter in (functools.partial(subject.part, **options), None):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(subject.seed)
            decoder = Decoder(**SIZES, **MODELS[model], adapter=adapter).to(dtype).eval()
            torch.manual_seed(subject.seed)  # an adapter has drawn numbers of its own
            for module in decoder.blocks.modules():
                if isinstance(module, Linear) and module.bias is not None:
                    torch.nn.init.normal_(module.bias, std=0.2)  # at 0 they would hide a mistake
            start_adapters(decoder)  # from the weights in this dtype
            made.append(decoder)
    return made[0], made[1]


def models_of(subject: Subject) -> Iterator[str]:
    """The models that hold something the subject can change."""
    found = False
    for model in MODELS:
        if targets_of(subject.part, model):
            found = True
            yield model
    if not found:
        raise Violation(f"kinds {subject.part.kinds} are not among {', '.join(KINDS)}")


def moved(subject: Subject, decoder: Decoder, by: float = 0.1) -> Decoder:
    """The decoder with its adapters a little off where they start, as training would move them.

    Args:
        subject: Whose generator draws the moves.
        decoder: With adapters, which are changed in place.
        by: Standard deviation of the moves.
    """
    with torch.no_grad():
        for _, adapter in adapter_modules(decoder):
            for parameter in adapter.parameters():
                parameter.add_(by * subject.draw(*parameter.shape, dtype=parameter.dtype))
    return decoder


def logits_of(decoder: Decoder, tokens: Tensor, **options: Any) -> Tensor:
    """Without gradients, as decoding computes them.

    Args:
        decoder: Any.
        tokens: (batch, time).
        **options: Of the call.
    """
    with torch.no_grad():
        logits: Tensor = decoder(tokens, **options).logits
    return logits


def in_each_form(decoder: Decoder, tokens: Tensor, documents: Tensor | None) -> dict[str, Tensor]:
    """Logits in every form, in segments, and as decoding holds weights.

    Args:
        decoder: Any.
        tokens: (batch, 20).
        documents: (batch, 20) or None.
    """
    found = {form: logits_of(decoder, tokens, documents=documents, form=form) for form in FORMS}
    state, segments = decoder.init_state(len(tokens), capacity=20), []
    for begin, end in ((0, 9), (9, 10), (10, 20)):
        here = None if documents is None else documents[:, begin:end]
        with torch.no_grad():
            output = decoder(tokens[:, begin:end], state, here)
        state = output.state
        segments.append(output.logits)
    found["in segments"] = torch.cat(segments, 1)
    with decoder.weights_held():
        found["with weights held"] = logits_of(decoder, tokens, documents=documents)
    return found


# ---------------------------------------------------------------------------- adapters


def adapter_interface(subject: Subject) -> str:
    """It declares known kinds and has their methods; what it does not declare is refused."""
    cls = subject.part
    unknown = [kind for kind in cls.kinds if kind not in KINDS]
    if unknown or not cls.kinds:
        raise Violation(f"kinds {cls.kinds!r} must name some of {', '.join(KINDS)}")
    for model in models_of(subject):
        decoder, _ = adapted(subject, model)
        if not list(adapter_modules(decoder)):
            raise Violation(f"nothing of {model} is adapted")
    for kind in KINDS:
        if kind in cls.kinds:
            continue
        try:
            adapted(subject, "FilteredAttention and experts", targets=TARGETS[kind])
        except ValueError as error:
            if cls.__name__ not in str(error):
                raise Violation(f"{kind} is refused without naming the class: {error}") from None
        else:
            raise Violation(f"the kind {kind!r} is not declared, and still adapted")
    return f"changes {', '.join(cls.kinds)}; the others are refused"


def adapter_start(subject: Subject) -> str:
    """Where `identity_at_start` is declared, nothing changes before training."""
    if not subject.part.identity_at_start:
        return "not declared"
    worst = 0.0
    for model in models_of(subject):
        decoder, base = adapted(subject, model)
        tokens = subject.tokens(BATCH, 20, decoder.vocab_size)
        got, want = (logits_of(net, tokens, documents=DOCUMENTS) for net in (decoder, base))
        what = f"{model}: adapted at the start against the base (identity_at_start is declared)"
        worst = max(worst, expect_same(got, want, TOLERANCES[torch.float64], what))
    return f"float64 {worst:.0e}"


def adapter_gradients(subject: Subject) -> str:
    """Gradients reach all of the adapter and nothing else; a step moves nothing of the base."""
    count = 0
    for model in models_of(subject):
        decoder, base = adapted(subject, model)
        moved(subject, decoder).train()
        tokens = subject.tokens(BATCH, 20, decoder.vocab_size)
        output = decoder(tokens, documents=DOCUMENTS)
        loss = output.logits.square().mean()
        loss = loss + sum((v for aux in output.aux for v in aux.losses.values()), torch.zeros(()))
        learned = {id(p) for _, adapter in adapter_modules(decoder) for p in adapter.parameters()}
        for name, parameter in decoder.named_parameters():
            if parameter.requires_grad != (id(parameter) in learned):
                which = "is frozen" if id(parameter) in learned else "of the base learns"
                raise Violation(f"{model}: the parameter {name!r} {which}")
        expect_live_weights(decoder, loss)
        loss.backward()
        logits_of(decoder.eval(), tokens)
        learn = [p for p in decoder.parameters() if p.requires_grad]
        torch.optim.AdamW(learn, lr=0.1, fused=True).step()  # which no tensor's version counts
        decoder.after_step([aux.sums for aux in output.aux])
        fresh = decoder(tokens).logits  # with gradients
        what = f"{model}: logits after a step, without gradients against with them"
        expect_same(logits_of(decoder, tokens), fresh, TOLERANCES[torch.float64], what)
        after = decoder.state_dict()
        for name, tensor in base.state_dict().items():
            if not torch.equal(after[name], tensor):
                raise Violation(f"{model}: training the adapter changes {name!r} of the base")
        count += len(learned)
    return f"{count} parameters learn, the base stays bit for bit"


def adapter_frozen(subject: Subject) -> str:
    """Steps of an optimizer leave all of the base bit for bit, buffers too, switched off as well.

    Buffers are experts' biases and balancing coefficients, which steps move beside the optimizer.
    """
    steps = 3
    for model in models_of(subject):
        decoder, base = adapted(subject, model)
        tokens = subject.tokens(BATCH, 20, decoder.vocab_size)
        with disable_adapters(decoder):  # a start may not move the base either
            off = logits_of(decoder, tokens, documents=DOCUMENTS)
        if not torch.equal(off, logits_of(base, tokens, documents=DOCUMENTS)):
            raise Violation(f"{model}: switched off, it does not compute what the base computes")
        moved(subject, decoder).train()
        learn = [p for p in decoder.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(learn, lr=0.01, weight_decay=0.1)
        for _ in range(steps):
            output = decoder(tokens, documents=DOCUMENTS)
            losses = [value for aux in output.aux for value in aux.losses.values()]
            (output.logits.square().mean() + sum(losses, torch.zeros(()))).backward()
            optimizer.step()
            optimizer.zero_grad()
            decoder.after_step([aux.sums for aux in output.aux])
        after = decoder.state_dict()
        for name, tensor in base.state_dict().items():
            if not torch.equal(after[name], tensor):
                raise Violation(f"{model}: {steps} steps of training change {name!r} of the base")
        decoder.eval()
        want = logits_of(base, tokens, documents=DOCUMENTS)
        with disable_adapters(decoder):
            off = logits_of(decoder, tokens, documents=DOCUMENTS)
        if not torch.equal(off, want):
            raise Violation(f"{model}: switched off after training, it is not the base")
        if torch.equal(logits_of(decoder, tokens, documents=DOCUMENTS), want):
            raise Violation(f"{model}: switched on again, it computes what the base computes")
    return f"{steps} steps, bit for bit; switched off, too"


def adapter_decay(subject: Subject) -> str:
    """What decays is neutral at 0: decay alone does not move an adapter from where it starts.

    Of what precedes a text, prompts and states, nothing decays: no number of theirs is neutral.
    """
    names: set[str] = set()
    for model in models_of(subject):
        decoder, base = adapted(subject, model)
        ids = {id(parameter) for parameter in decaying(decoder)}
        precedes = {"input", "state"}.intersection(subject.part.kinds)
        shrunk = False
        for path, adapter in adapter_modules(decoder):
            for name, parameter in adapter.named_parameters():
                if id(parameter) not in ids:
                    continue
                if precedes:
                    raise Violation(
                        f"{model}: {name!r} of {path} decays, and a prompt or a state is not "
                        "neutral at 0: say decays = False"
                    )
                names.add(name)
                shrunk = True
                with torch.no_grad():
                    parameter.mul_(0.5)
        if not (shrunk and subject.part.identity_at_start):
            continue
        tokens = subject.tokens(BATCH, 20, decoder.vocab_size)
        got, want = (logits_of(net, tokens, documents=DOCUMENTS) for net in (decoder, base))
        what = f"{model}: weight decay alone of {', '.join(sorted(names))} (or say decays = False)"
        expect_same(got, want, TOLERANCES[torch.float64], what)
    return f"decays: {', '.join(sorted(names)) or 'nothing'}"


def adapter_forms(subject: Subject) -> str:
    """The adapted model is one function: forms, segments, padding and packing agree."""
    worst: dict[torch.dtype, float] = {}
    for model in models_of(subject):
        for dtype in (torch.float64, torch.float32):
            decoder, _ = adapted(subject, model, dtype)
            moved(subject, decoder)
            tokens = subject.tokens(BATCH, 20, decoder.vocab_size)
            for documents in (None, DOCUMENTS)[dtype is torch.float32 :]:
                valid = torch.ones_like(DOCUMENTS, dtype=torch.bool)
                valid = valid if documents is None else documents >= 0
                found = in_each_form(decoder, tokens, documents)
                found["whole"] = logits_of(decoder, tokens, documents=documents)
                found["with gradients"] = decoder(tokens, documents=documents).logits
                want = found.pop("recurrent")
                for how, got in found.items():
                    what = f"{model}, logits {how} against recurrent, {dtype}"
                    error = expect_same(got[valid], want[valid], MODEL_TOLERANCES[dtype], what)
                    worst[dtype] = max(worst.get(dtype, 0.0), error)
    return by_dtype(worst)


def adapter_blocks(subject: Subject) -> str:
    """On a named block of a fused matrix it changes that block's rows, and no other's."""
    if "linear" not in subject.part.kinds:
        return "it changes no Linear"
    for name, path in (("key", "mixer.query_key_value"), ("up", "feed_forward.gate_up")):
        decoder, _ = adapted(subject, "Attention", targets=[name])
        moved(subject, decoder)
        linear: Any = decoder.blocks[0].get_submodule(path)
        x = subject.draw(5, 32)
        with torch.no_grad():
            y, changed = linear.product(x), linear(x)
            own = linear.rows(name)
            change = (changed - y).abs()
            # A block's rows by themselves may be summed in another order than among all.
            rounding = TOLERANCES[torch.float64] * y.abs().max()
            if change[:, own].max() <= rounding:
                raise Violation(f"targets=[{name!r}] changes nothing of the rows of {name}")
            change[:, own] = 0
            if change.max() > rounding:
                raise Violation(f"targets=[{name!r}] changes rows of other blocks")
            parts = torch.cat([linear.part(x, block) for block in linear.blocks], dim=-1)
            expect_same(parts, changed, TOLERANCES[torch.float64], "block by block against all")
    only, _ = adapted(subject, "Attention", targets=["key"], layers=[1])
    if {int(path.split(".")[1]) for path, _ in adapter_modules(only)} != {1}:
        raise Violation("layers=[1] adapts other layers")
    return "its rows alone, its layers alone"


def adapter_merged(subject: Subject) -> str:
    """Merged it computes in all forms what it computed beside the weights; else it is refused."""
    cls, worst = subject.part, 0.0
    for model in models_of(subject):
        decoder, base = adapted(subject, model)
        moved(subject, decoder)
        if not cls.mergeable:
            try:
                merge_adapters(decoder)
            except ValueError as error:
                if cls.__name__ not in str(error):
                    raise Violation(f"merging is refused without its name: {error}") from None
                continue
            raise Violation("it is not declared mergeable, and still merged")
        tokens = subject.tokens(BATCH, 20, decoder.vocab_size)
        beside = in_each_form(decoder, tokens, DOCUMENTS)
        merged = in_each_form(merge_adapters(decoder), tokens, DOCUMENTS)
        valid = DOCUMENTS >= 0
        for how, want in beside.items():
            what = f"{model}: merged against beside the weights, {how}"
            found = merged[how][valid]
            worst = max(worst, expect_same(found, want[valid], TOLERANCES[torch.float64], what))
        if decoder.state_dict().keys() != base.state_dict().keys():
            raise Violation(f"{model}: merged, it still holds parameters of the adapter")
        try:
            merge_adapters(decoder)
        except ValueError:
            continue
        raise Violation(f"{model}: it can be merged twice")
    return f"float64 {worst:.0e}" if cls.mergeable else "not declared, and refused by name"


def adapter_saved(subject: Subject) -> str:
    """Saved and loaded bit for bit, stale weights never read, removed without a trace."""
    for model in models_of(subject):
        decoder, base = adapted(subject, model)
        tokens = subject.tokens(BATCH, 20, decoder.vocab_size)
        before = logits_of(decoder, tokens)
        moved(subject, decoder)
        want = logits_of(decoder, tokens)
        if torch.equal(before, want):
            raise Violation(f"{model}: its parameters have changed, and the logits have not")
        fresh, _ = adapted(subject, model)
        if not torch.equal(logits_of(reloaded(decoder, fresh), tokens), want):
            raise Violation(f"{model}: loaded, it gives other logits")
        with tempfile.TemporaryDirectory() as directory:
            save_pretrained(Path(directory) / "model", decoder)
            loaded, _ = from_pretrained(Path(directory) / "model")
            if not torch.equal(logits_of(loaded.eval(), tokens), want):
                raise Violation(f"{model}: save_pretrained and back, it gives other logits")
        if not torch.equal(logits_of(remove_adapters(decoder), tokens), logits_of(base, tokens)):
            raise Violation(f"{model}: after removing it the base has changed")
    return "bit for bit"


def adapter_copied(subject: Subject) -> str:
    """A copy computes the same, and shares nothing with what it was copied from.

    Parameters that modules share are held once in a state, and shared in the copy, too.
    """
    for model in models_of(subject):
        decoder, _ = adapted(subject, model)
        moved(subject, decoder)
        tokens = subject.tokens(BATCH, 20, decoder.vocab_size)
        want = logits_of(decoder, tokens)
        copied = copy.deepcopy(decoder)
        if not torch.equal(logits_of(copied, tokens), want):
            raise Violation(f"{model}: a copy gives other logits")
        moved(subject, copied)
        if not torch.equal(logits_of(decoder, tokens), want):
            raise Violation(f"{model}: training a copy changes what it was copied from")
        fresh = reloaded(copied, adapted(subject, model)[0])
        if not torch.equal(logits_of(copied, tokens), logits_of(fresh, tokens)):
            raise Violation(f"{model}: a copy still reads parameters of what it was copied from")
        held = [tensor.data_ptr() for tensor in decoder.state_dict().values() if tensor.numel()]
        if len(set(held)) < len(held):
            raise Violation(f"{model}: its state holds a tensor twice: share by Adapter.refer")
        # Wider and back, as float32 checkpoints are read into models of other dtypes.
        again = logits_of(copied.float().double(), tokens)
        narrow = logits_of(copy.deepcopy(fresh).float().double(), tokens)
        if not torch.equal(again, narrow):
            raise Violation(f"{model}: a cast reaches other parameters of a copy")
    return "bit for bit, and apart"


def adapter_collapsed(subject: Subject) -> str:
    """Without what only training needs it computes the same; saved and loaded, too."""
    worst, less = 0.0, 0
    if not subject.part.says("collapse"):
        return "nothing to throw away"
    for model in models_of(subject):
        decoder, _ = adapted(subject, model)
        moved(subject, decoder)
        tokens = subject.tokens(BATCH, 20, decoder.vocab_size)
        want, count = logits_of(decoder, tokens), decoder.parameter_count()
        got = logits_of(collapse_adapters(decoder), tokens)
        what = f"{model}: collapsed against before"
        worst = max(worst, expect_same(got, want, TOLERANCES[torch.float64], what))
        less = max(less, count - decoder.parameter_count())
        with tempfile.TemporaryDirectory() as directory:
            save_pretrained(Path(directory) / "model", decoder)
            loaded, _ = from_pretrained(Path(directory) / "model")
            if not torch.equal(logits_of(loaded.eval(), tokens), got):
                raise Violation(f"{model}: collapsed, saved and loaded, it gives other logits")
    return f"{less:,} parameters less, float64 {worst:.0e}" if less else "nothing to throw away"


def adapter_casts(subject: Subject) -> str:
    """In half precision the adapted model loses no more than twice what its base does.

    Of the tokens' errors the median counts: a head norm can magnify the rounding of a single one.
    """
    worst = 0.0
    for model in models_of(subject):
        if "experts" in model:
            continue  # rounding changes what a router chooses
        decoder, base = adapted(subject, model, torch.float32)
        moved(subject, decoder, 0.01)  # or the model would be one of larger weights
        tokens = subject.tokens(BATCH, 20, decoder.vocab_size)
        errors: list[float] = []
        for net in (base, decoder):
            got = logits_of(net.bfloat16(), tokens)
            if got.dtype != torch.bfloat16:
                raise Violation(f"{model}: a bfloat16 model gives {got.dtype}")
            if not got.isfinite().all():
                raise Violation(f"{model}: in bfloat16 its logits are not finite")
            want = logits_of(net.float(), tokens)
            each = (got.float() - want).norm(dim=-1) / want.norm(dim=-1)
            errors.append(each.median().item())
        if errors[1] > 2 * errors[0]:
            raise Violation(
                f"{model}: bfloat16 against float32 {errors[1]:.1e} in the median over tokens, "
                f"where the base has {errors[0]:.1e}, and twice that is allowed"
            )
        worst = max(worst, errors[1] / errors[0])
    return f"bfloat16 {worst:.1f} times the base's error"


# ---------------------------------------------------------------------------- Linears


def linear_interface(subject: Subject) -> str:
    """Shapes, dtypes, blocks one by one as all at once, a stack, and the weight that is read."""
    blocks = {"first": 12, "second": 20}
    for dtype in (torch.float64, torch.float32):
        part = subject.part(32, blocks, **subject.arguments).to(dtype)
        x = subject.draw(3, 5, 32, dtype=dtype)
        y = part(x)
        if y.shape != (3, 5, 32) or y.dtype != dtype:
            raise Violation(f"{tuple(y.shape)} {y.dtype} from (3, 5, 32) {dtype}: rows are 32")
        if part.dtype != dtype:
            raise Violation(f"dtype says {part.dtype} of a {dtype} Linear")
        separate = torch.cat([part.part(x, "first"), part.part(x, "second")], dim=-1)
        expect_same(separate, y, TOLERANCES[dtype], "block by block against all at once")
    if part.effective_weight().shape != (32, 32):
        raise Violation(f"effective_weight has shape {tuple(part.effective_weight().shape)}")
    stack = subject.part(32, blocks, stack=4, **subject.arguments)
    if stack.effective_weight().shape != (4, 32, 32):
        raise Violation("effective_weight of a stack of 4 is not (4, rows, columns)")
    return "whole, by blocks, stacked"


def linear_gradients(subject: Subject) -> str:
    """Every weight gets a gradient, and each row sees its own x alone."""
    part = subject.part(32, {"first": 12, "second": 20}, bias=True, **subject.arguments).double()
    x = subject.draw(4, 32).requires_grad_()
    y = part(x)
    expect_live_weights(part, y.square().sum())
    (slope,) = gradients_of(y[1].square().sum(), [x])
    slope[1] = 0
    expect_zero(slope, "a row sees another row")
    return "every weight has one"


def linear_model(subject: Subject) -> str:
    """In a decoder, in every Linear of its blocks: forms agree, and it saves and loads."""
    worst = 0.0
    for model in MODELS:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(subject.seed)
            linear = functools.partial(subject.part, **subject.arguments)
            decoder = Decoder(**SIZES, **MODELS[model], linear=linear).double().eval()
        holds = [m for m in decoder.blocks.modules() if isinstance(m, Linear)]
        if not any(isinstance(module, subject.part) for module in holds):
            raise Violation(f"{model}: no Linear is built as one")
        tokens = subject.tokens(BATCH, 20, decoder.vocab_size)
        want = logits_of(decoder, tokens, documents=DOCUMENTS, form="recurrent")
        got = logits_of(decoder, tokens, documents=DOCUMENTS)
        valid = DOCUMENTS >= 0
        what = f"{model}: logits against the recurrent form's"
        worst = max(worst, expect_same(got[valid], want[valid], TOLERANCES[torch.float64], what))
        with tempfile.TemporaryDirectory() as directory:
            save_pretrained(Path(directory) / "model", decoder)
            loaded, _ = from_pretrained(Path(directory) / "model")
        again = logits_of(loaded.double().eval(), tokens, documents=DOCUMENTS)
        if not torch.equal(again, got):
            raise Violation(f"{model}: saved and loaded, it gives other logits")
        if not list_targets(decoder):
            raise Violation(f"{model}: adapters find nothing to change")
    return f"float64 {worst:.0e}"
