"""Compiled layers are exact, keep the activations that the memory budget allows, and are not compiled again."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny
import torch
from PIL import Image
from test_bench import bench

from data import build_batch
from modeling.memory import MEMORY_BUDGETS, compile_layers
from trees import Assignment, group_samples, grow_tree


def step_of_the_8b_s_proportions(folder, budget: float | None) -> tuple[dict[str, torch.Tensor], int]:
    """Gradients of a step of a small model, and the bytes of activations that it kept for the backward pass.

    The model has dropout, and two layers: the last one, and one that stands for all others. budget None: not compiled.
    """
    preset, cpu = bench.PRESETS["tiny"], torch.device("cpu")
    text = preset.config["text_config"] | {
        "hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "num_key_value_heads": 2,
        "head_dim": 64, "num_hidden_layers": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [12, 10, 10]},
    }  # fmt: skip
    vision = preset.config["vision_config"] | {"out_hidden_size": 512}
    preset = replace(preset, config=preset.config | {"text_config": text, "vision_config": vision}, size=(960, 544))
    torch.manual_seed(0)
    model = bench.tree_model(preset, cpu, torch.float32, folder, SimpleNamespace(compile=False))
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    for name, weight in trained.items():
        if "lora_B" in name:  # else lora_A would get no gradient
            torch.nn.init.normal_(weight, std=0.05)
    if budget is not None:
        compile_layers(model.model, budget, backend="aot_eager_decomp_partition")
    weights, kept = {weight.data_ptr() for weight in model.parameters()}, {}

    def keep(tensor):
        if tensor.data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.nbytes
        return tensor

    _, step, _ = bench.tree_step(model, preset, 1, cpu, torch.float32, folder)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step()
    return {name: weight.grad for name, weight in trained.items()}, sum(kept.values())


def test_compiled_layers_are_exact_and_keep_what_their_memory_budget_allows(tmp_path):
    """Half of the activations are computed again, with the same dropout. LoRA's products are custom operations, which
    torch takes for cheap unless configured otherwise."""
    torch._dynamo.utils.counters.clear()
    expected, _ = step_of_the_8b_s_proportions(tmp_path, None)
    (gradients, kept), (gradients_of_half, kept_of_half) = (
        step_of_the_8b_s_proportions(tmp_path, budget) for budget in (1.0, 0.5)
    )
    assert tiny.relative_error(gradients, expected) < 1e-5
    assert tiny.relative_error(gradients_of_half, expected) < 1e-5
    assert kept_of_half / kept == pytest.approx(MEMORY_BUDGETS[0.5] / MEMORY_BUDGETS[1.0], rel=0.15)
    # Nothing was traced a second time, and the code of such graphs was not found in torch's caches by the next start.
    attempts = torch._dynamo.utils.counters["aot_autograd"]
    assert attempts["total"] == attempts["ok"] == 4


@pytest.mark.parametrize(("dropout", "late", "expected"), [(0.0, False, 5), (0.1, False, 5), (0.1, True, 3)])
def test_lengths_and_image_sizes_do_not_recompile(world, tmp_path, dropout, late, expected):
    """36 steps of 1 to 18 branches, images of ten sizes: whole layers are compiled, and none again after two steps."""
    (tmp_path / "model").symlink_to(world / "model")
    (tmp_path / "images").mkdir()
    for n in range(10):
        Image.new("RGB", (64 + 32 * n, 224 - 16 * n), (25 * n, 0, 0)).save(tmp_path / "images" / f"{n}.png")
    rows = [tiny.single("0.png", f"How many polyps are in part {n}?", "3") for n in range(18)]
    rows += [tiny.single(f"{n}.png", "How many polyps are in part 3?", "3") for n in range(1, 10)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data, dataset = tiny.load_world(tmp_path)
    assert len(set(data.grids.values())) == 10
    model = tiny.lora_model(world, dropout)
    model.base.model.visual.config._attn_implementation = "onelook_cudnn_flash_vision"  # as on a Hopper GPU
    if late:
        model.leave_out_late()
    compile_layers(model.model, 1.0, backend="eager")
    torch._dynamo.utils.counters.clear()
    group = max(group_samples(data.samples), key=len)
    others = [grow_tree(data.samples, g) for g in group_samples(data.samples)]
    graphs, branches = [], set()
    for step in range(36):
        tree = grow_tree(data.samples, group[: 1 + 7 * step % 18])
        branches.add(len(tree.samples))
        batch = build_batch(data, Assignment((tree, others[step % len(others)])), dataset.settings)
        losses, _ = model(batch)
        losses.sum().backward()
        if step % 10 == 1:  # an evaluation now and then
            with torch.no_grad():
                model.eval()(batch)
                model.train()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    breaks = list(torch._dynamo.utils.counters["graph_break"])
    torch._dynamo.reset()
    assert graphs[2] == graphs[-1] and not breaks and branches == set(range(1, 19))
    # One for vision blocks, and in training and in evaluation one for decoder layers, and one for the last of them
    # where it leaves out tokens itself.
    assert graphs[-1] == expected, graphs


def test_all_blocks_of_the_vision_tower_share_a_graph(tmp_path):
    preset, cpu = bench.PRESETS["tiny"], torch.device("cpu")
    vision = preset.config["vision_config"] | {"depth": 3}
    preset = replace(preset, config=preset.config | {"vision_config": vision})
    model = bench.tree_model(preset, cpu, torch.float32, tmp_path, SimpleNamespace(compile=False))
    model.base.model.visual.config._attn_implementation = "onelook_cudnn_flash_vision"  # as on a Hopper GPU
    compile_layers(model.model, 1.0, backend="eager")
    torch._dynamo.utils.counters.clear()
    _, _, vision = bench.tree_step(model, preset, 1, cpu, torch.float32, tmp_path)
    vision()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()
    assert graphs == 1
