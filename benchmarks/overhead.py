"""What the package costs beside its models: Lightning's loop, the command's start, the import.

    python benchmarks/overhead.py

The loop is a run of `configs/addition.yaml` as `train.py` makes it (progress bar, CSV, logging
every 10 steps) against a bare loop over the same batches with the same model, loss and optimizer;
a step of the one and a step of the other take turns.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import harness
import torch
from torch.nn import functional as F

STEPS = 400
WARMUP = 20  # steps not counted
ROUNDS = 5


def bare_step() -> Callable[[], None]:
    """A step of a loop written out, over the batches of the configuration."""
    import archzoo
    from archzoo.tasks import Addition

    task = Addition(digits=3, batch_size=64)
    model = archzoo.create_model("retnet_tiny", vocab_size=task.vocab_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    batches = iter(task.train_dataloader())

    def step() -> None:
        batch = next(batches)
        logits = model(batch["tokens"], documents=batch["documents"]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def step_times() -> tuple[float, float]:
    """Milliseconds of a bare step and of a step of `archzoo fit`, medians of steps in turn."""
    import lightning

    from archzoo.cli import main

    bare, whole = [], []
    original = lightning.Trainer.fit
    step = bare_step()

    class Turns(lightning.Callback):
        """Between two steps of the trainer, all of it counted, runs a bare one."""

        begin: float | None = None

        def on_train_batch_start(self, *arguments: object) -> None:
            end = time.perf_counter()
            if self.begin is not None:
                whole.append((end - self.begin) * 1e3)
            step()
            self.begin = time.perf_counter()
            bare.append((self.begin - end) * 1e3)

    @functools.wraps(original)  # the command line reads its arguments off the signature
    def fit(self: lightning.Trainer, *arguments: object, **keywords: object) -> None:
        self.callbacks.append(Turns())
        original(self, *arguments, **keywords)

    lightning.Trainer.fit = fit  # type: ignore[method-assign]
    try:
        with tempfile.TemporaryDirectory() as folder:
            command = ["fit", "--config", str(harness.ROOT / "configs" / "addition.yaml")]
            command += ["--trainer.default_root_dir", folder]
            command += ["--trainer.max_steps", str(WARMUP + STEPS + 1)]
            command += ["--trainer.val_check_interval", "1000000"]
            assert main(command) == 0
    finally:
        lightning.Trainer.fit = original  # type: ignore[method-assign]
    last = WARMUP + STEPS
    return statistics.median(bare[WARMUP:last]), statistics.median(whole[WARMUP:last])


def seconds(code: list[str]) -> float:
    """Wall seconds of a fresh Python, the least of some runs: what else runs only adds."""
    taken = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        subprocess.run([sys.executable, *code], check=True, capture_output=True)
        taken.append(time.perf_counter() - begin)
    return min(taken)


def main() -> None:
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()  # --help, or none
    torch.set_num_threads(2)
    bare, loop = step_times()
    print(
        f"a step of retnet_tiny: bare {bare:.2f} ms, lightning {loop:.2f} ms, "
        f"{loop - bare:+.2f} ms, {(loop / bare - 1):+.1%} (required: 2 ms or 5 %)"
    )
    usage = seconds(["-m", "archzoo", "--help"])
    print(f"archzoo --help: {usage:.2f} s (required: 0.5)")
    alone, with_zoo = seconds(["-c", "import torch"]), seconds(["-c", "import torch, archzoo"])
    print(f"import archzoo: {with_zoo - alone:+.2f} s over torch's {alone:.2f} (required: 0.3)")
    rows = [
        {"what": "step, bare loop", "value": round(bare, 3), "unit": "ms", "required": ""},
        {"what": "step, lightning", "value": round(loop, 3), "unit": "ms", "required": ""},
        {"what": "loop's cost", "value": round(loop - bare, 3), "unit": "ms", "required": "2"},
        {"what": "archzoo --help", "value": round(usage, 3), "unit": "s", "required": "0.5"},
        {
            "what": "import archzoo over torch",
            "value": round(with_zoo - alone, 3),
            "unit": "s",
            "required": "0.3",
        },
    ]
    harness.write_rows("float32-overhead", rows)


if __name__ == "__main__":
    main()
