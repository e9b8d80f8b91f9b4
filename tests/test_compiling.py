"""`fit --compile`: what is compiled, that it changes no step, and what is said."""

import copy
import subprocess
import sys
from types import SimpleNamespace

import lightning
import pytest
import torch
from kernel_device import GPU
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch._dynamo.backends.registry import lookup_backend

import archzoo
from archzoo.tasks.text import Text
from archzoo.training import compiling
from archzoo.training.compiling import CompileModel
from archzoo.training.module import LanguageModel


def net_of(name="retnet_micro", **options):
    torch.manual_seed(0)
    return archzoo.create_model(name, vocab_size=16, depth=1, **options).train()


def gradients(net, tokens):
    x, _, _ = net.hidden(tokens)
    weights = [weight for name, weight in net.named_parameters() if name != "head.weight"]
    return x, *torch.autograd.grad((x * torch.arange(x.shape[-1])).sum(), weights)


@pytest.mark.parametrize("compile", ["compile", "compile_blocks"])
def test_python_compiles_as_fit_does_on_a_gpu(compile, monkeypatch):
    net, seen = net_of(), []
    monkeypatch.setattr(torch, "compile", lambda call, **given: seen.append(given) or call)
    getattr(net, compile)(fullgraph=True)
    monkeypatch.setattr(type(net), "device", torch.device("cuda"))
    getattr(net, compile)(fullgraph=True, mode=None)
    for own in ({"backend": "eager"}, {"mode": "max-autotune"}, {"options": {}}):
        getattr(net, compile)(**own)
        assert seen.pop() == own
    asked = {"fullgraph": True, "mode": None, "options": compiling.options()}
    assert seen == [{"fullgraph": True}, asked]


@pytest.mark.parametrize("name", ["retnet_micro", "transformer_micro"])
def test_a_compiled_model_trains_as_it_is(name):
    net, tokens = net_of(name), torch.randint(16, (2, 9))
    names = list(net.state_dict())
    wanted = gradients(net, tokens)
    net.compile(backend="aot_eager", fullgraph=True)
    found = gradients(net, tokens)
    for mine, true in zip(found, wanted, strict=True):
        assert (mine - true).norm() < 1e-5 * true.norm()
    assert list(net.state_dict()) == names


def test_only_training_is_compiled_and_a_copy_is_not():
    net, tokens = net_of(), torch.randint(16, (2, 9))
    calls = []
    net.compile(backend=lambda graph, _: calls.append(graph) or graph.forward)
    with torch.no_grad():
        net.hidden(tokens)
    net.eval()
    net.hidden(tokens)
    assert not calls
    assert copy.deepcopy(net).compiled_hidden is None
    net.train().hidden(tokens)
    assert calls


def test_blocks_are_compiled_once_for_all_of_them():
    torch.manual_seed(0)
    net = archzoo.create_model("retnet_micro", vocab_size=16, depth=3).train()
    tokens = torch.randint(16, (2, 9))
    names = list(net.state_dict())
    wanted = gradients(net, tokens)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return lookup_backend("aot_eager")(graph, inputs)

    net.compile_blocks(backend=backend, fullgraph=True)
    found = gradients(net, tokens)
    for mine, true in zip(found, wanted, strict=True):
        assert (mine - true).norm() < 1e-5 * true.norm()
    assert len(graphs) == 1 and list(net.state_dict()) == names
    assert copy.deepcopy(net).blocks[0].compiled_run is None
    net.eval()(tokens)
    assert len(graphs) == 1
    net.train().forget_compiled()
    net.hidden(torch.ones(3, 7).int())
    assert len(graphs) == 1


def test_blocks_of_several_kinds_are_compiled_each():
    options = {"mixer": None, "depth": 12, "pattern": ["Retention", "Attention", "Retention"]}
    torch.manual_seed(0)
    net = archzoo.create_model("retnet_micro", vocab_size=16, **options).train()
    tokens = torch.tensor([[3, 1, 4]])
    wanted = gradients(net, tokens)
    torch._dynamo.reset()
    net.compile_blocks(backend="aot_eager", fullgraph=True)
    found = gradients(net, tokens)
    for mine, true in zip(found, wanted, strict=True):
        assert (mine - true).norm() < 1e-5 * true.norm()


