"""Scores against values worked out by hand."""

import math
from collections import Counter

import pytest

from evaluation import scores


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("Yes.", "yes"),
        ("two polyps", "2 polyps"),
        (" The  polyp ", "a polyp"),
        ("ＹＥＳ", "yes"),
        ("red, white", "Red white"),
        (".5 cm", "0.5 cm"),
        ("“yes”", "yes"),
        ("是。", "是"),
        ("(5mm).", "5mm"),
    ],
)
def test_answers_that_are_the_same(left, right):
    assert scores.normalize(left) == scores.normalize(right)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("yes", "no"),
        ("<5mm", "5mm"),
        (">20mm", "<20mm"),
        ("5-10mm", "5 10mm"),
        ("10%", "10"),
        ("", "A"),
        ("the", "a"),
        (".5 cm", "5 cm"),
        ("$.50", "$50"),
    ]
    + [("#", "*"), ("", "?")],
)
def test_answers_that_differ(left, right):
    assert scores.normalize(left) != scores.normalize(right)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5", (5, 5, "")),
        ("five", (5, 5, "")),
        ("5.5 mm", (5.5, 5.5, "mm")),
        ("2 cm", (20, 20, "mm")),
        (".5", (0.5, 0.5, "")),
        ("11-20mm", (11, 20, "mm")),
        ("11mm to 20 mm", (11, 20, "mm")),
        ("1-2cm", (10, 20, "mm")),
        ("<5mm", (0, 5, "mm")),
        (">20mm", (20, math.inf, "mm")),
        ("30%", (30, 30, "%")),
        ("5mm-2%", None),
        ("yes", None),
        ("", None),
        ("3 polyps", None),
    ],
)
def test_quantities(text, expected):
    quantity = scores.parse_quantity(text)
    assert (quantity and (quantity.low, quantity.high, quantity.unit)) == expected


@pytest.mark.parametrize(
    ("prediction", "truth", "expected"),
    [
        ("100", "102", True),
        ("100", "106", False),
        ("11-20 mm", "11-20mm", True),
        ("15mm", "11-20mm", False),
        ("1.1-2cm", "11-20mm", True),
        (">20mm", "> 20 mm", True),
        ("25mm", ">20mm", False),
        ("20", "20mm", False),
        ("many", "3", False),
        ("3", "many", None),
        ("0", "0", True),
    ],
)
def test_quantities_match_within_the_tolerance(prediction, truth, expected):
    assert scores.quantities_match(prediction, truth, 0.05) is expected


def test_f1_of_tokens_and_of_parts():
    assert scores.f1(Counter("ab"), Counter("bc")) == 0.5
    assert scores.f1(Counter(), Counter()) == 1 and scores.f1(Counter(), Counter("a")) == 0
    assert scores.f1(Counter("aab"), Counter("ab")) == pytest.approx(0.8)  # precision 2/3, recall 1
    assert scores.score_answer("Red; pink", "pink; red; white", 0.05) == {
        "exact_match": 0.0,
        "token_f1": pytest.approx(0.8),
        "set_f1": pytest.approx(0.8),
        "set_match": 0.0,
    }
    assert scores.score_answer("white; red; pink", "pink; red; white", 0.05)["set_match"] == 1
    assert scores.score_answer("5 mm", "5mm", 0.05)["numeric"] == 1 and "numeric" not in scores.score_answer(
        "a", "b", 0.05
    )


@pytest.mark.parametrize(
    ("question", "answer", "kind"),
    [
        ("Is there text?", "No.", "yes/no"),
        ("How many polyps?", "2", "count"),
        ("What is the size of the polyp?", "<5mm", "size"),
        ("What color is it?", "red", "colour"),
        ("Where is the polyp?", "upper left", "location"),
        ("Is it a polyp or a snare?", "a polyp", "choice"),
        ("What is this?", "a polyp", "open"),
    ],
)
def test_question_types(question, answer, kind):
    assert scores.question_type({"question": question, "answer": answer}) == kind
    assert scores.question_type({"question": question, "answer": answer, "question_type": "own"}) == "own"


def test_confusion_and_balanced_accuracy():
    table = scores.confusion(["yes", "Yes", "no", "maybe"], ["yes", "no", "no", "no"])
    assert table == {"no": {"yes": 1, "no": 1, "(other)": 1}, "yes": {"yes": 1}}
    assert scores.balanced_accuracy(table) == pytest.approx((1 / 3 + 1) / 2)
    table = scores.confusion(["banana", "yes"], ["other", "yes"])
    assert scores.balanced_accuracy(table) == 0.5


def test_closed_sets_are_questions_with_few_answers():
    pairs = [
        ("text?", "yes"),
        ("text?", "No"),
        ("text?", "no."),
        ("text?", "no."),
        ("where?", "a b"),
        ("alone?", "yes"),
    ]
    pairs += [("where?", str(n)) for n in range(5)]
    rows = [{"question": question, "answer": answer} for question, answer in pairs]
    assert scores.closed_sets(rows, 3) == {"text?": ["no.", "yes"]}
    assert set(scores.closed_sets(rows, 6)) == {"text?", "where?"} and scores.closed_sets(rows, 0) == {}


def test_options_are_scored_by_the_likeliest_and_by_yes_against_no():
    def line(answer: str, **options: float) -> dict:
        return {"answer": answer, "options": options, "option": max(options, key=options.get)}

    lines = [line("yes", yes=0.6, no=0.1, unclear=0.3), line("no", yes=0.5, no=0.4, unclear=0.1)]
    lines += [line("no", yes=0.1, no=0.9), line("unclear", yes=0.1, no=0.1, unclear=0.8)]
    result = scores.score_options(lines, ["a", "b", "c", "c"])
    assert result["top1"]["mean"] == 0.75 and result["calibration_error"] == pytest.approx((0.4 + 0.5 + 0.1 + 0.2) / 4)
    assert result["yes/no"]["auroc"] == 1 and result["yes/no"]["questions"] == 3
    of_yes_and_no = (1 - 0.6 / 0.7) + 0.5 / 0.9 + 0.1  # the second is wrong
    assert result["yes/no"]["calibration_error"] == pytest.approx(of_yes_and_no / 3)
    assert "yes/no" not in scores.score_options(lines[2:], ["c", "c"])


def test_bleu_is_that_of_sacrebleu():
    right = [{"prediction": "the polyp is in the upper left", "answer": "the polyp is in the upper left"}]
    wrong = [{"prediction": "a polyp is at the lower left", "answer": "the polyp is in the upper left"}]
    result = scores.bleu(right)
    assert result["score"] == pytest.approx(100) and "version" in result["signature"]
    assert scores.bleu(wrong)["score"] < scores.bleu(right + wrong)["score"] < 100


def test_rows_without_a_picture_are_independent_and_folders_distinguish_pictures():
    def low(images):
        one = {"question": "?", "answer": "yes", "question_type": "yes/no", "loss": 1.0, "answer_tokens": 1}
        rows = [
            one | {"where": f"{i}", "images": images(i), "prediction": "yes" if i % 2 else "no", "teacher_forced": 1}
            for i in range(100)
        ]
        return scores.summarize([row | {"confidence": 0.5, "right": True} for row in rows], 0.05)["all"]["exact_match"]

    assert low(lambda i: []) == low(lambda i: [f"{i}.png"]) == low(lambda i: [f"{i}/a.png"])
    assert low(lambda i: ["a.png"])["low"] == 0.5
