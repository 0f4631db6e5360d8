"""Fine-tuning beside training from nothing, on a few emoji as files: a plan, what is refused, and a row for each."""

import json

import pytest
from helpers import call, random_teacher, refused, save_teacher
from PIL import Image

from stores.emoji import EmojiImages


@pytest.fixture
def given(tmp_path):
    """Options: a folder of 130 pictures in two classes, weights with nine."""
    emoji = EmojiImages()
    for i in range(130):
        path = tmp_path / f"pictures/{'ab'[i % 2]}/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(emoji.images[60 * i].permute(1, 2, 0).numpy()).save(path)
    teacher = random_teacher(input_size=32, in_channels=3, num_classes=9, patch_size=8, process="sit")
    init = save_teacher(tmp_path / "teacher.pt", teacher)
    return tmp_path / "pictures", "--init", init, "--out", tmp_path / "out", "--iterations", 2, "--num-samples", 130


def test_a_plan_writes_nothing_and_more_pictures_than_there_are_are_refused(given, tmp_path, capsys):
    call("lab.few_pictures", *given, "--sizes", 8, 130, "--dry-run")
    assert json.loads(capsys.readouterr().out)["pieces"] == 1 + 2 * 2 * 3
    assert "--sizes 131: " in refused(capsys, "lab.few_pictures", *given, "--sizes", 8, 131)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_each_size_is_trained_both_ways_on_pictures_of_every_class(given, tmp_path):
    call("lab.few_pictures", *given, "--sizes", 8)
    rows = json.loads((tmp_path / "out/table.json").read_text())
    assert [(row["pictures"], row["start"]) for row in rows] == [(8, "nothing"), (8, "weights")]
    assert rows[0]["fid"] != rows[1]["fid"]
    taken = sorted(str(path.relative_to(tmp_path / "out/pictures-8")) for path in tmp_path.glob("out/pictures-8/*/*"))
    assert len(taken) == 8 and [name[0] for name in taken] == ["a"] * 4 + ["b"] * 4
