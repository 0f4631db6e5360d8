"""Weights that other projects made: where they are found, and their names and shapes in terms of ours.

    official        a state dict with DiT's own names: DiT-XL-2-256x256.pt, or a checkpoint of DiT's training script;
                    SiT's and REPA's have the same names and shapes, and another process (diffusion/)
    diffusers       a folder with DiTTransformer2DModel's config.json and weights: facebook/DiT-XL-2-256
    the authors'    a state dict of their ARD re-implementation: DiT's names and the heads final_layer .. final_layer4

Everything here maps names and shapes; ``checkpoints.py`` reads the files and loads the result strictly. No layout names
its autoencoder: models of 4 channels are taken to work on Stable Diffusion's latents, others on pixels.
"""

import argparse
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from models import DiT_models, sincos_positions
from models_pixart import named_shape
from runtime.cli import FETCHING, AbsentError, UserError, shortened
from runtime.files import DIFFUSERS_STEM as STEM
from runtime.files import cached_download, cached_model, json_object
from runtime.paths import is_hub_id, missing
from runtime.vae import NAMES

State = dict[str, torch.Tensor]

URL = "https://dl.fbaipublicfiles.com/DiT/models/"
DROPBOX = "https://www.dl.dropboxusercontent.com/scl/fi/"
OFFICIAL = {  # where each is to be had
    "SiT-XL-2-256x256.pt": DROPBOX + "as9oeomcbub47de5g4be0/SiT-XL-2-256.pt?rlkey=uxzxmpicu46coq3msb17b9ofa&dl=1",
    "DiT-XL-2-256x256.pt": URL + "DiT-XL-2-256x256.pt",
    "DiT-XL-2-512x512.pt": URL + "DiT-XL-2-512x512.pt",
}
REPA = "REPA-XL-2-256x256.pt"  # so called here: its authors' file is last.pt
PROCESS_OF_NAME = {"DiT": "ddpm", "SiT": "sit", "REPA": "repa"}  # how official names begin

#################################################################################
#                             Where they are found                              #
#################################################################################


def find(source: str | Path, option: str) -> Path:
    """The file or folder that an option names: a path, one of ``OFFICIAL``, or a hub id such as facebook/DiT-XL-2-256.

    Names are looked up in the caches of torch.hub (TORCH_HOME) and Hugging Face (HF_HOME) and downloaded into them.
    ``UserError`` names the file to fetch, and its place, when that fails.
    """
    path = Path(source)
    if path.exists():
        return path
    if str(source) in OFFICIAL:
        # No checksum of these files is published. In its place stands the strict load (every name, shape and
        # finite value) and the hash of the weights, which all artefacts record as teacher_hash.
        return cached_download(OFFICIAL[str(source)], f"{option} {source}", name=str(source))
    if str(source) == REPA:
        raise UserError(
            f"{option} {source}: no such file; fetch last.pt, which github.com/sihyun-yu/REPA links, and give its path"
        )
    if shape_by_name(str(source)) or is_hub_id(str(source)):
        return snapshot(
            str(source), option, "--include 'transformer/*' ", lambda: cached_model(str(source), "transformer")
        )
    raise UserError(
        f"{option} {source}: {missing(path, 'file')}; give a checkpoint, a folder in diffusers' layout, a hub id such "
        f"as facebook/DiT-XL-2-256, {', '.join([*OFFICIAL][:-1])} or {[*OFFICIAL][-1]}"
    )


