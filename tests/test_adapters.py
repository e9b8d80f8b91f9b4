"""Adapters and the house Linear: what they compute, what they leave alone, what they declare."""

import copy
import functools
import inspect
import itertools
import json
import pickle
from pathlib import Path

import pytest
import torch
from overlapping import overlapping
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

import archzoo
from archzoo.adapters import Adapter, Target
from archzoo.adapters.attach import adapter_modules, list_targets
from archzoo.block import Mixer
from archzoo.cli import main
from archzoo.contract import CHECKS, examine, run_check
from archzoo.contract.measure import relative_error
from archzoo.linear import Linear
from archzoo.numerics import head_size
from archzoo.training.optim import decay_groups

GOLDEN = Path(__file__).parent / "golden" / "adaptation_lora.safetensors"
MICRO = ("transformer_micro", "retnet_micro", "yuan_micro", "skywork_micro")


# ---------------------------------------------------------------------------- adapters of a test


class Scale(Adapter):
    """(IA)^3: each row of y times a learned number; it says both output and delta."""

    default_targets = ("value",)
    mergeable = True

    def __init__(self, target, *, targets=None, layers=None):
        super().__init__(target, targets=targets, layers=layers)
        self.scale = nn.Parameter(torch.empty(target.shape[-2]))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.ones_(self.scale)

    def output(self, x, y):
        return y * (self.scale - 1)

    def delta(self, weight):
        return weight * (self.scale - 1)[:, None]

    def bias_delta(self, bias):
        return bias * (self.scale - 1)


class InputScale(Scale):
    """Each column of x times a learned number, before it is multiplied by this block."""

    default_targets = ("down",)

    def __init__(self, target, *, targets=None, layers=None):
        Adapter.__init__(self, target, targets=targets, layers=layers)
        self.scale = nn.Parameter(torch.empty(target.shape[-1]))
        self.reset_parameters()

    def input(self, x):
        return x * (self.scale - 1)

    def output(self, x, y):
        return None

    def delta(self, weight):
        return weight * (self.scale - 1)

    def bias_delta(self, bias):
        return None


class Shared(Adapter):
    """A number for all layers, and a vector of each layer's own."""

    default_targets = ("query",)
    mergeable = True

    def __init__(self, target, *, targets=None, layers=None):
        super().__init__(target, targets=targets, layers=layers)
        self.own = nn.Parameter(torch.zeros(target.shape[-2]))
        self.common = None

    @classmethod
    def connect(cls, adapters):
        adapters[0].common = nn.Parameter(torch.ones(()))
        for adapter in adapters[1:]:
            adapter.refer("owner", adapters[0])

    def reset_parameters(self):
        nn.init.zeros_(self.own)
        if self.common is not None:
            nn.init.ones_(self.common)

    def factor(self):
        return self.own * (self.owner.common if self.common is None else self.common)

    def output(self, x, y):
        return y * self.factor()

    def delta(self, weight):
        return weight * self.factor()[:, None]

    def bias_delta(self, bias):
        return bias * self.factor()


class Weighed(Adapter):
    """W + m * W0: only the change of the weight is known, and it starts from that weight."""

    kinds = ("linear", "experts")
    mergeable = True

    def __init__(self, target, *, targets=None, layers=None):
        super().__init__(target, targets=targets, layers=layers)
        self.amount = nn.Parameter(torch.empty(target.shape))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.zeros_(self.amount)

    def delta(self, weight):
        return self.amount.tanh()


class Magnitude(Adapter):
    """DoRA's m: it starts from the weight."""

    def __init__(self, target, *, targets=None, layers=None):
        super().__init__(target, targets=targets, layers=layers)
        self.magnitude = nn.Parameter(torch.zeros(target.shape[-2]))

    default_targets = ("query", "down")
    mergeable = True

    def reset_parameters(self):
        nn.init.zeros_(self.magnitude)

    def start(self, weight):
        self.magnitude.copy_(weight.norm(dim=-1))

    def delta(self, weight):
        return weight * (self.magnitude / weight.norm(dim=-1).detach() - 1)[:, None]


class Gated(Adapter):
    """What is added depends on the token, so it cannot be merged."""

    def __init__(self, target, *, targets=None, layers=None):
        super().__init__(target, targets=targets, layers=layers)
        rows, columns = target.shape
        self.gate = nn.Parameter(torch.empty(columns))
        self.vector = nn.Parameter(torch.empty(rows))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.normal_(self.gate)
        nn.init.zeros_(self.vector)

    def output(self, x, y):
        return torch.sigmoid(x @ self.gate)[..., None] * self.vector


class Prefix(Adapter):
    """A learned state that every document starts from."""

    kinds = ("state",)
    default_targets = ("state",)
    identity_at_start = False

    def __init__(self, target, *, targets=None, layers=None, length: int = 3):
        super().__init__(target, targets=targets, layers=layers)
        for name, shape in target.state.items():
            shape = [size or length for size in shape]
            self.register_parameter(f"of_{name}", nn.Parameter(torch.empty(shape)))
        self.names = list(target.state)
        self.reset_parameters()

    def reset_parameters(self):
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5)

    def prefix(self):
        return {name: getattr(self, f"of_{name}") for name in self.names}


class Prompt(Adapter):
    """Vectors before the text of every document."""

    kinds = ("input",)
    default_targets = ("input",)
    identity_at_start = False

    def __init__(self, target, *, targets=None, layers=None, length: int = 4):
        super().__init__(target, targets=targets, layers=layers)
        self.vectors = nn.Parameter(torch.empty(length, *target.shape))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.normal_(self.vectors)

    def prompt(self):
        return self.vectors


class RunningMean(Mixer):
    """A newcomer's mixer, which knows nothing of prefixes."""

    def __init__(self, dim, heads):
        super().__init__()
        head_size(dim, heads)
        self.value = nn.Linear(dim, dim)

    def init_state(self, batch_size, *, capacity=None, device=None, dtype=None):
        shape = (batch_size, 1, self.value.out_features)
        return {"total": torch.zeros(shape, device=device, dtype=dtype)}

    def step(self, x, state, context):
        total = 0.9 * state["total"] + self.value(x)
        return torch.tanh(total) * x, {"total": total}