def trainer_of(
    world_size=1, accumulate_grad_batches=1, precision="bf16-mixed", callbacks=(), strategy=None
):
    return SimpleNamespace(
        world_size=world_size, accumulate_grad_batches=accumulate_grad_batches,
        precision=precision, callbacks=callbacks, strategy=strategy,
    )  # fmt: skip


def callback_says(when, module, capfd):
    module._trainer = SimpleNamespace(datamodule=None)
    CompileModel(when).on_train_start(trainer_of(), module)
    return capfd.readouterr().err


class OnGPU(LanguageModel):
    device = torch.device("cuda")


def module_of(device, **options):
    module = LanguageModel(preset="retnet_micro", vocab_size=16, **options)
    if device == "cuda":  # it says so, and holds nothing there
        module.__class__ = OnGPU
    return module


def test_auto_compiles_large_models_on_a_gpu_alone(monkeypatch, capfd):
    module = module_of("cpu")
    assert callback_says("auto", module, capfd) == ""
    assert module.net.compiled_hidden is None
    module.__class__ = OnGPU
    assert callback_says("auto", module, capfd) == ""  # too small
    assert module.net.compiled_hidden is None
    monkeypatch.setattr(compiling, "LEAST", 0)
    monkeypatch.setattr(compiling, "missing", lambda: None)
    assert "compiling the model; --compile false" in callback_says("auto", module, capfd)
    assert module.net.compiled_hidden is not None
    assert callback_says(False, module, capfd) == ""
    assert module.net.compiled_hidden is None


class DeepSpeed(DeepSpeedStrategy):
    """Where it is not installed."""

    def __init__(self):
        self.config = {"zero_optimization": {"stage": 1}}


def test_graphs_are_refused_where_something_of_a_step_is_kept(tmp_path, capfd):
    (tmp_path / "text.txt").write_text("to be or not to be " * 20)
    carried = Text(path=str(tmp_path / "text.txt"), tokenizer="characters", carry_state=True)

    def start(device="cuda", task=None, trainer=None, **options):
        module = module_of(device, **options)
        module._trainer = SimpleNamespace(datamodule=task)
        CompileModel("graphs").on_train_start(trainer or trainer_of(), module)
        assert module.net.compiled_hidden is not None

    def refused(**given):
        with pytest.raises(ValueError, match=r"^--compile graphs: .*: take --compile true$") as got:
            start(**given)
        return str(got.value)

    start()
    start(feed_forward="MixtureOfExperts")
    assert "compiling the model" in capfd.readouterr().err
    assert "NVIDIA GPU" in refused(device="cpu")
    assert "other processes" in refused(trainer=trainer_of(world_size=2))
    assert "micro-batch" in refused(trainer=trainer_of(accumulate_grad_batches=2))
    later = GradientAccumulationScheduler({0: 1, 4: 2})
    assert "micro-batch" in refused(trainer=trainer_of(callbacks=[later]))
    assert "DeepSpeed takes" in refused(trainer=trainer_of(strategy=DeepSpeed()))
    assert "from one batch to the next" in refused(task=carried)
    assert "twice in a step" in refused(loops=3, progressive_loss=0.5)
    mixture = {"feed_forward": "MixtureOfExperts"}
    assert "called" in refused(**mixture, linear="BinaryMoSLinear")
    assert "32-true" in refused(**mixture, trainer=trainer_of(precision="32-true"))
    start(trainer=trainer_of(precision="32-true"))
    assert "multiples of 8" in refused(**mixture, width=12)


class Elsewhere(torch.nn.Identity):
    """A part of a user's own."""


