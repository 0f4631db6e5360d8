"""Sources of real images: ADM's crop pixel by pixel, uint8 that survives, mirror images, folders."""

import numpy as np
import pytest
import torch
from PIL import Image

from runtime.cli import UserError
from stores.images import DigitImages, ImageFolder, center_crop, from_uint8, mirrored, open_source, to_uint8


def halved(pixels: np.ndarray, axis: int) -> np.ndarray:
    """(H, W, 3) uint8 at half the length of an axis: each pixel is the mean, rounded, of those that lie in its box.

    A box of an odd length holds two pixels or three. Lengths of 4n + 1 have a pixel in the very middle of two boxes,
    which PIL gives to the left one or to none, as its arithmetic rounds: the test has none of these.
    """
    length, out = pixels.shape[axis], []
    for i in range(length // 2):
        begin, end = (length / (length // 2) * k for k in (i, i + 1))
        inside = [k for k in range(length) if begin < k + 0.5 < end]
        out.append(np.floor(pixels.take(inside, axis).astype(np.float64).mean(axis) + 0.5))
    return np.stack(out, axis).astype(np.uint8)


def crop_by_definition(pixels: np.ndarray, size: int) -> np.ndarray:
    """ADM's preprocessing of an array (H, W, 3); only the bicubic resizing is PIL's own."""
    while min(pixels.shape[:2]) >= 2 * size:
        pixels = halved(halved(pixels, axis=1), axis=0)
    height, width = (round(length * size / min(pixels.shape[:2])) for length in pixels.shape[:2])
    pixels = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))
    top, left = (height - size) // 2, (width - size) // 2
    return pixels[top : top + size, left : left + size]


@pytest.mark.parametrize(
    "height, width, size",
    [
        (70, 43, 16),  # portrait, halved once, odd
        (43, 70, 16),
        (41, 71, 64),  # landscape, enlarged
        (64, 64, 32),  # exactly twice
        (63, 97, 32),  # just less than twice: no halving
        (16, 23, 16),  # the crop alone
        (700, 924, 37),  # halved four times
        (1208, 812, 100),  # large, halved three times
    ],
)
def test_the_crop_is_adms_pixel_by_pixel(height, width, size):
    draw = np.random.default_rng(0)
    smooth = Image.fromarray(draw.integers(256, size=(9, 9, 3), dtype=np.uint8)).resize((width, height))
    pixels = np.asarray(smooth) // 2 + draw.integers(128, size=(height, width, 3), dtype=np.uint8)
    found = np.asarray(center_crop(Image.fromarray(pixels), size))
    assert found.shape == (size, size, 3)
    np.testing.assert_array_equal(found, crop_by_definition(pixels, size))


def test_uint8_survives_the_round_trip():
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(from_uint8(every)), every)
    assert from_uint8(every).aminmax() == (-1, 1)
    assert to_uint8(torch.tensor([-2.0, -1, 0, 1, 2])).tolist() == [0, 0, 128, 255, 255]


def test_only_the_chosen_images_are_mirrored():
    images = torch.arange(12).view(2, 1, 2, 3)
    found = mirrored(images, np.array([True, False]))
    assert found[0, 0].tolist() == [[2, 1, 0], [5, 4, 3]] and torch.equal(found[1], images[1])
    digits = DigitImages()
    read = digits.read(np.array([3, 3]), np.array([False, True]))["images"]
    assert torch.equal(read[0], digits.images[3]) and torch.equal(read[1], digits.images[3].flip(-1))


def test_a_folder_gives_each_image_its_class_and_its_name_in_a_sentence(image_folder, tmp_path):
    source = ImageFolder(image_folder, 8)
    assert (source.count, source.num_classes, source.classes) == (11, 3, ["class0", "class1", "class2"])
    for row, path in enumerate(source.paths):
        assert f"/class{source.labels[row]}/" in path
        with Image.open(path) as file:  # among them a grey one and JPEGs
            wanted = np.asarray(center_crop(file.convert("RGB"), 8))
        read = source.read(np.array([row]), np.array([False]))
        assert (read["images"][0].permute(1, 2, 0).numpy() == wanted).all() and read["y"] == source.labels[row]
    everything = open_source(str(image_folder), 8, unconditional=True)
    assert (everything.count, everything.num_classes) == (11, 0) and not everything.labels.any()
    assert source.listing() == ImageFolder(image_folder, 16).listing()
    (tmp_path / "a").mkdir()
    (tmp_path / "a/broken.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"--data-path: .*/a/broken.png is not a readable image"):
        ImageFolder(tmp_path, 8).read(np.array([0]), np.array([False]))