class Doubled(Linear):
    """y = 2 x W^T + b."""

    def product(self, x, rows=None):
        y = super().product(x, rows)
        return (
            y + y if self.bias is None else 2 * y - (self.bias if rows is None else self.bias[rows])
        )

    def base_weight(self):
        return 2 * self.weight


# ---------------------------------------------------------------------------- the rules


@pytest.mark.parametrize(
    "cls", [archzoo.LoRA, Scale, InputScale, Shared, Weighed, Gated, Prefix, Prompt]
)
@pytest.mark.parametrize("rule", CHECKS["adapter"])
def test_adapters_keep_the_rules(cls, rule):
    finding = run_check(cls, rule)
    assert finding.passed, finding.detail


@pytest.mark.parametrize("options", [{"rank": 3, "rank_stabilised": True}, {"alpha": -2.0}])
def test_lora_keeps_the_rules_with_options(options):
    report = examine(archzoo.LoRA, **options)
    assert report.passed, report.failures


@pytest.mark.parametrize("cls", [Linear, Doubled])
@pytest.mark.parametrize("rule", CHECKS["linear"])
def test_linears_keep_the_rules(cls, rule):
    finding = run_check(cls, rule)
    assert finding.passed, finding.detail


class NotAtStart(Scale):
    def reset_parameters(self):
        nn.init.constant_(self.scale, 1.1)


class Dead(Scale):
    def __init__(self, target, *, targets=None, layers=None):
        super().__init__(target, targets=targets, layers=layers)
        self.unused = nn.Parameter(torch.zeros(3))


class Frozen(Scale):
    def __init__(self, target, *, targets=None, layers=None):
        super().__init__(target, targets=targets, layers=layers)
        self.scale.requires_grad_(False)


class Wrong(Scale):
    """Called it does one thing, merged another."""

    def delta(self, weight):
        return super().delta(weight) * 1.001


class Careless(Scale):
    """It writes into what it is given."""

    def output(self, x, y):
        x.mul_(1.01)
        return super().output(x, y)


class Restless(Scale):
    def output(self, x, y):
        return super().output(x, y) + 1e-3 * x.mean(dim=-2, keepdim=True).mean(-1, keepdim=True)


COUNT = itertools.count()


class Unsaved(Scale):
    def __init__(self, target, *, targets=None, layers=None):
        super().__init__(target, targets=targets, layers=layers)
        self.hidden = 1.0 + next(COUNT)

    def output(self, x, y):
        return super().output(x, y) * self.hidden

    def delta(self, weight):
        return super().delta(weight) * self.hidden


class Undeclared(Scale):
    kinds = ("linear", "spoon")


@pytest.mark.parametrize(
    ("cls", "rule", "says"),
    [
        (Undeclared, "interface", "must name some of"),
        (NotAtStart, "identity at start", "identity_at_start is declared"),
        (Dead, "gradients", "unused' gets no gradient"),
        (Frozen, "gradients", "scale' is frozen"),
        (Wrong, "merged", "merged against beside the weights"),
        (Restless, "forms equal", "logits"),
        (Unsaved, "save and load", "other logits"),
    ],
)
def test_each_rule_can_be_broken(cls, rule, says):
    finding = run_check(cls, rule)
    assert not finding.passed
    assert says in finding.detail


# ---------------------------------------------------------------------------- LoRA


@pytest.mark.parametrize("case", ["sq", "tall", "wide"])
def test_lora_gives_the_golden_numbers_and_gradients(case):
    """peft's, with and without a bias and rank-stabilised scale."""
    with safe_open(GOLDEN, "pt") as file:
        about = file.metadata()[f"{case}.config"]
    golden = {k.removeprefix(f"{case}."): v for k, v in load_file(GOLDEN).items() if case in k}
    settings = dict(entry.split(": ") for entry in about.strip("{}").replace('"', "").split(", "))
    out, width = golden["weight"].shape
    linear = Linear(width, {"value": out}, bias="bias" in golden).double()
    lora = archzoo.LoRA(
        Target("linear", "value", (out, width)),
        rank=int(settings["r"]),
        alpha=float(settings["lora_alpha"]),
        rank_stabilised=settings["use_rslora"] == "true",
    ).double()
    linear.attach("default", "value", lora)
    with torch.no_grad():
        linear.weight.copy_(golden["weight"])
        if "bias" in golden:
            linear.bias.copy_(golden["bias"])
        assert relative_error(linear(golden["x"]), golden["y_init"]) < 1e-12
        lora.first.copy_(golden["A"])
        lora.second.copy_(golden["B"])
    x = golden["x"].clone().requires_grad_()
    y = linear(x)
    assert relative_error(y, golden["y"]) < 1e-12
    grads = torch.autograd.grad(y, (x, lora.first, lora.second), golden["gy"])
    for got, name in zip(grads, ("x", "A", "B"), strict=True):
        assert relative_error(got, golden[f"grad.{name}"]) < 1e-12
    with torch.no_grad():
        assert relative_error(linear.effective_weight(), golden["merged"]) < 1e-12


def test_loras_dropout_is_of_x_and_of_training_alone():
    torch.manual_seed(0)
    lora = archzoo.LoRA(Target("linear", "value", (6, 400)), rank=2, dropout=0.5)
    nn.init.normal_(lora.second)
    x = torch.ones(1000, 400)
    y = torch.zeros(1000, 6)
    mean = lora.output(x, y).mean(0)
    assert not torch.equal(lora.output(x, y), lora.output(x, y))
    whole = lora.eval().output(x, y)
    assert torch.equal(whole, lora.output(x, y))
    torch.testing.assert_close(mean, whole[0], atol=0.4, rtol=0)


