"""Evaluation: loss and exact match by teacher forcing (training uses these too), generated answers and their scores.

python eval.py --ckpt runs/kvasir                                  # the run's best checkpoint on its own --val rows
torchrun --nproc_per_node=4 eval.py --ckpt runs/kvasir/checkpoint-000600 --data test.jsonl --images pictures
python eval.py --ckpt runs/kvasir --with-base --options            # base against tuned; options by likelihood too
python eval.py --model Qwen/Qwen3-VL-8B-Instruct --data test.jsonl --images pictures    # the base model
python eval.py --adapter swift/checkpoint-99 --data test.jsonl --images pictures    # an adapter made elsewhere
python eval.py --ckpt runs/kvasir --image a.jpg --question "Is there text?"    # one answer and its confidence, no files
"""

import sys

if __name__ == "__main__":  # wrong settings and --help are answered before torch is imported, which takes seconds
    from training.eval_settings import parse
    from training.settings import answer_early

    answer_early(parse)

import argparse
import faulthandler
import json
import os
import shlex
import shutil
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path

import torch
from transformers import AutoConfig

import dist_utils
from common import STARTED, InputError, lock_folder, nearest_existing, removed_if_refused, sign, write_whole, writing
from data import VQAData, encode_rows, load_data
from dist_utils import Ranks, Stop, print0
from evaluation import overlap, scores
from evaluation.answers import (
    MAX_TREES,
    answer_all,
    length_warnings,
    predict,
    repetition_penalty,
    score_samples,
    unused_settings,
)
from evaluation.comparison import compare_files, replaced_results
from evaluation.report import write_report
from evaluation.runner import Runner, plan_evaluation
from evaluation.tables import (
    accuracy_table,
    breakdown_table,
    describe_comparison,
    summary_csv,
    summary_tex,
)
from inputs.fields import is_filled
from inputs.holdout import possible_names, relative_names, split
from inputs.images import ImageSettings, image_settings, picture_warnings
from inputs.refused import refuse_without_images, stop_or_skip_bad
from inputs.row_files import read_rows
from inputs.rows import ENCODER, parse_row
from inputs.texts import load_tokenizer
from inputs.vision_cache import VisionCache
from model import TreeModel, load_base, pick_dtype
from modeling.adapters import base_name
from modeling.delta import check_library
from modeling.fp8 import check_products
from modeling.loading import check_precision, fingerprint, resolve_model
from modeling.lora import load_adapter, merge_lora
from modeling.memory import start_compile_workers
from modeling.precision import forward_precision
from training.checkpoints import VERSIONS, find_adapter, warn_of_other_base, warn_of_other_prompts
from training.description import unread_warnings
from training.eval_settings import parse
from training.merged_prompts import read_prompts
from training.metrics import read_metrics
from training.settings import DEFAULT_MODEL, nearest
from training.shared_memory import check_shared_memory
from trees import MicroBatch

# ------------------------------------------------------------------------------------------------------ teacher forcing


def evaluate(
    model: TreeModel,
    data: VQAData,
    batches: list[MicroBatch],
    ranks: Ranks,
    dtype: torch.dtype,
    workers: int,
    stop: Stop,
    cache: VisionCache | None = None,
) -> dict | None:
    """Loss (mean over answer tokens) and exact match over `batches`, on all ranks, each sample once. None when stopped.

    Greedy decoding yields the reference answer iff every answer token, including the end of turn, is the most likely
    one after the reference before it. So exact match takes one forward pass per tree and no generation.
    """
    model.eval()
    results = Runner(model, ranks, dtype, workers, stop).run(score_samples, data, batches, cache=cache)
    model.train()
    if results is None:
        return None
    by_type, kinds = {}, scores.question_types([sample.fields for sample in data.samples])
    for index, (_, _, correct) in sorted(results.items()):
        by_type.setdefault(kinds[index], []).append(correct)
    losses, tokens, correct = zip(*results.values())
    return {
        "loss": sum(losses) / sum(tokens),
        "exact_match": sum(correct) / len(correct),
        "questions": len(correct),
        "by_type": {kind: [sum(c) / len(c), len(c)] for kind, c in sorted(by_type.items())},
    }


