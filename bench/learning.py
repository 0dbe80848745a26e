"""Does a way of training learn as well as another? train.py over and over, with paired seeds, and a verdict by a rule.

    python bench/learning.py --prepare DIR           # once: writes the data sets; needs scikit-learn and easy-vqa
    python bench/learning.py --data DIR --tower 5000 # once, on a GPU: easy-vqa-tower, whose base model tells shapes
    python bench/learning.py --data DIR --arm base: --arm alone:"--questions-per-image 1" --jobs 12 --json out.json

An arm is a name and the flags of train.py that it adds to SETTINGS; the first arm is the base that the others are
compared with. Flags that this script does not know go to every run. With the same seed all arms have the same rows,
LoRA weights to start from and, unless their flags change it, order of questions. Each run is kept in the work folder as
soon as it ends; a run with the same arm, flags, seed, code, data, device and versions is not made again.

The rule, for each data set and arm (written before any run):

- Each seed gives one difference: the validation loss after the last step, relative to the base's.
- Its mean over seeds has a 95% interval by Student's t.
- The verdict is "no worse" if the interval lies at or below +2%, "worse" if it lies wholly above +2%, else "undecided".
- Undecided arms get more seeds: 0-2, then 0-7, then 0-15. What is undecided then stays so, and the base is kept.

Looking up to three times makes a wrong verdict likelier than the 2.5% that one look at one end of an interval has.
"""

import argparse
import hashlib
import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from learning_data import WRITERS, fingerprint, prepare
from learning_tower import write_seeing_set
from step import device_name, write_json

from common import InputError, write_whole
from training.checkpoints import VERSIONS
from training.metrics import read_metrics

ROOT = Path(__file__).parents[1]
MARGIN = 0.02  # of the base's validation loss
SETTINGS = (  # of every run; those of the demo, as far as they shape what is learnt
    "--batch-size=128 --lr=5e-3 --warmup=20 --lora-r=32 --lora-alpha=64 --lora-dropout=0 --workers=0 --save-every=0"
    " --keep=1 --eval-every=100 --log-every=50 --compile=off"
).split()
EPOCHS = {"demo": 8, "digits": 5, "easy-vqa": 2, "easy-vqa-tower": 2}  # 442, 497, 604 and 604 steps
# Tokens of a micro-batch, which do not change what is learnt: a step is one on a GPU; masks are dense on a CPU.
MAX_TOKENS = {"cuda": 16384, "cpu": 480}
KEPT = {  # of the lines of metrics.jsonl
    "train": ("step", "loss", "grad_norm", "questions", "images", "questions_per_s"),
    "eval": ("step", "loss", "exact_match", "questions", "by_type"),
    "skipped": ("step",),
}
ONE_CORE = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}  # FlexAttention is compiled on a GPU
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
"""Quantiles of Student's t for two-sided 95% intervals, from 1 degree of freedom on."""

# ----------------------------------------------------------------------------------------------------------------- runs


@dataclass(frozen=True)
class Run:
    data: str
    arm: str
    seed: int
    identity: dict  # all that its result depends on

    def path(self, work: Path) -> Path:
        """The file of its result."""
        text = json.dumps(self.identity, sort_keys=True)
        return work / f"{self.data}-{self.arm}-{self.seed}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"


def plan_runs(args: argparse.Namespace, device: torch.device, extra: list[str]) -> list[Run]:
    """All runs, seed by seed: where time runs out, the seeds begun first are complete."""
    where = {"device": device_name(device), "versions": VERSIONS, "python": platform.python_version()}
    same = where | {"code": code_fingerprint()}
    data = {name: fingerprint(args.data / name) for name in args.sets}
    runs = []
    for seed, name, (arm, flags) in product(args.seeds, args.sets, args.arm.items()):
        words = [*SETTINGS, f"--epochs={EPOCHS[name]}", f"--max-tokens={MAX_TOKENS[device.type]}", *extra, *flags]
        runs.append(Run(name, arm, seed, same | {"data": data[name], "seed": seed, "words": words}))
    return runs


def code_fingerprint() -> str:
    """Hash of the program's Python files, without benchmarks and tests."""
    rooms = [init.parent for init in ROOT.glob("*/__init__.py")]
    files = [path for folder in (ROOT, *rooms) for path in folder.glob("*.py")]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(files))).hexdigest()[:16]


