"""The report of an evaluation: one HTML file that opens in any browser, loads nothing, and can be sent on."""

import base64
import io
import json
import re
from collections import Counter
from collections.abc import Callable
from html import escape
from pathlib import Path
from urllib.parse import urlencode

from common import write_whole
from evaluation import charts
from evaluation.normalization import accepted
from evaluation.page import MAX_LETTERS, document, grid, legend, percent, points, table, text
from evaluation.scores import row_key
from evaluation.statistics import calibration_bins, calibration_error
from evaluation.tables import SCORES, paper_cells
from inputs.images import open_picture

MAX_CARDS = 300  # questions in the gallery
THUMBNAIL_SIDE = 256  # pixels of the longer side
MAX_THUMBNAIL_BYTES = 8_000_000  # of all thumbnails as data URIs; the gallery stops before it exceeds this
MAX_WORST, MAX_CONFUSIONS, MAX_FLIPS = 15, 12, 50  # questions, tables and rows shown
MAX_VALUES = 100  # of a field that --by names
MAX_ORIGIN = 100_000  # letters of the command or of one of its settings
MARKS = "●■"  # of the first model and of the one that it is compared with


def write_report(
    path: Path, summary: dict, predictions: dict[str, list[dict]], images: list[list[str]], metrics: list[dict]
) -> None:
    """Write the page about the first model in `predictions`, compared with the second one if there are two.

    `summary` is the content of summary.json, `images` are the paths of each prediction's images, `metrics` the lines of
    metrics.jsonl (none for a base model). An image that can't be read any more becomes a placeholder.
    """
    scores = {kind: summary["scores"][kind] for kind in predictions}
    name = Path(summary["facts"].get("checkpoint") or summary["facts"].get("model", "")).name
    sections = {
        "Question types": by_type(scores, summary.get("comparison")),
        "By field": by_fields(scores, summary.get("comparison")),
        "All scores": all_scores(scores),
        "Worst questions": worst_questions(scores, summary.get("comparison")),
        "Confusion": confusions(scores),
        "Calibration": calibration(predictions),
        "Training": training(metrics, name),
        "Flipped answers": flipped(summary, predictions),
        "Pictures": gallery(predictions, images),
        "Origin": origin(summary),
    }
    head = headline(summary, predictions, images)
    write_whole(path, document(title(summary["facts"]), head, sections))


def title(facts: dict) -> str:
    """Which checkpoint of which run, or which base model, on which rows."""
    folder = Path(facts.get("checkpoint") or "")
    subject = "/".join(folder.parts[-2:]) or Path(facts.get("model", "")).name
    rows = ", ".join(Path(file).name for file in facts["rows"].split(", "))
    return f"Evaluation of {subject} on {rows}"


# ----------------------------------------------------------------------------------------------------------- sections


def headline(summary: dict, predictions: dict, images: list[list[str]]) -> str:
    facts, exact_match = summary["facts"], summary["scores"][next(iter(predictions))]["all"]["exact_match"]
    different = {path for paths in images for path in paths}
    lines = {"questions": f"{exact_match['questions']:,}", "images": f"{len(different):,}"}
    lines |= {"model": text(facts.get("model", "")), "checkpoint": text(facts.get("checkpoint") or "none: base model")}
    if comparison := summary.get("comparison"):
        p = f"p = {comparison['p']:.2g}" if comparison["p"] >= 0.001 else "p &lt; 0.001"
        difference = f"{points(comparison['difference'])} points, <small>McNemar {p}</small>"
        lines = {" − ".join(map(text, predictions)): difference} | lines
    rows = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in lines.items())
    return f"""<p class="big">{percent(exact_match)} exact match</p><dl>{rows}</dl>
    <p class="dim">Small numbers after a value are its 95% confidence interval, which counts how alike the answers about
    an image are. An answer is right if it equals any that the row accepts, ignoring case, articles before a word,
    punctuation at the edges of words, the order of parts, and how numbers and units are written.</p>"""


def score_table(intro: str, scores: dict[str, dict], comparison: dict | None, field: str, names: list[str]) -> str:
    """Exact match of question types or questions, and the difference of two models. Each name links to the gallery,
    filtered by it."""
    rows, parameter = [], {"by_type": "type", "by_question": "q"}[field]
    for name in names:
        means = [score[field][name]["exact_match"] for score in scores.values()]
        link = f'<a href="#{escape(urlencode({parameter: name[:MAX_LETTERS]}))}">{text(name)}</a>'
        row = [link, f"{means[0]['questions']:,}", charts.bars(means), *map(percent, means)]
        rows.append(row + ([points(comparison[field][name])] if comparison else []))
    head = [field.removeprefix("by_"), "questions", "0 to 100%", *map(text, scores)]
    head += ["difference, points"] * bool(comparison)
    return f"<p>{intro}: {legend(scores, MARKS)}</p>" + table(head, rows)


