"""Prompts: a row's messages to the chat template's text, cut where an answer begins and ends."""

from common import InputError


def special_tokens(tokenizer) -> list[str]:
    """The tokenizer's special tokens as text. No row may hold one: it would be read as what it stands for."""
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]


def refuse_special_settings(system: str, template: str, special: list[str]) -> None:
    """Raises InputError for a special token in the system prompt or in the `--prompt` template."""
    for name, text in (("system prompt", system), ("--prompt template", template)):
        for token in special:
            if token in text:
                raise InputError(f"the {name} holds the special token {token}")


def refuse_special_tokens(messages: list[dict], options: list[str], special: list[str]) -> None:
    """Raises ValueError for a special token in a message or in one of a row's answer options."""
    texts = [(f"{m['role']} text", "".join(part.get("text", " ") for part in m["content"])) for m in messages]
    for name, text in [*texts, *(("option", option) for option in options)]:
        for token in special:
            if token in text:
                raise ValueError(f"the {name} holds the special token {token}")


def fill_template(messages: list[dict], template: str) -> list[dict]:
    """The messages with the `--prompt` template around the text of each user turn.

    What the template has before {question} goes before a turn's first text, what it has after it behind the last.
    Images in front of the text stay there.
    """
    before, after = template.split("{question}")
    filled = []
    for message in messages:
        parts = [dict(part) for part in message["content"]]
        texts = [part for part in parts if part["type"] == "text"]
        if message["role"] == "user":
            texts[0]["text"] = before + texts[0]["text"]
            texts[-1]["text"] += after
        filled.append({"role": message["role"], "content": parts})
    return filled


def render_segments(messages: list[dict], tokenizer, system: str) -> list[tuple[str, bool]]:
    """The chat template's text as (text, is_trained) segments: each answer with its end-of-turn token, and what lies
    between answers. `system` is the system prompt of conversations that have none.

    Raises ValueError where the template renders an answer differently with and without what comes before it.
    """
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": [{"type": "text", "text": system}]}, *messages]
    segments, done = [], ""
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = tokenizer.apply_chat_template(messages[:number], tokenize=False, add_generation_prompt=True)
        full = tokenizer.apply_chat_template(messages[: number + 1], tokenize=False)
        end = full.rfind(tokenizer.eos_token) + len(tokenizer.eos_token)
        if not prompt.startswith(done) or not full.startswith(prompt) or end <= len(prompt):
            raise ValueError("the chat template does not render a conversation as its prompt followed by its answer")
        segments += [(prompt[len(done) :], False), (full[len(prompt) : end], True)]
        done = full[:end]
    return segments
