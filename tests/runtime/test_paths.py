"""Paths at which nothing is: misspelt ones are told from hub ids, and broken links are named."""

import pytest
from helpers import call, refused
from PIL import Image

from runtime.paths import is_hub_id

IDS = (
    *("facebook/DiT-XL-2-256", "stabilityai/sd-vae-ft-ema", "PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers"),
    "a/b.c_1",
)
PATHS = (
    *("x", "./vae", "../vae", "a/b/c", "weights/", "/weights", "-a/b", "a-/b", "a/b.", "a--b/c", "a/b..c", "a/b.ckpt"),
    *("a/b.SAFETENSORS", "a/b.pth", "a b/c", "~/vae", "é/vae"),
)


def test_hub_ids_are_told_from_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [text for text in (*IDS, *PATHS) if is_hub_id(text)] == list(IDS)
    (tmp_path / "facebook").mkdir()
    (tmp_path / "stabilityai").symlink_to("nowhere")
    assert [text for text in IDS if is_hub_id(text)] == list(IDS[2:])


@pytest.mark.parametrize(
    "typed, said", [("weights/vae", "no such folder"), ("gone/vae", "gone is a link to /no/where,")]
)
def test_a_misspelt_autoencoder_is_refused_before_it_is_fetched(typed, said, tmp_path, monkeypatch, capsys):
    (tmp_path / "weights").mkdir()
    (tmp_path / "gone").symlink_to("/no/where")
    (tmp_path / "images/class").mkdir(parents=True)
    Image.new("RGB", (16, 16)).save(tmp_path / "images/class/a.png")
    monkeypatch.chdir(tmp_path)
    encode = ("--data-path", "images", "--image-size", 16, "--out", "store", "--dry-run", "--vae")
    assert f"--vae {typed}: {said}" in refused(capsys, "encode_latents.py", *encode, typed)
    call("encode_latents.py", *encode, "ema")  # by its short name, whatever lies here
