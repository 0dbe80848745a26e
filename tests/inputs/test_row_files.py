"""Files of rows: every row is named by its line, and one that is broken hides no other (promise 4)."""

import json

import pytest
from examples import BAD, FORMATS, GOOD_LINE, flat

from common import InputError
from inputs.row_files import read_rows


def read(tmp_path, content: str | bytes, name: str = "rows.jsonl"):
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_rows(path)


def turns_of(row) -> list[str]:
    return [
        f"{message['role']}: "
        + "".join("▣" if part["type"] == "image" else part["text"] for part in message["content"])
        for message in row.messages
    ]


def write_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize("write", [write_lines, json.dumps, lambda rows: json.dumps(rows, indent=2)])
def test_formats_mix_in_one_file_whether_json_lines_or_an_array(tmp_path, write):
    rows, bad = read(tmp_path, write([row for row, _, _ in FORMATS.values()]))
    assert not bad
    assert [(row.images, turns_of(row)) for row in rows] == [(images, turns) for _, images, turns in FORMATS.values()]
    assert len({row.where for row in rows}) == len(rows)


def test_rows_are_named_by_their_line(tmp_path):
    written = [row for row, _, _ in FORMATS.values()]
    rows, _ = read(tmp_path, "\n\n" + "\n\n".join(map(json.dumps, written)), "some.jsonl")
    assert [row.where for row in rows] == [f"some.jsonl:{2 * n + 3}" for n in range(len(written))]

    pretty = "\n" + json.dumps(written, indent=2)
    starts = [number for number, line in enumerate(pretty.split("\n"), start=1) if line == "  {"]
    rows, _ = read(tmp_path, pretty, "some.json")
    assert [row.where for row in rows] == [f"some.json:{number}" for number in starts]


def test_rows_that_share_a_line_of_an_array_are_distinguished(tmp_path):
    rows, bad = read(tmp_path, json.dumps([flat(image="a.png"), 7, flat(image="b.png")]), "rows.json")
    assert [row.where for row in rows] == ["rows.json:1", "rows.json:1 row 3"]
    assert [row.where for row in bad] == ["rows.json:1 row 2"]


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        ("\ufeff" + GOOD_LINE + "\n" + GOOD_LINE, [1, 2]),
        (f"{GOOD_LINE}\r\n\r\n{GOOD_LINE}\r\n", [1, 3]),
        (f"{GOOD_LINE}\r\r{GOOD_LINE}\r", [1, 3]),
        (f"\n \t\n{GOOD_LINE}\n\n\n", [3]),
        (f"\ufeff\r\n[\r\n{GOOD_LINE},\r\n\r\n{GOOD_LINE}\r\n]\r\n\r\n", [3, 5]),
    ],
    ids=["BOM", "CRLF", "CR", "blank lines", "all in an array"],
)
def test_bom_crlf_and_blank_lines_are_no_fault(tmp_path, content, lines):
    rows, bad = read(tmp_path, content)
    assert not bad
    assert [row.where for row in rows] == [f"rows.jsonl:{line}" for line in lines]


def test_all_bad_rows_are_named_at_once_and_good_ones_between_them_are_read(tmp_path):
    lines = [line if isinstance(line, bytes) else line.encode() for line, _ in BAD.values()]
    lines.append(lines.pop(0))  # the truncated one last, as a stopped copy leaves it
    rows, bad = read(tmp_path, b"\n".join(piece for line in lines for piece in (GOOD_LINE.encode(), line)))
    assert [row.where for row in bad] == [f"rows.jsonl:{2 * n + 2}" for n in range(len(BAD))]
    assert [row.where for row in rows] == [f"rows.jsonl:{2 * n + 1}" for n in range(len(BAD))]


def test_bad_rows_of_an_array_do_not_hide_each_other(tmp_path):
    rows, bad = read(tmp_path, f'[\n{{"answer": NaN}},\n7,\n[],\n{GOOD_LINE},\n{{"question": "\0"}},\n{{}}]')
    assert [row.where for row in bad] == [f"rows.jsonl:{line}" for line in (2, 3, 4, 6, 7)]
    assert [row.where for row in rows] == ["rows.jsonl:5"]


@pytest.mark.parametrize(
    ("content", "good", "line"),
    [
        (f"[{GOOD_LINE},\n{GOOD_LINE[:-5]}", 1, 2),
        (f"[\n{GOOD_LINE},\n", 1, 3),
        (f"[\n{GOOD_LINE}", 1, 2),
        (f"[\n{GOOD_LINE}]\n{GOOD_LINE}", 1, 2),
        (f"[\n{GOOD_LINE}\n{GOOD_LINE}]", 1, 3),
        (f"[\n{GOOD_LINE},\n{GOOD_LINE},\n]", 2, 4),
        (f"[,\n{GOOD_LINE}]", 0, 2),
    ],
    ids=["row cut", "cut after a comma", "cut before the bracket", "rows after it", "no comma", "last comma", "first"],
)
def test_the_error_says_what_of_a_broken_array_was_not_read(tmp_path, content, good, line):
    rows, (bad,) = read(tmp_path, content)
    assert len(rows) == good
    assert bad.where.split(" row ")[0] == f"rows.jsonl:{line}" and "the rest of the file was not read" in bad.reason


@pytest.mark.parametrize("first", ["[]", f"[{GOOD_LINE}]"])
def test_a_list_in_the_first_line_hides_no_other(tmp_path, first):
    rows, (bad,) = read(tmp_path, f"{first}\n{GOOD_LINE}\n{GOOD_LINE}")
    assert bad.where == "rows.jsonl:1" and "not list" in bad.reason
    assert [row.where for row in rows] == ["rows.jsonl:2", "rows.jsonl:3"]


@pytest.mark.parametrize("content", ["", "\n\n", "\ufeff", "[]", " [\n] "])
def test_a_file_without_rows_is_bad(tmp_path, content):
    rows, (bad,) = read(tmp_path, content)
    assert not rows
    assert bad.where == "rows.jsonl:1" and "no rows" in bad.reason


@pytest.mark.parametrize("content", [f"[\n{GOOD_LINE}]".replace("two", "zwölf").encode("latin-1"), b"[\n\xff\xfe\x00"])
def test_an_array_that_is_not_utf_8_is_named_with_the_line(tmp_path, content):
    rows, (bad,) = read(tmp_path, content)
    assert not rows
    assert bad.where == "rows.jsonl:2" and "UTF-8" in bad.reason


def test_a_file_that_can_t_be_opened_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="nowhere.jsonl"):
        read_rows(tmp_path / "nowhere.jsonl")


REPEATED = [
    '"answer": "two", "answer": "one"',
    '"answer": "two", "answer": "two"',
    '"answer": "two", "a": {"b": 1, "b": 2}',
]


@pytest.mark.parametrize("fields", REPEATED)
@pytest.mark.parametrize("write", [lambda rows: "\n".join(rows), lambda rows: f"[{', '.join(rows)}]"])
def test_a_field_that_stands_twice_in_an_object_is_refused_and_hides_no_other_row(tmp_path, write, fields):
    row = GOOD_LINE.replace('"answer": "two"', fields)
    rows, (bad,) = read(tmp_path, write([GOOD_LINE, row, GOOD_LINE]))
    assert "stands twice in an object" in bad.reason and ("'b'" if "{" in fields else "'answer'") in bad.reason
    assert len(rows) == 2
