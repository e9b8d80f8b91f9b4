"""Hugging Face's peft as an oracle: its layers compute what ours do, and it reads and writes files.

Its FourierFT and its start of PiSSA know float32 alone.
"""

import warnings
from functools import partial

import pytest
import torch
from torch import nn

import archzoo
from archzoo.adapters import Target
from archzoo.adapters.attach import adapter_modules, attached
from archzoo.contract.measure import relative_error
from archzoo.conversion.peft import export_peft, import_peft
from archzoo.linear import Linear

pytestmark = pytest.mark.extras
peft = pytest.importorskip("peft")

ROWS, COLUMNS = 34, 20
#: What peft can reach of each: the rest is refused by name.
TARGETS = {
    "transformer_micro": ["query", "value", "output", "gate", "up", "down", "head"],
    "retnet_micro": ["query", "key", "gate", "output", "down"],
    "yuan_micro": ["output", "filter_first", "filter_second", "head"],
    "skywork_micro": ["key", "value", "output"],
}
TOKENS = torch.randint(20, (2, 13), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def quiet():
    """Peft warns that a model without a Hugging Face configuration has none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# ---------------------------------------------------------------------------- layer by layer


def both(config, cls, bias, **options):
    """Peft's layer and ours on one weight, the adapters with other parameters yet."""
    torch.manual_seed(0)
    net = nn.ModuleDict({"value": nn.Linear(COLUMNS, ROWS, bias=bias)})
    weight = net["value"].weight.detach().clone()
    theirs = peft.inject_adapter_in_model(config, net)["value"]
    linear = Linear(COLUMNS, {"value": ROWS}, bias=bias)
    path = "feed_forward.down" if cls is archzoo.IA3 and config.feedforward_modules else "value"
    ours = cls(Target("linear", path, (ROWS, COLUMNS)), **options)
    linear.attach("default", "value", ours)
    with torch.no_grad():
        linear.weight.copy_(weight)
        if bias:
            linear.bias.copy_(theirs.base_layer.bias)
    ours.start(linear.weight)
    return theirs, linear, ours


def expect_equal(theirs, linear, pairs, tolerance):
    """Y, the gradients of x and of each pair of parameters, and the merged weight and bias."""
    x = torch.randn(2, 5, COLUMNS, dtype=linear.dtype)
    results = []
    for layer, parameters in ((theirs, [p for p, _ in pairs]), (linear, [p for _, p in pairs])):
        given = x.clone().requires_grad_()
        y = layer(given)
        slope = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)
        results.append([y, *torch.autograd.grad(y, [given, *parameters], slope)])
    for want, got in zip(*results, strict=True):
        assert relative_error(got, want.view(got.shape)) < tolerance
    with torch.no_grad():
        theirs.merge()
        linear.merge()
        assert relative_error(linear.weight, theirs.base_layer.weight) < tolerance
        if linear.bias is not None:
            assert relative_error(linear.bias, theirs.base_layer.bias) < tolerance


def lora_config(**options):
    given = {"r": 3, "lora_alpha": 12, "target_modules": ["value"]}
    return peft.LoraConfig(**(given | options))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank_stabilised", [True, False])
@pytest.mark.parametrize("cls", [archzoo.LoRA, archzoo.DoRA])
def test_lora_and_dora(cls, rank_stabilised, bias):
    config = lora_config(use_dora=cls is archzoo.DoRA, use_rslora=rank_stabilised)
    options = {"rank": 3, "alpha": 12.0, "rank_stabilised": rank_stabilised}
    theirs, linear, ours = both(config, cls, bias, **options)
    theirs, linear = theirs.double(), linear.double()
    pairs = [
        (theirs.lora_A["default"].weight, ours.first),
        (theirs.lora_B["default"].weight, ours.second),
    ]
    if cls is archzoo.DoRA:
        magnitude = theirs.lora_magnitude_vector["default"].weight
        assert relative_error(ours.magnitude, magnitude) < 1e-6  # float32 at the start
        pairs.append((magnitude, ours.magnitude))
    for their, own in pairs:
        nn.init.normal_(own)
        their.data.copy_(own)
    expect_equal(theirs, linear, pairs, 1e-12)


def test_pissa():
    """Theirs beside a residual, ours beside the whole weight."""
    config = lora_config(init_lora_weights="pissa")
    theirs, linear, ours = both(config, archzoo.PiSSA, True, rank=3, alpha=12.0)
    first, second = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    scale = theirs.scaling["default"]
    assert ours.scale == scale
    with torch.no_grad():
        assert relative_error(scale * ours.second @ ours.first, scale * second @ first) < 1e-5
        residual = linear.weight - scale * ours.second @ ours.first
        assert relative_error(residual, theirs.base_layer.weight) < 1e-5
    theirs, linear = theirs.double(), linear.double()
    first, second = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    with torch.no_grad():
        linear.weight.copy_(theirs.base_layer.weight + scale * second @ first)
        for own, their in ((ours.first, first), (ours.second, second)):
            own.copy_(their)
        ours.first_start.copy_(first)
        ours.second_start.copy_(second)
        for own, their in ((ours.first, first), (ours.second, second)):
            own.add_(0.3 * torch.randn_like(own))
            their.copy_(own)
    expect_equal(theirs, linear, [(first, ours.first), (second, ours.second)], 1e-12)