def shape_by_name(source: str) -> dict | None:
    """The model's arguments for an official name, or a hub id, before its file is here; None for other names."""
    known = re.fullmatch(r"(?:facebook/)?(DiT-XL)-(2)-(256|512)(?:x\3\.pt)?", source)
    known = known or re.fullmatch(r"(SiT-XL|REPA-XL)-(2)-(256)x256\.pt", source)
    known = known or re.fullmatch(r"PixArt-alpha/(PixArt)-Sigma-XL-(2)-(256|512|1024)(?:-MS)?", source)
    if known is None:
        return None
    kind, side = known[1].removesuffix("-XL"), int(known[3]) // 8
    of_kind: dict[str, dict] = {
        "PixArt": {"position_scale": side / 64},
        "SiT": {"process": "sit"},
        "REPA": {"process": "repa", "learn_sigma": False},
    }
    size = named_shape(f"{kind if kind == 'PixArt' else 'DiT'}-XL/{known[2]}")
    return size | {"input_size": side} | of_kind.get(kind, {})


def snapshot(repository: str, option: str, files: str, fetch: Callable[[], Path]) -> Path:
    """What ``fetch`` has of a Hugging Face repository. ``UserError`` where it has nothing: ``files`` are to be fetched,
    as an option of ``hf download``.
    """
    try:
        return fetch()
    except Exception as error:  # huggingface_hub raises many kinds for no network, no repository, no permission
        if not FETCHING.get():
            raise AbsentError(
                f"{option} {repository}: nothing here is called so, it would be fetched from the Hugging Face hub"
            ) from None
        raise UserError(
            f"{option} {repository}: no such folder, and not to be had from the Hugging Face hub; fetch it where there "
            f"is a network, hf download {repository} {files}--local-dir FOLDER, and give FOLDER "
            f"({str(error).splitlines()[0]})"
        ) from None


#################################################################################
#                             DiT's own state dicts                             #
#################################################################################


def official_state(content: dict, weights: str, what: str) -> State:
    """The weights in a file without our config: bare (they count as "ema", as Meta's do), or of DiT's training script.

    ``UserError`` when the file holds no DiT at all, or not these weights.
    """
    sets = {name: content[key] for name, key in KEYS.items() if isinstance(content.get(key), dict)}
    state = (sets or {"ema": content}).get(weights)
    if state is None:
        raise UserError(f"{what}: has no {weights} weights, only {', '.join(sets)}")
    return unwrapped_state(state, what)


KEYS = {"ema": "ema", "raw": "model"}  # under which a training's checkpoint holds these of its weights
FIRST = "x_embedder.proj.weight"  # every DiT has it
STATE_KEYS = ("state_dict", "model_state_dict", "model", "module")  # under which other trainers save all weights
WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")  # torch's own


def unwrapped_state(content: dict, what: str) -> State:
    """The weights without what wraps them: a dictionary that holds them all, a prefix that all names share
    ("module." of DDP, "model." of Lightning), and the names that torch.compile and FSDP put between.

    ``UserError`` names the prefixes where there are several models, or says that there is no DiT.
    """
    key = next((key for key in STATE_KEYS if isinstance(content.get(key), dict)), None)
    if key is not None:
        return unwrapped_state(content[key], what)
    state = {WRAPPERS.sub("", str(name)): value for name, value in content.items() if isinstance(value, torch.Tensor)}
    prefixes = sorted(name.removesuffix(FIRST) for name in state if name == FIRST or name.endswith(f".{FIRST}"))
    if not prefixes:
        raise UserError(f"{what}: holds no model of this project, nor a DiT (no {FIRST})")
    prefix = prefixes[0]
    others = [name for name in state if not name.startswith(prefix)]
    if others:
        raise UserError(
            f"{what}: holds a model under {' and under '.join(prefixes)} and other weights ({shortened(others, 2)}); "
            f"save one model's alone: {{name.removeprefix({prefix!r}): value for name, value in state.items() "
            f"if name.startswith({prefix!r})}}"
        )
    return {name.removeprefix(prefix): value for name, value in state.items()}


def refuse_lightning(content: dict, what: str) -> None:
    """``UserError`` for a LightningDiT, alone or in a checkpoint of its training script, which has a config too."""
    parts = (content, *(part for part in content.values() if isinstance(part, dict)))
    if any(re.fullmatch(r"(.+\.)?blocks\.0\.(mlp\.w12|norm1)\.weight", str(name)) for part in parts for name in part):
        raise UserError(
            f"{what}: a LightningDiT, which this project cannot read: it has RMSNorm, SwiGLU, rotary positions and "
            "VA-VAE's latents; give a DiT, a SiT or a REPA"
        )


