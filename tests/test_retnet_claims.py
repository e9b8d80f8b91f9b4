"""The claims about RetNet: their arms are equal but for one thing, and they can be run."""

import csv
import math
from pathlib import Path

import pytest

from archzoo.analysis.compare.claims import judge
from archzoo.analysis.compare.plan import MATCHED, make_plan
from archzoo.cli import main
from archzoo.training import settings

ROOT = Path(__file__).parents[1]
TEXT, RECALL = (
    ROOT / "configs" / "claims" / f"{name}.yaml" for name in ("retnet", "retnet_recall")
)
OPTIONS = dict.fromkeys(
    ("seeds", "learning_rates", "tune_seeds", "arms", "may_differ", "metric", "measure")
)
# Perplexities of the paper's table 5: the whole model, and without each part.
WHOLE = 26.05
WITHOUT = {
    "no_gate": 27.84,
    "no_head_norm": 27.54,
    "no_decay": 27.86,
    "one_decay": 27.02,
    "small_heads": 27.68,
    "small_heads_paper_lm": 27.68,
}


def micro(path, **flags):
    return {"model.preset": "retnet_micro", "trainer.accelerator": "cpu"} | flags


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        cache = str(tmp_path_factory.mktemp("cache"))
        for path, flags in ((TEXT, {"data.cache_dir": cache}), (RECALL, {})):
            content = settings.read(path)
            made[path] = make_plan(str(path), content, micro(path, **flags), OPTIONS, 1)
    return made


@pytest.mark.parametrize("path", [TEXT, RECALL], ids=lambda path: path.stem)
def test_arms_hold_as_many_parameters_and_see_the_same(plans, path):
    plan = plans[path]
    control = plan.arms["retnet"]
    for arm in plan.arms.values():
        assert abs(arm.sizes.parameters / control.sizes.parameters - 1) <= MATCHED, arm.name
        assert (arm.batches, arm.tokens) == (control.batches, control.tokens)
    assert plan.seeds == [0, 1, 2] and plan.tune_seeds == [0]
    assert {len(rates) for rates in plan.rates.values()} == {3}
    claimed = {claim.arm for claim in plan.claims} | {claim.control for claim in plan.claims}
    assert claimed == set(plan.arms), "an arm that no claim is about is trained for nothing"


def test_every_ablation_of_the_issue_is_an_arm(plans):
    arms = plans[TEXT].arms
    differs = {name: set(arm.differs.split("; ")) for name, arm in arms.items()}
    assert differs["no_gate"] == {"model.mixer.gate=False"}
    assert differs["no_head_norm"] == {"model.mixer.head_norm=none"}
    assert differs["no_decay"] == {"model.mixer.decay=1.0"}
    assert differs["one_decay"] == {"model.mixer.decay=0.9921875"}
    assert differs["paper_lm"] == {"model.mixer.decay=paper_lm"}
    assert differs["small_heads"] == {"model.heads=16"}
    assert differs["no_rotation"] == {"model.rotary=none"}
    state = {name: arm.sizes.state_16k for name, arm in arms.items()}
    assert state["small_heads"] < state["retnet"] < state["retnet_convolution"]
    assert state["retnet"] < state["transformer"]


def test_effects_are_the_papers_in_the_loss(plans):
    claims = {claim.arm: claim for claim in plans[TEXT].claims}
    for arm, perplexity in WITHOUT.items():
        want = math.log(perplexity / WHOLE) / math.log(WHOLE)
        assert claims[arm].paper == pytest.approx(want, abs=1e-4), arm
        assert claims[arm].sign == 1, "the loss is higher without"
    against = [claim for claim in plans[TEXT].claims if claim.arm == "retnet"]
    wanted = [math.log(18.64) / math.log(16.85) - 1, math.log(11.98) / math.log(12.35) - 1]
    for claim, want in zip(against, wanted, strict=True):
        assert claim.paper == pytest.approx(want, abs=1e-3)


def test_the_rule_gives_verdicts_on_these_claims(plans):
    """As if the gate were worth 2 % in every seed, and nothing else anything."""
    values = {name: {0: 2.0, 1: 2.02, 2: 1.98} for name in plans[TEXT].arms}
    values["no_gate"] = {0: 2.04, 1: 2.062, 2: 2.02}
    found = {
        (verdict.arm, verdict.control): verdict.verdict
        for claim in plans[TEXT].claims
        for verdict in judge(claim, values, relative=True)
    }
    assert found["no_gate", "retnet"] == "holds in size"
    assert found["no_decay", "retnet"] == "refuted"
    assert found["paper_lm", "retnet"] == "holds", "equivalence"
    assert found["no_rotation", "retnet"] == "undecided"


def run_through(path, tmp_path, *options):
    """`archzoo compare` as it is typed, at micro size and some steps."""
    small = {
        TEXT: f"--data.context_length 64 --data.cache_dir {tmp_path / 'cache'}",
        RECALL: "--data.validation_examples 16 --data.test_examples 16 --data.batch_size 8",
    }[path]
    steps = "--trainer.max_steps 2 --trainer.val_check_interval 2 --trainer.limit_val_batches 2"
    steps += " --trainer.limit_test_batches 2 --trainer.accelerator cpu --at_once 2"
    arguments = f"--model.preset retnet_micro {small} {steps} --output {tmp_path / 'out'}"
    assert main(["compare", str(path.relative_to(ROOT)), *arguments.split(), *options]) == 0
    with open(tmp_path / "out" / "runs.csv") as file:
        rows = list(csv.DictReader(file))
    assert {row["state"] for row in rows} == {"trained"}
    return rows


def test_a_claim_runs_through_at_micro(tmp_path, monkeypatch, capsys):
    """Two arms, at one seed and rate; the next test runs all of both files."""
    monkeypatch.chdir(ROOT)
    options = ["--arms", "retnet,no_gate", "--seeds", "0", "--learning_rates", "2e-3"]
    rows = run_through(TEXT, tmp_path, *options)
    assert len(rows) == 2
    assert "claim: no_gate against retnet: undecided at 1 seed" in capsys.readouterr().out


@pytest.mark.slow  # some minutes: a process for every run
@pytest.mark.parametrize("path", [TEXT, RECALL], ids=lambda path: path.stem)
def test_every_arm_and_rate_runs_through_at_micro(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    rows = run_through(path, tmp_path)
    plan = make_plan(str(path), settings.read(path), micro(path), OPTIONS, 1)
    assert {row["arm"] for row in rows} == set(plan.arms)
    assert len(rows) == len(plan.arms) * (3 + 2), "three rates of one seed, then two seeds"
    assert capsys.readouterr().out.count("claim: ") == len(plan.claims)
