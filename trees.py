"""Trees and the step plan: which samples form optimizer step s, and how they are packed into micro-batches.

A tree is one list of images with the questions about it. The plan is a pure function of (samples, settings, seed,
epoch). Ranks only share out a step's micro-batches, so the number of GPUs changes no loss.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain, zip_longest

import numpy as np
from torch.utils.data import DistributedSampler

# Cost of a tree in units of one language-model token's matrix products, forward and backward, for Qwen3-VL-8B:
# a token 4 x 6.95e9 FLOP (frozen weights: no weight gradient), a vision patch 2 x 0.57e9 FLOP forward only, a pair of
# patches 4 x 1152 x 27 layers, a visible pair of tokens 3.5 x 4 x 4096 x 36 layers. Only ratios matter: the plan
# balances costs. Changing a value changes plans, and with them what a resumed run would do.
PATCH_COST = 0.041
PATCH_PAIR_COST = 4.5e-6
TOKEN_PAIR_COST = 7.4e-5

LOOK_AHEAD = 64  # groups of questions that a step is drawn from, in random order
DRAWS = 32  # random draws for a step, of which the best balanced is kept
RANK_MULTIPLE = 4  # a step has a multiple of this many micro-batches and is balanced for this many ranks


@dataclass(frozen=True)
class Tree:
    samples: tuple[int, ...]  # indices into VQAData.samples, one branch each
    prefix_ids: int  # ids that all branches share; an image counts as one
    tokens: int  # language-model tokens of the whole tree
    cost: float


@dataclass(frozen=True)
class TreeShape:
    """How a tree's tokens are laid out: the prefix, from its first sample, then what each sample adds to it."""

    prefix: int  # language-model tokens that all branches share
    branches: np.ndarray  # (samples,) language-model tokens of each branch after the prefix
    encoded: list[tuple[int, int]]  # (sample, image) indices of the images to encode


MicroBatch = tuple[Tree, ...]
Step = list[MicroBatch]


@dataclass(frozen=True)
class StepFacts:
    """An optimizer step as a whole, over all ranks."""

    number: int  # over all epochs, from 0
    questions: int
    images: int  # trees
    answer_weight: float  # divides the step's loss: the number of answer tokens, each times its weight
    tokens: int = 0  # of the language model; a prefix counts once
    flops: float = 0.0  # operations without recomputation; 0 where the model's are not known


@dataclass(frozen=True)
class Assignment:
    """A micro-batch that a rank runs."""

    trees: MicroBatch
    number: int = 0  # place in the step, the same for any number of ranks: dropout is seeded from it
    step: StepFacts | None = None  # None in evaluation
    in_loss: bool = True  # False: repeated with weight 0, so that a rank without work joins the all-reduce
    last: bool = True  # the rank's last of this step


@dataclass(frozen=True)
class PlanSettings:
    batch_size: int  # questions per optimizer step
    questions_per_image: int  # at most so many branches per tree; 0: all
    max_tokens: int  # per micro-batch
    seed: int
    weights: tuple[float, ...] = ()  # how often an epoch asks the questions of each file of rows; empty: once

    @classmethod
    def of(cls, args) -> "PlanSettings":
        """From the settings of a run."""
        return cls(args.batch_size, args.questions_per_image, args.max_tokens, args.seed, tuple(args.train_weights))


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
    patches = np.array([chosen[sample].patches[image] for sample, image in shape.encoded])
    # A prefix token sees half of the prefix on average; a branch token all of it and half of its own branch.
    pairs = prefix**2 / 2 + (branches * (prefix + branches / 2)).sum()
    cost = prefix + branches.sum() + TOKEN_PAIR_COST * pairs
    cost += (PATCH_COST * patches + PATCH_PAIR_COST * patches**2).sum()
    return Tree(tuple(indices), shared, int(prefix + branches.sum()), float(cost))


def tree_shape(samples: list, prefix_ids: int) -> TreeShape:
    """The shape of a tree of these samples, which share their first `prefix_ids` ids."""
    prefix = samples[0].tokens_before(prefix_ids)
    branches = np.array([sample.tokens for sample in samples]) - prefix
    # An image in the prefix is encoded once, for the first sample. One after the prefix, say after a first answer, is
    # encoded for every branch that shows it, since each branch has its own image tokens.
    places = ((k, image, at) for k, sample in enumerate(samples) for image, at in enumerate(sample.image_at))
    return TreeShape(prefix, branches, [(k, image) for k, image, at in places if k == 0 or at >= prefix_ids])


def group_samples(samples: list, among: Iterable[int] | None = None) -> list[list[int]]:
    """Indices of samples that can share a tree, group by group: those with the same images, all of them before the
    first answer that is trained, in the same rendering. `among` limits them to these indices."""
    groups = {}
    for index in range(len(samples)) if among is None else among:
        sample = samples[index]
        end = sample.image_at[-1] + 1 if sample.images else 0
        can_share = sample.images and end < sample.before_answers
        key = (sample.images, sample.ids[:end].tobytes()) if can_share else index
        groups.setdefault(key, []).append(index)
    return list(groups.values())


