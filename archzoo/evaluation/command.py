"""`archzoo eval`: a checkpoint on the tasks of lm-eval, and on those that ship."""

from __future__ import annotations

import difflib
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from archzoo._version import __version__
from archzoo.analysis.tables import show
from archzoo.checkpoint import load, locate, weights_digest
from archzoo.evaluation.results import (
    CSV,
    JSON,
    SAMPLES,
    records_of,
    table,
    write_results,
    write_samples,
)
from archzoo.tasks.hub import go_offline

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

SHIPPED = Path(__file__).parent / "tasks"
BOOTSTRAPS = 1000  # of the standard error of a perplexity


def eval_command(
    checkpoint: str,
    tasks: list[str] | None = None,
    limit: int | None = None,
    fewshot: int | None = None,
    batch_size: int = 16,
    max_length: int | None = None,
    prefix: str | None = None,
    include_path: list[str] | None = None,
    log_samples: bool = False,
    seed: int = 0,
    adapter: list[str] | None = None,
    base: str | None = None,
    directory: str | None = None,
    device: str | None = None,
) -> None:
    """Evaluate a checkpoint on the tasks of lm-eval, and on those that ship with archzoo.

    Those need no network: shakespeare and three_kingdoms (bits per byte of the test part of a text
    of data/), shakespeare_last_word, shakespeare_next_line, three_kingdoms_next_sentence, and
    addition. All others are lm-eval's own, whose data sets come from the Hugging Face hub.

    Prints lm-eval's table, and one of all that was evaluated in this directory; writes eval.json
    and eval.csv. Of texts quote bits per byte: what a token is, and where windows begin, differs
    from one evaluation to another.

    Args:
        checkpoint: A run's directory, a .ckpt file, or a directory of archzoo.save_pretrained or
            archzoo.save_adapter.
        tasks: Names of tasks or groups, or paths of task files: --tasks shakespeare,addition.
        limit: Ask the first documents of each task alone.
        fewshot: Solved examples before each question. None: as each task says.
        batch_size: Texts that are read or written at once.
        max_length: Tokens that are read of a text at once; of a longer context the beginning is
            dropped. None: the length that the model was trained on.
        prefix: What a text without a context begins after, one token. '': nothing, so that the
            first token of a text is read and not scored. None: a line end, or nothing where that
            is not one token.
        include_path: A directory of task files of one's own, or several.
        log_samples: Write every question and answer to eval_samples.jsonl.
        seed: Of sampling, and of the choice of solved examples.
        adapter: A directory of archzoo.save_adapter, which is put on the checkpoint; given several
            times, several are.
        base: Where the base of an adapted checkpoint lies. None: where it was.
        directory: Where the results go. None: beside the checkpoint.
        device: Such as cpu or cuda. None: a GPU where there is one.

    Raises:
        FileNotFoundError: The checkpoint does not exist or directory.
        ValueError: lm-eval is not installed, a task is unknown or needs the network, or the model
            cannot be asked what it asks.
    """
    _quieten()
    try:
        import lm_eval
        from lm_eval.utils import handle_non_serializable, make_table

        from archzoo.evaluation.harness import ArchzooLM
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "lm_eval":
            raise
        raise ValueError(
            "evaluation needs lm-eval (some 100 MB): pip install 'archzoo[eval]'"
        ) from None
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} must be at least 1 document")
    if fewshot is not None and fewshot < 0:
        raise ValueError(f"fewshot={fewshot} must be at least 0")
    path = locate(checkpoint)
    names = [name for entry in tasks or () for name in entry.split(",") if name]
    manager, loaded = load_tasks(names, [Path(entry) for entry in include_path or ()])
    found = load(path, device or "auto", base)
    model = ArchzooLM(found, batch_size, max_length, prefix, adapter=adapter or ())
    begin = time.time()
    with redirect_stdout(sys.stderr), _without_git():  # what it says while it works
        results = lm_eval.simple_evaluate(
            model=model,
            tasks=loaded,
            task_manager=manager,
            num_fewshot=fewshot,
            batch_size=batch_size,
            limit=limit,
            bootstrap_iters=BOOTSTRAPS,
            log_samples=log_samples,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    print(make_table(results))
    if results.get("groups"):
        print(make_table(results, "groups"))
    info = model.get_model_info()
    common = {
        "checkpoint": " + ".join([path.name, *(Path(entry).name for entry in adapter or ())]),
        "weights": weights_digest(model.model.state_dict())[:16],
        "limit": limit,
        "max_length": info["max_length"],
        "prefix": info["prefix"],
        "lm_eval": results["lm_eval_version"],
        "archzoo": __version__,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(begin)),
        "seconds": round(time.time() - begin, 3),
    }
    folder = Path(directory) if directory else (path if path.is_dir() else path.parent)
    every = write_results(folder, records_of(dict(results), common, model.truncated))
    show(table(every))
    written = [JSON, CSV]
    if log_samples:
        write_samples(folder, results["samples"], handle_non_serializable)
        written.append(SAMPLES)
    print(f"{folder} holds {', '.join(written)}")


