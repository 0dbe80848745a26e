"""How far --base-precision and other ways to multiply move LoRA's gradients away from float32, and what they cost.

    python bench/gradients.py --json gradients.json     # at the 8B's widths, on a GPU with FP8
    python bench/gradients.py --preset tiny                         # on a CPU: FP8 is emulated, no times

Four layers of each tower with random weights, trees of 9 questions about a picture of 960 x 720, not compiled, without
dropout. Float32's gradients come from transformers and PEFT, one question per sequence. There are two tables: one as it
is, and one with six channels of every norm in the decoder layers 50 to 100 times larger, as some are in real models.

| column | |
|---|---|
| worst, median, all | relative distance from float32 of the worst tensor, the median one and all numbers together, in percent; mean over trees |
| cosine | between the errors of different trees, all pairs together. At 0, errors are random and a larger batch averages them out; at the cosine of float32's own gradients, printed below the table, it keeps as much of them as of the gradient |
| ms | forward products of 4,480 rows with the four shapes of a layer (q, k, gate, down), quantizing included, compiled; mean over layers |

Rows below `fp8-weights` are variants of `fp8`. They change the forward product alone, except that full sums and layers in
bfloat16 hold for the backward pass too. INT8 products are torch._int_mm, exact on CPUs too. Smoothing
(SmoothQuant, arXiv:2211.10438) divides x and multiplies W by max|x|^0.5 / max|W|^0.5 of each channel of the inputs that
come from a norm, which can be folded into it: its time is that of `fp8`. On a CPU full sums change nothing.
"""  # noqa: E501 (rows of a table)

import argparse
import gc
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
import step as bench
from variants import LAYERS, ROUNDED_ROWS, record_inputs, round_layers, row_ms, smoothing

from data import Batch, VQAData, build_batch, padding
from inputs.images import ImageSettings
from model import TreeModel, autocast, prepare_base
from modeling import fp8
from modeling.lora import add_lora
from modeling.targets import AUTO, resolve_targets, target_pattern
from trees import Assignment, grow_tree

QUESTIONS = 9
Gradients = dict[str, torch.Tensor]
Data = tuple[VQAData, ImageSettings]


def first_layers(preset: bench.Preset, size: tuple[int, int], **text) -> bench.Preset:
    """A preset with four layers of each tower and images of another size. `text`: what else differs in text_config."""
    vision = preset.config["vision_config"]
    deepstack = list(range(len(vision["deepstack_visual_indexes"])))
    few = {
        "text_config": preset.config["text_config"] | {"num_hidden_layers": LAYERS} | text,
        "vision_config": vision | {"depth": LAYERS, "deepstack_visual_indexes": deepstack},
    }
    return replace(preset, config=preset.config | few, size=size)


PRESETS = {
    "8b": first_layers(bench.PRESETS["8b"], (960, 720)),
    "tiny": first_layers(bench.PRESETS["tiny"], bench.PRESETS["tiny"].size),
}


def lora_model(preset: bench.Preset, dtype: torch.dtype, device: torch.device, add: Callable, outliers=False):
    """A preset's model with the LoRA that `add` puts on it, neither half of which is zero."""
    if device.type == "cuda":
        gc.collect()  # reference cycles keep the model before this one
    base = bench.random_model(bench.config_of(preset), torch.bfloat16, device)
    if outliers:
        generator = torch.Generator().manual_seed(2)
        for layer in base.model.language_model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                channels = torch.randperm(len(norm.weight), generator=generator)[:6].to(device)
                norm.weight[channels] = (50 + 50 * torch.rand(6, generator=generator)).to(norm.weight)
    model = add(base.to(dtype))
    generator = torch.Generator(device).manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.02, generator=generator)
    return model


def tree_model(
    preset, dtype, device, settings: ImageSettings, targets=AUTO, outliers=False, change=lambda base: base
) -> TreeModel:
    """Ours, without dropout. `change` is called with the frozen base model before LoRA is added."""

    def add(base):
        return add_lora(change(prepare_base(base)), "random", 8, 16, 0.0, targets)

    return TreeModel(lora_model(preset, dtype, device, add, outliers), settings)


# ---------------------------------------------------------------------------------------------------------- gradients


def take_gradients(model: nn.Module) -> Gradients:
    gradients = {name: p.grad.float() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return gradients


def one_by_one(preset, dtype, device, batches: list[Data], targets=AUTO, outliers=False) -> list[Gradients]:
    """Gradients of each batch's mean loss per answer token: one question per sequence, by transformers and PEFT."""

    def add(base):
        pattern = target_pattern(resolve_targets(targets, base.config.model_type))
        return get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=pattern))

    model, results = lora_model(preset, dtype, device, add, outliers), []
    for data, settings in batches:
        tokens = sum(int(sample.trained.sum()) for sample in data.samples)
        for index in range(len(data.samples)):
            batch = build_batch(data, Assignment((grow_tree(data.samples, [index]),)), settings).to(device)
            with autocast(device, dtype):
                logits = model(**bench.model_inputs(batch), logits_to_keep=batch.answer_at).logits[0].float()
            (F.cross_entropy(logits, batch.targets, reduction="sum") / tokens).backward()
        results.append(take_gradients(model))
    return results


