"""Promise 4, rows: three formats give one conversation, and what can't be used is named, all of it, with its line."""

import json

import pytest

from common import InputError
from inputs.rows import read_rows

ASKED = ["user: ▣How many polyps?", "assistant: two"]
TWICE = ["user: ▣▣Same polyp?", "assistant: no"]
CHAT = ["system: Be brief.", "user: ▣What colour?", "assistant: red", "user: ▣And here?", "assistant: white"]
PLAIN = ["user: What is a polyp?", "assistant: a growth"]


def flat(answer="two", question="How many polyps?", **images) -> dict:
    return {**images, "question": question, "answer": answer}


def llava(*turns: str, **images) -> dict:
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    return {**images, "conversations": [{"from": names[r], "value": t} for r, t in (t.split(": ", 1) for t in turns)]}


def chat(*turns: str, **images) -> dict:
    return {**images, "messages": [{"role": r, "content": t} for r, t in (t.split(": ", 1) for t in turns)]}


def parts(*contents: list[str], **images) -> dict:
    """Turns of typed parts; a part that starts with @ is an image, by the name after it where there is one."""
    roles = ["user", "assistant"] * len(contents)
    typed = [
        [
            {"type": "image"} | ({"image": p[1:]} if p[1:] else {}) if p[:1] == "@" else {"type": "text", "text": p}
            for p in content
        ]
        for content in contents
    ]
    return {**images, "messages": [{"role": role, "content": content} for role, content in zip(roles, typed)]}


MARKED_CHAT = [turn.replace("▣", "<image>\n") for turn in CHAT]
# name: (row, its images, its turns with ▣ for an image)
FORMATS = {
    "flat, image": (flat(image="a.png"), ["a.png"], ASKED),
    "flat, image_filename": (flat(image_filename="a.png"), ["a.png"], ASKED),
    "flat, image_id": (flat(image_id="a"), ["a"], ASKED),
    "flat, file name and id": (flat(image_id="a", image_filename="a.png"), ["a.png"], ASKED),
    "flat, list": (flat("no", "Same polyp?", image=["a.png", "b.png"]), ["a.png", "b.png"], TWICE),
    "flat, list under images": (flat("no", "Same polyp?", images=["a.png", "b.png"]), ["a.png", "b.png"], TWICE),
    "flat, placeholder": (flat("no", "<image> and <image>", image=["a", "b"]), ["a", "b"], ["user: ▣and▣", TWICE[1]]),
    "flat, empty list and file name": (flat(image=[], image_filename="a.png"), ["a.png"], ASKED),
    "flat, text only": (flat("a growth", "What is a polyp?"), [], PLAIN),
    "flat, image null": (flat("a growth", "What is a polyp?", image=None), [], PLAIN),
    "flat, whole number": (flat(2, image="a.png"), ["a.png"], [ASKED[0], "assistant: 2"]),
    "flat, zero": (flat(0, image="a.png"), ["a.png"], [ASKED[0], "assistant: 0"]),
    "flat, number": (flat(2.5, image="a.png"), ["a.png"], [ASKED[0], "assistant: 2.5"]),
    "LLaVA": (llava("user: <image>\nHow many polyps?", ASKED[1], image="a.png"), ["a.png"], ASKED),
    "LLaVA, list": (llava("user: <image><image>\nSame polyp?", TWICE[1], image=["a", "b"]), ["a", "b"], TWICE),
    "LLaVA, images": (llava("user: <image>\n<image>Same polyp?", TWICE[1], images=["a", "b"]), ["a", "b"], TWICE),
    "LLaVA, system and turns": (llava(*MARKED_CHAT, image=["a", "b"]), ["a", "b"], CHAT),
    "LLaVA, text only": (llava(*PLAIN), [], PLAIN),
    "messages": (chat("user: <image>How many polyps?", ASKED[1], images=["a.png"]), ["a.png"], ASKED),
    "messages, image": (chat("user: <image>How many polyps?", ASKED[1], image="a.png"), ["a.png"], ASKED),
    "messages, system and turns": (chat(*MARKED_CHAT, images=["a", "b"]), ["a", "b"], CHAT),
    "messages, text only": (chat(*PLAIN), [], PLAIN),
    "parts": (parts(["@a.png", "How many polyps?"], ["two"]), ["a.png"], ASKED),
    "parts and images": (parts(["@", "@", "Same polyp?"], ["no"], images=["a", "b"]), ["a", "b"], TWICE),
    "parts, names of both kinds": (parts(["@", "@a", "Same polyp?"], ["no"], images=["b"]), ["b", "a"], TWICE),
    "flat, other formats null": (flat(image="a.png") | {"messages": None, "conversations": None}, ["a.png"], ASKED),
    "parts, placeholder in the text": (parts(["<image>\nHow many polyps?"], ["two"], images=["a"]), ["a"], ASKED),
}
GOOD_LINE = json.dumps(flat(image="a.png"))


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


