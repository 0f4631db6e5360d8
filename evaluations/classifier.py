"""Small classifiers of the bundled images, in whose features FID at small scale is measured. Never ADM's.

They are to FID there what Inception-v3 is to FID on ImageNet. The files in assets/ are part of the yardstick: figures
are comparable only between runs that used the same file, so its hash is recorded with every result. digits.py and
emoji.py have the networks; their common parts are here: training, files, the commands.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import trange

from runtime import cli
from runtime.files import require_replaceable
from stores.image_arrays import Images, write_whole
from stores.images import from_uint8

ASSETS = Path(__file__).resolve().parent.parent / "assets"
SEED = 0
HELD_OUT = 5  # one image in five is never trained on


class Classifier(nn.Module):
    """A body of convolutions, the mean over positions, a linear head. A subclass makes ``body`` and ``head``.

    ``size`` and ``channels`` are those of its images; SiLU keeps features smooth in the pixels.
    """

    config: dict[str, Any]
    size: int
    channels: int
    body: nn.Module
    head: nn.Linear
    whitening: torch.Tensor

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x: (B, channels, size, size) in [-1, 1] -> features (B, width), whitened, and logits (B, classes)."""
        pooled = self.body(x).mean(dim=(2, 3))
        return pooled @ self.whitening, self.head(pooled)

    def losses(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """The loss of images with labels (B,). Smoothing keeps the features from saturating."""
        return F.cross_entropy(self(x)[1], y, label_smoothing=0.1)

    @torch.no_grad()
    def accuracy(self, x: torch.Tensor, y: torch.Tensor) -> float:
        """Share of images whose class is y (B,)."""
        return (self(x)[1].argmax(dim=1) == y).double().mean().item()

    @torch.no_grad()
    def whiten(self, x: torch.Tensor) -> None:
        """Give the features of the real images x unit variance in all directions.

        A few directions, those of the classes, hold nearly all of the variance. Unwhitened they alone decide FID, and
        with so few of them another noise seed moves it by several percent; whitened, all count.
        """
        pooled = torch.cat([self.body(part).mean(dim=(2, 3)) for part in x.split(2048)])
        variances, directions = torch.linalg.eigh(torch.cov(pooled.double().T))
        scales = (variances + 1e-3 * variances.max()).rsqrt()  # directions that hardly vary must not be blown up
        self.whitening.copy_(directions * scales @ directions.T)


@dataclass(frozen=True)
class Yardstick:
    """A bundled data set and its classifier: ``images`` gives (N, C, H, W) uint8 and labels (N,) or (N, more)."""

    name: str
    model: type[Classifier]
    images: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    source: str  # what they are, for provenance
    steps: int
    pixels: int  # an image is moved by up to this number each way
    strength: float  # largest deviation of the noise on an image

    @property
    def weights(self) -> Path:
        """The shipped classifier."""
        return ASSETS / f"{self.name}_classifier.pt"

    def augment(self, x: torch.Tensor, generator: torch.Generator, background: float) -> torch.Tensor:
        """Each image moved by some pixels each way (background enters) and noised: (B, C, H, W) -> the same."""
        padded = F.pad(x, (self.pixels,) * 4, value=background)
        moves = torch.randint(0, 2 * self.pixels + 1, (2, len(x)), generator=generator)
        rows, cols = (torch.arange(x.shape[2]) + move[:, None] for move in moves)  # (B, H), (B, W)
        moved = padded[torch.arange(len(x))[:, None, None], :, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)
        strength = self.strength * torch.rand(len(x), 1, 1, 1, generator=generator)
        return moved + strength * torch.randn(moved.shape, generator=generator)

    def split(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Indices of the images to train on (four fifths) and of those held out (one fifth), a fixed shuffle."""
        order = torch.from_numpy(np.random.default_rng(SEED).permutation(count))
        return order[count // HELD_OUT :], order[: count // HELD_OUT]

    def train(self, steps: int) -> tuple[Classifier, float]:
        """The classifier after ``steps`` seeded steps on four fifths of the images, its accuracy on the last fifth."""
        images, y = self.images()
        x = from_uint8(images)
        background = float(x[:, :, 0, 0].median())
        train_rows, test_rows = self.split(len(x))
        torch.manual_seed(SEED)
        generator = torch.Generator().manual_seed(SEED)
        model = self.model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in trange(steps, desc=f"{self.name} classifier", disable=None):
            rows = train_rows[torch.randint(len(train_rows), (128,), generator=generator)]
            loss = model.losses(self.augment(x[rows], generator, background), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        model.eval().whiten(x)
        return model, model.accuracy(x[test_rows], y[test_rows])

    def load(self, path: str | Path | None = None) -> Classifier:
        """The classifier of a file that ``train`` wrote, in evaluation mode. Raises ``UserError`` on any other file."""
        path = path or self.weights
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            model = self.model(**saved["config"])
            model.load_state_dict(saved["model"])
        except OSError as error:
            raise cli.UserError(f"{self.name} classifier {path}: {error.strerror or error}") from None
        except Exception:  # the ways in which a wrong file fails to unpickle are not a closed list
            raise cli.UserError(
                f"{self.name} classifier {path}: not a file that evaluations.{self.name} train wrote"
            ) from None
        return model.eval().requires_grad_(False)


def run_train(yardstick: Yardstick, args: argparse.Namespace) -> None:
    provenance: dict[str, Any] = dict(
        command=f"python -m evaluations.{yardstick.name} train --out {args.out} --steps {args.steps}",
        data=f"{yardstick.source}, 4/5 (a fixed shuffle, see evaluations.classifier.Yardstick.split)",
        seed=SEED,
        torch=str(torch.__version__),
    )
    if args.dry_run:
        cli.show_plan(provenance, args)
        return
    require_replaceable("--out", args.out, "a classifier of this command", yardstick.load)
    model, held_out = yardstick.train(args.steps)
    provenance["held_out_accuracy"] = held_out
    saved = dict(model=model.state_dict(), config=model.config, provenance=provenance)
    write_whole("--out", args.out, lambda file: torch.save(saved, file))
    print(f"held-out accuracy {held_out:.4f}, saved to {args.out}")


def run_reference(yardstick: Yardstick, args: argparse.Namespace) -> None:
    images, labels = yardstick.images()
    rgb = images.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy()  # (N, H, W, 3), grey in all three channels
    classes = labels.reshape(len(labels), -1)[:, 0].numpy()
    if args.dry_run:
        cli.show_plan(dict(out=str(args.out), arr_0=rgb.shape, arr_1=classes.shape), args)
        return
    require_replaceable(
        "--out", args.out, f"the {yardstick.name}", lambda path: Images("--out", path).shape == rgb.shape
    )
    write_whole("--out", args.out, lambda file: np.savez(file, arr_0=rgb, arr_1=classes))
    print(f"{len(rgb)} {yardstick.name} saved to {args.out}")


def parser_of(yardstick: Yardstick, doc: str | None) -> cli.Parser:
    """The command line of the module evaluations.NAME of a yardstick."""
    parser = cli.Parser(
        doc, prog=f"evaluations.{yardstick.name}", description=f"The classifier behind FID on {yardstick.name}."
    )
    commands = parser.add_subparsers(required=True, metavar="train|reference")
    command = commands.add_parser("train", help="Train the classifier on four fifths of the images.")
    command.add_argument("--out", type=Path, required=True, help="File to write.")
    command.add_argument("--steps", type=cli.positive, default=yardstick.steps, help="Optimiser steps of 128 images.")
    command.set_defaults(run=partial(run_train, yardstick))
    other = commands.add_parser("reference", help="Write the real images as an .npz in ADM's format.")
    other.add_argument("--out", type=Path, required=True, help="File to write: arr_0 (N, H, W, 3) uint8, arr_1 labels.")
    other.set_defaults(run=partial(run_reference, yardstick))
    for each in (command, other):
        cli.add_dry_run_option(each)
    return parser
