"""Merging: the papers' formulas by golden numbers, and files that belong together."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from families import micro
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import archzoo
from archzoo.checkpoint import load, weights_digest
from archzoo.cli import main
from archzoo.contract import relative_error
from archzoo.conversion.merge import (
    Merge,
    Merger,
    drop,
    elect_and_merge,
    kept_count,
    linear,
    mask_of,
    merge,
    slerp,
    trim,
)
from archzoo.tasks import Addition, Subtraction
from archzoo.tasks.tokenizers import CharacterTokenizer

GOLDEN = Path(__file__).parent / "golden" / "adaptation_merges.safetensors"


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN)


@pytest.fixture(scope="module")
def weights() -> list[float]:
    with safe_open(GOLDEN, "pt") as file:
        return [json.loads(file.metadata()["weights"])[name] for name in "abc"]


@pytest.fixture
def models(golden: dict[str, Tensor]) -> list[Tensor]:
    return [golden[f"model.{name}"] for name in "abc"]


@pytest.fixture
def deltas(golden: dict[str, Tensor], models: list[Tensor]) -> list[Tensor]:
    return [model - golden["model.base"] for model in models]


# ---------------------------------------------------------------------------- golden numbers


def test_linear_and_task_arithmetic_are_mergekits(golden, models, deltas, weights):
    base = golden["model.base"]
    for made, name in (
        (linear(models, weights), "linear"),
        (linear(models, weights, normalize=False), "linear.not_normalized"),
        (base + linear(deltas, weights, normalize=False), "task_arithmetic"),
        (base + 0.6 * linear(deltas, weights, normalize=False), "task_arithmetic.lambda"),
        (base + linear(deltas, weights), "task_arithmetic.normalize"),
    ):
        assert relative_error(made, golden[name]) < 1e-12, name


def test_slerp_is_mergekits(golden, models):
    first, second = models[:2]
    for t in (0.0, 0.25, 0.5, 1.0):
        assert relative_error(slerp(first, second, t), golden[f"slerp.t{t}"]) < 1e-12
    assert torch.allclose(slerp(first, second, 0), first, rtol=1e-15)
    near = slerp(first, golden["slerp_near.v1"], 0.3)
    assert relative_error(near, golden["slerp_near.t0.3"]) < 1e-12
    assert torch.equal(near, torch.lerp(first, golden["slerp_near.v1"], 0.3)), "a straight line"
    one, other = torch.eye(4).double()[:2] * torch.tensor([[2.0], [3.0]]).double()
    assert relative_error(slerp(one, other, 0.5), golden["slerp_orthogonal.t0.5"]) < 1e-12


def test_slerp_of_what_has_no_angle_is_the_straight_line():
    a = torch.randn(5, 3).double()
    for other in (torch.zeros_like(a), -a, 3 * a):
        assert torch.equal(slerp(a, other, 0.25), torch.lerp(a, other, 0.25))


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_ties_of_one_tensor_is_mergekits(golden, deltas, weights, density):
    kept = [trim(delta, kept_count(delta.numel(), density)) for delta in deltas]
    made = golden["model.base"] + elect_and_merge(kept, weights)
    assert relative_error(made, golden[f"ties.density{density}"]) < 1e-12
    if density == 0.5:
        made = golden["model.base"] + elect_and_merge(kept, weights, normalize=False)
        assert relative_error(made, golden["ties.density0.5.not_normalized"]) < 1e-12


def ties_of_the_model(golden: dict[str, Tensor], density: float) -> dict[str, Tensor]:
    parts = {"first": "model", "second": "model2"}
    held = {
        name: {part: golden[f"{prefix}.{name}"] for part, prefix in parts.items()}
        for name in ("a", "b", "c", "base")
    }
    sizes = {part: tensor.numel() for part, tensor in held["base"].items()}
    reads = [held[name].__getitem__ for name in "abc"]
    merger = Merger(Merge("ties", density=density), reads, held["base"].__getitem__, sizes)
    return {part: merger(part) for part in parts}


@pytest.mark.parametrize("dropped", [0.5, 0.8])
def test_ties_of_a_model_is_mergelms_which_keeps_one_more(golden, dropped):
    """Algorithm 1 trims the whole model's vector. MergeLM keeps one entry more than it is told."""
    count = sum(golden[f"{name}.a"].numel() for name in ("model", "model2"))
    keep = count - int(count * dropped)
    wanted = {part: golden[f"mergelm.ties_mask{dropped}.{part}"] for part in ("first", "second")}
    one_more = ties_of_the_model(golden, (keep + 1) / count)
    assert all(relative_error(one_more[part], wanted[part]) < 1e-12 for part in wanted)
    as_told = ties_of_the_model(golden, keep / count)
    differ = sum(int(((as_told[p] - wanted[p]).abs() > 1e-9).sum()) for p in wanted)
    assert 0 < differ <= 3, "an entry of each model at most"


