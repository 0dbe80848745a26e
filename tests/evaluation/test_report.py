"""The report holds the right numbers and pictures, leaves text as text, and filters in a real browser."""

import base64
import io
import math
import os
import re
import shutil
import subprocess
from collections import Counter
from html import unescape
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from evaluation import charts, report, scores, statistics

HOSTILE = (
    "</script></style><img src=x onerror=\"document.title='broken'\"> ' \" & <script>document.title='broken'</script>"
)
METRICS = [{"event": "train", "step": s, "loss": 4 / s, "grad_norm": 1.0, "lr": s / 1e6} for s in (10, 20, 30, 40)]
METRICS += [{"event": "eval", "step": s, "loss": 0.5, "exact_match": s / 50} for s in (20, 40)]
METRICS += [{"event": "skipped", "step": 5, "loss": "nan", "grad_norm": "nan", "samples": []}]


def answered(number: int, prediction: str, **changes) -> dict:
    """Prediction `number`. Four question types take turns, four questions per picture; the right answer is "yes"."""
    kind = ("yes/no", "count", "size", "colour")[number % 4]
    answer = {
        "id": f"r{number}",
        "where": f"val.jsonl:{number + 1}",
        "images": [f"{number // 4}.png"],
        "question_type": kind,
    }
    answer |= {"question": f"Question about {kind}?", "answer": "yes", "prediction": prediction, "confidence": 0.75}
    answer |= {"loss": 0.3, "answer_tokens": 2, "teacher_forced": prediction == "yes"}  # as eval.py writes them
    answer |= changes
    return answer | {"right": scores.is_right(answer["prediction"], scores.accepted(answer))}


def pair() -> dict[str, list[dict]]:
    """40 answers on 10 pictures: the tuned model has 30 right, the base model 10."""
    return {
        "tuned": [answered(i, "yes" if i % 4 else "no") for i in range(40)],
        "base": [answered(i, "no" if i % 4 else "yes", confidence=0.5) for i in range(40)],
    }


@pytest.fixture
def write(tmp_path):
    """Write a report of predictions, and the pictures that they name; returns the report's text."""

    def write(
        predictions: dict, metrics=(), facts: dict | None = None, extra: dict | None = None, pictures=True
    ) -> str:
        main, *others = predictions.values()
        images = [[str(tmp_path / name) for name in answer["images"]] for answer in main]
        for number, path in enumerate(sorted({path for paths in images for path in paths}) if pictures else ()):
            Image.new("RGB", (64, 48), (number, 90, 90)).save(path)
        summaries = {kind: scores.summarize(part, 0.05) | (extra or {}) for kind, part in predictions.items()}
        summary = {
            "command": "eval.py --ckpt x",
            "facts": {"model": "m/Qwen", "checkpoint": "runs/a/checkpoint-000020", "rows": "sets/val.jsonl"},
        }
        summary |= {"facts": summary["facts"] | (facts or {}), "settings": {"max_tokens": 4321}, "scores": summaries}
        if others:
            summary["comparison"] = scores.compare(*others, main)
        report.write_report(tmp_path / "report.html", summary, predictions, images, list(metrics))
        return (tmp_path / "report.html").read_text(encoding="utf-8")

    return write


class Elements(HTMLParser):
    """Every element of a page as (name, attributes)."""

    def __init__(self, page: str):
        super().__init__()
        self.elements = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def cards(self, shown: bool = True) -> list[dict]:
        return [attrs for tag, attrs in self.elements if tag == "article" and ("hidden" not in attrs or not shown)]


def section(page: str, name: str) -> str:
    """The HTML of a section, empty where there is none."""
    match = re.search(rf'<section id="{name}">(.*?)</section>', page, re.DOTALL)
    return match[1] if match else ""


def words(page: str) -> str:
    """What a reader sees, with single spaces."""
    return " ".join(unescape(re.sub("<[^>]*>", " ", page)).split())


