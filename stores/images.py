"""Real images: the bundled UCI digits, folders of images (class = sub-folder), stores of their latents (latents.py).

Pixels are uint8 outside the models and float32 in [-1, 1] inside; ``from_uint8`` and ``to_uint8`` are the only two ways
between them, and a uint8 image survives the round trip exactly.

A source, whichever it is, has
    count, num_classes   how many images and classes there are (0: unconditional)
    labels               (count,) int64, all 0 without classes
    size, channels       pixels of a side and colour channels of its images
    vae, vae_hash        the autoencoder whose latents it holds, None for pixels; its hash where it is known
    fingerprint          plain dict that says which data they are, part of a run's config
    read(rows, flips)    rows (B,) and which of them to mirror (B,) bool -> {"y": (B,) labels} and either
                         {"images": (B, channels, size, size) uint8} or {"mean", "std": (B, C, h, w) float32}
so that trainers say ``real_latents(batch, vae)`` and need not know which it is.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from runtime.cli import UserError, existing_folder
from runtime.vae import VAE, Outline, Pixels, load_same_vae, load_vae, resolve_name
from stores.latents import LatentStore, is_store


def from_uint8(images: torch.Tensor) -> torch.Tensor:
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


class DigitImages:
    """The UCI digits as a source of images: one channel, 8x8, ten classes."""

    size, channels, num_classes, vae, vae_hash = 8, 1, 10, None, None

    def __init__(self) -> None:
        self.images, self.labels = digits_images()
        self.count = len(self.labels)
        self.fingerprint = {"data": "digits", "images": self.count, "image_size": self.size}

    def read(self, rows: np.ndarray, flips: np.ndarray) -> dict[str, torch.Tensor]:
        """See above; images (B, 1, 8, 8)."""
        return {"images": mirrored(self.images[rows], flips), "y": self.labels[rows]}


class ImageFolder:
    """A folder with one sub-folder of images per class, read as ADM does: centre crop, resized to ``size``.

    ``unconditional`` takes every image below the folder, with or without sub-folders, and no classes.
    """

    channels, vae, vae_hash = 3, None, None

    def __init__(self, folder: str | Path, size: int, unconditional: bool = False, option: str = "--data-path"):
        from torchvision.datasets import ImageFolder as Listing
        from torchvision.datasets.folder import IMG_EXTENSIONS

        self.option, self.size = option, size
        self.root = root = existing_folder(option, folder)
        if unconditional:
            self.paths = sorted(str(path) for path in root.rglob("*") if path.suffix.lower() in IMG_EXTENSIONS)
            self.classes, labels = [], [0] * len(self.paths)
            if not self.paths:
                raise UserError(f"{option} {folder}: holds no images ({', '.join(IMG_EXTENSIONS)})")
        else:
            try:
                listing = Listing(str(root))
            except FileNotFoundError as error:
                raise UserError(
                    f"{option} {folder}: give a folder with one sub-folder of images for each class, or "
                    f"--unconditional ({str(error).splitlines()[0]})"
                ) from None
            self.classes, self.paths, labels = listing.classes, [path for path, _ in listing.samples], listing.targets
        self.labels = torch.tensor(labels)
        self.count, self.num_classes = len(self.paths), len(self.classes)
        self.fingerprint = {"data": str(folder), "images": self.count, "image_size": size}

    def read(self, rows: np.ndarray, flips: np.ndarray) -> dict[str, torch.Tensor]:
        """See above; ``UserError`` names a file that is no image."""
        images = torch.stack([self._image(self.paths[row]) for row in rows])
        return {"images": mirrored(images, flips), "y": self.labels[rows]}

    def listing(self) -> str:
        """16 hex digits that name the images: a hash of their paths inside the folder, in order."""
        inside = "\n".join(str(Path(path).relative_to(self.root)) for path in self.paths)
        return hashlib.sha256(inside.encode()).hexdigest()[:16]

    def _image(self, path: str) -> torch.Tensor:
        try:
            with Image.open(path) as file:
                cropped = center_crop(file.convert("RGB"), self.size)
        except OSError as error:
            raise UserError(f"{self.option}: {path} is not a readable image ({error})") from None
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


Source = DigitImages | ImageFolder | LatentStore


def open_source(
    data_path: str,
    image_size: int | None = None,
    unconditional: bool = False,
    option: str = "--data-path",
    verify: bool = False,
) -> Source:
    """The source that an option names: the word "digits", a store of latents, or a folder of images.

    ``image_size`` is needed for images; a latent store knows its own and a contradiction is refused. ``unconditional``
    leaves out the classes, ``verify`` compares the checksums of a latent store when it is read.
    """
    source: Source
    if data_path == "digits":
        source = DigitImages()
    elif is_store(data_path):
        source = LatentStore(data_path, option, verify)
    elif image_size is None:
        raise UserError(f"{option} {data_path}: an image folder needs --image-size (256 for DiT-XL/2)")
    else:
        source = ImageFolder(data_path, image_size, unconditional, option)
    if image_size not in (None, source.size):
        raise UserError(f"--image-size {image_size}: the images of {option} {data_path} have {source.size} pixels")
    if unconditional:
        source.num_classes, source.labels = 0, torch.zeros_like(source.labels)
    return source


def open_vae(
    source: Source, given: str | None, device: torch.device, needs_decoder: bool
) -> tuple[Any, str | None, str | None]:
    """The autoencoder to use, its full name and hash: ``--vae`` as given, else the source's own; None is pixel space.

    Latents need one for pictures only: what is not needed is not loaded. ``UserError`` when they are another one's.
    """
    if not isinstance(source, LatentStore):
        vae = load_vae(given, device)
        return vae, vae.name, vae.hash
    name = resolve_name(given) if given else source.vae
    other, what = name != source.vae, f"--vae {given}: "
    if other and (name is None or source.vae_hash is None):
        raise UserError(f"{what}{source.folder} holds latents of {source.vae}; leave the option out")
    try:
        loads = needs_decoder or other  # another name may be another place of the same
        vae = load_same_vae(source.vae, source.vae_hash, device, name) if loads else Pixels()
    except UserError as error:
        if not other:
            raise
        reason = str(error).removeprefix(what)
        raise UserError(f"{what}{source.folder} holds latents of {source.vae}; {reason}") from None
    return vae, name, source.vae_hash


def latent_shape(source: Source, vae: VAE | Outline | Pixels) -> tuple[int, ...]:
    """(C, h, w) of a source's latents. ``UserError`` when its images do not suit the autoencoder."""
    if isinstance(source, LatentStore):
        return source.latent_shape
    if source.size % vae.factor:
        raise UserError(f"--image-size {source.size}: must be a multiple of {vae.factor} for --vae {vae.name}")
    if vae.image_channels not in (None, source.channels):
        raise UserError(
            f"--vae {vae.name}: takes images of {vae.image_channels} channels, these have {source.channels}"
        )
    side = source.size // vae.factor
    return vae.channels or source.channels, side, side


def real_latents(batch: dict[str, torch.Tensor], vae: VAE | Pixels) -> torch.Tensor:
    """x_0 of a batch: (B, C, h, w), drawn from the encoder's posterior with the noise ``batch["posterior_noise"]``.

    ``batch`` holds what ``read`` gave. Pixels have no deviation, so they are x_0 themselves.
    """
    if "images" in batch:
        mean, std = vae.encode(from_uint8(batch["images"]))
    else:
        mean, std = batch["mean"], batch["std"]
    return mean + std * batch["posterior_noise"]
