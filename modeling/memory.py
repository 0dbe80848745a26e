"""Memory: which share of its activations a GPU can keep, and layers that are compiled to keep that share."""

import torch
import torch._dynamo.config
import torch._functorch.config
from peft import PeftModel

# Activation memory budget -> share of `kept_bytes` that is kept, with the logits of 32 answer tokens for each of nine
# questions: Qwen3-VL-8B with dropout (bench/results/step-closed-h200.json, step-h200-budget-*.json; 0 is an H100's,
# step-h100-budget-0.json). At budget 1 the 2B, 4B and 32B and Qwen3.5-9B keep 1.01 to 1.10.
MEMORY_BUDGETS = {1.0: 1.02, 0.5: 0.57, 0.2: 0.31, 0.0: 0.18}
EAGER_SHARE = 2.7  # the same where layers are not compiled: 82.2 GiB at 7,308 tokens on an H200
MEMORY_MARGIN = 2 * 2**30, 0.05  # bytes for vision tower, logits and optimizer; share of the card for fragmentation
# One compiled function has a variant for each of training and evaluation, text and vision, last and other layers.
RECOMPILE_LIMIT = 32


def kept_bytes(config, tokens: int) -> int:
    """Bytes of activations that the decoder layers keep for `tokens` tokens, 2 per number: the inputs of both norms,
    gate and up projections, and what each kind of attention keeps."""
    text = config.text_config
    both = 2 * text.hidden_size + 2 * text.intermediate_size
    linear = count_linear_layers(text)
    width = text.num_hidden_layers * both + (text.num_hidden_layers - linear) * _attention_width(text)
    return 2 * tokens * (width + linear * (_recurrence_width(text) if linear else 0))


def _attention_width(text) -> int:
    """Numbers per token: queries before and after rotation, attention's output, and keys and values twice."""
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return (3 * text.num_attention_heads + 4 * text.num_key_value_heads) * size


def _recurrence_width(text) -> int:
    """Numbers per token of Qwen3.5's linear attention: queries, keys and values before and after the convolution, the
    gate, and what the recurrence gives."""
    values = text.linear_num_value_heads * text.linear_value_head_dim
    return 2 * (2 * text.linear_num_key_heads * text.linear_key_head_dim + values) + 2 * values


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
