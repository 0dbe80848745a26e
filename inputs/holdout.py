"""Hold-out: a share of the images, with all rows that show them, is kept from training and used for evaluation.

Rows are given as the names of their images below `--images`.
"""

import os
from collections.abc import Collection
from hashlib import sha256

from common import InputError
from inputs.images import IMAGE_EXTENSIONS


def hold_out(
    rows: list[tuple[str, ...]], fraction: float, seed: int, flag: str = "--val-fraction", instead: str = "--val"
) -> tuple[list[int], list[int]]:
    """Indices of the rows to train on, and of those to hold out with `fraction` of all images.

    Images that a row shows together stay together, so fewer may be held out than `fraction` asks for. The choice
    depends on their names and the seed, and not on the order of rows. Rows without an image are trained. Raises
    InputError if no image, or every image, would be held out: `flag` gave the fraction, and `instead` is another way.
    """
    linked = _linked_images(rows)
    held, total = set(), sum(map(len, linked))
    # In the order of hashes, an image that is added to the rows later leaves the order of the others as it is.
    for images in sorted(linked, key=lambda images: sha256(f"{seed} {min(images)}".encode()).digest()):
        if len(held) + len(images) <= round(fraction * total):
            held |= images
    if not held or len(held) == total:
        largest = max(map(len, linked), default=0)
        together = f"; {largest:,} of them stay together, since rows show several" if largest > 1 else ""
        share = f"{flag} {fraction:.3g} of {total:,} images holds out {'all' if held else 'none'}{together}"
        raise InputError(f"{share}: choose another, or {instead}")
    return split(rows, held)


def split(rows: list[tuple[str, ...]], held: Collection[str]) -> tuple[list[int], list[int]]:
    """Indices of the rows without any of the images `held`, and of the rows with one."""
    parts = [], []
    for index, images in enumerate(rows):
        parts[any(image in held for image in images)].append(index)
    return parts


def relative_names(images: Collection[str], folder: str) -> tuple[str, ...]:
    """Names of images below `folder`. `images` are paths, or names from that folder."""
    return tuple(os.path.relpath(os.path.join(folder, image), folder) for image in images)


def possible_names(images: Collection[str], folder: str) -> tuple[str, ...]:
    """Every name below `folder` that the images of an unchecked row may have: rows may leave out extensions."""
    names = relative_names(images, folder)
    return tuple(name + extension for name in names for extension in IMAGE_EXTENSIONS)


def _linked_images(rows: list[tuple[str, ...]]) -> list[set[str]]:
    """All images in disjoint sets, such that the images of a row are in the same set."""
    sets = {}
    for images in rows:
        together = set().union(*(sets.get(image, {image}) for image in images))
        sets |= dict.fromkeys(together, together)
    return list({id(images): images for images in sets.values()}.values())
