"""The chat template says how a turn ends; one that can't be trained on is one error, not one per row."""

import copy

import pytest
import tiny
from tiny import single

from common import InputError
from data import encode_rows
from demo.tiny_model import CHAT_TEMPLATE
from evaluation.answers import stop_tokens, with_answer
from inputs.prompts import end_of_turn
from inputs.rows import parse_row

ROWS = [single("a.png", "Is there text?", "yes"), tiny.mixed_rows()[-2]]
TURN = "<|im_start|>assistant\\n"
SILENT = CHAT_TEMPLATE[: CHAT_TEMPLATE.index("{%- if add_generation_prompt")]
TEXT_ONLY = "{%- for m in messages %}{{ m.role + ': ' }}{{ m.content }}{{ '<|im_end|>' }}{%- endfor %}"
UNFIT = {
    "no chat template": None,
    "has no generation prompt": SILENT,
    "between its prompt, which ends in '.*<think>": CHAT_TEMPLATE.replace(TURN, TURN + "<think>\\n"),
    "ends an answer without a special token": CHAT_TEMPLATE.replace("<|im_end|>", ""),
    "leaves out the pictures or the text of a turn": CHAT_TEMPLATE.replace("<|image_pad|>", ""),
    "the chat template fails: only text": "{{ raise_exception('only\ntext') }}",
    "the chat template fails: can only concatenate str": TEXT_ONLY.replace("{{ m.content }}", "{{ '' + m.content }}"),
    "leaves out the pictures": TEXT_ONLY,
}


@pytest.fixture
def other(tokenizer):
    """A copy of the tokenizer, to change."""
    return copy.deepcopy(tokenizer)


def encode(world, settings, tokenizer, rows=ROWS):
    return encode_rows(
        [parse_row(f"r:{n}", row) for n, row in enumerate(rows)], world / "images", tokenizer, settings, 999
    )


def test_an_answer_ends_as_the_template_ends_it_whatever_the_tokenizer_calls_its_end(world, tokenizer, other, settings):
    """As in pretrained models, whose tokenizers end texts, not turns."""
    expected = encode(world, settings, tokenizer).samples
    other.eos_token = "<|endoftext|>"
    found = encode(world, settings, other)
    assert not found.bad and end_of_turn(other) == "<|im_end|>"
    assert [s.ids.tolist() for s in found.samples] == [s.ids.tolist() for s in expected]
    assert [s.trained.tolist() for s in found.samples] == [s.trained.tolist() for s in expected]
    end = other.convert_tokens_to_ids("<|im_end|>")
    assert with_answer(found.samples[0], "no", other).ids[-1] == end
    other.chat_template = CHAT_TEMPLATE.replace("<|im_end|>\\n", "<|endoftext|>")
    assert end_of_turn(other) == "<|endoftext|>"


def test_generation_stops_at_the_end_of_turn_and_at_every_end_of_text(world, other):
    base = tiny.lora_model(world).base
    base.generation_config.eos_token_id, other.eos_token = None, "<|endoftext|>"
    ends = other.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    assert stop_tokens(base, other) == ends
    base.generation_config.eos_token_id = [7, ends[1]]
    assert stop_tokens(base, other) == [7, ends[1], ends[0]]


@pytest.mark.parametrize("problem", UNFIT)
def test_a_template_that_can_t_be_trained_on_is_one_error_that_names_it(world, settings, other, problem):
    other.chat_template = UNFIT[problem]
    with pytest.raises(InputError, match=f"(?s)^the tokenizer of .*model.*{problem}") as error:
        encode(world, settings, other)
    assert len(str(error.value).splitlines()) == 1


def test_a_row_that_the_template_refuses_is_a_bad_row(world, settings, other):
    refusal = "{%- if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{%- endif %}\n"
    other.chat_template = refusal + CHAT_TEMPLATE
    told = {"messages": [tiny.turn("system", "Be brief."), tiny.turn("user", "Sharp?"), tiny.turn("assistant", "no")]}
    data = encode(world, settings, other, [*ROWS, told])
    assert len(data.samples) == 2 and [row.reason for row in data.bad] == ["the chat template fails: no system turn"]
