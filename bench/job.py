"""The reference job: train.py, unmodified, with Kvasir-VQA's numbers of questions per image, and the usual recipe.

    python bench/job.py --rows kvasir_vqa_val.jsonl --model DIR --gpus 1,2 --max-steps 12       # DIR: config, tokenizer
    python bench/job.py --rows kvasir_vqa_val.jsonl --model DIR --gpus 4 --epochs 1             # one whole epoch
    python bench/job.py --rows kvasir_vqa_val.jsonl --model DIR --images 300 --questions 2450 --question-tokens 60 \\
        --size 1024x1024 --epochs 3 --report                                # a small job, from command to report

The images of the rows are repeated under new names until there are 4,550 with 41,079 questions, as in Kvasir-VQA's
training split. Each question is lengthened to 195 tokens, including its answer and template, and each image has
1920x1440 pixels, 2,700 image tokens. --mixed leaves the questions as they are and draws images of mixed sizes. The
recipe's questions and images have the same length and size; with --mixed it keeps those of its preset.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from itertools import chain, cycle
from multiprocessing import Pool, Process
from pathlib import Path
from random import Random

import torch
from transformers import AutoConfig

sys.path.insert(0, str(Path(__file__).parents[1]))
from step import PRESETS, Preset, device_name, random_model, recipe_step, synchronize, write_json

import dist_utils
from demo.endoscopy import make_picture
from dist_utils import no_sync, wrap
from inputs.texts import load_tokenizer
from training.metrics import read_metrics

ROOT = Path(__file__).parents[1]
IMAGES, QUESTIONS, EPOCHS, VAL_IMAGES = 4550, 41079, 3, 20
RECIPE_BATCH, RECIPE_STEPS = 16, 7704  # questions per optimizer step, steps of the job
REPORT_TOKENS = 32  # of an answer; random weights never end one


# ----------------------------------------------------------------------------------------------------------- workload


def rows_by_image(rows: list[dict]) -> dict[str, list[dict]]:
    by_image: dict[str, list[dict]] = {}
    for row in rows:
        by_image.setdefault(row["image_filename"], []).append(row)
    return by_image


def repeat_rows(rows: list[dict], images: int) -> list[dict]:
    """Rows about `images` images: those of `rows`, repeated with new image names each time."""
    by_image = rows_by_image(rows)
    names, made = list(by_image), []
    Random(0).shuffle(names)  # the file sorts them by their number of questions
    for number in range(images):
        name = names[number % len(names)]
        made += [row | {"image_filename": f"{number // len(names)}-{name}"} for row in by_image[name]]
    return made


def leave_out(rows: list[dict], questions: int) -> list[dict]:
    """At most `questions` rows, but one per image: image after image loses its last one, as often as needed."""
    by_image = rows_by_image(rows)
    surplus = len(rows) - max(questions, len(by_image))
    for own in cycle(by_image.values()):
        if surplus <= 0:
            break
        if len(own) > 1:
            own.pop()
            surplus -= 1
    return list(chain.from_iterable(by_image.values()))


def lengthen(row: dict, tokenizer, tokens: int) -> dict:
    """The row with its question lengthened to `tokens` tokens from the end of the image to the end of the answer."""
    template = f"<|vision_end|>{row['question']}<|im_end|>\n<|im_start|>assistant\n{row['answer']}<|im_end|>"
    short = tokens - len(tokenizer(template)["input_ids"])
    return row | {"question": row["question"] + " x" * short}


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_pictures(folder: Path, names: list[str], size: tuple[int, int] | None, distinct: int) -> None:
    """Draw the first `distinct` images and hard-link them under the other names."""
    folder.mkdir(parents=True, exist_ok=True)
    with Pool() as pool:
        pool.starmap(make_picture, [(name, folder, size) for name in names[:distinct]])
        pool.close()  # leaving the pool sends SIGTERM, which the workers' inherited handler catches: let them end first
        pool.join()
    for number, name in enumerate(names[distinct:]):
        os.link(folder / names[number % distinct], folder / name)


def make_model(source: str, folder: str) -> None:
    """Save a model with random weights, configured as in `source`, with the tokenizer of `source`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shutil.copytree(source, folder)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    random_model(AutoConfig.from_pretrained(source), dtype, device).save_pretrained(folder, max_shard_size="4GB")


