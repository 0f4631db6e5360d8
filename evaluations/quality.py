"""FID, precision and recall of a model while it trains, on a small fixed set of noises: to see a collapse early.

The figures are the evaluator's own, of few samples: to compare steps of one run, not runs with papers.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from evaluations.evaluator import evaluate
from evaluations.features import FRECHET, NAMES, extractor
from runtime.cli import Parser, UserError, add_options, file, not_negative, option, positive
from runtime.distributed import DistributedContext
from sampler import Sampler
from stores.image_arrays import Images
from stores.samples import SampleWriter


@dataclass(frozen=True)
class QualityOptions:
    """How often and by what a model is evaluated while it trains."""

    eval_every: int = option(0, "Steps between evaluations, 0 for none.", not_negative)
    eval_reference: str | None = option(None, "Compare with these real images, an .npz in ADM's format.", file)
    eval_features: str = option("inception", "Compare features of this network.", choices=NAMES)
    eval_samples: int = option(2048, "Samples that an evaluation draws.", positive)


def add_quality_options(parser: Parser) -> None:
    """The options above, in a group."""
    add_options(parser.add_argument_group("quality while training"), QualityOptions)


class PeriodicEvaluator:
    """Evaluates a sampler's images: a call gives {"fid", "precision", "recall"}, the same on every rank.

    With DINOv2's features the first of them is "fd_dinov2", with pixels "fd_pixels".
    """

    def __init__(self, sampler: Sampler, context: DistributedContext, image_size: int, options: QualityOptions):
        """``UserError`` where an evaluation could not work later; ``image_size`` in pixels."""
        self.every, self.samples = options.eval_every, options.eval_samples
        self.sampler, self.context = sampler, context
        if not options.eval_reference:
            raise UserError("--eval-every: needs --eval-reference, an .npz of real images")
        self.reference, self.features = options.eval_reference, options.eval_features
        reference = Images("--eval-reference", self.reference)
        if (reference.width, reference.height) != (image_size, image_size):
            raise UserError(
                f"{reference.what}: {reference.width}x{reference.height} images, this model's are "
                f"{image_size}x{image_size}"
            )
        network = extractor(self.features)
        network.check_size(image_size, image_size)
        self.figures = (network.frechet, "precision", "recall")
        if min(self.samples, reference.count) < network.widths["pool"]:
            raise UserError(
                f"--eval-samples {self.samples}: {FRECHET[network.frechet]} needs at least {network.widths['pool']} "
                f"samples and as many real images (there are {reference.count})"
            )
        network.load()  # or it is refused here, before the training

    def __call__(self, folder: Path) -> dict[str, float]:
        """Sample, compare, and remove the files written to ``folder`` meanwhile."""
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
