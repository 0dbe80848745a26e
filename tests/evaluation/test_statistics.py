"""Statistics against values worked out by hand and by simulation."""

import math

import numpy as np
import pytest

from evaluation import statistics


def test_the_interval_is_over_images_not_over_questions():
    """100 images of 9 questions each, all right or all wrong: the interval of 0.5 over 100 images is 0.4 to 0.6."""
    values, groups = [float(i % 2) for i in range(100) for _ in range(9)], [i for i in range(100) for _ in range(9)]
    interval = statistics.mean_with_interval(values, groups)
    assert interval["mean"] == 0.5 and interval["questions"] == 900
    assert interval["low"] == pytest.approx(0.4, abs=0.02) and interval["high"] == pytest.approx(0.6, abs=0.02)
    alone = statistics.mean_with_interval(values, list(range(900)))
    assert alone["high"] - alone["low"] == pytest.approx(2 * 1.96 * 0.5 / 30, abs=0.01)


def test_the_interval_of_single_questions_is_newcombe_s():
    """Newcombe 1998, table I, method 4: 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
    published = {
        (81, 263): (0.2535, 0.3682),
        (15, 148): (0.0598, 0.1644),
        (0, 20): (0, 0.2005),
        (1, 29): (0.0018, 0.1963),
    }
    for (right, questions), (low, high) in published.items():
        interval = statistics.mean_with_interval([1] * right + [0] * (questions - right), list(range(questions)))
        assert interval["low"] == pytest.approx(low, abs=1e-4) and interval["high"] == pytest.approx(high, abs=1e-4)


def test_scores_that_are_all_equal_are_not_certain():
    assert statistics.mean_with_interval([1.0] * 20, list(range(20)))["low"] == pytest.approx(1 - 0.2005, abs=1e-4)
    for values in ([1.0], [0.0], [1.0] * 17, [0.4]):
        interval = statistics.mean_with_interval(values, ["image"] * len(values))
        assert interval["low"] < 0.21 or values[0] == 1.0
        assert 0 <= interval["low"] <= values[0] <= interval["high"] <= 1 and interval["high"] - interval["low"] > 0.5
    difference = statistics.difference_with_interval([0.0] * 20, list(range(20)))
    assert -0.3 < difference["low"] < -0.15 and 0.15 < difference["high"] < 0.3


# Images, questions per image (0: from 1 to 17, -1: 17 for every fifth and else 1), accuracy, and how alike the answers
# about an image are.
HARD = [
    (10, 1, 0.99, 0.0),
    (10, 9, 0.99, 0.6),
    (20, 0, 0.9, 1.0),
    (30, 0, 0.95, 0.6),
    (50, 17, 0.5, 0.3),
    (20, -1, 0.5, 1.0),
    (300, 2, 0.8, 0.1),
]


def groups_of(generator, images: int, questions: int) -> np.ndarray:
    mixed = {0: generator.choice([1, 8, 9, 12, 17], images), -1: np.where(np.arange(images) % 5, 1, 17)}
    return np.repeat(np.arange(images), mixed.get(questions, np.full(images, questions)))


def draw(generator, groups: np.ndarray, accuracy: float, alike: float) -> np.ndarray:
    """Right and wrong answers (1, 0) whose correlation within an image is `alike`."""
    images = groups[-1] + 1
    both = np.array([accuracy, 1 - accuracy]) * (1 / max(alike, 1e-9) - 1)
    level = generator.beta(*both, images) if alike < 1 else (generator.random(images) < accuracy).astype(float)
    return (generator.random(len(groups)) < level[groups]).astype(float)


@pytest.mark.parametrize("cell", HARD, ids=str)
def test_the_interval_covers_the_truth_93_times_in_100(cell):
    images, questions, accuracy, alike = cell
    generator, hits, trials = np.random.default_rng(0), 0, 300
    for _ in range(trials):
        groups = groups_of(generator, images, questions)
        interval = statistics.mean_with_interval(draw(generator, groups, accuracy, alike).tolist(), groups.tolist())
        hits += interval["low"] <= accuracy <= interval["high"]
    assert hits / trials >= 0.93


@pytest.mark.parametrize("cell", HARD, ids=str)
def test_the_interval_of_a_difference_covers_the_truth_93_times_in_100(cell):
    """Of two models of the same accuracy that know nothing of each other, and of two that agree on nine in ten."""
    images, questions, accuracy, alike = cell
    generator, hits, trials = np.random.default_rng(0), np.zeros(2), 200
    for _ in range(trials):
        groups = groups_of(generator, images, questions)
        a, b = (draw(generator, groups, accuracy, alike) for _ in range(2))
        mostly_a = np.where(generator.random(len(a)) < 0.1, b, a)
        for number, other in enumerate((b, mostly_a)):
            interval = statistics.difference_with_interval((other - a).tolist(), groups.tolist())
            hits[number] += interval["low"] <= 0 <= interval["high"]
    assert min(hits) / trials >= 0.93


def test_mcnemar():
    assert statistics.mcnemar(0, 0) == 1 and statistics.mcnemar(5, 5) == 1
    assert statistics.mcnemar(1, 9) == pytest.approx(2 * 11 / 1024)
    assert statistics.mcnemar(9, 1) == statistics.mcnemar(1, 9) and statistics.mcnemar(1000, 1200) == pytest.approx(
        2.2e-5, rel=0.1
    )


def test_auroc_and_calibration():
    assert statistics.auroc([0.1, 0.4, 0.35, 0.8], [False, False, True, True]) == 0.75
    assert statistics.auroc([0.5, 0.5], [True, False]) == 0.5 and math.isnan(statistics.auroc([0.5], [True]))
    assert statistics.calibration_error([0.95, 0.95, 0.15, 0.15], [True, True, False, False]) == pytest.approx(0.1)
    assert statistics.calibration_error([1.0, 1.0], [True, False]) == pytest.approx(0.5)
