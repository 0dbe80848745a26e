"""Options and accepted answers: an index or a letter is the option's text, and several answers are all kept."""

import json

import pytest
from examples import chat, flat, llava

from inputs.rows import parse_row

COLOURS = ["white", "red", "a light arm"]
LETTERS = dict(zip("ABC", COLOURS))


def read(row: dict):
    return parse_row("rows.jsonl:1", row).fields


def columns(pattern: str) -> dict:
    return {pattern.format(letter): text for letter, text in LETTERS.items()}


ANSWERS = [1, 1.0, "1", "B", "b", "(b)", "B.", "B)", "B:", "red", "Red", " red ", "red.", "B. red", "(B) red", "b red"]


@pytest.mark.parametrize("options", [COLOURS, LETTERS, json.dumps(COLOURS), json.dumps(LETTERS)])
def test_an_index_a_letter_or_a_text_is_the_option_s_text(options):
    for name in ("options", "choices", "Choices"):
        for answer in ANSWERS:
            fields = read({"question": "What colour?", name: options, "answer": answer})
            assert (fields["answer"], fields["options"], fields["question"]) == ("red", COLOURS, "What colour?")


@pytest.mark.parametrize("pattern", ["{}", "option_{}", "Option {}", "choice{}"])
def test_options_in_fields_of_their_own_are_options(pattern):
    fields = read(flat("C") | columns(pattern))
    assert fields["options"] == COLOURS and fields["answer"] == "a light arm"


def test_labels_of_any_kind_name_their_options():
    options = {"1": "white", "2": "red"}
    assert [read(flat(answer, options=options))["answer"] for answer in ("1", 1, "2", "red")] == ["white"] * 2 + [
        "red"
    ] * 2
    assert read(flat("I", options=["I", "II"]))["answer"] == "I"
    assert read(flat("A", options=["A", "B"]))["answer"] == "A"
    assert read(flat(3, options=["3", "4"]))["answer"] == "3"


@pytest.mark.parametrize("options", [COLOURS, LETTERS])
@pytest.mark.parametrize(
    "answer", [3, -1, 1.5, 17, "D", "z", "(E)", "green", "white; red", "B. white", "3", "re", "AB"]
)
def test_an_answer_that_is_none_of_the_options_is_refused(options, answer):
    with pytest.raises(ValueError, match="is none of the options"):
        read(flat(answer, options=options))


@pytest.mark.parametrize(
    "options, answer", [(["W", "L", "A"], "A"), (["1", "2", "0"], 1), (["red", "Red ", "no"], "RED"), (["B", "A"], "b")]
)
def test_an_answer_that_names_two_options_is_refused(options, answer):
    with pytest.raises(ValueError, match="names several of the options"):
        read(flat(answer, choices=options))


@pytest.mark.parametrize("answer", [True, False, None, {}, {"text": "red"}, [], ["red", "white"]])
def test_an_answer_that_is_no_text_or_index_is_refused(answer):
    with pytest.raises(ValueError, match="answer"):
        read(flat(answer, choices=COLOURS))


@pytest.mark.parametrize(
    "options", [{}, {"A": "red"}, "[1, ", '["red"]', 7, [1, 2], {"text": ["a"], "label": ["A"]}, ["a", [], "b"]]
)
def test_choices_that_are_no_choice_are_refused(options):
    with pytest.raises(ValueError, match="`choices`"):
        read(flat(0, choices=options))


def test_options_and_choices_that_differ_are_refused():
    assert read(flat(0, choices=COLOURS, options=LETTERS))["options"] == COLOURS
    with pytest.raises(ValueError, match="`options` and `choices` differ"):
        read(flat(0, choices=COLOURS, options=COLOURS[:2]))


@pytest.mark.parametrize("name, value", [("answer_idx", "B"), ("correct_choice_idx", 1), ("Correct Answer", "red")])
def test_another_field_with_the_answer_is_it_or_must_agree_with_it(name, value):
    row = {"question": "What colour?", "options": LETTERS}
    assert read(row | {name: value})["answer"] == read(row | {name: value, "answer": "red"})["answer"] == "red"
    with pytest.raises(ValueError, match=f"`{name}` is {value!r}, but the answer is 'white'"):
        read(row | {name: value, "answer": "white"})


@pytest.mark.parametrize("write", [llava, chat])
def test_turns_keep_their_answer_as_it_is_written(write):
    fields = read(write("user: Which? A. white B. red", "assistant: B", options=COLOURS))
    assert fields["answer"] == "B" and fields["options"] == COLOURS


# ------------------------------------------------------------------------------------------------------- many answers

MANY = {
    ("pink", "red", "pink"): "pink",
    ("red", "pink", "pink"): "pink",
    ("pink", "red"): "pink",
    ("red", "pink", "pink", "red"): "red",
    ("pink",) * 10: "pink",
    ("red", "Pink", "pink.", "red.", "pink"): "Pink",
}


@pytest.mark.parametrize("texts", MANY, ids=len)
def test_the_most_common_answer_is_trained_the_first_of_equals_and_all_are_kept(texts):
    asked, answers = {"question": "What colour?"}, list(texts)
    as_objects = [{"answer": text, "answer_id": n, "answer_confidence": "yes"} for n, text in enumerate(answers, 1)]
    rows = [{"answers": answers}, {"answers": as_objects}, {"answer": answers}, {"Answers": json.dumps(answers)}]
    for row in rows:
        fields = read(asked | row)
        assert (fields["answer"], fields["answers"]) == (MANY[texts], answers)


def test_an_answer_of_its_own_is_trained_and_scored_against_all():
    fields = read(flat("red", answers=["pink", "pink", "Red"]))
    assert (fields["answer"], fields["answers"]) == ("red", ["pink", "pink", "Red"])
    with pytest.raises(ValueError, match="the answer 'green' is none of the row's `answers`"):
        read(flat("green", answers=["pink", "red"]))
    vqa = {"answers": ["red", "pink", "pink"], "multiple_choice_answer": "pink"}
    assert read({"question": "What colour?"} | vqa)["answer"] == "pink"


def test_numbers_are_accepted_answers():
    assert read({"question": "How many?", "answers": [2, "two", 2]}) | {"id": 0} == {
        "id": 0, "question": "How many?", "answer": "2", "answers": ["2", "two", "2"]
    }  # fmt: skip


@pytest.mark.parametrize("write", [llava, chat])
def test_turns_are_scored_against_the_answers_beside_them(write):
    fields = read(write("user: What colour?", "assistant: It is red.", answers=["red", "It is red."]))
    assert fields["answer"] == "It is red." and fields["answers"] == ["red", "It is red."]


def test_lists_as_python_prints_them_are_refused_by_name():
    for name in ("answers", "options"):
        with pytest.raises(ValueError, match=f"`{name}` is a list as Python prints it: write it as JSON"):
            read({"question": "What colour?", "answer": "red", name: "['red', 'pink']"})


@pytest.mark.parametrize("answers", [[], [7, {}], {}, "", [{"text": "red"}], [" "], [["red"]], [None], [True], "[1, "])
def test_answers_of_another_kind_are_refused(answers):
    with pytest.raises(ValueError, match="answer"):
        read({"question": "What colour?", "answers": answers})
