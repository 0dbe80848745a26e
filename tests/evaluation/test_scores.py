"""Scores against values worked out by hand."""

import math
from collections import Counter

import pytest

from common import InputError
from evaluation import scores
from evaluation.normalization import parse_quantity, quantities_match
from training.eval_settings import parse

SAME = [
    ("Yes.", "yes"),
    ("two polyps", "2 polyps"),
    ("five mm", "5mm"),
    ("ＹＥＳ", "yes"),
    ("“yes”", "yes"),
    ("yes—", "yes"),
    ("ye\u200bs", "yes"),
    ("don’t know", "don't know"),
    ("是。", "是"),
    ("(5mm).", "5mm"),
    ("No, it is not", "no it is not"),
    ("Red mucosa is seen here, with a polyp", "red mucosa is seen here with polyp"),
]
SAME_WITHOUT_ARTICLES = [
    (" The  polyp ", "a polyp"),
    ("the a polyp", "polyp"),
    ("a 5 mm polyp", "5 mm polyp"),
    ("Vitamin A.", "vitamin a"),
    ("the polyp; a snare", "polyp; snare"),
]
SAME_NUMBERS = [
    (".5 cm", "0.5 cm"),
    ("-.5", "-0.5"),
    ("11-20mm", "11-20 mm"),
    ("11–20 mm", "11-20mm"),
    ("11 mm – 20 mm", "11mm-20mm"),
    ("11- 20 mm", "11-20mm"),
    ("37 °C", "37°C"),
    ("37 ºC", "37℃"),
    ("−5", "-5"),
    ("–5", "-5"),
    ("5 %", "5％"),
    ("≥ 5", ">=5"),
    ("≤5 mm", "<= 5mm"),
    ("1,000", "1000"),
    ("1,234,567.5", "1234567.5"),
    ("10²", "10^2"),
    ("10⁻³", "10^-3"),
    ("5 cm²", "5cm^2"),
    ("5㎜", "5 mm"),
    ("a 5-mm polyp", "5 mm polyp"),
    ("5 × 3 mm", "5x3mm"),
    ("H₂O", "H2O"),
    ("1½", "1 1/2"),
]
SAME_PARTS = [
    ("pink; red", "red;pink"),
    ("pink, red", "pink; red"),
    ("Pink,red", "red, pink"),
    ("the upper left, a polyp snare", "polyp snare; upper left"),
    ("B, A", "A, B"),
    ("pink; ;red;", "red; pink"),
    ("red; pink; Red", "pink; red"),
    ("粉色、红色", "红色；粉色"),
]


@pytest.mark.parametrize(("left", "right"), SAME + SAME_WITHOUT_ARTICLES + SAME_NUMBERS + SAME_PARTS)
def test_answers_that_are_the_same(left, right):
    assert scores.normalize(left) == scores.normalize(right)


DIFFERENT = [("yes", "no"), ("", "A"), ("the", "a"), ("#", "*"), ("", "?"), ("à", "a"), ("der Rand", "Rand")]
LETTERS_THAT_ARE_NO_ARTICLES = [
    ("A, B", "B"),
    ("A B", "B"),
    ("A and B", "and B"),
    ("A) polyp", "polyp"),
    ("Vitamin A", "vitamin"),
    ("vitamin A deficiency", "vitamin deficiency"),
    ("hepatitis A", "hepatitis"),
    ("Type A", "type"),
]
DIFFERENT_NUMBERS = [
    ("<5mm", "5mm"),
    (">20mm", "<20mm"),
    (">=5", ">5"),
    ("5-10mm", "5 10mm"),
    ("10%", "10"),
    ("-5", "5"),
    (".5 cm", "5 cm"),
    ("$.50", "$50"),
    ("1,5", "15"),
    ("1,5", "1.5"),
    ("10²", "102"),
    ("1½", "11/2"),
    ("1①", "11"),
    ("log₂8", "log28"),
    ("[1,200]", "[1200]"),
]
DIFFERENT_PARTS = [
    ("pink; red", "pink"),
    ("pink; red", "pink red"),
    ("0.3, 0.5", "0.5, 0.3"),
    ("[up, down]", "[down, up]"),
    ("left, pink; right, red", "left, red; right, pink"),
]


@pytest.mark.parametrize(
    ("left", "right"), DIFFERENT + LETTERS_THAT_ARE_NO_ARTICLES + DIFFERENT_NUMBERS + DIFFERENT_PARTS
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
        ("1,000", (1000, 1000, "")),
        ("≥ 5 mm", (5, math.inf, "mm")),
        ("11 – 20 mm", (11, 20, "mm")),
        ("5; 10", None),
        ("1, 2, 3", None),
        ("0571 1234", None),
        ("5mm-2%", None),
        ("yes", None),
        ("", None),
        ("3 polyps", None),
    ],
)
def test_quantities(text, expected):
    quantity = parse_quantity(text)
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
    assert quantities_match(prediction, truth, 0.05) is expected


