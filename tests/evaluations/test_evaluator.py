"""The evaluator, from files to figures: real small files, real processes.

Reading images in pieces and refusing bad ones; Inception with stored statistics; what the command prints and writes;
figures by any batch size and number of ranks; features that are kept; definitions, provenance, files left alone.
"""

import hashlib
import json
import zipfile

import numpy as np
import pytest
from helpers import arrays, call, draw_digits, refused, spawn, state_of, write_images

from evaluations import features
from evaluations.evaluator import evaluate
from evaluations.features import YARDSTICKS
from evaluations.metrics import precision_recall
from stores.image_arrays import Images

CPU = ("--device", "cpu")
DIGITS = ("--features", "digits", *CPU)

#################################################################################
#                                     Files                                     #
#################################################################################


def test_images_come_in_any_pieces(tmp_path):
    images = draw_digits(50)
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "images.npz", arr_0=images)
        opened = Images("SAMPLES", tmp_path / "images.npz")
        assert (opened.count, opened.height, opened.width) == (50, 8, 8)
        pieces = list(opened.batches(slice(13, 41), 10))
        assert [start for start, _ in pieces] == [13, 23, 33]
        np.testing.assert_array_equal(np.concatenate([piece for _, piece in pieces]), images[13:41])


def test_bad_samples_are_refused(digit_files, tmp_path, capsys):
    good = draw_digits(100)
    whole = write_images(tmp_path / "whole.npz", good).read_bytes()
    (tmp_path / "truncated.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.npz").write_text("hello")
    np.save(tmp_path / "array.npy", good)
    np.savez(tmp_path / "unnamed.npz", images=good)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    (tmp_path / "flipped.npz").write_bytes(flipped)
    with zipfile.ZipFile(tmp_path / "short.npz", "w") as archive, zipfile.ZipFile(tmp_path / "whole.npz") as source:
        archive.writestr("arr_0.npy", source.read("arr_0.npy")[:-1])
    write_images(tmp_path / "float.npz", good / 255)
    write_images(tmp_path / "grey.npz", good[..., 0])
    write_images(tmp_path / "channel.npz", good[..., :1])
    write_images(tmp_path / "alpha.npz", good.repeat(2, axis=3)[..., :4])
    write_images(tmp_path / "objects.npz", good.astype(object))
    write_images(tmp_path / "none.npz", good[:0])
    write_images(tmp_path / "five.npz", good[:5])
    write_images(tmp_path / "three.npz", good[:3])
    write_images(tmp_path / "larger.npz", np.zeros((100, 16, 16, 3), np.uint8))
    write_images(tmp_path / "note.npz", good, provenance=np.array("hello"))
    write_images(tmp_path / "pickle.npz", good, provenance=np.array({}, dtype=object))
    before = state_of(tmp_path)
    command = ("evaluations.evaluator", *DIGITS, digit_files[0])
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
        error = refused(capsys, *command, tmp_path / name)
        assert match in error
        assert f"SAMPLES {tmp_path / name}" in error
    assert "k=3 neighbours need 4" in refused(capsys, *command, tmp_path / "three.npz", "--allow-few")
    both = [tmp_path / "larger.npz"] * 2
    assert "reads 8x8 images" in refused(capsys, *command[:-1], *both)
    assert "REFERENCE" in refused(capsys, *command[:-1], tmp_path / "grey.npz", tmp_path / "five.npz")
    assert state_of(tmp_path) == before  # nothing was written


#################################################################################
#                                    Figures                                    #
#################################################################################


@pytest.mark.slow
def test_inception_figures_use_the_reference_statistics_and_print_adms_lines(
    inception_weights, inception, tmp_path, capsys
):
    images = np.random.default_rng(1).integers(0, 256, (10, 16, 16, 3), dtype=np.uint8)
    stored = {}
    for suffix, width in (("", 2048), ("_s", 2023)):
        stored |= {"mu" + suffix: np.full(width, 0.5), "sigma" + suffix: np.eye(width)}
    reference = write_images(tmp_path / "reference.npz", images[:5], **stored)
    samples = write_images(tmp_path / "samples.npz", images[5:])
    command = ("evaluations.evaluator", reference, samples, "--inception-weights", inception_weights, *CPU)
    call(*command, "--allow-few", "--json", tmp_path / "out.json")
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

    assert "give 2048 or --allow-few" in refused(capsys, *command)
    write_images(reference, images[:5], **stored | {"mu": np.zeros(3)})
    assert "its mu (3,)" in refused(capsys, *command, "--allow-few")


def test_the_command_prints_and_writes_what_evaluate_returns(digit_files, tmp_path):
    options = (*DIGITS, "--no-cache", "--floor", "--json", tmp_path / "new" / "out.json")
    done = spawn("evaluations.evaluator", *digit_files, *options)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    out = done.stdout
    assert all("not ADM" in line for line in out.splitlines())
    assert "sFID" not in out
    found = json.loads((tmp_path / "new" / "out.json").read_text())
    expected = evaluate(*digit_files, cache=False, floor=True, batch_size=64)
    for key in ("fid", "inception_score", "precision", "recall", "floor"):
        assert found[key] == pytest.approx(expected[key], rel=1e-4)
        assert f": {found[key]:.6g}" in out
    assert found["sfid"] is None
    assert found["count"] == 400
    assert found["floor"] < found["fid"] / 3
    provenance = found["provenance"]
    assert provenance == expected["provenance"]
    assert provenance["samples"] == {"seed": 7}
    assert provenance["samples_file"]["sha256"] == hashlib.sha256(digit_files[1].read_bytes()).hexdigest()
    assert provenance["weights_sha256"] == hashlib.sha256(YARDSTICKS["digits"].weights.read_bytes()).hexdigest()
    assert not list(digit_files[0].parent.glob("*.features.npz"))


