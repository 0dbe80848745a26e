"""The step plan: every step is full, every sample comes once per epoch, or by its file's weight, and questions over the
limit are spread out."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import tiny

from data import Sample
from trees import PlanSettings, StepSampler, Tree, epoch_passes, group_numbers, make_plan, pack, rank_efficiency


def make_samples(images: int, questions: int) -> list[Sample]:
    """Samples: `questions` questions for each of `images` images of 16 tokens."""
    samples = []
    for number in range(images * questions):
        ids = np.array([1, 5, 2, 10 + number, 3, 4], dtype=np.int32)
        weights, image = np.array([0.0] * 4 + [1.0] * 2), f"{number // questions}.png"
        samples.append(Sample(f"{number}", f"rows:{number}", (image,), ids, weights, 4, (1,), (16,), (64,), {}))
    return samples


def tree_of(sample: int, tokens: int, cost: float) -> Tree:
    return Tree((sample,), 0, 0, (tokens,), 0.0, (cost,))


def steps_of(plan) -> list[list[int]]:
    return [[i for tree in step for i in tree.samples] for step in plan]


@pytest.mark.parametrize(
    ("images", "questions", "limit", "batch_size"),
    [(300, 1, 0, 96), (60, 8, 1, 128), (60, 8, 3, 250), (70, 9, 0, 96), (70, 9, 4, 16), (5, 9, 1, 96)],
)
def test_every_step_is_full_and_every_sample_comes_once(images, questions, limit, batch_size):
    samples = make_samples(images, questions)
    steps = steps_of(make_plan(samples, PlanSettings(batch_size, limit, seed=0), epoch=0))
    assert sorted(i for step in steps for i in step) == list(range(len(samples)))
    assert len(steps) == -(-len(samples) // batch_size) and {len(step) for step in steps[:-1]} <= {batch_size}


def test_every_epoch_has_an_order_of_its_own():
    samples, settings = make_samples(40, 3), PlanSettings(24, 0, seed=0)
    first, second = (make_plan(samples, settings, epoch) for epoch in (0, 1))
    assert first == make_plan(samples, settings, epoch=0) != second
    assert steps_of(first) != steps_of(second)


def test_micro_batches_keep_to_the_token_budget_whatever_their_trees_cost():
    """Large images cost more per token than text, so micro-batches of equal cost may have unequal tokens."""
    random = np.random.default_rng(0)
    for count in (3, 10, 40):
        tokens, costs = random.integers(1, 100, count), random.integers(1, 1000, count)
        trees = [tree_of(number, int(tokens[number]), float(costs[number])) for number in range(count)]
        step = pack(trees, 100)
        assert all(sum(tree.tokens for tree in batch) <= 100 for batch in step)
        assert sorted(tree.samples for batch in step for tree in batch) == [(number,) for number in range(count)]


@pytest.mark.parametrize("limit", [1, 4])
def test_questions_over_the_limit_are_spread_over_the_epoch(limit):
    """They are not several trees of one step: a step has as many images as trees, but for chance."""
    samples = make_samples(200, 8)
    plan = make_plan(samples, PlanSettings(64, limit, seed=0), epoch=0)
    trees = sum(map(len, plan))
    images = sum(len({samples[i].images for i in step}) for step in steps_of(plan))
    assert images > 0.85 * trees >= 0.85 * len(samples) / limit


@pytest.fixture(scope="module")
def unequal() -> list[Sample]:
    """425 images of 300 to 2,700 tokens with 1 to 17 questions each."""
    samples = []
    for asked in range(1, 18):
        for sample in make_samples(25, asked):
            tokens = 300 + int(sample.images[0][:-4]) * 100
            image = {"images": (f"{sample.images[0]} of {asked}",), "image_tokens": (tokens,), "patches": (4 * tokens,)}
            samples.append(replace(sample, **image))
    return samples


@pytest.mark.parametrize(("batch_size", "ranks", "efficiency"), [(96, 4, 0.95), (192, 8, 0.95), (384, 16, 0.94)])
def test_ranks_wait_little_for_each_other(unequal, batch_size, ranks, efficiency):
    plan = make_plan(unequal, PlanSettings(batch_size, 0, seed=0), epoch=0)
    assert rank_efficiency(plan, ranks) >= efficiency


# ------------------------------------------------------------------------------------------------ several files of rows


@pytest.fixture(scope="module")
def samples(world):
    """33 questions as file 0, and a file 1 of ten images of four questions."""
    own = tiny.load_world(world)[0].samples
    others = [replace(own[n % 4], images=(f"{n // 4}",), file=1) for n in range(40)]
    return own + others


def asked(samples, settings, epoch) -> Counter:
    trees = [tree for step in make_plan(samples, settings, epoch) for tree in step]
    assert all(len(set(tree.samples)) == len(tree.samples) for tree in trees)  # nothing twice in a tree
    return Counter(i for tree in trees for i in tree.samples)


def settings_of(*weights: float, seed: int = 0) -> PlanSettings:
    return PlanSettings(8, 0, seed, weights)


@pytest.mark.parametrize(("weight", "count"), [(0.3, 12), (0.5, 20), (1.0, 40), (2.0, 80), (2.4, 96), (0.001, 1)])
def test_an_epoch_takes_a_file_s_questions_by_its_weight_and_all_get_their_turn(samples, weight, count):
    settings, total = settings_of(1.0, weight), Counter()
    for epoch in range(4):
        counts = asked(samples, settings, epoch)
        assert all(counts[i] == 1 for i in range(33))  # a weight of 1: each exactly once
        assert sum(counts[i] for i in range(33, 73)) == count
        assert {counts[i] for i in range(33, 73)} <= {int(weight), int(weight) + 1}
        total += counts
    times = [total[i] for i in range(33, 73)]
    assert max(times) - min(times) <= 1 and (min(times) > 0 or weight == 0.001)


def test_half_of_a_file_is_half_of_its_images(samples):
    """Half of the questions of each image would cost as many images."""
    numbers = group_numbers(samples)
    (indices,) = epoch_passes(samples, settings_of(1.0, 0.5), 3, numbers)
    assert sorted(Counter(numbers[i] for i in indices if samples[i].file == 1).values()) == [4] * 5


def test_the_plan_follows_from_rows_settings_seed_and_epoch_and_not_from_the_ranks(samples):
    settings = settings_of(0.5, 2.5)
    for epoch in (0, 1):
        plan = make_plan(samples, settings, epoch)
        assert plan == make_plan(samples, settings, epoch) != make_plan(samples, settings, epoch + 1)
        assert plan != make_plan(samples, settings_of(0.5, 2.5, seed=1), epoch)
        for ranks in (1, 2, 4):
            shared = [[] for _ in plan]
            for rank in range(ranks):
                sampler = StepSampler(samples, settings, 700, rank, ranks)
                sampler.set_epoch(epoch)
                assert len(sampler) == len(plan) == -(-(16 + 100) // 8)
                for assignment in sampler:
                    parts = assignment.trees if assignment.in_loss else ()
                    shared[assignment.step.number - epoch * len(plan)] += [
                        (t.number, i) for t in parts for i in t.samples
                    ]
            assert [sorted(step) for step in shared] == [
                sorted((t.number, i) for t in s for i in t.samples) for s in plan
            ]


def test_files_of_weight_1_are_trained_as_one_file_of_all_rows(samples):
    one_file = [replace(sample, file=0) for sample in samples]
    for epoch in (0, 1):
        assert make_plan(samples, settings_of(1.0, 1.0), epoch) == make_plan(one_file, settings_of(), epoch)
        assert make_plan(samples, settings_of(), epoch) == make_plan(one_file, settings_of(), epoch)
