"""Emoji, 32x32 RGB: the pictures of ``--data-path emoji``, drawn once from free icon sets and kept as lossless sheets.

    npm pack @iconify-json/noto @iconify-json/fluent-emoji-flat @iconify-json/fluent-emoji @iconify-json/twemoji \\
        @iconify-json/emojione @iconify-json/fxemoji     # and unpack each into icons/NAME
    python -m stores.emoji icons --out assets/emoji

    python -m stores.emoji icons --sets noto-v1 logos --png --out pictures    # of any sets: PNG files, a folder a set

A folder of sheets holds ``CLASS.webp``, the pictures of a class in rows of 32, and ``index.json``: the names of the
pictures in their order ("noto/red-apple"), and of each set its version, author and licence.
"""

import argparse
import hashlib
import io
import json
import re
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from runtime import cli
from runtime.checks import writable_folder
from runtime.cli import UserError
from runtime.files import atomic_write, read_json, write_text
from stores.image_folder import mirrored

SHEETS = Path(__file__).resolve().parent.parent / "assets" / "emoji"
SIZE, DRAWN = 32, 128  # pixels of a side, as kept and as drawn before a box filter takes the mean of 4x4
COLUMNS = 32  # pictures in a row of a sheet
SETS = ("noto", "fluent-emoji-flat", "fluent-emoji", "twemoji", "emojione", "fxemoji")
CATEGORIES_OF = {"fluent-emoji": "fluent-emoji-flat"}  # has none of its own, and the same names
# A class, and the first words of the sets' categories that it takes.
CLASSES = {
    "smileys": ("Smileys",), "people": ("People",), "nature": ("Animals", "Nature"), "food": ("Food",),
    "travel": ("Travel", "Places"), "activities": ("Activities",), "objects": ("Objects",), "symbols": ("Symbols",),
    "flags": ("Flags",),
}  # fmt: skip
SKIN_TONE = re.compile(r"skin-tone|-(light|medium-light|medium|medium-dark|dark)$")  # one person in five colours


