"""Reading .npz files that may be damaged or lie: no pickle, no more memory than they hold, nothing passed over."""

import io
import math
import os
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

# Exceptions of reading a damaged .npz: RuntimeError where a bit says that it is encrypted (NotImplementedError is one:
# another compression), OSError where a position is impossible, TokenError from numpy's second try at a header.
DAMAGED_NPZ = (zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError, OSError, tokenize.TokenError)
MOST_OF_A_MEMBER = 1 << 28  # bytes of an array that is read whole: statistics of 2048 features take 34 MB


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