def by_type(scores: dict[str, dict], comparison: dict | None) -> str:
    return score_table("Exact match", scores, comparison, "by_type", list(next(iter(scores.values()))["by_type"]))


def by_fields(scores: dict[str, dict], comparison: dict | None) -> str:
    """A table for each field that --by names: exact match for each value of the field, and the scores that papers
    report, those of two models in one cell."""
    parts, kinds = "", " / ".join(map(text, scores))
    for field, values in next(iter(scores.values()))["by"].items():
        rows = []
        for value in list(values)[:MAX_VALUES]:
            groups = [score["by"][field][value] for score in scores.values()]
            means = [group["exact_match"] for group in groups]
            row = [text(value), f"{means[0]['questions']:,}", *map(percent, means)]
            row += [points(comparison["by"][field][value])] if comparison else []
            rows.append(row + list(map(" / ".join, zip(*(paper_cells(group).values() for group in groups)))))
        head = [text(field), "questions", *(f"exact match, {text(kind)}" for kind in scores)]
        head += ["difference, points"] * bool(comparison) + [f"{name}, {kinds}" for name in paper_cells(groups[0])]
        shown = f"The first {MAX_VALUES} of {len(values):,} values" if len(values) > MAX_VALUES else "Scores"
        parts += f"<p>{shown} by {text(field)}</p>" + table(head, rows)
    return parts


def worst_questions(scores: dict[str, dict], comparison: dict | None) -> str:
    """Rarely asked questions are left out, unless all are rare: their means say little."""
    means = {name: score["exact_match"] for name, score in next(iter(scores.values()))["by_question"].items()}
    least = 5 if any(mean["questions"] >= 5 for mean in means.values()) else 1
    names = [name for name, mean in means.items() if mean["questions"] >= least]
    names = sorted(names, key=lambda name: (means[name]["mean"], -means[name]["questions"]))
    intro = f"Lowest exact match among {len(names):,} questions" + f" asked at least {least} times" * (least > 1)
    return score_table(intro, scores, comparison, "by_question", names[:MAX_WORST])


def named_scores(score: dict) -> dict[str, tuple[int, str]]:
    """Name -> (questions, cell) of every score of one model over all questions."""

    def mean_cell(mean: dict) -> tuple[int, str]:
        return mean["questions"], percent(mean)

    def cell(scores: dict, name: str, questions: int) -> tuple[int, str]:
        return questions, f"{scores[name]:.3f}"

    forced = score["teacher_forced"]
    cells = {SCORES.get(name, name): mean_cell(mean) for name, mean in score["all"].items()}
    cells["exact match, teacher-forced"] = mean_cell(forced["exact_match"])
    if difference := forced.get("in_parts"):
        name = "generated − teacher-forced in points, answers in several parts"
        cells[name] = difference["questions"], points(difference)
    if bleu := score.get("bleu"):
        cells["BLEU, 0 to 100"] = forced["exact_match"]["questions"], f"{bleu['score']:.1f}"
    if cut := score["cut"]:
        cells["answers cut by --max-new-tokens"] = forced["exact_match"]["questions"], f"{cut:,}"
    cells["loss per answer token"] = cell(forced, "loss", forced["exact_match"]["questions"])
    if options := score.get("options"):
        cells["likeliest option is right"] = mean_cell(options["top1"])
        cells["calibration error of options"] = cell(options, "calibration_error", options["top1"]["questions"])
        if yes_no := options.get("yes/no"):
            cells["area under the ROC curve, yes/no"] = cell(yes_no, "auroc", yes_no["questions"])
            cells["calibration error, yes/no"] = cell(yes_no, "calibration_error", yes_no["questions"])
    return cells


def all_scores(scores: dict[str, dict]) -> str:
    columns = [named_scores(score) for score in scores.values()]
    rows = []
    for name in dict.fromkeys(name for column in columns for name in column):
        questions, cells = zip(*(column.get(name, (0, "")) for column in columns))
        rows.append([text(name), f"{max(questions):,}", *cells])
    return table(["score", "questions", *map(text, scores)], rows)


