"""Reward model, policy and DPO by `fit`: rollouts, what stays frozen, resuming, and bad input."""

from __future__ import annotations

import csv
import math
import shutil
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import yaml

import archzoo
from archzoo.checkpoint import read_safely
from archzoo.cli import main
from archzoo.preferences.answers import read, write_answers
from archzoo.preferences.dpo import DPO
from archzoo.preferences.losses import log_probabilities
from archzoo.preferences.policy import Policy
from archzoo.preferences.reward_model import RewardModel
from archzoo.tasks import Addition, RankedAddition
from archzoo.tasks.tokenizers import CharacterTokenizer
from archzoo.training.callbacks import Checkpoints
from archzoo.training.files import CheckpointFiles, MetricsFile, write_checkpoint

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs" / "preferences"
TINY = ["--data.digits=1", "--data.batch_size=8", "--data.validation_examples=8"]
TINY += ["--data.held_out=5", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
STEPS = {"sft": 2, "reward": 2, "policy": 6, "dpo": 2}
OBJECTIVES: dict[str, tuple[Any, dict[str, Any]]] = {
    "PPO": (Policy, {"kl_coef": 0.1}),
    "REINFORCE": (Policy, {"method": "REINFORCE"}),
    "DPO": (DPO, {}),
    "RewardModel": (RewardModel, {}),
}


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which the four files have trained for some steps, one after the other."""
    place = tmp_path_factory.mktemp("chain")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        sizes = ["--model.preset=retnet_micro", "--model.dim=16", "--model.heads=2"]
        base = ["--data=Addition", "--trainer.max_steps=2", *sizes, *TINY]
        assert main(["fit", "--name=adder_retention", *base]) == 0
        for name, steps in STEPS.items():
            given = [f"--trainer.max_steps={steps}", f"--trainer.val_check_interval={steps}"]
            given += ["--trainer.log_every_n_steps=1", *TINY]
            assert main(["fit", "--config", str(CONFIGS / f"{name}.yaml"), *given]) == 0
    return place


@pytest.fixture
def runs(chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that directory's runs, under the current directory."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(chain / "runs", "runs")
    return Path("runs")


def rows(directory: Path) -> list[dict[str, str]]:
    with open(directory / "metrics.csv") as file:
        return list(csv.DictReader(file))


def task(**options: Any) -> RankedAddition:
    return RankedAddition(
        **({"digits": 1, "held_out": 5, "batch_size": 8, "validation_examples": 8} | options)
    )


def made(runs: Path, objective: str, **options: Any) -> Any:
    cls, own = OBJECTIVES[objective]
    if cls is not RewardModel:
        own = own | {"reward_model": str(runs / "reward")}
    settings = {"weights": str(runs / "sft"), "learning_rate": 1e-2, "warmup_steps": 2}
    return cls(**(settings | own | options))


def trainer_of(directory: str, steps: int, *callbacks: Any, **options: Any) -> lightning.Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "default_root_dir": directory,
        "max_steps": steps,
        "limit_val_batches": 0,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "logger": MetricsFile(f"{directory}/metrics.csv"),
        "plugins": [CheckpointFiles()],
        "callbacks": [*callbacks, Checkpoints(every_n_steps=3)],
    }
    return lightning.Trainer(**(settings | options))


def fit(model: Any, directory: str = "run", steps: int = 2, *callbacks: Any, **options: Any) -> Any:
    path = options.pop("ckpt_path", None)
    data = options.pop("data", None) or task()
    trainer_of(directory, steps, *callbacks, **options).fit(model, data, ckpt_path=path)
    return model


# ---------------------------------------------------------------------------- the chain


def test_each_file_begins_from_the_one_before_and_logs_what_it_must(chain: Path) -> None:
    five = {"reward", "score", "kl", "exact_match", "length"}
    costs = {f"cost/{name}" for name in ("passes", "written", "seconds", "all_passes")}
    for name, split, wanted in (
        ("policy", "train", {*five, "clipped", "value_loss"}),
        ("policy", "validation", {*five, *costs, "loss"}),
        ("dpo", "train", {"chosen", "rejected", "accuracy"}),
        ("dpo", "validation", {*five, *costs, "loss"}),
        ("reward", "validation", {"accuracy", "loss"}),
    ):
        held = {
            key.removeprefix(f"{split}/")
            for row in rows(chain / "runs" / name)
            for key, value in row.items()
            if value and key.startswith(split)
        }
        assert wanted <= held, (name, split)
    places = {"sft": "adder_retention", "reward": "sft", "policy": "sft", "dpo": "sft"}
    for name, before in places.items():
        settings = yaml.safe_load((chain / "runs" / name / "config.yaml").read_text())
        assert settings["model"]["weights"] == f"runs/{before}/last.ckpt"
    first = next(row for row in rows(chain / "runs" / "policy") if row["train/kl"])
    assert float(first["train/kl"]) == 0, "at the start the policy is its reference"


def test_what_was_trained_is_a_language_model_to_all_else(runs: Path) -> None:
    model, tokenizer = archzoo.from_pretrained(runs / "policy")
    assert archzoo.generate(model, "1+2=", tokenizer=tokenizer, max_tokens=2).texts
    quick = TINY[-2:]
    assert main(["test", "--ckpt_path", "runs/policy", *quick, "--data.test_examples=8"]) == 0
    assert archzoo.from_pretrained(runs / "reward")[0].vocab_size == model.vocab_size
    # What another objective trained, or none, is measured by a file's settings, too.
    for name in ("sft", "dpo", "reward"):
        given = ["--config", str(CONFIGS / "policy.yaml"), *TINY, "--data.test_examples=8"]
        assert main(["test", "--ckpt_path", f"runs/{name}", *given]) == 0, name
    # By its own objective a file's settings evaluate it, before training and after.
    given = ["--config", str(CONFIGS / "policy.yaml"), *TINY]
    assert main(["validate", *given, "--trainer.default_root_dir", "before"]) == 0
    assert main(["validate", "--ckpt_path", "runs/policy/last.ckpt", *given]) == 0
    with open(runs / "policy" / "validate.csv") as file:
        after = list(csv.DictReader(file))[-1]
    last = [row for row in rows(runs / "policy") if row["validation/reward"]][-1]
    for name in ("reward", "score", "kl", "exact_match", "length", "cost/passes"):
        assert after[f"validation/{name}"] == last[f"validation/{name}"], name
    # A run's own file says `ckpt_path: null`, and does not take back what the command says.
    given = ["--config", "runs/policy/config.yaml", "--table", "again"]
    assert main(["validate", "--ckpt_path", "runs/policy", *given]) == 0
    with open(runs / "policy" / "again.csv") as file:
        (again,) = csv.DictReader(file)
    assert again["validation/kl"] == after["validation/kl"] != "0.0"


def test_fit_resumes_by_the_checkpoint_alone(runs: Path) -> None:
    steps = STEPS["policy"] + 2
    again = ["--trainer.max_steps", str(steps), "--trainer.enable_progress_bar=false"]
    assert main(["fit", "--ckpt_path", "runs/policy", *again]) == 0
    assert read_safely(runs / "policy" / "last.ckpt")["global_step"] == steps


# ---------------------------------------------------------------------------- rollouts


def test_answers_are_those_of_each_row_alone(runs: Path) -> None:
    """Written in a batch from a state; read in parallel they are as likely as step by step."""
    data = task()
    data.prepare()
    model, _ = archzoo.from_pretrained(runs / "sft")
    batch = data.train_dataloader().batch(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3)  # for answers that differ, and some that stop
    model = model.double()
    found = write_answers(model, data, batch, max_tokens=6, temperature=0.7, seed=11)
    together, _, _ = read(model, found.tokens, found.documents, 0.7)
    assert len({tuple(row.tolist()) for row in found.tokens}) > 1
    for row in range(8):
        question = batch["tokens"][row][: int(found.mask[row].int().argmax()) + 1]
        alone = archzoo.generate(
            model,
            question.tolist(),
            max_tokens=6,
            temperature=0.7,
            seed=11 + row,
            stop_token=data.stop_token,
        )
        written = alone.tokens[0] + [data.stop_token] * alone.stopped[0]
        mask = found.mask[row]
        assert found.tokens[row, 1:][mask].tolist() == written
        assert found.lengths[row] == len(alone.tokens[0])
        assert found.stopped[row] == alone.stopped[0]
        assert mask[found.ends[row]] and not mask[found.ends[row] + 1 :].any()
        whole = torch.cat([question, torch.tensor(written)])[None]
        state, steps = model.init_state(1), []
        for t in range(whole.shape[1] - 1):
            out = model(whole[:, t : t + 1], state, form="recurrent")
            state = out.state
            steps.append(log_probabilities(out.logits, whole[:, t + 1 : t + 2], 0.7))
        wanted = torch.cat(steps, dim=1)[0, len(question) - 1 :]
        torch.testing.assert_close(together[row][mask], wanted, rtol=1e-10, atol=1e-10)


def test_the_reference_stays_as_it_was_and_in_evaluation(runs: Path) -> None:
    model = made(runs, "PPO", dropout=0.5, reference=str(runs / "sft"))

    class Watch(lightning.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            reference, judge = (pl_module._beside[n] for n in ("reference", "reward_model"))
            for part in (reference, judge):
                assert not any(module.training for module in part.modules())
                assert not any(weight.requires_grad for weight in part.parameters())

    fit(model, "run", 4, Watch())
    sft, _ = archzoo.from_pretrained(runs / "sft")
    held = model._beside["reference"].state_dict()
    for name, weight in sft.state_dict().items():
        assert torch.equal(held[name], weight), name
    assert any(not torch.equal(held[n], w) for n, w in model.net.state_dict().items())
    saved = read_safely("run/last.ckpt")
    assert saved["state_dict"].keys() == {f"decoder.{name}" for name in held}


def test_the_first_pass_has_ratios_of_one_with_dropout_too(runs: Path) -> None:
    seen = []

    class Watch(lightning.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            seen.append(pl_module.latest["train/clipped"])

    fit(made(runs, "PPO", dropout=0.5, clip=0.0, minibatches=1), "run", 2, Watch())
    assert seen[0] == 0 and seen[1] > 0, "then they move"


# ---------------------------------------------------------------------------- resuming


class Killed(BaseException):
    pass


class KillAt(lightning.Callback):
    """Ends the run after this many steps, as if by SIGKILL."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step >= self.steps:
            raise Killed


@pytest.mark.parametrize("objective", list(OBJECTIVES))
def test_a_resumed_run_is_the_one_that_was_not_ended(objective: str, runs: Path) -> None:
    """From step 3, in the middle of PPO's four steps on what it wrote."""
    options = {"limit_val_batches": 1, "val_check_interval": 2}
    whole = fit(made(runs, objective), "whole", 7, **options)
    with pytest.raises(Killed):
        fit(made(runs, objective), "parts", 7, KillAt(5), **options)
    torch.manual_seed(5)  # what the process drew meanwhile
    path = "parts/last.ckpt"
    resumed = fit(made(runs, objective), "parts", 7, ckpt_path=path, **options)
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name
    if objective != "RewardModel":
        assert {"reward", "kl"} <= {n.partition("/")[2] for n in whole.latest}
    timed = ("seconds", "tokens_per_second", "memory_mb")
    mine, theirs = (
        [{n: v for n, v in row.items() if not n.endswith(timed)} for row in rows(Path(place))]
        for place in ("whole", "parts")
    )
    assert mine == theirs


def test_a_run_is_resumed_beside_the_models_that_it_began_with(runs: Path, capsys: Any) -> None:
    saved = read_safely(runs / "sft" / "last.ckpt")
    saved["state_dict"]["decoder.norm.weight"] += 1e-3
    write_checkpoint(saved, runs / "sft" / "last.ckpt")
    assert main(["fit", "--ckpt_path", "runs/policy", "--trainer.max_steps=8"]) == 1
    said = capsys.readouterr().err
    assert "beside another reference" in said and "--model.weights" in said


def test_a_run_goes_on_with_its_own_objective(runs: Path, capsys: Any) -> None:
    config = str(CONFIGS / "dpo.yaml")
    given = ["--ckpt_path", "runs/policy/last.ckpt", "--trainer.max_steps=8", *TINY]
    assert main(["fit", "--config", config, *given]) == 1
    assert "the checkpoint's run has objective=Policy, and here it is DPO" in (
        capsys.readouterr().err
    )


# ---------------------------------------------------------------------------- bad input


def test_a_run_of_another_method_or_without_its_mean_is_not_resumed(
    runs: Path, capsys: Any
) -> None:
    words = ["fit", "--ckpt_path=runs/policy", "--trainer.max_steps=8", *TINY]
    assert main([*words, "--model.method=REINFORCE"]) == 1
    said = "heads beside the model (heads.value.bias, heads.value.weight) than this one (none)"
    assert said in capsys.readouterr().err
    saved = read_safely(runs / "reward" / "last.ckpt")
    saved["objective"]["state"] = {}
    write_checkpoint(saved, runs / "reward" / "last.ckpt")
    assert main(["fit", "--ckpt_path=runs/reward", "--trainer.max_steps=8", *TINY]) == 1
    assert "objective is damaged: the mean reward is None" in capsys.readouterr().err


def test_a_reward_that_is_not_finite_ends_the_run_and_keeps_the_last_good(
    runs: Path, capsys: Any
) -> None:
    saved = read_safely(runs / "reward" / "last.ckpt")
    saved["objective"]["heads"]["heads.reward.bias"].fill_(torch.nan)
    write_checkpoint(saved, "broken.ckpt")
    before = read_safely(runs / "policy" / "last.ckpt")
    given = ["--config", str(CONFIGS / "policy.yaml"), *TINY]
    more = ["--model.reward_model=broken.ckpt", "--name=broken"]
    assert main(["fit", *given, *more]) == 1
    said = "broken.ckpt: 1 of the 1 numbers of heads.reward.bias are not finite"
    assert said in capsys.readouterr().err and not (runs / "broken").exists()
    saved["objective"]["heads"]["heads.reward.bias"].fill_(3e38)
    saved["objective"]["state"]["mean"] = -3e38
    write_checkpoint(saved, "broken.ckpt")
    assert main(["fit", *given, *more]) == 1
    assert "error: the reward of an answer is inf at step 1; nothing was saved" in (
        capsys.readouterr().err
    )

    class Spoil(lightning.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 4:
                pl_module._beside["reward_model"].mean = torch.nan

    with pytest.raises(FloatingPointError, match="reward of an answer is nan at step 5"):
        fit(made(runs, "PPO"), "run", 8, Spoil())
    assert read_safely("run/last.ckpt")["global_step"] == 3
    assert before["global_step"] == STEPS["policy"]


def test_models_beside_it_have_the_policy_s_vocabulary(runs: Path) -> None:
    sizes = {"dim": 16, "heads": 2}
    other = archzoo.create_model("retnet_micro", vocab_size=20, **sizes)
    archzoo.save_pretrained("other", other)
    with pytest.raises(ValueError, match="reference policy other has another vocabulary: it knows"):
        fit(made(runs, "PPO", reference="other"))
    size = archzoo.from_pretrained(runs / "sft")[0].vocab_size
    same_size = archzoo.create_model("retnet_micro", vocab_size=size, **sizes)

    shifted = CharacterTokenizer("".join(chr(ord("!") + n) for n in range(size - 2)), special=True)
    assert shifted.vocab_size == size
    archzoo.save_pretrained("shifted", same_size, shifted)
    with pytest.raises(ValueError, match="shifted has another vocabulary: its tokens stand for"):
        fit(made(runs, "PPO", reference="shifted"))
    with pytest.raises(ValueError, match="is not a reward model: give --model"):
        fit(made(runs, "PPO", reward_model=str(runs / "sft")))
    with pytest.raises(ValueError, match="reward model other has another vocabulary"):
        fit(made(runs, "DPO", reward_model="other"))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--objective=Polcy"], "unknown objective 'Polcy'; nearest: Policy"),
        (["--objective=archzoo.tasks.Addition"], "objective"),
        (["--objective=Policy"], "begins from trained weights: give --model.weights"),
        (["--model.beta=1"], "there is no setting 'model.beta'"),
    ],
)
def test_settings_are_answered_in_one_line(given: list[str], said: str, runs: Path, capsys: Any):
    assert main(["fit", "--model.preset=retnet_micro", "--data=RankedAddition", *given]) == 1
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("objective", "options", "run", "said"),
    [
        ("PPO", {"temperature": 0.0}, {}, "temperature=0.0 must be above 0"),
        ("PPO", {"minibatches": 3}, {}, "does not divide into 3"),
        ("PPO", {"kl_coef": -1.0}, {}, "kl_coef=-1.0 must be at least 0"),
        ("PPO", {"kl_coef": math.inf}, {}, "kl_coef=inf must be at least 0, and finite"),
        ("PPO", {"length_cost": math.inf}, {}, "length_cost=inf must be at least 0, and finite"),
        ("DPO", {"beta": math.inf}, {}, "beta=inf must be above 0, and finite"),
        ("RewardModel", {"margin": math.nan}, {}, "margin=nan must be finite"),
        ("RewardModel", {"centre": math.inf}, {}, "centre=inf must be at least 0, and finite"),
        ("REINFORCE", {"estimator": "k3"}, {}, "REINFORCE takes k1"),
        ("DPO", {"beta": 0.0}, {}, "beta=0.0 must be above 0"),
        ("DPO", {"distil": {"teacher": "x"}}, {}, "DPO has a loss of its own: omit distil"),
        ("PPO", {}, {"accumulate_grad_batches": 2}, "accumulate_grad_batches"),
        ("DPO", {}, {"data": Addition(digits=1)}, "holds no ranked answers"),
    ],
)
def test_bad_settings_are_answered(
    objective: str, options: Any, run: Any, said: str, runs: Path
) -> None:
    with pytest.raises(ValueError, match=said):
        fit(made(runs, objective, **options), **run)


