"""What a path stands for where nothing is: a link to what is gone, a circle of links, a misspelt name, or a hub id."""

import errno
import os
import re
from pathlib import Path

# Of files with weights or images: no repository's name ends so.
FILE_SUFFIXES = (".pt", ".pth", ".ckpt", ".safetensors", ".bin", ".pkl", ".onnx", ".gguf", ".h5", ".npz", ".json")


def is_hub_id(text: str) -> bool:
    """Whether a text may be a Hugging Face repository, OWNER/NAME, and is not rather a path that is misspelt."""
    word = r"[A-Za-z0-9](?!\S*(?:--|\.\.))(?:[\w.-]*\w)?"
    is_id = re.fullmatch(f"{word}/{word}", text, re.ASCII) is not None
    return is_id and not text.lower().endswith(FILE_SUFFIXES) and not os.path.lexists(text.partition("/")[0])


def missing(path: str | Path, kind: str) -> str:
    """What to say of a path without the ``kind`` of thing, "file" or "folder", that it should have."""
    return broken_link(path) or f"no such {kind}"


def broken_link(path: str | Path) -> str:
    """Which link of a path leads nowhere, in words; "" where none does."""
    path = Path(path)
    for place in (*reversed(path.parents), path):
        if place.is_symlink():
            try:
                place.stat()
            except OSError as error:
                if error.errno == errno.ELOOP:
                    return f"{place} is a link that leads back to itself"
                return f"{place} is a link to {place.readlink()}, which is not there"
    return ""
