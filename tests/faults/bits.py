"""Damage to single files, and the outcome of reading them: shared by test_bits.py and soak.py.

A reader returns the content, as nested dictionaries and lists of tensors and plain values; ``UserError`` is the
only error that it may raise.
"""

import contextlib
import copy
import json
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from helpers import assert_equal
from safetensors.torch import load_file

from evaluations.evaluator import features
from evaluations.features import Extractor
from runtime.cli import UserError
from runtime.distributed import DistributedContext
from runtime.files import file_sha256, release
from stores import checkpoints
from stores.captions import CaptionStore
from stores.image_arrays import Images
from stores.latents import LatentStore
from stores.runs import RunFolder, begin, find_run, read_config
from stores.samples import SampleWriter, read_provenance
from stores.shards import ShardWriter, note_of, shard_name
from stores.trajectories import TrajectoryStore

Reader = Callable[[], Any]


def damages(content: bytes, draw: random.Random, flips: int, cuts: int, within: int | None = None) -> Iterator[bytes]:
    """Copies of some bytes, each with one bit flipped (in the first ``within`` bytes), or cut short."""
    for _ in range(flips):
        damaged = bytearray(content)
        damaged[draw.randrange(min(within or len(content), len(content)))] ^= 1 << draw.randrange(8)
        yield bytes(damaged)
    for _ in range(cuts):
        yield content[: draw.randrange(len(content))]


def same(a: Any, b: Any) -> bool:
    """Whether two readings are equal to the bit."""
    try:
        assert_equal(a, b)
    except AssertionError:
        return False
    return True


def outcome(read: Reader, *allowed: Any) -> str:
    """ "equal" to the first that is ``allowed``, "made good" as another of them, "refused", "different" to all of them,
    or the error that is no sentence.
    """
    try:
        found = read()
    except UserError as error:
        return "refused" if str(error).count("\n") == 0 else f"traceback: of several lines: {error}"
    except Exception as error:  # a user would see a traceback
        return f"traceback: {type(error).__name__}: {error}"
    if same(found, allowed[0]):
        return "equal"
    return "made good" if any(same(found, one) for one in allowed[1:]) else "different"


def trial(path: Path, read: Reader, draw: random.Random, flips: int, cuts: int, *, within: int | None = None,
          allowed: tuple = ()) -> Counter:  # fmt: skip
    """How often each outcome comes of damage to one file, which is whole again afterwards."""
    content, wanted, found = path.read_bytes(), copy.deepcopy(read()), Counter()  # a copy: not of the file's pages
    try:
        for damaged in damages(content, draw, flips, cuts, within):
            path.write_bytes(damaged)
            found[outcome(read, wanted, *allowed)] += 1
    finally:
        path.write_bytes(content)
    return found


#################################################################################
#                                   Readers                                     #
#################################################################################


def read_store(folder: Path) -> dict:
    """A verified store, all of it."""
    store = TrajectoryStore(folder)
    store.verify("DIR")
    return {"provenance": store.provenance, "rows": len(store), "tensors": [dict(shard) for shard in store.tensors]}


def read_captions(folder: Path) -> dict:
    """A verified store of captions, all of it."""
    store = CaptionStore(folder)
    store.verify("DIR")
    numbers = range(len(store))
    texts = [store.text(number) for number in numbers]
    return {"tokens": store(torch.tensor(list(numbers))), "text": texts, "about": store.about, "cut": store.cut}


def read_latents(folder: Path) -> dict:
    """A verified store of latents, all of it."""
    store = LatentStore(folder)
    store.verify("DIR")
    return {"provenance": store.provenance, "rows": len(store), "tensors": [dict(shard) for shard in store.tensors]}


def read_student(path: Path) -> dict:
    """A sampler's part of a checkpoint."""
    student, config = checkpoints.load_student(path)
    return {"config": config, "weights": student.state_dict()}


def resume(run: Path, config: dict) -> dict | None:
    """The state from which a run continues; None where it begins anew."""
    folder = RunFolder(config, DistributedContext(), run_dir=str(run))
    newest = folder.newest_checkpoint()
    return newest and newest[1]


def run_by_name(run: Path, config: dict) -> dict:
    """The run that ``--run-dir`` continues: its config."""
    begin(config, "", str(run))
    return read_config(run)


def run_by_config(run: Path, config: dict) -> str:
    """The folder in which a run of this config would go on, among those of ``--results-dir``."""
    return find_run(config, str(run.parent), None).name


def read_samples(path: Path) -> dict:
    """The evaluator's part of samples."""
    images = Images("SAMPLES", path)
    batches = [torch.from_numpy(batch) for _, batch in images.batches(range(images.count), 16)]
    provenance = images.member("provenance")
    return {"images": batches, "provenance": None if provenance is None else json.loads(str(provenance))}


