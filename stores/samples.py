"""The one owner of sample files: ADM's .npz, filled by many ranks, resumable; PNG grids.

``arr_0`` (N, H, W, 3) uint8 images, ``arr_1`` (N,) int64 labels, ``provenance`` JSON text; on request ``latents``
(N, C, h, w) float32, the samples before decoding and rounding. While it is being filled:

    samples.partial/provenance.json              the provenance of the .npz
    samples.partial/00000064-00000128.npz        the samples 64 .. 127, written by one rank, whole or not at all
"""

import json
import shutil
import textwrap
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from runtime.checks import writable_file
from runtime.cli import UserError
from runtime.distributed import DistributedContext
from runtime.files import (
    SharedWriter,
    atomic_write,
    claim,
    json_object,
    noted,
    release,
    require_replaceable,
    write_text,
)
from runtime.provenance import require_same
from stores.image_arrays import DAMAGED_NPZ, Images, npy_header, npz_member
from stores.images import to_uint8

INDEX_BYTES = 40  # that a rank needs for each sample, to know which are missing
GRID = PngInfo()  # what a picture of ours says of itself
GRID.add_text("Software", "ARD")


def is_grid(path: Path) -> bool:
    """Whether a picture is a grid of samples that ``save_grid`` has drawn."""
    with Image.open(path) as picture:
        return picture.info.get("Software") == "ARD"


def row_bytes(size: int, latent_shape: tuple[int, ...] = ()) -> int:
    """Bytes of a sample of ``size`` pixels: image, label and, where latents of a shape are kept, the latent."""
    latent = torch.Size(latent_shape).numel() * torch.float32.itemsize if latent_shape else 0
    return 3 * size * size + torch.int64.itemsize + latent


def writable_npz(option: str, path: str | Path) -> Path:
    """The path of an .npz to write. ``UserError`` where it cannot be, or has another name."""
    if Path(path).suffix != ".npz":
        raise UserError(f"{option} {path}: the file's name must end in .npz")
    return writable_file(option, path)


class SampleWriter(SharedWriter):
    """Fills ``path`` with exactly ``count`` samples, by any number of ranks, and writes a PNG grid of the first 100.

    with SampleWriter(path, count, provenance, context) as writer:
        for indices in writer.missing_batches(64):      # this rank's part of the missing ones
            writer.write(indices, latents, images, y)   # in a thread, while the next batch is drawn

    Leaving the block without an error packs the .npz. ``complete`` says that it existed from the start, with the same
    provenance; another one is refused. A run that broke off is continued; no sample is drawn twice. Ranks on several
    nodes share nothing but the folder of the file.
    """

    def __init__(
        self, path: str | Path, count: int, provenance: dict, context: DistributedContext, keep_latents: bool = False
    ):
        """``UserError`` where ``path`` or the unfinished samples beside it are those of another run."""
        super().__init__(context)
        self.path, self.count, self.keep_latents = writable_npz("--out", path), count, keep_latents
        self.folder = self.path.with_suffix(".partial")
        self.provenance = provenance | {"count": count}
        if "solver_indices" in provenance and "count" in provenance:  # a student's: of the trajectories it learned
            self.provenance.setdefault("trajectories", provenance["count"])
        self.complete = self.path.exists()
        self._note = self.folder / "provenance.json"
        if self.complete:
            require_same(f"--out {path}: it holds other samples", read_provenance(path), self.provenance)
        else:
            if (found := noted(self._note)) is not None:
                unfinished = f"--out {path}: {self.folder} holds the unfinished samples of another run"
                require_same(unfinished, found, self.provenance)
            elif self._parts():
                raise UserError(f"--out {path}: {self.folder} does not say whose samples it holds; remove it")
            require_replaceable("--out", self.path.with_suffix(".png"), "a grid of samples", is_grid)
        self._missing: list[int] = []

    def __enter__(self) -> "SampleWriter":
        if self.complete:
            if self.context.is_main and self.folder.exists():  # of a run that ended just before
                self._draw_grid()
                shutil.rmtree(self.folder)
            return self
        self.context.barrier()  # everybody has looked before the main rank begins
        done = self.context.on_main(self._begin)
        self._missing = [index for index in range(self.count) if index not in done]
        own = self.context.share(len(self._missing))
        self.start_progress(len(own), "sample")
        return self

    def _begin(self) -> set[int]:
        """Claim the folder; the indices of the samples that it holds."""
        claim(self.folder, "--out")
        if noted(self._note) is None:
            write_text(self._note, json.dumps(self.provenance))
        return {i for part in self._parts() for i in range_of(part)}

    def _parts(self) -> list[Path]:
        """The finished parts, in the order of their samples."""
        return sorted(self.folder.glob("*-*.npz"))

    def missing_batches(self, batch_size: int) -> Iterator[list[int]]:
        """The samples that this rank has to draw, ``batch_size`` consecutive ones at most at a time."""
        batch: list[int] = []
        for position in self.context.share(len(self._missing)):
            index = self._missing[position]
            if batch and (len(batch) == batch_size or index != batch[-1] + 1):
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch

    def write(self, indices: list[int], latents: torch.Tensor, images: torch.Tensor, y: torch.Tensor) -> None:
        """Store consecutive samples: latents (B, C, h, w), images (B, 1 or 3, H, W) in [-1, 1], labels (B,)."""
        self.submit(self._write, indices, latents, images, y)

    def _write(self, indices: list[int], latents: torch.Tensor, images: torch.Tensor, y: torch.Tensor) -> None:
        part = {"arr_0": to_rgb(to_uint8(images)), "arr_1": y.cpu().numpy()}
        if self.keep_latents:
            part["latents"] = latents.float().cpu().numpy()
        name = f"{indices[0]:08d}-{indices[-1] + 1:08d}.npz"
        with atomic_write(self.folder / name) as partial, partial.open("wb") as file:
            np.savez(file, **part)  # type: ignore[arg-type]
        self.progress(len(indices))

    def close(self) -> None:
        """Stream the parts into an uncompressed .npz, draw the grid, clean up."""
        parts = self._parts()
        if sum(len(range_of(part)) for part in parts) != self.count:
            raise UserError(f"--out {self.path}: some samples are missing in {self.folder}; run the same command again")
        names = ("arr_0", "arr_1", "latents") if self.keep_latents else ("arr_0", "arr_1")
        first = {name: self._read(parts[0], name) for name in names}
        with atomic_write(self.path) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
            for name, array in first.items():
                about = {"descr": array.dtype.str, "fortran_order": False, "shape": (self.count, *array.shape[1:])}
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array_header_1_0(member, about)
                    for part in parts:
                        member.write(self._read(part, name).tobytes())
            with archive.open("provenance.npy", "w") as member:
                np.lib.format.write_array(member, np.array(json.dumps(self.provenance)))
        self._draw_grid()
        release(self.folder)
        shutil.rmtree(self.folder)

    def _draw_grid(self) -> None:
        """A PNG of the first 100 samples of the finished file."""
        with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as member:
            shape, _, _ = npy_header(member)
            shape = min(100, shape[0]), *shape[1:]
            images = np.frombuffer(member.read(int(np.prod(shape))), np.uint8).reshape(shape)
        grid = torch.from_numpy(images.copy()).permute(0, 3, 1, 2)
        save_grid(self.path.with_suffix(".png"), grid, columns=10)

    def _read(self, part: Path, name: str) -> np.ndarray:
        """An array of a part. ``UserError`` where the part is damaged; it is removed, to be drawn again."""
        try:
            with np.load(part, allow_pickle=False) as arrays:
                array = arrays[name]
                if len(array) == len(range_of(part)):
                    return array
        except (*DAMAGED_NPZ, KeyError, AttributeError):
            pass
        part.unlink()
        raise UserError(f"--out {self.path}: {part} was damaged and is removed; run the same command again")


