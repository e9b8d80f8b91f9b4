"""archzoo compare: its arms, its plan, what it says of them, and what interrupts it."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

import archzoo
from archzoo.analysis import evidence
from archzoo.analysis.compare import (
    child,
    claims,
    command,
    places,
    processes,
    progress,
    statistics,
    tables,
)
from archzoo.analysis.compare.arms import file_name, make_arms, split
from archzoo.analysis.compare.places import Slot, gpus, slots
from archzoo.analysis.compare.plan import digest, make_plan, matched, numbers
from archzoo.analysis.compare.prepared import prepare
from archzoo.analysis.compare.runner import Job, Runner, choose
from archzoo.analysis.compare.statistics import seeds_needed
from archzoo.cli import main
from archzoo.training import settings
from archzoo.training.command import resolve
from archzoo.training.directory import Lock
from archzoo.training.ending import SIGNALS, Ended

ROOT = Path(__file__).parents[1]
CONFIG = """
model: {preset: retnet_micro, warmup_steps: 2}
data:
  class_path: Addition
  init_args: {digits: 1, batch_size: 8, validation_examples: 16, test_examples: 16}
trainer: {accelerator: cpu, max_steps: 4, log_every_n_steps: 1, val_check_interval: 2}
"""
OPTIONS = dict.fromkeys(
    ("seeds", "learning_rates", "tune_seeds", "arms", "may_differ", "metric", "measure", "base")
)
# Subtraction, learnt by what can add: all of it, or an adapter's few parameters.
ADAPTED = f"""
arms: {{full: {{}}, lora: {{model.adapter: {{class_path: LoRA, init_args: {{rank: 2}}}}}}}}
compare: {{base: a.yaml, learning_rates: {{full: [1.0e-3], lora: [1.0e-3, 1.0e-2]}}, seeds: [3]}}
claim:
- {{arm: lora, metric: exact_match/base, sign: 1}}
- {{arm: lora, metric: loss@2, sign: 1}}
{CONFIG.replace("{preset: retnet_micro, warmup_steps: 2}", "{warmup_steps: 2}")}
""".replace("Addition", "Subtraction")


@pytest.fixture
def place(tmp_path, monkeypatch, programs):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(processes, "CHILD", (str(programs / "python"), *processes.CHILD[1:]))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    Path("a.yaml").write_text(CONFIG)
    return tmp_path


def plan_of(flags=None, config="a.yaml", at_once=1, **options):
    content = settings.read(Path(config)) if config else {}
    return make_plan(config, content, flags or {}, OPTIONS | options, at_once)


MIXERS = {"model.mixer": "Retention,Attention"}


def test_all_arms_make_all_of_their_steps(place):
    Path("a.yaml").write_text(f"{CONFIG}\nstopping_threshold: 100.0\n")  # a loss, reached at once
    assert {run.settings["stopping_threshold"] for run in plan_of(MIXERS).runs.values()} == {None}
    Path("a.yaml").write_text(CONFIG)
    assert {run.settings["stopping_threshold"] for run in plan_of(MIXERS).runs.values()} == {None}


# ---------------------------------------------------------------------------- arms


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        ("Retention", ["Retention"]),
        ("Retention,Attention", ["Retention", "Attention"]),
        ("1, 2 ,3", ["1", "2", "3"]),
        ("[0.9, 0.98]", ["[0.9, 0.98]"]),
        ("[0.9, 0.98],[0.9, 0.95]", ["[0.9, 0.98]", "[0.9, 0.95]"]),
        ("{class_path: XPos, init_args: {base: 1}},RoPE",) * 1
        + (["{class_path: XPos, init_args: {base: 1}}", "RoPE"],),
        ('"a,b.txt"', ["a,b.txt"]),
        ("'a,b',c", ["a,b", "c"]),
        ("[1, 2", ["[1, 2"]),
        ("it's,its", ["it's", "its"]),
    ],
)
def test_commas_make_arms_and_lists_stay_values(value, parts):
    assert split(value) == parts


def test_an_empty_part_is_refused():
    for value in ("Retention,", ",a", "a,,b"):
        with pytest.raises(ValueError, match="empty part"):
            split(value)


def test_arms_of_the_file_and_of_commas_make_the_product():
    found = make_arms(
        {"plain": {}, "wide": {"model.width": 64}},
        None,
        {"model.mixer": "Retention,Attention", "model.dropout": "0.1", "model.depth": "1,2"},
        "a.yaml",
    )
    assert [arm.name for arm in found] == [
        f"{file}+{mixer}+depth={depth}"
        for file in ("plain", "wide")
        for mixer in ("Retention", "Attention")
        for depth in (1, 2)
    ]
    assert found[-1].arguments == (
        *("--arm", "wide", "--model.mixer", "Attention"),
        *("--model.dropout", "0.1", "--model.depth", "2"),
    )
    (one,) = make_arms({"plain": {}, "wide": {}}, ["wide"], {}, "a.yaml")
    assert one.name == "wide" and one.arguments == ("--arm", "wide")
    named = make_arms(None, None, {"model.tie_weights": "true,false"}, "a.yaml")
    assert [arm.name for arm in named] == ["tie_weights=true", "tie_weights=false"]
    assert file_name("a/b c+depth=2") == "a-b-c+depth=2"


def test_numbers_are_read_from_texts_and_lists():
    assert numbers("0,1,2", "--seeds", int) == numbers([0, 1, 2], "--seeds", int) == [0, 1, 2]
    assert numbers("1e-3, 2e-3", "--learning_rates", float) == [1e-3, 2e-3]
    for value, kind, words in (
        ("0,1.5", int, "'1.5' is not an integer"),
        ("a", float, "'a' is not a number"),
        ("0", float, "must be above 0"),
        ("nan", float, "must be above 0"),
        ("1,1", int, "1 is given twice"),
        ("", int, "'' is not an integer"),
        ([True], int, "not an integer"),
    ):
        with pytest.raises(ValueError, match=words):
            numbers(value, "--x", kind)


# ---------------------------------------------------------------------------- the plan


def test_arms_see_the_same_batches_in_the_same_order(place):
    plan = plan_of(MIXERS, seeds="0,1", learning_rates="1e-3,2e-3")
    retention, attention = plan.arms.values()
    assert retention.batches == attention.batches and retention.tokens == attention.tokens
    assert retention.tokens == 4 * 8 * resolve(["--config", "a.yaml"]).task.context_length
    # Of the settings that children are given, by arm: the batches themselves.
    for seed in (0, 1):
        batches = {}
        for (arm, _, of), run in plan.runs.items():
            if of == seed:
                Path("run.yaml").write_text(settings.written(run.settings))
                task = resolve(["--config", "run.yaml"]).task
                task.prepare()
                loader = task.train_dataloader()
                batches.setdefault(arm, []).append(
                    [loader.batch(number)["tokens"] for number in range(4)]
                )
        first = batches["Retention"][0]
        for found in (entry for entries in batches.values() for entry in entries):
            assert all(map(torch.equal, first, found))
    assert len(plan.runs) == len({run.key for run in plan.runs.values()}) == 8


def test_a_digest_tells_seeds_and_orders_apart(place):
    tasks = [resolve(["--config", "a.yaml", "--data.seed", seed]).task for seed in "001"]
    for task in tasks:
        task.prepare()
    first, again, other = map(digest, tasks)
    assert first == again != other


def test_a_key_holds_all_settings_and_only_those(place):
    def key(**flags):
        plan = plan_of(
            {f"{n.partition('_')[0]}.{n.partition('_')[2]}": v for n, v in flags.items()}
        )
        return next(iter(plan.runs.values())).key

    first = key()
    assert first == key() == key(trainer_enable_progress_bar="false")
    others = [key(model_dropout="0.1"), key(data_digits="2"), key(trainer_max_steps="5")]
    assert len({first, *others}) == 4


def test_parameters_are_matched_or_said_not_to_be(place):
    for match, word in (("parameters", ": matched"), ("null", ": NOT matched")):
        plan = plan_of(MIXERS | {"model.match": match})
        retention, attention = plan.arms.values()
        text = matched(attention, retention)
        assert text.endswith(word) and f"{retention.sizes.parameters:,}" in text
        assert f"{attention.sizes.parameters:,}" in text


def test_runs_of_a_seed_come_together_and_tuning_comes_first(place):
    plan = plan_of(MIXERS, seeds="0,1,2", learning_rates="1e-3,2e-3", tune_seeds="0")
    assert [(run.arm, run.rate, run.seed) for run in plan.first()] == [
        (arm, rate, 0) for rate in (1e-3, 2e-3) for arm in ("Retention", "Attention")
    ]
    assert [run.seed for run in plan.then("Attention", 2e-3)] == [0, 1, 2]
    plan = plan_of(MIXERS, seeds="0,1")
    assert [(run.arm, run.seed) for run in plan.first()] == [
        *(("Retention", 0), ("Attention", 0), ("Retention", 1), ("Attention", 1))
    ]


def test_a_file_may_say_what_the_options_say(place):
    more = {
        "arms": {"plain": {}, "swapped": {"model.mixer": "Attention"}},
        "compare": {"seeds": [3, 4], "learning_rates": [0.001], "metric": "loss"},
        "claim": {"control": "plain", "paper": -0.05},
    }
    Path("b.yaml").write_text(yaml.safe_dump(yaml.safe_load(CONFIG) | more))
    plan = plan_of(config="b.yaml")
    assert plan.seeds == [3, 4] and plan.metric == "loss" and plan.lower
    assert plan_of(config="b.yaml", seeds="1").seeds == [1]
    assert plan.claims[0].sign == -1 and list(plan.arms) == ["plain", "swapped"]
    assert main(["fit", "--config", "b.yaml", "--arm", "plain", "--trainer.max_steps", "1"]) == 0
    saved = yaml.safe_load(Path("runs/b_plain/config.yaml").read_text())
    assert saved["compare"] is saved["claim"] is saved["arms"] is None


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


CLAIMS = sorted((ROOT / "configs/claims").rglob("*.yaml"))


@pytest.mark.parametrize("path", CLAIMS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore:a number of .* digits is longer than")  # some mean to show it
def test_every_claim_has_a_plan(path, monkeypatch, cache):
    """Settings, models and batches of all its arms, as they are; nothing is trained."""
    monkeypatch.chdir(ROOT)
    content = settings.read(path)
    text = content["data"]["class_path"] in ("Text", "Mixed")
    flags = {"data.cache_dir": str(cache), "data.tokenizer": "characters"} if text else {}
    plan = plan_of(flags, str(path), seeds="0,1", tune_seeds="0")
    assert list(plan.arms) == list(content.get("arms") or ["model"])
    assert len({run.key for run in plan.runs.values()}) == len(plan.runs)
    given = content.get("claim") or []
    assert len(plan.claims) == (len(given) if isinstance(given, list) else 1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("none.yaml", "configuration not found: none.yaml"),
        ("", "needs a configuration"),
        ("a.yaml --arms plain", "--arms plain: a.yaml has no such arm"),
        ("a.yaml --seeds 0,x", "--seeds: 'x' is not an integer"),
        ("a.yaml --seeds=-1,0", "--seeds: -1 must be from 0 to 4294967295"),
        ("a.yaml --seeds 0 --tune_seeds 1", "1 is none of the seeds 0"),
        ("a.yaml --learning_rates fast", "--learning_rates: 'fast' is not a number"),
        ("a.yaml --at_once 0", "at_once=0 must be at least 1"),
        ("a.yaml --minutes 0", "minutes=0.0 must be above 0"),
        ("a.yaml --model.mixers Retention,Attention", "there is no setting 'model.mixers'"),
        ("a.yaml --model.mixer Retention,Attentive", "arm Attentive: model.mixer"),
        ("a.yaml --model.mixer Retention,Retention", "Retention is given twice"),
        ("a.yaml --model.mixer", "--model.mixer needs a value"),
        ("a.yaml --data.digits 1,2", "differ in data (data.digits=2)"),
        ("a.yaml --trainer.max_steps 4,8", "train on"),
        ("a.yaml --model.dim 100000 --model.depth 2", "and this machine has"),
        ("a.yaml --metric speed", "--metric speed"),
        ("a.yaml --metric exact_match/sums", "a.yaml does not measure it; nearest: exact_match"),
        ("sums.yaml", "claim: no run measures exact_match/sums; nearest: exact_match"),
        ("a.yaml --trainer.devices 2", "a run of compare takes one device"),
        ("a.yaml --trainer.max_steps -1", "must say where a run ends"),
        ("a.yaml --output a.yaml/x", "--output a.yaml/x cannot be written"),
        ("no_data.yaml", "fit needs data"),
        ("a.yaml --may_differ size", "--may_differ size: it takes data and tokens"),
        ("--status .", "holds no compare.json"),
        ("bad_arms.yaml", "and not settings by the arms' names"),
        ("bad_claim.yaml", "claim has no 'margins'; nearest: margin"),
        ("bad_option.yaml", "compare has no 'seed'; nearest: seeds"),
        ("number.yaml", "number.yaml: compare is 3: it takes options by name"),
        ("list.yaml", "list.yaml: compare is ['base']: it takes options by name"),
        ("metrics.yaml", "metrics.yaml: compare: metric is ['loss']: it takes one name"),
        ("may.yaml", "--may_differ 3: it takes data and tokens"),
        ("seeds.yaml", "--seeds names none"),
        ("of_number.yaml", "number.yaml: compare is 3: it takes options by name"),
        ("no_arm.yaml", "no_arm.yaml: arms: a is 3: it takes settings by name"),
        ("a.yaml --model.distil.teacher none", "arm model: there is no checkpoint at none"),
        ("taught.yaml", "distil.teacher='the base wide' has (dim, depth, loops)="),
    ],
)
def test_what_is_wrong_is_one_line(place, capsys, arguments, words):
    for name, text in (
        ("number", "compare: 3"),
        ("list", "compare: [base]"),
        ("metrics", "compare: {metric: [loss]}"),
        ("may", "compare: {may_differ: 3}"),
        ("seeds", "compare: {seeds: []}"),
        ("of_number", "compare: {base: number.yaml}"),
        ("no_arm", "arms: {a: 3, b: {}}"),
        ("sums", "claim: {metric: exact_match/sums, sign: 1}"),
        ("taught", "compare: {reads: {model.distil.teacher: wide.yaml}}"),
    ):
        Path(f"{name}.yaml").write_text(f"{CONFIG}{text}\n")
    Path("wide.yaml").write_text(CONFIG.replace("retnet_micro", "retnet_micro, dim: 64"))
    Path("no_data.yaml").write_text("model: {preset: retnet_micro}\ntrainer: {max_steps: 1}\n")
    Path("bad_arms.yaml").write_text(f"{CONFIG}arms: [a, b]\n")
    Path("bad_claim.yaml").write_text(f"{CONFIG}claim: {{margins: 1}}\n")
    Path("bad_option.yaml").write_text(f"{CONFIG}compare: {{seed: 1}}\n")
    assert main(["compare", *arguments.split()]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and words in line, line


def test_arms_may_differ_in_data_where_that_is_said(place):
    plan = plan_of({"data.digits": "1,2"}, may_differ="data,tokens")
    one, two = plan.arms.values()
    assert one.batches != two.batches and "data.digits=2" in two.differs


def test_arms_start_from_a_base_of_their_seed(place):
    Path("b.yaml").write_text(ADAPTED)
    plan = plan_of(config="b.yaml", seeds="0,1", tune_seeds="0")
    assert [(base.arm, base.seed, base.is_base) for base in plan.bases] == [
        ("a", 0, True),
        ("a", 1, True),
    ]
    assert all(run.base.seed == run.seed for run in plan.runs.values())
    assert plan.rates == {"full": [1e-3], "lora": [1e-3, 1e-2]}
    full, lora = plan.arms.values()
    assert full.trainable == full.sizes.parameters
    assert lora.sizes.parameters - lora.trainable == full.sizes.parameters
    assert f"{lora.trainable:,} trained parameters against" in matched(lora, full)
    assert plan.early == ["loss@2"] and plan.beside == ["exact_match/base", "loss@2"]
    # The same base again has the same key; another is another run's, whatever its weights' path.
    again = plan_of(config="b.yaml", seeds="0,1", tune_seeds="0")
    assert {run.key for run in again.runs.values()} == {run.key for run in plan.runs.values()}
    assert {run.name for run in again.runs.values()} == {run.name for run in plan.runs.values()}
    Path("a.yaml").write_text(CONFIG.replace("max_steps: 4", "max_steps: 6"))
    other = plan_of(config="b.yaml", seeds="0,1", tune_seeds="0")
    assert not {run.key for run in other.runs.values()} & {run.key for run in plan.runs.values()}
    # Of some arms only; and none at all where the command line says what is started from.
    Path("c.yaml").write_text(
        ADAPTED.replace("base: a.yaml", "base: {lora: a.yaml}").replace(
            "full: {}", "full: {model.preset: retnet_micro}"
        )
    )
    plan = plan_of(config="c.yaml")
    assert [run.base is None for run in plan.runs.values()] == [True, False, False]


def test_an_arms_name_may_hold_a_plus(prepared):
    text = PREPARED.replace("  plain: {}", "  a+b: {}").replace("control: plain", "control: a+b")
    Path("b.yaml").write_text(text.replace("binary", "one+bit"))
    plan = plan_of({"model.warmup_steps": "0,1"}, "b.yaml")
    words = {run.arm: run.prepare[:1] for run in plan.runs.values()}
    assert words["one+bit+warmup_steps=1"] == ("binarise",) and words["a+b+warmup_steps=0"] == ()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("base: a.yaml", "base: x.yaml", "configuration not found: x.yaml; nearest"),
        ("base: a.yaml", "base: {lor: a.yaml}", "base: no arm is called 'lor'; nearest: lora"),
        ("base: a.yaml", "base: [a.yaml]", "it takes the name of a configuration file"),
        ("full: [1.0e-3], ", "", "learning_rates names none for the arm full"),
        ("full: [1.0e-3]", "ful: [1.0e-3]", "no arm is called 'ful'; nearest: full"),
        ("loss@2", "loss@5", "give a step up to 4"),
        ("loss@2", "loss@1", "validation runs every 2 steps"),
        ("loss@2", "losses", "no run measures losses; nearest: loss"),
        ("exact_match/base", "exact/base", "no run measures exact/base"),
        ("rank: 2", "rank: two", "arm lora: "),
        ("full: {}", "full: {model.mixer: Attention}", "weights='the base a' brings its own"),
        ("digits: 1", "digits: 1, vocabulary: own", "its base a is trained with another vocab"),
    ],
)
def test_what_is_wrong_with_a_base_is_one_line(place, capsys, old, new, words):
    Path("b.yaml").write_text(ADAPTED.replace(old, new))
    assert main(["compare", "b.yaml"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and words in line, line
    assert not Path("runs").exists(), "all is said before anything is trained"


# What is preferred, learnt from what its base's base was taught: each file names its own base.
RANKED = """
compare: {base: BASE}
model: {learning_rate: 1.0e-2, warmup_steps: 0}
data:
  class_path: RankedAddition
  init_args: {digits: 1, held_out: 5, batch_size: 8, validation_examples: 8, test_examples: 8}
