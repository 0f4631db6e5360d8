"""What several tests share: ways to run the scripts, small models and files, what a run has logged."""

import contextlib
import importlib
import os
import resource
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffusion.teacher_ode import grid_steps
from models import DiT, DiT_models
from models_ard import ARD
from runtime import cli
from stores import checkpoints
from stores.digits import digits_images

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests/golden"
SHIPPED_TEACHER = ROOT / "assets/digits_teacher.pt"
SMALL = ("--stack", 2, "--global-batch-size", 8, "--log-every", 1, "--sample-every", 0, "--lr", 1e-3)
NANO_TEACHER = ("--model", "DiT-Nano/2", *SMALL[2:])  # of train.py, as SMALL is of train_ARD.py

#################################################################################
#                                 Running scripts                               #
#################################################################################


def module_of(script: str) -> Any:
    """The module that a script, or a command behind ``python -m``, is; of a package that is its ``__main__``."""
    module = importlib.import_module(script.removesuffix(".py"))
    return module if hasattr(module, "build_parser") else importlib.import_module(f"{script}.__main__")


def call(script: str, *argv) -> None:
    """Run a script's command line in this process: its parser and its ``run``, as its last lines do."""
    module = module_of(script)
    cli.main(module.build_parser(), module.run, [str(argument) for argument in argv])


def words(script: str | Path, *argv, ranks: int = 0) -> list[str]:
    """The command that runs a script, or a module by its dotted name, in its own process or under torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks else []
    what = [str(ROOT / script)] if str(script).endswith(".py") else ["-m", str(script)]
    return [sys.executable, *torchrun, *what, *(str(argument) for argument in argv)]


def spawn(script: str | Path, *argv, ranks: int = 0, **options) -> subprocess.CompletedProcess:
    """Run it from the root of the repository until it ends; output is captured as text."""
    command = words(script, *argv, ranks=ranks)
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False, **options)


def start(script: str | Path, *argv) -> subprocess.Popen:
    """Run it from the root of the repository and do not wait; its standard output is a pipe of text."""
    # A shell's job in the background ignores SIGINT, and so would all that it starts.
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(words(script, *argv), cwd=ROOT, stdout=subprocess.PIPE, text=True, preexec_fn=listen)


def call_on_ranks(ranks: int, script: str, *argv, kill: str = "") -> list[int]:
    """``call`` on several ranks, which are forks of this process and meet over gloo; their exit codes.

    The first that opens a file whose path holds ``kill`` gets kill -9 at that moment: its code is -9.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    sys.stdout.flush()
    pids = []
    for rank in range(ranks):
        pids.append(os.fork())
        if pids[-1] == 0:
            code = 1
            try:
                os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
                               "MASTER_PORT": port}  # fmt: skip
                if kill:
                    sys.addaudithook(
                        lambda event, about: event == "open" and kill in str(about[0]) and os.kill(os.getpid(), 9)
                    )
                call(script, *argv)
                code = 0
            except SystemExit as stop:
                code = int(stop.code or 0)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(code)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def refused(capsys, script: str, *argv) -> str:
    """The one sentence with which a command ends, with exit code 2 and nothing on standard output."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        call(script, *argv)
    out, error = capsys.readouterr()
    assert stop.value.code == 2 and out == "", out + error
    assert error.count("\n") == 1 and "error: " in error, error
    return error


def waits_until(condition, seconds: float = 120) -> bool:
    """Whether a condition comes true in time."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def gan_options(store: Path, student_file: Path, **changes) -> list:
    """The command line of a short run of train_ARD_gan.py."""
    chosen = {"data_path": store, "real_data_path": "digits", "ckpt_path": student_file, "global_batch_size": 12,
              "gan_warmup": 0, "log_every": 1, "sample_every": 0, "ema_decay": 0.9, "bn_group": 3}  # fmt: skip
    chosen |= changes
    flags = [[f"--{name.replace('_', '-')}"] + ([] if value is True else [value]) for name, value in chosen.items()]
    return [part for flag in flags for part in flag]


#################################################################################
#                            Small models and files                             #
#################################################################################


