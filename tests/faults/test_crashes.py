"""Killed before a change of its files, every stage is ended by the same command: equal files and no others."""

import pytest
from crashes import crashes
from stages import EQUAL, make_inputs, stages


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """The stages, on inputs of their own."""
    return stages(make_inputs(tmp_path_factory.mktemp("inputs")))


NAMES = ("train", "encode_latents", "sample_trajectory", "train_ARD", "train_ARD_gan", "sample", "sample_ARD",
         "evaluator", "slim", "export", "repair")  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_same_command_ends_what_was_killed_before_any_change(name, known, tmp_path):
    """crashes.py takes every point; here are some, the last among them."""
    assert known.keys() == set(NAMES)
    found = crashes(known[name], tmp_path, at_most=5)
    assert found.keys() == {"points", EQUAL} and found["points"] == found[EQUAL] > 2, found
