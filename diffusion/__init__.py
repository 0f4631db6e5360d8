"""Gaussian diffusion with DiT's linear 1000-step schedule: training loss of the teacher, its ODE by DDIM."""

from diffusion.gaussian_diffusion import GaussianDiffusion, linear_betas, space_timesteps

__all__ = ["create_diffusion"]


def create_diffusion(timestep_respacing: str | int = "") -> GaussianDiffusion:
    """The 1000-step diffusion, or its respaced form: ``create_diffusion("25")`` visits 25 of the 1000 times."""
    betas = linear_betas()
    steps = int(timestep_respacing) if timestep_respacing != "" else len(betas)
    return GaussianDiffusion(betas, space_timesteps(len(betas), steps))
