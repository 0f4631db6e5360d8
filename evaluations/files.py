"""Files of images in ADM's format: an .npz with arr_0 (N, H, W, 3) uint8, read piece by piece."""

import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from runtime.cli import UserError, existing_file
from runtime.files import DAMAGED_NPZ, atomic_write


def write_whole(option: str, path: str | Path, write: Callable) -> None:
    """Let ``write(binary file)`` fill the file at ``path``, which appears only when complete; makes its folder.

    Raises ``UserError``, naming the option, if the file cannot be written.
    """
    try:
        with atomic_write(path) as partial, partial.open("wb") as file:
            write(file)
    except OSError as error:
        raise UserError(f"{option} {path}: {error.strerror}, give a file that can be written") from None


class Images:
    """The images of an .npz file, never all in memory: 50,000 of 256 x 256 pixels are 9.8 GB.

    ``count``, ``height`` and ``width`` are from the header. Raises ``UserError``, naming ``option``, unless the file is
    a complete .npz with arr_0 (N, H, W, 3) uint8.
    """

    def __init__(self, option: str, path: str | Path):
        self.path = existing_file(option, path)
        self.what = f"{option} {path}"
        self.damaged = UserError(f"{self.what}: not a complete .npz file, it is truncated or something else")
        try:
            with zipfile.ZipFile(self.path) as archive:
                with archive.open("arr_0.npy") as member:
                    shape, fortran, dtype = self._read_header(member)
                if archive.testzip() is not None:  # a rank that reads its share only never meets the checksum
                    raise zipfile.BadZipFile
        except KeyError:
            raise UserError(f"{self.what}: has no arr_0, where ADM's format keeps the images") from None
        except DAMAGED_NPZ:
            raise self.damaged from None
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape or fortran:
            found = f"{dtype} {shape}" + (" in Fortran order" if fortran else "")
            raise UserError(f"{self.what}: arr_0 is {found}, it must be uint8 (N, H, W, 3) with at least one image")
        self.count, self.height, self.width, _ = shape

    @staticmethod
    def _read_header(member: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
        version = np.lib.format.read_magic(member)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        return read(member)

    def batches(self, rows: range, size: int) -> Iterator[tuple[int, np.ndarray]]:
        """(index of the first image, images (B, H, W, 3) uint8) for the images of ``rows``, B of at most ``size``."""
        shape = (self.height, self.width, 3)
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as opened:
                member: Any = opened
                self._read_header(member)
                member.seek(member.tell() + rows.start * int(np.prod(shape)))
                for start in range(rows.start, rows.stop, size):
                    batch = np.empty((min(size, rows.stop - start), *shape), dtype=np.uint8)
                    if member.readinto(batch.reshape(-1)) != batch.nbytes:
                        raise EOFError
                    yield start, batch
        except DAMAGED_NPZ:
            raise self.damaged from None

    def member(self, name: str) -> np.ndarray | None:
        """Another array of the file, or None if it has no such member. Raises ``UserError`` if it is not plain data."""
        try:
            with np.load(self.path, allow_pickle=False) as file:
                return file[name] if name in file.files else None
        except DAMAGED_NPZ:
            raise UserError(f"{self.what}: its member {name} is damaged, or a pickle, which is never loaded") from None
