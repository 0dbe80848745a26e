"""train.py, and eval.py after it, as users run them, on a tiny model."""

import copy
import json
import shutil
import signal
import tomllib
from functools import partial
from importlib.util import find_spec

import faults
import pytest
import tiny
import torch
from faults import at_step, clean, copy_until, truncate
from runs import Run, adapter, arguments, lines, losses, same
from safetensors.torch import load_file

import eval as evaluation
import train
import trees
from common import InputError
from dist_utils import STOPPED, Stop
from model import TreeModel, load_base
from modeling import loading
from modeling.lora import add_lora
from training import checkpoints
from training.settings import parse_settings


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """One undisturbed run."""
    output = tmp_path_factory.mktemp("run") / "out"
    train.main(arguments(world, output))
    return output


def test_a_run_leaves_settings_metrics_and_checkpoints(world, finished):
    settings = tomllib.loads((finished / "settings.toml").read_text())
    assert settings["lr"] == 0.02 and settings["train"] == [str(world / "rows.jsonl")] and len(settings) >= 29
    assert [line["step"] for line in lines(finished, "train")] == [1, 2, 3, 4, 5, 6]
    assert all(
        line["loss"] > 0 and line["grad_norm"] > 0 and line["questions_per_s"] > 0 for line in lines(finished, "train")
    )
    evals = lines(finished, "eval")
    assert [line["step"] for line in evals] == [2, 4, 6]
    assert all({"exact_match", "loss", "questions", "by_type"} <= line.keys() for line in evals)
    best = json.loads((finished / "best.json").read_text())
    assert best["exact_match"] == max(line["exact_match"] for line in evals)
    kept = sorted(path.name for path in finished.glob("checkpoint-*"))
    assert kept == sorted({"checkpoint-000004", "checkpoint-000006", best["checkpoint"]})
    assert not list(finished.glob(f"{checkpoints.PARTIAL}*"))


def test_a_checkpoint_is_a_plain_adapter_with_the_same_logits(world, finished, tmp_path):
    """Loaded with transformers and peft alone, against the product's own model with the same weights."""
    from transformers import AutoTokenizer

    from data import build_batch
    from inputs.images import image_settings
    from modeling.lora import load_adapter
    from trees import Assignment, grow_tree

    folder = finished / "checkpoint-000006"
    assert {path.name for path in folder.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "state.pt", "manifest.json", "README.md"
    }  # fmt: skip
    assert all(".language_model.layers." in name for name in load_file(folder / "adapter_model.safetensors"))
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(world / "model")
    base = load_base(str(world / "model"), torch.float32, torch.device("cpu"))
    ours = TreeModel(load_adapter(base, folder), image_settings(world / "model")).eval()
    reference = tiny.Reference(world, ours, tmp_path)
    reference.model.eval()
    rows = [json.loads(line) for line in (world / "rows.jsonl").read_text().splitlines()]
    data, dataset = tiny.load_world(world)
    for index in (0, 20, 29, 32):
        batch = build_batch(data, Assignment((grow_tree(data.samples, [index]),)), dataset.settings)
        inputs = reference.inputs(rows[index])
        plain = reference.model(**inputs).loss
        token_losses, _ = ours(batch)
        torch.testing.assert_close(token_losses.mean(), plain, rtol=1e-5, atol=1e-6)
    assert AutoTokenizer.from_pretrained(world / "model")


@pytest.mark.parametrize("done", [2, 4])  # 2 is mid-epoch
def test_a_resumed_run_is_the_undisturbed_one_to_the_last_bit(world, finished, tmp_path, done):
    output = tmp_path / "out"
    train.main(arguments(world, output, keep=9))
    for folder in output.glob("checkpoint-*"):
        if int(folder.name[-6:]) > done:
            shutil.rmtree(folder)
    train.main(arguments(world, output, keep=9, resume="auto"))
    resumed, undisturbed = adapter(output, 6), adapter(finished, 6)
    assert all(torch.equal(resumed[name], undisturbed[name]) for name in undisturbed)
    for event in ("train", "eval"):
        ours, theirs = lines(output, event), lines(finished, event)
        assert [(line["step"], line["loss"]) for line in ours] == [(line["step"], line["loss"]) for line in theirs]


