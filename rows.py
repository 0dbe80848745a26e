"""Rows of visual question answering, in the three formats people have, turned into one: a conversation with images.

Formats are told apart by their fields (README.md shows an example of each):
flat (`question`, `answer`), LLaVA (`conversations`) and messages (`messages`). Files are JSON arrays or JSON lines.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

IMAGE_KEYS = ("image", "image_filename", "image_id")
LLAVA_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class InputError(ValueError):
    """Something the user gave is wrong; the message names all of it and the remedy, and is shown without a traceback."""


@dataclass
class Row:
    """One usable row: `images` are as the row names them, in the order of the image parts of `messages`."""

    where: str  # file:line
    messages: list[dict]  # {"role", "content": [{"type": "text", "text"} or {"type": "image"}]}
    images: list[str]
    fields: dict  # question, answer, and id, question_type, options where the row has them


@dataclass
class BadRow:
    where: str
    reason: str
    row: object = None  # the parsed row, or its text where it is not JSON


def read_rows(path: Path) -> tuple[list[Row], list[BadRow]]:
    """Read every row of a JSON array or JSON-lines file; what can't be used comes back with its line and reason."""
    good, bad = [], []
    for line, value, error in _json_values(path.read_bytes()):
        where = f"{path.name}:{line}"
        try:
            if error:
                raise ValueError(error)
            good.append(_parse_row(where, value))
        except ValueError as reason:
            bad.append(BadRow(where, str(reason), value))
    return good, bad


def _json_values(raw: bytes):
    """Yield (line number, value, None) for each row, or (line number, text, error) where it is not JSON."""
    decoder = json.JSONDecoder(parse_constant=_refuse_constant)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        yield raw[: error.start].count(b"\n") + 1, None, f"not UTF-8 text: {error.reason}"
        return
    if not text.lstrip().startswith("["):
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                try:
                    yield number, decoder.decode(line), None
                except ValueError as error:
                    yield number, line, f"not valid JSON: {error}"
        return
    separator = re.compile(r"\s*,?\s*")
    at = text.index("[") + 1
    line, counted = 1, 0
    while True:
        at = separator.match(text, at).end()
        line, counted = line + text.count("\n", counted, at), at
        if at < len(text) and text[at] == "]":
            return
        try:
            value, at = decoder.raw_decode(text, at)
        except ValueError as error:
            yield line, text[at : at + 80], f"not valid JSON: {error}"
            return
        yield line, value, None


def _refuse_constant(name: str):
    raise ValueError(f"{name} is not a JSON value")


def _parse_row(where: str, row) -> Row:
    if not isinstance(row, dict):
        raise ValueError(f"a row must be a JSON object, not {type(row).__name__}")
    if "messages" in row:
        messages, images = _from_messages(row)
    elif "conversations" in row:
        messages, images = _from_llava(row)
    elif "question" in row:
        messages, images = _from_flat(row)
    else:
        raise ValueError(f"no question, conversations or messages field among: {', '.join(row) or 'no fields at all'}")
    _check_turns(messages)
    kept = {key: row[key] for key in ("id", "question_type", "options") if key in row}
    fields = {"id": where, **kept, "question": _text_of(messages[-2]), "answer": _text_of(messages[-1])}
    return Row(where, messages, images, fields)


def _from_flat(row: dict) -> tuple[list[dict], list[str]]:
    images = _image_list(next((row[key] for key in IMAGE_KEYS if row.get(key) is not None), []))
    question, answer = row["question"], row.get("answer")
    if not isinstance(question, str) or not question.strip():
        raise ValueError("the question is empty or not a string")
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise ValueError("no answer" if answer is None else f"the answer is a {type(answer).__name__}, not a string")
    parts = _split_placeholders(question)
    if not any(part["type"] == "image" for part in parts):
        parts = [{"type": "image"}] * len(images) + parts
    _check_image_count(parts, images)
    return [{"role": "user", "content": parts}, _answer(str(answer))], images


def _from_llava(row: dict) -> tuple[list[dict], list[str]]:
    images = _image_list(row.get("image") if row.get("image") is not None else row.get("images") or [])
    messages = []
    for turn in _list_of_dicts(row["conversations"], "conversations"):
        role = LLAVA_ROLES.get(turn.get("from"))
        if role is None or not isinstance(turn.get("value"), str):
            raise ValueError(f"a turn needs `from` (human, gpt or system) and a text `value`, found {turn}")
        messages.append(_turn(role, turn["value"]))
    _check_image_count([part for message in messages for part in message["content"]], images)
    return messages, images


def _from_messages(row: dict) -> tuple[list[dict], list[str]]:
    listed = _image_list(row.get("images") or [])
    waiting, images, messages = iter(listed), [], []
    for message in _list_of_dicts(row["messages"], "messages"):
        role, content = message.get("role"), message.get("content")
        if role not in ("system", "user", "assistant"):
            raise ValueError(f"unknown role {role!r}; known: system, user, assistant")
        parts = _turn(role, content)["content"] if isinstance(content, str) else _typed_parts(content)
        for part in parts:
            if part["type"] == "image":
                images.append(part.pop("image", None) or next(waiting, None))
        messages.append({"role": role, "content": parts})
    if None in images or next(waiting, None) is not None:
        count = sum(part["type"] == "image" for message in messages for part in message["content"])
        raise ValueError(f"{count} image placeholders for {len(listed)} images")
    return messages, images


def _typed_parts(content) -> list[dict]:
    parts = []
    for part in _list_of_dicts(content, "content"):
        if part.get("type") == "text" and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": part["text"]})
        elif part.get("type") == "image" and isinstance(part.get("image"), str | None):
            parts.append({"type": "image", "image": part.get("image")})
        else:
            raise ValueError(f"a content part must be of type text or image, found {part}")
    return parts


def _turn(role: str, text: str) -> dict:
    if role == "assistant":
        return _answer(text)
    return {"role": role, "content": _split_placeholders(text) if role == "user" else [{"type": "text", "text": text}]}


def _answer(text: str) -> dict:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def _split_placeholders(text: str) -> list[dict]:
    """Cut at each <image>; white space around a placeholder goes, so that all formats give the same tokens."""
    pieces = text.split("<image>")
    if len(pieces) == 1:
        return [{"type": "text", "text": text}]
    parts = []
    for number, piece in enumerate(pieces):
        parts += [{"type": "image"}] * (number > 0)
        parts += [{"type": "text", "text": piece.strip()}] * bool(piece.strip())
    return parts


def _image_list(value) -> list[str]:
    images = value if isinstance(value, list) else [value]
    if not all(isinstance(image, str) and image for image in images):
        raise ValueError(f"an image must be a file name, found {value!r}")
    return images


def _list_of_dicts(value, name: str) -> list[dict]:
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        raise ValueError(f"`{name}` must be a list of objects")
    return value


def _check_image_count(parts: list[dict], images: list[str]) -> None:
    count = sum(part["type"] == "image" for part in parts)
    if count != len(images):
        raise ValueError(f"{count} image placeholders for {len(images)} images")


def _check_turns(messages: list[dict]) -> None:
    """After an optional system turn, user and assistant alternate, and every assistant turn says something."""
    turns = messages[1:] if messages[0]["role"] == "system" else messages
    roles = [message["role"] for message in turns]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise ValueError(f"turns must alternate user, assistant and end with an answer, found: {', '.join(roles)}")
    for message in turns[1::2]:
        if any(part["type"] == "image" for part in message["content"]):
            raise ValueError("an answer can't hold an image")
        if not _text_of(message).strip():
            raise ValueError("no answer: an assistant turn is empty")


def _text_of(message: dict) -> str:
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")
