"""Fine-tune Qwen-VL with LoRA on visual question answering: a hand-written DDP loop over trees.

torchrun --nproc_per_node=2 train.py                                            # the embedded demo, CPU or GPU
torchrun --nproc_per_node=4 train.py --train train.jsonl --val val.jsonl --images pictures --output runs/kvasir
torchrun --nproc_per_node=4 train.py --config recipes/default.toml --train train.jsonl --images pictures
torchrun --nproc_per_node=4 train.py --config runs/kvasir/settings.toml --resume auto        # go on after a stop
"""

import sys

if __name__ == "__main__":  # wrong settings and --help are answered before torch is imported, which takes seconds
    from training.settings import announce_demo, answer_early, parse_settings

    announce_demo(answer_early(parse_settings))

import argparse
import faulthandler
import math
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_

import dist_utils
from common import is_gone, nearest_existing, quote, removed_if_refused
from data import Batch, TreeDataset, make_loader, next_batches, padding
from demo import endoscopy
from dist_utils import STOPPED, Ranks, Stop, no_sync, print0, seed_torch, unwrap
from eval import evaluate
from evaluation.tables import accuracy_table
from inputs.holdout import relative_names
from inputs.vision_cache import FeatureWriter, VisionCache, open_cache
from model import TreeModel, autocast, load_base, pick_dtype
from modeling.lora import add_lora, load_lora
from modeling.memory import start_compile_workers
from training import checkpoints, plan, preparation, rehearsal, settings
from training.costs import known_gpu
from training.description import describe_lora, next_steps
from training.metrics import Metrics, Stopwatch
from training.progress import Progress
from training.scaling import ENOUGH, batch_size_remedy, plan_settings
from training.trackers import open_trackers

DEMO_FOLDER = Path("runs/demo-data")
SKIPPED_IN_A_ROW = 10  # non-finite steps after which the run stops
FAILED_SAVES_IN_A_ROW = 3  # after which the run stops


@dataclass
class Run:
    """What a run works with from its first step to its last."""

    args: argparse.Namespace
    ranks: Ranks
    stop: Stop
    dtype: torch.dtype
    output: Path
    prepared: preparation.Prepared
    model: torch.nn.Module  # a TreeModel, in DDP where there are several ranks
    cache: VisionCache | None
    optimizer: torch.optim.Optimizer
    identity: dict  # what the result depends on: a checkpoint is resumed only where it is the same
    metrics: Metrics
    memory_budget: float | None = None  # that layers are compiled for, None: not compiled; set by the rehearsal

    def is_finished(self, progress: Progress) -> bool:
        """Whether the last step is done, or the evaluations of --patience have brought nothing better."""
        return progress.step >= self.prepared.steps or 0 < self.args.patience <= progress.stale

    def is_due(self, every: int, progress: Progress) -> bool:
        """Whether something that is done `every` so many steps, and at the end, follows the step just done."""
        return settings.is_due(every, progress.step, self.prepared.steps)


def main(argv: list[str], stop: Stop | None = None) -> int:
    """Train. Returns the exit code: 0 when done, dist_utils.STOPPED when stopped by a signal, 1 when saving failed."""
    stop, watch = stop or Stop(), Stopwatch(time.perf_counter())
    args = settings.parse_settings(argv)  # reports everything that is wrong with them
    ranks = dist_utils.start()
    is_demo = not args.train
    if is_demo:
        print0(f"training the embedded demo, on images and rows in {DEMO_FOLDER}")
        dist_utils.from_rank0(lambda: endoscopy.make_demo(DEMO_FOLDER))
        args = settings.parse_settings(argv, endoscopy.SETTINGS | endoscopy.files(DEMO_FOLDER))
    if args.plan:
        dist_utils.from_rank0(lambda: preparation.print_plan(args))
        dist_utils.leave()
        return 0
    # All references to the DDP model end with this call: one that is alive when the group is left can abort the exit.
    code, metrics = train(args, ranks, stop, watch, is_demo)
    dist_utils.leave()
    metrics.close(code)  # trackers may wait for a network, which the other ranks need not do
    return code


