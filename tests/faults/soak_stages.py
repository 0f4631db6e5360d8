"""The commands that soak.py disturbs, with inputs of their own, and readers of their results."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import bits
import numpy as np
from helpers import NANO_TEACHER, SMALL, arrays, call, draw_digits, gan_options, save_autoencoder, write_images
from PIL import Image
from safetensors.torch import load_file

from stores import checkpoints

GROUPS = (
    "dumps",
    "training",
    "drawing",
    "others",
)  # others: where teachers and real images come from, and dumps whose ranks change


class Stage(NamedTuple):
    """A command whose words know the folder that it writes to, and a reader of its results."""

    group: str
    script: str
    options: Callable[[Path], list]
    result: Callable[[Path], dict]
    ranks: int = 0
    elastic: bool = False  # by one process or by ``ranks``, each time anew


def names(folder: Path) -> list[str]:
    """The files of a folder, whose sub-folders' files are named by their paths."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def store_content(out: Path) -> dict:
    """Manifest and tensors of a store, and the names of all its files: nothing is left over."""
    shards = {path.name: load_file(path) for path in sorted((out / "store").glob("*.safetensors"))}
    return {"shards": shards, "manifest": json.loads((out / "store/manifest.json").read_text()), "files": names(out)}


def run_content(out: Path) -> dict:
    """The checkpoints of a run and the names of its files, tensorboard's apart."""
    kept = {path.name: checkpoints.load(path, "") for path in sorted((out / "run/checkpoints").glob("*.pt"))}
    files = [name for name in names(out) if "events." not in name]
    return {"checkpoints": kept, "files": files, "config": json.loads((out / "run/config.json").read_text())}


def samples_content(out: Path) -> dict:
    """The arrays of samples, and the names of all files."""
    return {"arrays": bits.arrays_as_tensors(out / "s.npz"), "files": names(out)}


def samples_near(out: Path, of_one: Path) -> dict:
    """The same where ranks share anew the missing parts: other batches, so the arrays are near those of one rank."""
    found, one = arrays(out / "s.npz"), arrays(of_one)
    bound = 1e-4 * np.abs(one["latents"]).max()
    near = np.abs(found["latents"] - one["latents"]).max() < bound and (found["arr_1"] == one["arr_1"]).all()
    images = np.abs(found["arr_0"].astype(int) - one["arr_0"]).max() <= 1 + 128 * bound
    return {"near": bool(near and images), "provenance": str(found["provenance"]), "files": names(out)}


def figures(out: Path) -> dict:
    """The evaluator's figures, and the names of all files."""
    return {"metrics": json.loads((out / "m.json").read_text()), "files": names(out)}


def save_image_folder(folder: Path) -> Path:
    """Forty pictures of noise in two classes."""
    draw = np.random.default_rng(0)
    for i in range(40):
        path = folder / f"class{i % 2}" / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(256, size=(9, 12, 3), dtype=np.uint8)).save(path)
    return folder


def stages(base: Path) -> dict[str, Stage]:
    """All stages; their inputs are made in ``base``."""
    teacher, store, student = base / "teacher/checkpoints/0000020.pt", base / "store", base / "student/checkpoints"
    teach = [*NANO_TEACHER, "--data-path", "digits"]
    call("train.py", *teach, "--global-batch-size", 64, "--iterations", 20, "--run-dir", base / "teacher")
    dump = ["--teacher", teacher, "--rows-per-shard", 4, "--per-proc-batch-size", 2, "--num-trajectories"]
    call("sample_trajectory.py", *dump, 60, "--out", store)
    train = ["--data-path", store, *SMALL, "--snapshot-every", 2, "--ckpt-every", 5]
    call("train_ARD.py", *train, "--iterations", 5, "--run-dir", student.parent)
    gan = gan_options(store, student / "0000005.pt", iterations=30, snapshot_every=2, ckpt_every=12, keep=2)
    draw = ["--ckpt-path", student / "0000005.pt", "--per-proc-batch-size", 8, "--save-latents", "--num-samples"]
    call("sample_ARD.py", *draw, 300, "--out", base / "samples.npz")
    call("sample_ARD.py", *draw, 600, "--out", base / "one.npz")
    write_images(base / "reference.npz", draw_digits(400))
    encode = ["--data-path", save_image_folder(base / "images"), "--image-size", 8, "--vae",
              save_autoencoder(base / "vae"), "--rows-per-shard", 2, "--per-proc-batch-size", 1]  # fmt: skip

    def metrics(out: Path) -> list:
        for name in ("samples.npz", "reference.npz"):
            if not (out / name).exists():
                shutil.copyfile(base / name, out / name)
        files = [out / "reference.npz", out / "samples.npz"]
        return [*files, "--features", "digits", "--allow-few", "--floor", "--batch-size", 4, "--json", out / "m.json"]

    def into(*options) -> Callable[[Path], list]:
        return lambda out: [*options[:-1], out / options[-1]]

    run, two_ranks = ("--run-dir", "run"), {"ranks": 2}
    dumps = partial(Stage, "dumps", "sample_trajectory.py", result=store_content)
    ard, adversarial = (partial(Stage, "training", f"{name}.py", result=run_content)
                        for name in ("train_ARD", "train_ARD_gan"))  # fmt: skip
    one_teacher = into(*teach, "--snapshot-every", 2, "--ckpt-every", 15, "--iterations", 30, *run)
    return {
        "sample_trajectory, 2 ranks": dumps(into(*dump, 400, "--out", "store"), **two_ranks),
        "sample_trajectory, 1 or 2 ranks": Stage(
            "others", "sample_trajectory.py", into(*dump, 200, "--out", "store"), store_content, ranks=2, elastic=True
        ),  # fmt: skip
        "train_ARD": ard(into(*train, "--iterations", 40, *run)),
        "train_ARD, workers": ard(into(*train, "--num-workers", 2, "--iterations", 40, *run)),
        "train_ARD, 2 ranks": ard(into(*train, "--num-workers", 1, "--iterations", 80, *run), **two_ranks),
        "train_ARD_gan": adversarial(into(*gan, *run)),
        "train_ARD_gan, 2 ranks": adversarial(into(*gan, *run), **two_ranks),
        "sample": Stage(
            "drawing",
            "sample.py",
            into("--teacher", teacher, "--per-proc-batch-size", 8, "--num-samples", 100, "--out", "s.npz"),
            samples_content,
        ),  # fmt: skip
        "sample_ARD": Stage("drawing", "sample_ARD.py", into(*draw, 300, "--out", "s.npz"), samples_content),
        "sample_ARD, 2 ranks": Stage(
            "drawing",
            "sample_ARD.py",
            into(*draw, 600, "--out", "s.npz"),
            partial(samples_near, of_one=base / "one.npz"),
            **two_ranks,
        ),  # fmt: skip
        "evaluator": Stage("drawing", "evaluations.evaluator", metrics, figures),
        "evaluator, 2 ranks": Stage("drawing", "evaluations.evaluator", metrics, figures, **two_ranks),
        "train": Stage("others", "train.py", one_teacher, run_content),
        "train, 2 ranks": Stage("others", "train.py", one_teacher, run_content, **two_ranks),
        "encode_latents": Stage(
            "others", "encode_latents.py", into(*encode, "--num-workers", 2, "--out", "store"), store_content
        ),  # fmt: skip
        "encode_latents, 2 ranks": Stage(
            "others",
            "encode_latents.py",
            into(*encode, "--num-workers", 0, "--out", "store"),
            store_content,
            **two_ranks,
        ),  # fmt: skip
    }
