"""Distil a teacher into an S-step student by regression on its stored trajectories (ARD, Eq. 6).

    python train_ARD.py --data-path data/digits --stack 2
    torchrun --nproc_per_node=8 train_ARD.py --model DiT-XL/2 --global-batch-size=64 --stack=6 --data-path data/xl

--mask M1 or --stack 0 is step distillation, --steps 1 is knowledge distillation. To resume, run the same command again.
"""

import argparse
from dataclasses import dataclass
from typing import Any

from costs.commands import add_presets, check_plan, plan_command
from diffusion.teacher_ode import GRIDS, TARGETS, OdeOptions, OnlineBatches, TeacherODE, grid_steps
from evaluations.quality import PeriodicEvaluator, QualityOptions, add_quality_options
from losses import regression_losses
from models import DiT
from models_ard import ARD, MASKS
from models_pixart import MODELS
from runtime import cli, distributed
from runtime.cli import UserError, add_options, chosen, option, read_options
from runtime.precision import autocast, cast_weights, prepare_blocks
from runtime.provenance import require_same
from runtime.randomness import Conditions
from runtime.vae import Pixels, load_same_vae
from sampler import student_previews
from stores import checkpoints
from stores.captions import add_captions_option, open_conditions, require_captions
from stores.trajectories import TrajectoryBatches, TrajectoryStore
from trainer import Optimisation, RunOptions, Trainer, TrainState, add_training_options

PARAMETRIZATIONS = ("raw", "residual")


@dataclass(frozen=True)
class DistilOptions:
    """The student, and what it learns of the teacher's trajectories."""

    model: str | None = option(None, "The teacher's size, as DiT-XL/2; only checked.", choices=MODELS, metavar="NAME")
    steps: int = option(4, "S, the student's steps.", cli.positive)
    mask: str = option("M4", "Points that a step sees: M1 its own .. M4 all before it.", choices=MASKS)
    stack: int | None = option(
        None,
        "N, the lower blocks that see history; without it 6 of 28, or that share of another depth.",
        cli.not_negative,
    )
    target: str = option("x0", "Predict x_0 from the next point, or that point.", choices=TARGETS)
    grid: str = option("even", "Where the points lie on the teacher's trajectory.", choices=GRIDS)
    level_embedding: bool = option(False, "Add a learned vector per step to the tokens.")
    parametrization: str = option(
        "raw",
        "What the heads say: the prediction, or (residual) a velocity along which it lies, as a flow teacher's.",
        choices=PARAMETRIZATIONS,
    )


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__, description="Distil a teacher into a few-step student by regression.")
    add_presets(parser, "train_ARD.py")
    group = parser.add_argument_group("teacher")
    group.add_argument("--data-path", type=cli.folder, help="Store of sample_trajectory.py; or give --online.")
    group.add_argument("--teacher", type=cli.file, help="Teacher's checkpoint; without it, the one the store names.")
    checkpoints.add_file_options(group)
    group.add_argument("--online", action="store_true", help="Make trajectories in each step instead of reading them.")
    group.add_argument(
        "--vae", type=cli.name, help="Load the teacher's autoencoder from this folder or hub id instead of by name."
    )
    add_captions_option(group)
    add_options(parser.add_argument_group("the teacher's ODE, with --online"), OdeOptions)
    add_options(parser.add_argument_group("student"), DistilOptions)
    add_training_options(parser)
    add_quality_options(parser)
    return parser


def open_teacher(
    data_path: str | None,
    teacher: str | None,
    ode_options: OdeOptions,
    *,
    teacher_heads: int | None,
    teacher_process: str | None,
    online: bool,
    seed: int,
    verify: bool,
    vae: str | None,
    captions: str | None,
) -> tuple[DiT, dict, dict, TrajectoryStore | TeacherODE, Conditions]:
    """The teacher, its config, the provenance of its trajectories, where they come from, a store or the ODE, and what
    their labels stand for.
    """
    if online == bool(data_path):
        raise UserError("--data-path: give the folder of a trajectory store, or else --online and --teacher")
    if data_path:
        store = TrajectoryStore(data_path, verify=verify)
        model, config = store.load_teacher(teacher, teacher_heads, teacher_process)
        conditions = open_conditions(captions, model, store.provenance, same_text=True, verify=verify)
        return model, config, store.provenance, store, conditions
    if not teacher:
        raise UserError("--online: needs --teacher, the checkpoint whose trajectories to make")
    model, config = checkpoints.load_teacher(teacher, heads=teacher_heads, vae=vae, process=teacher_process)
    conditions = open_conditions(captions, model, config["provenance"], verify=verify)
    ode = TeacherODE(model, conditions=conditions, **vars(ode_options))
    made = {"seed": seed, "label_policy": "balanced", "online": True}
    return model, config, config["provenance"] | ode.provenance | made, ode, conditions


