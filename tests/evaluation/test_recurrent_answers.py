"""Qwen3.5 answers from what its linear attention remembers of each question's own path, as plain generation does."""

import json

import numpy as np
import pytest
import test_eval
import tiny
import torch
from transformers import DynamicCache

from data import build_batch
from evaluation.answers import generate
from evaluation.runner import plan_evaluation
from inputs.positions import token_paths
from modeling.delta import keep_leaves, latest, linear_layers
from trees import Assignment


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny.write_world(tmp_path_factory.mktemp("recurrent"), family="qwen3_5")


@pytest.fixture(scope="module")
def model(world):
    return tiny.lora_model(world).eval()


def prompts(world, pad_to: int = 1):
    """All questions in a few batches of several trees."""
    data, dataset = tiny.load_world(world)
    for trees in plan_evaluation(data.samples, 700):
        yield build_batch(data, Assignment(trees), dataset.settings, pad_to, prompts_only=True)


@torch.no_grad()
def filled(model, batch) -> DynamicCache:
    cache = DynamicCache(config=model.base.config.text_config)
    model.answer_states(batch, past=cache)
    return cache


def memories(cache, model) -> list[torch.Tensor]:
    """Of each linear layer: the convolution's last inputs and the state, both of all questions."""
    layers = [cache.layers[layer.layer_idx] for layer in linear_layers(model.base.model.language_model)]
    return [states[0] for layer in layers for states in (layer.conv_states, layer.recurrent_states)]


def test_what_is_kept_of_a_question_is_what_its_own_sequence_leaves(world, model, tmp_path):
    """For trunks with branches, trees of one branch, text alone and several images, with padding and without."""
    reference = tiny.Reference(world, model, tmp_path)
    rows = [json.loads(line) for line in (world / "rows.jsonl").read_text().splitlines()]
    alone = {}
    for pad_to in (1, 128):
        covered = 0
        for batch in prompts(world, pad_to):
            kept = memories(filled(model, batch), model)
            assert len(kept) == 4 and all(len(part) == len(batch.samples) for part in kept)
            for place, sample in enumerate(batch.samples):
                if sample not in alone:
                    inputs = reference.inputs(rows[sample], answered=False)
                    with torch.no_grad():
                        alone[sample] = memories(reference.model(**inputs, use_cache=True).past_key_values, model)
                for part, expected in zip(kept, alone[sample]):
                    torch.testing.assert_close(part[place], expected[0], rtol=1e-4, atol=1e-5)
            covered += len(batch.samples)
        assert covered == len(rows)


def test_leaves_are_counted_in_the_order_of_questions_and_remember_their_own_path_only():
    """A trunk of three tokens with branches of one and two, a tree without a trunk, and padding."""
    tree, branch = np.array([0] * 6 + [1, 1, -1, -1]), np.array([0, 0, 0, 1, 2, 2, 5, 5, 0, 0])
    paths = token_paths(tree, branch)
    assert paths["leaf_ends"].tolist() == [3, 5, 7]
    assert paths["leaves"].tolist() == [2, 3, 1]  # roots are the trunk and the tree without one
    x, before = torch.arange(1.0, 11)[:, None], torch.from_numpy(paths["before"])
    kept = latest(x, before, torch.from_numpy(paths["leaf_ends"]))
    assert kept[:, 0].tolist() == [[1, 2, 3, 4], [2, 3, 5, 6], [0, 0, 7, 8]]


def test_padding_changes_no_answer(world, model):
    for plain, padded in zip(prompts(world), prompts(world, 128)):
        (expected, shares), (found, values) = (zip(*generate(model, batch, 4, {1})) for batch in (plain, padded))
        assert found == expected and values == pytest.approx(shares, rel=1e-4)


def test_questions_that_are_answered_leave_the_others_their_own_memory(world, model):
    batch = next(prompts(world))
    cache = filled(model, batch)
    before = [part.clone() for part in memories(cache, model)]
    places = torch.tensor([3, 1])
    keep_leaves(cache, places)
    for part, earlier in zip(memories(cache, model), before):
        assert torch.equal(part, earlier[places])


def test_options_are_as_likely_as_each_in_a_row_of_its_own(world, tmp_path):
    test_eval.test_options_are_scored_as_if_each_were_the_answer_of_its_own_row(world, tmp_path)


def test_the_loss_of_given_answers_is_the_reference_s(world, tmp_path):
    test_eval.test_loss_equals_the_reference_and_does_not_depend_on_packing(world, tmp_path)


def test_a_model_that_ends_with_a_linear_layer_answers_as_plain_generation_does(tmp_path, monkeypatch):
    """Released models end with full attention, as the other tests do."""
    monkeypatch.setitem(tiny.HYBRID, "layer_types", ["linear_attention", "full_attention", "linear_attention"])
    world = tiny.write_world(tmp_path / "world", family="qwen3_5")
    test_eval.test_answers_equal_plain_generation_one_by_one(world, tmp_path, None)
