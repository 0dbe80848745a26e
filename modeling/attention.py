"""Attention on trees: who sees whom, FlexAttention on CUDA, dense SDPA elsewhere, and the vision tower's attention.

Reached through transformers' `AttentionInterface`; the model's own code stays as it is.
"""

from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import library
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from data import FLEX_BLOCK, Batch

# Batches are padded to whole blocks, which a compiler that is told of no length can't know: no checks for the end.
OPTIONS = {"IS_DIVISIBLE": True}
HOPPER_OPTIONS = OPTIONS | {"fwd_BLOCK_M": 128, "fwd_BLOCK_N": 128, "fwd_num_stages": 3, "fwd_num_warps": 8}


def tree_mask(batch: Batch) -> torch.Tensor | BlockMask:
    """Who sees whom in a batch: a FlexAttention block mask on CUDA, a boolean (1, 1, T, T) elsewhere."""
    if batch.ids.device.type == "cuda":
        assert len(batch.ids) % FLEX_BLOCK == 0, len(batch.ids)
        return _block_mask(batch.tree, batch.branch)
    keys = batch.tree, batch.branch, torch.arange(len(batch.ids), device=batch.ids.device)
    return visible(*(key[:, None] for key in keys), *keys)[None, None]


def visible(tree_q, branch_q, order_q, tree_k, branch_k, order_k) -> torch.Tensor:
    """Whether q sees k: the same tree, not later, and in the prefix (branch 0) or in the same branch."""
    return (tree_q == tree_k) & (order_k <= order_q) & ((branch_k == 0) | (branch_k == branch_q))


def _block_mask(tree: torch.Tensor, branch: torch.Tensor) -> BlockMask:
    def mask(_batch, _head, q, k):
        return visible(tree[q], branch[q], q, tree[k], branch[k], k)

    return _compiled(create_block_mask)(mask, None, None, len(tree), len(tree), device=tree.device)


@cache
def _compiled(function):
    return torch.compile(function, dynamic=True)


def tree_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, kernel_options=OPTIONS, **_):
    """transformers' attention interface: (1, heads, Q, d) and (1, kv_heads, K, d) to ((1, Q, heads, d), None)."""
    if isinstance(attention_mask, BlockMask):
        attend = flex_attention if torch.compiler.is_compiling() else _compiled(flex_attention)
        groups = query.shape[1] // key.shape[1]
        if groups > 1:  # a key a query head: the backward pass then has enough to do at once, 1.63 ms against 2.06
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
    """The same by cuDNN, image by image: on Hopper 1.55 ms for 10,800 patches where flash needs 2.46. It plans each new
    size once, in some 0.04 s."""
    return attend_within_images(query, key, value, image_starts, scaling), None


@library.custom_op("onelook::attend_within_images", mutates_args=())
def attend_within_images(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, image_starts: torch.Tensor, scaling: float
) -> torch.Tensor:
    """(1, heads, patches, d) to (1, patches, heads, d); `image_starts` (images + 1,) lies on the CPU."""
    images = zip(*(tensor.split(image_starts.diff().tolist(), dim=2) for tensor in (query, key, value)))
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH], set_priority=True):
        outs = [F.scaled_dot_product_attention(q, k, v, scale=scaling).transpose(1, 2) for q, k, v in images]
    return torch.cat(outs, dim=1)


@attend_within_images.register_fake
def _(query, key, value, image_starts, scaling):
    return query.new_empty(query.transpose(1, 2).shape)


AttentionInterface.register("onelook_tree", tree_attention)
AttentionInterface.register("onelook_tree_hopper", partial(tree_attention, kernel_options=HOPPER_OPTIONS))
# by "flash" in the name transformers knows that one call is wanted for all images
AttentionInterface.register("onelook_flash_vision", vision_flash_attention)
AttentionInterface.register("onelook_cudnn_flash_vision", vision_cudnn_attention)
