"""Kill everything at random moments, run it again until it ends, and compare with an undisturbed run.

    python tests/faults/soak.py                                  # 200 kills of dumps, 100 of training, ...
    python tests/faults/soak.py --kills training=20 drawing=10   # other numbers, of these groups alone
    python tests/faults/soak.py --minutes 5 --only train_ARD evaluator
    python tests/faults/soak.py --bits 10000                     # flipped bits and files cut short, no kills

Stages without ranks run in forks of this process, which has imported everything already. Stages with ranks run under
torchrun: the whole job is killed, or torchrun alone, or one rank, and the others must end by themselves with a
sentence. Most kills come when a job has begun to work, and many right at a change among its files. Prints how often
each outcome came; exit code 1 on any difference, leftover, traceback or rank that says nothing.
"""

import argparse
import contextlib
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["OMP_NUM_THREADS"] = "1"

import bits  # noqa: E402
import torch  # noqa: E402
from jobs import Job  # noqa: E402
from kinds import damage, kinds  # noqa: E402
from soak_stages import GROUPS, Stage, stages  # noqa: E402
from stages import ORPHANED, SENTENCE  # noqa: E402

torch.set_num_threads(1)

COUNTS = {"dumps": 200, "training": 100, "drawing": 50, "others": 30}
GOOD = ("kills", "kills of all", "kills of one rank", "kills of torchrun", "kills of a process alone", "equal",
        "others ended with a sentence", "others had not begun", "others were done", "held by a child", "refused",
        "complaints of orphaned data workers",
        "made good")  # fmt: skip
AT_WORK = "is at work there"  # a command's words about a folder that another process holds


class Whole(NamedTuple):
    """What an undisturbed job left, the seconds until it began to change its folder, and those after that."""

    content: dict
    start: float
    work: float


def undisturbed(stage: Stage, out: Path) -> Whole:
    """Run a stage to its end, as the measure of the others."""
    out.mkdir()
    begun = time.monotonic()
    job = Job(stage, out)
    job.changes(1, 300)
    start = time.monotonic() - begun
    assert job.end(300) == 0, "\n".join(job.said.values())
    return Whole(stage.result(out), start, time.monotonic() - begun - start)


class Disturbance:
    """A stage with kills until it ends by itself, and the comparison; ``counts`` and ``remarks`` tell of it."""

    def __init__(self, stage: Stage, out: Path, whole: Whole, seed: int):
        self.stage, self.out, self.whole, self.draw = stage, out, whole, random.Random(seed)
        self.counts, self.remarks = Counter(), []

    def run(self) -> None:
        """All of it; the folder is gone afterwards."""
        self.out.mkdir()
        for _ in range(self.draw.randint(3, 9) if self.stage.ranks else self.draw.randint(1, 4)):
            job = self._job()
            self._wait_for_a_moment(job)
            if job.code is not None:
                break
            self._kill(job)
        else:
            job = self._job()
        code = job.end(300)
        if code == 0:
            self._compare()
        else:
            self._bad("hangs" if code is None else f"exit code {code}", job)
        self._look_for_tracebacks(job)
        shutil.rmtree(self.out)
        shutil.rmtree(job.logs)

    def _job(self) -> Job:
        """The command once more; who was killed may still be held for a moment by a child."""
        while True:
            job = Job(self.stage, self.out, alone=self.stage.elastic and self.draw.random() < 0.5)
            job.changes(1, 0.3)
            if job.code != 2 or AT_WORK not in job.said["all"]:
                return job
            self.counts["held by a child"] += 1
            time.sleep(0.5)

    def _wait_for_a_moment(self, job: Job) -> None:
        """Until a random moment: while it starts, in its work, or at a change among its files."""
        kind = self.draw.choices(("start", "work", "change"), (1, 5, 4))[0]
        if kind == "start":
            job.end(self.draw.uniform(0, self.whole.start))
        elif kind == "work":
            job.changes(1, 60)
            job.end(self.draw.uniform(0, min(self.whole.work, 2)))
        else:
            job.changes(self.draw.randint(1, 20), 60)

    def _kill(self, job: Job) -> None:
        how = self.draw.choice(("all", "rank", "started") if job.ranks else ("all", "started"))
        alone = "torchrun" if job.ranks else "a process alone"
        had_begun = job.has_begun
        try:
            seconds, rank = job.kill(how, self.draw)
        except TimeoutError as error:
            self._bad("others left behind", job, str(error))
            return
        self.counts["kills"] += 1
        self.counts["kills of " + {"all": "all", "rank": "one rank", "started": alone}[how]] += 1
        self._look_for_tracebacks(job)
        if how != "all" and job.ranks:
            self.remarks.append(f"seconds {seconds:.1f}")
            self._listen(job, had_begun, rank)

    def _listen(self, job: Job, had_begun: bool, killed: int | None) -> None:
        """Whether the ranks that were not killed have said why they ended."""
        for rank in range(job.ranks):
            if rank != killed:
                if SENTENCE.search(job.said.get(str(rank), "")):
                    self.counts["others ended with a sentence"] += 1
                elif not had_begun:
                    self.counts["others had not begun"] += 1
                elif self._is_done():
                    self.counts["others were done"] += 1
                else:
                    self._bad("others ended in silence", job)

    def _is_done(self) -> bool:
        """Whether the folder is as an undisturbed job leaves it."""
        try:
            return bits.same(self.stage.result(self.out), self.whole.content)
        except Exception:  # an unfinished file cannot be read
            return False

    def _compare(self) -> None:
        found, wanted = self.stage.result(self.out), self.whole.content
        if bits.same(found, wanted):
            self.counts["equal"] += 1
        elif found["files"] != wanted["files"]:
            self._bad("leftovers", text=f"files {set(found['files']) ^ set(wanted['files'])}")
        else:
            self._bad("different", text=f"in {[key for key in wanted if not bits.same(found[key], wanted[key])]}")

    def _look_for_tracebacks(self, job: Job) -> None:
        """Torchrun has a traceback of its own when a rank has failed; that is not counted as one, nor an orphan's."""
        for who, text in job.said.items():
            if who != "all" or not job.ranks:
                found = len(re.findall(r"^Traceback", text, re.MULTILINE))
                orphans = len(ORPHANED.findall(text))
                self.counts["complaints of orphaned data workers"] += orphans
                if found > orphans:
                    self._bad("tracebacks", job)

    def _bad(self, kind: str, job: Job | None = None, text: str = "") -> None:
        said = [f"--- {who}:\n{words[-3000:]}" for who, words in job.said.items()] if job else []
        self.counts[kind] += 1
        self.remarks.append("\n".join([f"{kind}: {self.stage.script} {text}", *said]))


