"""Encode a folder of images once into a store of latents, for train.py and train_ARD_gan.py to read instead.

    python encode_latents.py --data-path imagenet/train --image-size 256 --vae ema --out data/imagenet-256
    torchrun --nproc_per_node=8 encode_latents.py --data-path imagenet/train --image-size 512 --out data/imagenet-512

ImageNet takes 42 GB at 256 pixels in fp16. The files do not depend on the number of ranks. To resume, run the same
command again: finished shards are kept.
"""

import argparse

import numpy as np
import torch
from torch.utils.data import Dataset

from costs.commands import check_plan, plan_latents
from runtime import cli, distributed
from runtime.checks import writable_folder
from runtime.cli import RunError, UserError
from runtime.precision import DTYPES, STORED, add_precision_option
from runtime.vae import load_vae, outline_vae, resolve_name
from stores.image_folder import ImageFolder, add_skip_bad_option
from stores.images import from_uint8, latent_shape, require_outside_source, summary
from stores.latents import KIND
from stores.shards import ShardWriter, add_store_options


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__, description="Encode a folder of images into a store of latents.")
    group = parser.add_argument_group("images and autoencoder")
    group.add_argument("--data-path", type=cli.folder, required=True, help="One sub-folder of images for each class.")
    group.add_argument("--image-size", type=cli.positive, default=256, help="Pixels of a side, cropped as ADM does.")
    group.add_argument("--unconditional", action="store_true", help="Use no classes; the folder may be flat then.")
    add_skip_bad_option(group)
    group.add_argument("--vae", type=cli.name, default="ema", help="Autoencoder: ema, mse, a folder or hub id.")
    add_precision_option(group, "--vae-precision", "the autoencoder")
    group = parser.add_argument_group("store")
    add_store_options(group, "Images")
    group.add_argument("--dtype", choices=STORED, default="fp16", help="Number format of the stored latents.")
    group = parser.add_argument_group("run")
    group.add_argument("--per-proc-batch-size", type=cli.positive, default=64, help="Batch size per rank, in images.")
    group.add_argument("--num-workers", type=cli.workers, default=4, help="Processes of a rank that read images.")
    cli.add_dry_run_option(group)
    distributed.add_device_option(group)
    return parser


class ImageBatches(Dataset):
    """The item of a range of rows is their batch, none mirrored."""

    def __init__(self, source: ImageFolder):
        self.source = source

    def __getitem__(self, rows: range) -> dict[str, torch.Tensor]:
        return self.source.read(np.array(rows), np.zeros(len(rows), dtype=bool))


def run(args: argparse.Namespace) -> None:
    if resolve_name(args.vae) is None:
        raise UserError(f"--vae {args.vae}: images without an autoencoder need no encoding, train on them directly")
    writable_folder("--out", args.out)
    about_vae = outline_vae(args.vae)
    context = distributed.choose_device(args.device)
    distributed.join(context)  # the main rank looks at the folder for all
    folder = args.data_path, args.image_size, args.unconditional
    source = ImageFolder(*folder, skip_bad=args.skip_bad, context=context)
    require_outside_source(source, {"--out": args.out})
    shape = latent_shape(source, about_vae)
    vae = load_vae(args.vae, context.device, args.vae_precision)
    provenance = {
        "kind": KIND,
        "data": args.data_path,
        "listing": source.fingerprint["listing"],
        "image_size": source.size,
        "channels": source.channels,
        "class_names": source.classes,
        "num_classes": source.num_classes,
        "vae": vae.name,
        "vae_hash": vae.hash,
        "scale": vae.scale,
        "vae_precision": args.vae_precision,
        "dtype": args.dtype,
        "count": source.count,
        "rows_per_shard": args.rows_per_shard,
    }
    writer = ShardWriter(args.out, provenance, context, unit="image")
    plan = plan_latents(vars(args), context, count=source.count, shape=shape, vae=about_vae)
    check_plan(plan, provenance | {"latent_shape": shape}, vars(args), context)

    with writer:
        if context.is_main:
            print(f"{args.data_path}: {summary(source)}")
        for rows in writer.missing_shards():
            size = args.per_proc_batch_size
            batches = [rows[start : start + size] for start in range(0, len(rows), size)]
            workers = min(args.num_workers, len(batches))
            parts = []
            for batch in distributed.read_with_workers(ImageBatches(source), batches, workers):
                images = from_uint8(batch["images"].to(context.device))
                mean, std = vae.encode(images)
                mirrored_mean, mirrored_std = vae.encode(images.flip(-1))
                both = {"mean": torch.stack([mean, mirrored_mean], 1), "std": torch.stack([std, mirrored_std], 1)}
                both = {name: value.to("cpu", DTYPES[args.dtype]) for name, value in both.items()}
                if not all(value.isfinite().all() for value in both.values()):
                    raise RunError(
                        f"the latents of images {rows.start} to {rows.stop - 1} are not finite; try --dtype fp32"
                    )
                parts.append(both | {"label": batch["y"]})
                writer.progress(len(images))
            writer.write(rows, {name: torch.cat([part[name] for part in parts]) for name in parts[0]})
    if context.is_main:
        print(f"{args.out}: " + ("already complete, " if writer.complete else "") + f"{source.count} images")
    distributed.finish(context)


if __name__ == "__main__":
    cli.main(build_parser(), run)
