"""What a run says about its data and model before it starts, what is suspicious about its rows, and what comes next."""

import argparse
import re
import shlex
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np

from common import quote
from data import Sample, VQAData
from dist_utils import print0
from evaluation.normalization import accepted, is_right
from inputs.images import find_copies, picture_warnings
from modeling.lora import lora_table
from training.scaling import GPU_COUNTS, spread
from trees import Step, group_samples, rank_efficiency

MOST_FIELDS, LONGEST_NAME = 20, 60  # fields of a file that nothing reads: so many are named, and characters of a name
BLANK = "\u115f\u1160\u2800\u3164\uffa0\u034f\ufe0f\ufe0e"  # letters and marks without ink, none of them white space
DAMAGED = re.compile(r"&(?:#\d+|#[xX][\da-fA-F]+|amp|lt|gt|quot|apos|nbsp);|\\n(?![a-z])|\ufffd")
LETTER = re.compile(r"\b(?:letters?|A, B, C)\b", re.IGNORECASE)
PYTHON_LIST = re.compile(r"\['.*'\]", re.DOTALL)
WHOLE, NUMBER = re.compile(r"-?\d+\.0"), re.compile(r"-?[\d,]*\d(?:\.\d+)?|-?[\d,]*\.\d+")
FEW_STEPS = 30  # optimizer steps of a run, below which it is warned of
LONG_ANSWER = 256  # trained tokens of a row, above which it is warned of


def describe_data(train: VQAData, val: VQAData | None, plan: list[Step], tokenizer) -> None:
    """Print what will be trained: sizes, warnings, lengths, the plan, and one sample with its trained tokens marked."""
    for name, data in (("train", train), ("val", val)):
        if data:
            sizes = f"{len(data.samples):,} questions, {len(data.grids):,} images"
            print0(f"{name}: {sizes}, {len(data.bad):,} rows left out")
            blind = [sample.where for sample in data.samples if not sample.images]
            if blind and data.grids:
                print0(f"  questions without an image: {len(blind):,}, the first {blind[0]}")
    for warning in data_warnings(train, val):
        print0(f"warning: {warning}")
    if weighted := describe_weights(train.samples):
        print0(weighted)
    groups = [len(group) for group in group_samples(train.samples)]
    print0(f"questions per image: {min(groups)} to {max(groups)}, {sum(groups) / len(groups):.1f} on average")
    if unshared := describe_unshared(train.samples):
        print0(f"warning: {unshared}")
    print0("tokens per question (image included):\n" + length_histogram([sample.tokens for sample in train.samples]))
    print0(describe_plan(train, plan))
    print0(f"one sample, trained tokens in ⟦ ⟧:\n{describe_sample(train.samples[0], tokenizer)}")


def without_effect(args: argparse.Namespace, steps: int) -> list[str]:
    """Settings that can't do what they say in a run of so many optimizer steps. Those of a run that --max-steps ends
    early, as for a trial, may do it in the whole one."""
    broken = [name for name in ("system", "prompt") if "\\n" in getattr(args, name)]
    patience, every = args.patience, args.eval_every
    of_steps = {
        f"{steps:,} optimizer steps in all may be too few to learn from\n"
        "  a lower --batch-size or more --epochs gives more": steps < FEW_STEPS,
        f"--warmup {args.warmup:g}: the run has {steps:,} steps and never gets to --lr": args.warmup >= steps,
        f"--patience {patience} can't end a run of {steps:,} steps with --eval-every {every}": (
            patience and (not every or (patience + 1) * every >= steps)  # the first evaluation is the best so far
        ),
    }
    others = {
        "--time-limit ends no run: --plan compares its hours with the limit": args.time_limit and not args.plan,
        f"--{' and --'.join(broken)}: \\n is two characters there, and no line break\n"
        "  bash has line breaks in $'...\\n...', TOML in double quotes": broken,
    }
    checks = others if args.max_steps else of_steps | others
    return [problem for problem, is_true in checks.items() if is_true]


