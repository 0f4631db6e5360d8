"""The one owner of checkpoints: tensors and a plain-dict config, read with ``weights_only=True``.

    {"config": {"kind", "model", "vae", "provenance", "training"}, "step": int,
     "model": weights, "ema": weights, "opt": optimiser state}          + a trainer's own, e.g. its discriminator

``config`` rebuilds the model and says where it comes from. A file may lack "model" and "opt" (a shipped, slim one).

Weights that other projects made (foreign_weights.py) are loaded here too, by the same strict rules.

    python -m stores.checkpoints slim results/000-DiT-Micro-2/checkpoints/0012000.pt teacher.pt
"""

import argparse
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn as nn
from safetensors.torch import load_file

from models import PROCESS_TIMES, DiT
from models_ard import ARD, MASKS
from models_pixart import MODELS, student_type, teacher_type
from runtime import cli
from runtime.checks import writable_file
from runtime.cli import OptionGroup, UserError, existing_file, not_negative, option, positive, shortened
from runtime.files import DIFFUSERS_STEM, atomic_write, cached_snapshot
from runtime.paths import is_hub_id
from runtime.precision import DTYPES
from runtime.provenance import require_same, weights_hash
from stores import foreign_pixart, foreign_weights

HEADS, PROCESS = "--teacher-heads", "--teacher-process"
Model = TypeVar("Model", bound=DiT)


