"""What a run reports while it trains: lines of metrics, status, curves.svg, TensorBoard and Weights & Biases."""

import errno
import importlib
import json
import re
import shutil
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from runs import arguments, lines
from steps import whole
from test_trees import make_samples
from transformers import AutoConfig

import train
from common import InputError
from data import build_batch
from dist_utils import Ranks
from evaluation.charts import curves, sheet
from model import load_base
from training import checkpoints, metrics, settings
from training import trackers as watch
from training.costs import tree_counter, tree_load
from training.gpus import Gpu
from training.metrics import Metrics, read_metrics
from training.progress import Progress
from training.settings import parse_settings
from trees import Assignment, PlanSettings, StepFacts, StepSampler, cost_of, make_plan, rank_efficiency

FIELDS = {"event", "step", "loss", "grad_norm", "lr", "questions", "images", "questions_per_s", "tokens_per_s"}
FIELDS |= {"tflops_per_gpu", "data_wait", "rank_efficiency", "skipped", "epoch", "eta_s"}
FACTS = StepFacts(0, questions=8, images=2, answer_weight=10, tokens=500, flops=3e12)


def sampler_of(world: Path, rank: int = 0, world_size: int = 1) -> StepSampler:
    samples = tiny.load_world(world)[0].samples
    flops = tree_counter(AutoConfig.from_pretrained(world / "model"), samples, known=True)
    return StepSampler(samples, PlanSettings(8, 0, seed=0), 700, rank, world_size, flops)


def test_operations_can_leave_out_the_vision_tower(world):
    config, samples = AutoConfig.from_pretrained(world / "model"), tiny.load_world(world)[0].samples
    tree = whole(samples)[0]
    flops = tree_load(config, samples, tree)[0]
    assert tree_counter(config, samples, True)(tree) == sum(flops) > 0
    assert tree_counter(config, samples, True, tower=False)(tree) == flops.language + flops.attention < sum(flops)


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Make Metrics of a run of 40 steps, 10 per epoch, whose clock advances by four seconds at each reading."""
    looks = count(1000, 4)
    monkeypatch.setattr(metrics, "time", SimpleNamespace(perf_counter=lambda: float(next(looks))))

    def make(start: dict | None = None, gpu: Gpu | None = None, world_size: int = 1, trackers=(), steps=40) -> Metrics:
        ranks = Ranks(0, world_size, torch.device("cpu"))
        progress = Progress.from_state(start or {})
        reported = Metrics(tmp_path, progress, steps, 10, gpu, ranks, list(trackers))
        reported.start(progress)
        reported.progress = progress
        return reported

    return make


def take(
    run_metrics: Metrics, done: int, loss: float = 2.0, grad_norm: float = 1.0, last: bool = True, facts=FACTS
) -> dict:
    """One step; returns the last line."""
    run_metrics.progress.step = done
    run_metrics.step(run_metrics.progress, facts, loss, grad_norm, 1e-4, 0.5, last)
    return (read_metrics(run_metrics.output / "metrics.jsonl") or [{}])[-1]


def evaluated(run_metrics: Metrics, step: int, result: dict, is_best: bool) -> None:
    run_metrics.progress.step = step
    if is_best:
        run_metrics.progress.best = {"exact_match": result["exact_match"], "step": step}
    run_metrics.evaluation(run_metrics.progress, result, is_best)


# ---------------------------------------------------------------------------------------------------------- the numbers


def test_a_run_s_lines_have_every_number_and_its_bar_the_main_ones(world, tmp_path, capsys):
    train.main(arguments(world, tmp_path / "out", **{"log-every": 2}))
    written = lines(tmp_path / "out", "train")
    assert [line["step"] for line in written] == [2, 4, 6] and all(line.keys() == FIELDS for line in written)
    assert [line["epoch"] for line in written] == [0.4, 0.8, 1.2] and written[-1]["eta_s"] == 0 < written[0]["eta_s"]
    printed = capsys.readouterr()
    curves_line, _, next_command = printed.out.splitlines()[-3:]
    assert curves_line == f"curves: {tmp_path / 'out' / 'curves.svg'}"
    assert next_command.endswith(f"eval.py --ckpt {tmp_path / 'out'}")
    bar = printed.err.splitlines()[-1]
    assert " on 1 ranks" not in printed.out and {line["rank_efficiency"] for line in written} == {1.0}
    assert re.search(r" 6/6 \[\d\d:\d\d<00:00, loss [\d.]+, lr [\d.e-]+, [\d.e+]+ questions/s\]$", bar)
    sampler = sampler_of(world)  # the speeds of a line share one duration
    steps = {}
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        steps |= {assignment.step.number: assignment.step for assignment in sampler}
    plan = list(steps.values())
    for line, two in zip(written, zip(plan[::2], plan[1::2])):
        seconds = sum(facts.questions for facts in two) / line["questions_per_s"]
        assert line["tokens_per_s"] * seconds == pytest.approx(sum(facts.tokens for facts in two))
        assert line["tflops_per_gpu"] * seconds * 1e12 == pytest.approx(sum(facts.flops for facts in two))


@pytest.mark.parametrize("columns", [80, 300])
def test_the_bar_fits_100_columns_and_the_terminal(make, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    for loss, questions, steps, hours in ((0.5, 8, 7704, 20), (1.234e-5, 1_234_567, 1_234_567, 1200)):
        run_metrics = make(steps=steps)
        run_metrics.bar.n = run_metrics.progress.step = steps // 3
        run_metrics.bar.start_t -= 3600 * hours
        facts = replace(FACTS, questions=questions)
        run_metrics.step(run_metrics.progress, facts, loss, 1.0, 1.234e-5, 0.5, True)
        line = str(run_metrics.bar)
        assert len(line) <= min(100, columns) and line.startswith(" 33%|")
        assert line.endswith(" questions/s]") or hours == 1200 and columns == 80  # only then it is cut


def operations(model, batch) -> float:
    """By hand: every matrix's weights times its rows, twice forward, and twice backward outside the vision tower; every
    visible pair of tokens and pair of an image's patches."""
    text, vision = model.config.text_config, model.config.vision_config
    patches, tokens, answers = len(batch.patches), len(batch.ids), len(batch.targets)
    total = 0
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            if "visual" in name:
                total += 2 * module.weight.numel() * (patches / 4 if "merger" in name else patches)
            else:
                late = "lm_head" in name or f"layers.{text.num_hidden_layers - 1}.mlp" in name
                total += 4 * module.weight.numel() * (answers if late else tokens)
    index = torch.arange(tokens)
    visible = (batch.tree[:, None] == batch.tree) & (index[:, None] >= index)
    visible &= (batch.branch == 0) | (batch.branch[:, None] == batch.branch)
    heads = text.num_attention_heads * text.head_dim
    total += 3.5 * 4 * heads * text.num_hidden_layers * int(visible.sum())
    return total + 4 * vision.hidden_size * vision.depth * int((batch.grid.prod(-1) ** 2).sum())


