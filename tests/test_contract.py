"""Every part of the zoo keeps the interface's rules, and the rules can be broken.

The second half is as important as the first: each check is shown a part that breaks its rule and
nothing else, and must name it.
"""

import functools
import math

import pytest
import torch
from torch import nn

import archzoo
from archzoo import contract
from archzoo.block import Aux, Bias, Context, FeedForward, Mixer, Rotary, Router, Routing
from archzoo.contract.measure import expect_true_gradient
from archzoo.embeddings.token import TokenEmbedding
from archzoo.mixers.attention import Attention
from archzoo.mixers.retention import Retention
from archzoo.parts import SLOTS, list_parts
from archzoo.positions.rotary import NoRotation


class BiasedAttention(Attention):
    def __init__(self, dim, heads):
        super().__init__(dim, heads)
        self.bias = archzoo.FIRE(heads)


class UnrotatedAttention(Attention):
    def __init__(self, dim, heads):
        super().__init__(dim, heads)
        self.rotary = NoRotation(self.head_dim)


class UnrotatedRetention(Retention):
    def __init__(self, dim, heads):
        super().__init__(dim, heads)
        self.rotary = NoRotation(self.head_dim)


class RunningMean(Mixer):
    """As a newcomer writes one: __init__, init_state and step, nothing else."""

    def __init__(self, dim, heads):
        super().__init__()
        self.value = nn.Linear(dim, dim)
        self.output = nn.Linear(dim, dim)

    def init_state(self, batch_size, *, capacity=None, device=None, dtype=None):
        dtype = torch.promote_types(dtype or self.value.weight.dtype, torch.float32)
        total = torch.zeros((batch_size, 1, self.value.out_features), device=device, dtype=dtype)
        return {"total": total, "count": torch.zeros((batch_size, 1, 1), device=device)}

    def step(self, x, state, context):
        total = state["total"] + self.value(x)
        count = state["count"] + 1
        mean = (total / count).to(x.dtype)
        return self.output(torch.tanh(mean) * x), {"total": total, "count": count}


# Arguments that lead through other code than the defaults do.
VARIANTS = [
    (Retention, {"decay": "paper_lm"}),
    (Retention, {"decay": "learnable"}),
    (Retention, {"decay": 1.0}),
    (Retention, {"decay": 127 / 128}),
    (Retention, {"gate": False}),
    (Retention, {"head_norm": "group"}),
    (Retention, {"head_norm": "none"}),
    (Retention, {"value_factor": 1.0}),
    (Retention, {"chunk_size": 1}),
    (Retention, {"chunk_size": 7}),
    (Retention, {"chunk_size": 1000}),
    (UnrotatedRetention, {}),
    (Attention, {"kv_heads": 2}),
    (Attention, {"kv_heads": 1}),
    (BiasedAttention, {}),
    (UnrotatedAttention, {}),
    (RunningMean, {}),
    (archzoo.ShortConvolution, {"taps": 2, "activation": "silu"}),
    (archzoo.KERPLE, {"kind": "power"}),
    (archzoo.AbacusEmbedding, {"coupled": True, "operator_tokens": [1, 2]}),
    (archzoo.AbacusEmbedding, {"normalise": False, "max_shift": 0}),
    (archzoo.LearnedPositions, {"max_start": 9}),
    (archzoo.RandomisedPositions, {"embedding": "LearnedPositions"}),
    *[
        (part, {"activation": activation})
        for part in (archzoo.GatedFeedForward, archzoo.PlainFeedForward)
        for activation in ("silu", "gelu", "relu")
    ],
    (archzoo.RotaryEmbedding, {"base": 500.0}),
    (archzoo.RotaryEmbedding, {"rope_type": "ntk", "factor": 4.0, "partial_rotary_factor": 0.5}),
    (
        archzoo.RotaryEmbedding,
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    ),
]
OWN = [(part, {}) for part in {p: 0 for slot in SLOTS for p in list_parts(slot).values()}]
CASES = [
    pytest.param(part, arguments, name, id=f"{contract.Subject(part, arguments)}-{name}")
    for part, arguments in OWN + VARIANTS
    for name in contract.CHECKS[contract.Subject(part, arguments).slot]
]


