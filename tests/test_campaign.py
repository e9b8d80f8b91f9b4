"""A small slice of each campaign; `python tests/campaign NAME` runs as many cases as you like."""

import pytest
from campaign import runner


@pytest.mark.parametrize("name", [n for n in runner.names() if runner.module_of(n).SLICE])
def test_a_slice_passes(name: str) -> None:
    outcome = runner.run(name, runner.module_of(name).SLICE)
    assert not outcome.failures, "\n".join(map(str, outcome.failures))
    assert outcome.words.total() == runner.module_of(name).SLICE
