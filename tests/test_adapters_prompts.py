"""Prompt tuning, P-tuning and prefixes: golden numbers, counts, and documents that begin there."""

import functools
import itertools
import warnings
from pathlib import Path

import lightning
import pytest
import torch
from safetensors.torch import load_file
from test_resume import KillAfter, Killed, addition, stream
from torch import nn

import archzoo
from archzoo.adapters import Target
from archzoo.adapters.attach import adapter_modules
from archzoo.block import make_context
from archzoo.cli import main
from archzoo.contract import CHECKS, run_check
from archzoo.contract.measure import relative_error
from archzoo.tasks import Addition
from archzoo.training.callbacks import Checkpoints
from archzoo.training.files import CheckpointFiles
from archzoo.training.module import LanguageModel
from archzoo.training.optim import decay_groups

GOLDEN = Path(__file__).parent / "golden" / "adaptation_prompts.safetensors"
METHODS = ("PromptTuning", "PTuning", "PrefixTuning", "PTuningV2")
#: What a document may start from: every mixer, biases, filters, convolutions, hybrids, loops.
MODELS = {
    "transformer": {"preset": "transformer_micro"},
    "retnet": {"preset": "retnet_micro"},
    "yuan": {"preset": "yuan_micro"},
    "skywork": {"preset": "skywork_micro"},
    "abacus": {
        "preset": "abacus_micro",
        "embedding": {
            "class_path": "AbacusEmbedding",
            "init_args": {"digit_tokens": list(range(10, 20))},
        },
    },
    "biased": {"preset": "transformer_micro", "bias": "FIRE", "rotary": "none"},
    "grouped": {
        "preset": "transformer_micro",
        "mixer": {"class_path": "Attention", "init_args": {"kv_heads": 1}},
    },
    "hybrid": {
        "preset": "retnet_micro",
        "pattern": ["Retention", "Attention", "ShortConvolution"],
        "depth": 3,
        "convolution": 3,
    },
}


def make(model, adapter=None, **arguments):
    settings = MODELS[model] | arguments
    preset = settings.pop("preset")
    torch.manual_seed(0)
    net = archzoo.create_model(preset, vocab_size=20, init_std=0.2, adapter=adapter, **settings)
    return net.double().eval()


def spec(name, **arguments):
    length = {} if "tokens" in arguments else {"length": 3}
    return {"class_path": name, "init_args": length | arguments}


def moved(net):
    """Off where it starts, as training would move it."""
    with torch.no_grad():
        for _, adapter in adapter_modules(net):
            for parameter in adapter.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return net


TOKENS = torch.randint(20, (3, 15), generator=torch.Generator().manual_seed(1))
DOCUMENTS = torch.tensor([[-1] * 3 + [0] * 12, [0] * 5 + [1] * 8 + [-1] * 2, [0] * 15])
PIECES = ((0, 3, 15), (1, 0, 5), (1, 5, 13), (2, 0, 15))  # row, begin, end


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def trained(net):
    return sum(p.numel() for p in net.parameters() if p.requires_grad)


@functools.cache
def golden(case):
    tensors = load_file(GOLDEN)
    return {n.removeprefix(f"{case}."): t for n, t in tensors.items() if n.startswith(f"{case}.")}


# ---------------------------------------------------------------------------- the rules


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("rule", CHECKS["adapter"])
def test_prompts_and_prefixes_keep_the_rules(name, rule):
    finding = run_check(getattr(archzoo, name), rule)
    assert finding.passed, finding.detail


@pytest.mark.parametrize("options", [{"hidden": None}, {"hidden": 5, "length": 1}])
@pytest.mark.parametrize("rule", ["gradients", "forms equal", "save and load"])
def test_prefix_tuning_keeps_the_rules_with_options(options, rule):
    finding = run_check(archzoo.PrefixTuning, rule, **options)
    assert finding.passed, finding.detail


# ---------------------------------------------------------------------------- prompts


