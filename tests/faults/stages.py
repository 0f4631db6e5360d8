"""Every command that writes, at its smallest; running one in a fork or under torchrun; reading all that it leaves.

Shared by the scripts that disturb them: crashes.py, disks.py, signals.py. A fork of a process that has imported
everything starts in milliseconds, so that hundreds of runs fit into a test.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "tests")) if path not in sys.path]
os.environ.setdefault("OMP_NUM_THREADS", "1")

import bits  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.utils.tensorboard  # noqa: E402, F401  as all that a stage imports later: not again in every fork
from helpers import NANO_TEACHER, SMALL, call, gan_options, save_autoencoder, words, write_images  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from stores import checkpoints  # noqa: E402
from stores.digits import NUMBERS  # noqa: E402

torch.set_num_threads(1)
EQUAL = "equal"
SENTENCE = re.compile(r": error( of rank \d+)?: ")  # with which a command ends, or a rank of it
# Of python's thread that hands tensors from a data worker to a process that has just been killed.
ORPHANED = re.compile(r"^Traceback .*\n.*resource_sharer.py\", line \d+, in _serve", re.MULTILINE)
STAGES = ("train", "encode_latents", "encode_captions", "sample_trajectory", "train_ARD", "train_ARD_gan", "sample",
          "sample_ARD", "evaluator", "slim", "export", "repair")  # fmt: skip


def nothing() -> None:
    """For those who have nothing to do."""


class Stage(NamedTuple):
    """A command whose words know the folder that it writes to, and the files that it needs before it starts."""

    script: str
    options: Callable[[Path], list]
    prepare: Callable[[Path], object] = lambda out: None
    ranks: int = 0
    done: str = "nothing"  # with these words a command may refuse a finished result


def make_inputs(base: Path) -> Path:
    """A teacher, a store, a student, images and an autoencoder, all as small as can be."""
    draw = np.random.default_rng(0)
    call("train.py", *NANO_TEACHER, "--data-path", "digits", "--iterations", 2, "--run-dir", base / "teacher")
    call("sample_trajectory.py", "--teacher", base / "teacher/checkpoints/0000002.pt", "--num-trajectories", 20,
         "--solver-steps", 4, "--rows-per-shard", 8, "--out", base / "store")  # fmt: skip
    call("train_ARD.py", "--data-path", base / "store", *SMALL, "--iterations", 2, "--run-dir", base / "student")
    call("sample_ARD.py", "--ckpt-path", base / "student/checkpoints/0000002.pt", "--num-samples", 70,
         "--out", base / "samples.npz")  # fmt: skip
    write_images(base / "reference.npz", draw.integers(0, 256, (70, 8, 8, 3), dtype=np.uint8))
    for i in range(7):
        path = base / f"images/class{i % 2}/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    save_autoencoder(base / "vae")
    (base / "captions.txt").write_text("".join(f"a {name} above a seven\n" for name in NUMBERS))
    return base


def stages(base: Path, times: int = 1) -> dict[str, Stage]:
    """All stages on the inputs in ``base``; ``times`` as much work as the smallest."""
    teacher, store = base / "teacher/checkpoints/0000002.pt", base / "store"
    student = base / "student/checkpoints/0000002.pt"
    saving = ["--iterations", 3 * times, "--snapshot-every", 1, "--ckpt-every", 2, "--keep", 1]
    images = ["--data-path", base / "images", "--image-size", 8, "--vae", base / "vae", "--num-workers", 0]
    text = ["--text", base / "captions.txt", "--encoder", "words", "--per-proc-batch-size", 2]
    few = ["--num-samples", 12 * times, "--per-proc-batch-size", 6]
    ode = ["--solver-steps", 4]
    gan = gan_options(store, student, iterations=2 * times, snapshot_every=1, ckpt_every=2, keep=1,
                      eval_every=2, eval_reference=base / "reference.npz", eval_features="digits",
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


def content(out: Path) -> dict:
    """All files below a folder, tensors as tensors: two runs of a command must have them in common.

    Of logs and tensorboard's files only their existence, since they tell the time.
    """
    found: dict[str, object] = {}
    for path in sorted(path for path in out.rglob("*") if not path.is_dir()):
        name = str(path.relative_to(out))
        if path.name.startswith("events."):
            continue
        if path.suffix == ".npz":
            found[name] = bits.arrays_as_tensors(path)
        elif path.suffix == ".safetensors":
            found[name] = load_file(path)
        elif path.suffix == ".pt":
            found[name] = checkpoints.load(path, "")
        elif path.suffix == ".json":
            found[name] = json.loads(path.read_text())
        else:
            found[name] = None if path.name == "log.txt" else path.read_bytes().hex()
    return found


def differences(found: dict, wanted: dict) -> str:
    """Which files of two folders differ, for a message; "" where all are the same."""
    names = sorted(found.keys() | wanted.keys())
    return ", ".join(n for n in names if n not in found or n not in wanted or not bits.same(found[n], wanted[n]))


class Job:
    """One run of a command in a process group of its own; its output goes to ``log``."""

    def __init__(self, stage: Stage, out: Path, before: Callable[[], object] = nothing):
        """``before`` is called in the forked process first; under torchrun there is no such place."""
        self.log, self.stage = out.with_suffix(".log"), stage
        self.log.write_text("")
        self.code: int | None = None
        self._process: subprocess.Popen | None = None
        options = stage.options(out)
        if stage.ranks:
            shutil.rmtree(self._rank_logs, ignore_errors=True)
            command = words(stage.script, *options, ranks=stage.ranks)
            command[3:3] = ["--log-dir", str(self._rank_logs), "--redirects=3"]
            with self.log.open("w") as log:
                self._process = subprocess.Popen(
                    command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
                )
            self.pid = self._process.pid
            return
        sys.stdout.flush(), sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._work(options, before)

    @property
    def _rank_logs(self) -> Path:
        return self.log.with_suffix(".ranks")

    def _work(self, options: list, before: Callable[[], object]) -> None:
        """The forked process: the command, and nothing of its parent's afterwards."""
        code = 70
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.setsid()
            log = os.open(self.log, os.O_WRONLY | os.O_APPEND)
            for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
                os.dup2(log, number)
                with contextlib.suppress(AttributeError, ValueError):
                    stream.flush()
            sys.stdout, sys.stderr = (os.fdopen(n, "w", 1, errors="backslashreplace", closefd=False) for n in (1, 2))
            before()
            call(self.stage.script, *options)
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        except BaseException as error:
            import traceback

            inside = any(frame.name == "main" for frame in traceback.extract_tb(error.__traceback__))
            if inside or not isinstance(error, KeyboardInterrupt):  # else it came just after the command
                traceback.print_exc()
            else:
                code = 0
        finally:
            with contextlib.suppress(BaseException):
                sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)

    def wait(self, seconds: float = 300.0) -> int | None:
        """The exit code (negative for a signal), or None if it is still at work then."""
        end = time.monotonic() + seconds
        while self.code is None:
            if self._process is not None:
                self.code = self._process.poll()
            else:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                self.code = os.waitstatus_to_exitcode(status) if pid else None
            if time.monotonic() > end:
                break
            time.sleep(0.002)
        return self.code

    def kill(self) -> None:
        """kill -9, of the process and all that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.wait(10)

    @property
    def output(self) -> str:
        """The command's output; of ranks theirs, and not torchrun's."""
        logs = sorted(self._rank_logs.rglob("*.log")) if self.stage.ranks else [self.log]
        return "".join(path.read_text(errors="replace") for path in logs)


@contextlib.contextmanager
def fresh(stage: Stage, out: Path) -> Iterator[Path]:
    """A new folder for a stage to write to, gone again after."""
    out.mkdir(parents=True)
    stage.prepare(out)
    try:
        yield out
    finally:
        shutil.rmtree(out)


def undisturbed(stage: Stage, out: Path) -> tuple[dict, float]:
    """The files of the stage, and the seconds that it takes."""
    with fresh(stage, out):
        begun = time.monotonic()
        job = Job(stage, out)
        code = job.wait()
        assert code == 0, f"{stage.script} ends with {code}:\n{job.output}"
        return content(out), time.monotonic() - begun


def ends_well(stage: Stage, out: Path, wanted: dict) -> str:
    """Run the command in ``out`` to its end: "equal", or the error in its end."""
    job = Job(stage, out)
    code = job.wait()
    if code is None:
        job.kill()
    if code != 0 and not (code == 2 and stage.done in job.output):
        return f"then it ends with {code}: {job.output[-600:]}"
    differ = differences(content(out), wanted)
    return f"then it differs in {differ}" if differ else EQUAL


def told(counts: dict[str, Counter]) -> str:
    """A table: a line for each stage."""
    return "\n".join(
        f"{name}: " + ", ".join(f"{kind} {count}" for kind, count in counter.items())
        for name, counter in counts.items()
    )
