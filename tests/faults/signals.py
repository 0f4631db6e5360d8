"""Interrupt and terminate every stage at random moments, run it again, and compare with an undisturbed run.

    python tests/faults/signals.py --trials 20 --ranked 2 --seed 0

Wanted: one sentence and exit code 130 for SIGINT; one sentence and exit code 1 for SIGTERM, SIGHUP and SIGUSR1, or a
plain death by them where no handler is there yet; no traceback; a second SIGINT or SIGTERM kills. The same command then
ends with equal files. In forks, so that signals hit the work; under torchrun, with two ranks, from the start on.
Python's own words about an interrupt while it imports torch are counted apart, as "importing", and so is one that it
passes over ("Exception ignored in"), as "lost in python". Exit code 1 on anything else.
"""

import argparse
import contextlib
import mmap
import os
import random
import signal
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

from jobs import EQUAL, ORPHANED, Job, Whole, ends_well, fresh, try_all, undisturbed
from stages import STAGES, Stage, prepared

from runtime.stop_signals import ended_by, exit_code

OVER, SAID, KILLED, IMPORTING, TWICE, WORKER, LOST = (
    "over before",
    "a sentence",
    "killed",
    "importing",
    "killed by the second",
    "a worker's too",
    "lost in python",
)
GOOD = {OVER, SAID, KILLED, IMPORTING, TWICE, WORKER, LOST, EQUAL}
SENT = (signal.SIGINT, signal.SIGINT, signal.SIGTERM, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def started(stage: Stage, out: Path) -> Job:
    """A job that has come to its command; one under torchrun just started."""
    ready = mmap.mmap(-1, 1)
    job = Job(stage, out, lambda: ready.write(b"!"))
    while not stage.ranks and ready[0] == 0 and job.code is None:
        pass
    return job


def end_of(job: Job, code: int | None, sent: signal.Signals) -> str:
    """How a job has ended after a signal: one of ``GOOD``, or the error."""
    text = job.output
    wrong = f"{sent.name}: it ends with {code}: {text[-1200:]}"
    said = any(f"{ended_by(sent)}{words}" in text for words in ("; the same command continues", " at step "))
    if (
        "Exception ignored in" in text and sent == signal.SIGINT and code == 0
    ):  # in a hook, or where objects are deleted
        return LOST
    if "Traceback" in text:
        ours = "in main\n" in text and "runtime/cli.py" in text
        if sent == signal.SIGINT and not ours:  # python's own: of a main process that imports, of a worker that ends
            return IMPORTING if job.ranks else WORKER if said and code == 130 else wrong
        return wrong
    if code == 0:
        return OVER
    if job.ranks:  # torchrun has exit codes of its own
        return SAID if said else KILLED if code is not None else wrong
    errors = [line for line in text.splitlines() if "error: " in line]
    if code == exit_code(sent) and said and len(errors) == 1:
        return SAID
    return KILLED if code == -sent != -signal.SIGINT else wrong


def disturb(stage: Stage, out: Path, whole: Whole, draw: random.Random) -> list[str]:
    """The end after one signal at a random moment, and then of the same command."""
    sent = draw.choice(SENT)
    group = draw.random() < 0.5  # as a terminal does; else as kill does
    with fresh(stage, out):
        job = started(stage, out)
        job.end(draw.uniform(0, 1.02) * whole.seconds)
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(job.pid, sent)
        code = job.end(120)
        if code is None:
            job.kill()
        end = end_of(job, code, sent)
        if job.ranks:
            time.sleep(0.5)  # a rank may be about to leave
            job.kill()
        return [end, ends_well(stage, out, whole.content)]


def twice(stage: Stage, out: Path, whole: Whole, draw: random.Random) -> list[str]:
    """Two SIGINT or SIGTERM, one right after the other."""
    sent = draw.choice((signal.SIGINT, signal.SIGTERM))
    with fresh(stage, out):
        job = started(stage, out)
        job.end(draw.uniform(0, 0.9) * whole.seconds)
        for _ in range(2):
            with contextlib.suppress(ProcessLookupError):
                os.kill(job.pid, sent)
            time.sleep(0.0005)
        code = job.end(120)
        quiet = "Traceback" not in ORPHANED.sub("", job.output)
        end = TWICE if code == -sent and quiet else end_of(job, code, sent)
        return [end, ends_well(stage, out, whole.content)]


def send(stage: Stage, base: Path, draw: random.Random, trials: int, doubles: int = 0) -> Counter:
    """The ends after a number of signals, and after a number of double ones."""
    whole = undisturbed(stage, base / "whole")
    counts: Counter = Counter()
    for number in range(trials + doubles):
        how = disturb if number < trials else twice
        counts.update(how(stage, base / f"signal-{number}", whole, draw))
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description="Send signals, rerun, compare.")
    parser.add_argument("--trials", type=int, default=20, help="Signals to a stage.")
    parser.add_argument("--ranked", type=int, default=2, help="Signals to a stage under torchrun, with two ranks.")
    names = [*STAGES, "train, workers", "train_ARD, workers", "encode_latents, workers"]
    parser.add_argument("--stages", nargs="+", default=names, help="Only these.")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw, trials = random.Random(args.seed), {}
    with prepared(times=4) as (base, known):
        for name in args.stages:
            for title, count, doubles in ((name, args.trials, args.trials // 4), (f"{name}, 2 ranks", args.ranked, 0)):
                if count and title in known:
                    trials[title] = partial(send, known[title], base / title, draw, count, doubles)
        return try_all(trials, lambda counts: counts.keys() <= GOOD)


if __name__ == "__main__":
    sys.exit(main())
