"""The plan of every command, made from its model's config and its options: ``check_plan`` refuses or shows it.

``add_presets`` tells a script's ``--dry-run`` what follows from names and options alone, where weights or data are
missing.
"""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from costs.flops import count_online_step, meta_model
from costs.plans import Plan, latent_shape_of, plan_gan, plan_samples, plan_sampling, plan_training
from diffusion.teacher_ode import grid_steps
from models_ard import default_history
from models_pixart import named_shape
from presets import TEXT_TEACHERS, preset
from runtime import cli
from runtime.cli import PlanShown, UserError
from runtime.distributed import DistributedContext, launched
from runtime.text import TextEncoder
from runtime.vae import Outline, Pixels
from stores import captions, latents, trajectories
from stores.foreign_weights import shape_by_name
from stores.runs import find_run

TRAINERS = ("train.py", "train_ARD.py", "train_ARD_gan.py")
OF_STUDENTS = ("train_ARD.py", "train_ARD_gan.py", "sample_ARD.py")
SOLVER = ("solver_steps", "cfg_scale", "guidance_interval")


def plan_command(
    script: str,
    config: dict,
    options: dict,
    context: DistributedContext,
    *,
    teacher: dict | None = None,
    rows: int | None = None,
    vae: Outline | Pixels | None = None,
    text_tokens: int = 0,
) -> Plan:
    """Of a script that trains or samples a model of this config, with these options.

    ``teacher`` is the config of a student's teacher, where it is in use; ``rows`` are those of the data. Without a
    ``vae`` that of the public models is counted. ``text_tokens`` are those of the longest caption of a text model.
    """

    def take(*names: str) -> dict[str, Any]:
        return {name: options[name] for name in names}

    if script == "sample_trajectory.py":
        points = len(grid_steps(options["steps"], options["grid"], options["solver_steps"]))
        targets = len(trajectories.kept_targets(options["store"]))
        row = trajectories.row_bytes(latent_shape_of(config), points, targets, options["dtype"])
        return plan_sampling(
            config,
            context,
            amount=f"--num-trajectories {options['num_trajectories']}",
            count=options["num_trajectories"],
            batch_size=options["per_proc_batch_size"],
            row_bytes=row,
            held_bytes=2 * row * min(options["rows_per_shard"], options["num_trajectories"]),  # batches, their shard
            text_tokens=text_tokens,
            **take("precision", *SOLVER),
        )
    if script not in TRAINERS:
        own = take("num_samples", "per_proc_batch_size", "precision", "save_latents")
        own |= {} if script in OF_STUDENTS else take(*SOLVER)
        return plan_samples(config, context, vae=vae, text_tokens=text_tokens, **own)
    known = take("global_batch_size", "accumulation", "iterations", "ckpt_every", "keep")
    known |= take("precision", "compile", "checkpoint_activations")
    known |= {"rows": rows, "vae": vae or Pixels()}
    if script == "train_ARD_gan.py" and teacher:
        return plan_gan(config, teacher, context, **known, **take("d_time", "d_width", "bn_group", "rollout"))
    if options.get("online") and teacher:
        known |= {"frozen": meta_model(teacher)} | take("solver_steps")
        solver = take(*SOLVER) | {"text_tokens": text_tokens}
        known["flops_per_sample"] = partial(count_online_step, config, teacher, **solver)
    return plan_training(config, context, text_tokens=text_tokens, **known)


def plan_latents(
    options: dict, context: DistributedContext, *, count: int, shape: tuple[int, ...], vae: Outline | Pixels
) -> Plan:
    """Of encode_latents.py: ``count`` images that are latents of this shape."""
    row = latents.row_bytes(shape, options["dtype"])
    batch_size = options["per_proc_batch_size"]
    memory = {
        "weights": vae.weights_bytes,
        "batch": 3 * 4 * min(batch_size, count) * options["image_size"] ** 2,
        "rows": 2 * row * min(options["rows_per_shard"], count),  # batches, and the shard of them
    }
    fetch = [] if vae.downloaded else [str(vae.name)]
    return _plan_encoding(options, context, count, count * row, memory, fetch)


def plan_captions(options: dict, context: DistributedContext, *, rows: Sequence[str], encoder: TextEncoder) -> Plan:
    """Of encode_captions.py, counted as if each word were a token: T5's are more."""
    words = [min(len(row.split()) + 1, encoder.max_tokens) for row in rows]
    needed = [captions.row_bytes(count, encoder.channels, row) for count, row in zip(words, rows, strict=True)]
    shard, batch_size = options["rows_per_shard"], options["per_proc_batch_size"]
    memory = {
        "weights": encoder.weights_bytes,
        "batch": 4 * min(batch_size, len(rows)) * max(words) * encoder.channels,
        "rows": 2 * max(sum(needed[i : i + shard]) for i in range(0, len(rows), shard)),
    }
    return _plan_encoding(options, context, len(rows), sum(needed), memory, [])


def _plan_encoding(
    options: dict, context: DistributedContext, count: int, disk: int, memory: dict[str, int], fetch: list[str]
) -> Plan:
    batch_size = options["per_proc_batch_size"]
    steps = math.ceil(len(context.share(count)) / batch_size)
    amount, batch = f"--out {options['out']}", f"--per-proc-batch-size {batch_size}"
    return Plan(amount, batch, disk, memory, steps, epochs=1, fetch=fetch)


def check_plan(
    plan: Plan, about: dict, options: dict, context: DistributedContext, out: str | Path | None = None
) -> None:
    """``ShortageError`` where disk or memory are too small. A dry run ends here, and shows ``about`` and the plan.

    ``about`` is the config of a run, or the provenance of the file ``out``.
    """
    more: dict[str, Any] = {}
    if "run_dir" in options:
        out = find_run(about, options["results_dir"], options["run_dir"])
        ranks = context.describe_batch(options["global_batch_size"])
        more = {"iterations": options["iterations"], "ranks": ranks, "run_dir": str(out)}
    plan.check(out or options["out"], context.device)
    if options["dry_run"]:
        raise PlanShown(about | plan.describe() | more)


def student_shape(teacher: dict, options: dict) -> dict:
    """The config of the student that the options of train_ARD.py make of a teacher with this config."""
    stack = default_history(teacher["depth"]) if options["stack"] is None else options["stack"]
    return teacher | {"steps": options["steps"], "mask": options["mask"], "history_layers": stack}


def estimate(script: str, options: dict) -> dict:
    """The plan for the model that a name or a preset stands for, whose weights or data are not here yet; {} if none."""
    text_teacher = TEXT_TEACHERS.get((options["preset"] or "").removesuffix("-step"))
    named = [shape_by_name(str(name)) for name in (options.get("teacher"), text_teacher)]
    named += [named_shape(options["model"])] if options.get("model") else []
    teacher = next((shape for shape in named if shape), None)
    if teacher is None:
        return {}
    config = teacher
    if script in OF_STUDENTS:
        if script != "train_ARD.py" and None in (options["steps"], options["mask"], options["stack"]):
            return {}  # its checkpoint would say it
        config = student_shape(teacher, options)
    try:
        return plan_command(script, config, options, launched(), teacher=teacher).describe()
    except (UserError, ValueError) as error:  # a model that cannot be, e.g. history deeper than it
        return {"not_counted": str(error)}


def add_presets(parser: cli.Parser, script: str) -> None:
    """``--preset``: the rows of the paper that need this script."""
    parser.add_presets(preset(script), partial(estimate, script))
