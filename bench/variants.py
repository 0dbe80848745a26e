"""The rows of bench/gradients.py: ways to multiply activations with frozen weights, those of --base-precision and
variants of `fp8`, and the time of each."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from torch.utils.benchmark import Timer

from modeling import fp8
from modeling.fp8 import dequantize, fp8_product, quantize, quantize_weight
from modeling.linear import QuantizedLinear, quantize_linear
from modeling.precision import PRECISIONS

LAYERS = 4  # of each tower
ROWS = 4480  # of a tree of 9 at full resolution
SHAPES = "self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.down_proj"
AFTER_NORM = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")
OUTLIER = 6.0  # a token has outliers if its largest number is more than this many times its root mean square


@dataclass(frozen=True)
class Product:
    prepare: Callable  # a weight (out, in) to the tensors that are kept of it
    multiply: Callable  # x (T, in) and those tensors to (T, out)


def to_int8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (rows, K) in int8 and scales (rows, 1) in float32: the largest magnitude of a row becomes 127."""
    wide = x.detach().float()
    scales = wide.abs().amax(-1, keepdim=True).clamp(min=fp8.TINIEST) / 127
    return (wide / scales).round().to(torch.int8), scales


def multiply_int8(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    own, own_scales = to_int8(x)
    return (torch._int_mm(own, codes.T) * own_scales * scales.T).to(x.dtype)


def multiply_fp8(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return fp8_product(*quantize(x), codes, scales, x.dtype)


def multiply_twice(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """With what rounding takes from x, rounded, as a second term."""
    own, own_scales = quantize(x)
    rest = x.float() - dequantize(own, own_scales, torch.float32)
    return fp8_product(own, own_scales, codes, scales, x.dtype) + fp8_product(*quantize(rest), codes, scales, x.dtype)


def has_outliers(x: torch.Tensor) -> torch.Tensor:
    """Which tokens of x (T, in) do, as (T,) bool."""
    wide = x.float()
    return wide.abs().amax(-1) > OUTLIER * wide.square().mean(-1).sqrt()


def multiply_outliers_twice(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    out, tokens = multiply_fp8(x, codes, scales), has_outliers(x).nonzero()[:, 0]  # the CPU waits for their number
    return out.index_copy(0, tokens, multiply_twice(x[tokens], codes, scales)) if len(tokens) else out


IN_BF16 = Product(lambda weight: (weight,), F.linear)
PRODUCTS = {
    "bf16": IN_BF16,
    "fp8-backward": IN_BF16,
    "fp8": Product(quantize_weight, multiply_fp8),
    "fp8-weights": Product(quantize_weight, lambda x, codes, scales: F.linear(x, dequantize(codes, scales, x.dtype))),
    "int8": Product(to_int8, multiply_int8),
    "residual": Product(quantize_weight, multiply_twice),
    "residual of outliers": Product(quantize_weight, multiply_outliers_twice),
}


class ForwardProduct(torch.autograd.Function):
    """A layer's own product; the gradient of x is the product of fp8."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, layer: "VariantLinear") -> torch.Tensor:
        ctx.layer = layer
        return layer.product.multiply(x / layer.factors, *layer.kept)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return multiply_fp8(gradient, *ctx.layer.transpose), None


class VariantLinear(QuantizedLinear):
    """A frozen layer without bias, as `fp8` but with another forward product. `factors` (in,), or 1: x is divided by
    them and the weight multiplied, before both are rounded."""

    def __init__(self, linear: nn.Linear, product: Product, factors: torch.Tensor | float = 1.0):
        super().__init__(linear, "fp8-backward")
        self.product, self.factors, self.kept = product, factors, product.prepare(self.weight * factors)
        self.transpose = quantize_weight(self.weight.T)  # (in, out), (in, 1)

    def with_lora(self, x: torch.Tensor, low: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.addmm(ForwardProduct.apply(x, self), low, b.T)


# --------------------------------------------------------------------------------------------------------------- rows


@dataclass(frozen=True)
class Row:
    name: str
    product: str
    rounds: Callable[[int, str], bool] = lambda layer, path: True  # whether a linear layer is rounded, or bfloat16
    smooth: bool = False
    fast: bool = True  # fp8.FAST_ACCUMULATION


ROUNDED_ROWS = [
    *(Row(precision, precision) for precision in PRECISIONS),
    Row("full sums (no fast accumulation)", "fp8", fast=False),
    Row("down_proj in bf16", "fp8", rounds=lambda layer, path: path != "mlp.down_proj"),
    Row("first and last layer in bf16", "fp8", rounds=lambda layer, path: 0 < layer < LAYERS - 1),
    Row("smoothed", "fp8", smooth=True),
    Row("INT8 forward", "int8"),
    Row("residual of x as a second term", "residual"),
    Row("residual of tokens with outliers", "residual of outliers"),
]


def decoder_linears(base: nn.Module, kind: type):
    """Index, decoder layer, path in it and module of each linear layer of a kind."""
    for index, layer in enumerate(base.model.language_model.layers):
        yield from ((index, layer, path, m) for path, m in list(layer.named_modules()) if isinstance(m, kind))


def round_layers(base: nn.Module, row: Row, factors: dict) -> nn.Module:
    """Round the decoder layers of a frozen model as a row says. `factors`: of `smoothing`."""
    for index, layer, path, linear in decoder_linears(base, nn.Linear):
        if row.product == "bf16" or not row.rounds(index, path):
            continue
        if row.product in PRECISIONS and not row.smooth:
            quantize_linear(layer, path, row.product)
        else:
            own = factors.get((index, path), 1.0) if row.smooth else 1.0
            layer.set_submodule(path, VariantLinear(linear, PRODUCTS[row.product], own))
    return base


def record_inputs(base: nn.Module) -> dict[tuple[int, str], tuple]:
    """Filled by each forward pass: input (T, in) and weight (out, in) of the decoder layers' linear layers, by the
    layer's index and path."""
    inputs = {}

    def keep(module, args, key):
        inputs[key] = args[0].detach().flatten(0, -2), module.base_layer.weight.detach()

    for index, _, path, module in decoder_linears(base, LoraLinear):
        module.register_forward_pre_hook(partial(keep, key=(index, path)))
    return inputs


def smoothing(inputs: dict) -> dict[tuple[int, str], torch.Tensor]:
    """Factors (in,) of the layers that follow a norm, powers of two. Layers with the same input share them."""
    factors = {}
    for index in range(LAYERS):
        for paths in AFTER_NORM:
            x, weights = inputs[index, paths[0]][0], torch.cat([inputs[index, path][1] for path in paths])
            both = x.abs().amax(0).float() / weights.abs().amax(0).float()  # (in,)
            factors |= dict.fromkeys(((index, path) for path in paths), both.sqrt().log2().round().exp2().to(x.dtype))
    return factors


def product_ms(product: Product, x: torch.Tensor, weight: torch.Tensor, repeats: int = 50) -> float:
    """Milliseconds of one compiled product of x, repeated to `ROWS` rows."""
    x, kept = x.repeat(-(-ROWS // len(x)), 1)[:ROWS], product.prepare(weight)
    names = {"run": torch.compile(product.multiply, dynamic=True), "x": x, "kept": kept}
    return 1000 * Timer("run(x, *kept)", globals=names).timeit(repeats).mean  # runs twice before


@torch.no_grad()
def row_ms(row: Row, inputs: dict) -> float:
    """Milliseconds of `SHAPES`, with inputs of the second layer, mean over layers, some of which may be in bfloat16."""
    total = 0.0
    for path in SHAPES:
        layers = Counter(row.product if row.rounds(index, path) else "bf16" for index in range(LAYERS))
        total += sum(n * product_ms(PRODUCTS[name], *inputs[1, path]) for name, n in layers.items()) / LAYERS
    return total
