"""Models on disk: a directory of plain files, for use and for handing on.

::

    model/
      config.json         {"archzoo": version, "decoder": {...}, "tokenizer": file, "task": {...}}
      model.safetensors   the weights, shared ones once
      tokenizer.json      or tokenizer.model, where there is a tokenizer

``decoder`` holds the arguments of `Decoder`, every part as ``class_path`` and ``init_args``, and
among them ``context_length``, the longest text seen in training.

The weights' file carries a digest of them, which is checked when it is read; a file without one is
another tool's, and is taken with the usual checks.

Lightning's checkpoints, which are for resuming a run, are read as well. Nothing in a file is ever
called (`archives`), and sizes come first: settings that do not give the shapes in the weights'
header are refused before anything is built. A part from outside the zoo is found among what the
user has imported, and nothing is imported because a file names it (`archzoo.trust`).
"""

from __future__ import annotations

from archzoo.checkpoint.adapters import load_adapter, save_adapter
from archzoo.checkpoint.bases import Base, base_of
from archzoo.checkpoint.building import Pretrained
from archzoo.checkpoint.checks import check_finite
from archzoo.checkpoint.digest import DIGEST, weights_digest
from archzoo.checkpoint.loading import device_of, from_pretrained, load, locate, read_task, task_of
from archzoo.checkpoint.pretrained import CONFIG, WEIGHTS, save_pretrained
from archzoo.checkpoint.runs import LAST, base_in, directory_of, read_safely, sign
from archzoo.checkpoint.vocabulary import check_tokenizer, tokenizer_files

__all__ = [
    "CONFIG",
    "DIGEST",
    "LAST",
    "WEIGHTS",
    "Base",
    "Pretrained",
    "base_in",
    "base_of",
    "check_finite",
    "check_tokenizer",
    "device_of",
    "directory_of",
    "from_pretrained",
    "load",
    "load_adapter",
    "locate",
    "read_safely",
    "read_task",
    "save_adapter",
    "save_pretrained",
    "sign",
    "task_of",
    "tokenizer_files",
    "weights_digest",
]
