"""Frozen linear layers of the language model, with or without LoRA, at each precision of modeling/precision.py."""

import torch
import torch.nn.functional as F
from torch import library, nn
from torch.utils.flop_counter import register_flop_formula

from common import InputError
from modeling.fp8 import (
    dequantize,
    dequantized_product,
    fp8_product,
    multiply,
    quantize,
    quantize_weight,
    weight_codes,
    weight_scales,
)
from modeling.precision import BYTES_PER_WEIGHT, ROUNDED_GRADIENTS

FP8_ALIGNMENT = 16  # what sizes of matrices must be multiples of


class QuantizedLinear(nn.Linear):
    """A frozen linear layer at another precision than bf16. `weight` is (out, in): numbers, or codes as bytes."""

    def __init__(self, linear: nn.Linear, precision: str):
        """`linear` may be given up afterwards: only its bias is kept, and its weight by fp8-backward."""
        with torch.device("meta"):
            super().__init__(linear.in_features, linear.out_features, bias=False)
        weight, scales, transposed, transposed_scales = linear.weight.detach(), None, None, None
        if precision in ROUNDED_GRADIENTS:
            transposed_scales = weight_scales(weight.T)  # (in, 1)
        if precision == "fp8":
            transposed = weight_codes(weight.T, transposed_scales)  # (in, out)
        if precision != "fp8-backward":
            weight, scales = quantize_weight(weight)  # (out, in), (out, 1)
        self.precision, self.bias, self.weight = precision, linear.bias, nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scales", scales, persistent=False)
        self.register_buffer("transposed", transposed, persistent=False)
        self.register_buffer("transposed_scales", transposed_scales, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.with_lora(x.flatten(0, -2), None, None).unflatten(0, x.shape[:-1])

    def with_lora(self, x: torch.Tensor, low: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor:
        """x (T, in) W' + bias + low (T, r) B'."""
        # Here, not in the operation: compiled code then quantizes an input once for all layers that get it.
        codes, scales = quantize(x) if self.precision == "fp8" else (None, None)
        weights = self.weight, self.scales, self.transposed, self.transposed_scales
        return lora_linear(x, codes, scales, *weights, self.bias, low, b)


def linear_with_lora(linear: nn.Linear, x: torch.Tensor, low: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """x (T, in) W' + bias + low (T, r) B', as (T, out), of a frozen layer."""
    if isinstance(linear, QuantizedLinear):
        return linear.with_lora(x, low, b)
    return lora_linear(x, None, None, linear.weight, None, None, None, linear.bias, low, b)


@library.custom_op("onelook::lora_linear", mutates_args=())
def lora_linear(
    x: torch.Tensor,
    codes: torch.Tensor | None,
    code_scales: torch.Tensor | None,
    weight: torch.Tensor,
    scales: torch.Tensor | None,
    transposed: torch.Tensor | None,
    transposed_scales: torch.Tensor | None,
    bias: torch.Tensor | None,
    low: torch.Tensor | None,
    b: torch.Tensor | None,
) -> torch.Tensor:
    """x (T, in) W' + bias + low (T, r) B', as (T, out). In place: `addmm` alone would copy (T, out) first, and the
    compiler can't split one operation.

    codes, code_scales: x in FP8; the product is one of FP8 then. scales: of a weight of codes. transposed and its
    scales: W' in FP8, for the gradient of x; given the scales alone, the backward pass rounds the weight anew. Without
    `low` there is no LoRA.
    """
    if codes is not None:
        out = multiply(codes, code_scales, weight, scales, x.dtype)
        out = out if bias is None else out.add_(bias)
    else:
        out = F.linear(x, weight if scales is None else dequantize(weight, scales, x.dtype), bias)
    return out if low is None else out.addmm_(low, b.T)


@lora_linear.register_fake
def _(x, codes, code_scales, weight, scales, transposed, transposed_scales, bias, low, b):
    return x.new_empty(x.shape[0], weight.shape[0])


def _setup_context(ctx, inputs, output):
    _, _, _, weight, scales, transposed, transposed_scales, _, low, b = inputs
    ctx.save_for_backward(weight, scales, transposed, transposed_scales, low, b)


def _backward(ctx, gradient):
    *weights, low, b = ctx.saved_tensors
    x_gradient = _input_gradient(gradient, *weights) if ctx.needs_input_grad[0] else None
    of_lora = (None, None) if low is None else (gradient @ b, gradient.T @ low)
    return x_gradient, *[None] * 7, *of_lora  # W and the bias are frozen


def _input_gradient(gradient, weight, scales, transposed, transposed_scales) -> torch.Tensor:
    if transposed_scales is None:
        return gradient @ weight if scales is None else dequantized_product(gradient, weight, scales)
    if transposed is None:
        # Not inside `fp8_product`: the compiler makes one kernel of it, which reads W and writes its transpose's codes.
        transposed = weight_codes(weight.T, transposed_scales)
    return fp8_product(*quantize(gradient), transposed, transposed_scales, gradient.dtype)


lora_linear.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.onelook.lora_linear)  # by which the compiler picks what to compute again
def _(x, codes, code_scales, weight, scales, transposed, transposed_scales, bias, low, b, *_, **__) -> int:
    return 2 * x[0] * (weight[0] * weight[1] + (b[0] * b[1] if b else 0))


# ------------------------------------------------------------------------------------------------------- whole models


def quantize_layer(layer: nn.Module, precision: str) -> None:
    """Replace the linear layers in a frozen decoder layer, one after the other. Raises InputError where FP8 products
    can't have their sizes."""
    if precision == "bf16":
        return
    for name, linear in list(layer.named_modules()):
        if isinstance(linear, nn.Linear):
            quantize_linear(layer, name, precision)


def quantize_linear(parent: nn.Module, name: str, precision: str) -> None:
    """Replace the linear layer of this name in `parent`, as `quantize_layer` does. The one replaced loses its weight,
    whoever still holds it."""
    linear = parent.get_submodule(name)
    sizes = linear.out_features, linear.in_features
    if precision in ROUNDED_GRADIENTS and any(size % FP8_ALIGNMENT for size in sizes):
        what = f"{name} is {sizes[0]} x {sizes[1]}, no multiples of {FP8_ALIGNMENT}"
        raise InputError(f"--base-precision {precision}: {what}; bf16 and fp8-weights work")
    parent.set_submodule(name, QuantizedLinear(linear, precision))
    linear.weight = None


def weight_bytes(model: nn.Module, precision: str) -> int:
    """Bytes of a base model's weights at a precision, with all others in bfloat16. `model` may lie on `meta`, and may
    have LoRA, which does not count."""
    total = sum(2 * parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    per_weight, scale_bytes = BYTES_PER_WEIGHT[precision], 4
    for layer in model.model.language_model.layers:
        for module in layer.modules():
            if isinstance(module, nn.Linear) and not module.weight.requires_grad:
                rows = {"bf16": 0, "fp8-backward": module.in_features, "fp8-weights": module.out_features}
                scales = rows.get(precision, module.in_features + module.out_features)
                total += (per_weight - 2) * module.weight.numel() + scale_bytes * scales
    return total
