"""Answers equal plain `model.generate` on each question alone, and the summary counts them."""

import errno
import json
import math
import os
import re
import shutil

import pytest
import tiny
import torch
from peft import PeftModel
from runs import arguments
from safetensors.torch import load_file, save_file
from tiny import single
from transformers import AutoTokenizer

import eval as evaluation
import merge
import model as model_file
import train
from common import InputError, printable, quote
from data import build_batch
from dist_utils import STOPPED, Ranks, Stop
from eval import evaluate
from evaluation import answers, scores, tables
from evaluation.answers import generate, score_all, with_answer
from evaluation.comparison import read_predictions, replaced_results
from evaluation.runner import Runner, plan_evaluation
from inputs.images import image_settings
from modeling.lora import merge_lora
from training.checkpoints import checkpoints
from trees import Assignment

ALONE = Ranks(0, 1, torch.device("cpu"))


def plain_answers(world, ours, adapter, stop_token: int, penalty=None) -> tuple[list[list[int]], list[float]]:
    """Each row's greedy answer by transformers' own generate, up to the stop token, and the answers' probabilities."""
    reference = tiny.Reference(world, ours, adapter)
    answers_found, probabilities = [], []
    for line in (world / "rows.jsonl").read_text().splitlines():
        inputs = reference.inputs(json.loads(line), answered=False)
        del inputs["labels"]
        options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": stop_token, "repetition_penalty": penalty}
        out = reference.model.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True)
        new = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        answers_found.append(new[: new.index(stop_token)] if stop_token in new else new)
        probabilities.append(math.prod(step.softmax(-1)[0, token].item() for step, token in zip(out.logits, new)))
    return answers_found, probabilities


@pytest.mark.parametrize("penalty", [None, 1.3])
def test_answers_equal_plain_generation_one_by_one(world, tmp_path, penalty):
    """With and without the repetition penalty of generation_config.json. The probabilities are the model's own."""
    model = tiny.lora_model(world).eval()
    model.base.generation_config.repetition_penalty = penalty
    never = 1  # a token that this model does not produce
    free, _ = plain_answers(world, model, tmp_path, never, penalty)
    stop_token = free[5][3]  # a token that ends some answers early, at different lengths
    expected, probabilities = plain_answers(world, model, tmp_path, stop_token, penalty)
    assert len({len(answer) for answer in expected}) > 1
    data, dataset = tiny.load_world(world)
    for trees in (*plan_evaluation(data.samples, 500), *plan_evaluation(data.samples, 5000)):
        batch = build_batch(data, Assignment(trees), dataset.settings, prompts_only=True)
        for index, (answer, probability) in zip(batch.samples, generate(model, batch, 8, {stop_token})):
            assert answer == expected[index], data.samples[index].where
            assert probability == pytest.approx(probabilities[index], rel=1e-4)


def test_settings_of_generation_that_answers_do_not_follow_are_named(world, tmp_path, capsys):
    folder = shutil.copytree(world / "model", tmp_path / "model")
    path, own = folder / "generation_config.json", json.loads((folder / "generation_config.json").read_text())
    used = {"repetition_penalty": 1.05, "do_sample": True, "temperature": 0.1, "top_p": 0.001, "top_k": 1}
    for more in ({}, {"no_repeat_ngram_size": 3, "suppress_tokens": [5], "num_beams": 1, "min_new_tokens": 0}):
        path.write_text(json.dumps(own | used | more))
        model = evaluation.load_model(str(folder), None, image_settings(folder), torch.float32, torch.device("cpu"))
        assert answers.repetition_penalty(model.base) == 1.05
        named = f"warning: {path} sets no_repeat_ngram_size, suppress_tokens\n  generated answers do not follow it\n"
        assert capsys.readouterr().out == named * bool(more)


def test_an_answer_ends_at_any_token_that_ends_it_for_generate(world):
    """The model says nothing but <|endoftext|>, which its generation settings name beside <|im_end|>."""
    model = tiny.lora_model(world).eval()
    data, dataset = tiny.load_world(world)
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    model.base.generation_config.eos_token_id = [tokenizer.eos_token_id, end]
    model.base.lm_head.register_forward_hook(lambda _module, _inputs, out: out.index_fill(-1, torch.tensor([end]), 99))
    batch = build_batch(data, Assignment(plan_evaluation(data.samples, 700)[0]), dataset.settings, prompts_only=True)
    answered = answers.answer_batch(model, batch, tokenizer, 5)
    assert {answer["prediction"] for answer in answered} == {""}


def test_merged_weights_give_the_same_answers(world):
    model = tiny.lora_model(world).eval()
    data, dataset = tiny.load_world(world)
    assignments = [Assignment(batch) for batch in plan_evaluation(data.samples, 700)]
    batches = [build_batch(data, assignment, dataset.settings, prompts_only=True) for assignment in assignments]
    apart = [generate(model, batch, 8, {1}) for batch in batches]
    with model.model.disable_adapter():
        base = [generate(model, batch, 8, {1}) for batch in batches]
    merge_lora(model.model)
    for batch, expected, without in zip(batches, apart, base):
        (texts, shares), (wanted, probabilities) = zip(*generate(model, batch, 8, {1})), zip(*expected)
        assert texts == wanted and shares == pytest.approx(probabilities, rel=1e-3)
        assert shares != pytest.approx([probability for _, probability in without], rel=1e-3)


