"""Scores of answers: what counts as right, and how certain a mean is. Plain functions on strings and numbers.

Answers are compared after `normalize`. Every mean has a confidence interval from a bootstrap over images, because
questions about the same image are not independent.
"""

import math
import re
import string
import unicodedata
from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np

from evaluation.statistics import auroc, calibration_error, mcnemar, mean_with_interval

NUMBER_WORDS = {
    word: str(n) for n, word in enumerate("zero one two three four five six seven eight nine ten eleven twelve".split())
}
ARTICLES = {"a", "an", "the"}
MILLIMETRES = {"mm": 1.0, "cm": 10.0, "m": 1000.0}
NUMBER = r"\d+(?:\.\d+)?"
UNIT = r"(mm|cm|m|%|)"
MAX_CLASSES = 10  # different true answers up to which a question gets a confusion table
OTHER = "(other)"  # never a normalized answer, which loses its parentheses


def normalize(text: str) -> str:
    """Unicode NFKC in lower case, with number words up to twelve as digits, and without articles, repeated white space
    and punctuation at the edges of words."""
    words = unicodedata.normalize("NFKC", text).casefold().split()
    words = [word for word in map(_strip_punctuation, words) if word] or words  # "?" is not ""
    content = [word for word in words if word not in ARTICLES] or words  # "A" may be a choice
    return " ".join(NUMBER_WORDS.get(word, word) for word in content)


def _strip_punctuation(word: str) -> str:
    """A word without punctuation at its ends. Signs that matter next to a number stay, and ".5" becomes "0.5"."""
    kept = [c in "<>%-+" or not (c in string.punctuation or unicodedata.category(c)[0] == "P") for c in word]
    if not any(kept):
        return ""
    start, end = kept.index(True), len(word) - kept[::-1].index(True)
    return ("0." if word[start].isdigit() and word[:start].endswith(".") else "") + word[start:end]


# ---------------------------------------------------------------------------------------------------------- one answer


@dataclass(frozen=True)
class Quantity:
    """A number or a range, lengths in millimetres: "5" is 5 to 5, "<5mm" is 0 to 5, ">20mm" is 20 to infinity."""

    low: float
    high: float
    unit: str  # "mm" for every length, "%" or ""


def parse_quantity(text: str) -> Quantity | None:
    """The quantity that an answer as a whole states; None when it states anything else."""
    text = normalize(text).replace(" ", "")
    if match := re.fullmatch(rf"({NUMBER}){UNIT}(?:-|–|to)({NUMBER}){UNIT}", text):
        low, low_unit, high, unit = float(match[1]), match[2], float(match[3]), match[4]
        if low_unit not in ("", unit):
            return None
    elif match := re.fullmatch(rf"(<|>|<=|>=|)({NUMBER}){UNIT}", text):
        sign, value, unit = match[1], float(match[2]), match[3]
        low, high = {"<": (0.0, value), ">": (value, math.inf)}.get(sign[:1], (value, value))
    else:
        return None
    scale = MILLIMETRES.get(unit, 1.0)
    return Quantity(low * scale, high * scale, "mm" if unit in MILLIMETRES else unit)


def quantities_match(prediction: str, truth: str, tolerance: float) -> bool | None:
    """Whether both ends agree within a relative `tolerance`, in the same unit. None when the truth is no quantity."""
    expected, given = parse_quantity(truth), parse_quantity(prediction)
    if expected is None:
        return None
    if given is None or given.unit != expected.unit:
        return False
    ends = ((given.low, expected.low), (given.high, expected.high))
    return all(math.isclose(a, b, rel_tol=0, abs_tol=tolerance * abs(b)) if b < math.inf else a == b for a, b in ends)


def parts(text: str) -> Counter:
    """The normalized parts of an answer such as "pink; red; white". A part that is repeated counts twice."""
    return Counter(filter(None, map(normalize, text.split(";"))))


def f1(prediction: Counter, truth: Counter) -> float:
    """Harmonic mean of precision and recall of two bags; 1 when both are empty."""
    if not prediction and not truth:
        return 1.0
    return 2 * (prediction & truth).total() / (prediction.total() + truth.total())


