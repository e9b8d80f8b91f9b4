"""The ranks of a run: the processes that train one model together."""

from __future__ import annotations

import hashlib
import inspect
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import lightning
import torch
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    ModelParallelStrategy,
    Strategy,
    StrategyRegistry,
)
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from archzoo.block import Aux
from archzoo.decoder import Decoder
from archzoo.names import nearest
from archzoo.training.files import remove, replace

Tensors = TypeVar("Tensors")  # a tensor, or lists and dicts of them
# Seconds in which the ranks sum all gradients of a model, which is then compiled as one graph.
# Between two H200s those of retnet_base take 1.5 ms, and by blocks its step is 1 % longer, though
# they are hidden. Those of yuan_base take 11.4 ms, and by blocks its step is 3 % shorter.
QUICK = 5e-3
PATIENCE = 2.0  # seconds in which all ranks come to an error that they share
ZERO = "ddp_zero_1"  # the name of `ZeroStrategy` for --trainer.strategy


class ZeroStrategy(DDPStrategy):
    """DDP whose ranks share out the optimizer's state among them: ZeRO-1.

    `LanguageModel` makes the optimizer by it: see `archzoo/training/zero.py`.
    """

    strategy_name = ZERO


def check_strategy(strategy: Any) -> None:
    """Refuse the name of a strategy that there is not; Lightning names some and points to a page.

    Args:
        strategy: Of the trainer's settings: a name, or anything else.

    Raises:
        ValueError: There is none of that name; the nearest are said.
    """
    known = ["auto", *StrategyRegistry.available_strategies()]
    if isinstance(strategy, str) and strategy not in known:
        raise ValueError(
            f"--trainer.strategy {strategy}: there is none of that name; "
            f"{nearest(strategy, [*known, 'ModelParallelStrategy'])}"
        )


def check_sizes(strategy: Strategy) -> None:
    """Refuse a ModelParallelStrategy that would not shard over all processes, before any starts.

    Args:
        strategy: Lightning's; any other is taken.

    Raises:
        ValueError: As of `check_data_parallel`.
    """
    if isinstance(strategy, ModelParallelStrategy):
        data, tensor = strategy._data_parallel_size, strategy._tensor_parallel_size
        check_data_parallel(
            strategy.num_nodes if data == "auto" else data,  # as Lightning takes it
            strategy.num_processes if tensor == "auto" else tensor,
            strategy.num_nodes * strategy.num_processes,
        )


def check_data_parallel(data: int, tensor: int, processes: int) -> None:
    """Refuse sizes of a mesh that are not those of FSDP2 alone.

    Args:
        data: Its data_parallel_size.
        tensor: Its tensor_parallel_size.
        processes: Of the run, in all.

    Raises:
        ValueError: They are not `processes` and 1.
    """
    if (data, tensor) == (processes, 1):
        return
    sizes = f"--trainer.strategy.data_parallel_size {processes}"
    sizes += " --trainer.strategy.tensor_parallel_size 1" if tensor != 1 else ""
    one = ", or --trainer.strategy auto" if processes == 1 else ""
    raise ValueError(
        f"the strategy has data_parallel_size={data} and tensor_parallel_size={tensor} for "
        f"{processes} process{'' if one else 'es'}: no part here is tensor parallel, so they must "
        f"be {processes} and 1: give {sizes}{one}"
    )


if ZERO not in StrategyRegistry:
    StrategyRegistry.register(ZERO, ZeroStrategy, description="DDP with ZeRO-1, by torch's")


