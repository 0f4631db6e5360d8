"""A small classifier of 8x8 digits: the feature space in which FID on digits is measured (classifier.py).

python -m evaluations.digits train --out assets/digits_classifier.pt
python -m evaluations.digits reference --out data/digits_reference.npz
"""

import torch
from torch import nn

from evaluations.classifier import Classifier, Yardstick, parser_of
from runtime import cli
from stores.digits import digits_images


class DigitsClassifier(Classifier):
    """Three convolutions."""

    size, channels = 8, 1

    def __init__(self, width: int = 64, num_classes: int = 10):
        super().__init__()
        self.config = dict(width=width, num_classes=num_classes)
        self.body = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.GroupNorm(8, width), nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1, stride=2), nn.GroupNorm(8, width), nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1), nn.SiLU(),
        )  # fmt: skip
        self.head = nn.Linear(width, num_classes)
        self.register_buffer("whitening", torch.eye(width))


DIGITS = Yardstick("digits", DigitsClassifier, digits_images, "scikit-learn digits", steps=1200, pixels=1, strength=0.2)


def build_parser() -> cli.Parser:
    return parser_of(DIGITS, __doc__)


run = cli.run_command

if __name__ == "__main__":
    cli.main(build_parser(), run)
