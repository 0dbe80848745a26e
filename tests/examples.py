"""Rows in every format, with the conversation that each stands for, and bad rows, with the reason."""

import json

ASKED = ["user: ▣How many polyps?", "assistant: two"]
TWICE = ["user: ▣▣Same polyp?", "assistant: no"]
CHAT = ["system: Be brief.", "user: ▣What colour?", "assistant: red", "user: ▣And here?", "assistant: white"]
PLAIN = ["user: What is a polyp?", "assistant: a growth"]


def flat(answer="two", question="How many polyps?", **images) -> dict:
    return {**images, "question": question, "answer": answer}


def llava(*turns: str, **images) -> dict:
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    return {**images, "conversations": [{"from": names[r], "value": t} for r, t in (t.split(": ", 1) for t in turns)]}


def chat(*turns: str, **images) -> dict:
    return {**images, "messages": [{"role": r, "content": t} for r, t in (t.split(": ", 1) for t in turns)]}


def parts(*contents: list[str], **images) -> dict:
    """Turns of typed parts. A part that starts with @ is an image; the name after it, if any, is the image's."""
    roles = ["user", "assistant"] * len(contents)
    typed = [
        [
            {"type": "image"} | ({"image": p[1:]} if p[1:] else {}) if p[:1] == "@" else {"type": "text", "text": p}
            for p in content
        ]
        for content in contents
    ]
    return {**images, "messages": [{"role": role, "content": content} for role, content in zip(roles, typed)]}


MARKED_CHAT = [turn.replace("▣", "<image>\n") for turn in CHAT]
# name: (row, its images, its turns with ▣ for an image)
FORMATS = {
    "flat, image": (flat(image="a.png"), ["a.png"], ASKED),
    "flat, image_filename": (flat(image_filename="a.png"), ["a.png"], ASKED),
    "flat, image_id": (flat(image_id="a"), ["a"], ASKED),
    "flat, file name and id": (flat(image_id="a", image_filename="a.png"), ["a.png"], ASKED),
    "flat, list": (flat("no", "Same polyp?", image=["a.png", "b.png"]), ["a.png", "b.png"], TWICE),
    "flat, list under images": (flat("no", "Same polyp?", images=["a.png", "b.png"]), ["a.png", "b.png"], TWICE),
    "flat, placeholder": (flat("no", "<image> and <image>", image=["a", "b"]), ["a", "b"], ["user: ▣and▣", TWICE[1]]),
    "flat, empty list and file name": (flat(image=[], image_filename="a.png"), ["a.png"], ASKED),
    "flat, text only": (flat("a growth", "What is a polyp?"), [], PLAIN),
    "flat, image null": (flat("a growth", "What is a polyp?", image=None), [], PLAIN),
    "flat, whole number": (flat(2, image="a.png"), ["a.png"], [ASKED[0], "assistant: 2"]),
    "flat, zero": (flat(0, image="a.png"), ["a.png"], [ASKED[0], "assistant: 0"]),
    "flat, number": (flat(2.5, image="a.png"), ["a.png"], [ASKED[0], "assistant: 2.5"]),
    "LLaVA": (llava("user: <image>\nHow many polyps?", ASKED[1], image="a.png"), ["a.png"], ASKED),
    "LLaVA, list": (llava("user: <image><image>\nSame polyp?", TWICE[1], image=["a", "b"]), ["a", "b"], TWICE),
    "LLaVA, images": (llava("user: <image>\n<image>Same polyp?", TWICE[1], images=["a", "b"]), ["a", "b"], TWICE),
    "LLaVA, system and turns": (llava(*MARKED_CHAT, image=["a", "b"]), ["a", "b"], CHAT),
    "LLaVA, text only": (llava(*PLAIN), [], PLAIN),
    "messages": (chat("user: <image>How many polyps?", ASKED[1], images=["a.png"]), ["a.png"], ASKED),
    "messages, image": (chat("user: <image>How many polyps?", ASKED[1], image="a.png"), ["a.png"], ASKED),
    "messages, system and turns": (chat(*MARKED_CHAT, images=["a", "b"]), ["a", "b"], CHAT),
    "messages, text only": (chat(*PLAIN), [], PLAIN),
    "parts": (parts(["@a.png", "How many polyps?"], ["two"]), ["a.png"], ASKED),
    "parts and images": (parts(["@", "@", "Same polyp?"], ["no"], images=["a", "b"]), ["a", "b"], TWICE),
    "parts, names of both kinds": (parts(["@", "@a", "Same polyp?"], ["no"], images=["b"]), ["b", "a"], TWICE),
    "flat, other formats null": (flat(image="a.png") | {"messages": None, "conversations": None}, ["a.png"], ASKED),
    "parts, placeholder in the text": (parts(["<image>\nHow many polyps?"], ["two"], images=["a"]), ["a"], ASKED),
}
GOOD_LINE = json.dumps(flat(image="a.png"))

