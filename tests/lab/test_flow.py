"""The comparison of processes: its commands are ones that our scripts take, its table is made of their figures."""

import importlib
import json
from pathlib import Path

from helpers import call, refused

from lab.flow import METHODS, PROCESSES, SOLVER_STEPS, plan, rows_of, students, teacher_samples

SIZES = {"teacher_iterations": 12, "iterations": 8, "num_trajectories": 80, "num_samples": 70}
OPTIONS = [part for name, value in SIZES.items() for part in (f"--{name.replace('_', '-')}", value)]


def test_every_piece_finds_what_it_needs_among_those_before_it_and_no_file_is_made_twice(tmp_path):
    made: set[Path] = set()
    for piece in plan(tmp_path, 2, **SIZES):
        assert piece.needs <= made and piece.makes not in made, piece
        made.add(piece.makes)
    judged = {path for path in made if path.suffix == ".json" and path.name != "manifest.json"}
    assert len(judged) == len(PROCESSES) * len(SOLVER_STEPS) + 2 * sum(map(len, METHODS.values()))


def test_our_scripts_take_every_command_and_teachers_differ_in_the_process_alone(tmp_path):
    parsers, teachers = {}, []
    for piece in plan(tmp_path, 1, **SIZES):
        name = piece.text[0].removesuffix(".py")
        if name not in parsers:
            parsers[name] = importlib.import_module(name).build_parser()
        args = parsers[name].parse_args(piece.text[1:])
        if name in ("train", "train_ARD"):  # what a piece waits for is what its command makes
            assert piece.makes == Path(args.run_dir) / "checkpoints" / f"{args.iterations:07d}.pt"
        elif hasattr(args, "out") and name != "sample_trajectory":
            assert Path(args.out) == piece.makes
        if name == "train":
            teachers.append(vars(args))
    differing = {key for key in teachers[0] if teachers[0][key] != teachers[1][key]}
    assert differing == {"process", "run_dir"}


def test_the_table_has_each_teacher_and_the_mean_of_each_method(tmp_path):
    wanted = {}
    for process in PROCESSES:
        for n in SOLVER_STEPS:
            wanted[teacher_samples(tmp_path, process, n)] = 100 / n
        for seed in (0, 1):
            for student in students(tmp_path, process, seed, 8):
                wanted[student.samples] = seed + len(student.mask + process)
    for samples, fid in wanted.items():
        samples.parent.mkdir(parents=True, exist_ok=True)
        samples.with_suffix(".json").write_text(json.dumps({"fid": fid}))
    rows = rows_of(tmp_path, 2, 8)
    assert [(row["process"], row["model"], row["fid"]) for row in rows[:5]] == [
        *(("ddpm", "teacher", fid) for fid in (25, 12.5, 4)),
        ("ddpm", "step distillation", "6.50 ± 0.71"),
        ("ddpm", "ARD", "6.50 ± 0.71"),
    ]
    assert [row["process"] for row in rows] == ["ddpm"] * 5 + ["sit"] * 8 and rows[8]["seeds"] == [5, 6]
    assert [(row["target"], row["parametrization"]) for row in rows[8:]] == [shape[2:] for shape in METHODS["sit"]]


def test_a_folder_of_other_sizes_is_refused_and_a_plan_writes_nothing(tmp_path, capsys):
    call("lab.flow", "--out", tmp_path / "out", *OPTIONS, "--dry-run")
    told = json.loads(capsys.readouterr().out)
    assert told["pieces"] == told["left"] == 84 and not (tmp_path / "out").exists()
    made, given = plan(tmp_path / "out", 1, **SIZES | {"num_samples": 90})[3].noted(tmp_path / "out")
    (tmp_path / "out/ddpm").mkdir(parents=True)
    (tmp_path / "out/ddpm/teacher-4.npz").touch()
    (tmp_path / "out/commands.json").write_text(json.dumps({made: given}))
    said = refused(capsys, "lab.flow", "--out", tmp_path / "out", *OPTIONS)
    assert "ddpm/teacher-4.npz was made otherwise, --num-samples 90 there and --num-samples 70 here" in said
