"""Ways of showing a student its own history: what each shows, and that plain ones are train_ARD.py's own steps."""

import json

import pytest
import torch
from helpers import SMALL, assert_equal, call, random_teacher, refused

from diffusion.teacher_ode import TeacherODE, grid_steps
from evaluations.rollout import mixed, noisy, own, plain, ramp, relabelled, stretch
from evaluations.rollout_trials import at, pieces, rows
from models_ard import ARD


@pytest.fixture(scope="module")
def scene():
    """A teacher's ODE, an untrained student of three steps, true trajectories and labels."""
    teacher = random_teacher(std=0.2).eval()
    ode = TeacherODE(teacher, solver_steps=10)
    y = torch.arange(8) % teacher.num_classes
    states, _ = ode(torch.randn(8, *teacher.latent_shape, generator=torch.Generator().manual_seed(0)), y)
    ends = grid_steps(3, teacher_steps=10)
    return ode, ARD.from_teacher(teacher, 3, "M4", 2).eval(), states, states[:, [0, *ends]], y, ends


def test_what_each_way_shows(scene):
    _, student, _, points, y, _ = scene
    true = points[:, :-1]
    assert torch.equal(plain(student, points, y, 0.5)[0], true)
    with torch.no_grad():
        drawn = torch.cat([points[:, :1], student.sample(points[:, 0], y)[:, :-1]], dim=1)
        passed = student(true, y)[:, :-1]
    shown = own(student, points, y, 0)[0]
    torch.testing.assert_close(shown, drawn, rtol=0, atol=1e-6)
    half = own(student, points, y, 0, share=0.5)[0]
    torch.testing.assert_close(half, torch.cat([drawn[:4], true[4:]]), rtol=0, atol=1e-5)
    assert torch.equal(ramp(student, points, y, 0.0)[0], true) and torch.equal(ramp(student, points, y, 1.0)[0], shown)
    shown = mixed(student, points, y, 0)[0]
    assert torch.equal(shown[:, 0], true[:, 0])
    is_true, is_made = ((shown[:, 1:] == wanted).flatten(2).all(2) for wanted in (true[:, 1:], passed))
    assert (is_true ^ is_made).all() and is_true.any() and is_made.any()
    errors = torch.tensor([0.1, 0.3])
    added = torch.stack([noisy(errors)(student, points, y, 0)[0] - true for _ in range(200)])
    torch.testing.assert_close(added.std(dim=(0, 1, 3, 4, 5)), torch.tensor([0.0, 0.1, 0.3]), rtol=0.02, atol=0)


def test_parts_of_the_solver_follow_each_other(scene):
    ode, _, states, _, y, _ = scene
    for begin, end in ((0, 3), (3, 7), (7, 10)):
        part = stretch(ode.diffusion, begin, end)
        found, _ = part.ddim_trajectory(ode.teacher, states[:, begin], y, *ode.guidance)
        torch.testing.assert_close(found, states[:, begin : end + 1], rtol=0, atol=1e-5)


def test_relabelled_targets_are_what_the_teacher_makes_of_the_students_points(scene):
    ode, student, _, points, y, ends = scene
    history, targets = relabelled(ode, ends, share=0.5)(student, points, y, 0)
    assert torch.equal(targets[4:], points[4:]) and torch.equal(history[4:], points[4:, :-1])
    assert torch.equal(targets[:, :2], points[:, :2])  # the first prediction is made from the true noise
    for k in (1, 2):
        states, _ = stretch(ode.diffusion, ends[k - 1], ends[k]).ddim_trajectory(
            ode.teacher, history[:4, k], y[:4], *ode.guidance
        )
        torch.testing.assert_close(targets[:4, k + 1], states[:, -1])
    assert (targets[:4, 2:] - points[:4, 2:]).abs().max() > 1e-2


def test_plain_steps_are_those_of_training(store, tmp_path):
    run = ("train_ARD.py", "--data-path", store, *SMALL, "--ckpt-every", 2, "--run-dir", tmp_path / "run")
    call(*run, "--iterations", 4)
    first, last = (tmp_path / f"run/checkpoints/{step:07d}.pt" for step in (2, 4))
    trial = ("evaluations.rollout", first, "--data-path", store, "--iterations", 2, "--num-samples", 64)
    call(*trial, "--way", "plain", "--every", 1, "--keep", "--out", tmp_path / "plain.json")
    ours, theirs = (torch.load(path, weights_only=True) for path in (tmp_path / "plain.pt", last))
    assert ours["step"] == theirs["step"] and ours["config"] == theirs["config"]
    for part in ("model", "opt", "ema"):
        assert_equal(dict(ours[part]), dict(theirs[part]))
    figures = json.loads((tmp_path / "plain.json").read_text())
    assert [step for step, _ in figures["curve"]] == [2, 3, 4] and figures["first"] == 2
    call(*trial, "--way", "own", "--out", tmp_path / "own.json")
    (end,) = json.loads((tmp_path / "own.json").read_text())["curve"]
    assert end[0] == 4 and end[1] != figures["curve"][-1][1]


def test_wrong_trials_are_refused(store, student_file, teacher_file, tmp_path, capsys):
    trial = (
        "evaluations.rollout",
        student_file,
        "--data-path",
        store,
        "--num-samples",
        64,
        "--out",
        tmp_path / "x.json",
    )
    assert "--way relabel" in refused(capsys, *trial, "--way", "relabel")  # the store's student predicts x_0
    other = tmp_path / "other"
    call("sample_trajectory.py", "--teacher", teacher_file, "--num-trajectories", 8, "--seed", 1, "--out", other)
    wrong = ("evaluations.rollout", student_file, "--data-path", other, *trial[4:])
    assert "not the trajectories of this run: seed is 1 there and 0 here" in refused(capsys, *wrong)
    call("stores.checkpoints", "slim", student_file, tmp_path / "slim.pt")
    slim = ("evaluations.rollout", tmp_path / "slim.pt", *trial[2:])
    assert "give a whole one of train_ARD.py" in refused(capsys, *slim)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "slim.pt"]


def test_a_way_is_compared_with_plain_training_of_the_same_steps_and_time(tmp_path):
    about = {"target": "x0", "steps": 4}
    trials = []
    for seed, fid in ((0, 2.0), (1, 2.4)):
        each = about | {"seed": seed}
        trials += [
            each | {"way": "plain", "first": 100, "ms_per_step": 10, "curve": [(100, 5.0), (200, 3.0)]},
            each | {"way": "plain", "first": 200, "ms_per_step": 10, "curve": [(200, 3.0), (300, 2.5)]},
            each | {"way": "own", "first": 50, "ms_per_step": 20, "curve": [(150, fid)]},
        ]
    (row,) = rows(trials)
    assert (row["cost"], row["same_steps"], row["same_time"]) == (2, 4.0, 2.75)
    assert row["fid"] == pytest.approx(2.2) and row["gain"] == "+0.55 ± 0.28" and row["seeds"] == 2
    with pytest.raises(ValueError, match="outside of the plain curve, 100 to 300"):
        at([(100, 1.0), (300, 2.0)], 301)


def test_every_trial_begins_where_the_study_or_another_ends(tmp_path):
    todo = pieces(tmp_path / "study", tmp_path, 2, 1, 64)
    made = {piece.makes.with_suffix(".pt") for piece in todo if "--keep" in piece.command}
    for piece in todo:
        (begin,) = piece.needs
        assert begin in made or begin.is_relative_to(tmp_path / "study")
    assert len({piece.makes for piece in todo}) == len(todo) == 2 * 10 + 11
