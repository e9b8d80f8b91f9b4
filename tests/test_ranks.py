"""Several processes train as one: DDP and FSDP2 by Lightning's flags, on gloo."""

import csv
import functools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
from collections import Counter
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path

import lightning
import pytest
import torch
from families import MICRO
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.connectors import data_connector
from torch._dynamo.backends.registry import lookup_backend
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.tensor.debug import CommDebugMode
from torch.testing._internal.distributed.fake_pg import FakeStore

import archzoo
from archzoo.checkpoint import read_safely
from archzoo.checkpoint.loading import locate
from archzoo.checkpoint.runs import WHOLE
from archzoo.cli import main
from archzoo.training import compiling, losses, ranks, sharding

RUN = """
seed_everything: 0
model:
  preset: skywork_micro
  width: 16
  learning_rate: 5.0e-3
  warmup_steps: 2
  feed_forward:
    class_path: MixtureOfExperts
    init_args:
      balance: squared_mean
      balance_over: ranks
      adaptive: true
      coefficient: 1.0
      z_coefficient: 1.0e-3
      router: {class_path: LinearRouter, init_args: {bias_rate: 1.0e-2, logit_norm: 1.0}}
data: {class_path: Addition, init_args: {digits: 2, batch_size: 8, validation_examples: 20}}
trainer:
  accelerator: cpu
  max_steps: 4
  val_check_interval: 2
  log_every_n_steps: 1
  gradient_clip_val: 1.0
"""
DDP = ["--trainer.devices=2", "--trainer.strategy=ddp"]
FSDP2 = [
    "--trainer.devices=2",
    "--trainer.strategy=ModelParallelStrategy",
    "--trainer.strategy.data_parallel_size=2",
    "--trainer.strategy.tensor_parallel_size=1",
    "--trainer.strategy.save_distributed_checkpoint=false",
]
SHARDS = FSDP2[:-1]  # each process writes what it holds
# What is behind precision 64-true, a name that ModelParallelStrategy refuses.
FLOAT64 = "--trainer.plugins=lightning.pytorch.plugins.DoublePrecision"


@pytest.fixture
def directory(tmp_path, monkeypatch, programs):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    Path("run.yaml").write_text(RUN)
    return tmp_path


def together(name, *arguments):
    """`archzoo fit` with two processes, the second of which Lightning starts."""
    done = start(name, *arguments)
    assert done.returncode == 0, done.stderr[-3000:]


def start(name, *arguments, python="python"):
    """The same, however it ends."""
    return fits("--config", "run.yaml", "--name", name, *arguments, python=python)


