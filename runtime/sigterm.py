"""How a process is told to end: SIGTERM as an error, as an event, or not at all; and the death of who started it."""

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator


class Terminated(BaseException):
    """SIGTERM has come. As ``KeyboardInterrupt`` no ``Exception``: who catches errors must not take it for one."""


@contextlib.contextmanager
def sigterm_as_error() -> Iterator[None]:
    """SIGTERM, which clusters send before they take a machine away, raises ``Terminated``, whatever becomes of it."""
    terminated = False

    def stop(*_: object) -> None:
        nonlocal terminated
        terminated = True
        second_sigterm()
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except Exception:
        if terminated:  # torch makes an error of its own of what comes up in its conversions
            raise Terminated from None
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def notice_sigterm() -> Iterator[threading.Event]:
    """An event that is set when SIGTERM comes, which clusters send before they take a machine away."""
    event = threading.Event()

    def notice(*_: object) -> None:
        event.set()
        second_sigterm()

    before = signal.signal(signal.SIGTERM, notice)
    try:
        yield event
    finally:
        signal.signal(signal.SIGTERM, before)


def second_sigterm() -> None:
    """Let the next SIGTERM kill; not under torchrun, which passes on what the ranks have been sent already.

    It kills by itself after a while, and by its own death ranks are sent SIGTERM once for each of its threads.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN if "TORCHELASTIC_RUN_ID" in os.environ else signal.SIG_DFL)


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """SIGINT and SIGTERM come when the block is over: within, where python forks, it may pass over what they raise.

    Processes that begin in the block never get them; they end with the one that they work for.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    both, came = (signal.SIGINT, signal.SIGTERM), []
    before = {sent: signal.signal(sent, lambda number, frame: came.append(number)) for sent in both}
    if hasattr(signal, "pthread_sigmask"):  # not on Windows; for the processes, since it holds in this thread only
        signal.pthread_sigmask(signal.SIG_BLOCK, both)
    try:
        yield
    finally:
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, both)
        for sent, handler in before.items():
            signal.signal(sent, handler)
        for number in came[:1]:
            signal.raise_signal(number)


def die_with_parent() -> None:
    """Have the system end this process with SIGTERM when the one that started it dies. Linux only."""
    if sys.platform == "linux":
        parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl.h
        ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGTERM)
