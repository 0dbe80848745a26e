"""Data: turns rows into token ids with marked answers, and trees of such samples into the batches that the model runs.

`load_data` reads and checks everything before a GPU is touched. `trees.py` says which samples form a step;
`TreeDataset` turns one micro-batch of that plan into a `Batch`.
"""

import hashlib
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from functools import cache
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

import dist_utils
from common import quote
from inputs.images import ImageSettings, check_images, checked_grid, find_image, load_patches, vision_inputs
from inputs.positions import place_keys, rotary_positions, token_paths
from inputs.row_files import distinct_names, iterate_rows
from inputs.rows import BadRow, Row
from inputs.texts import Text, TextEncoder
from inputs.unread import image_finder, note_unread, refuse_unread_images
from inputs.vision_cache import VisionCache
from trees import Assignment, tree_shape

FLEX_BLOCK = 128  # tokens per FlexAttention block; a batch on a GPU is padded to whole blocks (pytorch#153799)
STALLED_AFTER = 300  # seconds without a batch after which a data worker counts as stalled


@dataclass(slots=True)
class Sample:
    """One question with its answer. `ids` has one image token per image; `_expand` repeats each as the image needs.

    Samples share what is equal, arrays, tuples and `fields`: nothing may change these in place.
    """

    id: str
    where: str  # file:line
    images: tuple[str, ...]  # paths, in the order of their image tokens
    ids: np.ndarray  # (n,) int32
    weights: np.ndarray  # (n,) float64: of each id in the loss; 0 for all but answers that are trained, with their end
    last_answer: int  # index of the last answer's first id, where generation starts
    image_at: tuple[int, ...]  # index of each image token in ids
    image_tokens: tuple[int, ...]  # language-model tokens of each image
    patches: tuple[int, ...]  # vision patches of each image
    fields: dict  # of the row, see `Row.fields`
    file: int = 0  # number of its file of rows
    text_first: bool = False  # an image comes after text of its turn
    tokens: int = field(init=False)  # language-model tokens
    before_answers: int = field(init=False)  # ids before the first that is trained, and so before the last answer

    def __post_init__(self):
        # Kept, not computed on demand: plans read both about ten times per sample.
        self.tokens, self.before_answers = self.tokens_before(len(self.ids)), int(self.trained.argmax())

    @property
    def trained(self) -> np.ndarray:
        """(n,) bool: the ids that are trained."""
        return self.weights > 0

    def tokens_before(self, index: int) -> int:
        """Language-model tokens of the ids before `index`."""
        return index + sum(count - 1 for at, count in zip(self.image_at, self.image_tokens) if at < index)


@dataclass
class VQAData:
    """All usable samples of one or several files of rows, the patch grid of every image, and the unusable rows."""

    files: list[str]
    samples: list[Sample]
    grids: dict[str, tuple[int, int]]  # patches (down, across) of every image
    bad: list[BadRow] = field(default_factory=list)
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)  # (height, width) of every image before resizing
    # file -> field that nothing reads -> rows that have it, and the place of the first
    unread: dict[int, dict[str, tuple[int, str]]] = field(default_factory=dict)

    def __getstate__(self) -> dict:
        """Samples travel to the other ranks field by field: one by one, each would bring a dict of its fields."""
        given = [f.name for f in fields(Sample) if f.init]
        return vars(self) | {"samples": [[getattr(sample, name) for sample in self.samples] for name in given]}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state | {"samples": list(map(Sample, *state["samples"]))})

    def only(self, samples: list[Sample]) -> "VQAData":
        """These samples and their images."""
        used = sorted({image for sample in samples for image in sample.images})
        grids, sizes = ({image: table[image] for image in used} for table in (self.grids, self.sizes))
        return replace(self, samples=samples, grids=grids, sizes=sizes)

    def of_files(self, first: int, end: int) -> "VQAData":
        """The samples and bad rows of files `first` to `end` - 1, as if no other file had been read."""
        samples, bad = (
            [replace(row, file=row.file - first) if first else row for row in rows if first <= row.file < end]
            for rows in (self.samples, self.bad)
        )
        unread = {file - first: places for file, places in self.unread.items() if first <= file < end}
        return replace(self.only(samples), files=self.files[first:end], bad=bad, unread=unread)

    def fingerprint(self, folder: str) -> str:
        """Changes with any sample's tokens, images (by name below `folder` and grid), weights, file or place.

        Checkpoints hold it: a run whose fingerprint differs is not resumed.
        """
        digest = hashlib.sha256()
        named = {image: (os.path.relpath(image, folder), grid) for image, grid in self.grids.items()}
        for sample in self.samples:
            digest.update(sample.ids.tobytes() + sample.trained.tobytes())
            images = [named[image] for image in sample.images]
            first, *others = dict.fromkeys(sample.weights[sample.trained].tolist())
            digest.update(repr([sample.file, first, *images]).encode())
            if others:  # not where a row has one weight, as all rows had when the first checkpoints were written
                digest.update(sample.weights.tobytes())
        return digest.hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------- loading


