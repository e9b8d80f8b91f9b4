"""`fit` with every adapter of the zoo on every family, as a user runs it, from a trained base."""

import csv
import functools
import math
import os
import subprocess
from pathlib import Path

import pytest
import torch
from families import MICRO

import archzoo
from archzoo.checkpoint import read_safely
from archzoo.cli import main
from archzoo.parts import list_parts

ADAPTERS = list(list_parts("adapter"))
# As many runs as there are adapters: each once, and each family with several.
SOME = [(MICRO[number % len(MICRO)], name) for number, name in enumerate(ADAPTERS)]
WITHOUT_EXPERTS = ("abacus_micro", "retnet_micro", "transformer_micro")
DENSE = [(WITHOUT_EXPERTS[number % 3], name) for number, name in enumerate(ADAPTERS)]
RUN = """
seed_everything: 0
model: {learning_rate: 0.01, warmup_steps: 1, schedule: constant}
data: {class_path: Addition, init_args: {digits: 1, batch_size: 16, validation_examples: 8}}
trainer: {accelerator: cpu, max_steps: 20, limit_val_batches: 0, log_every_n_steps: 1}
"""


def fit(name, *arguments):
    """`archzoo fit`, and the checkpoint that it leaves."""
    assert main(["fit", "--config", "run.yaml", "--name", name, *arguments]) == 0
    return read_safely(f"runs/{name}/last.ckpt")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A directory where a family's base is trained when it is asked for."""
    directory = tmp_path_factory.mktemp("bases")

    @functools.cache
    def trained(preset):
        fit(preset, f"--model.preset={preset}", "--trainer.max_steps=60")

    (directory / "run.yaml").write_text(RUN)
    before = Path.cwd()
    os.chdir(directory)
    yield trained
    os.chdir(before)


def same(one, other):
    """Whether two parts of checkpoints are equal, bit for bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def losses(name):
    with open(f"runs/{name}/metrics.csv") as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file)]


def trains(bases, preset, name, steps):
    """The base stays bit for bit, and a run that is resumed is the same run; hands its losses."""
    bases(preset)
    settings = [f"--model.weights=runs/{preset}/last.ckpt", f"--model.adapter={name}"]
    whole = fit("whole", *settings, f"--trainer.max_steps={steps}")
    assert all(map(math.isfinite, losses("whole")))
    nets = [archzoo.from_pretrained(f"runs/{run}/last.ckpt")[0] for run in (preset, "whole")]
    base, adapted = (net.state_dict() for net in nets)
    assert len(adapted) > len(base)
    assert all(torch.equal(adapted[key], tensor) for key, tensor in base.items())
    fit("part", *settings, f"--trainer.max_steps={steps // 2 + 1}")
    again = ["fit", "--ckpt_path=runs/part/last.ckpt", f"--trainer.max_steps={steps}"]
    assert main(again) == 0
    part = read_safely("runs/part/last.ckpt")
    for key in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert same(whole[key], part[key]), key
    return losses("whole")


@pytest.mark.parametrize(("preset", "name"), SOME)
def test_every_adapter_trains_on_a_family(bases, preset, name):
    trains(bases, preset, name, 8)


@pytest.mark.slow  # some 4 minutes
@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("preset", MICRO)
def test_every_adapter_trains_on_every_family(bases, preset, name):
    found = trains(bases, preset, name, 20)
    assert sum(found[-5:]) < sum(found[:5])


@pytest.mark.slow  # some 4 minutes
@pytest.mark.parametrize(("preset", "name"), DENSE)
def test_two_processes_adapt_as_one(bases, preset, name, programs):
    """To float64's last digits; a mixture's balancing loss is that of each rank's tokens."""
    bases(preset)
    settings = [f"--model.weights=runs/{preset}/last.ckpt", f"--model.adapter={name}"]
    settings += ["--trainer.precision=64-true", "--trainer.max_steps=6"]
    one = fit("one", *settings)
    root = str(Path(archzoo.__file__).parent.parent)
    command = [programs / "python", "-m", "archzoo", "fit", "--config", "run.yaml", "--name", "two"]
    done = subprocess.run(
        [*command, *settings, "--trainer.devices=2", "--trainer.strategy=ddp"],
        env=os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    two = read_safely("runs/two/last.ckpt")["state_dict"]
    for key, tensor in one["state_dict"].items():
        torch.testing.assert_close(two[key], tensor, rtol=0, atol=1e-9)


@pytest.mark.slow  # some 15 s each
@pytest.mark.parametrize(("preset", "name"), SOME)
def test_compiled_adapts_as_eager(bases, preset, name, monkeypatch):
    """By torch's tracing; what a C compiler would make of it is its own."""
    bases(preset)
    settings = [f"--model.weights=runs/{preset}/last.ckpt", f"--model.adapter={name}"]
    settings += ["--trainer.max_steps=6"]
    fit("eager", *settings)
    torch._dynamo.reset()
    compile_with = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", compile_with)
    fit("compiled", *settings, "--compile=true")
    assert losses("compiled") == pytest.approx(losses("eager"), rel=1e-4)
