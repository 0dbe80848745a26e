"""Promise 4, data: what the model sees is what the rows and pictures say, and nothing unusable passes or is lost."""

import json
import os
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
from examples import BAD, FORMATS, flat, parts
from PIL import Image, ImageFile
from transformers import AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import data as data_file
from common import InputError
from data import TreeDataset, VQAData, load_data
from inputs import images as images_file
from inputs.images import check_images, image_settings, load_patches
from inputs.rows import MAX_LISTED, stop_or_skip_bad
from training.preparation import describe_sample
from training.settings import parse_settings
from trees import Assignment, PlanSettings, make_plan, rank_efficiency

SHARED = Path(__file__).parents[2] / "shared"
KVASIR, QWEN = SHARED / "kvasir" / "kvasir_vqa_val.jsonl", SHARED / "qwen3-vl-8b"


@pytest.fixture(scope="module")
def tokenizer(world):
    return AutoTokenizer.from_pretrained(world / "model")


@pytest.fixture(scope="module")
def settings(world):
    return image_settings(world / "model")


@pytest.fixture
def load(world, tmp_path, tokenizer, settings):
    """Load rows, given as objects or lines, whose images are those of `world` unless told otherwise."""

    def load(rows, images=world / "images", max_tokens=100_000, **options):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / "rows.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return load_data([tmp_path / "rows.jsonl"], images, tokenizer, settings, max_tokens, **options)

    return load


def trained_text(sample, tokenizer) -> str:
    return tokenizer.decode(sample.ids[sample.trained].tolist())


# ------------------------------------------------------------------------------------------------------ rows to tokens


def test_a_question_has_the_same_tokens_in_every_format(load):
    same = [
        name for name, (_, images, turns) in FORMATS.items() if images == ["a.png"] and turns[1] == "assistant: two"
    ]
    assert len(same) >= 8 and {name.split(",")[0] for name in same} >= {"flat", "LLaVA", "messages", "parts"}
    data = load([FORMATS[name][0] for name in same])
    assert not data.bad
    first = data.samples[0]
    for sample in data.samples:
        assert sample.ids.tolist() == first.ids.tolist() and sample.trained.tolist() == first.trained.tolist()
        assert sample.images == first.images and sample.image_at == first.image_at


def test_ids_are_the_chat_template_s_text_with_each_image_at_its_real_length(world, tokenizer):
    """The whole text at once, with the pad token as often as the image processor's own grid says."""
    data, _ = tiny.load_world(world)
    processor = Qwen2VLImageProcessorPil.from_pretrained(world / "model")
    rows = [json.loads(line) for line in (world / "rows.jsonl").read_text().splitlines()]
    for row, sample in zip(rows, data.samples, strict=True):
        names = row.get("images") or row.get("image") or []
        names = [names] if isinstance(names, str) else names
        messages = row.get("messages") or [
            tiny.turn("user", row["question"], len(names)),
            tiny.turn("assistant", row["answer"]),
        ]
        text = tokenizer.apply_chat_template(messages, tokenize=False).removesuffix("\n")
        head, *tails = text.split("<|image_pad|>")
        for name, tail in zip(names, tails, strict=True):
            grid = processor([Image.open(world / "images" / name)], return_tensors="pt")["image_grid_thw"]
            head += "<|image_pad|>" * (int(grid.prod()) // 4) + tail
        expanded, trained, is_image = data_file._expand(sample)
        assert expanded.tolist() == tokenizer(head)["input_ids"]
        assert sample.tokens == len(expanded) == len(trained) == len(is_image)
        assert tokenizer.decode(expanded[is_image].tolist()) == "<|image_pad|>" * sum(sample.image_tokens)


def test_trained_tokens_are_exactly_the_answers_and_their_end_of_turn(load, tokenizer):
    answers = ["yes", "息肉 🩺, 5-10 mm", " leading and trailing ", "two\n\nlines", "long " * 3000, "0"]
    rows = [flat(answer, image="a.png") for answer in answers]
    rows.append(FORMATS["messages, system and turns"][0])
    data = load(rows)
    assert not data.bad
    texts = [trained_text(sample, tokenizer) for sample in data.samples]
    assert texts == [f"{answer}<|im_end|>" for answer in answers] + ["red<|im_end|>white<|im_end|>"]
    assert [sample.fields["answer"] for sample in data.samples] == [*answers, "white"]


def test_a_described_sample_shows_trained_tokens_and_images(load, tokenizer):
    data = load([FORMATS["messages, system and turns"][0]])
    assert describe_sample(data.samples[0], tokenizer) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><36 image tokens><|vision_end|>What colour?<|im_end|>\n"
        "<|im_start|>assistant\n⟦red<|im_end|>⟧\n"
        "<|im_start|>user\n<|vision_start|><40 image tokens><|vision_end|>And here?<|im_end|>\n"
        "<|im_start|>assistant\n⟦white<|im_end|>⟧"
    )


