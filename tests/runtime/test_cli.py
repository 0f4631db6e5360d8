"""Command lines: one sentence for a mistake, its exit code, presets as defaults, plans that do nothing."""

import errno
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from helpers import ROOT, arrays, call, spawn
from helpers import words as command_of

from runtime import cli


def parser() -> cli.Parser:
    made = cli.Parser(prog="tool")
    made.add_presets({"fast": {"speed": 9}, "slow": {"speed": 1, "data": "snail"}}, lambda args: {"cost": args.speed})
    made.add_argument("--data", required=True)
    made.add_argument("--speed", type=cli.positive, default=5)
    cli.add_dry_run_option(made)
    return made


@pytest.mark.parametrize("error, code", [(cli.UserError("--data x: no"), 2), (cli.RunError("it went wrong"), 1)])
def test_an_error_is_one_sentence_and_its_kind_is_the_exit_code(error, code, capsys):
    def run(args):
        raise error

    with pytest.raises(SystemExit) as stop:
        cli.main(parser(), run, ["--data", "x"])
    assert stop.value.code == code and capsys.readouterr() == ("", f"tool: error: {error}\n")


def test_the_sentence_of_a_data_worker_comes_without_its_traceback(capsys):
    def run(args):
        raise cli.UserError("Caught UserError in worker 0.\n  File x, line 3\nruntime.cli.UserError: --data x: no")

    with pytest.raises(SystemExit):
        cli.main(parser(), run, ["--data", "x"])
    assert capsys.readouterr().err == "tool: error: --data x: no\n"


def test_other_errors_are_bugs_and_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        cli.main(parser(), lambda args: 1 / 0, ["--data", "x"])


@pytest.mark.parametrize(
    "error, code, text",
    [
        (KeyboardInterrupt(), 130, "interrupted; the same command continues"),
        (OSError(errno.ENOSPC, "No space left on device", "a/b.pt"), 1, "No space left on device (a/b.pt); make room"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 1, "Disk quota exceeded; make room"),
    ],
    ids=["keyboard", "disk", "quota"],
)
def test_an_interrupt_or_a_full_disk_is_one_sentence(error, code, text, capsys):
    def run(args):
        raise error

    with pytest.raises(SystemExit) as stop:
        cli.main(parser(), run, ["--data", "x"])
    out, said = capsys.readouterr()
    assert stop.value.code == code and out == ""
    assert said.count("\n") == 1 and said.startswith(f"tool: error: {text}")


def test_other_errors_of_files_are_bugs_and_keep_their_traceback():
    with pytest.raises(FileNotFoundError):
        cli.main(parser(), lambda args: Path("/nowhere/at/all").read_text(), ["--data", "x"])


def test_sigterm_is_one_sentence_and_what_stood_for_it_comes_back(capsys):
    before = signal.getsignal(signal.SIGTERM)

    def run(args):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    with pytest.raises(SystemExit) as stop:
        cli.main(parser(), run, ["--data", "x"])
    said = capsys.readouterr().err
    assert stop.value.code == 1 and said == "tool: error: terminated; the same command continues what it can\n"
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "the following arguments are required: --data"),
        (["--data", "x", "--speed", "0"], "argument --speed: 0 must be at least 1"),
        (["--data", "x", "--speed", "fast"], "invalid positive value: 'fast'"),
        (["--data", "x", "--preset", "medium"], "argument --preset: invalid choice: 'medium'"),
        (["--dat", "x"], "--data"),  # no abbreviations
    ],
)
def test_argparses_own_errors_are_one_line_too(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(parser(), lambda args: None, words)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "words, speed, data",
    [
        (["--data", "x"], 5, "x"),
        (["--data", "x", "--preset", "fast"], 9, "x"),
        (["--preset", "fast", "--data", "x", "--speed", "2"], 2, "x"),
        (["--preset", "slow"], 1, "snail"),
    ],
)
def test_a_preset_replaces_defaults_and_the_command_line_replaces_both(words, speed, data):
    args = parser().parse_args(words)
    assert (args.speed, args.data) == (speed, data)
    assert cli.chosen(args, ("data", "speed")) == {"data": data, "speed": speed}


def test_a_preset_is_shown_with_its_cost_where_data_are_missing(capsys):
    def run(args):
        cli.existing_folder("--data", args.data)

    cli.main(parser(), run, ["--preset", "fast", "--dry-run"])
    plan = json.loads(capsys.readouterr().out)
    assert plan["cost"] == 9 and plan["options"]["speed"] == 9 and "no such folder" in plan["not_checked"]


def test_files_and_folders_must_be_there(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    assert cli.existing_file("--a", tmp_path / "file") == tmp_path / "file"
    assert cli.existing_folder("--a", str(tmp_path)) == tmp_path
    for check, name, words in (
        (cli.existing_file, "none", "no such file"),
        (cli.existing_file, "empty", "no such file"),
        (cli.existing_folder, "file", "no such folder"),
        (cli.existing_folder, "empty", "the folder is empty"),
    ):
        with pytest.raises(cli.UserError, match=f"^--a {tmp_path / name}: {words}$"):
            check("--a", tmp_path / name)


@pytest.mark.slow
def test_there_is_no_traceback_in_a_real_process(store):
    done = spawn("train_ARD.py", "--data-path", store, "--stack", 99)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--stack 99" in done.stderr


@pytest.mark.slow
def test_a_sampler_that_is_terminated_says_so_and_the_same_command_ends_it(teacher_file, tmp_path):
    common = ("--teacher", teacher_file, "--num-samples", 1500, "--per-proc-batch-size", 20, "--out")
    command = command_of("sample.py", *common, tmp_path / "s.npz")
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    unfinished, deadline = tmp_path / "s.partial", time.monotonic() + 120
    while time.monotonic() < deadline:
        if list(unfinished.glob("*-*.npz")):
            break
        time.sleep(0.01)
    process.terminate()
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 1 and "Traceback" not in error
    assert error.strip().splitlines()[-1].endswith("error: terminated; the same command continues what it can")
    assert 0 < len(list(unfinished.glob("*-*.npz"))) < 75 and not (tmp_path / "s.npz").exists()
    call("sample.py", *common, tmp_path / "s.npz")
    call("sample.py", *common, tmp_path / "whole.npz")
    ended, whole = arrays(tmp_path / "s.npz"), arrays(tmp_path / "whole.npz")
    assert ended.keys() == whole.keys() and all((ended[name] == whole[name]).all() for name in whole)
    assert not unfinished.exists()