# name: (line, what the reason says)
BAD = {
    "truncated": (GOOD_LINE[:-4], "not valid JSON"),
    "two on a line": (GOOD_LINE + GOOD_LINE, "not valid JSON"),
    "NUL byte": (GOOD_LINE.replace("two", "t\0wo"), "not valid JSON"),
    "NaN": (json.dumps(flat(float("nan"))), "NaN"),
    "Infinity": (json.dumps(flat("two", options=[float("inf")])), "Infinity"),
    "number too large": (GOOD_LINE.replace('"two"', "1e999"), "Out of range"),
    "nested too deep": ("[" * 200_000, "not valid JSON"),
    "half a character": (json.dumps(flat("\ud83d")), "surrogate"),
    "boxes to fill in": (json.dumps(flat("<bbox>", "Find it", image="a.png") | {"objects": {"bbox": [1]}}), "<bbox>"),
    "weight of 0": (json.dumps(flat(weight=0)), "nothing of the row is trained"),
    "weight below 0": (json.dumps(flat(weight=-1)), "`weight` must be 0 or a number"),
    "weight as text": (json.dumps(flat(weight="2")), "`weight` must be 0 or a number"),
    "weight true": (json.dumps(flat(weight=True)), "`weight` must be 0 or a number"),
    "weight out of range": (GOOD_LINE.replace("{", '{"weight": 1' + 400 * "0" + ", ", 1), "`weight` must be 0"),
    "weight that is tiny": (json.dumps(flat(weight=1e-9)), "`weight` must be 0 or a number from 1e-06 to 1e+06"),
    "no turn is trained": (
        json.dumps(chat("user: So?", "assistant: no")).replace('"no"', '"no", "loss": false'),
        "nothing of the row is trained",
    ),
    "a question that is trained": (
        json.dumps(chat("user: So?", "assistant: no")).replace('"So?"', '"So?", "loss": true'),
        "only answers are trained",
    ),
    "loss as text": (
        json.dumps(chat("user: So?", "assistant: no")).replace('"no"', '"no", "loss": "x"'),
        "`loss` must",
    ),
    "list": ("[]", "not list"),
    "number": ("42", "not int"),
    "null": ("null", "not NoneType"),
    "text": ('"question"', "not str"),
    "no fields": ("{}", "no question"),
    "other fields": ('{"prompt": "How?", "reply": "So."}', "prompt, reply"),
    "missing answer": ('{"image": "a.png", "question": "How?"}', "no answer"),
    "null answer": (json.dumps(flat(None)), "no answer"),
    "empty answer": (json.dumps(flat("")), "no answer"),
    "blank answer": (json.dumps(flat(" \n")), "no answer"),
    "yes-no answer": (json.dumps(flat(True)), "the answer is a bool"),
    "answer in a list in a list": (json.dumps(flat([["two"]])), "the answer is a list"),
    "LLaVA, empty answer": (json.dumps(llava("user: How?", "assistant: ")), "no answer"),
    "messages, empty answer": (json.dumps(chat("user: How?", "assistant: ")), "no answer"),
    "parts, empty answer": (json.dumps(parts(["How?"], [" "])), "no answer"),
    "empty question": (json.dumps(flat(question=" ", image="a.png")), "the question is empty"),
    "question of another type": (json.dumps(flat(question=["How?"])), "the question is a list, not a string"),
    "flat, only a placeholder": (json.dumps(flat(question="<image>", image="a")), "no question"),
    "LLaVA, empty question": (json.dumps(llava("user: <image>\n", "assistant: two", image="a")), "no question"),
    "messages, empty question": (json.dumps(chat("user: ", "assistant: two")), "no question"),
    "parts, empty question": (json.dumps(parts(["@a.png"], ["two"])), "no question"),
    "flat, placeholder too many": (json.dumps(flat(question="<image> <image> so?", image="a")), "2 image placeholders"),
    "flat, placeholder too few": (json.dumps(flat(question="<image> so?", image=["a", "b"])), "for 2 images"),
    "LLaVA, placeholder too many": (json.dumps(llava("user: <image> so?", "assistant: no")), "for 0 images"),
    "LLaVA, placeholder too few": (json.dumps(llava("user: So?", "assistant: no", image="a")), "0 image placeholders"),
    "messages, placeholder too many": (json.dumps(chat("user: <image> so?", "assistant: no")), "for 0 images"),
    "messages, placeholder too few": (json.dumps(chat("user: So?", "assistant: no", image="a")), "for 1 images"),
    "parts, placeholder too many": (json.dumps(parts(["@", "So?"], ["no"])), "1 image placeholders for 0 images"),
    "parts, placeholder too few": (json.dumps(parts(["@a", "So?"], ["no"], images=["b"])), "0 image placeholders"),
    "parts, placeholder in their text": (json.dumps(parts(["@a", "<image>So?"], ["no"])), "1 image placeholders"),
    "image of another type": (json.dumps(flat(image={"width": 7})), "must be a file name"),
    "image without a name": (json.dumps(flat(image=["a.png", ""])), "must be a file name"),
    "LLaVA, unknown role": ('{"conversations": [{"from": "robot", "value": "Hi"}]}', "unknown role 'robot'"),
    "LLaVA, role of another type": ('{"conversations": [{"from": ["gpt"], "value": "Hi"}]}', "unknown role ['gpt']"),
    "LLaVA, no value": ('{"conversations": [{"from": "human"}, {"from": "gpt"}]}', "no question"),
    "LLaVA, no turns": ('{"conversations": []}', "`conversations` is empty"),
    "unknown role": (json.dumps(chat("tool: Hi", "assistant: no")), "unknown role 'tool'"),
    "messages, no turns": ('{"messages": {}}', "`messages` is empty"),
    "messages of another type": ('{"messages": "Hi"}', "`messages` must be a list of objects"),
    "content of another type": ('{"messages": [{"role": "user", "content": 7}]}', "`content` must be"),
    "two questions": (json.dumps(chat("user: So?", "user: Or?", "assistant: no")), "alternate"),
    "answer first": (json.dumps(chat("assistant: no", "user: So?")), "alternate"),
    "question last": (json.dumps(chat("user: So?", "assistant: no", "user: Why?")), "alternate"),
    "system in between": (json.dumps(chat("user: So?", "system: Be brief.", "assistant: no")), "alternate"),
    "system only": (json.dumps(chat("system: Be brief.")), "alternate"),
    "image in an answer": (json.dumps(parts(["So?"], ["@a.png", "this"])), "only a question can hold an image"),
    "image in a system turn": (
        json.dumps(parts(["@a.png", "So?"], ["no"])).replace('"user"', '"system"').replace('"assistant"', '"user"')[:-2]
        + ', {"role": "assistant", "content": "no"}]}',
        "only a question can hold an image",
    ),
    "video part": (json.dumps(parts(["So?"], ["no"])).replace('"text"', '"video"', 1), "of type text or image"),
    "text part without text": (
        json.dumps(parts(["So?", "Or?"], ["no"])).replace('"text": "So', '"content": "So'),
        "found 'text'",
    ),
    "image_url part": (
        json.dumps(parts(["So?"], ["no"])).replace('"text"', '"image_url"', 1),
        "an image part holds no text",
    ),
    "flat, video": (json.dumps(flat(video="a.mp4")), "video"),
    "LLaVA, video": (json.dumps(llava("user: <video>\nSo?", "assistant: no", video="a.mp4")), "video"),
    "messages, videos": (json.dumps(chat("user: <video>So?", "assistant: no", videos=["a.mp4"])), "video"),
    "not UTF-8": (GOOD_LINE.replace("two", "zwölf").encode("latin-1"), "utf-8"),
}
