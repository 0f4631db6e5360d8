"""The emoji: sheets drawn from five icons of our own, read back to the pixel; damage and wrong folders in a sentence;
the shipped sheets are what their card says; ``--data-path emoji`` trains.
"""

import json
import shutil

import numpy as np
import pytest
import torch
from helpers import call, refused
from PIL import Image

from runtime.cli import UserError
from stores.emoji import CLASSES, SHEETS, SIZE, EmojiImages, read_sheet, write_sheet
from stores.images import open_source

RED = '<rect width="16" height="16" fill="#ff0000"/>'
ICONS = {
    "grinning-face": RED,
    "man": '<circle cx="8" cy="8" r="8" fill="#0000ff"/>',
    "man-medium-dark-skin-tone": '<circle cx="8" cy="8" r="8" fill="#00ff00"/>',  # a skin tone: left out
    "man-dark": '<circle cx="8" cy="8" r="8" fill="#00ff00"/>',  # named as emojione names it
    "red-square": RED,  # the same picture: the first one is kept
}
CATEGORIES = {
    "Smileys & Emotion": ["grinning-face"],
    "People & Body": ["man", "man-medium-dark-skin-tone", "man-dark"],
    "Symbols": ["red-square", "of-another-set"],
    "Modifiers": ["man"],
}


@pytest.fixture
def icons(tmp_path):
    """A folder with one unpacked icon package of ours, in Iconify's JSON."""
    folder = tmp_path / "icons" / "noto"
    folder.mkdir(parents=True)
    content = {
        "package": {"version": "1.0"},
        "info": {"author": {"name": "we"}, "license": {"spdx": "Apache-2.0"}},
        "icons": {"icons": {name: {"body": body} for name, body in ICONS.items()}, "width": 16, "height": 16},
        "metadata": {"categories": CATEGORIES},
    }
    for name, value in content.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return tmp_path / "icons"


def test_sheets_are_drawn_from_icons(icons, tmp_path, capsys):
    pytest.importorskip("resvg_py")
    command = ("stores.emoji", icons, "--sets", "noto", "--out", tmp_path / "sheets")
    call(*command, "--dry-run")
    assert json.loads(capsys.readouterr().out)["icons"] == 3 and not (tmp_path / "sheets").exists()
    call(*command)
    emoji = EmojiImages(tmp_path / "sheets")
    assert emoji.count == 2 and emoji.labels.tolist() == [0, 1] and emoji.sets == ["noto", "noto"]
    face, man = emoji.images
    assert (face == torch.tensor([255, 0, 0])[:, None, None]).all()
    assert man[:, 16, 16].tolist() == [0, 0, 255] and man[:, 0, 0].tolist() == [255, 255, 255]  # on white
    index = json.loads((tmp_path / "sheets" / "index.json").read_text())
    assert index["sets"]["noto"]["licence"] == {"spdx": "Apache-2.0"}
    assert index["pictures"]["smileys"] == ["noto/grinning-face"] and index["pictures"]["symbols"] == []


def test_whole_sets_are_drawn_as_png_files(icons, tmp_path):
    pytest.importorskip("resvg_py")
    (icons / "noto/metadata.json").unlink()
    call("stores.emoji", icons, "--sets", "noto", "--png", "--out", tmp_path / "pictures")
    made = {path.stem for path in tmp_path.glob("pictures/noto/*.png")}
    assert made == {"grinning-face", "man", "man-medium-dark-skin-tone"}  # of the same pictures, the first
    with Image.open(tmp_path / "pictures/noto/grinning-face.png") as image:
        assert image.size == (SIZE, SIZE) and image.getpixel((3, 3)) == (255, 0, 0)


def test_an_icon_that_is_not_square_stands_in_the_middle(icons, tmp_path):
    pytest.importorskip("resvg_py")
    path = icons / "noto" / "icons.json"
    wide = {"grinning-face": {"body": '<rect width="32" height="16" fill="#00ff00"/>', "width": 32}}
    path.write_text(json.dumps({"icons": wide, "width": 16, "height": 16}))
    call("stores.emoji", icons, "--sets", "noto", "--out", tmp_path / "sheets")
    green = (EmojiImages(tmp_path / "sheets").images[0] == torch.tensor([0, 255, 0])[:, None, None]).all(0)
    assert green[8:24].all() and not green[:8].any() and not green[24:].any()


def test_what_is_no_icon_package_is_refused(icons, tmp_path, capsys):
    error = refused(capsys, "stores.emoji", icons, "--out", tmp_path / "sheets")
    assert "fluent-emoji-flat: is not the unpacked npm package @iconify-json/fluent-emoji-flat" in error
    assert not (tmp_path / "sheets").exists()


def test_a_sheet_is_read_as_it_was_written(tmp_path):
    pictures = [np.random.default_rng(i).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8) for i in range(35)]
    write_sheet(tmp_path / "sheet.webp", pictures)
    np.testing.assert_array_equal(read_sheet(tmp_path / "sheet.webp", 35), pictures)
    with pytest.raises(UserError, match="damaged"):
        read_sheet(tmp_path / "sheet.webp", 65)


def test_damaged_or_missing_sheets_are_named(tmp_path):
    with pytest.raises(UserError, match="holds no sheets of emoji"):
        EmojiImages(tmp_path)
    shutil.copytree(SHEETS, tmp_path / "sheets")
    path = tmp_path / "sheets" / "food.webp"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"food\.webp: damaged"):
        EmojiImages(tmp_path / "sheets")


def test_the_shipped_sheets_are_what_their_card_says():
    emoji, card = EmojiImages(), (SHEETS / "README.md").read_text()
    assert sum(path.stat().st_size for path in SHEETS.iterdir()) < 8_000_000
    assert emoji.fingerprint["class_names"] == list(CLASSES) and emoji.fingerprint["sha256"] in card
    for name in sorted(set(emoji.sets)):
        assert f"{emoji.sets.count(name)} |" in next(line for line in card.splitlines() if f"| `{name}` |" in line)
    assert len({image.numpy().tobytes() for image in emoji.images}) == emoji.count  # no picture twice


def test_a_teacher_trains_on_emoji(tmp_path, capsys):
    source = open_source("emoji")
    batch = source.read(np.array([0, 9000]), np.array([True, False]))
    assert batch["images"].shape == (2, 3, 32, 32) and batch["y"].tolist() == [0, 8]
    assert torch.equal(batch["images"][0], source.images[0].flip(2))
    call("train.py", "--data-path", "emoji", "--model", "DiT-Nano/8", "--global-batch-size", 2, "--iterations", 1,
         "--sample-every", 0, "--run-dir", tmp_path)  # fmt: skip
    assert "9 classes: smileys, people" in capsys.readouterr().out
    error = refused(capsys, "train.py", "--data-path", "emoji", "--model", "DiT-Nano/8", "--image-size", 64)
    assert "--image-size 64: the images of --data-path emoji have 32 pixels" in error
