"""Two equal jobs at once, of every command that fills a place for long: one runs, the other says why it does not."""

import contextlib
import os
import signal
import sys
from pathlib import Path

import pytest
from helpers import NANO_TEACHER, SMALL, call, gan_options, refused, state_of


@pytest.fixture
def jobs(teacher_file, store, student_file, image_folder, autoencoder, digit_files, tmp_path) -> dict:
    """For each command: its words, the option that is refused, and where the lock lies."""
    run, folder, npz = tmp_path / "run", tmp_path / "store", tmp_path / "s.npz"
    images = ["--data-path", image_folder, "--image-size", 8, "--vae", autoencoder, "--num-workers", 0]
    (tmp_path / "captions.txt").write_text("a three\na seven above a one\n")
    text = ["--text", tmp_path / "captions.txt", "--encoder", "words"]
    several = ["--num-samples", 9, "--per-proc-batch-size", 3]
    gan, unfinished = gan_options(store, student_file, iterations=3, run_dir=run), npz.with_suffix(".partial")
    known = {
        "train.py": ([*NANO_TEACHER, "--data-path", "digits", "--iterations", 3, "--run-dir", run], "--run-dir", run),
        "train_ARD.py": (["--data-path", store, *SMALL, "--iterations", 3, "--run-dir", run], "--run-dir", run),
        "train_ARD_gan.py": (gan, "--run-dir", run),
        "sample_trajectory.py": (
            ["--teacher", teacher_file, "--num-trajectories", 9, "--out", folder],
            "--out",
            folder,
        ),
        "encode_latents.py": ([*images, "--out", folder], "--out", folder),
        "encode_captions.py": ([*text, "--out", folder], "--out", folder),
        "sample.py": (["--teacher", teacher_file, *several, "--out", npz], "--out", unfinished),
        "sample_ARD.py": (["--ckpt-path", student_file, *several, "--out", npz], "--out", unfinished),
    }
    known = {script: (words, option, place, place / ".lock") for script, (words, option, place) in known.items()}
    reference, samples = digit_files
    evaluation = [reference, samples, "--features", "digits", "--no-cache", "--json", tmp_path / "m.json"]
    return known | {"evaluations.evaluator": (evaluation, "SAMPLES", samples, Path(f"{samples}.lock"))}


def run_until_held(lock: Path, script: str, words: list) -> int:
    """A fork that runs a command and stops at the first file that it opens after it holds the lock; its process id."""
    sys.stdout.flush()
    first = os.fork()
    if first == 0:

        def stop(event: str, _: tuple) -> None:
            nonlocal lock
            if event == "open" and lock.exists() and lock.stat().st_size:
                lock = lock / "once"
                os.kill(os.getpid(), signal.SIGSTOP)

        sys.addaudithook(stop)
        code = 1
        with contextlib.suppress(BaseException):
            call(script, *words)
            code = 0
        os._exit(code)
    _, status = os.waitpid(first, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    return first


@pytest.mark.parametrize(
    "script",
    ["train.py", "train_ARD.py", "train_ARD_gan.py", "sample_trajectory.py", "encode_latents.py",
     "encode_captions.py", "sample.py", "sample_ARD.py", "evaluations.evaluator"],
)  # fmt: skip
def test_of_two_equal_jobs_at_once_one_runs_and_the_other_says_who(script, jobs, tmp_path, capfd):
    words, option, place, lock = jobs[script]
    first = run_until_held(lock, script, words)
    try:
        before = state_of(tmp_path, place.parent)
        error = refused(capfd, script, *words)
        assert f"{option} {place}: process {first} on " in error and "is at work there; wait for it, or give " in error
        assert state_of(tmp_path, place.parent) == before
    finally:
        os.kill(first, signal.SIGCONT)
        _, status = os.waitpid(first, 0)
    assert os.waitstatus_to_exitcode(status) == 0 and not lock.exists()
    assert state_of(tmp_path) != before
