"""Files of pictures: opening those of the kinds that are meant, and what their headers tell.

Pillow opens more kinds than these. A document named as a picture would start another program.
"""

import codecs
import os
import stat
from contextlib import contextmanager

# Opening an image by its file imports all of Pillow's plugins, unless those of the formats are there.
from PIL import AvifImagePlugin, ExifTags, Image, Jpeg2KImagePlugin, TiffImagePlugin, WebPImagePlugin  # noqa: F401

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "JPEG2000", "AVIF")
MAX_IMAGE_PIXELS = 100_000_000
TIFF_SUBFILE, TIFF_BITS, TIFF_PHOTOMETRIC, TIFF_PLANES = 254, 258, 262, 284
TIFF_SUB_PAGES, TIFF_SAMPLE_FORMAT = 330, 339
UNSIGNED = (1, 4)  # sample formats; 4 is undefined, as which 1 is read
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # EXIF orientations and what makes them upright

# What a file with a picture's name often is instead: where its mark stands, the mark, the kind.
MARKS = (
    (0, b"%!PS", "an EPS or PostScript document"),
    (0, b"\xc5\xd0\xd3\xc6", "an EPS document"),
    (0, b"%PDF", "a PDF document"),
    (0, b"8BPS", "a Photoshop document"),
    (0, b"\0\0\1\0", "an icon (ICO)"),
    (0, b"\0\0\2\0", "a cursor (CUR)"),
    (0, b"SIMPLE  =", "a FITS file"),
    (128, b"DICM", "a DICOM file"),
    (4, b"ftypmif1", "a HEIF picture"),
    (4, b"ftypmsf1", "a HEIF picture"),
    (4, b"ftyphe", "a HEIC picture"),
    (4, b"ftyp", "a video, or a picture in a camera's own format"),
    (8, b"AVI ", "a video"),
    (0, b"\x1aE\xdf\xa3", "a video"),
    (0, b"\xff\x0a", "a JPEG XL picture"),
    (0, b"\0\0\0\x0cJXL ", "a JPEG XL picture"),
    (0, b"v/1\1", "an OpenEXR picture"),
    (0, b"#?RADIANCE", "a Radiance HDR picture"),
    (0, b"DDS ", "a DDS texture"),
    (0, b"\x93NUMPY", "a NumPy array"),
    (0, b"\x89HDF", "an HDF5 file"),
    (344, b"n+1\0", "a NIfTI volume"),
    (0, b"\x1f\x8b", "a gzip archive"),
    (0, b"PK\3\4", "a zip archive"),
)
NO_KIND = "it is no JPEG, PNG, WebP, BMP, TIFF, GIF, PPM, JPEG 2000 or AVIF file, or one of an unusual or damaged kind"


# ------------------------------------------------------------------------------------------------------------- opening


class NotAPicture(ValueError):
    """A file is of none of the kinds that are opened. The message says what it is."""


@contextmanager
def opened(path: str):
    """Pillow's image of a file, its pixels not read yet. Raises NotAPicture, and OSError for one that can't be read."""
    # Opening a pipe would wait for its writer. A file object, not a path: Pillow maps uncompressed files that it opens
    # by path into memory, and turned ones come out scrambled.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise NotAPicture("it is a pipe or a device, not a file")
        try:
            image = Image.open(file, formats=FORMATS)
        except Image.UnidentifiedImageError:
            file.seek(0)
            raise NotAPicture(_kind(file.read(4096))) from None
        with image:
            yield image


def _kind(head: bytes) -> str:
    """What a file that starts with these bytes is, where it is no picture that can be read, with a remedy."""
    if not head.strip(b"\0"):
        return "it holds nothing but zeros" if head else "it is empty"
    text = head.removeprefix(codecs.BOM_UTF8).lstrip().lower()
    if text.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer; `git lfs pull` fetches the picture"
    if text.startswith((b"<!doctype html", b"<html")):
        return "it is an HTML page, perhaps a server's answer that it has no such picture"
    kinds = [kind for at, mark, kind in MARKS if head.startswith(mark, at)]
    if text.startswith(b"<") and b"<svg" in text:
        kinds = ["an SVG drawing"]
    return (f"it is {kinds[0]}" if kinds else NO_KIND) + "; save it as PNG or JPEG"


def rgb(image: Image.Image) -> Image.Image:
    """Transparent parts become white, as in transformers 5.23 (5.17 shows the colours that they hide)."""
    if image.mode == "La":  # grey, multiplied by its alpha
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


# ------------------------------------------------------------------------------------------------------------- headers


def refusal(image: Image.Image) -> str:
    """Why a picture can't be used, from its header; empty if it can."""
    tags = image.tag_v2 if image.format == "TIFF" else {}
    if image.width * image.height > MAX_IMAGE_PIXELS:
        return f"{image.width} x {image.height} is over 100 megapixels"
    signed = any(value not in UNSIGNED for value in tags.get(TIFF_SAMPLE_FORMAT, ()))
    if signed or image.mode == "F" or image.mode == "I" and image.format != "PPM":
        return f"mode {image.mode}, signed or 32 bits per pixel, has no fixed range: save it with 8 or 16"
    if tags.get(TIFF_PLANES) == 2 and max(tags.get(TIFF_BITS, (1,))) > 8 and image.tile[0].codec_name == "raw":
        return "its colours of 16 bits are stored one after the other, which Pillow misreads: save it as PNG"
    if tags.get(TIFF_SUBFILE, 0) & 1 and (image.is_animated or TIFF_SUB_PAGES in tags):
        return "its first page is a small copy of another, as in raw files of cameras: save it as PNG or JPEG"
    return ""


def rawmode(image: Image.Image) -> str:
    """How values are stored, as Pillow calls it."""
    args = image.tile[0].args if image.tile else ""
    return args if isinstance(args, str) else str(args[0])


def has_16_bits(image: Image.Image) -> bool:
    """Whether values of the file have 16 bits, also where Pillow reads eight of them."""
    if image.format == "PPM":
        args = image.tile[0].args
        return image.mode == "I" or isinstance(args, tuple) and isinstance(args[-1], int) and args[-1] > 255
    if image.format == "JPEG2000":
        return image.mode == "I;16" or jpeg2000_bits(image) == 16
    return image.mode.startswith("I;16") or image.format in ("PNG", "TIFF") and ";16" in rawmode(image)


def jpeg2000_bits(image: Image.Image) -> int:
    """Bits per value that a JPEG 2000 file declares: in its SIZ segment, ITU-T T.800 A.5.1."""
    image.fp.seek(0)
    content = image.fp.read()
    return (content[content.index(b"\xff\x4f\xff\x51") + 42] & 0x7F) + 1


def orientation_of(image: Image.Image) -> int:
    """EXIF orientation from 1 to 8; 1 where it is missing or damaged. Pillow turns a TIFF itself as it decodes it."""
    try:
        exif = Image.Image.getexif(image)  # PNG's own would decode the image to look for EXIF after the pixels
        orientation = exif.get(ExifTags.Base.Orientation)
    except Exception:  # Pillow raises almost anything on damaged EXIF, which is no part of the picture
        return 1
    return orientation if image.format != "TIFF" and orientation in TURNS else 1
