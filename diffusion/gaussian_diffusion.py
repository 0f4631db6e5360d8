"""DiT's process, by the name ddpm: q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I) at 1000 times.

Equations cite Ho et al. 2020 (DDPM), Nichol & Dhariwal 2021 (learned variances) and Song et al. 2021 (DDIM).
Schedules are float64 numpy arrays; tensors keep the dtype of x.

    B batch   C, H, W channels and size of x
"""

import math
from collections.abc import Callable

import numpy as np
import torch

from diffusion.process import Process
from models import DiT


def linear_betas(steps: int = 1000) -> np.ndarray:
    """DDPM's linear schedule from 1e-4 to 0.02: (steps,) float64."""
    return np.linspace(1e-4, 0.02, steps, dtype=np.float64)


def space_timesteps(total: int, count: int) -> list[int]:
    """``count`` times out of ``range(total)``, evenly spaced with both ends included."""
    if not 1 <= count <= total:
        raise ValueError(f"{count} sampling steps: must be between 1 and {total}")
    stride = (total - 1) / (count - 1) if count > 1 else 1
    return [round(i * stride) for i in range(count)]


def normal_kl(mean1: torch.Tensor, logvar1: torch.Tensor, mean2: torch.Tensor, logvar2: torch.Tensor) -> torch.Tensor:
    """KL(N1 || N2) of diagonal normals, elementwise, in nats."""
    return 0.5 * (logvar2 - logvar1 - 1 + (logvar1 - logvar2).exp() + (mean1 - mean2) ** 2 * (-logvar2).exp())


