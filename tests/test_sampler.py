"""Samplers: exact counts, functions of index and seed alone, whatever the batch size, the ranks and the compiler."""

import json

import numpy as np
import pytest
import torch
from helpers import arrays, call, random_teacher, refused, save_teacher, spawn
from PIL import Image

from models_ard import ARD
from runtime.randomness import labels, noise
from runtime.vae import Pixels
from sampler import Sampler
from stores import checkpoints
from stores.captions import open_conditions
from stores.images import to_uint8


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


@pytest.mark.parametrize(
    "classes, columns",
    [(3, [0, 1, 2]), (10, list(range(10))), (25, [0, 2, 5, 7, 10, 12, 15, 17, 20, 22]), (0, [0] * 10)],
)
def test_a_preview_has_a_column_for_each_class_or_for_some_of_many(classes, columns, tmp_path):
    def draw(noise, y):
        seen.append(y)
        return noise * 0 - 1

    seen, model = [], random_teacher(num_classes=classes)
    Sampler(draw, model, Pixels(), torch.device("cpu")).save_preview(tmp_path / "preview.png")
    assert seen[0].view(6, -1).tolist() == [columns] * 6
    with Image.open(tmp_path / "preview.png") as picture:
        pixels = np.asarray(picture.convert("L"))
    assert pixels.shape == (6 * (6 * 9 + 1), 6 * (len(columns) * 9 + 1))  # 8 pixels, a line between, six times as large
    assert set(np.unique(pixels)) == {0, 255} and pixels[0, 0] == 255 and (pixels == 0).mean() > 0.7


def test_a_preview_says_what_each_column_is_of(tmp_path):
    model = random_teacher(num_classes=3)
    conditions = open_conditions(None, model, {"class_names": ["lion", "", "an animal whose name takes two lines"]})
    black = Sampler(lambda z, y: z * 0 - 1, model, Pixels(), torch.device("cpu"), conditions=conditions)
    black.save_preview(tmp_path / "preview.png")
    with Image.open(tmp_path / "preview.png") as picture:
        pixels = np.asarray(picture.convert("L"))
    head, width, line = 3 * 16, 12 * 9, 16  # above images of 8 pixels, twelve times as large
    assert pixels.shape == (12 + head + 6 * width, 12 + 3 * width)
    dark = [(pixels[:head, 12 + i * width : (i + 1) * width] < 128).any(1) for i in range(3)]
    assert dark[0][-line:].any() and not dark[0][:-line].any() and not dark[1].any()
    assert all(dark[2][i : i + line].any() for i in range(0, head, line))
    assert not pixels[12 + head :][:, 12:width].any(where=np.arange(6 * width)[:, None] % width < width - 12)


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


def test_the_compiled_sampler_fills_up_its_last_batch(student_file, tmp_path, quick_compiler, monkeypatch):
    sizes, sample = [], ARD.sample
    monkeypatch.setattr(ARD, "sample", lambda self, z, *rest: sizes.append(len(z)) or sample(self, z, *rest))
    for name, options in {"plain": (), "fast": ("--compile",)}.items():
        call("sample_ARD.py", "--ckpt-path", student_file, "--num-samples", 11, "--per-proc-batch-size", 4,
             "--save-latents", "--out", tmp_path / f"{name}.npz", *options)  # fmt: skip
    assert sizes == [4, 4, 3, 4, 4, 4] and quick_compiler()
    plain, fast = arrays(tmp_path / "plain.npz"), arrays(tmp_path / "fast.npz")
    np.testing.assert_allclose(plain["latents"], fast["latents"], atol=1e-5)
    assert (plain["arr_1"] == fast["arr_1"]).all() and len(fast["arr_0"]) == 11


def test_chosen_classes_are_taken_in_turn(student_file, tmp_path):
    call("sample_ARD.py", "--ckpt-path", student_file, "--num-samples", 5, "--class-labels", 3, 7,
         "--out", tmp_path / "s.npz")  # fmt: skip
    assert arrays(tmp_path / "s.npz")["arr_1"].tolist() == [3, 7, 3, 7, 3]


def test_classes_are_taken_by_name_and_samples_written_as_pngs(tmp_path, capsys):
    """Of a teacher of pictures in folders, as sample.py's --ckpt-path; a second call writes only what was removed."""
    names = [f"{i}_food" for i in range(10)]
    teacher = save_teacher(tmp_path / "teacher.pt", random_teacher(), about={"class_names": names})
    sample = ("sample.py", "--ckpt-path", teacher, "--num-samples", 3, "--solver-steps", 2, "--out", tmp_path / "s.npz",
              "--class-labels", "3_food", 7, "--png", tmp_path / "png")  # fmt: skip
    call(*sample)
    found = arrays(tmp_path / "s.npz")
    assert found["arr_1"].tolist() == [3, 7, 3] and json.loads(str(found["provenance"]))["sample_labels"] == [3, 7]
    (tmp_path / "png/000001.png").unlink()
    call(*sample)
    assert [path.name for path in sorted((tmp_path / "png").iterdir())] == ["000000.png", "000001.png", "000002.png"]
    for i, image in enumerate(found["arr_0"]):
        assert np.array_equal(np.asarray(Image.open(tmp_path / f"png/{i:06d}.png")), image)
    said = refused(capsys, "sample.py", "--teacher", teacher, "--class-labels", "3_fod", "--out", tmp_path / "t.npz")
    assert "--class-labels 3_fod: this model has labels 0..9 or a name: 0_food, 1_food" in said


def test_the_default_name_lies_beside_the_checkpoint(student_file):
    call("sample_ARD.py", "--ckpt_path", student_file, "--num-samples", 2, "--stack", 2, "--mask", "M4", "--steps", 4)
    assert (student_file.parent / "0000003-ema-seed0-2.npz").exists()