def train(args: argparse.Namespace, ranks: Ranks, stop: Stop, watch: Stopwatch, is_demo: bool) -> tuple[int, Metrics]:
    """A whole run: set up, fit, conclude. Returns its exit code and its metrics, still open."""
    name = "demo" if is_demo else Path(args.train[0]).stem
    named, stays = args.output, nearest_existing(Path(args.output or "runs"))
    output = dist_utils.from_rank0(lambda: checkpoints.open_output(named, name, args.resume))
    args.output = str(output)
    if dist_utils.restarted() and checkpoints.checkpoints(output):  # by torchrun --max-restarts
        args.resume = "auto"
    step = max(map(checkpoints.step_of, checkpoints.checkpoints(output)), default=0)
    # A job whose time runs out before its first step is requeued by run.slurm too, once.
    stop.status = output / "status", f"stopped {step}\nbefore the first step of this start\n"
    with removed_if_refused(output, stays):
        run, progress = set_up(args, ranks, stop, output, output if named or args.skip_bad else None, watch)
    is_new, prepared = not progress.step, run.prepared

    # Training.
    base_result = evaluate_on_validation(run) if is_demo and is_new else None
    print0(f"ready after {watch}")
    result = fit(run, progress)

    # The end.
    code = conclude(run, progress)
    if is_new and progress.step == prepared.steps and not code and ranks.is_main:
        plan.compare_with_plan(run, time.perf_counter() - watch.started)
    if not code and ranks.is_main and ranks.world_size > 1 and run.metrics.paid:
        print0(efficiency_line(run))
    if result and not code:
        print0(accuracy_table({"base": base_result, "tuned": result} if base_result else {"tuned": result}))
    if not code:
        print0(next_steps(output, progress.best, bool(prepared.val_batches), is_demo))
    return code, run.metrics


def set_up(
    args: argparse.Namespace, ranks: Ranks, stop: Stop, output: Path, bad_rows: Path | None, watch: Stopwatch
) -> tuple[Run, Progress]:
    """All that a run does before its first step. `bad_rows` is the folder that gets a list of rows that can't be used.
    Raises InputError."""
    dtype = pick_dtype(args.dtype, ranks.device)
    precision = "" if args.base_precision == "bf16" else f", base in {args.base_precision}"
    print0(f"output {output} | {ranks.world_size} rank(s) on {ranks.device.type}, {dtype}{precision}")
    start_compile_workers(ranks.device)
    # Data. Rank 0 reads and checks; every rank gets the same samples.
    prepared = preparation.prepare(args, ranks, dtype, output, bad_rows)
    watch.lap("rows")
    trackers = []  # stays empty on other ranks than rank 0
    dist_utils.from_rank0(lambda: trackers.extend(open_trackers(args, output, prepared.checkpoint)))

    # Model and optimizer, and where the run goes on.
    model, cache = build_model(args, prepared, ranks.device, dtype)
    watch.lap("model")
    attempts = rehearsal.plan_attempts(args, prepared, model, ranks)
    model = dist_utils.wrap(model, ranks)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=args.weight_decay, fused=True)
    progress, identity = Progress(), prepared.identity
    if prepared.checkpoint:
        progress, identity = checkpoints.load_checkpoint(prepared.checkpoint, model, optimizer, output, identity)
    metrics = Metrics(output, progress, prepared.steps, len(prepared.sampler), known_gpu(ranks.device), ranks, trackers)
    run = Run(args, ranks, stop, dtype, output, prepared, model, cache, optimizer, identity, metrics)
    rehearse(run, progress, attempts, watch)
    return run, progress


def build_model(
    args: argparse.Namespace, prepared: preparation.Prepared, device: torch.device, dtype: torch.dtype
) -> tuple[TreeModel, VisionCache | None]:
    """The base model with LoRA, and the vision cache that it fills, if there is one."""
    seed_torch(args.seed)  # LoRA's A matrices are random
    base = load_base(prepared.folder, dtype, device, args.base_precision)
    peft_model = add_lora(base, args.model, **settings.lora_arguments(args))
    if args.init_from and not prepared.checkpoint:
        load_lora(peft_model, Path(args.init_from))
        print0(f"LoRA starts from the weights of {args.init_from}")
    describe_lora(peft_model)
    if not args.vision_cache:
        return TreeModel(peft_model, prepared.images), None
    cache = open_cache(args.vision_cache, peft_model.get_base_model().model.visual, prepared.config, prepared.images)
    return TreeModel(peft_model, prepared.images, FeatureWriter(cache).put), cache


