"""Rows of visual question answering in three common formats, each turned into a conversation with images.

A row's fields tell its format: flat (`question`, `answer`), LLaVA (`conversations`) or messages (`messages`);
docs/rows.md shows an example of each. Whatever is not read of a row is told, or is a reason to refuse it.
"""

import html
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from common import quote
from inputs.fields import PICTURE, PICTURE_ID, PLACEHOLDER, URL, WEIGHTS, Fields, Unread, file_names, plain, texts_in
from inputs.options import take_answer, take_answers, take_options

ROLES = {role: role for role in ("system", "user", "assistant")} | {"human": "user", "gpt": "assistant"}
PARTS_OF_QUESTIONS = ("instruction", "input", "prompt", "query")  # by other programs, and not read here
ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False)
LEAST, MOST = 1e-6, 1e6  # weights other than 0
IMAGE_EXTENSION = re.compile(r"\.(png|jpe?g|webp|bmp|gif|tiff?)$", re.I)
# Pictures in a text that other programs would show: ![a polyp](a.png)
MARKDOWN_PICTURE = re.compile(r"!\[[^\]\n]*\]\(\s*([^)\s]+)[^)\n]*\)")


@dataclass(slots=True)
class Row:
    """One usable row."""

    id: str  # its own, or its place
    where: str  # file:line, and the row's number where several rows share a line
    messages: list[dict]  # {"role", "content": [{"type": "text", "text"} or {"type": "image"}]}; an assistant's has
    # "weight" too, that of its tokens in the loss: its turn's times the row's, 0 where it is not trained
    images: list[str]  # as the row names them, in the order of the image parts of `messages`
    fields: dict  # question, answer; question_type, options, answers and by (see `parse_row`) where the row has them
    written: bytes  # the row as its file has it, as JSON: a third of the memory of its objects
    file: int = 0  # number of its file
    unread: Unread = field(default_factory=Unread)  # fields that nothing reads

    def refused(self, reason: ValueError | str) -> "BadRow":
        return BadRow(self.where, str(reason), json.loads(self.written), self.file, getattr(reason, "missing", ""))


@dataclass(slots=True)
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


def parse_row(where: str, row, by: Iterable[str] = ()) -> Row:
    """A row of any format, read from the place `where`. Its own fields that `by` names are kept as they are, in the
    field `by`. Raises ValueError that says what is wrong with it."""
    if not isinstance(row, dict):
        raise ValueError(f"a row must be a JSON object, not {type(row).__name__}")
    written = ENCODER.encode(row).encode()  # raises for half a surrogate pair and for 1e999
    row, unread = Fields(row), Unread()
    own = {name: value for name in by if (value := row.value(name)) is not None}
    own_id, kept = row.take("id"), {"question_type": row.take("question_type")}
    options, weight, system = take_options(row), _take_weight(row), _take_system(row)
    messages, accepted = _conversation(row, options, unread)
    messages = _with_system(messages, system)
    texts = [_text_of(message) for message in messages]
    _check_turns(messages, texts)
    images = _place_images(row, messages, unread)
    _weigh(messages, weight)
    _refuse_placeholders(messages, texts, options or {})
    unread.add(row, shows_picture=bool(images))
    unread.fields = [name for name in unread.fields if plain(name) not in map(plain, own)]
    unread.texts += [("text", name) for text in texts for name in MARKDOWN_PICTURE.findall(text)]
    unread.texts += [("id", name) for name in texts_in(own_id) if "." in name]
    kept |= {"options": list(options.values()) if options else None, "answers": accepted or None, "by": own or None}
    kept = {name: value for name, value in kept.items() if value is not None}
    fields = {**kept, "question": texts[-2], "answer": texts[-1]}
    row_id = where if own_id is None else str(own_id)
    return Row(row_id, where, messages, images, fields, written, unread=unread)


def each_answer(row: Row) -> list[Row]:
    """A row for each trained answer of a conversation, which is the row's last turn. The last row keeps the id and the
    fields; the id of an earlier one ends in its number, as in 7#1."""
    trained = [number for number, message in enumerate(row.messages) if message.get("weight")]
    rows = []
    for place, number in enumerate(trained, 1):
        messages = row.messages[: number + 1]
        shown = sum(part["type"] == "image" for message in messages for part in message["content"])
        part = replace(row, messages=messages, images=row.images[:shown])
        if number < len(row.messages) - 1:  # other answers and options are of the last question
            asked = {"question": _text_of(messages[-2]), "answer": _text_of(messages[-1])}
            part.fields = {name: row.fields[name] for name in ("question_type", "by") if name in row.fields} | asked
        if place < len(trained):
            part.id, part.unread = f"{row.id}#{place}", Unread()  # what nothing reads is told once
        rows.append(part)
    return rows


