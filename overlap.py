"""Writing beside computing: what every script that makes data and puts it on disk has in common."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor


def write_behind(items: Iterable, make: Callable, write: Callable) -> None:
    """``write(item, make(item))`` for each item in turn; writing happens in a thread while the next item is made.

    Items are written in order and at most one is waiting, so memory holds two. An error of either side is raised here,
    after the write under way has ended; no later item is written then.
    """
    with ThreadPoolExecutor(max_workers=1) as thread:
        writing = None
        for item in items:
            made = make(item)
            if writing:
                writing.result()
            writing = thread.submit(write, item, made)
        if writing:
            writing.result()
