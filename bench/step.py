"""Step time on one GPU: the usual recipe against trees, in one run on one machine.

    python bench/step.py                                          # Qwen3-VL-8B with random weights, full resolution
    python bench/step.py --preset tiny                            # a minute on a CPU: shows that it runs, not how fast
    python bench/step.py --cases tree-9 --profile                 # and where its time goes
    python bench/step.py --preset qwen3.5-9b --cases recipe,tree-1,tree-9,tree-17    # with flash-linear-attention
    python bench/step.py --preset 2b --cases tree-9,tree-28       # 28 questions: a micro-batch of 8,164 tokens

Random weights cost what real ones cost. The workload is that of the reference job: 2,700 image tokens, and 195 tokens
per question. The recipe runs one question per sequence, padded to 2,900, with full logits and every layer checkpointed.
`busy` is the time of a step's kernels (of its operators on a CPU), by a profile of one more step, over its time.
"""

import argparse
import gc
import json
import math
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel

sys.path.insert(0, str(Path(__file__).parents[1]))
from data import Sample, VQAData, build_batch, padding
from inputs.images import ImageSettings
from model import TreeModel, autocast, pick_dtype, prepare_base
from modeling.linear import quantize_linear
from modeling.lora import add_lora
from modeling.memory import compile_layers
from modeling.precision import PRECISIONS
from modeling.targets import AUTO, resolve_targets, target_pattern
from training.checkpoints import VERSIONS
from training.costs import step_flops
from trees import Assignment, StepFacts, grow_tree

QWEN3_VL_8B = {
    "model_type": "qwen3_vl",
    "text_config": {
        "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 262144,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_interleaved": True,
                            "mrope_section": [24, 20, 20]},
    },
    "vision_config": {
        "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "patch_size": 16,
        "out_hidden_size": 4096, "num_position_embeddings": 2304, "deepstack_visual_indexes": [8, 16, 24],
    },
}  # fmt: skip


def qwen3_vl(text: dict, vision: dict) -> dict:
    """The 8B with other widths."""
    return {
        "model_type": "qwen3_vl",
        "text_config": QWEN3_VL_8B["text_config"] | text,
        "vision_config": QWEN3_VL_8B["vision_config"] | {"out_hidden_size": text["hidden_size"]} | vision,
    }


# Widths from config.json of Qwen/Qwen3-VL-2B-Instruct, -4B- and -32B-, the first also in torchtitan's models/qwen3_vl.
# The 2B and the 4B share one matrix for embeddings and lm_head. Here they are two, of 0.6 and 0.7 GiB.
SMALL_TOWER = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]}
QWEN3_VL_2B = qwen3_vl(
    {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16}, SMALL_TOWER
)
QWEN3_VL_4B = qwen3_vl({"hidden_size": 2560, "intermediate_size": 9728}, SMALL_TOWER)
QWEN3_VL_32B = qwen3_vl(
    {"hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64, "num_attention_heads": 64}, {}
)
# Widths from config.json of Qwen/Qwen3.5-9B. Its tower is that of Qwen3-VL-8B without deepstack.
QWEN3_5_9B = {
    "model_type": "qwen3_5",
    "text_config": {
        "vocab_size": 248320, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 32,
        "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 262144,
        "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128,
        "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "mrope_interleaved": True,
                            "mrope_section": [11, 11, 10], "partial_rotary_factor": 0.25},
    },
    "vision_config": QWEN3_VL_8B["vision_config"] | {"deepstack_visual_indexes": []},
}  # fmt: skip
TINY = {
    "model_type": "qwen3_vl",
    "text_config": {
        "vocab_size": 1024, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_interleaved": True,
                            "mrope_section": [4, 2, 2]},
    },
    "vision_config": {
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 16,
        "out_hidden_size": 64, "num_position_embeddings": 64, "deepstack_visual_indexes": [0],
    },
}  # fmt: skip
TINY_QWEN3_5 = {
    "model_type": "qwen3_5",
    "text_config": {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
                    "linear_value_head_dim": 16} | TINY["text_config"] | {"num_hidden_layers": 4},
    "vision_config": TINY["vision_config"] | {"deepstack_visual_indexes": []},
}  # fmt: skip
IMAGE_TOKEN = 5


@dataclass
class Preset:
    config: dict
    size: tuple[int, int]  # width and height of the image in pixels
    question_tokens: int  # question, answer and template, after the image
    answer_tokens: int
    padded: int  # length that the recipe pads to
    repeats: int


