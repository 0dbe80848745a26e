"""Vision features that are kept from one epoch to the next: `--vision-cache`.

A frozen vision tower makes the same of a picture in every epoch. The features of a picture are one file: 16 bytes with
the CRC-32 of its name and of the rest, then (sets, tokens, width) in the model's type. Its folder stands for all else
that they depend on, its name for the content of the picture's file and its grid.
"""

import hashlib
import json
import os
import shutil
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from uuid import uuid4

import numpy as np
import PIL
import torch
import transformers

from inputs.images import ImageSettings

HEADER = 16  # bytes
WRITES_BEHIND = 8  # micro-batches that may wait to be written
SPARE = 2**30  # bytes of the disk that stay free


@dataclass(frozen=True)
class VisionCache:
    folder: Path
    sets: int  # feature vectors of an image token: one, and for Qwen3-VL one more for each deepstack layer
    width: int
    dtype: torch.dtype

    def name(self, path: str, grid: tuple[int, int]) -> str:
        with open(path, "rb") as file:
            return f"{hashlib.file_digest(file, 'sha256').hexdigest()[:32]}-{grid[0]}x{grid[1]}"

    def size(self, tokens: int) -> int:
        """Bytes of a picture's features."""
        return HEADER + self.sets * tokens * self.width * self.dtype.itemsize

    def load(self, names: list[str], tokens: list[int]) -> torch.Tensor | None:
        """Features (sets, I, width) of pictures of so many tokens each. None where one is not there, or damaged."""
        found = []
        for name, count in zip(names, tokens):
            try:
                data = np.fromfile(self.folder / name, np.uint8)
            except OSError:
                return None
            if _sum(name, data[HEADER:]) != bytes(data[:HEADER]):
                return None
            found.append(torch.from_numpy(data[HEADER:]).view(self.dtype).view(self.sets, count, self.width))
        return torch.cat(found, dim=1)

    def store(self, name: str, features: torch.Tensor) -> None:
        """Write features (sets, tokens, width), whole or not at all. Raises OSError, also where a disk is almost full:
        checkpoints need room too."""
        if shutil.disk_usage(self.folder).free < SPARE + self.size(features.shape[1]):
            raise OSError("the disk is full but for a GiB")
        data = features.contiguous().view(torch.uint8).numpy().data
        partial = self.folder / f"tmp-{uuid4().hex}"
        try:
            with open(partial, "xb") as file:  # unlike a file of `tempfile` one that other users may read
                file.write(_sum(name, data))
                file.write(data)
            os.replace(partial, self.folder / name)
        finally:
            partial.unlink(missing_ok=True)


def _sum(name: str, data) -> bytes:
    return zlib.crc32(data, zlib.crc32(name.encode())).to_bytes(HEADER, "little")


def open_cache(folder: str, visual: torch.nn.Module, config, settings: ImageSettings) -> VisionCache:
    """The cache under `folder` for a vision tower, its settings and the versions that run it. Makes its folder."""
    digest = hashlib.sha256()
    for weight in visual.state_dict().values():
        digest.update(weight.contiguous().view(torch.uint8).cpu().numpy().data)
    pictures = {name: value for name, value in asdict(settings).items() if name not in ("min_pixels", "max_pixels")}
    facts = [digest.hexdigest(), str(visual.config), pictures, str(visual.dtype)]
    facts += [torch.cuda.get_device_name(visual.device) if visual.device.type == "cuda" else "cpu"]
    facts += [visual.config._attn_implementation, torch.__version__, transformers.__version__, PIL.__version__]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    cache = cache_at(Path(folder) / key, config, visual.dtype)
    cache.folder.mkdir(parents=True, exist_ok=True)
    return cache


def cache_at(folder: Path, config, dtype: torch.dtype) -> VisionCache:
    """The cache in this folder itself."""
    sets = 1 + len(getattr(config.vision_config, "deepstack_visual_indexes", []))
    return VisionCache(folder, sets, config.text_config.hidden_size, dtype)


class FeatureWriter:
    """Writes what the vision tower makes to its cache, beside the training loop."""

    def __init__(self, cache: VisionCache):
        self.cache, self.thread, self.behind, self.failed = cache, ThreadPoolExecutor(1), [], False

    def put(self, names: list[str], tokens: list[int], features: torch.Tensor) -> None:
        """Write features (sets, I, width) of pictures of so many tokens each. After a write that failed: nothing."""
        if self.failed:
            return
        on_gpu = features.is_cuda
        copy = torch.empty(features.shape, dtype=features.dtype, pin_memory=on_gpu).copy_(features, non_blocking=True)
        copied = torch.cuda.current_stream().record_event() if on_gpu else None
        while self.behind and (self.behind[0].done() or len(self.behind) >= WRITES_BEHIND):
            self.behind.pop(0).result()
        self.behind.append(self.thread.submit(self._write, names, tokens, copy, copied))

    def _write(self, names, tokens, features, copied) -> None:
        if copied:
            copied.synchronize()
        try:
            for name, one in zip(names, features.split(tokens, dim=1)):
                if not self.failed:
                    self.cache.store(name, one)
        except OSError as error:  # training goes on without
            self.failed = True
            print(f"warning: no more vision features are kept in {self.cache.folder}: {error}", file=sys.stderr)
