"""Answers of a model to rows: generated greedily, and options weighed by likelihood.

Every pass runs over all ranks, each sample once, and writes what it finds as it comes, so that one that is interrupted
goes on where it was.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import DynamicCache

import dist_utils
from data import Sample, TreeDataset, VQAData, make_loader, next_batches, padding
from dist_utils import Ranks, Stop
from model import TreeModel, autocast
from modeling.attention import tree_mask, visible
from trees import evaluation_share, whole_trees

MAX_TREES = 8  # run at once: a new token is compared with the tokens of all of them, though it sees those of one


@dataclass
class Run:
    """Where and how samples are run through the model, and where results go as they come."""

    args: argparse.Namespace
    ranks: Ranks
    dtype: torch.dtype
    stop: Stop
    store: Path  # a file a rank and pass: a run that finds some goes on where another was interrupted

    @torch.no_grad()
    def over(self, dataset: TreeDataset, function: Callable, name: str) -> list | None:
        """What `function` gives for each sample of a batch, for all samples, over all ranks. None when stopped."""
        self.store.mkdir(parents=True, exist_ok=True)
        samples, ranks = dataset.data.samples, self.ranks
        done = dist_utils.from_rank0(lambda: self._stored(name))
        batches = whole_trees(samples, self.args.max_tokens, MAX_TREES)
        left = [batch for batch in batches if not all(i in done for tree in batch for i in tree.samples)]
        work = evaluation_share(left, ranks.rank, ranks.world_size)
        bar = tqdm(total=len(samples), initial=len(done), desc=name, unit="q", disable=not ranks.is_main)
        with open(self.store / f"{name}-{time.time_ns()}-{ranks.rank}.jsonl", "w", encoding="utf-8") as file:
            for batch in next_batches(make_loader(dataset, work, self.args.workers, ranks.device)):
                if self.stop.reason:
                    break
                with autocast(ranks.device, self.dtype):
                    results = function(batch.to(ranks.device))
                file.writelines(json.dumps(pair) + "\n" for pair in zip(batch.samples, results))
                file.flush()
                bar.update(len(results) * ranks.world_size)
        bar.close()
        if self.stop.agreed():
            return None
        results = dist_utils.from_rank0(lambda: self._stored(name))
        return [results[index] for index in range(len(samples))]

    def _stored(self, name: str) -> dict[int, object]:
        """Sample index -> result, of all whole lines."""
        texts = [path.read_text(encoding="utf-8") for path in sorted(self.store.glob(f"{name}-*.jsonl"))]
        lines = [line for text in texts for line in text.splitlines(keepends=True)]
        return dict(json.loads(line) for line in lines if line.endswith("\n"))


@torch.no_grad()
def generate(model: TreeModel, batch, max_new_tokens: int, stop_tokens: set[int]) -> list[tuple[list[int], float]]:
    """Greedy answers to every question of a `prompts_only` batch: token ids without the end-of-turn, and the model's
    probability of the whole answer, the end-of-turn included where it came.

    The trees are run once into a key-value cache. Then each unfinished branch adds one token a round, and the tree's
    visibility rule keeps branches apart, so that all questions of an image share its cached prefix.
    """
    cache = DynamicCache(config=model.base.config.text_config)
    features = model.encode_images(batch)
    mask = tree_mask(batch)
    hidden = model.hidden_states(batch.ids, batch.positions, mask, batch.answer_at, batch.image_at, features, cache)
    at = batch.answer_at
    tree, branch, position = batch.tree[at], batch.branch[at], batch.positions[:, at]
    tree_k, branch_k = batch.tree, batch.branch
    answers, log_probabilities = [[] for _ in batch.samples], [0.0] * len(batch.samples)
    running = list(range(len(answers)))
    for _ in range(max_new_tokens):
        likeliest, tokens = model.base.lm_head(hidden).float().log_softmax(-1).max(-1)
        keep = []
        for place, (index, token, value) in enumerate(zip(running, tokens.tolist(), likeliest.tolist())):
            log_probabilities[index] += value
            if token not in stop_tokens:
                answers[index].append(token)
                keep.append(place)
        running = [running[place] for place in keep]
        if not running:
            break
        kept = torch.tensor(keep, device=tokens.device)
        tokens, tree, branch, position = tokens[kept], tree[kept], branch[kept], position[:, kept] + 1
        cached = len(tree_k)
        tree_k, branch_k = torch.cat([tree_k, tree]), torch.cat([branch_k, branch])
        order = torch.arange(len(tree_k), device=tokens.device)
        mask = visible(tree[:, None], branch[:, None], order[cached:, None], tree_k, branch_k, order)[None, None]
        hidden = model.hidden_states(tokens, position, mask, torch.arange(len(kept), device=kept.device), past=cache)
    return list(zip(answers, map(math.exp, log_probabilities)))


def answer_all(model: TreeModel, data: VQAData, tokenizer, run: Run) -> list[dict] | None:
    """Generate an answer to every sample. Returns {"prediction", "confidence"} of each, or None when stopped."""

    dataset = TreeDataset(data, model.settings, padding(run.ranks.device), prompts_only=True)
    return run.over(dataset, lambda batch: answer_batch(model, batch, tokenizer, run.args.max_new_tokens), "answers")


def answer_batch(model: TreeModel, batch, tokenizer, max_new_tokens: int) -> list[dict]:
    """{"prediction", "confidence"} of every question of a `prompts_only` batch, which ends where `model.generate` ends
    it."""
    ends = model.base.generation_config.eos_token_id  # one, or several, or None
    stop_tokens = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    found = generate(model, batch, max_new_tokens, stop_tokens)
    texts = tokenizer.batch_decode([tokens for tokens, _ in found])
    return [{"prediction": text, "confidence": probability} for text, (_, probability) in zip(texts, found)]


def score_all(model: TreeModel, data: VQAData, tokenizer, run: Run, options: list[list[str]]) -> list[dict] | None:
    """Loss and teacher-forced exact match of every sample and, of those with `options`, the probability of each option.

    Every option is a branch of its image's tree, as the sample's own answer is. An option's probability is that of all
    its tokens, the end-of-turn included, divided by the sum over the options. None when stopped.
    """
    samples, owners = list(data.samples), []
    for index, sample in enumerate(data.samples):
        samples += [with_answer(sample, option, tokenizer) for option in options[index]]
        owners += [(index, option) for option in options[index]]
    dataset = TreeDataset(replace(data, samples=samples), model.settings, padding(run.ranks.device))
    found = run.over(dataset, lambda batch: score_samples(model, batch), "scores")
    if found is None:
        return None
    names = ("loss", "answer_tokens", "teacher_forced")
    scored = [dict(zip(names, one)) for one in found[: len(data.samples)]]
    for (index, option), (loss, *_) in zip(owners, found[len(data.samples) :]):
        scored[index].setdefault("options", {})[option] = -loss
    for one in scored:
        if "options" in one:
            values = torch.tensor(list(one["options"].values()), dtype=torch.float64).softmax(0).tolist()
            one["options"] = dict(zip(one["options"], values))
            one["option"] = max(one["options"], key=one["options"].get)
    return scored


@torch.no_grad()
def score_samples(model: TreeModel, batch) -> list[tuple[float, int, bool]]:
    """Of each sample of a batch: the cross-entropy of its trained tokens, summed, their number, and whether each is the
    most likely token given what is before it."""
    losses, right = model(batch, model.frozen_features(batch))
    counts = torch.bincount(batch.question)
    sums = torch.zeros(len(counts), device=losses.device).index_add_(0, batch.question, losses)
    all_right = torch.bincount(batch.question, right.float()) == counts
    return list(zip(sums.tolist(), counts.tolist(), all_right.tolist()))


def with_answer(sample: Sample, answer: str, tokenizer) -> Sample:
    """The sample with another last answer, the only one that is trained."""
    start = sample.last_answer
    ids = np.array(tokenizer(answer + tokenizer.eos_token, add_special_tokens=False)["input_ids"], np.int32)
    return replace(sample, ids=np.concatenate([sample.ids[:start], ids]), trained=np.arange(start + len(ids)) >= start)
