"""Evaluation: loss and exact match by teacher forcing (used in training), and generated answers with their accuracy.

python eval.py --ckpt runs/kvasir                                  # the run's best checkpoint on its own --val rows
torchrun --nproc_per_node=4 eval.py --ckpt runs/kvasir/checkpoint-000600 --data test.jsonl --images pictures
python eval.py --model Qwen/Qwen3-VL-8B-Instruct --data test.jsonl --images pictures    # the base model
"""

import argparse
import faulthandler
import json
import shutil
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict
from hashlib import sha256
from itertools import islice
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoTokenizer, DynamicCache

import dist_utils
from attention import FLEX_BLOCK, tree_mask, visible
from checkpoints import VERSIONS, checkpoints, damage, write_whole
from data import ImageSettings, TreeDataset, VQAData, image_settings, load_data, stop_or_skip_bad
from dist_utils import Ranks, Stop, print0
from model import TreeModel, fingerprint, load_adapter, load_base, resolve_model
from rows import InputError
from scores import compare, normalize, question_type, summarize, summary_table
from trees import MicroBatch, Work, share_out, whole_trees

STALLED_AFTER = 300  # seconds without a batch after which a data worker counts as stalled

# ---------------------------------------------------------------------------------------------------- shared with train


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)


def autocast(device: torch.device, dtype: torch.dtype):
    """Matrix products in `dtype`, LoRA weights and cross-entropy in float32; nothing to do when all is float32."""
    return torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext()


def make_loader(
    dataset: TreeDataset, sampler, workers: int, device: torch.device, persistent: bool = False
) -> DataLoader:
    """One item is one micro-batch: `batch_size` is the plan's business."""
    return DataLoader(
        dataset,
        sampler=sampler,
        batch_size=None,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        persistent_workers=persistent and workers > 0,
        worker_init_fn=dist_utils.ignore_signals,
        timeout=STALLED_AFTER if workers else 0,
    )


def next_batches(loader: DataLoader):
    """Yield a loader's batches. When one fails to come, the error says which samples' images it waited for."""
    batches, number = iter(loader), 0
    while True:
        try:
            batch = next(batches, None)
        except RuntimeError as error:
            work = next(islice(iter(loader.sampler), number, None))
            samples = [loader.dataset.data.samples[i] for tree in work.trees for i in tree.samples]
            images = dict.fromkeys(image for sample in samples for image in sample.images)
            worker = f"data worker {number % loader.num_workers}" if loader.num_workers else "this process"
            error.add_note(f"{worker} was to read {', '.join(images)} for {samples[0].where} and what follows")
            raise
        if batch is None:
            return
        yield batch
        number += 1


def padding(device: torch.device) -> int:
    return FLEX_BLOCK if device.type == "cuda" else 1


def my_share(batches: list[MicroBatch], ranks: Ranks) -> list[Work]:
    """This rank's part of an evaluation: every micro-batch goes to exactly one rank."""
    return [Work(batches[i], number=i) for i in share_out(batches, ranks.world_size)[ranks.rank]]


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
    dataset = TreeDataset(data, model.settings, padding(ranks.device))
    mine = {}
    for batch in next_batches(make_loader(dataset, my_share(batches, ranks), workers, ranks.device)):
        if stop.reason:
            break
        batch = batch.to(ranks.device)
        with autocast(ranks.device, dtype):
            losses, right = model(batch, model.encode_images(batch))
        count = torch.bincount(batch.question)
        loss_sums = torch.zeros(len(count), device=ranks.device).index_add_(0, batch.question, losses)
        all_right = torch.bincount(batch.question, right.float()) == count
        mine |= dict(zip(batch.samples, zip(loss_sums.tolist(), count.tolist(), all_right.tolist())))
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


# ----------------------------------------------------------------------------------------------------------- generation


@torch.no_grad()
def generate(model: TreeModel, batch, max_new_tokens: int, stop_token: int) -> list[list[int]]:
    """Greedy answers to every question of a `prompts_only` batch: token ids without the end-of-turn.

    The trees are run once into a key-value cache. Then each unfinished branch adds one token a round, and the tree's
    visibility rule keeps branches apart, so that all questions of an image share its cached prefix.
    """
    cache = DynamicCache(config=model.base.config.text_config)
    features = model.encode_images(batch)
    mask = tree_mask(batch)
    hidden = model.hidden_states(batch.ids, batch.positions, mask, batch.answer_at, batch.image_at, features, cache)
    tree, branch, position = (
        batch.tree[batch.answer_at],
        batch.branch[batch.answer_at],
        batch.positions[:, batch.answer_at],
    )
    tree_k, branch_k = batch.tree, batch.branch
    answers = [[] for _ in batch.samples]
    running = list(range(len(answers)))
    for _ in range(max_new_tokens):
        tokens = model.base.lm_head(hidden).argmax(-1)
        keep = []
        for place, (index, token) in enumerate(zip(running, tokens.tolist())):
            if token != stop_token:
                answers[index].append(token)
                keep.append(place)
        running = [running[place] for place in keep]
        if not running:
            break
        kept = torch.tensor(keep, device=tokens.device)
        tokens, tree, branch, position = tokens[kept], tree[kept], branch[kept], position[:, kept] + 1
        cached = len(tree_k)
        tree_k, branch_k = torch.cat([tree_k, tree]), torch.cat([branch_k, branch])
        order = torch.arange(len(tree_k), device=tokens.device)
        mask = visible(tree, branch, tree_k, branch_k, order[cached:], order)[None, None]
        hidden = model.hidden_states(tokens, position, mask, torch.arange(len(kept), device=kept.device), past=cache)
    return answers