def test_a_tolerance_in_percent_is_refused():
    with pytest.raises(InputError, match="--numeric-tolerance: must be from 0 to 1, not 5"):
        parse(["--numeric-tolerance=5"])


def test_f1_of_tokens_and_of_parts():
    assert scores.f1(Counter("ab"), Counter("bc")) == 0.5
    assert scores.f1(Counter(), Counter()) == 1 and scores.f1(Counter(), Counter("a")) == 0
    assert scores.f1(Counter("aab"), Counter("ab")) == pytest.approx(0.8)  # precision 2/3, recall 1
    assert score("Red; pink", "pink; red; white") == {
        "exact_match": 0.0,
        "token_f1": pytest.approx(0.8),
        "set_f1": pytest.approx(0.8),
        "set_match": 0.0,
    }
    assert score("5 mm", "5mm")["numeric"] == 1 and "numeric" not in score("a", "b")


def score(prediction: str, *answers: str) -> dict:
    return scores.score_answer(prediction, list(answers), 0.05)


@pytest.mark.parametrize(
    "prediction", ["white, red, pink", "pink;red;white", "red; pink; a white", "red; pink; white; red"]
)
def test_parts_are_right_in_any_order(prediction):
    result = score(prediction, "pink; red; white")
    assert result["exact_match"] == result["set_match"] == result["set_f1"] == 1


@pytest.mark.parametrize("prediction", ["red", "pink red white", "pink; red; white; blue", "No, it is not"])
def test_set_scores_agree_with_exact_match(prediction):
    result = score(prediction, "pink; red; white")
    assert result["exact_match"] == result["set_match"] == 0 and result["set_f1"] < 1


def test_the_best_of_several_accepted_answers_counts():
    assert score("two", "many", "2")["exact_match"] == 1 and "numeric" not in score("two", "many", "2")
    assert score("10.2", "3", "10") == {"exact_match": 0, "token_f1": 0, "numeric": 1}
    assert score("red; pink", "pink; white", "pink; red")["set_match"] == 1
    assert score("upper left", "left", "upper right")["token_f1"] == pytest.approx(2 / 3)


def kinds(question: str, *answers: str, own: str | int | None = None) -> list[str]:
    return scores.question_types([{"question": question, "answer": answer, "question_type": own} for answer in answers])


@pytest.mark.parametrize(
    ("question", "answers", "kind"),
    [
        ("Is there text?", ["No."], "yes/no"),
        ("Have all polyps been removed?", ["yes", "no", "not relevant", "not relevant", "not relevant"], "yes/no"),
        ("Have all polyps been removed?", ["not relevant"], "yes/no"),
        ("Is there a box or text?", ["yes", "unclear"], "yes/no"),
        ("Does the number of polyps exceed 2?", ["Yes, it does", "No, there are two"], "yes/no"),
        ("Text visible?", ["yes", "no", "none"], "yes/no"),
        ("Are there abnormalities? Check all.", ["polyp", "none"], "open"),
        ("How many polyps?", ["2", "no", "no"], "count"),
        ("What is the number of tools?", ["2"], "count"),
        ("What is the size of the polyp?", ["<5mm"], "size"),
        ("Is it oversized for the tube?", ["slightly"], "open"),
        ("What color is it?", ["red"], "colour"),
        ("What discoloration is seen?", ["none"], "open"),
        ("Where is the polyp?", ["upper left"], "location"),
        ("Is it a polyp or a snare?", ["a polyp", "snare"], "choice"),
        ("Which is larger, A or B?", ["A", "B"], "choice"),
        ("What landmark or finding is seen?", ["z-line", "none"], "open"),
        ("What is this?", ["a polyp"], "open"),
    ],
)
def test_a_question_has_one_type_in_a_file(question, answers, kind):
    assert kinds(question, *answers) == [kind] * len(answers)
    assert kinds(question, *answers, own="own") == ["own"] * len(answers)
    assert kinds(question, *answers, own=0) == ["0"] * len(answers)


def test_rows_that_spell_a_question_otherwise_share_its_type():
    rows = [{"question": "Have all polyps been removed?", "answer": "not relevant"}]
    assert (
        scores.question_types([*rows, {"question": "have all polyps  been removed?", "answer": "no"}]) == ["yes/no"] * 2
    )


