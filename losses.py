"""The losses of ARD: regression on the teacher's trajectory (Eq. 6), and the two sides of the adversarial loss (R+D).

Every loss has one value per sample, (B,), so that a mean over any split of a batch, over ranks or micro-batches, comes
out right. The hinge is that of StyleGAN-T's discriminator (Sauer et al. 2023), the adaptive weight VQGAN's (Esser et
al. 2021, Eq. 7).

    B batch   S steps   C, H, W the latent   L heads of the discriminator   T tokens
"""

from collections.abc import Callable
from itertools import islice

import torch
import torch.nn as nn
import torch.nn.functional as F

from discriminator import FrozenFeatures
from models_ard import ARD
from runtime.distributed import unwrapped


def regression_losses(predictions: torch.Tensor, trajectory: torch.Tensor) -> torch.Tensor:
    """Eq. 6, mean over steps: predictions (B, S, C, H, W) of all points but the first of (B, S+1, C, H, W) -> (B,)."""
    return (predictions.float() - trajectory[:, 1:]).square().flatten(1).mean(1)


def hinge_losses(fake: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """The discriminator's loss for each pair of samples, logits (B, L, T) each -> (B,)."""
    return F.relu(1 + fake).flatten(1).mean(1) + F.relu(1 - real).flatten(1).mean(1)


def generator_losses(fake: torch.Tensor) -> torch.Tensor:
    """The student's side of it for each sample, logits (B, L, T) -> (B,)."""
    return -fake.flatten(1).mean(1)


def adaptive_weight(regression: torch.Tensor, adversarial: torch.Tensor) -> torch.Tensor:
    """Weight of the adversarial loss from the norms of both losses' gradients at the last layer, 0..10000."""
    return (regression / (adversarial + 1e-4)).clamp(0, 1e4)


@torch.no_grad()
def own_history(student: ARD, noise: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """What the student sees of itself when sampling: noise (B, C, H, W), y (B,) -> (B, S, C, H, W), the noise first.

    The last step, whose prediction no step sees, is not taken.
    """
    return torch.stack([noise, *islice(student.sample_steps(noise, y), student.steps - 1)], dim=1)


class AdversarialLosses:
    """The losses of R+D: the student's, which is regression plus the adversary's opinion, and the discriminator's."""

    def __init__(
        self,
        student: nn.Module,
        heads: nn.Module,
        features: FrozenFeatures,
        total: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
        samples: float = 1,
    ):
        """``student`` (an ARD) and ``heads`` (a Discriminator) are what is trained, wrapped in DDP or not. ``total``
        sums a tensor over all ranks; ``samples`` is how many samples one call has on all ranks together.
        """
        self.student, self.heads, self.features, self.total, self.samples = student, heads, features, total, samples
        self.raw_heads = unwrapped(heads)
        self.last_layer = unwrapped(student).heads[-1].linear.weight

    def student_losses(
        self, batch: dict[str, torch.Tensor], gan_weight: float
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """What the student minimises ("loss") and what is logged, (B,) each; and its last predictions (B, C, H, W).

        ``batch`` holds "trajectory" (B, S+1, C, H, W) and "y" (B,); "rollout" (B, S, C, H, W) if the student is judged
        by its own history; "fake_noise" (B, C, H, W) if the teacher looks at diffused images. The loss is regression
        plus w * adversarial, where w = ``gan_weight`` times the adaptive weight, a constant to the gradient.

        The adversarial loss L is walked back through the discriminator to the last prediction x only. With
        g = dL / dx, the term w * g * (x - stopgrad(x)) has the value 0 and the gradient w * dL, so the student itself
        is walked back once for both losses.
        """
        trajectory, y = batch["trajectory"], batch["y"]
        histories, labels = trajectory[:, :-1], y
        if "rollout" in batch:  # the true and the student's own histories in one forward
            histories, labels = torch.cat([histories, batch["rollout"]]), torch.cat([y, y])
        predictions = self.student(histories, labels).float()
        regression = regression_losses(predictions[: len(y)], trajectory)  # (B,)
        x = predictions[-len(y) :, -1]  # (B, C, H, W); of the own histories, which come last, if there are any
        if not gan_weight:
            return {"loss": regression, "regression": regression}, x.detach()
        adversarial, g = self.adversarial(x, batch)
        norms = self.last_layer_grad_norms(regression, x, g)
        w = gan_weight * adaptive_weight(norms[0], norms[1])
        linear = (g * (x - x.detach())).flatten(1).sum(1)  # (B,) zeros
        return {
            "loss": regression + w * (adversarial + linear),
            "regression": regression,
            "g_loss": adversarial,
            "gan_weight": w.expand(len(y)),
            "regression_grad": norms[0].expand(len(y)),
            "adversarial_grad": norms[1].expand(len(y)),
        }, x.detach()

    def adversarial(self, x: torch.Tensor, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """x: (B, C, H, W) predictions -> their losses (B,) and the gradient g (B, C, H, W) of the sum of these in x."""
        self.raw_heads.eval()  # the student's turn leaves the spectral norms' power iteration alone
        losses = generator_losses(*self.raw_heads(self.features(x, batch["y"], batch.get("fake_noise"))))
        self.raw_heads.train()
        return losses.detach(), torch.autograd.grad(losses.sum(), x)[0]

    def last_layer_grad_norms(self, regression: torch.Tensor, x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        """Norms of both mean losses' gradients at the student's last weight, over all ranks: (2,)."""
        gradients = [
            torch.autograd.grad(regression.sum(), self.last_layer, retain_graph=True)[0],
            torch.autograd.grad(x, self.last_layer, g, retain_graph=True)[0],
        ]
        return self.total(torch.stack(gradients)).flatten(1).norm(dim=1) / self.samples

    def discriminator_losses(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What the heads minimise ("loss") and what is logged, (B,) each.

        ``batch`` holds pairs of a prediction "fake" and a real latent "real" (B, C, H, W) with their labels "y" and
        "real_y" (B,), and "fake_noise", "real_noise" (B, C, H, W) if the teacher looks at diffused images.
        """
        with torch.no_grad():  # only the heads learn: the features need no graph
            fake_features = self.features(batch["fake"], batch["y"], batch.get("fake_noise"))
            real_features = self.features(batch["real"], batch["real_y"], batch.get("real_noise"))
        fake, real = self.heads(fake_features, real_features)  # logits (B, L, T)
        right = ((fake < 0).float() + (real > 0).float()) / 2
        shown = {"logit_fake": fake, "logit_real": real, "d_accuracy": right}
        means = {name: value.detach().flatten(1).mean(1) for name, value in shown.items()}
        return {"loss": hinge_losses(fake, real)} | means
