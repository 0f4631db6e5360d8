"""Samplers: exact counts, independence of batch size and ranks, continuation after kill -9."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, call, spawn

from runtime.randomness import labels, noise
from stores import checkpoints
from stores.images import from_uint8, to_uint8


def arrays(path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def test_samples_are_those_of_the_model(student_file, tmp_path):
    call("sample_ARD.py", "--ckpt-path", student_file, "--num-samples", 23, "--out", tmp_path / "s.npz", "--seed", 5)
    found = arrays(tmp_path / "s.npz")
    student, _ = checkpoints.load_student(student_file)
    with torch.no_grad():
        wanted = student.sample(noise(5, "sample", range(23), (1, 8, 8)), labels(5, range(23), 10))[:, -1]
    images = to_uint8(wanted).permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy()
    assert found["arr_0"].shape == (23, 8, 8, 3) and found["arr_0"].dtype == np.uint8
    assert np.abs(found["arr_0"].astype(int) - images).max() <= 1
    assert found["arr_1"].tolist() == [i % 10 for i in range(23)]
    provenance = json.loads(str(found["provenance"]))
    assert {"teacher_hash", "weights_hash", "sample_seed", "cfg_scale", "solver_indices", "target"} <= provenance.keys()
    assert (tmp_path / "s.png").exists() and not (tmp_path / "s.partial").exists()


@pytest.mark.slow
@pytest.mark.parametrize("script, option", [("sample_ARD.py", "--ckpt-path"), ("sample.py", "--teacher")])
def test_batch_size_and_ranks_do_not_matter(script, option, student_file, teacher_file, tmp_path):
    model = {"--ckpt-path": student_file, "--teacher": teacher_file}[option]
    common = (option, model, "--num-samples", 70, "--save-latents", "--seed", 3)
    common += ("--solver-steps", 5) if script == "sample.py" else ()
    for size in (7, 64):
        call(script, *common, "--per-proc-batch-size", size, "--out", tmp_path / f"{size}.npz")
    done = spawn(script, *common, "--per-proc-batch-size", 16, "--out", tmp_path / "ranks.npz", ranks=2)
    assert done.returncode == 0, done.stderr
    first, *others = (arrays(tmp_path / f"{name}.npz") for name in ("7", "64", "ranks"))
    for other in others:
        np.testing.assert_allclose(first["latents"], other["latents"], atol=1e-4)
        assert (first["arr_1"] == other["arr_1"]).all() and len(other["arr_0"]) == 70
    assert len(np.unique(first["latents"].reshape(70, -1), axis=0)) == 70  # nothing twice


@pytest.mark.slow
def test_killed_sampling_continues_and_loses_nothing(teacher_file, tmp_path):
    common = ["--teacher", str(teacher_file), "--num-samples", "600", "--per-proc-batch-size", "20"]
    common += ["--solver-steps", "10", "--out"]
    command = [sys.executable, str(ROOT / "sample.py"), *common, str(tmp_path / "killed.npz")]
    process = subprocess.Popen(command, cwd=ROOT)
    done, deadline = tmp_path / "killed.partial/done.npy", time.monotonic() + 120
    while time.monotonic() < deadline:
        if (tmp_path / "killed.partial/provenance.json").exists() and np.load(done).sum() >= 20:
            break
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert 20 <= np.load(done).sum() < 600 and not (tmp_path / "killed.npz").exists()
    call("sample.py", *common, tmp_path / "killed.npz")
    call("sample.py", *common, tmp_path / "whole.npz")
    killed, whole = arrays(tmp_path / "killed.npz"), arrays(tmp_path / "whole.npz")
    assert np.abs(killed["arr_0"].astype(int) - whole["arr_0"]).max() <= 1
    assert (killed["arr_1"] == whole["arr_1"]).all()


def test_chosen_classes(student_file, tmp_path):
    call("sample_ARD.py", "--ckpt-path", student_file, "--num-samples", 5, "--class-labels", 3, 7,
         "--out", tmp_path / "s.npz")  # fmt: skip
    assert arrays(tmp_path / "s.npz")["arr_1"].tolist() == [3, 7, 3, 7, 3]


def test_finished_samples_are_left_alone_and_others_refused(student_file, tmp_path, capsys):
    command = ("sample_ARD.py", "--ckpt-path", student_file, "--out", tmp_path / "s.npz", "--num-samples")
    call(*command, 4)
    before = (tmp_path / "s.npz").stat().st_mtime_ns
    call(*command, 4)
    assert (tmp_path / "s.npz").stat().st_mtime_ns == before
    with pytest.raises(SystemExit) as stop:
        call(*command, 5)
    assert stop.value.code == 2 and "count is 4 there and 5 here" in capsys.readouterr().err


def test_default_name_lies_beside_the_checkpoint(student_file):
    call("sample_ARD.py", "--ckpt_path", student_file, "--num-samples", 2, "--stack", 2, "--mask", "M4", "--steps", 4)
    assert (student_file.parent / "0000003-ema-seed0-2.npz").exists()


def test_uint8_survives_the_round_trip():
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(from_uint8(every)), every)