def test_options_are_scored_as_if_each_were_the_answer_of_its_own_row(world, tmp_path):
    """Compared with transformers' loss on rows whose answer is the option."""
    data, _ = tiny.load_world(world)
    model = tiny.lora_model(world).eval()
    rows = [json.loads(line) for line in (world / "rows.jsonl").read_text().splitlines()]
    chosen = {0: ["0", "1", "about 2 or more"], 17: ["upper left 0", "no"], 30: ["a growth", "a polyp"]}
    options = [chosen.get(index, []) for index in range(len(rows))]
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    runner = Runner(model, ALONE, torch.float32, 0, Stop(), tmp_path / "store")
    scored = score_all(runner, data, options, tokenizer, 700)
    reference = tiny.Reference(world, model, tmp_path / "adapter")
    for index, texts in chosen.items():
        losses = []
        for text in texts:
            inputs = reference.inputs(rows[index] | {"answer": text})
            losses.append(reference.model(**inputs).loss.item() * int((inputs["labels"] != -100).sum()))
        expected = torch.tensor(losses).neg().softmax(0).tolist()
        assert list(scored[index]["options"]) == texts
        assert list(scored[index]["options"].values()) == pytest.approx(expected, rel=1e-3)
        assert scored[index]["option"] == texts[expected.index(max(expected))]
    assert all(("options" in scores_of_row) == (index in chosen) for index, scores_of_row in enumerate(scored))


def test_an_option_takes_the_place_of_the_last_answer_only(world):
    data, _ = tiny.load_world(world)
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    two_turns = data.samples[31]
    other = with_answer(two_turns, "seven", tokenizer)
    text, before = tokenizer.decode(other.ids), tokenizer.decode(two_turns.ids)
    assert text == before.replace("two of them", "seven")
    assert tokenizer.decode(other.ids[other.trained]) == "seven<|im_end|>"


def test_an_evaluation_covers_every_sample_once_in_order(world):
    data, _ = tiny.load_world(world)
    for budget in (400, 1000, 100_000):
        batches = plan_evaluation(data.samples, budget)
        assert sorted(i for batch in batches for tree in batch for i in tree.samples) == list(range(len(data.samples)))
        assert all(len(batch) == 1 or sum(tree.tokens for tree in batch) <= budget for batch in batches)


def test_loss_equals_the_reference_and_does_not_depend_on_packing(world, tmp_path):
    data, dataset = tiny.load_world(world)
    model = tiny.lora_model(world)
    rows = [json.loads(line) for line in (world / "rows.jsonl").read_text().splitlines()]
    expected, _ = tiny.Reference(world, model, tmp_path).loss_and_gradients(rows)
    for budget in (400, 5000):
        result = evaluate(model, data, plan_evaluation(data.samples, budget), ALONE, torch.float32, 0, Stop())
        assert result["loss"] == pytest.approx(expected, rel=1e-5)
        assert result["questions"] == len(data.samples)


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "out"
    assert train.main(arguments(world, output, max_steps=30, epochs=9, lr=0.005, eval_every=0, save_every=0)) == 0
    return output


@pytest.fixture(scope="module")
def prompted(world, tmp_path_factory):
    """A run with a system prompt, pixel limits and a place of images of its own."""
    output = tmp_path_factory.mktemp("prompted") / "out"
    settings = {"max_steps": 20, "epochs": 9, "lr": 0.005, "val": "", "system": "Be brief."}
    words = arguments(world, output, **settings, min_pixels=1024, max_pixels=4096)
    assert train.main([*words, "--image-first"]) == 0
    return output


def answer(run, *words, stop=None) -> int:
    return evaluation.main(["--ckpt", str(run), "--workers=0", "--max-new-tokens=8", *map(str, words)], stop)


