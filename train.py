"""Fine-tune Qwen3-VL with LoRA on visual question answering: a hand-written DDP loop over trees.

torchrun --nproc_per_node=2 train.py                                            # the embedded demo, CPU or GPU
torchrun --nproc_per_node=4 train.py --train train.jsonl --val val.jsonl --images pictures --output runs/kvasir
torchrun --nproc_per_node=4 train.py --config recipes/default.toml --train train.jsonl --images pictures
torchrun --nproc_per_node=4 train.py --config runs/kvasir/settings.toml --resume auto        # go on where it stopped
"""

import argparse
import faulthandler
import math
import shutil
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer

import dist_utils
from common import PARTIAL, InputError, write_whole
from data import TreeDataset, VQAData, make_loader, next_batches, padding
from demo import endoscopy
from dist_utils import STOPPED, Ranks, Stop, no_sync, print0, seed_torch, unwrap
from eval import accuracy_table, evaluate
from inputs.holdout import relative_names
from inputs.images import image_settings
from inputs.vision_cache import FeatureWriter, open_cache
from model import TreeModel, autocast, load_base, pick_dtype
from modeling.loading import resolve_model
from modeling.lora import add_lora, load_lora
from modeling.memory import MEMORY_BUDGETS, choose_memory_budget, compile_layers
from training.checkpoints import (
    checkpoints,
    find_checkpoint,
    load_checkpoint,
    mark_best,
    open_output,
    save_checkpoint,
    write_checkpoint,
)
from training.costs import known_gpu, tree_counter, uncounted
from training.metrics import Metrics
from training.plan import estimate, make_job
from training.preparation import check_cache, check_lora, describe_data, describe_lora, identify, load_all, print_plan
from training.settings import count_epochs, count_steps, is_due, lora_arguments, parse_settings, to_toml
from training.trackers import open_trackers
from trees import Assignment, PlanSettings, StepSampler, largest_micro_batch, make_plan, plan_evaluation

DEMO_FOLDER = Path("runs/demo-data")
SKIPPED_IN_A_ROW = 10  # non-finite steps after which the run stops
FAILED_SAVES_IN_A_ROW = 3  # after which the run stops


