"""A model's answers to rows, generated greedily, and how likely it finds the true answer and each given option."""

import math
from dataclasses import replace

import numpy as np
import torch
from transformers import DynamicCache

from data import Batch, Sample, VQAData
from evaluation.normalization import accepted, is_right
from evaluation.runner import Runner, plan_evaluation
from evaluation.scores import question_types
from inputs.holdout import relative_names
from inputs.prompts import end_of_turn
from model import TreeModel, without_warnings
from modeling.attention import visible
from modeling.delta import keep_leaves

# Settings of generation_config.json by which `model.generate` gives other greedy answers, and which `generate` does not
# know, with the value that changes nothing. An empty list and None change nothing either.
NOT_USED = dict.fromkeys(["bad_words_ids", "begin_suppress_tokens", "dola_layers", "exponential_decay_length_penalty"])
NOT_USED |= dict.fromkeys(["forced_bos_token_id", "forced_eos_token_id", "max_time", "penalty_alpha", "sequence_bias"])
NOT_USED |= dict.fromkeys(["stop_strings", "suppress_tokens", "watermarking_config"]) | {"token_healing": False}
NOT_USED |= dict.fromkeys(["encoder_repetition_penalty", "guidance_scale", "num_beams", "num_beam_groups"], 1)
NOT_USED |= dict.fromkeys(["encoder_no_repeat_ngram_size", "no_repeat_ngram_size", "min_length", "min_new_tokens"], 0)
MAX_TREES = 8  # of a batch: a generated token is compared with the cached tokens of all its trees, to see those of one


def predict(
    runner: Runner, data: VQAData, images_dir: str, options: list[list[str]], tokenizer, args
) -> list[dict] | None:
    """The lines of predictions.jsonl: what `answer_all` and `score_all` give for each sample, and the sample's own
    fields, with images named from `images_dir`. None when stopped."""
    answers = answer_all(runner, data, tokenizer, args.max_tokens, args.max_new_tokens)
    scored = answers and score_all(runner, data, options, tokenizer, args.max_tokens)
    if not scored:
        return None
    kinds = question_types([sample.fields for sample in data.samples])
    return [
        {
            "id": sample.id,
            "where": sample.where,
            "images": relative_names(sample.images, images_dir),
            "question": sample.fields["question"],
            "answer": sample.fields["answer"],
            **{name: sample.fields[name] for name in ("answers", "by") if name in sample.fields},
            "right": is_right(answer["prediction"], accepted(sample.fields)),
            "question_type": kind,
            **answer,
            **scores,
        }
        for sample, kind, answer, scores in zip(data.samples, kinds, answers, scored)
    ]


def refuse_infinite(numbers: list[float], batch: Batch, samples: list[Sample], subject: str) -> None:
    """Raise FloatingPointError if one of `numbers`, which a model gave to the samples of a batch, is not finite: else
    a broken model would look like one that is always wrong."""
    for index, number in zip(batch.samples, numbers):
        if not math.isfinite(number):
            raise FloatingPointError(
                f"{subject} gives numbers that are not finite for {samples[index].where}\n"
                "  its weights are damaged, or overflowed in a conversion to float16: use bfloat16 or float32"
            )


# ----------------------------------------------------------------------------------------------------------- generation


def answer_all(runner: Runner, data: VQAData, tokenizer, max_tokens: int, max_new_tokens: int) -> list[dict] | None:
    """Answer every sample: {"prediction", "confidence", "cut"} of each, or None when stopped. Raises FloatingPointError
    for a confidence that is not finite."""

    def answer(model: TreeModel, batch: Batch) -> list[dict]:
        answers = answer_batch(model, batch, tokenizer, max_new_tokens)
        refuse_infinite([a["confidence"] for a in answers], batch, data.samples, runner.subject)
        return answers

    batches = plan_evaluation(data.samples, max_tokens, MAX_TREES)
    answers = runner.run(answer, data, batches, "answers", prompts_only=True)
    return answers and [answers[index] for index in range(len(data.samples))]