@pytest.mark.parametrize("rate", [0.3, 0.9])
@pytest.mark.parametrize("part", ["first", "second"])
def test_dare_is_mergelms(golden, rate, part):
    prefix = {"first": "model", "second": "model2"}[part]
    base = golden[f"{prefix}.base"]
    for rescale, name in ((True, "rescaled"), (False, "plain")):
        kept = [
            drop(
                golden[f"{prefix}.{k}"] - base,
                1 - rate,
                golden[f"mergelm.dare{rate}.drop.{k}.{part}"] == 0,
                rescale,
            )
            for k in "ab"
        ]
        made = base + linear(kept, [1, 1], normalize=False)
        wanted = golden[f"mergelm.dare{rate}_{name}_task_arithmetic.{part}"]
        assert relative_error(made, wanted) < 1e-12


@pytest.mark.parametrize("density", [0.3, 0.7])
def test_dare_differs_from_mergekits_by_its_factor_alone(golden, deltas, weights, density):
    """The paper divides by the density, mergekit keeps each tensor's L1 norm."""
    base = golden["model.base"]
    for name, combine in (("linear", linear), ("ties", elect_and_merge)):
        masks = [golden[f"dare_{name}.density{density}.mask.{k}"] == 1 for k in "abc"]
        plain = [drop(d, density, m, False) for d, m in zip(deltas, masks, strict=True)]
        made = base + combine(plain, weights, normalize=False)
        wanted = golden[f"dare_{name}.density{density}.not_rescaled"]
        assert relative_error(made, wanted) < 1e-6  # its deltas are float32
        factors = [d.abs().sum() / p.abs().sum() for d, p in zip(deltas, plain, strict=True)]
        theirs = [factor * p for factor, p in zip(factors, plain, strict=True)]
        wanted = golden[f"dare_{name}.density{density}.rescaled_l1"]
        assert relative_error(base + combine(theirs, weights, normalize=False), wanted) < 1e-6
        ours = [drop(d, density, m) for d, m in zip(deltas, masks, strict=True)]
        assert all(torch.equal(o, p / density) for o, p in zip(ours, plain, strict=True))
        assert relative_error(base + combine(ours, weights, normalize=False), wanted) > 1e-3
        assert min(abs(float(factor) * density - 1) for factor in factors) > 0.01


# ---------------------------------------------------------------------------- definitions


def test_dare_is_the_change_in_expectation():
    delta, density, rounds = torch.randn(6, 5).double(), 0.3, 10_000
    masks = torch.stack([mask_of(seed, 0, "w", delta.shape, density) for seed in range(rounds)])
    mean = (masks * delta / density).mean(dim=0)
    deviation = delta.abs() * math.sqrt((1 - density) / density / rounds)
    assert ((mean - delta).abs() < 5 * deviation).all()
    assert not torch.equal(masks[0], mask_of(0, 1, "w", delta.shape, density))
    assert not torch.equal(masks[0], mask_of(0, 0, "v", delta.shape, density))
    assert torch.equal(masks[0], mask_of(0, 0, "w", delta.shape, density))


def test_trim_keeps_just_as_many_and_of_equal_ones_the_first():
    delta = torch.tensor([1.0, -1, 1, -3, 0, 1]).double()
    assert trim(delta, 3).tolist() == [1, -1, 0, -3, 0, 0]
    model = {"a": delta, "b": torch.tensor([[1.0, 2], [-1, 0.5]]).double()}
    base = {name: torch.zeros_like(tensor) for name, tensor in model.items()}
    sizes = {name: tensor.numel() for name, tensor in model.items()}
    merger = Merger(Merge("ties", density=0.6), [model.__getitem__], base.__getitem__, sizes)
    kept = torch.cat([merger(name).flatten() for name in ("b", "a")])
    assert int((kept != 0).sum()) == kept_count(10, 0.6) == 6
    assert kept.tolist() == [0, 2, 0, 0, 1, -1, 1, -3, 0, 1], "2 and 3, and four 1s of a"


