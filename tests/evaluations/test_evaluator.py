"""The evaluator, from files to figures: real small files, real processes."""

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from evaluations import digits, evaluator, features
from evaluations.evaluator import evaluate
from evaluations.files import Images
from evaluations.metrics import frechet_distance, precision_recall, statistics
from runtime import cli
from stores.images import digits_images, from_uint8

ROOT = Path(__file__).parent.parent


def draw(count, seed=0, noise=0.0):
    """``count`` digits drawn with replacement, noised (in grey levels of 255): (count, 8, 8, 3) uint8."""
    rng = np.random.default_rng(seed)
    images = digits_images()[0][rng.integers(0, 1797, count)].permute(0, 2, 3, 1).numpy()
    noised = np.rint(images + noise * rng.standard_normal(images.shape)).clip(0, 255).astype(np.uint8)
    return noised.repeat(3, axis=3)


def write(path, images, **members):
    np.savez(path, arr_0=images, **members)
    return path


def call(*args, expect=0):
    """Run the evaluator as a user does: its standard output, and what it says on standard error."""
    command = [sys.executable, "-m", "evaluations.evaluator", *map(str, args), "--device", "cpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "2"})
    assert done.returncode == expect, done.stderr
    return done.stdout, done.stderr


def refused(capsys, *args):
    """The one line with which the evaluator refuses, having exited with 2."""
    with pytest.raises(SystemExit) as exit_:
        cli.main(evaluator.build_parser(), evaluator.run, [*map(str, args), "--device", "cpu"])
    out, err = capsys.readouterr()
    assert exit_.value.code == 2
    assert out == ""
    assert err.count("\n") == 1
    return err


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with the real digits and 400 noisy ones."""
    folder = tmp_path_factory.mktemp("files")
    cli.main(digits.build_parser(), lambda args: args.run(args), ["reference", "--out", str(folder / "reference.npz")])
    write(
        folder / "samples.npz", draw(400, noise=60), arr_1=np.zeros(400, np.int64), provenance=np.array('{"seed": 7}')
    )
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights of Inception-v3, scaled so that the activations neither vanish nor explode."""
    torch.manual_seed(0)

    class Empty(FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict):  # torch-fidelity's constructor insists on loading a file
            pass

    path = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.save({}, path)
    network = Empty("inception", ["2048"], str(path))
    for name, parameter in network.named_parameters():
        if name.endswith("conv.weight"):
            torch.nn.init.kaiming_normal_(parameter)
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def inception(weights):
    return features.extractor("inception", inception_weights=weights)


# ----------------------------------------------------------------------------------------------------------------------
# Inception


def pictures(count, size=40):
    return np.random.default_rng(1).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def test_inception_equals_torch_fidelity(inception, weights):
    images = pictures(3)
    theirs = FeatureExtractorInceptionV3("inception", ["768", "2048", "logits_unbiased"], str(weights))
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


@pytest.mark.slow
def test_inception_figures_use_the_reference_statistics_and_print_adms_lines(weights, inception, tmp_path, capsys):
    images = pictures(10, size=16)
    stored = {}
    for suffix, width in (("", 2048), ("_s", 2023)):
        stored |= {"mu" + suffix: np.full(width, 0.5), "sigma" + suffix: np.eye(width)}
    reference = write(tmp_path / "reference.npz", images[:5], **stored)
    samples = write(tmp_path / "samples.npz", images[5:])
    given = [str(reference), str(samples), "--inception-weights", str(weights), "--device", "cpu"]
    parse = evaluator.build_parser().parse_args
    evaluator.run(parse([*given, "--allow-few", "--json", str(tmp_path / "out.json")]))
    out, err = capsys.readouterr()
    titles = [line.split(": ")[0] for line in out.splitlines()]
    assert titles[:5] == ["Inception Score", "FID", "sFID", "Precision", "Recall"]
    assert titles[5].startswith("FID-5 (not ADM")  # the weights are random
    assert "FID of 5 samples" in err
    found = json.loads((tmp_path / "out.json").read_text())
    own = inception(images[5:])
    for key, of, width in (("fid", "pool", 2048), ("sfid", "spatial", 2023)):
        # Against a unit covariance the root is the sample covariance's own, which five images give as a 5 x 5 matrix.
        centred = own[of].astype(np.float64) - own[of].mean(axis=0, dtype=np.float64)
        spectrum = np.linalg.eigvalsh(centred @ centred.T / 4).clip(min=0)
        expected = (
            ((own[of].mean(axis=0, dtype=np.float64) - 0.5) ** 2).sum() + width + (spectrum - 2 * spectrum**0.5).sum()
        )
        assert found[key] == pytest.approx(expected, rel=1e-4)
    assert found["provenance"]["stored_statistics"] == ["pool", "spatial"]
    assert not found["provenance"]["adm"]

    assert "give 2048 or --allow-few" in refused(capsys, *given)
    write(reference, images[:5], **stored | {"mu": np.zeros(3)})
    assert "its mu (3,)" in refused(capsys, *given, "--allow-few")


def test_wrong_weights_are_refused(files, tmp_path, capsys, monkeypatch):
    pair = (files / "reference.npz", files / "samples.npz")
    (tmp_path / "text").write_text("hello")
    torch.save({"w": torch.zeros(1)}, tmp_path / "other")
    torch.save(Path("a pickle"), tmp_path / "pickle")
    for name, match in (("text", "not the weights"), ("other", "names or shapes"), ("pickle", "not the weights")):
        assert match in refused(capsys, *pair, "--inception-weights", tmp_path / name)
    assert "no such file" in refused(capsys, *pair, "--inception-weights", tmp_path / "absent")
    assert "leave it out" in refused(capsys, *pair, "--features", "digits", "--inception-weights", tmp_path / "other")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nothing answers there: the machine is offline
    assert "weights-inception-2015-12-05-6726825d.pth" in refused(capsys, *pair)


# ----------------------------------------------------------------------------------------------------------------------
# Files


def test_images_come_in_any_pieces(tmp_path):
    images = draw(50)
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "images.npz", arr_0=images)
        opened = Images("SAMPLES", tmp_path / "images.npz")
        assert (opened.count, opened.height, opened.width) == (50, 8, 8)
        pieces = list(opened.batches(slice(13, 41), 10))
        assert [start for start, _ in pieces] == [13, 23, 33]
        np.testing.assert_array_equal(np.concatenate([piece for _, piece in pieces]), images[13:41])