def rows(part: str) -> dict[str, str]:
    """The rows of a table by their heading."""
    cells_by_heading = re.findall(r'<tr><th scope="row">(.*?)</th>(.*?)</tr>', part)
    return {words(head): words(cells) for head, cells in cells_by_heading}


# -------------------------------------------------------------------------------------------------------------- content


def test_the_headline_has_the_scores_of_the_summary(write):
    head = words(re.search("<header>.*</header>", write(pair(), METRICS), re.DOTALL)[0])
    for said in (
        "Evaluation of a/checkpoint-000020 on val.jsonl",
        "75.0%",
        "questions 40",
        "images 10",
        "model m/Qwen",
    ):
        assert said in head
    assert "checkpoint runs/a/checkpoint-000020" in head
    assert "tuned − base +50.0 +26.6 to +66.6 points, McNemar p = 0.0022" in head


def test_types_are_compared_with_the_base_model(write):
    page = write(pair())
    table = rows(section(page, "question-types"))
    assert table["yes/no"] == "10 0.0% 0.0 to 34.5 100.0% 65.5 to 100.0 -100.0 -100.0 to -51.3"
    assert table["count"] == "10 100.0% 65.5 to 100.0 0.0% 0.0 to 34.5 +100.0 +51.3 to +100.0"
    assert 'cx="160.0"' in section(page, "question-types") and table.keys() == {"yes/no", "count", "size", "colour"}
    assert 'href="#type=yes%2Fno"' in page


def test_scores_are_shown_where_they_apply(write):
    mean = {"mean": 0.625, "low": 0.5, "high": 0.75, "questions": 32}
    options = {
        "top1": mean,
        "calibration_error": 0.123,
        "yes/no": {"auroc": 0.91, "calibration_error": 0.07, "questions": 9},
    }
    extra = {"teacher_forced": {"loss": 0.4567, "exact_match": mean}, "options": options}
    table = rows(section(write(pair(), extra=extra), "all-scores"))
    assert table["exact match"] == "40 75.0% 58.5 to 86.8 25.0% 13.2 to 41.5" and "token F1" in table
    assert table["exact match, teacher-forced"] == "32 62.5% 50.0 to 75.0 62.5% 50.0 to 75.0"
    assert table["loss per answer token"] == "32 0.457 0.457" and table["likeliest option is right"].startswith(
        "32 62.5%"
    )
    assert table["calibration error of options"] == "32 0.123 0.123"
    assert table["area under the ROC curve, yes/no"] == "9 0.910 0.910"
    assert table["calibration error, yes/no"] == "9 0.070 0.070"
    table = rows(section(write(pair(), extra={"options": {}}), "all-scores"))
    assert not [name for name in table if "option" in name or "ROC" in name]
    numbers = {"tuned": [answered(i, "4", answer="4") for i in range(8)]}
    assert "numbers and sizes, within tolerance" in rows(section(write(numbers), "all-scores"))


def test_all_accepted_answers_and_scores_of_benchmarks_are_shown(write):
    given = [answered(i, "two", answer="2", answers=["2", "2", "a pair"], confidence=1 - i / 10) for i in range(4)]
    page = write({"tuned": given, "base": [line | {"prediction": "red", "right": False} for line in given]})
    table = rows(section(page, "all-scores"))
    assert table["ANLS, rows with `answers`"].startswith("4 0.0%") and "relaxed accuracy, as for charts" in table
    assert table["VQA accuracy, rows with several `answers`"].startswith("4 44.4%")
    assert "truth 2 | a pair tuned" in words(section(page, "pictures"))
    assert rows(section(page, "flipped-answers"))["val.jsonl:1"] == "Question about yes/no? 2 | a pair ✓ two ✗ red"


