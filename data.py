"""Data: rows to token ids with marked answers, and the batches that carry them and their images to the model.

`load_data` reads and checks everything before a GPU is touched. `trees.py` says which samples form a step;
`TreeDataset` turns one micro-batch of that plan into a `Batch`.
"""

import hashlib
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

import dist_utils
from inputs import prompts
from inputs.images import ImageSettings, check_images, find_images, load_patches
from inputs.rows import BadRow, Row, read_rows
from inputs.vision_cache import VisionCache
from trees import Assignment

FLEX_BLOCK = 128  # on GPUs a batch is padded to whole blocks of FlexAttention's (pytorch#153799)
STALLED_AFTER = 300  # seconds without a batch after which a data worker counts as stalled


@dataclass
class Sample:
    """One question with its answer. `ids` hold one image token an image; `_expand` gives each its real number."""

    id: str
    where: str  # file:line
    images: tuple[str, ...]  # paths, in the order of their image tokens
    ids: np.ndarray  # (n,) int32
    trained: np.ndarray  # (n,) bool: tokens of answers, end-of-turn included
    image_at: tuple[int, ...]  # index of each image token in ids
    image_tokens: tuple[int, ...]  # language-model tokens of each image
    patches: tuple[int, ...]  # vision patches of each image
    fields: dict  # question, answer, question_type, options
    weight: float = 1.0  # of its answers' tokens in the loss
    file: int = 0  # number of the file of rows it is from

    @property
    def tokens(self) -> int:
        return self.tokens_before(len(self.ids))

    @property
    def last_answer(self) -> int:
        """Index of the last answer's first id."""
        return int(np.flatnonzero(~self.trained)[-1]) + 1

    def tokens_before(self, index: int) -> int:
        """Language-model tokens of the ids before `index`."""
        return index + sum(n - 1 for at, n in zip(self.image_at, self.image_tokens) if at < index)


@dataclass
class VQAData:
    """All usable samples of one or several files of rows, the patch grid of every image, and what was not usable."""

    files: list[str]
    samples: list[Sample]
    grids: dict[str, tuple[int, int]]  # patches (down, across) of every image
    bad: list[BadRow] = field(default_factory=list)
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)  # (height, width) of every image before resizing

    def only(self, samples: list[Sample]) -> "VQAData":
        """These samples and their images."""
        used = sorted({image for sample in samples for image in sample.images})
        grids, sizes = ({image: table[image] for image in used} for table in (self.grids, self.sizes))
        return replace(self, samples=samples, grids=grids, sizes=sizes)

    def of_files(self, first: int, end: int) -> "VQAData":
        """The samples and bad rows of the files `first` to `end`, as if no other file had been read."""
        samples, bad = (
            [replace(row, file=row.file - first) for row in rows if first <= row.file < end]
            for rows in (self.samples, self.bad)
        )
        return replace(self.only(samples), files=self.files[first:end], bad=bad)

    def fingerprint(self, folder: str) -> str:
        """Changes when a sample's tokens, images (by their names below `folder`), weight, file or place change."""
        digest = hashlib.sha256()
        for sample in self.samples:
            digest.update(sample.ids.tobytes() + sample.trained.tobytes())
            images = [(os.path.relpath(image, folder), self.grids[image]) for image in sample.images]
            digest.update(repr([sample.file, sample.weight, *images]).encode())
        return digest.hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------- loading


def load_data(
    files: list[str], images_dir: str, tokenizer, settings: ImageSettings, max_tokens: int, **options
) -> VQAData:
    """Read files of rows and encode them (see `encode_rows`). Raises InputError when a file can't be read."""
    rows, bad = [], []
    for number, (path, name) in enumerate(zip(files, _distinct_names(files))):
        usable, unusable = read_rows(Path(path), name)
        for row in (*usable, *unusable):
            row.file = number
        rows += usable
        bad += unusable
    return encode_rows(rows, images_dir, tokenizer, settings, max_tokens, files=files, bad=bad, **options)


