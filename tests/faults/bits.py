"""Damage to single files, and what reading them comes to: shared by test_bits.py and soak.py.

A reader returns what it has read, as nested dictionaries and lists of tensors and plain values; ``UserError`` is the
only error that it may raise.
"""

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

from evaluations.files import Images
from runtime.cli import UserError
from runtime.distributed import DistributedContext
from runtime.files import release
from stores import checkpoints
from stores.runs import RunFolder, begin, find_run, read_config
from stores.samples import SampleWriter, read_provenance
from stores.shards import ShardWriter
from stores.trajectories import TrajectoryStore

Reader = Callable[[], Any]


def damages(content: bytes, draw: random.Random, flips: int, cuts: int, within: int | None = None) -> Iterator[bytes]:
    """Copies of some bytes, each with one bit flipped (in the first ``within`` bytes), or cut short."""
    for _ in range(flips):
        damaged = bytearray(content)
        damaged[draw.randrange(within or len(content))] ^= 1 << draw.randrange(8)
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
    """ "refused", "equal" or "different" to all that is ``allowed``, or the error that is no sentence."""
    try:
        found = read()
    except UserError as error:
        return "refused" if str(error).count("\n") == 0 else f"traceback: of several lines: {error}"
    except Exception as error:  # what a user would see as a traceback
        return f"traceback: {type(error).__name__}: {error}"
    return "equal" if any(same(found, one) for one in allowed) else "different"


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


def read_student(path: Path) -> dict:
    """What a sampler takes from a checkpoint."""
    student, config = checkpoints.load_student(path)
    return {"config": config, "weights": student.state_dict()}


def resume(run: Path, config: dict) -> dict | None:
    """The state from which a run continues; None where it begins anew."""
    folder = RunFolder(config, DistributedContext(), run_dir=str(run))
    newest = folder.newest_checkpoint()
    return newest and newest[1]


def run_by_name(run: Path, config: dict) -> dict:
    """The run that ``--run-dir`` continues: what its config says."""
    begin(config, "", str(run))
    return read_config(run)


def run_by_config(run: Path, config: dict) -> str:
    """The folder in which a run of this config would go on, among those of ``--results-dir``."""
    return find_run(config, str(run.parent), None).name


def read_samples(path: Path) -> dict:
    """What the evaluator reads of samples."""
    images = Images("SAMPLES", path)
    batches = [torch.from_numpy(batch) for _, batch in images.batches(range(images.count), 16)]
    provenance = images.member("provenance")
    return {"images": batches, "provenance": None if provenance is None else json.loads(str(provenance))}


def read_finished(path: Path, provenance: dict) -> dict:
    """What the sampler of samples with this provenance asks of a file that is there already."""
    assert SampleWriter(path, provenance["count"], provenance, DistributedContext()).complete
    return read_provenance(path)


def draw_all(path: Path, count: int = 9) -> dict:
    """Samples that are drawn to the end, from where they broke off; unfinished again after."""
    unfinished, before = path.with_suffix(".partial"), path.with_suffix(".before")
    shutil.copytree(unfinished, before)
    try:
        with SampleWriter(path, count, {"seed": 1}, DistributedContext()) as writer:
            for indices in writer.missing_batches(4):
                grey = torch.tensor(indices).view(-1, 1, 1, 1).expand(-1, 1, 4, 4) / 127.5 - 1
                writer.write(indices, grey, grey, torch.tensor(indices))
        return arrays_as_tensors(path)
    finally:
        release(unfinished)
        shutil.rmtree(unfinished, ignore_errors=True)
        before.rename(unfinished)
        path.unlink(missing_ok=True)


def continue_dump(folder: Path, provenance: dict) -> dict:
    """A dump that has all its shards and notes and ends now; what its manifest says of them. Unfinished again after."""
    before = {path: path.read_bytes() for path in folder.glob("shard-*")}
    try:
        with ShardWriter(folder, provenance, DistributedContext(), unit="row") as writer:
            assert not list(writer.missing_shards())
        return read_store(folder)
    finally:
        (folder / "manifest.json").unlink(missing_ok=True)
        for path, content in before.items():
            path.unlink(missing_ok=True)  # it may be mapped: a new file, not new content
            path.write_bytes(content)


def arrays_as_tensors(path: Path) -> dict:
    """All arrays of an .npz, numbers as tensors."""
    with np.load(path, allow_pickle=False) as file:
        return {n: str(file[n]) if file[n].dtype.kind == "U" else torch.from_numpy(file[n]) for n in file.files}
