"""Scenes of digits are read back from samples, and what is none is refused."""

import numpy as np
import pytest
from helpers import arrays, write_images

from lab.scenes import accuracy, write_captions, write_crops
from runtime.cli import UserError
from stores.digits import SCENES, SEEN_SCENES, DigitScenes, scene_caption


@pytest.fixture
def scenes(tmp_path):
    """Two real scenes for each caption that is trained on, and blank images for the others."""
    batch = DigitScenes().read(np.arange(2 * SEEN_SCENES), np.zeros(2 * SEEN_SCENES, bool))
    images = batch["images"].permute(0, 2, 3, 1).repeat(1, 1, 1, 3).numpy()
    images = np.concatenate([images, np.zeros((40, 16, 16, 3), np.uint8)])
    labels = np.concatenate([batch["y"].numpy(), np.arange(SEEN_SCENES, len(SCENES))])
    return write_images(tmp_path / "scenes.npz", images, arr_1=labels)


def test_real_scenes_are_read_and_others_are_not(scenes, tmp_path):
    found = accuracy(scenes)
    assert found["seen"] > 0.97 and found["unseen"] < 0.2
    content = arrays(scenes)
    turned = write_images(tmp_path / "turned.npz", content["arr_0"][:, ::-1, ::-1], arr_1=content["arr_1"])
    assert accuracy(turned)["seen"] < 0.2  # digits in each other's places, upside down


def test_digits_are_cut_out_of_their_places(scenes, tmp_path):
    write_crops(scenes, tmp_path / "digits.npz")
    digits = arrays(tmp_path / "digits.npz")["arr_0"]
    assert digits.shape == (2 * 360, 8, 8, 3)
    whole = arrays(scenes)["arr_0"]
    assert (digits.reshape(360, 2, -1).sum((1, 2), dtype=int) == whole.reshape(360, -1).sum(1, dtype=int)).all()


def test_captions_come_in_the_order_of_labels(tmp_path):
    for count in (len(SCENES), SEEN_SCENES):
        write_captions(tmp_path / "c.txt", count)
        assert (tmp_path / "c.txt").read_text().splitlines() == [scene_caption(i) for i in range(count)]
    images = write_images(tmp_path / "x.npz", np.zeros((2, 8, 8, 3), np.uint8), arr_1=np.zeros(2, int))
    with pytest.raises(UserError, match="not samples of scenes"):
        write_crops(images, tmp_path / "d.npz")
    write_images(images, np.zeros((2, 16, 16, 3), np.uint8), arr_1=np.array([0, 200]))
    with pytest.raises(UserError, match=r"labels beyond 0\.\.199"):
        write_crops(images, tmp_path / "d.npz")
