"""What is wrong with a file of torch.save or safetensors that cannot be read, in words."""

import zipfile
from pathlib import Path


def why_not(path: Path, error: Exception) -> str:
    """Why a file cannot be read. torch's own words are codes, and advice to load what may run code."""
    with path.open("rb") as file:
        begin = file.read(2)
    if not begin:
        return "it is empty"
    if path.suffix == ".safetensors":
        return f"damaged, or another format than its name says: {error}".splitlines()[0]
    if isinstance(error, (ValueError, zipfile.BadZipFile, EOFError)):
        return (str(error) or "it is truncated").splitlines()[0]
    if begin == b"PK":
        return "it holds Python objects, which are never loaded" if zipfile.is_zipfile(path) else "it is truncated"
    if begin[:1] == b"\x80":  # torch's format before 1.6, or a plain pickle
        return "it is truncated, or holds Python objects, which are never loaded"
    return "it is no file of torch.save or safetensors"


def damaged_member(path: Path) -> str | None:
    """The first part of a torch file whose content differs from the checksum beside it, which torch does not look at.

    None where all is well, and for files in torch's format before 1.6, which have no checksums. ``ValueError`` for a
    packed part: nobody knows how large it is.
    """
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        for part in archive.infolist():
            if part.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"its part {part.filename} is packed, which PyTorch does not do")
        return archive.testzip()
