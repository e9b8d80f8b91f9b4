"""Distillation: the papers' losses, a teacher that stays, runs that go on, what is refused."""

import csv
import shutil
from pathlib import Path

import pytest
import torch
from families import micro
from safetensors.torch import load_file
from torch import nn

import archzoo
from archzoo.checkpoint import load, weights_digest
from archzoo.cli import main
from archzoo.contract.measure import relative_error
from archzoo.training.distillation import (
    Distil,
    Teacher,
    as_distil,
    divergence,
    hidden_distance,
    vectors_before_blocks,
    weights_of,
)

GOLDEN = Path(__file__).parent / "golden"
DATA = "--data Addition --data.digits 1 --data.batch_size 8 --data.validation_examples 8"
SETTINGS = (
    f"{DATA} --trainer.limit_val_batches 1 --trainer.val_check_interval 2 "
    "--trainer.enable_progress_bar false --trainer.accelerator cpu --model.warmup_steps 2"
)


@pytest.mark.parametrize(("name", "form"), [("onebit", "OneBit"), ("binarymos", "BinaryMoS")])
def test_the_loss_and_its_gradients_are_the_papers(name, form):
    golden = load_file(GOLDEN / f"adaptation_{name}.safetensors")
    theirs, mine = golden["kd.teacher_hidden"], golden["kd.student_hidden"].requires_grad_()
    logits = golden["kd.student_logits"].requires_grad_()
    rows, time, width = logits.shape
    valid = torch.ones(rows, time)
    identity = nn.Linear(width, width, bias=False).double()  # so that vectors are logits
    nn.init.eye_(identity.weight)
    identity.requires_grad_(False)
    given = golden["kd.teacher_logits"], logits, identity, identity, valid
    kl = divergence(*given)
    assert relative_error(divergence(*given, chunk=3 * width), kl) < 1e-12
    hidden = hidden_distance(form, list(theirs), list(mine), valid)
    weights = weights_of(Distil("", form))
    loss = weights[0] * kl / rows + weights[1] * hidden
    allowed = 1e-12 if name == "onebit" else 1e-6  # theirs is float32
    assert relative_error(loss, golden["kd.loss"].double()) < allowed
    loss.backward()
    layers = slice(None, -1) if form == "OneBit" else slice(1, None)
    want = golden["kd.grad.student_hidden"].double()
    assert relative_error(mine.grad[layers], want) < allowed * 10
    assert relative_error(logits.grad, golden["kd.grad.student_logits"].double()) < allowed * 10


def test_padding_counts_for_nothing():
    torch.manual_seed(0)
    theirs, mine = torch.randn(2, 3, 2, 6, 8).double()
    head = nn.Linear(8, 11).double()
    valid = torch.ones(2, 6)
    valid[1, 4:] = 0
    spoilt = mine.clone()
    spoilt[:, 1, 4:] = 100
    for form in ("OneBit", "BinaryMoS"):
        pair = (hidden_distance(form, list(theirs), list(h), valid) for h in (mine, spoilt))
        assert next(pair) == next(pair)
    pair = (divergence(theirs[-1], h[-1], head, head, valid) for h in (mine, spoilt))
    assert next(pair) == next(pair)


def test_vectors_before_blocks_are_those_that_the_layers_pass_on():
    net = micro("retnet_micro").double().eval()
    tokens = torch.randint(64, (2, 7))
    with vectors_before_blocks(net) as seen:
        x, _, _ = net.hidden(tokens)
    assert len(seen) == net.depth
    assert torch.equal(seen[0], net.embedding.weight[tokens])
    context, _ = archzoo.block.make_context(2, 7)
    last, _, _ = net.blocks[-1](seen[-1], None, context)
    assert relative_error(net.norm(last), x) < 1e-12
    net.hidden(tokens)
    assert len(seen) == net.depth  # nothing stays