PRESETS = {
    "2b": Preset(QWEN3_VL_2B, (1920, 1440), 195, 32, 2900, 5),
    "4b": Preset(QWEN3_VL_4B, (1920, 1440), 195, 32, 2900, 5),
    "8b": Preset(QWEN3_VL_8B, (1920, 1440), 195, 32, 2900, 5),
    "32b": Preset(QWEN3_VL_32B, (1920, 1440), 195, 32, 2900, 5),
    "qwen3.5-9b": Preset(QWEN3_5_9B, (1920, 1440), 195, 32, 2900, 5),
    "tiny": Preset(TINY, (128, 96), 20, 4, 40, 2),
    "tiny-qwen3.5": Preset(TINY_QWEN3_5, (128, 96), 20, 4, 40, 2),
}


# ----------------------------------------------------------------------------------------------------------- workload


def config_of(preset: Preset) -> PretrainedConfig:
    return AutoConfig.for_model(**preset.config, image_token_id=IMAGE_TOKEN, tie_word_embeddings=False)


def random_model(
    config: PretrainedConfig, dtype: torch.dtype, device: torch.device, precision: str = "bf16"
) -> PreTrainedModel:
    """A model with random weights, created on the device itself, one layer after the other."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa").to(dtype)
    for name, module in list(model.named_modules()):
        module.to_empty(device=device, recurse=False)
        with torch.no_grad():
            for own, weight in module.named_parameters(recurse=False):
                if weight.dim() > 1:
                    weight.normal_(0, 0.02)
                elif own == "A_log":  # heads of Qwen3.5 whose states last from one token to hundreds
                    weight.uniform_(-6, 0)
                else:  # Qwen3.5 multiplies by 1 + weight in all norms but the gated one
                    weight.fill_(own != "bias" and type(module).__name__ != "Qwen3_5RMSNorm")
        if precision != "bf16" and isinstance(module, torch.nn.Linear) and ".language_model.layers." in name:
            quantize_linear(model, name, precision)
    for module in model.modules():  # rotary tables are buffers, which to_empty leaves undefined
        if hasattr(module, "original_inv_freq"):
            module.__init__(module.config)
            module.to(device)
    return model.requires_grad_(False)


def make_data(preset: Preset, questions: int, folder: Path, seed: int = 0) -> tuple[VQAData, ImageSettings]:
    """One image with `questions` questions that share everything before them."""
    side = math.isqrt(preset.config["vision_config"]["num_position_embeddings"])
    settings = ImageSettings(16, 2, 2, 1024, 2**24, (0.5,) * 3, (0.5,) * 3, side)
    width, height = preset.size
    random = np.random.default_rng(seed)
    picture = folder / "picture.png"
    Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(picture)
    grid = settings.grid(height, width)
    samples = []
    for number in range(questions):
        ids = random.integers(10, 1000, 5 + preset.question_tokens).astype(np.int32)
        ids[:5] = [1, 2, 3, IMAGE_TOKEN, 4]
        ids[5] = 10 + number  # questions differ from their first token
        answer = len(ids) - preset.answer_tokens
        weights = np.repeat([0.0, 1.0], [answer, preset.answer_tokens])
        tokens = grid[0] * grid[1] // 4
        image = {"image_at": (3,), "image_tokens": (tokens,), "patches": (4 * tokens,)}
        samples.append(
            Sample(str(number), f"bench:{number}", (str(picture),), ids, weights, answer, **image, fields={})
        )
    return VQAData("bench", samples, {str(picture): grid}), settings


# ---------------------------------------------------------------------------------------------------------------- cases


def model_inputs(batch, padded: int = 0, image_token: int = IMAGE_TOKEN) -> dict:
    """A batch of one question as arguments of transformers' model, padded on the right to `padded` tokens."""
    short = max(0, padded - len(batch.ids))
    ids = torch.nn.functional.pad(batch.ids, (0, short))[None]
    inputs = {"input_ids": ids, "attention_mask": torch.nn.functional.pad(torch.ones_like(batch.ids), (0, short))[None]}
    inputs["pixel_values"] = ((batch.patches / 255 - 0.5) / 0.5)[:, :, None].expand(-1, -1, 2, -1).flatten(1)
    return inputs | {"image_grid_thw": batch.grid, "mm_token_type_ids": (ids == image_token).int()}


def recipe_inputs(batch, padded: int) -> tuple[dict, torch.Tensor]:
    """The same arguments, and their labels (1, n), -100 where nothing is trained."""
    inputs = model_inputs(batch, padded)
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[0, batch.answer_at + 1] = batch.targets
    return inputs, labels