def main(argv: list[str], stop: Stop | None = None) -> int:
    """Train. Returns the exit code: 0 when done, dist_utils.STOPPED when stopped by a signal, 1 when saving failed."""
    stop, started = stop or Stop(), time.perf_counter()

    # Settings. Everything that can be wrong with them is told before anything is loaded.
    args = parse_settings(argv)
    ranks = dist_utils.start()
    is_demo = not args.train
    if is_demo:
        print0("No --train given: training the embedded demo, generated pictures and a tiny Qwen3-VL.")
        dist_utils.from_rank0(lambda: endoscopy.make_demo(DEMO_FOLDER))
        args = parse_settings(argv, endoscopy.SETTINGS | endoscopy.files(DEMO_FOLDER))
    if args.plan:
        dist_utils.from_rank0(lambda: print_plan(args))
        dist_utils.leave()
        return 0
    device, dtype = ranks.device, pick_dtype(args.dtype, ranks.device)
    name = "demo" if is_demo else Path(args.train[0]).stem
    output = dist_utils.from_rank0(lambda: open_output(args.output, name, args.resume))
    args.output = str(output)
    if dist_utils.restarted() and checkpoints(output):  # by torchrun --max-restarts
        args.resume = "auto"
    print0(f"output {output} | {ranks.world_size} rank(s) on {device.type}, {dtype}")

    # Data: rank 0 reads and checks, every rank gets the same samples.
    model_folder = dist_utils.local_rank0_first(lambda: resolve_model(args.model))
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    images = image_settings(model_folder, args.min_pixels, args.max_pixels)
    train_data, val_data = dist_utils.from_rank0(lambda: load_all(args, tokenizer, images, output))
    config = AutoConfig.from_pretrained(model_folder)
    tree_flops = tree_counter(config, train_data.samples, not uncounted(config, args), tower=not args.vision_cache)
    sampler = StepSampler(train_data.samples, PlanSettings.of(args), ranks.rank, ranks.world_size, tree_flops)
    plan = sampler.plan()
    describe_data(train_data, val_data, plan, tokenizer)
    steps = count_steps(args, len(sampler), args.epochs)
    val_batches = plan_evaluation(val_data.samples, args.max_tokens) if val_data else []
    identity = identify(args, images, train_data, val_data, model_folder)
    found = dist_utils.from_rank0(lambda: find_checkpoint(args.resume, output, identity))
    dist_utils.from_rank0(lambda: check_lora(args, config, found))
    dist_utils.from_rank0(lambda: check_cache(args, config, dtype, images, train_data, val_data))
    trackers = []  # rank 0's
    dist_utils.from_rank0(lambda: trackers.extend(open_trackers(args, output, found)))

    # Model, optimizer, and where a run goes on.
    seed_torch(args.seed)
    peft_model = add_lora(load_base(model_folder, dtype, device), args.model, **lora_arguments(args))
    if args.init_from and not found:
        load_lora(peft_model, Path(args.init_from))
        print0(f"LoRA starts from the weights of {args.init_from}")
    describe_lora(peft_model)
    epochs = range(count_epochs(args, len(sampler)))
    heavy = Assignment(largest_micro_batch(make_plan(train_data.samples, sampler.settings, epoch) for epoch in epochs))
    budgets = plan_compile(args, peft_model, heavy, ranks)
    visual = peft_model.get_base_model().model.visual
    cache = open_cache(args.vision_cache, visual, config, images) if args.vision_cache else None
    keep_features = FeatureWriter(cache).put if cache else None
    model = dist_utils.wrap(TreeModel(peft_model, images, keep_features), ranks)
    trained = (p for p in model.parameters() if p.requires_grad)
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=args.weight_decay, fused=True)
    start = load_checkpoint(found, model, optimizer, output) if found else {}
    done, best, evaluation_due = start.get("step", 0), start.get("best", {}), start.get("evaluation_due", False)
    stale = start.get("stale", 0)  # evaluations since the best one
    result, skipped, failed_saves = None, start.get("skipped", 0), 0
    gpu, planned = known_gpu(device), None
    metrics = Metrics(output, start, steps, len(sampler), gpu, ranks, trackers)
    if gpu and ranks.is_main and not done and not uncounted(config, args):
        planned = estimate(make_job(args, config, train_data, val_data, plan, heavy.trees), gpu, ranks.world_size)

    def state() -> dict:
        held_out = list(relative_names(val_data.grids, args.images)) if args.val_fraction else []
        settings = vars(args) | {"image_settings": asdict(images)}
        now = {"step": done, "best": best, "evaluation_due": evaluation_due, "sums": metrics.sums, "skipped": skipped}
        now |= {"optimizer": optimizer.state_dict(), "held_out": held_out, "stale": stale}
        return now | {"identity": start.get("identity", {}) | identity, "settings": settings}

    # Nothing may go wrong for the first time in hour three: the heaviest micro-batch, an evaluation, a save.
    dataset = TreeDataset(train_data, images, padding(device), cache=cache)
    uncached = TreeDataset(train_data, images, padding(device))
    rehearse(model, optimizer, uncached, heavy, ranks, dtype, budgets)
    dist_utils.from_rank0(lambda: rehearse_save(output, model, args, state()))
    base_result = None
    if val_batches:
        few = evaluate(unwrap(model), val_data, val_batches[: ranks.world_size], ranks, dtype, 0, Stop(), cache)
        print0(f"evaluation tried on {few['questions']} questions: loss {few['loss']:.3f}")
    if is_demo and not done:
        base_result = evaluate(unwrap(model), val_data, val_batches, ranks, dtype, args.workers, stop, cache)

    loader = make_loader(dataset, sampler, args.workers, device, persistent=True)
    print0(f"ready after {time.perf_counter() - started:.0f} s")
    often = 1 if sys.stderr.isatty() else 30  # seconds between updates of the bar: a log keeps every one
    bar = tqdm(total=steps, initial=done, unit="step", disable=not ranks.is_main, mininterval=often, maxinterval=often)
    finished, stopping = done >= steps or 0 < args.patience <= stale, bool(stop.agreed())

    def save() -> None:
        nonlocal failed_saves
        if ranks.is_main:
            failed_saves = 0 if save_checkpoint(output, model, state(), args.keep) else failed_saves + 1
            if failed_saves == FAILED_SAVES_IN_A_ROW:
                stop.reason = f"{failed_saves} checkpoints in a row could not be saved"
            metrics.status("running", done)
            metrics.draw()

    def evaluate_now() -> None:
        nonlocal result, best, stale, finished, evaluation_due
        result = evaluate(unwrap(model), val_data, val_batches, ranks, dtype, args.workers, stop, cache)
        evaluation_due = result is None  # a stop came first: a resumed run begins with it
        if result:
            is_best = is_better(result, best)
            best = {"exact_match": result["exact_match"], "loss": result["loss"], "step": done} if is_best else best
            stale = 0 if is_best else stale + 1
            finished = finished or 0 < args.patience <= stale
            metrics.evaluation(done, result, is_best)

    if evaluation_due and not stopping:
        evaluate_now()
        save()
        stopping = evaluation_due
    elif found and found.parent.resolve() != output:  # --resume auto goes on with what is here
        save()
    metrics.status("running", done)
    metrics.start_clock()
    dist_utils.shorten_timeout()
    while not (finished or stopping):
        sampler.set_epoch(done // len(sampler))
        sampler.first_step = done % len(sampler)
        for micro_batches, waited in by_step(loader):
            # One optimizer step.
            facts = micro_batches[0].assignment.step
            lr = learning_rate(done, steps, args)
            with naming(train_data, micro_batches, ranks):
                loss, grad_norm, losses_here, stopping = train_step(
                    model, optimizer, micro_batches, lr, args.max_grad_norm, ranks, dtype, args.seed, stop
                )
            done += 1
            finished = done == steps

            # A step that is not finite was skipped by all ranks alike.
            if math.isfinite(loss) and math.isfinite(grad_norm):
                skipped = 0
            else:
                skipped += 1
                report_skipped(done, loss, grad_norm, micro_batches, losses_here, train_data, metrics)
                if skipped == SKIPPED_IN_A_ROW:
                    raise RuntimeError(f"stopped: {skipped} steps in a row had a non-finite loss or gradient")

            metrics.step(done, facts, loss, grad_norm, lr, waited, bar, finished or done % args.log_every == 0)
            paused = time.perf_counter()
            evaluation_due = bool(val_batches) and is_due(args.eval_every, done, steps)
            if evaluation_due and not stopping:
                evaluate_now()
                stopping = evaluation_due
            if best.get("step") == done or finished or stopping or is_due(args.save_every, done, steps):
                save()
            metrics.started += time.perf_counter() - paused  # speed is that of training alone
            if finished or stopping:
                break
    bar.close()

    code = conclude(metrics, done, steps, stop, finished and not evaluation_due, failed_saves)
    if result and not code:
        print0(accuracy_table({"base": base_result, "tuned": result} if base_result else {"tuned": result}))
    if planned and done == steps and not code:
        took, peak = (time.perf_counter() - started) / 3600, torch.cuda.max_memory_allocated() / 2**30
        print0(
            f"planned {planned[0]:.2f} h, took {took:.2f} h; planned peak {planned[1]:.1f} GiB, peak was {peak:.1f} GiB"
        )
    model = optimizer = peft_model = trained = None  # before the group is left
    dist_utils.leave()
    metrics.close(code)  # may wait for a network: the other ranks need not
    return code


# ------------------------------------------------------------------------------------------------------------- the step


def train_step(
    model, optimizer, micro_batches, lr, max_grad_norm, ranks: Ranks, dtype, seed: int, stop: Stop
) -> tuple[float, float, list[torch.Tensor], bool]:
    """One optimizer step over this rank's micro-batches of it.

    The step's loss is the weighted mean of all answer tokens' cross-entropy, over all ranks; DDP averages gradients,
    hence the factor world_size. Dropout is seeded from (seed, step, micro-batch), never from a rank.
    Returns the loss and the gradient norm, equal on all ranks, this rank's loss sum of each micro-batch, and whether
    any rank was asked to stop. When loss or norm is not finite, nothing was changed.
    """
    optimizer.zero_grad(set_to_none=True)
    loss_sums = []
    for batch in micro_batches:
        assignment, batch = batch.assignment, batch.to(ranks.device)
        seed_torch(seed, assignment.step.number, assignment.number)
        with no_sync(model, skip=not assignment.last):
            with autocast(ranks.device, dtype):
                token_losses, _ = model(batch)
            loss_sum = (token_losses * batch.weights).sum() * assignment.in_loss
            (loss_sum * (ranks.world_size / assignment.step.answer_weight)).backward()
        loss_sums.append(loss_sum.detach())
    asked = loss_sums[0].new_tensor(float(bool(stop.reason)))
    loss, stopping = dist_utils.all_reduce_sum(torch.stack([sum(loss_sums), asked]).double()).tolist()
    loss /= assignment.step.answer_weight
    trained = optimizer.param_groups[0]["params"]
    grad_norm = clip_grad_norm_(trained, max_grad_norm or math.inf).item()  # of reduced gradients: equal everywhere
    if math.isfinite(loss) and math.isfinite(grad_norm):
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    return loss, grad_norm, loss_sums, stopping > 0


def by_step(loader):
    """Yield this rank's micro-batches of each optimizer step, and the seconds it waited for them."""
    micro_batches, waited, started = [], 0.0, time.perf_counter()
    for batch in next_batches(loader):
        waited += time.perf_counter() - started
        micro_batches.append(batch)
        if batch.assignment.last:
            yield micro_batches, waited
            micro_batches, waited = [], 0.0
        started = time.perf_counter()


def is_better(result: dict, best: dict) -> bool:
    """Whether an evaluation has the higher exact match or, at an equal one, the lower loss."""
    return not best or (result["exact_match"], -result["loss"]) > (best["exact_match"], -best["loss"])


def learning_rate(step: int, steps: int, args: argparse.Namespace) -> float:
    """Learning rate of step `step` (from 0) of `steps`: linear warm-up, then the schedule down to 0 at the end."""
    warmup = args.warmup if args.warmup >= 1 else args.warmup * steps
    if step < warmup:
        return args.lr * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, steps - warmup)
    factor = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
    return args.lr * factor[args.schedule]


