"""What a run will do, take and need, from its rows, settings and config.json alone: `train.py --plan`.

Time follows from the operations of every micro-batch of the busiest rank at the rates of one GPU, and from the
all-reduce at those of the links (costs.py); memory from the formula that also picks the memory budget of a run
(modeling/memory.py). Waiting for images and the first check of all images are left out.
"""

import argparse
import math
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText, PretrainedConfig

import trees
from data import FLEX_BLOCK, VQAData, at_limit
from dist_utils import Ranks, print0
from evaluation.runner import plan_evaluation
from inputs.images import ImageSettings
from modeling.linear import weight_bytes
from modeling.lora import add_lora, lora_table
from modeling.memory import EAGER_SHARE, MEMORY_BUDGETS, kept_bytes, memory_margin, state_bytes
from modeling.precision import forward_precision
from training.checkpoints import step_of
from training.costs import (
    EAGER_TIME,
    GPUS_PER_NODE,
    LAST_LAYER_SHARE,
    NETWORK,
    SLOWER,
    all_reduce_seconds,
    batch_seconds,
    known_gpu,
    slowdown,
    tree_load,
    uncounted,
)
from training.gpus import GPUS, Gpu
from training.scaling import GPU_COUNTS, batch_size_remedy, plan_settings, spread
from training.settings import count_steps, is_due, lora_arguments
from trees import MicroBatch, Step

GIB = 2**30
# A start of the 8B with nothing compiled before, with 16 cores and an H200: 45 to 69 s on three machines, median 52
# (bench/results/start-shared-h200.json, start-three-h200.json and two that were printed only, docs/benchmarks.md)
START_S = 30  # without compiling: bench/results/start-not-compiled-h200.json
COMPILE_S = 24  # where all decoder layers share their graphs
LAST_LAYER_S = 18  # more where the last one has its own, in training and in evaluation: one start, docs/benchmarks.md
SAVE_BYTES_S = 0.3e9  # writing and hashing a checkpoint on the disk of a small machine
OF_QWEN3_5 = (
    "  Qwen3.5: fitted to steps of the 9B, H200, flash-linear-attention and flash-qla\n"
    "  where its kernels never ran, compiling them takes 2 to 4 minutes more, not counted"
)
LISTED_EVENTS = 8  # evaluations and checkpoints that the table shows at most


# --------------------------------------------------------------------------------------------------------------- a run


@dataclass
class Job:
    """What the estimates need to know about a run."""

    args: argparse.Namespace
    config: PretrainedConfig
    train: VQAData
    val: VQAData | None
    plan: list[Step]  # of the first epoch, some hundred of its steps at most: all others are assumed to cost the same
    steps_per_epoch: int
    val_batches: list[MicroBatch]
    largest: int  # tokens of the largest micro-batch
    weight_bytes: int  # of the base model
    lora: int  # parameters that are trained
    done: int = 0  # steps that the run has behind it

    @property
    def checkpoint_bytes(self) -> int:
        return 3 * 4 * self.lora  # the adapter, and AdamW's two moments of it

    @property
    def gradient_bytes(self) -> int:
        return 4 * self.lora  # float32, which all GPUs add up once a step


def make_job(
    args: argparse.Namespace,
    config: PretrainedConfig,
    train: VQAData,
    val: VQAData | None,
    plan: list[Step],
    largest: int,
    model: PeftModel | None = None,
) -> Job:
    """`plan` is the first epoch's; `largest` the most tokens that a micro-batch may have; `model` the run's, if it is
    there already."""
    # Counted on the model itself, not by a formula: --lora-targets may name any layer.
    model = model or empty_model(config, args)
    lora = sum(count for _, count in lora_table(model).values())
    weights = weight_bytes(model.get_base_model(), args.base_precision)
    val_batches = plan_evaluation(val.samples, args.max_tokens) if val else []
    return Job(args, config, train, val, spread(plan), len(plan), val_batches, largest, weights, lora)


def empty_model(config: PretrainedConfig, args: argparse.Namespace) -> PeftModel:
    """The model with LoRA as settings say, without memory for weights. Raises InputError for wrong --lora-targets."""
    with torch.device("meta"):
        return add_lora(AutoModelForImageTextToText.from_config(config), args.model, **lora_arguments(args))


