"""Files that hold no rows are refused in one line with their kind and the remedy, before anything is read of them."""

import bz2
import gzip
import io
import json
import lzma
import pickle
import zipfile

import pytest
from examples import GOOD_LINE, flat
from pictures import noise

from common import InputError
from inputs.row_files import read_rows


def zipped(*names: str) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name in names:
            archive.writestr(name, GOOD_LINE)
    return stream.getvalue()


def picture(kind: str) -> bytes:
    stream = io.BytesIO()
    noise(32, 32).save(stream, kind)
    return stream.getvalue()


LINE, ROW = GOOD_LINE.encode(), flat(image="a.png")
COLUMNS = {name: {"0": text, "1": text} for name, text in ROW.items()}
KINDS = {
    "Parquet": (b"PAR1\x15\x04\x15", "a Parquet file", "read_parquet"),
    "Arrow stream": (b"\xff\xff\xff\xff\x10\x01\0\0", "an Arrow file", "from_file"),
    "Feather": (b"ARROW1\0\0", "an Arrow file", "read_feather"),
    "gzip": (gzip.compress(LINE), "gzip", "gunzip"),
    "xz": (lzma.compress(LINE), "xz", "unxz"),
    "bzip2": (bz2.compress(LINE), "bzip2", "bunzip2"),
    "zstd": (b"\x28\xb5\x2f\xfd\x04\x58", "zstd", "unzstd"),
    "zip": (zipped("rows.jsonl"), "a zip archive", "unzip"),
    "xlsx": (zipped("[Content_Types].xml", "xl/workbook.xml"), "an Excel sheet", "CSV"),
    "xlsx of openpyxl": (zipped("docProps/app.xml", "xl/workbook.xml"), "an Excel sheet", "CSV"),
    "xls": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an Excel sheet", "CSV"),
    "SQLite": (b"SQLite format 3\0\x10\0", "an SQLite database", "read_sql"),
    "PDF": (b"%PDF-1.7\n", "a PDF", "JSON lines"),
    "HTML": (b"\n<!DOCTYPE html>\n<html>", "an HTML or XML page", "download"),
    "LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a Git LFS pointer", "git lfs pull"),
    "binary": (b"\x7fELF\x02\x01\x01\0", "a binary file", "CSV"),
    "object of rows": (json.dumps({"version": 1, "data": [ROW]}).encode(), "one JSON object", "'data'"),
    "object, indented": (
        json.dumps({"info": {}, "questions": [ROW]}, indent=1).encode(),
        "one JSON obj",
        "'questions'",
    ),
    "nested object": (json.dumps({"vqa": {"train": [ROW]}}).encode(), "one JSON object", "'vqa.train'"),
    "rows by key": (json.dumps({"0": ROW, "1": ROW}).encode(), "one JSON object", "keys of their own"),
    "columns of pandas": (json.dumps(COLUMNS).encode(), "object of columns", "records"),
    "columns as lists": (json.dumps({name: [text] for name, text in ROW.items()}).encode(), "columns", "records"),
    "split columns": (b'{"columns":["question"],"index":[0],"data":[["Q?"]]}', "object of columns", "records"),
    "indented rows": (2 * (json.dumps(ROW, indent=2) + "\n").encode(), "spread over several lines", "jq -c"),
    "one indented row": (json.dumps(ROW, indent=2).encode(), "spread over several lines", "array"),
}
KINDS |= {f"pickle {n}": (pickle.dumps([ROW], n), "a pickle", "json.dumps") for n in (2, 4, 5)}
KINDS |= {kind: (picture(kind), "an image", "--images") for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP")}
UTF = ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"]
KINDS |= {name: (GOOD_LINE.encode(name), name[:6].upper(), "save it in UTF-8") for name in UTF}
KINDS |= {f"CSV, {name}": ("image,question\n".encode(name), name[:6].upper(), "save it in UTF-8") for name in UTF}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_a_file_of_another_kind_is_refused_in_one_line_with_kind_and_remedy(tmp_path, name, suffix):
    content, kind, remedy = KINDS[name]
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_rows(path)
    message = str(caught.value)
    assert message.startswith(f"{path} ") and kind in message and remedy in message and "\n" not in message


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="is a folder"):
        read_rows(tmp_path)


def test_rows_as_python_prints_them_have_one_reason(tmp_path):
    path = tmp_path / "rows.jsonl"
    for content in (f"{ROW}\n{flat(image='b.png')}\n", str([ROW, ROW])):
        path.write_text(content)
        good, bad = read_rows(path)
        assert not good and len({row.reason.partition(";")[0] for row in bad}) == 1
        assert "single quotes" in bad[0].reason and "json.dumps" in bad[0].reason


def test_an_object_that_is_a_row_is_read_with_whatever_else_it_has(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({**ROW, "boxes": [{"x": 1}], "more": {"question": "no"}}))
    good, bad = read_rows(path)
    assert len(good) == 1 and not bad
