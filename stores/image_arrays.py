"""Images to evaluate: files in ADM's format, an .npz with arr_0 (N, H, W, 3) uint8, and folders; read piece by piece.

Both ``Images`` and ``FolderImages`` have
    what, path              their option and path, for messages
    count, height, width    shape is (count, height, width, 3)
    digest()                a hash, the ``hashed`` of what they are
    features_path(name)     where features of that name may be kept; None: nowhere
    batches(rows, size)     (index of the first image, images (B, H, W, 3) uint8), B of at most ``size``
    member(name)            another array of the file, None where the file lacks it
"""

import io
import math
import os
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from runtime.cli import FULL_DISK, UserError, existing_file, shortened
from runtime.distributed import DistributedContext
from runtime.files import atomic_write, file_sha256
from stores.image_folder import ImageFolder

# Exceptions of reading a damaged .npz: RuntimeError where a bit says that it is encrypted (NotImplementedError is one:
# another compression), OSError where a position is impossible, TokenError from numpy's second try at a header.
DAMAGED_NPZ = (zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError, OSError, tokenize.TokenError)
MOST_OF_A_MEMBER = 1 << 28  # bytes of an array that is read whole: statistics of 2048 features take 34 MB


def write_whole(option: str, path: str | Path, write: Callable) -> None:
    """Let ``write(binary file)`` fill the file at ``path``, which appears only when complete; makes its folder.

    Raises ``UserError``, naming the option, if the file cannot be written; ``OSError`` if the disk is full.
    """
    try:
        with atomic_write(path) as partial, partial.open("wb") as file:
            write(file)
    except OSError as error:
        if error.errno in FULL_DISK:
            raise
        raise UserError(f"{option} {path}: {error.strerror}, give a file that can be written") from None


class Images:
    """The images of an .npz file, never all in memory: 50,000 of 256 x 256 pixels are 9.8 GB.

    ``count``, ``height`` and ``width`` are from the header. Raises ``UserError``, naming ``option``, unless the file is
    a complete .npz with arr_0 (N, H, W, 3) uint8.
    """

    hashed = "sha256"

    def __init__(self, option: str, path: str | Path):
        self.path = existing_file(option, path)
        self.what = f"{option} {path}"
        self.damaged = UserError(f"{self.what}: not a complete .npz file, it is truncated or something else")
        try:
            with zipfile.ZipFile(self.path) as archive:
                with archive.open("arr_0.npy") as member:
                    shape, fortran, dtype = npy_header(member)
                    length = archive.getinfo("arr_0.npy").file_size - member.tell()
                # A rank that reads its share only never meets the checksum.
                if archive.testzip() is not None or has_lost_members(archive):
                    raise zipfile.BadZipFile
        except KeyError:
            raise UserError(f"{self.what}: has no arr_0, where ADM's format keeps the images") from None
        except DAMAGED_NPZ:
            raise self.damaged from None
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or min(shape) < 1 or fortran:
            found = f"{dtype} {shape}" + (" in Fortran order" if fortran else "")
            raise UserError(f"{self.what}: arr_0 is {found}, it must be uint8 (N, H, W, 3) with at least one image")
        self.shape = shape
        self.count, self.height, self.width, _ = shape
        if self.count * self.height * self.width * 3 != length:
            raise self.damaged

    def digest(self) -> str:
        """SHA-256 of the file."""
        return file_sha256(self.path)

    def features_path(self, name: str) -> Path | None:
        """Beside the file."""
        return self.path.with_name(f"{self.path.stem}.{name}.features.npz")

    def batches(self, rows: range, size: int) -> Iterator[tuple[int, np.ndarray]]:
        """See above."""
        shape = (self.height, self.width, 3)
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as opened:
                member: Any = opened
                npy_header(member)
                member.seek(member.tell() + rows.start * int(np.prod(shape)))
                for start in range(rows.start, rows.stop, size):
                    batch = np.empty((min(size, rows.stop - start), *shape), dtype=np.uint8)
                    if member.readinto(batch.reshape(-1)) != batch.nbytes:
                        raise EOFError
                    yield start, batch
        except DAMAGED_NPZ:
            raise self.damaged from None

    def member(self, name: str) -> np.ndarray | None:
        """See above. ``UserError`` where it is damaged, too large, or not plain data."""
        try:
            return npz_member(self.path, name)
        except DAMAGED_NPZ:
            raise UserError(f"{self.what}: its member {name} is damaged, or a pickle, which is never loaded") from None


