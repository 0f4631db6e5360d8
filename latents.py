"""The one owner of the latent store: an image folder, encoded once.

    DIR/manifest.json          provenance (images, classes, autoencoder and its scale), shards with their checksums
    DIR/shard-00000.safetensors
        mean, std (n, 2, C, h, w)  the encoder's posterior, scaled; index 1 is that of the mirror image
        label     (n,) int64

The posterior is stored, not a draw from it, so that training draws anew each time it meets an image.
"""

from pathlib import Path

import numpy as np
import torch

from cli import UserError
from shards import ShardStore

KIND = "latents"  # the manifest's word for this format


def is_store(folder: str | Path) -> bool:
    """True for a folder that holds a latent store, finished or not, rather than images."""
    return (Path(folder) / "manifest.json").is_file() or any(Path(folder).glob("shard-*"))


class LatentStore(ShardStore):
    """A finished store of latents as a source of real images (data.py says what a source is)."""

    kind = "latent store"

    def __init__(self, folder: str | Path, option: str = "--data-path"):
        """``UserError`` naming ``option`` when it is missing, unfinished, truncated or another store."""
        super().__init__(folder, option)
        origin = self.provenance
        if origin.get("kind") != KIND:
            raise UserError(f"{option} {folder}: this store holds no latents; encode_latents.py makes one that does")
        self.vae, self.size, self.channels = origin["vae"], origin["image_size"], origin["channels"]
        self.count, self.num_classes = len(self), len(origin["classes"])
        self.identity = {
            name: origin[name] for name in ("data", "images", "image_size", "listing", "dtype", "precision")
        }
        self.labels = torch.cat([tensors["label"] for tensors in self.tensors])

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of each latent."""
        return tuple(self.tensors[0]["mean"].shape[2:])

    def read(self, rows: np.ndarray, flips: np.ndarray) -> dict[str, torch.Tensor]:
        """rows (B,), flips (B,) bool -> {"mean", "std": (B, C, h, w) float32, "y": (B,) labels}."""
        out = {name: torch.empty(len(rows), *self.latent_shape) for name in ("mean", "std")}
        side = torch.from_numpy(flips.astype(np.int64))
        for tensors, here, local in self.pieces(rows):
            for name, value in out.items():
                value[here] = tensors[name][local, side[here]].float()
        return out | {"y": self.labels[rows]}
