"""A small classifier of 32x32 emoji: the feature space in which FID on emoji is measured (classifier.py).

    python -m evaluations.emoji train --out assets/emoji_classifier.pt
    python -m evaluations.emoji reference --out data/emoji_reference.npz

It tells two things, what an emoji shows (nine classes) and whose drawing it is (the icon set), so that its features
know about content and about style.
"""

import torch
import torch.nn.functional as F
from torch import nn

from evaluations.classifier import Classifier, Yardstick, parser_of
from runtime import cli
from stores.emoji import SETS, EmojiImages


class EmojiClassifier(Classifier):
    """Four convolutions, from 32x32 to 8x8 positions. The head's logits are those of the classes, then of the sets."""

    size, channels = 32, 3

    def __init__(self, width: int = 128, num_classes: int = 9, num_sets: int = len(SETS)):
        super().__init__()
        self.config = dict(width=width, num_classes=num_classes, num_sets=num_sets)
        self.num_classes = num_classes
        half = width // 2
        self.body = nn.Sequential(
            nn.Conv2d(3, half, 4, padding=1, stride=2), nn.GroupNorm(8, half), nn.SiLU(),
            nn.Conv2d(half, half, 3, padding=1), nn.GroupNorm(8, half), nn.SiLU(),
            nn.Conv2d(half, width, 3, padding=1, stride=2), nn.GroupNorm(8, width), nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1), nn.SiLU(),
        )  # fmt: skip
        self.head = nn.Linear(width, num_classes + num_sets)
        self.register_buffer("whitening", torch.eye(width))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x: (B, 3, 32, 32) in [-1, 1] -> features (B, width), whitened, and logits of the classes (B, 9)."""
        features, logits = super().forward(x)
        return features, logits[:, : self.num_classes]

    def losses(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """The sum of both losses; y (B, 2) has class and set."""
        logits = self.head(self.body(x).mean(dim=(2, 3)))
        parts = zip(logits.split([self.num_classes, logits.shape[1] - self.num_classes], dim=1), y.T, strict=True)
        return torch.stack([F.cross_entropy(part, labels, label_smoothing=0.1) for part, labels in parts]).sum()

    def accuracy(self, x: torch.Tensor, y: torch.Tensor) -> float:
        """Share of images whose class is right; y (B, 2) has class and set."""
        return super().accuracy(x, y[:, 0])


def emoji_images() -> tuple[torch.Tensor, torch.Tensor]:
    """The bundled emoji: images (N, 3, 32, 32) uint8; class and set (N, 2) int64."""
    emoji = EmojiImages()
    return emoji.images, torch.stack([emoji.labels, torch.tensor([SETS.index(name) for name in emoji.sets])], dim=1)


EMOJI = Yardstick("emoji", EmojiClassifier, emoji_images, "stores.emoji", steps=1500, pixels=2, strength=0.2)


def build_parser() -> cli.Parser:
    return parser_of(EMOJI, __doc__)


run = cli.run_command

if __name__ == "__main__":
    cli.main(build_parser(), run)
