"""Scores of overlapping words, each by the library that papers use and only where that is installed.

They are what the `evaluate` package computes by default, as metrics/bleu/bleu.py and metrics/rouge/rouge.py of
github.com/huggingface/evaluate (a7dd338) say, so that they can be set beside published numbers. Its METEOR is left out:
docs/comparing.md says why, and how to compute it from predictions.jsonl.
"""

from importlib.util import find_spec

from evaluation.normalization import accepted

LIBRARIES = {"sacrebleu": "BLEU", "rouge_score": "ROUGE-L"}  # module -> the score that needs it


def missing() -> str:
    """One line that names the scores whose library is not installed and how to install it; empty where all are."""
    lacking = [module for module in LIBRARIES if not find_spec(module)]
    if not lacking:
        return ""
    packages = " ".join(module.replace("_", "-") for module in lacking)
    return f"not scored: {', '.join(map(LIBRARIES.get, lacking))} (pip install {packages})"


def corpus_scores(predictions: list[dict]) -> dict:
    """{"bleu": {"score", "signature"}} of all predictions together, from 0 to 100; empty without sacrebleu.

    `evaluate` splits words as sacrebleu does (13a) and does not smooth: where no four words in a row are right, BLEU is
    0. Its numbers are a hundredth of these. Each prediction is compared with its row's `answer` alone.
    """
    if not find_spec("sacrebleu"):
        return {}
    from sacrebleu.metrics import BLEU

    metric, answers = BLEU(smooth_method="none"), [p["answer"] for p in predictions]
    score = metric.corpus_score([p["prediction"] for p in predictions], [answers]).score
    return {"bleu": {"score": score, "signature": str(metric.get_signature())}}


def row_scores(predictions: list[dict]) -> list[dict]:
    """{"rouge_l": F-measure from 0 to 1} of each prediction, the best over the accepted answers; each empty without
    rouge-score.

    `evaluate` does not stem words by default, and gives the middle value of 1,000 bootstrapped means; the mean over
    rows is what that estimates. Only a to z and digits count as letters of a word.
    """
    if not find_spec("rouge_score"):
        return [{} for _ in predictions]
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    return [{"rouge_l": scorer.score_multi(accepted(p), p["prediction"])["rougeL"].fmeasure} for p in predictions]
