"""Shared by all trainers: options, the state that is trained, the loop's two ends, logs and checkpoints. No losses.

    for batch in trainer.steps(batches):                 # a step reads from top to bottom in its script
        for part in state.micro_batches(batch):
            state.backward({"loss": ... state.ddp_model(...) ...})
        trainer.end_step(state.step())

The batch of step n is a function of (seed, n) alone and the models use no random numbers, so a checkpoint's step is all
the random state there is: a resumed run equals an uninterrupted one bit for bit on the CPU.
"""

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset
from tqdm import tqdm

from runtime import cli
from runtime.cli import (
    RunError,
    UserError,
    add_options,
    fraction,
    not_negative,
    not_negative_number,
    option,
    positive,
    positive_number,
)
from runtime.distributed import DistributedContext, add_device_option, read_with_workers, wrapped
from runtime.precision import COMPILE_HELP, TRAINED
from runtime.stop_signals import ended_by, exit_code, notice_signals
from stores import checkpoints
from stores.runs import RunFolder, check_place
from stores.tracking import check_wandb

GPU_WORKERS = 4  # of a rank with a GPU, which must not wait for data; a CPU's cores have enough to do


@dataclass(frozen=True)
class Optimisation:
    """How a model is optimised; the same in every trainer but for some defaults."""

    global_batch_size: int = option(64, "Samples of a step over all ranks.", positive)
    accumulation: int = option(1, "Micro-batches of a rank in a step.", positive)
    iterations: int = option(300_000, "Optimiser steps in all.", positive)
    lr: float = option(1e-4, "Constant learning rate of AdamW.", positive_number)
    lr_warmup: int = option(0, "Steps over which the learning rate rises to --lr, 0 for none.", not_negative)
    clip: float | None = option(1.0, "Clip the gradient to this norm.", positive_number)
    ema_decay: float | None = option(0.9999, "Decay per step of the EMA of weights.", fraction)
    ema_warmup: bool = option(False, "Begin with a decay of 0.1 that grows to --ema-decay, for short runs.")
    precision: str = option("fp32", "Use this number format for matrix products; weights stay fp32.", choices=TRAINED)
    seed: int = option(0, "Seed of initial weights and data order.", not_negative)
    compile: bool = option(False, COMPILE_HELP)
    checkpoint_activations: bool = option(
        False, "Recompute activations in the backward pass: a third more time, far less memory."
    )

    def config(self) -> dict[str, Any]:
        """Those that change the result, as a run's config has them."""
        return {
            "global_batch_size": self.global_batch_size,
            "lr": self.lr,
            "clip": self.clip,
            "ema_decay": self.ema_decay,
            "ema_warmup": self.ema_warmup,
            "precision": self.precision,
            "seed": self.seed,
        } | ({"lr_warmup": self.lr_warmup} if self.lr_warmup else {})


@dataclass(frozen=True)
class RunOptions:
    """A run's folder, and the work between its steps; none of it changes the result."""

    results_dir: str = option("results", "Where runs are numbered folders.", cli.folder)
    run_dir: str | None = option(None, "This very folder instead of a numbered one.", cli.folder)
    log_every: int = option(100, "Steps between log lines.", positive)
    wandb: str | None = option(
        None,
        "Log to this project of Weights & Biases as well; with WANDB_MODE=offline its files stay in the run.",
        cli.name,
        nargs="?",
        const="ard",
        metavar="PROJECT",
    )
    sample_every: int = option(10_000, "Steps between previews, 0 for none.", not_negative)
    ckpt_every: int = option(50_000, "Steps between checkpoints that are kept.", positive)
    snapshot_minutes: float = option(10.0, "Minutes between snapshots to resume from, 0 for none.", not_negative_number)
    snapshot_every: int = option(0, "Steps between more of them, 0 for none.", not_negative)
    keep: int = option(0, "Checkpoints that are kept, 0 for all.", not_negative)
    num_workers: int | None = option(
        None,
        f"Processes of a rank that read data ahead; without it, {GPU_WORKERS} for a GPU and none for a CPU.",
        cli.workers,
    )
    verify: bool = option(False, "Compare each shard's checksum when it is first read.", action="store_true")
    max_bad_steps: int = option(20, "Non-finite steps in a row that end the run.", positive)

    def check(self) -> None:
        """``UserError`` where no run can be written, or followed by a tracker."""
        check_place(self.results_dir, self.run_dir)
        check_wandb(self.wandb)

    @property
    def place(self) -> dict[str, str | None]:
        """The option that says where the run goes, and its value."""
        return {"--run-dir": self.run_dir} if self.run_dir else {"--results-dir": self.results_dir}


