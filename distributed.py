"""All that this project knows about processes and devices: works alike under torchrun and plain python.

Losses never see ranks: every script computes on ``ranks.share(...)`` of its indices and meets the others only in the
functions below.
"""

import ctypes
import os
import sys
from dataclasses import dataclass

import torch
import torch.distributed as dist

from cli import UserError


@dataclass(frozen=True)
class Ranks:
    """Where this process stands among all processes of the run."""

    rank: int
    world: int
    device: torch.device

    @property
    def main(self) -> bool:
        """True in the one process that prints and writes shared files."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """This rank's part of ``range(count)``: contiguous, sizes differ by at most one, nothing lost."""
        return slice(count * self.rank // self.world, count * (self.rank + 1) // self.world)

    def barrier(self) -> None:
        """Wait for all ranks. For file input and output only."""
        if self.world > 1:
            dist.barrier()

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum of the tensor over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def from_main(self, value):
        """The main rank's value (any small Python object) on every rank."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device if self.device.type == "cuda" else None)
        return box[0]


def setup(device: str = "auto") -> Ranks:
    """Join the process group if torchrun (or Slurm through env://) started us, and choose this process's device.

    ``device`` is "auto" (a GPU where there is one), "cpu", "cuda" or "cuda:1". Raises ``UserError`` if it is not there.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise UserError(f"--device {device}: give auto, cpu, cuda or cuda:INDEX") from None
    if chosen.type not in ("cpu", "cuda"):
        raise UserError(f"--device {device}: give auto, cpu, cuda or cuda:INDEX")
    if chosen.type == "cuda":
        index = chosen.index if chosen.index is not None else int(os.environ.get("LOCAL_RANK", 0))
        if index >= torch.cuda.device_count():
            raise UserError(
                f"--device {device}: this machine has {torch.cuda.device_count()} CUDA devices, give --device cpu"
            )
        chosen = torch.device("cuda", index)
        torch.cuda.set_device(chosen)
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    else:
        keep_freed_memory()
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", init_method="env://")
    return Ranks(rank, world, chosen)


def keep_freed_memory() -> None:
    """Let freed tensors' memory stay with this process, as on a GPU. Does nothing where the C library is not glibc.

    By default glibc returns it to the system and every step has it mapped and cleared again, page by page.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(mmap_threshold, 2**30) or libc.mallopt(mmap_threshold, 2**25)  # all that older ones take


def finish(ranks: Ranks) -> None:
    """Leave the process group; call once at the end of a script."""
    if ranks.world > 1:
        dist.barrier()
        dist.destroy_process_group()


def add_device_option(parser) -> None:
    """The ``--device`` option, the same in every script."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:INDEX")
