"""Kill every stage before each call that changes its folder, run it again, and compare with an undisturbed run.

    python tests/faults/crashes.py

A process is killed with SIGKILL before its k-th opening of a file for writing, rename, removal or making of a folder,
for k = 1, 2, ... until it ends undisturbed. All writers are seen: tensors, too, are written to files that python opens.
Exit code 1 if the same command then does not end with equal files and no others.
"""

import argparse
import mmap
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

from jobs import EQUAL, Job, content, ends_well, fresh, try_all
from stages import STAGES, Stage, prepared

CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def path_of(event: str, arguments: tuple) -> str | None:
    """The path that an audited call is about to change; None where it changes none."""
    if event == "open":
        path, _, flags = arguments
        if isinstance(path, int) or not flags & WRITING:
            return None
        folder = -1
    elif event in CHANGES:
        path, folder = arguments[0], arguments[-1]
    else:
        return None
    name = Path(os.fsdecode(path))
    if isinstance(folder, int) and folder >= 0:  # by its name in an open folder, as shutil.rmtree does
        name = Path(f"/proc/self/fd/{folder}").readlink() / name
    return str(name.absolute())


def crash_before(number: int, folder: Path, seen: mmap.mmap) -> Callable[[], None]:
    """A hook that kills its process before the ``number``-th change below ``folder``; ``seen`` counts them."""

    def install() -> None:
        def watch(event: str, arguments: tuple) -> None:
            path = path_of(event, arguments)
            if path is not None and path.startswith(f"{folder}/"):
                count = int.from_bytes(seen[:8], "big") + 1
                seen[:8] = count.to_bytes(8, "big")
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)

    return install


def changes(stage: Stage, out: Path) -> tuple[dict, int]:
    """The files of an undisturbed stage, and the number of its changes."""
    seen = mmap.mmap(-1, 8)  # shared with the forked process
    with fresh(stage, out):
        job = Job(stage, out, crash_before(0, out, seen))
        assert job.end() == 0, job.output
        return content(out), int.from_bytes(seen[:8], "big")


def crashes(stage: Stage, base: Path, at_most: int | None = None) -> Counter:
    """How often each end came, over the points of a stage (of ``at_most`` points, from the first to the last)."""
    wanted, points = changes(stage, base / "whole")
    step = max(1, -(-points // at_most)) if at_most else 1
    counts: Counter = Counter()
    for number in range(points, 0, -step):
        with fresh(stage, base / f"crash-{number}") as out:
            job = Job(stage, out, crash_before(number, out, mmap.mmap(-1, 8)))
            code = job.end()
            if code == 0:  # threads: this time there were fewer
                continue
            counts["points"] += 1
            end = (
                ends_well(stage, out, wanted)
                if code == -signal.SIGKILL
                else f"it ends with {code}: {job.output[-600:]}"
            )
            counts[end if end == EQUAL else f"point {number} of {points}: {end}"] += 1
    return counts


def good(counts: Counter) -> bool:
    """Whether each point was followed by an equal end."""
    return counts.keys() <= {"points", EQUAL} and counts["points"] == counts[EQUAL]


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill before each change, rerun, compare.")
    parser.add_argument("--stages", nargs="+", default=STAGES, help="Only these.")
    args = parser.parse_args()
    with prepared() as (base, known):
        trials = {name: partial(crashes, known[name], base / name) for name in args.stages}
        return try_all(trials, good)


if __name__ == "__main__":
    sys.exit(main())
