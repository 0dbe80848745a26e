"""The rehearsal: what could fail for the first time in hour three runs before step 1, and leaves nothing behind."""

import argparse
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import dist_utils
from common import PARTIAL, InputError, write_whole, writing
from data import Batch, TreeDataset, recurrent_paths
from dist_utils import Ranks, no_sync, print0, unwrap
from model import TreeModel, autocast
from modeling.memory import (
    EAGER_SHARE,
    MEMORY_BUDGETS,
    activation_room,
    choose_memory_budget,
    compile_layers,
    kept_bytes,
    state_bytes,
)
from training.checkpoints import mark_best, write_checkpoint
from training.costs import slowdown
from training.plan import compiling_pays, last_layer_pays, may_stay_uncompiled, training_seconds
from training.settings import to_toml
from trees import Assignment, MicroBatch, PlanSettings, group_numbers, grow_tree, questions_by_file


@dataclass(frozen=True)
class Bounds:
    """What no micro-batch of a run exceeds, in any epoch and on any number of GPUs."""

    tokens: int
    answers: int  # answer tokens
    patches: int
    branches: int
    largest: MicroBatch  # trees of at most so many tokens with so many patches


def micro_batch_bounds(samples: list, settings: PlanSettings, max_tokens: int) -> Bounds:
    """The bounds of what a `StepSampler` yields. Takes about 4 s for a million samples."""
    tokens = np.array([sample.tokens for sample in samples])
    patches = np.array([sum(sample.patches) for sample in samples])
    answers = np.array([np.count_nonzero(sample.weights) for sample in samples])
    times = np.ones(len(samples), int)  # that a sample may come in one step: once per pass over its file
    for indices, asked in questions_by_file(samples, settings):
        times[indices] = -(-asked // len(indices))

    def most_in_a_step(counts: np.ndarray) -> int:
        return int(np.sort(np.repeat(counts, times))[-settings.batch_size :].sum())

    room = min(max_tokens, most_in_a_step(tokens))
    by_tokens = _most_answers(np.array(group_numbers(samples)), tokens, answers, times, settings.most_branches, room)
    chosen = _most_patches(tokens, patches, room)
    trees = tuple(grow_tree(samples, [index]) for index in chosen)
    branches = min(settings.batch_size, int(times.sum()))  # all questions of a step
    return Bounds(room, min(by_tokens, most_in_a_step(answers)), int(patches[chosen].sum()), branches, trees)


def _most_patches(tokens: np.ndarray, patches: np.ndarray, room: int) -> list[int]:
    """Indices of the samples that have the most patches, and of these choices the most tokens, within `room` tokens.

    Each is a tree of its own: more branches add tokens, but no patches. A sample may come any number of times (an
    unbounded knapsack), so the greatest value of each number of tokens follows from those of smaller ones.
    """
    values = patches * (room + 1) + tokens
    ranked = np.lexsort((-values, tokens))
    sizes, first = np.unique(tokens[ranked], return_index=True)  # of each size, the sample of greatest value
    items = ranked[first]
    greatest, last = np.zeros(room + 1, np.int64), np.zeros(room + 1, np.int64)
    for filled in range(sizes[0], room + 1):
        count = np.searchsorted(sizes, filled, side="right")
        totals = greatest[filled - sizes[:count]] + values[items[:count]]
        last[filled] = totals.argmax()
        greatest[filled] = totals[last[filled]]
    chosen, filled = [], room
    while filled >= sizes[0]:
        chosen.append(int(items[last[filled]]))
        filled -= sizes[last[filled]]
    return chosen


def _most_answers(
    groups: np.ndarray, tokens: np.ndarray, answers: np.ndarray, times: np.ndarray, most_branches: int, room: int
) -> int:
    """An upper bound of the answer tokens within `room` tokens: the trees with the most answer tokens per token first,
    and a part of the last (a fractional knapsack: Dantzig 1957). `groups` (samples,): group numbers."""
    total, of_group, longest = np.bincount(groups, answers * times), np.bincount(groups, answers), 0 * np.unique(groups)
    np.maximum.at(longest, groups, answers)
    in_a_tree = np.minimum(of_group, most_branches * longest)
    # A branch holds its answer tokens and the one before them: no prefix is longer than what these leave of a sample.
    prefix = np.full(len(total), room)
    np.minimum.at(prefix, groups, tokens - answers - 1)
    per_token = in_a_tree / (prefix + 1 + in_a_tree)
    order = np.argsort(-per_token)
    filled, reached = (np.cumsum(values[order]) for values in (total / per_token, total))
    return int(np.interp(room, [0, *filled], [0, *reached]) + 1e-6)


class Attempts(NamedTuple):
    """How a run may be compiled, judging by its memory and length."""

    budgets: list[float | None]  # memory budgets, the best first; None: layers are not compiled
    late: bool  # whether compiled layers leave out tokens late: `TreeModel.leave_out_late`


def plan_attempts(args: argparse.Namespace, prepared, model: TreeModel, ranks: Ranks) -> Attempts:
    """What to try for the largest micro-batch. `prepared` is what training.preparation.prepare gave.

    Call it before the optimizer exists: the estimate leaves room for what comes later. A collective.
    """
    if args.compile == "off" or args.dora or ranks.device.type != "cuda":
        return Attempts([None], late=False)
    config, tokens, budgets = model.base.config, prepared.bounds.tokens, [args.memory_budget]
    room = min(dist_utils.gather_to_all(activation_room(ranks.device)))  # compiled alike on every rank
    room -= state_bytes(config, prepared.bounds.branches)
    if args.memory_budget == "auto":
        highest = choose_memory_budget(config, tokens, room)
        budgets = [budget for budget in MEMORY_BUDGETS if budget <= highest]
    training = dist_utils.from_rank0(lambda: training_seconds(args, prepared, model.model, ranks))
    late = not last_layer_pays(slowdown(budgets[0]) * training)
    fits = EAGER_SHARE * kept_bytes(config, tokens) < room
    if fits and may_stay_uncompiled(args) and not compiling_pays(budgets[0], training):
        budgets = [None, *budgets]
    return Attempts(budgets, late)


def rehearse_step(
    model, optimizer, dataset: TreeDataset, bounds: Bounds, ranks: Ranks, dtype, attempts: Attempts
) -> float | None:
    """Run a micro-batch as large as any of the run forward and backward, compiled for the first memory budget that fits
    on all ranks, and return that budget.

    Raises InputError when memory does not suffice, and RuntimeError when a trained weight gets no finite gradient.
    Weights and optimizer stay as they were.
    """
    started = time.perf_counter()
    batch = largest_batch(dataset, bounds)
    for budget in attempts.budgets:
        if budget is not None:
            print0(f"compiling for a memory budget of {budget}: this takes up to a minute, more on slow CPUs")
            if attempts.late:
                unwrap(model).leave_out_late()
            compile_layers(unwrap(model).model, budget)
        # The first pass compiles too. Ranks agree after it, so that none is left waiting in the next attempt.
        if fits := all(dist_utils.gather_to_all(_fits_in_memory(model, batch, ranks, dtype))):
            break
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        if ranks.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()  # that of an attempt that did not fit is not the run's
    size = f"{bounds.tokens:,} tokens, {bounds.patches:,} patches and {bounds.answers:,} answer tokens"
    if not fits:
        raise InputError(
            f"the largest micro-batch, of {size}, does not fit in memory: "
            "lower --max-tokens, which changes no loss, or --max-pixels"
        )
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and (parameter.grad is None or not parameter.grad.isfinite().all()):
            first = dataset.data.samples[batch.samples[0]].where
            raise RuntimeError(f"{name} gets no finite gradient from {first}")
    optimizer.zero_grad(set_to_none=True)
    text = f"rehearsed the largest micro-batch: {size} in {time.perf_counter() - started:.0f} s"
    if ranks.device.type == "cuda":
        text += "\n  not compiled" if budget is None else f"\n  memory budget {budget}"
        text += f", peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
    print0(text)
    return budget


def largest_batch(dataset: TreeDataset, bounds: Bounds) -> Batch:
    """A micro-batch of real trees that reaches all bounds: the data set pads its tokens, its answer tokens repeat, and
    linear attention gets them as a trunk of half the tokens, because long sequences have kernels of their own, and as
    many branches as there may be."""
    batch = dataset[Assignment(bounds.largest)]
    repeated = torch.arange(bounds.answers) % len(batch.targets)
    names = "answer_at", "targets", "weights", "question"
    tokens = len(batch.ids)
    branch = np.maximum(0, 1 + np.arange(-tokens, tokens, 2) * bounds.branches // tokens)
    paths = recurrent_paths(np.zeros_like(branch), branch)
    return replace(batch, paths=paths, **{name: getattr(batch, name)[repeated] for name in names})


def _fits_in_memory(model, batch, ranks: Ranks, dtype) -> bool:
    """Forward and backward without a collective: a rank that runs out of memory must not leave the others waiting."""
    try:
        with no_sync(model, skip=True):
            with autocast(ranks.device, dtype):
                token_losses, _ = model(batch.to(ranks.device))
            token_losses.mean().backward()
    except torch.OutOfMemoryError:
        return False
    return True


def rehearse_save(output: Path, model, args: argparse.Namespace, state: dict) -> None:
    """Write the settings, and a checkpoint that is removed again. Raises InputError when the disk does not take it."""
    folder = output / f"{PARTIAL}rehearsal"
    try:
        with writing(f"a checkpoint can't be written to {output}"):
            write_whole(output / "settings.toml", to_toml(args))
            mark_best(output, state["best"])  # a kill may have come between the checkpoint and its mark
            write_checkpoint(folder, model, state | {"optimizer": with_moments(state["optimizer"], model)})
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def with_moments(optimizer_state: dict, model) -> dict:
    """AdamW's state as large as it is from the first step on: it holds no moments before."""
    shapes = [parameter.shape for parameter in model.parameters() if parameter.requires_grad]
    names = ("exp_avg", "exp_avg_sq")
    moments = {
        number: {"step": torch.tensor(0.0)} | {name: torch.zeros(shape) for name in names}
        for number, shape in enumerate(shapes)
    }
    return optimizer_state | {"state": moments}