def test_two_ranks_end_like_one_and_eval_agrees_with_teacher_forcing(world, tmp_path):
    output = tmp_path / "out"
    settings = {"max-steps": 80, "epochs": 16, "lr": 0.005, "lora-dropout": 0.0, "eval-every": 0, "save-every": 0}
    settings |= {"schedule": "constant", "warmup": 0}
    tracked = ["--tensorboard"] if find_spec("tensorboard") else []
    text = Run(arguments(world, output, **settings) + tracked, tmp_path / "log", ranks=2).succeed()
    assert len(list(output.glob("tensorboard/*"))) == len(tracked)  # by rank 0 alone
    assert "⟦" in text and "rehearsed the largest micro-batch: " in text and "q_proj" in text
    alone = tmp_path / "alone"
    train.main(arguments(world, alone, **settings | {"max-steps": 10}))
    losses, expected = ([line["loss"] for line in lines(folder, "train")] for folder in (output, alone))
    assert losses[:10] == pytest.approx(expected, rel=1e-4)
    assert losses[-1] < losses[0] / 2

    teacher_forced = lines(output, "eval")[-1]
    words = ["--ckpt", output, "--max-new-tokens", 16, "--workers", 0]
    Run(words, tmp_path / "log", ranks=2, main=evaluation.main).succeed()
    result = json.loads((output / "eval" / "checkpoint-000080" / "summary.json").read_text())["scores"]["tuned"]
    assert result["all"]["exact_match"]["mean"] == teacher_forced["exact_match"] > 0.1
    by_type = {kind: scores["exact_match"]["mean"] for kind, scores in result["by_type"].items()}
    assert by_type == {kind: share for kind, (share, _) in teacher_forced["by_type"].items()}


def test_eval_asks_questions_as_the_run_did(world, tmp_path):
    output = tmp_path / "out"
    train.main(arguments(world, output, prompt="How {question} briefly?", system="You are", **{"max-steps": 1}))
    evaluation.main(["--ckpt", str(output), "--max-new-tokens=1", "--workers=0"])
    file = output / "eval" / "checkpoint-000001" / "predictions.jsonl"
    predictions = [json.loads(line) for line in file.read_text().splitlines()]
    loss, tokens = (sum(prediction[key] for prediction in predictions) for key in ("loss", "answer_tokens"))
    assert loss / tokens == pytest.approx(lines(output, "eval")[-1]["loss"], rel=1e-4)
    assert predictions[17]["question"] == "Where is finding 0?"


def test_the_base_model_is_scored_without_a_checkpoint(world, tmp_path, capsys):
    rows, out = world / "rows.jsonl", tmp_path / "base"
    words = ["--model", world / "model", "--data", rows, "--images", world / "images", "--output", out]
    evaluation.main([*map(str, words), "--max-new-tokens", "2", "--workers", "0"])
    assert len((out / "predictions.jsonl").read_text().splitlines()) == len(rows.read_text().splitlines())
    assert "base model" in capsys.readouterr().out


def test_a_run_out_of_patience_is_done_with_its_best_checkpoint_and_resumed_like_an_undisturbed_one(
    world, tmp_path, monkeypatch, capsys
):
    """The six evaluations are better, worse, equal with lower loss, equal, worse, worse."""
    scores = [(0.5, 2.0), (0.4, 1.0), (0.5, 1.5), (0.5, 1.5), (0.4, 1.0), (0.5, 1.6), (0.9, 0.1)]
    output = tmp_path / "out"

    def run(evaluated: int, **settings) -> int:
        """Train with these scores, then (0, 0); the first call is the rehearsal's."""
        results = iter([(0.0, 0.0), *scores[evaluated:], *[(0.0, 0.0)] * 9])
        keys = ("exact_match", "loss")
        fixed = {"questions": 1, "by_type": {}}
        monkeypatch.setattr(train, "evaluate", lambda *_: dict(zip(keys, next(results))) | fixed)
        run_settings = {"patience": 3, "eval-every": 1, "save-every": 4, "max-steps": 9, "epochs": 9, "keep": 9}
        return train.main(arguments(world, output, **(run_settings | settings)))

    def ended() -> tuple:
        state = torch.load(output / "checkpoint-000006/state.pt", weights_only=True)
        return (
            (output / "status").read_text().splitlines()[0],
            state["stale"],
            state["best"],
            len(lines(output, "eval")),
        )

    assert run(0) == 0
    best = {"exact_match": 0.5, "loss": 1.5, "step": 3}
    assert ended() == ("done 6", 3, best, 6) and "done: 6 steps of 9" in capsys.readouterr().out
    weights = adapter(output, 6)
    assert run(6, resume="auto") == 0 and ended() == ("done 6", 3, best, 6)
    shutil.rmtree(output / "checkpoint-000006")
    assert run(4, resume="auto") == 0 and ended() == ("done 6", 3, best, 6)
    assert all(torch.equal(adapter(output, 6)[name], weight) for name, weight in weights.items())
    assert run(6, resume="auto", patience=0) == 0 and (output / "status").read_text().startswith("done 9\n")
    assert json.loads((output / "best.json").read_text())["step"] == 7


