"""Answers that are wrong for another reason than the model's judgement: cut by a limit."""

import json
import re

from tiny import single

import eval as evaluation
from evaluation import answers


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
    lines = evaluation.read_predictions(tmp_path / "out" / "predictions.jsonl")
    assert [line["cut"] for line in lines] == [True, True, False]
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["scores"]["base"]["cut"] == 2
    told = "\n2 of 3 answers (base) were cut at 3 tokens: give a higher --max-new-tokens\n"
    assert told in capsys.readouterr().out