def score_answer(prediction: str, truth: str, tolerance: float) -> dict:
    """Every score of one answer, between 0 and 1. Only a number has `numeric`, only an answer in parts `set_f1` and
    `set_match`."""
    exact = normalize(prediction) == normalize(truth)
    scores = {"exact_match": float(exact)}
    scores["token_f1"] = f1(Counter(normalize(prediction).split()), Counter(normalize(truth).split()))
    if (numeric := quantities_match(prediction, truth, tolerance)) is not None:
        scores["numeric"] = float(exact or numeric)
    if len(parts(truth)) > 1:
        scores |= {"set_f1": f1(parts(prediction), parts(truth)), "set_match": float(parts(prediction) == parts(truth))}
    return scores


def question_type(fields: dict) -> str:
    """The row's own `question_type`. Without one: yes/no if the answer is, else by words in the question: count, size,
    colour, location or choice ("... or ...?"); open if it has none of these."""
    if fields.get("question_type"):
        return str(fields["question_type"])
    if normalize(fields["answer"]) in ("yes", "no"):
        return "yes/no"
    question = f" {normalize(fields['question'])} "
    words = {"how many": "count", "number of": "count", " size": "size", "how large": "size", "how big": "size"}
    words |= {"color": "colour", "colour": "colour", " where ": "location", "location": "location", " or ": "choice"}
    return next((kind for word, kind in words.items() if word in question), "open")


# ------------------------------------------------------------------------------------------------------- many answers


def confusion(predictions: list[str], truths: list[str]) -> dict[str, dict[str, int]]:
    """Counts of a closed question: truth -> prediction -> answers. Predictions that are no row's truth are OTHER."""
    predictions, truths = [normalize(p) for p in predictions], [normalize(t) for t in truths]
    table = {truth: Counter() for truth in sorted(set(truths))}
    for prediction, truth in zip(predictions, truths):
        table[truth][prediction if prediction in table else OTHER] += 1
    return {truth: dict(row) for truth, row in table.items()}


def balanced_accuracy(table: dict[str, dict[str, int]]) -> float:
    """The mean of the recall of each true answer."""
    return float(np.mean([row.get(truth, 0) / sum(row.values()) for truth, row in table.items()]))


# ------------------------------------------------------------------------------------------------- predictions of a run


def closed_sets(rows: list[dict], at_most: int) -> dict[str, list[str]]:
    """Question -> its answers, for questions that have 2 to `at_most` different ones among the rows. The most frequent
    answer stands first, and each is spelled as most rows spell it."""
    spellings = {}  # question -> normalized answer -> spelling -> rows
    for row in rows:
        answers = spellings.setdefault(row["question"], {})
        answers.setdefault(normalize(row["answer"]), Counter())[row["answer"]] += 1
    sets = {}
    for question, answers in spellings.items():
        if 2 <= len(answers) <= at_most:
            by_frequency = sorted(answers.values(), key=lambda counts: -counts.total())
            sets[question] = [counts.most_common(1)[0][0] for counts in by_frequency]
    return sets


def score_options(predictions: list[dict], images: list[str]) -> dict:
    """Scores of predictions with `options` (text -> probability): whether the likeliest option is right, and how well
    its probability is calibrated. Yes/no questions also get the area under the ROC curve of yes against no, and the
    calibration of these two."""
    right = [normalize(p["option"]) == normalize(p["answer"]) for p in predictions]
    result = {"top1": mean_with_interval(right, images)}
    result["calibration_error"] = calibration_error([p["options"][p["option"]] for p in predictions], right)
    yes, truth = [], []  # the probability of yes, were yes and no the only options; whether yes is right
    for prediction in predictions:
        share = {normalize(option): probability for option, probability in prediction["options"].items()}
        if normalize(prediction["answer"]) in ("yes", "no") and {"yes", "no"} <= share.keys():
            yes.append(share["yes"] / max(share["yes"] + share["no"], 1e-300))
            truth.append(normalize(prediction["answer"]) == "yes")
    if len(set(truth)) == 2:
        error = calibration_error([max(p, 1 - p) for p in yes], [(p > 0.5) == t for p, t in zip(yes, truth)])
        result["yes/no"] = {"auroc": auroc(yes, truth), "calibration_error": error, "questions": len(yes)}
    return result