@pytest.fixture
def spoil(monkeypatch):
    """Make the loss of some steps NaN."""
    monkeypatch.setattr(TreeModel, "forward", TreeModel.forward)  # put back at the end
    return faults.nan_loss


def test_weight_decay_takes_its_share_of_every_weight(world, tmp_path):
    """In step 1 LoRA's A has no gradient, since B is 0: all that moves it is weight decay, by rate times decay."""
    settings = {"max-steps": 1, "lr": 0.1, "warmup": 0, "eval-every": 0, "save-every": 0}
    for decay in (0, 0.5):
        train.main(arguments(world, tmp_path / f"{decay}", **settings, **{"weight-decay": decay}))
    plain, decayed = (adapter(tmp_path / f"{decay}", 1) for decay in (0, 0.5))
    names = [name for name in plain if "lora_A" in name]
    assert names and all(plain[name].any() for name in names)
    for name in names:
        torch.testing.assert_close(decayed[name], plain[name] * (1 - 0.1 * 0.5), rtol=1e-5, atol=1e-8)


def test_a_step_moves_weights_by_the_learning_rate_of_its_place_in_the_schedule(world, tmp_path):
    """AdamW's first step moves every weight that has a gradient by the learning rate, here a tenth in the warm-up."""
    settings = {"max-steps": 1, "lr": 0.1, "warmup": 9, "eval-every": 0, "save-every": 0}
    train.main(arguments(world, tmp_path / "out", **settings))
    moved = max(weight.abs().max() for name, weight in adapter(tmp_path / "out", 1).items() if "lora_B" in name)
    assert moved == pytest.approx(0.01, rel=0.01) and lines(tmp_path / "out", "train")[0]["lr"] == pytest.approx(0.01)


def test_a_run_clips_gradients_to_the_norm_of_its_settings(world, tmp_path):
    """The norm is so small that AdamW's epsilon, 1e-8, outweighs the gradients, and weights hardly move."""
    settings = {"max-steps": 1, "lr": 0.1, "warmup": 0, "eval-every": 0, "save-every": 0}
    for norm in ("0", "1e-12"):  # 0: not clipped
        train.main(arguments(world, tmp_path / norm, **settings, **{"max-grad-norm": norm}))
    free, clipped = (
        max(weight.abs().max() for name, weight in adapter(tmp_path / norm, 1).items() if "lora_B" in name)
        for norm in ("0", "1e-12")
    )
    assert free == pytest.approx(0.1, rel=0.01) and clipped < 1e-4
    norms = [lines(tmp_path / norm, "train")[0]["grad_norm"] for norm in ("0", "1e-12")]
    assert norms[0] == norms[1] > 0.01  # the line tells the norm before clipping


def test_a_step_that_is_not_finite_is_skipped_and_its_samples_named(world, tmp_path, spoil):
    spoil(range(2, 3))
    output = tmp_path / "out"
    train.main(arguments(world, output))
    (skipped,) = lines(output, "skipped")
    assert skipped["step"] == 3 and len(skipped["samples"]) == 8
    assert all(torch.isfinite(weight).all() for weight in adapter(output, 6).values())