def range_of(part: Path) -> range:
    """The samples that a part holds, by its name."""
    first, end = part.stem.split("-")
    return range(int(first), int(end))


def read_provenance(path: str | Path) -> dict:
    """The provenance that a sample file carries, {} where it has none."""
    try:
        text = npz_member(Path(path), "provenance")
        return {} if text is None else json_object(str(text))
    except (*DAMAGED_NPZ, KeyError, ValueError):
        raise UserError(f"{path}: not a complete .npz file, it is damaged or another one; give another name") from None


def write_pngs(path: Path, folder: str | Path | None) -> None:
    """Write every image of a sample file as FOLDER/INDEX.png, where it is not written yet; nothing without a folder."""
    if folder is None:
        return
    samples = Images("--out", path)
    Path(folder).mkdir(parents=True, exist_ok=True)
    for start, batch in samples.batches(range(samples.count), 64):
        for i, image in enumerate(batch, start):
            file = Path(folder) / f"{i:06d}.png"
            if not file.exists():
                with atomic_write(file) as partial:
                    Image.fromarray(image).save(partial, format="PNG")


def to_rgb(images: torch.Tensor) -> np.ndarray:
    """images: (B, 1 or 3, H, W) uint8 -> (B, H, W, 3) uint8, grey repeated."""
    return images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()


def draw_grid(
    images: torch.Tensor, columns: int, side: int = 48, gap: int | None = None, titles: Sequence[str] = ()
) -> Image.Image:
    """Images (B, 1 or 3, H, W) uint8 as one picture, row by row on white.

    Those narrower than ``side`` pixels are enlarged by a whole factor, to that or a little less. ``gap`` pixels lie
    between them, without it one of theirs. The first images' ``titles`` stand above them.
    """
    height, width = images.shape[2:]
    factor = max(1, side // width)
    height, width = factor * height, factor * width
    gap = factor if gap is None else gap
    size = max(13, width // 8)  # of the titles' font; a line of it is a quarter higher, a letter about 0.6 wide
    font, line, letters = ImageFont.load_default(size), size * 5 // 4, max(1, int(width / (0.6 * size)))
    words = [textwrap.wrap(title, letters, max_lines=3, placeholder="...") for title in titles]
    heads = [max(map(len, words[i : i + columns]), default=0) for i in range(0, len(images), columns)]
    tops = [gap]
    for head in heads:
        tops.append(tops[-1] + head * line + height + gap)
    picture = Image.new("RGB", (gap + columns * (width + gap), tops[-1]), "white")
    for i, image in enumerate(to_rgb(images)):  # torchvision has this, and needs seconds to be imported
        left, top = gap + i % columns * (width + gap), tops[i // columns + 1] - gap - height
        picture.paste(Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST), (left, top))
        if i < len(words):
            place, text = (left + width / 2, top - line / 4), "\n".join(words[i])
            ImageDraw.Draw(picture).multiline_text(
                place, text, "black", font, anchor="md", spacing=size / 6, align="center"
            )
    return picture


def save_grid(path: str | Path, images: torch.Tensor, columns: int | None = None, titles: Sequence[str] = ()) -> None:
    """Write ``draw_grid`` of images (B, 1 or 3, H, W) uint8 as a PNG, twice as large where there are ``titles``."""
    columns = min(columns or round(len(images) ** 0.5), len(images))
    with atomic_write(path) as partial:
        picture = draw_grid(images, columns, 96 if any(titles) else 48, titles=titles)
        picture.save(partial, format="PNG", pnginfo=GRID)