def test_loras_changes_add_up_and_follow_their_order():
    """Several adapters on one block: each sees what those before it made."""
    net = archzoo.create_model(
        "transformer_micro", vocab_size=20, adapters={"a": "LoRA", "b": Scale, "c": "LoRA"}
    ).double()
    linear = net.blocks[0].mixer.query_key_value
    for _, module in adapter_modules(net):
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.3)
    a, b, c = (linear.adapter_modules[name]["value"] for name in "abc")
    weight = linear.weight[linear.rows("value")]
    w = weight + a.scale * a.second @ a.first
    w = w * b.scale[:, None] + c.scale * c.second @ c.first
    x = torch.randn(3, net.dim, dtype=torch.float64)
    torch.testing.assert_close(linear(x)[:, linear.rows("value")], F.linear(x, w))
    torch.testing.assert_close(linear.effective_weight()[linear.rows("value")], w)


@pytest.mark.parametrize("order", list(itertools.permutations("abc")))
def test_changes_of_input_output_and_weight_follow_their_order_and_merge(order):
    """In a Linear with a bias, of two blocks that share x: called, by blocks, read, and merged."""
    linear = Linear(6, {"first": 4, "second": 5}, bias=True).double()
    w, b = linear.weight[:4], linear.bias[:4]
    classes = {"a": InputScale, "b": Scale, "c": Weighed}
    for entry in order:
        adapter = classes[entry](Target("linear", "first", (4, 6))).double()
        for parameter in adapter.parameters():
            nn.init.normal_(parameter)
        linear.attach(entry, "first", adapter)
        w, b = w + adapter.delta(w), b + b * (adapter.scale - 1) if entry == "b" else b
    x = torch.randn(3, 6, dtype=torch.float64)
    want = torch.cat([F.linear(x, w, b), F.linear(x, linear.weight[4:], linear.bias[4:])], 1)
    assert relative_error(linear(x), want) < 1e-12
    parts = torch.cat([linear.part(x, "first"), linear.part(x, "second")], 1)
    assert relative_error(parts, want) < 1e-12
    assert relative_error(linear.effective_weight()[:4], w) < 1e-12
    assert relative_error(linear.effective_bias()[:4], b) < 1e-12
    linear.merge()
    assert not linear.adapted
    assert relative_error(linear(x), want) < 1e-12


BIASED = {
    "filter": ("yuan_micro", {}, ["filter_first", "filter_second"]),
    "fire": ("transformer_micro", {"bias": "FIRE"}, ["fire_inner"]),
}


@pytest.mark.parametrize("model", BIASED)
@pytest.mark.parametrize("cls", [Scale, InputScale, Weighed])
def test_merged_with_biases_it_computes_what_it_did_beside_the_weights(model, cls):
    name, arguments, targets = BIASED[model]
    net = archzoo.create_model(name, vocab_size=20, **arguments).double().eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)  # biases, too
    archzoo.adapt(net, functools.partial(cls, targets=targets))
    for _, module in adapter_modules(net):
        for parameter in module.parameters():
            nn.init.normal_(parameter, mean=1.0)
    tokens = torch.randint(20, (2, 9))
    forms = (None, "recurrent", "chunkwise", "parallel")
    with torch.no_grad():
        before = [net(tokens, form=form).logits for form in forms]
        archzoo.merge_adapters(net)
        after = [net(tokens, form=form).logits for form in forms]
    for was, now in zip(before, after, strict=True):
        assert relative_error(now, was) < 1e-12


def test_modules_of_all_layers_share_what_one_owns():
    """A state holds it once; copies, casts and loading keep it shared, and all layers move it."""
    net = archzoo.create_model("transformer_micro", vocab_size=20, adapter=Shared)
    names = [name for name in net.state_dict() if name.endswith("common")]
    assert len(names) == 1
    again = archzoo.Decoder(**net.config)
    again.load_state_dict(net.state_dict())
    for made in (net, copy.deepcopy(net).double(), again, pickle.loads(pickle.dumps(net))):
        first, second = (module for _, module in adapter_modules(made))
        assert second.owner is first
        assert first.common.dtype == made.dtype
    first, second = (module for _, module in adapter_modules(net))
    for module in (first, second):
        nn.init.normal_(module.own)
    net(torch.randint(20, (2, 9))).logits.square().sum().backward()
    whole = first.common.grad.clone()
    nn.init.zeros_(second.own)
    first.common.grad = None
    net(torch.randint(20, (2, 9))).logits.square().sum().backward()
    assert not torch.allclose(first.common.grad, whole)


def test_a_target_says_how_many_heads_its_rows_are():
    heads = {}
    for name, mixer in (("retnet_micro", None), ("transformer_micro", "Attention")):
        arguments = {"class_path": mixer, "init_args": {"kv_heads": 1}} if mixer else None
        net = archzoo.create_model(name, vocab_size=20, mixer=arguments, linear="Linear")
        heads |= {(name, p.name): p.target.heads for p in list_targets(net) if p.target.heads}
    assert heads == {
        **{("retnet_micro", block): 2 for block in ("query", "key", "value", "gate")},
        ("transformer_micro", "query"): 2,
        ("transformer_micro", "key"): 1,
        ("transformer_micro", "value"): 1,
    }


# ---------------------------------------------------------------------------- seams


@pytest.mark.parametrize("name", MICRO)
def test_every_matrix_of_the_blocks_can_be_adapted(name):
    """No Linear is left that an adapter would find silently dead."""
    net = archzoo.create_model(
        name,
        vocab_size=20,
        adapter=functools.partial(archzoo.LoRA, targets=[r"blocks\..*\.(?!state$)\w+"]),
    )
    plain = [
        n
        for n, m in net.blocks.named_modules()
        if isinstance(m, nn.Linear) and not isinstance(m, Linear)
    ]
    assert not plain
    for path, module in net.blocks.named_modules():
        if isinstance(module, Linear):
            assert {block for block, _ in module.adapters()} == set(module.blocks), path
    for _, module in adapter_modules(net):
        nn.init.normal_(module.second, std=0.1)
    net(torch.randint(20, (4, 12))).logits.square().sum().backward()
    dead = [n for n, p in net.named_parameters() if p.requires_grad and not p.grad.abs().max()]
    # A token's experts are few, and those that no token chose learn nothing.
    assert not [n for n in dead if "experts" not in n]


