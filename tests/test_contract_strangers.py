"""`archzoo check` against parts that strangers write: correct in unusual ways, or subtly broken.

The correct ones must pass every check, and each broken one must fail one of those named beside it.
"""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import archzoo
from archzoo import contract
from archzoo.block import (
    Aux,
    Bias,
    Embedding,
    FeedForward,
    Mixer,
    Rotary,
    Router,
    Routing,
    constant,
)
from archzoo.parts import SLOTS

# ---------------------------------------------------------------------------- mixers that are right


class Stranger(Mixer):
    """What the mixers below share: a projection in and one out."""

    def __init__(self, dim, heads):
        super().__init__()
        self.dim, self.heads = dim, heads
        self.value, self.output = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def zeros(self, batch_size, *shape, device, dtype):
        dtype = torch.promote_types(dtype or self.value.weight.dtype, torch.float32)
        return torch.zeros((batch_size, *shape), device=device, dtype=dtype)


class LinearAttention(Stranger):
    """A numerator and a denominator, which share the keys' computation."""

    def __init__(self, dim, heads):
        super().__init__(dim, heads)
        self.query, self.key = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def init_state(self, batch_size, *, capacity=None, device=None, dtype=None):
        size = (self.heads, self.dim // self.heads)
        return {
            "numerator": self.zeros(batch_size, *size, size[1], device=device, dtype=dtype),
            "denominator": self.zeros(batch_size, *size, device=device, dtype=dtype),
        }

    def step(self, x, state, context):
        wide = state["numerator"].dtype
        with torch.autocast(x.device.type, enabled=False):
            q, k, v = (
                F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))
                .view(len(x), self.heads, -1)
                .to(wide)
                for layer in (self.query, self.key, self.value)
            )
            q, k = F.elu(q) + 1, F.elu(k) + 1
            numerator = state["numerator"] + k[..., :, None] * v[..., None, :]
            denominator = state["denominator"] + k
            y = (q[..., None, :] @ numerator)[..., 0, :] / (q * denominator).sum(-1, keepdim=True)
        y = self.output(y.flatten(1)[:, None].to(x.dtype))
        return y, {"numerator": numerator, "denominator": denominator}


class ConvolutionAndMemory(Stranger):
    """A short convolution before a decaying memory, with nested lists in the state."""

    def __init__(self, dim, heads):
        super().__init__(dim, heads)
        self.taps = nn.Parameter(torch.randn(3, dim))

    def init_state(self, batch_size, *, capacity=None, device=None, dtype=None):
        last = torch.zeros((batch_size, self.dim), device=device, dtype=dtype or self.taps.dtype)
        return {
            "window": [last, last.clone()],
            "memory": self.zeros(batch_size, self.dim, device=device, dtype=dtype),
            "nothing": None,
        }

    def step(self, x, state, context):
        older, old = state["window"]
        now = self.value(x)[:, 0].to(x.dtype)
        mixed = self.taps[0] * now + self.taps[1] * old + self.taps[2] * older
        memory = 0.9 * state["memory"] + mixed
        y = self.output(torch.tanh(memory).to(x.dtype))[:, None]
        return y.to(x.dtype), {"window": [old, now], "memory": memory, "nothing": None}


class ComplexRecurrence(Stranger):
    """A diagonal recurrence in complex numbers, as linear recurrent units have it."""

    def __init__(self, dim, heads):
        super().__init__(dim, heads)
        self.rate, self.angle = nn.Parameter(torch.rand(dim)), nn.Parameter(torch.rand(dim))

    def init_state(self, batch_size, *, capacity=None, device=None, dtype=None):
        memory = self.zeros(batch_size, self.dim, device=device, dtype=dtype)
        return {"memory": torch.complex(memory, memory)}

    def step(self, x, state, context):
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        turn = torch.polar((-self.rate.to(wide).exp()).exp(), self.angle.to(wide))
        memory = state["memory"] * turn + self.value(x)[:, 0].to(wide)
        return self.output(torch.tanh(memory.real).to(x.dtype))[:, None], {"memory": memory}


