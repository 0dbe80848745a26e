"""Texts: the conversations of rows as token ids, with the weight of each in the loss.

Rows of a data set repeat each other. So each different conversation is rendered and tokenized once, and the rows that
hold it share its arrays: rendering takes most of the time of reading rows, and arrays of their own most of the memory.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from common import InputError
from inputs import prompts
from inputs.rows import BadRow, Row, each_answer

CHUNK = 10_000  # conversations tokenized at once, which is faster; the tokenizer takes 100 bytes per token meanwhile


def load_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    """The tokenizer of the model in `folder`. Raises InputError where it loses text, as without its vocabulary, has
    another image token than the model, splits it, or has more tokens than the model has embeddings."""
    tokenizer, config = AutoTokenizer.from_pretrained(folder), AutoConfig.from_pretrained(folder)
    text, image = "Question 1?", tokenizer.convert_tokens_to_ids(prompts.IMAGE_TOKEN)
    read = tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"])
    tokens, embeddings, wanted = len(tokenizer), config.text_config.vocab_size, config.image_token_id
    pieces = len(tokenizer(prompts.IMAGE_TOKEN, add_special_tokens=False)["input_ids"])
    copy = "copy all of this model's tokenizer files there, tokenizer.json among them"
    unsplit = "set split_special_tokens to false in tokenizer_config.json, or copy this model's tokenizer files there"
    resize = "resize the model's embeddings, or take the added tokens out"
    problems = [
        (text not in read, f"reads {text!r} as {read!r}", copy),
        (image != wanted, f"gives {prompts.IMAGE_TOKEN} the id {image}, and config.json {wanted}", copy),
        (pieces != 1, f"reads {prompts.IMAGE_TOKEN} as {pieces} tokens, not as one", unsplit),
        (tokens > embeddings, f"has {tokens:,} tokens, and the model {embeddings:,} embeddings", resize),
    ]
    for is_wrong, problem, remedy in problems:
        if is_wrong:
            raise InputError(f"the tokenizer of {folder} {problem}:\n  {remedy}")
    return tokenizer


@dataclass(slots=True)
class Text:
    """A conversation. It has ids once `TextEncoder.tokenize` is done."""

    segments: list[tuple[str, float]]  # the chat template's text in pieces, with their weights; empty once tokenized
    text_first: bool  # an image comes after text of its turn
    ids: np.ndarray | None = None  # (n,) int32, one image token per image
    weights: np.ndarray | None = None  # (n,) float64
    last_answer: int = 0  # index of the last answer's first id
    image_at: tuple[int, ...] = ()  # index of each image token in ids


class TextEncoder:
    """Renders conversations one by one, and tokenizes many of them together. `system`, `template` and `image_first` are
    as in `data.encode_rows`; `box_tokens` as in `prompts.refuse_special_tokens`."""

    def __init__(self, tokenizer, box_tokens: bool, system: str, template: str, image_first: bool):
        """Raises InputError when `system` or `template` holds a special token, and for a chat template that can't be
        trained on."""
        self.tokenizer, self.box_tokens = tokenizer, box_tokens
        self.system, self.template, self.image_first = system, template, image_first
        self.special, self.end = prompts.special_tokens(tokenizer), prompts.end_of_turn(tokenizer)
        self.only_last = prompts.rewrites_answers(tokenizer)
        prompts.refuse_special_settings(system, template, self.special)
        self.image_token = tokenizer.convert_tokens_to_ids(prompts.IMAGE_TOKEN)
        self.texts: dict[str, Text] = {}  # by messages and options as Python writes them
        self.waiting: list[Text] = []  # for their ids
        self.prompts: dict[str, str] = {}  # see prompts.render_segments
        self.shared = {}  # equal weights and places of images

    def by_answer(self, rows: Iterable[Row | BadRow]) -> Iterator[Row | BadRow]:
        """The rows; one row for each trained answer, where the chat template `rewrites_answers`."""
        for row in rows:
            yield from each_answer(row) if self.only_last and isinstance(row, Row) else [row]

    def render(self, messages: list[dict], options: list[str]) -> Text:
        """The text of a row's messages. It has ids from the next `tokenize` on. Raises ValueError where it can't be
        used."""
        key = repr((messages, options))
        if key not in self.texts:
            text = self._render(messages, options)
            self.texts[key] = text
            self.waiting.append(text)
            if len(self.waiting) == CHUNK:
                self.tokenize()
        return self.texts[key]

    def _render(self, messages: list[dict], options: list[str]) -> Text:
        if self.image_first:
            messages = prompts.images_first(messages)
        filled = prompts.fill_template(messages, self.template)
        prompts.refuse_special_tokens(filled, options, self.special, self.box_tokens)
        segments = prompts.render_segments(filled, self.tokenizer, self.system, self.end, self.prompts, self.only_last)
        return Text(segments, prompts.is_text_first(messages))

    def tokenize(self) -> None:
        """Give ids to all texts rendered so far."""
        pieces = list(dict.fromkeys(piece for text in self.waiting for piece, _ in text.segments))
        ids_of = dict(zip(pieces, self.tokenizer(pieces, add_special_tokens=False)["input_ids"] if pieces else []))
        for text in self.waiting:
            self._fill(text, [ids_of[piece] for piece, _ in text.segments])
        self.waiting.clear()

    def _fill(self, text: Text, pieces: list[list[int]]) -> None:
        text.ids = np.fromiter(chain(*pieces), np.int32)
        weights, lengths = tuple(weight for _, weight in text.segments), tuple(map(len, pieces))
        if (weights, lengths) not in self.shared:
            self.shared[weights, lengths] = np.repeat(weights, lengths)
        text.weights = self.shared[weights, lengths]
        text.last_answer = len(text.ids) - lengths[-1]
        places = tuple(np.flatnonzero(text.ids == self.image_token).tolist())
        text.image_at = self.shared.setdefault(places, places)
        text.segments = []