def test_fourierft():
    """Theirs are float32 always, and drawn from all entries."""
    config = peft.FourierFTConfig(
        n_frequency=30, scaling=7.0, target_modules=["value"], init_weights=True
    )
    options = {"frequencies": 30, "alpha": 7.0, "draw": "all"}
    theirs, linear, ours = both(config, archzoo.FourierFT, True, **options)
    spectrum = theirs.fourierft_spectrum["default"]
    nn.init.normal_(spectrum)
    state = {"coefficients": spectrum.detach(), "entries": theirs.indices["default"]}
    ours.load_state_dict(state)
    expect_equal(theirs, linear, [(spectrum, ours.coefficients)], 1e-6)


@pytest.mark.parametrize("of_input", [True, False])
def test_ia3(of_input):
    names = {"target_modules": ["value"], "feedforward_modules": ["value"] if of_input else []}
    theirs, linear, ours = both(peft.IA3Config(**names), archzoo.IA3, True)
    theirs, linear = theirs.double(), linear.double()
    ours.scale.data = ours.scale.data.double()
    vector = theirs.ia3_l["default"]
    nn.init.normal_(ours.scale)
    vector.data.copy_(ours.scale.view(vector.shape))
    expect_equal(theirs, linear, [(vector, ours.scale)], 1e-12)


# ---------------------------------------------------------------------------- files


def base_model(preset):
    torch.manual_seed(3)
    return archzoo.create_model(preset, vocab_size=20, init_std=0.2).double().eval()


def logits(net, **options):
    with torch.no_grad():
        return net(TOKENS, **options).logits


@pytest.mark.parametrize("preset", TARGETS)
@pytest.mark.parametrize("cls", [archzoo.LoRA, archzoo.DoRA, archzoo.PiSSA, archzoo.MoSLoRA])
def test_peft_reads_what_is_exported_and_its_own_file_comes_back(preset, cls, tmp_path):
    net = archzoo.adapt(base_model(preset), partial(cls, targets=TARGETS[preset], rank=3))
    for _, module in adapter_modules(net):
        for p in module.parameters():
            p.data.add_(0.1 * torch.randn_like(p))
    want = logits(net)
    export_peft(net, tmp_path / "ours")
    wrapped = peft.PeftModel.from_pretrained(base_model(preset), tmp_path / "ours")
    for form in (None, "recurrent"):
        assert relative_error(logits(wrapped.base_model.model, form=form), want) < 1e-12
    assert relative_error(logits(base_model(preset)), want) > 1e-3
    wrapped.save_pretrained(tmp_path / "theirs")
    again = import_peft(base_model(preset), tmp_path / "theirs")
    assert relative_error(logits(again), want) < 1e-12
    if cls in (archzoo.LoRA, archzoo.DoRA):  # bit for bit
        assert torch.equal(logits(again), want)
        for one, two in zip(attached(net), attached(again), strict=True):
            assert one[:2] == (two[0], two[1]._replace(module=one[1].module))
            state = two[2].state_dict()
            assert all(torch.equal(t, state[n]) for n, t in one[2].state_dict().items())
    merged = wrapped.merge_and_unload()
    assert relative_error(logits(merged), want) < 1e-12


@pytest.mark.parametrize(
    "options",
    [
        {"rank_pattern": {"down": 2}, "alpha_pattern": {"down": 5, "blocks.1.mixer.output": 3}},
        {"use_dora": True, "use_rslora": True, "lora_dropout": 0.1},
    ],
)
def test_what_peft_has_trained_is_read(options, tmp_path):
    names = ["query_key_value_gate", "output", "down"]
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=names, **options)
    wrapped = peft.get_peft_model(base_model("retnet_micro"), config)
    learned = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        wrapped(TOKENS).logits.square().mean().backward()
        optimizer.step()
    wrapped.save_pretrained(tmp_path)
    net = import_peft(base_model("retnet_micro"), tmp_path).eval()
    wrapped.eval()
    assert relative_error(logits(net), logits(wrapped)) < 1e-12
    assert relative_error(logits(net), logits(base_model("retnet_micro"))) > 1e-3
    blocks = {place.name for _, place, _ in attached(net)}
    assert blocks == {"query", "key", "value", "gate", "output", "down"}
    assert {module.dropout for _, module in adapter_modules(net)} == {
        options.get("lora_dropout", 0.0)
    }


def test_a_base_that_peft_has_changed_is_refused(tmp_path):
    """Its PiSSA keeps a residual, which an adapter's file does not hold."""
    net = base_model("retnet_micro").float()
    config = lora_config(init_lora_weights="pissa", target_modules=["output"])
    peft.get_peft_model(net, config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'pissa' has changed the base"):
        import_peft(base_model("retnet_micro"), tmp_path)