trainer: {accelerator: cpu, max_steps: 4, log_every_n_steps: 1, val_check_interval: 4}
"""
CHAIN = {
    "sft.yaml": RANKED.replace("BASE", "a.yaml"),
    "reward.yaml": f"objective: RewardModel{RANKED.replace('BASE', 'sft.yaml')}",
    "b.yaml": f"""
arms:
  ppo: {{objective: Policy, model.kl_coef: 0.1}}
  scored: {{objective: Policy, model.reward_model: null}}
  dpo: {{objective: DPO, model.beta: 0.3}}
claim:
- {{arm: dpo, metric: kl, rule: non_inferiority, sign: -1, margin: 50}}
- {{arm: dpo, metric: cost/written, sign: -1}}
{RANKED.replace("BASE", "sft.yaml, reads: {model.reward_model: reward.yaml}, metric: score")}
""",
}


@pytest.fixture
def chain(place):
    Path("a.yaml").write_text(CONFIG.replace("digits: 1", "digits: 1, held_out: 5"))
    for name, text in CHAIN.items():
        Path(name).write_text(text)
    return place


def test_a_base_may_have_a_base_and_an_arm_read_another(chain):
    plan = plan_of(config="b.yaml", seeds="0,1")
    assert [(run.arm, run.seed) for run in plan.bases] == [
        (name, seed) for seed in (0, 1) for name in ("a", "sft", "reward")
    ]
    for run in (*plan.bases, *plan.runs.values()):
        assert all(other.seed == run.seed for other in run.reads.values())
    first = {run.arm: run for run in plan.bases[:3]}
    assert first["a"].reads == {} and first["sft"].base is first["a"]
    assert first["reward"].base is first["sft"]
    ppo, scored, dpo = (plan.runs[arm, 1e-2, 0].reads for arm in plan.arms)
    assert ppo == dpo == {"model.weights": first["sft"], "model.reward_model": first["reward"]}
    assert scored == {"model.weights": first["sft"]}, "which says itself that it reads none"
    # What is first in the chain changes all that comes after it, and no name but by that.
    again = plan_of(config="b.yaml", seeds="0,1")
    assert {run.key for run in plan.runs.values()} == {run.key for run in again.runs.values()}
    Path("a.yaml").write_text(Path("a.yaml").read_text().replace("max_steps: 4", "max_steps: 6"))
    other = plan_of(config="b.yaml", seeds="0,1")
    for mine, theirs in zip(plan.runs.values(), other.runs.values(), strict=True):
        assert mine.key != theirs.key and mine.name != theirs.name
    # An option says itself what is read.
    plan = plan_of({"model.reward_model": "null"}, "b.yaml")
    assert [run.arm for run in plan.bases] == ["a", "sft"]


def test_objectives_are_compared_by_what_they_measure_on_the_test_part(chain):
    assert main(["compare", "b.yaml", "--at_once", "3"]) == 0
    found = {row["arm"]: row for row in rows("runs/compare/b/runs.csv")}
    assert list(found) == ["base a", "base sft", "base reward", "ppo", "scored", "dpo"]
    assert found["ppo"]["base"].split() == [found[f"base {n}"]["key"] for n in ("sft", "reward")]
    for arm in ("ppo", "scored", "dpo"):
        row = found[arm]
        assert float(row["test/kl"]) != 0, "it is measured after training, and not before"
        (directory,) = Path("runs/compare/b/runs").glob(f"{arm}_*")
        given = ["--config", str(directory / "config.yaml"), "--table", "again"]
        assert main(["test", "--ckpt_path", str(directory), *given]) == 0
        (again,) = rows(directory / "again.csv")
        for name in ("reward", "score", "kl", "length", "cost/passes", "cost/all_seconds"):
            assert row[f"test/{name}"] == f"{float(again[f'test/{name}']):.6g}", name
    names = ("passes", "written", "seconds", "all_passes")
    cost = {
        arm: {name: float(found[arm][f"test/cost/{name}"]) for name in names}
        for arm in ("ppo", "scored", "dpo")
    }
    assert cost["dpo"]["all_passes"] == cost["dpo"]["passes"] > 0
    assert cost["dpo"]["written"] == 0 < cost["ppo"]["written"]
    assert cost["ppo"]["all_passes"] > cost["ppo"]["passes"] > 0 < cost["ppo"]["seconds"]
    assert cost["scored"]["all_passes"] == cost["scored"]["passes"], "it learns from no model"


@pytest.mark.parametrize(
    ("name", "old", "new", "words"),
    [
        ("sft.yaml", "base: a.yaml", "base: b.yaml", "base sft.yaml: it begins from itself"),
        ("sft.yaml", "base: a.yaml", "base: no.yaml", "configuration not found"),
        (
            "reward.yaml",
            "objective: RewardModel",
            "",
            "the base reward, which has objective=None",
        ),
        ("reward.yaml", "sft.yaml", "sub/sft.yaml", "have one name, and need two: rename one"),
        ("b.yaml", "model.reward_model: re", "data.path: re", "'data.path' is not a setting of"),
        ("b.yaml", "{model.reward_model: reward.yaml}", "[reward.yaml]", "configuration files by"),
        ("b.yaml", "metric: score", "metric: scores", "does not measure it; nearest: score"),
        ("b.yaml", "cost/written", "cost/writing", "no run measures cost/writing; nearest: cost"),
        ("b.yaml", "objective: DPO", "objective: DPP", "unknown objective 'DPP'; nearest: DPO"),
        ("b.yaml", "RankedAddition", "Addition", "arm dpo: the batch holds no ranked answers"),
        ("reward.yaml", "RankedAddition", "Addition", "base reward: the batch holds no ranked"),
        ("b.yaml", "model.kl_coef: 0.1", "model.minibatches: 3", "arm ppo: data.batch_size=8 does"),
        (
            "b.yaml",
            "model.kl_coef: 0.1",
            "model.reference: no",
            "arm ppo: there is no checkpoint at",
        ),
        ("b.yaml", "reward_model: null", "reward_model: no", "arm scored: there is no checkpoint"),
        ("b.yaml", "max_steps: 4,", "max_steps: 4, accumulate_grad_batches: 2,", "arm ppo: traine"),
        (
            "b.yaml",
            "class_path: RankedAddition\n  init_args: {",
            "class_path: Addition\n  init_args: {pack: 2, ",
            "arm ppo: a row of the batch asks several questions: give --data.pack 1",
        ),
    ],
)
def test_what_is_wrong_with_a_chain_is_one_line(chain, capsys, name, old, new, words):
    Path("sub").mkdir()
    Path("sub/sft.yaml").write_text(CHAIN["sft.yaml"].replace("a.yaml", "../a.yaml"))
    text = Path(name).read_text()
    assert old in text
    Path(name).write_text(text.replace(old, new))
    assert main(["compare", "b.yaml"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and words in line, line
    assert not Path("runs").exists(), "all is said before anything is trained"


# ---------------------------------------------------------------------------- placing


def test_runs_share_the_processor_or_take_a_gpu_each(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(places, "cores", lambda: 16)
    found = slots("cpu", 4)
    assert [slot.name for slot in found] == ["cpu"] * 4
    assert {slot.environment["OMP_NUM_THREADS"] for slot in found} == {"4"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    found = slots("auto", 2)
    assert [slot.environment["CUDA_VISIBLE_DEVICES"] for slot in found] == ["0", "1", "0", "1"]
    assert {slot.environment["OMP_NUM_THREADS"] for slot in found} == {"4"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert gpus() == ["5", "7"] and gpus("cpu") == []
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert slots("cpu", 2)[0].environment == {"OMP_NUM_THREADS": "1"}


@pytest.fixture
def two_gpus(place, monkeypatch):
    """A machine that seems to have two; its runs are trained on the processor all the same."""
    names = ["GPU-8a", "GPU-1c"]
    monkeypatch.setattr(places, "gpus", lambda accelerator="auto": names)
    monkeypatch.setattr(command, "gpus", places.gpus)
    properties = SimpleNamespace(total_memory=2**37, name="seeming GPU")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: properties)
    # Every process of a run says in its log which GPU it sees.
    Path("seen.py").write_text(
        "import os\nprint('sees', os.environ.get('CUDA_VISIBLE_DEVICES'), flush=True)\n"
    )
    monkeypatch.syspath_prepend(str(place))
    return names


def test_each_of_several_gpus_trains_a_run(two_gpus, capsys):
    """A run that fails leaves the others alone, and what is interrupted is resumed."""
    given = ["compare", "a.yaml", "--import", "seen", "--seeds", "0,1"]
    given += ["--model.learning_rate", "1e-3,1e18"]
    assert main([*given, "--minutes", "0.001"]) == 0
    assert "all runs are saved; to continue" in capsys.readouterr().out
    assert main(given) == 1
    captured = capsys.readouterr()
    assert "2 at once on gpu GPU-8a, gpu GPU-1c, " in captured.out
    assert captured.err.startswith("error: 2 of 4 runs failed")
    on, used = {}, set()
    for line in captured.out.splitlines():
        if found := re.match(r"\S+  (.*)  (started|done|FAILED)  (?:on (\S+ \S+)$)?", line):
            if found[2] == "started":
                assert found[3] not in on.values(), "one at a time"
                on[found[1]] = found[3]
            else:
                used.add(on.pop(found[1]))
    assert not on and used == {f"gpu {name}" for name in two_gpus}
    done = [row for row in rows("runs/compare/a/runs.csv") if row["state"] == "trained"]
    assert sorted(row["seed"] for row in done) == ["0", "1"]
    logs = list(Path("runs/compare/a/logs").iterdir())
    assert len(logs) == 4
    for log in logs:
        said = re.findall(r"^(on gpu|sees) (\S+)$", log.read_text(), re.MULTILINE)
        (_, placed), (word, seen) = said[-2:]  # of the process that ended
        assert word == "sees" and seen == placed, said


def test_few_runs_spread_over_the_gpus(place):
    """Whatever order places were left in."""
    both = [Slot(f"gpu {number}", {}) for number in (0, 1, 0, 1)]
    statuses = {}

    class Waiting(processes.Starter):
        def start(self, what, log, environment):
            number = len(statuses)
            statuses[number] = None
            return SimpleNamespace(poll=lambda: statuses[number])

    plan = plan_of(seeds="0,1,2,3,4,5")
    runner = Runner(plan, Path("out"), both, None, lambda event: None, Waiting())
    jobs = [Job(run, tests=True) for run in plan.runs.values()]
    runner.waiting.extend(jobs[:4])
    runner._start_some()
    for ended in ((1, 3), (0, 2)):
        statuses |= dict.fromkeys(ended, 1)
        runner._collect()
    runner.waiting.extend(jobs[4:])
    runner._start_some()
    assert {slot.name for _, _, slot in runner.going.values()} == {"gpu 0", "gpu 1"}


# ---------------------------------------------------------------------------- learning rates


def test_the_rate_is_chosen_on_validation_data(place):
    plan = plan_of(MIXERS, seeds="0,1", learning_rates="1e-3,2e-3,4e-3", metric="loss")
    losses = {(1e-3, 0): 2.0, (1e-3, 1): 1.0, (2e-3, 0): 1.2, (2e-3, 1): 1.3}
    losses |= {(4e-3, 0): 0.1}  # of its other seed there is nothing: it diverged

    def metrics(run):
        value = losses.get((run.rate, run.seed))
        return {} if value is None else {"validation/loss": value, "test/loss": -value}

    assert choose(plan, "Retention", metrics) == 2e-3
    assert choose(plan, "Retention", lambda run: {}) is None
    plan = plan_of(MIXERS, seeds="0", learning_rates="1e-3,2e-3")
    assert plan.metric == "exact_match" and not plan.lower
    found = {"validation/exact_match": 0.0, "validation/loss": 1.0}
    tied = {1e-3: found, 2e-3: found | {"validation/loss": 0.5}}
    assert choose(plan, "Attention", lambda run: tied[run.rate]) == 2e-3, "of equals: lower loss"
    tied[1e-3] = found | {"validation/exact_match": 0.1}
    assert choose(plan, "Attention", lambda run: tied[run.rate]) == 1e-3


# ---------------------------------------------------------------------------- statistics


def test_quantiles_of_student_are_the_tabled_ones():
    tabled = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 30: 2.042, 100: 1.984}
    for freedom, value in tabled.items():
        assert statistics.t_quantile(0.975, freedom) == pytest.approx(value, abs=6e-4)
    assert statistics.t_quantile(0.8, 4) == pytest.approx(0.9410, abs=1e-4)
    assert statistics.t_quantile(0.975, 10**6) == pytest.approx(1.96, abs=3e-3)
    # With one degree of freedom it is Cauchy's distribution, with two it has a closed form.
    assert statistics.t_cdf(1.7, 1) == pytest.approx(0.5 + math.atan(1.7) / math.pi)
    assert statistics.t_cdf(1.7, 2) == pytest.approx(0.5 + 1.7 / (2 * math.sqrt(2 + 1.7**2)))


def test_differences_are_paired_by_seed():
    control = {0: 2.0, 1: 3.0, 2: 4.0, 9: 100.0}
    found = statistics.paired({0: 1.9, 1: 2.8, 2: 3.7, 5: 0.0}, control)
    assert found.seeds == 3 and found.mean == pytest.approx(-0.2) and found.reference == 3.0
    half = 4.3027 * 0.1 / math.sqrt(3)
    assert found.low == pytest.approx(-0.2 - half, abs=1e-4)
    assert found.high == pytest.approx(-0.2 + half, abs=1e-4)
    assert found.relative().mean == pytest.approx(-0.2 / 3)
    assert statistics.paired({0: 1.0}, control).low is None
    assert statistics.paired({7: 1.0}, control) is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_run_whose_loss_is_not_finite_costs_no_table(value):
    found = statistics.summary([value, 2.0])
    assert not math.isfinite(found.mean) and math.isnan(found.spread) and found.seeds == 2
    assert tables.mean_and_spread([value, 2.0], "loss") == f"{value:.4f} ± nan"
    difference = statistics.paired({0: value, 1: 2.0}, {0: 1.0, 1: value})
    assert math.isnan(difference.mean) and math.isnan(difference.low)
    assert "nan" in tables.difference_text(difference, "loss", lower=True)
    claim = claims.Claim(None, None, None, -0.01, -1, 0.003, "difference")
    values = {"plain": {0: 1.0, 1: 2.0}, "other": {0: value, 1: 2.0}}
    assert claims.judge(claim, values, relative=True)[0].verdict == "undecided"


def test_seeds_needed_are_those_of_the_facts():
    # 80 % power at 5 %, two-sided; with normal quantiles n = (2.8 sd / effect)^2.
    assert statistics.seeds_needed(0.00301, 0.00380) == 8  # 4.9 of the normal's, 3 more of t's
    assert statistics.seeds_needed(0.02, 0.0038) == pytest.approx(15.7 * 13.9, rel=0.03)
    assert statistics.seeds_needed(1.0, 0.0) is None
    assert statistics.seeds_needed(1.0, 1e-4) is None


def verdict(values, **claim):
    entry = {"arm": "b", "control": "a", **claim}
    (found,) = claims.read_claims(entry, ["a", "b"], "x.yaml")
    by_seed = {arm: dict(enumerate(entries)) for arm, entries in values.items()}
    (judged,) = claims.judge(found, by_seed, relative=True)
    return judged


def test_verdicts_follow_the_rule_that_was_written_before():
    a = [1.0, 1.0, 1.0]

    def of(*b, **claim):
        return verdict({"a": a, "b": list(b)}, **claim).verdict

    assert of(0.964, 0.965, 0.966, paper=-0.035) == "holds in size"
    assert of(0.979, 0.980, 0.981, paper=-0.035) == "holds"
    assert of(0.979, 0.980, 0.981, sign=-1) == "holds"
    assert of(1.019, 1.020, 1.021, paper=-0.035) == "refuted", "on the other side"
    assert of(0.998, 0.999, 1.000, paper=-0.035) == "refuted", "within a third of the paper's"
    assert of(0.90, 1.0, 1.02, paper=-0.035) == "undecided"
    assert of(1.049, 1.050, 1.051, paper=0.05) == "holds in size"
    assert of(0.999, 1.0, 1.001, rule="equivalence", margin=0.003) == "holds"
    assert of(1.009, 1.01, 1.011, rule="equivalence", margin=0.003) == "refuted"
    assert of(0.99, 1.0, 1.01, rule="equivalence", margin=0.003) == "undecided"
    worse = {"rule": "non_inferiority", "sign": 1, "margin": 0.003}
    assert of(0.999, 1.0, 1.001, **worse) == "holds" == of(1.9, 2.0, 2.1, **worse)
    assert of(0.989, 0.99, 0.991, **worse) == "refuted"
    assert of(0.99, 1.0, 1.01, **worse) == "undecided"
    low = worse | {"sign": -1}
    assert of(0.4, 0.5, 0.6, **low) == "holds" and of(1.009, 1.01, 1.011, **low) == "refuted"
    text = verdict({"a": a, "b": [0.99, 1.0, 1.01]}, **worse).text
    assert re.search(r"; (\d+) seeds would decide", text)[1] == str(seeds_needed(0.01, 0.003))
    text = verdict({"a": a, "b": [0.90, 1.0, 1.02]}, paper=-0.035).text
    assert "undecided at 3 seeds" in text and "seeds would decide" in text
    assert "the paper -3.5 %" in text
    assert "an anecdote" in verdict({"a": [1.0], "b": [0.5]}, paper=-0.035).text


@pytest.mark.parametrize(
    ("claim", "words"),
    [
        ({"control": "c"}, "control 'c': the arms are a, b"),
        ({"paper": "much"}, "paper='much' is not a number"),
        ({"rule": "hope", "sign": 1}, "rule='hope' is none of difference, equivalence, non_inf"),
        ({}, "sign=0 must be -1"),
        ({"rule": "equivalence"}, "needs a margin"),
        ({"rule": "non_inferiority", "sign": 1}, "non_inferiority needs a margin"),
        ({"rule": "non_inferiority", "margin": 1}, "sign=0 must be -1"),
        ("lower", "claim is 'lower'"),
    ],
)
def test_a_claim_that_says_too_little_is_refused(claim, words):
    with pytest.raises(ValueError, match=words):
        claims.read_claims(claim, ["a", "b"], "x.yaml")
    assert claims.read_claims(None, [], "x.yaml") == []


# ---------------------------------------------------------------------------- runs

RUN = [sys.executable, "-m", "archzoo", "compare", "a.yaml", "--at_once", "2"]
RUN += ["--model.mixer", "Retention,Attention", "--model.match", "parameters"]
MEASURED = {"tokens_per_second", "process_memory_mb", "peak_memory_mb", "seconds"}
MEASURED |= {"command", "commit"}


def rows(path):
    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file))


def digits(path):
    """A table without what is another one each time: speed, memory, time and command."""
    return [{n: v for n, v in row.items() if n not in MEASURED} for row in rows(path)]


def until(condition, seconds=300.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.02)


def trainers(place):
    """Processes that train in a directory, by their ids."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes()
            if b"compare.child" in words and os.readlink(entry / "cwd") == str(place):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


