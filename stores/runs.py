"""The one owner of run folders: ``results/000-DiT-XL-2`` or the folder of ``--run-dir``.

config.json            the run's config: all that decides its result, and by which it is found again
checkpoints/           0050000.pt, ...: kept; latest.pt: the newest snapshot, until a later checkpoint replaces it
samples/  log.txt      previews, log lines; beside them the files of tracking.py
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from tqdm import tqdm

from models_pixart import model_name
from runtime.checks import writable_folder
from runtime.cli import UserError
from runtime.distributed import DistributedContext
from runtime.errors import BusyError
from runtime.files import LOCK, WriteBehind, claim, noted, release, write_text
from runtime.provenance import differences
from stores import checkpoints
from stores.tracking import Tensorboard, Wandb, trackers

PATIENCE = 60.0  # seconds in which a new run finds a number of its own


def run_bytes(checkpoint_bytes: int, iterations: int, ckpt_every: int, keep: int) -> int:
    """Bytes that a run writes: the checkpoints that are kept, and the snapshot, or the one that is being written."""
    written = -(-iterations // ckpt_every)
    return checkpoint_bytes * (1 + (min(keep, written) if keep else written))


class RunFolder:
    """The folder of a run: found if this very config began it, made otherwise."""

    def __init__(
        self,
        config: dict,
        context: DistributedContext,
        *,
        results_dir: str = "results",
        run_dir: str | None = None,
        keep: int = 0,
        wandb: str | None = None,
        options: dict | None = None,
    ):
        """``keep``: how many of the numbered checkpoints stay, 0 for all. ``wandb``: a project there to track it in as
        well. ``options`` are for whoever looks at the curves. ``UserError`` when ``run_dir`` holds another run, or when
        another job is at work in this one.
        """
        self.config, self.context, self.keep = config, context, keep
        self._wandb, self._options = wandb, options or {}
        self._trackers: list[Tensorboard | Wandb] = []
        self.background = WriteBehind()
        self.path = Path(context.on_main(lambda: begin(config, results_dir, run_dir)))

    def newest_checkpoint(self) -> tuple[Path, dict] | None:
        """The state to resume from, the snapshot if there is one, and its file; None in a new run.

        The main rank chooses, the newest that is whole, and all ranks take that one. ``UserError`` on every rank where
        none is whole, or where a rank does not find the same file, as with results on disks of single nodes.
        """
        read: dict[str, dict] = {}  # by the main rank, which has compared the checksums then
        choice = self.context.on_main(lambda: self._newest_whole(read))
        if choice is None:
            return None
        name, size = choice
        path = self.path / "checkpoints" / name
        here = path.is_file() and path.stat().st_size == size
        absent = torch.tensor(float(not here), device=self.context.device)
        if self.context.all_reduce(absent):
            raise UserError(
                f"--run-dir {self.path}: {int(absent)} of {self.context.world_size} ranks do not find the main rank's "
                f"checkpoint {name}; give a folder that all nodes share"
            )
        return path, read.get(name) or checkpoints.load(path, "--run-dir")

    def _newest_whole(self, read: dict[str, dict]) -> tuple[str, int] | None:
        """Name and size of the newest checkpoint that can be read, and is, into ``read`` by its name.

        ``UserError`` if there are some, but none can.
        """
        files = sorted((self.path / "checkpoints").glob("*.pt"), reverse=True)
        for path in files:
            try:
                content = checkpoints.load(path, "--run-dir")
                if {"step", "config"} <= content.keys():
                    read[path.name] = content
                    return path.name, path.stat().st_size
                reason = f"{path}: no checkpoint of a run"
            except UserError as error:
                reason = str(error)
            self.log(f"warning: {reason}; trying the one before it")
        if files:
            raise UserError(f"--run-dir {self.path}: none of its checkpoints can be read; remove them to start anew")
        return None

    def save(self, step: int, state: dict, *, kept: bool, last: bool = False) -> None:
        """Write ``checkpoints/0050000.pt``, to be ``kept``, which makes a snapshot superfluous, or else the snapshot.

        Waits for a copy of the state to the host only, and for an earlier write; the file is written in a thread.
        ``last``: nothing will change the state any more, so tensors on the host are not copied.
        """
        self.background.submit(self._write, step, on_host(state, copy=not last), kept)

    def _write(self, step: int, state: dict, kept: bool) -> None:
        snapshot = self.path / "checkpoints/latest.pt"
        path = snapshot.with_name(f"{step:07d}.pt") if kept else snapshot
        checkpoints.save(path, {"config": self.config, "step": step} | state)
        if kept:
            snapshot.unlink(missing_ok=True)
            self._drop_old_checkpoints()

    def _drop_old_checkpoints(self) -> None:
        if self.keep:
            for path in sorted((self.path / "checkpoints").glob("[0-9]*.pt"))[: -self.keep]:
                path.unlink()

    def log(self, text: str) -> None:
        """One line to the console and log.txt, from the main rank."""
        if self.context.is_main:
            tqdm.write(text)
            with contextlib.suppress(OSError), self._log_file("a") as file:  # it must not end a run
                file.write(text + "\n")

    def log_scalars(self, kind: str, step: int, scalars: dict[str, float]) -> None:
        """One log line of that kind, and the curves."""
        self.log(f"{kind} {step:07d} " + " ".join(f"{name} {value:.6g}" for name, value in scalars.items()))
        for tracker in self._trackers:
            tracker.scalars(step, scalars)

    def has_logged(self, kind: str, step: int) -> bool:
        """Whether log.txt has a line of that kind for the step."""
        with contextlib.suppress(OSError):
            return any(line.startswith(f"{kind} {step:07d} ") for line in self._log_file("r"))
        return False

    def _log_file(self, mode: str) -> IO[str]:
        """log.txt, where names that are no text stand as escapes."""
        return (self.path / "log.txt").open(mode, encoding="utf-8", errors="backslashreplace")

    @contextmanager
    def open(self, step: int) -> Iterator[None]:
        """The curves, and the thread that writes, while steps after ``step`` are logged and saved."""
        about = self.config | {"options": self._options}
        try:
            with ExitStack() as stack:
                if self.context.is_main:
                    tracked = trackers(self.path, step, about, self._wandb, self.log)
                    self._trackers = stack.enter_context(tracked)
                self.background = stack.enter_context(WriteBehind())
                yield
        finally:
            self.release()

    def release(self) -> None:
        """Give up the folder, with no more checkpoints than are to be kept: a kill may have left others."""
        if self.context.is_main:
            self._drop_old_checkpoints()
            release(self.path)

    def add_preview(self, step: int, draw: Callable[[Path], None]) -> None:
        """Have ``draw`` write the preview of a step, and show it beside the curves."""
        path = self.path / "samples" / f"{step:07d}.png"
        draw(path)
        for tracker in self._trackers:
            tracker.picture(step, path)


def begin(config: dict, results_dir: str, run_dir: str | None) -> str:
    """The folder of the run that this config began, else a new one, claimed for this process."""
    end = time.monotonic() + PATIENCE
    while True:
        folder = find_run(config, results_dir, run_dir)
        try:
            claim(folder, "--run-dir")
        except BusyError:
            if run_dir or began(folder, config) or time.monotonic() > end:
                raise
            time.sleep(0.1)  # another run has just taken this number
            continue
        if read_config(folder) is None or began(folder, config):
            break
        release(folder)  # another run was here between the look and the claim
        if time.monotonic() > end:
            raise UserError(f"--results-dir {results_dir}: other runs take every folder there; give --run-dir")
    if not (folder / "config.json").exists():
        (folder / "checkpoints").mkdir(exist_ok=True)
        write_text(folder / "config.json", json.dumps(config, indent=2))
    return str(folder)


def check_place(results_dir: str, run_dir: str | None) -> None:
    """``UserError`` where no run can be written."""
    writable_folder("--run-dir" if run_dir else "--results-dir", run_dir or results_dir)


def find_run(config: dict, results_dir: str, run_dir: str | None) -> Path:
    """The folder of the run that this config began, else of a new one: ``results/000-DiT-XL-2``."""
    check_place(results_dir, run_dir)
    if run_dir:
        folder = Path(run_dir)
        if folder.is_dir() and not is_fresh(folder):
            found = read_config(folder)
            if found is None:
                raise UserError(f"--run-dir {folder}: the folder holds other files than a run, give a new one")
            if not began(folder, config):
                raise UserError(f"--run-dir {folder}: holds another run: {differences(found, config)}")
        return folder
    runs = sorted(path for path in Path(results_dir).glob("[0-9][0-9][0-9]-*") if path.is_dir())
    for run in runs:
        if began(run, config):
            return run
    number = 1 + max((int(path.name[:3]) for path in runs), default=-1)
    return Path(results_dir) / f"{number:03d}-{model_name(config['model']).replace('/', '-')}"


def began(folder: Path, config: dict) -> bool:
    """Whether this config, maybe with the same autoencoder elsewhere, began the run in a folder."""
    found = read_config(folder)
    return found is not None and not differences(found, config)


def is_fresh(folder: Path) -> bool:
    """Whether a folder holds only the files of a run that was killed before its config was written."""
    checkpoints_of_it = folder / "checkpoints"
    names = {path.name for path in folder.iterdir()} - {LOCK, "config.json.partial", "checkpoints"}
    return not names and not (checkpoints_of_it.is_dir() and any(checkpoints_of_it.iterdir()))


def read_config(folder: Path) -> dict | None:
    """A run's config, None where there is none, or none that can be read."""
    return noted(folder / "config.json")


def on_host(state: Any, copy: bool = True) -> Any:
    """Nested dicts and lists with their tensors on the host; copied, training does not change them any more.

    From a GPU all are copied at once, into pinned memory, which torch keeps for the next time.
    """

    def moved(part: Any) -> Any:
        if isinstance(part, torch.Tensor) and part.device.type == "cuda":
            pinned = torch.empty_like(part, device="cpu", pin_memory=True, requires_grad=False)
            return pinned.copy_(part.detach(), non_blocking=True)
        if isinstance(part, torch.Tensor):
            return part.detach().to("cpu", copy=copy)
        if isinstance(part, dict):
            return {name: moved(value) for name, value in part.items()}
        return [moved(value) for value in part] if isinstance(part, list) else part

    host = moved(state)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return host
