"""Bad input gets one sentence that names option and value, exit code 2, no traceback, and nothing is written."""

import json

import pytest
import torch
from conftest import SMALL, call, random_teacher, save_teacher, spawn

from stores import checkpoints


@pytest.fixture(scope="module")
def bad(tmp_path_factory, store, teacher_file, student_file):
    """A folder of things that are wrong, each in one way."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "empty").mkdir()
    (folder / "text.pt").write_text("not a checkpoint")
    (folder / "half.pt").write_bytes(teacher_file.read_bytes()[:5000])
    save_teacher(folder / "other.pt", random_teacher(seed=1))
    for source, name in ((teacher_file, "nan.pt"), (student_file, "nan_student.pt")):
        content = checkpoints.load(source, "")
        next(v for v in content["ema"].values() if v.is_floating_point() and v.ndim > 1).view(-1)[0] = float("nan")
        torch.save(content, folder / name)
    for name in ("truncated", "unfinished"):
        (folder / name).mkdir()
        for path in store.iterdir():
            (folder / name / path.name).write_bytes(path.read_bytes())
    shard = folder / "truncated/shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    (folder / "unfinished/manifest.json").unlink()
    (folder / "run").mkdir()
    (folder / "run/config.json").write_text(json.dumps({"kind": "student", "model": {"steps": 2}}))
    (folder / "notes").mkdir()
    (folder / "notes/letter.txt").write_text("mine")
    return folder


TRAIN = ("train_ARD.py", *SMALL, "--iterations", 2, "--run-dir", "OUT", "--data-path", "STORE")
TEACH = (
    "train.py",
    *SMALL[2:],
    "--iterations",
    2,
    "--run-dir",
    "OUT",
    "--model",
    "DiT-Nano/2",
    "--data-path",
    "digits",
)
DUMP = ("sample_trajectory.py", "--num-trajectories", 4, "--teacher", "TEACHER", "--out", "OUT")
SAMPLE = ("sample_ARD.py", "--num-samples", 4, "--ckpt-path", "STUDENT", "--out", "OUT.npz")
TEACHER_SAMPLE = ("sample.py", "--num-samples", 4, "--teacher", "TEACHER", "--out", "OUT.npz")

CASES = {
    "missing folder": (TRAIN, ["--data-path", "BAD/none"], "--data-path BAD/none"),
    "empty folder": (TRAIN, ["--data-path", "BAD/empty"], "empty"),
    "truncated store": (TRAIN, ["--data-path", "BAD/truncated"], "shard-00001"),
    "unfinished store": (TRAIN, ["--data-path", "BAD/unfinished"], "unfinished"),
    "another teacher": (TRAIN, ["--teacher", "BAD/other.pt"], "teacher_hash"),
    "another model": (TRAIN, ["--model", "DiT-XL/2"], "--model DiT-XL/2"),
    "N > depth": (TRAIN, ["--stack", 4], "--stack 4"),
    "S not in the store": (TRAIN, ["--steps", 3], "--steps 3"),
    "no such grid": (TRAIN, ["--steps", 2, "--grid", "authors"], "--grid authors"),
    "grid not in the store": (TRAIN, ["--grid", "authors"], "[10, 15, 20, 25]"),
    "unknown mask": (TRAIN, ["--mask", "M5"], "M5"),
    "zero iterations": (TRAIN, ["--iterations", 0], "--iterations"),
    "batch below accumulation": (TRAIN, ["--accumulation", 99], "--global-batch-size 8"),
    "another run": (TRAIN, ["--run-dir", "BAD/run"], "model.steps is 2 there and 4 here"),
    "other files": (TRAIN, ["--run-dir", "BAD/notes"], "--run-dir BAD/notes"),
    "no such device": (TRAIN, ["--device", "tpu"], "--device tpu"),
    "no such gpu": (TRAIN, ["--device", "cuda:77"], "--device cuda:77"),
    "size not divisible": (TEACH, ["--model", "DiT-Nano/4", "--image-size", 8, "--data-path", "BAD/none"], "BAD/none"),
    "no classes": (TEACH, ["--data-path", "BAD/notes", "--image-size", 8], "sub-folder"),
    "no image size": (TEACH, ["--data-path", "BAD/notes"], "--image-size"),
    "missing teacher": (DUMP, ["--teacher", "BAD/none.pt"], "--teacher BAD/none.pt"),
    "not a checkpoint": (DUMP, ["--teacher", "BAD/text.pt"], "BAD/text.pt"),
    "half a checkpoint": (DUMP, ["--teacher", "BAD/half.pt"], "BAD/half.pt"),
    "NaN in a teacher": (DUMP, ["--teacher", "BAD/nan.pt"], "NaN"),
    "a student as teacher": (DUMP, ["--teacher", "STUDENT"], "student"),
    "dump over other files": (DUMP, ["--out", "BAD/notes"], "--out BAD/notes"),
    "dump over another dump": (DUMP, ["--out", "STORE"], "count is 50 there and 4 here"),
    "too many solver steps": (DUMP, ["--solver-steps", 2000], "2000"),
    "NaN in a student": (SAMPLE, ["--ckpt-path", "BAD/nan_student.pt"], "NaN"),
    "a teacher as student": (SAMPLE, ["--ckpt-path", "TEACHER"], "teacher"),
    "contradicting N": (SAMPLE, ["--stack", 3], "history_layers is 2 there and 3 here"),
    "contradicting model": (SAMPLE, ["--model", "DiT-XL/2"], "depth is 3 there and 28 here"),
    "labels out of range": (SAMPLE, ["--class-labels", 3, 10], "--class-labels [3, 10]"),
    "not an npz": (SAMPLE, ["--out", "OUT.zip"], ".npz"),
    "vae for pixels": (TEACHER_SAMPLE, ["--vae", "ema"], "--vae ema"),
    "zero samples": (TEACHER_SAMPLE, ["--num-samples", 0], "--num-samples"),
}


@pytest.mark.parametrize("case", CASES)
def test_one_sentence_and_nothing_written(case, bad, store, teacher_file, student_file, tmp_path, capsys):
    names = {"BAD": bad, "STORE": store, "TEACHER": teacher_file, "STUDENT": student_file, "OUT": tmp_path / "out"}

    def fill(word) -> str:
        for name, path in names.items():
            word = str(word).replace(name, str(path))
        return str(word)

    command, changes, expected = CASES[case]
    before = {path for folder in (bad, tmp_path, store) for path in folder.rglob("*")}
    with pytest.raises(SystemExit) as stop:
        call(*(fill(word) for word in command), *(fill(word) for word in changes))
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.count("\n") == 1 and "error: " in error and fill(expected) in error
    assert {path for folder in (bad, tmp_path, store) for path in folder.rglob("*")} == before


@pytest.mark.slow
def test_no_traceback_in_a_real_process(bad, store):
    done = spawn("train_ARD.py", "--data-path", store, "--stack", 99)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--stack 99" in done.stderr


def test_image_size_that_the_patches_do_not_divide(tmp_path, capsys):
    from PIL import Image

    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (20, 30)).save(tmp_path / "images" / name / "1.png")
    with pytest.raises(SystemExit) as stop:
        call("train.py", "--model", "DiT-Nano/2", "--data-path", tmp_path / "images", "--image-size", 9)
    assert stop.value.code == 2 and "size 9 is not divisible" in capsys.readouterr().err


@pytest.mark.parametrize("command", [TRAIN, TEACH, DUMP, SAMPLE, TEACHER_SAMPLE], ids=lambda command: command[0])
def test_dry_run_prints_the_plan_and_writes_nothing(command, store, teacher_file, student_file, tmp_path, capsys):
    names = {"STORE": store, "TEACHER": teacher_file, "STUDENT": student_file, "OUT": tmp_path / "out"}
    call(*(names.get(word, tmp_path / word if word == "OUT.npz" else word) for word in command), "--dry-run")
    assert isinstance(json.loads(capsys.readouterr().out), dict)
    assert not list(tmp_path.iterdir())