@contextmanager
def naming(data: VQAData, micro_batches: list, ranks: Ranks):
    """Add to an error which samples this rank was training on."""
    try:
        yield
    except Exception as error:
        ids = ", ".join(data.samples[i].id for batch in micro_batches for i in batch.samples)
        error.add_note(f"rank {ranks.rank}, step {micro_batches[0].assignment.step.number + 1}, samples {ids}")
        raise


def report_skipped(step, loss, grad_norm, micro_batches, loss_sums, data: VQAData, metrics: "Metrics") -> None:
    """Log whose samples made a step non-finite: those of non-finite micro-batches, or of all when none is."""
    mine = [b for b, value in zip(micro_batches, loss_sums) if not torch.isfinite(value)]
    for batches in (mine, micro_batches):
        shards = dist_utils.gather_to_all([data.samples[i].id for batch in batches for i in batch.samples])
        if any(shards):
            break
    ids = sorted({name for shard in shards for name in shard})
    metrics.write({"event": "skipped", "step": step, "loss": str(loss), "grad_norm": str(grad_norm), "samples": ids})
    print0(f"\nstep {step} skipped on all ranks: loss {loss}, gradient norm {grad_norm}, samples {', '.join(ids)}")


def plan_compile(args, peft_model, heavy: Assignment, ranks: Ranks) -> list[float]:
    """Memory budgets to try, the most promising first; none where nothing is compiled."""
    if not args.compile or args.dora or ranks.device.type != "cuda":
        return []
    if args.memory_budget != "auto":
        return [args.memory_budget]
    tokens = sum(tree.tokens for tree in heavy.trees)
    chosen = choose_memory_budget(peft_model.get_base_model().config, tokens, ranks.device)
    chosen = min(dist_utils.gather_to_all(chosen))
    return [budget for budget in MEMORY_BUDGETS if budget <= chosen]


