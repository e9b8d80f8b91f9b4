"""Compiling the model that is trained."""

from __future__ import annotations

import os
import shutil
import time
from typing import Any, Literal

import lightning
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch._dynamo.exc import TorchDynamoException

from archzoo.adapters import Adapter
from archzoo.adapters.lora import LoRA
from archzoo.compiled import keep_traced_functions, options
from archzoo.embeddings.token import TokenEmbedding
from archzoo.feedforward.moe import Experts
from archzoo.kernels.launching import TRITON_FOUND
from archzoo.mixers.attention import Attention
from archzoo.mixers.retention import Retention
from archzoo.training.deepspeed import stage_of, uses_deepspeed
from archzoo.training.ending import say
from archzoo.training.module import LanguageModel
from archzoo.training.ranks import sums_quickly

#: Compiling takes some 30 s, which the short runs of smaller models do not give back.
LEAST = 20_000_000  # parameters

#: Dense models below this wait for their host: with graphs transformer_small, 29 M, gives 1.75
#: times the tokens/s on an H200. At 110 M they change nothing.
HOST_BOUND = 60_000_000  # parameters

OURS = ("archzoo.", "torch.")  # modules whose parts are known to wait for no device

#: What a step without compilation costs: retnet_base, 110 M parameters, on one H200.
COST = "a step of retnet_base takes 1.18 times as long so"

HOOKS = "DeepSpeed's stage 3 gathers weights by hooks, which torch.compile does not see"


def reason_against(module: LanguageModel) -> str | None:
    """Why `auto` does not compile this model on an NVIDIA GPU; None: nothing speaks against it."""
    if module.progressive_loss and module.net.loops > 1:
        return "progressive_loss draws another number of iterations for every step"
    lacking = missing()
    return lacking and f"{lacking}; {COST}"


def missing() -> str | None:
    """What torch.compile lacks on this machine for a GPU."""
    if not TRITON_FOUND:
        return "Triton is not installed"
    if not any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))):
        return "there is no C compiler (cc, gcc or clang)"
    return None


def reason_against_graphs(trainer: lightning.Trainer, module: LanguageModel) -> str | None:
    """Why a step cannot be replayed as CUDA graphs; None: nothing speaks against it.

    A graph writes each time to the same memory. So nothing that it gave may be kept until its next
    run, and nothing in it may wait for what the device computes.
    """
    mixtures = [part for part in module.net.modules() if isinstance(part, Experts)]
    if module.device.type != "cuda":
        return "it runs on an NVIDIA GPU alone"
    if trainer.world_size > 1:
        return "gradients are exchanged with other processes"
    if uses_deepspeed(trainer.strategy):
        return "DeepSpeed takes the gradients, and keeps some"
    callbacks: list[lightning.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    scheduled = any(isinstance(one, GradientAccumulationScheduler) for one in callbacks)
    if scheduled or trainer.accumulate_grad_batches > 1:
        return "gradients are kept from one micro-batch to the next"
    if getattr(module.task, "carry_state", False):
        return "a state is kept from one batch to the next"
    if type(module).training_step is not LanguageModel.training_step:
        return "the objective may run the model several times in a step"
    if module.progressive_loss and module.net.loops > 1:
        return "progressive_loss runs the model twice in a step"
    if module.unfreezes or module.teacher is not None:
        return "blocks are compiled one by one"
    if not all(part.gate_up.is_one_matrix and part.down.is_one_matrix for part in mixtures):
        return "experts are called one by one, each with as many tokens as it has"
    dtype = torch.bfloat16 if str(trainer.precision).startswith("bf16") else torch.float32
    if not all(part.can_be_grouped(dtype) for part in mixtures):
        return (
            f"experts are multiplied one by one, each with as many tokens as it has, unless the "
            f"precision is bf16 (given: {trainer.precision}) and widths are multiples of 8"
        )
    return None


def replays(trainer: lightning.Trainer, module: LanguageModel) -> bool:
    """Whether `auto` replays a step as CUDA graphs: of mixtures and of small dense models.

    These are many small kernels. A part from elsewhere may wait for the device, which the zoo's own
    do not, and hooks may keep what the next run of a graph writes over.
    """
    net = module.net
    parts = list(net.modules())
    if not all(type(part).__module__.startswith(OURS) for part in parts):
        return False
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(part, kind) for part in parts for kind in hooks):
        return False
    mixture = any(isinstance(part, Experts) for part in parts)
    # What has run so on a GPU.
    small = (
        net.parameter_count() < HOST_BOUND
        and str(trainer.precision).startswith("bf16")
        and type(net.embedding) is TokenEmbedding
        and all(type(block.mixer) in (Attention, Retention) for block in net.blocks)
        and all(type(part) is LoRA for part in parts if isinstance(part, Adapter))
    )
    if not (mixture or small):
        return False
    return reason_against_graphs(trainer, module) is None