def test_a_task_without_questions_is_refused(runs: Path) -> None:
    data = task()
    data.prepare()
    model, _ = archzoo.from_pretrained(runs / "sft")
    batch = data.train_dataloader().batch(0)
    batch["labels"] = batch["tokens"]
    with pytest.raises(ValueError, match="RankedAddition asks no questions"):
        write_answers(model, data, batch, max_tokens=2, temperature=1.0, seed=0)
    packed = Addition(digits=1, batch_size=2, pack=2)
    several = packed.train_dataloader().batch(0)
    with pytest.raises(ValueError, match="asks several questions"):
        write_answers(model, packed, several, max_tokens=2, temperature=1.0, seed=0)


def test_an_adapter_alone_is_trained(runs: Path) -> None:
    more = {"adapter": "LoRA"}
    torch.manual_seed(3)
    whole = fit(made(runs, "PPO", **more), "whole", 6)
    torch.manual_seed(3)
    with pytest.raises(Killed):
        fit(made(runs, "PPO", **more), "parts", 6, KillAt(5))
    resumed = fit(made(runs, "PPO", **more), "parts", 6, ckpt_path="parts/last.ckpt")
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name
    sft = archzoo.from_pretrained(runs / "sft")[0].state_dict()
    key = "embedding.weight"
    assert torch.equal(whole.net.state_dict()[key], sft[key])
    assert whole.heads["value"].weight.any()


