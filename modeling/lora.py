"""LoRA: PEFT makes, saves and loads the weights; its forward pass is replaced by one with fewer and smaller kernels."""

import json
import re
import types
import warnings
from collections import defaultdict
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import Linear as LoraLinear
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from common import InputError, quote
from modeling.adapters import KEEPS_BASE, lora_config, peft_name
from modeling.dropout import input_name, use_place_dropout
from modeling.linear import linear_with_lora
from modeling.targets import AUTO, module_suffixes, resolve_targets, target_pattern


class SharedInput:
    """LoRA layers of one module, their parent, that get the same input x, as q, k and v do. While the parent runs, the
    first of them to be called computes drop(x) A' for all. Called outside their parent, each computes its own. Nothing
    is kept once each has got its product, or the parent has returned."""

    def __init__(self, layers: list[LoraLinear]):
        self.layers = layers
        self.close()

    def close(self) -> None:
        self.is_open, self.x, self.products = False, None, {}  # products: (T, r) by a layer's place, of x


def use_lean_lora(model: PeftModel) -> PeftModel:
    """Give every LoRA layer but DoRA's the forward x W' + bias + s drop(x) A' B', with float32 A and B cast once to
    W's type."""
    by_input = defaultdict(list)
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLinear) and not layer.lora_variant:
            layer.forward = types.MethodType(_lean_forward, layer)
            by_input[input_name(name)].append(layer)
    for name, layers in by_input.items():
        group = SharedInput(layers)
        for place, layer in enumerate(layers):
            layer.shared_input, layer.place = group, place
        if len(layers) > 1:
            parent = model.get_submodule(name.rpartition(".")[0])
            parent.shared_input, parent.own_forward = group, parent.forward
            parent.forward = types.MethodType(_forward_with_shared_input, parent)
    return model


def _forward_with_shared_input(parent: nn.Module, *args, **kwargs):
    parent.shared_input.is_open = True
    try:
        return parent.own_forward(*args, **kwargs)
    finally:  # also when memory runs out: a product's graph holds all activations before it
        parent.shared_input.close()


def _lean_forward(layer: LoraLinear, x: torch.Tensor) -> torch.Tensor:
    base = layer.base_layer
    if layer.disable_adapters or layer.merged:  # evaluation of the base model, and after merge_lora
        return base(x)
    dtype = base.weight.dtype if base.weight.is_floating_point() else x.dtype  # codes are bytes
    rows = x.flatten(0, -2).to(dtype)  # (T, in)
    # The scale goes into B, of (out, r) numbers, not into the result, of (T, out).
    b = (layer.lora_B["default"].weight * layer.scaling["default"]).to(dtype)  # (out, r)
    return linear_with_lora(base, rows, _low_product(layer, x, rows), b).unflatten(0, x.shape[:-1])


