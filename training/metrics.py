"""What a run tells while it trains: metrics.jsonl, the progress bar, `status`, curves.svg, and trackers. All show the
same numbers; rank 0 writes."""

import json
import math
import time
from datetime import timedelta
from pathlib import Path

import torch
from tqdm import tqdm

from common import write_whole
from dist_utils import Ranks, print0
from evaluation import charts
from training.checkpoints import write_or_warn
from training.gpus import Gpu

# since the last line; of steps that were not skipped the loss, the weight of answer tokens, the last gradient norm
SUMS = {"losses": 0.0, "weight": 0.0, "grad_norm": 0.0, "questions": 0, "images": 0}
PACE = {"questions": 0, "tokens": 0, "flops": 0.0, "waited": 0.0}  # since `started`; tokens are all


def read_metrics(path: Path) -> list[dict]:
    """All whole lines of a metrics.jsonl, none where there is no file; a kill may have cut the last one."""
    found = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in found if line.endswith("\n")]


class Metrics:
    """Sums up steps, writes a line now and then. `sums` is part of a checkpoint: a resumed run writes the same lines.

    A disk that is full keeps lines waiting in memory; neither that nor a tracker that fails stops the run.
    """

    def __init__(
        self, output: Path, start: dict, steps: int, an_epoch: int, gpu: Gpu | None, ranks: Ranks, trackers: list
    ):
        """`start` is the checkpoint's state, `an_epoch` the steps of an epoch, `gpu` the card where its rate is known,
        `trackers` what else gets every line: see watch.py."""
        self.output, self.steps, self.an_epoch, self.gpu, self.ranks = output, steps, an_epoch, gpu, ranks
        self.first, self.best, self.trackers = start.get("step", 0), start.get("best", {}), trackers
        self.sums, self.last = SUMS | {"skipped": 0} | start.get("sums", {}), None
        self.start_clock()
        if ranks.is_main:
            path = output / "metrics.jsonl"
            # later steps are made again, and so is an evaluation that the checkpoint has as due
            again = ("eval", self.first) if start.get("evaluation_due") else None
            kept = [line for line in read_metrics(path) if line["step"] <= self.first]
            kept = [line for line in kept if (line["event"], line["step"]) != again]
            self.last = next((line for line in reversed(kept) if line["event"] == "train"), None)
            write_whole(path, "".join(json.dumps(line) + "\n" for line in kept))
            self.file = open(path, "a", encoding="utf-8")

    def start_clock(self) -> None:
        """Speed and time left are counted from here."""
        self.pace, self.began = dict(PACE), time.perf_counter()
        self.started = self.began  # of what `pace` sums up

    def write(self, line: dict) -> None:
        if self.ranks.is_main:
            try:
                self.file.write(json.dumps(line) + "\n")
                self.file.flush()
            except OSError as error:
                print0(f"warning: {self.file.name}: {error}")
            self._each_tracker(lambda tracker: tracker.write(line))

    def _each_tracker(self, act) -> None:
        for tracker in list(self.trackers):
            try:
                act(tracker)
            except Exception as error:  # another package's, whatever it is: the training is worth more
                print0(f"warning: {type(tracker).__name__} gets nothing more until the run is resumed: {error!r}")
                self.trackers.remove(tracker)

    def step(self, done: int, facts, loss: float, grad_norm: float, lr: float, waited: float, bar: tqdm, last: bool):
        """Count a step; when `last`, write the mean loss and the speed since the line before."""
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.sums["losses"] += loss * facts.answer_weight
            self.sums["weight"] += facts.answer_weight
            self.sums["grad_norm"] = grad_norm
        else:
            self.sums["skipped"] += 1
        self.sums["questions"] += facts.questions
        self.sums["images"] += facts.images
        now = {"questions": facts.questions, "tokens": facts.tokens, "flops": facts.flops, "waited": waited}
        self.pace = {name: value + now[name] for name, value in self.pace.items()}
        bar.update(1)
        if not last or not self.sums["weight"]:
            return
        line = {"loss": self.sums["losses"] / self.sums["weight"], "grad_norm": self.sums["grad_norm"], "lr": lr}
        line |= self.speed() | {"skipped": self.sums["skipped"], "epoch": done / self.an_epoch}
        shown = {name: f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" for name, value in line.items()}
        bar.set_postfix(shown, refresh=False)
        step_s = (time.perf_counter() - self.began) / (done - self.first)  # evaluations and checkpoints included
        line |= {"event": "train", "step": done, "questions": self.sums["questions"], "images": self.sums["images"]}
        line["eta_s"] = (self.steps - done) * step_s
        self.last = line
        self.write(line)
        self.status("running", done)
        self.sums = SUMS | {"skipped": self.sums["skipped"]}
        self.pace, self.started = dict(PACE), time.perf_counter()

    def speed(self) -> dict[str, float]:
        """Over all ranks, but for operations, which are a GPU's, and memory, which is rank 0's."""
        seconds = time.perf_counter() - self.started
        found = {f"{name}_per_s": self.pace[name] / seconds for name in ("questions", "tokens")}
        if self.pace["flops"]:
            found["tflops_per_gpu"] = self.pace["flops"] / seconds / self.ranks.world_size / 1e12
            if self.gpu:
                found["matmul_share"] = found["tflops_per_gpu"] / self.gpu.tflops
        found["data_wait"] = self.pace["waited"] / seconds
        if self.ranks.device.type == "cuda":
            found["gpu_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return found

    def evaluation(self, done: int, result: dict, is_best: bool) -> None:
        self.write({"event": "eval", "step": done, **result})
        text = f"step {done}: validation loss {result['loss']:.4f}, exact match {100 * result['exact_match']:.1f}%"
        if is_best:
            self.best = {"exact_match": result["exact_match"], "step": done}
        if self.ranks.is_main:
            tqdm.write(text + (" (best)" if is_best else ""))
        self.status("running", done)
        self.draw()

    def draw(self) -> None:
        """Refresh curves.svg."""
        if self.ranks.is_main and (figures := charts.curves(read_metrics(self.output / "metrics.jsonl"))):
            write_or_warn(self.output / "curves.svg", charts.sheet(figures))

    def status(self, state: str, done: int) -> None:
        """Two lines: for scripts the state (running, stopped, done, failed) and the step, for people how it stands."""
        if not self.ranks.is_main:
            return
        told = f"step {done:,} of {self.steps:,}"
        if self.last:
            left = "" if state == "done" else f", {timedelta(seconds=round(self.last['eta_s']))} left"
            told += f", epoch {done / self.an_epoch:.2f}{left}, loss {self.last['loss']:.4g}"
        if self.best:
            told += f", best exact match {100 * self.best['exact_match']:.1f}% at step {self.best['step']:,}"
        write_or_warn(self.output / "status", f"{state} {done}\n{told}\n")

    def close(self, code: int) -> None:
        """`code` is the run's exit code. May wait for uploads."""
        self._each_tracker(lambda tracker: tracker.close(code))
