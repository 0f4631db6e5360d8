"""Folders of large safetensors shards under one manifest: what the stores of trajectories and of latents share.

    DIR/manifest.json              {"provenance": {...}, "shards": [{"file", "rows", "bytes", "sha256"}, ...]}
    DIR/shard-00000.safetensors    tensors of equally many rows; its metadata repeats the provenance

Row i of the store is row i modulo rows-per-shard of shard i // rows-per-shard, and a function of i alone: any number of
ranks writes the same files, and a run that broke off is continued. The manifest comes last and says that all is there.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import cli
from cli import UserError
from distributed import Ranks
from overlap import write_behind
from provenance import file_sha256, require_same


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"shard-{number:05d}.safetensors"


def write_shard(folder: Path, number: int, tensors: dict[str, torch.Tensor], provenance: dict) -> None:
    """Write one shard so that its name appears only when it is whole."""
    partial = folder / f"{shard_name(number)}.partial"
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    save_file(tensors, partial, metadata={"provenance": json.dumps(provenance)})
    partial.replace(folder / shard_name(number))


def shard_provenance(path: Path) -> dict:
    """What a shard says of itself. ``UserError`` when it is truncated or no shard."""
    try:
        with safe_open(path, "pt") as file:
            return json.loads((file.metadata() or {})["provenance"])
    except (SafetensorError, KeyError, OSError) as error:
        raise UserError(f"{path}: truncated or not a shard ({error}); delete it and run the same again") from None


def write_manifest(folder: Path, provenance: dict) -> None:
    """Close a finished store."""
    shards = []
    for path in tqdm(sorted(folder.glob("shard-*.safetensors")), desc="checksums", unit="shard", disable=None):
        with safe_open(path, "pt") as file:
            rows = file.get_slice("label").get_shape()[0]
        shards.append({"file": path.name, "rows": rows, "bytes": path.stat().st_size, "sha256": file_sha256(path)})
    partial = folder / "manifest.partial"
    partial.write_text(json.dumps({"provenance": provenance, "shards": shards}, indent=2))
    partial.replace(folder / "manifest.json")


def fill_store(
    folder: Path,
    provenance: dict,
    ranks: Ranks,
    make: Callable[[range, tqdm], dict[str, torch.Tensor]],
    unit: str,
    option: str = "--out",
) -> bool:
    """Write the shards that are not there yet, shared over the ranks, and then the manifest.

    ``make`` maps a shard's range of rows (and a progress bar to move) to its tensors, "label" among them;
    ``provenance`` holds "count" and "rows_per_shard". Returns False where nothing was left to do. ``UserError`` naming
    ``option`` when the folder holds anything else.
    """
    count, each = provenance["count"], provenance["rows_per_shard"]
    shards = [range(start, min(start + each, count)) for start in range(0, count, each)]
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    names = ranks.from_main(names)  # one list for all: the first ranks to start must not hide work from the others
    if names and not any(name.startswith("shard-") for name in names):
        raise UserError(f"{option} {folder}: the folder holds other files, give a new one")
    present = {name for name in names if name.endswith(".safetensors")}
    for name in sorted(present):
        require_same(f"{option} {folder}: holds data of another run", shard_provenance(folder / name), provenance)
    if len(present) == len(shards) and "manifest.json" in names:
        return False
    ranks.barrier()  # everybody has looked before anybody writes
    folder.mkdir(parents=True, exist_ok=True)
    mine = [number for number in range(len(shards)) if shard_name(number) not in present][ranks.rank :: ranks.world]
    total = sum(len(shards[number]) for number in mine)
    with tqdm(total=total, unit=unit, disable=None if ranks.main else True) as bar:
        write_behind(
            mine,
            lambda number: make(shards[number], bar),
            lambda number, tensors: write_shard(folder, number, tensors, provenance),
        )
    ranks.barrier()
    if ranks.main:
        write_manifest(folder, provenance)
    ranks.barrier()
    return True


class ShardStore:
    """A finished store, open for random reads. ``provenance`` is the manifest's, ``len`` the number of rows."""

    kind = "store"  # in messages; a subclass says of what

    def __init__(self, folder: str | Path, option: str = "--data-path"):
        """``UserError`` naming ``option`` when the store is missing, unfinished or truncated."""
        self.folder = cli.existing_folder(option, folder)
        manifest = self.folder / "manifest.json"
        if not manifest.is_file():
            shards = len(list(self.folder.glob("shard-*.safetensors")))
            hint = f"the {self.kind} is unfinished ({shards} shards); run the command that made it again to continue it"
            raise UserError(f"{option} {folder}: " + (hint if shards else f"no {self.kind} (no manifest.json)"))
        try:
            content = json.loads(manifest.read_text())
            self.provenance, self.shards = content["provenance"], content["shards"]
        except (ValueError, KeyError):
            raise UserError(f"{option} {manifest}: not a manifest of a {self.kind}") from None
        self.tensors = []
        for shard in self.shards:
            path = self.folder / shard["file"]
            if not path.is_file() or path.stat().st_size != shard["bytes"]:
                found = f"{path.stat().st_size} bytes" if path.is_file() else "no file"
                raise UserError(f"{option} {path}: {found}, the manifest says {shard['bytes']} bytes; make it again")
            with safe_open(path, "pt") as file:  # the tensors are views of the mapped file; nothing is read yet
                self.tensors.append({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        self.arrays = [{name: value.numpy() for name, value in tensors.items()} for tensors in self.tensors]
        self._first_row = np.cumsum([0] + [shard["rows"] for shard in self.shards])

    def __len__(self) -> int:
        return int(self._first_row[-1])

    def locate(self, rows: np.ndarray) -> Iterator[tuple[int, int]]:
        """The shard that holds each of ``rows`` (B,), and the row in it.

        Copying rows one by one out of ``arrays`` is many times faster than torch's indexing, most of all over shards.
        """
        owners = np.searchsorted(self._first_row, rows, side="right") - 1
        return zip(owners.tolist(), (rows - self._first_row[owners]).tolist())

    def verify(self, option: str) -> int:
        """Check checksums, counts, finiteness and labels of the whole store; its size in bytes. ``UserError`` if not.

        Provenance is that of ``fill_store`` and has "num_classes" as well.
        """
        classes = self.provenance["num_classes"]
        for shard, tensors in tqdm(list(zip(self.shards, self.tensors)), unit="shard", disable=None):
            path = self.folder / shard["file"]
            if file_sha256(path) != shard["sha256"]:
                raise UserError(f"{option} {path}: checksum differs from the manifest's; delete it and make it again")
            if shard_provenance(path) != self.provenance:
                raise UserError(f"{option} {path}: belongs to another {self.kind} than the manifest; make it again")
            for name, value in tensors.items():
                if len(value) != shard["rows"]:
                    raise UserError(f"{option} {path}: {name} has {len(value)} rows, the manifest says {shard['rows']}")
                if name != "label" and not value.isfinite().all():
                    raise UserError(f"{option} {path}: {name} holds NaN or infinite values; make it with --dtype fp32")
            if not ((tensors["label"] >= 0) & (tensors["label"] < max(classes, 1))).all():
                raise UserError(f"{option} {path}: labels out of range 0..{classes - 1}")
        if len(self) != self.provenance["count"]:
            raise UserError(f"{option} {self.folder}: {len(self)} rows, the manifest says {self.provenance['count']}")
        return sum(shard["bytes"] for shard in self.shards)
