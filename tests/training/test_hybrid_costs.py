"""--plan counts the operations and the memory of Qwen3.5, and says what of it was measured."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from runs import arguments
from test_bench import bench
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.models.qwen3_5 import Qwen3_5Config

import train
from modeling.delta import reference_rule
from modeling.memory import MEMORY_BUDGETS, kept_bytes, state_bytes
from training import costs
from training.gpus import GPUS
from trees import grow_tree, tree_shape

QWEN3_5_9B = Qwen3_5Config(vision_config={"out_hidden_size": 4096})  # transformers' defaults are the 9B's


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny.write_world(tmp_path_factory.mktemp("hybrid_costs"), family="qwen3_5")


def weights(module: nn.Module) -> int:
    return sum(linear.weight.numel() for linear in module.modules() if isinstance(linear, nn.Linear))


def test_every_projection_is_counted(world):
    """Of a tree of one image with 17 questions, by the layers of the installed model."""
    base = tiny.family_model("qwen3_5", tiny.AutoTokenizer.from_pretrained(world / "model"))
    (data, _), config = tiny.load_world(world), AutoConfig.from_pretrained(world / "model")
    tree = grow_tree(data.samples, range(17))
    flops, images = costs.tree_load(config, data.samples, tree)
    chosen = [data.samples[i] for i in tree.samples]
    shape = tree_shape(chosen, tree.prefix_ids)
    tokens, answers = shape.prefix + sum(shape.branches), sum(sample.trained.sum() for sample in chosen)
    layers, visual = base.model.language_model.layers, base.model.visual
    *_, last = layers
    language = 4 * tokens * (sum(map(weights, layers)) - weights(last.mlp))
    assert flops.language == language + 4 * answers * (weights(last.mlp) + weights(base.lm_head))
    per_patch = weights(visual.blocks) + visual.patch_embed.proj.weight.numel() + weights(visual.merger) / 4
    assert flops.tower == 2 * per_patch * chosen[0].patches[0] and images == 1


def test_the_recurrence_is_counted_in_chunks_of_64_tokens(monkeypatch):
    """By the products of the reference code, where a solved triangular system stands for that of its inverse."""
    monkeypatch.setattr(torch.linalg, "solve_triangular", lambda system, wanted, **_: system @ wanted)
    text = QWEN3_5_9B.text_config
    heads, k, v = text.linear_num_value_heads, text.linear_key_head_dim, text.linear_value_head_dim
    inverse = 2 / 3 * 64**3 * heads  # of the triangular matrix, which torch does not count
    for length in (1, 64, 65, 195):
        query, key, value = (torch.zeros(1, length, heads, d) for d in (k, k, v))
        gates = torch.zeros(1, length, heads)
        with FlopCounterMode(display=False) as counter:
            reference_rule()(query, key, value, gates, gates, output_final_state=True)
        layers, _, counted = costs.linear_attention(text, [length])
        assert layers == 24 and counted == pytest.approx(counter.get_total_flops() + inverse * -(-length // 64))
    assert costs.linear_attention(text, [195, 64])[-1] == counted * 5 / 4


def test_attention_is_counted_in_a_quarter_of_the_layers():
    """A token alone sees itself, in each of 8 layers with 16 heads of 256."""
    recurrence = 24 * costs.linear_attention(QWEN3_5_9B.text_config, [1])[-1]
    flops = costs.step_flops(QWEN3_5_9B, [], 1, [], 0)
    assert flops.attention == pytest.approx(3.5 * (8 * 4 * 16 * 256 + recurrence))
    assert costs.linear_attention(AutoConfig.for_model("qwen3_vl").text_config, [9]) == (0, 0, 0.0)


def test_the_memory_of_the_9b_is_counted_by_layer():
    """Numbers of 16 bits: the hidden size is 4,096 and the MLP's 12,288. Linear layers have queries and keys of 2,048
    and values of 4,096, the others 16 heads of queries and 4 of keys and values."""
    both, linear, full = 2 * (4096 + 12288), 2 * (2048 + 2048 + 4096) + 2 * 4096, (3 * 16 + 4 * 4) * 256
    assert kept_bytes(QWEN3_5_9B, 10) == 2 * 10 * (32 * both + 24 * linear + 8 * full)


def test_states_in_which_branches_begin_are_counted():
    """One matrix of 128 x 128 in float32 for each of 32 heads and 24 layers: 48 MiB per branch of the 9B."""
    assert state_bytes(QWEN3_5_9B, 96) == 96 * 48 * 2**20
    assert state_bytes(AutoConfig.for_model("qwen3_vl"), 96) == 0


@pytest.mark.parametrize("questions", [9, 17, 28])
def test_the_time_and_memory_of_a_tree_are_the_measured_ones(questions):
    preset = bench.PRESETS["qwen3.5-9b"]
    config, results = bench.config_of(preset), Path(bench.__file__).parent / "results"
    rows = json.loads((results / "step-qwen3.5-h200.json").read_text())["rows"]
    row = next(row for row in rows if row["case"] == f"tree-{questions}")
    patches = preset.size[0] * preset.size[1] // 16**2
    prefix, branches = patches // 4 + 4, [preset.question_tokens] * questions
    flops = costs.step_flops(config, [patches], prefix, branches, questions * preset.answer_tokens)
    seconds = costs.batch_seconds([(flops, 1)], GPUS["h200"], family="qwen3_5")
    assert 1000 * seconds == pytest.approx(row["ms"], rel=0.01)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config).bfloat16()
    weights = sum(weight.nbytes for weight in model.parameters())
    kept = MEMORY_BUDGETS[1.0] * kept_bytes(config, prefix + sum(branches))
    assert (weights + kept + state_bytes(config, questions)) / 2**30 == pytest.approx(row["peak_gib"], rel=0.03)


def test_the_plan_of_qwen3_5_says_what_was_measured(world, tmp_path, capsys):
    assert train.main([*arguments(world, ""), "--plan"]) == 0
    told = capsys.readouterr().out
    assert "Qwen3.5: fitted to steps of the 9B, H200" in told
    assert "GPU hours" in told and max(map(len, told.splitlines())) <= 100
