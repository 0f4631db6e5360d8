"""What a diffusion process is: one object that says all in which a DiT, a SiT and a REPA differ.

Times t are the process's own, as its networks are told them; ``models.PROCESS_TIMES`` has those of noise and of data.
The noise level says the same in all of them: 1 at the noise, 0 at the data.

    B batch   C, H, W channels and size of x   n solver steps
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch

from models import DiT

Interval = tuple[float, float]  # the lowest and the highest noise level, both included


class Process(ABC):
    """How data become noise, what a network predicts of it, and how the way back is solved."""

    name: str
    solver: str  # of the probability-flow ODE
    guided_channels: int | None  # how many channels its authors guide, the first ones; None for all

    @abstractmethod
    def grid(self, steps: int) -> list[float]:
        """The n + 1 times of n solver steps, from noise to data. ``ValueError`` for a number of steps that is none."""

    @abstractmethod
    def level(self, t: float) -> float:
        """The noise level at a time."""

    @abstractmethod
    def time(self, level: float) -> float:
        """The time of a noise level."""

    @abstractmethod
    def step(self, x: torch.Tensor, out: torch.Tensor, t: float, then: float) -> tuple[torch.Tensor, torch.Tensor]:
        """A solver step on states x (B, C, H, W) from time t to the time ``then``, and the prediction of x_0 at t.

        ``out`` is what the network says of x at t, (B, C, H, W).
        """

    @abstractmethod
    def diffuse(self, x0: torch.Tensor, t: float, noise: torch.Tensor) -> torch.Tensor:
        """The state at time t of data and noise, (B, C, H, W) each."""

    @abstractmethod
    def draw_time(self, draw: np.random.Generator) -> float:
        """A time to train at."""

    @abstractmethod
    def training_losses(
        self,
        model: Callable[..., torch.Tensor],
        x: torch.Tensor,
        t: torch.Tensor,
        model_kwargs: dict[str, torch.Tensor] | None = None,
        noise: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """x: (B, C, H, W) clean, t: (B,) times -> "loss", and what else is to be logged, (B,) each."""

    def guided_steps(self, steps: int, interval: Interval | None) -> list[bool]:
        """Which of n solver steps guidance acts on: those that begin in the interval; all where there is none."""
        low, high = interval or (0.0, 1.0)
        return [low <= self.level(t) <= high for t in self.grid(steps)[:-1]]

    @torch.no_grad()
    def trajectory(
        self,
        model: DiT,
        noise: torch.Tensor,
        y: torch.Tensor,
        steps: int,
        cfg_scale: float = 1.0,
        cfg_channels: int = 3,
        null: torch.Tensor | None = None,
        interval: Interval | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The probability-flow ODE from noise to sample in n steps, without clipping.

        noise: (B, C, H, W), y: (B,) labels -> x (B, n+1, C, H, W) states, noise first, and x0 (B, n, C, H, W), the
        prediction of x_0 made at each of the first n states. ``cfg_scale`` 1, and steps outside the ``interval``, run
        without the null half. ``null`` is the null half's y, (1, ...) for all rows; without it, the null label.
        """
        x, states, predictions = noise, [noise], []
        null = torch.full_like(y, model.num_classes) if null is None else null.expand_as(y)
        # Times are numbers, not tensors: nothing waits for the device inside the loop.
        for (t, then), guided in zip(pairwise(self.grid(steps)), self.guided_steps(steps, interval), strict=True):
            time = torch.full((len(y),), t, device=y.device)
            if cfg_scale == 1 or not guided:
                out = model(x, time, y)
            else:
                doubled = (torch.cat([x, x]), torch.cat([time, time]), torch.cat([y, null]))
                out = model.forward_with_cfg(*doubled, cfg_scale, cfg_channels)[: len(x)]
            x, x0 = self.step(x, out[:, : x.shape[1]].to(x.dtype), t, then)
            states.append(x)
            predictions.append(x0)
        return torch.stack(states, dim=1), torch.stack(predictions, dim=1)
