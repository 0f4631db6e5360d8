"""FID, precision and recall of a model while it trains, on a small fixed set of noises: to see a collapse early.

The figures are the evaluator's own, of few samples: to compare steps of one run, not runs with papers.
"""

import shutil
from pathlib import Path

from evaluations.evaluator import evaluate
from evaluations.features import FRECHET, NAMES, extractor
from runtime.cli import Parser, UserError, file, not_negative, positive
from runtime.distributed import DistributedContext
from sampler import Sampler
from stores.image_arrays import Images
from stores.samples import SampleWriter

QUALITY_OPTIONS = ("eval_reference", "eval_features", "eval_samples")  # what ``PeriodicEvaluator`` takes of the options


def add_quality_options(parser: Parser) -> None:
    """``--eval-every``, and the options of ``PeriodicEvaluator``."""
    group = parser.add_argument_group("quality while training")
    group.add_argument("--eval-every", type=not_negative, default=0, help="Steps between evaluations, 0 for none.")
    group.add_argument("--eval-reference", type=file, help="Compare with these real images, an .npz in ADM's format.")
    group.add_argument(
        "--eval-features", choices=NAMES, default="inception", help="Use this network for FID, or FD-DINOv2."
    )
    group.add_argument("--eval-samples", type=positive, default=2048, help="Draw so many samples for an evaluation.")


class PeriodicEvaluator:
    """Evaluates what a sampler draws: a call gives {"fid", "precision", "recall"}, the same on every rank.

    With DINOv2's features the first of them is "fd_dinov2".
    """

    def __init__(
        self,
        sampler: Sampler,
        context: DistributedContext,
        image_size: int,
        *,
        eval_reference: str | None,
        eval_features: str = "inception",
        eval_samples: int = 2048,
    ):
        """Refuses here, with a ``UserError``, what could not be evaluated later; ``image_size`` in pixels."""
        self.sampler, self.context, self.samples = sampler, context, eval_samples
        if not eval_reference:
            raise UserError("--eval-every: needs --eval-reference, an .npz of real images")
        self.reference, self.features = eval_reference, eval_features
        reference = Images("--eval-reference", eval_reference)
        if (reference.width, reference.height) != (image_size, image_size):
            raise UserError(
                f"{reference.what}: {reference.width}x{reference.height} images, this model's are "
                f"{image_size}x{image_size}"
            )
        network = extractor(eval_features)
        network.check_size(image_size, image_size)
        self.figures = (network.frechet, "precision", "recall")
        if min(eval_samples, reference.count) < network.widths["pool"]:
            raise UserError(
                f"--eval-samples {eval_samples}: {FRECHET[network.frechet]} needs at least {network.widths['pool']} "
                f"samples and as many real images (there are {reference.count})"
            )

    def __call__(self, folder: Path) -> dict[str, float]:
        """Sample, compare, and clean up what was written to ``folder`` meanwhile."""
        file = folder / "samples.npz"
        if self.context.is_main:
            shutil.rmtree(folder, ignore_errors=True)  # of a run that broke off
        self.context.barrier()
        with SampleWriter(file, self.samples, {}, self.context) as writer:
            for indices in writer.missing_batches(64):
                writer.write(indices, *self.sampler(indices))
        result = evaluate(self.reference, file, self.features, context=self.context)
        self.context.barrier()
        if self.context.is_main:
            shutil.rmtree(folder)
        return {name: result[name] for name in self.figures}
