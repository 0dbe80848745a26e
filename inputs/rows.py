"""Rows of visual question answering in three common formats, each turned into a conversation with images.

A row's fields tell its format: flat (`question`, `answer`), LLaVA (`conversations`) or messages (`messages`);
docs/rows.md shows an example of each.
"""

import json
import math
from dataclasses import dataclass

from common import quote

IMAGE_KEYS = ("image", "images")
FLAT_IMAGE_KEYS = (*IMAGE_KEYS, "image_filename", "image_id")
ROLES = ("system", "user", "assistant")
WEIGHTS = ("weight", "loss", "loss_scale")  # of a turn or a row: what its answers count in the loss
LEAST, MOST = 1e-6, 1e6  # weights other than 0
LLAVA_ROLES = {role: role for role in ROLES} | {"human": "user", "gpt": "assistant"}


@dataclass
class Row:
    """One usable row."""

    where: str  # file:line, and the row's number where several rows share a line
    messages: list[dict]  # {"role", "content": [{"type": "text", "text"} or {"type": "image"}]}; an assistant's has
    # "weight" too, that of its tokens in the loss: its turn's times the row's, 0 where it is not trained
    images: list[str]  # as the row names them, in the order of the image parts of `messages`
    fields: dict  # id, question, answer; question_type and options where the row has them
    file: int = 0  # number of its file
    written: object = None  # the row as its file has it

    def refused(self, reason: ValueError | str) -> "BadRow":
        return BadRow(self.where, str(reason), self.written, self.file, getattr(reason, "missing", ""))


@dataclass
class BadRow:
    where: str
    reason: str
    row: object = None  # the parsed row, or its text where it is not JSON
    file: int = 0
    missing: str = ""  # the image that it names and that is not there

    def place(self) -> tuple[int, list[int]]:
        """A sort key: the order of files, and of rows in each."""
        return self.file, [int(number) for number in self.where.rpartition(":")[2].split(" row ")]


# ------------------------------------------------------------------------------------------------------------- formats


def parse_row(where: str, row) -> Row:
    """A row of any format, read from the place `where`. Raises ValueError that says what is wrong with it."""
    _check_fields(row)
    messages, images = _conversation(row)
    _check_turns(messages)
    _weigh(messages, _weight_of(row, "row"))
    _check_options(row.get("options"))
    kept = {key: row[key] for key in ("id", "question_type", "options") if row.get(key) is not None}
    fields = {"id": where, **kept, "question": _text_of(messages[-2]), "answer": _text_of(messages[-1])}
    return Row(where, messages, images, fields)


def _check_fields(row) -> None:
    if not isinstance(row, dict):
        raise ValueError(f"a row must be a JSON object, not {type(row).__name__}")
    json.dumps(row, ensure_ascii=False, allow_nan=False).encode()  # raises for half a surrogate pair and for 1e999
    if row.get("video") or row.get("videos"):
        raise ValueError("a video can't be used, only images")
    if row.get("objects") and any(mark in json.dumps(row) for mark in ("<bbox>", "<ref-object>")):
        raise ValueError("`objects` does not fill <bbox> and <ref-object> here: write them out in the texts")


def _conversation(row: dict) -> tuple[list[dict], list[str]]:
    """A row's messages and the names of its images, in the order of the image parts."""
    if row.get("messages") is not None:
        listed, messages = _images_of(row, IMAGE_KEYS), _from_messages(row)
    elif row.get("conversations") is not None:
        listed, messages = _images_of(row, IMAGE_KEYS), _from_llava(row)
    elif "question" in row:
        listed = _images_of(row, FLAT_IMAGE_KEYS)
        messages = _from_flat(row, len(listed))
    else:
        raise ValueError(
            f"no question, conversations or messages field among: {quote(', '.join(row)) if row else 'none'}"
        )
    # An image part names its image or takes the next one of the row's own list.
    parts = [part for message in messages for part in message["content"] if part["type"] == "image"]
    names = [part.pop("image", None) for part in parts]
    placeholders = sum(not name for name in names)
    if placeholders != len(listed):
        raise ValueError(f"{placeholders} image placeholders for {len(listed)} images")
    unnamed = iter(listed)
    return messages, [name or next(unnamed) for name in names]


def _from_flat(row: dict, images: int) -> list[dict]:
    question, answer = row["question"], row.get("answer")
    if not isinstance(question, str) or not question.strip():
        raise ValueError("the question is empty or not a string")
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise ValueError("no answer" if answer is None else f"the answer is a {type(answer).__name__}, not a string")
    asked = _message("user", question)
    if not any(part["type"] == "image" for part in asked["content"]):
        asked["content"][:0] = [{"type": "image"} for _ in range(images)]
    return [asked, _message("assistant", str(answer))]