def test_a_bare_state_is_what_reading_the_tokens_leaves():
    """A prefix made of the state after some tokens: as if they had been read."""
    net = archzoo.create_model("retnet_micro", vocab_size=20, adapter=Prefix, rotary="none")
    net = net.double().eval()
    base = archzoo.create_model("retnet_micro", vocab_size=20, rotary="none").double().eval()
    base.load_state_dict(archzoo.remove_adapters(net).state_dict())
    net = archzoo.adapt(net, Prefix)
    before, text = torch.randint(20, (1, 5)), torch.randint(20, (1, 7))
    # The normaliser counts positions, which start anew behind a prefix: give them.
    with torch.no_grad():
        state = base(before, base.init_state(1)).state
        want = base(text, state, positions=torch.arange(7)[None]).logits
        for block, mixed in zip(
            net.blocks, base(before, base.init_state(1)).state["blocks"], strict=True
        ):
            block.mixer.prefix["default"].of_memory.copy_(mixed["memory"][0])
        got = net(text).logits
    assert relative_error(got, want) < 1e-12


def test_a_prefix_is_what_attention_reads_before_the_text():
    """Keys and values of tokens, without positions: as if those tokens had been read."""
    arguments = {"vocab_size": 20, "rotary": "none"}
    adapter = functools.partial(Prefix, length=5)
    net = archzoo.create_model("transformer_micro", adapter=adapter, **arguments)
    net = net.double().eval()
    before, text = torch.randint(20, (1, 5)), torch.randint(20, (1, 7))
    base = archzoo.create_model("transformer_micro", **arguments).double().eval()
    base.load_state_dict({k: v for k, v in net.state_dict().items() if ".prefix." not in k})
    with torch.no_grad():
        state = base(before, base.init_state(1)).state
        for block, mixed in zip(net.blocks, archzoo.block.fork(state)["blocks"], strict=True):
            block.mixer.prefix["default"].of_keys.copy_(mixed["keys"][0, :, :5])
            block.mixer.prefix["default"].of_values.copy_(mixed["values"][0, :, :5])
        want = base(text, state).logits
        assert relative_error(net(text).logits, want) < 1e-12


def test_a_prompt_is_what_embedded_tokens_before_the_text_give():
    net = archzoo.create_model("yuan_micro", vocab_size=20, adapter=Prompt).double().eval()
    before, text = torch.randint(20, (1, 4)), torch.randint(20, (1, 7))
    with torch.no_grad():
        net.prompt["default"].vectors.copy_(net.embedding.weight[before[0]])
        got = net(text).logits
        archzoo.remove_adapters(net)
        want = net(torch.cat([before, text], 1)).logits[:, 4:]
    assert relative_error(got, want) < 1e-12


@pytest.mark.parametrize("cls", [Prefix, Prompt])
def test_a_newcomers_mixer_starts_from_a_prefix_and_a_prompt(cls):
    net = archzoo.create_model("retnet_micro", vocab_size=20, mixer=RunningMean, adapter=cls)
    net = net.double().eval()
    tokens = torch.randint(20, (2, 15))
    documents = torch.tensor([[-1] * 3 + [0] * 12, [0] * 5 + [1] * 10])
    with torch.no_grad():
        together = net(tokens, documents=documents).logits
        for row, begin, end in ((0, 3, 15), (1, 0, 5), (1, 5, 15)):
            alone = net(tokens[row : row + 1, begin:end]).logits
            assert relative_error(together[row : row + 1, begin:end], alone) < 1e-12
        state, segments = net.init_state(2), []
        for begin, end in ((0, 4), (4, 5), (5, 15)):
            output = net(tokens[:, begin:end], state, documents[:, begin:end])
            state = output.state
            segments.append(output.logits)
    valid = documents >= 0
    assert relative_error(torch.cat(segments, 1)[valid], together[valid]) < 1e-12


def test_the_effective_weight_is_held_while_decoding_and_never_stale():
    lora = functools.partial(archzoo.LoRA, targets=["router_value", "up"])
    net = archzoo.create_model("yuan_micro", vocab_size=20, adapter=lora)
    linear = net.blocks[0].feed_forward.router.projection
    lora = linear.adapter_modules["default"]["router_value"]
    nn.init.normal_(lora.second)
    with net.weights_held(), torch.inference_mode():
        first = linear.effective_weight()
        assert linear.effective_weight() is first
    with torch.no_grad():
        assert linear.effective_weight() is not first
        lora.second.data.add_(1.0)
        assert not torch.equal(linear.effective_weight(), first)
        with torch.autocast("cpu", torch.bfloat16), net.weights_held():
            assert torch.equal(linear.effective_weight(), linear.effective_weight())
            rounded = linear.effective_weight()
        assert torch.equal(rounded, linear.effective_weight())
    with net.weights_held():
        assert linear.effective_weight().requires_grad


@pytest.mark.parametrize("adapter", ["PrefixTuning", "PromptTuning", "LoRA"])
def test_whoever_leaves_first_what_is_held_goes_with_the_last(adapter):
    """Two threads, or two texts in turns, overlap; what is learnt later shows in the next text."""
    net = archzoo.create_model("retnet_micro", vocab_size=20, adapter=adapter).eval()
    first, second = net.weights_held(), net.weights_held()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    held = [module for module in net.modules() if isinstance(module, Linear) and module.is_held]
    assert bool(held) == (adapter == "LoRA")  # by the second
    second.__exit__(None, None, None)
    with torch.no_grad():
        for _, module in adapter_modules(net):
            for parameter in module.parameters():
                nn.init.normal_(parameter)
    other = archzoo.create_model("retnet_micro", vocab_size=20, adapter=adapter).eval()
    other.load_state_dict(net.state_dict())
    tokens = torch.randint(20, (2, 9))
    with torch.no_grad():
        for state in (lambda _: None, lambda model: model.init_state(2)):
            found, want = (model(tokens, state(model)).logits for model in (net, other))
            assert torch.equal(found, want)


