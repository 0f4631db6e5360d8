"""A small classifier of 8x8 digits: the feature space in which the small-scale experiments measure FID. Not ADM's.

    python -m evaluations.digits train --out assets/digits_classifier.pt
    python -m evaluations.digits reference --out data/digits_reference.npz

It is to FID on digits what Inception-v3 is to FID on ImageNet. The file in assets/ is part of the yardstick: figures
are comparable only between runs that used the same file, so its hash is recorded with every result.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import trange

from runtime import cli
from runtime.files import require_replaceable
from stores.digits import digits_images
from stores.image_arrays import Images, write_whole
from stores.images import from_uint8

WEIGHTS = Path(__file__).resolve().parent.parent / "assets" / "digits_classifier.pt"
SEED = 0
HELD_OUT = 5  # one image in five is never trained on


class DigitsClassifier(nn.Module):
    """Three convolutions, the mean over positions, a linear layer. SiLU keeps the features smooth in the pixels."""

    def __init__(self, width: int = 64, num_classes: int = 10):
        super().__init__()
        self.config = dict(width=width, num_classes=num_classes)
        self.body = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.GroupNorm(8, width), nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1, stride=2), nn.GroupNorm(8, width), nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1), nn.SiLU(),
        )  # fmt: skip
        self.head = nn.Linear(width, num_classes)
        self.whitening: torch.Tensor
        self.register_buffer("whitening", torch.eye(width))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x: (B, 1, 8, 8) in [-1, 1] -> features (B, width), whitened, and logits (B, classes)."""
        pooled = self.body(x).mean(dim=(2, 3))
        return pooled @ self.whitening, self.head(pooled)

    @torch.no_grad()
    def whiten(self, x: torch.Tensor) -> None:
        """Give the features of the real images x (B, 1, 8, 8) unit variance in all directions.

        Nine directions, those of the classes, hold nearly all of the variance. Unwhitened they alone decide FID, and
        with so few of them another noise seed moves it by several percent; whitened, all 64 count.
        """
        variances, directions = torch.linalg.eigh(torch.cov(self.body(x).mean(dim=(2, 3)).double().T))
        scales = (variances + 1e-3 * variances.max()).rsqrt()  # directions that hardly vary must not be blown up
        self.whitening.copy_(directions * scales @ directions.T)


def split() -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of the digits to train on (four fifths) and of those held out (one fifth), a fixed shuffle."""
    order = torch.from_numpy(np.random.default_rng(SEED).permutation(1797))
    return order[1797 // HELD_OUT :], order[: 1797 // HELD_OUT]


def augment(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each image moved by up to one pixel each way (background enters) and noised: (B, 1, 8, 8) -> the same."""
    padded = F.pad(x, (1, 1, 1, 1), value=-1.0)
    moves = torch.randint(0, 3, (2, len(x)), generator=generator)
    rows, cols = (torch.arange(8) + move[:, None] for move in moves)  # (B, 8) each
    moved = padded[torch.arange(len(x))[:, None, None], 0, rows[:, :, None], cols[:, None, :]][:, None]
    strength = 0.2 * torch.rand(len(x), 1, 1, 1, generator=generator)
    return moved + strength * torch.randn(moved.shape, generator=generator)


@torch.no_grad()
def accuracy(model: DigitsClassifier, x: torch.Tensor, y: torch.Tensor) -> float:
    """Share of images (B, 1, 8, 8) whose class is y (B,)."""
    return (model(x)[1].argmax(dim=1) == y).double().mean().item()


def train(steps: int) -> tuple[DigitsClassifier, float]:
    """The classifier after ``steps`` seeded steps on four fifths of the digits, and its accuracy on the last fifth."""
    images, y = digits_images()
    x = from_uint8(images)
    train_rows, test_rows = split()
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    model = DigitsClassifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in trange(steps, desc="digits classifier", disable=None):
        rows = train_rows[torch.randint(len(train_rows), (128,), generator=generator)]
        _, logits = model(augment(x[rows], generator))
        loss = F.cross_entropy(logits, y[rows], label_smoothing=0.1)  # smoothing keeps the features from saturating
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval().whiten(x)
    return model, accuracy(model, x[test_rows], y[test_rows])


def load(path: str | Path = WEIGHTS) -> DigitsClassifier:
    """The classifier of a file that ``train`` wrote, in evaluation mode. Raises ``UserError`` on any other file."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        model = DigitsClassifier(**saved["config"])
        model.load_state_dict(saved["model"])
    except OSError as error:
        raise cli.UserError(f"digits classifier {path}: {error.strerror or error}") from None
    except Exception:  # the ways in which a wrong file fails to unpickle are not a closed list
        raise cli.UserError(f"digits classifier {path}: not a file that evaluations.digits train wrote") from None
    return model.eval().requires_grad_(False)


def run_train(args: argparse.Namespace) -> None:
    command = f"python -m evaluations.digits train --out {args.out} --steps {args.steps}"
    provenance = dict(
        command=command,
        data="scikit-learn digits, 4/5 (a fixed shuffle, see evaluations.digits.split)",
        seed=SEED,
        torch=str(torch.__version__),
    )
    if args.dry_run:
        cli.show_plan(provenance, args)
        return
    require_replaceable("--out", args.out, "a classifier of this command", load)
    model, held_out = train(args.steps)
    provenance["held_out_accuracy"] = held_out
    saved = dict(model=model.state_dict(), config=model.config, provenance=provenance)
    write_whole("--out", args.out, lambda file: torch.save(saved, file))
    print(f"held-out accuracy {held_out:.4f}, saved to {args.out}")


def run_reference(args: argparse.Namespace) -> None:
    images, labels = digits_images()
    rgb = images.permute(0, 2, 3, 1).repeat(1, 1, 1, 3).numpy()  # (N, 8, 8, 3), grey in all three channels
    if args.dry_run:
        cli.show_plan(dict(out=str(args.out), arr_0=rgb.shape, arr_1=labels.shape), args)
        return
    require_replaceable("--out", args.out, "the digits", lambda path: Images("--out", path).shape == rgb.shape)
    write_whole("--out", args.out, lambda file: np.savez(file, arr_0=rgb, arr_1=labels.numpy()))
    print(f"{len(rgb)} digits saved to {args.out}")


def build_parser() -> cli.Parser:
    parser = cli.Parser(
        __doc__, prog="evaluations.digits", description="The digit classifier behind FID at small scale."
    )
    commands = parser.add_subparsers(required=True, metavar="train|reference")
    command = commands.add_parser(
        "train", help="Train the classifier on four fifths of the digits (a minute on a CPU)."
    )
    command.add_argument("--out", type=Path, required=True, help="File to write.")
    command.add_argument("--steps", type=cli.positive, default=1200, help="Optimiser steps of 128 images.")
    command.set_defaults(run=run_train)
    other = commands.add_parser("reference", help="Write the 1797 real digits as an .npz in ADM's format.")
    other.add_argument("--out", type=Path, required=True, help="File to write: arr_0 (N, 8, 8, 3) uint8, arr_1 labels.")
    other.set_defaults(run=run_reference)
    for each in (command, other):
        cli.add_dry_run_option(each)
    return parser


run = cli.run_command

if __name__ == "__main__":
    cli.main(build_parser(), run)
