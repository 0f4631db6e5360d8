"""The latent store: both sides of every image, as the autoencoder makes them."""

import numpy as np
import pytest
import torch
from helpers import call

from runtime.cli import UserError
from runtime.vae import VAE
from stores.image_folder import ImageFolder
from stores.images import from_uint8, latent_shape
from stores.latents import LatentStore, is_store


@torch.no_grad()
def test_the_store_holds_both_sides_of_every_image(latent_store, image_folder, autoencoder):
    opened, source = LatentStore(latent_store), ImageFolder(image_folder, 8)
    vae = VAE(str(autoencoder), torch.device("cpu"))
    assert len(opened.shards) == 3 and opened.count == 11 and opened.num_classes == 3
    assert opened.vae == str(autoencoder) and opened.latent_shape == (4, 4, 4) == latent_shape(source, vae)
    assert opened.provenance["class_names"] == ["class0", "class1", "class2"] and opened.provenance["scale"] == 0.5
    rows, flips = np.array([10, 0, 3, 4, 0, 7]), np.array([True, False, True, False, True, True])
    got, pixels = opened.read(rows, flips), source.read(rows, flips)
    mean, std = vae.encode(from_uint8(pixels["images"]))
    torch.testing.assert_close(got["mean"], mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(got["std"], std, rtol=0, atol=1e-5)
    assert torch.equal(got["y"], pixels["y"]) and torch.equal(got["y"], source.labels[rows])
    assert opened.verify("DIR") > 0


def test_verify_sums_up_the_store_in_one_line(latent_store, autoencoder, capsys):
    call("stores.latents", "verify", latent_store)
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "ok, 11 images" in out and f"(4, 4, 4) latents of {autoencoder}, 3 classes" in out


def test_a_store_of_trajectories_is_no_store_of_latents(store, image_folder):
    assert is_store(store) and not is_store(image_folder)
    with pytest.raises(UserError, match="this store holds no latents"):
        LatentStore(store)