@pytest.mark.slow  # a minute: six processes that import torch, one after another
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_comparison_is_continued_by_the_same_command(tmp_path, monkeypatch, capsys):
    """The parent is killed, then a run, then a signal ends all; the digits are the same."""
    monkeypatch.chdir(tmp_path)
    long = CONFIG.replace("max_steps: 4", "max_steps: 500").replace("interval: 2", "interval: 100")
    Path("a.yaml").write_text(f"{long}checkpoint: {{every_n_steps: 10}}\n")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    output, settings_of = tmp_path / "runs/compare/a", ("--seeds", "0", "--metric", "loss")

    def start():
        with Path("log").open("a") as log:
            return subprocess.Popen([*RUN, *settings_of], stdout=log, stderr=log, env=environment)

    def begun():
        return len(list(output.glob("runs/*/last.ckpt")))

    parent = start()
    until(lambda: begun() or parent.poll() is not None)
    assert main([*RUN[3:], *settings_of]) == 1
    refused = capsys.readouterr().err
    assert "is in use by process" in refused and "another --output" in refused
    assert refused.count("\n") == 1
    assert main(["compare", "--status", str(output)]) == 0
    said = capsys.readouterr().out
    assert "running: process" in said and re.search(r"Retention +0 +0.002 .* / 500", said)
    parent.kill()
    until(lambda: not trainers(tmp_path))  # no one is left behind
    parent.wait()
    assert main(["compare", "--status", str(output)]) == 0
    assert "the same command resumes it" in capsys.readouterr().out

    def saved():
        return {path: path.stat().st_mtime_ns for path in output.glob("runs/*/last.ckpt")}

    before = saved()
    assert before, "it was saved"
    parent = start()
    until(lambda: saved() != before)
    running = [process for process in trainers(tmp_path) if process != parent.pid]
    forked = [
        p for p in running if Path(f"/proc/{p}/stat").read_text().split()[3] != str(parent.pid)
    ]
    os.kill(forked[0], signal.SIGKILL)
    until(lambda: "ended by SIGKILL" in Path("log").read_text())
    parent.send_signal(signal.SIGTERM)
    assert parent.wait() == 143 and not trainers(tmp_path)
    assert "all runs are saved; to continue" in Path("log").read_text()

    assert start().wait() == 0, Path("log").read_text()
    log = "".join(path.read_text() for path in output.glob("logs/*.log"))
    assert "held another run" not in log
    compared = digits(output / "runs.csv")
    assert len(compared) == 2 and {row["state"] for row in compared} == {"trained"}
    assert all(float(row["test/loss"]) < 2 and row["step"] == "500" for row in compared)
    for path in output.glob("runs/*/metrics.csv"):
        steps = [int(row["step"]) for row in rows(path) if row["train/loss"]]
        assert steps == list(range(1, 501)), "no step twice, and none missing"

    # The same, never interrupted.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert main([*RUN[3:], *settings_of, "--output", "whole"]) == 0
    order = lambda row: row["run"]  # noqa: E731
    assert sorted(digits("whole/runs.csv"), key=order) == sorted(compared, key=order)
    assert digits("whole/table.csv") == digits(output / "table.csv")
    # Nothing is left: a call more trains nothing, and says the same.
    capsys.readouterr()
    assert main([*RUN[3:], *settings_of, "--output", "whole"]) == 0
    assert "started" not in capsys.readouterr().out


