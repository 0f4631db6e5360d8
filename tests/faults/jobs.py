"""Commands in processes of their own, that are killed at moments which tell most: kill -9, of all or of one of them."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from helpers import ROOT, call, words
from soak_stages import Stage

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
    """One run of a stage: in a fork of this process, which has imported everything already, or under torchrun.

    ``said`` is what it, and each of its ranks, has written to standard output and error.
    """

    def __init__(self, stage: Stage, out: Path, alone: bool = False):
        """``alone``: without ranks, whatever the stage says."""
        self.out, self.logs, self.ranks = out, out.with_suffix(".logs"), 0 if alone else stage.ranks
        shutil.rmtree(self.logs, ignore_errors=True)
        self.logs.mkdir()
        options = stage.options(out)
        self._before, self._code = look(out), None
        self._process: subprocess.Popen | None = None
        if self.ranks:
            ranks_apart = {"PET_REDIRECTS": "3", "PET_LOG_DIR": str(self.logs)}  # options of torchrun
            with (self.logs / "all").open("w") as log:
                self._process = subprocess.Popen(
                    words(stage.script, *options, ranks=self.ranks), cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
                    env=os.environ | ranks_apart, start_new_session=True,
                )  # fmt: skip
            self.pid = self._process.pid
        else:
            self.pid = os.fork()
            if self.pid == 0:
                self._work(stage.script, options)

    def _work(self, script: str, options: list) -> None:
        """The forked process: the command, and nothing of this script afterwards."""
        code = 70
        try:
            os.setsid()
            descriptor = os.open(self.logs / "all", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1), os.dup2(descriptor, 2)
            call(script, *options)
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)

    @property
    def code(self) -> int | None:
        """The exit code, or None while it is at work."""
        if self._process is not None:
            self._code = self._process.poll()
        elif self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def end(self, seconds: float) -> int | None:
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

    def kill(self, how: str, draw: random.Random) -> tuple[float, int | None]:
        """kill -9 of "all", of the one that was "started", or of a "rank"; seconds until all had ended, and the rank.

        ``TimeoutError`` where somebody is still there after ``FILE_TIMEOUT``.
        """
        pids = family(self.pid)
        ranks = {rank_of(pid): pid for pid in pids[1:]}
        number = draw.choice([rank for rank in range(self.ranks) if rank in ranks] or [None]) if how == "rank" else None
        victims = pids if how == "all" else [ranks[number] if number is not None else self.pid]
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
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
