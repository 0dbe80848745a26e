"""Images: finding those of a row, checking every file, their sizes as patches, and pixels for the vision tower."""

import contextlib
import errno
import filecmp
import itertools
import json
import math
import os
import stat
import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm
from transformers import AutoConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from common import SHOWN, InputError, quote, replacing
from inputs.picture_checks import PictureSize, check_files, decoded
from inputs.picture_files import MAX_IMAGE_PIXELS, TURNS, opened, orientation_of, refusal, rgb

IMAGE_EXTENSIONS = ("", ".jpg", ".jpeg", ".png")  # that a row may leave out
# Names of the image processor's settings -> those of the vision tower's configuration.
PATCH_NAMES = {
    "patch_size": "patch_size",
    "merge_size": "spatial_merge_size",
    "temporal_patch_size": "temporal_patch_size",
}
PIXEL_RULES = 2  # raised when `open_picture` makes other pixels of a file than before: cached features are of these


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

    @property
    def has_box_tokens(self) -> bool:
        """Whether the model's family has tokens for boxes and the names of objects. Qwen2-VL and Qwen2.5-VL have;
        Qwen3-VL, the one with a table of positions, writes boxes as plain JSON."""
        return not self.position_side

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Patches (down, across) of an image of this size. Raises ValueError beyond an aspect ratio of 200."""
        factor = self.patch_size * self.merge_size
        size = smart_resize(height, width, factor, self.min_pixels, self.max_pixels)
        return size[0] // self.patch_size, size[1] // self.patch_size


def image_settings(model_folder: str, min_pixels: int = 0, max_pixels: int = 0) -> ImageSettings:
    """The model's own image settings; 0 leaves its pixel limits as they are. Raises InputError if limits cross, if
    patch sizes differ from the vision tower's, as in another model's file or one that leaves them out, or if the file
    has no pixel limits that transformers obeys."""
    try:
        processor = Qwen2VLImageProcessorPil.from_pretrained(model_folder)
    except ValueError as error:  # of a size with other names than it knows
        raise InputError(f"image settings of {model_folder} can't be used: {error}") from None
    vision = AutoConfig.from_pretrained(model_folder).vision_config
    for name, config_name in PATCH_NAMES.items():
        if (actual := getattr(processor, name)) != (needed := getattr(vision, config_name)):
            raise InputError(
                f"image settings of {model_folder} have a {name} of {actual}, and config.json {needed}:\n"
                "  copy this model's preprocessor_config.json there, and its processor_config.json where it has one"
            )
    limits = {key: value for key, value in dict(processor.size).items() if value is not None}
    if not limits.keys() >= {"shortest_edge", "longest_edge"}:
        raise InputError(
            f"image settings of {model_folder} give size as {', '.join(limits)}, which transformers can't resize by\n"
            "  give it as shortest_edge and longest_edge, the least and most pixels of an image"
        )
    settings = ImageSettings(
        processor.patch_size,
        processor.merge_size,
        processor.temporal_patch_size,
        min_pixels or limits["shortest_edge"],
        max_pixels or limits["longest_edge"],
        tuple(processor.image_mean),
        tuple(processor.image_std),
        math.isqrt(getattr(vision, "num_position_embeddings", 0)),  # Qwen3-VL
        getattr(vision, "window_size", 0),  # Qwen2.5-VL
    )
    if settings.min_pixels > settings.max_pixels:
        limits = f"at least {settings.min_pixels:,} and at most {settings.max_pixels:,} pixels"
        raise InputError(f"no image has {limits}: set both --min-pixels and --max-pixels")
    return settings


# ------------------------------------------------------------------------------------------------------------- finding


class NoImage(ValueError):
    """What a row names is no image file. `missing` is the name if nothing is there; otherwise it is empty."""

    def __init__(self, name: str, path: Path, folder: Path):
        super().__init__(name, path, folder)
        self.missing = "" if os.path.lexists(path) else name

    def __str__(self) -> str:  # only where it is shown, as finding the reason may read a large folder
        return f"image {quote(self.args[0])} {_absence(*self.args)}"


def find_image(name: str, folder: Path, allow_outside: bool) -> str:
    """The path of an image that a row names, from `folder`. A name may leave out its extension (see IMAGE_EXTENSIONS).

    Raises ValueError for an image that is missing, or that lies outside the folder where that is not allowed, also by
    way of a link.
    """
    candidates = (folder / f"{name}{extension}" for extension in IMAGE_EXTENSIONS)
    # os.path.isfile, unlike Path.is_file, never raises, whatever a row says.
    path = Path(os.path.abspath(next(filter(os.path.isfile, candidates), folder / name)))
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ValueError(f"image {quote(str(path))}: names of files must be UTF-8, rename it") from None
    exists, inside = os.path.isfile(path), _inside(path, folder)
    if not allow_outside and not inside and (exists or not os.path.isabs(name)):
        link = ", where a link leads" if path.is_relative_to(os.path.abspath(folder)) else ""
        raise ValueError(f"image {quote(name)} lies outside {folder}{link} (--allow-outside-images permits that)")
    if not exists:
        raise NoImage(name, path, folder)
    return str(inside or path)


def _inside(path: Path, folder: Path) -> Path | None:
    """The path below the folder that leads to the same file, or None if the file lies elsewhere, links followed."""
    root = Path(os.path.abspath(folder))
    if path.is_relative_to(root):
        below = itertools.takewhile(lambda parent: parent != root, (path, *path.parents))
        if not any(map(os.path.islink, below)):
            return path
    real_root = os.path.realpath(folder)  # costs ten times as much as the lines above
    if "\0" in path.name or not Path(os.path.realpath(path)).is_relative_to(real_root):
        return None
    if path.is_relative_to(root):
        return path
    # The row reaches the folder through a link to it, or by the folder's real path.
    return root / os.path.relpath(os.path.join(os.path.realpath(path.parent), path.name), real_root)


def _absence(name: str, path: Path, folder: Path) -> str:
    """Why there is no file at this path, which `name` gave."""
    missing = f"is missing in {os.path.abspath(folder)}"
    try:
        mode = os.stat(path).st_mode
    except ValueError:  # it has a null character
        return missing
    except OSError as error:
        if error.errno == errno.ELOOP:
            return "is a link that leads in a circle"
        if error.errno == errno.EACCES:
            return "can't be read: permission denied"
        if os.path.islink(path):
            return f"is a link to {quote(os.readlink(path))}, which is missing"
        similar = _similar_name(name, folder) if len(name) <= SHOWN else ""
        # Separate accents look like composed ones, so names that have them are shown with escapes.
        shown = quote(similar) if unicodedata.is_normalized("NFC", f"{name}/{similar}") else ascii(similar)
        return f"{missing}, but {shown} is there: correct the name" if similar else missing
    return f"is a {'folder' if stat.S_ISDIR(mode) else 'pipe or a device'} in {os.path.abspath(folder)}"


def _similar_name(name: str, folder: Path) -> str:
    """The file below the folder whose name differs from this only in upper and lower case, in Unicode's composed or
    separate accents, or in Windows' slashes; empty if there is none."""
    *parents, last = name.replace("\\", "/").split("/")
    found = folder
    for parent in parents:
        found /= _entries(found).get(_folded(parent), parent)
    entries = _entries(found)
    match = next((entries[key] for e in IMAGE_EXTENSIONS if (key := _folded(last + e)) in entries), None)
    return os.path.relpath(found / match, folder) if match and os.path.isfile(found / match) else ""


