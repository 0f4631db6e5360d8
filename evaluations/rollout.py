"""Does it help to train a student on its own history? One run on digits goes on in another way.

    python -m evaluations.rollout CHECKPOINT --data-path STORE --way own --iterations 600 --out own.json

Regression shows a student the teacher's points, but sampling shows it its own, with its errors (exposure bias). Each
way of ``WAYS`` shows it something in between, or its own, for the rest of a run; targets and the loss stay the same
(but those of "relabel"). evaluations.rollout_trials compares them.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import trange

from diffusion.gaussian_diffusion import GaussianDiffusion
from diffusion.teacher_ode import TeacherODE
from evaluations import digits, metrics
from evaluations.exposure import step_errors
from evaluations.results import SAME_TEACHER
from losses import own_history, regression_losses
from models_ard import ARD, TextARD
from runtime import cli
from runtime.cli import UserError
from runtime.distributed import DistributedContext, keep_freed_memory
from runtime.files import must_be_replaceable, read_json, write_text
from runtime.provenance import require_same
from runtime.timing import about_device
from runtime.vae import Pixels
from sampler import Sampler, learned_ode
from stores import checkpoints
from stores.images import digits_images, from_uint8, to_uint8
from stores.trajectories import TrajectoryBatches, TrajectoryStore
from trainer import TrainState

# A training step's trajectory (B, S+1, C, H, W) and labels, and how much of the way is behind (0 .. 1) ->
# the history (B, S, C, H, W) that the student sees, and the trajectory whose points it is to predict.
Way = Callable[[ARD, torch.Tensor, torch.Tensor, float], tuple[torch.Tensor, torch.Tensor]]

CPU = torch.device("cpu")
EVERY = 200  # steps between evaluations of plain training


#################################################################################
#                            What the student is shown                          #
#################################################################################


def plain(student: ARD, trajectory: torch.Tensor, y: torch.Tensor, done: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The teacher's points: the paper's."""
    return trajectory[:, :-1], trajectory


