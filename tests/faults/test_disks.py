"""Where the disk fills, every stage says so in a sentence; with room, the same command ends with equal files."""

import random

import pytest
from disks import COUNTED, FULL, ROOM, apart, fill, good
from stages import STAGES, stages


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_a_full_disk_is_one_sentence_and_with_room_the_same_command_ends(name, inputs, tmp_path):
    stage = stages(inputs)[name]
    found = apart(lambda: fill(stage, tmp_path / "disks", random.Random(name), 3), tmp_path / "counts.json")
    if found is None:
        pytest.skip("this system lets this user mount nothing, not even in a namespace")
    assert good(found) and found[FULL] + found[COUNTED], found
    assert name != "evaluator" or found[ROOM], "features that cannot be kept cost no result"
