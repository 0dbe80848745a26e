"""The benchmarks run; the step benchmark counts the floating-point operations that torch counts; the study of learning
pairs seeds, computes intervals and decides by its rule."""

import json
import math
import runpy
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

import eval
import train
from inputs.images import ImageSettings, load_patches
from modeling import fp8

BENCH = runs.ROOT / "bench"
sys.path.append(str(BENCH))
import gradients as gradient_bench  # noqa: E402
import job  # noqa: E402
import learning  # noqa: E402
import learning_data  # noqa: E402
import learning_tower  # noqa: E402
import start  # noqa: E402
import step as bench  # noqa: E402
import variants  # noqa: E402


@pytest.fixture
def table(tmp_path, monkeypatch, capsys):
    """Run a script, or a function of one, in this process; returns the JSON that it writes and what it prints."""

    def table(script, *words) -> tuple[dict, str]:
        monkeypatch.setattr(sys, "argv", ["benchmark", *map(str, words), "--json", str(tmp_path / "out.json")])
        script() if callable(script) else runpy.run_path(str(BENCH / script), run_name="__main__")
        return json.loads((tmp_path / "out.json").read_text()), capsys.readouterr().out

    return table


@pytest.mark.parametrize("preset", ["tiny", "tiny-qwen3.5"])
def test_the_benchmark_prints_a_table_and_writes_json(table, preset):
    result, printed = table("step.py", "--preset", preset, "--profile")
    assert [row["case"] for row in result["rows"]] == ["recipe", "tree-1", "cached-9", "tree-9", "tree-17"]
    assert all(row["ms_per_question"] > 0 and row["tflops"] > 0 and row["busy"] > 0 for row in result["rows"])
    assert {"name", "device", "versions", "commit", "command"} <= result.keys() and "ms/question" in printed
    assert "matrix products" in printed and "vision tower" in printed


def test_sampled_stacks_show_where_a_script_spends_its_time(tmp_path, monkeypatch, capsys):
    script = tmp_path / "sleeper.py"
    script.write_text("import sys, time\n\ndef rest():\n    time.sleep(float(sys.argv[1]))\n\nrest()\n")
    words = ["--every", "0.005", "--within", str(tmp_path), "--", str(script), "0.5"]
    monkeypatch.setattr(sys, "argv", ["stacks.py", *words])
    runpy.run_path(str(BENCH / "stacks.py"), run_name="__main__")
    at, led = capsys.readouterr().out.split("and what led there")
    lines = [line for part in (at, led) for line in part.splitlines() if line.endswith("sleeper.py:4 rest")]
    assert len(lines) == 2 and all(float(line.split("%")[0]) > 80 for line in lines)
    assert "samples: where threads were" in at


@pytest.mark.parametrize(("preset", "billions"), [("2b", 2), ("4b", 4), ("8b", 8), ("32b", 32), ("qwen3.5-9b", 9)])
def test_the_benchmark_s_models_have_the_sizes_of_their_names(preset, billions):
    """The names leave out the vision tower. The two smaller models share lm_head's weights with the embeddings."""
    with torch.device("meta"):
        model = bench.AutoModelForImageTextToText.from_config(bench.config_of(bench.PRESETS[preset]))
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


@pytest.mark.parametrize("questions", [9, 8, 6, 4, 3])
def test_the_job_has_as_many_questions_as_asked_for_and_keeps_one_of_each_image(questions):
    counts = {"a": 4, "b": 1, "c": 3}
    rows = [{"image_filename": name, "question": n} for name, count in counts.items() for n in range(count)]
    kept = job.leave_out(rows, questions)
    assert len(kept) == min(questions, len(rows)) and [row for row in rows if row in kept] == kept
    assert {row["image_filename"] for row in kept} == set(counts)
    left = Counter(row["image_filename"] for row in kept)
    # Images that can lose one lose about the same number.
    assert max(counts[name] - left[name] for name in "ac") <= 1 + min(counts[name] - left[name] for name in "ac")


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
    assert "autotune_pointwise=False" in printed and "\nwarm: imports " in printed


@pytest.mark.parametrize("name", ["tiny", "tiny-qwen3.5"])
def test_norms_of_random_models_give_vectors_of_length_one_per_number(tmp_path, name):
    """Those of Qwen3.5 multiply by 1 + weight, and its states may not grow or vanish."""
    preset, cpu = bench.PRESETS[name], torch.device("cpu")
    model = bench.tree_model(preset, cpu, torch.float32, tmp_path, type("Args", (), {"compile": False}))
    _, step, _ = bench.tree_step(model, preset, 2, cpu, torch.float32, tmp_path)
    sizes, language_model = {}, model.base.model.language_model
    for at, layer in enumerate(language_model.layers):
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.register_forward_hook(lambda norm, _, out, at=at: sizes.update({(at, norm): out.square().mean()}))
    step()
    assert len(sizes) == 2 * len(language_model.layers)
    assert [size.item() for size in sizes.values()] == pytest.approx([1.0] * len(sizes), rel=0.05)
    for linear in (layer.linear_attn for layer in language_model.layers if hasattr(layer, "linear_attn")):
        lasts = 1 / (linear.A_log.exp() * math.log(1 + math.e))  # tokens, where nothing adds to dt_bias
        assert lasts.min() > 0.5 and lasts.max() < 400


