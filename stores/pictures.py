"""The one reader of image files: whatever their format, mode and orientation, pixels of 8 bits, colours or grey.

An opaque, upright image of 8 bits is read as ADM reads it, by Pillow's ``convert("RGB")``. Else, in this order:

    frames        the first one of an animation, or of a file of several pages
    bits          of 16 (or 12) the upper 8, as Pillow does with 16-bit colours; 1 bit is black and white
    ranges        floats and integers of 32 bits are refused: no file names its white
    transparency  on white, as it is seen on a page; ADM's convert uncovers the colours below, which nobody has seen
    orientation   upright, as EXIF says; ADM leaves such photographs on their side
    colours       CMYK, YCbCr and palettes become RGB by Pillow's formulas, as in ADM; colour profiles are not applied
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif")  # in any case
# Nothing else is tried, whatever a file is called: Pillow would start Ghostscript for a file like PostScript.
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
MOST_PIXELS = 89_478_485  # of an image, where Pillow begins to warn: 360 MB while it is read
LIMIT = f"the limit is {MOST_PIXELS / 1e6:.0f} million"
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # that is an error here

GREY = ("1", "L", "LA")  # and those of 16 bits
COLOURS = ("P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV")
# How to turn an image of each EXIF orientation upright.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# How whole files end. Another end may still be whole: such a file is decoded to know.
ENDS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82", "GIF": b";"}


class BadImageError(Exception):
    """A file that is no image, or none that is read here; the text says why, to stand in brackets behind its name."""


class Header(NamedTuple):
    """The header of an image, read before its pixels are decoded."""

    width: int  # upright
    height: int
    grey: bool  # one channel, besides transparency
    animated: bool


def look(path: str | Path, decode: bool = False) -> Header:
    """The header of an image. ``BadImageError`` where it is none, or truncated as far as its end shows; ``decode``
    makes sure. ``OSError`` where the system cannot read the file.
    """
    with _opened(path) as image:
        if decode or not _ends_whole(Path(path), image.format or ""):
            image.load()
        # Of a TIFF Pillow gives the upright size; of a PNG without EXIF at its front it would decode all to find some.
        asked = image.format != "TIFF" and (image.format != "PNG" or "exif" in image.info)
        turned = asked and _orientation(image) >= 5
        width, height = image.size[::-1] if turned else image.size
        animated = image.format in ("GIF", "WEBP", "PNG", "TIFF") and getattr(image, "is_animated", False)
        return Header(width, height, image.mode in GREY or _is_deep(image), animated)


def read(path: str | Path, channels: int = 3) -> Image.Image:
    """The pixels of an image, mode "RGB", or "L" for one of the channels 3 and 1. Errors are those of ``look``."""
    with _opened(path) as image:
        image.load()
        orientation = _orientation(image)
        picture = _of_eight_bits(image) if _is_deep(image) else image
        if picture.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in picture.info:
            layer = picture.convert("RGBA")
            picture = Image.new("RGB", layer.size, "white")
            picture.paste(layer, mask=layer.getchannel("A"))
        if orientation in UPRIGHT:
            picture = picture.transpose(UPRIGHT[orientation])
        picture = picture.convert("RGB")
        return picture if channels == 3 else picture.convert("L")  # grey in three channels keeps its values


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's preprocessing: halve by box filter while twice too large, bicubic to the short side, crop the centre."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def croppable(header: Header, size: int) -> bool:
    """Whether ``center_crop`` of such an image stays within ``MOST_PIXELS``: a line of pixels would grow to a field."""
    return size * size * max(header[:2]) / min(header[:2]) <= MOST_PIXELS


@contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    """An image of which the header is read; all that Pillow raises of it becomes ``BadImageError``."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise BadImageError(f"{image.width}x{image.height} pixels, {LIMIT}")
            if not (image.mode in GREY + COLOURS or _is_deep(image)):
                raise BadImageError(f"levels of mode {image.mode}, whose range is not known; 8 and 16 bits are read")
            yield image
    except UnidentifiedImageError:
        raise BadImageError("none of the formats that are read") from None
    except Image.DecompressionBombError:
        raise BadImageError(f"too many pixels, {LIMIT}") from None
    except Exception as error:  # Pillow raises many kinds for damaged files
        if isinstance(error, (BadImageError, MemoryError)) or getattr(error, "errno", None) is not None:
            raise
        raise BadImageError((str(error) or type(error).__name__).splitlines()[0]) from None


def _is_deep(image: Image.Image) -> bool:
    """Whether it has grey levels of 16 bits (or 12), which Pillow gives in several modes."""
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))


def _of_eight_bits(image: Image.Image) -> Image.Image:
    """The upper 8 bits of deep grey levels; the level that counts as transparent becomes white."""
    tags = getattr(image, "tag_v2", {})
    levels = np.asarray(image)
    if tags.get(262) == 0:  # a TIFF in which 0 is white
        levels = 65535 - levels
    levels = np.where(levels == image.info.get("transparency", -1), 255, levels >> (tags.get(258, (16,))[0] - 8))
    return Image.fromarray(levels.astype(np.uint8))


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 where there is none, or none that can be read."""
    try:
        return int(image.getexif().get(274, 1))
    except Exception:  # damaged EXIF says nothing of the pixels
        return 1


def _ends_whole(path: Path, form: str) -> bool:
    """Whether the end of a file shows that it is whole."""
    length = path.stat().st_size
    with path.open("rb") as file:
        if form == "WEBP":
            return int.from_bytes(file.read(8)[4:], "little") + 8 <= length
        file.seek(max(0, length - 64))
        return form in ENDS and file.read().rstrip(b"\0\r\n").endswith(ENDS[form])