def answer_batch(model: TreeModel, batch: Batch, tokenizer, max_new_tokens: int) -> list[dict]:
    """{"prediction", "confidence", "cut"} of every question of a `prompts_only` batch. An answer is cut if it reached
    `max_new_tokens` before an end token."""
    answers = generate(model, batch, max_new_tokens, set(stop_tokens(model.base, tokenizer)))
    texts = tokenizer.batch_decode([tokens for tokens, _ in answers])
    return [
        {"prediction": text, "confidence": probability, "cut": len(tokens) == max_new_tokens}
        for text, (tokens, probability) in zip(texts, answers)
    ]


def length_warnings(samples: list[Sample], max_new_tokens: int) -> list[str]:
    """A warning if rows have answers that, with their end, have more tokens than a generated one may have."""
    tokens = [len(sample.ids) - sample.last_answer for sample in samples]
    long, longest = sum(count > max_new_tokens for count in tokens), max(tokens)
    told = f"{long:,} of {len(samples):,} rows have answers over --max-new-tokens {max_new_tokens}"
    remedy = f"the longest has {longest:,} tokens with its end: give --max-new-tokens {longest}"
    return [f"{told}\n  {remedy}"] if long else []


def stop_tokens(base: torch.nn.Module, tokenizer) -> list[int]:
    """The tokens that end an answer: those at which `model.generate` ends it, the tokenizer's, and the template's."""
    ends = base.generation_config.eos_token_id  # one, several or None
    ends = ends if isinstance(ends, list) else [ends]
    ends = [*ends, tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(end_of_turn(tokenizer))]
    return list(dict.fromkeys(end for end in ends if end is not None))


def repetition_penalty(base: torch.nn.Module) -> float:
    """The one that `model.generate` applies, of the model's generation_config.json; 1: none."""
    return base.generation_config.repetition_penalty or 1.0


def unused_settings(base: torch.nn.Module) -> list[str]:
    """The settings in the model's generation_config.json by which answers of `model.generate` may differ from ours."""
    values = {name: getattr(base.generation_config, name, None) for name in NOT_USED}
    return sorted(name for name, value in values.items() if value not in (None, [], NOT_USED[name]))