def describe_weights(samples: list[Sample]) -> str:
    """How many samples have a weight that is neither 0 nor 1, and between which; empty for none."""
    arrays = {id(sample.weights): sample.weights for sample in samples}  # few, as samples share them
    others = {key: other for key, weights in arrays.items() if (other := weights[~np.isin(weights, (0, 1))]).size}
    count = sum(id(sample.weights) in others for sample in samples)
    if not count:
        return ""
    low, high = min(map(np.min, others.values())), max(map(np.max, others.values()))
    span = f"{low:g}" if low == high else f"{low:g} to {high:g}"
    return f"rows whose `weight` is not 1: {count:,}, with {span}; the loss counts their answers by it"


def describe_unshared(samples: list[Sample]) -> str:
    """How many questions do not share their images with all others about them, since their text comes first."""
    askers = Counter(sample.images for sample in samples)
    groups = ([samples[index] for index in group] for group in group_samples(samples))
    alone = [sample for group in groups for sample in group if sample.text_first and len(group) < askers[sample.images]]
    if not alone:
        return ""
    images = len({image for sample in alone for image in sample.images})
    one, two = len(alone) == 1, images > 1
    questions = "1 question" if one else f"{len(alone):,} questions"
    pictures, moved = (f"{images:,} pictures", "pictures") if two else ("1 picture", "picture")
    does_not_share_it = f"{'does' if one else 'do'} not share {'them' if two else 'it'}"
    shared = f"{questions} about {pictures} {does_not_share_it}: {'its' if one else 'their'} text comes first"
    return f"{shared}\n  --image-first moves the {moved}"


def describe_plan(train: VQAData, plan: list[Step]) -> str:
    """An epoch's trees and steps, what sharing images saves, and how busy the steps keep several GPUs."""
    trees = [tree for step in plan for tree in step]
    alone = sum(train.samples[i].tokens for tree in trees for i in tree.samples)
    shared = sum(tree.tokens for tree in trees)
    efficiency = ", ".join(f"{rank_efficiency(spread(plan), gpus):.0%} at {gpus}" for gpus in GPU_COUNTS)
    return (
        f"plan: {len(trees):,} trees in {len(plan):,} steps per epoch of {len(trees) / len(plan):.1f} images\n"
        f"  trees need {shared:,} tokens per epoch, single questions {alone:,} ({alone / shared:.1f}x)\n"
        f"  rank efficiency {efficiency}"
    )


def data_warnings(train: VQAData, val: VQAData | None) -> list[str]:
    """What may be wrong with rows that can be used: how many there are, and where the first one stands."""
    warnings = _trained_images(train, val) if val else []
    warnings += picture_warnings(train.sizes | (val.sizes if val else {}))
    of_rows = [warning for data in (train, val) if data for warning in unread_warnings(data) + _row_warnings(data)]
    return warnings + list(dict.fromkeys(of_rows))  # rows held out are of the files that others are trained of


def _trained_images(train: VQAData, val: VQAData) -> list[str]:
    """Warnings of validation images that are trained on, by the same name or by another."""
    shared = {image: image for image in val.sizes if image in train.sizes}
    others = {image: size for image, size in val.sizes.items() if image not in shared}
    kinds = {"also trained on": shared, "copies of trained ones": find_copies(others, train.sizes)}
    warnings = []
    for kind, found in kinds.items():
        if found:
            first, image = next((s, image) for s in val.samples for image in s.images if image in found)
            other = f" is {Path(found[image]).name}" if found[image] != image else ""
            warnings.append(
                f"validation images that are {kind}: {len(found):,}\n  {first.where} {Path(image).name}{other}"
            )
    return warnings


def unread_warnings(data: VQAData) -> list[str]:
    """A warning for each file of rows with fields that nothing reads: how many rows have them, and the first one."""
    warnings, separator = [], "\n  "
    for file, places in data.unread.items():
        listed = [
            f"{name[:LONGEST_NAME]} ({count:,} row{'s' * (count > 1)}, first {first})"
            for name, (count, first) in places.items()
        ]
        if len(listed) > MOST_FIELDS:
            listed[MOST_FIELDS:] = [f"and {len(listed) - MOST_FIELDS:,} more"]
        warnings.append(f"{Path(data.files[file]).name}: fields that nothing reads:\n  {separator.join(listed)}")
    return warnings


