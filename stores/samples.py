"""The one owner of sample files: ADM's .npz, written in place by many ranks, resumable; PNG grids.

``arr_0`` (N, H, W, 3) uint8 images, ``arr_1`` (N,) int64 labels, ``provenance`` JSON text; on request ``latents``
(N, C, h, w) float32, the samples before decoding and rounding.
"""

import json
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.utils import make_grid

from runtime.cli import UserError
from runtime.distributed import DistributedContext
from runtime.files import SharedWriter, atomic_write, claim, release, write_text
from runtime.provenance import require_same, with_current_keys
from stores.images import to_uint8


class SampleWriter(SharedWriter):
    """Fills ``path`` with exactly ``count`` samples, by any number of ranks, and writes a PNG grid of the first 100.

    with SampleWriter(path, count, image_size, provenance, context) as writer:
        for indices in writer.missing_batches(64):      # this rank's part of what is not there yet
            writer.write(indices, latents, images, y)   # in a thread, while the next batch is drawn

    Leaving the block without an error packs the .npz. ``complete`` says that it was there from the start, with the same
    provenance; another one is refused. A run that broke off is continued; no sample is drawn twice.
    """

    def __init__(
        self,
        path: str | Path,
        count: int,
        image_size: int,
        provenance: dict,
        context: DistributedContext,
        latent_shape: tuple[int, ...] | None = None,
    ):
        """``image_size``: pixels of a side; ``latent_shape`` (C, h, w) if latents are to be kept. ``UserError`` where
        ``path`` or the unfinished samples beside it are those of another run.
        """
        super().__init__(context)
        self.path = Path(path)
        self.folder = self.path.with_suffix(".partial")
        self.provenance = provenance | {"count": count}
        self.complete = self.path.exists()
        self._shapes = {"arr_0": (count, image_size, image_size, 3), "arr_1": (count,), "done": (count,)}
        if latent_shape is not None:
            self._shapes["latents"] = (count, *latent_shape)
        self._note = self.folder / "provenance.json"  # written last: its presence says that the arrays are there
        if self.complete:
            require_same(f"--out {path}: the samples there are others", read_provenance(path), self.provenance)
        elif self._note.exists():
            found = with_current_keys(json.loads(self._note.read_text()))
            require_same(
                f"--out {path}: {self.folder} holds the unfinished samples of another run", found, self.provenance
            )
        self._arrays: dict[str, np.ndarray] = {}
        self._mine: list[int] = []

    def __enter__(self) -> "SampleWriter":
        if self.complete:
            return self
        self.context.barrier()  # everybody has looked before the main rank begins
        self.context.on_main(lambda: claim(self.folder, "--out"))
        if self.context.is_main and not self._note.exists():
            dtypes = {"arr_0": np.uint8, "arr_1": np.int64, "done": np.uint8, "latents": np.float32}
            for name, shape in self._shapes.items():
                np.lib.format.open_memmap(self.folder / f"{name}.npy", "w+", dtypes[name], shape)
            write_text(self._note, json.dumps(self.provenance))
        self.context.barrier()
        self._arrays = {name: np.load(self.folder / f"{name}.npy", mmap_mode="r+") for name in self._shapes}
        missing = np.flatnonzero(self._arrays["done"] == 0)
        self._mine = missing[self.context.rank :: self.context.world_size].tolist()
        self.context.barrier()  # everybody has read "done" before anybody changes it
        self.start_progress(len(self._mine), "sample")
        return self

    def missing_batches(self, batch_size: int) -> Iterator[list[int]]:
        """The sample indices that this rank has to draw, ``batch_size`` at a time; none when the file is complete."""
        for start in range(0, len(self._mine), batch_size):
            yield self._mine[start : start + batch_size]

    def write(self, indices: list[int], latents: torch.Tensor, images: torch.Tensor, y: torch.Tensor) -> None:
        """Store the samples ``indices``: latents (B, C, h, w), images (B, 1 or 3, H, W) in [-1, 1], labels (B,)."""
        self.submit(self._write, indices, latents, images, y)

    def _write(self, indices: list[int], latents: torch.Tensor, images: torch.Tensor, y: torch.Tensor) -> None:
        self._arrays["arr_0"][indices] = to_rgb(to_uint8(images))
        self._arrays["arr_1"][indices] = y.cpu().numpy()
        if "latents" in self._arrays:
            self._arrays["latents"][indices] = latents.float().cpu().numpy()
        self._arrays["done"][indices] = 1  # only now: a batch counts when it is there
        self.progress.update(len(indices))

    def close(self) -> None:
        """Stream the finished arrays into an uncompressed .npz, draw the grid, clean up."""
        if not self._arrays["done"].all():
            raise UserError(f"--out {self.path}: some samples are missing in {self.folder}; run the same command again")
        np.save(self.folder / "provenance.npy", np.array(json.dumps(self.provenance)))
        with atomic_write(self.path) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
            for file in sorted(self.folder.glob("*.npy")):
                if file.stem != "done":
                    archive.write(file, file.name)
        first = torch.from_numpy(self._arrays["arr_0"][:100].copy())
        save_grid(self.path.with_suffix(".png"), first.permute(0, 3, 1, 2), columns=10)
        release(self.folder)
        shutil.rmtree(self.folder)


def read_provenance(path: str | Path) -> dict:
    """The provenance that a sample file carries, {} where it has none."""
    with np.load(path, allow_pickle=False) as file:
        return with_current_keys(json.loads(str(file["provenance"]))) if "provenance" in file.files else {}


def to_rgb(images: torch.Tensor) -> np.ndarray:
    """images: (B, 1 or 3, H, W) uint8 -> (B, H, W, 3) uint8, grey repeated."""
    return images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()


def save_grid(path: str | Path, images: torch.Tensor, columns: int | None = None) -> None:
    """Write images (B, 1 or 3, H, W) uint8 as one PNG; small ones are enlarged by whole factors."""
    grid = make_grid(images.cpu().float(), nrow=columns or round(len(images) ** 0.5), padding=1, pad_value=128)
    picture = Image.fromarray(grid.permute(1, 2, 0).numpy().astype(np.uint8))
    factor = max(1, 48 // images.shape[-1])
    enlarged = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    with atomic_write(path) as partial:
        enlarged.save(partial, format="PNG")
