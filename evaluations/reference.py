"""Make a file to evaluate against of a folder of images: ADM's format, cropped as ADM does.

    python -m evaluations.reference photos --image-size 256 --out photos-256.npz
    python -m evaluations.reference photos --image-size 256 --out photos-256.npz --features inception

``arr_0`` (N, H, W, 3) uint8 in the order of the paths, ``provenance`` JSON text; with ``--features inception`` also mu,
sigma, mu_s and sigma_s, the mean and covariance of Inception's features, which the evaluator and ADM's own take. The
images are never all in memory.
"""

import argparse
import contextlib
import json
import zipfile
from pathlib import Path

import numpy as np
from tqdm import tqdm

from evaluations.extraction import extract
from evaluations.features import Extractor, extractor
from evaluations.metrics import statistics
from runtime import cli, distributed
from runtime.cli import UserError
from runtime.distributed import DistributedContext
from runtime.files import atomic_write, claim, release
from runtime.provenance import require_same
from stores.image_arrays import FolderImages, Images
from stores.image_folder import add_skip_bad_option
from stores.images import summary
from stores.samples import read_provenance

# The names of mean and covariance of each kind of features, ADM's.
MEMBERS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}


def write_reference(
    path: Path,
    images: FolderImages,
    provenance: dict,
    network: Extractor | None,
    batch_size: int,
    context: DistributedContext,
) -> None:
    """Write the file, whole or not at all; ``network`` computes the statistics, None leaves them out."""
    with atomic_write(path) as partial:
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
            about = {"descr": "|u1", "fortran_order": False, "shape": images.shape}
            progress = tqdm(total=images.count, unit="image", desc=path.name, disable=None)
            with progress, archive.open("arr_0.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, about)
                for _, batch in images.batches(range(images.count), batch_size):
                    member.write(batch.tobytes())
                    progress.update(len(batch))
            _add(archive, "provenance", np.array(json.dumps(provenance)))
        if network is None:
            return
        table = extract(Images("--out", partial), network, batch_size, context)
        with zipfile.ZipFile(partial, "a") as archive:
            for kind, names in MEMBERS.items():
                for name, value in zip(names, statistics(table[kind]), strict=True):
                    _add(archive, name, value)


def _add(archive: zipfile.ZipFile, name: str, array: np.ndarray) -> None:
    with archive.open(f"{name}.npy", "w") as member:
        np.lib.format.write_array(member, array)


def build_parser() -> cli.Parser:
    parser = cli.Parser(prog="evaluations.reference", description="Make a reference file of a folder of images.")
    parser.add_argument("folder", metavar="FOLDER", help="Folder of images, with or without sub-folders.")
    parser.add_argument(
        "--image-size", type=cli.positive, required=True, help="Crop images to this side in pixels, as ADM does."
    )
    parser.add_argument("--out", type=Path, required=True, help="File to write, an .npz.")
    add_skip_bad_option(parser)
    parser.add_argument("--features", choices=("inception",), help="Store mean and covariance of these features too.")
    parser.add_argument("--inception-weights", type=Path, help="Use this file of torch-fidelity's Inception weights.")
    parser.add_argument("--batch-size", type=cli.positive, default=64, help="Images in a batch.")
    distributed.add_device_option(parser)
    cli.add_dry_run_option(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    if args.out.suffix != ".npz":
        raise UserError(f"--out {args.out}: the file's name must end in .npz")
    if args.inception_weights and not args.features:
        raise UserError(f"--inception-weights {args.inception_weights}: is for --features inception, leave it out")
    context = distributed.setup(args.device)
    if context.world_size > 1:
        raise UserError("evaluations.reference: works in one process, start it without torchrun")
    network = extractor(args.features, context.device, args.inception_weights) if args.features else None
    images = FolderImages("FOLDER", args.folder, args.image_size, skip_bad=args.skip_bad)
    if network is not None and images.count < 2:
        raise UserError(f"FOLDER {args.folder}: {images.count} image, a covariance needs two")
    if network is not None:
        network.load()
    provenance = images.source.fingerprint | {"weights_sha256": network.weights_sha256 if network else None}
    if args.out.exists():
        require_same(f"--out {args.out}: it holds other images", read_provenance(args.out), provenance)
    if args.dry_run:
        cli.show_plan(provenance | {"out": str(args.out), "bytes": int(np.prod(images.shape))}, args)
        return
    print(f"{args.folder}: {summary(images.source)}")
    done = ", already there" if args.out.exists() else ""
    if not done:
        work = args.out.with_suffix(".partial")  # the samplers' folder for a file of this name: one at a time
        claim(work, "--out")
        try:
            write_reference(args.out, images, provenance, network, args.batch_size, context)
        finally:
            release(work)
            with contextlib.suppress(OSError):  # it holds the unfinished samples of another command
                work.rmdir()
    print(f"{args.out}: {images.count} images{done}")


if __name__ == "__main__":
    cli.main(build_parser(), run)