def fits(*arguments, python="python"):
    """`archzoo fit` as a process of its own."""
    root = str(Path(archzoo.__file__).parent.parent)
    return subprocess.run(
        [python, "-m", "archzoo", "fit", *arguments],
        env=os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def one_of_two(directory, monkeypatch, strategy):
    """This process takes itself for the first of two; what they exchange is counted, by name."""
    if strategy is DDP:  # alone, which only the reductions see
        torch.distributed.init_process_group(
            "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
        )
    else:  # with no other
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(data_connector, "_InfiniteBarrier", nullcontext)  # it wants gloo
    calls = Counter()

    def counted(name, original):
        def call(*arguments, **options):
            calls[name] += 1
            if "output" in options:  # torch 2.11's fake group leaves in it what the memory held
                options["output"].copy_(options["input"][: len(options["output"])])
            return original(*arguments, **options)

        return call

    scatter = "reduce_scatter_single"  # the name of reduce_scatter_tensor since torch 2.13
    scatter = scatter if hasattr(torch.distributed, scatter) else "reduce_scatter_tensor"
    for name in ("all_reduce", scatter, "barrier", "broadcast"):
        original = getattr(torch.distributed, name)
        monkeypatch.setattr(torch.distributed, name, counted(name, original))
    yield calls
    torch.distributed.destroy_process_group()


ALONE = ["--trainer.enable_checkpointing=false", "--trainer.limit_val_batches=0"]
ALONE += ["--trainer.callbacks=own.Watch", "--import=own"]


def watch(**on):
    """A callback that the command line can name, own.Watch, with these hooks."""
    module = types.ModuleType("own")
    module.Watch = type("Watch", (lightning.Callback,), {"__module__": "own", **on})
    sys.modules["own"] = module


@pytest.mark.parametrize("strategy", [DDP, FSDP2], ids=["ddp", "fsdp2"])
def test_no_step_has_a_barrier(one_of_two, strategy):
    """Through NCCL the host would wait there for all that its GPU has to do."""
    seen = []
    watch(on_train_batch_start=lambda *_: seen.append(one_of_two.copy()))
    assert main(["fit", "--config", "run.yaml", "--name", "x", *strategy, *ALONE]) == 0
    steps = [after - before for before, after in pairwise(seen)]
    assert len(steps) == 3
    for step in steps:
        assert not step["barrier"] and not step["broadcast"] and step["all_reduce"]


@pytest.mark.parametrize("strategy", [DDP, FSDP2], ids=["ddp", "fsdp2"])
def test_gradients_are_exchanged_once_a_step(one_of_two, strategy):
    """However many micro-batches it has."""
    seen = []

    def count(state, bucket):
        one_of_two["reduce_scatter_single"] += 1
        return default_hooks.allreduce_hook(None, bucket)

    def begin(self, trainer, module):
        if strategy is DDP:
            trainer.model.register_comm_hook(None, count)

    def note(self, trainer, module, outputs, batch, number):
        seen.append(sum(n for name, n in one_of_two.items() if "scatter" in name))

    watch(on_train_start=begin, on_train_batch_end=note)
    accumulate = ["--trainer.accumulate_grad_batches=3", "--data.steps_per_epoch=5"]
    given = ["fit", "--config", "run.yaml", "--name", "x", *strategy, *ALONE, *accumulate]
    assert main([*given, "--trainer.max_steps=3", "--trainer.val_check_interval=5"]) == 0
    exchanged = [after > before for before, after in pairwise([0, *seen])]
    assert exchanged[3:] == [False, True, False, False, True]


def test_ddp_accumulates_where_gradients_are_computed(monkeypatch):
    """Made on another stream, as Lightning makes it, each parameter would wait for that one."""
    made = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda: pytest.fail("a stream of its own"))

    @functools.wraps(ranks.DistributedDataParallel)
    def wrapper(*given, **options):
        made.append((given, options))

    monkeypatch.setattr(ranks, "DistributedDataParallel", wrapper)
    strategy = DDPStrategy(parallel_devices=[torch.device("cuda", 0)], bucket_cap_mb=100)
    strategy.cluster_environment = types.SimpleNamespace(local_rank=lambda: 0)
    ranks.configure(strategy)
    strategy._setup_model("model")
    (given, options), *_ = made
    assert given == ("model",) and options["device_ids"] == [0]
    assert options["bucket_cap_mb"] == 100 and options["gradient_as_bucket_view"]


@pytest.mark.parametrize("strategy", [FSDP2], ids=["fsdp2"])
def test_the_fused_loss_gets_the_whole_head(one_of_two, strategy, monkeypatch):
    """In training and validation; it would refuse one rank's part, a DTensor."""
    seen = []

    def available(x, head):
        seen.append((type(head.weight), torch.is_grad_enabled()))
        return False

    monkeypatch.setattr(losses.kernels, "available", available)
    watch()
    validate = ["--trainer.limit_val_batches=1", "--trainer.max_steps=2"]
    assert main(["fit", "--config", "run.yaml", *strategy, *ALONE, *validate]) == 0
    assert set(seen) == {(torch.nn.Parameter, True), (torch.nn.Parameter, False)}


