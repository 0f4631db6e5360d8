"""The commands that every store of shards has: verify and repair."""

import argparse
from collections.abc import Callable
from typing import Any

from runtime import cli
from stores.shards import repair


def store_parser(doc: str | None, name: str, verify: Callable[..., None]) -> tuple[cli.Parser, Any]:
    """The parser of the module stores.NAME with both commands, and the place to add others to.

    ``doc`` is that module's, ``verify`` checks a store of its kind.
    """
    parser = cli.Parser(doc, prog=f"stores.{name}", description=f"Look after a store of {name}.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=cli.Parser)
    command = commands.add_parser("verify", help="Check counts, checksums and finiteness.")
    command.add_argument("folder", metavar="DIR", help="Folder of the store.")
    command.set_defaults(run=verify)
    command = commands.add_parser("repair", help="Remove damaged shards, for the command that made them to make anew.")
    command.add_argument("folder", metavar="DIR", help="Folder of the store.")
    command.set_defaults(run=run_repair)
    return parser, commands


def run_repair(args: argparse.Namespace) -> None:
    bad = repair(args.folder, "DIR")
    if not bad:
        print(f"{args.folder}: ok, nothing to repair")
    else:
        print(f"{args.folder}: {', '.join(bad)} removed; run the command that made the store to make them anew")
