"""The first command works whatever the seed, and what chose its recipe trains as torch does."""

import importlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import archzoo
from archzoo.tasks import Addition
from archzoo.training.optim import decay_groups

ROOT = Path(__file__).parent.parent


def test_models_side_by_side_learn_as_each_alone(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    recipes = importlib.import_module("recipes")
    members = [
        {"seed": 3, "learning_rate": 2e-3, "weight_decay": 0.3, "clip": 0.3},
        {"seed": 5, "learning_rate": 4e-3, "weight_decay": 0.1, "clip": 100.0},
    ]
    task = Addition(digits=2, batch_size=16)
    together = recipes.Models(members, task, "retnet_micro", 0.06)
    factors = (0.5, 1.0, 0.7)
    for step, factor in enumerate(factors):
        together.learn(task.training_batch(step, np.arange(16)), factor)
    for number, member in enumerate(members):
        torch.manual_seed(member["seed"])
        model = archzoo.create_model(
            "retnet_micro",
            vocab_size=task.vocab_size,
            context_length=task.context_length,
            init_std=0.06,
        )
        optimizer = torch.optim.AdamW(
            decay_groups(model, member["weight_decay"]),
            lr=member["learning_rate"],
            betas=recipes.BETAS,
        )
        for step, factor in enumerate(factors):
            batch = task.training_batch(step, np.arange(16))
            logits = model(batch["tokens"], documents=batch["documents"]).logits
            F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), member["clip"])
            for group in optimizer.param_groups:
                group["lr"] = member["learning_rate"] * factor
            optimizer.step()
            optimizer.zero_grad()
        for name, parameter in model.named_parameters():
            # A gradient of almost 0 may turn its sign by rounding, and AdamW's step with it.
            apart = (together.parameters[name][number] - parameter).detach().abs()
            assert apart.mean() < 1e-6, name


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_first_command_learns_to_add_whatever_the_seed(tmp_path, seed):
    def archzoo_command(*arguments: str) -> str:
        command = [sys.executable, ROOT / "train.py", *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    config = str(ROOT / "configs" / "addition.yaml")
    archzoo_command("fit", "--config", config, "--seed_everything", str(seed))
    archzoo_command("test", "--ckpt_path", "runs/addition/last.ckpt")
    columns, row = (tmp_path / "runs/addition/test.csv").read_text().splitlines()
    found = dict(zip(columns.split(","), row.split(","), strict=True))
    assert float(found["test/exact_match"]) >= 0.99
