"""Command lines: one sentence for a mistake, its exit code, presets as defaults, plans that do nothing.

A small parser of its own serves: errors and their exit codes, argparse's words, presets, numbers, lack of memory.
Then the help of every script, files and folders that must exist, and real processes (slow).
"""

import contextlib
import errno
import importlib
import json
import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers import ROOT, arrays, call, spawn
from helpers import words as command_of

from runtime import cli
from runtime.cli import add_options, option, read_options


def parser() -> cli.Parser:
    made = cli.Parser(prog="tool")
    presets = {"fast": {"speed": 9}, "slow": {"speed": 1, "data": "snail"}}
    made.add_presets(presets, lambda options: {"cost": options["speed"]})
    made.add_argument("--data", type=cli.folder, required=True, help="Read this.")
    made.add_argument("--speed", type=cli.positive, default=5, help="Read so fast.")
    made.add_argument("--other-name", "--other_name", type=cli.positive, help="Something.")
    cli.add_dry_run_option(made)
    return made


def end_of(work, capsys, *words) -> tuple[int, str]:
    """Exit code and last words of the tool with these arguments; its ``work`` is an error, or a function of them."""

    def run(args):
        if isinstance(work, BaseException):
            raise work
        work(args)

    with pytest.raises(SystemExit) as stop:
        cli.main(parser(), run, list(words or ("--data", "x")))
    out, said = capsys.readouterr()
    assert out == "" and said.count("\n") == 1
    return stop.value.code, said


@pytest.mark.parametrize("error, code", [(cli.UserError("--data x: no"), 2), (cli.RunError("it went wrong"), 1)])
def test_an_error_is_one_sentence_and_its_kind_is_the_exit_code(error, code, capsys):
    assert end_of(error, capsys) == (code, f"tool: error: {error}\n")


def test_the_sentence_of_a_data_worker_comes_without_its_traceback(capsys):
    text = "Caught UserError in worker 0.\n  File x, line 3\nruntime.errors.UserError: --data x: no"
    assert end_of(cli.UserError(text), capsys) == (2, "tool: error: --data x: no\n")


@pytest.mark.parametrize("rank, said", [("0", "error: --data x: no\n"), ("1", "error of rank 1: --data x: no\n")])
def test_of_several_ranks_the_main_one_speaks_first_and_tells_torchrun(rank, said, monkeypatch, capsys, tmp_path):
    told = {"WORLD_SIZE": "2", "RANK": rank, "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for name, value in (told | {"TORCHELASTIC_ERROR_FILE": str(tmp_path / "error.json")}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cli, "RANKS_PAUSE", 0.01)
    assert end_of(cli.UserError("--data x: no"), capsys) == (2, f"tool: {said}")
    report = json.loads((tmp_path / "error.json").read_text())
    assert report["message"]["extraInfo"]["py_callstack"] + "\n" == f"tool: {said}"


@pytest.mark.slow
def test_under_torchrun_a_mistake_is_said_once_and_is_the_root_cause_of_the_report(tmp_path):
    done = spawn("train_ARD.py", "--data-path", tmp_path / "none", ranks=2)
    sentence = f"train_ARD.py: error: --data-path {tmp_path}/none: no such folder"
    lines = done.stderr.splitlines()
    assert done.returncode == 1 and lines.count(sentence) == 1 and "of rank 1" not in done.stderr
    assert f"traceback : {sentence}" in lines[-2] and lines[-1].startswith("====")


def test_a_name_of_several_lines_is_told_in_one(capsys):
    error = cli.UserError("--data a\nb: no such file")
    assert end_of(error, capsys) == (2, "tool: error: --data a\\nb: no such file\n")


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
    found, said = end_of(error, capsys)
    assert found == code and said.startswith(f"tool: error: {text}")


def test_other_errors_of_files_are_bugs_and_keep_their_traceback():
    with pytest.raises(FileNotFoundError):
        cli.main(parser(), lambda args: Path("/nowhere/at/all").read_text(), ["--data", "x"])


def test_sigterm_is_one_sentence_and_what_stood_for_it_comes_back(capsys):
    before = signal.getsignal(signal.SIGTERM)

    def work(args):
        with contextlib.suppress(Exception):  # who reads a file takes any error for damage
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)

    sentence = "tool: error: terminated; the same command continues what it can\n"
    assert end_of(work, capsys) == (1, sentence)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    "words, message",
    [
        (["--speed", "1"], "the following arguments are required: --data"),
        (["--data", "x", "--speed", "0"], "argument --speed: 0 must be at least 1"),
        (["--data", "x", "--speed", "fast"], "argument --speed: 'fast' must be a number"),
        (["--data", "x", "--speed", "1.5"], "argument --speed: 1.5 must be a whole number"),
        (["--data", "x", "--speed", "1e99"], "argument --speed: 1e99 must be at most"),
        (["--data", "x", "--speed", "inf"], "argument --speed: inf must be a finite number"),
        (["--data", ""], "argument --data: must not be empty"),
        (["--data", "x", "--preset"], "argument --preset: expected one argument"),
        (["--data", "x", "--other-name", "0"], "argument --other-name: 0 must be at least 1"),
        (["--data", "x", "--other_name=0"], "argument --other_name: 0 must be at least 1"),
        (["--data", "x", "--preset", "medium"], "argument --preset: invalid choice: 'medium'"),
        (["--dat", "x"], "--data"),  # no abbreviations
        (["--data", "x", "--dry-run=1"], "argument --dry-run: ignored explicit argument '1'"),
        (["--data", "x", "a\nb"], r"unrecognized arguments: a\nb"),
    ],
)
def test_argparses_own_errors_are_one_line_too(words, message, capsys):
    code, said = end_of(lambda args: None, capsys, *words)
    assert code == 2 and message in said


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


