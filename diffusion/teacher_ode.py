"""The teacher's ODE as all scripts share it: its options, the solver, the points that a student learns from.

B batch   C, H, W the latent   n solver steps   K points that are kept   S student steps
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset

from diffusion import process_of
from models import DiT
from runtime.cli import UserError, noise_level, not_negative_number, option, positive
from runtime.distributed import DistributedContext
from runtime.randomness import Classes, Conditions, labels, noise

TARGETS = ("x0", "xt")
GRIDS = ("even", "authors")


@dataclass(frozen=True)
class OdeOptions:
    """The teacher's probability-flow ODE."""

    solver_steps: int = option(25, "Solve the ODE in this many steps.", positive)
    cfg_scale: float = option(1.5, "Guide by this scale; 1 is no guidance.", not_negative_number)
    cfg_channels: int | None = option(
        None,
        "Guide only the first N channels; without it 3, as the samplers of DiT and SiT, or all of fewer, and of a "
        "REPA or a text model.",
        positive,
    )
    guidance_interval: Sequence[float] | None = option(
        None,
        "Guide at these noise levels only, 0 is data and 1 noise; elsewhere the null half is not run.",
        noise_level,
        nargs=2,
        metavar=("LOW", "HIGH"),
    )


def grid_steps(steps: int, grid: str = "even", teacher_steps: int = 25) -> list[int]:
    """After which teacher steps the S points of a student's trajectory lie, noisiest first, the last is the sample.

    "even": round(n k / S), so that S = 1, 2, 4 share points (6, 12, 19, 25 of 25). "authors": the released code's
    10, 15, 20, 25 of 25 for S = 4. Raises ``ValueError`` for a grid that does not exist.
    """
    if grid == "even" and 1 <= steps <= teacher_steps:
        return [round(teacher_steps * k / steps) for k in range(1, steps + 1)]
    if grid == "authors" and (steps, teacher_steps) == (4, 25):
        return [10, 15, 20, 25]
    if grid == "authors":
        raise ValueError(f"the authors' grid has 4 student steps of 25 teacher steps, not {steps} of {teacher_steps}")
    raise ValueError(f"grid {grid!r} has no {steps} student steps of {teacher_steps} teacher steps")


def pick_points(x: torch.Tensor, x0: torch.Tensor, solver_indices: list[int]) -> dict[str, torch.Tensor]:
    """The points of a student's grid out of a full teacher trajectory.

    x: (B, n+1, C, H, W) states and x0: (B, n, C, H, W) predictions of ``Process.trajectory``, K ``solver_indices``
    after which the points lie -> {"xt", "x0"}: (B, K, C, H, W) each. The predicted x_0 at a point is the one made from
    that state; at the end it is the sample.
    """

    def picked(points: torch.Tensor) -> torch.Tensor:
        return torch.stack([points[:, i] for i in solver_indices], dim=1)  # a list as index would wait for the device

    return {"xt": picked(x), "x0": picked(torch.cat([x0, x[:, -1:]], dim=1))}


class TeacherODE:
    """Trajectories of a teacher with guidance; ``provenance`` is all that decides them but noise and label."""

    def __init__(
        self,
        teacher: DiT,
        *,
        solver_steps: int = 25,
        cfg_scale: float = 1.5,
        cfg_channels: int | None = None,
        guidance_interval: Sequence[float] | None = None,
        conditions: Conditions | None = None,
    ):
        """``conditions`` of a text model are captions; without them, the teacher's classes.

        ``UserError`` for impossible numbers of steps and channels or an empty interval, and for guidance of one without
        a null label.
        """
        self.conditions: Conditions = conditions or Classes(teacher.num_classes)
        guidable = self.conditions.count and teacher.config["class_dropout_prob"]
        if cfg_scale != 1 and not guidable:
            raise UserError(f"--cfg-scale {cfg_scale}: this teacher has no null label, give --cfg-scale 1")
        self.teacher, self.process, self.solver_steps = teacher, process_of(teacher), solver_steps
        try:
            self.process.grid(solver_steps)
        except ValueError as error:
            raise UserError(f"--solver-steps {solver_steps}: {error}") from None
        if cfg_channels and cfg_channels > teacher.in_channels:
            raise UserError(f"--cfg-channels {cfg_channels}: this teacher has {teacher.in_channels}, give no more")
        interval = None
        if guidance_interval is not None:
            interval = low, high = (guidance_interval[0], guidance_interval[1])
            if low > high or cfg_scale == 1:
                why = "guidance of scale 1 is none" if cfg_scale == 1 else "the first must not be above the second"
                raise UserError(f"--guidance-interval {low:g} {high:g}: {why}; leave it out, or give others")
        reads_text = bool(self.conditions.max_text_tokens)
        all_channels = teacher.in_channels
        usual = all_channels if reads_text else min(self.process.guided_channels or all_channels, all_channels)
        self.null = self.conditions(torch.tensor([self.conditions.count])) if reads_text else None  # (1, L, C)
        self.guidance: dict[str, Any] = {
            "cfg_scale": cfg_scale,
            "cfg_channels": cfg_channels or usual,
            "interval": interval,
        }
        self.provenance = {
            "num_classes": self.conditions.count,
            "solver": self.process.solver,
            "solver_steps": solver_steps,
            "cfg_scale": cfg_scale,
            "cfg_channels": self.guidance["cfg_channels"],
        } | self.conditions.about
        if interval:
            self.provenance["guidance_interval"] = list(interval)

    def __call__(self, noise: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """noise: (B, C, H, W), y: (B, ...) -> states (B, n+1, C, H, W), noise first, predictions of x_0 (B, n, ...)."""
        if self.null is not None:
            y = y.float()  # autocast to bf16 cannot join float16
            self.null = self.null.to(y)  # once: a recorded graph cannot copy
        return self.process.trajectory(self.teacher, noise, y, self.solver_steps, null=self.null, **self.guidance)

    def sample(self, noise: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """noise: (B, C, H, W), y: (B, ...) -> the last states (B, C, H, W)."""
        return self(noise, y)[0][:, -1]

    def complete(
        self, batch: dict[str, torch.Tensor], solver_indices: list[int], target: str
    ) -> dict[str, torch.Tensor]:
        """A batch of ``OnlineBatches`` -> "trajectory" (B, S+1, C, H, W), noisiest first, and the same "y".

        ``solver_indices`` and ``target`` as a student has them.
        """
        points = pick_points(*self(batch["noise"], batch["y"]), solver_indices)[target]
        return {"trajectory": torch.cat([batch["noise"][:, None], points], dim=1), "y": batch["y"]}


class OnlineBatches(Dataset):
    """Training batches without a store: item n is this rank's share of step n, "noise" (B, C, H, W) and "y" (B, ...).

    ``TeacherODE.complete`` then solves the ODE for them, in the training process: workers hold no teacher. Every step
    has trajectories that were never seen before: those that a dump with this seed would go on to write.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        conditions: Conditions,
        *,
        global_batch_size: int,
        seed: int,
        context: DistributedContext,
    ):
        """``shape`` (C, H, W) of the teacher's latents; ``conditions`` are the ODE's."""
        self.shape, self.conditions = shape, conditions
        self.global_batch_size, self.seed, self.context = global_batch_size, seed, context

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        indices = self.context.step_indices(step, self.global_batch_size)
        z = noise(self.seed, "trajectory", indices, self.shape)
        return {"noise": z, "y": self.conditions(labels(self.seed, indices, self.conditions.count))}
