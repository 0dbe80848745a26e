"""Rows: three formats give the same conversation, and every bad row is named with its line and reason (promise 4)."""

import json

import pytest
from examples import BAD, FORMATS, GOOD_LINE, flat

from common import InputError
from inputs.rows import read_rows


def read(tmp_path, content: str | bytes, name: str = "rows.jsonl"):
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_rows(path)


def test_a_row_s_weight_is_read_and_1_where_there_is_none(tmp_path):
    rows, bad = read(tmp_path, "".join(json.dumps(flat(weight=w)) + "\n" for w in (2, 0.5, None)) + GOOD_LINE)
    assert not bad and [row.weight for row in rows] == [2.0, 0.5, 1.0, 1.0]


def turns_of(row) -> list[str]:
    return [
        f"{message['role']}: "
        + "".join("▣" if part["type"] == "image" else part["text"] for part in message["content"])
        for message in row.messages
    ]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_becomes_the_same_conversation(tmp_path, name):
    written, images, turns = FORMATS[name]
    (row,), bad = read(tmp_path, json.dumps(written))
    assert not bad
    assert row.images == images and turns_of(row) == turns
    assert row.fields["question"] == turns[-2].removeprefix("user: ").replace("▣", "")
    assert row.fields["answer"] == turns[-1].removeprefix("assistant: ")


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


def test_id_question_type_and_options_are_kept_as_they_are(tmp_path):
    options = ["two", "Three", " 4"]
    for row in (flat(image="a.png"), *(FORMATS[name][0] for name in ("LLaVA", "messages", "parts"))):
        kept = {"id": 17, "question_type": "count", "options": options}
        (read_row,), _ = read(tmp_path, json.dumps(row | kept))
        assert read_row.fields == {**kept, "question": "How many polyps?", "answer": "two"}


@pytest.mark.parametrize("options", [{"A": "yes"}, "yes", ["yes"], ["yes", 1], ["yes", " "], ["yes", "yes"], []])
def test_options_that_are_no_choice_are_refused(tmp_path, options):
    _, (bad,) = read(tmp_path, write_lines([flat(image="a.png", options=options)]))
    assert "`options`" in bad.reason


def test_a_row_without_an_id_is_known_by_its_line(tmp_path):
    rows, _ = read(tmp_path, write_lines([flat(image="a.png"), flat(image="a.png", id=None)]))
    assert [row.fields["id"] for row in rows] == ["rows.jsonl:1", "rows.jsonl:2"]


@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("text", ["тринадцать — 息肉 🩺 ≥é", "a\u2028b\u0085c", 'say "no" \\ \t\n/', "long " * 20_000])
def test_any_text_is_read_as_written(tmp_path, text, ascii_only):
    line = json.dumps(flat(text, text + "?", image="изображение 1.png"), ensure_ascii=ascii_only)
    (row,), bad = read(tmp_path, line + "\n")
    assert not bad
    assert row.fields["answer"] == text and row.fields["question"] == text + "?"
    assert row.images == ["изображение 1.png"]


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        ("\ufeff" + GOOD_LINE + "\n" + GOOD_LINE, [1, 2]),
        (f"{GOOD_LINE}\r\n\r\n{GOOD_LINE}\r\n", [1, 3]),
        (f"\n \t\n{GOOD_LINE}\n\n\n", [3]),
        (f"\ufeff\r\n[\r\n{GOOD_LINE},\r\n\r\n{GOOD_LINE}\r\n]\r\n\r\n", [3, 5]),
    ],
    ids=["BOM", "CRLF", "blank lines", "all in an array"],
)
def test_bom_crlf_and_blank_lines_are_no_fault(tmp_path, content, lines):
    rows, bad = read(tmp_path, content)
    assert not bad
    assert [row.where for row in rows] == [f"rows.jsonl:{line}" for line in lines]


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_named_with_its_line_and_reason(tmp_path, name):
    line, reason = BAD[name]
    line = line.encode() if isinstance(line, str) else line
    rows, (bad,) = read(tmp_path, b"\n".join([GOOD_LINE.encode(), line, GOOD_LINE.encode()]))
    assert bad.where == "rows.jsonl:2" and reason in bad.reason
    assert [row.where for row in rows] == ["rows.jsonl:1", "rows.jsonl:3"]


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