class EmojiImages:
    """The emoji as a source of images (stores/images.py): three channels, 32x32, nine classes."""

    size, channels, vae, vae_hash = SIZE, 3, None, None

    def __init__(self, folder: Path = SHEETS) -> None:
        names = read_index(folder)["pictures"]
        sheets = [read_sheet(folder / f"{kind}.webp", len(names[kind])) for kind in names]
        self.images = torch.from_numpy(np.concatenate(sheets)).permute(0, 3, 1, 2).contiguous()  # (N, 3, 32, 32)
        self.labels = torch.cat([torch.full((len(names[kind]),), i) for i, kind in enumerate(names)])
        self.sets = [name.split("/")[0] for kind in names for name in names[kind]]  # whose drawing each is
        self.count, self.num_classes = len(self.labels), len(names)
        self.fingerprint: dict[str, Any] = {
            "data": "emoji",
            "images": self.count,
            "image_size": self.size,
            "sha256": hashlib.sha256(self.images.numpy().tobytes()).hexdigest()[:16],
            "class_names": list(names),
        }

    def read(self, rows: np.ndarray, flips: np.ndarray) -> dict[str, torch.Tensor]:
        """As the other sources; images (B, 3, 32, 32) uint8."""
        return {"images": mirrored(self.images[rows], flips), "y": self.labels[rows]}


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a folder of sheets. ``UserError`` where it has none."""
    try:
        index = read_json(folder / "index.json")
        if not all(isinstance(index["pictures"][kind], list) for kind in CLASSES):
            raise TypeError("its pictures are no lists")
        return index
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: holds no sheets of emoji, see stores/emoji.py ({error!r})") from None


def read_sheet(path: Path, count: int) -> np.ndarray:
    """The pictures of a sheet: (count, 32, 32, 3) uint8. ``UserError`` where they are missing."""
    try:
        with Image.open(path) as image:
            sheet = np.asarray(image.convert("RGB"))
        cells = sheet.reshape(-1, SIZE, COLUMNS, SIZE, 3).swapaxes(1, 2).reshape(-1, SIZE, SIZE, 3)
        if len(cells) < count:
            raise ValueError(f"{len(cells)} pictures, not {count}")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: damaged, take it anew from the repository ({error})") from None
    return cells[:count]


def write_sheet(path: Path, pictures: list[np.ndarray]) -> None:
    """Pictures, each (32, 32, 3) uint8, as a sheet; the last row is filled up in white."""
    rows = max(1, -(-len(pictures) // COLUMNS))
    cells = np.full((rows * COLUMNS, SIZE, SIZE, 3), 255, np.uint8)
    if pictures:
        cells[: len(pictures)] = pictures
    sheet = cells.reshape(rows, COLUMNS, SIZE, SIZE, 3).swapaxes(1, 2).reshape(rows * SIZE, COLUMNS * SIZE, 3)
    with atomic_write(path) as draft:
        Image.fromarray(sheet).save(draft, format="WEBP", lossless=True, quality=100, method=6)


#################################################################################
#                       Drawing the sheets from icon sets                       #
#################################################################################


def draw(svg: str) -> np.ndarray:
    """An SVG on white as (32, 32, 3) uint8."""
    import resvg_py  # for this command alone, see requirements-extra.txt

    drawn = resvg_py.svg_to_bytes(svg_string=svg, width=DRAWN, height=DRAWN, background="white", skip_system_fonts=True)
    with Image.open(io.BytesIO(bytes(drawn))) as image:
        return np.asarray(image.convert("RGB").reduce(DRAWN // SIZE))


def read_set(icons: Path, name: str, whole: bool = False) -> tuple[dict[str, Any], list[tuple[str, str, str]]]:
    """An icon set in Iconify's JSON: the entries of its index, and its pictures as (class, name, SVG).

    The set is the class of the ``whole`` of it; its emoji have classes of their own.
    """
    folder = icons / name
    try:
        package, info, data = (read_json(folder / f"{part}.json") for part in ("package", "info", "icons"))
        about = {"version": package["version"], "author": info["author"], "licence": info["license"]}
        if whole:
            return about, [(name, f"{name}/{icon}", as_svg(data, icon)) for icon in data["icons"]]
        categories = read_json(icons / CATEGORIES_OF.get(name, name) / "metadata.json")["categories"]
        pictures = [
            (kind, f"{name}/{icon}", as_svg(data, icon))
            for category, members in categories.items()
            for kind, first_words in CLASSES.items()
            if category.split()[0] in first_words
            for icon in members
            if icon in data["icons"] and not SKIN_TONE.search(icon)
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"ICONS {folder}: is not the unpacked npm package @iconify-json/{name} ({error})") from None
    return about, pictures


def as_svg(data: dict[str, Any], icon: str) -> str:
    """An icon of a set as an SVG whose view is square, the icon in its middle."""
    drawn = {"left": 0, "top": 0, "width": 16, "height": 16} | data | data["icons"][icon]
    left, top, width, height = (drawn[key] for key in ("left", "top", "width", "height"))
    side = max(width, height)
    view = f"{left - (side - width) / 2} {top - (side - height) / 2} {side} {side}"
    links = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {links} viewBox="{view}" width="{side}" height="{side}">{drawn["body"]}</svg>'


def without_repetitions(pictures: Iterator[tuple[str, str, np.ndarray]]) -> dict[str, dict[str, np.ndarray]]:
    """Pictures by class and name; of those that are the same to the last pixel, the first."""
    seen: set[bytes] = set()
    kept: dict[str, dict[str, np.ndarray]] = {}
    for kind, name, picture in pictures:
        key = picture.tobytes()
        if key not in seen:
            seen.add(key)
            kept.setdefault(kind, {})[name] = picture
    return kept


def run(args: argparse.Namespace) -> None:
    sets = {name: read_set(args.icons, name, args.png) for name in args.sets}
    writable_folder("--out", args.out)
    icons = [picture for _, pictures in sets.values() for picture in pictures]
    if args.dry_run:
        cli.show_plan({"icons": len(icons), "out": str(args.out)}, args)
        return
    try:
        import resvg_py  # noqa: F401
    except ImportError:
        raise UserError("stores.emoji: needs resvg-py to draw; pip install resvg-py") from None
    with ProcessPoolExecutor() as pool:
        drawn = pool.map(draw, [svg for _, _, svg in icons], chunksize=64)
        shown = tqdm(drawn, desc="drawing", total=len(icons), unit="icon", disable=None)
        kept = without_repetitions((kind, name, picture) for (kind, name, _), picture in zip(icons, shown, strict=True))
    if args.png:
        for name, picture in (each for pictures in kept.values() for each in pictures.items()):
            with atomic_write(args.out / f"{name}.png") as draft:
                Image.fromarray(picture).save(draft, format="PNG")
    else:
        kept = {kind: kept.get(kind, {}) for kind in CLASSES}
        for kind, pictures in kept.items():
            write_sheet(args.out / f"{kind}.webp", list(pictures.values()))
        names = {kind: list(pictures) for kind, pictures in kept.items()}
        index = {"sets": {name: about for name, (about, _) in sets.items()}, "pictures": names}
        write_text(args.out / "index.json", json.dumps(index, indent=0))
    print(f"{sum(map(len, kept.values()))} pictures of {len(icons)} icons in {args.out}")


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__, prog="stores.emoji", description="Draw the sheets of emoji from unpacked icon sets.")
    parser.add_argument("icons", type=Path, metavar="ICONS", help="Folder that holds an unpacked package per set.")
    parser.add_argument("--out", type=Path, required=True, help="Folder of the sheets.")
    parser.add_argument("--sets", nargs="+", default=list(SETS), help="Icon sets to draw, in this order.")
    parser.add_argument("--png", action="store_true", help="Write a PNG file of each icon, in folders of sets.")
    cli.add_dry_run_option(parser)
    return parser


if __name__ == "__main__":
    cli.main(build_parser(), run)
