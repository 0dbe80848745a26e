"""One pass of a model over a data set on all ranks. With a folder for its results, an interrupted pass can go on."""

import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import dist_utils
from data import TreeDataset, make_loader, next_batches
from dist_utils import Ranks, Stop
from model import autocast
from trees import MicroBatch, evaluation_share


@dataclass(frozen=True)
class Runner:
    """How passes run: on which ranks, in which precision, and until when."""

    ranks: Ranks
    dtype: torch.dtype
    workers: int  # processes per rank that prepare batches
    stop: Stop
    folder: Path | None = None  # keeps results as they come, and shows progress; None: memory alone

    @torch.no_grad()
    def run(
        self, function: Callable, dataset: TreeDataset, batches: list[MicroBatch], name: str = ""
    ) -> dict[int, object] | None:
        """Sample index -> result, on every rank, for all samples of `batches`. None when any rank was stopped.

        `function` takes a `Batch` and returns one result for each of its samples; where the runner has a folder, JSON
        must be able to hold it. Results that an interrupted pass left under `name` are taken as they are, and batches
        that have them all are left out. Every other batch runs on exactly one rank. A collective.
        """
        stored = dist_utils.from_rank0(lambda: self._stored(name)) if self.folder else {}
        missing = [batch for batch in batches if not stored.keys() >= _samples(batch)]
        share = evaluation_share(missing, self.ranks.rank, self.ranks.world_size)
        total, silent, computed = sum(map(len, map(_samples, batches))), not (self.ranks.is_main and self.folder), {}
        bar = tqdm(total=total, initial=len(stored), desc=name, unit="q", disable=silent)
        with self._open(name) as file, bar:
            for batch in next_batches(make_loader(dataset, share, self.workers, self.ranks.device)):
                if self.stop.reason:
                    break
                with autocast(self.ranks.device, self.dtype):
                    results = dict(zip(batch.samples, function(batch.to(self.ranks.device))))
                if file:
                    file.writelines(json.dumps(item) + "\n" for item in results.items())
                    file.flush()
                computed |= results
                bar.update(len(results) * self.ranks.world_size)  # the other ranks are about as far
        if self.stop.agreed():
            return None
        for shard in dist_utils.gather_to_all(computed):
            stored |= shard
        assert len(stored) == total
        return stored

    def _open(self, name: str):
        """A new file for this rank's results of a pass."""
        if not self.folder:
            return nullcontext()
        self.folder.mkdir(parents=True, exist_ok=True)
        return open(self.folder / f"{name}-{time.time_ns()}-{self.ranks.rank}.jsonl", "w", encoding="utf-8")

    def _stored(self, name: str) -> dict[int, object]:
        """Sample index -> result, of all whole lines: a kill may have cut the last one of a file."""
        texts = [path.read_text(encoding="utf-8") for path in sorted(self.folder.glob(f"{name}-*.jsonl"))]
        lines = [line for text in texts for line in text.splitlines(keepends=True)]
        return dict(json.loads(line) for line in lines if line.endswith("\n"))


def _samples(batch: MicroBatch) -> set[int]:
    return {index for tree in batch for index in tree.samples}