def test_where_changes_cancel_no_sign_is_elected():
    """mergekit elects + there, MergeLM the sign that most entries of the model have."""
    deltas = [torch.tensor([1.0, 2, -1, 0]), torch.tensor([-1.0, 1, -4, 0]), torch.zeros(4)]
    assert elect_and_merge(deltas, [1, 1, 1]).tolist() == [0, 1.5, -2.5, 0]
    assert elect_and_merge(deltas, [3, 1, 1]).tolist() == [1, 1.75, -1.75, 0]


def test_a_stack_is_merged_expert_by_expert():
    held = [{"w": torch.randn(3, 4, 5).double()} for _ in range(3)]
    for how in (Merge("slerp", (3, 1)), Merge("ties", density=0.3, trim="tensor")):
        models = held[1:]
        base = held[0].__getitem__ if how.method == "ties" else None
        reads = [model.__getitem__ for model in models]
        whole = Merger(how, reads, base, {"w": 60}, frozenset({"w"}))("w")
        for expert in range(3):
            slices = [lambda _, m=m, e=expert: m["w"][e] for m in models]
            start = None if base is None else lambda _, e=expert: held[0]["w"][e]
            assert torch.equal(Merger(how, slices, start, {"w": 20})("w"), whole[expert])
        assert not torch.equal(Merger(how, reads, base, {"w": 60})("w"), whole)


def family(name: str, count: int = 2, scale: float = 0.1, **options) -> list[archzoo.Decoder]:
    """A model, and some that are near it."""
    base = micro(name, init_std=0.2, **options).double()
    models = [base]
    for _ in range(count):
        model = micro(name, init_std=0.2, **options).double()
        model.load_state_dict(base.state_dict())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += scale * torch.randn_like(parameter)
        models.append(model)
    return models


@pytest.mark.parametrize("name", archzoo.list_models("*_micro"))
def test_every_family_can_be_merged(name):
    base, a, b = family(name, tie_weights=True)
    for method, density in (("linear", None), ("slerp", None), ("ties", 0.3), ("dare", 0.3)):
        origin = base if method in ("ties", "dare") else None
        same = merge([a, a], origin, method=method, density=1.0 if density else None)
        if method == "dare":  # twice the change
            twice = {n: 2 * w - base.state_dict()[n] for n, w in a.state_dict().items()}
            assert all(torch.allclose(w, twice[n]) for n, w in same.state_dict().items())
        else:
            wanted = a.state_dict()
            assert all(torch.allclose(w, wanted[n]) for n, w in same.state_dict().items())
        made = merge([a, b], origin, method=method, density=density)
        assert made.head.weight is made.embedding.weight if made.tie_weights else True
        tokens = torch.randint(64, (1, 12))
        assert torch.isfinite(made(tokens).logits).all()
        assert relative_error(made(tokens).logits, a(tokens).logits) > 1e-3


def test_the_ends_of_the_formulas_are_the_models():
    base, a, b = family("transformer_micro")
    wanted = b.state_dict()
    for settings in (
        {"weights": (0, 1)},
        {"method": "slerp", "weights": (0, 1)},
        {"method": "task_arithmetic", "weights": (0, 1)},
        {"method": "ties", "density": 1.0, "weights": (0, 1)},
        {"method": "dare_ties", "density": 1.0, "weights": (0, 1)},
        {"method": "dare_linear", "density": 1.0, "weights": (0, 1)},
    ):
        origin = base if settings.get("method", "slerp") != "slerp" else None
        made = merge([a, b], origin, **settings).state_dict()
        assert all(torch.allclose(made[name], w, atol=1e-14) for name, w in wanted.items()), (
            settings
        )
    same = merge([a], base, method="task_arithmetic", scale=0.0).state_dict()
    assert all(torch.equal(same[name], w) for name, w in base.state_dict().items())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "mean"}, "'mean' is not one of linear"),
        ({"density": 0.5}, "means nothing to linear"),
        ({"method": "dare"}, "dare needs a density"),
        ({"method": "dare", "density": 0.0}, "density=0.0 is the share"),
        ({"method": "ties", "density": 1.5}, "at most 1"),
        ({"method": "ties", "density": math.nan}, "density=nan"),
        ({"weights": (1, -1)}, "sum to 0"),
        ({"weights": (1, math.inf)}, "not all finite"),
        ({"method": "ties", "weights": (1, -1)}, "at least 0"),
        ({"weights": (1, 1, 1)}, "3 weights are given for 2 models"),
        ({"scale": 0.3}, "means nothing to linear"),
        ({"method": "ties", "scale": math.nan}, "scale=nan is not finite"),
        ({"method": "ties"}, "--base CHECKPOINT"),
        ({"method": "ties", "trim": "layer"}, "neither model nor tensor"),
        ({"method": "dare", "density": 0.5, "trim": "tensor"}, "means nothing to dare: it is for"),
        ({"rescale": False}, "rescale=False means nothing to linear: it is for dare"),
        ({"method": "slerp", "normalize": True}, "normalize=True means nothing to slerp"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, words):
    _, a, b = family("transformer_micro")
    with pytest.raises(ValueError, match=words):
        merge([a, b], None, **settings)


