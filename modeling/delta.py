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
from torch import library, nn
from torch.utils.flop_counter import register_flop_formula
from transformers import Cache
from transformers.activations import ACT2FN
from transformers.cache_utils import LinearAttentionLayer

from common import InputError

LIBRARY = "flash-linear-attention"
OLDEST = 0, 6  # version whose kernels take several value heads per key head, and refuse a GPU where they are wrong
CHUNK = 64  # tokens that flash-linear-attention takes at once: it computes with whole chunks


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
    # All four before the recurrence: what LoRA shares between them is kept until the last has run.
    inputs, z, b, a = layer.in_proj_qkv(rows), layer.in_proj_z(rows), layer.in_proj_b(rows), layer.in_proj_a(rows)
    mixed = convolve(inputs, layer.conv1d.weight[:, 0], paths["before"], layer.activation)
    query, key, value = mixed.split([layer.key_dim, layer.key_dim, layer.value_dim], dim=-1)
    query, key = (unit_vectors(x.unflatten(-1, (-1, layer.head_k_dim))) for x in (query, key))  # (T, key heads, d)
    value = value.unflatten(-1, (-1, layer.head_v_dim))  # (T, value heads, d)
    beta = b.sigmoid()  # (T, value heads): how much of what a key holds is replaced
    decay = -layer.A_log.float().exp() * F.softplus(a.float() + layer.dt_bias)  # its logarithm
    out, states = through_trees(query, key, value, decay, beta, **paths)
    if cache_params is not None:
        window = latest(inputs, paths["before"], paths["leaf_ends"])
        cache_params.update_conv_state(window, layer.layer_idx, conv_kernel_size=layer.conv_kernel_size)
        cache_params.update_recurrent_state(states.index_select(0, paths["leaves"]), layer.layer_idx)
    out = layer.norm(out.flatten(0, 1), z.view(-1, layer.head_v_dim))
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


def unit_vectors(x: torch.Tensor) -> torch.Tensor:
    """x (..., d) scaled to length 1 in float32. The rule can do this in kernels of its own; here the compiler fuses it
    with the convolution."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-6)).to(x.dtype)


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


# ------------------------------------------------------------------------------------------------------------ the rule


def through_trees(query, key, value, decay, beta, order, root_starts, branch_starts, root_of, starts_on_cpu, **_):
    """The outputs (T, value heads, d) of the delta rule along each token's path, zero for padding, and the states in
    which the sequences end, roots first. Queries and keys are `unit_vectors`."""
    inputs, paths = (query, key, value, decay, beta), [order, root_starts, branch_starts, root_of, *starts_on_cpu]
    if has_kernels(value.device) and value.dtype != torch.float32:
        return tree_delta_rule(*inputs, paths)
    return _reference_through_trees(inputs, paths)


@torch.compiler.disable  # a loop over sequences
def _reference_through_trees(inputs, paths):
    return forward_through_trees(reference_sequences, inputs, paths)


def forward_through_trees(rule: Callable, inputs: tuple, paths: list) -> tuple[torch.Tensor, torch.Tensor]:
    """`through_trees` by two calls of `rule`: for the sequences that begin with nothing, and for those that begin where
    one of them ended.

    inputs: query, key, value, decay and beta. paths: `order`, `root_starts`, `branch_starts` and `root_of` of
    `inputs.positions.token_paths`, and both starts again on the CPU.
    rule(starts, starts_on_cpu, query, key, value, decay, beta, states): outputs (1, T, value heads, d) of sequences in
    one row, and the states (n, value heads, d, d) in which they end. starts: where each of the n sequences begins, and
    the last ends (n + 1,). states: in which they begin; without them they begin with zero.
    """
    order, root_starts, branch_starts, root_of, *starts_on_cpu = paths
    roots, branches = _gather(inputs, order, starts_on_cpu)
    out, states = rule(root_starts, starts_on_cpu[0], *roots)
    if len(root_of) > 1:
        more, ends = rule(branch_starts, starts_on_cpu[1], *branches, states.index_select(0, root_of[:-1]))
        out, states = torch.cat([out, more], dim=1), torch.cat([states, ends])
    return _scatter(out, order, inputs[2]), states


def backward_through_trees(rule: Callable, gradients: list, inputs: list, paths: list) -> list[torch.Tensor]:
    """Gradients of the inputs of `forward_through_trees`, from those of its outputs and states.

    It runs the forward pass again, because an operation can't keep what autograd records inside it. Inside an operation
    autograd records an autograd.Function, as `rule` calls, but none of torch's functions. So the gradients are passed
    on by hand: from the branches, through the states in which they begin, into the roots.
    """
    order, root_starts, branch_starts, root_of, *starts_on_cpu = paths
    roots, branches = _gather(inputs, order, starts_on_cpu)
    (of_roots,), (of_branches,) = _gather(gradients[:1], order, starts_on_cpu)
    root_of = root_of[:-1]
    of_root_ends, of_branch_ends = gradients[1].split([len(root_starts) - 1, len(root_of)])
    roots, root_results = _record(rule, root_starts, starts_on_cpu[0], *roots)
    branch_gradients = branches  # without branches these hold no tokens, and neither do their gradients
    if len(root_of):
        states = root_results[1].detach().index_select(0, root_of)
        leaves, results = _record(rule, branch_starts, starts_on_cpu[1], *branches, states)
        *branch_gradients, of_states = torch.autograd.grad(results, leaves, [of_branches, of_branch_ends])
        of_root_ends = of_root_ends.index_add(0, root_of, of_states)
    root_gradients = torch.autograd.grad(root_results, roots, [of_roots, of_root_ends])
    both = (torch.cat(pair, dim=1) for pair in zip(root_gradients, branch_gradients))
    return [_scatter(gradient, order, x) for gradient, x in zip(both, inputs)]


def _record(rule: Callable, starts: torch.Tensor, starts_on_cpu: torch.Tensor, *inputs) -> tuple[list, tuple]:
    """The inputs as leaves, and what `rule` makes of them with autograd on."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    with torch.enable_grad():
        return leaves, rule(starts, starts_on_cpu, *leaves)


