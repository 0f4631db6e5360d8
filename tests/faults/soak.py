"""Kill everything at random moments, run it again until it ends, and compare with what was never disturbed.

    python tests/faults/soak.py --minutes 8 --seed 0

Stages without ranks run in forks of this process, which has imported everything already: so most kills hit the work,
not the imports. Stages with ranks run under torchrun. Prints counts per stage; exit code 1 on any difference or error.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["OMP_NUM_THREADS"] = "1"

import bits  # noqa: E402
import torch  # noqa: E402
from helpers import NANO_TEACHER, SMALL, call, gan_options, words, write_images  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from runtime.files import LOCK  # noqa: E402
from stores import checkpoints  # noqa: E402

torch.set_num_threads(1)


class Stage(NamedTuple):
    """A command whose words know the folder that it writes to, and a reader of what it leaves there."""

    script: str
    options: Callable[[Path], list]
    result: Callable[[Path], dict]
    ranks: int = 0


def store_content(out: Path) -> dict:
    """Manifest and tensors of a store, and the names of all its files: nothing is left over."""
    shards = {path.name: load_file(path) for path in sorted((out / "store").glob("*.safetensors"))}
    manifest = json.loads((out / "store/manifest.json").read_text())
    return {"shards": shards, "manifest": manifest, "files": sorted(path.name for path in (out / "store").iterdir())}


def run_content(out: Path) -> dict:
    """The checkpoints of a run and its other files, logs apart."""
    folder = out / "run"
    listing = sorted(path.name for path in (folder / "checkpoints").iterdir())
    kept = {path.name: checkpoints.load(path, "") for path in sorted((folder / "checkpoints").glob("*.pt"))}
    files = listing + sorted(path.name for path in folder.iterdir() if not path.name.startswith("events."))
    return {"checkpoints": kept, "files": files, "config": json.loads((folder / "config.json").read_text())}


def samples_content(out: Path) -> dict:
    """The arrays of samples, and the names of all files."""
    return {"arrays": bits.arrays_as_tensors(out / "s.npz"), "files": sorted(path.name for path in out.iterdir())}


def stages(base: Path) -> dict[str, Stage]:
    """All stages; their inputs are made in ``base``."""
    teacher, store, student = base / "teacher/checkpoints/0000020.pt", base / "store", base / "student/checkpoints"
    call("train.py", *NANO_TEACHER, "--data-path", "digits", "--global-batch-size", 64, "--iterations", 20,
         "--run-dir", base / "teacher")  # fmt: skip
    dump = ["--teacher", teacher, "--num-trajectories", 60, "--rows-per-shard", 7, "--per-proc-batch-size", 4]
    call("sample_trajectory.py", *dump, "--out", store)
    train = ["--data-path", store, *SMALL, "--snapshot-every", 2, "--ckpt-every", 5]
    call("train_ARD.py", *train, "--iterations", 5, "--run-dir", student.parent)
    gan = gan_options(store, student / "0000005.pt", iterations=16, snapshot_every=2, ckpt_every=6, keep=2)
    draw = ["--ckpt-path", student / "0000005.pt", "--num-samples", 300, "--per-proc-batch-size", 8, "--save-latents"]
    images = torch.arange(120 * 192).remainder(251).to(torch.uint8).reshape(120, 8, 8, 3)
    call("sample_ARD.py", *draw, "--out", base / "samples.npz")
    write_images(base / "reference.npz", torch.flip(images, [0, 1]).numpy())

    def metrics(out: Path) -> list:
        for name in ("samples.npz", "reference.npz"):
            if not (out / name).exists():
                shutil.copyfile(base / name, out / name)
        files = [out / "reference.npz", out / "samples.npz"]
        return [*files, "--features", "digits", "--allow-few", "--floor", "--batch-size", 16, "--json", out / "m.json"]

    def figures(out: Path) -> dict:
        return {"metrics": json.loads((out / "m.json").read_text()), "files": sorted(p.name for p in out.iterdir())}

    def into(*options) -> Callable[[Path], list]:
        return lambda out: [*options[:-1], out / options[-1]]

    return {
        "sample_trajectory": Stage("sample_trajectory.py", into(*dump, "--out", "store"), store_content),
        "train_ARD": Stage("train_ARD.py", into(*train, "--iterations", 24, "--run-dir", "run"), run_content),
        "train_ARD, workers": Stage(
            "train_ARD.py", into(*train, "--num-workers", 2, "--iterations", 24, "--run-dir", "run"), run_content
        ),
        "train_ARD_gan": Stage("train_ARD_gan.py", into(*gan, "--run-dir", "run"), run_content),
        "sample_ARD": Stage("sample_ARD.py", into(*draw, "--out", "s.npz"), samples_content),
        "evaluator": Stage("evaluations.evaluator", metrics, figures),
        "sample_trajectory, 2 ranks": Stage(
            "sample_trajectory.py", into(*dump, "--out", "store"), store_content, ranks=2
        ),
    }


class Job:
    """One run of a command in a process group of its own; ``output`` is what it has said."""

    def __init__(self, stage: Stage, out: Path, log: Path):
        self.log = log
        options = stage.options(out)
        if stage.ranks:
            self._process = subprocess.Popen(
                words(stage.script, *options, ranks=stage.ranks), cwd=ROOT, stdout=log.open("w"),
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            self.pid = self._process.pid
            return
        sys.stdout.flush()
        self._process = None
        self.pid = os.fork()
        if self.pid == 0:
            self._work(stage.script, options)

    def _work(self, script: str, options: list) -> None:
        """The forked process: the command, and nothing of this script afterwards."""
        code = 70
        try:
            os.setsid()
            descriptor = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1), os.dup2(descriptor, 2)
            call(script, *options)
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)

    def wait(self, seconds: float) -> int | None:
        """The exit code, or None if it is still at work then."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self._process is not None:
                if self._process.poll() is not None:
                    return self._process.returncode
            else:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                if pid:
                    return os.waitstatus_to_exitcode(status)
            time.sleep(0.005)
        return None

    def kill(self, whole_group: bool) -> None:
        """kill -9, of the process alone or of all that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL) if whole_group else os.kill(self.pid, signal.SIGKILL)
        self.wait(10)

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")


def disturb(stage: Stage, out: Path, wanted: dict, seconds: float, draw: random.Random, counts: Counter) -> None:
    """Run a stage with kills until it ends by itself, and compare."""
    out.mkdir()
    for _ in range(draw.randint(1, 4)):
        job = Job(stage, out, out.with_suffix(".log"))
        code = job.wait(draw.uniform(0.02, 1.05) * seconds)
        if code is None:
            counts["kills"] += 1
            job.kill(whole_group=bool(stage.ranks) or draw.random() < 0.5)
        elif not said_well(job, code, counts):
            break
    for _ in range(60):  # who was killed may still be held for a moment by a child
        job = Job(stage, out, out.with_suffix(".log"))
        code = job.wait(300)
        if code == 2 and "is at work there" in job.output:
            counts["held by a child"] += 1
            time.sleep(1)
            continue
        break
    said_well(job, -1 if code is None else code, counts)
    if code == 0:
        found = stage.result(out)
        kind = "equal" if bits.same(found, wanted) else "different"
        if kind == "different" and bits.same(found | {"files": [n for n in found["files"] if n != LOCK]}, wanted):
            kind = "equal, lock left"
        elif kind == "different":
            parts = {key: (found[key], wanted[key]) for key in ("files",) if found[key] != wanted[key]}
            others = [key for key in wanted if key not in parts and not bits.same(found[key], wanted[key])]
            print(f"{stage.script}: different {others} {parts}", flush=True)
        counts[kind] += 1
    shutil.rmtree(out)


def said_well(job: Job, code: int, counts: Counter) -> bool:
    """Whether a command has ended well; what it says otherwise is counted and shown."""
    if code == 0 or (code == 2 and "is at work there" in job.output):
        return True
    counts["tracebacks" if "Traceback" in job.output else f"exit code {code}"] += 1
    print(f"exit code {code}:\n{job.output[-3000:]}", flush=True)
    return False


def flip_bits(base: Path, draw: random.Random, counts: Counter) -> None:
    """A round of damage to each kind of file."""
    store, run, samples = base / "flipped/store", base / "flipped/000-run", base / "flipped/samples.npz"
    if not store.exists():
        shutil.copytree(base / "store", store)
        shutil.copytree(base / "student", run)
        shutil.copyfile(base / "samples.npz", samples)
    config, weights = json.loads((run / "config.json").read_text()), run / "checkpoints/0000005.pt"
    found = Counter()
    shard = store / "shard-00000.safetensors"
    found += bits.trial(shard, lambda: bits.read_store(store), draw, 8, 2)
    found += bits.trial(shard, lambda: bits.read_store(store), draw, 8, 0, within=2000)
    found += bits.trial(store / "manifest.json", lambda: bits.read_store(store), draw, 8, 2)
    found += bits.trial(weights, lambda: bits.read_student(weights), draw, 6, 2)
    found += bits.trial(run / "config.json", lambda: bits.run_by_name(run, config), draw, 8, 2)
    found += bits.trial(samples, lambda: bits.read_samples(samples), draw, 8, 2)
    for kind, count in found.items():
        counts[":".join(kind.split(":")[:2])] += count


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill, rerun, compare.")
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw, end = random.Random(args.seed), time.monotonic() + 60 * args.minutes
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        with contextlib.redirect_stdout(sys.stderr):
            known = stages(base)
        wanted, seconds, counts = {}, {}, {name: Counter() for name in [*known, "bits"]}
        for name, stage in known.items():
            out = base / f"whole-{name.replace(' ', '-')}"
            out.mkdir()
            begun = time.monotonic()
            job = Job(stage, out, out.with_suffix(".log"))
            assert job.wait(300) == 0, job.output
            seconds[name], wanted[name] = time.monotonic() - begun, stage.result(out)
            print(f"{name}: {seconds[name]:.1f} s undisturbed", flush=True)
        turn = 0
        while time.monotonic() < end:
            for name, stage in known.items():
                if time.monotonic() < end and (not stage.ranks or turn % 4 == 0):
                    disturb(stage, base / f"turn-{turn}", wanted[name], seconds[name], draw, counts[name])
                turn += not stage.ranks
            flip_bits(base, draw, counts["bits"])
            turn += 1
    good = ("kills", "equal", "equal, lock left", "refused", "held by a child")
    for name, count in counts.items():
        print(f"{name}: " + ", ".join(f"{kind} {number}" for kind, number in sorted(count.items())))
    bad = [kind for count in counts.values() for kind in count if kind not in good]
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
