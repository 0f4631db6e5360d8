"""The shared parts of all command lines: one-sentence errors, presets, --dry-run.

Nothing in here knows about diffusion; a script is ``cli.main(build_parser(), run)``. values.py has their types,
checks.py the other checks before a command starts. A group of options is a dataclass, a field of which has an option's
name, type, default and help, each in one place:

    @dataclass(frozen=True)
    class Logging:
        log_every: int = option(100, "Steps between log lines.", positive)

    add_options(parser.add_argument_group("logging"), Logging)  # --log-every
    logging = read_options(Logging, vars(args))

What is below a script takes such an object, or keyword arguments.
"""

import argparse
import contextlib
import difflib
import errno
import json
import os
import re
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from dataclasses import field, fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from runtime import launcher
from runtime.console import lasting_console
from runtime.errors import AbsentError, MissingError, PlanShown, RunError, ShortageError, UserError
from runtime.paths import missing
from runtime.stop_signals import Terminated, ended_by, exit_code, handlers_as_before, signals_as_errors
from runtime.values import METAVARS
from runtime.values import file as file
from runtime.values import folder as folder
from runtime.values import fraction as fraction
from runtime.values import name as name
from runtime.values import noise_level as noise_level
from runtime.values import not_negative as not_negative
from runtime.values import not_negative_number as not_negative_number
from runtime.values import positive as positive
from runtime.values import positive_number as positive_number
from runtime.values import workers as workers

Group = TypeVar("Group")
OptionGroup = argparse._ArgumentGroup | argparse.ArgumentParser  # whatever has ``add_argument``

RANK_LOST = re.compile(r"gloo|nccl|connection (closed|reset)|timed? ?out|broken pipe", re.IGNORECASE)
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
DISK_ERRORS = (*FULL_DISK, errno.EROFS, errno.EIO)
# A path that was there, or was never open to this user: of links, permissions, disks that are elsewhere.
PLACE_ERRORS: tuple[int, ...] = (errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG)
PLACE_ERRORS += (errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT)
NO_MEMORY = re.compile(r"can't allocate memory|not enough memory|out of memory", re.IGNORECASE)  # torch's words
# Other projects' names of options, and ours.
OTHER_NAMES = {"--epochs": ("--iterations", "--train-iterations"), "--learning-rate": ("--lr",), "--output": ("--out",)}
RANKS_PAUSE = 30.0  # seconds in which the main rank alone may print an error that all ranks have found

# False in a dry run, which downloads nothing and waits for no other rank.
FETCHING: ContextVar[bool] = ContextVar("FETCHING", default=True)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """argparse's, with the default behind an option's help where it has one, and a value's name by its type.

    Examples keep their lines.
    """

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.required and action.option_strings:
            return f"{action.help} (required)"
        if isinstance(action.default, list):
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return METAVARS.get(action.type, "NAME")

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith("examples:") else super()._fill_text(text, width, indent)


