"""The model sees images as displayed; unusable ones are named with row and reason; the checks are remembered."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from examples import flat
from pictures import BAD_IMAGES, VALID_IMAGES, noise
from PIL import ImageFile
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from common import InputError, quote
from inputs import images as images_file
from inputs.images import check_images, image_settings, load_patches
from inputs.picture_checks import check_file


def test_every_unusable_image_is_named_with_its_row_and_reason(load, tmp_path):
    for name, (make, _) in BAD_IMAGES.items():
        make(tmp_path / name)
    noise(64, 64).save(tmp_path / "good.png")
    rows = [row for name in BAD_IMAGES for row in (flat(image="good.png"), flat(image=["good.png", name]))]
    data = load(rows, tmp_path)
    assert len(data.samples) == len(BAD_IMAGES)
    for number, (bad, (name, (_, reason))) in enumerate(zip(data.bad, BAD_IMAGES.items(), strict=True)):
        assert bad.where == f"rows.jsonl:{2 * number + 2}"
        assert name in bad.reason and reason in bad.reason


def test_a_huge_picture_is_refused_by_its_header_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("decoded"))
    for name in ("huge.png", "bomb.png"):
        BAD_IMAGES[name][0](tmp_path / name)
        assert "over 100 megapixels" in check_file(str(tmp_path / name), True)


def unpatch(patches: np.ndarray, grid: tuple[int, int], side: int = 8, merge: int = 2) -> np.ndarray:
    """The picture (H, W, 3) of patches in the vision tower's order, which goes by blocks of merge x merge patches."""
    down, across = grid
    picture = np.zeros((down * side, across * side, 3), np.uint8)
    order = ((i + y, j + x) for i in range(0, down, merge) for j in range(0, across, merge)
             for y in range(merge) for x in range(merge))  # fmt: skip
    for patch, (i, j) in zip(patches, order, strict=True):
        picture[i * side : (i + 1) * side, j * side : (j + 1) * side] = patch.reshape(3, side, side).transpose(1, 2, 0)
    return picture


@pytest.mark.parametrize("name", VALID_IMAGES)
def test_every_kind_of_picture_is_seen_as_displayed(load, settings, tmp_path, name):
    (picture, options), first, last, grid = VALID_IMAGES[name]
    picture.save(tmp_path / name, **options)
    data = load([flat(image=name)], tmp_path)
    assert not data.bad and data.grids == {str(tmp_path / name): grid}
    assert data.samples[0].patches == (grid[0] * grid[1],) and data.samples[0].image_tokens == (grid[0] * grid[1] // 4,)
    seen = unpatch(load_patches(str(tmp_path / name), grid, settings), grid).astype(int)
    tolerance = 12 if name.endswith(".jpg") else 1
    assert abs(seen[0, 0] - first).max() <= tolerance and abs(seen[-1, -1] - last).max() <= tolerance


def test_a_picture_keeps_its_pixels_where_no_resizing_is_needed(tmp_path, settings):
    noise(48, 80).save(tmp_path / "noise.png")
    seen = unpatch(load_patches(str(tmp_path / "noise.png"), (6, 10), settings), (6, 10))
    np.testing.assert_array_equal(seen, np.asarray(noise(48, 80)))


def test_pixel_limits_that_cross_are_an_error(world):
    assert image_settings(world / "model", max_pixels=4096).max_pixels == 4096
    with pytest.raises(InputError, match="100,000.*65,536"):
        image_settings(world / "model", min_pixels=100_000)
    with pytest.raises(InputError, match="256.*128"):
        image_settings(world / "model", max_pixels=128)


@pytest.mark.parametrize("nested", [False, True])  # as in processor_config.json
@pytest.mark.parametrize(
    ("name", "actual", "needed"),
    [("patch_size", 14, 8), ("merge_size", 4, 2), ("temporal_patch_size", 1, 2), ("patch_size", None, 8)],
)
def test_patches_that_are_not_the_vision_tower_s_are_refused(world, tmp_path, name, actual, needed, nested):
    """Of another model's file, or of one without the number, for which transformers then takes 14."""
    facts = json.loads((world / "model" / "preprocessor_config.json").read_text())
    facts = {key: value for key, value in (facts | {name: actual}).items() if value is not None}
    file = "processor_config.json" if nested else "preprocessor_config.json"
    (tmp_path / file).write_text(json.dumps({"image_processor": facts} if nested else facts))
    (tmp_path / "config.json").write_bytes((world / "model" / "config.json").read_bytes())
    with pytest.raises(InputError, match=f"have a {name} of {actual or 14}, and config.json {needed}:\n  copy"):
        image_settings(str(tmp_path))


@pytest.mark.parametrize("size", [{"min_pixels": 256, "max_pixels": 4096}, {"height": 448, "width": 448}])
def test_sizes_by_which_transformers_resizes_no_image_are_refused(world, tmp_path, size):
    for name in ("config.json", "preprocessor_config.json"):
        facts = json.loads((world / "model" / name).read_text())
        (tmp_path / name).write_text(json.dumps(facts | {"size": size} if "size" in facts else facts))
    with pytest.raises(InputError, match=f"give size as {', '.join(size)}, which .*\n  .*shortest_edge"):
        image_settings(str(tmp_path), 256, 4096)
    with pytest.raises(ValueError, match="shortest_edge"):
        Qwen2VLImageProcessorPil.from_pretrained(tmp_path)(noise(64, 64))


def test_a_size_of_two_kinds_is_refused(world, tmp_path):
    facts = json.loads((world / "model" / "preprocessor_config.json").read_text())
    facts |= {"size": {"height": 448, "width": 448}, "min_pixels": 256, "max_pixels": 4096}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(facts))
    with pytest.raises(InputError, match="image settings of .* can't be used: size must have"):
        image_settings(str(tmp_path))