@contextmanager
def _without_git() -> Iterator[None]:
    """Within it lm-eval asks git for no commit: outside a repository git complains on stderr."""
    from lm_eval import evaluator

    asks = evaluator.get_git_commit_hash
    evaluator.get_git_commit_hash = lambda: None
    try:
        yield
    finally:
        evaluator.get_git_commit_hash = asks


def load_tasks(names: list[str], directories: list[Path]) -> tuple[TaskManager, list[Any]]:
    """The tasks of lm-eval, ours or the user's that have some names.

    lm-eval's own, 14,000 of them, are only looked through where a name is neither of the others.

    Args:
        names: Of tasks or groups, or paths of task files.
        directories: Of task files of one's own.

    Raises:
        FileNotFoundError: A directory is not there.
        ValueError: There is no such task, it needs the network, or its file is not a valid one.
    """
    from lm_eval.tasks import TaskManager

    shipped = sorted(path.stem for path in SHIPPED.glob("*.yaml"))
    if not names:
        raise ValueError(f"name a task: --tasks shakespeare; there are {', '.join(shipped)}")
    for directory in directories:
        if not directory.is_dir():
            raise FileNotFoundError(f"include_path={str(directory)!r} is not a directory")
    ours = [SHIPPED, *directories]
    manager = TaskManager(include_path=ours, include_defaults=False)
    known = set(manager.all_tasks)
    if any(name not in known and not Path(name).is_file() for name in names):
        manager = TaskManager(include_path=ours)
        known = set(manager.all_tasks)
    loaded: list[Any] = []
    for name in names:
        if name not in known and not Path(name).is_file():
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
            hint = f"nearest: {', '.join(near)}; " if near else ""
            raise ValueError(
                f"lm-eval has no task {name!r}; {hint}those that ship are {', '.join(shipped)}"
            )
        loaded += _load(manager, name, offline=name not in shipped and go_offline())
    return manager, loaded


def _load(manager: TaskManager, name: str, *, offline: bool) -> list[Any]:
    """A group, or tasks, with their documents, or one line that says what is missing."""
    try:
        found = manager.load([name])
        group = found["groups"].get(name)
        return list(found["tasks"].values()) if group is None else [group]
    except ModuleNotFoundError as error:
        raise ValueError(
            f"task {name} needs {error.name}: pip install {error.name}, or what lm-eval names for "
            f"it ({error})"
        ) from None
    except FileNotFoundError as error:
        raise ValueError(f"task {name}: {error}") from None
    except OSError as error:
        why = "which cannot be reached" if offline else f"which did not give it ({_line(error)})"
        raise ValueError(
            f"task {name} takes its data set from the Hugging Face hub, {why}: on a machine with "
            f"a network run lm-eval run --model dummy --tasks {name} --limit 1, copy its "
            "~/.cache/huggingface here, and evaluate again; or take a task that ships: "
            "--tasks shakespeare"
        ) from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _quieten() -> None:
    """What lm-eval and its libraries say of themselves, but for warnings."""
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # no forks of a process with a model in it
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("lm_eval").setLevel(os.environ.get("LMEVAL_LOG_LEVEL", "ERROR"))