def _within_budget(samples: list, indices: list[int], max_tokens: int) -> list[Tree]:
    """One tree of these samples or, where it has over `max_tokens` tokens, several: halves of halves."""
    tree = grow_tree(samples, indices)
    if tree.tokens <= max_tokens or len(indices) == 1:
        return [tree]
    half = len(indices) // 2
    return _within_budget(samples, indices[:half], max_tokens) + _within_budget(samples, indices[half:], max_tokens)


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


def epoch_passes(samples: list, settings: PlanSettings, epoch: int) -> list[list[int]]:
    """Indices of an epoch's samples in passes, each sample at most once per pass.

    A file's samples have a fixed order that keeps those of an image together. Each epoch continues in it where the one
    before ended and starts over at its end, so all samples of a file are trained equally often.
    """
    chunks_by_file = []
    for number, (own, count) in enumerate(questions_by_file(samples, settings)):
        groups = group_samples(samples, own)
        order = np.random.default_rng([settings.seed, number]).permutation(len(groups))
        in_order = np.concatenate([groups[place] for place in order])
        asked = in_order[np.arange(epoch * count, (epoch + 1) * count) % len(own)]
        chunks_by_file.append([asked[start : start + len(own)].tolist() for start in range(0, count, len(own))])
    return [sorted(chain(*chunks)) for chunks in zip_longest(*chunks_by_file, fillvalue=[])]


class _Group:
    """Questions of one image that enter a step together, and their tree, or trees where one is over budget."""

    def __init__(self, samples: list, indices: list[int], max_tokens: int):
        self.indices, self.trees = indices, _within_budget(samples, indices, max_tokens)


def make_plan(samples: list, settings: PlanSettings, epoch: int) -> list[Step]:
    """The steps of an epoch, ceil(questions / batch_size) of them, each sample as often as its file's weight says.

    Images are shuffled, and so are the questions of each. A step takes the group that has waited longest and random
    ones of the next LOOK_AHEAD until it holds `batch_size` questions. Where no group fits the last places, one is split
    over two steps.
    """
    random = np.random.default_rng([settings.seed, epoch])
    queue, steps = _shuffled_groups(samples, settings, epoch, random), []
    while queue:
        step, drawn = _best_draw(queue, settings, random)
        queue = [group for place, group in enumerate(queue) if place not in drawn]
        room = settings.batch_size - sum(len(tree.samples) for tree in trees_of(step))
        if room and queue:
            # A step that is not full would change the number of steps, and the weight of each question with it.
            head, tail = queue[0].indices[:room], queue[0].indices[room:]
            step = pack(trees_of(step) + _within_budget(samples, head, settings.max_tokens), settings.max_tokens)
            queue[0] = _Group(samples, tail, settings.max_tokens)
        steps.append(step)
    return steps


def _shuffled_groups(samples: list, settings: PlanSettings, epoch: int, random: np.random.Generator) -> list[_Group]:
    """An epoch's questions in random order, in groups of at most `questions_per_image` of the same image."""
    limit = min(settings.questions_per_image or settings.batch_size, settings.batch_size)
    parts = []
    for indices in epoch_passes(samples, settings, epoch):
        for group in group_samples(samples, indices):
            order = random.permutation(group).tolist()
            parts += [order[start : start + limit] for start in range(0, len(order), limit)]
    return [_Group(samples, parts[place], settings.max_tokens) for place in random.permutation(len(parts))]


def _best_draw(queue: list[_Group], settings: PlanSettings, random: np.random.Generator) -> tuple[Step, set[int]]:
    """The best of DRAWS random steps, and the places of its groups in the queue.

    Full steps come before others, then the step that RANK_MULTIPLE ranks share most evenly: image sizes vary, and in
    every step all ranks wait for the slowest.
    """
    draws = [_draw(queue, settings.batch_size, random) for _ in range(DRAWS)]
    steps = [pack([tree for place in draw for tree in queue[place].trees], settings.max_tokens) for draw in draws]
    is_full = [sum(len(queue[place].indices) for place in draw) == settings.batch_size for draw in draws]
    best = max(range(DRAWS), key=lambda n: (is_full[n], rank_efficiency([steps[n]], RANK_MULTIPLE)))
    return steps[best], set(draws[best])


def _draw(queue: list[_Group], room: int, random: np.random.Generator) -> list[int]:
    """Places in the queue of groups that have at most `room` questions together.

    The first group is always among them, so that none waits for long. Random ones of the next LOOK_AHEAD follow and,
    if all of these fit, those after them.
    """
    drawn, near = [], min(len(queue), LOOK_AHEAD)
    for place in [0, *(1 + random.permutation(near - 1)), *range(near, min(len(queue), room))]:
        if place == near and len(drawn) < near:  # a near group did not fit: make_plan fills up with a part of one
            break
        if len(queue[place].indices) <= room:
            drawn.append(place)
            room -= len(queue[place].indices)
    return drawn


