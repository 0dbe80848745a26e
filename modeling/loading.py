"""Model folders: finding a model on the disk or the hub, and refusing one that this program can't train."""

import hashlib
import json
import re
import textwrap
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText

from common import InputError

MODEL_TYPES = {"qwen2_vl": "Qwen2-VL", "qwen2_5_vl": "Qwen2.5-VL", "qwen3_vl": "Qwen3-VL", "qwen3_5": "Qwen3.5"}
HASHED = 32  # weights, at least, where there are as many
INDEX = "model.safetensors.index.json"  # names the files of weights where they are several
# The files of a model, besides weights and text, that transformers or this program reads where they are there.
READ_FILES = (
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "chat_template.json", "preprocessor_config.json", "processor_config.json"),
    *("video_preprocessor_config.json", INDEX),
)
TIED = {"lm_head.weight", "model.language_model.embed_tokens.weight"}  # where they are one, files may hold either
LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # begins what a clone without Git LFS has for a large file


def resolve_model(name: str, weights: bool = True) -> str:
    """The folder of a model that is named by its folder or its hub name; from the hub it is downloaded into the cache.

    With `weights=False`, weight files are neither downloaded nor required. Raises InputError for a model that this
    program can't train, before its weights are downloaded, and for a folder or a cache that lacks files, holds damaged
    ones, holds an adapter, or holds weights that are not those of the model in config.json.
    """
    is_folder = Path(name).is_dir()
    if not is_folder and not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name):
        raise InputError(f"model {name}: there is no such folder, and it is not a hub name either")
    folder = name if is_folder else _download(name, allow_patterns="config.json")
    config = Path(folder) / "config.json"
    if not config.is_file():
        raise InputError(f"model {name} has no config.json\n  {_remedy(name)}")
    _check_file(name, config)
    if problem := _unsupported(json.loads(config.read_text(encoding="utf-8"))):
        known = ", ".join(f"{family} ({kind})" for kind, family in MODEL_TYPES.items())
        what = f"this program trains dense models only, in full precision or in FP8 blocks:\n  {known}"
        raise InputError(f"model {name} {problem}\n  {what}")
    if not is_folder:
        folder = _download(name, **({} if weights else {"allow_patterns": ["*.json", "*.txt", "*.jinja"]}))
    _check_folder(name, Path(folder), weights)
    model = _empty_model(name, folder)
    if weights:
        _check_weights(name, folder, model)
    return folder


def _download(name: str, **files) -> str:
    try:
        return snapshot_download(name, **files)
    except OSError as error:  # no such model, none that this user may have, no network, a full disk
        raise InputError(
            f"model {name} can't be downloaded and is not in the cache\n"
            f"  on a machine with internet: hf download {name}; or give a model's folder\n{_wrapped(error)}"
        ) from None


def _wrapped(error: Exception) -> str:
    """An error's message as lines of at most 100 columns."""
    return textwrap.fill(" ".join(str(error).split()), 100, initial_indent="  ", subsequent_indent="  ")


def _remedy(name: str, again: bool = False) -> str:
    """How to get a model's files, or to get one of them `again`."""
    if Path(name).is_dir():
        return "copy or download it again" if again else "copy or download all of its files"
    return f"on a machine with internet: hf download {name}{' --force-download' if again else ''}"


def _check_folder(name: str, folder: Path, weights: bool) -> None:
    """Raise InputError where a model's files are not all there and whole, or where an adapter lies among them."""
    if (folder / "adapter_config.json").is_file():  # transformers loads it with the weights, without a word
        raise InputError(
            f"model {name} also holds an adapter, adapter_config.json, which would be added to its weights\n"
            "  move adapter_config.json and adapter_model.safetensors elsewhere, or name the base model by\n"
            "  --model and the adapter by --init-from or eval.py --adapter"
        )
    for path in (folder / file for file in READ_FILES):
        if path.is_file():
            _check_file(name, path)
    if missing := _missing(folder, weights):
        raise InputError(f"model {name} has no {missing}\n  {_remedy(name)}")
    for path in weight_files(folder) if weights else ():
        _check_file(name, path)


def _check_file(name: str, path: Path) -> None:
    """Raise InputError for a damaged JSON file or file of weights. Of weights it reads the header only, from which
    safetensors knows how long the file must be."""
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            remedy = "run git lfs pull in its folder, or download it again by hf download"
            raise InputError(f"model {name} has a Git LFS pointer in place of {path.name}\n  {remedy}")
    try:
        if path.suffix == ".json":
            content = json.loads(path.read_text(encoding="utf-8"))
            if path.name == INDEX and "weight_map" not in content:
                raise ValueError("it has no weight_map")
        else:
            with safe_open(path, "pt"):
                pass
    except (ValueError, SafetensorError) as error:
        remedy = _remedy(name, again=True)
        raise InputError(f"model {name} has a damaged {path.name}\n  {remedy}\n  {error}") from None


def _empty_model(name: str, folder: str) -> nn.Module:
    """The model that config.json describes, without memory for weights. Raises InputError where there can be none."""
    try:
        with torch.device("meta"):
            return AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
    except Exception as error:  # whatever transformers and torch raise over a configuration
        raise InputError(
            f"transformers can't use config.json of model {name}\n  {_remedy(name, again=True)}\n"
            f"  {type(error).__name__}:\n{_wrapped(error)}"
        ) from None


