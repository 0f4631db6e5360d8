"""train.py: a teacher of digits, of images, of their latents, with classes and without."""

import shutil

import numpy as np
import pytest
from helpers import NANO_TEACHER, SMALL, assert_equal, call, checkpoint, losses, refused
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
        enlarged = 96 // 8  # images of 8 pixels, three classes to a row, a line for their names
        assert picture.mode == "RGB" and picture.size == (enlarged * (3 * 9 + 1), enlarged * (6 * 9 + 1) + 16)


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


def test_a_model_of_any_size_is_trained_and_goes_on_to_a_student(tmp_path, capsys):
    size = ("--depth", 2, "--width", 24, "--heads", 3, "--patch", 4)
    options = ("train.py", *NANO_TEACHER[2:], "--data-path", "digits", "--iterations", 1)
    call(*options, *size, "--run-dir", tmp_path / "own")
    call(*options, "--model", "DiT-Nano/2", "--width", 24, "--heads", 3, "--run-dir", tmp_path / "changed")
    files = (tmp_path / name / "checkpoints/0000001.pt" for name in ("own", "changed"))
    own, changed = (checkpoints.load_teacher(file)[0].config for file in files)
    names = ("depth", "hidden_size", "num_heads", "patch_size")
    assert [own[name] for name in names] == [2, 24, 3, 4] and [changed[name] for name in names] == [3, 24, 3, 2]
    call("train_ARD.py", "--online", "--teacher", tmp_path / "own/checkpoints/0000001.pt", *SMALL, "--iterations", 1,
         "--run-dir", tmp_path / "student")  # fmt: skip
    assert (tmp_path / "student/checkpoints/0000001.pt").is_file()


@pytest.mark.parametrize(
    "size, words",
    [
        ((), "--model: give --depth, --width, --heads, --patch as well, or a --model, one of DiT-XL/2"),
        (("--width", 24, "--patch", 2), "--width 24 --patch 2: give --depth, --heads as well"),
        (("--model", "DiT-Nano/2", "--heads", 5), "DiT-Nano/2 --heads 5: does not fit --data-path digits: hidden"),
        (("--model", "DiT-Nano/2", "--width", 30), "hidden size 30 must be divisible by 2 heads and by 4"),
        (("--model", "DiT-Nano/2", "--patch", 3), "input size 8 is not divisible by patch size 3"),
        (("--model", "DiT-Nano/2", "--depth", 0), "argument --depth: 0 must be at least 1"),
    ],
)
def test_a_size_that_cannot_be_is_one_sentence_and_nothing_is_written(size, words, tmp_path, capsys):
    assert words in refused(capsys, "train.py", "--data-path", "digits", *size, "--run-dir", tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_an_image_size_that_the_patches_do_not_divide_is_refused(image_folder, tmp_path, capsys):
    options = ("--model", "DiT-Nano/2", "--data-path", image_folder, "--image-size", 9, "--run-dir", tmp_path / "run")
    assert "size 9 is not divisible" in refused(capsys, "train.py", *options)
    assert not list(tmp_path.iterdir())
