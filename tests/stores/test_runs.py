"""Run folders: found again by their config, never mixed, continued from any version.

Folders: numbers, configs, others' files. Checkpoints and snapshots: which is newest, damaged, kept, copied.
Then two trainings at once, and ranks without a common folder.
"""

import shutil
import time
from datetime import timedelta
from threading import Event

import pytest
import torch
from helpers import ROOT, SMALL, assert_equal, call, call_on_ranks, checkpoint, spawn, start

from runtime import distributed
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
    run.save(5, {"model": {}}, kept=True)
    run.save(7, {"model": {}}, kept=False)
    run.background.wait()
    file, content = run.newest_checkpoint()
    assert file.name == "latest.pt" and content == {"config": CONFIG, "step": 7, "model": {}}
    run.save(10, {"model": {}}, kept=True)
    run.background.wait()
    assert run.newest_checkpoint()[0].name == "0000010.pt" and not (run.path / "checkpoints/latest.pt").exists()
    drawn = []
    run.add_preview(10, drawn.append)
    assert drawn == [run.path / "samples/0000010.png"]


def test_a_checkpoint_is_what_was_there_when_it_was_saved(tmp_path, monkeypatch):
    run, weights, trained, save = folder(CONFIG, tmp_path), torch.zeros(3), Event(), checkpoints.save
    monkeypatch.setattr(checkpoints, "save", lambda *args: trained.wait(60) and save(*args))
    run.save(1, {"model": {"w": weights}, "opt": {"groups": [{"lr": 0.5, "moments": [weights]}]}}, kept=True)
    weights += 1  # training goes on, and only then is the file written
    trained.set()
    run.background.wait()
    content = checkpoint(run.path, 1)
    assert content["model"]["w"].tolist() == content["opt"]["groups"][0]["moments"][0].tolist() == [0, 0, 0]
    assert content["opt"]["groups"][0]["lr"] == 0.5


def test_the_last_state_is_written_without_a_copy(tmp_path, monkeypatch):
    run, weights, written, save = folder(CONFIG, tmp_path), torch.ones(3), [], checkpoints.save
    monkeypatch.setattr(checkpoints, "save", lambda path, content: written.append(content) or save(path, content))
    run.save(1, {"model": {"w": weights}}, kept=False)
    run.save(2, {"model": {"w": weights}}, kept=True, last=True)
    run.background.wait()
    assert [content["model"]["w"].data_ptr() == weights.data_ptr() for content in written] == [False, True]
    assert checkpoint(run.path, 2)["model"]["w"].tolist() == [1, 1, 1]


def test_log_lines_are_words_and_numbers(tmp_path):
    run = folder(CONFIG, tmp_path)
    run.log("a remark")
    run.log_scalars("step", 3, {"loss": 0.123456789, "steps/s": 2.0})
    run.log_scalars("eval", 3, {"fid": 1e-9})
    lines = (run.path / "log.txt").read_text().splitlines()
    assert lines == ["a remark", "step 0000003 loss 0.123457 steps/s 2", "eval 0000003 fid 1e-09"]


@pytest.fixture(scope="module")
def three_steps(store, tmp_path_factory):
    """A run of three steps, each of which is kept."""
    run = tmp_path_factory.mktemp("three") / "run"
    call("train_ARD.py", "--data-path", store, *SMALL, "--iterations", 3, "--ckpt-every", 1, "--run-dir", run)
    return run


@pytest.mark.parametrize("damage", ["flipped", "half", "empty"])
def test_a_damaged_snapshot_is_passed_over_and_the_run_ends_as_it_would(damage, store, three_steps, tmp_path, capsys):
    run = shutil.copytree(three_steps, tmp_path / "run")
    newest = run / "checkpoints/0000003.pt"
    content = newest.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    newest.unlink()
    (run / "checkpoints/latest.pt").write_bytes({"flipped": flipped, "half": content[:middle], "empty": b""}[damage])
    options = ("train_ARD.py", "--data-path", store, *SMALL, "--ckpt-every", 1, "--iterations", 3)
    call(*options, "--run-dir", run)
    said = capsys.readouterr().out
    assert f"warning: --run-dir {run}/checkpoints/latest.pt: not a readable checkpoint (" in said
    assert "trying the one before it" in said and "step 2 to 3" in said and said.count("warning") == 1
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [f"000000{i}.pt" for i in (1, 2, 3)]
    assert_equal(checkpoint(run, 3), checkpoint(three_steps, 3))