def process_argument(process: str | None) -> dict[str, str]:
    """A process as configs and provenances have it: not at all where it is ddpm, or not known."""
    return {} if process in ("ddpm", None) else {"process": str(process)}


def known_process(name: str, content: dict, state: State, what: str) -> str | None:
    """The process of a DiT, a SiT or a REPA in a file of that name: what training scripts say in "args", REPA's own
    layers in the ``state``, the name itself. None where they say nothing, for weights alone look alike.

    ``UserError`` for SiT's other paths and predictions.
    """
    args = content.get("args")
    args = vars(args) if isinstance(args, argparse.Namespace) else args if isinstance(args, dict) else {}
    if "path_type" in args:
        path, prediction = str(args["path_type"]), str(args.get("prediction"))
        if path.lower() != "linear" or prediction not in ("velocity", "v"):
            raise UserError(
                f"{what}: was trained on the path {path} to predict {prediction}; give one of the linear path that "
                "predicts the velocity"
            )
        return "repa" if "enc_type" in args else "sit"
    if any(re.match(r"(projectors|decoder_blocks)\.", name) for name in state):
        return "repa"
    if str(args.get("model")).startswith("DiT"):
        return "ddpm"
    named = re.fullmatch(r"(DiT|SiT|REPA)-.+-\d+x\d+\.(pt|pth|safetensors)", name)
    return PROCESS_OF_NAME[named[1]] if named else None


def from_repa(state: State) -> State:
    """REPA's state dict by DiT's names: without its projectors; older ones call the later blocks ``decoder_blocks``."""
    first = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    ours = {}
    for name, value in state.items():
        later = re.fullmatch(r"decoder_blocks\.(\d+)\.(.+)", name)
        if not name.startswith("projectors."):
            ours[f"blocks.{int(later[1]) + first}.{later[2]}" if later else name] = value
    return ours


def heads_of_size(shape: dict) -> int | None:
    """The attention heads of the size in ``DiT_models`` with this depth, width and patch; None where there is none."""
    names = ("depth", "hidden_size", "patch_size")
    sizes = [build.keywords for build in DiT_models.values()]
    return next((size["num_heads"] for size in sizes if all(size[name] == shape[name] for name in names)), None)


def dit_config(state: State, what: str, heads: int | None = None, heads_option: str = "") -> dict:
    """The arguments of ``DiT`` for a state dict with its names, read off the shapes.

    The number of attention heads leaves no trace in them: it is ``heads``, else ``heads_of_size``. ``UserError`` when
    neither is there (the option could say it), or when shapes contradict each other.
    """
    try:
        width, channels, patch, _ = state["x_embedder.proj.weight"].shape
        tokens = state["pos_embed"].shape[1]
        hidden = state["blocks.0.mlp.fc1.weight"].shape[0]
        rows = state["y_embedder.embedding_table.weight"].shape[0]
        outputs = state["final_layer.linear.bias"].shape[0]
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(f"{what}: not the weights of a DiT (missing or misshapen: {error})") from None
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    shape = dict(depth=depth, hidden_size=width, patch_size=patch)
    heads = heads or heads_of_size(shape)
    if heads is None:
        raise UserError(
            f"{what}: depth {depth}, width {width} and patch {patch} are none of the sizes that this project knows "
            f"({', '.join(DiT_models)}), and the file does not say its number of attention heads"
            + (f": give it by {heads_option}" if heads_option else "")
        )
    ratio = hidden / width
    if int(width * ratio) != hidden:  # rounded down by DiT
        ratio = math.nextafter(ratio, math.inf)
    side = round(tokens**0.5)
    halves = outputs / (patch * patch * channels)
    if side * side != tokens or halves not in (1, 2):
        raise UserError(
            f"{what}: {tokens} positions or {outputs} outputs do not fit a square DiT of {channels} channels"
        )
    return shape | dict(
        num_heads=heads,
        input_size=side * patch,
        in_channels=channels,
        mlp_ratio=ratio,
        class_dropout_prob=0.1,  # of the rows of the label table one is the null label's
        num_classes=rows - 1,
        learn_sigma=halves == 2,
    )