def test_the_reference_of_an_adapter_is_what_it_adapts(runs: Path) -> None:
    """A prompt begins as something, and is drawn: the reference has none, whatever was drawn."""
    model = fit(made(runs, "PPO", adapter="PromptTuning"), "whole", 2)
    sft = archzoo.from_pretrained(runs / "sft")[0].state_dict()
    held = model._beside["reference"].state_dict()
    assert held.keys() == sft.keys()
    assert all(torch.equal(held[name], weight) for name, weight in sft.items())
    assert model.latest["train/kl"] != 0, "the prompt has changed what is written"


@pytest.mark.parametrize("objective", ["PPO", "DPO"])
def test_in_mixed_precision_training_starts_at_the_reference(objective: str, runs: Path) -> None:
    """Policy and reference are read alike, and an answer as when it was written: ratios of 1."""
    seen: list[dict[str, float]] = []

    class Watch(lightning.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            seen.append(dict(pl_module.latest))

    options = {"clip": 0.0, "minibatches": 1} if objective == "PPO" else {}
    model = made(runs, objective, adapter="LoRA", **options)
    fit(model, "run", 2, Watch(), precision="bf16-mixed")
    if objective == "PPO":
        assert seen[0]["train/kl"] == seen[0]["train/clipped"] == 0 < seen[1]["train/clipped"]
    else:
        assert seen[0]["train/loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert seen[1]["train/loss"] < seen[0]["train/loss"]
    assert all(value.dtype == torch.float32 for value in model.state_dict().values())


# ---------------------------------------------------------------------------- the chain, for long


def measured(path: Path, file: str = "metrics.csv") -> dict[str, float]:
    """The last validation of a run."""
    with open(path / file) as handle:
        found = [row for row in csv.DictReader(handle) if row["validation/loss"]][-1]
    split = "validation/"
    return {n.removeprefix(split): float(v) for n, v in found.items() if v and split in n}


@pytest.mark.slow
def test_the_chain_learns_what_is_preferred(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """All of it as the files say, from the base on: five minutes on two cores."""
    monkeypatch.chdir(tmp_path)
    base = str(ROOT / "configs/claims/adaptation/adder_retention.yaml")
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]

    def run(command: str, name: str, *more: str) -> None:
        path = base if name == "base" else str(CONFIGS / f"{name}.yaml")
        assert main([command, "--config", path, *quiet, *more]) == 0

    for name in ("base", "sft", "reward", "policy", "dpo"):
        run("fit", name)
    run("validate", "policy", "--trainer.default_root_dir=before")
    before = measured(Path("before/policy"), "validate.csv")
    policy, dpo = measured(Path("runs/policy")), measured(Path("runs/dpo"))
    assert before["kl"] == 0
    for after in (policy, dpo):
        assert after["reward"] > before["reward"] + 0.5
        assert after["length"] < before["length"] - 0.5
        assert after["kl"] < 4, "it stays near its reference"
    assert dpo["exact_match"] > before["exact_match"] + 0.05
    # A reward model that knows of lengths alone is exploited where nothing holds the policy.
    run("fit", "reward", "--arm=shorter")
    run("fit", "policy", "--arm=exploit")
    exploit = measured(Path("runs/policy_exploit"))
    assert exploit["exact_match"] < before["exact_match"] / 2 < policy["exact_match"]
    assert exploit["length"] < policy["length"] and exploit["kl"] > policy["kl"]
