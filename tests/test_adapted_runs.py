"""A run beside weights that stay: its checkpoint holds what it trains, and resumes beside them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch

import archzoo
from archzoo.checkpoint import load, read_safely, weights_digest
from archzoo.cli import main
from archzoo.tasks import Addition
from archzoo.training.callbacks import Checkpoints, SaveAndEndOnSignal
from archzoo.training.ending import Ended, Signals
from archzoo.training.files import CheckpointFiles, write_checkpoint
from archzoo.training.module import LanguageModel

LORA = {
    "class_path": "LoRA",
    "init_args": {"rank": 2, "dropout": 0.1, "targets": ["query", "up", "router"]},
}
RUN = ["--data=Addition", "--data.digits=1", "--data.batch_size=4", "--trainer.accelerator=cpu"]
RUN += ["--data.validation_examples=8", "--data.test_examples=8"]
RUN += ["--trainer.enable_progress_bar=false"]
ADAPTER = ["--model.adapter=LoRA", "--model.adapter.rank=4"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's directory, of a mixture of experts whose biases move while it trains."""
    place = tmp_path_factory.mktemp("trained")
    router = ["--model.feed_forward=MixtureOfExperts", "--model.feed_forward.router=LinearRouter"]
    router += ["--model.feed_forward.router.bias_rate=0.1", "--trainer.max_steps=2"]
    router += [f"--trainer.default_root_dir={place}", "--name=base"]
    assert main(["fit", "--model.preset=skywork_micro", *router, *RUN]) == 0
    return place / "base"