def test_a_run_none_of_whose_checkpoints_can_be_read_is_not_begun_anew(store, three_steps, tmp_path, capsys):
    run = shutil.copytree(three_steps, tmp_path / "run")
    for path in (run / "checkpoints").iterdir():
        path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(SystemExit) as stop:
        call("train_ARD.py", "--data-path", store, *SMALL, "--iterations", 4, "--run-dir", run)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert f"--run-dir {run}: none of its checkpoints can be read; remove them to start anew" in error


def test_keep_leaves_the_newest_checkpoints_only(store, tmp_path):
    command = ("train_ARD.py", "--data-path", store, *SMALL, "--iterations", 5, "--ckpt-every", 1, "--keep", 2,
               "--snapshot-every", 1, "--run-dir", tmp_path)  # fmt: skip
    call(*command)
    files = tmp_path / "checkpoints"
    assert sorted(path.name for path in files.iterdir()) == ["0000004.pt", "0000005.pt"]
    shutil.copyfile(files / "0000004.pt", files / "0000003.pt")  # killed between the last one and this one's removal
    call(*command)
    assert sorted(path.name for path in files.iterdir()) == ["0000004.pt", "0000005.pt"]


@pytest.mark.parametrize("content", [b"", b"[1, 2]", b'{"kind": ', b"\xff\xfe", b"null"])
def test_a_damaged_config_of_one_run_does_not_stop_another(content, tmp_path):
    first = folder(CONFIG, tmp_path)
    (first.path / "config.json").write_bytes(content)
    other = folder(CONFIG | {"lr": 2.0}, tmp_path)
    assert other.path == tmp_path / "001-DiT-Nano-2" and folder(CONFIG, tmp_path).path == tmp_path / "002-DiT-Nano-2"
    assert (first.path / "config.json").read_bytes() == content
    with pytest.raises(UserError, match="holds other files than a run"):
        folder(CONFIG, tmp_path, first.path)


