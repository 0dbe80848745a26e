"""Model: Qwen2-VL, Qwen2.5-VL, Qwen3-VL or Qwen3.5 with LoRA, run on trees.

The base model is transformers' own, unedited. It is given three things: tree attention through
`AttentionInterface.register`, rotary positions, and image features that the vision tower computes once per tree.
"""

import types
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.utils import logging as transformers_logging

from common import InputError
from data import Batch
from inputs.images import ImageSettings
from modeling.attention import HOPPER_OPTIONS, tree_mask
from modeling.delta import linear_layers, use_tree_delta
from modeling.loading import fp8_blocks
from modeling.lora import trains
from modeling.quantized import add_quantized_layers, without_layers


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)


def autocast(device: torch.device, dtype: torch.dtype):
    """Matrix products in `dtype`; LoRA weights and cross-entropy stay in float32. Off where everything is float32."""
    return torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext()


def load_base(folder: str, dtype: torch.dtype, device: torch.device, precision: str = "bf16") -> nn.Module:
    """Load the frozen base model straight onto `device`, from a folder of `resolve_model`.

    precision: of the decoder layers' linear layers, one of `modeling.precision.PRECISIONS`. All else is of `dtype`.
    Weights that were published in FP8 become numbers first, which bf16 keeps and the others round per channel.
    Raises InputError when weights are missing: transformers would go on with random ones.
    """
    transformers_logging.disable_progress_bar()  # every rank would show one
    config = AutoConfig.from_pretrained(folder)
    if block := fp8_blocks(getattr(config, "quantization_config", None)):
        del config.quantization_config  # by which transformers would read the weights itself
    options = {"dtype": dtype, "device_map": {"": device}, "attn_implementation": "sdpa", "output_loading_info": True}
    if precision == "bf16" and not block:
        model, info = AutoModelForImageTextToText.from_pretrained(folder, config=config, **options)
    else:  # its layers are added one after the other
        with without_warnings():  # of the layers, which it was not asked to load
            without = without_layers(config)
            rest, info = AutoModelForImageTextToText.from_pretrained(folder, config=without, **options)
        model = add_quantized_layers(rest, folder, config, dtype, device, precision, block)
    if missing := sorted(info["missing_keys"]):
        lacking = f"{missing[0]}, one of {len(missing):,} missing"
        raise InputError(f"model {folder} has no weights {lacking}: copy or download it again")
    return prepare_base(model)


@contextmanager
def without_warnings():
    """A context in which transformers logs errors only."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def prepare_base(model: nn.Module) -> nn.Module:
    """Freeze a model, and replace on this instance what can't run trees or makes the CPU wait for the GPU."""
    visual, language_model = model.model.visual, model.model.language_model
    visual.patch_embed.proj = PatchProjection(visual.patch_embed.proj)
    capability = torch.cuda.get_device_capability(visual.device)[0] if visual.device.type == "cuda" else 0
    attention = next(layer.self_attn for layer in language_model.layers if hasattr(layer, "self_attn"))
    is_tuned = capability == 9 and attention.head_dim in HOPPER_OPTIONS and visual.dtype != torch.float32
    tuned = f"onelook_tree_hopper_{attention.head_dim}"
    language_model.config._attn_implementation = tuned if is_tuned else "onelook_tree"
    if hasattr(language_model, "_deepstack_process"):
        language_model._deepstack_process = types.MethodType(_add_deepstack, language_model)
    use_tree_delta(language_model)
    language_model.layers[-1].forward = types.MethodType(_last_layer, language_model.layers[-1])
    visual.blocks[0].register_forward_pre_hook(_copy_patches)
    if capability and visual.dtype != torch.float32:  # these kernels take half precision only
        # cuDNN's kernel attends within whole images. Qwen2.5-VL's windows are smaller: flash takes their bounds.
        whole_images = capability >= 9 and not hasattr(visual.config, "window_size")
        visual.config._attn_implementation = "onelook_cudnn_flash_vision" if whole_images else "onelook_flash_vision"
    return model.requires_grad_(False)