def configure(strategy: Strategy, decoder: Decoder | None = None) -> None:
    """Give DistributedDataParallel what suits the models here, where no one has chosen otherwise.

    Gradients lie where they are exchanged, so they are neither copied back nor held twice. Buffers
    are not sent about: they are equal on all ranks, for what moves them is summed over the ranks.
    Gradients are accumulated on the stream that computes them. Lightning makes the wrapper on a
    stream of its own, for a capture of CUDA graphs that is not done here, and autograd would wait
    for that stream at every parameter, and warn of it.

    Args:
        strategy: Lightning's; any but DDP stays as it is.
        decoder: That is trained.

    Raises:
        ValueError: An adapter is switched off, so that DDP would wait for its gradients for ever.
    """
    if not isinstance(strategy, DDPStrategy) or isinstance(strategy, DeepSpeedStrategy):
        return  # Lightning's class of DeepSpeed derives from that of DDP
    if isinstance(strategy, ZeroStrategy) and decoder is not None:
        for parameter in decoder.parameters():  # some lie in long rows, which cannot be sent
            parameter.data = parameter.data.contiguous()
    given = strategy._ddp_kwargs
    off = ", ".join(sorted(decoder.adapters_off)) if decoder is not None else ""
    if off and strategy.world_size > 1 and not given.get("find_unused_parameters"):
        raise ValueError(
            f"the adapter {off} is switched off, and DDP would wait for its gradients: take it off "
            "(archzoo.remove_adapters), switch it on (archzoo.enable_adapters), or take the "
            "strategy ddp_find_unused_parameters_true"
        )
    given.setdefault("gradient_as_bucket_view", True)
    known = inspect.signature(DistributedDataParallel).parameters
    names = [name for name in ("forward_sync_buffers", "broadcast_buffers") if name in known]
    if not given.keys() & set(names):
        given[names[0]] = False  # the second is the older name of the first
    if type(strategy)._setup_model is DDPStrategy._setup_model:
        strategy._setup_model = partial(_on_this_stream, strategy)  # type: ignore[method-assign]


def _on_this_stream(strategy: DDPStrategy, model: nn.Module) -> DistributedDataParallel:
    """As `DDPStrategy._setup_model`, on the stream that is current."""
    devices = strategy.determine_ddp_device_ids()
    return DistributedDataParallel(model, device_ids=devices, **strategy._ddp_kwargs)


def sum_over_ranks(trainer: lightning.Trainer, entries: Tensors) -> Tensors:
    """The sum of each tensor over the ranks: one reduction for all of one dtype.

    The host does not wait for it, as it does for Lightning's `reduce`, which has a barrier.

    Args:
        trainer: Whose ranks.
        entries: A tensor, or lists and dicts of them: the same on every rank but for the numbers.
    """
    if trainer.world_size == 1:
        return entries
    tensors, structure = tree_flatten(entries)
    sums = dict.fromkeys(range(len(tensors)))
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):  # in equal order
        alike = [number for number, tensor in enumerate(tensors) if tensor.dtype == dtype]
        flat = torch.cat([tensors[number].flatten() for number in alike])  # it works in place
        torch.distributed.all_reduce(flat)
        for number, part in zip(
            alike, flat.split([tensors[number].numel() for number in alike]), strict=True
        ):
            sums[number] = part.view_as(tensors[number])
    summed: Tensors = tree_unflatten(sums.values(), structure)
    return summed


def sums_quickly(trainer: lightning.Trainer, size: int) -> bool:
    """Whether the ranks sum gradients so quickly that nothing need be computed beside it.

    Compiling a model block by block, so that they are exchanged one after the other, costs a few
    milliseconds a step, too. It is measured, and the answer is the same on all ranks.

    Args:
        trainer: Of the ranks.
        size: Of the gradients of one rank, in bytes.
    """
    device = trainer.strategy.root_device
    if trainer.world_size == 1 or device.type != "cuda":
        return False
    numbers = torch.zeros(2**24, device=device)
    spans = []
    for _ in range(6):
        spans.append([torch.cuda.Event(enable_timing=True) for _ in range(2)])
        spans[-1][0].record()
        torch.distributed.all_reduce(numbers)
        spans[-1][1].record()
    torch.cuda.synchronize(device)
    # The first ones set up connections.
    took = torch.tensor(min(begin.elapsed_time(end) for begin, end in spans[2:]), device=device)
    torch.distributed.all_reduce(took, torch.distributed.ReduceOp.MAX)
    return float(took) / 1e3 * size / numbers.nbytes < QUICK


