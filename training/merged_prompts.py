"""How the run of a merged model put its questions: written by merge.py into the model's folder, read by eval.py."""

import argparse
import json
from pathlib import Path

from common import quote
from dist_utils import print0
from modeling.merging import PROMPTS_FILE

PROMPTS = ("system", "prompt", "image_first")  # settings that no other file of a model's folder holds


def write_prompts(folder: Path, run: dict) -> None:
    """Write the prompts of a run, whose settings are `run`, into the folder of its merged model."""
    text = json.dumps({name: run[name] for name in PROMPTS}, indent=2, ensure_ascii=False)
    (folder / PROMPTS_FILE).write_text(text + "\n", encoding="utf-8")


def read_prompts(folder: str, args: argparse.Namespace) -> dict:
    """The prompts that a model's folder names and the command line of eval.py does not, told in a line where they are
    not the usual ones. Empty where it names none."""
    path = Path(folder) / PROMPTS_FILE
    named = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    prompts = {name: named[name] for name in PROMPTS if name in named and getattr(args, name, None) is None}
    told = [f"{name} {quote(value)}" for name, value in prompts.items() if value not in ("", "{question}", False)]
    if told:
        print0(f"questions are put as {path} says: {', '.join(told)}")
    return prompts
