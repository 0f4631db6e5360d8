"""Let the disk fill at a random moment in every stage, make room, run it again, and compare.

    python tests/faults/disks.py --trials 20 --ranked 2 --seed 0

Each disk is a tmpfs in a mount namespace of a process of its own, so that no mount outlives it; by turns it has a few
pages, a random size, and room enough until somebody else takes the rest of it. Wanted of a full disk: exit code 1
and one sentence that names a file there. Exit code 1 on anything else, or where a run with room does not end with equal
files.
"""

import argparse
import contextlib
import ctypes
import json
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

from jobs import EQUAL, SENTENCE, Job, ends_well, try_all, undisturbed
from stages import STAGES, Stage, prepared

NEW_MOUNTS, NEW_USER = 0x00020000, 0x10000000  # CLONE_NEWNS and CLONE_NEWUSER of sched.h
SAYS = "No space left on device"
REFUSED = "where the disk has"  # the words of a command that has counted beforehand
FULL, ROOM, COUNTED = "full", "had room", "refused before the work"
OTHERS = "somebody else's"  # a file


def own_mounts() -> bool:
    """Give this process mounts of its own, as root of a user namespace if it is not root; whether that went."""
    libc, user, group = ctypes.CDLL(None), os.getuid(), os.getgid()
    if libc.unshare(NEW_MOUNTS) != 0:
        if libc.unshare(NEW_MOUNTS | NEW_USER) != 0:
            return False
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    return subprocess.run(["mount", "--make-rprivate", "/"], capture_output=True, check=False).returncode == 0


def apart(work: Callable[[], Counter], log: Path) -> Counter | None:
    """What ``work`` counts in a forked process with mounts of its own; None where the system has none to give."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            found = work() if own_mounts() else None
            log.write_text(json.dumps(found))
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
    found = json.loads(log.read_text())
    return None if found is None else Counter(found)


def mount(folder: Path, size: int, *more: str) -> None:
    """A disk of this size in bytes at a folder."""
    options = ",".join((f"size={size}", *more))
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)


def used(folder: Path) -> int:
    """Bytes that are taken of a disk."""
    disk = os.statvfs(folder)
    return (disk.f_blocks - disk.f_bfree) * disk.f_frsize


def says_so(job: Job, code: int | None, out: Path) -> str:
    """ "full": exit code 1 and a sentence that names a file there; COUNTED: code 2; "had room"; or what is wrong."""
    errors = [line for line in job.output.splitlines() if SENTENCE.search(line)]
    first = next((line for line in errors if SAYS in line and f"({out}" in line), None)
    alone = bool(job.ranks) or errors == job.output.splitlines()[-1:]  # another rank says that it is left alone
    if code == 1 and first and alone and "Traceback" not in job.output:
        return FULL
    refused = code == (1 if job.ranks else 2) and len(errors) == 1  # torchrun has exit codes of its own
    if refused and REFUSED in errors[0] and "Traceback" not in job.output:
        return COUNTED
    return ROOM if code == 0 else f"it ends with {code}: {job.output[-600:]}"


def fill(stage: Stage, base: Path, draw: random.Random, trials: int) -> Counter:
    """The ends on a number of disks of random sizes."""
    counts: Counter = Counter()
    base.mkdir()
    whole = undisturbed(stage, base / "whole")
    out = base / "disk"
    out.mkdir()
    mount(out, 1 << 30)
    stage.prepare(out)
    before = peak = used(out)
    job = Job(stage, out)
    while job.code is None:
        peak = max(peak, used(out))
    subprocess.run(["umount", out], check=True)
    for trial in range(trials):
        pages = trial // 3 % 10 + (before == 0)  # many files are that small; a tmpfs of size 0 has no limit
        drawn = draw.randrange(4096, max(8192, round(1.1 * (peak - before))))
        later = trial % 3 == 2
        size = before + (4 * (peak - before) + (1 << 20) if later else drawn if trial % 3 else 4096 * pages)
        mount(out, size)
        stage.prepare(out)
        job = Job(stage, out)
        if later:
            job.end(draw.uniform(0, whole.seconds))
            with contextlib.suppress(OSError), (out / OTHERS).open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, os.statvfs(out).f_bavail * os.statvfs(out).f_frsize)
        code = job.end()
        if code is None:
            job.kill()
        end = says_so(job, code, out)
        counts[end if end in (FULL, ROOM, COUNTED) else f"disk of {size} bytes: {end}"] += 1
        (out / OTHERS).unlink(missing_ok=True)
        mount(out, 1 << 30, "remount")
        end = ends_well(stage, out, whole.content)
        counts[end if end == EQUAL else f"disk of {size} bytes: {end}"] += 1
        subprocess.run(["umount", out], check=True)
    return counts


def good(counts: Counter) -> bool:
    """Whether nothing else came than full disks and disks with room, and equal ends after."""
    ends = counts[FULL] + counts[ROOM] + counts[COUNTED]
    return counts.keys() <= {FULL, ROOM, COUNTED, EQUAL} and counts[EQUAL] == ends


def main() -> int:
    parser = argparse.ArgumentParser(description="Fill disks, make room, rerun, compare.")
    parser.add_argument("--trials", type=int, default=20, help="Disks of a stage.")
    parser.add_argument("--ranked", type=int, default=2, help="Disks of a stage under torchrun, with two ranks.")
    parser.add_argument("--stages", nargs="+", default=STAGES, help="Only these.")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with prepared() as (base, known):

        def trial(title: str, disks: int) -> Counter:
            draw = random.Random(f"{args.seed} {title}")
            found = apart(partial(fill, known[title], base / title, draw, disks), base / "counts.json")
            if found is None:
                sys.exit("this system gives no mounts to this user")
            return found

        both = [(title, disks) for name in args.stages for title, disks in
                ((name, args.trials), (f"{name}, 2 ranks", args.ranked)) if title in known and disks]  # fmt: skip
        return try_all({title: partial(trial, title, disks) for title, disks in both}, good)


if __name__ == "__main__":
    sys.exit(main())
