"""Attention: the mask of trees, by FlexAttention on CUDA and dense SDPA elsewhere, and the vision tower's kernels.

The model reaches them through transformers' `AttentionInterface`; its own code stays as it is.
"""

from functools import cache, partial

import torch
import torch._dynamo.config
import torch.nn.functional as F
from torch import library
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from data import FLEX_BLOCK, Batch

# Batches are padded to whole blocks, so the kernel may skip its bounds checks. A dynamic-shape compile cannot infer
# that by itself.
OPTIONS = {"IS_DIVISIBLE": True}
# By head size, the fastest of the settings that were timed on Hopper GPUs (docs/benchmarks.md).
HOPPER_OPTIONS = {
    128: OPTIONS | {"fwd_BLOCK_M": 128, "fwd_BLOCK_N": 128, "fwd_num_stages": 3, "fwd_num_warps": 8},
    256: OPTIONS
    | {"fwd_BLOCK_M": 128, "fwd_BLOCK_N": 64, "fwd_num_stages": 2, "fwd_num_warps": 8}
    | {"bwd_BLOCK_M1": 64, "bwd_BLOCK_N1": 64, "bwd_BLOCK_M2": 64, "bwd_BLOCK_N2": 64}
    | {"bwd_num_stages": 2, "bwd_num_warps": 8},
}
PAIRS_AT_ONCE = 2**25  # of a query and a key, in one pass of `block_mask`, which holds a few bytes for each


def tree_mask(batch: Batch, dense: bool = False) -> torch.Tensor | BlockMask:
    """The visibility of a batch's tokens: a FlexAttention block mask on CUDA, unless `dense`; a boolean (1, 1, T, T)
    elsewhere."""
    if batch.ids.device.type == "cuda" and not dense:
        assert len(batch.ids) % FLEX_BLOCK == 0, len(batch.ids)
        return block_mask(batch.tree, batch.branch)
    keys = batch.tree, batch.branch, torch.arange(len(batch.ids), device=batch.ids.device)
    return visible(*(key[:, None] for key in keys), *keys)[None, None]


def visible(tree_q, branch_q, order_q, tree_k, branch_k, order_k) -> torch.Tensor:
    """Whether a query sees a key: in the same tree, not later, and in the prefix (branch 0) or the same branch."""
    return (tree_q == tree_k) & (order_k <= order_q) & ((branch_k == 0) | (branch_k == branch_q))


def block_mask(tree: torch.Tensor, branch: torch.Tensor) -> BlockMask:
    """The block mask of tokens with these tree and branch numbers (T,), T a multiple of FLEX_BLOCK.

    It equals that of torch's `create_block_mask`, which holds the whole T x T mask, or, compiled, costs each first
    start 10 s.
    """

    def mask(_batch, _head, q, k):
        return visible(tree[q], branch[q], q, tree[k], branch[k], k)

    length = len(tree)
    keys = tree, branch, torch.arange(length, device=tree.device)
    queries_at_once = FLEX_BLOCK * max(1, PAIRS_AT_ONCE // (FLEX_BLOCK * length))
    parts = []
    for queries in zip(*(key[:, None].split(queries_at_once) for key in keys)):
        blocks = visible(*queries, *keys).unflatten(1, (-1, FLEX_BLOCK)).unflatten(0, (-1, FLEX_BLOCK))
        parts.append(torch.stack([blocks.any((1, 3)), blocks.all((1, 3))]))  # not sums: they would make int64 of all
    some, every = torch.cat(parts, dim=1)[:, None, None]  # (1, 1, T / FLEX_BLOCK, T / FLEX_BLOCK) each
    partial_blocks, full_blocks = _counts_and_indices(some & ~every), _counts_and_indices(every)
    lengths = {"BLOCK_SIZE": FLEX_BLOCK, "seq_lengths": (length, length)}
    return BlockMask.from_kv_blocks(*partial_blocks, *full_blocks, mask_mod=mask, **lengths)


def _counts_and_indices(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of `blocks` (1, 1, n, n) bool, for each block of queries: how many blocks of keys it has (1, 1, n), and their
    indices, followed by those of the others (1, 1, n, n)."""
    return blocks.sum(-1).int(), blocks.int().argsort(dim=-1, descending=True, stable=True).int()


@cache
def _compiled_flex_attention():
    torch._dynamo.config.specialize_float = True  # `scale` is a constant: see compile_layers in modeling/memory.py
    return torch.compile(flex_attention, dynamic=True)


def tree_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, kernel_options=OPTIONS, **_):
    """transformers' attention interface: (1, heads, Q, d) and (1, kv_heads, K, d) to ((1, Q, heads, d), None)."""
    if isinstance(attention_mask, BlockMask):
        attend = flex_attention if torch.compiler.is_compiling() else _compiled_flex_attention()
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            # One key head per query head gives the backward kernel more parallel work: 1.63 ms against 2.06, H100.
            key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
        out = attend(query, key, value, block_mask=attention_mask, scale=scaling, kernel_options=kernel_options)
        return out.transpose(1, 2).contiguous(), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, is_causal=False)


def vision_flash_attention(module, query, key, value, attention_mask, scaling, cu_seq_lens_q, max_length_q, **_):
    """All images of a micro-batch in one call, each seeing itself: (1, heads, patches, d) to (1, patches, heads, d)."""
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # (patches, heads, d)
    out = varlen_attn(q, k, v, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, scale=scaling)
    return out[None], None


def vision_cudnn_attention(module, query, key, value, attention_mask, scaling, image_starts, **_):
    """The same by cuDNN, image by image: 1.55 ms for 10,800 patches on an H100, where flash attention takes 2.46. cuDNN
    plans each new image size once, which takes about 0.04 s."""
    return attend_within_images(query, key, value, image_starts, scaling), None


@library.custom_op("onelook::attend_within_images", mutates_args=())
def attend_within_images(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, image_starts: torch.Tensor, scaling: float
) -> torch.Tensor:
    """(1, heads, patches, d) to (1, patches, heads, d). `image_starts` (images + 1,) is on the CPU: reading it from the
    GPU would wait for all work before it."""
    images = zip(*(tensor.split(image_starts.diff().tolist(), dim=2) for tensor in (query, key, value)))
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH], set_priority=True):
        outs = [F.scaled_dot_product_attention(q, k, v, scale=scaling).transpose(1, 2) for q, k, v in images]
    return torch.cat(outs, dim=1)


@attend_within_images.register_fake
def _(query, key, value, image_starts, scaling):
    return query.new_empty(query.transpose(1, 2).shape)


AttentionInterface.register("onelook_tree", tree_attention)
for head_size, options in HOPPER_OPTIONS.items():
    AttentionInterface.register(f"onelook_tree_hopper_{head_size}", partial(tree_attention, kernel_options=options))
# transformers makes one call for all images where the name has "flash" in it, else one per image.
AttentionInterface.register("onelook_flash_vision", vision_flash_attention)
AttentionInterface.register("onelook_cudnn_flash_vision", vision_cudnn_attention)
