"""Files of rows, JSON arrays, JSON lines or tables, read whole: which rows can be used, and which can't."""

import codecs
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from common import InputError, quote
from inputs.file_kinds import HEAD, refuse_object, refuse_other_kinds, refuse_spread
from inputs.rows import BadRow, Row, parse_row
from inputs.tables import is_table, table_values

EXCERPT = 80  # characters shown of what can't be read
REST_UNREAD = "the rest of the file was not read"


def iterate_rows(path: Path, shown_as: str = "", file: int = 0, by: Iterable[str] = ()) -> Iterator[Row | BadRow]:
    """Yield the usable and bad rows of a file that is a JSON array, JSON lines or a table, in their order. `shown_as`
    replaces the file's name in places, `file` is its number, and `by` names fields to keep (see `parse_row`). Raises
    InputError when the file can't be read, or is of another kind."""
    name, empty = shown_as or path.name, True
    raw = _read_bytes(path)
    for place, value, error in table_values(path, raw) if is_table(path, raw) else _json_values(path, raw):
        where, empty = f"{name}:{place}", False
        try:
            if error:
                raise ValueError(error)
            row = parse_row(where, value, by)
            row.file = file
        except (ValueError, RecursionError) as reason:
            row = BadRow(where, str(reason), value, file)
        yield row
    if empty:
        yield BadRow(f"{name}:1", "no rows in the file", file=file)


def read_rows(path: Path) -> tuple[list[Row], list[BadRow]]:
    """All usable rows of a file, and all bad ones: see `iterate_rows`."""
    good, bad = [], []
    for row in iterate_rows(path):
        (bad if isinstance(row, BadRow) else good).append(row)
    return good, bad


def distinct_names(paths: list[str]) -> list[str]:
    """The shortest ends of the paths, in whole folder names, that still tell the paths apart."""
    names = []
    for path in paths:
        parts = Path(path).parts
        others, depths = {Path(other).parts for other in paths} - {parts}, range(1, len(parts))
        depth = next((n for n in depths if all(other[-n:] != parts[-n:] for other in others)), len(parts))
        names.append("/".join(parts[-depth:]))
    return names


def _read_bytes(path: Path) -> bytes:
    """The file's content without a byte order mark. Its beginning tells its kind, so no large file is read in vain."""
    if path.is_dir():
        raise InputError(f"{path} is a folder: name the file of rows in it")
    try:
        with path.open("rb") as file:
            head = file.read(HEAD)
            refuse_other_kinds(path, head)
            raw = (head + file.read()).removeprefix(codecs.BOM_UTF8)
            return raw if b"\n" in raw else raw.replace(b"\r", b"\n")  # lines as an old Mac ends them
    except OSError as error:
        raise InputError(f"rows {path}: {error.strerror}") from None


# ---------------------------------------------------------------------------------------------------------------- JSON


def _refuse_constant(name: str):
    raise ValueError(f"{name} is not a JSON value")


def _refuse_repeated(pairs: list[tuple[str, object]]) -> dict:
    value = dict(pairs)
    if len(value) < len(pairs):
        repeated = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"the field {quote(repeated)} stands twice in an object")
    return value


# Python's own accepts NaN and Infinity, and keeps the last of fields of the same name.
STRICT = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_refuse_repeated)
LENIENT = json.JSONDecoder(strict=False)
SEPARATOR = re.compile(r"\s*(,?)\s*")


def _json_values(path: Path, raw: bytes):
    """Yield (place, value, None) for each row, or (place, text, error) where it is not JSON. A place is a line and, in
    an array, the number of a row that does not begin its line."""
    if _is_array(raw):
        yield from _array_values(raw)
        return
    _refuse_other_objects(path, raw)
    for number, line in enumerate(io.BytesIO(raw), start=1):  # raw.split would take its memory twice
        line = line.removesuffix(b"\n")
        if line.strip():
            try:
                yield str(number), STRICT.decode(line.decode()), None
            except json.JSONDecodeError as error:
                yield (
                    str(number),
                    line.decode(),
                    _problem(line.decode(), f"not valid JSON: {error.msg} at column {error.colno}"),
                )
            except (ValueError, RecursionError) as error:
                yield str(number), line.decode(errors="replace"), f"not valid JSON: {error}"


def _refuse_other_objects(path: Path, raw: bytes) -> None:
    """Raise InputError where the file is one object with the rows inside, or objects over several lines."""
    first, _, rest = raw.strip().partition(b"\n")
    value, is_spread = None, False
    try:
        value = json.loads(first)
    except (ValueError, RecursionError):
        with suppress(ValueError, RecursionError):
            text = raw.decode().strip()
            value, end = json.JSONDecoder().raw_decode(text)
            is_spread, rest = "\n" in text[:end], text[end:]
    if isinstance(value, dict) and not rest:
        refuse_object(path, value)
    if is_spread:
        refuse_spread(path)


def _problem(text: str, error: str) -> str:
    """Why a text that begins so is not JSON."""
    is_python = text.lstrip().startswith("{'")
    return "not JSON but as Python prints it, in single quotes: write it with json.dumps" if is_python else error


def _is_array(raw: bytes) -> bool:
    """Whether a file is one array. JSON lines may start with a bad row that is a whole list."""
    first, _, rest = raw.strip().partition(b"\n")
    if not first.startswith(b"["):
        return False
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return True
    return not rest


def _array_values(raw: bytes):
    """As `_json_values`, for an array: decoded value by value, so that one bad row does not hide the others."""
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        yield str(raw[: error.start].count(b"\n") + 1), None, f"not UTF-8 text: {error.reason}; {REST_UNREAD}"
        return
    number, line, counted, end = 0, 1, 0, text.index("[") + 1
    while end:
        separator = SEPARATOR.match(text, end)
        start, number = separator.end(), number + 1
        new_lines, counted = text.count("\n", counted, start), start  # counting from the file's start is quadratic
        line += new_lines
        place = str(line) if new_lines or number == 1 else f"{line} row {number}"
        array_ends = text.startswith("]", start)
        needs_comma = number > 1 and not array_ends
        if bool(separator[1]) != needs_comma:
            problem = "no comma before this" if needs_comma else "a comma too many"
            yield place, text[start : start + EXCERPT], f"not valid JSON: {problem}; {REST_UNREAD}"
            return
        if array_ends:
            if text[start + 1 :].strip():
                rest = text[start + 1 : start + 1 + EXCERPT]
                yield place, rest, f"the array ends here, but text follows; {REST_UNREAD}"
            return
        value, error, end = _decode_value(text, start)
        yield place, value, error


def _decode_value(text: str, start: int) -> tuple[object, str | None, int]:
    """(value, None, its end), or (text, error, its end) where it is not JSON. End 0: it can't be found."""
    try:
        value, end = STRICT.raw_decode(text, start)
        return value, None, end
    except (ValueError, RecursionError) as error:
        problem = _problem(text[start : start + EXCERPT], f"not valid JSON: {error}")
    try:  # the end of some refused values, such as NaN, can still be found, and reading goes on from there
        end = LENIENT.raw_decode(text, start)[1]
        return text[start:end], problem, end
    except (ValueError, RecursionError):
        return text[start : start + EXCERPT], f"{problem}; {REST_UNREAD}", 0
