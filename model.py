"""Model: Qwen3-VL with LoRA, run on trees.

The base model is transformers' own, unedited. It is given three things: a tree attention through
`AttentionInterface.register`, rotary positions, and image features that the frozen vision tower makes once a tree.
"""

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface, AutoConfig, AutoModelForImageTextToText
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils.logging import disable_progress_bar

from data import Batch, ImageSettings
from rows import InputError

# anchored to the language model: the vision tower has projections of the same names
LORA_TARGETS = r"model\.language_model\.layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)"
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FLEX_BLOCK = 128  # FlexAttention wants lengths that are multiples of its block (pytorch#153799)

# --------------------------------------------------------------------------------------------------------- attention


def tree_mask(batch: Batch) -> torch.Tensor | BlockMask:
    """Who sees whom in a batch: a FlexAttention block mask on CUDA, a boolean (1, 1, T, T) elsewhere."""
    if batch.ids.device.type == "cuda":
        return _block_mask(batch.tree, batch.branch)
    order = torch.arange(len(batch.ids), device=batch.ids.device)
    return visible(batch.tree, batch.branch, batch.tree, batch.branch, order, order)[None, None]


def visible(tree_q, branch_q, tree_k, branch_k, order_q, order_k) -> torch.Tensor:
    """(Q, K) bool: the same tree, not later, and in the prefix (branch 0) or in the same branch."""
    same_tree = tree_q[:, None] == tree_k
    return same_tree & (order_k <= order_q[:, None]) & ((branch_k == 0) | (branch_k == branch_q[:, None]))


def _block_mask(tree: torch.Tensor, branch: torch.Tensor) -> BlockMask:
    def mask(_batch, _head, q, k):
        return (tree[q] == tree[k]) & (k <= q) & ((branch[k] == 0) | (branch[k] == branch[q]))

    return _compiled(create_block_mask)(mask, None, None, len(tree), len(tree), device=tree.device)


@cache
def _compiled(function):
    return torch.compile(function, dynamic=True)


def tree_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """transformers' attention interface: (1, heads, Q, d) and (1, kv_heads, K, d) to ((1, Q, heads, d), None)."""
    if isinstance(attention_mask, BlockMask):
        out = _compiled(flex_attention)(
            query, key, value, block_mask=attention_mask, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
        )
        return out.transpose(1, 2).contiguous(), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, is_causal=False)


AttentionInterface.register("onelook_tree", tree_attention)

# ----------------------------------------------------------------------------------------------------------- loading


def resolve_model(name: str) -> str:
    """The folder of a model given as a folder or a hub name, downloaded when it is not in the cache yet."""
    return name if Path(name).is_dir() else snapshot_download(name)


def load_base(folder: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Load the frozen base model straight onto `device`. Raises InputError for a model that is not Qwen3-VL."""
    config = AutoConfig.from_pretrained(folder)
    if config.model_type != "qwen3_vl":
        raise InputError(f"{folder} is a {config.model_type} model; this program trains dense Qwen3-VL (qwen3_vl) only")
    disable_progress_bar()  # one a rank, for seconds
    attention = {"text_config": "onelook_tree", "vision_config": "sdpa"}
    model = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=dtype, device_map={"": device}, attn_implementation=attention
    )
    model.model.visual.patch_embed.proj = PatchProjection(model.model.visual.patch_embed.proj)
    return model.requires_grad_(False)


class PatchProjection(nn.Linear):
    """The vision tower's patch embedding as one matrix product: its Conv3d has stride = kernel, so the two are equal,
    and cuDNN's Conv3d is many times slower on some versions (pytorch#174051)."""

    def __init__(self, conv: nn.Conv3d):
        with torch.device("meta"):
            super().__init__(conv.weight[0].numel(), conv.out_channels)
        self.weight, self.bias = nn.Parameter(conv.weight.flatten(1)), conv.bias

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        return super().forward(patches.flatten(1))


def add_lora(base: nn.Module, name: str, r: int, alpha: float, dropout: float) -> PeftModel:
    """LoRA in float32 on q, k, v, o, gate, up and down of every language-model layer, and nowhere else."""
    model = get_peft_model(base, LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=LORA_TARGETS))
    model.peft_config["default"].base_model_name_or_path = name  # what others will load, not where it lies here
    counts = lora_table(model)
    layers = base.config.text_config.num_hidden_layers
    assert {kind: count for kind, (count, _) in counts.items()} == dict.fromkeys(PROJECTIONS, layers), counts
    return model