def test_the_gain_over_teacher_forcing_is_shown_for_answers_in_parts(write):
    given = [answered(i, "red; pink", answer="pink; red") for i in range(4)] + [answered(4, "yes"), answered(5, "yes")]
    table = rows(section(write({"tuned": given}), "all-scores"))
    assert table["generated − teacher-forced in points, answers in several parts"].startswith("4 +100.0")
    assert table["exact match"].startswith("6 100.0%") and table["exact match, teacher-forced"].startswith("6 33.3%")


def test_worst_questions_come_first_and_rare_ones_are_left_out(write):
    answers = [answered(i, "yes" if i < 9 * (i % 3) else "no", question=f"Q{i % 3}?") for i in range(30)]
    answers += [answered(30, "no", question="Asked once?")]
    table = rows(section(write({"tuned": answers}), "worst-questions"))
    assert list(table) == ["Q0?", "Q1?", "Q2?"]
    assert [cells.split("%")[0] for cells in table.values()] == ["10 0.0", "10 30.0", "10 60.0"]
    once = rows(section(write({"tuned": answers[:2] + answers[30:]}), "worst-questions"))
    assert "Asked once?" in once


def test_confusion_tables_count_answers_of_the_most_asked_questions(write):
    truths, given = ["no"] * 3 + ["yes"] * 5, ["no", "yes", "polyp", "yes", "yes", "yes", "yes", "no"]
    answers = [answered(i, g, answer=t, question="Closed?") for i, (t, g) in enumerate(zip(truths, given))]
    for question in range(14):
        answers += [answered(8, t, answer=t, question=f"Q{question}?") for t in ("a", "b")]
    part = section(write({"tuned": answers}), "confusion")
    assert part.count("<figure>") == 12 and "12 of 15 questions" in part and part.index("Closed?") < part.index("Q1?")
    first = part[: part.index("</figure>")]
    assert rows(first) == {"no": "1 1 1", "yes": "1 4"} and "Balanced accuracy: tuned 0.57" in words(first)
    assert '<i class="h8 hit">4</i>' in first and '<i class="h3">1</i>' in first


def test_calibration_has_the_bins_and_the_error_of_scores(write):
    confidences, right = [1.0, 0.95, 0.05, 0.42], [True, False, False, True]
    bins = statistics.calibration_bins(confidences, right)
    assert [(each["low"], each["questions"], each["accuracy"]) for each in bins] == [
        (0, 1, 0),
        (0.4, 1, 1),
        (0.9, 2, 0.5),
    ]
    assert bins[2]["confidence"] == pytest.approx(0.975)
    assert statistics.calibration_error(confidences, right) == pytest.approx((0.05 + 0.58 + 2 * 0.475) / 4)
    part = section(write(pair()), "calibration")
    assert "tuned Expected calibration error 0.000" in words(part) and "base Expected calibration error 0.250" in words(
        part
    )
    assert 'cx="305.0" cy="65.5"' in part and '<text class="count" x="305.0"' in part and ">40</text>" in part


def test_training_curves_have_numbered_axes_and_the_checkpoint(write):
    part = section(write(pair(), METRICS), "training")
    assert part.count("<svg") == 3 and "training loss from 0.4 to 0.1; validation loss from 0.5 to 0.5" in part
    loss, match, lr = part.split("</figure>")[:3]
    # 0.4, 0.2, 0.133 and 0.1 on a logarithmic axis from 0.1 to 0.5
    heights = [round(190 - 166 * math.log(loss / 0.1) / math.log(5), 1) for loss in (4 / 10, 4 / 20, 4 / 30, 4 / 40)]
    points = " ".join(f"{x},{y}" for x, y in zip((135.0, 220.0, 305.0, 390.0), heights))
    assert f'points="{points}"' in loss and loss.count("<circle") == 6
    assert all(f">{n}</text>" in loss for n in ("0.1", "0.2", "0.5", "0", "10", "40", "step (loss on a log axis)"))
    assert "validation exact match, % from 40 to 80" in match and ">80</text>" in match and ">4e-5</text>" in lr
    assert "this checkpoint, step 20" in part and 'd="M220.0 24V190"' in loss


