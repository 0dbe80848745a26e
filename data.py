"""Data: rows to token ids with marked answers, and the batches that carry them and their images to the model.

`load_data` reads and checks everything before a GPU is touched. `trees.py` says which samples form a step;
`TreeDataset` turns one micro-batch of that plan into a `Batch`.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
from common import InputError
from torch.utils.data import Dataset
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from inputs.images import ImageSettings, check_images, load_patches
from inputs.rows import BadRow, Row, read_rows
from inputs.vision_cache import VisionCache
from trees import Work

MAX_LISTED = 50  # bad rows told on the console; the file has all
IMAGE_ENDS = ("", ".jpg", ".jpeg", ".png")  # that a row may leave out


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
    file: int = 0  # which of several files of rows it is from

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
    """All usable samples of a rows file, or of several, the patch grid of every image, and what was not usable."""

    path: str
    samples: list[Sample]
    grids: dict[str, tuple[int, int]]
    bad: list[BadRow] = field(default_factory=list)
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)  # of every image: height, width before resizing

    def only(self, samples: list[Sample]) -> "VQAData":
        """These samples and their images."""
        used = sorted({image for sample in samples for image in sample.images})
        grids, sizes = ({image: table[image] for image in used} for table in (self.grids, self.sizes))
        return replace(self, samples=samples, grids=grids, sizes=sizes)

    def fingerprint(self, folder: str) -> str:
        """Changes when a sample's tokens, images (by their names below `folder`), weight, file or place change."""
        digest = hashlib.sha256()
        for sample in self.samples:
            digest.update(sample.ids.tobytes() + sample.trained.tobytes())
            images = [(os.path.relpath(image, folder), self.grids[image]) for image in sample.images]
            digest.update(repr([sample.file, sample.weight, *images]).encode())
        return digest.hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------- loading


def load_files(paths: list[str], *how, **more) -> list[VQAData]:
    """`load_data` of each file. Rows of files with one name are told apart by as many folders as that takes."""
    data = []
    for path in paths:
        parts = Path(path).parts
        others, depths = {Path(other).parts for other in paths} - {parts}, range(1, len(parts))
        count = next((n for n in depths if all(other[-n:] != parts[-n:] for other in others)), len(parts))
        data.append(load_data(path, *how, **more, shown_as="/".join(parts[-count:])))
    return data


def join(parts: list[VQAData]) -> VQAData:
    """Several files of rows as one."""
    samples = [replace(sample, file=number) for number, part in enumerate(parts) for sample in part.samples]
    grids, sizes = ({k: v for part in parts for k, v in getattr(part, name).items()} for name in ("grids", "sizes"))
    return VQAData(", ".join(part.path for part in parts), samples, grids, sum((p.bad for p in parts), []), sizes)


def load_data(
    path: str | Path,
    images_dir: str | Path,
    tokenizer,
    settings: ImageSettings,
    max_tokens: int,
    system: str = "",
    allow_outside_images: bool = False,
    headers_only: bool = False,
    prompt: str = "{question}",
    shown_as: str = "",
    given: list[Row] | None = None,
) -> VQAData:
    """Read rows, check every image, tokenize. Rows that can't be used are in `.bad`, each with file:line and reason.

    `system` is the system prompt of rows that have none of their own, `prompt` what each user turn says, its own text
    standing for {question}. `max_tokens` bounds a single sample.
    `headers_only` reads sizes of images and decodes none. `shown_as` is the file's name in what is said of its rows.
    `given` rows stand for those of a file, none of which is read. Raises InputError when the file can't be read, or the
    system prompt or the template of questions holds special tokens.
    """
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    for name, text in (("system prompt", system), ("--prompt template", prompt)):
        if literal := [token for token in special if token in text]:
            raise InputError(f"the {name} holds the special token {literal[0]}")
    parsed, bad = read_rows(Path(path), shown_as) if given is None else (given, [])
    rows = []
    for row in parsed:
        row.images, reason = _resolve(row.images, Path(images_dir), allow_outside_images)
        if reason:
            bad.append(BadRow(row.where, reason, row.fields))
        else:
            rows.append(row)
    sizes = check_images(sorted({image for row in rows for image in row.images}), headers_only)
    grids = {image: _grid(size, settings) for image, size in sizes.items()}

    kept, segments = [], []
    for row in rows:
        try:
            for image in row.images:
                if isinstance(grids[image], str):
                    raise ValueError(f"image {image}: {grids[image]}")
            messages = _prompted(row.messages, prompt)
            _refuse_special_tokens(messages, row.fields.get("options", []), special)
            segments.append(_segments(messages, tokenizer, system))
            kept.append(row)
        except ValueError as reason:
            bad.append(BadRow(row.where, str(reason), row.fields))

    texts = list({text for segment in segments for text, _ in segment})  # many rows ask the same
    encoded = dict(zip(texts, tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []))
    image_token = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    samples = []
    for row, segment in zip(kept, segments):
        pieces = [(encoded[text], trained) for text, trained in segment]
        sample = _sample(row, pieces, image_token, grids, settings.merge_size)
        if sample.tokens > max_tokens:
            reason = f"{sample.tokens:,} tokens, over --max-tokens {max_tokens:,} (--max-pixels makes images smaller)"
            bad.append(BadRow(row.where, reason, row.fields))
        else:
            samples.append(sample)
    bad.sort(key=lambda one: [int(number) for number in one.where.rpartition(":")[2].split(" row ")])
    return VQAData(str(path), [], grids, bad, sizes).only(samples)


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