def test_two_threads_that_generate_at_once_leave_nothing_behind():
    net = archzoo.create_model("retnet_micro", vocab_size=20, adapter="PrefixTuning").eval()
    overlapping(
        lambda wait: archzoo.generate(net, [[1, 2]], max_tokens=1, on_token=lambda *_: wait())
    )
    before = archzoo.generate(net, [[1, 2]], max_tokens=1, keep_state=True)
    with torch.no_grad():
        for _, module in adapter_modules(net):
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter))
    after = archzoo.generate(net, [[1, 2]], max_tokens=1, keep_state=True)
    assert not torch.equal(before.conversation.logits, after.conversation.logits)


@pytest.mark.parametrize("adapter", ["LoRA", "MoLoRA", "PrefixTuning"])
def test_a_copy_holds_nothing(adapter):
    net = archzoo.create_model("retnet_micro", vocab_size=20, adapter=adapter).eval()
    with net.weights_held(), torch.no_grad():
        made = [copy.deepcopy(net), pickle.loads(pickle.dumps(net))]
    tokens = torch.randint(20, (2, 9))
    other = archzoo.create_model("retnet_micro", vocab_size=20, adapter=adapter).eval()
    with torch.no_grad():
        for found in made:
            for parameter in found.parameters():
                parameter.normal_(std=0.3)
            other.load_state_dict(found.state_dict())
            assert torch.equal(found(tokens).logits, other(tokens).logits)


@pytest.mark.parametrize("cls", [archzoo.LoRA, Scale, InputScale, Weighed, Magnitude])
def test_decoding_multiplies_with_one_held_weight_where_all_can_be_merged(cls, monkeypatch):
    """The base's products and no others, biases and blocks one by one included."""
    names = ["filter_first", "query", "value", "up", "down", "router", "fire_inner"]
    arguments = {"rank": 1} if cls is archzoo.LoRA else {}
    if cls is Magnitude or cls is Scale or cls is InputScale:  # of no experts
        names = ["filter_first", "query", "value", "router", "fire_inner"]
    net = archzoo.create_model("yuan_micro", vocab_size=20, bias="FIRE").double().eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)
    archzoo.adapt(net, cls(targets=names, **arguments))
    for _, module in adapter_modules(net):
        for parameter in module.parameters():
            nn.init.normal_(parameter, mean=1.0, std=0.3)
    tokens = torch.randint(20, (2, 9))
    with torch.no_grad():
        want = net(tokens).logits
    with net.weights_held():
        fresh = net(tokens).logits  # with gradients nothing is held
        fresh.sum().backward()
        with torch.no_grad(), monkeypatch.context() as patch:
            patch.setattr(Linear, "_changed", None)
            patch.setattr(cls, "delta", None)
            for form in (None, "recurrent"):
                assert relative_error(net(tokens, form=form).logits, want) < 1e-12
    assert relative_error(fresh, want) < 1e-12
    assert all(
        parameter.grad is not None for _, m in adapter_modules(net) for parameter in m.parameters()
    )
    archzoo.generate(net, [[1, 2, 3], [4]], max_tokens=4, check=True)


def test_beside_one_that_cannot_be_merged_nothing_is_held_in_calls():
    adapters = {"a": archzoo.LoRA(targets=["query", "up"]), "b": Gated(targets=["value"])}
    net = archzoo.create_model("retnet_micro", vocab_size=20, adapters=adapters).double().eval()
    for _, module in adapter_modules(net):
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.3)
    tokens = torch.randint(20, (2, 9))
    with torch.no_grad():
        want = net(tokens).logits
        with net.weights_held():
            first, second = (
                net.blocks[0].mixer.query_key_value_gate,
                net.blocks[0].feed_forward.gate_up,
            )
            assert first.one_weight() is None
            assert second.one_weight() is second.effective_weight()
            assert relative_error(net(tokens).logits, want) < 1e-12
            archzoo.disable_adapters(net, "b")
            assert first.one_weight() is None  # what is held has been forgotten


class InPlace(RunningMean):
    """It writes into its state where gradients are off: a call consumes the state."""

    def step(self, x, state, context):
        if torch.is_grad_enabled():
            return super().step(x, state, context)
        total = state["total"].mul_(0.9).add_(self.value(x))
        return torch.tanh(total) * x, {"total": total}


def test_decoding_leaves_a_prefix_as_it_is():
    net = archzoo.create_model("retnet_micro", vocab_size=20, mixer=InPlace, adapter=Prefix).eval()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    archzoo.generate(net, [[1, 2, 3], [4, 5]], max_tokens=4, check=True)
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_an_adapter_that_starts_from_the_weight_keeps_the_rules():
    report = examine(Magnitude)
    assert report.passed, report.failures


def test_what_is_refused_changes_nothing():
    net = archzoo.create_model("retnet_micro", vocab_size=20)
    net.embedding.weight.requires_grad_(False)
    before = [name for name, parameter in net.named_parameters() if parameter.requires_grad]
    quary = functools.partial(archzoo.LoRA, targets=["quary"])
    with pytest.raises(ValueError, match="quary"):
        archzoo.adapt(net, {"a": "LoRA", "b": quary})
    with pytest.raises(ValueError, match="must hold adapters by name"):
        archzoo.adapt(net, {})
    assert not list(adapter_modules(net))
    gated = functools.partial(Gated, targets=["value"])
    weighed = functools.partial(Weighed, targets=["value"])
    with pytest.raises(ValueError, match=r"Weighed \(b\) changes .* Gated \(a\) before it"):
        archzoo.adapt(net, {"a": gated, "b": weighed})
    for name in ("train", "values", "forward"):
        with pytest.raises(ValueError, match=f"adapter name '{name}' is not valid"):
            archzoo.adapt(net, {name: "LoRA"})
    with pytest.raises(ValueError, match="'keys' is not a valid name of a block"):
        Linear(4, {"keys": 4})
    assert before == [name for name, parameter in net.named_parameters() if parameter.requires_grad]
    archzoo.merge_adapters(archzoo.adapt(net, {"b": weighed, "a": "LoRA"}))
    assert before == [name for name, parameter in net.named_parameters() if parameter.requires_grad]


