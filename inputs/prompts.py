"""Prompts: a row's messages as the chat template's text, cut where each answer begins and ends."""

import re
from hashlib import sha256
from itertools import zip_longest

from common import InputError
from inputs.fields import PLACEHOLDER

IMAGE_TOKEN = "<|image_pad|>"
# Qwen2-VL's and Qwen2.5-VL's tokens around the name of an object and around its place.
BOX_TOKEN = re.compile(r"<\|(object_ref|box|quad)_(start|end)\|>")
KNOWN_PROMPTS = 100_000  # remembered at most: tens of megabytes


def special_tokens(tokenizer) -> list[str]:
    """The texts of the tokenizer's special tokens. No row may contain one: it would be read as the token itself."""
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]


def refuse_special_settings(system: str, template: str, special: list[str]) -> None:
    """Raise InputError for a special token in the system prompt or in the `--prompt` template."""
    for name, text in (("system prompt", system), ("--prompt template", template)):
        for token in special:
            if token in text:
                raise InputError(f"the {name} holds the special token {token}")
        if match := PLACEHOLDER.search(text):
            raise InputError(f"the {name} holds {match[0]}: images belong to rows")


def refuse_special_tokens(messages: list[dict], options: list[str], special: list[str], box_tokens: bool) -> None:
    """Raise ValueError for a special token in a message or in one of a row's answer options.

    `box_tokens` allows those of BOX_TOKEN, in pairs. Qwen3-VL's tokenizer has them too, but it was not taught them.
    """
    # Parts are joined, as the template joins them: a token may be split over two.
    texts = [(f"{m['role']} text", "".join(part.get("text", " ") for part in m["content"])) for m in messages]
    for name, text in [*texts, *(("option", option) for option in options)]:
        for token in special:
            if token in text and not ((is_box := BOX_TOKEN.fullmatch(token)) and box_tokens):
                remedy = ": this model writes boxes as JSON, from 0 to 1000" if is_box else ""
                raise ValueError(f"the {name} holds the special token {token}{remedy}")
        _check_pairs(name, text)


def _check_pairs(name: str, text: str) -> None:
    """Raise ValueError for a box token without its other half, or one pair inside another."""
    marks = list(BOX_TOKEN.finditer(text))
    for start, end in zip_longest(marks[::2], marks[1::2]):
        if start[2] != "start" or end is None or end[2] != "end" or end[1] != start[1]:
            raise ValueError(f"the {name} holds {start[0]} without its other half")


def images_first(messages: list[dict]) -> list[dict]:
    """The messages with the images of each user turn before its text, in their order. Texts that an image stood between
    are kept apart by a space."""
    return [message | {"content": _images_first(message["content"])} for message in messages]


def _images_first(parts: list[dict]) -> list[dict]:
    images, text = [], ""
    for before, part in zip([None, *parts], parts):
        if part["type"] == "image":
            images.append(part)
        else:
            stood_between = text and before["type"] == "image"
            touch = not (text[-1:].isspace() or part["text"][:1].isspace())
            text += (" " if stood_between and touch else "") + part["text"]
    return [*images, {"type": "text", "text": text}]


def is_text_first(messages: list[dict]) -> bool:
    """Whether an image of a turn comes after text of the same turn."""
    types = ["".join("i" if part["type"] == "image" else "t" for part in message["content"]) for message in messages]
    return any("ti" in kinds for kinds in types)


def fill_template(messages: list[dict], template: str) -> list[dict]:
    """The messages with the `--prompt` template around the text of each user turn.

    What comes before its {question} goes before a turn's first text, what comes after it goes after the last text.
    Images before the text stay there.
    """
    before, after = template.split("{question}")
    filled = []
    for message in messages:
        parts = [dict(part) for part in message["content"]]
        texts = [part for part in parts if part["type"] == "text"]
        if message["role"] == "user":
            texts[0]["text"] = before + texts[0]["text"]
            texts[-1]["text"] += after
        filled.append(message | {"content": parts})
    return filled


def end_of_turn(tokenizer) -> str:
    """The special token by which the chat template ends an answer. It need not be the tokenizer's end-of-text token.

    Raises InputError for a template that does not render pictures, or an answer right after its prompt and before a
    special token: no row of it could be trained on.
    """
    name, question, answer = f"the tokenizer of {tokenizer.name_or_path}", "Question 1?", "Answer 1."
    if not tokenizer.chat_template:
        raise InputError(f"{name} has no chat template: use the Instruct model, or put its chat_template.jinja there")
    asked, answered = _turn("user", question, has_image=True), _turn("assistant", answer)
    try:
        open_prompt = _render([asked], tokenizer)
        prompt = _render([asked], tokenizer, add_generation_prompt=True)
        full = _render([asked, answered], tokenizer)
    except ValueError as error:
        raise InputError(f"{name}: {error}") from None
    ends = {full.find(token, len(prompt + answer)): token for token in special_tokens(tokenizer)}
    ends.pop(-1, None)
    checks = {
        "leaves out the pictures or the text of a turn": question not in prompt or IMAGE_TOKEN not in prompt,
        "has no generation prompt": prompt == open_prompt,
        f"puts other text between its prompt, which ends in {prompt[-30:]!r}, and an answer; models that think before "
        "they answer are not supported": not full.startswith(prompt + answer),
        "ends an answer without a special token": not ends,
    }
    for problem, is_wrong in checks.items():
        if is_wrong:
            raise InputError(f"{name} has a chat template that {problem}: use the Instruct model's tokenizer files")
    return ends[min(ends)]


