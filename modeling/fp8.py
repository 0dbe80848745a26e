"""FP8 (e4m3) numbers: rows with one scale each, their products on GPUs that have them, and an emulation of both.

A scale belongs to one row: a token's activations or gradients, or a channel of a weight. None spans tokens, so what is
learned from a token does not depend on those that run beside it.
"""

import torch
from torch import library
from torch.utils.flop_counter import register_flop_formula

from common import InputError
from modeling.precision import ROUNDED_GRADIENTS

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # that e4m3 holds
TINIEST = 1e-30  # largest magnitude that a row is taken to have at least: its scale stays a normal float32
FAST_ACCUMULATION = True  # Hopper then adds with about 14 bits, as DeepSeek-V3's report found
FIRST_CAPABILITY = 8, 9  # compute capability of the first GPUs with FP8 products
TESTED_CAPABILITY = 9  # major one of those that these products were measured on: Hopper
# Largest error of a row or column of a product that the check at the start lets pass: rounding the result to bfloat16
# costs 0.2%, a wrong scale far more.
LARGEST_ERROR = 0.01
EMULATED = False  # tests set it: products by numbers rounded to e4m3, where there are no such GPUs


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (rows, K) in e4m3 of x (rows, K), and scales (rows, 1) in float32 (float64 for x in float64).

    The largest magnitude of a row becomes 448, which e4m3 holds exactly. NaN and infinity come out as NaN.
    """
    wide = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    scales = wide.abs().amax(-1, keepdim=True).clamp(min=TINIEST) / LARGEST
    return (wide / scales).to(E4M3), scales


def quantize_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (rows, K) of a weight, as bytes, and scales (rows, 1) in float32."""
    scales = weight_scales(weight)
    return weight_codes(weight, scales), scales


def weight_scales(weight: torch.Tensor) -> torch.Tensor:
    """Scales (rows, 1) in float32 of a weight (rows, K).

    They are powers of two: bfloat16 then holds codes times scales exactly, and e4m3 loses nothing by it but one of its
    18 binades.
    """
    largest = weight.detach().abs().amax(-1, keepdim=True).float()
    return (largest.clamp(min=TINIEST) / LARGEST).log2().ceil().exp2()


