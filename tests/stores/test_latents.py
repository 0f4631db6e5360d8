"""The autoencoder, the latent store, training from either, and models of other shapes from end to end."""

import shutil

import numpy as np
import pytest
import torch
from conftest import call, losses, save_teacher, spawn
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file

from models import DiT_models
from runtime.cli import UserError
from runtime.vae import VAE, load_vae
from stores import checkpoints
from stores.images import ImageFolder, center_crop, from_uint8, latent_shape, open_source
from stores.latents import LatentStore
from stores.samples import read_provenance

CPU = torch.device("cpu")
SIZE, COUNT = 8, 11  # pixels of a side after cropping, images


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    """A tiny AutoencoderKL in diffusers' layout: 4 latent channels, half the side, a scaling factor of its own."""
    torch.manual_seed(0)
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    model = AutoencoderKL(**blocks, block_out_channels=(8, 16), norm_num_groups=4, scaling_factor=0.5)
    folder = tmp_path_factory.mktemp("vae")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Photographs of noise in three classes, of several sizes, formats and modes."""
    folder, draw = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(COUNT):
        path = folder / f"class{i % 3}" / f"{i:02d}.{'png' if i % 2 else 'jpg'}"
        path.parent.mkdir(exist_ok=True)
        shape = (8 + 3 * i, 20 - i, 3) if i != 5 else (8, 9)
        Image.fromarray(draw.integers(256, size=shape, dtype=np.uint8)).save(path)
    return folder


def encode(images, autoencoder, out, *more):
    call("encode_latents.py", "--data-path", images, "--image-size", SIZE, "--vae", autoencoder, "--out", out,
         "--rows-per-shard", 4, "--per-proc-batch-size", 3, "--num-workers", 0, "--dtype", "fp32", *more)  # fmt: skip
    return out


@pytest.fixture(scope="module")
def store(images, autoencoder, tmp_path_factory):
    return encode(images, autoencoder, tmp_path_factory.mktemp("latents") / "store")


def refused(capsys, script, *argv) -> str:
    """The one sentence of a command that ends with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        call(script, *argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1, error
    return error


#################################################################################
#                                The autoencoder                                #
#################################################################################


@torch.no_grad()
def test_autoencoder_scales_by_its_own_config(autoencoder, tmp_path):
    vae, theirs = load_vae(str(autoencoder), CPU), AutoencoderKL.from_pretrained(autoencoder)
    assert (vae.scale, vae.factor, vae.channels) == (0.5, 2, 4)
    x = torch.rand(35, 3, SIZE, SIZE) * 2 - 1  # more than the autoencoder takes at once
    posterior = theirs.encode(x).latent_dist
    mean, std = vae.encode(x)
    torch.testing.assert_close(mean, posterior.mean * 0.5, rtol=0, atol=1e-5)
    torch.testing.assert_close(std, posterior.std * 0.5, rtol=0, atol=1e-5)
    torch.testing.assert_close(vae.decode(mean), theirs.decode(posterior.mean).sample, rtol=0, atol=1e-5)
    shutil.copytree(autoencoder, tmp_path / "pipeline" / "vae")
    torch.testing.assert_close(load_vae(str(tmp_path / "pipeline"), CPU).decode(mean), vae.decode(mean))


def test_autoencoder_of_the_published_files_names(autoencoder, tmp_path):
    """Stable Diffusion's files have the attention's names of diffusers' first versions."""
    folder = tmp_path / "old"
    shutil.copytree(autoencoder, folder)
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


def test_autoencoder_in_bf16_is_near_fp32(autoencoder):
    latents = torch.randn(3, 4, 4, 4)
    full, half = (load_vae(str(autoencoder), CPU, precision).decode(latents) for precision in ("fp32", "bf16"))
    assert half.dtype == torch.float32 and 0 < (full - half).abs().max() < 0.05


def test_a_trainers_autocast_does_not_reach_the_autoencoder(autoencoder):
    vae, x = VAE(str(autoencoder), CPU), torch.rand(2, 3, SIZE, SIZE)
    with torch.autocast("cpu", torch.bfloat16):
        inside = vae.encode(x)
    assert all(torch.equal(a, b) for a, b in zip(inside, vae.encode(x)))


#################################################################################
#                                 The store                                     #
#################################################################################


@torch.no_grad()
def test_store_holds_both_sides_of_every_image(store, images, autoencoder):
    opened, source, vae = LatentStore(store), ImageFolder(images, SIZE), VAE(str(autoencoder), CPU)
    assert len(opened.shards) == 3 and opened.count == COUNT and opened.num_classes == 3
    assert opened.vae == str(autoencoder) and opened.latent_shape == (4, 4, 4) == latent_shape(source, vae)
    assert opened.provenance["classes"] == ["class0", "class1", "class2"] and opened.provenance["scale"] == 0.5
    rows, flips = np.array([10, 0, 3, 4, 0, 7]), np.array([True, False, True, False, True, True])
    got, pixels = opened.read(rows, flips), source.read(rows, flips)
    mean, std = vae.encode(from_uint8(pixels["images"]))
    torch.testing.assert_close(got["mean"], mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(got["std"], std, rtol=0, atol=1e-5)
    assert torch.equal(got["y"], pixels["y"]) and torch.equal(got["y"], source.labels[rows])
    assert opened.verify("DIR") > 0


def test_interrupted_encoding_continues_with_the_same_bytes(images, autoencoder, tmp_path, capsys):
    out = encode(images, autoencoder, tmp_path / "store")
    wanted = {path.name: path.read_bytes() for path in out.iterdir()}
    (out / "shard-00001.safetensors").unlink()
    (out / "manifest.json").unlink()
    (out / "shard-00001.safetensors.partial").write_bytes(b"half a shard")
    with pytest.raises(UserError, match=r"unfinished \(2 shards\)"):
        open_source(str(out))
    encode(images, autoencoder, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == wanted
    encode(images, autoencoder, out)
    assert "already complete, 11 images" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        encode(images, autoencoder, out, "--dtype", "fp16")
    assert "dtype is 'fp32' there and 'fp16' here" in capsys.readouterr().err


@pytest.mark.slow
def test_number_of_ranks_does_not_change_a_byte(store, images, autoencoder, tmp_path):
    out = tmp_path / "two"
    done = spawn("encode_latents.py", "--data-path", images, "--image-size", SIZE, "--vae", autoencoder, "--out", out,
                 "--rows-per-shard", 4, "--per-proc-batch-size", 3, "--dtype", "fp32", ranks=2)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {
        path.name: path.read_bytes() for path in store.iterdir()
    }


def test_crop_is_adms():
    image = Image.fromarray(np.random.default_rng(0).integers(256, size=(70, 41, 3), dtype=np.uint8))
    assert center_crop(image, 16).size == (16, 16) and center_crop(image, 64).size == (64, 64)


#################################################################################
#                          Training from either source                          #
#################################################################################

TRAIN = ("--model", "DiT-Nano/2", "--global-batch-size", 8, "--log-every", 1, "--lr", 1e-3, "--sample-every", 0)


@pytest.fixture(scope="module")
def trained(store, tmp_path_factory):
    """A run of six steps from the store."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    call("train.py", "--data-path", store, *TRAIN, "--iterations", 6, "--run-dir", folder)
    return folder


def test_latents_train_as_their_images_do(trained, images, autoencoder, tmp_path):
    folder = tmp_path / "run"
    call("train.py", "--data-path", images, "--image-size", SIZE, "--vae", autoencoder, *TRAIN, "--iterations", 6,
         "--run-dir", folder)  # fmt: skip
    assert np.abs(np.subtract(losses(folder), losses(trained))).max() < 1e-3
    teacher, config = checkpoints.load_teacher(trained / "checkpoints" / "0000006.pt")
    assert config["vae"] == str(autoencoder) and teacher.latent_shape == (4, 4, 4) and teacher.num_classes == 3


def test_resumed_run_from_latents_is_the_same(trained, store, tmp_path):
    folder = tmp_path / "run"
    for iterations in (3, 6):
        call("train.py", "--data-path", store, *TRAIN, "--iterations", iterations, "--run-dir", folder)
    ours, wanted = (torch.load(run / "checkpoints" / "0000006.pt", weights_only=True) for run in (folder, trained))
    assert all(torch.equal(ours["model"][name], wanted["model"][name]) for name in wanted["model"])


def test_previews_of_latents_are_decoded(store, tmp_path):
    folder = tmp_path / "run"
    call("train.py", "--data-path", store, *TRAIN[:-2], "--sample-every", 1, "--iterations", 1, "--run-dir", folder)
    with Image.open(folder / "samples" / "0000001.png") as picture:
        assert picture.mode == "RGB"


def test_flat_folder_trains_without_classes(images, tmp_path, capsys):
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, path in enumerate(sorted(images.rglob("*.*"))):
        shutil.copy(path, flat / f"{i}{path.suffix}")
    options = ("--data-path", flat, "--image-size", SIZE, *TRAIN, "--iterations", 1, "--run-dir", tmp_path / "run")
    assert "--unconditional" in refused(capsys, "train.py", *options)
    call("train.py", *options, "--unconditional")
    teacher, _ = checkpoints.load_teacher(tmp_path / "run" / "checkpoints" / "0000001.pt")
    assert teacher.num_classes == 0 and len(teacher.y_embedder.embedding_table.weight) == 1


#################################################################################
#                            Sentences about mistakes                           #
#################################################################################


def test_mistakes_about_images_and_latents(store, images, autoencoder, tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "out"
    train, encoder = ("--run-dir", run, *TRAIN), ("--out", out, "--num-workers", 0)
    here, vae = ("--data-path", images, "--image-size", SIZE), ("--vae", autoencoder)
    cases = [
        ("train.py", ("--data-path", store, "--vae", "mse", *train), f"holds latents of {autoencoder}"),
        ("train.py", ("--data-path", store, "--vae", "none", *train), f"holds latents of {autoencoder}"),
        ("train.py", ("--data-path", store, "--image-size", 16, *train), "have 8 pixels"),
        ("train.py", ("--data-path", images, *train), "needs --image-size"),
        ("train.py", (*here, "--vae", tmp_path / "nothing", *train), "nothing: no such folder"),
        ("train.py", ("--data-path", "digits", *vae, *train), "takes images of 3 channels, these have 1"),
        ("train.py", ("--data-path", images, "--image-size", 9, *vae, *train), "must be a multiple of 2"),
        ("train_ARD.py", ("--data-path", store, "--run-dir", run), "holds no trajectories"),
        ("encode_latents.py", (*here, "--vae", "none", *encoder), "need no encoding"),
        ("encode_latents.py", (*here, "--vae", images, *encoder), "cannot load the autoencoder"),
        ("encode_latents.py", ("--data-path", tmp_path / "nothing", *vae, *encoder), "no such folder"),
        ("encode_latents.py", (*here, *vae, "--out", images), "the folder holds other files"),
    ]
    for script, options, message in cases:
        assert message in refused(capsys, script, *options)
    assert not run.exists() and not out.exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_image_is_named(images, autoencoder, tmp_path, capsys, workers):
    folder = tmp_path / "images"
    shutil.copytree(images, folder)
    (folder / "class1" / "01.png").write_bytes(b"no image")
    error = refused(capsys, "encode_latents.py", "--data-path", folder, "--image-size", SIZE, "--vae", autoencoder,
                    "--out", tmp_path / "out", "--num-workers", workers)  # fmt: skip
    assert f"--data-path: {folder}/class1/01.png is not a readable image" in error


def test_damaged_stores_are_refused(store, tmp_path):
    copy = tmp_path / "store"
    shutil.copytree(store, copy)
    shard = copy / "shard-00002.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match="checksum differs"):
        LatentStore(copy).verify("DIR")
    shard.write_bytes(whole[:-10])
    with pytest.raises(UserError, match=r"shard-00002.safetensors: \d+ bytes, the manifest says"):
        LatentStore(copy)
    (copy / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="not a manifest"):
        LatentStore(copy)


#################################################################################
#                                Other shapes                                   #
#################################################################################


@pytest.mark.parametrize(
    "shape",
    [
        dict(input_size=6, in_channels=3, num_classes=0),
        dict(input_size=10, in_channels=3, num_classes=7, class_dropout_prob=0.0),
        dict(input_size=6, in_channels=1, num_classes=2, learn_sigma=False),
    ],
    ids=["unconditional", "ten pixels without a null label", "no sigma"],
)
def test_any_shape_from_teacher_to_samples(shape, tmp_path, capsys):
    torch.manual_seed(0)
    teacher = DiT_models["DiT-Nano/2"](**shape).eval()
    torch.nn.init.normal_(teacher.final_layer.linear.weight, std=0.05)
    path, data = save_teacher(tmp_path / "teacher.pt", teacher), tmp_path / "store"
    guided = bool(shape["num_classes"]) and shape.get("class_dropout_prob") != 0
    dump = ("--teacher", path, "--out", data, "--num-trajectories", 8, "--solver-steps", 5, "--steps", 2)
    sample = ("--teacher", path, "--out", tmp_path / "teacher.npz", "--num-samples", 4, "--solver-steps", 5)
    if not guided:
        assert "--cfg-scale 1.5: this teacher has no null label" in refused(capsys, "sample_trajectory.py", *dump)
        assert "--cfg-scale 1.5: this teacher has no null label" in refused(capsys, "sample.py", *sample)
    scale = ("--cfg-scale", 1.5 if guided else 1)
    call("sample_trajectory.py", *dump, *scale)
    call("sample.py", *sample, *scale)
    call("train_ARD.py", "--data-path", data, "--steps", 2, "--stack", 1, "--global-batch-size", 4, "--iterations", 2,
         "--sample-every", 2, "--run-dir", tmp_path / "run")  # fmt: skip
    call("sample_ARD.py", "--ckpt-path", tmp_path / "run" / "checkpoints" / "0000002.pt", "--num-samples", 4,
         "--out", tmp_path / "student.npz")  # fmt: skip
    for name in ("teacher", "student"):
        with np.load(tmp_path / f"{name}.npz") as file:
            assert file["arr_0"].shape == (4, shape["input_size"], shape["input_size"], 3)
            assert (file["arr_1"] == np.arange(4) % max(shape["num_classes"], 1)).all()
    assert read_provenance(tmp_path / "student.npz")["student"]["num_classes"] == shape["num_classes"]


def test_student_of_latents_is_decoded_by_its_autoencoder(autoencoder, tmp_path, capsys):
    torch.manual_seed(0)
    teacher = DiT_models["DiT-Nano/2"](input_size=6, in_channels=4, num_classes=3).eval()
    config = {"kind": "teacher", "model": teacher.config, "vae": str(autoencoder), "provenance": {}, "training": {}}
    path = tmp_path / "teacher.pt"
    checkpoints.save(path, {"config": config, "step": 0, "ema": teacher.state_dict()})
    sample = ("--teacher", path, "--num-samples", 2, "--solver-steps", 2, "--out")
    for precision in ("fp32", "bf16"):
        call("sample.py", *sample, tmp_path / f"{precision}.npz", "--vae-precision", precision, "--save-latents")
        with np.load(tmp_path / f"{precision}.npz") as file:
            assert file["arr_0"].shape == (2, 12, 12, 3) and file["latents"].shape == (2, 4, 6, 6)
    assert read_provenance(tmp_path / "bf16.npz")["decoder_precision"] == "bf16"
    assert "works on latents" in refused(capsys, "sample.py", *sample, tmp_path / "x.npz", "--vae", "none")


@pytest.mark.parametrize("side, tokens", [(32, 256), (64, 1024)])
def test_xl2_at_both_resolutions(side, tokens):
    with torch.device("meta"):
        model = DiT_models["DiT-XL/2"](input_size=side).to("meta")  # its positions come from numpy
        x, y = torch.empty(2, 4, side, side), torch.empty(2, dtype=torch.int64)
        out = model(x, torch.empty(2), y)
    assert model.pos_embed.shape == (1, tokens, 1152) and out.shape == (2, 8, side, side)