@pytest.mark.parametrize(("part", "arguments", "name"), CASES)
def test_contract(part, arguments, name):
    finding = contract.run_check(part, name, **arguments)
    assert finding.passed, finding.detail


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
@pytest.mark.parametrize("part", [part for part, _ in OWN])
def test_contract_at_other_seeds(part, seed):
    archzoo.check(part, seed=seed)


def test_every_slot_has_checks():
    assert set(contract.CHECKS) == set(SLOTS) == set(contract.SIZES)


# ---------------------------------------------------------------------------- rules broken


class PeeksAhead(RunningMean):
    def parallel(self, x, state, context):
        y, state = super().parallel(x, state, context)
        return y + 1e-6 * x.mean(dim=1, keepdim=True), state


class PeeksAheadWithoutGradient(RunningMean):
    def forward(self, x, state, context, form=None):
        y, state = super().forward(x, state, context, form)
        return y + 1e-6 * x.detach().amax(dim=1, keepdim=True), state


class ForgetsItsState(RunningMean):
    def chunkwise(self, x, state, context):
        return super().chunkwise(x, None, context)


class DriftsInOneForm(RunningMean):
    def parallel(self, x, state, context):
        y, state = super().parallel(x, state, context)
        return y * (1 + 1e-9), state


class OffByOneAtHandOff(RunningMean):
    """Right whole, wrong on from a state."""

    def parallel(self, x, state, context):
        if state is not None and bool(state["count"][0] > 0):
            state = {"total": state["total"], "count": state["count"] + 1}
        return super().parallel(x, state, context)


class MixesRows(RunningMean):
    def step(self, x, state, context):
        y, state = super().step(x, state, context)
        return y - 1e-6 * y.mean(dim=0, keepdim=True), state


class TrustsPadding(RunningMean):
    """Says that it handles documents, and does not."""

    handles_documents = True


class DecaysAtRightPads(Retention):
    """The state keeps decaying where there is only padding."""

    def step(self, x, state, context):
        padding = ~context.valid[:, :, None, None]
        faded = state["memory"] * self.log_decay(x).exp()[:, None, None]
        y, after = super().step(x, {"memory": state["memory"].clone()}, context)
        return y, {"memory": torch.where(padding, faded, after["memory"])}


class KeepsItsSumInHalf(RunningMean):
    def init_state(self, batch_size, *, capacity=None, device=None, dtype=None):
        state = super().init_state(batch_size, device=device, dtype=dtype)
        dtype = dtype or self.value.weight.dtype
        return {"total": state["total"].to(dtype), "count": state["count"]}

    def step(self, x, state, context):
        y, after = super().step(x, state, context)
        return y, {"total": after["total"].to(x.dtype), "count": after["count"]}


class LosesItsSumUnderAutocast(RunningMean):
    """The update is a matrix product, which autocast rounds; nothing else changes."""

    def step(self, x, state, context):
        y, after = super().step(x, state, context)
        identity = torch.eye(x.shape[-1], dtype=after["total"].dtype, device=x.device)
        return y, {"total": after["total"] @ identity, "count": after["count"]}


class CastsItsPositions(Retention):
    def __init__(self, dim, heads):
        super().__init__(dim, heads)
        self.register_buffer("angles", torch.arange(4096.0), persistent=False)


class CountsInTheModule(RunningMean):
    calls = 0

    def step(self, x, state, context):
        self.calls += 1
        y, state = super().step(x, state, context)
        return y * (1 + 1e-3 * self.calls), state


class DropsByItself(RunningMean):
    def step(self, x, state, context):
        y, state = super().step(x, state, context)
        return nn.functional.dropout(y, 0.1, self.training), state


