"""peft's file format, written and read without peft; tests/extras hold it against the real one."""

import copy
import functools
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import archzoo
from archzoo.adapters.attach import adapter_modules, attached
from archzoo.contract.measure import relative_error
from archzoo.conversion.low_rank import to_lora
from archzoo.conversion.peft import CONFIG, WEIGHTS, export_peft, import_peft

PRESETS = ("transformer_micro", "retnet_micro", "yuan_micro", "skywork_micro")
#: What peft can say of each.
TARGETS = {
    "transformer_micro": ["query", "value", "output", "gate", "up", "down"],
    "retnet_micro": ["query", "key", "value", "gate", "output", "head"],
    "yuan_micro": ["output", "filter_first", "filter_second", "head"],
    "skywork_micro": ["query", "key", "value"],
}
TOKENS = torch.randint(20, (2, 13), generator=torch.Generator().manual_seed(1))


def base_model(preset):
    torch.manual_seed(3)
    return archzoo.create_model(preset, vocab_size=20, init_std=0.2).double().eval()


def adapted(preset, cls=archzoo.LoRA, targets=None, **options):
    """Every parameter of the adapters a little off where it starts, as training would move it."""
    part = functools.partial(cls, targets=targets or TARGETS[preset], **({"rank": 3} | options))
    net = archzoo.adapt(base_model(preset), part)
    draw = torch.Generator().manual_seed(5)
    for _, module in adapter_modules(net):
        for p in module.parameters():
            p.data.add_(0.1 * torch.randn(p.shape, generator=draw, dtype=p.dtype))
    return net


