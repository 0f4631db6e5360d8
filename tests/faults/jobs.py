"""Runs of a stage, in a fork of this process or under torchrun, that can be killed; and all that they leave.

A fork of a process that has imported everything starts in milliseconds, so that hundreds of runs fit into a test.
"""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from stages import ROOT, Stage  # first: it sets the path

import bits  # isort: skip
import torch  # isort: skip
from helpers import call, words  # isort: skip
from safetensors.torch import load_file  # isort: skip

from stores import checkpoints

EQUAL = "equal"
SENTENCE = re.compile(r": error( of rank \d+)?: ")  # with which a command ends, or a rank of it
# Of python's thread that hands tensors from a data worker to a process that has just been killed.
ORPHANED = re.compile(r"^Traceback .*\n.*resource_sharer.py\", line \d+, in _serve", re.MULTILINE)
FILE_TIMEOUT = 60  # seconds in which the other processes of a job must end when one is killed


def look(folder: Path) -> dict[str, tuple[int, int]]:
    """All that lies below a folder, with sizes and times; what vanishes meanwhile is passed over."""
    found, folders = {}, [str(folder)]
    for where in folders:
        with contextlib.suppress(OSError), os.scandir(where) as entries:
            for entry in entries:
                if entry.is_dir():
                    folders.append(entry.path)
                else:
                    about = entry.stat()
                    found[entry.path] = about.st_size, about.st_mtime_ns
    return found


def wait(done: Callable[[], bool], seconds: float) -> bool:
    """Whether it is done within this number of seconds."""
    end = time.monotonic() + seconds
    while not done():
        if time.monotonic() > end:
            return False
        time.sleep(0.004)
    return True


def family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(path.parent.name))
    found = [pid]
    for one in found:
        found += children.get(one, [])
    return found


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be asked for its exit code does not."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


