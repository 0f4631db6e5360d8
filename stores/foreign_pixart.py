"""PixArt's weights in diffusers' layout, in terms of ours: names, shapes, and the weights that are folded into others.

    PixArt-alpha/PixArt-Sigma-XL-2-512-MS      (transformer/config.json and its weights), or such a folder

Whether a folder holds a PixArt or a DiT is told by its weights: older configs call both Transformer2DModel. No layout
names its autoencoder, and alpha's and Sigma's both have 4 channels: ``autoencoder`` says where it may come from.
"""

import json
import re
from pathlib import Path

import torch

from models import TimestepEmbedder, sincos_positions
from runtime.cli import UserError
from runtime.vae import latent_space_hash, load_autoencoder, resolve_name
from stores.foreign_weights import RENAMED_CONFIG, State

LATENT_FACTOR = 8  # pixels of a latent's side, for the resolution that alpha's largest model is told

# diffusers' names -> the release's and ours.
RENAMED = {
    "pos_embed.proj": "x_embedder.proj",
    "proj_out": "final_layer.linear",
    "adaln_single.linear": "t_block.1",
    "adaln_single.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "adaln_single.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "caption_projection.linear_1": "y_embedder.y_proj.fc1",
    "caption_projection.linear_2": "y_embedder.y_proj.fc2",
}
RENAMED_BLOCK = {
    "attn1.to_out.0": "attn.proj",
    "attn2.to_q": "cross_attn.q_linear",
    "attn2.to_out.0": "cross_attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}
JOINED = {  # parts of one map of ours, in this order
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
}
SIZE = "adaln_single.emb.{}_embedder.linear_{}.{}"  # of alpha's micro-conditions


def is_pixart(theirs: State) -> bool:
    """Whether weights in diffusers' layout are a PixArt's."""
    return "adaln_single.linear.weight" in theirs


def pixart_config(path: Path, option: str) -> dict:
    """The arguments of ``PixArt`` from the config.json beside its weights. ``UserError`` for any other model."""
    try:
        config = json.loads(path.read_text())
        shape = {ours: int(config[theirs]) for ours, theirs in RENAMED_CONFIG.items() if ours != "num_classes"}
        width = shape["num_heads"] * int(config["attention_head_dim"])
        channels = int(config["caption_channels"])
        scale = config.get("interpolation_scale")
        scale = max(shape["input_size"] // 64, 1) if scale is None else float(scale)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{option} {path}: not the config of a PixArtTransformer2DModel ({error!r})") from None
    fixed = dict(
        norm_type="ada_norm_single",
        activation_fn="gelu-approximate",
        attention_bias=True,
        norm_elementwise_affine=False,
        norm_eps=1e-6,
    )
    for name, value in fixed.items():
        if config.get(name, value) != value:
            raise UserError(f"{option} {path}: {name} is {config[name]!r}, a PixArt has {value!r}")
    return shape | dict(
        hidden_size=width,
        mlp_ratio=4.0,
        class_dropout_prob=0.1,
        learn_sigma=config.get("out_channels") == 2 * shape["in_channels"],
        caption_channels=channels,
        position_scale=float(scale),
    )


def from_diffusers(theirs: State, config: dict) -> State:
    """diffusers' names -> ours; a tensor without counterpart keeps its name, for the strict load to complain about.

    Positions are computed, as diffusers does. What alpha's largest model is told of the image's size is the same for
    all square images: it is added to the embedding of time.
    """
    names = {part: (whole, number) for whole, parts in JOINED.items() for number, part in enumerate(parts)}
    ours: State = {}
    joined: dict[str, dict[int, torch.Tensor]] = {}
    for name, value in theirs.items():
        layer, _, kind = name.rpartition(".")
        block = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", layer)
        table = re.fullmatch(r"(?:transformer_blocks\.(\d+)\.)?scale_shift_table", name)
        if table:
            ours[f"blocks.{table[1]}.{kind}" if table[1] else f"final_layer.{name}"] = value
        elif block and block[2] in names:
            whole, number = names[block[2]]
            joined.setdefault(f"blocks.{block[1]}.{whole}.{kind}", {})[number] = value
        elif block:
            ours[f"blocks.{block[1]}.{RENAMED_BLOCK.get(block[2], block[2])}.{kind}"] = value
        elif name != "pos_embed.pos_embed":
            ours[f"{RENAMED.get(layer, layer)}.{kind}"] = value
    ours |= {
        name: torch.cat([parts[number] for number in sorted(parts)])
        for name, parts in joined.items()
        if len(parts) == len(JOINED[name.split(".", 2)[2].rpartition(".")[0]])
    }
    if SIZE.format("resolution", 1, "weight") in theirs and "t_embedder.mlp.2.bias" in ours:
        sizes = _micro_conditions(theirs, config["input_size"] * LATENT_FACTOR)
        ours["t_embedder.mlp.2.bias"] = ours["t_embedder.mlp.2.bias"].float() + sizes
        ours = {name: value for name, value in ours.items() if "_embedder.linear_" not in name}
    side = config["input_size"] // config["patch_size"]
    return ours | {"pos_embed": sincos_positions(config["hidden_size"], side, config["position_scale"])[None]}


def _micro_conditions(theirs: State, pixels: int) -> torch.Tensor:
    """The embedding of height and width in pixels and of their ratio: (D,)."""
    embedded = []
    for name, values in (("resolution", [pixels, pixels]), ("aspect_ratio", [1])):
        weights = {
            f"{layer}.{kind}": theirs[SIZE.format(name, number, kind)].float()
            for layer, number in ((0, 1), (2, 2))
            for kind in ("weight", "bias")
        }
        embedder = TimestepEmbedder(len(weights["0.bias"]))
        embedder.mlp.load_state_dict(weights)
        embedded.append(embedder(torch.tensor(values)).detach().flatten())
    return torch.cat(embedded)


def autoencoder(source: str | Path, folder: Path, given: str | None, what: str) -> dict[str, str]:
    """ "vae", the name of a PixArt's autoencoder, and "vae_hash" where it lies in a folder, which may change or move.

    It is the ``given`` one, or else that beside the transformer in ``folder``, where ``source`` was found.
    """
    name = resolve_name(given)
    if name is None and (folder / "vae" / "config.json").is_file():
        name = str(source)
    if name is not None and Path(name).is_dir():
        return {"vae": name, "vae_hash": latent_space_hash(load_autoencoder(name))}
    if name is not None:
        return {"vae": name}
    raise UserError(
        f"{what}: does not say its autoencoder; give --vae sdxl for PixArt-Sigma, --vae ema for PixArt-alpha, or the "
        "folder of a pipeline with vae beside transformer"
    )
