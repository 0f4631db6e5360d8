"""Command lines from end to end: mistakes end in one sentence and write nothing, and right lines work.

A sentence names option and value. ``CASES`` is the table: a right command, what is spoiled in it, words of the sentence
(tests/faults/grammar.py draws more); then numbers, plans, images and latents, and lines that must work.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    NANO_TEACHER,
    SHIPPED_TEACHER,
    SMALL,
    arrays,
    call,
    random_teacher,
    refused,
    save_teacher,
    spawn,
    state_of,
)
from PIL import Image

from stores import checkpoints
from stores.samples import read_provenance


@pytest.fixture(scope="module")
def bad(tmp_path_factory, store, teacher_file, student_file):
    """A folder of things that are wrong, each in one way."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "empty").mkdir()
    (folder / "text.pt").write_text("not a checkpoint")
    (folder / "text.npz").write_text("mine")
    np.savez(folder / "images.npz", arr_0=np.zeros((4, 8, 8, 3), np.uint8))
    (folder / "a.npz").write_bytes(student_file.read_bytes())
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
    (folder / "folder.npz").mkdir()
    (folder / "picture/class").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(folder / "picture/class/a.png")
    (folder / "runs/000-x/checkpoints").mkdir(parents=True)
    (folder / "runs/000-x/checkpoints/0000003.pt").write_bytes(student_file.read_bytes())
    torch.save({"x": os.system}, folder / "code.pt")
    teacher = checkpoints.load(teacher_file, "")
    torch.save(teacher | {"config": {"kind": "teacher"}}, folder / "incomplete.pt")
    torch.save(teacher | {"config": teacher["config"] | {"model": {"size": 3}}}, folder / "odd.pt")
    (folder / "keyless").mkdir()
    (folder / "keyless/manifest.json").write_text(json.dumps({"provenance": {"solver_indices": [1]}, "shards": []}))
    return folder


TRAIN = ("train_ARD.py", *SMALL, "--iterations", 2, "--run-dir", "OUT", "--data-path", "STORE")
TEACH = ("train.py", *NANO_TEACHER, "--iterations", 2, "--run-dir", "OUT", "--data-path", "digits")
DUMP = ("sample_trajectory.py", "--num-trajectories", 4, "--teacher", "TEACHER", "--out", "OUT")
SAMPLE = ("sample_ARD.py", "--num-samples", 4, "--ckpt-path", "STUDENT", "--out", "OUT.npz")
TEACHER_SAMPLE = ("sample.py", "--num-samples", 4, "--teacher", "TEACHER", "--out", "OUT.npz")
TUNE = ("train_ARD_gan.py", *SMALL, "--iterations", 2, "--run-dir", "OUT", "--data-path", "STORE",
        "--real-data-path", "digits", "--ckpt-path", "STUDENT")  # fmt: skip

