"""Folders of images as reference and as samples, and the file that evaluations.reference makes of one."""

import json

import numpy as np
import pytest
from helpers import arrays, call, draw_digits, refused, state_of, write_images
from PIL import Image

from evaluations.evaluator import evaluate
from evaluations.extraction import extract
from evaluations.metrics import statistics
from runtime.distributed import DistributedContext
from stores.image_arrays import FolderImages, Images
from stores.pictures import center_crop


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of 120 images of digits, enlarged to several sizes, in two sub-folders."""
    folder = tmp_path_factory.mktemp("photos") / "images"
    for i, digit in enumerate(draw_digits(120, 3)):
        path = folder / "ab"[i % 2] / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(digit).resize((16 + i % 3, 16), Image.Resampling.NEAREST).save(path)
    return folder


@pytest.fixture(scope="module")
def sample_folder(tmp_path_factory):
    """A folder of 100 images of 8 pixels, and the same as a file."""
    folder, images = tmp_path_factory.mktemp("samples"), draw_digits(100, 4, 30)
    (folder / "images").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / "images" / f"{i:03d}.png")
    return folder / "images", write_images(folder / "samples.npz", images)


def test_folders_and_files_of_the_same_images_give_the_same_figures_to_the_bit(photos, sample_folder, tmp_path, capsys):
    reference = tmp_path / "new" / "reference.npz"
    call("evaluations.reference", photos, "--image-size", 8, "--out", reference)
    out = capsys.readouterr().out
    assert out == f"{photos}: 120 images\n{reference}: 120 images\n"
    made, before = arrays(reference), state_of(photos)
    paths = sorted(photos.rglob("*.png"))
    crops = [np.asarray(center_crop(Image.open(path).convert("RGB"), 8)) for path in paths]
    assert made.keys() == {"arr_0", "provenance"} and (made["arr_0"] == np.stack(crops)).all()
    folder, file = sample_folder
    expected = evaluate(reference, file, cache=False)
    for one, other in ((photos, file), (reference, folder), (photos, folder)):
        size = 8 if one == photos else None
        found = evaluate(one, other, image_size=size)
        for key in ("fid", "inception_score", "precision", "recall", "count"):
            assert found[key] == expected[key]
    assert found["provenance"]["reference_file"]["listing"] == json.loads(str(made["provenance"]))["listing"]
    assert state_of(photos) == before and not list(folder.parent.glob("images*.npz"))
    call("evaluations.reference", photos, "--image-size", 8, "--out", reference)
    assert f"{reference}: 120 images, already there" in capsys.readouterr().out
    call("evaluations.evaluator", photos, folder, "--image-size", 8, "--features", "digits", "--device", "cpu",
         "--json", tmp_path / "figures.json")  # fmt: skip
    assert json.loads((tmp_path / "figures.json").read_text())["fid"] == expected["fid"]


def test_mistakes_about_folders_are_named(photos, sample_folder, tmp_path, capsys):
    folder, file = sample_folder
    (tmp_path / "out.npz").write_bytes(file.read_bytes())
    (tmp_path / "text.npz").write_text("mine")
    evaluator = ("evaluations.evaluator", "--features", "digits", "--device", "cpu")
    reference = ("evaluations.reference", photos, "--image-size", 8, "--out")
    cases = [
        ((*evaluator, photos, file), "images of 3 sizes (16x16, 17x16, 18x16), give --image-size to crop them"),
        ((*evaluator, file, photos), f"SAMPLES {photos}: images of 3 sizes (16x16, 17x16, 18x16), they must"),
        ((*evaluator, photos, file, "--image-size", 16), "8x8 images, the reference's are 16x16"),
        ((*evaluator, file, file, "--image-size", 16), f"--image-size 16: REFERENCE {file} has 8x8 images already"),
        ((*reference, tmp_path / "ref.zip"), "must end in .npz"),
        ((*reference, tmp_path / "out.npz"), "it holds other images: "),
        ((*reference, tmp_path / "text.npz"), "text.npz: not a complete .npz"),
        ((*reference, tmp_path / "a.npz", "--inception-weights", file), "is for --features inception"),
        (("evaluations.reference", tmp_path, "--image-size", 8, "--out", tmp_path / "a.npz"), "holds no images"),
    ]
    before = state_of(tmp_path, photos, folder)
    for command, message in cases:
        assert message in refused(capsys, *command)
    assert state_of(tmp_path, photos, folder) == before


def test_an_image_that_turns_out_bad_leaves_no_file(photos, tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    for path in sorted(photos.rglob("*.png"))[:5]:
        (folder / path.name).write_bytes(path.read_bytes())
    content = bytearray((folder / "004.png").read_bytes())
    begin = content.index(b"IDAT") + 6
    content[begin : begin + 20] = b"\xff" * 20
    (folder / "004.png").write_bytes(content)
    command = ("evaluations.reference", folder, "--image-size", 8, "--out", tmp_path / "out.npz")
    with pytest.raises(SystemExit):
        call(*command)
    assert "004.png is not a readable image" in capsys.readouterr().err and list(tmp_path.iterdir()) == [folder]
    call(*command, "--skip-bad", 1)
    assert len(arrays(tmp_path / "out.npz")["arr_0"]) == 4


@pytest.mark.slow
def test_statistics_of_inception_are_stored_by_adms_names(photos, inception_weights, inception, tmp_path):
    out, folder = tmp_path / "reference.npz", tmp_path / "images"
    folder.mkdir()
    for path in sorted(photos.rglob("*.png"))[:6]:
        (folder / path.name).write_bytes(path.read_bytes())
    call("evaluations.reference", folder, "--image-size", 8, "--out", out, "--features", "inception",
         "--inception-weights", inception_weights, "--device", "cpu")  # fmt: skip
    made = arrays(out)
    table = extract(FolderImages("FOLDER", folder, 8), inception, 64, DistributedContext())
    for kind, mu, sigma in (("pool", "mu", "sigma"), ("spatial", "mu_s", "sigma_s")):
        mean, covariance = statistics(table[kind])
        np.testing.assert_array_equal(made[mu], mean)
        np.testing.assert_array_equal(made[sigma], covariance)
    assert Images("REFERENCE", out).member("sigma_s").shape == (2023, 2023)
