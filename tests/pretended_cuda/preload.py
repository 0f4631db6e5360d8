"""Start a script again with ``driver.cpp`` in front of torch. Needs a C++ compiler and torch's CUDA build, no GPU."""

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
LIBRARY = "PRETENDED_CUDA"  # the environment variable with the path of the compiled driver


def lacking() -> str:
    """Why there can be no pretended device here, "" where there can be."""
    if sys.platform != "linux" or torch.version.cuda is None or not hasattr(torch._C, "_ensureCUDADeviceGuardSet"):
        return "a pretended CUDA device needs Linux and the CUDA build of a recent torch"
    return "" if shutil.which("c++") else "a pretended CUDA device needs a C++ compiler (c++)"


def environment(folder: Path) -> dict[str, str]:
    """The environment in which a script of this folder runs; the driver is compiled into ``folder``."""
    library = folder / "libcuda.so.1"
    options = ("-shared", "-fPIC", "-std=c++17", f"-Wl,-soname,{library.name}")
    subprocess.run(["c++", *options, "-o", str(library), str(HERE / "driver.cpp")], check=True)
    paths = os.pathsep.join(str(path) for path in (HERE.parent.parent, HERE.parent))
    ours = {LIBRARY: str(library), "LD_PRELOAD": str(library), "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
    return os.environ | ours | {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}


def require() -> None:
    """Start a script again, with the driver, that was started without it."""
    if LIBRARY not in os.environ:
        if lacking():
            sys.exit(lacking())
        with tempfile.TemporaryDirectory() as folder:
            sys.exit(subprocess.run([sys.executable, *sys.argv], env=environment(Path(folder)), check=False).returncode)
    torch.set_num_threads(1)


def devices(count: int = 8) -> None:
    """Have torch's autograd believe in so many devices from here on, and nobody else for now.

    To be called before it first walks back: it counts them once.
    """
    torch._C._ensureCUDADeviceGuardSet()
    torch.accelerator.is_available = lambda: False
    torch.accelerator.current_device_index = lambda: 0
    torch.cuda._lazy_init = lambda: None
    ctypes.CDLL(os.environ[LIBRARY]).pretend_devices(count)
