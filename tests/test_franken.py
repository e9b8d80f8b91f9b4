"""Upcycling of several models: an expert each, and routers from prompts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import MICRO, micro
from safetensors.torch import load_file
from torch.nn import functional as F

import archzoo
from archzoo.checkpoint import load, weights_digest
from archzoo.cli import main
from archzoo.contract import relative_error
from archzoo.conversion.gates import GATES, prompt_vector, router_rows
from archzoo.conversion.upcycle import upcycle
from archzoo.documents import make_context
from archzoo.tasks import Addition, Subtraction

GOLDEN = Path(__file__).parent / "golden" / "adaptation_merges.safetensors"
PLAIN = {"class_path": "GatedFeedForward", "init_args": {}}
DENSE = [name for name in MICRO if micro(name).config["feed_forward"] == PLAIN]
ROUTERS = {
    "linear": {},
    "sigmoid": {"score": "sigmoid"},
    "normed": {"logit_norm": 1.0},
    "biased": {"bias_rate": 1e-3},
    "one": {"renormalise": True},
}


def spec(**arguments):
    return {"class_path": "LinearRouter", "init_args": arguments}


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("router", [*ROUTERS, "attention"])
def test_identical_experts_are_the_dense_model(name, router):
    dense = micro(name, init_std=0.2, tie_weights=True).double()
    rows = F.normalize(torch.randn(dense.depth, 3, dense.dim).double(), dim=-1)
    part = spec(**ROUTERS[router]) if router != "attention" else "AttentionRouter"
    given = None if router == "attention" else rows
    top_k = 1 if router == "one" else 2
    sparse = upcycle(dense, sources=[dense] * 3, rows=given, router=part, top_k=top_k)
    tokens = torch.randint(64, (2, 20))
    assert relative_error(sparse(tokens).logits, dense(tokens).logits) < 1e-12
    if given is not None:
        held = [block.feed_forward.router.projection.weight for block in sparse.blocks]
        assert torch.equal(torch.stack(held), rows)


def family(count: int, scale: float = 0.1, **options) -> list[archzoo.Decoder]:
    """A base and models near it."""
    name = "transformer_micro"
    base = micro(name, **{"init_std": 0.2} | options).double()
    models = [base]
    for _ in range(count):
        model = micro(name, **{"init_std": 0.2} | options).double()
        model.load_state_dict(base.state_dict())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += scale * torch.randn_like(parameter)
        models.append(model)
    return models


def test_each_source_gives_an_expert_and_the_base_all_else():
    base, *sources = family(3)
    sparse = upcycle(base, sources=sources, top_k=2)
    assert sparse.config["feed_forward"]["init_args"]["experts"] == 3
    for layer, block in enumerate(sparse.blocks):
        for name in ("gate_up", "down"):
            stack = getattr(block.feed_forward.experts, name).weight
            for expert, source in enumerate(sources):
                own = getattr(source.blocks[layer].feed_forward, name).weight
                assert torch.equal(stack[expert], own)
    held, wanted = sparse.state_dict(), base.state_dict()
    rest = [name for name in wanted if ".feed_forward." not in name]
    assert rest and all(torch.equal(held[name], wanted[name]) for name in rest)


def test_the_mixture_of_all_experts_is_their_weighted_sum():
    """Soft: every expert sees every token."""
    base, *sources = family(2, depth=1)
    rows = F.normalize(torch.randn(1, 2, base.dim).double(), dim=-1)
    sparse = upcycle(base, sources=sources, rows=rows, top_k=2).eval()
    seen = []
    sparse.blocks[0].feed_forward.register_forward_hook(lambda _, x, y: seen.append((x[0], y[0])))
    with torch.no_grad():
        sparse(torch.randint(64, (2, 9)))
    x, y = seen[0]
    weights = torch.softmax(x @ rows[0].T, dim=-1)
    context, _ = make_context(2, 9)
    parts = [source.blocks[0].feed_forward(x, context)[0] for source in sources]
    wanted = sum(weights[..., e, None] * part for e, part in enumerate(parts))
    assert relative_error(y, wanted) < 1e-12


@pytest.mark.parametrize("gate", [gate for gate in GATES if gate != "random"])
@pytest.mark.parametrize("name", ["transformer_micro", "retnet_micro"])
def test_rows_are_directions(name, gate):
    base = micro(name, init_std=0.2).double()
    prompts = [[[1, 2, 3], [4, 2]], [[10, 11, 12, 13]], [[20, 21]]]
    rows = router_rows(base, prompts, [prompts[1], [], prompts[0] + prompts[1]], gate)
    assert rows.shape == (base.depth, 3, base.dim) and rows.dtype == torch.float64
    assert torch.allclose(rows.norm(dim=-1), torch.ones(base.depth, 3).double(), atol=1e-14)
    vectors = [torch.stack([prompt_vector(base, p, gate) for p in of]) for of in prompts]
    means = [found.mean(dim=0) for found in vectors]
    assert torch.allclose(rows[:, 0], F.normalize(means[0] - means[1], dim=-1))
    assert torch.allclose(rows[:, 1], F.normalize(means[1], dim=-1)), "no negative prompts"
    away = torch.cat(vectors[:2]).mean(dim=0)
    assert torch.allclose(rows[:, 2], F.normalize(means[2] - away, dim=-1))


def test_what_a_gate_sees_is_what_is_said():
    base = micro("transformer_micro", init_std=0.2).double().eval()
    prompt = [3, 1, 4, 1, 5]
    read, hidden = [], []
    for block in base.blocks:
        block.register_forward_pre_hook(lambda _, x: hidden.append(x[0][0]))
        block.feed_forward_norm.register_forward_hook(lambda _, x, y: read.append(y[0]))
    with torch.no_grad():
        base(torch.tensor([prompt]))
    wanted = {"router": torch.stack(read), "hidden": torch.stack(hidden)}
    for kind, vectors in wanted.items():
        assert torch.equal(prompt_vector(base, prompt, f"{kind}_last"), vectors[:, -1])
        assert torch.equal(prompt_vector(base, prompt, f"{kind}_average"), vectors.mean(dim=1))
    embedded = base.embedding.weight[prompt].sum(dim=0)
    assert torch.allclose(prompt_vector(base, prompt, "cheap_embed"), embedded.expand(2, -1))


class Shown(torch.nn.Module):
    """Blocks that only hand on the golden hidden states."""

    def __init__(self, states: torch.Tensor, prompts: torch.Tensor) -> None:
        super().__init__()
        self.states, self.prompts = states, prompts.tolist()
        self.blocks = torch.nn.ModuleList(torch.nn.Identity() for _ in range(len(states) - 1))
        self.depth, self.device = len(self.blocks), torch.device("cpu")

    def hidden(self, tokens: torch.Tensor) -> None:
        row = self.prompts.index(tokens[0].tolist())
        for block, state in zip(self.blocks, self.states, strict=False):
            block(state[row][None])


def test_rows_are_mergekits_where_no_prompt_is_padded():
    golden = load_file(GOLDEN)
    states = torch.cat([golden["router.hidden_states"], golden["router.negative_hidden_states"]], 1)
    ids = torch.cat([golden["router.ids"], torch.zeros(1, 5, dtype=torch.int64)])
    base = Shown(states, ids)
    positive, negative = [ids[:2].tolist()], [ids[2:].tolist()]
    for gate, name in (("hidden_last", "hidden_last"), ("hidden_average", "hidden_avg")):
        rows = router_rows(base, positive, negative, gate)
        assert relative_error(rows[:, 0], golden[f"router.{name}"].double()) < 1e-6
    base.embedding = torch.nn.Embedding.from_pretrained(golden["router.embedding"])
    kept = [
        [token for token, real in zip(*pair, strict=True) if real]
        for pair in zip(ids[:2].tolist(), golden["router.mask"].tolist(), strict=True)
    ]
    rows = router_rows(base, [kept], None, "cheap_embed")
    assert relative_error(rows[:, 0], golden["router.cheap_embed"].double()) < 1e-6
    # Its second prompt has three tokens and two of padding, which mergekit takes for text.
    short = Shown(states[:, :, :3], torch.tensor(kept[1:]).repeat(3, 1))
    last = prompt_vector(short, kept[1], "hidden_last")
    assert torch.equal(last, states[:3, 0, 2].double())


@pytest.mark.parametrize(("gate", "layers"), [("cheap_embed", [0]), ("router_average", [0, 1])])
def test_a_prompt_goes_to_its_expert(gate, layers):
    """At layer 0 by the embeddings of distinct vocabularies; in all by what the router reads."""
    base, *sources = family(3, 1e-3, vocab_size=18, init_std=0.02)
    for net in (base, *sources):  # tokens that share nothing
        torch.nn.init.orthogonal_(net.embedding.weight)
    vocabularies = torch.arange(18).split(6)
    prompts = [[v[torch.randint(6, (8,))].tolist() for _ in range(20)] for v in vocabularies]
    others = [[p for o, of in enumerate(prompts) for p in of if o != e] for e in range(3)]
    rows = router_rows(base, prompts, others, gate)
    part = spec(renormalise=True)
    sparse = upcycle(base, sources=sources, rows=rows, router=part, top_k=1).eval()
    chosen: dict[int, list[torch.Tensor]] = {layer: [] for layer in range(sparse.depth)}
    for layer, block in enumerate(sparse.blocks):
        block.feed_forward.router.register_forward_hook(
            lambda _, x, y, layer=layer: chosen[layer].append(y.indices[:, 0])
        )
    with torch.no_grad():
        for vocabulary in vocabularies:
            sparse(vocabulary[torch.randint(6, (8, 8))])
    for layer in layers:
        for expert in range(3):
            assert (chosen[layer][expert] == expert).all(), f"layer {layer}, expert {expert}"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"experts": 3}, "experts=3 and 2 models"),
        ({"router": "AttentionRouter", "rows": (2, 2, 32)}, "AttentionRouter has no row"),
        ({"rows": (2, 3, 32)}, r"rows of \(3, 32\) for a router of \(2, 32\)"),
        ({"router": spec(renormalise=False), "top_k": 1}, "off a sum of 1"),
        ({"shared_experts": 1}, "shared experts would be added"),
    ],
)
def test_what_does_not_fit_is_refused(settings, words):
    base, *sources = family(2)
    if "rows" in settings:
        settings = settings | {"rows": torch.randn(settings["rows"])}
    with pytest.raises(ValueError, match=words):
        upcycle(base, sources=sources, **settings)
    with pytest.raises(ValueError, match="not the same weight in all models"):
        upcycle(base, sources=[sources[0], micro("transformer_micro", width=8)])


def test_prompts_that_give_no_direction_are_refused():
    base = micro("transformer_micro", init_std=0.2).double()
    with pytest.raises(ValueError, match="expert 1 has no prompt"):
        router_rows(base, [[[1]], []])
    with pytest.raises(ValueError, match="expert 0 are alike in layer 0, seen by hidden_last"):
        router_rows(base, [[[1, 5]], [[2, 5]]], [[[2, 5]], [[1, 5]]], "hidden_last")
    with pytest.raises(ValueError, match="'random' takes no prompts"):
        router_rows(base, [[[1]]], None, "random")


# ---------------------------------------------------------------------------- the command


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A base, models for + and - that record it, prompts, and a stranger."""
    monkeypatch.chdir(tmp_path)
    plus, minus = (kind(digits=1, vocabulary="shared") for kind in (Addition, Subtraction))
    plus.prepare()
    base, a, b, c = family(3, vocab_size=plus.vocab_size, tie_weights=True)
    archzoo.save_pretrained("base", base, plus.tokenizer, plus.config())
    digest = weights_digest(base.state_dict())
    for name, model, task in (("plus", a, plus), ("minus", b, minus)):
        model.base = digest
        archzoo.save_pretrained(name, model, plus.tokenizer, task.config())
    c.base = "0" * 64
    archzoo.save_pretrained("stranger", c, plus.tokenizer, plus.config())
    Path("plus.txt").write_text("1+2=\n3+4=\n\n5+5=\n")
    Path("minus.txt").write_text("2-1=\n9-4=\n")


