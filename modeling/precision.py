"""The values of --base-precision: how the frozen linear layers of the language model are kept and multiplied.

| value | forward | gradient of the input | bytes per weight |
|---|---|---|---|
| bf16 | in the model's type | in the model's type | 2 |
| fp8-backward | in the model's type | FP8 product | 2: rounded to FP8 anew in each backward pass |
| fp8 | FP8 product | FP8 product | 2: two layouts in FP8 |
| fp8-weights | in the model's type, of rounded weights | likewise | 1 |
"""

BYTES_PER_WEIGHT = {"bf16": 2, "fp8-backward": 2, "fp8": 2, "fp8-weights": 1}
PRECISIONS = tuple(BYTES_PER_WEIGHT)
# They round each token's gradient. A prefix's gradient is the sum over its branches, and rounding a sum is not summing
# what was rounded: if trees were cut over ranks, the number of ranks would change what a step learns.
ROUNDED_GRADIENTS = ("fp8-backward", "fp8")


def forward_precision(precision: str) -> str:
    """What a model that was trained at a precision is evaluated at: only the backward pass of fp8-backward differs."""
    return "bf16" if precision == "fp8-backward" else precision
