"""The report of an evaluation: one HTML file that opens anywhere, asks nothing of a network, and can be sent on."""

import base64
import io
import json
import re
from collections import Counter
from html import escape
from pathlib import Path
from urllib.parse import urlencode

from common import write_whole
from evaluation import charts
from evaluation.page import MAX_LETTERS, document, grid, legend, percent, table, text
from evaluation.scores import calibration_bins, calibration_error
from inputs.images import open_picture

CARDS = 300  # questions in the gallery at most
SIDE = 256  # pixels of a picture's longer side
PICTURE_BYTES = 8_000_000  # of all pictures as text; the gallery ends where they would be more
WORST, HEAT_MAPS, FLIPS = 15, 12, 50  # shown at most
SCORES = {
    "exact_match": "exact match",
    "token_f1": "token F1",
    "numeric": "numbers and sizes, within tolerance",
    "set_f1": "set F1, answers with several parts",
    "set_match": "all parts right, answers with several",
    "forced": "exact match, teacher-forced",
    "top1": "likeliest option is right",
}


def write_report(
    path: Path, summary: dict, predictions: dict[str, list[dict]], images: list[list[str]], metrics: list[dict]
) -> None:
    """Write the page about the first kind in `predictions`; a second one is what it is compared with.

    `summary` is that of summary.json, `images` the paths of each prediction's pictures, `metrics` the lines of
    metrics.jsonl, none for a base model. A picture that can't be read any more becomes a placeholder.
    """
    scores = {kind: summary["scores"][kind] for kind in predictions}
    name = Path(summary["facts"].get("checkpoint") or summary["facts"].get("model", "")).name
    sections = {
        "Question types": by_type(scores),
        "All scores": all_scores(scores),
        "Worst questions": worst_questions(scores),
        "Confusion": confusions(scores),
        "Calibration": calibration(predictions),
        "Training": training(metrics, name),
        "Flipped answers": flipped(summary, predictions),
        "Pictures": gallery(predictions, images),
        "Origin": origin(summary),
    }
    head = headline(summary, predictions, images)
    write_whole(path, document(f"Evaluation of {name}", head, sections))


# ----------------------------------------------------------------------------------------------------------- sections


def headline(summary: dict, predictions: dict, images: list[list[str]]) -> str:
    facts, found = summary["facts"], summary["scores"][next(iter(predictions))]["all"]["exact_match"]
    lines = {"questions": f"{found['questions']:,}", "pictures": f"{len({p for paths in images for p in paths}):,}"}
    lines |= {"model": text(facts.get("model", "")), "checkpoint": text(facts.get("checkpoint") or "none: base model")}
    if compared := summary.get("comparison"):
        low, mean, high = (100 * compared["difference"][end] for end in ("low", "mean", "high"))
        p = f"p = {compared['p']:.2g}" if compared["p"] >= 0.001 else "p &lt; 0.001"
        less = f"{mean:+.1f} points <small>{low:+.1f} to {high:+.1f}, McNemar {p}</small>"
        lines = {f"against {text(list(predictions)[-1])}": less} | lines
    rows = "".join(f"<div><dt>{what}</dt><dd>{value}</dd></div>" for what, value in lines.items())
    return f"""<p class="big">{percent(found)} exact match</p><dl>{rows}</dl>
    <p class="dim">Small numbers after a value are its 95% interval, from a bootstrap over pictures. An answer is right
    if it equals the row's, apart from case, articles, punctuation at the edges of words, and number words.</p>"""


def score_table(told: str, scores: dict[str, dict], field: str, names: list[str]) -> str:
    """Exact match of types or questions; each name links to the gallery filtered by it."""
    rows, parameter = [], {"by_type": "type", "by_question": "q"}[field]
    for name in names:
        found = [score[field][name]["exact_match"] for score in scores.values()]
        link = f'<a href="#{escape(urlencode({parameter: name[:MAX_LETTERS]}))}">{text(name)}</a>'
        row = [link, f"{found[0]['questions']:,}", charts.bars(found), *map(percent, found)]
        rows.append(row + [f"{100 * (found[0]['mean'] - base['mean']):+.1f}" for base in found[1:]])
    head = [field.removeprefix("by_"), "questions", "0 to 100%", *map(text, scores), "difference"]
    return f"<p>{told}: {legend(scores, '●■')}</p>" + table(head[: 3 + 2 * len(scores) - 1], rows)


def by_type(scores: dict[str, dict]) -> str:
    return score_table("Exact match", scores, "by_type", list(next(iter(scores.values()))["by_type"]))


def worst_questions(scores: dict[str, dict]) -> str:
    found = {name: one["exact_match"] for name, one in next(iter(scores.values()))["by_question"].items()}
    least = 5 if any(one["questions"] >= 5 for one in found.values()) else 1
    names = [name for name, one in found.items() if one["questions"] >= least]
    names = sorted(names, key=lambda name: (found[name]["mean"], -found[name]["questions"]))
    told = f"Lowest exact match, of {len(names):,} questions" + f" that were asked {least} times or more" * (least > 1)
    return score_table(told, scores, "by_question", names[:WORST])


