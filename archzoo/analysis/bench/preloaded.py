"""What the process has imported that all sides are forked off, so that none takes long for it."""

from __future__ import annotations

import torch._dynamo  # noqa: F401 (by torch's optimizers, once they are used)

import archzoo.analysis.bench.worker  # noqa: F401
from archzoo.registry import list_models

list_models()