def _last_layer(layer, hidden_states: torch.Tensor, wanted: torch.Tensor, **kwargs) -> torch.Tensor:
    """The last decoder layer (1, T, D) to (1, N, D): only the tokens `wanted` (N,) go on to its MLP and to the head."""
    normed = layer.input_layernorm(hidden_states)
    if hasattr(layer, "linear_attn"):
        mixed = layer.linear_attn(hidden_states=normed, cache_params=kwargs["past_key_values"], **kwargs)
    else:
        mixed, _ = layer.self_attn(hidden_states=normed, **kwargs)
    hidden = (hidden_states + mixed).index_select(1, wanted)
    if kwargs.get("dropout_keys") is not None:
        layer.dropout_rows.keys = kwargs["dropout_keys"].index_select(0, wanted)
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))


@torch.compiler.disable
def _copy_patches(_block, args: tuple) -> tuple:
    """The arguments of the first vision block, with a copy of the patches. The tower passes a view of another tensor,
    for which the block would be compiled on its own."""
    return args[0].clone(), *args[1:]


def _add_deepstack(_language_model, hidden: torch.Tensor, image_at: torch.Tensor, features: torch.Tensor):
    """Add vision features (I, D) to hidden states (1, T, D) at the image tokens. By index: transformers' boolean mask
    would make the CPU wait for the GPU."""
    return hidden.index_add(1, image_at, features[None].to(hidden.dtype))


class PatchProjection(nn.Linear):
    """The vision tower's patch embedding as one matrix product. It equals the Conv3d, whose stride is its kernel size,
    and cuDNN's Conv3d is many times slower in some versions (pytorch#174051)."""

    def __init__(self, conv: nn.Conv3d):
        with torch.device("meta"):
            super().__init__(conv.weight[0].numel(), conv.out_channels)
        self.weight, self.bias = nn.Parameter(conv.weight.flatten(1)), conv.bias

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        return super().forward(patches.flatten(1))


# ------------------------------------------------------------------------------------------------------ running trees


@dataclass
class Features:
    """What the vision tower computes for a batch's images: I tokens in all, in the order of `Batch.image_at`."""

    embeds: torch.Tensor  # (I, D)
    deepstack: list[torch.Tensor]  # each (I, D), added after the first decoder layers; only Qwen3-VL has them


