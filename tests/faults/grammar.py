"""Wrong command lines by the thousand, drawn from the scripts' own parsers: each must end in one sentence.

    python tests/faults/grammar.py --lines 2000 --seed 0

A line is one that is right with one to three things spoiled, links among them that lead nowhere or in a circle. A third
of the lines meets an environment with one to three oddities: variables of launchers and libraries, closed descriptors.
It is run in a fork, with limits on time and memory, in a
folder of its own. Wanted: exit code 2, one line on stderr that begins "NAME: error: ", nothing on stdout, nothing
written. Lines that happen to be right do not count. Exit code 1 if any other comes out otherwise.
"""

import argparse
import contextlib
import importlib
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from jobs import Job  # first: it sets the path
from stages import Stage, make_inputs, stages

from helpers import state_of  # isort: skip

SECONDS, BYTES = 8, 6 << 30  # of processor time, and of addresses: 3 GB are taken before a command begins
REFUSED, RIGHT = "refused", "right by accident"
NUMBERS = ("0", "-1", "nan", "inf", "1e30", str(10**30), "", "x", "0x10", "1_0", "-0.0", "½")
FORBIDDEN = "/proc/nothing/here"  # nobody may write there
NAMES = ("new\nline", "x" * 300, "surro\udcffgate", " ", "-", "é" * 100)
SUFFIXES = (".npz", ".pt", ".json", "")
VARIABLES = {
    "RANK": ("", "0", "1", "-1", "x"),
    "WORLD_SIZE": ("", "0", "1", "2", "x"),
    "LOCAL_RANK": ("", "0", "3", "x"),
    "MASTER_ADDR": ("", "no.such.machine.invalid"),
    "MASTER_PORT": ("", "0", "29500", "x"),
    "HOME": ("", FORBIDDEN),
    "TMPDIR": ("", FORBIDDEN),
    "MPLBACKEND": ("", "module://matplotlib_inline.backend_inline"),
    "LANG": ("C", "xx_YY.bogus"),
}
STREAMS = (0, 1, 2)  # to be closed


class Line(NamedTuple):
    """A command line, and its mistake."""

    stage: str
    script: str
    words: list[str]
    odd: tuple[dict[str, str], tuple[int, ...]]


def oddities(draw: random.Random) -> tuple[dict[str, str], tuple[int, ...]]:
    """Variables to set, and descriptors to close."""
    names = draw.sample([*VARIABLES, *STREAMS], draw.choice((1, 1, 2, 3)) if draw.random() < 0.34 else 0)
    variables = {name: draw.choice(VARIABLES[name]) for name in names if name in VARIABLES}
    return variables, tuple(name for name in names if isinstance(name, int))


def options_of(script: str, words: list[str]) -> list[argparse.Action]:
    """The options of a script, or the command of it that the words name."""
    parser = importlib.import_module(script.removesuffix(".py")).build_parser()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            parser = action.choices[words[0]]
    return [action for action in parser._actions if action.dest not in ("help", "dry_run")]