def test_what_is_trained_has_done_all_its_steps(tmp_path, monkeypatch):
    """Also where the run was too short for a row of its log."""
    run = {"arm": "one", "seed": 0, "learning_rate": 1e-3, "name": "one_0", "steps": 4}
    found = {"runs": [run], "measured": "last", "metric": "loss"}
    assert progress.lines(found, tmp_path)[0].step == 0
    monkeypatch.setattr(progress, "state_of", lambda directory: "trained")
    assert progress.lines(found, tmp_path)[0].step == 4


def test_a_base_is_trained_once_and_what_is_left_of_it_is_measured(place, capsys):
    Path("b.yaml").write_text(ADAPTED)
    assert main(["compare", "b.yaml", "--at_once", "2"]) == 0
    out = capsys.readouterr().out
    assert "base a, rate 0.002, seed 3  done" in out and "lora: the learning rate is" in out
    assert "lora against full, exact_match/base: undecided at 1 seed" in out
    assert "lora against full, loss@2: undecided at 1 seed" in out
    base, full, *lora = rows("runs/compare/b/runs.csv")
    assert base["arm"] == "base a" and full["base"] == base["key"]
    (run,) = Path("runs/compare/bases").iterdir()
    weights = [torch.load(d / "last.ckpt")["base"] for d in Path("runs/compare/b/runs").iterdir()]
    assert len(set(weights)) == 1 and weights[0]
    # The base's own task, of the base and of what was made of it.
    measured = [row for row in (full, *lora) if row["test/loss"]]
    assert all(row["test/exact_match/base"] and row["test/loss/base"] for row in measured)
    again = f"test --ckpt_path {run / 'last.ckpt'} --trainer.accelerator cpu --table again"
    assert main(again.split()) == 0
    assert rows(run / "again.csv")[0]["test/loss"] == rows(run / "test.csv")[0]["test/loss"]
    held = {
        row["step"]: row for row in rows(Path("runs/compare/b/runs", full["run"], "metrics.csv"))
    }
    assert float(full["validation/loss@2"]) == pytest.approx(
        float(held["2"]["validation/loss"] or 0), rel=1e-4
    )
    for table in (rows("runs/compare/b/table.csv"), rows("runs/compare/b/runs.csv")[1:]):
        assert [int(row["trainable"]) < int(row["parameters"]) for row in table[:2]] == [
            False,
            True,
        ]
    verdicts = {row["arm"]: row["verdict"] for row in rows("runs/compare/b/table.csv")}
    both = "exact_match/base against full: undecided; loss@2 against full: undecided"
    assert verdicts == {"full": "", "lora": both}
    # Another comparison beside it finds the base; and its status tells of it.
    capsys.readouterr()
    words = "compare b.yaml --arms full --trainer.max_steps 2 --output runs/compare/c"
    assert main(words.split()) == 0
    assert not re.search(r"base a,.*started", capsys.readouterr().out)
    assert main(["compare", "--status", "runs/compare/c"]) == 0
    assert re.search(r"base a +3 .*done", capsys.readouterr().out)


