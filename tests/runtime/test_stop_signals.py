"""What asks for an end: noticed or raised once, whatever is done with it; a second one; while python waits in C."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref

import pytest
from helpers import ROOT, SHIPPED_TEACHER, words

from runtime.stop_signals import (
    Terminated,
    ended_by,
    exit_code,
    handlers_as_before,
    held_back,
    notice_signals,
    signals_as_errors,
)


def test_sigterm_is_noticed_within_the_block_only():
    before = signal.getsignal(signal.SIGTERM)
    with notice_signals() as told:
        assert not told
        os.kill(os.getpid(), signal.SIGTERM)
        assert told == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # a second one kills
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("launcher, code", [({}, -signal.SIGTERM), ({"TORCHELASTIC_RUN_ID": "x"}, 0)])
def test_a_second_sigterm_kills_unless_torchrun_sends_it(launcher, code):
    """Under torchrun for two reasons: it passes on what the cluster sent, and its death comes once for each thread."""
    for catch in (notice_signals, signals_as_errors):
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
    with pytest.raises(Terminated), signals_as_errors():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except Terminated:
            raise ValueError("could not determine the shape of this object") from None
    with pytest.raises(ValueError, match="another"), signals_as_errors():
        raise ValueError("another")


@pytest.mark.parametrize("sent, error", [(signal.SIGTERM, Terminated), (signal.SIGINT, KeyboardInterrupt)])
def test_signals_held_back_come_later_and_never_to_processes_begun_meanwhile(sent, error):
    with pytest.raises(error), signals_as_errors():
        with held_back():
            child = os.fork()
            if not child:
                os.kill(os.getpid(), sent)
                os._exit(0)
            os.kill(os.getpid(), sent)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        raise AssertionError("it comes before this")


def test_they_are_held_back_where_another_thread_gets_them_too():
    with pytest.raises(Terminated), signals_as_errors():
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


def test_what_comes_after_a_schedulers_warning_does_not_kill_yet():
    with notice_signals() as told:
        for sent in (signal.SIGUSR1, signal.SIGUSR1, signal.SIGHUP, signal.SIGTERM):
            os.kill(os.getpid(), sent)
        assert told == [signal.SIGUSR1, signal.SIGUSR1, signal.SIGHUP, signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) is signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    assert ended_by(told[0]) == "terminated by SIGUSR1" and exit_code(told[0]) == 1


def test_what_is_ignored_from_the_start_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup has it
    try:
        with signals_as_errors(), notice_signals() as told:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not told
    finally:
        signal.signal(signal.SIGHUP, before)


# A store in which the main thread waits in C for what nobody writes: gloo and NCCL wait alike.
IN_C = """
import datetime, sys
from torch import distributed
from runtime.stop_signals import notice_signals, signals_as_errors
store = distributed.TCPStore("127.0.0.1", 0, 1, True, timeout=datetime.timedelta(minutes=10), wait_for_workers=False)
with signals_as_errors(), notice_signals():
    print("waits", flush=True)
    store.get("what nobody writes")
"""


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_second_one_kills_also_while_python_hears_nothing(sent, tmp_path):
    script = tmp_path / "waits.py"
    script.write_text(IN_C)
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, preexec_fn=listens,
                          env=os.environ | {"PYTHONPATH": str(ROOT)}) as process:  # fmt: skip
        assert process.stdout.readline() == "waits\n"
        time.sleep(0.2)
        process.send_signal(signal.SIGUSR1)
        for _ in range(2):
            assert process.poll() is None  # neither the first nor a scheduler's warning kills
            process.send_signal(sent)
            time.sleep(0.2)
        assert process.wait(60) == -sent


def listens():
    """Of a shell's job in the background, the first process ignores SIGINT."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.parametrize(
    "rank, sent, code, said",
    [
        (0, signal.SIGINT, 130, "interrupted; the same"),
        (1, signal.SIGTERM, 1, "terminated; the same"),
        (1, signal.SIGHUP, 1, "terminated by SIGHUP; the same"),
    ],
)
@pytest.mark.slow
def test_a_rank_that_waits_for_the_others_ends_within_seconds(rank, sent, code, said, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        if rank == 0:
            server.close()  # it listens there itself
        command = words("sample_trajectory.py", "--teacher", SHIPPED_TEACHER, "--num-trajectories", 9, "--out",
                        tmp_path / "store", "--device", "cpu")  # fmt: skip
        told = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=listens,
                              env=os.environ | told) as process:  # fmt: skip
            if rank == 1:
                connection = server.accept()[0]  # and never answer: it is in C now
            else:
                while True:
                    with contextlib.suppress(OSError):
                        connection = socket.create_connection(("127.0.0.1", port))
                        break
                    time.sleep(0.1)
            time.sleep(0.5)
            process.send_signal(sent)
            assert process.wait(60) == code
            error = process.stderr.read()
        connection.close()
    who = "error of rank 1: " if rank else "error: "
    assert f"sample_trajectory.py: {who}{said} command continues what it can\n" in error and "Traceback" not in error


@pytest.mark.parametrize("number, raised", [(signal.SIGINT, KeyboardInterrupt), (signal.SIGUSR1, Terminated)])
def test_what_python_passes_over_in_a_callback_is_raised_outside_of_it(number, raised, capsys):
    class Watched:
        pass

    before, watched = (sys.unraisablehook, signal.getsignal(number)), Watched()
    reference = weakref.ref(watched, lambda _: os.kill(os.getpid(), number))
    with pytest.raises(raised), handlers_as_before(), signals_as_errors():
        del watched
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            pass
    assert reference() is None and "ignored" not in capsys.readouterr().err
    assert (sys.unraisablehook, signal.getsignal(number)) == before
