"""Dropout of LoRA's inputs, whose masks follow from the place of a token in its tree, not from what runs beside it."""

import zlib

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from torch import nn

from inputs.positions import scramble

# Layers of the same parent that get the same input share its masks, and the product of LoRA with it.
SHARED_INPUTS = {name: "qkv" for name in ("q_proj", "k_proj", "v_proj")}
SHARED_INPUTS |= {name: "gate_up" for name in ("gate_proj", "up_proj")}
SHARED_INPUTS |= {f"in_proj_{name}": "in_proj" for name in ("qkv", "z", "a", "b")}


def input_name(layer: str) -> str:
    """What the input of the layer of this full name is called: the same for all layers that share it."""
    parent, _, own = layer.rpartition(".")
    return f"{parent}.{SHARED_INPUTS.get(own, own)}"


class RowKeys:
    """What the masks of the rows that LoRA layers get now are drawn from."""

    keys: torch.Tensor | None = None  # (rows,) int32: of tokens, patches or image tokens (see inputs.positions)
    of_image_tokens: torch.Tensor | None = None  # (I,) int32, for the mergers: each that of its first patch


class PlaceDropout(nn.Module):
    """Dropout of x (..., rows, width) by a hash of each row's key and each column's.

    A compiled backward pass may compute masks again. They follow from inputs of the layer and are the same there, while
    a random generator would give others (torch 2.13: gradients 45% off at a memory budget of 0).
    """

    def __init__(self, p: float, rows: RowKeys, name: str, width: int, device: torch.device):
        """`name`: of the input that is dropped. Each has masks of its own."""
        super().__init__()
        self.p, self.rows = p, rows
        # Hashed, not counted: keys of two rows that differ by a small number would give shifted or permuted masks.
        columns = scramble(scramble(torch.arange(width, dtype=torch.int32, device=device)) ^ _int32(name))
        self.register_buffer("columns", columns, persistent=False)  # (width,) int32

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        numbers = scramble(self.rows.keys[:, None] + self.columns)  # (rows, width) int32, uniform
        scale = 1 / (1 - self.p) if self.p < 1 else 0.0
        return torch.where(numbers < int((self.p - 0.5) * 2**32), 0, x * scale)


def _int32(name: str) -> int:
    return zlib.crc32(name.encode()) - 2**31


def use_place_dropout(model: PeftModel) -> None:
    """Replace the dropout of each LoRA layer, and have decoder layers and vision blocks say whose rows they get."""
    base, by_input, rows = model.get_base_model(), {}, RowKeys()
    for name, layer in base.named_modules():
        if isinstance(layer, LoraLinear) and isinstance(drop := layer.lora_dropout["default"], nn.Dropout):
            shared, weight = input_name(name), layer.base_layer.weight
            if shared not in by_input:
                by_input[shared] = PlaceDropout(drop.p, rows, shared, weight.shape[1], weight.device)
            layer.lora_dropout["default"] = by_input[shared]
    if not by_input:
        return
    base.dropout_rows, visual = rows, base.model.visual
    for layer in [*base.model.language_model.layers, *visual.blocks]:
        layer.dropout_rows = rows
        layer.register_forward_pre_hook(_take_row_keys, with_kwargs=True)
    for merger in [visual.merger, *getattr(visual, "deepstack_merger_list", [])]:
        merger.dropout_rows = rows
        merger.register_forward_pre_hook(_take_image_token_keys)


def _take_row_keys(layer: nn.Module, _args: tuple, kwargs: dict) -> None:
    # A compiled layer gets the keys as an argument: the length of an attribute's would be a constant there.
    if layer.training:
        layer.dropout_rows.keys = kwargs["dropout_keys"]


def _take_image_token_keys(merger: nn.Module, _args: tuple) -> None:
    merger.dropout_rows.keys = merger.dropout_rows.of_image_tokens
