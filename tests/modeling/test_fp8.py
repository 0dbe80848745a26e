"""FP8 numbers: every row has its own scale, products and gradients are those of rounded numbers, and GPUs that can't
multiply them are refused."""

import math

import pytest
import torch
from torch import nn

from common import InputError
from modeling import fp8
from modeling.fp8 import check_products, dequantize, multiply, quantize, quantize_weight, weight_codes, weight_scales
from modeling.linear import QuantizedLinear, linear_with_lora, quantize_layer
from modeling.precision import PRECISIONS


def rounded(x: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """x (rows, K) rounded to e4m3 at these scales, by its definition: four significant bits, exponents from -6 on."""
    mantissa, exponent = torch.frexp(x / scales)
    grain = 2.0 ** (exponent.clamp(min=-5) - 4)
    return torch.ldexp(mantissa, exponent).div(grain).round() * grain * scales  # ties go to even, as in IEEE


@pytest.fixture
def x() -> torch.Tensor:
    """(6, 64) float64: ordinary rows, one with an outlier, one of tiny numbers, one of zeros."""
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[2, 7], x[3], x[4] = 300.0, x[3] * 1e-20, 0.0
    return x


def test_numbers_are_rounded_to_e4m3_row_by_row(x):
    codes, scales = quantize(x)
    assert codes.dtype == torch.float8_e4m3fn and scales.shape == (6, 1)
    kept = dequantize(codes, scales, torch.float64)
    assert torch.equal(kept, rounded(x, scales))
    largest = x.abs().argmax(1, keepdim=True)
    assert torch.allclose(kept.gather(1, largest), x.gather(1, largest), rtol=1e-15)  # outliers are kept exactly
    for row in range(len(x)):
        assert torch.equal(quantize(x[row : row + 1])[0].view(torch.uint8), codes[row : row + 1].view(torch.uint8))


def test_weights_have_scales_by_which_bfloat16_holds_them_exactly(x):
    codes, scales = quantize_weight(x.float())
    assert codes.dtype == torch.uint8 and torch.equal(scales.log2().round().exp2(), scales)
    kept = dequantize(codes, scales, torch.float64)
    assert torch.equal(kept, rounded(x.float().double(), scales.double()))
    assert torch.equal(dequantize(codes, scales, torch.bfloat16).double(), kept)
    assert codes.view(torch.float8_e4m3fn).double().abs().amax(1)[:4].min() >= 224  # a binade is given away


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_have_the_same_codes_in_their_own_type_as_in_float64(x, dtype):
    """Over all magnitudes, along rows and along columns."""
    generator = torch.Generator().manual_seed(1)
    x = torch.cat([x, torch.randn(200, 64, generator=generator) * 10.0 ** torch.arange(-38, 26).double()]).to(dtype)
    for weight in (x, x.T):
        scales = weight_scales(weight)
        assert torch.equal(scales, quantize_weight(weight.double())[1])
        codes = weight_codes(weight, scales)
        assert codes.is_contiguous() and torch.equal(codes, quantize_weight(weight.double())[0])
        assert torch.equal(dequantize(codes, scales, torch.float64), rounded(weight.double(), scales.double()))


def test_weights_in_float16_have_the_codes_of_float64_however_small_their_rows():
    """A scale's reciprocal is over float16's range where a row's largest number is under 0.007."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(12, 64, generator=generator) * 10.0 ** torch.arange(-8, 4)[:, None]
    weight[0] = 0
    ours, expected = quantize_weight(weight.half()), quantize_weight(weight.half().double())
    assert torch.equal(ours[0], expected[0]) and torch.equal(ours[1], expected[1])


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_stays_so(x, value):
    """The step is skipped then: it must not look like an ordinary one."""
    x[1, 3] = value
    out = multiply(*quantize(x), *quantize_weight(x[:3]), torch.float64)
    assert out[1].isnan().all() and out[[0, 2, 3, 4, 5]][:, [0, 2]].isfinite().all()


# ------------------------------------------------------------------------------------------------------------- layers


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_layer_and_its_gradients_are_products_of_rounded_numbers(precision, bias):
    """In float64, with LoRA, against products of numbers that are rounded here."""
    torch.manual_seed(0)
    x, low, b = (torch.randn(shape, dtype=torch.float64) for shape in ((7, 32), (7, 4), (48, 4)))
    linear = nn.Linear(32, 48, bias).double().requires_grad_(False)
    linear.weight *= torch.logspace(-3, 3, 48)[:, None] * torch.logspace(2, -2, 32)
    own = linear if precision == "bf16" else QuantizedLinear(linear, precision)
    inputs = [tensor.requires_grad_() for tensor in (x, low, b)]
    out = linear_with_lora(own, *inputs)
    gradients = torch.autograd.grad(out, inputs, seed := torch.randn(7, 48, dtype=torch.float64))

    def at_scales(t, power_of_two):
        scales = t.abs().amax(1, keepdim=True) / 448
        return rounded(t, scales.log2().ceil().exp2() if power_of_two else scales)

    weight = linear.weight
    forward = at_scales(weight, True) if precision in ("fp8", "fp8-weights") else weight
    backward = {"bf16": weight, "fp8-weights": forward}.get(precision, at_scales(weight.T, True).T)
    rows = at_scales(x.detach(), False) if precision == "fp8" else x.detach()
    expected = rows @ forward.T + low.detach() @ b.detach().T + (linear.bias if bias else 0)
    assert torch.allclose(out, expected, rtol=1e-12, atol=1e-12)
    of_out = at_scales(seed, False) if precision in ("fp8", "fp8-backward") else seed
    for gradient, wanted in zip(gradients, (of_out @ backward, seed @ b.detach(), seed.T @ low.detach())):
        assert torch.allclose(gradient, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fp8_backward_keeps_scales_alone_and_has_the_gradients_of_a_kept_transpose_bit_for_bit(dtype):
    torch.manual_seed(0)
    linear = nn.Linear(64, 48, False, dtype=dtype).requires_grad_(False)
    linear.weight *= torch.logspace(-3, 3, 64)
    x, seed = torch.randn(7, 64, dtype=dtype, requires_grad=True), torch.randn(7, 48, dtype=dtype)
    own = QuantizedLinear(linear, "fp8-backward")
    assert [tuple(buffer.shape) for buffer in own.buffers()] == [(64, 1)]
    (gradient,) = torch.autograd.grad(own(x), x, seed)
    assert torch.equal(gradient, multiply(*quantize(seed), *quantize_weight(linear.weight.T), dtype))


def test_sizes_that_fp8_products_can_t_have_are_refused():
    layer = nn.Sequential(nn.Linear(32, 24, bias=False))
    with pytest.raises(InputError, match="0 is 24 x 32, no multiples of 16; bf16 and fp8-weights work"):
        quantize_layer(layer, "fp8-backward")
    linear = layer[0]
    quantize_layer(layer, "fp8-weights")
    assert isinstance(layer[0], QuantizedLinear) and linear.weight is None  # whoever holds it holds no weight


# --------------------------------------------------------------------------------------------------------------- GPUs


@pytest.fixture
def gpu(monkeypatch):
    """Pretend that there is a GPU of a name and compute capability."""

    def gpu(name: str, *capability: int) -> torch.device:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(fp8, "product_error", lambda _device, error=fp8.product_error: error(torch.device("cpu")))
        return torch.device("cuda")

    return gpu


def test_gpus_without_fp8_products_are_refused_in_one_line_that_says_what_works(gpu, monkeypatch):
    cpu = torch.device("cpu")
    assert [check_products(precision, torch.float32, cpu) for precision in ("bf16", "fp8-weights")] == ["", ""]
    with pytest.raises(InputError, match="^--base-precision fp8: .*such as an H100; bf16 and fp8-weights run here$"):
        check_products("fp8", torch.float32, cpu)
    with pytest.raises(InputError, match="^--base-precision fp8-backward: A100 has no .*; bf16 and fp8-weights run he"):
        check_products("fp8-backward", torch.bfloat16, gpu("A100", 8, 0))
    assert check_products("fp8", torch.bfloat16, gpu("H100", 9, 0)) == ""
    for newer in (gpu("L40S", 8, 9), gpu("B200", 10, 0)):
        assert "was never run on a GPU such as" in check_products("fp8", torch.bfloat16, newer)
    with pytest.raises(InputError, match="leave --dtype at auto"):
        check_products("fp8", torch.float32, gpu("H100", 9, 0))


def test_a_gpu_whose_product_is_wrong_or_missing_is_refused(gpu, monkeypatch):
    """One that has a scale for the whole matrix is far off, one that exchanges the operands' scales too."""

    def by_tensor(a, a_scales, b, b_scales, dtype):
        return multiply(a, a_scales.amax().expand_as(a_scales), b, b_scales, dtype)

    def no_kernel(*_):
        raise RuntimeError("no kernel for sm_120")

    device = gpu("B200", 10, 0)
    assert fp8.product_error(torch.device("cpu")) < 0.006  # rounding to bfloat16
    monkeypatch.setattr(fp8, "multiply", by_tensor)
    with pytest.raises(InputError, match="products are .*% off; bf16 and"):
        check_products("fp8", torch.bfloat16, device)
    monkeypatch.setattr(fp8, "multiply", no_kernel)
    with pytest.raises(InputError, match="no kernel for sm_120; bf16 and fp8-weights run here"):
        check_products("fp8", torch.bfloat16, device)