KNOWN: dict[str, Stage] = {}  # these two reach the processes of the pool by their fork
WHOLES: dict[str, Whole] = {}


def disturb(name: str, out: Path, seed: int) -> tuple[str, Counter, list[str]]:
    """A disturbance in a process of the pool."""
    disturbance = Disturbance(KNOWN[name], out, WHOLES[name], seed)
    disturbance.run()
    return name, +disturbance.counts, disturbance.remarks


def soak(base: Path, known: dict[str, Stage], args: argparse.Namespace) -> dict[str, Counter]:
    """Disturb stages, two at a time, until there are enough kills in each group or the time is over."""
    KNOWN.update({name: stage for name, stage in known.items() if stage.group in args.kills and
                  (not args.only or name in args.only)})  # fmt: skip
    for name, stage in KNOWN.items():
        WHOLES[name] = undisturbed(stage, base / f"whole-{len(WHOLES)}")
        print(f"{name}: begins after {WHOLES[name].start:.1f} s and works {WHOLES[name].work:.1f} s", flush=True)
    counts = {name: Counter() for name in KNOWN}
    draw, begun, said, slowest = random.Random(args.seed), time.monotonic(), 0.0, 0.0

    def kills(group: str) -> int:
        return sum(counts[name]["kills"] for name in KNOWN if KNOWN[name].group == group)

    def next_stage() -> str | None:
        """Of the group that lacks most, the stage that was disturbed least."""
        if args.minutes and time.monotonic() - begun > 60 * args.minutes:
            return None
        groups = {stage.group for stage in KNOWN.values()}
        lacking = [group for group in groups if args.minutes or kills(group) < args.kills[group]]
        if not lacking:
            return None
        names = {group: [name for name in KNOWN if KNOWN[name].group == group] for group in lacking}
        begun_of = {group: sum(started[name] for name in names[group]) for group in lacking}
        group = min(lacking, key=lambda group: (kills(group) / args.kills[group], begun_of[group]))
        return min(names[group], key=lambda name: started[name])

    started, turn, running = Counter(), 0, set()
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("fork")) as pool:
        while True:
            while len(running) < args.jobs and (name := next_stage()) is not None:
                running.add(pool.submit(disturb, name, base / f"turn-{turn}", draw.randrange(2**32)))
                started[name], turn = started[name] + 1, turn + 1
            if not running:
                break
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                name, found, remarks = future.result()
                counts[name] += found
                for remark in remarks:
                    if remark.startswith("seconds "):
                        slowest = max(slowest, float(remark.split()[1]))
                    else:
                        print(remark, flush=True)
            if time.monotonic() - said > 30:
                said = time.monotonic()
                progress = ", ".join(f"{group} {kills(group)}" for group in args.kills)
                print(f"{(said - begun) / 60:.1f} minutes: kills of {progress}", flush=True)
    minutes, total = (time.monotonic() - begun) / 60, sum(found["kills"] for found in counts.values())
    print(f"{total} kills in {minutes:.1f} minutes; after the death of one, all others had ended in {slowest:.1f} s")
    return counts


def show(counts: dict[str, Counter]) -> int:
    """Print a line for each stage and for all; 1 if there is anything that must not be."""
    total = sum(counts.values(), Counter())
    for name, found in [*counts.items(), ("all", total)]:
        print(f"{name}: " + (", ".join(f"{kind} {number}" for kind, number in found.items()) or "not disturbed"))
    bad = {kind: number for kind, number in total.items() if kind not in GOOD}
    print(f"bad: {bad}" if bad else "bad: none")
    return 1 if bad else 0


def kills_of_group(text: str) -> tuple[str, int]:
    """argparse type: training=100."""
    group, _, count = text.partition("=")
    if group not in GROUPS or not count.isdigit() or not int(count):
        raise argparse.ArgumentTypeError(f"{text}: give {', '.join(f'{name}={n}' for name, n in COUNTS.items())}")
    return group, int(count)


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill, rerun, compare.")
    what = f"Kills of these groups alone, by default {COUNTS}."
    parser.add_argument("--kills", type=kills_of_group, nargs="+", default=list(COUNTS.items()), help=what)
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="Only these stages, e.g. evaluator.")
    parser.add_argument("--minutes", type=float, help="Go on for so long instead, whatever the number of kills.")
    parser.add_argument(
        "--bits", type=int, help="Number of files to damage instead, by a flipped bit or by cutting them."
    )
    parser.add_argument("--jobs", type=int, default=2, help="Stages that are disturbed at the same time.")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.kills = dict(args.kills)
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        with contextlib.redirect_stdout(sys.stderr):
            known = stages(base)
            damaged = kinds(base) if args.bits else {}
        return show(damage(damaged, args.bits, args.seed) if args.bits else soak(base, known, args))


if __name__ == "__main__":
    sys.exit(main())
