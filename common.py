"""What all rooms share: the error for users, their own values in messages, which process speaks, and writing a file or
a folder whole or not at all."""

import os
import re
import shutil
import stat
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

PARTIAL = ".onelook-"  # prefix of the name of a file or a folder that is being written or replaced
SHOWN = 100  # characters of a user's value in a message
# Control characters apart from tab and line feed, and those that reverse the order of the text after them: a terminal
# obeys them.
OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


class InputError(ValueError):
    """Something that the user gave is wrong. The message names it and the remedy, and is shown without a traceback."""


def is_rank0() -> bool:
    """Whether this process is torchrun's first one, or the only one."""
    return int(os.environ.get("RANK", 0)) == 0


def quote(value) -> str:
    """A user's value for a message: as Python writes it, so in quotes and on one line, cut to SHOWN characters.

    It is cut in the middle: paths begin alike, and differ at the end."""
    long = isinstance(value, str) and len(value) > 2 * SHOWN
    text = repr(value[:SHOWN] + value[-SHOWN:] if long else value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 41]}…{text[-40:]}"


def printable(text: str) -> str:
    """The text with everything that a terminal would obey written as an escape, line breaks apart."""
    return OBEYED.sub(lambda match: ascii(match[0])[1:-1], text)


@contextmanager
def replacing(path: Path):
    """Yield a path at which to write a file or a folder; it takes the place of `path` when the block ends.

    At any moment `path` is the old one or the new one, whole. A block that raises changes nothing and leaves nothing
    behind. A folder takes the place of none or of an empty one: remove a full one at the end of the block. Whatever
    made the files, they may be read by those whom the user's umask lets read.
    """
    # A rename is atomic only within a file system, hence the same folder, which several machines may share.
    partial = path.with_name(f"{PARTIAL}{uuid4().hex[:8]}-{path.name}")
    try:
        yield partial
        follow_umask(partial)
        os.replace(partial, path)
    finally:
        remove(partial)


def follow_umask(path: Path) -> None:
    """Give a file, or each file of a folder, the permissions of a new file: safetensors lets the owner alone read."""
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    private = {file: mode for file in files if not (mode := stat.S_IMODE(file.stat().st_mode)) & 0o077}
    if private:
        # The umask can't be read without setting it, for all threads. A new file also follows the folder's ACL.
        probe = path.with_name(f"{PARTIAL}{uuid4().hex[:8]}-{path.name}")
        probe.touch()
        mode = stat.S_IMODE(probe.stat().st_mode)
        probe.unlink()
        for file in (file for file, own in private.items() if own != mode):
            file.chmod(mode)


def write_whole(path: Path, text: str) -> None:
    """Write a text file, whole or not at all. Its content is flushed to disk before it takes the place of `path`."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")
        flush_to_disk(partial)


def flush_to_disk(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file or a folder, if there is one."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
