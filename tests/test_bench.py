"""The benchmarks run; the step benchmark counts the floating-point operations that torch counts; the study of groupings
asks what it says it asks."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

STEP = Path(__file__).parents[1] / "bench" / "step.py"
spec = importlib.util.spec_from_file_location("bench_step", STEP)
bench = importlib.util.module_from_spec(spec)
sys.modules["bench_step"] = bench
spec.loader.exec_module(bench)
sys.path.append(str(STEP.parent))
import grouping  # noqa: E402


def test_the_benchmark_prints_a_table_and_writes_json(tmp_path):
    words = [sys.executable, STEP, "--preset", "tiny", "--profile", "--json", tmp_path / "out.json"]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    assert [row["case"] for row in result["rows"]] == ["recipe", "tree-1", "cached-9", "tree-9", "tree-17"]
    assert all(row["ms_per_question"] > 0 and row["tflops"] > 0 for row in result["rows"])
    assert {"name", "device", "versions", "commit", "command"} <= result.keys() and "ms/question" in done.stdout
    assert "matrix products" in done.stdout and "vision tower" in done.stdout


def test_the_evaluation_benchmark_gets_the_same_answers_both_ways(world, tmp_path):
    words = [sys.executable, STEP.with_name("evaluate.py"), "--model", world / "model", "--rows", world / "rows.jsonl"]
    words += ["--images", world / "images", "--workers", 0, "--alone", 4, "--json", tmp_path / "out.json"]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    alone, trees, scores = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert trees["questions"] == scores["questions"] == 33 and 1 < alone["questions"] <= 4
    assert trees["same"] == 1 and all(row["questions_per_s"] > 0 for row in (alone, trees, scores))


def test_the_job_benchmark_trains_and_tells_both_speeds(world, tmp_path):
    rows = [
        {"image_filename": f"{image}.jpg", "question": f"Is there {thing}?", "answer": "yes"}
        for image in range(3)
        for thing in ("text", "a polyp")[: 1 + image % 2]
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = [sys.executable, STEP.with_name("job.py"), "--rows", tmp_path / "rows.jsonl", "--model", world / "model"]
    words += ["--work", tmp_path / "job", "--images", 6, "--size", "64x48", "--question-tokens", 60, "--pictures", 2]
    words += ["--preset", "tiny", "--recipe-steps", 1, "--json", tmp_path / "out.json"]
    words += ["--batch-size", 3, "--max-steps", 3, "--workers", 0]  # settings of train.py
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    trees, recipe = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert trees["steps"] == 3 and trees["questions"] == 2 and recipe["questions"] == 16  # 8 questions in all
    assert trees["job_hours"] > 0 and recipe["job_hours"] > 0 and "3 epochs, h" in done.stdout
    made = [json.loads(line) for line in (tmp_path / "job" / "train.jsonl").read_text().splitlines()]
    assert len({row["image_filename"] for row in made}) == 6 and len(made) == 8
    assert all(len((row["question"] + row["answer"]).split()) > 10 for row in made)  # made longer


@pytest.mark.parametrize("questions", [1, 9])
def test_counted_operations_are_torch_s(tmp_path, questions, monkeypatch):
    preset, cpu = bench.PRESETS["tiny"], torch.device("cpu")
    args = type("Args", (), {"compile": False, "memory_budget": 1.0})
    model = bench.tree_model(preset, cpu, torch.float32, tmp_path, args)
    tokens, step, _ = bench.tree_step(model, preset, questions, cpu, torch.float32, tmp_path)
    with FlopCounterMode(display=False) as counter:
        step()
    patches = (preset.size[0] // 16) * (preset.size[1] // 16)
    answers = questions * preset.answer_tokens
    branches = [preset.question_tokens] * questions
    config = bench.Qwen3VLConfig(**preset.config)
    flops = bench.step_flops(config, [patches], patches // 4 + 4, branches, answers)
    counted = flops.language + flops.tower  # torch omits attention
    lora = 0
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            rows = answers if "layers.1.mlp" in name else tokens
            lora += 6 * 8 * (module.in_features + module.out_features) * rows  # 2 forward, 4 backward, each times r
    assert counter.get_total_flops() == counted + lora


# ------------------------------------------------------------------------------------------------------------ groupings


def write_random_digits(folder: Path, number: int = 12, held_out: int = 4) -> None:
    draw = np.random.default_rng(0)
    grouping.write_digits(folder, draw.integers(0, 17, (number, 8, 8)), draw.integers(0, 10, number), held_out)


def test_a_digit_s_questions_have_the_answers_worked_out_by_hand():
    picture = np.zeros((8, 8), int)
    picture[0, 7], picture[7, 0], picture[6, 1] = 9, 5, 5  # upper right 9, lower left 10
    answers = {question: answer for _, question, answer in grouping.digit_questions(picture, 9, 4)}
    assert list(answers.values()) == ["9", "10", "odd", "yes", "no", "lower", "left", "lower-left"]
    picture[6, 1] = 4  # 9 and 9: no half and no quarter has more
    assert len(grouping.digit_questions(picture, 4, 4)) == 5
    assert [answer for _, _, answer in grouping.digit_questions(picture, 4, 4)] == ["4", "5", "even", "no", "yes"]


def test_the_digits_rows_are_right_and_held_out_by_picture(tmp_path):
    """Against scikit-learn's labels and the ink that stands in the written pictures."""
    digits = pytest.importorskip(
        "sklearn.datasets", reason="scikit-learn, which holds the digits, is absent"
    ).load_digits()
    grouping.write_digits(tmp_path / "digits", digits.images[:300], digits.target[:300])
    rows = {}
    for split in ("train", "val"):
        rows[split] = [json.loads(line) for line in (tmp_path / "digits" / f"{split}.jsonl").read_text().splitlines()]
    train, val = ({row["image"] for row in rows[split]} for split in rows)
    assert not train & val and len(train) == 100 and len(val) == 200
    asked = 0
    for row in rows["train"] + rows["val"]:
        digit = digits.target[int(Path(row["image"]).stem)]
        ink = 255 - np.asarray(Image.open(tmp_path / "digits" / row["image"])).astype(float)
        half, quarters = len(ink) // 2, {}
        for name, part in (("upper", ink[:half]), ("lower", ink[half:])):
            quarters[f"{name}-left"], quarters[f"{name}-right"] = part[:, :half].sum(), part[:, half:].sum()
        sides = {side: sum(v for k, v in quarters.items() if side in k) for side in ("upper", "lower", "left", "right")}
        words = row["question"].rstrip("?").split()
        expected = {
            "Which digit is it?": str(digit),
            "Which number is one more?": str(1 + digit),
            "Is it even or odd?": "even" if digit in (0, 2, 4, 6, 8) else "odd",
            "Is it larger than 4?": "yes" if digit in (5, 6, 7, 8, 9) else "no",
            f"Is it a {words[-1]}?": "yes" if words[-1] == str(digit) else "no",
            "Is more ink in the upper or in the lower half?": max(("upper", "lower"), key=sides.get),
            "Is more ink in the left or in the right half?": max(("left", "right"), key=sides.get),
            "Which quarter has most ink?": max(quarters, key=quarters.get),
        }
        ranked = sorted(quarters.values())
        margin = abs(sides["upper"] - sides["lower"]), abs(sides["left"] - sides["right"]), ranked[-1] - ranked[-2]
        if row["question_type"] != "ink" or min(margin) > 0.02 * ink.sum():  # enlarging moves a little ink
            assert row["answer"] == expected[row["question"]], row
            asked += 1
    assert asked > 0.8 * sum(map(len, rows.values()))