def test_p_tuning_gives_the_golden_numbers_and_gradients():
    """The authors' encoder, all of its weights."""
    want = golden("v1")
    length, dim = want["prompt"].shape
    adapter = archzoo.PTuning(Target("input", "embedding", (dim,)), length=length).double()
    assert count(adapter) == 3968
    assert count(adapter) == length * dim + 2 * dim**2 + 2 * dim + 12 * dim**2 + 16 * dim
    ours = {"embedding.weight": "vectors"}
    ours |= {n: n.replace("lstm_head", "lstm").replace("mlp_head", "head") for n in want}
    ours["embedding.weight"] = "vectors"
    parameters = dict(adapter.named_parameters())
    theirs = {n: ours[n] for n in want if ours[n] in parameters}
    assert set(theirs.values()) == set(parameters)
    with torch.no_grad():
        for name, own in theirs.items():
            parameters[own].copy_(want[name])
    prompt = adapter.prompt()
    assert relative_error(prompt, want["prompt"]) < 1e-12
    prompt.backward(want["gy"])
    for name, own in theirs.items():
        assert relative_error(parameters[own].grad, want[f"grad.{name}"]) < 1e-12, name
    assert adapter.collapse() == {"encoder": "none"}
    assert count(adapter) == length * dim
    assert relative_error(adapter.prompt(), prompt) < 1e-12


@pytest.mark.parametrize("encoder", ["lstm", "mlp"])
def test_a_collapsed_prompt_computes_the_same_and_is_saved_without_its_network(encoder, tmp_path):
    adapter = functools.partial(archzoo.PTuning, length=5, encoder=encoder)
    net = archzoo.create_model("retnet_micro", vocab_size=20, adapter=adapter).eval()
    dim = net.dim
    network = 2 * dim**2 + 2 * dim + (12 * dim**2 + 16 * dim if encoder == "lstm" else 0)
    assert trained(net) == 5 * dim + network
    tokens = torch.randint(20, (2, 9))
    with torch.no_grad():
        want = net(tokens).logits
        archzoo.collapse_adapters(net)
        assert trained(net) == 5 * dim
        assert torch.equal(net(tokens).logits, want)
        archzoo.save_pretrained(tmp_path / "model", net)
        again, _ = archzoo.from_pretrained(tmp_path / "model")
        assert torch.equal(again.eval()(tokens).logits, want)
    assert again.config["adapter"]["init_args"]["encoder"] == "none"
    archzoo.remove_adapters(again)
    assert again.config["adapter"] is None


def test_prompts_start_from_vectors_of_words():
    net = archzoo.create_model("transformer_micro", vocab_size=20)
    table = net.embedding.weight.clone()

    def vectors(**arguments):
        adapted = archzoo.adapt(net, functools.partial(archzoo.PromptTuning, **arguments))
        found = adapted.prompt["default"].vectors.detach().clone()
        archzoo.remove_adapters(net)
        return found

    assert torch.equal(vectors(tokens=[7, 0, 7]), table[[7, 0, 7]])
    drawn = vectors(length=20, seed=1)
    assert torch.equal(drawn, vectors(length=20, seed=1))
    assert not torch.equal(drawn, vectors(length=20, seed=2))
    rows = torch.cdist(drawn, table).argmin(1)
    assert torch.equal(drawn, table[rows])
    assert len(set(rows.tolist())) == 20
    assert vectors(length=30).shape == (30, net.dim)
    normal = vectors(length=2000, start="normal")
    assert abs(normal.std() / table.std() - 1) < 0.02
    assert abs(vectors(length=2000, start="normal", std=0.5).std() / 0.5 - 1) < 0.02


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("PromptTuning", {"length": 0}, "length=0 must be an integer of at least 1"),
        ("PromptTuning", {"tokens": []}, "at least one token"),
        ("PromptTuning", {"tokens": [3, 20]}, "token 20 is not one of the model's 0 to 19"),
        ("PromptTuning", {"start": "word"}, "neither vocabulary nor normal"),
        ("PromptTuning", {"std": -1.0}, "std=-1.0 must be at least 0"),
        ("PTuning", {"length": True}, "length=True must be"),
        ("PTuning", {"encoder": "gru"}, "none of lstm, mlp, none"),
    ],
)
def test_user_errors_are_answered_in_a_line(name, arguments, says):
    spec = {"class_path": name, "init_args": arguments}
    with pytest.raises(ValueError, match=says):
        archzoo.create_model("retnet_micro", vocab_size=20, adapter=spec)


