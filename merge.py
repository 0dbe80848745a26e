"""Merge a checkpoint's LoRA into its base model: a model folder that needs no PEFT.

    python merge.py --ckpt runs/mine --out merged
    python merge.py --adapter swift/checkpoint-99 --rows val.jsonl --images pictures --out merged   # made elsewhere

Weights are added in float32 and rounded once, each to its own type. All other files are the base model's, so that what
loads it loads the merged model too; only its end tokens and its limits on pixels become those of the run, whose prompts
are kept for eval.py. Before the folder gets its name, the merged model is loaded from it, and its logits on rows of the
run are compared with the adapter's.
"""

import sys

if __name__ == "__main__":  # wrong settings and --help are answered before torch is imported, which takes seconds
    from training.merge_settings import parse
    from training.settings import answer_early

    answer_early(parse)

import argparse
import os
import re
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoConfig

import dist_utils
from common import PARTIAL, InputError, open_locked, remove, replacing, sign, writing
from data import Batch, VQAData, build_batch, encode_rows, padding
from dist_utils import print0
from evaluation.answers import stop_tokens
from evaluation.runner import plan_evaluation
from inputs.holdout import possible_names, split
from inputs.images import ImageSettings, image_settings
from inputs.prompts import may_think
from inputs.row_files import read_rows
from inputs.texts import load_tokenizer
from model import TreeModel, autocast, load_base
from modeling.adapters import base_name
from modeling.loading import fp8_blocks, resolve_model
from modeling.lora import load_adapter, merge_lora
from modeling.merging import copy_files, set_end_tokens, set_pixel_limits, weights_dtype, write_weights
from training.checkpoints import find_adapter, warn_of_other_base, warn_of_other_prompts
from training.merge_settings import parse
from training.merged_prompts import write_prompts
from training.model_card import merged_card
from trees import Assignment

ROWS = 16  # whose logits are compared
MAX_TOKENS = 8192  # of a batch in that comparison
# Largest distance of merged logits from the adapter's, as a share of that between adapter and base model. Rounding to
# bfloat16 alone stays far below; an adapter that rounding loses is near 1.
MOST_APART = 0.2


def main(argv: list[str], _stop=None) -> int:
    """Merge. Returns the exit code 0; raises InputError for what can't be merged."""
    # Settings: what to merge, and where to. An adapter made elsewhere has no run that tells more.
    args = parse(argv)
    ckpt, state = find_adapter(args.ckpt, args.adapter)
    with reserving(Path(args.out)):
        return merge(args, ckpt, state.get("settings", {}), state.get("held_out", []), Path(args.out))