def test_models_that_differ_are_refused_in_memory():
    a, other = micro("transformer_micro"), micro("transformer_micro", depth=1)
    with pytest.raises(ValueError, match="not the same weight"):
        merge([a, other])
    with pytest.raises(ValueError, match="models differ in norm_eps"):
        merge([a, micro("transformer_micro", norm_eps=1e-5)])
    with pytest.raises(ValueError, match="takes two models or more, and 1 is given"):
        merge([a])
    with pytest.raises(ValueError, match="slerp goes from one model to another, and 3"):
        merge([a, a, a], method="slerp")


# ---------------------------------------------------------------------------- files


def fails(capsys: pytest.CaptureFixture[str], line: str, *words: str) -> None:
    """A command is refused with these words, and nothing is written."""
    capsys.readouterr()
    before = sorted(map(str, Path().rglob("*")))
    assert main(line.split()) == 1
    said = capsys.readouterr()
    assert all(word in said.err for word in words), said.err
    assert said.err.count("\n") == 1 and said.err.startswith("error: ")
    assert sorted(map(str, Path().rglob("*"))) == before


def works(line: str) -> None:
    assert main(line.split()) == 0


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A base with a tied head, models that record it as their beginning, and strangers."""
    monkeypatch.chdir(tmp_path)
    task = Addition(digits=1, vocabulary="shared")
    task.prepare()
    sizes = {"vocab_size": task.vocab_size, "tie_weights": True}
    base, a, b = family("transformer_micro", **sizes)
    archzoo.save_pretrained("base", base, task.tokenizer, task.config())
    digest = weights_digest(base.state_dict())
    for name, model in (("a", a), ("b", b)):
        archzoo.save_pretrained(f"{name}_silent", model, task.tokenizer, task.config())
        model.base = digest
        own = Subtraction(digits=1, vocabulary="shared") if name == "b" else task
        archzoo.save_pretrained(name, model, task.tokenizer, own.config())
    stranger = micro("transformer_micro", **sizes).double()
    archzoo.save_pretrained("elsewhere", stranger, task.tokenizer)
    stranger.base = weights_digest(stranger.state_dict())
    archzoo.save_pretrained("stranger", stranger, task.tokenizer)


@pytest.mark.usefixtures("here")
def test_the_command_writes_the_merge_and_its_record(capsys):
    line = "merge a b --out merged --base base --method ties --weights 1 0.5 --density 0.3"
    assert main([*line.split(), "--scale", "0.7"]) == 0
    said = capsys.readouterr().out
    assert "ties of 1 a + 0.5 b" in said and "Addition and Subtraction" in said
    base, a, b = (load(name).model for name in ("base", "a", "b"))
    found = load("merged")
    weights = {"weights": (1, 0.5), "density": 0.3, "scale": 0.7}
    wanted = merge([a, b], base, method="ties", **weights).state_dict()
    assert all(torch.equal(w, wanted[name]) for name, w in found.model.state_dict().items())
    assert found.model.head.weight is found.model.embedding.weight
    assert found.model.dtype == torch.float64
    assert found.tokenizer.files() == load("a").tokenizer.files()
    assert found.model.base == a.base == weights_digest(base.state_dict())
    record = found.model.merged
    assert record["method"] == "ties" and record["weights"] == [1, 0.5] and record["scale"] == 0.7
    assert [model["path"] for model in record["models"]] == ["a", "b"]
    assert record["models"][0]["digest"] == weights_digest(a.state_dict())
    assert record["base"] == {"path": "base", "digest": a.base}
    archzoo.save_pretrained("again", found.model)
    assert load("again").model.merged == record
    assert main(["show", "again"]) == 0
    assert f"made of other models: {json.dumps(record)}" in capsys.readouterr().out
    assert main(["generate", "merged", "5-3=", "--max_tokens", "2"]) == 0
    works("binarise merged --out binary --method OneBit")
    works("binarise binary --out packed --packed")
    works("upcycle merged --out mixture")
    for name in ("binary", "packed", "mixture"):
        assert load(name).model.merged == record, name
    # A merge began where its models did, so it can be merged again, and with its base too.
    works("merge merged a base --out more")
    fails(capsys, "merge a b --out merged", "merged exists: name a directory")
    fails(capsys, "merge a b", "--out DIR")


@pytest.mark.usefixtures("here")
def test_models_of_another_ancestor_are_refused_by_both_digests(capsys):
    digests = {name: weights_digest(load(name).model.state_dict()) for name in ("base", "stranger")}
    base, stranger = (digest[:12] for digest in digests.values())
    fails(capsys, "merge a stranger --out o", "a began from", base, stranger, "--model.weights")
    line = "merge a b --base stranger --out o"
    fails(capsys, line, f"a began from {base}", f"stranger is {stranger}", "--base")
    fails(capsys, "merge a b_silent --out o", "b_silent says nothing", "--base CHECKPOINT")
    fails(capsys, "merge a_silent b_silent --out o", "a_silent says nothing")
    line = "merge a b --out o --method task_arithmetic"
    fails(capsys, line, "what models have learned since they began", "--base")
    works("merge a b_silent --out o --base base")
    assert (
        "b_silent says nothing of where training began: taken to be from base, as --base says\n"
        in capsys.readouterr().out
    )
    works("merge a_silent b_silent --out p --base base")
    assert "a_silent and b_silent say nothing" in capsys.readouterr().out
    assert load("p").model.base == digests["base"]


@pytest.mark.usefixtures("here")
def test_other_architectures_and_vocabularies_are_refused_by_both_values(capsys):
    model, tokenizer = archzoo.from_pretrained("a")
    deeper = micro("transformer_micro", vocab_size=model.vocab_size, depth=3, tie_weights=True)
    archzoo.save_pretrained("deeper", deeper, tokenizer)
    fails(capsys, "merge a deeper --base base --out o", "depth=2", "depth=3", "one architecture")
    other = archzoo.create_model("transformer_micro", vocab_size=model.vocab_size + 1)
    archzoo.save_pretrained("other", other)
    fails(capsys, "merge a other --out o", f"vocab_size={model.vocab_size} and")
    letters = CharacterTokenizer("abcdefgh")
    archzoo.save_pretrained("letters", model, letters)
    ours, theirs = tokenizer.fingerprint(), letters.fingerprint()
    fails(capsys, "merge a letters --base base --out o", "a has the vocabulary", ours, theirs)
    adapted = archzoo.adapt(archzoo.from_pretrained("base")[0], "LoRA")
    archzoo.save_pretrained("adapted", adapted, tokenizer)
    fails(capsys, "merge a adapted --base base --out o", "archzoo adapter merge adapted --out DIR")
    archzoo.save_adapter("alone", adapted)
    fails(capsys, "merge a alone --base base --out o", "alone is an adapter alone")
    fails(capsys, "merge a nowhere --out o", "there is no checkpoint at nowhere")
    fails(capsys, "merge a b --out o --weights 1", "1 weights are given for 2 models")
    huge = "merge a b --out o --base base --method task_arithmetic --scale 1e308"
    huge += " --weights 1e20 1e20"
    fails(capsys, huge, "is not finite once it is merged, in float", "a smaller scale")
    fails(capsys, "merge a b --out o --weights 1 x", "'x' stands alone")
    fails(capsys, "merge a b --out o --base base --method dare --density 2", "density=2.0")
    fails(capsys, "merge a b --out o --method tie", "method")


@pytest.mark.usefixtures("here")
def test_damaged_and_diverged_files_are_refused_by_name(capsys):
    content = Path("b/model.safetensors").read_bytes()
    Path("b/model.safetensors").write_bytes(content[:-100])
    fails(capsys, "merge a b --out o", "b/model.safetensors is truncated or damaged")
    Path("b/model.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    fails(capsys, "merge a b --out o", "by their digest: the file is damaged")
    model, tokenizer = archzoo.from_pretrained("a")
    with torch.no_grad():
        model.blocks[1].mixer.output.weight[0, :2] = math.nan
    archzoo.save_pretrained("diverged", model, tokenizer)
    words = ("diverged: 2 of the", "blocks.1.mixer.output.weight are not finite")
    fails(capsys, "merge a diverged --base base --out o", *words)


class Counting(archzoo.LinearRouter):
    """A part with an integer that is saved."""

    def __init__(self, dim: int, experts: int, top_k: int = 2) -> None:
        super().__init__(dim, experts, top_k)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))


@pytest.mark.usefixtures("here")
def test_integers_have_no_mean(capsys):
    part = {"class_path": "MixtureOfExperts", "init_args": {"router": Counting, "experts": 3}}
    part["init_args"]["router"] = f"{__name__}.Counting"
    net = micro("transformer_micro", feed_forward=part)
    archzoo.save_pretrained("counts", net)
    line = "merge counts counts --base counts --out o"
    fails(capsys, line, "counts: blocks.0.feed_forward.router.seen is int64", "only weights of")


@pytest.mark.usefixtures("here")
def test_files_of_other_tools_and_dtypes_merge(capsys):
    """mergekit writes no metadata: neither a digest, nor that the head is the embedding."""
    model, tokenizer = archzoo.from_pretrained("a")
    archzoo.save_pretrained("half", model.to(torch.bfloat16), tokenizer)
    Path("foreign").mkdir()
    for name in ("config.json", "tokenizer.json"):
        Path("foreign", name).write_bytes(Path("half", name).read_bytes())
    tensors = load_file("half/model.safetensors")
    tensors["head.weight"] = tensors["embedding.weight"].clone()
    save_file(tensors, "foreign/model.safetensors")
    works("merge foreign half --out same --base base")
    assert load("same").model.dtype == torch.bfloat16
    same = load("same").model.state_dict()
    assert all(torch.equal(same[name], w) for name, w in model.state_dict().items())
    works("merge foreign b --out wide --base base --weights 0 1")
    assert load("wide").model.dtype == torch.float64, "the widest"
    assert weights_digest(load("wide").model.state_dict()) == weights_digest(
        load("b").model.state_dict()
    )


RUN = """
seed_everything: 0
model: {preset: transformer_micro, width: 16, tie_weights: true}
data: {class_path: Addition, init_args: {digits: 1, batch_size: 8, vocabulary: shared}}
trainer: {accelerator: cpu, max_steps: 2, logger: false}
"""


@pytest.mark.slow  # docs/merging.md goes most of this way every day
def test_runs_merge_and_the_merge_is_tested_and_trained_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text(RUN)
    assert main(["fit", "--config", "base.yaml"]) == 0
    two = "--data.digits 1 --data.vocabulary shared --trainer.max_steps 2 --trainer.accelerator cpu"
    fit = f"--model.weights runs/base {two} --trainer.logger false".split()
    assert main(["fit", "--name", "plus", "--data", "Addition", *fit]) == 0
    assert main(["fit", "--name", "minus", "--data", "Subtraction", *fit]) == 0
    works("merge runs/plus runs/minus/last.ckpt --out merged")
    plus, minus, merged = (
        load(path).model.state_dict() for path in ("runs/plus", "runs/minus", "merged")
    )
    assert all(
        torch.equal(w, (plus[n].double() / 2 + minus[n] / 2).float()) for n, w in merged.items()
    )
    works("merge runs/plus runs/minus --base runs/base --method slerp --out s")
    fails(capsys, "merge runs/plus runs/minus --base runs/plus --out o", "runs/minus began from")
    fails(capsys, "test --ckpt_path merged", "--model.weights merged instead of --ckpt_path")
    within = "merged/model.safetensors"
    fails(
        capsys,
        f"test --ckpt_path {within}",
        f"no .ckpt file of a run: give --model.weights {within}",
    )
    works("test --model.weights merged --trainer.accelerator cpu")
    said = capsys.readouterr().out
    assert "Addition:" in said and "Subtraction:" in said, "each model's task"
    assert main(["fit", "--model.weights", "merged", "--data", "Addition", *fit[2:]]) == 0
