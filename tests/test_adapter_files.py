"""An adapter alone as a directory, and the base that it belongs to."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import archzoo
from archzoo.adapters.attach import adapter_modules, attached
from archzoo.checkpoint import load, weights_digest
from archzoo.decoder import Decoder
from archzoo.parts import list_parts
from archzoo.tasks import Addition

TOKENS = torch.randint(14, (2, 9), generator=torch.Generator().manual_seed(0))
TARGETS = ["query", "up", "router_value"]  # a fused matrix, stacked experts, a router


def scrambled(net: Decoder) -> Decoder:
    """With adapters that have learned something."""
    for _, module in adapter_modules(net):
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.3)
    return net


def lora(**arguments: object) -> functools.partial:
    return functools.partial(archzoo.LoRA, **{"rank": 2, "targets": TARGETS} | arguments)


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A whole model of yuan's kind in the directory `base`, under the current directory."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    task = Addition(digits=1)
    net = archzoo.create_model("yuan_micro", vocab_size=task.vocab_size)
    archzoo.save_pretrained("base", net, task.tokenizer, task.config())
    return Path("base")


def adapted(base: Path, **arguments: object) -> Decoder:
    return scrambled(archzoo.adapt(load(base).model, lora(**arguments)))


def logits(net: Decoder) -> torch.Tensor:
    with torch.no_grad():
        return net.eval()(TOKENS).logits


def test_an_adapter_is_written_alone_and_put_on_its_base_again(base: Path) -> None:
    net = adapted(base, layers=[1])
    net.task = Addition(digits=2).config()
    archzoo.save_adapter("sums", net)
    content = json.loads(Path("sums/adapter.json").read_text())
    assert content["adapter"]["class_path"] == "LoRA"
    assert content["adapter"]["init_args"]["rank"] == 2
    assert "layers" not in content["adapter"]["init_args"]
    paths = content["adapter"]["init_args"]["targets"]
    assert paths == [
        "blocks.1.mixer.query_key_value.query",
        "blocks.1.feed_forward.router.projection.router_value",
        "blocks.1.feed_forward.experts.gate_up.up",
    ]
    with safe_open(base / "model.safetensors", "pt") as file:
        digest = file.metadata()["digest"]
    assert content["base"] == {"path": "base", "digest": digest, "dtype": "float32"}
    tensors = load_file("sums/adapter.safetensors")
    assert tensors.keys() == {f"{path}.{name}" for path in paths for name in ("first", "second")}
    assert Path("sums/adapter.safetensors").stat().st_size < 20_000
    # On the base that is loaded again; by its place; and as a model that is read by its path.
    again = archzoo.load_adapter("sums", load(base).model)
    assert torch.equal(logits(again), logits(net))
    assert again.task == net.task
    learn = {name for name, parameter in again.named_parameters() if parameter.requires_grad}
    assert learn == {n for n, p in net.named_parameters() if p.requires_grad}
    found = load("sums")
    assert torch.equal(logits(found.model), logits(net))
    assert found.task == net.task and found.tokenizer is not None
    assert load("sums/adapter.json").model.config == found.model.config
    archzoo.remove_adapters(again)
    assert weights_digest(again.state_dict()) == digest


def test_another_base_is_refused_by_its_digest(base: Path) -> None:
    net = adapted(base)
    archzoo.save_adapter("sums", net)
    other = load(base).model
    with torch.no_grad():
        other.head.weight[0, 0] += 1e-3
    digests = [weights_digest(load(base).model.state_dict()), weights_digest(other.state_dict())]
    with pytest.raises(ValueError, match="belongs to another base") as error:
        archzoo.load_adapter("sums", other)
    message = str(error.value)
    assert "\n" not in message and "(read from base)" in message
    assert all(digest[:12] in message for digest in digests)
    assert not list(adapter_modules(other)) and other.config["adapter"] is None
    archzoo.save_pretrained(base, other)
    with pytest.raises(ValueError, match="belongs to another base"):
        load("sums")


def test_a_base_that_moved_is_asked_for(base: Path) -> None:
    archzoo.save_adapter("sums", adapted(base))
    base.rename("moved")
    with pytest.raises(FileNotFoundError, match=r"base 'base' is not there.*--base PLACE"):
        load("sums")
    found, _ = archzoo.from_pretrained("sums", base="moved")
    assert found.base_path == "moved"
    archzoo.save_adapter("nowhere", archzoo.adapt(archzoo.create_model("yuan_micro"), lora()))
    with pytest.raises(ValueError, match="names no base"):
        load("nowhere")
    with pytest.raises(ValueError, match="is an adapter itself"):
        load("sums", base="sums")


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16])
def test_a_model_in_another_dtype_is_known_where_nothing_was_lost(
    base: Path, kept: torch.dtype
) -> None:
    archzoo.save_pretrained(base, load(base).model.to(kept))
    net = adapted(base)
    archzoo.save_adapter("sums", net)
    wider = archzoo.load_adapter("sums", load(base).model.double())
    assert {p.dtype for p in wider.parameters()} == {torch.float64}
    assert torch.equal(logits(wider.to(kept)), logits(net))
    if kept is torch.float32:
        narrow = load(base).model.bfloat16()
        with pytest.raises(ValueError, match="a model that is to be cast is cast afterwards"):
            archzoo.load_adapter("sums", narrow)


def test_what_cannot_be_saved_or_loaded_is_said_in_a_line(base: Path) -> None:
    plain = load(base).model
    with pytest.raises(ValueError, match="the model has no adapter to save"):
        archzoo.save_adapter("sums", plain)
    several = archzoo.adapt(plain, {"sums": lora(), "style": lora(rank=1)})
    with pytest.raises(ValueError, match="has the adapters sums, style: name the one"):
        archzoo.save_adapter("sums", several)
    with pytest.raises(ValueError, match="no adapter 'stile'; nearest: style"):
        archzoo.save_adapter("sums", several, "stile")
    with pytest.raises(TypeError, match="directory is a Decoder and not a path: call save_adapter"):
        archzoo.save_adapter(several, "sums")  # type: ignore[arg-type]
    assert not Path("sums").exists()
    archzoo.save_adapter("style", scrambled(several), "style")
    names = load_file("style/adapter.safetensors").keys()
    assert not [name for name in names if "adapter_modules" in name or "style" in name]
    with pytest.raises(FileNotFoundError, match=r"base holds no adapter\.json"):
        archzoo.load_adapter(base, load(base).model)
    Path("style/adapter.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"style holds no adapter\.safetensors"):
        archzoo.load_adapter("style", load(base).model)


def test_adapters_of_several_directories_go_on_one_base_by_names(base: Path) -> None:
    several = {"sums": lora(), "style": lora(rank=1, targets=["query", "value"])}
    net = scrambled(archzoo.adapt(load(base).model, several))
    for name in several:
        archzoo.save_adapter(f"of/{name}", net, name)
    again = load(base).model
    learned = {name for name, parameter in again.named_parameters() if parameter.requires_grad}
    archzoo.load_adapter("of/sums", again, "sums")
    query = again.blocks[0].mixer.query_key_value.adapter_modules["sums"]["query"]
    archzoo.load_adapter("of/style", again)  # by the directory's name
    assert again.blocks[0].mixer.query_key_value.adapter_modules["sums"]["query"] is query
    assert list(again.config["adapters"]) == ["sums", "style"] and not again.config["adapter"]
    assert torch.equal(logits(again), logits(net))
    assert again.state_dict().keys() == net.state_dict().keys()
    learn = {name for name, parameter in again.named_parameters() if parameter.requires_grad}
    assert learn == again.state_dict().keys() - load(base).model.state_dict().keys()
    archzoo.save_pretrained("whole", again)
    assert torch.equal(logits(load("whole").model), logits(net))
    with pytest.raises(ValueError, match="has an adapter 'style' already: give another name"):
        archzoo.load_adapter("of/style", again)
    with pytest.raises(ValueError, match=r"adapter name 'a\.b' is not valid"):
        archzoo.load_adapter("of/style", again, "a.b")
    archzoo.remove_adapters(again)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == learned


def test_two_prompts_do_not_go_on_one_base(base: Path) -> None:
    archzoo.save_adapter("one", archzoo.adapt(load(base).model, Prompted))
    archzoo.save_adapter("two", scrambled(archzoo.adapt(load(base).model, Prompted)))
    net = archzoo.load_adapter("one", load(base).model)
    before = logits(net)
    with pytest.raises(ValueError, match="both change embedding"):
        archzoo.load_adapter("two", net, "two")
    with pytest.raises(ValueError, match="has this adapter already, by the name 'default': what"):
        archzoo.load_adapter("one", net, "two")
    assert torch.equal(logits(net), before) and net.config["adapters"] is None


def test_what_made_a_prompt_is_not_handed_on(base: Path) -> None:
    tuned = functools.partial(archzoo.PTuning, length=3)
    net = scrambled(archzoo.adapt(load(base).model, tuned))
    archzoo.save_adapter("tuned", net)
    assert [*load_file("tuned/adapter.safetensors")] == ["embedding.vectors"]
    again = load("tuned").model
    torch.testing.assert_close(logits(again), logits(net))
    assert len(net.state_dict()) > len(again.state_dict())  # it is trained on with its network


class Prompted(archzoo.Adapter):
    """Vectors before the text, and a buffer that is not trained."""

    kinds = ("input",)
    default_targets = ("input",)
    identity_at_start = False

    def __init__(self, target, *, targets=None, layers=None, length: int = 3):
        super().__init__(target, targets=targets, layers=layers)
        self.vectors = nn.Parameter(torch.empty(length, *target.shape))
        self.register_buffer("drawn", torch.arange(length))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.normal_(self.vectors)

    def prompt(self):
        return self.vectors + self.drawn[:, None]


class Started(archzoo.Adapter):
    """A learned state that every document starts from."""

    kinds = ("state",)
    default_targets = ("state",)
    identity_at_start = False

    def __init__(self, target, *, targets=None, layers=None):
        super().__init__(target, targets=targets, layers=layers)
        self.names = list(target.state)
        for name, shape in target.state.items():
            shape = [size or 2 for size in shape]
            self.register_parameter(f"of_{name}", nn.Parameter(torch.empty(shape)))
        self.reset_parameters()

    def reset_parameters(self):
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    def prefix(self):
        return {name: getattr(self, f"of_{name}") for name in self.names}


@pytest.mark.parametrize("cls", [Prompted, Started])
def test_prompts_and_states_are_written_alone(base: Path, cls: type[archzoo.Adapter]) -> None:
    net = scrambled(archzoo.adapt(load(base).model, cls))
    if cls is Prompted:
        net.prompt["default"].drawn += 7
    archzoo.save_adapter("start", net)
    assert torch.equal(logits(load("start").model), logits(net))


def test_a_compiled_model_is_written_as_the_model(base: Path) -> None:
    net = adapted(base)
    compiled = torch.compile(net)
    archzoo.save_adapter("sums", compiled)  # type: ignore[arg-type]
    assert torch.equal(logits(load("sums").model), logits(net))


def test_a_failed_write_changes_nothing(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = adapted(base)
    archzoo.save_adapter("sums", net)
    before = {file.name: file.read_bytes() for file in Path("sums").iterdir()}

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("archzoo.checkpoint.pretrained.save_file", full)
    with pytest.raises(OSError, match="cannot be written to sums"):
        archzoo.save_adapter("sums", scrambled(net))
    assert before == {file.name: file.read_bytes() for file in Path("sums").iterdir()}
    assert not [path for path in Path().iterdir() if path.name.startswith(".")]


# ---------------------------------------------------------------------------- strangers


def edited(**changes: object) -> None:
    file = Path("sums/adapter.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def of(class_path: object = "LoRA", **arguments: object) -> dict[str, object]:
    given = {"rank": 2, "targets": ["blocks.0.mixer.query_key_value.query"]} | arguments
    return {"class_path": class_path, "init_args": given}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"adapter": None}, "it has no 'adapter'"),
        ({"adapter": "LoRA"}, "it has no 'adapter'"),
        ({"adapter": of("os.system")}, "'os.system' is not a"),
        ({"adapter": of("evil.Adapter")}, "'evil.Adapter' is not imported"),
        ({"adapter": of("Attention")}, "there is no adapter 'Attention'"),
        ({"adapter": of(7)}, "it takes a part's name, or its class_path"),
        ({"adapter": of(rank="2")}, "rank='2' is not valid: it takes int"),
        ({"adapter": of(rank=3, targets=TARGETS)}, "has shape"),
        ({"adapter": of(rank=10**9)}, "rank=1000000000 must be at least 1 and at most"),
        ({"adapter": of(rank=2**62)}, "at most"),
        ({"adapter": of(rank=-1)}, "rank=-1 must be at least 1"),
        ({"adapter": of(spoon=1)}, "LoRA has no argument 'spoon'"),
        ({"adapter": of(targets=["(a+)+$"])}, "a file may hold no regular expression"),
        ({"adapter": of(targets=["query"] * 20_000)}, "20,000 targets, more than is read"),
        ({"adapter": of(targets=["quary"])}, "nothing here is called 'quary'"),
        ({"adapter": of(layers=[10**9])}, "layer 1000000000 is not one of"),
        ({"adapter": of(targets=["embedding"])}, "LoRA cannot change embedding"),
        ({"adapter": of()}, "they have blocks.0"),
        ({"base": None}, "its base None is not valid"),
        ({"base": {"path": 3, "digest": "0" * 64, "dtype": "float32"}}, "is not valid"),
        ({"base": {"path": "base", "digest": "0" * 64, "dtype": "int8"}}, "is not valid"),
        ({"base": {"path": "base", "digest": "0" * 64, "dtype": []}}, "is not valid"),
        ({"base": {"path": "base", "digest": "0" * 64, "dtype": "float32"}}, "another base"),
        ({"base": {"path": "base", "digest": "xyz", "dtype": "float32"}}, "is not valid"),
        ({"task": {"class_path": "Addition"}}, "task=.* is not valid"),
        ({"task": {"class_path": "Addition", "init_args": {"digits": 10**9}}}, "is more than"),
    ],
)
def test_a_strangers_adapter_is_refused_in_a_line(
    base: Path, changes: dict[str, object], says: str
) -> None:
    archzoo.save_adapter("sums", adapted(base))
    edited(**changes)
    net = load(base).model
    for read in (lambda: archzoo.load_adapter("sums", net), lambda: load("sums")):
        with pytest.raises(ValueError, match=says) as error:
            read()
        assert "\n" not in str(error.value) and "sums" in str(error.value)
        assert len(str(error.value)) < 1000
    assert not list(adapter_modules(net)) and net.config["adapter"] is None
    assert all(parameter.requires_grad for parameter in net.parameters())


@pytest.mark.parametrize("place", ["/etc/passwd", "../base", "~/base", "/dev/zero", "http://a/b"])
def test_a_base_outside_is_not_read_because_a_file_names_it(
    base: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    archzoo.save_adapter("sums", adapted(base))
    record = json.loads(Path("sums/adapter.json").read_text())["base"]
    edited(base=record | {"path": place})
    with pytest.raises(ValueError, match=r"its base .*--base PLACE") as error:
        load("sums")
    assert "\n" not in str(error.value)
    assert load("sums", base="base").model.base_path == "base"


def test_damaged_tensors_are_refused_in_a_line(base: Path) -> None:
    archzoo.save_adapter("sums", adapted(base))
    file = Path("sums/adapter.safetensors")
    whole = file.read_bytes()
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    first = min(tensors)

    def refused(says: str) -> None:
        net = load(base).model
        with pytest.raises(ValueError, match=says) as error:
            archzoo.load_adapter("sums", net)
        assert "\n" not in str(error.value) and "sums" in str(error.value)
        assert not list(adapter_modules(net))

    file.write_bytes(whole[:-10])
    refused("truncated or damaged")
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    refused("by their digest")
    file.write_bytes(b"")
    refused("truncated or damaged")
    for change, says in (
        ({first: tensors[first].to(torch.int64)}, "is int64 where float32 or the like"),
        ({first: tensors[first].to(torch.float8_e4m3fn)}, "F8_E4M3: that is not read"),
        ({first: tensors[first][..., :-1].contiguous()}, "has shape"),
        ({"head.weight": torch.zeros(3)}, "they have head.weight"),
        ({"x" * 5000: torch.zeros(3)}, "they have xxx"),
    ):
        save_file(tensors | change, file)
        refused(says)
    del tensors[first]
    save_file(tensors, file)
    refused(f"they miss {first}")


@pytest.mark.parametrize("name", list_parts("adapter"))
def test_every_method_is_written_alone(base: Path, name: str) -> None:
    net = load(base).model
    archzoo.adapt(net, name)
    for _, module in adapter_modules(net):
        for parameter in module.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    archzoo.save_adapter("alone", net)
    torch.testing.assert_close(logits(load("alone").model), logits(net), rtol=1e-5, atol=1e-5)
    held = sum(tensor.numel() for tensor in load_file("alone/adapter.safetensors").values())
    archzoo.collapse_adapters(net)
    left = [adapter.state_dict().values() for _, _, adapter in attached(net)]
    assert held == sum(tensor.numel() for tensors in left for tensor in tensors)