@pytest.mark.parametrize("text, value", [("9", 9), ("1e5", 100_000), ("2.5e6", 2_500_000), ("1_000", 1000), ("3.0", 3)])
def test_a_whole_number_may_be_written_as_it_is_said(text, value):
    found = cli.positive(text)
    assert found == value and isinstance(found, int)


@pytest.mark.parametrize(
    "words, said",
    [
        (["--speed", "5"], "--speed 5: too fast for --data x"),
        (["--speed=5"], "--speed 5: too fast for --data x"),
        ([], "--speed 5 (the default): too fast for --data x"),
        (["--preset", "fast"], "--speed 9 (of --preset fast): too fast for --data x"),
    ],
)
def test_a_message_says_what_nobody_typed(words, said, capsys):
    def work(args):
        raise cli.UserError(f"--speed {args.speed}: too fast for --data {args.data}")

    assert end_of(work, capsys, "--data", "x", *words) == (2, f"tool: error: {said}\n")


def test_what_is_not_fetched_is_planned_without_by_a_dry_run_only(capsys):
    def work(args):
        raise cli.AbsentError("--data x: not here")

    cli.main(parser(), work, ["--data", "x", "--dry-run"])
    assert json.loads(capsys.readouterr().out)["not_checked"] == "--data x: not here"
    assert end_of(work, capsys)[0] == 2


@pytest.mark.parametrize(
    "error", [MemoryError(), MemoryError("Unable to allocate 1 TiB"), RuntimeError("CUDA out of memory. Tried")]
)
def test_a_lack_of_memory_is_one_sentence(error, capsys):
    code, said = end_of(error, capsys)
    assert code == 1 and said.startswith("tool: error: out of memory; give smaller")


def test_the_help_says_what_an_option_takes_what_is_required_and_how_it_is_used(capsys):
    usage = "A tool.\n\n    python tool.py --data x\n    torchrun tool.py \\\n        --data y\n"
    made = cli.Parser(usage, prog="tool")
    made.add_argument("--data", type=cli.folder, required=True, help="Read this.")
    made.add_argument("--out", type=cli.file, help="Write this.")
    made.add_argument("--speed", type=cli.positive, default=5, help="Read so fast.")
    text = made.format_help()
    assert "--data FOLDER  Read this. (required)" in text and "--out FILE     Write this.\n" in text
    assert "--speed N      Read so fast. (default: 5)" in text
    assert text.endswith("examples:\n  python tool.py --data x\n  torchrun tool.py \\\n        --data y\n")


PARSERS = ("train", "train_ARD", "train_ARD_gan", "sample", "sample_ARD", "sample_trajectory", "encode_latents", "demo",
           "encode_captions", "evaluations.evaluator", "costs.flops", "costs.stages", "evaluations.coco",
           "lab.text_demo")  # fmt: skip


@pytest.mark.parametrize("script", PARSERS)
def test_the_help_of_every_script_can_be_read(script):
    parser = importlib.import_module(script).build_parser()
    text = parser.format_help()
    assert "(default: None)" not in text and "(default: False)" not in text and "\nexamples:\n  " in text
    for action in parser._actions:
        assert action.help, action
        if action.option_strings and action.nargs != 0 and action.choices is None and action.metavar is None:
            assert f"{action.option_strings[0]} {action.dest.upper()}" not in text, action.dest  # argparse's own word
        assert not action.option_strings or action.type is not int and action.type is not str, action.dest
    assert text.count("(required)") == sum(bool(a.option_strings) and a.required for a in parser._actions)


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
        (cli.existing_file, "empty", "is a folder, give a file"),
        (cli.existing_folder, "none", "no such folder"),
        (cli.existing_folder, "file", "is a file, give a folder"),
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


#################################################################################
#                       Groups of options as dataclasses                        #
#################################################################################


@dataclass(frozen=True)
class Speed:
    """How fast."""

    steps_per_log: int = option(100, "Steps between log lines.", cli.positive)
    rate: float | None = option(None, "Rate of it.", cli.positive_number)
    warm: bool = option(False, "Begin slowly.")
    loud: bool = option(False, "Say so.", action="store_true")
    unit: str = option("s", "Count in this.", choices=("s", "ms"))


def parsed(*words: str, **defaults) -> Speed:
    parser = cli.Parser()
    parser.add_argument("--other", default=1)
    add_options(parser, Speed, **defaults)
    return read_options(Speed, vars(parser.parse_args(list(words))))


def test_fields_are_options_and_come_back_with_their_types_and_defaults():
    assert parsed() == Speed() == Speed(100, None, False, False, "s")
    given = parsed("--steps-per-log", "1e3", "--rate=0.5", "--warm", "--loud", "--unit", "ms")
    assert given == Speed(1000, 0.5, True, True, "ms")
    assert parsed(steps_per_log=7, warm=True) == Speed(7, warm=True)
    assert not parsed("--no-warm", warm=True).warm


@pytest.mark.parametrize("words", [("--steps-per-log", "0"), ("--unit", "h"), ("--no-loud",)])
def test_what_a_field_does_not_take_is_refused(words, capsys):
    with pytest.raises(SystemExit) as stop:
        parsed(*words)
    assert stop.value.code == 2 and words[0] in capsys.readouterr().err