def test_lines_that_do_not_move_can_be_drawn(write):
    for value in (0, 1.0, 5e-6, 0.3):
        axis = charts.ticks(value, value)
        assert len(axis) > 1 and axis[0] <= value * (1 + 1e-9) and axis[-1] >= value * (1 - 1e-9)
    flat = [{"event": "eval", "step": 1, "loss": math.nan, "exact_match": 0.0}]
    part = section(write(pair(), flat), "training")
    assert part.count("<svg") == 1 and "exact match, % from 0 to 0" in part


def test_long_curves_have_no_marks_and_a_loss_of_zero_a_linear_axis():
    long = [{"event": "train", "step": s, "loss": 1 / s, "lr": 1e-4} for s in range(1, 32)]
    (_, loss), (_, rate) = charts.curves(long)
    assert "<circle" not in loss + rate and "log axis" in loss and "log axis" not in rate
    ((_, loss), _) = charts.curves(long[:30])
    assert loss.count("<circle") == 30
    ((_, loss), _) = charts.curves([{"event": "train", "step": 1, "loss": 0.0, "lr": 1e-4}])
    assert "log axis" not in loss


@pytest.mark.parametrize(
    ("low", "high"), [(1.1, 1.3), (1, 1.99), (1.9, 9), (0.05, 2.6), (1e-5, 3), (0.2, 0.2), (1, 10)]
)
def test_a_logarithmic_axis_encloses_its_values_by_a_few_positive_numbers(low, high):
    axis = charts.log_ticks(low, high)
    assert 0 < axis[0] <= low * (1 + 1e-9) and axis[-1] >= high * (1 - 1e-9) and 2 <= len(axis) <= 11
    assert axis == sorted(set(axis))


def test_numbers_at_axes_are_short():
    numbers = (0, 0.15, 2e-4, 1.5e-4, 5e-5, 80, 5000, 15_000, 1_200_000)
    assert [charts.label(n) for n in numbers] == ["0", "0.15", "2e-4", "1.5e-4", "5e-5", "80", "5,000", "15k", "1.2M"]


def test_no_metrics_no_training(write):
    assert not section(write(pair()), "training")


def test_flipped_answers_are_counted_and_the_first_fifty_listed(write):
    many = {"tuned": [answered(i, "yes") for i in range(60)], "base": [answered(i, "no") for i in range(60)]}
    many["tuned"][3], many["base"][3] = many["base"][3], many["tuned"][3]
    page = write(many)
    lost, won = section(page, "flipped-answers").split("</details>")[:2]
    assert "Lost: only base is right, 1 questions" in lost
    assert rows(lost) == {"val.jsonl:4": "Question about colour? yes ✗ no ✓ yes"}
    assert "Won: only tuned is right, 59 questions; the first 50" in won and len(rows(won)) == 50
    assert "McNemar p &lt; 0.001" in page


@pytest.mark.parametrize("kind", ["tuned", "base"])
def test_one_kind_alone_has_no_comparison(write, kind):
    page = write({kind: pair()[kind]}, facts={"checkpoint": ""} if kind == "base" else None)
    assert not section(page, "flipped-answers") and "McNemar" not in page and "difference" not in page
    assert ("none: base model" in page) == (kind == "base")


def test_the_origin_names_command_facts_and_settings(write):
    part = words(section(write(pair()), "origin"))
    assert "eval.py --ckpt x" in part
    table = rows(section(write(pair(), facts={"versions": {"torch": "2.8"}, "merge": True}), "origin"))
    assert table["versions.torch"] == "2.8" and table["merge"] == "true"
    assert table["max_tokens"] == "4321" and table["model"] == "m/Qwen"


def test_the_same_evaluation_gives_the_same_file(write):
    assert write(pair(), METRICS) == write(pair(), METRICS)


