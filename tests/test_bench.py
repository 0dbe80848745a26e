"""The benchmarks run; the step benchmark counts the floating-point operations that torch counts; the study of learning
pairs seeds, computes intervals and decides by its rule."""

import json
import math
import runpy
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
from torch.utils.flop_counter import FlopCounterMode

import eval
import train
from inputs.images import ImageSettings, load_patches

BENCH = runs.ROOT / "bench"
sys.path.append(str(BENCH))
import job  # noqa: E402
import learning  # noqa: E402
import learning_data  # noqa: E402
import learning_tower  # noqa: E402
import start  # noqa: E402
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
    assert all(row["ms_per_question"] > 0 and row["tflops"] > 0 and row["busy"] > 0 for row in result["rows"])
    assert {"name", "device", "versions", "commit", "command"} <= result.keys() and "ms/question" in printed
    assert "matrix products" in printed and "vision tower" in printed


@pytest.mark.parametrize(("preset", "billions"), [("2b", 2), ("4b", 4), ("8b", 8), ("32b", 32)])
def test_the_benchmark_s_models_have_the_sizes_of_their_names(preset, billions):
    """The names leave out the vision tower. The two smaller models share lm_head's weights with the embeddings."""
    with torch.device("meta"):
        model = bench.Qwen3VLForConditionalGeneration(bench.Qwen3VLConfig(**bench.PRESETS[preset].config))
    count = sum(weight.numel() for weight in model.parameters())
    shared = model.lm_head.weight.numel() if preset in ("2b", "4b") else 0
    assert 1.04 < (count - shared) / 1e9 / billions < 1.12


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
    started, programs = time.perf_counter(), {"train.py": train, "eval.py": eval, "job.py": job}
    runs.Run(words, log, ranks, main=programs[Path(script).name].main).succeed()
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
    words += ["--preset", "tiny", "--recipe-steps", 1, "--report"]
    words += ["--batch-size", 3, "--max-steps", 3, "--workers", 0]  # settings of train.py
    monkeypatch.setattr(job, "torchrun", forked)
    result, printed = table(lambda: job.main(sys.argv[1:], None), *words)
    trees, recipe = result["rows"]
    assert trees["steps"] == 3 and trees["questions"] == 2 and recipe["questions"] == 16  # 8 questions in all
    report = (tmp_path / "job" / "run-1").glob("eval/*/report.html")
    assert trees["report_s"] > 0 and len(list(report)) == 1 and "report after" in printed
    assert trees["job_hours"] > 0 and recipe["job_hours"] > 0 and "3 epochs, h" in printed
    made = [json.loads(line) for line in (tmp_path / "job" / "train.jsonl").read_text().splitlines()]
    assert len({row["image_filename"] for row in made}) == 6 and len(made) == 8
    assert all(len((row["question"] + row["answer"]).split()) > 10 for row in made)  # made longer


def test_the_start_benchmark_times_the_parts_of_a_cold_and_a_warm_start(world, table, tmp_path):
    (tmp_path / "job").mkdir()
    for name, source in {"train.jsonl": "rows.jsonl", "val.jsonl": "rows.jsonl", "pictures": "images"}.items():
        (tmp_path / "job" / name).symlink_to(world / source)
    (tmp_path / "job" / "model").symlink_to(world / "model")
    words = ["--work", tmp_path / "job", "--starts", 1, "--try", "autotune_pointwise=False", "--try", "TORCH_LOGS=-all"]
    result, printed = table(start.main, *words, "--batch-size", 4, "--workers", 0)  # the last two go to train.py
    assert [row["caches"] for row in result["rows"]] == ["cold", "warm"]
    for row in result["rows"]:
        parts = row["parts"]
        assert set(parts) == set(start.PARTS) and parts["step 1"] > parts["ready"] > parts["imports"] > 0
        inside = sum(parts[part] for part in ("imports", "rows", "model", "rehearsal", "evaluation"))
        assert inside == pytest.approx(parts["ready"], abs=0.1) and row["graphs"] == []  # nothing is compiled on a CPU
    assert "autotune_pointwise=False" in printed and "step 1" in printed


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


# ------------------------------------------------------------------------------------------------------------- learning


