"""The rehearsal: no micro-batch of a run is larger than its bounds, and a micro-batch that reaches them runs first."""

import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import rank_budgets
import tiny
import torch
from runs import Run
from steps import ALONE

import trees
from common import InputError
from data import Sample, TreeDataset
from dist_utils import Ranks
from model import TreeModel
from modeling.memory import kept_bytes
from training import costs
from training.gpus import GPUS
from training.plan import COMPILE_S, LAST_LAYER_S
from training.rehearsal import Attempts, largest_batch, micro_batch_bounds, plan_attempts, rehearse_step
from trees import PlanSettings, StepSampler, tree_shape

IMAGE, START, END = 1, 2, 3


def make_sample(number: int, images: list[tuple], prompt: list[int], answer: int, later: tuple | None = None) -> Sample:
    """A question about images (name, tokens) with `answer` answer tokens. `later`: an image shown after that answer,
    and the number of tokens of a second answer."""
    ids, weights = [START, *[IMAGE] * len(images), *prompt, *[END] * answer], None
    weights = [0.0] * (len(ids) - answer) + [1.0] * answer
    if later:
        images = [*images, later[0]]
        ids, weights = ids + [IMAGE, 9] + [END] * later[1], weights + [0.0] * 2 + [1.0] * later[1]
    ids = np.array(ids, np.int32)
    names, tokens = zip(*images) if images else ((), ())
    image_at, patches = tuple(np.flatnonzero(ids == IMAGE).tolist()), tuple(4 * count for count in tokens)
    last = len(ids) - (later[1] if later else answer)
    return Sample(f"{number}", "", names, ids, np.array(weights), last, image_at, tokens, patches, {})


def random_data(random: np.random.Generator) -> list[Sample]:
    """Rows with one image, two or none, and with an image after a first answer; 1 to 17 questions about an image, many
    of which begin alike; short and long prompts and answers, in one file or two."""
    samples, longest = [], random.choice([8, 300])
    for group in range(random.integers(1, 12)):
        kind = random.choice(["one", "one", "one", "two", "none", "later"])
        images = [(f"{group} {n}", int(random.integers(1, longest))) for n in range({"none": 0, "two": 2}.get(kind, 1))]
        later = ((f"{group} later", int(random.integers(1, longest))), int(random.integers(1, 9)))
        file = int(random.integers(2))
        for _ in range(random.integers(1, 18)):
            prompt = [5] * random.integers(1, 9) + random.integers(5, 9, random.choice([2, 40])).tolist()
            answer = int(random.integers(1, random.choice([3, 60])))
            sample = make_sample(len(samples), images, prompt, answer, later if kind == "later" else None)
            samples.append(replace(sample, file=file))
    return samples


def size(samples: list[Sample], trees) -> tuple[int, int, int]:
    """Tokens, patches and answer tokens of a micro-batch."""
    patches = answers = 0
    for tree in trees:
        chosen = [samples[index] for index in tree.samples]
        patches += sum(chosen[k].patches[image] for k, image in tree_shape(chosen, tree.prefix_ids).encoded)
        answers += sum(int(sample.trained.sum()) for sample in chosen)
    return sum(tree.tokens for tree in trees), patches, answers


@pytest.fixture
def quick(monkeypatch):
    """Plan and share out once for all ranks, from few draws: bounds hold for any."""
    plan_steps, plans = trees.plan_steps, {}

    def plan_once(samples, settings, epoch, groups):
        if (settings, epoch) not in plans:
            plans[settings, epoch] = list(plan_steps(samples, settings, epoch, groups))
        return plans[settings, epoch]

    monkeypatch.setattr("trees.DRAWS", 2)
    monkeypatch.setattr("trees.share_out", lru_cache(trees.share_out))
    monkeypatch.setattr("trees.plan_steps", plan_once)


def sizes(samples, settings, max_tokens, ranks, epochs=2) -> np.ndarray:
    """(micro-batches, 3) sizes of all micro-batches of all ranks."""
    found = []
    for rank in range(ranks):
        sampler = StepSampler(samples, settings, max_tokens, rank, ranks)
        for epoch in range(epochs):
            sampler.set_epoch(epoch)
            found += [size(samples, assignment.trees) for assignment in sampler]
    return np.array(found)


