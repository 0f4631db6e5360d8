"""The adversary of ARD (R+D): a frozen teacher's features, judged by one light head after each of its blocks.

Paper, section 3.3 and appendix B.1. Heads and hinge are those that StyleGAN-T describes (Sauer et al. 2023), the
adaptive weight is VQGAN's (Esser et al. 2021, Eq. 7). Every loss has one value per sample, (B,), as in losses.py.

    B batch   T tokens   D the teacher's width   W a head's width   L blocks, as many heads   C, H, W the latent
"""

import math
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.parametrizations import spectral_norm

from diffusion import process_of
from losses import regression_losses
from models import DiT
from models_ard import ARD
from runtime.distributed import unwrapped
from runtime.precision import own_products

Kernels = tuple[Any, Any, Any]  # of a head's three convolutions
Features = tuple[list[torch.Tensor], torch.Tensor]  # the tokens after L blocks, (B, T, D) each; class embedding (B, D)

#################################################################################
#                             The heads' input                                  #
#################################################################################


class FrozenFeatures:
    """The teacher as a feature extractor: its tokens after every block, and its embedding of the class.

    Gradients flow through it to the image and never into its weights, which ask for none.
    """

    def __init__(self, teacher: DiT, time: int = 0):
        """``time`` 0..999 is the noise level in thousandths at which the teacher looks: 0 is the clean latent."""
        self.teacher, self.process = teacher.eval().requires_grad_(False), process_of(teacher)
        self.diffuses, self.time = time > 0, self.process.time(time / 1000)

    def __call__(self, x: torch.Tensor, y: torch.Tensor, noise: torch.Tensor | None = None) -> Features:
        """x: (B, C, H, W) clean, y: (B,) labels, noise: as x, for times above 0 -> features and class embedding.

        The embedding is normalised to unit variance, since DiT's own starts with a deviation of 0.02.
        """
        if self.diffuses:
            assert noise is not None, "images are diffused with noise"
            x = self.process.diffuse(x, self.time, noise)
        label = self.teacher.y_embedder(y)
        features = self.teacher.features(x, torch.full(y.shape, self.time, device=y.device), y)
        return features, F.layer_norm(label, label.shape[1:])


#################################################################################
#                                 Spectral norms                                #
#################################################################################