def rehearse(run: Run, progress: Progress, attempts: rehearsal.Attempts, watch: Stopwatch) -> None:
    """Try the largest micro-batch, a save and an evaluation of a few samples: none fails for the first time later."""
    prepared, bounds, ranks = run.prepared, run.prepared.bounds, run.ranks
    # Without the cache: the tower runs.
    dataset = TreeDataset(prepared.train, prepared.images, padding(ranks.device), at_least=bounds.tokens)
    run.memory_budget = rehearsal.rehearse_step(run.model, run.optimizer, dataset, bounds, ranks, run.dtype, attempts)
    watch.lap("rehearsal")
    dist_utils.from_rank0(
        lambda: rehearsal.rehearse_save(run.output, run.model, run.args, checkpoint_state(run, progress))
    )
    if few := prepared.val_batches[: ranks.world_size]:
        result = evaluate(unwrap(run.model), prepared.val, few, ranks, run.dtype, 0, Stop(), run.cache)
        print0(f"evaluation tried on {result['questions']} questions: loss {result['loss']:.3f}")
    watch.lap("evaluation")


# ------------------------------------------------------------------------------------------------------------- the loop


def fit(run: Run, progress: Progress) -> dict | None:
    """Train until the last step, the end of --patience, or a stop. Returns the result of the last evaluation."""
    args, metrics, steps, model, optimizer = run.args, run.metrics, run.prepared.steps, run.model, run.optimizer
    run.stop.save_first()
    result, stopping = None, bool(run.stop.agreed())
    if progress.evaluation_due and not stopping:  # the run was stopped before this evaluation
        result = evaluate_now(run, progress)
        save(run, progress)
        stopping = progress.evaluation_due
    elif run.prepared.checkpoint and run.prepared.checkpoint.parent.resolve() != run.output:
        save(run, progress)  # --resume auto looks for checkpoints in this run's folder
    metrics.start(progress)
    dist_utils.shorten_timeout()  # the start may take an hour of downloading, a step may not

    for micro_batches, waited in [] if stopping or run.is_finished(progress) else steps_from(run, progress.step):
        # Learning rate and step.
        facts = micro_batches[0].assignment.step
        lr = learning_rate(progress.step, steps, args)
        with naming_samples(run, micro_batches):
            loss, grad_norm, loss_sums, stopping = train_step(
                model, optimizer, micro_batches, lr, args.max_grad_norm, run.ranks, run.dtype, run.stop
            )
        progress.step += 1

        # Skip. A step with a non-finite loss or gradient changed nothing, on any rank.
        if math.isfinite(loss) and math.isfinite(grad_norm):
            progress.skipped = 0
        else:
            progress.skipped += 1
            report_skipped(run, progress.step, loss, grad_norm, micro_batches, loss_sums)
            if progress.skipped == SKIPPED_IN_A_ROW:
                raise RuntimeError(f"stopped: {progress.skipped} steps in a row had a non-finite loss or gradient")

        # Log.
        is_logged = progress.step == steps or progress.step % args.log_every == 0
        metrics.step(progress, facts, loss, grad_norm, lr, waited, is_logged)
        if is_logged:
            stop_if_output_is_gone(run)

        # Evaluate and save.
        with metrics.paused():
            progress.evaluation_due = bool(run.prepared.val_batches) and run.is_due(args.eval_every, progress)
            if progress.evaluation_due and not stopping:
                result = evaluate_now(run, progress)
                stopping = progress.evaluation_due
            is_over = stopping or run.is_finished(progress)
            is_new_best = progress.best.get("step") == progress.step
            if is_over or is_new_best or run.is_due(args.save_every, progress):
                save(run, progress)
        if is_over:
            break
    metrics.bar.close()
    return result


