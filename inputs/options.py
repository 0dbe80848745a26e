"""Options and answers of a row: options as texts, and an answer that names one of them by index, letter or text."""

import json
import re
from collections import Counter

from common import quote
from inputs.fields import Fields, is_filled

OPTION_COLUMN = re.compile(r"(?:option|choice)?([a-z])")  # "A", "Option B", "choice_c": each a field of its own
ANOTHER_ANSWER = re.compile(  # beside `answer`, or instead of it
    r"multiplechoiceanswer|answer(idx|index|label|key|letter)|(correct|right|true)(answer|option|choice|idx|index)(idx|index)?"
    r"|gt|gtanswer|groundtruth"
)
LETTER = re.compile(r"\(?([A-Za-z])[).:]?")
LETTER_AND_TEXT = re.compile(r"\(?([A-Za-z])(?:[).:]\s*|\s+)(\S.*)", re.DOTALL)


def take_options(row: Fields) -> dict[str, str] | None:
    """The row's options, label -> text, from `options`, `choices` or a field for each. None: it has none.

    Raises ValueError where they are not two or more different texts.
    """
    listed = {name: row.take(name) for name in ("options", "choices")}
    listed |= {name: row.empty[name] for name in listed if row.empty.get(name) in ([], {})}
    given = {name: _options(name, value) for name, value in listed.items() if value is not None}
    columns = {match[1].upper(): name for name in row.unread if (match := OPTION_COLUMN.fullmatch(name))}
    if not given and {"A", "B"} <= columns.keys():
        given["A, B, ..."] = _options("A, B, ...", {letter: row.take(columns[letter]) for letter in sorted(columns)})
    if len({tuple(options.values()) for options in given.values()}) > 1:
        raise ValueError("`options` and `choices` differ: leave one of them out")
    return next(iter(given.values()), None)


def _options(name: str, value) -> dict[str, str]:
    if isinstance(value, str) and value.strip()[:1] in ("[", "{"):
        value = _from_json(name, value)
    if isinstance(value, list):
        value = {_letter(place): text for place, text in enumerate(value)}
    texts = list(value.values()) if isinstance(value, dict) else []
    if len(texts) < 2 or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(f"`{name}` must be a list of two or more texts, or an object of letters and texts")
    if len(set(texts)) < len(texts):
        raise ValueError(f"`{name}` names a text twice")
    return value


def take_answer(row: Fields, options: dict[str, str] | None) -> tuple[str, list[str]]:
    """A flat row's answer and all answers that its `answers`, or an `answer` with several, accept (else none).

    Several: the most common is the answer, the first of equals. With options, the answer is the text of one of them.
    Raises ValueError where there is no answer, or where two fields give different ones.
    """
    given, accepted = row.take("answer"), take_answers(row)
    if isinstance(given, list):
        if accepted:
            raise ValueError("both `answer` and `answers` are lists: leave one of them out")
        given, accepted = None, _answers("answer", given)
        if options and len(set(accepted)) > 1:
            raise ValueError("several answers to a question with `options`: only one of them can be trained")
    others = row.take_matching(ANOTHER_ANSWER)
    if given is None and accepted:
        most = Counter(map(_folded, accepted)).most_common(1)[0][0]  # the first of equals: a Counter keeps the order
        given = next(text for text in accepted if _folded(text) == most)
    elif given is None and others and options:
        given = others.pop(next(iter(others)))
    answer = _chosen(given, options) if options else _text("answer", given)
    for name, other in others.items():
        if other != given and (_chosen(other, options) if options else _text(name, other)) != answer:
            raise ValueError(f"`{name}` is {quote(other)}, but the answer is {quote(answer)}: leave one of them out")
    if accepted and not options and _folded(answer) not in map(_folded, accepted):
        raise ValueError(f"the answer {quote(answer)} is none of the row's `answers`")
    return answer, accepted


def take_answers(row: Fields) -> list[str]:
    """The row's `answers`: all that are accepted, in their order. None: []."""
    answers = row.take("answers")
    return [] if answers is None else _answers("answers", answers)


def _answers(name: str, value) -> list[str]:
    """Texts of a list of answers, each a text, a number or an object with `answer`, or of JSON text of such a list."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = _from_json(name, value)
    items = value if isinstance(value, list) else [value]
    return [_text(name, Fields(item).take("answer") if isinstance(item, dict) else item) for item in items]


def _from_json(name: str, text: str):
    try:
        return json.loads(text)
    except ValueError as error:
        if text.strip()[1:2] == "'":
            raise ValueError(f"`{name}` is a list as Python prints it: write it as JSON") from None
        raise ValueError(f"`{name}` is not valid JSON: {error}") from None


def _text(name: str, value) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not is_filled(value):
        problem = "no answer" if not is_filled(value) else f"the answer is a {type(value).__name__}, not a string"
        raise ValueError(f"{problem} in `{name}`")
    return str(value)


def _chosen(answer, options: dict[str, str]) -> str:
    """The option that an answer names: by its text, its label, its letter, or its index from 0.

    Raises ValueError where it names none, or where its text is one option and its letter another.
    """
    _text("answer", answer)
    if isinstance(answer, str):
        named = _named_by_text(answer, options) | _named_by_letter(answer.strip(), options)
        if not named and answer.strip().isdecimal():  # an index in a table, whose cells are texts
            named = _named_by_number(int(answer), options)
    else:
        named = _named_by_number(answer, options)
    if len(named) == 1:
        return named.pop()
    problem = f"names several of the options, {quote(sorted(named))}" if named else "is none of the options"
    raise ValueError(f"the answer {quote(answer)} {problem}: give the text of one, its letter, or its index from 0")


def _named_by_text(answer: str, options: dict[str, str]) -> set[str]:
    return {text for text in options.values() if text == answer} or {
        text for text in options.values() if _folded(text) == _folded(answer)
    }


def _named_by_number(answer: float, options: dict[str, str]) -> set[str]:
    if any(label.isdigit() for label in options):
        return {text for label, text in options.items() if label == str(answer)}
    texts = list(options.values())
    return {text for place, text in enumerate(texts) if place == answer or text == str(answer)}


def _named_by_letter(answer: str, options: dict[str, str]) -> set[str]:
    """The option that "B", "(b)" or "B. its text" names."""
    by_label = {label.casefold(): text for label, text in options.items()}
    if answer.casefold() in by_label:
        return {by_label[answer.casefold()]}
    if match := LETTER.fullmatch(answer):
        return {text for label, text in by_label.items() if label == match[1].casefold()}
    if match := LETTER_AND_TEXT.fullmatch(answer):
        text = by_label.get(match[1].casefold())
        return {text} if text is not None and _folded(text) == _folded(match[2]) else set()
    return set()


def _letter(place: int) -> str:
    return chr(ord("A") + place) if place < 26 else f"option {place}"


def _folded(text: str) -> str:
    """A text as it is compared with another whole one."""
    return " ".join(text.casefold().split()).rstrip(".")
