"""Model: Qwen2-VL, Qwen2.5-VL or Qwen3-VL with LoRA, run on trees.

The base model is transformers' own, unedited. It is given three things: a tree attention through
`AttentionInterface.register`, rotary positions, and image features that the vision tower makes once a tree.
"""

import hashlib
import json
import re
import types
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch._dynamo.config
import torch._functorch.config
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForImageTextToText
from transformers.utils.logging import disable_progress_bar

from common import InputError
from data import Batch
from inputs.images import ImageSettings
from inputs.vision_cache import FeatureWriter, VisionCache
from modeling.attention import tree_mask
from modeling.lora import draw_dropout_seeds, enable_hashed_dropout, use_lean_lora
from training.settings import DEFAULT_TARGETS

MODEL_TYPES = {"qwen2_vl": "Qwen2-VL", "qwen2_5_vl": "Qwen2.5-VL", "qwen3_vl": "Qwen3-VL"}
# parts of --lora-targets that are not the language model's
VISION_TARGETS = {
    "vision": r"model\.visual\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(linear_fc[12]|fc[12]|gate_proj|up_proj|down_proj))",
    "merger": r"model\.visual\.(merger|deepstack_merger_list\.\d+)\.(linear_fc[12]|mlp\.[02])",
}
# activation memory budget -> share of `kept_bytes` that is kept with dropout (without, less), seen on Qwen3-VL-8B with
# 2,900 to 8,126 tokens
MEMORY_BUDGETS = {1.0: 0.89, 0.5: 0.46, 0.2: 0.23, 0.0: 0.13}
MEMORY_MARGIN = 2 * 2**30, 0.05  # bytes for the vision tower, logits and optimizer; share of a card for fragmentation
KEEPS_BASE = (True, False, "gaussian", "eva", "orthogonal")  # PEFT's init_lora_weights that leave base weights alone
INDEX = "model.safetensors.index.json"  # names the files of weights where they are several
RECOMPILE_LIMIT = 32  # variants (first and other layers, training and evaluation, text and vision) share one function

# ----------------------------------------------------------------------------------------------------------- loading


def resolve_model(name: str, weights: bool = True) -> str:
    """The folder of a model given as a folder or a hub name, downloaded when it is not in the cache yet.

    Without `weights`: only its settings and its tokenizer. Raises InputError for a model that this program can't train,
    before its weights are downloaded.
    """
    is_folder = Path(name).is_dir()
    if not is_folder and not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name):
        raise InputError(f"model {name}: there is no such folder, and it is no name of a model on the hub")
    folder = name if is_folder else _download(name, allow_patterns="config.json")
    if problem := _unsupported(Path(folder) / "config.json"):
        known = ", ".join(f"{family} ({kind})" for kind, family in MODEL_TYPES.items())
        raise InputError(f"model {name} {problem}; this program trains dense, unquantized {known} only")
    if not is_folder:
        return _download(name, **({} if weights else {"allow_patterns": ["*.json", "*.txt", "*.jinja"]}))
    if missing := _missing(Path(folder), weights):
        raise InputError(f"model {name} has no {missing}: copy or download all of its files")
    return folder


def _download(name: str, **files) -> str:
    try:
        return snapshot_download(name, **files)
    except OSError as error:  # no such model, none that this user may have, no network, a full disk
        raise InputError(
            f"model {name} can't be downloaded and is not in the cache: {' '.join(str(error).split())}; on a machine "
            f"with internet: hf download {name}; or give a model's folder"
        ) from None


def _missing(folder: Path, weights: bool) -> str:
    """What a model's folder lacks; "" where it is whole."""
    wanted = [("tokenizer.json", "vocab.json"), ("preprocessor_config.json", "processor_config.json")]
    if weights:
        wanted.append(("model.safetensors", INDEX))
        if (folder / INDEX).is_file():
            wanted += sorted({(part,) for part in json.loads((folder / INDEX).read_text())["weight_map"].values()})
    lacking = (names for names in wanted if not any((folder / name).is_file() for name in names))
    return " or ".join(next(lacking, ()))


