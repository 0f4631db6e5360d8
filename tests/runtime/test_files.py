"""Files: whole or not at all, beside computing, by all ranks together, fetched once.

Atomic writes; claims of folders and files against other processes; writing behind and reading ahead in a thread;
what ranks write together; downloads.
"""

import errno
import hashlib
import os
import signal
import threading

import pytest
from helpers import ROOT, start

from runtime.cli import UserError
from runtime.distributed import DistributedContext
from runtime.files import (
    LOCK,
    SharedWriter,
    WriteBehind,
    atomic_write,
    cached_download,
    claim,
    file_sha256,
    held,
    read_ahead,
    release,
    write_text,
)

#################################################################################
#                            Whole or not at all                                #
#################################################################################


def test_a_file_appears_with_its_whole_content_in_a_new_folder(tmp_path):
    path = tmp_path / "a" / "b" / "file.txt"
    with atomic_write(path) as partial:
        assert partial.parent == path.parent and path.parent.is_dir()
        partial.write_text("half")
        assert not path.exists()
        partial.write_text("whole")
    assert path.read_text() == "whole" and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("before", [None, "what was there"])
def test_a_block_that_raises_leaves_everything_as_it_was(tmp_path, before):
    path = tmp_path / "file.txt"
    if before:
        path.write_text(before)
    with pytest.raises(RuntimeError, match="power cut"), atomic_write(path) as partial:
        partial.write_text("half")
        raise RuntimeError("power cut")
    assert [file.read_text() for file in tmp_path.iterdir()] == ([before] if before else [])


def test_a_block_that_writes_nothing_is_an_error_and_leaves_nothing(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "file.txt"):
        pass
    assert not list(tmp_path.iterdir())


def test_an_error_of_the_system_names_the_file(tmp_path):
    for given, named in ((None, tmp_path / "new"), ("other", "other")):
        with pytest.raises(OSError) as error, atomic_write(tmp_path / "new"):
            raise OSError(errno.ENOSPC, "No space left on device", given)
        assert error.value.filename == str(named)


def test_what_is_there_is_replaced_and_its_checksum_is_sha256(tmp_path):
    write_text(tmp_path / "file.txt", "old and longer")
    write_text(tmp_path / "file.txt", "new")
    assert (tmp_path / "file.txt").read_text() == "new"
    assert file_sha256(tmp_path / "file.txt") == hashlib.sha256(b"new").hexdigest()


#################################################################################
#                            One process in a folder                            #
#################################################################################


