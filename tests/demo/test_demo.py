"""The embedded demo, started by the README's command, learns from its pictures and not from its words alone."""

import json
import os
import random
from functools import partial

import pytest
import runs

from demo import endoscopy

TRAIN = runs.ROOT / "train.py"


def exact_match(output) -> float:
    return runs.lines(output, "eval")[-1]["exact_match"]


def test_the_demo_learns_its_pictures_and_runs_twice(tmp_path):
    """The README's command, cut to two epochs of smaller steps. Words alone lead to 48%."""
    log = tmp_path / "log"
    assert runs.torchrun(TRAIN, "--epochs=2", "--batch-size=64", log=log, cwd=tmp_path).wait(900) == 0, log.read_text()
    base, tuned = table(log.read_text())
    assert "arning" not in log.read_text() and "shards" not in log.read_text()
    assert (
        base < 10 and tuned >= 65 and exact_match(tmp_path / "runs" / "demo-1") == pytest.approx(tuned / 100, abs=1e-3)
    )
    again = runs.Run(["--max-steps=2"], tmp_path / "again", ranks=2, fault=partial(os.chdir, tmp_path)).succeed()
    assert "training the embedded demo" in again and (tmp_path / "runs" / "demo-2" / "checkpoint-000002").is_dir()


def table(log: str) -> tuple[float, float]:
    """Exact match of all questions in percent, of the base and of the tuned model, from the table that a run prints."""
    assert "training the embedded demo" in log
    header, *rows = log[log.index("exact match %") :].splitlines()
    assert header.split()[-2:] == ["base", "tuned"]
    return next((float(row.split()[-2]), float(row.split()[-1])) for row in rows if row.startswith("all"))


@pytest.mark.slow
def test_the_whole_demo_answers_nine_of_ten_questions(tmp_path):
    log = tmp_path / "log"
    assert runs.torchrun(TRAIN, log=log, cwd=tmp_path).wait(900) == 0, log.read_text()
    base, tuned = table(log.read_text())
    assert base < 10 and tuned >= 90


@pytest.mark.slow
def test_shuffled_answers_are_not_learnt(tmp_path):
    """Answers are shuffled among the rows of each question, so that only the words can help, and not the picture.

    In as many epochs the true answers reach 0.81.
    """
    folder = tmp_path / "data"
    endoscopy.make_demo(folder)
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    by_question = {}
    for row in rows:
        by_question.setdefault(row["question"], []).append(row)
    for same_question in by_question.values():
        answers = [row["answer"] for row in same_question]
        random.Random(0).shuffle(answers)
        for row, answer in zip(same_question, answers):
            row["answer"] = answer
    (folder / "shuffled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = endoscopy.SETTINGS | {"epochs": 3, "train": folder / "shuffled.jsonl", "val": folder / "val.jsonl"}
    settings |= {"images": folder, "model": folder / "model", "output": tmp_path / "out"}
    words = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    runs.Run(words, tmp_path / "log", ranks=2).succeed(900)
    assert exact_match(tmp_path / "out") < 0.7