def train(run: Run, folder: Path, work: Path) -> dict:
    """Run train.py on the data set in `folder`, and keep the result. Raises InputError where it fails."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as output:
        words = [*run.identity["words"], f"--seed={run.seed}", f"--output={output}/run", f"--model={folder}/model"]
        words += [f"--train={folder}/train.jsonl", f"--val={folder}/val.jsonl", f"--images={folder}"]
        launch(words, Path(output) / "log")
        lines = read_metrics(Path(output) / "run" / "metrics.jsonl")
    result = {"data": run.data, "arm": run.arm, "seed": run.seed, "identity": run.identity}
    result |= {"seconds": round(time.perf_counter() - started, 1)}
    for event, fields in KEPT.items():
        result[event] = [{field: line[field] for field in fields} for line in lines if line["event"] == event]
    write_whole(run.path(work), json.dumps(result) + "\n")
    return result


def launch(words: list[str], log: Path) -> None:
    """Run train.py in a process that takes one core. Raises InputError with the end of its output where it fails."""
    with log.open("wb") as file:
        command, alone = [sys.executable, str(ROOT / "train.py"), *words], os.environ | ONE_CORE
        code = subprocess.run(command, env=alone, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        raise InputError(f"train.py {shlex.join(words)} ended with code {code}:\n{log.read_text()[-2000:]}")


def train_all(runs: list[Run], args: argparse.Namespace) -> list[dict]:
    """Results of all runs, those in the work folder included; fewer where --minutes end first."""
    args.work.mkdir(parents=True, exist_ok=True)
    missing = [run for run in runs if not run.path(args.work).exists()]
    results = [json.loads(run.path(args.work).read_text()) for run in runs if run not in missing]
    print(f"{len(runs)} runs, {len(results)} of them made before", flush=True)
    last_start = time.monotonic() + 60 * args.minutes if args.minutes else math.inf
    with ThreadPoolExecutor(args.jobs) as pool:

        def start(run: Run) -> dict | None:
            return train(run, args.data / run.data, args.work) if time.monotonic() < last_start else None

        for future in as_completed([pool.submit(start, run) for run in missing]):
            if future.exception():
                pool.shutdown(cancel_futures=True)
            if result := future.result():
                results.append(result)
                end = result["eval"][-1]
                scores = f"validation loss {end['loss']:.4f}, exact match {100 * end['exact_match']:.1f}%"
                name = f"{result['data']}, {result['arm']}, seed {result['seed']}"
                print(f"{len(results)} of {len(runs)}: {name}: {scores}, {result['seconds']:.0f} s", flush=True)
    return results


# -------------------------------------------------------------------------------------------------------------- verdict


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95% interval by Student's t; infinite for one value."""
    if len(values) == 1:
        return values[0], math.inf
    return statistics.mean(values), T95[len(values) - 2] * statistics.stdev(values) / math.sqrt(len(values))


def verdict(mean: float, half: float) -> str:
    """Of the difference of validation losses, relative to the base's: see the rule at the top."""
    if mean + half <= MARGIN:
        return "no worse"
    return "worse" if mean - half > MARGIN else "undecided"


def compare(base: dict[int, dict], arm: dict[int, dict]) -> dict:
    """The paired differences, arm minus base, of results by seed: of loss relative to the base, of exact match as a
    share; each as mean and half width of its interval."""
    seeds = sorted(base.keys() & arm.keys())
    loss = interval([arm[seed]["loss"] / base[seed]["loss"] - 1 for seed in seeds])
    exact = interval([arm[seed]["exact_match"] - base[seed]["exact_match"] for seed in seeds])
    return {"seeds": seeds, "relative_loss": loss, "exact_match": exact, "verdict": verdict(*loss)}


def compare_all(results: list[dict], args: argparse.Namespace) -> list[dict]:
    """The comparison of each arm with the first one, on each data set where both have a seed."""
    comparisons = []
    for name, arm in product(args.sets, list(args.arm)[1:]):
        base, other = (ends(results, name, chosen) for chosen in (next(iter(args.arm)), arm))
        if base.keys() & other.keys():
            comparisons.append({"data": name, "arm": arm, **compare(base, other)})
    return comparisons


def ends(results: list[dict], data: str, arm: str) -> dict[int, dict]:
    """The last evaluation of an arm's runs on a data set, by seed."""
    return {result["seed"]: result["eval"][-1] for result in results if (result["data"], result["arm"]) == (data, arm)}


# --------------------------------------------------------------------------------------------------------------- report


