"""Every field of a row is used, told or a reason to refuse the row: no picture and no meaning is lost (promise 4)."""

import json
from dataclasses import replace

import pytest
from examples import chat, flat, llava, parts
from pictures import noise

from common import InputError
from inputs.images import ImageSettings
from training.description import data_warnings

ASKED = ("user: <image>How many?", "assistant: two")


def names_of(data) -> list[list[str]]:
    return [[image.rpartition("/")[2] for image in sample.images] for sample in data.samples]


def reasons(data) -> list[str]:
    return [bad.reason for bad in data.bad]


# ------------------------------------------------------------------------------------------------------------ pictures

COMMON = "image images image_path image_paths image_file image_name image_filename img img_name img_path file_name"
COMMON = f"{COMMON} filename picture photo img_id image_id image_url Image IMG Image-Path imagePath figure_path".split()


def test_a_picture_is_found_under_every_common_name_in_every_format(load):
    rows = [flat(), llava(*ASKED), chat(*ASKED), parts(["@", "How many?"], ["two"])]
    for name in [*COMMON, "Image Path"]:
        data = load([row | {name: value} for row in rows for value in ("a.png", ["a.png"])] + [flat() | {name: "b"}])
        assert not data.bad and names_of(data) == [["a.png"]] * 8 + [["b.png"]], name
        assert data_warnings(data, None)[1:] == []  # but that rows are repeated


@pytest.mark.parametrize("kind", ["image", "image_url"])
def test_a_part_s_picture_is_found_under_the_names_of_other_programs(load, kind):
    names = [{"image": "a.png"}, {"path": "a.png"}, {"url": "a.png"}, {"image_url": {"url": "a.png"}}, {"Image": "a"}]
    rows = [parts(["@", "So?"], ["no"]) for _ in names]
    for row, name in zip(rows, names):
        row["messages"][0]["content"][0] = {"type": kind, **name}
    assert names_of(load(rows)) == [["a.png"]] * len(names)


def test_a_part_without_a_type_is_what_it_holds(load):
    content = [{"image": "a.png"}, {"text": "So?"}]
    row = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "no"}]}
    assert names_of(load([row])) == [["a.png"]]


def test_a_picture_as_an_object_with_its_path_is_that_file(load):
    data = load([flat(image={"path": "a.png", "bytes": None}), flat(images=[{"bytes": None, "path": "b.png"}])])
    assert names_of(data) == [["a.png"], ["b.png"]]


@pytest.mark.parametrize("name", ["image", "images", "img_path"])
def test_an_empty_picture_field_is_no_picture(load, name):
    for value in (None, "", " ", [], {}):
        data = load([flat() | {name: value}, llava("user: So?", "assistant: no") | {name: value}])
        assert names_of(data) == [[], []] and not data_warnings(data, None)
        (bad,) = load([chat("user: <image>So?", "assistant: no") | {name: value}]).bad
        assert "1 image placeholders for 0 images" in bad.reason


@pytest.mark.parametrize(
    "value, reason",
    [
        ("https://example.org/a.png", "URL"),
        ("s3://bucket/a.png", "URL"),
        ("data:image/png;base64,iVBORw0KGgo", "base64"),
        ("/9j/" + "A" * 10_000, "base64"),
        ({"bytes": "iVBORw0KGgo", "path": "a.png"}, "must be a file name"),
        (262148, "must be a file name"),
        (True, "must be a file name"),
        (["a.png", None], "must be a file name"),
        ([["a.png"]], "must be a file name"),
    ],
)
def test_a_picture_that_is_no_file_name_is_refused_with_the_remedy(load, value, reason):
    names = "image", "Img_Path", "image_id"
    data = load([row | {name: value} for name in names for row in (flat(), chat(*ASKED))])
    for bad, name in zip(data.bad, [name for name in names for _ in range(2)], strict=True):
        assert reason in bad.reason and f"`{name}`" in bad.reason and "save the picture" in bad.reason
        assert len(bad.reason) < 300