class NoWeights(Mixer):
    """The mean of all tokens so far, and nothing to learn; heads and state are of no use to it."""

    def __init__(self, dim, heads):
        super().__init__()
        self.dim = dim

    def init_state(self, batch_size, *, capacity=None, device=None, dtype=None):
        wide = torch.promote_types(dtype or torch.float32, torch.float32)
        return [
            torch.zeros((batch_size, 1, self.dim), device=device, dtype=wide),
            torch.zeros((batch_size, 1, 1), device=device, dtype=torch.int64),
        ]

    def step(self, x, state, context):
        total, count = state[0] + x, state[1] + 1
        return (total / count).to(x.dtype), [total, count]


class Window(Bias):
    """Nothing further away than 7 tokens is seen."""

    def __init__(self, heads):
        super().__init__()
        self.heads = heads

    def forward(self, query_positions, key_positions):
        far = query_positions[:, :, None] - key_positions[:, None] >= 7
        return -1e4 * far[:, None].float().expand(-1, self.heads, -1, -1)


class SlidingWindow(archzoo.Attention):
    """What goes out of the window is forgotten, and nothing is rotated."""

    def __init__(self, dim, heads):
        super().__init__(dim, heads)
        self.rotary, self.bias = archzoo.NoRotation(self.head_dim), Window(heads)


# ---------------------------------------------------------------------------- mixers that are not


class RemembersNothing(Stranger):
    def init_state(self, batch_size, *, capacity=None, device=None, dtype=None):
        return {}

    def step(self, x, state, context):
        return self.output(torch.tanh(self.value(x))), {}


class KeepsButDoesNotRead(ConvolutionAndMemory):
    def step(self, x, state, context):
        _, state = super().step(x, state, context)
        return self.output(torch.tanh(self.value(x))), state


class HasATable(ConvolutionAndMemory):
    """Of 512 positions, behind which it reads the last."""

    def step(self, x, state, context):
        y, state = super().step(x, state, context)
        if context.positions.device.type == "cpu" and int(context.positions.max()) >= 512:
            raise IndexError("position out of the table")
        return y, state


class ComputesInSingle(ConvolutionAndMemory):
    def forward(self, x, state, context, form=None):
        y, state = super().forward(x, state, context, form)
        return y.float() if x.dtype == torch.float64 else y, state


class KeepsAnInferenceTensor(NoWeights):
    """What it makes once is made in whatever mode the first call is."""

    def __init__(self, dim, heads):
        super().__init__(dim, heads)
        self.kept = None

    def step(self, x, state, context):
        y, state = super().step(x, state, context)
        if self.kept is None and x.device.type == "cpu":
            self.kept = torch.full((self.dim,), 2.0, dtype=torch.float64)
        return (y * 2.0 if self.kept is None else (y * self.kept)).to(x.dtype), state


class FirstDocumentForAll(archzoo.Attention):
    """A mask from the first row alone."""

    def mask(self, q, k, context, key_positions, key_documents):
        if key_documents is not None:
            key_documents = key_documents[:1].expand_as(key_documents)
            documents = context.documents[:1].expand_as(context.documents)
            context = context._replace(documents=documents)
        return super().mask(q, k, context, key_positions, key_documents)


class WritesIntoItsInput(NoWeights):
    def step(self, x, state, context):
        y, state = super().step(x, state, context)
        if not torch.is_grad_enabled():
            x.mul_(0.5)
        return y, state


class SharesItsState(NoWeights):
    """The total goes out as the state and as the output's memory."""

    def step(self, x, state, context):
        total, count = state
        if torch.is_grad_enabled():
            total = total + x
        else:
            total = total.add_(x)
        return (total / (count + 1)).to(x.dtype), [total[:1].expand_as(total), count + 1]


class ReadsTheCapacity(NoWeights):
    def init_state(self, batch_size, *, capacity=None, device=None, dtype=None):
        state = super().init_state(batch_size, capacity=capacity, device=device, dtype=dtype)
        return [*state, capacity or 10_000]

    def step(self, x, state, context):
        *state, capacity = state
        y, state = super().step(x, state, context)
        return y * (1 + 1 / capacity), [*state, capacity]


class DividesByTheBatch(NoWeights):
    def step(self, x, state, context):
        y, state = super().step(x, state, context)
        return y / len(x), state


# ---------------------------------------------------------------------------- feed-forwards


