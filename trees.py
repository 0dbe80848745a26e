"""Trees and the step plan: which samples form optimizer step s, and which trees they make.

A tree is one list of images with the questions about it. The plan is a pure function of (samples, settings, seed,
epoch). Each rank takes its share of a step's trees and packs it into micro-batches that its GPU has room for. Neither
the number of GPUs nor their memory changes a loss.
"""

import heapq
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice, zip_longest

import numpy as np
from torch.utils.data import DistributedSampler

# Cost of a tree in units of one language-model token's matrix products, forward and backward, for Qwen3-VL-8B:
# a token 4 x 6.95e9 FLOP (frozen weights: no weight gradient), a vision patch 2 x 0.57e9 FLOP forward only, a pair of
# patches 4 x 1152 x 27 layers, a visible pair of tokens 3.5 x 4 x 4096 x 36 layers. Attention reaches 0.64 of the rate
# of matrix products in the tower, 0.5 in the language model; small kernels take 24 ms per image and 12 ms per
# micro-batch on an H100, where a token takes 42 us (training/costs.py). Only ratios matter. Changing a value changes
# plans, and with them what a resumed run would do: raise PLAN_VERSION in training/compatibility.py.
PATCH_COST = 0.041
PATCH_PAIR_COST = 7.0e-6
TOKEN_PAIR_COST = 1.5e-4
IMAGE_COST = 570.0
MICRO_BATCH_COST = 280.0

LOOK_AHEAD = 64  # trees, or those of two steps, that a step is drawn from, in random order
DRAWS = 32  # random draws for a step, of which the best balanced is kept
BALANCED_FOR = 4, 8, 16  # numbers of ranks that a step's trees should keep busy


@dataclass(frozen=True, slots=True)
class Tree:
    """Samples that share a prefix, one branch each. A part of a tree has some of its branches, with their numbers."""

    samples: tuple[int, ...]  # indices into VQAData.samples, one branch each
    prefix_ids: int  # ids that all branches share; an image counts as one
    prefix_tokens: int  # language-model tokens of the prefix
    branch_tokens: tuple[int, ...]  # language-model tokens of each branch after the prefix
    prefix_cost: float
    branch_costs: tuple[float, ...]
    number: int = 0  # place in its step
    first_branch: int = 1  # number of its first branch in the whole tree
    whole: bool = False  # not to be cut over ranks

    @property
    def tokens(self) -> int:
        return self.prefix_tokens + sum(self.branch_tokens)

    @property
    def cost(self) -> float:
        return self.prefix_cost + sum(self.branch_costs)

    def part(self, start: int, end: int) -> "Tree":
        """The branches at places `start` to `end` - 1, with the whole prefix. The gradients of a tree's parts add up to
        its own: they keep its prefix, and the numbers from which dropout is drawn."""
        fields = {name: getattr(self, name)[start:end] for name in ("samples", "branch_tokens", "branch_costs")}
        return replace(self, **fields, first_branch=self.first_branch + start)


@dataclass(frozen=True)
class TreeShape:
    """How a tree's tokens are laid out: the prefix, from its first sample, then what each sample adds to it."""

    prefix: int  # language-model tokens that all branches share
    branches: np.ndarray  # (samples,) language-model tokens of each branch after the prefix
    encoded: list[tuple[int, int]]  # (sample, image) indices of the images to encode


Step = tuple[Tree, ...]  # whole trees, the costliest first
MicroBatch = tuple[Tree, ...]  # trees and parts of trees


@dataclass(frozen=True)
class StepFacts:
    """An optimizer step as a whole, over all ranks."""

    number: int  # over all epochs, from 0
    questions: int
    images: int  # trees
    answer_weight: float  # divides the step's loss: the number of answer tokens, each times its weight
    tokens: int = 0  # of the language model; a prefix counts once
    flops: float = 0.0  # operations without recomputation; 0 where the model's are not known
    cost: float = 1.0  # of its trees, each once
    paid: float = 1.0  # that of the busiest rank, times the number of ranks
    seed: int = 0  # from which dropout is drawn


@dataclass(frozen=True)
class Assignment:
    """A micro-batch that a rank runs."""

    trees: MicroBatch
    step: StepFacts | None = None  # None in evaluation
    in_loss: bool = True  # False: run with weight 0, so that a rank without work joins the all-reduce
    last: bool = True  # the rank's last of this step