CASES = {
    # Before anything is read: words and numbers.
    "mask in lower case": (TRAIN, ["--mask", "m4"], "argument --mask: invalid choice: 'm4'"),
    "no such size": (TEACH, ["--model", "DiT-XXL/2"], "argument --model: invalid choice: 'DiT-XXL/2'"),
    "an option of other projects": (TRAIN, ["--epochs", 3], "arguments: --epochs 3; did you mean --iterations?"),
    "half a name": (TRAIN, ["--batch-size=8"], "arguments: --batch-size=8; did you mean --global-batch-size?"),
    "half a name of a sampler": (SAMPLE, ["--batch-size", 8], "did you mean --per-proc-batch-size?"),
    "an option like none": (SAMPLE, ["--zzz", 8], "unrecognized arguments: --zzz 8\n"),
    "training in fp16": (TRAIN, ["--precision", "fp16"], "argument --precision: invalid choice: 'fp16'"),
    "no steps": (TRAIN, ["--steps", 0], "argument --steps: 0 must be at least 1"),
    "a seed of no computer": (DUMP, ["--seed", "1e30"], "argument --seed: 1e30 must be at most"),
    "a million workers": (TRAIN, ["--num-workers", "1e6"], "argument --num-workers: 1e6 must be at most"),
    "no labels": (SAMPLE, ["--class-labels"], "argument --class-labels: expected at least one argument"),
    "a negative label": (SAMPLE, ["--class-labels", -1], "--class-labels -1: this model has labels 0..9"),
    "an empty store": (TRAIN, ["--data-path", ""], "argument --data-path: must not be empty"),
    "a name that no file can have": (DUMP, ["--out", "x" * 300], "argument --out: xxxx"),
    "a time of no schedule": (TUNE, ["--gan-warmup", 0, "--d-time", 1000], "--d-time 1000: must be between 0"),
    "a warm-up without an end": (TUNE, [], "--gan-warmup 3000 (the default): --iterations 2 end before"),
    # Places to write.
    "samples within a file": (SAMPLE, ["--out", "BAD/text.pt/x.npz"], "--out BAD/text.pt: is a file, give a folder"),
    "a run in place of a file": (TRAIN, ["--run-dir", "BAD/text.pt"], "--run-dir BAD/text.pt: is a file"),
    # Room and memory.
    "more than the disk": (DUMP, ["--num-trajectories", "1e12"], "--num-trajectories 1000000000000: 1.16 PB are to be"),
    "more samples than the disk": (SAMPLE, ["--num-samples", "1e13"], "--num-samples 10000000000000: 4 PB are to be"),
    "more checkpoints than the disk": (TRAIN, ["--iterations", "1e12", "--ckpt-every", 1], "with --ckpt-every 1: "),
    "a batch beyond memory": (TRAIN, ["--global-batch-size", "1e10"], "--global-batch-size 10000000000: at least 12.8"),
    "an image beyond memory": (
        TEACH,
        ["--data-path", "BAD/picture", "--image-size", "2e6"],
        "too long to crop 2000000 of",
    ),
    # Files of another kind.
    "a folder of runs": (SAMPLE, ["--ckpt-path", "BAD/runs"], "such as BAD/runs/000-x/checkpoints/0000003.pt"),
    "a run's folder": (SAMPLE, ["--ckpt-path", "BAD/runs/000-x"], "such as BAD/runs/000-x/checkpoints/0000003.pt"),
    "a folder of runs as teacher": (DUMP, ["--teacher", "BAD/runs"], "such as BAD/runs/000-x/checkpoints/0000003.pt"),
    "a text as checkpoint": (DUMP, ["--teacher", "BAD/text.pt"], "(it is no file of torch.save or safetensors)"),
    "code as checkpoint": (DUMP, ["--teacher", "BAD/code.pt"], "(it holds Python objects, which are never loaded)"),
    "an incomplete checkpoint": (DUMP, ["--teacher", "BAD/incomplete.pt"], "it lacks model, vae, provenance, training"),
    "a config of no model": (DUMP, ["--teacher", "BAD/odd.pt"], "its config makes no model"),
    "an incomplete manifest": (TRAIN, ["--data-path", "BAD/keyless"], "its provenance lacks teacher"),
    "an autoencoder that is none": (
        TEACH,
        ["--data-path", "BAD/picture", "--image-size", 8, "--vae", "BAD/notes"],
        "--vae BAD/notes: cannot load",
    ),
    "more guided channels than there are": (DUMP, ["--cfg-channels", 2], "--cfg-channels 2: this teacher has 1"),
    "groups that are cut": (TUNE, ["--gan-warmup", 0, "--bn-group", 5], "cut the groups of --bn-group 5"),
    "no real images": (TUNE, ["--gan-warmup", 0, "--real-data-path", "BAD/none"], "--real-data-path BAD/none: no such"),
    # As the stages find it.
    "missing folder": (TRAIN, ["--data-path", "BAD/none"], "--data-path BAD/none"),
    "truncated store": (TRAIN, ["--data-path", "BAD/truncated"], "shard-00001"),
    "unfinished store": (TRAIN, ["--data-path", "BAD/unfinished"], "unfinished"),
    "another teacher": (TRAIN, ["--teacher", "BAD/other.pt"], "teacher_hash"),
    "another model": (TRAIN, ["--model", "DiT-XL/2"], "--model DiT-XL/2"),
    "N > depth": (TRAIN, ["--stack", 4], "--stack 4"),
    "S not in the store": (TRAIN, ["--steps", 3], "--steps 3"),
    "no such grid": (TRAIN, ["--steps", 2, "--grid", "authors"], "--grid authors"),
    "grid not in the store": (TRAIN, ["--grid", "authors"], "[10, 15, 20, 25]"),
    "batch below accumulation": (TRAIN, ["--accumulation", 99], "--global-batch-size 8"),
    "another run": (TRAIN, ["--run-dir", "BAD/run"], "model.steps is 2 there and 4 here"),
    "other files": (TRAIN, ["--run-dir", "BAD/notes"], "--run-dir BAD/notes"),
    "no such device": (TRAIN, ["--device", "tpu"], "--device tpu"),
    "no such gpu": (TRAIN, ["--device", "cuda:77"], "--device cuda:77"),
    "missing images": (TEACH, ["--image-size", 8, "--data-path", "BAD/none"], "--data-path BAD/none: no such folder"),
    "no classes": (TEACH, ["--data-path", "BAD/notes", "--image-size", 8], "sub-folder"),
    "missing teacher": (DUMP, ["--teacher", "BAD/none.pt"], "--teacher BAD/none.pt"),
    "NaN in a teacher": (DUMP, ["--teacher", "BAD/nan.pt"], "NaN"),
    "a student as teacher": (DUMP, ["--teacher", "STUDENT"], "holds a student, give a checkpoint of a teacher"),
    "dump over other files": (DUMP, ["--out", "BAD/notes"], "--out BAD/notes"),
    "dump over another dump": (DUMP, ["--out", "STORE"], "count is 50 there and 4 here"),
    "too many solver steps": (DUMP, ["--solver-steps", 2000], "2000"),
    "NaN in a student": (SAMPLE, ["--ckpt-path", "BAD/nan_student.pt"], "NaN"),
    "a teacher as student": (SAMPLE, ["--ckpt-path", "TEACHER"], "holds a teacher, give a checkpoint of a student"),
    "contradicting N": (SAMPLE, ["--stack", 3], "history_layers is 2 there and 3 here"),
    "contradicting model": (SAMPLE, ["--model", "DiT-XL/2"], "depth is 3 there and 28 here"),
    "labels out of range": (SAMPLE, ["--class-labels", 3, 10], "--class-labels 10: this model has labels 0..9"),
    "not an npz": (SAMPLE, ["--out", "OUT.zip"], ".npz"),
    "vae for pixels": (TEACHER_SAMPLE, ["--vae", "ema"], "--vae ema"),
    "a file for the folder of runs": (
        TEACH[:-4],
        ["--data-path", "digits", "--results-dir", "BAD/text.pt"],
        "BAD/text.pt: is a file, give a folder",
    ),
    "a file for a store": (DUMP, ["--out", "BAD/text.pt"], "BAD/text.pt: is a file, give a folder"),
    "samples over another file": (SAMPLE, ["--out", "BAD/text.npz"], "text.npz: not a complete .npz file"),
    "pngs within a file": (SAMPLE, ["--png", "BAD/text.pt/x"], "--png BAD/text.pt/x: BAD/text.pt is a file"),
    "samples over other images": (SAMPLE, ["--out", "BAD/images.npz"], "it holds other samples"),
    "samples over the checkpoint": (SAMPLE, ["--ckpt-path", "BAD/a.npz", "--out", "BAD/a.npz"], "BAD/a.npz: "),
}


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_ends_in_one_sentence_and_nothing_is_written(
    case, bad, store, teacher_file, student_file, tmp_path, capsys
):
    names = {"BAD": bad, "STORE": store, "TEACHER": teacher_file, "STUDENT": student_file, "OUT": tmp_path / "out"}

    def fill(word) -> str:
        for name, path in names.items():
            word = str(word).replace(name, str(path))
        return str(word)

    command, changes, expected = CASES[case]
    before = state_of(bad, tmp_path, store)
    error = refused(capsys, *(fill(word) for word in command), *(fill(word) for word in changes))
    assert fill(expected) in error and state_of(bad, tmp_path, store) == before