def _unsupported(path: Path) -> str:
    """What this program can't train of the model with this configuration file; "" where it can."""
    if not path.is_file():
        return "has no config.json"
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        return f"has a damaged config.json ({error})"
    kind = str(config.get("model_type"))
    if kind not in MODEL_TYPES:
        return f"is of type {kind}{', a mixture of experts' if 'moe' in kind else ''}"
    if "quantization_config" in config:
        return "has quantized weights"
    if (config | config.get("text_config", {})).get("use_sliding_window"):
        return "attends within a sliding window"
    return ""


def fingerprint(folder: str) -> str:
    """Changes with the model's configuration and the names and sizes of its weight files, not with where they lie."""
    digest = hashlib.sha256((Path(folder) / "config.json").read_bytes())
    for path in sorted(Path(folder).glob("*.safetensors")):
        digest.update(f"{path.name} {path.stat().st_size}".encode())
    return digest.hexdigest()[:16]


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)


def autocast(device: torch.device, dtype: torch.dtype):
    """Matrix products in `dtype`, LoRA weights and cross-entropy in float32; nothing to do when all is float32."""
    return torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext()


def load_base(folder: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Load the frozen base model straight onto `device`, from a folder that `resolve_model` gave. Raises InputError
    where its weights are damaged."""
    disable_progress_bar()  # one a rank, for seconds
    how = {"dtype": dtype, "device_map": {"": device}, "attn_implementation": "sdpa"}
    try:
        return prepare_base(AutoModelForImageTextToText.from_pretrained(folder, **how))
    except SafetensorError as error:
        raise InputError(f"model {folder} has damaged weights ({error}): copy or download them again") from None


def prepare_base(model: nn.Module) -> nn.Module:
    """Freeze a model and give this instance what makes it run trees, and run them without waiting for the GPU."""
    visual, language_model = model.model.visual, model.model.language_model
    visual.patch_embed.proj = PatchProjection(visual.patch_embed.proj)
    generation = torch.cuda.get_device_capability(visual.device)[0] if visual.device.type == "cuda" else 0
    tuned = generation == 9 and language_model.layers[0].self_attn.head_dim == 128 and visual.dtype != torch.float32
    language_model.config._attn_implementation = "onelook_tree_hopper" if tuned else "onelook_tree"
    if hasattr(language_model, "_deepstack_process"):
        language_model._deepstack_process = types.MethodType(_add_deepstack, language_model)
    language_model.layers[-1].forward = types.MethodType(_last_layer, language_model.layers[-1])
    if generation and visual.dtype != torch.float32:  # these kernels know half precision only
        # cuDNN's goes by whole images, and windows (Qwen2.5-VL) are smaller: flash takes what the layer asks for
        whole = generation >= 9 and not hasattr(visual.config, "window_size")
        visual.config._attn_implementation = "onelook_cudnn_flash_vision" if whole else "onelook_flash_vision"
    return model.requires_grad_(False)


def _last_layer(layer, hidden_states: torch.Tensor, wanted: torch.Tensor, **kwargs) -> torch.Tensor:
    """The last decoder layer (1, T, D) to (1, N, D): only the tokens `wanted` (N,) go on to its MLP and to the head."""
    attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **kwargs)
    hidden = (hidden_states + attended).index_select(1, wanted)
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))


def _add_deepstack(_language_model, hidden: torch.Tensor, image_at: torch.Tensor, features: torch.Tensor):
    """Add vision features (I, D) to (1, T, D) at image tokens: by index, where transformers' boolean mask would make
    the CPU wait for the GPU."""
    return hidden.index_add(1, image_at, features[None].to(hidden.dtype))


class PatchProjection(nn.Linear):
    """The vision tower's patch embedding as one matrix product: its Conv3d has stride = kernel, so the two are equal,
    and cuDNN's Conv3d is many times slower on some versions (pytorch#174051)."""

    def __init__(self, conv: nn.Conv3d):
        with torch.device("meta"):
            super().__init__(conv.weight[0].numel(), conv.out_channels)
        self.weight, self.bias = nn.Parameter(conv.weight.flatten(1)), conv.bias

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        return super().forward(patches.flatten(1))


def add_lora(
    base: nn.Module, name: str, r: int, alpha: float, dropout: float, targets=DEFAULT_TARGETS, rslora=False, dora=False
) -> PeftModel:
    """LoRA in float32 on the linear layers that `targets` names, and nowhere else. Raises InputError if a part of it
    names none."""
    linear, matched = {n for n, module in base.named_modules() if isinstance(module, nn.Linear)}, set()
    for part in targets.split(","):
        names = {n for n, _ in base.named_modules() if re.fullmatch(target_pattern(part), n)}
        if not names or names - linear:
            known = sorted({n.rpartition(".")[2] for n in linear if n.startswith("model.language_model.")})
            what = f"names {min(names - linear)} too" if names else "names nothing"
            raise InputError(f"--lora-targets: {part!r} {what}; linear layers: {', '.join(known)}, vision, merger")
        matched |= names
    how = dict(r=r, lora_alpha=alpha, lora_dropout=dropout, use_rslora=rslora, use_dora=dora)
    model = get_peft_model(base, LoraConfig(target_modules=target_pattern(targets), **how))
    model.peft_config["default"].base_model_name_or_path = name  # what others will load, not where it lies here
    assert sum(count for count, _ in lora_table(model).values()) == len(matched), lora_table(model)
    visual = base.model.visual
    if trains(visual) and "cudnn" in visual.config._attn_implementation:  # that operation has no backward
        visual.config._attn_implementation = "onelook_flash_vision"
    return use_lean_lora(model)


def target_pattern(targets: str) -> str:
    """--lora-targets as a regular expression of whole module names. What is not vision or merger is anchored to the
    language model: the vision tower has projections of the same names."""
    parts = targets.split(",")
    own = "|".join(part for part in parts if part not in VISION_TARGETS)
    patterns = [rf"model\.language_model\.(\w+\.)*({own})"] if own else []
    return "|".join(patterns + [VISION_TARGETS[part] for part in parts if part in VISION_TARGETS])


def names_vision(targets: str) -> bool:
    """Whether --lora-targets asks for the vision tower or its merger."""
    return not VISION_TARGETS.keys().isdisjoint(targets.split(","))


def trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def lora_table(model: nn.Module) -> dict[str, tuple[int, int]]:
    """What is trained: projection -> (modules, parameters). Raises AssertionError for anything that is not LoRA."""
    table = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found = re.search(r"model\.(language_model|visual)\.(.+)\.lora_(A|B|magnitude_vector)\.", name)
            assert found and parameter.dtype == torch.float32, f"{name} ({parameter.dtype}) should not be trained"
            path = re.sub(r"\.\d+", "", found[2])
            kind = path.rpartition(".")[2] if found[1] == "language_model" else f"visual.{path}"
            count, size = table.get(kind, (0, 0))
            table[kind] = (count + (found[3] == "A"), size + parameter.numel())
    return table


def lora_differences(model: PeftModel, folder: Path) -> list[str]:
    """Why an adapter folder's weights are not those of this model's LoRA: its settings or its layers differ."""
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        if not (folder / name).is_file():
            return [f"it holds no {name}"]
    try:
        other = json.loads((folder / "adapter_config.json").read_text())
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            there = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except (ValueError, SafetensorError) as error:
        return [f"it is damaged: {error}"]
    own = model.peft_config["default"].to_dict()
    names = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
    found = [f"{n} is {other.get(n)!r} there, {own[n]!r} here" for n in names if (other.get(n) or 0) != (own[n] or 0)]
    if (start := other.get("init_lora_weights", True)) not in KEEPS_BASE:
        found.append(f"init_lora_weights is {start!r} there, which changes the base model's weights too")
    here = {name: tuple(value.shape) for name, value in get_peft_model_state_dict(model).items()}
    for where, names in (("there", there.keys() - here.keys()), ("here", here.keys() - there.keys())):
        found += [f"only {where}: {min(names)} and {len(names) - 1:,} more"] if names else []
    if not found and here != there:
        found = ["the base models differ in size"]
    return found


def kept_bytes(config, tokens: int) -> int:
    """Activations that the decoder layers keep of `tokens` tokens, two bytes each: 8 of hidden and 3 of intermediate
    size a token and layer."""
    text = config.text_config
    return 2 * text.num_hidden_layers * tokens * (8 * text.hidden_size + 3 * text.intermediate_size)


def memory_margin(total: float) -> float:
    """Bytes that an estimate leaves free on a card of `total` bytes."""
    fixed, share = MEMORY_MARGIN
    return fixed + share * total


def choose_memory_budget(config, tokens: int, device: torch.device) -> float:
    """The highest memory budget at which a micro-batch of `tokens` tokens should fit beside what is allocated now.
    The rehearsal has the last word."""
    kept = kept_bytes(config, tokens)
    total = torch.cuda.get_device_properties(device).total_memory * torch.cuda.get_per_process_memory_fraction(device)
    free = min(total - torch.cuda.memory_allocated(device), torch.cuda.mem_get_info(device)[0])
    room = free - memory_margin(total)
    fitting = [budget for budget, share in MEMORY_BUDGETS.items() if share * kept < room]
    return fitting[0] if fitting else min(MEMORY_BUDGETS)


def compile_layers(model: PeftModel, memory_budget: float, backend: str = "inductor") -> None:
    """Compile each decoder layer and vision block in place, for any length; names and checkpoints stay as they are.

    `memory_budget` is the share of activations kept for the backward pass, the rest being computed again: 1 is fastest.
    """
    torch._dynamo.reset()  # of a budget that did not fit
    torch._functorch.config.activation_memory_budget = memory_budget
    # dropped inputs are cheap to make again, and a quarter of what would be kept
    torch._functorch.config.ban_recompute_materialized_backward = False
    torch._functorch.config.ban_recompute_used_far_apart = False
    torch._functorch.config.is_non_builtin_to_include = True  # `lora_linear` is as dear as the product inside it
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    torch._dynamo.config.optimize_ddp = False  # it splits graphs at DDP's buckets and can't split FlexAttention
    enable_hashed_dropout(model)
    base = model.get_base_model().model
    blocks = base.visual.blocks if "flash" in base.visual.config._attn_implementation else []
    for layer in [*base.language_model.layers, *blocks]:
        layer.compile(dynamic=True, backend=backend)


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Write a plain PEFT adapter folder."""
    model.save_pretrained(folder, save_embedding_layers=False)


def load_lora(model: PeftModel, folder: Path) -> None:
    """Give a model's LoRA the weights of an adapter folder."""
    set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))


