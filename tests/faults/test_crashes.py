"""Killed before a change of its files, every stage is ended by the same command: equal files and no others."""

import pytest
from crashes import crashes
from jobs import EQUAL
from stages import STAGES, stages


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_the_same_command_ends_what_was_killed_before_any_change(name, inputs, tmp_path):
    """crashes.py takes every point; here are some, the last among them."""
    found = crashes(stages(inputs)[name], tmp_path, at_most=5)
    assert found.keys() == {"points", EQUAL} and found["points"] == found[EQUAL] > 2, found