def answer_all(
    model: TreeModel, data: VQAData, ranks: Ranks, dtype, tokenizer, args, store: Path, stop: Stop
) -> list[dict] | None:
    """Generate an answer to every sample, over all ranks. Returns one prediction a sample, in the order of the rows.

    Answers go to `store` as they come, a file a rank: a call that finds some goes on where another was interrupted.
    None when stopped.
    """
    model.eval()
    store.mkdir(parents=True, exist_ok=True)
    dataset = TreeDataset(data, model.settings, padding(ranks.device), prompts_only=True)
    done = dist_utils.from_rank0(lambda: _stored(store))
    batches = whole_trees(data.samples, args.max_tokens)
    work = my_share([b for b in batches if not all(i in done for tree in b for i in tree.samples)], ranks)
    count = len(data.samples) if ranks.is_main else 0
    bar = tqdm(total=count, initial=len(done), unit="q", disable=not ranks.is_main)
    with open(store / f"{time.time_ns()}-{ranks.rank}.jsonl", "w", encoding="utf-8") as file:
        for batch in next_batches(make_loader(dataset, work, args.workers, ranks.device)):
            if stop.reason:
                break
            with autocast(ranks.device, dtype):
                answers = generate(model, batch.to(ranks.device), args.max_new_tokens, tokenizer.eos_token_id)
            file.writelines(json.dumps(pair) + "\n" for pair in zip(batch.samples, tokenizer.batch_decode(answers)))
            file.flush()
            bar.update(len(answers) * ranks.world_size)
    bar.close()
    if stop.agreed():
        return None
    results = dist_utils.from_rank0(lambda: _stored(store))
    return [_prediction(sample, results[index]) for index, sample in enumerate(data.samples)]


def _stored(store: Path) -> dict[int, str]:
    """Sample index -> answer, of all whole lines in a store."""
    lines = [line for path in sorted(store.glob("*.jsonl")) for line in path.read_text().splitlines(keepends=True)]
    return dict(json.loads(line) for line in lines if line.endswith("\n"))


def _prediction(sample, text: str) -> dict:
    fields = sample.fields
    return {
        "id": sample.id,
        "where": sample.where,
        "images": [Path(image).name for image in sample.images],
        "question": fields["question"],
        "answer": fields["answer"],
        "prediction": text,
        "right": normalize(text) == normalize(fields["answer"]),
        "question_type": question_type(fields),
    }


# --------------------------------------------------------------------------------------------------------- command line


def pick_checkpoint(folder: Path) -> Path:
    """The folder itself, or of a run's folder its best checkpoint, or its newest where none is marked best."""
    found = [folder] if (folder / "state.pt").exists() else checkpoints(folder)[-1:]
    if (best := folder / "best.json").exists():
        found = [folder / json.loads(best.read_text())["checkpoint"]]
    if not found:
        raise InputError(f"--ckpt: {folder} is neither a checkpoint nor a run's folder with one")
    if problem := damage(found[0]):
        raise InputError(f"--ckpt: {found[0]} is damaged: {problem}; name another checkpoint")
    return found[0]


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "eval.py", description="Answer questions with a checkpoint or a base model, and score."
    )
    parser.add_argument(
        "--ckpt", default="", help="checkpoint, or a run's folder for its best one; empty: the base model"
    )
    parser.add_argument("--data", default="", help="rows to answer; empty: the validation rows of the checkpoint's run")
    parser.add_argument("--images", default="", help="folder that image names start from; empty: the folder of --data")
    parser.add_argument("--model", default="", help="base model; empty: the checkpoint's, or Qwen/Qwen3-VL-8B-Instruct")
    parser.add_argument(
        "--output", default="", help="folder for predictions.jsonl; empty: CKPT/eval, or runs/eval-base"
    )
    parser.add_argument("--max-new-tokens", type=int, default=256, help="tokens of an answer at most")
    parser.add_argument("--max-tokens", type=int, default=16384, help="prompt tokens that are run at once, at most")
    parser.add_argument("--min-pixels", type=int, default=0, help="0: the checkpoint's, or the model's own")
    parser.add_argument("--max-pixels", type=int, default=0, help="0: the checkpoint's, or the model's own")
    parser.add_argument(
        "--dtype", choices=("auto", "bfloat16", "float32"), default="auto", help="auto: bfloat16 on CUDA"
    )
    parser.add_argument("--with-base", action="store_true", help="also answer with the base model, and compare")
    parser.add_argument("--compare", nargs=2, metavar="FILE", help="compare two predictions files, and nothing else")
    parser.add_argument(
        "--numeric-tolerance", type=float, default=0.05, help="relative error up to which a number counts as right"
    )
    parser.add_argument("--skip-bad", action="store_true", help="go on without rows that can't be used")
    parser.add_argument("--allow-outside-images", action="store_true", help="images outside --images")
    parser.add_argument("--workers", type=int, default=4, help="processes a rank that decode images")
    return parser.parse_args(argv)


