"""What a run reports while it trains: metrics.jsonl, the progress bar, `status`, curves.svg and trackers.

All of them show the same numbers. Rank 0 writes.
"""

import json
import math
import shutil
import sys
import time
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
from tqdm import tqdm

from common import is_gone, is_same_file, write_whole, writing
from dist_utils import Ranks, print0
from evaluation import charts
from training.gpus import Gpu
from training.progress import Progress
from trees import StepFacts

# Sums over the steps since the last line. Losses, weight (of answer tokens) and the last gradient norm leave out
# steps that were skipped. Cost and what was paid for it: see StepFacts.
SUMS = {"losses": 0.0, "weight": 0.0, "grad_norm": 0.0, "questions": 0, "images": 0, "cost": 0.0, "paid": 0.0}
RATES = {"questions": 0, "tokens": 0, "flops": 0.0, "waited": 0.0}  # summed up since the clock was last reset
BAR_SECONDS = 1, 30  # between updates of the bar on a terminal, and in a log, which keeps every one
BAR_COLUMNS = 100  # or those of a narrower terminal
# The numbers of a million steps, of a thousand hours and of any loss leave a few columns for the bar itself.
BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


# What the lines of an event hold for certain, in addition to `event` and `step`.
NUMBERS = {"train": ("loss", "grad_norm", "lr", "eta_s"), "eval": ("loss", "exact_match"), "skipped": ()}


class Stopwatch:
    """Seconds of the parts of a start, each from the end of the one before."""

    def __init__(self, started: float):
        """`started`: when the first part began, by time.perf_counter."""
        self.started = self.last = started
        self.parts = {}

    def lap(self, part: str) -> None:
        now = time.perf_counter()
        self.parts[part], self.last = now - self.last, now

    def __str__(self) -> str:
        parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in self.parts.items())
        return f"{time.perf_counter() - self.started:.0f} s" + f" ({parts})" * bool(parts)


def read_metrics(path: Path) -> list[dict]:
    """All lines of a metrics.jsonl, none where there is no file. Warns of damaged lines, but not of a last one that a
    kill has cut. Raises OSError when the file can't be read."""
    raw_lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    lines, damaged = [], []
    for number, raw in enumerate(raw_lines, start=1):
        if line := _read_line(raw):
            lines.append(line)
        elif raw.endswith(b"\n") or number < len(raw_lines):
            damaged.append(number)
    if damaged:
        print0(f"warning: {path}: {len(damaged):,} damaged line(s) left out, the first is line {damaged[0]:,}")
    return lines


def _read_line(raw: bytes) -> dict | None:
    """A line of metrics.jsonl; None where it is damaged."""
    try:
        line = json.loads(raw.decode()) if raw.endswith(b"\n") else None
        numbers = [line["step"], *(line[name] for name in NUMBERS.get(line["event"], ()))]
        types = [share for share, _ in line.get("by_type", {}).values()]
        return line if all(map(math.isfinite, [*numbers, *types])) and type(line["step"]) is int else None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None


