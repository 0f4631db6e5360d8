"""Exposure bias made visible: the error of each predicted point, when fed the teacher's points and when fed its own.

The first error is what a step lacks even with a perfect past: capacity, training, and what its input does not tell.
The second minus the first is what earlier errors do to it. The first step has only the noise: both are equal there.
"""

import numpy as np
import torch

from models_ard import ARD

FED = ("teacher", "own")


@torch.no_grad()
def step_errors(student: ARD, trajectory: torch.Tensor, y: torch.Tensor) -> dict[str, np.ndarray]:
    """Error of each point, in the units of latents: trajectory (B, S+1, C, H, W), y (B,) -> (S,).

    It is the median over trajectories of the root mean squared error: with guidance a few trajectories of a teacher run
    away (one of 256 of the digits' teacher, to 48 where others end at 1), and a mean would show nothing but these.
    "teacher": the student sees the teacher's points; "own": it samples, from the trajectory's noise.
    """
    predictions = {"teacher": student(trajectory[:, :-1], y), "own": student.sample(trajectory[:, 0], y)}
    return {
        name: np.median((found - trajectory[:, 1:]).double().square().mean(dim=(2, 3, 4)).sqrt().cpu().numpy(), axis=0)
        for name, found in predictions.items()
    }
