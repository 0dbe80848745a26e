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


def test_the_interval_covers_the_truth_95_times_in_100():
    generator, hits = np.random.default_rng(0), 0
    for trial in range(200):
        level = generator.beta(2, 2, size=60)  # of each image
        values = (generator.random((60, 5)) < level[:, None]).astype(float).ravel().tolist()
        interval = statistics.mean_with_interval(
            values, [i for i in range(60) for _ in range(5)], draws=300, seed=trial
        )
        hits += interval["low"] <= 0.5 <= interval["high"]
    assert 180 <= hits <= 199


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
