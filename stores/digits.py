"""The UCI digits, 8x8 grey, that scikit-learn bundles: ``--data-path digits``, and two of them as captions say."""

from typing import Any

import numpy as np
import torch

from runtime.randomness import generator
from stores.image_folder import mirrored


def digits_images() -> tuple[torch.Tensor, torch.Tensor]:
    """scikit-learn's UCI digits: images (1797, 1, 8, 8) uint8 and labels (1797,) int64. Nothing is downloaded."""
    from sklearn.datasets import load_digits  # two seconds to import, needed for digits only

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    return torch.from_numpy(images)[:, None], torch.from_numpy(digits.target.astype(np.int64))


class DigitImages:
    """The UCI digits as a source of images: one channel, 8x8, ten classes."""

    size, channels, num_classes, vae, vae_hash = 8, 1, 10, None, None

    def __init__(self) -> None:
        self.images, self.labels = digits_images()
        self.count = len(self.labels)
        self.fingerprint: dict[str, Any] = {"data": "digits", "images": self.count, "image_size": self.size}

    def read(self, rows: np.ndarray, flips: np.ndarray) -> dict[str, torch.Tensor]:
        """See above; images (B, 1, 8, 8)."""
        return {"images": mirrored(self.images[rows], flips), "y": self.labels[rows]}


NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# Relation, first and second digit, shuffled: the last fifth never stands together in training.
SCENES = [
    (("above", "beside")[i // 100], i // 10 % 10, i % 10) for i in np.random.default_rng(0).permutation(200).tolist()
]
SEEN_SCENES = 160  # are trained on


def scene_caption(scene: int) -> str:
    """The caption of one of ``SCENES``, "a three above an eight"."""
    relation, *digits = SCENES[scene]
    first, second = (f"{'an' if number == 8 else 'a'} {NUMBERS[number]}" for number in digits)
    return f"{first} {relation} {second}"


def scene_places(scene: int) -> list[tuple[slice, slice]]:
    """Rows and columns of the first and of the second digit of a scene."""
    low, middle, high = slice(0, 8), slice(4, 12), slice(8, 16)
    return [(low, middle), (high, middle)] if SCENES[scene][0] == "above" else [(middle, low), (middle, high)]


class DigitScenes:
    """Two of the UCI digits above or beside each other on 16x16 pixels, as captions say: the data of `make demo-t2i`.

    A label is the number of a scene, which is that of its caption in a store of captions in this order.
    """

    size, channels, num_classes, vae, vae_hash = 16, 1, SEEN_SCENES, None, None

    def __init__(self, count: int = 100 * SEEN_SCENES) -> None:
        digits, classes = digits_images()
        self.digits = [digits[classes == number, 0] for number in range(10)]
        self.count, self.labels = count, torch.arange(count) % SEEN_SCENES
        self.fingerprint: dict[str, Any] = {"data": "digit-scenes", "images": count, "image_size": self.size}

    def read(self, rows: np.ndarray, flips: np.ndarray) -> dict[str, torch.Tensor]:
        """See above; images (B, 1, 16, 16). Which digits an image shows is a function of its row."""
        images = torch.zeros(len(rows), 1, self.size, self.size, dtype=torch.uint8)
        for image, row in zip(images, rows.tolist(), strict=True):
            scene, draw = int(self.labels[row]), generator(0, "scene", row)
            for place, number in zip(scene_places(scene), SCENES[scene][1:], strict=True):
                image[0][place] = self.digits[number][draw.integers(len(self.digits[number]))]
        return {"images": mirrored(images, flips), "y": self.labels[rows]}