def recipe_step(preset: Preset, device: torch.device, dtype: torch.dtype, folder: Path, wrap=lambda model: model):
    """transformers + PEFT: one question per sequence, padded, full logits, every layer checkpointed.

    Returns the model, wrapped by `wrap`, and a function that runs forward and backward on one question.
    """
    model = random_model(config_of(preset), dtype, device)
    targets = target_pattern(resolve_targets(AUTO, model.config.model_type))
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules=targets))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = wrap(model.train())
    data, settings = make_data(preset, 1, folder)
    batch = build_batch(data, Assignment((grow_tree(data.samples, [0]),)), settings).to(device)
    inputs, labels = recipe_inputs(batch, preset.padded)

    def step():
        with autocast(device, dtype):
            out = model(**inputs, labels=labels)
        out.loss.backward()

    return model, step


def tree_model(
    preset: Preset, device: torch.device, dtype: torch.dtype, folder: Path, args, precision: str = "bf16"
) -> TreeModel:
    base = prepare_base(random_model(config_of(preset), dtype, device, precision))
    model = TreeModel(add_lora(base, "random", 8, 16, 0.05), make_data(preset, 1, folder)[1])
    if device.type == "cuda" and args.compile:
        compile_layers(model.model, args.memory_budget)
    return model.train()


def tree_step(
    model: TreeModel,
    preset: Preset,
    questions: int,
    device: torch.device,
    dtype: torch.dtype,
    folder: Path,
    cached=False,
):
    """Our step on one tree, without optimizer and data loading, as for the recipe.

    Returns its number of tokens, the step, and the vision tower's part of it. `cached`: the step gets vision
    features that are ready, as with `--vision-cache`.
    """
    data, settings = make_data(preset, questions, folder)
    tree = grow_tree(data.samples, list(range(questions)))
    assignment = Assignment((tree,), StepFacts(0, questions, 1, 1))
    batch = build_batch(data, assignment, settings, padding(device)).to(device)

    def vision():
        with autocast(device, dtype):
            return model.encode_images(batch)

    if cached:
        features = vision()
        batch.features = torch.stack([features.embeds, *features.deepstack])

    def step():
        with autocast(device, dtype):
            losses, _ = model(batch)
        losses.mean().backward()

    return tree.tokens, step, vision


# ------------------------------------------------------------------------------------------------------------ measuring


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(step, model, device: torch.device, repeats: int) -> dict:
    """Median milliseconds of a forward and backward pass, seconds of the first pass, and peak memory in GiB."""
    started = time.perf_counter()
    step()
    synchronize(device)
    first = time.perf_counter() - started
    step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(repeats):
        model.zero_grad(set_to_none=True)
        synchronize(device)
        started = time.perf_counter()
        step()
        synchronize(device)
        times.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    return {"ms": 1000 * float(np.median(times)), "first_s": first, "peak_gib": peak}


def matmul_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of a large matrix product on random data, the ceiling that a step is compared with."""
    side = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    for _ in range(3):
        a @ b
    synchronize(device)
    started = time.perf_counter()
    for _ in range(10):
        a @ b
    synchronize(device)
    return 10 * 2 * side**3 / (time.perf_counter() - started) / 1e12


KINDS = {
    "attention": ("flash", "flex", "attention", "fmha", "cudnn"),
    "matrix products": ("gemm", "nvjet", "cutlass", "mm", "sm90"),
}


def kernel_times(work, device: torch.device) -> dict[str, tuple[float, int]]:
    """Milliseconds and calls of each kernel that `work` runs (of each operator on a CPU)."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []
    with torch.profiler.profile(activities=activities) as prof:
        work()
        synchronize(device)
    name = "self_cpu_time_total" if device.type == "cpu" else "self_device_time_total"
    events = [e for e in prof.key_averages() if device.type == "cpu" or e.device_type.name == "CUDA"]
    return {event.key: (getattr(event, name) / 1000, event.count) for event in events}


def by_kind(kernels: dict[str, tuple[float, int]]) -> dict[str, float]:
    """Milliseconds by kind of kernel, recognized by its name."""
    totals = dict.fromkeys([*KINDS, "rest"], 0.0)
    for key, (ms, _) in kernels.items():
        kind = next((kind for kind, words in KINDS.items() if any(word in key.lower() for word in words)), "rest")
        totals[kind] += ms
    return totals