# ---------------------------------------------------------------------------------------------------------- the program


def main(argv: list[str], stop: Stop | None = None) -> int:
    """Answer and score. Returns the exit code: 0, or dist_utils.STOPPED when stopped by a signal."""
    stop = stop or Stop()

    # Settings: the command line's and, of a checkpoint, those of its run.
    args = parse(argv)
    if args.compare:
        return compare_files(list(map(Path, args.compare)))
    sources = find_sources(args)
    args.merge = args.merge and sources.precision == "bf16"  # FP8 weights would round LoRA away
    ranks = dist_utils.start()
    dtype = pick_dtype(args.dtype, ranks.device)
    if warning := dist_utils.from_rank0(lambda: check_products(sources.precision, dtype, ranks.device)):
        print0(f"warning: {warning}")
    folder = dist_utils.local_rank0_first(lambda: resolve_model(sources.model))
    if not sources.ckpt:
        sources = replace(sources, prompts=sources.prompts | read_prompts(folder, args))
    tokenizer = load_tokenizer(folder)
    dist_utils.from_rank0(lambda: warn_of_other_prompts(sources.ckpt, tokenizer))
    settings = sources.image_settings(folder, args.min_pixels, args.max_pixels)
    if args.question is not None:
        return answer_question(args, sources, folder, tokenizer, settings, ranks, dtype)

    # Rows: rank 0 reads and checks them, every rank gets the same samples.
    start_compile_workers(ranks.device)
    data, options = dist_utils.from_rank0(lambda: load_rows(args, sources, tokenizer, settings))
    subject = sources.ckpt or f"base model {sources.model}"
    subject = subject if sources.precision == "bf16" else f"{subject} with its base in {sources.precision}"
    print0(f"{len(data.samples):,} questions of {sources.rows}\n{subject}, {ranks.world_size} rank(s)")

    # Model.
    model = load_model(folder, sources.ckpt, settings, dtype, ranks.device, sources.precision)
    penalty = repetition_penalty(model.base)
    if penalty != 1:
        print0(f"answers are generated with the repetition penalty {penalty:g} of the model's generation_config.json")
    facts, key = dist_utils.from_rank0(lambda: identify(args, sources, folder, settings, dtype, data, options, penalty))

    # Answers. The base model's come first: LoRA that was merged can't be taken off again.
    predictions, folders = {}, {}
    for kind in ["base"] * (args.with_base or not sources.ckpt) + ["tuned"] * bool(sources.ckpt):
        if kind == "tuned" and args.merge:
            merge_lora(model.model)
        folders[kind] = sources.output / f"partial-{kind}-{key}"
        runner = Runner(model, ranks, dtype, args.workers, stop, folders[kind], sources.name(kind))
        with model.model.disable_adapter() if sources.ckpt and kind == "base" else nullcontext():
            predictions[kind] = predict(runner, data, sources.images, options, tokenizer, args)
        if predictions[kind] is None:
            faulthandler.cancel_dump_traceback_later()
            print0(f"stopped by {stop.agreed()}; the same command continues where this one stopped")
            dist_utils.leave()
            return dist_utils.STOPPED

    # Results.
    if ranks.is_main:
        with writing(f"--output: can't write to {sources.output}, the same command writes the results anew"):
            write_results(args, sources, facts, data, predictions)
            for partial in folders.values():
                shutil.rmtree(partial)
    dist_utils.leave()
    return 0


# ----------------------------------------------------------------------------------------------------- what is answered