def named_scores(score: dict) -> dict[str, tuple[int, str]]:
    """Every score of a kind over all its questions: how many questions, and its value as a cell."""
    forced, options = score["teacher_forced"], score.get("options", {})
    closed = options.get("yes/no", {})
    means = score["all"] | {"forced": forced["exact_match"], "top1": options.get("top1")}
    found = {SCORES.get(name, name): (one["questions"], percent(one)) for name, one in means.items() if one}
    for name, part, field, of in (
        ("loss of an answer token", forced, "loss", means["forced"]),
        ("calibration error of options", options, "calibration_error", means["top1"]),
        ("area under the ROC curve, yes or no", closed, "auroc", closed),
        ("calibration error, yes or no", closed, "calibration_error", closed),
    ):
        if part:
            found[name] = (of["questions"], f"{part[field]:.3f}")
    return found


def all_scores(scores: dict[str, dict]) -> str:
    columns = [named_scores(score) for score in scores.values()]
    rows = []
    for name in dict.fromkeys(name for column in columns for name in column):
        found = [column.get(name, (0, "")) for column in columns]
        rows.append([text(name), f"{max(count for count, _ in found):,}", *(value for _, value in found)])
    return table(["score", "questions", *map(text, scores)], rows)


def heat_map(confusion: dict[str, dict[str, int]]) -> str:
    """A row for each true answer, a column for each given one; the shade is the share of the row."""
    columns = dict.fromkeys([*confusion, *(answer for row in confusion.values() for answer in row)])
    rows = []
    for truth, row in confusion.items():
        shades = {answer: round(10 * row.get(answer, 0) / sum(row.values())) for answer in columns}
        shown = (f'<i class="h{n}{" hit" * (a == truth)}">{row.get(a, "")}</i>' for a, n in shades.items())
        rows.append([text(truth, 60), *shown])
    kind = "heat tall" if sum(map(len, columns)) > 30 else "heat"
    return table(["true \\ given", *(text(answer, 60) for answer in columns)], rows, kind)


def confusions(scores: dict[str, dict]) -> str:
    kind, main = next(iter(scores.items()))
    asked = sorted(main["closed"], key=lambda question: -main["by_question"][question]["exact_match"]["questions"])
    figures = []
    for question in asked[:HEAT_MAPS]:
        values = (f"{text(k)} {score['closed'][question]['balanced_accuracy']:.2f}" for k, score in scores.items())
        caption = f"<b>{text(question)}</b> Balanced accuracy: {', '.join(values)}"
        figures.append((caption, heat_map(main["closed"][question]["confusion"])))
    told = f"""{len(figures)} of {len(asked)} questions with few different answers, most asked first, as {text(kind)}
    answered them. Rows are true answers, shades are shares of a row, framed cells are right answers."""
    return grid(told, figures)


def calibration(predictions: dict[str, list[dict]]) -> str:
    told = """Confidence is the probability that the model gave to its whole answer. Bars are shares of right answers,
    numbers on top count answers, dots stand at the mean confidence: those under the dashed line are too sure."""
    figures = []
    for kind, answers in predictions.items():
        confidences, right = [answer["confidence"] for answer in answers], [answer["right"] for answer in answers]
        caption = f"<b>{text(kind)}</b> Expected calibration error {calibration_error(confidences, right):.3f}"
        figures.append((caption, charts.reliability(calibration_bins(confidences, right))))
    return grid(told, figures)


def training(metrics: list[dict], name: str) -> str:
    found = re.fullmatch(r"checkpoint-(\d+)", name)
    step = int(found[1]) if found else 0
    figures = [(legend(names, charts.CURVE_MARKS), drawn) for names, drawn in charts.curves(metrics, step)]
    return grid(f"The dashed line marks this checkpoint, step {step:,}." if step else "", figures)


def verdict(one: dict) -> str:
    mark = "right" if one["right"] else "wrong"
    return f'<span class="{mark}">{"✓" if one["right"] else "✗"} {text(one["prediction"].strip()) or "(empty)"}</span>'


def flipped(summary: dict, predictions: dict[str, list[dict]]) -> str:
    if "comparison" not in summary:
        return ""
    (kind, mine), (other, theirs) = predictions.items()
    pairs = {f"{one['where']} {one['id']}": (one, two) for one, two in zip(mine, theirs)}
    parts = ""
    for told, field in (f"Lost: right by {other} only", "only_a"), (f"Won: right by {kind} only", "only_b"):
        names, rows = summary["comparison"][field], []
        for one, two in (pairs[name] for name in names[:FLIPS]):
            rows.append([text(one["where"]), text(one["question"]), text(one["answer"]), verdict(one), verdict(two)])
        told = f"{text(told)}, {len(names):,} questions" + f"; the first {FLIPS}" * (len(names) > FLIPS)
        listed = table(["row", "question", "truth", text(kind), text(other)], rows, "texts")
        parts += f"<details><summary>{told}</summary>{listed}</details>"
    return parts


