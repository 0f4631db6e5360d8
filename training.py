"""What all trainers share: the loop, the optimiser with EMA, run folders, checkpoints, logs. No losses.

The batch of step n is a function of (seed, n) alone and the models use no random numbers, so a checkpoint's step is all
the random state there is: a resumed run equals an uninterrupted one bit for bit on the CPU.
"""

import argparse
import copy
import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import checkpoint
from cli import RunError, UserError, not_negative, positive
from distributed import Ranks, add_device_option
from models import DiT, model_name
from provenance import differences

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16}


def add_training_options(parser, *, lr: float, batch: int, iterations: int) -> None:
    """The options that every trainer has, in groups; the defaults that differ are arguments."""
    group = parser.add_argument_group("optimisation")
    group.add_argument("--global-batch-size", type=positive, default=batch, help="samples of one step over all ranks")
    group.add_argument("--accumulation", type=positive, default=1, help="micro-batches of a rank in one step")
    group.add_argument("--iterations", type=positive, default=iterations, help="optimiser steps in all")
    group.add_argument("--lr", type=float, default=lr, help="AdamW's constant learning rate (weight decay 0)")
    group.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient")
    group.add_argument("--ema-decay", type=float, default=0.9999, help="decay of the weights' moving average a step")
    group.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of matrix products; weights stay fp32")
    group.add_argument("--seed", type=not_negative, default=0, help="of initial weights and data order")
    add_compile_option(group)
    group.add_argument(
        "--checkpoint-activations",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="compute each block's inside again in the backward pass: a third more time, far less memory",
    )
    group = parser.add_argument_group("run")
    group.add_argument("--results-dir", default="results", help="runs are numbered folders in here")
    group.add_argument("--run-dir", help="this very folder instead of a numbered one")
    group.add_argument("--log-every", type=positive, default=100, help="steps between log lines and scalars")
    group.add_argument("--sample-every", type=not_negative, default=10_000, help="steps between sample grids, 0: none")
    group.add_argument("--ckpt-every", type=positive, default=50_000, help="steps between checkpoints that are kept")
    group.add_argument("--snapshot-every", type=positive, default=1_000, help="steps between snapshots to resume from")
    group.add_argument("--num-workers", type=not_negative, default=0, help="processes that read data ahead")
    group.add_argument(
        "--max-bad-steps", type=positive, default=20, help="stop after this many non-finite steps in a row"
    )
    group.add_argument("--dry-run", action="store_true", help="check everything, print the plan as JSON, do nothing")
    add_device_option(group)


def add_compile_option(group) -> None:
    """The ``--compile`` option, the same in every script."""
    group.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=False, help="compile the model's blocks first"
    )


def compile_blocks(model: DiT) -> None:
    """Compile a model's blocks in place; names in its state dict stay, and copies of it are not compiled.

    Block by block: all blocks share the code that is compiled once for each shape and each kind of attention, gradients
    leave each block as soon as they are known (DDP sends them meanwhile), and a block is where all of the time goes.
    """
    torch._dynamo.config.recompile_limit = 64  # for students of many steps: sampling compiles each of them
    for block in model.blocks:
        block.compile(fullgraph=True, dynamic=False)


def prepare_blocks(model: DiT, args) -> None:
    """What ``--checkpoint-activations`` and ``--compile`` say, in place."""
    for block in model.blocks:
        block.recompute = args.checkpoint_activations
    if args.compile:
        compile_blocks(model)


def training_config(args) -> dict:
    """The shared options that change the result: part of a run's identity."""
    names = ("global_batch_size", "lr", "clip", "ema_decay", "precision", "seed")
    return {name: getattr(args, name) for name in names}


