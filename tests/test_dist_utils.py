"""Ranks, failures and signals: the number of ranks changes no result, no failure hangs, a signal saves and stops.

A run that was stopped and resumed must end like an undisturbed one, to the last bit of its adapter and metrics.
"""

import os
import random
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import faults
import pytest
import rank_steps
import runs
import tiny
import torch
from faults import arguments, at_step, clean
from runs import Run, adapter, losses, same

import dist_utils
from common import InputError
from dist_utils import SIGNALS, STOPPED, Stop
from training import checkpoints


def steps_on(ranks: int, world, folder, *settings) -> dict:
    """Results of the steps of two epochs on so many ranks; settings: batch size, questions per image, dropout."""
    out = folder / f"{ranks}.pt"
    Run([world, out, *settings], folder / f"{ranks}.log", ranks, main=rank_steps.main).succeed()
    return torch.load(out, weights_only=True)


@pytest.mark.parametrize(("batch_size", "per_image", "dropout"), [(33, 0, 0.0), (3, 0, 0.1)])
def test_ranks_do_not_change_losses_gradients_or_weights(world, tmp_path, batch_size, per_image, dropout):
    """33: one step holds every kind of row; 3: trees are cut over ranks, and steps have fewer questions than ranks."""
    one, two, four = (steps_on(n, world, tmp_path, batch_size, per_image, dropout) for n in (1, 2, 4))
    for other in (two, four):
        assert other["samples"] == one["samples"]
        assert other["losses"] == pytest.approx(one["losses"], rel=1e-5)
        assert other["norms"] == pytest.approx(one["norms"], rel=1e-4)
        assert tiny.relative_error(other["gradients"], one["gradients"]) < 1e-5
        torch.testing.assert_close(other["weights"], one["weights"], rtol=1e-3, atol=1e-5)
    samples = len(tiny.load_world(world)[0].samples)
    steps = -(-samples // batch_size)
    for epoch in (one["samples"][:steps], one["samples"][steps:]):
        assert sorted(i for step in epoch for i in step) == list(range(samples))
    if batch_size == 3:
        assert two["cut"][0] and four["cut"][0]  # the step whose gradients are compared
        assert any(0 in counts for counts in four["counts"])  # an idle rank took part in the all-reduce


def test_eight_three_one_and_two_ranks_resume_each_other(world, undisturbed, tmp_path):
    output = tmp_path / "out"
    for ranks, step in ((8, 1), (3, 3), (1, 4), (2, None)):
        fault = partial(at_step, step, partial(faults.kill_me, signal.SIGTERM)) if step else None
        run = Run(arguments(world, output), tmp_path / f"log{ranks}", ranks, fault)
        assert run.wait() == [STOPPED if step else 0] * ranks, run.text()
    for resumed, expected in zip(losses(output), losses(undisturbed), strict=True):
        assert resumed[:2] == expected[:2] and resumed[2] == pytest.approx(expected[2], rel=1e-4)
    assert tiny.relative_error(adapter(output), adapter(undisturbed)) < 1e-2


# ------------------------------------------------------------------------------------------------------ ranks that fail


def test_more_processes_than_gpus_are_refused_on_each_of_them(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match=r"4 processes on a node where 2 GPU\(s\) are seen: --nproc_per_node=2"):
        dist_utils.start()


def test_one_rank_that_raises_ends_the_job_with_its_traceback_once_and_its_samples(world, on_two_ranks, tmp_path):
    output, started = tmp_path / "out", time.monotonic()
    run = Run(arguments(world, output), tmp_path / "log", 2, partial(at_step, 3, faults.fail, rank=1))
    assert run.wait(60) == [1, 1] and time.monotonic() - started < 60
    assert run.text().count("Traceback") == 1 and run.text().count("ValueError: injected") == 1
    assert "rank 1, step 3, samples 'rows.jsonl:" in run.text() and "rank 0 lost the others" in run.text()
    assert Run(arguments(world, output), tmp_path / "log", ranks=2).wait() == [0, 0]
    assert same(output, on_two_ranks)


def test_wrong_settings_are_printed_once_even_if_rank_0_comes_last(world, tmp_path):
    """torchrun ends all ranks as soon as one exits, so the others give rank 0 the time to print."""
    argv = arguments(world, tmp_path / "out", train=tmp_path / "nothing.jsonl")
    run = Run(argv, tmp_path / "log", 2, faults.rank_0_comes_late)
    run.processes[0].join(30)
    assert run.processes[1].is_alive()
    run.signal(signal.SIGTERM, rank=1)  # as torchrun does
    assert run.wait(5) == [2, STOPPED] and run.text().count("nothing.jsonl does not exist") == 1


def test_a_failure_is_printed_with_its_traceback_whatever_its_text(tmp_path):
    run = Run([], tmp_path / "log", fault=faults.ascii_terminal, main=faults.fail_over_a_strange_name)
    assert run.wait() == [1]
    assert run.text().startswith("\\u2588\n") and "RuntimeError: /gloom/a.jpg" in run.text()
    assert "Traceback" in run.text()


def test_one_rank_that_hangs_is_noticed_and_shows_where(world, tmp_path):
    fault = partial(faults.short_timeouts, 5, partial(at_step, 3, partial(time.sleep, 1000), 1))
    started, run = time.monotonic(), Run(arguments(world, tmp_path / "out"), tmp_path / "log", 2, fault)
    run.processes[0].join(60)
    assert run.processes[0].exitcode == 1 and time.monotonic() - started < 60, run.text()
    assert "rank 0 lost the others (rank 0, step 3, samples" in run.text() and "Timed out" in run.text()
    run.signal(signal.SIGTERM, rank=1)  # as torchrun does when it sees that a rank has left
    run.reached("Timeout (0:00:02)!")
    run.reached("faults.py")  # the stack of the rank that hung
    run.signal(signal.SIGKILL, rank=1)
    assert run.wait() == [1, -signal.SIGKILL]
    assert [folder.name for folder in checkpoints.checkpoints(tmp_path / "out")] == ["checkpoint-000002"]


def test_torchrun_restarts_a_killed_rank_and_the_run_goes_on(world, on_two_ranks, tmp_path):
    """The run has no --output, so train.py chose its folder."""
    fault = f"at_step(4, partial(first_time, Path({str(tmp_path / 'killed')!r}), kill_me), 1)"
    argv = [word for word in arguments(world, tmp_path) if not word.startswith(("--output", "--resume"))]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert faults.torchrun(argv, tmp_path / "log", fault, ("--max-restarts=1",)).wait(timeout=120) == 0
    assert "checkpoint-000002 at step 2" in (tmp_path / "log").read_text()
    assert same(tmp_path / "runs" / "rows-1", on_two_ranks) and not (tmp_path / "runs" / "rows-2").exists()


@pytest.mark.slow
@pytest.mark.parametrize("target", faults.TARGETS)
def test_a_run_killed_at_a_random_moment_resumes_to_the_same_end(world, on_two_ranks, tmp_path, target):
    output = tmp_path / "out"
    story = faults.kill_until_done(arguments(world, output), tmp_path / "log", random.Random(), [target])
    assert same(output, on_two_ranks) and clean(output), story


# -------------------------------------------------------------------------------------------------------------- signals


def test_a_signal_before_step_1_ends_all_at_once_even_in_a_template_that_never_ends(world, tmp_path):
    """The template loops on rank 0; rank 1 waits for it."""
    shutil.copytree(world / "model", tmp_path / "model")
    endless = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
    (tmp_path / "model" / "chat_template.jinja").write_text(endless)
    argv = arguments(world, tmp_path / "out", model=tmp_path / "model")
    run = Run(argv, tmp_path / "log", 2)
    run.reached("output ")
    time.sleep(0.5)
    run.signal(signal.SIGUSR1)
    assert run.wait(5) == [STOPPED, STOPPED]
    assert run.text().count("stopped by SIGUSR1: there was nothing to save yet") == 1
    assert (tmp_path / "out" / "status").read_text().splitlines()[0] == "stopped 0"  # run.slurm requeues it, once


@pytest.mark.parametrize("fault", [faults.no_reader, faults.no_output, faults.full_output])
def test_a_run_whose_output_nobody_can_read_saves_and_stops(world, undisturbed, tmp_path, fault):
    """A terminal that is gone, a closed pipe, a full disk: printing fails, in the loop and at the end."""
    fault = partial(fault, partial(at_step, 3, partial(faults.kill_me, signal.SIGHUP)))
    assert Run(arguments(world, tmp_path / "out"), tmp_path / "log", fault=fault).wait(30) == [STOPPED]
    assert Run(arguments(world, tmp_path / "out"), tmp_path / "log", fault=faults.no_reader).wait() == [0]
    assert same(tmp_path / "out", undisturbed)


def test_a_run_that_waits_for_a_reader_who_sleeps_saves_and_stops(world, undisturbed, tmp_path):
    """A terminal that is halted, a pager: the write never ends, and the signal comes in the middle of it."""
    run = Run(arguments(world, tmp_path / "out"), tmp_path / "log", fault=partial(at_step, 3, faults.sleeping_reader))
    runs.wait_for(lambda: (tmp_path / "out" / "checkpoint-000002").exists(), 60, run.text)
    run.processes[0].join(3)
    assert run.processes[0].is_alive()
    run.signal(signal.SIGHUP)
    assert run.wait(30) == [STOPPED]
    assert Run(arguments(world, tmp_path / "out"), tmp_path / "log").wait() == [0]
    assert same(tmp_path / "out", undisturbed)


def test_a_signal_before_step_1_ends_a_start_whose_reader_sleeps(world, tmp_path):
    run = Run(arguments(world, tmp_path / "out"), tmp_path / "log", fault=faults.sleeping_reader)
    runs.wait_for((tmp_path / "out" / "lock").exists, 60)
    run.signal(signal.SIGTERM)
    assert run.wait(30) == [STOPPED]


def test_files_never_get_the_numbers_of_closed_standard_streams(tmp_path):
    """Native libraries print to them by number."""
    run = Run(
        [], tmp_path / "log", fault=partial(faults.no_output, partial(os.close, 0)), main=faults.number_of_a_new_file
    )
    assert run.wait()[0] > 2


# Three cases of each kind. All signals are handled alike, but for Ctrl-C and a terminal that closes, and a rank that is
# asked alone must take the others along. torchrun hands on what it is told to handle: SLURM's warning, a shutdown that
# reaches every process, and a terminal that closes.
@pytest.mark.parametrize(("number", "rank"), [(signal.SIGTERM, 1), (signal.SIGINT, None), (signal.SIGHUP, None)])
def test_a_signal_to_a_rank_or_to_all_saves_and_can_be_resumed(world, on_two_ranks, tmp_path, number, rank):
    output = tmp_path / "out"
    fault = partial(at_step, 3, partial(faults.kill_me, number), rank)
    run = Run(arguments(world, output), tmp_path / "log", 2, fault)
    assert run.wait() == [STOPPED, STOPPED], run.text()
    assert f"stopped by {number.name} at step 3 of 6" in run.text() and "Traceback" not in run.text()
    assert (output / "status").read_text().startswith("stopped 3\nstep 3 of 6, epoch 0.60, ")
    Run(arguments(world, output), tmp_path / "log", 2).succeed()
    assert (output / "status").read_text().startswith("done 6\nstep 6 of 6, epoch 1.20, loss ")
    assert same(output, on_two_ranks) and clean(output)


def slurm_flags() -> tuple:
    """The signals that run.slurm lets torchrun handle."""
    text = (runs.ROOT / "run.slurm").read_text()
    return tuple(word for word in text.split() if word.startswith("--signals-to-handle="))


def start_slowly(argv: list[str], log: Path, seconds: float):
    """Start a run as run.slurm does, with steps of so many seconds; returns after step 1."""
    launcher = faults.torchrun(argv, log, f"slowly({seconds})", slurm_flags())
    (output,) = (Path(word.removeprefix("--output=")) for word in argv if word.startswith("--output="))
    metrics = output / "metrics.jsonl"
    runs.wait_for(lambda: metrics.exists() and '"step": 1' in metrics.read_text(), 90, log.read_text)
    return launcher


@pytest.mark.parametrize(
    ("number", "receiver", "step"),
    [(signal.SIGUSR1, "torchrun", 4), (signal.SIGTERM, "everything", 0.5), (signal.SIGHUP, "torchrun", 0.5)],
)
def test_a_signal_to_torchrun_or_to_every_process_saves_and_stops(
    world, on_two_ranks, tmp_path, monkeypatch, number, receiver, step
):
    """torchrun also waits for a step of four seconds, within the time that it is given."""
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "20")
    output, log = tmp_path / "out", tmp_path / "log"
    launcher = start_slowly(arguments(world, output, workers=1), log, step)
    everything = runs.descendants(launcher.pid)
    runs.kill([launcher.pid, *(everything if receiver == "everything" else [])], number)
    launcher.wait(timeout=30)
    runs.wait_for(partial(runs.gone, everything), 10)
    assert "exited unexpectedly" not in log.read_text() and "Traceback" not in log.read_text().split("stopped by")[0]
    assert (output / "status").read_text().startswith("stopped")
    Run(arguments(world, output), log, 2).succeed()
    assert same(output, on_two_ranks) and clean(output)


@pytest.mark.slow
def test_torchrun_waits_for_a_step_no_longer_than_it_is_told(world, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "1")
    output = tmp_path / "out"
    launcher = start_slowly(arguments(world, output), tmp_path / "log", 4)
    launcher.send_signal(signal.SIGUSR1)
    launcher.wait(timeout=60)
    assert (output / "status").read_text().startswith("running")


def test_a_run_under_nohup_outlives_its_terminal(monkeypatch):
    before = [signal.getsignal(number) for number in SIGNALS]
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        Stop().watch_signals()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_IGN, signal.SIG_DFL)
    finally:
        for number, handler in zip(SIGNALS, before):
            signal.signal(number, handler)


def test_control_c_twice_quits_at_once(world, tmp_path):
    fault = partial(at_step, 3, partial(time.sleep, 30))
    run = Run(arguments(world, tmp_path / "out"), tmp_path / "log", fault=fault)
    runs.wait_for(lambda: (tmp_path / "out" / "checkpoint-000002").exists(), 60, run.text)
    run.signal(signal.SIGINT)
    time.sleep(0.5)
    assert run.processes[0].is_alive()
    run.signal(signal.SIGINT)
    assert run.wait(5) == [130]