@pytest.mark.parametrize(
    ("strategy", "at_once", "quick"),
    [(DDP, 0, False), (DDP, 0, True), (FSDP2, 0, True), (FSDP2, 250_000_000, False)],
    ids=["ddp", "ddp, quickly", "fsdp2 by blocks", "fsdp2"],
)
def test_each_rank_compiles_what_it_exchanges_at_once(
    one_of_two, strategy, at_once, quick, monkeypatch, capfd
):
    """A block, or all of a sharded model that is not large, or of any where sums are quick."""
    weights = []
    monkeypatch.setattr(sharding, "AT_ONCE", at_once)
    monkeypatch.setattr(compiling, "sums_quickly", lambda trainer, size: quick)

    def backend(graph, inputs, **_):
        weights.append(sum(isinstance(value, torch.nn.Parameter) for value in inputs))
        return lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    watch()
    dense = [*ALONE, "--model.preset=retnet_micro", "--model.feed_forward=GatedFeedForward"]
    run = ["fit", "--config", "run.yaml", "--name", "x", *strategy, *dense, "--compile=true"]
    assert main(run) == 0
    assert "compiling the model" in capfd.readouterr().err
    whole = at_once or (quick and strategy is DDP)
    assert weights == [14 if whole else 6]  # one graph: of the model, or of all blocks and steps


def test_what_is_gathered_together_is_a_tenth_of_a_gpu_at_most(monkeypatch):
    """12 bytes a parameter: 1.2 G of them on a GPU of 144 GB, and 250 M of them on any.

    The ranks agree, or each would wait for what the other does not send.
    """
    on = types.SimpleNamespace(device_type="cuda", get_group=lambda: "ranks")
    like, least = torch.tensor, []
    monkeypatch.setattr(torch, "tensor", lambda number, device: like(number))

    def all_reduce(memory, operation, group):
        assert (operation, group) == (torch.distributed.ReduceOp.MIN, "ranks")
        memory.clamp_(max=least[-1])

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    for gigabytes, other, most in (  # here, on the other rank
        (144, 144, 1_200_000_000),
        (144, 80, 666_666_666),
        (80, 144, 666_666_666),
        (24, 24, 250_000_000),
    ):
        properties = types.SimpleNamespace(total_memory=gigabytes * 10**9)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda found=properties: found)
        least.append(other * 10**9)
        assert sharding.most_together(on) == most
    assert sharding.most_together(types.SimpleNamespace(device_type="cpu")) == 250_000_000


@pytest.mark.parametrize(
    ("milliseconds", "parameters", "quick"),
    # The sum of 64 MiB in 0.23 ms, as between two H200s, and in 1.1 ms, as over PCIe.
    [(0.23, 110_000_000, True), (0.23, 747_000_000, False), (1.1, 110_000_000, False)],
)
def test_gradients_are_summed_quickly(monkeypatch, milliseconds, parameters, quick):
    """In 5 ms: those of retnet_base on NVLink, and neither yuan_base's nor those over PCIe."""
    sums = []
    event = types.SimpleNamespace(record=lambda: None, elapsed_time=lambda end: milliseconds)
    monkeypatch.setattr(torch.cuda, "Event", lambda **_: event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *given: sums.append(given))
    like = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda size, device: like(size))
    monkeypatch.setattr(torch, "tensor", lambda number, device: like(()) + number)
    strategy = types.SimpleNamespace(root_device=torch.device("cuda"))
    trainer = types.SimpleNamespace(world_size=2, strategy=strategy)
    assert ranks.sums_quickly(trainer, 4 * parameters) == quick
    assert len(sums) == 7  # six are timed, and the seventh finds the slowest rank


@pytest.mark.parametrize("strategy", [FSDP2], ids=["fsdp2"])
def test_sharded_gradients_are_clipped_by_one_reduction(one_of_two, strategy):
    """Not by one for each of them."""
    counts = []

    def count(self, trainer, module):
        clip = module.configure_gradient_clipping

        def counted(*given, **options):
            with CommDebugMode() as seen:
                clip(*given, **options)
            counts.append(seen.get_total_counts())

        module.configure_gradient_clipping = counted

    watch(on_train_start=count)
    assert main(["fit", "--config", "run.yaml", "--name", "x", *strategy, *ALONE]) == 0
    assert counts == [1] * 4


