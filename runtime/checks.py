"""Checks before a command starts: places that can be written, room on the disk, memory. A sentence each.

Only a run that cannot work is refused. Bytes are counted from shapes, by the owners of the formats.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from runtime import launcher
from runtime.cli import UserError
from runtime.paths import broken_link


def in_words(count: float) -> str:
    """Bytes to read."""
    units = ["bytes", "kB", "MB", "GB", "TB", "PB"]
    while count >= 1000 and len(units) > 1:
        count, units = count / 1000, units[1:]
    return f"{count:.3g} {units[0]}"


def writable_folder(option: str, path: str | Path) -> Path:
    """The path of a folder to write to, which need not exist. ``UserError`` where it cannot be made or written."""
    path = Path(path)
    if link := broken_link(path):
        raise UserError(f"{option} {path}: {link}, give another place")
    if path.exists() and not path.is_dir():
        raise UserError(f"{option} {path}: is a file, give a folder")
    above = nearest(path)
    if not above.is_dir():
        raise UserError(f"{option} {path}: {above} is a file, give a place in a folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"{option} {path}: this user may not write to {above.absolute()}, give another place")
    if not shutil.disk_usage(above).total:  # /proc and its like, where even root writes nothing
        raise UserError(f"{option} {path}: {above.absolute()} is on no disk, give another place")
    return path


def writable_file(option: str, path: str | Path) -> Path:
    """The path of a file to write. ``UserError`` where it cannot be."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{option} {path}: is a folder, give the name of a file")
    writable_folder(option, path.parent)
    target = Path(os.path.realpath(path))  # a link to a file stays one: what is written is its target
    if target.is_symlink() or not target.parent.is_dir() and path.is_symlink():
        raise UserError(f"{option} {path}: {broken_link(path)}, give another name")
    writable_folder(option, target.parent)
    return path


def nearest(path: Path) -> Path:
    """The path itself or the first above it that exists."""
    return next((place for place in (path, *path.parents) if place.exists()), Path())


def require_disk(what: str, path: str | Path, needed: int) -> None:
    """``UserError`` where the disk of a place has less room than the files to be written."""
    free = shutil.disk_usage(nearest(Path(path))).free
    if needed > free:
        raise UserError(
            f"{what}: {in_words(needed)} are to be written to {path}, where the disk has {in_words(free)} free; "
            "ask for less or give a place on another disk"
        )


def size_of(path: Path) -> int:
    """Bytes of all files in a folder, 0 where there is none."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def machine_memory() -> int:
    """Bytes of memory that the processes of this machine, or of this container, may use; swap counts."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
        total += sum(int(words[1]) * 1024 for words in lines if words[0] == "SwapTotal:")
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        return min(total, int(limit)) if limit.isdecimal() else total
    except (OSError, ValueError, IndexError):  # not Linux, or no container
        return total


def require_memory(what: str, needed: int, device: torch.device, advice: Callable[[int], str] = lambda _: "") -> int:
    """``UserError`` where a rank needs more memory than the device, or its share of the machine, has at all.

    Returns what it has. ``advice`` says what would do with so much, and ends the sentence.
    """
    if device.type == "cuda":
        total, whose = torch.cuda.get_device_properties(device).total_memory, "the GPU"
    else:
        ranks = launcher.speaker().local_world_size or 1
        total, whose = machine_memory() // ranks, "this machine" + (f" for each of {ranks} ranks" if ranks > 1 else "")
    if needed > total:
        has = f"{whose} has {in_words(total)}{advice(total)}"
        raise UserError(f"{what}: at least {in_words(needed)} of memory are needed, {has}")
    return total