@pytest.mark.parametrize("world_size", [1, 2])
def test_speeds_of_a_step_are_those_worked_out_by_hand(world, make, world_size):
    data, dataset = tiny.load_world(world)
    model = load_base(world / "model", torch.float32, torch.device("cpu"))
    step = make_plan(data.samples, PlanSettings(8, 0, seed=0), 0)[1]
    batches = [build_batch(data, Assignment((tree,)), dataset.settings) for tree in step]
    facts = next(iter(w.step for w in sampler_of(world, world_size - 1, world_size) if w.step.number == 1))
    assert facts.tokens == sum(len(batch.ids) for batch in batches)
    flops = sum(operations(model, batch) for batch in batches)
    assert facts.flops == pytest.approx(flops, rel=1e-12)

    line = take(make(gpu=Gpu((), 80, tflops=1e-4), world_size=world_size), 1, facts=facts)  # four seconds
    assert line["tokens_per_s"] == facts.tokens / 4 and line["questions_per_s"] == 2
    assert line["tflops_per_gpu"] == pytest.approx(flops / 4 / world_size / 1e12)
    assert line["matmul_share"] == pytest.approx(line["tflops_per_gpu"] / 1e-4)


def test_operations_that_are_not_known_are_left_out(world, make):
    config = AutoConfig.from_pretrained(world / "model")
    samples = tiny.load_world(world)[0].samples
    sampler = StepSampler(samples, PlanSettings(8, 0, seed=0), 700, 0, 1, tree_counter(config, samples, known=False))
    facts = next(iter(sampler)).step
    assert facts.flops == 0 < facts.tokens
    line = take(make(gpu=Gpu((), 80, 1)), 1, facts=facts)
    assert not {"tflops_per_gpu", "matmul_share"} & line.keys() and line["tokens_per_s"] == facts.tokens / 4


