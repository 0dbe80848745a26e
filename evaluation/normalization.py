"""What counts as the same answer: one rule for scores, comparisons, tables, and contradictions between rows."""

import math
import re
import string
import unicodedata
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

NUMBER_WORDS = {
    word: str(n) for n, word in enumerate("zero one two three four five six seven eight nine ten eleven twelve".split())
}
ARTICLES = {"a", "an", "the"}
LETTERED = set(
    "answer category choice class figure grade group hepatitis influenza option part stage type vitamin".split()
)
NOT_AFTER_ARTICLE = set("and are at has in is nor of on or to was were with".split())
MILLIMETRES = {"mm": 1.0, "cm": 10.0, "m": 1000.0}
NUMBER = r"\d+(?:\.\d+)?"
UNIT = r"(mm|cm|m|%|)"
UNITS = (  # which may stand apart from their number
    "(?:[cdkmnμ]?m[23]?|[kmμ]?g|[cdmμ]?l|cc|m?s|min|h|[km]?hz|mmhg|k?pa|bpm|kcal|ppm|°[cfk]?|[%‰])"
)
RAISED, OTHER_DIGITS = "⁰¹²³⁴-⁹⁺⁻", "₀-₉¼-¾⅐-⅞①-⓿"  # which NFKC turns into ordinary ones
DASHES = "‐-―"
MAX_WORDS = 3  # of a part between commas; a longer one is a clause
BEFORE_NFKC = {
    rf"(?<=[\d)])([{RAISED}]+)": r"^\1",  # 10² is not 102
    rf"(?<=\d)(?=[{OTHER_DIGITS}])|(?<=[{OTHER_DIGITS}])(?=\d)": " ",  # 1½ is not 11/2
    "[º˚]": "°",
    "[\u00ad\u200b-\u200f\u2060-\u2064\ufeff]": "",  # characters without width
}
AFTER_NFKC = {
    "−": "-",
    "[≥⩾≧]": ">=",
    "[≤⩽≦]": "<=",
    "⁄": "/",
    "[‘’]": "'",
    rf"(?<=\S)[{DASHES}](?=\S)|[{DASHES}](?=\.?\d)": "-",
}
NUMBER_WORD = re.compile(rf"(?<![\w'-])({'|'.join(NUMBER_WORDS)})(?![\w'-])")
WITH_DIGITS = {
    r"(?<=[^\W\d_])\^(?=\d)": "",  # cm^2 as cm², which NFKC turns into cm2
    r"(?<![\w.])\.(?=\d)": "0.",
    r"(?<![\d.,(\[{])([1-9]\d{0,2}(?:,\d{3})+)(?!\d|,\d)": lambda match: match[1].replace(",", ""),  # 1,000
    r"°\s+(?=[cf]\b)": "°",
    rf"(?<=\d)(?:\s+|-)({UNITS})(?!\w)": r"\1",
    rf"(?<=\d)({UNITS}?)\s*[x×]\s*(?=\d)": r"\1x",
    r"([<>]=?|[=~≈±$€£¥])\s+(?=\d)": r"\1",
    rf"(?<=\d)({UNITS}?)\s*[-{DASHES}]\s+(?=\d)": r"\1-",
}


def normalize(text: str) -> str:
    """The same text for answers that count as equal: their `parts` in alphabetical order, joined by "; "."""
    return "; ".join(sorted(_parts(text)))


def parts(text: str) -> Counter:
    """The parts of an answer such as "pink; red; white", as a set: without regard to their order, and one that is
    repeated counts once. Most answers have one part.

    Without a semicolon, commas separate the parts if what they separate is short: "pink, red" is a list; "1, 2",
    "No, it is not", "{...}" and whatever has a clause of over MAX_WORDS words is not, and keeps its order.

    Each part is in lower case and Unicode NFKC, with number words up to twelve and numbers such as 1,000 as digits,
    numbers joined with their signs and units (">= 5 mm" is ">=5mm"), one sign for all dashes, and without repeated
    white space, punctuation at the ends of words, and articles before another word.
    """
    return Counter(_parts(text))


