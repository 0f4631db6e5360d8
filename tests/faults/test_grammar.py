"""Command lines drawn from the scripts' own parsers and spoiled: one sentence, exit code 2, nothing written."""

import random

import pytest
from grammar import REFUSED, RIGHT, trial
from stages import make_inputs


@pytest.mark.slow
def test_wrong_command_lines_end_in_one_sentence_and_write_nothing(tmp_path):
    found = trial(make_inputs(tmp_path / "inputs"), 150, random.Random(0))
    assert {kind for _, kind in found} <= {REFUSED, RIGHT}, found
    assert sum(count for (_, kind), count in found.items() if kind == REFUSED) > 100, found