# -------------------------------------------------------------------------------------------------------------- memory


@dataclass
class Budget:
    """A memory budget, as `--memory-budget` has it, and what it means for a run."""

    share: float | None  # of activations kept; None: layers are not compiled
    slower: float  # step time against budget 1
    peak: float  # bytes that a GPU holds at once
    fits: bool

    def costs(self, training: float) -> tuple[float, float]:
        """Seconds of compiling, and the step time against budget 1, of a run whose training takes `training` seconds
        at budget 1."""
        if self.share is None:
            return 0, self.slower
        if last_layer_pays(self.slower * training):
            return COMPILE_S + LAST_LAYER_S, self.slower
        return COMPILE_S, (1 + LAST_LAYER_SHARE) * self.slower

    def seconds(self, training: float) -> float:
        """Of compiling, and of training that takes `training` seconds at budget 1."""
        compiling, slower = self.costs(training)
        return compiling + slower * training


def last_layer_pays(training: float) -> bool:
    """Whether a last layer that is compiled on its own, to leave out tokens before its MLP, saves more than it takes in
    `training` seconds."""
    return LAST_LAYER_SHARE * training > LAST_LAYER_S


def may_stay_uncompiled(args: argparse.Namespace) -> bool:
    """Whether --compile auto weighs the time of compiling. Other precisions are slower than bf16 without it."""
    return (args.compile, args.memory_budget, args.base_precision) == ("auto", "auto", "bf16")


def budgets(job: Job, gpu: Gpu, tokens: int) -> list[Budget]:
    """The memory budgets that a run may choose from for micro-batches of `tokens` tokens, the leanest last."""
    kept, states = kept_bytes(job.config, tokens), state_bytes(job.config, min(job.args.batch_size, tokens))
    room = gpu.memory_gib * GIB - job.weight_bytes - 4 * job.lora - memory_margin(gpu.memory_gib * GIB) - states
    fixed = job.weight_bytes + 4 * 4 * job.lora + states  # float32 LoRA, its gradient, AdamW's two moments
    costs, args = [], job.args
    if args.compile == "off" or may_stay_uncompiled(args):
        costs.append((None, EAGER_SHARE, EAGER_TIME))
    if args.compile != "off":
        shares = SLOWER if args.memory_budget == "auto" else [args.memory_budget]
        measured = list(zip(*sorted(MEMORY_BUDGETS.items())))
        costs += [(share, np.interp(share, *measured), slowdown(share)) for share in shares]
    return [Budget(share, slower, fixed + part * kept, part * kept < room) for share, part, slower in costs]


def choose(options: list[Budget], training: float = math.inf) -> Budget:
    """The one that fits and ends first, of training that takes `training` seconds at budget 1. The leanest where none
    fits."""
    fitting = [option for option in options if option.fits]
    return min(fitting, key=lambda option: (option.seconds(training), option.slower)) if fitting else options[-1]


def remedy(job: Job, gpu: Gpu, images: ImageSettings) -> str:
    """The settings that would make a run fit that fits with no memory budget. Both limits are found by bisection."""
    # Memory grows with tokens, so there is one largest number that fits. Batches are padded to whole blocks.
    candidates = range(FLEX_BLOCK, job.largest, FLEX_BLOCK)
    count = bisect_left(candidates, True, key=lambda tokens: not budgets(job, gpu, tokens)[-1].fits)
    tokens = candidates[count - 1] if count else 0

    def too_long(limit: int) -> bool:
        return max(sample.tokens for sample in at_limit(job.train, images, limit).samples) > tokens

    if not too_long(images.max_pixels):
        return f"--max-tokens {tokens} would fit"
    # A picture's tokens alone may be over that limit: then it has to be smaller, in steps of one image token.
    pixels = (images.patch_size * images.merge_size) ** 2
    limits = range(max(pixels, images.min_pixels), largest_picture(job.train, images), pixels)
    count = bisect_left(limits, True, key=too_long)
    return f"--max-tokens {tokens} --max-pixels {limits[count - 1]} would fit" if count else "no settings would fit"