@dataclass(frozen=True)
class PlanSettings:
    batch_size: int  # questions per optimizer step
    questions_per_image: int  # at most so many branches per tree; 0: all
    seed: int
    weights: tuple[float, ...] = ()  # how often an epoch asks the questions of each file of rows; empty: once
    whole_trees: bool = False  # none is cut over ranks

    @property
    def most_branches(self) -> int:
        """Of a tree."""
        return min(self.questions_per_image or self.batch_size, self.batch_size)


# ------------------------------------------------------------------------------------------------------------ geometry


def grow_tree(samples: list, indices: list[int]) -> Tree:
    """The tree of these samples, with the longest prefix that they can share."""
    chosen = [samples[i] for i in indices]
    # The token before an answer predicts the answer's first token, so it must stay in the branch.
    shared = min(sample.before_answers for sample in chosen) - 1
    for sample in chosen[1:]:
        differs = chosen[0].ids[:shared] != sample.ids[:shared]
        shared = int(differs.argmax()) if differs.any() else shared
    shape = tree_shape(chosen, shared)
    prefix, branches = shape.prefix, shape.branches
    # A prefix token sees half of the prefix on average; a branch token all of it and half of its own branch.
    prefix_cost = prefix + TOKEN_PAIR_COST * prefix**2 / 2
    costs = branches + TOKEN_PAIR_COST * branches * (prefix + branches / 2)
    for sample, image in shape.encoded:
        patches = chosen[sample].patches[image]
        cost = IMAGE_COST + PATCH_COST * patches + PATCH_PAIR_COST * patches**2
        if chosen[sample].image_at[image] < shared:
            prefix_cost += cost
        else:
            costs[sample] += cost
    return Tree(tuple(indices), shared, prefix, tuple(branches.tolist()), prefix_cost, tuple(costs.tolist()))


def tree_shape(samples: list, prefix_ids: int) -> TreeShape:
    """The shape of a tree of these samples, which share their first `prefix_ids` ids."""
    prefix = samples[0].tokens_before(prefix_ids)
    branches = np.array([sample.tokens for sample in samples]) - prefix
    # An image in the prefix is encoded once, for the first sample. One after the prefix, say after a first answer, is
    # encoded for every branch that shows it, since each branch has its own image tokens.
    places = ((k, image, at) for k, sample in enumerate(samples) for image, at in enumerate(sample.image_at))
    return TreeShape(prefix, branches, [(k, image) for k, image, at in places if k == 0 or at >= prefix_ids])


def group_numbers(samples: list) -> list[int]:
    """The number of each sample's group. Samples of a group can share a tree: they have the same images, all of them
    before the first answer that is trained, in the same rendering."""
    numbers, by_sample = {}, []
    for index, sample in enumerate(samples):
        end = sample.image_at[-1] + 1 if sample.images else 0
        can_share = sample.images and end < sample.before_answers
        key = (sample.images, sample.ids[:end].tobytes()) if can_share else index
        by_sample.append(numbers.setdefault(key, len(numbers)))
    return by_sample


def group_samples(samples: list) -> list[list[int]]:
    """Indices of samples that can share a tree, group by group."""
    return _by_group(range(len(samples)), group_numbers(samples))


def _by_group(indices: Iterable[int], numbers: list[int]) -> list[list[int]]:
    groups = {}
    for index in indices:
        groups.setdefault(numbers[index], []).append(index)
    return list(groups.values())


def cut_to_fit(tree: Tree, max_tokens: int) -> list[Tree]:
    """A tree whole or, where it has over `max_tokens` tokens, in as few near-equal parts as have not."""
    parts, branches = [tree], range(len(tree.samples))
    while len(parts) < len(branches) and any(part.tokens > max_tokens for part in parts):
        chunks = np.array_split(branches, len(parts) + 1)
        parts = [tree.part(int(chunk[0]), int(chunk[-1]) + 1) for chunk in chunks]
    return parts


# ---------------------------------------------------------------------------------------------------------- the epoch


