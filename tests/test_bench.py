"""The step benchmark runs, and counts the floating-point operations that torch counts."""

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
    words = [sys.executable, STEP, "--preset", "tiny", "--json", tmp_path / "out.json"]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    assert [row["case"] for row in result["rows"]] == ["recipe", "tree-1", "tree-9", "tree-17"]
    assert all(row["ms_per_question"] > 0 and row["tflops"] > 0 for row in result["rows"])
    assert {"name", "device", "versions", "commit", "command"} <= result.keys() and "ms/question" in done.stdout


def test_the_evaluation_benchmark_gets_the_same_answers_both_ways(world, tmp_path):
    words = [sys.executable, STEP.with_name("evaluate.py"), "--model", world / "model", "--rows", world / "rows.jsonl"]
    words += ["--images", world / "images", "--workers", 0, "--alone", 4, "--json", tmp_path / "out.json"]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    alone, trees, scores = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert trees["questions"] == scores["questions"] == 33 and 1 < alone["questions"] <= 4
    assert trees["same"] == 1 and all(row["questions_per_s"] > 0 for row in (alone, trees, scores))


@pytest.mark.parametrize("questions", [1, 9])
def test_counted_operations_are_torch_s(tmp_path, questions, monkeypatch):
    preset, cpu = bench.PRESETS["tiny"], torch.device("cpu")
    args = type("Args", (), {"compile": False, "memory_budget": 1.0})
    model = bench.tree_model(preset, cpu, torch.float32, tmp_path, args)
    tokens, step = bench.tree_step(model, preset, questions, cpu, torch.float32, tmp_path)
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
