"""The rehearsal: what could fail for the first time in hour three runs before step 1, and leaves nothing behind."""

import argparse
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import dist_utils
from common import PARTIAL, InputError, write_whole, writing
from data import TreeDataset
from dist_utils import Ranks, no_sync, print0, unwrap
from model import TreeModel, autocast
from modeling.memory import MEMORY_BUDGETS, choose_memory_budget, compile_layers
from training.checkpoints import mark_best, write_checkpoint
from training.settings import to_toml
from trees import Assignment, MicroBatch, PlanSettings, Tree, cut_to_fit, group_samples, grow_tree


@dataclass(frozen=True)
class Bounds:
    """What no micro-batch of a run exceeds, on any number of GPUs: so many tokens, and real trees within them that have
    the most patches and the most answer tokens."""

    tokens: int
    most_patches: MicroBatch
    most_answers: MicroBatch


def micro_batch_bounds(samples: list, settings: PlanSettings, max_tokens: int) -> Bounds:
    # No step has more tokens than its questions would have one by one.
    longest = sorted((sample.tokens for sample in samples), reverse=True)[: settings.batch_size]
    tokens = min(max_tokens, sum(longest))
    # Most patches per token have trees of one branch, most answer tokens those with all branches that they may have.
    alone, whole, limit = [], [], settings.most_branches
    for group in group_samples(samples):
        shortest = sorted(group, key=lambda index: samples[index].tokens)
        alone += [grow_tree(samples, [index]) for index in shortest[: -(-len(group) // limit)]]
        chunks = [group[start : start + limit] for start in range(0, len(group), limit)]
        whole += [part for chunk in chunks for part in cut_to_fit(grow_tree(samples, chunk), tokens)]

    def patches(tree: Tree) -> int:
        return sum(sum(samples[index].patches) for index in tree.samples)

    def answers(tree: Tree) -> int:
        return sum(int(samples[index].trained.sum()) for index in tree.samples)

    most = [_fill(trees, count, tokens, settings.batch_size) for trees, count in ((alone, patches), (whole, answers))]
    return Bounds(tokens, *most)


def _fill(trees: list[Tree], count: Callable[[Tree], int], tokens: int, questions: int) -> MicroBatch:
    """Trees of at most so many tokens and questions, first those with the highest `count` per token."""
    chosen = []
    for tree in sorted(trees, key=lambda tree: count(tree) / tree.tokens, reverse=True):
        if tree.tokens <= tokens and len(tree.samples) <= questions:
            chosen.append(tree)
            tokens, questions = tokens - tree.tokens, questions - len(tree.samples)
    return tuple(chosen)


def memory_budgets(args: argparse.Namespace, model: TreeModel, tokens: int, ranks: Ranks) -> list[float]:
    """Memory budgets to try for a micro-batch of `tokens` tokens, the fastest first; none where nothing is compiled.

    Call it before the optimizer exists: the estimate leaves room for what comes later. A collective.
    """
    if not args.compile or args.dora or ranks.device.type != "cuda":
        return []
    if args.memory_budget != "auto":
        return [args.memory_budget]
    highest = choose_memory_budget(model.base.config, tokens, ranks.device)
    highest = min(dist_utils.gather_to_all(highest))  # compiled alike on every rank
    return [budget for budget in MEMORY_BUDGETS if budget <= highest]


def rehearse_step(
    model, optimizer, dataset: TreeDataset, bounds: Bounds, ranks: Ranks, dtype, budgets: list[float]
) -> None:
    """Run micro-batches as large as any of the run forward and backward, compiled for the first of `budgets` that fits
    on all ranks.

    Raises InputError when memory does not suffice, and RuntimeError when a trained weight gets no finite gradient.
    Weights and optimizer stay as they were.
    """
    started = time.perf_counter()
    micro_batches = [dataset[Assignment(trees)] for trees in dict.fromkeys((bounds.most_patches, bounds.most_answers))]
    for budget in budgets or [None]:
        if budget is not None:
            print0(f"compiling for a memory budget of {budget}: this takes one to three minutes")
            compile_layers(unwrap(model).model, budget)
        # The first pass compiles too. Ranks agree after it, so that none is left waiting in the next attempt.
        own_fits = all(_fits_in_memory(model, batch, ranks, dtype) for batch in micro_batches)
        if fits := all(dist_utils.gather_to_all(own_fits)):
            break
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
    if not fits:
        raise InputError(
            f"a micro-batch of {bounds.tokens:,} tokens does not fit in memory: lower --max-tokens or --max-pixels"
        )
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and (parameter.grad is None or not parameter.grad.isfinite().all()):
            first = dataset.data.samples[micro_batches[0].samples[0]].where
            raise RuntimeError(f"{name} gets no finite gradient from {first}")
    optimizer.zero_grad(set_to_none=True)
    patches, answers = (max(len(getattr(batch, name)) for batch in micro_batches) for name in ("patches", "targets"))
    text = f"rehearsed micro-batches of {bounds.tokens:,} tokens with {patches:,} patches and {answers:,} answer tokens"
    text += f" in {time.perf_counter() - started:.0f} s"
    if ranks.device.type == "cuda":
        text += ", not compiled" if budget is None else f", memory budget {budget}"
        text += f", peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
    print0(text)


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
