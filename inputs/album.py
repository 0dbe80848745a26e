"""Pictures that come as bytes, saved as files: each content once, checked as train.py checks it."""

from hashlib import sha256
from pathlib import Path

from inputs.picture_checks import Checker
from inputs.picture_files import opened

SUFFIXES = {"JPEG": "jpg", "JPEG2000": "jp2", "TIFF": "tif"}  # others are those of the format's name


class Album:
    """Pictures in a folder, each content once, named after its hash. Memory: a name per picture."""

    def __init__(self, folder: Path):
        folder.mkdir()
        self.folder, self.checker = folder, Checker()
        self.names = {}  # SHA-256 -> (name of its file, or "", what is wrong with the picture)
        self.by_id = {}  # the same by the id that a data set gives a picture

    def add(self, picture, picture_id=None) -> str:
        """The file of a picture, an object with its `bytes`. Raises ValueError for one that train.py would refuse."""
        content = picture.get("bytes") if isinstance(picture, dict) else picture
        if not isinstance(content, bytes):
            raise ValueError("its picture is not inside the data set, which holds a name or an address of it only")
        digest = sha256(content).hexdigest()
        if digest not in self.names:
            self.names[digest] = self._saved(digest[:16], content)
        self.by_id.setdefault(picture_id, self.names[digest])
        return usable(self.names[digest])

    def _saved(self, name: str, content: bytes) -> tuple[str, str]:
        path = self.folder / name
        path.write_bytes(content)
        result = self.checker.check(str(path), True)
        if isinstance(result, str):
            path.unlink()
            return "", f"its picture is {result}"
        with opened(str(path)) as image:
            suffix = SUFFIXES.get(image.format, image.format.lower())
        path.rename(path.with_suffix(f".{suffix}"))
        return f"{name}.{suffix}", ""


def usable(found: tuple[str, str]) -> str:
    """The file of a picture in an album. Raises ValueError with what is wrong with it instead."""
    name, problem = found
    if problem:
        raise ValueError(problem)
    return name


def is_absent(picture) -> bool:
    return picture is None or isinstance(picture, dict) and not any(picture.values())