def _conversation(row: Fields, options: dict | None, unread: Unread) -> tuple[list[dict], list[str]]:
    """A row's messages, and all answers that it accepts to the last question."""
    names = row.names()
    turns = {name: value for name in ("messages", "conversations") if (value := row.take(name)) is not None}
    if len(turns) == 2:
        raise ValueError("both `messages` and `conversations`: leave one of them out")
    for name, value in turns.items():
        return [_from_turn(turn, name, unread) for turn in _list_of_dicts(value, name)], take_answers(row)
    if "question" in row.unread:
        return _from_flat(row, options, unread)
    for name in ("question", "messages", "conversations"):
        if name in row.empty:
            raise ValueError(f"the {name} is empty" if name == "question" else f"`{name}` is empty")
    listed = quote(", ".join(names))[1:-1] or "no fields at all"
    raise ValueError(f"no question, conversations or messages field among: {listed}")


def _from_flat(row: Fields, options: dict | None, unread: Unread) -> tuple[list[dict], list[str]]:
    question = row.take("question")
    if not isinstance(question, str):
        raise ValueError(f"the question is a {type(question).__name__}, not a string")
    for name in PARTS_OF_QUESTIONS:
        if (more := row.take(name)) is not None and more != question:
            raise ValueError(f"`{name}` is not read beside `question`: write the whole question there")
    answer, accepted = take_answer(row, options)
    asked = _message("user", question)
    if not any(part["type"] == "image" for part in asked["content"]):
        images = _take_images(row, unread, with_ids=True)
        asked["content"][:0] = [{"type": "image", "image": name} for name in images]
    return [asked, _message("assistant", answer)], accepted


def _from_turn(turn: dict, name: str, unread: Unread) -> dict:
    """A message from a turn in LLaVA's or in the messages format. None of its texts is empty but where it has none."""
    turn = Fields(turn)
    written = turn.take("role" if "role" in turn.unread else "from")
    role = ROLES.get(written.lower()) if isinstance(written, str) else None
    if role is None:
        raise ValueError(f"unknown role {quote(written)}; known: system, user (or human), assistant (or gpt)")
    content = turn.take("content" if "content" in turn.unread else "value")
    weight = _take_weight(turn, role)
    if content is None or isinstance(content, str):
        message = _message(role, content or "")
    else:
        message = {"role": role, "content": _typed_parts(role, content, f"{name}.content", unread)}
    unread.add(turn, name)
    return message | {"weight": weight}


def _typed_parts(role: str, content, place: str, unread: Unread) -> list[dict]:
    parts = []
    for part in _list_of_dicts(content, "content"):
        part = Fields(part)
        kind = part.take("type") or next((name for name in ("text", "image") if name in part.unread), None)
        has_text = "text" in part.unread or "text" in part.empty
        if kind == "text" and has_text and isinstance(text := part.take("text") or part.empty.get("text"), str | None):
            parts += _message(role, text or "")["content"]
        elif kind in ("image", "image_url"):
            parts.append({"type": "image", "image": _take_part_image(part)})
        else:
            found = quote(kind or ", ".join(part.names()))
            raise ValueError(f"a content part must be of type text or image, and hold it, found {found}")
        unread.add(part, place)
    return parts


def _take_part_image(part: Fields) -> str | None:
    """The image that a part names; None: the next one of the row's list."""
    named = part.take_matching(PICTURE) | part.take_matching(PICTURE_ID)
    named |= {name: value for name in ("path", "url") if (value := part.take(name)) is not None}
    names = {name for field, value in named.items() for name in file_names(field, value)}
    if len(names) > 1:
        raise ValueError(f"an image part names several images: {quote(sorted(names))}")
    return next(iter(names), None)


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


def _take_system(row: Fields) -> str | None:
    prompts = [value for name in ("system", "system_prompt") if (value := row.take(name)) is not None]
    if not all(isinstance(prompt, str) and prompt == prompts[0] for prompt in prompts):
        raise ValueError(f"`system` must be one text, found {quote(prompts[-1])}")
    return prompts[0] if prompts else None


