"""The benchmarks run; the step benchmark counts the floating-point operations that torch counts."""

import json
import runpy
import sys
import time
from pathlib import Path

import pytest
import runs
import torch
from torch.utils.flop_counter import FlopCounterMode

import train

BENCH = runs.ROOT / "bench"
sys.path.append(str(BENCH))
import job  # noqa: E402
import step as bench  # noqa: E402


@pytest.fixture
def table(tmp_path, monkeypatch, capsys):
    """Run a script, or a function of one, in this process; returns the JSON that it writes and what it prints."""

    def table(script, *words) -> tuple[dict, str]:
        monkeypatch.setattr(sys, "argv", ["benchmark", *map(str, words), "--json", str(tmp_path / "out.json")])
        script() if callable(script) else runpy.run_path(str(BENCH / script), run_name="__main__")
        return json.loads((tmp_path / "out.json").read_text()), capsys.readouterr().out

    return table


def test_the_benchmark_prints_a_table_and_writes_json(table):
    result, printed = table("step.py", "--preset", "tiny", "--profile")
    assert [row["case"] for row in result["rows"]] == ["recipe", "tree-1", "cached-9", "tree-9", "tree-17"]
    assert all(row["ms_per_question"] > 0 and row["tflops"] > 0 for row in result["rows"])
    assert {"name", "device", "versions", "commit", "command"} <= result.keys() and "ms/question" in printed
    assert "matrix products" in printed and "vision tower" in printed


def test_the_benchmark_runs_trees_at_several_precisions_and_the_recipe_once(table):
    words = ["--preset", "tiny", "--cases", "recipe,tree-1", "--base-precision", "bf16", "fp8", "fp8-weights"]
    rows = [(row["case"], row["precision"]) for row in table("step.py", *words)[0]["rows"]]
    assert rows == [("recipe", "bf16"), ("tree-1", "bf16"), ("tree-1", "fp8"), ("tree-1", "fp8-weights")]


def test_the_evaluation_benchmark_gets_the_same_answers_both_ways(world, table):
    words = ["--model", world / "model", "--rows", world / "rows.jsonl", "--images", world / "images"]
    result, _ = table("evaluate.py", *words, "--workers", 0, "--alone", 4)
    alone, trees, scores = result["rows"]
    assert trees["questions"] == scores["questions"] == 33 and 1 < alone["questions"] <= 4
    assert trees["same"] == 1 and all(row["questions_per_s"] > 0 for row in (alone, trees, scores))


def forked(ranks: int, script, *words, log: Path) -> float:
    """Stands in for job.torchrun: the same, but without the launcher."""
    started, main = time.perf_counter(), {"train.py": train.main, "job.py": job.main}[Path(script).name]
    runs.Run(words, log, ranks, main=main).succeed()
    return time.perf_counter() - started


def test_the_job_benchmark_trains_and_reports_both_speeds(world, table, tmp_path, monkeypatch):
    rows = [
        {"image_filename": f"{image}.jpg", "question": f"Is there {thing}?", "answer": "yes"}
        for image in range(3)
        for thing in ("text", "a polyp")[: 1 + image % 2]
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["--rows", tmp_path / "rows.jsonl", "--model", world / "model", "--work", tmp_path / "job"]
    words += ["--images", 6, "--size", "64x48", "--question-tokens", 60, "--pictures", 2]
    words += ["--preset", "tiny", "--recipe-steps", 1]
    words += ["--batch-size", 3, "--max-steps", 3, "--workers", 0]  # settings of train.py
    monkeypatch.setattr(job, "torchrun", forked)
    result, printed = table(lambda: job.main(sys.argv[1:], None), *words)
    trees, recipe = result["rows"]
    assert trees["steps"] == 3 and trees["questions"] == 2 and recipe["questions"] == 16  # 8 questions in all
    assert trees["job_hours"] > 0 and recipe["job_hours"] > 0 and "3 epochs, h" in printed
    made = [json.loads(line) for line in (tmp_path / "job" / "train.jsonl").read_text().splitlines()]
    assert len({row["image_filename"] for row in made}) == 6 and len(made) == 8
    assert all(len((row["question"] + row["answer"]).split()) > 10 for row in made)  # made longer


@pytest.mark.parametrize("questions", [1, 9])
def test_counted_operations_are_torch_s(tmp_path, questions):
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