def save(path: str | Path, content: dict) -> None:
    """Write a checkpoint, whole or not at all."""
    with atomic_write(path) as partial, partial.open("wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # torch has its own word for a full disk, and the system's behind it
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def load(path: str | Path, option: str) -> dict:
    """Read a torch or safetensors file onto the CPU. ``UserError`` naming ``option`` when it is missing or neither."""
    if Path(path).is_dir():
        raise UserError(f"{option} {path}: is a folder, give a checkpoint{foreign_weights.example(Path(path))}")
    path = existing_file(option, path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        damaged = damaged_member(path)
        if damaged:
            raise ValueError(f"its part {damaged} differs from its checksum")
        with torch.serialization.safe_globals([argparse.Namespace]):  # DiT's training script saves its options so
            mapped = zipfile.is_zipfile(path)  # then tensors that are not used take no memory
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch raises many kinds for truncated, foreign and pickled files
        raise UserError(f"{option} {path}: not a readable checkpoint ({explain_load_error(path, error)})") from None
    if not isinstance(content, dict):
        raise UserError(f"{option} {path}: holds a {type(content).__name__}, a checkpoint is a dictionary")
    return content


def weights_bytes(model: nn.Module) -> int:
    """Bytes of a model's weights in a checkpoint, and in memory."""
    return sum(value.nbytes for value in model.state_dict().values())


def moments_bytes(model: nn.Module) -> int:
    """Bytes of AdamW's state in training, two moments of each trained weight."""
    return 2 * sum(value.nbytes for value in model.parameters() if value.requires_grad)


def load_weights(model: nn.Module, state: dict[str, torch.Tensor], what: str, take: bool = False) -> None:
    """Load weights that must fit exactly and be finite; ``UserError`` names the first that does not.

    ``take``: the model takes over the tensors themselves, so that a mapped file is in memory once and not twice.
    """
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
    found = [f"{kind}: {shortened(names, 4)}" for kind, names in problems.items() if names]
    if found:
        raise UserError(f"{what}: the weights do not fit the model ({'; '.join(found)})")
    bad = [name for name, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    if bad:
        raise UserError(f"{what}: the weights hold NaN or infinite values (first in {bad[0]})")
    if take:
        state = {name: value.to(own[name].dtype) for name, value in state.items()}
    model.load_state_dict(state, assign=take)


def _own(content: dict, kind: str, weights: str, what: str) -> tuple[dict, dict]:
    """Config and weights of a checkpoint of this project; other kinds are refused."""
    config = content["config"]
    if config.get("kind") not in (kind, None):
        raise UserError(f"{what}: holds a {config['kind']}, give a checkpoint of a {kind}")
    absent = [name for name in ("kind", "model", "vae", "provenance", "training") if name not in config]
    absent += [name for name in ("model", "provenance") if name in config and not isinstance(config[name], dict)]
    absent += [] if "step" in content else ["step"]
    if absent:
        raise UserError(f"{what}: no whole checkpoint of this project's trainers, it lacks {shortened(absent, 5)}")
    if foreign_weights.KEYS[weights] not in content:
        raise UserError(f"{what}: has no {weights} weights")
    origin = config["provenance"] | {"step": content["step"]}
    return config | {"provenance": origin}, content[foreign_weights.KEYS[weights]]


def _foreign_config(kind: str, shape: dict) -> dict:
    """The provenance of weights that came without a config of ours."""
    return {"kind": kind, "model": shape, "vae": foreign_weights.latent_space(shape), "provenance": {}, "training": {}}


def _build(kind: type[Model], shape: dict, what: str) -> Model:
    """The model of that shape; ``UserError`` where foreign sizes, or options for them, are impossible."""
    try:
        return kind(**shape)
    except ValueError as error:
        raise UserError(f"{what}: {error}") from None
    except (TypeError, ArithmeticError, AttributeError, RuntimeError) as error:
        raise UserError(f"{what}: its config makes no model ({error})") from None


def add_file_options(group: OptionGroup) -> None:
    """``--teacher-heads`` and ``--teacher-process``, beside every ``--teacher``."""
    group.add_argument(HEADS, type=positive, help="Attention heads, where its file has no config and an unknown size.")
    group.add_argument(
        PROCESS,
        choices=PROCESS_TIMES,
        metavar="NAME",
        help=f"One of {', '.join(PROCESS_TIMES)}, where its file does not say what it was trained for; ddpm is DiT's.",
    )


def load_teacher(
    source: str | Path,
    option: str = "--teacher",
    weights: str = "ema",
    heads: int | None = None,
    vae: str | None = None,
    process: str | None = None,
) -> tuple[DiT, dict]:
    """A teacher and its config, with ``provenance`` {"teacher", "teacher_hash", "teacher_weights", "vae"} filled in,
    "process" unless it is ddpm, "vae_hash" if it is known, and the "captions" of a text model that was trained here.

    ``source`` is a checkpoint of ours, an official or diffusers' DiT (file, folder, official name or hub id), a SiT or
    a REPA, or diffusers' PixArt, whose autoencoder is ``vae`` where none is in the same folder. Weights that came alone
    are "ema", as the official ones are. ``heads`` is the number of attention heads where the file does not say it;
    where it is not that of a known size, ``provenance`` has it as "teacher_heads". ``process`` is that of its
    training, where the file does not say it. ``UserError`` names missing or unfitting weights.
    """
    bare = False
    known: str | None = "ddpm"
    path, what = foreign_weights.find(source, option), f"{option} {source}"
    if path.is_dir():
        config_path, weights_path = foreign_weights.diffusers_files(path, option)
        theirs = load(weights_path, option)
        kind = "PixArt" if foreign_pixart.MARK in theirs else "DiT"
        shape = foreign_weights.diffusers_config(config_path, option, kind)
        config = _foreign_config("teacher", shape)
        if kind == "PixArt":
            config |= foreign_pixart.autoencoder(source, path, vae, what)
            state = foreign_pixart.from_diffusers(theirs, shape)
        else:
            state = foreign_weights.from_diffusers(theirs, shape, what)
        state = foreign_weights.official_state(state, weights, what)
    else:
        content = load(path, option)
        foreign_weights.refuse_lightning(content, what)
        if isinstance(content.get("config"), dict):
            config, state = _own(content, "teacher", weights, what)
            known = config["model"].get("process", "ddpm")
        else:
            state = foreign_weights.official_state(content, weights, what)
            known = foreign_weights.known_process(path.name, content, state, what)
            state = foreign_weights.from_repa(state)
            config, bare = _foreign_config("teacher", foreign_weights.dit_config(state, what, heads, HEADS)), True
            config["model"] |= foreign_weights.process_argument(known or process)
    if process and known and process != known:
        raise UserError(f"{what}: is of the process {known}, not of {process}")
    model = _build(teacher_type(config["model"]), config["model"], what)
    own = model.config["num_heads"]
    if heads not in (None, own):
        raise UserError(f"{HEADS} {heads}: {what} has {own}, leave the option out")
    load_weights(model, state, what, take=True)
    if not (known or process):
        alike = "ddpm (a DiT) or sit (a SiT)" if config["model"]["learn_sigma"] else "ddpm, sit or repa"
        says = "--process" if option == "--init" else PROCESS
        raise UserError(f"{what}: its weights do not say what they were trained for, give {says}: {alike}")
    provenance = {
        "teacher": str(source),
        "teacher_hash": weights_hash(state),
        "teacher_weights": weights,
        "vae": config["vae"],
    }
    provenance |= foreign_weights.process_argument(model.process)
    if config.get("vae_hash"):
        provenance["vae_hash"] = config["vae_hash"]
    if bare and own != foreign_weights.heads_of_size(config["model"]):
        provenance["teacher_heads"] = own
    provenance |= {name: about for name in ("class_names", "captions") if (about := config["provenance"].get(name))}
    return model.eval(), {**config, "provenance": provenance}


def recorded_teacher(recorded: str, beside: str | Path) -> str:
    """The teacher that the store or checkpoint ``beside`` records: its path may be relative to a folder above that.

    A wrong file is found by its hash later. ``UserError`` where a path leads nowhere.
    """
    places = [Path(recorded), *(folder / recorded for folder in Path(beside).resolve().parents)]
    found = next((place for place in places if place.exists()), None)
    if found is None and not (recorded in foreign_weights.OFFICIAL or is_hub_id(recorded)):
        raise UserError(
            f"{beside}: records the teacher {recorded}, which lies neither below {Path.cwd()} nor below a folder above "
            "the record; say where it is by --teacher"
        )
    return str(found or recorded)


def load_student(
    path: str | Path, option: str = "--ckpt-path", weights: str = "ema", given: dict | None = None
) -> tuple[ARD, dict]:
    """A student and its config, from a checkpoint or a pipeline (``pipeline_ard.py``), its folder or hub id.

    Ours is rebuilt without being told its steps, mask or depth of history; one of the authors' re-implementation says
    its steps only. ``given`` are the user's options, of {"steps", "mask", "history_layers"} and DiT's arguments: they
    fill in the settings that the authors' file lacks (ARD's defaults otherwise), and a contradiction is refused.
    """
    what, given, place = f"{option} {path}", given or {}, Path(path)
    if not place.exists() and is_hub_id(str(path)):
        place = foreign_weights.snapshot(
            str(path), option, "", lambda: cached_snapshot(str(path), ["*.json"], ["*.safetensors"])
        )
    content = load_pipeline(place, option) or load(place, option)
    if isinstance(content.get("config"), dict):
        config, state = _own(content, "student", weights, what)
    else:
        shape, state = foreign_weights.authors_student(foreign_weights.official_state(content, weights, what), what)
        not_in_the_file = {name: given[name] for name in ("mask", "history_layers") if name in given}
        config = _foreign_config("student", not_in_the_file | shape)
        config["provenance"] = {"student_file": str(path)}
    model = _build(student_type(config["model"]), config["model"], what)
    require_same(f"{what}: the options contradict this student", model.config, given)
    load_weights(model, state, what, take=True)
    details = {"weights_hash": weights_hash(state), "student": model.config, "training": config["training"]}
    return model.eval(), {**config, "model": model.config, "provenance": config["provenance"] | details}


def load_pipeline(folder: Path, option: str) -> dict | None:
    """The content of a checkpoint from the folder that ``ARDPipeline.save_pretrained`` writes; None for other paths."""
    index = folder / "model_index.json"
    if not index.is_file() or "ARDPipeline" not in index.read_text(errors="replace"):
        return None
    try:
        provenance = json.loads(index.read_text())["provenance"]
        shape = json.loads((folder / "transformer/config.json").read_text())["shape"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{option} {folder}: not a whole pipeline of pipeline_ard.py ({error})") from None
    weights = load(folder / f"transformer/{DIFFUSERS_STEM}.safetensors", option)
    vae = folder / "vae"
    config = {"kind": "student", "model": shape, "vae": str(vae) if vae.is_dir() else None}
    config |= {"provenance": provenance, "training": provenance.get("training", {})}
    state = {name.removeprefix("student."): value for name, value in weights.items()}
    return {"config": config, "step": provenance.get("step"), "ema": state}


CHECKED = "only checked against the checkpoint"


@dataclass(frozen=True)
class StudentOptions:
    """A student's checkpoint, and the options by which the authors' commands describe its student."""

    ckpt_path: str = option(
        None, "Checkpoint of train_ARD.py or train_ARD_gan.py, or a pipeline's folder or hub id.", cli.file,
        also=("--ckpt_path",), required=True,
    )  # fmt: skip
    model: str | None = option(None, f"Its size, {CHECKED}.", choices=MODELS, metavar="NAME")
    steps: int | None = option(None, f"Its number of steps S, {CHECKED}.", positive)
    mask: str | None = option(None, f"Its mask, {CHECKED}; the authors' files need it (M4 if absent).", choices=MASKS)
    stack: int | None = option(
        None, f"Its history depth N, {CHECKED}; the authors' files need it (6 if absent).", not_negative
    )


def load_named_student(options: StudentOptions, weights: str = "ema") -> tuple[ARD, dict]:
    """``load_student`` by the options above; ``UserError`` when one of them contradicts the checkpoint."""
    given: dict[str, Any] = {"steps": options.steps, "mask": options.mask, "history_layers": options.stack}
    given |= MODELS[options.model].keywords if options.model else {}
    given = {name: value for name, value in given.items() if value is not None}
    return load_student(options.ckpt_path, weights=weights, given=given)


def explain_load_error(path: Path, error: Exception) -> str:
    """Why a file cannot be read. torch's own words are codes, and advice to load files that may run code."""
    with path.open("rb") as file:
        begin = file.read(2)
    if not begin:
        return "it is empty"
    if path.suffix == ".safetensors":
        return f"damaged, or another format than its name says: {error}".splitlines()[0]
    if isinstance(error, (ValueError, zipfile.BadZipFile, EOFError)):
        return (str(error) or "it is truncated").splitlines()[0]
    if begin == b"PK":
        return "it holds Python objects, which are never loaded" if zipfile.is_zipfile(path) else "it is truncated"
    if begin[:1] == b"\x80":  # torch's format before 1.6, or a plain pickle
        return "it is truncated, or holds Python objects, which are never loaded"
    return "it is no file of torch.save or safetensors"


def damaged_member(path: Path) -> str | None:
    """The first part of a torch file whose content differs from the checksum beside it, which torch does not look at.

    None where all is well, and for files in torch's format before 1.6, which have no checksums. ``ValueError`` for a
    packed part: nobody knows how large it is.
    """
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        for part in archive.infolist():
            if part.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"its part {part.filename} is packed, which PyTorch does not do")
        return archive.testzip()


def slim(args: argparse.Namespace) -> None:
    """Keep a user's part of the model: its config and EMA weights, a fifth of the file, or a tenth in fp16."""
    content = load(args.source, "SOURCE")
    if "ema" not in content or "config" not in content:
        raise UserError(f"SOURCE {args.source}: no checkpoint of this project's trainers")
    if writable_file("OUT", args.out).exists():
        raise UserError(f"OUT {args.out}: the file exists already")
    ema = {name: value.to(DTYPES[args.precision]) for name, value in content["ema"].items()}
    save(args.out, {"config": content["config"], "step": content["step"], "ema": ema})
    print(f"{args.out}: {Path(args.out).stat().st_size / 1e6:.1f} MB")


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__, prog="stores.checkpoints", description="Look after checkpoints.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=cli.Parser)
    command = commands.add_parser("slim", help="Leave out raw weights and optimiser states, to ship a model.")
    command.add_argument("source", metavar="SOURCE", help="Checkpoint of a trainer.")
    command.add_argument("out", metavar="OUT", help="Smaller file to write.")
    command.add_argument("--precision", choices=DTYPES, default="fp32", help="Number format of the weights in it.")
    command.set_defaults(run=slim)
    return parser


run = cli.run_command

if __name__ == "__main__":
    cli.main(build_parser(), run)
