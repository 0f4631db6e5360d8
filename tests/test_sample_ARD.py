"""Samples of a student some of whose points are given: by source images (C.2), or by its teacher (Fig. 6b)."""

import numpy as np
import pytest
import torch
from helpers import arrays, call, draw_digits, random_teacher, refused, save_student, save_teacher, write_images
from PIL import Image

from diffusion.teacher_ode import TeacherODE, pick_points
from models_ard import ARD
from runtime.randomness import labels, noise
from runtime.vae import load_vae
from stores import checkpoints
from stores.images import from_uint8
from stores.pictures import center_crop
from stores.samples import read_provenance

SIX = ("--num-samples", 6, "--seed", 3, "--save-latents", "--device", "cpu")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Four digits as a sample file."""
    return write_images(tmp_path_factory.mktemp("sources") / "digits.npz", draw_digits(4))


def latents(tmp_path, student_file, *options) -> torch.Tensor:
    """What the script draws with these options."""
    out = tmp_path / f"{len(list(tmp_path.glob('*.npz')))}.npz"
    call("sample_ARD.py", "--ckpt-path", student_file, *SIX, *options, "--out", out)
    return torch.from_numpy(arrays(out)["latents"])


@torch.no_grad()
@pytest.mark.parametrize("step", [1, 3])
def test_source_images_take_the_place_of_a_prediction_in_turn(step, student_file, sources, tmp_path):
    chosen = ("--source-images", sources, "--source-step", step, "--class-labels", 7)
    found = latents(tmp_path, student_file, *chosen, "--per-proc-batch-size", 4)
    student, _ = checkpoints.load_student(student_file)
    images = from_uint8(torch.from_numpy(draw_digits(4)[[0, 1, 2, 3, 0, 1]]).permute(0, 3, 1, 2)[:, :1])
    y, z = torch.full((6,), 7), noise(3, "sample", range(6), (1, 8, 8))
    torch.testing.assert_close(found, student.sample(z, y, {step - 1: images})[:, -1], rtol=0, atol=1e-5)
    assert not torch.allclose(found, student.sample(z, y)[:, -1], atol=1e-3)
    noted = read_provenance(tmp_path / "0.npz")
    assert (noted["source_images"], noted["source_step"], len(noted["source_hash"])) == (str(sources), step, 16)


@torch.no_grad()
def test_a_student_on_latents_takes_photographs_through_its_encoder(image_folder, autoencoder, tmp_path):
    student = ARD.from_teacher(random_teacher(input_size=4, in_channels=4, num_classes=3), history_layers=2).eval()
    path = save_student(tmp_path / "student.pt", student, autoencoder)
    found = latents(tmp_path, path, "--source-images", image_folder)
    files = sorted(str(file) for file in image_folder.rglob("*.*"))[:6]
    images = [np.array(center_crop(Image.open(file).convert("RGB"), 8)) for file in files]
    source, _ = load_vae(str(autoencoder), torch.device("cpu")).encode(
        from_uint8(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2))
    )
    z = noise(3, "sample", range(6), (4, 4, 4))
    wanted = student.sample(z, labels(3, range(6), 3), {0: source})[:, -1]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_teacher_solves_the_first_steps(student_file, teacher_file, tmp_path):
    student, config = checkpoints.load_student(student_file)
    z, y = noise(3, "sample", range(6), (1, 8, 8)), labels(3, range(6), 10)
    points = pick_points(*TeacherODE(checkpoints.load_teacher(teacher_file)[0])(z, y), [6, 12, 19, 25])["x0"]
    assert config["provenance"]["solver_indices"] == [6, 12, 19, 25]
    history = torch.cat([z[:, None], points[:, :-1]], dim=1)
    own = latents(tmp_path, student_file)
    assert torch.equal(latents(tmp_path, student_file, "--teacher-steps", 0), own)
    two = latents(tmp_path, student_file, "--teacher-steps", 2)
    given = student.sample(z, y, {0: points[:, 0], 1: points[:, 1]})
    torch.testing.assert_close(two, given[:, -1], rtol=0, atol=1e-5)
    three = latents(tmp_path, student_file, "--teacher-steps", 3, "--per-proc-batch-size", 4)
    torch.testing.assert_close(three, student(history, y)[:, -1], rtol=0, atol=1e-5)
    four = latents(tmp_path, student_file, "--teacher-steps", 4)
    call("sample.py", "--teacher", teacher_file, *SIX, "--out", tmp_path / "teacher.npz")
    assert torch.equal(four, torch.from_numpy(arrays(tmp_path / "teacher.npz")["latents"]))
    noted = [read_provenance(tmp_path / f"{i}.npz").get("teacher_steps") for i in range(5)]
    assert noted == [None, None, 2, 3, 4] and len({str(x) for x in (own, two, three, four)}) == 4


def test_impossible_points_are_refused(student_file, sources, tmp_path, capsys):
    other = save_teacher(tmp_path / "other.pt", random_teacher(seed=1))
    student = ARD.from_teacher(random_teacher(), history_layers=1)
    strange = save_student(tmp_path / "strange.pt", student)
    content = checkpoints.load(strange, "")
    content["config"]["provenance"]["target"] = "xt"
    checkpoints.save(tmp_path / "states.pt", content)
    (tmp_path / "empty").mkdir()
    cases = [
        (student_file, ("--source-images", sources, "--source-step", 4), "--source-step 4: this student has 4 steps"),
        (student_file, ("--source-images", sources, "--source-step", 0), "--source-step: 0 must be at least 1"),
        (student_file, ("--source-images", tmp_path / "none"), f"--source-images {tmp_path / 'none'}: no such file"),
        (student_file, ("--source-images", tmp_path / "empty"), "the folder is empty"),
        (student_file, ("--source-images", student_file), "has no arr_0"),
        (tmp_path / "states.pt", ("--source-images", sources), "takes no clean images"),
        (student_file, ("--teacher-steps", 5), "--teacher-steps 5: this student has 4 steps"),
        (student_file, ("--teacher-steps", 1, "--teacher", other), "teacher_hash is"),
        (strange, ("--teacher-steps", 1), "does not say whose trajectories it learned"),
    ]
    for path, options, message in cases:
        error = refused(capsys, "sample_ARD.py", "--ckpt-path", path, *SIX, *options, "--out", tmp_path / "s.npz")
        assert message in error, error
    assert not list(tmp_path.glob("s.*"))
