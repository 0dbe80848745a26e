"""Evaluation: loss and exact match by teacher forcing (used in training), and generated answers with their accuracy.

python eval.py --ckpt runs/kvasir                                  # the run's best checkpoint on its own --val rows
torchrun --nproc_per_node=4 eval.py --ckpt runs/kvasir/checkpoint-000600 --data test.jsonl --images pictures
python eval.py --model Qwen/Qwen3-VL-8B-Instruct --data test.jsonl --images pictures    # the base model
"""

import argparse
import json
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoTokenizer, DynamicCache

import dist_utils
from attention import FLEX_BLOCK, tree_mask, visible
from data import ImageSettings, TreeDataset, VQAData, image_settings, load_data, stop_or_skip_bad
from dist_utils import Ranks, print0
from model import TreeModel, load_adapter, load_base, resolve_model
from rows import InputError
from trees import MicroBatch, Work, share_out, whole_trees

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
    )


def padding(device: torch.device) -> int:
    return FLEX_BLOCK if device.type == "cuda" else 1


def my_share(batches: list[MicroBatch], ranks: Ranks) -> list[Work]:
    """This rank's part of an evaluation: every micro-batch goes to exactly one rank."""
    return [Work(batches[i], number=i) for i in share_out(batches, ranks.world_size)[ranks.rank]]


# ------------------------------------------------------------------------------------------------------ teacher forcing


@torch.no_grad()
def evaluate(model: TreeModel, data: VQAData, batches: list[MicroBatch], ranks: Ranks, dtype, workers: int) -> dict:
    """Loss (mean over answer tokens) and exact match over `batches`, on all ranks, each sample once.

    Greedy decoding yields the reference answer iff every answer token, end-of-turn included, is the most likely one
    given the reference before it. So one forward pass a tree tells exact match without generating.
    """
    model.eval()
    dataset = TreeDataset(data, model.settings, padding(ranks.device))
    mine = {}
    for batch in make_loader(dataset, my_share(batches, ranks), workers, ranks.device):
        batch = batch.to(ranks.device)
        with autocast(ranks.device, dtype):
            losses, right = model(batch, model.encode_images(batch))
        count = torch.bincount(batch.question)
        loss_sums = torch.zeros(len(count), device=ranks.device).index_add_(0, batch.question, losses)
        all_right = torch.bincount(batch.question, right.float()) == count
        mine |= dict(zip(batch.samples, zip(loss_sums.tolist(), count.tolist(), all_right.tolist())))
    model.train()
    shards = dist_utils.gather_to_all(mine)
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


def question_type(fields: dict) -> str:
    """The row's own question_type, or: yes/no by its answer; count, size, colour, location by the question's words."""
    if fields.get("question_type"):
        return str(fields["question_type"])
    question = fields["question"].lower()
    if normalize(fields["answer"]) in ("yes", "no"):
        return "yes/no"
    words = {"how many": "count", "size": "size", "color": "colour", "colour": "colour", "where": "location"}
    return next((kind for word, kind in words.items() if word in question), "other")


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
    hidden = model.hidden_states(batch.ids, batch.positions, tree_mask(batch), batch.image_at, features, cache)[
        batch.answer_at
    ]
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
        hidden = model.hidden_states(tokens, position, mask, past=cache)
    return answers


def answer_all(
    model: TreeModel, data: VQAData, ranks: Ranks, dtype, tokenizer, max_tokens, max_new_tokens, workers
) -> list:
    """Generate an answer to every sample, over all ranks. Returns one prediction a sample, in the order of the rows."""
    model.eval()
    dataset = TreeDataset(data, model.settings, padding(ranks.device), prompts_only=True)
    work = my_share(whole_trees(data.samples, max_tokens), ranks)
    bar = tqdm(total=sum(len(t.samples) for w in work for t in w.trees), unit="q", disable=not ranks.is_main)
    mine = {}
    for batch in make_loader(dataset, work, workers, ranks.device):
        with autocast(ranks.device, dtype):
            answers = generate(model, batch.to(ranks.device), max_new_tokens, tokenizer.eos_token_id)
        mine |= dict(zip(batch.samples, tokenizer.batch_decode(answers)))
        bar.update(len(answers))
    bar.close()
    results = {index: text for shard in dist_utils.gather_to_all(mine) for index, text in shard.items()}
    return [_prediction(sample, results[index]) for index, sample in enumerate(data.samples)]


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


def normalize(text: str) -> str:
    """Case, surrounding and repeated white space and a final full stop don't count."""
    return " ".join(text.casefold().split()).removesuffix(".")


def score(predictions: list[dict]) -> dict:
    """Accuracy overall and by question type, in the form of `evaluate`'s result."""
    by_type = {}
    for one in predictions:
        by_type.setdefault(one["question_type"], []).append(one["right"])
    right = [one["right"] for one in predictions]
    return {
        "exact_match": sum(right) / len(right),
        "questions": len(right),
        "by_type": {kind: [sum(r) / len(r), len(r)] for kind, r in sorted(by_type.items())},
    }


# --------------------------------------------------------------------------------------------------------- command line


def find_checkpoint(folder: Path) -> Path:
    """The folder itself, or of a run's folder its best checkpoint, or its newest where none is marked best."""
    if (folder / "state.pt").exists():
        return folder
    best = folder / "best.json"
    if best.exists():
        return folder / json.loads(best.read_text())["checkpoint"]
    found = sorted(folder.glob("checkpoint-*/state.pt"))
    if not found:
        raise InputError(f"--ckpt: {folder} is neither a checkpoint nor a run's folder with one")
    return found[-1].parent


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
    parser.add_argument("--skip-bad", action="store_true", help="go on without rows that can't be used")
    parser.add_argument("--allow-outside-images", action="store_true", help="images outside --images")
    parser.add_argument("--workers", type=int, default=4, help="processes a rank that decode images")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    args = parse(argv)
    ckpt = find_checkpoint(Path(args.ckpt)) if args.ckpt else None
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
    predictions = answer_all(model, data, ranks, dtype, tokenizer, args.max_tokens, args.max_new_tokens, args.workers)
    if ranks.is_main:
        with open(output / "predictions.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(one, ensure_ascii=False) + "\n" for one in predictions)
        print0(accuracy_table({"accuracy": score(predictions)}))
        print0(f"wrote {output / 'predictions.jsonl'}")
    dist_utils.stop()


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as error:
        print0(f"error: {error}")
        sys.exit(2)