def test_one_rank_s_nan_skips_the_step_on_all_ranks(world, tmp_path):
    output = tmp_path / "out"
    fault = partial(faults.nan_loss, range(2, 3), rank=1)
    Run(arguments(world, output), tmp_path / "log", 2, fault).succeed()
    (skipped,) = lines(output, "skipped")
    assert skipped["step"] == 3 and 0 < len(skipped["samples"]) < 8  # those of rank 1 only
    assert [line["step"] for line in lines(output, "train")][-1] == 6
    assert all(torch.isfinite(weight).all() for weight in adapter(output, 6).values())


def test_a_trained_weight_without_a_gradient_is_named_before_step_1(world, tmp_path, monkeypatch):
    def with_a_spare(*args, **more):
        model = add_lora(*args, **more)
        adapter = model.base_model.model.model.language_model.layers[-1].self_attn.q_proj.lora_A
        adapter["spare"] = copy.deepcopy(adapter["default"])  # in no layer's forward pass
        return model

    monkeypatch.setattr(train, "add_lora", with_a_spare)
    with pytest.raises(RuntimeError, match=r"q_proj.lora_A.spare.weight gets no finite gradient from rows.jsonl:\d+"):
        train.main(arguments(world, tmp_path / "out"))
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_ten_steps_in_a_row_that_are_not_finite_stop_the_run(world, tmp_path, spoil):
    spoil(range(1, 100))
    with pytest.raises(RuntimeError, match="10 steps in a row"):
        train.main(arguments(world, tmp_path / "out", **{"max-steps": 40, "epochs": 9}))
    assert len(lines(tmp_path / "out", "skipped")) == 10


def test_a_hub_name_is_downloaded_and_a_folder_is_used_as_it_is(world, monkeypatch):
    asked = []

    def download(name, **only):
        asked.append((name, only))
        return str(world / "model")

    monkeypatch.setattr(loading, "snapshot_download", download)
    assert loading.resolve_model(str(world / "model")) == str(world / "model") and not asked
    name = "Qwen/Qwen3-VL-8B-Instruct"
    assert loading.resolve_model(name) == str(world / "model")
    assert asked == [(name, {"allow_patterns": "config.json"}), (name, {})]


def test_another_run_s_folder_is_not_overwritten(world, finished):
    with pytest.raises(InputError, match="holds a run"):
        train.main(arguments(world, finished))


def test_a_folder_with_checkpoints_of_another_program_is_not_taken(world, tmp_path):
    (tmp_path / "checkpoint-500").mkdir()
    with pytest.raises(InputError, match="holds a run"):
        train.main(arguments(world, tmp_path))
    assert (tmp_path / "checkpoint-500").exists()


def test_other_files_in_the_output_folder_stay(world, tmp_path):
    results = tmp_path / "eval" / "checkpoint-000001"
    others = [tmp_path / "tmp-labels" / "a.csv", tmp_path / "tmp-notes.txt", results / "partial-thesis" / "b.txt"]
    for path in others:
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text("mine")
    train.main(arguments(world, tmp_path, **{"max-steps": 1}))
    words = ["--ckpt", tmp_path, "--data", world / "rows.jsonl", "--images", world / "images"]
    assert evaluation.main([*map(str, words), "--workers=0", "--max-new-tokens=1"]) == 0
    assert (results / "report.html").exists()
    assert all(path.read_text() == "mine" for path in others)


def test_resuming_before_the_newest_checkpoint_names_those_that_will_be_dropped(world, finished, tmp_path, capsys):
    output = shutil.copytree(finished, tmp_path / "out")
    train.main(arguments(world, output, resume=output / "checkpoint-000004"))
    assert "checkpoint-000006 will be removed at the next save" in capsys.readouterr().out


def test_no_epoch_is_planned_before_its_first_step_but_the_first(world, tmp_path, monkeypatch):
    planned, real = [], trees._shuffled_parts

    def shuffled_parts(samples, settings, epoch, *rest):  # a plan begins with it
        planned.append(epoch)
        return real(samples, settings, epoch, *rest)

    monkeypatch.setattr(trees, "_shuffled_parts", shuffled_parts)
    monkeypatch.setattr(train, "fit", lambda *args, fit=train.fit: planned.append("fit") or fit(*args))
    settings = {"max-steps": 6, "epochs": 1000, "eval-every": 0, "save-every": 0}  # 5 steps per epoch
    train.main(arguments(world, tmp_path / "out", **settings))
    assert planned == [0, "fit", 0, 1]
    planned.clear()
    train.main([*arguments(world, "", **settings), "--plan", "--dtype=auto"])
    assert set(planned) == {0}


