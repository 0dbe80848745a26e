"""Scores of public benchmarks, by the rules of their own scripts, so that they can be set beside published numbers."""

import math
import re
from functools import lru_cache

VQA_NUMBERS = "none zero one two three four five six seven eight nine ten".split()
VQA_DIGITS = dict(zip(VQA_NUMBERS, map(str, (0, *range(11)))))
VQA_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
CONTRACTIONS = set(  # which may lack their apostrophe
    """aint arent cant couldnt couldve didnt doesnt dont hadnt hasnt havent hed hes howd howll hows isnt itd itll maam
    mightnt mightve mustnt mustve neednt notve oclock oughtnt shant shouldnt shouldve somebodyd somebodyll somebodys
    someoned someonell someones somethingd somethingll thats thered therere theres theyd theyll theyre theyve twas
    wasnt werent weve whatll whatre whats whatve whens whered wheres whereve whod wholl whos whove whyll whyre whys
    wont wouldnt wouldve yall youd youll youre youve""".split()
)
RELAXED_TOLERANCE = 0.05
ANLS_THRESHOLD = 0.5


def vqa_accuracy(prediction: str, answers: list[str]) -> float:
    """min(matches / 3, 1) of VQAv2, averaged over the subsets that leave out one of the answers.

    As evaluated by vqaEval.py of github.com/GT-Vision-Lab/VQA (a013f00), which compares texts as they are where all
    answers agree. Fewer than four answers can't give 1.
    """
    answers, prediction = [" ".join(answer.split()) for answer in answers], " ".join(prediction.split())
    if len(set(answers)) > 1:
        answers, prediction = list(map(_vqa_words, answers)), _vqa_words(prediction)
    matches = answers.count(prediction)
    shares = [min((matches - (answer == prediction)) / 3, 1) for answer in answers]
    return sum(shares) / len(shares)


@lru_cache(maxsize=1 << 16)  # annotators repeat each other
def _vqa_words(text: str) -> str:
    """`processPunctuation` and `processDigitArticle` of that script. A mark goes where it stands beside a space or the
    text has a comma between digits, and otherwise leaves a space; a full stop stays before a digit only."""
    all_go, spelled = re.search(r"\d,\d", text), text
    for mark in VQA_PUNCTUATION:
        goes = all_go or f"{mark} " in text or f" {mark}" in text
        spelled = spelled.replace(mark, "" if goes else " ")
    words = re.sub(r"\.(?!\d)", "", spelled).lower().split()
    words = [VQA_DIGITS.get(word, word) for word in words if word not in ("a", "an", "the")]
    return " ".join(bare if (bare := word.replace("'", "")) in CONTRACTIONS else word for word in words)


def strict_match(prediction: str, answers: list[str]) -> float:
    """1 where the prediction is an answer's text, in either case and whatever white space surrounds it.

    What evaluation/compute_metrics.py of github.com/simula/Kvasir-VQA-x1 (a7aef04) calls exact match.
    """
    return float(prediction.strip().lower() in [answer.strip().lower() for answer in answers])


def anls(prediction: str, answers: list[str]) -> float:
    """Normalized Levenshtein similarity to the nearest answer, 0 where it is below ANLS_THRESHOLD. Its mean is ANLS.

    Biten et al., Scene Text Visual Question Answering, 2019; in lower case and with single spaces, as the evaluation of
    DocVQA (rrc.cvc.uab.es) does.
    """
    given, similarity = " ".join(prediction.lower().split()), 0.0
    for answer in set(answers):
        expected, length = " ".join(answer.lower().split()), max(len(answer), len(prediction))
        if abs(len(given) - len(expected)) <= ANLS_THRESHOLD * length:  # otherwise the distance is greater still
            similarity = max(similarity, 1 - levenshtein(given, expected) / max(length, 1))
    return similarity if similarity >= ANLS_THRESHOLD else 0.0


def levenshtein(a: str, b: str) -> int:
    """The fewest insertions, deletions and substitutions of a letter that turn `a` into `b`."""
    distances = list(range(len(b) + 1))  # from the first letters of a to those of b
    for row, letter in enumerate(a, start=1):
        diagonal, distances[0] = distances[0], row
        for column, other in enumerate(b, start=1):
            substituted, diagonal = diagonal + (letter != other), distances[column]
            distances[column] = min(substituted, diagonal + 1, distances[column - 1] + 1)
    return distances[-1]


def relaxed_accuracy(prediction: str, answers: list[str]) -> float:
    """1 where the prediction is a number within RELAXED_TOLERANCE of an answer, or an answer's text in either case.

    Masry et al., ChartQA, 2022, section 5.1, as `relaxed_correctness` of github.com/google-research/pix2struct computes
    it: "5%" is 0.05, and an answer of 0 allows no deviation.
    """
    return float(any(_relaxed(prediction.strip(), answer.strip()) for answer in set(answers)))


def _relaxed(prediction: str, answer: str) -> bool:
    given, expected = _number(prediction), _number(answer)
    if given is not None and expected:
        return abs(given - expected) / abs(expected) <= RELAXED_TOLERANCE
    return prediction.lower() == answer.lower()


def _number(text: str) -> float | None:
    try:
        number = float(text.rstrip("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
