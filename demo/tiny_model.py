"""The demo's base model: a tiny Qwen3-VL with its tokenizer and chat template."""

import math

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration

SPECIAL_TOKENS = [
    f"<|{name}|>"
    for name in ("endoftext", "im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad")
]
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content %}
            {%- if part.type == 'image' %}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' }}
            {%- elif part.type == 'text' %}
                {{- part.text }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
WORDS = r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"""
PATCH = 8  # pixels; four patches are a token of 16 x 16


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE that splits words as Qwen's does. A word of the texts is one token, others take several."""
    tokenizer = Tokenizer(models.BPE())
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(WORDS), "isolated"), to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=768, special_tokens=SPECIAL_TOKENS, initial_alphabet=to_bytes.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=[name for name in SPECIAL_TOKENS if name not in ("<|im_end|>", "<|endoftext|>")],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> Qwen3VLForConditionalGeneration:
    """A Qwen3-VL of about a million weights, fixed by the seed."""
    ids = {name.strip("<|>"): tokenizer.convert_tokens_to_ids(name) for name in SPECIAL_TOKENS}
    config = Qwen3VLConfig(
        text_config=dict(
            vocab_size=math.ceil(len(tokenizer) / 64) * 64,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=8,
            num_key_value_heads=8,
            head_dim=16,
            max_position_embeddings=32768,
            rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[4, 2, 2], mrope_interleaved=True),
            pad_token_id=ids["endoftext"],
        ),
        vision_config=dict(
            depth=1,
            hidden_size=64,
            intermediate_size=128,
            num_heads=2,
            patch_size=PATCH,
            spatial_merge_size=2,
            temporal_patch_size=2,
            out_hidden_size=128,
            num_position_embeddings=256,
            deepstack_visual_indexes=[0],
        ),
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3VLForConditionalGeneration(config)
        initialise_language(model.model.language_model, model.lm_head)
        wire_vision(model.model.visual)
    model.generation_config.eos_token_id = [ids["im_end"], ids["endoftext"]]
    model.generation_config.pad_token_id = ids["endoftext"]
    return model


@torch.no_grad()
def initialise_language(language, lm_head) -> None:
    """Random weights on which LoRA learns fast: layers that add little, sharp attention, logits far apart."""
    for weight in language.parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=1 / math.sqrt(weight.shape[1]))
    torch.nn.init.normal_(language.embed_tokens.weight, std=1.0)
    torch.nn.init.normal_(lm_head.weight, std=3 / math.sqrt(lm_head.weight.shape[1]))
    for layer in language.layers:
        layer.self_attn.o_proj.weight.mul_(0.5)
        layer.mlp.down_proj.weight.mul_(0.5)
        layer.self_attn.q_norm.weight.fill_(1.5)
        layer.self_attn.k_norm.weight.fill_(1.5)


@torch.no_grad()
def wire_vision(vision) -> None:
    """Set the weights of the frozen vision tower by hand, so that a token tells its colours and its place.

    A trained tower would tell these too; random weights hardly do. After 160 steps exact match was 0.77 with these
    weights and 0.56 with random ones. Hidden channels of a patch are 3 mean colours, 8 sines of its row and column, 2
    large constants that keep the layer norms from rescaling the rest, and colour detectors. The MLP of the block fills
    the detectors: half spaces of colour, in directions spread evenly around the mean of all pictures. The mergers
    average a token's four patches and mix channels at random. All other weights are small noise.
    """
    hidden = vision.pos_embed.weight.shape[1]
    colour, place, constant, detectors = slice(0, 3), slice(3, 11), slice(11, 13), slice(13, hidden)
    for name, weight in vision.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(weight, std=0.03 / math.sqrt(weight[0].numel()))
    filters = vision.patch_embed.proj.weight  # (hidden, 3 colours, 2 frames, PATCH, PATCH)
    for channel in range(3):
        filters[channel, channel] += 1 / filters[channel, channel].numel()
    vision.patch_embed.proj.bias[constant] = torch.tensor([4.0, -4.0])
    norm = 4 * math.sqrt(2 / hidden)  # roughly what the layer norms divide by, given the constants

    side = math.isqrt(vision.pos_embed.weight.shape[0])
    angles = torch.linspace(0, 1, side)[:, None] * torch.tensor([1.0, 2.0]) * math.pi
    waves = 0.8 * torch.cat([angles.sin(), angles.cos()], dim=1)
    rows, columns = waves[:, None].expand(-1, side, -1), waves[None].expand(side, -1, -1)
    vision.pos_embed.weight[:, place] = torch.cat([rows, columns], dim=-1).flatten(0, 1)

    number = hidden - detectors.start
    k = torch.arange(number) + 0.5  # Fibonacci lattice on the sphere
    z, turn = 1 - 2 * k / number, k * math.pi * (1 + math.sqrt(5))
    directions = torch.stack([(1 - z**2).sqrt() * turn.cos(), (1 - z**2).sqrt() * turn.sin(), z], dim=1)
    middle, sharpness = torch.tensor([0.5, -0.05, -0.15]), 4.0  # mean colour of all pictures, from -1 to 1: tissue
    mlp = vision.blocks[0].mlp
    mlp.linear_fc1.weight[:number, colour] = sharpness * norm * directions
    mlp.linear_fc1.bias[:number] = -sharpness * (directions @ middle + 0.2)
    mlp.linear_fc2.weight[detectors, :number] += torch.eye(number) * 2 / sharpness

    for merger in (vision.merger, *vision.deepstack_merger_list):
        merger.linear_fc1.weight[:hidden] += torch.eye(hidden).repeat(1, 4) / 4
        merger.linear_fc1.bias[:hidden] = 4.0  # where GELU is the identity
        mixture = 0.6 * torch.randn(merger.linear_fc2.weight.shape[0], hidden)
        mixture[:, constant] = 0
        merger.linear_fc2.weight[:, :hidden] = mixture
        merger.linear_fc2.bias.copy_(-4 * mixture.sum(1))
