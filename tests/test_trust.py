"""What a stranger's checkpoint, `config.json`, `config.yaml` or YAML file may not do."""

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import archzoo
from archzoo import registry
from archzoo.cli import main, split_imports
from archzoo.parts import describe
from archzoo.tasks.stream import build
from archzoo.training import settings
from archzoo.trust import check_path, find_class, load_installed

ROOT = Path(__file__).parent.parent
CANARY = "PWNED"
MICRO = {
    "seed_everything": 0,
    "model": {"preset": "retnet_micro"},
    "data": {
        "class_path": "Addition",
        "init_args": {"digits": 2, "batch_size": 4, "validation_examples": 4, "test_examples": 4},
    },
    "trainer": {"max_steps": 1, "accelerator": "cpu", "enable_progress_bar": False},
}
# Being imported is enough to be seen; what it defines would fit any slot.
EVIL = f"""
import pathlib
pathlib.Path({CANARY!r}).touch()
from archzoo.mixers.attention import Attention as Mixer
def call(*arguments, **more): return Mixer
"""
COMMAND = {"class_path": "os.system", "init_args": {"command": f"touch {CANARY}"}}
HOSTILE = {
    "a function": COMMAND,
    "a function's name": "os.system",
    "a module here": "evil.Mixer",
    "a module below": {"class_path": "runs.stranger.evil.Mixer", "init_args": {}},
    "a function here": {"class_path": "evil.call"},
    "an installed module": "antigravity.fly",
    "code": {"class_path": "builtins.exec", "init_args": {"source": f"open({CANARY!r}, 'w')"}},
    "a process": {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", CANARY]}},
    "another kind": "torch.nn.Linear",
    "through a module": "archzoo.cli.os.system",
    "a function of ours": "archzoo.cli.main",
    "no name": {"class_path": ["os", "system"]},
    "a dictionary": {"init_args": {"command": f"touch {CANARY}"}},
    "a number": 7,
    "a list": [COMMAND],
}


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    """A run of one step, and the model that was saved of it."""
    place = tmp_path_factory.mktemp("origin")
    before = Path.cwd()
    os.chdir(place)
    Path("micro.yaml").write_text(yaml.safe_dump(MICRO))
    assert main(["fit", "--config", "micro.yaml"]) == 0
    model, tokenizer = archzoo.from_pretrained("runs/micro/last.ckpt")
    archzoo.save_pretrained("saved", model, tokenizer)
    os.chdir(before)
    return place


@pytest.fixture
def stored(origin):
    return torch.load(origin / "runs/micro/last.ckpt", weights_only=True)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A current directory with a stranger's modules in it; none may be imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")  # as `python -m archzoo` has it
    (tmp_path / "runs/stranger").mkdir(parents=True)
    for place in ("evil.py", "runs/stranger/evil.py"):
        (tmp_path / place).write_text(EVIL)
    (tmp_path / "micro.yaml").write_text(yaml.safe_dump(MICRO))
    modules = set(sys.modules)
    yield tmp_path
    strange = ("evil", "runs", "antigravity", "this")
    imported = [name for name in set(sys.modules) - modules if name.partition(".")[0] in strange]
    assert not imported
    assert not list(tmp_path.rglob(CANARY))


def refused(capsys, arguments, *expected):
    capsys.readouterr()
    assert main(list(map(str, arguments))) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    for part in expected:
        assert part in lines[0], f"{part!r} is not in {lines[0]!r}"
    return lines[0]


def write(checkpoint):
    path = Path("runs/stranger/last.ckpt")
    torch.save(checkpoint, path)
    return path


def slots(value):
    """A decoder's settings with a value in each of its slots."""
    nested = {"class_path": "MixtureOfExperts", "init_args": {"experts": 2, "router": value}}
    return {
        "mixer": {"mixer": value},
        "convolution": {"convolution": value},
        "pattern": {"mixer": None, "pattern": [value]},
        "feed_forward": {"feed_forward": value},
        "router": {"feed_forward": nested},
        "embedding": {"embedding": value},
        "rotary": {"rotary": value},
        "bias": {"bias": value},
    }


SLOTS = list(slots(None))
# Reading a model is the same in all of these; one is taken for each case, in turn.
READING = [
    ["generate", "{}", "1+1="],
    ["grid", "{}"],
    ["router", "{}"],
    ["upcycle", "{}", "out"],
]


# ---------------------------------------------------------------------------- parts


@pytest.mark.parametrize("slot", SLOTS)
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_part_in_a_files_settings(here, capsys, origin, stored, slot, kind):
    """In a checkpoint, and in a `config.json`: commands that read a model."""
    change = slots(HOSTILE[kind])[slot]
    turn = SLOTS.index(slot) + list(HOSTILE).index(kind)
    for number, form in enumerate(("checkpoint", "directory")):
        if form == "checkpoint":
            stored["hyper_parameters"] |= change
            path = write(stored)
        else:
            path = here / "runs/stranger"
            config = json.loads((origin / "saved/config.json").read_text())
            config["decoder"] |= change
            (path / "config.json").write_text(json.dumps(config))
            weights = origin / "saved/model.safetensors"
            (path / "model.safetensors").write_bytes(weights.read_bytes())
            (path / "tokenizer.json").write_bytes((origin / "saved/tokenizer.json").read_bytes())
        command = READING[(turn + number) % len(READING)]
        refused(capsys, [part.format(path) for part in command])


@pytest.mark.parametrize(
    ("command", "slot", "kind"),
    [
        ("test", "mixer", "a function"),
        ("fit", "mixer", "a function"),
        ("validate", "router", "a function"),
        ("predict", "pattern", "a module here"),
        ("test", "feed_forward", "a function here"),
        ("fit", "embedding", "code"),
        ("test", "rotary", "a process"),
        ("validate", "bias", "a list"),
    ],
)
def test_a_part_in_a_runs_checkpoint(here, capsys, stored, command, slot, kind):
    """Commands whose settings are parsed: the parser calls what it is given for a `Callable`."""
    stored["hyper_parameters"] |= slots(HOSTILE[kind])[slot]
    refused(capsys, [command, "--ckpt_path", write(stored)])


@pytest.mark.parametrize("name", ["weights", "preset", "match", "__path__", "config"])
def test_a_setting_that_no_run_stores(here, capsys, stored, name):
    stored["hyper_parameters"][name] = "/etc/passwd"
    refused(capsys, ["test", "--ckpt_path", write(stored)], name)


def test_parts_are_found_among_what_is_imported(here):
    for kind, value in HOSTILE.items():
        for slot in ("mixer", "feed_forward", "router", "embedding", "rotary", "bias"):
            with pytest.raises(ValueError, match=slot):
                describe(slot, value if kind != "a list" else COMMAND)
    assert find_class("torch.nn.Linear", torch.nn.Module) is torch.nn.Linear
    assert describe("mixer", "archzoo.mixers.retention.Retention")["class_path"] == "Retention"
    with pytest.raises(ValueError, match="--import no_module"):
        find_class("no_module.Mixer")


# ---------------------------------------------------------------------------- tasks


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_task_in_a_checkpoint(here, capsys, stored, kind):
    value = HOSTILE[kind]
    task = value if isinstance(value, dict) else {"class_path": value, "init_args": {}}
    with pytest.raises(ValueError, match="task"):
        build(task)
    refused(capsys, ["grid", write(stored | {"task": task})])


def test_problems_in_a_text(here):
    for name in ("os.system", "evil.Mixer", "Text"):
        with pytest.raises(ValueError, match=r"task|problems"):
            build({"class_path": "Mixed", "init_args": {"problems": name}})


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"digits": "three"}, "digits='three' is not int"),
        ({"digits": True}, "digits=True is not int"),
        ({"ood_digits": 7}, "ood_digits=7 is not list"),
        ({"ood_digits": ["a"]}, "ood_digits=['a'] is not list"),
        ({"digit": 3}, "no argument 'digit'; nearest: digits"),
        ({"seed": {"class_path": "os.system"}}, "is not int"),
    ],
)
def test_arguments_of_another_type(arguments, expected):
    with pytest.raises(ValueError, match="task") as caught:
        build({"class_path": "archzoo.tasks.Addition", "init_args": arguments})
    assert expected in str(caught.value)