def steps_from(run: Run, first: int) -> Iterator[tuple[list[Batch], float]]:
    """Yield this rank's micro-batches of each optimizer step from step `first` on, and the seconds it waited for them.

    Goes on from epoch to epoch without an end: the caller stops.
    """
    prepared, args, device = run.prepared, run.args, run.ranks.device
    dataset = TreeDataset(prepared.train, prepared.images, padding(device), cache=run.cache)
    loader = make_loader(dataset, prepared.sampler, args.workers, device, persistent=True)
    while True:
        prepared.sampler.set_epoch(first // len(prepared.sampler))
        prepared.sampler.first_step = first % len(prepared.sampler)
        yield from by_step(loader)
        first += len(prepared.sampler) - prepared.sampler.first_step


def by_step(loader) -> Iterator[tuple[list[Batch], float]]:
    """Gather a loader's micro-batches by optimizer step; with each step come the seconds it waited for them."""
    micro_batches, waited, started = [], 0.0, time.perf_counter()
    for batch in next_batches(loader):
        waited += time.perf_counter() - started
        micro_batches.append(batch)
        if batch.assignment.last:
            yield micro_batches, waited
            micro_batches, waited = [], 0.0
        started = time.perf_counter()


def train_step(
    model, optimizer, micro_batches, lr, max_grad_norm, ranks: Ranks, dtype, stop: Stop
) -> tuple[float, float, list[torch.Tensor], bool]:
    """One optimizer step over this rank's micro-batches of it.

    The step's loss is the weighted mean of all answer tokens' cross-entropy, over all ranks. Dropout follows from
    (seed, step, tree, branch, token), never from a rank or a micro-batch. When loss or gradient norm is not finite,
    nothing is changed.

    Returns the loss and the gradient norm, equal on all ranks; this rank's loss sum of each micro-batch; and whether
    any rank was asked to stop.
    """
    optimizer.zero_grad(set_to_none=True)
    loss_sums = []  # on the GPU: reading one here would wait for its micro-batch
    for batch in micro_batches:
        assignment, batch = batch.assignment, batch.to(ranks.device)
        with no_sync(model, skip=not assignment.last):  # gradients are reduced once per step, in the last backward pass
            with autocast(ranks.device, dtype):
                token_losses, _ = model(batch)  # (N,)
            loss_sum = (token_losses * batch.weights).sum() * assignment.in_loss
            # DDP averages gradients over the ranks: world_size turns the average into the sum.
            (loss_sum * (ranks.world_size / assignment.step.answer_weight)).backward()
        loss_sums.append(loss_sum.detach())
    # One collective tells the loss and whether to stop. Reading them waits for the GPU, once per step.
    asked = loss_sums[0].new_tensor(float(bool(stop.reason)))
    loss, stopping = dist_utils.all_reduce_sum(torch.stack([sum(loss_sums), asked]).double()).tolist()
    loss /= assignment.step.answer_weight
    trained = optimizer.param_groups[0]["params"]
    grad_norm = clip_grad_norm_(trained, max_grad_norm or math.inf).item()  # of reduced gradients: equal on all ranks
    # All ranks see the same two numbers, so all of them step, or none does.
    if math.isfinite(loss) and math.isfinite(grad_norm):
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    return loss, grad_norm, loss_sums, stopping > 0


def learning_rate(step: int, steps: int, args: argparse.Namespace) -> float:
    """Learning rate of step `step` (from 0) of `steps`: linear warm-up, then the schedule down to 0 at the end."""
    warmup = args.warmup if args.warmup >= 1 else args.warmup * steps
    if step < warmup:
        return args.lr * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, steps - warmup)  # 0 after the warm-up, 1 behind the last step
    factor = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
    return args.lr * factor[args.schedule]


# ------------------------------------------------------------------------------------------------ evaluating and saving


def evaluate_on_validation(run: Run) -> dict | None:
    """Loss and exact match on all validation rows. None when stopped, or without such rows."""
    model, prepared = unwrap(run.model), run.prepared
    if not prepared.val_batches:
        return None
    return evaluate(
        model, prepared.val, prepared.val_batches, run.ranks, run.dtype, run.args.workers, run.stop, run.cache
    )


def evaluate_now(run: Run, progress: Progress) -> dict | None:
    """Evaluate and count the result. When a stop comes first it stays due: a resumed run starts with it."""
    result = evaluate_on_validation(run)
    progress.evaluation_due = result is None
    if result:
        run.metrics.evaluation(progress, result, is_best=progress.count_evaluation(result))
    return result


def save(run: Run, progress: Progress) -> None:
    """Write a checkpoint on rank 0. After FAILED_SAVES_IN_A_ROW failures the run is asked to stop."""
    if not run.ranks.is_main:
        return
    is_there = not stop_if_output_is_gone(run)
    saved = is_there and checkpoints.save_checkpoint(
        run.output, run.model, checkpoint_state(run, progress), run.args.keep
    )
    progress.failed_saves = 0 if saved else progress.failed_saves + 1
    if progress.failed_saves == FAILED_SAVES_IN_A_ROW:
        run.stop.reason = f"{progress.failed_saves} checkpoints in a row could not be saved"
    run.metrics.status("running", progress)
    run.metrics.draw()