def build_student(teacher: DiT, solver_steps: int, options: DistilOptions) -> tuple[ARD, list[int]]:
    """The student that is asked for, and after which solver steps its points lie; ``UserError`` if it cannot be."""
    steps, grid, stack = options.steps, options.grid, options.stack
    if options.model:
        size = MODELS[options.model].keywords
        require_same(f"--model {options.model}: the teacher is another model", teacher.config, size)
    try:
        solver_indices = grid_steps(steps, grid, solver_steps)
    except ValueError as error:
        raise UserError(f"--steps {steps} --grid {grid}: {error}") from None
    residual = options.target if options.parametrization == "residual" else None
    if residual and teacher.process == "ddpm":
        raise UserError(
            "--parametrization residual: needs a teacher that predicts velocities, and ddpm's predicts noise"
        )
    try:
        return ARD.from_teacher(teacher, steps, options.mask, stack, options.level_embedding, residual), solver_indices
    except ValueError as error:
        raise UserError(f"--stack {stack}: {error}") from None


def run(args: argparse.Namespace) -> None:
    require_captions(args.captions)
    given = vars(args)
    optimisation, running = read_options(Optimisation, given), read_options(RunOptions, given)
    quality = read_options(QualityOptions, given)
    running.check()
    context = distributed.choose_device(args.device)
    names = ("teacher_heads", "teacher_process", "online", "seed", "verify", "vae", "captions")
    teacher, teacher_config, provenance, source, conditions = open_teacher(
        args.data_path, args.teacher, read_options(OdeOptions, given), **chosen(args, names)
    )
    distil = read_options(DistilOptions, given)
    student, solver_indices = build_student(teacher, provenance["solver_steps"], distil)
    order: dict[str, Any] = {"global_batch_size": args.global_batch_size, "seed": args.seed, "context": context}
    batches: OnlineBatches | TrajectoryBatches
    if isinstance(source, TeacherODE):
        batches, rows = OnlineBatches(student.latent_shape, conditions, **order), None
    else:
        batches = TrajectoryBatches(source, solver_indices, args.target, conditions=conditions, **order)
        rows = len(source)
    vae: Any = Pixels()
    if args.sample_every or args.eval_every or args.vae:
        vae = load_same_vae(teacher_config["vae"], provenance.get("vae_hash"), context.device, args.vae)

    config = {
        "kind": "student",
        "model": student.config,
        "vae": teacher_config["vae"],
        "provenance": provenance | {"grid": args.grid, "solver_indices": solver_indices, "target": args.target},
        "training": optimisation.config() | {"loss": "R"},
    }
    previews = student_previews(student, lambda: state.ema, vae, context.device, args.precision, conditions)
    size = student.input_size * vae.factor
    evaluate = PeriodicEvaluator(previews, context, size, quality) if quality.eval_every else None
    known: dict[str, Any] = {"vae": vae, "rows": rows, "text_tokens": conditions.max_text_tokens}
    plan = plan_command("train_ARD.py", student.config, given, context, teacher=teacher.config, **known)
    check_plan(plan, config, given, context)
    distributed.join(context)
    del teacher  # it lives on in the ODE, if that is to make trajectories
    blocks = {"compile": args.compile, "checkpoint_activations": args.checkpoint_activations}
    prepare_blocks(student, **blocks)
    if isinstance(source, TeacherODE):
        cast_weights(source.teacher, args.precision)
        prepare_blocks(source.teacher.to(context.device), **blocks)
    state = TrainState(student, context, optimisation)
    trainer = Trainer(context, config, {"": state}, optimisation, running, given, previews.save_preview, evaluate)

    for batch in trainer.steps(batches):
        if isinstance(source, TeacherODE):
            with autocast(args.precision, context.device):
                batch = source.complete(batch, solver_indices, args.target)
        for part in state.micro_batches(batch):
            with autocast(args.precision, context.device):
                predictions = state.ddp_model(part["trajectory"][:, :-1], part["y"])
                losses = {"loss": regression_losses(predictions, part["trajectory"])}
            state.backward(losses)
        trainer.end_step(state.step())
    distributed.finish(context)


if __name__ == "__main__":
    cli.main(build_parser(), run)
