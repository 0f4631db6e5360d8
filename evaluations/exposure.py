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
    """Root mean squared error of each point, in the units of latents: trajectory (B, S+1, C, H, W), y (B,) -> (S,).

    "teacher": the student sees the teacher's points; "own": it samples, from the trajectory's noise.
    """
    predictions = {"teacher": student(trajectory[:, :-1], y), "own": student.sample(trajectory[:, 0], y)}
    return {
        name: (found - trajectory[:, 1:]).double().square().mean(dim=(0, 2, 3, 4)).sqrt().cpu().numpy()
        for name, found in predictions.items()
    }