class Feed(FeedForward):
    def __init__(self, dim, width):
        super().__init__()
        self.up, self.down = nn.Linear(dim, width), nn.Linear(width, dim)

    def forward(self, x, context):
        return self.down(torch.tanh(self.up(x))), {}


class Identity(FeedForward):
    def __init__(self, dim, width):
        super().__init__()

    def forward(self, x, context):
        return x, {}


class CountsTokens(Feed):
    def forward(self, x, context):
        y, _ = super().forward(x, context)
        valid = context.valid
        mean = (y.detach().abs().mean(-1) * valid).sum() / valid.sum()
        loss = 0.1 * (y.square().mean(-1) * valid).sum() / valid.sum()
        return y, Aux({"size": loss}, {"size": mean}, {"tokens": valid.sum()})


class KnowsItsPlace(Feed):
    """Scales by the position, and a token alone has another: given the same, it is the same."""

    def forward(self, x, context):
        y, aux = super().forward(x, context)
        return y * (1 + 0 * context.positions[..., None].to(y.dtype)), aux


class FeedDeadWeight(Feed):
    def __init__(self, dim, width):
        super().__init__(dim, width)
        self.unused = nn.Parameter(torch.zeros(3))


class FeedsInSingle(Feed):
    def forward(self, x, context):
        y, aux = super().forward(x, context)
        return y.float() if x.dtype == torch.float64 else y, aux


class FeedsInPlace(Feed):
    def forward(self, x, context):
        y, aux = super().forward(x, context)
        with torch.no_grad():
            x.clamp_(-1, 1)
        return y, aux


class LosesNan(Feed):
    def forward(self, x, context):
        y, _ = super().forward(x, context)
        return y, Aux({"entropy": (y - y).sum() / (y - y).sum().detach()})


class NormalisesOverTheBatch(Feed):
    def forward(self, x, context):
        y, aux = super().forward(x, context)
        return y / y.detach().abs().amax((0, 1)), aux


class DropsOut(Feed):
    def forward(self, x, context):
        y, aux = super().forward(x, context)
        return F.dropout(y, 0.1), aux


class DetachesHalf(Feed):
    def forward(self, x, context):
        return self.down(torch.tanh(self.up(x.detach()))), {}


# ---------------------------------------------------------------------------- routers


class HashRouter(Router):
    """Nothing learned: by the signs of a token's numbers."""

    def __init__(self, dim, experts, top_k):
        super().__init__()
        self.experts, self.top_k = experts, top_k

    def forward(self, x, context):
        x = x.flatten(0, 1)
        wide = torch.promote_types(x.dtype, torch.float32)
        first = (x > 0).sum(-1, keepdim=True)
        indices = (first + torch.arange(self.top_k, device=x.device)) % self.experts
        even = torch.full((len(x), self.experts), 1 / self.experts, device=x.device, dtype=wide)
        weights = torch.full_like(even[:, : self.top_k], 1 / self.top_k)
        return Routing(weights, indices, even, torch.zeros_like(even))


class SoftRouter(Router):
    """A learned one, whose order of experts is not sorted by weight."""

    def __init__(self, dim, experts, top_k):
        super().__init__()
        self.top_k = top_k
        self.scores = nn.Linear(dim, experts)

    def forward(self, x, context):
        x = x.flatten(0, 1)
        wide = torch.promote_types(x.dtype, torch.float32)
        scores = self.scores
        logits = F.linear(x.to(wide), scores.weight.to(wide), scores.bias.to(wide))
        probabilities = logits.softmax(-1)
        indices = logits.topk(self.top_k).indices.flip(-1)
        return Routing(probabilities.gather(1, indices), indices, probabilities, logits)


class NoisyRouter(SoftRouter):
    """Noise on the weights in training, as some mixtures explore."""

    def forward(self, x, context):
        routing = super().forward(x, context)
        noise = 0.1 * torch.rand_like(routing.weights) * self.training
        return routing._replace(weights=routing.weights * (1 + noise))


class TakesNoNumber(SoftRouter):
    def __init__(self, dim, experts):
        super().__init__(dim, experts, 2)


class AlwaysTwo(SoftRouter):
    def __init__(self, dim, experts, top_k):
        super().__init__(dim, experts, 2)