NUMBERS = {
    "--lr": ((TRAIN, TEACH, TUNE), ("nan", "inf", "0", "-1")),
    "--clip": ((TRAIN, TEACH, TUNE), ("0", "-1", "nan")),
    "--ema-decay": ((TRAIN, TEACH, TUNE), ("1", "2", "-0.1", "nan")),
    "--snapshot-minutes": ((TRAIN, TEACH, TUNE), ("-1", "inf")),
    "--cfg-scale": ((TRAIN, DUMP, TEACHER_SAMPLE), ("nan", "-1", "inf")),
    "--gan-weight": ((TUNE,), ("-1", "nan")),
    "--d-lr": ((TUNE,), ("0", "nan")),
    "--d-clip": ((TUNE,), ("0", "inf")),
    "--label-dropout": ((TEACH,), ("1", "-1", "nan")),
}


@pytest.mark.parametrize("option", NUMBERS)
def test_a_wrong_number_is_refused_by_every_script_that_takes_it(
    option, store, teacher_file, student_file, tmp_path, capsys
):
    names = {"STORE": store, "TEACHER": teacher_file, "STUDENT": student_file, "OUT": tmp_path / "out"}
    commands, numbers = NUMBERS[option]
    for command in commands:
        filled = [names.get(word, tmp_path / word if word == "OUT.npz" else word) for word in command]
        for number in numbers:
            error = refused(capsys, *filled, f"{option}={number}")
            assert f"argument {option}: {number} must" in error, error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", [TRAIN, TEACH, DUMP, SAMPLE, TEACHER_SAMPLE], ids=lambda command: command[0])
def test_dry_run_prints_the_plan_and_writes_nothing(command, store, teacher_file, student_file, tmp_path, capsys):
    names = {"STORE": store, "TEACHER": teacher_file, "STUDENT": student_file, "OUT": tmp_path / "out"}
    call(*(names.get(word, tmp_path / word if word == "OUT.npz" else word) for word in command), "--dry-run")
    plan = json.loads(capsys.readouterr().out)
    assert plan["options"]["dry_run"] is True and plan.keys() > {"options"}
    assert not list(tmp_path.iterdir())


