"""The text demo runs from captions to its table, with a teacher that has learned nothing."""

import json

import pytest
from helpers import call, refused, save_teacher
from text_helpers import random_text_teacher

from runtime.text import WordEncoder


@pytest.mark.slow
def test_the_text_demo_leaves_a_table(tmp_path):
    encoder = WordEncoder()
    about = {"captions": {"encoder_hash": encoder.hash, "max_tokens": encoder.max_tokens}}
    teacher = random_text_teacher(std=0.02, input_size=16, in_channels=1, caption_channels=encoder.channels)
    save_teacher(tmp_path / "teacher.pt", teacher, about=about)
    call("evaluations.text_demo", "--teacher", tmp_path / "teacher.pt", "--out", tmp_path / "demo", "--iterations", 2,
         "--num-trajectories", 70, "--num-samples", 200)  # fmt: skip
    rows = json.loads((tmp_path / "demo/table.json").read_text())
    assert [(row["model"], row["nfe"]) for row in rows] == [
        ("teacher", 96), ("teacher", 6), ("step distillation", 3), ("ARD", 3),
    ]  # fmt: skip
    assert rows[0]["distance"] == 0 and rows[3]["distance"] > 0
    assert "| ARD | 3 | 3 |" in (tmp_path / "demo/table.md").read_text()
    assert (tmp_path / "demo/samples.png").stat().st_size > 1000


def test_a_missing_teacher_is_one_sentence(tmp_path, capsys):
    command = ("evaluations.text_demo", "--teacher", tmp_path / "absent.pt", "--out", tmp_path / "demo")
    assert "no such file; --train-teacher makes it" in refused(capsys, *command)
    assert not (tmp_path / "demo").exists()
