"""Which of a run's processes this is, by the variables that torchrun, Slurm, MPI or a script has set.

All of them or none: a rank that takes itself for the only one would work in vain, or write what another one writes.
"""

import os
from typing import NamedTuple

from runtime.errors import UserError

ADVICE = "start the command with torchrun, which sets all of them, or unset it"
# What else names a process among those of its machine, and counts them.
LOCAL_RANKS = ("SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "PMI_LOCAL_RANK")
LOCAL_SIZES = ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "PMI_LOCAL_SIZE")


class Place(NamedTuple):
    """This process's rank of ``world_size``, and the same among those of its machine where that is known."""

    rank: int = 0
    world_size: int = 1
    local_rank: int | None = None
    local_world_size: int | None = None


def place(planning: bool = False) -> Place:
    """Where the variables put this process; an empty one counts as unset.

    ``planning``: nobody will be met, so WORLD_SIZE may stand alone. ``UserError`` names what is wrong or missing.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
    rank, size, local_rank, local_size, port = (_number(name) for name in names)
    if rank is None and size is None:
        if local_rank:
            raise UserError(f"LOCAL_RANK={local_rank}: RANK and WORLD_SIZE are not set; {ADVICE}")
        return Place()
    if size is None:
        raise UserError(f"RANK={rank}: WORLD_SIZE is not set; {ADVICE}")
    if size < 1:
        raise UserError(f"WORLD_SIZE={size}: must be at least 1; {ADVICE}")
    if rank is None and size > 1 and not planning:
        raise UserError(f"WORLD_SIZE={size}: RANK is not set; {ADVICE}")
    if rank is not None and not 0 <= rank < size:
        raise UserError(f"RANK={rank}: must be one of 0 .. WORLD_SIZE - 1 = {size - 1}; {ADVICE}")
    if size == 1:
        return Place()
    if local_size is not None and not 1 <= local_size <= size:
        raise UserError(f"LOCAL_WORLD_SIZE={local_size}: must be 1 .. WORLD_SIZE = {size}; {ADVICE}")
    if local_rank is not None and not 0 <= local_rank < (local_size or size):
        raise UserError(f"LOCAL_RANK={local_rank}: must be one of 0 .. {(local_size or size) - 1}; {ADVICE}")
    if rank is not None:
        if not os.environ.get("MASTER_ADDR"):
            raise UserError(f"WORLD_SIZE={size}: MASTER_ADDR, where the ranks meet, is not set; {ADVICE}")
        if port is None or not 0 < port < 1 << 16:
            said = "MASTER_PORT is not set" if port is None else f"MASTER_PORT={port} is no port"
            raise UserError(f"WORLD_SIZE={size}: {said}; {ADVICE}")
    local_rank = _first(LOCAL_RANKS) if local_rank is None else local_rank
    return Place(rank or 0, size, local_rank, _first(LOCAL_SIZES) if local_size is None else local_size)


def _number(name: str) -> int | None:
    """A variable's whole number, None where it is unset or empty."""
    text = os.environ.get(name, "").strip()
    try:
        return int(text) if text else None
    except ValueError:
        raise UserError(f"{name}={text}: must be a whole number; {ADVICE}") from None


def _first(names: tuple[str, ...]) -> int | None:
    """The number of the first of these variables that has one."""
    return next((int(text) for name in names if (text := os.environ.get(name, "")).isdecimal()), None)


def speaker() -> Place:
    """``place`` for who must speak in any case: alone where the variables are wrong."""
    try:
        return place(planning=True)
    except UserError:
        return Place()


def under_torchrun() -> bool:
    """Whether torchrun has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def choose_gpu(device: str, index: int | None, at: Place, visible: int) -> int:
    """Which of the ``visible`` GPUs this process takes: the one that ``--device`` names by ``index``, the only one, or
    the one of its number among the processes of this machine. ``UserError`` where that cannot be known.
    """
    if not visible:
        raise UserError(f"--device {device}: this machine shows no CUDA device, give --device cpu")
    several = at.world_size > 1 and at.local_world_size != 1
    if index is not None and several:
        raise UserError(f"--device {device}: all ranks of this machine would share that GPU, give --device cuda")
    if index is None and several and visible > 1:
        if at.local_rank is None:
            raise UserError(
                f"LOCAL_RANK: is not set, so which of the {visible} GPUs is rank {at.rank}'s is not known; {ADVICE}"
            )
        index, device = at.local_rank, f"{device} (LOCAL_RANK={at.local_rank})"
    if (index or 0) >= visible:
        shown = f"{visible} CUDA device" + "s" * (visible > 1)
        raise UserError(f"--device {device}: this machine shows {shown}; start no more ranks on it than GPUs")
    return index or 0
