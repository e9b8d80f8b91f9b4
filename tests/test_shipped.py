"""`archzoo fit NAME`, `archzoo new`, and the files that come with the package, from any place."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from archzoo import shipped
from archzoo.cli import main

ROOT = Path(__file__).resolve().parent.parent
FEW = [
    "--model.preset",
    "retnet_micro",
    "--trainer.max_steps",
    "2",
    "--trainer.limit_val_batches",
    "1",
]
FEW += ["--trainer.val_check_interval", "2"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory, in which the test runs."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_fit_takes_the_name_of_a_configuration() -> None:
    assert main(["fit", "addition", *FEW]) == 0
    written = yaml.safe_load(Path("runs/addition/config.yaml").read_text())
    assert written["data"]["class_path"] == "archzoo.tasks.Addition"
    assert written["model"]["weight_decay"] == 0.3
    # What it was given is remembered: it resumes as it began.
    assert main(["fit", "addition", *FEW, "--resume", "auto", "--trainer.max_steps", "3"]) == 0


def test_a_file_of_that_name_wins() -> None:
    Path("addition").write_text("data: {class_path: Addition, init_args: {digits: 1}}\n")
    assert main(["fit", "addition", *FEW, "--name", "mine"]) == 0
    written = yaml.safe_load(Path("runs/mine/config.yaml").read_text())
    assert written["data"]["init_args"]["digits"] == 1


def test_a_shipped_text_is_read_where_there_is_none_of_that_path() -> None:
    assert main(["fit", "text", *FEW, "--data.cache_dir", "cache"]) == 0
    written = yaml.safe_load(Path("runs/text/config.yaml").read_text())
    assert written["data"]["init_args"]["path"] == "data/shakespeare.txt"  # for any machine
    Path("data").mkdir()
    Path("data/shakespeare.txt").write_text("mine")
    assert shipped.text("data/shakespeare.txt") == "data/shakespeare.txt"


@pytest.mark.parametrize(
    "path", ["data/../pyproject.toml", "../x.txt", "/data/x", "x.txt", "data/no"]
)
def test_no_other_path_leads_into_the_package(path: str) -> None:
    assert shipped.text(path) == path


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fit", "additoin"], ["no file additoin", "nearest: addition"]),
        (
            ["fit", "--config", "configs/addition.yaml"],
            ["configs/addition.yaml", "archzoo fit addition"],
        ),
        (["new", "there"], ["there exists", "new directory"]),
        (["new", "here", "--config", "nothing"], ["no file nothing"]),
        (["new", "here", "--config", "latin.yaml"], ["latin.yaml is not UTF-8"]),
        (["new", "latin.yaml/here"], ["latin.yaml/here cannot be made", "another place"]),
    ],
)
def test_mistakes_get_one_line(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("there").mkdir()
    Path("latin.yaml").write_bytes(b"\xe9")
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert [word for word in words if word not in error] == []
    assert not Path("here").exists()


def test_every_configuration_goes_by_its_name() -> None:
    names = shipped.configurations()
    assert {"addition", "text", "demo", "claims/retnet"} <= names.keys()
    for name, path in names.items():
        assert shipped.configuration(name) == path == shipped.configuration(f"configs/{name}.yaml")


def test_list_shows_every_configuration_and_what_it_is_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["list", "--configurations"]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    for (name, path), line in zip(shipped.configurations().items(), lines[1:], strict=True):
        said = shipped.about(path)
        assert line.split(maxsplit=1) == [name, said], "as many lines, each whole"
        assert re.fullmatch(r"[A-Z].*[^.:?][.?]", said), said
    assert main(["list", "claims/re*", "--configurations", "--markdown"]) == 0
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.split()[1] for row in rows] == [
        "claims/recall",
        "claims/retnet",
        "claims/retnet_recall",
    ]
    assert rows[0] == "| claims/recall | How much can a mixer recall? |"


def test_the_page_for_beginners_names_every_configuration() -> None:
    page = (ROOT / "docs" / "start.md").read_text(encoding="utf-8")
    plain = {name for name in shipped.configurations() if "/" not in name}
    rooms = {name.split("/")[0] for name in shipped.configurations() if "/" in name}
    assert [name for name in sorted(plain) if f"`{name}`" not in page] == []
    assert [room for room in sorted(rooms) if f"`{room}/" not in page] == []


def test_a_new_directory_s_comments_name_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    for name in shipped.configurations():
        place = Path(name.replace("/", "_"))
        assert main(["new", str(place), "--config", name]) == 0
        written = place / f"{Path(name).name}.yaml"
        told = " ".join(line for line in written.read_text().splitlines() if line[:4] == "#   ")
        for given in re.findall(r"(?:--config|archzoo compare) ([^ ]+)", told):
            assert (place / given).is_file() or given in shipped.configurations(), (name, given)


def test_a_new_directory_holds_what_is_trained_first() -> None:
    assert main(["new", "mine", "--config", "claims/preferences"]) == 0
    held = {path.name: path.read_text() for path in Path("mine").glob("*.yaml")}
    assert set(held) == {"preferences.yaml", "sft.yaml", "reward.yaml", "adder_retention.yaml"}
    assert "  base: sft.yaml #" in held["preferences.yaml"]
    assert "model.reward_model: reward.yaml}" in held["preferences.yaml"]
    assert "  base: adder_retention.yaml #" in held["sft.yaml"]
    assert main(["new", "other", "--config", "claims/merging/drop"]) == 0
    assert Path("other/experts.yaml").is_file() and Path("other/both.yaml").is_file()


def test_a_new_directory_holds_what_its_commands_take(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["new", "mine", "--config", "addition"]) == 0
    assert sorted(os.listdir("mine")) == ["README.md", "addition.yaml", "my_parts.py"]
    assert "archzoo fit addition.yaml" in capsys.readouterr().out
    monkeypatch.chdir("mine")
    monkeypatch.syspath_prepend(os.getcwd())
    assert main(["check", "my_parts.FadingMemory", "--import", "my_parts"]) == 0
    own = ["--import", "my_parts", "--name", "mine", "--model.mixer", "FadingMemory"]
    assert main(["fit", "addition.yaml", *own, "--model.match", "parameters", *FEW]) == 0
    lines = Path("README.md").read_text().splitlines()
    assert f"archzoo fit addition.yaml {' '.join(own)} --model.match parameters" in lines
    sys.modules.pop("my_parts")


def build(place: Path, source: Path) -> Path:
    """The wheel that pip builds of a checkout; hatchling comes from the package index."""
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", str(place)]
    subprocess.run([*pip, str(source)], check=True)
    return next(place.glob("*.whl"))


@pytest.mark.slow
def test_a_wheel_trains_in_an_environment_of_its_own(elsewhere: Path) -> None:
    """A minute. What it depends on is read from this environment; archzoo is the wheel's."""
    wheel = build(elsewhere / "built", ROOT)
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    shipped_names = {name for name in names if name.startswith("archzoo/shipped/")}
    expected = [*(ROOT / "configs").rglob("*.yaml"), *(ROOT / "data").glob("*.txt")]
    expected.append(ROOT / "data" / "README.md")
    assert shipped_names == {
        f"archzoo/shipped/{file.relative_to(ROOT).as_posix()}" for file in expected
    }
    assert sum(info.file_size for info in zipfile.ZipFile(wheel).infolist()) < 8_000_000
    subprocess.run([sys.executable, "-m", "venv", "fresh"], check=True)
    site = next(Path("fresh/lib").glob("python*")) / "site-packages"
    (site / "ours.pth").write_text(next(p for p in sys.path if p.endswith("site-packages")) + "\n")
    python = str(elsewhere / "fresh/bin/python")
    pip = [python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--ignore-installed"]
    subprocess.run([*pip, str(wheel)], check=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = {"check": True, "cwd": elsewhere / "empty", "env": environment}
    (elsewhere / "empty").mkdir()
    archzoo = str(elsewhere / "fresh/bin/archzoo")
    where = "import archzoo; print(archzoo.__file__)"
    found = subprocess.run([python, "-c", where], capture_output=True, text=True, **run).stdout
    assert Path(found).is_relative_to(elsewhere / "fresh")
    subprocess.run([archzoo, "fit", "addition", *FEW], **run)
    subprocess.run([archzoo, "test", "--ckpt_path", "runs/addition/last.ckpt"], **run)
    subprocess.run([archzoo, "fit", "text", *FEW, "--data.cache_dir", "cache"], **run)
    subprocess.run([archzoo, "new", "mine"], **run)
