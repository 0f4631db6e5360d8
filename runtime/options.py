"""Groups of options as dataclasses: a field has an option's name, type, default and help, each in one place.

    @dataclass(frozen=True)
    class Logging:
        log_every: int = option(100, "Steps between log lines.", positive)

    add_options(parser.add_argument_group("logging"), Logging)  # --log-every
    logging = read_options(Logging, vars(args))

What is below a script takes such an object, or keyword arguments.
"""

import argparse
from collections.abc import Callable
from dataclasses import field, fields
from typing import Any, TypeVar

from runtime.cli import OptionGroup

Group = TypeVar("Group")


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
