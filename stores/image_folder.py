"""Folders of images, with a sub-folder for each class or with none: their content, checked before the work begins.

Images are known by their suffix (``pictures.SUFFIXES``, in any case). Names that begin with a dot, and the folders
``HIDDEN``, are neither images nor classes. Every header is read when a folder is opened, and a file
that does not end as a whole one does is decoded, so that unusable files are named at the start, all at once. Where some
may be left out (``--skip-bad``), every image is decoded once: then the list of images is settled, and their order.

A folder is known by the hash of its listing: paths inside the folder and sizes in bytes, not by where it lies.
"""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from runtime.cli import OptionGroup, UserError, existing_folder, not_negative, shortened
from runtime.distributed import DistributedContext
from stores.pictures import LIMIT, SUFFIXES, BadImageError, Header, center_crop, croppable, look, read

HIDDEN = ("__MACOSX", "@eaDir")  # folders of macOS and network drives, with small copies of the images
AT_ONCE = 256  # files that a thread looks at


class Survey(NamedTuple):
    """The content of a folder."""

    names: list[str]  # paths of the images inside the folder
    labels: list[int]
    classes: list[str]
    listing: str  # hash of names and sizes in bytes
    shapes: set[tuple[int, int]]  # widths and heights
    notes: list[str]  # remarks on the other files


class ImageFolder:
    """A folder with one sub-folder of images per class, read as ADM does: centre crop, resized to ``size``.

    ``unconditional`` takes every image below the folder, with or without sub-folders, and no classes. ``channels`` 1 is
    for folders of grey images. ``size`` None leaves the images as they are. (images.py defines a source.)
    """

    vae, vae_hash = None, None

    def __init__(
        self,
        folder: str | Path,
        size: int | None,
        unconditional: bool = False,
        option: str = "--data-path",
        *,
        channels: int = 3,
        skip_bad: int | None = None,
        context: DistributedContext | None = None,
    ):
        """The main rank looks for all. ``skip_bad``: go on without up to that number of bad images; None where the
        command has no such option. ``UserError`` names the bad ones.
        """
        self.option, self.size, self.channels, self.skip_bad = option, size or 0, channels, skip_bad
        self.root = root = existing_folder(option, folder)
        where, context = f"{option} {root}", context or DistributedContext()
        survey = context.on_main(lambda: _survey(root, size, unconditional, where, channels == 1, skip_bad))
        self.paths = [f"{root}/{name}" for name in survey.names]
        self.labels, self.classes = torch.tensor(survey.labels), survey.classes
        self.shapes, self.notes = survey.shapes, survey.notes
        self.count, self.num_classes = len(self.paths), len(self.classes)
        self.fingerprint: dict[str, Any] = {"data": str(folder), "listing": survey.listing, "images": self.count}
        self.fingerprint["image_size"] = size
        if self.classes:
            self.fingerprint["class_names"] = self.classes

    def read(self, rows: np.ndarray, flips: np.ndarray) -> dict[str, torch.Tensor]:
        """``images.py`` says it. ``UserError`` names a file that cannot be read after all."""
        images = torch.stack([torch.from_numpy(self.image(row)).permute(2, 0, 1) for row in rows])
        return {"images": mirrored(images, flips), "y": self.labels[rows]}

    def image(self, row: int) -> np.ndarray:
        """One image, (size, size, channels) uint8."""
        path = self.paths[row]
        try:
            picture = read(path, self.channels)
        except BadImageError as error:
            hint = "" if self.skip_bad is None else "; with --skip-bad N such files are found at the start"
            raise UserError(f"{self.option}: {path} is not a readable image ({error}){hint}") from None
        except OSError as error:
            raise UserError(f"{self.option}: {path} cannot be read ({error.strerror})") from None
        pixels = np.array(center_crop(picture, self.size) if self.size else picture)
        return pixels.reshape(*pixels.shape[:2], self.channels)


def mirrored(images: torch.Tensor, flips: np.ndarray) -> torch.Tensor:
    """images (B, C, H, W) with those where ``flips`` (B,) is True turned left to right."""
    return torch.where(torch.from_numpy(flips)[:, None, None, None], images.flip(-1), images)


def add_skip_bad_option(group: OptionGroup) -> None:
    """``--skip-bad``, the same wherever a folder is read."""
    group.add_argument(
        "--skip-bad",
        type=not_negative,
        default=0,
        metavar="N",
        help="Go on without N bad images at most; above 0, all are decoded once at the start, which takes longer.",
    )


