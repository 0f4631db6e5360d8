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


__all__ = ["PROCESSES", "Process", "process_of"]