def test_the_study_of_learning_pairs_seeds_and_keeps_its_runs(table, tmp_path, monkeypatch):
    draw = np.random.default_rng(0)
    pictures, digits = draw.integers(0, 17, (10, 8, 8)), draw.integers(0, 10, 10)
    learning_data.write_digits(tmp_path / "data" / "digits", pictures, digits, held_out=4)
    words = ["--data", tmp_path / "data", "--sets", "digits", "--work", tmp_path / "work", "--seeds", "1", "--jobs", 1]
    words += ["--arm", "base:", "--arm", "again:--log-every 1", "--arm", "alone:--questions-per-image 1"]
    words += ["--max-steps=2", "--eval-every=1", "--batch-size=16"]  # settings of train.py

    def study(*more) -> tuple[dict, str]:
        return table(lambda: learning.main(sys.argv[1:]), *words, *more)

    monkeypatch.setattr(learning, "launch", None)
    assert study("--minutes", 1e-9)[0]["runs"] == []  # none is started
    launched = []
    monkeypatch.setattr(learning, "launch", lambda words, log: launched.append(words) or train.main(words))
    result, printed = study()
    base, again, alone = result["runs"]
    assert [line["step"] for line in base["eval"]] == [1, 2] and all("--seed=1" in words for words in launched)
    assert [line["loss"] for line in base["eval"]] == [
        line["loss"] for line in again["eval"]
    ]  # same rows, order, start
    assert len(again["train"]) == 2 and alone["train"][0]["images"] == alone["train"][0]["questions"] == 32
    _, difference = result["comparisons"]
    assert difference["relative_loss"][0] == alone["eval"][1]["loss"] / base["eval"][1]["loss"] - 1
    assert difference["verdict"] == "undecided" and "| alone − base | 1 |" in printed
    monkeypatch.setattr(learning, "launch", None)  # nothing is run again
    kept, printed = study()
    assert kept["runs"] == result["runs"] and "3 runs, 3 of them made before" in printed
    (tmp_path / "data" / "digits" / "images" / "new.png").write_bytes(b"another data set")
    assert study("--minutes", 1e-9)[0]["runs"] == []


def test_a_failed_run_ends_the_study_with_its_output(tmp_path):
    with pytest.raises(learning.InputError, match="(?s)--no-such.*ended with code 2.*--no-such: no such flag"):
        learning.launch(["--no-such=1"], tmp_path / "log")


@pytest.mark.parametrize(
    "mean, half, expected",
    [
        (0.01, 0.01, "no worse"),  # up to +2%
        (-0.05, 0.03, "no worse"),
        (0.03, 0.005, "worse"),
        (0.04, 0.02, "undecided"),  # from +2%
        (0.0, 0.021, "undecided"),
        (-0.5, math.inf, "undecided"),  # one seed
    ],
)
def test_the_verdict_follows_from_where_the_interval_lies(mean, half, expected):
    assert learning.verdict(mean, half) == expected


def test_paired_intervals_are_those_worked_out_by_hand():
    base = {seed: {"loss": loss, "exact_match": 0.5} for seed, loss in enumerate((0.5, 1.0, 2.0, 7.0))}
    arm = {0: {"loss": 0.505, "exact_match": 0.5}, 1: {"loss": 1.02, "exact_match": 0.6}}
    arm |= {2: {"loss": 2.06, "exact_match": 0.7}}  # 1, 2 and 3% worse: standard deviation 1%; seed 3 has no pair
    result = learning.compare(base, arm)
    assert result["seeds"] == [0, 1, 2] and result["verdict"] == "undecided"
    assert result["relative_loss"] == pytest.approx((0.02, 4.303 * 0.01 / math.sqrt(3)))
    assert result["exact_match"] == pytest.approx((0.1, 4.303 * 0.1 / math.sqrt(3)))


def test_quantiles_are_those_of_student_s_t():
    for degrees, quantile in enumerate(learning.T95, start=1):
        x = np.linspace(-quantile, quantile, 100_001)
        density = math.gamma((degrees + 1) / 2) / math.gamma(degrees / 2) / math.sqrt(degrees * math.pi)
        inside = np.trapezoid(density * (1 + x**2 / degrees) ** (-(degrees + 1) / 2), x)
        assert inside == pytest.approx(0.95, abs=1e-4)