def test_resuming_on_other_rows_is_refused(world, finished, tmp_path):
    rows = (world / "rows.jsonl").read_text().splitlines()
    (tmp_path / "fewer.jsonl").write_text("\n".join(rows[:-1]))
    with pytest.raises(InputError, match="train rows: was .33 questions"):
        train.main(arguments(world, finished, train=tmp_path / "fewer.jsonl", resume="auto"))


@pytest.mark.parametrize(("schedule", "last"), [("cosine", 0.0), ("linear", 0.0), ("constant", 1.0)])
def test_the_learning_rate_warms_up_and_follows_its_schedule(schedule, last):
    args = parse_settings(["--lr=1", "--warmup=10", f"--schedule={schedule}"])
    rates = [train.learning_rate(step, 110, args) for step in range(110)]
    assert rates[:10] == pytest.approx([(i + 1) / 11 for i in range(10)]) and rates[10] == 1.0
    assert rates[-1] == pytest.approx(last, abs=0.02)
    assert rates[60] == pytest.approx(1.0 if schedule == "constant" else 0.5)
    share = parse_settings(["--lr=1", "--warmup=0.1", "--schedule=constant"])
    assert train.learning_rate(5, 100, share) == pytest.approx(6 / 11)


# ------------------------------------------------------------------------------------------------ several files of rows


@pytest.fixture
def two(world, tmp_path):
    """The world's rows in two files of the same name."""
    rows = (world / "rows.jsonl").read_text().splitlines()
    for folder, part in (("one", rows[:17]), ("other", rows[17:])):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "rows.jsonl").write_text("".join(row + "\n" for row in part))
    return [tmp_path / folder / "rows.jsonl" for folder in ("one", "other")]


def test_a_run_of_two_files_is_logged_planned_held_out_resumed_and_evaluated(world, two, tmp_path, capsys):
    words = ["--train", *map(str, two), "--train-weights", "0.5", "2"]
    output, again = tmp_path / "out", tmp_path / "again"

    def argv(output, **settings):
        run_settings = {"val": "", "val-fraction": 0.5, "seed": 3, "max-steps": 4, "epochs": 2} | settings
        return [word for word in arguments(world, output, **run_settings) if not word.startswith("--train=")] + words

    train.main(argv(output))
    printed = capsys.readouterr().out
    assert f"{two[0]}: 17 questions, 8 per epoch" in printed and f"{two[1]}: 11 questions, 22 per epoch" in printed
    assert "in 4 steps per epoch" in printed and len(lines(output, "train")) == 4
    train.main(argv(tmp_path / "none") + ["--plan"])
    assert "17 questions, 8 per epoch" in capsys.readouterr().out
    train.main(argv(again, **{"max-steps": 4}))
    (again / "checkpoint-000004/manifest.json").unlink()
    train.main(["--config", str(again / "settings.toml"), "--resume=auto"])
    assert all((adapter(again, 4)[name] == weight).all() for name, weight in adapter(output, 4).items())
    with pytest.raises(InputError, match=r"train_weights: was \[0.5, 2.0\], is now \[0.5, 1.0\]"):
        train.main([*argv(output)[:-1], "1", "--resume=auto"])

    evaluation.main(["--ckpt", str(output), "--max-new-tokens=1", "--workers=0"])
    folder = max(output.glob("eval/checkpoint-*"))
    answered = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert len(answered) == 5 and {one["where"].split(":")[0] for one in answered} == {"other/rows.jsonl"}


def test_rows_of_files_of_the_same_name_are_distinguished(world, two):
    for path in two:
        path.write_text("{}\n")
    with pytest.raises(InputError, match=r"one/rows.jsonl:1: no question(.|\n)*other/rows.jsonl:1: no question"):
        train.main([*arguments(world, "", **{"val": world / "rows.jsonl"})[1:], "--plan", "--train", *map(str, two)])


# -------------------------------------------------------------------------------------------------- stopped and gone on