def test_the_hybrid_preset_has_the_widths_that_transformers_gives_the_9b():
    preset, default = bench.config_of(bench.PRESETS["qwen3.5-9b"]), AutoConfig.for_model("qwen3_5")
    ours, theirs = (config.text_config.to_dict() for config in (preset, default))
    different = {name for name in theirs if ours[name] != theirs[name]}
    assert different == {"max_position_embeddings", "rope_parameters"}
    assert preset.vision_config.out_hidden_size == preset.text_config.hidden_size


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
    config = bench.config_of(preset)
    flops = bench.step_flops(config, [patches], patches // 4 + 4, branches, answers)
    counted = flops.language + flops.tower  # torch omits attention
    lora = 0
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            rows = answers if "layers.1.mlp" in name else tokens
            lora += 6 * 8 * (module.in_features + module.out_features) * rows  # 2 forward, 4 backward, each times r
    assert counter.get_total_flops() == counted + lora


# ------------------------------------------------------------------------------------------------------------ gradients

CPU, TINY = torch.device("cpu"), gradient_bench.PRESETS["tiny"]


def test_the_gradient_benchmark_compares_precisions_and_variants_with_float32(table, monkeypatch):
    fast, multiply = [], fp8.multiply
    monkeypatch.setattr(fp8, "multiply", lambda *args: fast.append(fp8.FAST_ACCUMULATION) or multiply(*args))
    result, printed = table("gradients.py", "--preset", "tiny", "--batches", 2)
    plain, outliers = ({row["name"]: row for row in part["rows"]} for part in result["tables"])
    assert [*plain] == [*outliers] == ["eager transformers + peft, bf16", *(row.name for row in variants.ROUNDED_ROWS)]
    apart = {name: row["all"] for name, row in plain.items()}
    assert 0.5 < apart["bf16"] / apart["eager transformers + peft, bf16"] < 2
    assert 0 < 2 * apart["bf16"] < apart["fp8-backward"] < apart["fp8-weights"] < apart["fp8"] < 0.3
    assert (
        apart["first and last layer in bf16"] < apart["fp8"] and apart["residual of x as a second term"] < apart["fp8"]
    )
    assert plain["full sums (no fast accumulation)"] == plain["fp8"] | {"name": "full sums (no fast accumulation)"}
    assert apart["smoothed"] != apart["fp8"] != apart["down_proj in bf16"]
    assert 0 < fast.count(False) < len(fast) and fp8.FAST_ACCUMULATION
    assert all(part["cosine"] < 0.5 for part in result["tables"])  # another picture and other questions in each batch
    assert all(outliers[name]["all"] > row["all"] and row["ms"] is None for name, row in plain.items())
    assert "| plain" in printed and "| with outlier channels" in printed


@pytest.mark.parametrize("outliers", [False, True])
def test_its_trees_have_the_gradients_of_questions_one_by_one_in_float32(tmp_path, outliers):
    batches = [bench.make_data(TINY, 3, tmp_path)]
    (exact,) = gradient_bench.one_by_one(TINY, torch.float32, CPU, batches, outliers=outliers)
    model = gradient_bench.tree_model(TINY, torch.float32, CPU, batches[0][1], outliers=outliers)
    (trees,) = gradient_bench.of_trees(model, torch.float32, [gradient_bench.one_tree(*batches[0], CPU)])
    assert gradient_bench.distances([trees], [exact])["worst"] < 1e-5


def test_a_variant_with_the_products_of_fp8_has_its_gradients_bit_for_bit(tmp_path):
    """Smoothing without factors changes nothing."""
    data, results = bench.make_data(TINY, 3, tmp_path), []
    for smooth in (False, True):
        row = variants.Row("", "fp8", rounds=lambda layer, path: layer != 1, smooth=smooth)
        change = partial(variants.round_layers, row=row, factors={})
        model = gradient_bench.tree_model(TINY, torch.bfloat16, CPU, data[1], change=change)
        kinds = {type(linear) for *_, linear in variants.decoder_linears(model.base, variants.QuantizedLinear)}
        assert kinds == {variants.VariantLinear if smooth else variants.QuantizedLinear}
        results += gradient_bench.of_trees(model, torch.bfloat16, [gradient_bench.one_tree(*data, CPU)])
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_columns_are_those_worked_out_by_hand():
    exact = [{"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([10.0])}] * 2
    errors = [{"b": torch.tensor([1.0]), "a": torch.tensor([3.0, 0.0])}]
    errors += [{"b": torch.tensor([1.0]), "a": torch.tensor([-3.0, 0.0])}]
    ours = [{name: right[name] + error[name] for name in error} for right, error in zip(exact, errors)]
    columns = gradient_bench.distances(ours, exact)
    assert columns["worst"] == pytest.approx(3 / 5) and columns["median"] == pytest.approx((3 / 5 + 1 / 10) / 2)
    assert columns["all"] == pytest.approx((10 / 125) ** 0.5)
    assert columns["cosine"] == pytest.approx((1 - 9) / 10)


@pytest.fixture
def product():
    """x (40, 64) with three tokens that have outliers, a weight (48, 64), and a product's relative error per token."""
    torch.manual_seed(0)
    x, weight = torch.randn(40, 64, dtype=torch.float64), torch.randn(48, 64, dtype=torch.float64)
    x[::15, 7] = 100.0
    exact = x @ weight.T

    def product(name: str) -> torch.Tensor:
        way = variants.PRODUCTS[name]
        return (way.multiply(x, *way.prepare(weight)) - exact).norm(dim=1) / exact.norm(dim=1)

    product.x, product.weight = x, weight
    return product


def test_variants_multiply_numbers_that_are_rounded_as_their_names_say(product):
    x, weight = product.x, product.weight
    (codes, scales), (own, own_scales) = variants.to_int8(weight), variants.to_int8(x)
    assert torch.equal(codes.double().abs().amax(1), torch.full((48,), 127.0, dtype=torch.float64))
    assert ((codes * scales - weight).abs() <= 0.501 * scales).all()
    exact = ((own.double() @ codes.double().T) * own_scales * scales.T).double()
    assert torch.allclose(variants.multiply_int8(x, codes, scales), exact, rtol=1e-5)
    plain, both, some = (product(name) for name in ("fp8", "residual", "residual of outliers"))
    tokens = torch.arange(40) % 15 == 0
    assert torch.equal(variants.has_outliers(x), tokens)
    assert torch.equal(some[~tokens], plain[~tokens]) and torch.allclose(some[tokens], both[tokens])
    # What remains with a residual is the rounding of the weight.
    weight_alone = product("fp8-weights")
    assert (both - weight_alone).abs().max() < 0.2 * (plain - weight_alone).abs().max()


def test_smoothing_has_powers_of_two_that_layers_with_the_same_input_share():
    torch.manual_seed(0)
    inputs = {}
    for index in range(variants.LAYERS):
        for paths in variants.AFTER_NORM:
            x = torch.randn(20, 32, dtype=torch.bfloat16)
            x[:, 5] *= 256
            inputs |= {(index, path): (x, torch.randn(16, 32, dtype=torch.bfloat16)) for path in paths}
    inputs[2, "self_attn.k_proj"][1][:, 9] *= 4096  # of the three it has the largest numbers
    factors = variants.smoothing(inputs)
    q, k = factors[2, "self_attn.q_proj"], factors[2, "self_attn.k_proj"]
    assert len(factors) == 5 * variants.LAYERS and torch.equal(q, k)
    assert torch.equal(q.log2().round(), q.log2()) and q[5] == 16 * q.median() == 1024 * q[9]  # square roots
    linear = torch.nn.Linear(32, 16, bias=False, dtype=torch.bfloat16)
    as_it_is = variants.Product(lambda weight: (weight,), torch.nn.functional.linear)
    x = inputs[2, "self_attn.q_proj"][0]
    smoothed = variants.ForwardProduct.apply(x, variants.VariantLinear(linear, as_it_is, q))
    assert torch.equal(smoothed, linear(x))  # nothing but rounding changes


def test_the_time_of_a_row_is_that_of_its_layers_products(monkeypatch):
    """With the second layer's inputs, repeated to the rows of a whole tree; the mean over layers, some in bfloat16."""
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    way = variants.PRODUCTS["fp8"]
    rows = []
    count = variants.Product(way.prepare, lambda x, *kept: rows.append(len(x)) or way.multiply(x, *kept))
    assert variants.product_ms(count, torch.randn(90, 32), torch.randn(16, 32), repeats=2) > 0
    assert rows == [4480] * 4  # two before they are timed
    seen = []
    times = {id(way): 1.0, id(variants.IN_BF16): 10.0}
    monkeypatch.setattr(variants, "product_ms", lambda product, x, w: seen.append((x, w)) or times[id(product)])
    inputs = {(1, path): (path, "weight") for path in variants.SHAPES}
    named = {row.name: variants.row_ms(row, inputs) for row in variants.ROUNDED_ROWS if row.product in ("bf16", "fp8")}
    assert named["bf16"] == 40 and named["fp8"] == named["smoothed"] == 4
    assert named["down_proj in bf16"] == 13 and named["first and last layer in bf16"] == 22
    assert {x for x, _ in seen} == set(variants.SHAPES)


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
