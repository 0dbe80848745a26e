"""What comes before the model of a run is loaded: rows, settings, configuration, read, checked and told; `--plan`."""

import argparse
import math
import os
import shutil
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoTokenizer

from common import InputError
from data import Sample, VQAData, load_data
from dist_utils import print0
from evaluation.scores import normalize
from inputs.holdout import hold_out, relative_names
from inputs.images import ImageSettings, image_settings
from inputs.rows import stop_or_skip_bad
from inputs.vision_cache import SPARE, cache_at
from modeling.loading import fingerprint, resolve_model
from modeling.lora import lora_differences, lora_table
from modeling.targets import names_vision
from training.checkpoints import size_and_sum
from training.costs import uncounted
from training.plan import GIB, GPU_COUNTS, empty_model, make_job, report
from training.settings import FREE_SETTINGS, count_epochs
from trees import PlanSettings, group_samples, largest_micro_batch, make_plan, questions_by_file, rank_efficiency

LONG_ANSWER = 256  # trained tokens


def load_all(args, tokenizer, images, output: Path | None) -> tuple[VQAData, VQAData | None]:
    files = [*args.train, args.val] if args.val else args.train
    options = {"system": args.system, "prompt": args.prompt, "allow_outside_images": args.allow_outside_images}
    data = load_data(files, args.images, tokenizer, images, args.max_tokens, headers_only=args.plan, **options)
    stop_or_skip_bad(data.bad, files, {sample.file for sample in data.samples}, args.skip_bad, output)
    count = len(args.train)
    train, val = data.of_files(0, count), data.of_files(count, count + 1) if args.val else None
    if args.val_fraction:
        names = [relative_names(sample.images, args.images) for sample in train.samples]
        trained, held_out = hold_out(names, args.val_fraction, args.seed)
        val = replace(train.only([train.samples[i] for i in held_out]), bad=[])
        print0(f"held out {len(val.samples):,} questions on {len(val.grids):,} of {len(train.grids):,} images")
        train = train.only([train.samples[i] for i in trained])
    if len(args.train) > 1 or args.train_weights:
        for own, asked in questions_by_file(train.samples, PlanSettings.of(args)):
            print0(f"{args.train[train.samples[own[0]].file]}: {len(own):,} questions, {asked:,} an epoch")
    return train, val


def print_plan(args: argparse.Namespace) -> None:
    """What --plan prints; reads no weights and writes nothing. Raises InputError for rows that can't be used."""
    if args.dtype == "float32":
        raise InputError("--plan knows what bfloat16 costs: leave --dtype at auto")
    model_folder = resolve_model(args.model, weights=False)
    config, tokenizer = AutoConfig.from_pretrained(model_folder), AutoTokenizer.from_pretrained(model_folder)
    if unknown := uncounted(config, args):
        raise InputError(f"--plan knows what LoRA on Qwen3-VL's language model costs, not {unknown}")
    check_lora(args, config, None)
    images = image_settings(model_folder, args.min_pixels, args.max_pixels)
    train_data, val_data = load_all(args, tokenizer, images, None)
    plans = [make_plan(train_data.samples, PlanSettings.of(args), 0)]
    epochs = range(1, count_epochs(args, len(plans[0])))
    plans += [make_plan(train_data.samples, PlanSettings.of(args), epoch) for epoch in epochs]
    check_cache(args, config, torch.bfloat16, images, train_data, val_data)
    describe_data(train_data, val_data, plans[0], tokenizer)
    print0(report(make_job(args, config, train_data, val_data, plans[0], largest_micro_batch(plans)), images))


def check_lora(args: argparse.Namespace, config, found: Path | None) -> None:
    """Raises InputError where --lora-targets names no layer, or --init-from does not fit a run that starts: none is
    `found` to go on with. Loads no weights."""
    model = empty_model(config, args)
    if args.init_from and not found and (differences := lora_differences(model, Path(args.init_from))):
        raise InputError("\n  ".join([f"--init-from {args.init_from} does not fit:", *differences]))