def random_teacher(seed: int = 0, std: float = 0.05, **shape) -> DiT:
    """A Nano teacher, of 8x8 digits unless told otherwise, in which nothing is zero as it would be initially."""
    torch.manual_seed(seed)
    teacher = DiT_models["DiT-Nano/2"](**dict(input_size=8, in_channels=1, num_classes=10) | shape).eval()
    for parameter in teacher.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=std)
    return teacher


def save_teacher(path: Path, teacher: DiT, vae: Path | None = None, about: dict | None = None) -> Path:
    """Write a teacher as train.py would, without what only its training needs."""
    config = {"kind": "teacher", "model": teacher.config, "vae": str(vae) if vae else None}
    config |= {"provenance": {"data": "random"} | (about or {}), "training": {}}
    checkpoints.save(path, {"config": config, "step": 0, "ema": teacher.state_dict()})
    return path


def save_student(path: Path, student: ARD, vae: Path | None = None) -> Path:
    """Write a student as train_ARD.py would, without what only its training needs."""
    points = {"grid": "even", "solver_indices": grid_steps(student.steps), "target": "x0"}
    config = {"kind": "student", "model": student.config, "vae": str(vae) if vae else None}
    config |= {"provenance": points, "training": {}}
    checkpoints.save(path, {"config": config, "step": 0, "ema": student.state_dict()})
    return path


def flip(path: Path, at: int, bits: int = 1) -> None:
    """Change bits of a byte of a file; who has mapped the file sees it as it was."""
    content = bytearray(path.read_bytes())
    content[at] ^= bits
    path.unlink()
    path.write_bytes(content)


def save_autoencoder(folder: Path, seed: int = 0) -> Path:
    """A tiny AutoencoderKL in diffusers' layout: 4 latent channels, half the side, a scaling factor of its own."""
    from diffusers import AutoencoderKL  # seconds to import

    torch.manual_seed(seed)
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    model = AutoencoderKL(**blocks, block_out_channels=(8, 16), norm_num_groups=4, scaling_factor=0.5)
    model.save_pretrained(folder)
    return folder


def draw_digits(count: int, seed: int = 0, noise: float = 0.0) -> np.ndarray:
    """``count`` digits drawn with replacement, noised (in grey levels of 255): (count, 8, 8, 3) uint8."""
    rng = np.random.default_rng(seed)
    images = digits_images()[0][rng.integers(0, 1797, count)].permute(0, 2, 3, 1).numpy()
    noised = np.rint(images + noise * rng.standard_normal(images.shape)).clip(0, 255).astype(np.uint8)
    return noised.repeat(3, axis=3)


def write_images(path: Path, images: np.ndarray, **members) -> Path:
    """Write images in ADM's format."""
    np.savez(path, arr_0=images, **members)
    return path


@contextlib.contextmanager
def memory_limit(megabytes: int) -> Iterator[None]:
    """Within it, this process can take at most that much more memory, touched or not: else MemoryError."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + megabytes * 2**20, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a flat folder, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def state_of(*folders: Path) -> dict[Path, tuple[int, int]]:
    """Everything below some folders with its size and time, to see that nothing was written."""
    paths = [path for folder in folders for path in folder.rglob("*")]
    return {path: (path.lstat().st_size, path.lstat().st_mtime_ns) for path in paths}


def arrays(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an .npz."""
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


#################################################################################
#                                What runs leave                                #
#################################################################################


def scalars(run: Path, kind: str = "step") -> list[dict[str, float]]:
    """What a run logged at each step, or in each line of another kind."""
    lines = [line.split() for line in (run / "log.txt").read_text().splitlines() if line.startswith(f"{kind} ")]
    return [dict(zip(line[2::2], map(float, line[3::2]))) for line in lines]


def losses(run: Path) -> list[float]:
    """The loss that a run logged at each step."""
    return [step["loss"] for step in scalars(run)]


def checkpoint(run: Path, step: int) -> dict:
    """The content of a run's checkpoint."""
    return checkpoints.load(run / "checkpoints" / f"{step:07d}.pt", "")


def assert_equal(a, b) -> None:
    """Two checkpoints' contents are the same to the bit."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for one, other in zip(a, b):
            assert_equal(one, other)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b
