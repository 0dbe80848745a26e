"""The shared memory in which data workers hand over their batches: whether there is enough, checked before a run.

A worker that finds no room is killed (SIGBUS), at whatever step the workers get ahead far enough. Containers often have
64 MB.
"""

import math
import shutil
from collections.abc import Iterable
from pathlib import Path

import dist_utils
from common import InputError
from data import VQAData
from inputs.images import ImageSettings
from inputs.vision_cache import VisionCache
from trees import MicroBatch, tree_shape

FOLDER = Path("/dev/shm")
PREFETCHED = 2  # batches that each data worker keeps ready, as torch has it
PER_BATCH = 27 * 4096  # bytes of a batch however small: each of its tensors takes whole pages
PER_TOKEN = 100  # bytes of a batch for each of its tokens: ids, positions, targets
PER_PATCH = 84  # bytes for each of its patches in addition to the pixels: what the vision tower derives from the grid


def check_shared_memory(
    parts: Iterable[tuple[VQAData, Iterable[MicroBatch]]],
    settings: ImageSettings,
    workers: int,
    cache: VisionCache | None = None,
) -> None:
    """Raises InputError where the batches that `workers` workers per rank keep ready may not fit.

    `parts` are data sets with their micro-batches that have workers at the same time.
    """
    if not workers or not FOLDER.is_dir():
        return
    largest = [max((_bytes(data, batch, settings, cache) for batch in batches), default=0) for data, batches in parts]
    needed = sum(largest) * workers * PREFETCHED * dist_utils.processes_on_node()
    free = shutil.disk_usage(FOLDER).free
    if needed > free:
        mib = math.ceil(needed / 2**20)
        raise InputError(
            f"{FOLDER} has {free / 2**20:,.1f} MiB free, and the batches of --workers {workers} may take {mib:,}: give "
            f"--workers {workers * free // needed}, or enlarge it (docker run --shm-size {mib + 64}m)"
        )


def _bytes(data: VQAData, batch: MicroBatch, settings: ImageSettings, cache: VisionCache | None) -> int:
    """About the bytes of a micro-batch with its patches, or with its features where a cache has larger ones."""
    size = PER_BATCH + PER_TOKEN * sum(tree.tokens for tree in batch)
    for tree in batch:
        samples = [data.samples[index] for index in tree.samples]
        for sample, image in tree_shape(samples, tree.prefix_ids).encoded:
            patches, tokens = samples[sample].patches[image], samples[sample].image_tokens[image]
            size += max(patches * (3 * settings.patch_size**2 + PER_PATCH), cache.size(tokens) if cache else 0)
    return size
