"""Scores of answers: what counts as right, and how sure a mean is. Plain functions on strings and numbers.

Answers are compared after `normalize`. Every mean comes with an interval from a bootstrap over images, because the
questions of one image are not independent of each other.
"""

import math
import re
import string
import unicodedata
from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np

NUMBER_WORDS = {
    word: str(n) for n, word in enumerate("zero one two three four five six seven eight nine ten eleven twelve".split())
}
ARTICLES = {"a", "an", "the"}
MILLIMETRES = {"mm": 1.0, "cm": 10.0, "m": 1000.0}
NUMBER = r"\d+(?:\.\d+)?"
UNIT = r"(mm|cm|m|%|)"
BINS = 10  # of confidence
CLOSED = 10  # different true answers of a question with a confusion table, at most
OTHER = "(other)"  # no normalized answer has such edges


def normalize(text: str) -> str:
    """Unicode NFKC, lower case; no articles; number words up to twelve as digits; punctuation at the edges of words and
    repeated white space don't count."""
    words = unicodedata.normalize("NFKC", text).casefold().split()
    words = [word for word in map(_without_edges, words) if word] or words  # "?" is not ""
    telling = [word for word in words if word not in ARTICLES] or words  # "A" may be a choice
    return " ".join(NUMBER_WORDS.get(word, word) for word in telling)


def _without_edges(word: str) -> str:
    """Without punctuation at both ends, but for what means something next to a number; ".5" is "0.5"."""
    told = [c in "<>%-+" or not (c in string.punctuation or unicodedata.category(c)[0] == "P") for c in word]
    if not any(told):
        return ""
    start, end = told.index(True), len(word) - told[::-1].index(True)
    return ("0." if word[start].isdigit() and word[:start].endswith(".") else "") + word[start:end]


# ---------------------------------------------------------------------------------------------------------- one answer


@dataclass(frozen=True)
class Quantity:
    """A number or a range, lengths in millimetres: "5" is 5 to 5, "<5mm" is 0 to 5, ">20mm" is 20 to infinity."""

    low: float
    high: float
    unit: str  # "mm" for every length, "%" or ""


def parse_quantity(text: str) -> Quantity | None:
    """The quantity that a whole answer stands for; None when it is something else."""
    text = normalize(text).replace(" ", "")
    if found := re.fullmatch(rf"({NUMBER}){UNIT}(?:-|–|to)({NUMBER}){UNIT}", text):
        low, first, high, unit = float(found[1]), found[2], float(found[3]), found[4]
        if first not in ("", unit):
            return None
    elif found := re.fullmatch(rf"(<|>|<=|>=|)({NUMBER}){UNIT}", text):
        sign, value, unit = found[1], float(found[2]), found[3]
        low, high = {"<": (0.0, value), ">": (value, math.inf)}.get(sign[:1], (value, value))
    else:
        return None
    scale = MILLIMETRES.get(unit, 1.0)
    return Quantity(low * scale, high * scale, "mm" if unit in MILLIMETRES else unit)


def quantities_match(prediction: str, truth: str, tolerance: float) -> bool | None:
    """Whether both ends agree to a relative `tolerance`, in the same unit. None when the truth is no quantity."""
    expected, found = parse_quantity(truth), parse_quantity(prediction)
    if expected is None:
        return None
    if found is None or found.unit != expected.unit:
        return False
    ends = ((found.low, expected.low), (found.high, expected.high))
    return all(math.isclose(a, b, rel_tol=0, abs_tol=tolerance * abs(b)) if b < math.inf else a == b for a, b in ends)


def parts(text: str) -> Counter:
    """The parts of an answer such as "pink; red; white", each normalized; a part said twice counts twice."""
    found = (normalize(part) for part in text.split(";"))
    return Counter(part for part in found if part)


def f1(prediction: Counter, truth: Counter) -> float:
    """Harmonic mean of precision and recall of two bags; 1 when both are empty."""
    if not prediction and not truth:
        return 1.0
    return 2 * (prediction & truth).total() / (prediction.total() + truth.total())


def score_answer(prediction: str, truth: str, tolerance: float) -> dict:
    """Every score of one answer, each between 0 and 1. `numeric` and `set_f1` are there only where they apply."""
    exact = normalize(prediction) == normalize(truth)
    scores = {"exact_match": float(exact)}
    scores["token_f1"] = f1(Counter(normalize(prediction).split()), Counter(normalize(truth).split()))
    if (numeric := quantities_match(prediction, truth, tolerance)) is not None:
        scores["numeric"] = float(exact or numeric)
    if len(parts(truth)) > 1:
        scores |= {"set_f1": f1(parts(prediction), parts(truth)), "set_match": float(parts(prediction) == parts(truth))}
    return scores