def test_bad_samples_are_refused(files, tmp_path, capsys):
    good = draw(100)
    whole = write(tmp_path / "whole.npz", good).read_bytes()
    (tmp_path / "truncated.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.npz").write_text("hello")
    np.save(tmp_path / "array.npy", good)
    np.savez(tmp_path / "unnamed.npz", images=good)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    (tmp_path / "flipped.npz").write_bytes(flipped)
    with zipfile.ZipFile(tmp_path / "short.npz", "w") as archive, zipfile.ZipFile(tmp_path / "whole.npz") as source:
        archive.writestr("arr_0.npy", source.read("arr_0.npy")[:-1])
    write(tmp_path / "float.npz", good / 255)
    write(tmp_path / "grey.npz", good[..., 0])
    write(tmp_path / "channel.npz", good[..., :1])
    write(tmp_path / "alpha.npz", good.repeat(2, axis=3)[..., :4])
    write(tmp_path / "objects.npz", good.astype(object))
    write(tmp_path / "none.npz", good[:0])
    write(tmp_path / "five.npz", good[:5])
    write(tmp_path / "three.npz", good[:3])
    write(tmp_path / "larger.npz", np.zeros((100, 16, 16, 3), np.uint8))
    write(tmp_path / "note.npz", good, provenance=np.array("hello"))
    write(tmp_path / "pickle.npz", good, provenance=np.array({}, dtype=object))
    before = set(tmp_path.iterdir())
    for name, match in {
        "absent.npz": "no such file",
        "truncated.npz": "not a complete .npz",
        "text.npz": "not a complete .npz",
        "array.npy": "not a complete .npz",
        "flipped.npz": "not a complete .npz",
        "short.npz": "not a complete .npz",
        "unnamed.npz": "no arr_0",
        "float.npz": "float64",
        "grey.npz": "must be uint8 (N, H, W, 3)",
        "channel.npz": "must be uint8 (N, H, W, 3)",
        "alpha.npz": "must be uint8 (N, H, W, 3)",
        "objects.npz": "object",
        "none.npz": "at least one image",
        "five.npz": "give 64 or --allow-few",
        "larger.npz": "16x16 images, the reference's are 8x8",
        "note.npz": "provenance is not JSON",
        "pickle.npz": "a pickle",
    }.items():
        error = refused(capsys, files / "reference.npz", tmp_path / name, "--features", "digits")
        assert match in error
        assert f"SAMPLES {tmp_path / name}" in error
    three = refused(capsys, files / "reference.npz", tmp_path / "three.npz", "--features", "digits", "--allow-few")
    assert "k=3 neighbours need 4" in three
    both = [tmp_path / "larger.npz"] * 2
    assert "reads 8x8 images" in refused(capsys, *both, "--features", "digits")
    assert "REFERENCE" in refused(capsys, tmp_path / "grey.npz", tmp_path / "five.npz", "--features", "digits")
    assert set(tmp_path.iterdir()) == before  # nothing was written


