"""The benchmarks run; the step benchmark counts the floating-point operations that torch counts."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

STEP = Path(__file__).parents[1] / "bench" / "step.py"
spec = importlib.util.spec_from_file_location("bench_step", STEP)
bench = importlib.util.module_from_spec(spec)
sys.modules["bench_step"] = bench
spec.loader.exec_module(bench)


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
