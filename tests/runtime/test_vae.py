"""The autoencoder: its own scale, published names of weights, number formats, and pixels, which need none.

A tiny AutoencoderKL in diffusers' layout: scale, hash, the cache, names of weights, number formats and compilation;
then pixels in place of latents, and samples that are decoded by the model's own autoencoder.
"""

import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKL
from helpers import arrays, call, random_teacher, refused, save_teacher
from safetensors.torch import load_file, save_file

from runtime.cli import UserError
from runtime.vae import IMAGES_AT_ONCE, VAE, Pixels, decoder_precision, load_vae, resolve_name
from stores.samples import read_provenance

CPU = torch.device("cpu")


@torch.no_grad()
def test_the_autoencoder_scales_by_its_own_config(autoencoder, tmp_path):
    vae, theirs = load_vae(str(autoencoder), CPU), AutoencoderKL.from_pretrained(autoencoder)
    assert (vae.scale, vae.factor, vae.channels) == (0.5, 2, 4)
    x = torch.rand(35, 3, 8, 8) * 2 - 1  # more than the autoencoder takes at once
    posterior = theirs.encode(x).latent_dist
    mean, std = vae.encode(x)
    torch.testing.assert_close(mean, posterior.mean * 0.5, rtol=0, atol=1e-5)
    torch.testing.assert_close(std, posterior.std * 0.5, rtol=0, atol=1e-5)
    torch.testing.assert_close(vae.decode(mean), theirs.decode(posterior.mean).sample, rtol=0, atol=1e-5)
    shutil.copytree(autoencoder, tmp_path / "pipeline" / "vae")
    torch.testing.assert_close(load_vae(str(tmp_path / "pipeline"), CPU).decode(mean), vae.decode(mean))


def test_the_hash_names_what_makes_the_latents(autoencoder, tmp_path):
    """Encoder and scale, wherever they lie and in whatever format they compute; the decoder does not matter."""

    def changed(name, part=None, **config):
        model = AutoencoderKL.from_pretrained(autoencoder, **config)
        for parameter in getattr(model, part).parameters() if part else ():
            parameter.data += 1
        model.save_pretrained(tmp_path / name)
        return load_vae(str(tmp_path / name), CPU).hash

    wanted = load_vae(str(autoencoder), CPU).hash
    assert len(wanted) == 16 and load_vae(str(autoencoder), CPU, "bf16").hash == wanted
    assert changed("copy") == changed("decoder", "decoder") == changed("post", "post_quant_conv") == wanted
    others = {changed("encoder", "encoder"), changed("quant", "quant_conv"), changed("scale", scaling_factor=0.25)}
    assert len(others | {wanted}) == 4 and load_vae(None, CPU).hash is None


@pytest.mark.parametrize("offline", [True, False], ids=["told to be offline", "unreachable"])
def test_without_a_network_what_the_cache_lacks_is_told_at_once(offline, autoencoder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("waits to try again"))
    with pytest.raises(UserError, match=r"^--vae mse: .*hf download stabilityai/sd-vae-ft-mse --local-dir FOLDER"):
        VAE("mse", CPU)
    repository, revision = tmp_path / "models--stabilityai--sd-vae-ft-ema", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / revision).symlink_to(autoencoder)
    vae = VAE("ema", CPU)
    assert vae.name == "stabilityai/sd-vae-ft-ema" and vae.hash == load_vae(str(autoencoder), CPU).hash
    monkeypatch.chdir(autoencoder.parent.parent)  # a folder that looks like a hub id
    assert VAE(f"{autoencoder.parent.name}/{autoencoder.name}", CPU).hash == vae.hash


def test_weights_by_the_published_files_names_are_read(autoencoder, tmp_path):
    """Stable Diffusion's files have the attention's names of diffusers' first versions."""
    folder = shutil.copytree(autoencoder, tmp_path / "old")
    file = folder / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = load_file(file)
    for new, name in old.items():
        state = {key.replace(f"attentions.0.{new}.", f"attentions.0.{name}."): value for key, value in state.items()}
    save_file(state, file, metadata={"format": "pt"})
    latents = torch.randn(2, 4, 4, 4)
    torch.testing.assert_close(VAE(str(folder), CPU).decode(latents), VAE(str(autoencoder), CPU).decode(latents))
    save_file({key: state[key] for key in list(state)[1:]}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"^--vae {folder}: .*its weights lack {list(state)[0]}"):
        VAE(str(folder), CPU)


