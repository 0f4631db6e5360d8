"""Pieces of work as processes: what is there is not made again, a failure costs only what needs it, an interruption
nothing.
"""

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from helpers import ROOT, waits_until

from runtime.cli import RunError, UserError
from runtime.commands import NOTE, Piece, options_of, run_pieces, unmade

WRITE = """
import pathlib, sys
place = pathlib.Path(sys.argv[2])
place.write_text("made")
with (place.parent / "log").open("a") as log:
    log.write(place.name + " ")
"""


def piece(folder: Path, name: str, *needs: Piece, code: str = WRITE, options: tuple = ()) -> Piece:
    """A process that makes a file and leaves a line in the log."""
    script = folder / f"script_{name}.py"
    script.write_text(code)
    return Piece.of(str(script), folder / name, *needs, *options)


def log(folder: Path) -> list[str]:
    return (folder / "log").read_text().split()


def test_pieces_wait_for_what_they_need_and_are_made_once(tmp_path, capsys):
    a = piece(tmp_path, "a")
    b = piece(tmp_path, "b", a)
    pieces = [piece(tmp_path, "c", b), b, a]
    assert unmade(pieces, tmp_path) == pieces
    run_pieces(pieces, tmp_path, jobs=2)
    said = capsys.readouterr().out
    assert log(tmp_path) == ["a", "b", "c"] and unmade(pieces, tmp_path) == []
    assert re.search(rf"\[2/3\] {tmp_path}/b: \d+ s, about 00:\d\d left\n", said) and said.count("$ python") == 3
    (tmp_path / "b").unlink()
    run_pieces(pieces, tmp_path, jobs=2)
    assert log(tmp_path) == ["a", "b", "c", "b"]


def test_a_file_that_other_options_made_is_refused_and_one_of_unknown_origin_is_run_again(tmp_path):
    run_pieces([piece(tmp_path, "a", options=("--speed", 3, "--slow"))], tmp_path)
    with pytest.raises(
        UserError, match="a was made otherwise, --speed 3 there and --speed 4 here; give another folder"
    ):
        unmade([piece(tmp_path, "a", options=("--speed", 4, "--slow"))], tmp_path)
    with pytest.raises(UserError, match="--slow there and --fast here;"):
        unmade([piece(tmp_path, "a", options=("--speed", 3, "--fast"))], tmp_path)
    with pytest.raises(UserError, match="--slow there and no more here;"):
        unmade([piece(tmp_path, "a", options=("--speed", 3))], tmp_path)
    (tmp_path / NOTE).write_text("{ damaged")  # as if nothing were noted
    run_pieces([piece(tmp_path, "a", options=("--speed", 4))], tmp_path)
    assert log(tmp_path) == ["a", "a"]


def test_what_is_made_of_a_file_that_has_changed_since_is_run_again(tmp_path):
    given, out = tmp_path / "weights.pt", tmp_path / "out"
    given.touch(), out.mkdir()
    pieces = [piece(out, "a", options=(given,))]
    run_pieces(pieces, out)
    assert unmade(pieces, out) == []
    os.utime(given, (time.time() + 9,) * 2)
    assert unmade(pieces, out) == pieces


def test_what_is_made_stays_so_where_the_folder_moves_and_the_cores_change(tmp_path):
    made = Piece.of("sample_trajectory.py", tmp_path / "old/store", "--teacher", "t.pt", ranks=4)
    moved = Piece.of("sample_trajectory.py", tmp_path / "new/store", "--teacher", "t.pt", ranks=2)
    assert made.noted(tmp_path / "old") == moved.noted(tmp_path / "new")
    assert (
        str(made).startswith("torchrun --nproc_per_node=4 sample_trajectory.py --out") and made.product.name == "store"
    )
    run = Piece.of("train_ARD.py", tmp_path / "run", "--data-path", made, iterations=30)
    assert run.needs == {tmp_path / "old/store/manifest.json"} and run.makes == tmp_path / "run/checkpoints/0000030.pt"
    assert options_of(run, "tool")["data_path"] == str(tmp_path / "old/store")
    judged = Piece.of("evaluations.evaluator", tmp_path / "a.json", "real.npz", "a.npz")
    assert str(judged) == f"python -m evaluations.evaluator --json {tmp_path}/a.json real.npz a.npz"


