"""FID, precision and recall of a student while it trains, on a small fixed set of noises: to see a collapse early.

The figures are the evaluator's own, of few samples: to compare steps of one run, not runs with papers.
"""

import shutil
from pathlib import Path

import torch

import cli
from cli import UserError
from distributed import Ranks
from evaluations.evaluator import evaluate
from evaluations.features import NAMES, extractor
from evaluations.files import Images
from models_ard import ARD
from randomness import labels, noise
from samples import write_samples
from training import autocast


def add_quality_options(parser) -> None:
    """The options of ``Quality``."""
    group = parser.add_argument_group("quality while training")
    group.add_argument("--eval-every", type=cli.not_negative, default=0, help="steps between evaluations, 0: none")
    group.add_argument("--eval-reference", help="real images to compare with, ADM's .npz")
    group.add_argument("--eval-features", choices=NAMES, default="inception", help="the network behind FID")
    group.add_argument("--eval-samples", type=cli.positive, default=2048, help="samples of an evaluation")


class Quality:
    """Evaluates a student: call it with one to get {"fid", "precision", "recall"}, the same on every rank."""

    def __init__(self, args, ranks: Ranks, vae, image_size: int):
        """Refuses here, with a ``UserError``, what could not be evaluated later; ``image_size`` in pixels."""
        self.args, self.ranks, self.vae = args, ranks, vae
        if not args.eval_reference:
            raise UserError(f"--eval-every {args.eval_every}: needs --eval-reference, an .npz of real images")
        reference = Images("--eval-reference", args.eval_reference)
        if (reference.width, reference.height) != (image_size, image_size):
            raise UserError(
                f"{reference.what}: {reference.width}x{reference.height} images, the student's are "
                f"{image_size}x{image_size}"
            )
        network = extractor(args.eval_features)
        network.check_size(image_size, image_size)
        if min(args.eval_samples, reference.count) < network.widths["pool"]:
            raise UserError(
                f"--eval-samples {args.eval_samples}: FID needs at least {network.widths['pool']} samples and as many "
                f"real images (there are {reference.count})"
            )

    def __call__(self, student: ARD, folder: Path) -> dict[str, float]:
        """Sample, compare, and clean up what was written to ``folder`` meanwhile."""
        args, ranks = self.args, self.ranks

        @torch.no_grad()
        def draw(indices):
            z = noise(0, "preview", indices, student.latent_shape).to(ranks.device)
            y = labels(0, indices, student.num_classes)
            with autocast(args.precision, ranks.device):
                latents = student.sample(z, y.to(ranks.device))[:, -1].float()
            return latents, self.vae.decode(latents), y

        file = folder / "samples.npz"
        if ranks.main:
            shutil.rmtree(folder, ignore_errors=True)  # of a run that broke off
        ranks.barrier()
        write_samples(file, args.eval_samples, draw, {}, ranks, batch_size=64)
        result = evaluate(args.eval_reference, file, args.eval_features, ranks=ranks)
        ranks.barrier()
        if ranks.main:
            shutil.rmtree(folder)
        return {name: result[name] for name in ("fid", "precision", "recall")}
