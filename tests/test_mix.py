"""Several files of rows with weights: what an epoch asks, in any order of ranks, and where a run says it."""

import json
from collections import Counter
from dataclasses import replace

import pytest
import tiny
from runs import adapter, arguments, lines

import eval as evaluation
import train
from common import InputError
from trees import PlanSettings, StepSampler, epoch_passes, group_samples, make_plan


@pytest.fixture(scope="module")
def samples(world):
    """33 questions as file 0, and a file 1 of ten images of four questions."""
    own = tiny.load_world(world)[0].samples
    others = [replace(own[n % 4], images=(f"{n // 4}",), file=1) for n in range(40)]
    return own + others


def asked(samples, settings, epoch) -> Counter:
    trees = [tree for step in make_plan(samples, settings, epoch) for batch in step for tree in batch]
    assert all(len(set(tree.samples)) == len(tree.samples) for tree in trees)  # nothing twice in a tree
    return Counter(i for tree in trees for i in tree.samples)


def settings_of(*weights: float, seed: int = 0) -> PlanSettings:
    return PlanSettings(8, 0, 700, seed, weights)


@pytest.mark.parametrize(("weight", "count"), [(0.3, 12), (0.5, 20), (1.0, 40), (2.0, 80), (2.4, 96), (0.001, 1)])
def test_an_epoch_asks_a_file_s_questions_by_its_weight_and_all_get_their_turn(samples, weight, count):
    settings, total = settings_of(1.0, weight), Counter()
    for epoch in range(4):
        found = asked(samples, settings, epoch)
        assert all(found[i] == 1 for i in range(33))  # a weight of 1: each exactly once
        assert sum(found[i] for i in range(33, 73)) == count
        assert {found[i] for i in range(33, 73)} <= {int(weight), int(weight) + 1}
        total += found
    times = [total[i] for i in range(33, 73)]
    assert max(times) - min(times) <= 1 and (min(times) > 0 or weight == 0.001)


def test_half_of_a_file_is_half_of_its_images(samples):
    """Not half of the questions of each, which would cost as many images."""
    (indices,) = epoch_passes(samples, settings_of(1.0, 0.5), 3)
    groups = [group for group in group_samples(samples, indices) if samples[group[0]].file == 1]
    assert [len(group) for group in groups] == [4] * 5


def test_the_plan_follows_from_rows_settings_seed_and_epoch_and_not_from_the_ranks(samples):
    settings = settings_of(0.5, 2.5)
    for epoch in (0, 1):
        plan = make_plan(samples, settings, epoch)
        assert plan == make_plan(samples, settings, epoch) != make_plan(samples, settings, epoch + 1)
        assert plan != make_plan(samples, settings_of(0.5, 2.5, seed=1), epoch)
        for ranks in (1, 2, 4):
            found = [[] for _ in plan]
            for rank in range(ranks):
                sampler = StepSampler(samples, settings, rank, ranks)
                sampler.set_epoch(epoch)
                assert len(sampler) == len(plan) == -(-(16 + 100) // 8)
                for assignment in sampler:
                    found[assignment.step.number - epoch * len(plan)] += [assignment.trees] * assignment.in_loss
            assert [sorted(step, key=repr) for step in found] == [sorted(step, key=repr) for step in plan]


def test_files_of_weight_1_are_trained_as_one_file_of_all_rows(samples):
    one = [replace(sample, file=0) for sample in samples]
    for epoch in (0, 1):
        assert make_plan(samples, settings_of(1.0, 1.0), epoch) == make_plan(one, settings_of(), epoch)
        assert make_plan(samples, settings_of(), epoch) == make_plan(one, settings_of(), epoch)


@pytest.fixture
def two(world, tmp_path):
    """The world's rows in two files of one name."""
    rows = (world / "rows.jsonl").read_text().splitlines()
    for folder, part in (("one", rows[:17]), ("other", rows[17:])):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "rows.jsonl").write_text("".join(row + "\n" for row in part))
    return [tmp_path / folder / "rows.jsonl" for folder in ("one", "other")]


def test_a_run_of_two_files_is_logged_planned_held_out_resumed_and_evaluated(world, two, tmp_path, capsys):
    words = ["--train", *map(str, two), "--train-weights", "0.5", "2"]
    output, again = tmp_path / "out", tmp_path / "again"

    def argv(output, **settings):
        given = {"val": "", "val-fraction": 0.5, "seed": 3, "max-steps": 4, "epochs": 2} | settings
        return [word for word in arguments(world, output, **given) if not word.startswith("--train=")] + words

    train.main(argv(output))
    told = capsys.readouterr().out
    assert f"{two[0]}: 17 questions, 8 an epoch" in told and f"{two[1]}: 11 questions, 22 an epoch" in told
    assert "in 4 steps an epoch" in told and len(lines(output, "train")) == 4
    train.main(argv(tmp_path / "none") + ["--plan"])
    assert "17 questions, 8 an epoch" in capsys.readouterr().out
    train.main(argv(again, **{"max-steps": 4}))
    (again / "checkpoint-000004/manifest.json").unlink()
    train.main(["--config", str(again / "settings.toml"), "--resume=auto"])
    assert all((adapter(again, 4)[name] == weight).all() for name, weight in adapter(output, 4).items())
    with pytest.raises(InputError, match=r"train_weights: was \[0.5, 2.0\], is now \[0.5, 1.0\]"):
        train.main([*argv(output)[:-1], "1", "--resume=auto"])

    evaluation.main(["--ckpt", str(output), "--max-new-tokens=1", "--workers=0"])
    folder = max(output.glob("eval/checkpoint-*"))
    answered = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert len(answered) == 5 and {one["where"].split(":")[0] for one in answered} == {"other/rows.jsonl"}


def test_rows_of_files_of_one_name_are_told_apart(world, two):
    for path in two:
        path.write_text("{}\n")
    with pytest.raises(InputError, match=r"one/rows.jsonl:1: no question(.|\n)*other/rows.jsonl:1: no question"):
        train.main([*arguments(world, "", **{"val": world / "rows.jsonl"})[1:], "--plan", "--train", *map(str, two)])