def question_type(fields: dict) -> str:
    """The row's own `question_type`. Where it has none: yes/no by the answer; then by words of the question count,
    size, colour, location and choice ("... or ...?"); else open."""
    if fields.get("question_type"):
        return str(fields["question_type"])
    if normalize(fields["answer"]) in ("yes", "no"):
        return "yes/no"
    question = f" {normalize(fields['question'])} "
    words = {"how many": "count", "number of": "count", " size": "size", "how large": "size", "how big": "size"}
    words |= {"color": "colour", "colour": "colour", " where ": "location", "location": "location", " or ": "choice"}
    return next((kind for word, kind in words.items() if word in question), "open")


# ------------------------------------------------------------------------------------------------------- many answers


def mean_with_interval(values: list[float], groups: list, draws: int = 2000, seed: int = 0) -> dict:
    """Mean over answers and its 95% interval: percentiles of the means of `draws` samples, with replacement, of whole
    groups (images). Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapters 8 and 13."""
    names = {name: number for number, name in enumerate(dict.fromkeys(groups))}
    index = np.array([names[name] for name in groups])
    sums, counts = np.bincount(index, values), np.bincount(index)
    drawn = np.random.default_rng(seed).integers(len(names), size=(draws, len(names)))
    low, high = np.percentile(sums[drawn].sum(1) / counts[drawn].sum(1), [2.5, 97.5])
    return {"mean": float(np.mean(values)), "low": float(low), "high": float(high), "questions": len(values)}


def confusion(predictions: list[str], truths: list[str]) -> dict[str, dict[str, int]]:
    """Of one closed question: truth -> prediction -> how often; a prediction that is never a truth is OTHER."""
    predictions, truths = [normalize(p) for p in predictions], [normalize(t) for t in truths]
    table = {truth: Counter() for truth in sorted(set(truths))}
    for prediction, truth in zip(predictions, truths):
        table[truth][prediction if prediction in table else OTHER] += 1
    return {truth: dict(row) for truth, row in table.items()}


