"""Fields of a row, of its turns and of their parts: which names mean a picture, which can't be used, and what is left
over when all that is known has been read."""

import re
from dataclasses import dataclass, field
from functools import lru_cache

from common import quote

# Names are compared in lower case and without spaces, hyphens and underscores: see `plain`.
PICTURE = re.compile(r"(image|img|picture|photo|figure)s?(file|path|name|filename|filepath|list)?s?|filenames?")
PICTURE_ID = re.compile(r"(image|img|picture|photo|figure)(id|url|uri)s?")  # read where no PICTURE field is filled
FILM = re.compile(r"(video|audio)s?(file|path|name|filename|filepath|url)?s?")
WEIGHTS = ("weight", "loss", "loss_scale")  # of a turn or a row: what its answers count in the loss
SOURCES = ("path", "filename", "url", "uri")  # of a picture that is written as an object

PREFERENCE = "there is no preference training: leave the field out, and the rows that are not to be learned"
TOOLS = "there are no tool calls: write them out in the texts, and leave the field out"
REFUSED = dict.fromkeys(("chosen", "chosenresponse", "rejected", "rejectedresponse", "rejectedmessages"), PREFERENCE)
REFUSED |= dict.fromkeys(("rejectedconversations", "rejectedimages", "margin", "ktotag"), PREFERENCE)
REFUSED |= dict.fromkeys(("tools", "toolcalls", "toolcallid", "functions", "functioncall"), TOOLS)
REFUSED |= {"history": "earlier questions and answers belong into `messages`, as turns of their own"}
REFUSED |= dict.fromkeys(("reasoningcontent", "thinking"), "write it into the text of the answer, or leave it out")
REFUSED_IN_TURNS = dict.fromkeys(("train", "training", "traindetail"), "use `loss`: true or false")
REFUSED_IN_TURNS |= dict.fromkeys(("system", "systemprompt"), "write it as a field of the row, or as a system turn")
REFUSED_IN_PARTS = dict.fromkeys(("weight", "loss", "lossscale"), "it belongs to the turn, which has one for all parts")
REFUSED_IN_PARTS |= {"text": "an image part holds no text: give the text a part of its own"}
# What says nothing of question or answer: docs/rows.md lists them.
IGNORED = set("index idx qid questionid answerid annotationid source split subset dataset datasetname category".split())
IGNORED |= set(
    "subcategory difficulty answertype answerconfidence annotator license language lang width height".split()
)
IGNORED |= set("imagewidth imageheight version timestamp createdat unnamed:0".split()) | {""}

URL = re.compile(r"(https?|ftp|s3|gs|hf)://", re.I)
PICTURE_URL = re.compile(r"https?://\S+\.(png|jpe?g|webp|gif|bmp|tiff?)\b", re.I)
BASE64 = re.compile(r"data:[\w.+-]+/[\w.+-]+[;,]|(iVBORw0KGgo|/9j/|R0lGOD|UklGR|Qk0)[\w+/=\s]{40}")
# What other programs replace by a picture, a video or a sound, in the forms that real files have. Tokens of the model
# are none of them.
MEDIA = r"(?:images?|imgs?|pictures?|videos?|audios?)"
PLACEHOLDER = re.compile(
    rf"(?-i:(?!<\|(?:image|video)_pad\|>))<\s*[|/]?\s*(?:[a-z]+_)*{MEDIA}(?:here|pad|token)?(?:[\s_:#|/\d=.-][^<>]*)?>"
    rf"|\[\s*{MEDIA}[\s_:#-]*\d*\s*\]|\{{\s*{MEDIA}[\s_]*\d*\s*\}}|</?im_patch>|</?bbox>|</?ref-object>",
    re.IGNORECASE,
)


@lru_cache(10_000)
def plain(name: str) -> str:
    """A field's name as it is compared: image_path, "Image Path" and imagePath are one."""
    return re.sub(r"[\s_-]", "", name).lower()


def is_filled(value) -> bool:
    """Whether a field says anything: null, an empty or blank text, [] and {} do not."""
    return bool(value.strip()) if isinstance(value, str) else value is not None and value != [] and value != {}


