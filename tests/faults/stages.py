"""Every command that writes, at its smallest or some times larger, in all its ways, and the inputs of all.

Shared by the scripts that disturb them: crashes.py, disks.py, signals.py, grammar.py, soak.py.
"""

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "tests")) if path not in sys.path]
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.utils.tensorboard  # noqa: E402, F401  as all that a stage imports later: not again in every fork
from helpers import NANO_TEACHER, SMALL, call, gan_options, save_autoencoder, write_images  # noqa: E402
from PIL import Image  # noqa: E402

from stores.digits import NUMBERS  # noqa: E402

torch.set_num_threads(1)
STAGES = ("train", "encode_latents", "encode_captions", "sample_trajectory", "train_ARD", "train_ARD_gan", "sample",
          "sample_ARD", "evaluator", "slim", "export", "repair")  # fmt: skip


class Stage(NamedTuple):
    """A command whose words know the folder that it writes to, and the files that it needs before it starts."""

    script: str
    options: Callable[[Path], list]
    prepare: Callable[[Path], object] = lambda out: None
    done: str = "nothing"  # with these words a command may refuse a finished result
    ranks: int = 0
    elastic: bool = False  # by one process or by ``ranks``, each time anew
    near: bool = False  # ranks share anew what is missing, in other batches, which round otherwise


def make_inputs(base: Path, times: int = 1) -> Path:
    """A teacher, a store, a student, images and an autoencoder, all as small as can be, or some times more of each."""
    draw = np.random.default_rng(0)
    call("train.py", *NANO_TEACHER, "--data-path", "digits", "--iterations", 2, "--run-dir", base / "teacher")
    call("sample_trajectory.py", "--teacher", base / "teacher/checkpoints/0000002.pt", "--num-trajectories", 20,
         "--solver-steps", 4, "--rows-per-shard", 8, "--out", base / "store")  # fmt: skip
    call("train_ARD.py", "--data-path", base / "store", *SMALL, "--iterations", 2, "--run-dir", base / "student")
    call("sample_ARD.py", "--ckpt-path", base / "student/checkpoints/0000002.pt", "--num-samples", 70 * times,
         "--out", base / "samples.npz")  # fmt: skip
    write_images(base / "reference.npz", draw.integers(0, 256, (70 * times, 8, 8, 3), dtype=np.uint8))
    for i in range(7 * times):
        path = base / f"images/class{i % 2}/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    save_autoencoder(base / "vae")
    (base / "captions.txt").write_text("".join(f"a {name} above a seven\n" for name in NUMBERS * times))
    return base


def stages(base: Path, times: int = 1) -> dict[str, Stage]:
    """All stages on the inputs in ``base``; ``times`` as much work as the smallest. ``ways`` has more of them."""
    teacher, store = base / "teacher/checkpoints/0000002.pt", base / "store"
    student = base / "student/checkpoints/0000002.pt"
    saving = ["--iterations", 3 * times, "--snapshot-every", 1, "--ckpt-every", 2, "--keep", 1]
    images = ["--data-path", base / "images", "--image-size", 8, "--vae", base / "vae", "--num-workers", 0]
    text = ["--text", base / "captions.txt", "--encoder", "words", "--per-proc-batch-size", 2]
    few = ["--num-samples", 12 * times, "--per-proc-batch-size", 6]
    ode = ["--solver-steps", 4]
    gan = gan_options(store, student, iterations=2 * times, snapshot_every=1, ckpt_every=2, keep=1,
                      eval_every=2 * times, eval_reference=base / "reference.npz", eval_features="digits",
                      eval_samples=64)  # fmt: skip
    dump = ["--teacher", teacher, "--num-trajectories", 7 * times, "--rows-per-shard", 3, *ode]

    def into(*options: object) -> Callable[[Path], list]:
        return lambda out: [*options[:-1], out / str(options[-1])]

    def two_files(out: Path) -> None:
        for name in ("reference.npz", "samples.npz"):
            shutil.copyfile(base / name, out / name)

    def evaluate(out: Path) -> list:
        files = [out / "reference.npz", out / "samples.npz"]
        return [*files, "--features", "digits", "--allow-few", "--floor", "--json", out / "figures/m.json"]

    def damaged(out: Path) -> None:
        bad = ("shard-00000.safetensors", "shard-00002.safetensors")
        shutil.copytree(store, out / "store", ignore=shutil.ignore_patterns(*bad))
        for name in bad:
            (out / "store" / name).write_bytes(b"damaged")

    known = {
        "train": Stage("train.py", into(*NANO_TEACHER, "--data-path", "digits", *saving, "--run-dir", "run")),
        "encode_latents": Stage("encode_latents.py", into(*images, "--rows-per-shard", 3, "--out", "store")),
        "encode_captions": Stage("encode_captions.py", into(*text, "--rows-per-shard", 4, "--out", "store")),
        "sample_trajectory": Stage("sample_trajectory.py", into(*dump, "--out", "store")),
        "train_ARD": Stage(
            "train_ARD.py", into("--data-path", store, *SMALL, *saving, "--sample-every", 2, "--run-dir", "run")
        ),
        "train_ARD_gan": Stage("train_ARD_gan.py", into(*gan, "--run-dir", "run")),
        "sample": Stage("sample.py", into("--teacher", teacher, *few, *ode, "--out", "s.npz")),
        "sample_ARD": Stage("sample_ARD.py", into("--ckpt-path", student, *few, "--save-latents", "--out", "s.npz")),
        "evaluator": Stage("evaluations.evaluator", evaluate, two_files),
        "slim": Stage("stores.checkpoints", into("slim", student, "slim.pt"), done="exists already"),
        "export": Stage("stores.trajectories", into("export", store, "--per-proc-batch-size", 8, "--out", "s.npz")),
        "repair": Stage("stores.trajectories", into("repair", "store"), damaged, done="no manifest that can be read"),
    }
    assert tuple(known) == STAGES
    return known


def ways(known: dict[str, Stage]) -> dict[str, Stage]:
    """The stages, those that can also with two data workers, then by two ranks; a dump by one or two, in turns."""

    def with_workers(stage: Stage) -> Stage:
        return stage._replace(options=lambda out: [*stage.options(out), "--num-workers", 2])

    found = known | {f"{name}, workers": with_workers(known[name]) for name in ("train", "train_ARD", "encode_latents")}
    for name, stage in list(found.items()):
        if name not in ("slim", "repair"):
            found[f"{name}, 2 ranks"] = stage._replace(ranks=2, near=name in ("sample", "sample_ARD"))
    dump = "sample_trajectory"
    return found | {f"{dump}, 1 or 2 ranks": known[dump]._replace(ranks=2, elastic=True)}


@contextlib.contextmanager
def prepared(times: int = 1) -> Iterator[tuple[Path, dict[str, Stage]]]:
    """A folder, gone again after, and the stages in all their ways, whose inputs are made first."""
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        with contextlib.redirect_stdout(sys.stderr):
            inputs = make_inputs(base / "inputs", times)
        yield base, ways(stages(inputs, times))
