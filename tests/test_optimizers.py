"""`--optimizer` and the schedules: what moves which weights, and that resuming changes nothing."""

import re
import shutil
import sys
import types
from pathlib import Path

import lightning
import pytest
import torch
from test_freezing import assert_equal
from test_ranks import DDP, together

import archzoo
from archzoo.checkpoint import read_safely
from archzoo.cli import main
from archzoo.training.module import LanguageModel
from archzoo.training.optim import learning_rate_schedule
from archzoo.training.optimizers import build_optimizer, describe_optimizer, find_optimizer

RUN = """
model: {preset: retnet_micro, learning_rate: 5.0e-3, warmup_steps: 2}
data: {class_path: Addition, init_args: {digits: 2, batch_size: 4, validation_examples: 8}}
trainer: {accelerator: cpu, max_steps: 6, log_every_n_steps: 1, limit_val_batches: 0}
"""
SETTINGS = {"learning_rate": 0.01, "weight_decay": 0.1, "betas": (0.9, 0.95)}


@pytest.fixture
def fit(tmp_path, monkeypatch):
    """`archzoo fit` in an empty directory: a function of the run's name, its last checkpoint."""
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(RUN)

    def run(name, *arguments):
        assert main(["fit", "--config", "run.yaml", "--name", name, *arguments]) == 0
        return read_safely(f"runs/{name}/last.ckpt")

    return run


@pytest.fixture
def own(monkeypatch):
    """A module of one's own with an optimizer, Sign, and a callback that keeps a checkpoint."""

    class Sign(torch.optim.Optimizer):
        def __init__(self, params, lr=1e-3, weight_decay=0.0, scale=1.0):
            super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "scale": scale})

        def step(self, closure=None):
            with torch.enable_grad():
                loss = closure()
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.data -= group["lr"] * group["scale"] * parameter.grad.sign()
            return loss

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 4:
            shutil.copy(Path(trainer.default_root_dir, "last.ckpt"), "half.ckpt")

    module = types.ModuleType("own")
    Sign.__module__, Sign.__qualname__ = "own", "Sign"
    module.Sign = Sign
    keeps = {"__module__": "own", "on_train_batch_end": on_train_batch_end}
    module.Keep = type("Keep", (lightning.Callback,), keeps)
    monkeypatch.setitem(sys.modules, "own", module)
    return module


def moved_once(net, optimizer):
    """What one step with drawn gradients changes, and those gradients, by parameter."""
    generator = torch.Generator().manual_seed(0)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    for parameter in net.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    gradients = {name: p.grad.clone() for name, p in net.named_parameters()}
    optimizer.step()
    return before, gradients, {name: p.detach() for name, p in net.named_parameters()}


def by_torch(cls, weight, gradient, **options):
    parameter = torch.nn.Parameter(weight.clone())
    parameter.grad = gradient.clone()
    cls([parameter], **options).step()
    return parameter.detach()


def test_muon_sees_each_block_and_each_expert_and_adamw_the_rest():
    net = archzoo.create_model("yuan_micro", vocab_size=16, depth=1)
    before, gradients, after = moved_once(
        net, build_optimizer(describe_optimizer("Muon"), net, **SETTINGS)
    )
    muon = {"lr": 0.01, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    linears = {
        f"{path}.weight": module.blocks
        for path, module in net.blocks.named_modules(prefix="blocks")
        if isinstance(module, archzoo.Linear)
    }
    stacks = [name for name in linears if before[name].dim() == 3]
    several = [name for name, blocks in linears.items() if len(blocks) > 1]
    assert stacks and several  # experts, and query_key of attention
    for name, weight in before.items():
        if name in linears:
            expected = after[name].clone()
            pieces = [t.unbind() if t.dim() == 3 else [t] for t in (weight, gradients[name])]
            targets = expected.unbind() if expected.dim() == 3 else [expected]
            for target, matrix, gradient in zip(targets, *pieces, strict=True):
                sizes = list(linears[name].values())
                moved = [
                    by_torch(torch.optim.Muon, *pair, **muon)
                    for pair in zip(matrix.split(sizes), gradient.split(sizes), strict=True)
                ]
                target.copy_(torch.cat(moved))
        else:
            decays = weight.dim() >= 2 and name == "head.weight"
            options = {"lr": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.1 if decays else 0.0}
            expected = by_torch(torch.optim.AdamW, weight, gradients[name], **options)
        if name.endswith(("convolution.weight", "filter.weight")):  # no Linear, and it decays
            continue
        assert torch.equal(after[name], expected), name


def test_muon_leaves_adapters_to_adamw():
    net = archzoo.create_model("transformer_micro", vocab_size=16)
    net = archzoo.adapt(net, archzoo.LoRA(rank=2))
    optimizer = build_optimizer(describe_optimizer("Muon"), net, **SETTINGS)
    assert all(group["blocks"] is None for group in optimizer.param_groups)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--optimizer=Muon", "--optimizer.ns_steps=3"],
        ["--optimizer", "SGD", "--optimizer.momentum", "0.9", "--model.schedule=wsd"],
        ["--model.optimizer=own.Sign", "--optimizer.scale=0.1", "--import=own"],
    ],
    ids=["Muon", "SGD", "own"],
)
def test_resumed_is_the_same_run(fit, own, arguments):
    whole = fit(
        "whole",
        *arguments,
        "--checkpoint.every_n_steps=3",
        "--trainer.callbacks=own.Keep",
        "--import=own",
    )
    again = fit("again", *arguments, "--ckpt_path=half.ckpt")
    assert read_safely("half.ckpt")["global_step"] == 3
    assert_equal(whole, again)
    # config.yaml keeps the choice, and what evaluates needs no optimizer.
    del sys.modules["own"].Sign
    shutil.copytree("runs/again", "copied")
    assert main(["test", "--ckpt_path=copied/last.ckpt", "--data.test_examples=8"]) == 0


