"""Rows of visual question answering, in the three formats people have, turned into one: a conversation with images.

Formats are told apart by their fields (docs/rows.md shows an example of each):
flat (`question`, `answer`), LLaVA (`conversations`) and messages (`messages`). Files are JSON arrays or JSON lines.
"""

import codecs
import json
import re
from dataclasses import dataclass
from pathlib import Path

from common import InputError

IMAGE_KEYS = ("image", "images")
FLAT_IMAGE_KEYS = (*IMAGE_KEYS, "image_filename", "image_id")
LLAVA_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
MAX_LISTED = 50  # bad rows listed on the console; bad_rows.jsonl has all of them
REST_UNREAD = "the rest of the file was not read"


@dataclass
class Row:
    """One usable row: `images` are as the row names them, in the order of the image parts of `messages`."""

    where: str  # file:line, with the row's number where rows share a line
    messages: list[dict]  # {"role", "content": [{"type": "text", "text"} or {"type": "image"}]}
    images: list[str]
    fields: dict  # question, answer, and id, question_type, options where the row has them
    weight: float = 1.0  # of its answers' tokens in the loss
    file: int = 0  # number of its file, where several are read

    def refused(self, reason: ValueError | str) -> "BadRow":
        return BadRow(self.where, str(reason), self.fields, self.file)


@dataclass
class BadRow:
    where: str
    reason: str
    row: object = None  # the parsed row, or its text where it is not JSON
    file: int = 0

    def place(self) -> tuple[int, list[int]]:
        """Sorts bad rows as they stand in their files."""
        return self.file, [int(number) for number in self.where.rpartition(":")[2].split(" row ")]


def read_rows(path: Path, shown_as: str = "") -> tuple[list[Row], list[BadRow]]:
    """Read every row of a JSON array or JSON-lines file; what can't be used comes back with its line and reason."""
    name = shown_as or path.name
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"rows {path}: {error.strerror}") from None
    good, bad = [], []
    for place, value, error in _json_values(raw.removeprefix(codecs.BOM_UTF8)):
        where = f"{name}:{place}"
        try:
            if error:
                raise ValueError(error)
            good.append(parse_row(where, value))
        except ValueError as reason:
            bad.append(BadRow(where, str(reason), value))
    if not good and not bad:
        bad.append(BadRow(f"{name}:1", "no rows in the file"))
    return good, bad


def stop_or_skip_bad(
    bad: list[BadRow], files: list[str], usable: set[int], skip_bad: bool, output: Path | None
) -> None:
    """Write every bad row to output/bad_rows.jsonl. `usable` are the numbers of the files that have a usable row.

    Raises InputError that lists the bad rows, unless `skip_bad` allows the run to go on without them.
    """
    file = output / "bad_rows.jsonl" if output else None
    if file:
        _write_bad_rows(file, bad, files)
    if not bad:
        return
    listed = "".join(f"\n  {row.where}: {row.reason}" for row in bad[:MAX_LISTED])
    if len(bad) > MAX_LISTED:
        listed += f"\n  and {len(bad) - MAX_LISTED:,} more" + (f", see {file}" if file else "")
    if empty := [path for number, path in enumerate(files) if number not in usable]:
        raise InputError(f"{', '.join(empty)}: no usable row{listed}")
    if not skip_bad:
        raise InputError(f"{len(bad):,} rows can't be used (--skip-bad goes on without them):{listed}")


def _write_bad_rows(file: Path, bad: list[BadRow], files: list[str]) -> None:
    if not bad:
        file.unlink(missing_ok=True)  # of a start before the rows were mended
        return
    with open(file, "w", encoding="utf-8", errors="backslashreplace") as out:
        for row in bad:
            line = {"file": files[row.file], "where": row.where, "reason": row.reason, "row": row.row}
            out.write(json.dumps(line, ensure_ascii=False) + "\n")


