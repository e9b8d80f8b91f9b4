"""Checkpoints of shards: each process of FSDP2 writes what it holds."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy, Strategy

from archzoo.checkpoint.shards import NAMES, is_sharded, make_whole
from archzoo.training.ranks import replacing


def configure(strategy: Strategy) -> None:
    """Have Lightning's ModelParallelStrategy replace checkpoints whole, and read them safely.

    Args:
        strategy: Lightning's; any other stays as it is.
    """
    if isinstance(strategy, ModelParallelStrategy) and strategy._save_distributed_checkpoint:
        strategy.save_checkpoint = partial(_save, strategy)  # type: ignore[method-assign]
        strategy.load_checkpoint = partial(_load, strategy)  # type: ignore[method-assign]


def _save(
    strategy: ModelParallelStrategy,
    checkpoint: dict[str, Any],
    filepath: Any,
    storage_options: Any | None = None,
) -> None:
    """A directory of shards; what was there is replaced when the new one is complete."""
    assert strategy.lightning_module is not None
    checkpoint[NAMES] = [name for name, _ in strategy.lightning_module.named_parameters()]
    with replacing(strategy, filepath) as new:
        ModelParallelStrategy.save_checkpoint(strategy, checkpoint, new, storage_options)


def _load(
    strategy: ModelParallelStrategy, checkpoint_path: Any, weights_only: bool | None = None
) -> dict[str, Any]:
    """From the shards put together: Lightning would read them by a pickle, which may run code."""
    path = Path(checkpoint_path)
    if is_sharded(path):
        if strategy.is_global_zero:
            make_whole(path)
        strategy.barrier()
        path = make_whole(path)
    return ModelParallelStrategy.load_checkpoint(strategy, path, weights_only)