def test_the_system_prompt_is_for_rows_that_have_none(load, tokenizer):
    rows = [flat(image="a.png"), FORMATS["messages, system and turns"][0], FORMATS["LLaVA, text only"][0]]
    plain, prompted = (load(rows, system=system).samples for system in ("", "Answer in one word."))
    head = "<|im_start|>system\nAnswer in one word.<|im_end|>\n"
    for before, after, expected in zip(plain, prompted, [head, "", head]):
        assert tokenizer.decode(after.ids.tolist()) == expected + tokenizer.decode(before.ids.tolist())
        assert trained_text(after, tokenizer) == trained_text(before, tokenizer)


def test_the_template_is_put_around_every_question_and_behind_leading_images(load, tokenizer):
    names = ["flat, image", "flat, placeholder", "LLaVA, system and turns", "messages, text only"]
    plain, prompted = (
        load([FORMATS[n][0] for n in names], prompt=p).samples for p in ("{question}", "Q: {question} {A}!")
    )
    for before, after, name in zip(plain, prompted, names, strict=True):
        expected, text = (tokenizer.decode(sample.ids.tolist()) for sample in (before, after))
        questions = [turn.removeprefix("user: ").strip("▣") for turn in FORMATS[name][2] if turn.startswith("user")]
        for question in questions:  # "and" has an image behind it
            tail = "<|vision_start|><|image_pad|><|vision_end|>" if question == "and" else ""
            expected = expected.replace(f"{question}{tail}<", f"Q: {question} {{A}}!{tail}<")
        assert text == expected and text.count("Q: ") == len(questions)
        assert trained_text(after, tokenizer) == trained_text(before, tokenizer) and after.fields == before.fields
    (two,) = load(
        [flat(question="first <image> then <image>", image=["a.png", "b.png"])], prompt="Q: {question}!"
    ).samples
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    assert f"user\nQ: first{image}then!{image}<|im_end|>" in tokenizer.decode(two.ids.tolist())


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|im_end|>", "<|vision_start|>", "<|video_pad|>", "<|endoftext|>"])
def test_literal_special_tokens_are_refused(load, token):
    rows = [flat(question=f"What is {token}?"), flat(f"It is {token}.")]
    rows += [json.loads(json.dumps(FORMATS[n][0]).replace("And here", f"A{token}")) for n in FORMATS if "system" in n]
    rows += [json.loads(json.dumps(FORMATS[n][0]).replace("Be brief", f"B{token}")) for n in FORMATS if "system" in n]
    rows.append(parts([f"What is {token[:4]}", f"{token[4:]}?"], ["two"]))
    data = load([*rows, flat()])
    assert [one.where for one in data.bad] == [f"rows.jsonl:{n + 1}" for n in range(len(rows))]
    assert all(f"special token {token}" in one.reason for one in data.bad) and len(data.samples) == 1
    with pytest.raises(InputError, match="system prompt"):
        load([flat()], system=f"Say {token}.")
    with pytest.raises(InputError, match="--prompt template"):
        load([flat()], prompt=f"{{question}}{token}")
    (bad,) = load([flat(question=f"{token[4:]} is what?")], prompt=f"{token[:4]}{{question}}").bad
    assert f"special token {token}" in bad.reason


def test_a_row_may_reach_the_folder_of_images_through_a_link(load, world, tmp_path):
    (tmp_path / "link").symlink_to(world)
    rows = [flat(image="a.png"), flat(image=str(world / "images" / "a.png")), flat(image=str(world / "rows.jsonl"))]
    data = load(rows, images=tmp_path / "link" / "images")
    assert len(data.samples) == 2 and len(data.grids) == 1
    assert [one.where for one in data.bad] == ["rows.jsonl:3"] and "lies outside" in data.bad[0].reason


