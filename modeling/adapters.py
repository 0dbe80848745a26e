"""Adapter folders: what PEFT wrote, here or in another program, and what of it this program can run."""

import json
import re
from pathlib import Path

from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from torch import nn

from common import InputError, quote
from modeling.loading import model_name
from modeling.targets import module_suffixes

# PEFT's init_lora_weights that leave the base weights as they are
KEEPS_BASE = (True, False, "gaussian", "eva", "orthogonal")
# Settings of an adapter that are read here, or change nothing once it is trained. The last four are ms-swift's and
# Unsloth's.
KNOWN = {"peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision"}
KNOWN |= {"inference_mode", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern"}
KNOWN |= {"alpha_pattern", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
KNOWN |= {"init_lora_weights", "eva_config", "loftq_config", "runtime_config"}
KNOWN |= {"lora_dtype", "lorap_lr_ratio", "lorap_emb_lr", "unsloth_fixed"}
WEIGHT = re.compile(r"(?:base_model\.model\.)?(.+)\.(lora_A|lora_B|lora_magnitude_vector)(?:\.default)?(?:\.weight)?")
REMEDY = "merge it with the program that made it, and give the merged folder as --model"


def read_settings(folder: Path) -> dict:
    """An adapter's settings. Raises InputError for a folder that is none, and for what can't be run here, by name."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise InputError(f"{folder} is not an adapter's folder: it holds no {name}{_hint(folder, name)}")
    try:
        settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        kind, first = settings.get("peft_type"), settings.get("init_lora_weights", True)
    except (ValueError, AttributeError) as error:
        raise InputError(f"{folder} is damaged: adapter_config.json: {error}") from None
    if kind != "LORA":
        raise InputError(f"{folder} is an adapter of the kind {quote(kind)}, not LORA: {REMEDY}")
    if first not in KEEPS_BASE:
        changes = "changes the base model's weights too"
        raise InputError(f"{folder} has init_lora_weights {quote(first)}, which {changes}: {REMEDY}")
    if not isinstance(settings.get("lora_alpha"), int | float):
        raise InputError(f"{folder} is damaged: adapter_config.json has no lora_alpha")
    defaults = LoraConfig().to_dict()
    for name, value in settings.items():
        if name not in KNOWN and value and value != defaults.get(name):
            raise InputError(f"{folder} has {name} {quote(value)}, which is not supported: {REMEDY}")
    return settings


def base_name(folder: Path) -> str:
    """The base model that an adapter names. Raises InputError where it names none."""
    if name := read_settings(folder).get("base_model_name_or_path"):
        return name
    raise InputError(f"{folder} does not name its base model: give it by --model")


def _hint(folder: Path, missing: str) -> str:
    """What else may be meant by a folder that lacks a file of an adapter."""
    if not folder.is_dir():
        return ", there is no such folder"
    if (folder / "adapter_model.bin").is_file():
        return (
            ", but adapter_model.bin, a pickle, which could run code: load it where you trust it and save it again, "
            "PeftModel.from_pretrained(base, FOLDER).save_pretrained(NEW_FOLDER)"
        )
    if missing == "adapter_config.json" and (folder / "config.json").is_file():
        return "; a whole model is named by --model"
    below = sorted(path.parent.name for path in folder.glob(f"*/{missing}"))
    return f"; {', '.join(below[:5])} in it does: name one" if below else ""


def peft_name(name: str) -> str:
    """The name that PEFT and transformers 5 give to an adapter's weight; as it is where it is not LoRA's."""
    match = WEIGHT.fullmatch(name)
    if not match:
        return name
    ending = "" if match[2] == "lora_magnitude_vector" else ".weight"
    return f"base_model.model.{model_name(match[1])}.{match[2]}{ending}"


def read_layers(folder: Path) -> dict[str, dict[str, str]]:
    """Layer -> {"lora_A": name in the file, "lora_B": …}, of all layers with LoRA, named as in transformers 5.

    Reads the file's header alone. Raises InputError for a weight that is not LoRA's, or lacks its counterpart.
    """
    try:
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            sides = {name: len(file.get_slice(name).get_shape()) for name in file.keys()}
    except SafetensorError as error:
        raise InputError(f"{folder} is damaged: adapter_model.safetensors: {error}") from None
    layers, strange = {}, []
    for name, number in sides.items():
        match = WEIGHT.fullmatch(name)
        if match and number == (1 if match[2] == "lora_magnitude_vector" else 2):
            layers.setdefault(model_name(match[1]), {})[match[2]] = name
        else:
            strange.append(name)
    if strange:
        raise InputError(f"{folder}: {_example(strange)}: not LoRA of a linear layer, not supported: {REMEDY}")
    if half := [layer for layer, kinds in layers.items() if not kinds.keys() >= {"lora_A", "lora_B"}]:
        raise InputError(f"{folder} is damaged: {_example(half)}: one of lora_A and lora_B is missing")
    return layers


def lora_config(folder: Path, base: nn.Module) -> LoraConfig:
    """PEFT's settings for an adapter's layers, whose names, ranks and scales are those of its weights.

    Raises InputError where the base model lacks one of the layers.
    """
    settings, layers = read_settings(folder), read_layers(folder)
    linear = {name for name, module in base.named_modules() if isinstance(module, nn.Linear)}
    if lost := sorted(layers.keys() - linear):
        raise InputError(f"{folder} does not fit this base model, which has no linear layer {_example(lost)}")
    if "lm_head" in layers and base.get_output_embeddings().weight is base.get_input_embeddings().weight:
        raise InputError(f"{folder}: LoRA on lm_head, whose weights are the embeddings too, is not supported: {REMEDY}")
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        ranks = {layer: file.get_slice(kinds["lora_A"]).get_shape()[0] for layer, kinds in layers.items()}
    patterns = settings.get("alpha_pattern") or {}
    alphas = {}
    for layer, kinds in layers.items():  # patterns were written for the names in the file
        own = WEIGHT.fullmatch(kinds["lora_A"])[1]
        matching = (alpha for key, alpha in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", own))
        alphas[layer] = next(matching, settings["lora_alpha"])
    suffixes, excluded = module_suffixes(set(layers), {name for name, _ in base.named_modules()} - layers.keys())
    kept = {name: settings[name] for name in ("lora_alpha", "use_rslora", "use_dora") if name in settings}
    return LoraConfig(
        target_modules=suffixes,
        exclude_modules=excluded,
        r=min(ranks.values()),
        rank_pattern={re.escape(layer): rank for layer, rank in ranks.items() if rank != min(ranks.values())},
        alpha_pattern={re.escape(layer): alpha for layer, alpha in alphas.items() if alpha != settings["lora_alpha"]},
        inference_mode=True,
        **kept,
    )


def _example(names: list[str]) -> str:
    return f"{names[0]}{f' and {len(names) - 1:,} more' if len(names) > 1 else ''}"