def lines(pairs: list[tuple[str, str]], **fields) -> list[dict]:
    """Lines of predictions.jsonl, each on a picture of its own, of (prediction, answer)."""
    common = {"question": "?", "question_type": "open", "loss": 1.0, "answer_tokens": 1, "teacher_forced": False}
    return [
        common | {"id": i, "where": f"{i}", "images": [f"{i}.png"], "prediction": prediction, "answer": answer} | fields
        for i, (prediction, answer) in enumerate(pairs)
    ]


def test_confusion_and_balanced_accuracy():
    table = scores.confusion(lines([("yes", "yes"), ("Yes", "no"), ("no", "no"), ("maybe", "no")]))
    assert table == {"no": {"yes": 1, "no": 1, "(other)": 1}, "yes": {"yes": 1}}
    assert scores.balanced_accuracy(table) == pytest.approx((1 / 3 + 1) / 2)
    table = scores.confusion(lines([("banana", "other"), ("yes", "yes")]))
    assert scores.balanced_accuracy(table) == 0.5


def test_confusion_names_parts_with_their_separators_once_per_set():
    table = scores.confusion(lines([("red, pink", "pink; red"), ("pink", "red; pink"), ("red", "red")]))
    assert table == {"pink; red": {"pink; red": 1, "(other)": 1}, "red": {"red": 1}}
    assert scores.confusion(lines([("two", "many"), ("0", "0")], answers=["2"])) == {"0": {"0": 1}, "many": {"many": 1}}


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


def test_options_are_compared_as_they_are_spelled():
    def right(option: str, answer: str, *options: str) -> float:
        line = {"answer": answer, "option": option, "options": dict.fromkeys(options, 0.5)}
        return scores.score_options([line], ["a"])["top1"]["mean"]

    assert right("the polyp", "a polyp", "a polyp", "the polyp") == 0 and right("10²", "10²", "10²", "102") == 1
    assert right("a; b", "b; a", "a; b", "b; a") == 0
    assert right("no.", "No", "no.", "yes") == 1  # options of a closed set are spelled as most rows spell them


def test_the_summary_has_scores_of_benchmarks_and_how_far_teacher_forcing_is_off_on_parts():
    pairs = [("red; pink", "pink; red"), ("pink", "pink; red"), ("pink; red", "pink; red"), ("red", "red")]
    rows = lines(pairs, answers=["pink; red", "red"])
    rows[2]["teacher_forced"] = True
    summary = scores.summarize(rows, 0.05)
    assert {"vqa_accuracy", "anls", "relaxed_accuracy"} <= summary["all"].keys() & summary["by_type"]["open"].keys()
    assert summary["by_question"]["?"].keys() == {"exact_match", "token_f1", "set_f1", "set_match"}
    forced = summary["teacher_forced"]
    assert forced["exact_match"]["mean"] == 0.25
    assert forced["in_parts"]["mean"] == pytest.approx(2 / 3 - 1 / 3) and forced["in_parts"]["questions"] == 3
    plain = scores.summarize(lines([("red", "red")]), 0.05)
    assert plain["all"].keys() == {"exact_match", "token_f1", "strict_match", "relaxed_accuracy", "rouge_l"}
    assert "in_parts" not in plain["teacher_forced"]


def test_files_written_by_an_older_rule_are_compared_by_the_new_one():
    old = lines([("red; pink", "pink; red"), ("2", "many")], right=False)
    new = lines([("pink", "pink; red"), ("2", "many")], right=True)
    new[1]["answers"] = ["many", "two"]
    result = scores.compare(old, new)
    assert (result["only_a"], result["only_b"]) == (["0 0"], [])


def test_a_comparison_of_other_rows_names_the_first_that_differs():
    both = lines([("red", "red"), ("2", "many")])
    with pytest.raises(ValueError, match=r"have 2 and 1, and '1 1' \(file, line and id\) is only in the first"):
        scores.compare(both, both[:1])
    with pytest.raises(ValueError, match="have 1 and 2, .* is only in the second"):
        scores.compare(both[:1], both)
    with pytest.raises(ValueError, match="have 2 and 2, and '0 0' .* has two answers"):
        scores.compare(both, [both[0] | {"answer": "blue"}, both[1]])


def test_rows_without_a_picture_are_independent_and_folders_distinguish_pictures():
    def low(images):
        one = {"question": "?", "answer": "yes", "question_type": "yes/no", "loss": 1.0, "answer_tokens": 1}
        rows = [
            one | {"where": f"{i}", "images": images(i), "prediction": "yes" if i % 2 else "no", "teacher_forced": 1}
            for i in range(100)
        ]
        return scores.summarize([row | {"confidence": 0.5, "right": True} for row in rows], 0.05)["all"]["exact_match"]

    assert low(lambda i: []) == low(lambda i: [f"{i}.png"]) == low(lambda i: [f"{i}/a.png"])
    assert low(lambda i: ["a.png"])["low"] < 0.1  # one picture says little