def test_speed_and_time_left_are_those_since_this_start(make):
    run_metrics = make()
    take(run_metrics, 1, last=False)
    resumed = make({"step": 1, "sums": run_metrics.progress.sums})
    line = take(resumed, 2)
    assert line["questions"] == 16 and line["loss"] == 2 and line["questions_per_s"] == 8 / 4
    assert line["eta_s"] == 38 * 8  # a step takes two readings of the clock, eight seconds


def test_set_up_evaluations_and_saves_take_from_the_time_left_and_not_from_the_speed(world, tmp_path, monkeypatch):
    now, long = time.perf_counter, 1e6  # seconds
    ahead = []
    monkeypatch.setattr(time, "perf_counter", lambda: now() + sum(ahead))
    for module, name in ((train, "rehearse"), (train, "evaluate"), (checkpoints, "save_checkpoint")):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *words, real=real: ahead.append(long) or real(*words))
    train.main(arguments(world, tmp_path / "out"))
    written = lines(tmp_path / "out", "train")
    assert all(line["questions_per_s"] > 1e3 / long for line in written)
    assert written[1]["eta_s"] < long < written[2]["eta_s"]  # the first evaluation follows step 2


def test_rank_efficiency_is_what_a_line_s_steps_cost_over_what_ranks_paid_also_over_a_stop(make):
    good, poor = (replace(FACTS, cost=cost, paid=paid) for cost, paid in ((6.0, 8.0), (3.0, 10.0)))
    run_metrics = make(world_size=2)
    take(run_metrics, 1, facts=good, last=False)
    resumed = make({"step": 1, "sums": run_metrics.progress.sums}, world_size=2)
    take(resumed, 2, loss=float("nan"), facts=poor, last=False)  # a skipped step is paid for too
    assert take(resumed, 3, facts=replace(FACTS, cost=1.0, paid=7.0))["rank_efficiency"] == 0.4  # 10 of 25
    assert take(resumed, 4, facts=good)["rank_efficiency"] == 0.75
    assert (resumed.cost, resumed.paid) == (10, 25)  # without the step before the stop


def test_a_step_costs_its_trees_once_and_ranks_pay_for_the_busiest_of_them(world, on_two_ranks):
    samples, settings = tiny.load_world(world)[0].samples, PlanSettings(8, 0, seed=0)
    by_rank = []
    for rank in (0, 1):
        work = list(StepSampler(samples, settings, 9999, rank, 2))
        by_rank.append([sum(cost_of(w.trees) for w in work if w.step.number == step) for step in range(5)])
        facts = {w.step.number: w.step for w in work}
    plan = make_plan(samples, settings, 0)
    for step, costs in enumerate(zip(*by_rank)):
        assert facts[step].cost == pytest.approx(sum(tree.cost for tree in plan[step]))
        assert facts[step].paid == pytest.approx(2 * max(costs))
    assert facts[4].questions == 1 and facts[4].cost / facts[4].paid == 0.5  # one of the two ranks waits

    written, steps = lines(on_two_ranks, "train"), [*plan, make_plan(samples, settings, 1)[0]]
    assert [line["rank_efficiency"] for line in written] == pytest.approx([rank_efficiency([s], 2) for s in steps])
    told = f"rank efficiency {rank_efficiency(steps, 2):.0%} on 2 ranks\n"
    assert (on_two_ranks.parent / "log").read_text().count(told) == 1


def test_a_run_whose_ranks_waited_names_the_batch_size_that_would_keep_them_busy():
    """Equal trees of one branch: four of them keep half of eight ranks busy."""
    prepared = SimpleNamespace(train=SimpleNamespace(samples=make_samples(160, 1)))

    def told(cost: float, paid: float, batch_size: int) -> str:
        args = parse_settings([f"--batch-size={batch_size}"])
        ranks, counted = SimpleNamespace(world_size=8), SimpleNamespace(cost=cost, paid=paid)
        return train.efficiency_line(SimpleNamespace(args=args, ranks=ranks, metrics=counted, prepared=prepared))

    remedy = "at 8 GPUs --batch-size 8 would use 100% of them, 4 uses 50%"
    learning = "what batch size does to learning: docs/grouping.md"
    assert told(4.0, 8.0, 4) == f"rank efficiency 50% on 8 ranks\n{remedy}\n{learning}"
    assert told(4.0, 8.0, 16) == "rank efficiency 50% on 8 ranks"  # no larger one would be better
    assert told(9.0, 10.0, 4) == "rank efficiency 90% on 8 ranks"  # enough