def test_the_summary_holds_scores_intervals_and_what_they_depend_on(world, run, tmp_path, capsys):
    assert answer(run, "--output", tmp_path, "--with-base") == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (tmp_path / "summary.csv").read_text() == tables.summary_csv(summary)
    assert (tmp_path / "summary.tex").read_text() == tables.summary_tex(summary)
    tuned, base = summary["scores"]["tuned"], summary["scores"]["base"]
    exact_match = tuned["all"]["exact_match"]
    assert 0 <= exact_match["low"] <= exact_match["mean"] <= exact_match["high"] <= 1 and exact_match["questions"] == 33
    assert {"yes/no", "count", "location"} <= tuned["by_type"].keys()
    assert {"command", "facts", "settings", "comparison"} <= summary.keys() and summary["facts"]["data"]
    gain = summary["comparison"]["difference"]["mean"]
    assert gain == pytest.approx(exact_match["mean"] - base["all"]["exact_match"]["mean"]) and gain > 0
    printed = capsys.readouterr().out
    assert "McNemar p = " in printed and printed.endswith(f"to read in a browser: {tmp_path / 'report.html'}\n")
    assert not list(tmp_path.glob("partial-*"))
    files = tmp_path / "predictions-base.jsonl", tmp_path / "predictions.jsonl"
    data, _ = tiny.load_world(world)
    lines = [json.loads(line) for line in files[1].read_text().splitlines()]
    assert [line["where"] for line in lines] == [sample.where for sample in data.samples]
    assert lines[0].keys() >= {
        "id",
        "question",
        "answer",
        "prediction",
        "right",
        "question_type",
        "images",
        "confidence",
        "cut",
    }
    assert evaluation.main(["--compare", *map(str, files)]) == 0
    assert f"{100 * gain:+.1f} points" in capsys.readouterr().out
    (tmp_path / "fewer.jsonl").write_text("".join(files[0].read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(InputError, match="same rows"):
        evaluation.main(["--compare", str(files[0]), str(tmp_path / "fewer.jsonl")])


def test_results_of_other_answers_are_told_before_they_are_replaced(world, run, tmp_path, capsys):
    """Of other rows, prompts, pictures, pixel limits and checkpoints, and of the base model where that is not asked."""
    (tmp_path / "other.jsonl").write_text((world / "rows.jsonl").read_text())
    shutil.copytree(world / "images", tmp_path / "transformed")
    out, images, words = tmp_path / "out", world / "images", ["--max-new-tokens=2", "--workers=0"]
    first, second = [f"--data={world / 'rows.jsonl'}"], [f"--data={tmp_path / 'other.jsonl'}"]
    prompt, other_images = "--prompt={question} Say it.", f"--images={tmp_path / 'transformed'}"
    told, before = [], [f"--ckpt={run}", f"--images={images}"]
    for more in (
        [*before, *first, "--with-base"],
        [*before, *first, "--with-base"],
        [*before, *first],
        [*before, *second],
        [*before, *second, prompt],
        [*before, *second, prompt, other_images],
        [*before, *second, prompt, other_images, "--max-pixels=4096"],
        [f"--model={world / 'model'}", *second, prompt, other_images, "--max-pixels=4096"],
        [f"--model={world / 'model'}", *second, prompt, other_images, "--max-pixels=4096", "--max-new-tokens=3"],
    ):
        assert evaluation.main([*words, f"--output={out}", *more]) == 0
        told += [line for line in capsys.readouterr().out.splitlines() if "has results of" in line]
    replaced = ["the base model", f"rows {quote(str(world / 'rows.jsonl'))}", "prompt '{question}'"]
    replaced += [f"pictures {quote(str(images))}", "max_pixels 65536", f"checkpoint {quote(str(checkpoints(run)[-1]))}"]
    replaced += ["max_new_tokens 2"]
    assert told == [f"warning: {out} has results of {other}" for other in replaced]
    assert not (out / "predictions-base.jsonl").exists()  # it would be compared with answers to other rows


@pytest.mark.parametrize("content", ["", "no JSON", "[1]", "{}", '{"facts": null}', '{"facts": "rows"}'])
def test_a_summary_of_another_program_is_no_result(tmp_path, content):
    (tmp_path / "summary.json").write_text(content)
    assert replaced_results(tmp_path, {"rows": "a.jsonl"}, with_base=False) == []


def test_each_file_is_compared_with_the_first(tmp_path, capsys):
    files = [tmp_path / name / "predictions.jsonl" for name in ("base", "tuned", "longer")]
    for number, path in enumerate(files):
        path.parent.mkdir()
        row = {"images": [], "answer": "yes"}
        lines = [row | {"id": i, "where": f"v:{i}", "question": f"Q\n{i}?", "by": {"level": i % 2},
                        "prediction": "yes" if i < number else f"no{number}"} for i in range(4)]  # fmt: skip
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert evaluation.main(["--compare", *map(str, files)]) == 0
    printed = capsys.readouterr().out
    first, second = printed[: printed.index("longer − base:")], printed[printed.index("longer − base:") :]
    assert first.startswith("tuned − base: +25.0 points") and second.startswith("longer − base: +50.0 points")
    assert "level, tuned − base" in first and re.search(r"\n0 +2 +\+50\.0 \(", first)
    assert re.search(r"\n1 +2 +\+0\.0 \(", first) and "0 answers right in base only:" in first
    flipped = "\n".join(["v:0 0: Q 0?", "    the row's answer: yes", "    base: no0", "    tuned: yes"])
    assert f"1 answers right in tuned only: \n  {flipped}\n" in first
    with pytest.raises(InputError, match="two or more"):
        evaluation.main(["--compare", str(files[0])])


def test_validation_rows_that_changed_since_training_are_told(world, tmp_path, capsys):
    """Numbers on other rows would stand beside those of the training."""
    rows, run = tmp_path / "rows.jsonl", tmp_path / "run"
    rows.write_text((world / "rows.jsonl").read_text())
    assert train.main([*arguments(world, run, max_steps=2, eval_every=0, save_every=2), f"--val={rows}"]) == 0
    told = []
    for kept, given in ((33, []), (20, []), (20, [f"--data={rows}", f"--images={world / 'images'}"])):
        rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:kept]))
        capsys.readouterr()
        assert evaluation.main([f"--ckpt={run}", "--max-new-tokens=2", "--workers=0", *given]) == 0
        told += [line for line in capsys.readouterr().out.splitlines() if "as in training" in line]
    assert told == [f"warning: {rows}: rows or images are not as in training, which validated on 33 questions"]


