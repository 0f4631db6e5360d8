"""The one owner of the caption store: a text file of captions, encoded once.

    DIR/manifest.json          provenance (text, encoder and their hashes, longest caption), shards with their checksums
    DIR/shard-00000.safetensors
        tokens (sum of lengths, C) float16     length (n,) int64, of each caption's tokens
        text   (sum of letters,) uint8, UTF-8  letters (n,) int64, of each caption's text
        label  (n,) int64, the caption's number; uncut (n,) int64, its tokens before it was cut to the longest allowed

Captions are ragged here and padded with zeros to the longest one of the store when they are read. The last row is the
null caption "", whose number is therefore the count of the others, as the null label is the number of classes.

    python -m stores.captions verify DIR
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from models import DiT
from runtime import cli
from runtime.cli import MissingError, OptionGroup, UserError
from runtime.paths import missing
from runtime.provenance import require_same
from runtime.randomness import Classes, Conditions
from stores.shards import ShardStore, store_parser

KIND = "captions"  # the manifest's word for this format
NEEDED = ("text_sha256", "encoder", "encoder_hash", "channels", "max_tokens")  # of its provenance, by those who read it
ENCODER = ("encoder_hash", "max_tokens")  # the same as in a model's training; other texts it may read


def row_bytes(tokens: int, channels: int, text: str) -> int:
    """Bytes of a caption of ``tokens`` tokens: these, its text and four numbers."""
    return 2 * tokens * channels + len(text.encode()) + 4 * 8


def shard_tensors(
    rows: range, texts: list[str], tokens: list[torch.Tensor], uncut: list[int]
) -> dict[str, torch.Tensor]:
    """The tensors of a shard: the captions of these rows, their tokens, (L, C) each, and the uncut lengths."""
    letters = [np.frombuffer(text.encode(), np.uint8) for text in texts]
    return {
        "tokens": torch.cat(tokens).half(),
        "length": torch.tensor([len(part) for part in tokens]),
        "text": torch.from_numpy(np.concatenate(letters)),
        "letters": torch.tensor([len(part) for part in letters]),
        "label": torch.tensor(list(rows)),
        "uncut": torch.tensor(uncut),
    }


class CaptionStore(ShardStore):
    """A finished store of captions. Called with their numbers, it gives their tokens, a text model's y."""

    kind = "caption store"
    ragged = ("tokens", "text")

    def __init__(self, folder: str | Path, option: str = "--captions", verify: bool = False):
        """``UserError`` naming ``option`` when it is missing, unfinished, truncated, damaged or another store."""
        super().__init__(folder, option, verify)
        if self.provenance.get("kind") != KIND:
            raise UserError(f"{option} {folder}: this store holds no captions; encode_captions.py makes one that does")
        absent = [name for name in NEEDED if name not in self.provenance]
        if absent:
            raise UserError(f"{option} {folder}/manifest.json: its provenance lacks {', '.join(absent)}; make it again")
        self.require("tokens", "length", "text", "letters", "label", "uncut")
        self.count, self.channels = len(self) - 1, self.provenance["channels"]
        self._starts = [_starts(arrays["length"]) for arrays in self.arrays]
        for shard, arrays, starts in zip(self.shards, self.arrays, self._starts, strict=True):
            letters = int(arrays["letters"].sum())
            if arrays["tokens"].shape != (starts[-1], self.channels) or arrays["text"].shape != (letters,):
                raise UserError(f"{option} {self.folder / shard['file']}: its lengths do not add up; make it again")
        self.cut = int(sum((arrays["uncut"] > arrays["length"]).sum() for arrays in self.arrays))
        self.max_text_tokens = int(max(arrays["length"].max() for arrays in self.arrays))
        found = {name: self.provenance[name] for name in NEEDED}
        self.about = {"captions": found | {"count": self.count, "longest": self.max_text_tokens}}

    def __call__(self, label: torch.Tensor) -> torch.Tensor:
        """label: (B,) numbers of captions -> (B, L, C) float16 with L of the longest caption; padding is zero."""
        rows = label.numpy()
        out = np.zeros((len(rows), self.max_text_tokens, self.channels), np.float16)
        for i, (shard, row) in enumerate(self.locate(rows)):
            start, end = self._starts[shard][row : row + 2]
            out[i, : end - start] = self.arrays[shard]["tokens"][start:end]
        self.require_finite(rows, out)
        return torch.from_numpy(out)

    def text(self, label: int) -> str:
        """A caption by its number."""
        shard, row = self.locate(np.array([label]))[0]
        start, end = _starts(self.arrays[shard]["letters"])[row : row + 2]
        return self.arrays[shard]["text"][start:end].tobytes().decode()


def _starts(lengths: np.ndarray) -> np.ndarray:
    """Where each of the rows of these lengths begins, and the end of the last."""
    return np.concatenate([[0], np.cumsum(lengths)])


def add_captions_option(group: OptionGroup) -> None:
    """The ``--captions`` option, the same in every script."""
    group.add_argument(
        "--captions", type=cli.folder, help="Captions of encode_captions.py, for a text model; a label is their number."
    )


def require_captions(folder: str | None) -> None:
    """``MissingError`` where ``--captions`` names no folder: said before a model is looked for, and in a dry run."""
    if folder and not Path(folder).is_dir():
        raise MissingError(f"--captions {folder}: {missing(folder, 'folder')}; encode_captions.py makes one")


def open_conditions(
    captions: str | None, model: DiT, provenance: dict, *, same_text: bool = False, verify: bool = False
) -> Conditions:
    """The meaning of a model's labels: its classes, or the captions of a store, which must suit it.

    ``provenance`` is that of the model, or of its trajectories: the captions must come from the encoder that it names,
    and with ``same_text`` be the very ones. ``UserError`` where they are not, or where the model reads no captions.
    """
    channels = model.config.get("caption_channels")
    if not captions:
        if channels:
            raise UserError("--captions: this model reads text, give a store of encode_captions.py")
        return Classes(model.num_classes, provenance.get("class_names"))
    if not channels:
        raise UserError(f"--captions {captions}: this model has classes and reads no text, leave the option out")
    store = CaptionStore(captions, verify=verify)
    if store.channels != channels:
        raise UserError(f"--captions {captions}: tokens of {store.channels} channels, this model reads {channels}")
    wanted = provenance.get("captions")
    if wanted:
        names = (*ENCODER, "text_sha256") if same_text else ENCODER
        what = f"--captions {captions}: not the captions that this was made with"
        require_same(what, store.about["captions"], {name: wanted.get(name) for name in names})
    return store


def verify(args: argparse.Namespace) -> None:
    """Check a whole store and print a one-line summary."""
    store = CaptionStore(args.folder, "DIR")
    size, tokens = store.verify("DIR"), sum(len(tensors["tokens"]) for tensors in store.tensors)
    print(
        f"{args.folder}: ok, {store.count} captions by {store.provenance['encoder']}, {tokens} tokens of "
        f"{store.channels} channels, {store.max_text_tokens} at most, {store.cut} captions cut, {size / 1e6:.1f} MB"
    )


def build_parser() -> cli.Parser:
    return store_parser(__doc__, "captions", verify)[0]


run = cli.run_command

if __name__ == "__main__":
    cli.main(build_parser(), run)
