"""Models that may think before they answer are trained and asked without it, as their chat template writes that."""

import copy
import json
import logging

import pytest
import tiny
import torch
from PIL import Image
from runs import arguments
from steps import whole
from tiny import single
from transformers.utils import logging as transformers_logging

import eval as evaluation
import merge
import train
from data import build_batch, encode_rows
from demo.tiny_model import CHAT_TEMPLATE
from evaluation.answers import generate
from inputs.prompts import end_of_turn, may_think, rewrites_answers
from inputs.rows import parse_row
from training.model_card import WITHOUT_THINKING
from trees import Assignment, grow_tree

NO_THOUGHTS = "<think>\n\n</think>\n\n"
# The rules of Qwen3.5's templates: whether to think has a default, an empty block stands in the generation prompt and
# before answers after the last question, texts are trimmed, and what an answer has before </think> is its thinking.
PARTS = """\
{%- macro text_of(content) %}
    {%- for part in content %}
        {{- '<|vision_start|><|image_pad|><|vision_end|>' if part.type == 'image' else part.text }}
    {%- endfor %}
{%- endmacro %}
"""
THINKING_TEMPLATE = (
    PARTS
    + """\
{%- set last = namespace(question=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{% set last.question = loop.index0 %}{% endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set text = text_of(message.content)|trim %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- set thoughts = text.split('</think>')[0].split('<think>')[-1].strip() if '</think>' in text else '' %}
        {%- if loop.index0 > last.question %}{{- '<think>\\n' + thoughts + '\\n</think>\\n\\n' }}{% endif %}
        {%- set text = text.split('</think>')[-1].lstrip() %}
    {%- endif %}
    {{- text + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n<think>\\n' }}
    {%- if THINKS %}{{- '\\n</think>\\n\\n' }}{% endif %}
{%- endif %}
"""
)
# Sizes of 4B and above think unless told otherwise, smaller ones don't unless told to.
TEMPLATES = {
    "thinks by default": THINKING_TEMPLATE.replace("THINKS", "enable_thinking is defined and not enable_thinking"),
    "answers by default": THINKING_TEMPLATE.replace("THINKS", "not enable_thinking"),
}
# Qwen3.8 keeps the block in earlier answers, and tells a model that thinks how hard to.
KEEPING = (
    "{%- if enable_thinking is not defined or enable_thinking %}{{- '<|im_start|>system\\nThink!<|im_end|>\\n' }}"
    "{% endif %}\n" + TEMPLATES["thinks by default"].replace("if loop.index0 > last.question", "if true")
)
THREE_TURNS = {
    "id": "case",
    "images": ["a.png", "b.png"],
    "messages": [tiny.turn("system", "Be brief."), tiny.turn("user", "Is it red?", 1), tiny.turn("assistant", " yes "),
                 tiny.turn("user", "And how many?"), tiny.turn("assistant", "two", 0) | {"weight": 2},
                 tiny.turn("user", "And this?", 1), tiny.turn("assistant", "none")],
    "answers": ["none", "no"],
    "by": "x",
}  # fmt: skip


@pytest.fixture(params=[*TEMPLATES.values(), KEEPING], ids=[*TEMPLATES, "keeps blocks"])
def thinker(request, tokenizer):
    other = copy.deepcopy(tokenizer)
    other.chat_template = request.param
    return other


@pytest.fixture
def encode(world, settings, thinker):
    def encode(*rows, **options):
        parsed = [parse_row(f"r:{n}", row, by=["by"]) for n, row in enumerate(rows, 1)]
        return encode_rows(parsed, world / "images", thinker, settings, 9999, **options)

    return encode


def asked(tokenizer, messages: list[dict]) -> list[int]:
    """What a program that serves the model asks it, without thinking."""
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, enable_thinking=False, tokenize=True, return_dict=True
    )["input_ids"]