def _resolve(names: list[str], folder: Path, allow_outside: bool) -> tuple[list[str], str]:
    """Paths of a row's images and "", or [] and what is wrong. An image_id may leave its extension out."""
    paths = []
    for name in names:
        named = [folder / f"{name}{end}" for end in IMAGE_ENDS]
        path = next(filter(os.path.isfile, named), named[0])  # unlike Path.is_file it never raises, whatever a row says
        path, whole = Path(os.path.abspath(path)), Path(os.path.abspath(folder))
        if not path.is_relative_to(whole) and os.path.isfile(path):  # a row may reach the folder through a link
            real, real_whole = Path(os.path.realpath(path.parent), path.name), os.path.realpath(folder)
            path = whole / real.relative_to(real_whole) if real.is_relative_to(real_whole) else path
        if not allow_outside and not path.is_relative_to(whole):
            return [], f"image {name} lies outside {folder} (--allow-outside-images permits that)"
        if not os.path.isfile(path):
            return [], f"image {str(path)[:300]} is {'a folder' if os.path.isdir(path) else 'missing'}"
        paths.append(str(path))
    return paths, ""


def _grid(size: tuple[int, int] | str, settings: ImageSettings) -> tuple[int, int] | str:
    """The patch grid of a picture of this size, or what is wrong with the picture."""
    try:
        return size if isinstance(size, str) else settings.grid(*size)
    except ValueError as error:
        return str(error)


def _refuse_special_tokens(messages: list[dict], options: list[str], special: list[str]) -> None:
    texts = [(f"{m['role']} text", "".join(part.get("text", " ") for part in m["content"])) for m in messages]
    for name, text in [*texts, *(("option", option) for option in options)]:
        for token in special:
            if token in text:
                raise ValueError(f"the {name} holds the special token {token}")


def _prompted(messages: list[dict], template: str) -> list[dict]:
    """The messages with what the template has around {question} before the first and after the last text of each user
    turn; images in front of the text stay there."""
    before, after = template.split("{question}")
    prompted = []
    for message in messages:
        parts = [dict(part) for part in message["content"]]
        texts = [part for part in parts if part["type"] == "text"]
        if message["role"] == "user":
            texts[0]["text"] = before + texts[0]["text"]
            texts[-1]["text"] += after
        prompted.append({"role": message["role"], "content": parts})
    return prompted


def _segments(messages: list[dict], tokenizer, system: str) -> list[tuple[str, bool]]:
    """Cut the chat template's rendering into (text, trained): each answer with its end-of-turn, and what is between."""
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": [{"type": "text", "text": system}]}, *messages]
    segments, done = [], ""
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = tokenizer.apply_chat_template(messages[:number], tokenize=False, add_generation_prompt=True)
        full = tokenizer.apply_chat_template(messages[: number + 1], tokenize=False)
        end = full.rfind(tokenizer.eos_token) + len(tokenizer.eos_token)
        if not prompt.startswith(done) or not full.startswith(prompt) or end <= len(prompt):
            raise ValueError("the chat template does not render a conversation as its prompt followed by its answer")
        segments += [(prompt[len(done) :], False), (full[len(prompt) : end], True)]
        done = full[:end]
    return segments


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
    )


def stop_or_skip_bad(data: list[VQAData], skip_bad: bool, output: Path | None) -> None:
    """Write every bad row to output/bad_rows.jsonl. Raises InputError that lists them, unless they may be skipped."""
    bad = [(one.path, row) for one in data for row in one.bad]
    file = output / "bad_rows.jsonl" if output else None
    if file:
        _write_bad(file, bad)
    if not bad:
        return
    listed = "".join(f"\n  {row.where}: {row.reason}" for _, row in bad[:MAX_LISTED])
    if len(bad) > MAX_LISTED:
        listed += f"\n  and {len(bad) - MAX_LISTED:,} more" + (f", see {file}" if file else "")
    empty = [one.path for one in data if not one.samples]
    if empty:
        raise InputError(f"{', '.join(empty)}: no usable row{listed}")
    if not skip_bad:
        raise InputError(f"{len(bad):,} rows can't be used (--skip-bad goes on without them):{listed}")


def _write_bad(file: Path, bad: list[tuple[str, BadRow]]) -> None:
    if not bad:
        file.unlink(missing_ok=True)  # of a start before the rows were mended
        return
    with open(file, "w", encoding="utf-8", errors="backslashreplace") as out:
        out.writelines(json.dumps({"file": path, **vars(row)}, ensure_ascii=False) + "\n" for path, row in bad)


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
    work: Work
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
    work: Work,
    settings: ImageSettings,
    pad_to: int = 1,
    prompts_only: bool = False,
    cache: VisionCache | None = None,
) -> Batch:
    """Pack the trees of `work` into a `Batch`, padded to a multiple of `pad_to` tokens.

    `prompts_only` cuts every branch before its last answer, which is what generation starts from. With features of all
    its images in the `cache` the batch has those and no patches.
    """
    parts, answers, samples, images, offset = [], [], [], [], 0
    for number, tree in enumerate(work.trees):
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
        work=work,
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
    """Items are micro-batches: a sampler yields `Work`, an item is its `Batch`."""

    def __init__(self, data: VQAData, settings: ImageSettings, pad_to: int = 1, **how):
        """`how`: the other arguments of `build_batch`."""
        self.data, self.settings, self.how = data, settings, {"pad_to": pad_to, **how}

    def __getitem__(self, work: Work) -> Batch:
        try:
            return build_batch(self.data, work, self.settings, **self.how)
        except OSError as error:  # checked before training, so it has changed since
            first = self.data.samples[work.trees[0].samples[0]].where
            raise RuntimeError(f"an image of {first} or what follows can't be read any more: {error}") from error
