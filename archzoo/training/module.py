"""The LightningModule: a decoder, its loss, its optimizer, and what is logged of them."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple

import lightning
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor

from archzoo import block as interface
from archzoo._version import __version__
from archzoo.adapters.attach import adapt
from archzoo.adapters.mixture import gate_entropies
from archzoo.analysis.operations import (
    Multiplied,
    multiplied_parameters,
    peak_of,
    training_operations,
)
from archzoo.block import Aux
from archzoo.checkpoint import (
    Base,
    base_in,
    base_of,
    check_finite,
    load,
    locate,
    read_safely,
    tokenizer_files,
    weights_digest,
)
from archzoo.checkpoint.bases import BASE, DTYPES, base_digest, base_weights, find_base
from archzoo.checkpoint.runs import check_beside
from archzoo.compiled import own_name
from archzoo.decoder import Decoder
from archzoo.freezing import Freezing
from archzoo.inputs import IGNORED
from archzoo.numerics import widest
from archzoo.parts import check_one_of, named_adapters
from archzoo.registry import check_size, create_model, get_preset
from archzoo.states import State
from archzoo.tasks.stream import Batch, Task
from archzoo.tasks.tokenizers import from_files
from archzoo.tasks.writing import writing_of
from archzoo.training import deepspeed, shards
from archzoo.training.averaging import AverageWeights
from archzoo.training.comparison import (
    MAY_DIFFER,
    check_same_model,
    check_same_training,
    check_weights_fit,
    describe_model,
    module_arguments,
    trained_by,
)
from archzoo.training.distillation import (
    Distil,
    Teacher,
    as_distil,
    plain,
    vectors_before_blocks,
)
from archzoo.training.ending import say
from archzoo.training.files import MetricsFile
from archzoo.training.log import (
    EvaluationFigures,
    Stopwatch,
    TrainingFigures,
    Transfer,
    mean_entropies,
    memory,
    scalars,
)
from archzoo.training.losses import check_labels, score, total_loss
from archzoo.training.muon import Muon
from archzoo.training.optim import clip_by_norm, learning_rate_schedule, regroup
from archzoo.training.optimizers import (
    build_optimizer,
    describe_optimizer,
    find_optimizer,
    title_of,
)
from archzoo.training.progressive import passes
from archzoo.training.random_state import (
    bring_back_random_state,
    gather_random_states,
    random_state,
)
from archzoo.training.ranks import (
    ZERO,
    ZeroStrategy,
    configure,
    mean_gradients,
    pooled_losses,
    sum_over_ranks,
)
from archzoo.training.unfreezing import LayerByLayer


class LanguageModel(lightning.LightningModule):
    """A decoder and how it is trained.

    An optimizer step takes the gradient of::

        L = sum over slices of (sum over the slice's labelled tokens of -log p(label)
                                + n_slice * sum of the slice's aux losses) / N

    in nats, where a slice is what one rank sees of one micro-batch, n_slice its labelled tokens
    and N those of all slices of the step, however many micro-batches of gradient accumulation an
    epoch's end has for it. So the first term is that of the whole batch, however it is cut into
    micro-batches and ranks: gradient accumulation and data parallelism give the same gradient. An
    aux loss (of a layer's `Aux.losses`) is its mean over the slices by their labelled tokens. For
    one that is itself a mean over tokens, as the z-loss, that is the whole batch's where the same
    fraction of tokens is labelled in each slice. A balancing loss is not linear in the tokens: cut
    into slices it is another one (see `Balance`), and where it takes the tokens of all ranks
    (`balance_over`) the micro-batch is its slice. What moves by counts, experts' biases and
    adaptive coefficients, sees the counts of the whole step.

    Weights move by AdamW (Loshchilov and Hutter, arXiv 1711.05101), or another optimizer, with
    decay on matrices only, a linear warm-up and a cosine. A step that float16's loss scaling skips,
    because a gradient overflowed, moves nothing: no weight, bias, coefficient or learning rate, and
    the progressive loss draws the same numbers again.

    The decoder is made when the vocabulary is known: at once where `vocab_size` is given, else in
    `setup`, from the task the trainer runs on.

    Args:
        preset: Name of a model of the zoo; `archzoo list` shows them. None: every argument of the
            decoder is given instead.
        match: "parameters": set the feed-forward's width so that the model holds as many
            parameters as the preset without the swapped parts, within 1 %.
        weights: A checkpoint or a directory of `archzoo.save_pretrained` whose weights training
            starts from, such as `archzoo upcycle` writes. The architecture is its own but for an
            adapter, and what is saved keeps their digest as `base`. A checkpoint of an adapted run
            leaves them out: it is resumed beside the same ones.
        freeze: What is not trained: all (but the adapter), top.2 (two blocks, the final norm and
            the head), bottom.2 (the embedding and two blocks), norms, a path such as blocks.0, or
            parts such as router and experts.down; a list of them: [embedding, router].
        unfreeze: What is trained though `freeze`, or an adapter, would keep it: the same names.
        unfreeze_every: Layer by layer: after that many optimizer steps the highest block that is
            frozen is trained too, after as many more the next, and the embedding at last; the
            final norm and the head from the start. See `Freezing`.
        learning_rate: The peak, per optimizer step.
        warmup_steps: Optimizer steps from 0 to the peak.
        schedule: "cosine", which runs until the trainer's last step; "wsd": at the peak, and
            along a line to the end over the last steps; or "constant".
        decay_fraction: Of all steps, for wsd: those over which the learning rate falls.
        final_learning_rate: Where the schedule ends, as a fraction of the peak.
        optimizer: None: AdamW. Muon: each matrix by Muon, all else by AdamW, with one learning
            rate. Or any of torch.optim by name, or a class of yours by its import path; with
            arguments, class_path and init_args. Learning rate, decay and betas are those above
            and below.
        weight_decay: Of matrices; norms, biases and embeddings do not decay.
        betas: How fast AdamW, and what takes them too, forgets the gradient and its square.
        progressive_loss: Fraction of the loss that a looped model takes from a random number of
            iterations, the first without gradients: see archzoo/training/progressive.py.
        progressive_seed: Of those numbers, which are a function of (progressive_seed, step).
        distil: Learn from a teacher instead of the labels, or beside them: see `Distil`.
        **architecture: Arguments of `Decoder`; None means the preset's value.

    Raises:
        ValueError: An unknown preset, part or argument, or sizes that do not fit.
    """

    objective: str | None = None  # its name in `archzoo.training.objectives`; None: cross-entropy

    def __init__(
        self,
        preset: str | None = None,
        match: Literal["parameters"] | None = None,
        weights: str | None = None,
        freeze: list[str] | str | None = None,
        unfreeze: list[str] | str | None = None,
        unfreeze_every: int | None = None,
        learning_rate: float = 2e-3,
        warmup_steps: int = 100,
        schedule: Literal["cosine", "wsd", "constant"] = "cosine",
        decay_fraction: float = 0.2,
        final_learning_rate: float = 0.0,
        optimizer: str | dict[str, Any] | None = None,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        progressive_loss: float = 0.0,
        progressive_seed: int = 0,
        distil: Distil | None = None,
        **architecture: Any,
    ) -> None:
        super().__init__()
        if preset is not None:
            get_preset(preset)  # an unknown name is answered before any data is prepared
        if not 0 < learning_rate < math.inf:
            raise ValueError(f"learning_rate={learning_rate} must be above 0, and finite")
        for name, value in (
            ("warmup_steps", warmup_steps),
            ("final_learning_rate", final_learning_rate),
            ("weight_decay", weight_decay),
        ):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}={value} must be at least 0, and finite")
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas={list(betas)} must be two numbers from 0 to below 1")
        if not 0 < decay_fraction <= 1:
            raise ValueError(f"decay_fraction={decay_fraction} must lie in (0, 1]: a fraction")
        if not 0 <= progressive_loss <= 1:
            raise ValueError(f"progressive_loss={progressive_loss} must lie in [0, 1]: a fraction")
        if unfreeze_every is not None and not unfreeze_every >= 1:
            raise ValueError(f"unfreeze_every={unfreeze_every} must be at least 1 optimizer step")
        self.preset, self.match = preset, match
        #: What is said of freezing, as plain data.
        self.frozen: dict[str, Any] = {
            "freeze": _as_names(freeze),
            "unfreeze": _as_names(unfreeze),
            "unfreeze_every": unfreeze_every,
        }
        #: What of the decoder is trained from which step on; None: all that learns by itself.
        self.freezing: Freezing | None = None
        self._joining: list[torch.nn.Parameter] = []  # which DDP takes for frozen for ever
        self._weights = weights
        self.progressive_loss, self.progressive_seed = progressive_loss, progressive_seed
        self.distil = as_distil(distil)
        self.teacher: Teacher | None = None  # there in `fit`, and no part of what is saved
        if self.distil is not None and progressive_loss:
            raise ValueError(
                "distillation pairs all iterations of a loop: set progressive_loss to 0"
            )
        self.learning_rate, self.warmup_steps = learning_rate, warmup_steps
        self.schedule, self.final_learning_rate = schedule, final_learning_rate
        self.decay_fraction = decay_fraction
        self.weight_decay, self.betas = weight_decay, betas
        self.optimizer = describe_optimizer(optimizer)
        self.architecture = architecture
        self.decoder: Decoder | None = None
        self._evaluated = EvaluationFigures(self.device)
        self._entropies: dict[str, Tensor] = {}  # of the adapters' routers, in this evaluation
        #: The latest logged values, plain floats, for whoever displays them.
        self.latest: dict[str, float] = {}
        self.figures = TrainingFigures()  # since the last row of the log
        self._sums: list[dict[str, Tensor]] = []  # of aux, since the last optimizer step
        self._labelled: Tensor | None = None  # tokens of all ranks since the last optimizer step
        self._scale: Tensor | None = None  # what the losses since then were divided by
        self._skipped = 0  # optimizer steps that changed nothing, for a gradient overflowed
        self._stepped = True  # whether the last one did
        self._carried: dict[str, State] = {}  # by split, where batches continue
        self._unchecked: list[tuple[int, Tensor]] = []  # losses no one has looked at
        self._gradient_norm: Tensor | None = None
        self._stopwatch = Stopwatch(torch.device("cpu"))
        self._underway: RowUnderway | None = None
        #: The step of the latest row of training in `latest`.
        self.logged_step = 0
        self._random: dict[str, Any] | None = None
        self.loaded_step: int | None = None
        self.cut_short = False  # whether the validation that runs is broken off and counts nothing
        self._random_before: dict[str, Any] | None = None  # that validation
        self.sharded = False
        #: The parameters that the optimizer moves, by its groups: DeepSpeed replaces them in there.
        self.optimized: list[list[torch.nn.Parameter]] = []
        self._about: str | None = None  # where DeepSpeed takes the weights away
        self._whole = False  # whether a step gathers all that is sharded at once
        self._set_up_for: tuple[str, int] | None = None
        self._multiplied: Multiplied | None = None
        self._length = 1  # of the last batch's rows
        self._vocabulary: dict[str, bytes] | None = None  # of the weights training starts from
        self.base: Base | None = None  # those weights, where they stay beside adapters
        if weights is not None:
            self.decoder = self._start_from(weights)
        elif architecture.get("vocab_size") is not None:
            self.decoder = self.build()

    # ------------------------------------------------------------------------ the decoder

    def build(self) -> Decoder:
        """The decoder that preset, match and architecture describe."""
        if self.preset is None:
            missing = [n for n in ("dim", "depth", "heads") if self.architecture.get(n) is None]
            if missing:
                raise ValueError(
                    f"the model has no {', '.join(missing)}: give a preset, as --model.preset "
                    "retnet_micro (archzoo list shows all), a trained one by --model.weights, or "
                    f"{' and '.join(f'--model.{name} N' for name in missing)}"
                )
            # The one place that names the arguments: command line and help are read off it.
            check_size(self.architecture)
            return Decoder(**self.architecture)
        replaced = dict(self.architecture)
        return create_model(self.preset, self.match, **replaced)

    def _start_from(self, weights: str) -> Decoder:
        """The model that a checkpoint or directory holds, to be trained on."""
        given = {n: value for n, value in self.architecture.items() if value is not None}
        one, several = given.pop("adapter", None), given.pop("adapters", None)
        check_one_of(one, several)
        adapter = several or one
        refused = [name for name in given if name not in MAY_DIFFER]
        if self.preset is not None or self.match is not None or refused:
            names = [n for n in ("preset", "match") if getattr(self, n) is not None] + refused
            nothing = " ".join(f"--model.{name} null" for name in names)
            raise ValueError(
                f"weights={weights!r} brings its own architecture: omit {', '.join(names)}, or "
                f"take back what a configuration file gives: {nothing}"
            )
        found = load(weights, "cpu", **given)
        check_finite(found.model.state_dict(), weights)
        if found.tokenizer is not None:
            self._vocabulary = found.tokenizer.files()
        decoder, state = found.model.train(), found.model.state_dict()
        decoder.task, decoder.base = None, weights_digest(state)
        decoder = decoder.to(torch.get_default_dtype())  # in which training keeps weights
        decoder = adapt(decoder, adapter) if adapter else decoder
        if named_adapters(decoder.config) and decoder.base_path is not None:
            self.base = base_of(decoder)
            self.strict_loading = False  # Lightning's: `on_load_checkpoint` looks at what is there
        return decoder

    @property
    def net(self) -> Decoder:
        """The decoder, once it is made."""
        if self.decoder is None:
            raise RuntimeError("the decoder is made in setup, when the vocabulary is known")
        return self.decoder

    def _begin_run(self) -> None:
        """Forget what an earlier `fit` of this object has summed, carried and counted."""
        for entries in (self.figures, self._sums, self._carried, self._unchecked):
            entries.clear()
        self._labelled = self._scale = self._gradient_norm = self._underway = None
        self._skipped, self.cut_short, self.logged_step = 0, False, 0

    def setup(self, stage: str) -> None:
        self.set_up_with_task(stage)
        deepspeed.configure(self.trainer.strategy, self)
        shards.configure(self.trainer.strategy)
        if stage == "fit":  # before a checkpoint is read
            configure(self.trainer.strategy, self.decoder)
            self._about = self.about() if deepspeed.uses_deepspeed(self.trainer.strategy) else None
            self._begin_run()

    def set_up_with_task(self, stage: str) -> None:
        """Make the decoder and give it what the task says of numbers.

        `Task.setup` calls this before callbacks are set up, some of which copy all parameters.
        """
        task = self.task
        if self._set_up_for == (stage, id(task)):
            return
        self._set_up_for = (stage, id(task))
        if self.decoder is None:
            if task is None:
                raise ValueError(
                    "vocab_size is unknown: give LanguageModel a vocab_size, or the trainer a task"
                )
            self.architecture["vocab_size"] = task.vocab_size
            if self.architecture.get("context_length") is None:
                self.architecture["context_length"] = task.context_length
            self.decoder = self.build()
        elif task is not None and task.vocab_size > self.decoder.vocab_size:
            raise ValueError(
                f"the model knows {self.decoder.vocab_size} tokens and the task has "
                f"{task.vocab_size}: this model was made for another vocabulary; "
                + task.other_vocabulary
            )
        if stage == "fit":
            if self.progressive_loss and self.decoder.loops > 1 and getattr(task, "carry_state", 0):
                raise ValueError(
                    "progressive_loss reads each window twice, or with fewer iterations than a "
                    "state holds: set carry_state to false, or progressive_loss to 0"
                )
            self._freeze()
            if self.distil is not None:
                self.teacher = Teacher(self.distil, self.decoder, task)
        self._multiplied = multiplied_parameters(self.decoder)  # before they are sharded
        if task is not None:
            task.prepare()
            if stage == "fit" or self.net.task is None:  # the task says how prompts are written
                self.net.task = task.config()
            if self._vocabulary not in (None, task.tokenizer.files()):
                raise ValueError(
                    "the weights were trained with another vocabulary than this task's: "
                    + task.other_vocabulary
                )
            self.net.bind(task, training=stage == "fit")

    def _freeze(self) -> None:
        """Let learn what is trained at the first step, and nothing else."""
        freeze, unfreeze, every = self.frozen.values()
        if self.freezing is None and (freeze or unfreeze or every is not None):
            self.freezing = Freezing(self.net, freeze or (), unfreeze or (), every)
        if self.freezing is not None:
            self.freezing.apply(self.net, 0)
            self._joining = self.freezing.joining(self.net)

    @property
    def unfreezes(self) -> bool:
        """Whether more is trained later than at first."""
        return self.frozen["unfreeze_every"] is not None

    def configure_callbacks(self) -> list[lightning.Callback]:
        if not self.unfreezes:
            return []
        deepspeed.check_unfreezing(self.trainer.strategy)
        return [LayerByLayer()]

    def configure_model(self) -> None:
        """Under Lightning's ModelParallelStrategy: cut the weights among the ranks."""
        if self.device_mesh is not None and not self.sharded:
            from archzoo.training.sharding import shard  # takes a while to import

            self._whole = shard(self.net, self.device_mesh, self.trainer.world_size)
            self.sharded = True

    @property
    def exchanges_blocks(self) -> bool:
        """Whether ranks exchange a block's gradients while those before it are computed."""
        return self.trainer.world_size > 1 and not self._whole

    @property
    def task(self) -> Task | None:
        """The trainer's task, if there is one."""
        task = getattr(self._trainer, "datamodule", None)
        return task if isinstance(task, Task) else None

    def about(self) -> str:
        """One line: which model, how many parameters, and whether a swap is a fair one."""
        if self._about is not None:
            return self._about
        return describe_model(self.net, self.preset, self.architecture, self._joining)

    # ------------------------------------------------------------------------ loss

    def _hidden(
        self, batch: Batch, split: str, loops: int | None = None, no_grad_loops: int = 0
    ) -> tuple[Tensor, list[Aux]]:
        """Vectors before the head, (batch, time, dim), and aux; carries the state of a split."""
        tokens = batch["tokens"]
        state = self._state(batch["continues"], split) if "continues" in batch else None
        x, state, aux = self.net.hidden(
            tokens,
            state,
            documents=batch.get("documents"),
            examples=batch.get("examples"),
            positions=batch.get("positions"),
            loops=loops,
            no_grad_loops=no_grad_loops,
        )
        if state is not None:
            self._carried[split] = interface.detach(state)
        return x, aux

    def _state(self, continues: Tensor, split: str) -> State:
        """What the rows that continue carried, and the empty state for the others."""
        fresh = self.net.init_state(len(continues), device=continues.device)
        carried = self._carried.pop(split, None)
        if carried is None:
            if _grows(self.net):
                raise ValueError(
                    "this model's state grows with the text, so it cannot be carried from window "
                    "to window without end: take a mixer with a constant state, or carry_state: "
                    "false"
                )
            return fresh
        return interface.select_rows(continues, interface.to(carried, continues.device), fresh)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        labels = check_labels(batch)
        labelled = (labels != IGNORED).sum()
        everywhere = sum_over_ranks(self.trainer, labelled)
        if batch_idx % self.trainer.accumulate_grad_batches == 0:  # as Lightning drops gradients
            self._sums = [{} for _ in range(self.net.depth)]
            self._labelled = self._scale = None
        self._length = labels.shape[1]
        if self.sharded:  # gradients are exchanged once a step, as Lightning has it under DDP
            # Before the first step a checkpoint's reader of the optimizer would take one of zeros
            # if it saw no gradients, and those that wait are not seen.
            waits = self.trainer.fit_loop._should_accumulate() and self.trainer.global_step > 0
            self.net.set_requires_gradient_sync(not waits)  # type: ignore[operator]  # FSDP2's
        self._labelled = everywhere if self._labelled is None else self._labelled + everywhere
        if self._scale is None:
            # Any number would do; this one gives gradients the size that they will have.
            self._scale = torch.where(everywhere > 0, everywhere, labels.numel())
        # Gradients are averaged over ranks; scaled so, they are those of all tokens together.
        ranks = self.trainer.world_size
        loss: Any = 0
        for weight, loops, free in passes(
            self.net.loops, self.progressive_loss, self.progressive_seed, self.steps_taken
        ):
            aux, total = self._pass(batch, labels, labelled, loops, free)
            total = weight * total
            pooled = pooled_losses(self.trainer, self.net, aux)
            loss = loss + total * ranks / self._scale
            self.figures.add("loss", total, labelled, weight)
            for found, tokens in ((aux, ranks * labelled), (pooled, everywhere)):
                values = [value for layer in found for value in layer.losses.values()]
                if values:
                    fraction = tokens.to(total.dtype) / self._scale
                    loss = loss + weight * fraction * torch.stack(values).sum()
            for mine, layer in zip(self._sums, aux, strict=True):
                for name, value in layer.sums.items():
                    mine[name] = mine.get(name, 0) + value.detach()
            self.figures.accumulate(scalars(aux) | scalars(pooled))
        documents = batch.get("documents")
        # Filled where it lies: copied from the host it would wait for the device.
        whole = torch.full((), labels.numel(), device=self.device)
        self.figures.add("tokens", whole if documents is None else (documents >= 0).sum())
        self._watch(loss.detach())
        summed: Tensor = loss
        return summed

    def _pass(
        self, batch: Batch, labels: Tensor, labelled: Tensor, loops: int | None, free: int
    ) -> tuple[list[Aux], Tensor]:
        """Aux, and the loss times the labelled tokens: of the labels, or beside a teacher."""
        if self.teacher is None:
            x, aux = self._hidden(batch, "train", loops, free)
            return aux, total_loss(x, self.net.head, labels)
        with vectors_before_blocks(self.net) as before:
            x, aux = self._hidden(batch, "train", loops, free)
        terms = self.teacher.terms(x, before, self.net.head, batch)
        of_labels: Any = 0
        if self.teacher.takes_labels:
            of_labels = total_loss(x, self.net.head, labels)
            self.figures.add("label_loss", of_labels, labelled)
        rows = len(labels)
        self.figures.add("divergence", terms.divergence / rows, labelled.new_tensor(1))
        self.figures.add("hidden_distance", terms.hidden, labelled.new_tensor(1))
        return aux, self.teacher.total(terms, labelled, rows, of_labels)

    def _divide_gradients(self) -> None:
        """Make the gradients of an accumulation those of its labelled tokens' mean.

        Each loss was divided by a number of `training_step`'s, and by Lightning by the
        micro-batches that a step is meant to have. Without accumulation that is right already.
        """
        count = self.trainer.accumulate_grad_batches
        if count == 1 or self._labelled is None or self._scale is None:
            return
        wide = widest(self.device)
        factor = (self._scale * count).to(wide) / self._labelled.clamp(min=1)
        gradients: dict[torch.dtype, list[Tensor]] = {}
        for parameter in self.parameters():
            grad: Any = parameter.grad
            if grad is not None:
                local = grad.to_local() if hasattr(grad, "to_local") else grad  # of a shard
                gradients.setdefault(local.dtype, []).append(local)
        for dtype, alike in gradients.items():
            torch._foreach_mul_(alike, factor.to(interface.at_least_float32(dtype)))

    @property
    def steps_taken(self) -> int:
        """Optimizer steps that changed the weights: all but those that loss scaling skipped."""
        return self.trainer.global_step - self._skipped

    def _watch(self, loss: Tensor) -> None:
        """Notice a non-finite loss: on the CPU at once, elsewhere when it costs nothing."""
        self._unchecked.append((self.trainer.global_step + 1, loss))
        if loss.device.type == "cpu":
            self.check_losses()

    def check_losses(self) -> None:
        """Look at the losses since the last look.

        Raises:
            FloatingPointError: One is nan or infinite; the step is named.
        """
        self.finish_row()
        if not self._unchecked:
            return
        steps, losses = zip(*self._unchecked, strict=True)
        self._unchecked.clear()
        _check_finite(steps, torch.stack(losses))

    def check_weights(self) -> None:
        """Look at the weights, which a last step with a good loss may have spoilt.

        Raises:
            FloatingPointError: Some are nan or infinite.
        """
        # A sum is infinite or nan where an entry is; two infinities of other sign make nan.
        parts = map(deepspeed.local_part, self.parameters())
        total = torch.stack([weight.float().sum() for weight in parts])
        if deepspeed.stage_of(self.trainer.strategy) == 3:  # the ranks hold other parts
            total = sum_over_ranks(self.trainer, total)
        if not total.isfinite().all():
            raise FloatingPointError(
                f"step {self.trainer.global_step} made weights that are not finite"
            )

    # ------------------------------------------------------------------------ optimizer

    def configure_optimizers(self) -> Any:
        half = str(self.trainer.precision).startswith("16")  # whose loss scaling knows no fused one
        strategy = self.trainer.strategy
        cuts = self.sharded or deepspeed.uses_deepspeed(strategy)
        if cuts and issubclass(find_optimizer(self.optimizer), Muon):
            who = "FSDP2" if self.sharded else "DeepSpeed"
            raise ValueError(
                f"optimizer Muon takes whole matrices, and {who} cuts them: take "
                f"--trainer.strategy ddp or {ZERO}, or AdamW"
            )
        optimizer = build_optimizer(
            self.optimizer,
            self.net,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            betas=self.betas,
            joining=self._joining,
            fused=self.device.type in ("cuda", "cpu") and not half,
            sharded=isinstance(strategy, ZeroStrategy),
        )
        self.optimized = [list(group["params"]) for group in optimizer.param_groups]
        factor = learning_rate_schedule(
            self.warmup_steps,
            self.trainer.estimated_stepping_batches,
            self.final_learning_rate,
            self.schedule,
            self.decay_fraction,
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        if deepspeed.uses_deepspeed(self.trainer.strategy):
            return  # the engine's step clips: Lightning has told it the norm
        if gradient_clip_val and gradient_clip_algorithm in (None, "norm"):
            # As Lightning's own, which throws the norm away.
            if self.sharded:
                from archzoo.training import sharding  # takes a while to import

                clip: Callable[..., Tensor] = sharding.clip_by_norm
            else:
                clip = clip_by_norm
            self._gradient_norm = clip(list(self.parameters()), gradient_clip_val)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Step, and what belongs to it: all of it done before any checkpoint can be written."""

        def closure() -> Any:
            result = None if optimizer_closure is None else optimizer_closure()
            mean_gradients(self.trainer, self._joining)
            self._divide_gradients()  # before anyone looks at them: callbacks, scaling, clipping
            return result

        self._stepped = False
        hook = deepspeed.inner(optimizer).register_step_post_hook(self._has_stepped)
        try:
            super().optimizer_step(epoch, batch_idx, optimizer, closure)
        finally:
            hook.remove()
        engine = deepspeed.engine_of(self.trainer.strategy)
        if engine is not None and self.trainer.gradient_clip_val:
            self._gradient_norm = torch.as_tensor(engine.get_global_grad_norm())
        sums, self._sums = sum_over_ranks(self.trainer, self._sums), []
        if self._stepped:
            self.net.after_step(sums)
        else:
            self._skipped += 1
        self.finish_row()  # that of a step before, which the GPU has done
        step = self.trainer.global_step + 1
        if step % self.log_every == 0:
            self._begin_row(step, optimizer.param_groups[0]["lr"])
            if not self.defers_rows:
                self.finish_row()

    def _has_stepped(self, *_: Any) -> None:
        self._stepped = True

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """The rate of a step that was skipped is the next one's."""
        by_step = any(
            config.scheduler is scheduler and config.interval == "step"
            for config in self.trainer.lr_scheduler_configs
        )
        if self._stepped or not by_step:
            super().lr_scheduler_step(scheduler, metric)

    @property
    def log_every(self) -> int:
        """Optimizer steps from one row of the log to the next."""
        return int(self.trainer.log_every_n_steps)  # type: ignore[attr-defined]

    @property
    def defers_rows(self) -> bool:
        """Whether a row of the log is written a step later, so that no step waits for a GPU."""
        return self.device.type == "cuda"

    def _begin_row(self, step: int, learning_rate: float) -> None:
        """Ask the device for a row of the log: means over the steps since the last one."""
        steps, losses = zip(*self._unchecked, strict=True) if self._unchecked else ((), ())
        self._unchecked.clear()
        sums = sum_over_ranks(self.trainer, self.figures.sums())
        numbers = {f"sum/{name}": value for name, value in sums.items()}
        if losses:
            numbers["losses"] = torch.stack(losses)
        if self._gradient_norm is not None:
            numbers["gradient_norm"] = self._gradient_norm
        self._underway = RowUnderway(
            step,
            steps,
            Transfer(numbers),
            self._stopwatch.lap(),
            self._operations_and_peak(),
            learning_rate,
            float(self._skipped),
            memory(self.device),
        )
        self.figures.clear()

    def finish_row(self) -> None:
        """Write the row of the log that is still to come from the device.

        Raises:
            FloatingPointError: A loss of its steps is nan or infinite; the step is named.
        """
        if self._underway is None:
            return
        row, self._underway = self._underway, None
        numbers = row.numbers.read()
        if "losses" in numbers:
            _check_finite(row.steps, numbers["losses"])
        sums = {
            name.removeprefix("sum/"): value
            for name, value in numbers.items()
            if name.startswith("sum/")
        }
        found = self.figures.means(sums, Stopwatch.seconds(row.spans), *row.operations_and_peak)
        found["learning_rate"] = row.learning_rate
        if "gradient_norm" in numbers:
            found["gradient_norm"] = numbers["gradient_norm"].item()
        if row.skipped:
            found["skipped_steps"] = row.skipped
        found |= row.memory
        self.logged_step = row.step
        self._log({f"train/{name}": value for name, value in found.items()}, row.step)

    def _operations_and_peak(self) -> tuple[float, float | None]:
        """A token's operations at the length of the last batch, and a second's of all GPUs."""
        peak = peak_of(self.device)
        if peak is None or (self.progressive_loss and self.net.loops > 1):  # iterations are drawn
            return 0.0, None
        operations = training_operations(self.net, self._length, self._multiplied)
        return operations, peak * self.trainer.world_size

    def _log(self, row: dict[str, float], step: int) -> None:
        self.latest |= row
        for logger in self.trainer.loggers:
            logger.log_metrics(row, step=step)

    # ------------------------------------------------------------------------ evaluation

    def check_task(self, task: Task, accumulated: int) -> None:
        """Refuse a task that this objective cannot train on, before anything is trained.

        Args:
            task: Which, prepared.
            accumulated: Micro-batches of an optimizer step.

        Raises:
            ValueError: It cannot; the message says what it would take.
        """

    def check_beside(self, decoder: Decoder, task: Task, begun: Collection[str] = ()) -> None:
        """Refuse a checkpoint that is read beside the model, before anything is trained.

        Args:
            decoder: That is trained, on any device.
            task: Prepared.
            begun: The settings, such as model.reference, whose checkpoints are trained first: they
                hold a model as it begins.

        Raises:
            FileNotFoundError: It is not there.
            ValueError: It does not fit.
        """
        if self.distil is not None:
            Teacher(self.distil, decoder, task)

    def measures(self, task: Task) -> tuple[str, ...]:
        """The names of what an evaluation gives of a task's own problems.

        Args:
            task: Which.
        """
        return ("loss", *task.metrics)

    def _evaluate(self, batch: Batch, split: str, number: int, loader: int = 0) -> None:
        labels = check_labels(batch)
        first = number == loader == 0  # which tells enough of the adapters' routers
        watched = gate_entropies(self.net) if first else nullcontext(self._entropies)
        with watched as self._entropies:
            x, _ = self._hidden(batch, split)
        losses, predicted = score(x, self.net.head, labels)
        labelled = labels != IGNORED
        right = predicted.view_as(labels) == labels
        self._evaluated.add(losses, right, labelled, loader, batch.get("bytes"))

    def _begin_evaluation(self, split: str) -> None:
        self._carried.pop(split, None)
        extra = self.task.extra_evaluations(split) if self.task else ()
        metrics = self.task.extra_metrics if self.task else ()
        self._evaluated = EvaluationFigures(self.device, extra, metrics)
        with gate_entropies(self.net) as self._entropies:
            pass  # a rank without a batch has the same names as the others
        if self.trainer.state.fn != "fit" and self.task is not None:
            for logger in self.trainer.loggers:
                if isinstance(logger, MetricsFile):
                    logger.part = self.task.test_part if split == "test" else split

    def _end_evaluation(self, split: str) -> None:
        if self.cut_short or self.trainer.sanity_checking:
            return
        sums = sum_over_ranks(self.trainer, self._evaluated.sums)
        means = self._evaluated.means(sums, self.task.metrics if self.task else None)
        if self._entropies:
            means |= mean_entropies(sum_over_ranks(self.trainer, self._entropies))
        row = {f"{split}/{name}": value for name, value in means.items()}
        if self.trainer.state.fn == "fit":
            # To callbacks through Lightning, to files at the step as people count it: from 1.
            # All ranks have the same values, and sync_dist says so.
            self.log_dict(row, logger=False, sync_dist=True)
            self._log(row, self.trainer.global_step)
        else:  # what is logged through Lightning is also what `trainer.test` hands back
            self.latest |= row
            self.log_dict({"step": float(self.loaded_step or 0), **row}, sync_dist=True)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate(batch, "validation", batch_idx, dataloader_idx)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate(batch, "test", batch_idx, dataloader_idx)

    def on_validation_start(self) -> None:
        self.finish_row()  # before the row of the validation
        self._stopwatch.pause()
        self._random_before = random_state()

    def on_validation_end(self) -> None:
        self._stopwatch.resume()  # training's speed is training's

    @contextmanager
    def not_training(self) -> Iterator[None]:
        """Within it time is not training's, whose tokens a second are logged."""
        self._stopwatch.pause()
        try:
            yield
        finally:
            self._stopwatch.resume()

    def on_validation_epoch_start(self) -> None:
        self._begin_evaluation("validation")

    def on_validation_epoch_end(self) -> None:
        self._end_evaluation("validation")

    def on_test_epoch_start(self) -> None:
        self._begin_evaluation("test")

    def on_test_epoch_end(self) -> None:
        self._end_evaluation("test")

    def on_predict_epoch_start(self) -> None:
        self._carried.pop("predict", None)

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, str]]:
        """Each row as text: what was read, what was wanted, and what was predicted for it.

        Predictions are made with the right tokens before them (teacher forcing). Numbers are
        written as people do, whatever the task does.
        """
        task, labels = self.task, check_labels(batch)
        if task is None:
            raise ValueError("predict needs a task, whose tokenizer writes the predictions")
        x, _ = self._hidden(batch, "predict")
        predicted = score(x, self.net.head, labels).predicted.view_as(labels)
        labelled = (labels != IGNORED).tolist()
        rows = []
        decode, writing = task.tokenizer.decode, writing_of(task.config())
        for row, tokens in enumerate(batch["tokens"].tolist()):
            indices = [index for index, wanted in enumerate(labelled[row]) if wanted]
            if not indices:
                continue
            text = decode(tokens[: indices[0] + 1])
            rows.append(
                {
                    "text": writing.read(text),
                    "asked": writing.read(decode(labels[row, indices].tolist()), text),
                    "predicted": writing.read(decode(predicted[row, indices].tolist()), text),
                }
            )
        return rows

    # ------------------------------------------------------------------------ checkpoints

    def hyper_parameters(self) -> dict[str, Any]:
        """Arguments that make this module again: plain data, and no preset to look up."""
        return {
            "learning_rate": self.learning_rate,
            "warmup_steps": self.warmup_steps,
            "schedule": self.schedule,
            "decay_fraction": self.decay_fraction,
            "optimizer": self.optimizer,
            "final_learning_rate": self.final_learning_rate,
            "weight_decay": self.weight_decay,
            "betas": list(self.betas),
            "progressive_loss": self.progressive_loss,
            "progressive_seed": self.progressive_seed,
            "distil": plain(self.distil),
            **self.frozen,
            **self.net.config,
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add all that bringing a run back takes: tensors and plain data, never objects."""
        checkpoint["archzoo_version"] = __version__
        checkpoint["preset"] = self.preset
        checkpoint["base"] = self.net.base
        checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY] = self.hyper_parameters()
        if self.task is not None:
            checkpoint["task"] = self.task.config()
            checkpoint["tokenizer"] = {
                name: torch.frombuffer(bytearray(content), dtype=torch.uint8)
                for name, content in self.task.tokenizer.files().items()
            }
        random = random_state()
        if self.cut_short and self._random_before is not None:
            random = self._random_before
        checkpoint["training"] = {
            "totals": self.figures.sums(),
            "skipped": self._skipped,
            "carried": dict(self._carried),
            "random": gather_random_states(random, self.trainer.world_size),
        }
        if self.teacher is not None:
            checkpoint["teacher"] = self.teacher.digest
        # Lightning's own averages move what stands still, by rounding, and read whole states alone.
        ours = any(isinstance(callback, AverageWeights) for callback in self._callbacks)
        whole = "averaging_state" in checkpoint and not ours
        whole = whole or deepspeed.uses_deepspeed(self.trainer.strategy)
        if self.base is not None and not whole:
            checkpoint[BASE] = self.base._asdict()
            left_out = self._left_out()
            for held in {"state_dict", "current_model_state"} & checkpoint.keys():
                checkpoint[held] = {
                    name: tensor
                    for name, tensor in checkpoint[held].items()
                    if own_name(name).removeprefix("decoder.") not in left_out
                }

    def _left_out(self) -> set[str]:
        """The names of the base's weights that are as they were when training started."""
        trained = {
            id(p) for o in self.trainer.optimizers for g in o.param_groups for p in g["params"]
        }
        parameters = {
            own_name(name): parameter
            for name, parameter in self.net.named_parameters(remove_duplicate=False)
        }
        moved = {n for n, p in parameters.items() if p.requires_grad or id(p) in trained}
        names = base_weights(self.net).keys()
        # Buffers move with the parameters that they belong to: experts' biases, say.
        return names - moved if not names & moved else (names & parameters.keys()) - moved

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]  # Lightning's is not a usual method
        cls,
        checkpoint_path: str | os.PathLike[str],
        map_location: torch.device | str | None = None,
        *,
        strict: bool = True,
        weights_only: bool | None = None,
        **arguments: Any,
    ) -> LanguageModel:
        """The module of a run's checkpoint, which runs nothing, as Lightning's own reader would.

        Args:
            checkpoint_path: Of the file.
            map_location: A device. None: the CPU.
            strict: Whether all of its tensors must be this module's.
            weights_only: For Lightning's sake; nothing else is ever read.
            **arguments: Of the module, instead of the checkpoint's.
        """
        checkpoint = read_safely(checkpoint_path)
        if not isinstance(checkpoint.get(cls.CHECKPOINT_HYPER_PARAMS_KEY), dict):
            raise ValueError(f"{checkpoint_path} was not written by archzoo's training")
        if record := base_in(checkpoint, checkpoint_path):
            path = Path(checkpoint_path)
            place = find_base(record, arguments.get("weights"), path)
            check_beside(path, locate(place))
            arguments |= {"weights": str(place)}
        module = cls(**(module_arguments(checkpoint) | arguments))
        module.on_load_checkpoint(checkpoint)
        strict = strict and checkpoint.get(BASE) is None
        module.load_state_dict(checkpoint["state_dict"], strict=strict)
        return module.to(map_location or "cpu")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse what is not this model, and take up the rest of the run's state."""
        theirs = checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY)
        training = checkpoint.get("training")
        if (
            not isinstance(theirs, dict)
            or not isinstance(training, dict)
            or not all(isinstance(training.get(n), dict) for n in ("totals", "carried", "random"))
            or not isinstance(training["random"].get("cpu"), Tensor)
        ):
            raise ValueError("this checkpoint was not written by archzoo's training")
        check_same_model(self.net.config, theirs)
        if self._trainer is not None and self.trainer.state.fn == "fit":
            mine = {"optimizer": title_of(self.optimizer), "objective": self.objective}
            check_same_training(self.frozen | mine, trained_by(checkpoint))
            self._check_averages(checkpoint)
            self._check_teacher(checkpoint)
        record = base_in(checkpoint, "the checkpoint")
        if record is not None:
            self._check_base(record)
        if not (self.sharded or self._by_engine):  # which have loaded the weights by themselves
            beside = set() if record is None else base_weights(self.net).keys()
            check_weights_fit(self.net, checkpoint.get("state_dict"), beside)
            if self._trainer is not None:
                # Else float64 would be read through float32: Lightning converts after it reads.
                self.trainer.precision_plugin.convert_module(self)
        files = checkpoint.get("tokenizer")
        if self.task is not None and files is not None:
            # Rebuilt first: a file may say of truncating and the like what is switched off now.
            same = self.task.tokenizer.files() == from_files(tokenizer_files(checkpoint)).files()
            if not same:
                raise ValueError(
                    "the checkpoint was trained with another vocabulary than this task's"
                )
        if self.net.task is None:
            self.net.task = checkpoint.get("task")
        self.net.base = checkpoint.get("base", self.net.base)
        if self.task is not None and type(self.task).__qualname__ not in checkpoint:
            self._take_up_stream(checkpoint)
        states = checkpoint.get("optimizer_states", [])
        checkpoint["optimizer_states"] = [
            regroup(state, self.net, self._joining) for state in states
        ]
        self.loaded_step = checkpoint["global_step"]
        self.figures.load(training["totals"])
        self._carried = dict(training["carried"])
        self._random, self._skipped = training["random"], training.get("skipped", 0)

    @property
    def _callbacks(self) -> list[lightning.Callback]:
        return self.trainer.callbacks  # type: ignore[attr-defined,no-any-return]

    @property
    def _by_engine(self) -> bool:
        """Whether DeepSpeed reads the checkpoint."""
        return self._trainer is not None and deepspeed.uses_deepspeed(self.trainer.strategy)

    def _check_averages(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to train on from averages of weights, which the optimizer's state is not of."""
        averages = any(isinstance(callback, WeightAveraging) for callback in self._callbacks)
        if "averaging_state" in checkpoint and not averages:
            raise ValueError(
                "the checkpoint's run averages its weights: resume with the same --ema, or start "
                "a new run from the averages by --model.weights"
            )

    def _check_teacher(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to train on a run beside another teacher, or with another loss."""
        theirs = checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY].get("distil") or {}
        mine: dict[str, Any] = plain(self.distil) or {}
        other = "resume with the same, or start a new run from it by --model.weights"
        for name in sorted((mine.keys() | theirs.keys()) - {"teacher"}):
            if mine.get(name) != theirs.get(name):
                raise ValueError(
                    f"the checkpoint's run has distil.{name}={theirs.get(name)}, and here it is "
                    f"{mine.get(name)}: {other}"
                )
        if self.teacher is not None and checkpoint.get("teacher") != self.teacher.digest:
            raise ValueError(f"the checkpoint's run learnt from another teacher: {other}")

    def _check_base(self, wanted: Base) -> None:
        """Refuse a checkpoint of adapters whose base is not the one that they stand beside here."""
        if self.base is None:
            raise ValueError(
                f"the checkpoint holds adapters alone, of the base {wanted}: give "
                f"--model.weights {wanted.path or 'PLACE'}"
            )
        if self.base.dtype == wanted.dtype or self.sharded:
            same = self.base.digest == wanted.digest
        else:
            same = base_digest(self.net, DTYPES[wanted.dtype]) == wanted.digest
        if not same:
            raise ValueError(
                f"the checkpoint's adapters belong to another base: {wanted}, and this one is "
                f"{self.base}, by their digests: give --model.weights PLACE, where theirs lies"
            )

    def _take_up_stream(self, checkpoint: dict[str, Any]) -> None:
        """Tell the task what a run has used whose checkpoints did not say so themselves."""
        task = checkpoint.get("task")
        if self.task is None or not isinstance(task, dict):
            return
        same = str(task.get("class_path")).rpartition(".")[2] == type(self.task).__qualname__
        if not same and self.trainer.state.fn != "fit":
            return  # of the parts of another task it says nothing
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]
        batches, batch_size = progress["completed"], task["init_args"]["batch_size"]
        state = {"batches": batches, "examples": batches * batch_size, "batch_size": batch_size}
        known = self.task.added | task["init_args"]
        state["split"] = {n: known[n] for n in self.task.split_settings() if n in known}
        self.task.load_state_dict(state)

    def on_train_start(self) -> None:
        self.figures.to(self.device)
        if self._weights is None and self.loaded_step is None and self.freezing is not None:
            say(
                "what is frozen keeps the random values that it was drawn with: --model.weights "
                "CHECKPOINT starts from trained ones"
            )
        # Last of all, so that nothing draws random numbers in between.
        bring_back_random_state(self._random, self.global_rank)
        self._random = None
        self._stopwatch = Stopwatch(self.device)

    def on_train_end(self) -> None:
        self.finish_row()


class RowUnderway(NamedTuple):
    """A row of the log that the device is still to make.

    Attributes:
        step: The row's.
        steps: Those of the losses that no one has looked at.
        numbers: Sums, losses and the gradient's norm.
        spans: Of the stopwatch.
        operations_and_peak: Of a token and of a second.
        learning_rate: Of the step.
        skipped: Steps that changed nothing.
        memory: What it takes, as the log names it.
    """

    step: int
    steps: tuple[int, ...]
    numbers: Transfer
    spans: list[tuple[Any, Any]]
    operations_and_peak: tuple[float, float | None]
    learning_rate: float
    skipped: float
    memory: dict[str, float]


def _check_finite(steps: Sequence[int], losses: Tensor) -> None:
    finite = losses.isfinite().tolist()
    if not all(finite):
        first = finite.index(False)
        raise FloatingPointError(f"the loss is {losses[first].item()} at step {steps[first]}")


def _as_names(names: list[str] | str | None) -> list[str] | None:
    """One name as a list of it."""
    return [names] if isinstance(names, str) else names


def _grows(decoder: Decoder) -> bool:
    """Whether the state takes more memory for a longer text, as a KV cache does."""
    with torch.device("meta"):
        sizes = [interface.nbytes(decoder.init_state(1, capacity=n, device="meta")) for n in (1, 2)]
    return sizes[1] > sizes[0]