def assert_same(one, other, allowed):
    """The losses, gradient norms and coefficients of two runs, and the weights at their ends."""
    logs = []
    for name in (one, other):
        with open(f"runs/{name}/metrics.csv") as file:
            logs.append(list(csv.DictReader(file)))
    looked = set()
    for mine, theirs in zip(*logs, strict=True):
        for name, value in mine.items():
            kept = ("loss", "gradient_norm", "coefficient", "exact_match")
            if value and any(word in name for word in kept):
                assert float(theirs[name]) == pytest.approx(float(value), rel=allowed), name
                looked.add(name)
    assert {"train/loss", "train/loss/balance/1", "train/loss/z/0", "validation/loss"} <= looked
    mine, theirs = (read_safely(f"runs/{name}/last.ckpt")["state_dict"] for name in (one, other))
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        if "alpha" in name or "expert_bias" in name:  # of counts alone
            assert torch.equal(value, theirs[name]), name
        else:
            assert torch.allclose(value, theirs[name], rtol=0, atol=allowed), name
    assert any("alpha" in name for name in mine) and any("expert_bias" in name for name in mine)


ROOT = Path(__file__).parent.parent


def equal(python, *arguments):
    """Runs `benchmarks/ranks.py equal`, which fails where processes are not one to 1e-12."""
    command = [python, "benchmarks/ranks.py", "equal", "--accelerator=cpu", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600
    )


def test_two_processes_are_one_in_every_family(programs):
    """In loss and gradients, to 1e-12 in float64, balancing losses included."""
    runs = [f"ddp/{name.removesuffix('_micro')}" for name in MICRO]
    runs += ["fsdp2/skywork", "fsdp2_blocks/skywork"]
    done = equal(programs / "python", "--runs", *runs)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("gradients_apart") == len(runs)


