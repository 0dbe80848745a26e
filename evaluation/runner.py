"""Passes of a model over data on all ranks. With a folder for its results, an interrupted pass can be continued.

Results are kept as lines of a checksum and [sample index, result].
"""

import json
import os
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from tqdm import tqdm

import dist_utils
from common import InputError, is_same_file, writing
from data import TreeDataset, VQAData, make_loader, next_batches, padding
from dist_utils import Ranks, Stop, print0
from model import TreeModel, autocast
from trees import Assignment, MicroBatch, balance, cost_of, cut_to_fit, group_samples, grow_tree

CONTINUES = "answers can't be kept; the same command continues from those that are"  # an error's first words


def plan_evaluation(samples: list, max_tokens: int, max_trees: int = 0) -> list[MicroBatch]:
    """Every sample once, in order, in as few micro-batches as the budgets allow.

    `max_trees` limits the trees of a micro-batch; 0: no limit.
    """
    batches, tokens = [[]], 0
    for group in group_samples(samples):
        for tree in cut_to_fit(grow_tree(samples, group), max_tokens):
            if batches[-1] and (tokens + tree.tokens > max_tokens or len(batches[-1]) == max_trees):
                batches.append([])
                tokens = 0
            batches[-1].append(tree)
            tokens += tree.tokens
    return [tuple(batch) for batch in batches if batch]


def evaluation_share(batches: list[MicroBatch], rank: int, world_size: int) -> list[Assignment]:
    """A rank's part of an evaluation: every micro-batch goes to exactly one rank."""
    return [Assignment(batches[i]) for i in balance(list(map(cost_of, batches)), world_size)[rank]]


@dataclass(frozen=True)
class Runner:
    """Runs a model: on which ranks, in which precision, and until when."""

    model: TreeModel
    ranks: Ranks
    dtype: torch.dtype
    workers: int  # processes per rank that prepare batches
    stop: Stop
    folder: Path | None = None  # receives results as they come, with a progress bar; None: no files and no bar
    subject: str = "the model"  # as errors name it

    @torch.no_grad()
    def run(
        self, function: Callable, data: VQAData, batches: list[MicroBatch], name: str = "", **options
    ) -> dict[int, object] | None:
        """Sample index -> result, on every rank, for all samples of `batches`. None when any rank was stopped.

        `function` takes the model and a `Batch`, which is built with `options`, and returns for each of its samples a
        result that JSON can hold. Results that an interrupted pass left under `name` are kept, and batches that lack
        none are skipped. Every other batch runs on exactly one rank. A collective.
        """
        self.stop.save_first()  # results are kept as they come
        stored = dist_utils.from_rank0(lambda: self._stored(name, batches)) if self.folder else {}
        missing = [batch for batch in batches if not stored.keys() >= _samples(batch)]
        share = evaluation_share(missing, self.ranks.rank, self.ranks.world_size)
        total, computed = sum(len(_samples(batch)) for batch in batches), {}
        shows_bar = self.ranks.is_main and self.folder
        dataset = TreeDataset(data, self.model.settings, padding(self.ranks.device), **options)
        bar = tqdm(total=total, initial=len(stored), desc=name, unit="q", disable=not shows_bar)
        path = self.folder / f"{name}-{time.time_ns()}-{self.ranks.rank}.jsonl" if self.folder else os.devnull
        with writing(CONTINUES):
            file = open(path, "wb", buffering=0)
        with file, bar:
            for batch in next_batches(make_loader(dataset, share, self.workers, self.ranks.device)):
                if self.stop.reason:
                    break
                with autocast(self.ranks.device, self.dtype):
                    results = dict(zip(batch.samples, function(self.model, batch.to(self.ranks.device))))
                _keep(file, results)
                computed |= results
                bar.update(len(results) * self.ranks.world_size)  # the other ranks are about as far
        if self.stop.agreed():
            return None
        for shard in dist_utils.gather_to_all(computed):
            stored |= shard
        assert len(stored) == total
        return stored

    def _stored(self, name: str, batches: list[MicroBatch]) -> dict[int, object]:
        """Sample index -> result, of what an interrupted pass left. Damaged lines are computed again."""
        if self.folder.is_symlink() or (self.folder.exists() and not self.folder.is_dir()):
            raise InputError(f"{self.folder} is not a folder that an evaluation made: remove it")
        stored, damaged, expected = {}, 0, set().union(*map(_samples, batches))
        with writing(f"--output: can't use {self.folder}"):
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in sorted(self.folder.glob(f"{name}-*.jsonl")):
                *lines, _cut_by_a_kill = path.read_bytes().split(b"\n")
                items = [_item(line) for line in lines]
                stored |= dict(item for item in items if item and item[0] in expected)
                damaged += items.count(None)
        if damaged:
            print0(f"warning: {damaged:,} damaged line(s) in {self.folder}: these answers are computed again")
        return stored


def _keep(file: BinaryIO, results: dict[int, object]) -> None:
    """Write results. Raises InputError where the disk does not take them, or the file was removed."""
    with writing(CONTINUES):
        if not is_same_file(Path(file.name), file):
            raise FileNotFoundError(f"{file.name} was removed")
        file.write(b"".join(_line(item) for item in results.items()))


def _line(item: tuple[int, object]) -> bytes:
    text = json.dumps(item).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _item(line: bytes) -> tuple[int, object] | None:
    """What `_line` made a line of; None where the line is damaged."""
    checksum, _, text = line.partition(b" ")
    return tuple(json.loads(text)) if checksum == b"%08x" % zlib.crc32(text) else None


def _samples(batch: MicroBatch) -> set[int]:
    return {index for tree in batch for index in tree.samples}
