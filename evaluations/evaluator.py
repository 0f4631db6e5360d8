"""FID, sFID, Inception Score, precision and recall of samples, by the protocol of ADM's evaluator; and two others.

    python -m evaluations.evaluator VIRTUAL_imagenet256_labeled.npz samples.npz
    torchrun --nproc_per_node=8 -m evaluations.evaluator REFERENCE.npz SAMPLES.npz --json metrics.json
    python -m evaluations.evaluator data/digits_reference.npz samples.npz --features digits --floor
    python -m evaluations.evaluator photos folder_of_samples --image-size 256
    python -m evaluations.evaluator imagenet256.npz samples.npz --features dinov2 --kid
    python -m evaluations.evaluator photos.npz samples.npz --features pixels

Files hold arr_0 (N, H, W, 3) uint8; a folder of images serves as well. As in ADM: FID and sFID use the mu, sigma, mu_s,
sigma_s stored in the reference file where it has them; the Inception Score is the samples'; precision and recall (k=3)
compare the images. The extracted features are kept beside each file and used again as long as it does not change; those
of a folder are not (``evaluations.reference`` makes a file of it).

With ``--features dinov2`` the Frechet distance is FD-DINOv2 (evaluations/dinov2.py), which is never called FID;
published values compare with all training images. ``--kid`` adds KID (evaluations/kid.py), in whichever features.
``--features pixels`` needs no weights: FD-pixels, of colours on a grid of 8x8, compares runs on small pictures.
"""

import argparse
import importlib.metadata
import json
import platform
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evaluations.extraction import features
from evaluations.features import FRECHET, NAMES, Extractor, extractor
from evaluations.kid import kid
from evaluations.metrics import frechet_distance, inception_score, precision_recall, statistics
from runtime import cli, distributed
from runtime.cli import AbsentError, UserError
from runtime.distributed import DistributedContext
from runtime.files import held, json_object, read_json, require_different, require_replaceable
from stores.image_arrays import open_images, write_whole

K = 3  # neighbours, ADM's choice
PUBLISHED_COUNT = 50_000  # FID falls with the number of samples; published values use this many


