"""CSV and TSV hold the same rows as JSON lines; what does not fit their header is told with its line (promise 4)."""

import json

import pytest
from examples import GOOD_LINE, flat

from common import InputError
from inputs.row_files import read_rows

HEADER = "image,question,answer"


def read(tmp_path, content: str, name: str = "rows.csv", encoding: str = "utf-8"):
    path = tmp_path / name
    path.write_bytes(content.encode(encoding))
    return read_rows(path)


@pytest.mark.parametrize("name", ["rows.csv", "rows.txt", "rows", "rows.jsonl"])
@pytest.mark.parametrize("delimiter", [",", "\t", ";"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_table_gives_the_rows_that_json_lines_give(tmp_path, name, delimiter, encoding):
    cells = ["a.png", "How many polyps?", "two", "3", "count"], ["息肉.png", "Is it red?", "no", "", ""]
    lines = [delimiter.join(line) for line in (["image", "question", "answer", "id", "question_type"], *cells)]
    rows, bad = read(tmp_path, "\n".join(lines), name, encoding)
    assert not bad and [row.images for row in rows] == [["a.png"], ["息肉.png"]]
    assert [row.id for row in rows] == ["3", f"{name}:3"]
    assert rows[0].fields == {"question": "How many polyps?", "answer": "two", "question_type": "count"}
    assert rows[1].fields == {"question": "Is it red?", "answer": "no"}  # empty cells are no fields


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_rows_of_a_table_are_named_by_the_line_that_they_begin_in(tmp_path, end):
    lines = ["", HEADER, '"a.png","two', 'lines, and ""quotes""","yes"', "", 'b.png,Q?,"1', '2"', "c.png,Q?,no", ""]
    rows, bad = read(tmp_path, end.join(lines))
    assert not bad and [row.where for row in rows] == ["rows.csv:3", "rows.csv:6", "rows.csv:8"]
    end = end.replace("\r", "\n") if end == "\r" else end
    assert rows[0].fields["question"] == f'two{end}lines, and "quotes"' and rows[1].fields["answer"] == f"1{end}2"


def test_cells_are_texts_but_for_weights_and_json(tmp_path):
    header = "images,question,answer,weight,options"
    row = '"[""a.png"", ""b.png""]","[1] or 2?",007,,"[""007"", ""8""]"'
    json_row = flat("007", "[1] or 2?", images=["a.png", "b.png"], options=["007", "8"])
    (read_row,), bad = read(tmp_path, f"{header}\n{row}\n")
    assert not bad and read_row.images == ["a.png", "b.png"]
    assert read_row.fields["answer"] == "007" and read_row.fields["question"] == "[1] or 2?"
    assert read_row.fields["options"] == ["007", "8"]
    lines = [header, *(row.replace(",,", f",{weight},") for weight in ("0.5", ".5", "half"))]
    (*weighted,), (bad,) = read(tmp_path, "\n".join(lines))
    (expected,), _ = read(tmp_path, json.dumps(json_row | {"weight": 0.5}), "rows.jsonl")
    assert [row.messages for row in weighted] == [expected.messages] * 2
    assert expected.messages[-1]["weight"] == 0.5
    assert bad.where == "rows.csv:4" and "`weight` must be" in bad.reason and "'half'" in bad.reason


@pytest.mark.parametrize("name", ["rows.csv", "rows.txt"])
def test_columns_are_read_in_any_letter_case(tmp_path, name):
    header = "Image,QUESTION,Answer,Weight,Question Type,System Prompt"
    (row,), bad = read(tmp_path, f'{header}\na.png,Where?,"[96, 64]",0.5,"[1]","[2]"\n', name)
    assert row.messages[0]["content"] == [{"type": "text", "text": "[2]"}]
    assert not bad and row.images == ["a.png"] and row.messages[-1]["weight"] == 0.5
    assert row.fields == {"question": "Where?", "answer": "[96, 64]", "question_type": "[1]"}


def test_a_cell_of_any_length_is_read(tmp_path):
    (row,), bad = read(tmp_path, f"{HEADER}\na.png,Q?,{'long ' * 200_000}")
    assert not bad and len(row.fields["answer"]) == 1_000_000


def test_quotes_of_texts_do_not_join_rows_of_a_tsv(tmp_path):
    lines = ["image\tquestion\tanswer", 'a.png\t"Is it?\tyes', 'b.png\tsmall"\tno', 'c.png\t"Is\nit?"\tno']
    lines += ['d.png\t"Which of these?\na\tb\n1\t2"\ta']
    rows, (bad,) = read(tmp_path, "\n".join(lines), "rows.tsv")
    assert bad.where == "rows.tsv:2" and "quotes join 2 lines, each of which has the tabs of a row" in bad.reason
    assert [row.fields["question"] for row in rows] == ["Is\nit?", "Which of these?\na\tb\n1\t2"]
    _, bad = read(tmp_path, 'question\n"Is\nit?"\n', "alone.tsv")
    assert "no answer" in bad[0].reason


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("a.png,Q?", "2 columns, where the first line names 3"),
        ("a.png,Q, or so?,no", "4 columns, where the first line names 3"),
        ("a.png,,no", "no question"),
        ("a.png,Q?,", "no answer"),
        (",,", "no question"),
        ('a.png,"Is "it"?",no', "not doubled"),
        ("a.png,Q?,n\0o", "NUL"),
    ],
)
def test_a_row_that_does_not_fit_its_table_is_named_and_hides_no_other(tmp_path, line, reason):
    good = "a.png,How many polyps?,two"
    rows, (bad,) = read(tmp_path, f"{HEADER}\n{good}\n{line}\n{good}\n")
    assert bad.where == "rows.csv:3" and reason in bad.reason
    assert [row.where for row in rows] == ["rows.csv:2", "rows.csv:4"]