def check_cache(args, config, dtype, images: ImageSettings, train: VQAData, val: VQAData | None) -> None:
    """Say what --vision-cache takes. Raises InputError where it is of no use or has no room."""
    if not args.vision_cache:
        return
    if names_vision(args.lora_targets):
        raise InputError("--vision-cache: --lora-targets trains the vision tower, whose features change then")
    folder = Path(args.vision_cache).absolute()
    cache = cache_at(folder, config, dtype)
    grids = train.grids | (val.grids if val else {})
    total = sum(cache.size(math.prod(grid) // images.merge_size**2) for grid in grids.values())
    there = 0
    for path in folder.glob("*/*"):
        with suppress(FileNotFoundError):  # another run may be filling it
            there += path.stat().st_size
    above = next(path for path in [folder, *folder.parents] if path.exists())
    free = shutil.disk_usage(above).free
    sizes = f"{total / GIB:.1f} GiB for {len(grids):,} pictures, {there / GIB:.1f} there, {free / GIB:.1f} free"
    if total - there > free - SPARE or not above.is_dir() or not os.access(above, os.W_OK):
        raise InputError(f"--vision-cache {folder} can't be filled ({sizes}): choose another folder")
    print0(f"vision cache in {folder}: {sizes}")


def identify(args, images, train_data: VQAData, val_data: VQAData | None, model_folder: str) -> dict:
    """What a run's result depends on: a checkpoint of one run is not resumed by another."""
    facts = {name: value for name, value in vars(args).items() if name not in FREE_SETTINGS}
    facts |= {f"image {name}": value for name, value in asdict(images).items()}
    for name, data in (("train rows", train_data), ("val rows", val_data)):
        facts[name] = (
            f"{len(data.samples):,} questions, fingerprint {data.fingerprint(args.images)}" if data else "none"
        )
    first = Path(args.init_from) / "adapter_model.safetensors"
    if not args.init_from or first.is_file():  # a run that is resumed can do without
        facts["first weights"] = size_and_sum(first)["sha256"][:16] if args.init_from else ""
    return facts | {"base model": fingerprint(model_folder)}


def describe_data(train: VQAData, val: VQAData | None, plan, tokenizer) -> None:
    """Say what will be trained: sizes, lengths, the plan, and one sample with its trained tokens marked."""
    for name, data in (("train", train), ("val", val)):
        if data:
            print0(
                f"{name}: {len(data.samples):,} questions, {len(data.grids):,} images, {len(data.bad):,} rows left out"
            )
    for warning in data_warnings(train, val):
        print0(f"warning: {warning}")
    if weighed := sum(sample.weight != 1 for sample in train.samples):
        print0(f"rows whose `weight` is not 1: {weighed:,}, they count by it in the loss")
    groups = [len(group) for group in group_samples(train.samples)]
    print0(f"questions an image: {min(groups)} to {max(groups)}, {sum(groups) / len(groups):.1f} on average")
    print0("tokens a question (image included):\n" + length_histogram([sample.tokens for sample in train.samples]))
    trees = [tree for step in plan for batch in step for tree in batch]
    alone = sum(train.samples[i].tokens for tree in trees for i in tree.samples)
    together = sum(tree.tokens for tree in trees)
    print0(
        f"plan: {len(trees):,} trees in {len(plan):,} steps an epoch of {len(trees) / len(plan):.1f} images in "
        f"{sum(map(len, plan)) / len(plan):.1f} micro-batches; trees need {together:,} tokens an epoch, "
        f"single questions {alone:,} ({alone / together:.1f}x); rank efficiency "
        + ", ".join(f"{100 * rank_efficiency(plan, n):.0f}% at {n}" for n in GPU_COUNTS)
    )
    print0(f"one sample, trained tokens in ⟦ ⟧:\n{describe_sample(train.samples[0], tokenizer)}")


def data_warnings(train: VQAData, val: VQAData | None) -> list[str]:
    """What may be wrong with rows that can be used: how many, and where the first stands."""
    found = []
    shared = set(train.grids) & set(val.grids) if val else set()
    if shared:
        first, image = next((s, image) for s in val.samples for image in s.images if image in shared)
        found.append(f"validation images that are also trained on: {len(shared):,}, {first.where} {Path(image).name}")
    return found + _row_warnings(train) + (_row_warnings(val) if val else [])


def _row_warnings(data: VQAData) -> list[str]:
    asked, repeats, clashes, long = {}, [], [], []
    for sample in data.samples:
        prompt = sample.ids[: sample.last_answer].tobytes()
        answer, before = sample.fields["answer"], asked.setdefault((sample.images, prompt), {})
        if answer in before:
            repeats.append(f"{sample.where} repeats {before[answer].where}")
        for other, row in before.items():
            if normalize(other) != normalize(answer):
                clashes.append(f"{sample.where} says {answer[:40]!r}, {row.where} {other[:40]!r}")
                break
        before.setdefault(answer, sample)
        if (count := sample.trained.sum()) > LONG_ANSWER:
            long.append(f"{sample.where} has {count:,}")
    kinds = {
        "rows that repeat another in images, question and answer": repeats,
        "rows that contradict another of the same images and question": clashes,
        f"rows of over {LONG_ANSWER} answer tokens": long,
    }
    return [f"{kind}: {len(rows):,}, {rows[0]}" for kind, rows in kinds.items() if rows]


def describe_lora(model) -> None:
    table = lora_table(model)
    for kind, (modules, parameters) in table.items():
        print0(f"  {kind:<38} {modules:>4} modules {parameters:>12,} parameters")
    print0(f"  trained in all {sum(parameters for _, parameters in table.values()):,} parameters")


def describe_sample(sample: Sample, tokenizer) -> str:
    """The sample's text as trained, its trained tokens between ⟦ and ⟧, each image as its number of tokens."""
    edges = np.flatnonzero(np.diff(sample.trained)) + 1
    text, counts = "", iter(sample.image_tokens)
    for piece in np.split(
        np.arange(len(sample.ids)), sorted({*edges, *sample.image_at, *(at + 1 for at in sample.image_at)})
    ):
        if not len(piece):
            continue
        is_image = piece[0] in sample.image_at
        part = f"<{next(counts):,} image tokens>" if is_image else tokenizer.decode(sample.ids[piece].tolist())
        text += f"⟦{part}⟧" if sample.trained[piece[0]] else part
    return text


def length_histogram(lengths: list[int]) -> str:
    """One line a bin: its range in tokens, how many, a bar."""
    counts, edges = np.histogram(lengths, bins=8)
    rows = zip(counts, edges, edges[1:])
    return "\n".join(f"  {a:7,.0f} to {b:7,.0f}  {n:7,}  {'█' * round(40 * n / max(counts))}" for n, a, b in rows)
