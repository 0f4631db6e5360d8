"""This project's own commands as processes: shown as a user would type them, run once, ended when their caller ends."""

import importlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from runtime import cli
from runtime.files import noted, write_text
from runtime.stop_signals import STOPPING, die_with_parent, held_back

ROOT = Path(__file__).resolve().parent.parent
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
# What is there when a folder is whole that one of our commands writes; a run has a checkpoint.
LAST = dict.fromkeys(("encode_latents.py", "encode_captions.py", "sample_trajectory.py"), "manifest.json")
LAST |= {"pipeline_ard.py": "README.md"}
NOTE = "commands.json"  # in a folder of pieces: the file of each, and the command that makes it
START = 6.0  # seconds of a process that does next to nothing
BAR = "{percentage:3.0f}%|{bar:20}| {remaining} left{postfix}"


@dataclass(frozen=True)
class Piece:
    """One of our commands and the file that it makes when it is whole."""

    words: list  # a script or module and its options; a piece among them stands for what it makes, and is waited for
    makes: Path
    ranks: int = 1
    seconds: float = START  # an estimate of its time
    threads: int = 0  # of a rank; without it, its share of the cores

    @classmethod
    def of(
        cls, script: str, out: Path, *options: Any, iterations: int = 0, ranks: int = 1, seconds: float = START
    ) -> "Piece":
        """One that leaves a file, a store, or a run of so many ``iterations`` at ``out``."""
        if iterations:
            place, makes = ["--run-dir", out, "--iterations", iterations], checkpoint(out, iterations)
        else:
            place, makes = ["--json" if script == "evaluations.evaluator" else "--out", out], out / LAST.get(script, "")
        return cls([script, *place, *options], makes, ranks, seconds)

    @property
    def product(self) -> Path:
        """What it is called in other commands: a file, or the folder of a store."""
        return self.makes.parent if self.makes.name == "manifest.json" else self.makes

    @property
    def needs(self) -> set[Path]:
        """The files that must be there first."""
        return {word.makes for word in self.words if isinstance(word, Piece)}

    def __str__(self) -> str:
        return shlex.join(self.started_by(["python"], ["torchrun"]))

    @property
    def text(self) -> list[str]:
        """The words as they stand on a command line, which is run where our scripts lie."""
        words = [word.product if isinstance(word, Piece) else word for word in self.words]
        elsewhere = Path.cwd() != ROOT
        return [str(word.absolute() if elsewhere and isinstance(word, Path) else word) for word in words]

    def started_by(self, python: list[str], torchrun: list[str]) -> list[str]:
        """The command line, with one of these in front."""
        launcher = [*torchrun, f"--nproc_per_node={self.ranks}"] if self.ranks > 1 else python
        return [*launcher, *(["-m"] if not self.text[0].endswith(".py") else []), *self.text]

    def is_outdated(self, folder: Path) -> bool:
        """Whether a file that the command names, outside of the folder, is newer than what it makes."""
        named = [word for word in self.words if isinstance(word, Path) and not word.is_relative_to(folder)]
        return any(path.is_file() and path.stat().st_mtime > self.makes.stat().st_mtime for path in named)

    def noted(self, folder: Path) -> tuple[str, str]:
        """The file and the command without what does not change the result: its ranks, and where ``folder`` lies."""
        paths = [word.product if isinstance(word, Piece) else word for word in (self.makes, *self.words)]
        inside = [isinstance(path, Path) and path.is_relative_to(folder) for path in paths]
        words = [
            f"OUT/{path.relative_to(folder)}" if own else str(path) for path, own in zip(paths, inside, strict=True)
        ]
        return words[0], shlex.join(words[1:])


def checkpoint(run_dir: Path, step: int) -> Path:
    """What a run leaves after so many steps."""
    return run_dir / f"checkpoints/{step:07d}.pt"


