"""What tests of text to image share: small text models, their files in the layouts of others, and captions."""

from pathlib import Path

import torch
from helpers import call

from models_pixart import PixArt, PixArt_models
from runtime.text import VOCABULARY


def random_text_teacher(std: float = 0.1, **shape) -> PixArt:
    """A Nano PixArt of 12 text channels, in which nothing is zero."""
    torch.manual_seed(0)
    teacher = PixArt_models["PixArt-Nano/2"](**dict(input_size=8, in_channels=4, caption_channels=12) | shape).eval()
    for parameter in teacher.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=std)
    return teacher


def save_pixart(folder: Path, **shape):
    """diffusers' own PixArt with all parameters N(0, 0.1), and its files in a folder."""
    from diffusers import PixArtTransformer2DModel  # seconds to import

    torch.manual_seed(0)
    width = shape["num_attention_heads"] * shape["attention_head_dim"]
    shape = dict(caption_channels=12, cross_attention_dim=width, use_additional_conditions=False) | shape
    model = PixArtTransformer2DModel(**shape).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return model


def save_t5(folder: Path, scale: float = 1.0) -> Path:
    """A tiny T5 of random weights and a tokenizer of the demo's words, as a pipeline's folder has them.

    ``scale`` is that of its tokens.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel  # seconds to import

    words = ("<pad>", "<unk>", *VOCABULARY)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    special = dict(eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder / "tokenizer")
    torch.manual_seed(0)
    sizes = dict(vocab_size=len(words), d_model=12, d_kv=4, d_ff=16, num_layers=2, num_heads=2)
    model = T5EncoderModel(T5Config(**sizes))
    torch.nn.init.constant_(model.encoder.final_layer_norm.weight, scale)
    model.save_pretrained(folder / "text_encoder")
    return folder


def encode_captions(folder: Path, name: str, captions: list[str], *more) -> Path:
    """A store of these captions in the demo's words, beside their text."""
    (folder / f"{name}.txt").write_text("".join(caption + "\n" for caption in captions))
    out = folder / name
    call("encode_captions.py", "--text", folder / f"{name}.txt", "--encoder", "words", "--out", out, *more)
    return out
