"""The one owner of checkpoints: tensors and a plain-dict config, read with ``weights_only=True``.

    {"config": {"kind", "model", "vae", "provenance", "training"}, "step": int,
     "model": weights, "ema": weights, "opt": optimiser state}          + what a trainer adds, e.g. its discriminator

``config`` rebuilds the model and says where it comes from. A file may lack "model" and "opt" (a shipped, slim one).
"""

import os
from pathlib import Path

import torch
import torch.nn as nn

from cli import UserError, existing_file, not_negative, positive
from models import DiT, DiT_models
from models_ard import ARD, MASKS
from provenance import require_same, weights_hash


def save(path: str | Path, content: dict) -> None:
    """Write a checkpoint so that a reader, or a crash, never sees half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def load(path: str | Path, option: str) -> dict:
    """Read a checkpoint onto the CPU. ``UserError`` naming ``option`` when it is missing or not a torch file."""
    path = existing_file(option, path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for truncated, foreign and pickled files
        raise UserError(f"{option} {path}: not a readable checkpoint ({str(error).splitlines()[0]})") from None
    if not isinstance(content, dict):
        raise UserError(f"{option} {path}: holds a {type(content).__name__}, a checkpoint is a dictionary")
    return content


def load_weights(model: nn.Module, state: dict[str, torch.Tensor], what: str) -> None:
    """Load weights that must fit exactly and be finite; ``UserError`` names what does not."""
    own = model.state_dict()
    problems = {
        "missing": [name for name in own if name not in state],
        "unexpected": [name for name in state if name not in own],
        "misshapen": [
            f"{name} {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
            for name in own
            if name in state and state[name].shape != own[name].shape
        ],
    }
    found = [f"{kind}: {', '.join(names[:4])}{' ...' * (len(names) > 4)}" for kind, names in problems.items() if names]
    if found:
        raise UserError(f"{what}: the weights do not fit the model ({'; '.join(found)})")
    bad = [name for name, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    if bad:
        raise UserError(f"{what}: the weights hold NaN or infinite values (first in {bad[0]})")
    model.load_state_dict(state)


def _rebuild(path, option: str, kind: str, weights: str, build) -> tuple[nn.Module, dict]:
    """A model built by ``build(config["model"])`` with its weights, and the config; other kinds are refused."""
    content = load(path, option)
    config = content.get("config")
    if not isinstance(config, dict) or config.get("kind") != kind:
        found = f"a {config['kind']}" if isinstance(config, dict) and "kind" in config else "no model of this project"
        raise UserError(f"{option} {path}: holds {found}, give a checkpoint of a {kind}")
    key = {"ema": "ema", "raw": "model"}[weights]
    if key not in content:
        raise UserError(f"{option} {path}: has no {weights} weights")
    model = build(config["model"])
    load_weights(model, content[key], f"{option} {path}")
    origin = {"step": content["step"], "weights_hash": weights_hash(content[key])}
    return model.eval(), {**config, "provenance": config["provenance"] | origin}


def load_teacher(path: str | Path, option: str = "--teacher", weights: str = "ema") -> tuple[DiT, dict]:
    """A teacher and its config, with ``provenance`` {"teacher", "teacher_hash", "teacher_weights", "vae"} filled in."""
    model, config = _rebuild(path, option, "teacher", weights, lambda shape: DiT(**shape))
    provenance = {
        "teacher": str(path),
        "teacher_hash": config["provenance"]["weights_hash"],
        "teacher_weights": weights,
        "vae": config["vae"],
    }
    return model, {**config, "provenance": provenance}


def load_student(path: str | Path, option: str = "--ckpt-path", weights: str = "ema") -> tuple[ARD, dict]:
    """A student, rebuilt without being told its steps, mask or depth of history, and its config."""
    model, config = _rebuild(path, option, "student", weights, lambda shape: ARD(**shape))
    details = {"student": config["model"], "training": config["training"]}
    return model, {**config, "provenance": config["provenance"] | details}


def add_student_options(group) -> None:
    """``--ckpt-path``, and what the authors' commands say of the student in it besides: only checked against it."""
    group.add_argument(
        "--ckpt-path", "--ckpt_path", required=True, help="checkpoint of train_ARD.py or train_ARD_gan.py"
    )
    group.add_argument("--model", choices=DiT_models, metavar="NAME", help="its size, checked if given")
    group.add_argument("--steps", type=positive, help="its steps S, checked if given")
    group.add_argument("--mask", choices=MASKS, help="its mask, checked if given")
    group.add_argument("--stack", type=not_negative, help="its depth of history N, checked if given")


def load_named_student(args, weights: str) -> tuple[ARD, dict]:
    """The student of ``--ckpt-path`` and its config; ``UserError`` when another of the options above contradicts it."""
    student, config = load_student(args.ckpt_path, weights=weights)
    given = {"steps": args.steps, "mask": args.mask, "history_layers": args.stack}
    given |= DiT_models[args.model].keywords if args.model else {}
    given = {name: value for name, value in given.items() if value is not None}
    require_same(f"--ckpt-path {args.ckpt_path}: the options contradict this student", student.config, given)
    return student, config
