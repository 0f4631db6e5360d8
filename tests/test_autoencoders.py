"""Autoencoders are told apart by the latents they make: moved ones are the same, and others are refused everywhere.

The road of a cluster without a network: an autoencoder that lies in some folder, and later in another.
"""

import json
import shutil

import pytest
from helpers import (
    NANO_TEACHER,
    SMALL,
    assert_equal,
    call,
    checkpoint,
    gan_options,
    random_teacher,
    refused,
    save_autoencoder,
    save_teacher,
)

from stores import checkpoints
from stores.samples import read_provenance

PICTURES = ("--iterations", 2, "--sample-every", 2)


@pytest.fixture(scope="module")
def road(image_folder, tmp_path_factory):
    """Latents, a teacher, its trajectories and student, made with autoencoder A, now moved to B; and another, C."""
    folder = tmp_path_factory.mktemp("road")
    old = save_autoencoder(folder / "A")
    save_autoencoder(folder / "C", seed=1)
    images = ("--data-path", image_folder, "--image-size", 8, "--vae", old)
    call("encode_latents.py", *images, "--out", folder / "latents", "--num-workers", 0)
    call(
        "train.py", *NANO_TEACHER, "--data-path", folder / "latents", "--iterations", 2, "--run-dir", folder / "teacher"
    )
    call("sample_trajectory.py", "--teacher", folder / "teacher/checkpoints/0000002.pt", "--out", folder / "store",
         "--num-trajectories", 12, "--solver-steps", 4)  # fmt: skip
    call("train_ARD.py", "--data-path", folder / "store", *SMALL, "--iterations", 2, "--run-dir", folder / "student")
    old.rename(folder / "B")
    return folder


def commands(road, out):
    """Each command that needs the autoencoder."""
    student = road / "student/checkpoints/0000002.pt"
    tune = gan_options(road / "store", student, real_data_path=road / "latents", run_dir=out / "tuned")
    latents, store = ("--data-path", road / "latents"), ("--data-path", road / "store")
    return {
        "teacher": ("train.py", *NANO_TEACHER, *latents, *PICTURES, "--run-dir", out / "teacher"),
        "student": ("train_ARD.py", *store, *SMALL, *PICTURES, "--run-dir", out / "student"),
        "tuned": ("train_ARD_gan.py", *tune, *PICTURES),
        "samples": ("sample_ARD.py", "--ckpt-path", student, "--num-samples", 2, "--out", out / "samples.npz"),
        "teacher's samples": ("sample.py", "--teacher", road / "teacher/checkpoints/0000002.pt", "--num-samples", 2,
                              "--solver-steps", 2, "--out", out / "teacher.npz"),
        "exported": ("stores.trajectories", "export", road / "store", "--out", out / "exported.npz"),
    }  # fmt: skip


def test_an_autoencoder_that_has_moved_is_taken_from_its_new_place(road, tmp_path):
    for command in commands(road, tmp_path).values():
        call(*command, "--vae", road / "B")
    assert len(list(tmp_path.rglob("samples/0000002.png"))) == 3 and len(list(tmp_path.glob("*.npz"))) == 3
    hashes = {read_provenance(file)["vae_hash"] for file in tmp_path.glob("*.npz")}
    hashes |= {checkpoints.load_teacher(road / "teacher/checkpoints/0000002.pt")[1]["vae_hash"]}
    hashes |= {json.loads((road / "latents/manifest.json").read_text())["provenance"]["vae_hash"]}
    assert len(hashes) == 1 and len(hashes.pop()) == 16


@pytest.mark.parametrize("name", ["teacher", "student", "tuned", "samples", "teacher's samples", "exported"])
def test_an_autoencoder_that_is_gone_or_another_is_refused_with_the_option(name, road, tmp_path, capsys):
    command = commands(road, tmp_path)[name]
    assert f"--vae {road / 'A'}: no such folder" in refused(capsys, *command)
    error = refused(capsys, *command, "--vae", road / "C")
    assert f"--vae {road / 'C'}: " in error and f"is not {road / 'A'} (" in error
    assert not list(tmp_path.iterdir())


def test_real_images_are_encoded_by_the_teachers_autoencoder_and_latents_of_another_are_refused(
    road, image_folder, tmp_path, capsys
):
    common = ("--data-path", image_folder, "--image-size", 8, "--num-workers", 0)
    tune = ["train_ARD_gan.py", *gan_options(road / "store", road / "student/checkpoints/0000002.pt", iterations=1)]
    for name in "BC":
        call("encode_latents.py", *common, "--vae", road / name, "--out", tmp_path / f"latents {name}")
    given = ("--real-data-path", tmp_path / "latents C", "--run-dir", tmp_path / "run")
    error = refused(capsys, *tune, *given)
    assert f"vae is '{road / 'C'}' (" in error and f"there and '{road / 'A'}' (" in error
    call(*tune, "--real-data-path", tmp_path / "latents B", "--run-dir", tmp_path / "run")  # the same, elsewhere


def test_what_knows_no_hash_goes_by_names_and_believes_what_is_given(road, image_folder, tmp_path, capsys):
    """Weights of others and of earlier versions."""
    shape = dict(input_size=4, in_channels=4, num_classes=3)
    teacher = save_teacher(tmp_path / "teacher.pt", random_teacher(**shape), road / "A")
    call("sample_trajectory.py", "--teacher", teacher, "--out", tmp_path / "store", "--num-trajectories", 12)
    call("train_ARD.py", "--data-path", tmp_path / "store", *SMALL, "--iterations", 1, "--run-dir", tmp_path / "R")
    common = ("--data-path", image_folder, "--image-size", 8, "--num-workers", 0)
    call("encode_latents.py", *common, "--vae", road / "B", "--out", tmp_path / "latents")
    options = gan_options(tmp_path / "store", tmp_path / "R/checkpoints/0000001.pt", iterations=1,
                          real_data_path=tmp_path / "latents", run_dir=tmp_path / "run")  # fmt: skip
    error = refused(capsys, "train_ARD_gan.py", *options)
    assert f"vae is '{road / 'B'}' there and '{road / 'A'}' here" in error and "--vae" in error
    call("train_ARD_gan.py", *options, "--vae", road / "B")  # the user says that it is the teacher's


def test_a_run_and_an_encoding_are_continued_with_the_autoencoder_elsewhere(road, image_folder, tmp_path, capsys):
    images = ("--data-path", image_folder, "--image-size", 8)
    shutil.copytree(road / "B", tmp_path / "B2")
    train = ("train.py", *NANO_TEACHER, *images, "--results-dir", tmp_path / "runs")
    call(*train, "--vae", road / "B", "--iterations", 1)
    call(*train, "--vae", tmp_path / "B2", "--iterations", 2)
    call(*train, "--vae", road / "B", "--iterations", 2, "--results-dir", tmp_path / "whole")
    runs = [folder / "000-DiT-Nano-2" for folder in (tmp_path / "runs", tmp_path / "whole")]
    parts, whole = (checkpoint(run, 2) for run in runs)
    assert len(list((tmp_path / "runs").iterdir())) == 1
    assert_equal(parts["model"], whole["model"])
    encode = ("encode_latents.py", *images, "--num-workers", 0, "--rows-per-shard", 4, "--out", tmp_path / "latents")
    call(*encode, "--vae", road / "B")
    (tmp_path / "latents/shard-00001.safetensors").unlink()
    (tmp_path / "latents/manifest.json").unlink()
    assert "vae is " in refused(capsys, *encode, "--vae", road / "C")
    call(*encode, "--vae", tmp_path / "B2")
    call("stores.latents", "verify", tmp_path / "latents")
