"""ZeRO-1: ranks that share the optimizer's state are one process, and hold a part each."""

import types
from pathlib import Path

import pytest
import torch
from test_ranks import DDP, assert_same, directory, together
from torch.testing._internal.distributed.fake_pg import FakeStore

import archzoo
from archzoo.checkpoint import directory_of, locate, read_safely
from archzoo.cli import main
from archzoo.training import deepspeed, ranks
from archzoo.training.module import LanguageModel
from archzoo.training.optimizers import build_optimizer, describe_optimizer

__all__ = ["directory"]  # a fixture
ZERO = ["--trainer.devices=2", "--trainer.strategy=ddp_zero_1"]
FLOAT64 = "--trainer.precision=64-true"
STEADY = ["--model.schedule=constant", "--model.warmup_steps=1", FLOAT64]


def assert_same_states(one, other, allowed=1e-12):
    """Of the optimizers, at the ends of two runs."""
    mine, theirs = (
        read_safely(f"runs/{name}/last.ckpt")["optimizer_states"][0] for name in (one, other)
    )
    assert mine["param_groups"] == theirs["param_groups"]
    assert mine["state"].keys() == theirs["state"].keys()
    assert len(mine["state"]) == sum(len(group["params"]) for group in mine["param_groups"])
    for number, entries in mine["state"].items():
        assert entries.keys() == theirs["state"][number].keys()
        for name, value in entries.items():
            torch.testing.assert_close(
                theirs["state"][number][name], value, rtol=0, atol=allowed, check_dtype=False
            )


def test_ranks_that_share_the_state_are_one_process(directory):
    """In loss, gradients, weights and the optimizer's state, which a checkpoint holds whole."""
    assert main(["fit", "--config", "run.yaml", "--name", "one", FLOAT64]) == 0
    together("two", *ZERO, FLOAT64)
    assert_same("one", "two", 1e-12)
    assert_same_states("one", "two")


@pytest.mark.slow  # some 30 s each
@pytest.mark.parametrize("optimizer", ["AdamW", "Muon"])
def test_a_run_goes_on_in_any_number_of_processes(directory, optimizer):
    """With the state shared out or not: all as one process goes on."""
    given = [*STEADY, f"--optimizer={optimizer}"]
    fit = ["fit", "--config", "run.yaml", *given, "--name"]
    assert main([*fit, "half", "--trainer.max_steps=2"]) == 0
    assert main([*fit, "rest", "--ckpt_path", "runs/half/last.ckpt"]) == 0
    together("half_zero", *ZERO, *given, "--trainer.max_steps=2")
    assert_same_states("half", "half_zero", 1e-12 if optimizer == "AdamW" else 1e-5)
    ways = {"zero_zero": ZERO, "zero_ddp": DDP}
    for name, way in ways.items():
        together(name, *way, *given, "--ckpt_path=runs/half_zero/last.ckpt")
    together("one_zero", *ZERO, *given, "--ckpt_path=runs/half/last.ckpt")
    assert main([*fit, "zero_one", "--ckpt_path", "runs/half_zero/last.ckpt"]) == 0
    # Newton-Schulz is bfloat16: what differs by rounding there moves by some 1e-4.
    allowed = 1e-12 if optimizer == "AdamW" else 1e-5
    for name in (*ways, "one_zero", "zero_one"):
        assert_same("rest", name, allowed)
        assert_same_states("rest", name, allowed)


@pytest.fixture
def rank():
    """A function: this process takes itself for that rank of three, which never answer."""

    def become(number):
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=number, world_size=3)

    yield become
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["AdamW", "Muon", "SGD"])
def test_each_rank_takes_up_its_part_of_a_state(rank, name):
    """Once, and all ranks together all of it."""
    torch.manual_seed(0)
    decoder = archzoo.create_model("retnet_micro", vocab_size=20)
    spec = {"class_path": name, "init_args": {"momentum": 0.9} if name == "SGD" else {}}
    given = {"learning_rate": 1e-3, "weight_decay": 0.1, "betas": (0.9, 0.95), "fused": True}

    def made(**options):
        return build_optimizer(describe_optimizer(spec), decoder, **given, **options)

    whole = made()
    for parameter in decoder.parameters():
        parameter.grad = torch.randn_like(parameter)
    whole.step()
    for group in whole.param_groups:
        group["lr"] = 2e-3  # as a schedule has it
    saved = whole.state_dict()
    held, sizes = {}, []
    for number in range(3):
        rank(number)
        mine = made(sharded=True)
        mine.load_state_dict(saved)
        assert not mine.state  # or it would be kept twice
        assert all(group["lr"] == 2e-3 for group in (*mine.param_groups, *mine.optim.param_groups))
        assert [len(group["params"]) for group in mine.param_groups] == [
            len(group["params"]) for group in whole.param_groups
        ]
        for group in mine.optim.param_groups:
            assert group.get("blocks") is None or len(group["blocks"]) == len(group["params"])
        assert not held.keys() & mine.optim.state.keys()
        held |= mine.optim.state
        sizes.append(sum(parameter.numel() for parameter in mine.optim.state))
    assert held.keys() == whole.state.keys()
    for parameter, entries in whole.state.items():
        for entry, value in entries.items():
            assert torch.equal(torch.as_tensor(held[parameter][entry]), torch.as_tensor(value))
    # Whole parameters are shared out, the largest first.
    assert max(sizes) - min(sizes) <= max(p.numel() for p in decoder.parameters())