# ----------------------------------------------------------------------------------------- the memory of checked images


@pytest.fixture
def opened(monkeypatch, tmp_path):
    """The list of paths checked from here on; the record of checked images is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    paths, check = [], images_file.check_files
    monkeypatch.setattr(images_file, "check_files", lambda new, decode: paths.extend(new) or check(new, decode))
    return paths


@pytest.fixture
def pictures(tmp_path) -> list[str]:
    for number, name in enumerate("abc"):
        noise(40, 50 + number).save(tmp_path / f"{name}.png")
    return [str(tmp_path / f"{name}.png") for name in "abc"]


def test_images_are_opened_once_and_remembered(opened, pictures):
    expected = {path: (40, 50 + number) for number, path in enumerate(pictures)}
    for _ in range(2):
        assert {path: tuple(size) for path, size in check_images(pictures).items()} == expected
        assert sorted(opened) == pictures


def test_a_changed_image_is_checked_again(opened, pictures):
    check_images(pictures)
    opened.clear()
    stamp = os.stat(pictures[0])
    noise(70, 60).save(pictures[0])
    os.utime(pictures[0], ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # another size
    os.utime(pictures[1], ns=(0, 0))  # another time
    assert tuple(check_images(pictures)[pictures[0]]) == (70, 60)
    assert sorted(opened) == pictures[:2]


def test_a_failure_is_not_remembered(opened, pictures):
    whole = Path(pictures[0]).read_bytes()
    stamp = os.stat(pictures[0])
    Path(pictures[0]).write_bytes(bytes(len(whole)))
    os.utime(pictures[0], ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert "zeros" in check_images(pictures)[pictures[0]]
    Path(pictures[0]).write_bytes(whole)
    os.utime(pictures[0], ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert check_images(pictures)[pictures[0]] == (40, 50)


def test_an_image_that_vanishes_before_its_check_is_named(opened, pictures):
    os.unlink(pictures[0])
    assert "No such file" in check_images(pictures)[pictures[0]]


def entry(path: str, **changes) -> str:
    stamp = [os.stat(path).st_size, os.stat(path).st_mtime_ns]
    return json.dumps({path: {"stamp": stamp, "size": [40, 50], "bits": 0, "several": False} | changes})


DAMAGE = {
    "empty": lambda path: "",
    "cut": lambda path: "{",
    "a list": lambda path: "[1]",
    "a number": lambda path: "1",
    "deep": lambda path: "[" * 100_000,
    "not UTF-8": lambda path: b"{\xff}",
    "zeros": lambda path: bytes(999),
    "no entry": lambda path: json.dumps({path: None}),
    "a list as entry": lambda path: json.dumps({path: [40, 50]}),
    "of an earlier version": lambda path: entry(path).replace(', "bits": 0, "several": false', ""),
    "text as size": lambda path: entry(path, size="40"),
    "three sides": lambda path: entry(path, size=[40, 50, 3]),
    "negative": lambda path: entry(path, size=[-40, 50]),
    "no pixels": lambda path: entry(path, size=[0, 50]),
    "too large": lambda path: entry(path, size=[10**6, 10**6]),
    "text as bits": lambda path: entry(path, bits="12"),
    "no bits": lambda path: entry(path, bits=None),
    "text as several": lambda path: entry(path, several="no"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_record_of_checked_images_is_ignored_and_written_anew(opened, pictures, tmp_path, kind):
    memory = tmp_path / "cache" / "onelook" / "image_sizes.json"
    memory.parent.mkdir(parents=True)
    content = DAMAGE[kind](pictures[0])
    memory.write_bytes(content if isinstance(content, bytes) else content.encode())
    for checks in (1, 0):
        opened.clear()
        assert check_images(pictures[:1])[pictures[0]] == (40, 50) and len(opened) == checks


def test_a_whole_record_of_checked_images_is_used(opened, pictures, tmp_path):
    memory = tmp_path / "cache" / "onelook" / "image_sizes.json"
    memory.parent.mkdir(parents=True)
    memory.write_text(entry(pictures[0], size=[41, 51], bits=12, several=True))
    size = check_images(pictures[:1])[pictures[0]]
    assert size == (41, 51) and size.bits == 12 and size.several and not opened


def test_a_folder_in_place_of_the_record_of_checked_images_stops_nothing(opened, pictures, tmp_path):
    (tmp_path / "cache" / "onelook" / "image_sizes.json" / "a").mkdir(parents=True)
    assert check_images(pictures)[pictures[0]] == (40, 50)
    assert os.listdir(tmp_path / "cache" / "onelook") == ["image_sizes.json"]


def test_a_record_of_checked_images_that_can_t_be_written_stops_nothing(pictures, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert tuple(check_images(pictures)[pictures[0]]) == (40, 50)


# ---------------------------------------------------------------------------------------------------------------- paths


def test_paths_outside_the_images_folder_are_refused_unless_allowed(load, tmp_path):
    (tmp_path / "inside").mkdir()
    for folder in (tmp_path, tmp_path / "inside"):
        noise(64, 64).save(folder / "a.png")
    inside = ["a.png", "./a.png", "../inside/a.png", str(tmp_path / "inside" / "a.png")]
    outside = ["../a.png", str(tmp_path / "a.png"), "../inside/../a", "/etc/passwd", "../gone.png"]
    rows = [flat(image=name) for name in inside + outside]
    data = load(rows, tmp_path / "inside")
    assert [sample.images for sample in data.samples] == [(str(tmp_path / "inside" / "a.png"),)] * len(inside)
    assert len(data.bad) == len(outside)
    for bad, name in zip(data.bad, outside):
        assert f"image {quote(name)} lies outside" in bad.reason and "--allow-outside-images" in bad.reason
    data = load(rows, tmp_path / "inside", allow_outside_images=True)
    assert [sample.images for sample in data.samples[len(inside) :]] == [(str(tmp_path / "a.png"),)] * 3


def test_a_row_may_reach_the_folder_of_images_through_a_link(load, world, tmp_path):
    (tmp_path / "link").symlink_to(world)
    rows = [flat(image="a.png"), flat(image=str(world / "images" / "a.png")), flat(image=str(world / "rows.jsonl"))]
    data = load(rows, images=tmp_path / "link" / "images")
    assert len(data.samples) == 2 and len(data.grids) == 1
    assert [row.where for row in data.bad] == ["rows.jsonl:3"] and "lies outside" in data.bad[0].reason


def test_links_that_lead_out_of_the_folder_of_images_are_refused_unless_allowed(load, tmp_path):
    for folder in ("in/sub", "out"):
        (tmp_path / folder).mkdir(parents=True)
        noise(64, 64).save(tmp_path / folder / "a.png")
    links = {
        "near.png": "sub/a.png",
        "subs": "sub",
        "back": "../in",
        "far.png": "../out/a.png",
        "away": "../out",
        "twice.png": "away/a.png",
        "circle.png": "circle.png",
        "lost.png": "gone.png",
    }
    for name, target in links.items():
        (tmp_path / "in" / name).symlink_to(target)
    (tmp_path / "link").symlink_to("in")
    inside = ["near.png", "subs/a.png", "back/sub/a.png", "sub/a"]
    outside = ["far.png", "away/a.png", "away/a", "twice.png", "sub/../away/a.png"]
    no_files = {"circle.png": "leads in a circle", "lost.png": "is a link to 'gone.png', which is missing"}
    rows = [flat(image=name) for name in (*inside, *outside, *no_files)]
    for folder in ("in", "link"):
        data = load(rows, tmp_path / folder)
        assert len(data.samples) == len(inside) and len(data.bad) == len(outside) + len(no_files)
        for bad, name in zip(data.bad, outside):
            reason = f"lies outside {tmp_path / folder}, where a link leads (--allow-outside-images permits that)"
            assert bad.reason == f"image {name!r} {reason}"
        for bad, reason in zip(data.bad[len(outside) :], no_files.values(), strict=True):
            assert reason in bad.reason
        data = load(rows, tmp_path / folder, allow_outside_images=True)
        assert len(data.samples) == len(inside) + len(outside) and len(data.bad) == len(no_files)


def test_a_name_that_differs_in_case_accents_or_slashes_is_answered_with_the_file_s(load, tmp_path):
    (tmp_path / "Fälle").mkdir()
    for name in ("a.JPG", "Fälle/Übersicht.png", "Fälle/b.png"):
        noise(64, 64).save(tmp_path / name)
    meant = {
        "a.jpg": "a.JPG",
        "a": "a.JPG",
        "A.Jpg": "a.JPG",
        "fälle/b.png": "Fälle/b.png",
        "Fälle\\b.png": "Fälle/b.png",
        "Fa\u0308lle/u\u0308bersicht": "Fälle/Übersicht.png",
        "FÄLLE\\B.PNG": "Fälle/b.png",
        "./b.png": "",
        "b.jpg": "",
    }
    data = load([flat(image=name) for name in meant], tmp_path)
    assert len(data.bad) == len(meant)
    for bad, (name, there) in zip(data.bad, meant.items()):
        assert "is missing" in bad.reason
        missing = f"is missing in {tmp_path}"
        shown = ascii(there) if "\u0308" in name else repr(there)
        assert bad.reason.endswith(f"{missing}, but {shown} is there: correct the name" if there else missing)


def test_a_name_that_is_not_utf_8_is_refused_in_a_line(load, tmp_path):
    noise(64, 64).save(os.fsencode(tmp_path) + b"/a\xff.png")
    for images, name, reason in (
        (tmp_path, "a\udcff.png", "utf-8"),  # the whole row is refused
        (tmp_path, "a\ud800.png", "utf-8"),
        (tmp_path / "b\udcff", "a.png", "names of files must be UTF-8, rename it"),
    ):
        (bad,) = load([flat(image=name)], images).bad
        assert reason in bad.reason and bad.reason.isprintable() and bad.reason.encode()


def test_what_is_no_file_is_named_and_never_waited_for(load, tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "null.png").symlink_to("/dev/null")
    (tmp_path / "folder").mkdir()
    rows = [flat(image=name) for name in ("pipe.png", "null.png", "folder", "pipe")]
    reasons = [bad.reason for bad in load(rows, tmp_path, allow_outside_images=True).bad]
    kinds = ("is a pipe or a device",) * 2 + ("is a folder", "is missing")
    assert all(f"{kind} in {tmp_path}" in reason for reason, kind in zip(reasons, kinds, strict=True))


def test_a_picture_of_another_size_than_when_it_was_checked_is_named(tmp_path, settings):
    noise(48, 80).save(tmp_path / "a.png")
    with pytest.raises(OSError, match="a.png: its size has changed"):
        load_patches(str(tmp_path / "a.png"), (10, 6), settings)


@pytest.mark.parametrize("stored", ["case 1.jpg", "case 1.jpeg", "case 1.png", "case.v1.jpg", "case.v1.png"])
def test_an_image_id_is_found_without_its_extension(load, tmp_path, stored):
    (tmp_path / "images").mkdir()
    noise(64, 64).save(tmp_path / "images" / stored)
    data = load([flat(image_id=Path(stored).stem), flat(image_id=f"{stored}.gone")], tmp_path / "images")
    assert data.samples[0].images == (str(tmp_path / "images" / stored),)
    assert [bad.where for bad in data.bad] == ["rows.jsonl:2"]


@pytest.mark.parametrize("name", ["A" * 5000, "a\0.png", "example.org/a.png"])
def test_a_name_that_is_no_path_is_a_missing_image(load, name):
    (bad,) = load([flat(image=name)]).bad
    assert "is missing" in bad.reason and len(bad.reason) < 500