def questions_by_file(samples: list, settings: PlanSettings) -> list[tuple[list[int], int]]:
    """For each file of rows: the indices of its samples, and how many questions an epoch asks of it.

    The number is the same in every epoch. Files without samples are left out.
    """
    files = [[] for _ in settings.weights or range(1 + max((sample.file for sample in samples), default=0))]
    for index, sample in enumerate(samples):
        files[sample.file].append(index)
    weights = settings.weights or [1] * len(files)
    return [(own, max(1, round(weight * len(own)))) for own, weight in zip(files, weights) if own]


def epoch_passes(samples: list, settings: PlanSettings, epoch: int, groups: list[int]) -> list[list[int]]:
    """Indices of an epoch's samples in passes, each sample at most once per pass. `groups`: their group numbers.

    A file's samples have a fixed order that keeps those of an image together. Each epoch continues in it where the one
    before ended and starts over at its end, so all samples of a file are trained equally often.
    """
    chunks_by_file = []
    for number, (own, count) in enumerate(questions_by_file(samples, settings)):
        own_groups = _by_group(own, groups)
        order = np.random.default_rng([settings.seed, number]).permutation(len(own_groups))
        in_order = np.concatenate([own_groups[place] for place in order])
        asked = in_order[np.arange(epoch * count, (epoch + 1) * count) % len(own)]
        chunks_by_file.append([asked[start : start + len(own)].tolist() for start in range(0, count, len(own))])
    return [sorted(chain(*chunks)) for chunks in zip_longest(*chunks_by_file, fillvalue=[])]


def make_plan(samples: list, settings: PlanSettings, epoch: int) -> list[Step]:
    """All steps of an epoch."""
    return list(plan_steps(samples, settings, epoch, group_numbers(samples)))


