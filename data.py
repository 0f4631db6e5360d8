"""Real images: the bundled UCI digits, folders of images (class = sub-folder).

Pixels are uint8 outside the models and float32 in [-1, 1] inside; ``to_unit`` and ``to_uint8`` are the only two ways
between them, and a uint8 image survives the round trip exactly.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from cli import UserError, existing_folder


def to_unit(images: torch.Tensor) -> torch.Tensor:
    """uint8 0..255 -> float32 in [-1, 1], any shape."""
    return images.float() / 127.5 - 1


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """float in [-1, 1] -> uint8, rounded to nearest as DiT's sampling script does, any shape."""
    return (images.float() * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def digits_images() -> tuple[torch.Tensor, torch.Tensor]:
    """scikit-learn's UCI digits: images (1797, 1, 8, 8) uint8 and labels (1797,) int64. Nothing is downloaded."""
    from sklearn.datasets import load_digits  # two seconds to import, needed for digits only

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    return torch.from_numpy(images)[:, None], torch.from_numpy(digits.target.astype(np.int64))


class Digits:
    """The UCI digits as a source of images: one channel, 8x8, ten classes."""

    name, size, channels, num_classes = "digits", 8, 1, 10

    def __init__(self):
        self.images, self.labels = digits_images()
        self.count = len(self.labels)

    def read(self, rows: np.ndarray, flips: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of the source: (B, C, H, W) uint8, those of ``flips`` (B,) mirrored, and labels (B,) int64."""
        return mirrored(self.images[rows], flips), self.labels[rows]


class ImageFolder:
    """A folder with one sub-folder of images per class, read as ADM does: centre crop, resized to ``size``."""

    channels = 3

    def __init__(self, folder: str | Path, size: int):
        from torchvision.datasets import ImageFolder as Listing

        try:
            listing = Listing(str(existing_folder("--data-path", folder)))
        except FileNotFoundError as error:
            raise UserError(
                f"--data-path {folder}: give a folder with one sub-folder of images for each class ({error})"
            ) from None
        self.name, self.size, self.samples = str(folder), size, listing.samples
        self.count, self.num_classes = len(listing.samples), len(listing.classes)

    def read(self, rows: np.ndarray, flips: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of the source: (B, 3, H, W) uint8, those of ``flips`` (B,) mirrored, and labels (B,) int64."""
        images = [self._image(self.samples[row][0]) for row in rows]
        labels = torch.tensor([self.samples[row][1] for row in rows])
        return mirrored(torch.stack(images), flips), labels

    def _image(self, path: str) -> torch.Tensor:
        try:
            with Image.open(path) as file:
                cropped = center_crop(file.convert("RGB"), self.size)
        except OSError as error:
            raise UserError(f"--data-path: {path} is not a readable image ({error})") from None
        return torch.from_numpy(np.array(cropped)).permute(2, 0, 1)


def mirrored(images: torch.Tensor, flips: np.ndarray) -> torch.Tensor:
    """images (B, C, H, W) with those where ``flips`` (B,) is True turned left to right."""
    return torch.where(torch.from_numpy(flips)[:, None, None, None], images.flip(-1), images)


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's preprocessing: halve by box filter while twice too large, bicubic to the short side, crop the centre."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def open_source(data_path: str, image_size: int | None) -> Digits | ImageFolder:
    """The source that ``--data-path`` names: the word "digits", or a folder of images read at ``image_size`` pixels."""
    if data_path == "digits":
        return Digits()
    if image_size is None:
        raise UserError(f"--data-path {data_path}: an image folder needs --image-size (256 for DiT-XL/2)")
    return ImageFolder(data_path, image_size)