def latent_space(config: dict) -> str | None:
    """The autoencoder of a model whose file does not name one."""
    return NAMES["ema"] if config["in_channels"] == 4 else None


#################################################################################
#                                  diffusers                                    #
#################################################################################

RENAMED_CONFIG = {
    "input_size": "sample_size", "patch_size": "patch_size", "in_channels": "in_channels", "depth": "num_layers",
    "num_heads": "num_attention_heads",
}  # fmt: skip
OWN = {"DiT": {"num_classes": "num_embeds_ada_norm"}, "PixArt": {"caption_channels": "caption_channels"}}
ALWAYS = dict(activation_fn="gelu-approximate", attention_bias=True)
FIXED = {
    "DiT": ALWAYS | dict(norm_type="ada_norm_zero"),
    "PixArt": ALWAYS | dict(norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6),
}
# Ours on the right. Each block of theirs holds a copy of the time's and the label's embedder.
RENAMED = {
    "pos_embed.proj": "x_embedder.proj",
    "proj_out_1": "final_layer.adaLN_modulation.1",
    "proj_out_2": "final_layer.linear",
}
RENAMED_EMBEDDER = {
    "timestep_embedder.linear_1": "t_embedder.mlp.0",
    "timestep_embedder.linear_2": "t_embedder.mlp.2",
    "class_embedder.embedding_table": "y_embedder.embedding_table",
}
RENAMED_BLOCK = {
    "norm1.linear": "adaLN_modulation.1",
    "attn1.to_out.0": "attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}
# Several of theirs, in this order, that are one of ours.
JOINED: dict[str, tuple[str, ...]] = {"attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v")}


def example(folder: Path) -> str:
    """A checkpoint of a run in a folder, or in a folder of runs, for a message."""
    for pattern in ("*.pt", "checkpoints/*.pt", "*/checkpoints/*.pt"):
        found = sorted(folder.glob(pattern), key=lambda path: (path.parent, path.stem.isdecimal(), path.name))
        if found:
            return f", such as {found[-1]}"
    return ""


def diffusers_files(folder: Path, option: str) -> tuple[Path, Path]:
    """Config and weights of the transformer in a folder, which may be that of a whole pipeline."""
    inner = folder / "transformer" if (folder / "transformer").is_dir() else folder
    weights = [inner / f"{STEM}.{kind}" for kind in ("safetensors", "bin") if (inner / f"{STEM}.{kind}").is_file()]
    if not weights or not (inner / "config.json").is_file():
        raise UserError(
            f"{option} {folder}: is a folder without a DiT in diffusers' layout (config.json and {STEM}.safetensors "
            f"or .bin, in it or its sub-folder transformer); give a checkpoint{example(folder)}"
        )
    return inner / "config.json", weights[0]