def test_a_base_that_another_comparison_has_just_started_is_waited_for(place, capsys):
    """Before it trains, and so before its own directory is held."""
    Path("b.yaml").write_text(ADAPTED)
    (run,) = plan_of(config="b.yaml").bases
    lock = Lock(Path("runs/compare/bases", f".{run.name}"))
    words = ["compare", "b.yaml", "--arms", "full"]
    assert main([*words, "--minutes", "0.02"]) == 0
    assert "started" not in capsys.readouterr().out
    lock.release()
    assert main(words) == 0
    assert re.search(r"base a,.*started", capsys.readouterr().out)
    assert [path.name for path in Path("runs/compare/bases").iterdir()] == [run.name]


def test_of_runs_that_failed_bases_are_counted_too(place, capsys):
    Path("b.yaml").write_text(ADAPTED)
    text = CONFIG.replace("warmup_steps: 2", "warmup_steps: 0, learning_rate: 1.0e+18")
    Path("a.yaml").write_text(text)
    assert main(["compare", "b.yaml"]) == 1
    assert "error: 4 of 4 runs failed" in capsys.readouterr().err


def test_a_server_whose_parent_is_gone_says_nothing():
    program = """
import os
from archzoo.analysis.compare.child import _say
reading, writing = os.pipe()
os.close(reading)
os.dup2(writing, 1)
_say(number=1)
"""
    given = [sys.executable, "-c", program]
    found = subprocess.run(given, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True)
    assert found.returncode == 0 and found.stderr == b""