def _survey(root: Path, size: int | None, unconditional: bool, where: str, grey: bool, skip_bad: int | None) -> Survey:
    """The content of the folder, called ``where``; ``UserError`` where it cannot be used."""
    classes = [] if unconditional else _classes(root, where)
    of_each = [sorted(_files(root, root))] if unconditional else [_in_order(root / name, root) for name in classes]
    labelled = [(name, label) for label, files in enumerate(of_each) for name in files if _is_image(name)]
    others = [name for files in of_each for name in files if not _is_image(name)]
    if not unconditional:
        others += sorted(path.name for path in root.iterdir() if not _hidden(path.name) and not path.is_dir())
    if not labelled:
        raise UserError(f"{where}: holds no images ({', '.join(SUFFIXES)})")

    bad, good = [], []
    looks = _look_at(root, [name for name, _ in labelled], bool(skip_bad))
    for (name, label), (bytes_, header) in zip(labelled, looks):
        if isinstance(header, Header) and size is not None and not croppable(header, size):
            header = f"{header.width}x{header.height} pixels, too long to crop {size} of; {LIMIT}"
        if isinstance(header, str):
            bad.append(f"{name} ({header})")
        else:
            good.append((name, label, bytes_, header))
    if len(bad) > (skip_bad or 0):
        hint = "" if skip_bad is None else f", or give --skip-bad {len(bad)} to go on without them"
        count = f"{len(bad)} of {len(labelled)} images"
        raise UserError(f"{where}: {count} cannot be read: {shortened(bad, 3)}; mend or remove them{hint}")
    if not good:
        raise UserError(f"{where}: none of its {len(bad)} images can be read")
    names, labels, sizes, headers = zip(*good)
    empty = [classes[label] for label in sorted(set(range(len(classes))) - set(labels))]
    if empty:
        count = f"{len(empty)} of {len(classes)} class folders"
        raise UserError(f"{where}: {count} hold no images: {shortened(empty, 3)}; remove them")
    coloured = [name for name, header in zip(names, headers) if not header.grey]
    if grey and coloured:
        count = f"{len(coloured)} of {len(good)} images"
        raise UserError(f"{where}: {count} have colours, which one channel does not hold: {shortened(coloured, 3)}")
    digest = hashlib.sha256(b"\0".join(os.fsencode(f"{name}\0{bytes_}") for name, bytes_ in zip(names, sizes)))
    notes = []
    if bad:
        notes.append(f"{len(bad)} bad images are left out: {shortened(bad, 3)}")
    if others:
        notes.append(f"{len(others)} files are no images of a class: {shortened(others, 3)}")
    if animated := sum(header.animated for header in headers):
        notes.append(f"{animated} images are animated or have pages: the first one counts")
    shapes = {header[:2] for header in headers}
    return Survey(list(names), list(labels), classes, digest.hexdigest()[:16], shapes, notes)


def _classes(root: Path, where: str) -> list[str]:
    """The names of the sub-folders, in order. ``UserError`` where there are none."""
    classes = sorted(path.name for path in root.iterdir() if path.is_dir() and not _hidden(path.name))
    if not classes:
        raise UserError(f"{where}: give a folder with one sub-folder of images for each class, or --unconditional")
    return classes


def _in_order(folder: Path, root: Path) -> list[str]:
    """The files of a class in torchvision's order: folder by folder, by name in each."""
    return sorted(_files(folder, root), key=lambda name: name.rpartition("/")[::2])


def _files(folder: Path, root: Path) -> Iterator[str]:
    """The files below a folder that are not hidden, by their paths inside ``root``; each linked file once."""
    met = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        folders[:] = [] if real in met else [name for name in folders if not _hidden(name)]
        if real not in met:
            inside = Path(parent).relative_to(root).as_posix()
            yield from (name if inside == "." else f"{inside}/{name}" for name in files if not _hidden(name))
        met.add(real)


def _hidden(name: str) -> bool:
    return name.startswith(".") or name in HIDDEN


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def _look_at(root: Path, names: list[str], decode: bool) -> Iterator[tuple[int, Header | str]]:
    """Of each image its size in bytes, and its header or its error; in threads."""

    def some(start: int) -> list[tuple[int, Header | str]]:
        return [_look(root / name, decode) for name in names[start : start + AT_ONCE]]

    bar = tqdm(total=len(names), unit="image", desc="decoding" if decode else "headers", disable=None)
    with bar, ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as threads:
        for part in threads.map(some, range(0, len(names), AT_ONCE)):
            bar.update(len(part))
            yield from part


def _look(path: Path, decode: bool) -> tuple[int, Header | str]:
    try:
        if not path.is_file():
            return 0, "no regular file"  # a link to nowhere, a pipe
        return path.stat().st_size, look(path, decode)
    except BadImageError as error:
        return 0, str(error)
    except OSError as error:  # not the image's fault: no image is left out for a disk that fails
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
