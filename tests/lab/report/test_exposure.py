"""Errors per step: what a student whose answers are known gets."""

import numpy as np
import torch
from helpers import random_teacher

from lab.report.exposure import step_errors
from models_ard import ARD


def test_errors_are_those_of_predictions_and_the_first_step_is_the_same_either_way():
    student = ARD.from_teacher(random_teacher(std=0.2), 3, "M4", 2).eval()
    noise, y = torch.randn(5, *student.latent_shape), torch.arange(5)
    with torch.no_grad():
        own = student.sample(noise, y)
    # On its own trajectory it makes no error; one that is off by a constant has just that error, fed by itself.
    exact = step_errors(student, torch.cat([noise[:, None], own], dim=1), y)
    assert exact["own"].max() < 1e-9 and exact["teacher"].max() < 1e-4
    off = torch.tensor([0.1, 0.2, 0.4])
    moved = step_errors(student, torch.cat([noise[:, None], own + off[:, None, None, None]], dim=1), y)
    np.testing.assert_allclose(moved["own"], off, rtol=1e-4)
    np.testing.assert_allclose(moved["teacher"][0], off[0], rtol=1e-4)  # it has seen nothing but the noise
    assert abs(moved["teacher"][1] - off[1]) > 1e-3  # this step has seen the moved point


def test_one_trajectory_that_runs_away_does_not_decide():
    student = ARD.from_teacher(random_teacher(std=0.2), 3, "M4", 2).eval()
    trajectory, y = torch.randn(5, 4, *student.latent_shape), torch.arange(5)
    before = step_errors(student, trajectory, y)["own"]
    trajectory[0, 1:] += 100
    assert step_errors(student, trajectory, y)["own"].max() < 2 * before.max()
