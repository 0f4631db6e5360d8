"""The teacher's ODE as all scripts share it: its options, the solver, what provenance says of it."""

import torch

import cli
from cli import UserError
from diffusion import create_diffusion
from models import DiT


def add_ode_options(group) -> None:
    """The options of the teacher's probability-flow ODE."""
    group.add_argument("--solver-steps", type=cli.positive, default=25, help="DDIM steps of the teacher")
    group.add_argument("--cfg-scale", type=float, default=1.5, help="classifier-free guidance, 1: none")
    group.add_argument("--cfg-channels", type=cli.positive, default=3, help="guided channels (DiT's samples: 3 of 4)")


class TeacherODE:
    """Trajectories of a teacher by DDIM with guidance; ``provenance`` is all that decides them but noise and label."""

    def __init__(self, teacher: DiT, args):
        """``args`` are those of ``add_ode_options``. ``UserError``: impossible steps, guidance without null label."""
        guidable = teacher.num_classes and teacher.config["class_dropout_prob"]
        if args.cfg_scale != 1 and not guidable:
            raise UserError(f"--cfg-scale {args.cfg_scale}: this teacher has no null label, give --cfg-scale 1")
        try:
            self.diffusion = create_diffusion(str(args.solver_steps))
        except ValueError as error:
            raise UserError(f"--solver-steps {args.solver_steps}: {error}") from None
        self.teacher = teacher
        self.guidance = args.cfg_scale, min(args.cfg_channels, teacher.in_channels)
        self.provenance = {
            "num_classes": teacher.num_classes,
            "solver": "ddim",
            "solver_steps": args.solver_steps,
            "cfg_scale": args.cfg_scale,
            "cfg_channels": self.guidance[1],
        }

    def __call__(self, noise: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """noise: (B, C, H, W), y: (B,) -> states (B, n+1, C, H, W), noise first, predictions of x_0 (B, n, ...)."""
        return self.diffusion.ddim_trajectory(self.teacher, noise, y, *self.guidance)
