"""Walk the pipeline on the CPU and on the pretended device, and compare: nothing mixes, no step waits, weights agree.

python tests/pretended_cuda/stages.py FOLDER
"""

import sys
from pathlib import Path
from typing import Any

from preload import devices, require

require()
import device  # noqa: E402
import numpy as np  # noqa: E402
from helpers import arrays, call, checkpoint  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch.optim.optimizer import register_optimizer_step_post_hook  # noqa: E402

STEPS = 4
TRAINING = ("--log-every", STEPS, "--sample-every", 0, "--iterations", STEPS, "--num-workers", 0)


def walk(out: Path, inputs: Path, name: str) -> list[list[dict]]:
    """All stages on a device into ``out``, each from what the stage before it left in ``inputs``; what waited by each
    of a trainer's optimiser steps.
    """
    waits: list[list[dict]] = []
    here = ("--device", name)
    teacher, student = (inputs / run / f"checkpoints/{STEPS:07d}.pt" for run in ("teacher", "R"))
    small = ("--global-batch-size", 6, *TRAINING, *here)

    def train(script: str, run: str, *options: Any) -> None:
        waits.append([])
        hook = register_optimizer_step_post_hook(lambda *_: waits[-1].append(dict(device.WAITS)))
        call(script, *options, *small, "--run-dir", out / run)
        hook.remove()

    train("train.py", "teacher", "--model", "DiT-Nano/2", "--data-path", "digits")
    call("sample_trajectory.py", "--teacher", teacher, "--out", out / "store", "--num-trajectories", 12,
         "--solver-steps", 4, "--steps", 2, "--per-proc-batch-size", 6, "--dtype", "fp32", *here)  # fmt: skip
    data = ("--data-path", inputs / "store")
    train("train_ARD.py", "R", *data, "--steps", 2, "--stack", 1, "--snapshot-every", 2)
    train("train_ARD.py", "online", "--online", "--teacher", teacher, "--solver-steps", 4, "--steps", 2, "--stack", 1)
    train("train_ARD_gan.py", "R+D", *data, "--real-data-path", "digits", "--ckpt-path", student, "--gan-warmup", 0,
          "--bn-group", 3)  # fmt: skip
    draw = ("--num-samples", 6, "--save-latents", *here)
    call("sample_ARD.py", "--ckpt-path", student, *draw, "--out", out / "student.npz")
    call("sample.py", "--teacher", teacher, "--solver-steps", 2, *draw, "--out", out / "teacher.npz")
    return waits


def numbers(out: Path) -> dict[str, np.ndarray]:
    """All that the stages left, by name."""
    found = dict(load_file(out / "store/shard-00000.safetensors"))
    for run in ("teacher", "R", "online", "R+D"):
        content = checkpoint(out / run, STEPS)
        parts = [part for part in ("model", "ema", "model_d") if part in content]
        found |= {f"{run}/{part}/{name}": value for part in parts for name, value in content[part].items()}
    images = {
        f"{who}/{name}": arrays(out / f"{who}.npz")[name] for who in ("student", "teacher") for name in ("latents",)
    }
    return {name: value.numpy() for name, value in found.items()} | images


def main(folder: Path) -> None:
    devices()
    walk(folder / "cpu", folder / "cpu", "cpu")
    device.install()
    for run, waits in zip(
        ("teacher", "R", "online", "R+D"), walk(folder / "cuda", folder / "cpu", "cuda"), strict=True
    ):
        new = {where: count - waits[1].get(where, 0) for where, count in waits[-1].items()}
        print(f"{run}: {sum(new.values())} waits in steps", *(what for (what, _), count in new.items() if count))
    cpu, cuda = numbers(folder / "cpu"), numbers(folder / "cuda")
    apart = {name: float(np.abs(cuda[name].astype(np.float64) - value).max()) for name, value in cpu.items()}
    print(f"{len(cpu.keys() & cuda.keys())} of {len(cpu)} tensors, at most {max(apart.values())} apart")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
