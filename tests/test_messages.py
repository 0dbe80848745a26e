"""What the commands say about runs without a checkpoint or an end, about paths of the wrong kind, and at the end."""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import eval as evaluation
import merge
import train
from common import InputError
from training import checkpoints
from training.checkpoints import pick_checkpoint


def write(folder: Path, *names: str, status: str = "") -> Path:
    """A folder of empty files, with a run's `status`."""
    for name in (*names, *["status"] * bool(status)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(status if name == "status" else "")
    return folder


RUNS = {  # name: (its files, its status, what is said of it)
    "not begun": (["lock"], "", "is a run that has no checkpoint: it ended before its first one, or they were removed"),
    "running": (
        [],
        "running 3\nstep 3 of 7,704, epoch 0.0\n",
        "has no checkpoint yet: step 3 of 7,704, running or ended",
    ),
    "stopped": ([], "stopped 3\nstep 3 of 40\n", "is a run that has no checkpoint yet: step 3 of 40, stopped"),
    "failed": ([], "failed 3\nstep 3 of 40\n", "is a run that has no checkpoint yet: step 3 of 40, a save failed"),
    "garbage": (["settings.toml"], "\x00\xff", "is a run that has no checkpoint: it ended before its first one"),
    "empty": (["notes.txt"], "", "is neither a run's folder nor a checkpoint"),
    "runs": (
        ["a/checkpoint-000002/state.pt", "b/checkpoint-000002/state.pt"],
        "",
        "; runs in it: {folder}/a, {folder}/b",
    ),
    "adapter": (["adapter_config.json"], "", "is an adapter that was not made here: name it by --adapter"),
    "model": (["config.json"], "", "is a whole model: name it by --model"),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_folder_without_a_checkpoint_is_named_for_what_it_is(tmp_path, name):
    names, status, message = RUNS[name]
    folder = write(tmp_path / name, *names, status=status)
    with pytest.raises(InputError) as error:
        pick_checkpoint(folder)
    assert str(error.value).startswith(f"--ckpt: {folder} ") and message.format(folder=folder) in str(error.value)


def test_a_missing_folder_and_a_file_in_its_place_are_told_apart(tmp_path):
    for path, message in ((tmp_path / "nowhere", "does not exist"), (Path(__file__), "is no folder")):
        for command in (evaluation, merge):
            with pytest.raises(InputError, match=f"--ckpt: {path} {message}"):
                command.main([f"--ckpt={path}", *[f"--out={tmp_path / 'out'}"] * (command is merge)])


def test_an_unfinished_run_says_how_far_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkpoints, "damage", lambda folder: "")
    run = write(tmp_path / "run", status="running 25\nstep 25 of 40, epoch 1.20, loss 2\n")
    best = write(run / "checkpoint-000020", "state.pt")
    for named in (run, best):
        assert pick_checkpoint(named) == best
        said = f"{run} is not finished (step 25 of 40, running or ended by an error): this is its checkpoint-000020\n"
        assert capsys.readouterr().out == said
    (run / "status").write_text("done 40\nstep 40 of 40\n")
    assert pick_checkpoint(run) == best and not capsys.readouterr().out


@pytest.mark.parametrize(
    ("parse", "words", "problems"),
    [
        (evaluation.parse, ["--data=nowhere.jsonl"], ["--data: nowhere.jsonl does not exist"]),
        (evaluation.parse, ["--data=/", f"--images={__file__}"],
         ["--data: / is a folder, no file", f"--images: {__file__} is no folder"]),
        (evaluation.parse, [f"--output={__file__}", f"--adapter={__file__}", f"--model={__file__}"],
         [f"--{name}: {__file__} is no folder" for name in ("adapter", "model", "output")]),
        (evaluation.parse, ["--compare", "a.jsonl", "/"],
         ["--compare: a.jsonl does not exist", "--compare: / is a folder, no file"]),
        (evaluation.parse, ["--closed-sets", "4", "--wokers"],
         ["--closed-sets: no such flag; did you mean --closed-set?",
          "--wokers: no such flag; did you mean --workers?"]),
        (evaluation.parse, ["--dtype=bfloat", "--max-new-tokens=0"],
         ["--max-new-tokens: must be at least 1, not 0",
          "--dtype: 'bfloat' is none of auto, bfloat16, float32; did you mean bfloat16?"]),
        (merge.parse, ["--cktp", "run", "--output=out"],
         ["--cktp: no such flag; did you mean --ckpt?", "--output: no such flag; did you mean --out?",
          "the following arguments are required: --out"]),
        (merge.parse, ["--ckpt=run", "--out=out", "--rows=/", "--images=nowhere"],
         ["--rows: / is a folder, no file", "--images: nowhere does not exist"]),
    ],
)  # fmt: skip
def test_wrong_settings_of_eval_and_merge_are_named_as_those_of_train(parse, words, problems):
    with pytest.raises(InputError) as error:
        parse(words)
    assert str(error.value).split("\n  ")[1:] == problems


@pytest.mark.parametrize(("batches", "rows"), [(["batch"], []), ([], ["--data", "ROWS"])])
def test_the_next_command_can_be_pasted_into_a_shell(monkeypatch, batches, rows):
    monkeypatch.setattr("sys.argv", ["onelook/train.py"])
    run = SimpleNamespace(output=Path("/my runs/it's $1"), prepared=SimpleNamespace(val_batches=batches))
    curves, command = train.next_steps(run).splitlines()
    assert shlex.split(curves) == ["curves:", "/my runs/it's $1/curves.svg"]
    words = shlex.split(command.removeprefix("to evaluate it: "))
    assert words == ["python", "onelook/eval.py", "--ckpt", "/my runs/it's $1", *rows]


@pytest.mark.parametrize("program", ["train.py", "eval.py", "merge.py"])
def test_help_and_wrong_settings_are_answered_before_torch_is_imported(tmp_path, program):
    (tmp_path / "torch.py").write_text("raise RuntimeError('imported')\n")

    def start(*words) -> subprocess.CompletedProcess:
        command = [sys.executable, Path(train.__file__).with_name(program), *words]
        environment = os.environ | {"PYTHONPATH": str(tmp_path)}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    wrong, helped = start("--modle=x", "--out=y", "--ckpt=z"), start("--help")
    assert wrong.returncode == 2 and "--modle: no such flag; did you mean --model?" in wrong.stdout and not wrong.stderr
    assert helped.returncode == 0 and f"usage: {program}" in helped.stdout and not helped.stderr
    assert "imported" in start(*(["--ckpt=x", "--out=y"] if program == "merge.py" else [])).stderr  # it would be seen
