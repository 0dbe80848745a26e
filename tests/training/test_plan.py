"""--plan predicts what the run does, matches measurements, and needs no weights, no pixels and no output folder."""

import json
import math
import os
import re
import shutil
from dataclasses import replace
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from pictures import VALID_IMAGES, cut_short, noise, turned
from PIL import ImageFile
from runs import arguments, lines
from steps import ALONE
from test_bench import bench
from test_trees import make_samples
from transformers import AutoConfig, AutoTokenizer

import train
from common import InputError
from data import VQAData, at_limit, load_data
from inputs.images import check_images, image_settings
from modeling import loading
from modeling.memory import MEMORY_BUDGETS, MEMORY_MARGIN, activation_room, choose_memory_budget, kept_bytes
from modeling.targets import DEFAULT_TARGETS
from training import costs, plan, scaling
from training import preparation as prepare
from training.description import data_warnings
from training.gpus import GPUS, Gpu
from training.plan import COMPILE_S, GIB, LAST_LAYER_S, Budget, budgets, choose, hours, make_job, pace, timeline
from training.rehearsal import micro_batch_bounds
from training.scaling import GPU_COUNTS, batch_size_remedy
from training.settings import parse_settings
from trees import PlanSettings, grow_tree, make_plan, pack, rank_efficiency, share_out

RESULTS = Path(bench.__file__).parent / "results"
MEASURED = json.loads((RESULTS / "step-h100.json").read_text())
PRECISIONS = json.loads((RESULTS / "step-precision-h200.json").read_text())["rows"]
PRECISIONS = [row for row in PRECISIONS if row["case"].startswith("tree-")]
TREES = {int(r["case"].removeprefix("tree-")): r for r in MEASURED["rows"] if r["case"].startswith("tree-")}
HERE = Gpu(("cpu",), 80, 1, measured=False)
AT_BUDGET_1 = [Budget(1.0, 1.0, 0, True)]


def job_of(world: Path, **settings) -> tuple[plan.Job, VQAData]:
    args = parse_settings(arguments(world, world / "none", **settings))
    data, _ = tiny.load_world(world)
    plan_settings = scaling.plan_settings(args)
    bounds = micro_batch_bounds(data.samples, plan_settings, args.max_tokens)
    config = AutoConfig.from_pretrained(world / "model")
    return make_job(args, config, data, data, make_plan(data.samples, plan_settings, 0), bounds.tokens), data


@cache
def job_of_the_8b() -> plan.Job:
    """The 8B with micro-batches of the benchmark's tree of 9; no data. Its layers are built once, without weights."""
    args = SimpleNamespace(compile="on", memory_budget="auto", lora_dropout=0.05, lora_r=8, max_tokens=8192)
    vars(args).update(model="", lora_alpha=16, lora_targets=DEFAULT_TARGETS, rslora=False, dora=False)
    vars(args).update(base_precision="bf16", batch_size=96)
    config = bench.config_of(bench.PRESETS["8b"])
    return make_job(args, config, VQAData("", [], {}), None, [()], 2704 + 9 * 195)


def job_of_8b(**settings) -> plan.Job:
    """The same with other settings of compilation and memory."""
    job = job_of_the_8b()
    return replace(job, args=SimpleNamespace(**(vars(job.args) | settings)))


@pytest.fixture
def bare(world, tmp_path):
    """The tiny world without weights and with truncated pictures."""
    folder = shutil.copytree(world, tmp_path / "bare")
    (folder / "model" / "model.safetensors").unlink()
    for path in (folder / "images").iterdir():
        path.write_bytes(path.read_bytes()[:-1000])
        assert "truncated" in check_images([str(path)])[str(path)]
    return folder


# ------------------------------------------------------------------------------------------------ what the plan needs


def test_the_plan_needs_no_weights_and_no_pixels_and_leaves_nothing(bare, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("decoded"))
    before = sorted(tmp_path.rglob("*"))
    for output in (tmp_path / "out", ""):
        assert train.main([*arguments(bare, output), "--plan"]) == 0
    assert sorted(tmp_path.rglob("*")) == before
    told = capsys.readouterr().out
    for expected in ("train: 33 questions, 4 images", "5 steps per epoch", "memory budget 0.2", "GPU hours", "disk:"):
        assert told.count(expected) == 2


