"""Files: written whole or not at all, written beside computing, hashed, fetched once."""

import contextlib
import hashlib
import json
import os
import platform
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from runtime.checks import writable_file
from runtime.cli import FETCHING, AbsentError, UserError, existing_file
from runtime.distributed import FILE_TIMEOUT, DistributedContext
from runtime.errors import BusyError
from runtime.paths import broken_link
from runtime.stop_signals import Terminated

MOST_OF_JSON = 1 << 28  # bytes of a small file
LOCK = ".lock"  # in a folder that somebody is at work in
Item = TypeVar("Item")


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Have errors of the system that name no file, as those of a full disk while it is written, name this one."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """A path beside ``path`` to write to, which takes its name, on disk for good, when the block ends without error.

    Makes the folder. A reader, or a crash, never sees half of the file. Of a link its target is written.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    try:
        with naming(path):
            yield partial
            _to_disk(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    _to_disk(path.parent)


def _to_disk(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk itself and not only in the system's memory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


def file_sha256(path: str | Path) -> str:
    """Checksum of a file, 64 hex digits."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def require_different(option: str, path: str | Path, inputs: dict[str, str | Path | None]) -> None:
    """``UserError`` where ``path``, to be written, is one of the ``inputs`` (paths by options); links are followed."""
    for name, given in inputs.items():
        if given is not None and os.path.realpath(path) == os.path.realpath(given):
            raise UserError(f"{option} {path}: would be written over {name}, give another file")


def require_outside(option: str, path: str | Path, folder_option: str, folder: str | Path) -> None:
    """``UserError`` where ``path``, to be written, is or lies in a folder that is read as a whole."""
    if Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise UserError(f"{option} {path}: lies in {folder_option} {folder}, of which all is read; give another place")


def require_replaceable(option: str, path: str | Path, what: str, is_ours: Callable[[Path], object]) -> None:
    """``UserError`` where ``path`` cannot be, or exists and is not ``what`` we write: ``is_ours`` is false or fails."""
    path = Path(path)
    if not path.exists():
        writable_file(option, path)
        return
    with contextlib.suppress(Exception):  # a foreign file can fail to be read in any way
        if path.is_file() and is_ours(path):
            return
    raise UserError(f"{option} {path}: exists already and is not {what}; give another name")


def read_lines(option: str, path: str | Path) -> list[str]:
    """The lines of a text file in UTF-8; they end in LF, CR LF or CR, nowhere else. ``UserError`` for other bytes."""
    try:
        text = existing_file(option, path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{option} {path}: not a text file in UTF-8 ({error})") from None
    lines = re.split("\r\n|\r|\n", text)
    return lines if lines[-1] else lines[:-1]


def read_json(path: Path) -> Any:
    """The content of a small text file of JSON. ``ValueError`` for any other."""
    if path.stat().st_size > MOST_OF_JSON:
        raise ValueError(f"{path}: too large")
    return json.loads(path.read_text())


def json_object(text: str) -> dict:
    """The object that a text of JSON holds. ``ValueError`` for any other text."""
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError(f"holds a {type(found).__name__}, not an object")
    return found


def noted(path: Path) -> dict | None:
    """The object in a small file of JSON, None where there is none, or none that can be read."""
    try:
        return json_object(path.read_text())
    except (OSError, ValueError):
        return None


_claims: dict[Path, FileLock] = {}  # the locks that this process holds


def lock_of(place: Path) -> Path:
    """The path of the lock of a folder, in it, or of an existing file, beside it."""
    return (place.with_name(f"{place.name}{LOCK}") if place.is_file() else place / LOCK).absolute()


def claim(place: Path, option: str) -> None:
    """Hold a folder, made if need be, or a file for this process alone. ``UserError`` says who else holds it now.

    The lock (``lock_of``) ends with the process, however that ends, or with ``release``. Where a file system knows no
    locks, or lets nothing be written, nothing is held.
    """
    kind = "file" if place.is_file() else "folder"
    if kind == "folder":
        try:
            place.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            reason = broken_link(place) or "there is a file of that name, give a folder"
            raise UserError(f"{option} {place}: {reason}") from None
    path = lock_of(place)
    if path in _claims:
        return
    lock = FileLock(path, blocking=False)
    try:
        lock.acquire()
    except Timeout:
        holder = "another process"
        with contextlib.suppress(OSError):  # it may be leaving right now
            holder = path.read_text() or holder
        raise BusyError(f"{option} {place}: {holder} is at work there; wait for it, or give another {kind}") from None
    except (OSError, NotImplementedError):
        return
    _claims[path] = lock
    with contextlib.suppress(OSError):  # on a full disk it is held all the same
        path.write_text(f"process {os.getpid()} on {platform.node()}")


def release(place: Path) -> None:
    """Give up a folder or a file that this process has claimed."""
    path = lock_of(place)
    if path in _claims:
        path.unlink(missing_ok=True)
        _claims.pop(path).release()


@contextlib.contextmanager
def held(place: Path, option: str, context: DistributedContext) -> Iterator[None]:
    """The main rank claims a folder or a file until the block ends; every rank hears where that fails."""
    context.on_main(lambda: claim(place, option))
    try:
        yield
    finally:
        if context.is_main:
            release(place)


def cached_download(url: str, option: str, hash_prefix: str | None = None, name: str | None = None) -> Path:
    """The file behind a URL in torch.hub's cache (TORCH_HOME), fetched once per machine however many ranks ask.

    ``hash_prefix`` is how its SHA-256 must begin; ``name`` what it is called there, where the URL does not end so.
    ``UserError`` names the option and says where to put the file when it cannot be fetched.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / (name or url.rpartition("/")[2])
    if path.is_file():
        return path
    if not FETCHING.get():
        raise AbsentError(f"{option}: would be fetched from {url} to {path}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # The first rank downloads, the others wait here.
        with FileLock(f"{path}.lock", timeout=FILE_TIMEOUT.total_seconds()):
            if not path.is_file():
                torch.hub.download_url_to_file(url, str(path), hash_prefix=hash_prefix)  # renamed when it is whole
    except (OSError, RuntimeError) as error:  # no network (urllib's errors are OSErrors), or another hash
        raise UserError(f"{option}: cannot download it ({error}); fetch {url} to {path}") from None
    return path


DIFFUSERS_STEM = "diffusion_pytorch_model"  # the name of diffusers' weights, before .safetensors or .bin


def quiet_hub() -> None:
    """Keep the hub's client from telling of each attempt: our one sentence says what could not be fetched."""
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()


def cached_snapshot(repository: str, wanted: list[str], *kinds: list[str]) -> Path:
    """The folder of a Hugging Face repository in its cache (HF_HOME), with the files of these patterns.

    ``kinds`` are patterns of the weights: the first of them that is there is fetched. Raises an error of the hub's many
    kinds where files are neither in the cache nor to be had, and does so at once: diffusers and transformers
    themselves would try again for half a minute and more.
    """
    from huggingface_hub import snapshot_download

    quiet_hub()
    for kind in kinds:
        local = not FETCHING.get()
        folder = Path(snapshot_download(repository, allow_patterns=[*wanted, *kind], local_files_only=local))
        if any(True for pattern in kind for _ in folder.glob(pattern)):
            break
    return folder


def cached_model(repository: str, inner: str) -> Path:
    """The ``cached_snapshot`` with a model of diffusers' at its top or in the folder ``inner``."""
    places = ("", f"{inner}/")
    weights = ([f"{at}{DIFFUSERS_STEM}.{kind}" for at in places] for kind in ("safetensors", "bin"))
    return cached_snapshot(repository, [f"{at}config.json" for at in places], *weights)


def read_ahead(items: Iterable[Item]) -> Iterator[Item]:
    """The items in order, each made in a thread while the one before it is used."""
    end: Any = object()
    iterator = iter(items)
    with ThreadPoolExecutor(max_workers=1) as thread:
        following = thread.submit(next, iterator, end)
        while (item := following.result()) is not end:
            following = thread.submit(next, iterator, end)
            yield item


class WriteBehind:
    """Writes in a thread while the next item is computed, one after another; at most one write is under way.

    As a context manager it waits for the last write at the end. The error of a write is raised by the next ``submit``
    or at the end; nothing is written after an error of either side.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._writing: Future | None = None

    def submit(self, write: Callable[..., None], *args: Any) -> None:
        """Wait for the write under way, then start ``write(*args)``."""
        self.wait()
        self._writing = self._thread.submit(write, *args)

    @property
    def busy(self) -> bool:
        """Whether a write is under way."""
        return self._writing is not None and not self._writing.done()

    def wait(self) -> None:
        """Wait for the write under way; raises its error."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def __enter__(self) -> "WriteBehind":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            if error is None:
                self.wait()
        finally:
            self._thread.shutdown()


class SharedWriter(WriteBehind):
    """A place that many ranks fill together: every rank writes its part in a thread, the main rank closes the whole.

    A subclass sets ``complete`` where nothing is missing from the start. Leaving without an error waits for all ranks
    and has the main rank call ``close``.
    """

    complete = False

    def __init__(self, context: DistributedContext):
        super().__init__()
        self.context = context
        self.made = 0
        self._bar = tqdm(disable=True)

    def start_progress(self, total: int, unit: str) -> None:
        """Show the main rank's progress, where there is a terminal."""
        self._bar = tqdm(total=total, unit=unit, disable=None if self.context.is_main else True)

    def progress(self, count: int) -> None:
        """Count what this rank has made."""
        self.made += count
        self._bar.update(count)

    def losses(self) -> str:
        """What of the work is lost when it is broken off now, in words; "" where there is hardly any."""
        return ""

    def close(self) -> None:
        """Close the whole when all ranks have written."""
        raise NotImplementedError

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            super().__exit__(kind, error, trace)
        finally:
            self._bar.close()
        if isinstance(error, (KeyboardInterrupt, Terminated)):
            error.args = (self.losses(),)
        if error is None and not self.complete:
            self.context.barrier()
            if self.context.is_main:
                self.close()
            self.context.barrier()
