"""Fine-tune Qwen3-VL with LoRA on visual question answering: a hand-written DDP loop over trees.

torchrun --nproc_per_node=2 train.py                                            # the embedded demo, CPU or GPU
torchrun --nproc_per_node=4 train.py --train train.jsonl --val val.jsonl --images pictures --output runs/kvasir
torchrun --nproc_per_node=4 train.py --config recipes/default.toml --train train.jsonl --images pictures
torchrun --nproc_per_node=4 train.py --config runs/kvasir/settings.toml --resume auto        # go on where it stopped
"""

import argparse
import json
import math
import os
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from peft import set_peft_model_state_dict
from safetensors.torch import load_file
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm
from transformers import AutoTokenizer

import demo
import dist_utils
from data import TreeDataset, VQAData, describe_sample, image_settings, length_histogram, load_data, stop_or_skip_bad
from dist_utils import Ranks, no_sync, print0, seed_everything, unwrap
from eval import accuracy_table, autocast, evaluate, make_loader, padding, pick_dtype
from model import (
    MEMORY_BUDGETS,
    TreeModel,
    add_lora,
    choose_memory_budget,
    compile_layers,
    load_base,
    lora_table,
    resolve_model,
    save_adapter,
)
from rows import InputError
from settings import parse_settings, to_toml
from trees import PlanSettings, StepSampler, Work, make_plan, rank_efficiency, whole_trees

DEMO_FOLDER = Path("runs/demo-data")
SKIPPED_IN_A_ROW = 10  # non-finite steps after which the run stops


