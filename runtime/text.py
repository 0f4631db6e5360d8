"""From captions to tokens: T5 through transformers, as PixArt reads it, or the frozen word vectors of the text demo.

An encoder is called with a list of captions and returns the tokens of each, (L, C) on the CPU, without padding, and how
many tokens each has before it is cut to ``max_tokens``. It also has ``name``, ``hash``, ``channels``, C, and
``weights_bytes``.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from runtime.cli import FETCHING, AbsentError, UserError
from runtime.files import cached_snapshot
from runtime.paths import is_hub_id, missing
from runtime.precision import DTYPES
from runtime.provenance import weights_hash

WORDS = "words"  # the name of the demo's encoder
T5 = "PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers"  # PixArt-Sigma's: T5-XXL v1.1 with its tokenizer
T5_FILES = (  # in a pipeline's repository, or at the top of T5's own: what is small, and the weights in two formats
    ["text_encoder/config.json", "tokenizer*", "config.json", "special_tokens_map.json", "spiece.model"],
    ["text_encoder/*.safetensors*", "model*.safetensors*"],
    ["text_encoder/*.bin*", "pytorch_model*.bin*"],
)
EXPECTED = "give a folder in transformers' layout, or a pipeline's with text_encoder and tokenizer"
VOCABULARY = (
    *("</s>", "a", "above", "beside", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
)


def clean(caption: str) -> str:
    """A caption as diffusers' PixArt pipelines hand it to the tokenizer."""
    return caption.lower().strip()


