"""Merge a checkpoint's LoRA into its base model: a model folder that needs no PEFT.

    python merge.py --ckpt runs/mine --out merged

Weights are added in float32 and rounded once to the base model's type. Before the folder gets its name, the merged
model is loaded from it, and its logits on rows of the run are compared with the adapter's.
"""

import argparse
import os
import re
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

import dist_utils
from common import PARTIAL, InputError, open_locked, remove, replacing, sign, writing
from data import VQAData, build_batch, encode_rows, padding
from dist_utils import print0
from inputs.images import ImageSettings
from inputs.row_files import read_rows
from model import TreeModel, autocast, load_base
from modeling.loading import resolve_model
from modeling.lora import load_adapter, merge_lora
from training.checkpoints import pick_checkpoint, read_state
from training.settings import Parser, choice, parse_words, refuse
from trees import Assignment, plan_evaluation

ROWS = 16  # whose logits are compared
MAX_TOKENS = 8192  # of a batch in that comparison
# Largest distance of merged logits from the adapter's, as a share of that between adapter and base model. Rounding to
# bfloat16 alone stays far below; an adapter that rounding loses is near 1.
MOST_APART = 0.2


def main(argv: list[str], _stop=None) -> int:
    """Merge. Returns the exit code 0; raises InputError for what can't be merged."""
    # Settings: what to merge, and where to.
    args = parse(argv)
    ckpt, out = pick_checkpoint(Path(args.ckpt)), Path(args.out)
    with reserving(out):
        return merge(args, ckpt, out)


def merge(args: argparse.Namespace, ckpt: Path, out: Path) -> int:
    """Write the merged model. Returns the exit code 0; raises InputError for what can't be merged."""
    run = read_state(ckpt)["settings"]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = resolve_model(args.model or run["model"])
    dtype = torch.float32 if args.dtype == "float32" else weights_dtype(folder)

    # Rows to compare logits on.
    rows, images = args.rows or run["val"] or run["train"][0], args.images or run["images"]
    settings, tokenizer = ImageSettings(**run["image_settings"]), AutoTokenizer.from_pretrained(folder)
    options = {"system": run["system"], "prompt": run["prompt"], "image_first": run.get("image_first", False)}
    options["allow_outside_images"] = True
    first_rows = read_rows(Path(rows))[0][:ROWS]
    data = encode_rows(first_rows, images, tokenizer, settings, run["max_tokens"], **options)
    if not data.samples:
        raise InputError(f"{rows}: no usable row to compare logits on: name others by --rows and --images")

    # Logits of the adapter and of the base model. The model goes before the next one is loaded.
    model = TreeModel(load_adapter(load_base(folder, dtype, device), ckpt), settings)
    tuned = answer_logits(model, data, device, dtype)
    with model.model.disable_adapter():
        base = answer_logits(model, data, device, dtype)
    del model
    if torch.equal(tuned, base):
        raise InputError(f"{rows}: the adapter changes no logits on these rows, name others by --rows and --images")

    # The merged model gets its name once its logits have been compared.
    with writing(f"--out: {out} was not written"), replacing(out) as partial:
        write_merged(folder, ckpt, dtype, device, partial)
        merged = answer_logits(TreeModel(load_base(str(partial), dtype, device), settings), data, device, dtype)
        apart = ((merged - tuned).norm() / (tuned - base).norm()).item()
        share = f"{100 * apart:.2g}% as far apart as tuned and base are"
        verdict = f"logits of merged weights and of the adapter are {share}"
        if not apart < MOST_APART:
            rounded = f"too little is left once rounded to {dtype}; keep it, or --dtype float32"
            raise InputError(f"not merged, {verdict}: {rounded}")
    print0(f"{verdict} ({len(data.samples)} rows); wrote {out}")
    return 0


@contextmanager
def reserving(out: Path):
    """Keep the new folder's name for this process. Raises InputError where it exists, another merge has it, or no
    folder can be made there: minutes before it is needed."""
    if os.path.lexists(out):
        raise InputError(f"--out: {out} exists already")
    place, made_here = out.with_name(f"{PARTIAL}lock-{out.name}"), re.compile(f"{PARTIAL}[0-9a-f]{{8}}-(.*)", re.DOTALL)
    with writing(f"--out: can't write to {out.parent}"):
        out.parent.mkdir(parents=True, exist_ok=True)
        lock = open_locked(place, f"--out {out}")
        sign(lock)
        out.mkdir()
        out.rmdir()
        for leftover in out.parent.glob(f"{PARTIAL}*"):  # of a merge that was killed: the size of a model
            if (match := made_here.fullmatch(leftover.name)) and match[1] == out.name:
                remove(leftover)
    with lock:
        try:
            yield
        finally:
            place.unlink(missing_ok=True)


def weights_dtype(folder: str) -> torch.dtype:
    """The type of a model's weights, by its configuration."""
    config = AutoConfig.from_pretrained(folder)
    return config.dtype or config.get_text_config().dtype or torch.float32


def build_parser() -> Parser:
    parser = Parser("merge.py", description="Add a checkpoint's LoRA to its base model's weights.")
    parser.add_argument("--ckpt", required=True, help="checkpoint, or a run's folder for its best one")
    parser.add_argument("--out", required=True, help="new folder of the merged model")
    parser.add_argument("--model", default="", help="base model; empty: the checkpoint's")
    parser.add_argument("--dtype", type=choice("auto", "float32"), default="auto", help="auto: the base model's")
    parser.add_argument("--rows", default="", help="rows to compare logits on; empty: the run's validation rows")
    parser.add_argument("--images", default="", help="folder that their image names start from; empty: the run's")
    return parser


def parse(argv: list[str]) -> argparse.Namespace:
    args, problems = parse_words(build_parser(), argv)
    refuse(problems)
    return args


@torch.no_grad()
def answer_logits(model: TreeModel, data: VQAData, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Logits (answer tokens, vocabulary) of all samples, on the CPU."""
    logits = []
    for trees in plan_evaluation(data.samples, MAX_TOKENS):
        batch = build_batch(data, Assignment(trees), model.settings, padding(device)).to(device)
        with autocast(device, dtype):
            logits.append(model.eval().answer_logits(batch).cpu())
    return torch.cat(logits)


def write_merged(folder: str, ckpt: Path, dtype: torch.dtype, device: torch.device, out: Path) -> None:
    """Write the merged model, and copy the tokenizer, processor and other files of the base model's folder."""
    plain = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, device_map={"": device})
    model = PeftModel.from_pretrained(plain, ckpt)
    merge_lora(model)
    model.unload().save_pretrained(out, max_shard_size="5GB")
    for path in Path(folder).iterdir():
        if path.is_file() and ".safetensors" not in path.name and not (out / path.name).exists():
            shutil.copy(path, out)


if __name__ == "__main__":
    dist_utils.run_and_exit(main, sys.argv[1:])
