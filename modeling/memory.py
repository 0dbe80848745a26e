"""Memory: which share of its activations a GPU can keep, and layers that are compiled to keep that share."""

import torch
import torch._dynamo.config
import torch._functorch.config
from peft import PeftModel

# Activation memory budget -> share of `kept_bytes` that is kept. Measured on Qwen3-VL-8B with dropout, for 4,459 to
# 8,192 tokens; without dropout it is less. Those of 0.5 and 0.2 were measured before masks were computed again, and are
# lowered here as two layers' are on a CPU.
MEMORY_BUDGETS = {1.0: 0.71, 0.5: 0.38, 0.2: 0.19, 0.0: 0.13}
HYBRID_SHARE = 1.1  # of these shares for Qwen3.5: bench/results/step-qwen3.5-h200.json
EAGER_SHARE = 1.9  # the same where layers are not compiled: 82.2 GiB at 7,308 tokens on an H200
MEMORY_MARGIN = 2 * 2**30, 0.05  # bytes for vision tower, logits and optimizer; share of the card for fragmentation
# One compiled function has a variant for each of training and evaluation, text and vision, last and other layers.
RECOMPILE_LIMIT = 32


def kept_bytes(config, tokens: int) -> int:
    """Bytes of activations that the decoder layers keep for `tokens` tokens at most: per token and layer, 8 vectors of
    the hidden size and 3 of the intermediate size, in bfloat16; for Qwen3.5 what `_hybrid_width` counts."""
    text = config.text_config
    if config.model_type == "qwen3_5":
        return int(HYBRID_SHARE * 2 * tokens * sum(_hybrid_width(text, kind) for kind in text.layer_types))
    return 2 * text.num_hidden_layers * tokens * (8 * text.hidden_size + 3 * text.intermediate_size)


def _hybrid_width(text, kind: str) -> int:
    """Numbers of 16 bits that a layer of Qwen3.5 keeps per token at most, counted from the code."""
    shared = 4 * text.hidden_size + 3 * text.intermediate_size  # inputs of norms and what they give; the MLP
    if kind == "full_attention":  # queries, their gate, one key and value per query, the output before and after it
        return shared + 6 * text.num_attention_heads * text.head_dim
    heads = text.linear_num_value_heads
    values = heads * text.linear_value_head_dim
    mixed = 2 * text.linear_num_key_heads * text.linear_key_head_dim + values
    # What the convolution gives, in float32 before its activation; the recurrence's output, its gate and their product;
    # a row of a chunk's inverse matrix (64 numbers), its decay and beta per head.
    return shared + 3 * mixed + 3 * values + (64 + 4) * heads


def count_linear_layers(text) -> int:
    """Layers of linear attention in a language model, from its configuration."""
    return (getattr(text, "layer_types", None) or []).count("linear_attention")


def state_bytes(config, branches: int) -> int:
    """Bytes of the states in which branches begin, at most: for each layer of linear attention, a matrix per head in
    float32. 0 for a model without."""
    text = config.text_config
    if not (layers := count_linear_layers(text)):
        return 0
    state = text.linear_num_value_heads * text.linear_key_head_dim * text.linear_value_head_dim
    return 4 * branches * layers * state


def memory_margin(total: float) -> float:
    """Bytes that an estimate leaves free on a card of `total` bytes."""
    fixed, share = MEMORY_MARGIN
    return fixed + share * total


def activation_room(device: torch.device) -> float:
    """Bytes that a micro-batch's activations may take beside what is allocated now."""
    total = torch.cuda.get_device_properties(device).total_memory * torch.cuda.get_per_process_memory_fraction(device)
    free = min(total - torch.cuda.memory_allocated(device), torch.cuda.mem_get_info(device)[0])
    return free - memory_margin(total)


def choose_memory_budget(config, tokens: int, room: float) -> float:
    """The highest memory budget at which a micro-batch of `tokens` tokens should fit into `room` bytes.

    It is an estimate: the rehearsal runs such a micro-batch and goes on to lower budgets where it does not fit.
    """
    kept = kept_bytes(config, tokens)
    fitting = [budget for budget, share in MEMORY_BUDGETS.items() if share * kept < room]
    return fitting[0] if fitting else min(MEMORY_BUDGETS)


def start_compile_workers(device: torch.device) -> None:
    """Start the processes that compile kernels for a GPU, to be ready when the first is needed. Until they are, torch
    compiles one kernel after the other in this process."""
    if device.type == "cuda":
        from torch._inductor.async_compile import maybe_warm_pool  # takes a second, which other devices need not spend

        maybe_warm_pool()


def compile_layers(model: PeftModel, memory_budget: float, backend: str = "inductor") -> None:
    """Compile each decoder layer and vision block in place, for any length. Names of weights stay as they are.

    `memory_budget` is the share of activations kept for the backward pass, which computes the rest again: 1 is fastest.
    """
    torch._dynamo.reset()  # drops what was compiled for a budget that did not fit
    torch._functorch.config.activation_memory_budget = memory_budget
    # By default the partitioner keeps LoRA's inputs after dropout, and masks: cheap to redo, and over a third of all.
    torch._functorch.config.ban_recompute_long_fusible_chains = False
    torch._functorch.config.ban_recompute_materialized_backward = False
    torch._functorch.config.ban_recompute_used_far_apart = False
    torch._functorch.config.is_non_builtin_to_include = True  # `lora_linear` costs as much as the product inside it
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    # By default a norm's eps may change too, as `dynamic` says. Tracing finds that it may not and begins again, and the
    # next start does not find the code in torch's caches.
    torch._dynamo.config.specialize_float = True
    torch._dynamo.config.optimize_ddp = False  # it splits graphs at DDP's buckets, which fails in FlexAttention
    base = model.get_base_model().model
    blocks = base.visual.blocks if "flash" in base.visual.config._attn_implementation else []
    for layer in [*base.language_model.layers, *blocks]:
        layer.compile(dynamic=True, backend=backend)