@pytest.mark.parametrize("name", METHODS)
def test_prompts_and_prefixes_are_never_decayed_nor_merged(name):
    net = archzoo.create_model("yuan_micro", vocab_size=20, adapter=name)
    assert [group["weight_decay"] for group in decay_groups(net, 0.1)] == [0.0]
    with pytest.raises(ValueError, match=f"{name} at .* cannot be merged"):
        archzoo.merge_adapter(net)


# ---------------------------------------------------------------------------- prefixes


def layers_of(case, cls, **arguments):
    """A prefix of each layer with the golden weights, and the golden numbers."""
    want = golden(case)
    layers, _, _, heads, length, size = want["past"].shape
    state = {"keys": (heads, 0, size), "values": (heads, 0, size)}
    target = Target("state", "blocks.0.mixer.state", (heads * size,), 0, state)
    made = [cls(target, length=length, **arguments).double() for _ in range(layers)]
    cls.connect(made)
    return [each.double() for each in made], want


def attend(keys_and_values, want):
    """Attention behind a prefix of the golden queries, keys and values of the text."""
    batch, heads, time, size = want["q"].shape
    mixer = archzoo.Attention(heads * size, heads).double()
    nn.init.eye_(mixer.output.weight)
    start = {name: tensor[None] for name, tensor in keys_and_values.items()}
    context = make_context(batch, time, first=start["keys"].shape[2])[0]._replace(start=start)
    state = mixer.start_state(batch, start, dtype=torch.float64)
    given = (want[name].transpose(1, 2) for name in "qkv")
    y, _ = mixer.attend_rotated(*given, state, context)
    return y.unflatten(-1, (heads, size)).transpose(1, 2)


def test_p_tuning_v2_gives_the_golden_numbers_and_gradients():
    layers, want = layers_of("v2", archzoo.PTuningV2)
    tables = want["embedding.weight"].split(layers[0].table.shape[1], 1)
    with torch.no_grad():
        for layer, table in zip(layers, tables, strict=True):
            layer.table.copy_(table)
    for layer, past in zip(layers, want["past"], strict=True):
        for name, of_batch in zip(("keys", "values"), past, strict=True):
            assert all(torch.equal(layer.prefix()[name], one) for one in of_batch)
    assert sum(map(count, layers)) == 384
    y = attend(layers[0].prefix(), want)
    assert relative_error(y, want["y"]) < 1e-12
    y.backward(want["gy"])
    grads = [torch.zeros_like(x.table) if x.table.grad is None else x.table.grad for x in layers]
    assert relative_error(torch.cat(grads, 1), want["grad.embedding.weight"]) < 1e-12


def test_prefix_tuning_gives_the_golden_numbers_and_gradients():
    layers, want = layers_of("mlp", archzoo.PrefixTuning, hidden=36)
    assert sum(map(count, layers)) == count(layers[0]) == 3076
    names = {"embedding": "embedding.weight"}
    for ours, theirs in (("first", "trans.0"), ("second", "trans.2")):
        names |= {f"{ours}.{kind}": f"{theirs}.{kind}" for kind in ("weight", "bias")}
    parameters = dict(layers[0].network.named_parameters())
    assert names.keys() == parameters.keys()
    with torch.no_grad():
        for ours, theirs in names.items():
            parameters[ours].copy_(want[theirs])
    for layer, past in zip(layers, want["past"], strict=True):
        for name, of_batch in zip(("keys", "values"), past, strict=True):
            assert all(relative_error(layer.prefix()[name], one) < 1e-12 for one in of_batch)
    y = attend(layers[0].prefix(), want)
    assert relative_error(y, want["y"]) < 1e-12
    y.backward(want["gy"])
    for ours, theirs in names.items():
        assert relative_error(parameters[ours].grad, want[f"grad.{theirs}"]) < 1e-12, ours
    for layer in layers:
        layer.collapse()
    assert sum(map(count, layers)) == 384
    assert relative_error(attend(layers[0].prefix(), want), want["y"]) < 1e-12


