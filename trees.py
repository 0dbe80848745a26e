"""Trees and the step plan: which samples form optimizer step s, and how they are packed into micro-batches.

A tree is one list of images with questions about it. The plan is a pure function of (samples, settings, seed, epoch);
ranks only share out a step's micro-batches, so the number of GPUs changes no loss.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from torch.utils.data import DistributedSampler

# Cost of a tree in units of one language-model token's matrix products, forward and backward, for Qwen3-VL-8B:
# a token 4 x 6.95e9 FLOP (frozen weights: no weight gradient), a vision patch 2 x 0.57e9 FLOP forward only, a pair of
# patches 4 x 1152 x 27 layers, a visible pair of tokens 3.5 x 4 x 4096 x 36 layers. Only ratios matter, for balance.
PATCH_COST = 0.041
PATCH_PAIR_COST = 4.5e-6
TOKEN_PAIR_COST = 7.4e-5

LOOK_AHEAD = 64  # trees that a step is drawn from, in random order
DRAWS = 32  # draws of a step, the best balanced of which is kept
RANK_MULTIPLE = 4  # a step has a multiple of this many micro-batches, and is one that so many ranks share evenly


@dataclass(frozen=True)
class Tree:
    samples: tuple[int, ...]  # indices into VQAData.samples, one branch each
    prefix: int  # ids that all branches share (an image counts as one)
    tokens: int  # language-model tokens of the whole tree
    cost: float


MicroBatch = tuple[Tree, ...]
Step = list[MicroBatch]


@dataclass(frozen=True)
class StepFacts:
    """An optimizer step as a whole, over all ranks."""

    number: int  # over all epochs, from 0
    questions: int
    images: int  # trees
    answer_weight: float  # what the step's loss is divided by: its answer tokens, each times its row's weight
    tokens: int = 0  # of the language model: a prefix counts once
    flops: float = 0.0  # operations without recomputation; 0 where the model's are not known


@dataclass(frozen=True)
class Assignment:
    """One micro-batch for one rank. `number` is its place in its step, the same for any number of ranks."""

    trees: MicroBatch
    number: int = 0
    step: StepFacts | None = None  # None in evaluation
    in_loss: bool = True  # False: repeated with weight 0 by a rank that has no other, for it to join the all-reduce
    last: bool = True  # the rank's last of this step


@dataclass(frozen=True)
class PlanSettings:
    batch_size: int  # questions an optimizer step
    questions_per_image: int  # branches a tree at most; 0: all
    max_tokens: int  # of a micro-batch
    seed: int
    weights: tuple[float, ...] = ()  # of each file of rows: how often an epoch asks its questions; empty: once

    @classmethod
    def of(cls, args) -> "PlanSettings":
        """From the settings of a run."""
        names = ("batch_size", "questions_per_image", "max_tokens", "seed")
        return cls(*(getattr(args, name) for name in names), tuple(args.train_weights))


def grow_tree(samples: list, indices: list[int]) -> Tree:
    """The tree of these samples: its prefix is what their ids share, short of the token that predicts an answer."""
    chosen = [samples[i] for i in indices]
    length = min(int(sample.trained.argmax()) for sample in chosen) - 1
    for sample in chosen[1:]:
        differs = chosen[0].ids[:length] != sample.ids[:length]
        length = int(differs.argmax()) if differs.any() else length
    prefix, branches, patches = tree_shape(chosen, length)
    pairs = prefix**2 / 2 + (branches * (prefix + branches / 2)).sum()
    cost = prefix + branches.sum() + TOKEN_PAIR_COST * pairs
    cost += (PATCH_COST * patches + PATCH_PAIR_COST * patches**2).sum()
    return Tree(tuple(indices), length, int(prefix + branches.sum()), float(cost))


def tree_shape(chosen: list, length: int) -> tuple[int, np.ndarray, np.ndarray]:
    """Tokens of the prefix, tokens of each branch, and patches of each image that is encoded, of a tree of the samples
    `chosen`, which share their first `length` ids."""
    prefix = chosen[0].tokens_before(length)
    branches = np.array([sample.tokens for sample in chosen]) - prefix
    patches = [n for k, s in enumerate(chosen) for n, at in zip(s.patches, s.image_at) if not k or at >= length]
    return prefix, branches, np.array(patches)


def group_samples(samples: list, among: Iterable[int] | None = None) -> list[list[int]]:
    """Samples (`among` those of these indices) that can share a tree: the same images in the same rendering, all of
    them before the first answer."""
    groups = {}
    for index in range(len(samples)) if among is None else among:
        sample = samples[index]
        end = sample.image_at[-1] + 1 if sample.images else 0
        can_share = sample.images and end < int(sample.trained.argmax())
        key = (sample.images, sample.ids[:end].tobytes()) if can_share else index
        groups.setdefault(key, []).append(index)
    return list(groups.values())


def questions_by_file(samples: list, settings: PlanSettings) -> list[tuple[list[int], int]]:
    """Of each file of rows: the indices of its samples, and how many questions an epoch asks of it, the same in every
    epoch."""
    files = [[] for _ in settings.weights or range(1 + max((sample.file for sample in samples), default=0))]
    for index, sample in enumerate(samples):
        files[sample.file].append(index)
    weights = settings.weights or [1] * len(files)
    return [(own, max(1, round(weight * len(own)))) for own, weight in zip(files, weights) if own]


def epoch_passes(samples: list, settings: PlanSettings, epoch: int) -> list[list[int]]:
    """The samples of an epoch in passes, each sample once a pass at most.

    A file's samples stand in a fixed order, in which those of an image are neighbours. An epoch goes on in it where
    the one before ended, and round again: all samples of a file are trained equally often.
    """
    passes = []
    for number, (own, count) in enumerate(questions_by_file(samples, settings)):
        groups = group_samples(samples, own)
        places = np.random.default_rng([settings.seed, number]).permutation(len(groups))
        order = np.concatenate([groups[place] for place in places])
        turns = order[np.arange(epoch * count, (epoch + 1) * count) % len(own)]
        for part, start in enumerate(range(0, count, len(own))):
            passes += [[]] * (part == len(passes))
            passes[part] = passes[part] + turns[start : start + len(own)].tolist()
    return [sorted(indices) for indices in passes]


def make_plan(samples: list, settings: PlanSettings, epoch: int) -> list[Step]:
    """The steps of an epoch, ceil(questions / batch_size) of them, each sample as often as its file's weight says.

    Images are shuffled, and the questions of each. A step takes the tree that has waited longest and others drawn
    from the next LOOK_AHEAD, until it holds `batch_size` questions; of DRAWS such draws the one that RANK_MULTIPLE
    ranks share most evenly is kept. Where no tree fits the last places, one is split over two steps.
    """
    random = np.random.default_rng([settings.seed, epoch])
    cap = min(settings.questions_per_image or settings.batch_size, settings.batch_size)
    waiting = []
    passes = epoch_passes(samples, settings, epoch)
    for group in (group for indices in passes for group in group_samples(samples, indices)):
        order = random.permutation(group).tolist()
        waiting += [order[start : start + cap] for start in range(0, len(order), cap)]
    waiting = [_Part(samples, waiting[i], settings.max_tokens) for i in random.permutation(len(waiting))]

    steps = []
    while waiting:
        draws = [_draw(waiting, settings.batch_size, random) for _ in range(DRAWS)]
        packed = [pack([tree for i in draw for tree in waiting[i].trees], settings.max_tokens) for draw in draws]
        full = [sum(len(waiting[i].indices) for i in draw) == settings.batch_size for draw in draws]
        best = max(range(DRAWS), key=lambda n: (full[n], rank_efficiency([packed[n]], RANK_MULTIPLE)))
        step, taken = packed[best], set(draws[best])
        waiting = [part for i, part in enumerate(waiting) if i not in taken]
        room = settings.batch_size - sum(len(tree.samples) for batch in step for tree in batch)
        if room and waiting:
            head, tail = waiting[0].indices[:room], waiting[0].indices[room:]
            trees = [tree for batch in step for tree in batch] + _within(samples, head, settings.max_tokens)
            step, waiting[0] = pack(trees, settings.max_tokens), _Part(samples, tail, settings.max_tokens)
        steps.append(step)
    return steps


class _Part:
    """Questions of one image that wait for a step, with the tree (trees, where over budget) that they make."""

    def __init__(self, samples: list, indices: list[int], max_tokens: int):
        self.indices, self.trees = indices, _within(samples, indices, max_tokens)


def _draw(waiting: list[_Part], room: int, random: np.random.Generator) -> list[int]:
    """Places of parts that fill a step: the first, others of the next LOOK_AHEAD in random order, and where all of
    these fit in, those that follow."""
    draw, near = [], min(len(waiting), LOOK_AHEAD)
    for place in [0, *(1 + random.permutation(near - 1)), *range(near, min(len(waiting), room))]:
        if place == near and len(draw) < near:  # one of these is split to fill the step
            break
        if len(waiting[place].indices) <= room:
            draw.append(place)
            room -= len(waiting[place].indices)
    return draw


def plan_evaluation(samples: list, max_tokens: int, max_trees: int = 0) -> list[MicroBatch]:
    """Every sample once, in order, in as few micro-batches as the budgets allow: the plan of an evaluation.

    `max_trees` bounds a micro-batch's trees; 0: no bound.
    """
    batches, tokens = [[]], 0
    for group in group_samples(samples):
        for tree in _within(samples, group, max_tokens):
            if batches[-1] and (tokens + tree.tokens > max_tokens or len(batches[-1]) == max_trees):
                batches.append([])
                tokens = 0
            batches[-1].append(tree)
            tokens += tree.tokens
    return [tuple(batch) for batch in batches if batch]


def _within(samples: list, indices: list[int], max_tokens: int) -> list[Tree]:
    tree = grow_tree(samples, indices)
    if tree.tokens <= max_tokens or len(indices) == 1:
        return [tree]
    half = len(indices) // 2
    return _within(samples, indices[:half], max_tokens) + _within(samples, indices[half:], max_tokens)


def pack(trees: list[Tree], max_tokens: int) -> Step:
    """Micro-batches of near-equal cost within the token budget, a multiple of RANK_MULTIPLE where trees suffice."""
    count = -(-sum(tree.tokens for tree in trees) // max_tokens)
    while True:
        count = min(len(trees), -(-count // RANK_MULTIPLE) * RANK_MULTIPLE)
        bins, tokens, costs = [[] for _ in range(count)], [0] * count, [0.0] * count
        for tree in sorted(trees, key=lambda tree: -tree.cost):
            free = [b for b in range(count) if tokens[b] + tree.tokens <= max_tokens]
            if not free and count < len(trees):
                break
            cheapest = min(free or range(count), key=costs.__getitem__)
            bins[cheapest].append(tree)
            tokens[cheapest] += tree.tokens
            costs[cheapest] += tree.cost
        else:
            return [tuple(b) for b in sorted(bins, key=cost_of, reverse=True)]
        count += 1


def cost_of(batch) -> float:
    return sum(tree.cost for tree in batch)


def largest_micro_batch(plans: Iterable[list[Step]]) -> MicroBatch:
    """The micro-batch of most tokens."""
    batches = (batch for plan in plans for step in plan for batch in step)
    return max(batches, key=lambda batch: sum(tree.tokens for tree in batch))


def share_out(batches: list[MicroBatch], ranks: int) -> list[list[int]]:
    """Indices of each rank's micro-batches: the costliest first, each to the rank with the least so far."""
    shares, loads = [[] for _ in range(ranks)], [0.0] * ranks
    for index in sorted(range(len(batches)), key=lambda i: -cost_of(batches[i])):
        rank = loads.index(min(loads))
        shares[rank].append(index)
        loads[rank] += cost_of(batches[index])
    return shares


