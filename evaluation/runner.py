"""Passes of a model over data on all ranks. With a folder for its results, an interrupted pass can be continued."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import dist_utils
from data import TreeDataset, VQAData, make_loader, next_batches, padding
from dist_utils import Ranks, Stop
from model import TreeModel, autocast
from trees import MicroBatch, evaluation_share


@dataclass(frozen=True)
class Runner:
    """Runs a model: on which ranks, in which precision, and until when."""

    model: TreeModel
    ranks: Ranks
    dtype: torch.dtype
    workers: int  # processes per rank that prepare batches
    stop: Stop
    folder: Path | None = None  # receives results as they come, with a progress bar; None: no files and no bar

    @torch.no_grad()
    def run(
        self, function: Callable, data: VQAData, batches: list[MicroBatch], name: str = "", **options
    ) -> dict[int, object] | None:
        """Sample index -> result, on every rank, for all samples of `batches`. None when any rank was stopped.

        `function` takes the model and a `Batch`, which is built with `options`, and returns for each of its samples a
        result that JSON can hold. Results that an interrupted pass left under `name` are kept, and batches that lack
        none are skipped. Every other batch runs on exactly one rank. A collective.
        """
        if self.folder:
            self.folder.mkdir(parents=True, exist_ok=True)
        stored = dist_utils.from_rank0(lambda: self._stored(name)) if self.folder else {}
        missing = [batch for batch in batches if not stored.keys() >= _samples(batch)]
        share = evaluation_share(missing, self.ranks.rank, self.ranks.world_size)
        total, computed = sum(len(_samples(batch)) for batch in batches), {}
        shows_bar = self.ranks.is_main and self.folder
        dataset = TreeDataset(data, self.model.settings, padding(self.ranks.device), **options)
        bar = tqdm(total=total, initial=len(stored), desc=name, unit="q", disable=not shows_bar)
        path = self.folder / f"{name}-{time.time_ns()}-{self.ranks.rank}.jsonl" if self.folder else os.devnull
        with open(path, "w", encoding="utf-8") as file, bar:
            for batch in next_batches(make_loader(dataset, share, self.workers, self.ranks.device)):
                if self.stop.reason:
                    break
                with autocast(self.ranks.device, self.dtype):
                    results = dict(zip(batch.samples, function(self.model, batch.to(self.ranks.device))))
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

    def _stored(self, name: str) -> dict[int, object]:
        """Sample index -> result, of all whole lines: a kill may have cut the last one of a file."""
        texts = [path.read_text(encoding="utf-8") for path in sorted(self.folder.glob(f"{name}-*.jsonl"))]
        lines = [line for text in texts for line in text.splitlines(keepends=True)]
        return dict(json.loads(line) for line in lines if line.endswith("\n"))


def _samples(batch: MicroBatch) -> set[int]:
    return {index for tree in batch for index in tree.samples}
