"""What the commands say about runs without a checkpoint or an end, about paths of the wrong kind, and at the end."""

import fcntl
import json
import os
import pty
import re
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
from contextlib import suppress
from pathlib import Path

import pytest

import eval as evaluation
import merge
import train
from common import InputError
from training import checkpoints, settings
from training.checkpoints import pick_checkpoint
from training.description import next_steps

COLUMNS = 100  # of the terminal that everything printed is made for


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


@pytest.mark.parametrize(("has_val", "rows"), [(True, []), (False, ["--data", "ROWS"])])
def test_the_next_command_can_be_pasted_into_a_shell(monkeypatch, has_val, rows):
    monkeypatch.setattr("sys.argv", ["onelook/train.py"])
    curves, title, command = next_steps(Path("/my runs/it's $1"), {}, has_val, is_demo=False).splitlines()
    assert shlex.split(curves) == ["curves:", "/my runs/it's $1/curves.svg"] and title == "to evaluate it:"
    assert shlex.split(command) == ["python", "onelook/eval.py", "--ckpt", "/my runs/it's $1", *rows]


def test_the_demo_ends_with_the_command_that_compares_and_the_one_for_own_rows(monkeypatch):
    monkeypatch.setattr("sys.argv", ["onelook/train.py"])
    _, title, compare, _, own = next_steps(Path("runs/demo-1"), {"step": 1400}, has_val=True, is_demo=True).splitlines()
    assert title == "to evaluate its best checkpoint, of step 1,400:"
    _, program, *words = shlex.split(compare)
    assert program == "onelook/eval.py" and evaluation.parse(words).with_base
    _, program, *words = shlex.split(own)
    assert program == "onelook/train.py"
    given = settings.build_parser().parse_args(words)
    assert given.train == ["train.jsonl"] and given.images == "pictures"


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


def early_output(folder: Path, *words: str, rank: int = 0) -> list[str]:
    """The lines that train.py prints until it imports torch, which fails here."""
    (folder / "torch.py").write_text("raise RuntimeError('imported')\n")
    environment = os.environ | {"PYTHONPATH": str(folder), "RANK": str(rank)}
    command = [sys.executable, Path(train.__file__), *words]
    started = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    assert "RuntimeError: imported" in started.stderr
    return started.stdout.splitlines()


def test_the_demo_says_what_it_does_before_torch_is_imported_on_rank_0_alone(tmp_path):
    told = early_output(tmp_path)
    assert "this is the demo" in told[0] and max(map(len, told)) <= COLUMNS
    assert early_output(tmp_path, rank=1) == [] and early_output(tmp_path, "--plan") == []
    (tmp_path / "rows.jsonl").touch()
    assert early_output(tmp_path, "--train", "rows.jsonl") == []


def on_a_terminal(*command: str, folder: Path) -> list[str]:
    """All lines that a command prints on a terminal of 100 columns; a line that is drawn anew counts as several."""
    pid, terminal = pty.fork()
    if not pid:
        os.chdir(folder)
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 30, COLUMNS, 0, 0))
        os.execvpe(command[0], command, os.environ | {"TERM": "xterm", "COLUMNS": str(COLUMNS)})
    printed = b""
    with suppress(OSError):  # EIO: the command has ended
        while part := os.read(terminal, 1 << 16):
            printed += part
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, printed.decode()
    return re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", printed.decode()))


def test_nothing_that_the_demo_and_its_next_commands_print_is_wider_than_the_terminal():
    """In a folder with a short name: paths are as long as their folders."""
    with tempfile.TemporaryDirectory(prefix="w", dir="/tmp") as short:
        (Path(short) / "onelook").symlink_to(Path(train.__file__).parent)
        told = on_a_terminal(sys.executable, "onelook/train.py", "--max-steps=1", folder=Path(short))
        command = shlex.split(told[[line.startswith("to evaluate") for line in told].index(True) + 1])
        rows = Path(short) / "runs" / "demo-data" / "val.jsonl"
        (rows.parent / "few.jsonl").write_text("".join(rows.read_text().splitlines(keepends=True)[:8]))
        words = ["--max-new-tokens=4", "--workers=0", "--data", str(rows.parent / "few.jsonl")]
        told += on_a_terminal(sys.executable, *command[1:], *words, folder=Path(short))
        merging = ["onelook/merge.py", "--ckpt=runs/demo-1", "--out=merged"]
        told += on_a_terminal(sys.executable, *merging, folder=Path(short))
    assert [line for line in told if len(line) > COLUMNS or "arning" in line] == []
    assert any(line.startswith("tuned − base") for line in told) and any("  rank efficiency" in line for line in told)


def test_a_plan_and_the_warnings_of_rows_fit_the_terminal(world, tmp_path, capsys):
    names = [f"{number}.png" for number in range(20)]
    for name in names:
        shutil.copy(next((world / "images").glob("*.png")), tmp_path / name)
    answers = ("left", "right", "nan", "left")
    rows = [{"image": name, "question": "Where?", "answer": text, "stage": 3} for name in names for text in answers]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = ["--train", str(tmp_path / "train.jsonl"), "--images", str(tmp_path), "--model", str(world / "model")]
    train.main([*files, "--plan", "--batch-size=4", "--time-limit=0.25"])
    told = capsys.readouterr().out
    for part in ("warning: rows that repeat", "nothing reads", "contradict", "GPU hours", "all-reduce", "would use",
                 "time limit", "with --max-pixels", "memory: "):  # fmt: skip
        assert part in told
    ours = [line for line in told.splitlines() if str(tmp_path) not in line and str(world) not in line]
    assert [line for line in ours if len(line) > COLUMNS] == []