def plan_evaluation(samples: list, max_tokens: int, max_trees: int = 0) -> list[MicroBatch]:
    """Every sample once, in order, in as few micro-batches as the budgets allow.

    `max_trees` limits the trees of a micro-batch; 0: no limit.
    """
    batches, tokens = [[]], 0
    for group in group_samples(samples):
        for tree in _within_budget(samples, group, max_tokens):
            if batches[-1] and (tokens + tree.tokens > max_tokens or len(batches[-1]) == max_trees):
                batches.append([])
                tokens = 0
            batches[-1].append(tree)
            tokens += tree.tokens
    return [tuple(batch) for batch in batches if batch]


# ------------------------------------------------------------------------------------------- micro-batches and ranks


def pack(trees: list[Tree], max_tokens: int) -> Step:
    """Micro-batches of near-equal cost within the token budget, a multiple of RANK_MULTIPLE where trees suffice."""
    costs, tokens = [tree.cost for tree in trees], [tree.tokens for tree in trees]
    count = -(-sum(tokens) // max_tokens)
    while True:
        count = min(len(trees), -(-count // RANK_MULTIPLE) * RANK_MULTIPLE)
        bins = _balance(costs, count, tokens, max_tokens)
        if bins is not None:
            return sorted((tuple(trees[i] for i in indices) for indices in bins), key=cost_of, reverse=True)
        count += 1


def _balance(costs: list[float], count: int, sizes: list[int], room: int) -> list[list[int]] | None:
    """Indices of items in `count` bins of near-equal cost, each with items of at most `room` in size.

    None if they don't fit; with a bin for every item, an item larger than `room` is let in. Longest processing time
    first (Graham 1969): the costliest item goes to the cheapest bin. Without sizes the costliest bin is at most a third
    over the optimum.
    """
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


def trees_of(step: Step) -> list[Tree]:
    return [tree for batch in step for tree in batch]


def cost_of(batch: Iterable[Tree]) -> float:
    return sum(tree.cost for tree in batch)


def largest_micro_batch(plans: Iterable[list[Step]]) -> MicroBatch:
    """The micro-batch of most tokens, which needs the most memory."""
    batches = (batch for plan in plans for step in plan for batch in step)
    return max(batches, key=lambda batch: sum(tree.tokens for tree in batch))


def share_out(batches: list[MicroBatch], ranks: int) -> list[list[int]]:
    """Indices of each rank's micro-batches, which cost every rank about the same."""
    return _balance(list(map(cost_of, batches)), ranks, [0] * len(batches), room=0)


def evaluation_share(batches: list[MicroBatch], rank: int, world_size: int) -> list[Assignment]:
    """A rank's part of an evaluation: every micro-batch goes to exactly one rank."""
    return [Assignment(batches[i], number=i) for i in share_out(batches, world_size)[rank]]


def rank_efficiency(plan: list[Step], ranks: int) -> float:
    """Share of GPU time that is not spent waiting for the slowest rank of a step: the ranks' mean cost over their
    greatest, both summed over the plan."""
    busy = sum(cost_of(batch) for step in plan for batch in step)
    longest = sum(max(sum(cost_of(step[i]) for i in share) for share in share_out(step, ranks)) for step in plan)
    return busy / (ranks * longest)


class StepSampler(DistributedSampler):
    """A rank's micro-batches of an epoch, step by step, each as an `Assignment`.

    `first_step` skips the part of an epoch that is done. `tree_flops` counts a tree's operations.
    """

    def __init__(
        self, samples: list, settings: PlanSettings, rank: int, world_size: int, tree_flops: Callable = lambda tree: 0.0
    ):
        super().__init__(samples, num_replicas=world_size, rank=rank, seed=settings.seed)
        self.settings, self.tree_flops = settings, tree_flops
        self.questions = sum(count for _, count in questions_by_file(samples, settings))  # per epoch
        self.first_step = 0

    def plan(self) -> list[Step]:
        return make_plan(self.dataset, self.settings, self.epoch)

    def __iter__(self):
        # Every rank makes the whole plan, in one to two seconds for 40,000 questions, so that none has to send it.
        for number, step in enumerate(self.plan()[self.first_step :], start=self.first_step):
            facts, share = self._facts(step, number), share_out(step, self.num_replicas)[self.rank]
            for index in share:
                yield Assignment(step[index], index, facts, last=index == share[-1])
            if not share:  # fewer micro-batches than ranks: the all-reduce needs every rank, so run the cheapest again
                yield Assignment(step[-1], len(step) - 1, facts, in_loss=False)

    def _facts(self, step: Step, number: int) -> StepFacts:
        trees = trees_of(step)
        samples = [self.dataset[i] for tree in trees for i in tree.samples]
        weight = sum(float(sample.weights.sum()) for sample in samples)
        tokens, flops = sum(tree.tokens for tree in trees), sum(map(self.tree_flops, trees))
        return StepFacts(self.epoch * len(self) + number, len(samples), len(trees), weight, tokens, flops)

    def __len__(self) -> int:
        """Steps of an epoch, the same on every rank (not micro-batches, whose number differs)."""
        return -(-self.questions // self.settings.batch_size)
