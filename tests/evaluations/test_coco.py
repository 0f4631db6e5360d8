"""COCO's reference images and their captions, of a small annotation file."""

import json

import numpy as np
import pytest
from helpers import arrays, call, refused
from PIL import Image

from stores.samples import read_provenance


@pytest.fixture
def coco(tmp_path):
    """Twelve images with two captions each, one without, as COCO's files have them."""
    draw = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    images = [{"id": 7 * i, "file_name": f"{7 * i:012d}.jpg"} for i in range(13)]
    for i, image in enumerate(images[:12]):
        pixels = np.full((10 + i, 20, 3), 20 * i, np.uint8) + draw.integers(2, dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / image["file_name"], quality=95)
    captions = [{"image_id": 7 * i, "caption": f"Grey  number {i},\nview {k}. "} for i in range(12) for k in "ab"]
    (tmp_path / "captions.json").write_text(json.dumps({"images": images, "annotations": captions}))
    return ("evaluations.coco", "--annotations", tmp_path / "captions.json", "--images", tmp_path / "images",
            "--image-size", 8, "--out", tmp_path / "out")  # fmt: skip


def test_each_image_comes_with_one_of_its_captions(coco, tmp_path):
    call(*coco, "--count", 9, "--seed", 3)
    found = arrays(tmp_path / "out/reference.npz")["arr_0"]
    captions = (tmp_path / "out/captions.txt").read_text().splitlines()
    assert found.shape == (9, 8, 8, 3) and len(set(captions)) == 9
    for image, caption in zip(found, captions):
        assert caption.startswith(f"Grey number {round(float(image.mean()) / 20)}, view ")
    assert {caption[-2] for caption in captions} == {"a", "b"}
    about = read_provenance(tmp_path / "out/reference.npz")
    assert about["seed"] == 3 and len(about["annotations_sha256"]) == 64
    call(*coco, "--count", 9, "--seed", 3)  # is there already
    call(*coco[:-1], tmp_path / "other", "--count", 9)
    assert (tmp_path / "other/captions.txt").read_text().splitlines() != captions


def test_bad_files_are_one_sentence(coco, tmp_path, capsys):
    assert "has only 12 images with captions" in refused(capsys, *coco, "--count", 13)
    (tmp_path / "images/000000000014.jpg").unlink()
    assert "lacks 1 of the images, 000000000014.jpg first" in refused(capsys, *coco, "--count", 12)
    (tmp_path / "captions.json").write_text('{"images": []}')
    assert "not COCO's file of captions (KeyError('annotations'))" in refused(capsys, *coco)
    assert not (tmp_path / "out").exists()
