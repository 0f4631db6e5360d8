"""Quality while training: the evaluator's own figures of what the sampler draws, in the run's log."""

import numpy as np
import pytest
import torch
from helpers import NANO_TEACHER, SMALL, call, gan_options, refused, scalars, state_of

from evaluations.evaluator import evaluate
from evaluations.quality import PeriodicEvaluator, QualityOptions
from runtime.distributed import DistributedContext
from runtime.vae import Pixels
from sampler import Sampler
from stores import checkpoints


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Seventy images of noise, as many as the digit classifier has features and some more."""
    path = tmp_path_factory.mktemp("reference") / "reference.npz"
    np.savez(path, arr_0=np.random.default_rng(0).integers(0, 256, (70, 8, 8, 3), dtype=np.uint8))
    return path


def test_figures_are_those_of_a_file_of_the_same_samples(reference, student_file, tmp_path):
    student, _ = checkpoints.load_student(student_file)
    preview = Sampler(lambda z, y: student.sample(z, y)[:, -1], student, Pixels(), torch.device("cpu"), stream="sample")
    options = {"eval_reference": str(reference), "eval_features": "digits", "eval_samples": 65}
    found = PeriodicEvaluator(preview, DistributedContext(), 8, QualityOptions(**options))(tmp_path / "eval")
    assert not list(tmp_path.iterdir())
    call("sample_ARD.py", "--ckpt-path", student_file, "--num-samples", 65, "--out", tmp_path / "samples.npz")
    wanted = evaluate(reference, tmp_path / "samples.npz", cache=False)
    assert found == {name: wanted[name] for name in ("fid", "precision", "recall")}


def test_quality_is_logged_and_leaves_nothing_behind(store, student_file, reference, tmp_path):
    run, before = tmp_path / "run", state_of(reference.parent)
    quality = {"eval_every": 2, "eval_reference": reference, "eval_features": "digits", "eval_samples": 64}
    call("train_ARD_gan.py", *gan_options(store, student_file, iterations=3, run_dir=run, accumulation=2, **quality))
    lines = [line.split() for line in (run / "log.txt").read_text().splitlines() if line.startswith("eval ")]
    assert [line[1] for line in lines] == ["0000002", "0000003"] and not (run / "eval").exists()
    assert all(list(line) == ["fid", "precision", "recall"] for line in scalars(run, "eval"))
    assert scalars(run, "eval")[0]["fid"] > 0
    assert state_of(reference.parent).items() >= before.items()


@pytest.mark.parametrize("script", ["train.py", "train_ARD.py", "train_ARD_gan.py"])
def test_an_evaluation_that_a_kill_cut_off_is_made_up_for_once(script, store, student_file, reference, tmp_path):
    run = tmp_path / "run"
    options = {
        "train.py": (*NANO_TEACHER, "--data-path", "digits", "--global-batch-size", 12),
        "train_ARD.py": (*SMALL, "--data-path", store),
        "train_ARD_gan.py": gan_options(store, student_file),
    }[script]
    quality = ("--eval-every", 2, "--eval-reference", reference, "--eval-features", "digits", "--eval-samples", 64)
    command = (script, *options, *quality, "--iterations", 2, "--run-dir", run)
    call(*command)
    whole = (run / "log.txt").read_text().splitlines()
    (run / "log.txt").write_text("\n".join(line for line in whole if not line.startswith("eval ")) + "\n")
    for _ in range(2):
        call(*command)
    found = [line for line in (run / "log.txt").read_text().splitlines() if line.startswith("eval ")]
    assert found == [line for line in whole if line.startswith("eval ")] and len(found) == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"eval_reference": "absent.npz"}, "--eval-reference absent.npz: no such file"),
        ({"eval_reference": "LARGE"}, "16x16 images, this model's are 8x8"),
        ({"eval_samples": 63}, "--eval-samples 63: FID needs at least 64 samples"),
    ],
)
def test_what_could_not_be_evaluated_later_is_refused_at_the_start(
    store, student_file, reference, tmp_path, capsys, changes, words
):
    np.savez(tmp_path / "large.npz", arr_0=np.zeros((70, 16, 16, 3), np.uint8))
    quality = {"eval_every": 2, "eval_reference": reference, "eval_features": "digits", "eval_samples": 64} | changes
    if quality["eval_reference"] == "LARGE":
        quality["eval_reference"] = tmp_path / "large.npz"
    given = gan_options(store, student_file, run_dir=tmp_path / "run", **quality)
    assert words in refused(capsys, "train_ARD_gan.py", *given) and not (tmp_path / "run").exists()