@pytest.mark.parametrize(
    ("preset", "length", "direct"),
    [
        ("transformer_micro", 4, 512),
        ("retnet_micro", 4, 2048),
        ("retnet_micro", 40, 2048),
        ("yuan_micro", 4, 608),
    ],
)
def test_a_prefix_costs_what_is_said(preset, length, direct):
    """2 layers length d_kv, and of a memory its size, whatever the length; beside it the network's.

    The numbers are those of the same states as parameters, counted by hand.
    """
    v2 = functools.partial(archzoo.PTuningV2, length=length)
    net = archzoo.create_model(preset, vocab_size=20, adapter=v2)
    assert trained(net) == direct
    archzoo.remove_adapters(net)
    archzoo.adapt(net, functools.partial(archzoo.PrefixTuning, length=length, hidden=7))
    dim = net.dim
    row = {"transformer_micro": 4 * dim, "retnet_micro": 2 * 3 * dim, "yuan_micro": 7 * dim}[preset]
    assert trained(net) == length * dim + 7 * (dim + 1) + 8 * row
    archzoo.collapse_adapters(net)
    assert trained(net) == direct


@pytest.mark.parametrize("model", MODELS)
def test_a_collapsed_prefix_computes_the_same_and_is_saved_without_its_network(model, tmp_path):
    net = moved(make(model, spec("PrefixTuning", hidden=6)))
    with torch.no_grad():
        want = net(TOKENS, documents=DOCUMENTS).logits
        archzoo.collapse_adapters(net)
        assert relative_error(net(TOKENS, documents=DOCUMENTS).logits, want) < 1e-12
        archzoo.save_pretrained(tmp_path / "model", net)
        again, _ = archzoo.from_pretrained(tmp_path / "model")
        assert relative_error(again.eval()(TOKENS, documents=DOCUMENTS).logits, want) < 1e-12
    assert not [name for name in again.state_dict() if "network" in name]


@pytest.mark.parametrize("name", ["PTuningV2", "PrefixTuning"])
def test_at_the_start_retention_gives_what_it_gives_without(name):
    """S_0 = 0 where the state itself learns."""
    options = {"hidden": None} if name == "PrefixTuning" else {}
    net, base = make("retnet", spec(name, **options)), make("retnet")
    with torch.no_grad():
        got, want = (each(TOKENS, documents=DOCUMENTS).logits for each in (net, base))
    assert relative_error(got, want) < 1e-12
    net(TOKENS).logits.square().sum().backward()
    assert all(p.grad.abs().max() for p in net.parameters() if p.requires_grad)


# ---------------------------------------------------------------------------- tokens as a start


@pytest.mark.parametrize("model", MODELS)
def test_the_state_after_tokens_is_what_reading_them_gives(model):
    """As if those tokens had been read before every document: in rows, packed, padded, decoding."""
    before = [3, 1, 4, 1]
    base = make(model)
    net = archzoo.adapt(make(model), spec("PTuningV2", tokens=before))
    read = torch.tensor([before])
    with torch.no_grad():
        got = net(TOKENS, documents=DOCUMENTS).logits
        steps = net(TOKENS, documents=DOCUMENTS, form="recurrent").logits
        for row, begin, end in PIECES:
            text = TOKENS[row : row + 1, begin:end]
            want = base(torch.cat([read, text], 1)).logits[:, len(before) :]
            assert relative_error(net(text).logits, want) < 1e-12
            assert relative_error(got[row : row + 1, begin:end], want) < 1e-12
            assert relative_error(steps[row : row + 1, begin:end], want) < 1e-12
    written = archzoo.generate(net, [[5, 9], [2]], max_tokens=9, check=True)
    whole = archzoo.generate(base, [[*before, 5, 9], [*before, 2]], max_tokens=9)
    assert written.tokens == whole.tokens


def test_learned_positions_count_a_prefixs_tokens_and_no_prompts():
    net = make("transformer", embedding="LearnedPositions")
    base = make("transformer", embedding="LearnedPositions")
    archzoo.adapt(net, spec("PTuningV2", tokens=[3, 1]))
    with torch.no_grad():
        want = base(torch.cat([torch.tensor([[3, 1]] * 3), TOKENS], 1)).logits[:, 2:]
        assert relative_error(net(TOKENS).logits, want) < 1e-12
        archzoo.adapt(archzoo.remove_adapters(net), spec("PromptTuning"))
        words, _ = net.embedding(TOKENS, None, make_context(*TOKENS.shape)[0])
        found = []
        net.blocks[0].register_forward_pre_hook(lambda block, given: found.append(given[0]))
        net(TOKENS)
        assert relative_error(found[0][:, 3:], words) < 1e-12


