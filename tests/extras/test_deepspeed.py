"""DeepSpeed's stages are one process, and what they write is read by everyone.

On the CPU, in two processes through gloo, in float32. What only a GPU shows, its speed and memory,
is measured by `benchmarks/ranks.py bytes`.
"""

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import archzoo
from archzoo.checkpoint import read_safely
from archzoo.cli import main

pytestmark = pytest.mark.extras
pytest.importorskip("deepspeed")

ROOT = Path(__file__).resolve().parent.parent.parent
RUN = """
seed_everything: 0
model:
  preset: skywork_micro
  width: 16
  learning_rate: 5.0e-3
  warmup_steps: 1
  schedule: constant
  feed_forward:
    class_path: MixtureOfExperts
    init_args:
      balance: squared_mean
      balance_over: ranks
      coefficient: 1.0
      z_coefficient: 1.0e-3
      router: {class_path: LinearRouter, init_args: {bias_rate: 1.0e-2, logit_norm: 1.0}}
data: {class_path: Addition, init_args: {digits: 2, batch_size: 8, validation_examples: 20}}
trainer:
  accelerator: cpu
  max_steps: 4
  val_check_interval: 2
  log_every_n_steps: 1
  gradient_clip_val: 1.0
"""
FIT = ["fit", "--config", "run.yaml"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A directory in which one process has trained two steps, and from there two more."""
    place = tmp_path_factory.mktemp("runs")
    (place / "run.yaml").write_text(RUN)
    before = os.getcwd()
    os.chdir(place)
    assert main([*FIT, "--name", "half", "--trainer.max_steps=2"]) == 0
    assert main([*FIT, "--name", "rest", "--ckpt_path", "runs/half/last.ckpt"]) == 0
    yield place
    os.chdir(before)


def by(stage, name, *arguments, fails=False, processes=2):
    """`archzoo fit` by DeepSpeed; what it said."""
    command = [sys.executable, "-m", "archzoo", *FIT, "--name", name, "--import=deepspeed_on_cpu"]
    command += [f"--trainer.devices={processes}", f"--trainer.strategy=deepspeed_stage_{stage}"]
    paths = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    own = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [*command, *arguments], env=os.environ | own, capture_output=True, text=True, timeout=300
    )
    assert bool(done.returncode) == fails, done.stdout + done.stderr[-3000:]
    return done.stdout + done.stderr


def rows(name):
    with open(f"runs/{name}/metrics.csv") as file:
        return list(csv.DictReader(file))


def assert_same(name, one):
    """Losses, gradient norms, weights and the optimizer's state at the end of two runs."""
    for mine, theirs in zip(rows(name), rows(one), strict=True):
        for column in ("train/loss", "train/gradient_norm", "validation/loss"):
            if theirs[column]:
                assert float(mine[column]) == pytest.approx(float(theirs[column]), rel=1e-5), column
    ours = read_safely(f"runs/{name}/last.ckpt/whole.ckpt")
    theirs = read_safely(f"runs/{one}/last.ckpt")
    assert ours["state_dict"].keys() == theirs["state_dict"].keys()
    for weight, value in theirs["state_dict"].items():
        torch.testing.assert_close(ours["state_dict"][weight], value, rtol=0, atol=2e-5)
    (mine,), (alone,) = ours["optimizer_states"], theirs["optimizer_states"]
    assert mine["param_groups"] == alone["param_groups"]
    assert mine["state"].keys() == alone["state"].keys()
    for number, entries in alone["state"].items():
        assert mine["state"][number].keys() == entries.keys()
        for entry, value in entries.items():
            torch.testing.assert_close(mine["state"][number][entry], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_processes_are_one(runs, stage, capsys):
    """And gradients are clipped, by the engine: their norms are above 1 at every step."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    said = by(stage, f"half{stage}", "--trainer.max_steps=2")
    assert "Warning" not in said and "gradient clipping" not in said
    assert all(float(row["train/gradient_norm"]) > 1 for row in rows("half") if row["train/loss"])
    assert_same(f"half{stage}", "half")
    # Their own way to whole weights gives the same, bit for bit.
    theirs = get_fp32_state_dict_from_zero_checkpoint(f"runs/half{stage}/last.ckpt")
    held = read_safely(f"runs/half{stage}/last.ckpt/whole.ckpt")["state_dict"]
    assert held.keys() == theirs.keys()
    assert all(torch.equal(held[name].float(), value.float()) for name, value in theirs.items())
    # One device reads it, by the run's directory and by the checkpoint's.
    model, tokenizer = archzoo.from_pretrained(f"runs/half{stage}")
    assert tokenizer is not None and torch.equal(
        model.head.weight.float(), held["decoder.head.weight"]
    )
    capsys.readouterr()
    assert main(["test", "--ckpt_path", f"runs/half{stage}/last.ckpt"]) == 0
    assert Path(f"runs/half{stage}/test.csv").is_file()  # beside the checkpoint
    assert main(["generate", f"runs/half{stage}/last.ckpt", "1+2=", "--check"]) == 0


@pytest.mark.parametrize("stage", [2, 3])
def test_a_run_goes_on_by_deepspeed_and_without(runs, stage):
    if not Path(f"runs/half{stage}").exists():
        by(stage, f"half{stage}", "--trainer.max_steps=2")
    from_there = f"--ckpt_path=runs/half{stage}/last.ckpt"
    by(stage, f"rest{stage}", from_there)
    assert_same(f"rest{stage}", "rest")
    assert main([*FIT, "--name", f"alone{stage}", from_there]) == 0
    ends = [read_safely(f"runs/{n}/last.ckpt")["state_dict"] for n in ("rest", f"alone{stage}")]
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=0, atol=2e-5)


def test_bf16_weights_are_kept_in_float32(runs):
    """DeepSpeed trains weights that are cast, and keeps what they are rounded from."""
    by(2, "cast", "--trainer.precision=bf16-mixed", "--trainer.max_steps=2")
    state = read_safely("runs/cast/last.ckpt/whole.ckpt")["state_dict"]
    weight = state["decoder.blocks.0.mixer.query_key_value.weight"]
    assert weight.dtype == torch.float32 and not torch.equal(weight.bfloat16().float(), weight)


def test_an_adapter_is_trained_beside_its_base(runs):
    adapter = ["--model.preset=null", "--model.width=null", "--model.feed_forward=null"]
    adapter += [
        "--model.weights=runs/half/last.ckpt",
        "--model.adapter=LoRA",
        "--trainer.max_steps=1",
    ]
    by(2, "adapted", *adapter)
    held = read_safely("runs/adapted/last.ckpt/whole.ckpt")["state_dict"]
    for name, value in read_safely("runs/half/last.ckpt")["state_dict"].items():
        assert torch.equal(held[name], value), name
    assert any("adapter_modules" in name for name in held)
    assert "stage 3" in by(3, "adapted3", *adapter, fails=True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--trainer.accumulate_grad_batches=2"], "leave out trainer.accumulate_grad_batches"),
        (["--model.unfreeze_every=1", "--model.freeze=all"], "leave out model.unfreeze_every"),
        (["--ema=0.9"], "leave out --ema"),
        (["--optimizer=Muon"], "Muon takes whole matrices, and DeepSpeed cuts them"),
        (["--ckpt_path=runs/half/last.ckpt"], "was not written by DeepSpeed"),
    ],
)
def test_what_it_would_do_otherwise_is_refused(runs, arguments, said):
    lines = by(2, "refused", *arguments, fails=True, processes=1)
    errors = [line for line in lines.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and said in errors[0], lines
    assert not Path("runs/refused").exists()


def test_a_directory_of_other_processes_or_with_code_is_refused(runs):
    if not Path("runs/half2").exists():
        by(2, "half2", "--trainer.max_steps=2")
    shutil.copytree("runs/half2", "runs/other", dirs_exist_ok=True)
    given = ["--ckpt_path=runs/other/last.ckpt"]
    lines = by(2, "refused", *given, fails=True, processes=1)
    assert "written by 2 processes" in lines and "Traceback" not in lines
    part = next(Path("runs/other/last.ckpt/checkpoint").glob("zero_pp_rank_1*"))
    part.unlink()

    class Code:
        def __reduce__(self):
            return (os.mkdir, ("ran",))

    torch.save({"optimizer_state_dict": Code()}, next(part.parent.glob("zero_pp_rank_0*")))
    lines = by(2, "refused", *given, fails=True, processes=1)
    assert "holds more than data" in lines and "Traceback" not in lines
    assert not Path("ran").exists()
