"""Folders of shards: every row where it belongs, damage that is found, a store that broke off.

A writer and a reader of small tensors: any rows of any shards, broken off and continued, damaged in every way.
Then repair, data workers, notes of an interrupted dump, other numbers of shards.
"""

import json
import shutil

import numpy as np
import pytest
import torch
from helpers import SMALL, assert_equal, call, contents, flip, refused, spawn
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.cli import RunError, UserError
from runtime.distributed import DistributedContext
from runtime.files import LOCK, file_sha256, release
from stores.latents import LatentStore
from stores.shards import ShardStore, ShardWriter, note_of
from stores.trajectories import TrajectoryBatches, TrajectoryStore


def write(folder, count: int, rows_per_shard: int, fail_at: int | None = None, grows: bool = False):
    """A store in which the value of row i is i."""
    provenance = {"count": count, "rows_per_shard": rows_per_shard, "num_classes": 2}
    with ShardWriter(folder, provenance, DistributedContext(), unit="row", grows=grows) as writer:
        for rows in writer.missing_shards():
            if fail_at is not None and fail_at in rows:
                raise RuntimeError("power cut")
            numbers = torch.tensor(rows)
            writer.write(rows, {"value": numbers.float(), "label": numbers % 2})
    return writer


@settings(max_examples=20, deadline=None)
@given(data=st.data(), count=st.integers(1, 12), rows_per_shard=st.integers(1, 14))
def test_any_rows_are_found_in_shards_of_any_size(tmp_path_factory, data, count, rows_per_shard):
    folder = tmp_path_factory.mktemp("store")
    write(folder, count, rows_per_shard)
    store = ShardStore(folder)
    assert len(store) == count and len(store.shards) == -(-count // rows_per_shard)
    rows = data.draw(st.lists(st.integers(0, count - 1), max_size=20))
    found = [store.arrays[shard]["value"][row] for shard, row in store.locate(np.array(rows, dtype=int))]
    assert found == rows and store.verify("DIR") > 0


def test_a_writer_that_broke_off_is_continued_and_a_finished_store_left_alone(tmp_path):
    with pytest.raises(RuntimeError, match="power cut"):
        write(tmp_path / "parts", 10, 3, fail_at=7)
    assert {"shard-00000.safetensors"} <= contents(tmp_path / "parts").keys()
    with pytest.raises(UserError, match="unfinished"):
        ShardStore(tmp_path / "parts")
    whole, parts = write(tmp_path / "whole", 10, 3), write(tmp_path / "parts", 10, 3)
    assert not whole.complete and not parts.complete and contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert write(tmp_path / "whole", 10, 3, fail_at=0).complete  # nothing is asked for, so nothing fails
    with pytest.raises(UserError, match="holds data of another run: count is 10 there and 11 here"):
        write(tmp_path / "whole", 11, 3)


@settings(max_examples=20, deadline=None)
@given(first=st.integers(1, 9), more=st.integers(1, 9), rows_per_shard=st.integers(1, 6), fails=st.booleans())
def test_a_store_that_grows_holds_what_one_of_that_size_holds(tmp_path_factory, first, more, rows_per_shard, fails):
    folder = tmp_path_factory.mktemp("store")
    write(folder, first, rows_per_shard)
    full = {f"shard-{number:05d}.safetensors" for number in range(first // rows_per_shard)}
    before = {name: content for name, content in contents(folder).items() if name in full}
    if fails:  # killed while it grows
        with pytest.raises(RuntimeError, match="power cut"):
            write(folder, first + more, rows_per_shard, fail_at=first, grows=True)
        with pytest.raises(UserError, match="unfinished"):
            ShardStore(folder)
    write(folder, first + more, rows_per_shard, grows=True)
    store = ShardStore(folder)
    assert len(store) == store.provenance["count"] == first + more and store.verify("DIR") > 0
    found = np.concatenate([arrays["value"] for arrays in store.arrays])
    assert found.tolist() == list(range(first + more))
    assert contents(folder).items() >= before.items()  # what was full is not made again
    assert write(folder, first + more, rows_per_shard, fail_at=0, grows=True).complete
    for count, able in ((first, True), (first + more + 1, False)):
        with pytest.raises(UserError, match="holds data of another run: count is"):
            write(folder, count, rows_per_shard, grows=able)


@pytest.mark.parametrize("manifest", ["", "[]", '{"shards": [{}]}', '{"shards": 3}'])
def test_a_store_without_a_shard_and_a_manifest_that_can_be_read_is_made_whole(manifest, tmp_path):
    write(tmp_path, 10, 3)
    wanted = contents(tmp_path)
    (tmp_path / "shard-00001.safetensors").unlink()
    (tmp_path / "manifest.json").write_text(manifest)
    write(tmp_path, 10, 3)
    assert contents(tmp_path) == wanted


def test_damaged_stores_are_refused(latent_store, tmp_path):
    copy = shutil.copytree(latent_store, tmp_path / "store")
    shard = copy / "shard-00002.safetensors"
    whole = shard.read_bytes()
    flip(shard, -1)
    with pytest.raises(UserError, match="checksum differs"):
        LatentStore(copy).verify("DIR")
    shard.write_bytes(whole[:-10])
    with pytest.raises(UserError, match=r"shard-00002.safetensors: \d+ bytes, the manifest says"):
        LatentStore(copy)
    (copy / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="not a manifest"):
        LatentStore(copy)


def test_a_damaged_name_of_a_tensor_or_key_of_the_manifest_is_refused_at_once(latent_store, store, tmp_path):
    latents, trajectories = (LatentStore, latent_store), (TrajectoryStore, store)
    for (kind, whole), name in ((latents, "std"), (latents, "label"), (trajectories, "noise"), (trajectories, "xt")):
        copy = shutil.copytree(whole, tmp_path / name)
        shard = copy / "shard-00001.safetensors"
        shard.write_bytes(shard.read_bytes().replace(f'"{name}"'.encode(), f'"{name[:-1]}_"'.encode(), 1))
        with pytest.raises(UserError, match=rf"shard-00001.safetensors: has no {name}; make it again$"):
            kind(copy)
    for key, value in (("num_classes", "num_classet"), ('"rows": 4', '"rows": 5')):
        copy = shutil.copytree(latent_store, tmp_path / value[:6])
        text = (copy / "manifest.json").read_text()
        (copy / "manifest.json").write_text(text.replace(key, value, 1))
        with pytest.raises(UserError, match=r"another latent store than the manifest|has 4 rows, the manifest says 5"):
            LatentStore(copy)


def test_a_reader_that_verifies_finds_damage_when_it_meets_it_and_not_before(store, tmp_path, capsys):
    copy = shutil.copytree(store, tmp_path / "store")
    flip(copy / "shard-00001.safetensors", -40)  # the least bit of a number, in rows 20 to 39
    opened = TrajectoryStore(copy, verify=True)
    opened.read(np.array([0, 19, 40]), "x0", [0])
    for _ in range(2):
        with pytest.raises(RunError, match=r"shard-00001.safetensors: checksum differs .* repair"):
            opened.read(np.array([3, 20]), "x0", [0])
    train = ("train_ARD.py", "--data-path", copy, *SMALL, "--iterations", 2)
    call(*train, "--run-dir", tmp_path / "trusting")
    with pytest.raises(SystemExit) as stop:
        call(*train, "--run-dir", tmp_path / "run", "--verify")
    assert stop.value.code == 1 and "shard-00001.safetensors: checksum differs" in capsys.readouterr().err


@pytest.mark.slow
def test_an_error_in_a_data_worker_is_a_sentence_and_ends_the_run(store, tmp_path):
    copy = shutil.copytree(store, tmp_path / "store")
    flip(copy / "shard-00001.safetensors", -40)
    done = spawn("train_ARD.py", "--data-path", copy, *SMALL, "--iterations", 50, "--run-dir", tmp_path / "run",
                 "--verify", "--num-workers", 2)  # fmt: skip
    assert done.returncode == 1 and "shard-00001.safetensors: checksum differs" in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr


def test_latents_that_are_not_finite_are_refused_by_the_name_of_their_shard(latent_store, tmp_path):
    copy = shutil.copytree(latent_store, tmp_path / "store")
    opened = LatentStore(copy)
    opened.arrays[1] = {name: value.copy() for name, value in opened.arrays[1].items()}
    opened.arrays[1]["std"][0, 1, 0, 0, 0] = np.nan
    opened.read(np.array([0, 4]), np.array([False, False]))
    with pytest.raises(RunError, match=r"shard-00001.safetensors: NaN or infinite values; .* stores.latents repair"):
        opened.read(np.array([0, 4]), np.array([False, True]))


def test_repair_removes_what_is_damaged_and_the_same_command_makes_exactly_that_anew(teacher_file, tmp_path, capsys):
    folder = tmp_path / "store"
    command = ("sample_trajectory.py", "--teacher", teacher_file, "--out", folder, "--num-trajectories", 50,
               "--rows-per-shard", 20, "--per-proc-batch-size", 16)  # fmt: skip
    call(*command)
    wanted = {path.name: path.read_bytes() for path in folder.iterdir()}
    call("stores.trajectories", "repair", folder)
    assert "nothing to repair" in capsys.readouterr().out
    flip(folder / "shard-00001.safetensors", len(wanted["shard-00001.safetensors"]) // 2, 4)
    (folder / "shard-00002.safetensors").unlink()
    untouched = (folder / "shard-00000.safetensors").stat().st_mtime_ns
    call("stores.trajectories", "repair", folder)
    assert "shard-00001.safetensors, shard-00002.safetensors removed" in capsys.readouterr().out
    assert "unfinished (1 shards)" in refused(capsys, "stores.trajectories", "verify", folder)
    call(*command)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == wanted
    assert (folder / "shard-00000.safetensors").stat().st_mtime_ns == untouched
    (folder / "manifest.json").write_text("{")
    assert "no manifest that can be read" in refused(capsys, "stores.trajectories", "repair", folder)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_a_store_goes_to_data_workers_however_they_are_started(store, method):
    order = {"global_batch_size": 7, "seed": 3, "context": DistributedContext()}
    batches = TrajectoryBatches(TrajectoryStore(store), [6, 12, 19, 25], "x0", **order)
    options = {"batch_size": None, "sampler": range(2, 8)}
    workers = torch.utils.data.DataLoader(batches, **options, num_workers=1, multiprocessing_context=method)
    assert_equal(list(workers), list(torch.utils.data.DataLoader(batches, **options)))


def test_an_interrupted_dump_leaves_notes_that_the_next_run_uses_and_removes(tmp_path):
    folder = tmp_path / "store"
    with pytest.raises(RuntimeError, match="power cut"):
        write(folder, 10, 3, fail_at=7)
    release(folder)
    first = folder / "shard-00000.safetensors"
    note = json.loads(note_of(first).read_text())
    assert note == {"rows": 3, "bytes": first.stat().st_size, "sha256": file_sha256(first)}
    # The disk changed a shard: the hash is of the bytes that were meant.
    content = first.read_bytes()
    flip(first, -1)
    write(folder, 10, 3)
    assert contents(folder).keys() == {f"shard-{i:05d}.safetensors" for i in range(4)} | {"manifest.json"}
    with pytest.raises(UserError, match="shard-00000.safetensors: checksum differs"):
        ShardStore(folder).verify("DIR")
    first.write_bytes(content)
    assert ShardStore(folder).verify("DIR") > 0


def test_notes_and_lock_beside_a_finished_store_are_removed(tmp_path):
    write(tmp_path, 4, 2)
    before = contents(tmp_path)
    note_of(tmp_path / "shard-00001.safetensors").write_text("{}")  # killed between the manifest and the notes
    (tmp_path / LOCK).write_text("process 1")
    assert write(tmp_path, 4, 2).complete and contents(tmp_path) == before


def test_a_shard_of_another_number_of_shards_is_refused(tmp_path):
    write(tmp_path, 4, 2)
    shutil.copyfile(tmp_path / "shard-00001.safetensors", tmp_path / "shard-00002.safetensors")
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"holds shards that are not of this run, shard-00002.safetensors first"):
        write(tmp_path, 4, 2)
    assert contents(tmp_path) == before


def test_an_interruption_says_how_much_of_a_shard_it_has_cost(tmp_path):
    provenance = {"count": 9, "rows_per_shard": 4, "num_classes": 2}
    with (
        pytest.raises(KeyboardInterrupt, match="^3 of an unfinished shard are lost, 4 before it are kept; a smaller "),
        ShardWriter(tmp_path, provenance, DistributedContext(), unit="row") as writer,
    ):
        for number, rows in enumerate(writer.missing_shards()):
            writer.progress(4 - number)
            if number == 1:
                raise KeyboardInterrupt
            writer.write(rows, {"value": torch.zeros(4), "label": torch.zeros(4, dtype=torch.int64)})
    assert "shard-00000.safetensors" in contents(tmp_path)
    release(tmp_path)
