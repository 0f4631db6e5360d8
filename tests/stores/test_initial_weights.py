"""A new teacher that begins with other weights: what is taken, what is made anew, what is refused by name."""

import pytest
import torch
from helpers import random_teacher

from models_pixart import PixArt_models
from runtime.cli import UserError
from stores.initial_weights import LABELS, init_shape, start_from


def fresh(**shape):
    """A teacher of other weights than ``random_teacher()`` has."""
    return random_teacher(seed=1, **shape)


def test_the_same_shape_takes_all_but_the_label_table():
    source, model = random_teacher(), fresh()
    before = model.state_dict()[LABELS].clone()
    about = start_from(model, source)
    own, theirs = model.state_dict(), source.state_dict()
    assert about["new"] == [LABELS] and about["dropped"] == []
    assert all(torch.equal(own[name], theirs[name]) for name in own if name != LABELS)
    assert torch.equal(own[LABELS][:-1], before[:-1])  # other classes, even if as many
    assert torch.equal(own[LABELS][-1], theirs[LABELS][-1])  # no class is no class
    start_from(model, source, keep_labels=True)
    assert all(torch.equal(value, theirs[name]) for name, value in model.state_dict().items())


def test_other_classes_and_another_latent_size_are_made_anew():
    source, model = random_teacher(), fresh(num_classes=3, input_size=16)
    positions = model.pos_embed.clone()
    about = start_from(model, source)
    assert about["new"] == ["pos_embed", LABELS]
    assert torch.equal(model.pos_embed, positions)
    assert torch.equal(model.state_dict()[LABELS][-1], source.state_dict()[LABELS][-1])
    assert about["taken"] == len(model.state_dict()) - 2
    assert torch.equal(model.blocks[0].attn.qkv.weight, source.blocks[0].attn.qkv.weight)


def test_what_does_not_fit_is_named():
    with pytest.raises(UserError, match=r"--init: its weights are for another model \(in_channels 4 instead of 1\)"):
        start_from(fresh(in_channels=4), random_teacher())
    with pytest.raises(UserError, match=r"--init: .*embedding_table.* leave out --keep-labels for other classes"):
        start_from(fresh(num_classes=3), random_teacher(), keep_labels=True)
    text = PixArt_models["PixArt-Nano/2"](input_size=8, in_channels=1, caption_channels=12)
    with pytest.raises(UserError, match="--init: holds a DiT, which a PixArt cannot begin with"):
        start_from(text, random_teacher())


def test_the_shape_is_the_sources_but_for_classes_and_latent_size():
    source = random_teacher().config
    shape = init_shape(source, {"num_classes": 3, "input_size": 16, "in_channels": 1})
    assert shape == source | {"num_classes": 3, "input_size": 16}
    with pytest.raises(UserError, match=r"--init: its weights are for another model \(depth 5 instead of \d+\)"):
        init_shape(source, {"depth": 5})


def test_weights_of_another_process_are_refused():
    for own, other in (("ddpm", "sit"), ("sit", "repa")):
        with pytest.raises(UserError, match=f"^--init: is of the process {other}, not of {own}$"):
            start_from(random_teacher(process=own), random_teacher(process=other))
