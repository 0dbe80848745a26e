"""Does it hurt to train all questions of an image in one step? Held-out exact match for 1, 4 and all questions a tree.

    python bench/grouping.py prepare                          # write the digits; needs scikit-learn, which has them
    python bench/grouping.py run --jobs 16                    # train.py over and over, one CPU core a run
    python bench/grouping.py report                           # tables on screen, plots into docs/

Groupings are compared at the same number of questions a step, 64 and 16, at the same number of images a step, and one
question a tree also in about the CPU time that all questions a tree take. `run` writes its file after every run;
started again, it makes those that are missing.
"""

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
from step import PRESETS, Qwen3VLConfig, write_json

import demo
from metrics import read_metrics
from plan import GPUS, batch_seconds, step_flops
from report_page import along, plot, ticks
from rows import InputError

ROOT = Path(__file__).parents[1]
DATA_SETS = ("demo", "digits")
GROUPINGS = {1: "1", 4: "4", 0: "all"}  # --questions-per-image: its name
SAME = {
    "questions": "steps of 64 questions",
    "few": "steps of 16 questions",
    "images": "steps of as many images",
    "time": "one question a tree, in the time that all a tree take these models on a CPU",
}
ARMS = (  # what is compared at what, the longest run first; all 64 questions a step stand in three comparisons
    ("images", 1), ("questions", 1), ("images", 4), ("few", 1), ("questions", 4), ("few", 4), ("time", 1),
    ("questions", 0), ("few", 0),
)  # fmt: skip
RATES = (1e-3, 4e-3)
SEEDS = (0, 1, 2)
QUESTIONS = {"questions": 16384, "images": 16384, "few": 8192}  # that a run sees
TIME_SHARE = {"demo": 0.33, "digits": 0.28}  # of its questions that one a tree sees in the time of all a tree
A_STEP, FEW = 64, 16  # questions of a step
EVALUATIONS = 8  # of a run, evenly spaced
SETTINGS = ("--max-tokens=480", "--warmup=0.05", "--lora-r=32", "--lora-alpha=64", "--lora-dropout=0", "--workers=0",
            "--save-every=0", "--keep=1")  # fmt: skip

T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's t, from 1 degree of freedom on

# --------------------------------------------------------------------------------------------------------------- digits

HELD_OUT = 200  # pictures
SIDE = 96  # pixels of a digit's picture, of 8 x 8 when it comes


def digit_questions(picture: np.ndarray, digit: int, guess: int) -> list[tuple[str, str, str]]:
    """(type, question, answer) of a digit; `picture` (8, 8) holds its ink, 0 to 16. Where two sides hold the same ink,
    it isn't asked which holds more."""
    asked = [
        ("which", "Which digit is it?", str(digit)),
        ("which", "Which number is one more?", str(digit + 1)),
        ("kind", "Is it even or odd?", ("even", "odd")[digit % 2]),
        ("kind", "Is it larger than 4?", demo.yes(digit > 4)),
        ("kind", f"Is it a {guess}?", demo.yes(digit == guess)),
    ]
    quarters = picture.reshape(2, 4, 2, 4).sum(axis=(1, 3))  # (upper and lower, left and right)
    for question, ink, names in (
        ("Is more ink in the upper or in the lower half?", quarters.sum(1), ("upper", "lower")),
        ("Is more ink in the left or in the right half?", quarters.sum(0), ("left", "right")),
        ("Which quarter has most ink?", quarters.ravel(), ("upper-left", "upper-right", "lower-left", "lower-right")),
    ):
        if (ink == ink.max()).sum() == 1:
            asked.append(("ink", question, names[ink.argmax()]))
    return asked


def write_digits(folder: Path, pictures: np.ndarray, digits: np.ndarray, held_out: int = HELD_OUT) -> None:
    """train.jsonl, val.jsonl, images/ and model/ of pictures (n, 8, 8) of digits (n,). No picture is in both files."""
    draw, texts = random.Random(0), []
    order = draw.sample(range(len(digits)), len(digits))
    (folder / "images").mkdir(parents=True)
    for split, chosen in (("train", order[held_out:]), ("val", order[:held_out])):
        rows = []
        for number in chosen:
            digit, name = int(digits[number]), f"images/{number:04d}.png"
            guess = digit if draw.random() < 0.5 else draw.choice([k for k in range(10) if k != digit])
            small = Image.fromarray((255 - 15 * pictures[number]).astype(np.uint8))
            small.resize((SIDE, SIDE), Image.BICUBIC).save(folder / name)
            for kind, question, answer in digit_questions(pictures[number], digit, guess):
                rows.append({"image": name, "question": question, "answer": answer, "question_type": kind})
        texts += [f"{row['question']}\n{row['answer']}" for row in rows]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    demo.write_model(folder / "model", texts)