class Evaluation:
    """Two files or folders and a network, opened and checked before the network's weights are loaded or fetched."""

    def __init__(
        self,
        reference: str | Path,
        samples: str | Path,
        network: Extractor,
        allow_few: bool = False,
        image_size: int | None = None,
        context: DistributedContext | None = None,
    ):
        """``image_size``: crop the images of a reference folder to this side in pixels."""
        self.reference = open_images("REFERENCE", reference, image_size, context)
        self.samples, self.network = open_images("SAMPLES", samples, context=context), network
        ours, theirs = ((i.width, i.height) for i in (self.samples, self.reference))
        if ours != theirs:
            raise UserError(
                f"{self.samples.what}: {ours[0]}x{ours[1]} images, the reference's are {theirs[0]}x{theirs[1]}"
            )
        network.check_size(self.samples.width, self.samples.height)
        # The reference's own statistics, mean and covariance; they belong to the Inception network only.
        self.stored: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        if network.name == "inception":
            for mu, sigma, of in (("mu", "sigma", "pool"), ("mu_s", "sigma_s", "spatial")):
                mean, covariance = self.reference.member(mu), self.reference.member(sigma)
                if mean is None or covariance is None:
                    continue
                width, shapes = network.widths[of], (mean.shape, covariance.shape)
                if shapes != ((width,), (width, width)):
                    raise UserError(
                        f"{self.reference.what}: its {mu} {shapes[0]} and {sigma} {shapes[1]} are not of D={width}"
                    )
                self.stored[of] = mean, covariance
        for images in (self.samples, self.reference):
            # With fewer images than features the covariance is singular, and FID says more of N than of the images.
            fewest = network.widths["pool"] if images is self.samples or "pool" not in self.stored else K + 1
            if images.count < (K + 1 if allow_few else fewest):
                raise UserError(
                    f"{images.what}: {images.count} images, "
                    + (f"k={K} neighbours need {K + 1}" if images.count <= K else f"give {fewest} or --allow-few")
                )
        self.provenance_of_samples = self._read_provenance()

    def _read_provenance(self) -> dict | None:
        """The provenance that the sampler wrote into the samples' file, or None."""
        text = self.samples.member("provenance")
        if text is None:
            return None
        try:
            return json_object(str(text))
        except ValueError:
            raise UserError(f"{self.samples.what}: its member provenance is not JSON") from None

    def provenance(self, digests: dict[str, str]) -> dict:
        """Where the figures come from: files, network, versions."""
        behind = {"inception": ["torch-fidelity"], "dinov2": ["timm"]}
        packages = ["torch", "numpy", *behind.get(self.network.name, [])]
        files = {
            role: {"name": images.path.name, images.hashed: digests[role], "count": images.count}
            for role, images in (("reference_file", self.reference), ("samples_file", self.samples))
        }
        return dict(
            **files,
            resolution=[self.samples.width, self.samples.height],
            features=self.network.name,
            weights_sha256=self.network.weights_sha256,
            tf32=self.network.tf32,
            adm=self.network.adm,
            stored_statistics=sorted(self.stored),
            neighbours=K,
            versions=dict(python=platform.python_version()) | {p: importlib.metadata.version(p) for p in packages},
            samples=self.provenance_of_samples,
        )

    def digests(self) -> dict[str, str]:
        """The hashes of both."""
        return {"samples_file": self.samples.digest(), "reference_file": self.reference.digest()}

    def run(
        self, batch_size: int, context: DistributedContext, cache: bool, floor: bool, with_kid: bool = False
    ) -> dict:
        """All figures and their provenance, the same on every rank."""
        pairs = (("samples_file", self.samples), ("reference_file", self.reference))
        digests = context.broadcast_object(self.digests() if context.is_main else None)
        sam, ref = (features(i, digests[role], self.network, batch_size, context, cache) for role, i in pairs)
        result = None
        if context.is_main:
            try:
                result = self.figures(ref, sam, context.device, floor, with_kid)
            except ValueError as error:  # stored statistics that are none, weights that give NaN
                raise UserError(f"{self.reference.what}, {self.samples.what}: {error}") from None
            result["provenance"] = self.provenance(digests)
        return context.broadcast_object(result)

    def figures(self, ref: dict, sam: dict, device: torch.device, floor: bool, with_kid: bool = False) -> dict:
        """The figures from the features of both files."""
        own = self.stored.get("pool") or statistics(ref["pool"])
        result: dict[str, Any] = dict(inception_score=inception_score(sam["probs"]) if "probs" in sam else None)
        result[self.network.frechet] = frechet_distance(*own, *statistics(sam["pool"]))
        result["sfid"] = None
        if "spatial" in sam:
            own_spatial = self.stored.get("spatial") or statistics(ref["spatial"])
            result["sfid"] = frechet_distance(*own_spatial, *statistics(sam["spatial"]))
        result["precision"], result["recall"] = precision_recall(ref["pool"], sam["pool"], K, device)
        result["count"] = self.samples.count
        if floor:
            # The FID of a perfect sampler of the reference's images: as many draws from them, with replacement.
            rows = np.random.default_rng(0).integers(0, self.reference.count, self.samples.count)
            result["floor"] = frechet_distance(*statistics(ref["pool"]), *statistics(ref["pool"][rows]))
        if with_kid:
            result["kid"] = {"features": self.network.name} | kid(sam["pool"], ref["pool"], device)
        return result


def evaluate(
    reference_path: str | Path,
    samples_path: str | Path,
    features: str = "digits",
    *,
    inception_weights: str | Path | None = None,
    batch_size: int = 64,
    context: DistributedContext | None = None,
    cache: bool = True,
    allow_few: bool = False,
    floor: bool = False,
    tf32: bool = False,
    image_size: int | None = None,
    dinov2_weights: str | Path | None = None,
    kid: bool = False,
) -> dict:
    """All figures of samples against a reference, files or folders: the command's JSON, for other scripts.

    features: one of ``features.NAMES``. Returns fid, for dinov2 fd_dinov2 instead, sfid and inception_score
    (None where the network has none), precision, recall, count, floor and kid (if asked for) and provenance. Raises
    ``UserError`` on files and weights that do not serve.
    """
    context = context or DistributedContext()
    network = extractor(features, context.device, inception_weights, tf32, dinov2_weights)
    evaluation = Evaluation(reference_path, samples_path, network, allow_few, image_size, context)
    network.load()
    return evaluation.run(batch_size, context, cache, floor, kid)