def test_the_run_s_own_file_says_which_optimizer(fit):
    first = fit("first", "--optimizer=SGD", "--optimizer.momentum=0.5", "--trainer.max_steps=2")
    spec = {"class_path": "SGD", "init_args": {"momentum": 0.5}}
    assert first["hyper_parameters"]["optimizer"] == spec
    given = ["fit", "--config", "runs/first/config.yaml", "--name", "second"]
    assert main([*given, "--trainer.max_steps=2"]) == 0
    second = read_safely("runs/second/last.ckpt")
    assert_equal(first, second)


@pytest.mark.slow  # some 10 s
def test_two_processes_are_one(fit):
    muon = ["--optimizer=Muon", "--trainer.max_steps=3", "--trainer.precision=64-true"]
    together("two", *muon, *DDP)
    one, two = fit("one", *muon), read_safely("runs/two/last.ckpt")
    for name, weight in one["state_dict"].items():
        # Newton-Schulz is bfloat16: what differs by rounding there moves by some 1e-4.
        torch.testing.assert_close(two["state_dict"][name], weight, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("Mun", "there is no optimizer 'Mun'; nearest: Muon"),
        ("own.Sign2", "'own.Sign2' is not there"),
        ("own.Keep", "'own.Keep' is not an Optimizer"),
        ("his.Lion", "give --import his"),
        (["SGD", "lr", 1], "lr is the setting model.learning_rate"),
        (["SGD", "momentun", 1], "no argument 'momentun'; nearest: momentum"),
        (["SGD", "momentum", "x"], "momentum='x' is not float"),
        ("LBFGS", "LBFGS computes the loss several times a step"),
        (3, "optimizer=3 is not an optimizer"),
        ({"class_path": "SGD", "momentum": 1}, "momentum stands beside class_path"),
    ],
)
def test_what_is_wrong_with_an_optimizer(own, given, said):
    if isinstance(given, list):
        given = {"class_path": given[0], "init_args": dict([given[1:]])}
    with pytest.raises(ValueError, match=re.escape(said)):
        find_optimizer(describe_optimizer(given))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--optimizer Mun", "there is no optimizer 'Mun'; nearest: Muon"),
        ("--optimizer.momentum 1", "needs the optimizer too"),
        ("--optimizer", "--optimizer needs a value"),
        ("--model.decay_fraction 0", "decay_fraction=0.0 must lie in (0, 1]"),
        ("--model.schedule wds", "model.schedule: 'wds' is not one of 'cosine', 'wsd', 'constant'"),
    ],
)
def test_what_is_wrong_is_one_line(fit, capsys, arguments, said):
    assert main(["fit", "--config", "run.yaml", *arguments.split()]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and said in error, error


def test_another_optimizer_does_not_resume(fit, capsys):
    fit("run", "--trainer.max_steps=2")
    given = ["fit", "--config", "run.yaml", "--ckpt_path", "runs/run/last.ckpt"]
    assert main([*given, "--name=run", "--optimizer=Muon"]) == 1
    assert (
        "the checkpoint's run has optimizer=AdamW, and here it is Muon" in capsys.readouterr().err
    )


def test_optimizers_by_class_name_and_plain_data():
    assert describe_optimizer("AdamW") is None and describe_optimizer(None) is None
    spec = {"class_path": "SGD", "init_args": {}}
    assert describe_optimizer(torch.optim.SGD)["class_path"].endswith("SGD")
    assert describe_optimizer("torch.optim.SGD") == spec == describe_optimizer("SGD")
    assert find_optimizer(describe_optimizer("torch.optim.Muon")).__module__.startswith("archzoo")
    module = LanguageModel("retnet_micro", vocab_size=8, optimizer="SGD")
    assert module.hyper_parameters()["optimizer"] == spec


def test_wsd_is_stable_and_then_falls_along_a_line():
    factor = learning_rate_schedule(10, 100, 0.1, "wsd", 0.2)
    assert [factor(n) for n in (0, 9, 10, 79, 80)] == [0.1, 1, 1, 1, 1]
    assert factor(90) == pytest.approx(0.55) and factor(100) == factor(200) == pytest.approx(0.1)
    longer = learning_rate_schedule(10, 1000, 0.1, "wsd", 0.2)
    assert [factor(n) for n in range(80)] == [longer(n) for n in range(80)]