def test_a_linear_of_ones_own_merges_by_its_own_word():
    net = archzoo.create_model("retnet_micro", vocab_size=20, linear=Doubled, adapter="LoRA")
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(ValueError, match=r"Doubled has a base_weight\(\) of its own"):
        archzoo.merge_adapters(net)
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_wider_adapters_beside_a_narrow_base():
    net = archzoo.adapt(archzoo.create_model("retnet_micro", vocab_size=20).bfloat16(), "LoRA")
    for _, module in adapter_modules(net):
        nn.init.normal_(module.float().second)
    assert net(torch.randint(20, (2, 9))).logits.dtype == torch.bfloat16


def test_prompts_do_not_decay():
    net = archzoo.create_model("retnet_micro", vocab_size=20, adapter=Prompt)
    assert [group["weight_decay"] for group in decay_groups(net, 0.1)] == [0.0]


def test_a_file_holds_paths_and_no_regular_expressions(tmp_path):
    """Which a stranger could make to run for ever; and nothing is built that does not fit."""
    lora = functools.partial(archzoo.LoRA, targets=[r"blocks\.1\..*\.(query|up)"])
    net = archzoo.create_model("retnet_micro", vocab_size=20, adapter=lora)
    paths = ["blocks.1.mixer.query_key_value_gate.query", "blocks.1.feed_forward.gate_up.up"]
    assert sorted(net.config["adapter"]["init_args"]["targets"]) == sorted(paths)
    archzoo.save_pretrained(tmp_path / "model", net)
    tokens = torch.randint(20, (2, 9))
    again, _ = archzoo.from_pretrained(tmp_path / "model")
    assert torch.equal(again(tokens).logits, net(tokens).logits)
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text())
    arguments = config["decoder"]["adapter"]["init_args"]
    for change, says in (
        ({"targets": ["(([a-z._0-9])+)+!"]}, "a file may hold no regular expression"),
        ({"targets": ["query"] * 20_000}, "20,000 targets, more than is read"),
        ({"targets": ["quary"], "rank": 10**9}, "nothing here is called 'quary'"),
    ):
        config["decoder"]["adapter"]["init_args"] = arguments | change
        file.write_text(json.dumps(config))
        with pytest.raises(ValueError, match=says):
            archzoo.from_pretrained(tmp_path / "model")


# ---------------------------------------------------------------------------- targets, recipes


@pytest.mark.parametrize(
    ("targets", "blocks"),
    [
        (["mixer.query"], ["mixer.query_key_value.query"]),
        (["feed_forward.up", "mixer.output"], ["feed_forward.experts.gate_up.up", "mixer.output"]),
        (["experts.down"], ["feed_forward.experts.down.down"]),
        (["router"], [f"feed_forward.router.projection.router_{n}" for n in ("query", "key")]),
        (["bias"], ["mixer.bias.inner.fire_inner", "mixer.bias.outer.fire_outer"]),
        (["experts"], [f"feed_forward.experts.gate_up.{n}" for n in ("gate", "up")]),
        (["feed_forward"], ["feed_forward.experts.down.down"]),
        (["mixer"], ["mixer.first.filter_first", "mixer.query_key_value.key", "mixer.output"]),
    ],
)
def test_targets_are_named_by_meaning(targets, blocks):
    net = archzoo.create_model("yuan_micro", vocab_size=20, bias="FIRE")
    archzoo.adapt(net, archzoo.LoRA(rank=1, targets=targets, layers=[0]))
    at = [
        f"{path}.{block}"
        for path, module in net.named_modules()
        if isinstance(module, Linear)
        for block, _ in module.adapters()
    ]
    parts = {path.split(".")[2] for path in at}
    assert parts == {block.split(".")[0] for block in blocks}
    for block in blocks:
        assert any(path.startswith(f"blocks.0.{block}") for path in at), (block, at)
    if targets != ["feed_forward"]:
        assert not [path for path in at if "router" in path] or targets == ["router"]
    assert not [path for path in at if ".bias." in path] or targets == ["bias"]
    assert set(net.config["adapter"]["init_args"]["targets"]) == set(at)  # whole paths are saved
    again = archzoo.Decoder(**net.config)
    assert again.state_dict().keys() == net.state_dict().keys()


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("mixer.quary", r"nothing here is called 'mixer.quary'; nearest: mixer.query"),
        ("feedforward.up", "nearest: feed_forward.up"),
        ("routr", "nearest: router"),
        ("expert", "nearest: experts"),
        ("blocks.0.mixer.query_key_value.quary", "nearest: blocks.0.mixer.query_key_value.query"),
        ("embedding", "cannot change embedding, of the kind 'input'.*; remove it from targets"),
    ],
)
def test_an_unknown_target_gets_the_nearest_names(target, says):
    with pytest.raises(ValueError, match=says):
        archzoo.create_model("yuan_micro", vocab_size=20, adapter=archzoo.LoRA(targets=[target]))


def test_a_target_of_other_layers_says_where_it_is():
    adapter = archzoo.LoRA(targets=["gate"], layers=[1])
    pattern, plain = ["Retention", "Attention"], "PlainFeedForward"
    with pytest.raises(
        ValueError, match=r"LoRA: 'gate' is not in the layers \[1\]: it is in \[0\]"
    ):
        archzoo.create_model(
            "retnet_micro", vocab_size=20, pattern=pattern, feed_forward=plain, adapter=adapter
        )
    with pytest.raises(ValueError, match="layer 'a' is not one of 0 to 1"):
        archzoo.create_model("retnet_micro", vocab_size=20, adapter=archzoo.LoRA(layers=["a"]))


