"""The classifiers of digits and emoji.

The shipped files keep their word (accuracy, size, whitened features), and the commands make such files; the real images
as a reference; nothing else is written over.
"""

import json

import numpy as np
import pytest
import torch
from helpers import ROOT, arrays, call, refused

from evaluations.classifier import SEED
from evaluations.features import YARDSTICKS
from runtime.cli import UserError
from stores.images import from_uint8

EACH = pytest.mark.parametrize("yardstick", YARDSTICKS.values(), ids=YARDSTICKS)
REACHED = {"digits": 0.97, "emoji": 0.65}


@EACH
def test_the_shipped_classifier_reaches_the_accuracy_that_it_states(yardstick):
    assert yardstick.weights.stat().st_size < 2_500_000
    saved = torch.load(yardstick.weights, weights_only=True)
    assert saved["provenance"]["command"].startswith(f"python -m evaluations.{yardstick.name} train")
    images, labels = yardstick.images()
    _, held_out = yardstick.split(len(images))
    reached = yardstick.load().accuracy(from_uint8(images[held_out]), labels[held_out])
    assert reached == pytest.approx(saved["provenance"]["held_out_accuracy"], abs=0.005)
    assert reached >= REACHED[yardstick.name]


@EACH
def test_training_writes_a_classifier(yardstick, tmp_path, capsys):
    command = (f"evaluations.{yardstick.name}", "train", "--steps", 2, "--out", tmp_path / "new" / "classifier.pt")
    call(*command, "--dry-run")
    assert json.loads(capsys.readouterr().out)["seed"] == SEED and not list(tmp_path.iterdir())
    call(*command)
    assert "held-out accuracy" in capsys.readouterr().out
    assert yardstick.load(tmp_path / "new" / "classifier.pt").config == yardstick.load().config
    with pytest.raises(UserError, match="not a file that"):
        yardstick.load(ROOT / "demo.py")


@EACH
def test_the_last_fifth_is_never_trained_on(yardstick):
    train, held_out = yardstick.split(1797)
    assert sorted([*train.tolist(), *held_out.tolist()]) == list(range(1797)) and len(held_out) == 1797 // 5
    assert torch.equal(yardstick.split(1797)[1], held_out)


@EACH
def test_whitened_features_of_the_real_images_vary_alike_in_all_directions(yardstick):
    images, _ = yardstick.images()
    with torch.no_grad():
        features = torch.cat([yardstick.load()(part)[0] for part in from_uint8(images).split(2048)])
    variances = torch.linalg.eigvalsh(torch.cov(features.double().T))
    assert variances.max() < 1.01 and variances.median() > 0.1


@EACH
def test_the_reference_is_the_images_as_they_are(yardstick, tmp_path):
    call(f"evaluations.{yardstick.name}", "reference", "--out", tmp_path / "real.npz")
    images, labels = yardstick.images()
    found = arrays(tmp_path / "real.npz")
    assert (found["arr_1"] == labels.reshape(len(labels), -1)[:, 0].numpy()).all()
    np.testing.assert_array_equal(found["arr_0"].transpose(0, 3, 1, 2), images.expand(-1, 3, -1, -1).numpy())


def test_emoji_features_tell_pictures_from_noisy_ones_and_sets_apart():
    yardstick = YARDSTICKS["emoji"]
    images, labels = yardstick.images()
    network = yardstick.load()
    with torch.no_grad():
        x = from_uint8(images[::16])
        clean, noisy = (network(v)[0] for v in (x, x + 0.5 * torch.randn(x.shape, generator=torch.manual_seed(0))))
        sets = network.head(network.body(x).mean(dim=(2, 3)))[:, network.num_classes :].argmax(1)
    assert (noisy.mean(0) - clean.mean(0)).norm() > 1
    assert (sets == labels[::16, 1]).double().mean() > 0.8


def test_its_commands_write_over_nothing_but_their_own_files(digit_files, tmp_path, capsys):
    mine = tmp_path / "mine.pt"
    mine.write_text("mine")
    for command in (("train", "--steps", 1), ("reference",)):
        for path in (mine, digit_files[1]):
            before = path.read_bytes()
            error = refused(capsys, "evaluations.digits", *command, "--out", path)
            assert f"--out {path}: exists already and is not" in error
            assert path.read_bytes() == before
    for _ in range(2):
        call("evaluations.digits", "reference", "--out", tmp_path / "digits.npz")
