"""Architectures: one file each, its paper's architecture section.

The size in a preset's name promises the number of active parameters, so that families of one size
can be compared. A family that is sized otherwise says why in its file, in a paragraph that begins
with "Sizes:" and names those sizes.
"""

#: Active parameters that a size promises: all but those of the experts that a token is not sent to.
ACTIVE_PARAMETERS = {"micro": 30_000, "tiny": 860_000, "small": 30_000_000, "base": 110_000_000}
WITHIN = 0.15  # of the promise


def sized_as_named(name: str, active: int) -> bool:
    """Whether a preset has the active parameters that its name promises, if it promises any."""
    promised = ACTIVE_PARAMETERS.get(name.rpartition("_")[2])
    return promised is None or abs(active / promised - 1) <= WITHIN