def test_mistakes_about_images_and_latents_are_named(latent_store, image_folder, autoencoder, tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "out"
    train, encoder = ("--run-dir", run, *NANO_TEACHER), ("--out", out, "--num-workers", 0)
    here, vae = ("--data-path", image_folder, "--image-size", 8), ("--vae", autoencoder)
    cases = [
        ("train.py", ("--data-path", latent_store, "--vae", "mse", *train), f"holds latents of {autoencoder}"),
        ("train.py", ("--data-path", latent_store, "--vae", "none", *train), f"holds latents of {autoencoder}"),
        ("train.py", ("--data-path", latent_store, "--image-size", 16, *train), "have 8 pixels"),
        ("train.py", ("--data-path", image_folder, *train), "needs --image-size"),
        ("train.py", (*here, "--vae", tmp_path / "nothing", *train), "nothing: no such folder"),
        ("train.py", ("--data-path", "digits", *vae, *train), "takes images of 3 channels, these have 1"),
        ("train.py", ("--data-path", image_folder, "--image-size", 9, *vae, *train), "must be a multiple of 2"),
        ("train_ARD.py", ("--data-path", latent_store, "--run-dir", run), "holds no trajectories"),
        ("encode_latents.py", (*here, "--vae", "none", *encoder), "need no encoding"),
        ("encode_latents.py", (*here, "--vae", image_folder, *encoder), "cannot load the autoencoder"),
        ("encode_latents.py", ("--data-path", tmp_path / "nothing", *vae, *encoder), "no such folder"),
        ("encode_latents.py", (*here, *vae, "--out", image_folder), "of which all is read; give another place"),
    ]
    before = state_of(tmp_path, latent_store, image_folder, autoencoder)
    for script, options, message in cases:
        assert message in refused(capsys, script, *options)
    assert state_of(tmp_path, latent_store, image_folder, autoencoder) == before


#################################################################################
#                            Commands that must work                            #
#################################################################################


@pytest.fixture(scope="module")
def six_layers(tmp_path_factory) -> Path:
    """A store of the shipped teacher, which is six blocks deep, as --stack=6 needs."""
    folder = tmp_path_factory.mktemp("six") / "store"
    call("sample_trajectory.py", "--teacher", SHIPPED_TEACHER, "--out", folder, "--num-trajectories", 64)
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
    assert arrays(weights.parent / "0000002-ema-seed0-5.npz")["arr_0"].shape == (5, 8, 8, 3)


@pytest.mark.parametrize(
    "shape",
    [
        dict(input_size=6, in_channels=3, num_classes=0),
        dict(input_size=10, in_channels=3, num_classes=7, class_dropout_prob=0.0),
        dict(input_size=6, in_channels=1, num_classes=2, learn_sigma=False),
    ],
    ids=["unconditional", "ten pixels without a null label", "no sigma"],
)
def test_a_model_of_any_shape_goes_from_teacher_to_samples(shape, tmp_path, capsys):
    path, data = save_teacher(tmp_path / "teacher.pt", random_teacher(**shape)), tmp_path / "store"
    guided = bool(shape["num_classes"]) and shape.get("class_dropout_prob") != 0
    dump = ("--teacher", path, "--out", data, "--num-trajectories", 8, "--solver-steps", 5, "--steps", 2)
    sample = ("--teacher", path, "--out", tmp_path / "teacher.npz", "--num-samples", 4, "--solver-steps", 5)
    if not guided:
        assert "--cfg-scale 1.5 (the default): this teacher has no null label" in refused(
            capsys, "sample_trajectory.py", *dump
        )
        assert "--cfg-scale 1.5 (the default): this teacher has no null label" in refused(capsys, "sample.py", *sample)
    scale = ("--cfg-scale", 1.5 if guided else 1)
    call("sample_trajectory.py", *dump, *scale)
    call("sample.py", *sample, *scale)
    call("train_ARD.py", "--data-path", data, "--steps", 2, "--stack", 1, "--global-batch-size", 4, "--iterations", 2,
         "--sample-every", 2, "--run-dir", tmp_path / "run")  # fmt: skip
    call("sample_ARD.py", "--ckpt-path", tmp_path / "run" / "checkpoints" / "0000002.pt", "--num-samples", 4,
         "--out", tmp_path / "student.npz")  # fmt: skip
    for name in ("teacher", "student"):
        found = arrays(tmp_path / f"{name}.npz")
        assert found["arr_0"].shape == (4, shape["input_size"], shape["input_size"], 3)
        assert (found["arr_1"] == np.arange(4) % max(shape["num_classes"], 1)).all()
    assert read_provenance(tmp_path / "student.npz")["student"]["num_classes"] == shape["num_classes"]
