"""--vision-cache: cached features are those that the tower computed, and no fault of the cache stops a run."""

import os
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny
import torch
from runs import arguments, lines
from steps import whole
from transformers import AutoConfig

import train
from common import InputError
from data import TreeDataset
from inputs import vision_cache
from model import TreeModel
from trees import Assignment


def cached(world, folder, model: TreeModel) -> tuple[TreeModel, TreeDataset]:
    data, dataset = tiny.load_world(world)
    config, visual = AutoConfig.from_pretrained(world / "model"), model.base.model.visual
    cache = vision_cache.open_cache(str(folder), visual, config, dataset.settings)
    keep = vision_cache.FeatureWriter(cache).put
    return TreeModel(model.model, dataset.settings, keep), TreeDataset(data, dataset.settings, cache=cache)


def run(model: TreeModel, batch):
    """Run a batch and wait until its features are on disk."""
    losses = model(batch)[0]
    model.keep_features.__self__.thread.submit(lambda: None).result()
    return losses


@pytest.fixture
def filled(world, tmp_path):
    return fill(world, tmp_path)


def fill(world, folder):
    """A model, a data set whose pictures are all cached, one micro-batch, and its losses without a cache."""
    model, dataset = cached(world, folder, tiny.lora_model(world))
    assignment = Assignment(tuple(whole(dataset.data.samples)))
    losses = run(model, dataset[assignment])
    assert dataset[assignment].features is not None
    return model, dataset, assignment, losses


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_cached_features_are_those_that_the_tower_computed(tmp_path, family, monkeypatch):
    model, dataset, assignment, expected = fill(tiny.write_world(tmp_path, family=family), tmp_path / "cache")
    made = TreeDataset(dataset.data, dataset.settings)[assignment]
    batch = dataset[assignment]
    assert not len(batch.patches) and len(made.patches)
    monkeypatch.setattr(model, "encode_images", None)  # not called
    assert torch.equal(run(model, batch), expected)


def test_pictures_are_known_by_content_and_grid(filled, tmp_path):
    _, dataset, _, _ = filled
    path, grid = next(iter(dataset.data.grids.items()))
    copy = shutil.copy(path, tmp_path / "other.png")
    cache = dataset.options["cache"]
    assert cache.name(copy, grid) == cache.name(path, grid) != cache.name(path, (2, 2))
    other = next(p for p in dataset.data.grids if p != path)
    assert cache.name(other, grid) != cache.name(path, grid)


def test_entries_can_be_read_by_whom_the_umask_permits(filled):
    mask = os.umask(0)
    os.umask(mask)
    assert all(path.stat().st_mode & 0o777 == 0o666 & ~mask for path in filled[1].options["cache"].folder.iterdir())


def test_another_tower_or_other_settings_have_a_cache_of_their_own(world, tmp_path, filled, monkeypatch):
    _, dataset, _, _ = filled
    config, model = AutoConfig.from_pretrained(world / "model"), tiny.lora_model(world)
    visual = model.base.model.visual

    def folder(settings=dataset.settings):
        return vision_cache.open_cache(str(tmp_path), visual, config, settings).folder

    assert folder() == dataset.options["cache"].folder != folder(replace(dataset.settings, mean=(0.4, 0.5, 0.5)))
    with monkeypatch.context() as later:
        later.setattr(vision_cache, "PIXEL_RULES", 99)  # files are made other pixels of
        assert folder() != dataset.options["cache"].folder
    with torch.no_grad():
        next(visual.parameters()).view(-1)[0] += 1e-3
    assert folder() != dataset.options["cache"].folder


@pytest.mark.parametrize("damage", ["gone", "cut", "one bit", "empty", "header", "no features", "link"])
def test_a_damaged_entry_is_computed_again(filled, damage):
    model, dataset, assignment, expected = filled
    entry = sorted(dataset.options["cache"].folder.iterdir())[0]
    sound = entry.read_bytes()
    flipped = bytes([sound[len(sound) // 2] ^ 1])
    damaged = {
        "cut": sound[:-1],
        "one bit": sound[: len(sound) // 2] + flipped + sound[len(sound) // 2 + 1 :],
        "empty": b"",
        "no features": vision_cache._checksum(entry.name, b""),
        "link": sound[:-1],
        "header": b"\0" * vision_cache.HEADER + sound[vision_cache.HEADER :],
    }
    outside = entry.with_name("outside") if damage == "link" else entry
    entry.unlink() if damage in ("gone", "link") else None
    outside.write_bytes(damaged[damage]) if damage != "gone" else None
    entry.symlink_to(outside) if damage == "link" else None
    batch = dataset[assignment]
    assert batch.features is None and len(batch.patches)
    torch.testing.assert_close(run(model, batch), expected, rtol=0, atol=0)
    assert entry.read_bytes() == sound and not entry.is_symlink()
    assert damage != "link" or outside.read_bytes() == sound[:-1]


def test_a_full_disk_ends_caching_and_nothing_else(world, tmp_path, monkeypatch, capfd):
    model, dataset = cached(world, tmp_path, tiny.lora_model(world))
    monkeypatch.setattr(vision_cache.shutil, "disk_usage", lambda _: SimpleNamespace(free=vision_cache.SPARE))
    assignment = Assignment(tuple(whole(dataset.data.samples)))
    first, second = run(model, dataset[assignment]), run(model, dataset[assignment])
    assert torch.equal(first, second) and not list(dataset.options["cache"].folder.iterdir())
    assert capfd.readouterr().err.count("warning: no more vision features are kept") == 1


def test_a_run_learns_the_same_with_a_cache_and_the_next_one_needs_no_tower(world, tmp_path, monkeypatch, capfd):
    settings, runs, encode = {"batch-size": 16, "max-steps": 0, "epochs": 2}, ("plain", "filling", "filled"), []
    encode_images = TreeModel.encode_images

    def counted(model, batch):
        encode.extend([0] * bool(len(batch.grid)))
        return encode_images(model, batch)

    monkeypatch.setattr(TreeModel, "encode_images", counted)
    for name in runs:
        encode.clear()
        cache = {"vision-cache": tmp_path / "cache"} if name != "plain" else {}
        train.main(arguments(world, tmp_path / name, **settings, **cache))
    plain, *others = ([line["loss"] for line in lines(tmp_path / name, "train")] for name in runs)
    assert all(other == pytest.approx(plain, rel=1e-5) for other in others)
    (folder,) = (tmp_path / "cache").iterdir()  # which every process finds
    _, dataset = cached(world, tmp_path / "cache", tiny.lora_model(world))
    assert folder == dataset.options["cache"].folder
    assert len(list(folder.iterdir())) == len(tiny.SIZES)
    assert len(encode) == 1  # the rehearsal
    assert f"for {len(tiny.SIZES)} pictures, 0.0 there" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"lora-targets": "q_proj,vision"}, "whose features change"), ({"vision-cache": "/proc/x"}, "can't be filled")],
)
def test_a_cache_that_can_not_serve_is_refused(world, tmp_path, settings, message):
    with pytest.raises(InputError, match=message):
        train.main(arguments(world, tmp_path / "out", **({"vision-cache": tmp_path / "cache"} | settings)))
    assert not (tmp_path / "cache").exists()
