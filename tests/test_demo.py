"""The demo, from the shipped teacher to picture and table, in the processes that a user would start."""

import json
import os
import signal
from pathlib import Path

import pytest
from helpers import refused, spawn, start, state_of, waits_until


def test_a_folder_of_other_files_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("mine")
    before = state_of(tmp_path)
    assert f"--out {tmp_path}: the folder holds other files" in refused(capsys, "demo.py", "--out", tmp_path)
    assert f"--out {tmp_path}/thesis.tex: is a file" in refused(capsys, "demo.py", "--out", tmp_path / "thesis.tex")
    assert state_of(tmp_path) == before


def naming(text: str) -> list[int]:
    """Processes with a text in their command line."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes()
        except OSError:  # it has just ended
            continue
        if text.encode() in words:
            found.append(int(entry.name))
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks at Linux's list of processes")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_demo_that_is_killed_leaves_no_process_behind(how, tmp_path):
    out = tmp_path / "demo"
    process = start("demo.py", "--out", out, "--num-trajectories", 10**6)
    assert waits_until(lambda: (out / "trajectories/.lock").exists())  # its ranks are at work
    assert len(naming(str(out))) >= 3  # the demo, torchrun, a rank
    os.kill(process.pid, how)
    process.wait(60)
    assert waits_until(lambda: not naming(str(out)), 60)


@pytest.mark.slow
def test_the_smallest_demo_makes_every_row_and_a_second_run_finds_all_done(tmp_path):
    small = ("--iterations", 2, "--gan-iterations", 2, "--num-trajectories", 70, "--num-samples", 70)
    command = ("demo.py", *small, "--gan", "--out", tmp_path / "demo")
    done = spawn(*command)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "demo/table.json").read_text())
    assert [row["model"] for row in rows] == ["teacher", *["step distillation", "ARD"] * 2]
    assert [row["loss"] for row in rows] == ["-", "R", "R", "R+D", "R+D"]
    for row in rows:
        assert {"steps", "nfe", "fid", "degradation", "precision", "recall", "ms_per_sample", "target"} <= row.keys()
        assert row["fid"] > 0 and row["ms_per_sample"] > 0
    table = (tmp_path / "demo/table.md").read_text()
    assert "| ARD | R | x0 |" in table and (tmp_path / "demo/samples.png").stat().st_size > 1000
    # A second run finds everything done, and the table is the same but for the times.
    checkpoints = {path: path.stat().st_mtime_ns for path in (tmp_path / "demo").rglob("*.pt")}
    assert len(checkpoints) == 4 and all(path.name == "0000002.pt" for path in checkpoints)
    assert spawn(*command).returncode == 0
    assert {path: path.stat().st_mtime_ns for path in checkpoints} == checkpoints
    again = json.loads((tmp_path / "demo/table.json").read_text())
    assert [row["fid"] for row in again] == [row["fid"] for row in rows]
