"""The rehearsal: what could fail for the first time in hour three runs before step 1, and leaves nothing behind."""

import argparse
import shutil
import time
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
from trees import Assignment, MicroBatch


def memory_budgets(args: argparse.Namespace, model: TreeModel, largest: MicroBatch, ranks: Ranks) -> list[float]:
    """Memory budgets to try for the largest micro-batch, the fastest first; none where nothing is compiled.

    Call it before the optimizer exists: the estimate leaves room for what comes later. A collective.
    """
    if not args.compile or args.dora or ranks.device.type != "cuda":
        return []
    if args.memory_budget != "auto":
        return [args.memory_budget]
    tokens = sum(tree.tokens for tree in largest)
    highest = choose_memory_budget(model.base.config, tokens, ranks.device)
    highest = min(dist_utils.gather_to_all(highest))  # compiled alike on every rank
    return [budget for budget in MEMORY_BUDGETS if budget <= highest]


def rehearse_step(
    model, optimizer, dataset: TreeDataset, largest: MicroBatch, ranks: Ranks, dtype, budgets: list[float]
) -> None:
    """Run the largest micro-batch forward and backward, compiled for the first of `budgets` that fits on all ranks.

    Raises InputError when memory does not suffice, and RuntimeError when a trained weight gets no finite gradient.
    Weights and optimizer stay as they were.
    """
    tokens, started = sum(tree.tokens for tree in largest), time.perf_counter()
    batch = dataset[Assignment(largest)].to(ranks.device)
    for budget in budgets or [None]:
        if budget is not None:
            print0(f"compiling for a memory budget of {budget}: this takes one to three minutes")
            compile_layers(unwrap(model).model, budget)
        # The first pass compiles too. Ranks agree after it, so that none is left waiting in the next attempt.
        if fits := all(dist_utils.gather_to_all(_fits_in_memory(model, batch, ranks, dtype))):
            break
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
    if not fits:
        raise InputError(
            f"the largest micro-batch ({tokens:,} tokens) does not fit in memory: lower --max-tokens or --max-pixels"
        )
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and (parameter.grad is None or not parameter.grad.isfinite().all()):
            raise RuntimeError(f"{name} gets no finite gradient from {dataset.data.samples[batch.samples[0]].where}")
    optimizer.zero_grad(set_to_none=True)
    text = f"rehearsed the largest micro-batch ({tokens:,} tokens) in {time.perf_counter() - started:.0f} s"
    if ranks.device.type == "cuda":
        text += ", not compiled" if budget is None else f", memory budget {budget}"
        text += f", peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
    print0(text)


def _fits_in_memory(model, batch, ranks: Ranks, dtype) -> bool:
    """Forward and backward without a collective: a rank that runs out of memory must not leave the others waiting."""
    try:
        with no_sync(model, skip=True):
            with autocast(ranks.device, dtype):
                token_losses, _ = model(batch)
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