def test_claims_are_of_the_arms_that_are_taken(place):
    Path("b.yaml").write_text(ADAPTED)
    assert len(plan_of(config="b.yaml").claims) == 2
    for arms in ("lora", "full"):
        assert plan_of(config="b.yaml", arms=arms).claims == []


def test_what_is_frozen_is_not_counted_as_trained(place):
    frozen = "full: {model.freeze: [bottom.1]}, late: {model.freeze: all, model.unfreeze_every: 1}"
    Path("b.yaml").write_text(
        ADAPTED.replace("full: {}", frozen).replace(
            "{full: [1.0e-3],", "{full: 1.0e-3, late: 1.0e-3,"
        )
    )
    full, late, lora = plan_of(config="b.yaml").arms.values()
    base = lora.sizes.parameters - lora.trainable
    assert 0 < full.trainable < full.sizes.parameters == late.trainable == base


def test_a_table_has_a_plain_name_and_is_of_evaluations(place, capsys):
    for words, said in (
        ("fit --config a.yaml --table x", "--table is for validate and test"),
        ("test --config a.yaml --table ../x", "give the plain name of a file"),
        ("test --config a.yaml --table metrics", "metrics is of fit"),
    ):
        assert main(words.split()) == 1
        assert said in capsys.readouterr().err


