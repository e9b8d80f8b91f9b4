"""What every method of adaptation costs: a training step, a decoded token, optimizer memory.

    python benchmarks/adapters.py                 # on a GPU: bf16, 16 rows of 1,024 tokens
    python benchmarks/adapters.py --device cpu    # float32, 4 rows of 256 tokens
    python benchmarks/adapters.py --compile --beside --methods LoRA,DoRA

A step is over that of the same model whose base is frozen but for the first norm, so that the
gradient crosses all blocks and no weight learns; an optimizer step is part of both. On a GPU many
steps are timed together, since `archzoo fit` waits for none. A token is over the base's, as
`archzoo.generate` decodes it: with the adapter beside the weights, and merged. What
is compared is timed in turn; what is allowed is of the size small. `bytes_ratio` is what a token
reads of weights with the adapter beside them, over what it reads of the base's: its time at the
memory's speed. Methods whose papers change query and value are put on every Linear of the blocks,
at rank 8 where they have one; the others where they are by default.

With --beside every row has a process of its own. All compile at once, so that their models are in
memory together, and then each measures by itself.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import itertools
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import in_turn, write_rows
from torch import Tensor
from torch.nn import functional as F
from turns import take_turn, wait_for_turn, wait_until_ready

import archzoo
from archzoo.adapters import Adapter
from archzoo.decoder import Decoder
from archzoo.linear import Linear
from archzoo.parts import list_parts

TOGETHER = 16  # steps on a GPU, before it is waited for
STEP = 1.15  # of LoRA, over the frozen base's
UNMERGED, MERGED = 1.3, 1.05  # of a token, over the base's; merged it is the base: 1.0 and noise
RANK = 8
TURN = "ARCHZOO_TURN"  # in the environment of a process of --beside: the place of `wait_for_turn`


def recipe(cls: Any) -> tuple[Any, str]:
    """How a method is put on a model, and where."""
    arguments: dict[str, Any] = {}
    if set(cls.default_targets) == {"query", "value"}:
        arguments["targets"] = ["mixer", "feed_forward"]
    if "rank" in inspect.signature(cls).parameters:
        arguments["rank"] = RANK
    return partial(cls, **arguments), " ".join(arguments.get("targets", cls.default_targets))


class Training:
    """Steps of one model on one batch: so many at each call."""

    def __init__(self, model: Decoder, tokens: Tensor, compiled: bool) -> None:
        self.model, self.tokens = model.train(), tokens
        self.count = TOGETHER if tokens.is_cuda else 1
        learn = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.learned = sum(parameter.numel() for parameter in learn)
        self.optimizer = torch.optim.AdamW(learn, lr=1e-4, fused=True)
        if compiled:
            from archzoo.training.compiling import HOST_BOUND, options

            model.compile(options=options(graphs=model.parameter_count() < HOST_BOUND))

    def __call__(self) -> None:
        device = self.tokens.device.type
        for _ in range(self.count):
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                logits = self.model(self.tokens[:, :-1]).logits
            F.cross_entropy(logits.flatten(0, 1).float(), self.tokens[:, 1:].flatten()).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()

    def state_bytes(self) -> int:
        """What the optimizer holds after a step."""
        tensors = [t for state in self.optimizer.state.values() for t in state.values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def bytes_read(model: Decoder) -> int:
    """Of weights by a decoded token: all but the vectors of other tokens, where they lie apart.

    Adapters that are held as one matrix with their weight count as no more than that.
    """
    adapters, beside = set(), set()
    with model.weights_held(), torch.no_grad():
        for module in model.modules():
            if isinstance(module, Adapter):
                adapters |= set(module.parameters())
            elif isinstance(module, Linear) and module.one_weight() is None:
                beside |= {p for _, each in module.adapters() for p in each.parameters()}
    read = set(model.parameters()) - (adapters - beside)
    if model.embedding.weight is not model.head.weight:
        read -= {model.embedding.weight}
    return sum(parameter.numel() * parameter.element_size() for parameter in read)


def milliseconds_per_token(model: Decoder, tokens: int) -> float:
    """Of one row, by the model's own clock, which counts neither prompt nor capture."""
    made: float = archzoo.generate(model, [[1, 2, 3]], max_tokens=tokens).milliseconds_per_token
    return made


