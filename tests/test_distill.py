"""distill.py: from sixty pictures to a pipeline that loads elsewhere; killed twice on the way, it ends with the same
samples as undisturbed; what is wrong is refused before any work, in the words of the command that it is for.
"""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from helpers import ROOT, arrays, call, random_teacher, refused, start
from PIL import Image

TINY = ("--train-iterations", 12, "--student-iterations", 12, "--num-trajectories", 24, "--num-samples", 70,
        "--image-size", 32, "--device", "cpu",
        "--train", "--depth 2 --width 32 --heads 2 --patch 8 --global-batch-size 8 --snapshot-every 2 --log-every 1",
        "--student", "--global-batch-size 8 --stack 1 --snapshot-every 2 --log-every 1",
        "--evaluate", "--features emoji --allow-few")  # fmt: skip


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Sixty small pictures of three classes."""
    folder = tmp_path_factory.mktemp("pictures") / "photos"
    for name in ("apple", "boat", "cat"):
        (folder / name).mkdir(parents=True)
        for i in range(20):
            pixels = np.random.default_rng([i, ord(name[0])]).integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def test_a_dry_run_shows_every_command_and_makes_nothing(photos, tmp_path, capsys):
    call("distill.py", photos, "--out", tmp_path / "out", *TINY, "--gan", "--dry-run")
    plan = json.loads(capsys.readouterr().out)
    assert list(plan["stages"]) == [
        "train", "dump", "student", "adversary", "sample", "teacher", "pipeline", "evaluate"
    ]  # fmt: skip
    assert "--depth 2" in plan["stages"]["train"] and plan["disk_bytes"] > 0
    assert len(plan["cost"]) == 8 and "hours" in plan["cost"][-1]
    assert not (tmp_path / "out").exists()


def test_paths_are_those_of_the_working_folder(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(photos.parent)
    call("distill.py", photos.name, "--out", "out", *TINY, "--dry-run")
    train = json.loads(capsys.readouterr().out)["stages"]["train"]
    assert f"--data-path {photos} " in train and f"--run-dir {photos.parent / 'out/teacher'} " in train


def test_a_process_reaches_the_teacher_that_is_trained_or_given(photos, tmp_path, capsys):
    call("distill.py", photos, "--out", tmp_path / "out", *TINY, "--teacher-process", "sit", "--dry-run")
    stages = json.loads(capsys.readouterr().out)["stages"]
    assert "--process sit" in stages["train"] and "--teacher-process" not in stages["dump"]
    bare = tmp_path / "bare.pt"
    torch.save(random_teacher(input_size=32, in_channels=3, num_classes=3).state_dict(), bare)
    given = ("--out", tmp_path / "out", *TINY[2:-6], *TINY[-4:], "--teacher", bare)
    assert "give --teacher-process: ddpm (a DiT) or sit" in refused(capsys, "distill.py", photos, *given)
    call("distill.py", photos, *given, "--teacher-process", "sit", "--dry-run")
    stages = json.loads(capsys.readouterr().out)["stages"]
    assert all("--teacher-process sit" in stages[name] for name in ("dump", "teacher"))


@pytest.mark.parametrize(
    "words, expected",
    [
        (("--student", "--no-such-option 3"), "--no-such-option"),
        (("--train", "--iterations 5"), "--train: give --train-iterations instead of --iterations in it"),
        (("--train", "--lr nothing"), "'nothing' must be a number"),
        (("--out", "/proc/x"), "--out /proc/x"),
        (("--gan", "--adversary", "--global-batch-size 7 --bn-group 2"), "cut the groups of --bn-group 2"),
        (("--epochs", 3), "did you mean --train-iterations?"),
        (("--vae", ROOT / "README.md"), "README.md: no such folder"),
        (("--init", ROOT / "assets/t2i_teacher.pt"), "t2i_teacher.pt: reads text, give a model of classes"),
        (("--teacher", ROOT / "assets/t2i_teacher.pt"), "t2i_teacher.pt: reads text, give a model of classes"),
    ],
)
def test_what_is_wrong_is_refused_before_any_work(words, expected, photos, tmp_path, capsys):
    error = refused(capsys, "distill.py", photos, "--out", tmp_path / "out", *TINY, *words)
    assert expected in error and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_killed_twice_it_ends_as_undisturbed_with_a_pipeline_for_elsewhere(photos, tmp_path):
    command = ("distill.py", photos, *TINY, "--out")
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    call(*command, calm)
    for run in ("teacher", "student"):
        process = start(*command, killed)
        while not list((killed / run / "checkpoints").glob("*.pt")) and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL if run == "teacher" else signal.SIGINT)
        process.wait()
        time.sleep(1)  # its children end with it
    call(*command, killed)
    assert np.array_equal(arrays(calm / "student.npz")["arr_0"], arrays(killed / "student.npz")["arr_0"])
    card = (killed / "pipeline/README.md").read_text()
    assert card.count("## Samples") == 1 and "| fid |" in card and (killed / "pipeline/samples.png").is_file()
    code = (
        "import sys, diffusers; pipe = diffusers.DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)"
    )
    code += "; print(pipe(class_labels=[2]).images[0].size, sorted(pipe.labels))"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, "-c", code, killed / "pipeline"]
    shown = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert shown.returncode == 0 and "(32, 32) ['apple', 'boat', 'cat']" in shown.stdout, shown.stderr
    for warning in ("packages that were not found", "Expected types"):  # of our own folders, of the code's second copy
        assert warning not in shown.stderr
    with pytest.raises(SystemExit):  # what is made stands: other options want another folder
        call("distill.py", photos, *TINY, "--num-trajectories", 30, "--out", killed)
