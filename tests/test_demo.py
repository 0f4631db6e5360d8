"""The scripts as users type them, from teacher to table, in their own processes."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, call, spawn

from stores import checkpoints

TEACHER = ROOT / "assets/digits_teacher.pt"


@pytest.mark.slow
def test_demo_at_its_smallest(tmp_path):
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


@pytest.fixture(scope="module")
def six_layers(tmp_path_factory) -> Path:
    """A store of the shipped teacher, which is six blocks deep, as --stack=6 needs."""
    folder = tmp_path_factory.mktemp("six") / "store"
    call("sample_trajectory.py", "--teacher", TEACHER, "--out", folder, "--num-trajectories", 64)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_authors_commands_run_as_they_are(ranks, six_layers, tmp_path):
    small = ("--data-path", six_layers, "--iterations", 2, "--results-dir", tmp_path)
    done = spawn("train_ARD.py", "--model", "DiT-Micro/2", "--global-batch-size=64", "--stack=6", *small, ranks=ranks)
    assert done.returncode == 0, done.stderr
    weights = tmp_path / "000-DiT-Micro-2/checkpoints/0000002.pt"
    config = checkpoints.load(weights, "")["config"]
    assert config["model"]["history_layers"] == 6 and config["model"]["mask"] == "M4" and config["model"]["steps"] == 4
    done = spawn("sample_ARD.py", "--stack=6", f"--ckpt_path={weights}", "--num-samples", 5, ranks=ranks)
    assert done.returncode == 0, done.stderr
    with np.load(weights.parent / "0000002-ema-seed0-5.npz", allow_pickle=False) as file:
        assert file["arr_0"].shape == (5, 8, 8, 3)


def test_shipped_teacher_says_how_it_was_made():
    content = checkpoints.load(TEACHER, "")
    assert set(content) == {"config", "step", "ema"} and content["step"] == 12_000
    assert TEACHER.stat().st_size < 5e6
    assert content["config"]["training"]["lr"] == 5e-4 and content["config"]["provenance"]["data"] == "digits"


def test_metrics_carry_the_provenance_of_the_samples(tmp_path, six_layers):
    call("stores.trajectories", "export", six_layers, "--out", tmp_path / "teacher.npz")
    call("evaluations.digits", "reference", "--out", tmp_path / "digits.npz")
    call("evaluations.evaluator", tmp_path / "digits.npz", tmp_path / "teacher.npz", "--features", "digits",
         "--json", tmp_path / "metrics.json")  # fmt: skip
    samples = json.loads((tmp_path / "metrics.json").read_text())["provenance"]["samples"]
    assert {"teacher_hash", "cfg_scale", "solver_steps", "solver_indices", "seed"} <= samples.keys()