def logits(net):
    with torch.no_grad():
        return net(TOKENS).logits


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("cls", [archzoo.LoRA, archzoo.DoRA])
def test_what_is_written_comes_back_bit_for_bit(preset, cls, tmp_path):
    net = adapted(preset, cls, rank=2, alpha=5.0, rank_stabilised=True)
    export_peft(net, tmp_path)
    again = import_peft(base_model(preset), tmp_path)
    assert torch.equal(logits(again), logits(net))
    want, got = ({p.target.path: a.state_dict() for _, p, a in attached(m)} for m in (net, again))
    assert want.keys() == got.keys()
    for path, state in want.items():
        assert all(torch.equal(tensor, got[path][name]) for name, tensor in state.items()), path
    assert again.config["adapter"]["class_path"] == cls.__name__
    learn = {n for n, p in again.named_parameters() if p.requires_grad}
    assert learn == {n for n, p in net.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("cls", [archzoo.PiSSA, archzoo.MoSLoRA])
def test_its_relatives_are_written_as_loras(cls, tmp_path):
    net = adapted("retnet_micro", cls)
    want = logits(net)
    export_peft(net, tmp_path)
    assert relative_error(logits(import_peft(base_model("retnet_micro"), tmp_path)), want) < 1e-12
    converted = to_lora(net)
    assert converted.config["adapter"]["class_path"] == "LoRA"
    assert converted.config["adapter"]["init_args"]["rank"] == (6 if cls is archzoo.PiSSA else 3)
    assert {type(module) for _, module in adapter_modules(converted)} == {archzoo.LoRA}
    assert relative_error(logits(converted), want) < 1e-12
    archzoo.save_pretrained(tmp_path / "model", converted)
    again, _ = archzoo.from_pretrained(tmp_path / "model")
    assert torch.equal(logits(again.eval()), logits(converted))


def test_the_blocks_of_a_matrix_are_one_of_the_summed_rank(tmp_path):
    """Block diagonal, zeros where nothing is changed, and the norms of the weight for DoRA."""
    net = adapted("transformer_micro", archzoo.DoRA, ["query", "value"], layers=[1])
    export_peft(net, tmp_path)
    settings = json.loads((tmp_path / CONFIG).read_text())
    path = "blocks.1.mixer.query_key_value"
    assert settings["target_modules"] == [path]
    assert settings["r"] == 6
    assert settings["lora_alpha"] == 2 * 16.0
    tensors = load_file(tmp_path / WEIGHTS)
    first, second, magnitude = (
        tensors[f"base_model.model.{path}.{kind}"]
        for kind in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
    )
    linear = net.get_submodule(path)
    query, value = (linear.adapter_modules["default"][name] for name in ("query", "value"))
    assert torch.equal(first, torch.cat([query.first, value.first]))
    assert torch.equal(second[linear.rows("query"), :3], query.second)
    assert torch.equal(second[linear.rows("value"), 3:], value.second)
    assert second.count_nonzero() == query.second.numel() + value.second.numel()
    key = linear.rows("key")
    assert torch.equal(magnitude[key], linear.weight[key].norm(dim=-1))
    assert torch.equal(magnitude[linear.rows("value")], value.magnitude)


def test_ranks_that_differ_between_matrices_are_said_by_module(tmp_path):
    net = adapted("transformer_micro", targets=["query", "value", "down"])
    export_peft(net, tmp_path)
    settings = json.loads((tmp_path / CONFIG).read_text())
    assert settings["r"] == 6
    assert settings["rank_pattern"] == {
        rf"^blocks\.{n}\.feed_forward\.down": 3 for n in range(net.depth)
    }
    assert settings["alpha_pattern"].keys() == settings["rank_pattern"].keys()


def test_one_of_several_is_written_by_its_name(tmp_path):
    net = archzoo.adapt(base_model("retnet_micro"), {"sums": "LoRA", "style": "DoRA"})
    with pytest.raises(ValueError, match="has the adapters sums, style: name the one"):
        export_peft(net, tmp_path)
    with pytest.raises(ValueError, match="no adapter 'sum'; nearest: sums"):
        export_peft(net, tmp_path, "sum")
    export_peft(net, tmp_path, "style")
    again = import_peft(base_model("retnet_micro"), tmp_path)
    assert {type(module) for _, module in adapter_modules(again)} == {archzoo.DoRA}
    with pytest.raises(ValueError, match="no adapter to export"):
        export_peft(base_model("retnet_micro"), tmp_path)


def test_an_adapter_that_has_not_learned_yet_comes_back(tmp_path):
    net = archzoo.adapt(base_model("yuan_micro"), functools.partial(archzoo.LoRA, targets=["head"]))
    export_peft(net, tmp_path)
    again = import_peft(base_model("yuan_micro"), tmp_path)
    (one,), (two,) = ([m for _, m in adapter_modules(n)] for n in (net, again))
    assert torch.equal(one.first, two.first)
    assert one.scale == two.scale


@pytest.mark.parametrize(
    ("preset", "targets", "says"),
    [
        ("yuan_micro", ["down"], "LoRA on blocks.0.feed_forward.experts.down is not exported"),
        ("yuan_micro", ["router_key"], "its weight is read without a call"),
        ("yuan_micro", ["query"], "it is called block by block"),
    ],
)
def test_what_peft_cannot_say_is_refused_by_name(preset, targets, says, tmp_path):
    net = archzoo.adapt(base_model(preset), functools.partial(archzoo.LoRA, targets=targets))
    with pytest.raises(ValueError, match=says):
        export_peft(net, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_methods_and_linears_are_refused_by_name(tmp_path):
    net = archzoo.adapt(base_model("retnet_micro"), "IA3")
    with pytest.raises(ValueError, match="IA3 is not exported to peft: LoRA, DoRA"):
        export_peft(net, tmp_path)

    class Doubled(archzoo.Linear):
        def base_weight(self):
            return 2 * self.weight

    for adapter in ("LoRA", "DoRA"):
        net = archzoo.create_model("retnet_micro", vocab_size=20, linear=Doubled, adapter=adapter)
        if adapter == "LoRA":
            export_peft(net, tmp_path)
            continue
        with pytest.raises(ValueError, match=r"Doubled has a base_weight\(\) of its own"):
            export_peft(net, tmp_path)


def rewritten(directory, *, settings=None, tensors=None, metadata=None):
    """The files with some of what they say changed, as peft or a stranger would write them."""
    config = json.loads((directory / CONFIG).read_text()) | (settings or {})
    (directory / CONFIG).write_text(json.dumps(config))
    held = load_file(directory / WEIGHTS) | (tensors or {})
    with safe_open(directory / WEIGHTS, "pt") as file:
        metadata = file.metadata() if metadata is None else metadata
    held = {name: tensor for name, tensor in held.items() if tensor is not None}
    save_file(held, directory / WEIGHTS, metadata=metadata)


A = "base_model.model.blocks.0.mixer.output.lora_A.weight"
B = "base_model.model.blocks.0.mixer.output.lora_B.weight"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"settings": {"peft_type": "VERA"}}, "peft_type 'VERA' is not read"),
        ({"settings": {"bias": "all"}}, "'bias' = 'all' has no equal here"),
        ({"settings": {"modules_to_save": ["head"]}}, "'modules_to_save' = .* has no equal"),
        ({"settings": {"use_bdlora": {"n": 2}}}, "'use_bdlora' = .* has no equal"),
        ({"settings": {"init_lora_weights": "pissa"}}, "'pissa' has changed the base"),
        ({"settings": {"lora_alpha": "8"}}, "lora_alpha = '8' must be a number"),
        ({"settings": {"alpha_pattern": {"(a+)+b": 1}}}, "is a regular expression: paths are read"),
        ({"settings": {"use_dora": True}}, "are expected"),
        (
            {"tensors": {A: None}},
            "has lora_B.weight where lora_A.weight, lora_B.weight are expected",
        ),
        ({"tensors": {A: torch.ones(3, 5)}}, r"has shape \(3, 5\) where \(rank, 64\) is expected"),
        ({"tensors": {A: torch.ones(2, 64)}}, "has A of rank 2 and B of rank 3"),
        ({"tensors": {A: torch.ones(3, 64).int()}}, "not a floating-point dtype"),
        ({"tensors": {"a.lora_embedding_A": torch.ones(1)}}, "does not belong to a LoRA or DoRA"),
        (
            {"tensors": {A.replace("output", "outptu"): torch.ones(3, 64)}},
            "the model has no Linear 'blocks.0.mixer.outptu'; nearest: blocks.0.mixer.output",
        ),
        ({"metadata": {"archzoo_base": "{"}}, "archzoo_base is damaged"),
    ],
)
def test_files_that_say_something_else_are_refused_in_a_line(change, says, tmp_path):
    export_peft(adapted("retnet_micro", targets=["output"]), tmp_path)
    rewritten(tmp_path, **change)
    net = base_model("retnet_micro")
    with pytest.raises(ValueError, match=says) as caught:
        import_peft(net, tmp_path)
    assert "\n" not in str(caught.value)
    assert not list(adapter_modules(net))