@pytest.fixture
def corpus(here, tmp_path_factory):
    """A text outside of the current directory, and ways to it from within."""
    outside = tmp_path_factory.mktemp("outside")
    (outside / "secret.txt").write_text("to be or not to be " * 100)
    (here / "text.txt").write_text("to be or not to be " * 100)
    (here / "link.txt").symlink_to(outside / "secret.txt")
    (here / "folder").mkdir()
    (here / "folder/deep.txt").symlink_to(outside / "secret.txt")
    (here / "linked").symlink_to(outside)
    os.mkfifo(here / "fifo")
    return outside / "secret.txt"


def test_paths_of_a_checkpoint_lie_here(here, corpus, monkeypatch):
    """Whatever leads out is refused, through links as well; what lies here is read."""
    monkeypatch.setenv("HOME", str(corpus.parent))
    ways = ["/etc/passwd", str(corpus), "link.txt", "folder", "folder/*.txt", "linked", "fifo"]
    ways += ["linked/secret.txt", f"../{corpus.parent.name}", "~", "~/secret.txt", ".."]
    ways += ["http://example.org/text", "../*", "*.txt", "text.txt/../../x", "/dev/zero"]
    text = {"class_path": "archzoo.tasks.Text", "init_args": {"context_length": 8}}
    for path in ways:
        changed = copy.deepcopy(text)
        changed["init_args"]["path"] = path
        with pytest.raises(ValueError, match=r"--data\.path"):
            build(changed)
        assert build(changed, path="text.txt").arguments["path"] == "text.txt"
        if path not in ("folder", "linked", "*.txt", "folder/*.txt", "fifo"):  # as a tokenizer
            changed["init_args"] = {"tokenizer": path}
            with pytest.raises(ValueError, match=r"--data\.tokenizer"):
                build(changed)
    (here / "link.txt").unlink()
    for path in ("text.txt", str(here / "text.txt"), "./text.txt", "text.*", "runs/../text.txt"):
        text["init_args"]["path"] = path
        assert build(text).arguments["path"] == path
    check_path(str(ROOT / "data/shakespeare.txt"), always=True)  # the zoo's own, from anywhere
    with pytest.raises(ValueError, match="does not lie"):
        check_path(str(ROOT / "README.md"), always=True)