def test_auto_replays_mixtures_and_small_models(monkeypatch):
    monkeypatch.setattr(compiling, "LEAST", 0)
    monkeypatch.setattr(compiling, "missing", lambda: None)
    asked = []
    monkeypatch.setattr(compiling, "options", lambda graphs=False: asked.append(graphs) or {})

    def replayed(when="auto", part=None, trainer=None, **options):
        module = module_of("cuda", **{"mixer": "Attention"} | options)
        module._trainer = SimpleNamespace(datamodule=None)
        if part is not None:
            module.net.embedding.part = part
        CompileModel(when).on_train_start(trainer or trainer_of(), module)
        return asked.pop()

    mixture = {"feed_forward": "MixtureOfExperts"}
    assert replayed(**mixture)
    assert replayed("graphs")
    assert replayed()
    assert not replayed(mixer="FilteredAttention")  # none of these has been shown to run so
    assert replayed(adapter="LoRA")
    assert not replayed(adapter="DoRA")
    assert replayed(mixer="Retention")
    assert replayed(mixer="Retention", **mixture)
    assert not replayed(trainer=trainer_of(precision="32-true"))
    monkeypatch.setattr(compiling, "HOST_BOUND", 0)
    assert not replayed()
    assert not replayed(True, **mixture)
    assert not replayed(trainer=trainer_of(precision="32-true"), **mixture)
    assert not replayed(trainer=trainer_of(accumulate_grad_batches=2), **mixture)
    assert not replayed(part=Elsewhere(), **mixture)
    watched = torch.nn.Identity()
    assert replayed(part=watched, **mixture)
    watched.register_forward_hook(lambda *given: None)
    assert not replayed(part=watched, **mixture)


def test_a_run_that_fails_drops_what_graphs_wrote_over():
    module, callback = module_of("cpu"), CompileModel("graphs")
    weight = next(module.parameters())
    weight.grad = torch.ones_like(weight)
    callback.on_exception(None, module, KeyboardInterrupt())
    assert weight.grad is not None
    callback._replays = True
    callback.on_exception(None, module, KeyboardInterrupt())
    assert weight.grad is None


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize(
    ("preset", "options"),
    [
        ("skywork", {}),
        ("skywork", {"dropout": 0.1}),
        ("transformer", {"dropout": 0.1}),
        ("retnet", {}),
        ("retnet", {"dropout": 0.1}),
        ("retnet", {"adapter": "LoRA"}),
        ("transformer", {"adapter": "LoRA"}),
    ],
)
def test_a_replayed_run_is_the_run(preset, options, tmp_path, monkeypatch):
    """As near as runs without graphs whose weights start 1e-7 apart."""
    from torch._inductor.cudagraph_trees import CUDAGraphNode

    (tmp_path / "text.txt").write_text("to be or not to be, that is the question " * 40)

    class Apart(lightning.Callback):
        def __init__(self, seed):
            self.seed = seed

        def on_train_start(self, trainer, module):
            torch.manual_seed(self.seed)
            with torch.no_grad():
                for weight in module.net.parameters():
                    weight.mul_(1 + 1e-7 * torch.randn_like(weight))
            torch.manual_seed(0)  # of dropout, as in the others

    def trained(when, *callbacks):
        torch._dynamo.reset()
        lightning.seed_everything(0)
        module = LanguageModel(f"{preset}_micro", warmup_steps=2, **options)
        trainer = lightning.Trainer(
            accelerator="gpu", precision="bf16-mixed", max_steps=12, gradient_clip_val=1.0,
            val_check_interval=6, check_val_every_n_epoch=None, logger=False,
            enable_checkpointing=False, default_root_dir=tmp_path,
            callbacks=[CompileModel(when), *callbacks],
        )  # fmt: skip
        task = Text(
            path=str(tmp_path / "text.txt"), tokenizer="characters", context_length=32, batch_size=8
        )
        trainer.fit(module, task)
        assert module.net.compiled_hidden is not None
        weights = [weight.detach().double().flatten() for weight in module.net.parameters()]
        return torch.cat(weights).cpu()

    recorded = []  # graphs, of which a step has two: forward and backward
    begin = CUDAGraphNode.__init__
    monkeypatch.setattr(
        CUDAGraphNode, "__init__", lambda *a, **k: recorded.append(1) or begin(*a, **k)
    )
    first = trained(True)
    noise = max((trained(True, Apart(seed)) - first).norm() for seed in range(3))
    assert not recorded
    distance = (trained("graphs") - first).norm()
    assert len(recorded) == 2
    assert 0 < noise < 1e-2 * first.norm()
    assert distance <= 2 * noise, (float(distance), float(noise))