def test_fields_that_name_the_same_picture_are_one_and_others_are_refused(load, tmp_path):
    for name in ("a.png", "b.png", "more/a.png"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        noise(64, 64).save(tmp_path / "images" / name)
    same = [
        {"image_path": "/elsewhere/a.png"},
        {"img_name": "a"},
        {"image_id": "0017"},
        {"image_url": "http://x/b.png"},
    ]
    same += [{"file_name": "C:\\scans\\a.jpg"}, {"images": ["a.png"]}, {"Image": "a.png"}]
    data = load([flat(image="a.png") | more for more in same], tmp_path / "images")
    assert not data.bad and names_of(data) == [["a.png"]] * len(same) and not data_warnings(data, None)[1:]
    other = [
        {"file_name": "gone.png"},
        {"file_name": "b.png"},
        {"images": ["a.png", "b.png"]},
        {"img": "more/a.png"},
        {"image_id": "b"},
    ]
    data = load([flat(image="a.png") | more for more in [*other, {"Image": "b.png"}]], tmp_path / "images")
    assert all(name in reason for more, reason in zip(other, reasons(data), strict=False) for name in more)
    assert len(data.bad) == 6 and "`image` and `Image` are the same field and differ" in reasons(data)[5]


def test_a_list_of_what_the_parts_name_is_no_second_picture(load):
    data = load([parts(["@a.png", "So?"], ["no"], images=["a.png"]), parts(["@", "@b", "So?"], ["no"], images=["a"])])
    assert names_of(data) == [["a.png"], ["a.png", "b.png"]]


def test_a_picture_in_a_turn_is_refused(load):
    row = chat("user: So?", "assistant: no")
    row["messages"][0]["images"] = ["a.png"]
    (reason,) = reasons(load([row]))
    assert "`images` of `messages` is not read there: name the picture in the row's own `images`" in reason


UNFILLED = "<IMAGE> <Image> <image_1> <image1> <image-1> <ImageHere> <img> </img> [IMG] [image] [Image_2] <|image|>"
UNFILLED = (
    f"{UNFILLED} <|image_1|> <video> <audio> <Video> <start_of_image> <IMG_CONTEXT> {{image}} {{{{image}}}} <im_patch>"
)
UNFILLED = f"{UNFILLED} &lt;image&gt; <image_placeholder> <video_0> <bbox> <ref-object> <image/>"
UNFILLED = [*UNFILLED.split(), "<image 1>", "<img>a.png</img>", '<img src="a.png" alt="a">', "Picture 1: <img>a</img>"]


def test_a_placeholder_that_nothing_fills_is_refused_wherever_it_stands(load):
    for mark in UNFILLED:
        rows = [flat(question=f"{mark} So?"), flat(question=f"So? {mark}", image="a.png"), flat(f"It is {mark}")]
        rows += [chat(f"system: {mark}", "user: So?", "assistant: no"), flat("no", options=["no", mark])]
        data = load([*rows, parts(["@a.png", f"So {mark}"], ["no"])])
        assert [bad.where for bad in data.bad] == [f"rows.jsonl:{n}" for n in range(1, 7)], mark
        assert all("a placeholder that nothing fills" in reason for reason in reasons(data))


def test_an_image_placeholder_in_an_answer_or_an_option_is_refused(load):
    rows = [flat("<image>", image="a.png"), chat("system: <image>", "user: So?", "assistant: no")]
    data = load([*rows, flat("no", options=["no", "<image>"])])
    assert all("holds '<image>', a placeholder that nothing fills" in reason for reason in reasons(data))
    assert len(data.bad) == 3
    for settings in ({"prompt": "<image>{question}"}, {"system": "See <image>"}):
        with pytest.raises(InputError, match="holds <image>"):
            load([flat()], **settings)


LOOKALIKES = [
    "<b>this</b>",
    "a < b > c",
    "<5mm",
    "<polyp>",
    "{question}",
    "[1]",
    "&lt;",
    "image",
    "<imagenet>",
    "[imaging]",
]


def test_texts_that_only_look_like_placeholders_are_texts(load):
    texts = [*LOOKALIKES, "an <i>image</i>", "the image [left]", "<|", "{0}", "(image)"]
    data = load([flat(f"It is {text}", f"{text}?") for text in texts])
    assert [sample.fields["question"] for sample in data.samples] == [f"{text}?" for text in texts]
    assert [sample.fields["answer"] for sample in data.samples] == [f"It is {text}" for text in texts]


@pytest.mark.parametrize("name", ["audio", "audios", "video", "videos", "Video_Path", "audio_file"])
def test_sound_and_film_are_refused_in_rows_turns_and_parts(load, name):
    row, value = parts(["@a.png", "So?"], ["no"]), [{"path": "a.wav"}]
    in_turn, in_part, typed = (json.loads(json.dumps(row)) for _ in range(3))
    in_turn["messages"][0][name] = value
    in_part["messages"][0]["content"][1][name] = value
    typed["messages"][0]["content"].append({"type": name, name: value})
    data = load([flat(**{name: "a.wav"}), row | {name: ["a.wav"]}, in_turn, in_part, typed])
    assert len(data.bad) == 5 and all("video" in reason or name in reason for reason in reasons(data))
    assert not load([flat(**{name: empty}) for empty in (None, "", [])]).bad


# ------------------------------------------------------------------------------------------------------ unknown fields


def test_unknown_fields_are_told_once_a_file_with_their_rows_and_the_first(load):
    turn, part = chat(*ASKED, image="a.png"), parts(["@a.png", "Why?"], ["so"])
    turn["messages"][0]["note"] = "left"
    part["messages"][0]["content"][1]["detail"] = "high"
    rows = [flat(image="a.png"), flat(image="b.png", patient="x", Device=7), flat(image="c.png", patient="left arm")]
    data = load([*rows, turn, part, flat(image="d.png", patient=None)])
    assert not data.bad
    assert data_warnings(data, None)[0] == (
        "rows.jsonl: fields that nothing reads:\n  patient (2 rows, first rows.jsonl:2)\n"
        "  Device (1 row, first rows.jsonl:2)\n  messages.note (1 row, first rows.jsonl:4)\n"
        "  messages.content.detail (1 row, first rows.jsonl:5)"
    )


def test_only_twenty_unknown_fields_of_a_file_are_named(load):
    (warning,) = data_warnings(load([flat(image="a.png", **{f"field {n}": n for n in range(23)})]), None)
    assert "field 19 (1 row," in warning and warning.endswith("and 3 more") and "field 20" not in warning


def test_fields_that_say_nothing_of_question_and_answer_are_ignored_without_a_word(load):
    names = "question_id source split dataset Category answer_type width".split()
    assert not data_warnings(load([flat(image="a.png", **dict.fromkeys([*names, "Unnamed: 0"], "train"))]), None)


def test_an_unread_field_that_names_a_file_of_the_images_is_refused(load):
    values = [
        "b.png",
        "b",
        ["b.png"],
        {"path": "b.png"},
        {"file_name": "b"},
        [[{"by": "b.png"}]],
        "./b.png",
        "file://b",
    ]
    for value in values:
        turn, part = chat(*ASKED, image="a.png"), parts(["@a.png", "Why?"], ["so"])
        turn["messages"][1]["mask"] = value
        part["messages"][0]["content"][1]["mask"] = value
        data = load([flat(mask=value), flat(mask=value, image="a.png"), turn, part])
        assert len(data.bad) == 4 and all("`mask` names the file" in why for why in reasons(data))
        assert all(
            "which the row does not show: call the field `image`, or take it out" in reason for reason in reasons(data)
        )


def test_a_field_that_names_what_the_row_shows_is_only_told(load, world):
    data = load([flat(image="a.png", scan="a.png"), flat(image="a", scan=str(world / "images" / "a.png"))])
    assert not data.bad and "scan (2 rows" in data_warnings(data, None)[0]


def test_texts_that_name_no_file_of_the_images_are_only_told(load, world):
    names = ["e.png", "unknown.bmp", "../rows.jsonl", ".", "/", "a.png ", "images/a.png", "a\0", "a" * 300, "x/" * 3000]
    data = load([flat(image="a.png", note=name) for name in [*names, str(world / "rows.jsonl")]])
    assert not data.bad and f"note ({len(names) + 1} rows" in data_warnings(data, None)[0]


def test_an_id_that_is_the_name_of_a_picture_must_be_that_of_one_that_is_shown(load):
    data = load(
        [flat(id="a.png"), flat(id="a.png", image="b.png"), flat(id="a.png", image="a"), flat(id="a"), flat(id=1.5)]
    )
    assert [bad.where for bad in data.bad] == ["rows.jsonl:1", "rows.jsonl:2"]
    assert all("`id` names the file 'a.png'" in reason for reason in reasons(data))


def test_a_picture_written_into_an_unread_field_is_refused(load):
    rows = [flat(thumbnail="data:image/png;base64,iVBORw0KGgo"), flat(scan={"bytes": "iVBORw0KGgo" + "A" * 5000})]
    data = load([*rows, flat(url="https://example.org/a.jpg"), flat(image="a.png", url="https://example.org/a.jpg")])
    assert len(data.bad) == 3 and all("holds a picture" in reason for reason in reasons(data))


@pytest.mark.parametrize("question", ["![a polyp](b.png) So?", '![](b.png "left") So?'])
def test_a_picture_of_markdown_is_refused(load, question):
    (reason,) = reasons(load([flat(question=question), flat(question="![](b.png) So?", image="b.png")]))
    assert "`text` names the file 'b.png'" in reason


# -------------------------------------------------------------------------------------- fields that change the meaning

REFUSED = {"label": False, "rejected_response": "no", "rejected": [1], "chosen": "yes", "margin": 0.5, "kto_tag": True}
REFUSED |= {"tools": [{"name": "f"}], "function_call": {"name": "f"}, "tool_calls": [{}], "history": [["So?", "No."]]}
REFUSED |= {"rejected_images": ["b.png"], "rejected_messages": [{}], "Rejected-Response": "no", "thinking": "Hm."}


@pytest.mark.parametrize("name", REFUSED)
def test_fields_of_another_kind_of_training_are_refused_by_name_with_the_remedy(load, name):
    in_turn = chat(*ASKED, image="a.png")
    in_turn["messages"][1][name] = REFUSED[name]
    data = load([row | {name: REFUSED[name]} for row in (flat(), llava(*ASKED, image="a.png"))] + [in_turn])
    assert len(data.bad) == 3 and all(f"`{name}`" in reason and ": " in reason for reason in reasons(data))
    if name != "label":
        assert not load([flat(**{name: empty}) for empty in (None, "", [], {})]).bad


def test_a_label_is_only_told_unless_it_is_false(load):
    data = load([flat(label=True), flat(label="polyp"), flat(label=0)])
    assert not data.bad and "label (3 rows" in data_warnings(data, None)[0]


@pytest.mark.parametrize("name", ["instruction", "input", "prompt", "query"])
def test_what_other_programs_put_before_a_question_is_refused_beside_it(load, name):
    (reason,) = reasons(load([flat(**{name: "Answer briefly."}), flat(**{name: "How many polyps?"})]))
    assert f"`{name}` is not read beside `question`: write the whole question there" in reason


@pytest.mark.parametrize("name", ["system", "System", "system_prompt"])
def test_a_row_s_system_prompt_is_its_system_turn(load, tokenizer, name):
    rows = [flat(), llava("user: How many polyps?", "assistant: two"), chat("user: How many polyps?", "assistant: two")]
    turn = chat("system: Be brief.", "user: How many polyps?", "assistant: two")
    data = load([row | {name: "Be brief."} for row in [*rows, turn]] + [turn], system="Another.")
    assert not data.bad and len({sample.ids.tobytes() for sample in data.samples}) == 1
    data = load([turn | {name: "Be long."}, flat(**{name: 7})])
    assert "the system turn differ" in reasons(data)[0] and "must be one text" in reasons(data)[1]


def test_two_conversations_in_a_row_are_refused(load):
    (reason,) = reasons(load([chat("user: So?", "assistant: no") | llava("user: Or?", "assistant: yes")]))
    assert "both `messages` and `conversations`" in reason


def test_the_fields_of_turns_go_by_the_names_of_both_formats(load):
    mixed = {"conversations": [{"role": "User", "content": "So?"}, {"role": "Assistant", "content": "no"}]}
    other = {"messages": [{"from": "Human", "value": "So?"}, {"from": "GPT", "value": "no"}]}
    data = load([mixed, other, chat("user: So?", "assistant: no"), {"Question": "So?", "ANSWER": "no"}])
    assert not data.bad and len({sample.ids.tobytes() for sample in data.samples}) == 1


# --------------------------------------------------------------------------------------------------------------- boxes

BOXES = [
    "<|object_ref_start|>the polyp<|object_ref_end|><|box_start|>(1,2),(3,4)<|box_end|>",
    "<|quad_start|>x<|quad_end|>",
]


def test_families_without_a_table_of_positions_have_box_tokens(settings):
    assert not settings.has_box_tokens and replace(settings, position_side=0).has_box_tokens


@pytest.fixture(params=[True, False], ids=["Qwen2-VL and Qwen2.5-VL", "Qwen3-VL"])
def of_family(request, load, settings, tokenizer, monkeypatch):
    """Load rows for a family that has box tokens or not, with a tokenizer that has them."""
    monkeypatch.setattr(ImageSettings, "has_box_tokens", request.param)
    tokens = [f"<|{kind}_{end}|>" for kind in ("object_ref", "box", "quad") for end in ("start", "end")]
    monkeypatch.setattr("inputs.prompts.special_tokens", lambda _: ["<|im_end|>", *tokens])
    return request.param, load


@pytest.mark.parametrize("box", BOXES)
def test_box_tokens_are_texts_of_the_families_that_have_them(of_family, box):
    has_them, load = of_family
    data = load([flat(box), flat(question=f"What is in {box}?"), flat(box, options=[box, "none"])])
    if has_them:
        assert not data.bad and data.samples[0].fields["answer"] == box
    else:
        assert len(data.bad) == 3
        assert all("this model writes boxes as JSON, from 0 to 1000" in reason for reason in reasons(data))


@pytest.mark.parametrize(
    "text", ["<|box_start|>(1,2)", "(1,2)<|box_end|>", "<|box_end|><|box_start|>", "<|box_start|>1<|quad_end|>"]
)
def test_half_a_pair_of_box_tokens_is_refused(of_family, text):
    has_them, load = of_family
    (reason,) = reasons(load([flat(text)]))
    assert ("without its other half" if has_them else "special token") in reason


# ----------------------------------------------------------------------------------------------------------- no picture


@pytest.mark.parametrize("answer", ["nan", "NaN", " null", "None", "<NA>"])
def test_answers_that_programs_write_for_a_missing_value_are_told(load, answer):
    data = load([flat(image="a.png"), flat(answer, image="b.png"), flat("none", image="c.png"), flat("none", "none")])
    warning, *_ = data_warnings(data, None)
    kind = "rows whose question or answer is what programs write for a missing value"
    assert warning == f"{kind}: 2\n  rows.jsonl:2 {answer.strip()!r}"


@pytest.mark.parametrize("text", ["a &lt; b", "caf\ufffd", "A. red\\nB. blue", "5&nbsp;mm", "&#39;"])
def test_texts_that_a_program_may_have_damaged_are_told(load, text):
    """Not so a command of LaTeX, or an ampersand."""
    data = load([flat(r"$\nu$ & co; &c;", image="a.png"), flat(text, image="b.png"), flat("no", text, image="c.png")])
    (warning,) = data_warnings(data, None)
    kind = "rows with an HTML entity, a \\n of two characters, or the sign for an unreadable character"
    assert warning.startswith(f"{kind}: 2\n  rows.jsonl:2 ") and max(map(len, warning.splitlines())) <= 100


def test_white_space_around_answers_is_told(load):
    data = load([flat("yes", image="a.png"), flat("yes ", image="b.png"), flat("\tno", image="c.png")])
    (warning,) = data_warnings(data, None)
    kind = "rows whose answer begins or ends with white space, which most chat templates train"
    assert warning == f"{kind}: 2\n  rows.jsonl:2 'yes '"


def test_a_letter_that_is_asked_for_where_texts_are_trained_is_told(load):
    asked = "What colour? Answer with the letter of an option."
    rows = [
        flat("B", asked, image="a.png", options=["white", "red"]),
        flat("B", "What colour?", image="b.png", options=["white", "red"]),
        flat("blue", asked, image="b.png"),
        flat("B", asked, image="c.png", options=["A", "B"]),
    ]
    (warning,) = data_warnings(load(rows), None)
    kind = "rows with `options` whose question asks for a letter"
    assert warning == f"{kind}: 1\n  rows.jsonl:1 trains 'red'\n  without `options`, answers are trained as written"


def test_lists_as_python_prints_them_are_told(load):
    data = load([flat('["a"]', image="a.png"), flat("['a', 'b']", image="b.png"), flat("the [1]", image="c.png")])
    (warning,) = data_warnings(data, None)
    assert warning.startswith("rows whose answer is a list as Python prints it") and "1\n  rows.jsonl:2" in warning


def test_whole_numbers_with_a_zero_behind_the_point_are_told_unless_other_numbers_have_decimals(load):
    rows = [flat("2.0", image="a.png"), flat(3.0, image="b.png"), flat("yes", image="c.png")]
    (warning,) = data_warnings(load(rows), None)
    assert "with .0, as pandas writes a column with gaps: 2\n  rows.jsonl:1 2.0" in warning
    for other in ("2.5", "4", "1,000.5", ".5"):
        assert not data_warnings(load([*rows, flat(other, image="d.png")]), None)


@pytest.mark.parametrize("text", ["\u200b", "\ufeff", "\u200b \u200d", "\u3164", "\u2800", "\u00ad"])
def test_texts_without_a_visible_character_are_told(load, text):
    data = load([flat(image="a.png"), flat(text, image="b.png"), flat("no", text, image="c.png")])
    (warning,) = data_warnings(data, None)
    assert warning == f"rows whose question or answer has no visible character: 2\n  rows.jsonl:2 {text!a}"