def test_questions_and_images_that_differ_are_told_in_a_comparison(tmp_path, capsys):
    """Rows are known by file, line and id, which paraphrased questions or transformed images keep."""
    row = {"id": 1, "images": ["a.png"], "question": "Is there text?", "answer": "no", "prediction": "no"}
    changes = {"first": {}, "again": {}, "asked": {"question": "Any text?"}, "shown": {"images": ["b.png"]}}
    for name, changed in changes.items():
        lines = [row | {"where": "v:1"}, row | {"where": "v:2"} | changed]
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert evaluation.main(["--compare", *(str(tmp_path / name) for name in changes)]) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    asked = "warning: 1 of 2 rows ask another question in asked than in first"
    assert told == [asked, "warning: 1 of 2 rows show other images in shown than in first"]


def test_prompts_and_limits_that_differ_are_told_in_a_comparison(world, run, tmp_path, capsys):
    """A base model that is evaluated alone has no system prompt, and its own pixel limits."""
    rows = [f"--data={world / 'rows.jsonl'}", f"--images={world / 'images'}", "--workers=0", "--max-new-tokens=2"]
    changes = {"first": [], "again": [], "other": ["--system=One word.", "--max-pixels=4096", "--max-new-tokens=3"]}
    for name, changed in changes.items():
        assert evaluation.main([f"--ckpt={run}", f"--output={tmp_path / name}", *rows, *changed]) == 0
    capsys.readouterr()
    assert evaluation.main(["--compare", *(str(tmp_path / name / "predictions.jsonl") for name in changes)]) == 0
    again, _, other = capsys.readouterr().out.partition("warning: answered with other settings:\n")
    told = ["  system is 'One word.' in other, '' in first", "  max_pixels is 4096 in other, 65536 in first"]
    told += ["  max_new_tokens is 3 in other, 2 in first"]
    assert again.startswith("again − first") and other.splitlines()[:3] == told


def test_answers_that_hold_line_separators_can_be_compared(tmp_path):
    prediction = {"id": 1, "where": "val.jsonl:1", "images": [], "answer": "a", "prediction": "a\u2028b\u0085c"}
    path = tmp_path / "predictions.jsonl"
    path.write_text(2 * (json.dumps(prediction, ensure_ascii=False) + "\n"), encoding="utf-8")
    assert read_predictions(path) == [prediction, prediction]


def test_predictions_distinguish_pictures_of_the_same_name(world, run, tmp_path):
    rows = [single(f"{folder}/a.png", "How many polyps?", "3") for folder in ("one", "two")]
    for row in rows:
        (tmp_path / row["image"]).parent.mkdir()
        (tmp_path / row["image"]).write_bytes((world / "images" / "a.png").read_bytes())
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert answer(run, "--data", tmp_path / "rows.jsonl", "--images", tmp_path, "--output", tmp_path / "out") == 0
    shown = [prediction["images"] for prediction in read_predictions(tmp_path / "out" / "predictions.jsonl")]
    assert shown == [["one/a.png"], ["two/a.png"]]


def test_rows_in_place_of_predictions_are_refused(world):
    with pytest.raises(InputError, match="rows.jsonl is no predictions file"):
        evaluation.main(["--compare", str(world / "rows.jsonl"), str(world / "rows.jsonl")])


def test_closed_questions_are_scored_by_their_options(world, run, tmp_path):
    """Questions with a few answers in the training rows, and a row with options of its own."""
    rows = [json.loads(line) for line in (world / "rows.jsonl").read_text().splitlines()]
    (tmp_path / "rows.jsonl").write_text(
        "".join(
            json.dumps(row | ({"options": ["about 0 or more", "1"]} if number == 0 else {})) + "\n"
            for number, row in enumerate(rows)
        )
    )
    words = ["--output", tmp_path / "out", "--data", tmp_path / "rows.jsonl", "--images", world / "images"]
    assert answer(run, *words, "--options", "--closed-set=4") == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    asked = [line for line in lines if "options" in line]
    assert len(asked) == 4 and list(asked[0]["options"]) == ["about 0 or more", "1"]
    assert {option for line in asked[1:] for option in line["options"]} == {"yes", "no", "no text"}
    assert all(sum(line["options"].values()) == pytest.approx(1) for line in asked)
    option_scores = json.loads((tmp_path / "out" / "summary.json").read_text())["scores"]["tuned"]["options"]
    right = [line["option"] == line["answer"] for line in asked]
    assert option_scores["top1"]["mean"] == sum(right) / 4 and option_scores["yes/no"]["questions"] == 2
    assert answer(run, *words, "--closed-set=2") == 0  # the three answers are too many
    assert '"options"' not in (tmp_path / "out" / "predictions.jsonl").read_text()


