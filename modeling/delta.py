"""Gated DeltaNet, the linear attention of Qwen3.5, on a packed batch of trees (Yang et al., arXiv 2412.06464).

A layer has two memories of what came before: the last inputs of its convolution, and a matrix per head, its state. Both
follow from the trunk alone where a branch begins. So the trunks run first, and each branch begins with the state in
which its trunk ended. The gradients of all branches add up in that state and go back into the trunk.
"""

import inspect
import types
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Cache
from transformers.activations import ACT2FN
from transformers.cache_utils import LinearAttentionLayer

from common import InputError

LIBRARY = "flash-linear-attention"
OLDEST = 0, 6  # version whose kernels take several value heads per key head, and refuse a GPU where they are wrong


def linear_layers(language_model: nn.Module) -> list[nn.Module]:
    """The Gated DeltaNet layers of a language model; none in most families."""
    return [layer.linear_attn for layer in language_model.layers if hasattr(layer, "linear_attn")]


def use_tree_delta(language_model: nn.Module) -> None:
    """Have the Gated DeltaNet layers of a language model run batches of trees."""
    for layer in linear_layers(language_model):
        layer.forward = types.MethodType(_tree_forward, layer)


def _tree_forward(
    layer: nn.Module, hidden_states: torch.Tensor, paths: dict | None, cache_params: Cache | None = None, **_
) -> torch.Tensor:
    """(1, T, D) to (1, T, D). `paths`: see `inputs.positions.token_paths`. Padding comes out as zero.

    A cache keeps what every leaf goes on from. Without `paths`, the tokens are one for each of these: transformers' own
    code takes them as a batch of sequences of one token.
    """
    if paths is None:
        tokens = hidden_states.transpose(0, 1)  # (leaves, 1, D)
        return type(layer).forward(layer, tokens, cache_params=cache_params).transpose(0, 1)
    rows = hidden_states[0]
    inputs = layer.in_proj_qkv(rows)
    mixed = convolve(inputs, layer.conv1d.weight[:, 0], paths["before"], layer.activation)
    query, key, value = mixed.split([layer.key_dim, layer.key_dim, layer.value_dim], dim=-1)
    query, key = (x.unflatten(-1, (-1, layer.head_k_dim)) for x in (query, key))  # (T, key heads, d)
    value = value.unflatten(-1, (-1, layer.head_v_dim))  # (T, value heads, d)
    beta = layer.in_proj_b(rows).sigmoid()  # (T, value heads): how much of what a key holds is replaced
    decay = -layer.A_log.float().exp() * F.softplus(layer.in_proj_a(rows).float() + layer.dt_bias)  # its logarithm
    out, states = through_trees(query, key, value, decay, beta, **paths)
    if cache_params is not None:
        window = latest(inputs, paths["before"], paths["leaf_ends"])
        cache_params.update_conv_state(window, layer.layer_idx, conv_kernel_size=layer.conv_kernel_size)
        cache_params.update_recurrent_state(states.index_select(0, paths["leaves"]), layer.layer_idx)
    out = layer.norm(out.flatten(0, 1), layer.in_proj_z(rows).view(-1, layer.head_v_dim))
    return layer.out_proj(out.view(1, len(rows), -1))


def convolve(x: torch.Tensor, weight: torch.Tensor, before: torch.Tensor, activation: str) -> torch.Tensor:
    """Depthwise causal convolution of x (T, C) along each token's own path, by weight (C, 4), and the activation.

    before: (3, T) indices of the tokens 1, 2 and 3 places earlier; -1: none.
    """
    assert weight.shape[1] == len(before) + 1, weight.shape
    # In float32: the gradients of all branches add up in the last tokens of their trunk.
    wide, weight = x.float(), weight.float()
    out = wide * weight[:, -1]
    for lag, index in enumerate(before, 1):
        earlier = wide.index_select(0, index.clamp(min=0))
        out = out + torch.where(index[:, None] >= 0, earlier, 0) * weight[:, -1 - lag]
    return ACT2FN[activation](out).to(x.dtype)


