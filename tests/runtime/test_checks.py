"""Places, room and memory: a sentence where it cannot work, nothing otherwise."""

import os
from pathlib import Path

import pytest
import torch

from runtime import checks
from runtime.cli import UserError

CPU = torch.device("cpu")


def test_places_that_can_be_written_need_not_be_there(tmp_path):
    assert checks.writable_folder("--out", tmp_path / "a/b") == tmp_path / "a/b"
    assert checks.writable_file("--out", tmp_path / "a/b.npz") == tmp_path / "a/b.npz"
    assert checks.writable_file("--out", "b.npz").name == "b.npz"
    assert not list(tmp_path.iterdir())


def test_places_that_cannot_be_written_are_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    for check, path, words in (
        (checks.writable_folder, tmp_path / "file", "is a file, give a folder"),
        (checks.writable_folder, tmp_path / "file/a/b", f"{tmp_path}/file is a file, give a place in a folder"),
        (checks.writable_file, tmp_path, "is a folder, give the name of a file"),
        (checks.writable_file, tmp_path / "file/a.npz", "is a file, give a folder"),
    ):
        with pytest.raises(UserError, match=words):
            check("--out", path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match=f"this user may not write to {tmp_path}"):
        checks.writable_folder("--out", tmp_path / "a")


def test_room_and_memory_are_compared_with_what_there_is(tmp_path):
    checks.require_disk("--num-samples 1", tmp_path / "not/there", 1)
    checks.require_memory("--global-batch-size 1", 1, CPU)
    with pytest.raises(UserError, match=r"^--num-samples 9: 1e\+03 PB are to be written to .*/not/there, where the"):
        checks.require_disk("--num-samples 9", tmp_path / "not/there", 10**18)
    with pytest.raises(UserError, match="^--global-batch-size 9: at least 2 PB of memory are needed, this machine has"):
        checks.require_memory("--global-batch-size 9", 2 * 10**15, CPU)


def test_ranks_share_the_memory_of_a_machine(monkeypatch):
    half = checks.machine_memory() // 2
    checks.require_memory("x", half + 10, CPU)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    with pytest.raises(UserError, match="this machine for each of 2 ranks has"):
        checks.require_memory("x", half + 10, CPU)


def test_bytes_are_told_in_words():
    found = [checks.in_words(count) for count in (0, 999, 1000, 2.5e9, 1e15)]
    assert found == ["0 bytes", "999 bytes", "1 kB", "2.5 GB", "1 PB"]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="a file system of Linux that is on no disk")
def test_a_place_on_no_disk_is_refused():
    with pytest.raises(UserError, match="--out /proc/nothing/here: /proc is on no disk, give another place"):
        checks.writable_folder("--out", "/proc/nothing/here")
