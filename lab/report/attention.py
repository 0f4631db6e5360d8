"""How much a step attends to each point of its history (the paper's Fig. 4), measured in the student's own forward.

    B batch   S steps   L layers   h heads   T tokens of a point   d head width

What the queries read is linear in the values: weights times values. So each layer's own attention function is called
once more with values that say which point a token belongs to, one in the point's column and zero elsewhere, and what
comes out is the sum of the weights on each point. The weights are never computed here, by whichever kernel and mask
they are.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from discriminator import own_history
from models import AttentionFn
from models_ard import ARD


def shares_of_points(attend: AttentionFn, q: torch.Tensor, k: torch.Tensor, steps: int) -> torch.Tensor:
    """The part of its attention that each step pays to each point, mean over batch, heads and tokens: (S, S).

    q, k: (B * S, h, T, d) as ``attend`` takes them. Row s is the step that looks, and sums to one.
    """
    points = torch.arange(len(q), device=q.device) % steps
    owner = F.one_hot(points, steps).to(q.dtype)[:, None, None].expand(-1, *q.shape[1:3], -1)  # (B * S, h, T, S)
    return attend(q, k, owner).unflatten(0, (-1, steps)).double().mean(dim=(0, 2, 3))


@contextmanager
def watched_attention(student: ARD) -> Iterator[list[torch.Tensor]]:
    """A list that each layer's shares (S, S) are added to while ``student.forward`` runs within the block."""
    shares: list[torch.Tensor] = []

    def watched(attend: AttentionFn, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        shares.append(shares_of_points(attend, q, k, student.steps))
        return attend(q, k, v)

    def watch(module: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x, attend = inputs
        return x, partial(watched, attend)

    hooks = [block.attn.register_forward_pre_hook(watch) for block in student.blocks]  # type: ignore[union-attr]
    try:
        yield shares
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def attention_to_history(student: ARD, noise: torch.Tensor, y: torch.Tensor) -> np.ndarray:
    """Attention while sampling: noise (B, C, H, W), y (B,) -> (L, S, S), the share of each point by layer and step.

    The history is the student's own; all steps at once then see just what sampling sees one after another.
    """
    history = own_history(student, noise, y)
    with watched_attention(student) as shares:
        student(history, y)
    return torch.stack(shares).cpu().numpy()
