"""Where the curves and previews of a run go beside its log: tensorboard's files and, if asked for, Weights & Biases.

Both have ``scalars(step, {name: value})`` and ``picture(step, PNG file)``, and begin with all that the run is: its
config, where provenance stands, and its options. Only the main rank has any.

wandb-id               which run at Weights & Biases this one is, however often it goes on
wandb/                 wandb's files; those of a run that was offline are for `wandb sync` to upload
"""

import json
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from runtime.cli import DISK_ERRORS, UserError
from runtime.files import naming, write_text

UPLOAD_SECONDS = 60.0  # that the end of a run waits for wandb; the files stay


class Tensorboard:
    """Event files in the run's folder; an earlier process's entries after ``step`` are not shown."""

    def __init__(self, folder: Path, step: int, about: dict):
        from torch.utils.tensorboard import SummaryWriter  # seconds to import

        self.folder = folder
        with naming(folder):
            self._writer: Any = SummaryWriter(str(folder), purge_step=step + 1)
            self._writer.add_text("config", f"```\n{json.dumps(about, indent=2, default=str)}\n```", step)

    def scalars(self, step: int, scalars: dict[str, float]) -> None:
        """One point of each curve."""
        with naming(self.folder):
            for name, value in scalars.items():
                self._writer.add_scalar(name, value, step)

    def picture(self, step: int, path: Path) -> None:
        """A preview."""
        with naming(self.folder):
            self._writer.add_image("samples", np.asarray(Image.open(path).convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        """Write the rest."""
        with naming(self.folder):
            self._writer.close()


class Wandb:
    """A run at Weights & Biases, whose steps are in its column "step". It may fail: that is said once and ends it.

    Where it cannot be reached at the start, it is kept offline.
    """

    def __init__(self, folder: Path, project: str, about: dict, log: Callable[[str], None]):
        """``log`` takes the warning."""
        self.folder, self._log = folder, log
        self._run: Any = None
        self._guard(lambda: self._begin(project, json.loads(json.dumps(about, default=str))))

    def _begin(self, project: str, about: dict) -> None:
        from wandb import Settings, init, teardown

        file = self.folder / "wandb-id"
        if not file.exists():
            write_text(file, secrets.token_hex(8))

        def begin(**mode: Any) -> Any:
            return init(
                project=project,
                name=self.folder.name,
                id=file.read_text(),
                resume="allow",
                dir=self.folder,
                config=about,
                allow_val_change=True,  # such as --iterations
                reinit="create_new",  # leave alone a run of the notebook that trains
                settings=Settings(console="off", quiet=True, finish_timeout=UPLOAD_SECONDS),
                **mode,
            )

        try:
            run = begin()
        except Exception as error:
            self._log(f"warning: --wandb: {said(error)}; it is kept in {self.folder}/wandb, for `wandb sync`")
            teardown()  # its process still holds the run
            run = begin(mode="offline")
        # Not wandb's own count of steps, which cannot go back to the snapshot that a killed run continues from.
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        self._run = run

    def _guard(self, act: Callable[[], object]) -> None:
        try:
            act()
        except Exception as error:  # whatever the network, the server and wandb's own process come to
            self._run = None
            self._log(f"warning: --wandb: {said(error)}; the run goes on without it")

    def _add(self, row: dict) -> None:
        if self._run is not None:
            self._guard(lambda: self._run.log(row))

    def scalars(self, step: int, scalars: dict[str, float]) -> None:
        """One point of each curve."""
        self._add({"step": step} | scalars)

    def picture(self, step: int, path: Path) -> None:
        """A preview."""
        from wandb import Image

        self._add({"step": step, "samples": Image(str(path))})

    def close(self, failed: bool = False) -> None:
        """Wait for the upload, but not for long. ``failed``: the run was ended before its last step."""
        if self._run is not None:
            self._guard(lambda: self._run.finish(exit_code=int(failed)))


def said(error: Exception) -> str:
    """The first line of an error, or its kind."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def check_wandb(project: str | None) -> None:
    """``UserError`` where there is a project to log to, but no package that does, or the name cannot be."""
    if project is None:
        return
    try:
        from wandb import Settings  # a folder wandb/ where one works would be no ImportError without the name
    except ImportError:
        raise UserError(
            f"--wandb {project}: needs a package: pip install -r requirements-extra.txt -c constraints.txt"
        ) from None
    try:
        Settings(project=project)
    except Exception as error:  # wandb's and its validator's
        raise UserError(f"--wandb {project[:200]}: {said(error)}") from None


@contextmanager
def trackers(
    folder: Path, step: int, about: dict, project: str | None, log: Callable[[str], None]
) -> Iterator[list[Tensorboard | Wandb]]:
    """Whatever a run is tracked by, while steps after ``step`` are logged."""
    with _threads_quiet_about_disks(), ExitStack() as stack:
        opened: list[Tensorboard | Wandb] = [stack.enter_context(closing(Tensorboard(folder, step, about)))]
        if project:
            opened.append(wandb := Wandb(folder, project, about, log))
            stack.push(lambda kind, *_: wandb.close(failed=kind is not None))
        yield opened


@contextmanager
def _threads_quiet_about_disks() -> Iterator[None]:
    """No traceback of tensorboard's thread when the disk is full: the main thread gets the error and says it."""
    before = threading.excepthook

    def quiet(thrown: threading.ExceptHookArgs) -> None:
        if not (isinstance(thrown.exc_value, OSError) and thrown.exc_value.errno in DISK_ERRORS):
            before(thrown)

    threading.excepthook = quiet
    try:
        yield
    finally:
        threading.excepthook = before
