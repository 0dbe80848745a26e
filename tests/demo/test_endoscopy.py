"""The demo's data is the same every time, agrees with its scenes, is split by picture, and suits its small model."""

import json

import numpy as np
import pytest
from PIL import Image
from transformers import AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from demo import endoscopy


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A demo of a few pictures."""
    folder = tmp_path_factory.mktemp("demo") / "data"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(endoscopy, "TRAIN_PICTURES", 20)
        patch.setattr(endoscopy, "VAL_PICTURES", 8)
        endoscopy.make_demo(folder)
    return folder


def read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def answers_by_question(number: int) -> list[tuple[dict[str, str], endoscopy.Scene]]:
    scenes = [endoscopy.make_scene(seed) for seed in range(number)]
    return [({question: answer(scene) for _, question, answer in endoscopy.QUESTIONS}, scene) for scene in scenes]


def test_the_demo_is_the_same_every_time(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(endoscopy, "TRAIN_PICTURES", 20)
    monkeypatch.setattr(endoscopy, "VAL_PICTURES", 8)
    endoscopy.make_demo(tmp_path / "again")
    files, again = (
        sorted(path.relative_to(root) for path in root.rglob("*") if path.is_file())
        for root in (folder, tmp_path / "again")
    )
    assert files == again
    assert all((folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in files)


def test_an_existing_demo_is_kept_and_nothing_else_is_replaced(folder, tmp_path):
    before = (folder / "train.jsonl").stat().st_mtime_ns
    endoscopy.make_demo(folder)
    assert (folder / "train.jsonl").stat().st_mtime_ns == before
    (tmp_path / "mine.txt").write_text("not the demo's")
    with pytest.raises(ValueError, match="not empty"):
        endoscopy.make_demo(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_rows_are_split_by_picture_and_ids_are_unique(folder):
    train, val = read(folder / "train.jsonl"), read(folder / "val.jsonl")
    assert len({row["id"] for row in train + val}) == len(train + val)
    assert not {row["image"] for row in train} & {row["image"] for row in val}
    pictures = {path.relative_to(folder).as_posix() for path in (folder / "images").iterdir()}
    assert pictures == {row["image"] for row in train + val} and len(pictures) == 28
    pixels = {Image.open(folder / name).tobytes() for name in pictures}
    assert len(pixels) == 28


def test_answers_agree_with_the_scene_and_with_each_other():
    for answers, scene in answers_by_question(300):
        polyps = int(answers["How many polyps are in the image?"])
        assert polyps == len(scene.polyps)
        assert (answers["Does this image contain any finding?"] == "yes") == (polyps > 0)
        assert (answers["Is there more than one polyp?"] == "yes") == (polyps > 1)
        colours = answers["What color is the abnormality?"]
        assert colours == ("; ".join(sorted(polyp.name for polyp in scene.polyps)) or "none")
        assert (answers["What is the size of the polyp?"] == "none") == (polyps == 0)
        assert (answers["Where in the image is the abnormality?"] is None) == (polyps > 1)
        kinds = answers["Are there any instruments in the image? Check all that are present."]
        assert int(answers["How many instruments are in the image?"]) == (
            0 if kinds == "none" else kinds.count(";") + 1
        )
        assert (answers["Is there text?"] == "no") == (answers["Is the text on the left or on the right?"] == "none")
        cells = [thing.cell for thing in scene.polyps + scene.instruments]
        assert len(set(cells)) == len(cells)


def test_what_the_answers_name_is_in_the_pixels():
    """Each polyp's colour is found at its place, whatever was drawn later."""
    seen = 0
    for _, scene in answers_by_question(60):
        picture = np.asarray(endoscopy.draw(scene, 384, 384)).astype(int)
        for polyp in scene.polyps:
            x, y = (round(384 * share) for share in polyp.at)
            near = picture[y - 6 : y + 7, x - 6 : x + 7].reshape(-1, 3)
            distance = np.abs(near - np.array(endoscopy.POLYP_COLOURS[polyp.name])).sum(axis=1)
            seen += 1
            assert distance.min() < 30, (scene, polyp)
    assert seen > 40


def test_no_question_has_one_answer_that_wins():
    rows = [row for row, _ in endoscopy.make_rows("train", 400, 0)]
    for _, question, _ in endoscopy.QUESTIONS:
        answers = [row["answer"] for row in rows if row["question"] == question]
        assert max(map(answers.count, set(answers))) < 0.8 * len(answers), question


def test_pictures_have_one_to_seventeen_questions():
    rows = [row for row, _ in endoscopy.make_rows("train", 400, 0)]
    counts = np.unique([row["image"] for row in rows], return_counts=True)[1]
    assert counts.min() == 1 and counts.max() == 17 and 8 < counts.mean() < 10 and 0.3 < np.mean(counts == 1) < 0.5


def test_tokenizer_renders_chatml_and_round_trips(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is there text?"}]}
    prompt = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
    assert prompt == (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Is there text?<|im_end|>\n<|im_start|>assistant\n"
    )
    answer = {"role": "assistant", "content": "yes"}
    assert tokenizer.apply_chat_template([user, answer], tokenize=False) == prompt + "yes<|im_end|>\n"
    system = tokenizer.apply_chat_template([{"role": "system", "content": "Be brief."}, user], tokenize=False)
    assert system.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
    for text in (prompt, "<5mm; Ünïcode 😀\t 12\n\n"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.unk_token is None and len(tokenizer(" instruments")["input_ids"]) == 1


def test_demo_pictures_are_not_resized(folder):
    processor = Qwen2VLImageProcessorPil.from_pretrained(folder / "model")
    picture = Image.open(sorted((folder / "images").iterdir())[0])
    assert processor(picture, return_tensors="pt")["image_grid_thw"].tolist() == [
        [1, *(2 * [endoscopy.SIDE // endoscopy.PATCH])]
    ]


@pytest.mark.parametrize("size", [(320, 200), None])
def test_a_picture_is_made_once_for_its_name(tmp_path, size):
    for name in ("a.jpg", "sub/b.jpg"):
        endoscopy.make_picture(name, tmp_path, size)
        before = (tmp_path / name).stat().st_mtime_ns
        endoscopy.make_picture(name, tmp_path, size)
        assert (tmp_path / name).stat().st_mtime_ns == before
        with Image.open(tmp_path / name) as picture:
            assert picture.format == "JPEG"
            width, height = picture.size
        assert (width, height) == size if size else 480 <= width <= 1920 and 360 <= height <= 1072
