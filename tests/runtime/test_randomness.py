"""Noise, labels and orders depend on seed, stream and index alone."""

import itertools

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from runtime.randomness import STREAMS, Shuffle, generator, labels, noise


@given(count=st.integers(1, 50), seed=st.integers(0, 2**32), epochs=st.integers(1, 3), batch=st.integers(1, 70))
def test_every_epoch_holds_every_row_once_and_can_be_entered_anywhere(count, seed, epochs, batch):
    shuffle, total = Shuffle(count, seed), count * epochs
    rows = np.concatenate([shuffle.rows(i, min(i + batch, total)) for i in range(0, total, batch)])
    assert (np.sort(rows.reshape(epochs, count), axis=1) == np.arange(count)).all()
    middle = total // 2  # a resumed order is the same order
    assert (Shuffle(count, seed).rows(middle, total) == rows[middle:]).all()


@given(seed=st.integers(0, 2**32), indices=st.lists(st.integers(0, 2**40), min_size=1, max_size=5))
def test_noise_and_labels_depend_on_seed_and_index_alone(seed, indices):
    together = noise(seed, "sample", indices, (1, 2, 2))
    apart = torch.cat([noise(seed, "sample", [i], (1, 2, 2)) for i in indices])
    assert torch.equal(together, apart)
    assert not torch.equal(together, noise(seed + 1, "sample", indices, (1, 2, 2)))
    assert not torch.equal(together, noise(seed, "trajectory", indices, (1, 2, 2)))
    random = labels(seed, indices, 7, "random")
    assert random.tolist() == [labels(seed, [i], 7, "random").item() for i in indices]


def test_balanced_labels_hold_every_class_equally_often():
    assert torch.bincount(labels(0, range(70), 7)).tolist() == [10] * 7
    assert labels(3, range(4), 0).tolist() == [0, 0, 0, 0]


def test_random_labels_are_all_classes_in_no_order():
    drawn = labels(0, range(700), 7, "random")
    assert torch.bincount(drawn).min() > 70 and drawn.max() == 6
    assert not torch.equal(drawn, labels(1, range(700), 7, "random")) and not torch.equal(drawn[:350], drawn[350:])


def test_no_two_streams_share_their_numbers():
    assert len(set(STREAMS.values())) == len(STREAMS)
    for one, other in itertools.combinations(STREAMS, 2):
        assert noise(0, one, [0], (2,)).ne(noise(0, other, [0], (2,))).all(), (one, other)
    first, second = (generator(0, "order", index).permutation(100) for index in (0, 1))
    assert (first != second).any()


def test_noise_is_standard_normal():
    drawn = noise(5, "sample", range(100), (10, 10)).double()
    assert abs(drawn.mean().item()) < 0.05 and abs(drawn.std().item() - 1) < 0.05
    assert noise(5, "sample", [], (10, 10)).shape == (0, 10, 10)