def report(results: list[dict], comparisons: list[dict], args: argparse.Namespace) -> str:
    """Markdown: for each data set the arms' means, the differences from the base with verdicts, and the curves."""
    text = ""
    for name in args.sets:
        arms = {arm: ends(results, name, arm) for arm in args.arm}
        lines = [("arm", "seeds", "validation loss", "exact match, %", "seconds per run")]
        for arm, found in ((arm, found) for arm, found in arms.items() if found):
            seconds = [r["seconds"] for r in results if (r["data"], r["arm"]) == (name, arm)]
            loss, exact = (interval([end[field] for end in found.values()]) for field in ("loss", "exact_match"))
            cells = f"{len(found)}", plus_minus(loss, ".4f"), plus_minus(exact, ".2f", 100)
            lines.append((arm, *cells, f"{statistics.mean(seconds):.0f}"))
        text += f"\n{name}:\n\n{table(lines)}"
        base = next(iter(args.arm))
        lines = [("difference", "pairs", "validation loss, %", "exact match, points", "verdict")]
        for one in (one for one in comparisons if one["data"] == name):
            cells = plus_minus(one["relative_loss"], "+.2f", 100), plus_minus(one["exact_match"], "+.2f", 100)
            lines.append((f"{one['arm']} − {base}", str(len(one["seeds"])), *cells, one["verdict"]))
        text += f"\n{table(lines)}" if len(lines) > 1 else ""
        text += f"\n{curves(results, name, args)}"
    return text


def curves(results: list[dict], data: str, args: argparse.Namespace) -> str:
    """Markdown: each arm's mean validation loss and exact match at each evaluation."""
    lines = []
    for arm in args.arm:
        found = [result["eval"] for result in results if (result["data"], result["arm"]) == (data, arm)]
        cells = [
            f"{statistics.mean(end['loss'] for end in at):.3f}, {statistics.mean(end['exact_match'] for end in at):.1%}"
            for at in zip(*found)
        ]
        if found:
            lines = lines or [("loss, exact match after step", *(str(end["step"]) for end in found[0]))]
            lines.append((arm, *cells))
    return table(lines) if lines else ""


def plus_minus(value: tuple[float, float], form: str, scale: float = 1) -> str:
    mean, half = (scale * number for number in value)
    return f"{mean:{form}}" + ("" if math.isinf(half) else f" ± {half:{form.lstrip('+')}}")


def table(lines: list[tuple[str, ...]]) -> str:
    head, *rest = lines
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, ["---"] * len(head), *rest))


# --------------------------------------------------------------------------------------------------------- command line


def parse_arm(text: str) -> tuple[str, list[str]]:
    name, colon, flags = text.partition(":")
    if not name or not colon:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME:FLAGS")
    return name, shlex.split(flags)


def parse_seeds(text: str) -> range:
    first, _, last = text.partition("-")
    seeds = range(int(first), int(last or first) + 1)
    if not 1 <= len(seeds) <= len(T95) + 1:
        raise argparse.ArgumentTypeError(f"from 1 to {len(T95) + 1} seeds, not {len(seeds)}")
    return seeds


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--prepare", type=Path, metavar="DIR", help="write the data sets to this folder, and end")
    parser.add_argument("--tower", type=int, metavar="STEPS", help="train the tower of easy-vqa-tower, and end")
    parser.add_argument("--data", type=Path, default=Path("runs/learning-data"), help="folder of the data sets")
    parser.add_argument("--sets", nargs="+", choices=EPOCHS, default=list(WRITERS), help="data sets to use")
    parser.add_argument("--arm", action="append", type=parse_arm, metavar="NAME:FLAGS", help="once for each arm")
    parser.add_argument("--seeds", type=parse_seeds, default=range(3), metavar="A-B", help="seeds of each arm")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs, or drawing processes, at a time")
    parser.add_argument("--minutes", type=float, default=0, help="start no run after so many minutes; 0: no limit")
    parser.add_argument("--work", type=Path, default=Path("runs/learning"), help="folder that keeps each run's result")
    parser.add_argument("--json", type=Path, help="file to write the runs and comparisons to")
    args, extra = parser.parse_known_args(argv)
    args.arm = dict(args.arm or [("base", [])])
    return args, extra


def main(argv: list[str]) -> None:
    args, extra = parse(argv)
    if args.prepare:
        prepare(args.prepare, args.sets)
        return
    if args.tower:
        write_seeing_set(args.data / "easy-vqa", args.data / "easy-vqa-tower", args.tower, args.jobs)
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = train_all(plan_runs(args, device, extra), args)
    comparisons = compare_all(results, args)
    print(report(results, comparisons, args))
    if args.json:
        rule = {"margin": MARGIN, "interval": "95%, Student's t, over paired seeds"}
        write_json(args.json, "learning", device, {"rule": rule, "comparisons": comparisons, "runs": results})


if __name__ == "__main__":
    main(sys.argv[1:])
