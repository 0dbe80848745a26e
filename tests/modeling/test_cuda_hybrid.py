"""Qwen3.5 in bfloat16 against float32: with flash-linear-attention's kernels at the 9B's widths on a GPU, and by the
reference code with a tiny model on a CPU, which shows that these tests run.

`pytest -s` prints what a test does next: the first call of each kernel can take minutes, as Triton compiles and times
its variants.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from test_bench import bench, gradient_bench
from transformers.models.qwen3_5 import modeling_qwen3_5

from common import InputError
from data import recurrent_paths
from modeling.delta import check_kernels, reference_rule, through_trees, unit_vectors
from modeling.memory import compile_layers


def why_not() -> str:
    """Why the kernels can't run here; empty where they can."""
    if not torch.cuda.is_available():
        return "needs a CUDA GPU"
    try:
        return check_kernels("qwen3_5", torch.device("cuda"), torch.bfloat16)
    except InputError as error:
        return str(error)


CPU, GPU = torch.device("cpu"), torch.device("cuda")
# Tokens of trunks and branches, and how many tokens the state of the slowest head lasts. Chunks have 64 tokens: short
# sequences end before, at and after their ends. Long ones are split by FlashQLA, where states last and where not.
SHAPES = {
    "short": ([(130, [1, 63, 64, 65, 200]), (0, [70]), (64, [2, 129]), (3, [5, 1, 300])], 300),
    "long": ([(2704, [195, 64, 1]), (1100, [130])], 10_000),
}
NEEDS_KERNELS = pytest.mark.skipif(bool(why_not()), reason=why_not())


def trees_with_padding(shapes: list[tuple[int, list[int]]], padding: int) -> tuple[np.ndarray, np.ndarray]:
    """Tree and branch of each token, from the tokens of each tree's trunk and branches."""
    tree = [np.full(trunk + sum(branches), n) for n, (trunk, branches) in enumerate(shapes)]
    branch = [np.repeat(np.arange(len(branches) + 1), [trunk, *branches]) for trunk, branches in shapes]
    return np.concatenate([*tree, np.full(padding, -1)]), np.concatenate([*branch, np.zeros(padding, int)])


def path_by_path(query, key, value, decay, beta, tree, branch):
    """What `through_trees` gives, by the reference rule: each sequence from the beginning of its own path."""
    groups = value.shape[1] // key.shape[1]
    query, key = (x.repeat_interleave(groups, dim=1) for x in (query, key))
    out, roots, branches = torch.zeros_like(value), [], []
    for number, own in dict.fromkeys(zip(tree.tolist(), branch.tolist())):
        if number >= 0:
            path = np.flatnonzero((tree == number) & np.isin(branch, [0, own]))
            rows = [x[path][None] for x in (query, key, value, decay, beta)]
            result, end = reference_rule()(*rows, output_final_state=True, use_qk_l2norm_in_kernel=True)
            out[path[branch[path] == own]] = result[0, branch[path] == own]
            (branches if own and (branch[path] == 0).any() else roots).append(end)
    return out, torch.cat(roots + branches)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("device", [CPU, pytest.param(GPU, marks=NEEDS_KERNELS)], ids=str)
def test_trees_have_the_outputs_states_and_gradients_of_the_reference_rule(name, device, announce):
    torch.backends.cuda.matmul.allow_tf32 = False
    shapes, slowest = SHAPES[name]
    tree, branch = trees_with_padding(shapes, 20)
    paths = recurrent_paths(tree, branch)
    starts = tuple(map(torch.tensor, paths.pop("starts_on_cpu")))
    paths = {name: part.to(device) for name, part in paths.items()} | {"starts_on_cpu": starts}
    key_heads, heads, size = (16, 32, 128) if device.type == "cuda" else (2, 4, 16)
    torch.manual_seed(0)
    query, key, value = (torch.randn(len(tree), n, size, device=device) for n in (key_heads, key_heads, heads))
    lasts = torch.logspace(0, math.log10(slowest), heads, device=device)
    decay, beta = (torch.rand(len(tree), heads, device=device) for _ in range(2))
    given = query.bfloat16(), key.bfloat16(), value.bfloat16(), -decay / lasts, beta.bfloat16()
    towards = torch.randn(sum(map(len, starts)) - 2, heads, size, size, device=device)
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        inputs = [x.detach().to(torch.promote_types(x.dtype, dtype)).requires_grad_() for x in given]
        exact = dtype == torch.float32
        announce("float32, path by path" if exact else "bfloat16, through trees")
        if exact:
            out, states = path_by_path(*inputs, tree, branch)
        else:
            out, states = through_trees(*map(unit_vectors, inputs[:2]), *inputs[2:], **paths)
        loss = (out.float() * torch.linspace(-1, 1, size, device=device)).sum() + (states * towards).sum()
        results.append([out, states, *torch.autograd.grad(loss, inputs)])
    assert not any(x[tree < 0].any() for n, x in enumerate(results[0]) if n != 1)
    names = "out", "states", "query", "key", "value", "decay", "beta"
    errors = {n: ((x.float() - y).norm() / y.norm()).item() for n, x, y in zip(names, *results)}
    print("relative errors:", ", ".join(f"{name} {error:.4f}" for name, error in errors.items()))
    assert max(errors.values()) < 0.02


@pytest.mark.parametrize(
    ("name", "size", "device"),
    [
        ("tiny-qwen3.5", (128, 96), CPU),
        pytest.param("qwen3.5-9b", (800, 768), GPU, marks=NEEDS_KERNELS),
        pytest.param("qwen3.5-9b", (1920, 1440), GPU, marks=NEEDS_KERNELS),
    ],
    ids=["tiny", "9b", "9b, an image of 2,700 tokens"],
)
def test_bf16_gradients_are_as_close_to_float32_as_those_of_eager_peft(
    name, size, device, tmp_path, monkeypatch, announce
):
    """PEFT's by transformers' own call of the kernels, where there are any, and float32's by the reference rule. Two
    layers of linear attention and one of full attention, 5 questions of at most 70 tokens."""
    torch.backends.cuda.matmul.allow_tf32 = False
    kinds = ["linear_attention", "linear_attention", "full_attention"]
    preset = gradient_bench.first_layers(bench.PRESETS[name], size, num_hidden_layers=len(kinds), layer_types=kinds)
    preset = replace(preset, question_tokens=min(preset.question_tokens, 70))
    batches = [bench.make_data(preset, 5, tmp_path)]
    reference = modeling_qwen3_5, "torch_chunk_gated_delta_rule", reference_rule()
    if device.type == "cpu":  # where flash-linear-attention is installed, transformers calls its kernels here too
        monkeypatch.setattr(*reference)
    announce("eager PEFT in bfloat16, one by one")
    (peft,) = gradient_bench.one_by_one(preset, torch.bfloat16, device, batches)
    announce("eager PEFT in float32, one by one")
    monkeypatch.setattr(*reference)
    (exact,) = gradient_bench.one_by_one(preset, torch.float32, device, batches)
    announce("a tree in bfloat16, compiled on a GPU")
    model = gradient_bench.tree_model(preset, torch.bfloat16, device, batches[0][1])
    if device.type == "cuda":
        compile_layers(model.model, 1.0)
    (ours,) = gradient_bench.of_trees(model, torch.bfloat16, [gradient_bench.one_tree(*batches[0], device)])
    of_ours, of_peft = (tiny.relative_error(gradients, exact) for gradients in (ours, peft))
    announce(f"worst relative error against float32: ours {of_ours:.4f}, eager PEFT {of_peft:.4f}")
    assert of_ours < 1.1 * of_peft