def test_a_cache_is_not_made_where_a_checkpoint_says(here, corpus):
    arguments = {"path": "text.txt", "context_length": 8, "cache_dir": str(here / "cache")}
    task = build({"class_path": "archzoo.tasks.Text", "init_args": arguments})
    assert task.arguments["cache_dir"] is None
    given = build({"class_path": "Text", "init_args": arguments}, cache_dir="mine")
    assert given.arguments["cache_dir"] == "mine"


def test_a_text_that_a_checkpoint_names(here, corpus, capsys, monkeypatch):
    """One line shows the path and the flag; with the flag the same command reads it."""
    monkeypatch.setenv("HOME", str(here))
    data = {"path": str(corpus), "context_length": 8, "batch_size": 2, "cache_dir": "cache"}
    own = MICRO | {"data": {"class_path": "Text", "init_args": data}}
    Path("own.yaml").write_text(yaml.safe_dump(own))
    assert main(["fit", "--config", "own.yaml"]) == 0  # the user's own file: read as it says
    test = ["test", "--ckpt_path", "runs/own/last.ckpt"]
    refused(capsys, test, "runs/own/last.ckpt", str(corpus), f"--data.path {corpus}")
    assert main([*test, "--data.path", str(corpus)]) == 0
    again = ["fit", "--ckpt_path", "runs/own/last.ckpt", "--trainer.max_steps", "2"]
    refused(capsys, again, f"--data.path {corpus}", "--config runs/own/config.yaml")
    assert main([*again, "--data.path", str(corpus)]) == 0


# ---------------------------------------------------------------------------- YAML


def beside(changes):
    """A stranger's config.yaml beside a checkpoint, with settings by their full names."""
    config = copy.deepcopy(MICRO)
    for name, value in changes.items():
        *above, last = name.split(".")
        inner = config
        for part in above:
            inner = inner.setdefault(part, {})
        inner[last] = value
    Path("runs/stranger/config.yaml").write_text(yaml.safe_dump(config))
    return config


TRAINER = ["trainer.callbacks", "trainer.logger", "trainer.plugins", "trainer.strategy"]
TRAINER += ["trainer.profiler", "trainer.accelerator"]


@pytest.mark.parametrize(
    "slot", [*TRAINER, "data", *(f"model.{s}" for s in SLOTS if s != "router")]
)
@pytest.mark.parametrize("kind", [k for k in HOSTILE if k not in ("a number", "a dictionary")])
def test_a_class_in_a_yaml_file(here, slot, kind):
    value = HOSTILE[kind]
    section, _, name = slot.partition(".")
    nested = {"class_path": "MixtureOfExperts", "init_args": {"router": value}}
    for form in (value, [value], nested):
        held = {section: {name: form} if name else form}
        with pytest.raises(ValueError, match=r"x\.yaml"):
            settings.check(held, "x.yaml")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("trainer.callbacks", COMMAND),
        ("trainer.callbacks", ["evil.Mixer"]),
        ("trainer.logger", "runs.stranger.evil.Mixer"),
        ("trainer.plugins", [{"class_path": "os.system", "init_args": {"command": "true"}}]),
        ("model.mixer", "evil.Mixer"),
        ("model.mixer", "runs/stranger/evil.py"),
        ("data", COMMAND),
    ],
)
def test_a_config_beside_a_checkpoint(here, capsys, stored, name, value):
    beside({name: value})
    refused(capsys, ["fit", "--ckpt_path", write(stored)])