def test_rows_with_weights_of_their_own_are_reported(bare, capsys):
    rows = [json.loads(line) for line in (bare / "rows.jsonl").read_text().splitlines()]
    assert train.main([*arguments(bare, ""), "--plan"]) == 0 and "`weight`" not in capsys.readouterr().out
    rows[0]["weight"], rows[1]["weight"] = 2, 1
    (bare / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert train.main([*arguments(bare, ""), "--plan"]) == 0
    told = "rows whose `weight` is not 1: 1, with 2; the loss counts their answers by it\n"
    assert told in capsys.readouterr().out


def test_questions_without_an_image_are_counted_where_others_show_some(bare, capsys):
    lines = (bare / "rows.jsonl").read_text().splitlines(keepends=True)
    assert train.main([*arguments(bare, "", val=""), "--plan"]) == 0
    assert "questions without an image: 1, the first rows.jsonl:31\n" in capsys.readouterr().out
    for shows_images in (True, False):
        kept = [line for line in lines if ("image" in line) is shows_images]
        (bare / "rows.jsonl").write_text("".join(kept))
        assert train.main([*arguments(bare, "", val="", images=bare / "images" if shows_images else ""), "--plan"]) == 0
        assert "without an image" not in capsys.readouterr().out


def test_the_plan_says_which_questions_come_before_their_picture_and_the_flag_moves_it(bare, capsys):
    rows = [{"image": "a.png", "question": f"Is there finding {n}? <image>", "answer": "no"} for n in range(20)]
    (bare / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert train.main([*arguments(bare, ""), "--plan"]) == 0
    told = "20 questions about 1 picture do not share it: their text comes first\n  --image-first moves the picture"
    assert f"warning: {told}" in capsys.readouterr().out
    assert train.main([*arguments(bare, ""), "--plan", "--image-first"]) == 0
    assert "--image-first" not in (out := capsys.readouterr().out) and "questions per image: 20 to 20" in out


def test_a_folder_of_images_that_no_row_shows_is_refused(bare, tmp_path, capsys):
    """Misspelt image fields must not train a blind model. Without --images, rows may be text alone."""
    rows = [{"question": f"What is {n}?", "answer": "a number"} for n in range(40)]
    (bare / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match=r"--images .*images is given, but no row shows an image: name it as `image`"):
        train.main([*arguments(bare, ""), "--plan"])
    words = [*arguments(bare, ""), "--plan"]
    assert train.main([word for word in words if not word.startswith("--images")]) == 0


def test_rows_that_can_t_be_used_are_reported_as_by_a_run(bare):
    (bare / "images" / "b.png").unlink()
    with pytest.raises(InputError, match=r"rows can't be used(.|\n)*b.png' is missing"):
        train.main([*arguments(bare, ""), "--plan"])


def test_float32_is_refused(bare):
    with pytest.raises(InputError, match="--dtype"):
        train.main([*arguments(bare, ""), "--plan", "--dtype=float32"])


def test_only_settings_and_tokenizer_are_downloaded(world, monkeypatch):
    asked = {}
    monkeypatch.setattr(loading, "snapshot_download", lambda _, **only: asked.update(only) or str(world / "model"))
    loading.resolve_model("Qwen/Qwen3-VL-8B-Instruct", weights=False)
    files = ["config.json", "preprocessor_config.json", "tokenizer.json", "vocab.json", "merges.txt"]
    files += ["tokenizer_config.json", "chat_template.jinja", "model-00001-of-00004.safetensors", "pytorch_model.bin"]
    fetched = [file for file in files if any(fnmatch(file, pattern) for pattern in asked["allow_patterns"])]
    assert fetched == files[:-2]


@pytest.mark.parametrize("name", [*VALID_IMAGES, "turned.tif"])
def test_a_header_tells_the_size_that_decoding_tells(name, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    picture, options = VALID_IMAGES[name][0] if name in VALID_IMAGES else turned(6)
    picture.save(tmp_path / name, **options)
    path = str(tmp_path / name)
    with monkeypatch.context() as no_pixels:
        no_pixels.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("decoded"))
        sizes = check_images([path], headers_only=True)
    assert not (tmp_path / "cache").exists() and sizes == check_images([path])


def test_a_size_from_a_header_is_not_taken_for_a_checked_picture(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    whole, cut = str(tmp_path / "whole.png"), str(tmp_path / "cut.png")
    noise(40, 50).save(whole)
    check_images([whole])
    cut_short(Path(cut), 0.5)
    assert check_images([whole, cut], headers_only=True) == {whole: (40, 50), cut: (300, 200)}
    assert "truncated" in check_images([whole, cut])[cut]


# ---------------------------------------------------------------------------------------------- it foretells the run


def test_evaluations_checkpoints_sizes_and_warnings_are_those_of_the_run(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(GPUS, "here", HERE)
    settings = {"eval-every": 2, "save-every": 3, "keep": 9, "lora-r": 64, "max-steps": 7}
    output = tmp_path / "out"
    train.main(arguments(world, output, **settings))
    told = capsys.readouterr().out
    train.main([*arguments(world, tmp_path / "none", **settings), "--plan"])
    warnings = re.findall(r"^warning: .*\n(?:  .*\n)+", capsys.readouterr().out, re.M)
    assert warnings == re.findall(r"^warning: .*\n(?:  .*\n)+", told, re.M) and "rows.jsonl:28" in "".join(warnings)

    job, _ = job_of(world, **settings)
    events = timeline(job, pace(job, HERE, budgets(job, HERE, job.largest), [1])[1], job.args.epochs)
    assert [step for step, what, _ in events if "evaluation" in what] == [e["step"] for e in lines(output, "eval")]
    saved = [int(folder.name.split("-")[1]) for folder in sorted(output.glob("checkpoint-*"))]
    foreseen = [step for step, what, _ in events if "checkpoint" in what]
    assert foreseen == [3, 6, 7] and set(foreseen) <= set(saved) <= {2, 3, 4, 6, 7}
    size = sum(path.stat().st_size for path in (output / "checkpoint-000007").iterdir())
    assert job.checkpoint_bytes == pytest.approx(size, rel=0.1)

    expected = events[-1][2] / 3600
    (compared,) = (line for line in told.splitlines() if line.startswith("planned "))
    assert compared.startswith(f"planned {expected:.2f} h, took 0.0") and compared.endswith("peak was 0.0 GiB")


def test_what_is_said_of_a_plan_does_not_make_another_run(world):
    data, dataset = tiny.load_world(world)
    asked = (arguments(world, "out") + more for more in ([], ["--gpu=l40s", "--time-limit=3", "--plan"]))
    args = [parse_settings(words) for words in asked]
    before, after = (
        prepare.identify(run_args, dataset.settings, data, None, str(world / "model")) for run_args in args
    )
    assert before == after


def test_an_unknown_gpu_is_not_compared(world, tmp_path, capsys):
    train.main(arguments(world, tmp_path / "out", **{"max-steps": 1}))
    assert "planned" not in capsys.readouterr().out


def test_a_run_is_compared_at_the_memory_budget_that_it_had(monkeypatch, capsys):
    """As when other programs share its GPU: a higher budget would fit the whole one."""
    job = job_of_8b(max_steps=1, epochs=1, eval_every=0, save_every=0, lora_targets="auto", compile="auto")
    job.steps_per_epoch = 1
    monkeypatch.setattr(plan, "known_gpu", lambda _: GPUS["h100"])
    monkeypatch.setattr(plan, "make_job", lambda *_: job)
    prepared = SimpleNamespace(config=job.config, train=None, val=None, plan=None, bounds=SimpleNamespace(tokens=0))
    options = {option.share: option for option in budgets(job, GPUS["h100"], job.largest)}
    assert options[1.0].fits
    for share, option in options.items():
        run = SimpleNamespace(args=job.args, prepared=prepared, ranks=ALONE, memory_budget=share)
        plan.compare_with_plan(run, 36)
        planned = hours(job, pace(job, GPUS["h100"], [option], [1])[1])
        told = f"planned {planned:.2f} h, took 0.01 h; planned peak {option.peak / GIB:.1f} GiB"
        assert told in capsys.readouterr().out
    assert {None, 1.0, 0.2} <= options.keys()


def test_the_rehearsal_s_memory_budget_is_compared(world, tmp_path, monkeypatch):
    compared = []
    monkeypatch.setattr("training.rehearsal.rehearse_step", lambda *_: 0.5)
    monkeypatch.setattr(plan, "compare_with_plan", lambda run, _: compared.append(run.memory_budget))
    train.main(arguments(world, tmp_path / "out", **{"max-steps": 1}))
    assert compared == [0.5]


def test_a_run_takes_its_steps_evaluations_and_saves_one_after_the_other(world):
    job, _ = job_of(world, **{"max-steps": 0, "epochs": 2, "eval-every": 0, "save-every": 0})
    times = pace(job, replace(HERE, link=math.inf), AT_BUDGET_1, (1, 2, 4))
    alone = 2 * sum(times[1].steps) + times[1].evaluation
    for gpus in (1, 2, 4):
        events = timeline(job, times[gpus], 2)
        assert [step for step, _, _ in events] == [0, 2 * len(job.plan)]
        training = events[1][2] - events[0][2] - job.checkpoint_bytes / plan.SAVE_BYTES_S
        assert training == pytest.approx(alone) if gpus == 1 else alone / gpus <= training < alone
    assert hours(job, times[1], 1) < hours(job, times[1])


def test_a_step_takes_as_long_as_the_busiest_rank_with_micro_batches_of_its_own(world):
    job, data = job_of(world, **{"max-tokens": 400})
    for gpus in (2, 3):
        shares = share_out(job.plan[0], gpus)
        packed = [pack(share, 400) for share in shares]
        loads = [[[costs.tree_load(job.config, data.samples, tree) for tree in batch] for batch in b] for b in packed]
        expected = max(sum(costs.batch_seconds(load, HERE) for load in of_rank) for of_rank in loads)
        reduced = costs.all_reduce_seconds(4 * job.lora, gpus, HERE)
        (step, *_), *_ = pace(job, HERE, [Budget(1.0, 1.5, 0, True)], [gpus])[gpus]
        assert step == pytest.approx(1.5 * (1 + costs.LAST_LAYER_SHARE) * expected + reduced)


def test_the_all_reduce_takes_what_its_slowest_link_takes():
    """87.3 MB: 2 (n - 1) / n times as much over NVLink's 450 GB/s, PCIe's 32 GB/s, 100 and 400 Gbit/s."""
    size = job_of_8b().gradient_bytes
    assert size == 4 * 21_823_488
    cases = [("h100", 1, 0), ("h100", 8, 0.3395), ("l40s", 8, 4.774), ("h100", 16, 13.094), ("l40s", 64, 13.749)]
    for name, gpus, milliseconds in cases:
        assert 1000 * costs.all_reduce_seconds(size, gpus, GPUS[name]) == pytest.approx(milliseconds, rel=1e-3)
    assert 1000 * costs.all_reduce_seconds(size, 16, GPUS["h100"], 50e9) == pytest.approx(3.2735, rel=1e-3)


def test_some_hundred_steps_stand_for_an_epoch(world, monkeypatch):
    settings = {"batch-size": 3, "max-steps": 0, "epochs": 2, "eval-every": 4}
    job, _ = job_of(world, **settings)
    monkeypatch.setattr(scaling, "SAMPLED_STEPS", 4)
    sampled, _ = job_of(world, **settings)
    assert (len(job.plan), len(sampled.plan)) == (11, 4) and sampled.plan == job.plan[::3]
    events, estimates = (timeline(j, pace(j, HERE, AT_BUDGET_1, [2])[2], 2) for j in (job, sampled))
    assert [event[:2] for event in events] == [event[:2] for event in estimates]
    whole, part = (pace(j, HERE, AT_BUDGET_1, [2])[2].steps for j in (job, sampled))
    spread = [seconds for seconds, count in zip(part, (3, 3, 3, 2)) for _ in range(2 * count)]
    shift = sum(spread) - 2 * sum(whole)
    assert estimates[-1][2] == pytest.approx(events[-1][2] + shift)


def test_smaller_pictures_are_not_below_what_the_model_allows(world):
    job, data = job_of(world)
    _, dataset = tiny.load_world(world)
    largest = plan.largest_picture(data, dataset.settings)
    limits = [replace(dataset.settings, min_pixels=largest // part) for part in (1, 3, 4)]
    limits_tried = [list(plan.with_smaller_pictures(job, settings)) for settings in limits]
    assert limits_tried == [[], [largest // 2], [largest // 2, largest // 4]]


def test_an_image_is_counted_once_a_tree_and_every_token_once(world):
    job, data = job_of(world)
    for tree in (tree for step in job.plan for tree in step):
        flops, images = costs.tree_load(job.config, data.samples, tree)
        chosen = [data.samples[i] for i in tree.samples]
        assert images == len(chosen[0].images)
        alone = costs.tree_load(job.config, data.samples, grow_tree(data.samples, [tree.samples[0]]))[0]
        assert (flops.tower, flops.tower_attention) == (alone.tower, alone.tower_attention)
        assert flops.language >= alone.language and (flops.language > alone.language) == (len(chosen) > 1)


@pytest.mark.parametrize("limit", [4096, 9216, 65536])
def test_smaller_pictures_are_planned_as_they_would_be_loaded(world, limit):
    data, dataset = tiny.load_world(world)
    tokenizer, settings = AutoTokenizer.from_pretrained(world / "model"), image_settings(world / "model", 0, limit)
    loaded = load_data([world / "rows.jsonl"], world / "images", tokenizer, settings, 100_000)
    planned = at_limit(data, dataset.settings, limit)
    assert planned.grids == loaded.grids
    for ours, theirs in zip(planned.samples, loaded.samples, strict=True):
        assert (ours.patches, ours.image_tokens, ours.tokens) == (theirs.patches, theirs.image_tokens, theirs.tokens)


# ------------------------------------------------------------------------------------------------------- what it costs


@pytest.mark.parametrize("questions", TREES)
def test_the_time_of_a_tree_is_the_measured_one(questions):
    preset = bench.PRESETS["8b"]
    patches = preset.size[0] * preset.size[1] // 16**2
    branches, answers = [preset.question_tokens] * questions, questions * preset.answer_tokens
    flops = costs.step_flops(bench.config_of(preset), [patches], patches // 4 + 4, branches, answers)
    (gpu,) = (gpu for gpu in GPUS.values() if MEASURED["device"] in gpu.devices)
    assert gpu.tflops == pytest.approx(MEASURED["matmul_tflops"], rel=0.01)
    assert 1000 * costs.batch_seconds([(flops, 1)], gpu) == pytest.approx(TREES[questions]["ms"], rel=0.01)


@pytest.mark.parametrize(
    ("budget", "tokens", "peak_gib"),
    [(1.0, 4459, 31.4), (1.0, 6019, 37.0), (1.0, 8192, 43.6), (0.0, 7924, 21.5), (0.0, 4069, 18.7)]
    + [(0.5, 4459, 24.8), (0.2, 4459, 20.9), (None, 7308, 82.2)],
)
def test_the_peak_memory_of_a_run_is_the_one_seen(budget, tokens, peak_gib):
    """Runs of train.py, of 4,459 and 6,019 tokens bench/step.py, on H200s and H100s, 8B, LoRA r 8, dropout 0.05."""
    settings = {"compile": "off"} if budget is None else {"memory_budget": budget}
    (choice,) = budgets(job_of_8b(**settings), GPUS["h100"], tokens)
    assert choice.peak / GIB == pytest.approx(peak_gib, rel=0.05)


@pytest.mark.parametrize("size, file", [("2b", "2b-closed"), ("4b", "4b"), ("8b", "closed"), ("32b", "32b")])
def test_time_and_memory_of_each_size_are_the_measured_ones(size, file):
    """Trees of 1 to 28 questions on H200s. The plan has the logits of nine questions of the 8B in its factor."""
    results = json.loads((RESULTS / f"step-{file}-h200.json").read_text())["rows"]
    trees_of = {int(row["case"].removeprefix("tree-")): row for row in results if row["case"].startswith("tree-")}
    for questions, row in trees_of.items():
        job = make_job(job_of_the_8b().args, bench.config_of(bench.PRESETS[size]), VQAData("", [], {}), None, [()], 1)
        peak = budgets(job, GPUS["h200"], 2704 + 195 * questions)[0].peak / GIB
        load = costs.step_flops(job.config, [10800], 2704, [195] * questions, 32 * questions), 1
        assert 1000 * costs.batch_seconds([load], GPUS["h200"]) == pytest.approx(row["ms"], rel=0.14)
        assert peak == pytest.approx(row["peak_gib"], rel=0.06)


@pytest.mark.parametrize("row", PRECISIONS, ids=lambda row: f"{row['case']} {row['precision']}")
def test_memory_and_time_of_each_base_precision_are_the_measured_ones(row):
    """Time against that of bf16; with features ready, a busy CPU paced the steps."""
    (kind, questions), precision = row["case"].split("-"), row["precision"]
    questions = int(questions)
    config = bench.config_of(bench.PRESETS["8b"])
    args = SimpleNamespace(**(vars(job_of_the_8b().args) | {"base_precision": precision, "memory_budget": 1.0}))
    job = make_job(args, config, VQAData("", [], {}), None, [()], 2704 + 195 * questions)
    (choice,) = budgets(job, GPUS["h200"], job.largest)
    assert choice.peak / GIB == pytest.approx(row["peak_gib"], rel=0.05)
    if kind == "tree":
        load = costs.step_flops(config, [10800], 2704, [195] * questions, 32 * questions), 1
        plain, own = (costs.batch_seconds([load], GPUS["h200"], precision=name) for name in ("bf16", precision))
        (measured,) = (r["ms_per_question"] for r in PRECISIONS if (r["case"], r["precision"]) == (row["case"], "bf16"))
        assert own / plain == pytest.approx(row["ms_per_question"] / measured, rel=0.035)


def test_kept_activations_are_counted_by_their_widths():
    """Those of Qwen2-VL-7B: hidden size 3,584, 18,944 in the MLP, 28 heads of queries and 4 of keys and values, which
    have 3,584 / 28 dimensions: its configuration does not say so."""
    text = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
    heads = {"num_attention_heads": 28, "num_key_value_heads": 4}
    config = AutoConfig.for_model("qwen2_vl", text_config=text | heads)
    assert kept_bytes(config, 10) == 2 * 10 * 28 * (2 * 3584 + 2 * 18944 + (3 * 28 + 4 * 4) * 128)


def test_a_plan_for_a_gpu_without_fp8_products_is_refused(world):
    settings = {"gpu": "a100-40", "base-precision": "fp8", "dtype": "auto"}
    with pytest.raises(InputError, match="--base-precision fp8: no FP8 products on a100-40, where fp8-weights runs"):
        train.main([*arguments(world, "", **settings), "--plan"])


@pytest.mark.parametrize("gib", [23.5, 26, 32, 40, 48, 80])
def test_the_memory_budget_is_the_one_that_the_run_chooses(gib, monkeypatch):
    job = job_of_8b()
    total = int(gib * GIB)
    taken = job.weight_bytes + 4 * job.lora
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=total))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: taken)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (total - taken, total))
    chosen = choose_memory_budget(job.config, job.largest, activation_room(torch.device("cuda")))
    assert choose(budgets(job, Gpu((), gib, 1), job.largest)).share == chosen


def test_less_memory_takes_more_time_and_a_budget_of_one_s_own_lies_between():
    job = job_of_8b()
    known = budgets(job, GPUS["h100"], job.largest)
    assert [choice.share for choice in known] == [1.0, 0.5, 0.2, 0.0]
    assert sorted(known, key=lambda choice: -choice.peak) == sorted(known, key=lambda choice: choice.slower) == known
    (own,) = budgets(job_of_8b(memory_budget=0.3), GPUS["h100"], job.largest)
    assert known[1].peak > own.peak > known[2].peak and known[1].slower < own.slower < known[2].slower
    (eager,) = budgets(job_of_8b(compile="off"), GPUS["h100"], job.largest)
    assert eager.peak > known[0].peak and eager.slower > known[0].slower


def test_layers_are_compiled_where_that_saves_more_time_than_it_takes(world):
    """Equal where COMPILE_S is what EAGER_TIME costs more than budget 1 without a last layer of its own."""
    options = budgets(job_of_8b(compile="auto"), GPUS["h100"], 4459)
    assert [option.share for option in options] == [None, 1.0, 0.5, 0.2, 0.0] and options[0].fits
    even = COMPILE_S / (costs.EAGER_TIME - 1 - costs.LAST_LAYER_SHARE)
    assert choose(options, 0.99 * even) is options[0] and choose(options, 1.01 * even) is options[1]
    tight = replace(options[0], fits=False)
    assert choose([tight, *options[1:]], 0.0) is options[1]  # memory comes first
    (own,) = budgets(job_of_8b(compile="auto", memory_budget=0.5), GPUS["h100"], 4459)
    assert own.share == 0.5
    assert None not in [
        option.share for option in budgets(job_of_8b(compile="auto", base_precision="fp8"), GPUS["h100"], 4459)
    ]
    # A run that many GPUs share is over before compiling has paid. So is what is left of a resumed one.
    job, _ = job_of(world, **{"max-steps": 0, "epochs": 9, "lora-r": 1})
    rate = 1e-9  # so low that what does not depend on it is next to nothing
    work = rate * pace(job, replace(HERE, tflops=rate), AT_BUDGET_1, [1])[1].training
    slow = replace(HERE, tflops=work / (1.5 * even), link=math.inf)
    one, four = pace(job, slow, options, (1, 4)).values()
    assert (one.budget, four.budget) == (options[1], options[0])
    starts = [timeline(job, times, 1)[0][2] for times in (one, four)]
    assert starts == [plan.START_S + COMPILE_S, plan.START_S]
    job.done = job.steps_per_epoch * 8
    assert pace(job, slow, options, [1])[1].budget is options[0]


@pytest.mark.parametrize("slower", [1.0, 1.27])
def test_the_last_layer_is_compiled_on_its_own_where_that_saves_more_time_than_it_takes(slower):
    """Up to there a run pays for it with its steps. At that point both ways end at the same time."""
    budget, even = Budget(0.5, slower, 0, True), LAST_LAYER_S / costs.LAST_LAYER_SHARE / slower
    assert budget.costs(0.99 * even) == (COMPILE_S, slower * (1 + costs.LAST_LAYER_SHARE))
    assert budget.costs(1.01 * even) == (COMPILE_S + LAST_LAYER_S, slower)
    for training in (0, 0.5 * even, even, 2 * even):
        saved = min(LAST_LAYER_S, costs.LAST_LAYER_SHARE * slower * training)
        assert budget.seconds(training) == pytest.approx(COMPILE_S + saved + slower * training)
    eager = Budget(None, costs.EAGER_TIME, 0, True)
    assert eager.costs(0.01 * even) == eager.costs(9 * even) == (0, costs.EAGER_TIME)


@pytest.mark.parametrize("precision", ["bf16", "fp8-backward", "fp8", "fp8-weights"])
def test_a_run_plans_the_training_that_it_has_before_it(world, tmp_path, monkeypatch, precision):
    job, data = job_of(world, **{"base-precision": precision, "max-steps": 0, "epochs": 2})
    made = make_plan(data.samples, scaling.plan_settings(job.args), 0)
    prepared = SimpleNamespace(config=job.config, train=data, val=data, plan=made, checkpoint=None)
    prepared.bounds = SimpleNamespace(tokens=job.largest)
    model = tiny.lora_model(world, precision=precision).model
    assert plan.training_seconds(job.args, prepared, model, ALONE) == math.inf  # on an unknown GPU
    monkeypatch.setitem(GPUS, "here", HERE)
    whole = pace(job, HERE, AT_BUDGET_1, [1])[1].training
    assert plan.training_seconds(job.args, prepared, model, ALONE) == pytest.approx(whole)
    prepared.checkpoint = tmp_path / f"checkpoint-{len(made):06d}"
    assert plan.training_seconds(job.args, prepared, model, ALONE) == pytest.approx(whole / 2)
    job.args.dora = True
    assert plan.training_seconds(job.args, prepared, model, ALONE) == math.inf


def test_a_long_run_starts_later_for_faster_steps(world):
    job, _ = job_of(world, **{"max-steps": 0, "epochs": 9, "lora-r": 1})
    work = pace(job, replace(HERE, tflops=1e-9), AT_BUDGET_1, [1])[1].training
    even = LAST_LAYER_S / costs.LAST_LAYER_SHARE
    for share, compiling, slower in ((0.9, COMPILE_S, 1.0145), (1.1, COMPILE_S + LAST_LAYER_S, 1.0)):
        times = pace(job, replace(HERE, tflops=1e-9 * work / (share * even), link=math.inf), AT_BUDGET_1, [1])[1]
        (_, _, start), *_ = timeline(job, times, 9)
        assert start == plan.START_S + compiling
        assert 9 * sum(times.steps) == pytest.approx(slower * times.training)


@pytest.mark.parametrize("tokens", [256, 128])
def test_settings_that_would_fit_are_found(world, tokens):
    """The 8B's memory for the tiny world's rows, the longest of which has 147 tokens."""
    data, dataset = tiny.load_world(world)
    job = replace(job_of_8b(), largest=700, train=data)
    needed = job.weight_bytes + 4 * job.lora + MEMORY_BUDGETS[0.0] * kept_bytes(job.config, tokens + 1)
    gpu = Gpu((), (needed + MEMORY_MARGIN[0]) / (1 - MEMORY_MARGIN[1]) / GIB, 1)
    remedy = dict(zip(*[iter(plan.remedy(job, gpu, dataset.settings).split()[:-2])] * 2))
    assert remedy["--max-tokens"] == str(tokens)
    assert budgets(job, gpu, tokens)[-1].fits and not budgets(job, gpu, tokens + 128)[-1].fits
    longest = max(sample.tokens for sample in data.samples)
    assert ("--max-pixels" in remedy) == (longest > tokens)
    if "--max-pixels" in remedy:
        at = [int(remedy["--max-pixels"]) + more for more in (0, 16**2)]
        small, large = (max(s.tokens for s in at_limit(data, dataset.settings, limit).samples) for limit in at)
        assert small <= tokens < large
    assert plan.remedy(job, Gpu((), needed / GIB, 1), dataset.settings) == "no settings would fit"


def test_a_time_limit_says_what_would_fit(world):
    job, _ = job_of(world, **{"max-steps": 0, "epochs": 3, "time-limit": 1})
    times = pace(job, replace(HERE, tflops=1e-4), AT_BUDGET_1, GPU_COUNTS)
    ends = {(gpus, epochs): hours(job, times[gpus], epochs) for gpus in (1, 2) for epochs in (1, 2, 3)}
    assert ends[2, 3] < ends[1, 3]
    job.args.time_limit = ends[2, 3]
    assert "fits on 2 GPU(s) or more" in plan.limit_line(job, times)
    job.args.time_limit = ends[1, 2]
    assert ": 2 on 1, " in plan.limit_line(job, times)
    job.args.time_limit = ends[1, 1] / 1000
    assert "does not fit on up to 64 GPUs" in plan.limit_line(job, times)


@pytest.mark.parametrize("steps, hidden", [(8, 0), (9, 2)])
def test_events_are_left_out_only_where_that_saves_lines(world, steps, hidden):
    job, _ = job_of(world, **{"max-steps": steps, "eval-every": 1, "save-every": 0})
    shown = plan.time_lines(job, pace(job, HERE, AT_BUDGET_1, [1]))
    assert sum(line.startswith("  step") for line in shown) == steps + 1 - hidden
    assert [line for line in shown if "more" in line] == [f"  ... {hidden} more"] * bool(hidden)


# -------------------------------------------------------------------------------------------------------- many GPUs


def test_every_number_of_gpus_has_a_column_with_its_rank_efficiency(world, capsys):
    train.main([*arguments(world, "", **{"batch-size": 1, "max-steps": 0, "eval-every": 0, "save-every": 0}), "--plan"])
    told, (data, _) = capsys.readouterr().out, tiny.load_world(world)
    settings = PlanSettings(1, 0, 0)
    made = make_plan(data.samples, settings, 0)
    shares = [f"{rank_efficiency(made, gpus):.0%}" for gpus in (1, 2, 4, 8, 16, 32, 64)]
    header, *rows = re.search(r"  hours from the start(?:.*\n)+?  rank efficiency.*", told)[0].splitlines()
    assert header.split()[-7:] == ["1", "2", "4", "8", "16", "32", "64"]
    assert rows[-1].split()[-7:] == shares and len({len(row) for row in (header, *rows)}) == 1
    assert f"rank efficiency {', '.join(f'{s} at {n}' for s, n in zip(shares, GPU_COUNTS))}\n" in told
    busier = batch_size_remedy(data.samples, settings, GPU_COUNTS)
    assert "at 64 GPUs --batch-size 2 would use" in busier and f"\n{busier}\n" in told
    size = 4 * job_of(world)[0].lora
    slow, fast = (1000 * costs.all_reduce_seconds(size, 64, GPUS["h100"], rate) for rate in (12.5e9, 50e9))
    assert f" of a node\n  {slow:.1f} ms on 64 at 100 Gbit/s between nodes ({fast:.1f} ms at 400)\n" in told


def test_the_batch_size_that_keeps_more_gpus_busy_is_named(monkeypatch):
    """Equal trees of one branch: four of them keep four GPUs busy, and half of eight."""
    samples, settings = make_samples(320, 1), PlanSettings(4, 0, seed=0)
    learning = "what batch size does to learning: docs/grouping.md"
    assert batch_size_remedy(samples, settings, [1, 2, 4]) == ""
    told = batch_size_remedy(samples, settings, [4, 8])
    assert told == f"at 8 GPUs --batch-size 8 would use 100% of them, 4 uses 50%\n{learning}"
    told = batch_size_remedy(samples, settings, [16, 64])
    first = "at 16 GPUs --batch-size 16 would use 100% of them, 4 uses 25%"
    assert told == f"{first}\nat 64 GPUs --batch-size 32 would use 50% of them, 4 uses 6%\n{learning}"
    for questions in (128, 320):  # of a part of the rows the same is true
        monkeypatch.setattr(scaling, "SAMPLED_QUESTIONS", questions)
        assert batch_size_remedy(samples, settings, [16, 64]) == told
    told = batch_size_remedy(make_samples(1280, 1), settings, [7])  # the first size that suffices: 128 would use 96%
    assert told == f"at 7 GPUs --batch-size 32 would use 91% of them, 4 uses 57%\n{learning}"
    assert batch_size_remedy(samples[:39], settings, [8]) == ""  # no epoch of at least ten steps has more questions


def test_every_planned_gpu_can_be_named_and_derived_rates_are_called_so(bare, capsys):
    for name in GPUS:
        assert parse_settings([f"--gpu={name}"]).gpu == name
    with pytest.raises(InputError, match=f"none of {', '.join(GPUS)}"):
        parse_settings(["--gpu=v100"])
    for name, gpu in GPUS.items():
        train.main([*arguments(bare, ""), "--plan", f"--gpu={name}"])
        assert ("derived from data sheets" in capsys.readouterr().out) != gpu.measured


# -------------------------------------------------------------------------------------------------------- the warnings


def test_suspicious_rows_are_counted_and_the_first_is_named(world, tmp_path):
    asked = [("a.png", "How many?", "two"), ("a.png", "Where?", "left"), ("b.png", "How many?", "one")]
    rows = [tiny.single(*row) for row in asked]
    rows += [
        rows[0],
        tiny.single("a.png", "Where?", "Left."),
        tiny.single("b.png", "How many?", "1"),
    ]  # the same answer
    rows += [tiny.single("b.png", "How many?", "three"), rows[0], tiny.single("c.png", "Why?", "long" + " long" * 299)]
    rows += [tiny.single("c.png", "Which colours?", colours) for colours in ("pink; red", "red, pink")]  # the same set
    rows += [tiny.single("c.png", "Which tool?", "snare"), tiny.single("c.png", "Which tool?", "forceps")]
    rows[-1]["answers"] = ["forceps", "a snare"]  # which accepts the other row's answer
    tokenizer, settings = AutoTokenizer.from_pretrained(world / "model"), image_settings(world / "model")
    data = []
    for name, chosen in (("train", rows), ("val", [tiny.single("d.png", "Why?", "so"), rows[2]])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
        data.append(load_data([tmp_path / f"{name}.jsonl"], world / "images", tokenizer, settings, 100_000))
    trained = int(data[0].samples[8].trained.sum())
    assert data_warnings(*data) == [
        "validation images that are also trained on: 1\n  val.jsonl:2 b.png",
        "rows that repeat another in images, question and answer: 2\n  train.jsonl:4 repeats train.jsonl:1",
        "rows that contradict another of the same images and question: 1\n  "
        "train.jsonl:7 says 'three', train.jsonl:3 'one'",
        f"rows of over 256 answer tokens: 1\n  train.jsonl:9 has {trained}",
    ]
    assert data_warnings(data[1], None) == []


def test_validation_images_that_are_copies_of_trained_ones_are_named(world, tmp_path):
    tokenizer, settings = AutoTokenizer.from_pretrained(world / "model"), image_settings(world / "model")
    picture = noise(64, 64)
    for name in ("a", "copy", "end", "middle", "smaller"):  # of the same length, but for the last
        changed = picture.resize((32, 64) if name == "smaller" else (64, 64))
        if name in ("end", "middle"):
            changed.putpixel((0, 0) if name == "end" else (0, 31), (1, 2, 3))  # a BMP ends with its first line
        changed.save(tmp_path / f"{name}.bmp")
        os.utime(tmp_path / f"{name}.bmp", (0, 0))  # files are not judged by their times
    data = []
    for names in (("smaller", "a"), ("smaller", "end", "middle", "copy")):
        rows = [json.dumps(tiny.single(f"{name}.bmp", "How many?", "one")) + "\n" for name in names]
        (tmp_path / "rows.jsonl").write_text("".join(rows))
        data.append(load_data([tmp_path / "rows.jsonl"], tmp_path, tokenizer, settings, 100_000))
    assert data_warnings(*data)[:2] == [
        "validation images that are also trained on: 1\n  rows.jsonl:1 smaller.bmp",
        "validation images that are copies of trained ones: 1\n  rows.jsonl:4 copy.bmp is a.bmp",
    ]


def test_the_first_suspicious_row_is_the_first_of_the_file_whatever_its_picture(load):
    a, b, no = (tiny.single(name, "How many?", answer) for name, answer in (("a.png", 1), ("b.png", 1), ("b.png", 2)))
    told = data_warnings(load([a, b, b, a, no, {**a, "answer": 2}]), None)
    assert "2\n  rows.jsonl:3 repeats rows.jsonl:2" in told[0] and "2\n  rows.jsonl:5 says '2'" in told[1]