def lora_table(model: nn.Module) -> dict[str, tuple[int, int]]:
    """What is trained: projection -> (modules, parameters). Raises AssertionError for anything that is not LoRA."""
    table = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found = re.search(r"language_model\.layers\.\d+\.\w+\.(\w+)\.lora_(A|B)\.", name)
            assert found and parameter.dtype == torch.float32, f"{name} ({parameter.dtype}) should not be trained"
            count, size = table.get(found[1], (0, 0))
            table[found[1]] = (count + (found[2] == "A"), size + parameter.numel())
    return table


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Write a plain PEFT adapter folder."""
    model.save_pretrained(folder, save_embedding_layers=False)


def load_adapter(base: nn.Module, folder: Path, trainable: bool = False) -> PeftModel:
    return PeftModel.from_pretrained(base, folder, is_trainable=trainable)


# ------------------------------------------------------------------------------------------------------ running trees


@dataclass
class Features:
    """What the vision tower makes of a batch's images, I tokens in all, in the order of `Batch.image_at`."""

    embeds: torch.Tensor  # (I, D)
    deepstack: list[torch.Tensor]  # each (I, D), added after the first decoder layers


class TreeModel(nn.Module):
    """A (LoRA-wrapped) Qwen3-VL that runs a packed `Batch` of trees."""

    def __init__(self, model: nn.Module, settings: ImageSettings):
        super().__init__()
        self.model = model
        self.settings = settings

    @property
    def base(self) -> nn.Module:
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    @torch.no_grad()
    def encode_images(self, batch: Batch) -> Features | None:
        """Run the frozen vision tower, once for every image of every tree. None without images."""
        if not len(batch.grid):
            return None
        visual = self.base.model.visual
        mean, std = (
            torch.tensor(v, device=batch.patches.device)[:, None] for v in (self.settings.mean, self.settings.std)
        )
        pixels = (batch.patches / 255 - mean) / std  # (patches, 3, p * p)
        pixels = pixels[:, :, None].expand(-1, -1, self.settings.temporal_patch_size, -1)
        out = visual(pixels.flatten(1).to(visual.dtype), grid_thw=batch.grid)
        return Features(out.pooler_output, out.deepstack_features)

    def hidden_states(self, ids, positions, mask, image_at=None, features=None, past=None) -> torch.Tensor:
        """Last hidden states (T, D) of token ids (T,) at rotary positions (3, T). `past`: a cache to read and extend."""
        language_model = self.base.model.language_model
        embeds, is_image = language_model.embed_tokens(ids), None
        if features is not None:
            embeds = embeds.index_copy(0, image_at, features.embeds.to(embeds.dtype))
            is_image = torch.zeros_like(ids, dtype=torch.bool).index_fill(0, image_at, True)[None]
        return language_model(
            inputs_embeds=embeds[None],
            position_ids=positions[:, None],
            attention_mask=mask,
            visual_pos_masks=is_image,
            deepstack_visual_embeds=features.deepstack if features is not None else None,
            past_key_values=past,
            use_cache=past is not None,
        ).last_hidden_state[0]

    def forward(self, batch: Batch, features: Features | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Each answer token's cross-entropy (N,) in float32, and whether it is the most likely token (N,) bool."""
        hidden = self.hidden_states(batch.ids, batch.positions, tree_mask(batch), batch.image_at, features)
        logits = self.base.lm_head(hidden[batch.answer_at]).float()  # only where there is a label
        return F.cross_entropy(logits, batch.targets, reduction="none"), logits.argmax(-1) == batch.targets
