"""A disk that is full, at every place where that can strike.

sudo python tests/sweep_full_disk.py            # free sizes 4 KiB apart, over the size of a checkpoint and of a merge

At each size a save either succeeds or is given up with a warning; the older checkpoint stays whole, nothing
half-written is left, and nothing else than InputError is raised.
"""

import argparse
import os
import resource
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path

import faults
import tiny
import torch

from common import InputError, replacing, writing
from dist_utils import Ranks
from model import load_base
from modeling.lora import load_adapter, merge_lora
from modeling.merging import copy_files, write_weights
from training import checkpoints, rehearsal
from training.metrics import Metrics
from training.progress import Progress
from training.settings import parse_settings
from training.trackers import open_trackers

PAGE = 4096  # bytes


@contextmanager
def disk_of(folder: Path, free: int) -> Iterator[None]:
    """A file system of which so many bytes are free."""
    filler = folder / "filler"
    with open(filler, "wb") as file:
        room = os.statvfs(folder).f_bavail * PAGE
        if room > free:
            os.posix_fallocate(file.fileno(), 0, room - free)
    try:
        yield
    finally:
        filler.unlink()


@contextmanager
def files_of(_folder: Path, size: int) -> Iterator[None]:
    """Files of at most so many bytes each (RLIMIT_FSIZE): what a quota and file systems with a largest file do."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Saves:
    """Everything that a run writes, on a tiny model, into a folder that holds an older checkpoint."""

    def __init__(self, world: Path, output: Path):
        self.output, self.model = output, tiny.lora_model(world)
        self.args = parse_settings(faults.arguments(world, output))
        self.args.image_settings = {"min_pixels": 1, "max_pixels": 2}
        identity, trained = {"train rows": "33 questions"}, [p for p in self.model.parameters() if p.requires_grad]
        self.state = {"step": 2, "best": {"exact_match": 0.5, "loss": 1.0, "step": 2}, "identity": identity}
        self.state |= {
            "base": {},
            "settings": vars(self.args),
            "optimizer": torch.optim.AdamW(trained).state_dict(),
        }
        self.state["optimizer"] = rehearsal.with_moments(self.state["optimizer"], self.model)
        output.mkdir()
        assert checkpoints.save_checkpoint(output, self.model, self.state, keep=9)
        self.newer = self.state | {"step": 4, "best": {"exact_match": 0.6, "loss": 1.0, "step": 4}}

    def save(self) -> bool:
        return checkpoints.save_checkpoint(self.output, self.model, self.newer, keep=9)

    def rehearse(self) -> bool:
        rehearsal.rehearse_save(self.output, self.model, argparse.Namespace(lr=1), self.newer)
        return True

    def report(self) -> bool:
        """A line of metrics.jsonl with everything that follows it, and TensorBoard."""
        progress = Progress(step=4, best=self.newer["best"])
        trackers = open_trackers(argparse.Namespace(wandb="", tensorboard=True), self.output, None)
        metrics = Metrics(self.output, Progress(), 9, 9, None, Ranks(0, 1, torch.device("cpu")), trackers)
        for number in range(20):
            metrics.write({"event": "train", "step": number, "loss": 1.0, "grad_norm": 1, "lr": 1, "eta_s": 1})
        metrics.status("running", progress)
        metrics.draw()
        metrics.close(0)
        return bool(trackers) and not metrics.unwritten

    def is_whole(self) -> bool:
        """Whether the older checkpoint is as it was, and nothing half-written is there. Removes what was written."""
        older, *newer = checkpoints.checkpoints(self.output)
        whole = not checkpoints.damage(older) and faults.clean(self.output)
        for folder in newer:
            checkpoints.remove(folder)
        for pattern in ("metrics.jsonl", "status", "curves.svg", "tensorboard", "settings.toml"):
            checkpoints.remove(self.output / pattern)
        return whole


def outcome(action: Callable[[], bool]) -> str:
    """How an action ended: whole, given up with a warning, or an error of one line; else what it raised."""
    with redirect_stdout(StringIO()) as printed:
        try:
            if action():
                return "whole"
        except InputError as error:
            return "one line" if "\n" not in str(error) else "several lines"
        except Exception as error:
            return f"raised {error!r}"
    return "warned" if "warning: " in printed.getvalue() else "silent"


def sweep(limit: Callable, disk: Path, sizes: range, action: Callable[[], bool], check: Callable[[], bool]) -> Counter:
    """Outcomes of an action under `limit` at each size. Raises AssertionError where anything else was harmed."""
    outcomes = Counter()
    for size in sizes:
        with limit(disk, size):
            outcomes[outcome(action)] += 1
        assert check(), f"at {size:,} bytes"
    return outcomes


def sweep_merges(limit: Callable, disk: Path, world: Path, adapter: Path) -> tuple[int, Counter]:
    """Merge at free sizes 64 KiB apart over a merged model's size. Returns their number and the outcomes."""
    out = disk / "merged"

    def merge_now() -> bool:
        with writing("--out"), replacing(out) as partial:
            model = load_adapter(load_base(world / "model", torch.float32, torch.device("cpu")), adapter)
            copy_files(str(world / "model"), partial, False)
            write_weights(str(world / "model"), model, merge_lora, partial, False)
        return True

    def nothing_left() -> bool:
        checkpoints.remove(out)
        return [path.name for path in disk.iterdir()] == ["out"]

    model_bytes = sum(path.stat().st_size for path in (world / "model").iterdir())
    sizes = range(0, model_bytes + 64 * PAGE, 16 * PAGE)
    return len(sizes), sweep(limit, disk, sizes, merge_now, nothing_left)


def main() -> None:
    folder = Path(tempfile.mkdtemp())
    disk = folder / "disk"
    disk.mkdir()
    world = tiny.write_world(folder)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", disk], check=True)
    try:
        saves = Saves(world, disk / "out")
        older = disk / "out" / "checkpoint-000002"
        bytes_used = sum(path.stat().st_size for path in older.iterdir())
        sizes = range(0, bytes_used + 16 * PAGE, PAGE)
        for limit in (disk_of, files_of):
            for action in (saves.save, saves.rehearse, saves.report):
                few = sizes[: 20 if action == saves.report else None]
                outcomes = sweep(limit, disk, few, action, saves.is_whole)
                print(f"{limit.__name__} {action.__name__}: {len(few)} sizes, {dict(outcomes)}", flush=True)
            count, outcomes = sweep_merges(limit, disk, world, older)
            print(f"{limit.__name__} merge: {count} sizes, {dict(outcomes)}", flush=True)
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


if __name__ == "__main__":
    main()
