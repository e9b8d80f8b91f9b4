"""DeepSpeed's ZeRO by Lightning's flags: what it needs of a run, and its checkpoints for all."""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, Strategy
from torch import Tensor, nn

from archzoo.block import Block
from archzoo.checkpoint.runs import WHOLE
from archzoo.training.files import write_checkpoint
from archzoo.training.ranks import ZERO, replacing

STAGES = (1, 2, 3)
PARTS = "*_optim_states.pt"  # of a checkpoint, one of each process
# What DeepSpeed's files hold beside tensors and plain data.
CLASSES = (
    ("deepspeed.runtime.fp16.loss_scaler", "LossScaler"),
    ("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler"),
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"),
    ("deepspeed.utils.tensor_fragment", "fragment_address"),
)


def uses_deepspeed(strategy: Any) -> bool:
    """Whether DeepSpeed trains."""
    return isinstance(strategy, DeepSpeedStrategy)


def stage_of(strategy: Any) -> int:
    """The stage of DeepSpeed's ZeRO; 0: DeepSpeed does not train, or shards nothing."""
    config = strategy.config if uses_deepspeed(strategy) else {}
    return int((config.get("zero_optimization") or {}).get("stage", 0))


def engine_of(strategy: Any) -> Any:
    """DeepSpeed's engine, which clips and steps; None: it does not train."""
    return strategy.model if uses_deepspeed(strategy) else None


def check_usable(strategy: Any, accelerator: Any) -> None:
    """Refuse what the settings ask of DeepSpeed where it cannot train.

    Args:
        strategy: Of the trainer's settings: a name, or a class by `class_path`.
        accelerator: Of the same.

    Raises:
        ValueError: There is no CUDA GPU, or the package is missing.
    """
    name = strategy if isinstance(strategy, str) else getattr(strategy, "class_path", "")
    if not str(name).rpartition(".")[2].lower().startswith("deepspeed"):
        return
    about = f"--trainer.strategy {str(name).rpartition('.')[2]}"
    if not on_cuda(accelerator):
        raise ValueError(
            f"{about}: DeepSpeed trains on CUDA GPUs alone: take --trainer.strategy {ZERO} or "
            "ModelParallelStrategy (FSDP2), which run anywhere"
        )
    if importlib.util.find_spec("deepspeed") is None:
        raise ValueError(f"{about}: deepspeed is not installed: pip install 'archzoo[deepspeed]'")


def on_cuda(accelerator: Any) -> bool:
    """Whether this accelerator of the settings is a CUDA GPU here."""
    return accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()


def configure(strategy: Strategy, module: Any) -> None:
    """Make ready for a run, where DeepSpeed trains: in `setup`, before the engine is made.

    Its checkpoints become directories that hold the whole model, too: see `_save`.

    Args:
        strategy: Lightning's; any but DeepSpeed's stays as it is.
        module: The `LanguageModel`.

    Raises:
        ValueError: The run has something that DeepSpeed would not do as it is done elsewhere.
    """
    if not isinstance(strategy, DeepSpeedStrategy):
        return
    if module.trainer.state.fn == "fit":
        _check_run(strategy, module)
    assert isinstance(strategy.config, dict)
    # Where it keeps its state on the host, too, AdamW is torch's.
    strategy.config.setdefault("zero_force_ds_cpu_optimizer", False)
    if stage_of(strategy) == 3:
        from deepspeed.utils import set_z3_leaf_modules

        # A block is gathered as a whole, as by FSDP2: parts in it take each other's weights.
        set_z3_leaf_modules(module, [Block])
    strategy.save_checkpoint = partial(_save, strategy)  # type: ignore[method-assign]
    strategy.load_checkpoint = partial(_load, strategy)  # type: ignore[method-assign]


def _check_run(strategy: DeepSpeedStrategy, module: Any) -> None:
    trainer: Any = module.trainer
    if (stage := stage_of(strategy)) not in STAGES:
        raise ValueError(f"DeepSpeed's ZeRO has the stages 1, 2 and 3, and this is {stage}")
    averages = any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks)
    frozen = not all(parameter.requires_grad for parameter in module.parameters())
    config: Any = strategy.config
    clip, largest = config.get("gradient_clipping"), trainer.gradient_clip_val or 0.0
    for wrong, what, instead in (
        (
            trainer.accumulate_grad_batches != 1,
            "accumulates gradients by itself, and would not weigh micro-batches by their tokens",
            "leave out trainer.accumulate_grad_batches",
        ),
        (
            stage == 3 and frozen,
            "loses frozen weights in a backward pass of stage 3",
            "take deepspeed_stage_2",
        ),
        (averages, "leaves no process the whole weights to average", "leave out --ema"),
        (
            clip is not None and clip != largest,
            f"is told gradient_clipping={clip} by its own configuration, and {largest} by "
            "trainer.gradient_clip_val",
            "say it there alone",
        ),
    ):
        if wrong:
            raise _refused(what, instead)


def _refused(what: str, instead: str) -> ValueError:
    return ValueError(f"DeepSpeed {what}: {instead}, or take ddp, {ZERO} or ModelParallelStrategy")


def check_unfreezing(strategy: Any) -> None:
    """Refuse a run that trains more and more of its weights, before Lightning does with a trace.

    Raises:
        ValueError: DeepSpeed would train it.
    """
    if uses_deepspeed(strategy):
        what = "fixes at the start what is trained"
        raise _refused(what, "leave out model.unfreeze_every")


# ---------------------------------------------------------------------------- checkpoints