def largest_picture(data: VQAData, images: ImageSettings) -> int:
    """Pixels of the largest picture after resizing."""
    return max((down * across for down, across in data.grids.values()), default=0) * images.patch_size**2


# ---------------------------------------------------------------------------------------------------------------- time


class Pace(NamedTuple):
    """Seconds that a number of GPUs take."""

    steps: list[float]  # for each step of Job.plan
    evaluation: float
    training: float  # of all steps that the run has before it, at budget 1 and without the all-reduce
    budget: Budget
    compiling: float


def pace(job: Job, gpu: Gpu, options: list[Budget], gpu_counts: Iterable[int]) -> dict[int, Pace]:
    """By number of GPUs, each with the one of `options` that ends first there. A step takes as long as the rank that
    has the most to do, and the all-reduce after it."""
    load = cache(lambda tree: tree_load(job.config, job.train.samples, tree))  # most trees are whole on any number
    precision, family = job.args.base_precision, job.config.model_type

    def share_seconds(share: MicroBatch) -> float:
        batches = trees.pack(share, job.args.max_tokens)
        return sum(batch_seconds(list(map(load, batch)), gpu, precision=precision, family=family) for batch in batches)

    loads = ([tree_load(job.config, job.val.samples, tree) for tree in batch] for batch in job.val_batches)
    of_evaluation = forward_precision(precision)
    val_s = [batch_seconds(of_batch, gpu, False, of_evaluation, family) for of_batch in loads]
    costs = list(map(trees.cost_of, job.val_batches))
    paces, left = {}, count_steps(job.args, job.steps_per_epoch, job.args.epochs) - job.done
    for gpus in gpu_counts:
        reduced = all_reduce_seconds(job.gradient_bytes, gpus, gpu)
        work = [max(map(share_seconds, trees.share_out(step, gpus))) for step in job.plan]
        training = left * float(np.mean(work))
        budget = choose(options, training)
        compiling, slower = budget.costs(training)
        steps = [slower * seconds + reduced for seconds in work]
        evaluation = max(sum(val_s[i] for i in share) for share in trees.balance(costs, gpus))
        paces[gpus] = Pace(steps, evaluation, training, budget, compiling)
    return paces