def limits(bounds) -> np.ndarray:
    return np.array([bounds.tokens, bounds.patches, bounds.answers])


@pytest.mark.parametrize("seed", range(60))
def test_no_micro_batch_of_any_rank_and_epoch_is_larger_than_the_bounds(quick, seed):
    random = np.random.default_rng(seed)
    samples, ranks = random_data(random), int(random.choice([1, 2, 3, 5, 8, 16]))
    weights = tuple(random.choice([0.4, 1.0, 2.5], 2).tolist()) if random.random() < 0.5 else ()
    settings = PlanSettings(int(random.choice([1, 4, 16, 64])), int(random.choice([0, 0, 1, 3])), seed, weights)
    max_tokens = int(max(sample.tokens for sample in samples) * random.choice([1, 1.5, 4, 20]))
    bounds = micro_batch_bounds(samples, settings, max_tokens)
    assert np.all(sizes(samples, settings, max_tokens, ranks) <= limits(bounds)), bounds
    tokens, patches, _ = size(samples, bounds.largest)
    assert tokens <= bounds.tokens <= max_tokens and patches == bounds.patches


def test_bounds_of_a_few_samples():
    short = [make_sample(n, [], [n + 5, 7], 9) for n in range(20)]  # 12 tokens
    plain = make_sample(0, [("a.png", 90)], [5] * 5, 4)  # 100 tokens
    larger = make_sample(0, [("b.png", 92)], [5] * 3, 4)  # as many tokens with a larger image
    for samples, batch_size, weights, expected in (
        ([plain], 1, (), (100, 360, 4)),
        ([plain], 3, (3.0,), (300, 1080, 12)),  # it comes three times per epoch
        ([plain, larger], 1, (), (100, 368, 4)),
        ([larger, plain], 1, (), (100, 368, 4)),
        ([plain, *short], 1, (), (100, 360, 9)),  # a step has one question
    ):
        assert tuple(limits(micro_batch_bounds(samples, PlanSettings(batch_size, 0, 0, weights), 999))) == expected


@pytest.mark.parametrize("limit", [0, 1, 4])
def test_bounds_of_equal_images_are_nearly_reached(quick, limit):
    """9 questions of 195 tokens about images of 2,700. What never comes would take memory, and so time, for nothing."""
    prompts = np.random.default_rng(0).integers(5, 999, (40 * 9, 188)).tolist()
    samples = [make_sample(n, [(f"{n // 9}", 2700)], prompt, 5) for n, prompt in enumerate(prompts)]
    settings = PlanSettings(96, limit, 0)
    ratio = limits(micro_batch_bounds(samples, settings, 8192)) / sizes(samples, settings, 8192, 2).max(0)
    assert np.all(ratio < (1.5, 1.01, 2.2))


# ------------------------------------------------------------------------------------------------------- the rehearsal


def rehearsal(world, **lora) -> tuple:
    """Model, data set and bounds as train.py has them."""
    data, dataset = tiny.load_world(world)
    bounds = micro_batch_bounds(data.samples, PlanSettings(8, 0, 0), 700)
    return tiny.lora_model(world, **lora), TreeDataset(data, dataset.settings, at_least=bounds.tokens), bounds


def rehearse(model, dataset, bounds, budgets=(None,), late=True) -> float | None:
    attempts = Attempts(list(budgets), late)
    return rehearse_step(model, torch.optim.SGD(model.parameters()), dataset, bounds, ALONE, torch.float32, attempts)


def without_images(folder):
    rows = [{"question": f"What is finding {n}?", "answer": "a growth " * n} for n in range(1, 9)]
    return tiny.write_world(folder, rows)