def test_the_fingerprint_changes_with_the_picture_s_folder_and_not_with_that_of_all(load, world, tmp_path):
    for name in ("one/a.png", "one/b/a.png", "two/a.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((world / "images" / "a.png").read_bytes())

    def fingerprint(folder, image):
        return load([flat(image=image)], images=tmp_path / folder).fingerprint(str(tmp_path / folder))

    assert fingerprint("one", "a.png") == fingerprint("two", "a.png") != fingerprint("one", "b/a.png")


def test_a_picture_that_is_damaged_after_the_check_is_named(load, world, settings, tmp_path):
    random = np.random.default_rng(0).integers(0, 255, (300, 300, 3), np.uint8)
    Image.fromarray(random).save(tmp_path / "a.png")
    data = load([flat(image="a.png")], images=tmp_path)
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))
    (step,) = make_plan(data.samples, PlanSettings(1, 0, 10_000, 0), 0)
    with pytest.raises(
        RuntimeError, match=r"an image of rows.jsonl:1 .*a\.png: broken PNG file"
    ):  # Pillow's SyntaxError
        TreeDataset(data, settings)[Assignment(step[0])]


def test_files_of_one_name_are_told_apart_by_as_many_folders_as_that_takes(tokenizer, settings, tmp_path):
    names = ["t.jsonl", "a/x/t.jsonl", "b/x/t.jsonl", "b/other.jsonl", "b/./x/t.jsonl"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps(flat()) + "\n")
    data = load_data([str(tmp_path / name) for name in names], tmp_path, tokenizer, settings, 1000)
    shown = [sample.where for sample in data.samples]
    assert shown[1:] == ["a/x/t.jsonl:1", "b/x/t.jsonl:1", "other.jsonl:1", "b/x/t.jsonl:1"]
    assert shown[0] == f"{tmp_path.name}/t.jsonl:1"


def test_an_over_long_sample_is_named_with_its_length_and_the_remedy(load):
    rows = [flat(image="a.png"), flat("long " * 500, image="a.png"), flat(image="d.png")]
    lengths = [sample.tokens for sample in load(rows).samples]
    data = load(rows, max_tokens=lengths[2])
    assert [sample.tokens for sample in data.samples] == [lengths[0], lengths[2]]  # not cut, and the limit is allowed
    (bad,) = data.bad
    assert bad.where == "rows.jsonl:2" and f"{lengths[1]:,} tokens" in bad.reason
    assert f"--max-tokens {lengths[2]:,}" in bad.reason and "--max-pixels" in bad.reason


def test_pixel_limits_that_cross_are_an_error(world):
    assert image_settings(world / "model", max_pixels=4096).max_pixels == 4096
    with pytest.raises(InputError, match="100,000.*65,536"):
        image_settings(world / "model", min_pixels=100_000)
    with pytest.raises(InputError, match="256.*128"):
        image_settings(world / "model", max_pixels=128)


# ------------------------------------------------------------------------------------------------------------ bad rows


def stop(data: VQAData, skip_bad: bool, output: Path) -> None:
    stop_or_skip_bad(data.bad, data.files, {sample.file for sample in data.samples}, skip_bad, output)


def bad_lines() -> list[str]:
    return [line for line, _ in BAD.values() if isinstance(line, str)]


def test_bad_rows_and_images_are_told_together_in_the_order_of_the_file(load, tmp_path):
    good = flat(image="a.png")
    lines = [
        good,
        flat(image="gone.png"),
        *bad_lines(),
        flat("<|im_end|>", image="a.png"),
        flat(image="gone.png"),
        good,
    ]
    data = load([line if isinstance(line, str) else json.dumps(line) for line in lines])
    assert [one.where for one in data.bad] == [f"rows.jsonl:{n}" for n in range(2, len(lines))]
    assert [sample.where for sample in data.samples] == ["rows.jsonl:1", f"rows.jsonl:{len(lines)}"]
    with pytest.raises(InputError) as caught:
        stop(data, False, tmp_path)
    told = str(caught.value).split("\n  ")
    assert f"{len(data.bad)} rows can't be used" in told[0] and "--skip-bad" in told[0]
    assert told[1:51] == [f"{one.where}: {one.reason}" for one in data.bad[:MAX_LISTED]]
    assert told[51:] == [f"and {len(data.bad) - MAX_LISTED} more, see {tmp_path / 'bad_rows.jsonl'}"]


