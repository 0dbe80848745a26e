"""Results beside others: `eval.py --compare`, and what an evaluation replaces."""

import json
import os
from contextlib import suppress
from pathlib import Path

from common import InputError, quote
from dist_utils import print0
from evaluation import scores
from evaluation.tables import describe_comparison, difference_table, flip

SETTINGS = ["system", "prompt", "image_first", "min_pixels", "max_pixels", "max_new_tokens"]  # that change answers


def read_predictions(path: Path) -> list[dict]:
    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")  # an answer may hold U+2028
        predictions = [json.loads(line) for line in lines]
        needed = {"id", "where", "images", "answer", "prediction"}
        if lacking := next((missing for line in predictions if (missing := needed - line.keys())), None):
            raise ValueError(f"a line without `{sorted(lacking)[0]}`")
        return predictions
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{path} is no predictions file: {error}") from None


def compare_files(paths: list[Path]) -> int:
    """Print how each of the predictions files after the first differs from the first, also by the fields that --by
    named, and the answers of both where only one is right. Returns the exit code."""
    if len(paths) < 2:
        raise InputError("--compare: needs two or more predictions files")
    (first, base), *others = zip(run_names(paths), map(read_predictions, paths))
    for path, (name, answers) in zip(paths[1:], others):
        try:
            comparison = scores.compare(base, answers)
        except ValueError as error:
            raise InputError(f"--compare {paths[0]} {path}: {error}") from None
        both = scores.pair_up(base, answers)
        for warning in asked_differently(both, first, name) + other_settings(paths[0], first, path, name):
            print0(f"warning: {warning}")
        print0(describe_comparison(comparison, first, name))
        for field, differences in comparison["by"].items():
            print0(f"\n{difference_table(field, f'{name} − {first}', differences)}")
        pairs = {scores.row_key(old): {first: old, name: new} for old, new in both}
        for right, rows in ((first, comparison["only_a"]), (name, comparison["only_b"])):
            print0(f"\n{len(rows):,} answers right in {right} only:", *(f"\n{flip(row, pairs[row])}" for row in rows))
    return 0


def asked_differently(both: list[tuple[dict, dict]], first: str, name: str) -> list[str]:
    """What tells that two files, which have the same rows and answers, ask other questions or show other images."""
    counts = {
        "ask another question": sum(old.get("question") != new.get("question") for old, new in both),
        "show other images": sum(old["images"] != new["images"] for old, new in both),
    }
    return [f"{n:,} of {len(both):,} rows {how} in {name} than in {first}" for how, n in counts.items() if n]


def other_settings(first: Path, name: str, other: Path, other_name: str) -> list[str]:
    """What tells that two files were answered with other prompts or limits, by the summary.json beside each of them."""
    (before, _), (after, _) = (read_summary(path.parent) for path in (first, other))
    differing = [key for key in SETTINGS if key in before and key in after and before[key] != after[key]]
    told = [f"{key} is {quote(after[key])} in {other_name}, {quote(before[key])} in {name}" for key in differing]
    return ["answered with other settings:\n  " + "\n  ".join(told)] if told else []


def read_summary(folder: Path) -> tuple[dict, dict]:
    """Facts, with the pixel limits among them, and scores of the summary.json in a folder of results; both empty where
    there is none, or another program's."""
    with suppress(OSError, ValueError, LookupError, TypeError):
        summary = json.loads((folder / "summary.json").read_bytes())
        return summary["facts"] | summary["facts"]["images"], summary["scores"]
    return {}, {}


def replaced_results(output: Path, facts: dict[str, str | int], with_base: bool) -> list[str]:
    """A warning where the folder holds results of another model, other rows, pictures or prompts, which this evaluation
    will replace; otherwise none. `facts` are this evaluation's, by their names in summary.json. `with_base`: it has the
    base model's answers, too."""
    before, answered = read_summary(output)
    differing = [name for name in facts if before.get(name, facts[name]) != facts[name]]
    other = [f"{name} {quote(before[name])}" for name in differing if before[name] != ""]
    if "base" in answered and not with_base:
        other.append("the base model")
    told = f"{output} has results of {', '.join(other)}\n  these will replace them: another --output keeps both"
    return [told] if other else []


def run_names(paths: list[Path]) -> list[str]:
    """What tells paths apart: each without the folders at its start and the names at its end that all of them share."""
    parts = [path.with_suffix("").parts for path in paths]
    if len(set(parts)) < len(parts):
        return list(map(str, paths))
    start, end = (len(os.path.commonprefix([part[::step] for part in parts])) for step in (1, -1))
    names = ["/".join(p[start : len(p) - end]) for p in parts]
    return names if all(names) else list(map(str, paths))
