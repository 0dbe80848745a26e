"""The step plan: every step is full, every sample comes once per epoch, or by its file's weight, and questions over the
limit are spread out. Ranks share a step, and pack their shares into micro-batches."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import tiny

import trees
from data import Sample
from trees import (
    MICRO_BATCH_COST,
    PlanSettings,
    StepSampler,
    Tree,
    epoch_passes,
    group_numbers,
    make_plan,
    pack,
    plan_steps,
    rank_efficiency,
    share_out,
)


def make_samples(images: int, questions: int) -> list[Sample]:
    """Samples: `questions` questions for each of `images` images of 16 tokens."""
    samples = []
    for number in range(images * questions):
        ids = np.array([1, 5, 2, 10 + number, 3, 4], dtype=np.int32)
        weights, image = np.array([0.0] * 4 + [1.0] * 2), f"{number // questions}.png"
        samples.append(Sample(f"{number}", f"rows:{number}", (image,), ids, weights, 4, (1,), (16,), (64,), {}))
    return samples


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


def test_a_step_is_planned_without_the_trees_of_later_ones(monkeypatch):
    """A step is drawn from the trees of two steps, and at least LOOK_AHEAD; then as many follow as it took."""
    grown, samples = [], make_samples(1000, 4)
    grow_tree = trees.grow_tree
    monkeypatch.setattr("trees.grow_tree", lambda *arguments: grown.append(0) or grow_tree(*arguments))
    for batch_size, ahead in ((96, 64), (800, 400)):
        grown.clear()
        next(plan_steps(samples, PlanSettings(batch_size, 0, seed=0), 0, group_numbers(samples)))
        assert len(grown) == ahead + batch_size // 4


@pytest.mark.parametrize("limit", [1, 4])
def test_questions_over_the_limit_are_spread_over_the_epoch(limit):
    """They are not several trees of one step: a step has as many images as trees, but for chance."""
    samples = make_samples(200, 8)
    plan = make_plan(samples, PlanSettings(64, limit, seed=0), epoch=0)
    count = sum(map(len, plan))
    images = sum(len({samples[i].images for i in step}) for step in steps_of(plan))
    assert images > 0.85 * count >= 0.85 * len(samples) / limit


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


@pytest.mark.parametrize(
    ("batch_size", "ranks", "efficiency"), [(96, 4, 0.95), (96, 8, 0.8), (192, 8, 0.95), (384, 16, 0.94)]
)
def test_ranks_wait_little_for_each_other(unequal, batch_size, ranks, efficiency):
    plan = make_plan(unequal, PlanSettings(batch_size, 0, seed=0), epoch=0)
    assert rank_efficiency(plan, ranks) >= efficiency


# -------------------------------------------------------------------------------------------- ranks and micro-batches


def random_step(random: np.random.Generator, most_trees: int = 24) -> tuple[Tree, ...]:
    """Trees of 1 to 17 branches, small and large images, short and long answers."""
    step, sample = [], 0
    for _ in range(random.integers(1, most_trees + 1)):
        prefix, asked = int(random.integers(50, random.choice([300, 5000]))), int(random.integers(1, 18))
        tokens = random.integers(10, random.choice([40, 400]), asked)
        costs = (1.2 * tokens + random.random(asked)).tolist()
        numbers = tuple(range(sample, sample + asked))
        step.append(Tree(numbers, 5, prefix, tuple(tokens.tolist()), 570 + 1.4 * prefix, tuple(costs)))
        sample += asked
    step.sort(key=lambda tree: -tree.cost)
    return tuple(replace(tree, number=number) for number, tree in enumerate(step))


def assert_whole(parts: list[Tree], step: tuple[Tree, ...]) -> None:
    """Each branch of each tree is in exactly one of the parts, under its number, with the whole prefix."""
    for tree in step:
        own = sorted((part for part in parts if part.number == tree.number), key=lambda part: part.first_branch)
        assert [index for part in own for index in part.samples] == list(tree.samples)
        for part in own:
            start = part.first_branch - 1
            assert part == tree.part(start, start + len(part.samples))


@pytest.fixture(scope="module")
def shared() -> list[tuple]:
    """(step, ranks, shares) of random steps, with more ranks than trees and fewer."""
    random = np.random.default_rng(0)
    steps = [random_step(random, 24 if number % 3 else 2) for number in range(150)]
    ranks = [int(random.integers(1, 17)) for _ in steps]
    return [(step, number, share_out(step, number)) for step, number in zip(steps, ranks)]


def test_shares_hold_each_branch_once_with_its_prefix_and_number(shared):
    for step, ranks, shares in shared:
        assert len(shares) == ranks
        assert_whole([part for share in shares for part in share], step)


def test_shares_follow_from_the_step_and_the_number_of_ranks(shared):
    for step, ranks, shares in shared[:30]:
        assert share_out(tuple(replace(tree) for tree in step), ranks) == shares


def test_trees_are_cut_where_that_saves_more_than_a_micro_batch(shared, monkeypatch):
    monkeypatch.setattr("trees.MICRO_BATCH_COST", 1e9)
    cuts = better = 0
    for step, ranks, shares in shared:
        uncut = share_out(step, ranks)
        longest = max(sum(tree.cost for tree in share) for share in shares)
        longest_uncut = max(sum(tree.cost for tree in share) for share in uncut)
        assert sum(map(len, uncut)) == len(step)
        by_cost = [sum(step[i].cost for i in share) for share in trees.balance([tree.cost for tree in step], ranks)]
        assert longest_uncut <= max(by_cost)
        better += longest_uncut < max(by_cost)
        if sum(map(len, shares)) > len(step):
            cuts += 1
            assert longest < longest_uncut - MICRO_BATCH_COST
        else:
            assert longest <= longest_uncut
    assert 30 < cuts < len(shared) and better > 4  # than the longest processing time first


def test_one_tree_is_cut_over_as_many_ranks_as_are_worth_it():
    """17 branches of 200 tokens on an image of 300 are worth four ranks, two branches on one of 5,000 are not."""
    tree = Tree(tuple(range(17)), 5, 300, (200,) * 17, 900.0, (250.0,) * 17)
    assert [len(share) for share in share_out((tree,), 4)] == [1] * 4
    assert max(len(part.samples) for (part,) in share_out((tree,), 4)) == 5
    tree = Tree((0, 1), 5, 5000, (200, 200), 8000.0, (250.0, 250.0))
    assert [len(share) for share in share_out((tree,), 4)] == [1, 0, 0, 0]


def test_repeated_prefixes_and_idle_ranks_are_waste():
    """17 branches that cost 250, on a prefix of 900: four ranks take 5, 4, 4 and 4, or one takes all."""
    cut = Tree(tuple(range(17)), 5, 300, (200,) * 17, 900.0, (250.0,) * 17)
    assert rank_efficiency([(cut,)], 4) == pytest.approx((900 + 17 * 250) / (4 * (900 + 5 * 250)))
    assert rank_efficiency([(replace(cut, whole=True),)], 4) == 0.25
    assert rank_efficiency([(cut,)], 1) == 1


def test_micro_batches_hold_each_branch_once_within_the_token_budget():
    """Trees that are too long are cut, each part with the whole prefix."""
    random, cut = np.random.default_rng(1), 0
    for _ in range(150):
        step = random_step(random)
        longest_branch = max(tree.prefix_tokens + max(tree.branch_tokens) for tree in step)
        max_tokens = int(longest_branch * random.choice([1.0, 1.3, 2, 8]))
        batches = pack(step, max_tokens)
        assert all(sum(tree.tokens for tree in batch) <= max_tokens for batch in batches)
        parts = [part for batch in batches for part in batch]
        assert_whole(parts, step)
        for tree in step:
            assert tree.tokens > max_tokens or tree in parts
        cut += len(parts) > len(step)
        costs = [sum(tree.cost for tree in batch) for batch in batches]
        assert costs == sorted(costs, reverse=True)
    assert 30 < cut < 150


def test_micro_batches_are_few_and_cost_about_the_same():
    """12 trees of 1,000 tokens that cost 1,000 to 2,100."""
    step = [Tree((n,), 5, 800, (200,), 900.0, (100.0 * (n + 1),)) for n in range(12)]
    assert [len(batch) for batch in pack(step, 4_999)] == [4, 4, 4]
    two = [sum(tree.cost for tree in batch) for batch in pack(step, 7_000)]
    assert len(two) == 2 and two[0] - two[1] <= 200
    assert len(pack(step, 12_000)) == 1 and len(pack(step, 1_000)) == 12


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_resumed_epoch_goes_on_as_the_whole_one_would(ranks):
    samples, settings = make_samples(40, 5), PlanSettings(24, 0, seed=0)
    for rank in range(ranks):
        sampler = StepSampler(samples, settings, 35, rank, ranks)
        sampler.set_epoch(1)
        whole = list(sampler)
        sampler.first_step = 3
        assert list(sampler) == [assignment for assignment in whole if assignment.step.number >= len(sampler) + 3]
        assert len({assignment.step.number for assignment in whole}) == len(sampler)
        assert len(whole) > len(sampler)  # several micro-batches per step
        assert whole[-1].last and all(a.last == (a.step != b.step) for a, b in pairwise(whole))


def test_a_rank_without_work_runs_one_branch_of_the_cheapest_tree_that_does_not_count():
    samples, settings, ranks = make_samples(2, 2), PlanSettings(4, 0, seed=0), 4
    samples[:2] = [replace(sample, image_tokens=(40,), patches=(160,)) for sample in samples[:2]]
    (step,) = make_plan(samples, settings, 0)
    first = [next(iter(StepSampler(samples, settings, 100, rank, ranks))) for rank in range(ranks)]
    assert [assignment.in_loss for assignment in first] == [True, True, False, False]
    for assignment in first[2:]:
        assert assignment.last and assignment.step == first[0].step and assignment.trees == (step[-1].part(0, 1),)
    assert step[0].cost > step[1].cost


def test_steps_and_shares_do_not_depend_on_max_tokens():
    samples, settings = make_samples(40, 5), PlanSettings(24, 0, seed=0)
    for rank in range(3):
        by_step = []
        for max_tokens in (25, 60, 9999):
            asked = {}
            for assignment in StepSampler(samples, settings, max_tokens, rank, 3):
                own = [(tree.number, index) for tree in assignment.trees for index in tree.samples]
                asked.setdefault(assignment.step, []).extend(own)
            by_step.append({step: sorted(own) for step, own in asked.items()})
        assert by_step[0] == by_step[1] == by_step[2]


# ------------------------------------------------------------------------------------------------ several files of rows


@pytest.fixture(scope="module")
def samples(world):
    """33 questions as file 0, and a file 1 of ten images of four questions."""
    own = tiny.load_world(world)[0].samples
    others = [replace(own[n % 4], images=(f"{n // 4}",), file=1) for n in range(40)]
    return own + others


def asked(samples, settings, epoch) -> Counter:
    grown = [tree for step in make_plan(samples, settings, epoch) for tree in step]
    assert all(len(set(tree.samples)) == len(tree.samples) for tree in grown)  # nothing twice in a tree
    return Counter(i for tree in grown for i in tree.samples)


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