def _low_product(layer: LoraLinear, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """drop(rows) A' (T, r), of the rows (T, in) of x."""
    group = layer.shared_input
    if not group.is_open:
        return _low_products([layer], rows)[0]
    if group.x is not x:
        group.x, group.products = x, dict(enumerate(_low_products(group.layers, rows)))
    product = group.products.pop(layer.place)
    if not group.products:
        # Not left to the parent: compiled code loses what is changed after FlexAttention in an object that was changed
        # before it (torch 2.13). Layers would keep x and products, give them gradients of 0, and be compiled twice.
        group.close()
    return product


def _low_products(layers: list[LoraLinear], rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """drop(rows) A' (T, r) of each layer, as columns of one product: dropout and product read the rows once."""
    matrices = [layer.lora_A["default"].weight for layer in layers]  # (r, in)
    a = torch.cat(matrices).to(rows.dtype)
    return (layers[0].lora_dropout["default"](rows) @ a.T).split([len(matrix) for matrix in matrices], dim=1)


# ------------------------------------------------------------------------------------------ adapters: make, save, load


def add_lora(
    base: nn.Module, name: str, r: int, alpha: float, dropout: float, targets=AUTO, rslora=False, dora=False
) -> PeftModel:
    """Add float32 LoRA to the linear layers that `targets` names, and to no others. Raises InputError if a part of
    `targets` names no layer, or something else too."""
    linear, matched = {n for n, module in base.named_modules() if isinstance(module, nn.Linear)}, set()
    for part in resolve_targets(targets, base.config.model_type).split(","):
        names = {n for n, _ in base.named_modules() if re.fullmatch(target_pattern(part), n)}
        if not names or names - linear:
            known = sorted({n.rpartition(".")[2] for n in linear if n.startswith("model.language_model.")})
            what = f"names {min(names - linear)} too" if names else "names nothing"
            raise InputError(f"--lora-targets: {quote(part)} {what}; linear layers: {', '.join(known)}, vision, merger")
        matched |= names
    options = dict(r=r, lora_alpha=alpha, lora_dropout=dropout, use_rslora=rslora, use_dora=dora)
    suffixes, excluded = module_suffixes(matched, {n for n, _ in base.named_modules()} - matched)
    model = _with_lora(base, LoraConfig(target_modules=suffixes, exclude_modules=excluded, **options))
    config = model.peft_config["default"]
    config.base_model_name_or_path = name  # as given: a hub name works elsewhere
    config.target_modules = suffixes  # PEFT holds a set, and would write it in another order every time
    assert sum(count for count, _ in lora_table(model).values()) == len(matched), lora_table(model)
    visual = base.model.visual
    if trains(visual) and "cudnn" in visual.config._attn_implementation:  # our cuDNN operation has no backward
        visual.config._attn_implementation = "onelook_flash_vision"
    use_place_dropout(model)
    return use_lean_lora(model)


def _with_lora(base: nn.Module, config: LoraConfig) -> PeftModel:
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # PEFT uses a name that transformers drops
        return get_peft_model(base, config)


def trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def lora_table(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Modules and parameters that are trained, by kind of layer. Anything trained must be LoRA."""
    table = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            match = re.search(r"model\.(language_model|visual)\.(.+)\.lora_(A|B|magnitude_vector)\.", name)
            assert match and parameter.dtype == torch.float32, f"{name} ({parameter.dtype}) should not be trained"
            path = re.sub(r"\.\d+", "", match[2])
            kind = path.rpartition(".")[2] if match[1] == "language_model" else f"visual.{path}"
            count, size = table.get(kind, (0, 0))
            table[kind] = (count + (match[3] == "A"), size + parameter.numel())
    return table


def lora_differences(model: PeftModel, folder: Path) -> list[str]:
    """Why an adapter folder's weights can't be this model's LoRA: where settings or layers differ; empty if nowhere."""
    # Shapes are read from the file's header: no weight is loaded to compare them.
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        if not (folder / name).is_file():
            return [f"it holds no {name}"]
    try:
        other = json.loads((folder / "adapter_config.json").read_text())
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            there = {peft_name(name): tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except (ValueError, SafetensorError) as error:
        return [f"it is damaged: {error}"]
    own = model.peft_config["default"].to_dict()
    names = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
    differences = [
        f"{name} is {quote(other.get(name))} there, {quote(own[name])} here"
        for name in names
        if (other.get(name) or 0) != (own[name] or 0)
    ]
    if (start := other.get("init_lora_weights", True)) not in KEEPS_BASE:
        differences.append(f"init_lora_weights is {quote(start)} there, which changes the base model's weights too")
    here = {name: tuple(value.shape) for name, value in get_peft_model_state_dict(model).items()}
    for where, names in (("there", there.keys() - here.keys()), ("here", here.keys() - there.keys())):
        differences += [f"only {where}: {min(names)} and {len(names) - 1:,} more"] if names else []
    if not differences and here != there:
        differences = ["the base models differ in size"]
    return differences


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Write a plain PEFT adapter folder."""
    model.save_pretrained(folder, save_embedding_layers=False)


def load_lora(model: PeftModel, folder: Path) -> None:
    """Give a model's LoRA the weights of an adapter folder, whose layers it must have."""
    weights = {peft_name(name): weight for name, weight in load_file(folder / "adapter_model.safetensors").items()}
    result = set_peft_model_state_dict(model, weights)
    assert not result.unexpected_keys and not any("lora_" in name for name in result.missing_keys), result


def load_adapter(base: nn.Module, folder: Path) -> PeftModel:
    """The model with a folder's adapter, for inference. Raises InputError for an adapter that can't be run, or of a
    model of other layers or sizes."""
    model = _with_lora(base, lora_config(folder, base))
    try:
        load_lora(model, folder)
    except RuntimeError as error:
        if not (mismatch := re.search("size mismatch.*", str(error))):
            raise
        raise InputError(f"{folder} does not fit this base model, leave out --model: {mismatch[0]}") from None
    return use_lean_lora(model)


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Add LoRA to the base weights in float32, rounded once to their type. From then on the layers skip their LoRA.

    model: or any part of it.
    """
    for layer in model.modules():
        if isinstance(layer, LoraLinear) and layer.lora_variant:
            layer.merge()
        elif isinstance(layer, LoraLinear):
            assert layer.base_layer.weight.is_floating_point(), "LoRA can't be added to codes"
            weight, delta = layer.base_layer.weight, layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            # A sum in bfloat16 would round the change away where it is far smaller than the weight.
            weight.copy_(weight.float() + layer.scaling["default"] * delta)
            layer.merged_adapters.append("default")