def make_job(args, work: Path) -> None:
    """Write rows, images and model of the job to the folder `work`."""
    rows = [json.loads(line) for line in Path(args.rows).read_text().splitlines()]
    rows = repeat_rows(rows, args.images + VAL_IMAGES)
    names = list(dict.fromkeys(row["image_filename"] for row in rows))
    if not args.mixed:
        tokenizer = load_tokenizer(args.model)
        rows = [lengthen(row, tokenizer, args.question_tokens) for row in rows]
    held_out = set(names[args.images :])
    train = leave_out([row for row in rows if row["image_filename"] not in held_out], args.questions)
    work.mkdir(parents=True)
    write_rows(work / "train.jsonl", train)
    write_rows(work / "val.jsonl", [row for row in rows if row["image_filename"] in held_out])
    size = None if args.mixed else tuple(map(int, args.size.split("x")))
    make_pictures(work / "pictures", names, size, args.pictures)
    process = Process(target=make_model, args=(args.model, str(work / "model")))
    process.start()  # a process of its own gives its memory back
    process.join()
    if process.exitcode:
        raise SystemExit("error: the model could not be made")


# -------------------------------------------------------------------------------------------------------- measuring


def torchrun(gpus: int, *words, log: Path) -> float:
    """Run one of our scripts on `gpus` GPUs with its output in `log`. Returns the seconds it took."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"]
    started = time.perf_counter()
    with open(log, "w") as file:
        done = subprocess.run(
            [*command, *map(str, words)], stdout=file, stderr=subprocess.STDOUT, check=False, cwd=ROOT
        )
    if done.returncode:
        raise SystemExit(f"error: {' '.join(map(str, words))} ended with {done.returncode}\n{log.read_text()[-3000:]}")
    return time.perf_counter() - started


def train(work: Path, gpus: int, settings: list[str]) -> dict:
    """Run train.py on the job. Figures come from its metrics.jsonl without the first two steps."""
    output, log = work / f"run-{gpus}", work / f"train-{gpus}.log"
    files = {"model": "model", "train": "train.jsonl", "val": "val.jsonl", "images": "pictures"}
    words = [word for name, file in files.items() for word in (f"--{name}", work / file)]
    seconds = torchrun(gpus, "train.py", *words, "--output", output, "--log-every", 1, *settings, log=log)
    lines = read_metrics(output / "metrics.jsonl")
    steps = [line for line in lines if line["event"] == "train"]
    steady = steps[2:]
    took = [line["questions"] / line["questions_per_s"] for line in steady]
    questions = sum(line["questions"] for line in steady)
    hours = EPOCHS * QUESTIONS / (questions / sum(took)) / 3600
    row = {"case": f"trees, {gpus} GPU(s)", "gpus": gpus, "steps": len(steps), "questions": questions}
    row |= {"seconds": seconds, "questions_per_s": questions / sum(took), "job_hours": hours}
    row |= {"step_s": statistics.median(took), "step_s_range": [min(took), max(took)]}
    row |= {"data_wait": statistics.fmean(line["data_wait"] for line in steady), "losses": [s["loss"] for s in steps]}
    row |= {"grad_norms": [step["grad_norm"] for step in steps], "peak_gib": max(s.get("gpu_gib", 0) for s in steps)}
    return row | {"planned": next((x for x in log.read_text().splitlines() if x.startswith("planned ")), "")}


def report(work: Path, gpus: int) -> float:
    """Evaluate the run on `gpus` GPUs, base and tuned, on the held-out rows. Returns the seconds until the report."""
    words = "eval.py", "--ckpt", work / f"run-{gpus}", "--with-base", "--max-new-tokens", REPORT_TOKENS
    return torchrun(gpus, *words, log=work / f"eval-{gpus}.log")


def recipe(args, work: Path, gpus: int) -> dict:
    """Run the usual recipe on `gpus` GPUs, one rank each, and return its figures."""
    words = [Path(__file__), "--recipe-steps", args.recipe_steps, "--preset", args.preset, *["--mixed"] * args.mixed]
    words += ["--size", args.size, "--question-tokens", args.question_tokens]
    torchrun(gpus, *words, "--work", work, log=work / f"recipe-{gpus}.log")
    took = json.loads((work / "recipe.json").read_text())
    row = {"case": f"usual recipe, {gpus} GPU(s)", "gpus": gpus, "steps": len(took), "step_s": statistics.median(took)}
    row |= {"questions": RECIPE_BATCH * len(took), "questions_per_s": RECIPE_BATCH / row["step_s"]}
    return row | {"step_s_range": [min(took), max(took)], "job_hours": RECIPE_STEPS * row["step_s"] / 3600}


def recipe_preset(args) -> Preset:
    """The model of the recipe with the job's images and questions, padded to the job's length."""
    preset = PRESETS[args.preset]
    if args.mixed:
        return preset
    width, height = map(int, args.size.split("x"))
    padded = width * height // 32**2 + 5 + args.question_tokens  # an image token stands for 32 x 32 pixels
    return replace(preset, size=(width, height), question_tokens=args.question_tokens, padded=padded)


def recipe_worker(args) -> int:
    """One rank of the usual recipe under DDP: optimizer steps of RECIPE_BATCH questions, one per sequence."""
    ranks = dist_utils.start()
    dtype = torch.bfloat16 if ranks.device.type == "cuda" else torch.float32
    folder = args.work / f"recipe-{ranks.rank}"
    folder.mkdir(exist_ok=True)
    model, one_question = recipe_step(recipe_preset(args), ranks.device, dtype, folder, lambda m: wrap(m, ranks))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)
    took, passes = [], RECIPE_BATCH // ranks.world_size
    for _ in range(args.recipe_steps + 1):
        synchronize(ranks.device)
        started = time.perf_counter()
        for number in range(passes):
            with no_sync(model, skip=number < passes - 1):
                one_question()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        synchronize(ranks.device)
        took.append(time.perf_counter() - started)
    if ranks.is_main:
        (args.work / "recipe.json").write_text(json.dumps(took[1:]))
    dist_utils.leave()
    return 0


def print_table(rows: list[dict]) -> None:
    print("case                    steps  questions/s  step s (from, to)      data wait    GiB  3 epochs, h")
    for row in rows:
        low, high = row["step_s_range"]
        print(
            f"{row['case']:<24}{row['steps']:>5}{row['questions_per_s']:>13.2f}"
            f"{row['step_s']:>8.2f} ({low:.2f}, {high:.2f}){row.get('data_wait', 0):>14.1%}"
            f"{row.get('peak_gib', 0):>7.1f}{row['job_hours']:>13.2f}"
        )
    ours = {row["gpus"]: row["questions_per_s"] for row in rows if "losses" in row}
    for gpus, rate in ours.items():
        if gpus > 1 and 1 in ours:
            print(f"{gpus} GPUs give {rate / gpus / ours[1]:.1%} of {gpus} times one GPU's questions/s")
    first, *others = (row for row in rows if "losses" in row)
    for row in others:
        pairs = zip(first["losses"] + first["grad_norms"], row["losses"] + row["grad_norms"])
        apart = max(abs(a - b) / a for a, b in pairs)
        print(f"losses and norms of {row['case']} against {first['case']}: {apart:.1e} apart")


def main(argv: list[str], _stop) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="", help="jsonl file with image_filename, question and answer")
    parser.add_argument("--model", default="", help="folder of config.json, tokenizer and image settings")
    parser.add_argument("--work", type=Path, default=Path("job"), help="folder for rows, images, model, runs; kept")
    parser.add_argument("--gpus", default="1", help="numbers of GPUs, run one after the other")
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--questions", type=int, default=QUESTIONS, help="at most, but one per image")
    parser.add_argument("--question-tokens", type=int, default=195, help="question, answer and template")
    parser.add_argument("--size", default="1920x1440", help="of the images, in pixels")
    parser.add_argument("--mixed", action="store_true", help="questions as they are, images of mixed sizes")
    parser.add_argument("--pictures", type=int, default=128, help="different images")
    parser.add_argument("--report", action="store_true", help="then evaluate, base and tuned, on the held-out rows")
    parser.add_argument("--recipe-steps", type=int, default=3, help="optimizer steps of the usual recipe; 0: none")
    parser.add_argument("--preset", choices=PRESETS, default="8b", help="model of the usual recipe")
    parser.add_argument("--name", default="job")
    parser.add_argument("--json", default="", help="file for the results")
    args, settings = parser.parse_known_args(argv)  # the others are settings of train.py
    if not args.rows:
        return recipe_worker(args)
    if not args.work.exists():
        make_job(args, args.work)
    args.work, gpus = args.work.resolve(), [int(n) for n in args.gpus.split(",")]
    rows = []
    for n in gpus:
        rows.append(row := train(args.work, n, settings))
        print(f"{row['case']}: trained after {row['seconds']:.0f} s", flush=True)  # the recipe may take much longer
        if args.report:
            row["report_s"] = report(args.work, n)
            print(f"  report after {row['report_s']:.0f} s more", flush=True)
    rows += [recipe(args, args.work, n) for n in gpus[-1:] if args.recipe_steps]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(device_name(device))
    print_table(rows)
    if args.json:
        write_json(Path(args.json), args.name, device, {"rows": rows})
    return 0


if __name__ == "__main__":
    dist_utils.run_and_exit(main, sys.argv[1:])