FUNCTIONS = {
    "lightning.pytorch.callbacks.LambdaCallback": "on_fit_start",
    "BackboneFinetuning": "lambda_func",
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("value", ["os.abort", "archzoo.cli.main", COMMAND])
def test_a_function_for_a_callback(name, value):
    callback = {"class_path": name, "init_args": {FUNCTIONS[name]: value}}
    with pytest.raises(ValueError, match="names a function"):
        settings.check({"trainer": {"callbacks": [callback]}}, "x.yaml")


def test_the_parser_imports_nothing_itself(here, capsys):
    """What the checks would overlook: the parser is kept to the same list of classes."""
    fit = ["fit", "--config", "micro.yaml"]
    for value in ("os.system", "evil.Mixer", "evil.call", json.dumps(COMMAND), "antigravity.fly"):
        refused(capsys, [*fit, "--model.mixer", value], "model.mixer")
        refused(capsys, [*fit, "--trainer.callbacks+", value], "trainer.callbacks")
    refused(capsys, [*fit, "--data", json.dumps(COMMAND)], "data")
    averaging = {"class_path": "WeightAveraging", "init_args": {"avg_fn": "os.abort"}}
    for value in (averaging, averaging | {"init_args": {"avg_fn": "evil.call"}}):
        callbacks = {"trainer": MICRO["trainer"] | {"callbacks": [value]}}
        Path("average.yaml").write_text(yaml.safe_dump(MICRO | callbacks))
        refused(capsys, ["fit", "--config", "average.yaml"], "trainer.callbacks")
    anything = {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", CANARY]}}
    arms = MICRO | {"arms": {"a": {"model.dim": anything}}}
    Path("arms.yaml").write_text(yaml.safe_dump(arms))
    assert main(["fit", "--config", "arms.yaml", "--trainer.fast_dev_run", "1"]) == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("trainer.default_root_dir", "/tmp/elsewhere"),
        ("trainer.default_root_dir", "../elsewhere"),
        ("trainer.default_root_dir", "linked"),
        ("trainer.logger", {"class_path": "CSVLogger", "init_args": {"save_dir": "/tmp/logs"}}),
        (
            "trainer.callbacks",
            [{"class_path": "ModelCheckpoint", "init_args": {"dirpath": "/tmp/checkpoints"}}],
        ),
        ("model.weights", "/etc/passwd"),
        ("data.init_args.path", "~/secret"),
    ],
)
def test_paths_of_a_config_beside_a_checkpoint(here, corpus, capsys, stored, name, value):
    """They lie under the current directory, or the command line gives them."""
    beside({name: value})
    flag = name.replace(".init_args", "")
    line = refused(capsys, ["fit", "--ckpt_path", write(stored)], flag, "config.yaml")
    assert "--config runs/stranger/config.yaml" in line


@pytest.mark.parametrize(
    "logger",
    [
        "WandbLogger",
        ["CSVLogger", "lightning.pytorch.loggers.MLFlowLogger"],
        {"class_path": "CometLogger", "init_args": {"api_key": "a stranger's"}},
    ],
)
def test_a_logger_of_a_config_beside_a_checkpoint(here, capfd, stored, logger):
    """It would send the run's settings and losses to an account that the stranger names."""
    beside({"trainer.logger": logger})
    line = refused(capfd, ["fit", "--ckpt_path", write(stored)], "may send", "trainer.logger")
    assert "--trainer.logger false" in line
    beside({"tracker": ["tensorboard"], "trainer.logger": False})
    path = str(write(stored))
    assert main(["fit", "--ckpt_path", path, "--trainer.max_steps", "2"]) == 0
    assert "logs to ['tensorboard'] as well: --tracker null" in capfd.readouterr().err


def test_what_the_command_line_gives_is_not_asked_about(here, corpus, stored):
    beside({"trainer.default_root_dir": "linked"})
    path = write(stored)
    given = ["--trainer.default_root_dir", "mine", "--trainer.max_steps", "2"]
    assert main(["fit", "--ckpt_path", str(path), *given]) == 0
    assert list(Path("mine").rglob("last.ckpt"))