class TreeModel(nn.Module):
    """A base model, with LoRA or without, that runs a packed `Batch` of trees."""

    dense_masks = False  # True for one question on CUDA: FlexAttention would take longer to compile than it saves
    leaves_out_late = False  # True after `leave_out_late`

    def __init__(self, model: nn.Module, settings: ImageSettings, keep_features: Callable | None = None):
        """`keep_features(names, image_tokens, features)` gets the features of images that have a name in the vision
        cache: see `inputs.vision_cache.FeatureWriter.put`."""
        super().__init__()
        self.model, self.settings, self.keep_features = model, settings, keep_features
        for name in ("mean", "std"):  # (3, 1): made once, as a copy to the GPU waits for all work before it
            values = torch.tensor(getattr(settings, name), device=self.base.device)[:, None]
            self.register_buffer(name, values, persistent=False)
        self.trains_vision = trains(self.base.model.visual)
        self.has_linear_layers = bool(linear_layers(self.base.model.language_model))
        self.dropout_rows = getattr(self.base, "dropout_rows", None)  # a modeling.dropout.RowKeys, where it is trained
        self.train()

    def train(self, mode: bool = True) -> "TreeModel":
        super().train(mode)
        if not self.trains_vision:
            self.base.model.visual.eval()  # frozen: the same in both modes, so it is compiled once
        return self

    def leave_out_late(self) -> None:
        """Run the last decoder layer like all others, whose compiled code it then shares, and leave out tokens after
        it. Results differ by rounding only."""
        vars(self.base.model.language_model.layers[-1]).pop("forward", None)  # gone after an attempt that did not fit
        self.leaves_out_late = True

    @property
    def base(self) -> nn.Module:
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    def image_features(self, batch: Batch) -> Features | None:
        """Features of a batch's images: from the vision cache where the batch brings them, else from the tower."""
        if batch.features is not None:
            return Features(batch.features[0], list(batch.features[1:]))
        features = self.encode_images(batch)
        if batch.cache_names and self.keep_features:
            stacked = torch.stack([features.embeds, *features.deepstack])  # (sets, I, D)
            self.keep_features(batch.cache_names, batch.image_tokens, stacked)
        return features

    def encode_images(self, batch: Batch) -> Features | None:
        """Run the vision tower on each image of a batch's trees. None without images."""
        if not len(batch.grid):
            return None
        visual = self.base.model.visual
        pixels = (batch.patches / 255 - self.mean) / self.std  # (patches, 3, p * p)
        pixels = pixels[:, :, None].expand(-1, -1, self.settings.temporal_patch_size, -1)
        vision = batch.vision | {"image_starts": torch.tensor(batch.vision["image_starts"])}  # stays on the CPU
        if self.dropout_rows and self.trains_vision:
            vision["dropout_keys"] = batch.patch_keys
            self.dropout_rows.of_image_tokens = batch.patch_keys[:: self.settings.merge_size**2]
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trains_vision):
            out = visual(pixels.flatten(1).to(visual.dtype), grid_thw=batch.grid, **vision)
        return Features(out.pooler_output, getattr(out, "deepstack_features", []))

    def hidden_states(
        self, ids, positions, mask, wanted, image_at=None, features=None, past=None, dropout_keys=None, paths=None
    ) -> torch.Tensor:
        """Last hidden states (N, D) of the tokens at indices `wanted` (N,), from token ids (T,) and positions (3, T).

        `image_at` (I,) says where the features go. `past` is a key-value cache to extend. `dropout_keys` (T,) are
        needed in training, `paths` (see `inputs.positions.token_paths`) by linear attention: without them, the tokens
        are one for each question that a cache holds.
        """
        language_model = self.base.model.language_model
        # The first layer's inputs must be like those of later ones, or it is compiled on its own: they require a
        # gradient, and are not a view of another tensor, as `embeds[None]` would be.
        embeds, deepstack = language_model.embed_tokens(ids[None]), {}  # (1, T, D)
        if features is not None:
            embeds = embeds.index_copy(1, image_at, features.embeds[None].to(embeds.dtype))
            if features.deepstack:
                deepstack = {"visual_pos_masks": image_at, "deepstack_visual_embeds": features.deepstack}
        linear = {}
        if self.has_linear_layers:
            if paths is not None:  # with lists, layers would be compiled again for every batch
                paths = paths | {"starts_on_cpu": tuple(map(torch.tensor, paths["starts_on_cpu"]))}
            mask, linear = {"full_attention": mask, "linear_attention": None}, {"paths": paths}
        if torch.is_grad_enabled():
            embeds.requires_grad_()
        hidden = language_model(
            inputs_embeds=embeds,
            position_ids=positions[:, None],
            attention_mask=mask,
            past_key_values=past,
            use_cache=past is not None,
            wanted=wanted,
            **deepstack,
            **linear,
            **({"dropout_keys": dropout_keys} if self.dropout_rows else {}),
        ).last_hidden_state[0]  # (T, D) or (N, D)
        return hidden.index_select(0, wanted) if self.leaves_out_late else hidden

    def answer_states(self, batch: Batch, past=None) -> torch.Tensor:
        """Last hidden states (N, D) of the tokens that predict answers. `past` is a key-value cache to fill."""
        mask, features = tree_mask(batch, self.dense_masks), self.image_features(batch)
        optional = {"past": past, "dropout_keys": batch.dropout_keys, "paths": batch.paths}
        return self.hidden_states(
            batch.ids, batch.positions, mask, batch.answer_at, batch.image_at, features, **optional
        )

    def answer_logits(self, batch: Batch) -> torch.Tensor:
        """Logits (N, vocabulary) in float32 for answer tokens only: those of all T would take gigabytes."""
        return self.base.lm_head(self.answer_states(batch)).float()

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Each answer token's cross-entropy (N,) in float32, and whether it is the most likely token (N,) bool."""
        logits = self.answer_logits(batch)
        losses = F.cross_entropy(logits, batch.targets, reduction="none")
        if self.trains_vision and not len(batch.grid):  # DDP waits for every trained weight's gradient
            losses = losses + 0 * sum(p.sum() for p in self.base.model.visual.parameters() if p.requires_grad)
        return losses, logits.argmax(-1) == batch.targets