def test_bad_rows_jsonl_holds_all_of_them_and_good_ones_survive_skip_bad(load, tmp_path):
    data = load([json.dumps(flat(image="a.png")), *bad_lines()])
    (path,) = data.files
    data.files, data.bad = [path, "val.jsonl"], [*data.bad, replace(data.bad[0], file=1)]
    data.samples = [*data.samples, replace(data.samples[0], file=1)]
    stop(data, True, tmp_path)
    written = [json.loads(line) for line in (tmp_path / "bad_rows.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]
    assert [(row["file"], row["where"], row["reason"]) for row in written] == [
        (data.files[row.file], row.where, row.reason) for row in data.bad
    ]
    assert written[0]["row"] == BAD["truncated"][0]
    assert [sample.where for sample in data.samples] == ["rows.jsonl:1"] * 2


def test_a_row_of_a_one_line_array_takes_no_other_with_it(world, tmp_path, tokenizer, settings):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([flat(image="gone.png"), flat(image="a.png"), flat(image="lost.png"), flat()]))
    data = load_data([path], world / "images", tokenizer, settings, 1000)
    assert [sample.where for sample in data.samples] == ["rows.json:1 row 2", "rows.json:1 row 4"]
    assert [one.where for one in data.bad] == ["rows.json:1", "rows.json:1 row 3"]


def test_without_bad_rows_nothing_is_written_and_an_old_list_goes(load, tmp_path):
    (tmp_path / "bad_rows.jsonl").write_text("of the run before")
    stop(load([flat()]), False, tmp_path)
    assert not (tmp_path / "bad_rows.jsonl").exists()


@pytest.mark.parametrize("rows", [[], ["[]"], ["{}"]])
@pytest.mark.parametrize("skip_bad", [False, True])
def test_a_file_without_a_usable_row_stops_even_with_skip_bad(load, tmp_path, rows, skip_bad):
    with pytest.raises(InputError, match=r"rows.jsonl: no usable row\n  rows.jsonl:1: "):
        stop(load(rows), skip_bad, tmp_path)


def test_only_images_of_used_rows_count(load):
    data = load(
        [flat(image="a.png"), flat("<|im_end|>", image="b.png"), flat("long " * 500, image="c.png")], max_tokens=99
    )
    assert [Path(path).name for path in data.grids] == ["a.png"] and len(data.bad) == 2


# -------------------------------------------------------------------------------------------------------------- images


def noise(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def png_header_only(path: Path, width: int, height: int) -> None:
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"")),
        (b"IEND", b""),
    ]
    body = b"".join(struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def cut_short(path: Path, share: float) -> None:
    noise(300, 200).save(path)
    os.truncate(path, int(path.stat().st_size * share))


# name: (how it comes to be, what the reason says)
BAD_IMAGES = {
    "missing.png": (lambda path: None, "is missing"),
    "folder.png": (lambda path: path.mkdir(), "is a folder"),
    "empty.jpg": (lambda path: path.touch(), "unreadable"),
    "page.jpg": (lambda path: path.write_text("<html><body>404</body></html>"), "unreadable"),
    "cut.jpg": (lambda path: cut_short(path, 0.5), "truncated"),
    "cut.png": (lambda path: cut_short(path, 0.9), "truncated"),
    "header.png": (lambda path: png_header_only(path, 64, 64), "truncated"),
    "huge.png": (lambda path: png_header_only(path, 10_001, 10_000), "over 100 megapixels"),
    "bomb.png": (lambda path: png_header_only(path, 30_000, 30_000), "over 100 megapixels"),
    "tall.png": (lambda path: Image.new("L", (1, 5000)).save(path), "aspect ratio"),
    "wide.png": (lambda path: Image.new("L", (5000, 1)).save(path), "aspect ratio"),
    "float.tif": (lambda path: Image.new("F", (64, 64), 0.5).save(path), "mode F"),
    "int32.tif": (lambda path: Image.new("I", (64, 64), 70_000).save(path), "mode I"),
}


def test_every_unusable_image_is_named_with_its_row_and_reason(load, tmp_path):
    for name, (make, _) in BAD_IMAGES.items():
        make(tmp_path / name)
    noise(64, 64).save(tmp_path / "good.png")
    rows = [row for name in BAD_IMAGES for row in (flat(image="good.png"), flat(image=["good.png", name]))]
    data = load(rows, tmp_path)
    assert len(data.samples) == len(BAD_IMAGES)
    for number, (bad, (name, (_, reason))) in enumerate(zip(data.bad, BAD_IMAGES.items(), strict=True)):
        assert bad.where == f"rows.jsonl:{2 * number + 2}"
        assert f"image {tmp_path / name}" in bad.reason and reason in bad.reason


def test_a_huge_picture_is_refused_by_its_header_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("decoded"))
    for name in ("huge.png", "bomb.png"):
        BAD_IMAGES[name][0](tmp_path / name)
        assert "over 100 megapixels" in check_images([str(tmp_path / name)])[str(tmp_path / name)]


