"""Rows in tables, CSV and TSV: the first line names the columns as JSON rows name their fields."""

import csv
import io
import json
import sys
from pathlib import Path

from common import InputError, quote
from inputs.fields import plain
from inputs.file_kinds import QUESTION_FIELDS

SUFFIXES = (".csv", ".tsv")
DELIMITERS = (",", "\t", ";")
# Columns whose cells are texts even where they look like JSON. As everywhere, "Question Type" is question_type.
TEXTS = {plain(name) for name in ("id", "question", "answer", "question_type", "system", "system_prompt")}


def is_table(path: Path, raw: bytes) -> bool:
    """Whether a file is a table: by its suffix or by the columns that its first line names. It does not begin as JSON
    does."""
    first = raw.lstrip().partition(b"\n")[0]
    if first[:1] in (b"{", b"["):
        return False
    header, _ = _read_header(first.decode(errors="replace").rstrip(), path)
    return (len(header) > 1 and _names_question(header)) or path.suffix.lower() in SUFFIXES


def table_values(path: Path, raw: bytes):
    """Yield (line, row, None) for each row, or (line, its text, error) where it does not fit the header.

    A row is a dict of texts without its empty cells. Its `weight` is a number, and cells that hold a JSON list or
    object are that. Raises InputError where the first line does not name the columns, or names one twice.
    """
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise InputError(f"{path}:{line}: not UTF-8 text ({error.reason}): save it in UTF-8") from None
    _, dialect = _read_header(text.lstrip().partition("\n")[0].rstrip(), path)
    names = None
    for line, cells, written, error in _records(text, dialect):
        if names is None and not error:
            names = _column_names(f"{path}:{line}", cells)
            continue
        try:
            if error:
                raise ValueError(error)
            parts = written.rstrip("\r\n").split("\n")
            is_joined = len(parts) > 1 and {part.count("\t") for part in parts} == {len(names) - 1} != {0}
            if dialect["delimiter"] == "\t" and is_joined:
                problem = f"quotes join {len(parts)} lines, each of which has the tabs of a row"
                raise ValueError(f"{problem}: put quotes around a text that begins with one, and double its own")
            yield str(line), _row(names, cells), None
        except ValueError as reason:
            yield str(line), written, str(reason)


def _read_header(line: str, path: Path) -> tuple[list[str], dict]:
    """The cells of the first line, and the csv module's options for the lines after it."""
    csv.field_size_limit(sys.maxsize)  # the process's own, 131,072 characters by default
    delimiters = "\t" if path.suffix.lower() == ".tsv" else DELIMITERS
    cells = {delimiter: next(csv.reader([line], delimiter=delimiter), []) for delimiter in delimiters}
    delimiter = max(cells, key=lambda delimiter: len(cells[delimiter]))
    header = cells[delimiter]
    is_spaced = len(header) > 1 and all(cell.startswith(" ") for cell in header[1:])  # "image, question, answer"
    return [cell.strip() for cell in header], {"delimiter": delimiter, "skipinitialspace": is_spaced}


def _records(text: str, dialect: dict):
    """Yield (first line, cells, text, None) of each record that is not blank, or an error as the last of them."""
    lines = list(io.StringIO(text, newline="\n"))  # as editors count them
    reader, start, cells = csv.reader(lines, strict=True, **dialect), 0, []
    while cells is not None:
        start, error = reader.line_num, None
        try:
            cells = next(reader, None)
        except csv.Error as problem:
            last = f", read up to line {reader.line_num}" if reader.line_num > start + 1 else ""
            cells, error = [], f"quotes that are not closed or not doubled ({problem}{last})"
        if cells or error:
            yield start + 1, cells, "".join(lines[start : reader.line_num]), error


def _column_names(where: str, header: list[str]) -> list[str]:
    names = [cell.strip() or f"column {number} without a name" for number, cell in enumerate(header, start=1)]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"{where}: two columns are named {quote(twice)}: rename one")
    if not _names_question(names):
        raise InputError(
            f"{where}: the first line must name the columns, such as image, question and answer, split by commas, "
            f"semicolons or tabs; it names {quote(', '.join(names))}"
        )
    return names


def _names_question(columns: list[str]) -> bool:
    return any(name in map(plain, columns) for name in QUESTION_FIELDS)


def _row(names: list[str], cells: list[str]) -> dict:
    """A record's cells as fields. Raises ValueError where they don't fit the columns."""
    if len(cells) != len(names):
        raise ValueError(f"{len(cells)} columns, where the first line names {len(names)}")
    if any("\0" in cell for cell in cells):
        raise ValueError("a cell holds a NUL byte")
    return {name: _value(name, cell) for name, cell in zip(names, cells) if cell}


def _value(name: str, cell: str):
    if plain(name) == "weight":
        try:
            return float(cell)
        except ValueError:
            return cell  # refused, as text is in JSON
    if plain(name) in TEXTS or cell[0] not in "[{":
        return cell
    try:
        return json.loads(cell)
    except (ValueError, RecursionError):
        if cell[1:2] == "'":
            raise ValueError(f"the column {quote(name)} holds a list as Python prints it: write it as JSON") from None
        return cell