def test_skipped_steps_are_counted_over_lines_and_starts(make):
    run_metrics = make()
    take(run_metrics, 1, loss=float("nan"), last=False)
    take(run_metrics, 2, grad_norm=float("inf"), last=False)
    assert take(run_metrics, 3)["skipped"] == 2
    assert take(make({"step": 3, "sums": run_metrics.progress.sums}), 4)["skipped"] == 2


@pytest.mark.parametrize("spoiled", [{"loss": float("nan"), "grad_norm": float("nan")}, {"grad_norm": float("inf")}])
def test_a_line_averages_the_steps_that_were_not_skipped(make, spoiled):
    """Otherwise it would hold NaN or Infinity, which JSON does not have."""
    run_metrics = make()
    take(run_metrics, 1, loss=2.0, grad_norm=0.5, last=False)
    line = take(run_metrics, 2, **{"loss": 9.0, **spoiled})
    assert (line["loss"], line["grad_norm"], line["questions"]) == (2.0, 0.5, 16)


def test_an_evaluation_that_is_still_due_is_written_once(make):
    """The run was stopped before the evaluation, resumed with it, and was killed before the save that follows."""
    run_metrics, result = make(), {"loss": 1.5, "exact_match": 0.5}
    take(run_metrics, 5)
    evaluated(run_metrics, 5, result, is_best=True)
    evaluated(make({"step": 5}), 6, result, is_best=False)
    assert [line["step"] for line in read_metrics(run_metrics.output / "metrics.jsonl")] == [5, 5, 6]
    evaluated(make({"step": 5, "evaluation_due": True}), 5, result, is_best=True)
    assert [line["event"] for line in read_metrics(run_metrics.output / "metrics.jsonl")] == ["train", "eval"]


# --------------------------------------------------------------------------------------------------- status and curves


def test_status_says_how_far_a_run_is(make):
    run_metrics = make()
    run_metrics.status("running", run_metrics.progress)
    status = run_metrics.output / "status"
    assert status.read_text() == "running 0\nstep 0 of 40\n"
    take(run_metrics, 5)
    assert status.read_text() == "running 5\nstep 5 of 40, epoch 0.50, 0:00:56 left, loss 2\n"
    evaluated(run_metrics, 5, {"loss": 1.5, "exact_match": 0.625}, is_best=True)
    evaluated(run_metrics, 6, {"loss": 1.5, "exact_match": 0.5}, is_best=False)
    expected = "step 6 of 40, epoch 0.60, 0:00:56 left, loss 2, best exact match 62.5% at step 5"
    assert status.read_text() == f"running 6\n{expected}\n"
    resumed = make({"step": 6, "best": run_metrics.progress.best})
    resumed.status("stopped", resumed.progress)
    assert status.read_text() == f"stopped 6\n{expected}\n"
    run_metrics.status("done", run_metrics.progress)  # by --patience
    assert status.read_text() == f"done 6\n{expected.replace(', 0:00:56 left', '')}\n"


def test_curves_are_redrawn_at_every_evaluation(make):
    run_metrics, drawn = make(), []
    for step in (1, 2, 3):
        take(run_metrics, step)
        evaluated(run_metrics, step, {"loss": 1.5, "exact_match": 0.5}, is_best=False)
        root = ElementTree.parse(run_metrics.output / "curves.svg").getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        circles = root.findall(".//{*}circle[@class='k1']")
        drawn.append((len(circles), "".join(root.itertext())))
    assert [points for points, _ in drawn] == [1, 2, 3]
    assert all(name in drawn[0][1] for name in ("training loss", "validation loss", "exact match", "learning rate"))


def test_a_run_without_validation_rows_draws_its_curves_too(world, tmp_path):
    train.main([*arguments(world, tmp_path / "out"), "--val="])
    written = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert (tmp_path / "out" / "curves.svg").read_text() == sheet(curves(written)) and len(curves(written)) == 2