def test_failed_and_cut_runs_do_not_cost_the_others(place, capsys, monkeypatch):
    """Of three learning rates one diverges; another comparison is cut by its time."""
    Path("d.yaml").write_text(CONFIG + "claim: {metric: loss, paper: -0.1}\narms: {one: {}}\n")
    words = "compare d.yaml --learning_rates 1e-3,2e-3,1e18 --metric loss --seeds 3 --at_once 2"
    assert main([*words.split(), "--model.warmup_steps", "0", "--trainer.max_steps", "6"]) == 1
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and "1 of 3 runs failed" in err
    assert re.search(r"(?s)rate 1e\+18, seed 3  FAILED .*(nan|not finite)", out)
    assert "the learning rate is 0.002" in out and "is the largest tried" not in out
    assert "one seed: an anecdote" in out
    found = {row["learning_rate"]: row for row in rows("runs/compare/d/runs.csv")}
    assert found["1e+18"]["state"] == "failed" and found["1e+18"]["chosen"] == ""
    assert found["0.002"]["test/loss"] and not found["0.001"]["test/loss"], "tested at one rate"
    (row,) = rows("runs/compare/d/table.csv")
    assert row["n"] == "1" and row["part"] == "test" and row["loss_sd"] == ""
    page = Path("runs/compare/d/table.md").read_text()
    assert "failed" in page and "0.002" in page and "curves.png" in page
    assert Path("runs/compare/d/curves.png").stat().st_size > 10_000

    words = "compare d.yaml --seeds 3 --trainer.max_time 00:00:00:00 --output cut"
    assert main(words.split()) == 0
    (row,) = rows("cut/runs.csv")
    assert row["state"] == "cut" and not Path("cut/table.csv").exists()
    assert "cut at step" in capsys.readouterr().out


# ---------------------------------------------------------------------------- prepared