def test_auto_says_why_it_does_not_compile(monkeypatch, capfd):
    monkeypatch.setattr(compiling, "LEAST", 0)
    monkeypatch.setattr(compiling, "missing", lambda: None)
    assert compiling.reason_against(module_of("cuda", feed_forward="MixtureOfExperts")) is None
    module = module_of("cuda", loops=3, progressive_loss=0.5)
    assert "another number of iterations" in callback_says("auto", module, capfd)
    monkeypatch.setattr(compiling, "missing", lambda: "there is no C compiler (cc, gcc or clang)")
    module = module_of("cuda")
    said = callback_says("auto", module, capfd)
    assert said.startswith("the model is not compiled: there is no C compiler")
    assert "1.18 times" in said and said.count("\n") == 1
    assert module.net.compiled_hidden is None


def test_what_deepspeed_gathers_by_hooks_is_not_compiled(monkeypatch, capfd):
    monkeypatch.setattr(compiling, "stage_of", lambda strategy: 3)
    module = module_of("cuda")
    assert "gathers weights by hooks" in callback_says("auto", module, capfd)
    assert module.net.compiled_hidden is None
    for when, given in ((True, "true"), ("graphs", "graphs")):
        message = rf"--compile {given}: .*gathers weights by hooks.*--compile false"
        with pytest.raises(ValueError, match=message):
            callback_says(when, module, capfd)
    assert callback_says(False, module, capfd) == ""


def fails(*_, **__):
    def compute(*_):
        raise torch._dynamo.exc.Unsupported("no such thing\nand more")

    return compute


def test_what_cannot_be_compiled_is_trained_without(monkeypatch, capfd):
    monkeypatch.setattr(torch, "compile", fails)
    monkeypatch.setattr(compiling, "LEAST", 0)
    monkeypatch.setattr(compiling, "missing", lambda: None)
    module = module_of("cuda")
    callback_says("auto", module, capfd)
    x, _, _ = module.net.train().hidden(torch.randint(16, (1, 4)))
    assert x.shape[:2] == (1, 4) and module.net.compiled_hidden is None
    said = capfd.readouterr().err
    assert "cannot be compiled (Unsupported no such thing)" in said and said.count("\n") == 1
    callback_says(True, module, capfd)
    with pytest.raises(ValueError, match="--compile false trains without"):
        module.net.hidden(torch.randint(16, (1, 4)))


@pytest.mark.slow  # some 60 s: a C++ compiler does it on a CPU
def test_fit_compiles_and_writes_the_names_of_the_model(tmp_path):
    command = [sys.executable, "-m", "archzoo", "fit", "--data", "Addition", "--compile", "true"]
    command += ["--model.preset", "retnet_micro", "--trainer.max_steps", "2", "--name", "run"]
    command += ["--trainer.default_root_dir", str(tmp_path), "--data.batch_size", "4"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "compiling the model" in run.stderr and "compiled in" in run.stderr
    net, _ = archzoo.from_pretrained(tmp_path / "run" / "last.ckpt")
    assert (
        net.compiled_hidden is None
        and "compile: true" in (tmp_path / "run" / "config.yaml").read_text()
    )


@pytest.mark.parametrize("name", ["retnet_micro", "transformer_micro"])
def test_a_compiled_step_copies_no_constants_to_the_device(name):
    """Each would wait for the device: decays and frequencies are inputs of the graph, made once."""
    net, graphs = net_of(name), []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    net.compile(backend=backend, fullgraph=True)
    net.hidden(torch.randint(16, (2, 9)))
    (graph,) = graphs
    made = [node for node in graph.graph.nodes if node.target in (torch.tensor, torch.as_tensor)]
    assert not made
    held = [node.name for node in graph.graph.nodes if "numerics_compiled" in node.name]
    assert len(held) == len(set(held)) > 0


def test_a_compiled_retnet_takes_chunks_of_a_long_text(monkeypatch):
    """As in eager mode: torch 2.11 says within `torch.compile` that a model is being exported."""
    net, calls = net_of(), []
    mixer = type(net.blocks[0].mixer)
    chunkwise = mixer.chunkwise
    monkeypatch.setattr(mixer, "parallel", None)
    monkeypatch.setattr(mixer, "chunkwise", lambda *given: calls.append(1) or chunkwise(*given))
    net.compile(backend="eager", fullgraph=True)
    net.hidden(torch.randint(16, (1, 300)))
    assert calls
