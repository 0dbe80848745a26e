"""Evaluation: loss and exact match by teacher forcing (used in training), and generated answers with their accuracy.

python eval.py --ckpt runs/kvasir                                  # the run's best checkpoint on its own --val rows
torchrun --nproc_per_node=4 eval.py --ckpt runs/kvasir/checkpoint-000600 --data test.jsonl --images pictures
python eval.py --ckpt runs/kvasir --with-base --options            # base against tuned; options by likelihood too
python eval.py --model Qwen/Qwen3-VL-8B-Instruct --data test.jsonl --images pictures    # the base model
python eval.py --ckpt runs/kvasir --image a.jpg --question "Is there text?"    # one answer and its confidence, no files
"""

import argparse
import faulthandler
import json
import os
import shutil
import sys
from contextlib import nullcontext
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

import torch
from transformers import AutoTokenizer

import dist_utils
from common import InputError, write_whole
from data import Sample, TreeDataset, VQAData, encode_rows, load_data, make_loader, next_batches, padding
from dist_utils import Ranks, Stop, print0
from evaluation.answers import Run, answer_all, answer_batch, score_all, score_samples
from evaluation.report import write_report
from evaluation.scores import closed_sets, compare, normalize, question_type, summarize, summary_table
from inputs.holdout import possible_names, relative_names, split
from inputs.images import ImageSettings, check_image, image_settings
from inputs.rows import parse_row, read_rows, stop_or_skip_bad
from model import TreeModel, autocast, fingerprint, load_adapter, load_base, pick_dtype, resolve_model
from modeling.lora import merge_lora
from training.checkpoints import VERSIONS, pick_checkpoint, read_state
from training.metrics import read_metrics
from training.settings import DEFAULT_MODEL, Parser, choice, number, parse_words, refuse
from trees import MicroBatch, Work, evaluation_share, whole_trees

# ------------------------------------------------------------------------------------------------------ teacher forcing


@torch.no_grad()
def evaluate(
    model: TreeModel, data: VQAData, batches: list[MicroBatch], ranks: Ranks, dtype, workers: int, stop: Stop
) -> dict | None:
    """Loss (mean over answer tokens) and exact match over `batches`, on all ranks, each sample once. None when stopped.

    Greedy decoding yields the reference answer iff every answer token, end-of-turn included, is the most likely one
    given the reference before it. So one forward pass a tree tells exact match without generating.
    """
    model.eval()
    dataset = TreeDataset(data, model.settings, padding(ranks.device), cache=model.cache)
    mine = {}
    for batch in next_batches(
        make_loader(dataset, evaluation_share(batches, ranks.rank, ranks.world_size), workers, ranks.device)
    ):
        if stop.reason:
            break
        with autocast(ranks.device, dtype):
            mine |= dict(zip(batch.samples, score_samples(model, batch.to(ranks.device))))
    model.train()
    shards = dist_utils.gather_to_all(mine)
    if stop.agreed():
        return None
    results = {index: result for shard in shards for index, result in shard.items()}
    assert len(results) == sum(map(len, shards)) == sum(len(tree.samples) for batch in batches for tree in batch)
    by_type = {}
    for index, (_, _, correct) in sorted(results.items()):
        by_type.setdefault(question_type(data.samples[index].fields), []).append(correct)
    losses, tokens, correct = zip(*results.values())
    return {
        "loss": sum(losses) / sum(tokens),
        "exact_match": sum(correct) / len(correct),
        "questions": len(correct),
        "by_type": {kind: [sum(c) / len(c), len(c)] for kind, c in sorted(by_type.items())},
    }


def accuracy_table(columns: dict[str, dict]) -> str:
    """Exact match in percent by question type, one column an evaluation."""
    first = next(iter(columns.values()))
    lines = [f"{'exact match %':<16}{'questions':>10}" + "".join(f"{name:>10}" for name in columns)]
    for kind, (_, count) in first["by_type"].items():
        values = "".join(f"{100 * column['by_type'][kind][0]:>10.1f}" for column in columns.values())
        lines.append(f"{kind:<16}{count:>10,}{values}")
    values = "".join(f"{100 * column['exact_match']:>10.1f}" for column in columns.values())
    return "\n".join([*lines, f"{'all':<16}{first['questions']:>10,}{values}"])


# --------------------------------------------------------------------------------------------------------- command line

NOT_WITH_QUESTION = ("data", "images", "with_base", "options", "closed_set", "output", "compare")