class HandsBackAState(RunningMean):
    def forward(self, x, state, context, form=None):
        state = self.init_state(x.shape[0], device=x.device, dtype=x.dtype)
        return super().forward(x, state, context, form)


class RunsAnotherForm(RunningMean):
    def forward(self, x, state, context, form=None):
        return super().forward(x, state, context, "chunkwise" if form == "parallel" else form)


class PutsHeadsFirst(RunningMean):
    """The batch is on axis 1."""

    def init_state(self, batch_size, **options):
        state = super().init_state(batch_size, **options)
        return {name: tensor.transpose(0, 1) for name, tensor in state.items()}

    def step(self, x, state, context):
        y, after = super().step(x, {n: t.transpose(0, 1) for n, t in state.items()}, context)
        return y, {name: tensor.transpose(0, 1) for name, tensor in after.items()}


class HandsBackAView(RunningMean):
    """As a sum over all tokens, of which the last entry is the state."""

    def parallel(self, x, state, context):
        y, after = super().parallel(x, state, context)
        if after is not None:
            sums = after["total"][:, None].repeat(1, x.shape[1], 1, 1)
            after = {"total": sums[:, -1], "count": after["count"]}
        return y, after


class KeepsAnObject(RunningMean):
    def init_state(self, batch_size, **options):
        return super().init_state(batch_size, **options) | {"name": Context}

    def step(self, x, state, context):
        y, after = super().step(x, state, context)
        return y, after | {"name": Context}


class CutsTheGradient(RunningMean):
    def step(self, x, state, context):
        return super().step(x, {"total": state["total"].detach(), "count": state["count"]}, context)


class CutsTheGradientInOneForm(RunningMean):
    def parallel(self, x, state, context):
        if state is not None:
            state = {"total": state["total"].detach(), "count": state["count"]}
        return super().parallel(x, state, context)


class WrongBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0]  # lacks the 2


class DerivesWrongly(RunningMean):
    def step(self, x, state, context):
        y, state = super().step(x, state, context)
        return WrongBackward.apply(y), state


class HasADeadWeight(RunningMean):
    def __init__(self, dim, heads):
        super().__init__(dim, heads)
        self.unused = nn.Parameter(torch.zeros(3))


class KnowsEightHeads(Retention):
    """Decay from a table made for few heads, in float32, where the rest come out as 1."""

    def __init__(self, dim, heads):
        if heads > 8:
            raise ValueError("no decay for head 8")
        super().__init__(dim, heads)


class RoundsDecayInOneForm(Retention):
    def parallel(self, x, state, context):
        kept = self.fixed_log_decay
        rates = 1 - 2.0 ** (-5.0 - torch.arange(self.heads, dtype=torch.float32))
        self.fixed_log_decay = tuple(rates.log().tolist())
        try:
            return super().parallel(x, state, context)
        finally:
            self.fixed_log_decay = kept


class HidesAWeight(RunningMean):
    """A weight that no state_dict knows of."""

    made = 0

    def __init__(self, dim, heads):
        super().__init__(dim, heads)
        type(self).made += 1
        self.scale = 1 + 0.1 * self.made

    def step(self, x, state, context):
        y, state = super().step(x, state, context)
        return y * self.scale, state


class MakesItsMaskOnTheHost(RunningMean):
    def step(self, x, state, context):
        y, state = super().step(x, state, context)
        return y * torch.ones(y.shape, dtype=y.dtype, device="cpu"), state


class AsksTheDevice(RunningMean):
    def step(self, x, state, context):
        if state["count"].max().item() > 1e6:
            raise ValueError("too long")
        return super().step(x, state, context)


class AddsInPlace(RunningMean):
    """Writes into the state behind autograd's back: twice, when a block is recomputed."""

    def step(self, x, state, context):
        state["count"].data.add_(1)
        total = state["total"] + self.value(x)
        mean = (total / state["count"]).to(x.dtype)
        return self.output(torch.tanh(mean) * x), {"total": total, "count": state["count"]}