# ---------------------------------------------------------------------------- by fit


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A dense model of addition in `dense`, and its binary form in `binary`."""
    place = tmp_path_factory.mktemp("made")
    task = archzoo.tasks.Addition(digits=1)
    torch.manual_seed(0)
    net = archzoo.create_model("retnet_micro", vocab_size=task.vocab_size, init_std=0.2)
    archzoo.save_pretrained(place / "dense", net, task.tokenizer, task.config())
    command = f"binarise {place / 'dense'} --out {place / 'binary'} --method OneBit"
    assert main(command.split()) == 0
    return place


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("dense", "binary"):
        shutil.copytree(made / name, name)


def fit(options):
    return main(f"fit {SETTINGS} {options}".split())


STUDENT = "--model.weights binary --model.distil.teacher dense"


@pytest.mark.usefixtures("here")
def test_a_student_learns_and_its_checkpoint_holds_no_teacher(capsys):
    teacher = Path("dense/model.safetensors").read_bytes()
    assert fit(f"{STUDENT} --model.distil.form BinaryMoS --trainer.max_steps 40 --name a") == 0
    with Path("runs/a/metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["train/divergence"]]
    assert float(rows[-1]["train/divergence"]) < 0.7 * float(rows[0]["train/divergence"])
    assert float(rows[-1]["train/hidden_distance"]) > 0
    content = torch.load("runs/a/last.ckpt", weights_only=True)
    dense, student = load("dense").model, load("runs/a").model
    assert content["state_dict"].keys() == {f"decoder.{name}" for name in student.state_dict()}
    assert content["teacher"] == weights_digest(dense.state_dict())
    assert Path("dense/model.safetensors").read_bytes() == teacher
    capsys.readouterr()
    assert main(["test", "--ckpt_path", "runs/a/last.ckpt"]) == 0  # which needs no teacher
    assert main(["binarise", "runs/a", "--out", "packed", "--packed"]) == 0
    assert main(["test", "--model.weights", "packed"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "exact match" in line]
    assert len(lines) == 2 and lines[0] == lines[1]  # packed it gives the same figures


@pytest.mark.usefixtures("here")
def test_a_resumed_run_is_the_run_that_was_not_stopped():
    assert fit(f"{STUDENT} --trainer.max_steps 6 --model.schedule constant --name whole") == 0
    assert fit(f"{STUDENT} --trainer.max_steps 4 --model.schedule constant --name half") == 0
    again = "--ckpt_path runs/half/last.ckpt --trainer.max_steps 6 --model.schedule constant"
    assert fit(f"{STUDENT} {again} --name half") == 0
    states = [load(f"runs/{name}").model.state_dict() for name in ("whole", "half")]
    assert all(torch.equal(states[1][name], value) for name, value in states[0].items())


@pytest.mark.usefixtures("here")
def test_the_configuration_trains():
    """`configs/onebit.yaml`, after what its comment says, small."""
    config = Path(__file__).parents[1] / "configs" / "onebit.yaml"
    base = config.with_name("addition.yaml")
    dense = "--model.preset retnet_micro --data.batch_size 4 --trainer.max_steps 1"
    small = "--trainer.limit_val_batches 1 --trainer.accelerator cpu"
    assert main(f"fit --config {base} {dense} {small}".split()) == 0
    binary = "--out runs/addition_onebit --method OneBit"
    assert main(f"binarise runs/addition {binary}".split()) == 0
    assert main(f"fit --config {config} --trainer.max_steps 2 {small}".split()) == 0
    assert load("runs/onebit").model.config["linear"]["class_path"] == "OneBitLinear"


def refused(capsys, options, *said):
    capsys.readouterr()
    assert fit(options) == 1
    error = capsys.readouterr().err
    assert error.strip().count("\n") == 0, error
    assert all(text in error for text in said), error


@pytest.mark.usefixtures("here")
def test_what_cannot_be_learnt_is_refused_in_a_line(capsys):
    assert fit(f"{STUDENT} --trainer.max_steps 2 --name a") == 0
    resume = "--ckpt_path runs/a/last.ckpt --trainer.max_steps 4 --name a"
    refused(capsys, f"{STUDENT} {resume} --model.distil.labels 1", "distil.labels=0.0", "is 1.0")
    other = STUDENT.replace("teacher dense", "teacher binary")
    refused(capsys, f"{other} {resume}", "another teacher")
    refused(
        capsys, f"--model.weights binary --model.distil null {resume}", "distil.form=OneBit", "None"
    )
    refused(capsys, STUDENT.replace("dense", "nowhere"), "no checkpoint at nowhere")
    refused(capsys, f"{STUDENT} --model.progressive_loss 0.5", "progressive_loss to 0")
    odd = STUDENT.replace("distil.teacher", "distil.techer")
    refused(capsys, odd, "there is no setting model.distil.techer; nearest: teacher")
    odd = STUDENT.replace("distil.teacher", "distil")
    refused(capsys, odd, "model.distil: 'dense' stands alone: give --model.distil.teacher")
    refused(capsys, "--model.weights binary --model.distil.form OneBit", "distil needs a teacher")


def test_a_teacher_has_the_students_vocabulary_and_layers(tmp_path):
    for name, arguments in {"words": {"vocab_size": 65}, "deep": {"depth": 3}}.items():
        archzoo.save_pretrained(tmp_path / name, micro("retnet_micro", **arguments))
    student = micro("retnet_micro")
    with pytest.raises(ValueError, match="knows 65 tokens and the student 64"):
        Teacher(Distil(str(tmp_path / "words")), student, None)
    with pytest.raises(ValueError, match="layers do not pair"):
        Teacher(Distil(str(tmp_path / "deep")), student, None)
    teacher = Teacher(Distil(str(tmp_path / "deep"), hidden=0), student, None)
    assert not teacher.model.training
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"form": "OneBit"}, "teacher is missing"),
        ({"teacher": "x", "odd": 1}, "no setting 'odd'"),
        ({"teacher": "x", "form": "Two"}, "'Two' is not one of OneBit, BinaryMoS"),
        ({"teacher": "x", "logits": -1}, "logits=-1 must be at least 0"),
        ({"teacher": "x", "logits": 0, "hidden": 0}, "all weights are 0"),
        (3, "distil=3 is not valid"),
    ],
)
def test_settings_that_are_none_are_refused(given, said):
    with pytest.raises(ValueError, match=said):
        as_distil(given)