def own(
    student: ARD, trajectory: torch.Tensor, y: torch.Tensor, done: float, share: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Its own points, as it would sample them, in a share of the batch."""
    history, count = trajectory[:, :-1].clone(), round(share * len(y))
    if count:
        history[:count] = own_history(student, trajectory[:count, 0], y[:count])
    return history, trajectory


def ramp(student: ARD, trajectory: torch.Tensor, y: torch.Tensor, done: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Its own points in a share of the batch that grows from none to all."""
    return own(student, trajectory, y, done, share=done)


def mixed(student: ARD, trajectory: torch.Tensor, y: torch.Tensor, done: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Scheduled sampling (Bengio et al. 2015) in two passes: half of the points are what it makes of the true ones."""
    history = trajectory[:, :-1].clone()
    with torch.no_grad():
        made = student(history, y)[:, :-1]  # points 1 .. S-1
    swapped = torch.rand(made.shape[:2]) < 0.5
    history[:, 1:][swapped] = made[swapped]
    return history, trajectory


def noisy(errors: torch.Tensor) -> Way:
    """The teacher's points plus noise as large as the student's ``errors`` (S-1,): costs nothing."""

    def way(student: ARD, trajectory: torch.Tensor, y: torch.Tensor, done: float) -> tuple[torch.Tensor, torch.Tensor]:
        history = trajectory[:, :-1].clone()
        history[:, 1:] += errors.view(-1, 1, 1, 1) * torch.randn(history[:, 1:].shape)
        return history, trajectory

    return way


def relabelled(ode: TeacherODE, ends: list[int], share: float = 0.25) -> Way:
    """Its own points in a share of the batch, and for them what the teacher makes of these points, as in DAgger (Ross
    et al. 2011). ``ends``: the solver steps of all points but the noise. For the target xt, whose next point the
    teacher can tell from any point.
    """

    def way(student: ARD, trajectory: torch.Tensor, y: torch.Tensor, done: float) -> tuple[torch.Tensor, torch.Tensor]:
        history, trajectory = own(student, trajectory, y, done, share)[0], trajectory.clone()
        count = round(share * len(y))
        for k in range(1, len(ends)):
            part = stretch(ode.diffusion, ends[k - 1], ends[k])
            states, _ = part.ddim_trajectory(ode.teacher, history[:count, k], y[:count], *ode.guidance)
            trajectory[:count, k + 1] = states[:, -1]
        return history, trajectory

    return way


def stretch(diffusion: GaussianDiffusion, begin: int, end: int) -> GaussianDiffusion:
    """The part of a solver from its step ``begin`` to ``end``, counted from the noise."""
    kept = slice(diffusion.num_timesteps - end, diffusion.num_timesteps - begin)
    part = copy.copy(diffusion)
    part.timestep_map = diffusion.timestep_map[kept]
    part.alphas_cumprod, part.alphas_cumprod_prev = diffusion.alphas_cumprod[kept], diffusion.alphas_cumprod_prev[kept]
    return part


WAYS = ("plain", "own", "ramp", "mixed", "noise", "relabel")


def way_named(name: str, state: TrainState, batch: dict[str, torch.Tensor], about: dict) -> Way:
    """One of ``WAYS`` for a student; ``batch`` is one to measure its errors on, ``about`` the provenance it has."""
    if name == "noise":
        return noisy(torch.from_numpy(step_errors(state.ema, batch["trajectory"], batch["y"])["own"][:-1]).float())
    if name == "relabel":
        if about["target"] != "xt":
            raise UserError("--way relabel: the teacher's answer to a predicted x_0 is not defined, needs a target xt")
        return relabelled(learned_ode(about), about["solver_indices"])
    return {"plain": plain, "own": own, "ramp": ramp, "mixed": mixed}[name]


#################################################################################
#                                   One trial                                   #
#################################################################################


@torch.no_grad()
def fid(student: ARD, seed: int, count: int) -> float:
    """FID of ``count`` samples to the digits, in the features of evaluations.digits."""
    classifier, found = digits.load(), []
    sampler = Sampler(lambda z, y: student.sample(z, y)[:, -1], student, Pixels(), CPU, seed=seed)
    for start in range(0, count, 500):
        images = sampler(range(start, min(start + 500, count))).images
        found.append(classifier(from_uint8(to_uint8(images)))[0])
    real = classifier(from_uint8(digits_images()[0]))[0]
    return metrics.frechet_distance(*metrics.statistics(torch.cat(found).numpy()), *metrics.statistics(real.numpy()))


def continued(
    checkpoint: Path, store: TrajectoryStore, name: str, iterations: int, every: int, count: int
) -> tuple[dict, dict]:
    """A run of train_ARD.py goes on for so many steps this way: figures of it, and its last checkpoint's content."""
    content, what = checkpoints.load(checkpoint, "checkpoint"), f"checkpoint {checkpoint}"
    student, config = checkpoints.load_student(checkpoint, "checkpoint")
    if "opt" not in content or student.latent_shape != (1, 8, 8) or isinstance(student, TextARD):
        raise UserError(f"{what}: give a whole one of train_ARD.py on digits")
    training, about, context = config["training"], config["provenance"], DistributedContext()
    same = {name: about.get(name) for name in (*SAME_TEACHER, "seed")}
    require_same(f"--data-path {store.folder}: not the trajectories of this run", store.provenance, same)
    options = {key: training[key] for key in ("lr", "clip", "ema_decay", "global_batch_size")}
    state = TrainState(student, context, **options)
    state.load(content, what)
    order: dict[str, Any] = {"global_batch_size": training["global_batch_size"], "seed": training["seed"]}
    batches = TrajectoryBatches(store, about["solver_indices"], about["target"], context=context, **order)
    first, seconds, curve = state.steps, 0.0, []
    torch.manual_seed(training["seed"])
    way = way_named(name, state, batches[first], about)
    state.raw_model.train()
    for step in trange(first, first + iterations, desc=name, disable=None):
        if name == "plain" and step == first:
            curve.append((step, fid(state.ema, training["seed"], count)))
        batch = batches[step]
        began = time.process_time()
        history, trajectory = way(state.raw_model, batch["trajectory"], batch["y"], (step - first) / iterations)
        state.backward({"loss": regression_losses(state.ddp_model(history, batch["y"]), trajectory)})
        state.step()
        seconds += time.process_time() - began
        if step + 1 == first + iterations or (name == "plain" and (step + 1 - first) % every == 0):
            curve.append((step + 1, fid(state.ema, training["seed"], count)))
    figures = {"way": name, "target": about["target"], "steps": config["model"]["steps"], "seed": training["seed"]}
    figures |= {"first": first, "curve": curve, "ms_per_step": 1000 * seconds / iterations, "samples": count}
    figures |= {"student": student.config, "training": training, "provenance": about, "timed": about_device(CPU)}
    return figures, {"config": content["config"], "step": state.steps, **state.state()}


def run(args: argparse.Namespace) -> None:
    must_be_replaceable("--out", args.out, "a trial", lambda path: read_json(path)["curve"])
    torch.set_num_threads(1)
    keep_freed_memory()
    store = TrajectoryStore(args.data_path)
    figures, content = continued(args.checkpoint, store, args.way, args.iterations, args.every, args.num_samples)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if args.keep:
        checkpoints.save(args.out.with_suffix(".pt"), content)
    write_text(args.out, json.dumps(figures, indent=1) + "\n")
    print(f"{args.out}: " + ", ".join(f"FID {value:.3f} at step {step}" for step, value in figures["curve"]))


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__, prog="evaluations.rollout", description="Continue a run on digits in another way.")
    parser.add_argument("checkpoint", type=Path, help="Checkpoint of train_ARD.py, not slim.")
    parser.add_argument("--data-path", type=cli.folder, required=True, help="Its trajectory store.")
    parser.add_argument("--way", choices=WAYS, default="own", help="What the student is shown.")
    parser.add_argument("--iterations", type=cli.positive, default=600, help="Training steps.")
    parser.add_argument(
        "--every", type=cli.positive, default=EVERY, help="Steps between evaluations of plain training."
    )
    parser.add_argument("--num-samples", type=cli.positive, default=5000, help="Samples for an FID.")
    parser.add_argument("--keep", action="store_true", help="Leave the last checkpoint beside the figures.")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the figures.")
    return parser


if __name__ == "__main__":
    cli.main(build_parser(), run)