def test_groupings_are_compared_at_the_same_number_of_questions_and_of_images(tmp_path):
    """100 images with one question and 100 with nine: 200 trees, 400 of at most four, 1,000 of one."""
    rows = [{"image": f"{i}.png"} for i in range(200) for _ in range(9 if i % 2 else 1)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    runs = grouping.plan_runs("digits", tmp_path / "train.jsonl")
    assert len(runs) == len(set(runs)) == 9 * len(grouping.RATES) * len(grouping.SEEDS)
    sizes = {(run.same, run.grouping): run.batch_size for run in runs}
    assert (sizes["images", 1], sizes["images", 4]) == (13, 32)
    assert {sizes["few", k] for k in (0, 1, 4)} == {16}
    assert {sizes["questions", 0], sizes["questions", 1], sizes["questions", 4], sizes["time", 1]} == {64}
    for run in runs:
        seen = {"few": 8192, "time": 0.28 * 16384}.get(run.same, 16384)
        assert run.steps * run.batch_size == pytest.approx(seen, rel=0.05)


def test_a_run_of_the_study_counts_questions_and_trees_and_is_not_made_twice(tmp_path, monkeypatch, capsys):
    write_random_digits(tmp_path / "digits")
    train, val = ((tmp_path / "digits" / f"{split}.jsonl").read_text().splitlines() for split in ("train", "val"))
    train, val = ({json.loads(row)["image"] for row in rows} for rows in (train, val))
    assert len(train) == 8 and len(val) == 4 and not train & val
    run = grouping.Run("digits", "few", 0, 1e-3, 0, batch_size=8, steps=2)
    monkeypatch.setattr(grouping, "EVALUATIONS", 2)
    monkeypatch.setattr(grouping, "plan_runs", lambda name, rows: [run])
    words = ["grouping.py", "run", "--data", tmp_path, "--only", "digits", "--json", tmp_path / "out.json", "--jobs", 1]
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    grouping.main()
    (made,) = json.loads((tmp_path / "out.json").read_text())["runs"]
    assert made == grouping.asdict(run) | {"points": made["points"]}
    assert [(point["questions"], point["trees"]) for point in made["points"]] == [(8, 1), (16, 2)]
    assert made["points"][1]["exact_match"] == 0
    assert "1 of 1: data digits" in capsys.readouterr().out
    monkeypatch.setattr(grouping, "train", None)
    grouping.main()
    assert "1 of 1" not in capsys.readouterr().out


def test_the_study_s_report_has_means_intervals_and_plots(tmp_path, monkeypatch, capsys):
    """Three seeds of 70, 72 and 74% are 72 ± 4.303 x 2 / sqrt(3); one a tree lies 5 points below them.
    On the 8B, 32 trees of 4 questions take 32 x 278 + 96 x 14 ms."""
    runs = []
    for data in grouping.DATA_SETS:
        for same, questions in grouping.ARMS:
            for seed in (0, 1, 2):
                found = 0.70 + 0.02 * seed - 0.05 * (questions == 1)
                points = [{"questions": 64 * k, "trees": 16 * k, "exact_match": k * found / 2} for k in (1, 2)]
                runs.append(
                    grouping.asdict(grouping.Run(data, same, questions, 1e-3, seed, 64, 2)) | {"points": points}
                )
    (tmp_path / "out.json").write_text(json.dumps({"runs": runs}))
    words = ["grouping.py", "report", "--json", tmp_path / "out.json", "--docs", tmp_path]
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    grouping.main()
    told = capsys.readouterr().out
    assert told.count("| 0.001 | all | 64 | 16.0 | 128 | 10 | 72.0 ± 5.0 |") == 8
    assert told.count("| 0.001 | all against 1 |  |  |  |  | +5.0 ± 0.0 |") == 8
    assert told.count("| all rates | all against 1 |  |  |  |  | +5.0 ± 0.0 |") == 8
    plots = sorted(tmp_path.glob("*.svg"))
    assert [plot.stem for plot in plots] == [
        f"grouping-{d}-{s}" for d in ("demo", "digits") for s in ("few", "images", "questions")
    ]
    for plot in plots:
        drawing = ElementTree.parse(plot)
        assert len(drawing.findall(".//{*}polyline")) == 6 and "all a tree ends at 72.0%" in plot.read_text()