def test_a_digit_s_questions_have_the_answers_worked_out_by_hand():
    picture = np.zeros((8, 8), int)
    picture[0, 7], picture[7, 0], picture[6, 1] = 9, 5, 5  # upper right 9, lower left 10
    answers = [answer for _, _, answer in learning_data.digit_questions(picture, 9, 4)]
    assert answers == ["9", "10", "odd", "yes", "no", "lower", "left", "lower-left"]
    picture[6, 1] = 4  # 9 and 9: no half and no quarter holds more
    assert [answer for _, _, answer in learning_data.digit_questions(picture, 4, 4)] == ["4", "5", "even", "no", "yes"]


def test_easy_vqa_s_rows_keep_its_split_and_pictures(world, tmp_path):
    paths = sorted(path for path in (world / "images").iterdir() if path.is_file())[:2]
    splits = {"train": ((["What?", "Red?"], ["circle", "no"], [7, 7]), {7: paths[0]})}
    splits["val"] = (["Which color?"], ["teal"], [7]), {7: paths[1]}
    learning_data.write_easy_vqa(tmp_path / "set", splits)
    for (split, (_, images)), types in zip(splits.items(), (["shape", "yes/no"], ["colour"])):
        lines = [json.loads(line) for line in (tmp_path / "set" / f"{split}.jsonl").read_text().splitlines()]
        assert [line["question_type"] for line in lines] == types
        assert (tmp_path / "set" / lines[0]["image"]).read_bytes() == images[7].read_bytes()


def test_a_trained_tower_is_part_of_a_data_set_that_is_trained_on(world, table, tmp_path, monkeypatch, capsys):
    paths = sorted(path for path in (world / "images").iterdir() if path.is_file())[:2]
    questions = ["What?", "Red?"], ["circle", "no"], [7, 7]
    splits = {"train": (questions, {7: paths[0]}), "val": (questions, {7: paths[1]})}
    learning_data.write_easy_vqa(tmp_path / "easy-vqa", splits)
    monkeypatch.setattr(learning_tower, "PICTURES", 4)
    monkeypatch.setattr(learning_tower, "HELD_OUT", 8)
    learning.main(["--tower", "2", "--data", str(tmp_path), "--jobs", "0"])
    assert "tower, step 2 of 2" in capsys.readouterr().out
    monkeypatch.setattr(learning, "launch", lambda words, log: train.main(words))
    words = ["--data", tmp_path, "--work", tmp_path / "work", "--sets", "easy-vqa-tower", "--seeds", 0, "--max-steps=1"]
    result, _ = table(lambda: learning.main(sys.argv[1:]), *words)
    assert len(result["runs"]) == 1
    model = learning_tower.Qwen3VLForConditionalGeneration.from_pretrained(tmp_path / "easy-vqa-tower" / "model")
    tower = model.model.visual.requires_grad_(False)
    assert len(tower.blocks) == learning_tower.TOWER["depth"]
    features = learning_tower.look(tower, learning_tower.Pictures(1, 8, "held out")[0][0])
    assert [float(part.square().mean().sqrt()) for part in features] == pytest.approx([1.0, 1.0], abs=1e-3)


def test_the_tower_reads_patches_as_images_are_loaded(tmp_path):
    pictures = learning_tower.Pictures(1, 2, "any")[0][0]
    learning_tower.Image.fromarray(pictures[1].numpy()).save(tmp_path / "picture.png")
    side = learning_tower.SIDE // learning_tower.PATCH
    settings = ImageSettings(learning_tower.PATCH, 2, 2, 256, 256 * 256, (0.5,) * 3, (0.5,) * 3, position_side=16)
    loaded = load_patches(str(tmp_path / "picture.png"), (side, side), settings)  # (patches, 3, PATCH**2)
    frames = learning_tower.to_patches(pictures).unflatten(1, (3, 2, -1))[side * side :]
    assert np.abs(frames.numpy() - loaded[:, :, None] / 127.5 + 1).max() < 1e-6