def products(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Matrices (L, m, n), or vectors (L, n), times vectors (L, n), each with its own -> (L, m), or (L,).

    On a GPU at once. On a processor, where it saves nothing, one after another, since sums that a batched product takes
    in another order differ in the last bits.
    """
    return torch.einsum("l...n,ln->l...", a, b) if a.is_cuda else torch.stack([x @ y for x, y in zip(a, b)])


class SpectralNorm(torch.autograd.Function):
    """Kernels of one shape (out, in, K), divided by their largest singular values, together: (L, out, in, K).

    The numbers of ``torch.nn.utils.parametrizations.spectral_norm`` of each, on a processor to the bit; but a GPU is
    given a few large pieces of work, not dozens for each kernel. The largest singular value is u W v, where power
    iteration moves u and v. To the gradient they are constants.
    """

    @staticmethod
    def forward(ctx: Any, norms: list[Any], *kernels: torch.Tensor) -> torch.Tensor:
        """``norms`` are torch's modules of the kernels, which hold u (out,) and v (in * K,); those in training mode
        advance the iteration once.
        """
        out = torch.stack(kernels)
        matrices = out.flatten(2)
        u, v = torch.stack([norm._u for norm in norms]), torch.stack([norm._v for norm in norms])
        if norms[0].training:
            u = F.normalize(products(matrices, v), dim=1, eps=norms[0].eps)
            v = F.normalize(products(matrices.mT, u), dim=1, eps=norms[0].eps)
            torch._foreach_copy_([norm._u for norm in norms] + [norm._v for norm in norms], [*u, *v])
        sigma = products(u, products(matrices, v))[:, None, None, None]
        out /= sigma
        ctx.save_for_backward(out, sigma, u, v)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        """That of the division, and through the singular value, whose own gradient is the outer product of u and v."""
        out, sigma, u, v = ctx.saved_tensors
        parts = (out / sigma).mul_(grad).flatten(1)
        by_sigma = -(parts.sum(1) if parts.is_cuda else torch.stack([part.sum() for part in parts]))  # as ``products``
        torch.mul((by_sigma[:, None] * u)[:, :, None], v[:, None, :], out=parts.view(*u.shape, -1))
        return None, *(grad / sigma).add_(parts.view_as(grad))


#################################################################################
#                                     Heads                                     #
#################################################################################


class GhostBatchNorm(nn.Module):
    """Batch norm whose statistics are those of small groups within the batch (Hoffer et al. 2017), never running ones.

    Consecutive samples form groups of ``group``; the last is smaller where ``group`` does not divide the batch.
    A batch that is split at the borders of groups (over ranks, say) gives the same numbers as the whole.
    """

    def __init__(self, channels: int, group: int, eps: float = 1e-5):
        super().__init__()
        self.group, self.eps = group, eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, W, T) -> (B, W, T) float32."""
        x = x.float()
        full_groups = len(x) // self.group
        rest = x[full_groups * self.group :]
        out = [self._standardize(x[: full_groups * self.group].view(full_groups, self.group, *x.shape[1:]))]
        if len(rest):
            out.append(self._standardize(rest[None]))
        return torch.cat(out) * self.weight[:, None] + self.bias[:, None]

    def _standardize(self, groups: torch.Tensor) -> torch.Tensor:
        """Zero mean and unit variance (biased) in each group and channel: (G, n, W, T) -> (G * n, W, T)."""
        samples_and_tokens = (1, 3)
        centred = groups - groups.mean(samples_and_tokens, keepdim=True)
        variance = centred.square().mean(samples_and_tokens, keepdim=True)
        return (centred * torch.rsqrt(variance + self.eps)).flatten(0, 1)


class ConvBlock(nn.Module):
    """Spectral-norm convolution along the tokens, which form a ring; ghost batch norm; leaky ReLU."""

    def __init__(self, in_width: int, width: int, kernel: int, group: int):
        super().__init__()
        self.kernel = kernel
        self.conv = spectral_norm(nn.Conv1d(in_width, width, kernel, bias=False))  # the norm has the bias
        self.norm = GhostBatchNorm(width, group)

    def forward(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """x: (B, in_width, T), weight: the normalised kernel -> (B, width, T)."""
        if self.kernel > 1:  # by index, since F.pad's circular mode refuses rings that are shorter than the padding
            reach, T = self.kernel // 2, x.shape[2]
            x = x.index_select(2, torch.arange(-reach, T + reach, device=x.device) % T)
        return F.leaky_relu(self.norm(F.conv1d(x, weight)), 0.2)


class DiscriminatorHead(nn.Module):
    """One logit for each token: is it real, and of this class?"""

    def __init__(self, in_width: int, width: int, group: int, class_width: int = 64):
        super().__init__()
        self.enter = ConvBlock(in_width, width, 1, group)
        self.residual = ConvBlock(width, width, 9, group)
        self.leave = spectral_norm(nn.Conv1d(width, class_width, 1))
        self.classes = nn.Linear(in_width, class_width)

    def forward(
        self,
        tokens: torch.Tensor,
        label: torch.Tensor,
        kernels: Kernels | None = None,
    ) -> torch.Tensor:
        """tokens: (B, T, D), label: (B, D) class embedding -> (B, T) logits, the projection on the class.

        ``kernels`` are those of ``kernels_of``, given where several batches share one power iteration.
        """
        enter, residual, leave = kernels or kernels_of([self])[0]
        x = self.enter(tokens.transpose(1, 2), enter)
        x = (x + self.residual(x, residual)) / math.sqrt(2)
        x = F.conv1d(x, leave, self.leave.get_parameter("bias"))  # (B, class_width, T)
        return (x.float() * self.classes(label).float()[..., None]).mean(1) * math.sqrt(self.class_width)

    @property
    def class_width(self) -> int:
        """Width of the space in which tokens and class meet."""
        return self.classes.out_features


def kernels_of(heads: Sequence[DiscriminatorHead]) -> list[Kernels]:
    """The kernels of each head's three convolutions, divided by their largest singular values.

    In training mode a call advances power iteration once. It is float32 always, whatever the precision around it.
    """
    normalised = []
    with own_products("fp32", heads[0].classes.weight.device):
        for convolutions in zip(*((head.enter.conv, head.residual.conv, head.leave) for head in heads), strict=True):
            norms: Any = [convolution.get_submodule("parametrizations.weight") for convolution in convolutions]
            together = SpectralNorm.apply([norm[0] for norm in norms], *(norm.original for norm in norms))
            normalised.append(together.unbind())
    return list(zip(*normalised, strict=True))


class Discriminator(nn.Module):
    """The trained part of the discriminator: a head for each of the teacher's blocks.

    In training mode every call advances the spectral norms' power iteration once, however many batches it is given.
    """

    def __init__(self, depth: int, in_width: int, width: int | None = None, group: int = 6):
        """For a teacher of that depth and width; heads of ``width`` channels (None: the teacher's)."""
        super().__init__()
        self.heads: Any = nn.ModuleList(DiscriminatorHead(in_width, width or in_width, group) for _ in range(depth))

    @classmethod
    def for_teacher(cls, teacher: DiT, width: int | None = None, group: int = 6) -> "Discriminator":
        """The heads that fit this teacher's features."""
        return cls(len(teacher.blocks), teacher.config["hidden_size"], width, group)

    def forward(self, *batches: Features) -> list[torch.Tensor]:
        """The features of each batch by ``FrozenFeatures`` -> its logits, (B, L, T), without mixing batches."""
        kernels = kernels_of(self.heads)
        logits = []
        for features, label in batches:
            judged = zip(self.heads, features, kernels, strict=True)
            logits.append(torch.stack([head(tokens, label, own) for head, tokens, own in judged], dim=1))
        return logits


#################################################################################
#                                    Losses                                     #
#################################################################################


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
    """The student's own history, as in sampling: noise (B, C, H, W), y (B,) -> (B, S, C, H, W), the noise first.

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
        """``student`` (an ARD) and ``heads`` (a Discriminator) are trained, wrapped in DDP or not. ``total``
        sums a tensor over all ranks; ``samples`` is how many samples one call has on all ranks together.
        """
        self.student, self.heads, self.features, self.total, self.samples = student, heads, features, total, samples
        self.raw_heads = unwrapped(heads)
        self.last_layer = unwrapped(student).heads[-1].linear.weight

    def student_losses(
        self, batch: dict[str, torch.Tensor], gan_weight: float
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """The student's loss ("loss") and the logged values, (B,) each; and its last predictions (B, C, H, W).

        ``batch`` holds "trajectory" (B, S+1, C, H, W) and "y" (B,); "rollout" (B, S, C, H, W) if the student is judged
        by its own history; "fake_noise" (B, C, H, W) if the teacher looks at diffused images. The loss is regression
        plus w * adversarial, where w = ``gan_weight`` times the adaptive weight, a constant to the gradient.

        The adversarial loss L is backpropagated through the discriminator to the last prediction x only. With
        g = dL / dx, the term w * g * (x - stopgrad(x)) has the value 0 and the gradient w * dL, so the student itself
        is backpropagated once for both losses.
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
        """The heads' loss ("loss") and the logged values, (B,) each.

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
