"""The reference of zero-shot FID on COCO 2017 (paper, Table 4): random real images, and the captions to draw from.

    python -m evaluations.coco --annotations captions_val2017.json --images val2017 --image-size 512 --out data/coco
    python encode_captions.py --text data/coco/captions.txt --out data/coco/captions
    python sample_ARD.py --ckpt-path STUDENT --captions data/coco/captions --num-samples 5000 --out samples.npz
    python -m evaluations.evaluator data/coco/reference.npz samples.npz

Caption i is one of those of image i, drawn at random. The paper does not say how it drew its 5k: seed and hashes are in
the reference's provenance, and FID of 5000 samples compares with nothing but FID of 5000.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from runtime import cli
from runtime.checks import writable_folder
from runtime.cli import UserError, existing_file, existing_folder
from runtime.distributed import DistributedContext
from runtime.files import file_sha256, require_outside, require_replaceable, write_text
from runtime.randomness import generator
from stores import pictures
from stores.images import from_uint8
from stores.samples import SampleWriter


def choose(annotations: str, count: int, seed: int) -> list[tuple[str, str]]:
    """File name and caption of ``count`` random images of COCO's annotation file, in the order of their draw."""
    path = existing_file("--annotations", annotations)
    try:
        content: Any = json.loads(path.read_bytes())
        names = {image["id"]: str(image["file_name"]) for image in content["images"]}
        captions: dict[int, list[str]] = {}
        for annotation in content["annotations"]:
            captions.setdefault(annotation["image_id"], []).append(" ".join(annotation["caption"].split()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--annotations {annotations}: not COCO's file of captions ({error!r})") from None
    usable = sorted(number for number in names if any(captions.get(number, [])))
    if len(usable) < count:
        raise UserError(f"--count {count}: {annotations} has only {len(usable)} images with captions")
    draw = generator(seed, "real", 0)
    chosen = [usable[i] for i in draw.permutation(len(usable))[:count]]
    texts = [[text for text in captions[number] if text] for number in chosen]
    return [(names[number], own[draw.integers(len(own))]) for number, own in zip(chosen, texts, strict=True)]


def read(path: Path, size: int) -> torch.Tensor:
    """An image (3, size, size) in [-1, 1], cropped as ADM does. ``UserError`` where it is missing or none."""
    try:
        image = pictures.center_crop(pictures.read(path), size)
    except (OSError, pictures.BadImageError) as error:
        raise UserError(f"--images {path}: is not a readable image ({error})") from None
    return from_uint8(torch.from_numpy(np.array(image))).permute(2, 0, 1)


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__, prog="evaluations.coco", description="Draw COCO's reference images and captions.")
    parser.add_argument("--annotations", type=cli.file, required=True, help="Read COCO's captions_val2017.json.")
    parser.add_argument("--images", type=cli.folder, required=True, help="Read images from COCO's val2017.")
    parser.add_argument("--out", type=cli.folder, required=True, help="Write reference.npz and captions.txt in it.")
    parser.add_argument(
        "--image-size",
        type=cli.positive,
        default=512,
        help="Side of the cropped images in pixels, that of the samples.",
    )
    parser.add_argument("--count", type=cli.positive, default=5000, help="Images to draw from all.")
    parser.add_argument("--seed", type=cli.not_negative, default=0, help="Seed of the draw.")
    cli.add_dry_run_option(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    pairs = choose(args.annotations, args.count, args.seed)
    folder = existing_folder("--images", args.images)
    missing = [name for name, _ in pairs if not (folder / name).is_file()]
    if missing:
        raise UserError(f"--images {args.images}: lacks {len(missing)} of the images, {missing[0]} first")
    provenance = {
        "data": "coco",
        "annotations_sha256": file_sha256(Path(args.annotations)),
        "image_size": args.image_size,
        "seed": args.seed,
    }
    require_outside("--out", args.out, "--images", folder)
    text, path = "".join(f"{caption}\n" for _, caption in pairs), writable_folder("--out", args.out) / "captions.txt"
    require_replaceable("--out", path, "these captions", lambda path: path.read_bytes() == text.encode())
    if args.dry_run:
        cli.show_plan(provenance | {"count": args.count, "first": pairs[0]}, args)
        return
    with SampleWriter(Path(args.out) / "reference.npz", args.count, provenance, DistributedContext()) as writer:
        for indices in writer.missing_batches(64):
            images = torch.stack([read(folder / pairs[i][0], args.image_size) for i in indices])
            writer.write(indices, images, images, torch.tensor(indices))
    write_text(path, text)
    print(f"{args.out}: {args.count} images and their captions")


if __name__ == "__main__":
    cli.main(build_parser(), run)
