"""The errors that end a command in one sentence; cli.py says them."""

from collections.abc import Callable


class UserError(Exception):
    """A user's mistake. The text is one sentence: the option, its value, and a right value."""


class AbsentError(UserError):
    """Something that a run would fetch from the network first. A dry run fetches nothing and plans without it."""


class MissingError(UserError):
    """Something that was named and is not there, without which no plan is worth showing: a dry run refuses it too."""


class BusyError(UserError):
    """Another process holds what this one needs: the one mistake that may be over in a moment."""


class ShortageError(UserError):
    """Room or memory do not suffice. A dry run shows the counted needs all the same, ``plan()``."""

    def __init__(self, text: str, plan: Callable[[], dict]):
        super().__init__(text)
        self.plan = plan


class PlanShown(BaseException):
    """Where a dry run ends: everything is checked, and ``plan`` is to be shown. No ``Exception``: nothing is wrong."""

    def __init__(self, plan: dict):
        super().__init__("a dry run does no more")
        self.plan = plan


class RunError(Exception):
    """A failure during the work, not a user's mistake: one sentence, and the exit code."""

    def __init__(self, text: str, code: int = 1):
        super().__init__(text)
        self.code = code
