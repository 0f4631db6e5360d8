"""Command lines: one sentence for a mistake, its exit code, presets as defaults, plans that do nothing."""

import json

import pytest
from helpers import spawn

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
