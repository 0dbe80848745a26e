"""metrics.jsonl and the progress bar, fed from the same numbers; rank 0 writes."""

import json
import math
import time
from pathlib import Path

import torch
from tqdm import tqdm

from checkpoints import write_whole
from dist_utils import Ranks, print0

SUMS = {"losses": 0.0, "weight": 0.0, "questions": 0, "images": 0}  # since the last line


def read_metrics(path: Path) -> list[dict]:
    """All whole lines of a metrics.jsonl, none where there is no file; a kill may have cut the last one."""
    found = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in found if line.endswith("\n")]


class Metrics:
    """Sums up steps, writes a line now and then. `sums` is part of a checkpoint: a resumed run writes the same lines.

    A disk that is full keeps lines waiting in memory; it does not stop the run.
    """

    def __init__(self, path: Path, done: int, sums: dict, ranks: Ranks):
        self.ranks, self.sums, self.started, self.waited = ranks, SUMS | sums, time.perf_counter(), 0.0
        if ranks.is_main:
            kept = [line for line in read_metrics(path) if line["step"] <= done]  # later steps are made again
            write_whole(path, "".join(json.dumps(line) + "\n" for line in kept))
            self.file = open(path, "a", encoding="utf-8")

    def write(self, line: dict) -> None:
        if self.ranks.is_main:
            try:
                self.file.write(json.dumps(line) + "\n")
                self.file.flush()
            except OSError as error:
                print0(f"warning: {self.file.name}: {error}")

    def step(self, done: int, facts, loss: float, grad_norm: float, lr: float, waited: float, bar: tqdm, last: bool):
        """Count a step; when `last`, write the mean loss and the speed since the line before."""
        if math.isfinite(loss):
            self.sums["losses"] += loss * facts.answer_weight
            self.sums["weight"] += facts.answer_weight
        self.sums["questions"] += facts.questions
        self.sums["images"] += facts.images
        self.waited += waited
        bar.update(1)
        if not last or not self.sums["weight"]:
            return
        seconds = time.perf_counter() - self.started
        questions = self.sums["questions"]
        line = {"loss": self.sums["losses"] / self.sums["weight"], "questions_per_s": questions / seconds}
        if self.ranks.device.type == "cuda":
            line["gpu_gib"] = torch.cuda.max_memory_allocated() / 2**30
        bar.set_postfix({name: f"{value:.3g}" for name, value in line.items()}, refresh=False)
        steps_left = (bar.total or done) - done
        line |= {"event": "train", "step": done, "grad_norm": grad_norm, "lr": lr}
        line |= {"questions": questions, "images": self.sums["images"], "data_wait": self.waited / seconds}
        line["eta_s"] = steps_left * facts.questions / line["questions_per_s"]
        self.write(line)
        self.sums, self.started, self.waited = dict(SUMS), time.perf_counter(), 0.0

    def evaluation(self, done: int, result: dict, is_best: bool) -> None:
        self.write({"event": "eval", "step": done, **result})
        text = f"step {done}: validation loss {result['loss']:.4f}, exact match {100 * result['exact_match']:.1f}%"
        if self.ranks.is_main:
            tqdm.write(text + (" (best)" if is_best else ""))