def read_finished(path: Path, provenance: dict) -> dict:
    """The sampler's check of an existing file of samples with this provenance."""
    assert SampleWriter(path, provenance["count"], provenance, DistributedContext()).complete
    return read_provenance(path)


def read_statistics(path: Path) -> dict:
    """The evaluator's part of a reference file: images, and the statistics stored beside them."""
    images = Images("REFERENCE", path)
    return read_samples(path) | {name: torch.from_numpy(images.member(name)) for name in ("mu", "sigma")}


def read_features(samples: Path, network: Extractor, whole: bytes) -> dict:
    """The features of samples, from the file kept beside them ("kept") or made anew; ``whole`` is that file's content.

    Made anew, it must be on the disk as it was.
    """
    images, kept = Images("SAMPLES", samples), samples.with_name(f"{samples.stem}.{network.name}.features.npz")
    before = kept.read_bytes()
    table = features(images, file_sha256(samples), network, 64, DistributedContext(), cache=True)
    made = kept.read_bytes()
    assert made in (before, whole)
    return {name: torch.from_numpy(value) for name, value in table.items()} | {"kept": made == before}


def twice(attempt: Reader) -> dict:
    """A command's result; it may refuse damage once, remove it, and ask to be run again: then that is in "again"."""
    try:
        return attempt() | {"again": False}
    except UserError as error:
        assert "\n" not in str(error)
        if "removed" not in str(error) or "run the same command again" not in str(error):
            raise
        return attempt() | {"again": True}


def draw_all(path: Path, count: int = 9) -> dict:
    """Samples that are drawn to the end, from where they broke off; unfinished again after."""
    unfinished, before = path.with_suffix(".partial"), path.with_suffix(".before")
    shutil.copytree(unfinished, before)

    def draw() -> dict:
        with SampleWriter(path, count, {"seed": 1}, DistributedContext()) as writer:
            for indices in writer.missing_batches(4):
                grey = torch.tensor(indices).view(-1, 1, 1, 1).expand(-1, 1, 4, 4) / 127.5 - 1
                writer.write(indices, grey, grey, torch.tensor(indices))
        return arrays_as_tensors(path)

    try:
        return twice(draw)
    finally:
        release(unfinished)
        shutil.rmtree(unfinished, ignore_errors=True)
        before.rename(unfinished)
        path.unlink(missing_ok=True)


def continue_dump(folder: Path, whole: Path) -> dict:
    """A dump that has its shards and notes and ends now, made again from the ``whole`` store where it must be; what its
    manifest says. Unfinished again after.
    """
    before = {path: path.read_bytes() for path in folder.glob("shard-*")}
    provenance = json.loads((whole / "manifest.json").read_text())["provenance"]

    def dump() -> dict:
        with ShardWriter(folder, provenance, DistributedContext(), unit="row") as writer:
            for rows in writer.missing_shards():
                writer.write(rows, load_file(whole / shard_name(rows.start // provenance["rows_per_shard"])))
        return read_store(folder)

    try:
        return twice(dump)
    finally:
        (folder / "manifest.json").unlink(missing_ok=True)
        for path, content in before.items():
            path.unlink(missing_ok=True)  # it may be mapped: a new file, not new content
            path.write_bytes(content)


def break_off(store: Path, folder: Path) -> Path:
    """A copy of a store as a dump leaves it that is killed before its manifest: with a note beside each shard."""
    shutil.copytree(store, folder)
    for shard in json.loads((folder / "manifest.json").read_text())["shards"]:
        note = {name: shard[name] for name in ("rows", "bytes", "sha256")}
        note_of(folder / shard["file"]).write_text(json.dumps(note))
    (folder / "manifest.json").unlink()
    return folder


def begin_samples(path: Path) -> Path:
    """Nine samples for ``draw_all``, of which four exist; their folder."""
    writer = SampleWriter(path, 9, {"seed": 1}, DistributedContext())
    with contextlib.suppress(KeyboardInterrupt), writer:
        grey = torch.arange(4).view(4, 1, 1, 1).expand(4, 1, 4, 4) / 127.5 - 1
        writer.write(list(range(4)), grey, grey, torch.arange(4))
        writer.wait()
        raise KeyboardInterrupt
    release(path.with_suffix(".partial"))
    return path.with_suffix(".partial")


def arrays_as_tensors(path: Path) -> dict:
    """All arrays of an .npz, numbers as tensors."""
    with np.load(path, allow_pickle=False) as file:
        return {n: str(file[n]) if file[n].dtype.kind == "U" else torch.from_numpy(file[n]) for n in file.files}