def diffusers_config(path: Path, option: str, kind: str) -> dict:
    """The arguments of ``DiT``, or of ``PixArt``, from the config.json of diffusers' model of that ``kind``.

    ``UserError`` for any other model.
    """
    try:
        config = json_object(path.read_text())
        shape: dict[str, Any] = {ours: int(config[theirs]) for ours, theirs in (RENAMED_CONFIG | OWN[kind]).items()}
        shape["hidden_size"] = shape["num_heads"] * int(config["attention_head_dim"])
        if kind == "PixArt":
            scale = config.get("interpolation_scale")
            shape["position_scale"] = float(max(shape["input_size"] // 64, 1) if scale is None else scale)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{option} {path}: not the config of a {kind}Transformer2DModel ({error!r})") from None
    for name, value in FIXED[kind].items():
        if config.get(name, value) != value:
            raise UserError(f"{option} {path}: {name} is {config[name]!r}, a {kind} has {value!r}")
    learn_sigma = config.get("out_channels") == 2 * shape["in_channels"]
    return shape | dict(mlp_ratio=4.0, class_dropout_prob=0.1, learn_sigma=learn_sigma)


def renamed(theirs: State, layers: dict[str, str], blocks: dict[str, str], joined: dict[str, tuple[str, ...]]) -> State:
    """diffusers' names -> ours, of layers outside and inside blocks; several of theirs are ``joined`` to one of ours.

    A tensor without counterpart keeps its name, for the strict load to complain about.
    """
    whole_of = {part: whole for whole, parts in joined.items() for part in parts}
    ours: State = {}
    found: dict[tuple[str, str, str], State] = {}
    for name, value in theirs.items():
        layer, _, kind = name.rpartition(".")
        block = re.fullmatch(r"transformer_blocks\.(\d+)\.?(.*)", layer)
        if block and block[2] in whole_of:
            found.setdefault((block[1], whole_of[block[2]], kind), {})[block[2]] = value
            continue
        place = (f"blocks.{block[1]}", blocks.get(block[2], block[2])) if block else (layers.get(layer, layer),)
        ours[".".join(filter(None, (*place, kind)))] = value
    for (block_number, whole, kind), parts in found.items():
        if len(parts) == len(joined[whole]):
            ours[f"blocks.{block_number}.{whole}.{kind}"] = torch.cat([parts[part] for part in joined[whole]])
    return ours


def from_diffusers(theirs: State, config: dict, what: str) -> State:
    """A DiT of diffusers by our names; see ``renamed``.

    Positions are computed where the file lacks them, as current versions of diffusers do. Their DiTTransformer2DModel
    itself deviates from the official model with the same weights: its sinusoids of the time have 127 instead of 128
    intervals between frequencies, and its second norm an epsilon of 1e-5. The weights were trained with the official
    ones, and those are what our model has. ``UserError`` when the blocks' copies of an embedder differ.
    """
    side = config["input_size"] // config["patch_size"]
    ours, others = {"pos_embed": sincos_positions(config["hidden_size"], side)[None]}, {}
    for name, value in theirs.items():
        copied = re.fullmatch(r"transformer_blocks\.\d+\.norm1\.emb\.(.+)\.(\w+)", name)
        if name == "pos_embed.pos_embed":
            ours["pos_embed"] = value
        elif copied and copied[1] in RENAMED_EMBEDDER:
            key = f"{RENAMED_EMBEDDER[copied[1]]}.{copied[2]}"
            if key in ours and not torch.equal(ours[key], value):
                raise UserError(f"{what}: {name} is not that of the other blocks; a DiT has one embedder for them all")
            ours[key] = value
        else:
            others[name] = value
    return ours | renamed(others, RENAMED, RENAMED_BLOCK, JOINED)


#################################################################################
#                             The authors' student                              #
#################################################################################


def authors_student(state: State, what: str) -> tuple[dict, State]:
    """A student of the authors' re-implementation -> the arguments of ``DiT`` plus "steps", and weights by our names.

    Its heads are final_layer, final_layer2, final_layer3, ...: we read them as those of the first (noisiest) to the
    last step. Other entries that we have no name for keep theirs, for the strict load to complain about.
    """
    config = dit_config(state, what)
    ours = {}
    for name, value in state.items():
        head = re.fullmatch(r"final_layer(\d*)\.(.+)", name)
        ours[f"heads.{int(head[1] or 1) - 1}.{head[2]}" if head else name] = value
    found = {int(name.split(".")[1]) for name in ours if name.startswith("heads.")}
    return config | {"steps": 1 + max(found)}, ours