def test_bf16_is_near_fp32(autoencoder):
    latents = torch.randn(3, 4, 4, 4)
    full, half = (load_vae(str(autoencoder), CPU, precision).decode(latents) for precision in ("fp32", "bf16"))
    assert half.dtype == torch.float32 and 0 < (full - half).abs().max() < 0.05


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")  # of diffusers' code
def test_a_compiled_decoder_takes_one_size_only_and_gives_the_same_images(autoencoder, quick_compiler):
    latents, sizes = torch.randn(20, 4, 4, 4), []
    plain, compiled = (VAE(str(autoencoder), CPU, compile=choice) for choice in (False, True))
    compiled.model.decoder.register_forward_pre_hook(lambda decoder, inputs: sizes.append(len(inputs[0])))
    torch.testing.assert_close(compiled.decode(latents), plain.decode(latents), rtol=0, atol=1e-5)
    assert sizes == [IMAGES_AT_ONCE] * 2 and quick_compiler()


def test_the_decoder_runs_in_bf16_on_gpus_unless_told_otherwise():
    devices = CPU, torch.device("cuda:0")
    assert [decoder_precision("auto", device) for device in devices] == ["fp32", "bf16"]
    assert [decoder_precision("fp32", device) for device in devices] == ["fp32", "fp32"]


def test_a_trainers_autocast_does_not_reach_the_autoencoder(autoencoder):
    vae, x = VAE(str(autoencoder), CPU), torch.rand(2, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        inside = vae.encode(x)
    assert all(torch.equal(a, b) for a, b in zip(inside, vae.encode(x)))


@pytest.mark.parametrize("outside", ["fp32", "bf16"])
def test_products_on_gpus_are_those_of_the_autoencoders_own_precision(outside, autoencoder):
    """--vae-precision fp32 is fp32 in a run in bf16, whose own products may be TF32; tf32 is TF32 without any run."""
    backends, found = (torch.backends.cuda.matmul, torch.backends.cudnn), []

    def note(*_):
        found.append([backend.allow_tf32 for backend in backends])

    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = outside != "fp32"
        for precision in ("fp32", "tf32"):
            vae = VAE(str(autoencoder), CPU, precision)
            vae.model.encoder.register_forward_hook(note)
            vae.model.decoder.register_forward_hook(note)
            vae.decode(vae.encode(torch.rand(1, 3, 8, 8))[0])
        note()
    finally:
        for backend, allowed in zip(backends, before):
            backend.allow_tf32 = allowed
    assert found == [[False] * 2] * 2 + [[True] * 2] * 2 + [[outside != "fp32"] * 2]


def test_pixels_are_their_own_latents():
    pixels, x = load_vae("none", CPU), torch.randn(2, 1, 8, 8)
    assert isinstance(pixels, Pixels) and isinstance(load_vae(None, CPU), Pixels)
    mean, std = pixels.encode(x)
    assert torch.equal(mean, x) and not std.any() and torch.equal(pixels.decode(x), x)
    assert [resolve_name(name) for name in ("none", None, "mse")] == [None, None, "stabilityai/sd-vae-ft-mse"]


def test_samples_of_latents_are_decoded_by_the_models_own_autoencoder(autoencoder, tmp_path, capsys):
    teacher = random_teacher(input_size=6, in_channels=4, num_classes=3)
    path = save_teacher(tmp_path / "teacher.pt", teacher, autoencoder)
    sample = ("--teacher", path, "--num-samples", 2, "--solver-steps", 2, "--out")
    for precision in ("fp32", "bf16"):
        call("sample.py", *sample, tmp_path / f"{precision}.npz", "--vae-precision", precision, "--save-latents")
        found = arrays(tmp_path / f"{precision}.npz")
        assert found["arr_0"].shape == (2, 12, 12, 3) and found["latents"].shape == (2, 4, 6, 6)
    assert read_provenance(tmp_path / "bf16.npz")["decoder_precision"] == "bf16"
    assert "works on latents" in refused(capsys, "sample.py", *sample, tmp_path / "x.npz", "--vae", "none")


def test_sdxls_autoencoder_is_refused_in_fp16(autoencoder, tmp_path):
    path = shutil.copytree(autoencoder, tmp_path / "vae") / "config.json"
    config = json.loads(path.read_text()) | {"scaling_factor": 0.13025, "force_upcast": True}
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match="overflows in fp16, give --vae-precision bf16"):
        VAE(str(tmp_path), torch.device("cpu"), "fp16")
    path.write_text(json.dumps(config | {"force_upcast": False}))
    assert VAE(str(tmp_path), torch.device("cpu"), "fp16").scale == 0.13025