class Network:
    """One trained module with all that belongs to it: DDP, AdamW, gradient clipping, an optional EMA.

    Steps whose gradient is not finite are skipped on the device, without waiting for it, and counted.
    """

    def __init__(self, module: nn.Module, ranks: Ranks, lr: float, clip: float, ema_decay: float | None = None):
        self.module = module.to(ranks.device)
        self.ema = copy.deepcopy(self.module).eval().requires_grad_(False) if ema_decay is not None else None
        self.clip, self.ema_decay = clip, ema_decay
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=lr, weight_decay=0.0, fused=True)
        devices = [ranks.device] if ranks.device.type == "cuda" else None
        self.model = DistributedDataParallel(module, device_ids=devices) if ranks.world > 1 else module
        self.skipped = torch.zeros((), device=ranks.device)
        self.skipped_in_a_row = torch.zeros((), device=ranks.device)

    def step(self) -> torch.Tensor:
        """Clip, update the weights (unless the gradient is not finite), clear the gradient, update the EMA.

        Returns the norm of the gradient before clipping, a scalar on the device.
        """
        norm = nn.utils.clip_grad_norm_(self.parameters, self.clip)
        bad = (~norm.isfinite()).float()
        self.optimizer.found_inf, self.optimizer.grad_scale = bad, None  # what GradScaler tells a fused optimiser
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.skipped += bad
        self.skipped_in_a_row = (self.skipped_in_a_row + bad) * bad
        if self.ema is not None:
            averages = [p for p, own in zip(self.ema.parameters(), self.module.parameters()) if own.requires_grad]
            torch._foreach_lerp_(averages, self.parameters, 1 - self.ema_decay)
        return norm

    def state(self, suffix: str = "") -> dict:
        """What a checkpoint holds of this network, under the names that DiT's checkpoints use."""
        state = {f"model{suffix}": self.module.state_dict(), f"opt{suffix}": self.optimizer.state_dict()}
        return state | ({f"ema{suffix}": self.ema.state_dict()} if self.ema is not None else {})

    def load(self, content: dict, what: str, suffix: str = "") -> None:
        """Take up the state of a checkpoint."""
        checkpoint.load_weights(self.module, content[f"model{suffix}"], what)
        self.optimizer.load_state_dict(content[f"opt{suffix}"])
        if self.ema is not None:
            checkpoint.load_weights(self.ema, content[f"ema{suffix}"], what)