def mean_gradients(trainer: lightning.Trainer, parameters: list[nn.Parameter]) -> None:
    """Average the gradients of parameters that DDP leaves alone, in place.

    It exchanges those of the parameters that learned when it was made; what is unfrozen later it
    never looks at, and each rank would move it by gradients of its own.

    Args:
        trainer: Whose ranks.
        parameters: The same on every rank; the frozen ones among them are left out.
    """
    learn = [parameter for parameter in parameters if parameter.requires_grad]
    if trainer.world_size == 1 or not learn:
        return
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in learn]
    means = [total / trainer.world_size for total in sum_over_ranks(trainer, grads)]
    for parameter, mean in zip(learn, means, strict=True):
        parameter.grad = mean


class AnySignal:
    """The signal that any of the ranks was sent, asked once a step, without waiting for a GPU.

    On a GPU the answer is that of the step before, which is there when the host has enqueued this
    one. All ranks get the same answer at the same step.
    """

    def __init__(self) -> None:
        self._before: tuple[Tensor, torch.cuda.Event] | None = None

    def __call__(self, trainer: lightning.Trainer, mine: int, wait: bool = False) -> int:
        """The largest number over the ranks, 0 for none.

        Args:
            trainer: Of the ranks.
            mine: This rank's signal.
            wait: For the answer of this call.
        """
        if trainer.world_size == 1:
            return mine
        device = trainer.strategy.root_device
        largest = torch.full((), mine, device=device)  # filled where it lies: no copy to wait for
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
        if wait or device.type != "cuda":
            return int(largest)
        answer = torch.empty((), dtype=largest.dtype, pin_memory=True)
        answer.copy_(largest, non_blocking=True)
        there = torch.cuda.Event()
        there.record()
        before, self._before = self._before, (answer, there)
        if before is None:
            return 0
        before[1].synchronize()
        return int(before[0])


@contextmanager
def replacing(strategy: Strategy, place: Any) -> Iterator[Path]:
    """A new directory, which all ranks write, and which then takes the place of what was there.

    Args:
        strategy: Of the ranks.
        place: A path. A file or a directory there stays until the new one is complete.
    """
    path = Path(strategy.broadcast(str(place)))
    new = path.with_name(f"{path.name}.new")
    if strategy.is_global_zero:
        remove(new)
    strategy.barrier()
    yield new
    strategy.barrier()
    if strategy.is_global_zero:
        replace(new, path)
    strategy.barrier()


def is_said(error: BaseException) -> bool:
    """Whether another rank says an error that this one raised too, so that it is said once.

    The first rank that asks says it. It is counted in the store through which the ranks have found
    each other; where that is gone with its process, each says its own.

    Args:
        error: That ends this rank. Others are the same where class and text are.
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return False  # no others, or none started yet
    if isinstance(error, ConnectionError):
        return False  # another has ended: it may be the one that kept the store
    text = f"{type(error).__name__} {error}"
    key = f"archzoo/error/{hashlib.sha256(text.encode()).hexdigest()}"
    try:
        store = distributed.distributed_c10d._get_default_store()
        first = store.add(key, 1) == 1
        # The store ends with the process of rank 0: the others need it to ask.
        until = time.monotonic() + PATIENCE * (distributed.get_rank() == 0)
        while store.add(key, 0) < distributed.get_world_size() and time.monotonic() < until:
            time.sleep(0.02)
    except (RuntimeError, NotImplementedError):  # DistError among them
        return False
    return not first


def pooled_losses(trainer: lightning.Trainer, decoder: Decoder, aux: list[Aux]) -> list[Aux]:
    """The losses of all ranks' tokens, from the sums that each rank returns as `Aux.pools`.

    Their value is the same everywhere. Gradients are averaged over ranks later on, so each rank's
    part of a sum is scaled for the mean to be the gradient of all tokens together.

    Args:
        trainer: Of the ranks.
        decoder: Whose feed-forwards say what their pools mean.
        aux: Of this rank, a layer each.
    """
    mine = [layer.pools for layer in aux]
    if not any(mine):
        return []
    ours = sum_over_ranks(trainer, tree_map(Tensor.detach, mine))
    ranks = trainer.world_size
    return decoder.pooled_losses(
        tree_map(lambda total, part: total + ranks * (part - part.detach()), ours, mine)
    )
