"""The one owner of the latent store: an image folder, encoded once.

    DIR/manifest.json          provenance (images, classes, autoencoder and its scale), shards with their checksums
    DIR/shard-00000.safetensors
        mean, std (n, 2, C, h, w)  the encoder's posterior, scaled; index 1 is that of the mirror image
        label     (n,) int64

The posterior is stored, not a draw from it, so that training draws anew each time it meets an image.

    python -m stores.latents verify DIR
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from runtime import cli
from runtime.cli import UserError
from runtime.precision import DTYPES
from stores.shards import ShardStore, store_parser

KIND = "latents"  # the manifest's word for this format


def row_bytes(shape: tuple[int, ...], dtype: str) -> int:
    """Bytes of an image: mean and deviation of both sides, latents of ``shape``, and the label."""
    return 4 * torch.Size(shape).numel() * DTYPES[dtype].itemsize + torch.int64.itemsize


def is_store(folder: str | Path) -> bool:
    """True for a folder that holds a latent store, finished or not, rather than images."""
    return (Path(folder) / "manifest.json").is_file() or any(Path(folder).glob("shard-*"))


# The keys of a store's provenance that its readers need.
NEEDED = ("data", "listing", "image_size", "channels", "class_names", "num_classes", "vae", "dtype", "vae_precision")


class LatentStore(ShardStore):
    """A finished store of latents as a source of real images (images.py defines a source)."""

    kind = "latent store"

    def __init__(self, folder: str | Path, option: str = "--data-path", verify: bool = False):
        """``UserError`` naming ``option`` when it is missing, unfinished, truncated or another store."""
        super().__init__(folder, option, verify)
        origin = self.provenance
        if origin.get("kind") != KIND:
            raise UserError(f"{option} {folder}: this store holds no latents; encode_latents.py makes one that does")
        absent = [name for name in NEEDED if name not in origin]
        if absent:
            raise UserError(f"{option} {folder}/manifest.json: its provenance lacks {', '.join(absent)}; make it again")
        self.require("mean", "std", "label")
        self.vae, self.vae_hash = origin["vae"], origin.get("vae_hash")
        self.size, self.channels = origin["image_size"], origin["channels"]
        self.count, self.num_classes = len(self), origin["num_classes"]
        self.fingerprint = {name: origin[name] for name in ("data", "image_size", "listing", "dtype", "vae_precision")}
        self.fingerprint["images"] = self.count
        if self.num_classes:
            self.fingerprint["class_names"] = origin["class_names"]
        self.labels = torch.cat([tensors["label"] for tensors in self.tensors])

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(C, h, w) of each latent."""
        return tuple(self.tensors[0]["mean"].shape[2:])

    def read(self, rows: np.ndarray, flips: np.ndarray) -> dict[str, torch.Tensor]:
        """rows (B,), flips (B,) bool -> {"mean", "std": (B, C, h, w) float32, "y": (B,) labels}."""
        shape, dtype = (len(rows), *self.latent_shape), self.arrays[0]["mean"].dtype
        out = {name: np.empty(shape, dtype) for name in ("mean", "std")}
        sides = flips.astype(int).tolist()
        for i, (shard, row) in enumerate(self.locate(rows)):
            for name, value in out.items():
                value[i] = self.arrays[shard][name][row, sides[i]]
        for value in out.values():
            self.require_finite(rows, value)
        return {name: torch.from_numpy(value).float() for name, value in out.items()} | {"y": self.labels[rows]}


def verify(args: argparse.Namespace) -> None:
    """Check a whole store and print a one-line summary."""
    store = LatentStore(args.folder, "DIR")
    size = store.verify("DIR")
    print(
        f"{args.folder}: ok, {store.count} images of {store.provenance['data']} at {store.size} pixels as "
        f"{store.latent_shape} latents of {store.vae}, {store.num_classes} classes, {size / 1e6:.1f} MB"
    )


def build_parser() -> cli.Parser:
    return store_parser(__doc__, "latents", verify)[0]


run = cli.run_command

if __name__ == "__main__":
    cli.main(build_parser(), run)