class Metrics:
    """Sums up steps and writes a line now and then.

    The sums are part of a checkpoint's progress, so that a resumed run writes the lines of an undisturbed one. Neither
    a full disk, whose lines wait in memory, nor a tracker that fails stops the run.
    """

    def __init__(
        self,
        output: Path,
        progress: Progress,
        steps: int,
        steps_per_epoch: int,
        gpu: Gpu | None,
        ranks: Ranks,
        trackers: list,
    ):
        """`gpu` is the card, where its rate is known; `trackers` get every line as well: see trackers.py."""
        self.output, self.steps, self.steps_per_epoch = output, steps, steps_per_epoch
        self.gpu, self.ranks, self.trackers = gpu, ranks, trackers
        self.first_step, self.last_line = progress.step, None
        self.cost = self.paid = 0.0  # of the steps of this start
        progress.sums = SUMS | {"skipped": 0} | progress.sums
        if ranks.is_main:
            with writing(f"--output: can't write to {output}"):
                self._open(output / "metrics.jsonl", progress)

    def _open(self, path: Path, progress: Progress) -> None:
        """Open metrics.jsonl without the lines of steps that are run again."""
        lines = [line for line in read_metrics(path) if line["step"] <= progress.step]
        if progress.evaluation_due:  # it is run again too
            lines = [line for line in lines if (line["event"], line["step"]) != ("eval", progress.step)]
        self.last_line = next((line for line in reversed(lines) if line["event"] == "train"), None)
        write_whole(path, "".join(json.dumps(line) + "\n" for line in lines))
        self.file, self.unwritten = open(path, "ab", buffering=0), b""

    def start(self, progress: Progress) -> None:
        """Show the bar, and count speed and time left from here."""
        self.status("running", progress)
        often = BAR_SECONDS[0] if sys.stderr.isatty() else BAR_SECONDS[1]
        hidden = not self.ranks.is_main
        columns = min(BAR_COLUMNS, shutil.get_terminal_size((BAR_COLUMNS, 24)).columns)
        looks = {"bar_format": BAR, "ncols": columns, "mininterval": often, "maxinterval": often}
        self.bar = tqdm(total=self.steps, initial=progress.step, disable=hidden, **looks)
        self._reset_clock()
        self.began = self.started

    def _reset_clock(self) -> None:
        self.rates, self.started = dict(RATES), time.perf_counter()

    @contextmanager
    def paused(self):
        """Leave the time of an evaluation or a save out of the speed, which is that of training alone."""
        paused = time.perf_counter()
        yield
        self.started += time.perf_counter() - paused

    def step(
        self, progress: Progress, facts: StepFacts, loss: float, grad_norm: float, lr: float, waited: float, is_logged
    ) -> None:
        """Count a step. Where it `is_logged`, write the mean loss and the speed since the line before."""
        sums = progress.sums
        if math.isfinite(loss) and math.isfinite(grad_norm):
            sums["losses"] += loss * facts.answer_weight
            sums["weight"] += facts.answer_weight
            sums["grad_norm"] = grad_norm
        else:
            sums["skipped"] += 1
        for name in ("questions", "images", "cost", "paid"):
            sums[name] += getattr(facts, name)
        self.cost, self.paid = self.cost + facts.cost, self.paid + facts.paid
        now = {"questions": facts.questions, "tokens": facts.tokens, "flops": facts.flops, "waited": waited}
        self.rates = {name: value + now[name] for name, value in self.rates.items()}
        self.bar.update(1)
        if not is_logged or not sums["weight"]:
            return
        line = {"loss": sums["losses"] / sums["weight"], "grad_norm": sums["grad_norm"], "lr": lr} | self._speed()
        line |= {"rank_efficiency": sums["cost"] / sums["paid"], "skipped": sums["skipped"]}
        line["epoch"] = progress.step / self.steps_per_epoch
        shown = f"loss {line['loss']:.3g}, lr {lr:.2g}, {line['questions_per_s']:.3g} questions/s"
        self.bar.set_postfix_str(shown, refresh=False)
        line |= {"event": "train", "step": progress.step, "questions": sums["questions"], "images": sums["images"]}
        # Unlike the speed, the time left includes evaluations and saves, at the pace of those so far.
        seconds_per_step = (time.perf_counter() - self.began) / (progress.step - self.first_step)
        line["eta_s"] = (self.steps - progress.step) * seconds_per_step
        self.last_line = line
        self.write(line)
        self.status("running", progress)
        progress.sums = SUMS | {"skipped": sums["skipped"]}
        self._reset_clock()

    def _speed(self) -> dict[str, float]:
        """Rates since the clock was reset, over all ranks; operations are those of one GPU, memory is rank 0's."""
        seconds = time.perf_counter() - self.started
        speed = {f"{name}_per_s": self.rates[name] / seconds for name in ("questions", "tokens")}
        if self.rates["flops"]:
            speed["tflops_per_gpu"] = self.rates["flops"] / seconds / self.ranks.world_size / 1e12
            if self.gpu:
                speed["matmul_share"] = speed["tflops_per_gpu"] / self.gpu.tflops
        speed["data_wait"] = self.rates["waited"] / seconds
        if self.ranks.device.type == "cuda":
            speed["gpu_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return speed

    def evaluation(self, progress: Progress, result: dict, is_best: bool) -> None:
        """Report an evaluation's result."""
        self.write({"event": "eval", "step": progress.step, **result})
        if self.ranks.is_main:
            scores = f"validation loss {result['loss']:.4f}, exact match {100 * result['exact_match']:.1f}%"
            tqdm.write(f"step {progress.step}: {scores}" + (" (best)" if is_best else ""))
        self.status("running", progress)
        self.draw()

    def write(self, line: dict) -> None:
        """Add a line to metrics.jsonl, and give it to the trackers."""
        if not self.ranks.is_main:
            return
        self.unwritten += (json.dumps(line) + "\n").encode()
        path = self.output / "metrics.jsonl"
        try:
            if not is_same_file(path, self.file) and not is_gone(self.output):
                print0(f"warning: {path} was removed or replaced: lines are added to what stands in its place")
                self.file.close()
                self.file = open(path, "ab", buffering=0)
            while self.unwritten:  # a disk that is almost full takes a part
                self.unwritten = self.unwritten[self.file.write(self.unwritten) :]
        except OSError as error:
            print0(f"warning: {path}: {error}")
        self._each_tracker(lambda tracker: tracker.write(line))

    def status(self, state: str, progress: Progress) -> None:
        """Write `status`: the state (running, stopped, done, failed) and step for scripts, a sentence for people."""
        if not self.ranks.is_main:
            return
        text = f"step {progress.step:,} of {self.steps:,}"
        if self.last_line:
            left = "" if state == "done" else f", {timedelta(seconds=round(self.last_line['eta_s']))} left"
            text += f", epoch {progress.step / self.steps_per_epoch:.2f}{left}, loss {self.last_line['loss']:.4g}"
        if best := progress.best:
            text += f", best exact match {100 * best['exact_match']:.1f}% at step {best['step']:,}"
        with warning_of("status"):
            write_whole(self.output / "status", f"{state} {progress.step}\n{text}\n")

    def draw(self) -> None:
        """Refresh curves.svg."""
        if not self.ranks.is_main:
            return
        with warning_of("curves.svg"):
            if figures := charts.curves(read_metrics(self.output / "metrics.jsonl")):
                write_whole(self.output / "curves.svg", charts.sheet(figures))

    def close(self, code: int) -> None:
        """Tell the trackers the run's exit code. May wait for uploads."""
        self._each_tracker(lambda tracker: tracker.close(code))

    def _each_tracker(self, act) -> None:
        for tracker in list(self.trackers):
            try:
                act(tracker)
            except Exception as error:  # another package's, whatever it is: the training is worth more
                print0(f"warning: {type(tracker).__name__} gets nothing more until the run is resumed: {error!r}")
                self.trackers.remove(tracker)


@contextmanager
def warning_of(name: str):
    """Write a file that a run can do without: a disk that does not take it is only reported."""
    try:
        yield
    except OSError as error:
        print0(f"warning: {name} not written: {error}")