def heat_map(confusion: dict[str, dict[str, int]]) -> str:
    """A row for each true answer, a column for each given answer. The shade of a cell is its share of the row."""
    columns = dict.fromkeys([*confusion, *(answer for row in confusion.values() for answer in row)])
    rows = []
    for truth, row in confusion.items():
        tenths = {answer: round(10 * row.get(answer, 0) / sum(row.values())) for answer in columns}
        cells = (f'<i class="h{n}{" hit" * (a == truth)}">{row.get(a, "")}</i>' for a, n in tenths.items())
        rows.append([text(truth, 60), *cells])
    css_class = "heat tall" if sum(map(len, columns)) > 30 else "heat"
    return table(["true \\ given", *(text(answer, 60) for answer in columns)], rows, css_class)


def confusions(scores: dict[str, dict]) -> str:
    kind, main = next(iter(scores.items()))
    asked = sorted(main["closed"], key=lambda question: -main["by_question"][question]["exact_match"]["questions"])
    figures = []
    for question in asked[:MAX_CONFUSIONS]:
        values = (f"{text(k)} {score['closed'][question]['balanced_accuracy']:.2f}" for k, score in scores.items())
        caption = f"<b>{text(question)}</b> Balanced accuracy: {', '.join(values)}"
        figures.append((caption, heat_map(main["closed"][question]["confusion"])))
    intro = f"""{len(figures)} of {len(asked)} questions with few different answers, most asked first, as the
    {text(kind)} model answered them. Rows are true answers, shades are shares of a row, right answers are framed."""
    return grid(intro, figures)


def calibration(predictions: dict[str, list[dict]]) -> str:
    intro = """Confidence is the probability that the model gave to its whole answer. Bars are shares of right answers,
    and the number of answers stands on top. Dots are at the mean confidence: below the dashed line the model is
    overconfident, above it underconfident."""
    figures = []
    for kind, answers in predictions.items():
        confidences, right = [answer["confidence"] for answer in answers], [answer["right"] for answer in answers]
        caption = f"<b>{text(kind)}</b> Expected calibration error {calibration_error(confidences, right):.3f}"
        figures.append((caption, charts.reliability(calibration_bins(confidences, right))))
    return grid(intro, figures)


def training(metrics: list[dict], name: str) -> str:
    """Curves of the run, with the step of the checkpoint called `name` marked."""
    match = re.fullmatch(r"checkpoint-(\d+)", name)
    step = int(match[1]) if match else 0
    figures = [(legend(names, charts.CURVE_MARKS), plot) for names, plot in charts.curves(metrics, step)]
    return grid(f"The dashed line marks this checkpoint, step {step:,}." if step else "", figures)


def truth(prediction: dict) -> str:
    """All answers that the row accepts, first the one that it trains."""
    return text(" | ".join(accepted(prediction)))


def verdict(prediction: dict) -> str:
    css_class, mark = ("right", "✓") if prediction["right"] else ("wrong", "✗")
    cut = " (cut)" if prediction.get("cut") else ""
    return f'<span class="{css_class}">{mark} {text(prediction["prediction"].strip()) or "(empty)"}{cut}</span>'


def flipped(summary: dict, predictions: dict[str, list[dict]]) -> str:
    if "comparison" not in summary:
        return ""
    pairs = {row_key(pair[0]): pair for pair in zip(*predictions.values())}
    main, base = map(text, predictions)
    parts = ""
    for title, field in (f"Lost: only {base} is right", "only_a"), (f"Won: only {main} is right", "only_b"):
        keys, rows = summary["comparison"][field], []
        for pair in (pairs[key] for key in keys[:MAX_FLIPS]):
            row = [text(pair[0]["where"]), text(pair[0]["question"]), truth(pair[0])]
            rows.append([*row, *map(verdict, pair)])
        title += f", {len(keys):,} questions" + f"; the first {MAX_FLIPS}" * (len(keys) > MAX_FLIPS)
        listing = table(["row", "question", "truth", main, base], rows, "texts")
        parts += f"<details><summary>{title}</summary>{listing}</details>"
    return parts


def origin(summary: dict) -> str:
    """The command, and tables of what the answers depend on; fields of a fact with several have names with dots."""
    parts = f"<pre>{text(summary['command'], MAX_ORIGIN)}</pre>"
    for part in ("facts", "settings"):
        values = {}
        for name, value in summary[part].items():
            values |= {f"{name}.{field}": v for field, v in value.items()} if isinstance(value, dict) else {name: value}
        texts = {name: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for name, v in values.items()}
        parts += table([part, "value"], [[text(n), text(v, MAX_ORIGIN)] for n, v in texts.items()], "texts")
    return f"<details><summary>Command, facts, versions and settings</summary>{parts}</details>"


# ------------------------------------------------------------------------------------------------------------ gallery