def load_data(
    files: list[str], images_dir: str, tokenizer, settings: ImageSettings, max_tokens: int, by=(), **options
) -> VQAData:
    """Read files of rows (`by`: see `parse_row`), and `encode_rows`. Raises InputError when a file can't be read."""
    names = enumerate(zip(files, distinct_names(files)))
    rows = chain.from_iterable(iterate_rows(Path(path), name, number, by) for number, (path, name) in names)
    return encode_rows(rows, images_dir, tokenizer, settings, max_tokens, files=files, **options)


def encode_rows(
    rows: Iterable[Row | BadRow],
    images_dir: str,
    tokenizer,
    settings: ImageSettings,
    max_tokens: int,
    *,
    system: str = "",
    prompt: str = "{question}",
    image_first: bool = False,
    allow_outside_images: bool = False,
    headers_only: bool = False,
    files: Iterable[str] = (),
) -> VQAData:
    """Check the images of rows and tokenize their texts. Rows that can't be used are in `bad`, each with its reason.

    `max_tokens` limits a single sample. `system` is the system prompt of rows that have none. `prompt` is a template
    whose {question} is replaced by each question. `image_first` moves images before the text of their turn.
    `headers_only` reads the sizes of images and decodes none. Raises InputError when `system` or `prompt` holds a
    special token, and for a chat template that can't be trained on.
    """
    encoder = TextEncoder(tokenizer, settings.has_box_tokens, system, prompt, image_first)
    folder = Path(images_dir)
    find = cache(lambda name: find_image(name, folder, allow_outside_images))  # rows share images
    find_unread = image_finder(folder)
    bad, grids, unread, shared = [], {}, {}, {}

    def locate(row: Row) -> Text | ValueError:
        images = tuple(map(find, row.images))
        row.images = shared.setdefault(images, images)
        row.fields = shared.setdefault(repr(row.fields), row.fields)
        refuse_unread_images(row, folder, find_unread)
        try:
            return encoder.render(row.messages, row.fields.get("options", []))
        except ValueError as reason:
            return reason.with_traceback(None)  # told unless something is wrong with an image of the row, too

    def finish(row: Row, text: Text | ValueError) -> Sample:
        grids.update((image, checked_grid(image, sizes[image], settings)) for image in row.images if image not in grids)
        if isinstance(text, ValueError):
            raise text
        return _sample(row, text, lengths(row.images), max_tokens)

    located = []
    for row in encoder.by_answer(rows):
        if isinstance(row, BadRow):
            bad.append(row)
            continue
        note_unread(row, unread)
        if text := _accept(bad, row, locate):
            row.messages = row.unread = None  # two thirds of a row's memory
            located.append((row, text))
    sizes = check_images(sorted({image for row, _ in located for image in row.images}), headers_only)
    lengths = cache(lambda images: _image_lengths(images, grids, settings.merge_size))
    encoder.tokenize()
    samples = [sample for row, text in located if (sample := _accept(bad, row, finish, text))]
    bad = sorted({row.where: row for row in reversed(bad)}.values(), key=BadRow.place)  # once for several answers
    return VQAData(list(map(str, files)), [], grids, bad, sizes, unread).only(samples)


def _accept(bad: list[BadRow], row: Row, function: Callable, *args):
    """function(row, *args), or None where it raises ValueError: then the row joins `bad`."""
    try:
        return function(row, *args)
    except ValueError as reason:
        bad.append(row.refused(reason))


