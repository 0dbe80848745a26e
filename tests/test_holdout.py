"""--val-fraction: whole images are held out, the same ones in any order of rows, and eval.py answers their rows."""

import json
import random
import shutil
from dataclasses import replace

import pytest
import tiny
from common import InputError
from test_train import arguments, lines

import eval as evaluation
import train
from data import VQAData
from inputs.holdout import hold_out, trained_rows
from inputs.rows import read_rows


def made(data: VQAData, images: list[tuple[str, ...]]) -> VQAData:
    """Samples that show these images, in folder /x."""
    paths = [tuple(f"/x/{image}" for image in one) for one in images]
    samples = [replace(data.samples[0], where=f"r:{n}", images=one) for n, one in enumerate(paths)]
    return VQAData(
        "r", samples, dict.fromkeys((i for one in paths for i in one), (2, 2)), [], dict.fromkeys(sum(paths, ()))
    )


@pytest.fixture(scope="module")
def many(world):
    images = [(f"{n}.png",) for n in range(40) for _ in range(1 + n % 3)] + [("1.png", "2.png"), ("2.png", "3.png"), ()]
    return made(tiny.load_world(world)[0], images)


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5])
def test_images_are_held_out_whole_and_in_the_share_asked_for(many, fraction):
    trained, held = hold_out(many, "/x", fraction, 0)
    assert len(held.grids) == round(fraction * 40) and not set(held.grids) & set(trained.grids)
    assert len(trained.samples) + len(held.samples) == len(many.samples)
    for part in (trained, held):
        assert set(part.grids) == set(part.sizes) == {image for sample in part.samples for image in sample.images}
    assert many.samples[-1] in trained.samples  # it has no image


def test_images_that_rows_show_together_stay_together(many):
    linked, sides = {f"/x/{n}.png" for n in (1, 2, 3)}, set()
    for seed in range(20):
        _, held = hold_out(many, "/x", 0.25, seed)
        sides.add(len(linked & set(held.grids)))
    assert sides == {0, 3}


def test_the_order_of_rows_and_the_place_of_the_folder_change_nothing_and_the_seed_does(many):
    held = {sample.where for sample in hold_out(many, "/x", 0.25, 0)[1].samples}
    for seed in range(5):
        mixed = many.samples[:]
        random.Random(seed).shuffle(mixed)
        assert {sample.where for sample in hold_out(many.only(mixed), "/x", 0.25, 0)[1].samples} == held
    moved = made(many, [tuple("y/z/" + image[3:] for image in sample.images) for sample in many.samples])
    assert {sample.where for sample in hold_out(moved, "/x/y/z", 0.25, 0)[1].samples} == held
    assert {sample.where for sample in hold_out(many, "/x", 0.25, 1)[1].samples} != held


@pytest.mark.parametrize(("fraction", "told"), [(0.01, "holds out none"), (1, "holds out all")])
def test_a_share_that_leaves_a_part_empty_is_refused(many, fraction, told):
    with pytest.raises(InputError, match=told):
        hold_out(made(many, [("a",), ("b",), ("c",)]), "/x", fraction, 0)


def test_images_that_rows_link_are_told_where_no_share_can_work(many):
    with pytest.raises(InputError, match="4 images holds out none; 4 of them stay together"):
        hold_out(made(many, [("a", "b"), ("a", "c"), ("a", "d")]), "/x", 0.5, 0)


def test_rows_that_leave_an_image_s_extension_out_are_held_out_too(world):
    rows, _ = read_rows(world / "rows.jsonl")
    rows[0].images, rows[1].images = ["a"], ["./a.png"]
    kept = trained_rows(rows, str(world / "images"), ["a.png"])
    assert [row.where for row in kept] == [row.where for row in rows[17:] if "a.png" not in row.images]


def test_a_run_evaluates_what_it_holds_out_and_eval_answers_the_same(world, tmp_path, capsys):
    output, moved = tmp_path / "out", shutil.copytree(world / "images", tmp_path / "moved")
    settings = {"val": "", "val-fraction": 0.5, "max-steps": 1, "seed": 3}
    train.main(arguments(world, output, **settings))
    told = capsys.readouterr().out
    (line,) = lines(output, "eval")
    assert f"held out {line['questions']} questions on 2 of 4 images" in told
    evaluation.main(["--ckpt", str(output), "--max-new-tokens=1", "--workers=0", "--closed-set=99"])
    answered = [
        json.loads(text) for text in (output / "eval/checkpoint-000001/predictions.jsonl").read_text().splitlines()
    ]
    assert len(answered) == line["questions"] and sum(one["teacher_forced"] for one in answered) == pytest.approx(
        line["exact_match"] * line["questions"]
    )
    shown = {image for one in answered for image in one["images"]}
    rows = [json.loads(text) for text in (world / "rows.jsonl").read_text().splitlines()]
    named = [
        {*([row["image"]] if isinstance(row.get("image"), str) else row.get("image") or row.get("images", []))}
        for row in rows
    ]
    assert shown == {"c.png", "d.png"} and all(one <= shown or not one & shown for one in named)
    assert len(answered) == sum(bool(one & shown) for one in named)
    assert not any("options" in one for one in answered)  # its questions are asked nowhere else
    assert train.main([*arguments(world, output, **settings), "--plan"]) == 0
    assert f"val: {line['questions']} questions, 2 images" in capsys.readouterr().out
    for name in shown:
        (moved / name).unlink()
    with pytest.raises(InputError, match="none of the held-out rows can be used"):
        evaluation.main(["--ckpt", str(output), f"--images={moved}", "--skip-bad", f"--output={tmp_path / 'none'}"])
