"""Scores of answers: of one, of all predictions of a run, and of two runs. Plain functions on strings and numbers.

`normalization.py` says which answers count as the same. Every mean has a confidence interval over images, because
questions about the same image are not independent.
"""

import json
import re
from collections import Counter

import numpy as np

from evaluation import overlap
from evaluation.benchmarks import anls, relaxed_accuracy, strict_match, vqa_accuracy
from evaluation.normalization import accepted, is_right, normalize, parts, quantities_match
from evaluation.statistics import auroc, calibration_error, difference_with_interval, mcnemar, mean_with_interval

MAX_CLASSES = 10  # different true answers up to which a question gets a confusion table
OTHER = "(other)"  # never a normalized answer, which loses its parentheses
NO_VALUE = "(none)"  # of a field that other rows have

# ---------------------------------------------------------------------------------------------------------- one answer


def f1(prediction: Counter, truth: Counter) -> float:
    """Harmonic mean of precision and recall of two bags; 1 when both are empty."""
    if not prediction and not truth:
        return 1.0
    return 2 * (prediction & truth).total() / (prediction.total() + truth.total())


def words(text: str) -> Counter:
    """The words of all parts of an answer."""
    return Counter(" ".join(parts(text).elements()).split())


def score_answer(prediction: str, answers: list[str], tolerance: float) -> dict:
    """Every score of one answer, between 0 and 1: the best over all accepted `answers`, of which the first one says
    what kind of answer it is. Only a number has `numeric`, only an answer in parts `set_f1` and `set_match`."""
    exact = float(is_right(prediction, answers))
    scores = {"exact_match": exact, "token_f1": max(f1(words(prediction), words(answer)) for answer in answers)}
    if quantities_match(prediction, answers[0], tolerance) is not None:
        scores["numeric"] = max(exact, *(float(quantities_match(prediction, a, tolerance) or 0) for a in answers))
    if in_parts(answers[0]):
        set_f1 = max(f1(parts(prediction), parts(answer)) for answer in answers)
        scores |= {"set_f1": set_f1, "set_match": exact}
    return scores


def in_parts(answer: str) -> bool:
    """Whether an answer has several parts, such as "pink; red"."""
    return parts(answer).total() > 1


def score_benchmarks(prediction: dict) -> dict:
    """The scores of public benchmarks: strict match and relaxed accuracy of every answer; ANLS where the row has
    `answers`, and VQA accuracy where it has several."""
    answers = prediction.get("answers", [])
    scores = {"anls": anls(prediction["prediction"], answers)} if answers else {}
    if len(answers) > 1:
        scores["vqa_accuracy"] = vqa_accuracy(prediction["prediction"], answers)
    for name, rule in {"strict_match": strict_match, "relaxed_accuracy": relaxed_accuracy}.items():
        scores[name] = rule(prediction["prediction"], accepted(prediction))
    return scores


# ------------------------------------------------------------------------------------------------------ question types

VERB_FIRST = re.compile(
    r"\W*(?:is|are|was|were|am|do|does|did|has|have|had|can|could|will|would|should|may|might|must)\b"
)
EVASIVE = ("not relevant", "not applicable", "n/a", "unknown", "unclear")
KINDS = {
    "count": re.compile(r"\b(?:how many|number of)\b"),
    "size": re.compile(r"\b(?:sizes?|how (?:large|big))\b"),
    "colour": re.compile(r"\bcolou?r(?:s|ed)?\b"),
    "location": re.compile(r"\b(?:where|locations?|located)\b"),
}


def question_types(rows: list[dict]) -> list[str]:
    """The type of each row's question: the row's own `question_type`, or else the same for all rows with this question.

    `rows` are the fields of all rows of a data set. The rule looks at the question's text, and where that leaves it
    open at all answers that the rows give to it: yes/no, count, size, colour, location, choice or open.
    """
    questions = [" ".join(row["question"].casefold().split()) for row in rows]
    answers = {}  # question -> its normalized answers
    for question, row in zip(questions, rows):
        answers.setdefault(question, Counter())[normalize(row["answer"])] += 1
    kinds = {question: _kind(question, given) for question, given in answers.items()}
    own = [row.get("question_type") for row in rows]  # may be 0
    return [str(kinds[question] if kind is None else kind) for question, kind in zip(questions, own)]


