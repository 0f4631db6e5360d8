"""Folders of images: images and classes, bad files named at the start, the identity of a folder.

What is in a folder: classes, order, hidden files, links, channels. Images that are bad: named, skipped, on ranks.
By what a folder is known: its listing, runs that go on after it moved, names of classes.
"""

import hashlib
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import NANO_TEACHER, call, checkpoint, refused, spawn
from PIL import Image

from runtime.cli import UserError
from runtime.provenance import differences
from stores import checkpoints
from stores.image_folder import ImageFolder
from stores.images import summary
from stores.pictures import center_crop


def draw(path: Path, seed: int = 0, mode: str = "RGB", side: int = 12) -> Path:
    """One image of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(256, size=(side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


def cut(path: Path) -> None:
    """Truncate a file."""
    path.write_bytes(path.read_bytes()[:-100])


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two classes of four images."""
    for i in range(8):
        draw(tmp_path / "images" / "ab"[i % 2] / f"{i}.png", i)
    return tmp_path / "images"


def read_all(source: ImageFolder) -> torch.Tensor:
    return source.read(np.arange(source.count), np.zeros(source.count, bool))["images"]


#################################################################################
#                             Content of a folder                               #
#################################################################################


def test_each_image_has_its_class_and_adms_pixels(image_folder):
    source = ImageFolder(image_folder, 8)
    assert (source.count, source.num_classes, source.classes) == (11, 3, ["class0", "class1", "class2"])
    for row, path in enumerate(source.paths):
        assert f"/class{source.labels[row]}/" in path
        with Image.open(path) as file:  # among them a grey one and JPEGs
            wanted = np.asarray(center_crop(file.convert("RGB"), 8))
        read = source.read(np.array([row]), np.array([False]))
        assert (read["images"][0].permute(1, 2, 0).numpy() == wanted).all() and read["y"] == source.labels[row]
    everything = ImageFolder(image_folder, 8, unconditional=True)
    assert (everything.count, everything.num_classes) == (11, 0) and not everything.labels.any()
    assert "class_names" not in everything.fingerprint


def test_the_order_is_torchvisions(folder):
    from torchvision.datasets import ImageFolder as Listing

    for name in ("a/x/1.png", "a/x/0.png", "a/x-y/0.png", "a/z.png", "b/B.png", "b/10.png"):
        draw(folder / name)
    found = Listing(str(folder))
    source = ImageFolder(folder, 8)
    assert source.paths == [path for path, _ in found.samples] and source.labels.tolist() == found.targets


def test_what_is_hidden_is_neither_image_nor_class_and_other_files_are_counted(folder):
    names = ImageFolder(folder, 8).paths
    for name in (".ipynb_checkpoints/0.png", "__MACOSX/0.png", "a/.thumbnails/0.png", "a/._0.png", "a/@eaDir/0.png"):
        draw(folder / name)
    draw(folder / ".0.png")
    assert ImageFolder(folder, 8).paths == names and ImageFolder(folder, 8).notes == []
    assert len(ImageFolder(folder, 8, unconditional=True).paths) == 8
    for name, form in {"a/UP.PNG": "png", "a/up.JPeG": "jpeg", "b/0.gif": "gif", "b/0.webp": "webp", "b/0.bmp": "bmp",
                       "b/0.tiff": "tiff"}.items():  # fmt: skip
        Image.new("RGB", (9, 9)).save(folder / name, form)
    (folder / "a" / "notes.txt").write_text("mine")
    draw(folder / "beside.png")
    source = ImageFolder(folder, 8)
    assert source.count == 14 and len(read_all(source)) == 14
    assert summary(source) == "14 images, 2 classes: a, b; 2 files are no images of a class: a/notes.txt, beside.png"
    frames = [Image.new("L", (9, 9), level) for level in (0, 200)]
    frames[0].save(folder / "a" / "moving.gif", save_all=True, append_images=frames[1:])
    assert "1 images are animated or have pages: the first one counts" in summary(ImageFolder(folder, 8))


