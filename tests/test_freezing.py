"""What is frozen stays bit for bit, and what is unfrozen trains: `fit --model.freeze`."""

import copy
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from families import micro
from torch.nn.utils import parameters_to_vector

import archzoo
from archzoo.checkpoint import read_safely
from archzoo.cli import main
from archzoo.freezing import Freezing, is_frozen, parameters_called
from archzoo.training.optim import decay_groups

MIXTURE = {
    "class_path": "MixtureOfExperts",
    "init_args": {
        "experts": 4,
        "adaptive": True,
        "coefficient": 1.0,
        "balance_over": "ranks",
        "router": {"class_path": "LinearRouter", "init_args": {"bias_rate": 0.01}},
    },
}
RUN = """
seed_everything: 0
model: {learning_rate: 0.01, warmup_steps: 2}
data: {class_path: Addition, init_args: {digits: 1, batch_size: 8, validation_examples: 8}}
trainer: {accelerator: cpu, max_steps: 4, limit_val_batches: 0, log_every_n_steps: 1}
"""


STEADY = ["--model.schedule=constant", "--model.warmup_steps=1"]  # however many steps are asked
DDP = ["--trainer.devices=2", "--trainer.strategy=ddp"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A trained mixture of experts, with biases and coefficients that have moved."""
    directory = tmp_path_factory.mktemp("base")
    (directory / "run.yaml").write_text(RUN)
    settings = ["--model.preset=skywork_micro", f"--model.feed_forward={json.dumps(MIXTURE)}"]
    root = f"--trainer.default_root_dir={directory}"
    assert main(["fit", "--config", str(directory / "run.yaml"), *settings, root]) == 0
    return directory / "run" / "last.ckpt"


@pytest.fixture
def fit(base, tmp_path, monkeypatch):
    """`archzoo fit` from the base's weights; hands back the checkpoint."""
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(RUN)
    shutil.copy(base, "base.ckpt")

    def run(name, *arguments, weights=True):
        start = ["--model.weights=base.ckpt"] if weights else []
        assert main(["fit", "--config", "run.yaml", "--name", name, *start, *arguments]) == 0
        return read_safely(f"runs/{name}/last.ckpt")

    return run


def changed(before, after):
    """The names of a checkpoint's tensors that are not what they were."""
    old, new = before["state_dict"], after["state_dict"]
    return {n.removeprefix("decoder.") for n in old if not torch.equal(old[n], new[n])}


def same(one, other):
    """Whether two parts of checkpoints are equal, bit for bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def assert_equal(one, other):
    """Weights, optimizer and schedule of two checkpoints."""
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert same(one[part], other[part]), part


# ---------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("name", "prefixes"),
    [
        ("top.0", ["norm.", "head."]),
        ("top.1", ["blocks.1.", "norm.", "head."]),
        ("bottom.1", ["embedding.", "blocks.0."]),
        ("blocks.1", ["blocks.1."]),
        ("norm", ["norm."]),
        ("embedding", ["embedding."]),
        ("blocks.0.mixer.output", ["blocks.0.mixer.output."]),
        ("experts.down", [f"blocks.{n}.feed_forward.experts.down." for n in (0, 1)]),
        ("router", [f"blocks.{n}.feed_forward.router." for n in (0, 1)]),
        ("all", [""]),
    ],
)
def test_names_stand_for_parts(name, prefixes):
    net = micro("yuan_micro")
    every = [path for path, _ in net.named_parameters()]
    assert parameters_called(net, name) == {p for p in every if p.startswith(tuple(prefixes))}


def test_names_are_whole_words():
    net = micro("yuan_micro")
    norms = parameters_called(net, "norms")
    assert "blocks.0.mixer.filter_norm.weight" in norms and "norm.weight" in norms
    assert len(norms) == 2 * 3 + 1
    assert parameters_called(net, "bias") == {n for n, _ in net.named_parameters() if "bias" in n}
    with pytest.raises(ValueError, match="nothing here is called 'rout'; nearest: router"):
        parameters_called(net, "rout")


def test_a_tied_head_is_the_table():
    net = micro(tie_weights=True)
    assert "embedding.weight" in parameters_called(net, "embedding")
    assert parameters_called(net, "top.0") == {"norm.weight"}
    Freezing(net, ["bottom.0"]).apply(net, 0)
    assert not net.head.weight.requires_grad and net.blocks[0].mixer.output.weight.requires_grad
    with pytest.raises(ValueError, match="unfreeze: the head is the embedding's table"):
        Freezing(micro(tie_weights=True), ["all"], ["head"])
    stages = Freezing(micro(tie_weights=True), ["all"], every=1).stages
    assert stages[0] == {"norm.weight"} and stages[-1] == {"embedding.weight"}


def test_layer_by_layer_goes_from_the_top():
    net = micro("transformer_micro", depth=3)
    freezing = Freezing(net, ["all"], every=10)
    tops = [min(stage).split(".")[:2] for stage in freezing.stages]
    assert tops[0] == ["head", "weight"] and tops[-1] == ["embedding", "weight"]
    assert tops[1:-1] == [["blocks", "2"], ["blocks", "1"], ["blocks", "0"]]
    assert [freezing.stage_at(step) for step in (0, 9, 10, 29, 30, 1000)] == [0, 0, 1, 2, 3, 4]
    # Of a part that is frozen, that part alone, a step after the start.
    assert [len(s) > 0 for s in Freezing(net, ["bottom.1"], every=5).stages] == [True] * 3
    assert Freezing(net, ["bottom.1"], every=5).stages[2] == {"embedding.weight"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((["mixr"],), "freeze: nothing here is called 'mixr'; nearest: mixer"),
        ((["blocks.7"],), "nothing here is called 'blocks.7'; nearest: blocks.1"),
        ((["all"], ["heed"]), "unfreeze: nothing here is called 'heed'; nearest: head"),
        ((["query"],), "'query' is a block of rows of blocks.0.mixer.query_key_value_gate"),
        ((["blocks.0.mixer.rotary"],), "has no parameters"),
        ((["top.3"],), "top.3: there are 2 blocks"),
        ((["all"],), "leaves nothing to train: give an adapter, or say by unfreeze"),
        ((["bottom.2", "top.0"],), "leaves nothing to train"),
        ((["bottom.1"], ["head"]), "'head' is not frozen"),
        (([], ["head"]), "'head' is not frozen"),
        (([], [], 5), "unfreeze_every=5: nothing is frozen; say freeze: all"),
    ],
)
def test_what_would_do_nothing_is_refused_in_a_line(arguments, says):
    net = micro()
    with pytest.raises(ValueError, match=re.escape(says)) as error:
        Freezing(net, *arguments)
    assert "\n" not in str(error.value)
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_beside_an_adapter_only_unfreezing_means_something():
    net = archzoo.adapt(micro(), "LoRA")
    with pytest.raises(ValueError, match="an adapter freezes all of the base: omit freeze"):
        Freezing(net, ["bottom.1"])
    learned = {name for name, p in net.named_parameters() if p.requires_grad}
    Freezing(net, ["all"], ["norms", "head"]).apply(net, 0)
    assert {n for n, p in net.named_parameters() if p.requires_grad} == learned | {
        name for name in dict(net.named_parameters()) if "norm." in name or name == "head.weight"
    }


# ---------------------------------------------------------------------------- as it trains


@pytest.mark.parametrize(
    ("arguments", "moves"),
    [
        (["--model.freeze=all", "--model.unfreeze=top.1"], ("blocks.1.", "norm.", "head.")),
        (["--model.freeze=bottom.1"], ("blocks.1.", "norm.", "head.")),
        (["--model.freeze=[all]", "--model.unfreeze=[head,mixer.output]"], ("head.", "output.")),
        (
            ["--model.freeze=feed_forward", "--trainer.accumulate_grad_batches=2"],
            ("embedding.", "mixer", "feed_forward_norm.", "norm.", "head."),
        ),
        (
            ["--model.freeze=bottom.1", "--model.activation_checkpointing=true"],
            ("blocks.1.", "norm.", "head."),
        ),
        (
            ["--model.freeze=router"],
            ("experts.", "embedding.", "mixer", "feed_forward_norm.", "norm.", "head."),
        ),
    ],
)
def test_what_is_frozen_stays_bit_for_bit(fit, base, capsys, arguments, moves):
    """Experts' biases and balancing coefficients too; the optimizer holds what is trained."""
    before, after = read_safely(base), fit("x", *arguments)
    names = [name.removeprefix("decoder.") for name in before["state_dict"]]
    with_moves = {n for n in names if any(f".{m}" in f".{n}" for m in moves)}
    moving = changed(before, after)
    assert moving == with_moves
    frozen_buffers = [n for n in names if n.endswith(("expert_bias", "alpha")) and n not in moving]
    assert frozen_buffers  # of one block at least
    (optimizer,) = after["optimizer_states"]
    parameters = [n for n in with_moves if not n.endswith(("expert_bias", "alpha"))]
    assert len(optimizer["state"]) == len(parameters)
    assert sum(len(group["params"]) for group in optimizer["param_groups"]) == len(parameters)
    learned = sum(before["state_dict"][f"decoder.{name}"].numel() for name in parameters)
    assert f"of which {learned:,} learn" in capsys.readouterr().out


def test_settings_say_it_and_no_models_own_file(fit, tmp_path):
    after = fit("x", "--model.freeze=bottom.1")
    assert after["hyper_parameters"]["freeze"] == ["bottom.1"]
    assert "freeze: bottom.1" in Path("runs/x/config.yaml").read_text()
    net, _ = archzoo.from_pretrained("runs/x/last.ckpt")
    assert "freeze" not in net.config
    archzoo.save_pretrained("own", net)
    assert "freeze" not in Path("own/config.json").read_text()
    # The same settings run again, and a checkpoint alone is resumed by them.
    assert main(["fit", "--config", "runs/x/config.yaml", "--name", "again"]) == 0
    assert_equal(after, read_safely("runs/again/last.ckpt"))
    Path("runs/x/config.yaml").unlink()
    assert main(["fit", "--ckpt_path", "runs/x/last.ckpt", "--trainer.max_steps=6"]) == 0
    assert main(["test", "--ckpt_path", "runs/x/last.ckpt"]) == 0


def test_other_parameters_cannot_be_resumed(fit, capsys):
    fit("x", "--model.freeze=bottom.1")
    capsys.readouterr()
    resumed = ["--ckpt_path=runs/x/last.ckpt", "--trainer.max_steps=6"]
    assert main(["fit", *resumed, "--model.freeze=bottom.0"]) == 1
    error = capsys.readouterr().err
    assert "the checkpoint's run has freeze=['bottom.1'], and here it is ['bottom.0']" in error


def test_random_weights_that_stay_are_spoken_of(fit, capfd):
    fit("x", "--model.preset=retnet_micro", "--model.freeze=bottom.1", weights=False)
    assert "keeps the random values that it was drawn with" in capfd.readouterr().err
    fit("y", "--model.freeze=bottom.1")
    assert "random" not in capfd.readouterr().err


def test_a_head_is_trained_beside_an_adapter(fit, base):
    """The checkpoint leaves out what of the base has not moved, and is read and resumed with it."""
    before = read_safely(base)["state_dict"]
    after = fit("x", "--model.adapter=LoRA", "--model.unfreeze=head")
    held, head = after["state_dict"], "decoder.head.weight"
    moved = {name for name in held.keys() & before if not torch.equal(held[name], before[name])}
    assert moved == {head}
    assert not any("blocks" in n and n.endswith("weight") for n in held.keys() & before)
    adapters = held.keys() - before
    assert len(after["optimizer_states"][0]["state"]) == len(adapters) + 1
    read = archzoo.from_pretrained("runs/x/last.ckpt")[0].state_dict()
    assert all(torch.equal(read[name.removeprefix("decoder.")], held[name]) for name in held)
    whole = fit("whole", "--model.adapter=LoRA", "--model.unfreeze=head", *STEADY)
    fit("part", "--model.adapter=LoRA", "--model.unfreeze=head", *STEADY, "--trainer.max_steps=2")
    assert main(["fit", "--ckpt_path=runs/part/last.ckpt", "--trainer.max_steps=4"]) == 0
    assert_equal(whole, read_safely("runs/part/last.ckpt"))


# ---------------------------------------------------------------------------- layer by layer

GRADUAL = ["--model.freeze=all", "--model.unfreeze_every=2", "--trainer.max_steps=8"]


def test_blocks_are_unfrozen_over_the_steps(fit, base, capfd):
    before = read_safely(base)
    seen = [changed(before, fit(f"of{n}", *GRADUAL, f"--trainer.max_steps={n}")) for n in (2, 4, 6)]
    assert seen[0] == {"norm.weight", "head.weight"}
    assert {name.split(".")[1] for name in seen[1] - seen[0]} == {"1"}
    assert {name.split(".")[1] for name in seen[2] - seen[1]} == {"0"}
    said = capfd.readouterr()
    assert "in the end" in said.out
    assert "step 2: " in said.err and "step 4: " in said.err
    after = fit("whole", *GRADUAL)
    assert "embedding.weight" in changed(before, after)
    (optimizer,) = after["optimizer_states"]
    steps = {int(entry["step"]) for entry in optimizer["state"].values()}
    assert steps == {8, 6, 4, 2}
    assert len({group["lr"] for group in optimizer["param_groups"]}) == 1
    assert [group["weight_decay"] for group in optimizer["param_groups"]] == [0.1, 0.0]


@pytest.mark.parametrize(("accumulate", "at"), [(1, 2), (2, 3)])
def test_a_run_resumes_in_the_middle_of_unfreezing(fit, accumulate, at):
    """At the step at which a block joins, and between two."""
    micro_batches = [f"--trainer.accumulate_grad_batches={accumulate}", *STEADY]
    whole = fit("whole", *GRADUAL, *micro_batches)
    part = fit("part", *GRADUAL, *micro_batches, f"--trainer.max_steps={at}")
    (optimizer,) = part["optimizer_states"]
    held = sum(len(group["params"]) for group in optimizer["param_groups"])
    assert len(optimizer["state"]) < held  # moments of what is trained, and of nothing else
    assert main(["fit", "--ckpt_path=runs/part/last.ckpt", "--trainer.max_steps=8"]) == 0
    assert_equal(whole, read_safely("runs/part/last.ckpt"))


def test_unfreezing_beside_an_adapter(fit, base):
    before, after = read_safely(base), fit("x", *GRADUAL, "--model.adapter=LoRA")
    assert "embedding.weight" in changed(before, after)


def test_an_unfrozen_block_is_compiled_alone(monkeypatch):
    """Blocks that are frozen and blocks that are trained: two graphs, whatever the depth."""
    net, graphs = micro("transformer_micro", depth=4), []
    tokens = torch.randint(64, (2, 9))

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    plain = copy.deepcopy(net)
    freezing = Freezing(net, ["all"], every=1)
    torch._dynamo.reset()
    net.compile_blocks(backend=backend)
    for stage in range(len(freezing.stages)):
        for model in (net, plain):
            freezing.apply(model, stage)
            model.zero_grad()
            model.train()(tokens).logits.square().mean().backward()
        for mine, theirs in zip(net.parameters(), plain.parameters(), strict=True):
            assert (mine.grad is None) == (theirs.grad is None)
            if mine.grad is not None:
                torch.testing.assert_close(mine.grad, theirs.grad)
    assert len(graphs) <= 4


def test_a_frozen_part_moves_nothing_after_a_step():
    net = micro("skywork_micro", feed_forward=MIXTURE)
    sums = [{"assignments": torch.tensor([9, 1, 1, 1])} for _ in net.blocks]
    Freezing(net, ["blocks.0", "blocks.1.feed_forward.experts"]).apply(net, 0)
    lower, upper = (block.feed_forward for block in net.blocks)
    assert is_frozen(lower) and not is_frozen(upper)
    net.after_step(sums)
    assert not lower.router.expert_bias.any() and upper.router.expert_bias.any()
    upper.router.expert_bias.zero_()
    net = archzoo.adapt(micro("skywork_micro", feed_forward=MIXTURE), "LoRA")
    net.after_step(sums)
    assert not any(block.feed_forward.router.expert_bias.any() for block in net.blocks)


def test_joining_parameters_are_in_their_groups_from_the_start():
    net = micro()
    freezing = Freezing(net, ["all"], every=1)
    freezing.apply(net, 0)
    whole = [[id(p) for p in group["params"]] for group in decay_groups(micro(), 0.1)]
    groups = decay_groups(net, 0.1, freezing.joining(net))
    assert [len(group["params"]) for group in groups] == [len(group) for group in whole]
    assert parameters_to_vector(groups[0]["params"]).numel() > 0


# ---------------------------------------------------------------------------- two processes


def test_two_processes_train_as_one(fit, base, programs):
    """DDP looks only at what learns when it is made: the others' gradients are exchanged too."""
    exact = [*GRADUAL, "--trainer.precision=64-true"]
    one = fit("one", *exact)
    root = str(Path(archzoo.__file__).parent.parent)
    command = [programs / "python", "-m", "archzoo", "fit", "--config", "run.yaml", "--name", "two"]
    done = subprocess.run(
        [*command, "--model.weights=base.ckpt", *exact, *DDP],
        env=os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    two = read_safely("runs/two/last.ckpt")
    assert changed(read_safely(base), one) == changed(read_safely(base), two)
    for name, tensor in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][name], tensor, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--model.freeze=[all]", "--model.unfreeze=[top.1]"], ["top.1"]),
        (["--model.freeze=[embedding]", "--trainer.max_steps=1"], ["top.2"]),
        (["--model.freeze=[all]", "--model.unfreeze_every=2"], ["top.1"]),  # of 4 steps: 2 stages
        (["--model.adapter=LoRA", "--model.unfreeze=[norms]"], ["norms"]),
        ([], None),
    ],
)
def test_show_counts_what_a_run_has_trained(fit, capsys, arguments, names):
    fit("run", *arguments)
    capsys.readouterr()
    assert main(["show", "runs/run"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "trainable" in line]
    if names is None:
        assert lines == []
        return
    model, _ = archzoo.from_pretrained(
        "runs/run", base="base.ckpt" if "LoRA" in arguments else None
    )
    learned = set().union(*(parameters_called(model, name) for name in names))
    learned |= {name for name, _ in model.named_parameters() if ".adapter_modules." in name}
    count = sum(p.numel() for name, p in model.named_parameters() if name in learned)
    assert [line.split()[3] for line in lines] == [f"{count:,}"]


@pytest.mark.parametrize(
    ("name", "value"), [("freeze", 3), ("unfreeze", [3]), ("unfreeze_every", "x")]
)
def test_show_refuses_freezing_of_another_type(base, tmp_path, capsys, name, value):
    content = torch.load(base, weights_only=True)
    content["hyper_parameters"][name] = value
    torch.save(content, tmp_path / "wrong.ckpt")
    assert main(["show", str(tmp_path / "wrong.ckpt")]) == 1
    assert f"wrong.ckpt: {name}={value!r} is not valid: it takes" in capsys.readouterr().err


def test_show_reads_runs_from_before_freezing(base, tmp_path, capsys):
    content = torch.load(base, weights_only=True)
    for name in ("freeze", "unfreeze", "unfreeze_every"):
        del content["hyper_parameters"][name]
    torch.save(content, tmp_path / "older.ckpt")
    assert main(["show", str(tmp_path / "older.ckpt")]) == 0
    assert "trainable" not in capsys.readouterr().out