# ------------------------------------------------------------------------------------------------------------- pictures


def test_the_gallery_shows_every_type_and_wrong_answers_and_says_how_many(write):
    answers = [answered(i, "no" if i % 97 == 5 else "yes") for i in range(2000)]
    answers[1234] = answered(1234, "yes", question_type="rare")
    page = write({"tuned": answers})
    cards = Elements(page).cards()
    wrong = sum(not answer["right"] for answer in answers)
    assert Counter(card["data-answer"] for card in cards) == {"wrong": wrong, "right": 300 - wrong}
    assert {card["data-type"] for card in cards} == {"yes/no", "count", "size", "colour", "rare"}
    assert f"300 of 2,000 questions: {wrong} of {wrong} wrong answers" in words(page)
    assert [card["data-answer"] for card in cards] == ["wrong"] * wrong + ["right"] * (300 - wrong)


def test_a_picture_with_many_questions_is_embedded_once_small_and_without_its_comment(write, tmp_path):
    answers = [answered(i, "yes", images=["a.jpg"]) for i in range(6)]
    answers += [answered(6, "no", images=["a.jpg", "b.png"], confidence=0.4), answered(7, "no", images=[])]
    Image.new("RGB", (800, 400)).save(
        tmp_path / "a.jpg", comment=b"Jane Doe", exif=b"Exif\0\0II*\0\x08\0\0\0\0\0Jane Doe"
    )
    Image.fromarray(np.full((20, 10), 0x8000, np.uint16)).save(tmp_path / "b.png")
    page = write({"tuned": answers}, pictures=False)
    data = [base64.b64decode(uri) for uri in re.findall(r'href="data:image/jpeg;base64,([^"]+)"', page)]
    first, second = (Image.open(io.BytesIO(jpeg)) for jpeg in data)
    assert {first.size, second.size} == {(256, 128), (10, 20)} and not any(b"Jane Doe" in jpeg for jpeg in data)
    assert second.getpixel((5, 5))[0] in range(126, 131)  # 16 bits a pixel, not clipped to white
    assert page.count("<use ") == 8 and page.count('aria-label="picture a.jpg"') == 7


def test_pictures_that_are_gone_leave_a_placeholder(write, tmp_path):
    (tmp_path / "0.png").write_bytes(b"no picture")
    page = write({"tuned": [answered(i, "yes") for i in range(8)]}, pictures=False)
    assert (
        page.count('<p class="gone">0.png: no picture</p>') == page.count('<p class="gone">1.png: no picture</p>') == 4
    )


def test_a_large_evaluation_stays_under_ten_megabytes(tmp_path):
    """8,786 questions on pictures of noise, which compress worst."""
    random, answers = np.random.default_rng(0), [answered(i, "yes" * (i % 3) + "no" * 200) for i in range(8786)]
    for number in range(200):
        Image.fromarray(random.integers(0, 256, (256, 256, 3), dtype=np.uint8)).save(tmp_path / f"{number}.bmp")
    images = [[str(tmp_path / f"{i % 200}.bmp")] for i in range(len(answers))]
    page = report.gallery({"tuned": answers, "base": answers}, images)
    assert 7_500_000 < len(page) < 9_000_000
    cards = Elements(page).cards()
    assert 100 < len(cards) < 300 and f"{len(cards)} of 8,786 questions" in page
    assert {card["data-type"] for card in cards} == {"yes/no", "count", "size", "colour"}
    assert len(Elements(report.gallery({"tuned": answers}, images[:1] * len(answers))).cards()) == 300  # of one picture


# ----------------------------------------------------------------------------------------------------- text stays text