def _row_warnings(data: VQAData) -> list[str]:
    """Warnings of rows that repeat or contradict an earlier one, of what is wrong with a row on its own, and of numbers
    that a program may have changed: the count of each kind, and its first row."""
    repeats, contradictions = clashes(data.samples)
    kinds = {
        "rows that repeat another in images, question and answer": repeats,
        "rows that contradict another of the same images and question": contradictions,
    }
    for kind, problem in PROBLEMS.items():
        kinds[kind] = [f"{sample.where} {found}" for sample in data.samples if (found := problem(sample))]
    kinds["rows whose answer is a whole number with .0, as pandas writes a column with gaps"] = _all_with_zero(data)
    return [f"{kind}: {len(rows):,}\n  {rows[0]}" for kind, rows in kinds.items() if rows]


def _texts(sample: Sample) -> tuple[str, str]:
    """The last question and answer."""
    return sample.fields["question"], sample.fields["answer"]


def _long(sample: Sample) -> str:
    count = np.count_nonzero(sample.weights)
    return f"has {count:,}" if count > LONG_ANSWER else ""


def _untrained(sample: Sample) -> str:
    return "" if sample.weights[-1] else quote(_texts(sample)[1])


def _missing(sample: Sample) -> str:
    texts = _texts(sample)
    found = [text for text in texts if is_missing(text)] or (texts if all(map(is_none, texts)) else ())
    return quote(found[0].strip()) if found else ""


def _invisible(sample: Sample) -> str:
    return next((f"{text[:40]!a}" for text in _texts(sample) if not is_visible(text)), "")


def _damaged(sample: Sample) -> str:
    return next((quote(match[0]) for match in map(DAMAGED.search, _texts(sample)) if match), "")


def _lettered(sample: Sample) -> str:
    question, answer = _texts(sample)
    if not sample.fields.get("options") or len(answer) == 1 or not LETTER.search(question):
        return ""
    return f"trains {quote(answer)}\n  without `options`, answers are trained as written"


def _spaced(sample: Sample) -> str:
    answer = _texts(sample)[1]
    return quote(answer) if answer != answer.strip() else ""


def _listed(sample: Sample) -> str:
    answer = _texts(sample)[1]
    return quote(answer) if PYTHON_LIST.fullmatch(answer) else ""


PROBLEMS: dict[str, Callable[[Sample], str]] = {  # kind of row -> what a warning names of such a row; empty for others
    f"rows of over {LONG_ANSWER} answer tokens": _long,
    "rows whose last answer is not trained": _untrained,
    "rows whose question or answer is what programs write for a missing value": _missing,
    "rows whose question or answer has no visible character": _invisible,
    "rows with an HTML entity, a \\n of two characters, or the sign for an unreadable character": _damaged,
    "rows with `options` whose question asks for a letter": _lettered,
    "rows whose answer begins or ends with white space, which most chat templates train": _spaced,
    "rows whose answer is a list as Python prints it, trained with its brackets": _listed,
}


def _all_with_zero(data: VQAData) -> list[str]:
    """Rows whose answer is a number such as 2.0, where all numbers are; none where one has other decimals or none."""
    numbers = [(s.where, s.fields["answer"]) for s in data.samples if NUMBER.fullmatch(s.fields["answer"])]
    all_whole = all(WHOLE.fullmatch(answer) for _, answer in numbers)
    return [f"{where} {answer}" for where, answer in numbers] if all_whole else []