def main(argv: list[str]) -> None:
    # Settings. Everything that can be wrong with them is told before anything is loaded.
    args = parse_settings(argv)
    ranks = dist_utils.start()
    is_demo = not args.train
    if is_demo:
        print0("No --train given: training the embedded demo, generated pictures and a tiny Qwen3-VL.")
        dist_utils.from_rank0(lambda: demo.make_demo(DEMO_FOLDER))
        args = parse_settings(argv, demo.SETTINGS | demo_files(DEMO_FOLDER))
    device, dtype = ranks.device, pick_dtype(args.dtype, ranks.device)
    output = dist_utils.from_rank0(lambda: open_output(args, "demo" if is_demo else Path(args.train).stem))
    print0(f"output {output} | {ranks.world_size} rank(s) on {device.type}, {dtype}")

    # Data: rank 0 reads and checks, every rank gets the same samples.
    model_folder = dist_utils.local_rank0_first(lambda: resolve_model(args.model))
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    images = image_settings(model_folder, args.min_pixels, args.max_pixels)
    train_data, val_data = dist_utils.from_rank0(lambda: load_all(args, tokenizer, images, output))
    plan_settings = PlanSettings(args.batch_size, args.questions_per_image, args.max_tokens, args.seed)
    sampler = StepSampler(train_data.samples, plan_settings, ranks.rank, ranks.world_size)
    plan = sampler.plan()
    describe_data(train_data, val_data, plan, tokenizer)
    steps = args.epochs * len(sampler)
    steps = min(steps, args.max_steps or steps)
    val_batches = whole_trees(val_data.samples, args.max_tokens) if val_data else []

    # Model, optimizer, and where a run goes on.
    seed_everything(args.seed)
    peft_model = add_lora(
        load_base(model_folder, dtype, device), args.model, args.lora_r, args.lora_alpha, args.lora_dropout
    )
    describe_lora(peft_model)
    heavy = heaviest(train_data.samples, plan_settings, args.epochs)
    budgets = plan_compile(args, peft_model, heavy, ranks)
    model = dist_utils.wrap(TreeModel(peft_model, images), ranks)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=args.weight_decay, fused=True)
    run = {"settings": vars(args) | {"image_settings": asdict(images)}, "train_data": train_data.fingerprint()}
    done, best = resume(args.resume, output, model, optimizer, run)
    metrics = Metrics(output / "metrics.jsonl", done, ranks)

    # Nothing may go wrong for the first time in hour three: the heaviest micro-batch, an evaluation, a save.
    dataset = TreeDataset(train_data, images, padding(device))
    rehearse(model, optimizer, dataset, heavy, ranks, dtype, budgets)
    if ranks.is_main:
        write_checkpoint(output / "tmp-rehearsal", model, {})
        shutil.rmtree(output / "tmp-rehearsal")
    base_result = None
    if val_batches:
        few = evaluate(unwrap(model), val_data, val_batches[: ranks.world_size], ranks, dtype, 0)
        print0(f"evaluation tried on {few['questions']} questions: loss {few['loss']:.3f}")
    if is_demo and not done:
        base_result = evaluate(unwrap(model), val_data, val_batches, ranks, dtype, args.workers)

    loader = make_loader(dataset, sampler, args.workers, device, persistent=True)
    often = 1 if sys.stderr.isatty() else 30  # seconds between updates of the bar: a log keeps every one
    bar = tqdm(total=steps, initial=done, unit="step", disable=not ranks.is_main, mininterval=often, maxinterval=often)
    result, skipped, finished = None, 0, done >= steps
    while not finished:
        sampler.set_epoch(done // len(sampler))
        sampler.first_step = done % len(sampler)
        for micro_batches, waited in by_step(loader):
            # One optimizer step.
            facts = micro_batches[0].work.step
            lr = learning_rate(done, steps, args)
            loss, grad_norm, losses_here = train_step(
                model, optimizer, micro_batches, lr, args.max_grad_norm, ranks, dtype, args.seed
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
            is_best = False
            if val_batches and (finished or (args.eval_every and done % args.eval_every == 0)):
                paused = time.perf_counter()
                result = evaluate(unwrap(model), val_data, val_batches, ranks, dtype, args.workers)
                metrics.started += time.perf_counter() - paused  # speed is that of training alone
                is_best = result["exact_match"] > best.get("exact_match", -1.0)
                best = {"exact_match": result["exact_match"], "step": done} if is_best else best
                metrics.evaluation(done, result, is_best)
            due = is_best or finished or (args.save_every and done % args.save_every == 0)
            if due and ranks.is_main:
                save_checkpoint(output, done, model, optimizer, run, best, args.keep)
            if finished:
                break
    bar.close()

    if result:
        print0(accuracy_table({"base": base_result, "tuned": result} if base_result else {"tuned": result}))
    print0(f"done: {steps} steps, {output}")
    del model, optimizer, peft_model, trained
    dist_utils.stop()


# ------------------------------------------------------------------------------------------------------------- the step


def train_step(model, optimizer, micro_batches, lr, max_grad_norm, ranks: Ranks, dtype, seed: int):
    """One optimizer step over this rank's micro-batches of it.

    The step's loss is the sum of all answer tokens' cross-entropy over their number on all ranks; DDP averages
    gradients, hence the factor world_size. Dropout is seeded from (seed, step, micro-batch), never from a rank.
    Returns the loss and the gradient norm, equal on all ranks, and this rank's loss sum of each micro-batch. When
    loss or norm is not finite, nothing was changed.
    """
    optimizer.zero_grad(set_to_none=True)
    loss_sums = []
    for batch in micro_batches:
        work, batch = batch.work, batch.to(ranks.device)
        seed_everything(seed, work.step.number, work.number)
        with no_sync(model, skip=not work.last):
            with autocast(ranks.device, dtype):
                features = unwrap(model).encode_images(batch)
                token_losses, _ = model(batch, features)
            loss_sum = token_losses.sum() * work.live
            (loss_sum * (ranks.world_size / work.step.answer_tokens)).backward()
        loss_sums.append(loss_sum.detach())
    loss = dist_utils.all_reduce_sum(torch.stack(loss_sums).double().sum()).item() / work.step.answer_tokens
    trained = [p for p in model.parameters() if p.requires_grad]
    grad_norm = clip_grad_norm_(
        trained, max_grad_norm or math.inf
    ).item()  # the gradients are reduced: equal everywhere
    if math.isfinite(loss) and math.isfinite(grad_norm):
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    return loss, grad_norm, loss_sums


def by_step(loader):
    """Yield this rank's micro-batches of each optimizer step, and the seconds it waited for them."""
    micro_batches, waited, started = [], 0.0, time.perf_counter()
    for batch in loader:
        waited += time.perf_counter() - started
        micro_batches.append(batch)
        if batch.work.last:
            yield micro_batches, waited
            micro_batches, waited = [], 0.0
        started = time.perf_counter()


def learning_rate(step: int, steps: int, args: argparse.Namespace) -> float:
    """Learning rate of step `step` (from 0) of `steps`: linear warm-up, then the schedule down to 0 at the end."""
    warmup = args.warmup if args.warmup >= 1 else args.warmup * steps
    if step < warmup:
        return args.lr * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, steps - warmup)
    factor = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
    return args.lr * factor[args.schedule]


def report_skipped(step, loss, grad_norm, micro_batches, loss_sums, data: VQAData, metrics: "Metrics") -> None:
    """Log whose samples made a step non-finite: those of non-finite micro-batches, or of all when none is."""
    mine = [b for b, value in zip(micro_batches, loss_sums) if not torch.isfinite(value)]
    shards = dist_utils.gather_to_all([data.samples[i].id for batch in mine for i in batch.samples])
    if not any(shards):
        shards = dist_utils.gather_to_all([data.samples[i].id for batch in micro_batches for i in batch.samples])
    ids = sorted({name for shard in shards for name in shard})
    metrics.write({"event": "skipped", "step": step, "loss": str(loss), "grad_norm": str(grad_norm), "samples": ids})
    print0(f"\nstep {step} skipped on all ranks: loss {loss}, gradient norm {grad_norm}, samples {', '.join(ids)}")


def heaviest(samples: list, settings: PlanSettings, epochs: int) -> Work:
    """The micro-batch of most tokens in the whole run."""
    batches = (batch for epoch in range(epochs) for step in make_plan(samples, settings, epoch) for batch in step)
    return Work(max(batches, key=lambda batch: sum(tree.tokens for tree in batch)))


def plan_compile(args, peft_model, heavy: Work, ranks: Ranks) -> list[float]:
    """Memory budgets to try, the most promising first; none where nothing is compiled."""
    if not args.compile or ranks.device.type != "cuda":
        return []
    if args.memory_budget != "auto":
        return [args.memory_budget]
    tokens = sum(tree.tokens for tree in heavy.trees)
    chosen = choose_memory_budget(peft_model.get_base_model().config, tokens, args.lora_dropout > 0, ranks.device)
    chosen = min(dist_utils.gather_to_all(chosen))
    return [budget for budget in MEMORY_BUDGETS if budget <= chosen]


def rehearse(model, optimizer, dataset: TreeDataset, work: Work, ranks: Ranks, dtype, budgets: list[float]) -> None:
    """Compile, and run the heaviest micro-batch before step 1, on all ranks at the highest memory budget that fits all.

    Raises InputError when memory does not suffice and RuntimeError when a trained weight gets no finite gradient.
    Leaves weights and optimizer as they were.
    """
    tokens, started = sum(tree.tokens for tree in work.trees), time.perf_counter()
    batch = dataset[work].to(ranks.device)
    for budget in budgets or [None]:
        if budget is not None:
            print0(f"compiling for a memory budget of {budget}: this takes a minute or two")
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
        text += f", memory budget {budget}, peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
    print0(text)


def _try_micro_batch(model, batch, ranks: Ranks, dtype) -> bool:
    """Forward and backward without a collective, so that a rank that runs out of memory leaves none waiting."""
    try:
        with no_sync(model, skip=True):
            with autocast(ranks.device, dtype):
                token_losses, _ = model(batch, unwrap(model).encode_images(batch))
            token_losses.mean().backward()
    except torch.OutOfMemoryError:
        return False
    return True


# --------------------------------------------------------------------------------------------- data, output and metrics


def demo_files(folder: Path) -> dict[str, str]:
    names = {"model": "model", "train": "train.jsonl", "val": "val.jsonl", "images": ""}
    return {setting: str((folder / name).resolve()) for setting, name in names.items()}


def load_all(args, tokenizer, images, output: Path) -> tuple[VQAData, VQAData | None]:
    files = [args.train, args.val] if args.val else [args.train]
    data = [
        load_data(file, args.images, tokenizer, images, args.max_tokens, args.system, args.allow_outside_images)
        for file in files
    ]
    stop_or_skip_bad(data, args.skip_bad, output)
    return data[0], data[1] if args.val else None


def describe_data(train: VQAData, val: VQAData | None, plan, tokenizer) -> None:
    """Say what will be trained: sizes, lengths, the plan, and one sample with its trained tokens marked."""
    for name, data in (("train", train), ("val", val)):
        if data:
            print0(
                f"{name}: {len(data.samples):,} questions, {len(data.grids):,} images, {len(data.bad):,} rows left out"
            )
    shared = set(train.grids) & set(val.grids) if val else set()
    if shared:
        print0(f"warning: {len(shared):,} validation images are also trained on, {Path(min(shared)).name} for one")
    print0("tokens a question (image included):\n" + length_histogram([sample.tokens for sample in train.samples]))
    trees = [tree for step in plan for batch in step for tree in batch]
    alone, together = sum(sample.tokens for sample in train.samples), sum(tree.tokens for tree in trees)
    print0(
        f"plan: {len(plan):,} steps an epoch of {len(trees) / len(plan):.1f} images in "
        f"{sum(map(len, plan)) / len(plan):.1f} micro-batches; trees need {together:,} tokens an epoch, "
        f"single questions {alone:,} ({alone / together:.1f}x); rank efficiency "
        + ", ".join(f"{100 * rank_efficiency(plan, n):.0f}% at {n}" for n in (2, 4))
    )
    print0(f"one sample, trained tokens in ⟦ ⟧:\n{describe_sample(train.samples[0], tokenizer)}")


def describe_lora(model) -> None:
    table = lora_table(model)
    for kind, (modules, parameters) in table.items():
        print0(f"  {kind:<10} {modules:>4} modules {parameters:>12,} parameters")
    print0(f"  trained in all {sum(parameters for _, parameters in table.values()):,} parameters")


def open_output(args, name: str) -> Path:
    """The run's folder with its settings in it. Refuses one that holds another run, unless that is resumed."""
    output = Path(args.output)
    if not args.output:
        number = 1
        while (output := Path(f"runs/{name}-{number}")).exists():
            number += 1
    metrics = output / "metrics.jsonl"
    if args.resume == "none" and metrics.exists() and metrics.stat().st_size:
        raise InputError(f"--output {output} holds a run: --resume auto goes on with it, another folder starts anew")
    output.mkdir(parents=True, exist_ok=True)
    args.output = str(output.resolve())
    (output / "settings.toml").write_text(to_toml(args), encoding="utf-8")
    return output.resolve()


class Metrics:
    """metrics.jsonl and the progress bar, fed from the same numbers; rank 0 writes."""

    def __init__(self, path: Path, done: int, ranks: Ranks):
        self.ranks, self.started, self.questions = ranks, time.perf_counter(), 0
        self.losses, self.tokens, self.images, self.waited = 0.0, 0, 0, 0.0
        if ranks.is_main:
            lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
            lines = [line for line in lines if json.loads(line)["step"] <= done]  # a resumed run repeats later ones
            path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
            self.file = open(path, "a", encoding="utf-8")

    def write(self, line: dict) -> None:
        if self.ranks.is_main:
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()

    def step(self, done: int, facts, loss: float, grad_norm: float, lr: float, waited: float, bar: tqdm, last: bool):
        """Count a step; when `last`, write the mean loss and the speed since the line before."""
        if math.isfinite(loss):
            self.losses, self.tokens = self.losses + loss * facts.answer_tokens, self.tokens + facts.answer_tokens
        self.questions, self.images = self.questions + facts.questions, self.images + facts.images
        self.waited += waited
        bar.update(1)
        if not last or not self.tokens:
            return
        seconds = time.perf_counter() - self.started
        line = {"loss": self.losses / self.tokens, "questions_per_s": self.questions / seconds}
        if self.ranks.device.type == "cuda":
            line["gpu_gib"] = torch.cuda.max_memory_allocated() / 2**30
        bar.set_postfix({name: f"{value:.3g}" for name, value in line.items()}, refresh=False)
        steps_left = (bar.total or done) - done
        line |= {"event": "train", "step": done, "grad_norm": grad_norm, "lr": lr, "questions": self.questions}
        line |= {
            "images": self.images,
            "data_wait": self.waited / seconds,
            "eta_s": steps_left * facts.questions / line["questions_per_s"],
        }
        self.write(line)
        self.started, self.questions, self.images, self.waited = time.perf_counter(), 0, 0, 0.0
        self.losses, self.tokens = 0.0, 0

    def evaluation(self, done: int, result: dict, is_best: bool) -> None:
        self.write({"event": "eval", "step": done, **result})
        text = f"step {done}: validation loss {result['loss']:.4f}, exact match {100 * result['exact_match']:.1f}%"
        if self.ranks.is_main:
            tqdm.write(text + (" (best)" if is_best else ""))


# ---------------------------------------------------------------------------------------------------------- checkpoints


def write_checkpoint(folder: Path, model, state: dict) -> None:
    """A plain PEFT adapter folder with one state file beside it."""
    save_adapter(unwrap(model).model, folder)
    torch.save(state, folder / "state.pt")


def save_checkpoint(output: Path, step: int, model, optimizer, run: dict, best: dict, keep: int) -> None:
    """Write checkpoint-STEP under a temporary name, rename it, mark the best, drop all but it and the last `keep`."""
    name = f"checkpoint-{step:06d}"
    partial = output / f"tmp-{name}-{os.getpid()}"
    write_checkpoint(
        partial, model, {"format": 1, "step": step, "best": best, "optimizer": optimizer.state_dict(), **run}
    )
    shutil.rmtree(output / name, ignore_errors=True)
    os.rename(partial, output / name)
    if best:
        marked = output / f"tmp-best-{os.getpid()}"
        marked.write_text(json.dumps({"checkpoint": f"checkpoint-{best['step']:06d}", **best}))
        os.replace(marked, output / "best.json")
    for old in sorted(output.glob("checkpoint-*"))[:-keep]:
        if int(old.name.split("-")[1]) != best.get("step"):
            shutil.rmtree(old)


def resume(choice: str, output: Path, model, optimizer, run: dict) -> tuple[int, dict]:
    """Load the checkpoint that --resume names, on every rank. Returns the steps done and the best evaluation so far."""
    if choice == "none":
        return 0, {}
    found = sorted(output.glob("checkpoint-*/state.pt")) if choice == "auto" else [Path(choice) / "state.pt"]
    if not found:
        print0(f"nothing to resume in {output}: starting at step 0")
        return 0, {}
    folder = found[-1].parent
    state = torch.load(folder / "state.pt", weights_only=True, map_location="cpu")
    if state["train_data"] != run["train_data"]:
        raise InputError(f"{folder} was trained on other rows than {run['settings']['train']} holds now")
    set_peft_model_state_dict(unwrap(model).model, load_file(folder / "adapter_model.safetensors"))
    optimizer.load_state_dict(state["optimizer"])
    print0(f"resumed {folder} at step {state['step']}")
    return state["step"], state["best"]


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as error:
        print0(f"error: {error}")
        sys.exit(2)