def test_a_failure_is_told_and_costs_only_what_needs_it(tmp_path, capsys):
    bad = piece(
        tmp_path, "bad", code="print('much'); print('x: error: no such thing'); print('==='); raise SystemExit(2)"
    )
    with pytest.raises(RunError) as stop:
        run_pieces([bad, piece(tmp_path, "child", bad), piece(tmp_path, "other")], tmp_path)
    assert log(tmp_path) == ["other"] and stop.value.code == 1
    assert str(stop.value).startswith(
        "2 of 3 pieces were not made; the same command tries them again; exit code 2, 'x: e"
    )
    with pytest.raises(RunError, match="exit code 0"):  # it ends well, but makes nothing
        run_pieces([piece(tmp_path, "lazy", code="pass")], tmp_path)


SLOW = """
import os, pathlib, signal, sys, time
def end(number, frame):
    place.with_suffix(".came").open("a").write(f"{number} ")
    time.sleep(0.5)  # in which a second one would be noticed
    sys.exit(1)
place = pathlib.Path(sys.argv[2])
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, end)
place.with_suffix(".begun").touch()
time.sleep(600)
"""


def test_the_ctrl_c_of_a_terminal_reaches_a_command_once_and_the_next_call_continues(tmp_path):
    """A second signal would kill it, before it has kept what it has."""
    a = piece(tmp_path, "a")
    pieces = [a, piece(tmp_path, "b", a, code=SLOW)]
    code = "import sys; from runtime import cli, commands; from pathlib import Path; out = Path(sys.argv[1])\n"
    code += "a = commands.Piece.of(str(out / 'script_a.py'), out / 'a')\n"
    code += "b = commands.Piece.of(str(out / 'script_b.py'), out / 'b', a)\n"
    code += "cli.main(cli.Parser(prog='tool'), lambda args: commands.run_pieces([a, b], out), [])"
    pid, terminal = pty.fork()
    if not pid:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
        os.chdir(ROOT)
        os.execv(sys.executable, [sys.executable, "-c", code, str(tmp_path)])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    assert waits_until((tmp_path / "b.begun").exists)
    time.sleep(1)  # until the bar has been drawn
    os.write(terminal, b"\x03")
    shown = b""
    while b"continues" not in shown:
        shown += os.read(terminal, 1000)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130
    os.close(terminal)
    assert b"50%|" in shown and b"tool: error: interrupted; the same command continues what it can" in shown
    assert (tmp_path / "b.came").read_text().split() == [str(int(signal.SIGTERM))] and log(tmp_path) == ["a"]
    run_pieces([pieces[0], piece(tmp_path, "b", a)], tmp_path)
    assert log(tmp_path) == ["a", "b"] and len(json.loads((tmp_path / NOTE).read_text())) == 2


def test_a_signal_that_comes_while_a_command_is_begun_is_not_lost_and_ends_it(tmp_path):
    """Python drops what is raised in the hooks around a fork, of logging for one."""
    piece(tmp_path, "b", code="import time; time.sleep(600)")
    code = "import os, sys; from runtime import cli, commands; from pathlib import Path; out = Path(sys.argv[1])\n"
    code += "os.register_at_fork(after_in_parent=lambda: os.kill(os.getpid(), 15))\n"
    code += "b = commands.Piece.of(str(out / 'script_b.py'), out / 'b')\n"
    code += "cli.main(cli.Parser(prog='tool'), lambda args: commands.run_pieces([b], out), [])"
    words = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1 and "tool: error: terminated; the same command continues" in done.stderr, done.stderr