def _sample(row: Row, text: Text, lengths: dict[str, tuple[int, ...]], max_tokens: int) -> Sample:
    of_row = {name: getattr(row, name) for name in ("id", "where", "images", "fields", "file")}
    of_text = {name: getattr(text, name) for name in ("ids", "weights", "last_answer", "image_at", "text_first")}
    sample = Sample(**of_row, **of_text, **lengths)
    if sample.tokens > max_tokens:
        limit = f"over --max-tokens {max_tokens:,} (--max-pixels makes images smaller)"
        raise ValueError(f"{sample.tokens:,} tokens, {limit}")
    return sample


def _image_lengths(images: Iterable[str], grids: dict, merge_size: int) -> dict[str, tuple[int, ...]]:
    """Vision patches and language-model tokens of each of a sample's images."""
    patches = tuple(math.prod(grids[image]) for image in images)
    return {"patches": patches, "image_tokens": tuple(count // merge_size**2 for count in patches)}


def at_limit(data: VQAData, settings: ImageSettings, max_pixels: int) -> VQAData:
    """The samples that `load_data` would return with images of at most `max_pixels` pixels. Reads no file."""
    limited = replace(settings, min_pixels=min(settings.min_pixels, max_pixels), max_pixels=max_pixels)
    grids = {image: limited.grid(*size) for image, size in data.sizes.items()}
    lengths = cache(lambda images: _image_lengths(images, grids, settings.merge_size))
    samples = [replace(sample, **lengths(sample.images)) for sample in data.samples]
    return replace(data, samples=samples, grids=grids)


# ---------------------------------------------------------------------------------------------------------- batches


@dataclass
class Batch:
    """One micro-batch: trees packed into one sequence of T tokens with N answer tokens and I image tokens.

    Token j is visible to token i iff tree[j] == tree[i], j <= i, and branch[j] is 0 (the prefix) or branch[i].
    """

    ids: torch.Tensor  # (T,) int64
    positions: torch.Tensor  # (3, T) int64: rotary position in time, height and width
    tree: torch.Tensor  # (T,) int32: place in the batch; padding is tree -1
    branch: torch.Tensor  # (T,) int32: 0 in a prefix, from 1 in branches, as they are numbered in the whole tree
    dropout_keys: torch.Tensor  # (T,) int32: of each token's place in its step (see `place_keys`)
    image_at: torch.Tensor  # (I,) int64: where the image tokens are
    answer_at: torch.Tensor  # (N,) int64: tokens whose next token is trained
    targets: torch.Tensor  # (N,) int64: those next tokens
    weights: torch.Tensor  # (N,) float32: weight of each in the loss
    question: torch.Tensor  # (N,) int64: index into `samples` of the sample that each belongs to
    patches: torch.Tensor  # (sum of grids, 3, patch_size**2) uint8: a quarter of float32's bytes on the way to the GPU
    grid: torch.Tensor  # (images, 3) int64: time, height, width in patches
    patch_keys: torch.Tensor  # (sum of grids,) int32: as dropout_keys, of patches
    vision: dict  # what the vision tower derives from the grid; made here, as the GPU would have to wait for it
    paths: dict  # what recurrent layers derive from tree and branch (see `token_paths`); made here for that reason too
    samples: list[int]  # indices into VQAData.samples
    assignment: Assignment
    features: torch.Tensor | None = None  # (sets, I, width) from the vision cache, instead of patches
    cache_names: list[str] = field(default_factory=list)  # of the images' entries in the vision cache
    image_tokens: tuple[int, ...] = ()  # of each image

    def _map(self, function: Callable) -> "Batch":
        def mapped(value):
            if isinstance(value, dict):
                return {name: mapped(v) for name, v in value.items()}
            return function(value) if torch.is_tensor(value) else value

        return replace(self, **{f.name: mapped(getattr(self, f.name)) for f in fields(self)})

    def to(self, device: torch.device) -> "Batch":
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        return self._map(torch.Tensor.pin_memory)


def build_batch(
    data: VQAData,
    assignment: Assignment,
    settings: ImageSettings,
    pad_to: int = 1,
    at_least: int = 0,
    prompts_only: bool = False,
    cache: VisionCache | None = None,
) -> Batch:
    """Pack the trees of `assignment` into a `Batch`, padded to `at_least` so many tokens and a multiple of `pad_to`.

    `prompts_only` cuts every branch before its last answer, where generation starts. If the `cache` has the features of
    all images, the batch brings them and no patches.
    """
    parts, samples, images, offset = [], [], [], 0
    seed = assignment.step.seed if assignment.step else 0
    for number, tree in enumerate(assignment.trees):
        chosen = [data.samples[index] for index in tree.samples]
        shape, key = tree_shape(chosen, tree.prefix_ids), place_keys(seed, tree.number)
        for place, sample in enumerate(chosen):
            start = shape.prefix if place else 0  # the first branch brings the prefix, so it is in the batch once
            end = sample.tokens_before(sample.last_answer) if prompts_only else sample.tokens
            part = _branch_fields(sample, start, end, data.grids, settings.merge_size)
            in_prefix = np.arange(start, end) < shape.prefix
            part["branch"] = np.where(in_prefix, 0, tree.first_branch + place).astype(np.int32)
            places = np.arange(start, end) - np.where(in_prefix, 0, shape.prefix)
            part["dropout_keys"] = place_keys(key, part["branch"], places)
            part["tree"] = np.full(end - start, number, np.int32)
            part["question"] = np.full(len(part["targets"]), len(samples) + place)
            for name in ("image_at", "answer_at"):
                part[name] += offset
            parts.append(part)
            offset += end - start
        for place, image in shape.encoded:
            in_prefix = chosen[place].image_at[image] < tree.prefix_ids
            branch = 0 if in_prefix else tree.first_branch + place
            images.append((chosen[place].images[image], place_keys(key, branch, image)))
        samples += tree.samples
    if pad_to > 1 or offset < at_least:
        parts.append(_padding_fields(offset, max(offset, at_least), pad_to))
    arrays = {name: np.concatenate([part[name] for part in parts if name in part], axis=-1) for name in parts[0]}
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    paths = recurrent_paths(arrays["tree"], arrays["branch"])  # for every family, as it takes a millisecond
    files, keys = [file for file, _ in images], [key for _, key in images]
    image_fields = _image_fields(files, keys, data.grids, settings, cache)
    return Batch(**tensors, **image_fields, paths=paths, samples=samples, assignment=assignment)


def recurrent_paths(tree: np.ndarray, branch: np.ndarray) -> dict:
    """`Batch.paths`: those of `token_paths`, as tensors."""
    return {name: v if isinstance(v, tuple) else torch.from_numpy(v) for name, v in token_paths(tree, branch).items()}


def _branch_fields(sample: Sample, start: int, end: int, grids: dict, merge_size: int) -> dict[str, np.ndarray]:
    """Fields of `Batch` for a sample's tokens from `start` to `end` - 1. Indices count from the first of them."""
    ids, weights, is_image = _expand(sample)
    # A prompt's last token predicts the first generated one; what it is compared with there does not matter.
    answers = np.flatnonzero(weights) if end == len(ids) else np.array([end])
    return {
        "ids": ids[start:end],
        "positions": rotary_positions(sample, grids, merge_size)[:, start:end],
        "image_at": np.flatnonzero(is_image[start:end]),
        "answer_at": answers - 1 - start,  # never negative: prefixes end before the token that predicts an answer
        "targets": ids[answers],
        "weights": weights[answers].astype(np.float32),
    }


def _padding_fields(length: int, wanted: int, pad_to: int) -> dict[str, np.ndarray]:
    """What pads a batch of `length` tokens to `wanted` and a multiple of `pad_to`: a tree that no other token sees."""
    blocks = max(-(-wanted // pad_to), 2)  # at least two: torch.compile treats a size of 1 as a constant and recompiles
    padding = np.arange(blocks * pad_to - length)
    zeros = np.zeros_like(padding)
    return {
        "ids": zeros,
        "positions": np.stack([padding] * 3),
        "branch": zeros.astype(np.int32),
        "dropout_keys": zeros.astype(np.int32),
        "tree": zeros.astype(np.int32) - 1,
    }


def _expand(sample: Sample) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token ids, their weights and whether each is of an image, all (tokens,): image tokens repeated as images need."""
    repeats = np.ones(len(sample.ids), int)
    repeats[list(sample.image_at)] = sample.image_tokens
    is_image = np.isin(np.arange(len(sample.ids)), sample.image_at)
    ids, weights, is_image = (np.repeat(values, repeats) for values in (sample.ids, sample.weights, is_image))
    return ids.astype(np.int64), weights, is_image


def _image_fields(
    images: list[str], keys: list[np.ndarray], grids: dict, settings: ImageSettings, cache: VisionCache | None
) -> dict:
    """The image fields of `Batch`: patches, or features instead if the cache has those of all images. `keys`: of the
    images' places."""
    image_tokens = _image_lengths(images, grids, settings.merge_size)["image_tokens"]
    names = [cache.name(path, grids[path]) for path in images] if cache else []
    features = cache.load(names, image_tokens) if names else None
    encoded = images if features is None else []
    # Several trees, or branches after their prefix, may show the same image: it is decoded once.
    patches = {path: load_patches(path, grids[path], settings) for path in dict.fromkeys(encoded)}
    arrays = [patches[path] for path in encoded] or [np.zeros((0, 3, settings.patch_size**2), np.uint8)]
    grid = torch.tensor([(1, *grids[path]) for path in images], dtype=torch.int64).reshape(-1, 3)
    patch_keys = [place_keys(key, np.arange(math.prod(grids[path]))) for path, key in zip(encoded, keys)]
    return {
        "patches": torch.from_numpy(np.concatenate(arrays)),
        "patch_keys": torch.from_numpy(np.concatenate([np.zeros(0, np.int32), *patch_keys])),
        "grid": grid,
        "vision": vision_inputs(grid, settings) if encoded else {},
        "features": features,
        "cache_names": names,
        "image_tokens": image_tokens,
    }


# ----------------------------------------------------------------------------------------------------------- loader


class TreeDataset(Dataset):
    """Items are micro-batches: a sampler yields an `Assignment`, an item is its `Batch`."""

    def __init__(self, data: VQAData, settings: ImageSettings, pad_to: int = 1, **options):
        """`options`: the other arguments of `build_batch`."""
        self.data, self.settings, self.options = data, settings, {"pad_to": pad_to, **options}

    def __getitem__(self, assignment: Assignment) -> Batch:
        try:
            return build_batch(self.data, assignment, self.settings, **self.options)
        except OSError as error:  # checked before training, so it has changed since
            first = self.data.samples[assignment.trees[0].samples[0]].where
            raise RuntimeError(f"an image of {first} or of a row after it can no longer be read: {error}") from error


class _Loader(DataLoader):
    def check_worker_number_rationality(self) -> None:
        """Skip torch's warning of more workers than CPUs, on every rank and in every epoch: the user chose."""


def make_loader(
    dataset: TreeDataset, sampler, workers: int, device: torch.device, persistent: bool = False
) -> DataLoader:
    return _Loader(
        dataset,
        sampler=sampler,
        batch_size=None,  # an item is a micro-batch already
        num_workers=workers,
        pin_memory=device.type == "cuda",  # only from pinned memory does a copy to the GPU run beside the step
        persistent_workers=persistent and workers > 0,
        worker_init_fn=dist_utils.ignore_signals,
        timeout=STALLED_AFTER if workers else 0,
    )


def next_batches(loader: DataLoader):
    """Yield a loader's batches. If loading one fails, a note on the error names the images and rows it was reading."""
    batches, number = iter(loader), 0
    while True:
        try:
            batch = next(batches, None)
        except RuntimeError as error:
            assignment = next(islice(iter(loader.sampler), number, None))
            samples = [loader.dataset.data.samples[i] for tree in assignment.trees for i in tree.samples]
            images = ", ".join(map(quote, dict.fromkeys(image for sample in samples for image in sample.images)))
            reader = f"data worker {number % loader.num_workers}" if loader.num_workers else "this process"
            error.add_note(f"{reader} was reading {images} for {samples[0].where} and rows after it")
            raise
        if batch is None:
            return
        yield batch
        number += 1


def padding(device: torch.device) -> int:
    """A batch on this device is padded to a multiple of this many tokens."""
    return FLEX_BLOCK if device.type == "cuda" else 1
