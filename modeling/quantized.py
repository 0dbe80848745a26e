"""Loading a model whose decoder layers are quantized, or turned back into numbers, one after the other as they are
read: only the layer at hand is ever in memory in a second type."""

import copy

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForImageTextToText, PretrainedConfig

from common import InputError
from modeling.fp8 import E4M3, dequantize_blocks
from modeling.linear import quantize_layer
from modeling.loading import weight_places

SCALES = "_scale_inv"  # what follows a weight's name in that of its blocks' scales: factors, despite the name


def without_layers(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration of the same model without decoder layers: transformers loads the rest of it."""
    config = copy.deepcopy(config)
    config.text_config.num_hidden_layers = 0
    if getattr(config.text_config, "layer_types", None):
        config.text_config.layer_types = []
    return config


def add_quantized_layers(
    rest: nn.Module,
    folder: str,
    config: PretrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    precision: str,
    block: list[int],
) -> nn.Module:
    """The whole model, from one that was loaded without decoder layers. `block`: of weights that were published in FP8
    (`modeling.loading.fp8_blocks`). Raises InputError for FP8 outside the decoder layers, or without its scales."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.model.visual, model.lm_head, model.generation_config = rest.model.visual, rest.lm_head, rest.generation_config
    language_model = model.model.language_model
    for name, module in rest.model.language_model.named_children():
        if name != "layers":
            setattr(language_model, name, module)
    places = weight_places(folder)
    if elsewhere := [name for name in places if name.endswith(SCALES) and ".language_model.layers." not in name]:
        what = "FP8 outside the language model's layers, which is not supported"
        raise InputError(f"model {folder} has {what}:\n  {elsewhere[0]}")
    for number, layer in enumerate(language_model.layers):
        _fill(layer, f"model.language_model.layers.{number}.", places, dtype, device, block)
        quantize_layer(layer.requires_grad_(False), precision)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what quantizing took would count as used when a memory budget is chosen
    return model.eval()


def _fill(
    layer: nn.Module, prefix: str, places: dict, dtype: torch.dtype, device: torch.device, block: list[int]
) -> None:
    """Give a decoder layer on `meta` the weights of its files."""
    for name in dict(layer.named_parameters()):
        weight = _read(prefix + name, places, device)
        if weight.dtype == E4M3:
            weight = dequantize_blocks(weight, _read(prefix + name + SCALES, places, device), block)
        owner, _, kind = name.rpartition(".")
        setattr(layer.get_submodule(owner), kind, nn.Parameter(weight.to(dtype), requires_grad=False))


def _read(name: str, places: dict, device: torch.device) -> torch.Tensor:
    if name not in places:
        folder = next(iter(places.values())).path.parent
        raise InputError(f"model {folder} has no weights {name}: copy or download it again")
    path, own, _ = places[name]
    with safe_open(path, "pt", device=str(device)) as file:
        return file.get_tensor(own)