def test_every_accepted_answer_of_a_row_counts(world, run, tmp_path, capsys):
    """What the model answers to a row is accepted in a second evaluation, beside an answer that it does not give."""
    row = single("a.png", "How many polyps are in part 3?", "3")
    (tmp_path / "one.jsonl").write_text(json.dumps(row))
    words = ["--images", world / "images"]
    assert answer(run, *words, "--data", tmp_path / "one.jsonl", "--output", tmp_path / "one") == 0
    (given,) = read_predictions(tmp_path / "one" / "predictions.jsonl")
    del row["answer"]
    accepted = ["none of it", given["prediction"], "none of it", "none of it"]
    (tmp_path / "all.jsonl").write_text(json.dumps(row | {"answers": accepted}))
    assert answer(run, *words, "--data", tmp_path / "all.jsonl", "--output", tmp_path / "all") == 0
    (line,) = read_predictions(tmp_path / "all" / "predictions.jsonl")
    assert (line["answer"], line["answers"], line["right"]) == ("none of it", accepted, True)
    scored = json.loads((tmp_path / "all" / "summary.json").read_text())["scores"]["tuned"]["all"]
    assert scored["exact_match"]["mean"] == scored["anls"]["mean"] == 1
    assert scored["vqa_accuracy"]["mean"] == pytest.approx(0.25)
    assert re.search(r"VQA accuracy % +1 +25\.0 .*\nANLS % +1 +100\.0 ", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        (["--max-tokens=none", "--workers=-1"], ["--max-tokens: 'none'", "--workers: must be at least 0, not -1"]),
        (["--with-base"], ["--with-base: needs --ckpt"]),
        (["--closed-set=3"], ["--closed-set: needs --ckpt"]),
        (["--what"], ["--what: no such flag"]),
    ],
)
def test_wrong_settings_are_named_all_at_once(words, messages):
    with pytest.raises(InputError) as error:
        evaluation.parse(words)
    assert all(text in str(error.value) for text in messages)


def test_an_adapter_made_elsewhere_answers_like_the_checkpoint_with_the_same_weights(world, prompted, tmp_path, capsys):
    """Its folder tells neither rows, prompts nor pixel limits: they come from the command line."""
    ckpt, made = checkpoints(prompted)[-1], tmp_path / "made"
    made.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(ckpt / name, made)
    rows = ["--data", world / "rows.jsonl", "--images", world / "images"]
    assert answer(ckpt, *rows, "--output", tmp_path / "ours") == 0
    words = ["--adapter", made, "--model", world / "model", *rows, "--workers=0", "--max-new-tokens=8", "--with-base"]
    words += ["--system=Be brief.", "--min-pixels=1024", "--max-pixels=4096", "--output", tmp_path / "theirs"]
    assert evaluation.main([*map(str, words)]) == 0
    ours, theirs = (read_predictions(tmp_path / name / "predictions.jsonl") for name in ("ours", "theirs"))
    assert theirs == ours and (tmp_path / "theirs" / "predictions-base.jsonl").exists()
    assert answer(ckpt, *rows, "--output", tmp_path / "other", "--system=", "--prompt=Say: {question}") == 0
    assert read_predictions(tmp_path / "other" / "predictions.jsonl") != ours
    with pytest.raises(InputError, match="no rows to answer: give --data FILE$"):
        evaluation.main(["--adapter", str(made)])
    with pytest.raises(InputError, match="--adapter: not with --ckpt"):
        evaluation.parse([f"--adapter={made}", f"--ckpt={ckpt}"])
    sources = evaluation.find_sources(evaluation.parse([f"--adapter={made}", f"--data={rows[1]}"]))
    assert sources.model == str(world / "model") and sources.output.name == "eval-made"
    own = evaluation.find_sources(
        evaluation.parse([f"--adapter={ckpt}", f"--data={rows[1]}"])
    )  # a checkpoint tells all that it knows
    assert own.prompts["system"] == "Be brief." and own.ckpt == ckpt.resolve()