def bootstrap_group(prediction: dict) -> str:
    """The same for predictions that depend on each other: those of the same images. Without an image, the row alone."""
    return "|".join(prediction["images"]) or prediction["where"]


def bleu(predictions: list[dict]) -> dict:
    """Corpus BLEU by sacrebleu, and its signature. Raises ModuleNotFoundError where sacrebleu is not installed."""
    from sacrebleu.metrics import BLEU

    metric, answers = BLEU(), [p["answer"] for p in predictions]
    score = metric.corpus_score([p["prediction"] for p in predictions], [answers]).score
    return {"score": score, "signature": str(metric.get_signature())}


def summarize(predictions: list[dict], tolerance: float) -> dict:
    """Every score with its interval, over all answers, by question type and by question; also the confusion table of
    each question with 2 to MAX_CLASSES true answers. `predictions` are lines of predictions.jsonl."""
    scored = [score_answer(p["prediction"], p["answer"], tolerance) for p in predictions]
    images = [bootstrap_group(p) for p in predictions]

    def means(chosen: list[int]) -> dict:
        result = {}
        for name in dict.fromkeys(name for i in chosen for name in scored[i]):
            having = [i for i in chosen if name in scored[i]]
            result[name] = mean_with_interval([scored[i][name] for i in having], [images[i] for i in having])
        return result

    summary = {"all": means(list(range(len(predictions)))), "closed": {}}
    by_question = _group_by(predictions, "question")
    summary["by_type"] = {kind: means(chosen) for kind, chosen in _group_by(predictions, "question_type").items()}
    summary["by_question"] = {question: means(chosen) for question, chosen in by_question.items()}
    for question, chosen in by_question.items():
        table = confusion([predictions[i]["prediction"] for i in chosen], [predictions[i]["answer"] for i in chosen])
        if 1 < len(table) <= MAX_CLASSES:
            summary["closed"][question] = {"balanced_accuracy": balanced_accuracy(table), "confusion": table}
    loss = sum(p["loss"] for p in predictions) / sum(p["answer_tokens"] for p in predictions)
    teacher_forced = mean_with_interval([p["teacher_forced"] for p in predictions], images)
    summary["teacher_forced"] = {"loss": loss, "exact_match": teacher_forced}
    if find_spec("sacrebleu"):
        summary["bleu"] = bleu(predictions)
    if chosen := [i for i, p in enumerate(predictions) if "options" in p]:
        summary["options"] = score_options([predictions[i] for i in chosen], [images[i] for i in chosen])
    return summary


def _group_by(predictions: list[dict], field: str) -> dict[str, list[int]]:
    """Value of a field -> indices of the predictions that have it, sorted by value."""
    groups = {}
    for index, prediction in enumerate(predictions):
        groups.setdefault(prediction[field], []).append(index)
    return dict(sorted(groups.items()))


def compare(a: list[dict], b: list[dict]) -> dict:
    """Exact match of b minus that of a on the same rows with its interval over images, McNemar's p, and the rows that
    only one of them got right. Raises ValueError when the two don't answer the same rows."""
    a, b = ({row_key(prediction): prediction for prediction in predictions} for predictions in (a, b))
    if a.keys() != b.keys() or any(a[row]["answer"] != b[row]["answer"] for row in a):
        raise ValueError("the two files don't answer the same rows")
    differences = {row: b[row]["right"] - a[row]["right"] for row in a}
    only_a, only_b = ([row for row, difference in differences.items() if difference == sign] for sign in (-1, 1))
    mean = mean_with_interval(list(differences.values()), [bootstrap_group(a[row]) for row in a])
    return {"difference": mean, "p": mcnemar(len(only_a), len(only_b)), "only_a": only_a, "only_b": only_b}


def row_key(prediction: dict) -> str:
    """Names a prediction's row in a comparison."""
    return f"{prediction['where']} {prediction['id']}"
