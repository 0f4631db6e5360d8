"""Encode a folder of images once into a store of latents, for train.py and train_ARD_gan.py to read instead.

    python encode_latents.py --data-path imagenet/train --image-size 256 --vae ema --out data/imagenet-256
    torchrun --nproc_per_node=8 encode_latents.py --data-path imagenet/train --image-size 512 --out data/imagenet-512

ImageNet takes 42 GB at 256 pixels in fp16. The files do not depend on the number of ranks. To resume, run the same
command again: finished shards are kept.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import cli
import distributed
from cli import RunError, UserError
from data import ImageFolder, latent_shape, to_unit
from distributed import Ranks
from latents import KIND
from shards import fill_store
from vae import PRECISIONS, VAE, full_name

DTYPES = {"fp16": torch.float16, "fp32": torch.float32}


def build_parser() -> cli.Parser:
    parser = cli.Parser(description="Encode a folder of images into a store of latents.")
    group = parser.add_argument_group("images and autoencoder")
    group.add_argument("--data-path", required=True, help="folder with one sub-folder of images for each class")
    group.add_argument("--image-size", type=cli.positive, default=256, help="pixels of a side, cropped as ADM does")
    group.add_argument("--unconditional", action="store_true", help="no classes; the folder may then be flat")
    group.add_argument("--vae", default="ema", help="ema, mse, a folder or hub id")
    group.add_argument("--vae-precision", choices=PRECISIONS, default="fp32", help="of the autoencoder")
    group = parser.add_argument_group("store")
    group.add_argument("--out", required=True, help="folder of the store")
    group.add_argument("--dtype", choices=DTYPES, default="fp16", help="of the stored means and deviations")
    group.add_argument("--rows-per-shard", type=cli.positive, default=8192, help="images of one file")
    group = parser.add_argument_group("run")
    group.add_argument("--per-proc-batch-size", type=cli.positive, default=64, help="images of a rank at once")
    group.add_argument("--num-workers", type=cli.not_negative, default=4, help="processes of a rank that read images")
    group.add_argument("--dry-run", action="store_true", help="check everything, print the plan as JSON, do nothing")
    distributed.add_device_option(group)
    return parser


class ImageBatches(Dataset):
    """Item (start, stop) is the batch of these rows, none mirrored."""

    def __init__(self, source: ImageFolder):
        self.source = source

    def __getitem__(self, rows: tuple[int, int]) -> dict[str, torch.Tensor]:
        return self.source.read(np.arange(*rows), np.zeros(rows[1] - rows[0], dtype=bool))


def encode_shard(source: ImageFolder, vae: VAE, args, rows: range, ranks: Ranks, bar: tqdm) -> dict[str, torch.Tensor]:
    """The tensors of one shard (latents.py says which), on the CPU in the stored dtype."""
    size = args.per_proc_batch_size
    batches = [(start, min(start + size, rows.stop)) for start in range(rows.start, rows.stop, size)]
    parts = []
    for batch in DataLoader(
        ImageBatches(source), batch_size=None, sampler=batches, num_workers=min(args.num_workers, len(batches))
    ):
        images = to_unit(batch["images"].to(ranks.device))
        sides = [vae.encode(x) for x in (images, images.flip(-1))]
        mean, std = (torch.stack(values, dim=1).to("cpu", DTYPES[args.dtype]) for values in zip(*sides))
        if not (mean.isfinite().all() and std.isfinite().all()):
            raise RunError(f"the latents of images {rows.start} to {rows.stop - 1} are not finite; try --dtype fp32")
        parts.append({"mean": mean, "std": std, "label": batch["y"]})
        bar.update(len(images))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def run(args: argparse.Namespace) -> None:
    if full_name(args.vae) is None:
        raise UserError(f"--vae {args.vae}: images without an autoencoder need no encoding, train on them directly")
    source = ImageFolder(args.data_path, args.image_size, args.unconditional)
    ranks = distributed.setup(args.device)
    vae = VAE(args.vae, ranks.device, args.vae_precision)
    shape = latent_shape(source, vae)
    provenance = {
        "kind": KIND,
        "data": str(args.data_path),
        "listing": source.listing(),
        "image_size": source.size,
        "channels": source.channels,
        "classes": source.classes,
        "num_classes": source.num_classes,
        "vae": vae.name,
        "scale": vae.scale,
        "vae_precision": args.vae_precision,
        "dtype": args.dtype,
        "count": source.count,
        "rows_per_shard": args.rows_per_shard,
    }
    if args.dry_run:
        size = 4 * source.count * int(np.prod(shape)) * DTYPES[args.dtype].itemsize
        cli.show_plan(provenance | {"latent_shape": shape, "bytes": size})
        return
    folder = Path(args.out)

    def make(rows: range, bar: tqdm) -> dict[str, torch.Tensor]:
        return encode_shard(source, vae, args, rows, ranks, bar)

    written = fill_store(folder, provenance, ranks, make, unit="image")
    if ranks.main:
        print(f"{folder}: {source.count} images" if written else f"{folder}: already complete, {source.count} images")
    distributed.finish(ranks)


if __name__ == "__main__":
    cli.main(build_parser(), run)