@pytest.mark.parametrize("part", ["layers", "merger"])
def test_another_base_model_of_the_same_sizes_is_warned_of_and_never_resumed_on(world, run, tmp_path, capsys, part):
    warning, ckpt = "was trained on other base weights than those in", checkpoints(run)[-1]
    other = shutil.copytree(world / "model", tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights |= {name: weight + 0.01 for name, weight in weights.items() if part in name}
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    asked = ["--ckpt", str(ckpt), "--question=Sharp?", "--max-new-tokens=1"]
    settings = {"init_from": ckpt, "max_steps": 1, "eval_every": 0}
    commands = [
        lambda model: evaluation.main([*asked, f"--model={model}"]),
        lambda model: merge.main([f"--ckpt={ckpt}", f"--out={tmp_path / 'merged'}", f"--model={model}"]),
        lambda model: train.main(arguments(world, tmp_path / "new", model=model, **settings)),
    ]
    for command in commands:
        assert command(other) == 0
        assert f"warning: {ckpt}\n  {warning} {other}" in capsys.readouterr().out
    commands[0](world / "model")
    assert train.main(arguments(world, tmp_path / "new", model=other, **settings, resume="auto")) == 0
    assert warning not in capsys.readouterr().out
    with pytest.raises(InputError, match=f"{warning} {world / 'model'}\n  resume with that base model, or"):
        train.main(arguments(world, tmp_path / "new", **settings, resume="auto"))
    old = shutil.copytree(ckpt, tmp_path / "checkpoint-000020")
    manifest = json.loads((old / "manifest.json").read_text())
    assert manifest.pop("base weights in layers") and manifest.pop("base weights outside layers")
    (old / "manifest.json").write_text(json.dumps(manifest))  # as an older version wrote it
    evaluation.main(["--ckpt", str(old), *asked[2:], f"--model={other}"])
    assert warning not in capsys.readouterr().out


def test_another_chat_template_is_warned_of(world, run, tmp_path, capsys):
    ckpt, model = checkpoints(run)[-1], shutil.copytree(world / "model", tmp_path / "model")
    warning = f"with another chat template than that of {model}"
    asked = ["--question=Sharp?", "--max-new-tokens=1", f"--model={model}"]

    def told(main=evaluation.main, words=(*asked, f"--ckpt={ckpt}")) -> bool:
        assert main(list(words)) == 0
        return warning in capsys.readouterr().out

    assert not told()
    made = tmp_path / "made"  # an adapter made elsewhere, beside its template
    made.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(ckpt / name, made)
    shutil.copy(model / "chat_template.jinja", made)
    assert not told(words=(*asked, f"--adapter={made}"))
    template = model / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_start|>", "<|im_start|>the "))
    assert told() and told(words=(*asked, f"--adapter={made}"))
    assert told(merge.main, [f"--ckpt={ckpt}", f"--out={tmp_path / 'merged'}", f"--model={model}"])
    old = shutil.copytree(ckpt, tmp_path / "checkpoint-000020")
    manifest = json.loads((old / "manifest.json").read_text())
    assert manifest.pop("prompt")
    (old / "manifest.json").write_text(json.dumps(manifest))  # as an older version wrote it
    assert not told(words=(*asked, f"--ckpt={old}"))


def test_base_answers_are_those_of_the_model_without_an_adapter(world, run, tmp_path):
    assert answer(run, "--output", tmp_path / "both", "--with-base") == 0
    words = ["--model", world / "model", "--data", world / "rows.jsonl", "--images", world / "images", "--workers=0"]
    assert evaluation.main([*map(str, words), "--max-new-tokens=8", "--output", str(tmp_path / "base")]) == 0
    left, right = tmp_path / "both" / "predictions-base.jsonl", tmp_path / "base" / "predictions.jsonl"
    assert left.read_text() == right.read_text()


def test_an_interrupted_evaluation_continues_where_it_was(run, tmp_path, monkeypatch, capsys):
    words = ("--output", tmp_path / "out", "--max-tokens=300")
    stop, calls, real = Stop(), [], answers.generate

    def generate(*args):
        calls.append(args)
        if len(calls) == 3:
            stop.reason = "SIGTERM"
        return real(*args)

    monkeypatch.setattr(answers, "generate", generate)
    assert answer(run, *words, stop=stop) == STOPPED and len(calls) == 3
    assert not (tmp_path / "out" / "predictions.jsonl").exists()
    (store,) = (tmp_path / "out").glob("partial-tuned-*")
    (cut,) = store.iterdir()
    damaged = b'\xff\x00\n[0, "another format"]\n00000000 [1, 2]\n{}\n'
    cut.write_bytes(damaged + cut.read_bytes() + b'[3, "cut by a ki')
    assert answer(run, *words) == 0
    assert f"warning: 4 damaged line(s) in {store}: these answers are computed again" in capsys.readouterr().out
    in_two_parts, calls[:] = len(calls), []
    assert answer(run, "--output", tmp_path / "whole", "--max-tokens=300") == 0
    assert in_two_parts == len(calls) > 3  # no micro-batch was run twice
    left, right = tmp_path / "out" / "predictions.jsonl", tmp_path / "whole" / "predictions.jsonl"
    assert left.read_text() == right.read_text()


def test_two_evaluations_in_one_folder_are_refused_and_one_beside_training_is_not(run, tmp_path, hold, monkeypatch):
    training = shutil.copytree(run, tmp_path / "run")
    hold(training / "lock")
    monkeypatch.setattr(evaluation, "predict", lambda runner, *_: setattr(runner.stop, "reason", "SIGTERM"))
    assert answer(training) == STOPPED
    hold(tmp_path / "lock")
    monkeypatch.setattr(evaluation, "load_base", lambda *_: pytest.fail("loaded the model"))
    with pytest.raises(InputError, match=f"--output {tmp_path} is in use by another process"):
        answer(run, "--output", tmp_path)


@pytest.mark.parametrize("kind", ["file", "link"])
def test_partial_results_that_are_no_folder_are_refused(run, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(evaluation, "identify", lambda *_: ({}, "key"))
    partial, outside = tmp_path / "out" / "partial-tuned-key", tmp_path / "outside"
    (tmp_path / "out").mkdir()
    outside.mkdir()
    partial.touch() if kind == "file" else partial.symlink_to(outside)
    with pytest.raises(InputError, match="partial-tuned-key is not a folder that an evaluation made: remove it"):
        answer(run, "--output", tmp_path / "out")
    assert not list(outside.iterdir())


@pytest.mark.parametrize("gone", [False, True])
def test_answers_that_a_disk_does_not_take_are_one_clear_error(run, tmp_path, monkeypatch, gone):
    real = answers.generate

    def generate(*args):
        if gone:
            shutil.rmtree(tmp_path / "out")
        else:
            monkeypatch.setattr("evaluation.runner.is_same_file", full)
        return real(*args)

    def full(*_):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(answers, "generate", generate)
    with pytest.raises(InputError, match="answers can't be kept; the same command continues from those that are: "):
        answer(run, "--output", tmp_path / "out")
    assert not gone or not (tmp_path / "out").exists()


@pytest.mark.parametrize("changed", ["weights", "picture"])
def test_partial_answers_of_other_weights_or_pictures_are_not_reused(world, tmp_path, monkeypatch, changed):
    model, images = shutil.copytree(world / "model", tmp_path / "m"), shutil.copytree(world / "images", tmp_path / "i")
    words = [f"--model={model}", f"--data={world / 'rows.jsonl'}", f"--images={images}", f"--output={tmp_path / 'out'}"]
    words += ["--workers=0", "--max-new-tokens=4", "--max-tokens=300"]
    stop, real = Stop(), answers.generate

    def generate(*args):
        stop.reason = "SIGTERM"
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(answers, "generate", generate)
        assert evaluation.main(words, stop) == STOPPED
    stores = list((tmp_path / "out").glob("partial-base-*"))
    path = model / "model.safetensors" if changed == "weights" else images / "a.png"
    os.utime(path, ns=(1, 1))  # as of another file of the same size
    assert evaluation.main(words) == 0
    left = list((tmp_path / "out").glob("partial-base-*"))
    assert len(stores) == 1 and left == stores  # it stays, for the first evaluation to go on with


def test_results_do_not_go_where_they_can_t_or_where_a_run_lies(world, run, tmp_path):
    (tmp_path / "file").touch()
    for output, message in (
        (tmp_path / "file", "file is no folder"),
        (run, "is the folder of a training run"),
    ):
        with pytest.raises(InputError, match=f"--output: .*{message}"):
            answer(run, "--output", output)


def test_a_checkpoint_of_a_model_of_other_sizes_is_one_clear_error(world, run, tmp_path):
    other = tiny.write_world(tmp_path / "other", family="qwen2_vl")
    with pytest.raises(InputError, match="does not fit this base model, leave out --model: size mismatch for"):
        answer(run, "--model", other / "model", "--output", tmp_path / "out")


def test_a_type_named_all_is_not_taken_for_all_rows():
    rows = [{"images": ["a"], "question": "q", "answer": "x", "prediction": "x" if kind == "all" else "y",
             "question_type": kind, "loss": 1.0, "answer_tokens": 1, "teacher_forced": True}
            for kind in ["other", "all", "other"]]  # fmt: skip
    lines = evaluation.accuracy_table({"tuned": scores.summarize(rows, 0.05)}).splitlines()
    assert [line.split()[:3] for line in lines[1:]] == [
        ["all", "1", "100.0"],
        ["other", "2", "0.0"],
        ["all", "3", "33.3"],
    ]


# --------------------------------------------------------------------------------------------------------- one question

QUESTIONS = {
    "one picture": single("a.png", "How many polyps are in part 3?", "3"),
    "two pictures in order": {"image": ["d.png", "c.png"], "question": "Which is larger?", "answer": "first"},
    "placeholders": {"image": ["c.png", "d.png"], "question": "Is <image> larger than <image>?", "answer": "no"},
    "text only": {"question": "What is a polyp?", "answer": "a growth"},
}


def asked(world, row: dict) -> list[str]:
    names = row.get("image", [])
    names = names if isinstance(names, list) else [names]
    return [f"--question={row['question']}", *(f"--image={world / 'images' / name}" for name in names)]


@pytest.mark.parametrize("name", QUESTIONS)
def test_one_question_is_answered_like_a_row_and_leaves_nothing(world, prompted, tmp_path, monkeypatch, capsys, name):
    row = QUESTIONS[name]
    (tmp_path / "row.jsonl").write_text(json.dumps(row))
    images = ["--images", world / "images"] if "image" in row else []
    assert answer(prompted, "--data", tmp_path / "row.jsonl", "--output", tmp_path / "out", *images) == 0
    expected = json.loads((tmp_path / "out" / "predictions.jsonl").read_text())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    before, _ = sorted(tmp_path.rglob("*")), capsys.readouterr()
    assert answer(prompted, *asked(world, row)) == 0
    told = f"{expected['prediction']}\nconfidence {expected['confidence']:.4f}, answered after "
    assert re.fullmatch(re.escape(told) + r"\d+ s\n", capsys.readouterr().out)
    assert sorted(tmp_path.rglob("*")) == before


def test_one_question_compiles_no_attention_and_rows_do(world, prompted, tmp_path, monkeypatch):
    """On CUDA, a block mask is compiled, and FlexAttention after it."""
    dense, mask = [], model_file.tree_mask
    monkeypatch.setattr(
        model_file, "tree_mask", lambda batch, is_dense: dense.append(is_dense) or mask(batch, is_dense)
    )
    assert answer(prompted, *asked(world, QUESTIONS["one picture"])) == 0 and dense == [True]
    (tmp_path / "row.jsonl").write_text(json.dumps(QUESTIONS["one picture"]))
    rows = ["--data", tmp_path / "row.jsonl", "--output", tmp_path / "out", "--images", world / "images"]
    assert answer(prompted, *rows) == 0 and dense == [True, False, False]  # answers, and scores


def test_one_answer_equals_plain_generation(world, prompted, capsys):
    """Compared with transformers and peft, for the run's system prompt and pixel limits, and for the base model."""
    adapter = checkpoints(prompted)[-1]
    row = QUESTIONS["two pictures in order"]
    prompted_row = {"messages": [tiny.turn("system", "Be brief."), tiny.turn("user", row["question"], 2),
                         tiny.turn("assistant", row["answer"])], "images": row["image"]}  # fmt: skip
    reference = tiny.Reference(world, tiny.lora_model(world), prompted.parent / "any")
    small = {"shortest_edge": 32 * 32, "longest_edge": 64 * 64}
    reference.processor = type(reference.processor).from_pretrained(world / "model", size=small)
    base = reference.model.unload()
    reference.model = PeftModel.from_pretrained(base, adapter)
    inputs = reference.inputs(prompted_row, answered=False)
    assert answer(prompted, *asked(world, row)) == 0
    assert printed(capsys) == plainly(reference, inputs)
    reference.model = reference.model.unload()
    reference.processor = type(reference.processor).from_pretrained(world / "model")
    inputs = reference.inputs(row, answered=False)
    words = ["--model", str(world / "model"), "--max-new-tokens=8", *asked(world, row)]
    assert evaluation.main(words) == 0
    assert printed(capsys) == plainly(reference, inputs)


def test_a_run_s_image_first_holds_for_questions_and_rows(world, prompted, run, tokenizer, settings, tmp_path):
    def ids(run, question: str) -> list[int]:
        args = evaluation.parse(
            ["--ckpt", str(run), "--image", str(world / "images" / "a.png"), "--question", question]
        )
        sources = evaluation.find_sources(args)
        return evaluation.question_data(args, sources, tokenizer, settings).samples[0].ids.tolist()

    assert ids(prompted, "Is it red? <image>") == ids(prompted, "<image>Is it red?")
    assert ids(run, "Is it red? <image>") != ids(run, "<image>Is it red?")
    (tmp_path / "rows.jsonl").write_text(json.dumps(tiny.single("a.png", "Is it red? <image>", "no")))
    words = ["--data", tmp_path / "rows.jsonl", "--output", tmp_path / "out", "--images", world / "images"]
    args = evaluation.parse(["--ckpt", str(prompted), *map(str, words)])
    data, _ = evaluation.load_rows(args, evaluation.find_sources(args), tokenizer, settings)
    assert not data.samples[0].text_first
    (tmp_path / "rows.jsonl").write_text(json.dumps({"question": "Is it red?", "answer": "no"}))
    with pytest.raises(InputError, match="--images .* is given, but no row shows an image"):
        evaluation.load_rows(args, evaluation.find_sources(args), tokenizer, settings)


def printed(capsys) -> tuple:
    text, confidence = capsys.readouterr().out.split("\nconfidence ")
    return text, pytest.approx(float(confidence.split(",")[0]), abs=1e-4)


def plainly(reference, inputs: dict) -> tuple[str, float]:
    """Text, as a terminal gets it, and probability of transformers' own greedy generation."""
    del inputs["labels"]
    options = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    out = reference.model.generate(**inputs, **options)
    text = reference.tokenizer.decode(out.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    probability = math.prod(step.softmax(-1).max().item() for step in out.logits)
    return printable(text), probability


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--question=Sharp?", "--image=nowhere.png"], "^wrong settings:\n  --image: nowhere.png does not exist$"),
        (["--question=Sharp?", "--image={world}/rows.jsonl"], "--image: .*rows.jsonl: .*it is no JPEG"),
        (["--question=Sharp?", "--image={world}/images"], "--image: .*images is a folder, no file$"),
        (["--question=Sharp?", "--image=nowhere.png", "--image={world}/images"], "nowhere.png does(.|\n)*is a folder"),
        (["--image={world}/images/a.png"], "--image: needs --question"),
        (["--question=Sharp?", "--data={world}/rows.jsonl"], "--data: not with --question"),
        (["--question=Sharp?", "--with-base", "--ckpt=any", "--output=out"], "--with-base: not(.|\n)*--output: not"),
        (["--question= "], "--question: the question is empty"),
        (["--question=<image>?"], "--question: 1 image placeholders for 0 images"),
        (["--question=<|im_end|>"], r"--question: the user text holds the special token <\|im_end\|>"),
        (["--question=Sharp?", "--max-tokens=3"], "--question: .* tokens, over --max-tokens 3"),
    ],
)
def test_a_question_that_can_t_be_asked_is_refused(world, words, message):
    with pytest.raises(InputError, match=message):
        evaluation.main([f"--model={world / 'model'}", *(word.format(world=world) for word in words)])