def timeline(job: Job, times: Pace, epochs: int) -> list[tuple[int, str, float]]:
    """Evaluations and checkpoints as (steps done, their names, seconds from the start to their end).

    Checkpoints of new best evaluations can't be foreseen.
    """
    steps = count_steps(job.args, job.steps_per_epoch, epochs)
    now = START_S + times.compiling
    events = [(0, "training starts", now)]
    # Every epoch draws other steps from the same trees: the first one's times stand for all of them.
    for step in range(1, steps + 1):
        place = (step - 1) % job.steps_per_epoch
        now += times.steps[place * len(times.steps) // job.steps_per_epoch]
        follows = []
        if job.val_batches and is_due(job.args.eval_every, step, steps):
            follows.append("evaluation")
            now += times.evaluation
        if is_due(job.args.save_every, step, steps):
            follows.append("checkpoint")
            now += job.checkpoint_bytes / SAVE_BYTES_S
        events += [(step, ", ".join(follows), now)] if follows else []
    return events


def hours(job: Job, times: Pace, epochs: int = 0) -> float:
    """Hours of the whole run, or of one with so many epochs."""
    return timeline(job, times, epochs or job.args.epochs)[-1][2] / 3600


def compare_with_plan(run, seconds: float) -> None:
    """Print the planned hours and memory of a train.Run beside what it took, where its costs are known. The plan
    takes the memory budget that the run had: `choose` assumes a whole GPU, and might pick another."""
    args, prepared, gpus = run.args, run.prepared, run.ranks.world_size
    gpu = known_gpu(run.ranks.device)
    if not gpu or uncounted(prepared.config, args):
        return
    job = make_job(args, prepared.config, prepared.train, prepared.val, prepared.plan, prepared.bounds.tokens)
    (budget,) = (option for option in budgets(job, gpu, job.largest) if option.share == run.memory_budget)
    planned, peak = hours(job, pace(job, gpu, [budget], [gpus])[gpus]), torch.cuda.max_memory_allocated()
    print0(
        f"planned {planned:.2f} h, took {seconds / 3600:.2f} h; "
        f"planned peak {budget.peak / GIB:.1f} GiB, peak was {peak / GIB:.1f} GiB"
    )


def training_seconds(args: argparse.Namespace, prepared, model: PeftModel, ranks: Ranks) -> float:
    """Seconds of the run's remaining steps at budget 1, infinite where costs are not known. `prepared` is what
    training.preparation.prepare gave."""
    gpu = known_gpu(ranks.device)
    if not gpu or uncounted(prepared.config, args):
        return math.inf
    rows = prepared.train, prepared.val, prepared.plan
    job = make_job(args, prepared.config, *rows, prepared.bounds.tokens, model)
    job.done = step_of(prepared.checkpoint) if prepared.checkpoint else 0
    return pace(job, gpu, [Budget(1.0, 1.0, 0, True)], [ranks.world_size])[ranks.world_size].training


def compiling_pays(share: float, training: float) -> bool:
    """Whether compiling layers for a memory budget takes less time than it saves in training that takes `training`
    seconds at budget 1. It prints the answer, unless `training` is infinite."""
    eager, compiled = Budget(None, EAGER_TIME, 0, True), Budget(share, slowdown(share), 0, True)
    pays = choose([eager, compiled], training) is compiled
    if training < math.inf:
        compiling, slower = compiled.costs(training)
        print0(
            f"layers are {'' if pays else 'not '}compiled (--compile auto): "
            f"compiling takes {compiling} s and saves {(eager.slower - slower) * training:,.0f} s of training"
        )
    return pays


# ---------------------------------------------------------------------------------------------------------- the report


def report(job: Job, images: ImageSettings) -> str:
    """What --plan says about memory, time and disk on --gpu."""
    args, gpu = job.args, GPUS[job.args.gpu]
    options = budgets(job, gpu, job.largest)
    times = pace(job, gpu, options, GPU_COUNTS)
    rates = "measured" if gpu.measured else "derived from data sheets, not measured"
    # The same steps on every card: --gpu changes times and budgets, never the plan.
    precision = f" with --base-precision {args.base_precision}" * (args.base_precision != "bf16")
    lines = [f"{args.model} in bfloat16{precision} on {args.gpu}, its rates {rates}"]
    if job.config.model_type == "qwen3_5":
        lines.append(OF_QWEN3_5)
    lines += memory_lines(job, gpu, options, times)
    if not options[-1].fits:
        lines.append(f"  does not fit {args.gpu}: {remedy(job, gpu, images)}")
    lines += time_lines(job, times)
    for limit, smaller in with_smaller_pictures(job, images).items():
        tokens = count_tokens(smaller.plan) / count_tokens(job.plan)
        ends = [hours(smaller, of_gpus) for of_gpus in pace(smaller, gpu, options, GPU_COUNTS).values()]
        lines.append(_columns(f"with --max-pixels {limit}, {tokens:.0%} of tokens", ends))
    lines += scaling_lines(job, gpu)
    if args.time_limit:
        lines.append(limit_line(job, times))
    mib, count = job.checkpoint_bytes / 2**20, args.keep + 2
    disk = (
        f"disk: {count} checkpoints (--keep, the best, one being written) of {mib:,.0f} MiB are {count * mib:,.0f} MiB"
    )
    return "\n".join([*lines, disk])


def memory_lines(job: Job, gpu: Gpu, options: list[Budget], times: dict[int, Pace]) -> list[str]:
    lines = [
        f"memory: {job.weight_bytes / GIB:.1f} GiB weights, "
        f"{16 * job.lora / GIB:.2f} GiB LoRA with gradient and optimizer",
        f"  activations of {job.largest:,} tokens; "
        f"{memory_margin(gpu.memory_gib * GIB) / GIB:.1f} of {gpu.memory_gib} GiB stay free",
    ]
    for option in options:
        name = "not compiled" if option.share is None else f"memory budget {option.share:g}"
        verdict = "fits" if option.fits else "does not fit"
        if option.fits and (on := [str(gpus) for gpus, of_gpus in times.items() if of_gpus.budget is option]):
            verdict += ", chosen" + f" on {', '.join(on)}" * (len(on) < len(times))
        lines.append(f"  {name:<18} {option.peak / GIB:6.1f} GiB, {option.slower:.2f} x step time, {verdict}")
    return lines


def time_lines(job: Job, times: dict[int, Pace]) -> list[str]:
    """A table with one column per number of GPUs: when evaluations and checkpoints are done, and the run is."""
    runs = [timeline(job, of_gpus, job.args.epochs) for of_gpus in times.values()]
    rows = [
        _columns(f"step {events[0][0]:,}: {events[0][1]}", [seconds / 3600 for _, _, seconds in events])
        for events in zip(*runs)
    ]
    if len(rows) > LISTED_EVENTS + 1:  # "1 more" would take the place of that one
        rows[LISTED_EVENTS // 2 : -LISTED_EVENTS // 2] = [f"  ... {len(rows) - LISTED_EVENTS} more"]
    return [
        _columns("hours from the start, by number of GPUs", list(times), "d"),
        *rows,
        _columns("GPU hours", [gpus * events[-1][2] / 3600 for gpus, events in zip(times, runs)]),
        _columns("rank efficiency", [trees.rank_efficiency(job.plan, gpus) for gpus in times], ".0%"),
    ]


def scaling_lines(job: Job, gpu: Gpu) -> list[str]:
    """What adding up gradients takes, and which --batch-size would keep more GPUs busy."""
    most = GPU_COUNTS[-1]
    node, counted, faster = (
        f"{1000 * all_reduce_seconds(job.gradient_bytes, gpus, gpu, network):.1f} ms"
        for gpus, network in ((GPUS_PER_NODE, NETWORK), (most, NETWORK), (most, 4 * NETWORK))
    )
    communication = (
        f"all-reduce of {job.gradient_bytes / 1e6:,.0f} MB per step, counted: {node} on the {GPUS_PER_NODE} of a node\n"
        f"  {counted} on {most} at {8e-9 * NETWORK:.0f} Gbit/s between nodes ({faster} at {4 * 8e-9 * NETWORK:.0f})"
    )
    busier = batch_size_remedy(job.train.samples, plan_settings(job.args), GPU_COUNTS)
    return [communication, busier] if busier else [communication]


def _columns(label: str, values: list[float], form: str = ".2f") -> str:
    return f"  {label:<42}" + "".join(f"{value:>8{form}}" for value in values)


def limit_line(job: Job, times: dict[int, Pace]) -> str:
    """Whether the run fits --time-limit, and how many epochs would."""
    limit, epochs = job.args.time_limit, range(1, job.args.epochs + 1)
    fitting = {
        gpus: max((e for e in epochs if hours(job, of_gpus, e) <= limit), default=0) for gpus, of_gpus in times.items()
    }
    enough = [gpus for gpus, count in fitting.items() if count == job.args.epochs]
    verdict = f"fits on {enough[0]} GPU(s) or more" if enough else f"does not fit on up to {max(times)} GPUs"
    by_gpus = ", ".join(f"{count} on {gpus}" for gpus, count in fitting.items())
    return f"time limit {limit:g} h: {verdict}\n  epochs that fit: {by_gpus}"


def with_smaller_pictures(job: Job, images: ImageSettings) -> dict[int, Job]:
    """The run with pictures limited to a half and to a quarter of the largest one's pixels, by that limit.

    Its steps hold the same questions: a run of its own would draw others, which cost about the same.
    """
    planned = sorted({index for step in job.plan for tree in step for index in tree.samples})
    places = {index: place for place, index in enumerate(planned)}
    shown, jobs = job.train.only([job.train.samples[index] for index in planned]), {}
    for limit in (largest_picture(job.train, images) // part for part in (2, 4)):
        if limit < max(1, images.min_pixels):  # refused without --min-pixels
            continue
        train, val = (data and at_limit(data, images, limit) for data in (shown, job.val))
        plan = [
            tuple(trees.grow_tree(train.samples, [places[index] for index in tree.samples]) for tree in step)
            for step in job.plan
        ]
        val_batches = plan_evaluation(val.samples, job.args.max_tokens) if val else []
        jobs[limit] = replace(job, train=train, val=val, plan=plan, val_batches=val_batches)
    return jobs


def count_tokens(plan: list[Step]) -> int:
    return sum(tree.tokens for step in plan for tree in step)
