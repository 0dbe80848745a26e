"""A program for runs.Run: the optimizer steps of two epochs. Rank 0 writes losses, gradients and samples to a file."""

from collections import Counter
from pathlib import Path

import tiny
import torch

import dist_utils
import trees
from data import TreeDataset, make_loader
from train import by_step, train_step
from trees import PlanSettings, StepSampler


def main(argv: list[str], stop: dist_utils.Stop) -> int:
    world, out, batch_size, per_image, dropout = argv
    trees.IMAGE_COST = trees.MICRO_BATCH_COST = 0.0  # or trees as small as these would not be worth cutting over ranks
    ranks = dist_utils.start()
    data, dataset = tiny.load_world(Path(world))
    settings = PlanSettings(int(batch_size), int(per_image), seed=1)
    sampler = StepSampler(data.samples, settings, 600, ranks.rank, ranks.world_size)
    model = dist_utils.wrap(tiny.lora_model(Path(world), float(dropout)), ranks)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)
    result = {"losses": [], "norms": [], "samples": [], "counts": [], "cut": [], "gradients": None}
    for epoch in range(2):
        sampler.set_epoch(epoch)
        for micro_batches, _ in by_step(make_loader(TreeDataset(data, dataset.settings), sampler, 0, ranks.device)):
            loss, norm, *_ = train_step(model, optimizer, micro_batches, 1e-3, 1.0, ranks, torch.float32, stop)
            result["losses"].append(loss)
            result["norms"].append(norm)
            own = [tree for batch in micro_batches if batch.assignment.in_loss for tree in batch.assignment.trees]
            shards = dist_utils.gather_to_all([(tree.number, i) for tree in own for i in tree.samples])
            result["samples"].append(sorted(i for shard in shards for _, i in shard))
            result["counts"].append([len(shard) for shard in shards])
            ranks_of_trees = Counter(number for shard in shards for number in dict(shard))
            result["cut"].append(max(ranks_of_trees.values()) > 1)
            if result["gradients"] is None:  # after the first step, clipped alike everywhere
                named = dist_utils.unwrap(model).named_parameters()
                result["gradients"] = {name: p.grad.clone() for name, p in named if p.requires_grad}
    result["weights"] = torch.cat([p.detach().flatten() for p in trained])
    if ranks.is_main:
        torch.save(result, out)
    del model, optimizer, trained  # before the process group is left
    dist_utils.leave()
    return 0
