"""encode_latents.py: an encoding that broke off, on several ranks, of an image that is none."""

import json
import shutil

import pytest
from helpers import call, contents, refused, spawn

from runtime.cli import UserError
from stores.images import open_source


def test_an_interrupted_encoding_continues_with_the_same_bytes(encode, image_folder, autoencoder, tmp_path, capsys):
    out = encode(tmp_path / "store")
    wanted = contents(out)
    (out / "shard-00001.safetensors").unlink()
    (out / "manifest.json").unlink()
    (out / "shard-00001.safetensors.partial").write_bytes(b"half a shard")
    with pytest.raises(UserError, match=r"unfinished \(2 shards\)"):
        open_source(str(out))
    encode(out)
    assert contents(out) == wanted
    encode(out)
    assert "already complete, 11 images" in capsys.readouterr().out
    command = ("--data-path", image_folder, "--image-size", 8, "--vae", autoencoder, "--out", out, "--dtype", "fp16")
    error = refused(capsys, "encode_latents.py", *command, "--rows-per-shard", 4)
    assert "dtype is 'fp32' there and 'fp16' here" in error and contents(out) == wanted


@pytest.mark.slow
def test_the_number_of_ranks_does_not_change_a_byte(latent_store, image_folder, autoencoder, tmp_path):
    out = tmp_path / "two"
    done = spawn("encode_latents.py", "--data-path", image_folder, "--image-size", 8, "--vae", autoencoder,
                 "--out", out, "--rows-per-shard", 4, "--per-proc-batch-size", 3, "--dtype", "fp32",
                 ranks=2)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert contents(out) == contents(latent_store)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_named(image_folder, autoencoder, tmp_path, capsys, workers):
    folder = tmp_path / "images"
    shutil.copytree(image_folder, folder)
    (folder / "class1" / "01.png").write_bytes(b"no image")
    error = refused(capsys, "encode_latents.py", "--data-path", folder, "--image-size", 8, "--vae", autoencoder,
                    "--out", tmp_path / "out", "--num-workers", workers)  # fmt: skip
    assert f"--data-path {folder}: 1 of 11 images cannot be read: class1/01.png (none of the formats" in error


@pytest.mark.slow
def test_an_image_that_a_worker_cannot_decode_ends_the_encoding(image_folder, autoencoder, tmp_path):
    folder = tmp_path / "images"
    shutil.copytree(image_folder, folder)
    picture = folder / "class1" / "01.png"
    content = bytearray(picture.read_bytes())
    begin = content.index(b"IDAT") + 4
    content[begin : begin + 8] = bytes(8)  # its header and its end are whole
    picture.write_bytes(content)
    done = spawn("encode_latents.py", "--data-path", folder, "--image-size", 8, "--vae", autoencoder,
                 "--out", tmp_path / "out", "--num-workers", 2)  # fmt: skip
    assert done.returncode == 2 and "class1/01.png is not a readable image" in done.stderr, done.stderr


def test_a_dry_run_counts_the_bytes_and_writes_nothing(image_folder, autoencoder, tmp_path, capsys):
    call("encode_latents.py", "--data-path", image_folder, "--image-size", 8, "--vae", autoencoder,
         "--out", tmp_path / "out", "--dtype", "fp16", "--dry-run")  # fmt: skip
    plan = json.loads(capsys.readouterr().out)
    assert plan["disk_bytes"] == 11 * (2 * 2 * 4 * 4 * 4 * 2 + 8)  # images, sides, mean and std, fp16, label
    assert plan["latent_shape"] == [4, 4, 4] and plan["scale"] == 0.5 and plan["vae"] == str(autoencoder)
    assert not list(tmp_path.iterdir())
