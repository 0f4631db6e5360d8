"""PixArt's weights in diffusers' layout, in terms of ours: names, shapes, and the weights that are folded into others.

    PixArt-alpha/PixArt-Sigma-XL-2-512-MS      (transformer/config.json and its weights), or such a folder

Whether a folder holds a PixArt or a DiT is told by its weights: older configs call both Transformer2DModel. No layout
names its autoencoder, and alpha's and Sigma's both have 4 channels: ``autoencoder`` says where it may come from.
"""

from pathlib import Path

import torch

from models import TimestepEmbedder, sincos_positions
from runtime.cli import UserError
from runtime.vae import latent_space_hash, load_autoencoder, resolve_name
from stores import foreign_weights
from stores.foreign_weights import State

MARK = "adaln_single.linear.weight"  # in diffusers' layout every PixArt has it, and no DiT
LATENT_FACTOR = 8  # pixels of a latent's side, for the resolution that alpha's largest model is told

# diffusers' names -> the release's and ours.
RENAMED = {
    "": "final_layer",
    "pos_embed.proj": "x_embedder.proj",
    "proj_out": "final_layer.linear",
    "adaln_single.linear": "t_block.1",
    "adaln_single.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "adaln_single.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "caption_projection.linear_1": "y_embedder.y_proj.fc1",
    "caption_projection.linear_2": "y_embedder.y_proj.fc2",
}
RENAMED_BLOCK = foreign_weights.RENAMED_BLOCK | {
    "attn2.to_q": "cross_attn.q_linear",
    "attn2.to_out.0": "cross_attn.proj",
}
JOINED = foreign_weights.JOINED | {"cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v")}
SIZE = "adaln_single.emb.{}_embedder.linear_{}.{}"  # of alpha's micro-conditions


def from_diffusers(theirs: State, config: dict) -> State:
    """A PixArt of diffusers by our names; see ``foreign_weights.renamed``.

    Positions are computed, as diffusers does. What alpha's largest model is told of the image's size is the same for
    all square images: it is added to the embedding of time.
    """
    stored = {name: value for name, value in theirs.items() if name != "pos_embed.pos_embed"}
    ours = foreign_weights.renamed(stored, RENAMED, RENAMED_BLOCK, JOINED)
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