@pytest.mark.slow  # some 60 s, and of eight 200
@pytest.mark.parametrize("processes", [2, 4, 8])
def test_processes_are_one_in_every_family(processes):
    done = equal(sys.executable, f"--processes={processes}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("gradients_apart") == 4 * len(MICRO)


def test_two_ranks_are_one_process_with_the_whole_batch(directory):
    """To float64's last digits, in loss, gradients and weights, auxiliary losses included."""
    assert (
        main(["fit", "--config", "run.yaml", "--name", "one", "--trainer.precision=64-true"]) == 0
    )
    together("two", *DDP, "--trainer.precision=64-true")
    assert_same("one", "two", 1e-12)


def test_shards_of_two_processes_are_a_checkpoint_of_one(directory):
    """Its file is made of them when it is first read; a run is resumed from it by itself."""
    steady = ["--model.schedule=constant", "--model.warmup_steps=1"]
    together("half", *SHARDS, *steady, "--trainer.max_steps=2")
    half = Path("runs/half/last.ckpt")
    assert len(list(half.glob("*.distcp"))) == 2 and not (half / WHOLE).exists()
    fit = ["fit", "--config", "run.yaml", *steady, "--name"]
    assert main([*fit, "alone", "--ckpt_path", str(half)]) == 0
    assert (half / WHOLE).exists()
    assert main([*fit, "whole"]) == 0
    alone, whole = (read_safely(f"runs/{name}/last.ckpt") for name in ("alone", "whole"))
    for name, value in whole["state_dict"].items():
        assert torch.allclose(alone["state_dict"][name], value, rtol=0, atol=1e-5), name


def test_shards_are_resumed_by_the_settings_beside_them(directory, capsys):
    """They name two processes: one is told what to give, and either way trains the same weights."""
    steady = ["--model.schedule=constant", "--model.warmup_steps=1"]
    together("half", *SHARDS, *steady, "--trainer.max_steps=2")
    again = ["--ckpt_path=runs/half/last.ckpt", "--trainer.max_steps=4", "--trainer.devices=1"]
    assert main(["fit", *again]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: the strategy has data_parallel_size=2 and tensor_parallel_size=1 for 1 process: no "
        "part here is tensor parallel, so they must be 1 and 1: give "
        "--trainer.strategy.data_parallel_size 1, or --trainer.strategy auto"
    )
    ways = {"one": ["--trainer.strategy.data_parallel_size", "1"]}
    ways |= {"auto": ["--trainer.strategy", "auto"]}
    for name, way in ways.items():
        done = fits("--name", name, *again, *way)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "sync_dist" not in done.stderr  # which Lightning would ask for, of one process, too
    assert main(["fit", "--config", "run.yaml", "--name", "whole", *steady]) == 0
    whole = read_safely("runs/whole/last.ckpt")["state_dict"]
    for name in ways:
        end = read_safely(locate(f"runs/{name}"))["state_dict"]
        assert end.keys() == whole.keys()
        for key, value in whole.items():
            assert torch.allclose(end[key], value, rtol=0, atol=1e-5), key


@pytest.mark.parametrize(
    ("data", "tensor", "message"),
    [
        ("4", "1", "data_parallel_size=4 and .*: give --trainer.strategy.data_parallel_size 2$"),
        ("auto", "1", "data_parallel_size=1 and .*: give --trainer.strategy.data_parallel_size 2$"),
        (
            "auto",
            "auto",
            "=1 and tensor_parallel_size=2 .* 2 --trainer.strategy.tensor_parallel_si",
        ),
        (
            "1",
            "2",
            "=1 and tensor_parallel_size=2 for 2 processes: no part here is tensor parallel",
        ),
    ],
)
def test_sizes_that_are_not_the_number_of_processes_are_refused(
    data, tensor, message, directory, capsys
):
    """Before any of them is started."""
    sizes = [f"--trainer.strategy.data_parallel_size={data}"]
    sizes += [f"--trainer.strategy.tensor_parallel_size={tensor}"]
    assert main(["fit", "--config", "run.yaml", *FSDP2, *sizes]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(rf"^error: .*{message}", line)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [DDP, FSDP2, SHARDS], ids=["ddp", "fsdp2", "shards"])
def test_ranks_resume_where_they_ended(directory, strategy):
    """As if they had not ended, in several processes or in one; coefficients and biases, too."""
    steady = ["--model.schedule=constant", "--model.warmup_steps=1"]
    together("half", *strategy, *steady, "--trainer.max_steps=2")
    together("rest", *strategy, *steady, "--ckpt_path=runs/half/last.ckpt")
    fit = ["fit", "--config", "run.yaml", *steady, "--name"]
    assert main([*fit, "alone", "--ckpt_path", "runs/half/last.ckpt"]) == 0
    assert main([*fit, "whole"]) == 0
    ends = [read_safely(locate(f"runs/{name}")) for name in ("whole", "rest", "alone")]
    for name, value in ends[0]["state_dict"].items():
        for end in ends[1:]:
            assert torch.allclose(end["state_dict"][name], value, rtol=0, atol=1e-5), name


def sharded(name, processes, *arguments):
    """`archzoo fit` in more processes than there are cores, each started by itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    flags = [flag.replace("=2", f"={processes}") for flag in SHARDS]
    command = [sys.executable, "-m", "archzoo", "fit", "--config", "run.yaml", "--name", name]
    settings = os.environ | {"PYTHONPATH": str(Path(archzoo.__file__).parent.parent)}
    settings |= {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    running = [
        subprocess.Popen([*command, *flags, *arguments], env=settings | {"LOCAL_RANK": str(rank)})
        for rank in range(processes)
    ]
    assert [process.wait(300) for process in running] == [0] * processes


@pytest.mark.slow  # some 90 s
def test_shards_of_eight_processes_are_resumed_by_four_two_and_one(directory):
    """The weights end where those of one that never stopped do."""
    steady = ["--model.schedule=constant", "--model.warmup_steps=1"]
    sharded("eight", 8, *steady, "--trainer.max_steps=1")
    sharded("four", 4, *steady, "--trainer.max_steps=2", "--ckpt_path=runs/eight/last.ckpt")
    sharded("two", 2, *steady, "--trainer.max_steps=3", "--ckpt_path=runs/four/last.ckpt")
    assert len(list(Path("runs/eight/last.ckpt").glob("*.distcp"))) == 8
    fit = ["fit", "--config", "run.yaml", *steady, "--name"]
    assert main([*fit, "one", "--ckpt_path=runs/two/last.ckpt"]) == 0
    assert main([*fit, "whole"]) == 0
    one, whole = (read_safely(locate(f"runs/{name}")) for name in ("one", "whole"))
    for name, value in whole["state_dict"].items():
        assert torch.allclose(one["state_dict"][name], value, rtol=0, atol=1e-5), name


KILL = """
import os, signal
import lightning
class Kill(lightning.Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == 3 and trainer.global_rank == int(os.environ["KILLED"]):
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow  # some 20 s each
@pytest.mark.parametrize("killed", [0, 1])
def test_a_rank_that_is_killed_ends_the_others_and_the_run_resumes(directory, killed, monkeypatch):
    Path("own.py").write_text(KILL)
    monkeypatch.setenv("KILLED", str(killed))
    kill = ["--trainer.callbacks=own.Kill", "--import=own", "--checkpoint.every_n_steps=1"]
    begun = time.monotonic()
    ended = start(
        "run", *DDP, *kill, python=sys.executable
    )  # whose output ends when all that hold it have ended
    assert time.monotonic() - begun < 60
    assert ended.returncode == (-signal.SIGKILL if killed == 0 else 1)
    (line,) = (line for line in ended.stderr.splitlines() if "another process" in line)
    assert "last.ckpt is the last good checkpoint" in line and "Traceback" not in ended.stderr
    together("rest", *DDP, "--ckpt_path=runs/run/last.ckpt")
    together("whole", *DDP)
    rest, whole = (read_safely(f"runs/{name}/last.ckpt") for name in ("rest", "whole"))
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, rest["state_dict"][name]), name


ADAPTED = """
seed_everything: 0
model:
  weights: runs/base/last.ckpt
  adapter: {class_path: LoRA, init_args: {rank: 2, targets: [query, experts.down]}}
  learning_rate: 5.0e-3
  warmup_steps: 1
  schedule: constant
data: {class_path: Addition, init_args: {digits: 2, batch_size: 8, validation_examples: 20}}
trainer: {accelerator: cpu, max_steps: 4, limit_val_batches: 0, gradient_clip_val: 1.0}
"""


@pytest.mark.slow  # some 25 s each
@pytest.mark.parametrize("strategy", [DDP, FSDP2, SHARDS], ids=["ddp", "fsdp2", "shards"])
def test_ranks_resume_an_adapted_run_beside_its_base(directory, strategy):
    """Whose checkpoint holds the adapter and its optimizer alone."""
    assert main(["fit", "--config", "run.yaml", "--name", "base", "--trainer.max_steps=1"]) == 0
    Path("run.yaml").write_text(ADAPTED)
    together("half", *strategy, "--trainer.max_steps=2")
    together("rest", *strategy, "--ckpt_path=runs/half/last.ckpt")
    assert main(["fit", "--config", "run.yaml", "--name", "whole"]) == 0
    whole, rest = (read_safely(locate(f"runs/{name}")) for name in ("whole", "rest"))
    assert whole["base_weights"] == rest["base_weights"]
    assert whole["state_dict"].keys() == rest["state_dict"].keys()
    assert len(rest["optimizer_states"][0]["state"]) == len(rest["state_dict"])
    for name, value in whole["state_dict"].items():
        assert "adapter_modules" in name
        assert torch.allclose(rest["state_dict"][name], value, rtol=0, atol=1e-5), name


RAISE = """
import lightning
class Raise(lightning.Callback):
    def on_train_start(self, trainer, module):
        raise ValueError("of all ranks")
    def on_exception(self, trainer, module, error):
        if trainer.global_rank == LATE:
            import time
            time.sleep(0.5)
"""


@pytest.mark.parametrize("late", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_an_error_of_all_ranks_is_said_once(directory, late):
    """Whichever rank comes to it first."""
    Path("own.py").write_text(RAISE.replace("LATE", str(late)))
    ended = start("run", *DDP, "--trainer.callbacks=own.Raise", "--import=own")
    assert ended.returncode == 1
    assert ended.stderr.count("error: of all ranks") == 1, ended.stderr


@pytest.mark.slow  # some 10 s each
@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_one_rank_is_said(directory, rank):
    alone = RAISE.replace("        raise", f"        if trainer.global_rank == {rank}: raise")
    Path("own.py").write_text(alone.replace("LATE", "2"))
    ended = start("run", *DDP, "--trainer.callbacks=own.Raise", "--import=own")
    assert ended.returncode
    assert ended.stderr.count("error: of all ranks") == 1, ended.stderr
    assert "frame #" not in ended.stderr


DROP = ["--model.dropout=0.3", "--model.schedule=constant", "--model.warmup_steps=1"]


def test_ranks_drop_out_by_numbers_of_their_own(directory):
    """And one process resumes from them: by the first one's."""
    together("two", *DDP, *DROP, "--trainer.max_steps=2")
    random = read_safely("runs/two/last.ckpt")["training"]["random"]
    masks = []
    for state in (random["cpu"], random["others"][0]["cpu"]):
        torch.set_rng_state(state)
        masks.append(torch.nn.functional.dropout(torch.ones(1000), 0.5) > 0)
    assert 350 < (masks[0] != masks[1]).sum() < 650
    assert main(["fit", "--config", "run.yaml", *DROP, "--ckpt_path", "runs/two/last.ckpt"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [DDP, FSDP2], ids=["ddp", "fsdp2"])
def test_ranks_continue_dropping_out_as_if_they_had_not_ended(directory, strategy):
    together("whole", *strategy, *DROP)
    together("half", *strategy, *DROP, "--trainer.max_steps=2")
    together("rest", *strategy, *DROP, "--ckpt_path=runs/half/last.ckpt")
    whole, rest = (
        read_safely(f"runs/{name}/last.ckpt")["state_dict"] for name in ("whole", "rest")
    )
    for name, value in whole.items():
        assert torch.equal(value, rest[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("at_once", [0, 250_000_000], ids=["blocks", "together"])
def test_sharded_is_whole(directory, at_once):
    """By FSDP2; three experts do not share out evenly over two ranks."""
    Path("own.py").write_text(
        f"from archzoo.training import sharding\nsharding.AT_ONCE = {at_once}\n"
    )
    uneven = ["--model.feed_forward.experts=3"]
    accumulate = ["--trainer.accumulate_grad_batches=3", "--data.steps_per_epoch=5"]
    for name, more in (("even", []), ("uneven", uneven), ("accumulated", accumulate)):
        assert main(["fit", "--config", "run.yaml", "--name", name, FLOAT64, *more]) == 0
        together(f"sharded_{name}", *FSDP2, FLOAT64, *more, "--import=own")
        assert_same(name, f"sharded_{name}", 1e-12)


def test_ranks_accumulate_as_one_process_does(directory):
    """An epoch of five micro-batches, which three do not divide."""
    accumulate = ["--trainer.precision=64-true", "--trainer.accumulate_grad_batches=3"]
    accumulate += ["--data.steps_per_epoch=5"]
    assert main(["fit", "--config", "run.yaml", "--name", "one", *accumulate]) == 0
    together("two", *DDP, *accumulate)
    assert_same("one", "two", 1e-12)


@pytest.mark.slow
def test_ranks_are_micro_batches(directory):
    """A batch shared by two ranks and one cut in two are the same step, losses of segments too."""
    segments = ["--trainer.precision=64-true", "--model.feed_forward.balance=switch"]
    segments += ["--model.feed_forward.balance_over=rank"]
    cut = ["--data.batch_size=4", "--trainer.accumulate_grad_batches=2"]
    cut += ["--trainer.val_check_interval=4"]  # batches, not steps
    assert main(["fit", "--config", "run.yaml", "--name", "one", *segments, *cut]) == 0
    together("two", *DDP, *segments)
    assert_same("one", "two", 1e-12)


def test_what_is_alive_is_counted_once(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(archzoo.__file__).parent.parent / "benchmarks"))
    from ranks import alive

    before = alive()
    weight = torch.zeros(1000, requires_grad=True)
    weight.sum().backward()  # its gradient is known to nobody
    view, integers = weight.detach()[:10], torch.zeros(100, dtype=torch.long)
    assert alive() - before == 2 * 4 * 1000
    del view, integers, weight
    assert alive() == before


@pytest.mark.slow
def test_runs_that_compile_beside_each_other_are_measured_in_turn(tmp_path):
    shutil.copytree(ROOT / "benchmarks", tmp_path / "benchmarks")  # whose results lie beside it
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 400)
    command = [sys.executable, tmp_path / "benchmarks" / "ranks.py", "speed", "--beside"]
    command += ["--accelerator", "cpu", "--text", text, "--vocab_size", "0", "--compile", "false"]
    command += ["--presets", "retnet_micro", "--strategies", "ddp", "--lengths", "32", "256"]
    command += ["--tokens", "128", "--steps", "20"]
    ended = subprocess.run(command, capture_output=True, text=True)
    (table,) = (tmp_path / "results").glob("*-ranks-speed.csv")
    with table.open(newline="") as file:
        rows = {(row["way"], row["time"]): row for row in csv.DictReader(file)}
    assert ended.returncode == 2, ended.stderr  # the two whose row is longer than their tokens
    assert rows.keys() == {(way, time) for way in ("one", "ddp") for time in ("32", "256")}
    for (way, length), row in rows.items():
        if length == "256":
            assert row["failed"] == "128 tokens a process are less than a row of 256"
        else:
            assert float(row["tokens_per_second"]) > 0
            assert float(row["of_linear"]) > 0
            assert int(row["processes"]) == (1 if way == "one" else 2)


def test_what_is_exchanged_beside_no_computation(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(archzoo.__file__).parent.parent / "benchmarks"))
    from exchange import merged, outside

    assert merged([(3, 5), (1, 2), (4, 7), (2, 2.5)]) == [(1, 2.5), (3, 7)]
    exchanged = [(0, 10), (8, 12), (20, 21)]
    assert outside(exchanged, []) == 13
    assert outside(exchanged, [(1, 3), (2, 4), (11, 20.5)]) == 13 - 3 - 1 - 0.5


def test_scaling_is_drawn_from_rows(monkeypatch, tmp_path):
    """A line begins at one GPU; what failed is not on it."""
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.delitem(sys.modules, "ranks", raising=False)
    import ranks as benchmark

    figures = []
    monkeypatch.setattr(benchmark, "save", lambda figure, path: figures.append(figure))
    same = {"model": "retnet_base", "time": "2048", "compile": "true", "machine": "x", "torch": "y"}
    rows = [same | {"way": "one", "scaling": "weak", "processes": "1", "times_one": "1.0"}]
    for scaling, count, times in (
        *(("weak", 8, "7.2"), ("weak", 2, "1.9"), ("weak", 4, "3.6")),
        *(("strong", 2, "1.8"), ("strong", 4, "")),
    ):
        found = {"scaling": scaling, "processes": str(count), "times_one": times}
        rows.append(same | {"way": "ddp"} | found)
    benchmark.draw(rows, tmp_path / "x.png")
    (figure,) = figures
    left, right = figure.axes
    lines = [[*map(list, line.get_data())] for line in left.lines]
    assert lines == [
        *([[1, 2, 4, 8], [1, 1.9, 3.6, 7.2]], [[1, 2], [1, 1.8]]),
        [[1, 2, 4, 8], [1, 2, 4, 8]],
    ]
    assert list(right.lines[0].get_ydata()) == pytest.approx([100, 95, 90, 90])
    (legend,) = figure.legends
    said = [text.get_text() for text in legend.get_texts()]
    assert said == ["DDP", "as many tokens a GPU", "as many tokens in all", "linear"]
