"""The model card of a checkpoint: what was trained on which rows, how well it did, and how to load it."""

import json

from modeling.targets import names_vision

CARD = """---
base_model: {quoted}
library_name: peft
pipeline_tag: image-text-to-text
tags: [lora, visual-question-answering]
---

# LoRA adapter for {model}, step {step:,}

Trained with onelook on {train}.{score}

## Load it

With transformers and PEFT:

```python
from peft import PeftModel
from transformers import AutoModelForImageTextToText

base = AutoModelForImageTextToText.from_pretrained({quoted}, dtype="bfloat16", device_map="cuda")
model = PeftModel.from_pretrained(base, "THIS_FOLDER")
```

{vllm}

Images were resized to between {min_pixels:,} and {max_pixels:,} pixels; do the same where it is used.
System prompt: {system}.{prompt}

## What it depends on

| | |
|---|---|
{identity}
"""

# vLLM accepts only certain maximum ranks, so {rank} is the adapter's rank rounded up to a power of two, at least 8.
VLLM = "With vLLM: `vllm serve {model} --enable-lora --max-lora-rank {rank} --lora-modules tuned=THIS_FOLDER`"


def model_card(state: dict) -> str:
    """Markdown with the front matter that model hubs read. `state` is a checkpoint's state."""
    settings, images, best = state["settings"], state["settings"]["image_settings"], state["best"]
    score = ""
    if best:
        score = f"\nBest validation so far: exact match {100 * best['exact_match']:.1f}%, at step {best['step']:,}."
    vllm = VLLM.format(model=settings["model"], rank=2 ** max(3, (settings["lora_r"] - 1).bit_length()))
    if settings["dora"] or names_vision(settings["lora_targets"]):
        vllm = "vLLM loads LoRA on the language model only, without DoRA: merge it first, `python merge.py`."
    facts = {name: value for name, value in state["identity"].items() if value != ""}
    return CARD.format(
        model=settings["model"],
        quoted=json.dumps(settings["model"]),
        step=state["step"],
        train=state["identity"]["train rows"],
        score=score,
        vllm=vllm,
        min_pixels=images["min_pixels"],
        max_pixels=images["max_pixels"],
        system=json.dumps(settings["system"]) if settings["system"] else "none, or the row's own",
        prompt=f" Questions were put as {json.dumps(settings['prompt'])}."
        if settings["prompt"] != "{question}"
        else "",
        identity="\n".join(f"| {name} | {_cell(value)} |" for name, value in facts.items()),
    )


def _cell(value) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
