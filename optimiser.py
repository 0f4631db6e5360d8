"""What is trained: a model with its gradient's share of ranks and micro-batches, AdamW, clipping and EMA. No losses."""

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel

from runtime.cli import UserError
from runtime.distributed import DistributedContext, wrapped
from stores import checkpoints

# What ``TrainState`` takes of the options.
STATE_OPTIONS = ("lr", "clip", "ema_decay", "ema_warmup", "global_batch_size", "accumulation")


class TrainState:
    """A model in training with all that belongs to it: DDP, AdamW, gradient clipping, an optional EMA.

    ``raw_model`` is the model itself, ``ddp_model`` the same in DDP (or itself in a single process): the one to call in
    training. Steps whose gradient is not finite are skipped on the device, without waiting for it, and counted.
    """

    def __init__(
        self,
        model: nn.Module,
        context: DistributedContext,
        *,
        lr: float,
        clip: float | None,
        global_batch_size: int,
        accumulation: int = 1,
        ema_decay: float | None = None,
        ema_warmup: bool = False,
    ):
        """``clip`` None clips nothing. ``ema_warmup``: the average begins short and grows until ``ema_decay`` holds.

        ``UserError`` when the batch is too small to be shared.
        """
        if global_batch_size < context.world_size * accumulation:
            raise UserError(
                f"--global-batch-size {global_batch_size}: must be at least ranks x --accumulation = "
                f"{context.world_size * accumulation}"
            )
        self.raw_model: Any = model.to(context.device)
        self.ema: Any = None
        if ema_decay is not None:
            self.ema = copy.deepcopy(self.raw_model).eval().requires_grad_(False)
        self.context, self.clip = context, math.inf if clip is None else clip
        self.ema_decay, self.ema_warmup = ema_decay, ema_warmup
        self.steps = 0
        self.global_batch_size, self.accumulation = global_batch_size, accumulation
        self.parameters: list[torch.Tensor] = [p for p in model.parameters() if p.requires_grad]
        self.optimizer: Any = torch.optim.AdamW(self.parameters, lr=lr, weight_decay=0.0, fused=True)
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
        self.optimizer.found_inf, self.optimizer.grad_scale = bad, None  # what GradScaler tells a fused optimiser
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
        """What to say of an average that will hardly have left its start after so many steps; empty otherwise."""
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
        """What a checkpoint holds of this model, under the names that DiT's checkpoints use."""
        state = {f"model{suffix}": self.raw_model.state_dict(), f"opt{suffix}": self.optimizer.state_dict()}
        return state | ({f"ema{suffix}": self.ema.state_dict()} if self.ema is not None else {})

    def load(self, content: dict, what: str, suffix: str = "") -> None:
        """Take up the state of a checkpoint; ``what`` names it in messages."""
        self.steps = content["step"]
        checkpoints.load_weights(self.raw_model, content[f"model{suffix}"], what)
        self.optimizer.load_state_dict(content[f"opt{suffix}"])
        if self.ema is not None:
            checkpoints.load_weights(self.ema, content[f"ema{suffix}"], what)
