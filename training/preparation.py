"""Preparation: what is read, checked and described before a model is loaded, and what `--plan` does with it."""

import argparse
import math
import os
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoConfig, PretrainedConfig

import dist_utils
from common import InputError, collector_paused, nearest_existing, quote
from data import VQAData, load_data
from dist_utils import Ranks, print0
from evaluation.runner import plan_evaluation
from inputs.holdout import hold_out, relative_names
from inputs.images import ImageSettings, image_settings
from inputs.prompts import may_think, prompt_hash
from inputs.refused import refuse_without_images, stop_or_skip_bad
from inputs.texts import load_tokenizer
from inputs.vision_cache import SPARE, cache_at
from modeling.delta import check_kernels
from modeling.fp8 import check_products
from modeling.loading import check_precision, fingerprint, resolve_model, weights_hashes
from modeling.lora import lora_differences
from modeling.precision import ROUNDED_GRADIENTS
from modeling.targets import names_vision, resolve_targets
from training.checkpoints import check_base, find_checkpoint, read_manifest, size_and_sum
from training.compatibility import PLAN_VERSION
from training.costs import tree_counter, uncounted
from training.description import describe_data, without_effect
from training.gpus import GPUS
from training.plan import GIB, empty_model, make_job, report
from training.rehearsal import Bounds, micro_batch_bounds
from training.scaling import plan_settings
from training.settings import FREE_SETTINGS, count_steps
from training.shared_memory import check_shared_memory
from trees import MicroBatch, Step, StepSampler, make_plan, questions_by_file


@dataclass(frozen=True)
class Prepared:
    """What a run needs before its model is loaded. The same on every rank, but for the rank's share in `sampler`."""

    folder: str  # of the base model
    config: PretrainedConfig
    images: ImageSettings
    train: VQAData
    val: VQAData | None
    val_batches: list[MicroBatch]  # of an evaluation; empty where there are no validation rows
    sampler: StepSampler
    plan: list[Step]  # of the first epoch
    bounds: Bounds  # what no micro-batch exceeds
    steps: int  # of the whole run
    identity: dict  # what the result depends on
    checkpoint: Path | None  # to go on from
    base: dict[str, str]  # hashes of what the base model is


def prepare(
    args: argparse.Namespace, ranks: Ranks, dtype: torch.dtype, output: Path, bad_rows: Path | None
) -> Prepared:
    """Read and check rows, settings and the model's configuration, and tell what they are. Raises InputError."""
    if warning := dist_utils.from_rank0(lambda: check_products(args.base_precision, dtype, ranks.device)):
        print0(f"warning: {warning}")
    folder = dist_utils.local_rank0_first(lambda: resolve_model(args.model))
    config, tokenizer = read_config(args, folder), load_tokenizer(folder)
    if warning := dist_utils.from_rank0(lambda: check_kernels(config.model_type, ranks.device, dtype)):
        print0(f"warning: {warning}")
    images = image_settings(folder, args.min_pixels, args.max_pixels)
    with collector_paused():
        train, val = dist_utils.from_rank0(lambda: load_rows(args, tokenizer, images, bad_rows))
    count_flops = tree_counter(config, train.samples, not uncounted(config, args), tower=not args.vision_cache)
    sampler = StepSampler(
        train.samples, plan_settings(args), args.max_tokens, ranks.rank, ranks.world_size, count_flops
    )
    plan = make_plan(train.samples, plan_settings(args), 0)
    bounds = micro_batch_bounds(train.samples, plan_settings(args), args.max_tokens)
    dist_utils.from_rank0(lambda: describe_run(args, train, val, plan, tokenizer))
    identity = identify(args, images, train, val, folder) | ({"thinking": "off"} if may_think(tokenizer) else {})
    checkpoint = dist_utils.from_rank0(lambda: find_checkpoint(args.resume, output, identity))
    dist_utils.from_rank0(lambda: check_lora(args, empty_model(config, args), is_new=not checkpoint))
    first = Path(args.init_from) if args.init_from else None
    dist_utils.from_rank0(lambda: check_base(checkpoint, first, folder))
    if first and not checkpoint:
        dist_utils.from_rank0(lambda: warn_of_other_questions(first, identity))
    dist_utils.from_rank0(lambda: check_cache(args, config, dtype, images, train, val))
    val_batches = plan_evaluation(val.samples, args.max_tokens) if val else []
    cache = cache_at(Path(args.vision_cache), config, dtype) if args.vision_cache else None
    # Training's workers go on during an evaluation.
    parts = [(train, [bounds.largest]), (val, val_batches)]
    dist_utils.from_rank0(lambda: check_shared_memory(parts, images, args.workers, cache))
    steps = count_steps(args, len(sampler), args.epochs)
    base = dist_utils.from_rank0(lambda: weights_hashes(folder) | {"prompt": prompt_hash(tokenizer)})
    return Prepared(
        folder,
        config,
        images,
        train,
        val,
        val_batches,
        sampler,
        plan,
        bounds,
        steps,
        identity,
        checkpoint,
        base,
    )


