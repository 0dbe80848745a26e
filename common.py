"""What every room shares: the error that is shown to users, and writing a file or a folder whole."""

import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

PARTIAL = ".onelook-"  # begins the name of what is being written or replaced


class InputError(ValueError):
    """Something the user gave is wrong. The message names it and the remedy, and is shown without a traceback."""


@contextmanager
def replacing(path: Path):
    """Yield the name under which to write a file or a folder that takes the place of `path` when the block ends.

    A reader, or a crash, finds the old one or the new one. Nothing is left of a block that raises.
    """
    partial = path.with_name(f"{PARTIAL}{uuid4().hex[:8]}-{path.name}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        remove(partial)


def write_whole(path: Path, text: str) -> None:
    """Replace a text file, on disk on return."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")
        flush_to_disk(partial)


def flush_to_disk(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
