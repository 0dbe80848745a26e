"""CSV and LaTeX hold the numbers of summary.json."""

import csv
import io
import re

from evaluation import scores, tables


def answered(number: int, right: bool) -> dict:
    answer = {"id": f"r{number}", "where": f"val.jsonl:{number}", "images": [f"{number // 3}.png"], "question": "What?"}
    answer |= {"answer": "a & b", "prediction": "a & b" if right else "c", "question_type": "open"}
    return answer | {"by": {"cost_%": f"{number % 2}"}, "loss": 0.5, "answer_tokens": 2, "teacher_forced": right}


def summary() -> dict:
    base, tuned = ([answered(i, i % every == 0) for i in range(12)] for every in (3, 2))
    results = {"base": scores.summarize(base, 0.05), "tuned": scores.summarize(tuned, 0.05)}
    return {"scores": results, "comparison": scores.compare(base, tuned)}


def test_the_csv_has_the_unrounded_numbers_of_the_summary():
    content = summary()
    lines = list(csv.DictReader(io.StringIO(tables.summary_csv(content))))
    cells = {(line["by"], line["group"], line["score"], line["model"]): line for line in lines}
    assert len(cells) == len(lines)
    for model, result in content["scores"].items():
        groups = {("", ""): result["all"], ("question_type", "open"): result["by_type"]["open"]}
        groups |= {("cost_%", value): means for value, means in result["by"]["cost_%"].items()}
        for (by, group), means in groups.items():
            for score in means.keys() - {"bleu"}:
                line = cells.pop((by, group, score, model))
                numbers = {"value": "mean", "low": "low", "high": "high", "questions": "questions"}
                assert {ours: float(line[ours]) for ours in numbers} == {o: means[score][s] for o, s in numbers.items()}
    comparison = content["comparison"]
    groups = {("", ""): comparison["difference"], ("question_type", "open"): comparison["by_type"]["open"]}
    groups |= {("cost_%", value): mean for value, mean in comparison["by"]["cost_%"].items()}
    for (by, group), mean in groups.items():
        line = cells.pop((by, group, "exact_match", "tuned − base"))
        assert [float(line[end]) for end in ("value", "low", "high")] == [mean[end] for end in ("mean", "low", "high")]
    assert {key[2] for key in cells} <= {"bleu"}
    for (by, group, _, model), line in cells.items():
        result = content["scores"][model]
        score = (result["by"][by][group] if by else result)["bleu"]["score"]
        assert (float(line["value"]), line["low"], line["high"]) == (score, "", "")


def test_the_latex_has_them_in_percent():
    content = summary()
    page = tables.summary_tex(content)
    assert page.count(r"\begin{tabular}{lrrrr}") == page.count(r"\end{tabular}") == 3
    base, tuned = (content["scores"][model]["all"]["exact_match"] for model in ("base", "tuned"))
    cells = [f"{100 * m['mean']:.1f} ({100 * m['low']:.1f} to {100 * m['high']:.1f})" for m in (base, tuned)]
    low, mean, high = (f"{100 * content['comparison']['difference'][end]:+.1f}" for end in ("low", "mean", "high"))
    difference = f"{mean} ({low} to {high})".replace("-", "$-$")
    assert f"exact match & 12 & {cells[0]} & {cells[1]} & {difference} " + r"\\" in page
    assert r"cost\_\%, exact match & questions & base & tuned & tuned $-$ base" in page
    rows = [line for line in page.splitlines() if line.endswith(r"\\")]
    assert all(len(re.findall(r"(?<!\\)&", row)) == 4 for row in rows)


def test_any_text_is_text_in_latex():
    assert tables.tex("50% & a_b\n\n{x}~$") == r"50\% \& a\_b \{x\}\textasciitilde{}\$"
    assert tables.tex("\\^<") == r"\textbackslash{}\textasciicircum{}\textless{}"
    assert tables.tex("≤ 5 μm, TNF-α, Θ") == r"$\leq$ 5 $\mu$m, TNF-$\alpha$, $\Theta$"
    assert tables.tex("δέρμα, 颜色, größe") == "δέρμα, 颜色, größe"  # words stay words
    assert tables.tex("SpO₂, 10⁻⁶, a→b, √2, 5′") == r"SpO$_2$, 10$^-$$^6$, a$\rightarrow$b, $\surd$2, 5$'$"
    assert tables.tex("e\u0301te\u0301 \u200bb") == "été b"  # as copied from a PDF
    assert tables.tex("a\x1bb") == r"a\textbackslash{}x1bb"  # pdfLaTeX stops at control characters


def test_no_name_is_an_option_of_the_line_break_before_it():
    content = summary()
    for part in (*content["scores"].values(), content["comparison"]):
        part["by"] = {"size": dict(zip(("[0.5] left", "* star"), part["by"]["cost_%"].values()))}
    page = tables.summary_tex(content)
    assert "{[}0.5] left & 6 &" in page and "{*} star & 6 &" in page
    assert not re.search(r"^\s*[\[*]", page, re.MULTILINE)


def test_one_model_alone_has_no_difference():
    content = summary()
    alone = {"scores": {"base": content["scores"]["base"]}}
    assert "−" not in tables.summary_csv(alone) and r"\begin{tabular}{lrr}" in tables.summary_tex(alone)
