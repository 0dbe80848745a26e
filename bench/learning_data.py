"""The data sets of bench/learning.py, each a folder with train.jsonl, val.jsonl, images/ and the base model in model/.

- demo: the embedded demo, generated endoscopy-like pictures (`demo/endoscopy.py`).
- digits: scikit-learn's 1,797 handwritten digits of 8 x 8 pixels (UCI repository), with questions about value and ink;
  200 pictures are held out.
- easy-vqa: the package easy-vqa 1.0 (Victor Zhou, MIT licence), drawn shapes with its own questions and its own split.
"""

import hashlib
import json
import random
from collections.abc import Iterable
from importlib.metadata import distribution
from pathlib import Path
from shutil import copyfile

import numpy as np
from PIL import Image

from demo.endoscopy import make_demo, write_model, yes

HELD_OUT = 200  # digits
SIDE = 96  # pixels of a digit's picture, enlarged from 8 x 8


def prepare(folder: Path, names: Iterable[str]) -> None:
    """Write the data sets of these names (keys of WRITERS) that the folder lacks."""
    for name in names:
        if not (folder / name).exists():
            WRITERS[name](folder / name)


def fingerprint(folder: Path) -> str:
    """Hash of all files of a data set, its base model included."""
    total = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        total.update(f"{path.relative_to(folder)} ".encode() + hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()[:16]


def write_rows(folder: Path, rows: dict[str, list[dict]]) -> None:
    """Write the rows of each split, and a base model whose tokenizer knows their words."""
    for split, lines in rows.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    write_model(folder / "model", [f"{row['question']}\n{row['answer']}" for row in rows["train"] + rows["val"]])


# --------------------------------------------------------------------------------------------------------------- digits


def load_digits(folder: Path) -> None:
    from sklearn import datasets  # pip install scikit-learn; the pictures are part of it

    digits = datasets.load_digits()
    write_digits(folder, digits.images, digits.target)


def write_digits(folder: Path, pictures: np.ndarray, digits: np.ndarray, held_out: int = HELD_OUT) -> None:
    """Write the data set of pictures (n, 8, 8), ink from 0 to 16, of digits (n,). No picture is in both splits."""
    draw, rows = random.Random(0), {}
    order = draw.sample(range(len(digits)), len(digits))
    (folder / "images").mkdir(parents=True)
    for split, chosen in (("train", order[held_out:]), ("val", order[:held_out])):
        rows[split] = []
        for number in chosen:
            digit, name = int(digits[number]), f"images/{number:04d}.png"
            guess = digit if draw.random() < 0.5 else draw.choice([k for k in range(10) if k != digit])
            small = Image.fromarray((255 - 15 * pictures[number]).astype(np.uint8))
            small.resize((SIDE, SIDE), Image.BICUBIC).save(folder / name)
            for kind, question, answer in digit_questions(pictures[number], digit, guess):
                rows[split].append({"image": name, "question": question, "answer": answer, "question_type": kind})
    write_rows(folder, rows)


def digit_questions(picture: np.ndarray, digit: int, guess: int) -> list[tuple[str, str, str]]:
    """(type, question, answer) of a digit's picture (8, 8). A question about ink is left out where two parts hold the
    most."""
    questions = [
        ("which", "Which digit is it?", str(digit)),
        ("which", "Which number is one more?", str(digit + 1)),
        ("kind", "Is it even or odd?", ("even", "odd")[digit % 2]),
        ("kind", "Is it larger than 4?", yes(digit > 4)),
        ("kind", f"Is it a {guess}?", yes(digit == guess)),
    ]
    quarters = picture.reshape(2, 4, 2, 4).sum(axis=(1, 3))  # (upper and lower, left and right)
    for question, ink, names in (
        ("Is more ink in the upper or in the lower half?", quarters.sum(1), ("upper", "lower")),
        ("Is more ink in the left or in the right half?", quarters.sum(0), ("left", "right")),
        ("Which quarter has most ink?", quarters.ravel(), ("upper-left", "upper-right", "lower-left", "lower-right")),
    ):
        if (ink == ink.max()).sum() == 1:
            questions.append(("ink", question, names[ink.argmax()]))
    return questions


# ------------------------------------------------------------------------------------------------------------- easy-VQA


SHAPES = ("circle", "rectangle", "triangle")


def load_easy_vqa(folder: Path) -> None:
    import easy_vqa  # pip install easy-vqa; the pictures are part of it

    train = easy_vqa.get_train_questions(), easy_vqa.get_train_image_paths()
    write_easy_vqa(folder, {"train": train, "val": (easy_vqa.get_test_questions(), easy_vqa.get_test_image_paths())})
    licence = next(file for file in distribution("easy-vqa").files if file.name == "LICENSE")
    copyfile(licence.locate(), folder / "LICENSE")


def write_easy_vqa(folder: Path, splits: dict[str, tuple]) -> None:
    """Write the data set of, for each split, (questions, answers, image numbers) and {image number: path}."""
    (folder / "images").mkdir(parents=True)
    rows = {}
    for split, ((questions, answers, numbers), paths) in splits.items():
        for number, path in paths.items():
            copyfile(path, folder / f"images/{split}-{number}.png")
        rows[split] = [
            {
                "image": f"images/{split}-{number}.png",
                "question": question,
                "answer": answer,
                "question_type": "yes/no" if answer in ("yes", "no") else "shape" if answer in SHAPES else "colour",
            }
            for question, answer, number in zip(questions, answers, numbers)
        ]
    write_rows(folder, rows)


WRITERS = {"demo": make_demo, "digits": load_digits, "easy-vqa": load_easy_vqa}
