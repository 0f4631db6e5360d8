"""Run folders: found again by their config, never mixed, continued from any version."""

import json
from threading import Event

import pytest
import torch
from helpers import SMALL, as_old_run, as_old_store, assert_equal, call, checkpoint, gan_options, losses, scalars

from runtime.cli import UserError
from runtime.distributed import DistributedContext
from stores import checkpoints
from stores.runs import RunFolder, find_run, read_config

CONFIG = {"kind": "teacher", "model": {"depth": 3, "hidden_size": 32, "num_heads": 2, "patch_size": 2}, "lr": 1.0}


def folder(config: dict, results, run_dir=None) -> RunFolder:
    return RunFolder(config, DistributedContext(), results_dir=str(results), run_dir=run_dir and str(run_dir))


def test_runs_are_numbered_and_found_by_their_config(tmp_path):
    first = folder(CONFIG, tmp_path)
    assert first.path == tmp_path / "000-DiT-Nano-2" and first.newest_checkpoint() is None
    other = folder(CONFIG | {"lr": 2.0}, tmp_path)
    assert other.path == tmp_path / "001-DiT-Nano-2"
    assert folder(CONFIG, tmp_path).path == first.path and folder(CONFIG | {"lr": 2.0}, tmp_path).path == other.path
    (tmp_path / "007-notes").mkdir()
    unknown = CONFIG | {"model": {"depth": 5}}
    assert find_run(unknown, str(tmp_path), None) == tmp_path / "008-DiT"
    assert read_config(other.path) == CONFIG | {"lr": 2.0} and read_config(tmp_path / "007-notes") is None


def test_a_folder_of_another_run_or_of_other_files_is_refused(tmp_path):
    run = tmp_path / "run"
    folder(CONFIG, tmp_path, run)
    assert folder(CONFIG, tmp_path, run).path == run
    with pytest.raises(UserError, match=r"holds another run: lr is 1.0 there and 2.0 here$"):
        folder(CONFIG | {"lr": 2.0}, tmp_path, run)
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters/one.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other files than a run"):
        folder(CONFIG, tmp_path, tmp_path / "letters")
    (tmp_path / "empty").mkdir()
    assert folder(CONFIG, tmp_path, tmp_path / "empty").path == tmp_path / "empty"


def test_the_snapshot_is_the_newest_until_a_checkpoint_replaces_it(tmp_path):
    run = folder(CONFIG, tmp_path)
    run.save_checkpoint(5, {"model": {}})
    run.save_snapshot(7, {"model": {}})
    run.background.wait()
    file, content = run.newest_checkpoint()
    assert file.name == "latest.pt" and content == {"config": CONFIG, "step": 7, "model": {}}
    run.save_checkpoint(10, {"model": {}})
    run.background.wait()
    assert run.newest_checkpoint()[0].name == "0000010.pt" and not (run.path / "checkpoints/latest.pt").exists()
    assert run.preview(10) == run.path / "samples/0000010.png"


def test_a_checkpoint_is_what_was_there_when_it_was_saved(tmp_path, monkeypatch):
    run, weights, trained, save = folder(CONFIG, tmp_path), torch.zeros(3), Event(), checkpoints.save
    monkeypatch.setattr(checkpoints, "save", lambda *args: trained.wait(60) and save(*args))
    run.save_checkpoint(1, {"model": {"w": weights}, "opt": {"groups": [{"lr": 0.5, "moments": [weights]}]}})
    weights += 1  # training goes on, and only then is the file written
    trained.set()
    run.background.wait()
    content = checkpoint(run.path, 1)
    assert content["model"]["w"].tolist() == content["opt"]["groups"][0]["moments"][0].tolist() == [0, 0, 0]
    assert content["opt"]["groups"][0]["lr"] == 0.5


def test_log_lines_are_words_and_numbers(tmp_path):
    run = folder(CONFIG, tmp_path)
    run.log("a remark")
    run.log_scalars("step", 3, {"loss": 0.123456789, "steps/s": 2.0})
    run.log_scalars("eval", 3, {"fid": 1e-9})
    lines = (run.path / "log.txt").read_text().splitlines()
    assert lines == ["a remark", "step 0000003 loss 0.123457 steps/s 2", "eval 0000003 fid 1e-09"]


@pytest.mark.parametrize("named", [True, False])
def test_a_run_of_an_earlier_version_is_continued_to_the_bit(store, tmp_path, named):
    """Store, config.json and checkpoint as they were written then; what comes out is what one run of today gives."""
    old = as_old_store(store, tmp_path / "old_store")
    where = ("--run-dir", tmp_path / "runs/000-run") if named else ("--results-dir", tmp_path / "runs")
    command = ("train_ARD.py", "--data-path", old, *SMALL)
    call(*command, "--iterations", 3, "--run-dir", tmp_path / "begun")
    run = as_old_run(tmp_path / "begun", tmp_path / "runs/000-run")
    assert "points" in json.loads((run / "config.json").read_text())["provenance"]
    call(*command, "--iterations", 6, *where)
    call(*command, "--iterations", 6, "--run-dir", tmp_path / "whole")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["000-run"]
    assert_equal(checkpoint(run, 6), checkpoint(tmp_path / "whole", 6))
    assert losses(run) == losses(tmp_path / "whole")


def test_a_student_of_an_earlier_version_is_fine_tuned_as_todays(store, student_file, tmp_path):
    old = as_old_run(student_file.parent.parent, tmp_path / "old")
    for name, file in {"then": old / "checkpoints" / student_file.name, "now": student_file}.items():
        call("train_ARD_gan.py", *gan_options(store, file, iterations=2, run_dir=tmp_path / name))
    then, now = scalars(tmp_path / "then"), scalars(tmp_path / "now")
    assert [step["loss"] for step in then] == [step["loss"] for step in now] and len(now) == 2
    assert read_config(tmp_path / "then") == read_config(tmp_path / "now")
