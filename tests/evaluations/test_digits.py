"""The classifier of digits: the shipped file keeps its word, and the command makes such a file."""

import json

import pytest
import torch
from helpers import ROOT, arrays, call, refused

from evaluations import digits
from runtime.cli import UserError
from stores.digits import digits_images
from stores.images import from_uint8


def test_the_shipped_classifier_reaches_the_accuracy_that_it_states():
    assert digits.WEIGHTS.stat().st_size < 1_000_000
    saved = torch.load(digits.WEIGHTS, weights_only=True)
    assert saved["provenance"]["command"].startswith("python -m evaluations.digits train")
    images, labels = digits_images()
    _, held_out = digits.split()
    reached = digits.accuracy(digits.load(), from_uint8(images[held_out]), labels[held_out])
    assert reached == pytest.approx(saved["provenance"]["held_out_accuracy"], abs=0.005)
    assert reached >= 0.97


def test_training_writes_a_classifier(tmp_path, capsys):
    command = ("evaluations.digits", "train", "--steps", 3, "--out", tmp_path / "new" / "classifier.pt")
    call(*command, "--dry-run")
    assert json.loads(capsys.readouterr().out)["seed"] == digits.SEED and not list(tmp_path.iterdir())
    call(*command)
    assert "held-out accuracy" in capsys.readouterr().out
    assert digits.load(tmp_path / "new" / "classifier.pt").config == digits.load().config
    with pytest.raises(UserError, match="not a file that"):
        digits.load(ROOT / "demo.py")


def test_the_last_fifth_is_never_trained_on():
    train, held_out = digits.split()
    assert sorted([*train.tolist(), *held_out.tolist()]) == list(range(1797)) and len(held_out) == 1797 // 5
    assert torch.equal(digits.split()[1], held_out)


def test_whitened_features_of_the_real_digits_vary_alike_in_all_directions():
    images, _ = digits_images()
    with torch.no_grad():
        features, _ = digits.load()(from_uint8(images))
    variances = torch.linalg.eigvalsh(torch.cov(features.double().T))
    assert variances.max() < 1.01 and variances.median() > 0.3


def test_the_reference_is_the_digits_as_they_are(tmp_path):
    call("evaluations.digits", "reference", "--out", tmp_path / "digits.npz")
    images, labels = digits_images()
    found = arrays(tmp_path / "digits.npz")
    assert found["arr_0"].shape == (1797, 8, 8, 3) and (found["arr_1"] == labels.numpy()).all()
    assert all((found["arr_0"][..., colour] == images[:, 0].numpy()).all() for colour in range(3))


def test_its_commands_write_over_nothing_but_their_own_files(digit_files, tmp_path, capsys):
    mine = tmp_path / "mine.pt"
    mine.write_text("mine")
    for command in (("train", "--steps", 1), ("reference",)):
        for path in (mine, digit_files[1]):
            before = path.read_bytes()
            error = refused(capsys, "evaluations.digits", *command, "--out", path)
            assert f"--out {path}: is there already and is not" in error
            assert path.read_bytes() == before
    for _ in range(2):
        call("evaluations.digits", "reference", "--out", tmp_path / "digits.npz")
