"""Statistics over many answers: how certain a mean is, how two models differ, how well confidences are calibrated.

Questions about the same image are not independent, so intervals count how alike their scores are.
"""

import math
from statistics import NormalDist

import numpy as np

BINS = 10  # of confidence
Z = NormalDist().inv_cdf(0.975)  # of a 95% interval
# Groups of the rarer kind that the prior design effect counts as: with 2, coverage stays at 93% or more
# (bench/intervals.py).
PRIOR_GROUPS = 2


def mean_with_interval(values: list[float], groups: list) -> dict:
    """Mean of scores from 0 to 1, and its 95% confidence interval, given the group (images) of each."""
    sums, counts = _by_group(values, groups)
    low, high = score_interval(sums, counts)
    return {"mean": float(np.mean(values)), "low": low, "high": high, "questions": len(values)}


def difference_with_interval(differences: list[float], groups: list) -> dict:
    """Mean of paired differences from -1 to 1, and its 95% confidence interval.

    What was won and what was lost are two means with intervals of their own. These are combined as Newcombe does it for
    paired proportions (Statistics in Medicine 17, 1998, 2635-2650, method 10), with the correlation over groups.
    """
    values = np.asarray(differences, float)
    (won, counts), (lost, _) = (_by_group(np.maximum(part, 0), groups) for part in (values, -values))
    gain, loss, total = won.sum() / counts.sum(), lost.sum() / counts.sum(), counts.sum()
    (won_low, won_high), (lost_low, lost_high) = score_interval(won, counts), score_interval(lost, counts)
    deviations = won - gain * counts, lost - loss * counts
    scale = math.sqrt(deviations[0] @ deviations[0] * (deviations[1] @ deviations[1]))
    correlation = deviations[0] @ deviations[1] / scale if scale else 0.0

    def distance(a: float, b: float) -> float:
        return math.sqrt(max(a * a + b * b - 2 * correlation * a * b, 0.0))

    low = gain - loss - distance(gain - won_low, lost_high - loss)
    high = gain - loss + distance(won_high - gain, loss - lost_low)
    return {"mean": float(values.mean()), "low": max(low, -1.0), "high": min(high, 1.0), "questions": int(total)}


def _by_group(values, groups: list) -> tuple[np.ndarray, np.ndarray]:
    """Each group's sum of values, and its number of them."""
    numbers = {name: number for number, name in enumerate(dict.fromkeys(groups))}
    index = np.array([numbers[name] for name in groups])
    return np.bincount(index, values), np.bincount(index).astype(float)


def score_interval(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """Wilson's score interval with continuity correction (Newcombe, Statistics in Medicine 17, 1998, 857-872, method 4)
    of a mean over groups, for the effective number of answers: their number over the design effect (Kish, Survey
    Sampling, 1965).

    The design effect is estimated from the groups' sums. Few wrong answers say little about how alike those of one
    image are, so the estimate is drawn towards the effect that groups of equal answers would have, and what it exceeds
    1 by is widened as Student's t is for as few groups.
    """
    total, groups = counts.sum(), len(counts)
    mean = sums.sum() / total
    alike = (counts**2).sum() / total  # the design effect where all answers of a group are equal
    spread, independent = ((sums - mean * counts) ** 2).sum() * groups / max(groups - 1, 1), total * mean * (1 - mean)
    # Groups of the rarer kind, with right or with wrong answers: as many of mean size as they are worth.
    informative = min((counts[kind] ** 2).sum() for kind in (sums > 0, sums < counts)) / alike**2
    estimated = spread / independent if independent > 0 else alike
    effect = (informative * estimated + PRIOR_GROUPS * alike) / (informative + PRIOR_GROUPS)
    widened = 1 + (np.clip(effect, 1, alike) - 1) * (_student(max(total / alike - 1, 1.0)) / Z) ** 2
    return _wilson(float(mean), float(total / widened))


def _student(degrees: float) -> float:
    """The quantile of Student's t that belongs to Z (Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.5,
    the first terms)."""
    return Z + (Z**3 + Z) / (4 * degrees) + (5 * Z**5 + 16 * Z**3 + 3 * Z) / (96 * degrees**2)


def _wilson(mean: float, count: float) -> tuple[float, float]:
    def low(mean: float) -> float:
        corrected = max(mean - 0.5 / count, 0.0)
        root = math.sqrt(corrected * (1 - corrected) / count + (Z / count) ** 2 / 4)
        return max((corrected + Z**2 / count / 2 - Z * root) / (1 + Z**2 / count), 0.0)

    return (low(mean) if mean > 0 else 0.0), (1 - low(1 - mean) if mean < 1 else 1.0)


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
