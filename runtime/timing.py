"""Timing: several pieces of work in turns, against the peak of the device; one report for each."""

import json
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from runtime.precision import DTYPES


@dataclass
class Case:
    """One thing to time: ``work`` does it, ``images`` it makes at a time, ``flops`` it needs (0: not counted)."""

    work: Callable[[], object]
    images: int
    flops: int = 0
    precision: str = "fp32"


def time_in_turns(works: list[Callable], repeats: int, device: torch.device, warmup: int = 2) -> np.ndarray:
    """Seconds of each work in each turn, (repeats, works): what disturbs the machine disturbs all alike."""

    def seconds(work: Callable) -> float:
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    return np.array([[seconds(work) for work in works] for _ in range(warmup + repeats)])[warmup:]


def peak_flops(precision: str, device: torch.device) -> float:
    """The best rate of a large square matrix product, in FLOPs per second."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, size, size, device=device, dtype=DTYPES[precision])
    return 2 * size**3 / time_in_turns([lambda: a @ b], 10, device).min()


def peak_memory(device: torch.device) -> int:
    """Most bytes in use so far: of the device's allocator, or of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def report(name: str, options: dict, case: Case, times: np.ndarray, device: torch.device, more: dict) -> None:
    """Print one case, to read and as JSON."""
    median = statistics.median(times)
    line = {"case": name, **options, "seconds": median, "fastest": times.min(), "slowest": times.max()}
    line |= {"ms_per_image": 1000 * median / case.images, "images_per_second": case.images / median}
    if case.flops:
        peak = peak_flops(case.precision, device)
        line |= {"tflops": case.flops / 1e12, "peak_tflops_per_second": peak / 1e12}
        line["mfu"] = case.flops / median / peak
    on = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    line |= {"peak_memory_gb": peak_memory(device) / 1e9, "torch": torch.__version__, "on": on} | more
    numbers = ("ms_per_image", "images_per_second", "mfu", "peak_memory_gb", *more)
    shown = ", ".join(f"{key} {line[key]:.4g}" for key in numbers if key in line)
    print(f"{name}: {median:.4g} s ({times.min():.4g} to {times.max():.4g}), {shown}")
    print(json.dumps(line), flush=True)