def test_what_quotes_that_stay_open_swallow_is_told(tmp_path):
    rows, (bad,) = read(tmp_path, f'{HEADER}\na.png,Q?,no\na.png,"Q?,no\nb.png,Q?,no\n')
    assert len(rows) == 1 and bad.where == "rows.csv:3"
    assert "quotes that are not closed" in bad.reason and "up to line 4" in bad.reason


def test_lists_as_python_prints_them_are_refused(tmp_path):
    _, (bad,) = read(tmp_path, f"{HEADER},options\na.png,Q?,no,\"['yes', 'no']\"\n")
    assert "'options'" in bad.reason and "as JSON" in bad.reason


def test_a_pandas_index_and_spaces_behind_commas_are_no_fault(tmp_path):
    for content in (
        f",{HEADER}\n0,a.png,How many polyps?,two\n",
        'image, question, answer\na.png, "How many polyps?", two',
    ):
        (row,), bad = read(tmp_path, content)
        assert not bad and row.fields["question"] == "How many polyps?" and row.fields["answer"] == "two"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("image,question,question\na,b,c\n", "rows.csv:1: two columns are named 'question'"),
        ("a.png,How many?,two\n", "rows.csv:1: the first line must name the columns"),
        ("image|question|answer\n", "rows.csv:1: the first line must name the columns"),
        (f"\n{HEADER}\na.png,Q?,zw\udcf6lf\n", "rows.csv:3: not UTF-8 text"),
    ],
    ids=["name twice", "no header", "other delimiter", "Latin-1"],
)
def test_a_table_that_can_t_be_read_is_refused_in_one_line(tmp_path, content, problem):
    path = tmp_path / "rows.csv"
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(InputError) as caught:
        read_rows(path)
    assert problem in str(caught.value) and "\n" not in str(caught.value)


def test_json_lines_are_json_whatever_the_file_is_called(tmp_path):
    (row,), bad = read(tmp_path, GOOD_LINE)
    assert not bad and row.images == ["a.png"]