def _save(
    strategy: DeepSpeedStrategy,
    checkpoint: dict[str, Any],
    filepath: Any,
    storage_options: Any | None = None,
) -> None:
    """A directory: DeepSpeed's files, from which it resumes, and a run's checkpoint as any other.

    In that one, WHOLE, weights and the optimizer's state are whole and in float32, so that every
    command reads it, and a run is resumed from it in another way.

    Args:
        strategy: The strategy.
        checkpoint: Of Lightning.
        filepath: Of the directory. What was there is replaced when the new one is complete.
        storage_options: For Lightning's sake.
    """
    with replacing(strategy, filepath) as new:
        DeepSpeedStrategy.save_checkpoint(strategy, checkpoint, new, storage_options)
        whole = whole_state(strategy)
        if strategy.is_global_zero:
            write_checkpoint(checkpoint | whole, new / WHOLE)


def whole_state(strategy: DeepSpeedStrategy) -> dict[str, Any]:
    """Weights and the optimizer's state as one process has them; of the first rank, else {}.

    All ranks take part: each parameter is put together by itself, and goes to the host.
    """
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    module: Any = strategy.lightning_module
    keep = strategy.is_global_zero
    zero = strategy.deepspeed_engine.optimizer
    if hasattr(zero, "_hp_optimizer_states_linked"):
        # Of stages 1 and 2 it links states to parameters after the step of the first group, when
        # the second has no state yet, and never again.
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()
    optimizer = zero.optimizer
    groups = optimizer.param_groups
    held: dict[str, Any] = next(iter(optimizer.state.values()), {})
    # Of each parameter; the others, such as a count of steps, are the same for all.
    names = [name for name, value in held.items() if isinstance(value, Tensor) and value.dim()]
    common = {name: value for name, value in held.items() if name not in names}

    weights: dict[int, Tensor] = {}
    for parameter in dict.fromkeys(module.parameters()):
        whole = safe_get_full_fp32_param(parameter)
        if whole is None:  # it is frozen
            with deepspeed.zero.GatheredParameters(
                [parameter], enabled=hasattr(parameter, "ds_id")
            ):
                whole = parameter.detach().float().clone()
        if keep:
            weights[id(parameter)] = whole.cpu()
    states: dict[int, dict[str, Any]] = {}
    described = []
    for group, trained in zip(groups, module.optimized, strict=True):
        numbers = range(len(states), len(states) + len(trained))
        described.append({n: v for n, v in group.items() if n != "params"})
        described[-1]["params"] = list(numbers)
        for number, parameter in zip(numbers, trained, strict=True):
            whole = {name: safe_get_full_optimizer_state(parameter, name) for name in names}
            states[number] = {name: value.cpu() for name, value in whole.items() if keep}
            states[number] |= {
                name: value.detach().cpu().clone() if isinstance(value, Tensor) else value
                for name, value in common.items()
            }
    if not keep:
        return {}
    shared = dict(module.named_parameters(remove_duplicate=False))
    state = {
        name: weights[id(shared[name])] if name in shared else _as_float32(value)
        for name, value in module.state_dict().items()
    }
    return {
        "state_dict": state,
        "optimizer_states": [{"state": states, "param_groups": described}],
    }


def _as_float32(value: Tensor) -> Tensor:
    """A buffer as it was before the model was cast."""
    return value.detach().cpu().float() if value.is_floating_point() else value.detach().cpu()


def _load(
    strategy: DeepSpeedStrategy, checkpoint_path: Any, weights_only: bool | None = None
) -> dict[str, Any]:
    """Resume from a directory of `_save`, written by as many processes.

    Args:
        strategy: The strategy.
        checkpoint_path: Of the directory, or of WHOLE in it.
        weights_only: For Lightning's sake.

    Raises:
        ValueError: It is another checkpoint, was written by another number of processes, or holds
            what would run code.
    """
    path = Path(checkpoint_path)
    place = path.parent if path.name == WHOLE else path
    parts = sorted((place / "checkpoint").glob(PARTS))
    if not parts:
        raise ValueError(
            f"{path} was not written by DeepSpeed, which resumes from its own alone: resume it "
            f"with another --trainer.strategy, or begin from its weights: --model.weights {path}"
        )
    if len(parts) != strategy.world_size:
        raise ValueError(
            f"{place} was written by {len(parts)} processes, and DeepSpeed resumes with as many, "
            f"not {strategy.world_size}: resume it with another --trainer.strategy, or begin from "
            f"its weights: --model.weights {place}"
        )
    _check_harmless(place)
    return DeepSpeedStrategy.load_checkpoint(strategy, place)


def _check_harmless(place: Path) -> None:
    """Refuse files that hold code, which DeepSpeed would run when it reads them."""
    classes = [getattr(importlib.import_module(module), name) for module, name in CLASSES]
    for file in sorted((place / "checkpoint").glob("*.pt")):
        try:
            with torch.serialization.safe_globals(classes):
                torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        except Exception as error:  # of many kinds
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(f"{file} is damaged, or holds more than data: {reason}") from None


# ---------------------------------------------------------------------------- in a step


def inner(optimizer: Any) -> torch.optim.Optimizer:
    """Torch's own optimizer, which Lightning and DeepSpeed wrap."""
    wrapped: Any = getattr(optimizer, "optimizer", optimizer)
    found: torch.optim.Optimizer
    found = wrapped if isinstance(wrapped, torch.optim.Optimizer) else wrapped.optimizer
    return found


def local_part(parameter: nn.Parameter) -> Tensor:
    """What this process holds of a weight: of stage 3 a part."""
    part: Tensor = getattr(parameter, "ds_tensor", parameter)
    return part.detach()