def test_links_may_lead_in_circles_and_those_that_lead_nowhere_are_named_or_passed_over(folder):
    (folder / "a" / "again").symlink_to(folder / "a")
    (folder / "loop").symlink_to("loop")
    (folder / "gone").symlink_to("/nowhere/at/all")
    assert ImageFolder(folder, 8).count == 8 and ImageFolder(folder, 8).classes == ["a", "b"]
    (folder / "a" / "gone.png").symlink_to(folder / "absent.png")
    (folder / "a" / "loop.png").symlink_to("loop.png")
    os.mkfifo(folder / "b" / "pipe.png")
    said = r"3 of 11 images cannot be read: a/gone.png \(no regular file\), a/loop.png .*, b/pipe.png \(no regular"
    with pytest.raises(UserError, match=said):
        ImageFolder(folder, 8)


def test_folders_that_cannot_be_used_end_in_a_sentence(folder, tmp_path):
    (folder / "c").mkdir()
    with pytest.raises(UserError, match="--data-path .*: 1 of 3 class folders hold no images: c; remove them"):
        ImageFolder(folder, 8)
    assert ImageFolder(folder, 8, unconditional=True).count == 8
    draw(tmp_path / "flat" / "0.png")
    with pytest.raises(UserError, match="one sub-folder of images for each class, or --unconditional"):
        ImageFolder(tmp_path / "flat", 8)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds no images \(.jpg, "):
        ImageFolder(tmp_path / "text", 8, unconditional=True)


def test_grey_folders_are_read_in_one_channel_and_none_of_colours(tmp_path):
    for i, mode in enumerate(("L", "1", "LA")):
        draw(tmp_path / "a" / f"{i}.png", i, mode)
    Image.fromarray(np.arange(144, dtype=np.uint16).reshape(12, 12) * 400).save(tmp_path / "a" / "3.png")
    one, three = (ImageFolder(tmp_path, 12, channels=channels) for channels in (1, 3))
    assert read_all(one).shape == (4, 1, 12, 12)
    assert torch.equal(read_all(one).expand(-1, 3, -1, -1), read_all(three))
    draw(tmp_path / "a" / "4.png")
    with pytest.raises(UserError, match="1 of 5 images have colours, which one channel does not hold: a/4.png"):
        ImageFolder(tmp_path, 12, channels=1)


#################################################################################
#                              Images that are bad                              #
#################################################################################


def test_bad_images_are_named_together_and_skipped_where_that_is_asked_for(folder):
    pixels = read_all(ImageFolder(folder, 8))
    for name in ("a/0.png", "b/3.png"):
        cut(folder / name)
    (folder / "b" / "5.png").write_bytes(b"no image")
    Image.new("L", (1, 2_000_000)).save(folder / "b" / "line.png")
    line = r"b/line.png \(1x2000000 pixels"
    with pytest.raises(UserError, match=r"4 of 9 images cannot be read: a/0.png \(.*, b/3.*, b/5.png \(none.* \.\.\.;"):
        ImageFolder(folder, 8)
    with pytest.raises(UserError, match="or give --skip-bad 4 to go on without them"):
        ImageFolder(folder, 8, skip_bad=3)
    source = ImageFolder(folder, 8, skip_bad=4)
    assert [Path(path).name for path in source.paths] == ["2.png", "4.png", "6.png", "1.png", "7.png"]
    assert torch.equal(read_all(source), pixels[[1, 2, 3, 4, 7]])
    assert "4 bad images are left out: a/0.png (" in summary(source)
    (folder / "a" / "0.png").unlink()
    for name in ("b/3.png", "b/5.png", "b/1.png", "b/7.png"):
        (folder / name).unlink()
    with pytest.raises(UserError, match=line):
        ImageFolder(folder, 8)
    with pytest.raises(UserError, match="class folders hold no images: b"):
        ImageFolder(folder, 8, skip_bad=1)


def test_damage_that_no_header_shows_is_met_at_the_start_where_bad_images_are_skipped(folder):
    content = bytearray((folder / "a" / "0.png").read_bytes())
    begin = content.index(b"IDAT") + 6
    content[begin : begin + 50] = b"\xff" * 50
    (folder / "a" / "0.png").write_bytes(content)
    source = ImageFolder(folder, 8, skip_bad=0)
    with pytest.raises(UserError, match=r"a/0.png is not a readable image \(.*with --skip-bad N such files are found"):
        read_all(source)
    assert ImageFolder(folder, 8, skip_bad=1).count == 7


def test_no_image_is_skipped_because_the_disk_fails(folder, tmp_path):
    draw(folder / "a" / "n.png")
    source = ImageFolder(folder, 8)
    (folder / "a" / "n.png").unlink()
    with pytest.raises(UserError, match=r"a/n.png cannot be read \(No such file"):
        read_all(source)


@pytest.mark.parametrize("script", ["train.py", "encode_latents.py"])
def test_scripts_name_bad_images_before_they_begin_and_skip_them(script, folder, autoencoder, tmp_path, capsys):
    cut(folder / "a" / "2.png")
    out = tmp_path / "out"
    command = [script, "--data-path", folder, "--image-size", 8]
    if script == "train.py":
        command += [*NANO_TEACHER, "--iterations", 2, "--run-dir", out]
    else:
        command += ["--vae", autoencoder, "--num-workers", 0, "--out", out]
    assert "1 of 8 images cannot be read: a/2.png" in refused(capsys, *command) and not out.exists()
    call(*command, "--skip-bad", 1)
    assert f"{folder}: 7 images, 2 classes: a, b; 1 bad images are left out: a/2.png (" in capsys.readouterr().out


@pytest.mark.slow
def test_two_ranks_leave_out_the_same_images(folder, tmp_path):
    cut(folder / "a" / "2.png")
    done = spawn("train.py", "--data-path", folder, "--image-size", 8, *NANO_TEACHER, "--iterations", 2,
                 "--skip-bad", 1, "--run-dir", tmp_path / "run", ranks=2)  # fmt: skip
    assert done.returncode == 0 and done.stdout.count("7 images, 2 classes") == 1, done.stderr


#################################################################################
#                            Identity of a folder                               #
#################################################################################


def test_a_folder_is_known_by_names_and_sizes_wherever_it_lies(folder, tmp_path):
    first = ImageFolder(folder, 8).fingerprint
    parts = [f"{name}/{i}.png" for name, start in (("a", 0), ("b", 1)) for i in range(start, 8, 2)]
    text = "\0".join(f"{part}\0{(folder / part).stat().st_size}" for part in parts)
    assert first["listing"] == hashlib.sha256(text.encode()).hexdigest()[:16]
    assert first["class_names"] == ["a", "b"] and first["images"] == 8
    shutil.copytree(folder, tmp_path / "elsewhere")
    moved = ImageFolder(tmp_path / "elsewhere", 8).fingerprint
    assert moved["data"] != first["data"] and differences(first, moved) == ""
    assert "image_size" in differences(first, ImageFolder(folder, 16).fingerprint)
    draw(tmp_path / "elsewhere/a/0.png", side=13)
    assert "listing is" in differences(first, ImageFolder(tmp_path / "elsewhere", 8).fingerprint)


def test_a_run_goes_on_when_its_images_have_moved(folder, tmp_path, capsys):
    def train(data: Path, iterations: int) -> list:
        return ["train.py", "--data-path", data, "--image-size", 8, *NANO_TEACHER, "--iterations", iterations,
                "--results-dir", tmp_path / "results"]  # fmt: skip

    call(*train(folder, 1))
    moved = folder.rename(tmp_path / "moved")
    call(*train(moved, 2))
    run = tmp_path / "results" / "000-DiT-Nano-2"
    assert checkpoint(run, 2)["config"]["provenance"]["class_names"] == ["a", "b"]
    assert [path.name for path in (tmp_path / "results").iterdir()] == [run.name]

    draw(moved / "a" / "8.png")
    error = refused(capsys, *train(moved, 3), "--run-dir", run)
    assert "provenance.images is 8 there and 9 here" in error


def test_what_a_run_writes_lies_outside_of_its_images(folder, capsys):
    command = ("train.py", "--data-path", folder, "--image-size", 8, *NANO_TEACHER, "--iterations", 1)
    for option in ("--run-dir", "--results-dir"):
        error = refused(capsys, *command, option, folder / "a" / "run")
        assert f"{option} {folder}/a/run: lies in --data-path {folder}" in error


def test_the_names_of_classes_travel_from_images_to_samples(folder, tmp_path):
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    call("train.py", "--data-path", folder, "--image-size", 8, *NANO_TEACHER, "--iterations", 1, "--run-dir", teacher)
    call("sample_trajectory.py", "--teacher", teacher / "checkpoints/0000001.pt", "--out", tmp_path / "store",
         "--num-trajectories", 8, "--solver-steps", 4)  # fmt: skip
    call("train_ARD.py", "--data-path", tmp_path / "store", "--stack", 2, "--global-batch-size", 8, "--sample-every", 0,
         "--iterations", 1, "--run-dir", student)  # fmt: skip
    call("sample_ARD.py", "--ckpt-path", student / "checkpoints/0000001.pt", "--num-samples", 2,
         "--out", tmp_path / "samples.npz")  # fmt: skip
    from stores.samples import read_provenance

    assert checkpoints.load_teacher(teacher / "checkpoints/0000001.pt")[1]["provenance"]["class_names"] == ["a", "b"]
    assert read_provenance(tmp_path / "samples.npz")["class_names"] == ["a", "b"]


@pytest.mark.slow
def test_names_that_are_no_text_work_in_every_command(folder, autoencoder, tmp_path):
    """In a process of its own, whose console is strict about what it is given."""
    raw = os.fsdecode(b"caf\xe9")
    (folder / "b").rename(folder / raw)
    (folder / raw / "1.png").rename(folder / raw / f"1{raw}.png")
    images = ("--data-path", folder, "--image-size", 8)
    teach = ("train.py", *NANO_TEACHER, "--iterations", 1, "--sample-every", 1, "--run-dir")
    encode = ("encode_latents.py", *images, "--vae", autoencoder, "--num-workers", 0, "--out", tmp_path / "latents")
    draw_them = ("--num-samples", 4, "--solver-steps", 4, "--out")
    for words in (
        (*teach, tmp_path / "run", *images),
        (*teach, tmp_path / "run", *images),  # again: it is found
        encode,
        ("stores.latents", "verify", tmp_path / "latents"),
        (*teach, tmp_path / "latent-run", "--data-path", tmp_path / "latents"),
        ("sample.py", "--teacher", tmp_path / "run/checkpoints/0000001.pt", *draw_them, tmp_path / "s.npz"),
        ("evaluations.reference", folder, "--image-size", 8, "--out", tmp_path / "r.npz"),
    ):
        done = spawn(*words)
        assert done.returncode in (0, 2 if "reference" in words[0] else 0), (words, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr
    assert "caf\\udce9" in (tmp_path / "run/log.txt").read_text()
    config = checkpoints.load(tmp_path / "latent-run/checkpoints/0000001.pt", "")["config"]
    assert config["provenance"]["class_names"] == ["a", raw]


def test_a_path_that_is_no_text_is_refused_by_every_command(tmp_path, capsys):
    raw = tmp_path / os.fsdecode(b"caf\xe9")
    raw.mkdir()
    for words in (
        ("train.py", *NANO_TEACHER, "--data-path", raw, "--image-size", 8),
        ("sample.py", "--teacher", "x.pt", "--num-samples", 1, "--out", raw / "s.npz"),
        ("stores.latents", "verify", raw),
        ("evaluations.evaluator", raw / "a.npz", raw / "b.npz"),
    ):
        assert f"{raw}".encode(errors="backslashreplace").decode() in (said := refused(capsys, *words))
        assert "is no text in UTF-8; rename it" in said
    assert not list(raw.iterdir())