class Evaluation(Protocol):
    """A call returns scalars, on all ranks, and may use a folder meanwhile."""

    every: int  # steps between two of them

    def __call__(self, folder: Path) -> dict[str, float]: ...


def add_training_options(parser: cli.Parser, **defaults: Any) -> None:
    """The options that every trainer has, in groups; ``defaults`` of a script's own."""
    add_options(parser.add_argument_group("optimisation"), Optimisation, **defaults)
    group = parser.add_argument_group("run")
    add_options(group, RunOptions)
    cli.add_dry_run_option(group)
    add_device_option(group)


class TrainState:
    """A model in training with all that belongs to it: DDP, AdamW, gradient clipping, an optional EMA.

    ``raw_model`` is the model itself, ``ddp_model`` the same in DDP (or itself in a single process): the one to call in
    training. Steps whose gradient is not finite are skipped on the device, without waiting for it, and counted.
    """

    def __init__(self, model: nn.Module, context: DistributedContext, options: Optimisation):
        """With ``clip`` None nothing is clipped, with ``ema_decay`` None there is no EMA.

        ``UserError`` when the batch is too small to be shared.
        """
        parts = context.world_size * options.accumulation
        if options.global_batch_size < parts:
            raise UserError(
                f"--global-batch-size {options.global_batch_size}: must be at least ranks x --accumulation = {parts}"
            )
        self.raw_model: Any = model.to(context.device)
        self.ema: Any = None
        if options.ema_decay is not None:
            self.ema = copy.deepcopy(self.raw_model).eval().requires_grad_(False)
        self.context, self.clip = context, math.inf if options.clip is None else options.clip
        self.ema_decay, self.ema_warmup = options.ema_decay, options.ema_warmup
        self.steps, self.lr, self.lr_warmup = 0, options.lr, options.lr_warmup
        self.global_batch_size, self.accumulation = options.global_batch_size, options.accumulation
        self.parameters: list[torch.Tensor] = [p for p in model.parameters() if p.requires_grad]
        self.optimizer: Any = torch.optim.AdamW(self.parameters, lr=options.lr, weight_decay=0.0, fused=True)
        self.ddp_model = wrapped(model, context)
        self.skipped = torch.zeros((), device=context.device)
        self.skipped_in_a_row = torch.zeros((), device=context.device)
        self._scalars: dict[str, torch.Tensor] = {}

    def micro_batches(self, batch: dict[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
        """The batch in ``--accumulation`` parts; ranks exchange gradients in the last one's backward pass only."""
        for i in range(self.accumulation):
            part = {name: value.tensor_split(self.accumulation)[i] for name, value in batch.items()}
            if isinstance(self.ddp_model, DistributedDataParallel) and i < self.accumulation - 1:
                with self.ddp_model.no_sync():
                    yield part
            else:
                yield part

    def backward(self, losses: dict[str, torch.Tensor]) -> None:
        """Add a micro-batch's part of the gradient of the mean loss over the global batch.

        ``losses`` are numbers per sample, (b,) each, of which "loss" is minimised and all are logged. Shares of unequal
        size are weighted right.
        """
        weight = self.context.world_size / self.global_batch_size  # DDP divides by the number of ranks
        sums = {name: value.float().sum() * weight for name, value in losses.items()}
        sums["loss"].backward()
        for name, value in sums.items():
            self._scalars[name] = self._scalars.get(name, 0) + value.detach()

    def step(self) -> dict[str, torch.Tensor]:
        """Clip, update the weights (unless the gradient is not finite), clear the gradient, update the EMA.

        Returns scalars on the device: this rank's part of the mean of each number that ``backward`` was given, times
        the number of ranks (so that the mean over ranks is the mean over the global batch), and "grad_norm" before
        clipping.
        """
        norm = nn.utils.clip_grad_norm_(self.parameters, self.clip)
        bad = (~norm.isfinite()).float()
        self.optimizer.found_inf, self.optimizer.grad_scale = bad, None  # GradScaler's message to a fused optimiser
        if self.lr_warmup:
            self.optimizer.param_groups[0]["lr"] = self.lr * min(1.0, (self.steps + 1) / self.lr_warmup)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.skipped += bad
        self.skipped_in_a_row = (self.skipped_in_a_row + bad) * bad
        if self.ema_decay is not None:
            pairs = zip(self.ema.parameters(), self.raw_model.parameters(), strict=True)
            averages = [average for average, own in pairs if own.requires_grad]
            decay = self.ema_decay
            if self.ema_warmup:
                decay = min(decay, (1 + self.steps) / (10 + self.steps))
            torch._foreach_lerp_(averages, self.parameters, 1 - decay)
        self.steps += 1
        scalars, self._scalars = self._scalars | {"grad_norm": norm}, {}
        return scalars

    def ema_remark(self, iterations: int) -> str:
        """A warning of an average that will hardly have left its start after ``iterations``; empty otherwise."""
        window = 0 if self.ema_decay is None or self.ema_warmup else round(1 / (1 - self.ema_decay))
        if window <= iterations:
            return ""
        return (
            f"the EMA is over about {window} steps and keeps much of its start in --iterations {iterations}: give "
            f"--ema-warmup, or less than --ema-decay {self.ema_decay}, if it is what you will sample"
        )

    def checksum(self) -> torch.Tensor:
        """A number that tells weights apart: their sum in float64, a scalar on the device."""
        return torch.stack([p.detach().double().sum() for p in self.parameters]).sum()

    def state(self, suffix: str = "") -> dict:
        """The checkpoint's entries of this model, under the names of DiT's checkpoints."""
        state = {f"model{suffix}": self.raw_model.state_dict(), f"opt{suffix}": self.optimizer.state_dict()}
        return state | ({f"ema{suffix}": self.ema.state_dict()} if self.ema is not None else {})

    def load(self, content: dict, what: str, suffix: str = "") -> None:
        """Take up the state of a checkpoint; ``what`` names it in messages."""
        self.steps = content["step"]
        checkpoints.load_weights(self.raw_model, content[f"model{suffix}"], what)
        self.optimizer.load_state_dict(content[f"opt{suffix}"])
        if self.ema is not None:
            checkpoints.load_weights(self.ema, content[f"ema{suffix}"], what)


class Trainer:
    """A run: its folder, its steps, what happens between them."""

    def __init__(
        self,
        context: DistributedContext,
        config: dict,
        states: dict[str, TrainState],
        optimisation: Optimisation,
        run: RunOptions,
        given: dict | None = None,
        preview: Callable[[Path], None] | None = None,
        evaluate: Evaluation | None = None,
    ):
        """Finds the run that this very ``config`` began and continues it, or begins a new folder.

        ``states`` maps the suffix of its names in checkpoints to each model in training. ``given`` are all options, for
        a tracker to show. ``preview`` writes a picture, in the main rank. ``UserError`` when ``run.run_dir`` holds
        another run.
        """
        self.context, self.states, self.run, self.iterations = context, states, run, optimisation.iterations
        self.batch_sizes = context.describe_batch(optimisation.global_batch_size)
        workers_of_device = GPU_WORKERS if context.device.type == "cuda" else 0
        self.num_workers = workers_of_device if run.num_workers is None else run.num_workers
        self.preview, self.evaluate = preview, evaluate
        where = cli.chosen(run, ("results_dir", "run_dir", "keep", "wandb"))
        self.folder = RunFolder(config, context, **where, options=given)
        self.step = 0
        newest = self.folder.newest_checkpoint()
        if newest is not None:
            file, content = newest
            for suffix, state in states.items():
                state.load(content, str(file), suffix)
            self.step = content["step"]
        for state in states.values():
            if not context.agree(state.checksum()):
                raise RunError(f"{self.folder.path}: the ranks begin step {self.step} with different weights")
        self._progress = tqdm(disable=True)
        self._signals: list[int] = []
        self._saved = 0.0
        self._sums: dict[str, torch.Tensor] = {}
        self._summed, self._since = 0, 0.0

    def steps(self, batches: Dataset) -> Iterator[dict[str, torch.Tensor]]:
        """The batches of the steps that are left, on the device; each is to be trained on and ended by ``end_step``.

        Item n of ``batches`` is this rank's whole batch of step n.
        """
        if self.step >= self.iterations and not self._evaluation_is_due():
            self.folder.log(f"{self.folder.path}: already at step {self.step}, nothing to do")
            self.folder.release()
            return
        self.folder.log(f"{self.folder.path}: step {self.step} to {self.iterations}, {self.batch_sizes}")
        for remark in filter(None, (state.ema_remark(self.iterations) for state in self.states.values())):
            self.folder.log(remark)
        steps, pin_memory = range(self.step, self.iterations), self.context.device.type == "cuda"
        quiet = None if self.context.is_main else True  # None: unless this is a terminal
        bar = tqdm(total=self.iterations, initial=self.step, unit="step", disable=quiet)
        with bar as self._progress, self.folder.open(self.step):
            self._evaluate_if_due()  # the evaluation that a kill after the last checkpoint prevented
            self._saved = time.monotonic()
            with notice_signals() as self._signals:
                self._since = time.perf_counter()
                for batch in read_with_workers(batches, steps, self.num_workers, pin_memory):
                    yield {name: value.to(self.context.device, non_blocking=True) for name, value in batch.items()}
        self.folder.log(f"{self.folder.path}: done at step {self.step}")

    def end_step(self, scalars: dict[str, torch.Tensor]) -> None:
        """Count the step, add up its values to log, and do the work that is due: logs, preview, checkpoint, evaluation.

        Raises ``RunError`` when the run no longer trains, or was told to stop.
        """
        for name, value in scalars.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach()
        self.step += 1
        self._summed += 1
        self._progress.update()
        last = self.step == self.iterations
        if self.step % self.run.log_every == 0 or last:
            self._log_scalars()
        if self.preview is not None and self.run.sample_every and (self.step % self.run.sample_every == 0 or last):
            if self.context.is_main:
                self.folder.add_preview(self.step, self.preview)
            self.context.barrier()
        kept = self.step % self.run.ckpt_every == 0 or last
        if self.context.is_main:
            if kept:
                self._save(kept=True, last=last)
            elif self._snapshot_is_due() and not self._skipping():
                self._save(kept=False)
        if kept or self._snapshot_is_due_by_steps():
            self.context.barrier()  # the main rank may wait for an earlier write, and a slow disk may take its time
        self._evaluate_if_due()
        if self._signals and not last and self.context.is_main:
            # Alone: every rank has the same state, and the others may be gone already.
            self._save(kept=False, last=True)
            self.folder.background.wait()
            ended, code = ended_by(self._signals[0]), exit_code(self._signals[0])
            text = f"{self.folder.path}: {ended} at step {self.step}; the same command continues from there"
            raise RunError(text, code)

    def _evaluate_if_due(self) -> None:
        if self.evaluate is not None and self._evaluation_is_due():
            self.folder.log_scalars("eval", self.step, self.evaluate(self.folder.path / "eval"))

    def _evaluation_is_due(self) -> bool:
        """When ``evaluate.every`` steps are over, and at the last one; once."""
        if self.evaluate is None or not self.step:
            return False
        due = self.step % self.evaluate.every == 0 or self.step == self.iterations
        return due and not self.context.on_main(lambda: self.folder.has_logged("eval", self.step))

    def _save(self, kept: bool, last: bool = False) -> None:
        """Have the state of all models written in the background; ``last`` when no step will follow."""
        states = [state.state(suffix) for suffix, state in self.states.items()]
        self.folder.save(self.step, {k: v for state in states for k, v in state.items()}, kept=kept, last=last)
        self._saved = time.monotonic()

    def _snapshot_is_due(self) -> bool:
        """Whether steps or minutes say so; by minutes only where the last one is written already."""
        overdue = self.run.snapshot_minutes and time.monotonic() - self._saved > 60 * self.run.snapshot_minutes
        return self._snapshot_is_due_by_steps() or bool(overdue and not self.folder.background.busy)

    def _snapshot_is_due_by_steps(self) -> bool:
        return bool(self.run.snapshot_every) and self.step % self.run.snapshot_every == 0

    def _log_scalars(self) -> None:
        """Average the scalars over steps and ranks, write them, and stop a run that no longer trains."""
        stacked = torch.stack([value / self._summed for value in self._sums.values()])
        means = (self.context.all_reduce(stacked) / self.context.world_size).tolist()
        scalars = dict(zip(self._sums, means, strict=True))
        scalars["steps/s"] = self._summed / (time.perf_counter() - self._since)
        skipped = sum(int(state.skipped) for state in self.states.values())
        self.folder.log_scalars("step", self.step, scalars | ({"skipped": skipped} if skipped else {}))
        self._sums, self._summed, self._since = {}, 0, time.perf_counter()
        if self._skipping() >= self.run.max_bad_steps:
            raise RunError(
                f"the last {self._skipping()} steps had non-finite gradients (step {self.step}) and changed nothing; "
                f"{self.folder.path}/checkpoints is from before them; begin another run with a lower --lr or --clip"
            )

    def _skipping(self) -> int:
        """How many steps in a row had non-finite gradients by now."""
        return max(int(state.skipped_in_a_row) for state in self.states.values())
