"""Attention to history: against weights that are computed independently, one softmax under a dense mask."""

import pytest
import torch
from helpers import random_teacher

from discriminator import own_history
from lab.report.attention import attention_to_history, watched_attention
from models_ard import ARD, MASKS, visible_steps

STEPS = 4


def sharp_student(mask: str, layers: int) -> ARD:
    """A student whose attention is far from even."""
    student = ARD.from_teacher(random_teacher(std=0.2), STEPS, mask, layers).eval()
    for head in student.heads:
        torch.nn.init.normal_(head.linear.weight, std=0.1)
    return student


def dense_shares(student: ARD, layer: int, history: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """(S, S) by the layer's queries and keys as one long sequence, a boolean mask and a softmax."""
    caught = []
    hook = student.blocks[layer].attn.qkv.register_forward_hook(lambda module, args, out: caught.append(out))
    student(history, y)
    hook.remove()
    heads, T = student.blocks[layer].attn.num_heads, caught[0].shape[1]
    qkv = caught[0].unflatten(0, (-1, STEPS)).unflatten(-1, (3, heads, -1))  # (B, S, T, 3, h, d)
    q, k = (qkv[:, :, :, i].flatten(1, 2).transpose(1, 2) for i in (0, 1))  # (B, h, S * T, d)
    seen = torch.zeros(STEPS, STEPS, dtype=torch.bool)
    for step in range(STEPS):
        seen[step, visible_steps(student.mask, step) if layer < student.history_layers else [step]] = True
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    dense = seen.repeat_interleave(T, 0).repeat_interleave(T, 1)
    weights = scores.masked_fill(~dense, float("-inf")).softmax(-1).double()  # (B, h, S * T, S * T)
    return weights.unflatten(-1, (STEPS, T)).sum(-1).unflatten(2, (STEPS, T)).mean(dim=(0, 1, 3))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("layers", [0, 2, 3])
def test_shares_are_those_of_a_dense_softmax_and_sum_to_one(mask, layers):
    student = sharp_student(mask, layers)
    noise, y = torch.randn(3, *student.latent_shape), torch.arange(3)
    with torch.no_grad():
        found = torch.from_numpy(attention_to_history(student, noise, y))
        history = own_history(student, noise, y)
        wanted = torch.stack([dense_shares(student, layer, history, y) for layer in range(len(student.blocks))])
    assert found.shape == (3, STEPS, STEPS)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.sum(-1), torch.ones(3, STEPS).double(), rtol=1e-6, atol=1e-6)
    if layers and mask != "M1":  # the case says something: attention is not even
        even = torch.stack([torch.tensor([len(visible_steps(mask, k))] * STEPS) for k in range(STEPS)]).reciprocal()
        assert ((found[0] - even)[found[0] > 0]).abs().max() > 0.02


def test_watching_changes_nothing_and_ends_with_the_block():
    student = sharp_student("M4", 2)
    history, y = torch.randn(2, STEPS, *student.latent_shape), torch.arange(2)
    with torch.no_grad():
        before = student(history, y)
        with watched_attention(student) as shares:
            assert torch.equal(student(history, y), before)
        student(history, y)
    assert len(shares) == len(student.blocks)