def stop_if_output_is_gone(run: Run) -> bool:
    """Ask the run to stop where its folder is gone. It is not made again: what it held would be lost all the same."""
    gone = run.ranks.is_main and is_gone(run.output)
    if gone:
        run.stop.reason = f"{run.output} was removed, emptied, moved or unmounted"
    return gone


def checkpoint_state(run: Run, progress: Progress) -> dict:
    """What state.pt holds."""
    args, prepared = run.args, run.prepared
    held_out = list(relative_names(prepared.val.grids, args.images)) if args.val_fraction else []
    return progress.to_state() | {
        "optimizer": run.optimizer.state_dict(),
        "held_out": held_out,
        "identity": run.identity,
        "base": prepared.base,
        "settings": vars(args) | {"image_settings": asdict(prepared.images)},
    }


# ------------------------------------------------------------------------------------------------- errors, and the end


@contextmanager
def naming_samples(run: Run, micro_batches: list[Batch]):
    """Add to an error which samples this rank was training on."""
    try:
        yield
    except Exception as error:
        samples = run.prepared.train.samples
        ids = ", ".join(quote(samples[i].id) for batch in micro_batches for i in batch.samples)
        error.add_note(f"rank {run.ranks.rank}, step {micro_batches[0].assignment.step.number + 1}, samples {ids}")
        raise


def report_skipped(run: Run, step: int, loss: float, grad_norm: float, micro_batches: list[Batch], loss_sums) -> None:
    """Log which samples made a step non-finite: those of non-finite micro-batches, else all. A collective."""
    samples = run.prepared.train.samples
    suspects = [batch for batch, loss_sum in zip(micro_batches, loss_sums) if not torch.isfinite(loss_sum)]
    for batches in (suspects, micro_batches):
        ids_by_rank = dist_utils.gather_to_all([samples[i].id for batch in batches for i in batch.samples])
        if any(ids_by_rank):
            break
    ids = sorted({sample_id for ids in ids_by_rank for sample_id in ids})
    line = {"event": "skipped", "step": step, "loss": str(loss), "grad_norm": str(grad_norm), "samples": ids}
    run.metrics.write(line)
    shown = ", ".join(map(quote, ids))
    print0(f"\nstep {step} skipped on all ranks: loss {loss}, gradient norm {grad_norm}, samples {shown}")


def conclude(run: Run, progress: Progress) -> int:
    """Say on the screen and in `status` how the run ended. Returns its exit code."""
    faulthandler.cancel_dump_traceback_later()
    reason, output, steps = run.stop.agreed(), run.output, run.prepared.steps
    if dist_utils.from_rank0(lambda: progress.failed_saves):
        state, code = "failed", 1
        because = f"the last checkpoint was not saved to {output}" + f" ({reason})" * bool(reason)
        print0(f"error: stopped at step {progress.step} of {steps}: {because}")
    elif progress.evaluation_due or not run.is_finished(progress):
        state, code = "stopped", STOPPED
        go_on = f"--config {shlex.quote(str(output / 'settings.toml'))} --resume auto"
        print0(f"stopped by {reason} at step {progress.step} of {steps}; to go on, start it with\n  {go_on}")
    else:
        state, code = "done", 0
        early = f" of {steps}, --patience is used up" if progress.step < steps else ""
        print0(f"done: {progress.step} steps{early}, {output}")
    run.metrics.status(state, progress)
    return code


def efficiency_line(run: Run) -> str:
    """How busy the ranks were in the steps of this start, of which there is one at least, and what would keep them
    busier."""
    ranks, efficiency = run.ranks.world_size, run.metrics.cost / run.metrics.paid
    line = f"rank efficiency {efficiency:.0%} on {ranks} ranks"
    if efficiency >= ENOUGH:
        return line
    remedy = batch_size_remedy(run.prepared.train.samples, plan_settings(run.args), [ranks])
    return f"{line}\n{remedy}" if remedy else line


if __name__ == "__main__":
    dist_utils.run_and_exit(main, sys.argv[1:])