def rehearse(model, optimizer, dataset: TreeDataset, heavy: Assignment, ranks: Ranks, dtype, budgets: list) -> None:
    """Compile, and run the heaviest micro-batch before step 1, on all ranks at the highest memory budget that fits all.

    Raises InputError when memory does not suffice and RuntimeError when a trained weight gets no finite gradient.
    Leaves weights and optimizer as they were.
    """
    tokens, started = sum(tree.tokens for tree in heavy.trees), time.perf_counter()
    batch = dataset[heavy].to(ranks.device)
    for budget in budgets or [None]:
        if budget is not None:
            print0(f"compiling for a memory budget of {budget}: this takes one to three minutes")
            compile_layers(unwrap(model).model, budget)
        if fits := all(dist_utils.gather_to_all(_try_micro_batch(model, batch, ranks, dtype))):
            break
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
    if not fits:
        raise InputError(
            f"the heaviest micro-batch ({tokens:,} tokens) does not fit: lower --max-tokens or --max-pixels"
        )
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and (parameter.grad is None or not parameter.grad.isfinite().all()):
            raise RuntimeError(f"{name} gets no finite gradient from {dataset.data.samples[batch.samples[0]].where}")
    optimizer.zero_grad(set_to_none=True)
    text = f"rehearsed the heaviest micro-batch ({tokens:,} tokens) in {time.perf_counter() - started:.0f} s"
    if ranks.device.type == "cuda":
        text += ", not compiled" if budget is None else f", memory budget {budget}"
        text += f", peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
    print0(text)