def _entries(folder: Path) -> dict[str, str]:
    try:
        return _entries_of(folder, os.stat(folder).st_mtime_ns)
    except OSError:
        return {}


@lru_cache(maxsize=16)  # thousands of rows may miss their images in the same folder of a million files
def _entries_of(folder: Path, changed: int) -> dict[str, str]:
    return {_folded(entry): entry for entry in os.listdir(folder)}


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name.casefold())


# ------------------------------------------------------------------------------------------------------------ checking


def check_images(paths: list[str], headers_only: bool = False) -> dict[str, PictureSize | str]:
    """Decode every image once: its (height, width) as displayed, or what is wrong with it.

    Sizes are remembered in the user's cache folder by path, file size and time, so a second start opens no image. What
    is wrong is not remembered: the cause may be the disk or a permission. `headers_only` reads the sizes of the others
    from their headers and remembers none, as their pixels are not checked.
    """
    memory = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "onelook" / "image_sizes.json"
    known, stamps = _remembered(memory), {path: _stamp(path) for path in paths}
    new = [path for path in paths if path not in known or known[path]["stamp"] != stamps[path]]
    results = check_files(new, not headers_only)
    checked = dict(zip(new, list(tqdm(results, "checking images", len(new), disable=len(new) < 1000))))
    good = {path: size for path, size in checked.items() if not isinstance(size, str)}
    known |= {
        path: {"stamp": stamps[path], "size": size, "bits": size.bits, "several": size.several}
        for path, size in good.items()
    }
    if good and not headers_only:
        with contextlib.suppress(OSError):  # a folder that can't be written only makes the next start check again
            memory.parent.mkdir(parents=True, exist_ok=True)
            with replacing(memory) as partial:
                partial.write_text(json.dumps(known))
    return {path: checked[path] if path in checked else _size(known[path]) for path in paths}


