"""The study: its commands are ones that our scripts take, and a killed one continues."""

import importlib
import json
import time
from pathlib import Path

import pytest
from helpers import call, refused, spawn, start, state_of

from lab.study import plan, students
from lab.worlds import DIGITS, EMOJI, WORLDS

SIZES = {"iterations": 12, "gan_iterations": 2, "num_samples": 70, "curve_samples": 70, "num_trajectories": 80}
OPTIONS = [part for name, value in SIZES.items() for part in (f"--{name.replace('_', '-')}", value)]


def test_every_piece_finds_what_it_needs_among_those_before_it_and_no_file_is_made_twice(tmp_path):
    made: set[Path] = set()
    for piece in plan(DIGITS, tmp_path, 2, [], **SIZES):
        # A checkpoint of a curve is made on the way to the last one, which is a piece.
        missing = {need for need in piece.needs if not any(need.parent == path.parent for path in made)} - made
        assert not missing and piece.makes not in made, piece
        assert piece.seconds > 0
        made.add(piece.makes)
    assert len({path for path in made if path.suffix == ".json" and path.parent.name == "seed1"}) == 23


def test_emoji_repeat_kd_and_four_steps_with_other_seeds(tmp_path):
    runs = [
        piece.makes.parts[-4:-2] for piece in plan(EMOJI, tmp_path, 3, [], **SIZES) if "train_ARD.py" in piece.words
    ]
    by_seed = [sorted(name for seed, name in runs if seed == f"seed{i}") for i in range(3)]
    assert len(by_seed[0]) == 20 and by_seed[1] == by_seed[2]
    four = ["s4-m1-n0-x0", "s4-m1-n0-xt", "s4-m4-n2-x0", "s4-m4-n2-xt"]
    assert by_seed[1] == ["s1-m1-n0-x0", *four]


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
def test_our_scripts_take_every_command(world, tmp_path):
    parsers = {}
    for piece in plan(world, tmp_path, 1, [], **SIZES):
        name = piece.text[0].removesuffix(".py")
        if name not in parsers:
            parsers[name] = importlib.import_module(name).build_parser()
        args = parsers[name].parse_args(piece.text[1:])
        if name == "train_ARD":  # what a piece waits for is what its command makes
            assert piece.makes == Path(args.run_dir) / "checkpoints" / f"{args.iterations:07d}.pt"
        elif hasattr(args, "out") and name != "sample_trajectory":
            assert Path(args.out) == piece.makes


def test_the_rows_have_the_structure_of_the_papers_table():
    found = {(s.steps, s.mask, s.stack, s.target) for s in students(DIGITS, Path(), 1)}
    assert (1, "M1", 0, "x0") in found and (1, "M1", 0, "xt") not in found and len(found) == 20
    for target in ("x0", "xt"):
        assert {(2, "M1", 0, target), (2, "M4", 2, target), (2, "M4", 6, target)} < found
        assert {(4, mask, 0 if mask == "M1" else 2, target) for mask in ("M1", "M2", "M3", "M4")} < found
    assert {layers for steps, mask, layers, target in found if (steps, mask, target) == (4, "M4", "x0")} == {
        1,
        2,
        3,
        4,
        6,
    }


def test_the_plan_can_be_seen_and_other_sizes_are_refused(tmp_path, capsys):
    call("lab.study", "--out", tmp_path / "study", *OPTIONS, "--dry-run")
    shown = json.loads(capsys.readouterr().out)
    assert shown["pieces"] == shown["left"] > 400 and shown["minutes_estimated"] > 10 and not list(tmp_path.iterdir())
    made, given = plan(DIGITS, tmp_path, 1, [], **SIZES | {"num_trajectories": 90})[2].noted(tmp_path)
    (tmp_path / "seed0/trajectories").mkdir(parents=True)
    (tmp_path / "seed0/trajectories/manifest.json").touch()
    (tmp_path / "commands.json").write_text(json.dumps({made: given}))
    error = refused(capsys, "lab.study", "--out", tmp_path, *OPTIONS)
    assert "was made otherwise, --num-trajectories 90 there and --num-trajectories 80 here" in error
    error = refused(capsys, "lab.study", "--out", tmp_path / "x", "--curve-samples", 10)
    assert "--curve-samples 10" in error


@pytest.mark.slow
def test_a_killed_study_continues_and_ends_in_a_report(tmp_path):
    command = ("lab.study", "--out", tmp_path, "--seeds", 1, "--only", "s1*", *OPTIONS)
    process = start(*command)
    while not (tmp_path / "seed0/teacher.npz").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    process.wait()
    before = {path: state for path, state in state_of(tmp_path).items() if path.suffix in (".npz", ".safetensors")}
    assert len(before) >= 3
    done = spawn(*command)
    assert done.returncode == 0, done.stderr
    after = state_of(tmp_path)
    assert {path: after[path] for path in before} == before
    rows = json.loads((tmp_path / "report/table.json").read_text())
    assert [(row["model"], row["steps"]) for row in rows] == [("teacher", 25), ("KD", 1)]
    assert rows[1]["paper"]["name"] == "kd" and rows[1]["ms_per_sample"] > 0