class WordEncoder:
    """A frozen random vector for each word, drawn from the word's hash, plus sines and cosines of its position.

    As T5's, a caption ends with the token ``</s>``; that of "" is nothing else. "an" is read as "a".
    """

    name, weights_bytes = WORDS, 0

    def __init__(self, max_tokens: int = 16, channels: int = 64):
        self.max_tokens, self.channels = max_tokens, channels
        self.vectors = {word: self._vector(word) for word in VOCABULARY}
        frequencies = 100.0 ** -(np.arange(channels // 2) / (channels // 2))
        angles = np.arange(max_tokens)[:, None] * frequencies
        self.positions = torch.from_numpy(np.concatenate([np.sin(angles), np.cos(angles)], axis=1)).float()
        self.hash = weights_hash({**self.vectors, "positions": self.positions})

    def _vector(self, word: str) -> torch.Tensor:
        """(C,) standard normal."""
        seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "big")
        draw = np.random.Generator(np.random.Philox(seed))
        return torch.from_numpy(draw.standard_normal(self.channels, dtype=np.float32))

    @staticmethod
    def _words(caption: str) -> list[str]:
        return ["a" if word == "an" else word for word in clean(caption).split()]

    def require_known(self, captions: list[str]) -> None:
        """``UserError`` names a word that is not in the vocabulary."""
        for caption in captions:
            unknown = [word for word in self._words(caption) if word not in VOCABULARY[1:]]
            if unknown:
                raise UserError(
                    f"--encoder {self.name}: does not know {unknown[0][:80]!r} in the caption {caption[:80]!r}; it "
                    f"knows {', '.join(VOCABULARY[1:])}"
                )

    def __call__(self, captions: list[str]) -> tuple[list[torch.Tensor], list[int]]:
        """See above."""
        self.require_known(captions)
        tokens, uncut = [], []
        for caption in captions:
            words = self._words(caption)
            uncut.append(len(words) + 1)
            words = [*words[: self.max_tokens - 1], VOCABULARY[0]]
            tokens.append(torch.stack([self.vectors[word] for word in words]) + self.positions[: len(words)])
        return tokens, uncut


class T5Encoder:
    """The encoder half of T5, in bf16 or fp32: in fp16 it overflows, and images suffer."""

    def __init__(self, name: str, device: torch.device, precision: str = "bf16", max_tokens: int = 300):
        """``name``: a folder or hub id, of T5 itself or of a pipeline with sub-folders text_encoder and tokenizer."""
        here, fetch = _is_folder(name), ""
        if not here:
            fetch = f", or fetch it where there is a network: hf download {name} --local-dir FOLDER"
        try:
            from transformers import AutoTokenizer, T5EncoderModel  # seconds to import; needed for this only
            from transformers.utils import logging
        except ImportError as error:
            raise UserError(
                f"--encoder {name}: T5 needs transformers and sentencepiece, pip install -r requirements-extra.txt "
                f"({error})"
            ) from None
        logging.set_verbosity_error()
        try:
            folder = Path(name) if here else cached_snapshot(name, *T5_FILES)
            own = [part if (part := folder / inner).is_dir() else folder for inner in ("tokenizer", "text_encoder")]
            self.tokenizer: Any = AutoTokenizer.from_pretrained(own[0])
            model: Any = T5EncoderModel.from_pretrained(own[1], dtype=DTYPES[precision])
        except Exception as error:  # transformers raises many kinds for a missing file, a bad config, no network
            raise UserError(
                f"--encoder {name}: cannot load T5 and its tokenizer; {EXPECTED}{fetch} ({str(error).splitlines()[0]})"
            ) from None
        self.hash: str | None = weights_hash(model.state_dict())
        self.weights_bytes = sum(p.nbytes for p in model.parameters())
        self.model = model.to(device).eval().requires_grad_(False)
        self.name, self.channels, self.max_tokens = name, model.config.d_model, max_tokens

    @torch.no_grad()
    def __call__(self, captions: list[str]) -> tuple[list[torch.Tensor], list[int]]:
        """See above."""
        texts = [clean(caption) for caption in captions]
        uncut = [len(ids) for ids in self.tokenizer(texts).input_ids]
        batch = self.tokenizer(texts, padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt")
        batch = batch.to(self.model.device)
        states = self.model(batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state.float().cpu()
        lengths = batch.attention_mask.sum(1).tolist()
        return [row[:length] for row, length in zip(states, lengths, strict=True)], uncut


def caption_encoder(
    about: dict | None, device: torch.device, name: str | None = None, precision: str = "bf16"
) -> WordEncoder | T5Encoder:
    """The encoder that a model's captions came from, by the ``about`` of its provenance, or the same found at ``name``.

    ``UserError`` where that is not known, or another one.
    """
    if not about:
        raise UserError("--encoder: the model does not say by which encoder its captions were read")
    name, longest = name or str(about["encoder"]), about["max_tokens"]
    encoder = WordEncoder(longest) if name == WORDS else T5Encoder(name, device, precision, longest)
    if encoder.hash != about["encoder_hash"]:
        raise UserError(
            f"--encoder {name}: in {precision} it is not the one that the model's captions were read by, whose hash is "
            f"{about['encoder_hash']} instead of {encoder.hash}; give that one"
        )
    return encoder


def encode(encoder: "WordEncoder | T5Encoder", captions: list[str], length: int = 0) -> torch.Tensor:
    """A text model's y, (B, L, C) float16 as a store of captions has it: L is that of the longest, or ``length``."""
    rows = [row.half() for row in encoder(captions)[0]]
    return pad_sequence([*rows, rows[0].new_zeros(length, encoder.channels)], batch_first=True)[:-1]


class Prompts:
    """Captions as they come, in place of a store's: the conditions of a text model whose only label is the null one."""

    count, about = 1, dict[str, Any]()

    def __init__(self, encoder: WordEncoder | T5Encoder):
        self.encoder, self.max_text_tokens = encoder, encoder.max_tokens

    def encode(self, captions: list[str]) -> torch.Tensor:
        """(B, L, C) float16, padded to the most tokens that there may be. ``UserError`` for words without a vector."""
        return encode(self.encoder, captions, self.max_text_tokens)

    def __call__(self, label: torch.Tensor) -> torch.Tensor:
        """(B,) -> (B, L, C), the null caption's."""
        return self.encode([""] * len(label))

    def text(self, label: int) -> str:
        """Nothing."""
        return ""


@dataclass(frozen=True)
class T5Outline:
    """T5's config, read before it is loaded."""

    name: str
    channels: int
    max_tokens: int
    weights_bytes: int
    hash: str | None = None


def _is_folder(name: str) -> bool:
    """Whether an encoder's name is that of a folder, or else a hub id. ``UserError`` where it is neither."""
    if not Path(name).is_dir() and name != T5 and not is_hub_id(name):
        raise UserError(f"--encoder {name}: {missing(name, 'folder')}; give {WORDS}, a hub id or a folder")
    return Path(name).is_dir()


def outline_t5(name: str, max_tokens: int) -> T5Outline:
    """The outline of the T5 of that name; nothing is loaded or fetched. ``AbsentError`` where it is to be fetched."""
    places = "text_encoder/config.json", "config.json"  # in a pipeline, or T5 itself
    if _is_folder(name):
        found = [str(Path(name) / place) for place in places if (Path(name) / place).is_file()]
    else:
        from huggingface_hub import try_to_load_from_cache

        found = [path for place in places if isinstance(path := try_to_load_from_cache(name, place), str)]
        if not found:
            raise AbsentError(f"--encoder {name}: would be fetched from the Hugging Face hub")
    try:
        config = Path(found[0])
        channels = int(json.loads(config.read_text())["d_model"])
        kinds = [config.parent.glob(f"*.{kind}") for kind in ("safetensors", "bin")]
        sizes = [sum(path.stat().st_size for path in paths) for paths in kinds]
        return T5Outline(name, channels, max_tokens, sizes[0] or sizes[1])
    except (IndexError, OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--encoder {name}: cannot load T5; {EXPECTED} ({error!r})") from None


TextEncoder = WordEncoder | T5Encoder | T5Outline


def load_encoder(name: str, device: torch.device, precision: str, max_tokens: int | None) -> TextEncoder:
    """The encoder of that name, cut to 16 words or, as in PixArt-Sigma, to 300 tokens of T5 unless told otherwise.

    In a dry run, which loads and fetches nothing, T5's outline.
    """
    if name == WORDS:
        return WordEncoder(max_tokens or 16)
    if not FETCHING.get():
        return outline_t5(name, max_tokens or 300)
    return T5Encoder(name, device, precision, max_tokens or 300)