def test_rows_that_share_a_line_of_an_array_are_told_apart(tmp_path):
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


# name: (line, what the reason says)
BAD = {
    "truncated": (GOOD_LINE[:-4], "not valid JSON"),
    "two on a line": (GOOD_LINE + GOOD_LINE, "not valid JSON"),
    "NUL byte": (GOOD_LINE.replace("two", "t\0wo"), "not valid JSON"),
    "NaN": (json.dumps(flat(float("nan"))), "NaN"),
    "Infinity": (json.dumps(flat("two", options=[float("inf")])), "Infinity"),
    "number too large": (GOOD_LINE.replace('"two"', "1e999"), "Out of range"),
    "nested too deep": ("[" * 200_000, "not valid JSON"),
    "half a character": (json.dumps(flat("\ud83d")), "surrogate"),
    "boxes to fill in": (json.dumps(flat("<bbox>", "Find it", image="a.png") | {"objects": {"bbox": [1]}}), "<bbox>"),
    "weight of 0": (json.dumps(flat(weight=0)), "`weight` must be a number"),
    "weight below 0": (json.dumps(flat(weight=-1)), "`weight` must be a number"),
    "weight as text": (json.dumps(flat(weight="2")), "`weight` must be a number"),
    "weight true": (json.dumps(flat(weight=True)), "`weight` must be a number"),
    "weight out of range": (GOOD_LINE.replace("{", '{"weight": 1' + 400 * "0" + ", ", 1), "`weight` must be a number"),
    "list": ("[]", "not list"),
    "number": ("42", "not int"),
    "null": ("null", "not NoneType"),
    "text": ('"question"', "not str"),
    "no fields": ("{}", "no question"),
    "other fields": ('{"prompt": "How?", "reply": "So."}', "prompt, reply"),
    "missing answer": ('{"image": "a.png", "question": "How?"}', "no answer"),
    "null answer": (json.dumps(flat(None)), "no answer"),
    "empty answer": (json.dumps(flat("")), "no answer"),
    "blank answer": (json.dumps(flat(" \n")), "no answer"),
    "yes-no answer": (json.dumps(flat(True)), "the answer is a bool"),
    "list of answers": (json.dumps(flat(["two"])), "the answer is a list"),
    "LLaVA, empty answer": (json.dumps(llava("user: How?", "assistant: ")), "no answer"),
    "messages, empty answer": (json.dumps(chat("user: How?", "assistant: ")), "no answer"),
    "parts, empty answer": (json.dumps(parts(["How?"], [" "])), "no answer"),
    "empty question": (json.dumps(flat(question=" ", image="a.png")), "question is empty"),
    "question of another type": (json.dumps(flat(question=["How?"])), "question is empty or not a string"),
    "flat, only a placeholder": (json.dumps(flat(question="<image>", image="a")), "no question"),
    "LLaVA, empty question": (json.dumps(llava("user: <image>\n", "assistant: two", image="a")), "no question"),
    "messages, empty question": (json.dumps(chat("user: ", "assistant: two")), "no question"),
    "parts, empty question": (json.dumps(parts(["@a.png"], ["two"])), "no question"),
    "flat, placeholder too many": (json.dumps(flat(question="<image> <image> so?", image="a")), "2 image placeholders"),
    "flat, placeholder too few": (json.dumps(flat(question="<image> so?", image=["a", "b"])), "for 2 images"),
    "LLaVA, placeholder too many": (json.dumps(llava("user: <image> so?", "assistant: no")), "for 0 images"),
    "LLaVA, placeholder too few": (json.dumps(llava("user: So?", "assistant: no", image="a")), "0 image placeholders"),
    "messages, placeholder too many": (json.dumps(chat("user: <image> so?", "assistant: no")), "for 0 images"),
    "messages, placeholder too few": (json.dumps(chat("user: So?", "assistant: no", image="a")), "for 1 images"),
    "parts, placeholder too many": (json.dumps(parts(["@", "So?"], ["no"])), "1 image placeholders for 0 images"),
    "parts, placeholder too few": (json.dumps(parts(["@a", "So?"], ["no"], images=["b"])), "0 image placeholders"),
    "parts, placeholder in their text": (json.dumps(parts(["@a", "<image>So?"], ["no"])), "1 image placeholders"),
    "image of another type": (json.dumps(flat(image={"path": "a.png"})), "must be a file name"),
    "image without a name": (json.dumps(flat(image="")), "must be a file name"),
    "LLaVA, unknown role": ('{"conversations": [{"from": "robot", "value": "Hi"}]}', "human, gpt or system"),
    "LLaVA, role of another type": ('{"conversations": [{"from": ["gpt"], "value": "Hi"}]}', "human, gpt or system"),
    "LLaVA, no value": ('{"conversations": [{"from": "human"}]}', "human, gpt or system"),
    "LLaVA, no turns": ('{"conversations": []}', "`conversations` must be"),
    "unknown role": (json.dumps(chat("tool: Hi", "assistant: no")), "unknown role 'tool'"),
    "messages, no turns": ('{"messages": {}}', "`messages` must be"),
    "content of another type": ('{"messages": [{"role": "user", "content": 7}]}', "`content` must be"),
    "two questions": (json.dumps(chat("user: So?", "user: Or?", "assistant: no")), "alternate"),
    "answer first": (json.dumps(chat("assistant: no", "user: So?")), "alternate"),
    "question last": (json.dumps(chat("user: So?", "assistant: no", "user: Why?")), "alternate"),
    "system in between": (json.dumps(chat("user: So?", "system: Be brief.", "assistant: no")), "alternate"),
    "system only": (json.dumps(chat("system: Be brief.")), "alternate"),
    "image in an answer": (json.dumps(parts(["So?"], ["@a.png", "this"])), "only a question can hold an image"),
    "image in a system turn": (
        json.dumps(parts(["@a.png", "So?"], ["no"])).replace('"user"', '"system"').replace('"assistant"', '"user"')[:-2]
        + ', {"role": "assistant", "content": "no"}]}',
        "only a question can hold an image",
    ),
    "video part": (json.dumps(parts(["So?"], ["no"])).replace('"text"', '"video"', 1), "of type text or image"),
    "image_url part": (json.dumps(parts(["So?"], ["no"])).replace('"text"', '"image_url"', 1), "of type text or image"),
    "flat, video": (json.dumps(flat(video="a.mp4")), "video"),
    "LLaVA, video": (json.dumps(llava("user: <video>\nSo?", "assistant: no", video="a.mp4")), "video"),
    "messages, videos": (json.dumps(chat("user: <video>So?", "assistant: no", videos=["a.mp4"])), "video"),
    "not UTF-8": (GOOD_LINE.replace("two", "zwölf").encode("latin-1"), "utf-8"),
}


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
def test_what_is_left_unread_of_a_broken_array_is_said(tmp_path, content, good, line):
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