def profile(step, vision, device: torch.device) -> str:
    """The time of a step by kind of work, the vision tower separately, and its ten most expensive kernels."""
    kernels, tower = kernel_times(step, device), by_kind(kernel_times(vision, device))
    language = {kind: ms - tower[kind] for kind, ms in by_kind(kernels).items()}
    lines = [f"  {kind:<16} {ms:8.1f} ms" for kind, ms in language.items()]
    lines.append(f"  vision tower     {sum(tower.values()):8.1f} ms, its attention {tower['attention']:.1f}")
    top = sorted(kernels.items(), key=lambda kernel: -kernel[1][0])[:10]
    return "\n".join([*lines, *(f"  {ms:8.2f} ms {count:5} x {key[:90]}" for key, (ms, count) in top)])


def free_memory(device: torch.device) -> None:
    """Give back what a model that is gone held: compiled layers are in circles."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def run_cases(args, preset: Preset, device: torch.device, dtype: torch.dtype, ceiling: float):
    """Yield one row of results per case: those of every precision one after the other, the recipe in bf16 only."""
    cases, config = args.cases.split(","), config_of(preset)
    patches = (preset.size[0] // 16) * (preset.size[1] // 16)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        runs = [("bf16", "recipe")] * ("recipe" in cases)
        runs += [(precision, case) for precision in args.base_precision for case in cases if case != "recipe"]
        model, running = None, None
        for precision, case in runs:
            kind, questions = case.split("-")[0], int(case.partition("-")[2] or 1)
            if running != (precision, kind == "recipe"):
                running, model, step, vision = (precision, kind == "recipe"), None, None, None
                free_memory(device)
            if kind == "recipe":
                tokens = preset.padded
                model, step = recipe_step(preset, device, dtype, folder)
            else:
                model = model or tree_model(preset, device, dtype, folder, args, precision)
                tokens, step, vision = tree_step(model, preset, questions, device, dtype, folder, kind == "cached")
            row = {"case": case, "precision": precision, **measure(step, model, device, preset.repeats)}
            branches = [preset.question_tokens] * questions
            answers = questions * preset.answer_tokens
            encoded = [] if kind == "cached" else [patches]
            flops = sum(step_flops(config, encoded, patches // 4 + 4, branches, answers))
            row |= {"ms_per_question": row["ms"] / questions, "tokens_per_s": 1000 * tokens / row["ms"]}
            row["busy"] = sum(ms for ms, _ in kernel_times(step, device).values()) / row["ms"]
            row |= {"tflops": flops / row["ms"] / 1e9, "share": flops / row["ms"] / 1e9 / ceiling}
            if args.profile and case == cases[-1] != "recipe":
                print(f"where the time of {case}, {precision}, goes:\n{profile(step, vision, device)}", flush=True)
            yield row


def print_table(rows: list[dict]) -> None:
    recipe = next((row["ms_per_question"] for row in rows if row["case"] == "recipe"), None)
    print("case      precision     ms/question  x recipe  tokens/s  TFLOP/s  share  busy    GiB  first s")
    for row in rows:
        ratio = f"{recipe / row['ms_per_question']:.1f}" if recipe else "-"
        print(
            f"{row['case']:<10}{row['precision']:<12}{row['ms_per_question']:>13.1f}{ratio:>10}"
            f"{row['tokens_per_s']:>10,.0f}{row['tflops']:>9.0f}{row['share']:>7.0%}{row['busy']:>6.0%}"
            f"{row['peak_gib'] or 0:>7.1f}{row['first_s']:>9.1f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Step time on one GPU: the usual recipe against trees.")
    parser.add_argument("--preset", choices=PRESETS, default="8b")
    parser.add_argument("--cases", default="recipe,tree-1,cached-9,tree-9,tree-17")
    parser.add_argument("--base-precision", nargs="+", choices=PRECISIONS, default=["bf16"],
        help="run the trees at each of these")  # fmt: skip
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--memory-budget", type=float, default=1.0)
    parser.add_argument("--profile", action="store_true", help="print where the time of the last case goes")
    parser.add_argument("--name", default="step")
    parser.add_argument("--json", default="", help="file for the results")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = pick_dtype("auto", device)
    ceiling = matmul_tflops(device, dtype)
    print(f"{device_name(device)}: matrix products {ceiling:.2f} TFLOP/s", flush=True)
    rows = list(run_cases(args, PRESETS[args.preset], device, dtype, ceiling))
    print_table(rows)
    if args.json:
        write_json(Path(args.json), args.name, device, {"matmul_tflops": ceiling, "rows": rows})


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "cpu"


def write_json(path: Path, name: str, device: torch.device, results: dict) -> None:
    """Write results with the device, versions, commit and command that produced them."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    result = {"name": name, "date": time.strftime("%Y-%m-%d"), "device": device_name(device), "versions": VERSIONS}
    result |= {"commit": commit, "command": " ".join(sys.argv), **results}
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
