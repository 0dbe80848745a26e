"""run.slurm on a real SLURM with two nodes on this machine: jobs out of time, cancelled, failed, on two nodes."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from faults import arguments
from runs import ROOT, Run, adapter, same, wait_for

ONE_GPU = {"SLURM_GPUS_ON_NODE": "1"}  # what SLURM sets on a node with one GPU: run.slurm starts one process
SLOW_FIRST_JOB = """import os
import time

real_step = train_step


def train_step(*args):
    time.sleep("SLURM_RESTART_COUNT" not in os.environ and 2)
    return real_step(*args)


if __name__"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if os.geteuid() or not shutil.which("apt-get"):
        pytest.skip("setting up SLURM needs root and apt-get")
    folder = tmp_path_factory.mktemp("slurm")
    script = ROOT / "tests" / "slurm_cluster.sh"
    up = subprocess.run([script, "up", folder], capture_output=True, text=True, check=False)
    assert up.returncode == 0, up.stdout + up.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        patch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        yield
        subprocess.run([script, "down", folder], check=True)


@pytest.fixture
def program(tmp_path):
    """A copy of the program, as a user would submit from."""
    for path in [*ROOT.glob("*.py"), ROOT / "run.slurm"]:
        shutil.copy(path, tmp_path)
    for room in ROOT.glob("*/__init__.py"):
        shutil.copytree(room.parent, tmp_path / room.parent.name)
    return tmp_path