PLUS, MINUS = ["1+2=", "3+4=", "5+5="], ["2-1=", "9-4="]  # what the files hold


def works(line: str) -> None:
    assert main(line.split()) == 0


def fails(capsys: pytest.CaptureFixture[str], line: str, *words: str) -> None:
    capsys.readouterr()
    before = sorted(map(str, Path().rglob("*")))
    assert main(line.split()) == 1
    said = capsys.readouterr().err
    assert all(word in said for word in words) and said.count("\n") == 1, said
    assert sorted(map(str, Path().rglob("*"))) == before


@pytest.mark.usefixtures("here")
def test_the_command_puts_several_together(capsys):
    works("upcycle plus minus --out moe --base base --prompts plus.txt minus.txt")
    said = capsys.readouterr().out
    assert "of them active; each of plus and minus had" in said
    assert "the problems of Addition and Subtraction" in said
    found, base = load("moe"), load("base")
    tokenizer = base.tokenizer
    prompts = [[tokenizer.encode(t) for t in texts] for texts in (PLUS, MINUS)]
    rows = router_rows(base.model, prompts, prompts[::-1], "router_average")
    sources = [load(name).model for name in ("plus", "minus")]
    wanted = upcycle(base.model, sources=sources, rows=rows).state_dict()
    assert all(torch.equal(w, wanted[n]) for n, w in found.model.state_dict().items())
    assert found.model.head.weight is found.model.embedding.weight
    assert found.task["class_path"] == "archzoo.tasks.Arithmetic"
    made = found.model.merged
    assert made["gate"] == "router_average" and made["prompts"] == ["plus.txt", "minus.txt"]
    assert [m["path"] for m in made["models"]] == ["plus", "minus"] and made["contrast"] is True
    works("generate moe 5-3= --max_tokens 2")
    works("router moe --batches 1")
    Path("none.txt").write_text("\n")
    several = "upcycle plus minus --base base --prompts plus.txt --prompts minus.txt"
    works(f"{several} --out other --negative none.txt --negative plus.txt --gate hidden_average")
    rows = router_rows(base.model, prompts, [[], prompts[0]], "hidden_average")
    held = load("other").model.blocks[1].feed_forward.router.projection.weight
    assert torch.equal(held, rows[1])
    works("upcycle plus minus --base base --out drawn --gate random --router AttentionRouter")
    works(f"{several} --out plain --contrast false")
    rows = router_rows(base.model, prompts, None, "router_average")
    held = load("plain").model.blocks[0].feed_forward.router.projection.weight
    assert torch.equal(held, rows[0])


