"""Images: finding those of a row, checking every file, their sizes as patches, and pixels for the vision tower."""

import contextlib
import json
import math
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from tqdm import tqdm
from transformers import AutoConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from common import InputError, quote, replacing

MAX_IMAGE_PIXELS = 100_000_000
IMAGE_EXTENSIONS = ("", ".jpg", ".jpeg", ".png")  # that a row may leave out
HIGH_BIT_DEPTH_MODES = ("I;16", "I;16B", "I;16L", "I;16N")


# ------------------------------------------------------------------------------------------------------------ settings


@dataclass(frozen=True)
class ImageSettings:
    """How an image becomes patches. Checkpoints hold it, so that evaluation sees what training saw."""

    patch_size: int
    merge_size: int  # merge_size x merge_size patches become one image token
    temporal_patch_size: int
    min_pixels: int  # after resizing
    max_pixels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    position_side: int  # of the vision tower's square table of learned positions; 0: it has none
    window_size: int = 0  # pixels, side of the windows that vision attention is cut into; 0: none

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Patches (down, across) of an image of this size. Raises ValueError beyond an aspect ratio of 200."""
        factor = self.patch_size * self.merge_size
        size = smart_resize(height, width, factor, self.min_pixels, self.max_pixels)
        return size[0] // self.patch_size, size[1] // self.patch_size


def image_settings(model_folder: str, min_pixels: int = 0, max_pixels: int = 0) -> ImageSettings:
    """The model's own image settings; 0 leaves its pixel limits as they are. Raises InputError if limits cross."""
    processor = Qwen2VLImageProcessorPil.from_pretrained(model_folder)
    vision = AutoConfig.from_pretrained(model_folder).vision_config
    settings = ImageSettings(
        processor.patch_size,
        processor.merge_size,
        processor.temporal_patch_size,
        min_pixels or processor.size["shortest_edge"],
        max_pixels or processor.size["longest_edge"],
        tuple(processor.image_mean),
        tuple(processor.image_std),
        math.isqrt(getattr(vision, "num_position_embeddings", 0)),  # Qwen3-VL
        getattr(vision, "window_size", 0),  # Qwen2.5-VL
    )
    if settings.min_pixels > settings.max_pixels:
        limits = f"at least {settings.min_pixels:,} and at most {settings.max_pixels:,} pixels"
        raise InputError(f"no image has {limits}: set both --min-pixels and --max-pixels")
    return settings


# --------------------------------------------------------------------------------------------------- finding, checking


class MissingImage(ValueError):
    """An image that a row names is not there."""

    def __init__(self, name: str, folder: Path, is_folder: bool):
        super().__init__(f"image {quote(name)} is {'a folder' if is_folder else 'missing'} in {folder}")
        self.missing = name


def find_images(names: list[str], folder: Path, allow_outside: bool) -> list[str]:
    """Paths of the images that a row names, from `folder`. A name may leave out its extension (see IMAGE_EXTENSIONS).

    Raises ValueError for an image that is missing, or that lies outside the folder where that is not allowed.
    """
    return [_find_image(name, folder, allow_outside) for name in names]


def _find_image(name: str, folder: Path, allow_outside: bool) -> str:
    root = Path(os.path.abspath(folder))
    candidates = [folder / f"{name}{extension}" for extension in IMAGE_EXTENSIONS]
    # os.path.isfile, unlike Path.is_file, never raises, whatever a row says.
    path = Path(os.path.abspath(next(filter(os.path.isfile, candidates), candidates[0])))
    exists = os.path.isfile(path)
    if exists and not path.is_relative_to(root):  # the row may reach the folder through a link
        real, real_root = Path(os.path.realpath(path.parent), path.name), os.path.realpath(folder)
        path = root / real.relative_to(real_root) if real.is_relative_to(real_root) else path
    is_outside = not path.is_relative_to(root) and (exists or not os.path.isabs(name))
    if is_outside and not allow_outside:
        raise ValueError(f"image {quote(name)} lies outside {folder} (--allow-outside-images permits that)")
    if not exists:
        raise MissingImage(name, root, os.path.isdir(path))
    return str(path)


