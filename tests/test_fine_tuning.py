"""train.py --init: a teacher that begins with other weights, ours, the official layout's or a PixArt's; with a warm-up
of the learning rate; resumed, it is the same; what does not fit is refused by name before there is a run.
"""

import json

import pytest
import torch
from helpers import ROOT, SMALL, assert_equal, call, checkpoint, random_teacher, refused, save_teacher
from text_helpers import encode_captions

from stores.checkpoints import load_teacher
from stores.digits import SEEN_SCENES, scene_caption
from stores.initial_weights import LABELS

STILL = (*SMALL[2:], "--lr", 1e-12, "--iterations", 1)  # one step that changes nothing


@pytest.mark.parametrize("layout, process", [("ours", "ddpm"), ("official", "ddpm"), ("official", "sit")])
def test_a_teacher_of_other_classes_begins_with_the_weights(layout, process, image_folder, tmp_path, capsys):
    source = random_teacher(in_channels=3, input_size=16)
    path = save_teacher(tmp_path / "source.pt", source)
    if layout == "official":
        torch.save(source.state_dict(), path)
    call(
        "train.py",
        "--init",
        path,
        "--data-path",
        image_folder,
        "--image-size",
        8,
        *STILL,
        "--process",
        process,
        "--run-dir",
        tmp_path / "r",
    )
    found = checkpoint(tmp_path / "r", 1)
    known = {"process": process} if process != "ddpm" else {}  # a config without it is of DiT's
    config, weights, theirs = found["config"], found["model"], source.state_dict()
    assert config["model"] == source.config | {"num_classes": 3, "input_size": 8} | known
    assert config["provenance"]["init"]["new"] == ["pos_embed", LABELS]
    for name in theirs.keys() - {"pos_embed", LABELS}:
        torch.testing.assert_close(weights[name], theirs[name], rtol=0, atol=1e-9)
    assert weights[LABELS].shape[0] == 4
    torch.testing.assert_close(weights[LABELS][-1], theirs[LABELS][-1], rtol=0, atol=1e-9)
    assert f"--init {path}: " in capsys.readouterr().out


def test_a_text_teacher_begins_with_a_pixart(tmp_path):
    captions = encode_captions(tmp_path, "captions", [scene_caption(scene) for scene in range(SEEN_SCENES)])
    call("train.py", "--init", ROOT / "assets/t2i_teacher.pt", "--data-path", "digit-scenes", "--captions", captions,
         *STILL, "--run-dir", tmp_path / "run")  # fmt: skip
    found, source = checkpoint(tmp_path / "run", 1), load_teacher(ROOT / "assets/t2i_teacher.pt")[0].state_dict()
    for name, value in found["model"].items():
        torch.testing.assert_close(value, source[name], rtol=0, atol=1e-9)
    assert found["config"]["provenance"]["init"]["new"] == []


def test_a_resumed_run_with_a_warm_up_is_the_same_and_begins_slowly(tmp_path):
    path = save_teacher(tmp_path / "source.pt", random_teacher())
    options = ("--init", path, "--keep-labels", "--data-path", "digits", *SMALL[2:], "--lr-warmup", 8)
    call("train.py", *options, "--run-dir", tmp_path / "whole", "--iterations", 4)
    for iterations in (2, 4):
        call("train.py", *options, "--run-dir", tmp_path / "parts", "--iterations", iterations)
    whole = checkpoint(tmp_path / "whole", 4)
    assert_equal(whole, checkpoint(tmp_path / "parts", 4))
    assert whole["opt"]["param_groups"][0]["lr"] == pytest.approx(1e-3 * 4 / 8)
    assert whole["config"]["training"]["lr_warmup"] == 8


@pytest.mark.parametrize(
    "words, expected",
    [
        (("--depth", 9), "--init: its weights are for another model (depth 9 instead of 3)"),
        (("--data-path", "emoji"), "--init: its weights are for another model (in_channels 3 instead of 1)"),
        (("--data-path", "emoji", "--keep-labels"), "in_channels 3 instead of 1"),
        (("--init", "nothing.pt"), "--init nothing.pt: no such file"),
    ],
)
def test_what_does_not_fit_is_refused_before_there_is_a_run(words, expected, tmp_path, capsys):
    path = save_teacher(tmp_path / "source.pt", random_teacher())
    options = ("--init", path, "--data-path", "digits", *STILL, "--run-dir", tmp_path / "run")
    assert expected in refused(capsys, "train.py", *options, *words)
    assert not (tmp_path / "run").exists()


def test_other_numbers_of_classes_do_not_keep_labels(image_folder, tmp_path, capsys):
    path = save_teacher(tmp_path / "source.pt", random_teacher(in_channels=3))
    options = ("--data-path", image_folder, "--image-size", 8, *STILL, "--run-dir", tmp_path / "run", "--keep-labels")
    assert "leave out --keep-labels for other classes" in refused(capsys, "train.py", "--init", path, *options)
    assert "--keep-labels: has no meaning without --init" in refused(
        capsys, "train.py", "--model", "DiT-Nano/2", *options
    )


def test_a_dry_run_says_what_is_taken(tmp_path, capsys):
    path = save_teacher(tmp_path / "source.pt", random_teacher())
    call("train.py", "--init", path, "--data-path", "digits", *STILL, "--run-dir", tmp_path / "run", "--dry-run")
    about = json.loads(capsys.readouterr().out)["provenance"]["init"]
    assert about["new"] == [LABELS] and about["taken"] > 20 and about["dropped"] == []