def latest(x: torch.Tensor, before: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """The last inputs (n, C, 4) of a convolution up to the tokens `at` (n,), of x (T, C); zero where there are none."""
    path = torch.cat([before[:, at].flip(0), at[None]])  # (4, n)
    rows = torch.where(path[..., None] >= 0, x[path.clamp(min=0)], 0)  # (4, n, C)
    return rows.permute(1, 2, 0)


def keep_leaves(cache: Cache, places: torch.Tensor) -> None:
    """Keep what linear attention remembers of the leaves at these places (n,), and nothing of the others."""
    for layer in cache.layers:
        if isinstance(layer, LinearAttentionLayer):
            layer.reorder_cache(places)


@torch.compiler.disable  # kernels of their own, or a loop over sequences
def through_trees(query, key, value, decay, beta, order, root_starts, branch_starts, root_of, starts_on_cpu, **_):
    """The outputs (T, value heads, d) of the delta rule along each token's path, zero for padding, and the states in
    which the sequences end, roots first.

    Two calls: the sequences that begin with nothing, and those that begin where one of them ended.
    """
    roots_at, branches_at = starts_on_cpu
    sizes = [int(starts[-1]) for starts in starts_on_cpu]
    parts = [x.index_select(0, order).split(sizes) for x in (query, key, value, decay, beta)]
    roots, branches = zip(*parts)
    out, states = delta_rule(*roots, root_starts, roots_at, None)
    if len(root_of):
        more, ends = delta_rule(*branches, branch_starts, branches_at, states.index_select(0, root_of))
        out, states = torch.cat([out, more]), torch.cat([states, ends])
    return torch.zeros_like(value).index_copy(0, order, out), states


def delta_rule(query, key, value, decay, beta, starts, starts_on_cpu, states):
    """Outputs (T, value heads, d) of sequences in one row, and the states (n, value heads, d, d) in which they end.

    starts: where each of the n sequences begins, and the last ends (n + 1,). states: in which they begin; None: zero.
    """
    options = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
    if has_kernels(value.device) and value.dtype != torch.float32:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        inputs = [x[None] for x in (query, key, value, decay, beta)]
        options |= {"cu_seqlens": starts, "cu_seqlens_cpu": starts_on_cpu}
        out, ends = chunk_gated_delta_rule(*inputs, initial_state=states, **options)
        return out[0], ends
    groups = value.shape[1] // key.shape[1]
    # Repeated here, because older versions of transformers leave that to the caller of the rule.
    query, key = (x.repeat_interleave(groups, dim=1) for x in (query, key))
    results = []
    with torch.autocast(value.device.type, enabled=False):  # its sums are in float32
        for number, (start, end) in enumerate(pairwise(starts_on_cpu.tolist())):
            inputs = [x[None, start:end] for x in (query, key, value, decay, beta)]
            begin = None if states is None else states[number : number + 1]
            results.append(reference_rule()(*inputs, initial_state=begin, **options))
    outs, ends = zip(*results)
    return torch.cat(outs, dim=1)[0], torch.cat(ends)


# ---------------------------------------------------------------------------------------------------- which code runs


@cache
def reference_rule() -> Callable:
    """transformers' own rule, even where it would call the library, which rounds float32 and runs on no CPU."""
    # Imported here: where the library is installed, this loads it too, for which other families need not wait.
    from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule

    return inspect.unwrap(torch_chunk_gated_delta_rule)


def has_kernels(device: torch.device) -> bool:
    """Whether flash-linear-attention's kernels run on this device."""
    return device.type == "cuda" and find_spec("fla") is not None


def slow_code(model_type: str, device: torch.device, dtype: torch.dtype) -> str:
    """A warning where a model's linear attention runs by slow code; empty elsewhere."""
    if model_type != "qwen3_5":
        return ""
    slow = "linear attention runs slowly, by transformers' reference code"
    if device.type != "cuda" or dtype == torch.float32:
        return f"{slow}\n  fast kernels need a GPU and bfloat16"
    if not has_kernels(device):
        return f"{slow}\n  fast kernels: pip install {LIBRARY}"
    return ""


def check_version(model_type: str, device: torch.device, dtype: torch.dtype) -> str:
    """The warning of `slow_code`. Raises InputError for a library that is too old for Qwen3.5."""
    warning = slow_code(model_type, device, dtype)
    if model_type == "qwen3_5" and not warning and _release("fla-core") < OLDEST:  # a part of it since 0.4
        raise InputError(f"{LIBRARY} is older than {'.'.join(map(str, OLDEST))}: pip install -U {LIBRARY}")
    return warning


def check_kernels(model_type: str, device: torch.device, dtype: torch.dtype) -> str:
    """The warning of `check_version`. Also raises InputError where training would get wrong gradients from Triton."""
    if (warning := check_version(model_type, device, dtype)) or model_type != "qwen3_5":
        return warning
    is_hopper, triton = torch.cuda.get_device_capability(device)[0] == 9, _release("triton")
    # github.com/fla-org/flash-linear-attention/issues/640
    if is_hopper and (3, 4) <= triton < (3, 7, 1) and not _uses_tilelang():
        what = f"Triton {'.'.join(map(str, triton))} gives wrong gradients in {LIBRARY} on Hopper GPUs"
        raise InputError(f"{what}:\n  pip install 'tilelang[nvcc]', or a PyTorch with Triton 3.7.1 or later")
    return ""


def _uses_tilelang() -> bool:
    """Whether the library computes gradients by tilelang: where it is installed with CUDA's compiler, nvcc, and
    FLA_TILELANG=0 does not turn it off."""
    from fla.ops.common.backends import CommonTileLangBackend

    return CommonTileLangBackend.can_use()


def _release(package: str) -> tuple[int, ...]:
    """The installed version of a package, as numbers; empty where there is none."""
    try:
        return tuple(int(part) for part in version(package).split(".")[:3] if part.isdecimal())
    except PackageNotFoundError:
        return ()
