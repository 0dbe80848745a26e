"""Pictures of 16 bits per value: how many bits their values use, and their copies with 8.

Cameras and scanners store 10, 12 or 14 bits in files of 16, and the upper eight of these would be nearly black. A
picture is shown in the range that its file declares, or else in the smallest of `DEPTHS` that holds its largest value.
That depends on its file alone: training and evaluation see the same pixels, whatever other pictures they see.
"""

import math
import re

import numpy as np
from PIL import Image

from inputs.picture_files import TIFF_BITS, TIFF_PHOTOMETRIC, TIFF_PLANES, jpeg2000_bits, opened, rawmode

DEPTHS = (8, 10, 12, 14, 16)
TIFF_MAX_SAMPLE_VALUE = 281
BYTES_APART = ("RGB;16", "RGBX;16", "RGBA;16", "CMYK;16")  # raw modes of which Pillow reads either byte


def depth(largest: int) -> int:
    """The smallest of `DEPTHS` that holds this value."""
    return next(bits for bits in DEPTHS if largest < 1 << bits)


def to_eight_bits(image: Image.Image, path: str) -> tuple[Image.Image, int]:
    """A picture of 16 bits per value with 8, and how many of the 16 are used. `image` is `path`, not decoded yet.

    Raises ValueError where fewer than 15 are used and Pillow does not give them.
    """
    if image.format == "PPM":
        return _from_ppm(image)
    raw = rawmode(image)
    if raw == "LA;16B":  # four bytes per pixel, which Pillow reads apart as if they were colours
        values = _decoded_as(image, "RGBA").astype(np.uint16)
        return _from_colours(values[..., ::2] << 8 | values[..., 1::2], "LA")
    if image.mode.startswith("I"):
        return _from_greys(image)
    image.load()
    upper = np.asarray(image)
    largest = int((upper[..., :3] if image.mode == "RGBA" else upper).max())
    if largest >= 1 << 6:  # 15 or 16 bits are used, and Pillow has kept the upper eight
        return image, 16
    in_planes = image.format == "TIFF" and image.tag_v2.get(TIFF_PLANES) == 2
    if in_planes or not raw.startswith(BYTES_APART):
        raise ValueError(f"its values use {depth((largest << 8) + 255)} of 16 bits: save it with 8")
    with opened(path) as again:  # in the other byte order, lower bytes take the place of upper ones; N is L here
        lower = _decoded_as(again, raw[:-1] + ("L" if raw.endswith("B") else "B"))
    return _from_colours(upper.astype(np.uint16) << 8 | lower, image.mode)


def _decoded_as(image: Image.Image, raw: str) -> np.ndarray:
    """The values of a file that is decoded as if its raw mode were another."""
    for number, tile in enumerate(image.tile):
        image.tile[number] = tile._replace(args=raw if isinstance(tile.args, str) else (raw, *tile.args[1:]))
    image.load()
    return np.asarray(image)


def _from_greys(image: Image.Image) -> tuple[Image.Image, int]:
    declared = _declared(image)
    image.load()
    values = np.asarray(image)
    used = depth(max(declared, int(values.max())))
    grey = (values >> used - 8).astype(np.uint8)
    white_is_zero = image.format == "TIFF" and image.tag_v2.get(TIFF_PHOTOMETRIC) == 0
    return Image.fromarray(~grey if white_is_zero else grey), used


def _declared(image: Image.Image) -> int:
    """The largest value that a file of greys declares, 0 if none."""
    if image.format == "JPEG2000" and jpeg2000_bits(image) < 16:
        return 65535  # Pillow has scaled the declared range to this
    if image.format != "TIFF":
        return 0
    tags = image.tag_v2.get(TIFF_MAX_SAMPLE_VALUE, ())
    declared = [(1 << image.tag_v2[TIFF_BITS][0]) - 1, *(value for value in tags if isinstance(value, int))]
    return min(declared) if min(declared) < 65535 else 0  # what 16 bits can hold at most says nothing of the range


def _from_colours(values: np.ndarray, mode: str) -> tuple[Image.Image, int]:
    """Colours share a range. Alpha has the same, or 16 bits where it exceeds that."""
    bands = values.shape[-1] - mode.endswith("A")
    used = depth(int(values[..., :bands].max()))
    shifts = np.full(values.shape[-1], used - 8, np.uint16)
    if values[..., bands:].max(initial=0) >= 1 << used:
        shifts[bands:] = 8
    return Image.frombytes(mode, values.shape[1::-1], (values >> shifts).astype(np.uint8).tobytes()), used


def _from_ppm(image: Image.Image) -> tuple[Image.Image, int]:
    """Without Pillow's decoder, which is slow and forgets the declared range. Rounds as it does for colours."""
    tile = image.tile[0]
    shape = (image.height, image.width, len(image.getbands()))
    image.fp.seek(tile.offset)
    content = image.fp.read()
    if tile.codec_name == "ppm_plain":
        values = np.array(re.sub(rb"#.*", b"", content).split()).astype(np.uint16)[: math.prod(shape)].reshape(shape)
    else:
        values = np.frombuffer(content, ">u2", math.prod(shape)).reshape(shape)
    declared = tile.args[-1] if isinstance(tile.args, tuple) else 65535
    used = depth(int(values.max()) if declared == 65535 else declared)
    top = (1 << used) - 1 if declared == 65535 else declared
    table = np.rint(np.arange(65536) / top * 255).clip(0, 255).astype(np.uint8)
    eight = np.empty(shape, np.uint8)
    for row, line in enumerate(values):  # a line at a time, as an index takes eight bytes per value
        eight[row] = table[line]
    mode = "L" if image.mode == "I" else image.mode
    return Image.frombytes(mode, image.size, eight.tobytes()), used