def balanced_accuracy(table: dict[str, dict[str, int]]) -> float:
    """The mean over truths of the share that was answered right."""
    return float(np.mean([row.get(truth, 0) / sum(row.values()) for truth, row in table.items()]))


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided exact p of McNemar's test, from the questions that only one of two models got right: twice the tail of
    a binomial with probability 1/2, at most 1. McNemar, Psychometrika 12, 1947."""
    n, k = only_a + only_b, min(only_a, only_b)
    tail = sum(math.comb(n, i) for i in range(k + 1))
    return min(1.0, float(2 * tail / 2**n)) if n else 1.0


def auroc(scores: list[float], positive: list[bool]) -> float:
    """Area under the ROC curve: how often a positive scores over a negative, ties counting half. NaN without both."""
    yes, no = ([s for s, p in zip(scores, positive) if p is kind] for kind in (True, False))
    if not yes or not no:
        return math.nan
    order = np.sort(no)
    below, up_to = (np.searchsorted(order, yes, side=side) for side in ("left", "right"))
    return float((below + up_to).mean() / 2 / len(no))


def calibration_bins(confidences: list[float], right: list[bool]) -> list[dict]:
    """Of each of BINS equal ranges of confidence that has answers: its `low` end, how many `questions`, their mean
    `confidence` and `accuracy`. A confidence of 1 is in the last range."""
    confidences, right = np.asarray(confidences), np.asarray(right, float)
    which = np.minimum((confidences * BINS).astype(int), BINS - 1)
    return [
        {
            "low": b / BINS,
            "questions": int((which == b).sum()),
            "confidence": float(confidences[which == b].mean()),
            "accuracy": float(right[which == b].mean()),
        }
        for b in range(BINS)
        if (which == b).any()
    ]


def calibration_error(confidences: list[float], right: list[bool]) -> float:
    """Expected calibration error: the mean, weighted by size, of |accuracy - confidence| over equal bins of confidence.
    Guo et al., On Calibration of Modern Neural Networks, 2017."""
    found = calibration_bins(confidences, right)
    return sum(one["questions"] * abs(one["accuracy"] - one["confidence"]) for one in found) / len(right)


# ------------------------------------------------------------------------------------------------- predictions of a run


def closed_sets(rows: list[dict], at_most: int) -> dict[str, list[str]]:
    """Questions with 2 to `at_most` different answers among rows of question and answer -> those answers, the commonest
    first, each as most rows write it."""
    found = {}
    for row in rows:
        found.setdefault(row["question"], {}).setdefault(normalize(row["answer"]), Counter())[row["answer"]] += 1
    sets = {question: answers for question, answers in found.items() if 2 <= len(answers) <= at_most}
    return {
        question: [written.most_common(1)[0][0] for written in sorted(answers.values(), key=lambda w: -w.total())]
        for question, answers in sets.items()
    }


def score_options(predictions: list[dict], images: list[str]) -> dict:
    """Of predictions with `options` (text: probability): whether the likeliest is right, and how far its probability
    tells; of yes and no among them, the area under the ROC curve of yes against no."""
    right = [normalize(one["option"]) == normalize(one["answer"]) for one in predictions]
    result = {"top1": mean_with_interval(right, images)}
    result["calibration_error"] = calibration_error([one["options"][one["option"]] for one in predictions], right)
    yes, truth = [], []
    for one in predictions:
        share = {normalize(option): p for option, p in one["options"].items()}
        if normalize(one["answer"]) in ("yes", "no") and {"yes", "no"} <= share.keys():
            yes.append(share["yes"] / max(share["yes"] + share["no"], 1e-300))
            truth.append(normalize(one["answer"]) == "yes")
    if len(set(truth)) == 2:
        error = calibration_error([max(p, 1 - p) for p in yes], [(p > 0.5) == t for p, t in zip(yes, truth)])
        result["yes/no"] = {"auroc": auroc(yes, truth), "calibration_error": error, "questions": len(yes)}
    return result


def shown_together(prediction: dict) -> str:
    """What answers that may hang together have in common: their images, or where there is none the row alone."""
    return "|".join(prediction["images"]) or prediction["where"]


def bleu(predictions: list[dict]) -> dict:
    """Corpus BLEU by sacrebleu, with its signature. Raises ModuleNotFoundError where sacrebleu is not installed."""
    from sacrebleu.metrics import BLEU

    metric = BLEU()
    found = metric.corpus_score([one["prediction"] for one in predictions], [[one["answer"] for one in predictions]])
    return {"score": found.score, "signature": str(metric.get_signature())}


def summarize(predictions: list[dict], tolerance: float) -> dict:
    """Every score with its interval: over all answers, by question type and by question text; for each question with at
    most CLOSED different true answers its confusion table. A prediction has images, question, answer, prediction
    and question_type."""
    scored = [score_answer(one["prediction"], one["answer"], tolerance) for one in predictions]
    images = list(map(shown_together, predictions))

    def means(chosen: list[int]) -> dict:
        names = dict.fromkeys(name for i in chosen for name in scored[i])
        found = {name: [i for i in chosen if name in scored[i]] for name in names}
        return {n: mean_with_interval([scored[i][n] for i in at], [images[i] for i in at]) for n, at in found.items()}

    summary = {"all": means(list(range(len(predictions)))), "closed": {}}
    by_question = _alike(predictions, "question")
    summary["by_type"] = {value: means(at) for value, at in _alike(predictions, "question_type").items()}
    summary["by_question"] = {value: means(at) for value, at in by_question.items()}
    for question, at in by_question.items():
        table = confusion([predictions[i]["prediction"] for i in at], [predictions[i]["answer"] for i in at])
        if 1 < len(table) <= CLOSED:
            summary["closed"][question] = {"balanced_accuracy": balanced_accuracy(table), "confusion": table}
    loss = sum(one["loss"] for one in predictions) / sum(one["answer_tokens"] for one in predictions)
    forced = mean_with_interval([one["teacher_forced"] for one in predictions], images)
    summary["teacher_forced"] = {"loss": loss, "exact_match": forced}
    if find_spec("sacrebleu"):
        summary["bleu"] = bleu(predictions)
    if asked := [i for i, one in enumerate(predictions) if "options" in one]:
        summary["options"] = score_options([predictions[i] for i in asked], [images[i] for i in asked])
    return summary


def _alike(predictions: list[dict], field: str) -> dict[str, list[int]]:
    """Which predictions have each value of a field, in the order of values."""
    found = {}
    for i, one in enumerate(predictions):
        found.setdefault(one[field], []).append(i)
    return dict(sorted(found.items()))


def compare(a: list[dict], b: list[dict]) -> dict:
    """Exact match of b less that of a on the same questions, its interval over images, McNemar's p, and which flipped.

    Raises ValueError when the two don't answer the same questions.
    """
    mine, theirs = ({f"{one['where']} {one['id']}": one for one in predictions} for predictions in (a, b))
    if mine.keys() != theirs.keys() or any(mine[i]["answer"] != theirs[i]["answer"] for i in mine):
        raise ValueError("the two files don't answer the same rows")
    right = {i: (mine[i]["right"], theirs[i]["right"]) for i in mine}
    difference = mean_with_interval([y - x for x, y in right.values()], [shown_together(mine[i]) for i in mine])
    flipped = {
        "only_a": [i for i, (x, y) in right.items() if x > y],
        "only_b": [i for i, (x, y) in right.items() if y > x],
    }
    return {"difference": difference, "p": mcnemar(*map(len, flipped.values())), **flipped}


def summary_table(summaries: dict[str, dict]) -> str:
    """Exact match in percent with its interval by question type, one column for each summary."""
    lines = [f"{'exact match %':<16}{'questions':>10}" + "".join(f"{name:>24}" for name in summaries)]
    rows = [[*s["by_type"].items(), ("all", s["all"])] for s in summaries.values()]
    for parts in zip(*rows):  # a row of every summary
        row, found = parts[0][0], [part["exact_match"] for _, part in parts]
        cells = (f"{100 * f['mean']:.1f} ({100 * f['low']:.1f} to {100 * f['high']:.1f})" for f in found)
        lines.append(f"{row:<16}{found[0]['questions']:>10,}" + "".join(f"{cell:>24}" for cell in cells))
    return "\n".join(lines)
