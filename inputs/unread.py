"""What nothing reads of rows: images that would be lost with it, and its names for a warning."""

import os
from pathlib import Path

from common import quote
from inputs.images import IMAGE_EXTENSIONS
from inputs.rows import Row

LONGEST_PATH = 4096  # characters


def unread_fields(rows: list[Row]) -> dict[int, dict[str, list[str]]]:
    """File -> field that nothing reads -> the places of its rows."""
    unread = {}
    for row in rows:
        for name in dict.fromkeys(row.unread.fields):
            unread.setdefault(row.file, {}).setdefault(name, []).append(row.where)
    return unread


def refuse_unread_images(row: Row, folder: Path, listings: dict[str, frozenset[str]]) -> None:
    """Raise ValueError where a field that nothing reads names an image in `folder` that the row does not show.

    The images of `row` are paths. `listings` remembers the files of folders from row to row: on a network's disk, a
    look for each text of each row would take minutes.
    """
    for name, text in row.unread.texts:
        image = _existing_image(text, folder, listings)
        if image and not any(os.path.samefile(image, shown) for shown in row.images):
            remedy = "call the field `image`, or take it out"
            raise ValueError(
                f"`{name}` names the file {quote(text)} in {folder}, which the row does not show: {remedy}"
            )


def _existing_image(text: str, folder: Path, listings: dict[str, frozenset[str]]) -> str | None:
    """The path of the file in `folder` that a text would name if it were an image's name; None if there is no such."""
    if len(text) > LONGEST_PATH or "\0" in text or "\n" in text:
        return None
    root = os.path.abspath(folder)
    path = os.path.normpath(os.path.join(root, text.removeprefix("file://")))
    if not path.startswith(os.path.join(root, "")):
        return None
    parent, name = os.path.split(path)
    if parent not in listings:
        listings[parent] = _files_in(parent)
    return next((path + end for end in IMAGE_EXTENSIONS if name + end in listings[parent]), None)


def _files_in(folder: str) -> frozenset[str]:
    """The names of the files in a folder; none where it is not there or can't be read."""
    try:
        with os.scandir(folder) as entries:
            return frozenset(entry.name for entry in entries if entry.is_file())
    except OSError:
        return frozenset()