def test_another_base_and_missing_files_are_refused(tmp_path):
    net = adapted("retnet_micro")
    export_peft(net, tmp_path)
    other = archzoo.create_model("retnet_micro", vocab_size=20).double()
    with pytest.raises(ValueError, match="belongs to another base"):
        import_peft(other, tmp_path)
    rewritten(tmp_path, metadata={"format": "pt"})  # peft's own say nothing of it
    assert torch.equal(logits(import_peft(base_model("retnet_micro"), tmp_path)), logits(net))
    with pytest.raises(ValueError, match="has adapters already"):
        import_peft(net, tmp_path)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=f"holds no {WEIGHTS}"):
        import_peft(other, tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no directory"):
        import_peft(other, tmp_path / "none")
    (tmp_path / CONFIG).unlink()
    with pytest.raises(FileNotFoundError, match=f"holds no {CONFIG}"):
        import_peft(other, tmp_path)


def test_an_adapter_of_a_whole_matrix_goes_to_each_block(tmp_path):
    """As peft trains it: one A for all rows; ranks, alphas and dropout that differ."""
    net = adapted("transformer_micro", targets=["query", "down"])
    export_peft(net, tmp_path)
    draw = torch.Generator().manual_seed(9)
    base = base_model("transformer_micro")
    tensors = {}
    want = copy.deepcopy(base)
    for n, (rank, alpha) in enumerate([(4, 8.0), (2, 6.0)]):
        path = f"blocks.{n}.mixer.query_key_value"
        linear = want.get_submodule(path)
        first = torch.randn(rank, linear.in_features, generator=draw, dtype=torch.float64)
        second = torch.randn(linear.out_features, rank, generator=draw, dtype=torch.float64)
        tensors |= {
            f"base_model.model.{path}.lora_A.weight": first,
            f"base_model.model.{path}.lora_B.weight": second,
        }
        linear.weight.data += alpha / rank**0.5 * second @ first
    names = list(load_file(tmp_path / WEIGHTS))
    rewritten(
        tmp_path,
        settings={
            "use_rslora": True,
            "lora_alpha": 8,
            "lora_dropout": 0.1,
            "alpha_pattern": {"blocks.1.mixer.query_key_value": 6},
        },
        tensors=dict.fromkeys(names) | tensors,
    )
    import_peft(base, tmp_path)
    assert relative_error(logits(base), logits(want)) < 1e-12
    assert list(base.config["adapters"]) == ["default", "default_2"]
    assert {module.dropout for _, module in adapter_modules(base)} == {0.1}


def test_narrow_files_stay_as_exact_as_they_were(tmp_path):
    """bfloat16 tensors on a float32 model, and float64 ones keep their digits."""
    net = adapted("retnet_micro")
    export_peft(net, tmp_path)
    single = import_peft_as(base_model("retnet_micro").float(), tmp_path)
    assert {p.dtype for _, m in adapter_modules(single) for p in m.parameters()} == {torch.float64}
    assert relative_error(logits(single).double(), logits(net)) < 1e-5


def import_peft_as(net, directory):
    rewritten(directory, metadata={"format": "pt"})  # the base is another by its digest
    return import_peft(net, directory)


def test_autocast_rounds_nothing_that_is_converted():
    net = base_model("retnet_micro").float()
    archzoo.adapt(net, functools.partial(archzoo.MoSLoRA, targets=["up"], rank=2))
    for _, module in adapter_modules(net):
        torch.nn.init.normal_(module.second)
    want = logits(net)
    with torch.autocast("cpu", torch.bfloat16):
        to_lora(net)
    assert relative_error(logits(net), want) < 1e-6


def test_experts_and_several_adapters_are_converted_by_name():
    net = base_model("yuan_micro")
    part = functools.partial(archzoo.PiSSA, targets=["up", "router_key"], rank=3, alpha=4.0)
    mixed = functools.partial(archzoo.MoSLoRA, targets=["up"], rank=2, dropout=0.1)
    archzoo.adapt(net, {"one": part, "two": "DoRA", "three": mixed})
    for _, module in adapter_modules(net):
        for p in module.parameters():
            p.data.add_(0.1 * torch.randn_like(p))
    want = logits(net)
    before = dict(net.config["adapters"])
    assert relative_error(logits(to_lora(net)), want) < 1e-12
    after = net.config["adapters"]
    assert after["two"] == before["two"]
    assert after["one"]["init_args"] == {"targets": ["up", "router_key"], "rank": 6, "alpha": 8.0}
    assert after["three"]["init_args"]["dropout"] == 0.1
    learn = {n for n, p in net.named_parameters() if p.requires_grad}
    assert learn == {f"{n}.{p}" for n, m in adapter_modules(net) for p, _ in m.named_parameters()}


def test_the_factors_of_a_pissa_need_room():
    net = archzoo.adapt(
        base_model("retnet_micro"), functools.partial(archzoo.PiSSA, targets=["output"], rank=20)
    )
    before = net.config["adapter"]
    with pytest.raises(ValueError, match=r"LoRA: rank=40 must .* at most 32 for blocks.0.mixer"):
        to_lora(net)
    assert net.config["adapter"] == before
    assert isinstance(net.blocks[0].mixer.output.adapter_modules["default"]["output"], nn.Module)