@pytest.fixture
def base(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """That run's checkpoint, under the current directory."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, "runs/base")
    return Path("runs/base/last.ckpt")


def same(one: Any, other: Any) -> bool:
    """Whether two parts of checkpoints are equal, bit for bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else bool(one == other)


def addition() -> Addition:
    return Addition(digits=1, batch_size=4, validation_examples=8, test_examples=8)


def fit(directory: str, weights: Path, *callbacks: Any, resume: bool = False) -> LanguageModel:
    lightning.seed_everything(0)
    model = LanguageModel(weights=str(weights), adapter=LORA, warmup_steps=2, learning_rate=1e-2)
    trainer = lightning.Trainer(
        accelerator="cpu",
        default_root_dir=directory,
        max_steps=8,
        limit_val_batches=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        plugins=[CheckpointFiles()],
        callbacks=[*callbacks, Checkpoints(every_n_steps=3)],
    )
    path = Path(directory, "last.ckpt")
    try:
        trainer.fit(model, addition(), ckpt_path=path if resume else None)
    except (Killed, Ended):
        assert callbacks
    return model


class Killed(BaseException):
    pass


class KillAfter(lightning.Callback):
    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 5:
            raise Killed


class AskToEnd(lightning.Callback):
    """What SIGTERM does, in the middle of a step."""

    def __init__(self, signals: Signals) -> None:
        self.signals = signals

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        if trainer.global_step == 4:
            self.signals.received = 15


@pytest.mark.parametrize("killed", [True, False])
def test_an_adapted_run_that_was_ended_is_the_run_that_was_not(base: Path, killed: bool) -> None:
    whole = fit("whole", base)
    signals = Signals()
    ends = [KillAfter()] if killed else [AskToEnd(signals), SaveAndEndOnSignal(signals)]
    fit("segments", base, *ends)
    assert read_safely("segments/last.ckpt")["global_step"] == (3 if killed else 5)
    resumed = fit("segments", base, resume=True)
    ends = [read_safely(f"{name}/last.ckpt") for name in ("whole", "segments")]
    assert ends[0]["state_dict"].keys() == ends[1]["state_dict"].keys()
    for name, tensor in whole.net.state_dict().items():
        assert torch.equal(tensor, resumed.net.state_dict()[name]), name
    for mine, theirs in zip(*(end["optimizer_states"] for end in ends), strict=True):
        assert mine["param_groups"] == theirs["param_groups"]
        for number, entries in mine["state"].items():
            for name, value in entries.items():
                assert torch.equal(value, theirs["state"][number][name]), (number, name)


def test_its_checkpoint_holds_the_adapter_and_its_optimizer_alone(base: Path) -> None:
    model = fit("lora", base)
    content = read_safely("lora/last.ckpt")
    learn = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert content["state_dict"].keys() == learn.keys()
    states = content["optimizer_states"][0]["state"].values()
    moments = sorted(tuple(state[n].shape) for state in states for n in ("exp_avg", "exp_avg_sq"))
    assert moments == sorted([tuple(p.shape) for p in learn.values()] * 2)
    digest = weights_digest(load(base).model.state_dict())
    assert content["base_weights"] == {"path": str(base), "digest": digest, "dtype": "float32"}
    assert content["base"] == digest
    # What may be done with any checkpoint may be done with it.
    net = load("lora/last.ckpt").model
    for name, tensor in model.net.state_dict().items():
        assert torch.equal(net.state_dict()[name], tensor), name
    again = LanguageModel.load_from_checkpoint("lora/last.ckpt")
    assert weights_digest(again.net.state_dict()) == weights_digest(net.state_dict())
    archzoo.save_adapter("alone", net)
    archzoo.save_pretrained("model", net)
    base.unlink()
    tokens = torch.randint(14, (2, 9))
    with torch.no_grad():
        assert torch.equal(load("model").model(tokens).logits, net(tokens).logits)
    with pytest.raises(FileNotFoundError, match="is not there"):
        load("alone")


def test_its_base_is_found_asked_for_and_known(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the commands: where it was, where it is said to be, and by its digest."""
    last = "runs/lora/last.ckpt"
    steps = ["--trainer.max_steps=2", "--trainer.enable_progress_bar=false"]
    begin = ["fit", f"--model.weights={base}", *ADAPTER, "--trainer.accelerator=cpu", *steps]
    assert main([*begin, "--name=lora"]) == 0
    (spec,) = (read_safely(last)["hyper_parameters"][name] for name in ("adapter",))
    assert spec["init_args"]["rank"] == 4
    Path("file.yaml").write_text(
        f"model: {{weights: {base}, adapter: {{class_path: LoRA, init_args: {{rank: 4}}}}}}\n"
        "data: {class_path: Addition, init_args: {digits: 1, batch_size: 4, "
        "validation_examples: 8}}\ntrainer: {max_steps: 2, accelerator: cpu}\n"
    )
    assert main(["fit", "--config=file.yaml", "--trainer.enable_progress_bar=false"]) == 0
    for name, tensor in read_safely("runs/file/last.ckpt")["state_dict"].items():
        assert torch.equal(tensor, read_safely(last)["state_dict"][name]), name
    assert main(["test", f"--ckpt_path={last}"]) == 0
    assert main(["generate", "runs/lora", "1+2=", "--max_tokens=2"]) == 0
    # Resumed by itself, without the settings beside it, and by the name of its run.
    shutil.copytree("runs/lora", "runs/copy")
    Path("runs/copy/config.yaml").unlink()
    on = ["--trainer.max_steps=4", "--trainer.accelerator=cpu"]
    assert main(["fit", "--ckpt_path=runs/copy/last.ckpt", *on]) == 0
    moved = base.with_name("moved.ckpt")
    base.rename(moved)
    capsys.readouterr()
    for arguments, says in (
        (["fit", f"--ckpt_path={last}", *on], "--model.weights PLACE for fit"),
        (["fit", "--ckpt_path=runs/copy/last.ckpt", *on], "--model.weights PLACE for fit"),
        (["test", f"--ckpt_path={last}"], "--model.weights PLACE for fit"),
        (["generate", last, "1+2="], "--base PLACE for generate"),
    ):
        assert main(arguments) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and f"{base}" in error and says in error
    assert main(["fit", f"--ckpt_path={last}", f"--model.weights={moved}", *on]) == 0
    assert main(["test", f"--ckpt_path={last}", f"--model.weights={moved}"]) == 0
    whole, copy = (read_safely(f"runs/{n}/last.ckpt") for n in ("lora", "last_fit"))
    assert whole["base_weights"]["path"] == str(moved)
    for name, tensor in whole["state_dict"].items():
        assert torch.equal(tensor, copy["state_dict"][name]), name
    content = read_safely(moved)
    content["state_dict"]["decoder.head.weight"] *= 2
    write_checkpoint(content, "other.ckpt")
    capsys.readouterr()
    for command in ("fit", "test"):
        assert main([command, f"--ckpt_path={last}", "--model.weights=other.ckpt"]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "belong to another base" in error
        digests = (whole["base_weights"]["digest"], read_safely("other.ckpt")["digest"])
        assert all(digest[:12] in error for digest in digests)
    with pytest.raises(ValueError, match="belongs to another base"):
        load(last, base="other.ckpt")
    with pytest.raises(FileNotFoundError, match=r"is not there.*--model\.weights PLACE"):
        LanguageModel.load_from_checkpoint("runs/copy/last.ckpt")
    again = LanguageModel.load_from_checkpoint("runs/copy/last.ckpt", weights=str(moved))
    assert again.net.base_path == str(moved)
    with pytest.raises(ValueError, match="leaves no base out: omit base='other"):
        load(moved, base="other.ckpt")


def test_checkpoints_that_hold_the_base_too_are_read_and_resumed(base: Path) -> None:
    """As they were written before."""
    fit("lora", base)
    content = read_safely("lora/last.ckpt")
    whole = {f"decoder.{n}": t for n, t in load("lora/last.ckpt").model.state_dict().items()}
    del content["base_weights"]
    content["state_dict"] = whole
    Path("old").mkdir()
    write_checkpoint(content, "old/last.ckpt")
    base = base.rename("elsewhere.ckpt")
    net = load("old/last.ckpt").model
    assert weights_digest(net.state_dict()) == read_safely("old/last.ckpt")["digest"]
    assert main(["test", "--ckpt_path=old/last.ckpt", "--trainer.accelerator=cpu"]) == 0
    on = ["fit", "--ckpt_path=old/last.ckpt", "--trainer.max_steps=9", "--name=on"]
    assert main([*on, "--trainer.accelerator=cpu"]) == 0
    content = read_safely("runs/on/last.ckpt")
    assert "base_weights" not in content and content["state_dict"].keys() == whole.keys()
    assert fit("old", base, resume=True).loaded_step == 8


def test_training_an_adapter_further_keeps_its_first_base(base: Path) -> None:
    fit("lora", base)
    record = read_safely("lora/last.ckpt")["base_weights"]
    more = ["fit", "--model.weights=lora/last.ckpt", "--trainer.max_steps=1", "--name=more"]
    assert main([*more, "--trainer.accelerator=cpu"]) == 0
    content = read_safely("runs/more/last.ckpt")
    assert content["base_weights"] == record
    names = read_safely("lora/last.ckpt")["state_dict"].keys()
    assert content["state_dict"].keys() == names
    assert content["base"] == weights_digest(load("lora/last.ckpt").model.state_dict())
    assert main(["test", "--ckpt_path=runs/more/last.ckpt", "--trainer.accelerator=cpu"]) == 0
    # Where the adapter stands in a whole model there is no file of the base: all is written.
    archzoo.save_pretrained("whole", *load("lora/last.ckpt"))
    more = ["fit", "--model.weights=whole", "--trainer.max_steps=1", "--name=whole"]
    assert main([*more, "--trainer.accelerator=cpu"]) == 0
    assert "base_weights" not in read_safely("runs/whole/last.ckpt")


def test_an_average_leaves_the_base_as_it_is(base: Path, capsys: pytest.CaptureFixture) -> None:
    """Bit for bit: else its digest is another, and the adapter alone would fit no base."""
    given = [f"--model.weights={base}", *ADAPTER, "--ema=0.9", *RUN]
    given += ["--model.schedule=constant", "--model.warmup_steps=1"]
    assert main(["fit", "--name=averaged", *given, "--trainer.max_steps=6"]) == 0
    averaged = load("runs/averaged/last.ckpt").model.state_dict()
    for name, tensor in load(base).model.state_dict().items():
        assert torch.equal(averaged[name], tensor), name
    # Its checkpoint holds two states of the adapter and no more, from which a run is resumed.
    content = read_safely("runs/averaged/last.ckpt")
    held = {"state_dict": content["state_dict"], "now": content["current_model_state"]}
    assert all("adapter_modules" in name for state in held.values() for name in state)
    assert not same(held["state_dict"], held["now"])
    assert main(["fit", "--name=part", *given, "--trainer.max_steps=3"]) == 0
    again = ["--ckpt_path=runs/part/last.ckpt", "--trainer.max_steps=6"]
    assert main(["fit", *again, "--trainer.accelerator=cpu"]) == 0
    resumed = read_safely("runs/part/last.ckpt")
    for state in ("state_dict", "current_model_state", "averaging_state", "optimizer_states"):
        assert same(content[state], resumed[state]), state
    assert main(["adapter", "save", "runs/averaged", "--out=alone"]) == 0
    assert main(["generate", str(base), "1+1=", "--adapter=alone"]) == 0, capsys.readouterr().err


def test_what_a_run_has_trained_of_the_base_too_is_kept(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = ["fit", f"--model.weights={base}", *ADAPTER, "--model.unfreeze=norms"]
    assert main([*lora, "--trainer.max_steps=1", "--name=norms", RUN[3]]) == 0
    content = read_safely("runs/norms/last.ckpt")
    assert content["base_weights"]["path"] == str(base)
    held = {name for name in content["state_dict"] if "adapter_modules" not in name}
    assert "decoder.norm.weight" in held and "decoder.head.weight" not in held
    net = load("runs/norms").model
    assert net.base_path is None
    for name in held:
        own = net.state_dict()[name.removeprefix("decoder.")]
        assert torch.equal(own, content["state_dict"][name]), name
    capsys.readouterr()
    assert main(["adapter", "save", "runs/norms", "--out", "alone"]) == 1
    assert "has trained weights of the base, too" in capsys.readouterr().err
    assert main(["adapter", "merge", "runs/norms", "--out", "merged"]) == 0
    assert torch.equal(load("merged").model.norm.weight, net.norm.weight)


STRANGE: list[tuple[dict[str, Any], str]] = [
    ({"base_weights": 3}, "its base 3 is not valid"),
    ({"base_weights": {"path": "/dev/zero", "dtype": "float32"}}, "is not valid"),
    ({"path": "/etc/passwd"}, "does not lie under the current directory"),
    ({"path": "strange/last.ckpt"}, "is not a base: it holds adapters alone"),
    ({"path": None}, "names no base"),
    ({"path": "runs/base/config.yaml"}, "cannot be loaded"),
    ({"digest": "0" * 64}, "belongs to another base"),
    ({"rank": 10**8}, "at most 32"),
    ({"rank": 3}, "has shape"),
    ({"depth": 10**8}, "they miss blocks.2"),
    ({"dim": 10**8}, "columns where dim="),
]


def test_a_strangers_checkpoint_is_refused_in_a_line(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit("lora", base)
    for changes, says in STRANGE:
        content = read_safely("lora/last.ckpt")
        settings = content["hyper_parameters"]
        for name, value in changes.items():
            if name == "rank":
                settings["adapter"]["init_args"]["rank"] = value
            elif name in ("path", "digest"):
                content["base_weights"][name] = value
            else:
                (settings if name in settings else content)[name] = value
        Path("strange").mkdir(exist_ok=True)
        torch.save(content, "strange/last.ckpt")
        with pytest.raises(ValueError, match=says) as error:
            load("strange")
        assert "\n" not in str(error.value)
        if not changes.keys() & {"rank", "base_weights"}:  # commands take a second each
            continue
        capsys.readouterr()
        assert main(["test", "--ckpt_path=strange", "--trainer.accelerator=cpu"]) == 1
        assert capsys.readouterr().err.count("\n") == 1, changes
