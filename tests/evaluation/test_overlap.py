"""BLEU, ROUGE-L and strict match against values worked out by hand, and scores by the rows' own fields, with --by."""

import json
import math
import re

import numpy as np
import pytest
from rouge_score import rouge_scorer, scoring
from runs import arguments
from tiny import single

import eval as evaluation
import train
from common import InputError
from evaluation import overlap, scores
from evaluation.benchmarks import strict_match
from evaluation.comparison import read_predictions
from evaluation.page import percent, points
from evaluation.tables import accuracy_table, breakdown_table
from inputs.rows import parse_row


def lines(*pairs: tuple[str, str], **fields) -> list[dict]:
    """Lines of predictions.jsonl, each on a picture of its own, of (prediction, answer)."""
    common = {"question": "?", "question_type": "open", "loss": 1.0, "answer_tokens": 1, "teacher_forced": False}
    return [
        common | {"id": i, "where": f"{i}", "images": [f"{i}.png"], "prediction": prediction, "answer": answer} | fields
        for i, (prediction, answer) in enumerate(pairs)
    ]


# ---------------------------------------------------------------------------------------------------------- the scores


def test_bleu_is_the_geometric_mean_of_four_precisions_over_all_rows_without_smoothing():
    def bleu(*pairs: tuple[str, str]) -> float:
        return overlap.corpus_scores(lines(*pairs))["bleu"]["score"] / 100

    one = ("a small polyp is here", "a small polyp is there")
    assert bleu(one) == pytest.approx((4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)
    short = ("two polyps are here", "two polyps are here on the left")
    assert bleu(short) == pytest.approx(math.exp(1 - 7 / 4))  # too short by three words
    both = (8 / 9 * 6 / 7 * 4 / 5 * 2 / 3) ** 0.25 * math.exp(1 - 12 / 9)
    assert bleu(one, short) == pytest.approx(both) and both != pytest.approx((bleu(one) + bleu(short)) / 2)
    assert bleu(("two red polyps", "two red polyps")) == bleu(("a polyp is at the left", "the polyp is in a fold")) == 0
    assert bleu(("A small polyp is here", "a small polyp is here")) < 1  # case counts
    assert "smooth:none" in overlap.corpus_scores(lines(one))["bleu"]["signature"]


def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence():
    def rouge_l(prediction: str, answer: str, **fields) -> float:
        return overlap.row_scores(lines((prediction, answer), **fields))[0]["rouge_l"]

    precision, recall = 2 / 3, 2 / 5  # "red polyp"
    assert rouge_l("The RED polyp.", "a red and large polyp") == pytest.approx(2 * precision * recall / (1 + 1 / 15))
    assert rouge_l("polyp red", "red polyp") == 0.5 and rouge_l("", "yes") == 0
    assert rouge_l("polyps", "polyp") == 0  # not stemmed
    assert rouge_l("two of them", "a pair", answers=["a pair", "two", "of them"]) == pytest.approx(0.8)  # the best one


def test_the_mean_of_rouge_l_is_what_the_bootstrap_of_evaluate_estimates():
    """`evaluate` reports the middle of 1,000 resampled means: here within a fifth of their standard error."""
    texts = [f"{'a red polyp ' * (i % 3)}is seen {'on the left' * (i % 2)}" for i in range(200)]
    pairs = [(texts[i], texts[(7 * i + 1) % 200]) for i in range(200)]
    values = [row["rouge_l"] for row in overlap.row_scores(lines(*pairs))]
    scorer, aggregator = rouge_scorer.RougeScorer(["rougeL"]), scoring.BootstrapAggregator()
    for prediction, answer in pairs:
        aggregator.add_scores(scorer.score(answer, prediction))
    np.random.seed(0)  # of the aggregator
    middle = aggregator.aggregate()["rougeL"].mid.fmeasure
    assert np.std(values) > 0.1
    assert np.mean(values) == pytest.approx(middle, abs=np.std(values) / math.sqrt(200) / 5)
    summary = scores.summarize(lines(*pairs), 0.05)
    assert summary["all"]["rouge_l"]["mean"] == summary["by_type"]["open"]["rouge_l"]["mean"] == np.mean(values)


def test_strict_match_ignores_case_and_outer_white_space_only():
    assert strict_match(" A polyp\n", ["a Polyp "]) == strict_match("two", ["2", "TWO"]) == 1
    for prediction, answer in ("yes.", "yes"), ("the polyp", "a polyp"), ("2", "two"), ("red; pink", "pink; red"):
        assert strict_match(prediction, [answer]) == 0
        assert scores.score_answer(prediction, [answer], 0.05)["exact_match"] == 1


def test_scores_whose_library_is_missing_are_named_in_one_line_and_left_out(monkeypatch):
    rows = lines(("a red polyp is here", "a red polyp is here"), by={"level": 1})
    assert overlap.missing() == ""
    for lacking, said in {
        "sacrebleu": "not scored: BLEU (pip install sacrebleu)",
        "rouge_score": "not scored: ROUGE-L (pip install rouge-score)",
        "sacrebleu rouge_score": "not scored: BLEU, ROUGE-L (pip install sacrebleu rouge-score)",
    }.items():
        monkeypatch.setattr(overlap, "find_spec", lambda name, lacking=lacking: name not in lacking)
        assert overlap.missing() == said
        summary = scores.summarize(rows, 0.05)
        head = breakdown_table("level", "base", summary).splitlines()[0]
        assert ("bleu" in summary) == ("BLEU" in head) == ("sacrebleu" not in lacking)
        assert ("rouge_l" in summary["all"]) == ("ROUGE-L" in head) == ("rouge_score" not in lacking)


# ----------------------------------------------------------------------------------------------------------- own fields


def test_groups_are_in_order_and_a_list_counts_in_each_of_its_elements():
    values = [10, "9", 2, ["polyp", "9"], True, ["polyp", "polyp"], {"a": 1}]
    rows = [{"by": {"class": value}} for value in values] + [{"by": {"other": 1}}, {}]
    groups = scores.group_by_fields(rows)
    assert groups["class"] == [
        *[("2", [2]), ("9", [1, 3]), ("10", [0])],
        *[("polyp", [3, 5]), ("true", [4]), ('{"a": 1}', [6]), ("(none)", [7, 8])],
    ]
    assert groups["other"] == [("1", [7]), ("(none)", [0, 1, 2, 3, 4, 5, 6, 8])]


def test_a_kept_field_is_no_longer_unread_and_is_still_checked():
    row = single("a.png", "Is there text?", "no") | {"Complexity ": 2, "source": "x", "note": "b.png", "level": None}
    assert parse_row("rows:1", row).unread.fields == ["Complexity ", "note"]
    kept = parse_row("rows:1", row, ["complexity", "source", "answer", "level", "note"])
    assert kept.fields["by"] == {"complexity": 2, "source": "x", "answer": "no", "note": "b.png"}
    assert kept.fields["answer"] == "no" and kept.unread.fields == []
    assert ("note", "b.png") in kept.unread.texts  # a picture that the row does not show
    assert "by" not in parse_row("rows:1", row, ["level"]).fields
    with pytest.raises(ValueError, match="`video`: a video or audio can't be used"):
        parse_row("rows:1", row | {"video": "a.mp4"}, ["video"])


def test_many_values_are_cut_on_the_screen():
    rows = [row for i in range(25) for row in lines(("Yes.", "yes"), by={"patient": i})]
    table = breakdown_table("patient", "base", scores.summarize(rows, 0.05)).splitlines()
    assert [line.split()[0] for line in table[1:21]] == list(map(str, range(20)))
    assert table[21].split()[:3] == ["all", "25", "100.0"] and table[21].split()[-3:] == ["0.0", "100.0", "0.0"]
    assert table[22:] == ["5 more values of patient are in summary.json"]


def test_types_and_values_stand_on_one_line_in_their_column():
    """Types of real data sets are longer than ours, and a value may be a text with line breaks."""
    rows = lines(("Yes.", "yes"), by={"note": "two\nlines \x1b[1m"}) + lines(("Yes.", "yes"), by={"note": "short"})
    for row, kind in zip(rows, ("abnormality/condition presence", "count\nof all")):
        row["question_type"] = kind
    summary = scores.summarize(rows, 0.05)
    types, values = accuracy_table({"tuned": summary}), breakdown_table("note", "tuned", summary)
    assert [line.split("  ")[0] for line in types.splitlines()[1:]] == [
        "abnormality/condition presence",
        "count of all",
        "all",
    ]
    assert values.splitlines()[2].startswith(r"two lines \x1b[1m  ") and "\x1b" not in types + values
    for table in (types, values):
        assert len({len(line) for line in table.splitlines()[:3]}) == 1


@pytest.fixture(scope="module")
def data(world, tmp_path_factory):
    """Words that name the world's rows with fields of their own: 17 of complexity 1, 9 of complexity 2, 7 without."""
    rows = [json.loads(line) for line in (world / "rows.jsonl").read_text().splitlines()]
    own = [{"complexity": 1, "note": "x"}] * 17 + [{"complexity": 2}] * 9 + [{}] * (len(rows) - 26)
    path = tmp_path_factory.mktemp("by") / "rows.jsonl"
    path.write_text("".join(json.dumps(row | more) + "\n" for row, more in zip(rows, own)))
    return ["--data", str(path), "--images", str(world / "images"), "--workers=0", "--max-new-tokens=8"]


def test_scores_are_given_by_a_field_of_the_rows(world, data, tmp_path, capsys):
    run = tmp_path / "run"
    steps = {"max_steps": 30, "epochs": 9, "lr": 0.005, "eval_every": 0, "save_every": 0, "val": ""}
    assert train.main(arguments(world, run, **steps)) == 0
    capsys.readouterr()
    words = [*data, "--ckpt", str(run), "--output", str(tmp_path)]
    assert evaluation.main([*words, "--with-base", "--by=complexity"]) == 0
    printed = capsys.readouterr().out
    assert "fields that nothing reads:\n  note (17 rows" in printed and "complexity (" not in printed
    assert "not scored" not in printed
    summary = json.loads((tmp_path / "summary.json").read_text())
    answers = {"tuned": "predictions.jsonl", "base": "predictions-base.jsonl"}
    answers = {kind: read_predictions(tmp_path / name) for kind, name in answers.items()}
    where = {"1": slice(0, 17), "2": slice(17, 26), "(none)": slice(26, None)}
    assert [line.get("by") for line in answers["tuned"][15:28]] == [{"complexity": n} for n in [1] * 2 + [2] * 9] + [
        None
    ] * 2
    for kind, given in answers.items():
        groups = summary["scores"][kind]["by"]["complexity"]
        assert list(groups) == list(where)
        table = printed[printed.index(f"complexity, {kind}") :].splitlines()[1:5]
        for value, line in zip(where, table):
            alone = scores.summarize(given[where[value]], 0.05)
            assert groups[value] == alone["all"] | {"bleu": alone["bleu"]}
            exact, strict, rouge = (100 * alone["all"][s]["mean"] for s in ("exact_match", "strict_match", "rouge_l"))
            cells = [value, str(len(given[where[value]])), f"{exact:.1f}"]
            ends = [f"{strict:.1f}", f"{rouge:.1f}", f"{alone['bleu']['score']:.1f}"]
            assert (line.split()[:3], line.split()[-3:]) == (cells, ends)
        assert table[3].split()[:2] == ["all", str(len(given))]
    compared = summary["comparison"]["by"]["complexity"]
    for value, part in where.items():
        right = [np.mean([line["right"] for line in answers[kind][part]]) for kind in ("tuned", "base")]
        assert compared[value]["mean"] == pytest.approx(right[0] - right[1])
    assert any(compared[value]["mean"] > 0 for value in where)
    report = (tmp_path / "report.html").read_text()
    part = re.search(r'<section id="by-field">.*?</section>', report, re.S)[0]
    papers = [f"{name}, tuned / base" for name in ("strict match %", "ROUGE-L %", "BLEU")]
    head = ["complexity", "questions", "exact match, tuned", "exact match, base", "difference, points", *papers]
    assert re.findall(r'<th scope="col">(.*?)</th>', part) == head
    assert re.findall(r'<th scope="row">(.*?)</th>', part) == list(where)
    for value, row in zip(where, re.findall(r"<tr><th.*?</tr>", part)[1:]):
        tuned, base = (summary["scores"][kind]["by"]["complexity"][value] for kind in ("tuned", "base"))
        cells = [percent(tuned["exact_match"]), percent(base["exact_match"]), points(compared[value])]
        cells += [f"{100 * tuned[s]['mean']:.1f} / {100 * base[s]['mean']:.1f}" for s in ("strict_match", "rouge_l")]
        cells += [f"{tuned['bleu']['score']:.1f} / {base['bleu']['score']:.1f}"]
        assert re.findall("<td[^>]*>(.*?)</td>", row)[1:] == cells
    assert f"{summary['scores']['tuned']['bleu']['score']:.1f}</td>" in report.split("BLEU, 0 to 100")[1][:140]


def test_an_evaluation_without_the_libraries_says_so_once(world, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(overlap, "find_spec", lambda name: None)
    assert evaluation.main([*data, "--model", str(world / "model"), "--output", str(tmp_path), "--by=complexity"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("not scored: BLEU, ROUGE-L (pip install sacrebleu rouge-score)\n") == 1
    assert printed.count("BLEU") == printed.count("ROUGE-L") == 1
    report = (tmp_path / "report.html").read_text()
    assert "strict match %, base" in report and "ROUGE-L" not in report and "BLEU" not in report


def test_a_field_that_no_row_has_is_refused_in_one_line(data, world, tmp_path):
    words = [*data, "--model", str(world / "model"), "--output", str(tmp_path / "new")]
    with pytest.raises(InputError) as error:
        evaluation.main([*words, "--by=complexity", "--by=complexty"])
    said = f"--by complexty: no row of {data[1]} has this field; did you mean complexity?"
    assert str(error.value) == said and not (tmp_path / "new").exists()
    with pytest.raises(InputError, match="--by: not with --question"):
        evaluation.parse(["--question=Why?", "--by=complexity"])
