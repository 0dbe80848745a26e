"""What a step costs: the floating-point operations of trees, the seconds these take at a GPU's rates, and those of the
all-reduce."""

import argparse
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from transformers import PretrainedConfig

import trees
from modeling.delta import CHUNK, chunk_flops
from modeling.memory import count_linear_layers
from modeling.targets import names_vision
from training.gpus import GPUS, Gpu
from trees import Tree

# Shares of Gpu.tflops that each kind of operation reaches. The three trees of bench/results/step-h100.json are too
# alike to fit all of them, so those of attention come from a profile of the tree of 9: FlexAttention took 66 ms for
# 17.7 TFLOP, the vision tower's attention 42.8 ms for 14.5. The share of the matrix products, which includes the small
# kernels between them, and IMAGE_S are then fitted to the three trees' times.
MATMUL_SHARE, ATTENTION_SHARE, TOWER_ATTENTION_SHARE = 0.662, 0.333, 0.421
# Time of a language model against these shares, by family; operations of others are not counted. Qwen3.5's is fitted to
# trees of 9, 17 and 28 on an H200 with flash-qla (bench/results/step-qwen3.5-h200.json).
FAMILY_TIME = {"qwen3_vl": 1.0, "qwen3_5": 1.16}
MICRO_BATCH_S = 0.012  # gaps between kernels, forward and backward, in that profile; a faster GPU has them too
IMAGE_S = 0.024  # small kernels of the vision tower, per image
SLOWER = {1.0: 1.0, 0.5: 1.09, 0.2: 1.17, 0.0: 1.27}  # memory budget -> step time against budget 1: a tree of 9, H100
GPUS_PER_NODE = 8
NETWORK = 100e9 / 8  # bytes per second between two nodes, in each direction: 100 Gbit/s
# --base-precision -> time of the language model's matrix products against bf16: trees of 9 and 17 on H200s
# (bench/results/step-precision-h200.json)
PRECISION_TIME = {"bf16": 1.0, "fp8-backward": 0.84, "fp8": 0.64, "fp8-weights": 1.2}
EAGER_TIME = 2.05  # step time against budget 1 where layers are not compiled: bench/results/small-job-h200.json
# Of a step, saved where the last layer leaves out tokens before its MLP: 1.2% by `step_flops`; trees of 9 and 17 took
# 1.9 and 0.2% longer without (bench/results/step-closed-h200.json, step-shared-last-layer-h200.json).
LAST_LAYER_SHARE = 0.0145


def slowdown(budget: float) -> float:
    """Step time at a memory budget against budget 1, interpolated between those of SLOWER."""
    return float(np.interp(budget, *zip(*sorted(SLOWER.items()))))


