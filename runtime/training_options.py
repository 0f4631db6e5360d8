"""The options that every trainer has; trainer.py has what is done with them."""

import argparse

from runtime import cli
from runtime.cli import not_negative, positive
from runtime.distributed import add_device_option
from runtime.precision import TRAINED, add_compile_option, add_precision_option

# The options that every trainer has and that change its result; they are part of a run's config.
RESULT_OPTIONS = ("global_batch_size", "lr", "clip", "ema_decay", "ema_warmup", "precision", "seed")
# What ``TrainState`` and ``Trainer`` take of the options.
STATE_OPTIONS = ("lr", "clip", "ema_decay", "ema_warmup", "global_batch_size", "accumulation")
RUN_OPTIONS = (
    *("results_dir", "run_dir", "iterations", "global_batch_size", "log_every", "sample_every", "ckpt_every"),
    *("snapshot_minutes", "snapshot_every", "eval_every", "keep", "num_workers", "max_bad_steps", "wandb"),
)


def add_training_options(parser: cli.Parser, *, lr: float, batch: int, iterations: int) -> None:
    """The options that every trainer has, in groups; the defaults that differ are arguments."""
    group = parser.add_argument_group("optimisation")
    group.add_argument("--global-batch-size", type=positive, default=batch, help="Samples of a step over all ranks.")
    group.add_argument("--accumulation", type=positive, default=1, help="Micro-batches of a rank in a step.")
    group.add_argument("--iterations", type=positive, default=iterations, help="Optimiser steps in all.")
    group.add_argument("--lr", type=cli.positive_number, default=lr, help="Constant learning rate of AdamW.")
    group.add_argument("--clip", type=cli.positive_number, default=1.0, help="Clip the gradient to this norm.")
    group.add_argument("--ema-decay", type=cli.fraction, default=0.9999, help="Decay per step of the EMA of weights.")
    warmup = "Begin with a decay of 0.1 that grows to --ema-decay, for short runs."
    group.add_argument("--ema-warmup", action=argparse.BooleanOptionalAction, default=False, help=warmup)
    add_precision_option(group, of="matrix products; weights stay fp32", choices=TRAINED)
    group.add_argument("--seed", type=not_negative, default=0, help="Seed of initial weights and data order.")
    add_compile_option(group)
    again = "Compute each block's inside again in the backward pass: a third more time, far less memory."
    group.add_argument("--checkpoint-activations", action=argparse.BooleanOptionalAction, default=False, help=again)
    group = parser.add_argument_group("run")
    group.add_argument("--results-dir", type=cli.folder, default="results", help="Where runs are numbered folders.")
    group.add_argument("--run-dir", type=cli.folder, help="This very folder instead of a numbered one.")
    group.add_argument("--log-every", type=positive, default=100, help="Steps between log lines.")
    tracked = "Log to this project of Weights & Biases as well; with WANDB_MODE=offline its files stay in the run."
    group.add_argument("--wandb", type=cli.name, nargs="?", const="ard", metavar="PROJECT", help=tracked)
    group.add_argument("--sample-every", type=not_negative, default=10_000, help="Steps between previews, 0 for none.")
    group.add_argument("--ckpt-every", type=positive, default=50_000, help="Steps between checkpoints that are kept.")
    minutes = "Minutes between snapshots to resume from, 0 for none."
    group.add_argument("--snapshot-minutes", type=cli.not_negative_number, default=10.0, help=minutes)
    group.add_argument("--snapshot-every", type=not_negative, default=0, help="Steps between more of them, 0 for none.")
    group.add_argument("--keep", type=not_negative, default=0, help="Checkpoints that are kept, 0 for all.")
    group.add_argument("--num-workers", type=cli.workers, default=0, help="Processes of a rank that read data ahead.")
    group.add_argument("--verify", action="store_true", help="Compare each shard's checksum when it is first read.")
    group.add_argument("--max-bad-steps", type=positive, default=20, help="Non-finite steps in a row that end the run.")
    cli.add_dry_run_option(group)
    add_device_option(group)