NINE = "\n".join(
    ["a0: &a0 [x, x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10))]
)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "empty"),
        ("# nothing", "empty"),
        ("- a\n- b", "['a', 'b']"),
        ("hello", "'hello'"),
        ("7", "7"),
        ("model: [retnet_micro]", "model is ['retnet_micro']"),
        ("model: retnet_micro", "model is 'retnet_micro'"),
        ("trainer: other.yaml", "trainer is 'other.yaml'"),
        ("seed_everything: 0\nseed_everything: 1", "'seed_everything' is given twice, line 2"),
        ("model:\n  dim: 8\n  dim: 16", "'dim' is given twice, line 3"),
        ("model: {preset: a, preset: b}", "given twice"),
        (NINE, "aliases"),
        ("a: &a [*a]", "alias"),
        ("[" * 100 + "]" * 100, "nested more than 64 deep"),
        ("model: !!python/object/apply:os.system [true]", "not valid YAML"),
        ("model: {1: 2}", "not valid YAML"),
        ("model: !!binary aGVsbG8=", "not a plain value"),
        ("\tmodel: 1", "not valid YAML"),
        ("model: {mixer: {class_path: Retention, decay: 1}}", "decay stands beside class_path"),
        ("model: {mixer: {decay: 1}}", "takes a class's name, or class_path and init_args"),
        ("model: {mixer: {class_path: Retention, init_args: [1]}}", "init_args is [1]"),
        ("model: {mixer: {class_path: [a]}}", "class_path is ['a']"),
        ("__path__: /etc/passwd", "no setting '__path__'"),
    ],
)
def test_yaml_that_is_no_configuration(here, content, expected):
    Path("x.yaml").write_text(content)
    with pytest.raises(ValueError, match=r"^x\.yaml") as caught:
        settings.check(settings.read(Path("x.yaml")), "x.yaml")
    assert expected in str(caught.value)


