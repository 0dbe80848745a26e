"""The feed: micro-batches read by worker processes, for training and evaluation alike."""

from itertools import islice

import torch
from torch.utils.data import DataLoader

import dist_utils
from data import TreeDataset
from dist_utils import Ranks
from modeling.attention import FLEX_BLOCK
from trees import MicroBatch, Work, share_out

STALLED_AFTER = 300  # seconds without a batch after which a data worker counts as stalled


def make_loader(
    dataset: TreeDataset, sampler, workers: int, device: torch.device, persistent: bool = False
) -> DataLoader:
    """One item is one micro-batch: `batch_size` is the plan's business."""
    return DataLoader(
        dataset,
        sampler=sampler,
        batch_size=None,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        persistent_workers=persistent and workers > 0,
        worker_init_fn=dist_utils.ignore_signals,
        timeout=STALLED_AFTER if workers else 0,
    )


def next_batches(loader: DataLoader):
    """Yield a loader's batches. When one fails to come, the error says which samples' images it waited for."""
    batches, number = iter(loader), 0
    while True:
        try:
            batch = next(batches, None)
        except RuntimeError as error:
            work = next(islice(iter(loader.sampler), number, None))
            samples = [loader.dataset.data.samples[i] for tree in work.trees for i in tree.samples]
            images = dict.fromkeys(image for sample in samples for image in sample.images)
            worker = f"data worker {number % loader.num_workers}" if loader.num_workers else "this process"
            error.add_note(f"{worker} was to read {', '.join(images)} for {samples[0].where} and what follows")
            raise
        if batch is None:
            return
        yield batch
        number += 1


def padding(device: torch.device) -> int:
    return FLEX_BLOCK if device.type == "cuda" else 1


def my_share(batches: list[MicroBatch], ranks: Ranks) -> list[Work]:
    """This rank's part of an evaluation: every micro-batch goes to exactly one rank."""
    return [Work(batches[i], number=i) for i in share_out(batches, ranks.world_size)[ranks.rank]]