class BalancesTheBatch(SoftRouter):
    """Weights that depend on what the others chose."""

    def forward(self, x, context):
        routing = super().forward(x, context)
        load = torch.zeros_like(routing.probabilities[0]).index_add(
            0, routing.indices.flatten(), torch.ones_like(routing.weights.flatten())
        )
        return routing._replace(weights=routing.weights / load[routing.indices])


class ChoosesByTheBatch(SoftRouter):
    def forward(self, x, context):
        routing = super().forward(x, context)
        order = torch.arange(len(routing.indices), device=x.device)[:, None]
        indices = (routing.indices + order) % routing.probabilities.shape[1]
        return routing._replace(indices=indices)


class NeverLearns(SoftRouter):
    def forward(self, x, context):
        routing = super().forward(x, context)
        return routing._replace(
            weights=routing.weights.detach(), probabilities=routing.probabilities.detach()
        )


class RoutesAtRandom(SoftRouter):
    def forward(self, x, context):
        routing = super().forward(x, context)
        return routing._replace(
            weights=routing.weights * (1 + 1e-9 * torch.rand((), dtype=torch.float64))
        )


class RoutesToNan(SoftRouter):
    def forward(self, x, context):
        routing = super().forward(x, context)
        return routing._replace(weights=routing.weights / 0)


# ---------------------------------------------------------------------------- embeddings


class Words(Embedding):
    def __init__(self, vocab_size, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(vocab_size, dim))

    def forward(self, tokens, state, context):
        return F.embedding(tokens, self.weight), state


class ScaledWords(Words):
    """Scaled as Gemma's, and normalised as BLOOM's are."""

    def __init__(self, vocab_size, dim):
        super().__init__(vocab_size, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, tokens, state, context):
        x, state = super().forward(tokens, state, context)
        return self.norm(x) * math.sqrt(x.shape[-1]), state


class WordPairs(Words):
    """A word and the word before it in its document, which the state carries."""

    def init_state(self, batch_size, *, capacity=None, device=None, dtype=None):
        return {"last": torch.zeros(batch_size, dtype=torch.int64, device=device)}

    def forward(self, tokens, state, context):
        last = tokens.new_zeros(len(tokens)) if state is None else state["last"]
        seen = torch.where(context.valid, torch.arange(tokens.shape[1]) + 1, 0).cummax(1).values
        known = torch.cat([last[:, None], tokens], 1)
        before = known.gather(1, F.pad(seen[:, :-1], (1, 0)))
        x = F.embedding(tokens, self.weight)
        pair = F.embedding(before, self.weight) * ~context.starts[..., None]
        if state is not None:
            state = {"last": known.gather(1, seen[:, -1:])[:, 0]}
        return x + 0.5 * pair, state


class DrawsFromAGenerator(Words):
    def forward(self, tokens, state, context):
        x, state = super().forward(tokens, state, context)
        return x + torch.rand_like(x) * self.training, state


class DrawsByTheRow(Words):
    """By the row's place in the batch instead of the example's number."""

    def forward(self, tokens, state, context):
        x, state = super().forward(tokens, state, context)
        row = torch.arange(len(tokens), dtype=x.dtype)[:, None, None]
        return x + row * self.training, state


class NanAtPadding(Words):
    def forward(self, tokens, state, context):
        x, state = super().forward(tokens, state, context)
        return x.masked_fill(~context.valid[..., None], float("nan")), state


class PlacesByThePiece(Words):
    """Positions that begin again in each segment."""

    def place(self, context):
        time = context.positions.shape[1]
        return context._replace(positions=torch.arange(time).expand_as(context.positions))


class ChangesItsTokens(Words):
    def forward(self, tokens, state, context):
        x, state = super().forward(tokens, state, context)
        if self.training:
            tokens.clamp_(max=7)
        return x, state


class OtherWithoutAState(Words):
    def forward(self, tokens, state, context):
        x, state = super().forward(tokens, state, context)
        return (x * 2 if state is None else x), state


# ---------------------------------------------------------------------------- rotaries and biases