def encode_rows(
    rows: list[Row],
    images_dir: str,
    tokenizer,
    settings: ImageSettings,
    max_tokens: int,
    *,
    system: str = "",
    prompt: str = "{question}",
    allow_outside_images: bool = False,
    headers_only: bool = False,
    files: Iterable[str] = (),
    bad: Iterable[BadRow] = (),
) -> VQAData:
    """Check the images of rows and tokenize their texts. Rows that can't be used join `bad`, with their reasons.

    `system` is the system prompt of rows that have none. `prompt` is the text of a user turn, the row's own text
    standing for {question}. `max_tokens` bounds a single sample. `headers_only` reads sizes of images and decodes none.
    Raises InputError when `system` or `prompt` holds a special token.
    """
    special, bad = prompts.special_tokens(tokenizer), list(bad)
    prompts.refuse_special_settings(system, prompt, special)
    located, usable, segments = [], [], []
    for row in rows:
        try:
            row.images = find_images(row.images, Path(images_dir), allow_outside_images)
            located.append(row)
        except ValueError as reason:
            bad.append(row.refused(reason))
    sizes = check_images(sorted({image for row in located for image in row.images}), headers_only)
    grids = {image: _grid(size, settings) for image, size in sizes.items()}
    for row in located:
        try:
            for image in row.images:
                if isinstance(grids[image], str):
                    raise ValueError(f"image {image}: {grids[image]}")
            messages = prompts.fill_template(row.messages, prompt)
            prompts.refuse_special_tokens(messages, row.fields.get("options", []), special)
            segments.append(prompts.render_segments(messages, tokenizer, system))
            usable.append(row)
        except ValueError as reason:
            bad.append(row.refused(reason))

    samples, image_token = [], tokenizer.convert_tokens_to_ids("<|image_pad|>")
    for row, pieces in zip(usable, _tokenize(segments, tokenizer)):
        sample = _sample(row, pieces, image_token, grids, settings.merge_size)
        if sample.tokens <= max_tokens:
            samples.append(sample)
        else:
            limit = f"over --max-tokens {max_tokens:,} (--max-pixels makes images smaller)"
            bad.append(row.refused(f"{sample.tokens:,} tokens, {limit}"))
    bad.sort(key=BadRow.place)
    return VQAData(list(map(str, files)), [], grids, bad, sizes).only(samples)


def _distinct_names(paths: list[str]) -> list[str]:
    """The shortest ends of paths that tell them apart: their last parts, as many of them as that takes."""
    names = []
    for path in paths:
        parts = Path(path).parts
        others, depths = {Path(other).parts for other in paths} - {parts}, range(1, len(parts))
        depth = next((n for n in depths if all(other[-n:] != parts[-n:] for other in others)), len(parts))
        names.append("/".join(parts[-depth:]))
    return names


def _tokenize(segments: list[list[tuple[str, bool]]], tokenizer) -> list[list[tuple[list[int], bool]]]:
    """Token ids for each segment's text. Every different text is tokenized once: many rows ask the same question."""
    texts = list({text for pieces in segments for text, _ in pieces})
    encoded = dict(zip(texts, tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []))
    return [[(encoded[text], is_trained) for text, is_trained in pieces] for pieces in segments]


def at_limit(data: VQAData, settings: ImageSettings, max_pixels: int) -> VQAData:
    """The same samples with images of at most `max_pixels` pixels, as load_data would make them; nothing is read."""
    limited = replace(settings, min_pixels=min(settings.min_pixels, max_pixels), max_pixels=max_pixels)
    grids = {image: limited.grid(*size) for image, size in data.sizes.items()}
    samples = [replace(one, **_image_sizes(one.images, grids, settings.merge_size)) for one in data.samples]
    return replace(data, samples=samples, grids=grids)