def read_config(args: argparse.Namespace, folder: str) -> PretrainedConfig:
    """The model's configuration. It settles what --lora-targets names, for the run's settings to record it.

    Raises InputError for a --base-precision that was not tried on the model's family.
    """
    config = AutoConfig.from_pretrained(folder)
    check_precision(config.model_type, args.base_precision)
    args.lora_targets = resolve_targets(args.lora_targets, config.model_type)
    return config


def load_rows(args: argparse.Namespace, tokenizer, images, output: Path | None) -> tuple[VQAData, VQAData | None]:
    """Training and validation rows as --train, --val and --val-fraction name them."""
    files = [*args.train, args.val] if args.val else args.train
    options = {name: getattr(args, name) for name in ("system", "prompt", "image_first", "allow_outside_images")}
    data = load_data(files, args.images, tokenizer, images, args.max_tokens, headers_only=args.plan, **options)
    stop_or_skip_bad(data.bad, files, {sample.file for sample in data.samples}, args.skip_bad, output, args.images)
    data.bad = [replace(row, row=None) for row in data.bad]  # written down, and too much to send to all ranks
    if not data.grids and Path(args.images) != Path(args.train[0]).parent:  # the default, where --images is left out
        refuse_without_images(args.images)
    count = len(args.train)
    train, val = data.of_files(0, count), data.of_files(count, count + 1) if args.val else None
    if args.val_fraction:
        name = cache(lambda images: relative_names(images, args.images))  # samples share images
        names = [name(sample.images) for sample in train.samples]
        trained, held_out = hold_out(names, args.val_fraction, args.seed)
        val = replace(train.only([train.samples[i] for i in held_out]), bad=[])
        print0(f"held out {len(val.samples):,} questions on {len(val.grids):,} of {len(train.grids):,} images")
        train = train.only([train.samples[i] for i in trained])
    if len(args.train) > 1 or args.train_weights:
        for indices, asked in questions_by_file(train.samples, plan_settings(args)):
            path = args.train[train.samples[indices[0]].file]
            print0(f"{path}: {len(indices):,} questions, {asked:,} per epoch")
    return train, val


def print_plan(args: argparse.Namespace) -> None:
    """What --plan prints. Reads no weights and writes nothing. Raises InputError for rows that can't be used."""
    if args.dtype == "float32":
        raise InputError("--plan knows what bfloat16 costs: leave --dtype at auto")
    folder = resolve_model(args.model, weights=False)
    config, tokenizer = read_config(args, folder), load_tokenizer(folder)
    if args.base_precision in ROUNDED_GRADIENTS and not GPUS[args.gpu].has_fp8:
        raise InputError(
            f"--base-precision {args.base_precision}: no FP8 products on {args.gpu}, where fp8-weights runs"
        )
    if unknown := uncounted(config, args):
        known = "LoRA on the language models of Qwen3-VL and Qwen3.5"
        raise InputError(f"--plan knows the costs of {known},\n  not those of {unknown}")
    model = empty_model(config, args)
    check_lora(args, model, is_new=True)
    images = image_settings(folder, args.min_pixels, args.max_pixels)
    with collector_paused():
        train, val = load_rows(args, tokenizer, images, None)
    plan = make_plan(train.samples, plan_settings(args), 0)
    bounds = micro_batch_bounds(train.samples, plan_settings(args), args.max_tokens)
    check_cache(args, config, torch.bfloat16, images, train, val)
    describe_run(args, train, val, plan, tokenizer)
    print0(report(make_job(args, config, train, val, plan, bounds.tokens, model), images))


