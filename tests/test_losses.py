"""The losses of R+D: values, the student's gradient, what the student is judged by, who learns and who does not."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import random_teacher

from discriminator import (
    AdversarialLosses,
    Discriminator,
    FrozenFeatures,
    adaptive_weight,
    generator_losses,
    hinge_losses,
    own_history,
)
from losses import regression_losses
from models_ard import ARD


def test_regression_is_the_mean_over_steps_and_pixels_of_each_sample():
    trajectory = torch.randn(3, 5, 2, 4, 4)
    predictions = trajectory[:, 1:].clone()
    assert regression_losses(predictions, trajectory).tolist() == [0, 0, 0]
    predictions[1, 2, 0] += 3.0  # one channel of one step of four, off by three
    torch.testing.assert_close(regression_losses(predictions, trajectory), torch.tensor([0, 9 / (4 * 2), 0]))
    assert regression_losses(predictions.bfloat16(), trajectory).dtype == torch.float32


def test_adversarial_losses_are_the_hinge_and_the_weight_is_clamped():
    fake, real = torch.tensor([[[-3.0, 0.5]]]), torch.tensor([[[2.0, 0.0]]])
    assert hinge_losses(fake, real).tolist() == [0.75 + 0.5] and generator_losses(fake).tolist() == [1.25]
    norms = torch.tensor([[2.0, 1.0], [1e9, 0.0], [0.0, 1.0]])
    torch.testing.assert_close(adaptive_weight(*norms.T), torch.tensor([2 / (1 + 1e-4), 1e4, 0.0]))


def make_losses(rollout: bool = False, seed: int = 0):
    """A student that has moved away from its teacher, heads, and a batch of 4."""
    teacher = random_teacher()
    student = ARD.from_teacher(teacher, steps=3, history_layers=2).eval()
    torch.manual_seed(seed)
    for parameter in student.heads.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    heads = Discriminator(len(teacher.blocks), 32, group=2)
    batch = {"trajectory": torch.randn(4, 4, 1, 8, 8), "y": torch.arange(4), "real": torch.randn(4, 1, 8, 8)}
    batch["real_y"] = torch.arange(4, 8)
    if rollout:
        batch["rollout"] = own_history(student, batch["trajectory"][:, 0], batch["y"])
    losses = AdversarialLosses(student, heads, FrozenFeatures(teacher), samples=4)
    return losses, teacher, student, heads, batch


@pytest.mark.parametrize("rollout", [False, True])
def test_the_students_gradient_is_that_of_both_losses_walked_back_apart(rollout):
    losses, teacher, student, heads, batch = make_losses(rollout)
    state = copy.deepcopy(heads.state_dict())
    out, fake = losses.student_losses(batch, gan_weight=10.0)
    out["loss"].mean().backward()
    found = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()

    predictions = student(batch["trajectory"][:, :-1], batch["y"])
    regression = F.mse_loss(predictions, batch["trajectory"][:, 1:])
    last = student(batch["rollout"], batch["y"])[:, -1] if rollout else predictions[:, -1]
    adversarial = -heads.eval()(FrozenFeatures(teacher)(last, batch["y"]))[0].mean()
    grads = [torch.autograd.grad(loss, list(student.parameters())[1:], retain_graph=True, allow_unused=True)
             for loss in (regression, adversarial)]  # [0] is the fixed table of positions  # fmt: skip
    names = [name for name, _ in student.named_parameters()][1:]
    at = names.index(f"heads.{student.steps - 1}.linear.weight")
    weight = 10 * grads[0][at].norm() / (grads[1][at].norm() + 1e-4)
    for name, r, d in zip(names, *grads):
        wanted = (0 if r is None else r) + weight * (0 if d is None else d)
        torch.testing.assert_close(found[name], wanted, rtol=1e-4, atol=1e-5, msg=name)
    torch.testing.assert_close(out["loss"].mean(), regression + weight * adversarial, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out["gan_weight"][0], weight, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fake, last)
    assert all(torch.equal(value, state[name]) for name, value in heads.state_dict().items())  # no power iteration


def test_rollout_judges_what_sampling_would_draw():
    losses, _, student, _, batch = make_losses(rollout=True)
    _, fake = losses.student_losses(batch, gan_weight=1.0)
    sample = student.sample(batch["trajectory"][:, 0], batch["y"])[:, -1]
    torch.testing.assert_close(fake, sample, rtol=1e-4, atol=1e-5)


def test_training_moves_student_and_heads_and_leaves_the_teacher_alone():
    losses, teacher, student, heads, batch = make_losses()
    before = {model: copy.deepcopy(model.state_dict()) for model in (teacher, student, heads)}
    optimizers = [torch.optim.AdamW(module.parameters(), lr=1e-2) for module in (student, heads)]
    for _ in range(3):
        out, fake = losses.student_losses(batch, gan_weight=10.0)
        out["loss"].mean().backward()
        losses.discriminator_losses(batch | {"fake": fake})["loss"].mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert all(torch.equal(value, before[teacher][name]) for name, value in teacher.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    for model, fixed in ((student, {"pos_embed"}), (heads, set())):
        parameters = dict(model.named_parameters())
        assert {name for name, value in parameters.items() if torch.equal(value, before[model][name])} == fixed
