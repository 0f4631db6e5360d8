"""How a process is told to end: Ctrl-C, SIGTERM and their like, as an error or as an event; the death of its parent.

What asks for an end is SIGINT, SIGTERM, SIGHUP of a lost terminal, and SIGUSR1 and SIGXCPU of schedulers. The second
SIGINT or SIGTERM kills. Python runs handlers between its own instructions only: while it is in C, where a rank waits
for others, a thread listens, lets the next one kill, and ends a process that waits for nothing but others.
"""

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from runtime.launcher import under_torchrun

NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGXCPU")  # not all systems have all
STOPPING = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))
KILLING = (signal.SIGINT, signal.SIGTERM)
SECONDS_IN_C = 2.0  # after which a process that waits for others ends without python's handlers

_handled: set[int] = set()  # the signals that this process listens to
_raises = False  # whether they are raised as errors
_waits = False  # whether the main thread waits for other processes, in C
_heard = threading.Event()  # whether python's handlers have run since


class Terminated(BaseException):
    """A signal has come, ``number``. As ``KeyboardInterrupt`` no ``Exception``: it must not be taken for an error."""

    number: int = signal.SIGTERM


def ended_by(number: int) -> str:
    """What a signal does to a process, in words."""
    if number in KILLING:
        return "interrupted" if number == signal.SIGINT else "terminated"
    return f"terminated by {signal.Signals(number).name}"


def exit_code(number: int) -> int:
    """That of a process which a signal has ended in good order."""
    return 130 if number == signal.SIGINT else 1


def _let_next_kill(number: int, set_handler: Callable[[int, Any], Any] = signal.signal) -> None:
    """After SIGINT or SIGTERM the next one kills. Under torchrun nothing more comes: it passes on to its ranks what
    they have been sent already, kills by itself after a while, and by its own death sends SIGTERM for each thread.
    """
    if under_torchrun():
        for each in _handled:
            set_handler(each, signal.SIG_IGN)
    elif number in KILLING:
        for each in _handled.intersection(KILLING):
            set_handler(each, signal.SIG_DFL)


@contextlib.contextmanager
def handlers_as_before() -> Iterator[None]:
    """Around a command: what a signal has changed for its last moments is as before when it has ended."""
    before = {number: signal.getsignal(number) for number in STOPPING}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                if handler is not None:  # not of python
                    signal.signal(number, handler)


@contextlib.contextmanager
def _listening(handle: Callable[[int], None], of_command: bool) -> Iterator[None]:
    """Call ``handle`` for each signal that asks for an end, unless it is ignored, as SIGHUP under nohup.

    ``of_command``: after the first one the next kills until ``handlers_as_before`` ends, while words are being said.
    """
    listened = [number for number in STOPPING if signal.getsignal(number) != signal.SIG_IGN]

    def came(number: int, frame: object) -> None:
        _heard.set()
        _let_next_kill(number)
        handle(number)

    _handled.update(listened)
    before = {number: signal.signal(number, came) for number in listened}
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is came or not of_command:
                signal.signal(number, handler)


@contextlib.contextmanager
def signals_as_errors(end: Callable[[int], None] = os._exit) -> Iterator[None]:
    """What asks for an end raises ``KeyboardInterrupt`` or ``Terminated``, once, whatever becomes of it.

    ``end`` says of a signal what is to be said where nothing can be raised; the process ends then.
    """
    global _raises
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    told: list[int] = []

    def error_of(number: int) -> BaseException:
        if number == signal.SIGINT:
            return KeyboardInterrupt()
        error = Terminated()
        error.number = number
        return error

    def stop(number: int) -> None:
        told.append(number)
        if len(told) == 1:
            raise error_of(number)

    def once_more(lost: Any) -> None:
        """Python passes over what is raised in a callback of a weak reference: a thread raises it outside of that."""
        if not told or not isinstance(lost.exc_value, KeyboardInterrupt | Terminated):
            hook(lost)
            return
        kind = KeyboardInterrupt if told[0] == signal.SIGINT else type("Lost", (Terminated,), {"number": told[0]})

        def work() -> None:
            if sys.unraisablehook is once_more:  # else the block has ended
                main = ctypes.c_ulong(threading.main_thread().ident or 0)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(main, ctypes.py_object(kind))

        threading.Timer(0.01, work).start()

    before, _raises = _raises, True
    hook, sys.unraisablehook = sys.unraisablehook, once_more
    _heard.clear()
    try:
        with _listening(stop, of_command=True), _thread_listens(end):
            yield
    except Exception:
        if told:  # torch makes an error of its own of what comes up in its conversions
            raise error_of(told[0]) from None
        raise
    finally:
        _raises, sys.unraisablehook = before, hook


@contextlib.contextmanager
def notice_signals() -> Iterator[list[int]]:
    """The signals that have asked for an end since, for who looks at them when it suits."""
    global _raises
    came: list[int] = []

    def notice(number: int) -> None:
        if number == signal.SIGINT and not came:  # straight to the file: a handler may have interrupted a write
            with contextlib.suppress(OSError):
                os.write(2, b"\nending after this step, with a snapshot; once more kills\n")
        came.append(number)

    before, _raises = _raises, False
    try:
        with _listening(notice, of_command=before):
            yield came
    finally:
        _raises = before


@contextlib.contextmanager
def waiting_for_others() -> Iterator[None]:
    """Around a call into C that waits for other processes: what would be raised ends this process within seconds."""
    global _waits
    _waits = _raises
    try:
        yield
    finally:
        _waits = False


@contextlib.contextmanager
def _thread_listens(end: Callable[[int], None]) -> Iterator[None]:
    """A thread that does for signals what python's handlers cannot do while the main thread is in C."""
    listen, tell = os.pipe()
    os.set_blocking(tell, False)

    def work() -> None:
        killing = 0
        while (content := os.read(listen, 1)) and (number := content[0]) != 0:
            if number not in _handled:
                continue
            killing += number in KILLING
            with contextlib.suppress(OSError, AttributeError):  # not on Windows
                _let_next_kill(number, ctypes.CDLL(None).signal)
            if killing > 1 and not under_torchrun():  # both came before anybody could listen
                os.kill(os.getpid(), number)
            if not _heard.wait(SECONDS_IN_C) and _waits:
                end(number)
                os._exit(exit_code(number))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    before = signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.write(tell, b"\0")
        thread.join()
        os.close(listen)
        os.close(tell)


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """What asks for an end comes when the block is over: within, where python forks, it may pass over what they raise.

    Processes that begin in the block never get them; they end with the one that they work for.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {sent: signal.signal(sent, lambda number, frame: came.append(number)) for sent in STOPPING}
    if hasattr(signal, "pthread_sigmask"):  # not on Windows; for the processes, since it holds in this thread only
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
        for sent, handler in before.items():
            signal.signal(sent, handler)
        for number in came[:1]:  # not sent again, which would count as a second one
            handler = before[number]
            handler(number, None) if callable(handler) else signal.raise_signal(number)


def die_with_parent() -> None:
    """Have the system end this process with SIGTERM when the one that started it dies. Linux only."""
    if sys.platform == "linux":
        parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl.h
        ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGTERM)