@dataclass(frozen=True)
class Sources:
    """What is evaluated, on which rows, and where results go."""

    ckpt: Path | None  # the adapter's folder; None: a base model
    run: dict  # settings of the checkpoint's run; empty for a base model and for an adapter made elsewhere
    held_out: list[str]  # names of images that the run held out from its training rows
    model: str  # base model: a folder or a name on the hub
    files: list[str]  # of rows
    images: str  # folder that image names start from
    output: Path
    prompts: dict  # system, prompt, image_first
    precision: str  # of the base model's linear layers
    val_rows: str  # how many questions the run validated on, and their fingerprint; empty where they are others

    @property
    def rows(self) -> str:
        return ", ".join(self.files)

    def name(self, kind: str) -> str:
        """The model that answers, "base" or "tuned", as errors name it."""
        base = f"base model {self.model}"
        return f"{self.ckpt} on {base}" if self.ckpt and kind == "tuned" else base

    def image_settings(self, folder: str, min_pixels: int, max_pixels: int) -> ImageSettings:
        """Those of training, unless pixel limits are given."""
        if self.run and not (min_pixels or max_pixels):
            return ImageSettings(**self.run["image_settings"])
        return image_settings(folder, min_pixels, max_pixels)


def find_sources(args: argparse.Namespace) -> Sources:
    """Fill what the command line leaves open from the checkpoint's run. Raises InputError when there are no rows."""
    ckpt, state = find_adapter(args.ckpt, args.adapter)
    run, held_out = state.get("settings", {}), state.get("held_out", [])
    validation = run["train"] if held_out else [run["val"]] if run.get("val") else []
    files = [args.data] if args.data else validation
    if not files and args.question is None:
        why = " (the checkpoint's run had no --val)" if run else ""
        raise InputError(f"no rows to answer: give --data FILE{why}")
    images = args.images or (str(Path(args.data).parent) if args.data else run.get("images", ""))
    elsewhere = f"runs/eval-{ckpt.name if ckpt else 'base'}"
    output = Path(args.output or (ckpt.parent / "eval" / ckpt.name if run else elsewhere))
    model = args.model or run.get("model") or (base_name(ckpt) if ckpt else DEFAULT_MODEL)
    defaults = {"system": "", "prompt": "{question}", "image_first": False}
    prompts = {name: run.get(name, default) for name, default in defaults.items()}
    prompts |= {name: value for name in ("system", "prompt") if (value := getattr(args, name)) is not None}
    precision = args.base_precision
    if precision == "auto":
        precision = forward_precision(run.get("base_precision", "bf16"))
    given = (args.data, args.images, args.model, args.system, args.prompt, args.min_pixels, args.max_pixels)
    as_trained = not any(value not in (None, "", 0) for value in given)
    val_rows = state.get("identity", {}).get("val rows", "") if as_trained else ""
    return Sources(ckpt, run, held_out, model, files, images, output, prompts, precision, val_rows)


def load_rows(
    args: argparse.Namespace, sources: Sources, tokenizer, settings: ImageSettings
) -> tuple[VQAData, list[list[str]]]:
    """The samples to answer, and for each of them the options to score."""
    limits = {"max_tokens": args.max_tokens, "allow_outside_images": args.allow_outside_images, "by": args.by}
    data = load_data(sources.files, sources.images, tokenizer, settings, **limits, **sources.prompts)
    stays, usable = nearest_existing(sources.output), {sample.file for sample in data.samples}
    make_output(sources.output)
    with removed_if_refused(sources.output.resolve(), stays):
        listing = sources.output if args.output or args.skip_bad else None
        stop_or_skip_bad(data.bad, sources.files, usable, args.skip_bad, listing, sources.images)
        if args.images and not data.grids:
            refuse_without_images(args.images)
        if sources.held_out and not args.data:
            names = [relative_names(sample.images, sources.images) for sample in data.samples]
            data = data.only([data.samples[i] for i in split(names, sources.held_out)[1]])
        if not data.samples:
            raise InputError(f"{sources.rows}: none of the held-out rows can be used")
        refuse_unknown_fields(args.by, data, sources)
        check_shared_memory([(data, plan_evaluation(data.samples, args.max_tokens, MAX_TREES))], settings, args.workers)
    facts = {"checkpoint": str(sources.ckpt or ""), "model": sources.model, "rows": sources.rows} | sources.prompts
    facts |= {"pictures": str(Path(sources.images).absolute()), "max_new_tokens": args.max_new_tokens}
    facts |= {"min_pixels": settings.min_pixels, "max_pixels": settings.max_pixels}
    replaced = replaced_results(sources.output, facts, args.with_base or not sources.ckpt)
    more = length_warnings(data.samples, args.max_new_tokens) + replaced
    if sources.val_rows and data.fingerprint(sources.images) not in sources.val_rows:
        before, _, _ = sources.val_rows.partition(", fingerprint")
        more.append(f"{sources.rows}: rows or images are not as in training, which validated on {before}")
    for warning in picture_warnings(data.sizes) + unread_warnings(data) + more:
        print0(f"warning: {warning}")
    closed = closed_options(sources, args.closed_set) if args.closed_set else {}
    own = [sample.fields.get("options", []) if args.options else [] for sample in data.samples]
    return data, [texts or closed.get(sample.fields["question"], []) for texts, sample in zip(own, data.samples)]