# Arms that begin from what a command makes of bases, of which one is an arm of a file.
STILL = CONFIG.replace("{preset: retnet_micro, warmup_steps: 2}", "{learning_rate: 1.0e-30}")
PREPARED = f"""
arms:
  merged: {{}}
  binary: {{}}
  plain: {{}}
  adapted: {{model.adapter: {{class_path: LoRA, init_args: {{rank: 2}}}}}}
compare:
  base: a.yaml # of plain alone: for the others a command makes what they begin from
  seeds: [3]
  prepare:
    merged: >-
      merge {{x.yaml:fast}} {{x.yaml}} --base {{a.yaml}}
      --method dare --density 0.5 --seed {{seed}}
    binary: binarise {{a.yaml}} --method OneBit
    adapted: merge {{x.yaml}} --base {{a.yaml}} --method task_arithmetic --scale 0.5
claim: {{arm: binary, control: plain, metric: exact_match, rule: non_inferiority, sign: 1,
  margin: 0.2, relative: true}}
{STILL.replace("max_steps: 4", "max_steps: 2")}
"""
EXPERTS = f"""
compare: {{base: a.yaml, may_differ: data}}
arms: {{fast: {{model.learning_rate: 1.0e-2}}}}
{CONFIG.replace("{preset: retnet_micro, warmup_steps: 2}", "{warmup_steps: 2}")}
"""


@pytest.fixture
def prepared(place):
    Path("x.yaml").write_text(EXPERTS)
    Path("b.yaml").write_text(PREPARED)
    return place


def test_an_arm_begins_from_what_a_command_makes_of_bases(prepared):
    plan = plan_of(config="b.yaml", seeds="0,1")
    assert [run.arm for run in plan.bases] == ["a", "x_fast", "x"] * 2
    merged, plain = (plan.runs[arm, 1e-30, 1] for arm in ("merged", "plain"))
    assert {name: (run.arm, run.seed) for name, run in merged.reads.items()} == {
        "{x.yaml:fast}": ("x_fast", 1),
        "{x.yaml}": ("x", 1),
        "{a.yaml}": ("a", 1),
    }
    assert merged.base is None and plain.base is not None and not plain.prepare
    words = merged.preparing(Path("o"))
    assert words[:2] == ["merge", f"bases/{merged.reads['{x.yaml:fast}'].name}/last.ckpt"]
    assert words[-4:] == ["--seed", "1", "--out", f"o/prepared/{merged.name}"]
    assert plan.arms["binary"].sizes.parameters > plan.arms["plain"].sizes.parameters
    # The command and what it reads are a part of the run's key.
    Path("b.yaml").write_text(PREPARED.replace("density 0.5", "density 0.4"))
    other = plan_of(config="b.yaml", seeds="0,1")
    differ = {at[0] for at, run in plan.runs.items() if other.runs[at].key != run.key}
    assert differ == {"merged"}
    Path("x.yaml").write_text(EXPERTS.replace("1.0e-2", "1.0e-3"))
    third = plan_of(config="b.yaml", seeds="0,1")
    assert third.runs["merged", 1e-30, 1].key != other.runs["merged", 1e-30, 1].key
    assert third.runs["binary", 1e-30, 1].key == other.runs["binary", 1e-30, 1].key


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("binary: bin", "binry: bin", "prepare: no arm is called 'binry'; nearest: binary"),
        ("binarise {", "generate {", "it takes a command of binarise, merge, upcycle"),
        ("OneBit", "OneBit --out x", "omit --out: each run has a directory of its own"),
        ("binarise {a.yaml}", "binarise {a}", "{a} is neither {seed} nor a configuration file"),
        ("binarise {a.yaml}", "binarise {no.yaml}", "configuration not found: no.yaml"),
        ("{x.yaml:fast}", "{x.yaml:fats}", "base x.yaml: "),
        ("method OneBit", "method TwoBit", "arm binary: prepare: "),
        ("density 0.5", "density 5", "arm merged: prepare: merge: density=5.0 is the share"),
        ("method OneBit", "'method OneBit", "No closing quotation"),
        ("relative: true", "relative: much", "relative='much' is neither true nor false"),
    ],
)
def test_what_is_wrong_with_a_command_is_one_line(prepared, capsys, old, new, words):
    assert old in PREPARED
    Path("b.yaml").write_text(PREPARED.replace(old, new))
    assert main(["compare", "b.yaml"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and words in line, line
    assert not Path("runs").exists(), "all is said before anything is trained"


def test_a_signal_ends_a_command_and_is_no_error_of_it(monkeypatch):
    def ended(checkpoints: list[str], /) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)

    monkeypatch.setattr("archzoo.conversion.merge.merge_command", ended)
    with SIGNALS, pytest.raises(Ended, match="ended by SIGTERM"):
        prepare(["merge", "a", "b"])


def test_what_is_prepared_is_measured_and_made_again_after_an_interruption(prepared, capsys):
    assert main(["compare", "b.yaml", "--at_once", "2"]) == 0
    assert "binary against plain, exact_match: undecided at 1 seed" in capsys.readouterr().out
    output = Path("runs/compare/b")
    (run,) = output.glob("runs/merged_*")
    before = torch.load(run / "last.ckpt")["state_dict"]
    # At a learning rate that changes nothing it is what the command makes.
    bases = {p.name.partition("_lr")[0]: str(p) for p in Path("runs/compare/bases").iterdir()}
    words = f"merge {bases['x_fast']} {bases['x']} --base {bases['a']} --out by_hand"
    assert main([*words.split(), *["--method", "dare", "--density", "0.5", "--seed", "3"]]) == 0
    by_hand = archzoo.checkpoint.load("by_hand").model.state_dict()
    assert all(torch.equal(before[f"decoder.{name}"], t) for name, t in by_hand.items())
    found = {row["arm"]: row for row in rows(output / "runs.csv")}
    merged, keys = found["merged"], [found[f"base {name}"]["key"] for name in ("x_fast", "x", "a")]
    assert merged["base"].split() == keys and merged["test/loss"] != found["plain"]["test/loss"]
    # A run that was ended as its model was being written begins again.
    for path in (*run.iterdir(), output / "prepared" / run.name / "config.json"):
        path.unlink()
    capsys.readouterr()
    assert main(["compare", "b.yaml", "--at_once", "2"]) == 0
    said = capsys.readouterr().out
    assert re.findall(r"(\w+), rate .*started", said) == ["merged"]
    after = torch.load(run / "last.ckpt")["state_dict"]
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())


def test_a_claim_may_be_of_a_fraction_of_the_controls():
    values = {"a": dict(enumerate([0.5, 0.5, 0.5])), "b": dict(enumerate([0.43, 0.431, 0.429]))}
    told = {"arm": "b", "rule": "non_inferiority", "sign": 1, "margin": 0.1}
    for relative, verdict in ((None, "holds"), (True, "refuted"), (False, "holds")):
        claim = claims.read_claims(told | {"relative": relative}, ["a", "b"], "x.yaml")[0]
        (found,) = claims.judge(claim, values, relative=claim.is_relative("exact_match"))
        assert found.verdict == verdict


def test_a_run_on_a_cpu_is_of_the_cpu_beside_a_gpu_that_was_asked_something(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 0)
    child._write_facts(str(tmp_path / "facts"))
    assert json.loads((tmp_path / "facts").read_text())["machine"] == evidence.machine("cpu")