@pytest.mark.parametrize("evaluation", [2, 3, 4])  # the third is that of the last step
def test_an_evaluation_cut_by_a_stop_is_repeated_on_resume(world, undisturbed, tmp_path, monkeypatch, evaluation):
    output, stop, calls = tmp_path / "out", Stop(), []
    real = train.evaluate

    def evaluate(*args):
        calls.append(args)
        if len(calls) == evaluation:  # the first is the rehearsal's
            stop.reason = "SIGTERM"
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate", evaluate)
        assert train.main(faults.arguments(world, output), stop) == STOPPED
    assert (output / "status").read_text().startswith(f"stopped {2 * (evaluation - 1)}\n")
    assert train.main(faults.arguments(world, output)) == 0
    assert same(output, undisturbed) and clean(output)
    assert (output / "best.json").read_text() == (undisturbed / "best.json").read_text()


def test_a_log_interval_across_a_stop_averages_the_same_steps(world, tmp_path):
    whole, parts = (faults.arguments(world, tmp_path / name, log_every=4, eval_every=0) for name in ("whole", "parts"))
    assert train.main(whole) == 0
    fault = partial(at_step, 3, partial(faults.kill_me, signal.SIGTERM))
    assert Run(parts, tmp_path / "log", fault=fault).wait() == [STOPPED]
    assert train.main(parts) == 0
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_metrics_cut_by_a_kill_and_lines_after_the_checkpoint_are_written_again(world, undisturbed, tmp_path):
    output = copy_until(undisturbed, 2, tmp_path / "out")
    with open(output / "metrics.jsonl", "a") as file:
        file.write('{"event": "train", "st')
    assert train.main(faults.arguments(world, output)) == 0
    assert same(output, undisturbed)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("fault", ["deleted", "cut"])
def test_an_image_lost_during_training_is_named_and_training_resumes_when_it_is_back(
    world, undisturbed, tmp_path, fault, workers
):
    images = shutil.copytree(world / "images", tmp_path / "images")
    lost = (images / "a.png").unlink if fault == "deleted" else partial(truncate, images / "a.png", 0.5)
    output = tmp_path / "out"
    argv = faults.arguments(world, output, images=images, workers=workers)
    run = Run(argv, tmp_path / "log", fault=partial(at_step, 3, lost))
    assert run.wait() == [1]
    assert "rows.jsonl:" in run.text() and "a.png" in run.text() and "can no longer be read" in run.text()
    shutil.copy(world / "images" / "a.png", images / "a.png")
    assert train.main(faults.arguments(world, output, images=images)) == 0
    assert same(output, undisturbed)


def test_a_data_worker_that_stalls_is_named(world, tmp_path):
    run = Run(faults.arguments(world, tmp_path / "out", workers=2), tmp_path / "log", fault=faults.stall_in_worker)
    assert run.wait(60) == [1]
    assert "timed out after 3 seconds" in run.text() and "data worker " in run.text() and ".png" in run.text()


REFUSED = {
    "bad rows": ({}, "{}", "can't be used"),
    "no base model": ({"model": "nowhere/at/all"}, "", "model nowhere/at/all"),
    "no such layer": ({"lora_targets": "nothing_proj"}, "", "--lora-targets"),
    "no adapter that fits": ({"init_from": "adapter"}, "", "--init-from"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("named", [True, False])
def test_a_refused_start_leaves_nothing_behind_but_bad_rows_in_a_folder_that_was_named(
    world, tmp_path, monkeypatch, kind, named
):
    more, line, message = REFUSED[kind]
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_model.safetensors").touch()
    (tmp_path / "rows.jsonl").write_text((world / "rows.jsonl").read_text() + line)
    (tmp_path / "mine").mkdir()  # the user's own: stays, though it is empty
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    argv = arguments(world, "mine/out", train=tmp_path / "rows.jsonl", resume="none", **more)
    argv = argv if named else [word for word in argv if not str(word).startswith("--output")]
    with pytest.raises(InputError, match=message):
        train.main([str(word) for word in argv])
    left = [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*")) if path not in before]
    assert (tmp_path / "mine").is_dir()
    assert left == (["mine/out", "mine/out/bad_rows.jsonl"] if named and line else [])
