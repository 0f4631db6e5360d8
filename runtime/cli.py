"""What the command lines of all scripts share: one-sentence errors, presets, --dry-run.

Nothing in here knows about diffusion; a script is ``cli.main(build_parser(), run)``.
"""

import argparse
import contextlib
import errno
import json
import math
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

OptionGroup = argparse._ArgumentGroup | argparse.ArgumentParser  # whatever has ``add_argument``


RANK_LOST = re.compile(r"gloo|nccl|connection (closed|reset)|timed? ?out|broken pipe", re.IGNORECASE)
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


class UserError(Exception):
    """A mistake in what the user gave. The text is one sentence: the option, its value, what would be right."""


class RunError(Exception):
    """Something that went wrong during the work, not in what the user gave: one sentence, exit code 1."""


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """argparse's, with the default behind an option's help only where there is one to tell."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse with defaults in the help, and errors of one line without the usage text (exit code 2)."""

    def __init__(self, **kwargs: Any):
        super().__init__(formatter_class=HelpFormatter, allow_abbrev=False, **kwargs)
        self.presets: dict[str, dict] = {}
        self.estimate: Callable[[argparse.Namespace], dict] = lambda args: {}

    def add_presets(
        self, presets: dict[str, dict], estimate: Callable[[argparse.Namespace], dict] = lambda args: {}
    ) -> None:
        """Add ``--preset``: a name for values of this parser's options, which the command line may still override.

        ``estimate`` tells ``--dry-run`` what follows from a preset's options alone, where weights or data are missing.
        """
        self.presets, self.estimate = presets, estimate
        self.add_argument(
            "--preset",
            choices=presets,
            metavar="NAME",
            help=f"Use the options of a row of Table 1: {', '.join(presets)}.",
        )

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, after the named preset has replaced the defaults."""
        early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        early.add_argument("--preset")
        early.add_argument("--dry-run", action="store_true")
        given = early.parse_known_args(args)[0]
        chosen = self.presets.get(given.preset, {})
        for action in self._actions:
            action.default = chosen.get(action.dest, action.default)
            if chosen and given.dry_run and action.required:
                # A preset can be shown before its weights and data are there.
                action.default = action.default or f"({action.option_strings[0]} is not given)"
            action.required = action.required and action.default is None
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Exit with code 2 and one line on stderr."""
        self.exit(2, f"{self.prog}: error: {message}\n")
        raise AssertionError("exit returns nowhere")


def main(parser: Parser, run: Callable[[argparse.Namespace], None], argv: list[str] | None = None) -> None:
    """Parse the command line and run; ``UserError`` (exit code 2) and ``RunError`` (1) become one line on stderr."""
    args = parser.parse_args(argv)
    try:
        with _sigterm_as_error():
            run(args)
    except KeyboardInterrupt:
        fail(parser, "interrupted; the same command continues what it can", 130)
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        where = f" ({error.filename})" if error.filename else ""
        fail(parser, f"{error.strerror}{where}; make room and run the same command again", 1)
    except RuntimeError as error:
        if not (int(os.environ.get("WORLD_SIZE", 1)) > 1 and RANK_LOST.search(str(error))):
            raise
        reason = str(error).splitlines()[0][:200]
        fail(
            parser, f"another rank has died, or has not answered for too long; run the same command again ({reason})", 1
        )
    except (UserError, RunError) as error:
        if getattr(args, "preset", None) and args.dry_run:
            show_plan({"not_checked": str(error)} | parser.estimate(args), args)
            return
        # The error of a data worker comes with its traceback, whose last line names the class and the text.
        text = str(error).splitlines()[-1].removeprefix(f"{__name__}.{type(error).__name__}: ")
        fail(parser, text, 2 if isinstance(error, UserError) else 1)


def fail(parser: Parser, text: str, code: int) -> NoReturn:
    """End with one line on stderr and this exit code."""
    print(f"{parser.prog}: error: {text}", file=sys.stderr)
    sys.exit(code)


@contextlib.contextmanager
def _sigterm_as_error() -> Iterator[None]:
    """SIGTERM, which clusters send before they take a machine away, raises ``RunError``; a second one kills."""

    def stop(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise RunError("terminated; the same command continues what it can")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run_command(args: argparse.Namespace) -> None:
    """``run`` of a parser with sub-commands, each of which has set ``run`` to a function of its arguments."""
    args.run(args)


#################################################################################
#                            Options and their values                           #
#################################################################################


def chosen(args: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """The values of some options by name, as keyword arguments for what is below a script."""
    return {name: getattr(args, name) for name in names}


def add_dry_run_option(group: OptionGroup) -> None:
    """The ``--dry-run`` option, the same in every script."""
    group.add_argument("--dry-run", action="store_true", help="Check everything, print the plan as JSON, do nothing.")


def show_plan(plan: dict, args: argparse.Namespace) -> None:
    """Print what a run would do, and all options, as JSON: the whole of ``--dry-run``."""
    if os.environ.get("RANK", "0") == "0":
        options = {name: value for name, value in vars(args).items() if not callable(value)}
        print(json.dumps(plan | {"options": options}, indent=2, default=str))


def positive(text: str) -> int:
    """argparse type: a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return value


def not_negative(text: str) -> int:
    """argparse type: a whole number of at least 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} must not be negative")
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} must be a finite number")
    return value


def positive_number(text: str) -> float:
    """argparse type: a finite number above 0."""
    value = _finite(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text} must be above 0")
    return value


def not_negative_number(text: str) -> float:
    """argparse type: a finite number of at least 0."""
    value = _finite(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} must not be negative")
    return value


def fraction(text: str) -> float:
    """argparse type: a number of at least 0 and below 1."""
    value = _finite(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 0 and below 1")
    return value


def shortened(names: list[str], count: int) -> str:
    """The first names of a list that may be long, for a sentence."""
    return ", ".join(names[:count]) + (" ..." if len(names) > count else "")


def existing_file(option: str, path: str | Path) -> Path:
    """The path, or a ``UserError`` that names the option when no such file exists."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{option} {path}: no such file")
    return path


def existing_folder(option: str, path: str | Path) -> Path:
    """The path, or a ``UserError`` that names the option when the folder is missing or empty."""
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{option} {path}: no such folder")
    if not any(path.iterdir()):
        raise UserError(f"{option} {path}: the folder is empty")
    return path
