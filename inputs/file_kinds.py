"""Files that hold no rows that can be read: what they are, by their first bytes, and how rows are made of them."""

import re
from pathlib import Path

from common import InputError, quote

HEAD = 512  # bytes that tell what a file is
QUESTION_FIELDS = ("question", "messages", "conversations")  # a row has one of them

_TO_JSON = 'to_json("rows.jsonl", orient="records", lines=True)'
_UNPACK = "unpack it first"
_OFFICE = "an Excel sheet or another Office file", "save the sheet as CSV in UTF-8"
_PICTURE = "an image", "--images names the folder of images, and a file of rows says which question is about which"
# (pattern at the file's beginning, what the file is, what to do)
KINDS = [
    (rb"PAR1", "a Parquet file", f"pandas.read_parquet(FILE).{_TO_JSON} writes them as JSON lines"),
    (rb"ARROW1|FEA1", "an Arrow file", f"pandas.read_feather(FILE).{_TO_JSON} writes them as JSON lines"),
    (rb"\xff{4}", "an Arrow file", 'datasets.Dataset.from_file(FILE).to_json("rows.jsonl") writes them as JSON lines'),
    (rb"\x1f\x8b", "compressed (gzip)", f"{_UNPACK} (gunzip)"),
    (rb"\xfd7zXZ", "compressed (xz)", f"{_UNPACK} (unxz)"),
    (rb"\x28\xb5\x2f\xfd", "compressed (zstd)", f"{_UNPACK} (unzstd)"),
    (rb"BZh\d", "compressed (bzip2)", f"{_UNPACK} (bunzip2)"),
    (rb"\x04\x22\x4d\x18", "compressed (lz4)", f"{_UNPACK} (unlz4)"),
    (rb"7z\xbc\xaf|Rar!", "an archive", _UNPACK),
    (rb"PK\x03\x04(?s:.{26})(?:\[Content_Types|_rels/|docProps/|xl/|mimetype)", *_OFFICE),
    (rb"PK\x03\x04|PK\x05\x06", "a zip archive", f"{_UNPACK} (unzip)"),
    (rb"(?s:.{257})ustar", "a tar archive", f"{_UNPACK} (tar -xf)"),
    (rb"\xd0\xcf\x11\xe0", *_OFFICE),
    (rb"SQLite format 3\0", "an SQLite database", f"pandas.read_sql(QUERY, CONNECTION).{_TO_JSON} writes JSON lines"),
    (rb"\x80[\x02-\x05]", "a pickle", "write its rows as JSON lines with json.dumps"),
    (rb"\x93NUMPY", "a NumPy array", "write its rows as JSON lines with json.dumps"),
    (rb"\x89HDF", "an HDF5 file", "write its rows as JSON lines with json.dumps"),
    (rb"Obj\x01|ORC", "an Avro or ORC file", "write its rows as JSON lines"),
    (rb"%PDF", "a PDF", "write its questions and answers as JSON lines"),
    (rb"\{\\rtf", "a formatted text (RTF)", "save it as plain text"),
    (rb"\x89PNG|\xff\xd8\xff|GIF8|(?s:RIFF....WEBP)|II\*\0|MM\0\*|(?s:BM....\0\0\0\0)|\0\0\0.ftyp", *_PICTURE),
    (rb"\s*(?i:<!doctype|<html|<\?xml)", "an HTML or XML page", "download the file itself, or write its rows as JSON"),
    (rb"version https://git-lfs", "a Git LFS pointer to the real file", "git lfs pull fetches that"),
    (rb"\xff\xfe\0\0|\0\0\xfe\xff|[\t-~]\0\0\0|\0\0\0[\t-~]", "UTF-32 text", "save it in UTF-8"),
    (rb"\xff\xfe|\xfe\xff|[\t-~]\0|\0[\t-~]", "UTF-16 text", "save it in UTF-8"),
    (rb"[^{\[]{0,7}[\0-\x08\x0e-\x1f]", "a binary file", "rows are JSON lines, a JSON array, CSV or TSV"),
]


def refuse_other_kinds(path: Path, head: bytes) -> None:
    """Raise InputError that names the kind of a file that can't hold rows, and the remedy. `head` is its beginning."""
    for pattern, kind, remedy in KINDS:
        if re.match(pattern, head):
            raise InputError(f"{path} is {kind}, so no rows can be read from it: {remedy}")


def refuse_object(path: Path, value: dict) -> None:
    """Raise InputError for a file that is the JSON object `value`, where its rows are inside."""
    if _is_columns(value):
        raise InputError(f"{path} is one JSON object of columns, as pandas writes it: write rows, DataFrame.{_TO_JSON}")
    if place := _place_of_rows(value):
        raise InputError(f"{path} is one JSON object with its rows {place}: save these alone, as an array")


def refuse_spread(path: Path) -> None:
    """Raise InputError for a file of JSON objects that take several lines each."""
    remedy = "write each on one line (jq -c . FILE), or all as one array (jq -s . FILE)"
    raise InputError(f"{path} has JSON objects that are spread over several lines: {remedy}")


def _is_columns(value: dict) -> bool:
    columns = [value[name] for name in QUESTION_FIELDS if name in value]
    lists = [column for column in columns if isinstance(column, list) and column]
    is_split = {"columns", "data"} <= value.keys()  # pandas' orient="split"
    return is_split or any(isinstance(c, dict) for c in columns) or any(not isinstance(c[0], dict) for c in lists)


def _place_of_rows(value: dict, path: str = "") -> str:
    """Where an object has a list of objects, or rows as its values. Empty where it has none, or is a row itself."""
    if any(name in value for name in QUESTION_FIELDS):
        return ""
    inner = {key: item for key, item in value.items() if isinstance(item, dict)}
    if any(name in item for item in inner.values() for name in QUESTION_FIELDS):
        return f"under the keys of {quote(path)}" if path else "under keys of their own"
    lists = [key for key, item in value.items() if isinstance(item, list) and item and isinstance(item[0], dict)]
    if lists:
        return f"in {quote(path + max(lists, key=lambda key: len(value[key])))}"
    return next(filter(None, (_place_of_rows(item, f"{path}{key}.") for key, item in inner.items())), "")
