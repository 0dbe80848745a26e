"""Promise 1: loss and every LoRA gradient of a step equal those of the same samples one by one through transformers."""

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from steps import assert_exact, run_step, whole
from transformers import AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import model as model_file
from data import build_batch
from inputs.images import load_patches
from inputs.positions import rotary_positions
from modeling import attention as attention_file
from trees import Assignment, PlanSettings, group_samples, grow_tree, make_plan, pack


def test_the_mixed_step_has_trees_of_1_9_and_17_branches_and_every_kind_of_row(world):
    data, _ = tiny.load_world(world)
    trees = whole(data.samples)
    assert sorted(len(tree.samples) for tree in trees) == [1, 1, 1, 1, 3, 9, 17]
    assert len({sample.images for sample in data.samples}) == 7


@pytest.mark.parametrize("micro_batches", [1, 2, 3])
def test_a_step_equals_its_samples_one_by_one_in_any_number_of_micro_batches(world, reference, micro_batches):
    trees = whole(tiny.load_world(world)[0].samples)
    assert_exact(run_step(world, [trees[n::micro_batches] for n in range(micro_batches)]), reference)


def test_trees_of_one_branch_and_split_trees_equal_whole_ones(world, reference):
    samples = tiny.load_world(world)[0].samples
    ones = [grow_tree(samples, [index]) for index in range(len(samples))]
    assert_exact(run_step(world, [ones]), reference)
    split = [
        grow_tree(samples, part.tolist()) for g in group_samples(samples) for part in np.array_split(g, len(g) // 4 + 1)
    ]
    assert_exact(run_step(world, [split[:3], split[3:]]), reference)


def test_the_plan_s_own_packing_is_exact(world, reference):
    samples = tiny.load_world(world)[0].samples
    (step,) = make_plan(samples, PlanSettings(len(samples), 5, 3), epoch=0)
    batches = pack(step, 300)
    assert len(batches) >= 3
    assert_exact(run_step(world, batches), reference)


def test_rows_with_weights_count_that_much_in_loss_and_gradients(tmp_path):
    """Weights differ within a tree and across micro-batches, and some rows have two answers."""
    rows = [row | {"weight": (0.25, 1, 3.5)[n % 3]} for n, row in enumerate(tiny.mixed_rows()) if n % 4 or n > 25]
    world = tiny.write_world(tmp_path / "world", rows)
    expected = tiny.Reference(world, tiny.lora_model(world), tmp_path / "adapter").loss_and_gradients(rows)
    trees = whole(tiny.load_world(world)[0].samples)
    assert_exact(run_step(world, [trees[::2], trees[1::2]]), expected)


def weighted_turns() -> list[dict]:
    """Rows whose turns have weights: an answer that is not trained is part of what rows share, and so is an image after
    it, but not where it is the last, which generation begins with."""
    first, answer = tiny.turn("user", "Is this sharp?", 1), tiny.turn("assistant", "yes, it is")
    rows = []
    for number in range(6):
        second = [
            tiny.turn("user", f"What is in part {number}?", number % 2),
            tiny.turn("assistant", f"finding {number}"),
        ]
        weights = (0, 1) if number < 4 else (0.25, 3.5)
        turns = [first, answer | {"weight": weights[0]}, second[0], second[1] | {"weight": weights[1]}]
        rows.append({"messages": turns, "images": ["a.png", "b.png"][: 1 + number % 2], "weight": (1, 0.5)[number % 2]})
    rows += [{"messages": [first, answer | {"weight": 2.5}, tiny.turn("user", "And now?"), answer | {"weight": 0}],
              "images": ["a.png"]}]  # fmt: skip
    return rows + [tiny.single("a.png", f"How many polyps are in part {i}?", f"{i}") for i in range(3)]


def test_turns_with_weights_count_that_much_in_loss_and_gradients(tmp_path):
    rows = weighted_turns()
    world = tiny.write_world(tmp_path / "world", rows)
    expected = tiny.Reference(world, tiny.lora_model(world), tmp_path / "adapter").loss_and_gradients(rows)
    samples = tiny.load_world(world)[0].samples
    trees, ones = whole(samples), [grow_tree(samples, [index]) for index in range(len(samples))]
    assert sorted(len(tree.samples) for tree in trees) == [1, 2, 7]
    assert_exact(run_step(world, [trees[:1], trees[1:]]), expected)
    assert_exact(run_step(world, [ones]), expected)


def test_rows_share_what_comes_before_their_first_trained_or_last_answer(tmp_path):
    samples = tiny.load_world(tiny.write_world(tmp_path / "world", weighted_turns()))[0].samples
    decode = AutoTokenizer.from_pretrained(tmp_path / "world" / "model").decode
    tree = grow_tree(samples, [0, 2])
    assert decode(samples[0].ids[: tree.prefix_ids]).endswith(
        "assistant\nyes, it is<|im_end|>\n<|im_start|>user\nWhat is in part "
    )
    two_pictures = grow_tree(samples, [1, 3])
    assert decode(samples[1].ids[: two_pictures.prefix_ids]).count("<|image_pad|>") == 2
    trained_first, not_trained_last = grow_tree(samples, [0, 4]), grow_tree(samples, [6])
    assert decode(samples[0].ids[: trained_first.prefix_ids]).endswith("sharp?<|im_end|>\n<|im_start|>assistant")
    assert not_trained_last.prefix_ids == trained_first.prefix_ids < samples[6].last_answer


def test_a_picture_is_encoded_once_for_all_its_questions(world):
    data, dataset = tiny.load_world(world)
    (tree,) = (tree for tree in whole(data.samples) if len(tree.samples) == 17)
    batch = build_batch(data, Assignment((tree,)), dataset.settings)
    assert len(batch.grid) == 1 and len(batch.patches) == data.samples[tree.samples[0]].patches[0]


def test_padding_changes_nothing(world, reference, monkeypatch):
    data, dataset = tiny.load_world(world)
    model = tiny.lora_model(world)
    assignment = Assignment(tuple(whole(data.samples)))
    plain, padded = (build_batch(data, assignment, dataset.settings, pad_to) for pad_to in (1, 128))
    assert len(padded.ids) % 128 == 0 and len(padded.ids) > len(plain.ids)
    losses = [model(batch)[0] for batch in (plain, padded)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)


MUTANTS = {
    "plain causal": lambda tree_q, b_q, tree_k, b_k, q, k: (tree_q[:, None] == tree_k) & (k <= q[:, None]),
    "branches don't see their prefix": lambda tree_q, b_q, tree_k, b_k, q, k: (
        (tree_q[:, None] == tree_k) & (k <= q[:, None]) & (b_k == b_q[:, None])
    ),
    "trees see each other": lambda tree_q, b_q, tree_k, b_k, q, k: (
        (k <= q[:, None]) & ((b_k == 0) | (b_k == b_q[:, None]))
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_wrong_masks_are_noticed(world, reference, monkeypatch, mutant):
    monkeypatch.setattr(attention_file, "visible", MUTANTS[mutant])
    _, gradients = run_step(world, [whole(tiny.load_world(world)[0].samples)])
    assert tiny.relative_error(gradients, reference[1]) > 0.05


def test_positions_that_do_not_restart_are_noticed(world, reference, monkeypatch):
    import data as data_file

    def running(sample, grids, merge):
        positions = rotary_positions(sample, grids, merge)
        return positions + (np.arange(positions.shape[1]) > 40) * len(sample.ids)

    monkeypatch.setattr(data_file, "rotary_positions", running)
    _, gradients = run_step(world, [whole(tiny.load_world(world)[0].samples)])
    assert tiny.relative_error(gradients, reference[1]) > 0.05


def test_one_branch_does_not_leak_into_another(world):
    data, dataset = tiny.load_world(world)
    model = tiny.lora_model(world)
    tree = next(tree for tree in whole(data.samples) if len(tree.samples) == 9)
    batch = dataset[Assignment((tree,))]
    changed = replace(batch, ids=torch.where(batch.branch == 2, 300, batch.ids))
    before, after = (model(b)[0] for b in (batch, changed))
    others = batch.question != 1
    assert torch.equal(before[others], after[others]) and not torch.equal(before[~others], after[~others])


def test_gradients_are_clipped_to_the_norm_that_is_asked_for(world):
    trees = whole(tiny.load_world(world)[0].samples)
    free, loose, tight = (run_step(world, [trees], max_grad_norm=norm)[1] for norm in (0.0, 1e6, 1e-3))
    norm = torch.cat([gradient.flatten() for gradient in free.values()]).norm()
    assert norm > 0.01 and tiny.relative_error(loose, free) == 0
    assert tiny.relative_error(tight, {name: gradient * 1e-3 / norm for name, gradient in free.items()}) < 1e-4


def test_rotary_positions_equal_the_installed_model_s(world):
    data, _ = tiny.load_world(world)
    model = tiny.lora_model(world).base.model
    for sample in data.samples:
        repeats = np.ones(len(sample.ids), int)
        repeats[list(sample.image_at)] = sample.image_tokens
        ids = torch.from_numpy(np.repeat(sample.ids, repeats)).long()[None]
        grid = torch.tensor([(1, *data.grids[path]) for path in sample.images]).reshape(-1, 3)
        types = (ids == model.config.image_token_id).int()
        expected, _ = model.get_rope_index(ids, types, image_grid_thw=grid)
        np.testing.assert_array_equal(rotary_positions(sample, data.grids, 2), expected[:, 0].numpy())


def test_patches_equal_the_image_processor_s(world):
    data, dataset = tiny.load_world(world)
    processor = Qwen2VLImageProcessorPil.from_pretrained(world / "model")
    for path, grid in data.grids.items():
        expected = processor([Image.open(path)], return_tensors="pt")
        assert tuple(expected["image_grid_thw"][0, 1:].tolist()) == grid
        patches = torch.from_numpy(load_patches(path, grid, dataset.settings))
        mean, std = (torch.tensor(v)[:, None] for v in (dataset.settings.mean, dataset.settings.std))
        ours = ((patches / 255 - mean) / std)[:, :, None].expand(-1, -1, 2, -1).flatten(1)
        torch.testing.assert_close(ours, expected["pixel_values"], rtol=0, atol=1e-6)


def test_vision_attention_in_one_call_equals_image_by_image(world):
    data, dataset = tiny.load_world(world)
    model = tiny.lora_model(world)
    batch = dataset[Assignment(tuple(whole(data.samples)))]
    expected = model.encode_images(batch)
    model.base.model.visual.config._attn_implementation = "onelook_cudnn_flash_vision"
    features = model.encode_images(batch)
    assert len(batch.grid) > 5
    torch.testing.assert_close(features.embeds, expected.embeds, rtol=1e-5, atol=2e-5)


def test_patch_projection_equals_the_conv3d(world):
    from transformers import AutoModelForImageTextToText

    visual = AutoModelForImageTextToText.from_pretrained(world / "model").model.visual
    patches = torch.randn(7, 3 * 2 * visual.config.patch_size**2)
    expected = visual.patch_embed(patches)
    visual.patch_embed.proj = model_file.PatchProjection(visual.patch_embed.proj)
    torch.testing.assert_close(visual.patch_embed(patches), expected, rtol=1e-5, atol=1e-5)


def test_training_mode_is_on_from_the_start_and_never_for_the_vision_tower(world):
    model = tiny.lora_model(world, dropout=0.1)
    assert model.training and model.model.training and not model.base.model.visual.training
    assert all(layer.training for layer in model.base.model.language_model.layers)


def test_a_model_that_moves_to_another_device_leaves_no_tensor_behind(world):
    model = tiny.lora_model(world).to("meta")
    for module in model.modules():
        tensors = {name: value for name, value in vars(module).items() if isinstance(value, torch.Tensor)}
        assert not [name for name, tensor in tensors.items() if not tensor.is_meta]
    assert model.mean.is_meta and not {"mean", "std"} & set(model.state_dict())


def test_packing_keeps_to_the_token_budget(world):
    samples = tiny.load_world(world)[0].samples
    trees = whole(samples)
    for budget in (500, 800, 2000):
        step = pack(trees, budget)
        assert sorted(t.samples for b in step for t in b) == sorted(t.samples for t in trees)
        assert all(len(b) == 1 or sum(t.tokens for t in b) <= budget for b in step)