def refuse_unknown_fields(by: list[str], data: VQAData, sources: Sources) -> None:
    """Raise InputError for a field of --by that no sample has, with the name that may be meant."""
    for name in by:
        if not any(name in sample.fields.get("by", {}) for sample in data.samples):
            rows = (row for file in sources.files for row in read_rows(Path(file))[0])
            filled = (field for row in rows for field, value in json.loads(row.written).items() if is_filled(value))
            known = nearest(name, dict.fromkeys(filled))
            raise InputError(f"--by {name}: no row of {sources.rows} has this field{known}")


def closed_options(sources: Sources, at_most: int) -> dict[str, list[str]]:
    """Question -> the answers that the run's training rows give to it, where these are `at_most` or fewer."""
    rows = [row for file in sources.run["train"] for row in read_rows(Path(file))[0]]
    names = [possible_names(row.images, sources.run.get("images", "")) for row in rows]
    trained, _ = split(names, sources.held_out)
    return scores.closed_sets([rows[i].fields for i in trained], at_most)


def make_output(output: Path) -> None:
    """Make and lock the folder for results. Raises InputError where it can't be written, where another evaluation is
    using it, or where it is a training run's."""
    if (output / "settings.toml").exists():
        raise InputError(f"--output: {output} is the folder of a training run")
    sign(lock_folder(output, "--output"))


def identify(
    args, sources: Sources, folder: str, settings: ImageSettings, dtype, data: VQAData, options: list, penalty: float
) -> tuple[dict, str]:
    """The facts that answers depend on, and a key of them: only an evaluation with the same key continues this one.

    The key also covers the size and time of every file of weights and every image.
    """
    names = ["manifest.json"] if sources.run else ["adapter_config.json", "adapter_model.safetensors"]
    manifest = b"".join((sources.ckpt / name).read_bytes() for name in names) if sources.ckpt else b""
    facts = {
        "model": sources.model,
        "base": fingerprint(folder),
        "checkpoint": str(sources.ckpt or ""),
        "rows": sources.rows,
        "data": data.fingerprint(sources.images),
        "pictures": str(Path(sources.images).absolute()),
        "images": asdict(settings),
        **sources.prompts,
        "options": sha256(json.dumps(options).encode()).hexdigest()[:16],
        "manifest": sha256(manifest).hexdigest() if sources.ckpt else "",
        **{name: getattr(args, name) for name in ("max_new_tokens", "max_tokens", "merge")},
        "repetition_penalty": penalty,
        "dtype": str(dtype),
        "base_precision": sources.precision,
        "versions": VERSIONS,
    }
    status = [os.stat(path) for path in [*sorted(Path(folder).glob("*.safetensors")), *data.grids]]
    stamps = [[file.st_size, file.st_mtime_ns] for file in status]
    return facts, sha256(json.dumps([facts, stamps], sort_keys=True).encode()).hexdigest()[:16]


def load_model(
    folder: str, ckpt: Path | None, settings: ImageSettings, dtype, device: torch.device, precision: str = "bf16"
) -> TreeModel:
    model_type = AutoConfig.from_pretrained(folder).model_type
    check_precision(model_type, precision)
    if slow := check_library(model_type, device, dtype):
        print0(f"warning: {slow}")
    warn_of_other_base(ckpt, folder)
    base = load_base(folder, dtype, device, precision)
    if unused := unused_settings(base):
        print0(
            f"warning: {folder}/generation_config.json sets {', '.join(unused)}\n  generated answers do not follow it"
        )
    return TreeModel(load_adapter(base, ckpt) if ckpt else base, settings).eval()


