"""Questions answered a second: trees against one-by-one generation, in one run on one device.

    python bench/evaluate.py                                              # the demo's rows, a minute on a CPU
    python bench/evaluate.py --model DIR --rows rows.jsonl --images DIR   # DIR: config.json, tokenizer, image settings

One by one is transformers' own `generate`, a question a call. Weights are random: they cost what real ones cost, but do
not end an answer, so that every answer has --max-new-tokens tokens, on both sides. There is no adapter; a merged one
costs the same.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))
from step import device_name, model_inputs, random_model, synchronize, write_json

from data import build_batch, load_data
from demo import endoscopy
from dist_utils import Ranks, Stop
from evaluation.answers import answer_all, score_all
from evaluation.runner import Runner
from inputs.images import image_settings
from model import TreeModel, prepare_base
from trees import Work, grow_tree

NEVER = -1  # no token ends an answer


def one_by_one(model, data, settings, chosen: list[int], max_new_tokens: int, device: torch.device) -> list[list[int]]:
    """Each chosen question's answer by transformers' `generate`."""
    found = []
    for index in chosen:
        batch = build_batch(data, Work((grow_tree(data.samples, [index]),)), settings, prompts_only=True).to(device)
        inputs = model_inputs(batch, image_token=model.config.image_token_id)
        out = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=None)
        found.append(out[0, inputs["input_ids"].shape[1] :].tolist())
    return found


class Endless:
    """A tokenizer that gives token ids for text, and none that ends an answer."""

    eos_token_id = NEVER

    @staticmethod
    def batch_decode(answers: list[list[int]]) -> list[list[int]]:
        return answers


def timed(device: torch.device, function):
    synchronize(device)
    started = time.perf_counter()
    result = function()
    synchronize(device)
    return result, time.perf_counter() - started


def measure(args, folder: Path) -> list[dict]:
    """One row a case: one by one over some questions, then answers and scores over all by trees."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tokenizer, settings = AutoTokenizer.from_pretrained(args.model), image_settings(args.model)
    data = load_data([args.rows], args.images, tokenizer, settings, args.max_tokens)
    config = AutoConfig.from_pretrained(args.model)
    chosen = list(range(0, len(data.samples), -(-len(data.samples) // args.alone)))

    plain = random_model(config, dtype, device).eval()
    one_by_one(plain, data, settings, chosen[:2], args.max_new_tokens, device)  # warms up
    alone, seconds = timed(device, lambda: one_by_one(plain, data, settings, chosen, args.max_new_tokens, device))
    rows = [{"case": "one by one", "questions": len(chosen), "seconds": seconds}]

    model = TreeModel(prepare_base(plain), settings).eval()
    ranks, none = Ranks(0, 1, device), [[] for _ in data.samples]
    for name in ("first", "trees"):  # the first one compiles
        runner = Runner(ranks, dtype, args.workers, Stop(), folder / name)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        lengths = args.max_tokens, args.max_new_tokens
        together, seconds = timed(device, lambda: answer_all(model, data, Endless, runner, *lengths))  # noqa: B023
    rows.append({"case": "trees", "questions": len(data.samples), "seconds": seconds})
    rows[-1]["same"] = sum(together[i]["prediction"] == answer for i, answer in zip(chosen, alone)) / len(chosen)
    _, seconds = timed(device, lambda: score_all(model, data, none, tokenizer, runner, args.max_tokens))
    rows.append({"case": "trees, teacher-forced", "questions": len(data.samples), "seconds": seconds})
    for row in rows:
        row["questions_per_s"] = row["questions"] / row["seconds"]
        row["ratio"] = row["questions_per_s"] / rows[0]["questions_per_s"]
    if device.type == "cuda":
        rows[1]["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Questions a second: trees against one-by-one generation.")
    parser.add_argument("--model", default="", help="folder of config.json, tokenizer and image settings; empty: demo")
    parser.add_argument("--rows", default="", help="rows to answer; empty: the demo's validation rows")
    parser.add_argument("--images", default="", help="folder that image names start from")
    parser.add_argument("--alone", type=int, default=16, help="questions that are answered one by one, at most")
    parser.add_argument("--max-new-tokens", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=16384, help="tokens that are run at once")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--name", default="evaluate")
    parser.add_argument("--json", default="", help="file for the results")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if not args.rows:
            endoscopy.make_demo(folder / "demo")
            files = endoscopy.files(folder / "demo")
            args.model, args.images, args.rows = files["model"], files["images"], files["val"]
        rows = measure(args, folder)
    print(f"{device_name(device)}, answers of {args.max_new_tokens} tokens")
    print("case                   questions  seconds  questions/s  ratio    GiB")
    for row in rows:
        print(
            f"{row['case']:<22}{row['questions']:>10,}{row['seconds']:>9.1f}{row['questions_per_s']:>13.2f}"
            f"{row['ratio']:>7.1f}{row.get('peak_gib', 0):>7.1f}"
        )
    print(f"{rows[1]['same']:.0%} of the answers given one by one are the same by trees, to the last token")
    if args.json:
        write_json(Path(args.json), args.name, device, {"rows": rows})


if __name__ == "__main__":
    main()
