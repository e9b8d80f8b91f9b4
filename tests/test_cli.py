"""The command line: what it does, what it costs, and what it says to a mistake."""

import csv
import gc
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import lightning
import pytest
import torch
import yaml

import archzoo
from archzoo.checkpoint import load, task_of, tokenizer_files
from archzoo.checkpoint.archives import Archive
from archzoo.cli import COMMANDS, _import, main, usage
from archzoo.decoder import Decoder
from archzoo.tasks import Text
from archzoo.training.command import resolve

ROOT = Path(__file__).parent.parent
MICRO = """
seed_everything: 0
model: {preset: retnet_micro}
data:
  class_path: Addition
  init_args: {digits: 2, batch_size: 4, validation_examples: 8, test_examples: 12}
trainer: {max_steps: 4, accelerator: cpu, val_check_interval: 4, log_every_n_steps: 1}
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A directory with a small configuration in it, as the current one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "micro.yaml").write_text(MICRO)
    return tmp_path


def fit(*arguments):
    return main(["fit", "--config", "micro.yaml", *arguments])


def fails(capsys, arguments, *expected):
    """One line on stderr that holds what is expected, and an exit status."""
    capsys.readouterr()
    assert main(list(arguments)) == 1
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), captured.err
    for part in expected:
        assert part in lines[0], f"{part!r} is not in {lines[0]!r}"
    return lines[0]


def stored(path="runs/micro/last.ckpt"):
    return torch.load(path, weights_only=True)


# ---------------------------------------------------------------------------- what it does


def test_train_test_predict_generate(here, capsys):
    """The whole way, with a checkpoint that needs no configuration."""
    assert fit() == 0
    assert "retnet_micro: " in capsys.readouterr().out
    assert main(["validate", "--ckpt_path", "runs/micro/last.ckpt"]) == 0
    assert "validation exact match" in capsys.readouterr().out
    with open("runs/micro/metrics.csv") as file:
        in_fit = [row for row in csv.DictReader(file) if row["validation/loss"]][-1]
    with open("runs/micro/validate.csv") as file:
        (alone,) = csv.DictReader(file)
    # What Lightning hands back of an evaluation is float32.
    in_fit = torch.tensor(float(in_fit["validation/loss"]), dtype=torch.float32).item()
    assert alone["step"] == "4" and float(alone["validation/loss"]) == in_fit

    capsys.readouterr()
    assert main(["test", "--ckpt_path", "runs/micro/last.ckpt"]) == 0
    assert "exact match" in capsys.readouterr().out
    with open("runs/micro/test.csv") as file:
        assert float(next(iter(csv.DictReader(file)))["test/exact_match"]) >= 0

    assert main(["predict", "--ckpt_path", "runs/micro/last.ckpt"]) == 0
    lines = (here / "runs/micro/predictions.jsonl").read_text().splitlines()
    assert len(lines) == 12 and set(json.loads(lines[0])) == {"text", "asked", "predicted"}
    assert main(["generate", "runs/micro/last.ckpt", "1+2=", "12+3=", "--max_tokens", "2"]) == 0
    assert main(["generate", "runs/micro/last.ckpt", "1+2=", "--check", "--max_tokens", "2"]) == 0


def test_swap_says_both_counts(here, capsys):
    assert fit("--model.mixer", "Attention") == 0
    assert "NOT matched" in capsys.readouterr().out
    assert fit("--model.mixer", "Attention", "--model.match", "parameters") == 0
    assert capsys.readouterr().out.count(": matched") == 1
    assert stored()["hyper_parameters"]["mixer"]["class_path"] == "Attention"


def test_another_run_is_never_written_over(here, capsys):
    fit()
    first = (here / "runs/micro/last.ckpt").read_bytes()
    fit("--seed_everything", "1")
    assert "runs/micro-1" in capsys.readouterr().out
    assert (here / "runs/micro-1/last.ckpt").read_bytes() == first
    assert (here / "runs/micro/last.ckpt").read_bytes() != first
    fit("--name", "other")
    assert (here / "runs/other/last.ckpt").exists() and not (here / "runs/micro-2").exists()


def test_resuming_needs_only_the_checkpoint(here):
    fit("--model.dropout", "0.1", "--model.learning_rate", "0.01")
    more = ["--trainer.max_steps", "6"]
    assert main(["fit", "--ckpt_path", "runs/micro/last.ckpt", *more]) == 0
    checkpoint = stored()
    assert checkpoint["global_step"] == 6
    assert checkpoint["hyper_parameters"]["dropout"] == 0.1
    assert checkpoint["hyper_parameters"]["learning_rate"] == 0.01
    with open("runs/micro/metrics.csv") as file:
        steps = [int(row["step"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert fit("--ckpt_path", "last", "--model.dropout", "0.1", "--trainer.max_steps", "7") == 0
    assert stored()["global_step"] == 7
    # What is saved beside it starts a run anew, and does not resume this one.
    assert yaml.safe_load((here / "runs/micro/config.yaml").read_text())["ckpt_path"] is None


def test_tokenizer_comes_back_from_the_checkpoint(here, capsys):
    """Another text is read with the model's tokenizer, not with one learned from it."""
    (here / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    (here / "other.txt").write_text("a zebra, too! " * 40)
    data = "--data Text --data.path text.txt --data.context_length 16 --data.batch_size 2"
    cache = ["--data.cache_dir", str(here / "cache")]
    arguments = f"fit --model.preset retnet_micro --trainer.max_steps 2 {data} --name text".split()
    arguments += ["--trainer.accelerator", "cpu", *cache]
    for tokenizer in ("characters", "bpe"):
        vocabulary = ["--data.vocab_size", "270"] if tokenizer == "bpe" else []
        assert main([*arguments, "--data.tokenizer", tokenizer, *vocabulary]) == 0
        (here / "text.txt").rename(here / "gone.txt")
        test = ["test", "--ckpt_path", "runs/text/last.ckpt", "--data.path", "other.txt"]
        if tokenizer == "bpe":
            assert main(test) == 0
        else:
            fails(capsys, test, "other.txt")
        (here / "gone.txt").rename(here / "text.txt")


def test_loggers_come_in_addition(here):
    class_path = "lightning.pytorch.loggers.CSVLogger"
    assert fit("--trainer.logger", class_path, "--trainer.logger.save_dir", "more") == 0
    assert (here / "runs/micro/metrics.csv").exists()
    assert list((here / "more").rglob("*"))


def test_tensorboard_by_one_flag(here):
    pytest.importorskip("tensorboard")
    assert fit("--trainer.logger", "TensorBoardLogger") == 0
    assert list((here / "runs/micro/tensorboard").glob("events.*"))
    assert (here / "runs/micro/metrics.csv").exists()


def testusual_precision(monkeypatch):
    """bf16-mixed where the GPU has it and nothing else is said; a plugin says something."""
    from lightning.pytorch.plugins import DoublePrecision

    from archzoo.training.command import usual_precision

    assert usual_precision({"accelerator": "cpu"}) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    assert usual_precision({"accelerator": "auto"}) == "bf16-mixed"
    assert usual_precision({"accelerator": "auto", "plugins": [DoublePrecision()]}) is None
    assert usual_precision({"accelerator": "cpu"}) is None


def test_list_and_show(capsys):
    assert main(["list"]) == 0
    table = capsys.readouterr().out
    for name in archzoo.list_models():
        assert name in table
    assert main(["list", "ret*", "--markdown"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 2 + len(archzoo.list_models("ret*"))
    cells = dict(zip(lines[0].split("|"), lines[2].split("|"), strict=True))
    assert cells[" model "] == " retnet_micro " and cells[" mixer "] == " Retention "
    count = archzoo.create_model("retnet_micro").parameter_count()
    assert cells[" parameters "] == f" {count:,} "
    state = archzoo.create_model("retnet_micro").init_state(1)
    size = archzoo.block.nbytes(state)
    assert cells[" state at 1k "] == cells[" state at 16k "] == f" {size / 1024:.4g} KiB "

    assert main(["show", "transformer_tiny"]) == 0
    shown = capsys.readouterr().out
    net = archzoo.create_model("transformer_tiny")
    assert "LLaMA" in shown and f"{net.parameter_count():,}" in shown
    mixers = sum(p.numel() for block in net.blocks for p in block.mixer.parameters())
    assert f"{mixers:,}" in shown


def test_sizes_by_part_add_up():
    from archzoo.analysis.listing import parameters_by_part

    for name in archzoo.list_models("*_micro"):
        for tie_weights in (False, True):
            net = archzoo.create_model(name, tie_weights=tie_weights)
            assert sum(c for _, _, c in parameters_by_part(net)) == net.parameter_count()


@pytest.mark.slow
def test_two_ranks_train_as_one(here, programs):
    """The batch is shared out, also where it holds unequal numbers of labels; losses agree."""
    command = [programs / "python", str(ROOT / "train.py"), "fit", "--config", "micro.yaml"]
    command += ["--data.validation_examples", "9"]  # the last batch holds one row
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    two = ["--name", "two", "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    for more in (["--name", "one"], two):
        subprocess.run([*command, *more], check=True, env=environment)
    tables = []
    for name in ("one", "two"):
        with open(f"runs/{name}/metrics.csv") as file:
            tables.append(list(csv.DictReader(file)))
    assert len(tables[0]) == len(tables[1]) == 5
    for alone, shared in zip(*tables, strict=True):
        for metric in ("train/loss", "validation/loss", "validation/exact_match"):
            if alone[metric]:
                assert float(shared[metric]) == pytest.approx(float(alone[metric]), rel=1e-5)


# ---------------------------------------------------------------------------- traps


def test_class_changed_on_the_command_line_keeps_nothing_of_the_old(here):
    config = yaml.safe_load(MICRO)
    config["model"]["mixer"] = {"class_path": "Retention", "init_args": {"norm_eps": 0.1}}
    (here / "micro.yaml").write_text(yaml.safe_dump(config))
    assert fit() == 0
    assert stored()["hyper_parameters"]["mixer"]["init_args"]["norm_eps"] == 0.1
    assert fit("--model.mixer", "Attention") == 0
    assert stored()["hyper_parameters"]["mixer"] == {
        "class_path": "Attention",
        "init_args": {"kv_heads": None},
    }


def test_options_of_every_slot_from_the_command_line(here):
    options = {
        "mixer": ("Retention", "value_factor", 1.0),
        "rotary": ("RotaryEmbedding", "base", 500.0),
        "feed_forward": ("PlainFeedForward", "activation", "relu"),
    }
    arguments = []
    for slot, (name, option, value) in options.items():
        arguments += [f"--model.{slot}", name, f"--model.{slot}.{option}", str(value)]
    assert fit(*arguments) == 0
    config = stored()["hyper_parameters"]
    for slot, (name, option, value) in options.items():
        assert config[slot]["class_path"] == name and config[slot]["init_args"][option] == value
    text = (here / "runs/micro/config.yaml").read_text()
    assert "Unable to serialize" not in text
    again = main(["fit", "--config", "runs/micro/config.yaml", "--name", "again"])
    assert again == 0 and stored("runs/again/last.ckpt")["hyper_parameters"] == config


def test_options_of_several_adapters_from_the_command_line(here):
    """Each by its name, as those of one adapter are given."""
    adapters = "--model.adapters.sums LoRA --model.adapters.sums.rank 3 --model.adapters.style=IA3"
    more = "--model.adapters.sums.init_args.targets [query,value] --model.adapters.style.layers=[0]"
    found = resolve(["--config", "micro.yaml", *adapters.split(), *more.split()])
    assert found.settings["model"]["adapters"] == {
        "sums": {"class_path": "LoRA", "init_args": {"rank": 3, "targets": ["query", "value"]}},
        "style": {"class_path": "IA3", "init_args": {"layers": [0]}},
    }


def test_a_pattern_takes_the_place_of_the_mixer(here):
    assert fit("--model.pattern", "[Retention, Attention]") == 0
    config = stored()["hyper_parameters"]
    assert config["mixer"] is None
    assert [spec["class_path"] for spec in config["pattern"]] == ["Retention", "Attention"]
    assert main(["test", "--ckpt_path", "runs/micro/last.ckpt"]) == 0


def test_a_strangers_part_goes_the_whole_way(here, monkeypatch, capsys):
    (here / "strange.py").write_text(
        "from archzoo.mixers.retention import Retention\n"
        "class Slow(Retention):\n"
        "    def __init__(self, dim: int, heads: int, *, pace: float = 1.0) -> None:\n"
        "        super().__init__(dim, heads, decay=pace)\n"
    )
    monkeypatch.syspath_prepend(here)
    swap = ["--model.mixer", "strange.Slow", "--model.mixer.pace", "0.5"]
    fails(capsys, ["fit", "--config", "micro.yaml", *swap], "strange.Slow", "--import strange")
    assert "strange" not in sys.modules
    assert fit(*swap, "--import", "strange") == 0
    expected = {"class_path": "strange.Slow", "init_args": {"pace": 0.5}}
    assert stored()["hyper_parameters"]["mixer"] == expected
    assert main(["test", "--ckpt_path", "runs/micro/last.ckpt"]) == 0


def test_lightning_is_none_of_the_bad_versions():
    version = tuple(int(part) for part in lightning.__version__.split(".")[:3])
    assert version >= (2, 6, 6)


# ---------------------------------------------------------------------------- what it costs


def test_help_needs_no_torch_and_half_a_second():
    code = (
        "import sys\n"
        "from archzoo.cli import main\n"
        "main(['--help'])\n"
        "heavy = {'torch', 'lightning', 'jsonargparse', 'numpy', 'rich'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=ROOT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


def test_what_importing_makes_is_not_searched_for_garbage(tmp_path, monkeypatch):
    (tmp_path / "makes_much.py").write_text(
        "import gc\nmade = [[] for _ in range(100_000)]\ncollects = gc.isenabled()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    frozen = gc.get_freeze_count()
    assert not _import("makes_much").collects
    assert gc.isenabled() and gc.get_freeze_count() - frozen > 100_000
    gc.unfreeze()
    assert _import("makes_much") is sys.modules["makes_much"] and gc.get_freeze_count() == 0


def test_models_need_no_lightning():
    code = (
        "import sys, archzoo\n"
        "archzoo.create_model('retnet_micro'), archzoo.from_pretrained, archzoo.generate\n"
        "heavy = {'lightning', 'transformers', 'matplotlib', 'torchmetrics'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_help_names_every_command(capsys):
    assert main(["--help"]) == 0
    assert capsys.readouterr().out.strip() == usage()
    assert all(name in usage() for name in COMMANDS)
    assert main([]) == 2
    assert main(["--version"]) == 0
    assert archzoo.__version__ in capsys.readouterr().out


def test_help_has_all_of_a_docstring_in_its_paragraphs(capsys):
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    _, _, said = capsys.readouterr().out.partition("\n\n")
    about, example, *_ = said.partition("positional arguments:")[0].split("\n\n")
    assert about.startswith("Train arms") and example.startswith("archzoo compare configs/")


def test_help_of_commands_comes_from_the_code(capsys):
    """Arguments of the decoder are defined once, in its signature and docstring."""
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, words in {
        "model.dim": "Width of the residual stream",
        "model.learning_rate": "The peak, per optimizer step",
        "checkpoint.every_n_steps": "Optimizer steps between two writings",
    }.items():
        assert f"--{name}" in text and words in text
    assert "NOT_ACCEPTED" not in text
    with pytest.raises(SystemExit) as stop:
        main(["generate", "--help"])
    assert stop.value.code == 0 and "--max_tokens" in capsys.readouterr().out


# ---------------------------------------------------------------------------- user errors


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["fitt"], ["'fitt'", "fit"]),
        (["fit"], ["fit needs data", "archzoo list --configurations", "--config FILE"]),
        (["fit", "adition"], ["nearest: addition", "archzoo list --configurations shows all"]),
        (["test"], ["test needs data", "--ckpt_path"]),
        (["fit", "--config", "mcro.yaml"], ["mcro.yaml", "nearest", "micro.yaml"]),
        (["test", "--ckpt_path", "last"], ["of which run"]),
        (["test", "--ckpt_path", "runs/none.ckpt"], ["no checkpoint runs/none.ckpt"]),
        (["show", "retnet_tinny"], ["'retnet_tinny'", "retnet_tiny"]),
        (["show"], ["required: name"]),
        (["list", "--markdwn"], ["--markdwn", "--markdown"]),
        (["list", "rte*"], ["'rte*'", "archzoo list"]),
        (["list", "retnat*"], ["'retnat*'", "nearest: retnet_"]),
        (["list", "claim/*", "--configurations"], ["'claim/*'", "nearest: claims/"]),
        (["check", "no_module.Mixer"], ["no_module"]),
        (["generate", "none.ckpt", "1+1="], ["none.ckpt"]),
        (["generate", "none.ckpt", "--prompt", "1+1="], ["no option --prompt;"]),
        (["validate", "micro.yaml"], ["'micro.yaml' stands alone", "--config micro.yaml"]),
        (["test", "."], ["'.' stands alone", "--ckpt_path ."]),
        (["extend", "none", "--lengths", "64"], ["lengths: '64' is not list", "[64]"]),
    ],
)
def test_user_errors_in_commands(here, capsys, arguments, expected):
    fails(capsys, arguments, *expected)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--model.preset retnet_tinny", ["'retnet_tinny'", "retnet_tiny"]),
        ("--model.mixer Retenton", ["model.mixer", "'Retenton'", "Retention"]),
        ("--model.mixer Attention --model.mixer.kv_head 1", ["'kv_head'", "kv_heads"]),
        (
            "--model.mixer Attention --model.mixer.value_factor 1",
            [
                "model.mixer: Attention has no option 'value_factor'; it has kv_heads; "
                "Retention has it: --model.mixer Retention"
            ],
        ),
        (
            "--model.adapter IA3 --model.adapter.rank 4",
            ["model.adapter: IA3 has no option 'rank'; it has layers, targets; DoRA, LoRA, "],
        ),
        (
            "--model.adapter IA3 --model.adapter.zork 4",  # no hint names what others have
            ["model.adapter: IA3 has no option 'zork'; there are layers, targets"],
        ),
        (
            "--model.mixer.kv_heads 1",
            ["model.mixer: option 'kv_heads' needs the class too; Attention and FilteredAtten"],
        ),
        (
            "--trainer.callbacks+ Timer --trainer.callbacks.zork 3",
            ["trainer.callbacks: Timer has no option 'zork'; there are duration, interval, "],
        ),
        (
            "--model.feed_forward MixtureOfExperts --model.feed_forward.router.logit_norm 1",
            [
                "model.feed_forward.router: option 'logit_norm' needs the class too; LinearRouter "
                "and AttentionRouter have it: --model.feed_forward.router LinearRouter"
            ],
        ),
        (
            "--model.feed_forward MixtureOfExperts --model.feed_forward.router LinearRouter "
            "--model.feed_forward.router.top_k 3",
            ["model.feed_forward.router: LinearRouter has no option 'top_k'"],
        ),
        ("--model.feed_forward GatedFeedForwrd", ["'GatedFeedForwrd'", "GatedFeedForward"]),
        ("--model.rotary RotaryEmbeding", ["'RotaryEmbeding'", "RotaryEmbedding"]),
        ("--model.pattern [Retention,Atention]", ["'Atention'", "Attention"]),
        ("--model.mixr Retention", ["'model.mixr'", "model.mixer"]),
        ("--model.heads 3", ["heads=3 does not divide dim=32", "2, 4"]),
        ("--model.dim wide", ["model.dim", "'wide'", "int"]),
        ("--model.norm batch", ["model.norm", "'batch'", "'rms', 'layer'"]),
        ("--model.bias NoBias --model.mixer Retention", ["model.bias"]),
        ("--model.learning_rate 0", ["learning_rate"]),
        ("--model.learning_rate fast", ["model.learning_rate: 'fast' is not float"]),
        ("--model.learning_rate nan", ["model.learning_rate: 'nan' is not a finite number"]),
        ("--trainer.gradient_clip_val=-inf", ["clip_val: '-inf' is not a finite number"]),
        ("--model.learning_rate .inf", ["learning_rate=inf must be above 0, and finite"]),
        ("--model.weight_decay .inf", ["weight_decay=inf must be at least 0, and finite"]),
        ("--model.betas 0.9", ["'0.9' is not tuple", "written [0.9, ...]"]),
        ("--model.preset null", ["no dim, depth, heads", "--model.preset retnet_micro"]),
        ("--model.adapter.rank 4", ["--model.adapter.rank needs the class too"]),
        (
            "--model.adapter [LoRA]",
            ["model.adapter=['LoRA'] is no class with its", "take the name of an adapter"],
        ),
        ("--model.mixer [Retention]", ["model.mixer=['Retention'] is no class with its"]),
        ("--model.adapters LoRA", ["'LoRA' is not dict", "written {NAME: LoRA}"]),
        ("--model.adapters {}", ["adapters={} holds none"]),
        ("--model.adapters.rank 4", ["adapter 4 is not an Adapter"]),
        (
            "--model.adapters.sums.rank 4",
            ["adapters.sums.rank needs the adapter's class too: --model.adapters.sums NAME before"],
        ),
        (
            "--model.adapters.sums LoRA --model.adapters.sums.rang 4",
            ["LoRA has no argument 'rang'; nearest: rank"],
        ),
        (
            "--model.adapter LoRA --model.adapters.more MoRA",
            ["adapter=LoRA and adapters={more} are both given"],
        ),
        ("--model.adapter torch.nn.Linear", ["'torch.nn.Linear' is not an Adapter"]),
        ("--trainer.accelerator tpu", ["torch_xla"]),
        (
            "--trainer.accelerator cuda --trainer.devices 99",
            ["accelerator=cuda, trainer.devices=99", "'auto' takes what there is"],
        ),
        ("--trainer.devices -3", ["devices=-3", "'auto' takes what there is"]),
        ("--trainer.fast_dev_run -1", ["fast_dev_run"]),
        ("--data Adition", ["data", "'Adition'", "Addition"]),
        ("--data.digit 4", ["'digit'", "digits"]),
        ("--data.digits 0", ["digits 0"]),
        ("--trainer.max_step 4", ["'trainer.max_step'", "trainer.max_steps"]),
        ("--trainer.logger TensorbordLogger", ["TensorBoardLogger"]),
        ("--checkpoint.every_n_steps 0", ["every_n_steps=0"]),
        ("--ckpt_path best", ["no checkpoint runs/micro/best.ckpt"]),
        ("--data Text --data.path nowhere.txt", ["nowhere.txt"]),
        ("--data Text --data.path=", ["path is empty"]),
        ("--model.lr 1", ["'model.lr'", "nearest: model.learning_rate"]),
        ("--model.n_layer 3", ["nearest: model.depth"]),
        ("--data.bs 4", ["'bs'", "nearest: batch_size"]),
        ("--model.warmup_steps -1", ["warmup_steps=-1 must be at least 0"]),
        ("--model.betas [2,1]", ["betas=[2.0, 1.0]"]),
        ("--model.weights none.ckpt", ["omit preset", "--model.preset null"]),
        ("--trainer.val_check_interval 0", ["val_check_interval=0", "limit_val_batches=0"]),
        ("--trainer.devices 999", ["devices=999", "cores", "'auto' takes one process"]),
        ("--name ../x", ["name='../x' is not a plain name", "--trainer.default_root_dir"]),
        ("--name a/b", ["name='a/b' is not a plain name"]),
        ("--data.batch_size 10000000000", ["batch_size=10000000000", "GB of memory"]),
        ("--data.digits 10000000000", ["GB of memory"]),
        ("--model.vocab_size 1000000000000", ["vocab_size=1000000000000", "GB"]),
        ("--model.depth 100000", ["depth=100000"]),
        ("--model.mixer micro.yaml", ["micro.yaml"]),
        ("--model nowhere.yaml", ["configuration not found: nowhere.yaml"]),
        ("--ckpt_path .", [". is a directory"]),
        ("--data Text --data.path empty.txt", ["empty.txt is empty"]),
        ("--data Text --data.path binary.txt", ["binary.txt", "UTF-8"]),
        ("--data Text --data.path short.txt", ["short.txt", "shorter than one window"]),
        ("--data Text --data.path short.txt --data.tokenizer bpee", ["'bpee'", "bpe"]),
    ],
)
def test_user_errors_in_settings(here, capsys, monkeypatch, arguments, expected):
    (here / "empty.txt").write_text("")
    (here / "binary.txt").write_bytes(bytes(range(256)) * 40)
    (here / "short.txt").write_text("To be")
    monkeypatch.setenv("HOME", str(here))  # where encoded text is cached
    fails(capsys, ["fit", "--config", "micro.yaml", *arguments.split()], *expected)
    assert not (here / "runs").exists() or not list((here / "runs").rglob("*.ckpt"))


def test_what_a_callback_needs_or_watches_in_vain(here, capfd):
    given = ["fit", "--config", "micro.yaml", "--trainer.callbacks+", "EarlyStopping"]
    line = fails(capfd, given)
    assert line.endswith("trainer.callbacks: the following arguments are required: monitor")
    assert main([*given, "--trainer.callbacks.monitor=nope"]) == 1
    line = capfd.readouterr().err.strip().splitlines()[-1]
    known = "validation/exact_match, validation/loss, validation/token_accuracy"
    assert line.endswith(f"EarlyStopping.monitor: there is no metric nope; there are {known}")


@pytest.mark.parametrize(
    ("key", "content", "expected"),
    [
        ("model", {"preset": "retnet_micro", "depht": 3}, ["'model.depht'", "model.depth"]),
        (
            "model",
            {"mixer": {"class_path": "Retention", "init_args": {"decy": 1}}},
            ["'decy'", "decay"],
        ),
        ("data", {"class_path": "Addition", "init_args": {"digts": 3}}, ["'digts'", "digits"]),
        ("trainer", {"max_stps": 3}, ["'trainer.max_stps'", "trainer.max_steps"]),
    ],
)
def test_user_errors_in_a_configuration(here, capsys, key, content, expected):
    (here / "micro.yaml").write_text(yaml.safe_dump(yaml.safe_load(MICRO) | {key: content}))
    fails(capsys, ["fit", "--config", "micro.yaml"], *expected)


@pytest.mark.parametrize("device", ["cuda:99", "tpu", "cpu:7"])
@pytest.mark.parametrize("command", [["generate", "{}", "1+1="], ["grid", "{}"]])
def test_a_device_that_is_not_there(trained, capsys, command, device):
    arguments = [part.format("runs/micro/last.ckpt") for part in command]
    fails(capsys, [*arguments, "--device", device], f"device='{device}'", "take cpu")


def test_no_arguments_at_all(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["archzoo"])
    assert main() == 2
    assert capsys.readouterr().out.strip() == usage()


def test_a_switch_takes_true_and_false(capsys):
    for value, table in (([], True), (["true"], True), (["false"], False)):
        assert main(["list", "--markdown", *value]) == 0
        assert capsys.readouterr().out.startswith("| model") == table


def test_outside_of_the_environment(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "docstring_parser", None)
    fails(capsys, ["list"], "docstring_parser is not installed", "source .venv/bin/activate")


def test_an_arm_of_a_file_that_is_no_yaml(here, capsys):
    (here / "tab.yaml").write_text("\tmodel: 1\n")
    fails(
        capsys,
        ["fit", "--config", "tab.yaml", "--arm", "a"],
        "tab.yaml is not valid YAML, line 1: found character",
    )


def test_a_mistake_moves_no_run_away(here, capsys):
    fit()
    fails(capsys, ["fit", "--config", "micro.yaml", "--model.learning_rate", "0"])
    assert (here / "runs/micro/last.ckpt").exists()


def test_debug_shows_where(here, capsys, monkeypatch):
    monkeypatch.setenv("ARCHZOO_DEBUG", "1")
    assert main(["show", "retnet_tinny"]) == 1
    assert "Traceback" in capsys.readouterr().err


# ---------------------------------------------------------------------------- bad checkpoints


class Bomb:
    def __reduce__(self):
        return (print, ("boom",))


@pytest.fixture
def trained(here):
    fit()
    return Path("runs/micro/last.ckpt")


@pytest.mark.parametrize(
    "command",
    [
        "test --ckpt_path {} --trainer.accelerator cpu",
        "validate --ckpt_path {} --trainer.accelerator cpu",
        "predict --ckpt_path {} --trainer.accelerator cpu",
        "fit --ckpt_path {} --trainer.max_steps 5 --trainer.accelerator cpu",
        "generate {} 1+1= --max_tokens 2 --device cpu",
        "grid {} --digits 1 --problems 2 --device cpu",
        "upcycle {} --out moe --experts 2",
        "fit --model.weights {} --name again --trainer.max_steps 1 --trainer.accelerator cpu",
        "curves {} --metric train/loss",
    ],
    ids=lambda command: command.replace("--ckpt_path ", "").partition(" {}")[0],
)
def test_a_runs_directory_stands_for_its_last_checkpoint(trained, command, capsys):
    """Of every command that takes a checkpoint; and where a run is asked for, for the run."""
    for path in (trained.parent, trained):
        assert main(command.format(path).split()) == 0, capsys.readouterr().err
        if Path("moe").exists():
            shutil.rmtree("moe")


def test_weights_to_train_from_are_read_once(trained, monkeypatch):
    """Into one model, without drawing any; the task and its tokenizer need none of them."""
    read, drawn = [], []
    tensor, draw = Archive.tensor, Decoder.draw_weights

    def reading(archive, stored):
        read.append(stored)
        return tensor(archive, stored)

    def drawing(decoder):
        drawn.append(decoder.head.weight.device.type)
        draw(decoder)

    monkeypatch.setattr(Archive, "tensor", reading)
    monkeypatch.setattr(Decoder, "draw_weights", drawing)
    count = len(archzoo.from_pretrained(trained)[0].state_dict())
    whole = len(read)
    read.clear()
    drawn.clear()
    arguments = ["--trainer.max_steps", "1", "--trainer.accelerator", "cpu", "--name", "again"]
    arguments += ["--model.dropout", "0.1"]
    assert main(["fit", "--model.weights", str(trained), *arguments]) == 0
    assert drawn == ["meta"]
    assert stored("runs/again/last.ckpt")["hyper_parameters"]["dropout"] == 0.1
    files = len(stored()["tokenizer"])
    assert whole == count + files and len(read) == count + 2 * files
    assert stored("runs/again/last.ckpt")["base"]


def test_a_text_is_read_by_the_tokenizer_of_the_weights(here, monkeypatch, capsys):
    """Where they lie; what a run says of it can be run again, and resumed."""
    Path("a.txt").write_text("abcdefgh\n" * 200)
    Path("b.txt").write_text("hgfe\n" * 400)
    data = ["--data", "Text", "--data.context_length", "8", "--data.cache_dir", "cache"]
    quick = ["--trainer.accelerator", "cpu", "--trainer.val_check_interval", "1"]
    preset = ["--model.preset", "transformer_micro", "--name", "a", "--trainer.max_steps", "1"]
    assert main(["fit", *preset, *data, "--data.path", "a.txt", *quick]) == 0
    weights = ["--model.weights", "runs/a", "--name", "b", "--trainer.max_steps", "1"]
    Path("a.txt").write_text("hgfe\n" * 400)  # another text, of fewer characters
    assert main(["fit", *weights, *quick]) == 0, capsys.readouterr().err
    assert stored("runs/b/last.ckpt")["tokenizer"].keys() == {"tokenizer.json"}
    files = [tokenizer_files(stored(f"runs/{name}/last.ckpt")) for name in "ab"]
    assert files[0] == files[1]
    assert "runs/a/last.ckpt" in Path("runs/b/config.yaml").read_text()
    resumed = ["fit", "--ckpt_path", "runs/b", "--trainer.max_steps", "2"]
    assert main([*resumed, *quick]) == 0, capsys.readouterr().err
    assert main(["fit", "--config", "runs/b/config.yaml", "--name", "c", *quick]) == 0
    with monkeypatch.context() as patched:
        patched.setattr(tempfile, "TemporaryDirectory", None)
        found = load("runs/b")
        assert task_of(found).tokenizer.files() == files[0]


OLD = """
seed_everything: 0
model:
  preset: transformer_micro
  embedding:
    class_path: archzoo.positions.learned.RandomisedPositions
    init_args: {longest: 64, text_length: 32, embedding: archzoo.positions.embedding.TokenEmbedding}
data:
  class_path: archzoo.tasks.arithmetic.Addition
  init_args: {digits: 2, batch_size: 4, validation_examples: 8, test_examples: 12}
trainer: {max_steps: 2, accelerator: cpu, val_check_interval: 2, log_every_n_steps: 1}
"""


def test_files_that_name_parts_where_they_were_before(here, capsys):
    """A configuration, the command line, a run's checkpoint and a directory of a model."""
    Path("old.yaml").write_text(OLD)
    assert main(["fit", "--config", "old.yaml"]) == 0, capsys.readouterr().err
    abacus = "archzoo.positions.abacus.AbacusEmbedding"
    arguments = ["--model.embedding", abacus, "--model.embedding.max_shift", "4", "--name", "flag"]
    assert main(["fit", "--config", "old.yaml", *arguments]) == 0, capsys.readouterr().err
    coupled = ["--model.embedding=archzoo.positions.coupling.PositionCoupling", "--name=coupled"]
    fit = ["fit", "--config", "old.yaml", *coupled, "--data.coupled", "true"]
    assert main(fit) == 0, capsys.readouterr().err
    model, _ = archzoo.from_pretrained("runs/old")
    tokens = torch.randint(model.vocab_size, (2, 9))
    settings = Path("runs/old/config.yaml").read_text()
    assert "archzoo.positions" not in settings

    content = stored("runs/old/last.ckpt")
    embedding = content["hyper_parameters"]["embedding"]
    embedding["class_path"] = "archzoo.positions.learned.RandomisedPositions"
    embedding["init_args"]["embedding"]["class_path"] = "archzoo.positions.embedding.TokenEmbedding"
    torch.save(content, "runs/old/last.ckpt")
    path = "class_path: archzoo.positions.learned.RandomisedPositions"
    old = re.sub(r"class_path: \S*RandomisedPositions", path, settings)
    assert old != settings
    Path("runs/old/config.yaml").write_text(old)
    again, tokenizer = archzoo.from_pretrained("runs/old/last.ckpt")
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    quick = ["--trainer.accelerator", "cpu"]
    assert main(["test", "--ckpt_path", "runs/old", *quick]) == 0, capsys.readouterr().err
    resumed = ["fit", "--ckpt_path", "runs/old", "--trainer.max_steps", "3"]
    assert main([*resumed, *quick]) == 0, capsys.readouterr().err
    archzoo.save_pretrained("model", again, tokenizer)
    config = json.loads(Path("model/config.json").read_text())
    config["decoder"]["embedding"] = embedding
    Path("model/config.json").write_text(json.dumps(config))
    again, _ = archzoo.from_pretrained("model")
    assert torch.equal(again(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("command", ["test", "fit"])
def test_bad_checkpoints(trained, capsys, command):
    checkpoint = stored()
    bad = {
        "cut": trained.read_bytes()[:-3000],
        "empty": b"",
        "words": b"hello",
    }
    for name, content in bad.items():
        Path(f"{name}.ckpt").write_bytes(content)
        fails(capsys, [command, "--ckpt_path", f"{name}.ckpt"], f"{name}.ckpt")
    torch.save(checkpoint | {"extra": Bomb()}, "bomb.ckpt")
    fails(capsys, [command, "--ckpt_path", "bomb.ckpt"], "bomb.ckpt", "code")
    assert "boom" not in capsys.readouterr().out
    torch.save({"state_dict": checkpoint["state_dict"]}, "other.ckpt")
    fails(capsys, [command, "--ckpt_path", "other.ckpt"], "other.ckpt", "archzoo's training")
    strange = checkpoint["task"] | {"class_path": "os.system"}
    torch.save(checkpoint | {"task": strange}, "strange.ckpt")
    fails(capsys, [command, "--ckpt_path", "strange.ckpt"], "os.system")


def test_weights_of_other_shapes(trained, capsys):
    """Settings that say one thing and weights that say another: one line, of all that read them."""
    checkpoint = stored()
    state = checkpoint["state_dict"]
    name = "decoder.blocks.0.mixer.output.weight"
    name = name if name in state else next(n for n in state if n.startswith("decoder.blocks.0"))
    for changed in (state | {name: torch.zeros(3, 5)}, {n: state[n] for n in state if n != name}):
        torch.save(checkpoint | {"state_dict": changed}, "other.ckpt")
        for command in (["fit", "--config", "micro.yaml"], ["test"]):
            fails(capsys, [*command, "--ckpt_path", "other.ckpt"], name.removeprefix("decoder."))


def test_another_model_and_vocabulary(trained, capsys):
    resume = ["fit", "--config", "micro.yaml", "--ckpt_path", str(trained)]
    fails(capsys, [*resume, "--model.depth", "3"], "another model", "depth is 2 in it and 3 here")
    Path("digits.txt").write_text("0123456789+=() " * 50)
    text = "--data Text --data.path digits.txt --data.context_length 8 --data.cache_dir cache"
    Text("digits.txt", context_length=8, cache_dir="cache").prepare()  # says so, once
    line = fails(capsys, [*resume, *text.split(), "--model.vocab_size", "15"])
    assert "vocab" in line
    fails(capsys, [*resume, *text.split()], "vocab")


# ---------------------------------------------------------------------------- what ends a run


def test_nan_keeps_the_last_good_checkpoint(here, capsys):
    fit("--checkpoint.every_n_steps", "1")
    before = stored()["global_step"]
    capsys.readouterr()
    blown = ["--model.learning_rate", "1e30", "--model.warmup_steps", "0"]
    line = fails(
        capsys,
        ["fit", "--config", "micro.yaml", *blown, "--checkpoint.every_n_steps", "1"],
        "step ",
        "--model.learning_rate",
    )
    assert before == 4
    path = Path("runs/micro/last.ckpt")
    if path.exists():
        assert "last good checkpoint" in line
        assert all(value.isfinite().all() for value in stored()["state_dict"].values())
    assert stored("runs/micro-1/last.ckpt")["global_step"] == 4


def test_a_full_disk_keeps_the_last_good_checkpoint(here, programs):
    """A limit on the size of files stands for the disk; both end a write in the middle."""
    fit()
    before = Path("runs/micro/last.ckpt").read_bytes()

    arguments = ["fit", "--ckpt_path", "runs/micro/last.ckpt", "--trainer.max_steps", "6"]
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); "
    limited += f"from archzoo.cli import main; raise SystemExit(main({arguments}))"
    run = subprocess.run(
        [programs / "python", "-c", limited],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert run.returncode == 1
    errors = [line for line in run.stderr.splitlines() if "Warning" not in line]
    assert errors == ["error: runs/micro/last.ckpt could not be written: File too large"]
    assert Path("runs/micro/last.ckpt").read_bytes() == before
    assert not list(Path("runs/micro").glob("*.partial"))


@pytest.mark.skipif(sys.platform == "win32", reason="no shell there")
@pytest.mark.parametrize("arguments", ["list", "--help", "generate {old} 1+2= --max_tokens 50"])
def test_a_reader_that_has_enough_is_no_mistake(arguments, programs):
    """`archzoo ... | head`: nothing on stderr, whatever the command."""
    old = Path(__file__).parent / "checkpoints" / "retnet_micro.ckpt"
    program = f"{programs}/python -m archzoo {arguments.format(old=old)} | true"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(program, shell=True, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0 and done.stderr == ""


def test_an_error_that_quotes_much_stays_a_line(capsys):
    from archzoo.cli import complain

    assert complain(ValueError("name=" + "x" * 100_000 + ": take another")) == 1
    said = capsys.readouterr().err
    assert len(said) < 1_100 and said.startswith("error: name=x") and "take another" in said


@pytest.mark.skipif(sys.platform == "win32", reason="no shell there")
def test_a_run_continues_when_no_one_reads_it(here, programs):
    fit = f"{programs}/python -m archzoo fit --config micro.yaml | true"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", fit],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode in (0, 141), done.stderr
    assert torch.load("runs/micro/last.ckpt", weights_only=True)["global_step"] == 4


def test_a_task_argument_that_is_null_is_named(here, capsys):
    Path("null.yaml").write_text("data: {class_path: Text, init_args: {context_length: null}}\n")
    assert main(["fit", "--config", "null.yaml", "--model.preset", "retnet_micro"]) == 1
    error = capsys.readouterr().err
    assert "data: context_length=None is not" in error and error.count("\n") == 1