def submit(program: Path, options: list[str], argv: list[str], **variables) -> str:
    """Submit run.slurm, with environment variables of its own; returns the job's number."""
    defaults = ["--parsable", "--gpus-per-node=0", "--cpus-per-task=1", "--time=5"]
    command = ["sbatch", *defaults, *options, "run.slurm", *argv]
    environment = os.environ | variables
    done = subprocess.run(command, cwd=program, env=environment, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def job(number: str) -> dict[str, str]:
    shown = subprocess.run(["scontrol", "show", "job", number], capture_output=True, text=True, check=True).stdout
    return dict(re.findall(r"(\w+)=(\S*)", shown))


def ended(program: Path, number: str, timeout: float) -> tuple[str, str]:
    """The job's final state and its log."""
    log = program / f"slurm-{number}.out"
    final = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
    wait_for(
        lambda: job(number)["JobState"] in final, timeout, lambda: f"{job(number)}\n{log.exists() and log.read_text()}"
    )
    return job(number)["JobState"], log.read_text()


def test_a_job_that_runs_out_of_time_is_requeued_until_it_is_done(cluster, program, world):
    """A run of 30 steps in a folder that run.slurm chooses; each step of the first job takes two seconds."""
    argv = arguments(world, program / "whole", max_steps=30, epochs=9, eval_every=0, resume="none")
    Run(argv, program / "log", 2).succeed()
    before, _, after = (program / "train.py").read_text().rpartition("if __name__")
    (program / "train.py").write_text(before + SLOW_FIRST_JOB + after)
    words = [word for word in argv if not word.startswith(("--output", "--resume"))]
    # SLURM looks every 30 s and sends the signal up to 30 s early: from 30 to 60 s after the start, in the steps.
    number = submit(program, ["--time=2", "--signal=USR1@60"], words)
    wait_for(lambda: job(number)["Restarts"] == "1", 200, lambda: job(number))
    subprocess.run(["scontrol", "update", f"JobId={number}", "TimeLimit=5"], check=True)  # enough for the rest
    state, log = ended(program, number, 200)
    assert state == "COMPLETED", log
    assert job(number)["Restarts"] == "1" and "stopped by SIGUSR1" in log and "start 2, on" in log
    assert "torchrun" in log and "no GPU" in log and "Filesystem" in log  # the facts at the top of the log
    assert same(program / "runs" / f"slurm-{number}", program / "whole", step=30)


def test_a_cancelled_job_stops_and_is_not_requeued(cluster, program, world):
    argv = arguments(world, program / "out", max_steps=1000, epochs=1000, eval_every=0)
    number = submit(program, [], argv, **ONE_GPU)
    wait_for((program / "out" / "checkpoint-000002").exists, 90, lambda: job(number))
    subprocess.run(["scancel", number], check=True)
    state, log = ended(program, number, 60)
    time.sleep(7)  # a requeue would have started it again
    assert job(number)["JobState"] == state == "CANCELLED" and "Restarts=0" in f"Restarts={job(number)['Restarts']}"
    assert "stopped by SIGTERM" in log and (program / "out" / "status").read_text().startswith("stopped"), log


def test_a_failing_job_is_not_requeued(cluster, program, world):
    argv = arguments(world, program / "out", train=program / "nothing.jsonl")
    number = submit(program, [], argv, **ONE_GPU)
    state, log = ended(program, number, 90)
    assert state == "FAILED" and job(number)["Restarts"] == "0" and "not requeued" in log
    assert "nothing.jsonl does not exist" in log


def test_two_nodes_train_like_one(cluster, program, world, undisturbed):
    number = submit(program, ["--nodes=2"], arguments(world, program / "out"), **ONE_GPU)
    state, log = ended(program, number, 180)
    assert state == "COMPLETED", log
    assert "2 rank(s)" in log and "n[1-2]" in log
    assert tiny.relative_error(adapter(program / "out"), adapter(undisturbed)) < 1e-2


@pytest.mark.parametrize(
    ("line", "before"), [("output = 'mine'", "done 600"), ('output = "mine"  # where the run goes', "stopped 40")]
)
def test_a_job_that_fails_before_step_1_is_not_judged_by_an_earlier_status(program, line, before):
    (program / "mine").mkdir()
    (program / "mine" / "status").write_text(before + "\n")
    (program / "c.toml").write_text(line + "\n")
    done = without_slurm(program, ["--config", "c.toml", "--resume", "auto"])
    assert done.returncode == 1 and "output mine" in done.stdout and "not requeued" in done.stdout
    assert "requeue" not in (program / "calls").read_text() and "unknown at step unknown" in done.stdout
    assert (program / "mine" / "status").read_text() == before + "\n"  # it still says how far the run is


def test_a_requeued_job_continues_from_its_own_checkpoint_or_starts_afresh(program):
    words = ["--output=out", "--resume", "elsewhere"]
    (program / "out").mkdir()
    (program / "out" / "metrics.jsonl").write_text("{}\n")
    without_slurm(program, words, SLURM_RESTART_COUNT="1")
    assert (program / "started").read_text().endswith("train.py --output=out --resume elsewhere\n")
    assert not (program / "out" / "metrics.jsonl").exists()
    (program / "out" / "checkpoint-000002").mkdir()
    without_slurm(program, words, SLURM_RESTART_COUNT="1")
    assert (program / "started").read_text().endswith("train.py --output=out --resume elsewhere --resume auto\n")


@pytest.mark.parametrize("output", ["run[1]", "-x", "a b", "run*", "$HOME", "it's", 'say "no"', "{a,b}", "ends/"])
@pytest.mark.parametrize("form", ["flag", "config"])
def test_an_output_folder_of_any_name_keeps_the_files_of_its_run(program, output, form):
    folder = program / output
    (folder / "checkpoint-000002").mkdir(parents=True)
    for name in ("metrics.jsonl", "status", "requeued"):
        (folder / name).write_text("2\n")
    (program / "run1").mkdir()  # what the pattern run[1] stands for
    (program / "c.toml").write_text(f"output = {json.dumps(output)}\n", encoding="utf-8-sig")
    words = [f"--output={output}"] if form == "flag" else ["--config", "c.toml"]
    done = without_slurm(program, words, SLURM_RESTART_COUNT="1")
    assert (program / "started").read_text().endswith("--resume auto\n") and f"output {output}\n" in done.stdout
    assert all((folder / name).exists() for name in ("metrics.jsonl", "status", "requeued"))


def test_a_settings_file_that_is_wrong_is_left_to_train_py_which_says_so(program):
    (program / "c.toml").write_text("output = \n")
    done = without_slurm(program, ["--config=c.toml"])
    assert (program / "started").read_text().endswith("train.py --config=c.toml --output runs/slurm-7\n")
    assert "Traceback" not in done.stderr


def without_slurm(program: Path, words: list[str], **more) -> subprocess.CompletedProcess:
    """Run run.slurm with stand-ins for SLURM's commands; srun fails."""
    bin = program / "bin"
    bin.mkdir(exist_ok=True)
    for name, text in {"srun": "echo $@ >started\nexit 1", "scontrol": "echo $@ >>calls"}.items():
        (bin / name).write_text(f"#!/bin/sh\n{text}\n")
        (bin / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n", "SLURM_JOB_NUM_NODES": "1", "SLURM_SUBMIT_DIR": program}
    environment = os.environ | job | more | {"PATH": f"{bin}:{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["bash", "run.slurm", *words]
    return subprocess.run(command, cwd=program, env=environment, capture_output=True, text=True, check=False)


def test_a_slurm_job_has_most_of_the_time_between_signal_and_end_for_a_step_and_a_save():
    text = (ROOT / "run.slurm").read_text()
    wait, ahead = (int(re.search(rf"{name}(\d+)", text)[1]) for name in ("SHUTDOWN_TIMEOUT:-", "--signal=USR1@"))
    assert 0.8 * ahead <= wait < ahead