class ForgetsToReturn(RunningMean):
    def step(self, x, state, context):
        super().step(x, state, context)


class FixesNothing(Attention):
    def fixed_state(self, state):
        return dict(state)


class MovesAtEveryStep(Attention):
    """Its fixed state grows."""

    def step(self, x, state, context):
        if not isinstance(state["length"], torch.Tensor):
            return super().step(x, state, context)
        y, after = super().step(x, self.copy_state(state, spare=1), context)
        return y, super().fixed_state(after)


BROKEN_MIXERS = [
    (PeeksAhead, "causal", "see tokens after"),
    (PeeksAheadWithoutGradient, "causal", "change with the tokens after"),
    (ForgetsItsState, "hand-offs", "the state must carry"),
    (DriftsInOneForm, "forms equal", "form parallel"),
    (OffByOneAtHandOff, "hand-offs", "the state must carry"),
    (MixesRows, "batch independence", "row 0 sees other rows"),
    (TrustsPadding, "documents", "left padding"),
    (DecaysAtRightPads, "documents", "neither adds nor decays"),
    (KeepsItsSumInHalf, "casts", "at least float32"),
    (LosesItsSumUnderAutocast, "casts", "autocast"),
    (CastsItsPositions, "casts", "'angles'"),
    (CountsInTheModule, "deterministic", "hides state"),
    (DropsByItself, "deterministic", "other numbers"),
    (HandsBackAState, "interface", "must come back as None"),
    (RunsAnotherForm, "interface", "'parallel' was given, 'chunkwise' was run"),
    (PutsHeadsFirst, "interface", "axis 0"),
    (HandsBackAView, "state round trip", "is a view of"),
    (FixesNothing, "fixed state", "nothing changes"),
    (MovesAtEveryStep, "fixed state", "nothing changes"),
    (KeepsAnObject, "interface", "only tensors"),
    (CutsTheGradient, "gradients", "slope"),
    (CutsTheGradientInOneForm, "gradients", "gradient of"),
    (DerivesWrongly, "gradients", "finite difference"),
    (HasADeadWeight, "gradients", "'unused' gets no gradient"),
    (KnowsEightHeads, "32 heads", "no decay for head 8"),
    (RoundsDecayInOneForm, "32 heads", "float64"),
    (HidesAWeight, "save and load", "fresh instance"),
    (MakesItsMaskOnTheHost, "devices", "meta"),
    (AsksTheDevice, "devices", "meta"),
    (AddsInPlace, "activation checkpointing", "must change nothing"),
    (ForgetsToReturn, "forms equal", "TypeError"),
]


@pytest.mark.parametrize(("part", "name", "words"), BROKEN_MIXERS)
def test_a_broken_rule_is_caught_by_its_check(part, name, words):
    finding = contract.run_check(part, name)
    assert not finding.passed
    assert words in finding.detail


