"""Classes of one's own wherever they are defined: in functions, notebooks, scripts, anew."""

import functools
import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import archzoo
from archzoo import trust
from archzoo.cli import main
from archzoo.parts import describe, find
from archzoo.tasks import Addition
from archzoo.tasks.stream import build

ROOT = Path(__file__).parent.parent


def mean_of(keep: float) -> type[archzoo.Mixer]:
    """A mixer, defined anew at every call, as a factory or a test does it."""

    class Mean(archzoo.Mixer):
        def __init__(self, dim: int, heads: int, *, slope: float = 1.0) -> None:
            super().__init__()
            self.value, self.slope = nn.Linear(dim, dim), slope
            self.register_buffer("keep", torch.tensor([round(100 * keep)]))

        def init_state(self, batch_size, *, capacity=None, device=None, dtype=None):
            shape = (batch_size, 1, self.value.in_features)
            dtype = torch.promote_types(dtype or torch.float32, torch.float32)
            return {"mean": torch.zeros(shape, device=device, dtype=dtype)}

        def step(self, x, state, context):
            mean = keep * state["mean"] + (1 - keep) * self.slope * self.value(x)
            return mean.to(x.dtype), {"mean": mean}

    return Mean


def keeps(model):
    return [block.mixer.keep.item() for block in model.blocks]


def test_classes_of_one_name_are_told_apart():
    first, second = mean_of(0.5), mean_of(0.9)
    names = [describe("mixer", part)["class_path"] for part in (first, second, first)]
    assert names[0] == names[2] != names[1]
    assert [find("mixer", name) for name in names] == [first, second, first]
    pattern = [functools.partial(first, slope=2.0), {"class_path": names[1]}]
    model = archzoo.create_model("retnet_micro", pattern=pattern)
    assert keeps(model) == [50, 90] and model.blocks[0].mixer.slope == 2.0
    assert keeps(archzoo.Decoder(**model.config)) == [50, 90]


def test_a_local_class_in_a_saved_model(tmp_path):
    """Found again for as long as it lives; then refused in one line."""
    part = mean_of(0.5)
    model = archzoo.create_model("retnet_micro", mixer=part).eval()
    with pytest.warns(UserWarning, match=r"Mean.* is defined in a function: .* top of a module"):
        archzoo.save_pretrained(tmp_path / "saved", model)
    again, _ = archzoo.from_pretrained(tmp_path / "saved")
    tokens = torch.randint(64, (2, 7))
    assert type(again.blocks[0].mixer) is part
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    code = f"import archzoo; archzoo.from_pretrained({str(tmp_path / 'saved')!r})"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert b"is defined in a function that has not run here: run it first" in run.stderr
    name = describe("mixer", part)["class_path"]
    del part, model, again
    gc.collect()
    with pytest.raises(ValueError, match="has not run here") as caught:
        find("mixer", name)
    assert "\n" not in str(caught.value)
    # Where the function has run, its class is found, though no one has handed it over.
    fresh = mean_of(0.9)
    assert find("mixer", name) is fresh
    assert type(archzoo.from_pretrained(tmp_path / "saved")[0].blocks[0].mixer) is fresh


def test_a_local_class_is_held_to_the_interface():
    assert archzoo.check(mean_of(0.5), show=False).passed
    assert archzoo.check(functools.partial(mean_of(0.5), slope=0.5), show=False).passed


def test_local_classes_of_other_slots():
    class Chooser(archzoo.LinearRouter):
        pass

    class Feed(archzoo.GatedFeedForward):
        pass

    mixture = {"class_path": "MixtureOfExperts", "init_args": {"router": Chooser, "experts": 3}}
    model = archzoo.create_model("retnet_micro", feed_forward=mixture)
    again = archzoo.Decoder(**model.config)
    assert {type(block.feed_forward.router) for block in again.blocks} == {Chooser}
    assert (
        type(archzoo.create_model("retnet_micro", feed_forward=Feed).blocks[0].feed_forward) is Feed
    )


