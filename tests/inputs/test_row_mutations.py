"""1,300 mutated rows, each of which states what must become of it: used, told of, or refused by name (promise 4).

A mutation changes a good row of any of four formats in one way that real files show. `used`: the row is trained with
this conversation and nothing is said. `told`: it is trained, and a warning names it with a count. `refused`: its reason
names the cause. The random generator only chooses formats, names and values.
"""

import json
import random
from dataclasses import dataclass, field

import pytest

from training.description import data_warnings

ROWS = 23  # of each mutation
FORMS = ("flat", "LLaVA", "messages", "parts")
PICTURES = ("a.png", "b.png", "c.png", "d.png")
HARMLESS_TEXTS = ("left arm", "2024-05-01", "Dr. Who", "no", "unknown.bmp")


@dataclass
class Case:
    """A row of one format that can be mutated, and the conversation that it stands for."""

    form: str
    random: random.Random
    number: int
    images: list[str] = field(default_factory=list)
    turns: int = 1
    row: dict = field(default_factory=dict)

    def __post_init__(self):
        questions = [f"What is in part {self.number}, {turn}?" for turn in range(self.turns)]
        answers = [f"finding {self.number} {turn}" for turn in range(self.turns)]
        self.question, self.answer = questions[-1], answers[-1]
        marks = "<image>" * len(self.images)
        if self.form == "flat":
            self.row = {"question": self.question, "answer": self.answer}
        elif self.form == "LLaVA":
            texts = zip([marks + questions[0], *questions[1:]], answers)
            turns = [[{"from": "human", "value": q}, {"from": "gpt", "value": a}] for q, a in texts]
            self.row = {"conversations": sum(turns, [])}
        elif self.form == "messages":
            texts = zip([marks + questions[0], *questions[1:]], answers)
            turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in texts]
            self.row = {"messages": sum(turns, [])}
        else:
            parts = [[{"type": "text", "text": q}] for q in questions]
            parts[0] = [{"type": "image", "image": image} for image in self.images] + parts[0]
            answered = [[{"type": "text", "text": a}] for a in answers]
            turns = [
                [{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in zip(parts, answered)
            ]
            self.row = {"messages": sum(turns, [])}
        if self.images and self.form != "parts":
            self.row["images" if len(self.images) > 1 else "image"] = (
                self.images if len(self.images) > 1 else self.images[0]
            )

    @property
    def places(self) -> list[dict]:
        """The row, and the turns and parts in it: all objects that a field may stand in."""
        turns = self.row.get("conversations") or self.row.get("messages") or []
        parts = [part for turn in turns if isinstance(turn.get("content"), list) for part in turn["content"]]
        return [self.row, *turns, *parts]

    @property
    def answering(self) -> dict:
        """The object that a field of the last answer's turn stands in."""
        return self.row if self.form == "flat" else (self.row.get("conversations") or self.row["messages"])[-1]

    def asked(self, text: str) -> None:
        """Put this text into the last question."""
        self.question = text
        self._say(-2, "question", text)

    def answered(self, text) -> None:
        self.answer = text
        self._say(-1, "answer", text)

    def _say(self, turn: int, name: str, text) -> None:
        marks = "<image>" * len(self.images) if turn == -2 and self.turns == 1 else ""
        if self.form == "flat":
            self.row[name] = text
        elif self.form == "LLaVA":
            self.row["conversations"][turn]["value"] = marks + text
        elif self.form == "messages":
            self.row["messages"][turn]["content"] = marks + text
        else:
            self.row["messages"][turn]["content"][-1]["text"] = text

    def choose(self, *values):
        return self.random.choice(values)


@dataclass
class Mutation:
    name: str
    change: callable  # changes a case in place, or returns the line to write
    outcome: str
    names: tuple[str, ...] = ()  # a warning or a reason holds one of these
    forms: tuple[str, ...] = FORMS
    images: int = 1
    turns: int = 1


MUTATIONS: list[Mutation] = []


def mutation(outcome: str, *names: str, **options):
    def register(change):
        MUTATIONS.append(Mutation(change.__name__, change, outcome, names, **options))
        return change

    return register


def in_any_case(case: Case, name: str) -> str:
    return case.choose(name, name, name.upper(), name.capitalize(), name.title())


# ------------------------------------------------------------------------------------------------------------- pictures

COMMON_NAMES = (
    "image image_path image_file img img_name img_path file_name image_name image_filename image_id img_id filename "
    "picture"
).split()


@mutation("used", forms=("flat", "LLaVA", "messages"))
def a_picture_under_a_common_name(case):
    case.row[in_any_case(case, case.choose(*COMMON_NAMES))] = case.row.pop("image")


@mutation("used", forms=("flat", "LLaVA", "messages"))
def one_picture_in_a_list(case):
    case.row[case.choose("image", "images", "img_path", "image_path")] = [case.row.pop("image")]


@mutation("used", forms=("flat", "LLaVA", "messages"), images=2)
def two_pictures_under_a_common_name(case):
    case.row[in_any_case(case, case.choose("images", "image", "image_paths", "img_path"))] = case.row.pop("images")


@mutation("used", forms=("flat", "LLaVA", "messages"))
def a_second_field_names_the_same_picture(case):
    case.row[case.choose("file_name", "img_path")] = case.row["image"]


@mutation("used", images=0)
def no_picture_as_null_or_empty(case):
    case.row[case.choose("image", "images", "img_path", "file_name")] = case.choose(None, "", [])


@mutation("refused", "scan", "path", "xray", "src", images=0)
def an_unknown_field_names_a_picture(case):
    value = case.choose(*PICTURES)
    case.row[case.choose("scan", "path", "xray", "src")] = case.choose(value, [value], {"path": value})


@mutation("refused", "scan", "src", "xray", forms=("LLaVA", "messages", "parts"), images=0)
def an_unknown_field_of_a_turn_or_part_names_a_picture(case):
    case.random.choice(case.places[1:])[case.choose("scan", "src", "xray")] = case.choose(*PICTURES)


@mutation("refused", "scan", "mask", "second")
def an_unknown_field_names_another_picture(case):
    other = next(picture for picture in PICTURES if picture not in case.images)
    case.row[case.choose("scan", "mask", "second")] = other


@mutation("refused", "image", "file_name", forms=("flat", "LLaVA", "messages"))
def two_fields_disagree_about_the_picture(case):
    case.row[case.choose("file_name", "img_path")] = next(p for p in PICTURES if p not in case.images)


@mutation("refused", "missing", "nowhere", forms=("flat", "LLaVA", "messages"))
def the_picture_is_missing(case):
    case.row["image"] = case.choose("nowhere.png", "a.bmp.png", "images/nowhere/a.png", "nowhere" * 40 + ".png")


@mutation("refused", "outside", forms=("flat", "LLaVA", "messages"))
def the_picture_lies_outside(case):
    case.row["image"] = case.choose("../model/config.json", "../../x/a.png", "/etc/passwd", "/etc/hostname")


@mutation("refused", "image", "URL", "base64", "data:", forms=("flat", "LLaVA", "messages"))
def the_picture_is_no_file_name(case):
    base64 = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk" * case.choose(1, 50, 2000)
    urls = "https://example.org/a.png", "data:image/png;base64," + base64
    case.row["image"] = case.choose(*urls, base64, {"bytes": base64}, 7, 1.5, True, [[case.images[0]]], [None])


@mutation("refused", "placeholder", forms=("LLaVA", "messages"))
def a_placeholder_too_many(case):
    case.asked(case.choose("<image>", "<image>\n<image>") + case.question)


@mutation("refused", "placeholder", forms=("LLaVA", "messages"), images=0)
def a_picture_without_a_placeholder(case):
    case.row["image"] = case.choose(*PICTURES)


UNFILLED = (
    "<image>", "<video>", "<audio>", "<IMAGE>", "<Image>", "<image_1>", "<image1>", "<img>a.png</img>",
    "<video>\n<audio>", "<ImageHere>", "[IMG]", "<img>",
)  # fmt: skip


@mutation("refused", *(mark[1:6] for mark in UNFILLED), "placeholder", images=0)
def a_placeholder_that_nothing_fills(case):
    mark = case.choose(*UNFILLED)
    case.asked(case.choose(f"{mark}{case.question}", f"{case.question} {mark}", f"{mark}\n{case.question}"))


@mutation("refused", *(mark[1:6] for mark in UNFILLED if mark != "<image>"), "placeholder")
def a_placeholder_that_nothing_fills_beside_a_picture(case):
    mark = case.choose(*(mark for mark in UNFILLED if mark != "<image>"))
    case.asked(f"{case.question} {mark}")


@mutation("refused", "<image>", "<video>", "<audio>", "placeholder")
def a_placeholder_in_an_answer(case):
    case.answered(f"{case.choose('<image>', '<video>', '<audio>')} {case.answer}")


@mutation("refused", "audio", "video")
def sound_or_film(case):
    name = case.choose("audio", "audios", "video", "videos")
    case.row[name] = case.choose("a.wav", ["a.mp4"], [{"path": "a.wav"}])


@mutation("refused", "audio", "video", forms=("messages", "parts"))
def a_part_with_sound_or_film(case):
    kind = case.choose("audio", "video")
    case.row["messages"][0]["content"] = [{"type": kind, kind: "a.bin"}, {"type": "text", "text": case.question}]


@mutation("used")
def empty_fields_that_would_be_refused(case):
    name = case.choose("audio", "audios", "video", "videos", "history", "tools", "rejected_response", "objects")
    case.row[name] = case.choose(None, []) if name != "rejected_response" else case.choose(None, "")


# ------------------------------------------------------------------------------------------------------- unknown fields


@mutation("told", "patient", "note", "meta", "device")
def an_unknown_field(case):
    text = case.choose(*HARMLESS_TEXTS)
    value = case.choose(text, 12, 1.5, True, [text], {"by": text}, [[1, 2]], {"box": [1, 2, 3, 4]})
    case.row[case.choose("patient", "note", "meta", "device")] = value


@mutation("told", "patient", "note", "tag", forms=("LLaVA", "messages", "parts"))
def an_unknown_field_of_a_turn(case):
    turns = case.row.get("conversations") or case.row["messages"]
    case.random.choice(turns)[case.choose("patient", "note", "tag")] = case.choose(*HARMLESS_TEXTS, 7)


@mutation("told", "cache", "note", "detail", forms=("parts",))
def an_unknown_field_of_a_part(case):
    case.random.choice(case.places[3:])[case.choose("cache", "note", "detail")] = case.choose(*HARMLESS_TEXTS, 7)


@mutation("used")
def a_field_that_is_known_and_ignored(case):
    case.row[case.choose("question_id", "source", "split", "dataset")] = case.choose("17", 17, "train")


# --------------------------------------------------------------------------------------- fields that change the meaning


@mutation("refused", "label", "rejected_response", "rejected", "chosen", "tools", "function_call", "history")
def a_field_of_another_kind_of_training(case):
    fields = {"label": False, "rejected_response": "no", "rejected": "no", "chosen": "yes", "tools": [{"name": "f"}]}
    fields |= {"history": [["What?", "That."]], "function_call": {"name": "f"}}
    name = case.choose(*fields)
    case.row[name] = fields[name]


@mutation("used", forms=("flat", "LLaVA", "messages", "parts"))
def a_system_prompt_beside_the_turns(case):
    case.row["system"] = case.system = case.choose("Be brief.", "You are a doctor.")


@mutation("refused", "system", forms=("messages", "parts"))
def two_system_prompts_that_differ(case):
    case.row["system"] = "Be brief."
    case.row["messages"].insert(0, {"role": "system", "content": "Be long."})


@mutation("used", turns=2, forms=("LLaVA", "messages", "parts"))
def an_earlier_answer_that_is_not_trained(case):
    turns = case.row.get("conversations") or case.row["messages"]
    turns[1].update(case.choose({"loss": False}, {"weight": 0}, {"weight": 0.0}, {"loss_scale": 0}))
    case.trained = case.answer


@mutation("used", turns=2, forms=("LLaVA", "messages", "parts"))
def an_answer_that_is_weighted(case):
    case.answering.update(case.choose({"loss": True}, {"weight": 2}, {"weight": 0.5}, {"weight": 1, "loss": True}))


@mutation("refused", "trained", "weight", "loss")
def nothing_is_trained(case):
    fields = [{"weight": 0}] if case.form == "flat" else [{"loss": False}, {"weight": 0}, {"loss_scale": 0.0}]
    case.answering.update(case.choose(*fields))


@mutation("refused", "weight", "loss")
def a_weight_that_is_none(case):
    case.answering["weight"] = case.choose(-1, "2", True, [1], {}, 1e300)


OPTIONS = ["white", "red", "a light arm"]
LETTERS = {"A": "white", "B": "red", "C": "a light arm"}


@mutation("used", forms=("flat",))
def an_index_or_a_letter_of_the_options(case):
    place = case.random.randrange(3)
    options = case.choose(OPTIONS, LETTERS, json.dumps(OPTIONS), json.dumps(LETTERS))
    is_dict = options in (LETTERS, json.dumps(LETTERS))
    letter = case.choose("ABC"[place], "abc"[place], f"{'ABC'[place]}.", f"({'ABC'[place]})")
    case.row[case.choose("choices", "options")] = options
    case.row["answer"] = case.choose(letter, OPTIONS[place]) if is_dict else case.choose(place, letter, OPTIONS[place])
    case.answer = OPTIONS[place]


@mutation("refused", "option", "choice", forms=("flat",))
def an_answer_that_is_none_of_the_options(case):
    case.row[case.choose("choices", "options")] = case.choose(
        OPTIONS, LETTERS, json.dumps(OPTIONS), json.dumps(LETTERS)
    )
    case.row["answer"] = case.choose(3, -1, 17, "D", "z", "(E)", "green", "white; red")


@mutation("refused", "answer", "option", forms=("flat",))
def an_answer_that_is_no_text(case):
    if case.random.random() < 0.5:
        case.row["choices"] = OPTIONS
    case.row["answer"] = case.choose(True, False, None, {}, {"text": "red"}, [], [[]], [None])


@mutation("refused", "option", "choice", forms=("flat",))
def options_that_are_no_choice(case):
    case.row[case.choose("choices", "options")] = case.choose(
        ["red"], [], "red", 7, ["red", "red"], [1, []], "[1, ", {}
    )
    case.row["answer"] = 0


@mutation("used", forms=("flat",))
def several_accepted_answers(case):
    answers = case.choose(["red", "pink", "pink"], ["pink", "red"], ["pink"] * 10, ["pink", "red", "pink", "red"])
    case.row["answers"] = case.choose(answers, [{"answer": text, "answer_id": n} for n, text in enumerate(answers, 1)])
    del case.row["answer"]
    case.answer, case.answers = "pink", answers


@mutation("refused", "answer", forms=("flat",))
def accepted_answers_of_another_type(case):
    case.row["answers"] = case.choose([], [7, {}], {}, "", [{"text": "red"}], [" "], [["red"]])
    del case.row["answer"]


# ---------------------------------------------------------------------------------------------------------------- texts


@mutation("told", "nan", "none", "null", "invisible", "zero-width")
def an_answer_that_says_nothing(case):
    case.answered(case.choose("nan", "NaN", "none", "null", "None", "\u200b", "\u200b\u200d", "\ufeff"))


@mutation("used")
def texts_that_only_look_like_marks(case):
    text = case.choose("<b>this</b>", "a < b > c", "<5mm", "[1]", "<polyp>", "{question}", "%s", "<|", "//", "a & b;")
    case.asked(f"{case.question} {text}") if case.random.random() < 0.5 else case.answered(f"{text} {case.answer}")


@mutation("told", "HTML entity")
def texts_that_a_program_may_have_damaged(case):
    text = case.choose("&lt;", "&nbsp;", "&#39;", "&#x27;", "\\n", "caf\ufffd")
    case.asked(f"{case.question} {text}") if case.random.random() < 0.5 else case.answered(f"{text} {case.answer}")


@mutation("used")
def texts_of_any_script(case):
    text = case.choose(
        "息肉", "полип", "سليلة", "é̂", "🩺", "a\u2028b", "\u00a0x", "ﬁ", "ß", "\u202eabc\u202c", "\ud7ff"
    )
    case.answered(f"{case.answer} {text}")


@mutation("used", forms=("flat",))
def an_answer_that_is_a_number(case):
    case.row["answer"] = value = case.choose(0, 1, -3, 2.5, 10**20, 1e-7)
    case.answer = str(value)


@mutation("refused", "question", "answer", "text", "turn", "from", "content", "part")
def an_empty_text(case):
    case.asked(case.choose("", " ", "\n\t")) if case.random.random() < 0.5 else case.answered(
        case.choose("", " ", "\n")
    )


@mutation("refused", "special token")
def a_special_token_in_a_text(case):
    token = case.choose("<|im_end|>", "<|im_start|>", "<|image_pad|>", "<|vision_start|>", "<|endoftext|>")
    case.asked(f"{case.question}{token}") if case.random.random() < 0.5 else case.answered(f"{case.answer}{token}")


@mutation("refused", "question", "from", "content", "part", "turn", "text")
def a_question_of_another_type(case):
    value = case.choose(None, 7, True, ["What?"], {"text": "What?"}, [[]])
    if case.form == "flat":
        case.row["question"] = value
    elif case.form == "LLaVA":
        case.row["conversations"][0]["value"] = value
    elif case.form == "messages":
        case.row["messages"][0]["content"] = value
    else:
        case.row["messages"][0]["content"][-1]["text"] = value


@mutation("refused", "turn", "role", "from", "alternate", forms=("LLaVA", "messages", "parts"))
def turns_out_of_order(case):
    turns = case.row.get("conversations") or case.row["messages"]
    change = case.random.randrange(5)
    if change == 0:
        turns.reverse()
    elif change == 1:
        turns.pop()
    elif change == 2:
        turns.append(dict(turns[0]))
    elif change == 3:
        turns.append(dict(turns[-1]))
    else:
        turns[0]["from" if case.form == "LLaVA" else "role"] = case.choose("robot", "tool", None, 7, ["human"])


@mutation("refused", "conversations", "messages", "turn", "list", forms=("LLaVA", "messages"))
def turns_of_another_type(case):
    name = "conversations" if case.form == "LLaVA" else "messages"
    case.row[name] = case.choose({}, "What?", 7, [], ["What?"], [None], [[]], True)


@mutation("refused", "no question", "question", "fields", forms=("flat",), images=0)
def a_question_under_another_name(case):
    case.row[case.choose("q", "ask", "caption", "text")] = case.row.pop("question")


@mutation("used", forms=("flat",))
def the_fields_of_flat_rows_in_capitals(case):
    upper = case.choose(str.upper, str.capitalize)
    case.row = {upper(name): value for name, value in case.row.items()}


@mutation("used")
def another_order_of_fields(case):
    items = list(case.row.items())
    case.random.shuffle(items)
    case.row = dict(items)


# ------------------------------------------------------------------------------------------------------------ JSON text


@mutation("used")
def the_same_json_written_otherwise(case):
    line = json.dumps(
        case.row, ensure_ascii=case.random.random() < 0.5, separators=case.choose((",", ":"), (" , ", " : "))
    )
    return case.choose("  ", "\t", "") + line + case.choose("  ", "\t", "", "\r")


@mutation("refused", "JSON")
def a_line_that_is_cut(case):
    line = json.dumps(case.row)
    return line[: case.random.randrange(1, len(line))]


@mutation("refused", "JSON")
def a_quote_or_a_bracket_is_lost(case):
    line = json.dumps(case.row)
    places = [place for place, character in enumerate(line) if character in '"{}[]:']
    place = case.random.choice(places)
    return line[:place] + line[place + 1 :]


@mutation("refused", "twice", "duplicate")
def a_key_that_stands_twice(case):
    line = json.dumps(case.row)
    name = case.random.choice(list(case.row))
    again = f"{json.dumps(name)}: {json.dumps(case.choose('other', case.row[name]))}"
    return line[:-1] + f", {again}}}"


@mutation("refused", "twice", "duplicate", forms=("LLaVA", "messages", "parts"))
def a_key_that_stands_twice_in_a_turn(case):
    name = "value" if case.form == "LLaVA" else "role"
    line = json.dumps(case.row)
    return line.replace(f'"{name}": ', f'"{name}": "other", "{name}": ', 1)


@mutation("refused", "JSON")
def a_value_that_is_no_json(case):
    line = json.dumps(case.row | {"answer_value": "@"})
    return line.replace(
        '"@"', case.choose("NaN", "Infinity", "-Infinity", "None", "True", "'red'", "01", "+1", "1.", "0x1")
    )


@mutation("refused", "JSON", "surrogate", "range", "number", "utf-8")
def a_value_that_can_t_be_kept(case):
    line = json.dumps(case.row | {"extra": "@"})
    return line.replace('"@"', case.choose('"\\ud83d"', "1e999", "-1e400", "[" * 5000, "9" * 5000))


@mutation("refused", "JSON", "object")
def a_line_that_is_no_object(case):
    return case.choose(
        "[]", "7", "null", "true", '"What?"', "[1, 2]", "{", "}", "//", "# comment", "a,b,c", "\x00", "{]"
    )


@mutation("refused", "JSON")
def more_than_one_value_in_a_line(case):
    line = json.dumps(case.row)
    return line + case.choose(line, ",", " ,", "]", ";", " x", line[:10])


# ---------------------------------------------------------------------------------------------------------------- check


def cases_of(mutation: Mutation, rows: int) -> list[tuple[Case, str]]:
    """Cases of a mutation with the lines to write. The seed is the mutation's name: others can come and go."""
    chooser, cases = random.Random(mutation.name), []
    for number in range(rows):
        form = mutation.forms[number % len(mutation.forms)]
        images = chooser.sample(PICTURES, mutation.images)
        case = Case(form, chooser, number, images, mutation.turns if form != "flat" else 1)
        line = mutation.change(case)
        cases.append((case, line if line is not None else json.dumps(case.row)))
    return cases


def missed(mutation: Mutation, data) -> list[str]:
    """What became otherwise than the mutation states."""
    reasons = {row.where.split(":")[1]: row.reason for row in data.bad}
    samples = {sample.where.split(":")[1]: sample for sample in data.samples}
    warnings, problems = " | ".join(data_warnings(data, None)), []
    for number, (case, line) in enumerate(cases_of(mutation, ROWS), start=1):
        reason, sample = reasons.get(str(number)), samples.get(str(number))
        became = f"{case.form}: {line[:160]} -> {reason or 'used'}"
        if mutation.outcome == "refused":
            if not reason or not any(name.lower() in reason.lower() for name in mutation.names):
                problems.append(became)
            continue
        if reason or not sample:
            problems.append(became)
            continue
        problems += [f"{became}: {problem}" for problem in differences(case, sample)]
    if mutation.outcome == "told" and not any(name.lower() in warnings.lower() for name in mutation.names):
        problems.append(f"no warning: {warnings}")
    if mutation.outcome == "used" and warnings:
        problems.append(f"told: {warnings}")
    return problems


def differences(case: Case, sample) -> list[str]:
    pictures = [image.rpartition("/")[2] for image in sample.images]
    read = {"images": pictures, "question": sample.fields["question"].strip(), "answer": sample.fields["answer"]}
    meant = {"images": case.images, "question": case.question.strip(), "answer": case.answer}
    if hasattr(case, "answers"):
        read["answers"], meant["answers"] = sample.fields["answers"], case.answers
    return [f"{name} {read[name]!r}, not {meant[name]!r}" for name in meant if read[name] != meant[name]]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mutated_row_becomes_what_it_must(mutation, load):
    data = load([line for _, line in cases_of(mutation, ROWS)])
    assert not missed(mutation, data), "\n".join(missed(mutation, data))


def test_there_are_1300_mutated_rows():
    assert len(MUTATIONS) * ROWS >= 1300
