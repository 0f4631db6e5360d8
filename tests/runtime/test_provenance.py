"""Where artefacts come from: hashes of weights, differences in words."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from runtime.cli import UserError
from runtime.provenance import differences, require_same, weights_hash

leaves = st.none() | st.booleans() | st.integers() | st.text(max_size=3) | st.lists(st.integers(), max_size=3)
names = st.sampled_from(["solver_indices", "steps", "teacher", "model"])
flat = st.dictionaries(names, leaves)
configs = st.recursive(flat, lambda inner: st.dictionaries(names, leaves | inner), max_leaves=9)


def without_none(config: dict) -> dict:
    return {key: without_none(v) if isinstance(v, dict) else v for key, v in config.items() if v is not None}


@given(found=configs, wanted=configs)
def test_configs_differ_in_words_exactly_where_they_differ_in_values(found, wanted):
    """A value that is missing counts as None."""
    assert (differences(found, wanted) == "") == (without_none(found) == without_none(wanted))
    assert differences(found, without_none(found)) == ""


def test_differences_name_the_key_and_both_values():
    found, wanted = {"a": 1, "b": {"c": "x", "d": 2}}, {"a": 1, "b": {"c": "y", "d": 2}, "e": None, "f": 3}
    assert differences(found, wanted) == "b.c is 'x' there and 'y' here, f is None there and 3 here"
    with pytest.raises(UserError, match=r"^these differ: f is None there and 3 here$"):
        require_same("these differ", found, {"a": 1, "f": 3})
    require_same("these differ", found, {"a": 1})  # what only the other has does not count


def test_a_sentence_lists_three_values_and_counts_the_others():
    found, wanted = {name: [0] * 500 for name in "abcd"} | {"e": 0}, {"b": {"c": 1}} | dict.fromkeys("cde", 1)
    text = differences(found, wanted)
    assert re.findall("([a-e]) is", text) == ["b", "c", "d"] and len(text) < 800
    assert text.startswith("b is [0, 0,") and text.endswith(" and 1 here, and 2 more differ")
    assert differences({"a": 1, "e": 0}, {"e": 1}) == "e is 0 there and 1 here, a is 1 there and None here"


def test_the_hash_names_names_shapes_and_values_but_not_the_format():
    state = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(1)}
    others = (
        {"a": state["a"] + 1e-6, "b": state["b"]},
        {"a": state["a"].view(3, 2), "b": state["b"]},
        {"c": state["a"], "b": state["b"]},
        {"a": state["a"]},
    )
    assert len({weights_hash(content) for content in (state, *others)}) == 5
    assert weights_hash({name: state[name].half() for name in "ba"}) == weights_hash(state)
    other_strides = {"a": state["a"].T.contiguous().T, "b": state["b"]}
    assert len(weights_hash(state)) == 16 and weights_hash(other_strides) == weights_hash(state)


@pytest.mark.parametrize(
    "found, wanted, text",
    [
        ({"vae": "a", "vae_hash": "1"}, {"vae": "b", "vae_hash": "1"}, ""),
        ({"vae": "a", "vae_hash": "1"}, {"vae": "a", "vae_hash": "2"}, "vae is 'a' (1) there and 'a' (2) here"),
        ({"vae": "a", "vae_hash": "1"}, {"vae": "a"}, ""),
        ({"vae": "a", "vae_hash": None}, {"vae": "b", "vae_hash": "2"}, "vae is 'a' there and 'b' here"),
        ({"vae": None}, {"vae": "a", "vae_hash": "1"}, "vae is None there and 'a' here"),
    ],
)
def test_autoencoders_go_by_their_hash_where_both_sides_know_one(found, wanted, text):
    assert differences(found, wanted) == text
    assert differences({"provenance": found}, {"provenance": wanted}) == text.replace("vae", "provenance.vae", 1)