def test_an_answer_is_trained_after_the_prompt_that_the_model_is_asked_with(encode, thinker, world, settings):
    data = encode(single("a.png", "Is it red?", "yes"), system="Be brief.")
    (sample,) = data.samples
    messages = [tiny.turn("system", "Be brief."), tiny.turn("user", "Is it red?", 1)]
    prompt = asked(thinker, messages)
    assert thinker.decode(prompt).endswith("<|im_start|>assistant\n" + NO_THOUGHTS) and "Think!" not in str(prompt)
    assert sample.ids[: sample.last_answer].tolist() == prompt
    assert thinker.decode(sample.ids[sample.trained].tolist()) == "yes<|im_end|>"
    whole = thinker.apply_chat_template(
        [*messages, tiny.turn("assistant", "yes")], enable_thinking=False, tokenize=True, return_dict=True
    )["input_ids"]
    assert whole[: len(sample.ids)] == sample.ids.tolist()
    batch = build_batch(data, Assignment((grow_tree(data.samples, [0]),)), settings, prompts_only=True)
    assert thinker.decode(batch.ids.tolist()).endswith(NO_THOUGHTS)
    assert end_of_turn(thinker) == "<|im_end|>"


def test_every_answer_of_a_conversation_is_trained_after_its_own_prompt(encode, thinker):
    data = encode(THREE_TURNS)
    assert not data.bad
    answers = [(4, "yes", 1), (6, "two", 2), (8, "none", 1)]
    trained = []
    for sample in data.samples:
        edges = [0, *(i for i in range(1, len(sample.ids)) if sample.weights[i] != sample.weights[i - 1])]
        for start, end in zip(edges, [*edges[1:], len(sample.ids)]):
            if sample.weights[start]:
                trained.append((sample.ids[:start].tolist(), sample.ids[start:end].tolist(), sample.weights[start]))
    assert len(trained) == 3
    for (count, answer, weight), (before, ids, own) in zip(answers, trained):
        assert before == asked(thinker, THREE_TURNS["messages"][: count - 2])
        assert thinker.decode(ids) == answer + "<|im_end|>" and own == weight


def test_where_earlier_answers_are_written_otherwise_each_is_a_question_of_its_own(encode, thinker):
    data = encode(THREE_TURNS)
    keeps = thinker.chat_template == KEEPING
    assert rewrites_answers(thinker) is not keeps
    assert [sample.id for sample in data.samples] == (["case"] if keeps else ["case#1", "case#2", "case"])
    first, last = data.samples[0], data.samples[-1]
    assert len(last.images) == 2 and last.fields["answers"] == ["none", "no"] and last.fields["by"] == {"by": "x"}
    if not keeps:
        assert len(first.images) == 1 and first.fields == {
            "question": "Is it red?",
            "answer": " yes ",
            "by": {"by": "x"},
        }
        assert all(sample.last_answer == sample.before_answers for sample in data.samples)


def test_an_answer_that_is_not_trained_is_part_of_the_prompt(encode, thinker):
    messages = [tiny.turn("user", "Sharp?"), tiny.turn("assistant", "no") | {"loss": False}, tiny.turn("user", "Red?"),
                tiny.turn("assistant", "yes")]  # fmt: skip
    (sample,) = encode({"messages": messages}).samples
    assert sample.id == "r:1" and sample.ids[: sample.last_answer].tolist() == asked(thinker, messages[:3])
    assert thinker.decode(sample.ids[sample.trained].tolist()) == "yes<|im_end|>"


@pytest.mark.parametrize("answer", ["<think>\nHm.\n</think>\n\nyes", "Hm.</think>yes", "<think>\n\n</think>\n\nyes"])
def test_thoughts_in_an_answer_are_refused(encode, answer):
    data = encode(single("a.png", "Red?", answer), single("a.png", "Red?", "yes"))
    assert len(data.samples) == 1
    assert [row.reason for row in data.bad] == [
        "the answer holds </think>: this model is trained without thinking, leave that part out"
    ]


def test_a_conversation_that_can_t_be_used_is_told_once(encode):
    row = THREE_TURNS | {"images": ["gone.png", "b.png"]}
    data = encode(row, single("a.png", "Red?", "yes"))
    assert [bad.where for bad in data.bad] == ["r:1"] and json.dumps(data.bad[0].row) == json.dumps(row)
    assert len(data.samples) == 1