def build_parser() -> Parser:
    parser = Parser("eval.py", description="Answer questions with a checkpoint or a base model, and score the answers.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)  # fmt: skip
    count, positive, switch = number(int, 0), number(int, 1), argparse.BooleanOptionalAction
    own = "0: the checkpoint's, or the model's own"
    add = parser.add_argument_group("what is answered").add_argument
    add("--ckpt", default="", help="checkpoint, or a run's folder for its best one; empty: the base model")
    add("--with-base", action=switch, default=False, help="also answer with the base model, and compare")
    add("--model", default="", help=f"base model; empty: the checkpoint's, or {DEFAULT_MODEL}")
    add("--data", default="", help="rows to answer; empty: the validation rows of the checkpoint's run")
    add("--images", default="", help="folder that image names start from; empty: the folder of --data")
    add("--question", help="in place of --data: one question, whose answer and confidence are printed")
    add("--image", action="append", default=[], help="picture that --question is about; may be repeated")
    add("--min-pixels", type=count, default=0, help=f"pixels of an image at least; {own}")
    add("--max-pixels", type=count, default=0, help=f"pixels of an image at most; {own}")
    add("--skip-bad", action=switch, default=False, help="go on without rows that can't be used")
    add("--allow-outside-images", action=switch, default=False, help="images outside --images")
    add = parser.add_argument_group("how").add_argument
    add("--max-new-tokens", type=positive, default=256, help="tokens of an answer at most")
    add("--options", action=switch, default=False, help="also weigh by likelihood the options of rows that have some")
    add("--closed-set", type=count, default=0,
        help="likewise the answers that training rows give to a question, if at most so many; 0: none")  # fmt: skip
    add("--merge", action=switch, default=True, help="add LoRA to the weights first: faster; off: as in training")
    add("--max-tokens", type=positive, default=16384, help="tokens that are run at once, at most; bounds memory")
    add("--dtype", type=choice("auto", "bfloat16", "float32"), default="auto", help="auto: bfloat16 on CUDA")
    add("--workers", type=count, default=4, help="processes a rank that decode images; 0: in the process itself")
    add = parser.add_argument_group("results").add_argument
    add("--output", default="", help="folder of the results; empty: RUN/eval/checkpoint-STEP, or runs/eval-base")
    add("--numeric-tolerance", type=number(float, 0), default=0.05, help="relative error of a right number or size")
    add("--compare", nargs=2, metavar="FILE", help="compare two predictions files, and nothing else")
    return parser


def parse(argv: list[str]) -> argparse.Namespace:
    """Settings from the command line. Raises InputError of all that is wrong with them."""
    args, problems = parse_words(build_parser(), argv)
    refuse(problems)
    if args.with_base and not args.ckpt:
        problems.append("--with-base: needs --ckpt")
    if args.closed_set and not args.ckpt:
        problems.append("--closed-set: needs --ckpt, whose run names the training rows")
    if args.question is None and args.image:
        problems.append("--image: needs --question")
    if args.question is not None:
        others = [f"--{name.replace('_', '-')}" for name in NOT_WITH_QUESTION if getattr(args, name)]
        problems += [f"{flag}: not with --question, which answers one question and writes nothing" for flag in others]
        checked = [(path, check_image(path)) for path in args.image]
        problems += [f"--image: {path}: {reason}" for path, reason in checked if isinstance(reason, str)]
    refuse(problems)
    return args


def main(argv: list[str], stop: Stop | None = None) -> int:
    """Answer and score. Returns the exit code: 0, or dist_utils.STOPPED when stopped by a signal."""
    stop = stop or Stop()
    args = parse(argv)
    if args.compare:
        return compare_files(*map(Path, args.compare))
    ckpt = pick_checkpoint(Path(args.ckpt).resolve()) if args.ckpt else None
    state = read_state(ckpt) if ckpt else {}
    trained, held_out = state.get("settings", {}), state.get("held_out", [])
    own = trained["train"] if held_out else [trained["val"]] if trained.get("val") else []
    name, files = args.model or trained.get("model", DEFAULT_MODEL), [args.data] if args.data else own
    if not files and args.question is None:
        raise InputError("no rows to answer: give --data FILE (the checkpoint's run had no --val)")
    pictures = args.images or (str(Path(args.data).parent) if args.data else trained.get("images", ""))
    output = Path(args.output or (ckpt.parent / "eval" / ckpt.name if ckpt else "runs/eval-base"))

    # Rows: rank 0 reads and checks, every rank gets the same samples.
    ranks = dist_utils.start()
    dtype = pick_dtype(args.dtype, ranks.device)
    folder = dist_utils.local_rank0_first(lambda: resolve_model(name))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if ckpt and not (args.min_pixels or args.max_pixels):
        settings = ImageSettings(**trained["image_settings"])
    else:
        settings = image_settings(folder, args.min_pixels, args.max_pixels)
    system, prompt = trained.get("system", ""), trained.get("prompt", "{question}")
    if args.question is not None:
        data = question_data(args, tokenizer, settings, system, prompt)
        print_answer(load_model(folder, ckpt, settings, dtype, ranks.device), data, tokenizer, args, ranks, dtype)
        dist_utils.leave()
        return 0

    def load() -> tuple[VQAData, list[list[str]]]:
        options = {"system": system, "prompt": prompt, "allow_outside_images": args.allow_outside_images}
        data = load_data(files, pictures, tokenizer, settings, args.max_tokens, **options)
        make_output(output)
        stop_or_skip_bad(data.bad, files, {sample.file for sample in data.samples}, args.skip_bad, output)
        if held_out and not args.data:
            names = [relative_names(sample.images, pictures) for sample in data.samples]
            data = data.only([data.samples[i] for i in split(names, held_out)[1]])
        if not data.samples:
            raise InputError(f"{', '.join(files)}: none of the held-out rows can be used")
        train_rows = [row for file in trained["train"] for row in read_rows(Path(file))[0]] if args.closed_set else []
        names = [possible_names(row.images, trained.get("images", "")) for row in train_rows]
        train_rows = [train_rows[i] for i in split(names, held_out)[0]]
        closed = closed_sets([row.fields for row in train_rows], args.closed_set)
        own = [sample.fields.get("options", []) if args.options else [] for sample in data.samples]
        return data, [mine or closed.get(s.fields["question"], []) for mine, s in zip(own, data.samples)]

    data, options = dist_utils.from_rank0(load)
    rows = ", ".join(files)
    print0(f"{len(data.samples):,} questions of {rows}, {ckpt or 'base model ' + name}, {ranks.world_size} rank(s)")

    # Answers: of the base model, then with the adapter.
    model = load_model(folder, ckpt, settings, dtype, ranks.device)
    facts = {"model": name, "base": fingerprint(folder), "checkpoint": str(ckpt or ""), "rows": rows}
    facts |= {
        "data": data.fingerprint(pictures),
        "pictures": str(Path(pictures).absolute()),
        "images": asdict(settings),
    }
    facts |= {"system": system, "prompt": prompt}
    facts |= {"options": sha256(json.dumps(options).encode()).hexdigest()[:16]}
    facts |= {"manifest": sha256((ckpt / "manifest.json").read_bytes()).hexdigest() if ckpt else ""}
    facts |= {name: getattr(args, name) for name in ("max_new_tokens", "max_tokens", "merge")}
    facts |= {"dtype": str(dtype), "versions": VERSIONS}
    key = dist_utils.from_rank0(lambda: key_of(facts, [*sorted(Path(folder).glob("*.safetensors")), *data.grids]))
    names = [[os.path.relpath(image, pictures) for image in sample.images] for sample in data.samples]
    predictions = {}
    for kind in ["base"] * (not ckpt or args.with_base) + ["tuned"] * bool(ckpt):
        if kind == "tuned" and args.merge:
            merge_lora(model.model)
        run = Run(args, ranks, dtype, stop, output / f"partial-{kind}-{key}")
        with model.model.disable_adapter() if ckpt and kind == "base" else nullcontext():
            answers = answer_all(model, data, tokenizer, run)
            scored = answers and score_all(model, data, tokenizer, run, options)
        if not scored:
            faulthandler.cancel_dump_traceback_later()
            print0(f"stopped by {stop.agreed()}; the same command goes on where it was")
            dist_utils.leave()
            return dist_utils.STOPPED
        predictions[kind] = [_prediction(*one) for one in zip(data.samples, names, answers, scored)]

    if ranks.is_main:
        write_results(output, predictions, data, facts, args)
        for kind in predictions:
            shutil.rmtree(output / f"partial-{kind}-{key}")
    dist_utils.leave()
    return 0


def make_output(output: Path) -> None:
    """Raises InputError where there can be no such folder, or it is a training run's."""
    if (output / "settings.toml").exists():
        raise InputError(f"--output: {output} is the folder of a training run")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output: can't make {output}: {error}") from None


def key_of(facts: dict, files: list) -> str:
    """Names what was answered before a stop: answers of other settings, weights or pictures are not gone on with."""
    stamps = [[os.stat(path).st_size, os.stat(path).st_mtime_ns] for path in files]
    return sha256(json.dumps([facts, stamps], sort_keys=True).encode()).hexdigest()[:16]


def load_model(folder: str, ckpt: Path | None, settings: ImageSettings, dtype, device: torch.device) -> TreeModel:
    base = load_base(folder, dtype, device)
    return TreeModel(load_adapter(base, ckpt) if ckpt else base, settings).eval()


def question_data(args: argparse.Namespace, tokenizer, settings: ImageSettings, system: str, prompt: str) -> VQAData:
    """--question with its --image files as data of one row, which no file holds. Raises InputError if it can't be."""
    fields = {"image": args.image, "question": args.question, "answer": "none"}  # cut off before it is generated
    try:
        rows = [parse_row("--question:1", fields)]
    except ValueError as error:
        raise InputError(f"--question: {error}") from None
    options = {"system": system, "prompt": prompt, "allow_outside_images": True, "headers_only": True}
    data = encode_rows(rows, "", tokenizer, settings, args.max_tokens, **options)
    if data.bad:
        raise InputError(f"--question: {data.bad[0].reason}")
    return data


def print_answer(model: TreeModel, data: VQAData, tokenizer, args: argparse.Namespace, ranks: Ranks, dtype) -> None:
    """Generate and print the answer to the one question of `data`, and its confidence."""
    if args.ckpt and args.merge:
        merge_lora(model.model)
    dataset = TreeDataset(data, model.settings, padding(ranks.device), prompts_only=True)
    (trees,) = whole_trees(data.samples, args.max_tokens)
    with autocast(ranks.device, dtype):
        (answer,) = answer_batch(model, dataset[Work(trees)].to(ranks.device), tokenizer, args.max_new_tokens)
    print0(f"{answer['prediction']}\nconfidence {answer['confidence']:.4f}")


def write_results(output: Path, predictions: dict[str, list[dict]], data: VQAData, facts: dict, args) -> None:
    """predictions.jsonl (and predictions-base.jsonl), summary.json and report.html, and the table on the screen."""
    main_kind = "tuned" if "tuned" in predictions else "base"
    for kind, answers in predictions.items():
        name = "predictions.jsonl" if kind == main_kind else "predictions-base.jsonl"
        write_whole(output / name, "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in answers))
    scores = {kind: summarize(answers, args.numeric_tolerance) for kind, answers in predictions.items()}
    summary = {"command": " ".join(sys.argv), "facts": facts, "settings": vars(args), "scores": scores}
    print0(summary_table(scores))
    if len(predictions) == 2:
        summary["comparison"] = compare(predictions["base"], predictions["tuned"])
        print0(describe_comparison(summary["comparison"]))
    write_whole(output / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    images = [list(sample.images) for sample in data.samples]
    ordered = {kind: predictions[kind] for kind in reversed(predictions)}  # the page is about the tuned model
    lines = read_metrics(Path(facts["checkpoint"]).parent / "metrics.jsonl") if facts["checkpoint"] else []
    write_report(output / "report.html", summary, ordered, images, lines)
    print0(f"wrote predictions.jsonl, summary.json and report.html in {output}")


def _prediction(sample: Sample, images: list[str], answer: dict, scored: dict) -> dict:
    """A line of predictions.jsonl."""
    fields = sample.fields
    return {
        "id": sample.id,
        "where": sample.where,
        "images": images,
        "question": fields["question"],
        "answer": fields["answer"],
        "right": normalize(answer["prediction"]) == normalize(fields["answer"]),
        "question_type": question_type(fields),
        **answer,
        **scored,
    }


def read_predictions(path: Path) -> list[dict]:
    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")  # an answer may hold U+2028
        predictions = [json.loads(line) for line in lines]
        if not all({"where", "right"} <= one.keys() for one in predictions):
            raise ValueError("a line without `where` and `right`")
        return predictions
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{path} is no predictions file: {error}") from None


def compare_files(a: Path, b: Path) -> int:
    """Print how two predictions files of the same rows differ, with the questions that flipped."""
    try:
        comparison = compare(read_predictions(a), read_predictions(b))
    except ValueError as error:
        raise InputError(f"--compare {a} {b}: {error}") from None
    print0(describe_comparison(comparison))
    for name, path in (("only_a", a), ("only_b", b)):
        print0(f"right in {path} only:", *(f"\n  {where}" for where in comparison[name]))
    return 0


def describe_comparison(comparison: dict) -> str:
    low, mean, high = (100 * comparison["difference"][name] for name in ("low", "mean", "high"))
    lost, won = len(comparison["only_a"]), len(comparison["only_b"])
    return (
        f"second less first: {mean:+.1f} points of exact match (95% interval over images {low:+.1f} to {high:+.1f}); "
        f"{won:,} questions won, {lost:,} lost, McNemar p = {comparison['p']:.2g}"
    )


if __name__ == "__main__":
    dist_utils.run_and_exit(main, sys.argv[1:])