def check_images(paths: list[str], headers_only: bool = False) -> dict[str, tuple[int, int] | str]:
    """Decode every image once: its (height, width) as displayed, or what is wrong with it.

    Sizes are remembered in the user's cache folder by path, file size and time, so a second start opens no image. What
    is wrong is not remembered: the cause may be the disk or a permission. `headers_only` reads the sizes of the others
    from their headers and remembers none, as their pixels are not checked.
    """
    memory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "onelook" / "image_sizes.json"
    try:
        known = json.loads(memory.read_text())
    except (OSError, ValueError):  # not there yet, or damaged
        known = {}
    stamps = {path: [os.stat(path).st_size, os.stat(path).st_mtime_ns] for path in paths}
    new = [path for path in paths if known.get(path, {}).get("stamp") != stamps[path]]
    # Pillow decodes outside the interpreter lock, so threads suffice. Its warnings of large images are silenced out
    # here, before threads start: the filters belong to the whole process.
    with ThreadPoolExecutor(os.cpu_count()) as pool, warnings.catch_warnings(action="ignore"):
        results = pool.map(check_image, new, repeat(not headers_only))
        checked = dict(zip(new, tqdm(results, "checking images", len(new), disable=len(new) < 1000)))
    good = {path: {"stamp": stamps[path], "size": size} for path, size in checked.items() if not isinstance(size, str)}
    known |= good
    if good and not headers_only:
        with contextlib.suppress(OSError):  # a folder that can't be written only makes the next start check again
            memory.parent.mkdir(parents=True, exist_ok=True)
            with replacing(memory) as partial:
                partial.write_text(json.dumps(known))
    return {path: checked[path] if path in checked else tuple(known[path]["size"]) for path in paths}


def check_image(path: str, decode: bool = True) -> tuple[int, int] | str:
    """(height, width) of an image as displayed, or what is wrong with it. Without `decode` only its header is read."""
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_IMAGE_PIXELS:
                return f"{image.width} x {image.height} is over 100 megapixels"
            if image.mode in ("I", "F"):
                return f"mode {image.mode}, 32 bits per pixel, has no fixed range: save it with 8 or 16"
            if not decode:
                return _displayed_size(image)
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return image.height, image.width
    except Image.DecompressionBombError:
        return "over 100 megapixels"
    except Exception as error:  # on damaged files Pillow's decoders raise almost anything
        return f"unreadable or truncated ({error})"


def _displayed_size(image: Image.Image) -> tuple[int, int]:
    """(height, width) after EXIF orientation, from the header. Pillow has turned the size of a TIFF already."""
    exif = Image.Image.getexif(image)  # PNG's own would decode the image to look for EXIF after the pixels
    turned = exif.get(ExifTags.Base.Orientation) in (5, 6, 7, 8) and image.format != "TIFF"
    return (image.width, image.height) if turned else (image.height, image.width)


# -------------------------------------------------------------------------------------------------------------- pixels


def open_picture(path: str) -> Image.Image:
    """An image before resizing: upright, RGB, 8 bits per channel, and nothing of its file but the pixels."""
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode in HIGH_BIT_DEPTH_MODES:  # 16 bits per pixel: keep the upper eight, as convert() would clip
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        picture = _rgb(image)
        picture.info.clear()  # comments, EXIF
        return picture


def _rgb(image: Image.Image) -> Image.Image:
    """Transparent parts become white, as in transformers 5.23 (5.17 shows the colours that they hide)."""
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def load_patches(path: str, grid: tuple[int, int], settings: ImageSettings) -> np.ndarray:
    """Decode and resize an image to its grid. Returns (patches, 3, patch_size**2) uint8 in the vision tower's order,
    the same pixels as transformers' Qwen2VLImageProcessorPil before normalisation. Raises OSError for an image that
    can't be read."""
    p, m = settings.patch_size, settings.merge_size
    down, across = grid
    try:
        picture = open_picture(path)
    except Exception as error:  # as in check_image
        raise OSError(f"{path}: {error}") from error
    pixels = np.asarray(picture.resize((across * p, down * p), Image.Resampling.BICUBIC))  # (H, W, 3)
    # Patches that merge into one token are neighbours: blocks row by row, then the patches of a block row by row.
    pixels = pixels.reshape(down // m, m, p, across // m, m, p, 3)
    return pixels.transpose(0, 3, 1, 4, 6, 2, 5).reshape(down * across, 3, p * p)


def vision_inputs(grid: torch.Tensor, settings: ImageSettings) -> dict:
    """The vision tower's keyword arguments for images with grids (images, 3), by transformers' own functions."""
    starts = get_vision_cu_seqlens(grid)
    inputs = {
        "position_ids": get_vision_position_ids(grid, settings.merge_size),
        "cu_seqlens": starts,
        "max_seqlen": int(starts.diff().max()),
        "image_starts": starts.tolist(),
    }
    if settings.position_side:
        indices, weights = get_vision_interpolation_indices_and_weights(
            grid, settings.position_side, align_corners=True, spatial_merge_size=settings.merge_size
        )
        inputs |= {"interp_indices": indices, "interp_weights": weights}
    if settings.window_size:
        index, starts = get_vision_window_index(grid, settings.merge_size, settings.window_size, settings.patch_size)
        inputs |= {"window_index": index, "cu_window_seqlens": starts, "max_window_seqlen": int(starts.diff().max())}
    return inputs