@pytest.mark.parametrize("left", [(), ("checkpoints",), ("checkpoints", "config.json.partial"), (".lock",)])
def test_a_folder_of_a_run_that_was_killed_before_its_config_was_there_is_taken_up(left, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for name in left:
        (run / name).mkdir() if name == "checkpoints" else (run / name).write_text("")
    assert folder(CONFIG, tmp_path, run).path == run and read_config(run) == CONFIG


def test_a_finished_run_that_is_asked_for_again_is_not_held(store, three_steps, tmp_path):
    run = shutil.copytree(three_steps, tmp_path / "run")
    before = sorted(path.name for path in run.iterdir())
    call("train_ARD.py", "--data-path", store, *SMALL, "--iterations", 3, "--ckpt-every", 1, "--run-dir", run)
    assert sorted(path.name for path in run.iterdir()) == before


#################################################################################
#                              Several processes                                #
#################################################################################


@pytest.mark.slow
def test_of_two_equal_trainings_at_once_one_runs_and_the_other_says_who(store, tmp_path):
    options = ("train_ARD.py", "--data-path", store, *SMALL, "--log-every", 100, "--run-dir", tmp_path / "run")
    first = start(*options, "--iterations", 3000)
    try:
        while first.poll() is None and not (tmp_path / "run/log.txt").exists():
            time.sleep(0.05)
        second = spawn(*options, "--iterations", 3000)
        assert second.returncode == 2 and second.stdout == "" and second.stderr.count("\n") == 1, second.stderr
        assert f"--run-dir {tmp_path / 'run'}: process {first.pid} on " in second.stderr
        assert first.poll() is None
    finally:
        first.terminate()
        first.communicate(timeout=60)
    assert first.returncode == 1 and not (tmp_path / "run/.lock").exists()
    assert (tmp_path / "run/checkpoints/latest.pt").exists()


@pytest.mark.slow
def test_two_different_trainings_at_once_get_two_numbers(store, tmp_path):
    common = ("train_ARD.py", "--data-path", store, *SMALL, "--iterations", 3, "--results-dir", tmp_path, "--seed")
    jobs = [start(*common, seed) for seed in (1, 2)]
    said = [job.communicate(timeout=120)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], said
    runs = sorted(tmp_path.iterdir())
    assert [run.name for run in runs] == ["000-DiT-Nano-2", "001-DiT-Nano-2"]
    assert {read_config(run)["training"]["seed"] for run in runs} == {1, 2}
    assert all((run / "checkpoints/0000003.pt").exists() for run in runs)


@pytest.mark.slow
def test_ranks_that_do_not_find_the_main_ranks_checkpoint_end_with_a_sentence(store, tmp_path):
    """Results on the disk of each node: the second rank looks for the relative folder elsewhere."""
    script = tmp_path / "nodes.py"
    script.write_text(
        "import os, sys\n"
        "node = sys.argv.pop(1) + os.environ['RANK']\n"
        "os.makedirs(node, exist_ok=True)\n"
        "os.chdir(node)\n"
        f"sys.path[:0] = [{str(ROOT)!r}]\n"
        "import train_ARD\n"
        "from runtime import cli\n"
        "cli.main(train_ARD.build_parser(), train_ARD.run)\n"
    )
    options = (script, tmp_path / "node", "--data-path", store, *SMALL, "--results-dir", "here", "--iterations")
    done = spawn(*options, 2, ranks=2)
    assert done.returncode == 0, done.stderr
    begun = time.monotonic()
    done = spawn(*options, 4, ranks=2)
    assert done.returncode != 0 and time.monotonic() - begun < 60
    assert "1 of 2 ranks do not find the main rank's checkpoint 0000002.pt; give a folder that all nodes" in done.stderr
    assert not list((tmp_path / "node0").rglob("0000004.pt")) and not list((tmp_path / "node1").rglob("*.pt"))


def test_a_checkpoint_to_resume_from_is_read_and_compared_with_its_checksums_once(tmp_path, monkeypatch):
    run, compared = folder(CONFIG, tmp_path), []
    run.save(7, {"model": {"w": torch.ones(3)}}, kept=False)
    run.background.wait()
    whole = checkpoints.damaged_member
    monkeypatch.setattr(checkpoints, "damaged_member", lambda path: compared.append(path) or whole(path))
    path, content = folder(CONFIG, tmp_path).newest_checkpoint()
    assert content["step"] == 7 and torch.equal(content["model"]["w"], torch.ones(3)) and compared == [path]


@pytest.mark.slow
def test_ranks_wait_for_a_slow_disk_longer_than_for_each_others_steps(store, tmp_path, monkeypatch):
    """The first checkpoint is still being written when the second is due; no rank sits in an exchange meanwhile."""
    write, patience = checkpoints.save, 10

    def slow(path, content):
        if path.name == "0000002.pt":
            time.sleep(2 * patience)
        write(path, content)

    monkeypatch.setattr(checkpoints, "save", slow)
    monkeypatch.setattr(distributed, "TRAINING_TIMEOUT", timedelta(seconds=patience))
    options = ("--data-path", store, *SMALL, "--iterations", 6, "--ckpt-every", 2, "--run-dir", tmp_path / "run")
    assert call_on_ranks(2, "train_ARD.py", *options, "--device", "cpu") == [0, 0]
    assert len(list((tmp_path / "run/checkpoints").glob("*.pt"))) == 3