def test_without_a_target_a_class_gives_a_recipe():
    recipe = archzoo.LoRA(rank=2, targets=["mixer.value"])
    assert recipe.func is archzoo.LoRA
    assert list(inspect.signature(archzoo.LoRA).parameters)[:2] == ["target", "targets"]
    one = archzoo.create_model("retnet_micro", vocab_size=20, adapter=recipe)
    two = archzoo.create_model("retnet_micro", vocab_size=20)
    archzoo.adapt(two, recipe)
    assert one.config == two.config
    several = {"sums": recipe, "style": archzoo.LoRA()}
    net = archzoo.create_model("retnet_micro", vocab_size=20, adapters=several)
    assert list(net.config["adapters"]) == ["sums", "style"]
    copied = copy.deepcopy(next(adapter_modules(net))[1])
    assert isinstance(copied, archzoo.LoRA)
    with pytest.raises(ValueError, match="LoRA has no argument 'rnk'; nearest: rank"):
        archzoo.adapt(archzoo.create_model("retnet_micro", vocab_size=20), archzoo.LoRA(rnk=2))


# ---------------------------------------------------------------------------- on and off


def switched_model():
    """A model with three adapters, none of which is at its start."""
    entries = {
        "sums": archzoo.LoRA(rank=2, targets=["mixer", "router"]),
        "style": Scale,
        "text": Prompt,
    }
    net = archzoo.create_model("yuan_micro", vocab_size=20, adapters=entries).double().eval()
    for _, module in adapter_modules(net):
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.3)
    return net


def test_adapters_are_switched_on_and_off():
    net = switched_model()
    tokens = torch.randint(20, (2, 9))

    def logits(of=net):
        with torch.no_grad():
            return of(tokens).logits

    def alone(*left):
        copied = copy.deepcopy(net)
        copied = archzoo.remove_adapters(copied, *({"sums", "style", "text"} - set(left)))
        assert list(copied.config["adapters"] or {}) == [*left]
        return logits(copied)

    whole = logits()
    with archzoo.disable_adapters(net) as inside:
        assert inside is net
        assert torch.equal(logits(), logits(archzoo.remove_adapters(copy.deepcopy(net))))
        with archzoo.enable_adapters(net, "sums"):
            assert torch.equal(logits(), alone("sums"))
        assert net.adapters_off == {"sums", "style", "text"}
    assert torch.equal(logits(), whole)
    archzoo.enable_adapters(net, "text", "style")
    assert torch.equal(logits(), alone("style", "text"))
    archzoo.disable_adapters(net, "text")
    assert torch.equal(logits(), alone("style"))
    # A copy is as the model is; what is saved and read again has all of them on.
    assert torch.equal(logits(copy.deepcopy(net)), alone("style"))
    again = archzoo.Decoder(**net.config).double().eval()
    again.load_state_dict(net.state_dict())
    assert torch.equal(logits(again), whole)
    # What is off learns nothing.
    net(tokens).logits.square().sum().backward()
    for path, module in adapter_modules(net):
        for parameter in module.parameters():
            assert (parameter.grad is not None) == (".style." in path), path
    archzoo.enable_adapters(net)
    assert torch.equal(logits(), whole)
    with pytest.raises(ValueError, match="the model has no adapter 'stile'; nearest: style"):
        archzoo.enable_adapters(net, "stile")


def test_what_is_switched_off_is_neither_merged_nor_lost_unsaid():
    net = switched_model()
    archzoo.remove_adapters(net, "text")
    archzoo.disable_adapters(net, "sums")
    with pytest.raises(ValueError, match=r"the adapter sums is switched off.*remove_adapters"):
        archzoo.merge_adapter(net)
    tokens = torch.randint(20, (2, 9))
    with torch.no_grad():
        want = net(tokens).logits
        archzoo.remove_adapters(net, "sums")
        assert relative_error(archzoo.merge_adapter(net)(tokens).logits, want) < 1e-12
    with pytest.raises(ValueError, match="no adapter to merge: it is merged already"):
        archzoo.merge_adapter(net)
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_switched_within_held_weights_nothing_is_stale():
    net = switched_model()
    tokens = torch.randint(20, (2, 9))
    with torch.no_grad():
        with archzoo.disable_adapters(net):
            want = net(tokens).logits
        with net.weights_held():
            net(tokens)
            with archzoo.disable_adapters(net):
                assert torch.equal(net(tokens).logits, want)


# ---------------------------------------------------------------------------- in words


@pytest.mark.parametrize(
    ("adapter", "says"),
    [
        ({"targets": ["quary"]}, "LoRA: nothing here is called 'quary'; nearest: query"),
        ({"targets": "query"}, r"targets='query' must be a list"),
        ({"targets": []}, "must be a list"),
        ({"targets": ["("]}, "is not a valid regular expression"),
        ({"layers": [2]}, "layer 2 is not one of 0 to 1"),
        ({"targets": ["state"]}, "LoRA cannot change blocks.0.mixer.state, of the kind 'state'"),
        ({"rank": 0}, "rank=0 must be at least 1"),
        ({"dropout": 1.0}, "dropout=1.0 must lie in"),
        ({"rnk": 4}, "LoRA has no argument 'rnk'; nearest: rank"),
    ],
)
def test_user_errors_are_answered_in_a_line(adapter, says):
    spec = {"class_path": "LoRA", "init_args": adapter}
    with pytest.raises(ValueError, match=says):
        archzoo.create_model("retnet_micro", vocab_size=20, adapter=spec)


def test_what_cannot_be_adapted_is_refused_by_name():
    with pytest.raises(ValueError, match="the head is the embedding's table"):
        archzoo.create_model(
            "transformer_micro",
            vocab_size=20,
            tie_weights=True,
            adapter=functools.partial(archzoo.LoRA, targets=["head"]),
        )
    with pytest.raises(ValueError, match=r"Gated cannot change .*router.*has no delta"):
        archzoo.create_model(
            "yuan_micro", vocab_size=20, adapter=functools.partial(Gated, targets=["router_query"])
        )
    net = archzoo.create_model("retnet_micro", vocab_size=20)
    with pytest.raises(
        ValueError, match="no adapter to merge: it is merged already, or never had one"
    ):
        archzoo.merge_adapters(net)
    archzoo.adapt(net, "LoRA")
    with pytest.raises(ValueError, match="has adapters already"):
        archzoo.adapt(net, "LoRA")
    with pytest.raises(ValueError, match="must hold adapters by name"):
        archzoo.create_model("retnet_micro", vocab_size=20, adapters={"class_path": "LoRA"})
    with pytest.raises(ValueError, match=r"adapter name 'a\.b' is not valid"):
        archzoo.create_model("retnet_micro", vocab_size=20, adapters={"a.b": "LoRA"})
    with pytest.raises(ValueError, match="the adapters a and b both change"):
        archzoo.create_model("retnet_micro", vocab_size=20, adapters={"a": Prefix, "b": Prefix})


