"""Process group, ranks and the few collectives that the loop needs. The only file that knows torch.distributed.

Every helper is a no-op on one process, so the same code runs with and without torchrun.
"""

import gc
import os
import random
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

TIMEOUT = timedelta(minutes=60)  # the first start may download a model while the other ranks wait


@dataclass(frozen=True)
class Ranks:
    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def start(use_cuda: bool | None = None) -> Ranks:
    """Join the process group that torchrun describes in the environment; one process needs none.

    Tensors on GPUs travel by NCCL, tensors and objects on the CPU by gloo.
    """
    rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    use_cuda = torch.cuda.is_available() if use_cuda is None else use_cuda
    if use_cuda and local_rank >= torch.cuda.device_count():
        raise ValueError(f"local rank {local_rank} has no GPU: {torch.cuda.device_count()} visible (--nproc_per_node)")
    device = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(device)
    if world_size > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if use_cuda else "gloo", timeout=TIMEOUT)
    return Ranks(rank, local_rank, world_size, device)


def stop() -> None:
    """Leave the group. Call after the last reference to the DDP model is gone: a live one can abort at exit."""
    if dist.is_initialized():
        gc.collect()
        dist.barrier()
        dist.destroy_process_group()


def print0(*values) -> None:
    if int(os.environ.get("RANK", 0)) == 0:
        print(*values, flush=True)


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def from_rank0(function: Callable):
    """Run `function` on rank 0 and give its result, or the exception it raised, to every rank."""
    outcome = [None, None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            outcome[0] = function()
        except Exception as error:  # re-raised below, on every rank: none is left waiting
            outcome[1] = error
    if dist.is_initialized():
        dist.broadcast_object_list(outcome, device=torch.device("cpu"))
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def local_rank0_first(function: Callable):
    """Run `function` on the first rank of every node, then on the others, which find what it left in the cache."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    result = function() if first else None
    barrier()
    return result if first else function()


def gather_to_all(value) -> list:
    """Every rank's value, in the order of ranks."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def all_reduce_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over the ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def wrap(module: torch.nn.Module, ranks: Ranks) -> torch.nn.Module:
    """DDP over the trainable parameters, which start as rank 0's. Frozen ones are equal already and do not travel."""
    if ranks.world_size == 1:
        return module
    for parameter in module.parameters():
        if parameter.requires_grad:
            dist.broadcast(parameter.data, src=0)
    ids = [ranks.local_rank] if ranks.device.type == "cuda" else None
    return DistributedDataParallel(
        module, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True, init_sync=False
    )


def unwrap(module: torch.nn.Module) -> torch.nn.Module:
    return module.module if isinstance(module, DistributedDataParallel) else module


def no_sync(module: torch.nn.Module, skip: bool):
    """Leave out the gradient all-reduce while `skip`; it must cover the forward pass too."""
    return module.no_sync() if skip and isinstance(module, DistributedDataParallel) else nullcontext()


def seed_everything(*numbers: int) -> None:
    """Seed Python, numpy and torch from whole numbers such as (seed, step, micro-batch), never from a rank."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