def plan_steps(samples: list, settings: PlanSettings, epoch: int, groups: list[int]) -> Iterator[Step]:
    """Yield an epoch's steps, ceil(questions / batch_size) of them, each sample as often as its file's weight says.
    `groups`: the samples' group numbers.

    Images are shuffled, and so are the questions of each. A step takes the tree that has waited longest and random
    ones of those after it until it holds `batch_size` questions. Where no tree fits the last places, the questions of
    one are split over two steps: a step that is not full would change the number of steps, and with it the weight of
    each question.
    """
    random = np.random.default_rng([settings.seed, epoch])
    parts = _shuffled_parts(samples, settings, epoch, groups, random)
    ahead = max(LOOK_AHEAD, 2 * settings.batch_size * len(parts) // sum(map(len, parts)))
    following = (grow_tree(samples, part) for part in parts)
    waiting = list(islice(following, ahead))
    while waiting:
        drawn = _best_draw(waiting, settings.batch_size, random)
        step = [waiting[place] for place in drawn]
        waiting = [tree for place, tree in enumerate(waiting) if place not in drawn]
        waiting += islice(following, ahead - len(waiting))
        room = settings.batch_size - sum(len(tree.samples) for tree in step)
        while room and waiting:
            oldest = list(waiting.pop(0).samples)
            step.append(grow_tree(samples, oldest[:room]))
            if oldest[room:]:
                waiting.insert(0, grow_tree(samples, oldest[room:]))
            room -= len(oldest[:room])
        step.sort(key=lambda tree: -tree.cost)
        yield tuple(replace(tree, number=number, whole=settings.whole_trees) for number, tree in enumerate(step))


def _shuffled_parts(
    samples: list, settings: PlanSettings, epoch: int, groups: list[int], random: np.random.Generator
) -> list[list[int]]:
    """An epoch's questions in random order, at most `most_branches` of the same image together."""
    parts, limit = [], settings.most_branches
    for indices in epoch_passes(samples, settings, epoch, groups):
        for group in _by_group(indices, groups):
            order = random.permutation(group).tolist()
            parts += [order[start : start + limit] for start in range(0, len(order), limit)]
    return [parts[place] for place in random.permutation(len(parts))]


def _best_draw(waiting: list[Tree], batch_size: int, random: np.random.Generator) -> list[int]:
    """Places of the trees of the best of DRAWS random steps.

    Full steps come before others, then the step that keeps the ranks of BALANCED_FOR busiest: image sizes vary, and in
    every step all ranks wait for the slowest.
    """
    questions, costs = [len(tree.samples) for tree in waiting], [tree.cost for tree in waiting]
    draws = [_draw(questions, batch_size, random) for _ in range(DRAWS)]
    is_full = [sum(questions[place] for place in draw) == batch_size for draw in draws]
    return max(zip(is_full, draws), key=lambda pair: (pair[0], _evenness([costs[place] for place in pair[1]])))[1]


def _draw(questions: list[int], room: int, random: np.random.Generator) -> list[int]:
    """Places of trees of at most `room` questions together: the first, so that none waits for long, and random ones."""
    drawn = []
    for place in [0, *(1 + random.permutation(len(questions) - 1)).tolist()]:
        if questions[place] <= room:
            drawn.append(place)
            room -= questions[place]
            if not room:
                break
    return drawn


def _evenness(costs: list[float]) -> float:
    """How busy trees of these costs keep the ranks of BALANCED_FOR, summed over these numbers."""
    total, costs = sum(costs), sorted(costs, reverse=True)
    evenness = 0.0
    for ranks in BALANCED_FOR:
        loads = [0.0] * ranks
        for cost in costs:
            heapq.heapreplace(loads, loads[0] + cost)
        evenness += total / (ranks * max(loads))
    return evenness


# ------------------------------------------------------------------------------------------- ranks and micro-batches


def share_out(step: Step, ranks: int) -> list[MicroBatch]:
    """Each rank's trees of a step, in shares of near-equal cost. Follows from the step and the number of ranks alone.

    Trees are cut over ranks, each part with the whole prefix, where this saves more than the micro-batch that it may
    add, unless they are to stay `whole`. The lowest limit that `_fill` finds shares for is searched by bisection.
    """
    shares = [tuple(step[i] for i in share) for share in balance([tree.cost for tree in step], ranks)]
    for may_cut in (False, True):
        low, high = cost_of(step) / ranks, busiest(shares) - may_cut * MICRO_BATCH_COST
        while high - low > 0.005 * high:
            limit = (low + high) / 2
            if filled := _fill(step, ranks, limit, may_cut):
                shares, high = filled, limit
            else:
                low = limit
    return shares


def _fill(step: Step, ranks: int, limit: float, may_cut: bool) -> list[MicroBatch] | None:
    """Shares that cost at most `limit` each; None where none are found.

    Each tree, the costliest first, goes to the first rank that has room (multifit: Coffman, Garey and Johnson 1978).
    One that fits nowhere is cut: the rank with most room takes as many branches as it can, then the next.
    """
    shares, rooms = [()] * ranks, [limit] * ranks
    for tree in step:
        cost = tree.cost
        rank = next((rank for rank, room in enumerate(rooms) if cost <= room), None)
        pieces = [(rank, tree)] if rank is not None else _cut(tree, rooms) if may_cut and not tree.whole else []
        if not pieces:
            return None
        for rank, part in pieces:
            shares[rank] += (part,)
            rooms[rank] -= part.cost
    return shares


def _cut(tree: Tree, rooms: list[float]) -> list[tuple[int, Tree]]:
    """(rank, part) of a tree's parts, whose cost is at most their rank's room; empty where the rooms don't suffice."""
    pieces, placed = [], 0
    for rank in sorted(range(len(rooms)), key=lambda rank: -rooms[rank]):
        room, end = rooms[rank] - tree.prefix_cost, placed
        while end < len(tree.samples) and tree.branch_costs[end] <= room:
            room -= tree.branch_costs[end]
            end += 1
        if end == placed:  # all are placed, or the next fits nowhere: the rooms that follow are smaller
            break
        pieces.append((rank, placed, end))
        placed = end
    return [(rank, tree.part(*piece)) for rank, *piece in pieces] if placed == len(tree.samples) else []


def pack(trees: Iterable[Tree], max_tokens: int) -> list[MicroBatch]:
    """A rank's trees in micro-batches of near-equal cost within the token budget, the costliest first: the fewest for
    which longest processing time first finds room, which is nearly always the fewest there are."""
    parts = [part for tree in trees for part in cut_to_fit(tree, max_tokens)]
    costs, tokens = [part.cost for part in parts], [part.tokens for part in parts]
    count = -(-sum(tokens) // max_tokens)
    while (bins := balance(costs, count, tokens, max_tokens)) is None:
        count += 1
    return sorted((tuple(parts[i] for i in indices) for indices in bins), key=cost_of, reverse=True)


def balance(costs: list[float], count: int, sizes: list[int] | None = None, room: int = 0) -> list[list[int]] | None:
    """Indices of items in `count` bins of near-equal cost, with `sizes` each of items of at most `room` in size.

    None if they don't fit; with a bin for every item, an item larger than `room` is let in. Longest processing time
    first (Graham 1969): the costliest item goes to the cheapest bin. Without sizes the costliest bin is at most a third
    over the optimum.
    """
    sizes = sizes or [0] * len(costs)
    bins, filled, loads = [[] for _ in range(count)], [0] * count, [0.0] * count
    for index in sorted(range(len(costs)), key=lambda i: -costs[i]):
        open_bins = [b for b in range(count) if filled[b] + sizes[index] <= room]
        if not open_bins and count < len(costs):
            return None
        cheapest = min(open_bins or range(count), key=loads.__getitem__)
        bins[cheapest].append(index)
        filled[cheapest] += sizes[index]
        loads[cheapest] += costs[index]
    return bins


def cost_of(batch: Iterable[Tree]) -> float:
    return sum(tree.cost for tree in batch)


def busiest(shares: Iterable[MicroBatch]) -> float:
    """What the busiest rank's share costs: all others wait for it."""
    return max(map(cost_of, shares))


def rank_efficiency(plan: Iterable[Step], ranks: int) -> float:
    """Share of GPU time that trains: what the plan's trees cost, each once, over what the busiest rank of each step
    costs, times the number of ranks. Ranks that wait and repeated prefixes are waste."""
    cost, paid = 0.0, 0.0
    for step in plan:
        cost, paid = cost + cost_of(step), paid + ranks * busiest(share_out(step, ranks))
    return cost / paid


def dropout_seed(seed: int, step: int) -> int:
    """An int32 for each step of a run."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1).view(np.int32)[0])


class StepSampler(DistributedSampler):
    """A rank's micro-batches of an epoch, step by step, each as an `Assignment`.

    `first_step` skips the part of an epoch that is done. `tree_flops` counts a tree's operations.
    """

    def __init__(
        self,
        samples: list,
        settings: PlanSettings,
        max_tokens: int,
        rank: int,
        world_size: int,
        tree_flops: Callable = lambda tree: 0.0,
    ):
        super().__init__(samples, num_replicas=world_size, rank=rank, seed=settings.seed)
        self.settings, self.max_tokens, self.tree_flops = settings, max_tokens, tree_flops
        self.questions = sum(count for _, count in questions_by_file(samples, settings))  # per epoch
        self.groups, self.first_step = group_numbers(samples), 0

    def __iter__(self):
        # Every rank plans every step, a few milliseconds before it runs, so that none has to send it.
        steps = plan_steps(self.dataset, self.settings, self.epoch, self.groups)
        for number, step in islice(enumerate(steps), self.first_step, None):
            shares = share_out(step, self.num_replicas)
            facts, share = self._facts(step, number, shares), shares[self.rank]
            # A rank without work joins the all-reduce with one branch of the cheapest tree.
            batches = pack(share or [step[-1].part(0, 1)], self.max_tokens)
            for place, batch in enumerate(batches, start=1):
                yield Assignment(batch, facts, in_loss=bool(share), last=place == len(batches))

    def _facts(self, step: Step, number: int, shares: list[MicroBatch]) -> StepFacts:
        number += self.epoch * len(self)
        samples = [self.dataset[i] for tree in step for i in tree.samples]
        weight = sum(float(sample.weights.sum()) for sample in samples)
        tokens, flops = sum(tree.tokens for tree in step), sum(map(self.tree_flops, step))
        cost, paid = cost_of(step), self.num_replicas * busiest(shares)
        seed = dropout_seed(self.settings.seed, number)
        return StepFacts(number, len(samples), len(step), weight, tokens, flops, cost, paid, seed)

    def __len__(self) -> int:
        """Steps of an epoch, the same on every rank (not micro-batches, whose number differs)."""
        return -(-self.questions // self.settings.batch_size)