@pytest.mark.parametrize(
    ("model", "arguments", "says"),
    [
        (
            "retnet",
            {"tokens": [3, 20], "hidden": None},
            "token 20 is not one of the model's 0 to 19",
        ),
        ("retnet", {"tokens": [3], "hidden": 5}, "set hidden to null"),
        ("retnet", {"hidden": 0}, "hidden=0 must be at least 1"),
        ("retnet", {"length": 0}, "length=0 must be"),
        ("looped", {"tokens": [3], "hidden": None}, "in each of the 2 iterations"),
    ],
)
def test_prefixes_answer_user_errors_in_a_line(model, arguments, says):
    loops = 2 if model == "looped" else 1
    with pytest.raises(ValueError, match=says):
        make("retnet", spec("PrefixTuning", **arguments), loops=loops)


class Handles(archzoo.Retention):
    """It handles documents itself, and does not say what they can start from."""

    def prefix_shapes(self):
        return None


@pytest.mark.parametrize("name", METHODS)
def test_a_mixer_that_says_nothing_of_starts_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"{name} cannot change .*: Handles handles documents"):
        make("retnet", spec(name), mixer=Handles)


def test_tokens_that_end_within_a_number_are_refused_and_nothing_changes():
    """Abacus counts the digits of a number, and a prefix does not hold how many have come."""
    task = Addition(digits=2)
    net = archzoo.create_model("abacus_micro", vocab_size=task.vocab_size)
    net.bind(task)
    number = task.tokenizer.encode("12")
    for spoilt in (number, [task.vocab_size]):
        with pytest.raises(ValueError, match=r"end them with another token|is not one of the"):
            archzoo.adapt(net, archzoo.PTuningV2(tokens=spoilt))
        assert net.config["adapter"] is None and not list(adapter_modules(net))
        assert all(parameter.requires_grad for parameter in net.parameters())
    archzoo.adapt(net, archzoo.PTuningV2(tokens=[*number, *task.tokenizer.encode("=")]))


# ---------------------------------------------------------------------------- every document


def alone(net, piece):
    row, begin, end = piece
    return net(TOKENS[row : row + 1, begin:end]).logits


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("model", MODELS)
def test_every_document_starts_there(model, name):
    """Packed, padded, in every form, in segments: each document as it would be alone."""
    net = moved(make(model, spec(name)))
    valid = DOCUMENTS >= 0
    with torch.no_grad():
        want = torch.zeros(*TOKENS.shape, 20, dtype=torch.float64)
        for row, begin, end in PIECES:
            want[row, begin:end] = alone(net, (row, begin, end))[0]
        for form in (None, "parallel", "chunkwise", "recurrent"):
            got = net(TOKENS, documents=DOCUMENTS, form=form).logits
            assert got.shape == want.shape  # no label stands at a prompt
            assert relative_error(got[valid], want[valid]) < 1e-12, form
        for cuts in ((0, 2, 3, 4, 11, 15), (0, 1, 15)):
            state, found = net.init_state(3, capacity=15), []
            for begin, end in itertools.pairwise(cuts):
                output = net(TOKENS[:, begin:end], state, DOCUMENTS[:, begin:end])
                state = output.state
                found.append(output.logits)
            assert relative_error(torch.cat(found, 1)[valid], want[valid]) < 1e-12
        whole, state = net(TOKENS).logits, net.init_state(3)
        first = net(TOKENS[:, :6], state)
        rest = net(TOKENS[:, 6:], first.state, form="recurrent").logits
        assert relative_error(torch.cat([first.logits, rest], 1), whole) < 1e-12


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("model", ["transformer", "retnet", "yuan", "hybrid"])
def test_gradients_are_the_sum_of_those_of_the_documents_alone(model, name):
    net = moved(make(model, spec(name)))
    weight = torch.randn(3, 15, 20, dtype=torch.float64) * (DOCUMENTS >= 0)[..., None]
    learned = [p for p in net.parameters() if p.requires_grad]

    def gradients(loss):
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, learned)])

    separate = sum((alone(net, (r, b, e)) * weight[r, b:e]).sum() for r, b, e in PIECES)
    want = gradients(separate)
    for form in (None, "chunkwise", "recurrent"):
        together = net(TOKENS, documents=DOCUMENTS, form=form).logits
        assert relative_error(gradients((together * weight).sum()), want) < 1e-11, form
    state, total = net.init_state(3), 0
    for begin, end in ((0, 4), (4, 5), (5, 15)):
        output = net(TOKENS[:, begin:end], state, DOCUMENTS[:, begin:end])
        state, total = output.state, total + (output.logits * weight[:, begin:end]).sum()
    assert relative_error(gradients(total), want) < 1e-11