def _turn(role: str, text: str, has_image: bool = False) -> dict:
    return {"role": role, "content": [{"type": "image"}] * has_image + [{"type": "text", "text": text}]}


def _render(messages: list[dict], tokenizer, **options) -> str:
    """The chat template's text, without thinking where the model could do either. Raises ValueError where the template,
    a program, fails."""
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, enable_thinking=False, **options)
    except Exception as error:
        raise ValueError(f"the chat template fails: {' '.join(str(error).split())}") from None


def prompt_hash(tokenizer) -> str:
    """A hash of the token ids that a picture with a question and its answer become. Raises InputError for what
    `end_of_turn` refuses."""
    end_of_turn(tokenizer)
    text = _render([_turn("user", "Question 1?", has_image=True), _turn("assistant", "Answer 1.")], tokenizer)
    return sha256(str(tokenizer(text, add_special_tokens=False)["input_ids"]).encode()).hexdigest()[:16]


def may_think(tokenizer) -> bool:
    """Whether the model may think before it answers. A prompt of its chat template ends with an empty thinking block,
    where it is not to think."""
    question = _turn("user", "Question 1?", has_image=True)
    return _is_closed(_render([question], tokenizer, add_generation_prompt=True))


def _is_closed(prompt: str) -> bool:
    return prompt.rstrip().endswith("</think>")


def rewrites_answers(tokenizer) -> bool:
    """Whether the chat template writes an answer in another way once a question follows it.

    Qwen3.5's does. Where the model is not to think, it puts an empty thinking block before the newest answer, and takes
    it out of earlier ones. So a conversation's text does not begin with what its first question was asked with.
    Source: qwen3_5_think.jinja and qwen3_5_nothink.jinja in trl/chat_templates of github.com/huggingface/trl, which
    name them as the files that Qwen publishes; `last_query_index` is the rule.
    """
    question, answer = _turn("user", "Question 1?"), _turn("assistant", "Answer 1.")
    try:
        asked, again = (
            _render(messages, tokenizer, add_generation_prompt=True)
            for messages in ([question], [question, answer, question])
        )
    except ValueError:  # it takes one question only, or none without a picture: rows are told of that one by one
        return False
    return not again.startswith(asked)


def render_segments(
    messages: list[dict], tokenizer, system: str, end: str, known: dict[str, str], only_last: bool = False
) -> list[tuple[str, float]]:
    """The chat template's text as (text, weight) segments: prompts have weight 0, answers, each with its end-of-turn
    token `end`, that of their message. `system` is the system prompt of conversations that have none. `known` remembers
    prompts from call to call: rows share questions, and rendering one takes a good part of a row's time. With
    `only_last`, all before the last answer is one prompt, which is what `rewrites_answers` needs.

    Raises ValueError if the template does not render a conversation as its prompt followed by its answer.
    """
    if system and messages[0]["role"] != "system":
        messages = [_turn("system", system), *messages]
    segments, rendered = [], ""
    for number, message in enumerate(messages):
        if message["role"] != "assistant" or (only_last and message is not messages[-1]):
            continue
        key = repr(messages[:number])
        if key not in known:
            if len(known) >= KNOWN_PROMPTS:
                known.clear()
            known[key] = _render(messages[:number], tokenizer, add_generation_prompt=True)
        prompt, full = known[key], _render(messages[: number + 1], tokenizer)
        if _is_closed(prompt) and any("</think>" in part["text"] for part in message["content"]):
            raise ValueError("the answer holds </think>: this model is trained without thinking, leave that part out")
        # What the template puts after the end-of-turn token, a line break for Qwen, is not part of the answer.
        stop = full.rfind(end) + len(end)
        if not prompt.startswith(rendered) or not full.startswith(prompt) or stop <= len(prompt):
            raise ValueError("the chat template does not render a conversation as its prompt followed by its answer")
        segments += [(prompt[len(rendered) :], 0.0), (full[len(prompt) : stop], message["weight"])]
        rendered = full[:stop]
    return segments