class HalfTurned(Rotary):
    """Pairs of channel i and i + head_dim / 2, as other libraries have them."""

    def __init__(self, head_dim):
        super().__init__()
        self.frequencies = tuple(10_000 ** (-2 * i / head_dim) for i in range(head_dim // 2))

    def turn(self, x, positions):
        theta = constant(self.frequencies, x.device, torch.float64)
        angles = (positions[..., None] * theta)[:, :, None]
        wide = torch.promote_types(x.dtype, torch.float32)
        a, b = x.to(wide).chunk(2, -1)
        cos, sin = angles.cos().to(wide), angles.sin().to(wide)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)

    def forward(self, q, k, query_positions, key_positions):
        return self.turn(q, query_positions), self.turn(k, key_positions)


class KeysByQueries(HalfTurned):
    def forward(self, q, k, query_positions, key_positions):
        return self.turn(q, query_positions), self.turn(k, query_positions)


class TurnsInPlace(HalfTurned):
    def forward(self, q, k, query_positions, key_positions):
        turned = super().forward(q, k, query_positions, key_positions)
        if not q.requires_grad:
            q.copy_(turned[0])
        return turned


class TurnsInHalf(HalfTurned):
    def turn(self, x, positions):
        return super().turn(x, positions.to(x.dtype))


class LinearBias(Bias):
    """A learned slope a head."""

    def __init__(self, heads):
        super().__init__()
        self.slope = nn.Parameter(torch.rand(heads))

    def distance(self, query_positions, key_positions):
        return (query_positions[:, :, None] - key_positions[:, None]).clamp(min=0)

    def forward(self, query_positions, key_positions):
        wide = torch.promote_types(self.slope.dtype, torch.float32)
        distance = self.distance(query_positions, key_positions)[:, None].to(wide)
        return -self.slope.to(wide)[:, None, None].exp() * distance


class NanGradient(LinearBias):
    """d^r, whose logarithm at distance 0 is in the gradient."""

    def forward(self, query_positions, key_positions):
        distance = self.distance(query_positions, key_positions)[:, None].to(self.slope.dtype)
        return -(distance.log() * self.slope[:, None, None]).exp()


class DeadSlope(LinearBias):
    def forward(self, query_positions, key_positions):
        return super().forward(query_positions, key_positions).detach()


class PositionsInHalf(LinearBias):
    def forward(self, query_positions, key_positions):
        dtype = self.slope.dtype
        q, k = query_positions.to(dtype), key_positions.to(dtype)
        distance = (q[:, :, None] - k[:, None]).clamp(min=0)[:, None]
        return -self.slope[:, None, None].exp() * distance


# ---------------------------------------------------------------------------- convolutions


class GatedConvolution(archzoo.ShortConvolution):
    """Its sum times the token, as base convolutions have it."""

    def parallel(self, x, state, context):
        y, state = super().parallel(x, state, context)
        return x * y, state


class ForgetsPadding(archzoo.ShortConvolution):
    """It keeps the last tokens of a call, whatever they are."""

    def parallel(self, x, state, context):
        y, after = super().parallel(x, state, context)
        if after is not None:
            known = torch.cat([state["inputs"], x], dim=1)
            after = {"inputs": known[:, x.shape[1] :].clone()}
        return y, after


# ---------------------------------------------------------------------------- adapters and Linears


class Shift(archzoo.Adapter):
    """A learned bias of each row, and no matrix: what is added does not look at x."""

    def __init__(self, target, *, targets=None, layers=None):
        super().__init__(target, targets=targets, layers=layers)
        self.bias = nn.Parameter(torch.empty(target.shape[-2]))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.zeros_(self.bias)

    def output(self, x, y):
        return self.bias.expand_as(y)


class ShiftsInPlace(Shift):
    def output(self, x, y):
        return x.mul_(1.5).mean(-1, keepdim=True) + self.bias


class ShiftsByTheBatch(Shift):
    def output(self, x, y):
        return self.bias * (1 + x.mean())


class Halves(archzoo.Linear):
    """It keeps twice its weight."""

    def product(self, x, rows=None):
        y = super().product(x, rows) / 2
        if self.bias is None:
            return y
        return y + (self.bias if rows is None else self.bias[rows]) / 2

    def base_weight(self):
        return self.weight / 2


class CentresItsRows(archzoo.Linear):
    def product(self, x, rows=None):
        y = super().product(x, rows)
        return y - y.mean(0, keepdim=True) / 2


class ForgetsItsBlocks(archzoo.Linear):
    def product(self, x, rows=None):
        return super().product(x)


RIGHT = [
    Shift,
    Halves,
    LinearAttention,
    ConvolutionAndMemory,
    ComplexRecurrence,
    NoWeights,
    SlidingWindow,
    GatedConvolution,
    Feed,
    Identity,
    CountsTokens,
    KnowsItsPlace,
    HashRouter,
    SoftRouter,
    NoisyRouter,
    Words,
    ScaledWords,
    WordPairs,
    HalfTurned,
    LinearBias,
]

BROKEN = [
    (RemembersNothing, "reach", "sees none before it"),
    (KeepsButDoesNotRead, "reach", "sees none before it"),
    (HasATable, "reach", "position out of the table"),
    (ComputesInSingle, "interface", "from torch.float64"),
    (KeepsAnInferenceTensor, "deterministic", "Inference tensors"),
    (FirstDocumentForAll, "documents", "must get what it gets alone"),
    (WritesIntoItsInput, "interface", "changed in place"),
    (SharesItsState, "hand-offs", "written-to tensor"),
    (ReadsTheCapacity, "hand-offs", "against the whole"),
    (DividesByTheBatch, "batch independence", "alone against"),
    (ForgetsPadding, "documents", "must find its final state unchanged"),
    (FeedDeadWeight, "gradients", "'unused' gets no gradient"),
    (FeedsInSingle, "interface", "from torch.float64"),
    (FeedsInPlace, "interface", "changed in place"),
    (LosesNan, "interface", "not finite"),
    (NormalisesOverTheBatch, "each token alone", "alone against among"),
    (DropsOut, "deterministic, save and load", "a second call"),
    (DetachesHalf, "gradients", "finite difference"),
    (TakesNoNumber, "interface", "takes 3 positional arguments but 4 were given"),
    (AlwaysTwo, "in a mixture", "2 experts a token where the mixture asks for top_k=1"),
    (BalancesTheBatch, "each token alone", "weights"),
    (ChoosesByTheBatch, "each token alone", "chooses other experts"),
    (NeverLearns, "each token alone", "never trained"),
    (RoutesAtRandom, "deterministic, save and load", "a second call"),
    (RoutesToNan, "interface", "not finite"),
    (DrawsFromAGenerator, "training", "draw by Context.examples"),
    (DrawsByTheRow, "training", "draw by Context.examples"),
    (NanAtPadding, "segments and documents", "not finite"),
    (PlacesByThePiece, "segments and documents", "against the whole"),
    (ChangesItsTokens, "training", "changed in place"),
    (OtherWithoutAState, "segments and documents", "without a state"),
    (KeysByQueries, "interface", "k by its own positions"),
    (TurnsInPlace, "interface", "changed in place"),
    (TurnsInHalf, "casts", "bfloat16 against float64"),
    (NanGradient, "gradients", "not finite"),
    (DeadSlope, "gradients", "gets no gradient"),
    (PositionsInHalf, "casts", "bfloat16 against float64"),
    (ShiftsInPlace, "identity at start", "adapted at the start against the base"),
    (ShiftsByTheBatch, "forms equal", "against recurrent"),
    (CentresItsRows, "gradients", "a row sees another row"),
    (ForgetsItsBlocks, "interface", "block by block against all at once"),
]


# A mixer that is read token by token takes a minute for all checks on a busy machine.
QUICK = {"interface", "reach", "casts", "devices"}
CASES = [
    pytest.param(part, name, marks=[pytest.mark.slow] * (issubclass(part, Mixer) and slow))
    for part in RIGHT
    for name in contract.CHECKS[contract.Subject(part).slot]
    for slow in [name not in QUICK or part is ConvolutionAndMemory]
]


@pytest.mark.parametrize(("part", "name"), CASES)
def test_what_is_right_in_an_unusual_way_passes(part, name):
    finding = contract.run_check(part, name)
    assert finding.passed, finding.detail


@pytest.mark.parametrize(("part", "name", "words"), BROKEN)
def test_what_is_subtly_broken_is_caught(part, name, words):
    finding = contract.run_check(part, name)
    assert not finding.passed, finding.detail
    assert words in finding.detail


def test_every_slot_has_strangers():
    slots = {contract.Subject(part).slot for part in RIGHT}
    assert slots == {contract.Subject(part).slot for part, _, _ in BROKEN} == set(SLOTS)
