"""Diffusion processes by name: what their networks predict, their training losses, and their ODEs."""

from diffusion.flow_matching import FlowMatching
from diffusion.gaussian_diffusion import GaussianDiffusion
from diffusion.process import Process
from models import DiT

PROCESSES: dict[str, Process] = {
    process.name: process for process in (GaussianDiffusion(), FlowMatching("sit", 3), FlowMatching("repa", None))
}


def process_of(model: DiT) -> Process:
    """The process that a teacher, or a student's teacher, was trained for."""
    return PROCESSES[model.process]


def create_diffusion(timestep_respacing: str | int = "") -> GaussianDiffusion:
    """DiT's own diffusion of 1000 steps; ``create_diffusion("25")`` visits 25 of the 1000 times."""
    return GaussianDiffusion(timestep_respacing)


__all__ = ["PROCESSES", "Process", "create_diffusion", "process_of"]
