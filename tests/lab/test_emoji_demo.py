"""The demo on emoji with small random models in place of the shipped ones: a row each, and the same noise for all."""

import json

import pytest
import torch
from helpers import call, random_teacher, refused, save_student, save_teacher
from PIL import Image

from models_ard import ARD


@pytest.mark.slow
def test_every_model_has_a_row_and_a_strip_of_the_picture(tmp_path, capsys):
    error = refused(capsys, "lab.emoji_demo", "--assets", tmp_path, "--out", tmp_path / "out")
    assert "emoji_teacher.pt: no such file" in error and not (tmp_path / "out").exists()
    teacher = random_teacher(input_size=32, in_channels=3, num_classes=9, patch_size=8)
    save_teacher(tmp_path / "emoji_teacher.pt", teacher)
    for name, mask in (("step", "M1"), ("ard", "M4"), ("ard_gan", "M4")):
        save_student(tmp_path / f"emoji_{name}.pt", ARD.from_teacher(teacher, mask=mask, history_layers=1))
    torch.manual_seed(0)
    call("lab.emoji_demo", "--assets", tmp_path, "--out", tmp_path / "out", "--num-samples", 130)
    rows = json.loads((tmp_path / "out/table.json").read_text())
    assert [(row["model"], row["steps"], row["nfe"]) for row in rows] == [
        ("teacher", 25, 50), ("teacher", 4, 8), ("step distillation", 4, 4), ("ARD", 4, 4), ("ARD, R+D", 4, 4)
    ]  # fmt: skip
    assert rows[0]["distance"] == rows[0]["degradation"] == 0 < rows[1]["distance"]
    assert rows[3]["distance"] == rows[4]["distance"] and rows[3]["fid"] == rows[4]["fid"]  # the same student
    with Image.open(tmp_path / "out/samples.png") as picture:
        assert picture.width > 1000
