"""Dropout of LoRA follows from a token's place in its step: a tree has the same masks in whatever company it runs."""

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from steps import run_step, whole

from inputs.positions import place_keys
from modeling.dropout import PlaceDropout, RowKeys
from trees import Assignment, PlanSettings, StepSampler, cut_to_fit, pack

CPU = torch.device("cpu")
VISION = {"targets": "q_proj,k_proj,down_proj,vision,merger"}


@pytest.fixture(scope="module")
def trees(world):
    return whole(tiny.load_world(world)[0].samples)


# --------------------------------------------------------------------------------------------------- the same gradients


@pytest.mark.parametrize("more", [{}, {"dora": True}, VISION, VISION | {"dora": True}])
def test_packing_and_cutting_do_not_change_gradients(world, trees, more):
    """All trees in one micro-batch, packed by two budgets, in other orders, and with every tree cut into parts."""
    cut = [part for tree in trees for part in cut_to_fit(tree, tree.tokens - sum(tree.branch_tokens) // 3)]
    assert len(cut) >= len(trees) + 3 and {tree.first_branch for tree in cut} > {1}
    one = run_step(world, [trees], dropout=0.1, **more)
    packed = [pack(trees, max_tokens) for max_tokens in (300, 150)]
    assert 1 < len(packed[0]) < len(packed[1])
    for batches in (*packed, [trees[::-1]], [cut[1::2], cut[::2]]):
        loss, gradients = run_step(world, batches, dropout=0.1, **more)
        assert loss == pytest.approx(one[0], rel=1e-5) and tiny.relative_error(gradients, one[1]) < 1e-5
    assert tiny.relative_error(run_step(world, [trees], **more)[1], one[1]) > 0.01  # there is dropout


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_5"])
def test_packing_does_not_change_gradients_of_other_families(tmp_path, family):
    """Qwen2.5-VL's tower reorders patches: a patch's place is that in its order."""
    world = tiny.write_world(tmp_path / "world", tiny.mixed_rows()[14:], family)
    trees = whole(tiny.load_world(world)[0].samples)
    more = {"targets": "q_proj,vision,merger"}
    one, two = (run_step(world, batches, dropout=0.1, **more) for batches in ([trees], [trees[1::2], trees[::2]]))
    assert tiny.relative_error(two[1], one[1]) < 1e-5


def test_numbering_trees_by_their_place_in_a_micro_batch_is_noticed(world, trees):
    def by_micro_batch(batch):
        return [replace(tree, number=place) for place, tree in enumerate(batch)]

    one = run_step(world, [by_micro_batch(trees)], dropout=0.1)
    two = run_step(world, [by_micro_batch(trees[1::2]), by_micro_batch(trees[::2])], dropout=0.1)
    assert tiny.relative_error(two[1], one[1]) > 0.01


def test_any_number_of_ranks_has_the_gradients_of_one(world, monkeypatch):
    """Summed over the shares of 1 to 16 ranks, of which some cut trees and some are without work."""
    for cost in ("IMAGE_COST", "MICRO_BATCH_COST"):  # such small trees would not be cut
        monkeypatch.setattr(f"trees.{cost}", 0.0)
    data, _ = tiny.load_world(world)
    settings, results = PlanSettings(len(data.samples), 0, seed=3), {}
    for ranks, max_tokens in ((1, 9999), (2, 150), (4, 9999), (8, 150), (16, 9999)):
        samplers = [StepSampler(data.samples, settings, max_tokens, rank, ranks) for rank in range(ranks)]
        batches = [assignment.trees for sampler in samplers for assignment in sampler if assignment.in_loss]
        asked = sorted(i for batch in batches for tree in batch for i in tree.samples)
        assert asked == list(range(len(data.samples)))
        assert ranks != 2 or len(batches) > 2
        results[ranks] = run_step(world, batches, dropout=0.1, seed=3)
    assert len([tree for batch in batches for tree in batch]) > 7  # some were cut
    for loss, gradients in results.values():
        assert loss == pytest.approx(results[1][0], rel=1e-5)
        assert tiny.relative_error(gradients, results[1][1]) < 1e-5


def test_dropout_repeats_with_its_seed_and_averages_to_the_exact_gradient(world, reference, trees):
    draws = [run_step(world, [trees], dropout=0.2, seed=seed)[1] for seed in range(12)]
    again = run_step(world, [trees], dropout=0.2, seed=0)[1]
    assert tiny.relative_error(again, draws[0]) == 0
    mean = {name: torch.stack([draw[name] for draw in draws]).mean(0) for name in again}
    error_of_one = tiny.relative_error(draws[0], reference[1])
    assert 0.01 < tiny.relative_error(mean, reference[1]) < error_of_one / 2


def test_dropout_differs_between_steps_and_trees(world, trees):
    """The same tree, weights and seed in step 0, in step 1, and as another tree of step 0."""
    tree, other = trees[0], replace(trees[0], number=9)
    first, second = (run_step(world, [[tree]], dropout=0.2, number=number) for number in (0, 1))
    both = run_step(world, [[tree], [other]], dropout=0.2)
    assert abs(second[0] / first[0] - 1) > 1e-4 and tiny.relative_error(second[1], first[1]) > 0.01
    assert abs(both[0] / (2 * first[0]) - 1) > 1e-4


# ---------------------------------------------------------------------------------------------------------------- masks


def kept(name: str, keys: np.ndarray, width: int = 1024, p: float = 0.05) -> torch.Tensor:
    """(rows, width) float64: 1 where the input of this name is kept."""
    rows = RowKeys()
    rows.keys = torch.from_numpy(keys)
    return (PlaceDropout(p, rows, name, width, CPU)(torch.ones(len(keys), width)) != 0).double()


def keys_of(step: int, tree: int = 0, branch: int = 1, tokens: int = 3000) -> np.ndarray:
    return place_keys(step, tree, branch, np.arange(tokens))


def test_a_mask_drops_each_element_on_its_own_and_scales_the_rest():
    x, rows = torch.ones(1, 3000, 1024, requires_grad=True), RowKeys()
    rows.keys = torch.from_numpy(keys_of(5))
    out = PlaceDropout(0.05, rows, "layers.0.qkv", 1024, CPU)(x)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(gradient, out.detach()) and out.detach().unique().tolist() == pytest.approx([0, 1 / 0.95])
    mask = kept("layers.0.qkv", keys_of(5))
    assert abs(mask.mean() - 0.95) < 4 * (0.05 * 0.95 / mask.numel()) ** 0.5
    for axis in (0, 1):  # no row or column is dropped more often than chance has it
        assert mask.mean(axis).std() == pytest.approx((0.05 * 0.95 / mask.shape[axis]) ** 0.5, rel=0.1)


def test_masks_of_other_tokens_columns_layers_and_steps_are_uncorrelated():
    mask = kept("layers.0.qkv", keys_of(5))
    others = {
        "next token": (mask[1:], mask[:-1]),
        "next column": (mask[:, 1:], mask[:, :-1]),
        "column 64 further": (mask[:, 64:], mask[:, :-64]),
        "next layer": (mask, kept("layers.1.qkv", keys_of(5))),
        "other input of the layer": (mask, kept("layers.0.gate_up", keys_of(5))),
        "next step": (mask, kept("layers.0.qkv", keys_of(6))),
        "next tree": (mask, kept("layers.0.qkv", keys_of(5, tree=1))),
        "next branch": (mask, kept("layers.0.qkv", keys_of(5, branch=2))),
        "next layer and token": (mask[1:], kept("layers.1.qkv", keys_of(5))[:-1]),
    }
    for name, (a, b) in others.items():
        assert abs(((a - 0.95) * (b - 0.95)).mean()) < 4 * 0.05 * 0.95 / a.numel() ** 0.5, name


def test_every_token_and_patch_of_a_step_has_a_key_of_its_own(world, trees):
    """Also of several images in a tree, and of images that branches show after their prefix."""
    data, dataset = tiny.load_world(world)
    batch = dataset[Assignment(tuple(trees))]
    for keys in (batch.dropout_keys[batch.tree >= 0], batch.patch_keys):
        assert len(keys.unique()) == len(keys) > 500


@pytest.mark.parametrize("keys", [keys_of(1, tokens=375), np.arange(375, dtype=np.int32)], ids=["hashed", "neighbours"])
def test_no_mask_is_a_permutation_or_a_shift_of_another(keys):
    """Of 750 rows in two layers, no two drop nearly the same number of the same columns, whatever columns are exchanged
    by adding to or inverting bits of their numbers. Among many tokens some keys are neighbours by chance."""
    rows = torch.cat([kept(name, keys, p=0.5) for name in "ab"]) - 0.5
    for columns in (
        torch.arange(1024),
        torch.arange(1024) ^ 1,
        torch.arange(1024) ^ 37,
        (torch.arange(1024) + 5) % 1024,
    ):
        likeness = (rows @ rows[:, columns].T / 256).abs()  # standard deviation 1/32 by chance, 1 for the same mask
        if columns[0] == 0:
            likeness.fill_diagonal_(0)
        assert likeness.max() < 7 / 32


def test_inputs_that_layers_share_are_dropped_once(world):
    model = tiny.lora_model(
        world, dropout=0.1, targets=VISION["targets"] + ",v_proj,o_proj,gate_proj,up_proj"
    ).base.model
    attention, mlp = model.language_model.layers[1].self_attn, model.language_model.layers[1].mlp
    q, k, v, o = (getattr(attention, f"{name}_proj").lora_dropout["default"] for name in "qkvo")
    gate, up, down = (getattr(mlp, f"{name}_proj").lora_dropout["default"] for name in ("gate", "up", "down"))
    assert q is k is v and gate is up and len({q, o, gate, down}) == 4
    assert q is not model.language_model.layers[0].self_attn.q_proj.lora_dropout["default"]
    assert len({drop.columns.numpy().tobytes() for drop in (q, o, gate, down)}) == 4
