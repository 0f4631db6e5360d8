"""Folders of large safetensors shards under one manifest, for the stores of trajectories, latents and captions.

    DIR/manifest.json              {"provenance": {...}, "shards": [{"file", "rows", "bytes", "sha256"}, ...]}
    DIR/shard-00000.safetensors    tensors of equally many rows; its metadata repeats the provenance

Row i of the store is row i modulo rows-per-shard of shard i // rows-per-shard, and a function of i alone: any number of
ranks writes the same files, and a run that broke off is continued. The manifest comes last, when all is written.
"""

import argparse
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tqdm import tqdm

from runtime import cli
from runtime.cli import RunError, UserError, existing_folder
from runtime.distributed import DistributedContext
from runtime.files import LOCK, SharedWriter, atomic_write, claim, file_sha256, json_object, release, write_text
from runtime.provenance import require_same

DAMAGED = (ValueError, KeyError, TypeError, AttributeError)  # what reading a damaged manifest may raise
ROWS_PER_SHARD = 1024  # a rank's piece of work: small, so that ranks end together


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"shard-{number:05d}.safetensors"


def shard_number(name: str) -> int:
    """The number of the shard with this file name, -1 for other files."""
    digits = name.removeprefix("shard-").removesuffix(".safetensors")
    return int(digits) if digits.isdecimal() and name == shard_name(int(digits)) else -1


def note_of(shard: Path) -> Path:
    """Where rows, bytes and hash of a shard stand until the manifest takes them over."""
    return shard.with_suffix(".json")


def shard_provenance(path: Path) -> dict:
    """A shard's metadata. ``UserError`` when it is truncated or no shard."""
    try:
        with safe_open(path, "pt") as file:
            return json_object((file.metadata() or {})["provenance"])
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise UserError(f"{path}: truncated or not a shard ({error}); delete it and run the same again") from None


