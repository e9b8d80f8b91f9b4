"""What a run shows of itself: in terminals of several widths, and in none."""

import io
import itertools
import logging
import re
import time

import lightning
import pytest
from rich.console import Console

from archzoo.analysis.grid import _bar
from archzoo.tasks import Addition
from archzoo.training import command
from archzoo.training.callbacks import ShowProgress, fold
from archzoo.training.module import LanguageModel


@pytest.mark.parametrize("width", [20, 34, 60, None])
def test_lines_are_broken_between_parts(width):
    parts = [
        "step     10",
        "loss 2.5074",
        "validation loss 2.3103",
        "validation exact match 0.00 %",
    ]
    lines = fold(parts, width)
    assert "  ".join(line.strip() for line in lines) == "  ".join(parts)
    assert all(line.startswith("    ") for line in lines[1:])
    if width is None:
        assert len(lines) == 1
    else:
        assert all(len(line) <= width or line.strip() in parts for line in lines)
    assert all(any(part in line for line in lines) for part in parts)


def train(show, steps=30, **settings):
    model = LanguageModel("retnet_micro")
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=steps,
        log_every_n_steps=2,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=None,
        enable_model_summary=False,
        enable_checkpointing=False,
        logger=False,
        callbacks=[show],
        **settings,
    )
    trainer.fit(model, Addition(digits=1, batch_size=2, validation_examples=4, test_examples=4))


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_the_bar_fits_the_terminal(width):
    show, out = ShowProgress(), io.StringIO()
    show.console = Console(file=out, force_terminal=True, width=width, color_system=None)
    train(show, val_check_interval=10)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue()).replace("\r", "\n")
    last = [line for line in text.split("\n") if "30/30" in line][-1]
    for part in ("training", "━━━━", "loss "):
        assert part in last
    assert max(map(len, text.split("\n"))) <= width
    assert ("tokens/s" in last) == (width >= 90)
    assert "validation exact match" in text


def test_outside_a_terminal_there_is_a_line_every_so_often(monkeypatch):
    """Also where no validation says anything, and at the end of a run that is short."""
    show, out = ShowProgress(), io.StringIO()
    show.console = Console(file=out, width=80)
    train(show, limit_val_batches=0)
    (line,) = [line for line in out.getvalue().splitlines() if line.startswith("step")]
    assert line.startswith("step     30 ") and "loss" in line
    clock = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    show, out = ShowProgress(), io.StringIO()
    show.console = Console(file=out, width=80)
    train(show, limit_val_batches=0, steps=60)
    lines = [line for line in out.getvalue().splitlines() if line.startswith("step")]
    assert 3 <= len(lines) < 30 and len({line.split()[1] for line in lines}) == len(lines)
    show, out = ShowProgress(), io.StringIO()
    show.console = Console(file=out, width=80)
    train(show, val_check_interval=10)  # where a validation is due, its own line is the step's
    steps = [line.split()[1] for line in out.getvalue().splitlines() if line.startswith("step")]
    assert len(set(steps)) == len(steps) and {"10", "20", "30"} <= set(steps)


def test_grid_says_how_far_it_is(capsys, monkeypatch):
    times = iter([0.0, 1.0, 11.0, 12.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(times))
    with _bar(1000, 100) as advance:
        advance(50), advance(50), advance(50)
    assert capsys.readouterr().err == "200 of 1,000 sizes\n"


def test_what_lightning_says_is_shown_where_it_is_news():
    def shown(text, level=logging.INFO, name="lightning.pytorch.utilities.rank_zero"):
        return command._worth_saying(logging.LogRecord(name, level, "", 0, text, None, None))

    assert not shown("GPU available: False, used: False")
    assert not shown("`Trainer.fit` stopped: `max_steps=40` reached.")
    assert not shown("You are using a CUDA device ('NVIDIA H100') that has Tensor Cores. To use")
    assert shown("GPU available: True (cuda), used: False", logging.WARNING)
    assert shown("FIT Profiler Report\n-----\n")
    assert shown("`Trainer.fit` stopped: `max_time` reached.")
    assert shown("GPU available: mine", name="mine")