@pytest.fixture
def held_folder(tmp_path, monkeypatch):
    """A folder that another process holds, and that process."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    script, folder = tmp_path / "hold.py", tmp_path / "folder"
    script.write_text(
        "import sys, time\n"
        "from pathlib import Path\n"
        "from runtime.files import claim\n"
        "claim(Path(sys.argv[1]), '--out')\n"
        "print('held', flush=True)\n"
        "time.sleep(60)\n"
    )
    process = start(script, folder)
    assert process.stdout.readline() == "held\n"
    yield folder, process
    process.kill()
    process.communicate()


def test_a_folder_that_another_process_holds_is_refused_until_that_process_is_gone(held_folder):
    folder, holder = held_folder
    for _ in range(2):  # asking does not change the answer
        with pytest.raises(UserError, match=rf"^--out {folder}: process {holder.pid} on \S+ is at work there; "):
            claim(folder, "--out")
    assert (folder / LOCK).exists()
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    claim(folder, "--out")
    assert (folder / LOCK).read_text().startswith(f"process {os.getpid()} on ")
    release(folder)
    assert not list(folder.iterdir())


def test_a_process_may_claim_twice_and_releases_once(tmp_path):
    folder = tmp_path / "new/folder"
    claim(folder, "--out")
    claim(folder, "--out")
    assert [path.name for path in folder.iterdir()] == [LOCK]
    release(folder)
    release(folder)
    assert not list(folder.iterdir())
    claim(folder, "--out")
    release(folder)


def test_a_file_is_held_beside_it_until_the_block_ends(tmp_path):
    file = tmp_path / "s.npz"
    file.write_bytes(b"samples")
    with pytest.raises(RuntimeError, match="power cut"), held(file, "SAMPLES", DistributedContext()):
        assert sorted(path.name for path in tmp_path.iterdir()) == ["s.npz", "s.npz.lock"]
        raise RuntimeError("power cut")
    assert [path.name for path in tmp_path.iterdir()] == ["s.npz"]


#################################################################################
#                               Beside computing                                #
#################################################################################


def test_writing_keeps_the_order_and_runs_in_one_other_thread():
    written, threads = [], set()

    def write(item, made):
        threads.add(threading.get_ident())
        written.append((item, made))

    with WriteBehind() as behind:
        for item in range(20):
            behind.submit(write, item, item**2)
    assert written == [(i, i**2) for i in range(20)]
    assert len(threads) == 1 and threading.get_ident() not in threads


@pytest.mark.parametrize("culprit", ["make", "write"])
def test_errors_of_both_sides_surface_and_nothing_is_written_after_them(culprit):
    written = []

    def make(item):
        if culprit == "make" and item == 3:
            raise RuntimeError("cannot make 3")
        return item

    def write(item, made):
        if culprit == "write" and item == 3:
            raise OSError("cannot write 3")
        written.append(item)

    with pytest.raises((RuntimeError, OSError), match=f"cannot {culprit} 3"), WriteBehind() as behind:
        for item in range(10):
            behind.submit(write, item, make(item))
    assert written == [0, 1, 2]


def test_reading_ahead_keeps_the_order_and_is_one_item_ahead():
    made, used = [], []

    def items():
        for number in range(5):
            made.append((number, threading.get_ident()))
            yield number

    for number in read_ahead(items()):
        used.append(number)
        assert len(made) <= number + 2  # this one and, at most, the next
    assert used == [number for number, _ in made] == list(range(5))
    assert len({thread for _, thread in made} - {threading.get_ident()}) == 1


def test_an_error_while_reading_ahead_comes_after_the_items_before_it():
    used = []
    with pytest.raises(ZeroDivisionError):
        for number in read_ahead(6 // (3 - number) for number in range(5)):
            used.append(number)
    assert used == [2, 3, 6]


class Notes(SharedWriter):
    """Writes into a list; ``close`` notes that it was called, and with what was there."""

    def __init__(self, complete: bool = False):
        super().__init__(DistributedContext())
        self.complete, self.written, self.closed_at = complete, [], None

    def close(self) -> None:
        self.closed_at = len(self.written)


def test_a_shared_writer_is_closed_after_the_last_write_and_only_then():
    with Notes() as notes:
        for item in range(5):
            notes.submit(notes.written.append, item)
    assert notes.closed_at == 5
    with Notes(complete=True) as notes:
        pass
    assert notes.closed_at is None
    with pytest.raises(RuntimeError, match="power cut"), Notes() as notes:
        raise RuntimeError("power cut")
    assert notes.closed_at is None
    with pytest.raises(ZeroDivisionError), Notes() as notes:
        notes.submit(lambda: 1 / 0)
    assert notes.closed_at is None


#################################################################################
#                                    Fetched                                    #
#################################################################################


def test_a_download_is_kept_and_a_wrong_one_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    source = tmp_path / "weights-abc.pt"
    source.write_bytes(b"weights")
    url, digest = source.as_uri(), hashlib.sha256(b"weights").hexdigest()
    with pytest.raises(UserError, match=rf"^--teacher x: cannot download it .* fetch {url} to .*weights-abc.pt$"):
        cached_download(url, "--teacher x", "0000")
    kept = tmp_path / "cache/hub/checkpoints/weights-abc.pt"
    assert not kept.exists()
    assert cached_download(url, "--teacher x", digest[:8]) == kept and kept.read_bytes() == b"weights"
    source.unlink()
    assert cached_download(url, "--teacher x", digest[:8]) == kept  # nothing is fetched again
