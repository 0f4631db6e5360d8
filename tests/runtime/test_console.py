"""A console that is gone: training goes on, plans and help end quietly, and no file takes its place."""

import os
import subprocess
from functools import partial
from pathlib import Path

import pytest
from helpers import ROOT, SMALL, contents, losses, words


def ends(command: list[str], closed: tuple[int, ...] = (), **options) -> tuple[int, str]:
    """Exit code of a command some of whose descriptors are closed, and what it says on standard error."""

    def close() -> None:
        for number in closed:
            os.close(number)

    options = dict(stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) | options
    done = subprocess.run(command, cwd=ROOT, text=True, timeout=300, check=False, preexec_fn=close, **options)
    return done.returncode, done.stderr or ""


def broken_pipe() -> int:
    """A pipe that nobody reads."""
    read, write = os.pipe()
    os.close(read)
    return write


TRAIN = ("--iterations", 4, "--run-dir")


def gone(kind: str) -> dict:
    """Options of a process whose console is gone in some way."""
    return {
        "stdout": {"stdout": broken_pipe()},
        "both": {"stdout": (pipe := broken_pipe()), "stderr": pipe},
        "full": {"stdout": Path("/dev/full").open("w")},
        "closed": {"closed": (0, 1, 2)},
        "stderr closed": {"closed": (2,)},
    }[kind]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["stdout", "both", "full", "closed", "stderr closed"])
def test_training_goes_on_without_a_console(kind, store, tmp_path):
    code, error = ends(words("train_ARD.py", "--data-path", store, *SMALL, *TRAIN, tmp_path / "run"), **gone(kind))
    assert code == 0 and error == ""
    assert len(losses(tmp_path / "run")) == 4 and (tmp_path / "run/checkpoints/0000004.pt").exists()


@pytest.mark.slow
def test_a_reader_that_leaves_in_between_costs_nothing(store, tmp_path):
    command = words("train_ARD.py", "--data-path", store, *SMALL, "--iterations", 300, "--run-dir", tmp_path / "run")
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        process.stdout.close()  # as head does
        assert process.wait(300) == 0 and process.stderr.read() == ""
    assert len(losses(tmp_path / "run")) == 300


@pytest.mark.parametrize("what, kind", [("--help", "stdout"), ("--dry-run", "both"), ("--dry-run", "closed")])
def test_plans_and_help_end_quietly(what, kind, store, tmp_path):
    command = words("train_ARD.py", "--data-path", store, *SMALL, *TRAIN, tmp_path / "run", what)
    assert ends(command, **gone(kind)) == (0, "") and not list(tmp_path.iterdir())


def test_a_mistake_keeps_its_exit_code_where_nobody_hears(tmp_path):
    command = words("train_ARD.py", "--data-path", tmp_path / "none")
    assert ends(command, **gone("both")) == ends(command, **gone("stderr closed")) == (2, "")


@pytest.mark.slow
def test_what_is_written_meanwhile_is_the_same(teacher_file, tmp_path):
    """A library that writes to descriptor 2 would otherwise write into the first file that is opened."""
    dump = partial(words, "sample_trajectory.py", "--teacher", teacher_file, "--num-trajectories", 9, "--out")
    assert ends(dump(tmp_path / "a")) == (0, "") and ends(dump(tmp_path / "b"), (0, 1, 2)) == (0, "")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_names_that_the_console_cannot_show_are_escaped(tmp_path):
    command = words("train_ARD.py", "--data-path", f"{tmp_path}/café" + os.fsdecode(b"\xe9"))
    code, error = ends(command, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert code == 2 and "/caf\\xe9\\udce9: is no text in UTF-8; rename it" in error and error.count("\n") == 1
