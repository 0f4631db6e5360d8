"""sample_trajectory.py: a dump that broke off, on several ranks, of one quantity only."""

import pytest
import torch
from helpers import assert_equal, call, contents, refused, spawn

from stores.trajectories import TrajectoryStore

DUMP = ("--num-trajectories", 50, "--rows-per-shard", 20, "--per-proc-batch-size", 16)  # what made the fixture's store


def test_an_interrupted_dump_continues_with_the_same_bytes(tmp_path, teacher_file, capsys):
    folder = tmp_path / "again"
    command = ("sample_trajectory.py", "--teacher", teacher_file, "--out", folder, *DUMP)
    call(*command)
    wanted = contents(folder)
    (folder / "shard-00001.safetensors").unlink()
    (folder / "manifest.json").unlink()
    (folder / "shard-00001.safetensors.partial").write_bytes(b"half a shard")
    call(*command)
    assert contents(folder) == wanted
    call(*command)
    assert "already complete, 50 trajectories" in capsys.readouterr().out and contents(folder) == wanted


@pytest.mark.slow
def test_ranks_do_not_change_the_store(tmp_path, teacher_file, store):
    command = ("sample_trajectory.py", "--teacher", teacher_file, "--out", tmp_path / "two", *DUMP)
    done = spawn(*command, ranks=2)
    assert done.returncode == 0, done.stderr
    one, two = TrajectoryStore(store), TrajectoryStore(tmp_path / "two")
    assert len(one.tensors) == len(two.tensors) == 3
    for a, b in zip(one.tensors, two.tensors):
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("stored", ["x0", "xt"])
def test_one_of_the_two_quantities_can_be_left_out(tmp_path, teacher_file, stored, capsys):
    folder = tmp_path / "store"
    call("sample_trajectory.py", "--teacher", teacher_file, "--out", folder, "--num-trajectories", 5, "--store", stored)
    assert TrajectoryStore(folder).tensors[0].keys() == {"noise", "label", stored}
    other = {"x0": "xt", "xt": "x0"}[stored]
    train = ("--data-path", folder, "--stack", 2, "--target", other, "--run-dir", tmp_path / "run")
    error = refused(capsys, "train_ARD.py", *train)
    assert f"--target {other}" in error and f"has only {stored}" in error


def test_a_dump_is_extended_by_a_larger_number(teacher_file, tmp_path, capsys):
    dump = ("sample_trajectory.py", "--teacher", teacher_file, "--rows-per-shard", 4, "--num-trajectories")
    call(*dump, 6, "--out", tmp_path / "grown")
    call(*dump, 11, "--out", tmp_path / "grown")
    call(*dump, 11, "--out", tmp_path / "at once")
    grown, at_once = (TrajectoryStore(tmp_path / name) for name in ("grown", "at once"))
    assert grown.provenance == at_once.provenance and grown.provenance["count"] == 11
    for ours, theirs in zip(grown.tensors, at_once.tensors, strict=True):
        assert_equal(ours, theirs)
    error = refused(capsys, *dump, 6, "--out", tmp_path / "grown")
    assert "holds data of another run: count is 11 there and 6 here" in error