def weight_codes(weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Codes (rows, K) of a weight at these scales (rows, 1), in contiguous rows.

    A scale's reciprocal is a power of two, so bfloat16 holds it and a weight's product with it exactly, and the weight
    needs no copy in float32. Codes are bytes because casts of a whole model (`model.double()`) leave integers alone,
    and so do PEFT, which casts LoRA to the type of the weight, and communication libraries without e4m3.
    """
    dtype = torch.promote_types(weight.dtype, torch.bfloat16)  # the range of float16 is too small: float32 then
    return (weight.detach() * scales.reciprocal().to(dtype)).to(E4M3).contiguous().view(torch.uint8)


def dequantize(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The numbers (rows, K) that codes and scales stand for. In place: a weight is on the GPU once, not twice."""
    return codes.view(E4M3).to(dtype).mul_(scales.to(dtype))


def dequantize_blocks(codes: torch.Tensor, scales: torch.Tensor, block: list[int]) -> torch.Tensor:
    """The numbers (rows, K) in float32 of codes in e4m3 with a scale for each block, whose last ones may be cut off:
    scales (rows / block[0], K / block[1]), rounded up."""
    for dim, size in enumerate(block):
        scales = scales.repeat_interleave(size, dim)
    return codes.float().mul_(scales[: codes.shape[0], : codes.shape[1]].float())


def multiply(
    a: torch.Tensor, a_scales: torch.Tensor, b: torch.Tensor, b_scales: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """a (M, K) times the transpose of b (N, K), both codes with scales (M, 1) and (N, 1), as (M, N) of `dtype`.

    K and N are multiples of 16. Where there is no CUDA, codes are turned into numbers of `dtype` first.
    """
    if a.device.type != "cuda":
        return dequantize(a, a_scales, dtype) @ dequantize(b, b_scales, dtype).T
    return torch._scaled_mm(
        a.contiguous(), b.view(E4M3).T, a_scales, b_scales.T, out_dtype=dtype, use_fast_accum=FAST_ACCUMULATION
    )


@library.custom_op("onelook::fp8_product", mutates_args=())
def fp8_product(
    a: torch.Tensor, a_scales: torch.Tensor, b: torch.Tensor, b_scales: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """`multiply`, as an operation that compiled code calls."""
    return multiply(a, a_scales, b, b_scales, dtype)


@fp8_product.register_fake
def _(a, a_scales, b, b_scales, dtype):
    return a_scales.new_empty(a.shape[0], b.shape[0], dtype=dtype)


@register_flop_formula(torch.ops.onelook.fp8_product)
def _(a, a_scales, b, b_scales, *_, **__) -> int:
    return 2 * a[0] * a[1] * b[0]


@library.custom_op("onelook::dequantized_product", mutates_args=())
def dequantized_product(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """x (T, out) times a weight (out, in) that codes and scales stand for. As one operation, so that no compiler keeps
    the weight in x's type."""
    return x @ dequantize(codes, scales, x.dtype)


@dequantized_product.register_fake
def _(x, codes, scales):
    return x.new_empty(x.shape[0], codes.shape[1])


@register_flop_formula(torch.ops.onelook.dequantized_product)
def _(x, codes, scales, *_, **__) -> int:
    return 2 * x[0] * x[1] * codes[1]


# --------------------------------------------------------------------------------------------------------- which GPUs


def check_products(precision: str, dtype: torch.dtype, device: torch.device) -> str:
    """A warning where FP8 products were never measured on such a GPU; empty where they were, or are not needed.

    Raises InputError where `device` can't multiply as a --base-precision asks.
    """
    if precision not in ROUNDED_GRADIENTS or EMULATED:
        return ""
    refused, instead = f"--base-precision {precision}", "bf16 and fp8-weights run here"
    if device.type != "cuda":
        raise InputError(f"{refused}: FP8 products need a GPU that has them, such as an H100; {instead}")
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    if capability < FIRST_CAPABILITY:
        raise InputError(f"{refused}: {name} has no FP8 products, which came with Ada and Hopper; {instead}")
    if dtype != torch.bfloat16:
        raise InputError(f"{refused}: FP8 products give bfloat16, leave --dtype at auto; {instead}")
    try:
        error = product_error(device)
    except RuntimeError as reason:  # of a GPU that this version of torch has no kernel for
        raise InputError(f"{refused}: {name} with torch {torch.__version__}: {reason}; {instead}") from None
    if not error < LARGEST_ERROR:
        raise InputError(f"{refused}: {name} with torch {torch.__version__}: products are {error:.0%} off; {instead}")
    if capability[0] == TESTED_CAPABILITY:
        return ""
    return f"--base-precision {precision} was never run on a GPU such as {name}: one product was checked, no training"


def product_error(device: torch.device) -> float:
    """How far an FP8 product on `device` is from the same one in float64: the worst row's or column's relative error.

    Rows and columns differ by powers of ten, so that scales that are not theirs are noticed.
    """
    generator = torch.Generator(device).manual_seed(0)
    shapes = (128, 256), (64, 256)
    a, b = (torch.randn(shape, generator=generator, device=device) for shape in shapes)
    a, b = (10.0 ** (torch.arange(len(x), device=device)[:, None] % 5) * x for x in (a, b))
    a, b = quantize(a), quantize_weight(b)
    exact = dequantize(*a, torch.float64) @ dequantize(*b, torch.float64).T
    apart = multiply(*a, *b, torch.bfloat16).double() - exact
    return max((apart.norm(dim=dim) / exact.norm(dim=dim)).max().item() for dim in (0, 1))
