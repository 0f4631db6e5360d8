"""Sources of real images: uint8 that survives, mirror images, a source's description and refused options."""

import types

import numpy as np
import pytest
import torch

from runtime.cli import UserError
from runtime.vae import Pixels
from stores.digits import DigitImages
from stores.image_folder import mirrored
from stores.images import from_uint8, open_source, summary, to_uint8


def test_uint8_survives_the_round_trip():
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(from_uint8(every)), every)
    assert from_uint8(every).aminmax() == (-1, 1)
    assert to_uint8(torch.tensor([-2.0, -1, 0, 1, 2])).tolist() == [0, 0, 128, 255, 255]


def test_only_the_chosen_images_are_mirrored():
    images = torch.arange(12).view(2, 1, 2, 3)
    found = mirrored(images, np.array([True, False]))
    assert found[0, 0].tolist() == [[2, 1, 0], [5, 4, 3]] and torch.equal(found[1], images[1])
    digits = DigitImages()
    read = digits.read(np.array([3, 3]), np.array([False, True]))["images"]
    assert torch.equal(read[0], digits.images[3]) and torch.equal(read[1], digits.images[3].flip(-1))


def test_a_source_is_summed_up_in_a_line(image_folder, latent_store):
    assert summary(open_source(str(image_folder), 8)) == "11 images, 3 classes: class0, class1, class2"
    assert summary(open_source(str(latent_store))) == "11 images, 3 classes: class0, class1, class2"
    assert summary(open_source(str(image_folder), 8, unconditional=True)) == "11 images"
    assert summary(open_source(str(latent_store), unconditional=True)) == "11 images"
    assert summary(DigitImages()) == "1797 images, 10 classes"
    encodes = types.SimpleNamespace(name="an/autoencoder")  # of which nothing but its name is asked for
    told = summary(open_source(str(image_folder), 8, unconditional=True), encodes)
    assert told.startswith("11 images; encoded in every step") and told.endswith("encode_latents.py does it once")
    assert summary(open_source(str(latent_store), unconditional=True), encodes) == "11 images"
    assert summary(DigitImages(), Pixels()) == "1797 images, 10 classes"


def test_options_that_do_not_suit_a_source_are_refused(latent_store):
    for path in ("digits", str(latent_store)):
        with pytest.raises(UserError, match=f"--skip-bad 1: --data-path {path} is no image folder"):
            open_source(path, skip_bad=1)
    with pytest.raises(UserError, match="--channels 3: the images of --data-path digits have 1"):
        open_source("digits", channels=3)
