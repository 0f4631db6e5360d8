"""Kill everything at random moments, run it again until it ends, and compare with an undisturbed run.

    python tests/faults/soak.py                                  # 200 kills of dumps, 100 of training, ...
    python tests/faults/soak.py --kills training=20 drawing=10   # other numbers, of these groups alone
    python tests/faults/soak.py --share 2/4                      # a quarter of them, other kills than in 1/4
    python tests/faults/soak.py --minutes 5 --only train_ARD evaluator
    python tests/faults/soak.py --bits 10000                     # flipped bits and files cut short, no kills

Stages without ranks run in forks of this process, which has imported everything already. Stages with ranks run under
torchrun: the whole job is killed, or torchrun alone, or one rank, and the others must end by themselves with a
sentence. Most kills come when a job has begun to work, and many right at a change among its files. Prints how often
each outcome came; exit code 1 on any difference, leftover, traceback or rank that says nothing.
"""

import argparse
import random
import re
import sys
import time
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path

from jobs import ORPHANED, SENTENCE, Job, Whole, content, differences, fresh, told, undisturbed
from stages import Stage, prepared

from kinds import damage, kinds  # isort: skip

COUNTS = {"dumps": 200, "training": 100, "drawing": 50, "others": 30}
GROUPS = {
    "dumps": ("sample_trajectory", "sample_trajectory, 2 ranks", "sample_trajectory, 1 or 2 ranks"),
    "training": ("train_ARD", "train_ARD, workers", "train_ARD, workers, 2 ranks", "train_ARD_gan",
                 "train_ARD_gan, 2 ranks"),
    "drawing": ("sample", "sample_ARD", "sample_ARD, 2 ranks", "evaluator", "evaluator, 2 ranks"),
    "others": ("train", "train, 2 ranks", "encode_latents, workers", "encode_latents, 2 ranks", "encode_captions"),
}  # fmt: skip
TIMES = 16  # as much work as the smallest, so that there is time to be killed in it
GOOD = ("kills", "kills of all", "kills of one rank", "kills of torchrun", "kills of a process alone", "equal",
        "others ended with a sentence", "others had not begun", "others were done", "held by a child", "refused",
        "complaints of orphaned data workers",
        "made good")  # fmt: skip
AT_WORK = "is at work there"  # a command's words about a folder that another process holds


class Disturbance:
    """A stage with kills until it ends by itself, and the comparison; ``counts`` and ``remarks`` tell of it."""

    def __init__(self, stage: Stage, out: Path, whole: Whole, seed: int):
        self.stage, self.out, self.whole, self.draw = stage, out, whole, random.Random(seed)
        self.counts, self.remarks = Counter(), []

    def run(self) -> None:
        """All of it; the folder is gone afterwards."""
        with fresh(self.stage, self.out):
            self._until_it_ends()

    def _until_it_ends(self) -> None:
        for _ in range(self.draw.randint(2, 6)):
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
            return not differences(self.stage, content(self.out), self.whole.content)
        except Exception:  # an unfinished file cannot be read
            return False

    def _compare(self) -> None:
        found, wanted = content(self.out), self.whole.content
        if differ := differences(self.stage, found, wanted):
            self._bad("different" if found.keys() == wanted.keys() else "leftovers", text=f"in {differ}")
        else:
            self.counts["equal"] += 1

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
    group_of = {name: group for group in args.kills for name in GROUPS[group] if not args.only or name in args.only}
    KNOWN.update({name: known[name] for name in group_of})
    for name, stage in KNOWN.items():
        WHOLES[name] = undisturbed(stage, base / f"whole-{len(WHOLES)}")
        print(f"{name}: begins after {WHOLES[name].start:.1f} s and works {WHOLES[name].work:.1f} s", flush=True)
    counts, under_way = {name: Counter() for name in KNOWN}, Counter()
    draw, begun, said, slowest = random.Random(args.seed), time.monotonic(), 0.0, 0.0

    def kills(group: str) -> int:
        return sum(counts[name]["kills"] for name in KNOWN if group_of[name] == group)

    def next_stage() -> str | None:
        """Of the group that lacks most, the stage that was killed least; what is under way counts as some kills."""
        if args.minutes and time.monotonic() - begun > 60 * args.minutes:
            return None
        expected = {name: counts[name]["kills"] + 4 * under_way[name] for name in KNOWN}
        lacking = [name for name in KNOWN if args.minutes or kills(group_of[name]) < args.kills[group_of[name]]]
        share = {group: sum(expected[name] for name in KNOWN if group_of[name] == group) / count
                 for group, count in args.kills.items()}  # fmt: skip
        return min(lacking, key=lambda name: (share[group_of[name]], expected[name]), default=None)

    turn, running = 0, set()
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("fork")) as pool:
        while True:
            while len(running) < args.jobs and (name := next_stage()) is not None:
                running.add(pool.submit(disturb, name, base / f"turn-{turn}", draw.randrange(2**32)))
                under_way[name], turn = under_way[name] + 1, turn + 1
            if not running:
                break
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                name, found, remarks = future.result()
                counts[name] += found
                under_way[name] -= 1
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
        print(f"{name}: {told(found) or 'not disturbed'}")
    bad = {kind: number for kind, number in total.items() if kind not in GOOD}
    print(f"bad: {bad}" if bad else "bad: none")
    return 1 if bad else 0


def kills_of_group(text: str) -> tuple[str, int]:
    """argparse type: training=100."""
    group, _, count = text.partition("=")
    if group not in GROUPS or not count.isdigit() or not int(count):
        raise argparse.ArgumentTypeError(f"{text}: give {', '.join(f'{name}={n}' for name, n in COUNTS.items())}")
    return group, int(count)


def share(text: str) -> tuple[int, int]:
    """argparse type: 2/4."""
    part, _, parts = text.partition("/")
    if not (part.isdigit() and parts.isdigit() and 1 <= int(part) <= int(parts)):
        raise argparse.ArgumentTypeError(f"{text}: give PART/PARTS, such as 2/4")
    return int(part), int(parts)


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
    parser.add_argument("--share", type=share, default=(1, 1), help="This part of the kills, e.g. 2/4.")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    part, parts = args.share
    args.kills, args.seed = {group: -(-count // parts) for group, count in args.kills}, f"{args.seed} {part}"
    with prepared(1 if args.bits else TIMES) as (base, known):
        if args.bits:
            return show(damage(kinds(base / "inputs"), args.bits, args.seed))
        return show(soak(base, known, args))


if __name__ == "__main__":
    sys.exit(main())