def hostile() -> dict[str, list[dict]]:
    changes = {"question": HOSTILE, "question_type": HOSTILE, "where": HOSTILE, "images": ["'\"><img src=x>.png"]}
    changes |= {"options": {HOSTILE: 0.9, "b": 0.1}, "option": HOSTILE, "by": {HOSTILE: HOSTILE}}
    answers = [answered(i, HOSTILE, answer=HOSTILE if i % 2 else "yes", **changes) for i in range(8)]
    return {
        HOSTILE: answers,
        "base": [answered(i, "yes", answer=answer["answer"], **changes) for i, answer in enumerate(answers)],
    }


def test_rows_answers_and_settings_stay_text(write):
    page = write(
        hostile(), METRICS, {"model": HOSTILE, "checkpoint": f"{HOSTILE}/<img src=x>", HOSTILE: HOSTILE}, pictures=False
    )
    elements = Elements(page).elements
    tags = Counter(tag for tag, _ in elements)
    assert tags["script"] == tags["style"] == tags["title"] == 1 and not tags["img"] and tags["article"] == 8
    assert not [name for _, attrs in elements for name in attrs if name.startswith("on") or name == "src"]
    assert {attrs["data-type"] for attrs in Elements(page).cards()} == {HOSTILE}
    for part in re.findall(r"<(?:script|style)>(.*?)</(?:script|style)>", page, re.DOTALL):
        assert "onerror" not in part and "broken" not in part


def test_the_page_refers_to_nothing_outside_itself(write):
    page = write(pair(), METRICS)
    links = [attrs[name] for _, attrs in Elements(page).elements for name in ("href", "src", "action") if name in attrs]
    assert len(links) > 50 and all(link.startswith(("#", "data:image/jpeg;base64,")) for link in links)
    style = re.search("<style>(.*?)</style>", page, re.DOTALL)[1]
    assert "url(" not in style and "@import" not in style and "http" not in re.sub("http-equiv", "", page)
    policy = next(attrs["content"] for tag, attrs in Elements(page).elements if tag == "meta" and "http-equiv" in attrs)
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy


# -------------------------------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    """Open an address in Chromium without a window; returns what it prints."""
    if not shutil.which("chromium"):
        if os.geteuid() or not shutil.which("apt-get"):
            pytest.skip("chromium is not installed, and installing it needs root and apt-get")
        install = "apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium </dev/null"
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        done = subprocess.run(["sh", "-c", install], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    profile = tmp_path_factory.mktemp("chromium")

    def run(address: str, *options: str) -> str:
        words = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}", *options]
        return subprocess.run([*words, address], capture_output=True, text=True, check=True, timeout=120).stdout

    return run


def test_a_link_opens_a_filtered_view(write, tmp_path, chromium):
    write(pair(), METRICS)

    def shown(hash: str) -> Counter:
        page = Elements(chromium(f"file://{tmp_path}/report.html{hash}", "--dump-dom"))
        assert len(page.cards(shown=False)) == 40
        assert not [attrs for tag, attrs in page.elements if tag == "form" and "hidden" in attrs]
        return Counter((card["data-type"], card["data-answer"]) for card in page.cards())

    everything = {("yes/no", "wrong"): 10, ("count", "right"): 10, ("size", "right"): 10, ("colour", "right"): 10}
    assert shown("") == everything == shown("#calibration")
    assert shown("#type=yes%2Fno&answer=wrong") == {("yes/no", "wrong"): 10} and not shown("#type=size&answer=wrong")
    assert shown("#q=ABOUT+size") == {("size", "right"): 10} and shown("#answer=right").total() == 30


def test_choosing_a_filter_changes_the_address(write, tmp_path, chromium):
    page = re.sub('<meta http-equiv="Content-Security-Policy"[^>]*>', "", write(pair()))
    chosen = "wanted.answer.value = 'wrong'; wanted.q.value = 'a b'; form.dispatchEvent(new Event('input'));"
    page = page.replace("</body>", f"<script>{chosen} document.title = location.hash;</script></body>")
    (tmp_path / "chosen.html").write_text(page, encoding="utf-8")
    page_shown = chromium(f"file://{tmp_path}/chosen.html", "--dump-dom")
    assert "<title>#answer=wrong&amp;q=a+b</title>" in page_shown and ">0 shown</output>" in page_shown


