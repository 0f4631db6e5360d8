"""Image files: every mode against numpy, ADM's crop pixel by pixel, damaged and lying files named in no memory.

Modes, 16 bits, transparency, orientation and animation; damage by header and by decoding; memory;
last ADM's crop, against its definition in numpy.
"""

import io
import struct
import zlib

import numpy as np
import pytest
from helpers import memory_limit
from PIL import Image

from stores.pictures import ENDS, BadImageError, Header, center_crop, croppable, look, read

RNG = np.random.default_rng(0)
GREY = RNG.integers(256, size=(6, 9), dtype=np.uint8)
COLOUR = RNG.integers(256, size=(6, 9, 3), dtype=np.uint8)
ALPHA = RNG.integers(256, size=(6, 9), dtype=np.uint8)
DEEP = RNG.integers(65536, size=(6, 9), dtype=np.uint16)


def on_white(pixels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """(H, W, 3) and (H, W) -> its look on a white page."""
    share = alpha[..., None] / 255
    return np.floor(pixels * share + 255 * (1 - share) + 0.5 + 1e-9).astype(np.uint8)


def of_cmyk(inks: np.ndarray) -> np.ndarray:
    """(H, W, 4) inks -> RGB: each ink takes its share of the light that black leaves."""
    left = 255.0 - inks[..., 3:]
    return np.floor(left - np.floor(inks[..., :3] * left / 255 + 0.5)).clip(0, 255).astype(np.uint8)


def three(grey: np.ndarray) -> np.ndarray:
    return grey[..., None].repeat(3, axis=2)


def palette_image() -> tuple[Image.Image, np.ndarray, np.ndarray]:
    """A palette of 20 colours with an alpha for each: the image, its colours (H, W, 3) and alphas (H, W)."""
    indices = RNG.integers(20, size=(6, 9), dtype=np.uint8)
    colours, alphas = RNG.integers(256, size=(20, 3), dtype=np.uint8), RNG.integers(256, size=20, dtype=np.uint8)
    image = Image.fromarray(indices)
    image.putpalette(colours.tobytes())
    return image, colours[indices], alphas[indices], alphas


def cases() -> dict[str, tuple[Image.Image, str, dict, np.ndarray]]:
    """Name -> image, format, options of saving, and the right pixels."""
    palette, colours, alphas, table = palette_image()
    inks = RNG.integers(256, size=(6, 9, 4), dtype=np.uint8)
    high = (DEEP // 256).astype(np.uint8)
    key = tuple(int(v) for v in COLOUR[2, 3])
    keyed = np.where((key == COLOUR).all(-1, keepdims=True), 255, COLOUR)
    layers = np.dstack([COLOUR, ALPHA])
    return {
        "1 bit": (Image.fromarray(GREY > 99), "PNG", {}, three(np.where(GREY > 99, 255, 0))),
        "grey": (Image.fromarray(GREY), "PNG", {}, three(GREY)),
        "grey bmp": (Image.fromarray(GREY), "BMP", {}, three(GREY)),
        "grey alpha": (Image.fromarray(np.dstack([GREY, ALPHA])), "PNG", {}, on_white(three(GREY), ALPHA)),
        "colour": (Image.fromarray(COLOUR), "PNG", {}, COLOUR),
        "colour webp": (Image.fromarray(COLOUR), "WEBP", {"lossless": True}, COLOUR),
        "colour ppm": (Image.fromarray(COLOUR), "PPM", {}, COLOUR),
        "colour alpha": (Image.fromarray(layers), "PNG", {}, on_white(COLOUR, ALPHA)),
        "colour alpha tiff": (Image.fromarray(layers), "TIFF", {}, on_white(COLOUR, ALPHA)),
        "one colour transparent": (Image.fromarray(COLOUR), "PNG", {"transparency": key}, keyed),
        "palette": (palette, "PNG", {}, colours),
        "palette alpha": (palette, "PNG", {"transparency": table.tobytes()}, on_white(colours, alphas)),
        "palette gif": (palette, "GIF", {}, colours),
        "16 bits png": (Image.fromarray(DEEP), "PNG", {}, three(high)),
        "16 bits tiff": (Image.fromarray(DEEP), "TIFF", {}, three(high)),
        "16 bits tiff, packed": (Image.fromarray(DEEP), "TIFF", {"compression": "tiff_deflate"}, three(high)),
        "16 bits pgm": (Image.fromarray(DEEP), "PPM", {}, three(high)),
        "cmyk": (Image.fromarray(inks, "CMYK"), "TIFF", {}, of_cmyk(inks)),
    }


@pytest.mark.parametrize("name", cases())
def test_every_mode_is_read_as_numpy_says(name, tmp_path):
    image, form, options, expected = cases()[name]
    image.save(tmp_path / "image", form, **options)
    found = read(tmp_path / "image")
    assert found.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(found), expected)
    grey = not name.startswith(("colour", "palette", "one", "cmyk"))
    assert look(tmp_path / "image", decode=True) == Header(9, 6, grey, False)
    if grey:
        np.testing.assert_array_equal(np.asarray(read(tmp_path / "image", channels=1)), expected[..., 0])


def test_a_ramp_of_16_bits_keeps_its_mean(tmp_path):
    ramp = np.linspace(0, 2 * 78 * 257, 4096).astype(np.uint16).reshape(64, 64)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    assert np.asarray(read(tmp_path / "ramp.png")).mean() == pytest.approx(78, abs=0.6)


def test_16_bits_of_which_a_level_is_transparent_or_0_is_white(tmp_path):
    key = int(DEEP[2, 3])
    Image.fromarray(DEEP).save(tmp_path / "key.png", transparency=key)
    expected = np.where(key == DEEP, 255, DEEP // 256)
    np.testing.assert_array_equal(np.asarray(read(tmp_path / "key.png", 1)), expected)
    Image.fromarray(DEEP).save(tmp_path / "white.tiff", tiffinfo={262: 0})
    found = np.asarray(read(tmp_path / "white.tiff", 1))
    np.testing.assert_array_equal(found, (65535 - DEEP) // 256)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_photographs_stand_upright(form, tmp_path):
    """Four blocks, each of one grey, that survive any compression; how each orientation stores them is EXIF's table."""
    upright = np.kron(np.array([[30, 90, 150], [210, 250, 0]], np.uint8), np.ones((16, 16), np.uint8))
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: upright.T, 6: upright.T[::-1], 7: upright[::-1, ::-1].T, 8: upright.T[:, ::-1],
    }  # fmt: skip
    for orientation, pixels in stored.items():
        exif = Image.Exif()
        exif[274] = orientation
        options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(form, {})
        Image.fromarray(three(pixels)).save(tmp_path / "image", form, exif=exif, **options)
        assert look(tmp_path / "image")[:2] == (48, 32)
        found = np.asarray(read(tmp_path / "image"))[8::16, 8::16, 0]
        np.testing.assert_allclose(found, upright[8::16, 8::16], atol=2, err_msg=str(orientation))


def test_damaged_exif_does_not_spoil_an_image(tmp_path):
    Image.fromarray(COLOUR).save(tmp_path / "image.png", exif=b"Exif\0\0no EXIF at all")
    np.testing.assert_array_equal(np.asarray(read(tmp_path / "image.png")), COLOUR)


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_is_read(form, tmp_path):
    frames = [Image.fromarray(np.full((8, 8, 3), level, np.uint8)) for level in (30, 200)]
    frames[0].save(tmp_path / "image", form, save_all=True, append_images=frames[1:], lossless=True)
    assert look(tmp_path / "image").animated
    assert (np.asarray(read(tmp_path / "image")) == 30).all()


#################################################################################
#                                Unreadable files                               #
#################################################################################


@pytest.mark.parametrize("values", [np.float32, np.int32])
def test_levels_of_unknown_range_are_refused(values, tmp_path):
    Image.fromarray(RNG.integers(9, size=(6, 9)).astype(values)).save(tmp_path / "image.tiff")
    for reader in (look, read):
        with pytest.raises(BadImageError, match="range is not known; 8 and 16 bits are read"):
            reader(tmp_path / "image.tiff")


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM"])
def test_a_truncated_file_is_found_by_its_header_alone(form, tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(RNG.integers(256, size=(64, 64, 3), dtype=np.uint8)).save(buffer, form)
    whole, path = buffer.getvalue(), tmp_path / "image"
    path.write_bytes(whole)
    assert look(path)[:2] == (64, 64)
    for share in (0.05, 0.5, 0.97):
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(BadImageError):
            look(path)
    if form in ENDS:  # bytes after the end, or a missing end, are no damage as long as all pixels are there
        path.write_bytes(whole + b"something else")
        assert look(path)[:2] == (64, 64)


def test_damage_in_the_middle_is_found_by_decoding(tmp_path):
    path = tmp_path / "image.png"
    Image.linear_gradient("L").rotate(30).save(path)
    content = bytearray(path.read_bytes())
    begin = content.index(b"IDAT") + 6
    content[begin : begin + 100] = b"\xff" * 100  # no block of deflate begins so
    path.write_bytes(content)
    assert look(path)[:2] == (256, 256)
    for reader in (read, lambda path: look(path, decode=True)):
        with pytest.raises(BadImageError):
            reader(path)


def png(width: int, height: int, pixels: bytes) -> bytes:
    """A PNG of 8-bit RGB whose header may lie of the pixels behind it."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(pixels)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # pytest shows what our filter hides
@pytest.mark.parametrize("side", [60_000, 12_000, 9_000])
def test_a_header_that_lies_takes_no_memory(side, tmp_path):
    """Beyond Pillow's second limit, beyond its first, and below both, where the file ends before the pixels do."""
    path = tmp_path / "image.png"
    path.write_bytes(png(side, side, b"\0" * 100))
    with memory_limit(500):
        if side > 9460:
            with pytest.raises(BadImageError, match="the limit is 89 million"):
                look(path)
        else:
            assert look(path)[:2] == (side, side)
        with pytest.raises(BadImageError):
            read(path)


def test_a_line_of_pixels_is_not_grown_to_a_field():
    assert croppable(Header(4000, 3000, False, False), 512) and not croppable(Header(80_000, 1, False, False), 256)


def test_what_is_no_image_starts_no_other_program(tmp_path):
    """Pillow hands PostScript to Ghostscript, by its content."""
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    (tmp_path / "image.jpg").write_bytes(program)
    with Image.open(tmp_path / "image.jpg") as control:
        assert control.format == "EPS"
    with pytest.raises(BadImageError, match="none of the formats"):
        look(tmp_path / "image.jpg", decode=True)


def test_errors_of_the_system_are_not_the_images_fault(tmp_path):
    with pytest.raises(FileNotFoundError):
        look(tmp_path / "absent.png")


#################################################################################
#                                   The crop                                    #
#################################################################################


def halved(pixels: np.ndarray, axis: int) -> np.ndarray:
    """(H, W, 3) uint8 at half the length of an axis: each pixel is the mean, rounded, of those that lie in its box.

    A box of an odd length holds two pixels or three. Lengths of 4n + 1 have a pixel in the very middle of two boxes,
    which PIL gives to the left one or to none, as its arithmetic rounds: the test has none of these.
    """
    length, out = pixels.shape[axis], []
    for i in range(length // 2):
        begin, end = (length / (length // 2) * k for k in (i, i + 1))
        inside = [k for k in range(length) if begin < k + 0.5 < end]
        out.append(np.floor(pixels.take(inside, axis).astype(np.float64).mean(axis) + 0.5))
    return np.stack(out, axis).astype(np.uint8)


def crop_by_definition(pixels: np.ndarray, size: int) -> np.ndarray:
    """ADM's preprocessing of an array (H, W, 3); only the bicubic resizing is PIL's own."""
    while min(pixels.shape[:2]) >= 2 * size:
        pixels = halved(halved(pixels, axis=1), axis=0)
    height, width = (round(length * size / min(pixels.shape[:2])) for length in pixels.shape[:2])
    pixels = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))
    top, left = (height - size) // 2, (width - size) // 2
    return pixels[top : top + size, left : left + size]


@pytest.mark.parametrize(
    "height, width, size",
    [
        (70, 43, 16),  # portrait, halved once, odd
        (43, 70, 16),
        (41, 71, 64),  # landscape, enlarged
        (64, 64, 32),  # exactly twice
        (63, 97, 32),  # just less than twice: no halving
        (16, 23, 16),  # the crop alone
        (700, 924, 37),  # halved four times
        (1208, 812, 100),  # large, halved three times
    ],
)
def test_the_crop_is_adms_pixel_by_pixel(height, width, size):
    draw = np.random.default_rng(0)
    smooth = Image.fromarray(draw.integers(256, size=(9, 9, 3), dtype=np.uint8)).resize((width, height))
    pixels = np.asarray(smooth) // 2 + draw.integers(128, size=(height, width, 3), dtype=np.uint8)
    found = np.asarray(center_crop(Image.fromarray(pixels), size))
    assert found.shape == (size, size, 3)
    np.testing.assert_array_equal(found, crop_by_definition(pixels, size))