def describe_run(args: argparse.Namespace, train: VQAData, val: VQAData | None, plan: list[Step], tokenizer) -> None:
    """Print what will be trained, and which settings can't do what they say."""
    describe_data(train, val, plan, tokenizer)
    for warning in without_effect(args, count_steps(args, len(plan), args.epochs)):
        print0(f"warning: {warning}")


# -------------------------------------------------------------------------------------------------------------- checks


def check_lora(args: argparse.Namespace, model: PeftModel, is_new: bool) -> None:
    """Raises InputError where --init-from does not fit the `empty_model` of a run that `is_new`."""
    if args.init_from and is_new and (differences := lora_differences(model, Path(args.init_from))):
        raise InputError("\n  ".join([f"--init-from {args.init_from} does not fit:", *differences]))


def warn_of_other_questions(first: Path, identity: dict) -> None:
    """Print what of a question's form differs from that of the run that wrote the adapter `first`, if that was one."""
    names = ("system", "prompt", "image_first", "image min_pixels", "image max_pixels")
    with suppress(ValueError):  # there is no manifest, or a damaged one
        before = read_manifest(first)["identity"]
        changed = [name for name in names if before.get(name, identity[name]) != identity[name]]
        if changed:
            differs = (f"{name}: was {quote(before[name])}, is now {quote(identity[name])}" for name in changed)
            print0("\n  ".join([f"warning: {first} was trained on questions of another form", *differs]))


def check_cache(
    args, config: PretrainedConfig, dtype: torch.dtype, images: ImageSettings, train: VQAData, val: VQAData | None
) -> None:
    """Say how much room --vision-cache takes. Raises InputError where it is of no use or has no room."""
    if not args.vision_cache:
        return
    if names_vision(args.lora_targets):
        raise InputError("--vision-cache: --lora-targets trains the vision tower, whose features change then")
    folder = Path(args.vision_cache).absolute()
    cache = cache_at(folder, config, dtype)
    grids = train.grids | (val.grids if val else {})
    needed = sum(cache.size(math.prod(grid) // images.merge_size**2) for grid in grids.values())
    filled = 0
    for path in folder.glob("*/*"):
        with suppress(OSError):  # another run may be filling it
            filled += path.stat().st_size
    existing = nearest_existing(folder)
    free = shutil.disk_usage(existing).free
    sizes = f"{needed / GIB:.1f} GiB for {len(grids):,} pictures, {filled / GIB:.1f} there, {free / GIB:.1f} free"
    if needed - filled > free - SPARE or not existing.is_dir() or not os.access(existing, os.W_OK):
        raise InputError(f"--vision-cache {folder} can't be filled ({sizes}): choose another folder")
    print0(f"vision cache in {folder}: {sizes}")


def identify(args, images: ImageSettings, train: VQAData, val: VQAData | None, model_folder: str) -> dict:
    """What a run's result depends on: a run whose identity differs from a checkpoint's can't go on from it."""
    facts = {name: value for name, value in vars(args).items() if name not in FREE_SETTINGS}
    facts |= {f"image {name}": value for name, value in asdict(images).items()}
    for name, data in (("train rows", train), ("val rows", val)):
        fingerprint_of = f"{len(data.samples):,} questions, fingerprint {data.fingerprint(args.images)}" if data else ""
        facts[name] = fingerprint_of or "none"
    adapter = Path(args.init_from) / "adapter_model.safetensors"
    if not args.init_from:
        facts["first weights"] = ""
    elif adapter.is_file():  # a run that is resumed can do without it
        facts["first weights"] = size_and_sum(adapter)["sha256"][:16]
    return facts | {"base model": fingerprint(model_folder), "plan version": PLAN_VERSION}