def load_adapter(base: nn.Module, folder: Path) -> PeftModel:
    """Raises InputError for an adapter of a model of other sizes."""
    try:
        return use_lean_lora(PeftModel.from_pretrained(base, folder))
    except RuntimeError as error:
        if not (mismatch := re.search("size mismatch.*", str(error))):
            raise
        raise InputError(f"{folder} does not fit this base model, leave out --model: {mismatch[0]}") from None


# ------------------------------------------------------------------------------------------------------ running trees


@dataclass
class Features:
    """What the vision tower makes of a batch's images, I tokens in all, in the order of `Batch.image_at`."""

    embeds: torch.Tensor  # (I, D)
    deepstack: list[torch.Tensor]  # each (I, D), added after the first decoder layers; empty but for Qwen3-VL


class TreeModel(nn.Module):
    """A (LoRA-wrapped) model that runs a packed `Batch` of trees."""

    def __init__(self, model: nn.Module, settings: ImageSettings, cache: VisionCache | None = None):
        super().__init__()
        self.model = model
        self.settings = settings
        self.cache, self.writer = cache, FeatureWriter(cache) if cache else None
        self.trains_vision = trains(self.base.model.visual)
        self.train()

    def train(self, mode: bool = True) -> "TreeModel":
        super().train(mode)
        if not self.trains_vision:
            self.base.model.visual.eval()  # frozen: one mode, compiled once
        return self

    @property
    def base(self) -> nn.Module:
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    def frozen_features(self, batch: Batch) -> Features | None:
        """What a frozen vision tower makes of the images, or made in an earlier epoch, outside of DDP. None where it is
        trained: then `forward` runs it."""
        if self.trains_vision:
            return None
        if batch.features is not None:
            return Features(batch.features[0], list(batch.features[1:]))
        features = self.encode_images(batch)
        if batch.cache_names:
            self.writer.put(batch.cache_names, batch.image_tokens, torch.stack([features.embeds, *features.deepstack]))
        return features

    def encode_images(self, batch: Batch) -> Features | None:
        """Run the vision tower, once for every image of every tree. None without images."""
        if not len(batch.grid):
            return None
        visual = self.base.model.visual
        mean, std = (
            torch.tensor(v, device=batch.patches.device)[:, None] for v in (self.settings.mean, self.settings.std)
        )
        pixels = (batch.patches / 255 - mean) / std  # (patches, 3, p * p)
        pixels = pixels[:, :, None].expand(-1, -1, self.settings.temporal_patch_size, -1)
        vision = batch.vision | {"image_starts": torch.tensor(batch.vision["image_starts"])}  # stays on the CPU
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trains_vision):
            out = visual(pixels.flatten(1).to(visual.dtype), grid_thw=batch.grid, **vision)
        return Features(out.pooler_output, getattr(out, "deepstack_features", []))

    def hidden_states(self, ids, positions, mask, wanted, image_at=None, features=None, past=None) -> torch.Tensor:
        """Last hidden states (N, D) of the tokens `wanted` (N,) among token ids (T,) at rotary positions (3, T).

        `past`: a cache to extend.
        """
        language_model = self.base.model.language_model
        embeds, deepstack = language_model.embed_tokens(ids), {}
        if features is not None:
            embeds = embeds.index_copy(0, image_at, features.embeds.to(embeds.dtype))
            if features.deepstack:
                deepstack = {"visual_pos_masks": image_at, "deepstack_visual_embeds": features.deepstack}
        if torch.is_grad_enabled():  # so that the first layer is like the others and is not compiled on its own
            embeds.requires_grad_()
        return language_model(
            inputs_embeds=embeds[None],
            position_ids=positions[:, None],
            attention_mask=mask,
            past_key_values=past,
            use_cache=past is not None,
            wanted=wanted,
            **deepstack,
        ).last_hidden_state[0]

    def answer_logits(self, batch: Batch, features: Features | None) -> torch.Tensor:
        """Logits (N, vocabulary) in float32 of the answer tokens, and of no others."""
        mask = tree_mask(batch)
        hidden = self.hidden_states(batch.ids, batch.positions, mask, batch.answer_at, batch.image_at, features)
        return self.base.lm_head(hidden).float()

    def forward(self, batch: Batch, features: Features | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Each answer token's cross-entropy (N,) in float32, and whether it is the most likely token (N,) bool."""
        if self.training:
            draw_dropout_seeds(self.model)
        if self.trains_vision:
            features = self.encode_images(batch)
        logits = self.answer_logits(batch, features)
        losses = F.cross_entropy(logits, batch.targets, reduction="none")
        if self.trains_vision and features is None:  # DDP waits for a gradient of every trained weight, here 0
            losses = losses + 0 * sum(p.sum() for p in self.base.model.visual.parameters() if p.requires_grad)
        return losses, logits.argmax(-1) == batch.targets
