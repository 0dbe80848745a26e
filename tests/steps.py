"""One optimizer step of the product over chosen trees, and its comparison with the reference."""

from dataclasses import replace
from pathlib import Path

import tiny
import torch

from dist_utils import Ranks, Stop
from train import train_step
from trees import Assignment, PlanSettings, StepSampler, dropout_seed, group_samples, grow_tree

ALONE = Ranks(0, 1, torch.device("cpu"))


def whole(samples) -> list:
    """A tree for each image, or list of images, with all its questions."""
    trees = [grow_tree(samples, group) for group in group_samples(samples)]
    return [replace(tree, number=number) for number, tree in enumerate(trees)]


def run_step(
    world: Path,
    trees_of_batches: list,
    dropout: float = 0.0,
    seed: int = 0,
    number: int = 0,
    max_grad_norm: float = 0.0,
    **lora,
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of step `number` over micro-batches of trees, whose weights do not move.

    lora: arguments of `tiny.lora_model`.
    """
    data, dataset = tiny.load_world(world)
    model = tiny.lora_model(world, dropout, **lora)
    settings = PlanSettings(len(data.samples), 0, seed)
    (facts,) = {assignment.step for assignment in StepSampler(data.samples, settings, 9999, 0, 1)}
    facts, last = replace(facts, number=number, seed=dropout_seed(seed, number)), len(trees_of_batches) - 1
    batches = [dataset[Assignment(tuple(trees), facts, last=n == last)] for n, trees in enumerate(trees_of_batches)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    loss, *_ = train_step(model, optimizer, batches, 0.0, max_grad_norm, ALONE, torch.float32, Stop())
    return loss, {name.removeprefix("model."): p.grad for name, p in model.named_parameters() if p.requires_grad}


def assert_exact(result: tuple, reference: tuple) -> None:
    """Compare loss and gradients of a step with those of the reference."""
    loss, gradients = abs(result[0] / reference[0] - 1), tiny.relative_error(result[1], reference[1])
    print(f"relative error: loss {loss:.1e}, worst gradient {gradients:.1e}")
    assert loss < 1e-5 and gradients < 1e-5
