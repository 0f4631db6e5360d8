"""Standard output and error that outlast their readers: of a closed pipe, a lost terminal or a full disk, work goes on.

What nobody reads is not worth an error. Names that the console's encoding lacks are written as escapes.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any


class Console:
    """A text stream whose writes never fail; the first that would sends it, and all of its file, nowhere."""

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write what can be written."""
        with self._losses():
            try:  # first, names of bytes that are no text, which some consoles would be sent as they are
                self._stream.write(text.encode(errors="backslashreplace").decode())
            except UnicodeEncodeError as error:
                self._stream.write(text.encode(error.encoding, "backslashreplace").decode(error.encoding))
        return len(text)

    def flush(self) -> None:
        """Hand on what is buffered."""
        with self._losses():
            self._stream.flush()

    @contextlib.contextmanager
    def _losses(self) -> Iterator[None]:
        try:
            yield
        except BlockingIOError:  # who reads is slow
            pass
        except (OSError, ValueError):  # ValueError: closed by this process
            with contextlib.suppress(OSError, ValueError):
                _nowhere(self._stream.fileno())


def _nowhere(number: int) -> None:
    """Have a descriptor lead to the system's null device."""
    null = os.open(os.devnull, os.O_RDWR)
    if null != number:
        os.dup2(null, number)
        os.close(null)
    os.set_inheritable(number, True)


@contextlib.contextmanager
def lasting_console() -> Iterator[None]:
    """Within it sys.stdout and sys.stderr outlast their readers, and no file takes the place of one that is closed."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            _nowhere(number)
    before = sys.stdout, sys.stderr
    streams: list[Any] = [stream or os.fdopen(i, "w", closefd=False) for i, stream in enumerate(before, start=1)]
    sys.stdout, sys.stderr = map(Console, streams)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before