class Fields:
    """An object of a row, which remembers what has been read of it. Only filled fields count, see `is_filled`.

    Raises ValueError for two fields of the same name in different spellings, with different values.
    """

    def __init__(self, value: dict):
        self.unread, self.empty = {}, {}  # plain name -> (name as written, value), and -> value
        for name, content in value.items():
            if not is_filled(content):
                self.empty[plain(name)] = content
                continue
            first, earlier = self.unread.setdefault(plain(name), (name, content))
            if earlier != content:
                raise ValueError(f"`{first}` and `{name}` are the same field and differ")

    def names(self) -> list[str]:
        """The names of the fields that have not been read, as written."""
        return [name for name, _ in self.unread.values()]

    def value(self, name: str):
        """The value of a field that has not been read, and that stays so; None where it is not filled."""
        return self.unread.get(plain(name), (name, None))[1]

    def take(self, name: str):
        """The value of a field; None where it is not filled."""
        return self.unread.pop(plain(name), (name, None))[1]

    def take_matching(self, pattern: re.Pattern) -> dict[str, object]:
        """The values of all fields whose plain names match, by their names as written."""
        return dict(self.unread.pop(name) for name in [*filter(pattern.fullmatch, self.unread)])


@dataclass(slots=True)
class Unread:
    """What nothing reads in a row."""

    fields: list[str] = field(default_factory=list)  # their names, as messages.NAME for those of turns
    texts: list[tuple[str, str]] = field(default_factory=list)  # (field, text): texts that may name a picture

    def add(self, fields: Fields, place: str = "", shows_picture: bool = True) -> None:
        """Add all that has not been read of an object of the row; `place` is "" for the row itself, `messages` for a
        turn, `messages.content` for a part. Raises ValueError for what may not go unread: fields that change the
        meaning, pictures, videos and audio."""
        refused = REFUSED | (REFUSED_IN_PARTS if "." in place else REFUSED_IN_TURNS if place else {})
        for name, (written, value) in fields.unread.items():
            if value in ("[]", "{}"):  # JSON text of nothing
                continue
            shown = f"`{written}`" + f" of `{place}`" * bool(place)
            if name in refused or (name == "label" and value is False):
                raise ValueError(f"{shown} can't be used: {refused.get(name, PREFERENCE)}")
            if FILM.fullmatch(name) and value is not False:
                raise ValueError(f"{shown}: a video or audio can't be used, only images")
            if place and PICTURE.fullmatch(name):
                raise ValueError(f"{shown} is not read there: name the picture in the row's own `images`")
            self._add_texts(written, value, only_files=name in IGNORED, may_be_url=shows_picture)
            if name not in IGNORED and not PICTURE_ID.fullmatch(name):
                self.fields.append(f"{place}.{written}" if place else written)

    def _add_texts(self, written: str, value, only_files: bool, may_be_url: bool) -> None:
        for text in texts_in(value):
            if BASE64.match(text) or (PICTURE_URL.match(text) and not may_be_url):
                raise ValueError(
                    f"`{written}` holds a picture, which is not read there: save it as a file and name that in `image`"
                )
            if "." in text or not only_files:
                self.texts.append((written, text))


def texts_in(value):
    """Yield all texts in a value, whatever lists and objects they stand in; names of fields are texts too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for item in [*value, *value.values()] if isinstance(value, dict) else value:
            yield from texts_in(item)


def file_names(name: str, value) -> list[str]:
    """The file names that a field gives, one or a list. Raises ValueError for anything else."""
    return [_file_name(name, item) for item in (value if isinstance(value, list) else [value])]


def _file_name(name: str, value) -> str:
    remedy = "save the picture as a file and give its name"
    if isinstance(value, dict) and not is_filled(value.get("bytes")):  # as the hub's data sets write pictures
        value = next((value[key] for key in value if plain(key) in SOURCES and isinstance(value[key], str)), value)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"`{name}`: an image must be a file name, found {quote(value)}: {remedy}")
    if URL.match(value):
        raise ValueError(f"`{name}`: an image must be a file name, not the URL {quote(value)}: {remedy}")
    if BASE64.match(value):
        raise ValueError(f"`{name}`: an image must be a file name, not base64 {quote(value[:20])}: {remedy}")
    return value.removeprefix("file://")