def test_a_run_of_qwen3_5_trains_and_answers_what_a_server_would_ask(tmp_path):
    """Losses of each turn, and greedy answers to its prompt, equal those of the unmodified model."""
    rows = [THREE_TURNS, *(single("b.png", f"Is {n} red?", f"no {n}") for n in range(6)), *tiny.mixed_rows()[:2]]
    world = tiny.write_world(tmp_path, rows, "qwen3_5")
    (world / "model" / "chat_template.jinja").write_text(TEMPLATES["thinks by default"])
    data, dataset = tiny.load_world(world)
    assert [sample.id for sample in data.samples][:3] == ["case#1", "case#2", "case"] and len(data.samples) == 11
    model = tiny.lora_model(world).eval()
    reference = tiny.Reference(world, model, tmp_path / "adapter")
    trees = Assignment(tuple(whole(data.samples)))
    with torch.no_grad():
        losses, _ = model(batch := dataset[trees])
    answered = generate(model, build_batch(data, trees, dataset.settings, prompts_only=True), 4, {1})
    pad = reference.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    conversations = [THREE_TURNS["messages"][:count] for count in (3, 5, 7)]
    conversations += [
        [tiny.turn("user", row["question"], 1), tiny.turn("assistant", row["answer"])] for row in rows[1:]
    ]
    for place, index in enumerate(batch.samples):
        messages, pictures = conversations[index], [Image.open(path) for path in data.samples[index].images]
        vision = reference.processor(pictures, return_tensors="pt")
        counts = iter((vision["image_grid_thw"].prod(-1) // 4).tolist())
        prompt = [t for token in asked(reference.tokenizer, messages[:-1])
                  for t in [token] * (next(counts) if token == pad else 1)]  # fmt: skip
        answer = reference.encode(messages[-1]["content"][0]["text"].strip() + "<|im_end|>")
        ids = torch.tensor([prompt + answer])
        labels = torch.tensor([[-100] * len(prompt) + answer])
        extra = {"attention_mask": torch.ones_like(ids), "mm_token_type_ids": (ids == pad).int()}
        with torch.no_grad():
            expected = reference.model(input_ids=ids, labels=labels, **vision, **extra).loss
        torch.testing.assert_close(losses[batch.question == place].mean(), expected, rtol=1e-5, atol=1e-6)
        extra = {name: tensor[:, : len(prompt)] for name, tensor in extra.items()}
        out = reference.model.generate(
            input_ids=ids[:, : len(prompt)], **vision, **extra, max_new_tokens=4, do_sample=False, eos_token_id=1
        )
        assert answered[place][0] == out[0, len(prompt) :].tolist()


def test_cards_tell_users_to_ask_without_thinking_and_slow_code_is_told_once(tmp_path, capsys):
    rows = [single("b.png", f"Is {n} red?", f"no {n}") for n in range(20)]
    world = tiny.write_world(tmp_path, rows, "qwen3_5")
    (world / "model" / "chat_template.jinja").write_text(TEMPLATES["thinks by default"])
    assert train.main(arguments(world, tmp_path / "out", max_steps=9, lr=0.01, save_every=0, eval_every=0)) == 0
    capsys.readouterr()
    words, logged = ["--ckpt", str(tmp_path / "out")], logging.Handler()
    records = []
    logged.emit = records.append
    logging.getLogger("transformers").addHandler(logged)
    transformers_logging.warning_once.cache_clear()
    assert evaluation.main([*words, "--workers=0", "--max-new-tokens=3"]) == 0
    logging.getLogger("transformers").removeHandler(logged)
    assert capsys.readouterr().out.count("linear attention runs slowly") == 1
    assert not [record for record in records if "falling back" in record.getMessage()]
    assert merge.main([*words, "--out", str(tmp_path / "merged")]) == 0
    cards = [*tmp_path.glob("out/checkpoint-*/README.md"), tmp_path / "merged" / "README.md"]
    assert len(cards) == 2 and all(WITHOUT_THINKING in card.read_text() for card in cards)
    assert "| thinking | off |" in cards[0].read_text()


def test_templates_that_know_nothing_of_thinking_give_what_they_gave(world, settings, tokenizer):
    assert tokenizer.chat_template == CHAT_TEMPLATE and not rewrites_answers(tokenizer) and not may_think(tokenizer)
    rows = [parse_row("r:1", THREE_TURNS)]
    (sample,) = encode_rows(rows, world / "images", tokenizer, settings, 9999).samples
    text = tokenizer.apply_chat_template(THREE_TURNS["messages"], tokenize=False)
    assert tokenizer.decode(sample.ids.tolist()) == text.removesuffix("\n")
    assert tokenizer.decode(sample.ids[sample.trained].tolist()) == " yes <|im_end|>two<|im_end|>none<|im_end|>"
