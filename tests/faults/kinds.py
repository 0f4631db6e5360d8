"""Every kind of file that is read again, so that soak.py can damage thousands of them: ``--bits 10000``."""

import contextlib
import json
import os
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import bits
import numpy as np
from helpers import SMALL, arrays, call, checkpoint, write_images

from evaluations.evaluator import evaluate
from evaluations.features import extractor
from runtime.files import release


class Kind(NamedTuple):
    """A file, its reader, the bytes at its start that are damaged half of the time, other content it may have."""

    path: Path
    read: bits.Reader
    head: int
    allowed: tuple[Any, ...] = ()


def kinds(base: Path) -> dict[str, Kind]:
    """All kinds, in ``base``, where ``make_inputs`` has put a store, samples, images and an autoencoder."""
    store, samples = base / "store", base / "few.npz"
    encode = ["--data-path", base / "images", "--image-size", 8, "--vae", base / "vae", "--rows-per-shard", 10]
    train = ["--data-path", store, *SMALL, "--ckpt-every", 5]
    captions, text = base / "captions", ["--text", base / "captions.txt", "--encoder", "words"]
    (base / "captions.txt").write_text("a three\na seven above a one\n" * 5)
    call("encode_captions.py", *text, "--rows-per-shard", 6, "--out", captions)
    latents, run, reference = base / "latents", base / "runs/000-DiT-Nano-2", base / "statistics.npz"
    call("encode_latents.py", *encode, "--num-workers", 0, "--out", latents)
    call("train_ARD.py", *train, "--iterations", 5, "--run-dir", run)
    call("train_ARD.py", *train, "--iterations", 7, "--run-dir", base / "later")
    shutil.move(base / "later/checkpoints/0000007.pt", run / "checkpoints/latest.pt")
    content, config = arrays(base / "samples.npz"), json.loads((run / "config.json").read_text())
    write_images(samples, content["arr_0"][:40], provenance=content["provenance"])
    write_images(reference, content["arr_0"][:40], mu=np.arange(64.0), sigma=np.eye(64))
    evaluate(samples, samples, allow_few=True)
    kept, network = samples.with_name("few.digits.features.npz"), extractor("digits").load()
    whole, unfinished = kept.read_bytes(), bits.break_off(store, base / "unfinished")
    partial, provenance = bits.begin_samples(base / "nine.npz"), bits.read_provenance(base / "samples.npz")

    def of_store() -> dict:
        return bits.read_store(store)

    def of_latents() -> dict:
        return bits.read_latents(latents)

    def of_captions() -> dict:
        return bits.read_captions(captions)

    def continued() -> dict:
        return bits.continue_dump(unfinished, store)

    def drawn() -> dict:
        return bits.draw_all(base / "nine.npz")

    def of_features() -> dict:
        return bits.read_features(samples, network, whole)

    def student() -> dict:
        return bits.read_student(run / "checkpoints/0000005.pt")

    again, shard = (drawn() | {"again": True},), "shard-00000.safetensors"
    return {
        "shard of trajectories": Kind(store / shard, of_store, 800),
        "manifest of trajectories": Kind(store / "manifest.json", of_store, 400),
        "shard of latents": Kind(latents / shard, of_latents, 800),
        "manifest of latents": Kind(latents / "manifest.json", of_latents, 400),
        "shard of captions": Kind(captions / shard, of_captions, 800),
        "manifest of captions": Kind(captions / "manifest.json", of_captions, 400),
        "shard of an unfinished store": Kind(unfinished / shard, continued, 800),
        "note of a shard": Kind(unfinished / "shard-00000.json", continued, 40, (continued() | {"again": True},)),
        "checkpoint": Kind(run / "checkpoints/0000005.pt", student, 400),
        "snapshot": Kind(run / "checkpoints/latest.pt", lambda: bits.resume(run, config), 400, (checkpoint(run, 5),)),
        "config.json, by name": Kind(run / "config.json", lambda: bits.run_by_name(run, config), 200),
        "config.json, among others": Kind(
            run / "config.json", lambda: bits.run_by_config(run, config), 200, ("001-DiT-Nano-2",)
        ),  # fmt: skip
        "samples": Kind(samples, lambda: bits.read_samples(samples), 400),
        "samples that exist already": Kind(
            base / "samples.npz", lambda: bits.read_finished(base / "samples.npz", provenance), 400
        ),  # fmt: skip
        "statistics beside real images": Kind(reference, lambda: bits.read_statistics(reference), 400),
        "features kept beside samples": Kind(kept, of_features, 400, (of_features() | {"kept": False},)),
        "part of unfinished samples": Kind(partial / "00000000-00000004.npz", drawn, 400, again),
        "provenance.json of them": Kind(partial / "provenance.json", drawn, 40, again),
    }


def damage(known: dict[str, Kind], faults: int, seed: str) -> dict[str, Counter]:
    """Faults over all kinds: of each, a tenth cut short, half of the rest with a bit flipped near the start."""
    counts = {name: Counter() for name in known}
    draw, each = random.Random(seed), -(-faults // len(known))
    for name, (path, read, head, allowed) in known.items():
        cuts = each // 10
        near = (each - cuts) // 2
        for flips, cut, within in ((near, 0, head), (each - cuts - near, cuts, None)):
            with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):  # warnings, thousands
                counts[name] += bits.trial(path, read, draw, flips, cut, within=within, allowed=allowed)
        release(path.parent), release(path.parent.parent)
        print(f"{name}: {dict(counts[name])}", flush=True)
    return counts
