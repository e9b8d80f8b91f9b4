"""`archzoo adapter`, and what `generate` and `show` do with adapters."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from torch import nn

import archzoo
from archzoo.adapters.attach import adapter_modules
from archzoo.checkpoint import load
from archzoo.cli import main
from archzoo.contract.measure import relative_error
from archzoo.decoder import Decoder
from archzoo.parts import named_adapters
from archzoo.tasks import Addition

TOKENS = torch.randint(14, (2, 9), generator=torch.Generator().manual_seed(0))


def scrambled(net: Decoder) -> Decoder:
    """With adapters that have learned something."""
    for _, module in adapter_modules(net):
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.3)
    return net


def logits(net: Decoder) -> torch.Tensor:
    with torch.no_grad():
        return net.eval()(TOKENS).logits


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole mixture of experts in `base`, and an adapter of it in `sums`, in float64."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    task = Addition(digits=1)
    net = archzoo.create_model("skywork_micro", vocab_size=task.vocab_size).double()
    archzoo.save_pretrained("base", net, task.tokenizer, task.config())
    lora = archzoo.LoRA(rank=2, targets=["mixer.query", "mixer.value", "experts.down"])
    archzoo.save_adapter("sums", scrambled(archzoo.adapt(load("base").model, lora)))


def fails(capsys: pytest.CaptureFixture[str], arguments: str, *said: str) -> None:
    capsys.readouterr()
    assert main(arguments.split()) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert all(text in error for text in said), error


@pytest.mark.usefixtures("here")
def test_merging_gives_a_plain_model_that_computes_the_same(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["adapter", "merge", "sums", "--out", "merged"]) == 0
    assert "with LoRA of 2,816 parameters in 6 places" in capsys.readouterr().out
    found, whole = load("merged"), load("sums")
    assert not named_adapters(found.model.config) and not list(adapter_modules(found.model))
    assert found.model.state_dict().keys() == load("base").model.state_dict().keys()
    assert relative_error(logits(found.model), logits(whole.model)) < 1e-12
    assert relative_error(logits(found.model), logits(load("base").model)) > 1e-3
    assert found.tokenizer is not None and found.task == whole.task
    fails(capsys, "adapter merge sums --out merged", "merged exists: name a directory")
    fails(capsys, "adapter merge sums", "where is the model written?", "--out DIR")
    fails(capsys, "adapter merge merged --out again", "merged has no adapter: it is merged")
    fails(capsys, "adapter marge sums", "'marge' of archzoo adapter; nearest: merge")
    assert main(["adapter"]) == 2
    assert main(["adapter", "--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"  {name} " in said for name in ("save", "merge", "export", "import"))


@pytest.mark.usefixtures("here")
def test_what_cannot_be_merged_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    net = archzoo.adapt(load("base").model, {"a": archzoo.LoRA(), "b": archzoo.MoLoRA()})
    archzoo.save_pretrained("several", net, load("base").tokenizer)
    where = "MoLoRA at blocks.0.mixer.query_key_value.query cannot be merged"
    fails(capsys, "adapter merge several --out merged", where, "archzoo adapter save")
    assert not Path("merged").exists()
    # Nor is it exported after a merge that there cannot be.
    fails(capsys, "export several model.py", "a model with MoLoRA is not exported: it cannot be")
    assert not Path("model.py").exists()


@pytest.mark.usefixtures("here")
def test_a_base_that_moved_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    Path("base").rename("moved")
    fails(capsys, "adapter merge sums --out merged", "'base' is not there", "--base PLACE")
    assert main(["adapter", "merge", "sums", "--out", "merged", "--base", "moved"]) == 0
    assert main(["show", "sums", "--base", "moved"]) == 0
    assert main(["generate", "sums", "1+2=", "--max_tokens", "1", "--base", "moved"]) == 0


@pytest.mark.usefixtures("here")
def test_the_adapters_of_a_model_are_saved_one_a_directory(
    capsys: pytest.CaptureFixture[str],
) -> None:
    net = load("base").model
    archzoo.adapt(net, {"a": archzoo.LoRA(rank=1), "b": archzoo.IA3()})
    net = scrambled(net)
    archzoo.save_pretrained("several", net, load("base").tokenizer)
    assert main(["adapter", "save", "several", "--out", "both"]) == 0
    assert main(["adapter", "save", "several", "--out", "one", "--name", "b"]) == 0
    said = capsys.readouterr().out
    assert "both/a: LoRA of 256 parameters in 4 places" in said and "one: IA3 of" in said
    again = load("base").model
    for path in ("both/a", "both/b"):
        archzoo.load_adapter(path, again, path[-1])
    assert torch.equal(logits(again), logits(net))
    fails(capsys, "adapter save several --out c --name c", "there is no adapter 'c'")
    fails(capsys, "adapter export several --out c", "adapters a, b: name", "as --name a")
    fails(capsys, "adapter save base --out c", "base has no adapter")
    # `generate` puts them on one after the other.
    assert main(["generate", "several", "1+2=", "--max_tokens", "3"]) == 0
    expected = capsys.readouterr().out.partition("\n")[0]
    of_both = "generate base 1+2= --max_tokens 3 --adapter both/a --adapter=both/b"
    assert main(of_both.split()) == 0
    assert capsys.readouterr().out.partition("\n")[0] == expected
    fails(capsys, "generate base 1+2= --adapter", "--adapter needs a value")
    fails(capsys, "generate base 1+2= --adapter base", "base holds no adapter.json")
    fails(capsys, "generate base 1+2= --adapter both", "those of several: give both/a or both/b")
    fails(capsys, "generate base 1+2= --adapter both/a --adapter ./both/a", "is given twice")
    fails(capsys, "generate sums 1+2= --adapter sums", "the adapter sums is given twice")
    # Nor is a run given the adapter that was saved of it.
    Path("both/b").rename("c")
    doubled = "c: the model has this adapter already, by the name 'b'"
    fails(capsys, "generate several 1+2= --adapter c", doubled)
    fails(capsys, "generate base 1+2= --adapter none", "there is no directory none: give one of")
    Path("run").mkdir()
    torch.save({}, "run/last.ckpt")
    for path in ("run", "run/last.ckpt"):
        says = f"{path} is a checkpoint and no adapter alone: archzoo adapter save {path} --out DIR"
        fails(capsys, f"generate base 1+2= --adapter {path}", says)


@pytest.mark.usefixtures("here")
def test_generate_writes_with_an_adapter(capsys: pytest.CaptureFixture[str]) -> None:
    prompts = [f"{n}+3=" for n in range(10)]
    net, tokenizer = archzoo.from_pretrained("sums")
    texts = archzoo.generate(net, prompts, tokenizer=tokenizer, max_tokens=4).texts
    assert texts is not None
    expected = [prompt + text for prompt, text in zip(prompts, texts, strict=True)]
    for source in (["base", "--adapter", "sums"], ["sums"]):
        assert main(["generate", source[0], *prompts, *source[1:], "--max_tokens=4"]) == 0
        assert capsys.readouterr().out.splitlines()[:10] == expected
    plain, _ = archzoo.from_pretrained("base")
    assert archzoo.generate(plain, prompts, tokenizer=tokenizer, max_tokens=4).texts != texts


@pytest.mark.usefixtures("here")
def test_show_says_what_is_trained_and_where(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "sums"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    net = load("sums").model
    assert f"in all {net.parameter_count():,}" in lines
    assert f"of which trainable 2,816 {2816 / net.parameter_count():.1%}" in lines
    targets = "mixer.query, mixer.value, experts.down"
    assert any(line.startswith("default LoRA (rank: 2") and targets in line for line in lines)
    lora = archzoo.LoRA(rank=1, targets=["head"])
    ia3 = archzoo.IA3(layers=[1])
    archzoo.save_pretrained("two", archzoo.adapt(load("base").model, {"top": lora, "in": ia3}))
    assert main(["show", "two"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert any(line.startswith("top LoRA") and line.endswith("head.head") for line in lines)
    assert any(line.startswith("in IA3") and line.endswith("in block 1") for line in lines)


@pytest.mark.usefixtures("here")
def test_pefts_files_are_written_and_read(capsys: pytest.CaptureFixture[str]) -> None:
    lora = archzoo.LoRA(rank=2, targets=["query", "value"])
    net = scrambled(archzoo.adapt(load("base").model, lora))
    archzoo.save_adapter("own", net)
    assert main(["adapter", "export", "own", "--to", "peft", "--out", "peft"]) == 0
    assert main(["adapter", "import", "peft", "--base", "base", "--out", "back"]) == 0
    assert "back: LoRA of" in capsys.readouterr().out
    assert relative_error(logits(load("back").model), logits(net)) < 1e-12
    fails(capsys, "adapter export sums --to peft --out other", "is not exported to peft")
    fails(capsys, "adapter export own --to spoon --out other", "to: 'spoon' is not one of 'peft'")
    fails(capsys, "adapter export own --to peft --out peft", "peft exists")
    fails(capsys, "generate base 1+2= --adapter peft", "archzoo adapter import peft --base")
    fails(capsys, "adapter import own --base base --out other", "is an adapter of archzoo")
    fails(capsys, "adapter import none --base base --out other", "there is no directory none")
    fails(capsys, "adapter import peft --out other", "which model", "--base CHECKPOINT")
    assert not Path("other").exists()


def test_the_commands_of_the_documentation_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In order, with two steps of training; and what they print is of the form that is shown."""
    page = (Path(__file__).parent.parent / "docs" / "adapters.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    short = ["--trainer.max_steps=2", "--trainer.accelerator=cpu", "--data.batch_size=4"]
    said = ""
    for language, block in re.findall(r"^```(bash|python)\n(.*?)^```", page, re.M | re.S):
        if language == "python":
            exec(compile(block, "adapters.md", "exec"), {})
            continue
        for line in block.splitlines():
            program, *words = shlex.split(line)
            assert program == "archzoo"
            assert main([*words, *(short if words[0] == "fit" else ())]) == 0, line
        said += capsys.readouterr().out
    shown = [
        line
        for block in re.findall(r"^```text\n(.*?)^```", page, re.M | re.S)
        for line in block.splitlines()
        if line.strip() not in ("", "...") and "error:" not in line
    ]
    said = " ".join(said.split())
    assert not [line for line in shown if " ".join(line.split()) not in said]
    assert (
        Path("runs/adder/last.ckpt").stat().st_size
        > 10 * Path("runs/minus/last.ckpt").stat().st_size
    )