def _kind(question: str, answers: Counter) -> str:
    """Yes/no where the question begins with a verb and its answers, but for EVASIVE ones, with yes or no, or where it
    has no word of KINDS and most of its answers are yes or no. Choice where it has an "or" and one of its answers."""
    plain = answers["yes"] + answers["no"]
    begun = sum(count for answer, count in answers.items() if answer.split()[:1] in (["yes"], ["no"]))
    decided = answers.total() - sum(answers[evasive] for evasive in EVASIVE)
    if VERB_FIRST.match(question) and (plain or 2 * begun >= decided):
        return "yes/no"
    if kind := next((kind for kind, pattern in KINDS.items() if pattern.search(question)), None):
        return kind
    if 2 * plain > answers.total():
        return "yes/no"
    asked = f" {' '.join(parts(question).elements())} "
    names_an_answer = any(f" {answer} " in asked for answer in answers)
    return "choice" if " or " in asked and names_an_answer else "open"


# ------------------------------------------------------------------------------------------------------- many answers


def confusion(predictions: list[dict]) -> dict[str, dict[str, int]]:
    """Counts of a closed question: truth -> prediction -> answers. Predictions that are no row's truth are OTHER; one
    that equals another accepted answer of its row counts as the truth."""
    table = {truth: Counter() for truth in sorted({normalize(p["answer"]) for p in predictions})}
    for prediction in predictions:
        truth, given = normalize(prediction["answer"]), normalize(prediction["prediction"])
        if is_right(prediction["prediction"], accepted(prediction)):
            given = truth
        table[truth][given if given in table else OTHER] += 1
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
    right = [_option_is_right(p) for p in predictions]
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


def _option_is_right(prediction: dict) -> bool:
    """By exact text, unless none of the options is spelled as the row spells its answer."""
    option, answers = prediction["option"], accepted(prediction)
    return option in answers if prediction["options"].keys() & set(answers) else is_right(option, answers)


def image_group(prediction: dict) -> str:
    """The same for predictions that depend on each other: those of the same images. Without an image, the row alone."""
    return "|".join(prediction["images"]) or prediction["where"]


def summarize(predictions: list[dict], tolerance: float) -> dict:
    """Every score with its interval, over all answers, by question type, by question and by the fields that --by names;
    also the confusion table of each question with 2 to MAX_CLASSES true answers, and how many answers were `cut`.
    `predictions` are lines of predictions.jsonl."""
    scored = [score_answer(p["prediction"], accepted(p), tolerance) for p in predictions]
    overlaps = overlap.row_scores(predictions)
    both = [scores | score_benchmarks(p) | words for scores, p, words in zip(scored, predictions, overlaps)]
    images = [image_group(p) for p in predictions]

    def means(scored: list[dict], chosen: list[int]) -> dict:
        result = {}
        for name in dict.fromkeys(name for i in chosen for name in scored[i]):
            having = [i for i in chosen if name in scored[i]]
            result[name] = mean_with_interval([scored[i][name] for i in having], [images[i] for i in having])
        return result

    summary = {"all": means(both, list(range(len(predictions)))), "closed": {}}
    by_type, by_question = _group_by(predictions, "question_type"), _group_by(predictions, "question")
    summary["by_type"] = {kind: means(both, chosen) for kind, chosen in by_type.items()}
    summary["by_question"] = {question: means(scored, chosen) for question, chosen in by_question.items()}
    for question, chosen in by_question.items():
        table = confusion([predictions[i] for i in chosen])
        if 1 < len(table) <= MAX_CLASSES:
            summary["closed"][question] = {"balanced_accuracy": balanced_accuracy(table), "confusion": table}
    summary["teacher_forced"] = score_teacher_forcing(predictions, [s["exact_match"] for s in scored], images)
    summary["cut"] = sum(p.get("cut", False) for p in predictions)
    summary |= overlap.corpus_scores(predictions)
    summary["by"] = {
        field: {
            value: means(both, rows) | overlap.corpus_scores([predictions[i] for i in rows]) for value, rows in groups
        }
        for field, groups in group_by_fields(predictions).items()
    }
    if chosen := [i for i, p in enumerate(predictions) if "options" in p]:
        summary["options"] = score_options([predictions[i] for i in chosen], [images[i] for i in chosen])
    return summary