class Trainer:
    """A run: its folder, its networks, the loop over steps."""

    def __init__(self, args, ranks: Ranks, config: dict, networks: dict[str, Network]):
        """``config`` is the run's identity and goes into checkpoints; ``networks`` maps a checkpoint suffix to each.

        Finds the run that this very config began and continues it, or begins a new folder. Raises ``UserError`` when
        ``--run-dir`` holds another run.
        """
        if args.global_batch_size < ranks.world * args.accumulation:
            raise UserError(
                f"--global-batch-size {args.global_batch_size}: must be at least ranks x --accumulation = "
                f"{ranks.world * args.accumulation}"
            )
        self.args, self.ranks, self.config, self.networks = args, ranks, config, networks
        self.folder = Path(ranks.from_main(str(find_run(args, config)) if ranks.main else None))
        if ranks.main and not (self.folder / "config.json").exists():
            (self.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            (self.folder / "config.json").write_text(json.dumps(config, indent=2))
        ranks.barrier()
        self.step = 0
        newest = newest_checkpoint(self.folder)
        if newest is not None:
            content = checkpoint.load(newest, "--run-dir")
            for suffix, network in networks.items():
                network.load(content, str(newest), suffix)
            self.step = content["step"]

    def log(self, text: str) -> None:
        """One line to the console and log.txt, from the main rank."""
        if self.ranks.main:
            tqdm.write(text)
            with (self.folder / "log.txt").open("a") as file:
                file.write(text + "\n")

    def save(self, snapshot: bool = False) -> None:
        """Write ``checkpoints/0001000.pt``, or the rolling ``latest.pt`` of a snapshot."""
        if self.ranks.main:
            self._write("latest.pt" if snapshot else f"{self.step:07d}.pt")
            if not snapshot:
                (self.folder / "checkpoints/latest.pt").unlink(missing_ok=True)
        self.ranks.barrier()

    def _write(self, name: str) -> None:
        """Write the whole state to that file."""
        states = [network.state(suffix) for suffix, network in self.networks.items()]
        content = {"config": self.config, "step": self.step} | {k: v for state in states for k, v in state.items()}
        checkpoint.save(self.folder / "checkpoints" / name, content)

    def backward(self, network: Network, losses: Callable[[dict], dict], batch: dict) -> dict[str, torch.Tensor]:
        """Gradient of the mean loss over the global batch, through ``--accumulation`` micro-batches.

        ``losses`` maps a micro-batch to numbers per sample, (b,) each, of which "loss" is minimised. Shares of unequal
        size are weighted right. Returns this rank's part of each number's mean, times the number of ranks (so that the
        mean over ranks is the mean over the global batch).
        """
        weight = self.ranks.world / self.args.global_batch_size  # DDP divides by the number of ranks
        parts = list(zip(*(value.tensor_split(self.args.accumulation) for value in batch.values())))
        totals = {}
        for i, part in enumerate(parts):
            waits = self.ranks.world > 1 and i < len(parts) - 1
            with network.model.no_sync() if waits else nullcontext():
                with autocast(self.args.precision, self.ranks.device):
                    sums = {name: x.float().sum() * weight for name, x in losses(dict(zip(batch, part))).items()}
                sums["loss"].backward()
            totals = {name: totals.get(name, 0) + value.detach() for name, value in sums.items()}
        return totals

    def run(
        self,
        batches: Dataset,
        train_step: Callable[[dict], dict],
        preview: Callable[[Path], None] | None = None,
        evaluate: Callable[[Path], dict] | None = None,
    ) -> None:
        """Train until ``--iterations``: ``train_step`` maps the batch of a step to scalars to log.

        ``preview`` writes a picture, in the main rank; ``evaluate`` returns scalars, in all ranks every
        ``--eval-every`` steps, and may use a folder meanwhile.
        """
        from torch.utils.tensorboard import SummaryWriter

        args, ranks = self.args, self.ranks
        if self.step >= args.iterations:
            self.log(f"{self.folder}: already at step {self.step}, nothing to do")
            return
        self.log(f"{self.folder}: step {self.step} to {args.iterations}, {rank_sizes(args, ranks)}")
        writer = SummaryWriter(str(self.folder), purge_step=self.step + 1) if ranks.main else None
        loader = DataLoader(
            batches,
            batch_size=None,  # the dataset's item n is the whole batch of step n
            sampler=range(self.step, args.iterations),
            num_workers=args.num_workers,
            pin_memory=ranks.device.type == "cuda",
            persistent_workers=args.num_workers > 0,
            worker_init_fn=ignore_sigterm,
        )
        bar = tqdm(total=args.iterations, initial=self.step, unit="step", disable=None if ranks.main else True)
        sums, since, started = {}, 0, time.perf_counter()
        with noted_sigterm() as terminated:
            for batch in loader:
                batch = {name: value.to(ranks.device, non_blocking=True) for name, value in batch.items()}
                for name, value in train_step(batch).items():
                    sums[name] = sums.get(name, 0) + value.detach()
                self.step += 1
                since += 1
                bar.update()
                last = self.step == args.iterations
                if self.step % args.log_every == 0 or last:
                    self._log_scalars(writer, sums, since, time.perf_counter() - started)
                    sums, since, started = {}, 0, time.perf_counter()
                if preview is not None and args.sample_every and (self.step % args.sample_every == 0 or last):
                    if ranks.main:
                        (self.folder / "samples").mkdir(exist_ok=True)
                        preview(self.folder / "samples" / f"{self.step:07d}.png")
                    ranks.barrier()
                if self.step % args.ckpt_every == 0 or last:
                    self.save()
                elif self.step % args.snapshot_every == 0:
                    self.save(snapshot=True)
                if evaluate is not None and (self.step % args.eval_every == 0 or last):
                    self._write_scalars("eval", evaluate(self.folder / "eval"), writer)
                if terminated and not last:
                    self._give_way()
        bar.close()
        if writer:
            writer.close()
        self.log(f"{self.folder}: done at step {self.step}")

    def _give_way(self) -> None:
        """Take a snapshot and stop, alone: every rank has the same state, and the others may be gone already."""
        if self.ranks.main:
            self._write("latest.pt")
            raise RunError(f"{self.folder}: terminated at step {self.step}; the same command continues from there")

    def _log_scalars(self, writer, sums: dict, steps: int, seconds: float) -> None:
        """Average the scalars over steps and ranks, write them, and stop a run that no longer trains."""
        stacked = torch.stack([value / steps for value in sums.values()])
        means = dict(zip(sums, (self.ranks.all_reduce(stacked) / self.ranks.world).tolist()))
        means["steps/s"] = steps / seconds
        skipped = sum(int(network.skipped) for network in self.networks.values())
        self._write_scalars("step", means | ({"skipped": skipped} if skipped else {}), writer)
        in_a_row = max(int(network.skipped_in_a_row) for network in self.networks.values())
        if in_a_row >= self.args.max_bad_steps:
            raise RunError(
                f"the last {in_a_row} steps had non-finite gradients (step {self.step}); the weights are as before "
                f"them and {self.folder}/checkpoints holds the last good state; lower --lr or --clip, or use fp32"
            )

    def _write_scalars(self, kind: str, scalars: dict, writer) -> None:
        """One log line of that kind, and the curves."""
        self.log(f"{kind} {self.step:07d} " + " ".join(f"{name} {value:.6g}" for name, value in scalars.items()))
        if writer:
            for name, value in scalars.items():
                writer.add_scalar(name, value, self.step)


def ignore_sigterm(worker: int) -> None:
    """For data workers, which torchrun signals as well: they end with the process that they work for."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@contextmanager
def noted_sigterm() -> Iterator[list]:
    """A list that is empty until SIGTERM comes, which clusters send before they take a machine away."""
    notes: list = []
    before = signal.signal(signal.SIGTERM, lambda *_: notes.append(True))
    try:
        yield notes
    finally:
        signal.signal(signal.SIGTERM, before)


def autocast(precision: str, device: torch.device):
    """The context in which a model runs: bf16 matrix products, or nothing for fp32."""
    dtype = PRECISIONS[precision]
    return torch.autocast(device.type, dtype) if dtype is not None else nullcontext()


def rank_sizes(args, ranks: Ranks) -> str:
    """How the global batch is shared, in words."""
    sizes = {
        (share.stop - share.start)
        for share in (Ranks(r, ranks.world, ranks.device).share(args.global_batch_size) for r in range(ranks.world))
    }
    each = " or ".join(str(size) for size in sorted(sizes))
    return f"global batch {args.global_batch_size} = {each} on each of {ranks.world} x {ranks.device.type}"


def find_run(args, config: dict) -> Path:
    """The folder of the run that this config began, else a new one: ``results/000-DiT-XL-2``."""
    if args.run_dir:
        folder = Path(args.run_dir)
        if folder.exists() and any(folder.iterdir()):
            found = read_config(folder)
            if found is None:
                raise UserError(f"--run-dir {folder}: the folder holds other files than a run, give a new one")
            if found != config:
                raise UserError(f"--run-dir {folder}: holds another run: {differences(found, config)}")
        return folder
    results = Path(args.results_dir)
    runs = sorted(path for path in results.glob("[0-9][0-9][0-9]-*") if path.is_dir())
    for run in runs:
        if read_config(run) == config:
            return run
    number = 1 + max((int(path.name[:3]) for path in runs), default=-1)
    return results / f"{number:03d}-{model_name(config['model']).replace('/', '-')}"


def read_config(folder: Path) -> dict | None:
    """A run's config, None where there is none."""
    path = folder / "config.json"
    return json.loads(path.read_text()) if path.is_file() else None


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint to resume from: the snapshot, which is removed by every later checkpoint, else the last one."""
    files = sorted((folder / "checkpoints").glob("*.pt"))
    return files[-1] if files else None
