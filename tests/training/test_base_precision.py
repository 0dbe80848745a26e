"""--base-precision in the commands: refused where it can not run, kept on resume, evaluated as trained, and merged."""

import argparse
import json
import re
from pathlib import Path

import pytest
import runs
import tiny
import torch
from transformers import AutoTokenizer

import eval as evaluation
import merge
import train
from common import InputError
from inputs.images import image_settings
from modeling import fp8
from modeling.precision import forward_precision
from training import checkpoints
from training.settings import parse_settings


@pytest.fixture(scope="module")
def run(world, tmp_path_factory) -> Path:
    """Eight steps on FP8 weights."""
    output = tmp_path_factory.mktemp("run") / "out"
    settings = {"max_steps": 8, "epochs": 9, "lr": 0.005, "eval_every": 8, "save_every": 0}
    assert train.main(runs.arguments(world, output, **settings, base_precision="fp8-weights")) == 0
    return output


def test_fp8_products_are_refused_before_weights_are_read_where_no_gpu_has_them(world, run, tmp_path, monkeypatch):
    for command in (train, evaluation):
        monkeypatch.setattr(command, "load_base", lambda *_: pytest.fail("read weights"))
    words = runs.arguments(world, tmp_path / "out", base_precision="fp8-backward")
    with pytest.raises(InputError, match="fp8-backward: FP8 products need .*; bf16 and fp8-weights run here"):
        train.main(words)
    with pytest.raises(InputError, match="--base-precision fp8: FP8 products need a GPU"):
        evaluation.main([f"--ckpt={run}", "--base-precision=fp8"])
    with pytest.raises(InputError, match="--base-precision fp8: --dora needs the weights in bf16"):
        parse_settings(runs.arguments(world, tmp_path / "out", base_precision="fp8") + ["--dora"])


@pytest.mark.parametrize("precision", ["fp8-backward", "fp8"])
def test_a_run_with_fp8_products_learns_and_resumes_bit_for_bit(world, tmp_path, monkeypatch, precision):
    """Emulated."""
    monkeypatch.setattr(fp8, "EMULATED", True)
    settings = {"base_precision": precision, "eval_every": 0, "save_every": 2, "max_steps": 4, "keep": 9}
    whole, again = tmp_path / "whole", tmp_path / "again"
    assert train.main(runs.arguments(world, whole, **settings)) == 0
    losses = [line["loss"] for line in runs.lines(whole, "train")]
    assert losses[-1] < losses[0]
    resume = str(whole / "checkpoint-000002")
    assert train.main(runs.arguments(world, again, **settings, resume=resume)) == 0
    ours, theirs = runs.adapter(again, 4), runs.adapter(whole, 4)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_run_is_not_resumed_at_another_precision(world, run):
    settings = {"max_steps": 8, "epochs": 9, "lr": 0.005, "eval_every": 8, "save_every": 0, "resume": "auto"}
    with pytest.raises(InputError, match="base_precision: was 'fp8-weights', is now 'bf16'"):
        train.main(runs.arguments(world, run, **settings))


def evaluated(run: Path, out: Path, *words: str) -> tuple[dict, list[float]]:
    """What an evaluation's answers depend on, and the loss of each row, summed over its answer tokens."""
    assert evaluation.main([f"--ckpt={run}", "--workers=0", "--max-new-tokens=2", f"--output={out}", *words]) == 0
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    return json.loads((out / "summary.json").read_text())["facts"], [line["loss"] for line in lines]


def test_a_checkpoint_is_evaluated_as_trained_unless_told_otherwise_and_merged_into_the_original_weights(
    world, run, tmp_path, capsys
):
    """LoRA is not added to codes, which would round it away. Merging says what the other weights do to the loss."""
    facts, losses = evaluated(run, tmp_path / "trained")
    assert (facts["base_precision"], facts["merge"]) == ("fp8-weights", False)
    facts, losses_of_bf16 = evaluated(run, tmp_path / "bf16", "--base-precision=bf16")
    assert (facts["base_precision"], facts["merge"]) == ("bf16", True)
    tokens = [int(sample.trained.sum()) for sample in tiny.load_world(world)[0].samples]
    assert sum(losses) / sum(tokens) == pytest.approx(runs.lines(run, "eval")[-1]["loss"], rel=1e-4)

    capsys.readouterr()
    assert merge.main([f"--ckpt={run}", f"--out={tmp_path / 'merged'}"]) == 0
    told = re.search(
        r"loss on the same rows of .*:\n  (.*) on FP8 weights, as trained; (.*) merged", capsys.readouterr().out
    )
    before, after = (sum(of[: merge.ROWS]) / sum(tokens[: merge.ROWS]) for of in (losses, losses_of_bf16))
    assert told.groups() == (f"{before:.4f}", f"{after:.4f}") and before != pytest.approx(after, rel=1e-4)


def test_a_merge_takes_the_rows_that_the_run_held_out(world, tmp_path, capsys):
    settings = {"val": "", "val_fraction": 0.5, "seed": 3, "max_steps": 1, "base_precision": "fp8-weights"}
    assert train.main(runs.arguments(world, tmp_path / "run", **settings)) == 0
    run = checkpoints.read_state(tmp_path / "run" / "checkpoint-000001")
    args = argparse.Namespace(rows="", images="")
    tokenizer, images = AutoTokenizer.from_pretrained(world / "model"), image_settings(world / "model")
    _, data = merge.rows_to_compare(args, run["settings"], run["held_out"], tokenizer, images)
    assert {Path(image).name for image in data.grids} == set(run["held_out"]) == {"c.png", "d.png"}
    assert merge.main([f"--ckpt={tmp_path / 'run'}", f"--out={tmp_path / 'merged'}"]) == 0
    assert "loss on the same rows of" in capsys.readouterr().out


@pytest.mark.parametrize(("trained", "evaluated"), [("bf16", "bf16"), ("fp8-backward", "bf16"), ("fp8", "fp8")])
def test_only_the_forward_pass_of_training_counts_in_an_evaluation(trained, evaluated):
    assert forward_precision(trained) == evaluated
