"""Generated answers equal plain `model.generate` one by one; scoring counts what it says."""

import json
from argparse import Namespace

import pytest
import tiny
import torch
from faults import arguments

import eval as evaluation
import train
from data import build_batch
from dist_utils import STOPPED, Ranks, Stop
from eval import answer_all, evaluate, generate
from rows import InputError
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
        result = evaluate(model, data, whole_trees(data.samples, budget), ALONE, torch.float32, 0, Stop())
        assert result["loss"] == pytest.approx(expected, rel=1e-5)
        assert result["questions"] == len(data.samples)


def test_predictions_come_in_the_order_of_rows(world, tmp_path):
    from transformers import AutoTokenizer

    data, _ = tiny.load_world(world)
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    args = Namespace(max_tokens=700, max_new_tokens=2, workers=0)
    model = tiny.lora_model(world)
    predictions = answer_all(model, data, ALONE, torch.float32, tokenizer, args, tmp_path / "store", Stop())
    assert [one["where"] for one in predictions] == [sample.where for sample in data.samples]
    assert predictions[0].keys() >= {"id", "question", "answer", "prediction", "right", "question_type", "images"}


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "out"
    assert train.main(arguments(world, output, max_steps=30, epochs=9, lr=0.005, eval_every=0, save_every=0)) == 0
    return output


def answer(run, *words, stop=None) -> int:
    return evaluation.main(["--ckpt", str(run), "--workers=0", "--max-new-tokens=8", *map(str, words)], stop)


def test_the_summary_holds_scores_intervals_and_what_they_depend_on(world, run, tmp_path, capsys):
    assert answer(run, "--output", tmp_path, "--with-base") == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    tuned, base = summary["scores"]["tuned"], summary["scores"]["base"]
    found = tuned["all"]["exact_match"]
    assert 0 <= found["low"] <= found["mean"] <= found["high"] <= 1 and found["questions"] == 33
    assert {"yes/no", "count", "location"} <= tuned["by_type"].keys()
    assert {"command", "facts", "settings", "comparison"} <= summary.keys() and summary["facts"]["data"]
    gain = summary["comparison"]["difference"]["mean"]
    assert gain == pytest.approx(found["mean"] - base["all"]["exact_match"]["mean"]) and gain > 0
    assert "McNemar p = " in capsys.readouterr().out and not list(tmp_path.glob("partial-*"))
    files = tmp_path / "predictions-base.jsonl", tmp_path / "predictions.jsonl"
    assert evaluation.main(["--compare", *map(str, files)]) == 0
    assert f"{100 * gain:+.1f} points" in capsys.readouterr().out
    (tmp_path / "fewer.jsonl").write_text("".join(files[0].read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(InputError, match="same rows"):
        evaluation.main(["--compare", str(files[0]), str(tmp_path / "fewer.jsonl")])


def test_base_answers_are_those_of_the_model_without_an_adapter(world, run, tmp_path):
    assert answer(run, "--output", tmp_path / "both", "--with-base") == 0
    words = ["--model", world / "model", "--data", world / "rows.jsonl", "--images", world / "images", "--workers=0"]
    assert evaluation.main([*map(str, words), "--max-new-tokens=8", "--output", str(tmp_path / "base")]) == 0
    left, right = tmp_path / "both" / "predictions-base.jsonl", tmp_path / "base" / "predictions.jsonl"
    assert left.read_text() == right.read_text()


def test_an_interrupted_evaluation_goes_on_where_it_was(run, tmp_path, monkeypatch):
    words = ("--output", tmp_path / "out", "--max-tokens=300")
    stop, calls, real = Stop(), [], evaluation.generate

    def generate(*args):
        calls.append(args)
        if len(calls) == 3:
            stop.reason = "SIGTERM"
        return real(*args)

    monkeypatch.setattr(evaluation, "generate", generate)
    assert answer(run, *words, stop=stop) == STOPPED and len(calls) == 3
    assert not (tmp_path / "out" / "predictions.jsonl").exists()
    (store,) = (tmp_path / "out").glob("partial-tuned-*")
    (cut,) = store.iterdir()
    cut.write_text(cut.read_text() + '[3, "cut by a ki')
    assert answer(run, *words) == 0
    in_two_parts, calls[:] = len(calls), []
    assert answer(run, "--output", tmp_path / "whole", "--max-tokens=300") == 0
    assert in_two_parts == len(calls) > 3  # no micro-batch was run twice
    left, right = tmp_path / "out" / "predictions.jsonl", tmp_path / "whole" / "predictions.jsonl"
    assert left.read_text() == right.read_text()
