"""Files of pictures: 16 bits, turned ones, other kinds of files, and files that take too much time or memory."""

import io
import os
import re
import resource
import struct

import numpy as np
import pytest
from examples import flat
from pictures import noise, png, png_16, tiff
from PIL import Image

from inputs import picture_checks, picture_files
from inputs.images import open_picture, picture_warnings
from inputs.picture_checks import check_file
from inputs.picture_files import rgb

# ------------------------------------------------------------------------------------------------------------- 16 bits


def grey_jpeg2000(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(values).save(file, "JPEG2000")
    return file.getvalue()


WIDE = {  # how a file is made of values (height, width, channels) of 16 bits, and its channels
    "grey.png": (lambda v: png_16(v[..., 0]), 1),
    "colour.png": (png_16, 3),
    "grey alpha.png": (png_16, 2),
    "colour alpha.png": (png_16, 4),
    "grey little.tif": (lambda v: tiff(v[..., 0]), 1),
    "grey big.tif": (lambda v: tiff(v[..., 0], ">"), 1),
    "grey packed.tif": (lambda v: tiff(v[..., 0], ">", packed=True), 1),
    "colour little.tif": (lambda v: tiff(v, "<", 2), 3),
    "colour big.tif": (lambda v: tiff(v, ">", 2), 3),
    "colour packed.tif": (lambda v: tiff(v, "<", 2, packed=True), 3),
    "colour packed big.tif": (lambda v: tiff(v, ">", 2, packed=True), 3),
    "colour alpha.tif": (lambda v: tiff(v, "<", 2, t338=2), 4),
    "grey.pgm": (lambda v: b"P5\n8 6\n65535\n" + v.astype(">u2").tobytes(), 1),
    "grey text.pgm": (lambda v: b"P2 # 1 2\n8 6 65535 " + b" ".join(b"%d" % x for x in v.flatten()), 1),
    "colour.ppm": (lambda v: b"P6 8 6 65535\n" + v.astype(">u2").tobytes(), 3),
    "grey.jp2": (lambda v: grey_jpeg2000(v[..., 0]), 1),
}


def values_below(limit: int, channels: int) -> np.ndarray:
    """Random ones (6, 8, channels), among them the largest; opaque."""
    values = np.random.default_rng(limit).integers(0, limit, (6, 8, channels)).astype(np.uint16)
    values[0, 0] = limit - 1
    if channels in (2, 4):
        values[..., -1] = 65535
    return values


@pytest.mark.parametrize("name", WIDE)
@pytest.mark.parametrize(
    "limit, bits", [(65536, 16), (20000, 16), (16384, 14), (4096, 12), (1025, 12), (1024, 10), (256, 8), (9, 8)]
)
def test_16_bit_pictures_are_shown_in_the_range_that_their_values_use(tmp_path, name, limit, bits):
    make, channels = WIDE[name]
    values = values_below(limit, channels)
    (tmp_path / name).write_bytes(make(values))
    size = check_file(str(tmp_path / name), True)
    assert size == (6, 8) and size.bits == bits
    colours = values[..., : channels - (channels in (2, 4))] >> bits - 8
    seen = np.asarray(open_picture(str(tmp_path / name))).astype(int)
    assert abs(seen - colours).max() <= name.endswith("m")  # PGM and PPM are rounded


@pytest.mark.parametrize(
    "content, bits, shown",
    [
        (tiff(np.full((6, 8), 400, np.uint16), t281=4095), 12, 400 >> 4),
        (tiff(np.full((6, 8), 400, np.uint16), t281=65535), 10, 400 >> 2),  # what 16 bits can hold says nothing
        (tiff(np.full((6, 8), 4000, np.uint16), t281=100), 12, 4000 >> 4),  # exceeded
        (tiff(np.tile(np.array([0x40, 4, 4], np.uint8), (6, 4)), t256=8, t258=12), 12, 0x40),
        (b"P5\n8 6\n4095\n" + bytes([1, 0x90] * 48), 12, 400 * 255 / 4095),
        (b"P6\n8 6\n1000\n" + bytes([1, 0x90] * 144), 10, 400 * 255 / 1000),
        (b"P2\n8 6\n300\n" + b"150 " * 48, 10, 127.5),
    ],
)  # fmt: skip
def test_a_declared_range_holds_for_dark_pictures_too(tmp_path, content, bits, shown):
    path = str(tmp_path / "picture")
    (tmp_path / "picture").write_bytes(content)
    size = check_file(path, True)
    assert size == (6, 8) and size.bits == bits
    assert abs(np.asarray(open_picture(path)) - shown).max() <= 0.5


@pytest.mark.parametrize("kind, largest, bits", [(np.uint8, 255, 0), (np.uint16, 65535, 16), (np.uint16, 4095, 12)])
@pytest.mark.parametrize("packed", [False, True])
def test_tiffs_whose_smallest_value_is_white_are_shown_so(tmp_path, kind, largest, bits, packed):
    values = np.full((6, 8), largest, kind)
    values[0, 0] = 0
    (tmp_path / "a.tif").write_bytes(tiff(values, photometric=0, packed=packed))
    assert check_file(str(tmp_path / "a.tif"), True).bits == bits
    seen = np.asarray(open_picture(str(tmp_path / "a.tif")))
    assert seen[0, 0].tolist() == [255] * 3 and seen[1:].max() == 0


def test_values_that_pillow_does_not_give_are_refused_where_they_would_be_black(tmp_path):
    dark = values_below(4096, 3)
    for name, content, reason in (
        ("planes.tif", tiff(dark, "<", 2, packed=True, planes=2), "its values use 12 of 16 bits: save it with 8"),
        ("raw planes.tif", tiff(dark, "<", 2, planes=2), "stored one after the other"),
        ("signed.tif", tiff(dark[..., 0], t339=2), "no fixed range"),
        ("signed8.tif", tiff(np.full((6, 8), 200, np.uint8), t339=2), "no fixed range"),
    ):
        (tmp_path / name).write_bytes(content)
        assert reason in check_file(str(tmp_path / name), True)


def test_16_bit_pictures_of_few_bits_are_warned_of_by_depth(load, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, limit in {"a": 4096, "b": 4000, "c": 900, "d": 65536}.items():
        (tmp_path / f"{name}.png").write_bytes(png_16(values_below(limit, 1)[..., 0]))
    noise(64, 64).save(tmp_path / "e.png")
    for names, expected in (("de", []), ("dabce", [(10, 1, "c"), (12, 2, "a"), (16, 1, "d")])):
        for _ in range(2):  # the second time from the memory of checked images
            data = load([flat(image=f"{name}.png") for name in names], tmp_path)
            assert picture_warnings(data.sizes) == [
                f"images of 16 bits per value that use {bits} of them and are shown in that range: "
                f"{count}\n  {name}.png"
                for bits, count, name in expected
            ]


# -------------------------------------------------------------------------------------------------------------- turned

UPRIGHT = {  # EXIF orientation: what makes stored rows and columns upright
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


def stored(mode: str) -> Image.Image:
    """A picture of 48 x 40 in this mode without two equal quarters."""
    if mode == "I;16":
        return Image.fromarray(np.random.default_rng(0).integers(0, 65536, (40, 48)).astype(np.uint16))
    return noise(40, 48).quantize(64) if mode == "P" else noise(40, 48).convert(mode)


@pytest.mark.parametrize("mode", ["1", "L", "P", "I;16", "LA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB"])
@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_turned_tiffs_are_upright(tmp_path, mode, compression):
    picture, path = stored(mode), str(tmp_path / "a.tif")
    for orientation, upright in UPRIGHT.items():
        picture.save(path, tiffinfo={274: orientation}, compression=compression)
        seen = np.asarray(open_picture(path))
        if orientation == 1:
            eight = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8)) if mode == "I;16" else picture
            first = seen
            assert abs(first - np.asarray(rgb(eight)).astype(int)).max() <= (2 if mode == "YCbCr" else 0)
        np.testing.assert_array_equal(seen, upright(first), f"orientation {orientation}")
        assert check_file(path, True) == check_file(path, False) == seen.shape[:2]


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.jpg"])
def test_turned_pictures_are_upright(tmp_path, name):
    exif, path = Image.Exif(), str(tmp_path / name)
    options = {} if name == "a.jpg" else {"lossless": True}
    noise(40, 48).save(path, **options)
    flat_picture = np.asarray(open_picture(path))
    for orientation, upright in UPRIGHT.items():
        exif[0x0112] = orientation
        noise(40, 48).save(path, exif=exif, **options)
        expected = upright(flat_picture)
        assert check_file(path, True) == check_file(path, False) == expected.shape[:2]
        np.testing.assert_array_equal(np.asarray(open_picture(path)), expected, f"orientation {orientation}")


@pytest.mark.parametrize("exif", [b"", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0garbage" * 9])
@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.jpg"])
def test_damaged_exif_is_no_part_of_a_picture(tmp_path, name, exif):
    noise(40, 48).save(tmp_path / name, exif=exif)
    assert check_file(str(tmp_path / name), True) == check_file(str(tmp_path / name), False) == (40, 48)
    assert open_picture(str(tmp_path / name)).size == (48, 40)


# ------------------------------------------------------------------------------------------------ other kinds of files

OTHER_FILES = {  # what a file starts with, and what the reason calls it
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n{ } loop\n": "an EPS or PostScript document; save it as PNG",
    b"\xc5\xd0\xd3\xc6" + bytes(40): "an EPS document",
    b"%PDF-1.7\n": "a PDF document",
    b"8BPS\0\1": "a Photoshop document",
    b"\0\0\1\0\1\0": "an icon (ICO)",
    b"<?xml version='1.0'?>\n<!-- drawn -->\n<svg width='9'/>": "an SVG drawing",
    b"<svg xmlns='http://www.w3.org/2000/svg'/>": "an SVG drawing",
    b"\xef\xbb\xbf\n<!DOCTYPE html><html>": "an HTML page",
    b"SIMPLE  =                    T": "a FITS file",
    bytes(128) + b"DICM\2\0": "a DICOM file",
    b"\0\0\0\x18ftypheic\0\0\0\0mif1heic": "a HEIC picture",
    b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic": "a HEIF picture",
    b"\0\0\0\x18ftypisom": "a video",
    b"\0\0\0\x0cJXL \r\n\x87\n": "a JPEG XL picture",
    b"\x1f\x8b\x08\0": "a gzip archive",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n": "a Git LFS pointer; `git lfs pull` fetches",
    b"\0" * 5000: "nothing but zeros",
    b"": "it is empty",
    b"GIF89a": "unusual or damaged kind; save it as PNG or JPEG",
    b"II*\0\x08\0\0\0\0\0": "unusual or damaged kind; save it as PNG or JPEG",
}


@pytest.mark.parametrize("content, kind", OTHER_FILES.items())
@pytest.mark.parametrize("name", ["a.jpg", "a.eps"])
def test_a_file_of_another_kind_is_named_whatever_its_name(tmp_path, content, kind, name):
    (tmp_path / name).write_bytes(content)
    for decode in (True, False):
        reason = check_file(str(tmp_path / name), decode)
        assert reason.startswith("unreadable: it ") and kind in reason


def test_pillow_is_asked_for_no_other_kind(tmp_path, monkeypatch):
    Image.init()
    other = {kind: lambda *_: pytest.fail("opened") for kind in set(Image.OPEN) - set(picture_files.FORMATS)}
    monkeypatch.setattr(Image, "OPEN", Image.OPEN | {kind: (fail, None) for kind, fail in other.items()})
    (tmp_path / "a.jpg").write_bytes(next(iter(OTHER_FILES)))
    assert len(other) > 20 and "EPS" in check_file(str(tmp_path / "a.jpg"), True)


def test_a_pipe_a_device_or_a_folder_stops_nothing(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for path, reason in (
        (tmp_path / "pipe.png", "a pipe or a device"),
        ("/dev/zero", "a pipe"),
        (tmp_path, "directory"),
    ):
        assert reason in check_file(str(path), True)


def test_the_first_of_several_frames_is_used_and_told(load, tmp_path):
    frames = [Image.new("RGB", (64, 32), colour) for colour in ((250, 0, 0), (0, 0, 250))]
    names = ["gif", "png", "webp", "tif", "avif", "mpo"]
    for name in names:
        frames[0].save(tmp_path / f"a.{name}", save_all=True, append_images=frames[1:])
        frames[0].save(tmp_path / f"b.{name}")
        assert open_picture(str(tmp_path / f"a.{name}")).getpixel((5, 5))[0] > 240
    for headers_only in (True, False):
        rows = [flat(image=f"{which}.{name}") for name in names for which in "ba"]
        data = load(rows, tmp_path, headers_only=headers_only)
        told = ["images with several frames or pages, of which the first is used: 6\n  a.avif"]
        assert not data.bad and picture_warnings(data.sizes) == told


def test_a_small_copy_before_the_picture_is_not_taken_for_it(tmp_path):
    Image.new("L", (64, 32)).save(tmp_path / "a.tif", tiffinfo={254: 1, 330: 8})
    assert "small copy" in check_file(str(tmp_path / "a.tif"), True)


# --------------------------------------------------------------------------------------------- too much time or memory


def webp_canvas(side: int) -> bytes:
    """38 bytes of a WebP with this canvas and no picture."""
    chunk = struct.pack("<IB3x", 10, 2) + 2 * struct.pack("<I", side - 1)[:3]
    return b"RIFF" + struct.pack("<I", 30) + b"WEBPVP8X" + chunk + bytes(8)


def jpeg(side: int, **options) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side)).save(file, "JPEG", **options)
    return file.getvalue()


def many_scans() -> bytes:
    """A progressive JPEG that repeats its last scan."""
    content = jpeg(1000, progressive=True)
    return content[:-2] + content[content.rindex(b"\xff\xda") : -2] * 20_000 + b"\xff\xd9"


def gif(screen: int, frame: int) -> bytes:
    head = b"GIF89a" + struct.pack("<HHBBB", screen, screen, 0, 0, 0)
    return head + b"," + struct.pack("<HHHHB", 0, 0, frame, frame, 0) + b"\x08\0;"


def test_a_file_takes_a_limited_time_and_memory(tmp_path, monkeypatch):
    files = {
        "canvas.webp": (webp_canvas(16384), "over 100 megapixels|decoder"),
        "screen.gif": (gif(65535, 1), "over 100 megapixels"),
        "frame.gif": (gif(8, 65535), "over 100 megapixels"),
        "pages.tif": (tiff(np.zeros((9, 9), np.uint8), t257=60_000, t256=60_000), "over 100 megapixels"),
        "text.png": (png(64, 64, text=bytes(100_000_000)), "too large"),
        "scans.jpg": (many_scans(), "takes over 1 seconds to decode"),
        "memory.jpg": (jpeg(6000), "takes too much memory"),
    }
    noise(64, 64).save(tmp_path / "z.png")
    for name, (content, _) in files.items():
        (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(picture_checks, "LIMITS", (1, 2**27))
    paths = [str(tmp_path / name) for name in (*files, "z.png")]
    *reasons, good = picture_checks.check_files(paths, True)
    for (name, (_, pattern)), reason in zip(files.items(), reasons, strict=True):
        assert isinstance(reason, str) and re.search(pattern, reason), f"{name}: {reason}"
    assert good == (64, 64)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 2**20  # KiB


def test_a_file_that_ends_the_process_leaves_the_checks_of_those_asked_for_with_it(tmp_path, monkeypatch):
    noise(64, 64).save(tmp_path / "a.png")
    (tmp_path / "scans.jpg").write_bytes(many_scans())
    noise(48, 40).save(tmp_path / "z.png")
    monkeypatch.setattr(picture_checks, "LIMITS", (1, 2**27))
    checker = picture_checks.Checker()
    paths = [str(tmp_path / name) for name in ("a.png", "scans.jpg", "z.png", "scans.jpg")]
    first, slow, last, again = checker.check_all(paths, True)
    assert (first, last) == (picture_checks.check_file(paths[0], True), picture_checks.check_file(paths[2], True))
    assert "takes over 1 seconds" in slow and slow == again
    checker.end()


def test_headers_are_read_in_the_order_of_the_files(tmp_path):
    sizes = [(8 + number, 9) for number in range(3 * picture_checks.FILES_PER_PROCESS + 1)]
    for height, width in sizes:
        Image.new("RGB", (width, height)).save(tmp_path / f"{height}.png")
    paths = [str(tmp_path / f"{height}.png") for height, _ in sizes]
    assert list(picture_checks.check_files(paths, False)) == sizes


def test_a_process_that_fails_by_itself_is_an_error_and_no_picture_s_fault(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONHOME", str(tmp_path))
    with pytest.raises(RuntimeError, match="ended with code 1"):
        list(picture_checks.check_files(["a.png"], True))