# ----------------------------------------------------------------------------------------------------------------- runs


@dataclass(frozen=True)
class Run:
    data: str
    same: str  # of SAME
    grouping: int
    lr: float
    seed: int
    batch_size: int
    steps: int


def plan_runs(name: str, rows: Path) -> list[Run]:
    """The runs on a data set whose training rows are in `rows`."""
    an_image = Counter(json.loads(line)["image"] for line in rows.read_text().splitlines()).values()
    trees = {grouping: sum(-(-n // (grouping or n)) for n in an_image) for grouping in GROUPINGS}
    runs = []
    for same, grouping in ARMS:
        batch_size = {"few": FEW, "images": max(1, round(A_STEP * trees[0] / trees[grouping]))}.get(same, A_STEP)
        seen = QUESTIONS.get(same) or TIME_SHARE[name] * QUESTIONS["questions"]
        steps = EVALUATIONS * max(1, round(seen / batch_size / EVALUATIONS))
        runs += [Run(name, same, grouping, lr, seed, batch_size, steps) for lr in RATES for seed in SEEDS]
    return runs


def train(run: Run, data: Path) -> dict:
    """One run of train.py on one CPU core, and what its metrics.jsonl says at each evaluation."""
    folder = data / run.data
    every = run.steps // EVALUATIONS
    with (folder / "train.jsonl").open() as rows:
        epochs = math.ceil(run.steps / math.ceil(sum(1 for _ in rows) / run.batch_size))
    with tempfile.TemporaryDirectory() as output:
        words = [sys.executable, ROOT / "train.py", *SETTINGS, f"--output={output}/run", f"--images={folder}"]
        words += [f"--train={folder}/train.jsonl", f"--val={folder}/val.jsonl", f"--model={folder}/model"]
        words += [f"--questions-per-image={run.grouping}", f"--batch-size={run.batch_size}", f"--lr={run.lr}"]
        words += [f"--seed={run.seed}", f"--epochs={epochs}", f"--max-steps={run.steps}"]
        words += [f"--eval-every={every}", f"--log-every={every}"]
        alone = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(list(map(str, words)), env=alone, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{run} ended with code {done.returncode}:\n{done.stderr[-2000:]}")
        return asdict(run) | {"points": read_points(Path(output) / "run" / "metrics.jsonl")}


def read_points(path: Path) -> list[dict]:
    """Questions and trees trained before each evaluation, and its exact match."""
    points, so_far = [], {"questions": 0, "trees": 0}
    for line in read_metrics(path):
        if line["event"] == "train":
            so_far["questions"] += line["questions"]
            so_far["trees"] += line["images"]
        elif line["event"] == "eval":
            points.append(so_far | {"exact_match": line["exact_match"]})
    return points


def train_all(args: argparse.Namespace) -> None:
    """Make the runs that the results lack, and write the results after each. Raises InputError if data are missing."""
    if "demo" in args.only:
        demo.make_demo(args.data / "demo")
    runs = []
    for name in args.only:
        rows = args.data / name / "train.jsonl"
        if not rows.exists():
            raise InputError(f"{rows} does not exist: bench/grouping.py prepare --data {args.data} writes it")
        runs += plan_runs(name, rows)
    done = read_runs(args.json) if args.json.exists() else []
    made = [{key: value for key, value in one.items() if key != "points"} for one in done]
    runs = [run for run in runs if asdict(run) not in made]
    runs.sort(key=lambda run: ARMS.index((run.same, run.grouping)))
    with ThreadPoolExecutor(args.jobs) as pool:
        futures = [pool.submit(train, run, args.data) for run in runs]
        for number, future in enumerate(as_completed(futures), 1):
            if future.exception():
                pool.shutdown(wait=False, cancel_futures=True)
            one = future.result()
            done.append(one)
            found = {"cores": os.cpu_count(), "jobs": args.jobs, "runs": done}
            write_json(args.json, "grouping", torch.device("cpu"), found)
            facts = {key: value for key, value in one.items() if key != "points"} | one["points"][-1]
            print(f"{number} of {len(runs)}:", ", ".join(f"{key} {value}" for key, value in facts.items()), flush=True)


def read_runs(path: Path) -> list[dict]:
    return json.loads(path.read_text())["runs"]


# --------------------------------------------------------------------------------------------------------------- report


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95% interval by Student's t; nan where there is one value."""
    if len(values) == 1:
        return values[0], math.nan
    return statistics.mean(values), T95[len(values) - 2] * statistics.stdev(values) / math.sqrt(len(values))


def pick(runs: list[dict], same: str, grouping: int) -> dict[tuple, dict]:
    """The runs of one arm by (learning rate, seed)."""
    arm = (same, grouping) if grouping or same == "few" else ("questions", 0)
    return {(run["lr"], run["seed"]): run for run in runs if (run["same"], run["grouping"]) == arm}


def gpu_seconds(point: dict) -> float:
    """What the questions and trees of a point would take Qwen3-VL-8B on an H100 by the rates of `--plan`, with pictures
    of 2,700 tokens and questions of 195: the models of the study cost nothing like it."""
    preset = PRESETS["8b"]
    config, patches = Qwen3VLConfig(**preset.config), preset.size[0] * preset.size[1] // 16**2
    one, two = (
        batch_seconds([(step_flops(config, [patches], patches // 4, [195] * n, 32 * n), 1)], GPUS["h100"])
        for n in (1, 2)
    )
    return point["trees"] * one + (point["questions"] - point["trees"]) * (two - one)


def shown(values: list[float], form: str = ".1f") -> str:
    mean, half = interval([100 * value for value in values])
    return f"{mean:{form}} ± {half:.1f}"


def last(run: dict, field: str = "exact_match") -> float:
    return run["points"][-1][field]


def mean_of(runs: list[dict], field: str) -> float:
    return statistics.mean(last(run, field) for run in runs)


def table(runs: list[dict], same: str) -> str:
    """Markdown: a row for each learning rate and grouping, and last how far the groupings are apart."""
    head = (
        "learning rate",
        "questions a tree",
        "questions a step",
        "trees a step",
        "seen",
        "8B, GPU s",
        "exact match, %",
    )
    lines = [head, ["---"] * len(head)]
    arms = {grouping: pick(runs, same, grouping) for grouping in GROUPINGS}
    arms = {grouping: found for grouping, found in arms.items() if found}
    for lr in sorted({run["lr"] for run in runs}):
        for grouping, found in arms.items():
            chosen = [run for (rate, _), run in found.items() if rate == lr]
            seen, trees, seconds = (mean_of(chosen, field) for field in ("questions", "trees", "gpu_s"))
            cells = [f"{lr:g}", GROUPINGS[grouping], str(chosen[0]["batch_size"]), f"{trees / chosen[0]['steps']:.1f}"]
            lines.append([*cells, f"{seen:,.0f}", f"{seconds:.0f}", shown([last(run) for run in chosen])])
    ones, rates = arms.pop(1), sorted({run["lr"] for run in runs})
    for grouping, found in arms.items():
        for name, among in [*((f"{lr:g}", [lr]) for lr in rates), ("all rates", rates)]:
            both = [key for key in found.keys() & ones.keys() if key[0] in among]
            differences = [last(found[key]) - last(ones[key]) for key in both]
            lines.append([name, f"{GROUPINGS[grouping]} against 1", "", "", "", "", shown(differences, "+.1f")])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def curves(runs: list[dict], same: str) -> str:
    """SVG: exact match against questions and against GPU time, a row of plots for each learning rate."""
    rates, drawn = sorted({run["lr"] for run in runs}), ""
    for row, lr in enumerate(rates):
        for column, field in enumerate(("questions", "gpu_s")):
            lines = {grouping: line(pick(runs, same, grouping), lr, field) for grouping in GROUPINGS}
            name = {"questions": "questions seen", "gpu_s": "GPU s that the 8B would take"}[field]
            one = panel(lines, f"{name}, learning rate {lr:g}")
            drawn += one.replace("<svg ", f'<svg x="{424 * column}" y="{30 + 246 * row}" width="412" height="236" ', 1)
    names = enumerate(zip((50, 220, 390), ("1 question a tree", "4 questions a tree", "all questions a tree")))
    legend = "".join(f'<text class="k{i}" x="{x}" y="20">● {name}</text>' for i, (x, name) in names)
    size = f"0 0 836 {30 + 246 * len(rates)}"
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{size}"><style>{CSS}</style>{legend}{drawn}</svg>\n'


def line(found: dict[tuple, dict], lr: float, field: str) -> list[tuple[float, list[float]]]:
    """For each evaluation where on the axis it lies, the mean over seeds, and the seeds' exact match in %."""
    points = zip(*(run["points"] for (rate, _), run in found.items() if rate == lr))
    return [(statistics.mean(one[field] for one in at), [100 * one["exact_match"] for one in at]) for at in points]


def panel(lines: dict[int, list[tuple[float, list[float]]]], name: str) -> str:
    """A plot of a line for each grouping, the mean over seeds, in a band from the lowest seed to the highest."""
    xs, ys = ticks(0, max(x for points in lines.values() for x, _ in points)), [0, 20, 40, 60, 80, 100]
    drawn, said = '<text x="8" y="14">exact match, %</text>', []
    for i, (grouping, points) in enumerate(lines.items()):
        low, mean, high = (
            [f"{along(xs, x, 50, 390)},{along(ys, of(values), 190, 24)}" for x, values in points]
            for of in (min, statistics.mean, max)
        )
        band = f'<polygon points="{" ".join(low + high[::-1])}"/>'
        drawn += f'<g class="k{i}">{band}<polyline points="{" ".join(mean)}"/></g>'
        said.append(f"{GROUPINGS[grouping]} a tree ends at {statistics.mean(points[-1][1]):.1f}%")
    return plot(xs, ys, name, "exact match: " + "; ".join(said), drawn)


CSS = """
:root{--fg:#59636e;--line:#d4dae0;--a:#0072b2;--b:#b35900;--c:#008060}
@media (prefers-color-scheme:dark){:root{--fg:#9aa5b1;--line:#343d48;--a:#56b4e9;--b:#e69f00;--c:#33c19a}}
text{font:13px system-ui,sans-serif;fill:var(--fg);stroke:none!important}.rule{stroke:var(--line);fill:none}
.k0{fill:var(--a);stroke:var(--a)}.k1{fill:var(--b);stroke:var(--b)}.k2{fill:var(--c);stroke:var(--c)}
polyline{fill:none;stroke-width:1.6}polygon{opacity:.25;stroke:none}
"""


def report(args: argparse.Namespace) -> None:
    """Print the tables and draw the plots."""
    runs = read_runs(args.json)
    for point in (point for run in runs for point in run["points"]):
        point["gpu_s"] = gpu_seconds(point)
    for name in DATA_SETS:
        mine = [run for run in runs if run["data"] == name]
        for same, told in SAME.items():
            print(f"\n{name}, {told}:\n\n{table(mine, same)}")
            if same != "time":
                (args.docs / f"grouping-{name}-{same}.svg").write_text(curves(mine, same))


# -------------------------------------------------------------------------------------------------------- command line


def prepare(args: argparse.Namespace) -> None:
    from sklearn.datasets import load_digits  # pip install scikit-learn; the pictures are part of it

    found = load_digits()
    write_digits(args.data / "digits", found.images, found.target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("prepare", "run", "report"))
    parser.add_argument("--data", type=Path, default=Path("runs/grouping"), help="folder of the data sets")
    parser.add_argument("--only", nargs="+", choices=DATA_SETS, default=DATA_SETS, help="run: data sets")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="run: runs at a time, one CPU core each")
    parser.add_argument("--json", type=Path, default=ROOT / "bench/results/grouping.json", help="the results")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="report: where the plots go")
    args = parser.parse_args()
    {"prepare": prepare, "run": train_all, "report": report}[args.command](args)


if __name__ == "__main__":
    main()
