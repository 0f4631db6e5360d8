"""Pieces of work as processes: what is there is not made again, a failure costs only what needs it."""

import _thread
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from helpers import ROOT

from lab.experiments import Piece, Student, run_pieces
from lab.worlds import DIGITS

WRITE = (
    "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text('made'); open(sys.argv[2], 'a').write(sys.argv[1] + ' ')"
)


def piece(folder: Path, name: str, *needs: str, code: str = WRITE) -> Piece:
    """A process that makes a file and leaves a line in the log."""
    made = folder / name
    return Piece(["python", "-c", code, made, folder / "log"], made, tuple(folder / need for need in needs))


def log(folder: Path) -> list[str]:
    return [Path(name).name for name in (folder / "log").read_text().split()]


def test_pieces_wait_for_what_they_need_and_are_made_once(tmp_path):
    pieces = [piece(tmp_path, "c", "b"), piece(tmp_path, "b", "a"), piece(tmp_path, "a")]
    assert run_pieces(pieces, jobs=2) == [] and log(tmp_path) == ["a", "b", "c"]
    (tmp_path / "b").unlink()
    assert run_pieces(pieces, jobs=2) == [] and log(tmp_path) == ["a", "b", "c", "b"]


def test_a_failure_is_told_and_costs_only_what_needs_it(tmp_path, capsys):
    bad = piece(tmp_path, "bad", code="print('much'); print('no such thing'); raise SystemExit(2)")
    failed = run_pieces([bad, piece(tmp_path, "child", "bad"), piece(tmp_path, "other")], jobs=1)
    assert log(tmp_path) == ["other"] and len(failed) == 2
    assert "exit code 2" in failed[0] and "no such thing" in failed[0] and "not begun" in failed[1]
    lazy = run_pieces([piece(tmp_path, "lazy", code="pass")])  # ends well, but makes nothing
    assert len(lazy) == 1 and "exit code 0" in lazy[0]


def test_an_interrupted_call_ends_its_processes_and_the_next_continues(tmp_path):
    slow = "import sys, time; open(sys.argv[1] + '.begun', 'w').close(); time.sleep(600)"
    pieces = [piece(tmp_path, "a"), piece(tmp_path, "b", "a", code=slow)]

    def interrupt() -> None:
        while not (tmp_path / "b.begun").exists():
            time.sleep(0.02)
        _thread.interrupt_main()

    thread, started = threading.Thread(target=interrupt), time.monotonic()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job in the background ignores it
    try:
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            run_pieces(pieces, jobs=2)
    finally:
        signal.signal(signal.SIGINT, before)
    thread.join()
    assert time.monotonic() - started < 300 and log(tmp_path) == ["a"]  # the process was ended, not waited for
    assert run_pieces([pieces[0], piece(tmp_path, "b", "a")]) == [] and log(tmp_path) == ["a", "b"]


def test_a_student_says_where_its_files_lie(tmp_path):
    student = Student(DIGITS, tmp_path, "mine", 30)
    assert student.weights == tmp_path / "mine/checkpoints/0000030.pt" and student.samples == tmp_path / "mine.npz"
    tuned = student.tuned(5)
    assert (tuned.name, tuned.loss, tuned.weights.name) == ("mine-gan", "R+D", "0000005.pt")
    assert (str(student), student.steps) == ("ARD (R), target x0", 4)
    for blind in ({"mask": "M1"}, {"stack": 0}):
        assert Student(DIGITS, tmp_path, "m", 1, **blind).method == "step distillation"


@pytest.mark.parametrize("module", ["demo", "lab.report.page", "docs.figures"])
def test_figures_are_files_whatever_a_shell_says_of_notebooks(module):
    for backend in ("module://matplotlib_inline.backend_inline", "no such backend"):
        done = subprocess.run(
            [sys.executable, "-c", f"import {module}, matplotlib; print(matplotlib.get_backend())"],
            env=os.environ | {"MPLBACKEND": backend}, cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0 and done.stdout.lower() == "agg\n", done.stderr