def test_a_state_that_does_not_follow_its_rows_is_caught():
    class KeepsRowsInTheModule(RunningMean):
        """Part of the state stays behind in the module when the state is reordered."""

        hidden = None

        def init_state(self, batch_size, **options):
            self.hidden = None
            return super().init_state(batch_size, **options)

        def step(self, x, state, context):
            y, after = super().step(x, state, context)
            last = self.hidden if self.hidden is not None else torch.zeros_like(x)
            self.hidden = x
            rows = min(len(last), len(x))
            return y + 0.1 * last[:rows].repeat(-(-len(x) // rows), 1, 1)[: len(x)], after

    finding = contract.run_check(KeepsRowsInTheModule, "state round trip")
    assert not finding.passed


class SeesNeighbours(archzoo.GatedFeedForward):
    def forward(self, x, context):
        y, aux = super().forward(x, context)
        return y + 1e-6 * x.roll(1, dims=1), aux


class CountsPadding(archzoo.GatedFeedForward):
    def forward(self, x, context):
        y, _ = super().forward(x, context)
        return y, Aux(sums={"tokens": torch.tensor(float(x.shape[0] * x.shape[1]))})


class NamesItsAuxFreely(archzoo.GatedFeedForward):
    def forward(self, x, context):
        return super().forward(x, context)[0], {"balance": x.mean()}


class KeepsARunningMean(archzoo.GatedFeedForward):
    def __init__(self, dim, width):
        super().__init__(dim, width)
        self.register_buffer("coefficient", torch.tensor(1 / 3))


class SeesWordsToCome(TokenEmbedding):
    def forward(self, tokens, state, context):
        x, state = super().forward(tokens, state, context)
        return x + 1e-6 * x.flip(1), state


class CountsAcrossDocuments(TokenEmbedding):
    def forward(self, tokens, state, context):
        x, state = super().forward(tokens, state, context)
        return x + torch.arange(tokens.shape[1])[:, None], state


class RoundsItsAngles(Rotary):
    def __init__(self, head_dim):
        super().__init__()
        self.register_buffer("frequency", torch.tensor(0.37), persistent=False)

    def forward(self, q, k, query_positions, key_positions):
        angle = (query_positions * self.frequency)[..., None, None]
        return q * angle.cos().to(q.dtype), k * angle.cos().to(k.dtype)


class RoundsWherePositionsAreFar(Rotary):
    def __init__(self, head_dim):
        super().__init__()

    def forward(self, q, k, query_positions, key_positions):
        angle = (query_positions.to(q.dtype) * 0.37)[..., None, None]
        return q * angle.cos(), k * angle.cos()


class RotatesTogetherOtherwise(archzoo.RotaryEmbedding):
    def both(self, qk, heads, positions):
        return super().both(qk, heads - 1, positions)


class BiasesByIndex(Bias):
    """By the index in the segment instead of the position."""

    def __init__(self, heads):
        super().__init__()
        self.heads = heads

    def forward(self, query_positions, key_positions):
        queries, keys = query_positions.shape[1], key_positions.shape[1]
        distance = torch.arange(queries)[:, None] - torch.arange(keys)
        return -distance.double().expand(1, self.heads, queries, keys)


class TopTwo(Router):
    def __init__(self, dim, experts, top_k):
        super().__init__()
        self.top_k = top_k
        self.scores = nn.Linear(dim, experts, bias=False)

    def forward(self, x, context):
        x = x.flatten(0, 1)
        wide = torch.promote_types(x.dtype, torch.float32)
        logits = nn.functional.linear(x.to(wide), self.scores.weight.to(wide))
        probabilities = logits.softmax(-1)
        weights, indices = probabilities.topk(self.top_k)
        return Routing(weights, indices, probabilities, logits)


class RoutesInHalf(TopTwo):
    def forward(self, x, context):
        routing = super().forward(x, context)
        return routing._replace(weights=routing.weights.to(x.dtype))


class HandsOutAnotherX(TopTwo):
    def forward(self, x, context):
        return super().forward(x, context)._replace(x=2 * x.flatten(0, 1))


class RoutesTwiceToOne(TopTwo):
    def forward(self, x, context):
        routing = super().forward(x, context)
        return routing._replace(indices=routing.indices[:, :1].expand(-1, 2))


class MovesByCounts(TopTwo):
    """A bias of the choice that follows the load, as a router of one's own may have it."""

    def __init__(self, dim, experts, top_k):
        super().__init__(dim, experts, top_k)
        self.register_buffer("load", torch.zeros(experts, dtype=torch.int64))

    def forward(self, x, context):
        routing = super().forward(x, context)
        indices = (routing.probabilities - 1e-3 * self.load).topk(self.top_k).indices
        return routing._replace(weights=routing.probabilities.gather(1, indices), indices=indices)

    def after_step(self, sums):
        self.load += sums["assignments"]


class MovesOutsideItsBuffers(MovesByCounts):
    def __init__(self, dim, experts, top_k):
        super().__init__(dim, experts, top_k)
        self.register_buffer("load", self.load, persistent=False)


class MovesAWeight(TopTwo):
    def after_step(self, sums):
        self.scores.weight.data *= 2


class WritesIntoSums(TopTwo):
    def after_step(self, sums):
        sums["assignments"] -= 1


class MovesWhatACastRounds(MovesByCounts):
    def __init__(self, dim, experts, top_k):
        super().__init__(dim, experts, top_k)
        self.register_buffer("load", torch.zeros(experts))


@pytest.mark.parametrize(
    ("part", "name", "words"),
    [
        (MovesOutsideItsBuffers, "after a step", "what moves is a buffer"),
        (MovesAWeight, "after a step", "moves the weight 'scores.weight'"),
        (WritesIntoSums, "after a step", "writes into sums"),
        (MovesWhatACastRounds, "after a step", "'load' changes under .bfloat16()"),
        (SeesNeighbours, "each token alone", "another token"),
        (CountsPadding, "each token alone", "padding is not counted"),
        (NamesItsAuxFreely, "interface", "'balance'"),
        (KeepsARunningMean, "casts", "'coefficient'"),
        (SeesWordsToCome, "segments and documents", "against the whole"),
        (CountsAcrossDocuments, "segments and documents", "in segments"),
        (RoundsItsAngles, "casts", "'frequency'"),
        (RoundsWherePositionsAreFar, "casts", "65,535"),
        (RotatesTogetherOtherwise, "interface", "by `both`"),
        (BiasesByIndex, "interface", "a slice against the whole"),
        (HandsOutAnotherX, "interface", "x must be what the router was given"),
        (RoutesInHalf, "interface", "weights is torch.bfloat16"),
        (RoutesTwiceToOne, "interface", "twice"),
    ],
)
def test_a_broken_rule_of_another_slot_is_caught(part, name, words):
    finding = contract.run_check(part, name)
    assert not finding.passed
    assert words in finding.detail


@pytest.mark.parametrize("part", [TopTwo, MovesByCounts])
def test_a_router_that_keeps_the_rules_passes(part):
    assert archzoo.check(part, show=False).passed


def test_a_mixture_tells_any_router_of_its_steps():
    mixture = archzoo.MixtureOfExperts(16, 8, experts=4, router=MovesByCounts)
    mixture.after_step({"assignments": torch.tensor([3, 0, 1, 2])})
    assert mixture.router.load.tolist() == [3, 0, 1, 2]


def test_what_routers_share_is_no_router():
    with pytest.raises(ValueError, match=r"TopKRouter is the interface alone: .*LinearRouter"):
        archzoo.MixtureOfExperts(16, 8, router=archzoo.TopKRouter)


# ---------------------------------------------------------------------------- check itself


def test_check_returns_findings_by_name():
    report = archzoo.check(RunningMean, show=False)
    assert report.passed
    assert [finding.name for finding in report] == list(contract.CHECKS["mixer"])
    assert all(finding.detail for finding in report)


def test_check_raises_and_names_every_broken_rule():
    with pytest.raises(contract.ContractError, match="PeeksAhead breaks") as caught:
        archzoo.check(PeeksAhead, show=False)
    broken = {finding.name for finding in caught.value.report.failures}
    assert {"causal", "forms equal"} <= broken
    assert "save and load" not in broken
    assert all(name in str(caught.value) for name in broken)


def test_check_takes_a_name_a_partial_and_plain_data(capsys):
    archzoo.check("NoRotation")
    shown = capsys.readouterr().out
    assert "NoRotation against the interface" in shown and "holds" in shown
    for part in (
        functools.partial(archzoo.RotaryEmbedding, base=100.0),
        {"class_path": "RotaryEmbedding", "init_args": {"base": 100.0}},
        "archzoo.positions.rotary.RotaryEmbedding",
    ):
        assert archzoo.check(part, show=False).subject.startswith("RotaryEmbedding")


def test_check_takes_sizes():
    subject = contract.Subject(Retention, {"dim": 64, "heads": 2, "decay": 1.0})
    assert subject.sizes == {"dim": 64, "heads": 2}
    assert subject.make().head_dim == 32
    assert str(subject) == "Retention(decay=1.0)"


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("Retentoin", "nearest: Retention"),
        ("archzoo.mixers.retention.Retenshun", "nearest: Retention"),
        ("no_such_module.Mixer", "cannot be imported"),
        (nn.Linear, "must be a class that inherits"),
        (42, "must be a class that inherits"),
    ],
)
def test_check_refuses_what_is_no_part(part, words):
    with pytest.raises(ValueError, match=words):
        archzoo.check(part)


