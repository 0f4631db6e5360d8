"""Command-line manners that all scripts share: one-sentence errors, grouped options, --dry-run.

Nothing in here knows about diffusion; a script is ``cli.main(build_parser(), run)``.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path


class UserError(Exception):
    """A mistake in what the user gave. The text is one sentence: the option, its value, what would be right."""


class RunError(Exception):
    """Something that went wrong during the work, not in what the user gave: one sentence, exit code 1."""


class Parser(argparse.ArgumentParser):
    """argparse with defaults in the help, and errors of one line without the usage text (exit code 2)."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False, **kwargs)
        self.presets: dict[str, dict] = {}

    def add_presets(
        self, presets: dict[str, dict], estimate: Callable[[argparse.Namespace], dict] = lambda args: {}
    ) -> None:
        """Add ``--preset``: a name for values of this parser's options, which the command line may still override.

        ``estimate`` tells ``--dry-run`` what follows from a preset's options alone, before one has weights and data.
        """
        self.presets, self.estimate = presets, estimate
        self.add_argument("--preset", choices=presets, metavar="NAME", help=f"a row of Table 1: {', '.join(presets)}")

    def parse_args(self, args=None, namespace=None) -> argparse.Namespace:
        """As argparse's, after the named preset has replaced the defaults."""
        early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        early.add_argument("--preset")
        early.add_argument("--dry-run", action="store_true")
        given = early.parse_known_args(args)[0]
        chosen = self.presets.get(given.preset, {})
        for action in self._actions:
            action.default = chosen.get(action.dest, action.default)
            if chosen and given.dry_run and action.required:  # to be looked at before one has the weights and the data
                action.default = action.default or f"({action.option_strings[0]} is not given)"
            action.required = action.required and action.default is None
        return super().parse_args(args, namespace)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(parser: Parser, run: Callable[[argparse.Namespace], None], argv: list[str] | None = None) -> None:
    """Parse the command line and run; ``UserError`` (exit code 2) and ``RunError`` (1) become one line on stderr."""
    args = parser.parse_args(argv)
    try:
        run(args)
    except (UserError, RunError) as error:
        if getattr(args, "preset", None) and args.dry_run:
            show_plan({"not_checked": str(error)} | parser.estimate(args), args)
            return
        text = str(error).splitlines()[-1].removeprefix("cli.UserError: ")  # a data worker's comes with its traceback
        print(f"{parser.prog}: error: {text}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)


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


def show_plan(plan: dict, args: argparse.Namespace | None = None) -> None:
    """Print what a run would do, and all options, as JSON: the whole of ``--dry-run``."""
    if os.environ.get("RANK", "0") == "0":
        options = {"options": vars(args)} if args else {}
        print(json.dumps(plan | options, indent=2, default=str))
