"""Tiny model folders of each family, pictures of several sizes, rows of every kind, and the reference that exactness is
held to: each sample alone through the unmodified transformers model with `labels`. Nothing here uses the product's
tokenizing, masks, positions or losses."""

import json
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from data import TreeDataset, VQAData, load_data
from demo import endoscopy
from inputs.images import image_settings
from model import TreeModel, load_base
from modeling.lora import add_lora

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5")
SYSTEM = "You are a helpful assistant."  # what Qwen2-VL and Qwen2.5-VL are told where a row has no system turn
SYSTEM_TEMPLATE = f"""\
{{%- if messages[0].role != 'system' %}}
    {{{{- '<|im_start|>system\\n{SYSTEM}<|im_end|>\\n' }}}}
{{%- endif %}}
"""
# Qwen3.5's text model: positions turn a part of each attention head, and several value heads share a key head.
HYBRID = dict(
    layer_types=["linear_attention", "linear_attention", "full_attention"], head_dim=64, partial_rotary_factor=0.5,
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=32,
)  # fmt: skip
SIZES = {"a.png": (96, 96), "b.png": (160, 64), "c.png": (70, 131), "d.png": (200, 120)}


def turn(role: str, text: str, images: int = 0) -> dict:
    return {"role": role, "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]}


def single(image: str, question: str, answer: str) -> dict:
    return {"image": image, "question": question, "answer": answer}


def mixed_rows() -> list[dict]:
    """Trees of 1, 9 and 17 branches, two images in a row, a text-only row, two turns, an image after an answer."""
    rows = [
        single("a.png", f"How many polyps are in part {i}?", f"{i}" if i % 3 else f"about {i} or more")
        for i in range(17)
    ]
    rows += [single("b.png", f"Where is finding {i}?", f"upper left {i}") for i in range(9)]
    rows += [single("c.png", "Is there text?", "yes")]
    rows += [single("c.png", "Is there text?", "no"), single("c.png", "Is there text?", "no text")]  # same question
    rows += [{"image": ["c.png", "d.png"], "question": "Which is larger?", "answer": "the second"}]
    rows += [{"question": "What is a polyp?", "answer": "a growth"}]
    rows += [{"messages": [turn("user", "What colour?", 1), turn("assistant", "red"), turn("user", "And how many?"),
                           turn("assistant", "two of them")], "images": ["d.png"]}]  # fmt: skip
    rows += [{"messages": [turn("user", "Is this sharp?", 1), turn("assistant", "yes"), turn("user", "And this?", 1),
                           turn("assistant", "no, blurred")], "images": ["b.png", "a.png"]}]  # fmt: skip
    return rows


def family_model(family: str, tokenizer):
    """A tiny model of a family, with all its weights random, including biases and norms, so that each matters.

    It has grouped keys and values, vision blocks of both kinds and windows of 2 x 2 tokens (Qwen2.5-VL), tied
    embeddings (Qwen2-VL), and layers of linear and of full attention (Qwen3.5).
    """
    names = ("image_pad", "video_pad", "vision_start", "vision_end")
    image, video, start, end = tokenizer.convert_tokens_to_ids([f"<|{name}|>" for name in names])
    sections = {"mrope_section": [6, 5, 5]} | ({"mrope_interleaved": True} if family.startswith("qwen3") else {})
    text = dict(vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=3)
    text |= dict(num_attention_heads=4, num_key_value_heads=2)
    text |= dict(bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    text |= dict(rope_parameters={"rope_type": "default", "rope_theta": 1e6} | sections)
    text |= {"qwen3_vl": {"head_dim": 32}, "qwen3_5": HYBRID}.get(family, {})
    vision = {
        "qwen2_vl": dict(embed_dim=64, hidden_size=128, mlp_ratio=2),
        "qwen2_5_vl": dict(
            hidden_size=64, intermediate_size=128, out_hidden_size=128, window_size=56, fullatt_block_indexes=[1]
        ),
        "qwen3_vl": dict(
            hidden_size=64, intermediate_size=128, out_hidden_size=128, patch_size=16, num_position_embeddings=256,
            deepstack_visual_indexes=[0, 2],
        ),
        "qwen3_5": dict(
            hidden_size=64, intermediate_size=128, out_hidden_size=128, patch_size=16, num_position_embeddings=256
        ),
    }  # fmt: skip
    config = AutoConfig.for_model(
        family,
        text_config=text,
        vision_config=dict(depth=3, num_heads=2) | vision[family],
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
        tie_word_embeddings=family == "qwen2_vl",
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config)
        for name, weight in model.named_parameters():
            if weight.dim() > 1:  # attention is made sharper, for answers to differ
                weight.normal_(0, weight[0].numel() ** -0.5 * (1.5 if ".q_proj" in name or ".k_proj" in name else 1))
            elif name.endswith("A_log"):  # a state that lasts for tens of tokens, so that what enters it matters
                weight.normal_(-3, 0.5)
            else:
                weight.normal_(1 if name.endswith("weight") else 0, 0.3)
    return model


def write_model(folder: Path, rows: list[dict], family: str = "") -> None:
    """The demo's Qwen3-VL, or a random model of a family, with a tokenizer and an image processor."""
    tokenizer = endoscopy.make_tokenizer(["user\nassistant\nsystem\n" + json.dumps(row) for row in rows])
    model = family_model(family, tokenizer) if family else endoscopy.make_model(tokenizer)
    model.save_pretrained(folder)
    normal = {} if family in ("qwen2_vl", "qwen2_5_vl") else {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    if not normal:
        tokenizer.chat_template = SYSTEM_TEMPLATE + tokenizer.chat_template
    tokenizer.save_pretrained(folder)
    patch = model.config.vision_config.patch_size
    size = {"shortest_edge": 4 * patch**2, "longest_edge": 65536}
    Qwen2VLImageProcessorPil(patch_size=patch, size=size, **normal).save_pretrained(folder)


def write_world(folder: Path, rows: list[dict] | None = None, family: str = "") -> Path:
    """model/, images/ and rows.jsonl under `folder`."""
    rows = rows or mixed_rows()
    write_model(folder / "model", rows, family)
    (folder / "images").mkdir()
    random = np.random.default_rng(0)
    for name, (width, height) in SIZES.items():
        small = random.integers(0, 256, (height // 10, width // 10, 3), dtype=np.uint8)
        Image.fromarray(small).resize((width, height)).save(folder / "images" / name)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def load_world(folder: Path) -> tuple[VQAData, TreeDataset]:
    tokenizer, settings = AutoTokenizer.from_pretrained(folder / "model"), image_settings(folder / "model")
    data = load_data([folder / "rows.jsonl"], folder / "images", tokenizer, settings, 100_000)
    assert not data.bad, data.bad
    return data, TreeDataset(data, settings)


def lora_model(folder: Path, dropout: float = 0.0, precision: str = "bf16", **more) -> TreeModel:
    """The product's model with LoRA matrices that are not zero."""
    torch.manual_seed(0)
    base = load_base(folder / "model", torch.float32, torch.device("cpu"), precision)
    model = add_lora(base, "tiny", 4, 8, dropout, **more)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05)
    return TreeModel(model, image_settings(folder / "model"))


class Reference:
    """transformers' own model and PEFT's own LoRA with the same weights, one sample at a time."""

    def __init__(self, folder: Path, ours: TreeModel, adapter: Path):
        ours.model.save_pretrained(adapter)
        base = AutoModelForImageTextToText.from_pretrained(
            folder / "model", dtype=torch.float32, attn_implementation="sdpa"
        )
        self.model = PeftModel.from_pretrained(base, adapter, is_trainable=True)
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "model")
        self.processor = Qwen2VLImageProcessorPil.from_pretrained(folder / "model")
        self.folder = folder

    def inputs(self, row: dict, answered: bool = True, only: int | None = None) -> dict:
        """Model inputs and labels of a row, tokenized piece by piece from the chat template's text. `only`: the message
        that alone has labels."""
        if "messages" in row:
            messages, names = row["messages"], row["images"]
        else:
            names = row.get("image", [])
            names = names if isinstance(names, list) else [names]
            messages = [turn("user", row["question"], len(names)), turn("assistant", row["answer"])]
        if self.model.config.model_type in ("qwen2_vl", "qwen2_5_vl") and messages[0]["role"] != "system":
            messages = [turn("system", SYSTEM), *messages]
        pictures = [Image.open(self.folder / "images" / name) for name in names]
        vision = self.processor(pictures, return_tensors="pt") if names else {}
        counts = iter((vision["image_grid_thw"].prod(-1) // 4).tolist() if names else [])
        ids, labels = [], []
        for number, message in enumerate(messages):
            text = "".join("<|vision_start|><|image_pad|><|vision_end|>" if part["type"] == "image" else part["text"]
                           for part in message["content"])  # fmt: skip
            head = self.encode(f"<|im_start|>{message['role']}\n")
            body = self.encode(text + "<|im_end|>")
            pad = self.tokenizer.convert_tokens_to_ids("<|image_pad|>")
            body = [token for t in body for token in [t] * (next(counts) if t == pad else 1)]
            spoken = message["role"] == "assistant" and only in (None, number)
            ids += head + body + self.encode("\n")
            labels += [-100] * len(head) + (body if spoken else [-100] * len(body)) + [-100]
        if not answered:
            keep = len(ids) - len(body) - 1
            ids, labels = ids[:keep], labels[:keep]
        ids = torch.tensor([ids])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([labels]), **vision}
        return inputs | {"mm_token_type_ids": (ids == pad).int()}

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def loss_and_gradients(self, rows: list[dict]) -> tuple[float, dict[str, torch.Tensor]]:
        """Mean of all answer tokens' cross-entropy, weighted by rows and turns, and its gradient by parameter name."""
        all_inputs, weights = [], []
        for row in rows:
            turns = [(n, turn["weight"]) for n, turn in enumerate(row.get("messages", [])) if "weight" in turn]
            for only, weight in turns or [(None, 1)]:
                inputs = self.inputs(row, only=only)
                if weight:
                    all_inputs.append(inputs)
                    weights.append(row.get("weight", 1) * weight * int((inputs["labels"] != -100).sum()))
        total = 0.0
        self.model.zero_grad()
        for inputs, weight in zip(all_inputs, weights):
            loss = self.model(**inputs).loss * weight / sum(weights)
            if loss.requires_grad:  # not where only the vision tower is trained and a row shows nothing
                loss.backward()
            total += loss.item()
        return total, {name: p.grad for name, p in self.model.named_parameters() if p.requires_grad}


def relative_error(ours: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> float:
    """The largest ||ours - reference|| / ||reference|| over the tensors."""
    assert ours.keys() == reference.keys()
    return max(((ours[k] - reference[k]).norm() / reference[k].norm()).item() for k in reference)