def _try_micro_batch(model, batch, ranks: Ranks, dtype) -> bool:
    """Forward and backward without a collective, so that a rank that runs out of memory leaves none waiting."""
    try:
        with no_sync(model, skip=True):
            with autocast(ranks.device, dtype):
                token_losses, _ = model(batch)
            token_losses.mean().backward()
    except torch.OutOfMemoryError:
        return False
    return True


# -------------------------------------------------------------------------------------------------------------- output


def rehearse_save(output: Path, model, args: argparse.Namespace, state: dict) -> None:
    """Write the settings, and a checkpoint that is dropped again. Raises InputError when the disk does not take it."""
    folder = output / f"{PARTIAL}rehearsal"
    try:
        write_whole(output / "settings.toml", to_toml(args))
        mark_best(output, state["best"])  # a kill may have come between the checkpoint and its mark
        write_checkpoint(folder, model, state)
    except (OSError, SafetensorError) as error:
        raise InputError(f"a checkpoint can't be written to {output}: {error}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def conclude(metrics: Metrics, done: int, steps: int, stop: Stop, finished: bool, failed_saves: int) -> int:
    """Say how the run ended, on paper and on screen, and return its exit code."""
    faulthandler.cancel_dump_traceback_later()
    reason, output = stop.agreed(), metrics.output
    if dist_utils.from_rank0(lambda: failed_saves):
        state, code = "failed", 1
        print0(f"error: stopped at step {done} of {steps}: the last checkpoint could not be saved to {output}")
    elif not finished:
        state, code = "stopped", STOPPED
        print0(
            f"stopped by {reason} at step {done} of {steps}; to go on: --config {output}/settings.toml --resume auto"
        )
    else:
        state, code = "done", 0
        early = f" of {steps}, --patience is used up" if done < steps else ""
        print0(f"done: {done} steps{early}, {output}")
    metrics.status(state, done)
    return code


if __name__ == "__main__":
    dist_utils.run_and_exit(main, sys.argv[1:])