def _json_values(raw: bytes):
    """Yield (place, value, None) for each row, or (place, text, error) where it is not JSON. A place is a line, and in
    an array the number of the row where its line has several."""
    if _is_array(raw):
        yield from _array_values(raw)
        return
    for number, line in enumerate(raw.split(b"\n"), start=1):
        if line.strip():
            try:
                yield str(number), STRICT.decode(line.decode()), None
            except json.JSONDecodeError as error:
                yield str(number), line.decode(), f"not valid JSON: {error.msg} at column {error.colno}"
            except (ValueError, RecursionError) as error:
                yield str(number), line.decode(errors="replace"), f"not valid JSON: {error}"


def _is_array(raw: bytes) -> bool:
    """Whether a file is one array; JSON lines may start with a bad row that is a whole list."""
    first, _, rest = raw.strip().partition(b"\n")
    if not first.startswith(b"["):
        return False
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return True
    return not rest


def _array_values(raw: bytes):
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        yield str(raw[: error.start].count(b"\n") + 1), None, f"not UTF-8 text: {error.reason}; {REST_UNREAD}"
        return
    separator = re.compile(r"\s*(,?)\s*")
    at = text.index("[") + 1
    number, line, counted = 0, 1, 0
    while True:
        found = separator.match(text, at)
        at, ended = found.end(), text.startswith("]", found.end())
        new_lines, counted = text.count("\n", counted, at), at
        number, line = number + 1, line + new_lines
        place = str(line) if new_lines or number == 1 else f"{line} row {number}"
        if bool(found[1]) != (number > 1 and not ended):
            problem = "no comma before this" if number > 1 and not ended else "a comma too many"
            yield place, text[at : at + 80], f"not valid JSON: {problem}; {REST_UNREAD}"
            return
        if ended:
            if text[at + 1 :].strip():
                yield place, text[at + 1 : at + 81], f"the array ends here, but text follows; {REST_UNREAD}"
            return
        try:
            value, at = STRICT.raw_decode(text, at)
            yield place, value, None
        except (ValueError, RecursionError) as error:
            start = at
            try:  # where the end of the row can be found all the same, as after NaN, go on there
                at = json.JSONDecoder(strict=False).raw_decode(text, at)[1]
            except (ValueError, RecursionError):
                yield place, text[start : start + 80], f"not valid JSON: {error}; {REST_UNREAD}"
                return
            yield place, text[start:at], f"not valid JSON: {error}"


def _refuse_constant(name: str):
    raise ValueError(f"{name} is not a JSON value")


STRICT = json.JSONDecoder(parse_constant=_refuse_constant)


def parse_row(where: str, row) -> Row:
    """A row of any format, read from the place `where`. Raises ValueError of what is wrong with it."""
    if not isinstance(row, dict):
        raise ValueError(f"a row must be a JSON object, not {type(row).__name__}")
    json.dumps(row, ensure_ascii=False, allow_nan=False).encode()  # raises for half a surrogate pair and for 1e999
    if row.get("video") or row.get("videos"):
        raise ValueError("a video can't be used, only images")
    if row.get("objects") and any(mark in json.dumps(row) for mark in ("<bbox>", "<ref-object>")):
        raise ValueError("`objects` does not fill <bbox> and <ref-object> here: write them out in the texts")
    if row.get("messages") is not None:
        messages, images = _from_messages(row)
    elif row.get("conversations") is not None:
        messages, images = _from_llava(row)
    elif "question" in row:
        messages, images = _from_flat(row)
    else:
        raise ValueError(f"no question, conversations or messages field among: {', '.join(row) or 'no fields at all'}")
    _check_turns(messages)
    _check_options(row.get("options"))
    kept = {key: row[key] for key in ("id", "question_type", "options") if row.get(key) is not None}
    fields = {"id": where, **kept, "question": _text_of(messages[-2]), "answer": _text_of(messages[-1])}
    return Row(where, messages, images, fields, _weight_of(row))


def _from_flat(row: dict) -> tuple[list[dict], list[str]]:
    images = _images_of(row, FLAT_IMAGE_KEYS)
    question, answer = row["question"], row.get("answer")
    if not isinstance(question, str) or not question.strip():
        raise ValueError("the question is empty or not a string")
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise ValueError("no answer" if answer is None else f"the answer is a {type(answer).__name__}, not a string")
    parts = _split_placeholders(question)
    if not any(part["type"] == "image" for part in parts):
        parts = [{"type": "image"}] * len(images) + parts
    _check_image_count(sum(part["type"] == "image" for part in parts), images)
    return [{"role": "user", "content": parts}, _turn("assistant", str(answer))], images