def test_files_that_are_no_configuration(here, corpus):
    for name, content in {"large.yaml": b"#" * 2_000_000, "latin.yaml": b"model: \xff"}.items():
        Path(name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            settings.read(Path(name))
    for name in ("fifo", "folder", "/dev/zero"):
        with pytest.raises(ValueError, match="takes a YAML file"):
            settings.read(Path(name))


def test_what_is_handed_to_the_parser_is_what_was_read():
    """Numbers, words that look like numbers, and characters of every kind come through."""
    text = (
        "a: 1e-3\nb: '1e-3'\nc: [.inf, -0.5, true, null, 'null', 'yes']\nd: \"\\0\\n\\x07 ü 名\"\n"
    )
    text += "e: {f: '', g: '- x', h: '{', i: 10_000, j: 0x10, k: 2020-01-01, l: '*a', m: &m [1]}\n"
    text += "n: {o: {p: {q: [[], {}]}}}"
    found = settings.parse(text, "x")
    assert found["a"] == 1e-3 and found["b"] == "1e-3"
    assert settings.parse(settings.written(found), "y") == found


# ---------------------------------------------------------------------------- what the user allows


MINE = """
import archzoo
from archzoo import registry
from archzoo.mixers.retention import Retention
from archzoo.feedforward.routers import LinearRouter
from archzoo.tasks import Addition
from lightning.pytorch import Callback

class Slow(Retention):
    def __init__(self, dim: int, heads: int, *, pace: float = 1.0) -> None:
        super().__init__(dim, heads, decay=pace)

class Chooser(LinearRouter):
    pass

class Sums(Addition):
    pass

class Quiet(Callback):
    pass

archzoo.register_model("mine_micro", {
    "vocab_size": 16, "dim": 16, "depth": 1, "heads": 2, "mixer": {"class_path": "mine.Slow"}})
"""


def test_a_command_imports_nothing_of_an_earlier_one(capsys):
    """They are handed on to processes that a command starts, which may not find the module."""
    from archzoo.trust import user_imports

    assert main(["--import", "json", "show", "retnet_micro"]) == 0
    assert user_imports == ["json"]
    assert main(["show", "retnet_micro"]) == 0
    assert user_imports == []


def test_one_word_for_all_ways_of_starting(here, programs):
    """`archzoo`, `python -m archzoo` and `train.py` import alike, before or after the command."""
    Path("mine.py").write_text(MINE)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    script = "import sys; sys.path = [p for p in sys.path if p]; from archzoo.cli import main; "
    ways = [
        ["-m", "archzoo"],
        [str(ROOT / "train.py")],
        ["-c", f"{script} sys.exit(main())"],  # as the script that pip writes
    ]
    for number, way in enumerate(ways):
        shown = ["--import", "mine", "show", "mine_micro"]
        shown = shown if number else ["show", "mine_micro", "--import=mine"]
        run = subprocess.run(
            [programs / "python", *way, *shown], capture_output=True, text=True, env=environment
        )
        assert run.returncode == 0 and re.search("mixer +Slow", run.stdout), run.stderr
    without = [programs / "python", *ways[0], "show", "mine_micro"]
    run = subprocess.run(without, capture_output=True, text=True, env=environment)
    assert run.returncode == 1 and "no model 'mine_micro'" in run.stderr


def test_import_reaches_every_slot(here, capsys, monkeypatch, programs):
    """Parts, routers, tasks and callbacks of a user's module; the run asks for it again."""
    Path("mine_too.py").write_text(MINE.replace("mine", "mine_too"))
    monkeypatch.syspath_prepend(here)
    presets = {name: registry.get_preset(name) for name in registry.list_models()}
    monkeypatch.setattr(registry, "_presets", presets)  # what it registers ends with the test
    config = copy.deepcopy(MICRO)
    mixture = {"experts": 2, "top_k": 1, "router": {"class_path": "mine_too.Chooser"}}
    config["model"] |= {
        "mixer": {"class_path": "mine_too.Slow", "init_args": {"pace": 0.5}},
        "feed_forward": {"class_path": "MixtureOfExperts", "init_args": mixture},
    }
    config["data"]["class_path"] = "mine_too.Sums"
    config["trainer"]["callbacks"] = ["mine_too.Quiet"]
    Path("own.yaml").write_text(yaml.safe_dump(config))
    fit = ["fit", "--config", "own.yaml"]
    refused(capsys, fit, "own.yaml", "mine_too.", "--import mine_too")
    assert main([*fit, "--import", "mine_too"]) == 0
    kept = torch.load("runs/own/last.ckpt", weights_only=True)
    assert kept["hyper_parameters"]["mixer"]["class_path"] == "mine_too.Slow"
    assert kept["task"]["class_path"] == "mine_too.Sums"
    # Another process, which the run's own config.yaml does not make import anything.
    test = [programs / "python", "-m", "archzoo", "test", "--ckpt_path", "runs/own/last.ckpt"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(test, capture_output=True, text=True, env=environment)
    assert run.returncode == 1 and "--import mine_too" in run.stderr
    assert len(run.stderr.strip().splitlines()) == 1
    run = subprocess.run([*test, "--import", "mine_too"], capture_output=True, env=environment)
    assert run.returncode == 0


def test_where_import_may_stand():
    assert split_imports(["--import", "a", "fit", "--import=b.c", "x"]) == (
        ["a", "b.c"],
        ["fit", "x"],
    )
    assert split_imports(["generate", "--", "--import", "a"]) == (
        [],
        ["generate", "--", "--import", "a"],
    )
    for wrong in (["fit", "--import"], ["--import", "", "fit"], ["--import="]):
        with pytest.raises(ValueError, match="--import my_module"):
            split_imports(wrong)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("no_such_module", "No module named 'no_such_module'"),
        ("mine.py", "such as mine"),
        ("../mine", "is not a module's name"),
        ("broken", "ZeroDivisionError"),
    ],
)
def test_a_module_that_cannot_be_imported(here, capsys, name, expected):
    Path("broken.py").write_text("1 / 0")
    refused(capsys, ["--import", name, "list"], expected)


def test_entry_points_of_installed_packages_alone(here, monkeypatch):
    """A stranger's directory, current or on the path, may pretend to be an installed package."""
    for place in (here, here / "site"):
        info = place / "stranger-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[archzoo]\nstranger = evil\n")
    load_installed.cache_clear()
    load_installed()
    assert "evil" not in sys.modules
    (here / "site/installed.py").write_text("LOADED = True")
    (here / "site/stranger-1.0.dist-info/entry_points.txt").write_text("[archzoo]\na = installed\n")
    monkeypatch.setattr("site.getsitepackages", lambda: [str(here / "site")])
    monkeypatch.syspath_prepend(here / "site")
    load_installed.cache_clear()
    load_installed()
    assert sys.modules.pop("installed").LOADED
    load_installed.cache_clear()