def _with_system(messages: list[dict], system: str | None) -> list[dict]:
    """The messages with the row's own system prompt, if it has one, as their first turn."""
    if system is None:
        return messages
    if messages[0]["role"] != "system":
        return [_message("system", system), *messages]
    if _text_of(messages[0]) != system:
        raise ValueError("`system` and the system turn differ: leave one of them out")
    return messages


def _list_of_dicts(value, name: str) -> list[dict]:
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        raise ValueError(f"`{name}` must be a list of objects")
    return value


def _text_of(message: dict) -> str:
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")


# -------------------------------------------------------------------------------------------------------------- images


def _place_images(row: Fields, messages: list[dict], unread: Unread) -> list[str]:
    """The names of the images in the order of the messages' image parts, which lose their own: a part names its image
    or takes the next one of the row's list. Raises ValueError where the two don't fit."""
    parts = [part for message in messages for part in message["content"] if part["type"] == "image"]
    names = [part.pop("image", None) for part in parts]
    listed = _take_images(row, unread, with_ids=not any(names))
    placeholders = names.count(None)
    if listed == names:  # the row lists what its parts name
        return listed
    if placeholders != len(listed):
        remedy = "a question needs one <image> for each"
        raise ValueError(f"{placeholders} image placeholders for {len(listed)} images: {remedy}")
    unnamed = iter(listed)
    return [name or next(unnamed) for name in names]


def _take_images(row: Fields, unread: Unread, with_ids: bool) -> list[str]:
    """The images that a row's own fields name, `image` before others. Those `with_ids` may be in fields such as
    `image_id`, which are read only where no other names an image. Raises ValueError where two fields differ."""
    given = row.take_matching(PICTURE)
    if not given and with_ids:
        given = row.take_matching(PICTURE_ID)
        given = {name: value for name, value in given.items() if not URL.match(str(value))} or given
    images = {name: file_names(name, value) for name, value in given.items()}
    if not images:
        return []
    first, *others = sorted(
        images, key=lambda name: (plain(name) not in ("image", "images"), "path" not in plain(name))
    )
    for other in others:
        if list(map(_stem, images[other])) != list(map(_stem, images[first])):
            both = f"{quote(images[first])[1:-1]} and {quote(images[other])[1:-1]}"
            raise ValueError(f"`{first}` and `{other}` name different images, {both}: leave one of them out")
        unread.texts += [(other, name) for name in images[other]]
    return images[first]


def _stem(name: str) -> str:
    """An image's name without its folder, on any system, and its extension: fields differ in them."""
    return IMAGE_EXTENSION.sub("", re.split(r"[/\\]", name)[-1])


# -------------------------------------------------------------------------------------------------------------- checks


def _check_turns(messages: list[dict], texts: list[str]) -> None:
    """After an optional system turn, user and assistant alternate. Each turn has text, and only users show images."""
    turns = messages[1:] if messages[0]["role"] == "system" else messages
    roles = [message["role"] for message in turns]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        found = quote(", ".join(roles))
        raise ValueError(f"turns must alternate user, assistant and end with an answer, found: {found}")
    for message in messages:
        if message["role"] != "user" and any(part["type"] == "image" for part in message["content"]):
            raise ValueError(f"only a question can hold an image, found one in a turn of role {message['role']}")
    for message, text in zip(turns, texts[-len(turns) :]):
        if not text.strip():
            raise ValueError(f"no {'question' if message['role'] == 'user' else 'answer'}: a turn has no text")


def _refuse_placeholders(messages: list[dict], texts: list[str], options: dict[str, str]) -> None:
    """Raises ValueError for what looks like the place of a picture, video or sound in a text, as nothing fills it."""
    named = [(f"{message['role']} text", text) for message, text in zip(messages, texts)]
    for name, text in [*named, *(("option", option) for option in options.values())]:
        if match := PLACEHOLDER.search(html.unescape(text)):
            remedy = "a question shows each of its images by <image>, take out all others"
            raise ValueError(f"the {name} holds {quote(match[0])}, a placeholder that nothing fills: {remedy}")


def _take_weight(place: Fields, role: str = "row") -> float | None:
    """The weight that a row or a turn of this role gives its answers, the product of its WEIGHTS; none: None."""
    given = {name: value for name in WEIGHTS if (value := place.take(name)) is not None}
    given |= {name: value for name in WEIGHTS if (value := place.empty.get(plain(name))) in ([], {})}
    for name, value in given.items():
        is_switch = isinstance(value, bool) and name == "loss"
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_switch and not (is_number and (value == 0 or LEAST <= value <= MOST)):
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
