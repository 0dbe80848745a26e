"""The model card of a checkpoint: what was trained on which rows, how well it did, and how to load it."""

import json
import re
from pathlib import Path

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

{use}

## What it depends on

| | |
|---|---|
{identity}
"""

MERGED = """---
base_model: {quoted}
library_name: transformers
pipeline_tag: image-text-to-text
tags: [visual-question-answering]{license}
---

# {model} with a LoRA adapter merged in

Merged with onelook. The license of the base model, {model}, holds for these weights too.

## Run it

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("THIS_FOLDER", dtype="auto", device_map="cuda")
processor = AutoProcessor.from_pretrained("THIS_FOLDER")
```

With vLLM: `vllm serve THIS_FOLDER`. Put questions as in training:
{use}
"""

# vLLM accepts only certain maximum ranks, so {rank} is the adapter's rank rounded up to a power of two, at least 8.
VLLM = "With vLLM: `vllm serve {model} --enable-lora --max-lora-rank {rank} --lora-modules tuned=THIS_FOLDER`"

WITHOUT_THINKING = "It was trained without thinking: give `enable_thinking=False` to the chat template."


def model_card(state: dict) -> str:
    """Markdown with the front matter that model hubs read. `state` is a checkpoint's state."""
    settings, best = state["settings"], state["best"]
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
        use=_use(settings, "thinking" in state["identity"]),
        identity="\n".join(f"| {name} | {_cell(value)} |" for name, value in facts.items()),
    )


def merged_card(model: str, folder: str, run: dict, may_think: bool = False) -> str:
    """Markdown for a merged model: `model` is its base model's name, `folder` where that lies. `run` are the settings
    of the adapter's run, empty if it was made elsewhere. `may_think`: see `inputs.prompts.may_think`."""
    card = Path(folder) / "README.md"
    head = re.match(r"---\n(.*?)\n---", card.read_text("utf-8", "replace") if card.is_file() else "", re.DOTALL)
    licenses = re.findall(r"^license(?:_name|_link)?:.*", head[1] if head else "", re.MULTILINE)
    return MERGED.format(
        model=model,
        quoted=json.dumps(model),
        license="".join(f"\n{line}" for line in licenses),
        use=_use(run, may_think) if run else "the adapter, which was made elsewhere, does not tell how.",
    )


def _use(settings: dict, may_think: bool) -> str:
    """How a run put its questions: what an answer depends on apart from the weights."""
    images, prompt = settings["image_settings"], settings["prompt"]
    system = json.dumps(settings["system"], ensure_ascii=False) if settings["system"] else "none, or the row's own"
    limits = f"between {images['min_pixels']:,} and {images['max_pixels']:,} pixels"
    put = f" Questions were put as {json.dumps(prompt, ensure_ascii=False)}." if prompt != "{question}" else ""
    first = " Images came before the text of their turn." if settings.get("image_first") else ""
    asked = f"Images were resized to {limits}; do the same where it is used.\nSystem prompt: {system}.{put}{first}"
    return asked + f" {WITHOUT_THINKING}" * may_think


def _cell(value) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