def _image_sizes(images: Iterable[str], grids: dict, merge_size: int) -> dict[str, tuple[int, ...]]:
    """Vision patches and language-model tokens of each of a sample's images."""
    patches = tuple(math.prod(grids[image]) for image in images)
    return {"patches": patches, "image_tokens": tuple(count // merge_size**2 for count in patches)}


def _grid(size: tuple[int, int] | str, settings: ImageSettings) -> tuple[int, int] | str:
    """The patch grid of a picture of this size, or what is wrong with the picture."""
    try:
        return size if isinstance(size, str) else settings.grid(*size)
    except ValueError as error:
        return str(error)


def _sample(row: Row, pieces: list, image_token: int, grids: dict, merge_size: int) -> Sample:
    ids = np.concatenate([piece for piece, _ in pieces]).astype(np.int32)
    trained = np.concatenate([np.full(len(piece), is_trained) for piece, is_trained in pieces])
    return Sample(
        id=str(row.fields["id"]),
        where=row.where,
        images=tuple(row.images),
        ids=ids,
        trained=trained,
        image_at=tuple(np.flatnonzero(ids == image_token).tolist()),
        **_image_sizes(row.images, grids, merge_size),
        fields=row.fields,
        weight=row.weight,
        file=row.file,
    )


# ---------------------------------------------------------------------------------------------------------- batches


@dataclass
class Batch:
    """One micro-batch: trees packed into one sequence of T tokens with N answer tokens and I image tokens.

    Token j is visible to token i iff tree[j] == tree[i], j <= i, and branch[j] is 0 (the prefix) or branch[i].
    """

    ids: torch.Tensor  # (T,) int64
    positions: torch.Tensor  # (3, T) int64: rotary position in time, height and width
    tree: torch.Tensor  # (T,) int32; padding is a tree of its own
    branch: torch.Tensor  # (T,) int32: 0 in a prefix, from 1 in branches
    image_at: torch.Tensor  # (I,) int64: where the image tokens are
    answer_at: torch.Tensor  # (N,) int64: tokens whose next token is trained
    targets: torch.Tensor  # (N,) int64: those next tokens
    weights: torch.Tensor  # (N,) float32: how much each counts in the loss
    question: torch.Tensor  # (N,) int64: which of the batch's samples each belongs to
    patches: torch.Tensor  # (sum of grids, 3, patch_size**2) uint8
    grid: torch.Tensor  # (images, 3) int64: time, height, width in patches
    vision: dict  # what the vision tower derives from the grid, made here so that the GPU need not wait for it
    samples: list[int]  # indices into VQAData.samples
    assignment: Assignment
    features: torch.Tensor | None = None  # (sets, I, width) from the vision cache, instead of patches
    cache_names: list[str] = field(default_factory=list)  # of the images' entries in the vision cache
    image_tokens: tuple[int, ...] = ()  # of each image

    def _map(self, function) -> "Batch":
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        vision = {name: function(v) if torch.is_tensor(v) else v for name, v in self.vision.items()}
        return replace(self, **{name: function(v) for name, v in values.items() if torch.is_tensor(v)}, vision=vision)

    def to(self, device: torch.device) -> "Batch":
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        return self._map(torch.Tensor.pin_memory)


def rotary_positions(sample: Sample, grids: dict[str, tuple[int, int]], merge_size: int) -> np.ndarray:
    """(3, tokens) positions as Qwen-VL counts them: text advances all three axes together, an image spans a grid
    and advances them by its longer side (transformers' `get_rope_index`, to which a test holds this equal)."""
    pieces, start, at = [], 0, 0
    for where, path in zip(sample.image_at, sample.images):
        text = np.arange(start, start + where - at)
        down, across = (side // merge_size for side in grids[path])
        start += where - at
        image = np.stack([np.zeros((down, across), int), *np.indices((down, across))]).reshape(3, -1) + start
        pieces += [np.stack([text] * 3), image]
        start, at = start + max(down, across), where + 1
    text = np.arange(start, start + len(sample.ids) - at)
    return np.concatenate([*pieces, np.stack([text] * 3)], axis=1)


def build_batch(
    data: VQAData,
    assignment: Assignment,
    settings: ImageSettings,
    pad_to: int = 1,
    prompts_only: bool = False,
    cache: VisionCache | None = None,
) -> Batch:
    """Pack the trees of `assignment` into a `Batch`, padded to a multiple of `pad_to` tokens.

    `prompts_only` cuts every branch before its last answer, which is what generation starts from. With features of all
    its images in the `cache` the batch has those and no patches.
    """
    parts, answers, samples, images, offset = [], [], [], [], 0
    for number, tree in enumerate(assignment.trees):
        for branch, index in enumerate(tree.samples, start=1):
            sample = data.samples[index]
            ids, trained, is_image = _expand(sample)
            prefix = sample.tokens_before(tree.prefix)
            first = 0 if branch == 1 else prefix  # the first branch brings the prefix along
            end = sample.tokens_before(sample.last_answer) if prompts_only else len(ids)
            marked = np.array([end]) if prompts_only else np.flatnonzero(trained)
            positions = rotary_positions(sample, data.grids, settings.merge_size)[:, first:end]
            branch_ids = np.where(np.arange(first, end) < prefix, 0, branch)
            parts.append((ids[first:end], positions, np.full(end - first, number), branch_ids, is_image[first:end]))
            weights = np.full(len(marked), sample.weight, np.float32)
            answers.append((marked - 1 - first + offset, ids[marked], weights, np.full(len(marked), len(samples))))
            images += [path for path, at in zip(sample.images, sample.image_at) if branch == 1 or at >= tree.prefix]
            samples.append(index)
            offset += end - first
    blocks = max(-(-offset // pad_to), 2)  # torch compiles anew for a size of 1
    if pad_to > 1 and (padding := blocks * pad_to - offset):
        zeros = np.zeros(padding, int)
        parts.append((zeros, np.stack([np.arange(padding)] * 3), zeros - 1, zeros, zeros.astype(bool)))

    ids, positions, tree, branch, is_image = (torch.from_numpy(np.concatenate(part, axis=-1)) for part in zip(*parts))
    answer_at, targets, weights, question = (torch.from_numpy(np.concatenate(part)) for part in zip(*answers))
    names = [cache.name(path, data.grids[path]) for path in images] if cache else []
    image_tokens = _image_sizes(images, data.grids, settings.merge_size)["image_tokens"]
    features = cache.load(names, image_tokens) if names else None
    seen = images if features is None else []
    loaded = {path: load_patches(path, data.grids[path], settings) for path in dict.fromkeys(seen)}
    grid = torch.tensor([(1, *data.grids[path]) for path in images], dtype=torch.int64).reshape(-1, 3)
    no_patches = np.zeros((0, 3, settings.patch_size**2), np.uint8)
    return Batch(
        ids=ids.long(),
        positions=positions,
        tree=tree.int(),
        branch=branch.int(),
        image_at=is_image.nonzero().flatten(),
        answer_at=answer_at,
        targets=targets.long(),
        weights=weights,
        question=question,
        patches=torch.from_numpy(np.concatenate([no_patches, *(loaded[path] for path in seen)])),
        grid=grid,
        vision=_vision_inputs(grid, settings) if seen else {},
        samples=samples,
        assignment=assignment,
        features=features,
        cache_names=names,
        image_tokens=image_tokens,
    )


def _vision_inputs(grid: torch.Tensor, settings: ImageSettings) -> dict:
    """The vision tower's keyword arguments for these images, by transformers' own functions."""
    starts = get_vision_cu_seqlens(grid)
    inputs = {
        "position_ids": get_vision_position_ids(grid, settings.merge_size),
        "cu_seqlens": starts,
        "max_seqlen": int(starts.diff().max()),
        "image_starts": starts.tolist(),
    }
    if settings.position_side:
        indices, weights = get_vision_interpolation_indices_and_weights(
            grid, settings.position_side, align_corners=True, spatial_merge_size=settings.merge_size
        )
        inputs |= {"interp_indices": indices, "interp_weights": weights}
    if settings.window_size:
        index, starts = get_vision_window_index(grid, settings.merge_size, settings.window_size, settings.patch_size)
        inputs |= {"window_index": index, "cu_window_seqlens": starts, "max_window_seqlen": int(starts.diff().max())}
    return inputs


def _expand(sample: Sample) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token ids, trained and is-image marks, each (tokens,), with every image token as often as the image needs."""
    repeats = np.ones(len(sample.ids), int)
    repeats[list(sample.image_at)] = sample.image_tokens
    is_image = np.isin(np.arange(len(sample.ids)), sample.image_at)
    return np.repeat(sample.ids, repeats), np.repeat(sample.trained, repeats), np.repeat(is_image, repeats)


class TreeDataset(Dataset):
    """Items are micro-batches: a sampler yields `Assignment`, an item is its `Batch`."""

    def __init__(self, data: VQAData, settings: ImageSettings, pad_to: int = 1, **options):
        """`options`: the other arguments of `build_batch`."""
        self.data, self.settings, self.options = data, settings, {"pad_to": pad_to, **options}

    def __getitem__(self, assignment: Assignment) -> Batch:
        try:
            return build_batch(self.data, assignment, self.settings, **self.options)
        except OSError as error:  # checked before training, so it has changed since
            first = self.data.samples[assignment.trees[0].samples[0]].where
            raise RuntimeError(f"an image of {first} or what follows can't be read any more: {error}") from error


# ----------------------------------------------------------------------------------------------------------- loader


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
            assignment = next(islice(iter(loader.sampler), number, None))
            samples = [loader.dataset.data.samples[i] for tree in assignment.trees for i in tree.samples]
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