class Process:
    """A piece that is being made, with a number of cores; what it prints goes to a file that nobody else sees."""

    def __init__(self, piece: Piece, cores: int):
        self.piece, self.started, self._printed = piece, time.monotonic(), tempfile.TemporaryFile()  # noqa: SIM115
        environment = os.environ | {"OMP_NUM_THREADS": str(piece.threads or max(1, cores // piece.ranks))}
        # glibc gives every large block back to the system at once; keeping them saves a tenth to a fifth of the time.
        environment |= {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 31)}
        words = piece.started_by([sys.executable], [sys.executable, "-m", "torch.distributed.run", "--standalone"])
        files: Any = {"stdin": subprocess.DEVNULL, "stdout": self._printed, "stderr": subprocess.STDOUT}
        self.popen = subprocess.Popen(words, cwd=ROOT, env=environment, preexec_fn=_belong_to_caller, **files)

    def last_words(self) -> str:
        """The last line that it has printed, or of the last errors the sentence."""
        size = os.fstat(self._printed.fileno()).st_size
        text = os.pread(self._printed.fileno(), 1 << 14, max(0, size - (1 << 14))).decode(errors="replace")
        lines = text.strip().splitlines() or [""]
        return next((line for line in reversed(lines) if ": error" in line), lines[-1])


def _belong_to_caller() -> None:
    """A terminal's Ctrl-C goes to the caller alone, which tells this process to end: two signals would kill it."""
    os.setpgid(0, 0)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)  # which are held back meanwhile
    die_with_parent()


def unmade(pieces: list[Piece], folder: Path) -> list[Piece]:
    """Those of the pieces of a folder that are to be run: whose file is missing, or older than one from elsewhere that
    it is made of, or nobody has noted how it was made. A command finds out what a file is worth that does exist.

    ``UserError`` where a file was made by a command with other options.
    """
    notes, left = noted(folder / NOTE) or {}, []  # whatever is not noted is run again, and looks for itself
    for piece in pieces:
        name, command = piece.noted(folder)
        if not piece.makes.exists() or name not in notes or piece.is_outdated(folder):
            left.append(piece)
        elif notes[name] != command:
            before, now = shlex.split(notes[name]), shlex.split(command)
            i = len(os.path.commonprefix([before, now]))
            i -= not all(
                word.startswith("--") for word in before[i : i + 1] + now[i : i + 1]
            )  # a value: its option too
            words = [" ".join(words[i:][:2]) or "no more" for words in (before, now)]
            what = f"--out {folder}: {piece.makes} was made otherwise, {words[0]} there and {words[1]} here"
            raise cli.UserError(f"{what}; give another folder, or the options of before")
    return left


def _note(piece: Piece, folder: Path) -> None:
    notes = noted(folder / NOTE) or {}
    write_text(folder / NOTE, json.dumps(notes | dict([piece.noted(folder)]), indent=1) + "\n")


def run_pieces(pieces: list[Piece], folder: Path, jobs: int = 1) -> None:
    """Make the pieces of a folder that are not made yet, ``jobs`` at a time, among which the cores are divided.

    In order as far as needs allow. One that fails costs only those that need it; ``RunError`` at the end. Where this is
    interrupted, what is running is told to end and awaited; made are whole files only, so the same call continues.
    """
    waiting, running, failed = unmade(pieces, folder), list[Process](), dict[Path, str]()
    made, total, begun = len(pieces) - len(waiting), sum(piece.seconds for piece in waiting), time.monotonic()
    bar = tqdm(total=total, smoothing=0, miniters=0, mininterval=0.5, disable=None, bar_format=BAR)
    try:
        while waiting or running:
            absent = {piece.makes for piece in (*waiting, *(each.piece for each in running))} | failed.keys()
            ready = [each for each in waiting if not each.needs & absent and all(need.exists() for need in each.needs)]
            for piece in ready[: jobs - len(running)]:
                waiting.remove(piece)
                _say(f"$ {piece}")
                if not piece.makes.exists():  # else it is another command's, perhaps, which this one will notice
                    _note(piece, folder)
                with held_back():  # python loses what a signal raises while it forks
                    running.append(Process(piece, CORES // jobs))
            if not running:
                break
            for process in [process for process in running if process.popen.poll() is not None]:
                running.remove(process)
                piece, words, seconds = process.piece, process.last_words(), time.monotonic() - process.started
                bar.update(piece.seconds)
                if process.popen.returncode or not piece.makes.exists():
                    failed[piece.makes] = f"exit code {process.popen.returncode}, {words!r}: {piece}"
                    _say(f"failed after {seconds:.0f} s: {words}")
                    continue
                _note(piece, folder)
                made += 1
                todo = sum(each.seconds for each in (*waiting, *(other.piece for other in running)))
                left = tqdm.format_interval((time.monotonic() - begun) * todo / (total - todo))
                _say(f"[{made}/{len(pieces)}] {piece.makes}: {seconds:.0f} s, about {left} left")
            if running and not bar.disable:
                bar.set_postfix_str(running[0].last_words()[:60], refresh=False)
                bar.update(0)
            time.sleep(0.05)
    finally:
        bar.close()
        if running:
            print("\nending what is running, which keeps what it has; once more kills", file=sys.stderr, flush=True)
        for process in running:
            process.popen.terminate()
        for process in running:
            process.popen.wait()
    if left_out := len(failed) + len(waiting):
        what = f"{left_out} of {len(pieces)} pieces were not made; the same command tries them again"
        raise cli.RunError(f"{what}; {[*failed.values(), *map(str, waiting)][0]}")


def _say(text: str) -> None:
    with tqdm.external_write_mode():
        print(text, flush=True)


def options_of(piece: Piece, prog: str) -> dict[str, Any]:
    """The options of a command by its own parser, which ends with its sentence, as ``prog``'s, where one is wrong."""
    parser = importlib.import_module(piece.text[0].removesuffix(".py")).build_parser()
    parser.prog = prog
    return vars(parser.parse_args(piece.text[1:]))
