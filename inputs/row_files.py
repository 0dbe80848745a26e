"""Files of rows, JSON arrays or JSON lines: reading them whole, and telling which rows can't be used."""

import codecs
import json
import re
from pathlib import Path

from common import InputError
from inputs.rows import BadRow, Row, parse_row

MAX_LISTED = 50  # bad rows listed on the console; bad_rows.jsonl has all of them
EXCERPT = 80  # characters shown of what can't be read
REST_UNREAD = "the rest of the file was not read"


def read_rows(path: Path, shown_as: str = "") -> tuple[list[Row], list[BadRow]]:
    """Usable and bad rows of a file that is a JSON array or JSON lines; `shown_as` replaces the file's name in places.
    Raises InputError when the file can't be read."""
    name = shown_as or path.name
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"rows {path}: {error.strerror}") from None
    good, bad = [], []
    for place, value, error in _json_values(raw.removeprefix(codecs.BOM_UTF8)):
        where = f"{name}:{place}"
        try:
            if error:
                raise ValueError(error)
            good.append(parse_row(where, value))
        except ValueError as reason:
            bad.append(BadRow(where, str(reason), value))
    if not good and not bad:
        bad.append(BadRow(f"{name}:1", "no rows in the file"))
    return good, bad


def stop_or_skip_bad(
    bad: list[BadRow], files: list[str], usable: set[int], skip_bad: bool, output: Path | None
) -> None:
    """Write every bad row to output/bad_rows.jsonl. `usable` has the numbers of the files with usable rows.

    Raises InputError that lists the bad rows unless `skip_bad` is set, and in any case for a file without usable rows.
    """
    file = output / "bad_rows.jsonl" if output else None
    if file:
        _write_bad_rows(file, bad, files)
    if not bad:
        return
    listed = "".join(f"\n  {row.where}: {row.reason}" for row in bad[:MAX_LISTED])
    if len(bad) > MAX_LISTED:
        listed += f"\n  and {len(bad) - MAX_LISTED:,} more" + (f", see {file}" if file else "")
    if empty := [path for number, path in enumerate(files) if number not in usable]:
        raise InputError(f"{', '.join(empty)}: no usable row{listed}")
    if not skip_bad:
        raise InputError(f"{len(bad):,} rows can't be used (--skip-bad goes on without them):{listed}")


def _write_bad_rows(file: Path, bad: list[BadRow], files: list[str]) -> None:
    if not bad:
        file.unlink(missing_ok=True)  # an earlier start may have written it, before the rows were corrected
        return
    with open(file, "w", encoding="utf-8", errors="backslashreplace") as out:
        for row in bad:
            line = {"file": files[row.file], "where": row.where, "reason": row.reason, "row": row.row}
            out.write(json.dumps(line, ensure_ascii=False) + "\n")


# ---------------------------------------------------------------------------------------------------------------- JSON


def _refuse_constant(name: str):
    raise ValueError(f"{name} is not a JSON value")


STRICT = json.JSONDecoder(parse_constant=_refuse_constant)  # Python's own accepts NaN and Infinity
LENIENT = json.JSONDecoder(strict=False)
SEPARATOR = re.compile(r"\s*(,?)\s*")


def _json_values(raw: bytes):
    """Yield (place, value, None) for each row, or (place, text, error) where it is not JSON. A place is a line and, in
    an array, the number of a row that does not begin its line."""
    if _is_array(raw):
        yield from _array_values(raw)
        return
    for number, line in enumerate(raw.split(b"\n"), start=1):
        if line.strip():
            try:
                yield str(number), STRICT.decode(line.decode()), None
            except json.JSONDecodeError as error:
                yield str(number), line.decode(), f"not valid JSON: {error.msg} at column {error.colno}"
            except (ValueError, RecursionError) as error:
                yield str(number), line.decode(errors="replace"), f"not valid JSON: {error}"


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
        problem = f"not valid JSON: {error}"
    try:  # the end of some refused values, such as NaN, can still be found, and reading goes on from there
        end = LENIENT.raw_decode(text, start)[1]
        return text[start:end], problem, end
    except (ValueError, RecursionError):
        return text[start : start + EXCERPT], f"{problem}; {REST_UNREAD}", 0