def test_a_state_of_other_groups_is_refused(rank):
    decoder = archzoo.create_model("retnet_micro", vocab_size=20)
    rank(0)
    settings = {"learning_rate": 1e-3, "weight_decay": 0.1, "betas": (0.9, 0.95)}
    mine = build_optimizer(None, decoder, sharded=True, **settings)
    with pytest.raises(ValueError, match="the optimizer's groups hold"):
        mine.load_state_dict({"state": {}, "param_groups": [{"params": [0]}]})


def test_rows_in_memory_are_made_contiguous_before_gradients_get_their_place(rank):
    """Which lie as the weights do when DDP is made, and cannot be sent with gaps between rows."""
    rank(0)
    decoder = archzoo.create_model("retnet_micro", vocab_size=20)
    weight = decoder.blocks[0].feed_forward.down.weight
    weight.data = torch.nn.functional.pad(weight.data, (0, 3))[:, :-3]
    assert not weight.is_contiguous()
    strategy = ranks.ZeroStrategy(parallel_devices=[torch.device("cpu")])
    ranks.configure(strategy, decoder)
    assert all(parameter.is_contiguous() for parameter in decoder.parameters())


def test_the_class_of_torch_is_refused_by_name(directory, capsys):
    assert main(["fit", "--config", "run.yaml", "--optimizer=ZeroRedundancyOptimizer"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--trainer.strategy ddp_zero_1" in error


def test_a_strategy_of_another_name_is_answered_by_the_nearest(directory, capsys):
    assert main(["fit", "--config", "run.yaml", "--trainer.strategy", "ddp_zero"]) == 1
    error = capsys.readouterr().err
    assert "--trainer.strategy ddp_zero: there is none of that name; nearest: ddp_zero_1" in error
    assert error.count("\n") == 1 and not Path("runs").exists()


# ---------------------------------------------------------------------------- DeepSpeed


@pytest.mark.parametrize(
    "strategy",
    ["deepspeed_stage_2", "DeepSpeedStrategy --trainer.strategy.stage 3"],
    ids=["name", "class"],
)
def test_deepspeed_says_where_it_trains_and_what_brings_it(
    directory, capsys, monkeypatch, strategy
):
    """tests/extras/test_deepspeed.py trains by it."""
    fit = ["fit", "--config", "run.yaml", "--trainer.strategy", *strategy.split()]
    assert main(fit) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "CUDA GPUs alone" in error and "ddp_zero_1" in error
    monkeypatch.setattr(deepspeed, "on_cuda", lambda accelerator: True)
    monkeypatch.setattr(deepspeed.importlib.util, "find_spec", lambda name: None)
    assert main(fit) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "pip install 'archzoo[deepspeed]'" in error
    assert not Path("runs").exists()


def test_its_engine_clips_and_nothing_else_does(monkeypatch):
    """Whose configuration Lightning gives trainer.gradient_clip_val."""
    module = LanguageModel("retnet_micro", vocab_size=20)
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    module._trainer = types.SimpleNamespace(strategy=None, precision="32-true")
    module.trainer.strategy = types.SimpleNamespace(config={})
    by_engine = [True, False]
    monkeypatch.setattr(deepspeed, "uses_deepspeed", lambda strategy: by_engine[0])
    module.configure_gradient_clipping(None, 1.0, "norm")
    assert all(parameter.grad.eq(1).all() for parameter in module.parameters())
    by_engine.pop(0)
    module.configure_gradient_clipping(None, 1.0, "norm")
    assert all(parameter.grad.lt(1).all() for parameter in module.parameters())


def test_its_optimizer_is_found_under_what_wraps_it():
    """Its hooks say whether a step was done; a user's own that wraps another counts itself."""
    adamw = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    zero = types.SimpleNamespace(optimizer=adamw)
    assert deepspeed.inner(types.SimpleNamespace(optimizer=zero)) is adamw
    assert deepspeed.inner(types.SimpleNamespace(optimizer=adamw)) is adamw
    assert deepspeed.inner(adamw) is adamw


def test_a_directory_of_its_is_read_as_the_whole_checkpoint_in_it(directory):
    """By the run's path, by its own, and by fit's options."""
    fit = ["fit", "--config", "run.yaml", "--name", "x"]
    assert main([*fit, "--trainer.max_steps=2"]) == 0
    last = Path("runs/x/last.ckpt")
    last.rename("kept")
    last.mkdir()
    Path("kept").rename(last / "whole.ckpt")
    assert locate("runs/x") == locate(last) == last / "whole.ckpt"
    assert directory_of(last) == directory_of(locate(last)) == Path("runs/x")
    archzoo.from_pretrained("runs/x")
    assert main(["test", "--ckpt_path", str(last), "--trainer.limit_test_batches=1"]) == 0
    assert Path("runs/x/test.csv").is_file()
    assert main([*fit, "--resume=auto"]) == 0  # last.ckpt becomes a file again
    assert last.is_file() and read_safely(last)["global_step"] == 4
