"""Answers that are wrong for another reason than the model's judgement: cut by a limit, or of broken weights."""

import json
import math
import re
import shutil

import pytest
import tiny
import torch
from runs import Run
from safetensors.torch import load_file, save_file
from tiny import single

import eval as evaluation
from dist_utils import Ranks, Stop
from evaluation import answers
from evaluation.answers import score_all
from evaluation.comparison import read_predictions
from evaluation.runner import Runner
from training.checkpoints import checkpoints


def test_answers_that_the_limit_cuts_are_foreseen_counted_and_marked(world, tmp_path, monkeypatch, capsys):
    """The model never ends an answer but one, whose third token is its end."""
    rows = [single("a.png", f"What is in part {i}?", answer) for i, answer in enumerate(["polyp " * 9, "no", "yes"])]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [f"--model={world / 'model'}", f"--data={tmp_path / 'rows.jsonl'}", f"--images={world / 'images'}"]
    words += ["--workers=0", "--max-new-tokens=3", f"--output={tmp_path / 'out'}"]
    ended, real = [([5, 6], 0.5)], evaluation.load_base

    def load_base(*args):
        assert longest(capsys.readouterr().out) > 9  # told before
        return real(*args)

    def longest(told: str) -> int:
        warning = r"warning: 1 of 3 rows have answers over --max-new-tokens 3\n"
        match = re.search(warning + r"  the longest has (\d+) tokens with its end: give --max-new-tokens \1\n", told)
        return int(match[1])

    monkeypatch.setattr(evaluation, "load_base", load_base)
    monkeypatch.setattr(answers, "generate", lambda model, batch, *_: 2 * [([5, 6, 7], 0.5)] + ended)
    assert evaluation.main(words) == 0
    lines = read_predictions(tmp_path / "out" / "predictions.jsonl")
    assert [line["cut"] for line in lines] == [True, True, False]
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["scores"]["base"]["cut"] == 2
    told = "\n2 of 3 answers (base) were cut at 3 tokens: give a higher --max-new-tokens\n"
    assert told in capsys.readouterr().out
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count(" (cut)</span>") == 2
    assert re.search(r"answers cut by --max-new-tokens</t.><td[^>]*>3</td><td[^>]*>2</td>", page)


@pytest.mark.parametrize("broken", ["base", "adapter"])
@pytest.mark.parametrize("asks", ["rows", "question"])
def test_a_model_whose_numbers_are_not_finite_is_an_error_and_no_result(world, undisturbed, tmp_path, broken, asks):
    """An adapter without a manifest, so that no hash of its files tells that they are damaged."""
    folder, ckpt = tmp_path / "model", tmp_path / "adapter"
    shutil.copytree(world / "model", folder)
    shutil.copytree(checkpoints(undisturbed)[-1], ckpt, ignore=shutil.ignore_patterns("manifest.json", "state.pt"))
    path = {"base": folder / "model.safetensors", "adapter": ckpt / "adapter_model.safetensors"}[broken]
    weights = load_file(path)
    next(weight for name, weight in weights.items() if "q_proj" in name).view(-1)[0] = float("inf")
    save_file(weights, path, {"format": "pt"})
    words = {"rows": [f"--data={world / 'rows.jsonl'}", f"--images={world / 'images'}", f"--output={tmp_path / 'out'}"],
             "question": ["--question=Sharp?", f"--image={world / 'images' / 'a.png'}"]}[asks]  # fmt: skip
    words += [f"--model={folder}", "--workers=0", "--max-new-tokens=2"]
    words += [f"--adapter={ckpt}"] * (broken == "adapter")
    command = Run(words, tmp_path / "log", main=evaluation.main)
    assert command.wait() == [1]
    name = f"{ckpt} on base model {folder}" if broken == "adapter" else f"base model {folder}"
    where = {"rows": "rows.jsonl:1", "question": "--question:1"}[asks]
    error, remedy = command.text().splitlines()[-2:]
    assert error.endswith(f"error: {name} gives numbers that are not finite for {where}")
    assert remedy.startswith("  its weights are damaged, or overflowed") and "Traceback" not in command.text()
    assert not list(tmp_path.glob("out/*.json*"))


def test_a_loss_that_is_not_finite_is_an_error(world, tmp_path, monkeypatch):
    model, (data, _) = tiny.lora_model(world).eval(), tiny.load_world(world)
    monkeypatch.setattr(answers, "score_samples", lambda _, batch: [(math.nan, 1, False)] * len(batch.samples))
    alone = Ranks(0, 1, torch.device("cpu"))
    runner = Runner(model, alone, torch.float32, 0, Stop(), tmp_path / "store", "base model x")
    with pytest.raises(FloatingPointError, match="^base model x gives numbers that are not finite for rows.jsonl:1\n"):
        score_all(runner, data, [[] for _ in data.samples], None, 700)