def one_tree(data: VQAData, settings: ImageSettings, device: torch.device) -> Batch:
    assignment = Assignment((grow_tree(data.samples, list(range(len(data.samples)))),))
    return build_batch(data, assignment, settings, pad_to=padding(device)).to(device)


def of_trees(model: TreeModel, dtype: torch.dtype, trees: list[Batch]) -> list[Gradients]:
    """Gradients of each batch's mean loss per answer token."""
    results = []
    for tree in trees:
        with autocast(tree.ids.device, dtype):
            losses, _ = model(tree)
        losses.mean().backward()
        results.append(take_gradients(model.model))
    return results


def flat(batches: list[Gradients]) -> torch.Tensor:
    """All numbers as (batches, numbers) in float64."""
    return torch.stack(
        [torch.cat([gradients[n].double().flatten() for n in sorted(gradients)]) for gradients in batches]
    )


def cosine(rows: torch.Tensor) -> torch.Tensor:
    """The inner products of different rows over what they would be if all were equal; NaN for a single one."""
    squares = rows.square().sum()
    return (rows.sum(0).square().sum() - squares) / (squares * (len(rows) - 1))


def distances(ours: list[Gradients], exact: list[Gradients]) -> dict[str, float]:
    """The columns of the gradients, one item per batch in each list: see the top of this file."""
    tensors = [[(one[n] - right[n]).norm() / right[n].norm() for n in right] for one, right in zip(ours, exact)]
    tensors, right = torch.tensor(tensors, dtype=torch.float64), flat(exact)
    apart = flat(ours) - right
    columns = {
        "worst": tensors.amax(1).mean(),
        "median": tensors.quantile(0.5, dim=1).mean(),
        "all": (apart.norm(dim=1) / right.norm(dim=1)).mean(),
        "cosine": cosine(apart),
    }
    return {name: value.item() for name, value in columns.items()}


# -------------------------------------------------------------------------------------------------------------- table


def measure(preset: bench.Preset, device: torch.device, batches: list[Data], outliers: bool) -> dict:
    """All rows of one table."""
    dtype, settings, inputs, factors = torch.bfloat16, batches[0][1], {}, {}
    trees = [one_tree(*data, device) for data in batches]
    exact = one_by_one(preset, torch.float32, device, batches, outliers=outliers)
    peft = one_by_one(preset, dtype, device, batches, outliers=outliers)
    rows = [{"name": "eager transformers + peft, bf16", **distances(peft, exact), "ms": None}]
    for row in ROUNDED_ROWS:
        change = partial(round_layers, row=row, factors=factors)
        with patch.object(fp8, "FAST_ACCUMULATION", row.fast):
            model = tree_model(preset, dtype, device, settings, outliers=outliers, change=change)
            if row.name == "bf16":
                inputs = record_inputs(model.base)
            columns = distances(of_trees(model, dtype, trees), exact)
            factors = factors or smoothing(inputs)
            rows.append({"name": row.name, **columns, "ms": row_ms(row, inputs) if device.type == "cuda" else None})
    return {"outliers": outliers, "rows": rows, "cosine": cosine(flat(exact)).item()}


def print_table(table: dict) -> None:
    title = "with outlier channels" if table["outliers"] else "plain"
    print(f"\n| {title:<32} | worst | median | all | cosine | ms |\n|{'---|' * 6}")
    for row in table["rows"]:
        percent = " | ".join(f"{100 * row[column]:.2f}" for column in ("worst", "median", "all"))
        ms = f"{row['ms']:.3f}" if row["ms"] else ""
        print(f"| {row['name']:<32} | {percent} | {row['cosine']:.3f} | {ms} |")
    print(f"cosine between float32's gradients of two trees: {table['cosine']:.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Distance of LoRA's gradients from float32 at each precision.")
    parser.add_argument("--preset", choices=PRESETS, default="8b")
    parser.add_argument("--batches", type=int, default=4, help="random trees that distances are averaged over")
    parser.add_argument("--json", default="", help="file for the results")
    args = parser.parse_args()
    device, preset = torch.device("cuda" if torch.cuda.is_available() else "cpu"), PRESETS[args.preset]
    torch.backends.cuda.matmul.allow_tf32 = False
    with tempfile.TemporaryDirectory() as name:
        batches, tables = [], []
        for seed in range(args.batches):
            (folder := Path(name) / str(seed)).mkdir()
            batches.append(bench.make_data(preset, QUESTIONS, folder, seed))
        for outliers in (False, True):
            tables.append(measure(preset, device, batches, outliers))
            print_table(tables[-1])
    if args.json:
        bench.write_json(Path(args.json), "gradients", device, {"tables": tables})


if __name__ == "__main__":
    main()