def known_gpu(device: torch.device) -> Gpu | None:
    """This device's entry in GPUS, or None if it has none."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return next((gpu for gpu in GPUS.values() if name in gpu.devices), None)


class Flops(NamedTuple):
    """Floating-point operations without recomputation: forward and backward of the language model, forward of the
    frozen vision tower."""

    language: float  # matrix products
    attention: float  # and the recurrence of linear attention
    tower: float
    tower_attention: float


def step_flops(config: PretrainedConfig, patches: list[int], prefix: int, branches: list[int], answers: int) -> Flops:
    """Operations of one tree, from the patches of its images, the tokens of its prefix and branches, and its number of
    answer tokens.

    A frozen matrix of m weights costs 2 m per token forward and 2 m backward, as it has no weight gradient. Attention
    costs 4 per visible pair of tokens and column of its queries forward, and 2.5 times that backward. So does the
    recurrence of linear attention: its backward pass does each product twice, and the states once more. LoRA, norms,
    softmax and convolutions are left out (under 1%).
    """
    text, vision = config.text_config, config.vision_config
    h, i, layers = text.hidden_size, text.intermediate_size, text.num_hidden_layers
    q, kv = (heads * text.head_dim for heads in (text.num_attention_heads, text.num_key_value_heads))
    tokens = prefix + sum(branches)
    pairs = prefix * (prefix + 1) / 2 + sum(b * prefix + b * (b + 1) / 2 for b in branches)
    linear, weights, recurrence = linear_attention(text, [prefix, *branches])
    full = layers - linear
    gate = q * (linear > 0)  # Qwen3.5's attention has an output gate
    language = 4 * full * h * (2 * q + 2 * kv + gate) * tokens + 4 * h * text.vocab_size * answers
    language += 4 * linear * weights * tokens
    language += 4 * 3 * h * i * ((layers - 1) * tokens + answers)  # the last MLP is needed for answer tokens only
    v, merged = vision.hidden_size, vision.spatial_merge_size**2 * vision.hidden_size
    tower = 2 * vision.depth * (4 * v * v + 2 * v * vision.intermediate_size)
    tower += 2 * vision.in_channels * vision.temporal_patch_size * vision.patch_size**2 * v
    mergers = 1 + len(getattr(vision, "deepstack_visual_indexes", []))
    tower += 2 * mergers * (merged * merged + merged * vision.out_hidden_size) / vision.spatial_merge_size**2
    tower_attention = 4 * v * vision.depth * sum(count**2 for count in patches)
    return Flops(language, 3.5 * (4 * q * full * pairs + linear * recurrence), tower * sum(patches), tower_attention)


def linear_attention(text: PretrainedConfig, lengths: list[int]) -> tuple[int, int, float]:
    """The layers of Gated DeltaNet in a language model, the weights of one's projections, and the forward operations of
    one's recurrence over sequences of these lengths. All are 0 for a model without.
    """
    if not (layers := count_linear_layers(text)):
        return 0, 0, 0.0
    k, v, heads = text.linear_key_head_dim, text.linear_value_head_dim, text.linear_num_value_heads
    # in_proj_qkv, in_proj_z, out_proj, in_proj_a and in_proj_b
    weights = text.hidden_size * (2 * text.linear_num_key_heads * k + 3 * heads * v + 2 * heads)
    return layers, weights, heads * chunk_flops(k, v) * sum(-(-length // CHUNK) for length in lengths)


def batch_seconds(
    loads: list[tuple[Flops, int]], gpu: Gpu, trained: bool = True, precision: str = "bf16", family: str = "qwen3_vl"
) -> float:
    """Seconds of a micro-batch, from each tree's operations and number of images. Not `trained`: forward only."""
    language, attention, tower, tower_attention = (sum(kind) for kind in zip(*(flops for flops, _ in loads)))
    part, attention_part, gap_part = (1, 1, 1) if trained else (1 / 2, 1 / 3.5, 1 / 3)
    text = part * PRECISION_TIME[precision] * language / MATMUL_SHARE + attention_part * attention / ATTENTION_SHARE
    at_full_rate = FAMILY_TIME[family] * text + tower / MATMUL_SHARE + tower_attention / TOWER_ATTENTION_SHARE
    fixed = gap_part * MICRO_BATCH_S + IMAGE_S * sum(images for _, images in loads)
    return at_full_rate / (gpu.tflops * 1e12) + fixed


def all_reduce_seconds(size: int, gpus: int, gpu: Gpu, network: float = NETWORK) -> float:
    """Seconds of an all-reduce of `size` bytes: one ring through all GPUs, at the rate of its slowest link.

    Each link carries 2 (n - 1) / n times the bytes (Patarasuk and Yuan 2009). Latency is left out, and so is what DDP
    hides behind the backward pass.
    """
    slowest = gpu.link if gpus <= GPUS_PER_NODE else min(gpu.link, network)
    return 2 * (gpus - 1) / gpus * size / slowest


def tree_load(config: PretrainedConfig, samples: list, tree: Tree) -> tuple[Flops, int]:
    """A tree's operations and its number of images."""
    chosen = [samples[i] for i in tree.samples]
    shape = trees.tree_shape(chosen, tree.prefix_ids)
    patches = [chosen[sample].patches[image] for sample, image in shape.encoded]
    answers = sum(int(sample.trained.sum()) for sample in chosen)
    return step_flops(config, patches, shape.prefix, shape.branches.tolist(), answers), len(patches)


def tree_counter(config: PretrainedConfig, samples: list, known: bool, tower: bool = True) -> Callable[[Tree], float]:
    """A function that gives the operations of a tree of these samples, with or without the `tower`'s. It gives 0 where
    the model's operations are not all `known`."""

    def count(tree: Tree) -> float:
        flops = tree_load(config, samples, tree)[0]
        return sum(flops) if tower else flops.language + flops.attention

    return count if known else lambda _: 0.0


def uncounted(config: PretrainedConfig, args: argparse.Namespace) -> str:
    """What of a run these costs do not cover; empty where they cover all of it."""
    if config.model_type not in FAMILY_TIME:
        return config.model_type
    return "DoRA" if args.dora else "a trained vision tower" if names_vision(args.lora_targets) else ""
