"""What only a GPU can show: FlexAttention against the dense mask, and a float32 step against transformers."""

import json
from dataclasses import replace

import pytest
import tiny
import torch
from test_exact import whole

from attention import tree_attention, tree_mask, visible
from data import build_batch
from trees import Work

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def dense_mask(batch):
    order = torch.arange(len(batch.ids), device=batch.ids.device)
    return visible(batch.tree, batch.branch, batch.tree, batch.branch, order, order)[None, None]


@pytest.mark.parametrize("length", [128, 1280, 1281 + 127])
def test_flex_attention_equals_dense_attention(length):
    torch.manual_seed(length)
    tree = torch.arange(length, device="cuda", dtype=torch.int32) // (length // 3 + 1)
    branch = (torch.arange(length, device="cuda", dtype=torch.int32) % (length // 3 + 1)) // 30
    q, k, v = (torch.randn(1, heads, length, 64, device="cuda", requires_grad=True) for heads in (8, 2, 2))
    batch = type("Batch", (), {"ids": tree, "tree": tree, "branch": branch})
    module = torch.nn.Module()
    module.num_key_value_groups = 4
    results = []
    for mask in (tree_mask(batch), dense_mask(batch)):
        out, _ = tree_attention(module, q, k, v, mask, 0.125)
        results.append([out, *torch.autograd.grad((out * torch.linspace(-1, 1, 64, device="cuda")).sum(), (q, k, v))])
    for flex, dense in zip(*results):
        assert (flex - dense).norm() / dense.norm() < 2e-3  # tf32 inside the kernel


def test_a_float32_step_on_the_gpu_equals_samples_one_by_one(world, tmp_path):
    torch.backends.cuda.matmul.allow_tf32 = False
    rows = [json.loads(line) for line in (world / "rows.jsonl").read_text().splitlines()]
    data, dataset = tiny.load_world(world)
    model = tiny.lora_model(world).cuda()
    expected_loss, expected = tiny.Reference(world, model, tmp_path).loss_and_gradients(rows)
    batch = build_batch(data, Work(tuple(whole(data.samples))), dataset.settings, pad_to=128).to(torch.device("cuda"))
    for mask_like in ("flex", "dense"):
        model.zero_grad()
        if mask_like == "dense":
            hidden = model.hidden_states(
                batch.ids, batch.positions, dense_mask(batch), batch.image_at, model.encode_images(batch)
            )
            logits = model.base.lm_head(hidden[batch.answer_at])
            losses = torch.nn.functional.cross_entropy(logits, batch.targets, reduction="none")
        else:
            losses, _ = model(batch, model.encode_images(batch))
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
        batch = build_batch(data, Work(tuple(trees[:count])), dataset.settings, pad_to=128).to(torch.device("cuda"))
        losses, _ = model(replace(batch), model.encode_images(batch))
        losses.sum().backward()
        seen.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert seen[-1] == seen[3], seen
