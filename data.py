"""Real images: the bundled UCI digits, folders of images (class = sub-folder).

Pixels are uint8 outside the models and float32 in [-1, 1] inside; ``to_unit`` and ``to_uint8`` are the only two ways
between them, and a uint8 image survives the round trip exactly.
"""

import numpy as np
import torch


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