# ----------------------------------------------------------------------------------------------------------------------
# Digits


def test_the_shipped_classifier():
    assert digits.WEIGHTS.stat().st_size < 1_000_000
    saved = torch.load(digits.WEIGHTS, weights_only=True)
    assert saved["provenance"]["command"].startswith("python -m evaluations.digits train")
    images, labels = digits_images()
    _, held_out = digits.split()
    reached = digits.accuracy(digits.load(), from_uint8(images[held_out]), labels[held_out])
    assert reached == pytest.approx(saved["provenance"]["held_out_accuracy"], abs=0.005)
    assert reached >= 0.97


def test_digit_features_tell_generators_apart():
    network = features.extractor("digits")
    real = statistics(network(digits_images()[0].permute(0, 2, 3, 1).numpy().repeat(3, axis=3))["pool"])

    def fid(seed, noise):
        return frechet_distance(*real, *statistics(network(draw(10_000, seed, noise))["pool"]))

    floor, noisy, other_seed, noisier = fid(0, 0), fid(1, 40), fid(2, 40), fid(1, 80)
    assert floor < 0.2
    assert 5 < noisy < noisier < 100
    assert abs(noisy / other_seed - 1) < 0.03


def test_training_writes_a_classifier(tmp_path, capsys):
    parser = digits.build_parser()
    given = ["train", "--steps", "3", "--out", str(tmp_path / "new" / "classifier.pt")]
    cli.main(parser, lambda args: args.run(args), [*given, "--dry-run"])
    assert not list(tmp_path.iterdir())
    cli.main(parser, lambda args: args.run(args), given)
    assert "held-out accuracy" in capsys.readouterr().out
    assert digits.load(tmp_path / "new" / "classifier.pt").config == digits.load().config
    with pytest.raises(cli.UserError, match="not a file that"):
        digits.load(ROOT / "demo.py")


