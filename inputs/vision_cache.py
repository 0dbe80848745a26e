"""Vision features that are kept from one epoch to the next: `--vision-cache`.

A frozen vision tower makes the same features of an image in every epoch. An image's features are one file: a
header of 16 bytes with one checksum (CRC-32) of the file's name and features together, then the features, an array
(sets, tokens, width) in the model's dtype. The file's name identifies the content of the image file and its grid; the
folder's name identifies everything else that the features depend on.
"""

import hashlib
import json
import shutil
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import PIL
import torch
import transformers

from common import printable, replacing, writing
from inputs.images import PIXEL_RULES, ImageSettings

HEADER = 16  # bytes
PENDING_WRITES = 8  # micro-batches whose features may wait in memory to be written
SPARE = 2**30  # bytes of the disk that stay free


@dataclass(frozen=True)
class VisionCache:
    folder: Path
    sets: int  # feature vectors per image token: one, and for Qwen3-VL one more for each deepstack layer
    width: int
    dtype: torch.dtype

    def name(self, path: str, grid: tuple[int, int]) -> str:
        """The entry of an image file at a patch grid. Reads the whole file: its path or time may mislead."""
        with open(path, "rb") as file:
            return f"{hashlib.file_digest(file, 'sha256').hexdigest()[:32]}-{grid[0]}x{grid[1]}"

    def size(self, tokens: int) -> int:
        """Bytes of an entry of so many image tokens."""
        return HEADER + self.sets * tokens * self.width * self.dtype.itemsize

    def load(self, names: list[str], tokens: list[int]) -> torch.Tensor | None:
        """Features (sets, I, width) of images with these names and numbers of tokens. None if any is missing or
        damaged."""
        features = []
        for name, count in zip(names, tokens):
            try:
                if (self.folder / name).stat().st_size != self.size(count):
                    return None
                data = np.fromfile(self.folder / name, np.uint8)
            except OSError:
                return None
            if _checksum(name, data[HEADER:]) != bytes(data[:HEADER]):
                return None
            features.append(torch.from_numpy(data[HEADER:]).view(self.dtype).view(self.sets, count, self.width))
        return torch.cat(features, dim=1)

    def store(self, name: str, features: torch.Tensor) -> None:
        """Write features (sets, tokens, width), whole or not at all. Raises OSError, also for a disk that is almost
        full: checkpoints need room too."""
        if shutil.disk_usage(self.folder).free < SPARE + self.size(features.shape[1]):
            raise OSError("less than a GiB would stay free on the disk")
        data = features.contiguous().view(torch.uint8).numpy().data
        with replacing(self.folder / name) as partial, open(partial, "xb") as file:
            file.write(_checksum(name, data))
            file.write(data)


def _checksum(name: str, data) -> bytes:
    return zlib.crc32(data, zlib.crc32(name.encode())).to_bytes(HEADER, "little")


def open_cache(folder: str, visual: torch.nn.Module, config, settings: ImageSettings) -> VisionCache:
    """The cache under `folder` for a vision tower, its settings and the versions that run it. Creates its folder."""
    digest = hashlib.sha256()
    for weight in visual.state_dict().values():
        digest.update(weight.contiguous().view(torch.uint8).cpu().numpy().data)
    # Pixel limits are left out: they act through the grid alone, which is part of an entry's name.
    processing = {name: value for name, value in asdict(settings).items() if name not in ("min_pixels", "max_pixels")}
    facts = [digest.hexdigest(), str(visual.config), processing, PIXEL_RULES, str(visual.dtype)]
    facts += [torch.cuda.get_device_name(visual.device) if visual.device.type == "cuda" else "cpu"]
    facts += [visual.config._attn_implementation, torch.__version__, transformers.__version__, PIL.__version__]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    cache = cache_at(Path(folder) / key, config, visual.dtype)
    with writing(f"--vision-cache: can't write to {cache.folder}"):
        cache.folder.mkdir(parents=True, exist_ok=True)
    return cache


def cache_at(folder: Path, config, dtype: torch.dtype) -> VisionCache:
    """The cache whose entries are in this very folder."""
    sets = 1 + len(getattr(config.vision_config, "deepstack_visual_indexes", []))
    return VisionCache(folder, sets, config.text_config.hidden_size, dtype)


class FeatureWriter:
    """Writes what the vision tower computes to the cache, in a thread beside the training loop."""

    def __init__(self, cache: VisionCache):
        self.cache, self.thread, self.pending, self.failed = cache, ThreadPoolExecutor(1), [], False

    def put(self, names: list[str], tokens: list[int], features: torch.Tensor) -> None:
        """Write features (sets, I, width) of images with these names and numbers of tokens. Does nothing once a write
        has failed."""
        if self.failed:
            return
        on_gpu = features.is_cuda
        # The copy runs beside the step; only the thread waits for it.
        copy = torch.empty(features.shape, dtype=features.dtype, pin_memory=on_gpu).copy_(features, non_blocking=True)
        copied = torch.cuda.current_stream().record_event() if on_gpu else None
        while self.pending and (self.pending[0].done() or len(self.pending) >= PENDING_WRITES):
            self.pending.pop(0).result()
        self.pending.append(self.thread.submit(self._write, names, tokens, copy, copied))

    def _write(self, names, tokens, features, copied) -> None:
        if copied:
            copied.synchronize()
        try:
            for name, image_features in zip(names, features.split(tokens, dim=1)):
                if not self.failed:
                    self.cache.store(name, image_features)
        except OSError as error:  # training goes on without
            self.failed = True
            warning = f"warning: no more vision features are kept in {self.cache.folder}: {error}"
            print(printable(warning), file=sys.stderr)