class ShardWriter(SharedWriter):
    """Fills a store by any number of ranks, which share its shards among them; continues one that broke off.

    with ShardWriter(folder, provenance, context, unit="image") as writer:
        for rows in writer.missing_shards():       # this rank's part of the missing ones
            writer.write(rows, tensors)            # in a thread, while the next shard is made

    Leaving the block without an error writes the manifest. ``complete`` says that nothing is missing from the start.
    """

    def __init__(
        self, folder: str | Path, provenance: dict, context: DistributedContext, unit: str, grows: bool = False
    ):
        """``provenance`` holds "count" and "rows_per_shard". ``UserError`` naming ``--out`` when the folder holds
        anything else. What ``grows`` may hold fewer rows: shards are added, and a last one that was short is made anew.
        """
        super().__init__(context)
        self.folder, self.provenance, self.unit = Path(folder), provenance, unit
        self.rows_per_shard = provenance["rows_per_shard"]
        self._starts = range(0, provenance["count"], self.rows_per_shard)  # as many as shards
        names = {path.name for path in self.folder.iterdir()} - {LOCK} if self.folder.is_dir() else set()
        names = context.broadcast_object(names)  # one list for all: no rank must see a faster one's new files
        if names and not any(name.startswith("shard-") for name in names):
            raise UserError(f"--out {folder}: the folder holds other files, give a new one")
        self._present = {name for name in names if name.endswith(".safetensors")}
        for name in sorted(self._present):
            found = shard_provenance(self.folder / name)
            rows = found.get("count")
            if grows and isinstance(rows, int) and rows < provenance["count"]:
                found["count"] = provenance["count"]
                if rows % self.rows_per_shard and shard_number(name) == rows // self.rows_per_shard:
                    self._present.remove(name)  # the short one
            require_same(f"--out {folder}: holds data of another run", found, provenance)
            self.provenance = found  # all shards say the same, also where an autoencoder has moved meanwhile
        unknown = {name for name in self._present if shard_number(name) not in range(len(self._starts))}
        if unknown:
            raise UserError(f"--out {folder}: holds shards that are not of this run, {min(unknown)} first; remove them")
        self._finished = "manifest.json" in names
        self.complete = len(self._present) == len(self._starts) and self._finished
        self._mine: list[range] = []
        self._written = 0

    def __enter__(self) -> "ShardWriter":
        if self.complete and self.context.is_main:
            self._clean_up()  # of a run that was killed at its very end
        if not self.complete:
            self.context.barrier()  # everybody has looked before anybody writes
            self.context.on_main(self._begin)
            shards = [range(i, min(i + self.rows_per_shard, self._starts.stop)) for i in self._starts]
            missing = [rows for number, rows in enumerate(shards) if shard_name(number) not in self._present]
            self._mine = missing[self.context.rank :: self.context.world_size]
            self.start_progress(sum(len(rows) for rows in self._mine), self.unit)
        return self

    def _begin(self) -> None:
        """Claim the folder; a finished store that is to grow is an unfinished one from here on."""
        claim(self.folder, "--out")
        if self._finished:
            try:
                listed = _manifest(self.folder)["shards"]
            except DAMAGED:
                listed = []  # ``close`` takes the checksums anew
            _to_notes(self.folder, [shard for shard in listed if shard["file"] in self._present])
            (self.folder / "manifest.json").unlink()

    def missing_shards(self) -> Iterator[range]:
        """The rows of each shard that this rank has to make; none when the store is complete."""
        return iter(self._mine)

    def write(self, rows: range, tensors: dict[str, torch.Tensor]) -> None:
        """Write the shard of these rows: tensors of as many rows, "label" among them."""
        self.submit(self._write, rows.start // self.rows_per_shard, tensors)
        self._written += len(rows)

    def losses(self) -> str:
        """Words on the rows of an unfinished shard, which are lost; "" where there are none."""
        lost = self.made - self._written
        less = "a smaller --rows-per-shard loses less"
        return f"{lost} of an unfinished shard are lost, {self._written} before it are kept; {less}" if lost else ""

    def _write(self, number: int, tensors: dict[str, torch.Tensor]) -> None:
        contiguous = {name: value.contiguous() for name, value in tensors.items()}
        content = save(contiguous, metadata={"provenance": json.dumps(self.provenance)})
        path = self.folder / shard_name(number)
        # The hash is of the bytes in memory, made by the rank that writes them: it shows what the disk changed.
        note = {"rows": len(tensors["label"]), "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        write_text(note_of(path), json.dumps(note))
        with atomic_write(path) as partial:
            partial.write_bytes(content)

    def _paths(self) -> list[Path]:
        return [self.folder / shard_name(number) for number in range(len(self._starts))]

    def close(self) -> None:
        """Write the manifest, from the notes that each rank left of its shards."""
        shards = []
        for path in self._paths():
            if note_of(path).is_file():
                note = self._read_note(path)
            else:  # its note went when there was a manifest
                with safe_open(path, "pt") as file:
                    note = {"rows": file.get_slice("label").get_shape()[0]}
                note |= {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
            shards.append({"file": path.name, **note})
        content = {"provenance": self.provenance, "shards": shards}
        write_text(self.folder / "manifest.json", json.dumps(content, indent=2))
        self._clean_up()

    def _read_note(self, path: Path) -> dict:
        """A shard's note. ``UserError`` where it is damaged; both are removed then, to be made again."""
        try:
            note = json.loads(note_of(path).read_text())
            if note.keys() == {"rows", "bytes", "sha256"} and path.stat().st_size == note["bytes"]:
                return note
        except (ValueError, AttributeError):
            pass
        path.unlink()
        note_of(path).unlink()
        raise UserError(f"--out {note_of(path)}: damaged; removed with its shard, run the same command again")

    def _clean_up(self) -> None:
        """Remove the files that the manifest replaces, and give up the folder."""
        for path in self._paths():
            note_of(path).unlink(missing_ok=True)
        if (self.folder / LOCK).exists():
            claim(self.folder, "--out")
            release(self.folder)


def _manifest(folder: Path) -> dict:
    """A store's manifest. One of the errors ``DAMAGED`` where an entry is incomplete, or of a file elsewhere."""
    content = json_object((folder / "manifest.json").read_text())
    for shard in content["shards"]:
        if not {"file", "rows", "bytes", "sha256"} <= shard.keys() or Path(shard["file"]).name != shard["file"]:
            raise ValueError(f"{shard} is no shard of the folder")
    return content


def _to_notes(folder: Path, shards: list[dict]) -> None:
    """Write the entries of these shards as their notes, which stand for the manifest when that goes."""
    for shard in shards:
        note = {name: shard[name] for name in ("rows", "bytes", "sha256")}
        write_text(note_of(folder / shard["file"]), json.dumps(note))


def _is_whole(folder: Path, shard: dict) -> bool:
    """Whether a shard has the bytes that the manifest says."""
    path = folder / shard["file"]
    return path.is_file() and path.stat().st_size == shard["bytes"] and file_sha256(path) == shard["sha256"]


class ShardStore:
    """A finished store, open for random reads. ``provenance`` is the manifest's, ``len`` the number of rows."""

    kind = "store"  # in messages; a subclass names its own
    ragged: tuple[str, ...] = ()  # tensors in which a row of the store has several rows

    def __init__(self, folder: str | Path, option: str = "--data-path", verify: bool = False):
        """``UserError`` naming ``option`` when the store is missing, unfinished, truncated, or its manifest damaged.

        ``verify``: the checksum of each shard is compared when one of its rows is read for the first time.
        """
        self.folder, self.option, self.verify_reads = existing_folder(option, folder), option, verify
        manifest = self.folder / "manifest.json"
        if not manifest.is_file():
            shards = len(list(self.folder.glob("shard-*.safetensors")))
            hint = f"the {self.kind} is unfinished ({shards} shards); run the command that made it again to continue it"
            raise UserError(f"{option} {folder}: " + (hint if shards else f"no {self.kind} (no manifest.json)"))
        try:
            content = _manifest(self.folder)
            self.provenance, self.shards = content["provenance"] | {}, content["shards"]
        except DAMAGED:
            raise UserError(f"{option} {manifest}: not a manifest of a {self.kind}") from None
        self.tensors = []
        for shard in self.shards:
            path = self.folder / shard["file"]
            if not path.is_file() or path.stat().st_size != shard["bytes"]:
                found = f"{path.stat().st_size} bytes" if path.is_file() else "no file"
                raise UserError(f"{option} {path}: {found}, the manifest says {shard['bytes']} bytes; make it again")
            try:
                with safe_open(path, "pt") as file:  # the tensors are views of the mapped file; nothing is read yet
                    self.tensors.append({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
            except SafetensorError as error:
                raise UserError(f"{option} {path}: damaged or not a shard ({error}); make it again") from None
            if shard_provenance(path) | {"count": self.provenance.get("count")} != self.provenance:  # it may have grown
                raise UserError(f"{option} {path}: belongs to another {self.kind} than the manifest; make it again")
            for name, value in self.tensors[-1].items():
                if len(value) != shard["rows"] and name not in self.ragged:
                    raise UserError(f"{option} {path}: {name} has {len(value)} rows, the manifest says {shard['rows']}")
        self.arrays = [{name: value.numpy() for name, value in tensors.items()} for tensors in self.tensors]
        self._first_row = np.cumsum([0] + [shard["rows"] for shard in self.shards])
        self._unverified = set(range(len(self.shards))) if verify else set()

    def require(self, *names: str) -> None:
        """``UserError`` unless every shard has these tensors, and the others that the first one has."""
        for shard, tensors in zip(self.shards, self.tensors, strict=True):
            absent = {*names, *self.tensors[0]} - tensors.keys()
            if absent:
                path = self.folder / shard["file"]
                raise UserError(f"{self.option} {path}: has no {min(absent)}; make it again")

    def __getstate__(self) -> tuple[str, str, bool]:
        """A store travels to data workers as its path, and is mapped anew there."""
        return str(self.folder.absolute()), self.option, self.verify_reads

    def __setstate__(self, state: tuple[str, str, bool]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def __len__(self) -> int:
        return int(self._first_row[-1])

    def locate(self, rows: np.ndarray) -> list[tuple[int, int]]:
        """The shard that holds each of ``rows`` (B,), and the row in it.

        Copying rows one by one out of ``arrays`` is many times faster than torch's indexing, most of all over shards.
        ``RunError`` when a shard is damaged, if the store was opened with ``verify``.
        """
        owners = np.searchsorted(self._first_row, rows, side="right") - 1
        for number in self._unverified.intersection(owners.tolist()):
            if not _is_whole(self.folder, self.shards[number]):
                differs = "checksum differs from the manifest's"
                raise RunError(f"{self._damaged([number])}: {differs}; {self._how_to_repair}")
            self._unverified.remove(number)
        return list(zip(owners.tolist(), (rows - self._first_row[owners]).tolist(), strict=True))

    def require_finite(self, rows: np.ndarray, values: np.ndarray) -> None:
        """``RunError`` that names the shards of those ``rows`` (B,) whose ``values`` (B, ...) are not all finite."""
        if not np.isfinite(values).all():
            bad = rows[~np.isfinite(values).all(axis=tuple(range(1, values.ndim)))]
            files = self._damaged(sorted({shard for shard, _ in self.locate(bad)}))
            raise RunError(f"{files}: NaN or infinite values; {self._how_to_repair}")

    def _damaged(self, numbers: list[int]) -> str:
        return f"{self.folder}/" + ", ".join(self.shards[number]["file"] for number in numbers)

    @property
    def _how_to_repair(self) -> str:
        return f"python -m {type(self).__module__} repair {self.folder}, then the command that made it, makes it anew"

    def verify(self, option: str) -> int:
        """Check checksums, count, finiteness and labels of the whole store; its size in bytes. ``UserError`` if not.

        Provenance is that of ``ShardWriter`` and has "num_classes" as well.
        """
        absent = {"num_classes", "count"} - self.provenance.keys()
        if absent:
            raise UserError(f"{option} {self.folder}/manifest.json: its provenance does not say {min(absent)}")
        classes = self.provenance["num_classes"]
        for shard, tensors in tqdm(list(zip(self.shards, self.tensors, strict=True)), unit="shard", disable=None):
            path = self.folder / shard["file"]
            if file_sha256(path) != shard["sha256"]:
                raise UserError(f"{option} {path}: checksum differs from the manifest's; delete it and make it again")
            for name, value in tensors.items():
                if name != "label" and not value.isfinite().all():
                    raise UserError(f"{option} {path}: {name} holds NaN or infinite values; make it with --dtype fp32")
            if not ((tensors["label"] >= 0) & (tensors["label"] < max(classes, 1))).all():
                raise UserError(f"{option} {path}: labels out of range 0..{classes - 1}")
        if len(self) != self.provenance["count"]:
            raise UserError(f"{option} {self.folder}: {len(self)} rows, the manifest says {self.provenance['count']}")
        return sum(shard["bytes"] for shard in self.shards)


#################################################################################
#              The options and commands that every store of shards has          #
#################################################################################


def add_store_options(group: cli.OptionGroup, rows: str) -> None:
    """``--out`` and ``--rows-per-shard``, the same in every script that makes a store; what its ``rows`` are."""
    group.add_argument("--out", type=cli.folder, required=True, help="Write the store into this folder.")
    help = f"{rows} of a file; a rank makes one file at a time."
    group.add_argument("--rows-per-shard", type=cli.positive, default=ROWS_PER_SHARD, help=help)


def store_parser(doc: str | None, name: str, verify: Callable[..., None]) -> tuple[cli.Parser, Any]:
    """The parser of the module stores.NAME with both commands, and the place to add others to.

    ``doc`` is that module's, ``verify`` checks a store of its kind.
    """
    parser = cli.Parser(doc, prog=f"stores.{name}", description=f"Look after a store of {name}.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=cli.Parser)
    command = commands.add_parser("verify", help="Check counts, checksums and finiteness.")
    command.add_argument("folder", metavar="DIR", help="Folder of the store.")
    command.set_defaults(run=verify)
    command = commands.add_parser("repair", help="Remove damaged shards, for the command that made them to make anew.")
    command.add_argument("folder", metavar="DIR", help="Folder of the store.")
    command.set_defaults(run=run_repair)
    return parser, commands


def run_repair(args: argparse.Namespace) -> None:
    """Remove the shards that differ from the manifest, and the manifest with them, for the command that made the store
    to make exactly these anew.
    """
    folder = existing_folder("DIR", args.folder)
    manifest = folder / "manifest.json"
    try:
        shards = _manifest(folder)["shards"]
        bad = [shard for shard in tqdm(shards, unit="shard", disable=None) if not _is_whole(folder, shard)]
    except (OSError, *DAMAGED):
        raise UserError(f"DIR {manifest}: no manifest that can be read; run the command that made it") from None
    if not bad:
        print(f"{args.folder}: ok, nothing to repair")
        return
    _to_notes(folder, [shard for shard in shards if shard not in bad])
    for shard in bad:
        (folder / shard["file"]).unlink(missing_ok=True)
    manifest.unlink()
    names = ", ".join(shard["file"] for shard in bad)
    print(f"{args.folder}: {names} removed; run the command that made the store to make them anew")