def two_halves(mode: str, left, right, width: int = 64, height: int = 32) -> Image.Image:
    image = Image.new(mode, (width, height), left)
    image.paste(right, (width // 2, 0, width, height))
    return image


def palette_with_transparency() -> Image.Image:
    image = Image.new("P", (64, 32), 1)
    image.putpalette([0, 0, 0, 200, 10, 10, 10, 200, 10])
    image.paste(2, (32, 0, 64, 32))
    image.info["transparency"] = 2
    return image


def turned(orientation: int) -> tuple[Image.Image, dict]:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return two_halves("RGB", RED, BLUE), {"exif": exif}


GREY_16 = Image.fromarray(np.array([[0xAB12] * 32 + [0x0345] * 32] * 32, np.uint16))
RED, BLUE, WHITE = (200, 10, 10), (10, 10, 200), (255, 255, 255)
# name: (picture and how to save it, colours displayed at the top left and bottom right corner, grid of 8-pixel patches)
VALID_IMAGES = {
    "plain.png": ((two_halves("RGB", RED, BLUE), {}), RED, BLUE, (4, 8)),
    "cmyk.jpg": ((two_halves("CMYK", (55, 245, 245, 0), (245, 245, 55, 0)), {"quality": 100}), RED, BLUE, (4, 8)),
    "palette.gif": ((two_halves("RGB", RED, BLUE).quantize(4), {}), RED, BLUE, (4, 8)),
    "palette.png": ((palette_with_transparency(), {"transparency": 2}), RED, WHITE, (4, 8)),
    "rgba.png": ((two_halves("RGBA", (*RED, 255), (0, 0, 0, 0)), {}), RED, WHITE, (4, 8)),
    "half.png": ((two_halves("LA", (0, 127), (55, 255)), {}), (128,) * 3, (55,) * 3, (4, 8)),
    "grey.png": ((two_halves("L", 9, 77), {}), (9,) * 3, (77,) * 3, (4, 8)),
    "black-white.png": ((two_halves("1", 1, 0), {}), WHITE, (0,) * 3, (4, 8)),
    "grey16.png": ((GREY_16, {}), (0xAB,) * 3, (3,) * 3, (4, 8)),
    "grey16.tif": ((GREY_16, {}), (0xAB,) * 3, (3,) * 3, (4, 8)),
    "turned.png": (turned(6), RED, BLUE, (8, 4)),
    "turned.jpg": (turned(8), BLUE, RED, (8, 4)),
    "upside-down.png": (turned(3), BLUE, RED, (4, 8)),
    "dot.png": ((Image.new("RGB", (1, 1), RED), {}), RED, RED, (2, 2)),
    "line.png": ((two_halves("RGB", RED, BLUE, 200, 1), {}), RED, BLUE, (2, 30)),
}


def unpatch(patches: np.ndarray, grid: tuple[int, int], side: int = 8, merge: int = 2) -> np.ndarray:
    """(H, W, 3) of patches in the vision tower's order: block by block of merge x merge patches."""
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


# ----------------------------------------------------------------------------------------------- the memory of images


@pytest.fixture
def opened(monkeypatch, tmp_path):
    """Paths that are opened from here on, with an empty memory of images."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    paths, real_open = [], Image.open
    monkeypatch.setattr(images_file.Image, "open", lambda path, *rest: paths.append(path) or real_open(path, *rest))
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


def test_a_failure_is_not_remembered(pictures, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with monkeypatch.context() as broken:
        broken.setattr(images_file.Image, "open", lambda path: (_ for _ in ()).throw(OSError("stale file handle")))
        assert all("stale file handle" in found for found in check_images(pictures).values())
    assert tuple(check_images(pictures)[pictures[0]]) == (40, 50)


@pytest.mark.parametrize("content", ["", "{"])
def test_a_damaged_memory_of_images_is_no_fault(opened, pictures, tmp_path, content):
    memory = tmp_path / "cache" / "onelook" / "image_sizes.json"
    memory.parent.mkdir(parents=True)
    memory.write_text(content)
    assert tuple(check_images(pictures)[pictures[0]]) == (40, 50)
    opened.clear()
    assert tuple(check_images(pictures)[pictures[0]]) == (40, 50) and not opened


def test_a_memory_that_can_t_be_written_is_no_fault(pictures, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert tuple(check_images(pictures)[pictures[0]]) == (40, 50)


# --------------------------------------------------------------------------------------------------------- image paths


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
        assert f"image {name} lies outside" in bad.reason and "--allow-outside-images" in bad.reason
    data = load(rows, tmp_path / "inside", allow_outside_images=True)
    assert [sample.images for sample in data.samples[len(inside) :]] == [(str(tmp_path / "a.png"),)] * 3


@pytest.mark.parametrize("stored", ["case 1.jpg", "case 1.jpeg", "case 1.png", "case.v1.jpg", "case.v1.png"])
def test_an_image_id_is_found_without_its_extension(load, tmp_path, stored):
    (tmp_path / "images").mkdir()
    noise(64, 64).save(tmp_path / "images" / stored)
    data = load([flat(image_id=Path(stored).stem), flat(image_id=f"{stored}.gone")], tmp_path / "images")
    assert data.samples[0].images == (str(tmp_path / "images" / stored),)
    assert [bad.where for bad in data.bad] == ["rows.jsonl:2"]


@pytest.mark.parametrize("name", ["data:image/png;base64," + "A" * 5000, "a\0.png", "https://example.org/a.png"])
def test_what_is_no_path_at_all_is_a_missing_image(load, name):
    (bad,) = load([flat(image=name)]).bad
    assert "is missing" in bad.reason and len(bad.reason) < 500


# ------------------------------------------------------------------------------------- the real tokenizer and real rows


@pytest.fixture(scope="module")
def kvasir(tmp_path_factory):
    if not (KVASIR.exists() and QWEN.exists()):
        pytest.skip(f"needs the Kvasir-VQA rows and Qwen3-VL's tokenizer under {SHARED}")
    folder = tmp_path_factory.mktemp("pictures")
    rows = [json.loads(line) for line in KVASIR.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        (folder / row["image_filename"]).touch()

    def size(path: str) -> tuple[int, int]:
        height, width = ((1072, 1920), (576, 720), (332, 487), (1024, 1280))[zlib.crc32(Path(path).name.encode()) % 4]
        return height, width

    tokenizer = AutoTokenizer.from_pretrained(QWEN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_file, "check_images", lambda paths, *_: {path: size(path) for path in paths})
        return rows, load_data([KVASIR], folder, tokenizer, image_settings(QWEN), 8192), tokenizer


def test_all_rows_of_kvasir_vqa_are_used_and_trained_on_exactly_their_answers(kvasir):
    rows, data, tokenizer = kvasir
    assert not data.bad and len(data.samples) == len(rows) == 8786 and len(data.grids) == 975
    texts = tokenizer.batch_decode([sample.ids[sample.trained].tolist() for sample in data.samples])
    assert texts == [f"{row['answer']}<|im_end|>" for row in rows]
    assert [sample.fields["question"] for sample in data.samples] == [row["question"] for row in rows]
    text = tokenizer.decode(data.samples[0].ids.tolist())
    assert text == (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Is this finding easy to detect?<|im_end|>\n"
        "<|im_start|>assistant\nno<|im_end|>"
    )


@pytest.mark.parametrize("image_tokens", [0, 396, 2700], ids=["mixed sizes", "396 tokens", "2,700 tokens"])
def test_four_ranks_wait_little_for_each_other_on_kvasir_vqa(kvasir, image_tokens):
    batch_size = parse_settings([]).batch_size
    samples = kvasir[1].samples
    if image_tokens:
        samples = [replace(one, image_tokens=(image_tokens,), patches=(4 * image_tokens,)) for one in samples]
    plan = make_plan(samples, PlanSettings(batch_size, 0, 8192, seed=0), epoch=0)
    assert len(plan) == -(-8786 // batch_size)
    assert rank_efficiency(plan, 4) >= 0.94
    assert rank_efficiency(make_plan(samples, PlanSettings(16, 4, 8192, seed=0), epoch=0), 4) >= 0.9