def penalize(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """Logits (B, V) with those of tokens in `seen` (B, V) made less likely. Keskar et al., CTRL, arXiv 1909.05858,
    section 4.1; for negative logits as transformers' RepetitionPenaltyLogitsProcessor."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


@torch.no_grad()
def generate(
    model: TreeModel, batch: Batch, max_new_tokens: int, stop_tokens: set[int]
) -> list[tuple[list[int], float]]:
    """Greedy answers to every question of a `prompts_only` batch: token ids without the end of turn, and the model's
    probability of the whole answer, including the end of turn where it came.

    Tokens of a question's prompt and of its answer so far are made less likely by the model's repetition penalty. The
    probability is the model's own, without it.

    One pass over the trees fills a key-value cache. Then every unfinished branch adds one token per round. The trees'
    visibility rule keeps branches apart, so all questions of an image share its cached prefix. Linear attention keeps a
    state for each branch instead.
    """
    cache = DynamicCache(config=model.base.config.text_config)
    hidden = model.answer_states(batch, past=cache)
    last = batch.answer_at  # each branch's last token, from which the first round goes on
    tree, branch, position = batch.tree[last], batch.branch[last], batch.positions[:, last]  # (B,), (B,), (3, B)
    cached_tree, cached_branch = batch.tree, batch.branch  # (tokens in the cache,)
    answers, log_probabilities = [[] for _ in batch.samples], [0.0] * len(batch.samples)
    penalty, seen = repetition_penalty(model.base), prompt_tokens(batch, model.base.config.text_config.vocab_size)
    unfinished = list(range(len(answers)))  # B of them
    for _ in range(max_new_tokens):
        logits = model.base.lm_head(hidden).float()  # (B, V)
        tokens = penalize(logits, seen, penalty).argmax(-1)
        values = logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
        going_on = []  # places in `unfinished`
        for place, (index, token, value) in enumerate(zip(unfinished, tokens.tolist(), values.tolist())):
            log_probabilities[index] += value
            if token not in stop_tokens:
                answers[index].append(token)
                going_on.append(place)
        unfinished = [unfinished[place] for place in going_on]
        if not unfinished:
            break
        places = torch.tensor(going_on, device=tokens.device)
        keep_leaves(cache, places)
        tokens, tree, branch, position = tokens[places], tree[places], branch[places], position[:, places] + 1
        seen = seen[places].scatter(1, tokens[:, None], True)
        start = len(cached_tree)
        cached_tree, cached_branch = torch.cat([cached_tree, tree]), torch.cat([cached_branch, branch])
        order = torch.arange(len(cached_tree), device=tokens.device)
        mask = visible(tree[:, None], branch[:, None], order[start:, None], cached_tree, cached_branch, order)
        every_token = torch.arange(len(places), device=places.device)
        with without_warnings():  # of slow code, which an evaluation tells once
            hidden = model.hidden_states(tokens, position, mask[None, None], every_token, past=cache)
    return list(zip(answers, map(math.exp, log_probabilities)))


def prompt_tokens(batch: Batch, vocabulary: int) -> torch.Tensor:
    """Whether each token of the vocabulary is in a question's prompt, for every question: (B, V) bool."""
    last, order = batch.answer_at[:, None], torch.arange(len(batch.ids), device=batch.ids.device)
    in_prompt = visible(batch.tree[last], batch.branch[last], last, batch.tree, batch.branch, order)  # (B, T)
    question, place = in_prompt.nonzero(as_tuple=True)
    seen = torch.zeros(len(last), vocabulary, dtype=torch.bool, device=batch.ids.device)
    seen[question, batch.ids[place]] = True
    return seen


# ----------------------------------------------------------------------------------------------------------- likelihood


def score_all(runner: Runner, data: VQAData, options: list[list[str]], tokenizer, max_tokens: int) -> list[dict] | None:
    """Loss and teacher-forced exact match of every sample and, where it has `options`, the probability of each option.

    Every option is a branch of its image's tree, as the sample's own answer is. An option's probability is that of all
    its tokens, including the end of turn, divided by the sum over the options. None when stopped. Raises
    FloatingPointError for a loss that is not finite.
    """
    samples, owners = list(data.samples), []
    for index, texts in enumerate(options):
        samples += [with_answer(data.samples[index], text, tokenizer) for text in texts]
        owners += [(index, text) for text in texts]
    batches = plan_evaluation(samples, max_tokens, MAX_TREES)

    def score(model: TreeModel, batch: Batch) -> list[tuple[float, int, bool]]:
        results = score_samples(model, batch)
        refuse_infinite([loss for loss, _, _ in results], batch, samples, runner.subject)
        return results

    results = runner.run(score, replace(data, samples=samples), batches, "scores")
    if results is None:
        return None
    names = ("loss", "answer_tokens", "teacher_forced")
    scores = [dict(zip(names, results[index])) for index in range(len(data.samples))]
    for number, (index, text) in enumerate(owners, start=len(data.samples)):
        scores[index].setdefault("options", {})[text] = -results[number][0]  # log-likelihood
    for score in scores:
        if "options" in score:
            log_likelihoods = torch.tensor(list(score["options"].values()), dtype=torch.float64)
            score["options"] = dict(zip(score["options"], log_likelihoods.softmax(0).tolist()))
            score["option"] = max(score["options"], key=score["options"].get)
    return scores


@torch.no_grad()
def score_samples(model: TreeModel, batch: Batch) -> list[tuple[float, int, bool]]:
    """For each sample of a batch: the sum of its answer tokens' cross-entropy, their number, and whether each of them
    is the most likely token after the reference before it."""
    losses, is_likeliest = model(batch)
    counts = torch.bincount(batch.question)
    sums = torch.zeros(len(counts), device=losses.device).index_add_(0, batch.question, losses)
    all_likeliest = torch.bincount(batch.question, is_likeliest.float()) == counts
    return list(zip(sums.tolist(), counts.tolist(), all_likeliest.tolist()))


def with_answer(sample: Sample, answer: str, tokenizer) -> Sample:
    """The sample with another last answer, of which alone the loss is taken."""
    start = sample.last_answer
    ids = np.array(tokenizer(answer, add_special_tokens=False)["input_ids"] + [sample.ids[-1]], np.int32)
    weights = np.repeat([0.0, 1.0], [start, len(ids)])
    return replace(sample, ids=np.concatenate([sample.ids[:start], ids]), weights=weights)