def test_adapting_leaves_the_base_as_it_is_and_goes_where_it_lies():
    net = archzoo.create_model("skywork_micro", vocab_size=20).bfloat16().eval()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    archzoo.adapt(net, "LoRA")
    for _, module in adapter_modules(net):
        assert not module.training
        assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    assert net.config["adapter"] == {"class_path": "LoRA", "init_args": {}}
    archzoo.remove_adapters(net)
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert net.state_dict().keys() == before.keys()
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert net.config["adapter"] is None


def test_the_targets_of_a_decoder_are_named_by_place():
    net = archzoo.create_model("retnet_micro", vocab_size=20)
    places = {place.target.path: place.target for place in list_targets(net)}
    wanted = places["blocks.1.mixer.query_key_value_gate.value"]
    assert (wanted.kind, wanted.shape, wanted.layer) == ("linear", (64, 32), 1)
    assert {"embedding", "blocks.0.mixer.state", "head.head"} <= places.keys()


# ---------------------------------------------------------------------------- Linears


def test_a_linears_blocks_are_its_rows():
    linear = Linear(4, {"query": 3, "key": 2, "value": 5})
    assert linear.rows("key") == slice(3, 5)
    assert linear.rows("query", "key") == slice(0, 5)
    with pytest.raises(ValueError, match="no block 'gate'; there are query, key, value"):
        linear.rows("gate")
    with pytest.raises(ValueError, match="do not lie side by side"):
        linear.rows("query", "value")


def test_the_slot_linear_builds_all_but_head_and_routers():
    net = archzoo.create_model("yuan_micro", vocab_size=20, linear=Doubled)
    for path, module in net.named_modules():
        if isinstance(module, Linear):
            spared = ".router." in path or path == "head"
            assert isinstance(module, Doubled) != spared, path
    assert net.config["linear"]["class_path"].endswith("Doubled")
    again = archzoo.Decoder(**net.config)
    again.load_state_dict(net.state_dict())
    tokens = torch.randint(20, (2, 9))
    assert torch.equal(again(tokens).logits, net(tokens).logits)
    with pytest.raises(ValueError, match="stack is set by the part that contains it"):
        archzoo.create_model(
            "retnet_micro",
            vocab_size=20,
            linear={"class_path": "Linear", "init_args": {"stack": 2}},
        )


def test_a_model_says_its_dtype_and_device():
    net = archzoo.create_model("retnet_micro", vocab_size=20).bfloat16()
    assert net.dtype == torch.bfloat16
    assert net.device == torch.device("cpu")


# ---------------------------------------------------------------------------- as a user runs it


def test_a_checkpoint_is_adapted_resumed_and_read_from_the_command_line(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    run = ["--data", "Addition", "--data.digits", "1", "--trainer.accelerator", "cpu"]
    steps = ["--trainer.max_steps", "2", "--trainer.default_root_dir"]
    assert main(["fit", "--model.preset", "skywork_micro", *run, *steps, "base"]) == 0
    (base,) = tmp_path.glob("base/**/last.ckpt")
    lora = ["--model.adapter", "LoRA", "--model.adapter.targets", "[query,up]"]
    assert main(["fit", "--model.weights", str(base), *lora, *steps, "lora"]) == 0
    assert "parameters, of which" in capsys.readouterr().out
    (adapted,) = tmp_path.glob("lora/**/last.ckpt")
    before, after = (archzoo.from_pretrained(path)[0].state_dict() for path in (base, adapted))
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    moved = [name for name in after if name not in before and name.endswith("second")]
    assert moved
    assert all(after[name].abs().max() > 0 for name in moved)
    optimizer = torch.load(adapted, weights_only=True)["optimizer_states"][0]
    assert len(optimizer["state"]) == len(after) - len(before)
    # Its own settings run again, it is resumed, read, shown, and not adapted twice.
    config = str(adapted.parent / "config.yaml")
    assert main(["fit", "--config", config, "--trainer.default_root_dir", "again"]) == 0
    (again,) = tmp_path.glob("again/**/last.ckpt")
    repeated = archzoo.from_pretrained(again)[0].state_dict()
    assert all(torch.equal(repeated[name], tensor) for name, tensor in after.items())
    assert main(["fit", "--ckpt_path", str(adapted), "--trainer.max_steps", "3"]) == 0
    assert main(["generate", str(adapted), "1+2=", "--max_tokens", "2"]) == 0
    capsys.readouterr()
    assert main(["show", str(adapted)]) == 0
    said = capsys.readouterr().out
    assert "of which trainable" in said and "mixer.query, experts.up" in said
    assert main(["fit", "--model.weights", str(adapted), *lora, *steps, "twice"]) == 1
    assert "has adapters already" in capsys.readouterr().err


def test_several_adapters_stand_by_name_in_a_configuration(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = """
model:
  preset: retnet_micro
  adapters:
    sums: LoRA
    style: {class_path: LoRA, init_args: {targets: [up], rank: 3}}
data: {class_path: Addition, init_args: {digits: 1}}
trainer: {max_steps: 1, accelerator: cpu, default_root_dir: two}
"""
    (tmp_path / "two.yaml").write_text(text)
    assert main(["fit", "--config", "two.yaml"]) == 0
    (path,) = tmp_path.glob("two/**/last.ckpt")
    net, _ = archzoo.from_pretrained(path)
    assert list(net.config["adapters"]) == ["sums", "style"]
    assert main(["fit", "--ckpt_path", str(path), "--trainer.max_steps", "2"]) == 0
    config = str(path.parent / "config.yaml")
    assert main(["fit", "--config", config, "--trainer.default_root_dir", "again"]) == 0
