"""--val-fraction holds out whole images, the same in any order of rows, and eval.py answers their rows."""

import json
import random
import shutil

import pytest
from runs import arguments, lines

import eval as evaluation
import train
from common import InputError
from inputs.holdout import hold_out, possible_names, relative_names, split
from inputs.row_files import read_rows


@pytest.fixture(scope="module")
def many():
    """Image names of rows: one to three rows per image for 40 images, two that link three of these, one without."""
    rows = [(f"{n}.png",) for n in range(40) for _ in range(1 + n % 3)]
    return [*rows, ("1.png", "2.png"), ("2.png", "3.png"), ()]


def images_of(rows: list[tuple[str, ...]], indices: list[int]) -> set[str]:
    return {image for index in indices for image in rows[index]}


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5])
def test_images_are_held_out_whole_and_in_the_share_asked_for(many, fraction):
    trained, held = hold_out(many, fraction, 0)
    assert len(images_of(many, held)) == round(fraction * 40)
    assert not images_of(many, held) & images_of(many, trained)
    assert sorted(trained + held) == list(range(len(many)))
    assert len(many) - 1 in trained  # it has no image


def test_images_that_rows_show_together_stay_together(many):
    sides = {len({"1.png", "2.png", "3.png"} & images_of(many, hold_out(many, 0.25, seed)[1])) for seed in range(20)}
    assert sides == {0, 3}


def test_the_order_of_rows_changes_nothing_and_the_seed_does(many):
    held = images_of(many, hold_out(many, 0.25, 0)[1])
    for seed in range(5):
        mixed = random.Random(seed).sample(many, len(many))
        assert images_of(mixed, hold_out(mixed, 0.25, 0)[1]) == held
    assert images_of(many, hold_out(many, 0.25, 1)[1]) != held


def test_names_are_those_below_the_folder_wherever_it_is():
    for folder in ("/x", "/x/y/z"):
        assert relative_names((f"{folder}/a.png", "b/../c.png"), folder) == ("a.png", "c.png")


@pytest.mark.parametrize(("fraction", "message"), [(0.01, "holds out none"), (1, "holds out all")])
def test_a_share_that_leaves_a_part_empty_is_refused(fraction, message):
    with pytest.raises(InputError, match=message):
        hold_out([("a",), ("b",), ("c",)], fraction, 0)


def test_linked_images_are_named_where_no_share_can_work():
    with pytest.raises(InputError, match="4 images holds out none; 4 of them stay together"):
        hold_out([("a", "b"), ("a", "c"), ("a", "d")], 0.5, 0)


def test_rows_that_leave_an_image_s_extension_out_are_held_out_too(world):
    rows, _ = read_rows(world / "rows.jsonl")
    rows[0].images, rows[1].images = ["a"], ["./a.png"]
    names = [possible_names(row.images, str(world / "images")) for row in rows]
    assert [rows[i].where for i in split(names, ["a.png"])[0]] == [
        row.where for row in rows[17:] if "a.png" not in row.images
    ]


def test_a_run_evaluates_what_it_holds_out_and_eval_answers_the_same(world, tmp_path, capsys):
    output, moved = tmp_path / "out", shutil.copytree(world / "images", tmp_path / "moved")
    settings = {"val": "", "val-fraction": 0.5, "max-steps": 1, "seed": 3}
    train.main(arguments(world, output, **settings))
    printed = capsys.readouterr().out
    (line,) = lines(output, "eval")
    assert f"held out {line['questions']} questions on 2 of 4 images" in printed
    evaluation.main(["--ckpt", str(output), "--max-new-tokens=1", "--workers=0", "--closed-set=99"])
    answered = [
        json.loads(text) for text in (output / "eval/checkpoint-000001/predictions.jsonl").read_text().splitlines()
    ]
    assert len(answered) == line["questions"] and sum(answer["teacher_forced"] for answer in answered) == pytest.approx(
        line["exact_match"] * line["questions"]
    )
    shown = {image for answer in answered for image in answer["images"]}
    rows = [json.loads(text) for text in (world / "rows.jsonl").read_text().splitlines()]
    named = [
        {*([row["image"]] if isinstance(row.get("image"), str) else row.get("image") or row.get("images", []))}
        for row in rows
    ]
    assert shown == {"c.png", "d.png"} and all(images <= shown or not images & shown for images in named)
    assert len(answered) == sum(bool(images & shown) for images in named)
    assert not any("options" in answer for answer in answered)  # its questions are asked nowhere else
    assert train.main([*arguments(world, output, **settings), "--plan"]) == 0
    assert f"val: {line['questions']} questions, 2 images" in capsys.readouterr().out
    for name in shown:
        (moved / name).unlink()
    with pytest.raises(InputError, match="none of the held-out rows can be used"):
        evaluation.main(["--ckpt", str(output), f"--images={moved}", "--skip-bad", f"--output={tmp_path / 'none'}"])
