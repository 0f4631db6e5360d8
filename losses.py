"""The loss of ARD, regression on the teacher's trajectory (Eq. 6); that of R+D stands in discriminator.py.

A loss has one value per sample, (B,), so that a mean over any split of a batch, over ranks or micro-batches, is right.
"""

import torch


def regression_losses(predictions: torch.Tensor, trajectory: torch.Tensor) -> torch.Tensor:
    """Eq. 6, mean over steps: predictions (B, S, C, H, W) of all points but the first of (B, S+1, C, H, W) -> (B,)."""
    return (predictions.float() - trajectory[:, 1:]).square().flatten(1).mean(1)