def test_an_injected_script_does_not_run(write, tmp_path, chromium):
    page = write(hostile(), METRICS, pictures=False)
    page_shown = chromium(f"file://{tmp_path}/report.html#q={HOSTILE.split()[0]}", "--dump-dom")
    assert "<title>Evaluation of a/checkpoint-000020 on val.jsonl</title>" in page_shown and not re.search(
        r"<img\b", page_shown
    )
    assert len(Elements(page_shown).cards()) == 8
    page = page.replace(
        "</body>", "<script>document.title = 'broken'</script><img src=x onerror=\"document.title=1\"></body>"
    )
    (tmp_path / "injected.html").write_text(page, encoding="utf-8")
    # The page's policy stops scripts that are not its own.
    page_shown = chromium(f"file://{tmp_path}/injected.html", "--dump-dom")
    assert "<title>Evaluation of a/checkpoint-000020 on val.jsonl</title>" in page_shown


WIDTHS = """<style>iframe { border: 0; height: 900px; width: %dpx }</style><iframe src="%s"></iframe>
<script>onload = () => { const root = document.querySelector("iframe").contentDocument.documentElement;
const inner = [...root.querySelectorAll("th, td, text, polyline")];
const rights = inner.map(each => each.getBoundingClientRect()).map(box => [box.left, box.right]);
document.title = [root.scrollWidth, Math.round(Math.min(...rights.map(r => r[0]))), Math.round(Math.max(...rights.map(
r => r[1]))), Math.round(Math.max(...inner.map(each => each.getBoundingClientRect().bottom)))].join(" ") }</script>"""


@pytest.mark.parametrize(
    ("name", "width"), [("report.html", 390), ("report.html", 1400), *(("curves.svg", w) for w in (390, 1000, 1400))]
)
def test_page_and_curves_fit_any_width(write, tmp_path, chromium, name, width):
    """No table is wider than the window, and narrow curves are one below the other."""
    many = {kind: [a | {"by": {"complexity_level": "x"}} for a in part] for kind, part in pair().items()}
    write(many, METRICS)
    steps = [line | {"step": 1000 * line["step"]} for line in METRICS]
    (tmp_path / "curves.svg").write_text(charts.sheet(charts.curves(steps)), encoding="utf-8")
    (tmp_path / "frame.html").write_text(WIDTHS % (width, name), encoding="utf-8")
    shown = chromium(f"file://{tmp_path}/frame.html", "--dump-dom", "--allow-file-access-from-files")
    scrolled, left, right, bottom = map(int, re.search("<title>(.*) (.*) (.*) (.*)</title>", shown).groups())
    assert scrolled <= width and left >= 0 and right <= width
    if name == "curves.svg":
        assert bottom > 650 if width == 390 else bottom < 270


def test_page_and_curves_follow_the_reader_s_colour_scheme(write, tmp_path, chromium):
    write(pair())
    (tmp_path / "curves.svg").write_text(charts.sheet(charts.curves(METRICS)), encoding="utf-8")
    dark, light = ((16, 20, 24), (86, 180, 233), (230, 159, 0)), ((255, 255, 255), (0, 114, 178), (179, 89, 0))
    for scheme, (paper, blue, orange) in enumerate((dark, light)):
        options = (f"--screenshot={tmp_path}/page.png", f"--blink-settings=preferredColorScheme={scheme}")
        for name, lines in (("report.html", set()), ("curves.svg", {blue, orange})):
            chromium(f"file://{tmp_path}/{name}", *options)
            drawn = Image.open(tmp_path / "page.png").convert("RGB")
            assert drawn.getpixel((2, 2)) == paper
            assert lines <= {colour for _, colour in drawn.getcolors(drawn.width * drawn.height)}
