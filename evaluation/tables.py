"""Results as text: tables for the screen, and CSV and LaTeX of summary.json."""

import csv
import io
import re
from unicodedata import normalize

from common import printable

MAX_VALUES, MAX_LETTERS = 20, 30  # values of a field that --by names, and letters of one or of a type
SCORES = {
    "exact_match": "exact match",
    "strict_match": "strict match: the same text but for case",
    "token_f1": "token F1",
    "numeric": "numbers and sizes, within tolerance",
    "set_f1": "set F1, answers in several parts",
    "set_match": "all parts right, answers in several parts",
    "anls": "ANLS, rows with `answers`",
    "vqa_accuracy": "VQA accuracy, rows with several `answers`",
    "relaxed_accuracy": "relaxed accuracy, as for charts",
    "rouge_l": "ROUGE-L",
}
CSV_HEAD = ["by", "group", "score", "model", "questions", "value", "low", "high"]
TEX_HEAD = r"""% Percent with 95\% confidence intervals over images in brackets. The numbers are those of summary.json.
% Needs \usepackage{booktabs}. Names in Greek, Chinese and the like need XeLaTeX or LuaLaTeX, and a font that has them.
"""
TEX_ESCAPES = {letter: f"\\{letter}" for letter in "&%$#_{}"} | {"−": "$-$", "\\": r"\textbackslash{}"}
TEX_ESCAPES |= {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "`": r"\textasciigrave{}"}
TEX_ESCAPES |= {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}
TEX_ESCAPES |= {"[": "{[}", "*": "{*}"}  # at the start of a line, the line break before it would take them as options
TEX_ESCAPES |= {sign: f"$\\{name}$" for sign, name in zip("≤≥≠≈∞", ("leq", "geq", "neq", "approx", "infty"))}
TEX_SIGNS = "leftarrow rightarrow leftrightarrow Rightarrow surd sim"
TEX_ESCAPES |= {sign: f"$\\{name}$" for sign, name in zip("←→↔⇒√∼", TEX_SIGNS.split())} | {"′": "$'$", "″": "$''$"}
TEX_ESCAPES |= {digit: f"$_{number}$" for number, digit in enumerate("₀₁₂₃₄₅₆₇₈₉")}
TEX_ESCAPES |= {digit: f"$^{number}$" for number, digit in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")} | {"⁻": "$^-$", "⁺": "$^+$"}
TEX_ESCAPES |= dict.fromkeys("\u200b\u2060\ufeff", "")  # they have no width, and no letter in pdfLaTeX's fonts
# pdfLaTeX has Greek letters in formulas only. A letter that stands alone, as in 5 μm, becomes one; words stay words.
GREEK_NAMES = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma tau upsilon phi"
GREEK_NAMES += " chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega"
TEX_GREEK = {letter: f"$\\{name}$" for letter, name in zip("αβγδεζηθικλμνξπρστυφχψωΓΔΘΛΞΠΣΦΨΩ", GREEK_NAMES.split())}
ANY_GREEK = r"[\u0370-\u03ff\u1f00-\u1fff]"
LONE_GREEK = re.compile(rf"(?<!{ANY_GREEK})[{''.join(TEX_GREEK)}](?!{ANY_GREEK})")


def accuracy_table(results: dict[str, dict]) -> str:
    """Exact match in percent by question type and over all types, with one column for each of several results about the
    same rows. Results of `scores.summarize` have intervals, those of `evaluate` have none."""
    columns, lines = [_accuracy_cells(result) for result in results.values()], []
    width = 24 if any("(" in cell for column in columns for _, _, cell in column) else 10
    first = max([16, *(len(_label(kind)) + 1 for kind, _, _ in columns[0])])
    for cells in zip(*columns):  # a row of every column
        kind, questions, _ = cells[0]
        lines.append(f"{_label(kind):<{first}}{questions:>10,}" + "".join(f"{cell:>{width}}" for _, _, cell in cells))
    head = f"{'exact match %':<{first}}{'questions':>10}" + "".join(f"{name:>{width}}" for name in results)
    return "\n".join([head, *lines])


def _accuracy_cells(result: dict) -> list[tuple[str, int, str]]:
    """(question type, questions, exact match in percent) of every type and of all of them, and scores of benchmarks."""
    if "all" not in result:  # of `evaluate`
        rows = [*result["by_type"].items(), ("all", (result["exact_match"], result["questions"]))]
        return [(kind, questions, f"{100 * share:.1f}") for kind, (share, questions) in rows]
    rows = [*result["by_type"].items(), ("all", result["all"])]
    means = [(kind, score["exact_match"]) for kind, score in rows]
    benchmarks = {"VQA accuracy %": "vqa_accuracy", "ANLS %": "anls"}  # of rows with several accepted answers
    means += [(title, result["all"][name]) for title, name in benchmarks.items() if name in result["all"]]
    return [(kind, mean["questions"], _interval(mean)) for kind, mean in means]


def _interval(mean: dict) -> str:
    return f"{100 * mean['mean']:.1f} ({100 * mean['low']:.1f} to {100 * mean['high']:.1f})"


def breakdown_table(field: str, kind: str, result: dict) -> str:
    """Exact match and the scores that papers report, of one result of `scores.summarize`, for each value of a field
    that --by names and over all rows."""
    groups, total = list(result["by"][field].items()), result["all"] | result  # BLEU stands beside "all"
    lines = [[f"{field}, {kind}"[:MAX_LETTERS], "questions", "exact match %", *paper_cells(total)]]
    for value, score in [*groups[:MAX_VALUES], ("all", total)]:
        mean = score["exact_match"]
        cells = f"{mean['questions']:,}", _interval(mean), *paper_cells(score).values()
        lines.append([_label(value), *cells])
    widths = [max(map(len, column)) for column in zip(*lines)]
    texts = ["  ".join([first.ljust(widths[0]), *map(str.rjust, cells, widths[1:])]) for first, *cells in lines]
    if len(groups) > MAX_VALUES:
        texts.append(f"{len(groups) - MAX_VALUES:,} more values of {field} are in summary.json")
    return "\n".join(texts)


def paper_cells(score: dict) -> dict[str, str]:
    """Name -> cell, without interval, of the scores that papers report. Those whose library is not installed are left
    out."""
    cells = {"strict match %": f"{100 * score['strict_match']['mean']:.1f}"}
    if "rouge_l" in score:
        cells["ROUGE-L %"] = f"{100 * score['rouge_l']['mean']:.1f}"
    if "bleu" in score:
        cells["BLEU"] = f"{score['bleu']['score']:.1f}"
    return cells


def describe_comparison(comparison: dict, a: str, b: str) -> str:
    low, mean, high = (100 * comparison["difference"][end] for end in ("low", "mean", "high"))
    lost, won = len(comparison["only_a"]), len(comparison["only_b"])
    return (
        f"{b} − {a}: {mean:+.1f} points of exact match (95% interval over images {low:+.1f} to {high:+.1f})\n"
        f"  {won:,} questions won, {lost:,} lost, McNemar p = {comparison['p']:.2g} if questions were independent"
    )


def difference_table(field: str, name: str, differences: dict[str, dict]) -> str:
    """Differences of exact match in points for each value of a field that --by names."""
    lines = [(f"{field}, {name}", "questions", "exact match, points")]
    for value, mean in differences.items():
        low, middle, high = (f"{100 * mean[end]:+.1f}" for end in ("low", "mean", "high"))
        lines.append((_label(value), f"{mean['questions']:,}", f"{middle} ({low} to {high})"))
    width = max(len(first) for first, _, _ in lines)
    return "\n".join(f"{first:<{width}}  {count:>10}  {cell:>24}" for first, count, cell in lines)


def flip(row: str, answers: dict[str, dict]) -> str:
    """A row that only one of two models got right: its place, its question, and the answer of each model."""
    truth = next(iter(answers.values()))
    texts = {"the row's answer": truth["answer"]} | {name: answer["prediction"] for name, answer in answers.items()}
    lines = [f"  {row}: {_one_line(truth.get('question', ''))}"]
    lines += [f"    {name}: {_one_line(answer)}" for name, answer in texts.items()]
    return "\n".join(lines)


def _label(value: str) -> str:
    """A question type or a field's value as the first cell of a row."""
    return _one_line(value)[:MAX_LETTERS]


def _one_line(value: str) -> str:
    return printable(" ".join(value.split()))


# ------------------------------------------------------------------------------------------------------ CSV and LaTeX


def summary_csv(summary: dict) -> str:
    """The main scores of summary.json as CSV, one number with its interval a line: over all rows, by question type, by
    the fields that --by names, and the difference of two models where there are two.

    `value`, `low` and `high` are those of summary.json, unrounded: shares from 0 to 1, and BLEU from 0 to 100,
    which has no interval. `by` is empty for scores over all rows."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(CSV_HEAD)
    for by, group, score, model, mean in _named_means(summary):
        writer.writerow([by, group, score, model, *(mean[key] for key in ("questions", "mean", "low", "high"))])
    return file.getvalue()


def _named_means(summary: dict) -> list[tuple[str, str, str, str, dict]]:
    """(field that rows are grouped by, its value, score, model, mean) of all main scores. The field is empty for
    means over all rows, and "question_type" for those of types."""
    found = []
    for model, result in summary["scores"].items():
        for by, group, means in _groups(result, result["all"] | {k: result[k] for k in ("bleu",) if k in result}):
            questions = means["exact_match"]["questions"]
            for score, mean in means.items():
                if score == "bleu":
                    mean = {"questions": questions, "mean": mean["score"], "low": None, "high": None}
                found.append((by, group, score, model, mean))
    if comparison := summary.get("comparison"):
        for by, group, difference in _groups(comparison, comparison["difference"]):
            found.append((by, group, "exact_match", "tuned − base", difference))
    return found


def _groups(result: dict, total: dict) -> list[tuple[str, str, dict]]:
    """(field, value, scores) of every group of rows in a result of `scores.summarize` or `scores.compare`; `total` are
    the scores of all rows."""
    groups = [("", "", total), *(("question_type", kind, score) for kind, score in result["by_type"].items())]
    return groups + [(field, value, score) for field, part in result["by"].items() for value, score in part.items()]


def summary_tex(summary: dict) -> str:
    """LaTeX tables of the numbers of `summary_csv`: every score over all rows, then exact match by question type and by
    each field that --by names."""
    named = _named_means(summary)
    models = list(dict.fromkeys(model for *_, model, _ in named))
    tables = {}  # first cell of the head -> {first cell of a row -> {model -> mean}}
    for by, group, score, model, mean in named:
        if not by:
            tables.setdefault("score", {}).setdefault(SCORES.get(score, "BLEU, 0 to 100"), {})[model] = mean
        elif score == "exact_match":
            head = by.replace("question_type", "question type") + ", exact match"
            tables.setdefault(head, {}).setdefault(group, {})[model] = mean
    return TEX_HEAD + "\n".join(_tex_table(head, models, rows) for head, rows in tables.items())


def _tex_table(head: str, models: list[str], rows: dict[str, dict[str, dict]]) -> str:
    """A tabular with a row for each name in `rows`: the number of questions, and a cell for each model."""
    lines = [[head, "questions", *models]]
    for name, means in rows.items():
        count = f"{next(iter(means.values()))['questions']:,}"
        lines.append([name, count, *(_tex_value(means.get(model), "−" in model) for model in models)])
    top, *body = (" & ".join(map(tex, cells)) + r" \\" for cells in lines)
    begin = rf"\begin{{tabular}}{{l{'r' * (1 + len(models))}}}"
    return "\n".join([begin, r"\toprule", top, r"\midrule", *body, r"\bottomrule", r"\end{tabular}", ""])


def _tex_value(mean: dict | None, signed: bool) -> str:
    """A cell in percent, with a sign if it is a difference; BLEU has no interval and is out of 100 already."""
    if mean is None:
        return ""
    if mean["low"] is None:
        return f"{mean['mean']:.1f}"
    low, middle, high = (f"{100 * mean[end]:{'+' * signed}.1f}".replace("-", "−") for end in ("low", "mean", "high"))
    return f"{middle} ({low} to {high})"


def tex(value: str) -> str:
    """Any text as text of LaTeX, on one line. Letters and accents are joined, as pdfLaTeX knows them."""
    text = normalize("NFC", printable(" ".join(value.split())))
    escaped = "".join(TEX_ESCAPES.get(letter, letter) for letter in text)
    return LONE_GREEK.sub(lambda match: TEX_GREEK[match[0]], escaped)