def clashes(samples: list[Sample]) -> tuple[list[str], list[str]]:
    """Which rows repeat an earlier one in images, question and answer, and which contradict one of the same images and
    question, in the order of rows."""
    by_images, repeats, contradictions = {}, {}, {}
    for index, sample in enumerate(samples):
        by_images.setdefault(sample.images, []).append(index)
    for indices in by_images.values():  # one after the other: a table of all rows would take half as much as the rows
        answers_by_prompt = {}
        for index in indices:
            sample = samples[index]
            prompt, answer = sample.ids[: sample.last_answer].tobytes(), sample.fields["answer"]
            earlier = answers_by_prompt.setdefault(prompt, {})
            if answer in earlier:
                repeats[index] = f"{sample.where} repeats {earlier[answer].where}"
            for other, row in earlier.items():
                if not any(is_right(given, accepted(row.fields)) for given in accepted(sample.fields)):
                    contradictions[index] = f"{sample.where} says {quote(answer)}, {row.where} {quote(other)}"
                    break
            earlier.setdefault(answer, sample)
    return tuple([told[index] for index in sorted(told)] for told in (repeats, contradictions))


def is_missing(text: str) -> bool:
    """Whether a text is what pandas, Python or JavaScript write for a missing value. "none" is an answer of its own."""
    return text.strip() == "None" or text.strip().casefold() in ("nan", "null", "nat", "<na>", "undefined")


def is_none(text: str) -> bool:
    return text.strip().casefold() == "none"


@lru_cache(maxsize=1 << 16)  # questions and answers repeat
def is_visible(text: str) -> bool:
    """Whether any character of a text shows: not only spaces, and marks such as a zero-width space or a byte order."""
    return any(unicodedata.category(c)[0] not in "CZ" and c not in BLANK for c in text)


def describe_sample(sample: Sample, tokenizer) -> str:
    """A sample's text as it is trained: trained tokens between ⟦ and ⟧, each image as its number of tokens."""
    answer_edges = np.flatnonzero(np.diff(sample.trained)) + 1
    cuts = sorted({*answer_edges, *sample.image_at, *(at + 1 for at in sample.image_at)})
    text, counts = "", iter(sample.image_tokens)
    for piece in np.split(np.arange(len(sample.ids)), cuts):
        if not len(piece):
            continue
        is_image = piece[0] in sample.image_at
        part = f"<{next(counts):,} image tokens>" if is_image else tokenizer.decode(sample.ids[piece].tolist())
        text += f"⟦{part}⟧" if sample.trained[piece[0]] else part
    return text


def length_histogram(lengths: list[int]) -> str:
    """One line per bin: its range in tokens, how many samples are in it, and a bar."""
    shortest, longest = min(lengths), max(lengths)
    if shortest == longest:
        return f"  all {longest:,}"
    counts, edges = np.histogram(lengths, bins=min(8, longest - shortest))
    bars = ["█" * round(40 * count / max(counts)) for count in counts]
    bins = zip(counts, edges, edges[1:], bars)
    return "\n".join(f"  {low:7,.0f} to {high:7,.0f}  {n:7,}  {bar}".rstrip() for n, low, high, bar in bins)


def describe_lora(model) -> None:
    """Print the number of modules and parameters that are trained, by kind of layer."""
    table = lora_table(model)
    for kind, (modules, parameters) in table.items():
        print0(f"  {kind:<38} {modules:>4} modules {parameters:>12,} parameters")
    print0(f"  trained in all {sum(parameters for _, parameters in table.values()):,} parameters")


def next_steps(output: Path, best: dict, has_val: bool, is_demo: bool) -> str:
    """What to look at, and commands to go on with, after a run that is done. Paths are quoted for a shell. `best`: the
    best evaluation, see `Progress`."""

    def command(program: str, *words: str) -> str:
        return "  " + shlex.join(["python", str(Path(sys.argv[0]).with_name(program)), *words])

    options = ["--with-base"] * is_demo + ["--data", "ROWS"] * (not has_val)
    lines = [f"curves: {shlex.quote(str(output / 'curves.svg'))}"]
    what = f"its best checkpoint, of step {best['step']:,}" if best else "it"
    lines += [f"to evaluate {what}:", command("eval.py", "--ckpt", str(output), *options)]
    if is_demo:
        lines += ["to train on your own rows:", command("train.py", "--train", "train.jsonl", "--images", "pictures")]
    return "\n".join(lines)