def test_a_full_disk_costs_status_and_curves_and_nothing_else(make, monkeypatch, capsys):
    def full(path, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    run_metrics = make()
    monkeypatch.setattr(metrics, "write_whole", full)
    take(run_metrics, 1)
    run_metrics.draw()
    printed = capsys.readouterr().out
    assert "status not written: " in printed and "curves.svg not written: [Errno 28] No space" in printed


# ------------------------------------------------------------------------------------------------------------ trackers


def test_a_tracker_that_fails_is_reported_once_and_stops_nothing(make, capsys):
    class Broken:
        calls = 0

        def write(self, line):
            self.calls += 1
            raise ConnectionResetError("Connection lost")

    broken, whole = Broken(), SimpleNamespace(lines=[], close=lambda code: None)
    whole.write = whole.lines.append
    run_metrics = make(trackers=[broken, whole])
    written = [take(run_metrics, step) for step in (1, 2)]
    run_metrics.close(0)
    assert whole.lines == written and broken.calls == 1
    assert capsys.readouterr().out.count("Broken gets nothing more until the run is resumed: ConnectionReset") == 1


@pytest.mark.parametrize("spec", [None, SimpleNamespace(origin=None)])  # a folder of that name has no origin
def test_a_package_that_is_not_installed_is_an_error_before_anything_is_loaded(monkeypatch, spec):
    monkeypatch.setattr(settings, "find_spec", lambda name: spec)
    parse_settings([])
    with pytest.raises(InputError) as caught:
        parse_settings(["--tensorboard", "--wandb", "polyps"])
    problems = ["--tensorboard: not installed here: pip install tensorboard"]
    assert str(caught.value).split("\n  ")[1:] == [*problems, "--wandb: not installed here: pip install wandb"]


@pytest.fixture(scope="module")
def resumed(world, tmp_path_factory):
    """A run of six steps with both trackers that resumed from step 2, and the lines before and after."""
    pytest.importorskip("tensorboard")
    pytest.importorskip("wandb")
    output = tmp_path_factory.mktemp("tracked") / "out"
    words = [*arguments(world, output, keep=9), "--tensorboard", "--wandb=polyps"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_ERROR_REPORTING", "false")
        train.main(words)
        before = read_metrics(output / "metrics.jsonl")
        for step in (4, 6):
            shutil.rmtree(output / f"checkpoint-{step:06d}")
        train.main([*words, "--resume=auto"])
    return output, before, read_metrics(output / "metrics.jsonl")


def test_tensorboard_has_the_numbers_of_metrics_jsonl_each_step_once(resumed):
    output, before, after = resumed
    assert before[:3] == after[:3] and before[3:] != after[3:]
    accumulator = importlib.import_module("tensorboard.backend.event_processing.event_accumulator").EventAccumulator
    events = accumulator(str(output / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    expected = {}
    for line in after:
        for name, value in watch.scalars(line).items():
            expected.setdefault(name, []).append((line["step"], pytest.approx(value, rel=1e-6)))
    assert {"train/loss", "train/eta_s", "eval/exact_match", "eval/exact_match/yes/no"} <= expected.keys()
    logged = {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
    assert logged == expected


def test_wandb_gets_numbers_and_settings_and_goes_on_with_the_same_run(resumed):
    output, before, after = resumed
    name = (output / "wandb-id").read_text()
    folders = sorted((output / "wandb").glob("offline-run-*"))
    assert len(folders) == 2 and all(folder.name.endswith(name) for folder in folders)
    again = [line for line in after if line["step"] > 2]
    for folder, kept in zip(folders, (before, again)):
        written = (folder / f"run-{name}.wandb").read_bytes()
        assert b"polyps" in written and json.dumps(str(output)).encode() in written
        for line in kept:
            assert all(json.dumps(value).encode() in written for value in watch.scalars(line).values())
        assert "⟦" not in written.decode(errors="ignore")


def test_wandb_that_can_not_start_is_an_error_before_the_model_is_loaded(world, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")

    def init(**options):
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr(train, "load_base", lambda *_: pytest.fail("loaded"))
    with pytest.raises(InputError, match="--wandb: No API key configured. .WANDB_MODE=offline"):
        train.main([*arguments(world, tmp_path / "out"), "--wandb=polyps"])