def score_teacher_forcing(predictions: list[dict], exact: list[float], images: list[str]) -> dict:
    """Loss and exact match of the rows' own answers, letter by letter. `in_parts`, where there are answers in parts: by
    how much exact match of the generated answers is above it on these."""
    loss = sum(p["loss"] for p in predictions) / sum(p["answer_tokens"] for p in predictions)
    forced = [p["teacher_forced"] for p in predictions]
    result = {"loss": loss, "exact_match": mean_with_interval(forced, images)}
    if chosen := [i for i, p in enumerate(predictions) if in_parts(p["answer"])]:
        differences = [exact[i] - forced[i] for i in chosen]
        result["in_parts"] = difference_with_interval(differences, [images[i] for i in chosen])
    return result


def _group_by(predictions: list[dict], field: str) -> dict[str, list[int]]:
    """Value of a field -> indices of the predictions that have it, sorted by value."""
    groups = {}
    for index, prediction in enumerate(predictions):
        groups.setdefault(prediction[field], []).append(index)
    return dict(sorted(groups.items()))


def group_by_fields(predictions: list[dict]) -> dict[str, list[tuple[str, list[int]]]]:
    """Field that --by names -> its values as texts, each with the indices of the predictions that have it. Whole
    numbers stand first, in their order. A prediction whose value is a list is in the group of each of its elements, and
    one without a value in that of NO_VALUE, which stands last."""
    result = {}
    for field in dict.fromkeys(field for prediction in predictions for field in prediction.get("by", {})):
        groups = {}
        for index, prediction in enumerate(predictions):
            value = prediction.get("by", {}).get(field, NO_VALUE)
            for text in dict.fromkeys(map(_as_text, value if isinstance(value, list) else [value])):
                groups.setdefault(text, []).append(index)
        result[field] = sorted(groups.items(), key=lambda group: _value_order(group[0]))
    return result


def _as_text(value) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _value_order(value: str) -> tuple:
    return value == NO_VALUE, not value.isdecimal(), int(value) if value.isdecimal() else 0, value


def compare(a: list[dict], b: list[dict]) -> dict:
    """Exact match of b minus that of a on the same rows with its interval, over all rows, by question type, by question
    and by the fields that --by names; McNemar's p; and the rows that only one of them got right. Raises ValueError when
    the two don't answer the same rows.

    Both are judged by today's rule and by the answers that either of them lists, whatever rule wrote the files."""
    a, b = ({row_key(prediction): prediction for prediction in predictions} for predictions in (a, b))
    rows = {row: (a.get(row, {}).get("answer"), b.get(row, {}).get("answer")) for row in a | b}
    if other := next((row for row, (left, right) in rows.items() if left != right), ""):
        how = "has two answers" if other in a.keys() & b else f"is only in the {'first' if other in a else 'second'}"
        counts = f"they have {len(a):,} and {len(b):,}, and {other!r} (file, line and id) {how}"
        raise ValueError(f"the two files don't answer the same rows\n  {counts}")
    answers = {row: accepted(a[row] | b[row]) for row in a}
    right_a, right_b = ({row: is_right(x[row]["prediction"], answers[row]) for row in a} for x in (a, b))
    differences = {row: right_b[row] - right_a[row] for row in a}
    only_a, only_b = ([row for row, difference in differences.items() if difference == sign] for sign in (-1, 1))

    def mean(rows: list[str]) -> dict:
        return difference_with_interval([differences[row] for row in rows], [image_group(a[row]) for row in rows])

    rows = list(a)
    result = {"difference": mean(rows), "p": mcnemar(len(only_a), len(only_b)), "only_a": only_a, "only_b": only_b}
    for name, field in {"by_type": "question_type", "by_question": "question"}.items():
        groups = _group_by([{field: ""} | a[row] for row in rows], field)
        result[name] = {value: mean([rows[i] for i in chosen]) for value, chosen in groups.items()}
    by_fields = group_by_fields([a[row] | b[row] for row in rows])
    result["by"] = {
        field: {value: mean([rows[i] for i in chosen]) for value, chosen in groups}
        for field, groups in by_fields.items()
    }
    return result


def pair_up(a: list[dict], b: list[dict]) -> list[tuple[dict, dict]]:
    """The predictions of a, each with that of b for the same row."""
    of_row = {row_key(prediction): prediction for prediction in b}
    return [(prediction, of_row[row_key(prediction)]) for prediction in a]


def row_key(prediction: dict) -> str:
    """Names a prediction's row in a comparison."""
    return f"{prediction['where']} {prediction['id']}"