def _check_weights(name: str, folder: str, model: nn.Module) -> None:
    """Raise InputError where weights are not those of `model`. transformers would begin with random numbers where some
    are missing, and leave out layers that are too many."""
    expected = {key: list(weight.shape) for key, weight in model.state_dict().items()}
    found = {key: place.shape for key, place in weight_places(folder).items()}
    missing = expected.keys() - found.keys()
    if model.lm_head.weight is model.get_input_embeddings().weight and len(missing & TIED) == 1:
        missing -= TIED
    layers = set(map(_layer, expected))
    problems = chain(
        (f"{len(missing):,} are missing, the first is {key}" for key in sorted(missing)),
        (f"{key} belongs to a layer that config.json does not have" for key in found if _layer(key) not in layers),
        (f"{key} is {found[key]}, not {sizes}" for key, sizes in expected.items() if found.get(key, sizes) != sizes),
    )
    if problem := next(problems, ""):
        raise InputError(
            f"the weights of model {name} do not fit its config.json\n  {problem}\n  {_remedy(name, again=True)}"
        )


def _layer(key: str) -> str:
    """The layer or block that a weight belongs to; empty for other weights."""
    found = re.match(r"model\.(language_model\.layers|visual\.blocks)\.\d+\.", key)
    return found[0] if found else ""


def _missing(folder: Path, weights: bool) -> str:
    """Which file a model's folder lacks; empty when it is complete."""
    wanted = [("tokenizer.json", "vocab.json"), ("preprocessor_config.json", "processor_config.json")]
    if weights:
        wanted.append(("model.safetensors", INDEX))
        if (folder / INDEX).is_file():
            wanted += [(part,) for part in _indexed(folder)]
    lacking = (names for names in wanted if not any((folder / name).is_file() for name in names))
    return " or ".join(next(lacking, ()))


def _unsupported(config: dict) -> str:
    """Why this program can't train the model with this configuration; empty when it can."""
    kind = str(config.get("model_type"))
    if kind not in MODEL_TYPES:
        return f"is of type {kind}{', a mixture of experts' if 'moe' in kind else ''}"
    if "quantization_config" in config and not fp8_blocks(config["quantization_config"]):
        return "has quantized weights"
    if (config | (config.get("text_config") or {})).get("use_sliding_window"):
        return "attends within a sliding window"
    return ""


def fp8_blocks(quantization: dict | None) -> list[int]:
    """Rows and columns of the blocks of a model that was published in FP8, from the `quantization_config` of its
    config.json; empty for other models. The format: docs/source/en/quantization/finegrained_fp8.md of transformers."""
    known = {"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "float"}
    if not quantization or any(quantization.get(name, value) != value for name, value in known.items()):
        return []
    return quantization.get("weight_block_size") or []


def check_precision(model_type: str, precision: str) -> None:
    """Raise InputError for a --base-precision that was not tried on a model's family."""
    if precision != "bf16" and model_type == "qwen3_5":
        raise InputError(f"--base-precision {precision}: {MODEL_TYPES[model_type]} runs in bf16 only")


def fingerprint(folder: str) -> str:
    """Changes with the model's configuration and the names and sizes of its weight files, not with where they lie."""
    digest = hashlib.sha256((Path(folder) / "config.json").read_bytes())
    for path in sorted(Path(folder).glob("*.safetensors")):
        digest.update(f"{path.name} {path.stat().st_size}".encode())
    return digest.hexdigest()[:16]


# ------------------------------------------------------------------------------------------------------- weight files


def model_name(name: str) -> str:
    """A weight's or layer's name in transformers 5, whatever version wrote it: older ones put the language model under
    `model`, or `language_model.model`, and the vision tower under `visual`."""
    parts = "visual|layers|embed_tokens|norm|lm_head"
    rest = re.sub(rf"^(model\.)?(language_model\.)?(model\.)?(?=({parts})(\.|$))", "", name)
    prefixes = dict.fromkeys(parts.split("|"), "model.language_model.") | {"visual": "model.", "lm_head": ""}
    return prefixes.get(rest.partition(".")[0], "") + rest


def weight_files(folder: str) -> list[Path]:
    """The files of a model's weights, as transformers chooses them: one, or those that the index names."""
    whole = Path(folder) / "model.safetensors"
    return [whole] if whole.is_file() else [whole.with_name(name) for name in _indexed(Path(folder))]


def _indexed(folder: Path) -> list[str]:
    """The names of the files that the index names."""
    return sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))


class Place(NamedTuple):
    """Where a weight is."""

    path: Path
    name: str  # in that file
    shape: list[int]


def weight_places(folder: str) -> dict[str, Place]:
    """The place of each weight, by its name in transformers 5."""
    places = {}
    for path in weight_files(folder):
        with safe_open(path, "pt") as file:
            places |= {model_name(name): Place(path, name, file.get_slice(name).get_shape()) for name in file.keys()}
    return places


def weights_hashes(folder: str) -> dict[str, str]:
    """Hashes of the first numbers of weights, rounded to bfloat16: of a few in all layers, and of all outside layers
    but lm_head, which files may lack.

    They tell models of the same sizes apart, but not files of another type, division or version.
    """
    places = weight_places(folder)
    inside = sorted(name for name in places if _layer(name) and name.endswith("weight"))
    outside = sorted(name for name in places if name.startswith("model.") and not _layer(name))
    few = inside[:: max(1, len(inside) // HASHED)]
    return {"base weights in layers": _hash(places, few), "base weights outside layers": _hash(places, outside)}


def _hash(places: dict[str, Place], names: list[str]) -> str:
    digest = hashlib.sha256()
    with ExitStack() as stack:
        files = {path: stack.enter_context(safe_open(path, "pt")) for path in {places[name].path for name in names}}
        for name in names:
            weight = files[places[name].path].get_slice(places[name].name)
            first = weight[:1] if len(places[name].shape) > 1 else weight[:]
            first = first.flatten()[:256].to(torch.bfloat16)
            digest.update(name.encode() + first.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
