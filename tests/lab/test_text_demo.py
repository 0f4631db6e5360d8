"""The text demo runs from captions to its table, with a teacher that has learned nothing."""

import json

import pytest
from helpers import ROOT, call, refused, save_teacher
from text_helpers import random_text_teacher

from lab.scenes import accuracy, write_captions
from lab.text_demo import TEACHER
from runtime.text import WordEncoder
from stores.digits import SCENES, SEEN_SCENES


@pytest.mark.slow
def test_the_text_demo_leaves_a_table(tmp_path):
    encoder = WordEncoder()
    about = {"captions": {"encoder_hash": encoder.hash, "max_tokens": encoder.max_tokens}}
    teacher = random_text_teacher(0.02, input_size=16, patch_size=4, in_channels=1, caption_channels=encoder.channels)
    save_teacher(tmp_path / "teacher.pt", teacher, about=about)
    call("lab.text_demo", "--teacher", tmp_path / "teacher.pt", "--out", tmp_path / "demo", "--iterations", 2,
         "--num-trajectories", 70, "--num-samples", 200)  # fmt: skip
    rows = json.loads((tmp_path / "demo/table.json").read_text())
    assert [(row["model"], row["nfe"]) for row in rows] == [
        ("teacher", 96), ("teacher", 6), ("step distillation", 3), ("ARD", 3),
    ]  # fmt: skip
    assert rows[0]["distance"] == 0 and rows[3]["distance"] > 0
    assert "| ARD | 3 | 3 |" in (tmp_path / "demo/table.md").read_text()
    assert (tmp_path / "demo/samples.png").stat().st_size > 1000


def test_the_shipped_teacher_draws_what_captions_say_that_it_never_met(tmp_path):
    """Forty of them, in ten steps of its 48: at least 34 show both digits in their places."""
    write_captions(tmp_path / "all.txt", len(SCENES))
    store = tmp_path / "all"
    call("encode_captions.py", "--text", tmp_path / "all.txt", "--encoder", "words", "--out", store)
    unseen = range(SEEN_SCENES, len(SCENES))
    call("sample.py", "--teacher", ROOT / TEACHER, "--captions", store, "--class-labels", *unseen, "--num-samples", 40,
         "--solver-steps", 10, "--device", "cpu", "--out", tmp_path / "s.npz")  # fmt: skip
    assert accuracy(tmp_path / "s.npz")["unseen"] > 0.84


def test_a_missing_teacher_is_one_sentence(tmp_path, capsys):
    command = ("lab.text_demo", "--teacher", tmp_path / "absent.pt", "--out", tmp_path / "demo")
    assert "no such file; --train-teacher makes it" in refused(capsys, *command)
    assert not (tmp_path / "demo").exists()