class Parser(argparse.ArgumentParser):
    """argparse with defaults in the help, and errors of one line without the usage text (exit code 2)."""

    def __init__(self, doc: str | None = None, **kwargs: Any):
        """``doc``: a script's docstring, whose commands are shown as examples below the help."""
        commands = re.findall(r"^(?: {4})?((?:python|torchrun) (?:.*\\\n)*.*)$", doc or "", re.MULTILINE)
        lines = [re.sub(r"(?<=\S) +", " ", command) for command in commands]
        epilog = "\n  ".join(["examples:", *lines]) if lines else None
        super().__init__(formatter_class=HelpFormatter, allow_abbrev=False, epilog=epilog, **kwargs)
        self.presets: dict[str, dict] = {}
        self.estimate: Callable[[dict], dict] = lambda options: {}
        self.words: list[str] = []  # of the command line

    def add_presets(self, presets: dict[str, dict], estimate: Callable[[dict], dict]) -> None:
        """Add ``--preset``: a name for values of this parser's options, which the command line may still override.

        ``estimate`` gives ``--dry-run`` the plan by the options alone, where weights or data are missing.
        """
        self.presets, self.estimate = presets, estimate
        self.add_argument(
            "--preset",
            choices=presets,
            metavar="NAME",
            help=f"Use the options of a row of the paper: {', '.join(presets)}.",
        )

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, after the named preset has replaced the defaults."""
        self.words = [str(word) for word in (sys.argv[1:] if args is None else args)]
        for word in self.words:  # libraries take no such path, though python does
            if not word.isascii() and word != word.encode(errors="ignore").decode():
                self.error(f"{word}: is no text in UTF-8; rename it, or give a link to it with another name")
        early: Any = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        early.error = self.error
        early.add_argument("--preset", nargs="?")
        early.add_argument("--dry-run", action="store_true")
        given = early.parse_known_args(args)[0]
        chosen = self.presets.get(given.preset, {})
        for action in self._actions:
            action.default = chosen.get(action.dest, action.default)
            if chosen and given.dry_run and action.required:
                # A preset can be shown before its weights and data exist.
                action.default = action.default or f"({action.option_strings[0]} is not given)"
            action.required = action.required and action.default is None
        return super().parse_args(args, namespace)

    def typed(self, names: Sequence[str]) -> str | None:
        """Which of an option's names stands on the command line, the last of them; None if none does."""
        return next((name for word in reversed(self.words) if (name := word.split("=")[0]) in names), None)

    def mark_defaults(self, text: str, args: argparse.Namespace) -> str:
        """A message with a remark behind each value that nobody typed: it is the default, or that of the preset."""
        preset = getattr(args, "preset", None)
        for action in self._actions:
            value = getattr(args, action.dest, None)
            if value is None or not action.option_strings or self.typed(action.option_strings):
                continue
            if str(value).startswith("("):  # said to be missing
                continue
            whose = f"of --preset {preset}" if action.dest in self.presets.get(preset or "", {}) else "the default"
            said = rf"({re.escape(f'{action.option_strings[0]} {value}')})(?=[\s:,;]|$)"
            text = re.sub(said, rf"\1 ({whose})", text, count=1)
        return text

    def error(self, message: str) -> NoReturn:
        """Exit with code 2 and one line on stderr; an option with several names is called as it was typed."""
        if "--local-rank=" in message or "--local_rank=" in message:
            message += "; that is torch.distributed.launch's: start the command with torchrun instead"
        names = re.match(r"argument (-\S+/\S+):", message)
        if names:
            first = names[1].split("/")
            message = message.replace(names[1], self.typed(first) or first[0], 1)
        if message.startswith("unrecognized arguments: "):
            message += self._suggestion(message.split()[2:])
        fail(self, message, 2)

    def _suggestion(self, words: Sequence[str]) -> str:
        """ "; did you mean ...?" for the first unknown option that is like one of ours; empty where none is."""
        known = sorted(name for action in self._actions for name in action.option_strings if name.startswith("--"))
        for word in (word.split("=")[0] for word in words if word.startswith("--")):
            close = [name for name in known if name in OTHER_NAMES.get(word, ()) or name.startswith(word)]
            if close := close or difflib.get_close_matches(word, known, n=1):
                return f"; did you mean {close[0]}?"
        return ""


def main(parser: Parser, run: Callable[[argparse.Namespace], None], argv: list[str] | None = None) -> None:
    """Parse the command line and run; ``UserError`` (exit code 2) and ``RunError`` (1) become one line on stderr."""
    with lasting_console(), handlers_as_before():
        _main(parser, run, argv)


def _main(parser: Parser, run: Callable[[argparse.Namespace], None], argv: list[str] | None) -> None:
    args, fetching = argparse.Namespace(), FETCHING.set(True)
    try:
        args = parser.parse_args(argv)
        FETCHING.set(not getattr(args, "dry_run", False))
        launcher.place(planning=not FETCHING.get())
        with signals_as_errors(lambda number: say(parser, _end(number), exit_code(number))):
            run(args)
    except PlanShown as end:
        show_plan(end.plan, args)
    except KeyboardInterrupt as error:
        fail(parser, _end(signal.SIGINT, error), exit_code(signal.SIGINT))
    except Terminated as error:
        fail(parser, _end(error.number, error), exit_code(error.number))
    except OSError as error:
        if error.errno not in (*DISK_ERRORS, *PLACE_ERRORS):
            raise
        where = f" ({error.filename})" if error.filename else ""
        way = "; make room and run the same command again" if error.errno in DISK_ERRORS else ""
        fail(parser, f"{error.strerror}{where}{way}", 1)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or NO_MEMORY.search(str(error)):
            less = "give smaller batches or a smaller model, or look at the plan of --dry-run"
            fail(parser, f"out of memory; {less} ({(str(error) or 'no more to be had').splitlines()[0][:200]})", 1)
        if not (launcher.speaker().world_size > 1 and RANK_LOST.search(str(error))):
            raise
        dead = "another rank has died, or has not answered for too long; run the same command again"
        fail(parser, f"{dead} ({str(error).splitlines()[0][:200]})", 1)
    except (UserError, RunError) as error:
        unsure = getattr(args, "preset", None) and not isinstance(error, MissingError)
        if getattr(args, "dry_run", False) and (unsure or isinstance(error, AbsentError)):
            show_plan({"not_checked": parser.mark_defaults(str(error), args)} | parser.estimate(vars(args)), args)
            return
        if getattr(args, "dry_run", False) and isinstance(error, ShortageError):
            show_plan(error.plan(), args)
        # The error of a data worker comes with its traceback, whose last line names the class and the text.
        text = str(error)
        if text.startswith("Caught "):
            text = text.splitlines()[-1].removeprefix(f"{type(error).__module__}.{type(error).__name__}: ")
        fail(parser, parser.mark_defaults(text, args), error.code if isinstance(error, RunError) else 2)
    finally:
        FETCHING.reset(fetching)