def take_turns(order: list[int], group: Callable) -> list[int]:
    """The same numbers, the first one of every group before the second one of any. `group` gives a number's group."""
    counts, turns = Counter(), []
    for i in order:
        turns.append((counts[group(i)], i))
        counts[group(i)] += 1
    return [i for _, i in sorted(turns, key=lambda turn: turn[0])]


def thumbnail(path: str) -> tuple[int, int, str] | None:
    """Width, height and data URI of a small copy of an image; None when it can't be read any more."""
    try:
        picture = open_picture(path)
    except OSError:
        return None
    picture.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=80)
    return *picture.size, "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def choose(predictions: list[dict], images: list[list[str]]) -> tuple[list[int], dict]:
    """Indices of the predictions to show, and the thumbnail of each of their images.

    Wrong and right answers of every question type take turns. Within these the questions do, and within these the
    images, so that a few hundred cards show some of everything.
    """
    order = take_turns(list(range(len(predictions))), lambda i: tuple(images[i]))
    for field in ("question", "question_type"):
        order = take_turns(order, lambda i, field=field: (predictions[i][field], predictions[i]["right"]))
    chosen, thumbnails, size = [], {}, 0
    for i in order[:MAX_CARDS]:
        new = {path: thumbnail(path) for path in images[i] if path not in thumbnails}
        size += sum(len(uri) for _, _, uri in filter(None, new.values()))
        if size > MAX_THUMBNAIL_BYTES:
            break
        thumbnails |= new
        chosen.append(i)
    return chosen, thumbnails


def card(answers: dict[str, dict], pictures: str) -> str:
    """A question with its pictures, the true answer, the answer of each model, and the first model's confidence."""
    main = next(iter(answers.values()))
    lines = {"truth": truth(main)} | {text(kind): verdict(answer) for kind, answer in answers.items()}
    lines["confidence"] = f"{main['confidence']:.3f}"
    if "options" in main:
        likeliest = sorted(main["options"].items(), key=lambda option: -option[1])[:4]
        lines["options"] = ", ".join(f"{text(option, 60)}: {share:.2f}" for option, share in likeliest)
    rows = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in lines.items())
    kind, right = escape(main["question_type"]), "right" if main["right"] else "wrong"
    return f"""<article class="{right}" data-type="{kind}" data-answer="{right}"><div>{pictures}</div>
    <h3>{text(main["question"])}</h3><dl>{rows}</dl><p class="dim">{kind}, {text(main["where"])}</p></article>"""


def embed(thumbnails: dict[str, tuple[int, int, str] | None]) -> tuple[str, dict[str, str]]:
    """SVG that holds every thumbnail once, and for each path the HTML of a card that refers to its thumbnail."""
    stored, shown = "", {}
    for number, (path, image) in enumerate(thumbnails.items()):
        name = text(Path(path).name)
        if image:
            width, height, uri = image
            stored += f'<image id="p{number}" width="{width}" height="{height}" href="{uri}"/>'
            box = f'viewBox="0 0 {width} {height}" role="img" aria-label="picture {name}"'
            shown[path] = f'<svg {box}><use href="#p{number}"/></svg>'
        else:
            shown[path] = f'<p class="gone">{name}: no picture</p>'
    return stored, shown


def gallery(predictions: dict[str, list[dict]], images: list[list[str]]) -> str:
    """A filter and cards: wrong answers first, then right ones, each sorted by falling confidence."""
    main = next(iter(predictions.values()))
    chosen, thumbnails = choose(main, images)
    chosen.sort(key=lambda i: (main[i]["right"], -main[i]["confidence"]))
    stored, shown = embed(thumbnails)
    cards = (card({k: p[i] for k, p in predictions.items()}, "".join(map(shown.get, images[i]))) for i in chosen)
    right, all_right = sum(main[i]["right"] for i in chosen), sum(prediction["right"] for prediction in main)
    intro = f"""{len(chosen):,} of {len(main):,} questions: {len(chosen) - right:,} of {len(main) - all_right:,} wrong
    answers and {right:,} of {all_right:,} right ones, taken in turn from every type, question and image. Wrong answers
    stand first. Both parts begin with the answers of highest confidence."""
    types = map(escape, sorted({main[i]["question_type"] for i in chosen}))
    options = "".join(f'<option value="{kind}">{kind}</option>' for kind in types)
    return f"""<p>{intro}</p><form hidden>
    <select name="type" aria-label="type"><option value="">every type</option>{options}</select>
    <select name="answer" aria-label="answer"><option value="">right and wrong</option><option>right</option>
    <option>wrong</option></select><input type="search" name="q" placeholder="search" aria-label="search">
    <output></output></form><svg class="store" aria-hidden="true"><defs>{stored}</defs></svg>
    <div class="cards">{"".join(cards)}</div>"""