class FolderImages:
    """The images of a folder, sub-folders or not, in the order of their paths; ``image_size``: of ADM's crop.

    ``UserError`` where they have several sizes and are not cropped. Their features are not kept: the hash of the
    listing does not see an image that changes and keeps its size in bytes.
    """

    hashed = "listing"

    def __init__(
        self,
        option: str,
        path: str | Path,
        image_size: int | None = None,
        context: DistributedContext | None = None,
        skip_bad: int | None = None,
    ):
        self.what, self.path = f"{option} {path}", Path(path)
        self.source = ImageFolder(path, image_size, True, option, skip_bad=skip_bad, context=context)
        sizes = {(image_size, image_size)} if image_size else self.source.shapes
        if len(sizes) > 1:
            wanted = "give --image-size to crop them" if option == "REFERENCE" else "they must have one"
            some = shortened([f"{width}x{height}" for width, height in sorted(sizes)], 3)
            raise UserError(f"{self.what}: images of {len(sizes)} sizes ({some}), {wanted}")
        self.count, (self.width, self.height) = self.source.count, sizes.pop()
        self.shape = (self.count, self.height, self.width, 3)

    def digest(self) -> str:
        """The hash of the listing: names and sizes in bytes."""
        return self.source.fingerprint["listing"]

    def features_path(self, name: str) -> Path | None:
        """Nowhere."""
        return None

    def batches(self, rows: range, size: int) -> Iterator[tuple[int, np.ndarray]]:
        """See above; decoded in threads."""
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as threads:
            for start in range(rows.start, rows.stop, size):
                batch = list(threads.map(self.source.image, range(start, min(start + size, rows.stop))))
                if any(image.shape != self.shape[1:] for image in batch):
                    raise UserError(f"{self.what}: its images have several sizes, they must have one")
                yield start, np.stack(batch)

    def member(self, name: str) -> np.ndarray | None:
        """A folder has none."""
        return None


AnyImages = Images | FolderImages


def open_images(
    option: str, path: str | Path, image_size: int | None = None, context: DistributedContext | None = None
) -> AnyImages:
    """A file or a folder; ``image_size`` is for folders, that of a file must be the same."""
    if Path(path).is_dir():
        return FolderImages(option, path, image_size, context)
    images = Images(option, path)
    if image_size not in (None, images.width) or image_size not in (None, images.height):
        raise UserError(f"--image-size {image_size}: {images.what} has {images.width}x{images.height} images already")
    return images


#################################################################################
#           Damaged .npz files: no pickle, no more memory than they hold        #
#################################################################################


def has_lost_members(archive: zipfile.ZipFile) -> bool:
    """Whether the directory at the end of an archive has not as many entries as it says: zipfile passes that over.

    One damaged length there hides the entries after it.
    """
    assert archive.fp is not None
    archive.fp.seek(-22 - len(archive.comment), os.SEEK_END)  # the end record: bytes 10 and 11 count the entries
    return int.from_bytes(archive.fp.read(12)[10:], "little") != min(len(archive.infolist()), 0xFFFF)


def npz_member(path: Path, name: str, most: int = MOST_OF_A_MEMBER) -> np.ndarray | None:
    """An array of an .npz, None where it has no such. A damaged file raises one of ``DAMAGED_NPZ``.

    Never a pickle, and never more memory than ``most`` bytes, whatever the headers claim.
    """
    with zipfile.ZipFile(path) as archive:
        if f"{name}.npy" not in archive.namelist():
            return None
        with archive.open(f"{name}.npy") as member:
            content = io.BytesIO(member.read(most + 1))
    shape, _, dtype = npy_header(content)
    claimed = math.prod(shape) * dtype.itemsize
    if content.getbuffer().nbytes > most or claimed != content.getbuffer().nbytes - content.tell():
        raise ValueError(f"{name} claims {claimed} bytes")
    content.seek(0)
    return np.lib.format.read_array(content, allow_pickle=False)


def npy_header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether in Fortran order, and dtype, from the start of an .npy."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)