def _end(number: int, error: BaseException | None = None) -> str:
    """What to say of a command that a signal has ended, with what its error tells of the work."""
    told = f" ({error})" if error is not None and str(error) else ""
    return f"{ended_by(number)}; the same command continues what it can{told}"


def one_line(text: str) -> str:
    """The text, with characters that would break its line (in a file's name, for one) written as escapes."""
    return text.replace("\n", "\\n").replace("\r", "\\r")


def fail(parser: argparse.ArgumentParser, text: str, code: int) -> NoReturn:
    """End with one line on stderr and this exit code, and tell torchrun: ``say``."""
    say(parser, text, code)
    sys.exit(code)


def say(parser: argparse.ArgumentParser, text: str, code: int) -> None:
    """The line with which a command ends, with that exit code.

    All ranks find the same mistake (exit code 2); the main one says it, and torchrun ends the others meanwhile. This
    line is the root cause in the long report that torchrun then prints.
    """
    text = one_line(text)
    who, rank = f"{parser.prog}: error", launcher.speaker().rank
    if rank:
        if code == 2:
            time.sleep(RANKS_PAUSE)
        who += f" of rank {rank}"
    print(f"{who}: {text}", file=sys.stderr, flush=True)
    report = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if report:
        said = {"message": text, "extraInfo": {"py_callstack": f"{who}: {text}", "timestamp": str(int(time.time()))}}
        with contextlib.suppress(OSError):
            Path(report).write_text(json.dumps({"message": said}))


def run_command(args: argparse.Namespace) -> None:
    """``run`` of a parser with sub-commands, each of which has set ``run`` to a function of its arguments."""
    args.run(args)


#################################################################################
#                            Options and their values                           #
#################################################################################


def chosen(args: Any, names: Iterable[str]) -> dict[str, Any]:
    """The values of some options, or of a group of them, by name, as keyword arguments for the functions below."""
    return {name: getattr(args, name) for name in names}


def add_dry_run_option(group: OptionGroup) -> None:
    """The ``--dry-run`` option, the same in every script."""
    group.add_argument("--dry-run", action="store_true", help="Check everything, print the plan as JSON, do nothing.")


def show_plan(plan: dict, args: argparse.Namespace) -> None:
    """Print the plan of a run, and all options, as JSON: the whole of ``--dry-run``."""
    if launcher.speaker().rank == 0:
        options = {name: value for name, value in vars(args).items() if not callable(value)}
        print(json.dumps(plan | {"options": options}, indent=2, default=str))


def shortened(names: list[str], count: int) -> str:
    """The first names of a list that may be long, for a sentence."""
    return ", ".join(names[:count]) + (" ..." if len(names) > count else "")


def existing_file(option: str, path: str | Path) -> Path:
    """The path, or a ``UserError`` that names the option when no such file exists."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{option} {path}: " + ("is a folder, give a file" if path.is_dir() else missing(path, "file")))
    if not os.access(path, os.R_OK):
        raise UserError(f"{option} {path}: this user may not read the file")
    return path


def existing_folder(option: str, path: str | Path) -> Path:
    """The path, or a ``UserError`` that names the option when the folder is missing or empty."""
    path = Path(path)
    if not path.is_dir():
        said = "is a file, give a folder" if path.exists() else missing(path, "folder")
        raise UserError(f"{option} {path}: {said}")
    if not os.access(path, os.R_OK | os.X_OK):
        raise UserError(f"{option} {path}: this user may not read the folder")
    if not any(path.iterdir()):
        raise UserError(f"{option} {path}: the folder is empty")
    return path


def option(default: Any, help: str, type: Callable[[str], Any] | None = None, **more: Any) -> Any:
    """A field that is an option. ``type`` makes its value of a word; ``more`` is what ``add_argument`` takes besides.

    ``also`` are other names of it. One whose default is False or True can be turned on and off, --name and --no-name.
    """
    if isinstance(default, bool):
        more.setdefault("action", argparse.BooleanOptionalAction)
    return field(default=default, metadata=({"type": type} if type else {}) | {"help": help} | more)


def add_options(group: OptionGroup, kind: type, **defaults: Any) -> None:
    """The options of a dataclass, in its order; ``defaults`` are those that a script has of its own."""
    for each in fields(kind):
        about = dict(each.metadata)
        names = [f"--{each.name.replace('_', '-')}", *about.pop("also", ())]
        group.add_argument(*names, default=defaults.get(each.name, each.default), **about)


def read_options(kind: type[Group], given: dict[str, Any]) -> Group:
    """The options of a dataclass among all that were given, by name."""
    return kind(**{each.name: given[each.name] for each in fields(kind)})  # type: ignore[arg-type]