def bad_paths(base: Path, draw: random.Random) -> list[str]:
    """Files and folders that are missing, of another kind, damaged or not to be written."""
    bad = base / "bad"
    if not bad.exists():
        bad.mkdir()
        (bad / "empty").mkdir()
        (bad / "letters").mkdir()
        (bad / "letters/one.txt").write_text("mine")
        for suffix in (".pt", ".npz", ".safetensors", ".json"):
            (bad / f"text{suffix}").write_text("another format")
            (bad / f"empty{suffix}").write_bytes(b"")
        for name in ("student/checkpoints/0000002.pt", "samples.npz", "store/shard-00000.safetensors"):
            content = (base / name).read_bytes()
            (bad / f"half{Path(name).suffix}").write_bytes(content[: len(content) // 2])
        for name, target in (("gone", "/nowhere/at/all"), ("circle", "circle"), ("to_a_file", base / "samples.npz")):
            (bad / name).symlink_to(target)
        (bad / "store").mkdir()
        (bad / "store/manifest.json").write_text('{"provenance": {}, "shards": []}')
    things = [path for path in sorted(bad.rglob("*")) if bad.name in path.parts]
    things += [base / name for name in ("store", "images", "vae", "student", "samples.npz", "store/manifest.json",
                                        "teacher/checkpoints/0000002.pt", "student/checkpoints/0000002.pt",
                                        "teacher/config.json")]  # fmt: skip
    hostile = draw.choice(NAMES) + draw.choice(SUFFIXES)
    under_a_file = str(base / "samples.npz/under")
    links = [str(bad / name / "under") for name in ("gone", "circle", "to_a_file")]
    return [*map(str, things), *links, str(base / "missing"), FORBIDDEN, "", hostile, under_a_file, "."]


def value_for(action: argparse.Action, base: Path, draw: random.Random) -> str:
    """A value that this option hardly takes."""
    if action.choices:
        return draw.choice(("M9", "", "none of these", "EMA", "\n"))
    if action.type in (None, Path):
        return draw.choice(bad_paths(base, draw))
    return draw.choice(NUMBERS)


def spoiled(words: list[str], actions: list[argparse.Action], base: Path, draw: random.Random) -> list[str]:
    """The words with one thing that is wrong, most likely."""
    words, kind = list(words), draw.random()
    flags = [i for i, word in enumerate(words) if word.startswith("--")]
    if kind < 0.1:
        return [*words, draw.choice(("--no-such-option", "--lr-rate=3", "-q", "surplus", "--", "--dry-run=1"))]
    if kind < 0.25 and flags:  # an option or its value goes
        del words[(at := draw.choice(flags)) : at + draw.choice((1, 2))]
        return words
    if kind < 0.3:
        del words[draw.randrange(len(words))]
        return words
    if kind < 0.5:  # an existing word becomes another
        at = draw.randrange(len(words))
        if not words[at].startswith("--"):
            words[at] = draw.choice((*NUMBERS, *bad_paths(base, draw)))
        return words
    action = draw.choice([action for action in actions if action.option_strings] or actions)
    if not action.option_strings:
        return [*words, value_for(action, base, draw)]
    flag = draw.choice(action.option_strings)
    if action.nargs == 0:
        return [*words, f"{flag}=1"]
    return [*words, flag, value_for(action, base, draw)] if draw.random() < 0.9 else [*words, flag]


def lines(base: Path, count: int, draw: random.Random) -> list[tuple[Line, Stage]]:
    """A number of lines, of all scripts in turn; half of those that have the option are --dry-run."""
    known = {name: stage for name, stage in stages(base).items() if name != "repair"}
    known["verify"] = Stage("stores.trajectories", lambda out: ["verify", base / "store"])
    known["latents verify"] = Stage("stores.latents", lambda out: ["verify", base / "store"])
    drawn = []
    for number in range(count):
        name, stage = list(known.items())[number % len(known)]
        words = [str(word) for word in stage.options(Path("out"))]
        if name == "evaluator":  # its features would be kept beside the files
            words = [*(str(base / Path(word).name) for word in words[:2]), *words[2:], "--no-cache"]
        actions, can_be_dry = options_of(stage.script, words), not stage.script.startswith("stores.")
        for _ in range(draw.choice((1, 1, 2, 3))):
            words = spoiled(words, actions, base, draw) if words else words
        words += ["--dry-run"] if can_be_dry and draw.random() < 0.5 else []
        drawn.append(
            (Line(name, stage.script, words, oddities(draw)), stage._replace(options=lambda out, words=words: words))
        )
    return drawn


def limited(folder: Path, odd: tuple[dict[str, str], tuple[int, ...]]) -> None:
    """In the forked process: the folder to work in, its environment, and how much of the machine it may take."""
    variables, closed = odd
    os.environ |= variables
    for number in closed:
        os.close(number)
        if number:  # as python starts with it
            setattr(sys, ("stdout", "stderr")[number - 1], None)
    os.chdir(folder)
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 5))
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    os.environ["WANDB_MODE"] = "offline"
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        os.environ[name] = "1"


def outcome(stage: Stage, base: Path, folder: Path, whole: Path, odd: tuple[dict[str, str], tuple[int, ...]]) -> str:
    """ "refused", "right by accident", or the error in the end of a command."""
    folder.mkdir()
    before = state_of(base)
    job = Job(stage, folder, lambda: limited(folder, odd))
    code = job.end(30 * SECONDS)
    if code is None:
        job.kill()
    text, written = job.output, [str(path)[-80:] for path in folder.rglob("*")]
    at_work = code == -signal.SIGXCPU or "terminated by SIGXCPU" in text
    right = code == 0 or (at_work and written)  # nothing was wrong, and there is much to do
    if state_of(base) != before:  # where nothing is wrong, features are kept beside a reference
        shutil.rmtree(base)
        shutil.copytree(whole, base, symlinks=True)
        if not right:
            return f"exit code {code}, CHANGED existing files: {text[-300:]}"
    if right:
        return RIGHT
    one_line = text.count("\n") == 1 and ": error: " in text.split("\n")[0]
    if code == 2 and (one_line or (not text and 2 in odd[1])) and not written:
        return REFUSED
    return f"exit code {code}, written {written[:3]}: {text[-700:]}"


def trial(base: Path, count: int, draw: random.Random, show: bool = True) -> Counter:
    """The outcomes of a number of lines, by stage; errors are shown at once."""
    bad_paths(base, draw)
    counts, whole = Counter(), base.with_name("whole")
    shutil.copytree(base, whole, symlinks=True)
    for number, (line, stage) in enumerate(lines(base, count, draw)):
        folder = base.parent / f"line-{number}"
        found = outcome(stage, base, folder, whole, line.odd)
        shutil.rmtree(folder)
        kind = found if found in (REFUSED, RIGHT) else "wrong"
        counts[line.stage, kind] += 1
        if kind == "wrong" and show:
            print(f"{line.odd} {line.script} {line.words}\n    {found}\n", flush=True)
        if show and number % 100 == 99:
            print(f"{number + 1} lines: {tally(counts)}", flush=True)
    return counts


def tally(counts: Counter) -> str:
    """How often each outcome came, over all stages."""
    total: Counter = Counter()
    for (_, kind), number in counts.items():
        total[kind] += number
    return ", ".join(f"{kind} {number}" for kind, number in sorted(total.items()))


def main() -> int:
    parser = argparse.ArgumentParser(description="Draw wrong command lines.")
    parser.add_argument("--lines", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(sys.stderr):
            base = make_inputs(Path(folder) / "inputs")
        counts = trial(base, args.lines, random.Random(args.seed))
    for stage in dict.fromkeys(stage for stage, _ in counts):
        print(f"{stage}: " + ", ".join(f"{kind} {n}" for (of, kind), n in sorted(counts.items()) if of == stage))
    wrong = sum(n for (_, kind), n in counts.items() if kind == "wrong")
    print(f"all: {args.lines} lines, {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
