"""Interrupted or terminated at any moment, every stage says so in a sentence, and the same command ends it."""

import random

import pytest
from jobs import EQUAL
from signals import GOOD, send
from stages import STAGES, stages


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_a_signal_is_one_sentence_and_the_same_command_ends(name, inputs, tmp_path):
    stage = stages(inputs, times=2)[name]
    found = send(stage, tmp_path / "signals", random.Random(name), trials=3, doubles=1)
    assert found.keys() <= GOOD and found[EQUAL] == 4, found
