"""What all rooms share: the error for users, their own values in messages, which process speaks, writing a file or a
folder whole or not at all, and locks."""

import errno
import fcntl
import gc
import os
import re
import shutil
import socket
import stat
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TextIO
from uuid import uuid4

from safetensors import SafetensorError

STARTED = time.perf_counter()  # when a command began: its first import comes here, before torch
PARTIAL = ".onelook-"  # prefix of the name of a file or a folder that is being written or replaced
WRITE_ERRORS = OSError, SafetensorError  # that a write raises which a disk does not take; safetensors has its own
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
    """Remove a file, a link (not what it leads to) or a folder, if there is one."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


@contextmanager
def writing(place: str):
    """Report a write that fails as InputError "PLACE: reason": for files without which a command can't go on."""
    try:
        yield
    except WRITE_ERRORS as error:
        raise InputError(f"{place}: {error}") from None


def is_text(path: Path | str) -> bool:
    """Whether a path can be written into files and messages: names on a disk may hold bytes that are not UTF-8."""
    return not any(0xD800 <= ord(character) < 0xE000 for character in str(path))  # as which Python reads such bytes


@contextmanager
def collector_paused():
    """Collect no garbage in this block, and leave what it makes out of all later collections. Rows become millions of
    objects without cycles: a pass over them takes seconds, and in a forked data worker it copies their memory."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


# --------------------------------------------------------------------------------------------------------------- locks


_locks: dict[Path, TextIO] = {}  # of the folders that this process writes to: a lock lasts as long as its file is open


def lock_folder(folder: Path, flag: str) -> TextIO:
    """Make a folder for what a command writes, and lock it for this process: the kernel frees it however it ends.

    Returns the file `lock`. Raises InputError when another process has locked it, or when it can't be written.
    """
    if not is_text(folder.resolve()):
        raise InputError(f"{flag}: the path {ascii(str(folder.resolve()))} holds bytes that are not UTF-8")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{flag}: {folder} is a file, name a folder")
    with writing(f"{flag}: can't write to {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / f"{PARTIAL}probe", "")  # the lock may be writable in a folder that is not
        remove(folder / f"{PARTIAL}probe")
        path = folder.resolve()
        if path not in _locks or is_gone(path):  # a file's lock is lost when this process closes another handle of it
            _locks[path] = open_locked(path / "lock", f"{flag} {folder}")
        return _locks[path]


@contextmanager
def removed_if_refused(folder: Path, stays: Path):
    """Leave nothing of a start that is refused but a list of rows that can't be used.

    A folder that holds a run stays as it is. `stays` is the `nearest_existing` folder of before this start.
    """
    is_fresh = is_rank0() and os.listdir(folder) == ["lock"]
    try:
        yield
    except InputError:
        if is_fresh:
            for path in folder.iterdir():
                if path.name != "bad_rows.jsonl":
                    remove(path)
            with suppress(OSError):  # not empty
                while folder != stays:
                    folder.rmdir()
                    folder = folder.parent
        raise


def nearest_existing(path: Path) -> Path:
    """The path or the nearest folder above it that exists, links followed."""
    return next(folder for folder in [path.absolute(), *path.absolute().parents] if folder.exists()).resolve()


def is_gone(folder: Path) -> bool:
    """Whether a folder was removed, emptied, moved or unmounted since `lock_folder`. It also counts as gone when its
    lock alone was removed, as another process may be writing to it."""
    return folder in _locks and not is_same_file(folder / "lock", _locks[folder])


def open_locked(path: Path, subject: str) -> TextIO:
    """A file, open and locked. Raises InputError "SUBJECT is in use by ..." when another process has locked it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)  # a link could lead to anything
    file = open(descriptor, "r+", encoding="utf-8", errors="replace")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # lockf, as flock is local to a machine on some NFS
    except (BlockingIOError, PermissionError):
        file.seek(0)
        raise InputError(f"{subject} is in use by {file.readline(200).strip() or 'another process'}") from None
    except OSError as error:  # a file system without locks
        warning = f"warning: {path} can't be locked ({error}): let nothing else write to this folder"
        print(printable(warning), file=sys.stderr)
    return file


def sign(lock: TextIO, more: str = "") -> None:
    """Write into a lock file who holds it, for those whom it keeps out; the lock itself is the kernel's. Raises
    InputError when the disk does not take it."""
    with writing("can't write a lock"):
        lock.seek(0)
        lock.truncate()
        lock.write(f"process {os.getpid()} on {socket.gethostname()}\n{more}")
        lock.flush()


def is_same_file(path: Path, file: IO) -> bool:
    """Whether a path still leads to an open file: not once the file was removed, moved or unmounted."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except OSError as error:  # a network's other faults may pass
        return error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)
