"""What `fit` trains for, by one setting: cross-entropy, or an objective of a class of its own.

An objective is a `LanguageModel` with another loss. Its constructor takes settings of its own,
which stand beside the others under `model`.
"""

from __future__ import annotations

from importlib import import_module

from archzoo.names import nearest
from archzoo.training.module import LanguageModel
from archzoo.trust import find_class, load_installed

#: The zoo's own, and where each is defined.
OBJECTIVES = {
    "RewardModel": "archzoo.preferences.reward_model",
    "Policy": "archzoo.preferences.policy",
    "DPO": "archzoo.preferences.dpo",
}


def find_objective(name: str | None) -> type[LanguageModel]:
    """The class of an objective.

    Args:
        name: Of one of the zoo's, or the import path of a class that is imported already. None:
            `LanguageModel`, cross-entropy.

    Raises:
        ValueError: There is none of that name.
    """
    if name is None:
        return LanguageModel
    if name in OBJECTIVES:
        found: type[LanguageModel] = getattr(import_module(OBJECTIVES[name]), name)
        return found
    if "." not in name:
        raise ValueError(f"unknown objective {name!r}; {nearest(name, list(OBJECTIVES))}")
    load_installed()
    try:
        return find_class(name, LanguageModel)
    except ValueError as error:
        raise ValueError(f"objective {error}") from None