class HandsOn(archzoo.LinearRouter):
    def __init__(self, dim: int, experts: int, top_k: int = 2, **options) -> None:
        super().__init__(dim, experts, top_k, **options)


def test_a_part_that_hands_options_on():
    spec = {"class_path": f"{__name__}.HandsOn", "init_args": {"score": "sigmoid"}}
    assert describe("router", spec)["init_args"] == {"score": "sigmoid"}
    assert archzoo.MixtureOfExperts(16, 8, router=spec).router.score == "sigmoid"
    with pytest.raises(ValueError, match="HandsOn has no argument 'scor'; nearest: score"):
        describe("router", functools.partial(HandsOn, scor="sigmoid"))


def test_a_class_that_is_defined_anew(monkeypatch):
    """As in a notebook: the name stands for the new one, and an old one is still itself."""
    here = sys.modules[__name__]
    old, new = mean_of(0.5), mean_of(0.9)
    for part in (old, new):
        part.__qualname__ = "Mean"
    monkeypatch.setattr(here, "Mean", old, raising=False)
    assert describe("mixer", old)["class_path"] == f"{__name__}.Mean"
    model = archzoo.create_model("retnet_micro", mixer=old)
    monkeypatch.setattr(here, "Mean", new, raising=False)
    assert describe("mixer", new)["class_path"] == f"{__name__}.Mean"
    assert keeps(archzoo.create_model("retnet_micro", mixer=new)) == [90, 90]
    assert keeps(archzoo.create_model("retnet_micro", mixer=old)) == [50, 50]
    assert keeps(archzoo.Decoder(**model.config)) == [90, 90]


def test_local_tasks():
    def task_of(held_out):
        class Sums(Addition):
            def __init__(self, digits: int = 2) -> None:
                super().__init__(digits=digits, held_out=held_out)

        return Sums

    first, second = task_of(3), task_of(5)
    configs = [task(1).config() for task in (first, second)]
    assert [build(config).held_out for config in configs] == [3, 5]


SCRIPT = """
import sys, torch, archzoo
from archzoo.tasks import Addition

class Slow(archzoo.Retention):
    pass

class Sums(Addition):
    pass

if __name__ == "__main__":
    task = Sums(digits=2)
    model = archzoo.create_model("retnet_micro", vocab_size=task.vocab_size, mixer=Slow)
    archzoo.save_pretrained("saved", model, task.tokenizer, task.config())
    again, _ = archzoo.from_pretrained("saved")
    assert type(again.blocks[0].mixer) is Slow
    print(again.config["mixer"]["class_path"], again.task["class_path"])
"""


def test_what_a_script_saves_is_found_where_the_script_is_imported(tmp_path, monkeypatch, capsys):
    (tmp_path / "my_script.py").write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    generate = ["generate", "saved", "1+1="]
    for way, name in ((["my_script.py"], "my_script"), (["-c", SCRIPT], "__main__")):
        done = subprocess.run([sys.executable, *way], capture_output=True, env=environment)
        assert (done.stdout.decode(), done.stderr) == (f"{name}.Slow {name}.Sums\n", b"")
        assert main(generate) == 1
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1
        if name == "my_script":
            assert "--import my_script" in error
            assert main([*generate, "--import", "my_script"]) == 0
            assert capsys.readouterr().out.startswith("1+1=")
            del sys.modules["my_script"]
        else:  # at a prompt or in a notebook there is no such name
            assert "was defined in a notebook or a prompt" in error


def test_a_name_of_a_function_s_class_runs_nothing():
    for name in ("os.system.<locals>.Mean", "evil.make.<locals>.Mean", "<locals>", ".<locals>."):
        with pytest.raises(ValueError, match="mixer"):
            find("mixer", name)
    local = describe("mixer", part := mean_of(0.5))["class_path"]
    assert trust.find_class(local, archzoo.Mixer) is part
    with pytest.raises(ValueError, match="is not a Router"):
        trust.find_class(local, archzoo.Router)
