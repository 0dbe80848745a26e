"""Generated answers equal plain `model.generate` one by one; scoring counts what it says."""

import json

import pytest
import tiny
import torch

from data import build_batch
from dist_utils import Ranks
from eval import accuracy_table, answer_all, evaluate, generate, normalize, question_type, score
from trees import Work, whole_trees

ALONE = Ranks(0, 0, 1, torch.device("cpu"))


def plain_answers(world, ours, adapter, stop_token: int) -> list[list[int]]:
    """Greedy decoding of each row alone by transformers' own generate, up to the stop token."""
    reference = tiny.Reference(world, ours, adapter)
    answers = []
    for line in (world / "rows.jsonl").read_text().splitlines():
        inputs = reference.inputs(json.loads(line), answered=False)
        del inputs["labels"]
        out = reference.model.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=stop_token)
        new = out[0, inputs["input_ids"].shape[1] :].tolist()
        answers.append(new[: new.index(stop_token)] if stop_token in new else new)
    return answers


@pytest.mark.parametrize("budget", [500, 5000])
def test_answers_equal_plain_generation_one_by_one(world, tmp_path, budget):
    model = tiny.lora_model(world).eval()
    never = 1  # a token that this model does not produce
    free = plain_answers(world, model, tmp_path, never)
    stop_token = free[5][3]  # one that ends some answers early, at different lengths
    expected = plain_answers(world, model, tmp_path, stop_token)
    assert len({len(answer) for answer in expected}) > 1
    data, dataset = tiny.load_world(world)
    for work in (Work(batch) for batch in whole_trees(data.samples, budget)):
        batch = build_batch(data, work, dataset.settings, prompts_only=True)
        for index, answer in zip(batch.samples, generate(model, batch, 8, stop_token)):
            assert answer == expected[index], data.samples[index].where


def test_an_evaluation_covers_every_sample_once_in_order(world):
    data, _ = tiny.load_world(world)
    for budget in (400, 1000, 100_000):
        batches = whole_trees(data.samples, budget)
        assert sorted(i for batch in batches for tree in batch for i in tree.samples) == list(range(len(data.samples)))
        assert all(len(batch) == 1 or sum(tree.tokens for tree in batch) <= budget for batch in batches)


def test_loss_equals_the_reference_and_does_not_depend_on_packing(world, tmp_path):
    data, _ = tiny.load_world(world)
    model = tiny.lora_model(world)
    rows = [json.loads(line) for line in (world / "rows.jsonl").read_text().splitlines()]
    expected, _ = tiny.Reference(world, model, tmp_path).loss_and_gradients(rows)
    for budget in (400, 5000):
        result = evaluate(model, data, whole_trees(data.samples, budget), ALONE, torch.float32, 0)
        assert result["loss"] == pytest.approx(expected, rel=1e-5)
        assert result["questions"] == len(data.samples)


def test_predictions_come_in_the_order_of_rows(world):
    from transformers import AutoTokenizer

    data, _ = tiny.load_world(world)
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    predictions = answer_all(tiny.lora_model(world), data, ALONE, torch.float32, tokenizer, 700, 2, 0)
    assert [one["where"] for one in predictions] == [sample.where for sample in data.samples]
    assert predictions[0].keys() >= {"id", "question", "answer", "prediction", "right", "question_type", "images"}


@pytest.mark.parametrize(("a", "b"), [("Yes.", " yes"), ("Upper  Left", "upper left"), ("ÉCHO", "écho")])
def test_case_space_and_full_stop_do_not_count(a, b):
    assert normalize(a) == normalize(b)


@pytest.mark.parametrize(
    ("question", "answer", "kind"),
    [
        ("Is there text?", "No", "yes/no"),
        ("How many polyps are there?", "2", "count"),
        ("What is the size of the polyp?", ">20mm", "size"),
        ("What color is the abnormality?", "red", "colour"),
        ("Where is it?", "left", "location"),
        ("What type of procedure is it?", "gastroscopy", "other"),
    ],
)
def test_question_types_follow_the_rule(question, answer, kind):
    assert question_type({"question": question, "answer": answer}) == kind
    assert question_type({"question": question, "answer": answer, "question_type": "own"}) == "own"


def test_accuracy_is_counted_by_type():
    rights = [("a", True), ("a", False), ("b", True)]
    result = score([{"question_type": kind, "right": right} for kind, right in rights])
    assert result["exact_match"] == 2 / 3 and result["by_type"] == {"a": [0.5, 2], "b": [1.0, 1]}
    assert "66.7" in accuracy_table({"tuned": result})