def discretized_gaussian_log_likelihood(x: torch.Tensor, mean: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
    """log-probability of x in [-1, 1], taken as one of 256 bins, under N(mean, exp(logvar)); elementwise, in nats."""

    def cdf(z: torch.Tensor) -> torch.Tensor:
        # The tanh approximation of the normal distribution function, as in DDPM's code.
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    upper, lower = (cdf((x - mean + side / 255) * (-0.5 * logvar).exp()) for side in (1, -1))
    log_prob = torch.where(x > 0.999, 1 - lower, upper - lower)
    return torch.where(x < -0.999, upper, log_prob).clamp(min=1e-12).log()


class GaussianDiffusion(Process):
    """DDPM's diffusion at the times 0, nearly clean, to 999, nearly noise; the data themselves have the time -1.

    Its training losses, and the official ``timestep_map``, ``alphas_cumprod`` and ``ddim_trajectory``, are those of the
    times that are kept of these: index i of n means time timestep_map[i].
    """

    name, solver, guided_channels = "ddpm", "ddim", 3

    def __init__(self, timestep_respacing: str | int = "") -> None:
        """``timestep_respacing`` "25" keeps 25 of the 1000 times, "" all."""
        self.all_alphas_cumprod = np.cumprod(1 - linear_betas())
        total = len(self.all_alphas_cumprod)
        self.timestep_map = space_timesteps(total, int(timestep_respacing) if timestep_respacing != "" else total)
        self.alphas_cumprod = self.all_alphas_cumprod[self.timestep_map]
        self.alphas_cumprod_prev = np.append(1.0, self.alphas_cumprod[:-1])
        self.betas = 1 - self.alphas_cumprod / self.alphas_cumprod_prev
        kept, noisy, previous = self.alphas_cumprod, 1 - self.alphas_cumprod, self.alphas_cumprod_prev
        variance = self.betas * (1 - previous) / noisy  # of the posterior; 0 at the first index
        self.tables = {
            "timestep": np.array(self.timestep_map),
            "sqrt_alpha_bar": np.sqrt(kept),
            "sqrt_one_minus_alpha_bar": np.sqrt(noisy),
            "x0_of_xt": np.sqrt(1 / kept),
            "x0_of_noise": np.sqrt(1 / kept - 1),
            # Posterior mean of x_{t-1} given x_0 and x_t (DDPM eq. 7).
            "posterior_mean_x0": self.betas * np.sqrt(previous) / noisy,
            "posterior_mean_xt": (1 - previous) * np.sqrt(1 - self.betas) / noisy,
            "smallest_log_variance": np.log(np.append(variance[1:2], variance[1:])),
            "largest_log_variance": np.log(self.betas),
        }
        self._copies: dict[tuple[str, torch.device], torch.Tensor] = {}

    def grid(self, steps: int) -> list[float]:
        """DiT's respacing: evenly spaced, with the first and the last time."""
        return [*reversed(space_timesteps(len(self.all_alphas_cumprod), steps)), -1]

    def level(self, t: float) -> float:
        """Thousandths are times."""
        return t / len(self.all_alphas_cumprod)

    def time(self, level: float) -> float:
        """The nearest there is."""
        return round(len(self.all_alphas_cumprod) * level)

    def _alpha_bar(self, t: float) -> float:
        return float(self.all_alphas_cumprod[int(t)]) if t >= 0 else 1.0

    def step(self, x: torch.Tensor, out: torch.Tensor, t: float, then: float) -> tuple[torch.Tensor, torch.Tensor]:
        """DDIM with eta = 0 (Song et al. eq. 12); ``out`` is the predicted noise."""
        a, a_then = self._alpha_bar(t), self._alpha_bar(then)
        x0 = math.sqrt(1 / a) * x - math.sqrt(1 / a - 1) * out
        return math.sqrt(a_then) * x0 + math.sqrt(1 - a_then) * out, x0

    def diffuse(self, x0: torch.Tensor, t: float, noise: torch.Tensor) -> torch.Tensor:
        """``q_sample`` at one time for all."""
        a = self._alpha_bar(t)
        return math.sqrt(a) * x0 + math.sqrt(1 - a) * noise

    def draw_time(self, draw: np.random.Generator) -> float:
        """Each is as likely."""
        return int(draw.integers(len(self.all_alphas_cumprod)))

    def ddim_trajectory(
        self,
        model: DiT,
        noise: torch.Tensor,
        y: torch.Tensor,
        cfg_scale: float,
        cfg_channels: int = 3,
        null: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``trajectory`` over the times that are kept: x (B, n+1, C, H, W), noise first, and x0 (B, n, C, H, W)."""
        return self.trajectory(model, noise, y, len(self.timestep_map), cfg_scale, cfg_channels, null)

    def _table(self, name: str, device: torch.device) -> torch.Tensor:
        """A table (n,) on the device, where it stays: no step of training waits for a copy."""
        if (name, device) not in self._copies:
            self._copies[name, device] = torch.as_tensor(self.tables[name], device=device)
        return self._copies[name, device]

    def _at(self, name: str, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """A table's values at the steps t (B,), shaped to broadcast against x: (B, 1, 1, 1)."""
        return self._table(name, t.device)[t].to(x.dtype).view(-1, 1, 1, 1)

    def q_sample(self, x0: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Diffuse x0 to step t (B,) (DDPM eq. 4)."""
        return self._at("sqrt_alpha_bar", t, x0) * x0 + self._at("sqrt_one_minus_alpha_bar", t, x0) * noise

    def predict_x0(self, x: torch.Tensor, t: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        """E[x_0 | x_t] from the predicted noise."""
        return self._at("x0_of_xt", t, x) * x - self._at("x0_of_noise", t, x) * eps

    def training_losses(
        self,
        model: Callable[..., torch.Tensor],
        x: torch.Tensor,
        t: torch.Tensor,
        model_kwargs: dict[str, torch.Tensor] | None = None,
        noise: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Noise-prediction loss, plus the variational bound that trains the variances only.

        x: (B, C, H, W) clean, t: (B,) steps in 0..n-1 -> {"loss", "mse", "vb"} each (B,); vb in bits per dimension,
        0 for a model without learned sigma. Nichol & Dhariwal eq. 16 with the bound rescaled to 1000 steps.
        """
        noise = torch.randn_like(x) if noise is None else noise
        x_t = self.q_sample(x, t, noise)
        times = self._table("timestep", t.device)[t]
        out = model(x_t, times, **(model_kwargs or {})).to(x.dtype)
        eps, sigma = (out, None) if out.shape[1] == x.shape[1] else out.chunk(2, dim=1)
        mse = (noise - eps).square().flatten(1).mean(1)
        vb = torch.zeros_like(mse)
        if sigma is not None:
            vb = self._variational_bound(x, x_t, t, eps.detach(), sigma) * (len(self.timestep_map) / 1000)
        return {"loss": mse + vb, "mse": mse, "vb": vb}

    def _variational_bound(
        self, x0: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor, eps: torch.Tensor, sigma: torch.Tensor
    ) -> torch.Tensor:
        """One term of the bound, (B,) bits per dimension: KL of the posteriors; the decoder's likelihood at t = 0."""

        def posterior_mean(x0: torch.Tensor) -> torch.Tensor:
            return self._at("posterior_mean_x0", t, x_t) * x0 + self._at("posterior_mean_xt", t, x_t) * x_t

        low, high = self._at("smallest_log_variance", t, x_t), self._at("largest_log_variance", t, x_t)
        mean, logvar = posterior_mean(self.predict_x0(x_t, t, eps)), low + (sigma + 1) / 2 * (high - low)
        kl = normal_kl(posterior_mean(x0), low, mean, logvar)
        nll = -discretized_gaussian_log_likelihood(x0, mean, logvar)
        return torch.where(t == 0, nll.flatten(1).mean(1), kl.flatten(1).mean(1)) / math.log(2)
