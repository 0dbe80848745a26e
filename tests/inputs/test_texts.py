"""Many rows cost little: what they share is made once and kept once, and gives what each row alone would give."""

import json
import os
import pickle
import shutil
import tracemalloc
from dataclasses import astuple
from pathlib import Path

import pytest
import tiny
from examples import FORMATS, flat
from runs import arguments
from transformers import AutoTokenizer

import eval as evaluation
import train
from common import InputError
from inputs import prompts, texts

QUESTIONS, ANSWERS, PICTURES = ("How many?", "Is it red?"), ("one", "no", "it is not"), ("a.png", "b.png", "c.png")


def crossed() -> list[dict]:
    """Each question with each answer about each picture."""
    return [tiny.single(picture, q, answer) for picture in PICTURES for q in QUESTIONS for answer in ANSWERS]


def plain(data) -> list[tuple]:
    """Samples and bad rows without the places of their rows."""
    samples = [[value.tolist() if hasattr(value, "tolist") else value for value in astuple(s)] for s in data.samples]
    return [tuple(sample[2:]) for sample in samples] + [astuple(bad)[1:] for bad in data.bad]


@pytest.mark.parametrize("options", [{}, {"image_first": True, "prompt": "Q: {question}!", "system": "Be brief."}])
def test_rows_together_give_what_each_gives_alone(load, options, monkeypatch):
    rows = [*crossed(), *(row for row, *_ in FORMATS.values()), *tiny.mixed_rows(), flat("one", image="gone.png")]
    rows += [flat(weight=0.5), flat(options=["two", "2"]), flat(options=["two", "<|im_end|>"])]
    alone = [result for row in rows for result in plain(load([row], **options))]
    monkeypatch.setattr(texts, "CHUNK", 5)
    monkeypatch.setattr(prompts, "KNOWN_PROMPTS", 3)
    together = plain(load(rows, **options))
    assert len(together) == len(rows) and sorted(map(repr, together)) == sorted(map(repr, alone))


def test_each_conversation_is_rendered_once_and_each_prompt_too(load, monkeypatch):
    rendered, render = [], prompts._render
    monkeypatch.setattr(prompts, "_render", lambda *a, **o: rendered.append(render(*a, **o)) or rendered[-1])
    assert len(load(crossed()).samples) == 18
    assert sum("How many?" in text or "Is it red?" in text for text in rendered) == 2 + 2 * 3


def test_samples_share_what_is_equal(load):
    samples = load(crossed()).samples
    assert len({id(sample.ids) for sample in samples}) == len({id(sample.fields) for sample in samples}) == 6
    lengths = {(len(sample.ids), sample.last_answer) for sample in samples}
    assert len({id(sample.weights) for sample in samples}) == len(lengths)
    for name in ("images", "image_tokens", "patches"):
        assert len({id(getattr(sample, name)) for sample in samples}) == 3
    assert len({id(sample.image_at) for sample in samples}) == 1


def test_what_travels_to_other_ranks_is_the_same_there_and_takes_little_memory(load):
    rows = [*crossed(), *tiny.mixed_rows(), flat("one", image="gone.png")]
    here, few = load(rows), load([])
    there = pickle.loads(pickle.dumps(here))
    assert plain(there) == plain(here) and there.fingerprint("") == here.fingerprint("")
    assert (there.files, there.grids, there.sizes, there.unread) == (here.files, here.grids, here.sizes, here.unread)
    for name in ("ids", "weights", "images", "fields"):
        numbers = [len({id(getattr(sample, name)) for sample in data.samples}) for data in (here, there)]
        assert numbers[0] == numbers[1] < len(here.samples)
    assert plain(pickle.loads(pickle.dumps(few))) == plain(few)
    sent = pickle.dumps(load(crossed() * 100))
    tracemalloc.start()
    received = pickle.loads(sent)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(received.samples) == 1800 and most / 1800 < 500  # bytes per row on the way


def test_the_image_is_what_is_told_of_a_row_whose_image_and_text_are_bad(load, world, tmp_path):
    (tmp_path / "cut.png").write_bytes((world / "images" / "a.png").read_bytes()[:300])
    bad = load([flat("<|im_end|>", image="cut.png"), flat("<|im_end|>")], images=tmp_path).bad
    assert "truncated" in bad[0].reason and "special token" in bad[1].reason
    assert bad[0].row["image"] == "cut.png"


def test_a_million_rows_fit_in_memory(load, world, tmp_path):
    """Per row, of rows of which half say something that none said before: what is kept, and the most on the way."""
    for number in range(200):
        os.link(world / "images" / "a.png", tmp_path / f"{number}.png")

    def traced(count: int) -> tuple[int, int]:
        rows = [flat(f"answer {n // 2}", f"question {n % 50}", image=f"{n // 10}.png", note="x") for n in range(count)]
        tracemalloc.start()
        data = load(rows, images=tmp_path)
        assert len(data.samples) == count
        try:
            return tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()

    traced(10)
    (few, most_of_few), (many, most_of_many) = traced(500), traced(2000)
    assert (many - few) / 1500 < 1000 and (most_of_many - most_of_few) / 1500 < 3000


# ---------------------------------------------------------------------------------------------------- the tokenizer


def lose_the_vocabulary(folder: Path) -> None:
    """Special tokens only, as transformers makes them of a folder whose other files it does not read."""
    file = folder / "tokenizer.json"
    parts = json.loads(file.read_text())
    parts["model"] |= {"vocab": {}, "merges": []}
    file.write_text(json.dumps(parts))


def take_another_model_s(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"image_token_id": config["image_token_id"] + 1}))


def add_tokens(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<new {n}>" for n in range(100)])
    tokenizer.save_pretrained(folder)


def split_special_tokens(folder: Path) -> None:
    """As LLaMA-Factory saves a tokenizer with its option of this name."""
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"split_special_tokens": True}))


UNFIT = {
    "reads 'Question 1\\?' as ''": lose_the_vocabulary,
    "gives <\\|image_pad\\|> the id 5, and config.json 6": take_another_model_s,
    "has [0-9]+ tokens, and the model [0-9]+ embeddings": add_tokens,
    "reads <\\|image_pad\\|> as [0-9]+ tokens, not as one": split_special_tokens,
}


@pytest.mark.parametrize("problem", UNFIT)
def test_a_tokenizer_that_is_not_the_model_s_is_one_error_before_any_row(world, tmp_path, capsys, problem):
    """Without its vocabulary all texts are empty, answers too, and would be learned at once."""
    folder = shutil.copytree(world / "model", tmp_path / "model")
    assert texts.load_tokenizer(str(folder))
    UNFIT[problem](folder)
    remedies = {"embeddings": "resize the model's", "not as one": "set split_special_tokens to false"}
    remedy = next((words for part, words in remedies.items() if part in problem), "copy all of this model's")
    words = arguments(world, tmp_path / "out", model=folder)
    asked = [f"--model={folder}", f"--data={world / 'rows.jsonl'}", f"--images={world / 'images'}"]
    for main, given in ((train.main, words), (train.main, [*words, "--plan"]), (evaluation.main, asked)):
        with pytest.raises(InputError, match=f"^the tokenizer of {folder} {problem}:\n  {remedy}"):
            main(given)
        assert "questions" not in capsys.readouterr().out
