"""Single flipped bits and files cut short: refused with a sentence, or made good, or harmless; never anything else."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from bits import (
    begin_samples,
    break_off,
    continue_dump,
    draw_all,
    outcome,
    read_captions,
    read_features,
    read_finished,
    read_latents,
    read_samples,
    read_statistics,
    read_store,
    read_student,
    resume,
    run_by_config,
    run_by_name,
    trial,
)
from helpers import SMALL, arrays, call, checkpoint, write_images

from evaluations.evaluator import evaluate
from evaluations.features import extractor
from runtime.files import release
from stores.samples import read_provenance
from stores.shards import note_of


@pytest.fixture(scope="module")
def run(store, tmp_path_factory) -> Path:
    """A run with a checkpoint of step 2 and a snapshot of step 3."""
    folder = tmp_path_factory.mktemp("runs") / "000-DiT-Nano-2"
    call("train_ARD.py", "--data-path", store, *SMALL, "--iterations", 2, "--run-dir", folder)
    later = folder.parent / "later"
    call("train_ARD.py", "--data-path", store, *SMALL, "--iterations", 3, "--run-dir", later)
    shutil.move(later / "checkpoints/0000003.pt", folder / "checkpoints/latest.pt")
    shutil.rmtree(later)
    return folder


@pytest.fixture(scope="module")
def samples(student_file, tmp_path_factory) -> Path:
    """Sixty samples of a student."""
    path = tmp_path_factory.mktemp("samples") / "s.npz"
    call("sample_ARD.py", "--ckpt-path", student_file, "--num-samples", 60, "--out", path)
    return path


def copied(store: Path, folder: Path) -> Path:
    """A copy of a store, to be damaged."""
    return Path(shutil.copytree(store, folder / "store"))


def expect(found: dict, at_least: int, *, refused: bool = True) -> None:
    """Only outcomes that are allowed, and the damage was looked at."""
    assert found.keys() <= {"refused", "equal", "made good"}, dict(found)
    assert found.total() >= at_least and (found["refused"] or not refused), dict(found)


@pytest.mark.parametrize("within", [None, 800], ids=["anywhere", "header"])
def test_a_damaged_shard_is_refused(store, tmp_path, within):
    folder = copied(store, tmp_path)
    shard, draw = folder / "shard-00001.safetensors", random.Random(0)
    found = trial(shard, lambda: read_store(folder), draw, 120, 20, within=within)
    expect(found, 140)
    assert found["refused"] == 140  # the checksum covers every bit


def test_a_damaged_manifest_is_refused(store, tmp_path):
    folder = copied(store, tmp_path)
    expect(trial(folder / "manifest.json", lambda: read_store(folder), random.Random(1), 300, 20), 320)


@pytest.mark.parametrize("name", ["shard-00001.safetensors", "manifest.json"])
def test_damaged_latents_are_refused(latent_store, tmp_path, name):
    folder = copied(latent_store, tmp_path)
    expect(trial(folder / name, lambda: read_latents(folder), random.Random(11), 100, 20), 120)


@pytest.mark.parametrize("name", ["shard-00001.safetensors", "manifest.json"])
def test_damaged_captions_are_refused(tmp_path, name):
    (tmp_path / "captions.txt").write_text("a three\na seven above a one\na nine beside a nine\n")
    folder = tmp_path / "store"
    text = ("--text", tmp_path / "captions.txt", "--encoder", "words")
    call("encode_captions.py", *text, "--rows-per-shard", 2, "--out", folder)
    expect(trial(folder / name, lambda: read_captions(folder), random.Random(12), 100, 20), 120)


def test_a_dump_goes_on_from_a_damaged_shard_or_note_only_when_it_is_made_again(store, tmp_path):
    folder = break_off(store, tmp_path / "store")
    read, shard, draw = (lambda: continue_dump(folder, store)), folder / "shard-00000.safetensors", random.Random(2)
    expect(trial(shard, read, draw, 60, 10, within=800), 70)
    again = (read() | {"again": True},)
    expect(trial(note_of(shard), read, draw, 60, 10, allowed=again), 70)
    release(folder)


def test_a_damaged_checkpoint_is_refused(run):
    path = run / "checkpoints/latest.pt"
    for within, seed in ((None, 3), (400, 4)):
        expect(trial(path, lambda: read_student(path), random.Random(seed), 100, 20, within=within), 120)


def test_a_damaged_snapshot_falls_back_to_the_checkpoint_before_it(run, capsys):
    config = json.loads((run / "config.json").read_text())
    read, older = (lambda: resume(run, config)), checkpoint(run, 2)
    found = trial(run / "checkpoints/latest.pt", read, random.Random(5), 40, 8, allowed=(older,))
    expect(found, 48, refused=False)
    assert not found["refused"] and "trying the one before it" in capsys.readouterr().out
    release(run)


def test_a_damaged_config_is_no_run_of_ours(run):
    """By its name the run is refused, among others it is passed over: another number, nothing overwritten."""
    config, draw = json.loads((run / "config.json").read_text()), random.Random(6)
    expect(trial(run / "config.json", lambda: run_by_name(run, config), draw, 40, 10), 50)
    found = trial(run / "config.json", lambda: run_by_config(run, config), draw, 40, 10, allowed=("001-DiT-Nano-2",))
    expect(found, 50, refused=False)
    release(run)


def test_damaged_samples_are_refused(samples):
    for within, seed in ((None, 7), (400, 8)):
        expect(trial(samples, lambda: read_samples(samples), random.Random(seed), 200, 20, within=within), 220)


def test_a_header_that_promises_fewer_images_than_there_are_is_refused(samples):
    damage = samples.read_bytes().replace(b"(60, 8, 8, 3)", b"(20, 8, 8, 3)")
    wanted, path = read_samples(samples), samples.with_name("fewer.npz")
    path.write_bytes(damage)
    assert outcome(lambda: read_samples(path), wanted) == "refused"


@pytest.mark.parametrize("what", ["samples", "features"])
def test_a_length_in_the_directory_that_hides_the_next_entries_is_noticed(what, samples):
    network, kept = extractor("digits").load(), samples.with_name("s.digits.features.npz")
    evaluate(samples, samples, allow_few=True)
    whole = kept.read_bytes()
    path, read = {
        "samples": (samples, lambda: read_samples(samples)),
        "features": (kept, lambda: read_features(samples, network, whole)),
    }[what]
    content, wanted = path.read_bytes(), read()
    first = content.index(b"PK\x01\x02")  # of the directory's entries; its bytes 32 and 33 are a comment's length
    path.write_bytes(content[: first + 33] + b"\x01" + content[first + 34 :])
    found = outcome(read, wanted, wanted | {"kept": False})
    path.write_bytes(content)
    assert found == {"samples": "refused", "features": "made good"}[what]


def test_a_sampler_refuses_a_damaged_file_in_its_place(samples):
    """It reads the provenance only: the evaluator finds other damage."""
    wanted = read_provenance(samples)
    expect(trial(samples, lambda: read_finished(samples, wanted), random.Random(9), 200, 20), 220)


@pytest.mark.parametrize("name", ["provenance.json", "00000000-00000004.npz"])
def test_unfinished_samples_that_are_damaged_are_refused_or_drawn_again(name, tmp_path):
    path = tmp_path / "s.npz"
    damaged, read = begin_samples(path) / name, lambda: draw_all(path)
    found = trial(damaged, read, random.Random(10), 80, 20, allowed=(read() | {"again": True},))
    expect(found, 100, refused=False)
    assert found["refused"] + found["made good"]


def test_features_beside_damaged_ones_are_made_anew(samples):
    network, path = extractor("digits").load(), samples.with_name("s.digits.features.npz")
    evaluate(samples, samples, allow_few=True)
    whole, draw = path.read_bytes(), random.Random(12)
    read = lambda: read_features(samples, network, whole)  # noqa: E731
    for within in (None, 400):
        found = trial(path, read, draw, 60, 20, within=within, allowed=(read() | {"kept": False},))
        expect(found, 80, refused=False)
        assert found["made good"]


def test_damaged_statistics_beside_real_images_are_refused(samples, tmp_path):
    path = write_images(tmp_path / "r.npz", arrays(samples)["arr_0"], mu=np.arange(64.0), sigma=np.eye(64))
    for within in (None, 400):
        expect(trial(path, lambda: read_statistics(path), random.Random(13), 60, 10, within=within), 70)