def _from_llava(row: dict) -> list[dict]:
    messages = []
    for turn in _list_of_dicts(row["conversations"], "conversations"):
        role = LLAVA_ROLES.get(str(turn.get("from")))
        if role is None or not isinstance(turn.get("value"), str):
            raise ValueError(f"a turn needs `from` (human, gpt or system) and a text `value`, found {quote(turn)}")
        messages.append(_message(role, turn["value"]) | {"weight": _weight_of(turn, role)})
    return messages


def _from_messages(row: dict) -> list[dict]:
    messages = []
    for message in _list_of_dicts(row["messages"], "messages"):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise ValueError(f"unknown role {quote(role)}; known: {', '.join(ROLES)}")
        is_text = isinstance(content, str)
        spoken = _message(role, content) if is_text else {"role": role, "content": _typed_parts(role, content)}
        messages.append(spoken | {"weight": _weight_of(message, role)})
    return messages


def _typed_parts(role: str, content) -> list[dict]:
    parts = []
    for part in _list_of_dicts(content, "content"):
        if part.get("type") == "text" and isinstance(part.get("text"), str):
            parts += _message(role, part["text"])["content"]
        elif part.get("type") == "image" and isinstance(part.get("image"), str | None):
            parts.append({"type": "image", "image": part.get("image")})
        else:
            raise ValueError(f"a content part must be of type text or image, found {quote(part)}")
    return parts


def _message(role: str, text: str) -> dict:
    """A message whose text, if it is a user's, is cut at each <image>.

    White space around a placeholder is dropped: formats differ in it, and all of them are to give the same tokens.
    """
    if role != "user" or "<image>" not in text:
        return {"role": role, "content": [{"type": "text", "text": text}]}
    parts = []
    for piece in text.split("<image>"):
        parts += [{"type": "image"}, {"type": "text", "text": piece.strip()}]
    return {"role": role, "content": [part for part in parts[1:] if part["type"] == "image" or part["text"]]}


def _images_of(row: dict, keys: tuple[str, ...]) -> list[str]:
    value = next((row[key] for key in keys if row.get(key) not in (None, [])), [])
    images = value if isinstance(value, list) else [value]
    if not all(isinstance(image, str) and image for image in images):
        raise ValueError(f"an image must be a file name, found {quote(value)}")
    return images


def _list_of_dicts(value, name: str) -> list[dict]:
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        raise ValueError(f"`{name}` must be a list of objects")
    return value


def _check_turns(messages: list[dict]) -> None:
    """After an optional system turn, user and assistant alternate. Each turn has text, and only users show images."""
    turns = messages[1:] if messages[0]["role"] == "system" else messages
    roles = [message["role"] for message in turns]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        found = quote(", ".join(roles))
        raise ValueError(f"turns must alternate user, assistant and end with an answer, found: {found}")
    for message in messages:
        if message["role"] != "user" and any(part["type"] == "image" for part in message["content"]):
            raise ValueError(f"only a question can hold an image, found one in a turn of role {message['role']}")
    for message in turns:
        if not _text_of(message).strip():
            raise ValueError(f"no {'question' if message['role'] == 'user' else 'answer'}: a turn has no text")


def _weight_of(place: dict, role: str) -> float | None:
    """The weight that a row or a turn of this role gives its answers, the product of its WEIGHTS; none: None."""
    given = {name: place[name] for name in WEIGHTS if place.get(name) is not None}
    for name, value in given.items():
        is_switch = isinstance(value, bool) and name == "loss"
        is_number = (
            isinstance(value, int | float) and not isinstance(value, bool) and (not value or LEAST <= value <= MOST)
        )
        if not is_switch and not is_number:
            known = "true, false, 0" if name == "loss" else "0"
            raise ValueError(f"`{name}` must be {known} or a number from {LEAST:g} to {MOST:g}, found {quote(value)}")
    if role in ("system", "user") and any(given.values()):
        raise ValueError(f"`{next(iter(given))}` in a turn of role {role}: only answers are trained, remove it there")
    return math.prod(map(float, given.values())) if given else None


def _weigh(messages: list[dict], weight: float | None) -> None:
    """Give each assistant message its weight times that of the row. Raises ValueError where all are 0."""
    for message in messages:
        own = message.pop("weight", None)
        if message["role"] == "assistant":
            message["weight"] = (1.0 if own is None else own) * (1.0 if weight is None else weight)
    if not any(message.get("weight") for message in messages):
        raise ValueError("nothing of the row is trained: its `weight` or `loss` is 0")


def _check_options(options) -> None:
    if options is None:
        return
    texts = [text for text in options if isinstance(text, str) and text.strip()] if isinstance(options, list) else []
    if len(texts) < 2 or len(texts) < len(options):
        raise ValueError("`options` must be a list of two or more texts")
    if len(set(texts)) < len(texts):
        raise ValueError("`options` names a text twice")


def _text_of(message: dict) -> str:
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")