def merge(args: argparse.Namespace, ckpt: Path, run: dict, held_out: list[str], out: Path) -> int:
    """Write the merged model. `run` are the settings of the adapter's run, `held_out` names of images that it held out.
    Returns the exit code 0; raises InputError for what can't be merged."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = args.model or run.get("model") or base_name(ckpt)
    folder = resolve_model(name)
    if fp8_blocks(getattr(AutoConfig.from_pretrained(folder), "quantization_config", None)):
        raise InputError(
            f"{name} was published in FP8, where a merge would round LoRA away:\n"
            "  name the model that it was made from by --model, or serve the adapter beside it"
        )
    warn_of_other_base(ckpt, folder)
    to_float32 = args.dtype == "float32"
    dtype = torch.float32 if to_float32 else weights_dtype(folder)
    settings = ImageSettings(**run["image_settings"]) if run else image_settings(folder)
    tokenizer = load_tokenizer(folder)
    warn_of_other_prompts(ckpt, tokenizer)
    rows, data = rows_to_compare(args, run, held_out, tokenizer, settings)

    batches = [
        build_batch(data, Assignment(trees), settings, padding(device)).to(device)
        for trees in plan_evaluation(data.samples, MAX_TOKENS)
    ]

    # Logits of the adapter on the weights that it was trained on, where those were rounded, and on the original ones.
    trained, precision = None, run.get("base_precision", "bf16")
    if precision == "fp8-weights":
        trained = answer_logits(load_tuned(folder, ckpt, settings, dtype, device, precision), batches, device, dtype)
    model = load_tuned(folder, ckpt, settings, dtype, device)
    tuned = answer_logits(model, batches, device, dtype)
    with model.model.disable_adapter():
        base = answer_logits(model, batches, device, dtype)
    if torch.equal(tuned, base):
        raise InputError(f"{rows}: the adapter changes no logits on these rows, name others by --rows and --images")

    # The merged model gets its name once its logits have been compared. The other one goes before it is loaded.
    with writing(f"--out: {out} was not written"), replacing(out) as partial:
        copy_files(folder, partial, to_float32)
        if settings != image_settings(folder):
            set_pixel_limits(partial, (settings.min_pixels, settings.max_pixels))
        set_end_tokens(partial, stop_tokens(model.base, tokenizer))
        if run:
            write_prompts(partial, run)
        (partial / "README.md").write_text(merged_card(name, folder, run, may_think(tokenizer)), encoding="utf-8")
        write_weights(folder, model.model, merge_lora, partial, to_float32)
        del model
        merged = answer_logits(TreeModel(load_base(str(partial), dtype, device), settings), batches, device, dtype)
        apart = ((merged - tuned).norm() / (tuned - base).norm()).item()
        share = f"{100 * apart:.2g}% as far apart as tuned and base are"
        verdict = f"logits of merged weights and adapter are {share}"
        if not apart < MOST_APART:
            rounded = f"too little is left once rounded to {dtype}; keep it, or --dtype float32"
            raise InputError(f"not merged, {verdict}: {rounded}")
    print0(f"{verdict} ({len(data.samples)} rows)\nwrote {out}")
    if trained is not None and (args.rows or run["val"] or held_out):  # else it was trained on these rows
        targets = torch.cat([batch.targets.cpu() for batch in batches])
        before, after = (F.cross_entropy(logits, targets).item() for logits in (trained, merged))
        print0(f"loss on the same rows of {rows}:\n  {before:.4f} on FP8 weights, as trained; {after:.4f} merged")
    return 0


def load_tuned(folder: str, ckpt: Path, settings: ImageSettings, dtype, device, precision: str = "bf16") -> TreeModel:
    return TreeModel(load_adapter(load_base(folder, dtype, device, precision), ckpt), settings)


def rows_to_compare(
    args: argparse.Namespace, run: dict, held_out: list[str], tokenizer, settings: ImageSettings
) -> tuple[str, VQAData]:
    """The file of rows to compare logits on, and the first of them that can be used: rows that were held out, where the
    run names some. Raises InputError if none can be used."""
    rows = args.rows or run.get("val") or run["train"][0]
    images = args.images or run.get("images") or str(Path(rows).parent)
    options = {name: run[name] for name in ("system", "prompt", "image_first") if name in run}
    limit, chosen = run.get("max_tokens", MAX_TOKENS), read_rows(Path(rows))[0]
    if held_out and not args.rows:
        names = [possible_names(row.images, images) for row in chosen]
        chosen = [chosen[index] for index in split(names, held_out)[1]] or chosen
    data = encode_rows(chosen[:ROWS], images, tokenizer, settings, limit, allow_outside_images=True, **options)
    if not data.samples:
        why = f"\n  {data.bad[0].where}: {data.bad[0].reason}" if data.bad else ""
        raise InputError(f"{rows}: no usable row to compare logits on: name others by --rows and --images{why}")
    return rows, data


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


@torch.no_grad()
def answer_logits(model: TreeModel, batches: list[Batch], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Logits (answer tokens, vocabulary) of all samples, on the CPU."""
    model.eval()
    with autocast(device, dtype):
        return torch.cat([model.answer_logits(batch).cpu() for batch in batches])


if __name__ == "__main__":
    dist_utils.run_and_exit(main, sys.argv[1:])
