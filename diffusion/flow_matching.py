"""Flow matching on straight lines between noise and data: SiT (Ma et al. 2024) and REPA (Yu et al. 2025).

A network predicts the velocity v = dx/dt. The two differ in the direction of time alone.
"""

from collections.abc import Callable

import numpy as np
import torch

from diffusion.process import Process
from models import PROCESS_TIMES


class FlowMatching(Process):
    """x_t = (1 - level) data + level noise, where the noise level is linear in the time."""

    solver = "euler"

    def __init__(self, name: str, guided_channels: int | None):
        """``name``: one of ``PROCESS_TIMES``."""
        self.name, self.guided_channels = name, guided_channels
        self.noise_time, self.data_time = PROCESS_TIMES[name]
        self.length = self.noise_time - self.data_time  # 1 or -1

    def grid(self, steps: int) -> list[float]:
        """Evenly spaced. REPA's own sampler compares these very numbers, rounded as they are, with its interval."""
        return torch.linspace(self.noise_time, self.data_time, steps + 1, dtype=torch.float64).tolist()

    def level(self, t: float) -> float:
        """1 at the noise's time, 0 at the data's."""
        return t if self.data_time == 0 else round((t - self.data_time) / self.length, 12)

    def time(self, level: float) -> float:
        """The way back."""
        return self.data_time + self.length * level

    def step(self, x: torch.Tensor, out: torch.Tensor, t: float, then: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Euler's; x_0 is where the step would end that went all the way."""
        return x + (then - t) * out, x + (self.data_time - t) * out

    def diffuse(self, x0: torch.Tensor, t: float, noise: torch.Tensor) -> torch.Tensor:
        """A point of the line, (B, C, H, W)."""
        level = self.level(t)
        return (1 - level) * x0 + level * noise

    def draw_time(self, draw: np.random.Generator) -> float:
        """Uniform in [0, 1)."""
        return draw.random()

    def training_losses(
        self,
        model: Callable[..., torch.Tensor],
        x: torch.Tensor,
        t: torch.Tensor,
        model_kwargs: dict[str, torch.Tensor] | None = None,
        noise: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Mean squared error of the velocity, {"loss"} (B,); t is uniform in [0, 1]."""
        noise = torch.randn_like(x) if noise is None else noise
        level = ((t - self.data_time) / self.length).to(x.dtype).view(-1, 1, 1, 1)
        out = model((1 - level) * x + level * noise, t, **(model_kwargs or {})).to(x.dtype)
        velocity = (noise - x) / self.length
        return {"loss": (out[:, : x.shape[1]] - velocity).square().flatten(1).mean(1)}