def _gather(tensors: tuple, order: torch.Tensor, starts_on_cpu: list) -> tuple[tuple, tuple]:
    """Tensors (T, ...) as those of the roots' tokens (1, R, ...) and those of the branches' (1, B, ...)."""
    sizes = [int(starts[-1]) for starts in starts_on_cpu]
    return tuple(zip(*(x.index_select(0, order)[None].split(sizes, dim=1) for x in tensors)))


def _scatter(row: torch.Tensor, order: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The reverse of `_gather`, of one row (1, R + B, ...); zero where `order` names no token."""
    return like.new_zeros(like.shape).index_copy_(0, order, row[0])


def reference_sequences(_, starts_on_cpu, query, key, value, decay, beta, states=None):
    """The `rule` of `forward_through_trees` by `reference_rule`, one sequence after the other."""
    groups = value.shape[2] // key.shape[2]
    # Repeated here, because older versions of transformers leave that to the caller of the rule.
    query, key = (x.repeat_interleave(groups, dim=2) for x in (query, key))
    results = []
    with torch.autocast(value.device.type, enabled=False):  # its sums are in float32
        for number, (start, end) in enumerate(pairwise(starts_on_cpu.tolist())):
            inputs = [x[:, start:end] for x in (query, key, value, decay, beta)]
            begin = None if states is None else states[number : number + 1]
            results.append(reference_rule()(*inputs, initial_state=begin, output_final_state=True))
    outs, ends = zip(*results)
    return torch.cat(outs, dim=1), torch.cat(ends)


def kernel_sequences(starts, starts_on_cpu, query, key, value, decay, beta, states=None):
    """The `rule` of `forward_through_trees` by flash-linear-attention, whose function is one autograd.Function.

    Autocast is set here, as it is off in compiled code and in backward passes. The library's backward pass runs under
    the autocast of its forward pass, and then adds up the gradients of value heads that share a key in float32.
    """
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    options = {"output_final_state": True, "cu_seqlens": starts, "cu_seqlens_cpu": starts_on_cpu}
    with torch.autocast(value.device.type, value.dtype):
        return chunk_gated_delta_rule(query, key, value, decay, beta, initial_state=states, **options)


# ------------------------------------------------------------------------------------------------ as one operation


@library.custom_op("onelook::tree_delta_rule", mutates_args=())
def tree_delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor,
    paths: list[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """`through_trees` by flash-linear-attention. paths: see `forward_through_trees`.

    The compiler can't look into the library's functions; as an operation they do not split a layer's graph. Only the
    arguments are kept for the backward pass, which runs the forward pass again.
    """
    return forward_through_trees(kernel_sequences, (query, key, value, decay, beta), paths)


@tree_delta_rule.register_fake
def _(query, key, value, decay, beta, paths):
    _, root_starts, branch_starts, *_ = paths
    sequences = root_starts.shape[0] - 1 + branch_starts.shape[0] - 1
    states = value.new_empty(sequences, value.shape[1], key.shape[2], value.shape[2], dtype=torch.float32)
    return value.new_empty(value.shape), states


@library.custom_op("onelook::tree_delta_rule_backward", mutates_args=())
def tree_delta_rule_backward(
    gradients: list[torch.Tensor], inputs: list[torch.Tensor], paths: list[torch.Tensor]
) -> list[torch.Tensor]:
    """Gradients of query, key, value, decay and beta, from those of what `tree_delta_rule` gives."""
    return backward_through_trees(kernel_sequences, gradients, inputs, paths)


@tree_delta_rule_backward.register_fake
def _(_gradients, inputs, _paths):
    return [x.new_empty(x.shape) for x in inputs]


def _setup_context(ctx, inputs, output):
    *inputs, paths = inputs
    ctx.save_for_backward(*inputs, *paths)


def _backward(ctx, *gradients):
    inputs, paths = ctx.saved_tensors[:5], ctx.saved_tensors[5:]
    return *tree_delta_rule_backward(list(gradients), list(inputs), list(paths)), [None] * len(paths)


tree_delta_rule.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.onelook.tree_delta_rule)  # by which the compiler picks what to compute again
def _(query, key, value, *_, **__) -> int:
    tokens, heads, width = value
    return tokens * heads * int(chunk_flops(key[2], width) / CHUNK)


def chunk_flops(k: int, v: int) -> float:
    """Forward operations of the rule for a head and a chunk of C tokens, with keys of k and values of v columns.

    Yang et al., arXiv 2406.06484, section 3, whose products 2412.06464 gates: 2 C C k for each of keys with keys, the
    matrix W, and queries with keys; 2 C C v for each of the matrix U and the output within the chunk; 2 C k v for each
    of what W reads of the state, what the chunk adds to it and what queries read of it; 2/3 C C C for the inverse of a
    triangular matrix.
    """
    return 2 * CHUNK**2 * (3 * k + 2 * v) + 6 * CHUNK * k * v + 2 / 3 * CHUNK**3


# ---------------------------------------------------------------------------------------------------- which code runs


@cache
def reference_rule() -> Callable:
    """transformers' own rule, even where it would call the library, which rounds float32 and runs on no CPU."""
    # Imported here: where the library is installed, this loads it too, for which other families need not wait.
    from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule

    return inspect.unwrap(torch_chunk_gated_delta_rule)


@torch.compiler.assume_constant_result  # older versions of the compiler can't look into `find_spec`
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


def check_library(model_type: str, device: torch.device, dtype: torch.dtype) -> str:
    """The warning of `slow_code`. Raises InputError for a library that is too old for Qwen3.5, or that would find no
    compiler for its kernels."""
    if (warning := slow_code(model_type, device, dtype)) or model_type != "qwen3_5":
        return warning
    if _release("fla-core") < OLDEST:  # a part of it since 0.4
        raise InputError(f"{LIBRARY} is older than {'.'.join(map(str, OLDEST))}: pip install -U {LIBRARY}")
    if torch.cuda.get_device_capability(device)[0] >= 9 and _lacks_nvcc():
        raise InputError("flash-qla compiles its kernels with nvcc, which is not here:\n  pip install 'tilelang[nvcc]'")
    return ""


def check_kernels(model_type: str, device: torch.device, dtype: torch.dtype) -> str:
    """The warning of `check_library`. Also raises InputError where training would get wrong gradients from Triton."""
    if (warning := check_library(model_type, device, dtype)) or model_type != "qwen3_5":
        return warning
    is_hopper, triton = torch.cuda.get_device_capability(device)[0] == 9, _release("triton")
    # github.com/fla-org/flash-linear-attention/issues/640
    if is_hopper and (3, 4) <= triton < (3, 7, 1) and not _uses_tilelang():
        what = f"Triton {'.'.join(map(str, triton))} gives wrong gradients in {LIBRARY} on Hopper GPUs"
        raise InputError(f"{what}:\n  pip install 'tilelang[nvcc]', or a PyTorch with Triton 3.7.1 or later")
    return ""


def _lacks_nvcc() -> bool:
    """Whether the library would call FlashQLA's kernels, which are compiled when they first run, without CUDA's
    compiler. FLA_FLASH_QLA=0 turns them off."""
    if not find_spec("flash_qla"):
        return False
    from fla.ops.gated_delta_rule.backends import FlashQLABackend
    from fla.utils import has_usable_nvcc

    return FlashQLABackend.can_use() and not has_usable_nvcc()


def _uses_tilelang() -> bool:
    """Whether the library computes gradients by tilelang: where it is installed with CUDA's compiler, nvcc, and
    FLA_TILELANG=0 does not turn it off."""
    from fla.ops.common.backends import CommonTileLangBackend

    return CommonTileLangBackend.can_use()


def _release(package: str) -> tuple[int, ...]:
    """The installed version of a package, as numbers; empty where there is none."""
    return tuple(int(part) for part in _installed_version(package).split(".")[:3] if part.isdecimal())


def _installed_version(package: str) -> str:
    """The installed version of a package; empty where there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def kernel_versions() -> dict[str, str]:
    """Installed versions of the packages whose kernels linear attention may run."""
    versions = {package: _installed_version(package) for package in ("fla-core", "flash-qla", "tilelang", "triton")}
    return {package: installed for package, installed in versions.items() if installed}