def _from_llava(row: dict) -> tuple[list[dict], list[str]]:
    images = _images_of(row, IMAGE_KEYS)
    messages = []
    for turn in _list_of_dicts(row["conversations"], "conversations"):
        role = LLAVA_ROLES.get(str(turn.get("from")))
        if role is None or not isinstance(turn.get("value"), str):
            raise ValueError(f"a turn needs `from` (human, gpt or system) and a text `value`, found {turn}")
        messages.append(_turn(role, turn["value"]))
    _check_image_count(sum(part["type"] == "image" for turn in messages for part in turn["content"]), images)
    return messages, images


def _from_messages(row: dict) -> tuple[list[dict], list[str]]:
    listed = _images_of(row, IMAGE_KEYS)
    images, messages = [], []
    for message in _list_of_dicts(row["messages"], "messages"):
        role, content = message.get("role"), message.get("content")
        if role not in ("system", "user", "assistant"):
            raise ValueError(f"unknown role {role!r}; known: system, user, assistant")
        parts = _turn(role, content)["content"] if isinstance(content, str) else _typed_parts(role, content)
        images += [part.pop("image", None) for part in parts if part["type"] == "image"]
        messages.append({"role": role, "content": parts})
    _check_image_count(sum(not image for image in images), listed)
    waiting = iter(listed)
    return messages, [image or next(waiting) for image in images]


def _typed_parts(role: str, content) -> list[dict]:
    parts = []
    for part in _list_of_dicts(content, "content"):
        if part.get("type") == "text" and isinstance(part.get("text"), str):
            parts += _turn(role, part["text"])["content"]
        elif part.get("type") == "image" and isinstance(part.get("image"), str | None):
            parts.append({"type": "image", "image": part.get("image")})
        else:
            raise ValueError(f"a content part must be of type text or image, found {part}")
    return parts


def _turn(role: str, text: str) -> dict:
    return {"role": role, "content": _split_placeholders(text) if role == "user" else [{"type": "text", "text": text}]}


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


def _images_of(row: dict, keys: tuple[str, ...]) -> list[str]:
    value = next((row[key] for key in keys if row.get(key) not in (None, [])), [])
    images = value if isinstance(value, list) else [value]
    if not all(isinstance(image, str) and image for image in images):
        raise ValueError(f"an image must be a file name, found {value!r}")
    return images


def _list_of_dicts(value, name: str) -> list[dict]:
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        raise ValueError(f"`{name}` must be a list of objects")
    return value


def _check_image_count(count: int, images: list[str]) -> None:
    if count != len(images):
        raise ValueError(f"{count} image placeholders for {len(images)} images")


def _check_turns(messages: list[dict]) -> None:
    """After an optional system turn, user and assistant alternate. Each says something, and only users show images."""
    turns = messages[1:] if messages[0]["role"] == "system" else messages
    roles = [message["role"] for message in turns]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise ValueError(f"turns must alternate user, assistant and end with an answer, found: {', '.join(roles)}")
    for message in messages:
        if message["role"] != "user" and any(part["type"] == "image" for part in message["content"]):
            raise ValueError(f"only a question can hold an image, found one in a turn of role {message['role']}")
    for message in turns:
        if not _text_of(message).strip():
            raise ValueError(f"no {'question' if message['role'] == 'user' else 'answer'}: a turn has no text")


def _weight_of(row: dict) -> float:
    weight = 1 if row.get("weight") is None else row["weight"]
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 1e-6 <= weight <= 1e6:
        raise ValueError(f"`weight` must be a number from 1e-6 to 1e6, found {str(weight)[:20]!r}")
    return float(weight)


def _check_options(options) -> None:
    texts = options if isinstance(options, list) else [None]
    if options is not None and not (all(isinstance(text, str) and text.strip() for text in texts) and len(texts) > 1):
        raise ValueError("`options` must be a list of two or more texts")
    if options is not None and len(set(options)) < len(options):
        raise ValueError("`options` names a text twice")


def _text_of(message: dict) -> str:
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")