class CompileModel(lightning.Callback):
    """Compiles the decoder before the first step, and says how long that took.

    Where its gradients are exchanged block by block with other processes and that takes a while,
    or it is unfrozen layer by layer, it is compiled block by block: see `Decoder.compile_blocks`.

    Args:
        when: "auto" compiles a model of 20 M parameters or more on an NVIDIA GPU, unless
            something speaks against it, and says what; a mixture of experts, and a model of
            attention or retention of less than 60 M, it replays as CUDA graphs where that is
            possible. "graphs" does so with any model.
    """

    def __init__(self, when: Literal["auto", "graphs"] | bool) -> None:
        self.when = when
        self._began: float | None = None
        self._replays = False

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        assert isinstance(pl_module, LanguageModel)
        net = pl_module.net
        net.forget_compiled()
        self._replays = False
        if self.when == "auto":
            if pl_module.device.type != "cuda" or torch.version.hip is not None:
                return
            if stage_of(trainer.strategy) == 3:
                say(f"the model is not compiled: {HOOKS}; {COST}")
                return
            if net.parameter_count() < LEAST:
                return
            reason = reason_against(pl_module)
            if reason is not None:
                say(f"the model is not compiled: {reason}")
                return
        if not self.when:
            return
        if stage_of(trainer.strategy) == 3:
            given = str(self.when).lower()
            raise ValueError(f"--compile {given}: {HOOKS}: --compile false trains without")
        if self.when == "graphs" and (reason := reason_against_graphs(trainer, pl_module)):
            raise ValueError(f"--compile graphs: {reason}: take --compile true")
        keep_traced_functions()
        asked = self.when == "graphs"
        self._replays = asked or (self.when == "auto" and replays(trainer, pl_module))
        # FSDP2's hooks around a block, or its gradients while those before it are computed.
        by_blocks = trainer.world_size > 1 and pl_module.exchanges_blocks
        if by_blocks and not pl_module.sharded:
            size = sum(part.nbytes for part in net.parameters() if part.requires_grad)
            by_blocks = not sums_quickly(trainer, size)
        # Unfreezing compiles nothing of other blocks anew; a teacher is compared block by block.
        if by_blocks or pl_module.unfreezes or pl_module.teacher is not None:
            net.compile_blocks(options=options())
        else:
            net.compile(options=options(self._replays))
        compiled, plain = net.compiled_hidden, net._hidden

        def compute(*given: Any) -> Any:
            try:
                return compiled(*given)  # type: ignore[misc]  # it was set above
            except TorchDynamoException as error:
                line = f"{type(error).__name__} {str(error).strip().splitlines()[0]}"
                if self.when != "auto":
                    raise ValueError(
                        f"the model cannot be compiled ({line}): --compile false trains without"
                    ) from error
                say(f"the model cannot be compiled ({line}); {COST}")
                self._began = None
                net.forget_compiled()
                return plain(*given)

        net.compiled_hidden = compute
        say("compiling the model; --compile false trains without")
        self._began = time.perf_counter()

    def on_exception(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        exception: BaseException,
    ) -> None:
        """Drop gradients that a graph which was begun has written over: Lightning moves them."""
        if self._replays:
            for parameter in pl_module.parameters():
                parameter.grad = None

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if self._began is not None:
            if pl_module.device.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - self._began
            say(f"compiled in {seconds:.0f} s, with the first step")
            self._began = None
