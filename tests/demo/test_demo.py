"""The embedded demo learns from its pictures: the README's command, and what it must not do with shuffled answers."""

import json
import random

from test_dist_utils import HERE, torchrun

from demo import endoscopy

TRAIN = HERE.parent / "train.py"


def last_evaluation(output) -> dict:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == "eval"][-1]


def test_the_demo_learns_its_pictures_and_runs_twice(tmp_path):
    done = torchrun(2, TRAIN, timeout=900, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "training the embedded demo" in done.stdout.splitlines()[0]
    result = last_evaluation(tmp_path / "runs" / "demo-1")
    assert result["exact_match"] >= 0.9
    header, *table = done.stdout[done.stdout.index("exact match %") :].splitlines()
    assert header.split()[-2:] == ["base", "tuned"]
    base, tuned = next((float(row.split()[-2]), float(row.split()[-1])) for row in table if row.startswith("all"))
    assert base < 10 and tuned >= 90
    again = torchrun(2, TRAIN, "--max-steps=2", timeout=300, cwd=tmp_path)
    assert again.returncode == 0 and (tmp_path / "runs" / "demo-2" / "checkpoint-000002").is_dir(), again.stderr


def test_shuffled_answers_are_not_learnt(tmp_path):
    """Answers dealt anew among the rows of each question: what the words tell stays, what the picture tells goes. In as
    many epochs the true answers are learnt to 0.88."""
    folder = tmp_path / "data"
    endoscopy.make_demo(folder)
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    by_question = {}
    for row in rows:
        by_question.setdefault(row["question"], []).append(row)
    for same in by_question.values():
        answers = [row["answer"] for row in same]
        random.Random(0).shuffle(answers)
        for row, answer in zip(same, answers):
            row["answer"] = answer
    (folder / "shuffled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = endoscopy.SETTINGS | {"epochs": 4, "train": folder / "shuffled.jsonl", "val": folder / "val.jsonl"}
    given |= {"images": folder, "model": folder / "model", "output": tmp_path / "out"}
    done = torchrun(2, TRAIN, *(f"--{name.replace('_', '-')}={value}" for name, value in given.items()), timeout=900)
    assert done.returncode == 0, done.stderr
    assert last_evaluation(tmp_path / "out")["exact_match"] < 0.7
