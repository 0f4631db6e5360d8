"""SIGTERM: noticed or raised once, whatever else is done with it; a second one."""

import contextlib
import os
import signal
import threading
import time

import pytest

from runtime.sigterm import Terminated, held_back, notice_sigterm, sigterm_as_error


def test_sigterm_is_noticed_within_the_block_only():
    before = signal.getsignal(signal.SIGTERM)
    with notice_sigterm() as told:
        assert not told.is_set()
        os.kill(os.getpid(), signal.SIGTERM)
        assert told.wait(10)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # a second one kills
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("launcher, code", [({}, -signal.SIGTERM), ({"TORCHELASTIC_RUN_ID": "x"}, 0)])
def test_a_second_sigterm_kills_unless_torchrun_sends_it(launcher, code):
    """Under torchrun for two reasons: it passes on what the cluster sent, and its death comes once for each thread."""
    for catch in (notice_sigterm, sigterm_as_error):
        child = os.fork()
        if not child:
            os.environ |= launcher
            with contextlib.suppress(Terminated), catch():
                try:
                    os.kill(os.getpid(), signal.SIGTERM)
                finally:
                    os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == code


def test_what_torch_makes_of_it_is_it_all_the_same():
    with pytest.raises(Terminated), sigterm_as_error():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except Terminated:
            raise ValueError("could not determine the shape of this object") from None
    with pytest.raises(ValueError, match="another"), sigterm_as_error():
        raise ValueError("another")


@pytest.mark.parametrize("sent, error", [(signal.SIGTERM, Terminated), (signal.SIGINT, KeyboardInterrupt)])
def test_signals_held_back_come_later_and_never_to_processes_begun_meanwhile(sent, error):
    with pytest.raises(error), sigterm_as_error():
        with held_back():
            child = os.fork()
            if not child:
                os.kill(os.getpid(), sent)
                os._exit(0)
            os.kill(os.getpid(), sent)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        raise AssertionError("it comes before this")


def test_they_are_held_back_where_another_thread_gets_them_too():
    with pytest.raises(Terminated), sigterm_as_error():
        over = threading.Event()
        other = threading.Thread(target=over.wait)
        other.start()  # before the block: it may get what is sent to this process
        try:
            with held_back():
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.05)
        finally:
            over.set()
            other.join()