def origin(summary: dict) -> str:
    parts = {name: summary[name] for name in ("command", "facts", "settings")}
    told = text(json.dumps(parts, indent=1, ensure_ascii=False, default=str), 100_000)
    return f"<details><summary>Command, facts, versions and settings</summary><pre>{told}</pre></details>"


# ------------------------------------------------------------------------------------------------------------ gallery


def take_turns(order: list[int], group) -> list[int]:
    """The same numbers, with every group's first before any group's second. `group` gives a number's group."""
    taken, turns = Counter(), []
    for i in order:
        turns.append((taken[group(i)], i))
        taken[group(i)] += 1
    return [i for _, i in sorted(turns, key=lambda turn: turn[0])]


def thumbnail(path: str) -> tuple[int, int, str] | None:
    """Width, height and data URI of a picture; None when it can't be read any more."""
    try:
        picture = open_picture(path)
    except OSError:
        return None
    picture.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=80)
    return *picture.size, "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def choose(predictions: list[dict], images: list[list[str]]) -> tuple[list[int], dict]:
    """The cards' numbers, and the thumbnail of each of their pictures: wrong and right answers of every type in turns,
    within those every question, within those every picture."""
    order = take_turns(list(range(len(predictions))), lambda i: tuple(images[i]))
    for field in ("question", "question_type"):
        order = take_turns(order, lambda i, field=field: (predictions[i][field], predictions[i]["right"]))
    chosen, thumbnails, size = [], {}, 0
    for i in order[:CARDS]:
        new = {path: thumbnail(path) for path in images[i] if path not in thumbnails}
        size += sum(len(one[2]) for one in new.values() if one)
        if size > PICTURE_BYTES:
            break
        thumbnails |= new
        chosen.append(i)
    return chosen, thumbnails


def card(answers: dict[str, dict], shown: str) -> str:
    """A question with its pictures, the true answer, that of each kind, and how sure the first kind was."""
    one = next(iter(answers.values()))
    lines = {"truth": text(one["answer"])} | {text(kind): verdict(answer) for kind, answer in answers.items()}
    lines["confidence"] = f"{one['confidence']:.3f}"
    if "options" in one:
        likeliest = sorted(one["options"].items(), key=lambda option: -option[1])[:4]
        lines["options"] = ", ".join(f"{text(option, 60)}: {share:.2f}" for option, share in likeliest)
    rows = "".join(f"<dt>{what}</dt><dd>{value}</dd>" for what, value in lines.items())
    kind, right = escape(one["question_type"]), "right" if one["right"] else "wrong"
    return (
        f'<article class="{right}" data-type="{kind}" data-answer="{right}"><div>{shown}</div>'
        f'<h3>{text(one["question"])}</h3><dl>{rows}</dl><p class="dim">{kind}, {text(one["where"])}</p></article>'
    )


def gallery(predictions: dict[str, list[dict]], images: list[list[str]]) -> str:
    """Cards, wrong answers first and of each sort the surest first. A picture is stored once, cards refer to it."""
    main = next(iter(predictions.values()))
    chosen, thumbnails = choose(main, images)
    chosen.sort(key=lambda i: (main[i]["right"], -main[i]["confidence"]))
    shown, stored = {}, ""
    for number, (path, found) in enumerate(thumbnails.items()):
        shown[path] = f'<p class="gone">{text(Path(path).name)}: no picture</p>'
        if found:
            width, height, uri = found
            stored += f'<image id="p{number}" width="{width}" height="{height}" href="{uri}"/>'
            alt = f'viewBox="0 0 {width} {height}" role="img" aria-label="picture {text(Path(path).name)}"'
            shown[path] = f'<svg {alt}><use href="#p{number}"/></svg>'
    cards = (card({k: p[i] for k, p in predictions.items()}, "".join(map(shown.get, images[i]))) for i in chosen)
    right, all_right = sum(main[i]["right"] for i in chosen), sum(one["right"] for one in main)
    told = f"""{len(chosen):,} of {len(main):,} questions: {len(chosen) - right:,} of {len(main) - all_right:,} wrong
    answers and {right:,} of {all_right:,} right ones, in turns from every type, question and picture. Wrong ones stand
    first; of the wrong ones and of the right ones, those with the highest confidence."""
    types = map(escape, sorted({main[i]["question_type"] for i in chosen}))
    options = "".join(f'<option value="{kind}">{kind}</option>' for kind in types)
    return f"""<p>{told}</p><form hidden>
    <select name="type" aria-label="type"><option value="">every type</option>{options}</select>
    <select name="answer" aria-label="answer"><option value="">right and wrong</option><option>right</option>
    <option>wrong</option></select><input type="search" name="q" placeholder="search" aria-label="search">
    <output></output></form><svg class="store" aria-hidden="true"><defs>{stored}</defs></svg>
    <div class="cards">{"".join(cards)}</div>"""
