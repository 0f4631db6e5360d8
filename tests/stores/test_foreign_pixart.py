"""PixArt's files in diffusers' layout: the accepted ones, and the sentences for others."""

import json

import pytest
import torch
from helpers import save_autoencoder
from safetensors.torch import load_file, save_file
from text_helpers import save_pixart

from runtime.cli import UserError
from runtime.vae import load_vae
from stores import checkpoints

SHAPE = dict(sample_size=8, num_layers=1, num_attention_heads=2, attention_head_dim=8)


@pytest.fixture
def folder(tmp_path):
    """A pipeline's folder with a transformer only."""
    save_pixart(tmp_path / "transformer", **SHAPE)
    return tmp_path


def edit(folder, **changes):
    """Change the transformer's config.json; None removes a value."""
    path = folder / "transformer/config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


def refusal(folder, **options) -> str:
    """The sentence with which a folder is refused."""
    with pytest.raises(UserError) as error:
        checkpoints.load_teacher(folder, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_weights_tell_what_the_config_does_not(folder):
    wanted, config = checkpoints.load_teacher(folder, vae="sdxl")
    assert config["provenance"]["vae"] == "stabilityai/sdxl-vae" and wanted.config["position_scale"] == 1
    edit(folder, _class_name="Transformer2DModel", use_additional_conditions=None)
    found, _ = checkpoints.load_teacher(folder / "transformer", vae="ema")
    assert found.config == wanted.config
    assert all(value.equal(found.state_dict()[name]) for name, value in wanted.state_dict().items())


def test_the_autoencoder_is_beside_the_transformer_or_named(folder):
    assert "--vae sdxl" in refusal(folder) and "--vae sdxl" in refusal(folder, vae="none")
    save_autoencoder(folder / "vae")
    beside, copied = (checkpoints.load_teacher(folder, **vae)[1] for vae in ({}, {"vae": str(folder / "vae")}))
    assert beside["vae"] == str(folder) and copied["vae"] == str(folder / "vae")
    wanted = load_vae(str(folder / "vae"), torch.device("cpu")).hash
    assert beside["provenance"]["vae_hash"] == copied["provenance"]["vae_hash"] == wanted
    named = checkpoints.load_teacher(folder, vae="ema")[1]["provenance"]
    assert named["vae"] == "stabilityai/sd-vae-ft-ema" and "vae_hash" not in named
    save_autoencoder(folder / "vae", seed=1)
    assert checkpoints.load_teacher(folder)[1]["provenance"]["vae_hash"] != wanted


def test_other_models_and_damaged_weights_are_refused(folder):
    edit(folder, norm_type="ada_norm")
    assert "norm_type is 'ada_norm', a PixArt has 'ada_norm_single'" in refusal(folder, vae="sdxl")
    edit(folder, norm_type="ada_norm_single", caption_channels=None)
    assert "not the config of a PixArtTransformer2DModel" in refusal(folder, vae="sdxl")
    edit(folder, caption_channels=12)
    file = folder / "transformer/diffusion_pytorch_model.safetensors"
    state = load_file(file)
    part = "transformer_blocks.0.attn2.to_v.weight"
    save_file({name: value for name, value in state.items() if name != part}, file)
    assert "missing: blocks.0.cross_attn.kv_linear.weight" in refusal(folder, vae="sdxl")
    save_file(state | {part: state[part] * float("nan")}, file)
    assert "NaN" in refusal(folder, vae="sdxl")
    save_file(state | {"strange.weight": state[part].clone()}, file)
    assert "unexpected: strange.weight" in refusal(folder, vae="sdxl")
