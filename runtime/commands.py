"""This project's own commands as processes: shown as a user would type them, ended when their caller ends."""

import importlib
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from runtime import cli
from runtime.stop_signals import die_with_parent

ROOT = Path(__file__).resolve().parent.parent
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def start(command: list, threads: int, out: Any = None, error: Any = None) -> subprocess.Popen:
    """Begin one of the project's commands with a number of threads, from the root of the project."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    # glibc gives every large block back to the system at once; keeping them saves a tenth to a fifth of the time.
    environment |= {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 31)}
    words = [str(word) for word in command]
    launcher = {"python": [], "torchrun": ["-m", "torch.distributed.run", "--standalone"]}[words[0]]
    real = [sys.executable, *launcher, *words[1:]]
    return subprocess.Popen(real, cwd=ROOT, env=environment, stdout=out, stderr=error, preexec_fn=die_with_parent)


def as_typed(command: list) -> str:
    """A command as a user would type it."""
    return shlex.join(str(word) for word in command)


def call(commands: list[list], threads: int | None = None) -> None:
    """Run some of the project's scripts side by side, each shown as a user would type it; stop when one fails.

    ``threads`` is for each of them, all cores divided among them by default.
    """
    running: list[subprocess.Popen] = []
    for command in commands:
        print("$ " + as_typed(command), flush=True)
        silent = subprocess.DEVNULL if running else None  # one progress bar is enough
        running.append(start(command, threads or max(1, CORES // len(commands)), error=silent))
    try:
        codes = [process.wait() for process in running]
    finally:  # interrupted or terminated: none is left behind
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
    for command, code in zip(commands, codes, strict=True):
        if code:
            raise cli.RunError(
                f"this command failed with exit code {code}, run it by itself to see why: {as_typed(command)}"
            )


def options_of(command: list, prog: str) -> dict[str, Any]:
    """The options of one of our commands by its own parser, which ends with its sentence, as ``prog``'s, where one is
    wrong.
    """
    words = [str(word) for word in command]
    place = next(i for i, word in enumerate(words) if word == "-m" or word.endswith(".py"))
    name = words[place + 1] if words[place] == "-m" else words[place].removesuffix(".py")
    parser = importlib.import_module(name).build_parser()
    parser.prog = prog
    return vars(parser.parse_args(words[place + (2 if words[place] == "-m" else 1) :]))