@pytest.mark.usefixtures("here")
def test_what_cannot_be_put_together_is_one_line(capsys):
    both = "upcycle plus minus --base base --out o"
    files = "--prompts plus.txt minus.txt"
    fails(capsys, f"upcycle plus minus --out o {files}", "--base CHECKPOINT")
    fails(capsys, f"upcycle plus stranger --base base --out o {files}", "stranger began from 0000")
    fails(capsys, both, "router_average makes the routers of prompts", "--gate random")
    fails(capsys, f"{both} --prompts plus.txt", "1 files of prompts are given for 2 checkpoints")
    fails(capsys, f"{both} {files} --negative plus.txt", "1 files of negative")
    fails(capsys, f"{both} {files} --gate random", "omit --prompts")
    fails(capsys, f"{both} --negative plus.txt --gate random", "negative prompts need positive")
    fails(capsys, f"{both} {files} --gate hidden", "gate")
    fails(capsys, f"{both} {files} --experts 4", "experts=4 and 2 models")
    fails(capsys, f"{both} {files} --router AttentionRouter", "AttentionRouter has no row")
    line = f"{both} {files} --gate hidden_last"
    fails(capsys, line, "expert 0 are alike in layer 0", "another gate")
    fails(capsys, f"{both} --prompts plus.txt none.txt", "none.txt")
    Path("odd.txt").write_text("1*2=\n")
    fails(capsys, f"{both} --prompts plus.txt odd.txt", "odd.txt: character '*'")
    Path("empty.txt").write_text("")
    fails(capsys, f"{both} --prompts plus.txt empty.txt", "empty.txt: there is no prompt")
    Path("bytes.txt").write_bytes(b"\xff\xfe1")
    fails(capsys, f"{both} --prompts plus.txt bytes.txt", "bytes.txt is not UTF-8")
    fails(capsys, f"{both} --prompts plus.txt no.txt", "no.txt cannot be read (No such file")
    fails(capsys, f"{both} --prompts plus.txt base", "base cannot be read (Is a directory)")
    fails(capsys, f"{both} --gate random --contrast false", "means nothing without --prompts")
    line = f"{both} {files} --negative minus.txt plus.txt --contrast false"
    fails(capsys, line, "contrast=false means nothing beside --negative")
    fails(capsys, f"{both} {files} --init_args.router LinearRouter", "give --router and")
    fails(capsys, "upcycle plus o --gate cheap_embed", "gate=cheap_embed means nothing to one")
    fails(capsys, "upcycle plus minus", "minus exists: name a directory")
    fails(capsys, "upcycle plus minus more", "--out DIR")
    fails(capsys, "upcycle plus --out o --base base", "one checkpoint is given")
    fails(capsys, f"upcycle plus minus --out base --base base {files}", "base exists")