def show(result: dict, network: Extractor) -> None:
    """Print ADM's five lines and FID with its sample count; without ADM's network every line says so."""
    name, distance = network.name, FRECHET[network.frechet]
    label = "" if name == "inception" else f" ({name} features, not ADM)"
    for title, key in (
        ("Inception Score", "inception_score"), (distance, network.frechet), ("sFID", "sfid"),
        ("Precision", "precision"), ("Recall", "recall"),
    ):  # fmt: skip
        if result[key] is not None:
            print(f"{title}{label}: {result[key]:.6g}")
    count = f"{result['count'] // 1000}K" if result["count"] % 1000 == 0 else str(result["count"])
    remark = f" ({network.remark})" if network.remark else ""
    print(f"{distance}-{count}{label}{remark}: {result[network.frechet]:.6g}")
    if "kid" in result:
        found = result["kid"]
        drawn = f"{name} features, {found['subsets']} subsets of {found['subset_size']}"
        print(f"KID ({drawn}): {found['mean']:.6g}, standard deviation {found['std']:.3g}")
    if "floor" in result:
        print(
            f"{distance} floor{label}, the reference against {result['count']} draws from itself: {result['floor']:.6g}"
        )
    if name in ("inception", "dinov2") and result["count"] < PUBLISHED_COUNT:
        print(
            f"warning: {distance} of {result['count']} samples is higher than that of {PUBLISHED_COUNT}, "
            "which published values use",
            file=sys.stderr,
        )


def run(args: argparse.Namespace) -> None:
    if args.json:
        inputs = {"REFERENCE": args.reference, "SAMPLES": args.samples}
        inputs |= {"--inception-weights": args.inception_weights, "--dinov2-weights": args.dinov2_weights}
        require_different("--json", args.json, inputs)
        ours = "figures of this command"
        require_replaceable("--json", args.json, ours, lambda path: FRECHET.keys() & read_json(path).keys())
    context = distributed.setup(args.device)
    network = extractor(args.features, context.device, args.inception_weights, args.tf32, args.dinov2_weights)
    evaluation = Evaluation(args.reference, args.samples, network, args.allow_few, args.image_size, context)
    if args.dry_run:
        if context.is_main:
            plan = dict(device=str(context.device), ranks=context.world_size, fetch=[])
            try:
                network.load()
            except AbsentError as absent:
                plan["fetch"] = [str(absent)]
            cli.show_plan(evaluation.provenance(evaluation.digests()) | plan, args)
    else:
        if not context.is_main:
            context.barrier()  # the main rank goes first, in case that the weights have to be fetched
        network.load()
        if context.is_main:
            context.barrier()
        with held(args.samples, "SAMPLES", context) if args.samples.is_file() else nullcontext():
            result = evaluation.run(args.batch_size, context, args.cache, args.floor, args.kid)
            if context.is_main:
                show(result, network)
                if args.json:
                    text = json.dumps(result, indent=2) + "\n"
                    write_whole("--json", args.json, lambda file: file.write(text.encode()))
    distributed.finish(context)


def build_parser() -> cli.Parser:
    parser = cli.Parser(
        __doc__, prog="evaluations.evaluator", description="FID, sFID, Inception Score, precision and recall."
    )
    parser.add_argument("reference", metavar="REFERENCE", type=Path, help="Real images: ADM's .npz, or a folder.")
    parser.add_argument(
        "samples", metavar="SAMPLES", type=Path, help="Samples: an .npz with arr_0 (N, H, W, 3) uint8, or a folder."
    )
    parser.add_argument("--image-size", type=cli.positive, help="Crop a reference folder to this side in pixels.")
    group = parser.add_argument_group("features")
    group.add_argument(
        "--features",
        choices=NAMES,
        default="inception",
        help="Use ADM's network, DINOv2 (for FD-DINOv2), ours for 8x8 digits or 32x32 emoji, or coarse pixels.",
    )
    group.add_argument(
        "--inception-weights",
        type=Path,
        help="Use this file of torch-fidelity's Inception weights; without it, they are fetched.",
    )
    group.add_argument(
        "--dinov2-weights",
        type=Path,
        help="Use this file of Meta's DINOv2 ViT-L/14 weights; without it, they are fetched.",
    )
    group.add_argument("--batch-size", type=cli.positive, default=64, help="Batch size per rank, in images.")
    group.add_argument(
        "--cache", action=argparse.BooleanOptionalAction, default=True, help="Keep the features beside the files."
    )
    group.add_argument(
        "--tf32", action="store_true", help="Let GPUs take products in TF32: faster, and not the published figures."
    )
    distributed.add_device_option(group)
    group = parser.add_argument_group("figures")
    few = "Accept fewer images than features (2048; dinov2: 1024; pixels: 192; emoji: 128; digits: 64)."
    group.add_argument("--allow-few", action="store_true", help=few)
    group.add_argument("--kid", action="store_true", help="Add KID, in the features that are used.")
    group.add_argument(
        "--floor", action="store_true", help="Add the distance of the reference to as many draws from itself."
    )
    group.add_argument("--json", type=Path, metavar="OUT.json", help="Write the figures and their provenance there.")
    cli.add_dry_run_option(group)
    return parser


if __name__ == "__main__":
    cli.main(build_parser(), run)
