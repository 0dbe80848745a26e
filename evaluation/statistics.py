"""Statistics over many answers: how certain a mean is, how two models differ, how well confidences are calibrated.

Questions about the same image are not independent, so whole images are resampled.
"""

import math

import numpy as np

BINS = 10  # of confidence


def mean_with_interval(values: list[float], groups: list, draws: int = 2000, seed: int = 0) -> dict:
    """Mean over answers, and its 95% confidence interval: percentiles of the means of `draws` resamples of whole groups
    (images). Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapters 8 and 13."""
    names = {name: number for number, name in enumerate(dict.fromkeys(groups))}
    index = np.array([names[name] for name in groups])
    sums, counts = np.bincount(index, values), np.bincount(index)
    drawn = np.random.default_rng(seed).integers(len(names), size=(draws, len(names)))
    low, high = np.percentile(sums[drawn].sum(1) / counts[drawn].sum(1), [2.5, 97.5])
    return {"mean": float(np.mean(values)), "low": float(low), "high": float(high), "questions": len(values)}


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided exact p-value of McNemar's test, given the numbers of questions that only one of two models got right:
    twice the tail of a binomial distribution with probability 1/2, at most 1. McNemar, Psychometrika 12, 1947."""
    n, k = only_a + only_b, min(only_a, only_b)
    tail = sum(math.comb(n, i) for i in range(k + 1))
    return min(1.0, float(2 * tail / 2**n)) if n else 1.0


def auroc(scores: list[float], positive: list[bool]) -> float:
    """Area under the ROC curve: the share of pairs in which a positive scores above a negative; a tie counts half. NaN
    without positives or without negatives."""
    yes, no = ([s for s, p in zip(scores, positive) if p is kind] for kind in (True, False))
    if not yes or not no:
        return math.nan
    order = np.sort(no)
    below, up_to = (np.searchsorted(order, yes, side=side) for side in ("left", "right"))
    return float((below + up_to).mean() / 2 / len(no))


def calibration_bins(confidences: list[float], right: list[bool]) -> list[dict]:
    """Of each of BINS equal ranges of confidence that has answers: its `low` end, the number of `questions`, and their
    mean `confidence` and `accuracy`. A confidence of 1 belongs to the last range."""
    confidences, right = np.asarray(confidences), np.asarray(right, float)
    numbers, bins = np.minimum((confidences * BINS).astype(int), BINS - 1), []
    for number in np.unique(numbers).tolist():
        inside = numbers == number
        means = {"confidence": float(confidences[inside].mean()), "accuracy": float(right[inside].mean())}
        bins.append({"low": number / BINS, "questions": int(inside.sum()), **means})
    return bins


def calibration_error(confidences: list[float], right: list[bool]) -> float:
    """Expected calibration error: the mean of |accuracy - confidence| over bins of confidence, weighted by their
    numbers of answers. Guo et al., On Calibration of Modern Neural Networks, 2017."""
    bins = calibration_bins(confidences, right)
    return sum(b["questions"] * abs(b["accuracy"] - b["confidence"]) for b in bins) / len(right)