def main(argv: list[str], stop: Stop | None = None) -> int:
    """Answer and score. Returns the exit code: 0, or dist_utils.STOPPED when stopped by a signal."""
    stop = stop or Stop()
    args = parse(argv)
    if args.compare:
        return compare_files(*map(Path, args.compare), args.numeric_tolerance)
    ckpt = pick_checkpoint(Path(args.ckpt)) if args.ckpt else None
    run = torch.load(ckpt / "state.pt", weights_only=True, map_location="cpu")["settings"] if ckpt else {}
    name = args.model or run.get("model", "Qwen/Qwen3-VL-8B-Instruct")
    rows = args.data or run.get("val", "")
    if not rows:
        raise InputError("no rows to answer: give --data FILE (the checkpoint's run had no --val)")
    images = args.images or (str(Path(args.data).parent) if args.data else run["images"])
    output = Path(args.output or (ckpt / "eval" if ckpt else "runs/eval-base"))

    ranks = dist_utils.start()
    dtype = pick_dtype(args.dtype, ranks.device)
    folder = dist_utils.local_rank0_first(lambda: resolve_model(name))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if ckpt and not (args.min_pixels or args.max_pixels):
        settings = ImageSettings(**run["image_settings"])
    else:
        settings = image_settings(folder, args.min_pixels, args.max_pixels)

    def load() -> VQAData:
        data = load_data(
            rows, images, tokenizer, settings, args.max_tokens, run.get("system", ""), args.allow_outside_images
        )
        output.mkdir(parents=True, exist_ok=True)
        stop_or_skip_bad([data], args.skip_bad, output)
        return data

    data = dist_utils.from_rank0(load)
    print0(f"{len(data.samples):,} questions of {rows}, {ckpt or 'base model ' + name}, {ranks.world_size} rank(s)")
    base = load_base(folder, dtype, ranks.device)
    model = TreeModel(load_adapter(base, ckpt) if ckpt else base, settings)

    facts = {"model": name, "base": fingerprint(folder), "checkpoint": str(ckpt or ""), "rows": rows}
    facts |= {"data": data.fingerprint(), "images": asdict(settings), "dtype": str(dtype), "versions": VERSIONS}
    facts |= {"max_new_tokens": args.max_new_tokens, "max_tokens": args.max_tokens, "system": run.get("system", "")}
    facts["manifest"] = sha256((ckpt / "manifest.json").read_bytes()).hexdigest() if ckpt else ""
    key = sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    files, summaries = {}, {}
    for kind in ["tuned", "base"] if ckpt and args.with_base else ["tuned" if ckpt else "base"]:
        with model.model.disable_adapter() if ckpt and kind == "base" else nullcontext():
            store = output / f"partial-{kind}-{key}"
            predictions = answer_all(model, data, ranks, dtype, tokenizer, args, store, stop)
        if predictions is None:
            faulthandler.cancel_dump_traceback_later()
            print0(f"stopped by {stop.agreed()}; the same command goes on where it was")
            dist_utils.leave()
            return dist_utils.STOPPED
        if ranks.is_main:
            files[kind] = output / ("predictions-base.jsonl" if kind == "base" and ckpt else "predictions.jsonl")
            write_whole(files[kind], "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in predictions))
            summaries[kind] = summarize(predictions, args.numeric_tolerance)
            shutil.rmtree(store)
    if ranks.is_main:
        print0(summary_table(summaries))
        summary = {"command": " ".join(sys.argv), "facts": facts, "settings": vars(args), "scores": summaries}
        if len(files) == 2:
            both = (read_predictions(files[kind]) for kind in ("base", "tuned"))
            summary["comparison"] = compare(*both, args.numeric_tolerance)
            print0(describe_comparison(summary["comparison"]))
        write_whole(output / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
        print0(f"wrote {', '.join(map(str, files.values()))} and {output / 'summary.json'}")
    dist_utils.leave()
    return 0


def read_predictions(path: Path) -> list[dict]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is no predictions file: {error}") from None


def compare_files(a: Path, b: Path, tolerance: float) -> int:
    """Print how two predictions files of the same rows differ, with the questions that flipped."""
    try:
        comparison = compare(read_predictions(a), read_predictions(b), tolerance)
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
