"""Encoders of captions: T5 with random weights, and the demo's words."""

import builtins
import re

import pytest
import torch
from helpers import ROOT
from text_helpers import save_t5

from runtime.cli import UserError
from runtime.text import VOCABULARY, T5Encoder, WordEncoder

CPU = torch.device("cpu")
PACKAGES = ("diffusion", "evaluations", "runtime", "stores")


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory):
    """A tiny T5 of random weights with its tokenizer, as a pipeline's folder has them."""
    return save_t5(tmp_path_factory.mktemp("t5"))


def test_t5s_tokens_depend_on_their_caption_alone(t5_folder):
    encoder = T5Encoder(str(t5_folder), CPU, "fp32", max_tokens=6)
    captions = ["a three above a seven", "", "Seven ", "a three beside a seven and a nine"]
    tokens, uncut = encoder(captions)
    assert [len(part) for part in tokens] == [6, 1, 2, 6] and uncut == [6, 1, 2, 9] and encoder.channels == 12
    for caption, part in zip(captions, tokens, strict=True):
        alone = encoder([caption])[0][0]
        assert alone.shape == part.shape and (alone - part).abs().max() < 1e-5 * part.abs().max()
    again = T5Encoder(str(t5_folder), CPU, "fp32", max_tokens=6)
    assert again.hash == encoder.hash
    assert (again(["seven"])[0][0] - tokens[2]).abs().max() < 1e-5 * tokens[2].abs().max()  # lower case, stripped
    end = encoder.model(torch.tensor([[encoder.tokenizer.eos_token_id]])).last_hidden_state[0]
    assert (tokens[1] - end).abs().max() < 1e-5 * end.abs().max()  # the null caption is one </s>
    assert T5Encoder(str(t5_folder), CPU, "bf16").model.dtype == torch.bfloat16


def test_what_is_no_t5_is_refused_in_a_sentence(tmp_path, monkeypatch, t5_folder):
    with pytest.raises(UserError, match="no such folder; give words, a hub id or a folder"):
        T5Encoder(str(tmp_path / "absent"), CPU)
    with pytest.raises(UserError, match="cannot load T5 and its tokenizer"):
        T5Encoder(str(tmp_path), CPU)
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "transformers":
            raise ImportError("No module named 'transformers'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match="T5 needs transformers and sentencepiece, pip install"):
        T5Encoder(str(t5_folder), CPU)


def test_nothing_but_the_encoding_of_text_imports_transformers():
    ours = [*ROOT.glob("*.py"), *(path for room in PACKAGES for path in (ROOT / room).rglob("*.py"))]
    naming = [path for path in ours if re.search(r"^\s*(from|import) transformers", path.read_text(), re.MULTILINE)]
    assert naming == [ROOT / "runtime/text.py"]
    assert not re.search(r"^(from|import) transformers", naming[0].read_text(), re.MULTILINE)  # but within a function


def test_words_are_told_apart_with_their_places():
    encoder = WordEncoder(max_tokens=4, channels=8)
    (one, other, null, long), uncut = encoder(["a three", "three A", "", "a a a a a"])
    assert one.shape == (3, 8) and null.shape == (1, 8) and long.shape == (4, 8) and uncut == [3, 3, 1, 6]
    assert torch.equal(one[0] - encoder.positions[0], other[1] - encoder.positions[1]) or torch.allclose(
        one[0] - encoder.positions[0], other[1] - encoder.positions[1], atol=1e-6
    )
    assert not torch.equal(one[2], null[0])  # </s> has a position too
    assert len({tuple(vector.tolist()) for vector in encoder.vectors.values()}) == len(VOCABULARY)
    assert WordEncoder(4, 8).hash == encoder.hash != WordEncoder(5, 8).hash
    with pytest.raises(UserError, match="does not know 'horse' in the caption 'a horse'"):
        encoder(["a horse"])
