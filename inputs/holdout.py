"""Holding out: a share of the images, with all their questions, is kept from training and evaluated on."""

import os
from dataclasses import replace
from hashlib import sha256

from common import InputError

from data import IMAGE_ENDS, VQAData
from inputs.rows import Row


def hold_out(data: VQAData, folder: str, fraction: float, seed: int) -> tuple[VQAData, VQAData]:
    """(what is trained, what is held out): `fraction` of the images, or up to that where rows show several of them.

    Rows that share an image stay together. Which images are held out follows from their names below `folder` and the
    seed, whatever the order of rows. Rows without an image are trained. Raises InputError when a part would be empty.
    """

    def lot(images: set[str]) -> bytes:
        return sha256(f"{seed} {min(_name(image, folder) for image in images)}".encode()).digest()

    held, room = set(), round(fraction * len(data.grids))
    for images in sorted(_linked(data), key=lot):
        if len(held) + len(images) <= room:
            held |= images
    if not held or len(held) == len(data.grids):
        what, linked = "all" if held else "none", max(map(len, _linked(data)), default=0)
        together = f"; {linked:,} of them stay together, as rows show several" if linked > 1 else ""
        what = f"--val-fraction {fraction} of {len(data.grids):,} images holds out {what}{together}"
        raise InputError(f"{what}: choose another, or --val")
    return split(data, folder, [_name(image, folder) for image in held])


def split(data: VQAData, folder: str, names: list[str]) -> tuple[VQAData, VQAData]:
    """(the samples without, the samples with) one of the images of these names below `folder`."""
    held, parts = set(names), ([], [])
    for sample in data.samples:
        parts[any(_name(image, folder) in held for image in sample.images)].append(sample)
    return data.only(parts[0]), replace(data.only(parts[1]), bad=[])


def image_names(data: VQAData, folder: str) -> list[str]:
    return [_name(image, folder) for image in data.grids]


def trained_rows(rows: list[Row], folder: str, names: list[str]) -> list[Row]:
    """The rows that show no image of these names."""
    held = set(names)
    return [row for row in rows if not any(_name(i, folder) + end in held for i in row.images for end in IMAGE_ENDS)]


def _name(image: str, folder: str) -> str:
    return os.path.relpath(os.path.join(folder, image), folder)


def _linked(data: VQAData) -> list[set[str]]:
    """The images in sets: two that a row shows together are in one."""
    sets = {}
    for sample in data.samples:
        together = set().union(*(sets.get(image, {image}) for image in sample.images))
        sets |= dict.fromkeys(together, together)
    return list({id(images): images for images in sets.values()}.values())
