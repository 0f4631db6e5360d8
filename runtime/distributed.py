"""All that this project knows about processes and devices: the same code works under torchrun and plain python.

Losses never see ranks: every script computes on its share of the indices and meets the other processes only in the
functions below.
"""

import atexit
import ctypes
import inspect
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.nn as nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from runtime import launcher
from runtime.cli import FETCHING, OptionGroup, RunError, UserError, name
from runtime.stop_signals import die_with_parent, held_back, waiting_for_others

TRAINING_TIMEOUT = timedelta(minutes=15)  # a rank that trains on without the others is hung after this
FILE_TIMEOUT = timedelta(hours=12)  # a rank that writes or hashes files may take this long
Result = TypeVar("Result")


@dataclass(frozen=True)
class DistributedContext:
    """Where this process stands among all processes of the run; called ``context`` everywhere."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def is_main(self) -> bool:
        """True in the one process that prints and writes shared files."""
        return self.rank == 0

    @property
    def in_process_group(self) -> bool:
        """Whether this process has joined others (``join``)."""
        return self.world_size > 1 and dist.is_initialized()

    def share(self, count: int) -> range:
        """This rank's part of ``range(count)``: contiguous, sizes differ by at most one, nothing lost."""
        return range(count * self.rank // self.world_size, count * (self.rank + 1) // self.world_size)

    def step_indices(self, step: int, global_batch_size: int) -> range:
        """This rank's samples of a training step, numbered from the start of the run on."""
        first, share = step * global_batch_size, self.share(global_batch_size)
        return range(first + share.start, first + share.stop)

    def describe_batch(self, global_batch_size: int) -> str:
        """How the global batch is shared, in words."""
        ranks = [DistributedContext(rank, self.world_size, self.device) for rank in range(self.world_size)]
        each = " or ".join(str(size) for size in sorted({len(rank.share(global_batch_size)) for rank in ranks}))
        return f"global batch {global_batch_size} = {each} on each of {self.world_size} x {self.device.type}"

    def barrier(self) -> None:
        """Wait for all ranks. For file input and output only, which may take hours (``FILE_TIMEOUT``)."""
        if self.world_size > 1:
            with waiting_for_others():
                dist.barrier(group=_patient_group())

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum of the tensor over all ranks, in place."""
        if self.world_size > 1:
            with waiting_for_others():
                dist.all_reduce(tensor)
        return tensor

    def on_main(self, work: Callable[[], Result]) -> Result:
        """The main rank's result of ``work()``, on every rank; its error about files and options is everybody's."""
        if not self.in_process_group:
            return work()
        outcome: tuple[bool, Any] = (True, None)
        if self.is_main:
            try:
                outcome = True, work()
            except (UserError, RunError, OSError) as error:
                outcome = False, error
        done, value = self.broadcast_object(outcome)
        if not done:
            raise value
        return value

    def agree(self, value: torch.Tensor) -> bool:
        """Whether a number is the same on all ranks, to the bit; every rank gets the same answer."""
        extremes = torch.stack([value, -value]).to(self.device)
        if self.world_size > 1:
            with waiting_for_others():
                dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
        return bool(extremes[0] == -extremes[1])

    def broadcast_object(self, value: Any) -> Any:
        """The main rank's value (any small Python object) on every rank."""
        if not self.in_process_group:
            return value
        box = [value]
        with waiting_for_others():
            dist.broadcast_object_list(box, src=0, group=_patient_group())
        return box[0]


def setup(device: str = "auto") -> DistributedContext:
    """Choose this process's device and join the other ranks."""
    context = choose_device(device)
    join(context)
    return context


def choose_device(device: str = "auto") -> DistributedContext:
    """Choose this process's device, and wait for nobody: each rank refuses a bad one by itself.

    ``device`` is "auto" (a GPU where there is one), "cpu", "cuda" or "cuda:1". Raises ``UserError`` if it is not there.
    """
    at = launcher.place(planning=not FETCHING.get())
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
        if chosen.type not in ("cpu", "cuda"):
            raise RuntimeError
    except RuntimeError:
        raise UserError(f"--device {device}: give auto, cpu, cuda or cuda:INDEX") from None
    if chosen.type == "cuda":
        chosen = torch.device("cuda", launcher.choose_gpu(device, chosen.index, at, torch.cuda.device_count()))
        torch.cuda.set_device(chosen)
        torch.backends.cudnn.benchmark = True  # the autoencoder and Inception see few shapes, many times
    else:
        keep_freed_memory()
    return launched(chosen)


def launched(device: torch.device = DistributedContext.device) -> DistributedContext:
    """This process among those that torchrun (or Slurm) has started, on that device."""
    at = launcher.place(planning=not FETCHING.get())
    return DistributedContext(at.rank, at.world_size, device)


def join(context: DistributedContext) -> None:
    """Meet the other ranks in a process group, if torchrun (or Slurm through env://) started us; not in a dry run."""
    if context.world_size > 1 and not dist.is_initialized() and FETCHING.get():
        if launcher.under_torchrun():
            die_with_parent()  # none is left behind when torchrun dies
        find_launcher()
        # torch's own timeout does not always fire
        watchdog = threading.Timer(TRAINING_TIMEOUT.total_seconds(), _give_up)
        watchdog.daemon = True
        watchdog.start()
        try:
            with waiting_for_others():
                store, *_ = next(dist.rendezvous("env://", timeout=TRAINING_TIMEOUT))
                if context.device.type == "cuda":
                    gpu = getattr(torch.cuda.get_device_properties(context.device), "uuid", context.rank)
                    require_own_gpu(context, str(gpu), store)
                dist.init_process_group(store=dist.PrefixStore("ranks", store), **group_options(context))
                _patient_group()
                context.all_reduce(torch.zeros(1, device=context.device))  # a fault of the fabric shows now, not later
        except (RuntimeError, ValueError, OSError) as error:
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise RunError(
                f"cannot meet the other ranks at {where} ({reason}); see that it is the main rank's and free, "
                "and run the same command again"
            ) from None
        watchdog.cancel()


def group_options(context: DistributedContext) -> dict[str, Any]:
    """What a rank tells ``init_process_group`` of itself. NCCL, told the GPU, connects there at once, faults or not."""
    nccl = {"backend": "nccl", "device_id": context.device}
    own = nccl if context.device.type == "cuda" else {"backend": "gloo"}
    return own | {"rank": context.rank, "world_size": context.world_size, "timeout": TRAINING_TIMEOUT}


def require_own_gpu(context: DistributedContext, gpu: str, store: dist.Store) -> None:
    """``UserError`` where another rank has taken the same ``gpu``, of which NCCL would say less."""
    store.set(f"gpu {context.rank}", gpu)
    other = next(rank for rank in range(context.world_size) if store.get(f"gpu {rank}").decode() == gpu)
    if other != context.rank:
        both = f"ranks {other} and {context.rank}"
        raise UserError(f"--device {context.device}: {both} have the same GPU; start one each")


def _give_up() -> None:
    minutes = TRAINING_TIMEOUT.total_seconds() / 60
    text = f"the other ranks have not come in {minutes:g} minutes; run the same command again"
    print(text, file=sys.stderr, flush=True)
    os._exit(1)  # the main thread is inside torch and hears nothing


def find_launcher() -> None:
    """``RunError`` where torchrun has died already, while this rank was starting: torch would look for it for long.

    ``UserError`` where the name of the machine to meet at is nobody's.
    """
    where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        socket.getaddrinfo(*where)
    except (OSError, UnicodeError) as error:
        raise UserError(f"MASTER_ADDR={where[0]}: no machine of that name is found ({error})") from None
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun listens there before it starts any rank
        try:
            socket.create_connection(where, timeout=10).close()
        except ConnectionRefusedError:
            raise RunError("torchrun has died; run the same command again") from None
        except OSError:
            pass  # a slow network: torch has the patience


@cache
def _patient_group() -> Any:
    """All ranks, over gloo on the processors: waits for a rank that is at work on files, where training would not."""
    return dist.new_group(backend="gloo", timeout=FILE_TIMEOUT)


def keep_freed_memory() -> None:
    """Let freed tensors' memory stay with this process, as on a GPU. Does nothing where the C library is not glibc.

    By default glibc returns it to the system and every step has it mapped and cleared again, page by page.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is not None and hasattr(libc, "mallopt"):
        trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
        libc.mallopt(trim_threshold, 2**31 - 1)
        accepted = libc.mallopt(mmap_threshold, 2**30)
        if not accepted:  # older versions allow 32 MiB at most
            libc.mallopt(mmap_threshold, 2**25)


def wrapped(module: nn.Module, context: DistributedContext) -> nn.Module:
    """The module in DDP, or itself where this process is alone."""
    if context.world_size == 1:
        return module
    # Buffers that are not saved are constants, the same everywhere; others change and follow the main rank's.
    changing_buffers = len(module.state_dict()) > len(list(module.parameters()))
    known = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # before torch 2.15
    sync: Any = {name: changing_buffers}
    with waiting_for_others():
        return DistributedDataParallel(
            module,
            device_ids=[context.device] if context.device.type == "cuda" else None,
            gradient_as_bucket_view=True,  # the gradients lie where they are sent from: no copy of them
            **sync,
        )


def unwrapped(module: nn.Module) -> Any:
    """The module inside DDP, or the module itself."""
    return module.module if isinstance(module, DistributedDataParallel) else module


def read_with_workers(data: Dataset, indices: Sequence, num_workers: int, pin_memory: bool = False) -> Iterator[Any]:
    """The items of these indices, read ahead by processes that end with this one, also when that ends by an error.

    They never get SIGTERM or its like, with which python would end them, to wait for ever then.
    """
    loader: Any = DataLoader(data, batch_size=None, sampler=indices, num_workers=num_workers, pin_memory=pin_memory)
    with held_back():
        items = iter(loader)
    end = getattr(items, "_shutdown_workers", lambda: None)  # torch calls it when all goes well
    atexit.register(end)  # for errors where the items are used, which keep this generator alive until then
    try:
        yield from items
    finally:
        end()
        atexit.unregister(end)


def finish(context: DistributedContext) -> None:
    """Leave the process group; call once at the end of a script."""
    if context.world_size > 1:
        context.barrier()
        _patient_group.cache_clear()
        dist.destroy_process_group()


def add_device_option(group: OptionGroup) -> None:
    """The ``--device`` option, the same in every script."""
    group.add_argument("--device", type=name, default="auto", help="Run on auto (GPU if any), cpu, cuda or cuda:INDEX.")