@pytest.mark.parametrize("images", [True, False])
def test_the_rehearsed_micro_batch_reaches_all_bounds(world, tmp_path, images):
    _, dataset, bounds = rehearsal(world if images else without_images(tmp_path / "world"))
    batch = largest_batch(dataset, bounds)
    assert (len(batch.ids), len(batch.patches), len(batch.targets)) == tuple(limits(bounds))
    assert len(batch.answer_at) == len(batch.weights) == len(batch.question) and bool(len(batch.patches)) is images
    assert len(batch.paths["branch_starts"]) == bounds.branches + 1 == 9
    assert len(batch.paths["order"]) == bounds.tokens
    assert batch.paths["root_starts"].tolist() == [0, -(-len(batch.ids) // 2)]
    assert batch.paths["branch_starts"].diff().min() > 0


@pytest.mark.parametrize("images", [True, False])
@pytest.mark.parametrize("targets", ["q_proj,down_proj", "q_proj,vision,merger"])
def test_a_rehearsal_gives_each_trained_weight_a_gradient_and_leaves_nothing(world, tmp_path, images, targets, capfd):
    """Also where the vision tower is trained and no row has an image."""
    run = rehearsal(world if images else without_images(tmp_path / "world"), targets=targets)
    before = {name: weight.clone() for name, weight in run[0].state_dict().items()}
    rehearse(*run)
    assert all(torch.equal(weight, before[name]) for name, weight in run[0].state_dict().items())
    assert all(weight.grad is None for weight in run[0].parameters())
    tokens, patches, answers = limits(run[2])
    line = (
        f"rehearsed the largest micro-batch: {tokens:,} tokens, {patches:,} patches and {answers:,} answer tokens in "
    )
    assert line in capfd.readouterr().out


def test_a_weight_without_a_gradient_stops_the_run(world):
    model, *others = rehearsal(world)
    model.model.spare = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(RuntimeError, match=r"spare gets no finite gradient from rows.jsonl:\d+"):
        rehearse(model, *others)


def test_too_little_memory_is_told_with_the_settings_that_need_less(world, monkeypatch):
    run = rehearsal(world)

    def out_of_memory(*args):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(run[0], "forward", out_of_memory)
    with pytest.raises(InputError, match=", of .* tokens, .*, does not fit .*: lower --max-tokens, .* --max-pixels"):
        rehearse(*run)


# --------------------------------------------------------------------------------------------------------- compiling


def test_compiling_is_told_with_the_time_it_takes(world, monkeypatch, capfd):
    run, compiled = rehearsal(world), []
    monkeypatch.setattr("training.rehearsal.compile_layers", lambda model, budget: compiled.append((model, budget)))
    rehearse(*run, budgets=[0.5])
    assert compiled == [(run[0].model, 0.5)]
    line = "compiling for a memory budget of 0.5: this takes up to a minute, more on slow CPUs\n"
    assert line in capfd.readouterr().out


@pytest.mark.parametrize("late", [False, True])
def test_only_compiled_layers_leave_out_tokens_late(world, monkeypatch, late):
    """Not an attempt without compiling, and all compiled attempts after it."""
    (model, *others), tried, attempt = rehearsal(world), [], TreeModel.forward

    def forward(self, batch):
        tried.append(self.leaves_out_late)
        if len(tried) < 3:
            raise torch.OutOfMemoryError
        return attempt(self, batch)

    monkeypatch.setattr(TreeModel, "forward", forward)
    monkeypatch.setattr("training.rehearsal.compile_layers", lambda *_: None)
    assert rehearse(model, *others, budgets=[None, 1.0, 0.5], late=late) == 0.5
    assert tried == [False, late, late]


ALL = [1.0, 0.5, 0.2, 0.0]


@pytest.mark.parametrize(
    ("settings", "room", "seconds", "tried", "late"),
    [
        ({"compile": "off"}, 9.0, 9e9, [None], False),
        ({"compile": "on"}, 9.0, 0, ALL, True),
        ({"compile": "on"}, 9.0, 1240, ALL, True),  # 0.0145 of 1,241 s are the 18 s of compiling the last layer apart
        ({"compile": "on"}, 9.0, 1250, ALL, False),
        ({"compile": "auto"}, 9.0, 9e9, ALL, False),
        ({"compile": "auto"}, 9.0, 24, ALL, True),  # compiling saves 1.0355 s of each
        ({"compile": "auto"}, 9.0, 22, [None, *ALL], True),  # the others, where memory does not suffice
        ({"compile": "auto", "base_precision": "fp8"}, 9.0, 22, ALL, True),  # too slow without
        ({"compile": "auto", "base_precision": "fp8"}, 9.0, 1250, ALL, False),
        ({"compile": "auto"}, 2.6, 22, ALL, True),  # too little memory
        ({"compile": "auto"}, 0.6, 22, [0.5, 0.2, 0.0], True),
        ({"compile": "auto"}, 0.6, 1150, [0.5, 0.2, 0.0], False),  # 1,254 s at that budget
        ({"compile": "auto", "memory_budget": 0.5}, 9.0, 22, [0.5], True),
        ({"compile": "on", "memory_budget": 0.75}, 9.0, 1180, [0.75], True),  # 1.045 times as long
        ({"compile": "on", "memory_budget": 0.75}, 9.0, 1195, [0.75], False),
        ({"compile": "auto", "dora": True}, 9.0, 9e9, [None], False),
    ],
)
def test_auto_compiles_what_pays_or_does_not_fit_otherwise(monkeypatch, capsys, settings, room, seconds, tried, late):
    """`room`: for activations, in `kept_bytes`; `seconds`: of training at budget 1."""
    text = SimpleNamespace(num_hidden_layers=2, hidden_size=64, intermediate_size=128)
    vars(text).update(num_attention_heads=4, num_key_value_heads=2)
    config = SimpleNamespace(model_type="qwen3_vl", text_config=text)
    model = SimpleNamespace(base=SimpleNamespace(config=config), model=None)
    prepared = SimpleNamespace(config=None, train=None, val=None, plan=[], checkpoint=Path("checkpoint-000007"))
    prepared.bounds = SimpleNamespace(tokens=4096, branches=8)
    args = SimpleNamespace(**({"memory_budget": "auto", "dora": False, "base_precision": "bf16"} | settings))
    left, ranks = [], Ranks(0, 1, torch.device("cuda"))

    def pace_of(job, gpu, options, counts):
        left.append(job.done)
        return {1: SimpleNamespace(training=seconds)}

    kept = kept_bytes(model.base.config, 4096)
    monkeypatch.setattr("training.rehearsal.activation_room", lambda _: room * kept)
    monkeypatch.setattr("training.plan.known_gpu", lambda _: GPUS["h100"])
    monkeypatch.setattr("training.plan.uncounted", lambda *_: "")
    monkeypatch.setattr("training.plan.make_job", lambda *_: SimpleNamespace())
    monkeypatch.setattr("training.plan.pace", pace_of)
    assert plan_attempts(args, prepared, model, ranks) == (tried, late)
    told = capsys.readouterr().out
    compiled = [budget for budget in tried if budget is not None]
    assert left == [7] * bool(compiled)
    if told:
        verb = "compiled" if None not in tried else "not compiled"
        takes, slower = (COMPILE_S, 1 + costs.LAST_LAYER_SHARE) if late else (COMPILE_S + LAST_LAYER_S, 1)
        saved = (costs.EAGER_TIME - slower) * seconds
        of_time = f"compiling takes {takes} s and saves {saved:,.0f} s of training"
        assert told == f"layers are {verb} (--compile auto): {of_time}\n" and len(told) <= 100
    assert bool(told) == (args.compile == "auto" and room > 2.7 and args.base_precision == "bf16" and len(tried) > 1)
    monkeypatch.setattr("training.plan.known_gpu", lambda _: None)  # nothing is known of its rates: as before
    assert plan_attempts(args, prepared, model, ranks) == (compiled or [None], False)
    assert capsys.readouterr().out == ""


def test_all_ranks_compile_what_rank_0_plans(tmp_path):
    Run([tmp_path], tmp_path / "log", ranks=2, main=rank_budgets.main).succeed()
    decisions = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert decisions == 2 * [[[ALL, True], [[0.75], True], [[None, *ALL], True], [ALL, False]]]