def test_the_command_prints_and_writes_what_evaluate_returns(files, tmp_path):
    pair = (files / "reference.npz", files / "samples.npz")
    options = ("--features", "digits", "--no-cache", "--floor")
    out, err = call(*pair, *options, "--json", tmp_path / "new" / "out.json")
    assert err == ""
    assert all("not ADM" in line for line in out.splitlines())
    assert "sFID" not in out
    found = json.loads((tmp_path / "new" / "out.json").read_text())
    expected = evaluate(*pair, cache=False, floor=True, batch_size=64)
    for key in ("fid", "inception_score", "precision", "recall", "floor"):
        assert found[key] == pytest.approx(expected[key], rel=1e-4)
        assert f": {found[key]:.6g}" in out
    assert found["sfid"] is None
    assert found["count"] == 400
    assert found["floor"] < found["fid"] / 3
    provenance = found["provenance"]
    assert provenance == expected["provenance"]
    assert provenance["samples"] == {"seed": 7}
    assert provenance["samples_file"]["sha256"] == hashlib.sha256(pair[1].read_bytes()).hexdigest()
    assert provenance["weights_sha256"] == hashlib.sha256(digits.WEIGHTS.read_bytes()).hexdigest()
    assert not list(files.glob("*.features.npz"))


def test_figures_do_not_depend_on_the_batch_size(files):
    pair = (files / "reference.npz", files / "samples.npz")
    one, other = (evaluate(*pair, cache=False, batch_size=size) for size in (7, 1000))
    for key in ("fid", "inception_score", "precision", "recall"):
        assert one[key] == pytest.approx(other[key], rel=1e-4)


def test_two_ranks_get_the_same_figures_as_one(files, tmp_path):
    pair = (files / "reference.npz", files / "samples.npz")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    launch += ["-m", "evaluations.evaluator", *map(str, pair), "--features", "digits", "--no-cache", "--device", "cpu"]
    done = subprocess.run(
        [*launch, "--json", str(tmp_path / "two.json")], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    two, one = json.loads((tmp_path / "two.json").read_text()), evaluate(*pair, cache=False)
    assert done.stdout.count("Recall") == 1
    for key in ("fid", "inception_score", "precision", "recall", "count"):
        assert two[key] == pytest.approx(one[key], rel=1e-5)


def test_features_are_kept_until_the_file_changes(tmp_path):
    reference, samples = write(tmp_path / "a.npz", draw(200)), write(tmp_path / "b.npz", draw(200, 1, 30))
    first = evaluate(reference, samples)
    kept = tmp_path / "b.digits.features.npz"
    assert kept.is_file()

    # Figures of a second run come from the kept file: put other features there and they show.
    with np.load(kept) as file:
        table = dict(file)
    np.savez(kept, **table | {"pool": table["pool"] + 1})
    moved = evaluate(reference, samples)
    assert moved["fid"] > first["fid"] + 10
    assert evaluate(reference, samples, cache=False)["fid"] == first["fid"]

    write(samples, draw(200, 2, 60))  # another file of that name
    assert evaluate(reference, samples) == evaluate(reference, samples, cache=False)
    with np.load(kept) as file:
        assert file["key"] != table["key"]
    kept.write_bytes(b"damaged")
    assert evaluate(reference, samples) == evaluate(reference, samples, cache=False)


def test_identical_files(tmp_path):
    path = write(tmp_path / "a.npz", draw(300))
    result = evaluate(path, path, cache=False)
    assert result["fid"] < 1e-3
    assert (result["precision"], result["recall"]) == (1, 1)


def test_dry_run_writes_nothing(files, tmp_path, capsys):
    given = [str(files / "reference.npz"), str(files / "samples.npz"), "--features", "digits", "--device", "cpu"]
    before = set(files.iterdir())
    cli.main(evaluator.build_parser(), evaluator.run, [*given, "--dry-run", "--json", str(tmp_path / "out.json")])
    plan = json.loads(capsys.readouterr().out)
    assert plan["samples_file"]["count"] == 400
    assert set(files.iterdir()) == before
    assert not list(tmp_path.iterdir())


def test_precision_and_recall_of_digits(files):
    """The evaluator's precision is that of samples, its recall that of the reference."""
    network = features.extractor("digits")
    with np.load(files / "reference.npz") as ref, np.load(files / "samples.npz") as sam:
        expected = precision_recall(network(ref["arr_0"])["pool"], network(sam["arr_0"])["pool"])
    result = evaluate(files / "reference.npz", files / "samples.npz", cache=False)
    assert (result["precision"], result["recall"]) == pytest.approx(expected, abs=0.005)
