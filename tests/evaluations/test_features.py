"""Networks that make features: Inception-v3 as torch-fidelity has it, and the classifier of digits."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import draw_digits, refused
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
    network = features.extractor("digits")
    real = statistics(network(digits_images()[0].permute(0, 2, 3, 1).numpy().repeat(3, axis=3))["pool"])

    def fid(seed, noise):
        return frechet_distance(*real, *statistics(network(draw_digits(10_000, seed, noise))["pool"]))

    floor, noisy, other_seed, noisier = fid(0, 0), fid(1, 40), fid(2, 40), fid(1, 80)
    assert floor < 0.2
    assert 5 < noisy < noisier < 100
    assert abs(noisy / other_seed - 1) < 0.03


def test_wrong_weights_are_refused(digit_files, tmp_path, capsys, monkeypatch):
    command = ("evaluations.evaluator", *digit_files, "--device", "cpu")
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


def test_options_and_networks_that_do_not_go_together_are_refused(digit_files, capsys):
    command = ("evaluations.evaluator", *digit_files, "--features", "digits", "--device", "cpu")
    assert "--tf32: of no use with --features digits" in refused(capsys, *command, "--tf32")
    with pytest.raises(ValueError, match="'clip' are none of inception, dinov2, digits"):
        features.extractor("clip")
