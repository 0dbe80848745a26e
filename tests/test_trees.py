"""The step plan: every step is full, every sample comes once an epoch, questions over the limit are spread out."""

from dataclasses import replace

import numpy as np
import pytest

from data import Sample
from trees import PlanSettings, make_plan, rank_efficiency


def make_samples(images: int, questions: int) -> list[Sample]:
    """Samples of `questions` questions on each of `images` images of 16 tokens."""
    samples = []
    for number in range(images * questions):
        ids = np.array([1, 5, 2, 10 + number, 3, 4], dtype=np.int32)
        trained, image = np.array([False] * 4 + [True] * 2), f"{number // questions}.png"
        samples.append(Sample(f"{number}", f"rows:{number}", (image,), ids, trained, (1,), (16,), (64,), {}))
    return samples


def steps_of(plan) -> list[list[int]]:
    return [[i for batch in step for tree in batch for i in tree.samples] for step in plan]


@pytest.mark.parametrize(
    ("images", "questions", "limit", "batch_size"),
    [(300, 1, 0, 96), (60, 8, 1, 128), (60, 8, 3, 250), (70, 9, 0, 96), (70, 9, 4, 16), (5, 9, 1, 96)],
)
def test_every_step_is_full_and_every_sample_comes_once(images, questions, limit, batch_size):
    samples = make_samples(images, questions)
    steps = steps_of(make_plan(samples, PlanSettings(batch_size, limit, 400, seed=0), epoch=0))
    assert sorted(i for step in steps for i in step) == list(range(len(samples)))
    assert len(steps) == -(-len(samples) // batch_size) and {len(step) for step in steps[:-1]} <= {batch_size}


@pytest.mark.parametrize("limit", [1, 4])
def test_questions_over_the_limit_are_spread_over_the_epoch(limit):
    """Not left together in one step as several trees: a step has as many images as trees, but for chance."""
    samples = make_samples(200, 8)
    plan = make_plan(samples, PlanSettings(64, limit, 400, seed=0), epoch=0)
    trees = sum(len(batch) for step in plan for batch in step)
    images = sum(len({samples[i].images for i in step}) for step in steps_of(plan))
    assert images > 0.85 * trees >= 0.85 * len(samples) / limit


@pytest.mark.parametrize(("limit", "batch_size"), [(0, 96), (4, 16)])
def test_four_ranks_wait_little_for_each_other(limit, batch_size):
    """Also where a step has four trees or a few more: whole ones of four questions, or many smaller ones."""
    samples = []
    for asked in range(1, 18):
        samples += [replace(one, images=(f"{one.images[0]} of {asked}",)) for one in make_samples(25, asked)]
    plan = make_plan(samples, PlanSettings(batch_size, limit, 8192, seed=0), epoch=0)
    assert rank_efficiency(plan, 4) >= 0.93
