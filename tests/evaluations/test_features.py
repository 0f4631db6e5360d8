"""Features of images: Inception-v3 as torch-fidelity has it, the classifier of digits, coarse pixels."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import call, draw_digits, refused
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from evaluations import features
from evaluations.metrics import frechet_distance, statistics
from stores.digits import digits_images


def pictures(count, size=40):
    return np.random.default_rng(1).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def test_inception_equals_torch_fidelity(inception, inception_weights):
    images = pictures(3)
    theirs = FeatureExtractorInceptionV3("inception", ["768", "2048", "logits_unbiased"], str(inception_weights))
    _, pool, logits = theirs(torch.from_numpy(images).permute(0, 3, 1, 2))
    ours = inception(images)
    np.testing.assert_allclose(ours["pool"], pool, atol=1e-4)
    np.testing.assert_allclose(ours["probs"], logits.softmax(dim=1), atol=1e-4)
    assert {name: array.shape for name, array in ours.items()} == {n: (3, w) for n, w in inception.widths.items()}
    assert inception.widths == dict(pool=2048, spatial=2023, probs=1008)
    assert not inception.adm  # random weights are not the published ones


def test_spatial_features_are_the_first_seven_channels_of_mixed_6d(inception):
    seen = []
    handle = inception.model.Mixed_6d.register_forward_hook(lambda module, inputs, output: seen.append(output))
    spatial = inception(pictures(2))["spatial"].reshape(2, 17, 17, 7)
    handle.remove()
    np.testing.assert_array_equal(spatial, seen[0][:, :7].permute(0, 2, 3, 1))
    assert spatial.min() == 0 < spatial.max()  # after the activation


def test_inception_does_not_depend_on_the_batch_size(inception):
    images = pictures(20, size=16)
    some = slice(10, 12)
    together = inception(images)
    for name, array in together.items():
        alone = np.concatenate([inception(image[None])[name] for image in images[some]])
        np.testing.assert_allclose(alone, array[some], atol=1e-4)


def test_digit_features_tell_generators_apart():
    network = features.extractor("digits").load()
    real = statistics(network(digits_images()[0].permute(0, 2, 3, 1).numpy().repeat(3, axis=3))["pool"])

    def fid(seed, noise):
        return frechet_distance(*real, *statistics(network(draw_digits(10_000, seed, noise))["pool"]))

    floor, noisy, other_seed, noisier = fid(0, 0), fid(1, 40), fid(2, 40), fid(1, 80)
    assert floor < 0.2
    assert 5 < noisy < noisier < 100
    assert abs(noisy / other_seed - 1) < 0.03


def test_wrong_weights_are_refused(digit_files, tmp_path, capsys, monkeypatch):
    command = ("evaluations.evaluator", *digit_files, "--device", "cpu", "--allow-few")
    given = (*command, "--inception-weights")
    (tmp_path / "text").write_text("hello")
    torch.save({"w": torch.zeros(1)}, tmp_path / "other")
    torch.save(Path("a pickle"), tmp_path / "pickle")
    for name, match in (("text", "not the weights"), ("other", "names or shapes"), ("pickle", "not the weights")):
        assert match in refused(capsys, *given, tmp_path / name)
    assert "no such file" in refused(capsys, *given, tmp_path / "absent")
    assert "leave it out" in refused(capsys, *given, tmp_path / "other", "--features", "digits")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nothing answers there: the machine is offline
    assert "weights-inception-2015-12-05-6726825d.pth" in refused(capsys, *command)


def test_images_are_checked_before_weights_are_fetched(digit_files, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    command = ("evaluations.evaluator", *digit_files, "--device", "cpu")
    for network, width in (("inception", 2048), ("dinov2", 1024)):
        assert f"400 images, give {width} or --allow-few" in refused(capsys, *command, "--features", network)
        assert "give" in refused(capsys, *command, "--features", network, "--dry-run")
        call(*command, "--features", network, "--allow-few", "--dry-run")
        (fetch,) = json.loads(capsys.readouterr().out)["fetch"]
        assert fetch.startswith(f"--{network}-weights: would be fetched from https://") and str(tmp_path) in fetch


def test_coarse_pixels_need_no_network_and_are_not_called_fid(digit_files, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    network = features.extractor("pixels").load()
    (flat,) = network(np.full((1, 19, 32, 3), (255, 0, 51), np.uint8))["pool"]
    np.testing.assert_allclose(flat.reshape(3, 64), np.broadcast_to([[1], [-1], [-0.6]], (3, 64)), atol=1e-6)
    (halves,) = network(np.repeat(np.repeat([[[[0] * 3, [255] * 3]]], 16, axis=1), 8, axis=2).astype(np.uint8))["pool"]
    assert (halves.reshape(3, 8, 8)[:, :, :4] == -1).all() and (halves.reshape(3, 8, 8)[:, :, 4:] == 1).all()
    out = tmp_path / "figures.json"
    call("evaluations.evaluator", *digit_files, "--features", "pixels", "--device", "cpu", "--no-cache", "--json", out)
    figures, said = json.loads(out.read_text()), capsys.readouterr()
    assert figures["fd_pixels"] > 0 and "fid" not in figures and figures["inception_score"] is None
    assert "FD-pixels (pixels features, not ADM): " in said.out and "FID" not in said.out + said.err


def test_options_and_networks_that_do_not_go_together_are_refused(digit_files, capsys):
    command = ("evaluations.evaluator", *digit_files, "--features", "digits", "--device", "cpu")
    assert "--tf32: of no use with --features digits" in refused(capsys, *command, "--tf32")
    with pytest.raises(ValueError, match="'clip' are none of inception, dinov2, digits, emoji, pixels"):
        features.extractor("clip")