@lru_cache(maxsize=1 << 16)  # the answers of a data set repeat
def _parts(text: str) -> list[str]:
    text = _spell(text)
    pieces, listed = text.split(";"), re.split(r",(?!\d)|(?<!\d),|、", text)
    if len(pieces) == 1 and _is_list(listed):
        pieces = listed
    return list(dict.fromkeys(filter(None, map(_words_of, pieces)))) or [" ".join(text.split())]  # "?" is not ""


def _spell(text: str) -> str:
    """The text in lower case, with one spelling of each number, sign and unit."""
    ascii_only = text.isascii()
    text = text if ascii_only else _rewrite(text, BEFORE_NFKC)
    text = unicodedata.normalize("NFKC", text).casefold()
    text = text if ascii_only else _rewrite(text, AFTER_NFKC)
    text = NUMBER_WORD.sub(lambda match: NUMBER_WORDS[match[1]], text)
    return _rewrite(text, WITH_DIGITS) if re.search(r"\d", text) else text


def _rewrite(text: str, replacements: dict) -> str:
    for pattern, replacement in replacements.items():
        text = re.sub(pattern, replacement, text)
    return text


def _is_list(pieces: list[str]) -> bool:
    """Whether what commas separate is a list of labels rather than numbers, JSON or clauses of a sentence."""
    if pieces[0].strip() in ("yes", "no") or any(set(piece) & set("[{") for piece in pieces):
        return False
    pieces = [piece for piece in pieces if piece.strip()]
    return all(len(piece.split()) <= MAX_WORDS and re.search(r"[^\W\d_]", piece) for piece in pieces)


def _words_of(part: str) -> str:
    words = [(word, bare) for word in part.split() if (bare := _strip_punctuation(word))]
    bare = [bare for _, bare in words] + [""]
    kept = []
    for place, (word, article) in enumerate(words):
        following, before = bare[place + 1], bare[place - 1] if place else ""
        is_article = article in ARTICLES and following and word.endswith(article)  # "A." and "A)" are choices
        if article == "a":  # or a letter, as in "A B", "A and B" and "vitamin A deficiency"
            is_letter = len(following) == 1 and following.isalpha()
            is_article = is_article and not (is_letter or following in NOT_AFTER_ARTICLE or before in LETTERED)
        if not is_article:
            kept.append(article)
    return " ".join(kept)


def _strip_punctuation(word: str) -> str:
    """A word without punctuation at its ends, but for signs that matter next to a number."""
    kept = [c in "<>%-+" or not (c in string.punctuation or unicodedata.category(c)[0] == "P") for c in word]
    if not any(kept):
        return ""
    return word[kept.index(True) : len(word) - kept[::-1].index(True)]


def accepted(row: dict) -> list[str]:
    """The different answers that count as right, of a row's fields or of its prediction; first the one it trains."""
    return list(dict.fromkeys([row["answer"], *row.get("answers", [])]))


def is_right(prediction: str, answers: list[str]) -> bool:
    """Whether the prediction is the same as any of the accepted answers."""
    return normalize(prediction) in map(normalize, answers)


# ----------------------------------------------------------------------------------------------------------- quantities


@dataclass(frozen=True)
class Quantity:
    """A number or a range, lengths in millimetres: "5" is 5 to 5, "<5mm" is 0 to 5, ">20mm" is 20 to infinity."""

    low: float
    high: float
    unit: str  # "mm" for every length, "%" or ""


def parse_quantity(text: str) -> Quantity | None:
    """The quantity that an answer as a whole states; None when it states anything else."""
    text = normalize(text)
    if re.search(r"\d \d", text):  # "1, 2, 3" is no 123
        return None
    text = text.replace(" ", "")
    if match := re.fullmatch(rf"({NUMBER}){UNIT}(?:-|to)({NUMBER}){UNIT}", text):
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
