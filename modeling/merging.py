"""A merged model's folder: the base model's files as they are, apart from the weights and settings that must change."""

import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from common import InputError
from modeling.loading import INDEX, model_name, weight_files

# Weights in other forms, which would still be the base model's, and what remains of a training run
WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx"}
PROMPTS_FILE = "onelook.json"  # how the run of a merged model put its questions
NOT_COPIED = {"README.md", "manifest.json", PROMPTS_FILE}
TEMPLATES = "additional_chat_templates"  # a folder of the tokenizer's
DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}  # as safetensors calls them
LIMITS = {"min_pixels": 0, "shortest_edge": 0, "max_pixels": 1, "longest_edge": 1}  # name -> index in (least, most)


def weights_dtype(folder: str) -> torch.dtype:
    """The type of most numbers in a model's weights, whatever its configuration says. Reads the files' headers."""
    sizes = Counter()
    for path in weight_files(folder):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                weight = file.get_slice(name)
                sizes[weight.get_dtype()] += math.prod(weight.get_shape())
    return max(DTYPES, key=lambda dtype: sizes[DTYPES[dtype]])


def write_weights(folder: str, model: PeftModel, merge: Callable, out: Path, to_float32: bool) -> None:
    """Write the base model's files of weights, with the same names and types, and LoRA added to those it is on.

    `merge(layer)` adds a layer's LoRA to its base weight. Sums are in float32, rounded once to the type in the file, or
    kept with `to_float32`. The model loses the weights that LoRA is on. Raises InputError if one of them is in no file.
    """
    layers = {name: m for name, m in model.get_base_model().named_modules() if isinstance(m, LoraLayer)}
    missing, size = set(layers), 0
    for path in weight_files(folder):
        tensors = {}
        with safe_open(path, "pt") as file:
            for name in file.keys():
                weight = file.get_tensor(name)
                layer, _, kind = model_name(name).rpartition(".")
                keep = torch.float32 if to_float32 and weight.is_floating_point() else weight.dtype
                if layer in layers and kind == "weight":
                    weight = _merged(layers[layer], weight, merge)
                    missing.discard(layer)
                tensors[name] = weight.to(keep)
            metadata = file.metadata() or {"format": "pt"}
        size += sum(tensor.nbytes for tensor in tensors.values())
        save_file(tensors, out / path.name, metadata)
    if missing:
        raise InputError(f"{folder}: its files hold no weights of {min(missing)}, which the adapter changes")
    if (out / INDEX).is_file():
        index = json.loads((out / INDEX).read_text())
        index.setdefault("metadata", {})["total_size"] = size
        (out / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _merged(layer: LoraLayer, weight: torch.Tensor, merge: Callable) -> torch.Tensor:
    """The weight of a file with a layer's LoRA, in float32."""
    base = layer.get_base_layer()
    base.weight = nn.Parameter(weight.to(base.weight.device, torch.float32), requires_grad=False)
    merge(layer)
    merged, base.weight = base.weight.cpu(), None  # as float32 they would not all have room on a GPU
    return merged


def copy_files(folder: str, out: Path, to_float32: bool) -> None:
    """Copy all that is not weights: configuration, tokenizer and chat template, byte for byte.

    With `to_float32`, the types that config.json names become float32, and nothing else of its text changes: a file
    that the installed transformers wrote anew would not be read by older ones, or by vLLM.
    """
    out.mkdir(parents=True, exist_ok=True)
    used = "" if (Path(folder) / "model.safetensors").is_file() else INDEX  # else of files that are not written
    for path in Path(folder).iterdir():
        is_settings = path.suffix not in WEIGHTS and path.name not in NOT_COPIED and not path.name.startswith(".")
        if path.is_file() and is_settings and (path.name == used or not path.name.endswith(".index.json")):
            shutil.copyfile(path, out / path.name)  # not its permissions: those in a cache may be the owner's alone
        elif path.name == TEMPLATES:
            shutil.copytree(path, out / path.name, copy_function=shutil.copyfile)
    if to_float32:
        config = (out / "config.json").read_bytes()
        named = rb'("(?:torch_)?dtype"\s*:\s*")(?:torch\.)?b?float\d+(")'
        (out / "config.json").write_bytes(re.sub(named, rb"\g<1>float32\g<2>", config))


def set_pixel_limits(out: Path, limits: tuple[int, int]) -> None:
    """Make these the least and most pixels of an image in a folder's image processor, by the names in its file."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        path = out / name
        settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        image = settings.get("image_processor", {}) if name == "processor_config.json" else settings
        if not image:
            continue
        size = image["size"] if isinstance(image.get("size"), dict) else {}
        used = {key for place in (image, size) for key, end in LIMITS.items() if place.get(key) is not None}
        for place in (image, size):
            place.update({key: limits[end] for key, end in LIMITS.items() if place.get(key) is not None})
        if len({LIMITS[key] for key in used}) < 2:
            image["size"] = {"shortest_edge": limits[0], "longest_edge": limits[1]}
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def set_end_tokens(out: Path, ends: list[int]) -> None:
    """Make generation end at these tokens. A file that names them already stays as it is."""
    path = out / "generation_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    named = settings.get("eos_token_id")
    if set(ends) != set(named if isinstance(named, list) else [named]):
        settings["eos_token_id"] = ends
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
