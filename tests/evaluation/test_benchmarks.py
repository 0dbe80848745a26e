"""Scores of benchmarks against values worked out by hand from the rules of their own scripts."""

import pytest

from evaluation.benchmarks import anls, levenshtein, relaxed_accuracy, vqa_accuracy


@pytest.mark.parametrize(("matches", "expected"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (9, 1), (10, 1)])
def test_vqa_accuracy_is_averaged_over_nine_of_ten_answers(matches, expected):
    answers = ["red"] * matches + [f"other {i}" for i in range(10 - matches)]
    assert vqa_accuracy("red", answers) == pytest.approx(expected)


def test_vqa_accuracy_of_fewer_answers():
    assert vqa_accuracy("a b", ["a b"] * 4) == 1 and vqa_accuracy("x", ["y"]) == 0
    assert vqa_accuracy("x", ["x", "x", "y"]) == pytest.approx((1 / 3 + 1 / 3 + 2 / 3) / 3)


@pytest.mark.parametrize(
    ("prediction", "answer"),
    [
        ("The Two dogs", "2 dogs"),
        ("none", "0"),
        ("dont know", "don't know"),
        ("yes.", "yes"),
        ("3.5", "3.5"),
        ("1,000", "1000"),
        ("t-shirt", "t shirt"),
        ("what ?", "what"),
        ("red,  blue", "red blue"),
    ],
)
def test_vqa_accuracy_treats_texts_as_its_script_does(prediction, answer):
    assert vqa_accuracy(prediction, [answer] * 9 + ["another"]) == 1
    assert vqa_accuracy(prediction, [answer] * 10) == (prediction == answer)  # where all agree, as they are


@pytest.mark.parametrize(
    ("a", "b", "distance"), [("", "", 0), ("", "ab", 2), ("kitten", "sitting", 3), ("ab", "ba", 2)]
)
def test_levenshtein_distance(a, b, distance):
    assert levenshtein(a, b) == levenshtein(b, a) == distance


def test_anls_is_the_similarity_to_the_nearest_answer_from_a_half():
    assert anls(" Denver  broncos", ["Denver Broncos", "Broncos"]) == 1 and anls("", [""]) == 1
    assert anls("12/15/89", ["12/15/88"]) == pytest.approx(7 / 8)
    assert anls("abcd", ["abxy"]) == 0.5 and anls("abcd", ["axyz"]) == 0
    assert anls("dr. lobo", ["Dear Dr. Lobo", "Mr. Wolf"]) == pytest.approx(8 / 13)
    assert anls("yes " * 300, ["yes"]) == 0


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("105", "100", 1),
        ("106", "100", 0),
        ("-95", "-100", 1),
        ("5%", "0.05", 1),
        ("5.2%", "5%", 1),
        ("0", "0", 1),
        ("0.0", "0", 0),
        ("Blue", "blue", 1),
        ("blue.", "blue", 0),
        ("nan", "nan", 1),
    ],
)
def test_relaxed_accuracy_allows_five_percent(prediction, answer, expected):
    assert relaxed_accuracy(prediction, [answer]) == expected
    assert relaxed_accuracy(prediction, ["another", answer]) == expected