@pytest.mark.parametrize("model", ["transformer", "retnet"])
def test_gradients_are_those_of_differences(model):
    net = moved(make(model, spec("PTuningV2", length=2), depth=1))
    (name,) = [n for n, p in net.named_parameters() if p.requires_grad]

    def loss(parameter):
        given = {name: parameter}
        arguments = {"documents": DOCUMENTS[1:2]}
        return torch.func.functional_call(net, given, (TOKENS[1:2],), arguments).logits

    parameter = net.get_parameter(name).detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(loss, parameter, fast_mode=True)


def test_a_prompt_behind_a_prefix():
    """The prompt is read from where the prefix starts."""
    adapters = {"a": spec("PTuningV2", tokens=[3, 1]), "b": spec("PromptTuning", tokens=[4, 1, 5])}
    for model in MODELS.keys() - {"abacus"}:  # whose embedding adds a row to that of a word
        net, base = archzoo.adapt(make(model), adapters), make(model)
        read = torch.tensor([[3, 1, 4, 1, 5]])
        with torch.no_grad():
            got = net(TOKENS, documents=DOCUMENTS).logits
            for row, begin, end in PIECES:
                text = torch.cat([read, TOKENS[row : row + 1, begin:end]], 1)
                want = base(text).logits[:, 5:]
                assert relative_error(alone(net, (row, begin, end)), want) < 1e-12
                assert relative_error(got[row : row + 1, begin:end], want) < 1e-12
            with archzoo.disable_adapters(net):
                assert torch.equal(net(TOKENS).logits, base(TOKENS).logits)


@pytest.mark.parametrize("name", METHODS)
def test_looped_models_read_a_prompt_in_every_iteration(name):
    net = moved(make("retnet", spec(name), loops=3, injection="loop"))
    with torch.no_grad():
        got = net(TOKENS, documents=DOCUMENTS).logits
        for piece in PIECES:
            row, begin, end = piece
            assert relative_error(got[row : row + 1, begin:end], alone(net, piece)) < 1e-12