# --------------------------------------------------------------------------------------------------------- one question


def answer_question(args, sources: Sources, folder: str, tokenizer, settings, ranks: Ranks, dtype) -> int:
    """Print the answer to --question and its confidence. Writes no file, and returns the exit code."""
    data = question_data(args, sources, tokenizer, settings)
    model = load_model(folder, sources.ckpt, settings, dtype, ranks.device, sources.precision)
    model.dense_masks = True
    if sources.ckpt and args.merge:
        merge_lora(model.model)
    runner = Runner(model, ranks, dtype, 0, Stop(), subject=sources.name("tuned"))
    (answer,) = answer_all(runner, data, tokenizer, args.max_tokens, args.max_new_tokens)
    seconds = time.perf_counter() - STARTED
    print0(f"{answer['prediction']}\nconfidence {answer['confidence']:.4f}, answered after {seconds:.0f} s")
    dist_utils.leave()
    return 0


def question_data(args: argparse.Namespace, sources: Sources, tokenizer, settings: ImageSettings) -> VQAData:
    """--question and its --image files as a data set of one row. Raises InputError if they can't be one."""
    fields = {"image": args.image, "question": args.question, "answer": "none"}  # generation starts before the answer
    try:
        rows = [parse_row("--question:1", fields)]
    except ValueError as error:
        raise InputError(f"--question: {error}") from None
    options = {"allow_outside_images": True, "headers_only": True}
    data = encode_rows(rows, "", tokenizer, settings, args.max_tokens, **options, **sources.prompts)
    if data.bad:
        raise InputError(f"--question: {data.bad[0].reason}")
    return data


# -------------------------------------------------------------------------------------------------------------- results


def write_results(
    args: argparse.Namespace, sources: Sources, facts: dict, data: VQAData, predictions: dict[str, list[dict]]
) -> None:
    """Write predictions.jsonl (and predictions-base.jsonl), summary.json with its tables as CSV and LaTeX, and
    report.html; print the accuracy table."""
    output, tuned_first = sources.output, dict(reversed(predictions.items()))
    for name, answers in zip(("predictions.jsonl", "predictions-base.jsonl"), tuned_first.values()):
        write_whole(output / name, "".join(ENCODER.encode(answer) + "\n" for answer in answers))
    if len(predictions) == 1:  # the base model's answers of an earlier evaluation are not to these questions
        (output / "predictions-base.jsonl").unlink(missing_ok=True)
    summaries = {kind: scores.summarize(answers, args.numeric_tolerance) for kind, answers in predictions.items()}
    summary = {"command": " ".join(sys.argv), "facts": facts, "settings": vars(args), "scores": summaries}
    print0(accuracy_table(summaries))
    for kind, score in summaries.items():
        if cut := score["cut"]:
            told = f"{cut:,} of {len(data.samples):,} answers ({kind}) were cut at {args.max_new_tokens:,} tokens"
            print0(f"{told}: give a higher --max-new-tokens")
    for field in dict.fromkeys(args.by):
        for kind, score in summaries.items():
            print0(f"\n{breakdown_table(field, kind, score)}")
    if lacking := overlap.missing():
        print0(lacking)
    if len(predictions) == 2:
        summary["comparison"] = scores.compare(predictions["base"], predictions["tuned"])
        print0(describe_comparison(summary["comparison"], "base", "tuned"))
    write_whole(output / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    write_whole(output / "summary.csv", summary_csv(summary))
    write_whole(output / "summary.tex", summary_tex(summary))
    images = [list(sample.images) for sample in data.samples]
    metrics = read_metrics(sources.ckpt.parent / "metrics.jsonl") if sources.run else []
    write_report(output / "report.html", summary, tuned_first, images, metrics)
    print0(f"wrote predictions.jsonl and summary.json, .csv and .tex in\n  {output}")
    print0(f"to read in a browser: {shlex.quote(str(output / 'report.html'))}")


if __name__ == "__main__":
    dist_utils.run_and_exit(main, sys.argv[1:])
