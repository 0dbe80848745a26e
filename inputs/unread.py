"""What nothing reads of rows: images that would be lost with it, and its names for a warning."""

import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from common import quote
from inputs.images import IMAGE_EXTENSIONS
from inputs.rows import Row

LONGEST_PATH = 4096  # characters


def note_unread(row: Row, unread: dict[int, dict[str, tuple[int, str]]]) -> None:
    """Count in `unread` the fields of a row that nothing reads: file -> field -> number of rows, place of the first."""
    for name in dict.fromkeys(row.unread.fields):
        fields = unread.setdefault(row.file, {})
        count, first = fields.get(name, (0, row.where))
        fields[name] = count + 1, first


def refuse_unread_images(row: Row, folder: Path, find: Callable[[str], str | None]) -> None:
    """Raise ValueError where a field that nothing reads names an image in `folder` that the row does not show. The
    images of `row` are paths, and `find` is the `image_finder` of the folder."""
    for name, text in row.unread.texts:
        image = find(text)
        if image and not any(image == shown or os.path.samefile(image, shown) for shown in row.images):
            remedy = "call the field `image`, or take it out"
            raise ValueError(
                f"`{name}` names the file {quote(text)} in {folder}, which the row does not show: {remedy}"
            )


def image_finder(folder: Path) -> Callable[[str], str | None]:
    """A function that `_existing_image` is of this folder. It remembers the files of folders: on a network's disk, a
    look for each text of each row would take minutes. It also remembers the latest texts, as rows of an image follow
    each other."""
    listings = {}
    return lru_cache(1000)(lambda text: _existing_image(text, folder, listings))


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