def decoded(models: dict[str, Decoder], tokens: int, rounds: int) -> dict[str, float]:
    """Median milliseconds of a token, in turn."""
    times: dict[str, list[float]] = {side: [] for side in models}
    for number in range(rounds + 1):
        for side, model in models.items():
            taken = milliseconds_per_token(model, tokens)
            if number:
                times[side].append(taken)
    return {side: sorted(taken)[len(taken) // 2] for side, taken in times.items()}


def measure(
    make: Callable[[], Decoder], method: str, cls: Any, tokens: Tensor, given: argparse.Namespace
) -> dict[str, Any]:
    """One method on one model: a row."""
    build, where = recipe(cls)
    frozen = make().requires_grad_(False)
    for parameter in frozen.blocks[0].mixer_norm.parameters():
        parameter.requires_grad_(True)
    adapted = archzoo.adapt(make(), build)
    steps = {
        "frozen": Training(frozen, tokens, given.compile),
        "adapted": Training(adapted, tokens, given.compile),
    }
    on_gpu = tokens.is_cuda
    for _ in range(2 if on_gpu else 0):
        for run in steps.values():
            run()
    if place := os.environ.pop(TURN, None):
        torch.cuda.empty_cache()
        wait_for_turn(place)
    step = in_turn(dict(steps), given.rounds)
    step = {side: ms / steps[side].count for side, ms in step.items()}
    row: dict[str, Any] = {
        "method": method,
        "targets": where,
        "trained": steps["adapted"].learned,
        "of": adapted.parameter_count(),
        "optimizer_bytes": steps["adapted"].state_bytes(),
        "rows": tokens.shape[0],
        "length": tokens.shape[1] - 1,
        "dtype": "bfloat16, float32 weights" if on_gpu else "float32",
        "compiled": given.compile,
        "frozen_step_ms": round(step["frozen"], 3),
        "step_ms": round(step["adapted"], 3),
        "step_ratio": round(step["adapted"] / step["frozen"], 3),
        "step_allowed": STEP if method == "LoRA" and given.size == "small" else "",
    }
    models = {"base": frozen, "unmerged": adapted}
    for model in models.values():
        model.forget_compiled()
        model.to(torch.bfloat16 if on_gpu else torch.float32).eval()
    if cls.mergeable:
        models["merged"] = archzoo.merge_adapter(copy.deepcopy(adapted))
    row["bytes_ratio"] = round(bytes_read(adapted) / bytes_read(frozen), 3)
    token = decoded(models, given.decoded, given.token_rounds)
    row["base_token_ms"] = round(token["base"], 4)
    for side, allowed in (("unmerged", UNMERGED), ("merged", MERGED)):
        there = side in token
        row[f"{side}_token_ms"] = round(token[side], 4) if there else ""
        row[f"{side}_ratio"] = round(token[side] / token["base"], 3) if there else ""
        row[f"{side}_allowed"] = allowed if there and given.size == "small" else ""
    return row


def beside(cases: list[tuple[str, str]], arguments: list[str]) -> list[str]:
    """A process for each method and family, which writes its row; those that failed.

    Args:
        cases: Methods and families.
        arguments: Of the command line, for every process.
    """
    failed = []
    with tempfile.TemporaryDirectory() as root:
        processes = {}
        for number, (name, family) in enumerate(cases):
            place = str(Path(root, str(number)))
            processes[place] = subprocess.Popen(
                [sys.executable, sys.argv[0], *arguments, "--methods", name, "--families", family],
                env=os.environ | {TURN: place},
            )
        try:
            for place, process in processes.items():
                wait_until_ready(place, process)
            for (place, process), case in zip(processes.items(), cases, strict=True):
                if status := take_turn(place, process):
                    failed.append(f"{case[0]} on {case[1]}: ended with status {status}")
        finally:
            for process in processes.values():  # those whose turn has not come, if this ends early
                process.terminate()
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    available = "cuda" if torch.cuda.is_available() else "cpu"
    methods: dict[str, type[Adapter]] = list_parts("adapter")  # type: ignore[assignment]
    parser.add_argument("--device", choices=("cuda", "cpu"), default=available)
    parser.add_argument("--size", default="small", help="of the presets")
    parser.add_argument("--families", default="retnet,transformer")
    parser.add_argument("--methods", default=",".join(methods), help="by name, with commas")
    parser.add_argument("--rows", type=int, help="of a batch; default: 16 on a GPU, else 4")
    parser.add_argument("--length", type=int, help="in tokens; default: 1,024 on a GPU, else 256")
    parser.add_argument("--decoded", type=int, help="tokens; default: 128 on a GPU, else 12")
    parser.add_argument("--rounds", type=int, default=5, help="of steps, in turn")
    parser.add_argument("--token_rounds", type=int, help="default: 3 on a GPU, else 5")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no row after these")
    parser.add_argument("--compile", action="store_true", help="the step, as fit does on a GPU")
    parser.add_argument("--beside", action="store_true", help="a process a row, all at once")
    given = parser.parse_args()
    on_gpu = given.device == "cuda"
    if not on_gpu:
        torch.set_num_threads(1)
    rows, length = given.rows or (16 if on_gpu else 4), given.length or (1024 if on_gpu else 256)
    given.decoded = given.decoded or (128 if on_gpu else 12)
    given.token_rounds = given.token_rounds or (3 if on_gpu else 5)
    names, families = given.methods.split(","), given.families.split(",")
    if unknown := ", ".join(name for name in names if name not in methods):
        parser.error(f"there is no method {unknown}; there are {', '.join(methods)}")
    what = f"{'bfloat16' if on_gpu else 'float32'}-adapters"
    begin, count = time.monotonic(), 0
    failed = []
    cases = list(itertools.product(names, families))
    if given.beside:
        own = argparse.ArgumentParser(add_help=False)
        own.add_argument("--beside", action="store_true")
        own.add_argument("--methods")
        own.add_argument("--families")
        failed, cases = beside(cases, own.parse_known_args()[1]), []
    for name, family in cases:
        count += 1
        if time.monotonic() - begin > given.seconds:
            failed.append(f"{name} on {family}: no time was left")
            continue
        preset = f"{family}_{given.size}"

        def make(preset: str = preset) -> Decoder:
            torch.manual_seed(0)
            with torch.device(given.device):
                return archzoo.create_model(preset)

        try:
            vocabulary = make().vocab_size
            tokens = torch.randint(vocabulary, (rows, length + 1), device=given.device)
            row = {"model": preset} | measure(make, name, methods[name], tokens, given)
        except Exception as error:  # the other rows are worth having
            traceback.print_exc()
            failed.append(f"{name} on {family}: {error}")
            continue
        late = ""
        for part in ("step", "unmerged", "merged"):
            if row[f"{part}_allowed"] and row[f"{part}_ratio"] > row[f"{part}_allowed"]:
                late += f"  {part} MISSED"
        taken = time.monotonic() - begin
        print(
            f"{count:3d}/{len(cases)} {taken:5.0f} s  "
            f"{preset} {name:14s} step {row['step_ratio']:.3f} x {row['frozen_step_ms']:.1f} ms"
            f"   token {row['unmerged_ratio']} merged {row['merged_ratio'] or '-'} x "
            f"{row['base_token_ms']:.3f} ms   {row['trained']:,} trained, "
            f"{row['optimizer_bytes'] / 1e6:.2f} MB of optimizer{late}",
            flush=True,
        )
        # At once: what is measured stays, whatever ends the run.
        write_rows(
            what,
            [row],
            on_gpu=on_gpu,
            replacing=("model", "method", "targets", "rows", "length", "compiled"),
        )
    if failed:
        raise SystemExit("not measured:\n" + "\n".join(failed))


if __name__ == "__main__":
    main()
