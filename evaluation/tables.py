"""Results as text for the screen."""

MAX_VALUES, MAX_LETTERS = 20, 30  # values of a field that --by names, and letters of one


def accuracy_table(results: dict[str, dict]) -> str:
    """Exact match in percent by question type and over all types, with one column for each of several results about the
    same rows. Results of `scores.summarize` have intervals, those of `evaluate` have none."""
    columns, lines = [_accuracy_cells(result) for result in results.values()], []
    width = 24 if any("(" in cell for column in columns for _, _, cell in column) else 10
    for cells in zip(*columns):  # a row of every column
        kind, questions, _ = cells[0]
        lines.append(f"{kind:<16}{questions:>10,}" + "".join(f"{cell:>{width}}" for _, _, cell in cells))
    head = f"{'exact match %':<16}{'questions':>10}" + "".join(f"{name:>{width}}" for name in results)
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
        lines.append([value[:MAX_LETTERS], *cells])
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
        f"  {won:,} questions won, {lost:,} lost, McNemar p = {comparison['p']:.2g}"
    )