class Job:
    """One run of a stage in a process group of its own: in a fork of this process, or under torchrun.

    ``said`` is what it, and each of its ranks, has written to standard output and error.
    """

    def __init__(self, stage: Stage, out: Path, before: Callable[[], object] = lambda: None, alone: bool = False):
        """``before`` is called in the forked process first; under torchrun there is no such place. ``alone``: without
        ranks, whatever the stage says.
        """
        self.stage, self.out, self.logs = stage, out, out.with_suffix(".logs")
        self.ranks = 0 if alone else stage.ranks
        shutil.rmtree(self.logs, ignore_errors=True)
        self.logs.mkdir()
        options = stage.options(out)
        self._before, self._code = look(out), None
        self._process: subprocess.Popen | None = None
        if self.ranks:
            apart = {"PET_REDIRECTS": "3", "PET_LOG_DIR": str(self.logs)}  # options of torchrun
            command = words(stage.script, *options, ranks=self.ranks)
            with (self.logs / "all").open("w") as log:
                self._process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
                                                 env=os.environ | apart, start_new_session=True)  # fmt: skip
            self.pid = self._process.pid
            return
        sys.stdout.flush(), sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._work(options, before)

    def _work(self, options: list, before: Callable[[], object]) -> None:
        """The forked process: the command, and nothing of its parent's afterwards."""
        code = 70
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.setsid()
            log = os.open(self.logs / "all", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
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

    @property
    def code(self) -> int | None:
        """The exit code, negative for a signal, or None while it is at work."""
        if self._process is not None:
            self._code = self._process.poll()
        elif self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def end(self, seconds: float = 300.0) -> int | None:
        """The exit code when it has ended, None if that takes longer."""
        wait(lambda: self.code is not None, seconds)
        return self.code

    @property
    def has_begun(self) -> bool:
        """Whether it has changed anything in its folder."""
        return look(self.out) != self._before

    def changes(self, count: int, seconds: float) -> None:
        """Wait until the folder has changed this number of times, as far as one can see, or the job has ended."""
        seen, now = 0, self._before

        def enough() -> bool:
            nonlocal seen, now
            last, now = now, look(self.out)
            seen += now != last
            return seen >= count or self.code is not None

        wait(enough, seconds)

    def kill(self, how: str = "all", draw: random.Random | None = None) -> tuple[float, int | None]:
        """kill -9 of "all", of the one that was "started", or of a "rank"; seconds until all had ended, and the rank.

        ``TimeoutError`` where somebody is still there after ``FILE_TIMEOUT``.
        """
        pids = family(self.pid) if self.code is None else []
        ranks = {rank_of(pid): pid for pid in pids[1:]} if how == "rank" else {}
        there = [rank for rank in range(self.ranks) if rank in ranks]
        number = draw.choice(there) if draw and there else None
        victims = pids if how == "all" else [ranks[number] if number is not None else self.pid]
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if how == "all":
            with contextlib.suppress(ProcessLookupError):  # those whose parents had ended before
                os.killpg(self.pid, signal.SIGKILL)
        begun = time.monotonic()
        if not wait(lambda: self.code is not None and not any(map(is_alive, pids)), FILE_TIMEOUT):
            left = [pid for pid in pids if is_alive(pid)]
            about = [Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")[:300] for pid in left]
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            self.end(10)
            raise TimeoutError(f"{len(left)} processes are left {FILE_TIMEOUT} s after a kill of {how}: {about}")
        return time.monotonic() - begun, number

    @property
    def said(self) -> dict[str, str]:
        """What was written: by the command under "all", by rank i, in torchrun's folders, under its number."""
        found = {"all": (self.logs / "all").read_text(errors="replace")} if (self.logs / "all").exists() else {}
        for path in sorted(self.logs.rglob("std*.log")):
            found[path.parent.name] = found.get(path.parent.name, "") + path.read_text(errors="replace")
        return found

    @property
    def output(self) -> str:
        """What the command has written; of ranks what they have, and not torchrun."""
        return "".join(text for who, text in self.said.items() if who != "all" or not self.ranks)


def environment(pid: int) -> dict[str, str]:
    """The variables with which a process was started."""
    content = Path(f"/proc/{pid}/environ").read_text(errors="replace")
    return dict(part.split("=", 1) for part in content.split("\0") if "=" in part)


def rank_of(pid: int) -> int | None:
    """The rank that a process of torchrun is, None for others, a rank's data workers among them."""
    with contextlib.suppress(OSError, KeyError):
        parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        if "RANK" not in environment(parent):
            return int(environment(pid)["RANK"])
    return None


#################################################################################
#                               What is left                                    #
#################################################################################


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


def near(a: Any, b: Any) -> bool:
    """Whether two readings of samples are equal up to rounding."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(near(a[name], b[name]) for name in a)
    if not isinstance(a, torch.Tensor):
        return a == b
    grey = 0 if a.is_floating_point() else a.dtype == torch.uint8
    return a.shape == b.shape and bool((a.double() - b).abs().max() <= grey + 1e-4 * b.double().abs().max())


def differences(stage: Stage, found: dict, wanted: dict) -> str:
    """Which files of two folders differ, for a message; "" where all are the same. Drawings of near samples may."""

    def alike(name: str) -> bool:
        if name not in found or name not in wanted:
            return False
        drawn = stage.near and name.endswith(".png")
        return drawn or bits.same(found[name], wanted[name]) or (stage.near and near(found[name], wanted[name]))

    return ", ".join(name for name in sorted(found.keys() | wanted.keys()) if not alike(name))


@contextlib.contextmanager
def fresh(stage: Stage, out: Path) -> Iterator[Path]:
    """A new folder for a stage to write to, gone again after."""
    out.mkdir(parents=True)
    stage.prepare(out)
    try:
        yield out
    finally:
        shutil.rmtree(out)
        shutil.rmtree(out.with_suffix(".logs"), ignore_errors=True)


class Whole(NamedTuple):
    """What an undisturbed job left, the seconds until it began to change its folder, and those after that."""

    content: dict
    start: float
    work: float

    @property
    def seconds(self) -> float:
        """All that it takes."""
        return self.start + self.work


def undisturbed(stage: Stage, out: Path) -> Whole:
    """A stage to its end, as the measure of the others."""
    with fresh(stage, out):
        begun = time.monotonic()
        job = Job(stage, out)
        job.changes(1, 300)
        start = time.monotonic() - begun
        code = job.end()
        assert code == 0, f"{stage.script} ends with {code}:\n{job.output}"
        return Whole(content(out), start, time.monotonic() - begun - start)


def ends_well(stage: Stage, out: Path, wanted: dict) -> str:
    """Run the command in ``out`` to its end: "equal", or the error in its end."""
    job = Job(stage, out)
    code = job.end()
    if code is None:
        job.kill()
    if code != 0 and not (code == 2 and stage.done in job.output):
        return f"then it ends with {code}: {job.output[-600:]}"
    differ = differences(stage, content(out), wanted)
    return f"then it differs in {differ}" if differ else EQUAL


def told(counts: Counter) -> str:
    """How often each end came, in words."""
    return ", ".join(f"{kind} {count}" for kind, count in counts.items())


def try_all(trials: dict[str, Callable[[], Counter]], good: Callable[[Counter], bool]) -> int:
    """Print the ends that each trial counts, and of all; exit code 1 where they are not ``good``."""
    total: Counter = Counter()
    for title, trial in trials.items():
        found = trial()
        total += found
        print(f"{title}: {told(found)}", flush=True)
    print(f"all: {told(total)}" if good(total) else "not all is well")
    return 0 if good(total) else 1
