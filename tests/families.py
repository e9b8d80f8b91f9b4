"""The families of the zoo, for tests of what every model shares: a new one joins by registering."""

from __future__ import annotations

from typing import Any

import archzoo
from archzoo.decoder import Decoder

MICRO = archzoo.list_models("*_micro")


def micro(name: str = "retnet_micro", **arguments: Any) -> Decoder:
    """A micro model of words alone, which reads any tokens below 64.

    An embedding that a task has something to tell is tested with one, in test_zoo.py.
    """
    words = {"embedding": "TokenEmbedding", "vocab_size": 64}
    return archzoo.create_model(name, **words | arguments)