def test_figures_do_not_depend_on_the_batch_size(digit_files):
    one, other = (evaluate(*digit_files, cache=False, batch_size=size) for size in (7, 1000))
    for key in ("fid", "inception_score", "precision", "recall"):
        assert one[key] == pytest.approx(other[key], rel=1e-4)


def test_two_ranks_get_the_same_figures_as_one(digit_files, tmp_path):
    options = (*DIGITS, "--no-cache", "--json", tmp_path / "two.json")
    done = spawn("evaluations.evaluator", *digit_files, *options, ranks=2)
    assert done.returncode == 0, done.stderr
    two, one = json.loads((tmp_path / "two.json").read_text()), evaluate(*digit_files, cache=False)
    assert done.stdout.count("Recall") == 1
    for key in ("fid", "inception_score", "precision", "recall", "count"):
        assert two[key] == pytest.approx(one[key], rel=1e-5)


def test_features_are_kept_until_the_file_changes(tmp_path):
    reference, samples = (
        write_images(tmp_path / "a.npz", draw_digits(200)),
        write_images(tmp_path / "b.npz", draw_digits(200, 1, 30)),
    )
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

    write_images(samples, draw_digits(200, 2, 60))  # another file of that name
    assert evaluate(reference, samples) == evaluate(reference, samples, cache=False)
    with np.load(kept) as file:
        assert file["key"] != table["key"]
    kept.write_bytes(b"damaged")
    assert evaluate(reference, samples) == evaluate(reference, samples, cache=False)


def test_identical_files_have_no_distance_and_lie_inside_each_other(tmp_path):
    path = write_images(tmp_path / "a.npz", draw_digits(300))
    result = evaluate(path, path, cache=False)
    assert result["fid"] < 1e-3
    assert (result["precision"], result["recall"]) == (1, 1)


def test_precision_is_that_of_samples_and_recall_that_of_the_reference(digit_files):
    network = features.extractor("digits").load()
    pools = [network(arrays(path)["arr_0"])["pool"] for path in digit_files]
    expected = precision_recall(*pools)
    result = evaluate(*digit_files, cache=False)
    assert (result["precision"], result["recall"]) == pytest.approx(expected, abs=0.005)


def test_metrics_carry_the_provenance_of_the_samples(tmp_path, store):
    call("stores.trajectories", "export", store, "--num-samples", 40, "--out", tmp_path / "teacher.npz")
    call("evaluations.digits", "reference", "--out", tmp_path / "digits.npz")
    call("evaluations.evaluator", tmp_path / "digits.npz", tmp_path / "teacher.npz", *DIGITS, "--allow-few",
         "--json", tmp_path / "metrics.json")  # fmt: skip
    samples = json.loads((tmp_path / "metrics.json").read_text())["provenance"]["samples"]
    assert {"teacher_hash", "cfg_scale", "solver_steps", "solver_indices", "seed"} <= samples.keys()


def test_a_dry_run_writes_nothing(digit_files, tmp_path, capsys):
    before = state_of(digit_files[0].parent)
    call("evaluations.evaluator", *digit_files, *DIGITS, "--dry-run", "--json", tmp_path / "out.json")
    plan = json.loads(capsys.readouterr().out)
    assert plan["samples_file"]["count"] == 400
    assert state_of(digit_files[0].parent, tmp_path) == before


#################################################################################
#                        What is not to be written over                         #
#################################################################################


def test_figures_are_written_over_no_input_and_over_nothing_but_figures(digit_files, tmp_path, capsys):
    reference, samples = tmp_path / "reference.npz", tmp_path / "samples.npz"
    reference.write_bytes(digit_files[0].read_bytes())
    samples.write_bytes(digit_files[1].read_bytes())
    (tmp_path / "link.json").symlink_to(samples)
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "folder.json").mkdir()
    command = ("evaluations.evaluator", reference, samples, *DIGITS, "--no-cache", "--json")
    before = state_of(tmp_path)
    for out, message in {
        reference: "would be written over REFERENCE, give another file",
        samples: "would be written over SAMPLES",
        tmp_path / "link.json": "would be written over SAMPLES",
        tmp_path / "x" / ".." / "samples.npz": "would be written over SAMPLES",
        tmp_path / "list.json": "exists already and is not figures of this command; give another name",
        tmp_path / "folder.json": "exists already",
        digit_files[0]: "exists already",
    }.items():
        error = refused(capsys, *command, out)
        assert f"--json {out}: {message}" in error
    assert state_of(tmp_path) == before
    call(*command, tmp_path / "figures.json")
    call(*command, tmp_path / "figures.json")
    assert "fid" in json.loads((tmp_path / "figures.json").read_text())


def test_features_are_kept_over_no_other_file(digit_files, tmp_path, capsys):
    """Of a file whose name is that of the other's features."""
    samples, reference = tmp_path / "a.npz", tmp_path / "a.digits.features.npz"
    samples.write_bytes(digit_files[1].read_bytes())
    reference.write_bytes(digit_files[0].read_bytes())
    call("evaluations.evaluator", reference, samples, *DIGITS)
    assert f"features {reference}: exists already" in capsys.readouterr().err
    assert reference.read_bytes() == digit_files[0].read_bytes()