def test_check_command_reads_a_file_of_the_current_directory(tmp_path, monkeypatch, capsys):
    source = """
import archzoo, torch
class Gate(archzoo.FeedForward):
    def __init__(self, dim, width, *, power=1.0, leak=0.0):
        super().__init__()
        self.power, self.leak = power, leak
    def forward(self, x, context):
        return torch.sigmoid(self.power * x) * x + self.leak * x.mean(1, keepdim=True), {}
"""
    (tmp_path / "strangers_parts.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [p for p in __import__("sys").path if p])
    assert contract.check_command("strangers_parts.Gate", init_args={"power": 2.0}) == 0
    assert "Gate(power=2.0)" in capsys.readouterr().out
    assert contract.check_command("strangers_parts.Gate", init_args={"leak": 1e-6}) == 1
    assert "BROKEN" in capsys.readouterr().out


def test_a_slope_must_hold_for_any_scale():
    """The yardstick of the finite difference is not fooled by a large gradient beside a small."""
    subject = contract.Subject(archzoo.PlainFeedForward, {"activation": "gelu"})
    part = subject.make()
    x = subject.draw(2, 6, subject.dim)
    expect_true_gradient(lambda x: 1e6 * part(x, None)[0], part, x, subject)
    with pytest.raises(contract.Violation):
        expect_true_gradient(
            lambda x: WrongBackward.apply(1e-6 * part(x, None)[0]), part, x, subject
        )
    assert math.isinf(contract.relative_error(torch.tensor([math.nan]), torch.ones(1)))


class NeedsMore(RunningMean):
    def __init__(self, dim, heads, decay):
        super().__init__(dim, heads)


class ReturnsATensor(FeedForward):
    def __init__(self, dim, width):
        super().__init__()

    def forward(self, x, context):
        return x


class DoublesItsWidth(ReturnsATensor):
    def forward(self, x, context):
        return torch.cat([x, x], -1), {}


class ReturnsNoState(RunningMean):
    def step(self, x, state, context):
        return super().step(x, state, context)[0], None


class StepsToATensor(RunningMean):
    def step(self, x, state, context):
        return super().step(x, state, context)[0]


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (ReturnsATensor, "forward returns a Tensor: it must return y and an Aux"),
        (DoublesItsWidth, "y has the shape and dtype of x"),
        (ReturnsNoState, "step returns y and None: it must return y and the state"),
        (StepsToATensor, "step returns a Tensor: it must return y and the state"),
    ],
)
def test_what_a_part_must_return_is_said(part, words):
    finding = contract.run_check(part, "interface")
    assert not finding.passed and words in finding.detail


def test_a_class_that_cannot_be_built_is_one_finding():
    (finding,) = contract.examine(NeedsMore)
    assert not finding.passed
    assert "argument: 'decay'" in finding.detail
    assert "the decoder calls NeedsMore(dim, heads)" in finding.detail


def test_feed_forward_base_class_names_what_is_missing():
    class Empty(FeedForward):
        def __init__(self, dim, width):
            super().__init__()

    finding = contract.run_check(Empty, "interface")
    assert not finding.passed and "NotImplementedError" in finding.detail
