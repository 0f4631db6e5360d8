"""train.py: a teacher of digits, of images, of their latents, with classes and without."""

import shutil

import numpy as np
import pytest
from helpers import NANO_TEACHER, assert_equal, call, checkpoint, losses, refused
from PIL import Image

from stores import checkpoints


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path):
    options = (*NANO_TEACHER, "--data-path", "digits")
    call("train.py", *options, "--run-dir", tmp_path / "whole", "--iterations", 4)
    call("train.py", *options, "--run-dir", tmp_path / "parts", "--iterations", 2)
    call("train.py", *options, "--run-dir", tmp_path / "parts", "--iterations", 4)
    assert_equal(checkpoint(tmp_path / "whole", 4), checkpoint(tmp_path / "parts", 4))


@pytest.fixture(scope="module")
def trained(latent_store, tmp_path_factory):
    """A run of six steps from latents."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    call("train.py", "--data-path", latent_store, *NANO_TEACHER, "--iterations", 6, "--run-dir", folder)
    return folder


def test_latents_train_as_their_images_do(trained, image_folder, autoencoder, tmp_path):
    folder = tmp_path / "run"
    call("train.py", "--data-path", image_folder, "--image-size", 8, "--vae", autoencoder, *NANO_TEACHER,
         "--iterations", 6, "--run-dir", folder)  # fmt: skip
    assert np.abs(np.subtract(losses(folder), losses(trained))).max() < 1e-3
    teacher, config = checkpoints.load_teacher(trained / "checkpoints" / "0000006.pt")
    assert config["vae"] == str(autoencoder) and teacher.latent_shape == (4, 4, 4) and teacher.num_classes == 3


def test_a_resumed_run_from_latents_is_the_same(trained, latent_store, tmp_path):
    for iterations in (3, 6):
        call("train.py", "--data-path", latent_store, *NANO_TEACHER, "--iterations", iterations,
             "--run-dir", tmp_path / "run")  # fmt: skip
    assert_equal(checkpoint(tmp_path / "run", 6), checkpoint(trained, 6))


def test_previews_of_latents_are_decoded(latent_store, tmp_path):
    call("train.py", "--data-path", latent_store, *NANO_TEACHER, "--sample-every", 1, "--iterations", 1,
         "--run-dir", tmp_path)  # fmt: skip
    with Image.open(tmp_path / "samples" / "0000001.png") as picture:
        enlarged = 48 // 8  # images of 8 pixels, three classes to a row
        assert picture.mode == "RGB" and picture.size == (enlarged * (3 * 9 + 1), enlarged * (6 * 9 + 1))


def test_a_flat_folder_trains_without_classes(image_folder, tmp_path, capsys):
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, path in enumerate(sorted(image_folder.rglob("*.*"))):
        shutil.copy(path, flat / f"{i}{path.suffix}")
    options = ("--data-path", flat, "--image-size", 8, *NANO_TEACHER, "--iterations", 1, "--run-dir", tmp_path / "run")
    assert "--unconditional" in refused(capsys, "train.py", *options)
    call("train.py", *options, "--unconditional")
    teacher, _ = checkpoints.load_teacher(tmp_path / "run" / "checkpoints" / "0000001.pt")
    assert teacher.num_classes == 0 and len(teacher.y_embedder.embedding_table.weight) == 1


def test_an_image_size_that_the_patches_do_not_divide_is_refused(image_folder, tmp_path, capsys):
    options = ("--model", "DiT-Nano/2", "--data-path", image_folder, "--image-size", 9, "--run-dir", tmp_path / "run")
    assert "size 9 is not divisible" in refused(capsys, "train.py", *options)
    assert not list(tmp_path.iterdir())
