"""What only a GPU can show: FlexAttention against the dense mask, and a float32 step against transformers."""

import json
from dataclasses import replace

import pytest
import tiny
import torch
from steps import whole
from test_bench import bench, gradient_bench

from data import build_batch
from modeling.attention import HOPPER_OPTIONS, OPTIONS, tree_attention, tree_mask, visible
from modeling.fp8 import dequantize, multiply, product_error, quantize, quantize_weight, weight_codes
from modeling.memory import compile_layers
from modeling.targets import DEFAULT_TARGETS
from trees import Assignment

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def dense_mask(batch):
    keys = batch.tree, batch.branch, torch.arange(len(batch.ids), device=batch.ids.device)
    return visible(*(key[:, None] for key in keys), *keys)[None, None]


@pytest.mark.parametrize("length", [128, 1280, 1281 + 127])
@pytest.mark.parametrize(
    ("size", "dtype", "options", "error"),
    [(64, torch.float32, OPTIONS, 2e-3)]  # tf32 inside the kernel
    + [(size, torch.bfloat16, options, 1e-2) for size, options in HOPPER_OPTIONS.items()],
    ids=["float32", *(f"tuned-{size}" for size in HOPPER_OPTIONS)],
)
def test_flex_attention_equals_dense_attention(length, size, dtype, options, error):
    if options != OPTIONS and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("these settings are for Hopper GPUs")
    torch.manual_seed(length)
    tree = torch.arange(length, device="cuda", dtype=torch.int32) // (length // 3 + 1)
    branch = (torch.arange(length, device="cuda", dtype=torch.int32) % (length // 3 + 1)) // 30
    given = [torch.randn(1, heads, length, size, device="cuda", dtype=dtype) for heads in (8, 2, 2)]
    batch = type("Batch", (), {"ids": tree, "tree": tree, "branch": branch})
    module = torch.nn.Module()
    module.num_key_value_groups = 4
    results = []
    for mask, wide in ((tree_mask(batch), dtype), (dense_mask(batch), torch.float32)):
        inputs = [x.to(wide).requires_grad_() for x in given]
        out, _ = tree_attention(module, *inputs, mask, size**-0.5, kernel_options=options)
        loss = (out.float() * torch.linspace(-1, 1, size, device="cuda")).sum()
        results.append([out, *torch.autograd.grad(loss, inputs)])
    for flex, dense in zip(*results):
        assert (flex.float() - dense).norm() / dense.norm() < error


def test_a_float32_step_on_the_gpu_equals_samples_one_by_one(world, tmp_path):
    torch.backends.cuda.matmul.allow_tf32 = False
    rows = [json.loads(line) for line in (world / "rows.jsonl").read_text().splitlines()]
    data, dataset = tiny.load_world(world)
    model = tiny.lora_model(world).cuda()
    expected_loss, expected = tiny.Reference(world, model, tmp_path).loss_and_gradients(rows)
    assignment = Assignment(tuple(whole(data.samples)))
    batch = build_batch(data, assignment, dataset.settings, pad_to=128).to(torch.device("cuda"))
    for mask_like in ("flex", "dense"):
        model.zero_grad()
        if mask_like == "dense":
            hidden = model.hidden_states(
                batch.ids,
                batch.positions,
                dense_mask(batch),
                batch.answer_at,
                batch.image_at,
                model.encode_images(batch),
                paths=batch.paths,
            )
            logits = model.base.lm_head(hidden)
            losses = torch.nn.functional.cross_entropy(logits, batch.targets, reduction="none")
        else:
            losses, _ = model(batch)
        losses.mean().backward()
        gradients = {n.removeprefix("model."): p.grad.cpu() for n, p in model.named_parameters() if p.requires_grad}
        error = tiny.relative_error(gradients, expected)
        print(mask_like, losses.mean().item(), expected_loss, error)
        assert losses.mean().item() == pytest.approx(expected_loss, rel=1e-4)
        assert error < (1e-4 if mask_like == "dense" else 1e-2)


def test_lengths_do_not_recompile_without_end(world):
    data, dataset = tiny.load_world(world)
    model = tiny.lora_model(world).cuda()
    trees = whole(data.samples)
    torch._dynamo.utils.counters.clear()
    seen = []
    for count in (1, 2, 3, 4, 5, 6, 7, 6, 5, 4):
        assignment = Assignment(tuple(trees[:count]))
        batch = build_batch(data, assignment, dataset.settings, pad_to=128).to(torch.device("cuda"))
        losses, _ = model(replace(batch))
        losses.sum().backward()
        seen.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert seen[-1] == seen[3], seen


def test_recomputed_activations_have_the_same_dropout(world):
    torch.backends.cuda.matmul.allow_tf32 = False
    data, dataset = tiny.load_world(world)
    assignment = Assignment(tuple(whole(data.samples)[:2]))
    batch = build_batch(data, assignment, dataset.settings, 128).to(torch.device("cuda"))
    results = []
    for budget in (None, 1.0, 0.0):
        model = tiny.lora_model(world, dropout=0.1).cuda()
        if budget is not None:
            compile_layers(model.model, budget)
        losses, _ = model(batch)
        losses.mean().backward()
        results.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for again in results[1:]:
        assert tiny.relative_error(again, results[0]) < 1e-2  # other masks: 0.4; tf32 inside FlexAttention


@pytest.mark.parametrize("targets", [DEFAULT_TARGETS, DEFAULT_TARGETS + ",vision,merger"], ids=["text", "all"])
def test_compiled_bf16_gradients_are_as_close_to_float32_as_those_of_eager_peft(targets, tmp_path, announce):
    torch.backends.cuda.matmul.allow_tf32 = False
    preset, device = gradient_bench.PRESETS["8b"], torch.device("cuda")
    batches, results = [bench.make_data(preset, 9, tmp_path)], []
    for dtype in (torch.float32, torch.bfloat16):
        announce(f"eager PEFT in {dtype}, one by one")
        results += gradient_bench.one_by_one(preset, dtype, device, batches, targets)
    announce("a tree, compiled")
    exact, peft = results
    model = gradient_bench.tree_model(preset, torch.bfloat16, device, batches[0][1], targets)
    compile_layers(model.model, 1.0)
    (ours,) = gradient_bench.of_trees(model, torch.bfloat16, [gradient_bench.one_tree(*batches[0], device)])
    of_ours, of_peft = (tiny.relative_error(gradients, exact) for gradients in (ours, peft))
    print(f"worst relative error against float32: ours {of_ours:.4f}, eager PEFT {of_peft:.4f}")
    assert of_ours < 1.1 * of_peft


@pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="needs FP8")
def test_fp8_products_are_those_of_rounded_numbers():
    assert product_error(torch.device("cuda")) < 0.006  # rounding to bfloat16, and Hopper's fast accumulation


@pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="needs FP8")
@pytest.mark.parametrize("is_compiled", [False, True])
def test_weights_have_the_same_codes_on_a_gpu_compiled_or_not_as_on_a_cpu(is_compiled):
    weight = torch.randn(512, 256, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(-30, 34).repeat(4)
    codes, scales = quantize_weight((weight := weight.bfloat16()).T)
    run = torch.compile(weight_codes) if is_compiled else weight_codes
    assert torch.equal(run(weight.cuda().T, scales.cuda()).cpu(), codes)


@pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="needs FP8")
@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 65, 300])
@pytest.mark.parametrize(("k", "n"), [(4096, 1024), (4096, 4096), (4096, 12288), (12288, 4096)])
def test_fp8_products_have_any_number_of_rows(rows, k, n):
    """Generating answers multiplies one row per answer; K and N alone must be multiples of 16."""
    torch.manual_seed(rows)
    a, b = quantize(torch.randn(rows, k, device="cuda")), quantize_weight(torch.randn(n, k, device="cuda"))
    exact = dequantize(*a, torch.float64) @ dequantize(*b, torch.float64).T
    apart = multiply(*a, *b, torch.bfloat16).double() - exact
    assert (apart.norm(dim=1) / exact.norm(dim=1)).max() < 0.006  # as above
