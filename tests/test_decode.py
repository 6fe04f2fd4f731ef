"""Pictures of every mode come out as 8-bit RGB, as a viewer shows them."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from asymflow_ft.data.decode import UnreadableImage, decode


def encoded(picture, kind="PNG", **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def png(width, depth, color_type, values, *chunks):
    """A PNG of one line, written by hand: PIL writes no 16-bit colours."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, 1, depth, color_type, 0, 0, 0)
    line = zlib.compress(b"\0" + np.array(values, ">u2").tobytes())
    body = [chunk(b"IHDR", header), *(chunk(*extra) for extra in chunks), chunk(b"IDAT", line), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def pixels(content):
    return np.asarray(decode(content, "x")).astype(int)


def test_sixteen_bit_grey_keeps_its_gradient():
    ramp = np.arange(256, dtype=np.uint16)[None] * 257
    expected = np.arange(256)[None, :, None].repeat(3, 2)
    for kind in ("PNG", "TIFF"):
        assert (pixels(encoded(Image.fromarray(ramp), kind)) == expected).all()
    assert (pixels(encoded(Image.fromarray(ramp.astype(np.int32)), "TIFF")) == expected).all()  # mode I
    assert (pixels(b"P5 256 1 65535\n" + ramp.astype(">u2").tobytes()) == expected).all()
    assert (pixels(encoded(Image.fromarray(ramp.astype(np.float32) / 65535), "TIFF")) == expected).all()  # mode F
    assert pixels(png(2, 16, 0, [0, 32768]))[0, :, 0].tolist() == [0, 128]
    transparent = png(3, 16, 0, [0, 32768, 65535], (b"tRNS", struct.pack(">H", 32768)))
    assert pixels(transparent)[0, :, 0].tolist() == [0, 255, 255]


def test_grey_values_without_a_known_range_are_refused():
    for values, told in ((np.array([[70000]], np.int32), "0 and 65535"), (np.array([[1.5]], np.float32), "0 and 1")):
        with pytest.raises(UnreadableImage, match=f"x: grey values .* must be between {told}"):
            decode(encoded(Image.fromarray(values), "TIFF"), "x")
    with pytest.raises(UnreadableImage, match="nan"):
        decode(encoded(Image.fromarray(np.array([[np.nan]], np.float32)), "TIFF"), "x")


def test_sixteen_bit_colour():
    assert abs(pixels(png(1, 16, 2, [0, 32768, 65535]))[0, 0] - [0, 128, 255]).max() <= 1
    assert abs(pixels(png(1, 16, 6, [0, 32768, 65535, 32768]))[0, 0] - [127, 191, 255]).max() <= 2  # half on white


def test_transparency_lies_on_white():
    half = Image.new("RGBA", (2, 2), (0, 0, 0, 51))
    assert pixels(encoded(half))[0, 0].tolist() == [204, 204, 204]
    assert pixels(encoded(Image.new("LA", (2, 2), (0, 51))))[0, 0].tolist() == [204, 204, 204]
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    assert pixels(encoded(palette, transparency=0))[0].tolist() == [[255, 255, 255], [0, 0, 255]]
    assert pixels(encoded(palette, transparency=bytes([204, 255])))[0].tolist() == [[255, 51, 51], [0, 0, 255]]
    assert pixels(encoded(palette, "GIF", transparency=0))[0].tolist() == [[255, 255, 255], [0, 0, 255]]
    assert pixels(encoded(Image.new("RGB", (1, 1), "red"), transparency=(255, 0, 0)))[0, 0].tolist() == [255] * 3
    assert pixels(encoded(palette))[0].tolist() == [[255, 0, 0], [0, 0, 255]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation):
    upright = Image.new("L", (3, 2))
    upright.putdata([0, 50, 100, 150, 200, 250])
    # how a camera held so would have stored the upright picture
    stored_by = {
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }
    stored = upright
    for step in stored_by.get(orientation, []):
        stored = stored.transpose(step)
    exif = Image.Exif()
    exif[274] = orientation
    assert (pixels(encoded(stored, exif=exif))[..., 0] == np.asarray(upright)).all()


def test_other_kinds():
    assert abs(pixels(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))[0, 0] - [255, 0, 0]).max() < 6
    bits = Image.new("1", (8, 1))
    bits.putpixel((3, 0), 1)
    assert pixels(encoded(bits))[0, :, 0].tolist() == [0, 0, 0, 255, 0, 0, 0, 0]
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    for kind in ("GIF", "PNG", "WEBP"):
        content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
        assert pixels(content)[0, 0].tolist() == [255, 0, 0]


def test_broken_files_are_named(monkeypatch):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"):
        with pytest.raises(UnreadableImage, match=r"^shelf/x\.img: "):
            decode(encoded(noise, kind)[:1000], "shelf/x.img")
    with pytest.raises(UnreadableImage, match=r"^x: not an image that PIL can read \(5 bytes\)"):
        decode(b"hello", "x")
    with pytest.raises(UnreadableImage, match=r"^x: "):
        decode(b"", "x")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UnreadableImage, match=r"^x: .* exceeds limit"):
        decode(encoded(noise), "x")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_no_damage_escapes_as_another_exception():
    rng = np.random.default_rng(1)
    noise = Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8))
    exif = Image.Exif()
    exif[274], exif[271] = 6, "maker"
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"):
        options = {"exif": exif} if kind in ("PNG", "JPEG", "WEBP", "TIFF") else {}
        whole = bytearray(encoded(noise, kind, **options))
        for _ in range(60):
            broken = bytearray(whole)
            for at in rng.integers(0, min(len(whole), 300), 4):
                broken[at] = rng.integers(0, 256)
            try:
                assert decode(bytes(broken), "x").mode == "RGB"
            except UnreadableImage as error:
                assert str(error).startswith("x: ")
