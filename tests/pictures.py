"""Pictures of every kind, with the colours that they display, and unusable files, with the reason."""

import os
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def noise(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def png(width: int, height: int, pixels: bytes = b"", bits: int = 8, colour: int = 2, text: bytes = b"") -> bytes:
    """A PNG of these rows, each after its filter byte. Bits and colour type as in its header."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))]
    chunks += [(b"zTXt", b"a\0\0" + zlib.compress(text))] if text else []
    chunks += [(b"IDAT", zlib.compress(pixels)), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


def png_16(values: np.ndarray) -> bytes:
    """A PNG of 16-bit values (height, width) or (height, width, channels)."""
    height, width, channels = np.atleast_3d(values).shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return png(width, height, rows, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels])


def tiff(values: np.ndarray, order: str = "<", photometric: int = 1, packed: bool = False, planes: int = 1, **tags):
    """A TIFF of values (height, width) or (height, width, channels). `tags`: more of them, as t274=6."""
    height, width, channels = np.atleast_3d(values).shape
    data = np.atleast_3d(values).astype(values.dtype.newbyteorder(order))
    strips = [data.tobytes()] if planes == 1 else [plane.tobytes() for plane in np.moveaxis(data, 2, 0)]
    strips = [zlib.compress(strip) for strip in strips] if packed else strips
    fields = {
        256: [width],
        257: [height],
        258: [8 * values.dtype.itemsize] * channels,
        259: [8 if packed else 1],
        262: [photometric],
        273: [0] * len(strips),
        277: [channels],
        278: [height],
        279: [len(strip) for strip in strips],
        284: [planes],
    } | {int(tag[1:]): np.atleast_1d(value).tolist() for tag, value in tags.items()}

    def header() -> bytes:
        entries, rest = b"", b""
        for tag, numbers in sorted(fields.items()):
            content = struct.pack(f"{order}{len(numbers)}I", *numbers)
            if len(numbers) > 1:
                rest, content = rest + content, struct.pack(f"{order}I", 14 + 12 * len(fields) + len(rest))
            entries += struct.pack(f"{order}HHI", tag, 4, len(numbers)) + content
        start = struct.pack(f"{order}HIH", 42, 8, len(fields))
        return (b"II" if order == "<" else b"MM") + start + entries + bytes(4) + rest

    fields[273] = np.cumsum([len(header()), *map(len, strips)])[:-1].tolist()
    return header() + b"".join(strips)


def png_header_only(path: Path, width: int, height: int) -> None:
    path.write_bytes(png(width, height))


def cut_short(path: Path, share: float) -> None:
    noise(300, 200).save(path)
    os.truncate(path, int(path.stat().st_size * share))


# name: (how it comes to be, what the reason says)
BAD_IMAGES = {
    "missing.png": (lambda path: None, "is missing"),
    "folder.png": (lambda path: path.mkdir(), "is a folder"),
    "empty.jpg": (lambda path: path.touch(), "unreadable"),
    "page.jpg": (lambda path: path.write_text("<html><body>404</body></html>"), "unreadable"),
    "cut.jpg": (lambda path: cut_short(path, 0.5), "truncated"),
    "cut.png": (lambda path: cut_short(path, 0.9), "truncated"),
    "header.png": (lambda path: png_header_only(path, 64, 64), "truncated"),
    "huge.png": (lambda path: png_header_only(path, 10_001, 10_000), "over 100 megapixels"),
    "bomb.png": (lambda path: png_header_only(path, 30_000, 30_000), "over 100 megapixels"),
    "tall.png": (lambda path: Image.new("L", (1, 5000)).save(path), "aspect ratio"),
    "wide.png": (lambda path: Image.new("L", (5000, 1)).save(path), "aspect ratio"),
    "float.tif": (lambda path: Image.new("F", (64, 64), 0.5).save(path), "mode F"),
    "int32.tif": (lambda path: Image.new("I", (64, 64), 70_000).save(path), "mode I"),
}


def two_halves(mode: str, left, right, width: int = 64, height: int = 32) -> Image.Image:
    image = Image.new(mode, (width, height), left)
    image.paste(right, (width // 2, 0, width, height))
    return image


def palette_with_transparency() -> Image.Image:
    image = Image.new("P", (64, 32), 1)
    image.putpalette([0, 0, 0, 200, 10, 10, 10, 200, 10])
    image.paste(2, (32, 0, 64, 32))
    image.info["transparency"] = 2
    return image


def turned(orientation: int) -> tuple[Image.Image, dict]:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return two_halves("RGB", RED, BLUE), {"exif": exif}


GREY_16 = Image.fromarray(np.array([[0xAB12] * 32 + [0x0345] * 32] * 32, np.uint16))
RED, BLUE, WHITE = (200, 10, 10), (10, 10, 200), (255, 255, 255)
# name: (picture and how to save it, colours displayed at the top left and bottom right corner, grid of 8-pixel patches)
VALID_IMAGES = {
    "plain.png": ((two_halves("RGB", RED, BLUE), {}), RED, BLUE, (4, 8)),
    "cmyk.jpg": ((two_halves("CMYK", (55, 245, 245, 0), (245, 245, 55, 0)), {"quality": 100}), RED, BLUE, (4, 8)),
    "palette.gif": ((two_halves("RGB", RED, BLUE).quantize(4), {}), RED, BLUE, (4, 8)),
    "palette.png": ((palette_with_transparency(), {"transparency": 2}), RED, WHITE, (4, 8)),
    "rgba.png": ((two_halves("RGBA", (*RED, 255), (0, 0, 0, 0)), {}), RED, WHITE, (4, 8)),
    "half.png": ((two_halves("LA", (0, 127), (55, 255)), {}), (128,) * 3, (55,) * 3, (4, 8)),
    "grey.png": ((two_halves("L", 9, 77), {}), (9,) * 3, (77,) * 3, (4, 8)),
    "black-white.png": ((two_halves("1", 1, 0), {}), WHITE, (0,) * 3, (4, 8)),
    "grey16.png": ((GREY_16, {}), (0xAB,) * 3, (3,) * 3, (4, 8)),
    "grey16.tif": ((GREY_16, {}), (0xAB,) * 3, (3,) * 3, (4, 8)),
    "turned.png": (turned(6), RED, BLUE, (8, 4)),
    "turned.jpg": (turned(8), BLUE, RED, (8, 4)),
    "upside-down.png": (turned(3), BLUE, RED, (4, 8)),
    "dot.png": ((Image.new("RGB", (1, 1), RED), {}), RED, RED, (2, 2)),
    "line.png": ((two_halves("RGB", RED, BLUE, 200, 1), {}), RED, BLUE, (2, 30)),
}
