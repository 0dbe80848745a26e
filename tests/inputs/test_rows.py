"""Rows: three formats give the same conversation, and every bad row is named with its line and reason (promise 4)."""

import json

import pytest
from examples import BAD, FORMATS, GOOD_LINE, chat, flat, llava

from inputs.row_files import read_rows


def read(tmp_path, content: str | bytes, name: str = "rows.jsonl"):
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_rows(path)


def weights_of(row) -> list[float]:
    return [message["weight"] for message in row.messages if message["role"] == "assistant"]


def test_a_row_s_weight_is_read_and_1_where_there_is_none(tmp_path):
    rows, bad = read(tmp_path, "".join(json.dumps(flat(weight=w)) + "\n" for w in (2, 0.5, None)) + GOOD_LINE)
    assert not bad and [weights_of(row) for row in rows] == [[2.0], [0.5], [1.0], [1.0]]


def test_an_answer_without_text_is_refused_behind_a_system_turn_too(tmp_path):
    blank = llava("system: Be brief.", "user: How many?", "assistant:  ")
    (row,) = read(tmp_path, json.dumps(blank))[1]
    assert row.reason == "no answer: a turn has no text"


WEIGHED = [({}, 1), ({"loss": True}, 1), ({"loss": False}, 0), ({"weight": 0}, 0), ({"loss_scale": 0.25}, 0.25)]


@pytest.mark.parametrize("fields, weight", [*WEIGHED, ({"loss": None, "weight": 2}, 2), ({"loss": 0, "weight": 2}, 0)])
@pytest.mark.parametrize("write, turns", [(llava, "conversations"), (chat, "messages")])
def test_a_turn_s_weight_times_the_row_s_is_the_weight_of_its_answer(tmp_path, write, turns, fields, weight):
    row = write("user: What colour?", "assistant: red", "user: Sure?", "assistant: yes", weight=3)
    row[turns][1] |= fields
    row[turns][2] |= {"loss": False}  # a question is never trained
    (read_row,), bad = read(tmp_path, json.dumps(row))
    assert not bad and weights_of(read_row) == [3 * weight, 3]
    assert "weight" not in read_row.messages[0]


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


def test_id_question_type_and_options_are_kept_as_they_are(tmp_path):
    options = ["two", "Three", " 4"]
    for row in (flat(image="a.png"), *(FORMATS[name][0] for name in ("LLaVA", "messages", "parts"))):
        kept = {"question_type": "count", "options": options}
        (read_row,), _ = read(tmp_path, json.dumps(row | kept | {"id": 17}))
        assert read_row.id == "17"
        assert read_row.fields == {**kept, "question": "How many polyps?", "answer": "two"}


@pytest.mark.parametrize("options", [{"A": "yes"}, "yes", ["yes"], ["yes", 1], ["yes", " "], ["yes", "yes"], []])
def test_options_that_are_no_choice_are_refused(tmp_path, options):
    _, (bad,) = read(tmp_path, write_lines([flat(image="a.png", options=options)]))
    assert "`options`" in bad.reason


def test_a_row_without_an_id_is_known_by_its_line(tmp_path):
    rows, _ = read(tmp_path, write_lines([flat(image="a.png"), flat(image="a.png", id=None)]))
    assert [row.id for row in rows] == ["rows.jsonl:1", "rows.jsonl:2"]


@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("text", ["тринадцать — 息肉 🩺 ≥é", "a\u2028b\u0085c", 'say "no" \\ \t\n/', "long " * 20_000])
def test_any_text_is_read_as_written(tmp_path, text, ascii_only):
    line = json.dumps(flat(text, text + "?", image="изображение 1.png"), ensure_ascii=ascii_only)
    (row,), bad = read(tmp_path, line + "\n")
    assert not bad
    assert row.fields["answer"] == text and row.fields["question"] == text + "?"
    assert row.images == ["изображение 1.png"]


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_named_with_its_line_and_reason(tmp_path, name):
    line, reason = BAD[name]
    line = line.encode() if isinstance(line, str) else line
    rows, (bad,) = read(tmp_path, b"\n".join([GOOD_LINE.encode(), line, GOOD_LINE.encode()]))
    assert bad.where == "rows.jsonl:2" and reason in bad.reason
    assert [row.where for row in rows] == ["rows.jsonl:1", "rows.jsonl:3"]