def evaluation_share(batches: list[MicroBatch], rank: int, world_size: int) -> list[Assignment]:
    """A rank's part of an evaluation: every micro-batch goes to exactly one rank."""
    return [Assignment(batches[i], number=i) for i in share_out(batches, world_size)[rank]]


def rank_efficiency(plan: list[Step], ranks: int) -> float:
    """Mean cost over greatest cost of the ranks in a step, over the plan: the share of GPU time that is not waiting."""
    busy = sum(cost_of(batch) for step in plan for batch in step)
    longest = sum(max(sum(cost_of(step[i]) for i in share) for share in share_out(step, ranks)) for step in plan)
    return busy / (ranks * longest)


class StepSampler(DistributedSampler):
    """This rank's micro-batches of an epoch, step by step, as `Assignment`. `first_step` skips an epoch's done part,
    `tree_flops` counts a tree's operations."""

    def __init__(
        self,
        samples: list,
        settings: PlanSettings,
        rank: int,
        world_size: int,
        tree_flops: Callable[[Tree], float] = lambda tree: 0.0,
    ):
        super().__init__(samples, num_replicas=world_size, rank=rank, seed=settings.seed)
        self.settings, self.tree_flops = settings, tree_flops
        self.questions = sum(count for _, count in questions_by_file(samples, settings))  # of an epoch
        self.first_step = 0

    def plan(self) -> list[Step]:
        return make_plan(self.dataset, self.settings, self.epoch)

    def __iter__(self):
        steps = self.plan()
        for number in range(self.first_step, len(steps)):
            step, facts = steps[number], self._facts(steps[number], number)
            share = share_out(step, self.num_replicas)[self.rank]
            for index in share:
                yield Assignment(step[index], index, facts, last=index == share[-1])
            if not share:  # fewer micro-batches than ranks: take part in the all-reduce with the cheapest one
                yield Assignment(step[-1], len(step) - 1, facts, in_loss=False)

    def _facts(self, step: Step, number: int) -> StepFacts:
        trees = [tree for batch in step for tree in batch]
        indices = [i for tree in trees for i in tree.samples]
        weight = sum(self.dataset[i].weight * int(self.dataset[i].trained.sum()) for i in indices)
        tokens, flops = sum(tree.tokens for tree in trees), sum(map(self.tree_flops, trees))
        return StepFacts(self.epoch * len(self) + number, len(indices), len(trees), weight, tokens, flops)

    def __len__(self) -> int:
        """Steps of an epoch, the same on every rank (not micro-batches, whose number differs)."""
        return -(-self.questions // self.settings.batch_size)