# ---------------------------------------------------------------------------- decoding


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("model", MODELS)
def test_decoding_writes_what_reading_the_whole_text_gives(model, name, tmp_path):
    net = moved(make(model, spec(name)))
    calls = []
    for _, adapter in adapter_modules(net):
        for method in ("prompt", "prefix"):
            make_it = getattr(adapter, method)
            setattr(adapter, method, lambda f=make_it, a=adapter: calls.append(a) or f())
    prompts = [[3, 1, 4], [1, 5, 9, 2, 6], [5]]
    want = archzoo.generate(net, prompts, max_tokens=12, check=True).tokens
    calls.clear()
    # With a second token there is no more to compute than with twelve.
    counts = []
    for number in (2, 12):
        calls.clear()
        assert archzoo.generate(net, prompts, max_tokens=number).tokens == [
            row[:number] for row in want
        ]
        counts.append(len(calls))
    assert counts[0] == counts[1] <= 2 * len(list(adapter_modules(net)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert archzoo.generate(net, prompts, max_tokens=12, graph=True).tokens == want
    alone = archzoo.generate(net, prompts[1], max_tokens=12, graph=True).tokens
    assert alone == want[1:2]
    beams = archzoo.beam_search(net, prompts, beams=1, max_tokens=12)
    assert [row[0] for row in beams.tokens] == want
    held = archzoo.generate(net, prompts, max_tokens=5, keep_state=True).conversation
    archzoo.save_state(tmp_path / "state", held, net)
    again = archzoo.load_state(tmp_path / "state", net)
    rest = archzoo.generate(net, None, conversation=again, max_tokens=7).tokens
    assert [row[5:] for row in want] == rest


@pytest.mark.parametrize("name", METHODS)
def test_training_and_steps_wait_for_no_device(name):
    """On the meta device nothing has a value that could be waited for."""
    net = make("hybrid", spec(name)).to("meta")
    tokens, documents = TOKENS.to("meta"), DOCUMENTS.to("meta")
    for given in (None, documents):
        net(tokens, documents=given).logits.sum().backward()
        with torch.no_grad():
            state = net(tokens, net.init_state(3), given).state
            assert net(tokens[:, :1], state, form="recurrent").logits.shape == (3, 1, 20)


def test_a_training_step_is_one_graph():
    net = archzoo.adapt(make("retnet"), {"a": spec("PrefixTuning"), "b": spec("PromptTuning")})
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    got = compiled(TOKENS, documents=DOCUMENTS).logits
    assert relative_error(got, net(TOKENS, documents=DOCUMENTS).logits) < 1e-12


# ---------------------------------------------------------------------------- as a user runs it


@pytest.mark.parametrize(
    ("name", "arguments", "preset", "kind"),
    [
        ("PrefixTuning", {"hidden": 8}, "transformer_micro", "addition"),
        ("PTuning", {}, "retnet_micro", "stream"),  # the state is carried from batch to batch
    ],
)
def test_a_resumed_run_is_the_same_run(name, arguments, preset, kind, tmp_path):
    def fit(directory, adapter, weights=None, kill=None, resume=False):
        directory.mkdir(exist_ok=True)
        lightning.seed_everything(0)
        how = {"warmup_steps": 2, "learning_rate": 1e-2, "adapter": adapter, "weights": weights}
        model = LanguageModel(None if weights else preset, **how)
        trainer = lightning.Trainer(
            accelerator="cpu",
            default_root_dir=directory,
            max_steps=5 if adapter else 1,
            limit_val_batches=0,
            enable_progress_bar=False,
            enable_model_summary=False,
            logger=False,
            plugins=[CheckpointFiles()],
            callbacks=[Checkpoints(every_n_steps=2), *([KillAfter(kill)] if kill else [])],
        )
        task = addition() if kind == "addition" else stream(tmp_path)
        path = str(directory / "last.ckpt")
        try:
            trainer.fit(model, task, ckpt_path=path if resume else None)
        except Killed:
            assert kill
        return model.net.state_dict()

    fit(tmp_path / "base", None)
    begin = str(tmp_path / "base" / "last.ckpt")
    adapter = spec(name, **arguments)
    whole = fit(tmp_path / "whole", adapter, begin)
    fit(tmp_path / "parts", adapter, begin, kill=3)
    resumed = fit(tmp_path / "parts", adapter, begin, resume=True)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


def test_a_prompt_is_trained_saved_alone_and_used_from_the_command_line(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    quick = ["--trainer.enable_progress_bar", "false", "--trainer.default_root_dir"]
    run = ["--data", "Addition", "--data.digits", "1", "--trainer.accelerator", "cpu"]
    few = ["--trainer.max_steps", "1", *quick]
    assert main(["fit", "--model.preset", "retnet_micro", *run, *few, "base"]) == 0
    (base,) = tmp_path.glob("base/**/last.ckpt")
    adapter = ["--model.adapter", "PTuning", "--model.adapter.length", "4"]
    assert main(["fit", "--model.weights", str(base), *adapter, *few, "tuned"]) == 0
    (tuned,) = tmp_path.glob("tuned/**/last.ckpt")
    capsys.readouterr()
    assert main(["adapter", "save", str(tuned), "--out", "alone"]) == 0
    assert "PTuning of 128 parameters in 1 place" in capsys.readouterr().out
    assert main(["generate", str(base), "1+2=", "--adapter", "alone", "--max_tokens", "2"]) == 0
    alone = capsys.readouterr().out
    assert main(["generate", str(tuned), "1+2=", "--max_tokens", "2"]) == 0
    assert alone.splitlines()[0] == capsys.readouterr().out.splitlines()[0]
