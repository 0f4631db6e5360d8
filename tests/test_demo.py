"""The demo, from the shipped teacher to picture and table, in the processes that a user would start."""

import json

import pytest
from helpers import spawn


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
