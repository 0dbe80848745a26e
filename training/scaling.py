"""How a run's steps keep several GPUs busy, and which --batch-size would keep them busier."""

import argparse
from collections.abc import Iterable
from dataclasses import replace
from functools import cache

import numpy as np

from modeling.precision import ROUNDED_GRADIENTS
from trees import PlanSettings, Step, group_samples, make_plan, rank_efficiency

GPU_COUNTS = (1, 2, 4, 8, 16, 32, 64)
SAMPLED_STEPS = 256  # of an epoch: their times and efficiencies stand for all of its steps
SAMPLED_QUESTIONS = 50_000  # of the rows: other batch sizes are planned for so many
FEWEST_STEPS = 10  # of an epoch with a larger batch size
ENOUGH = 0.9  # rank efficiency below which a larger batch size is looked for


def plan_settings(args: argparse.Namespace) -> PlanSettings:
    """What the plan depends on, from the settings of a run."""
    whole_trees = args.base_precision in ROUNDED_GRADIENTS
    return PlanSettings(
        args.batch_size, args.questions_per_image, args.seed, tuple(args.train_weights), whole_trees=whole_trees
    )


def spread(plan: list[Step]) -> list[Step]:
    """Every k-th of an epoch's steps, at most SAMPLED_STEPS of them; all of them where there are no more."""
    return plan[:: -(-len(plan) // SAMPLED_STEPS)]


def batch_size_remedy(samples: list, settings: PlanSettings, gpu_counts: Iterable[int]) -> str:
    """Which --batch-size would keep these numbers of GPUs busy where that of `settings` does not; empty where it does.

    The batch size is doubled until the rank efficiency is ENOUGH. If an epoch has less than FEWEST_STEPS steps before,
    its line names the best of those tried. It takes about a second per doubling.
    """
    part, sizes = _part(samples), [settings.batch_size]
    while 2 * sizes[-1] * FEWEST_STEPS <= len(samples):
        sizes.append(2 * sizes[-1])
    plan = cache(lambda size: spread(make_plan(part, replace(settings, batch_size=size), 0)))
    sentences = []
    for gpus in gpu_counts:
        used = {}
        for size in sizes:
            used[size] = rank_efficiency(plan(size), gpus)
            if used[size] >= ENOUGH:
                break
        best, now = max(used, key=used.get), used[settings.batch_size]
        if best != settings.batch_size:
            would = f"--batch-size {best} would use {used[best]:.0%} of them"
            sentences.append(f"at {gpus} GPUs {would}, {settings.batch_size} uses {now:.0%}")
    return "\n".join([*sentences, "what batch size does to learning: docs/grouping.md"]) if sentences else ""


def _part(samples: list) -> list:
    """Random groups of samples that can share a tree, in all SAMPLED_QUESTIONS or a few more; all where there are no
    more."""
    if len(samples) <= SAMPLED_QUESTIONS:
        return samples
    groups = group_samples(samples)
    part = []
    for place in np.random.default_rng(0).permutation(len(groups)):
        part += groups[place]
        if len(part) >= SAMPLED_QUESTIONS:
            break
    return [samples[index] for index in part]
