"""Every file in configs/ trains for some steps, and says why each of its keys is as it is."""

import re
from pathlib import Path

import pytest
import yaml

from archzoo.analysis.compare.plan import resolve_base
from archzoo.cli import main

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
# Those whose weights are another one's, trained after it by test_preferences.py and
# test_distillation.py.
LATER = re.compile("preferences|onebit")
IN_A_ROW = [path for path in CONFIGS if LATER.match(path.parent.name) or LATER.match(path.stem)]
CONFIGS = [path for path in CONFIGS if path not in IN_A_ROW]
TINY = {
    "model": "--model.dim 16 --model.depth 2 --model.heads 2 --model.width 32",
    "Addition": "--data.batch_size 4 --data.validation_examples 8 --data.test_examples 8",
    "Text": "--data.batch_size 2 --data.context_length 32",
    "Mixed": "--data.batch_size 2 --data.context_length 128",
    "Recall": "--data.batch_size 4 --data.validation_examples 8 --data.sizes [[2,16]]",
    "KeyValues": "--data.batch_size 4 --data.pairs 8",
}
TINY |= dict.fromkeys(["Subtraction", "Arithmetic"], TINY["Addition"])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Where the base of a file's arms lies, untrained, whose sizes they take; None: it has none."""
    made = {}

    def of(path, arm=None):
        named = (yaml.safe_load(path.read_text()).get("compare") or {}).get("base")
        if isinstance(named, dict):
            named = named.get(arm) if arm else next(iter(named.values()))
        if named and named not in made:
            made[named] = tmp_path_factory.mktemp("base") / "model"
            resolve_base(path.parent / named, {}, made[named])
        return made.get(named)

    return of


def small(content, weights=None):
    """Options of a small model: the preset's own micro where its width is a match's to set."""
    if weights is not None:
        return f"--model.weights {weights}"
    if not content["model"].get("match"):
        return TINY["model"]
    return f"--model.preset {content['model']['preset'].partition('_')[0]}_micro"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_trains(path, base, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    content = yaml.safe_load(path.read_text())
    task = content["data"]["class_path"]
    arguments = [
        *f"fit --config {path.relative_to(ROOT)} --trainer.max_steps 3".split(),
        *f"--trainer.default_root_dir {tmp_path} --trainer.val_check_interval 2".split(),
        *["--trainer.limit_val_batches", "2", "--trainer.accelerator", "cpu"],
        *small(content, base(path)).split(),
        *TINY[task].split(),
    ]
    if task in ("Text", "Mixed"):
        arguments += ["--data.cache_dir", str(tmp_path / "cache")]
    assert main(arguments) == 0
    run = tmp_path / path.stem
    assert {file.name for file in run.iterdir()} == {
        "last.ckpt",
        "best.ckpt",
        "metrics.csv",
        "config.yaml",
    }
    # What was saved is the same experiment: it parses, and trains again.
    again = ["fit", "--config", str(run / "config.yaml"), "--name", "again"]
    assert main(again) == 0
    assert (run / "metrics.csv").read_text().count("\n") == (
        tmp_path / "again" / "metrics.csv"
    ).read_text().count("\n")


def arms(path):
    return yaml.safe_load(path.read_text()).get("arms") or {}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def variants():
    """Every arm; of adapters' files the first only where it must be quick.

    The others take 40 seconds of a core. test_compare.py makes the plans of all of them.
    """
    for path in CONFIGS:
        for number, arm in enumerate(arms(path)):
            quick = path.parent.name != "adaptation" or not number
            yield pytest.param(path, arm, marks=[] if quick else pytest.mark.slow)


@pytest.mark.parametrize(
    ("path", "arm"),
    list(variants()),
    ids=lambda value: value.stem if isinstance(value, Path) else value,
)
@pytest.mark.filterwarnings("ignore:a number of .* digits is longer than")  # some mean to show it
def test_every_variant_trains_with_its_settings(path, arm, base, cache, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    content = yaml.safe_load(path.read_text())
    task, settings = content["data"]["class_path"], arms(path)[arm]
    # Small, but for what the arm sets itself; `match` sets the width.
    sizes = small(content, base(path, arm)).split("--")
    sizes = [size for size in sizes if size.partition(" ")[0] not in settings]
    sizes = "--".join(sizes) if "model.match" not in settings else ""
    arguments = [
        *f"fit --config {path.relative_to(ROOT)} --arm {arm} --trainer.max_steps 1".split(),
        *f"--trainer.default_root_dir {tmp_path} --trainer.limit_val_batches 0".split(),
        *f"--trainer.accelerator cpu {sizes} {TINY[task]}".split(),
    ]
    if task in ("Text", "Mixed"):
        arguments += ["--data.cache_dir", str(cache)]
    assert main(arguments) == 0
    saved = yaml.safe_load((tmp_path / f"{path.stem}_{arm}" / "config.yaml").read_text())
    assert saved["arms"] is None, "what was saved is this arm alone"
    for name, value in settings.items():
        found = saved
        for part in name.split("."):
            if part not in found and "init_args" in found:
                found = found["init_args"]
            found = found[part]
        if isinstance(value, dict) and "class_path" in value:  # with arguments: all are saved
            assert value.get("init_args", {}).items() <= found["init_args"].items(), name
            value = value["class_path"]
        if isinstance(found, dict) and isinstance(value, str):  # a part by its name alone
            found, value = found["class_path"], value.rpartition(".")[2]
            found = found.rpartition(".")[2]
        short = found.rpartition(".")[2] if name.endswith("class_path") else found
        assert short == value, name


def test_an_unknown_arm_is_named(capsys):
    path = str(ROOT / "configs/claims/filtered_attention.yaml")
    assert main(["fit", "--config", path, "--arm", "filter"]) == 1
    assert "are plain, filtered, filtered_matched" in capsys.readouterr().err
    assert main(["fit", "--arm", "plain", "--model.preset", "retnet_micro"]) == 1
    assert "--arm plain needs --config FILE" in capsys.readouterr().err


@pytest.mark.parametrize("path", CONFIGS + IN_A_ROW, ids=lambda path: path.stem)
def test_config_reads_like_prose(path):
    text = path.read_text()
    assert text.startswith("# "), "it opens by saying what it is"
    assert "seed_everything" in yaml.safe_load(text)
    assert all(len(line) <= 100 for line in text.splitlines())