def _stamp(path: str) -> list[int]:
    """What changes with a file; nothing for one that is gone."""
    try:
        status = os.stat(path)
    except OSError:
        return []
    return [status.st_size, status.st_mtime_ns]


def _remembered(memory: Path) -> dict[str, dict]:
    """The entries of the file of checked images that are whole. Others are checked again, and written anew."""
    try:
        entries = json.loads(memory.read_text())
    except (OSError, ValueError, RecursionError):  # not there yet, or damaged
        return {}
    return {path: entry for path, entry in entries.items() if _size(entry)} if isinstance(entries, dict) else {}


def _size(entry) -> PictureSize | None:
    """The size in an entry of the file of checked images; None if it is not as `check_images` writes it."""
    match entry:
        case {
            "stamp": [int(), int()],
            "size": [int(height), int(width)],
            "bits": int(bits),
            "several": bool(several),
        } if height > 0 and width > 0 and height * width <= MAX_IMAGE_PIXELS and 0 <= bits <= 16:
            return PictureSize(height, width, bits, several)
    return None


def picture_warnings(sizes: dict[str, PictureSize]) -> list[str]:
    """What is not shown of images as their files have it: how many there are, and the first one's name."""
    by_bits = {}
    for path, size in sizes.items():
        if size.bits:
            by_bits.setdefault(size.bits, []).append(path)
    kinds = {
        f"images of 16 bits per value that use {bits} of them and are shown in that range": paths
        for bits, paths in sorted(by_bits.items())
        if min(by_bits) < 16
    }
    kinds["images with several frames or pages, of which the first is used"] = [p for p in sizes if sizes[p].several]
    return [f"{kind}: {len(paths):,}\n  {Path(paths[0]).name}" for kind, paths in kinds.items() if paths]


def find_copies(images: dict[str, PictureSize], others: dict[str, PictureSize]) -> dict[str, str]:
    """Those of `images` whose files have the same bytes as a file of `others`, each with the first such file.

    Only files of equal length are read. Raises OSError for files that can't be read.
    """
    sizes = set(images.values()) & set(others.values())
    by_length, by_middle, copies = {}, {}, {}
    for path in images:
        if images[path] in sizes:
            by_length.setdefault(os.path.getsize(path), []).append(path)
    for path in others:
        if others[path] in sizes and os.path.getsize(path) in by_length:
            by_middle.setdefault(_middle(path), []).append(path)
    for path in itertools.chain.from_iterable(by_length.values() if by_middle else ()):
        same = (other for other in by_middle.get(_middle(path), ()) if filecmp.cmp(path, other, shallow=False))
        if other := next(same, ""):
            copies[path] = other
    return copies


def _middle(path: str) -> tuple[int, bytes]:
    """The length of a file, and 4 KiB from its middle."""
    with open(path, "rb") as file:
        length = os.fstat(file.fileno()).st_size
        file.seek(length // 2)
        return length, file.read(4096)


def checked_grid(image: str, size: tuple[int, int] | str, settings: ImageSettings) -> tuple[int, int]:
    """The patch grid of an image. Raises ValueError if `size` is an error instead, or if the image is too narrow."""
    try:
        if isinstance(size, str):
            raise ValueError(size)
        return settings.grid(*size)
    except ValueError as problem:
        raise ValueError(f"image {quote(image)}: {problem}") from None


# -------------------------------------------------------------------------------------------------------------- pixels


def open_picture(path: str) -> Image.Image:
    """An image before resizing: upright, RGB, 8 bits per channel, and nothing of its file but the pixels. Raises
    OSError for an image that can't be read."""
    try:
        with opened(path) as image:
            if reason := refusal(image):
                raise OSError(reason)
            picture, _ = decoded(image, path)
            turn = TURNS.get(orientation_of(image))
            picture = rgb(picture if turn is None else picture.transpose(turn))
    except Exception as error:  # as in `check_file`
        raise OSError(f"{path}: {error}") from error
    picture.info.clear()  # comments, EXIF
    return picture


def load_patches(path: str, grid: tuple[int, int], settings: ImageSettings) -> np.ndarray:
    """Decode and resize an image to its grid. Returns (patches, 3, patch_size**2) uint8 in the vision tower's order,
    the same pixels as transformers' Qwen2VLImageProcessorPil before normalisation. Raises OSError for an image that
    can't be read."""
    p, m = settings.patch_size, settings.merge_size
    down, across = grid
    picture = open_picture(path)
    if settings.grid(picture.height, picture.width) != grid:
        raise OSError(f"{path}: its size has changed since it was checked")
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
