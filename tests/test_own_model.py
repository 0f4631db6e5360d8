"""The block of docs/own-model.md, walked as typed with smaller numbers: latents and pixels, with ranks.

Sixty odd pictures: every mode and format that people have, and two that are damaged.
"""

import os
import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, call, refused, words
from PIL import Image

from stores.samples import read_provenance

PAGE = (ROOT / "docs" / "own-model.md").read_text()
FORMATS = ("png", "jpg", "webp", "bmp", "gif", "tiff", "PNG", "jpeg")
MODES = {"png": ("RGB", "L", "RGBA", "P", "1", "I;16", "LA"), "tiff": ("RGB", "CMYK", "L"), "jpg": ("RGB", "L", "CMYK")}
# Options behind each command: the last of two equal options holds.
SMALLER = {
    "encode_latents.py": "--image-size 8 --vae VAE --num-workers 0",
    "train.py": "--model DiT-Nano/2 --global-batch-size 8",
    "sample_trajectory.py": "--num-trajectories 24",
    "train_ARD.py": "--global-batch-size 8",
    "train_ARD_gan.py": "--global-batch-size 12 --gan-warmup 0",
    "sample_ARD.py": "--num-samples 64",
    "evaluations.reference": "--image-size 8",
    "evaluations.evaluator": "--features digits --allow-few",
}


def commands() -> list[list[str]]:
    """The block's lines without comments, in words; training of any length is two steps long."""
    (block,) = re.findall(r"```\n(# Your own pictures.*?)```", PAGE, flags=re.DOTALL)
    block = block.replace("\\\n", " ")
    block = re.sub(r"--iterations \d+", "--iterations 2", re.sub(r"/\d{7}\.pt", "/0000002.pt", block))
    lines = [shlex.split(line, comments=True) for line in block.splitlines()]
    return [[word for word in line if word not in ("python", "-m")] for line in lines if line]


@pytest.fixture
def photos(tmp_path, monkeypatch) -> Path:
    """The folder ``photos`` in a working folder of its own: 62 files of three classes, of which two are damaged."""
    monkeypatch.chdir(tmp_path)
    folder, draw = tmp_path / "photos", np.random.default_rng(0)
    for i in range(62):
        kind = FORMATS[i % len(FORMATS)]
        modes = MODES.get(kind.lower().replace("jpeg", "jpg"), ("RGB",))
        mode = modes[i // len(FORMATS) % len(modes)]
        path = folder / ("cat", "dog", "two words")[i % 3] / f"{i:02d}.{kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        height, width = 9 + i % 7, 17 - i % 5
        if mode == "I;16":
            picture = Image.fromarray(draw.integers(65536, size=(height, width)).astype(np.uint16))
        else:
            picture = Image.fromarray(draw.integers(256, size=(height, width, 3), dtype=np.uint8)).convert(mode)
        picture.save(path, exif=turned()) if kind == "jpg" else picture.save(path)
    for name in ("cat/00.png", "dog/01.jpg"):
        (folder / name).write_bytes((folder / name).read_bytes()[:60])
    (folder / "cat/notes.txt").write_text("not a picture")
    (folder / ".ipynb_checkpoints").mkdir()
    return folder


def turned() -> Image.Exif:
    """The tag of a camera that was held upright."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def in_pixels(lines: list[list[str]]) -> list[list[str]]:
    """The same without an autoencoder, as docs/own-model.md says."""
    kept = [line for line in lines if line[0] != "encode_latents.py"]
    return [[word.replace("data/photos", "photos") for word in line] for line in kept]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [0, 2])
@pytest.mark.parametrize("space", ["latents", "pixels"])
def test_the_block_for_ones_own_pictures_runs_as_typed(space, ranks, photos, autoencoder, capsys):
    lines = commands() if space == "latents" else in_pixels(commands())
    assert [line[0] for line in lines][-8:] == list(SMALLER)[-len(lines) :]
    for line in lines:
        more = shlex.split(SMALLER[line[0]].replace("VAE", str(autoencoder)))
        if "photos" in line and line[0].endswith(".py"):
            more += ["--image-size", "8"] if line[0] == "train.py" else []
            if not ranks:
                said = refused(capsys, *line, *more)
                assert "2 of 62 images cannot be read: cat/00.png" in said and "--skip-bad 2" in said
            more += ["--skip-bad", "2"]
        elif "photos" in line:
            more += ["--skip-bad", "2"]
        tested = space == "pixels" and "photos" not in line  # with latents, under torchrun
        if not ranks or tested or line[0].startswith("evaluations."):
            call(*line, *more)
            continue
        done = subprocess.run(words(*line, *more, ranks=ranks), capture_output=True, text=True, timeout=300,
                              env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False)  # fmt: skip
        assert done.returncode == 0, done.stderr
    samples = next(Path(word) for word in lines[-1] if word.endswith(".npz") and "photos" not in word)
    provenance = read_provenance(samples)
    assert provenance["class_names"] == ["cat", "dog", "two words"] and samples.with_suffix(".json").is_file()
    with np.load(samples) as file:
        assert file["arr_0"].shape == (64, 8, 8, 3)
