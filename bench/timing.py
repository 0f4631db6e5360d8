"""Timing: pieces of work in turns, against the peak of the device; where a piece of work spends its time."""

import re
import resource
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch

from runtime.precision import DTYPES

# The kind of an operation or kernel, by its name; the first that fits.
KINDS = {
    "optimiser": r"adam|multi_tensor|foreach",
    "attention": r"flash|fmha|attention|sdpa",
    "products": r"gemm|gemv|mm\b|bmm|cutlass|nvjet|xmma|conv|mkldnn|::linear",
    "reductions": r"triton_(red|per)|reduce|norm|softmax|::(mean|sum)\b",
    "copies": r"memcpy|memset|copy|::(cat|stack|contiguous|_to_copy)\b|CatArray",
    "pointwise": r"triton_poi|elementwise|cpp_fused|::(mul|add|sub|div|gelu|silu|where|lerp|fill)",
}


@dataclass
class Case:
    """One thing to time: ``work`` does it, ``images`` it makes at a time, ``flops`` it needs (0: not counted)."""

    work: Callable[[], object]
    images: int
    flops: float = 0
    precision: str = "fp32"


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable, device: torch.device) -> tuple[float, float]:
    """Seconds until the work is done, and until its call returned: equal where the processor cannot keep up."""
    started = time.perf_counter()
    work()
    returned = time.perf_counter()
    synchronize(device)
    return time.perf_counter() - started, returned - started


def time_in_turns(works: list[Callable], repeats: int, device: torch.device, warmup: int = 2) -> np.ndarray:
    """Seconds of each work in each turn, done and returned: (repeats, works, 2). A disturbance hits all works."""
    return np.array([[seconds(work, device) for work in works] for _ in range(warmup + repeats)])[warmup:]


@cache
def peak_flops(precision: str, device: torch.device) -> dict[str, float]:
    """Rates of a large square matrix product in FLOPs per second, "best" and "mean": measured once per run."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, size, size, device=device, dtype=DTYPES[precision])
    times = time_in_turns([lambda: a @ b], 10, device)[:, 0, 0]
    return {"best": 2 * size**3 / times.min(), "mean": 2 * size**3 / times.mean()}


def about_device(device: torch.device) -> dict[str, Any]:
    """Name, versions and clocks, for a report."""
    about: dict[str, Any] = {"torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
    if device.type != "cuda":
        return about | {"on": f"CPU, {torch.get_num_threads()} threads"}
    about |= {"on": torch.cuda.get_device_name(device), "cudnn": torch.backends.cudnn.version()}
    query = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.max.sm", "--format=csv,noheader,nounits"]
    try:
        clocks = subprocess.run(query, capture_output=True, text=True, check=True, timeout=10).stdout.splitlines()
        about["clock_mhz"], about["max_clock_mhz"] = (int(value) for value in clocks[device.index or 0].split(","))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        pass  # a machine without nvidia-smi is measured all the same
    return about


class PeakMemory:
    """Most bytes in use inside the block, beyond what was in use before it.

    Of the device's allocator; on a CPU, of the whole process since its start.
    """

    def __init__(self, device: torch.device):
        self.device, self.bytes = device, 0

    def __enter__(self) -> "PeakMemory":
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.bytes = -torch.cuda.memory_allocated(self.device)
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.bytes += torch.cuda.max_memory_allocated(self.device)
        else:
            self.bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def kind_of(name: str) -> str:
    """The kind of an operation or kernel of that name, one of ``KINDS`` or "other"."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), "other")


def profile(work: Callable, device: torch.device) -> dict[str, Any]:
    """Milliseconds of one call by ``KINDS``, its launches, and the operation that attention took longest in."""
    on_gpu = device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * on_gpu
    with torch.profiler.profile(activities=activities) as profiler:
        work()
        synchronize(device)
    spent: dict[str, float] = dict.fromkeys((*KINDS, "other"), 0.0)
    launches, attention = 0, ("", 0.0)
    for event in profiler.key_averages():
        kernel = event.device_type == torch.autograd.DeviceType.CUDA
        if on_gpu and not kernel:
            launches += event.count if "LaunchKernel" in event.key else 0
            continue
        own = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1000
        kind = kind_of(event.key)
        spent[kind] += own
        launches += 0 if on_gpu else event.count
        if kind == "attention" and own > attention[1]:
            attention = event.key, own
    return {
        "ms": {kind: round(value, 3) for kind, value in spent.items()},
        "launches": launches,
        "attention": attention[0],
    }
